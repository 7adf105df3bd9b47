"""What does adapting at test time gain, and cost? ``python -m benchmarks.adaptation --run-dir RUN --dataset mnist``

A finished run's student meets streams of pictures (``streams``): spoiled by each corruption (``corruptions``) at
severity 3 and 5, shuffled or class by class; spoiled more and less again; and as they are. A student of MNIST also
meets scikit-learn's pen digits as ``digits``, and the other way round. Every method of METHODS begins each stream
anew and takes it in batches. ``--part development`` has the development part and corruptions of its own: whatever is
tuned is tuned there; no setting may come from ``--part test``.

Cost is processor time of one thread, each batch of a method right after the same batch of the plain student: the
median ratio on shifted and on unshifted pictures. Memory is by how much a fresh process, its student loaded and used
once, grows at most while the method is made and takes up to 1,000 pictures.

Appends to benchmarks/results/adaptation.jsonl one line for each order, batch size and method, and one for each cost;
what a line has, under the same student, streams and method, is not measured again. ``--table`` writes
docs/adaptation-results.md from these lines.
"""

import functools
import hashlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import adaptation_table, datasets, record, streams
from benchmarks.adapters.batch_norm import BatchNorm
from benchmarks.adapters.lame import Lame
from benchmarks.adapters.plain import Plain
from benchmarks.adapters.t3a import T3A
from benchmarks.adapters.tent import Tent
from benchmarks.corruptions import DEVELOPMENT, TEST
from benchmarks.datasets import Labelled
from benchmarks.streams import Stream
from edge_agent.adaptation.adapter import Adapter
from edge_agent.adaptation.memory import Memory
from edge_agent.adaptation.method import Method
from edge_agent.adaptation.statistics import batch_norms
from edge_agent.config import AdaptConfig
from edge_agent.splits import Part
from networks.classifiers import Classifier
from networks.modelfile import ModelFileError, load_model

DATASETS = ("mnist", "mnist-digits", "cifar10")
ORDERS = adaptation_table.ORDERS
SEVERITIES = (3, 5)
BATCHES = (1, 16, 200)
PICTURES, PICTURES_ONE_BY_ONE = 2000, 500
QUICK_PICTURES = 200
WARM_UP_BATCHES = 3
MEMORY_PICTURES, MEMORY_BATCHES = 1000, 100


def student_of(run_dir: Path) -> Classifier:
    """The student of a finished run. Raises ModelFileError where there is none."""
    student = load_model(run_dir / "student.pt").module
    assert isinstance(student, Classifier)
    return student


METHODS: dict[str, Callable[[Path], Method]] = {
    "none": lambda run_dir: Plain(student_of(run_dir)),
    "batch-norm": lambda run_dir: BatchNorm(student_of(run_dir)),
    "lame": lambda run_dir: Lame(student_of(run_dir)),
    "t3a": lambda run_dir: T3A(student_of(run_dir)),
    "tent": lambda run_dir: Tent(student_of(run_dir)),
    "ours": lambda run_dir: Adapter(student_of(run_dir), Memory.load(run_dir / "memory.npz"), AdaptConfig()),
}


