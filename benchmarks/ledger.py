"""How fast are books that can be trusted? ``python -m benchmarks.ledger``

    pairs      durable hold + post pairs a second on one busy account, 64 callers: SQLite and PostgreSQL in process,
               and through gRPC to a real teacher-serve (batches of one picture, an array model)
    latency    what hold + post add to a batch on an idle ledger, against an fsync of the same disk, measured in turn
    journal    a journal of many entries, bulk-made with the real chain: balance queries, and verify

Prints one JSON line and appends it to benchmarks/results/ledger.jsonl. Targets: issue of the ledger, docs/ledger.md.
"""

import asyncio
import hashlib
import os
import platform
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np
import sqlalchemy

from benchmarks import record
from benchmarks.postgres import running
from benchmarks.services import ServiceError, create_account, serving
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceStub
from teacher_service import audit
from teacher_service.ledger import HoldRequest
from teacher_service.ledger_sql import SqlLedger

CALLERS = 64
PARTS = ("pairs-sqlite", "pairs-postgres", "pairs-grpc", "latency", "journal")
ACCOUNT = "busy"
ANSWER = bytes(range(160))  # about what ten probabilities of one picture take with their digests
# The made journal: one account has half of the entries, the others share the rest; runs of so many batches.
OTHER_ACCOUNTS = 99
RUN_BATCHES = 3_000
VOIDED_EVERY = 50
_MAKE_AT_ONCE = 50_000


