"""``kill -9`` proves nothing of a power cut: the page cache survives it. So a real server's system calls are traced.

An answer may leave only once its post is on the disk: whatever was written to the ledger's log is synced before the
bytes of the answer go to the socket.
"""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceStub
from tests.conftest import StartServer

SERVE = "from teacher_service.cli import serve; serve()"
FORGETFUL = """
from teacher_service import ledger_store
configure = ledger_store._configure_sqlite
def configure_and_forget(connection, record):
    configure(connection, record)
    connection.execute("PRAGMA synchronous = OFF")
ledger_store._configure_sqlite = configure_and_forget
"""
CALL = re.compile(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\((\d+)<([^>]*)>)?")


def tracer(trace: Path) -> list[str]:
    """strace, around a process that stays our own child; the test is skipped where strace cannot trace."""
    found = shutil.which("strace")
    if found is None:
        pytest.skip("no strace here")
    if subprocess.run([found, "-o", "/dev/null", "true"], capture_output=True).returncode != 0:
        pytest.skip("strace may not trace here")
    calls = "trace=fsync,fdatasync,write,writev,pwrite64,pwritev,sendto,sendmsg"
    return [found, "-D", "-f", "-y", "-s", "65536", "-e", calls, "-o", str(trace)]


def answers(address: str, key: str, batch_ids: list[str]) -> list[wire.BatchResult]:
    """Asks one batch after the other."""
    found: list[wire.BatchResult] = []
    turn = threading.Semaphore(0)
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:

        def requests() -> Any:
            yield wire.InferRequest(config=wire.StreamConfig(run_id="run"))
            for n, batch_id in enumerate(batch_ids):
                while len(found) < n:
                    turn.acquire()
                images = codec.encode_images(np.full((2, 1, 8, 8), n, np.uint8))
                yield wire.InferRequest(batch=wire.Batch(batch_id=batch_id, images=images))

        stub: Any = TeacherInferenceStub(channel)
        for response in stub.Infer(requests(), metadata=(("authorization", f"Bearer {key}"),), timeout=30):
            if response.WhichOneof("payload") == "result":
                found.append(response.result)
                turn.release()
    return found


def sent_before_synced(trace: Path, batch_ids: list[str]) -> list[str]:
    """The batches whose answer went out while writes to the ledger's log were not yet on the disk."""
    unsynced, early, waiting = False, [], set(batch_ids)
    written_since_answer = False
    for line in trace.read_text(errors="replace").splitlines():
        call = CALL.match(line)
        if call is None:
            continue
        name, path = call[1], call[3] or ""
        if name.startswith("pwrite") and path.endswith("-wal"):
            unsynced = written_since_answer = True
        if name in ("fsync", "fdatasync") and (path.endswith("-wal") or "resumed" in line) and line.endswith("= 0"):
            unsynced = False  # when it has returned, not when it was called
        if name.startswith("send") or name in ("write", "writev"):
            for batch_id in sorted(waiting):
                if batch_id in line and path.startswith(("TCP", "socket:")):
                    waiting.discard(batch_id)
                    assert written_since_answer, f"nothing was written before the answer to {batch_id}"
                    early += [batch_id] if unsynced else []
                    written_since_answer = False
    assert not waiting, f"no answer seen for {waiting}"
    return early


def trace_of(start_server: StartServer, tmp_path: Path, program: str) -> tuple[Path, list[str]]:
    trace = tmp_path / "trace"
    server = start_server("--lease-seconds", "3600", command=[*tracer(trace), sys.executable, "-c", program])
    batch_ids = [f"durable-{n:03}" for n in range(20)]
    results = answers(server.address, server.create_account(), batch_ids)
    assert [result.batch_id for result in results] == batch_ids
    assert server.stop() == 0
    return trace, batch_ids


def test_every_answer_leaves_after_its_post_was_synced(start_server: StartServer, tmp_path: Path) -> None:
    trace, batch_ids = trace_of(start_server, tmp_path, SERVE)
    assert sent_before_synced(trace, batch_ids) == []


def test_the_trace_shows_a_server_that_does_not_sync(start_server: StartServer, tmp_path: Path) -> None:
    trace, batch_ids = trace_of(start_server, tmp_path, FORGETFUL + SERVE)
    assert sent_before_synced(trace, batch_ids) == batch_ids
