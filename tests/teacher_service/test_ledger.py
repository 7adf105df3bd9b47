"""One contract for every store of the books."""

import asyncio
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from protos.errors import Reason, Refusal
from teacher_service import ledger as rules
from teacher_service import ledger_sql
from teacher_service.audit import verify
from teacher_service.auth import new_key
from teacher_service.ledger import (
    MAX_COUNT,
    Account,
    Entry,
    Held,
    HoldRequest,
    Ledger,
    LedgerError,
    Posted,
    Role,
)
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_sql import SqlLedger
from teacher_service.terms import FIELDS, Terms
from tests.teacher_service.parts import until


class Time:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def time_() -> Time:
    return Time()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the books are: "memory" or a URL."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return "memory" if request.param == "memory" else f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def books(store: str, time_: Time) -> Iterator[Ledger]:
    ledger = MemoryLedger(time_) if store == "memory" else SqlLedger.open(store, clock=time_)
    yield ledger
    asyncio.run(ledger.close())


@pytest.fixture
def opened(store: str, time_: Time) -> Iterator[Callable[..., SqlLedger]]:
    """``opened(lease_ms=…)``: servers on one store; for what needs more than one of them."""
    if store == "memory":
        pytest.skip("the books in memory have one server")
    ledgers: list[SqlLedger] = []

    def open_(**settings: Any) -> SqlLedger:
        ledgers.append(SqlLedger.open(store, **({"clock": time_} | settings)))
        return ledgers[-1]

    yield open_
    for ledger in ledgers:
        asyncio.run(ledger.close())


def wish(batch_id: str = "b", count: int = 5, *, digest: bytes = b"d", run_id: str = "run") -> HoldRequest:
    return HoldRequest(account="a", batch_id=batch_id, run_id=run_id, digest=digest, picture_count=count)


def standing(account: Account) -> tuple[int, int, int, int]:
    return account.granted, account.posted, account.held, account.balance


async def state(books: Ledger, name: str = "a") -> tuple[int, int, int, int]:
    """granted, posted, held, balance, once everything told so far can be read."""
    await settled(books)
    return standing(await books.account(name))


async def settled(books: Ledger) -> None:
    await books.void("nobody", "nothing")  # told after the commit of all that came before


async def refused(books: Ledger, request: HoldRequest) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await books.hold(request)
    return caught.value


async def replay(books: Ledger, request: HoldRequest | None = None) -> Posted:
    """What a repeat of a posted batch gets."""
    posted = await books.hold(request or wish())
    assert isinstance(posted, Posted)
    return posted


# --- accounts ---


async def test_an_account_begins_with_its_grant(books: Ledger) -> None:
    made = await books.create_account("a", 10)
    assert standing(made) == await state(books) == (10, 0, 0, 10)
    assert standing(await books.grant("a", 7)) == await state(books) == (17, 0, 0, 17)


async def test_an_account_is_made_once(books: Ledger) -> None:
    await books.create_account("a", 10)
    with pytest.raises(LedgerError, match="expected a new account name, got 'a', which exists"):
        await books.create_account("a", 99)
    assert await state(books) == (10, 0, 0, 10)


@pytest.mark.parametrize("name", ["", "A", "a b", "ä", "a" * 64, "a\n", "../a"])
async def test_other_names_are_no_accounts(books: Ledger, name: str) -> None:
    with pytest.raises(LedgerError, match="expected an account name of 1 to 63"):
        await books.create_account(name, 10)
    assert await books.accounts() == []


@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1, 2**70])
async def test_a_grant_that_is_no_count_changes_nothing(books: Ledger, count: int) -> None:
    with pytest.raises(LedgerError, match=r"expected a grant of 1 to \d+ pictures"):
        await books.create_account("b", count, new_key("b")[1])
    with pytest.raises(LedgerError, match="'b'"):
        await books.account("b")
    await books.create_account("a", 10)
    with pytest.raises(LedgerError, match=f"got {count}"):
        await books.grant("a", count)
    assert await state(books) == (10, 0, 0, 10)


async def test_grants_never_sum_beyond_what_every_reader_counts_exactly(books: Ledger) -> None:
    await books.create_account("a", MAX_COUNT)
    with pytest.raises(LedgerError, match="expected a grant"):
        await books.grant("a", 1)
    assert await state(books) == (MAX_COUNT, 0, 0, MAX_COUNT)


async def test_an_unknown_account_has_no_books(books: Ledger) -> None:
    for call in (
        books.account("nobody"),
        books.grant("nobody", 1),
        books.hold(HoldRequest(account="nobody", batch_id="b", run_id="r", digest=b"d", picture_count=1)),
        books.add_key(new_key("nobody")[1]),
        books.post("nobody", "b", b""),
    ):
        with pytest.raises(LedgerError, match="'nobody'"):
            await call
    assert await books.statement("nobody") == []


async def test_accounts_are_listed_by_name(books: Ledger) -> None:
    for name in ("c", "a", "b"):
        await books.create_account(name, 1)
    assert [account.name for account in await books.accounts()] == ["a", "b", "c"]


async def test_accounts_come_in_pages_that_join_to_the_whole(books: Ledger) -> None:
    for name in ("a", "a-b", "ab", "b1", "b", "c"):
        await books.create_account(name, 1)
    joined: list[str] = []
    while page := await books.accounts(after_name=joined[-1] if joined else "", limit=2):
        assert len(page) <= 2
        joined += [account.name for account in page]
    assert joined == [account.name for account in await books.accounts()]
    assert sorted(joined) == ["a", "a-b", "ab", "b", "b1", "c"]
    assert await books.accounts(after_name="zzz") == []


