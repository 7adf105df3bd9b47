import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
import structlog

from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as wire
from protos.mekd.v1.quota_ledger_pb2_grpc import QuotaLedgerStub
from teacher_service import ledger as rules
from teacher_service import quota
from teacher_service.auth import CACHE_SECONDS, new_key
from teacher_service.ledger import OPERATORS, Entry, HoldRequest, Role
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.terms import Terms
from tests.teacher_service.parts import LedgerServer, Service, ledger_serving, pictures, refusal_of, serving, until


async def balance(service: Service, run_id: str = "", key: str | None = None) -> wire.GetBalanceResponse:
    request = wire.GetBalanceRequest(run_id=run_id)
    found = await service.quota.GetBalance(request, metadata=service.metadata(key))
    assert isinstance(found, wire.GetBalanceResponse)
    return found


async def page(service: Service, key: str | None = None, **asked: Any) -> wire.ListStatementResponse:
    request = wire.ListStatementRequest(**asked)
    found = await service.quota.ListStatement(request, metadata=service.metadata(key))
    assert isinstance(found, wire.ListStatementResponse)
    return found


async def two_runs(service: Service) -> None:
    for run_id, count in (("r1", 3), ("r2", 4)):
        stream = await service.stream(run_id)
        for n in range(2):
            await stream.send(f"{run_id}-{n}", pictures(count))
            await stream.result()
    held = HoldRequest(account="device", batch_id="open", run_id="r1", digest=b"", picture_count=5)
    await service.ledger.hold(held)


async def test_a_caller_sees_its_balance_and_what_its_run_cost() -> None:
    async with serving(budget=100) as service:
        await two_runs(service)
        expected = wire.GetBalanceResponse(
            account="device", granted_count=100, posted_count=14, held_count=5, balance_count=81
        )
        assert await balance(service) == expected
        expected.run_posted_count = 6
        assert await balance(service, "r1") == expected
        assert (await balance(service, "never-seen")).run_posted_count == 0


async def test_a_caller_never_sees_another_account() -> None:
    async with serving() as service:
        await two_runs(service)
        other = await service.new_account("other", 7)
        found = await balance(service, "r1", key=other)
        assert (found.account, found.balance_count, found.run_posted_count) == ("other", 7, 0)
        entries = (await page(service, key=other)).entries
        assert [(entry.kind, entry.picture_count) for entry in entries] == [(wire.ENTRY_KIND_GRANT, 7)]
        assert not (await page(service, key=other, run_id="r1")).entries


async def test_the_statement_tells_every_step_with_its_books_and_time() -> None:
    async with serving(budget=100) as service:
        await two_runs(service)
        found = await page(service)
        rows = [
            (entry.sequence, entry.kind, entry.batch_id, entry.run_id, entry.picture_count) for entry in found.entries
        ]
        assert rows[:3] == [
            (1, wire.ENTRY_KIND_GRANT, "", "", 100),
            (2, wire.ENTRY_KIND_HOLD, "r1-0", "r1", 3),
            (3, wire.ENTRY_KIND_POST, "r1-0", "r1", 3),
        ]
        assert len(rows) == 10 and found.next_after_sequence == 0
        assert (found.entries[2].debit_book, found.entries[2].credit_book) == ("held", "posted")
        kept = await service.ledger.statement("device")
        assert [entry.create_time.ToMilliseconds() for entry in found.entries] == [e.create_time_ms for e in kept]


@pytest.mark.parametrize("size", [1, 3, 5, 10, 11])
async def test_pages_join_to_the_whole_statement(size: int) -> None:
    async with serving(budget=100) as service:
        await two_runs(service)
        joined, after = [], 0
        while True:
            found = await page(service, page_size=size, after_sequence=after)
            assert 1 <= len(found.entries) <= size
            joined += [entry.sequence for entry in found.entries]
            after = found.next_after_sequence
            if after == 0:
                break
        assert joined == list(range(1, 11))


async def test_the_statement_of_one_run_is_paged_by_itself() -> None:
    async with serving(budget=100) as service:
        await two_runs(service)
        first = await page(service, run_id="r2", page_size=3)
        rest = await page(service, run_id="r2", page_size=3, after_sequence=first.next_after_sequence)
        assert [e.batch_id for e in [*first.entries, *rest.entries]] == ["r2-0", "r2-0", "r2-1", "r2-1"]
        assert rest.next_after_sequence == 0


