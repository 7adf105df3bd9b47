"""Readiness and liveness, in this process and of a server process; what a server tells without a key."""

import asyncio
import contextlib
import json
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2 as wire
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from benchmarks.services import lasting_address
from protos.errors import Reason
from protos.mekd.v1 import quota_ledger_pb2 as quota_wire
from protos.mekd.v1.quota_ledger_pb2_grpc import QuotaLedgerStub, add_QuotaLedgerServicer_to_server
from teacher_service import health as module
from teacher_service.auth import Authenticator, AuthInterceptor, new_key
from teacher_service.health import LIVENESS, Health, follow
from teacher_service.interceptors import Gate
from teacher_service.ledger import OPERATORS, LedgerError, LedgerRefusesKey, LedgerUnavailable, Role
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_remote import RemoteLedger
from teacher_service.ledger_sql import SqlLedger
from teacher_service.limits import Limits
from teacher_service.quota import QuotaServicer
from teacher_service.server import SERVICES
from tests.conftest import teacher_admin
from tests.teacher_service.parts import until
from tests.teacher_service.test_metrics import page
from tests.teacher_service.test_server import Client, connect, slow, status_of

Status = wire.HealthCheckResponse
READY, NOT_READY = Status.SERVING, Status.NOT_SERVING


def state(channel: grpc.Channel, service: str = "") -> Any:
    asked = wire.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Check(asked, timeout=10).status  # type: ignore[attr-defined]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the servicer ---


@contextlib.asynccontextmanager
async def served(health: Health) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            yield health_pb2_grpc.HealthStub(channel)
    finally:
        await server.stop(0)


async def test_every_name_has_a_state_and_liveness_is_apart() -> None:
    health = Health(("a.B", "c.D"))
    async with served(health) as stub:

        async def states() -> list[Any]:
            names = ("", "a.B", "c.D", LIVENESS)
            return [(await stub.Check(wire.HealthCheckRequest(service=name))).status for name in names]

        assert await states() == [NOT_READY, NOT_READY, NOT_READY, READY]
        health.set_ready(True)
        assert await states() == [READY] * 4
        health.set_ready(False)
        assert await states() == [NOT_READY, NOT_READY, NOT_READY, READY]
        listed = await stub.List(wire.HealthListRequest())  # type: ignore[attr-defined]
        assert {name: found.status for name, found in listed.statuses.items()} == {
            "": NOT_READY,
            "a.B": NOT_READY,
            "c.D": NOT_READY,
            LIVENESS: READY,
        }
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await stub.Check(wire.HealthCheckRequest(service="x.Y"))
        assert ended.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watcher_is_told_now_and_at_every_change_but_not_twice_the_same() -> None:
    health = Health(("a.B",))
    async with served(health) as stub:
        watching = stub.Watch(wire.HealthCheckRequest(service="a.B"))
        unknown = stub.Watch(wire.HealthCheckRequest(service="x.Y"))
        assert (await watching.read()).status == NOT_READY
        assert (await unknown.read()).status == Status.SERVICE_UNKNOWN
        for ready in (True, True, False, False, True):
            health.set_ready(ready)
            await asyncio.sleep(0.05)
        assert [(await watching.read()).status for _ in range(3)] == [READY, NOT_READY, READY]
        watching.cancel()
        unknown.cancel()


# --- the ledger's part in it ---


class FlakyLedger(MemoryLedger):
    """Books that answer, refuse or hang, as told."""

    def __init__(self) -> None:
        super().__init__()
        self.mood = "fine"
        self.asked = 0

    async def check(self) -> None:
        self.asked += 1
        if self.mood == "away":
            raise LedgerUnavailable("away")
        while self.mood == "hung":
            await asyncio.sleep(0.01)


async def test_readiness_follows_the_ledger_also_when_it_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(module, "PROBE_TIMEOUT_SECONDS", 0.05)
    ledger, health = FlakyLedger(), Health(("a.B",))
    health.set_ready(True)
    following = asyncio.create_task(follow(ledger, health))

    async def is_ready(expected: bool) -> None:
        await until(lambda: (health._status["a.B"] == READY) is expected)
        assert health._status[LIVENESS] == READY

    await until(lambda: ledger.asked > 3)
    assert health._status[""] == READY
    for mood in ("away", "hung"):
        ledger.mood = mood
        await is_ready(False)
        if mood == "hung":
            asked = ledger.asked
            await asyncio.sleep(0.3)
            assert ledger.asked == asked  # what hangs is not asked again on top
        ledger.mood = "fine"
        await is_ready(True)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


