"""The auditor: replays the journal and believes nothing else. It shares no code with the writer, on purpose.

What it knows is written in docs/ledger.md and again here. An account's journal is numbered from 1 without gaps. Each
entry moves pictures between two books and is chained to the one before it:

    head_0 = 32 zero bytes
    head_n = SHA-256(head_{n-1} || line_n)
    line_n = account|sequence|create_time_ms|kind|batch_id|run_id|picture_count|digest     (UTF-8; digest in hex)

The tables beside the journal (balances, holds, answers) are only what the journal comes to, and are compared with it.
So that millions of batches need no memory, that comparison adds up a keyed 64-bit hash of every line that the journal
expects and takes away one of every row; only where something is left is the account gone through again, line by line.

From the journal alone it can tell whether the books agree with themselves. Whoever can write the store can also cut
its end off, or write all of it anew; receipts, which the customers keep, show both.
"""

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

ISSUER, AVAILABLE, HELD, POSTED = range(4)
BOOKS = ("issuer", "available", "held", "posted")
# kind -> (debited book, credited book)
MOVES = {
    "grant": (ISSUER, AVAILABLE),
    "hold": (AVAILABLE, HELD),
    "post": (HELD, POSTED),
    "void": (HELD, AVAILABLE),
    "expire": (HELD, AVAILABLE),
}
_STATE_AFTER = {"void": "voided", "expire": "expired"}
_MOST_NAMED = 100
_ROWS_AT_ONCE = 10_000
_SQLITE_MMAP_BYTES = 2**36
# A connection lost without a word is given up about ten seconds after its last sign of life, not after the quarter of
# an hour that the kernel takes.
_POSTGRES_KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 5,  # seconds
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}
_ENTRY_COLUMNS = "sequence, create_time_ms, kind, batch_id, run_id, picture_count, digest, head"

Progress = Callable[[int, int], None]


class AuditError(Exception):
    """The books or receipts cannot be read at all; one line."""


class Receipt(NamedTuple):
    """What a customer was given with an answer."""

    account: str
    batch_id: str
    sequence: int
    head: bytes


@dataclass
class Report:
    """What an audit found. ``findings`` is empty where all is well; ``unknown`` is what this audit cannot know."""

    accounts: int = 0
    entries: int = 0
    granted_pictures: int = 0
    posted_pictures: int = 0
    pruned_answers: int = 0
    live_holds: int = 0
    orphaned_holds: list[str] = field(default_factory=list)
    receipts: int = 0
    findings: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def find(self, what: str) -> None:
        """Notes one finding; after the first hundred only that there are more."""
        if len(self.findings) < _MOST_NAMED:
            self.findings.append(what)
        elif len(self.findings) == _MOST_NAMED:
            self.findings.append("… and more")


@dataclass
class _Account:
    """One account's books as the replay has them."""

    name: str
    sequence: int = 0
    head: bytes = bytes(32)
    pruned: int = 0  # answers of posts up to this entry are no longer kept
    pruned_answers: int = 0
    book: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    under_way: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)  # batch id -> count, run, digest
    released: dict[str, tuple[int, str, bytes, str]] = field(default_factory=dict)  # … and how it ended
    holds_left: int = 0  # hashes of what the journal expects in the table, less those of its rows
    answers_left: int = 0