async def test_a_page_is_no_larger_than_the_server_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "DEFAULT_PAGE_ENTRIES", 2)
    monkeypatch.setattr(quota, "MAX_PAGE_ENTRIES", 4)
    async with serving(budget=100) as service:
        await two_runs(service)
        assert len((await page(service)).entries) == 2
        assert len((await page(service, page_size=2**31 - 1)).entries) == 4


@pytest.mark.parametrize("asked", [{"page_size": -1}, {"after_sequence": -1}])
async def test_numbers_that_are_none_are_refused_by_name(asked: dict[str, int]) -> None:
    async with serving() as service:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await page(service, **asked)
        refusal = refusal_of(ended.value)
        (field,) = asked
        assert (refusal.reason, refusal.variables["field"]) == (Reason.INVALID_REQUEST, field)


async def test_books_that_cannot_be_read_are_said_to_be_unavailable() -> None:
    from teacher_service.ledger import Account, LedgerUnavailable

    class Away(MemoryLedger):
        async def account(self, name: str) -> Account:
            raise LedgerUnavailable("the store is away")

    async with serving(Away()) as service:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await balance(service)
        refusal = refusal_of(ended.value)
        assert refusal.reason is Reason.LEDGER_UNAVAILABLE and refusal.retry_seconds == 2.0


# --- the three roles ---

# Written out, not derived from the table in auth: who may call what.
MAY_CALL = {
    "GetBalance": "customer teacher admin",
    "ListStatement": "customer teacher admin",
    "StreamStatement": "customer teacher admin",
    "WatchBalance": "customer teacher admin",
    "Hold": "teacher",
    "LookupPost": "teacher",
    "Post": "teacher",
    "Void": "teacher",
    "RenewLease": "teacher",
    "EndLease": "teacher",
    "LookupKey": "teacher admin",
    "GetAccount": "teacher admin",
    "ListAccounts": "admin",
    "CreateAccount": "admin",
    "Grant": "admin",
    "SetTerms": "admin",
    "CreateKey": "admin",
    "ListKeys": "admin",
    "RevokeKey": "admin",
}


async def outcome(server: LedgerServer, method: str, key: str | None, /, **fields: Any) -> Refusal | None:
    """The refusal of one call; None where it was answered."""
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(server.url.removeprefix("grpc://"), options) as channel:
        metadata = (("authorization", f"Bearer {key}"),) if key else None
        call = getattr(QuotaLedgerStub(channel), method)(
            getattr(wire, f"{method}Request")(**fields), metadata=metadata
        )
        try:
            if hasattr(call, "__aiter__"):
                async for _ in call:
                    break
                call.cancel()
            else:
                await call
        except grpc.aio.AioRpcError as error:
            return refusal_of(error)
    return None


def test_the_table_of_this_test_names_every_method() -> None:
    service = wire.DESCRIPTOR.services_by_name["QuotaLedger"]
    assert set(MAY_CALL) == {method.name for method in service.methods}


@pytest.mark.parametrize("method", MAY_CALL)
async def test_every_method_is_for_its_roles_alone(method: str) -> None:
    async with ledger_serving(MemoryLedger()) as server:
        assert (await outcome(server, method, None)).reason is Reason.UNAUTHENTICATED  # type: ignore[union-attr]
        for role in Role:
            refusal = await outcome(server, method, server.keys[role])
            denied = refusal is not None and refusal.reason is Reason.PERMISSION_DENIED
            assert denied is (role.value not in MAY_CALL[method].split()), (method, role, refusal)


@pytest.mark.parametrize("method", ["GetBalance", "ListStatement", "StreamStatement", "WatchBalance"])
async def test_a_customer_may_name_its_own_account_and_no_other(method: str) -> None:
    books = MemoryLedger()
    await books.create_account("other", 7)
    async with ledger_serving(books) as server:
        assert await outcome(server, method, server.keys[Role.CUSTOMER], account="customer") is None
        for account in ("other", "nobody", OPERATORS):
            refusal = await outcome(server, method, server.keys[Role.CUSTOMER], account=account)
            assert refusal is not None and refusal.reason is Reason.PERMISSION_DENIED
            said = f"{method} of another account: expected a key of role teacher or admin, got customer"
            assert refusal.message == said
        for role in (Role.TEACHER, Role.ADMIN):
            assert await outcome(server, method, server.keys[role], account="other") is None


