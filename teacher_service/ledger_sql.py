"""The books in SQL: SQLite, durable, one writer. The sole importer of SQLAlchemy.

One thread writes. It takes whatever commands wait and applies them in one transaction (group commit), so a busy
account costs one fsync per group and not per batch; the rules themselves are ``ledger``'s. A hold is told to its
caller before the commit: one that a crash forgets has harmed nobody, and its post would be refused. A post, a grant
and everything else is told only after the commit; so is the kept answer of a repeat, whose post may stand in the
very same group.

Each running server is an *instance* with a lease, renewed by the writer. A hold whose instance's lease has lapsed is
expired, by whoever comes first: a starting server, the regular sweep, or a repeat of that very batch.
"""

import asyncio
import contextlib
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import URL, Connection, Row, make_url

from protos.errors import Refusal
from teacher_service import ledger as rules
from teacher_service.ledger import (
    Account,
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
    Role,
)

T = TypeVar("T")

SCHEMA_VERSION = 1
LEASE_MS = 10_000
MAX_GROUP_COMMANDS = 256
MAX_WAITING_COMMANDS = 8192
SWEEP_HOLDS = 1000  # at most so many holds are expired in one transaction
BUSY_TIMEOUT_SECONDS = 5

metadata = sa.MetaData()
# sqlite_strict: SQLite then checks column types as PostgreSQL would.