def test_a_teacher_whose_ledger_is_away_is_alive_and_not_ready_until_it_is_back(
    start_server: Any, tmp_path: Path
) -> None:
    store, listen = f"sqlite:///{tmp_path}/books.db", lasting_address()
    key = teacher_admin(store, "key", "create", "--role", "teacher").strip()
    ledger = start_server("--ledger-only", "--listen", listen, model="", ledger=store)
    teacher = start_server(ledger=f"grpc://{listen}", env={"MEKD_LEDGER_KEY": key})
    with connect(teacher.address) as channel:
        for name in ("", *SERVICES, LIVENESS):
            assert state(channel, name) == READY
        metrics = f"http://127.0.0.1:{teacher.metrics_port()}/metrics"
        assert "\nmekd_ready 1.0\n" in page(metrics)
        assert ledger.stop() == 0
        wait_for(lambda: state(channel) == NOT_READY)
        assert [state(channel, name) for name in SERVICES] == [NOT_READY] * len(SERVICES)
        assert state(channel, LIVENESS) == READY
        assert "\nmekd_ready 0.0\n" in page(metrics)
        start_server("--ledger-only", "--listen", listen, model="", ledger=store)
        wait_for(lambda: state(channel) == READY)
        assert [state(channel, name) for name in SERVICES] == [READY] * len(SERVICES)
    assert teacher.stop() == 0
    away, back = _told_of_the_ledger(teacher)
    assert away["event"] == "ledger is away, not ready until it is back" and listen in away["problem"]
    assert back["event"] == "ledger is back"


async def test_a_ledger_that_is_away_in_several_ways_is_told_once_and_a_refused_key_besides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(module, "PROBE_TIMEOUT_SECONDS", 0.02)
    away, refuses = LedgerUnavailable("it is away"), LedgerRefusesKey("it refuses the key")
    slow = 0.1
    probes: list[tuple[float, LedgerError | None]] = [(0, away), (slow, away), (0, away), (slow, None)]
    probes += [(slow, refuses), (0, refuses), (slow, away), (0, refuses), (0, None)]

    class Away(MemoryLedger):
        async def check(self) -> None:
            seconds, problem = probes.pop(0) if probes else (0, None)
            await asyncio.sleep(seconds)
            if problem is not None:
                raise problem

    health = Health(())
    health.set_ready(True)
    with structlog.testing.capture_logs() as told:
        following = asyncio.create_task(follow(Away(), health))
        await until(lambda: not probes and health.is_ready)
        following.cancel()
    assert [line.get("problem", line["event"]) for line in told] == [
        "it is away",
        "ledger is back",
        "no answer in 0.02 s",
        "it refuses the key",
        "ledger is back",
    ]


def _told_of_the_ledger(teacher: Any) -> list[dict[str, str]]:
    lines = [json.loads(line) for line in teacher.log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"].startswith("ledger is")]


def test_a_teacher_whose_key_for_its_ledger_is_revoked_says_so(start_server: Any, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'books.db'}"
    key = teacher_admin(store, "key", "create", "--role", "teacher").strip()
    ledger = start_server("--ledger-only", model="", ledger=store)
    teacher = start_server(ledger=f"grpc://{ledger.address}", env={"MEKD_LEDGER_KEY": key})
    with connect(teacher.address) as channel:
        teacher_admin(store, "key", "revoke", key)
        wait_for(lambda: state(channel) == NOT_READY)
    (told,) = _told_of_the_ledger(teacher)
    assert "refuses its key (MEKD_LEDGER_KEY)" in told["problem"] and key not in teacher.log()


async def test_books_that_can_be_read_but_not_written_are_away_until_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.02)
    path = tmp_path / "books.db"
    ledger, health = SqlLedger.open(f"sqlite:///{path}", lease_ms=600), Health(())
    health.set_ready(True)
    following = asyncio.create_task(follow(ledger, health))
    with contextlib.closing(sqlite3.connect(path)) as other:
        for _ in range(2):
            await asyncio.sleep(0.5)  # two renewals
            assert health.is_ready
            other.execute(
                "CREATE TRIGGER full BEFORE INSERT ON instances BEGIN SELECT RAISE(FAIL, 'the disk is full'); END"
            )
            await until(lambda: not health.is_ready)
            with pytest.raises(LedgerError, match="expected the name of an account"):
                await ledger.account("nobody")  # it is read as ever
            other.execute("DROP TRIGGER full")
            await until(lambda: health.is_ready)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await ledger.close()


