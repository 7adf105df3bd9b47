"""The books over gRPC: the contract of every store once more, and what only distance brings."""

import asyncio
import contextlib
import inspect
import itertools
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.services import lasting_address
from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as wire
from protos.mekd.v1.quota_ledger_pb2_grpc import (
    QuotaLedgerServicer,
    QuotaLedgerStub,
    add_QuotaLedgerServicer_to_server,
)
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceStub
from teacher_service import ledger as rules
from teacher_service import ledger_remote
from teacher_service.auth import new_key
from teacher_service.engine import ArrayEngine
from teacher_service.ledger import Held, HoldRequest, LedgerError, LedgerRefusesKey, LedgerUnavailable, Posted, Role
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_remote import RemoteLedger
from teacher_service.ledger_sql import SqlLedger
from teacher_service.terms import Terms
from tests.conftest import teacher_admin
from tests.teacher_service import test_ledger
from tests.teacher_service.parts import (
    LedgerServer,
    Stream,
    ledger_serving,
    pictures,
    remote_ledger,
    until,
)


def wish(batch_id: str = "b", count: int = 5, digest: bytes = b"d", account: str = "a") -> HoldRequest:
    return HoldRequest(account=account, batch_id=batch_id, run_id="run", digest=digest, picture_count=count)


@contextlib.asynccontextmanager
async def connected(server: LedgerServer, role: Role = Role.TEACHER) -> AsyncIterator[RemoteLedger]:
    remote = server.connect(role)
    try:
        yield remote
    finally:
        await remote.close()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the books are: "memory" or a URL."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return "memory" if request.param == "memory" else f"sqlite:///{tmp_path}/ledger.db"


def opened(store: str, **settings: Any) -> Any:
    return MemoryLedger() if store == "memory" else SqlLedger.open(store, **settings)


# --- one contract ---


def contract() -> Iterator[Any]:
    """Every test of the contract that needs the books alone, with its parameters."""
    for name, test in inspect.getmembers(test_ledger, inspect.iscoroutinefunction):
        wanted = set(inspect.signature(test).parameters)
        if not name.startswith("test_") or "books" not in wanted or "opened" in wanted:
            continue
        choices = []
        for mark in getattr(test, "pytestmark", []):
            names, values = mark.args
            names = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
            rows = [value if len(names) > 1 else (value,) for value in values]
            choices.append([dict(zip(names, row, strict=True)) for row in rows])
        for combined in itertools.product(*choices):
            arguments = {key: value for part in combined for key, value in part.items()}
            if wanted - arguments.keys() <= {"books", "time_"}:
                yield pytest.param(test, arguments, id="-".join([name, *(repr(v)[:12] for v in arguments.values())]))


@pytest.mark.parametrize(("test", "arguments"), list(contract()))
async def test_the_contract_holds_over_grpc(test: Callable[..., Any], arguments: Any, tmp_path: Path) -> None:
    time_ = test_ledger.Time()
    async with remote_ledger(tmp_path, clock=time_) as books:
        more = {"time_": time_} if "time_" in inspect.signature(test).parameters else {}
        await test(books=books, **arguments, **more)


def test_the_contract_is_not_empty() -> None:
    assert len(list(contract())) >= 40


# --- outcomes that got lost ---


