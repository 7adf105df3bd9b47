"""The auditor: replays the journal and believes nothing else. It shares no code with the writer, on purpose.

What it knows is written in docs/ledger.md and again here. An account's journal is numbered from 1 without gaps. Each
entry moves pictures between two books and is chained to the one before it:

    head_0 = 32 zero bytes
    head_n = SHA-256(head_{n-1} || line_n)
    line_n = account|sequence|create_time_ms|kind|batch_id|run_id|picture_count|digest     (UTF-8; digest in hex)

From the journal alone it can tell whether the books agree with themselves. Whoever can write the store can also cut its
end off, or write all of it anew; receipts, which the customers keep, show both.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# kind -> (debited book, credited book)
_BOOKS = {
    "grant": ("issuer", "available"),
    "hold": ("available", "held"),
    "post": ("held", "posted"),
    "void": ("held", "available"),
    "expire": ("held", "available"),
}
_MOST_FINDINGS = 100
_ROWS_AT_ONCE = 10_000

Progress = Callable[[int, int], None]


class AuditError(Exception):
    """The books or receipts cannot be read at all; one line."""


@dataclass
class Report:
    """What an audit found. ``findings`` is empty where all is well."""

    accounts: int = 0
    entries: int = 0
    posted_pictures: int = 0
    live_holds: int = 0
    orphaned_holds: int = 0
    receipts: int = 0
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def find(self, what: str) -> None:
        """Notes one finding; after the first hundred only that there are more."""
        if len(self.findings) < _MOST_FINDINGS:
            self.findings.append(what)
        elif len(self.findings) == _MOST_FINDINGS:
            self.findings.append("… and more")


@dataclass
class _Books:
    """One account's books as the replay has them."""

    name: str
    sequence: int = 0
    head: bytes = bytes(32)
    book: dict[str, int] = field(default_factory=lambda: {"issuer": 0, "available": 0, "held": 0, "posted": 0})
    under_way: dict[str, int] = field(default_factory=dict)  # batch id -> pictures held and not yet resolved


def verify(
    url: str, receipts: Iterable[dict[str, Any]] = (), *, progress: Progress = lambda done, total: None
) -> Report:
    """Audits the books at ``sqlite:///FILE`` or ``postgresql://…``. Raises AuditError where they cannot be read.

    Args:
        url: the store.
        receipts: what customers kept: objects with account, batch_id, sequence, head (hex).
        progress: told entries replayed and entries in all, now and then.
    """
    started = time.monotonic()
    report = Report()
    wanted: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for receipt in receipts:
        report.receipts += 1
        wanted.setdefault((receipt["account"], receipt["sequence"]), []).append(receipt)
    with _Store(url) as store:
        total = store.one("SELECT count(*) FROM entries")
        last = {name: _replay(store, name, report, wanted, total, progress) for (name,) in store.names()}
        _compare_accounts(store, last, report)
        _compare_batches(store, report)
        for (name, sequence), missing in sorted(wanted.items()):
            for receipt in missing:
                end = last[name].sequence if name in last else None
                why = f"its journal ends at {end}: cut off" if end is not None else "there is no such account"
                report.find(f"account {name}: receipt of batch {receipt['batch_id']} for entry {sequence}, but {why}")
    report.seconds = time.monotonic() - started
    return report


def read_receipts(path: Path) -> Iterator[dict[str, Any]]:
    """Receipts from a file of JSON lines. Raises AuditError naming the line."""
    try:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            try:
                receipt = json.loads(line)
                ok = all(isinstance(receipt[name], str) for name in ("account", "batch_id", "head"))
                ok = ok and isinstance(receipt["sequence"], int)
            except (ValueError, KeyError, TypeError):
                ok = False
            if not ok:
                raise AuditError(
                    f"{path}, line {number}: expected an object with account, batch_id, sequence and head"
                )
            yield receipt
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(f"--receipts {path}: {error}") from None


def _replay(
    store: "_Store",
    name: str,
    report: Report,
    wanted: dict[tuple[str, int], list[dict[str, Any]]],
    total: int,
    progress: Progress,
) -> _Books:
    """Adds up one account's journal, entry by entry; every check that needs no other table is made here."""
    books = _Books(name)
    book, under_way, sha256 = books.book, books.under_way, hashlib.sha256
    head, expected = books.head, 0
    for sequence, create_time_ms, kind, batch_id, run_id, count, digest, stored_head in store.entries(name):
        expected += 1
        at = f"account {name}, entry {sequence}"
        if sequence != expected:
            report.find(f"{at}: expected entry {expected}, so {sequence - expected} are missing")
            expected = sequence
        line = f"{name}|{sequence}|{create_time_ms}|{kind}|{batch_id}|{run_id}|{count}|{digest.hex()}"
        head = sha256(head + line.encode()).digest()
        if head != stored_head:
            report.find(f"{at}: the chain is broken: it was changed, or one before it")
            head = bytes(stored_head)  # go on from what is written, so that each break is found once
        if kind not in _BOOKS or count <= 0:
            report.find(f"{at}: expected a known kind and a positive count, found {kind} of {count}")
            continue
        debited, credited = _BOOKS[kind]
        book[debited] -= count
        book[credited] += count
        if book["available"] < 0 or book["held"] < 0:
            report.find(f"{at}: overspent: available {book['available']}, held {book['held']}")
        if kind == "hold":
            if batch_id in under_way:
                report.find(f"{at}: batch {batch_id} is held twice")
            under_way[batch_id] = count
        elif kind != "grant":
            left = under_way.pop(batch_id, 0) - count
            if left < 0:
                report.find(f"{at}: {kind} of {count} for batch {batch_id} is not covered by a hold")
            elif left > 0:  # a partial post: the rest is given back by the next entry
                under_way[batch_id] = left
        for receipt in wanted.pop((name, sequence), ()) if wanted else ():
            if receipt["head"] != bytes(stored_head).hex() or receipt["batch_id"] != batch_id or kind != "post":
                report.find(
                    f"{at}: the receipt of batch {receipt['batch_id']} has another head: the journal was rewritten"
                )
        report.entries += 1
        if report.entries % _ROWS_AT_ONCE == 0:
            progress(report.entries, total)
    books.sequence, books.head = expected, head
    if sum(book.values()) != 0:
        report.find(f"account {name}: the books do not sum to zero")
    report.accounts += 1
    report.posted_pictures += book["posted"]
    return books