async def test_an_account_whose_key_cannot_be_made_is_not_made(books: Ledger) -> None:
    _, taken = new_key("a")
    await books.create_account("a", 5, taken)
    clash = dataclasses.replace(new_key("b")[1], key_id=taken.key_id)
    with pytest.raises(LedgerError, match="got the id of another"):
        await books.create_account("b", 5, clash)
    with pytest.raises(LedgerError, match="'b'"):
        await books.account("b")
    found = await books.credential(taken.key_id)
    assert found is not None and found.key == taken
    assert standing(await books.create_account("b", 7)) == await state(books, "b") == (7, 0, 0, 7)


# --- grants with an id of their own ---


async def test_a_grant_with_an_id_is_made_once_however_often_it_is_sent(books: Ledger) -> None:
    await books.create_account("a", 10)
    for _ in range(3):
        assert standing(await books.grant("a", 7, grant_id="g-1")) == (17, 0, 0, 17)
    assert (await books.grant("a", 7, grant_id="g-2")).granted == 24
    assert (await books.grant("a", 7)).granted == 31  # without an id each is a grant of its own
    assert (await books.grant("a", 7)).granted == 38
    assert (await books.grant("a", 7, grant_id="g-1")).granted == 38  # the books as they are now
    assert await state(books) == (38, 0, 0, 38)
    entries = await books.statement("a")
    assert [entry.batch_id for entry in entries] == ["", "g-1", "g-2", "", ""]
    assert chain(entries) == [entry.head for entry in entries]


async def test_the_id_of_a_grant_stands_for_one_count(books: Ledger) -> None:
    await books.create_account("a", 10)
    await books.grant("a", 7, grant_id="g")
    for count in (8, MAX_COUNT, 0):
        with pytest.raises(Refusal) as caught:
            await books.grant("a", count, grant_id="g")
        assert caught.value == Refusal.of(Reason.GRANT_ID_REUSED, grant_id="g", field="picture_count")
    assert await state(books) == (17, 0, 0, 17)


async def test_a_refused_grant_does_not_pin_its_id(books: Ledger) -> None:
    await books.create_account("a", 10)
    with pytest.raises(LedgerError, match="expected a grant"):
        await books.grant("a", 0, grant_id="g")
    assert (await books.grant("a", 7, grant_id="g")).granted == 17


async def test_ids_of_grants_and_batches_and_of_two_accounts_do_not_meet(books: Ledger) -> None:
    for name in ("a", "b"):
        await books.create_account(name, 10)
        assert (await books.grant(name, 7, grant_id="same")).granted == 17
    assert await books.hold(wish("same")) == Held()
    await books.post("a", "same", b"answer")
    assert (await books.grant("a", 7, grant_id="same")).granted == 17
    assert (await replay(books, wish("same"))).answer == b"answer"


async def test_a_burst_of_one_grant_is_granted_once(books: Ledger) -> None:
    await books.create_account("a", 10)
    told = await asyncio.gather(*(books.grant("a", 7, grant_id="g") for _ in range(20)))
    assert {account.granted for account in told} == {17}
    assert len(await books.statement("a")) == 2


@pytest.mark.parametrize("grant_id", ["a b", "a|b", "x" * 65, "ä", "a\x00"])
async def test_what_is_no_id_of_a_grant_is_refused_by_the_name_of_its_field(books: Ledger, grant_id: str) -> None:
    await books.create_account("a", 10)
    for call in (books.grant("a", 7, grant_id=grant_id), books.create_account("b", 7, grant_id=grant_id)):
        with pytest.raises(Refusal) as caught:
            await call
        assert (caught.value.reason, caught.value.variables["field"]) == (Reason.INVALID_REQUEST, "grant_id")
    assert await state(books) == (10, 0, 0, 10)
    assert [account.name for account in await books.accounts()] == ["a"]


async def test_an_account_made_with_an_id_is_found_again_as_it_is_now(books: Ledger) -> None:
    _, key = new_key("a")
    made = await books.create_account("a", 10, key, grant_id="g")
    assert await books.create_account("a", 10, key, grant_id="g") == made
    await books.grant("a", 5)
    await books.revoke_key(key.key_id)
    assert standing(await books.create_account("a", 10, key, grant_id="g")) == await state(books) == (15, 0, 0, 15)
    assert [stored.revoked for stored in await books.keys("a")] == [True]
    assert len(await books.statement("a")) == 2


async def test_the_id_of_an_accounts_making_stands_for_one_count_and_one_key(books: Ledger) -> None:
    _, key = new_key("a")
    _, other = new_key("a")
    await books.create_account("a", 10, key, grant_id="g")
    for field, again in (
        ("picture_count", books.create_account("a", 11, key, grant_id="g")),
        ("key", books.create_account("a", 10, other, grant_id="g")),
        ("key", books.create_account("a", 10, grant_id="g")),
        ("key", books.grant("a", 10, grant_id="g")),
    ):
        with pytest.raises(Refusal) as caught:
            await again
        assert caught.value == Refusal.of(Reason.GRANT_ID_REUSED, grant_id="g", field=field)
    assert await state(books) == (10, 0, 0, 10)
    assert await books.keys("a") == [key]


async def test_an_account_that_something_else_made_is_not_found_by_an_id(books: Ledger) -> None:
    await books.create_account("a", 10)
    await books.grant("a", 10, grant_id="later")
    for grant_id in ("", "new", "later"):
        with pytest.raises(LedgerError, match="expected a new account name, got 'a', which exists"):
            await books.create_account("a", 10, grant_id=grant_id)
    with pytest.raises(Refusal) as caught:  # an id is the grant's: there must be one
        await books.create_account("b", None, grant_id="g")
    assert (caught.value.reason, caught.value.variables["field"]) == (Reason.INVALID_REQUEST, "grant_id")
    assert await state(books) == (20, 0, 0, 20)


# --- the money path ---


async def test_a_batch_is_held_and_then_posted(books: Ledger) -> None:
    await books.create_account("a", 10)
    assert await books.hold(wish()) == Held()
    assert await state(books) == (10, 0, 5, 5)
    posted = await books.post("a", "b", b"answer")
    assert standing(posted.account) == await state(books) == (10, 5, 0, 5)
    assert posted.answer == b"answer"


