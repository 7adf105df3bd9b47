"""The auditor finds every kind of tampering, and finds nothing where there was none."""

import ast
import asyncio
import hashlib
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from teacher_service import audit
from teacher_service.audit import Receipt, verify
from teacher_service.ledger import Held, HoldRequest, now_ms
from teacher_service.ledger_sql import SqlLedger

HOUR_MS = 3_600_000


def wish(batch_id: str, count: int = 5, *, account: str = "a", run_id: str = "run") -> HoldRequest:
    digest = hashlib.sha256(batch_id.encode()).digest()
    return HoldRequest(account=account, batch_id=batch_id, run_id=run_id, digest=digest, picture_count=count)


async def traffic(url: str) -> list[Receipt]:
    """Every kind of step, on two accounts; nothing is left held. Returns the receipts."""
    receipts = []
    dead = SqlLedger.open(url, clock=lambda: now_ms() - HOUR_MS)
    await dead.create_account("a", 1000)
    await dead.create_account("b", 50)
    await dead.hold(wish("lost"))
    await dead.void("nobody", "nothing")  # the hold is on the disk
    ledger = SqlLedger.open(url)  # expires what the dead one held
    for name in ("a", "b"):
        for number in range(6):
            assert await ledger.hold(wish(f"{name}{number}", account=name)) == Held()
        for number in range(6):
            posted = await ledger.post(name, f"{name}{number}", b"answer %d" % number)
            receipts.append(Receipt(name, f"{name}{number}", posted.receipt.sequence, posted.receipt.head))
    await ledger.hold(wish("part", 8, run_id="other"))
    posted = await ledger.post("a", "part", b"some", 3)
    receipts.append(Receipt("a", "part", posted.receipt.sequence, posted.receipt.head))
    await ledger.hold(wish("voided"))
    await ledger.void("a", "voided")
    await ledger.hold(wish("twice"))
    await ledger.void("a", "twice")
    await ledger.hold(wish("twice"))
    posted = await ledger.post("a", "twice", b"at last")
    receipts.append(Receipt("a", "twice", posted.receipt.sequence, posted.receipt.head))
    await ledger.grant("a", 10)
    await ledger.close()
    await dead.close()
    return receipts


