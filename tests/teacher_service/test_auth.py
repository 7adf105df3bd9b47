import asyncio
import pickle
import sqlite3
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as quota_wire
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import auth, ledger_store
from teacher_service.auth import (
    ALLOWED,
    CACHE_SECONDS,
    MAX_LOOKUPS,
    UNKNOWN_SECONDS,
    Authenticator,
    AuthInterceptor,
    Caller,
    new_key,
)
from teacher_service.ledger import Credential, Key, LedgerError, LedgerUnavailable, Role
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_sql import SqlLedger
from teacher_service.terms import Terms
from tests.teacher_service.parts import Clock, refusal_of, serving, until


async def with_key(role: Role = Role.CUSTOMER) -> tuple[MemoryLedger, str, Key]:
    books = MemoryLedger()
    text, stored = new_key("device", role)
    await books.create_account("device", 10, stored)
    return books, text, stored


async def refused(authenticator: Authenticator, header: str | bytes | None) -> Refusal:
    metadata = [("other", "x")] + ([("authorization", header)] if header is not None else [])
    with pytest.raises(Refusal) as caught:
        await authenticator.identify(metadata)
    return caught.value


def test_a_key_is_shown_in_its_form_and_kept_as_a_digest() -> None:
    text, stored = new_key("device")
    kind, key_id, secret = text.split("_")
    assert (kind, len(key_id), len(secret)) == ("mekd", 16, 64)
    assert stored.key_id == key_id and secret not in repr(stored) and len(stored.secret_sha256) == 32
    assert new_key("device")[0] != text


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER  {} "])
async def test_a_valid_key_names_its_account(form: str) -> None:
    books, text, _ = await with_key(Role.ADMIN)
    caller = await Authenticator(books).identify([("authorization", form.format(text))])
    assert caller == Caller("device", Role.ADMIN, Terms())


@pytest.mark.parametrize(
    ("header", "got"),
    [
        (None, "no such header"),
        (b"Bearer raw", "no such header"),
        ("", "another form"),
        ("{}", "another form"),
        ("Basic {}", "another form"),
        ("Bearer", "a key that is not whole"),
        ("Bearer {}0", "a key that is not whole"),
        ("Bearer x{}", "a key that is not whole"),
        ("Bearer {} {}", "a key that is not whole"),
        ("Bearer mekd_" + "0" * 16 + "_" + "0" * 64, "an unknown key"),
    ],
)
async def test_any_other_header_is_refused_saying_what_came(header: str | bytes | None, got: str) -> None:
    books, text, _ = await with_key()
    given = header.format(text, text) if isinstance(header, str) else header
    assert await refused(Authenticator(books), given) == Refusal.of(Reason.UNAUTHENTICATED, got=got)


async def test_a_known_id_with_another_secret_is_as_unknown_as_any() -> None:
    books, text, _ = await with_key()
    forged = text[:-1] + ("0" if text[-1] != "0" else "1")
    assert (await refused(Authenticator(books), f"Bearer {forged}")).variables == {"got": "an unknown key"}


async def test_no_metadata_at_all_is_refused() -> None:
    with pytest.raises(Refusal, match="no such header"):
        await Authenticator(MemoryLedger()).identify(None)


async def test_revocation_is_noticed_when_the_cache_has_run_out_and_not_later() -> None:
    books, text, stored = await with_key()
    clock = Clock()
    authenticator = Authenticator(books, clock)
    metadata = [("authorization", f"Bearer {text}")]
    await authenticator.identify(metadata)
    await books.revoke_key(stored.key_id)
    clock.seconds += CACHE_SECONDS - 0.001
    assert (await authenticator.identify(metadata)).account == "device"
    clock.seconds += 0.001
    refusal = await refused(authenticator, f"Bearer {text}")
    assert refusal.variables == {"got": f"key {stored.key_id}, which was revoked"}
    assert CACHE_SECONDS <= 5.0  # the contract's bound


async def test_changed_terms_are_noticed_when_the_cache_has_run_out_and_not_later() -> None:
    books, text, _ = await with_key()
    await books.set_terms("device", Terms(top_k=3))
    clock = Clock()
    authenticator = Authenticator(books, clock)
    metadata = [("authorization", f"Bearer {text}")]
    assert (await authenticator.identify(metadata)).terms == Terms(top_k=3)
    await books.set_terms("device", Terms(answers="hard"))
    clock.seconds += CACHE_SECONDS - 0.001
    assert (await authenticator.identify(metadata)).terms == Terms(top_k=3)
    clock.seconds += 0.001
    assert (await authenticator.identify(metadata)).terms == Terms(answers="hard", top_k=3)