async def test_repeat_of_posted_id_is_free_and_byte_identical(books: Ledger) -> None:
    await books.create_account("a", 5)
    await books.hold(wish())
    answer = bytes(range(256))
    await books.post("a", "b", answer)
    entries = len(await books.statement("a"))
    for _ in range(3):  # though the budget is used up
        assert (await replay(books)).answer == answer
    assert await state(books) == (5, 5, 0, 0)
    assert len(await books.statement("a")) == entries


async def test_whether_a_batch_was_answered_can_be_asked_without_holding_it(books: Ledger) -> None:
    await books.create_account("a", 10)
    assert await books.replay(wish()) is None
    await books.hold(wish())
    await settled(books)
    with pytest.raises(Refusal) as under_way:
        await books.replay(wish())
    assert under_way.value == await refused(books, wish())
    assert under_way.value.reason is Reason.BATCH_IN_FLIGHT  # and may yet be charged
    posted = await books.post("a", "b", b"answer")
    entries = await books.statement("a")
    assert await books.replay(wish()) == await books.replay(wish(count=99)) == posted == await replay(books)
    for other in (wish(digest=b"e"), wish(run_id="other")):
        with pytest.raises(Refusal) as caught:
            await books.replay(other)
        assert caught.value == await refused(books, other)
    with pytest.raises(LedgerError, match="'nobody'"):
        await books.replay(dataclasses.replace(wish(), account="nobody"))
    await books.hold(wish("voided"))
    await books.void("a", "voided")
    assert await books.replay(wish("voided")) is None
    assert (await books.statement("a"))[:3] == entries and await state(books) == (10, 5, 0, 5)


async def test_an_empty_answer_is_kept_and_not_taken_for_a_pruned_one(books: Ledger) -> None:
    await books.create_account("a", 5)
    await books.hold(wish())
    await books.post("a", "b", b"")
    assert (await replay(books)).answer == b""


async def test_repeat_while_held_is_told_to_wait(books: Ledger) -> None:
    await books.create_account("a", 10)
    await books.hold(wish())
    refusal = await refused(books, wish())
    assert refusal == Refusal.of(Reason.BATCH_IN_FLIGHT, batch_id="b")
    assert await state(books) == (10, 0, 5, 5)


async def bring_to(books: Ledger, where: str) -> None:
    await books.create_account("a", 10)
    await books.hold(wish())
    if where == "posted":
        await books.post("a", "b", b"answer")
    if where == "voided":
        await books.void("a", "b")


@pytest.mark.parametrize("where", ["held", "posted", "voided"])
@pytest.mark.parametrize(
    ("field", "request_"), [("pictures", wish(digest=b"other")), ("run_id", wish(run_id="other"))]
)
async def test_an_id_stands_for_one_batch_in_every_state(
    books: Ledger, where: str, field: str, request_: HoldRequest
) -> None:
    await bring_to(books, where)
    before = await state(books)
    assert await refused(books, request_) == Refusal.of(Reason.BATCH_ID_REUSED, batch_id="b", field=field)
    assert await state(books) == before


async def test_ids_of_two_accounts_do_not_meet(books: Ledger) -> None:
    for name, digest in (("a", b"1"), ("b", b"2")):
        await books.create_account(name, 10)
        request = HoldRequest(account=name, batch_id="same", run_id="run", digest=digest, picture_count=4)
        assert await books.hold(request) == Held()
        await books.post(name, "same", digest)
    assert await state(books, "a") == await state(books, "b") == (10, 4, 0, 6)


async def test_a_voided_batch_pins_nothing_and_may_be_held_again(books: Ledger) -> None:
    await bring_to(books, "voided")
    assert await state(books) == (10, 0, 0, 10)
    assert await books.hold(wish()) == Held()
    await books.post("a", "b", b"answer")
    assert await state(books) == (10, 5, 0, 5)


async def test_a_refused_batch_pins_nothing(books: Ledger) -> None:
    await books.create_account("a", 4)
    assert (await refused(books, wish())).reason is Reason.BUDGET_EXHAUSTED
    assert await books.hold(wish(count=4, digest=b"smaller", run_id="other")) == Held()


@pytest.mark.parametrize("where", ["none", "voided", "posted"])
async def test_a_post_without_its_hold_charges_nothing(books: Ledger, where: str) -> None:
    if where == "none":
        await books.create_account("a", 10)
    else:
        await bring_to(books, where)
    before = await state(books)
    with pytest.raises(Refusal) as caught:
        await books.post("a", "b", b"second answer")
    assert caught.value == Refusal.of(Reason.HOLD_LOST, batch_id="b")
    assert await state(books) == before
    if where == "posted":
        assert (await replay(books)).answer == b"answer"


@pytest.mark.parametrize("where", ["none", "voided", "posted"])
async def test_void_of_what_is_not_held_does_nothing(books: Ledger, where: str) -> None:
    if where == "none":
        await books.create_account("a", 10)
    else:
        await bring_to(books, where)
    before, entries = await state(books), len(await books.statement("a"))
    await books.void("a", "b")
    assert await state(books) == before and len(await books.statement("a")) == entries


async def test_an_exhausted_budget_says_what_there_is(books: Ledger) -> None:
    await books.create_account("a", 10)
    await books.hold(wish("posted", 2))
    await books.post("a", "posted", b"")
    await books.hold(wish("held", 5))
    refusal = await refused(books, wish("more", 4))
    assert refusal == Refusal.of(Reason.BUDGET_EXHAUSTED, requested=4, available=3, held=5)
    assert await books.hold(wish("fits", 3)) == Held()
    assert (await refused(books, wish("one", 1))).variables == {"requested": "1", "available": "0", "held": "8"}