class Books:
    """A ledger with traffic, and somebody who may write to its store past the program."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.receipts = asyncio.run(traffic(url))

    def connect(self) -> Any:
        if self.url.startswith("sqlite"):
            return sqlite3.connect(self.url.removeprefix("sqlite:///"), isolation_level=None)
        return psycopg.connect(self.url, autocommit=True)

    def tamper(self, *statements: str) -> None:
        connection = self.connect()
        try:
            if self.url.startswith("sqlite"):
                connection.execute("DROP TRIGGER IF EXISTS entries_no_update")
                connection.execute("DROP TRIGGER IF EXISTS entries_no_delete")
                connection.execute("DROP TRIGGER IF EXISTS entries_no_replace")
                connection.execute("DROP INDEX IF EXISTS one_post_a_batch")
                connection.execute("DROP INDEX IF EXISTS one_grant_an_id")
                connection.execute("PRAGMA ignore_check_constraints = ON")
            else:
                connection.execute("ALTER TABLE entries DISABLE TRIGGER ALL")
                connection.execute("DROP INDEX IF EXISTS one_post_a_batch")
                connection.execute("DROP INDEX IF EXISTS one_grant_an_id")
            for statement in statements:
                connection.execute(statement)
        finally:
            connection.close()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        connection = self.connect()
        try:
            return list(connection.execute(query).fetchall())
        finally:
            connection.close()

    def chain_anew(self, name: str = "a") -> None:
        """Writes every number and head of an account anew, so that the journal agrees with itself again."""
        head, sequence = bytes(32), 0
        statements = []
        for number, time_ms, kind, batch_id, run_id, count, digest in self.rows(
            "SELECT sequence, create_time_ms, kind, batch_id, run_id, picture_count, digest FROM entries "
            f"WHERE account = '{name}' ORDER BY sequence"
        ):
            sequence += 1
            line = f"{name}|{sequence}|{time_ms}|{kind}|{batch_id}|{run_id}|{count}|{bytes(digest).hex()}"
            head = hashlib.sha256(head + line.encode()).digest()
            where = f"account = '{name}' AND sequence = {number}"
            statements.append(f"UPDATE entries SET sequence = {sequence}, head = {self.blob(head)} WHERE {where}")
            if kind == "post":
                where = f"account = '{name}' AND batch_id = '{batch_id}'"
                statements.append(f"UPDATE answers SET sequence = {sequence}, head = {self.blob(head)} WHERE {where}")
        statements.append(
            f"UPDATE accounts SET sequence = {sequence}, head = {self.blob(head)} WHERE name = '{name}'"
        )
        self.tamper(*statements)

    def blob(self, value: bytes) -> str:
        return f"x'{value.hex()}'" if self.url.startswith("sqlite") else f"'\\x{value.hex()}'"

    def add(self, kind: str, batch_id: str, count: int, run_id: str = "run", name: str = "a") -> None:
        """One entry more at the end, well numbered and chained."""
        self.tamper(
            "INSERT INTO entries SELECT name, sequence + 1, 1, "
            f"'{kind}', '{batch_id}', '{run_id}', {count}, {self.blob(b'd' * 32)}, head FROM accounts "
            f"WHERE name = '{name}'"
        )
        self.chain_anew(name)


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(f"sqlite:///{tmp_path}/ledger.db")


@pytest.fixture
def postgres_books(postgres_url: str) -> Books:
    return Books(postgres_url)


def assert_clean(books: Books) -> None:
    report = verify(books.url, books.receipts)
    assert report.findings == []
    assert (report.accounts, report.entries, report.receipts) == (2, 38, 14)
    assert (report.granted_pictures, report.posted_pictures) == (1060, 68)
    assert (report.live_holds, report.orphaned_holds) == (0, [])


def test_books_after_every_kind_of_step_agree(books: Books) -> None:
    assert_clean(books)


def test_books_on_postgresql_agree(postgres_books: Books) -> None:
    assert_clean(postgres_books)


def test_without_receipts_it_says_what_it_cannot_know(books: Books) -> None:
    assert "2 of 2 accounts have no receipt" in verify(books.url).unknown[0]
    only_a = [receipt for receipt in books.receipts if receipt.account == "a"]
    unknown = verify(books.url, only_a).unknown
    assert "1 of 2 accounts have no receipt" in unknown[0]
    assert "1 entries come after their account's last receipt" in unknown[1]  # the last grant
    last_b = max(receipt.sequence for receipt in books.receipts if receipt.account == "b")
    assert last_b == 13
    assert len(verify(books.url, books.receipts).unknown) == 1


# Each: what is done to the store, and what the auditor must say. None of them needs receipts.
TAMPERINGS: dict[str, tuple[Callable[[Books], None], str]] = {
    "changed count": (
        lambda b: b.tamper("UPDATE entries SET picture_count = 4 WHERE account = 'a' AND sequence = 10"),
        "account a, entry 10: the chain is broken",
    ),
    "changed kind": (
        lambda b: b.tamper("UPDATE entries SET kind = 'void' WHERE batch_id = 'a3' AND kind = 'post'"),
        "the chain is broken",
    ),
    "changed time": (
        lambda b: b.tamper("UPDATE entries SET create_time_ms = 7 WHERE account = 'b' AND sequence = 1"),
        "account b, entry 1: the chain is broken",
    ),
    "changed run": (
        lambda b: b.tamper("UPDATE entries SET run_id = 'mine' WHERE batch_id = 'a3'"),
        "the chain is broken",
    ),
    "id and run with the border moved": (
        lambda b: (
            b.tamper("UPDATE entries SET batch_id = 'b', run_id = '0|run' WHERE batch_id = 'b0'"),
            b.chain_anew("b"),
        ),
        "plain ids",
    ),
    "one grant made twice": (
        lambda b: (
            b.add("grant", "order-7", 5, run_id=""),
            b.add("grant", "order-7", 5, run_id=""),
            b.tamper("UPDATE accounts SET granted = granted + 10 WHERE name = 'a'"),
        ),
        "account a: grant id order-7 was granted more than once",
    ),
    "unknown kind": (
        lambda b: (b.tamper("UPDATE entries SET kind = 'gift' WHERE batch_id = 'voided'"), b.chain_anew()),
        "expected a known kind",
    ),
    "entry deleted in the middle": (
        lambda b: b.tamper("DELETE FROM entries WHERE account = 'a' AND sequence = 10"),
        "expected entry 10 here; entries are missing",
    ),
    "entry deleted in the middle and the rest chained anew": (
        lambda b: (b.tamper("DELETE FROM entries WHERE batch_id = 'a3' AND kind = 'hold'"), b.chain_anew()),
        "does not fit its hold of 0",
    ),
    "end cut off": (
        lambda b: b.tamper("DELETE FROM entries WHERE account = 'a' AND sequence > 20"),
        "an end was cut off",
    ),
    "whole journal cut off": (
        lambda b: b.tamper("DELETE FROM entries"),
        "account b: its row ends with entry 13",
    ),
    "double post": (
        lambda b: (
            b.add("hold", "a3", 5),
            b.add("post", "a3", 5),
            b.tamper("UPDATE accounts SET posted = posted + 5 WHERE name = 'a'"),
        ),
        "batch a3 was posted more than once",
    ),
    "post without a hold": (lambda b: b.add("post", "gift", 5), "does not fit its hold of 0"),
    "post of more than was held": (
        lambda b: (b.add("hold", "much", 5), b.add("post", "much", 6)),
        "post of 6 for batch much of run run does not fit its hold of 5",
    ),
    "held again after the post": (
        lambda b: (b.add("hold", "a3", 5), b.add("void", "a3", 5)),
        "batch a3 was posted, and held again after that",
    ),
    "held twice at once": (lambda b: (b.add("hold", "n", 5), b.add("hold", "n", 5)), "batch n is held twice at once"),
    "rest of a partial post kept": (
        lambda b: (b.tamper("DELETE FROM entries WHERE batch_id = 'part' AND kind = 'void'"), b.chain_anew()),
        "expected batch part to give back 5 here",
    ),
    "negative balance": (
        lambda b: (
            b.add("hold", "big", 2000),
            b.tamper("UPDATE accounts SET held = held + 2000 WHERE name = 'a'"),
        ),
        "overspent: available -",
    ),
    "account row edited": (
        lambda b: b.tamper("UPDATE accounts SET granted = granted + 1000 WHERE name = 'a'"),
        "its row says granted 2010, posted 38, held 0; the journal adds up to 1010, 38, 0",
    ),
    "account row and journal head edited": (
        lambda b: b.tamper("UPDATE accounts SET head = zeroblob(32) WHERE name = 'a'"),
        "account a: its row ends with entry 25",
    ),
    "account removed": (
        lambda b: b.tamper("DELETE FROM accounts WHERE name = 'b'"),
        "account b: has a journal, and no row among the accounts",
    ),
    "answer swapped": (
        lambda b: b.tamper("UPDATE answers SET answer = x'00' WHERE batch_id = 'a3'"),
        "the answer of batch a3 is not the one that was booked",
    ),
    "answers exchanged": (
        lambda b: b.tamper(
            "UPDATE answers SET answer = CASE batch_id WHEN 'a1' THEN CAST('answer 2' AS BLOB) "
            "ELSE CAST('answer 1' AS BLOB) END WHERE batch_id IN ('a1', 'a2')"
        ),
        "the answer of batch a1 is not the one that was booked",
    ),
    "answer deleted": (
        lambda b: b.tamper("DELETE FROM answers WHERE batch_id = 'a3'"),
        "batch a3 was charged, and its answer is not kept",
    ),
    "answer deleted after those that were pruned": (
        lambda b: (prune(b, "a2"), b.tamper("DELETE FROM answers WHERE batch_id = 'a3'")),
        "batch a3 was charged, and its answer is not kept",
    ),
    "answer kept though pruned": (
        lambda b: b.tamper(f"UPDATE accounts SET pruned_sequence = {post_of(b, 'a1')} WHERE name = 'a'"),
        "the answer of batch a1 was pruned, and is kept all the same",
    ),
    "more answers pruned than there are entries": (
        lambda b: (prune(b, "twice"), b.tamper("UPDATE accounts SET pruned_sequence = 26 WHERE name = 'a'")),
        "its row says that answers are kept after entry 26, its journal ends with 25",
    ),
    "answer given away": (
        lambda b: b.tamper("INSERT INTO answers VALUES ('a', 'voided', x'00', 3, zeroblob(32))"),
        "batch voided has an answer that was never charged",
    ),
    "kept receipt edited": (
        lambda b: b.tamper("UPDATE answers SET head = zeroblob(32) WHERE batch_id = 'a3'"),
        "the receipt of batch a3 is not the journal's",
    ),
    "hold's state edited": (
        lambda b: b.tamper("UPDATE holds SET state = 'voided' WHERE batch_id = 'a3'"),
        "batch a3 is voided, 5 pictures",
    ),
    "hold's digest edited": (
        lambda b: b.tamper("UPDATE holds SET digest = x'00' WHERE batch_id = 'a3'"),
        "batch a3 is posted",
    ),
    "holds' digests exchanged": (
        lambda b: b.tamper(
            "UPDATE holds SET digest = (SELECT digest FROM holds o WHERE o.batch_id = "
            "CASE holds.batch_id WHEN 'a1' THEN 'a2' ELSE 'a1' END) WHERE batch_id IN ('a1', 'a2')"
        ),
        "digest",
    ),
    "hold's count edited": (
        lambda b: b.tamper("UPDATE holds SET picture_count = 4 WHERE batch_id = 'voided'"),
        "the journal says voided, 5 of run",
    ),
    "hold deleted": (
        lambda b: b.tamper("DELETE FROM holds WHERE batch_id = 'a3'"),
        "batch a3 is posted by the journal, without a row of holds",
    ),
    "hold from nowhere": (
        lambda b: b.tamper("INSERT INTO holds VALUES ('a', 'new', 'run', x'00', 5, 'held', 'nobody')"),
        "batch new is on the table of holds, not in the journal",
    ),
    "hold of no account": (
        lambda b: b.tamper("INSERT INTO holds VALUES ('c', 'new', 'run', x'00', 5, 'held', 'nobody')"),
        "account c: has holds or answers, and no row among the accounts",
    ),
}


def post_of(books: Books, batch_id: str) -> int:
    return next(receipt.sequence for receipt in books.receipts if receipt.batch_id == batch_id)


def prune(books: Books, batch_id: str) -> None:
    """The answers of account "a" up to a batch's are no longer kept, and the books say so."""
    sequence = post_of(books, batch_id)
    books.tamper(
        f"DELETE FROM answers WHERE account = 'a' AND sequence <= {sequence}",
        f"UPDATE accounts SET pruned_sequence = {sequence} WHERE name = 'a'",
    )