async def test_a_suspended_account_is_refused_by_key_and_by_certificate_until_it_is_no_longer() -> None:
    books, text, _ = await with_key()
    clock = Clock()
    authenticator = Authenticator(books, clock)
    metadata = [("authorization", f"Bearer {text}")]
    ways = (lambda: authenticator.identify(metadata), lambda: authenticator.identify_certificate(["device"]))
    for identify in ways:
        await identify()
    await books.set_terms("device", Terms(suspended=True))
    clock.seconds += CACHE_SECONDS
    for identify in ways:
        with pytest.raises(Refusal) as raised:
            await identify()
        assert raised.value == Refusal.of(Reason.ACCOUNT_SUSPENDED, account="device")
        assert raised.value.code == grpc.StatusCode.PERMISSION_DENIED.value[0] and raised.value.retry_seconds is None
    await books.set_terms("device", Terms(), ["suspended"])
    for identify in ways:  # at once: refusals are not cached
        assert (await identify()).account == "device"


@pytest.mark.parametrize("role", [Role.TEACHER, Role.ADMIN])
async def test_those_who_work_for_a_suspended_account_go_on(role: Role) -> None:
    books, _, _ = await with_key()
    text, stored = new_key("device", role)
    await books.add_key(stored)
    await books.set_terms("device", Terms(suspended=True))
    assert (await Authenticator(books).identify([("authorization", f"Bearer {text}")])).role is role


async def test_terms_that_nobody_understands_sell_nothing(tmp_path: Path) -> None:
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    for name in ("device", "other"):
        text, stored = new_key(name)
        await books.create_account(name, 10, stored)
        with sqlite3.connect(tmp_path / "ledger.db") as store:
            store.execute("UPDATE accounts SET terms = '{\"answers\": \"loud\"}' WHERE name = 'device'")
        if name == "device":
            refusal = await refused(Authenticator(books), f"Bearer {text}")
            assert refusal.reason is Reason.LEDGER_UNAVAILABLE
        else:  # and trouble nobody else
            await Authenticator(books).identify([("authorization", f"Bearer {text}")])
    with pytest.raises(LedgerError, match="account device on these books: answers: expected soft or hard"):
        await books.terms("device")
    await books.close()


async def test_a_use_of_a_cached_key_does_not_prolong_its_stay() -> None:
    books, text, stored = await with_key()
    clock = Clock()
    authenticator = Authenticator(books, clock)
    for _ in range(4):
        await authenticator.identify([("authorization", f"Bearer {text}")])
        clock.seconds += CACHE_SECONDS / 3
    await authenticator.identify([("authorization", f"Bearer {text}")])  # looked up again within this loop
    await books.revoke_key(stored.key_id)
    clock.seconds += CACHE_SECONDS
    assert (await refused(authenticator, f"Bearer {text}")).reason is Reason.UNAUTHENTICATED


async def test_the_cache_holds_no_secret_and_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "CACHE_KEYS", 3)
    books, text, _ = await with_key()
    authenticator = Authenticator(books, Clock())
    keys = [text]
    for index in range(5):
        more, stored = new_key("device")
        await books.add_key(stored)
        keys.append(more)
        await authenticator.identify([("authorization", f"Bearer {more}")])
        await authenticator.identify([("authorization", f"Bearer {text}")])
        await refused(authenticator, f"Bearer mekd_{index:016}_{'0' * 64}")
    kept = authenticator._good
    assert len(kept) == 3
    dump = pickle.dumps(list(kept.items()))
    assert not any(key.rpartition("_")[2].encode() in dump for key in keys)


async def test_a_ledger_that_is_away_lets_nobody_in(tmp_path: Path) -> None:
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    text, stored = new_key("device")
    await books.create_account("device", 10, stored)
    clock = Clock()
    authenticator = Authenticator(books, clock)
    await authenticator.identify([("authorization", f"Bearer {text}")])
    clock.seconds += CACHE_SECONDS
    await books.close()
    assert (await refused(authenticator, f"Bearer {text}")).reason is Reason.LEDGER_UNAVAILABLE