@pytest.mark.parametrize("count", [0, -3])
async def test_nobody_gains_pictures_by_holding_less_than_one(books: Ledger, count: int) -> None:
    await books.create_account("a", 10)
    await books.hold(wish("held", 5))
    with pytest.raises(LedgerError, match=f"expected a hold of at least 1 picture, got {count}"):
        await books.hold(wish("odd", count))
    assert await state(books) == (10, 0, 5, 5)


async def test_a_burst_never_overspends(books: Ledger) -> None:
    await books.create_account("a", 20)
    outcomes = await asyncio.gather(
        *(books.hold(wish(f"b{i}", 1, digest=bytes([i]))) for i in range(60)), return_exceptions=True
    )
    held = [i for i, outcome in enumerate(outcomes) if outcome == Held()]
    assert len(held) == 20
    assert all(isinstance(o, Refusal) and o.reason is Reason.BUDGET_EXHAUSTED for o in outcomes if o != Held())
    await asyncio.gather(*(books.post("a", f"b{i}", b"") for i in held))
    assert await state(books) == (20, 20, 0, 0)


async def test_a_burst_of_one_batch_is_charged_once(books: Ledger) -> None:
    await books.create_account("a", 1000)

    async def attempt() -> str:
        try:
            held = await books.hold(wish())
        except Refusal as refusal:
            return refusal.reason.name
        if isinstance(held, Posted):
            return "replayed"
        await asyncio.sleep(0)
        await books.post("a", "b", b"answer")
        return "charged"

    outcomes = await asyncio.gather(*(attempt() for _ in range(50)))
    assert outcomes.count("charged") == 1
    assert set(outcomes) <= {"charged", "replayed", "BATCH_IN_FLIGHT"}
    assert await state(books) == (1000, 5, 0, 995)


# --- the journal ---


async def test_the_statement_tells_every_step_in_both_books(books: Ledger) -> None:
    await books.create_account("a", 10)
    await books.hold(wish("x", 3, run_id="r1"))
    await books.void("a", "x")
    await books.hold(wish("y", 4, run_id="r2"))
    await books.post("a", "y", b"")
    rows = [
        (e.sequence, e.kind.value, e.batch_id, e.run_id, e.picture_count, e.debit_book, e.credit_book)
        for e in await books.statement("a")
    ]
    assert rows == [
        (1, "grant", "", "", 10, "issuer", "available"),
        (2, "hold", "x", "r1", 3, "available", "held"),
        (3, "void", "x", "r1", 3, "held", "available"),
        (4, "hold", "y", "r2", 4, "available", "held"),
        (5, "post", "y", "r2", 4, "held", "posted"),
    ]


async def test_the_statement_comes_in_pages_and_by_run(books: Ledger) -> None:
    await books.create_account("a", 100)
    for index in range(6):
        await books.hold(wish(f"b{index}", 1, run_id=f"r{index % 2}"))
        await books.post("a", f"b{index}", b"")
    await books.create_account("other", 5)
    whole = await books.statement("a")
    assert [entry.sequence for entry in whole] == list(range(1, 14))
    paged: list[Entry] = []
    while page := await books.statement("a", after_sequence=paged[-1].sequence if paged else 0, limit=4):
        assert len(page) <= 4
        paged += page
    assert paged == whole
    odd = await books.statement("a", run_id="r1")
    assert [entry.batch_id for entry in odd] == ["b1", "b1", "b3", "b3", "b5", "b5"]
    assert [e.batch_id for e in await books.statement("a", run_id="r1", after_sequence=odd[1].sequence, limit=1)] == [
        "b3"
    ]
    assert await books.statement("a", run_id="none") == []


async def test_a_run_counts_its_own_posts_alone(books: Ledger) -> None:
    await books.create_account("a", 100)
    for batch_id, count, run_id in (("x", 3, "r1"), ("y", 4, "r2"), ("z", 5, "r1")):
        await books.hold(wish(batch_id, count, run_id=run_id))
        if batch_id != "z":
            await books.post("a", batch_id, b"")
    assert [await books.run_posted("a", run_id) for run_id in ("r1", "r2", "none")] == [3, 4, 0]
    assert await books.run_posted("other", "r1") == 0


# --- a part of a hold ---


async def test_a_partial_post_charges_its_part_and_gives_the_rest_back_in_an_entry_of_its_own(books: Ledger) -> None:
    await books.create_account("a", 10)
    await books.hold(wish(count=8))
    posted = await books.post("a", "b", b"answer", 3)
    assert standing(posted.account) == await state(books) == (10, 3, 0, 7)
    entries = await books.statement("a")
    assert [(e.kind.value, e.picture_count, e.batch_id, e.run_id) for e in entries[2:]] == [
        ("post", 3, "b", "run"),
        ("void", 5, "b", "run"),
    ]
    assert posted.receipt.sequence == 3
    assert sum_of_books(entries) == {"issuer": -10, "available": 7, "held": 0, "posted": 3}
    again = await replay(books, wish(count=8))  # free, and in full
    assert (again.answer, again.receipt) == (b"answer", posted.receipt)
    assert await books.hold(wish("rest", 7)) == Held()


async def test_a_post_of_all_that_is_held_is_one_entry(books: Ledger) -> None:
    await books.create_account("a", 10)
    await books.hold(wish())
    await books.post("a", "b", b"answer", 5)
    assert [entry.kind.value for entry in await books.statement("a")] == ["grant", "hold", "post"]


@pytest.mark.parametrize("count", [0, -1, 6])
async def test_a_post_of_more_or_less_than_is_held_changes_nothing(books: Ledger, count: int) -> None:
    await bring_to(books, "held")
    before = await state(books)
    with pytest.raises(LedgerError, match=f"expected to post 1 to 5 pictures of batch b, got {count}"):
        await books.post("a", "b", b"answer", count)
    assert await state(books) == before
    await books.post("a", "b", b"answer")
    assert await state(books) == (10, 5, 0, 5)


