"""Any sequence of steps, against a model that shares no code with the books; on every store.

The model knows accounts, batches, servers and leases in the plainest words. After every step the journal, replayed
here, must say what the balances say and what the model says.
"""

import asyncio
import hashlib
import itertools
import shutil
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from protos.errors import Refusal
from teacher_service.ledger import Account, HoldRequest, Ledger, LedgerError, Posted
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_sql import SqlLedger

HOUR_MS = 3_600_000
WRITERS_DEADLINE_SECONDS = 30.0
LEASE_MS = HOUR_MS  # every jump of the clock is at least a lease long, so that what follows is certain


@dataclass
class _Batch:
    digest: bytes
    run_id: str
    state: str = "none"
    count: int = 0
    charged: int = 0
    server: int = -1
    answer: bytes = b""
    receipt: Any = None


@dataclass
class Model:
    """What the books must say. Servers are numbers that are never used twice."""

    leases_follow_our_clock: bool
    granted: dict[str, int] = field(default_factory=dict)
    grants: dict[tuple[str, str], int] = field(default_factory=dict)  # those with an id: account and id -> count
    batches: dict[tuple[str, str], _Batch] = field(default_factory=dict)
    lease_until: dict[int, int] = field(default_factory=dict)
    renewed_at: dict[int, int] = field(default_factory=dict)
    now: int = 0

    def held(self, account: str) -> int:
        return sum(b.count for (name, _), b in self.batches.items() if name == account and b.state == "held")

    def posted(self, account: str) -> int:
        return sum(b.charged for (name, _), b in self.batches.items() if name == account)

    def balance(self, account: str) -> int:
        return self.granted[account] - self.held(account) - self.posted(account)

    def lease_clock(self) -> int:
        return self.now if self.leases_follow_our_clock else 0

    def dead(self, server: int) -> bool:
        return self.lease_until.get(server, -1) < self.lease_clock()

    def renew(self, server: int) -> None:
        """A server starts or renews its lease, and sweeps."""
        self.renewed_at[server] = self.now
        self.lease_until[server] = self.lease_clock() + LEASE_MS
        for batch in self.batches.values():
            if batch.state == "held" and self.dead(batch.server):
                batch.state = "expired"
        # The dead are forgotten: should the clock go back, they are still dead until they renew.
        for other in self.lease_until:
            if self.dead(other):
                self.lease_until[other] = -(10**9)

    def after(self, server: int) -> None:
        """What a server does once a command is done: its lease, if the clock has moved."""
        if self.renewed_at[server] != self.now:
            self.renew(server)

    def hold(self, server: int, account: str, batch_id: str, count: int, digest: bytes, run_id: str) -> str:
        batch = self.batches.setdefault((account, batch_id), _Batch(digest, run_id))
        if batch.state == "none":
            batch.digest, batch.run_id = digest, run_id
        if (batch.digest, batch.run_id) != (digest, run_id):
            return "BATCH_ID_REUSED"
        if batch.state == "posted":
            return "replay"
        if batch.state == "held" and batch.server != server and self.dead(batch.server):
            batch.state = "expired"
        if batch.state == "held":
            return "BATCH_IN_FLIGHT"
        if count > self.balance(account):
            return "BUDGET_EXHAUSTED"
        batch.state, batch.count, batch.server = "held", count, server
        return "held"

    def grant(self, account: str, count: int, grant_id: str) -> str:
        known = self.grants.get((account, grant_id))
        if known is None:
            self.granted[account] += count
            if grant_id:
                self.grants[account, grant_id] = count
        return "granted" if known in (None, count) else "GRANT_ID_REUSED"

    def post(self, server: int, account: str, batch_id: str, answer: bytes, part: int | None) -> str:
        batch = self.batches.get((account, batch_id))
        if batch is None or (batch.state, batch.server) != ("held", server):
            return "HOLD_LOST"
        if part is not None and not 1 <= part <= batch.count:
            return "refused"
        batch.state, batch.answer, batch.charged = "posted", answer, part or batch.count
        return "posted"

    def void(self, server: int, account: str, batch_id: str) -> None:
        batch = self.batches.get((account, batch_id))
        if batch is not None and (batch.state, batch.server) == ("held", server):
            batch.state = "voided"


ACCOUNTS = st.sampled_from(["a", "b"])
IDS = st.sampled_from(["x", "y", "z"])
SEATS = st.sampled_from([0, 1])
COUNTS = st.integers(1, 12)