def _compare_accounts(store: "_Store", last: dict[str, _Books], report: Report) -> None:
    for name, granted, posted, held, sequence, head in store.rows(
        "SELECT name, granted, posted, held, sequence, head FROM accounts ORDER BY name"
    ):
        books = last[name]
        replayed = (-books.book["issuer"], books.book["posted"], books.book["held"], books.sequence, books.head)
        if replayed != (granted, posted, held, sequence, bytes(head)):
            report.find(
                f"account {name}: its row says granted {granted}, posted {posted}, held {held}, last entry {sequence}; "
                f"the journal adds up to {replayed[0]}, {replayed[1]}, {replayed[2]}, {replayed[3]}"
            )
        open_in_table = dict(
            store.rows("SELECT batch_id, picture_count FROM holds WHERE account = {} AND state = 'held'", (name,))
        )
        if open_in_table != books.under_way:
            different = sorted(open_in_table.items() ^ books.under_way.items())[:5]
            report.find(f"account {name}: live holds differ from the journal's: {different}")
        report.live_holds += len(open_in_table)
    report.orphaned_holds = store.one(
        "SELECT count(*) FROM holds WHERE state = 'held' AND instance_id NOT IN (SELECT instance_id FROM instances)"
    )


def _compare_batches(store: "_Store", report: Report) -> None:
    """One post a key; a posted batch has its answer, and the answer is the one that was booked."""
    for account, batch_id, times in store.rows(
        "SELECT account, batch_id, count(*) FROM entries WHERE kind = 'post' GROUP BY account, batch_id HAVING count(*) > 1"
    ):
        report.find(f"account {account}: batch {batch_id} was posted {times} times")
    posts = store.one("SELECT count(*) FROM entries WHERE kind = 'post'")
    posted_rows = store.one("SELECT count(*) FROM holds WHERE state = 'posted'")
    if posts != posted_rows:
        report.find(f"{posted_rows} batches are marked as posted, the journal has {posts} posts")
    for account, batch_id in store.rows(
        "SELECT e.account, e.batch_id FROM entries e LEFT JOIN answers a "
        "ON a.account = e.account AND a.batch_id = e.batch_id WHERE e.kind = 'post' AND a.batch_id IS NULL"
    ):
        report.find(f"account {account}: batch {batch_id} was charged, but its answer is not kept")
    for account, batch_id in store.rows(
        "SELECT a.account, a.batch_id FROM answers a LEFT JOIN entries e "
        "ON e.account = a.account AND e.batch_id = a.batch_id AND e.kind = 'post' WHERE e.batch_id IS NULL"
    ):
        report.find(f"account {account}: batch {batch_id} has an answer that was never charged")


class _Store:
    """Plain SQL over the store's own driver, in one read-only view of it."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> "_Store":
        if self._url.startswith("sqlite:///"):
            path = Path(self._url.removeprefix("sqlite:///"))
            if not path.is_file():
                raise AuditError(f"expected a ledger at {path}, found no file")
            self._placeholder = "?"
            self._connection: Any = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
            try:
                self._connection.execute("BEGIN")
                self.one("SELECT count(*) FROM accounts")
            except sqlite3.DatabaseError as error:
                raise AuditError(f"{path}: expected a ledger: {error}") from None
        elif self._url.startswith("postgresql://"):
            import psycopg

            self._placeholder = "%s"
            try:
                self._connection = psycopg.connect(self._url, autocommit=True)
                self._connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                self.one("SELECT count(*) FROM accounts")
            except psycopg.Error as error:
                raise AuditError(f"expected a ledger in that database: {' '.join(str(error).split())}") from None
        else:
            raise AuditError(f"expected sqlite:///FILE or postgresql://…, got {self._url!r}")
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def rows(self, query: str, values: tuple[object, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows of a query, in which {} stands for a value; a server-side cursor keeps large results out of memory."""
        text = query.replace("{}", self._placeholder)
        if self._placeholder == "?":
            cursor = self._connection.execute(text, values)
        else:
            cursor = self._connection.cursor(name="audit", withhold=False)
            cursor.itersize = _ROWS_AT_ONCE
            cursor.execute(text, values)
        try:
            yield from cursor
        finally:
            cursor.close()

    def one(self, query: str) -> int:
        """The one number a query gives."""
        return int(self._connection.execute(query).fetchone()[0])

    def names(self) -> list[tuple[str]]:
        """Every account that is anywhere on the books."""
        return list(
            self._connection.execute(
                "SELECT name FROM accounts UNION SELECT DISTINCT account FROM entries ORDER BY 1"
            )
        )

    def entries(self, name: str) -> Iterator[tuple[Any, ...]]:
        """One account's journal, oldest first."""
        return self.rows(
            "SELECT sequence, create_time_ms, kind, batch_id, run_id, picture_count, digest, head FROM entries "
            "WHERE account = {} ORDER BY sequence",
            (name,),
        )
