"""One contract for every store of the books."""

import asyncio
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import Reason, Refusal
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

STORES: dict[str, Callable[[Path], Ledger]] = {
    "memory": lambda folder: MemoryLedger(),
    "sqlite": lambda folder: SqlLedger.open(f"sqlite:///{folder}/ledger.db"),
}


@pytest.fixture(params=sorted(STORES))
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    ledger = STORES[request.param](tmp_path)
    yield ledger
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


# --- the money path ---


async def test_a_batch_is_held_and_then_posted(books: Ledger) -> None:
    await books.create_account("a", 10)
    assert await books.hold(wish()) == Held()
    assert await state(books) == (10, 0, 5, 5)
    assert standing(await books.post("a", "b", b"answer")) == await state(books) == (10, 5, 0, 5)


async def test_repeat_of_posted_id_is_free_and_byte_identical(books: Ledger) -> None:
    await books.create_account("a", 5)
    await books.hold(wish())
    answer = bytes(range(256))
    await books.post("a", "b", answer)
    entries = len(await books.statement("a"))
    for _ in range(3):  # though the budget is used up
        assert await books.hold(wish()) == Posted(answer)
    assert await state(books) == (5, 5, 0, 0)
    assert len(await books.statement("a")) == entries


async def test_an_empty_answer_is_kept_and_not_taken_for_a_pruned_one(books: Ledger) -> None:
    await books.create_account("a", 5)
    await books.hold(wish())
    await books.post("a", "b", b"")
    assert await books.hold(wish()) == Posted(b"")


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
        assert await books.hold(wish()) == Posted(b"answer")


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


# --- keys ---


async def test_keys_are_kept_until_revoked_and_then_known_as_revoked(books: Ledger) -> None:
    await books.create_account("a", 1)
    _, first = new_key("a")
    _, second = new_key("a", Role.ADMIN)
    for key in (first, second):
        await books.add_key(key)
    assert await books.key(first.key_id) == first
    assert {key.key_id: key.role for key in await books.keys("a")} == {
        first.key_id: Role.CUSTOMER,
        second.key_id: Role.ADMIN,
    }
    await books.revoke_key(first.key_id)
    await books.revoke_key(first.key_id)  # again is as well
    found = await books.key(first.key_id)
    assert found is not None and found.revoked and found.secret_sha256 == first.secret_sha256
    assert await books.key(second.key_id) == second
    assert await books.key("0" * 16) is None
    assert await books.keys("other") == []
    with pytest.raises(LedgerError, match="expected the id of a key on these books, got 'none'"):
        await books.revoke_key("none")


async def test_an_account_and_its_first_key_are_made_together_or_not_at_all(books: Ledger) -> None:
    _, first = new_key("a")
    await books.create_account("a", 5, first)
    assert await books.keys("a") == [first]
    _, late = new_key("a")
    with pytest.raises(LedgerError, match="exists"):
        await books.create_account("a", 5, late)
    assert await books.key(late.key_id) is None


async def test_closing_twice_is_closing_once(books: Ledger) -> None:
    await books.close()
    await books.close()


# --- any sequence of steps, against an independent auditor ---

IDS = ("x", "y", "z")
STEPS = st.one_of(
    st.tuples(st.just("grant"), st.integers(1, 20), st.just(b"")),
    st.tuples(st.sampled_from(["hold x", "hold y", "hold z"]), st.integers(1, 9), st.sampled_from([b"p", b"q"])),
    st.tuples(st.sampled_from([f"{verb} {i}" for verb in ("post", "void") for i in IDS]), st.just(0), st.just(b"")),
)


class Auditor:
    """What the books must say, in the plainest words."""

    def __init__(self, granted: int) -> None:
        self.granted = granted
        self.batches: dict[str, tuple[str, int, bytes]] = {}  # id -> state, pictures, digest

    def sum_of(self, state: str) -> int:
        return sum(count for where, count, _ in self.batches.values() if where == state)

    def expect(self, verb: str, batch_id: str, count: int, digest: bytes) -> str:
        where, known_count, known_digest = self.batches.get(batch_id, ("none", count, digest))
        if verb == "grant":
            self.granted += count
        if verb == "hold":
            if known_digest != digest:
                return "BATCH_ID_REUSED"
            if where == "posted":
                return "replay"
            if where == "held":
                return "BATCH_IN_FLIGHT"
            if count > self.granted - self.sum_of("posted") - self.sum_of("held"):
                return "BUDGET_EXHAUSTED"
            self.batches[batch_id] = ("held", count, digest)
        if verb == "post":
            if where != "held":
                return "HOLD_LOST"
            self.batches[batch_id] = ("posted", known_count, known_digest)
        if verb == "void" and where == "held":
            self.batches[batch_id] = ("voided", known_count, known_digest)
        return "done"


async def take(books: Ledger, verb: str, batch_id: str, count: int, digest: bytes) -> str:
    try:
        if verb == "grant":
            await books.grant("a", count)
        elif verb == "hold":
            if isinstance(await books.hold(wish(batch_id, count, digest=digest)), Posted):
                return "replay"
        elif verb == "post":
            await books.post("a", batch_id, batch_id.encode())
        else:
            await books.void("a", batch_id)
    except Refusal as refusal:
        return refusal.reason.name
    return "done"


async def audit(books: Ledger, steps: list[tuple[str, int, bytes]]) -> None:
    auditor = Auditor(10)
    await books.create_account("a", 10)
    for step, count, digest in steps:
        verb, _, batch_id = step.partition(" ")
        assert await take(books, verb, batch_id, count, digest) == auditor.expect(verb, batch_id, count, digest)
        await settled(books)
        account = await books.account("a")
        assert (account.granted, account.posted, account.held) == (
            auditor.granted,
            auditor.sum_of("posted"),
            auditor.sum_of("held"),
        )
        assert min(account.held, account.posted, account.balance) >= 0
    # The journal alone tells the same balances, and every book together sums to zero.
    balances: dict[str, int] = defaultdict(int)
    entries = await books.statement("a", limit=10_000)
    assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
    for entry in entries:
        balances[entry.debit_book] -= entry.picture_count
        balances[entry.credit_book] += entry.picture_count
    account = await books.account("a")
    assert dict(balances).keys() <= {"issuer", "available", "held", "posted"} and sum(balances.values()) == 0
    assert (balances["available"], balances["held"], balances["posted"]) == (
        account.balance,
        account.held,
        account.posted,
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_any_sequence_of_steps_agrees_with_the_auditor_in_memory(steps: list[tuple[str, int, bytes]]) -> None:
    asyncio.run(audit(MemoryLedger(), steps))


@settings(max_examples=25, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_any_sequence_of_steps_agrees_with_the_auditor_on_sqlite(steps: list[tuple[str, int, bytes]]) -> None:
    async def run(folder: str) -> None:
        books = SqlLedger.open(f"sqlite:///{folder}/ledger.db")
        try:
            await audit(books, steps)
        finally:
            await books.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(folder))