@click.command()
@click.option("--run-dir", type=click.Path(path_type=Path), help="Of a finished run: student.pt and memory.npz.")
@click.option("--dataset", type=click.Choice(DATASETS), default="mnist", show_default=True)
@click.option(
    "--data", type=click.Path(path_type=Path), envvar="MEKD_DATA", default=Path("runs/data"), show_default=True
)
@click.option("--part", type=click.Choice(["test", "development"]), default="test", show_default=True)
@click.option("--method", "methods", multiple=True, type=click.Choice([*METHODS]), help="[default: all]")
@click.option("--corruption", "corruptions", multiple=True, help="One of the part's.  [default: all]")
@click.option("--order", "orders", multiple=True, type=click.Choice(ORDERS), help="[default: all]")
@click.option("--batch", "batches", multiple=True, type=int, help=f"[default: {', '.join(map(str, BATCHES))}]")
@click.option(
    "--pictures",
    type=click.IntRange(min=1),
    help=f"Of each stream.  [default: {PICTURES}, one by one {PICTURES_ONE_BY_ONE}]",
)
@click.option("--cost/--no-cost", default=True, show_default=True, help="Time and memory too.")
@click.option("--quick", is_flag=True, help=f"{QUICK_PICTURES} pictures, no cost, and nothing kept: for a trial.")
@click.option("--table", is_flag=True, help="Measure nothing; write docs/adaptation-results.md from the results.")
@click.option("--note", default="", help="Kept with the result.")
def main(
    run_dir: Path | None,
    dataset: str,
    data: Path,
    part: Part,
    methods: tuple[str, ...],
    corruptions: tuple[str, ...],
    orders: tuple[str, ...],
    batches: tuple[int, ...],
    pictures: int | None,
    cost: bool,
    quick: bool,
    table: bool,
    note: str,
) -> None:
    """Measure how methods of adapting change a student's accuracy, time and memory."""
    if table:
        adaptation_table.write(lines())
        return
    if run_dir is None:
        raise click.UsageError("expected --run-dir or --table")
    known = corruptions_of(dataset, part)
    if unknown := [name for name in corruptions if name not in known]:
        raise click.UsageError(f"--corruption: expected some of {', '.join(known)} ({part}), got {unknown[0]}")
    torch.set_num_threads(1)
    begun = record.about("adaptation", note)
    keep = print if quick else functools.partial(record.keep, "adaptation")
    try:
        facts = {"dataset": dataset, "part": part, "run": _run_digest(run_dir), "streams": _streams_digest()}
        shown = datasets.part(dataset, data, part)
        other = _other(dataset, data) if part == "test" else {}
        made = _made(run_dir, methods or tuple(METHODS))
        for batch in batches or BATCHES:
            count = QUICK_PICTURES if quick else pictures or (PICTURES_ONE_BY_ONE if batch == 1 else PICTURES)
            click.echo(f"batches of {batch}: {count} pictures a stream", err=True)
            each = facts | {"batch": batch, "pictures": count}
            for order in orders or ORDERS:
                cells = each | {"question": "accuracy", "order": order}
                wanted = _names(order, corruptions or known)
                for found in _accuracies(made, cells, wanted, shown, other):
                    keep(begun | found)
            if cost and not quick:
                for name, method in made.items():
                    cell = each | {"question": "cost", "method": name, "code": _code_digest(method)}
                    if not adaptation_table.matching(lines(), cell):
                        keep(begun | cell | _cost(run_dir, name, method, shown, part, batch, count))
    except (OSError, ValueError, ModelFileError) as error:
        sys.exit(f"error: {error}")


def corruptions_of(dataset: str, part: Part) -> tuple[str, ...]:
    """The names that a part's pictures are spoiled by; the other data set is one more."""
    if part == "development":
        return tuple(DEVELOPMENT)
    other = {"mnist": ("digits",), "mnist-digits": ("mnist",)}
    return (*TEST, *other.get(dataset, ()))


def lines() -> list[dict[str, Any]]:
    """Whatever was measured, oldest first."""
    try:
        return record.kept("adaptation")
    except FileNotFoundError:
        return []


def stream_of(order: str, name: str, shown: Labelled, other: dict[str, Labelled], count: int) -> Stream:
    """The stream that an order and a name in the results stand for: "clean", "fog", "fog/3" or another data set."""
    pictures = other.get(name, shown)
    if order == "returning":
        return streams.returning(pictures, name, count=count)
    corruption, _, severity = name.partition("/")
    stream = streams.shuffled(pictures, corruption, int(severity or 0), count=count)
    return streams.by_class(stream) if order in ("by class", "clean by class") else stream


def accuracy(method: Method, stream: Stream, batch: int) -> float:
    """The share of a stream that a method, begun anew, names rightly; to five decimals."""
    method.reset()
    right = 0
    parts = zip(stream.images_NCHW.split(batch), stream.labels_N.split(batch), strict=True)
    for images_NCHW, labels_N in parts:
        right += int((method.adapt(images_NCHW).probabilities_NK.argmax(1) == labels_N).sum())
    return round(right / len(stream.labels_N), 5)


def _made(run_dir: Path, names: tuple[str, ...]) -> dict[str, Method]:
    """The methods by name; one that the student lacks the layers for is left out, and that is said."""
    if "tent" in names and not batch_norms(student_of(run_dir)):
        click.echo("tent: not applicable, the student has no batch norm", err=True)
        names = tuple(name for name in names if name != "tent")
    return {name: METHODS[name](run_dir) for name in names}


def _names(order: str, corruptions: tuple[str, ...]) -> list[str]:
    """The streams of an order; what is not of our corruptions has no severity and does not come gradually."""
    ours = [name for name in corruptions if name in TEST | DEVELOPMENT]
    if order.startswith("clean"):
        return ["clean"]
    if order == "returning":
        return ours
    others = [name for name in corruptions if name not in ours]
    return [f"{name}/{severity}" for name in ours for severity in SEVERITIES] + others


