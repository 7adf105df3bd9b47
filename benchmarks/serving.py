"""What serving costs over the bare model, and beside other servers: ``python -m benchmarks.serving``

    resnet56   8 agents with 8 batches in flight each, against the bare model in process: durable ledger, ledger in
               memory, Triton's Python backend, LitServe, MLServer, Ray Serve; the same weights, threads and pictures
               everywhere
    identity   the same with a model that costs nothing, so that transport alone is measured: one stream, and unary
    one        one picture, one client, unary: latency over the bare model's

Servers that are not installed are named and left out (``benchmarks.triton``, ``benchmarks.peers``). Those that speak
the Open Inference Protocol, ours included, are asked by the stock ``tritonclient``, the others over HTTP; where a
protocol has no stream, as many single calls are kept in flight instead. The subjects of a part take turns, round by
round, so that a busy machine slows all of them: what counts are the ratios within a round, of which the median is
given. Each part prints a JSON line and appends it to benchmarks/results/serving.jsonl; ``--picture FILE.svg`` draws
the last line of each part instead.
"""

import contextlib
import functools
import http.client
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import peers, record, triton
from benchmarks.bare import CLASS_COUNT, SHAPE_CHW, bare_model
from benchmarks.services import (
    ServiceError,
    create_account,
    descendants,
    serving,
    serving_anyone,
    stop_on_sigterm,
)

PARTS = ("resnet56", "identity", "one")
MODEL_NAME = "teacher"
START_SECONDS = 120.0
LONGEST_REQUEST_SECONDS = 120.0
BUDGET_PICTURES = 2**52
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Load:
    """How a subject is asked."""

    clients: int
    """Each has a connection and an account of its own."""
    window: int
    """Requests that each keeps in flight on a stream (or as calls, where there is none); 0: calls, one at a time."""
    batch_pictures: int


LOADS = {
    "resnet56": {"stream": Load(clients=8, window=8, batch_pictures=128)},
    "identity": {
        "stream": Load(clients=1, window=8, batch_pictures=128),
        "unary": Load(clients=8, window=0, batch_pictures=128),
    },
    "one": {"unary": Load(clients=1, window=0, batch_pictures=1)},
}