# --- the chain, and receipts ---


def sum_of_books(entries: Sequence[Entry]) -> dict[str, int]:
    """What the journal alone says of the four books."""
    balances = dict.fromkeys(("issuer", "available", "held", "posted"), 0)
    for entry in entries:
        balances[entry.debit_book] -= entry.picture_count
        balances[entry.credit_book] += entry.picture_count
    assert sum(balances.values()) == 0
    return balances


def chain(entries: Sequence[Entry]) -> list[bytes]:
    """The heads as docs/ledger.md defines them, computed anew."""
    heads, head = [], bytes(32)
    for e in entries:
        fields = (e.account, e.sequence, e.create_time_ms, e.kind.value, e.batch_id, e.run_id, e.picture_count)
        line = "|".join(map(str, fields)) + "|" + e.digest.hex()
        head = hashlib.sha256(head + line.encode("utf-8")).digest()
        heads.append(head)
    return heads


async def test_every_entry_is_chained_to_the_one_before_it(books: Ledger, time_: Time) -> None:
    for name in ("other", "a"):
        await books.create_account(name, 100)
    for index in range(5):
        time_.ms += 17
        await books.hold(wish(f"b{index}", 5, digest=bytes([index])))
        if index == 2:
            await books.void("a", f"b{index}")
        elif index != 4:
            await books.post("a", f"b{index}", b"answer %d" % index, 3 if index == 1 else None)
    await books.grant("a", 7)
    await settled(books)
    entries, account = await books.statement("a"), await books.account("a")
    assert chain(entries) == [entry.head for entry in entries]
    assert (account.sequence, account.head) == (len(entries), entries[-1].head) == (12, entries[-1].head)
    assert [e.digest for e in entries if e.kind.value == "hold"] == [bytes([index]) for index in range(5)]
    assert [e.digest for e in entries if e.kind.value == "post"] == [
        hashlib.sha256(b"answer %d" % index).digest() for index in (0, 1, 3)
    ]
    assert {e.digest for e in entries if e.kind.value in ("grant", "void")} == {b""}


async def test_a_receipt_names_its_post_and_a_replay_brings_the_same_one(books: Ledger) -> None:
    await books.create_account("a", 100)
    receipts = {}
    for batch_id in ("x", "y"):
        await books.hold(wish(batch_id))
        receipts[batch_id] = (await books.post("a", batch_id, b"answer")).receipt
    await books.grant("a", 1)
    entries = await books.statement("a")
    for batch_id, receipt in receipts.items():
        entry = entries[receipt.sequence - 1]
        assert (entry.kind.value, entry.batch_id, entry.head) == ("post", batch_id, receipt.head)
        assert (receipt.account, receipt.batch_id) == ("a", batch_id)
        assert (await replay(books, wish(batch_id))).receipt == receipt


async def test_a_replay_tells_the_books_as_they_are_now(books: Ledger) -> None:
    await books.create_account("a", 10)
    await books.hold(wish())
    await books.post("a", "b", b"answer")
    await books.grant("a", 7)
    assert standing((await replay(books)).account) == (17, 5, 0, 12)


# --- time ---


async def test_entries_bear_the_time_of_their_step_whatever_the_clock_does(books: Ledger, time_: Time) -> None:
    await books.create_account("a", 10)
    for turn, ahead_ms in enumerate((3_600_000, -3_600_000, -3_600_000, 0)):  # forward, back, before its start
        time_.ms += ahead_ms
        await books.hold(wish(f"b{turn}", 1))
        await settled(books)
    entries = await books.statement("a")
    start = 1_000_000
    times = [start, start + 3_600_000, start, start - 3_600_000, start - 3_600_000]
    assert [entry.create_time_ms for entry in entries] == times
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5]
    assert chain(entries) == [entry.head for entry in entries]


# --- several servers ---


def die(ledger: SqlLedger) -> None:
    """Ends a server as kill -9 does: nothing is given back, its lease runs on."""
    ledger._retire = lambda connection: None  # type: ignore[method-assign]
    asyncio.run(ledger.close())


async def let_lapse(books: SqlLedger, dead: SqlLedger) -> None:
    """Ends the lease of a dead server, whatever the time is."""
    lapse = sa.text("UPDATE instances SET lease_until_ms = 0 WHERE instance_id = :dead")

    def apply(transaction: Any) -> None:
        assert transaction.connection.execute(lapse, {"dead": dead.instance_id}).rowcount == 1

    await books._write(apply)


async def test_the_death_of_one_server_expires_its_own_holds_alone(opened: Callable[..., SqlLedger]) -> None:
    living, dying = opened(clock=rules.now_ms), opened(clock=rules.now_ms)
    await living.create_account("a", 100)
    await living.hold(wish("alive", 3))
    await dying.hold(wish("posted", 4))
    receipt = (await dying.post("a", "posted", b"answer")).receipt
    await dying.hold(wish("dead", 5))
    await settled(dying)
    await asyncio.to_thread(die, dying)
    third = opened(clock=rules.now_ms)
    assert await state(third) == (100, 4, 8, 88)  # nobody knows yet
    assert (await refused(living, wish("dead", 5))).reason is Reason.BATCH_IN_FLIGHT
    await let_lapse(living, dying)
    await opened(clock=rules.now_ms).close()  # a starting server sweeps
    assert await state(third) == (100, 4, 3, 93)
    last = (await third.statement("a"))[-1]
    assert (last.kind.value, last.batch_id, last.picture_count) == ("expire", "dead", 5)
    assert (await replay(third, wish("posted", 4))).receipt == receipt
    await living.post("a", "alive", b"answer")
    assert await third.hold(wish("dead", 5)) == Held()
    await settled(third)  # a hold is told before it can be read
    entries = await third.statement("a")
    assert chain(entries) == [entry.head for entry in entries]