def _accuracies(
    methods: dict[str, Method], cells: dict[str, Any], wanted: list[str], shown: Labelled, other: dict[str, Labelled]
) -> Iterator[dict[str, Any]]:
    """For each method a line with the streams that no line has yet; none where all are there."""
    before = lines()
    found: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        cell = cells | {"method": name, "code": _code_digest(method)}
        there = [stream for line in adaptation_table.matching(before, cell) for stream in line["accuracy"]]
        if missing := [stream for stream in wanted if stream not in there]:
            found[name] = cell | {"accuracy": dict.fromkeys(missing)}
    for stream_name in wanted:
        needed = [name for name in found if stream_name in found[name]["accuracy"]]
        if needed:
            stream = stream_of(cells["order"], stream_name, shown, other, cells["pictures"])
            for name in needed:
                found[name]["accuracy"][stream_name] = accuracy(methods[name], stream, cells["batch"])
    yield from found.values()


def _other(dataset: str, data: Path) -> dict[str, Labelled]:
    """Test pictures of the data set that shows the same classes in another hand."""
    if dataset == "mnist":
        return {"digits": datasets.pen_digits()}
    if dataset == "mnist-digits":
        return {"mnist": datasets.mnist(data, "test")}
    return {}


# --- cost ---


def _cost(
    run_dir: Path, name: str, method: Method, shown: Labelled, part: Part, batch: int, count: int
) -> dict[str, Any]:
    shifted_NCHW = streams.shuffled(shown, corruptions_of("", part)[0], SEVERITIES[0], count=count).images_NCHW
    unshifted_NCHW = streams.shuffled(shown, count=count).images_NCHW
    plain = METHODS["none"](run_dir)
    seconds, ratio = _times(plain, method, shifted_NCHW, batch)
    grown = _apart(_peak_bytes, run_dir, name, shifted_NCHW[:MEMORY_PICTURES], batch)
    return {
        "pictures_per_second": round(batch / seconds, 1),
        "ratio_shifted": round(ratio, 3),
        "ratio_unshifted": round(_times(plain, method, unshifted_NCHW, batch)[1], 3),
        "peak_megabytes": None if grown is None else round(grown / 1e6, 1),
    }


def _times(plain: Method, method: Method, images_NCHW: Tensor, batch: int) -> tuple[float, float]:
    """Processor seconds of a method for a batch, and the ratio to the plain student's: medians."""
    rounds = min(200, max(15, PICTURES // 2 // batch))
    method.reset()
    seconds, ratios = [], []
    for part_NCHW in islice(cycle(images_NCHW.split(batch)), WARM_UP_BATCHES + rounds):
        both = []
        for one in (plain, method):
            started = time.process_time()
            one.adapt(part_NCHW)
            both.append(time.process_time() - started)
        seconds.append(both[1])
        ratios.append(both[1] / both[0])
    return statistics.median(seconds[WARM_UP_BATCHES:]), statistics.median(ratios[WARM_UP_BATCHES:])


def _apart(function: Callable[..., int | None], *arguments: object) -> int | None:
    """Call a function in a process that has nothing of this one's memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _peak_bytes(run_dir: Path, name: str, images_NCHW: Tensor, batch: int) -> int | None:
    """By how much this process grows at most; None where the system does not say (Linux does)."""
    torch.set_num_threads(1)
    METHODS["none"](run_dir).adapt(images_NCHW[:1])
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: proc(5)
    before = _status("VmRSS")
    method = METHODS[name](run_dir)
    for part_NCHW in islice(images_NCHW.split(batch), MEMORY_BATCHES):
        method.adapt(part_NCHW)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A size in bytes out of what Linux says of this process."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{key}:"))


# --- what a line was measured with ---


def _run_digest(run_dir: Path) -> str:
    """The student, and the memory beside it where there is one."""
    digest = hashlib.sha256(load_model(run_dir / "student.pt").digest.encode())
    memory = run_dir / "memory.npz"
    return _short(digest.hexdigest().encode(), *([memory.read_bytes()] if memory.exists() else []))


def _streams_digest() -> str:
    folder = Path(__file__).parent
    return _short(*[(folder / name).read_bytes() for name in ("corruptions.py", "streams.py", "datasets.py")])


def _code_digest(method: Method) -> str:
    """All modules of the folder that a method is written in: a changed method is measured again."""
    module = sys.modules[type(method).__module__]
    assert module.__file__ is not None
    return _short(
        repr(AdaptConfig()).encode(),
        *[path.read_bytes() for path in sorted(Path(module.__file__).parent.glob("*.py"))],
    )


def _short(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