STORED = {"key_id": "0" * 16, "account": "new", "role": wire.ROLE_CUSTOMER, "secret_digest": bytes(32)}


@pytest.mark.parametrize(
    ("method", "fields", "field"),
    [
        ("Hold", {"batch_id": "b", "run_id": "r"}, "instance_id"),
        ("Hold", {"batch_id": "b|c", "run_id": "r", "instance_id": "i"}, "batch_id"),
        ("Hold", {"account": "a", "batch_id": "b", "run_id": "", "instance_id": "i"}, "run_id"),
        ("Hold", {"account": "a", "batch_id": "b", "run_id": "r", "instance_id": "i", "digest": bytes(65)}, "digest"),
        ("LookupPost", {"account": "a", "batch_id": "", "run_id": "r"}, "batch_id"),
        ("LookupPost", {"account": "a", "batch_id": "b", "run_id": "\0"}, "run_id"),
        ("Void", {"instance_id": "i"}, "batch_id"),
        ("Void", {"account": "a", "batch_id": "\0", "instance_id": "i"}, "batch_id"),
        ("Post", {"batch_id": "b", "instance_id": "a/b"}, "instance_id"),
        ("Void", {"batch_id": "b"}, "instance_id"),
        ("CreateKey", {"key": STORED | {"role": 0}}, "key.role"),
        ("CreateKey", {"key": STORED | {"role": 9}}, "key.role"),
        ("CreateKey", {"key": STORED | {"key_id": "0" * 15}}, "key.key_id"),
        ("CreateKey", {"key": STORED | {"secret_digest": b"short"}}, "key.secret_digest"),
        ("CreateAccount", {"account": "another", "key": STORED}, "key.account"),
        ("CreateAccount", {"account": "new", "terms": wire.Terms(top_k=0)}, "terms.top_k"),
        ("SetTerms", {"account": "customer", "terms": wire.Terms(decimals=8)}, "terms.decimals"),
        (
            "SetTerms",
            {"account": "customer", "terms": wire.Terms(pictures_per_second=-1)},
            "terms.pictures_per_second",
        ),
        ("SetTerms", {"account": "customer", "terms": wire.Terms(answers=9)}, "terms.answers"),  # type: ignore[arg-type]
        ("CreateAccount", {"account": "new", "picture_count": 1, "grant_id": "a b"}, "grant_id"),
        ("CreateAccount", {"account": "new", "grant_id": "g"}, "grant_id"),
        ("Grant", {"account": "customer", "picture_count": 1, "grant_id": "a|b"}, "grant_id"),
        ("ListAccounts", {"page_size": -1}, "page_size"),
        ("ListStatement", {"run_id": "\0"}, "run_id"),
        ("StreamStatement", {"run_id": "\0"}, "run_id"),
        ("GetBalance", {"run_id": "\0"}, "run_id"),
        ("StreamStatement", {"after_sequence": -1}, "after_sequence"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_the_name_of_its_field(
    method: str, fields: dict[str, Any], field: str
) -> None:
    async with ledger_serving(MemoryLedger()) as server:
        role = Role.TEACHER if "teacher" in MAY_CALL[method] else Role.ADMIN
        refusal = await outcome(server, method, server.keys[role], **fields)
        assert refusal is not None and refusal.reason is Reason.INVALID_REQUEST
        assert refusal.variables["field"] == field


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("Grant", {"account": "nobody", "picture_count": 5}),
        ("Grant", {"account": "customer", "picture_count": -5}),
        ("CreateAccount", {"account": "customer"}),
        ("CreateAccount", {"account": "No Name"}),
        ("CreateAccount", {"account": "new", "picture_count": 0}),
        ("SetTerms", {"account": "nobody", "terms": wire.Terms(top_k=3)}),
        ("SetTerms", {"account": "customer", "unset_fields": ["head"]}),
        ("SetTerms", {"account": "customer", "terms": wire.Terms(top_k=3), "unset_fields": ["top_k"]}),
        ("CreateKey", {"key": STORED}),
        ("RevokeKey", {"key_id": "0" * 16}),
    ],
)
async def test_what_the_books_cannot_do_is_told_to_the_operator_and_changes_nothing(
    method: str, fields: dict[str, Any]
) -> None:
    async with ledger_serving(MemoryLedger()) as server:
        before = await server.ledger.accounts()
        refusal = await outcome(server, method, server.keys[Role.ADMIN], **fields)
        assert refusal is not None and refusal.reason is Reason.LEDGER_REFUSED and "expected" in refusal.message
        assert refusal.retry_seconds is None and await server.ledger.accounts() == before
        assert await server.ledger.terms("customer") == Terms()


async def test_what_an_operator_changes_is_a_line_in_the_log_with_its_key_and_no_secret() -> None:
    async with ledger_serving(MemoryLedger()) as server:
        admin = server.keys[Role.ADMIN]
        calls: list[tuple[str, dict[str, Any]]] = [
            ("CreateAccount", {"account": "new", "picture_count": 7}),
            ("Grant", {"account": "new", "picture_count": 5}),
            ("SetTerms", {"account": "new", "terms": wire.Terms(top_k=3)}),
            ("CreateKey", {"key": STORED}),
            ("RevokeKey", {"key_id": STORED["key_id"]}),
            ("RevokeKey", {"key_id": "f" * 16}),  # refused, and yet asked for
            ("GetAccount", {"account": "new"}),
        ]
        with structlog.testing.capture_logs() as told:
            for method, fields in calls:
                await outcome(server, method, admin, **fields)
        lines = [line for line in told if "by_key" in line]
        assert [line["event"] for line in lines] == [
            "create account",
            "grant",
            "set terms",
            "create key",
            "revoke key",
            "revoke key",
        ]
        assert {line["by_key"] for line in lines} == {admin.split("_")[1]}
        assert lines[1]["account"] == "new" and lines[1]["pictures"] == 5
        assert lines[2]["top_k"] == 3 and lines[2]["unset"] == []
        assert admin.split("_")[2] not in str(told)


async def test_a_teacher_reads_the_terms_of_its_customers_where_it_looks_up_a_key_or_an_account() -> None:
    books = MemoryLedger()
    async with ledger_serving(books) as server:
        terms = Terms(answers="soft", decimals=3, pictures_per_second=0.1)
        await books.set_terms("customer", terms)
        (stored,) = await books.keys("customer")
        teacher = server.connect(Role.TEACHER)
        assert await teacher.credential(stored.key_id) == (stored, terms)
        assert await teacher.terms("customer") == terms
        await teacher.close()


@pytest.mark.parametrize("account", ["", "\0", "a\0", "A", "a" * 64])
async def test_what_is_no_accounts_name_never_reaches_the_books(account: str) -> None:
    class Untouched(MemoryLedger):
        async def untouched(self, *_arguments: Any, **_more: Any) -> Any:
            raise AssertionError("the books were asked")

        hold = post = void = replay = grant = keys = run_posted = statement = untouched

    batch = {"account": account, "batch_id": "b", "run_id": "r", "instance_id": "i"}
    async with ledger_serving(Untouched()) as server:
        calls: list[tuple[str, Role, dict[str, Any]]] = [
            ("Hold", Role.TEACHER, batch),
            ("Post", Role.TEACHER, {name: batch[name] for name in ("account", "batch_id", "instance_id")}),
            ("Void", Role.TEACHER, {name: batch[name] for name in ("account", "batch_id", "instance_id")}),
            ("LookupPost", Role.TEACHER, {name: batch[name] for name in ("account", "batch_id", "run_id")}),
            ("Grant", Role.ADMIN, {"account": account, "picture_count": 1}),
            ("ListKeys", Role.ADMIN, {"account": account}),
            ("GetAccount", Role.ADMIN, {"account": account}),
            ("CreateKey", Role.ADMIN, {"key": STORED | {"account": account}}),
            ("RevokeKey", Role.ADMIN, {"key_id": account}),
        ]
        if account:  # empty: one's own
            calls.append(("ListStatement", Role.ADMIN, {"account": account}))
        for method, role, fields in calls:
            refusal = await outcome(server, method, server.keys[role], **fields)
            assert refusal is not None and refusal.reason is Reason.LEDGER_REFUSED, method
            assert "expected" in refusal.message
        assert await outcome(server, "LookupKey", server.keys[Role.ADMIN], key_id=account) is None


async def test_an_admins_change_that_may_have_been_made_is_not_advised_to_be_sent_again() -> None:
    class Failing(MemoryLedger):
        fails = False

        async def fail(self, *_arguments: Any, **_more: Any) -> Any:
            raise rules.LedgerUnavailable("the connection was cut after COMMIT")

        grant = revoke_key = fail

        async def create_account(self, *arguments: Any, **more: Any) -> Any:
            return await (self.fail if self.fails else super().create_account)(*arguments, **more)

        async def add_key(self, key: rules.Key) -> None:
            return await (self.fail if self.fails else super().add_key)(key)

    books = Failing()
    async with ledger_serving(books) as server:
        books.fails = True
        for method, fields, may_have_an_id in (
            ("Grant", {"account": "customer", "picture_count": 5}, True),
            ("CreateAccount", {"account": "new", "picture_count": 5}, True),
            ("CreateKey", {"key": STORED}, False),
            ("RevokeKey", {"key_id": "0" * 16}, False),
        ):
            refusal = await outcome(server, method, server.keys[Role.ADMIN], **fields)
            assert refusal == Refusal.of(Reason.LEDGER_OUTCOME_UNKNOWN), method
            assert refusal is not None and refusal.retry_seconds is None
            assert "look whether it was done before you do it again" in refusal.message
            if may_have_an_id:
                refusal = await outcome(server, method, server.keys[Role.ADMIN], grant_id="g", **fields)
                assert refusal is not None and refusal.retry_seconds == 2.0
        remote = server.connect(Role.ADMIN)
        with pytest.raises(rules.LedgerUnavailable, match="look whether it was done"):
            await remote.grant("customer", 5)
        await remote.close()


async def test_a_grant_with_an_id_is_made_once_and_its_id_is_on_the_statement() -> None:
    async with ledger_serving(MemoryLedger()) as server:
        admin = server.keys[Role.ADMIN]
        key = {"key": STORED}
        for _ in range(2):
            fields = {"account": "new", "picture_count": 9, "grant_id": "first"}
            assert await outcome(server, "CreateAccount", admin, **fields, **key) is None
            assert await outcome(server, "Grant", admin, account="new", picture_count=5, grant_id="g") is None
        assert (await server.ledger.account("new")).granted == 14
        for method, fields, field in (
            ("CreateAccount", {"picture_count": 8, "grant_id": "first"} | key, "picture_count"),
            ("CreateAccount", {"picture_count": 9, "grant_id": "first"}, "key"),
            ("Grant", {"picture_count": 6, "grant_id": "g"}, "picture_count"),
        ):
            refusal = await outcome(server, method, admin, account="new", **fields)
            assert refusal == Refusal.of(Reason.GRANT_ID_REUSED, grant_id=fields["grant_id"], field=field)
        assert [entry.batch_id for entry in await server.ledger.statement("new")] == ["first", "g"]


async def test_an_account_that_is_there_already_is_told_with_the_terms_that_it_has() -> None:
    async with ledger_serving(MemoryLedger()) as server:
        remote = server.connect(Role.ADMIN)
        await remote.create_account("new", 5, None, Terms(decimals=3), grant_id="g")
        await remote.create_account("new", 5, None, Terms(decimals=3), grant_id="g")
        with pytest.raises(rules.LedgerError, match=r"'new' is there with other terms, \{'decimals': 3\}"):
            await remote.create_account("new", 5, None, Terms(top_k=1), grant_id="g")
        assert await server.ledger.terms("new") == Terms(decimals=3)
        await remote.close()


async def test_a_page_of_accounts_is_asked_of_the_store_and_not_cut_from_all_of_them() -> None:
    asked: list[tuple[str, int]] = []

    class Noting(MemoryLedger):
        async def accounts(self, *, after_name: str = "", limit: int = 1000) -> Any:
            asked.append((after_name, limit))
            return await super().accounts(after_name=after_name, limit=limit)

    books = Noting()
    for n in range(5):
        await books.create_account(f"a{n}", 1)
    async with ledger_serving(books) as server:
        asked.clear()
        remote = server.connect(Role.ADMIN)
        found = [account.name for account in await remote.accounts(after_name="a1", limit=2)]
        assert (found, asked) == (["a2", "a3"], [("a1", 3)])  # one more, to know whether there are more
        await remote.close()


# --- streams ---


@pytest.mark.parametrize(("run_id", "after"), [("", 0), ("r2", 0), ("", 7), ("", 10), ("", 99)])
async def test_a_streamed_statement_is_the_paged_one(
    monkeypatch: pytest.MonkeyPatch, run_id: str, after: int
) -> None:
    monkeypatch.setattr(quota, "DEFAULT_PAGE_ENTRIES", 3)
    async with serving(budget=100) as service:
        await two_runs(service)
        request = wire.StreamStatementRequest(run_id=run_id, after_sequence=after)
        told = [message async for message in service.quota.StreamStatement(request, metadata=service.metadata())]
        assert all(1 <= len(message.entries) <= 3 for message in told)
        whole = await page(service, run_id=run_id, after_sequence=after, page_size=1000)
        assert [entry for message in told for entry in message.entries] == list(whole.entries)


async def test_a_streamed_statement_ends_though_the_journal_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "DEFAULT_PAGE_ENTRIES", 1)

    class Growing(MemoryLedger):
        async def statement(self, account: str, **asked: Any) -> Any:
            await self.grant(account, 1)
            return await super().statement(account, **asked)

    async with serving(Growing(), budget=100) as service:
        await service.ledger.grant("device", 1)
        call = service.quota.StreamStatement(wire.StreamStatementRequest(), metadata=service.metadata())
        assert [entry.sequence async for message in call for entry in message.entries] == [1, 2]