@click.command()
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="[default: all]")
@click.option("--rounds", default=5, show_default=True, help="Turns that each subject gets.")
@click.option("--seconds", default=10.0, show_default=True, help="Of a turn.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True, help="Of the model, everywhere.")
@click.option("--work-dir", type=click.Path(path_type=Path), help="For the ledger.  [default: a new folder]")
@click.option("--note", default="", help="Kept with the result.")
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE.svg", help="Measure nothing; draw.")
@click.option("--as-client", hidden=True)
@click.option("--as-bare", hidden=True)
def main(
    only: tuple[str, ...],
    rounds: int,
    seconds: float,
    threads: int,
    work_dir: Path | None,
    note: str,
    picture: Path | None,
    as_client: str | None,
    as_bare: str | None,
) -> None:
    """Measure, and keep the figures."""
    if as_client is not None:
        return _be_client(**json.loads(as_client))
    if as_bare is not None:
        return _be_bare(**json.loads(as_bare))
    if picture is not None:
        picture.write_text(_drawn(record.kept("serving")), "utf-8")
        return
    stop_on_sigterm()
    for part in only or PARTS:
        with tempfile.TemporaryDirectory(prefix="mekd-serving-", dir=work_dir) as folder:
            result = record.about("serving", note) | {
                "part": part,
                "rounds": rounds,
                "seconds": seconds,
                "threads": threads,
            }
            for name, load in LOADS[part].items():
                result[name] = asdict(load) | _compare(part, load, Path(folder) / name, rounds, seconds, threads)
        record.keep("serving", result)


def _compare(part: str, load: Load, folder: Path, rounds: int, seconds: float, threads: int) -> dict[str, Any]:
    """Subject -> its figures, and the ratios between them."""
    folder.mkdir()
    turns: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        subjects = {
            name: stack.enter_context(subject) for name, subject in _subjects(part, load, folder, threads).items()
        }
        for round_number in range(rounds):
            names = list(subjects)
            for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
                turns.setdefault(name, []).append(subjects[name].measure(seconds))
                _say(f"{part} {name}: {turns[name][-1]}")
        figures = {name: _figures(of) | subjects[name].peak() for name, of in turns.items()}
    return {"subjects": figures, "ratios": _ratios(turns)}


def _figures(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns; latencies of all requests together are the median turn's."""
    names = [name for name in turns[0] if all(turn[name] is not None for turn in turns)]
    return {name: round(statistics.median(turn[name] for turn in turns), 6) for name in names}


def _ratios(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Median, least and most over the rounds of every ratio that the targets name; differences for latency."""
    found: dict[str, Any] = {}
    others = ("triton", *(peer.name for peer in peers.PEERS))
    ours = (("memory", "bare"), ("sqlite", "bare"), ("sqlite", "memory"))
    for first, second in (*ours, *(pair for other in others for pair in (("memory", other), (other, "bare")))):
        if first in turns and second in turns:
            pairs = list(zip(turns[first], turns[second], strict=True))
            ratios = [a["pictures_per_second"] / b["pictures_per_second"] for a, b in pairs]
            added = [a["p50_ms"] - b["p50_ms"] for a, b in pairs]
            found[f"{first}/{second}"] = _spread(ratios)
            found[f"{first}-{second} p50_ms"] = _spread(added)
    return found


def _spread(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in (statistics.median(values), min(values), max(values))]


# --- subjects ---


class Asked:
    """A child process that works when told to for how long, and the processes that it makes work."""

    def __init__(self, worker: "subprocess.Popen[str]", servers: Sequence[int]) -> None:
        self._worker = worker
        self._servers = servers
        self._line(START_SECONDS)  # ready

    def measure(self, seconds: float) -> dict[str, Any]:
        """pictures_per_second, latencies, and CPU seconds of the server a million pictures."""
        assert self._worker.stdin is not None
        before = _cpu_seconds(self._servers)
        self._worker.stdin.write(f"{seconds}\n")
        self._worker.stdin.flush()
        figures = self._line(seconds + LONGEST_REQUEST_SECONDS)
        used = _cpu_seconds(self._servers) - before
        pictures = figures.pop("pictures")
        return figures | {"cpu_seconds_per_million_pictures": used / pictures * 1e6}

    def peak(self) -> dict[str, int]:
        """The server's largest memory."""
        return {"peak_mib": sum(_peak_mib(pid) for pid in self._servers)}

    def _line(self, within_seconds: float) -> dict[str, Any]:
        assert self._worker.stdout is not None
        ready, _, _ = select.select([self._worker.stdout], [], [], within_seconds)
        line = self._worker.stdout.readline() if ready else ""
        if not line:
            raise ServiceError(f"a load generator said nothing within {within_seconds:.0f} s, or failed")
        found: dict[str, Any] = json.loads(line)
        return found


def _subjects(part: str, load: Load, folder: Path, threads: int) -> dict[str, Any]:
    """Name -> context of an ``Asked``."""
    identity = part == "identity"
    model = folder / "resnet56.pt"
    if identity:
        served = f"identity:{CLASS_COUNT},{','.join(map(str, SHAPE_CHW))}"
    else:
        _save_resnet56(model)
        served = str(model)
    subjects: dict[str, Any] = {}
    if not identity:
        subjects["bare"] = _bare(model, load, threads)
    subjects["memory"] = _ours(served, "memory", load, folder, threads)
    if part != "one":
        subjects["sqlite"] = _ours(served, "sqlite", load, folder, threads)
    if not triton.available():
        _say(f"{part}: without Triton ({triton.missing()})")
    else:
        subjects["triton"] = _triton("" if identity else str(model), load, folder, threads)
    for peer in peers.PEERS:
        if lacking := peers.missing(peer, torch=not identity):
            _say(f"{part}: without {peer.name} ({lacking})")
        else:
            subjects[peer.name] = _peer(peer, "" if identity else str(model), load, folder, threads)
    return subjects


@contextmanager
def _bare(model: Path, load: Load, threads: int) -> Iterator[Asked]:
    settings = {"model": str(model), "batch_pictures": load.batch_pictures, "threads": threads}
    with _worker("--as-bare", settings) as worker:
        yield Asked(worker, [worker.pid])


@contextmanager
def _ours(model: str, books: str, load: Load, folder: Path, threads: int) -> Iterator[Asked]:
    before = descendants()
    # A queue with room for all that is in flight: no account may fill more than its share.
    more = ("--engine-threads", str(threads), "--max-queue-pictures", "65536")
    log = folder / f"{books}.log"
    with ExitStack() as stack:
        if books == "memory":
            address, key = stack.enter_context(serving_anyone(Path(model), log=log, more=more))
            keys = [key] * load.clients
        else:
            ledger = f"sqlite:///{folder}/ledger.db"
            keys = [create_account(ledger, f"agent-{n}", BUDGET_PICTURES) for n in range(load.clients)]
            address = stack.enter_context(serving(Path(model), ledger, log=log, more=more))
        servers = sorted(descendants() - before)
        yield Asked(stack.enter_context(_client(address, keys, load)), servers)


@contextmanager
def _triton(model: str, load: Load, folder: Path, threads: int) -> Iterator[Asked]:
    repository = folder / "models"
    channels, height, width = SHAPE_CHW
    config = f"""
max_batch_size: 128
input [ {{ name: "images", data_type: TYPE_UINT8, dims: [ {channels}, {height}, {width} ] }} ]
output [ {{ name: "probabilities", data_type: TYPE_FP32, dims: [ {CLASS_COUNT} ] }} ]
instance_group [ {{ count: 1, kind: KIND_CPU }} ]
dynamic_batching {{ max_queue_delay_microseconds: 1000 }}
"""
    triton.write_model(repository, MODEL_NAME, config, _TRITON_MODEL.format(model=model, threads=threads))
    before = descendants()
    with triton.serving(repository, log=folder / "triton.log") as address:
        servers = sorted(descendants() - before)
        with _client(address, [""] * load.clients, load) as worker:
            yield Asked(worker, servers)


@contextmanager
def _peer(peer: peers.Peer, model: str, load: Load, folder: Path, threads: int) -> Iterator[Asked]:
    before = descendants()
    with peers.serving(peer, model, threads, log=folder / f"{peer.name}.log") as address:
        servers = sorted(descendants() - before)
        with _client(address, [""] * load.clients, load, path=peer.path, streams=False) as worker:
            yield Asked(worker, servers)


_TRITON_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

from benchmarks.bare import answerer

class TritonPythonModel:
    def initialize(self, args):
        self.answer = answerer({model!r}, {threads})

    def execute(self, requests):
        # Not as_numpy(): with numpy 2 this Triton then gives wrong values (benchmarks/triton.py).
        taken = [np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "images")) for request in requests]
        answers = self.answer(np.concatenate(taken) if len(taken) > 1 else taken[0])
        responses, start = [], 0
        for images in taken:
            part = answers[start : start + len(images)]
            start += len(images)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("probabilities", part)]))
        return responses