schema_table = sa.Table(
    "schema_version", metadata, sa.Column("version", sa.Integer, nullable=False), sqlite_strict=True
)
accounts_table = sa.Table(
    "accounts",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("granted", sa.Integer, nullable=False),
    sa.Column("posted", sa.Integer, nullable=False),
    sa.Column("held", sa.Integer, nullable=False),
    sa.Column("sequence", sa.Integer, nullable=False),
    # The same promise as in ledger._next, kept by the store as well.
    sa.CheckConstraint("posted >= 0 AND held >= 0 AND posted + held <= granted", name="never_overspent"),
    sqlite_strict=True,
)
holds_table = sa.Table(
    "holds",
    metadata,
    sa.Column("account", sa.Text, sa.ForeignKey("accounts.name"), primary_key=True),
    sa.Column("batch_id", sa.Text, primary_key=True),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("picture_count", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("instance_id", sa.Text, nullable=False),
    sqlite_strict=True,
)
sa.Index("holds_under_way", holds_table.c.instance_id, sqlite_where=holds_table.c.state == HoldState.HELD.value)
answers_table = sa.Table(
    "answers",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("batch_id", sa.Text, primary_key=True),
    sa.Column("answer", sa.LargeBinary, nullable=False),
    sqlite_strict=True,
)
entries_table = sa.Table(
    "entries",
    metadata,
    sa.Column("account", sa.Text, sa.ForeignKey("accounts.name"), primary_key=True),
    sa.Column("sequence", sa.Integer, primary_key=True),
    sa.Column("create_time_ms", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("batch_id", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("picture_count", sa.Integer, nullable=False),
    sqlite_strict=True,
)
sa.Index("entries_by_run", entries_table.c.account, entries_table.c.run_id, entries_table.c.sequence)
keys_table = sa.Table(
    "keys",
    metadata,
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("account", sa.Text, sa.ForeignKey("accounts.name"), nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("secret_sha256", sa.LargeBinary, nullable=False),
    sa.Column("revoked", sa.Integer, nullable=False),
    sqlite_strict=True,
)
instances_table = sa.Table(
    "instances",
    metadata,
    sa.Column("instance_id", sa.Text, primary_key=True),
    sa.Column("lease_until_ms", sa.Integer, nullable=False),
    sqlite_strict=True,
)

_TRIGGERS = [
    f"CREATE TRIGGER IF NOT EXISTS entries_no_{verb.lower()} BEFORE {verb} ON entries "
    f"BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
    for verb in ("UPDATE", "DELETE")
]


@dataclass
class _Command:
    """One wish in the writer's queue. ``apply`` runs inside the group's transaction."""

    apply: Callable[["_Transaction"], Any]
    outcome: "Future[Any]"


class _Transaction:
    """What one transaction has read and will write; reads once, writes in bulk at the end."""

    def __init__(self, connection: Connection, instance_id: str) -> None:
        self.connection = connection
        self.instance_id = instance_id
        self.now_ms = rules.now_ms()
        self._accounts: dict[str, Account] = {}
        self._holds: dict[tuple[str, str], Hold | None] = {}
        self._changed_accounts: set[str] = set()
        self._changed_holds: set[tuple[str, str]] = set()
        self._entries: list[Entry] = []
        self._answers: dict[tuple[str, str], bytes] = {}

    def account(self, name: str) -> Account:
        if name not in self._accounts:
            row = self.connection.execute(
                sa.select(accounts_table).where(accounts_table.c.name == name)
            ).one_or_none()
            if row is None:
                raise LedgerError(f"expected the name of an account on these books, got {name!r}")
            self._accounts[name] = _account(row)
        return self._accounts[name]

    def hold(self, account: str, batch_id: str) -> Hold | None:
        key = (account, batch_id)
        if key not in self._holds:
            row = self.connection.execute(
                sa.select(holds_table).where(holds_table.c.account == account, holds_table.c.batch_id == batch_id)
            ).one_or_none()
            self._holds[key] = _hold(row) if row else None
        return self._holds[key]

    def answer(self, account: str, batch_id: str) -> bytes | None:
        if (account, batch_id) in self._answers:
            return self._answers[account, batch_id]
        found = self.connection.execute(
            sa.select(answers_table.c.answer).where(
                answers_table.c.account == account, answers_table.c.batch_id == batch_id
            )
        ).scalar_one_or_none()
        return bytes(found) if found is not None else None

    def record(self, account: Account, hold: Hold | None, entry: Entry) -> None:
        self._accounts[account.name] = account
        self._changed_accounts.add(account.name)
        self._entries.append(entry)
        if hold is not None:
            self._holds[hold.account, hold.batch_id] = hold
            self._changed_holds.add((hold.account, hold.batch_id))

    def keep_answer(self, account: str, batch_id: str, answer: bytes) -> None:
        self._answers[account, batch_id] = answer

    def add_account(self, account: Account) -> None:
        inserted = self.connection.execute(
            sqlite.insert(accounts_table).values(_account_values(account)).on_conflict_do_nothing()
        )
        if inserted.rowcount == 0:
            raise LedgerError(f"expected a new account name, got {account.name!r}, which exists")
        self._accounts[account.name] = account

    def add_key(self, key: Key) -> None:
        self.connection.execute(
            sa.insert(keys_table).values(
                key_id=key.key_id,
                account=key.account,
                role=key.role.value,
                secret_sha256=key.secret_sha256,
                revoked=int(key.revoked),
            )
        )

    def is_dead(self, instance_id: str) -> bool:
        """Whether another instance's lease has lapsed (or was given up). Who asks is alive."""
        if instance_id == self.instance_id:
            return False
        lease = self.connection.execute(
            sa.select(instances_table.c.lease_until_ms).where(instances_table.c.instance_id == instance_id)
        ).scalar_one_or_none()
        return lease is None or lease < self.now_ms

    def flush(self) -> None:
        """Writes what was recorded. Holds before entries before balances: any order is atomic at the commit."""
        if self._changed_holds:
            upsert = sqlite.insert(holds_table)
            changed = {
                column: upsert.excluded[column]
                for column in ("run_id", "digest", "picture_count", "state", "instance_id")
            }
            self.connection.execute(
                upsert.on_conflict_do_update(index_elements=["account", "batch_id"], set_=changed),
                [_hold_values(hold) for key in self._changed_holds if (hold := self._holds[key])],
            )
        if self._entries:
            self.connection.execute(sa.insert(entries_table), [_entry_values(entry) for entry in self._entries])
        if self._answers:
            self.connection.execute(
                sa.insert(answers_table),
                [
                    {"account": account, "batch_id": batch_id, "answer": answer}
                    for (account, batch_id), answer in self._answers.items()
                ],
            )
        if self._changed_accounts:
            # Never SET name, not even to itself: the store would look up every row that refers to the account.
            numbers = ("granted", "posted", "held", "sequence")
            changed_accounts = [_account_values(self._accounts[name]) for name in self._changed_accounts]
            self.connection.execute(
                sa.update(accounts_table)
                .where(accounts_table.c.name == sa.bindparam("at"))
                .values({number: sa.bindparam(number) for number in numbers}),
                [{"at": row["name"]} | {number: row[number] for number in numbers} for row in changed_accounts],
            )


class SqlLedger:
    """``Ledger`` on SQLite. Open with ``SqlLedger.open``; close with ``await close()``."""

    def __init__(self, engine: sa.Engine, lease_ms: int) -> None:
        self._engine = engine
        self._lease_ms = lease_ms
        self.instance_id = uuid.uuid4().hex
        self._commands: queue.Queue[_Command | None] = queue.Queue(MAX_WAITING_COMMANDS)
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="ledger-read")
        self._writer = threading.Thread(target=self._write_forever, name="ledger-write", daemon=True)
        self._closed = False

    @classmethod
    def open(cls, url: str, *, create: bool = True, lease_ms: int = LEASE_MS) -> "SqlLedger":
        """Opens the books at ``sqlite:///FILE`` and expires what dead servers left held.

        Raises LedgerError for another kind of URL, a missing file (unless ``create``), a file that is no ledger or
        one made by a newer program.
        """
        location = _checked_url(url, create)
        engine = sa.create_engine(
            location, poolclass=sa.pool.QueuePool, pool_size=2, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}
        )
        sa.event.listen(engine, "connect", _configure_connection)
        sa.event.listen(engine, "begin", _begin)
        opened = cls(engine, lease_ms)
        try:
            with _store_errors(), engine.begin() as connection:
                _create_schema(connection, url)
            with _store_errors(), engine.begin() as connection:
                opened._renew_and_sweep(connection)
        except BaseException:
            engine.dispose()
            raise
        opened._writer.start()
        return opened

    # --- the money path ---

    async def hold(self, request: HoldRequest) -> Held | Posted:
        def apply(transaction: _Transaction) -> Held | Posted:
            account = transaction.account(request.account)
            known = transaction.hold(request.account, request.batch_id)
            if known is not None and rules.is_replay(known):
                rules.check_same_batch(known, request)
                return Posted(transaction.answer(request.account, request.batch_id))
            if known is not None and known.state is HoldState.HELD and transaction.is_dead(known.instance_id):
                account, known, entry = rules.apply_release(account, known, HoldState.EXPIRED, transaction.now_ms)
                transaction.record(account, known, entry)
            account, hold, entry = rules.apply_hold(
                account, known, request, transaction.instance_id, transaction.now_ms
            )
            transaction.record(account, hold, entry)
            return Held()

        return await self._write(apply)

    async def post(self, account: str, batch_id: str, answer: bytes) -> Account:
        def apply(transaction: _Transaction) -> Account:
            before = transaction.account(account)
            hold = transaction.hold(account, batch_id)
            after, hold, entry = rules.apply_post(before, hold, batch_id, transaction.instance_id, transaction.now_ms)
            transaction.record(after, hold, entry)
            transaction.keep_answer(account, batch_id, answer)
            return after

        return await self._write(apply)

    async def void(self, account: str, batch_id: str) -> None:
        def apply(transaction: _Transaction) -> None:
            hold = transaction.hold(account, batch_id)
            if hold and hold.state is HoldState.HELD and hold.instance_id == transaction.instance_id:
                owner = transaction.account(account)
                transaction.record(*rules.apply_release(owner, hold, HoldState.VOIDED, transaction.now_ms))

        await self._write(apply)

    # --- accounts and keys ---

    async def create_account(self, name: str, granted: int, key: Key | None = None) -> Account:
        rules.check_account_name(name)

        def apply(transaction: _Transaction) -> Account:
            # All or nothing: a refused grant leaves no account behind, and no account is without its key.
            account, entry = rules.apply_grant(Account(name=name), granted, transaction.now_ms)
            transaction.add_account(Account(name=name))
            transaction.record(account, None, entry)
            if key is not None:
                transaction.add_key(key)
            return account

        return await self._write(apply)

    async def grant(self, name: str, picture_count: int) -> Account:
        def apply(transaction: _Transaction) -> Account:
            account, entry = rules.apply_grant(transaction.account(name), picture_count, transaction.now_ms)
            transaction.record(account, None, entry)
            return account

        return await self._write(apply)

    async def add_key(self, key: Key) -> None:
        def apply(transaction: _Transaction) -> None:
            transaction.account(key.account)
            transaction.add_key(key)

        await self._write(apply)

    async def revoke_key(self, key_id: str) -> None:
        def apply(transaction: _Transaction) -> None:
            found = transaction.connection.execute(
                sa.update(keys_table).where(keys_table.c.key_id == key_id).values(revoked=1)
            )
            if found.rowcount == 0:
                raise LedgerError(f"expected the id of a key on these books, got {key_id!r}")

        await self._write(apply)

    # --- reading ---

    async def account(self, name: str) -> Account:
        def read(connection: Connection) -> Account:
            row = connection.execute(sa.select(accounts_table).where(accounts_table.c.name == name)).one_or_none()
            if row is None:
                raise LedgerError(f"expected the name of an account on these books, got {name!r}")
            return _account(row)

        return await self._read(read)

    async def accounts(self) -> Sequence[Account]:
        query = sa.select(accounts_table).order_by(accounts_table.c.name)
        return await self._read(lambda connection: [_account(row) for row in connection.execute(query)])

    async def run_posted(self, account: str, run_id: str) -> int:
        query = sa.select(sa.func.coalesce(sa.func.sum(entries_table.c.picture_count), 0)).where(
            entries_table.c.account == account,
            entries_table.c.run_id == run_id,
            entries_table.c.kind == EntryKind.POST.value,
        )
        return await self._read(lambda connection: int(connection.execute(query).scalar_one()))

    async def statement(
        self, account: str, *, run_id: str = "", after_sequence: int = 0, limit: int = 1000
    ) -> Sequence[Entry]:
        query = (
            sa.select(entries_table)
            .where(entries_table.c.account == account, entries_table.c.sequence > after_sequence)
            .order_by(entries_table.c.sequence)
            .limit(limit)
        )
        if run_id:
            query = query.where(entries_table.c.run_id == run_id)
        return await self._read(lambda connection: [_entry(row) for row in connection.execute(query)])

    async def key(self, key_id: str) -> Key | None:
        query = sa.select(keys_table).where(keys_table.c.key_id == key_id)

        def read(connection: Connection) -> Key | None:
            row = connection.execute(query).one_or_none()
            return _key(row) if row else None

        return await self._read(read)

    async def keys(self, account: str) -> Sequence[Key]:
        query = sa.select(keys_table).where(keys_table.c.account == account).order_by(keys_table.c.key_id)
        return await self._read(lambda connection: [_key(row) for row in connection.execute(query)])

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.to_thread(self._commands.put, None)
        await asyncio.to_thread(self._writer.join)
        self._readers.shutdown()
        self._engine.dispose()

    # --- the two ways in: the writer thread, and a reader thread ---

    async def _write(self, apply: Callable[[_Transaction], T]) -> T:
        outcome: Future[T] = Future()
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        try:
            self._commands.put_nowait(_Command(apply, outcome))
        except queue.Full:
            raise LedgerUnavailable(f"{MAX_WAITING_COMMANDS} commands wait for the ledger already") from None
        return await asyncio.wrap_future(outcome)

    async def _read(self, read: Callable[[Connection], T]) -> T:
        def run() -> T:
            with (
                _store_errors(),
                self._engine.connect().execution_options(read_only=True) as connection,
                connection.begin(),
            ):
                return read(connection)

        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    def _write_forever(self) -> None:
        renew_seconds = self._lease_ms / 3000
        next_renewal_ms = rules.now_ms() + self._lease_ms // 3
        while True:
            group: list[_Command] = []
            stop = False
            with contextlib.suppress(queue.Empty):
                command = self._commands.get(timeout=renew_seconds)
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
            now_ms = rules.now_ms()
            # A clock that jumped back must not keep the lease from being renewed.
            if stop or now_ms >= next_renewal_ms or now_ms < next_renewal_ms - self._lease_ms:
                # Whatever goes wrong here, the writer lives on, or every caller would wait for ever; posts are
                # refused once another instance has seen our lease lapse.
                with contextlib.suppress(Exception), self._engine.begin() as connection:
                    self._retire(connection) if stop else self._renew_and_sweep(connection)
                next_renewal_ms = now_ms + self._lease_ms // 3
            if stop:
                return

    def _commit(self, group: list[_Command]) -> None:
        """Applies a group in one transaction: a refused command changes nothing, a failed store fails all."""
        told: list[tuple[_Command, Any]] = []
        try:
            with _store_errors(), self._engine.begin() as connection:
                transaction = _Transaction(connection, self.instance_id)
                for command in group:
                    try:
                        value = command.apply(transaction)
                    except (Refusal, LedgerError) as error:
                        command.outcome.set_exception(error)
                        continue
                    if isinstance(value, Held):
                        command.outcome.set_result(value)
                    else:
                        told.append((command, value))
                transaction.flush()
        except Exception as error:
            failure = error if isinstance(error, LedgerError) else LedgerUnavailable(repr(error))
            for command in group:
                if not command.outcome.done():
                    command.outcome.set_exception(failure)
            return
        for command, value in told:
            command.outcome.set_result(value)

    def _renew_and_sweep(self, connection: Connection) -> None:
        transaction = _Transaction(connection, self.instance_id)
        renew = sqlite.insert(instances_table).values(
            instance_id=self.instance_id, lease_until_ms=transaction.now_ms + self._lease_ms
        )
        connection.execute(
            renew.on_conflict_do_update(
                index_elements=["instance_id"], set_={"lease_until_ms": renew.excluded.lease_until_ms}
            )
        )
        # A lapsed lease and none at all mean the same, so the dead need not be remembered.
        connection.execute(sa.delete(instances_table).where(instances_table.c.lease_until_ms < transaction.now_ms))
        living = sa.select(instances_table.c.instance_id)
        self._release(transaction, holds_table.c.instance_id.not_in(living), HoldState.EXPIRED)

    def _retire(self, connection: Connection) -> None:
        """A living server resolves its own holds; then its lease is given up."""
        transaction = _Transaction(connection, self.instance_id)
        self._release(transaction, holds_table.c.instance_id == self.instance_id, HoldState.VOIDED)
        connection.execute(sa.delete(instances_table).where(instances_table.c.instance_id == self.instance_id))

    @staticmethod
    def _release(transaction: _Transaction, which: sa.ColumnElement[bool], state: HoldState) -> None:
        held = sa.literal(HoldState.HELD.value, literal_execute=True)  # a constant, so that the partial index serves
        query = sa.select(holds_table).where(holds_table.c.state == held, which).limit(SWEEP_HOLDS)
        for row in transaction.connection.execute(query).all():
            hold = _hold(row)
            account = transaction.account(hold.account)
            transaction.record(*rules.apply_release(account, hold, state, transaction.now_ms))
        transaction.flush()


# --- rows <-> values --------------------------------------------------------------------------------


def _account(row: Row[Any]) -> Account:
    return Account(name=row.name, granted=row.granted, posted=row.posted, held=row.held, sequence=row.sequence)


def _account_values(account: Account) -> dict[str, Any]:
    return {
        "name": account.name,
        "granted": account.granted,
        "posted": account.posted,
        "held": account.held,
        "sequence": account.sequence,
    }


def _hold(row: Row[Any]) -> Hold:
    return Hold(
        account=row.account,
        batch_id=row.batch_id,
        run_id=row.run_id,
        digest=bytes(row.digest),
        picture_count=row.picture_count,
        state=HoldState(row.state),
        instance_id=row.instance_id,
    )


def _hold_values(hold: Hold) -> dict[str, Any]:
    return {
        "account": hold.account,
        "batch_id": hold.batch_id,
        "run_id": hold.run_id,
        "digest": hold.digest,
        "picture_count": hold.picture_count,
        "state": hold.state.value,
        "instance_id": hold.instance_id,
    }


def _entry(row: Row[Any]) -> Entry:
    return Entry(
        account=row.account,
        sequence=row.sequence,
        create_time_ms=row.create_time_ms,
        kind=EntryKind(row.kind),
        batch_id=row.batch_id,
        run_id=row.run_id,
        picture_count=row.picture_count,
    )


def _entry_values(entry: Entry) -> dict[str, Any]:
    return {
        "account": entry.account,
        "sequence": entry.sequence,
        "create_time_ms": entry.create_time_ms,
        "kind": entry.kind.value,
        "batch_id": entry.batch_id,
        "run_id": entry.run_id,
        "picture_count": entry.picture_count,
    }


def _key(row: Row[Any]) -> Key:
    return Key(
        key_id=row.key_id,
        account=row.account,
        role=Role(row.role),
        secret_sha256=bytes(row.secret_sha256),
        revoked=bool(row.revoked),
    )


# --- the store --------------------------------------------------------------------------------------


def _checked_url(url: str, create: bool) -> URL:
    try:
        location = make_url(url)
    except sa.exc.ArgumentError:
        raise LedgerError(f"expected a ledger as sqlite:///FILE, got {url!r}") from None
    if location.get_backend_name() != "sqlite" or not location.database or location.database == ":memory:":
        raise LedgerError(f"expected a ledger as sqlite:///FILE, got {url!r}")
    path = Path(location.database)
    with _store_errors():
        if not path.exists():
            if not create:
                raise LedgerError(f"expected a ledger at {path}, found no file; 'account create' makes one")
            if not path.parent.is_dir():
                raise LedgerError(f"expected a folder for the ledger, found no {path.parent}")
            path.touch(mode=0o600)
    return location.set(drivername="sqlite+pysqlite")


def _configure_connection(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say so (see _begin)
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a commit is on the disk before it returns
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    # IMMEDIATE: a writer takes its lock at the start, so that what it reads is what it may change.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _create_schema(connection: Connection, url: str) -> None:
    tables = set(sa.inspect(connection).get_table_names())
    if tables and not tables >= {schema_table.name, accounts_table.name, entries_table.name}:
        raise LedgerError(f"expected a ledger at {url}, found a database of something else")
    if not tables:
        metadata.create_all(connection)
        for trigger in _TRIGGERS:
            connection.exec_driver_sql(trigger)
        connection.execute(sa.insert(schema_table).values(version=SCHEMA_VERSION))
    version = connection.execute(sa.select(schema_table.c.version)).scalar_one()
    if version != SCHEMA_VERSION:
        raise LedgerError(
            f"expected a ledger of schema version {SCHEMA_VERSION} at {url}, got {version}; "
            "use the program that made it, or a newer one"
        )


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """What the store says, as one line."""
    try:
        yield
    except sa.exc.DatabaseError as error:
        raise LedgerUnavailable(f"the ledger's store failed: {error.orig}") from error
    except (sa.exc.SQLAlchemyError, OSError) as error:
        raise LedgerUnavailable(f"the ledger's store failed: {error}") from error
