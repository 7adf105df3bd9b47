"""What do pictures cost on the wire, and what does an encoding change? ``python -m benchmarks.encodings``

Pictures are a folder's (``--pictures``), seen here as stand-ins for the size and kind of what a run sends: real ones
never leave this program. For every encoding: bytes of a request and of 50,000 pictures, how far the decoded pixels
are off, and with ``--model`` how the teacher's answers to decoded pictures differ from those to the pictures
themselves. ``--speed`` adds pictures a second of one core, and the model's own. ``--wire N`` lets a real edge-agent
buy N answers of a real teacher-serve with pictures of its own, briefly trained generator, and counts every byte that
passes between them, in both directions, HTTP/2 and all.

Appends JSON lines to benchmarks/results/encodings.jsonl. Folder and model may also be named in MEKD_PICTURES and
MEKD_MODEL.
"""

import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from benchmarks import record
from benchmarks.services import ServiceError, create_account, run_agent, serving, stop_on_sigterm
from edge_agent.data import load_local_images
from edge_agent.packing import Packing
from networks.modelfile import load_model
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service.torch_engine import TorchEngine

UInt8Array = npt.NDArray[np.uint8]

TRIED = (
    *(("raw", 0), ("png", 0), ("auto", 95)),
    *(("jpeg", quality) for quality in (75, 80, 85, 90, 95)),
    *(("webp", quality) for quality in (75, 80, 85, 90, 95)),
)
CLASSES = 10
RUN_PICTURES = 50_000
READ_BYTES = 2**16


@click.command()
@click.option("--pictures", envvar="MEKD_PICTURES", required=True, help="A folder, or mnist; 32x32 is what is sent.")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True)
@click.option("--count", default=2048, show_default=True, help="Pictures looked at.")
@click.option("--batch", "batch_count", default=128, show_default=True, help="Pictures in one request.")
@click.option("--model", envvar="MEKD_MODEL", type=click.Path(path_type=Path), help="A teacher of such pictures.")
@click.option("--data", envvar="MEKD_DATA", type=click.Path(path_type=Path), help="Where mnist lies.")
@click.option("--speed", is_flag=True, help="Measure speeds too: on a machine of its own.")
@click.option("--wire", "wire_count", default=0, metavar="N", help="Let an agent ask N times, and count all bytes.")
@click.option("--steps", default=400, show_default=True, help="Of that agent's generator.")
@click.option("--note", default="", help="Kept with the result.")
def main(
    pictures: str,
    channels: str,
    count: int,
    batch_count: int,
    model: Path | None,
    data: Path | None,
    speed: bool,
    wire_count: int,
    steps: int,
    note: str,
) -> None:
    """Measure every encoding on the same pictures."""
    stop_on_sigterm()
    begun = record.about("encodings", note)
    local = load_local_images(
        pictures, channels=int(channels), height=32, width=32, data_root=data, limit=count, seed=0
    )
    about = begun | {
        "pictures": Path(pictures).name,
        "pictures_digest": local.digest[:16],
        "count": count,
        "channels": int(channels),
        "batch": batch_count,
    }
    if wire_count > 0:
        record.keep("encodings", about | {"question": "wire"} | _wire(pictures, int(channels), wire_count, steps))
        return
    engine = TorchEngine(load_model(model), device="cpu") if model is not None else None
    answers_NK = _answers(engine, local.images_NCHW) if engine else None
    if engine is not None and speed:
        found = {
            "question": "speed",
            "model_pictures_per_second": _rate(lambda: _answers(engine, local.images_NCHW), count),
        }
        record.keep("encodings", about | found)
    for name, quality in TRIED:
        figures = _measured(name, quality, local.images_NCHW, batch_count, speed=speed)
        decoded_NCHW = figures.pop("decoded")
        if engine is not None and answers_NK is not None:
            decoded_NK = _answers(engine, decoded_NCHW)
            figures["teacher_agreement"] = round(float((decoded_NK.argmax(1) == answers_NK.argmax(1)).mean()), 4)
            figures["answers_total_variation"] = round(float(np.abs(decoded_NK - answers_NK).sum(1).mean() / 2), 5)
        record.keep("encodings", about | {"question": "bytes", "encoding": name, "quality": quality} | figures)


