"""Other servers of the benchmark's models: LitServe, MLServer and Ray Serve.

Each comes from a virtual environment of its own, because none of them can be installed beside this project without
changing what it is made of. An environment variable names the environment's Python (docs/serving.md):

    python -m venv LITSERVE
    LITSERVE/bin/pip install litserve==0.2.19 torch numpy tomli-w
    export MEKD_LITSERVE=LITSERVE/bin/python

A server is a short program, written into a folder and run by that Python; it calls the model as ``benchmarks.bare``
does, in one process, one request after the other: a request is as large as the largest batch, so that joining several
would gain nothing. None writes a log line for each call. All else is as each server has it by default.
"""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.bare import CLASS_COUNT, SHAPE_CHW
from benchmarks.services import ServiceError, descendants, end, lasting_address

START_SECONDS = 300.0
STOP_SECONDS = 30.0
IMPORT_SECONDS = 120.0
MODEL_NAME = "teacher"
ROOT = Path(__file__).parent.parent

_LITSERVE = """
from typing import Annotated

import litserve
import numpy as np
from fastapi import Body, Response

from benchmarks.bare import SHAPE_CHW, answerer


class Teacher(litserve.LitAPI):
    def setup(self, device):
        self.answer = answerer({model!r}, {threads})

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]):
        return np.frombuffer(request, np.uint8).reshape(-1, *SHAPE_CHW)

    def predict(self, images):
        return self.answer(images)

    def encode_response(self, output) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    server = litserve.LitServer(Teacher(), accelerator="cpu", devices=1, workers_per_device=1, timeout=False)
    server.run(host={host!r}, port={port}, generate_client_file=False, log_level="warning")
"""

_MLSERVER = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

from benchmarks.bare import answerer


class Teacher(MLModel):
    async def load(self):
        self.answer = answerer({model!r}, {threads})
        return True

    async def predict(self, payload):
        answer = self.answer(NumpyCodec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output("probabilities", answer)
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])
"""

_RAYSERVE = """
import signal

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.bare import SHAPE_CHW, answerer


@serve.deployment(num_replicas=1, max_ongoing_requests=256, logging_config={{"enable_access_log": False}})
class Teacher:
    def __init__(self):
        self.answer = answerer({model!r}, {threads})

    async def __call__(self, request: Request):
        images = np.frombuffer(await request.body(), np.uint8).reshape(-1, *SHAPE_CHW)
        return Response(self.answer(images).tobytes(), media_type="application/octet-stream")


signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
ray.init(num_cpus=max(2, {threads}), include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir={folder!r})
serve.start(http_options={{"host": {host!r}, "port": {port}}})
serve.run(Teacher.bind())
signal.sigwait([signal.SIGTERM])
serve.shutdown()
ray.shutdown()
"""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A server that is asked as ours is, but over its own protocol."""

    name: str
    variable: str
    """Environment variable with the Python of its environment."""
    package: str
    """What that Python must be able to import."""
    path: str
    """Of HTTP: pictures are posted there, as bytes; empty: the Open Inference Protocol over gRPC."""


LITSERVE = Peer(name="litserve", variable="MEKD_LITSERVE", package="litserve", path="/predict")
MLSERVER = Peer(name="mlserver", variable="MEKD_MLSERVER", package="mlserver", path="")
RAYSERVE = Peer(name="rayserve", variable="MEKD_RAYSERVE", package="ray.serve", path="/")
PEERS = (LITSERVE, MLSERVER, RAYSERVE)


def missing(peer: Peer, *, torch: bool) -> str:
    """What ``serving`` lacks here, in one line; empty where it lacks nothing.

    ``torch``: whether the model needs it.
    """
    given = os.environ.get(peer.variable)
    if not given:
        return f"expected the Python of an environment with {peer.package} in {peer.variable}, found none"
    if not os.access(_python(peer), os.X_OK):
        return f"{peer.variable}: expected a Python, got {given}"
    packages = [peer.package, "numpy", *(["torch", "tomli_w"] if torch else [])]
    tried = subprocess.run(
        [_python(peer), "-c", f"import {', '.join(packages)}"],
        capture_output=True,
        text=True,
        timeout=IMPORT_SECONDS,
        env=_environment(),
        check=False,
    )
    if tried.returncode != 0:
        said = tried.stderr.strip().splitlines()
        return (
            f"{peer.variable}: expected {', '.join(packages)} in it, {given} says {said[-1] if said else 'nothing'}"
        )
    return ""