async def test_a_customer_watches_its_balance_while_it_buys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "WATCH_SECONDS", 0.01)
    async with serving(budget=100) as service:
        watching = service.quota.WatchBalance(wire.WatchBalanceRequest(), metadata=service.metadata())
        first = (await watching.read()).account
        assert (first.name, first.balance_count, first.posted_count) == ("device", 100, 0)
        stream = await service.stream()
        await stream.send("b", pictures(7))
        await stream.result()
        while (told := (await asyncio.wait_for(watching.read(), 5)).account).posted_count == 0:
            assert told.held_count == 7
        assert (told.balance_count, told.posted_count, told.held_count) == (93, 7, 0)
        assert told.head == (await service.ledger.account("device")).head
        watching.cancel()


async def test_a_revoked_key_ends_a_watch_before_it_tells_anything_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "WATCH_SECONDS", 0.01)
    async with serving(budget=100) as service:
        text, stored = new_key("device")
        await service.ledger.add_key(stored)
        watching = service.quota.WatchBalance(wire.WatchBalanceRequest(), metadata=service.metadata(text))
        await watching.read()
        await service.ledger.revoke_key(stored.key_id)
        service.clock.seconds += CACHE_SECONDS
        await service.ledger.grant("device", 1)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(watching.read(), 5)
        assert refusal_of(ended.value).reason is Reason.UNAUTHENTICATED