def verify(url: str, receipts: Iterable[Receipt] = (), *, progress: Progress = lambda done, total: None) -> Report:
    """Audits the books at ``sqlite:///FILE`` or ``postgresql://…``. Raises AuditError where they cannot be read.

    Args:
        url: the store; a server may be writing to it.
        receipts: what customers kept.
        progress: told entries replayed and entries in all, now and then.
    """
    started = time.monotonic()
    report = Report()
    wanted: dict[str, dict[int, list[Receipt]]] = {}
    for receipt in receipts:
        report.receipts += 1
        wanted.setdefault(receipt.account, {}).setdefault(receipt.sequence, []).append(receipt)
    with Store(url) as store:
        audit = _Audit(store, report, wanted, progress)
        for step in (
            audit.replay_journals,
            audit.compare_balances,
            audit.compare_posts,
            audit.compare_grants,
            audit.compare_batches,
            audit.find_orphans,
            audit.settle_receipts,
        ):
            try:
                step()
            except (TypeError, AttributeError, KeyError) as error:  # text where bytes should be, and the like
                report.find(f"{step.__name__.replace('_', ' ')}: a row is not of the expected types: {error!r}")
    report.seconds = time.monotonic() - started
    return report


def read_receipts(path: Path) -> Iterator[Receipt]:
    """Receipts from a file of JSON lines, as ``edge-agent receipts`` writes it. Raises AuditError naming the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(f"--receipts {path}: expected a file of JSON lines: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            receipt = Receipt(found["account"], found["batch_id"], found["sequence"], bytes.fromhex(found["head"]))
            if not (isinstance(receipt.account, str) and isinstance(receipt.batch_id, str)):
                raise ValueError
            if type(receipt.sequence) is not int or len(receipt.head) != 32:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise AuditError(
                f"--receipts {path}, line {number}: expected an object with account, batch_id, sequence and head"
            ) from None
        yield receipt


class _Audit:
    """One pass over the books."""

    def __init__(
        self, store: "Store", report: Report, wanted: dict[str, dict[int, list[Receipt]]], progress: Progress
    ) -> None:
        self._store = store
        self._report = report
        self._wanted = wanted
        self._progress = progress
        # The key of the hashes: nobody who wrote the store can have known it.
        self._salt = secrets.token_hex(16)
        self._accounts: dict[str, _Account] = {}
        self._covered = {name: max(numbers) for name, numbers in wanted.items()}

    def replay_journals(self) -> None:
        total = self._store.one("SELECT count(*) FROM entries")
        pruned = "pruned_sequence" if self._store.may_be_pruned() else "0"
        for name, sequence in list(self._store.rows(f"SELECT name, {pruned} FROM accounts ORDER BY name")):
            self._accounts[name] = self._replay(name, total, sequence)
        if self._report.entries != total:  # only then is it worth a long look
            strangers = [
                name
                for (name,) in self._store.rows("SELECT DISTINCT account FROM entries ORDER BY 1")
                if name not in self._accounts
            ]
            for name in strangers:
                self._report.find(f"account {name}: has a journal, and no row among the accounts")
                self._accounts[name] = self._replay(name, total)
            if self._report.entries != total:
                self._report.find(
                    f"the journal has {total} entries, by accounts and numbers only {self._report.entries} are found"
                )

    def _replay(self, name: str, total: int, pruned: int = 0) -> _Account:
        account = _Account(name, pruned=pruned)
        try:
            self._replay_entries(account, total)
        except (TypeError, AttributeError) as error:
            self._report.find(f"account {name}, after entry {account.sequence}: a column of another type: {error}")
        self._report.accounts += 1
        self._report.granted_pictures -= account.book[ISSUER]
        self._report.posted_pictures += account.book[POSTED]
        self._report.live_holds += len(account.under_way)
        self._report.pruned_answers += account.pruned_answers
        if not 0 <= pruned <= account.sequence:
            self._report.find(
                f"account {name}: its row says that answers are kept after entry {pruned}, its journal ends with "
                f"{account.sequence}"
            )
        return account

    def _replay_entries(self, account: _Account, total: int) -> None:
        """Adds up one account's journal, entry by entry. Long, because a call for each of millions costs too much."""
        name, book, under_way, released = account.name, account.book, account.under_way, account.released
        find, sha256, salt, progress = self._report.find, hashlib.sha256, self._salt, self._progress
        wanted = self._wanted.get(name, {})
        head, expected, done, pruned = account.head, 0, self._report.entries, account.pruned
        holds_left = answers_left = pruned_answers = 0
        rest: tuple[str, int] | None = None  # of a partial post: what the very next entry must give back
        for sequence, create_time_ms, kind, batch_id, run_id, count, digest, stored_head in self._store.entries(name):
            expected += 1
            if sequence != expected:
                find(f"account {name}, entry {sequence}: expected entry {expected} here; entries are missing")
                expected = sequence
            line = f"{name}|{sequence}|{create_time_ms}|{kind}|{batch_id}|{run_id}|{count}|{digest.hex()}"
            head = sha256(head + line.encode()).digest()
            if head != stored_head:
                find(f"account {name}, entry {sequence}: the chain is broken: it was changed, or one before it")
                head = stored_head  # go on from what is written, so that each break is found once
            account.sequence, account.head = sequence, head
            done += 1
            if done % _ROWS_AT_ONCE == 0:
                progress(done, total)
            if sequence in wanted:
                for receipt in wanted.pop(sequence):
                    if receipt.head != stored_head or receipt.batch_id != batch_id or kind != "post":
                        find(
                            f"account {name}, entry {sequence}: the receipt of {receipt.batch_id} says otherwise: "
                            "the journal was written anew, here or before"
                        )
            if kind not in MOVES or count.__class__ is not int or count <= 0 or line.count("|") != 7:
                find(f"account {name}, entry {sequence}: expected a known kind, a count, plain ids, found {line!r}")
                continue
            debited, credited = MOVES[kind]
            book[debited] -= count
            book[credited] += count
            if book[AVAILABLE] < 0 or book[HELD] < 0:
                find(f"account {name}, entry {sequence}: overspent: available {book[AVAILABLE]}, held {book[HELD]}")
            if rest is not None:
                owed, rest = rest, None
                if (kind, batch_id, count) == ("void", *owed):
                    continue
                find(f"account {name}, entry {sequence}: expected batch {owed[0]} to give back {owed[1]} here")
            if kind == "hold":
                if batch_id in under_way:
                    find(f"account {name}, entry {sequence}: batch {batch_id} is held twice at once")
                under_way[batch_id] = (count, run_id, digest)
                if released:
                    released.pop(batch_id, None)
            elif kind != "grant":
                held, held_run, held_digest = under_way.pop(batch_id, (0, run_id, b""))
                if count > held or (kind != "post" and count != held) or run_id != held_run:
                    find(
                        f"account {name}, entry {sequence}: {kind} of {count} for batch {batch_id} of run {run_id} "
                        f"does not fit its hold of {held}"
                    )
                if kind == "post":
                    if count < held:
                        rest = (batch_id, held - count)
                    holds_left += hash(f"{salt}{batch_id}|{held_run}|{held}|{held_digest.hex()}|posted")
                    if sequence > pruned:
                        answers_left += hash(f"{salt}{batch_id}|{sequence}|{digest.hex()}|{stored_head.hex()}")
                    else:
                        pruned_answers += 1
                else:
                    released[batch_id] = (held, held_run, held_digest, _STATE_AFTER[kind])
        self._report.entries = done
        if rest is not None:
            find(f"account {name}: the journal ends before batch {rest[0]} gives back {rest[1]}")
        for batch_id, (count, run_id, digest) in under_way.items():
            holds_left += hash(f"{salt}{batch_id}|{run_id}|{count}|{digest.hex()}|held")
        for batch_id, (count, run_id, digest, state) in released.items():
            holds_left += hash(f"{salt}{batch_id}|{run_id}|{count}|{digest.hex()}|{state}")
        account.holds_left, account.answers_left = holds_left, answers_left
        account.pruned_answers = pruned_answers
        if sum(book) != 0:
            find(f"account {name}: the books do not sum to zero: {dict(zip(BOOKS, book, strict=True))}")

    def compare_balances(self) -> None:
        """The accounts' rows against what their journals add up to."""
        for name, granted, posted, held, sequence, head in self._store.rows(
            "SELECT name, granted, posted, held, sequence, head FROM accounts ORDER BY name"
        ):
            account = self._accounts[name]
            book = account.book
            if (-book[ISSUER], book[POSTED], book[HELD]) != (granted, posted, held):
                self._report.find(
                    f"account {name}: its row says granted {granted}, posted {posted}, held {held}; the journal adds "
                    f"up to {-book[ISSUER]}, {book[POSTED]}, {book[HELD]}"
                )
            if (account.sequence, account.head) != (sequence, head):
                self._report.find(
                    f"account {name}: its row ends with entry {sequence} and head {_hex(head)}, its journal with "
                    f"{account.sequence} and {_hex(account.head)}: an end was cut off"
                )

    def compare_posts(self) -> None:
        """One post a batch, and none of a batch that is under way or was given back."""
        before: tuple[str, str] | None = None
        for account, batch_id in self._store.rows(
            "SELECT account, batch_id FROM entries WHERE kind = 'post' ORDER BY account, batch_id"
        ):
            if (account, batch_id) == before:
                self._report.find(f"account {account}: batch {batch_id} was posted more than once")
            before = (account, batch_id)
            known = self._accounts[account]
            if batch_id in known.under_way or batch_id in known.released:
                self._report.find(f"account {account}: batch {batch_id} was posted, and held again after that")

    def compare_grants(self) -> None:
        """One grant an id, where it has one."""
        for account, grant_id in self._store.rows(
            "SELECT account, batch_id FROM entries WHERE kind = 'grant' AND batch_id <> '' "
            "GROUP BY account, batch_id HAVING count(*) > 1 ORDER BY account, batch_id"
        ):
            self._report.find(f"account {account}: grant id {grant_id} was granted more than once")

    def compare_batches(self) -> None:
        """The rows of holds and answers against what the journal expects of them."""
        accounts, salt, sha256 = self._accounts, self._salt, hashlib.sha256
        strangers: set[str] = set()
        for name, batch_id, run_id, count, digest, state in self._store.rows(
            "SELECT account, batch_id, run_id, picture_count, digest, state FROM holds"
        ):
            if name in accounts:
                accounts[name].holds_left -= hash(f"{salt}{batch_id}|{run_id}|{count}|{digest.hex()}|{state}")
            else:
                strangers.add(name)
        for name, batch_id, answer, sequence, head in self._store.rows(
            "SELECT account, batch_id, answer, sequence, head FROM answers"
        ):
            if name in accounts:
                line = f"{salt}{batch_id}|{sequence}|{sha256(answer).hexdigest()}|{head.hex()}"
                accounts[name].answers_left -= hash(line)
            else:
                strangers.add(name)
        for name in sorted(strangers):
            self._report.find(f"account {name}: has holds or answers, and no row among the accounts")
        for account in accounts.values():
            if account.holds_left or account.answers_left:
                self._name_differences(account)

    def _name_differences(self, account: _Account) -> None:
        """Goes through an account again, and says which batches differ."""
        name = account.name
        expected = {batch_id: (*facts, "held") for batch_id, facts in account.under_way.items()} | account.released
        answers: dict[str, tuple[int, str, bytes]] = {}
        held: dict[str, tuple[int, str, bytes]] = {}
        for sequence, _, kind, batch_id, run_id, count, digest, head in self._store.entries(name):
            if kind == "hold":
                held[batch_id] = (count, run_id, digest)
            elif kind == "post":
                expected[batch_id] = (*held.get(batch_id, (0, run_id, b"")), "posted")
                answers[batch_id] = (sequence, _hex(digest), head)
        for batch_id, run_id, count, digest, state in self._store.rows(
            "SELECT batch_id, run_id, picture_count, digest, state FROM holds WHERE account = {}", (name,)
        ):
            line = expected.pop(batch_id, None)
            if line is None:
                self._report.find(f"account {name}: batch {batch_id} is on the table of holds, not in the journal")
            elif line != (count, run_id, digest, state):
                self._report.find(
                    f"account {name}: batch {batch_id} is {state}, {count} pictures of run {run_id}, digest "
                    f"{_hex(digest)} on the table of holds; the journal says {line[3]}, {line[0]} of {line[1]}, "
                    f"{_hex(line[2])}"
                )
        for batch_id, line in expected.items():
            self._report.find(f"account {name}: batch {batch_id} is {line[3]} by the journal, without a row of holds")
        for batch_id, answer, sequence, head in self._store.rows(
            "SELECT batch_id, answer, sequence, head FROM answers WHERE account = {}", (name,)
        ):
            booked = answers.pop(batch_id, None)
            if booked is None:
                self._report.find(f"account {name}: batch {batch_id} has an answer that was never charged")
            elif booked[0] <= account.pruned:
                self._report.find(
                    f"account {name}: the answer of batch {batch_id} was pruned, and is kept all the same"
                )
            elif booked[1] != hashlib.sha256(answer).hexdigest():
                self._report.find(f"account {name}: the answer of batch {batch_id} is not the one that was booked")
            elif (booked[0], booked[2]) != (sequence, head):
                self._report.find(f"account {name}: the receipt of batch {batch_id} is not the journal's")
        for batch_id in (batch_id for batch_id, booked in answers.items() if booked[0] > account.pruned):
            self._report.find(f"account {name}: batch {batch_id} was charged, and its answer is not kept")

    def find_orphans(self) -> None:
        """Live holds of servers that are gone: no fault, the next sweep of any server gives them back."""
        for account, batch_id, count in islice(
            self._store.rows(
                "SELECT h.account, h.batch_id, h.picture_count FROM holds h LEFT JOIN instances i "
                "ON i.instance_id = h.instance_id AND i.lease_until_ms >= {} "
                "WHERE h.state = 'held' AND i.instance_id IS NULL ORDER BY h.account, h.batch_id",
                (self._store.now_ms(),),
            ),
            _MOST_NAMED,
        ):
            self._report.orphaned_holds.append(f"account {account}: batch {batch_id}, {count} pictures")

    def settle_receipts(self) -> None:
        """Receipts that no entry answered; and what nobody's receipts cover."""
        for name, missing in sorted(self._wanted.items()):
            if not missing:
                continue
            if name not in self._accounts:
                self._report.find(f"account {name}: {len(missing)} receipts, and no such account")
                continue
            numbers = sorted(missing)
            ids = ", ".join(receipt.batch_id for number in numbers[:5] for receipt in missing[number])
            self._report.find(
                f"account {name}: receipts for {len(numbers)} entries from {numbers[0]} to {numbers[-1]} that the "
                f"journal lacks; it ends at {self._accounts[name].sequence}: cut off, or an older state put back "
                f"(batches {ids}{', …' if len(numbers) > 5 else ''})"
            )
        bare = [name for name in self._accounts if name not in self._covered]
        if bare:
            self._report.unknown.append(
                f"{len(bare)} of {len(self._accounts)} accounts have no receipt here: whether their journals were "
                "written anew, or cut off together with their balances, cannot be known"
            )
        beyond = sum(
            max(0, account.sequence - self._covered[name])
            for name, account in self._accounts.items()
            if name in self._covered
        )
        if beyond:
            self._report.unknown.append(
                f"{beyond} entries come after their account's last receipt: whether these were written anew, or more "
                "were cut off after them, cannot be known"
            )