@pytest.mark.parametrize("store", ["books", "postgres_books"])
def test_answers_that_the_books_say_were_pruned_are_no_finding(request: pytest.FixtureRequest, store: str) -> None:
    books = request.getfixturevalue(store)
    for batch_id, count in (("a0", 1), ("a2", 3), ("twice", 8)):
        prune(books, batch_id)
        report = verify(books.url, books.receipts)
        assert (report.findings, report.pruned_answers) == ([], count)


@pytest.mark.parametrize("kind", sorted(TAMPERINGS))
def test_tampering_is_found(books: Books, kind: str) -> None:
    tamper, expected = TAMPERINGS[kind]
    tamper(books)
    findings = verify(books.url).findings
    assert any(expected in finding for finding in findings), findings


@pytest.mark.parametrize(
    "kind",
    [
        "changed count",
        "entry deleted in the middle",
        "end cut off",
        "double post",
        "hold deleted",
        "one grant made twice",
        "answer kept though pruned",
    ],
)
def test_tampering_is_found_on_postgresql(postgres_books: Books, kind: str) -> None:
    tamper, expected = TAMPERINGS[kind]
    tamper(postgres_books)
    findings = verify(postgres_books.url).findings
    assert any(expected in finding for finding in findings), findings


def cut_off(books: Books) -> None:
    """The last answers are forgotten everywhere, balances and all: no trace is left in the store."""
    books.tamper(
        "DELETE FROM entries WHERE account = 'b' AND sequence > 11",
        "DELETE FROM answers WHERE batch_id IN ('b4', 'b5')",
        "UPDATE holds SET state = 'held' WHERE batch_id IN ('b4', 'b5')",
        "UPDATE accounts SET posted = posted - 10, held = held + 10 WHERE name = 'b'",
    )
    books.chain_anew("b")