async def test_a_revoked_key_ends_a_watch_of_a_balance_that_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "WATCH_SECONDS", 0.01)
    async with serving(budget=100) as service:
        text, stored = new_key("device")
        await service.ledger.add_key(stored)
        call = await watching(service, text)
        await service.ledger.revoke_key(stored.key_id)
        service.clock.seconds += CACHE_SECONDS
        assert (await ended(call)).reason is Reason.UNAUTHENTICATED


async def watching(service: Service, key: str | None = None) -> Any:
    """A watch that has told the balance once."""
    call = service.quota.WatchBalance(wire.WatchBalanceRequest(), metadata=service.metadata(key))
    assert (await asyncio.wait_for(call.read(), 5)).account.balance_count == 100
    return call


async def ended(call: Any) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await asyncio.wait_for(call.read(), 5)
    return refusal_of(error.value)


async def test_a_server_that_stops_ends_its_watches_at_once_and_takes_no_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "WATCH_SECONDS", 60.0)
    async with serving(budget=100) as service:
        calls = [await watching(service) for _ in range(3)]
        await asyncio.wait_for(service.quota_servicer.drain(), 30)  # nobody waits for the next look
        for call in [*calls, service.quota.WatchBalance(wire.WatchBalanceRequest(), metadata=service.metadata())]:
            assert await ended(call) == Refusal.of(Reason.DRAINING)
        assert (await balance(service)).balance_count == 100  # the rest is answered until the end


