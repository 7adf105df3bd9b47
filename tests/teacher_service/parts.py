"""Parts for the tests of the service: engines that can be held up, books that can be locked, a served stream."""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2_grpc
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceStub,
    add_GRPCInferenceServiceServicer_to_server,
)

from protos import codec
from protos.errors import Refusal
from protos.mekd.v1 import quota_ledger_pb2_grpc, teacher_inference_pb2_grpc
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service.auth import Authenticator, AuthInterceptor, new_key
from teacher_service.batcher import Batcher, EngineCall
from teacher_service.config import ServerConfig
from teacher_service.engine import ArrayEngine
from teacher_service.health import Health
from teacher_service.inference import InferenceServicer
from teacher_service.interceptors import Gate, RpcMetrics
from teacher_service.kserve import KserveServicer
from teacher_service.ledger import OPERATORS, Account, Ledger, Role
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_remote import RemoteLedger
from teacher_service.ledger_sql import SqlLedger
from teacher_service.limits import Limits
from teacher_service.metrics import Metrics
from teacher_service.money_path import MoneyPath
from teacher_service.quota import QuotaServicer
from teacher_service.statistics import Statistics
from teacher_service.streams import Calls

TIMEOUT_SECONDS = 15.0


def pictures(count: int, seed: int = 1) -> np.ndarray:
    """uint8 (N, 1, 8, 8)."""
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)


class GatedEngine(ArrayEngine):
    """An engine that waits while its gate is closed, remembers what it was asked, and can be told to fail."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[int] = []  # pictures in each call begun
        self.fail_with: Exception | None = None

    def answer(self, images_NCHW: np.ndarray) -> np.ndarray:
        self.calls.append(len(images_NCHW))
        assert self.gate.wait(TIMEOUT_SECONDS)
        if self.fail_with is not None:
            raise self.fail_with
        return super().answer(images_NCHW)


@contextlib.contextmanager
def write_locked(path: Path) -> Iterator[None]:
    """Another program holds the write lock of the books: they can be read and not written."""
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
    finally:
        other.close()


async def until(condition: Any, what: str = "the expected state") -> None:
    """Waits for a condition (a plain or an async function) to become true."""
    deadline = asyncio.get_running_loop().time() + TIMEOUT_SECONDS
    while True:
        found = condition()
        if await found if asyncio.iscoroutine(found) else found:
            return
        assert asyncio.get_running_loop().time() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.005)


class Stream:
    """One open Infer call."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def configure(self, run_id: str = "run") -> wire.StreamAccepted:
        await self.call.write(wire.InferRequest(config=wire.StreamConfig(run_id=run_id)))
        response = await self.receive()
        assert response.WhichOneof("payload") == "accepted", response
        return response.accepted

    async def send(self, batch_id: str, images: np.ndarray) -> None:
        batch = wire.Batch(batch_id=batch_id, images=codec.encode_images(images))
        await self.call.write(wire.InferRequest(batch=batch))

    async def receive(self) -> wire.InferResponse:
        """The next message; fails on the end of the stream."""
        response = await asyncio.wait_for(self.call.read(), TIMEOUT_SECONDS)
        assert response is not grpc.aio.EOF, await self.call.code()
        assert isinstance(response, wire.InferResponse)
        return response

    async def result(self) -> wire.BatchResult:
        response = await self.receive()
        assert response.WhichOneof("payload") == "result", response
        return response.result

    async def refusal(self, batch_id: str) -> Refusal:
        """The next message, which refuses one batch and not the stream."""
        response = await self.receive()
        assert response.WhichOneof("payload") == "refusal", response
        assert response.refusal.batch_id == batch_id
        return Refusal.from_status(response.refusal.status)

    async def ended_by(self) -> Refusal:
        """Waits for the end of the stream, which must be a refusal."""
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            while await asyncio.wait_for(self.call.read(), TIMEOUT_SECONDS) is not grpc.aio.EOF:
                pass
            raise AssertionError(f"the stream ended with {await self.call.code()}")
        return refusal_of(ended.value)


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    status = Status.FromString(details)
    assert (status.code, status.message) == (error.code().value[0], error.details())
    return Refusal.from_status(status)