def _measured(name: str, quality: int, images_NCHW: UInt8Array, batch_count: int, *, speed: bool) -> dict[str, Any]:
    packing = Packing(name, max(1, quality), codec.ENCODINGS)
    batches = [images_NCHW[start : start + batch_count] for start in range(0, len(images_NCHW), batch_count)]
    packed = [packing.pack(batch_NCHW) for batch_NCHW in batches]
    decoded_NCHW = np.concatenate([codec.decode_images(images) for images in packed])
    request_bytes = sum(wire.Batch(batch_id="0" * 32, images=images).ByteSize() for images in packed)
    used = {wire.ImageEncoding.Name(images.encoding) for images in packed}
    found: dict[str, Any] = {
        "used": sorted(used),
        "bytes_per_picture": round(request_bytes / len(images_NCHW), 1),
        "megabytes_sent_50000": round(request_bytes / len(images_NCHW) * RUN_PICTURES / 1e6, 2),
        "mean_difference": round(float(np.abs(decoded_NCHW.astype(int) - images_NCHW).mean()), 3),
        "decoded": decoded_NCHW,
    }
    if speed:
        count = len(images_NCHW)
        found["encoded_per_second"] = _rate(lambda: [packing.pack(batch_NCHW) for batch_NCHW in batches], count)
        found["checked_and_decoded_per_second"] = _rate(lambda: [_received(images) for images in packed], count)
    return found


def _received(images: wire.ImageBatch) -> UInt8Array:
    """What a server does with a batch before it asks the model."""
    received = codec.ReceivedImages.of(images)
    codec.check_images(
        received,
        channels=received.channels,
        height=received.height,
        width=received.width,
        max_batch_pictures=received.picture_count,
    )
    return codec.decode_images(received)


def _answers(engine: TorchEngine, images_NCHW: UInt8Array) -> npt.NDArray[np.float32]:
    return np.concatenate([engine.answer(images_NCHW[i : i + 256]) for i in range(0, len(images_NCHW), 256)])


def _rate(work: Callable[[], object], count: int) -> int:
    """Pictures a second of processor time, the better of two."""
    seconds = []
    for _ in range(2):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return round(count / min(seconds))


# --- every byte between two real processes ---


def _wire(pictures: str, channels: int, wire_count: int, steps: int) -> dict[str, Any]:
    """One whole run, asked for through a relay that counts."""
    with tempfile.TemporaryDirectory(prefix="mekd-encodings-") as name:
        folder = Path(name)
        ledger = f"sqlite:///{folder}/ledger.db"
        api_key = create_account(ledger, "benchmark", wire_count)
        model = Path(f"array:{CLASSES},{channels},32,32")
        with serving(model, ledger, log=folder / "server.log") as address, _relayed(address) as (relay, counted):
            arguments = ["--images", pictures, "--teacher", relay, "--budget", str(wire_count)]
            arguments += ["--run-dir", str(folder / "run"), "--set", f"deprivatize.steps={steps}"]
            arguments += ["--set", "distill.passes=1", "--set", "local_pictures=2000"]
            for phase in ("deprivatize", "distill"):
                if (status := run_agent(["--phase", phase, *arguments], api_key=api_key)) != 0:
                    raise ServiceError(f"edge-agent ended with exit status {status}")
        summary = json.loads((folder / "run" / "summary.json").read_text())
    scale = RUN_PICTURES / wire_count / 1e6
    return {
        "queries": summary["queries"]["charged"],
        "generator_steps": steps,
        "messages": {name: summary["bytes"][name] for name in ("sent", "received")},
        "wire": counted,
        "wire_bytes_per_picture": round(sum(counted.values()) / wire_count, 1),
        "megabytes_both_ways_50000": round(sum(counted.values()) * scale, 2),
        "left_out": summary["left_out"],
    }


@contextmanager
def _relayed(address: str) -> Iterator[tuple[str, dict[str, int]]]:
    """A relay to a server: its address, and the bytes that passed it, sent and received as the client sees them."""
    host, _, port = address.rpartition(":")
    counted = {"sent": 0, "received": 0}
    lock = threading.Lock()

    def pump(source: socket.socket, target: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while content := source.recv(READ_BYTES):
                with lock:
                    counted[direction] += len(content)
                target.sendall(content)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, int(port)))
                for ends in ((client, server, "sent"), (server, client, "received")):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", counted


if __name__ == "__main__":
    try:
        main()
    except ServiceError as error:
        sys.exit(f"error: {error}")