# --- keys that nobody knows ---


def unknown_key(number: int) -> str:
    return f"Bearer mekd_{number:016x}_{'0' * 64}"


class CountedLedger(MemoryLedger):
    """Counts the keys that are looked up, and holds them up while its gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_up: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def credential(self, key_id: str) -> Credential | None:
        self.looked_up.append(key_id)
        await self.gate.wait()
        return await super().credential(key_id)


async def test_strangers_wait_for_few_lookups_and_keep_neither_health_nor_customers_waiting(tmp_path: Path) -> None:
    books = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    text, stored = new_key("device")
    await books.create_account("device", 10, stored)
    clock = Clock()
    authenticator = Authenticator(books, clock)
    customer = [("authorization", f"Bearer {text}")]
    await authenticator.identify(customer)
    clock.seconds += CACHE_SECONDS
    busy, go = threading.Event(), threading.Event()

    def occupy(_connection: Any) -> None:
        busy.set()
        go.wait(10)

    occupied = asyncio.ensure_future(books._read(occupy, quick=True))
    await asyncio.to_thread(busy.wait, 10)
    strangers = [asyncio.ensure_future(refused(authenticator, unknown_key(i))) for i in range(3 * MAX_LOOKUPS)]
    await until(lambda: sum(stranger.done() for stranger in strangers) == 2 * MAX_LOOKUPS)
    known = asyncio.ensure_future(authenticator.identify(customer))  # seen good before: not refused with them
    healthy = asyncio.ensure_future(books.check())
    await until(lambda: books._quick_reader._wishes.qsize() == MAX_LOOKUPS + 2)
    go.set()
    await occupied
    assert (await known).account == "device"
    await healthy
    reasons = [(await stranger).reason for stranger in strangers]
    assert reasons == [Reason.UNAUTHENTICATED] * MAX_LOOKUPS + [Reason.LEDGER_UNAVAILABLE] * 2 * MAX_LOOKUPS
    assert (await strangers[-1]).retry_seconds is not None
    await books.close()


async def test_all_who_wait_for_one_key_wait_for_one_lookup_whoever_of_them_leaves() -> None:
    books = CountedLedger()
    text, stored = new_key("device")
    await books.create_account("device", 10, stored)
    authenticator = Authenticator(books)
    forged = text[:-1] + ("0" if text[-1] != "0" else "1")
    books.gate.clear()
    first, second = (
        asyncio.ensure_future(authenticator.identify([("authorization", f"Bearer {text}")])) for _ in range(2)
    )
    third = asyncio.ensure_future(refused(authenticator, f"Bearer {forged}"))
    await until(lambda: books.looked_up)
    await asyncio.sleep(0)
    first.cancel()
    books.gate.set()
    assert (await second).account == "device"
    assert (await third).variables == {"got": "an unknown key"}
    assert books.looked_up == [stored.key_id]


async def test_an_unknown_key_is_looked_up_again_after_a_second_and_a_new_one_works_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auth, "CACHE_KEYS", 3)
    books, clock = CountedLedger(), Clock()
    authenticator = Authenticator(books, clock)
    text, stored = new_key("device")
    for _ in range(3):
        assert (await refused(authenticator, f"Bearer {text}")).variables == {"got": "an unknown key"}
    assert books.looked_up == [stored.key_id]
    await books.create_account("device", 10, stored)
    clock.seconds += UNKNOWN_SECONDS
    assert (await authenticator.identify([("authorization", f"Bearer {text}")])).account == "device"
    for number in range(9):
        await refused(authenticator, unknown_key(number))
    assert len(authenticator._unknown) == 3 and UNKNOWN_SECONDS <= 1.0
    assert authenticator._lookups == {}


# --- the interceptor, over real gRPC ---


async def call(call: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return refusal_of(ended.value)


async def test_no_method_of_ours_runs_without_a_key() -> None:
    async with serving() as service:
        for metadata in (None, (("authorization", "Bearer nonsense"),)):
            for made in (
                service.stub.Describe(wire.DescribeRequest(), metadata=metadata),
                service.stub.Infer(iter([]), metadata=metadata),
                service.quota.GetBalance(quota_wire.GetBalanceRequest(), metadata=metadata),
                service.quota.ListStatement(quota_wire.ListStatementRequest(), metadata=metadata),
            ):
                assert (await call(made)).reason is Reason.UNAUTHENTICATED


async def test_every_method_of_ours_is_listed() -> None:
    services = [
        wire.DESCRIPTOR.services_by_name["TeacherInference"],
        quota_wire.DESCRIPTOR.services_by_name["QuotaLedger"],
    ]
    ours = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert {method for method in ALLOWED if method.startswith("/mekd.")} == ours
    assert all(ALLOWED[method] for method in ours)  # none without a credential


@pytest.mark.parametrize("shape", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_a_method_that_is_not_listed_is_denied_whatever_the_key(shape: str) -> None:
    ran: list[str] = []

    async def unary(_request: Any, _context: Any) -> bytes:
        ran.append(shape)
        return b""

    async def stream(_request: Any, _context: Any) -> Any:
        ran.append(shape)
        yield b""

    behaviour = stream if shape.endswith("stream") else unary
    handler = getattr(grpc, f"{shape}_rpc_method_handler")(behaviour)
    books, text, _ = await with_key(Role.ADMIN)
    server = grpc.aio.server(interceptors=(AuthInterceptor(Authenticator(books)),))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("mekd.v1.Unlisted", {"Do": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        request = iter([b""]) if shape.startswith("stream") else b""
        metadata = (("authorization", f"Bearer {text}"),)
        made = getattr(channel, shape)("/mekd.v1.Unlisted/Do")(request, metadata=metadata)
        refusal = await call(made)
        assert refusal.reason is Reason.PERMISSION_DENIED
        assert (
            refusal.message
            == "/mekd.v1.Unlisted/Do: expected a method that some role may call, got one that none may"
        )
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await channel.unary_unary("/mekd.v1.Unlisted/Nothing")(b"", metadata=metadata)
        assert ended.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop(0)
    assert ran == []


async def test_a_role_that_is_not_allowed_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOWED, "/mekd.v1.TeacherInference/Describe", frozenset({Role.ADMIN}))
    async with serving() as service:
        made = service.stub.Describe(wire.DescribeRequest(), metadata=service.metadata())
        refusal = await call(made)
        assert refusal.reason is Reason.PERMISSION_DENIED
        assert refusal.message == "/mekd.v1.TeacherInference/Describe: expected a key of role admin, got customer"


@pytest.mark.parametrize("answers", ["unary", "stream"])
async def test_who_has_no_key_is_refused_before_the_message_is_waited_for_or_parsed(answers: str) -> None:
    parsed: list[int] = []

    def parse(message: bytes) -> bytes:
        parsed.append(len(message))
        return message

    async def unary(_request: Any, _context: Any) -> bytes:
        return b""

    async def stream(_request: Any, _context: Any) -> Any:
        yield b""

    method = "/mekd.v1.TeacherInference/Describe"
    made = getattr(grpc, f"unary_{answers}_rpc_method_handler")(stream if answers == "stream" else unary, parse)
    books, text, _ = await with_key()
    server = grpc.aio.server(interceptors=(AuthInterceptor(Authenticator(books)),))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(method.split("/")[1], {"Describe": made}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        silent = getattr(channel, f"stream_{answers}")(method)()  # on the wire the same call, and no message comes
        large = getattr(channel, f"unary_{answers}")(method)(bytes(3 * 2**20))
        for refused_call in (silent, large):
            assert (await asyncio.wait_for(call(refused_call), 10)).reason is Reason.UNAUTHENTICATED
        assert parsed == []
        metadata = (("authorization", f"Bearer {text}"),)
        allowed = getattr(channel, f"unary_{answers}")(method)(b"abc", metadata=metadata)
        assert [each async for each in allowed] == [b""] if answers == "stream" else await allowed == b""
        assert parsed == [3]
    await server.stop(0)


async def test_a_ledger_failure_while_authenticating_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_store, "BUSY_TIMEOUT_SECONDS", 0.05)
    async with serving(SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")) as service:
        await service.ledger.close()
        with pytest.raises(LedgerUnavailable):
            await service.ledger.credential("x")
        made = service.stub.Describe(wire.DescribeRequest(), metadata=service.metadata())
        assert (await asyncio.wait_for(call(made), 10)).reason is Reason.LEDGER_UNAVAILABLE