async def test_watches_are_bounded_by_account_and_by_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "MAX_ACCOUNT_WATCHES", 2)
    monkeypatch.setattr(quota, "MAX_WATCHES", 3)
    async with serving(budget=100) as service:
        other = await service.new_account("other", 100)
        third = await service.new_account("third", 100)
        device = [await watching(service) for _ in range(2)]
        one_more = service.quota.WatchBalance(wire.WatchBalanceRequest(), metadata=service.metadata())
        refusal = await ended(one_more)
        assert refusal == Refusal.of(Reason.WATCH_LIMIT, limit=2, scope="account device")
        assert refusal.retry_seconds is None and "ask with GetBalance" in refusal.message
        await watching(service, other)
        one_more = service.quota.WatchBalance(wire.WatchBalanceRequest(), metadata=service.metadata(third))
        assert await ended(one_more) == Refusal.of(Reason.WATCH_LIMIT, limit=3, scope="this server")
        device[0].cancel()  # whoever leaves makes room

        async def room() -> bool:
            call = service.quota.WatchBalance(wire.WatchBalanceRequest(), metadata=service.metadata(third))
            try:
                return bool((await call.read()).account.name == "third")
            except grpc.aio.AioRpcError:
                return False

        await until(room)


async def test_streamed_statements_are_bounded_too_and_keep_nobody_from_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quota, "MAX_ACCOUNT_WATCHES", 2)
    monkeypatch.setattr(quota, "DEFAULT_PAGE_ENTRIES", 1)
    held = asyncio.Event()

    class Slow(MemoryLedger):
        async def statement(self, *arguments: Any, **given: Any) -> Sequence[Entry]:
            await held.wait()
            return await super().statement(*arguments, **given)

    async with serving(Slow(), budget=100) as service:
        request = wire.StreamStatementRequest()
        for _ in range(2):
            service.quota.StreamStatement(request, metadata=service.metadata())
        await until(lambda: service.quota_servicer._statements["device"] == 2)
        one_more = service.quota.StreamStatement(request, metadata=service.metadata())
        assert await ended(one_more) == Refusal.of(Reason.WATCH_LIMIT, limit=2, scope="account device")
        await asyncio.wait_for(service.quota_servicer.drain(), 5)
        held.set()
        await until(lambda: not service.quota_servicer._statements)


