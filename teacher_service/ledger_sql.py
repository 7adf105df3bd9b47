"""The books in SQL: SQLite (embedded) or PostgreSQL (several servers on one ledger), through SQLAlchemy Core.

One thread writes. It takes whatever commands wait and applies them in one transaction (group commit), so a busy
account costs one fsync per group and not per batch; the rules themselves are ``ledger``'s. A hold is told to its
caller before the commit: one that a crash forgets has harmed nobody, and its post would be refused. A post, a grant
and everything else is told only after the commit; so is the kept answer of a repeat, whose post may stand in the
very same group.

What serialises: SQLite's write lock; in PostgreSQL the account's row, locked for the transaction. Holds, answers and
entries of an account are only touched under it. An account that somebody else keeps locked is left out of the groups
and comes after them, alone; where its row cannot be had then either, its commands fail and nobody else's.

Each running server is an *instance* with a lease, renewed by the writer. A hold whose instance's lease has lapsed is
expired, by whoever comes first: a starting server, the regular sweep, or a repeat of that very batch.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from protos.errors import Refusal
from teacher_service import ledger as rules
from teacher_service import ledger_tables as tables
from teacher_service.ledger import (
    NO_TERMS,
    Account,
    Credential,
    Entry,
    EntryKind,
    Held,
    Hold,
    HoldRequest,
    HoldState,
    Key,
    LedgerError,
    LedgerUnavailable,
    Posted,
    Receipt,
    Step,
)
from teacher_service.ledger_store import bring_schema_up_to_date, engine_at, is_lock_timeout, store_errors
from teacher_service.terms import Terms

T = TypeVar("T")
log = logging.getLogger(__name__)

LEASE_MS = 10_000
FRESH_LEASE_PARTS = 10  # another instance's lease is written again when a tenth of it has passed, not at every hold
MAX_GROUP_COMMANDS = 256
MAX_WAITING_COMMANDS = 8192
MAX_WAITING_READS = 8192  # of each reader
READERS_CLOSE_SECONDS = 1.0  # how long closing waits for a read under way
SWEEP_HOLDS = 1000  # at most so many holds are expired in one transaction
PRUNE_SECONDS = 60.0  # from one look for old answers to the next
STEADY_SECONDS = 600.0  # for so long the clock must have run steadily before anything is deleted by it
STEADY_TOLERANCE_MS = 60_000
PRUNE_ENTRIES = 100  # at most so many entries are passed over in one transaction
PRUNE_ACCOUNTS = 500  # at most so many accounts are looked at in one query
# How long a post that failed, or whose outcome is unknown, is made again: longer than anything of ours stays locked
# (``ledger_store.POSTGRES_SETTINGS``).
POST_SECONDS = 8.0
POST_PAUSE_SECONDS = 0.25
STUCK_SECONDS = 5.0  # for so long no account whose row could not be had is waited for again
RENEW_AGAIN_SECONDS = 1.0  # a lease that could not be renewed is tried again after this
Clock = Callable[[], int]


# --- the statements of every group: built once, for building costs more than running them ---


def _insert(table: sa.Table, postgres: bool) -> Any:
    return postgresql.insert(table) if postgres else sqlite.insert(table)


def _lock_accounts(postgres: bool, skip_locked: bool) -> sa.Select[Any]:
    name = tables.accounts.c.name
    # A database's own collation may order names otherwise than another's, or than Python does.
    order = sa.collate(name, "C") if postgres else name
    names: sa.BindParameter[Any] = sa.bindparam("names", expanding=True)
    return sa.select(tables.accounts).where(name.in_(names)).order_by(order).with_for_update(skip_locked=skip_locked)


def _upsert_hold(postgres: bool) -> Any:
    upsert = _insert(tables.holds, postgres)
    changed = ("run_id", "digest", "picture_count", "state", "instance_id")
    return upsert.on_conflict_do_update(
        index_elements=["account", "batch_id"], set_={name: upsert.excluded[name] for name in changed}
    )


_LOCK_ACCOUNTS = {
    (postgres, skip): _lock_accounts(postgres, skip) for postgres in (False, True) for skip in (False, True)
}
_SELECT_HOLDS = sa.select(tables.holds).where(
    tables.holds.c.account == sa.bindparam("of"),
    tables.holds.c.batch_id.in_(sa.bindparam("batch_ids", expanding=True)),
)
# Never SET name, not even to itself: the store would look up every row that refers to the account.
_NUMBERS = ("granted", "posted", "held", "sequence", "head")
_UPDATE_ACCOUNT = (
    sa.update(tables.accounts)
    .where(tables.accounts.c.name == sa.bindparam("at"))
    .values({number: sa.bindparam(number) for number in _NUMBERS})
)
_UPSERT_HOLD = {postgres: _upsert_hold(postgres) for postgres in (False, True)}
# The kinds as constants, so that the partial indexes serve.
_SELECT_GRANT, _SELECT_POST = (
    sa.select(tables.entries).where(
        tables.entries.c.account == sa.bindparam("of"),
        tables.entries.c.batch_id == sa.bindparam("id"),
        tables.entries.c.batch_id != sa.literal("", literal_execute=True),
        tables.entries.c.kind == sa.literal(kind.value, literal_execute=True),
    )
    for kind in (EntryKind.GRANT, EntryKind.POST)
)
_NEXT_TO_PRUNE = (
    sa.select(tables.accounts.c.name, tables.entries.c.create_time_ms)
    .outerjoin_from(
        tables.accounts,
        tables.entries,
        (tables.entries.c.account == tables.accounts.c.name)
        & (tables.entries.c.sequence == tables.accounts.c.pruned_sequence + 1),
    )
    .where(tables.accounts.c.name > sa.bindparam("after_name"))
    .order_by(tables.accounts.c.name)
)
_INSERT_ENTRY = sa.insert(tables.entries)
_INSERT_ANSWER = sa.insert(tables.answers)


@dataclass
class _Command:
    """One wish in the writer's queue. ``apply`` runs inside the group's transaction.

    ``account`` and ``batch_id``, where there are any, are read (and locked) with the whole group's, in one go; before
    them the lease of another instance, ``living``, is renewed.
    """

    apply: Callable[["_Transaction"], Any]
    outcome: "Future[Any]"
    account: str | None = None
    batch_id: str | None = None
    living: str = ""

    def tell(self, value: Any) -> None:
        """Tells the caller, unless it was told something already."""
        if not self.outcome.done():
            self.outcome.set_result(value)

    def fail(self, error: Exception) -> None:
        """The same of what went wrong."""
        if not self.outcome.done():
            self.outcome.set_exception(error)


def _accounts_of(group: Sequence[_Command]) -> set[str]:
    return {command.account for command in group if command.account is not None}


class _Transaction:
    """What one transaction has read and will write; reads in bulk at the start, writes in bulk at the end."""

    def __init__(self, connection: Connection, instance_id: str, clock: Clock, lease_ms: int) -> None:
        self.connection = connection
        self.instance_id = instance_id
        self.lease_ms = lease_ms
        self.now_ms = clock()
        self._postgres = connection.dialect.name == "postgresql"
        self._accounts: dict[str, Account] = {}
        self._holds: dict[tuple[str, str], Hold | None] = {}
        self._answers: dict[tuple[str, str], Posted] = {}
        self._changed_accounts: set[str] = set()
        self._changed_holds: set[tuple[str, str]] = set()
        self._new_entries: list[Entry] = []
        self._new_answers: list[dict[str, Any]] = []

    def read(self, group: Sequence[_Command], stuck: set[str]) -> set[str]:
        """Reads, and in PostgreSQL locks, what the group is about; in the order of names, so none waits in a ring.

        Of ``stuck``, for which nobody waits, it returns those that are left out: locked by others.
        """
        self.renew_leases({command.living for command in group if command.living})
        self.lock(_accounts_of(group) - stuck)
        left_out = self._existing(stuck - self.lock(stuck, skip_locked=True))
        by_account: dict[str, set[str]] = {}
        for command in group:
            if command.account is not None and command.batch_id is not None:
                self._holds[command.account, command.batch_id] = None
                by_account.setdefault(command.account, set()).add(command.batch_id)
        for account, batch_ids in by_account.items():
            for row in self.connection.execute(_SELECT_HOLDS, {"of": account, "batch_ids": list(batch_ids)}):
                self._holds[row.account, row.batch_id] = tables.hold_of(row)
        return left_out

    def _existing(self, names: Collection[str]) -> set[str]:
        account = tables.accounts.c
        query = sa.select(account.name).where(account.name.in_(sorted(names)))
        return set(self.connection.execute(query).scalars()) if names else set()

    def renew_leases(self, instance_ids: Collection[str]) -> None:
        """Gives other instances a new lease, where the old one is not fresh; before any account is locked."""
        if not instance_ids:
            return
        instance, now_ms = tables.instances.c, self.lease_clock_ms()
        fresh = now_ms + self.lease_ms - self.lease_ms // FRESH_LEASE_PARTS
        query = sa.select(instance.instance_id).where(
            instance.instance_id.in_(sorted(instance_ids)),
            instance.lease_until_ms.between(fresh, now_ms + self.lease_ms),
        )
        stale = sorted(set(instance_ids) - set(self.connection.execute(query).scalars()))
        if stale:
            upsert = self.insert(tables.instances)
            self.connection.execute(
                upsert.on_conflict_do_update(
                    index_elements=["instance_id"], set_={"lease_until_ms": upsert.excluded.lease_until_ms}
                ),
                [{"instance_id": name, "lease_until_ms": now_ms + self.lease_ms} for name in stale],
            )

    def lock(self, names: Collection[str], *, skip_locked: bool = False) -> set[str]:
        """Reads accounts, and in PostgreSQL locks them, always in the order of the names' bytes. Returns which."""
        if not names:
            return set()
        lock = _LOCK_ACCOUNTS[self._postgres, skip_locked]
        found = self.connection.execute(lock, {"names": sorted(names)}).all()
        self._accounts |= {row.name: tables.account_of(row) for row in found}
        return {row.name for row in found}

    def account(self, name: str) -> Account:
        if name not in self._accounts:
            query = sa.select(tables.accounts).where(tables.accounts.c.name == name).with_for_update()
            row = self.connection.execute(query).one_or_none()
            if row is None:
                raise LedgerError(f"expected the name of an account on these books, got {name!r}")
            self._accounts[name] = tables.account_of(row)
        return self._accounts[name]

    def hold(self, account: str, batch_id: str) -> Hold | None:
        return self._holds[account, batch_id]

    def posted(self, account: Account, batch_id: str) -> Posted:
        """The answer of a posted batch, or None, with its receipt; no receipt's head is ever made up."""
        key = (account.name, batch_id)
        if key not in self._answers:
            query = sa.select(tables.answers).where(
                tables.answers.c.account == account.name, tables.answers.c.batch_id == batch_id
            )
            kept = self.connection.execute(query).one_or_none()
            # Without its answer (``prune``) the receipt is read from the journal.
            row = kept or self.connection.execute(_SELECT_POST, {"of": account.name, "id": batch_id}).one()
            receipt = Receipt(account=account.name, batch_id=batch_id, sequence=row.sequence, head=bytes(row.head))
            answer = bytes(kept.answer) if kept is not None else None
            self._answers[key] = Posted(answer=answer, receipt=receipt, account=account)
        return dataclasses.replace(self._answers[key], account=account)  # the books as they are now

    def record(self, step: Step) -> Step:
        """Keeps what a rule made, to be written at the end."""
        self._accounts[step.account.name] = step.account
        self._changed_accounts.add(step.account.name)
        self._new_entries += step.entries
        if step.hold is not None:
            key = (step.hold.account, step.hold.batch_id)
            self._holds[key] = step.hold
            self._changed_holds.add(key)
        return step

    def keep_answer(self, posted: Posted) -> Posted:
        receipt = posted.receipt
        self._answers[receipt.account, receipt.batch_id] = posted
        self._new_answers.append(
            {
                "account": receipt.account,
                "batch_id": receipt.batch_id,
                "answer": posted.answer,
                "sequence": receipt.sequence,
                "head": receipt.head,
            }
        )
        return posted

    def add_account(self, account: Account, key: Key | None, terms: Terms) -> bool:
        """Makes an account, its first key and its terms, all or nothing. Returns whether the name was free."""
        values = tables.account_values(account) | {"terms": terms.to_json()}
        insert = self.insert(tables.accounts).values(values).on_conflict_do_nothing()
        with self.connection.begin_nested():  # a refused command changes nothing, and its group goes on
            # Not by rowcount, which psycopg's dialect does not tell of an INSERT; nor below.
            if self.connection.execute(insert.returning(tables.accounts.c.name)).first() is None:
                return False
            if key is not None:
                self.add_key(key)
        self._accounts[account.name] = account
        return True

    def add_key(self, key: Key) -> None:
        insert = self.insert(tables.keys).values(tables.key_values(key)).on_conflict_do_nothing()
        if self.connection.execute(insert.returning(tables.keys.c.key_id)).first() is None:
            query = sa.select(tables.keys).where(tables.keys.c.key_id == key.key_id)
            if tables.key_of(self.connection.execute(query).one()) != key:
                raise LedgerError(f"expected a new key, got the id of another: {key.key_id}")

    def post_entry(self, receipt: Receipt) -> Entry:
        """The post that a receipt is of."""
        for entry in self._new_entries:
            if (entry.account, entry.sequence) == (receipt.account, receipt.sequence):
                return entry
        entries = tables.entries.c
        query = sa.select(tables.entries).where(
            entries.account == receipt.account, entries.sequence == receipt.sequence
        )
        return tables.entry_of(self.connection.execute(query).one())

    def granted_as(self, account: str, grant_id: str) -> Entry | None:
        """The grant of an id; None where there is none, or no id."""
        if not grant_id:
            return None
        for entry in self._new_entries:
            if (entry.account, entry.kind, entry.batch_id) == (account, EntryKind.GRANT, grant_id):
                return entry
        row = self.connection.execute(_SELECT_GRANT, {"of": account, "id": grant_id}).one_or_none()
        return tables.entry_of(row) if row is not None else None

    def prune(self, account: str, before_ms: int) -> tuple[int, bool]:
        """Deletes the oldest answers of a locked account: how many, and whether there may be more to delete.

        It goes along the journal, whose entries lie in the order of the posts, and leaves off at the first young one.
        """
        entry, owner, answer = tables.entries.c, tables.accounts.c, tables.answers.c
        done = self.connection.execute(sa.select(owner.pruned_sequence).where(owner.name == account)).scalar_one()
        query = sa.select(entry.sequence, entry.create_time_ms, entry.kind, entry.batch_id)
        query = query.where(entry.account == account, entry.sequence > done)
        rows = self.connection.execute(query.order_by(entry.sequence).limit(PRUNE_ENTRIES)).all()
        old = list(itertools.takewhile(lambda row: row.create_time_ms < before_ms, rows))
        if not old:
            return 0, False
        posted = [row.batch_id for row in old if row.kind == EntryKind.POST.value]
        self.connection.execute(
            sa.delete(tables.answers).where(answer.account == account, answer.batch_id.in_(posted))
        )
        self.connection.execute(
            sa.update(tables.accounts).where(owner.name == account).values(pruned_sequence=old[-1].sequence)
        )
        return len(posted), len(old) == PRUNE_ENTRIES

    def is_dead(self, instance_id: str) -> bool:
        """Whether another instance's lease has lapsed (or was given up). Who asks is alive."""
        if instance_id == self.instance_id:
            return False
        query = sa.select(tables.instances.c.lease_until_ms).where(tables.instances.c.instance_id == instance_id)
        lease = self.connection.execute(query).scalar_one_or_none()
        return lease is None or lease < self.lease_clock_ms()

    def lease_clock_ms(self) -> int:
        """The clock that leases are measured with: PostgreSQL's own, so that servers need not agree on the time."""
        if not self._postgres:
            return self.now_ms
        return int(
            self.connection.execute(
                sa.text("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)")
            ).scalar_one()
        )

    def insert(self, table: sa.Table) -> Any:
        """An INSERT that can say ON CONFLICT: both stores spell it the same, SQLAlchemy keeps them apart."""
        return _insert(table, self._postgres)

    def flush(self) -> None:
        """Writes what was recorded; any order is atomic at the commit."""
        if self._changed_accounts:
            rows = [tables.account_values(self._accounts[name]) for name in sorted(self._changed_accounts)]
            self.connection.execute(
                _UPDATE_ACCOUNT, [{"at": row["name"]} | {number: row[number] for number in _NUMBERS} for row in rows]
            )
        if self._changed_holds:
            self.connection.execute(
                _UPSERT_HOLD[self._postgres],
                [tables.hold_values(hold) for key in self._changed_holds if (hold := self._holds[key])],
            )
        if self._new_entries:
            self.connection.execute(_INSERT_ENTRY, [tables.entry_values(entry) for entry in self._new_entries])
        if self._new_answers:
            self.connection.execute(_INSERT_ANSWER, self._new_answers)