"""


def _save_resnet56(path: Path) -> None:
    """Random weights: they cost what trained ones do."""
    import torch

    from networks import registry
    from networks.modelfile import ModelFacts, save_model

    torch.manual_seed(0)
    channels, height, width = SHAPE_CHW
    facts = ModelFacts(
        architecture="resnet56",
        labels=tuple(map(str, range(CLASS_COUNT))),
        channels=channels,
        height=height,
        width=width,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        output="logits",
    )
    save_model(path, registry.build("resnet56", class_count=CLASS_COUNT, channels=channels).eval(), facts)


# --- the children ---


@contextmanager
def _worker(role: str, settings: dict[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving", role, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _client(
    address: str, keys: Sequence[str], load: Load, *, path: str = "", streams: bool = True
) -> contextlib.AbstractContextManager[Any]:
    """``path``: asked there over HTTP, and not with ``tritonclient``."""
    settings = {"address": address, "keys": list(keys), "load": asdict(load), "path": path, "streams": streams}
    return _worker("--as-client", settings)


def _turns() -> Iterator[float]:
    """How long to work, as often as asked; the first line out says that this process is ready."""
    print("{}", flush=True)
    for line in sys.stdin:
        yield float(line)


def _be_bare(model: str, batch_pictures: int, threads: int) -> None:
    answer = bare_model(model, threads)
    images_NCHW = _pictures(batch_pictures)
    for _ in range(3):
        answer(images_NCHW)
    for seconds in _turns():
        latencies = []
        began = now = time.perf_counter()
        while now - began < seconds:
            answer(images_NCHW)
            latencies.append(time.perf_counter() - now)
            now = time.perf_counter()
        _report(latencies, batch_pictures, now - began)


def _be_client(address: str, keys: Sequence[str], load: dict[str, int], path: str, streams: bool) -> None:
    asked = Load(**load)
    clients: list[_StreamClient | _CallingClient]
    if asked.window and streams:
        clients = [_StreamClient(address, key, asked) for key in keys]
    elif path:
        clients = [_CallingClient(functools.partial(_http_call, address, path, asked), asked) for _ in keys]
    else:
        clients = [_CallingClient(_grpc_connect(address, key, asked), asked) for key in keys]
    for client in clients:
        client.work(time.perf_counter() + 0.5)
    for client in clients:
        client.rest()
    for seconds in _turns():
        began = time.perf_counter()
        for client in clients:
            client.work(began + seconds)
        latencies = [latency for client in clients for latency in client.rest()]
        _report(latencies, asked.batch_pictures, time.perf_counter() - began)


class _StreamClient:
    """One ``tritonclient`` that keeps a window full until a time."""

    def __init__(self, address: str, key: str, load: Load) -> None:
        self._load = load
        self._client, self._input = _triton_client(address, load)
        self._until = 0.0
        self._sent: dict[str, float] = {}
        self._latencies: list[float] = []
        self._failure: Exception | None = None
        self._idle = threading.Event()
        self._lock = threading.Lock()
        self._count = 0
        self._client.start_stream(self._answered, headers=_headers(key))

    def work(self, until: float) -> None:
        """Begins; ``rest`` waits."""
        self._until = until
        self._latencies = []
        self._idle.clear()
        for _ in range(self._load.window):
            self._send()

    def rest(self) -> list[float]:
        """Seconds that each request since ``work`` took. Raises what went wrong."""
        if not self._idle.wait(LONGEST_REQUEST_SECONDS) or self._failure is not None:
            raise ServiceError(f"a client failed: {self._failure or 'no answer'}")
        return self._latencies

    def _send(self) -> None:
        with self._lock:
            self._count += 1
            request_id = str(self._count)
            self._sent[request_id] = time.perf_counter()
        self._client.async_stream_infer(MODEL_NAME, [self._input], request_id=request_id)

    def _answered(self, result: Any, error: Exception | None) -> None:
        now = time.perf_counter()
        if error is not None:
            self._failure = error
            return self._idle.set()
        with self._lock:
            self._latencies.append(now - self._sent.pop(result.get_response().id))
            done = not self._sent and now >= self._until
        if now < self._until:
            self._send()
        elif done:
            self._idle.set()


Connect = Callable[[], contextlib.AbstractContextManager[Callable[[], object]]]


class _CallingClient:
    """Threads, one for each request in flight, that call one by one until a time.

    ``connect``: a context of what makes one call; entered once by each thread in each turn.
    """

    def __init__(self, connect: Connect, load: Load) -> None:
        self._connect = connect
        self._thread_count = max(1, load.window)
        self._threads: list[threading.Thread] = []
        self._latencies: list[float] = []
        self._failure: Exception | None = None

    def work(self, until: float) -> None:
        """Begins; ``rest`` waits."""
        self._latencies = []
        self._threads = [
            threading.Thread(target=self._call, args=(until,), daemon=True) for _ in range(self._thread_count)
        ]
        for thread in self._threads:
            thread.start()

    def rest(self) -> list[float]:
        """Seconds that each request since ``work`` took. Raises what went wrong."""
        for thread in self._threads:
            thread.join(LONGEST_REQUEST_SECONDS)
        if self._failure is not None or any(thread.is_alive() for thread in self._threads):
            raise ServiceError(f"a client failed: {self._failure or 'no answer'}")
        return self._latencies

    def _call(self, until: float) -> None:
        try:
            with self._connect() as call:
                while (began := time.perf_counter()) < until:
                    call()
                    self._latencies.append(time.perf_counter() - began)
        except Exception as error:
            self._failure = error


@contextmanager
def _http_call(address: str, path: str, load: Load) -> Iterator[Callable[[], object]]:
    # A new connection in each turn: servers close one that was idle while the others had theirs.
    host, _, port = address.rpartition(":")
    pictures = _pictures(load.batch_pictures).tobytes()
    with contextlib.closing(
        http.client.HTTPConnection(host, int(port), timeout=LONGEST_REQUEST_SECONDS)
    ) as connection:
        yield lambda: peers.post(connection, path, pictures)


def _grpc_connect(address: str, key: str, load: Load) -> Connect:
    client, pictures = _triton_client(address, load)
    call = functools.partial(client.infer, MODEL_NAME, [pictures], headers=_headers(key))
    return lambda: contextlib.nullcontext(call)  # one connection for all threads and turns


def _triton_client(address: str, load: Load) -> tuple[Any, Any]:
    """A client, and the input tensor that it sends."""
    import tritonclient.grpc as oip

    client = oip.InferenceServerClient(address, channel_args=[("grpc.enable_http_proxy", 0)])
    images_NCHW = _pictures(load.batch_pictures)
    pictures = oip.InferInput("images", images_NCHW.shape, "UINT8")
    pictures.set_data_from_numpy(images_NCHW)
    return client, pictures


def _headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


@functools.cache
def _pictures(count: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE_CHW), dtype=np.uint8)


def _report(latencies: Sequence[float], batch_pictures: int, seconds: float) -> None:
    pictures = len(latencies) * batch_pictures
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]) * 1000
    figures = {"pictures": pictures, "pictures_per_second": pictures / seconds}
    print(json.dumps(figures | {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99}), flush=True)


# --- the picture ---

BAR_PX, ROW_PX, LABEL_PX = 340, 22, 215
SUBJECTS = {
    "bare": "bare model, in process",
    "memory": "teacher-serve, books in memory",
    "sqlite": "teacher-serve, durable SQLite",
    "triton": "Triton, Python backend",
    "litserve": "LitServe, HTTP",
    "mlserver": "MLServer",
    "rayserve": "Ray Serve, HTTP",
}


def _drawn(lines: Sequence[dict[str, Any]]) -> str:
    """Bars of pictures a second, by part and load, of the last line of each part."""
    last = {line["part"]: line for line in lines}
    rows: list[str] = []
    y = 10
    for part, loads in LOADS.items():
        for name in loads if part in last else ():
            load = last[part][name]
            figures = {subject: load["subjects"][subject]["pictures_per_second"] for subject in load["subjects"]}
            asked = (
                f"{load['clients']} × {name}, {load['window'] or 1} in flight, batches of {load['batch_pictures']}"
            )
            rows.append(f'<text x="4" y="{y + 14}" font-weight="bold">{part}: {asked}</text>')
            y += ROW_PX
            for subject, label in SUBJECTS.items():
                if subject not in figures:
                    continue
                width = round(BAR_PX * figures[subject] / max(figures.values()))
                colour = "#4477aa" if label.startswith("teacher-serve") else "#bbbbbb"
                rows.append(f'<text x="{LABEL_PX - 6}" y="{y + 14}" text-anchor="end">{label}</text>')
                rows.append(f'<rect x="{LABEL_PX}" y="{y + 3}" width="{width}" height="15" fill="{colour}"/>')
                rows.append(f'<text x="{LABEL_PX + width + 6}" y="{y + 14}">{figures[subject]:,.0f}/s</text>')
                y += ROW_PX
            y += ROW_PX // 2
    size = f'width="{LABEL_PX + BAR_PX + 90}" height="{y}"'
    style = 'font-family="sans-serif" font-size="12"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *rows, "</svg>"]) + "\n"


# --- what the system says ---


def _cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes and of their threads."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS_A_SECOND


def _peak_mib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except ServiceError as error:
        sys.exit(f"error: {error}")
