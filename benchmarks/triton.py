"""A real Triton Inference Server on this machine: the peer for speed and the oracle for the protocol.

The server program and its Python backend come out of the wheel ``nvidia-pytriton``, whose own Python code is not
used. The wheel asks for numpy below 2 and protobuf below 7, so it cannot be installed beside this project; unpacked
without its dependencies into a folder of its own it needs neither (docs/serving.md):

    pip install --no-deps --target TRITON nvidia-pytriton==0.7.0
    export MEKD_TRITON=TRITON

Models run in the Python that runs this program, with all that it can import, torch included.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.services import ServiceError, end, lasting_address

FOLDER = "MEKD_TRITON"
START_SECONDS = 120.0
STOP_SECONDS = 30.0
TRIES = 3


def available() -> bool:
    """Whether ``serving`` can work here: the programs are found, and Python is there as a shared library."""
    return not missing()


def missing() -> str:
    """What ``serving`` lacks here, in one line; empty where it lacks nothing."""
    found = _package()
    if found is None:
        return f"expected a folder with nvidia-pytriton in {FOLDER}, found none (docs/serving.md says how to make it)"
    if not _stub(found).is_file():
        return f"expected a Python backend for Python {_python_version()} in {found}, found none"
    if _python_library() is None:
        return f"expected Python as a shared library ({sysconfig.get_config_var('LDLIBRARY')}), found none"
    return ""


@contextmanager
def serving(repository: Path, *, log: Path | None = None, more: Sequence[str] = ()) -> Iterator[str]:
    """Triton over gRPC with every model of a model repository loaded; yields HOST:PORT, ends it at the end.

    Args:
        repository: folder of models, each with config.pbtxt and VERSION/model.py (``write_model``).
        log: where its output goes; thrown away without it.
        more: further flags of ``tritonserver``.

    Raises:
        ServiceError: Triton is missing here, or did not start; its last words are in the message.
    """
    lacking = missing()
    if lacking:
        raise ServiceError(lacking)
    with tempfile.TemporaryDirectory(prefix="mekd-triton-") as folder:
        backends = _backends(Path(folder))
        log = log or Path(folder) / "log"
        process, address = _started(repository, backends, log, more)
        try:
            yield address
        finally:
            end(process, STOP_SECONDS)


def write_model(repository: Path, name: str, config: str, code: str) -> None:
    """A model of the Python backend: its config.pbtxt (without its name and backend) and its model.py.

    The code must exchange tensors through DLPack: ``np.from_dlpack(tensor)`` (or torch's) and
    ``pb_utils.Tensor.from_dlpack(name, array)``. This Triton knows the arrays of NumPy 1 alone; under NumPy 2 its
    ``tensor.as_numpy()`` repeats the first value without a word, and ``pb_utils.Tensor(name, array)`` is empty.
    """
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(code, "utf-8")
    (version.parent / "config.pbtxt").write_text(f'name: "{name}"\nbackend: "python"\n{config}\n', "utf-8")


def _started(
    repository: Path, backends: Path, log: Path, more: Sequence[str]
) -> tuple["subprocess.Popen[bytes]", str]:
    for attempt in range(TRIES):
        address = lasting_address()  # Triton cannot pick a port by itself
        with log.open("wb") as output:
            process = subprocess.Popen(
                _command(repository, backends, address, more),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
        try:
            if _ready(process, address):
                return process, address
        except BaseException:
            process.kill()
            process.wait()
            raise
        said = log.read_text(errors="replace")
        taken = "Socket" in said and "already in use" in said
        if not taken or attempt == TRIES - 1:
            break
    raise ServiceError(f"Triton did not start: {' | '.join(said.strip().splitlines()[-5:]) or 'no message'}")


def _ready(process: "subprocess.Popen[bytes]", address: str) -> bool:
    """Waits until the server answers (True) or has ended (False). Raises ServiceError after START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while process.poll() is None:
            if time.monotonic() > deadline:
                raise ServiceError(f"Triton was not ready after {START_SECONDS:.0f} s")
            try:
                if stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=5).ready:
                    return process.poll() is None  # and not some other server at this address
            except grpc.RpcError:
                pass
            time.sleep(0.05)
    return False


def _command(repository: Path, backends: Path, address: str, more: Sequence[str]) -> list[str]:
    host, _, port = address.rpartition(":")
    package = _package()
    assert package is not None
    return [
        str(package / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--grpc-address={host}",
        f"--grpc-port={port}",
        "--allow-http=false",
        "--allow-metrics=false",
        *more,
    ]


def _environment() -> dict[str, str]:
    """What the server and its Python processes need: our interpreter's library first, then the wheel's own."""
    package, library = _package(), _python_library()
    assert package is not None and library is not None
    libraries = [str(library.parent), str(package.parent / "nvidia_pytriton.libs")]
    if inherited := os.environ.get("LD_LIBRARY_PATH"):
        libraries.append(inherited)
    return os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        # The embedded interpreter looks for its standard library from the `python3` it finds first.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def _backends(folder: Path) -> Path:
    """A folder of backends with the Python backend of our Python; the wheel keeps its parts apart."""
    package = _package()
    assert package is not None
    python = folder / "backends" / "python"
    shutil.copytree(package / "tritonserver" / "backends" / "python", python)
    shutil.copy2(_stub(package), python / "triton_python_backend_stub")
    return python.parent


def _package() -> Path | None:
    """The folder ``pytriton`` of the wheel: in $MEKD_TRITON (unpacked or a venv), else beside our own packages."""
    if given := os.environ.get(FOLDER):
        folder = Path(given).expanduser()
        for found in (folder / "pytriton", *sorted(folder.glob("lib/python3.*/site-packages/pytriton"))):
            if (found / "tritonserver" / "bin" / "tritonserver").is_file():
                return found
        return None
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _stub(package: Path) -> Path:
    return package / "tritonserver" / "python_backend_stubs" / _python_version() / "triton_python_backend_stub"


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _python_library() -> Path | None:
    """libpython of the running interpreter; None where Python was built without."""
    name = str(sysconfig.get_config_var("INSTSONAME"))
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return None
    folders = (Path(str(sysconfig.get_config_var("LIBDIR"))), Path(sys.base_prefix) / "lib")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