async def test_a_teacher_is_not_ready_while_the_books_elsewhere_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "books.db"
    books = SqlLedger.open(f"sqlite:///{path}", lease_ms=600)
    text, stored = new_key(OPERATORS, Role.TEACHER)
    await books.create_account(OPERATORS, None, stored)
    authenticator = Authenticator(books)
    server = grpc.aio.server(interceptors=(AuthInterceptor(authenticator),))
    add_QuotaLedgerServicer_to_server(QuotaServicer(books, authenticator), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    remote = RemoteLedger(f"grpc://127.0.0.1:{port}", key=text)
    await remote.check()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(
            "CREATE TRIGGER full BEFORE INSERT ON instances BEGIN SELECT RAISE(FAIL, 'the disk is full'); END"
        )
        await asyncio.sleep(0.2)  # a lease that is fresh is not written again
        with pytest.raises(LedgerUnavailable, match="is away"):
            await remote.check()
        other.execute("DROP TRIGGER full")
        await remote.check()
    await remote.close()
    await server.stop(0)
    await books.close()


# --- stopping ---

# teacher-serve with an engine that waits for a file before every answer but the first, which the server makes itself.
HELD_SERVER = """
import pathlib, sys, time
from teacher_service.cli import serve
from teacher_service.engine import ArrayEngine
answer, file, asked = ArrayEngine.answer, pathlib.Path(sys.argv.pop(1)), []
def when_let_go(self, images):
    asked.append(len(images))
    time.sleep(0.05)
    give_up = time.monotonic() + 60
    while len(asked) > 1 and not file.exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    return answer(self, images)

ArrayEngine.answer = when_let_go
serve()
"""


def test_a_draining_server_is_first_not_ready_then_takes_nothing_new_and_is_alive(
    start_server: Any, tmp_path: Path
) -> None:
    let_go = tmp_path / "let-go"
    server = start_server("--grace-seconds", "60", command=(sys.executable, "-c", HELD_SERVER, str(let_go)))
    key = server.create_account()
    metadata = (("authorization", f"Bearer {key}"),)
    with connect(server.address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(  # type: ignore[attr-defined]
            wire.HealthCheckRequest(service=SERVICES[0]), timeout=30
        )
        assert next(watching).status == READY
        client = Client(channel, key)
        client.send("under-way", 5)
        with contextlib.closing(sqlite3.connect(server.ledger.removeprefix("sqlite:///"))) as books:
            wait_for(lambda: books.execute("SELECT held FROM accounts").fetchone() == (5,))
        server.process.send_signal(signal.SIGTERM)
        assert next(watching).status == NOT_READY
        assert [state(channel, name) for name in ("", *SERVICES)] == [NOT_READY] * (len(SERVICES) + 1)
        assert state(channel, LIVENESS) == READY
        with pytest.raises(grpc.RpcError) as ended:
            QuotaLedgerStub(channel).GetBalance(quota_wire.GetBalanceRequest(), metadata=metadata, timeout=10)
        assert status_of(ended.value).reason is Reason.DRAINING
        with pytest.raises(grpc.RpcError) as ended:
            Client(channel, key)
        assert status_of(ended.value).reason is Reason.DRAINING
        let_go.touch()
        assert [response.WhichOneof("payload") for response in client.call] == ["draining", "result"]
    assert server.process.wait(30) == 0
    assert server.balances()["posted"] == 5


def test_an_engine_that_never_returns_does_not_keep_the_process_nor_its_holds(
    start_server: Any, tmp_path: Path
) -> None:
    ledger = f"sqlite:///{tmp_path}/ledger.db"
    key = teacher_admin(ledger, "account", "create", "device", "--budget", "1000").strip()
    server = start_server("--grace-seconds", "0.5", command=slow(1000.0), ledger=ledger)
    with connect(server.address) as channel:
        client = Client(channel, key)
        client.send("stuck", 150)
        wait_for(lambda: server.balances()["held"] == 150)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 20  # --grace-seconds without the flag
    assert server.balances() == {"name": "device", "granted": 1000, "posted": 0, "held": 0, "balance": 1000}
    events = [json.loads(line)["event"] for line in server.log().splitlines()]
    assert events == ["serving", "draining", "stopped", "ended without waiting any longer"]


def test_a_second_signal_ends_a_server_without_waiting_for_the_grace_time(start_server: Any) -> None:
    server = start_server("--grace-seconds", "300", command=slow(1000.0))
    key = server.create_account()
    with connect(server.address) as channel:
        client = Client(channel, key)
        client.send("stuck", 150)
        wait_for(lambda: server.balances()["held"] == 150)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: '"draining"' in server.log())
        threading.Timer(0.5, server.process.send_signal, (signal.SIGTERM,)).start()
        assert server.process.wait(60) == 0
    assert server.balances()["held"] == 0


async def test_a_ledger_server_that_drains_is_away_for_its_teachers() -> None:
    books = MemoryLedger()
    text, stored = new_key(OPERATORS, Role.TEACHER)
    await books.create_account(OPERATORS, None, stored)
    authenticator = Authenticator(books)
    gate = Gate(authenticator, Limits(burst_pictures=1, max_streams=1))
    server = grpc.aio.server(interceptors=(AuthInterceptor(authenticator), gate))
    add_QuotaLedgerServicer_to_server(QuotaServicer(books, authenticator), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    remote = RemoteLedger(f"grpc://127.0.0.1:{port}", key=text)
    assert (await remote.account(OPERATORS)).name == OPERATORS
    gate.draining = True
    with pytest.raises(LedgerUnavailable, match="UNAVAILABLE: the server is stopping"):
        await remote.account(OPERATORS)
    await remote.close()
    await server.stop(0)


# teacher-serve whose last resort comes long after it has closed its ledger, and before gRPC gives the ledger up.
PATIENT_SERVER = """
from teacher_service import ledger_remote, server
from teacher_service.cli import serve
assert ledger_remote.CLOSE_SECONDS + 1.0 < server.LAST_RESORT_SECONDS
ledger_remote.CLOSE_SECONDS = 0.5
server.LAST_RESORT_SECONDS = 8.0
serve()
"""


def test_a_ledger_that_hangs_does_not_keep_a_server_that_is_stopped(start_server: Any, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/books.db"
    key = teacher_admin(store, "key", "create", "--role", "teacher").strip()
    ledger = start_server("--ledger-only", model="", ledger=store)
    patient = (sys.executable, "-c", PATIENT_SERVER)
    teacher = start_server(
        "--grace-seconds", "0.5", ledger=f"grpc://{ledger.address}", env={"MEKD_LEDGER_KEY": key}, command=patient
    )
    account_key = ledger.create_account()
    with connect(teacher.address) as channel:
        client = Client(channel, account_key)
        client.ask("before")
        ledger.process.send_signal(signal.SIGSTOP)
        try:
            client.send("during")
            time.sleep(0.5)
            teacher.process.send_signal(signal.SIGTERM)
            # Closing gave up before the last resort: what was held lapses there.
            assert teacher.process.wait(60) == 0
        finally:
            ledger.process.send_signal(signal.SIGCONT)
    wait_for(lambda: ledger.balances()["held"] == 0)
    assert ledger.balances()["posted"] == 2


# teacher-serve with books that never close, and little time for a last resort.
STUCK_SERVER = """
import asyncio, threading
from teacher_service import server
from teacher_service.cli import serve
from teacher_service.ledger_sql import SqlLedger
async def never(self):
    await asyncio.to_thread(threading.Event().wait)

SqlLedger.close = never
server.LAST_RESORT_SECONDS = 1.0
serve()
"""


def test_books_that_could_not_be_closed_in_time_are_told_by_the_exit_status(start_server: Any) -> None:
    server = start_server("--grace-seconds", "0.1", command=(sys.executable, "-c", STUCK_SERVER))
    assert server.stop() == 1
    last = json.loads(server.log().splitlines()[-1])
    assert (last["event"], last["waited_for"]) == ("ended without waiting any longer", "the ledger")


# --- what is told without a key ---


def test_reflection_tells_services_and_messages_and_needs_no_key(start_server: Any) -> None:
    server = start_server()
    with connect(server.address) as channel:
        told = ProtoReflectionDescriptorDatabase(channel)
        reflection = "grpc.reflection.v1alpha.ServerReflection"
        assert set(told.get_services()) == {*SERVICES, "grpc.health.v1.Health", reflection}
        for service in SERVICES:
            assert told.FindFileContainingSymbol(service).service
        with pytest.raises(KeyError):
            told.FindFileContainingSymbol("mekd.v1.Secret")