@dataclass
class Service:
    """A real server in this process, with all its parts in reach."""

    ledger: Ledger
    engine: GatedEngine
    batcher: Batcher
    metrics: Metrics
    calls: Calls
    quota_servicer: QuotaServicer
    money_path: MoneyPath
    authenticator: Authenticator
    channel: grpc.aio.Channel
    key: str
    clock: "Clock"
    address: str
    streams: list[Stream] = field(default_factory=list)
    gate: Gate | None = None

    def metadata(self, key: str | None = None) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {key or self.key}"),)

    @property
    def stub(self) -> Any:
        return teacher_inference_pb2_grpc.TeacherInferenceStub(self.channel)

    @property
    def kserve(self) -> Any:
        return GRPCInferenceServiceStub(self.channel)

    @property
    def quota(self) -> Any:
        return quota_ledger_pb2_grpc.QuotaLedgerStub(self.channel)

    def open(self, key: str | None = None) -> Stream:
        """A stream that is not yet configured."""
        stream = Stream(self.stub.Infer(metadata=self.metadata(key)))
        self.streams.append(stream)
        return stream

    async def stream(self, run_id: str = "run") -> Stream:
        """A stream that is ready for batches."""
        stream = self.open()
        await stream.configure(run_id)
        return stream

    async def new_account(self, name: str, budget: int = 1000) -> str:
        text, stored = new_key(name)
        await self.ledger.create_account(name, budget, stored)
        return text

    async def balances(self, account: str = "device") -> tuple[int, int, int]:
        """posted, held, balance."""
        found = await self.ledger.account(account)
        return found.posted, found.held, found.balance


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@contextlib.asynccontextmanager
async def serving(
    ledger: Ledger | None = None,
    *,
    engine: GatedEngine | None = None,
    budget: int = 1000,
    key: str | None = None,
    **settings: Any,
) -> AsyncIterator[Service]:
    """A server on a free port with one account, "device", made here unless the books have it (and its ``key``)."""
    ledger = ledger or MemoryLedger()
    engine = engine or GatedEngine()
    config = ServerConfig(**settings)
    statistics = Statistics(max_accounts=config.metrics_max_accounts)

    def engine_called(call: EngineCall) -> None:
        metrics.engine_batch(call.picture_count, call.seconds, call.waited_seconds)
        statistics.engine_call(call)

    batcher = Batcher(
        engine.answer,
        max_batch_pictures=min(config.max_engine_pictures, engine.batch_pictures),
        max_queue_pictures=config.max_queue_pictures,
        calls_at_once=engine.calls_at_once,
        on_call=engine_called,
    )
    metrics = Metrics(
        max_accounts=config.metrics_max_accounts,
        queue_pictures=lambda: batcher.taken_pictures,
        is_ready=lambda: not money_path.draining,
    )
    clock = Clock()
    authenticator = Authenticator(ledger, clock)
    limits = Limits(burst_pictures=config.max_batch_pictures, max_streams=config.max_streams, clock=clock)
    quota = QuotaServicer(ledger, authenticator)
    money_path = MoneyPath(
        engine=engine,
        ledger=ledger,
        batcher=batcher,
        metrics=metrics,
        limits=limits,
        statistics=statistics,
        config=config,
    )
    calls = Calls(money_path, authenticator, window_batches=config.window_batches)
    inference = InferenceServicer(calls, money_path, authenticator, engine, config)
    open_inference = KserveServicer(
        calls, money_path, authenticator, engine, statistics, config, is_ready=lambda: not money_path.draining
    )
    gate = Gate(authenticator, limits)
    server = grpc.aio.server(interceptors=(RpcMetrics(metrics), AuthInterceptor(authenticator), gate))
    teacher_inference_pb2_grpc.add_TeacherInferenceServicer_to_server(inference, server)
    add_GRPCInferenceServiceServicer_to_server(open_inference, server)
    quota_ledger_pb2_grpc.add_QuotaLedgerServicer_to_server(quota, server)
    health_pb2_grpc.add_HealthServicer_to_server(Health(()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    batcher.start()
    await server.start()
    if key is None:
        key, stored = new_key("device")
        await ledger.create_account("device", budget, stored)
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
    address = f"127.0.0.1:{port}"
    channel = grpc.aio.insecure_channel(address, options)
    service = Service(
        ledger, engine, batcher, metrics, calls, quota, money_path, authenticator, channel, key, clock, address
    )
    service.gate = gate
    try:
        yield service
    finally:
        for stream in service.streams:
            stream.call.cancel()
        engine.gate.set()
        await channel.close()
        await server.stop(0.2)
        money_path.stop()
        await batcher.stop()
        await ledger.close()


@dataclass
class LedgerServer:
    """The books alone behind a real server in this process, with a key of each role."""

    ledger: Ledger
    url: str
    keys: dict[Role, str]
    authenticator: Authenticator
    quota_servicer: QuotaServicer

    def connect(self, role: Role = Role.TEACHER) -> RemoteLedger:
        """The books from elsewhere; to be closed by the caller."""
        return RemoteLedger(self.url, key=self.keys[role])


@contextlib.asynccontextmanager
async def ledger_serving(ledger: Ledger, *, port: int = 0) -> AsyncIterator[LedgerServer]:
    """A ledger server; the accounts "operators" (teacher, admin) and "customer" are made where missing."""
    keys: dict[Role, str] = {}
    for role in Role:
        owner = "customer" if role is Role.CUSTOMER else OPERATORS
        keys[role], stored = new_key(owner, role)
        if owner not in {account.name for account in await ledger.accounts()}:
            await ledger.create_account(owner, None)
        await ledger.add_key(stored)
    authenticator = Authenticator(ledger)
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 * 2**20)]
    server = grpc.aio.server(interceptors=(AuthInterceptor(authenticator),), options=options)
    quota = QuotaServicer(ledger, authenticator)
    quota_ledger_pb2_grpc.add_QuotaLedgerServicer_to_server(quota, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield LedgerServer(ledger, f"grpc://127.0.0.1:{bound}", keys, authenticator, quota)
    finally:
        await server.stop(0.2)


class TwoRoles:
    """``Ledger`` over gRPC as tests want it: a teacher's key for the money path, an admin's for the rest."""

    MONEY = ("begin", "hold", "replay", "post", "void", "renew_lease", "end_lease", "instance_id")

    def __init__(self, teacher: RemoteLedger, admin: RemoteLedger) -> None:
        self.teacher, self.admin = teacher, admin

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher if name in self.MONEY else self.admin, name)

    async def accounts(self, **asked: Any) -> list[Account]:
        """Those of the test, without the ones that the server's own keys belong to."""
        return [found for found in await self.admin.accounts(**asked) if found.name not in (OPERATORS, "customer")]

    async def close(self) -> None:
        await self.teacher.close()
        await self.admin.close()


@contextlib.asynccontextmanager
async def remote_ledger(tmp_path: Path, **settings: Any) -> AsyncIterator[Ledger]:
    """SQLite books behind a real server, seen from elsewhere; everything lives in the loop that enters it."""
    books = SqlLedger.open(f"sqlite:///{tmp_path}/served.db", **settings)
    async with ledger_serving(books) as server:
        remote: Any = TwoRoles(server.connect(Role.TEACHER), server.connect(Role.ADMIN))
        try:
            yield remote
        finally:
            await remote.close()
    await books.close()