class Machine(RuleBasedStateMachine):
    """Two servers on one store, two accounts, three batch ids and one clock."""

    url: ClassVar[str] = "memory"
    template: ClassVar[Path | None] = None
    examples: ClassVar[Any] = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.store = self.url
        if self.template is not None:
            shutil.copy(self.template, f"{self.folder.name}/ledger.db")
            self.store = f"sqlite:///{self.folder.name}/ledger.db"
        # One database for all examples of PostgreSQL: each has accounts of its own.
        self.example = next(self.examples)
        self.model = Model(leases_follow_our_clock=not self.store.startswith("postgresql"))
        self.ledgers: dict[int, Ledger] = {}
        self.seats: list[int] = []  # seat -> the server that sits there
        self.numbers = itertools.count()
        self.several = self.store != "memory"

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(call)

    def name(self, account: str) -> str:
        return f"{account}-{self.example}"

    def start(self) -> int:
        server = next(self.numbers)
        clock = lambda: self.model.now  # noqa: E731
        self.ledgers[server] = (
            SqlLedger.open(self.store, lease_ms=LEASE_MS, clock=clock) if self.several else MemoryLedger(clock)
        )
        self.model.renew(server)
        self.settle(server)
        return server

    def settle(self, server: int) -> None:
        """All that was told so far can be read, and the lease is renewed if it is due."""
        self.run(self.ledgers[server].void("nobody", "nothing"))

    def act(self, server: int, call: Coroutine[Any, Any, Any]) -> str:
        """What a step comes to, in one word."""
        try:
            told = self.run(call)
        except Refusal as refusal:
            return refusal.reason.name
        except LedgerError:
            return "refused"
        finally:
            self.settle(server)
        if isinstance(told, Account):
            return "granted"
        if not isinstance(told, Posted):
            return "held"
        self.told = told
        return "replay"

    def server(self, seat: int) -> int:
        return self.seats[seat if self.several else 0]

    @initialize()
    def open(self) -> None:
        self.seats = [self.start() for _ in range(2 if self.several else 1)]
        for account, budget in (("a", 20), ("b", 5)):
            self.run(self.ledgers[self.seats[0]].create_account(self.name(account), budget))
            self.model.granted[account] = budget

    @rule(seat=SEATS, account=ACCOUNTS, count=st.sampled_from([5, 12]), grant_id=st.sampled_from(["", "", "x", "y"]))
    def grant(self, seat: int, account: str, count: int, grant_id: str) -> None:
        server = self.server(seat)
        expected = self.model.grant(account, count, grant_id)
        assert self.act(server, self.ledgers[server].grant(self.name(account), count, grant_id=grant_id)) == expected
        self.model.after(server)

    @rule(
        seat=SEATS,
        account=ACCOUNTS,
        batch_id=IDS,
        count=COUNTS,
        digest=st.sampled_from([b"p", b"p", b"p", b"q"]),
        run_id=st.sampled_from(["r", "r", "r", "s"]),
    )
    def hold(self, seat: int, account: str, batch_id: str, count: int, digest: bytes, run_id: str) -> None:
        server = self.server(seat)
        expected = self.model.hold(server, account, batch_id, count, digest, run_id)
        request = HoldRequest(
            account=self.name(account), batch_id=batch_id, run_id=run_id, digest=digest, picture_count=count
        )
        assert self.act(server, self.ledgers[server].hold(request)) == expected
        if expected == "replay":
            batch = self.model.batches[account, batch_id]
            assert (self.told.answer, self.told.receipt) == (batch.answer, batch.receipt)
        self.model.after(server)

    @rule(seat=SEATS, account=ACCOUNTS, batch_id=IDS, part=st.one_of(st.none(), st.none(), st.integers(0, 12)))
    def post(self, seat: int, account: str, batch_id: str, part: int | None) -> None:
        server = self.server(seat)
        answer = b"answer %d" % next(self.numbers)
        expected = self.model.post(server, account, batch_id, answer, part)
        told = self.act(server, self.ledgers[server].post(self.name(account), batch_id, answer, part))
        assert told == ("replay" if expected == "posted" else expected)
        if expected == "posted":
            self.model.batches[account, batch_id].receipt = self.told.receipt
        self.model.after(server)

    @rule(seat=SEATS, account=ACCOUNTS, batch_id=IDS)
    def void(self, seat: int, account: str, batch_id: str) -> None:
        server = self.server(seat)
        self.run(self.ledgers[server].void(self.name(account), batch_id))
        self.settle(server)
        self.model.void(server, account, batch_id)
        self.model.after(server)

    @rule(hours=st.sampled_from([-2, -1, 1, 2]))
    def clock(self, hours: int) -> None:
        if self.several:
            self.let_writers_wait()
        self.model.now += hours * HOUR_MS

    def let_writers_wait(self) -> None:
        """A server looks at the clock, renews and sweeps right after it has answered: until then it stands still."""
        deadline = time.monotonic() + WRITERS_DEADLINE_SECONDS
        for ledger in self.ledgers.values():
            while not ledger._commands.not_empty._waiters:  # the writer is in get()
                assert time.monotonic() < deadline, "a writer did not come back to its queue"
                time.sleep(0.0005)

    @precondition(lambda self: self.several)
    @rule(seat=SEATS, lapses=st.booleans())
    def crash_and_reopen(self, seat: int, lapses: bool) -> None:
        """A server is killed; another takes its seat, after the lease of the dead or before."""
        dead = self.seats[seat]
        ledger: Any = self.ledgers.pop(dead)
        ledger._retire = lambda connection: None  # nothing is given back
        self.run(ledger.close())
        if lapses:
            engine = sa.create_engine(self.store.replace("postgresql://", "postgresql+psycopg://"))
            with engine.begin() as connection:
                connection.execute(
                    sa.text("UPDATE instances SET lease_until_ms = :past WHERE instance_id = :dead"),
                    {"past": -(10**9), "dead": ledger.instance_id},
                )
            engine.dispose()
            self.model.lease_until[dead] = -(10**9)
        self.seats[seat] = self.start()

    @rule(account=ACCOUNTS, count=st.integers(2, 25))
    def burst(self, account: str, count: int) -> None:
        """Many callers at once, over all servers: as many are held as there are pictures, and half of them posted."""
        for server in self.seats:
            self.settle(server)  # then the lease is renewed, if that is due …
            self.settle(server)  # … and by now it is
            self.model.after(server)
        server_of = {f"burst-{next(self.numbers)}": self.seats[n % len(self.seats)] for n in range(count)}

        async def hold_all() -> list[Any]:
            calls = (
                self.ledgers[server].hold(
                    HoldRequest(
                        account=self.name(account), batch_id=batch_id, run_id="r", digest=b"p", picture_count=1
                    )
                )
                for batch_id, server in server_of.items()
            )
            return await asyncio.gather(*calls, return_exceptions=True)

        outcomes = self.run(hold_all())
        got = [b for b, outcome in zip(server_of, outcomes, strict=True) if not isinstance(outcome, BaseException)]
        assert {o.reason.name for o in outcomes if isinstance(o, BaseException)} <= {"BUDGET_EXHAUSTED"}
        assert len(got) == min(count, self.model.balance(account))
        for batch_id in got:
            assert self.model.hold(server_of[batch_id], account, batch_id, 1, b"p", "r") == "held"

        async def post_half() -> None:
            calls = (self.ledgers[server_of[b]].post(self.name(account), b, b.encode()) for b in got[::2])
            for batch_id, posted in zip(got[::2], await asyncio.gather(*calls), strict=True):
                assert self.model.post(server_of[batch_id], account, batch_id, batch_id.encode(), None) == "posted"
                self.model.batches[account, batch_id].receipt = posted.receipt

        self.run(post_half())
        for server in self.seats:
            self.settle(server)

    @invariant()
    def the_books_agree_with_the_model_and_with_themselves(self) -> None:
        if not self.model.granted:
            return
        for account in self.model.granted:
            books = self.run(self.ledgers[self.seats[-1]].account(self.name(account)))
            entries = self.run(self.ledgers[self.seats[0]].statement(self.name(account), limit=10_000))
            balances = dict.fromkeys(("issuer", "available", "held", "posted"), 0)
            head, posts = bytes(32), []
            for number, e in enumerate(entries, start=1):
                assert e.sequence == number
                balances[e.debit_book] -= e.picture_count
                balances[e.credit_book] += e.picture_count
                assert min(balances["available"], balances["held"], balances["posted"]) >= 0
                fields = (self.name(account), number, e.create_time_ms, e.kind.value, e.batch_id, e.run_id)
                line = "|".join(map(str, (*fields, e.picture_count, e.digest.hex())))
                head = hashlib.sha256(head + line.encode()).digest()
                assert head == e.head
                posts += [(e.batch_id, number, head)] if e.kind.value == "post" else []
            assert sum(balances.values()) == 0
            assert (books.granted, books.held, books.posted) == (
                -balances["issuer"],
                balances["held"],
                balances["posted"],
            )
            assert (books.balance, books.sequence, books.head) == (balances["available"], len(entries), head)
            model = self.model
            assert (model.granted[account], model.held(account), model.posted(account)) == (
                books.granted,
                books.held,
                books.posted,
            )
            receipts = [b.receipt for (name, _), b in model.batches.items() if name == account and b.receipt]
            assert sorted(posts) == sorted((r.batch_id, r.sequence, r.head) for r in receipts)

    def teardown(self) -> None:
        for ledger in self.ledgers.values():
            self.run(ledger.close())
        self.runner.close()
        self.folder.cleanup()


def run_machine(examples: int, *, shrink: bool = True, **where: Any) -> None:
    class OnThisStore(Machine):
        pass

    for name, value in where.items():
        setattr(OnThisStore, name, value)
    run_state_machine_as_test(
        OnThisStore,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            phases=[phase for phase in Phase if shrink or phase is Phase.generate],
        ),
    )


def test_the_model_says_what_any_sequence_of_steps_comes_to_in_memory() -> None:
    run_machine(100)


def test_the_model_says_what_any_sequence_of_steps_comes_to_on_sqlite(tmp_path: Path) -> None:
    asyncio.run(SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db").close())
    run_machine(20, template=tmp_path / "ledger.db")


def test_the_model_says_what_any_sequence_of_steps_comes_to_on_postgresql(postgres_url: str) -> None:
    run_machine(12, url=postgres_url)


def test_the_machine_finds_books_that_expire_the_living(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The check of the check: with one rule broken, the machine must say so.
    from teacher_service import ledger_sql

    monkeypatch.setattr(ledger_sql._Transaction, "is_dead", lambda self, instance_id: True)
    asyncio.run(SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db").close())
    with pytest.raises(AssertionError):
        run_machine(200, shrink=False, template=tmp_path / "ledger.db")