class _Reader:
    """A thread that reads, one wish after the other; those beyond MAX_WAITING_READS are refused."""

    def __init__(self, engine: sa.Engine, name: str) -> None:
        self._engine = engine
        self._wishes: queue.Queue[tuple[Callable[[Connection], Any], Future[Any]] | None] = queue.Queue(
            MAX_WAITING_READS
        )
        self._thread = threading.Thread(target=self._read_forever, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def read(self, read: Callable[[Connection], T]) -> T:
        outcome: Future[T] = Future()
        try:
            self._wishes.put_nowait((read, outcome))
        except queue.Full:
            raise LedgerUnavailable(f"{self._wishes.maxsize} reads wait for the ledger already") from None
        return await asyncio.wrap_future(outcome)

    def close(self) -> None:
        """Refuses whoever waits; what is being read goes on. Nothing may be asked any more."""
        with contextlib.suppress(queue.Empty):
            while (wish := self._wishes.get_nowait()) is not None:
                if wish[1].set_running_or_notify_cancel():
                    wish[1].set_exception(LedgerUnavailable("the ledger is closed"))
        self._wishes.put(None)

    def join(self, seconds: float) -> None:
        """Waits for the read under way, no longer than this."""
        self._thread.join(seconds)

    def _read_forever(self) -> None:
        while (wish := self._wishes.get()) is not None:
            if wish[1].set_running_or_notify_cancel():  # the departed are skipped
                self._read(*wish)

    def _read(self, read: Callable[[Connection], T], outcome: "Future[T]") -> None:
        try:
            with (
                store_errors(self._engine.url),
                self._engine.connect().execution_options(read_only=True) as connection,
                connection.begin(),
            ):
                value = read(connection)
        except Exception as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(value)


def _read_account(connection: Connection, name: str) -> Account:
    row = connection.execute(sa.select(tables.accounts).where(tables.accounts.c.name == name)).one_or_none()
    if row is None:
        raise LedgerError(f"expected the name of an account on these books, got {name!r}")
    return tables.account_of(row)


class SqlLedger:
    """``Ledger`` in a SQL store. Open with ``SqlLedger.open``; close with ``await close()``."""

    def __init__(self, engine: sa.Engine, lease_ms: int, clock: Clock) -> None:
        self._engine = engine
        self._lease_ms = lease_ms
        self._clock = clock
        self.instance_id = uuid.uuid4().hex
        self._commands: queue.Queue[_Command | None] = queue.Queue(MAX_WAITING_COMMANDS)
        # What calls and health wait for, and beside it what may take long: customers' reports.
        self._quick_reader = _Reader(engine, "ledger-read-quick")
        self._reader = _Reader(engine, "ledger-read")
        self._writer = threading.Thread(target=self._write_forever, name="ledger-write", daemon=True)
        self._pruner: asyncio.Task[None] | None = None
        self._lease_written = True
        # Accounts that no group waits for, since somebody kept them locked -> when one was last waited for alone.
        self._stuck: dict[str, float] = {}
        self._wait_again = 0.0  # when one of them may be
        self._closed = False

    @classmethod
    def open(
        cls, url: str, *, create: bool = True, lease_ms: int = LEASE_MS, clock: Clock = rules.now_ms
    ) -> "SqlLedger":
        """Opens the books at ``sqlite:///FILE`` or ``postgresql://…`` and expires what dead servers left held.

        An older schema is brought up to date first. Raises LedgerError for another kind of URL, a missing file
        (unless ``create``), a store that is no ledger, one made by a newer program, or a PostgreSQL that may lose
        what it has committed.
        """
        engine = engine_at(url, create=create)
        opened = cls(engine, lease_ms, clock)
        try:
            with store_errors(engine.url), engine.begin() as connection:
                bring_schema_up_to_date(connection, url)
            with store_errors(engine.url), engine.begin() as connection:
                opened._renew(connection)
            opened._try("expiring what the dead left held", opened._sweep)
        except BaseException:
            engine.dispose()
            raise
        for thread in (opened._writer, opened._quick_reader, opened._reader):
            thread.start()
        return opened

    # --- the money path ---

    async def hold(self, request: HoldRequest, *, instance_id: str = "") -> Held | Posted:
        def apply(transaction: _Transaction) -> Held | Posted:
            account = transaction.account(request.account)
            known = transaction.hold(request.account, request.batch_id)
            if known is not None and rules.is_replay(known):
                rules.check_same_batch(known, request)
                return transaction.posted(account, request.batch_id)
            if known is not None and known.state is HoldState.HELD and transaction.is_dead(known.instance_id):
                step = transaction.record(rules.apply_release(account, known, HoldState.EXPIRED, transaction.now_ms))
                account, known = step.account, step.hold
            instance = instance_id or self.instance_id
            if instance_id and rules.is_same_hold(known, request, instance):
                return Held()
            transaction.record(rules.apply_hold(account, known, request, instance, transaction.now_ms))
            return Held()

        return await self._write(apply, request.account, request.batch_id, living=instance_id)

    async def replay(self, request: HoldRequest) -> Posted | None:
        def read(connection: Connection) -> Posted | None:
            account = _read_account(connection, request.account)
            wanted = {"of": request.account, "batch_ids": [request.batch_id]}
            row = connection.execute(_SELECT_HOLDS, wanted).one_or_none()
            known = tables.hold_of(row) if row is not None else None
            rules.check_settled(known, request)
            if not rules.is_replay(known):
                return None
            transaction = _Transaction(connection, self.instance_id, self._clock, self._lease_ms)
            return transaction.posted(account, request.batch_id)

        return await self._read(read, quick=True)

    async def post(
        self, account: str, batch_id: str, answer: bytes, picture_count: int | None = None, *, instance_id: str = ""
    ) -> Posted:
        instance = instance_id or self.instance_id

        def apply(transaction: _Transaction) -> Posted:
            owner, hold = transaction.account(account), transaction.hold(account, batch_id)
            if rules.is_replay(hold):
                kept = transaction.posted(owner, batch_id)
                if rules.is_same_post(hold, transaction.post_entry(kept.receipt), instance, answer, picture_count):
                    return kept
            step = transaction.record(
                rules.apply_post(
                    owner,
                    hold,
                    batch_id,
                    instance,
                    answer,
                    transaction.now_ms,
                    picture_count,
                )
            )
            return transaction.keep_answer(
                Posted(answer=answer, receipt=rules.receipt_of(step), account=step.account)
            )

        # PostgreSQL may have made a commit whose reply was lost; the same post again finds out, once it is back.
        seconds = 0.0 if self._engine.dialect.name == "sqlite" else POST_SECONDS
        give_up = time.monotonic() + seconds
        while True:
            try:
                return await self._write(apply, account, batch_id)
            except LedgerUnavailable:
                if time.monotonic() + POST_PAUSE_SECONDS >= give_up or self._closed:
                    raise
                await asyncio.sleep(POST_PAUSE_SECONDS)

    async def void(self, account: str, batch_id: str, *, instance_id: str = "") -> None:
        def apply(transaction: _Transaction) -> None:
            hold = transaction.hold(account, batch_id)
            if hold and hold.state is HoldState.HELD and hold.instance_id == (instance_id or self.instance_id):
                owner = transaction.account(account)
                transaction.record(rules.apply_release(owner, hold, HoldState.VOIDED, transaction.now_ms))

        await self._write(apply, account, batch_id)

    async def renew_lease(self, instance_id: str) -> int:
        return await self._write(lambda transaction: transaction.lease_ms, living=instance_id)

    async def end_lease(self, instance_id: str) -> None:
        holds = tables.holds.c
        query = sa.select(holds.account, holds.batch_id).where(
            holds.instance_id == instance_id, holds.state == sa.literal(HoldState.HELD.value, literal_execute=True)
        )
        await self._write(lambda transaction: None)  # what was told before is readable after it
        held = await self._read(lambda connection: connection.execute(query).all())
        # Together, so that the writer makes groups of them: who stops does not wait for a commit each.
        for start in range(0, len(held), SWEEP_HOLDS):
            some = held[start : start + SWEEP_HOLDS]
            await asyncio.gather(*(self.void(row.account, row.batch_id, instance_id=instance_id) for row in some))

    # --- accounts and keys ---

    async def create_account(
        self,
        name: str,
        granted: int | None,
        key: Key | None = None,
        terms: Terms = NO_TERMS,
        *,
        grant_id: str = "",
    ) -> Account:
        rules.check_account_name(name)
        rules.check_grant_id(grant_id, granted)

        def apply(transaction: _Transaction) -> Account:
            # All or nothing: a refused grant leaves no account behind, and no account is without its key.
            account = Account(name=name)
            step = (
                None
                if granted is None
                else rules.apply_grant(account, granted, transaction.now_ms, grant_id, first_key=key)
            )
            if not transaction.add_account(account, key, terms):
                rules.check_same_account(name, transaction.granted_as(name, grant_id), granted, key)
                return transaction.account(name)
            return account if step is None else transaction.record(step).account

        return await self._write(apply, name)

    async def grant(self, name: str, picture_count: int, *, grant_id: str = "") -> Account:
        rules.check_grant_id(grant_id, picture_count)

        def apply(transaction: _Transaction) -> Account:
            account = transaction.account(name)
            if (made := transaction.granted_as(name, grant_id)) is not None:
                rules.check_same_grant(made, picture_count)
                return account
            return transaction.record(rules.apply_grant(account, picture_count, transaction.now_ms, grant_id)).account

        return await self._write(apply, name)

    async def set_terms(self, name: str, said: Terms, unset: Collection[str] = ()) -> Terms:
        accounts = tables.accounts.c

        def apply(transaction: _Transaction) -> Terms:
            transaction.account(name)
            kept = sa.select(accounts.terms).where(accounts.name == name)
            before = tables.terms_of(name, transaction.connection.execute(kept).scalar_one())
            after = rules.apply_terms(before, said, unset)
            update = sa.update(tables.accounts).where(accounts.name == name).values(terms=after.to_json())
            transaction.connection.execute(update)
            return after

        return await self._write(apply, name)

    async def add_key(self, key: Key) -> None:
        def apply(transaction: _Transaction) -> None:
            transaction.account(key.account)
            transaction.add_key(key)

        await self._write(apply, key.account)

    async def revoke_key(self, key_id: str) -> None:
        def apply(transaction: _Transaction) -> None:
            update = sa.update(tables.keys).where(tables.keys.c.key_id == key_id).values(revoked=1)
            if transaction.connection.execute(update).rowcount == 0:
                raise rules.no_such_key(key_id)

        await self._write(apply)

    # --- old answers ---

    async def prune_answers(self, before_ms: int) -> int:
        """Deletes the answers posted before a time, in milliseconds since 1970; returns how many.

        The journal stays, and a repeat of such a batch is answered with None. Each account's are deleted in steps
        that the writer takes along with its other work, so that nobody waits for all of them.
        """
        deleted, after_name = 0, ""
        while rows := await self._next_to_prune(after_name):
            for name, oldest_ms in rows:
                more = oldest_ms is not None and oldest_ms < before_ms
                while more:
                    count, more = await self._prune_some(name, before_ms)
                    deleted += count
                after_name = name
        return deleted

    async def _next_to_prune(self, after_name: str) -> Sequence[Any]:
        query = _NEXT_TO_PRUNE.limit(PRUNE_ACCOUNTS)
        return await self._read(lambda connection: connection.execute(query, {"after_name": after_name}).all())

    async def _prune_some(self, name: str, before_ms: int) -> tuple[int, bool]:
        return await self._write(lambda transaction: transaction.prune(name, before_ms), name)

    def begin_pruning(self, keep_ms: int) -> None:
        """Prunes answers once they are older than this, in the background until the ledger is closed.

        Only while the wall clock can be trusted: it must have kept step with the monotonic one, give or take
        STEADY_TOLERANCE_MS, for STEADY_SECONDS (or ``keep_ms``, if that is shorter) without a break.
        """
        steady_seconds = min(STEADY_SECONDS, keep_ms / 1000)

        async def prune() -> None:
            began, began_ms = time.monotonic(), self._clock()
            while True:
                await asyncio.sleep(min(PRUNE_SECONDS, keep_ms / 1000))
                now, now_ms = time.monotonic(), self._clock()
                jump_ms = (now_ms - began_ms) - round((now - began) * 1000)
                if abs(jump_ms) > STEADY_TOLERANCE_MS:
                    log.warning("the clock jumped by %d ms: no answers are pruned for a while", jump_ms)
                    began, began_ms = now, now_ms
                if now - began >= steady_seconds:
                    with contextlib.suppress(LedgerUnavailable):  # the next look finds them
                        await self.prune_answers(now_ms - keep_ms)

        self._pruner = asyncio.create_task(prune(), name="ledger-prune")

    # --- reading ---

    async def check(self) -> None:
        query = sa.select(tables.accounts.c.name).limit(1)
        await self._read(lambda connection: connection.execute(query).first(), quick=True)
        # The one write that is always due, every third of a lease: a store that is full or read-only can be read.
        if not self._lease_written:
            raise LedgerUnavailable("the ledger's store could not be written when the lease was last renewed")

    async def account(self, name: str) -> Account:
        return await self._read(lambda connection: _read_account(connection, name), quick=True)

    async def accounts(self, *, after_name: str = "", limit: int = 1000) -> Sequence[Account]:
        name = tables.accounts.c.name  # compared and ordered as its index is, whatever the database's collation
        query = sa.select(tables.accounts).where(name > after_name).order_by(name).limit(limit)
        return await self._read(lambda connection: [tables.account_of(row) for row in connection.execute(query)])

    async def terms(self, name: str) -> Terms:
        query = sa.select(tables.accounts.c.terms).where(tables.accounts.c.name == name)

        def read(connection: Connection) -> Terms:
            text = connection.execute(query).scalar_one_or_none()
            if text is None:
                raise LedgerError(f"expected the name of an account on these books, got {name!r}")
            return tables.terms_of(name, text)

        return await self._read(read, quick=True)

    async def run_posted(self, account: str, run_id: str) -> int:
        entries = tables.entries.c
        query = sa.select(sa.func.coalesce(sa.func.sum(entries.picture_count), 0)).where(
            entries.account == account, entries.run_id == run_id, entries.kind == EntryKind.POST.value
        )
        return await self._read(lambda connection: int(connection.execute(query).scalar_one()))

    async def statement(
        self, account: str, *, run_id: str = "", after_sequence: int = 0, limit: int = 1000
    ) -> Sequence[Entry]:
        entries = tables.entries.c
        query = (
            sa.select(tables.entries)
            .where(entries.account == account, entries.sequence > after_sequence)
            .order_by(entries.sequence)
            .limit(limit)
        )
        if run_id:
            query = query.where(entries.run_id == run_id)
        return await self._read(lambda connection: [tables.entry_of(row) for row in connection.execute(query)])

    async def credential(self, key_id: str) -> Credential | None:
        query = sa.select(tables.keys, tables.accounts.c.terms).join(tables.accounts)
        query = query.where(tables.keys.c.key_id == key_id)

        def read(connection: Connection) -> Credential | None:
            row = connection.execute(query).one_or_none()
            return Credential(tables.key_of(row), tables.terms_of(row.account, row.terms)) if row else None

        return await self._read(read, quick=True)

    async def keys(self, account: str) -> Sequence[Key]:
        query = sa.select(tables.keys).where(tables.keys.c.account == account).order_by(tables.keys.c.key_id)
        return await self._read(lambda connection: [tables.key_of(row) for row in connection.execute(query)])

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._pruner is not None:
            self._pruner.cancel()
        await asyncio.to_thread(self._commands.put, None)
        await asyncio.to_thread(self._writer.join)
        # Not on the event loop, where all that a stopping server does would wait; and a long report changes nothing.
        for reader in (self._quick_reader, self._reader):
            reader.close()
        for reader in (self._quick_reader, self._reader):
            await asyncio.to_thread(reader.join, READERS_CLOSE_SECONDS)
        self._engine.dispose()

    # --- the two ways in: the writer thread, and the reader threads ---

    async def _write(
        self,
        apply: Callable[[_Transaction], T],
        account: str | None = None,
        batch_id: str | None = None,
        *,
        living: str = "",
    ) -> T:
        outcome: Future[T] = Future()
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        try:
            self._commands.put_nowait(_Command(apply, outcome, account, batch_id, living))
        except queue.Full:
            raise LedgerUnavailable(f"{MAX_WAITING_COMMANDS} commands wait for the ledger already") from None
        return await asyncio.wrap_future(outcome)

    async def _read(self, read: Callable[[Connection], T], *, quick: bool = False) -> T:
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        return await (self._quick_reader if quick else self._reader).read(read)

    def _write_forever(self) -> None:
        renew_seconds = self._lease_ms / 3000
        renew_at, renewed_ms = time.monotonic() + renew_seconds, self._clock()
        while True:
            group: list[_Command] = []
            stop = False
            with contextlib.suppress(queue.Empty):
                command = self._commands.get(timeout=max(0.0, renew_at - time.monotonic()))
                while command is not None:
                    if command.outcome.set_running_or_notify_cancel():  # the departed are skipped
                        group.append(command)
                    if len(group) == MAX_GROUP_COMMANDS:
                        break
                    command = self._commands.get_nowait()
                else:
                    stop = True
            if group:
                self._commit(group)
            if stop:
                self._give_back()
                return
            # Renewals keep their pace whatever the wall clock does. Where leases are measured with it (SQLite), its
            # jumps, either way, are followed at once.
            ahead_ms = self._clock() - renewed_ms
            if time.monotonic() >= renew_at or not 0 <= ahead_ms < self._lease_ms // 3:
                self._lease_written = self._try("renewing the lease", self._renew)
                if self._lease_written:
                    self._try("expiring what the dead left held", self._sweep)
                # Health waits for the next renewal, so one that failed is made again soon, however long the lease is.
                pause_seconds = renew_seconds if self._lease_written else min(renew_seconds, RENEW_AGAIN_SECONDS)
                renew_at, renewed_ms = time.monotonic() + pause_seconds, self._clock()

    def _try(self, what: str, step: Callable[[Connection], None]) -> bool:
        """One transaction of the server's own, and whether it was made.

        Whatever goes wrong is logged and the writer lives on, or every caller would wait for ever; posts are refused
        once another instance has seen our lease lapse.
        """
        try:
            with store_errors(self._engine.url), self._engine.begin() as connection:
                step(connection)
        except Exception as error:
            log.warning("the ledger failed at %s: %s", what, str(error) or repr(error))
            return False
        return True

    def _commit(self, group: list[_Command]) -> None:
        """Applies a group, and after it, seldom, one of the accounts that were left out of it, alone.

        However many are locked, the writer waits for them a small part of its time: it has a lease to renew.
        """
        left_out = self._apply(group, _accounts_of(group) & self._stuck.keys())
        if left_out and time.monotonic() >= self._wait_again:
            name = min(left_out, key=lambda each: (self._stuck[each], each))
            del self._stuck[name]
            self._wait_again = math.inf
            self._apply([command for command in group if command.account == name], set())
            self._wait_again = time.monotonic() + STUCK_SECONDS
            left_out.remove(name)
        for command in group:
            if command.account in left_out:
                locked = f"the account {command.account} is locked by another program; try again"
                command.fail(LedgerUnavailable(locked))

    def _apply(self, group: list[_Command], stuck: set[str]) -> set[str]:
        """Applies a group in one transaction: a refused command changes nothing, a failed store fails all.

        Nobody waits for ``stuck``; those that are left out are returned, and their callers were told nothing. What
        nobody expected of a command fails that command alone: the group is undone and applied one by one.
        """
        told: list[tuple[_Command, Any]] = []
        applying = False
        try:
            with store_errors(self._engine.url), self._engine.begin() as connection:
                applying = True
                transaction = _Transaction(connection, self.instance_id, self._clock, self._lease_ms)
                left_out = transaction.read(group, stuck)
                for name in stuck - left_out:
                    self._stuck.pop(name, None)
                for command in group:
                    if command.account in left_out:
                        continue
                    try:
                        value = command.apply(transaction)
                    except (Refusal, LedgerError) as error:
                        command.fail(error)
                        continue
                    if isinstance(value, Held):
                        command.tell(value)
                    else:
                        told.append((command, value))
                transaction.flush()
                applying = False  # a commit's outcome may be unknown: nothing is applied a second time after it
        except Exception as error:
            failure = error if isinstance(error, LedgerError) else LedgerUnavailable(repr(error))
            # Holds that were told are made again; who was refused has gone.
            again = [each for each in group if not each.outcome.done() or each.outcome.exception() is None]
            waited_for = _accounts_of(group) - stuck
            if applying and waited_for and is_lock_timeout(error.__cause__):
                # Where it may have been any of several, each has yet to be waited for alone.
                self._stuck |= dict.fromkeys(waited_for, time.monotonic() if len(waited_for) == 1 else 0.0)
                log.warning(
                    "somebody keeps an account locked, one of %d that were wanted: %s", len(waited_for), failure
                )
                self._commit(again)
                return set()
            # A store that is away, full or locked (OperationalError) would fail each of them again, slowly.
            if applying and len(group) > 1 and not isinstance(error.__cause__, sa.exc.OperationalError):
                log.warning("a group of %d commands is applied one by one: %s", len(group), failure)
                for command in again:
                    self._commit([command])
                return set()
            for command in group:
                command.fail(failure)
            return set()
        for command, value in told:
            command.tell(value)
        return left_out

    def _renew(self, connection: Connection) -> None:
        """A transaction of its own: nothing that a sweep meets may cost this server its lease."""
        transaction = _Transaction(connection, self.instance_id, self._clock, self._lease_ms)
        renew = transaction.insert(tables.instances).values(
            instance_id=self.instance_id, lease_until_ms=transaction.lease_clock_ms() + self._lease_ms
        )
        connection.execute(
            renew.on_conflict_do_update(
                index_elements=["instance_id"], set_={"lease_until_ms": renew.excluded.lease_until_ms}
            )
        )

    def _sweep(self, connection: Connection) -> None:
        """Forgets the dead and expires what they held, but for accounts that somebody has locked just now.

        Never this server itself, however long ago it last renewed: who sweeps is alive.
        """
        transaction = _Transaction(connection, self.instance_id, self._clock, self._lease_ms)
        now_ms = transaction.lease_clock_ms()
        # A lapsed lease and none at all mean the same, so the dead need not be remembered.
        # Whom another server is just renewing or forgetting is left to it: two sweeps never wait for each other.
        instance = tables.instances.c
        lapsed = sa.select(instance.instance_id).where(
            instance.lease_until_ms < now_ms, instance.instance_id != self.instance_id
        )
        connection.execute(
            sa.delete(tables.instances).where(instance.instance_id.in_(lapsed.with_for_update(skip_locked=True)))
        )
        living = sa.select(tables.instances.c.instance_id)
        holder = tables.holds.c.instance_id
        orphaned = holder.not_in(living) & (holder != self.instance_id)
        self._release(transaction, orphaned, HoldState.EXPIRED, skip_locked=True)

    def _give_back(self) -> None:
        """Everything that this server holds, in as many transactions as it takes; one that fails leaves the rest."""
        more = True

        def retire(connection: Connection) -> None:
            nonlocal more
            more = self._retire(connection)

        while more and self._try("giving back what is held", retire):
            pass

    def _retire(self, connection: Connection) -> bool:
        """A living server resolves its own holds; then its lease is given up. Returns whether there may be more."""
        transaction = _Transaction(connection, self.instance_id, self._clock, self._lease_ms)
        mine = tables.holds.c.instance_id == self.instance_id
        if self._release(transaction, mine, HoldState.VOIDED) == SWEEP_HOLDS:
            return True
        connection.execute(sa.delete(tables.instances).where(tables.instances.c.instance_id == self.instance_id))
        return False

    @staticmethod
    def _release(
        transaction: _Transaction, which: sa.ColumnElement[bool], state: HoldState, *, skip_locked: bool = False
    ) -> int:
        """Releases at most SWEEP_HOLDS holds; returns how many were found."""
        held = sa.literal(HoldState.HELD.value, literal_execute=True)  # a constant, so that the partial index serves
        stale = sa.select(tables.holds).where(tables.holds.c.state == held, which)
        # No ORDER BY here: with one, SQLite walks the primary key, and so every hold there ever was.
        found = transaction.connection.execute(stale.limit(SWEEP_HOLDS)).all()
        # The lock first, in the order that every group takes it.
        locked = transaction.lock({row.account for row in found}, skip_locked=skip_locked)
        # Read again under the lock: what another server has resolved meanwhile is no longer ours to release.
        keys = [(row.account, row.batch_id) for row in found if row.account in locked]
        where = sa.tuple_(tables.holds.c.account, tables.holds.c.batch_id).in_(keys)
        for row in transaction.connection.execute(stale.where(where)).all() if keys else ():
            hold = tables.hold_of(row)
            transaction.record(
                rules.apply_release(transaction.account(hold.account), hold, state, transaction.now_ms)
            )
        transaction.flush()
        return len(found)