def rewritten(books: Books) -> None:
    """An answer becomes a void, and the whole chain is made anew."""
    books.tamper(
        f"UPDATE entries SET kind = 'void', digest = {books.blob(b'')} WHERE batch_id = 'b2' AND kind = 'post'",
        "DELETE FROM answers WHERE batch_id = 'b2'",
        "UPDATE holds SET state = 'voided' WHERE batch_id = 'b2'",
        "UPDATE accounts SET posted = posted - 5 WHERE name = 'b'",
    )
    books.chain_anew("b")


@pytest.mark.parametrize(
    ("forge", "expected"),
    [
        (cut_off, "account b: receipts for 2 entries from 12 to 13 that the journal lacks; it ends at 11"),
        (rewritten, "account b, entry 10: the receipt of b2 says otherwise"),
    ],
)
@pytest.mark.parametrize("store", ["books", "postgres_books"])
def test_a_perfect_forgery_is_found_by_receipts_and_only_by_them(
    request: pytest.FixtureRequest, store: str, forge: Callable[[Books], None], expected: str
) -> None:
    books = request.getfixturevalue(store)
    forge(books)
    without = verify(books.url)
    assert without.findings == []
    assert "cannot be known" in without.unknown[0]
    findings = verify(books.url, books.receipts).findings
    assert any(expected in finding for finding in findings), findings