async def test_a_repeat_of_a_dead_servers_batch_expires_and_holds_it_at_once(
    opened: Callable[..., SqlLedger],
) -> None:
    living, dying = opened(clock=rules.now_ms), opened(clock=rules.now_ms)
    await living.create_account("a", 100)
    await dying.hold(wish())
    await settled(dying)
    await asyncio.to_thread(die, dying)
    await let_lapse(living, dying)
    assert await living.hold(wish()) == Held()
    assert (await living.post("a", "b", b"answer")).account.posted == 5
    kinds = [entry.kind.value for entry in await living.statement("a")]
    assert kinds == ["grant", "hold", "expire", "hold", "post"]


async def test_two_servers_take_many_accounts_in_opposite_orders_and_never_wait_in_a_ring(
    opened: Callable[..., SqlLedger],
) -> None:
    servers = opened(), opened()
    # Names that a collation orders otherwise than their bytes: both servers must lock them in one order all the same.
    names = [f"{letter}{dash}{n}" for letter in "ab" for dash in ("", "-", "--") for n in range(4)]
    for name in names:
        await servers[0].create_account(name, 100)

    async def spend(server: SqlLedger, order: list[str], who: int) -> None:
        for turn in range(4):
            batch_ids = {name: f"{who}-{turn}" for name in order}
            await asyncio.gather(
                *(server.hold(HoldRequest(account=n, batch_id=b, run_id="r", digest=b"d", picture_count=2))
                  for n, b in batch_ids.items())
            )  # fmt: skip
            await asyncio.gather(*(server.post(n, b, b"answer") for n, b in batch_ids.items()))

    await asyncio.gather(spend(servers[0], names, 0), spend(servers[1], names[::-1], 1))
    for name in names:
        assert standing(await servers[0].account(name)) == (100, 16, 0, 84)
        entries = await servers[1].statement(name)
        assert chain(entries) == [entry.head for entry in entries] and len(entries) == 17


async def test_two_servers_on_one_store_never_overspend_and_charge_each_batch_once(
    opened: Callable[..., SqlLedger],
) -> None:
    servers = opened(), opened()
    await servers[0].create_account("a", 30)
    outcomes: list[str] = []

    async def answer(ledger: SqlLedger, batch_id: str) -> None:
        try:
            if isinstance(await ledger.hold(wish(batch_id, 1)), Posted):
                outcomes.append("replayed")
                return
            await ledger.post("a", batch_id, b"")
            outcomes.append("charged")
        except Refusal as refusal:
            outcomes.append(refusal.reason.name)

    await asyncio.gather(*(answer(ledger, f"b{i}") for i in range(45) for ledger in servers))
    assert outcomes.count("charged") == 30
    assert set(outcomes) <= {"charged", "replayed", "BATCH_IN_FLIGHT", "BUDGET_EXHAUSTED"}
    assert await state(servers[1]) == (30, 30, 0, 0)
    posts = [e.batch_id for e in await servers[0].statement("a") if e.kind.value == "post"]
    assert len(posts) == len(set(posts)) == 30


async def test_closing_gives_back_what_this_server_holds(opened: Callable[..., SqlLedger]) -> None:
    first, second = opened(), opened()
    await first.create_account("a", 100)
    await first.hold(wish("mine"))
    await second.hold(wish("theirs"))
    await first.close()
    assert await state(second) == (100, 0, 5, 95)
    assert [entry.kind.value for entry in await second.statement("a")].count("void") == 1


async def test_two_servers_make_one_grant_and_one_account_of_an_id(opened: Callable[..., SqlLedger]) -> None:
    servers = opened(), opened()
    _, key = new_key("a")
    for _ in range(5):  # the first time as a race, then as repeats
        made = await asyncio.gather(*(server.create_account("a", 10, key, grant_id="first") for server in servers))
        assert [account.name for account in made] == ["a", "a"]
    for turn in range(5):
        await asyncio.gather(*(server.grant("a", 7, grant_id=f"g{turn}") for server in servers for _ in range(3)))
    assert await state(servers[0]) == (45, 0, 0, 45)
    assert [e.batch_id for e in await servers[1].statement("a")] == ["first", "g0", "g1", "g2", "g3", "g4"]


# --- answers that are no longer kept ---


async def charge(ledger: SqlLedger, *batch_ids: str, account: str = "a") -> dict[str, Posted]:
    posts = {}
    for batch_id in batch_ids:
        request = dataclasses.replace(wish(batch_id, digest=batch_id.encode()), account=account)
        assert await ledger.hold(request) == Held()
        posts[batch_id] = await ledger.post(account, batch_id, f"answer {batch_id}".encode())
    return posts


async def repeat(ledger: SqlLedger, batch_id: str) -> Posted:
    return await replay(ledger, wish(batch_id, digest=batch_id.encode()))


async def test_old_answers_are_pruned_and_the_journal_stays(
    opened: Callable[..., SqlLedger], store: str, time_: Time
) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    old = await charge(ledger, "x", "y")
    time_.ms += 1000
    await ledger.hold(wish("held"))
    await ledger.post("a", "held", b"some", 2)  # a partial post: two entries
    await charge(ledger, "young")
    entries, before = await ledger.statement("a"), await state(ledger)
    assert await ledger.prune_answers(time_.ms) == 2  # of before now
    assert await ledger.prune_answers(time_.ms) == 0
    for batch_id, posted in old.items():
        again = await repeat(ledger, batch_id)
        assert (again.answer, again.receipt) == (None, posted.receipt)
        assert (await refused(ledger, wish(batch_id, digest=b"z"))).reason is Reason.BATCH_ID_REUSED
    assert (await repeat(ledger, "young")).answer == b"answer young"
    assert (await ledger.statement("a"), await state(ledger)) == (entries, before)
    report = await asyncio.to_thread(verify, store)
    assert (report.findings, report.pruned_answers) == ([], 2)
    assert await ledger.prune_answers(time_.ms + 1) == 2
    report = await asyncio.to_thread(verify, store)
    assert (report.findings, report.pruned_answers) == ([], 4)
    assert await ledger.statement("a") == entries
    await charge(ledger, "next")
    assert (await repeat(ledger, "next")).answer == b"answer next"