class LossyServicer(QuotaLedgerServicer):
    """Does what it is asked, and then loses the reply of the next ``lose`` calls of a method."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.aio.insecure_channel(target, [("grpc.enable_http_proxy", 0)])
        self.lose: dict[str, int] = {}
        self.refuse: dict[str, int] = {}
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if not name[0].isupper():
            return super().__getattribute__(name)

        async def forward(request: Any, context: Any) -> Any:
            self.calls.append(name)
            if self.refuse.get(name, 0):
                self.refuse[name] -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "never arrived")
            try:
                answer = await getattr(QuotaLedgerStub(self.channel), name)(
                    request, metadata=context.invocation_metadata(), timeout=10
                )
            except grpc.aio.AioRpcError as error:
                trailing = tuple(item for item in error.trailing_metadata() if item[0] == "grpc-status-details-bin")
                await context.abort(error.code(), error.details(), trailing_metadata=trailing)
            if self.lose.get(name, 0):
                self.lose[name] -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the reply was lost")
            return answer

        return forward


@contextlib.asynccontextmanager
async def lossy(server: LedgerServer, role: Role = Role.TEACHER) -> AsyncIterator[tuple[LossyServicer, RemoteLedger]]:
    """A teacher's ledger, or another role's, behind a connection that loses replies."""
    servicer = LossyServicer(server.url.removeprefix("grpc://"))
    between = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_QuotaLedgerServicer_to_server(servicer, between)
    port = between.add_insecure_port("127.0.0.1:0")
    await between.start()
    remote = RemoteLedger(f"grpc://127.0.0.1:{port}", key=server.keys[role])
    try:
        yield servicer, remote
    finally:
        await remote.close()
        await between.stop(0)
        await servicer.channel.close()


async def test_a_post_whose_reply_was_lost_is_charged_once_and_gets_the_same_receipt(tmp_path: Path) -> None:
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, lossy(server) as (servicer, remote):
        assert await remote.hold(wish()) == Held()
        servicer.lose["Post"] = 2
        posted = await remote.post("a", "b", b"answer")
        assert servicer.calls.count("Post") == 3
        kept = await remote.hold(wish())
        assert isinstance(kept, Posted) and (kept.answer, kept.receipt) == (b"answer", posted.receipt)
        account = await books.account("a")
        assert (account.posted, account.held, account.balance) == (5, 0, 5)
        assert [entry.kind for entry in await books.statement("a")] == ["grant", "hold", "post"]
    await books.close()


async def test_a_grant_whose_reply_was_lost_is_made_once_with_an_id_and_advice_tells_so(tmp_path: Path) -> None:
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    _, key = new_key("a")
    async with ledger_serving(books) as server, lossy(server, Role.ADMIN) as (between, remote):
        between.lose = {"CreateAccount": 1, "Grant": 2}
        with pytest.raises(LedgerUnavailable, match="do it again with the same grant id first: it is done once"):
            await remote.create_account("a", 10, key, grant_id="first")
        assert (await remote.create_account("a", 10, key, grant_id="first")).granted == 10
        with pytest.raises(LedgerUnavailable, match="with the same grant id g: it is done once"):
            await remote.grant("a", 5, grant_id="g")
        with pytest.raises(LedgerUnavailable, match="look whether it was done before you do it again"):
            await remote.grant("a", 100)
        assert (await remote.grant("a", 5, grant_id="g")).granted == 115
        assert between.calls == ["CreateAccount", "CreateAccount", "Grant", "Grant", "Grant"]
    assert [entry.batch_id for entry in await books.statement("a")] == ["first", "g", ""]
    await books.close()


@pytest.mark.parametrize("fate", ["lose", "refuse"])
async def test_a_hold_in_doubt_is_adopted_by_the_repeat_of_its_batch(tmp_path: Path, fate: str) -> None:
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, lossy(server) as (servicer, remote):
        getattr(servicer, fate)["Hold"] = 1
        servicer.refuse["Void"] = 1000
        with pytest.raises(LedgerUnavailable, match="is away"):
            await remote.hold(wish())
        assert await remote.hold(wish()) == Held()
        assert (await remote.post("a", "b", b"answer")).account.balance == 5
        await asyncio.sleep(0)
        assert not remote._doubts and (await books.account("a")).held == 0
    await books.close()


async def test_a_hold_in_doubt_that_nobody_repeats_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_remote, "DOUBT_SECONDS", 0.05)
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, lossy(server) as (servicer, remote):
        servicer.lose["Hold"] = 1
        servicer.refuse["Void"] = 2
        with pytest.raises(LedgerUnavailable):
            await remote.hold(wish())

        async def given_back() -> bool:
            return [entry.kind.value for entry in await books.statement("a")] == ["grant", "hold", "void"]

        await until(given_back)
        await until(lambda: not remote._doubts)
        assert await remote.hold(wish()) == Held()
    await books.close()


async def test_a_hold_in_doubt_is_not_forgotten_when_its_repeat_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_remote, "DOUBT_SECONDS", 0.05)
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, lossy(server) as (servicer, remote):
        servicer.lose["Hold"] = 1
        servicer.refuse["Void"] = 10**6
        with pytest.raises(LedgerUnavailable):
            await remote.hold(wish())
        for _ in range(2):
            with pytest.raises(Refusal, match="BATCH_ID_REUSED"):
                await remote.hold(wish(digest=b"other pictures"))
        with pytest.raises(LedgerError, match="expected a hold of 1 to"):
            await remote.hold(wish(count=2**60))
        assert (await books.account("a")).held == 5
        servicer.refuse["Void"] = 0

        async def given_back() -> bool:
            return (await books.account("a")).held == 0

        await until(given_back)
        await until(lambda: not remote._doubts)
    await books.close()


async def test_a_post_that_the_books_cannot_do_leaves_nothing_under_way(tmp_path: Path) -> None:
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, connected(server) as remote:
        await remote.hold(wish())
        with pytest.raises(LedgerError, match="expected to post 1 to 5 pictures of batch b, got 6"):
            await remote.post("a", "b", b"answer", 6)
        assert await remote.hold(wish()) == Held()  # the same hold, still ours
        assert (await remote.post("a", "b", b"answer")).account.posted == 5
    await books.close()


async def test_a_caller_who_left_in_the_middle_of_a_hold_leaves_nothing_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_remote, "DOUBT_SECONDS", 0.05)
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await books.create_account("a", 100)
    async with ledger_serving(books) as server, connected(server) as remote:
        await remote.begin()
        for index in range(20):
            task = asyncio.create_task(remote.hold(wish(f"b{index}")))
            await asyncio.sleep(index * 0.0005)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
                await remote.void("a", f"b{index}")
        await until(lambda: not remote._doubts)
        await books.void("nobody", "nothing")

        async def all_given_back() -> bool:
            return (await books.account("a")).held == 0

        await until(all_given_back)
    await books.close()


async def test_a_post_is_repeated_by_the_same_instance_with_the_same_answer_only(store: str) -> None:
    books = opened(store)
    await books.create_account("a", 10)
    await books.hold(wish(), instance_id="x")
    first = await books.post("a", "b", b"answer", 3, instance_id="x")
    assert await books.post("a", "b", b"answer", 3, instance_id="x") == first
    for answer, count, instance in (
        (b"other", 3, "x"),
        (b"answer", 2, "x"),
        (b"answer", None, "x"),
        (b"answer", 3, "y"),
        (b"answer", 3, ""),
    ):
        with pytest.raises(Refusal, match="HOLD_LOST"):
            await books.post("a", "b", answer, count, instance_id=instance)
    await books.hold(wish("c", 2), instance_id="x")  # in one group: the second post meets the first, unwritten
    twice = await asyncio.gather(*(books.post("a", "c", b"answer", instance_id="x") for _ in range(2)))
    assert twice[0].receipt == twice[1].receipt
    assert (await books.account("a")).posted == 5
    await books.close()


async def test_another_instance_may_repeat_its_hold_and_nobody_elses(store: str) -> None:
    books = opened(store)
    await books.create_account("a", 10)
    assert await books.hold(wish(), instance_id="x") == Held() == await books.hold(wish(), instance_id="x")
    for other in ("y", ""):
        with pytest.raises(Refusal, match="BATCH_IN_FLIGHT"):
            await books.hold(wish(), instance_id=other)
        await books.void("a", "b", instance_id=other)  # not theirs: nothing happens
    with pytest.raises(Refusal, match="another pictures"):
        await books.hold(wish(digest=b"e"), instance_id="x")
    assert [entry.kind for entry in await books.statement("a")] == ["grant", "hold"]
    await books.void("a", "b", instance_id="x")
    await books.hold(wish("own"))
    with pytest.raises(Refusal, match="BATCH_IN_FLIGHT"):  # the ledger's own callers are told apart by it alone
        await books.hold(wish("own"))
    await books.close()


# --- leases ---


@pytest.mark.parametrize("store", ["sqlite", "postgres"], indirect=True)
async def test_a_teacher_that_lives_keeps_its_holds_and_one_that_died_loses_them(store: str) -> None:
    books = opened(store, lease_ms=3000)
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, connected(server) as alive, connected(server) as dead:
        await alive.begin()
        await alive.hold(wish("alive"))
        await dead.hold(wish("dead"))
        assert dead._keeper is not None
        dead._keeper.cancel()

        async def expired() -> bool:
            return "expire" in [entry.kind.value for entry in await books.statement("a")]

        await until(expired)  # the lease of the one that lives is the older: not renewed, it had lapsed too
        with pytest.raises(Refusal) as lost:
            await dead.post("a", "dead", b"answer")
        assert lost.value.reason is Reason.HOLD_LOST
        assert (await alive.post("a", "alive", b"answer")).account.balance == 5
        entries = [(entry.kind.value, entry.batch_id) for entry in await books.statement("a")]
        assert ("expire", "dead") in entries and ("expire", "alive") not in entries
        dead._keeper = None
    await books.close()


@pytest.mark.parametrize("store", ["sqlite", "postgres"], indirect=True)
async def test_closing_gives_back_what_this_teacher_holds_and_nothing_else(store: str) -> None:
    books = opened(store)
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, connected(server) as other:
        await other.hold(wish("other", 1))
        async with connected(server) as remote:
            for index in range(3):
                await remote.hold(wish(f"b{index}", 2))
        await remote.close()
        assert (await books.account("a")).held == 1
        with pytest.raises(LedgerUnavailable, match="closed"):
            await remote.hold(wish())
        assert (await other.post("a", "other", b"answer")).account.balance == 9
    await books.close()


async def test_nobody_acts_for_an_instance_of_another_account(tmp_path: Path) -> None:
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await books.create_account("a", 10)
    text, stored = new_key("rivals", Role.TEACHER)
    await books.create_account("rivals", None, stored)
    async with ledger_serving(books) as server, connected(server) as remote:
        rival = RemoteLedger(server.url, key=text)
        rival.instance_id = remote.instance_id
        await remote.hold(wish())
        with pytest.raises(Refusal, match="BATCH_IN_FLIGHT"):
            await rival.hold(wish())
        with pytest.raises(Refusal, match="HOLD_LOST"):
            await rival.post("a", "b", b"x")
        await rival.void("a", "b")
        await rival.end_lease(rival.instance_id)
        await remote.post("a", "b", b"answer")
        await books.hold(wish("own"))
        rival.instance_id = books.instance_id
        with pytest.raises(Refusal, match="HOLD_LOST"):
            await rival.post("a", "own", b"x")
        await rival.close()
    await books.close()


# --- what goes wrong on the way ---


async def test_a_ledger_that_is_away_fails_closed_and_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_remote, "POST_SECONDS", 0.3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        remote = RemoteLedger(f"grpc://127.0.0.1:{taken.getsockname()[1]}", key="mekd_x")
        for call in (
            remote.begin,
            lambda: remote.hold(wish()),
            lambda: remote.post("a", "b", b""),
            lambda: remote.void("a", "b"),
            lambda: remote.account("a"),
            lambda: remote.credential("x"),
        ):
            with pytest.raises(
                LedgerUnavailable, match=r"the ledger at grpc://127\.0\.0\.1:\d+ is away \(UNAVAILABLE: "
            ):
                await asyncio.wait_for(call(), 5)
        with pytest.raises(LedgerUnavailable, match="look whether it was done before you do it again"):
            await remote.grant("a", 5)
        await remote.close()


async def test_a_ledger_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_remote, "CALL_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        remote = RemoteLedger(f"grpc://127.0.0.1:{silent.getsockname()[1]}", key="mekd_x")
        with pytest.raises(LedgerUnavailable, match="DEADLINE_EXCEEDED"):
            await remote.account("a")
        await remote.close()


async def test_a_key_that_the_ledger_refuses_is_the_teachers_trouble_and_not_its_customers(tmp_path: Path) -> None:
    async with ledger_serving(MemoryLedger()) as server:
        for key in ("mekd_nonsense", server.keys[Role.CUSTOMER], server.keys[Role.ADMIN]):
            remote = RemoteLedger(server.url, key=key)
            with pytest.raises(LedgerUnavailable, match="refuses its key"):
                await remote.begin()
            with pytest.raises(LedgerUnavailable, match="refuses its key"):
                await remote.hold(wish(account="customer"))
            await remote.close()
        remote = RemoteLedger(server.url, key=server.keys[Role.CUSTOMER])
        with pytest.raises(LedgerRefusesKey) as caught:
            await remote.grant("customer", 5)
        assert "look whether" not in str(caught.value)  # it was not done
        await remote.close()


@pytest.mark.parametrize(
    ("url", "settings", "said"),
    [
        ("grpc://", {}, "expected a ledger as grpc://HOST:PORT or grpcs://HOST:PORT"),
        ("grpc://host", {}, "expected a ledger as grpc://HOST:PORT"),
        ("grpc://:50051", {}, "expected a ledger as grpc://HOST:PORT"),
        ("grpc://127.0.0.1:99999", {}, "expected a ledger as grpc://HOST:PORT"),
        ("http://127.0.0.1:1", {}, "expected a ledger as grpc://HOST:PORT"),
        ("grpc://10.0.0.1:50051", {}, "is not loopback and unencrypted: use grpcs://"),
        ("grpc://127.0.0.1:1", {"key": ""}, "expected a key for the ledger at grpc://127.0.0.1:1 in MEKD_LEDGER_KEY"),
        ("grpc://127.0.0.1:1", {"key": ""}, "MEKD_LEDGER_KEY, got none"),
        ("grpc://127.0.0.1:1", {"key": "mekd_s\u00e9cret"}, "MEKD_LEDGER_KEY, got one with a line break"),
        ("grpc://127.0.0.1:1", {"key": "mekd_s\ncret"}, "MEKD_LEDGER_KEY, got one with a line break"),
        ("grpcs://10.0.0.1:1", {"tls_ca": Path("/no/such.pem")}, "--ledger-ca /no/such.pem: No such file"),
    ],
)
def test_what_can_never_work_is_refused_before_anything_is_sent(url: str, settings: Any, said: str) -> None:
    with pytest.raises(LedgerError, match=said) as refused:
        RemoteLedger(url, **({"key": "mekd_x"} | settings))
    assert "mekd_" not in str(refused.value)


async def test_a_teacher_does_not_pass_other_teachers_through(tmp_path: Path) -> None:
    async with (
        ledger_serving(MemoryLedger()) as first,
        connected(first) as remote,
        ledger_serving_through(remote) as at,
    ):
        second = RemoteLedger(at, key=first.keys[Role.TEACHER])
        with pytest.raises(LedgerError, match="ask the ledger itself"):
            await second.hold(wish())
        assert await second.credential("0" * 16) is None  # reading passes
        await second.close()


@contextlib.asynccontextmanager
async def ledger_serving_through(remote: RemoteLedger) -> AsyncIterator[str]:
    from teacher_service.auth import Authenticator
    from teacher_service.quota import QuotaServicer

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_QuotaLedgerServicer_to_server(QuotaServicer(remote, Authenticator(remote)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"grpc://127.0.0.1:{port}"
    await server.stop(0)


# --- reading from afar ---


async def test_statements_accounts_and_keys_come_whole_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teacher_service import quota

    monkeypatch.setattr(quota, "DEFAULT_PAGE_ENTRIES", 3)
    monkeypatch.setattr(quota, "MAX_PAGE_ENTRIES", 4)
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    for index in range(8):
        await books.create_account(f"c{index}", 1)
    for _ in range(10):
        await books.grant("c0", 1)
    async with ledger_serving(books) as server, connected(server, Role.ADMIN) as remote:
        assert list(await remote.accounts()) == list(await books.accounts())
        whole = await books.statement("c0")
        assert list(await remote.statement("c0")) == list(whole) and len(whole) == 11
        assert list(await remote.statement("c0", after_sequence=2, limit=7)) == list(whole)[2:9]
        assert list(await remote.keys("operators")) == list(await books.keys("operators"))
        stored = (await books.keys("operators"))[0]
        assert await remote.credential(stored.key_id) == (stored, Terms())
        await remote.add_key(stored)  # once more changes nothing
        with pytest.raises(LedgerError, match="got the id of another"):
            await remote.add_key(type(stored)(**(vars(stored) | {"revoked": True})))
    await books.close()


async def test_a_watch_tells_the_balance_now_and_every_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "WATCH_SECONDS", 0.02)
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, connected(server, Role.ADMIN) as remote:
        async with contextlib.aclosing(remote.watch("a")) as told:
            assert await anext(told) == await books.account("a")
            after = asyncio.ensure_future(anext(told))
            await asyncio.sleep(0.2)
            assert not after.done()  # silent while nothing changes
            await books.grant("a", 5)
            assert (await asyncio.wait_for(after, 5)).balance == 15
        with pytest.raises(LedgerError, match="'nobody'"):
            async for _ in remote.watch("nobody"):
                pass
    await books.close()


async def test_a_watch_of_a_ledger_that_stops_is_a_ledger_that_is_away(tmp_path: Path) -> None:
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, connected(server, Role.ADMIN) as remote:
        async with contextlib.aclosing(remote.watch("a")) as told:
            await anext(told)
            draining = asyncio.ensure_future(server.quota_servicer.drain())
            with pytest.raises(LedgerUnavailable, match=r"is away \(UNAVAILABLE: the server is stopping"):
                await asyncio.wait_for(anext(told), 5)
            await draining
    await books.close()


async def test_a_pruned_answer_reaches_a_teacher_elsewhere_as_none_with_its_receipt(store: str) -> None:
    if store == "memory":
        pytest.skip("the books in memory keep every answer")
    books = opened(store)
    await books.create_account("a", 10)
    async with ledger_serving(books) as server, connected(server) as remote:
        assert await remote.hold(wish()) == Held()
        posted = await remote.post("a", "b", b"answer")
        await books.prune_answers(rules.now_ms() + 1000)
        again = await remote.hold(wish())
        assert isinstance(again, Posted) and (again.answer, again.receipt) == (None, posted.receipt)
    await books.close()


# --- processes ---


class LedgerProcess:
    """``teacher-serve --ledger-only`` on a port of its own, to be killed and started again."""

    def __init__(self, start_server: Any, store: str) -> None:
        self._start = start_server
        self.store = store
        self.address = lasting_address()
        self.server: Any = None
        self.start()

    def start(self) -> None:
        if self.server is None or self.server.process.poll() is not None:
            self.server = self._start("--ledger-only", "--listen", self.address, model="", ledger=self.store)

    @property
    def url(self) -> str:
        return f"grpc://{self.address}"

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()


def admin_over_grpc(url: str, key: str, *arguments: str) -> str:
    os.environ["MEKD_LEDGER_KEY"] = key
    try:
        return teacher_admin(url, *arguments)
    finally:
        del os.environ["MEKD_LEDGER_KEY"]


def test_operators_work_from_a_shell_on_a_ledger_elsewhere(start_server: Any, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/ledger.db"
    admin = teacher_admin(store, "key", "create", "--role", "admin").strip()
    ledger = LedgerProcess(start_server, store)

    def there(*arguments: str) -> str:
        return admin_over_grpc(ledger.url, admin, *arguments)

    key = there("account", "create", "device", "--budget", "50").strip()
    assert key.startswith("mekd_")
    for _ in range(2):
        said = there("account", "grant", "device", "8", "--grant-id", "order-7")
        assert said == "name device  granted 58  posted 0  held 0  balance 58\n"
    for command in (
        ("account", "show", "device", "--format", "json"),
        ("account", "list"),
        ("key", "list", "operators"),
        ("key", "list", "device"),
        ("statement", "device", "--format", "json"),
    ):
        assert there(*command) == teacher_admin(store, *command) != ""
    teacher = there("key", "create", "--role", "teacher").strip()
    there("key", "revoke", teacher.split("_")[1])
    assert f"{teacher.split('_')[1]}  teacher  revoked" in there("key", "list", "operators")
    assert ledger.server.stop() == 0


def test_a_teacher_sells_from_books_elsewhere_through_the_death_of_the_ledger(
    start_server: Any, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path}/ledger.db"
    teacher_key = teacher_admin(store, "key", "create", "--role", "teacher").strip()
    customer = teacher_admin(store, "account", "create", "device", "--budget", "1000").strip()
    ledger = LedgerProcess(start_server, store)
    teacher = start_server(ledger=ledger.url, env={"MEKD_LEDGER_KEY": teacher_key})
    sent = {f"b{index}": 1 + index % 5 for index in range(60)}

    async def buy() -> dict[str, Any]:
        options = [("grpc.enable_http_proxy", 0)]
        async with grpc.aio.insecure_channel(teacher.address, options) as channel:
            metadata = (("authorization", f"Bearer {customer}"),)
            stream = Stream(TeacherInferenceStub(channel).Infer(metadata=metadata))
            await stream.configure()
            answered: dict[str, Any] = {}
            for index, (batch_id, count) in enumerate(sent.items()):
                if index in (15, 40):
                    ledger.kill()
                if index in (17, 42):
                    await asyncio.to_thread(ledger.start)
                for _ in range(2):  # everything is sent twice; the second is free
                    for _ in range(200):
                        await stream.send(batch_id, pictures(count, index))
                        response = await stream.receive()
                        if response.HasField("result"):
                            break
                        refusal = Refusal.from_status(response.refusal.status)
                        assert refusal.retry_seconds is not None, refusal
                        if index in (15, 16, 40, 41):
                            await asyncio.to_thread(ledger.start)
                        await asyncio.sleep(0.2)
                    assert answered.setdefault(batch_id, response.result.receipt) == response.result.receipt
                kept = codec.decode_answer(response.result.answer, picture_count=count, class_count=10)
                assert kept.tobytes() == ArrayEngine().answer(pictures(count, index)).tobytes()
            quota = QuotaLedgerStub(channel)
            told = await quota.GetBalance(wire.GetBalanceRequest(run_id="run"), metadata=metadata)
            assert told.run_posted_count == told.posted_count == sum(sent.values())
            page = await quota.ListStatement(wire.ListStatementRequest(), metadata=metadata)
            posts = {e.batch_id: e.picture_count for e in page.entries if e.kind == wire.ENTRY_KIND_POST}
            assert posts == sent
            heads = {entry.sequence: entry.head for entry in page.entries}
            assert all(heads[receipt.sequence] == receipt.head for receipt in answered.values())
            stream.call.cancel()
            return answered

    answered = asyncio.run(asyncio.wait_for(buy(), 120))
    assert len(answered) == 60
    assert teacher.stop() == 0
    assert ledger.server.stop() == 0
    assert "device" in teacher_admin(store, "account", "show", "device")
    assert f"posted {sum(sent.values())}  held 0" in teacher_admin(store, "account", "show", "device")
    teacher_admin(store, "ledger", "verify")


def test_a_teacher_with_a_wrong_key_or_address_does_not_start(start_server: Any, tmp_path: Path) -> None:
    from tests.conftest import program

    store = f"sqlite:///{tmp_path}/ledger.db"
    customer = teacher_admin(store, "account", "create", "device", "--budget", "1").strip()
    ledger = LedgerProcess(start_server, store)
    command = [
        program("teacher-serve"),
        "--model",
        "array:10,1,8,8",
        "--listen",
        "127.0.0.1:0",
        "--metrics-port",
        "0",
    ]
    for url, key, said in (
        (ledger.url, customer, "refuses its key"),
        (ledger.url, "", "expected a key for the ledger"),
        ("grpc://127.0.0.1:1", customer, "is away"),
    ):
        done = subprocess.run(
            [*command, "--ledger", url],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"MEKD_LEDGER_KEY": key},
        )
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1], done.stderr
        assert customer not in done.stderr
    assert ledger.server.stop(signal.SIGINT) == 0


async def test_terms_that_an_older_ledger_drops_are_not_taken_for_kept() -> None:
    class Older(QuotaLedgerServicer):
        async def CreateAccount(
            self, request: wire.CreateAccountRequest, _context: Any
        ) -> wire.CreateAccountResponse:
            return wire.CreateAccountResponse(account=wire.Account(name=request.account))

        async def SetTerms(self, request: wire.SetTermsRequest, _context: Any) -> wire.SetTermsResponse:
            request.terms.ClearField("suspended")
            return wire.SetTermsResponse(terms=request.terms)

    server = grpc.aio.server()
    add_QuotaLedgerServicer_to_server(Older(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    remote = RemoteLedger(f"grpc://127.0.0.1:{port}", key="mekd_x")
    assert (await remote.create_account("a", 5)).name == "a"
    assert await remote.set_terms("a", Terms(top_k=3)) == Terms(top_k=3)
    with pytest.raises(
        LedgerError, match=r"'a' has not all of the new terms: the ledger at .* knows fewer; update it"
    ):
        await remote.set_terms("a", Terms(top_k=3, suspended=True))
    with pytest.raises(LedgerError, match=r"'a' was made without its terms: the ledger at .* knows none; update it"):
        await remote.create_account("a", 5, None, Terms(top_k=3))
    await remote.close()
    await server.stop(0)