def _hex(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)


class Store(AbstractContextManager["Store"]):
    """Plain SQL over the store's own driver, in one read-only view of it; also for exports and comparisons."""

    def __init__(self, url: str) -> None:
        self._url = url
        # A URL of PostgreSQL may have a password in several places, and its driver names the host.
        self._name = url.removeprefix("sqlite:///") if url.startswith("sqlite:///") else "PostgreSQL"
        self._connection: Any = None
        self._errors: tuple[type[Exception], ...] = (sqlite3.Error,)

    def __enter__(self) -> "Store":
        try:
            if self._url.startswith("sqlite:///"):
                self._open_sqlite(Path(self._url.removeprefix("sqlite:///")))
            elif self._url.startswith(("postgresql://", "postgresql+psycopg://")):
                self._open_postgres("postgresql://" + self._url.partition("://")[2])
            else:
                raise AuditError("expected the ledger's own store, sqlite:///FILE or postgresql://…")
        except self._errors as error:
            self.close()
            raise AuditError(f"expected a ledger in {self._name}: {_one_line(error)}") from None
        return self

    def _open_sqlite(self, path: Path) -> None:
        if not path.is_file():
            raise AuditError(f"expected a ledger at {path}, found no file")
        self._sqlite = True
        for mode in ("mode=ro", "mode=ro&immutable=1"):
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?{mode}", uri=True, isolation_level=None, timeout=5.0
            )
            try:
                self._connection.execute(f"PRAGMA mmap_size = {_SQLITE_MMAP_BYTES}")
                self._connection.execute("BEGIN")
                self.one("SELECT count(*) FROM accounts")
                return
            except sqlite3.OperationalError as error:
                # On a medium that cannot be written, WAL's index cannot be made; without a WAL none is needed.
                read_only = error.sqlite_errorname.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY"))
                if not read_only or "immutable" in mode or Path(f"{path}-wal").exists():
                    raise
                self._connection.close()

    def _open_postgres(self, url: str) -> None:
        try:
            import psycopg
        except ImportError:  # one without libpq is none
            raise AuditError("expected psycopg for postgresql://, found none; pip install 'mekd[postgres]'") from None

        self._sqlite = False
        self._errors = (psycopg.Error,)
        self._connection = psycopg.connect(url, autocommit=True, **_POSTGRES_KEEPALIVE)
        self._connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        self.one("SELECT count(*) FROM accounts")

    def __exit__(self, _kind: object, error: object, _traceback: object) -> None:
        self.close()
        if isinstance(error, self._errors):
            raise AuditError(f"the ledger's store {self._name} failed: {_one_line(error)}") from None

    def close(self) -> None:
        """Gives the view back."""
        if self._connection is not None:
            self._connection.close()

    def rows(self, query: str, values: tuple[object, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows of a query, in which {} stands for a value; of a large result only a part is in memory at a time."""
        if self._sqlite:
            return iter(self._connection.execute(query.replace("{}", "?"), values))
        return self._postgres_rows(query.replace("{}", "%s"), values)

    def _postgres_rows(self, query: str, values: tuple[object, ...]) -> Iterator[tuple[Any, ...]]:
        # A name of its own for each: two may be open at once.
        with self._connection.cursor(name=f"audit_{secrets.token_hex(4)}") as cursor:
            cursor.itersize = _ROWS_AT_ONCE
            cursor.execute(query, values, binary=True)
            yield from cursor

    def one(self, query: str) -> int:
        """The one number a query gives."""
        return int(self._connection.execute(query).fetchone()[0])

    def now_ms(self) -> int:
        """The clock that leases are measured with: PostgreSQL's own, else this machine's."""
        if self._sqlite:
            return time.time_ns() // 1_000_000
        return self.one("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)")

    def may_be_pruned(self) -> bool:
        """Whether the store's schema knows of pruned answers; backups may be older."""
        return not list(self.rows("SELECT 1 FROM alembic_version WHERE version_num = '0001'"))

    def entries(self, account: str) -> Iterator[tuple[Any, ...]]:
        """One account's journal, oldest first."""
        return self.rows(f"SELECT {_ENTRY_COLUMNS} FROM entries WHERE account = {{}} ORDER BY sequence", (account,))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