async def test_a_post_made_again_after_its_answer_was_pruned_is_known_by_its_digest(
    opened: Callable[..., SqlLedger], time_: Time
) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    posted = (await charge(ledger, "x"))["x"]
    await ledger.prune_answers(time_.ms + 1)
    again = await ledger.post("a", "x", b"answer x")
    assert (again.receipt, again.account) == (posted.receipt, posted.account)
    with pytest.raises(Refusal) as caught:
        await ledger.post("a", "x", b"another answer")
    assert caught.value.reason is Reason.HOLD_LOST
    assert await state(ledger) == (100, 5, 0, 95)


async def test_an_answer_that_is_missing_without_a_mark_is_not_computed_again_and_the_auditor_says_so(
    opened: Callable[..., SqlLedger], store: str
) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    posted = (await charge(ledger, "x"))["x"]

    def lose(transaction: Any) -> None:
        transaction.connection.exec_driver_sql("DELETE FROM answers")

    await ledger._write(lose)
    assert await repeat(ledger, "x") == dataclasses.replace(posted, answer=None)
    findings = (await asyncio.to_thread(verify, store)).findings
    assert findings == ["account a: batch x was charged, and its answer is not kept"]


async def test_pruning_goes_in_small_steps_and_others_are_served_between_them(
    opened: Callable[..., SqlLedger], time_: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_sql, "PRUNE_ENTRIES", 4)
    monkeypatch.setattr(ledger_sql, "PRUNE_ACCOUNTS", 2)
    ledger = opened()
    for name in ("a", "b", "c", "d", "e"):
        await ledger.create_account(name, 1000)
        if name != "b":
            await charge(ledger, *(f"b{n}" for n in range(30)), account=name)
    pruning = asyncio.ensure_future(ledger.prune_answers(time_.ms + 1))
    served = 0
    while not pruning.done():
        await charge(ledger, f"meanwhile-{served}", account="b")
        served += 1
    assert served > 5
    assert 120 <= await pruning <= 120 + served
    assert (await repeat(ledger, "b29")).answer is None


async def test_two_servers_prune_at_once(opened: Callable[..., SqlLedger], store: str, time_: Time) -> None:
    servers = opened(), opened()
    for name in ("a", "b"):
        await servers[0].create_account(name, 1000)
        await charge(servers[0], *(f"b{n}" for n in range(120)), account=name)
    counts = await asyncio.gather(*(server.prune_answers(time_.ms + 1) for server in servers))
    assert sum(counts) == 240
    assert (await asyncio.to_thread(verify, store)).findings == []


async def test_a_clock_set_back_keeps_answers_longer_and_prunes_none_too_early(
    opened: Callable[..., SqlLedger], time_: Time
) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    time_.ms += 3_600_000
    await charge(ledger, "ahead")
    time_.ms -= 3_600_000
    await charge(ledger, "after")
    assert await ledger.prune_answers(time_.ms + 1000) == 0
    assert await ledger.prune_answers(time_.ms + 3_600_001) == 2


async def test_a_server_prunes_in_the_background_until_it_is_closed(opened: Callable[..., SqlLedger]) -> None:
    ledger, other = opened(clock=rules.now_ms), opened(clock=rules.now_ms)
    await ledger.create_account("a", 100)
    await charge(ledger, "x")
    assert (await repeat(other, "x")).answer == b"answer x"
    ledger.begin_pruning(300)

    async def gone() -> bool:
        return (await repeat(other, "x")).answer is None

    await until(gone)
    await ledger.close()
    await charge(other, "y")
    await asyncio.sleep(0.7)
    assert (await repeat(other, "y")).answer == b"answer y"


class Clocks:
    """The wall clock and the monotonic one of a server; they stand still until the test moves them."""

    def __init__(self) -> None:
        self.ahead_ms = 0  # what the wall clock says too much
        self.seconds = 0.0
        self.looks = 0  # of the task that prunes: the one that asks in the loop's own thread

    def now_ms(self) -> int:
        if threading.current_thread() is threading.main_thread():
            self.looks += 1
        return 1_000_000_000 + self.ahead_ms + round(self.seconds * 1000)

    def monotonic(self) -> float:
        return self.seconds

    async def looked_at(self) -> None:
        """Waits until the task has looked at them as they are now, and done what it does then."""
        looks = self.looks + 2  # the second comes after all that followed from the first
        await until(lambda: self.looks >= looks)