@contextmanager
def serving(peer: Peer, model: str, threads: int, *, log: Path) -> Iterator[str]:
    """A server of one model; yields HOST:PORT, and ends it with all of its processes.

    Args:
        model: as ``benchmarks.bare.answerer`` takes it.
        threads: of the model.
        log: where the server's output goes.

    Raises:
        ServiceError: it did not start, or its answer is none.
    """
    address = lasting_address()
    host, _, port = address.rpartition(":")
    with tempfile.TemporaryDirectory(prefix="mekd-", ignore_cleanup_errors=True) as folder, log.open("wb") as output:
        facts = {"model": model, "threads": threads, "host": host, "port": int(port), "folder": folder}
        process = subprocess.Popen(
            _prepared(peer, Path(folder), facts),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            cwd=folder,
        )
        try:
            _wait_until_ready(peer, process, address, log)
            yield address
        finally:
            _end(process, descendants(process.pid))


def post(connection: http.client.HTTPConnection, path: str, pictures: bytes) -> bytes:
    """The answer to pictures over HTTP. Raises ServiceError for any status but 200."""
    connection.request("POST", path, pictures, {"Content-Type": "application/octet-stream"})
    response = connection.getresponse()
    answer = response.read()
    if response.status != http.HTTPStatus.OK:
        raise ServiceError(f"HTTP {response.status}: {answer[:200].decode(errors='replace')}")
    return answer


def _prepared(peer: Peer, folder: Path, facts: dict[str, object]) -> list[str]:
    """Writes the server's program; returns how to run it."""
    if peer is MLSERVER:
        settings = {
            "host": facts["host"],
            "grpc_port": facts["port"],
            "debug": False,  # else a log line for each call
            # Its worker process would get a copy of every batch, and with uvloop 0.23 it did not start.
            "parallel_workers": 0,
            # Not asked here, but they cannot be left out: ports of their own.
            "http_port": int(lasting_address().rpartition(":")[2]),
            "metrics_port": int(lasting_address().rpartition(":")[2]),
        }
        (folder / "settings.json").write_text(json.dumps(settings), "utf-8")
        (folder / "teacher.py").write_text(_MLSERVER.format(**facts), "utf-8")
        model = {"name": MODEL_NAME, "implementation": "teacher.Teacher"}
        (folder / "model-settings.json").write_text(json.dumps(model), "utf-8")
        return [_python(peer), "-c", "from mlserver.cli import main; main()", "start", str(folder)]
    program = folder / "serve.py"
    program.write_text({LITSERVE: _LITSERVE, RAYSERVE: _RAYSERVE}[peer].format(**facts), "utf-8")
    return [_python(peer), str(program)]


def _wait_until_ready(peer: Peer, process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    """Until two pictures are answered. Raises ServiceError."""
    deadline = time.monotonic() + START_SECONDS
    ask: Callable[[str, str], int | None] = _ask_http if peer.path else _ask_grpc
    answered = None
    while answered is None:
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            what = "ended" if ended else f"was not ready after {START_SECONDS:.0f} s"
            said = " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])
            raise ServiceError(f"{peer.name} {what}: {said or 'no message'}")
        answered = ask(address, peer.path)
        time.sleep(0.1)
    if answered != 2 * CLASS_COUNT * 4:
        raise ServiceError(f"{peer.name}: expected an answer of {2 * CLASS_COUNT * 4} bytes, got {answered}")


def _ask_http(address: str, path: str) -> int | None:
    """Bytes of the answer to two pictures; None while there is none."""
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        return len(post(connection, path, _two_pictures()))
    except (OSError, http.client.HTTPException, ServiceError):  # not listening, or listening before it is ready
        return None
    finally:
        connection.close()


def _ask_grpc(address: str, _path: str) -> int | None:
    request = service_pb2.ModelInferRequest(model_name=MODEL_NAME, raw_input_contents=[_two_pictures()])
    request.inputs.add(name="images", datatype="UINT8", shape=[2, *SHAPE_CHW])
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=10)
        except grpc.RpcError:
            return None
    return sum(len(raw) for raw in answer.raw_output_contents)


def _two_pictures() -> bytes:
    channels, height, width = SHAPE_CHW
    return bytes(2 * channels * height * width)


def _end(process: "subprocess.Popen[bytes]", pids: set[int]) -> None:
    """Asks it to end; what is left of its processes after that is killed."""
    end(process, STOP_SECONDS)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _python(peer: Peer) -> str:
    # Not resolved: a virtual environment's Python is a link, and knows by its own place where it belongs.
    return str(Path(os.environ.get(peer.variable, "")).expanduser().absolute())


def _environment() -> dict[str, str]:
    """Ours, but for what is importable: this project's own packages, and the rest from the peer's environment."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
