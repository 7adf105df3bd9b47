from typing import Any

import grpc
import pytest

from protos.errors import Reason
from protos.mekd.v1 import quota_ledger_pb2 as wire
from teacher_service import quota
from teacher_service.ledger import HoldRequest
from teacher_service.ledger_memory import MemoryLedger
from tests.teacher_service.parts import Service, pictures, refusal_of, serving


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