async def test_reports_on_one_account_are_read_in_turn_and_keep_no_other_waiting() -> None:
    under_way: Counter[str] = Counter()
    most: Counter[str] = Counter()
    held = asyncio.Event()

    class Slow(MemoryLedger):
        async def statement(self, account: str, **given: Any) -> Sequence[Entry]:
            under_way[account] += 1
            most[account] = max(most[account], under_way[account])
            if account == "device":
                await held.wait()
            under_way[account] -= 1
            return await super().statement(account, **given)

    async with serving(Slow(), budget=100) as service:
        other = await service.new_account("other", 100)
        request = wire.ListStatementRequest()
        many = [service.quota.ListStatement(request, metadata=service.metadata()) for _ in range(8)]
        await until(lambda: under_way["device"] == 1)
        page = await service.quota.ListStatement(request, metadata=service.metadata(other))
        assert [entry.picture_count for entry in page.entries] == [100]
        held.set()
        assert [len((await call).entries) for call in many] == [1] * 8
        assert most == {"device": 1, "other": 1}
        assert not service.quota_servicer._turns


async def test_a_key_that_sells_or_administers_buys_nothing() -> None:
    async with serving() as service:
        for role in (Role.TEACHER, Role.ADMIN):
            text, stored = new_key("device", role)
            await service.ledger.add_key(stored)
            stream = service.open(text)
            refusal = await stream.ended_by()
            assert refusal.reason is Reason.PERMISSION_DENIED