@click.command()
@click.option("--entries", default=10_000_000, show_default=True, help="Of the made journal.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each measure of pairs.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="[default: all]")
@click.option("--work-dir", type=click.Path(path_type=Path), help="On the disk to measure.  [default: a new folder]")
@click.option("--note", default="", help="Kept with the result, for example that the machine was busy.")
def main(entries: int, seconds: float, only: tuple[str, ...], work_dir: Path | None, note: str) -> None:
    """Measure the ledger's speed, and keep the figures."""
    parts = only or PARTS
    if work_dir is not None:
        work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mekd-ledger-", dir=work_dir) as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user
        result = _about(note) | {"fsync_p50_ms": _ms(statistics.median(_fsync_seconds(folder, 200)))}
        if "pairs-sqlite" in parts:
            result["pairs_sqlite"] = asyncio.run(_pairs(f"sqlite:///{folder}/pairs.db", seconds))
        if "pairs-postgres" in parts:
            result["pairs_postgres"] = _on_postgres(folder, seconds)
        if "pairs-grpc" in parts:
            result["pairs_grpc"] = _through_grpc(folder, seconds)
        if "latency" in parts:
            result["latency"] = asyncio.run(_latency(folder))
        if "journal" in parts:
            result["journal"] = _journal(folder, entries)
    record.keep("ledger", result)


# --- pairs ---


def _wish(batch_id: str) -> HoldRequest:
    digest = hashlib.sha256(batch_id.encode()).digest()
    return HoldRequest(account=ACCOUNT, batch_id=batch_id, run_id="run", digest=digest, picture_count=1)


async def _pairs(url: str, seconds: float) -> dict[str, float]:
    ledger = SqlLedger.open(url)
    await ledger.create_account(ACCOUNT, 10**9)

    async def pair(batch_id: str) -> None:
        await ledger.hold(_wish(batch_id))
        await ledger.post(ACCOUNT, batch_id, ANSWER)

    try:
        figures = await _busy(pair, seconds)
    finally:
        await ledger.close()
    _check(url)
    return figures


def _on_postgres(folder: Path, seconds: float) -> dict[str, float] | None:
    data = folder / "postgres"
    data.mkdir()
    with running(data) as server:
        return asyncio.run(_pairs(server.database("pairs"), seconds)) if server is not None else None


async def _busy(pair: Callable[[str], Awaitable[None]], seconds: float) -> dict[str, float]:
    """Keeps 64 callers busy, counts after a second of warming up."""
    taken: list[float] = []
    started = time.perf_counter() + 1.0
    end = started + seconds

    async def work(caller: int) -> None:
        number = 0
        while (began := time.perf_counter()) < end:
            await pair(f"{os.getpid():x}-{caller}-{number}")
            number += 1
            if began >= started:
                taken.append(time.perf_counter() - began)

    await asyncio.gather(*(work(caller) for caller in range(CALLERS)))
    return {
        "callers": CALLERS,
        "pairs_per_second": round(len(taken) / (time.perf_counter() - started), 1),
        "p50_ms": _ms(statistics.median(taken)),
        "p99_ms": _ms(_quantile(taken, 0.99)),
    }


def _through_grpc(folder: Path, seconds: float) -> dict[str, float]:
    url = f"sqlite:///{folder}/grpc.db"
    key = create_account(url, ACCOUNT, 10**9)
    with serving(Path("array:10,1,8,8"), url, log=folder / "teacher-serve.log") as address:
        figures = asyncio.run(_grpc_pairs(address, key, seconds))
    _check(url)
    return figures


async def _grpc_pairs(address: str, key: str, seconds: float) -> dict[str, float]:
    """64 batches under way on as many streams as their windows ask for."""
    metadata = (("authorization", f"Bearer {key}"),)
    images = codec.encode_images(np.zeros((1, 1, 8, 8), np.uint8))
    async with grpc.aio.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = TeacherInferenceStub(channel)
        window = (await stub.Describe(wire.DescribeRequest(), metadata=metadata)).window_batches
        streams = [_Stream(stub.Infer(metadata=metadata)) for _ in range(-(-CALLERS // window))]
        for stream in streams:
            await stream.configure()

        async def pair(batch_id: str) -> None:
            caller = int(batch_id.split("-")[1])
            await streams[caller % len(streams)].ask(wire.Batch(batch_id=batch_id, images=images))

        figures = await _busy(pair, seconds)
        for stream in streams:
            await stream.close()
    return figures | {"streams": len(streams)}


class _Stream:
    """One Infer call; answers find their askers by id."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._writing = asyncio.Lock()
        self._waiting: dict[str, asyncio.Future[wire.BatchResult]] = {}

    async def configure(self) -> None:
        await self._call.write(wire.InferRequest(config=wire.StreamConfig(run_id="run")))
        assert (await self._call.read()).WhichOneof("payload") == "accepted"
        self._reader = asyncio.create_task(self._read())

    async def ask(self, batch: wire.Batch) -> wire.BatchResult:
        answer: asyncio.Future[wire.BatchResult] = asyncio.get_running_loop().create_future()
        self._waiting[batch.batch_id] = answer
        async with self._writing:  # gRPC takes one message at a time
            await self._call.write(wire.InferRequest(batch=batch))
        return await answer

    async def close(self) -> None:
        await self._call.done_writing()
        await self._reader

    async def _read(self) -> None:
        while (response := await self._call.read()) is not grpc.aio.EOF:
            assert response.WhichOneof("payload") == "result", response
            self._waiting.pop(response.result.batch_id).set_result(response.result)


def _check(url: str) -> None:
    findings = audit.verify(url).findings
    if findings:
        sys.exit(f"error: the books do not agree after the load: {findings[0]}")


# --- latency ---


async def _latency(folder: Path, times: int = 300) -> dict[str, Any]:
    """What one caller waits for hold and for post, in turn with an fsync of the same disk.

    With an engine that takes its time between the two, and with none: then the post waits for the hold's commit too.
    """
    ledger = SqlLedger.open(f"sqlite:///{folder}/latency.db")
    await ledger.create_account(ACCOUNT, 10**9)
    found: dict[str, Any] = {}
    for engine_ms in (5, 0):
        pairs, fsyncs = [], []
        for number in range(times):
            fsyncs += _fsync_seconds(folder, 1)
            batch_id = f"{engine_ms}-{number}"
            began = time.perf_counter()
            await ledger.hold(_wish(batch_id))
            held = time.perf_counter()
            if engine_ms:
                await asyncio.sleep(engine_ms / 1000)
            asked = time.perf_counter()
            await ledger.post(ACCOUNT, batch_id, ANSWER)
            pairs.append(held - began + time.perf_counter() - asked)
            await asyncio.sleep(0.005)
        pair, fsync = statistics.median(pairs), statistics.median(fsyncs)
        found[f"engine_{engine_ms}_ms"] = {
            "hold_and_post_p50_ms": _ms(pair),
            "fsync_p50_ms": _ms(fsync),
            "above_one_fsync_ms": _ms(pair - fsync),
            "above_two_fsyncs_ms": _ms(pair - 2 * fsync),
        }
    await ledger.close()
    return found


def _fsync_seconds(folder: Path, times: int) -> list[float]:
    """A page appended and synced, as a commit does."""
    taken = []
    with (folder / "fsync").open("ab", buffering=0) as file:
        for _ in range(times):
            file.write(bytes(4096))
            began = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - began)
    return taken


# --- a long journal ---


def _journal(folder: Path, entries: int) -> dict[str, Any]:
    path = folder / "journal.db"
    began = time.perf_counter()
    made = _make_journal(path, entries)
    making = time.perf_counter() - began
    balances = asyncio.run(_query(f"sqlite:///{path}"))
    cpu_began = time.process_time()
    report = audit.verify(f"sqlite:///{path}")
    cpu_seconds = time.process_time() - cpu_began
    if report.findings:
        sys.exit(f"error: the made books do not agree: {report.findings[0]}")
    return {
        "entries": made,
        "bytes": path.stat().st_size,
        "make_seconds": round(making, 1),
        **balances,
        "verify_seconds": round(report.seconds, 1),
        "verify_entries_per_second": round(report.entries / report.seconds),
        "verify_entries_per_cpu_second": round(report.entries / cpu_seconds),
    }


async def _query(url: str, times: int = 2000) -> dict[str, float]:
    ledger = SqlLedger.open(url)
    names = [account.name for account in await ledger.accounts()]
    rng = random.Random(0)
    balance, with_run = [], []
    for _ in range(times):
        name = rng.choice(names)
        began = time.perf_counter()
        await ledger.account(name)
        balance.append(time.perf_counter() - began)
    for _ in range(times // 10):
        name = rng.choice(names)
        began = time.perf_counter()
        await ledger.account(name)
        await ledger.run_posted(name, "run-0")
        with_run.append(time.perf_counter() - began)
    await ledger.close()
    return {
        "balance_p50_ms": _ms(statistics.median(balance)),
        "balance_p99_ms": _ms(_quantile(balance, 0.99)),
        "balance_with_run_p99_ms": _ms(_quantile(with_run, 0.99)),
    }


def _make_journal(path: Path, entries: int) -> int:
    """A ledger of about ``entries`` entries with the chain, holds and answers of real ones, made in bulk."""
    asyncio.run(SqlLedger.open(f"sqlite:///{path}").close())  # the schema
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -1000000")
    # Indexes are made at the end, all at once.
    indexes = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'entries' AND sql IS NOT NULL"
    ).fetchall()
    for name, _ in indexes:
        connection.execute(f"DROP INDEX {name}")
    connection.execute("BEGIN")
    made = 0
    share = entries // 2 // OTHER_ACCOUNTS
    for number, count in enumerate([entries - share * OTHER_ACCOUNTS] + [share] * OTHER_ACCOUNTS):
        made += _make_account(connection, f"account-{number:02}", max(1, count))
    for _, statement in indexes:
        connection.execute(statement)
    connection.execute("COMMIT")
    connection.execute("ANALYZE")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    return made


def _make_account(connection: sqlite3.Connection, name: str, entries: int) -> int:
    sha256, head, sequence, posted = hashlib.sha256, bytes(32), 0, 0
    rows: list[tuple[Any, ...]] = []

    def add(kind: str, batch_id: str, run_id: str, count: int, digest: bytes) -> bytes:
        nonlocal head, sequence
        sequence += 1
        line = f"{name}|{sequence}|{sequence}|{kind}|{batch_id}|{run_id}|{count}|{digest.hex()}"
        head = sha256(head + line.encode()).digest()
        rows.append((name, sequence, sequence, kind, batch_id, run_id, count, digest, head))
        return head

    columns = "name, granted, posted, held, sequence, head"
    connection.execute(f"INSERT INTO accounts ({columns}) VALUES (?, 0, 0, 0, 0, ?)", (name, head))
    add("grant", "", "", 2**40, b"")
    for first in range(0, (entries - 1) // 2, _MAKE_AT_ONCE):
        holds, answers = [], []
        for number in range(first, min(first + _MAKE_AT_ONCE, (entries - 1) // 2)):
            digest = sha256(b"%s%d" % (name.encode(), number)).digest()
            batch_id, run_id = digest.hex()[:32], f"run-{number // RUN_BATCHES}"
            add("hold", batch_id, run_id, 16, digest)
            if number % VOIDED_EVERY == 0:
                add("void", batch_id, run_id, 16, b"")
                holds.append((name, batch_id, run_id, digest, 16, "voided", "bulk"))
                continue
            answer = digest * 5
            answer_head = add("post", batch_id, run_id, 16, sha256(answer).digest())
            posted += 16
            holds.append((name, batch_id, run_id, digest, 16, "posted", "bulk"))
            answers.append((name, batch_id, answer, sequence, answer_head))
        connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        connection.executemany("INSERT INTO holds VALUES (?, ?, ?, ?, ?, ?, ?)", holds)
        connection.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", answers)
        rows.clear()
    connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    connection.execute(
        "UPDATE accounts SET granted = ?, posted = ?, sequence = ?, head = ? WHERE name = ?",
        (2**40, posted, sequence, head, name),
    )
    return sequence


# --- the line ---


def _about(note: str) -> dict[str, Any]:
    return record.about("ledger", note) | {
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "sqlalchemy": sqlalchemy.__version__,
        "grpc": grpc.__version__,
    }


def _quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


if __name__ == "__main__":
    try:
        main()
    except ServiceError as error:
        sys.exit(f"error: {error}")