async def test_nothing_is_pruned_by_a_clock_that_has_just_jumped(
    opened: Callable[..., SqlLedger], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clocks, hour_ms = Clocks(), 3_600_000
    monkeypatch.setattr(ledger_sql, "PRUNE_SECONDS", 0.005)
    monkeypatch.setattr(ledger_sql, "time", SimpleNamespace(monotonic=clocks.monotonic))
    other = opened(clock=lambda: clocks.now_ms() - clocks.ahead_ms)
    await other.create_account("a", 100)
    await charge(other, "x")
    clocks.ahead_ms = 2 * hour_ms  # wrong already when the server starts
    ledger = opened(clock=clocks.now_ms)
    ledger.begin_pruning(hour_ms)
    pruned: list[int] = []
    prune = ledger.prune_answers

    async def noted(before_ms: int) -> int:
        pruned.append(before_ms)
        return await prune(before_ms)

    monkeypatch.setattr(ledger, "prune_answers", noted)

    def jumps() -> int:
        return sum("jumped" in record.getMessage() for record in caplog.records)

    async def still_kept() -> bool:
        await clocks.looked_at()
        return (await repeat(other, "x")).answer == b"answer x"

    assert await still_kept()
    clocks.seconds += ledger_sql.STEADY_SECONDS - 1
    assert await still_kept() and (pruned, jumps()) == ([], 0)  # it has not run steadily for long enough
    clocks.ahead_ms = 0  # put right
    assert await still_kept() and (pruned, jumps()) == ([], 1)
    clocks.seconds += ledger_sql.STEADY_SECONDS
    assert await still_kept() and pruned != []  # steady for long enough, and by the right clock the answer is young
    pruned.clear()
    clocks.ahead_ms = 2 * hour_ms
    assert await still_kept() and (pruned, jumps()) == ([], 2)
    clocks.seconds += ledger_sql.STEADY_SECONDS - 1
    assert await still_kept() and pruned == []
    clocks.seconds += 1
    assert not await still_kept()  # a clock that stays there is taken for right
    assert jumps() == 2


# --- keys ---


async def test_keys_are_kept_until_revoked_and_then_known_as_revoked(books: Ledger) -> None:
    await books.create_account("a", 1)
    _, first = new_key("a")
    _, second = new_key("a", Role.ADMIN)
    for key in (first, second):
        await books.add_key(key)
    assert await books.credential(first.key_id) == (first, Terms())
    assert {key.key_id: key.role for key in await books.keys("a")} == {
        first.key_id: Role.CUSTOMER,
        second.key_id: Role.ADMIN,
    }
    await books.revoke_key(first.key_id)
    await books.revoke_key(first.key_id)  # again is as well
    found = await books.credential(first.key_id)
    assert found is not None and found.key.revoked and found.key.secret_sha256 == first.secret_sha256
    assert await books.credential(second.key_id) == (second, Terms())
    assert await books.credential("0" * 16) is None
    assert await books.keys("other") == []
    with pytest.raises(LedgerError, match=f"expected a new key, got the id of another: {second.key_id}"):
        await books.add_key(dataclasses.replace(new_key("a")[1], key_id=second.key_id))
    found = await books.credential(second.key_id)
    assert found is not None and found.key == second
    with pytest.raises(
        LedgerError, match="expected the id of a key on these books, as 'key list' prints it, got 'none'"
    ):
        await books.revoke_key("none")


async def test_an_account_and_its_first_key_are_made_together_or_not_at_all(books: Ledger) -> None:
    _, first = new_key("a")
    await books.create_account("a", 5, first)
    assert await books.keys("a") == [first]
    _, late = new_key("a")
    with pytest.raises(LedgerError, match="exists"):
        await books.create_account("a", 5, late)
    assert await books.credential(late.key_id) is None


# --- terms ---

EVERY_TERM = Terms(
    answers="soft",
    top_k=3,
    decimals=2,
    pictures_per_second=0.5,
    max_streams=4,
    max_outstanding_pictures=2**31 - 1,
    suspended=True,
)


async def test_an_account_has_no_terms_of_its_own_until_they_are_set(books: Ledger) -> None:
    _, key = new_key("a")
    await books.create_account("a", 1, key)
    await books.create_account("b", 1)
    assert await books.terms("a") == Terms()
    assert await books.set_terms("a", EVERY_TERM) == await books.terms("a") == EVERY_TERM
    assert await books.credential(key.key_id) == (key, EVERY_TERM)
    assert await books.terms("b") == Terms()


async def test_terms_are_made_with_the_account_or_neither_is(books: Ledger) -> None:
    _, key = new_key("a")
    await books.create_account("a", 1, key, EVERY_TERM)
    assert await books.credential(key.key_id) == (key, EVERY_TERM)
    with pytest.raises(LedgerError, match="exists"):
        await books.create_account("a", 1, None, Terms(answers="hard"))
    assert await books.terms("a") == EVERY_TERM


async def test_a_change_of_terms_leaves_what_it_does_not_name(books: Ledger) -> None:
    await books.create_account("a", 1)
    await books.set_terms("a", Terms(answers="hard", top_k=3))
    assert await books.set_terms("a", Terms(top_k=5, max_streams=2), ["answers"]) == Terms(top_k=5, max_streams=2)
    assert await books.set_terms("a", Terms()) == Terms(top_k=5, max_streams=2)
    assert await books.set_terms("a", Terms(), FIELDS) == await books.terms("a") == Terms()


async def test_terms_of_nobody_or_of_no_meaning_are_refused_and_change_nothing(books: Ledger) -> None:
    await books.create_account("a", 1, None, EVERY_TERM)
    for name in ("nobody", ""):
        with pytest.raises((LedgerError, Refusal), match=f"expected .*, got '{name}'"):
            await books.terms(name)
        with pytest.raises((LedgerError, Refusal), match="expected the name of an account on these books"):
            await books.set_terms(name, Terms())
    with pytest.raises(LedgerError, match=r"unset: expected some of answers, top_k, .*, got 'head'"):
        await books.set_terms("a", Terms(top_k=1), ["head"])
    with pytest.raises(LedgerError, match="top_k: expected to be set or unset, got 'both'"):
        await books.set_terms("a", Terms(top_k=1), ["top_k"])
    assert await books.terms("a") == EVERY_TERM


async def test_terms_move_no_pictures_and_money_moves_no_terms(books: Ledger) -> None:
    await books.create_account("a", 100, None, EVERY_TERM)
    before = await books.account("a")
    await books.hold(wish())
    await asyncio.gather(books.set_terms("a", Terms(top_k=7)), books.post("a", "b", b"answer"))
    await books.grant("a", 5)
    assert await books.terms("a") == EVERY_TERM.changed(Terms(top_k=7))
    assert await state(books) == (105, 5, 0, 100)
    assert [entry.kind.value for entry in await books.statement("a")] == ["grant", "hold", "post", "grant"]
    assert before.head == (await books.statement("a"))[0].head


async def test_closing_twice_is_closing_once(books: Ledger) -> None:
    await books.close()
    await books.close()