def test_a_receipt_of_an_unknown_account_is_found(books: Books) -> None:
    findings = verify(books.url, [Receipt("c", "x", 1, bytes(32))]).findings
    assert findings == ["account c: 1 receipts, and no such account"]


async def test_live_and_orphaned_holds_are_told_apart_and_are_no_faults(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    ledger = SqlLedger.open(url)
    await ledger.create_account("a", 100)
    await ledger.hold(wish("live"))
    await ledger.void("nobody", "nothing")
    report = await asyncio.to_thread(verify, url)
    assert (report.findings, report.live_holds, report.orphaned_holds) == ([], 1, [])
    Books.tamper(_of(url), "UPDATE instances SET lease_until_ms = 0")
    report = await asyncio.to_thread(verify, url)
    assert (report.findings, report.live_holds) == ([], 1)
    assert report.orphaned_holds == ["account a: batch live, 5 pictures"]
    await ledger.close()


def _of(url: str) -> Books:
    books = Books.__new__(Books)
    books.url = url
    return books


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_it_agrees_at_every_moment_while_a_server_writes(
    request: pytest.FixtureRequest, tmp_path: Path, store: str
) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db" if store == "sqlite" else request.getfixturevalue("postgres_url")
    stop = threading.Event()

    async def write() -> None:
        ledger = SqlLedger.open(url)
        await ledger.create_account("a", 10**9)
        number = 0

        async def work(lane: int) -> None:
            nonlocal number
            while not stop.is_set():
                number += 1
                batch = wish(f"{lane}-{number}")
                await ledger.hold(batch)
                if number % 5:
                    await ledger.post("a", batch.batch_id, b"answer", 3 if number % 7 == 0 else None)
                else:
                    await ledger.void("a", batch.batch_id)

        await asyncio.gather(*(work(lane) for lane in range(16)))
        await ledger.close()

    writer = threading.Thread(target=asyncio.run, args=(write(),))
    asyncio.run(SqlLedger.open(url).close())
    writer.start()
    try:
        entries = []
        while len(entries) < 6 or entries[-1] < 100:
            report = verify(url)
            assert report.findings == []
            entries.append(report.entries)
        assert entries[0] < entries[-1]
    finally:
        stop.set()
        writer.join()
    assert verify(url).findings == []


# --- what cannot be read ---


@pytest.mark.parametrize("content", [b"", b"text" * 2000])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger.db").write_bytes(content)
    with pytest.raises(audit.AuditError, match="expected a ledger"):
        verify(f"sqlite:///{tmp_path}/ledger.db")


def test_other_urls_and_missing_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(audit.AuditError, match="found no file"):
        verify(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(audit.AuditError, match="expected the ledger's own store"):
        verify("grpc://127.0.0.1:1")
    with pytest.raises(audit.AuditError, match="expected a ledger"):
        verify("postgresql://nobody@127.0.0.1:1/none")


def test_a_torn_page_is_an_error_and_no_verdict(tmp_path: Path) -> None:
    books = Books(f"sqlite:///{tmp_path}/ledger.db")
    (page,) = books.rows("SELECT rootpage FROM sqlite_master WHERE name = 'answers'")
    with (tmp_path / "ledger.db").open("r+b") as file:
        file.seek((page[0] - 1) * 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(audit.AuditError, match="malformed"):
        verify(books.url)


def test_a_ledger_on_a_medium_that_cannot_be_written_is_read() -> None:
    code = (
        "import os, sys\n"
        "from teacher_service.audit import verify\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "report = verify(sys.argv[1]); print(report.findings, report.entries)\n"
    )
    with tempfile.TemporaryDirectory() as name:  # not pytest's, which another user may not enter
        folder = Path(name)
        books = Books(f"sqlite:///{folder}/ledger.db")
        before = sorted(folder.iterdir())
        (folder / "ledger.db").chmod(0o444)
        folder.chmod(0o555)
        done = subprocess.run([sys.executable, "-c", code, books.url], capture_output=True, text=True, timeout=60)
        folder.chmod(0o755)
        assert done.stdout == "[] 38\n", done.stderr
        assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "line",
    [
        "text",
        "[]",
        '{"account": "a", "batch_id": "b", "sequence": 1}',
        '{"account": "a", "batch_id": "b", "sequence": "1", "head": "00"}',
        '{"account": "a", "batch_id": "b", "sequence": 1, "head": "00"}',
        '{"account": "a", "batch_id": "b", "sequence": true, "head": "%s"}' % ("00" * 32),
    ],
)
def test_receipts_that_are_none_are_refused_by_line(tmp_path: Path, line: str) -> None:
    good = '{"account": "a", "batch_id": "b", "sequence": 1, "head": "%s"}' % ("00" * 32)
    (tmp_path / "receipts").write_text(f"{good}\n{line}\n")
    with pytest.raises(audit.AuditError, match="line 2: expected an object"):
        list(audit.read_receipts(tmp_path / "receipts"))


def test_more_than_a_hundred_findings_are_counted_no_further(books: Books) -> None:
    books.tamper(
        "UPDATE entries SET create_time_ms = 1", "DELETE FROM answers", "DELETE FROM holds", "DELETE FROM keys"
    )
    books.tamper(*(f"INSERT INTO answers VALUES ('a', 'x{n}', x'', 1, x'')" for n in range(100)))
    findings = verify(books.url).findings
    assert len(findings) == 101
    assert findings[-1] == "… and more"


def modules_imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module or ""


def test_the_auditor_shares_no_code_with_the_writer() -> None:
    imported = {name.partition(".")[0] for name in modules_imported(ast.parse(Path(audit.__file__).read_text()))}
    assert imported <= set(sys.stdlib_module_names) | {"psycopg"}
