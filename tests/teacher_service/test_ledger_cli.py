"""``teacher-admin ledger``: what an operator types, reads and gets as exit status."""

import asyncio
import csv
import hashlib
import io
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from teacher_service import audit, ledger_files
from teacher_service.admin_cli import admin
from teacher_service.audit import Store, verify
from teacher_service.auth import new_key
from teacher_service.ledger import HoldRequest, now_ms
from teacher_service.ledger_sql import SqlLedger
from teacher_service.terms import Terms


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


def run(url: str, *arguments: object) -> Result:
    return CliRunner().invoke(admin, ["--ledger", url, "ledger", *map(str, arguments)])


def wish(batch_id: str, count: int = 5) -> HoldRequest:
    return HoldRequest(account="a", batch_id=batch_id, run_id="run", digest=b"d" * 32, picture_count=count)


async def charge(ledger: SqlLedger, *batch_ids: str) -> list[dict[str, Any]]:
    """Posts batches; returns their receipts as an agent prints them."""
    receipts = []
    for batch_id in batch_ids:
        await ledger.hold(wish(batch_id))
        posted = await ledger.post("a", batch_id, batch_id.encode())
        found = posted.receipt
        row = {"account": "a", "batch_id": batch_id, "sequence": found.sequence, "head": found.head.hex()}
        receipts.append(row)
    return receipts


@contextmanager
def served(url: str, **settings: Any) -> Iterator[tuple[SqlLedger, asyncio.Runner]]:
    with asyncio.Runner() as runner:
        ledger = SqlLedger.open(url, **settings)
        try:
            yield ledger, runner
        finally:
            runner.run(ledger.close())


def made(url: str, *batch_ids: str) -> list[dict[str, Any]]:
    """A ledger with one account and a few posts."""
    with served(url) as (ledger, runner):
        runner.run(ledger.create_account("a", 1000, new_key("a")[1]))
        return runner.run(charge(ledger, *batch_ids))


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- verify ---


def test_verify_of_good_books_ends_with_0_and_says_what_it_cannot_know(url: str, tmp_path: Path) -> None:
    receipts = lines(tmp_path / "receipts", made(url, "x", "y"))
    plain = run(url, "verify")
    assert plain.exit_code == 0, plain.output
    assert plain.output.startswith("1 accounts, 5 entries, 1000 pictures granted, 10 posted; 0 receipts; ")
    assert "cannot be known: 1 of 1 accounts have no receipt here" in plain.output
    assert plain.output.endswith("the books agree\n")
    proved = run(url, "verify", "--receipts", receipts)
    assert proved.exit_code == 0, proved.output
    assert "cannot be known" not in proved.output


def test_verify_of_forged_books_ends_with_1_and_names_the_entry(url: str, path: Path, tmp_path: Path) -> None:
    receipts = lines(tmp_path / "receipts", made(url, "x", "y"))
    connection = sqlite3.connect(path)
    connection.executescript(
        "DROP TRIGGER entries_no_update; UPDATE entries SET picture_count = 4 WHERE sequence = 2"
    )
    connection.close()
    found = run(url, "verify", "--receipts", receipts)
    assert found.exit_code == 1
    assert "FOUND: account a, entry 2: the chain is broken" in found.output
    assert found.output.endswith("the books do NOT agree\n")
    as_json = run(url, "verify", "--format", "json")
    assert as_json.exit_code == 1
    report = json.loads(as_json.output)
    assert report["agrees"] is False
    assert report["findings"][0].startswith("account a, entry 2")
    assert (report["entries"], report["receipts"]) == (5, 0)


def test_verify_of_what_cannot_be_read_ends_with_2(url: str, tmp_path: Path) -> None:
    none = run(url, "verify")
    assert (none.exit_code, none.output) == (2, f"error: expected a ledger at {tmp_path}/ledger.db, found no file\n")
    made(url)
    receipts = tmp_path / "receipts"
    assert run(url, "verify", "--receipts", receipts).exit_code == 2
    receipts.write_text("nonsense\n")
    bad = run(url, "verify", "--receipts", receipts)
    assert bad.exit_code == 2
    assert "line 1: expected an object with account, batch_id, sequence and head" in bad.output


# --- export ---


def test_export_holds_all_that_the_chain_is_made_of(url: str) -> None:
    made(url, "x", "y")
    with served(url) as (ledger, runner):
        runner.run(ledger.create_account("b", 7))
    rows = [json.loads(line) for line in run(url, "export", "--format", "jsonl").output.splitlines()]
    assert [row["account"] for row in rows] == ["a"] * 5 + ["b"]
    head = bytes(32)
    for row in rows[:5]:
        fields = ("account", "sequence", "create_time_ms", "kind", "batch_id", "run_id", "picture_count", "digest")
        head = hashlib.sha256(head + "|".join(str(row[name]) for name in fields).encode()).digest()
        assert row["head"] == head.hex()
    assert (rows[1]["debit_book"], rows[1]["credit_book"]) == ("available", "held")
    table = list(csv.DictReader(io.StringIO(run(url, "export", "a", "--format", "csv").output)))
    assert table == [{name: str(value) for name, value in row.items()} for row in rows[:5]]


def test_export_of_an_unknown_account_is_refused(url: str) -> None:
    made(url)
    found = run(url, "export", "nobody", "--format", "csv")
    assert (found.exit_code, "expected the name of an account" in found.output) == (2, True)


def test_verify_and_export_write_nothing(url: str, path: Path) -> None:
    made(url, "x")
    before = path.read_bytes()
    run(url, "verify")
    run(url, "export", "--format", "csv")
    assert path.read_bytes() == before


# --- backup ---


def test_backup_under_load_is_one_moment_of_the_books_and_restores(url: str, tmp_path: Path) -> None:
    stop = threading.Event()
    posted: list[dict[str, Any]] = []

    async def write() -> None:
        ledger = SqlLedger.open(url)

        async def work(lane: int) -> None:
            number = 0
            while not stop.is_set():
                posted.extend(await charge(ledger, f"{lane}-{number}"))
                number += 1

        await asyncio.gather(*(work(lane) for lane in range(16)))
        await ledger.close()

    with served(url) as (ledger, runner):
        runner.run(ledger.create_account("a", 10**9))
    writer = threading.Thread(target=asyncio.run, args=(write(),))
    writer.start()
    try:
        for number in range(3):
            before = len(posted)
            while len(posted) < before + 50 and writer.is_alive():
                pass
            told = list(posted)
            done = run(url, "backup", tmp_path / f"backup-{number}")
            assert done.exit_code == 0, done.output
            receipts = lines(tmp_path / "receipts", told)  # whatever was told before it began is in it
            assert run(f"sqlite:///{tmp_path}/backup-{number}", "verify", "--receipts", receipts).exit_code == 0
    finally:
        stop.set()
        writer.join()
    backup = tmp_path / "backup-2"
    assert backup.stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("*.partial*"))
    entries = verify(f"sqlite:///{backup}").entries
    new = f"sqlite:///{tmp_path}/elsewhere.db"
    assert run(new, "restore", backup).exit_code == 0
    # The server of the backup is gone: its lease lapses, and its holds come back.
    with served(new, clock=lambda: now_ms() + 60_000) as (ledger, runner):
        runner.run(charge(ledger, "after"))
    report = verify(new)
    assert (report.findings, report.live_holds) == ([], 0)
    assert report.entries >= entries + 2


def test_backup_replaces_a_file_only_when_told(url: str, tmp_path: Path) -> None:
    made(url, "x")
    target = tmp_path / "backup"
    target.write_text("mine")
    refused = run(url, "backup", target)
    assert (refused.exit_code, target.read_text()) == (2, "mine")
    assert "exists; give another, or --force" in refused.output
    assert run(url, "backup", target, "--force").exit_code == 0
    assert verify(f"sqlite:///{target}").entries == 3


def test_two_backups_to_one_file_do_not_mix(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(url, "x")
    target, second = tmp_path / "backup", []
    verified = audit.verify

    def meanwhile(store: str) -> audit.Report:
        monkeypatch.setattr(audit, "verify", verified)
        report = verified(store)
        second.append(run(url, "backup", target))
        return report

    monkeypatch.setattr(audit, "verify", meanwhile)
    assert run(url, "backup", target).exit_code == second[0].exit_code == 0
    assert not list(tmp_path.glob("*.partial*"))
    assert verify(f"sqlite:///{target}").entries == 3


def test_backup_never_replaces_a_ledger_in_use(url: str, path: Path, tmp_path: Path) -> None:
    made(url, "x")
    other = f"sqlite:///{tmp_path}/other.db"
    made(other, "x")
    refused = run(url, "backup", path, "--force")
    assert (refused.exit_code, "expected another file than the ledger's own" in refused.output) == (2, True)
    with served(other) as (ledger, runner):
        refused = run(url, "backup", tmp_path / "other.db", "--force")
        assert (refused.exit_code, "is a ledger in use" in refused.output) == (2, True)
        runner.run(charge(ledger, "y"))
    assert verify(other).entries == 5
    assert run(url, "backup", tmp_path / "other.db", "--force").exit_code == 0
    assert verify(other).entries == 3


def test_backup_of_forged_books_is_refused(url: str, path: Path, tmp_path: Path) -> None:
    made(url, "x")
    connection = sqlite3.connect(path)
    connection.execute("UPDATE accounts SET granted = 5000")
    connection.commit()
    connection.close()
    refused = run(url, "backup", tmp_path / "backup")
    assert refused.exit_code == 2
    assert "books do not agree" in refused.output
    assert sorted(tmp_path.glob("backup*")) == []


def test_backup_to_nowhere_and_of_other_stores_is_refused(url: str, tmp_path: Path) -> None:
    made(url)
    assert "No such file or directory" in run(url, "backup", tmp_path / "none" / "backup").output
    found = run("postgresql://u@127.0.0.1/d", "backup", tmp_path / "backup")
    assert (found.exit_code, "pg_dump" in found.output) == (2, True)
    assert run(f"{url}x", "backup", tmp_path / "backup").exit_code == 2


def test_books_beyond_loopback_are_not_read_over_a_way_of_which_nobody_said_how_it_is_protected() -> None:
    found = run("postgresql://u:secret@db.example/d", "verify")
    assert found.exit_code == 2
    assert "db.example is not loopback: add ?sslmode=verify-full" in found.output and "secret" not in found.output


# --- restore ---


def test_restore_to_an_empty_place(url: str, tmp_path: Path) -> None:
    receipts = made(url, "x", "y")
    run(url, "backup", tmp_path / "backup")
    new = f"sqlite:///{tmp_path}/new.db"
    done = run(new, "restore", tmp_path / "backup")
    assert (done.exit_code, done.output) == (0, "restored 1 accounts and 5 entries\n")
    assert run(new, "verify", "--receipts", lines(tmp_path / "receipts", receipts)).exit_code == 0
    assert (tmp_path / "new.db").stat().st_mode & 0o777 == 0o600


def test_restore_of_what_is_no_backup_names_it(url: str, tmp_path: Path) -> None:
    made(url, "x")
    (tmp_path / "key").write_text("mekd_0123456789abcdef" * 100)
    refused = run(url, "restore", tmp_path / "key")
    assert refused.exit_code == 2 and f"expected a backup in {tmp_path}/key: file is not a database" in refused.output
    assert verify(url).entries == 3


def test_restore_that_would_lose_something_says_what_and_needs_force(url: str, tmp_path: Path) -> None:
    receipts = made(url, "x")
    with served(url) as (ledger, runner):
        runner.run(ledger.add_key(new_key("a")[1]))
        later = runner.run(ledger.keys("a"))[1].key_id
    run(url, "backup", tmp_path / "backup")
    with served(url) as (ledger, runner):
        receipts += runner.run(charge(ledger, "late", "later"))
        runner.run(ledger.create_account("b", 9, new_key("b")[1]))
        runner.run(ledger.revoke_key(later))
        runner.run(ledger.set_terms("a", Terms(answers="hard")))
        made_later = runner.run(ledger.keys("b"))[0].key_id
    refused = run(url, "restore", tmp_path / "backup")
    assert refused.exit_code == 2
    lost = [
        "account a: 4 entries after 3, with 2 answers of 10 pictures that would be charged to nobody",
        "account b: 1 entries after 0, with 0 answers of 0 pictures that would be charged to nobody",
        'account a: terms {"answers": "hard"}, would be {} again',
        f"key {later}: revoked after the backup, would be valid again",
        f"key {made_later}: made after the backup, would be gone",
    ]
    assert all(line in refused.output for line in lost), refused.output
    assert "--force goes back all the same" in refused.output
    assert verify(url).entries == 8
    done = run(url, "restore", tmp_path / "backup", "--force")
    assert done.exit_code == 0, done.output
    assert all(f"undone: {line}" in done.output for line in lost)
    # The receipts name what was lost, and the old ledger is still there.
    proof = run(url, "verify", "--receipts", lines(tmp_path / "receipts", receipts))
    assert proof.exit_code == 1
    assert "receipts for 2 entries from 5 to 7 that the journal lacks; it ends at 3" in proof.output
    assert "batches late, later" in proof.output
    (kept,) = tmp_path.glob("ledger.db.before-restore-*")
    assert run(f"sqlite:///{kept}", "verify", "--receipts", tmp_path / "receipts").exit_code == 0
    # And after new traffic at the same numbers they still do.
    with served(url) as (ledger, runner):
        runner.run(charge(ledger, "other", "others"))
    proof = run(url, "verify", "--receipts", tmp_path / "receipts")
    assert "entry 5: the receipt of late says otherwise" in proof.output


def test_restore_of_the_same_or_an_older_ledger_needs_no_force(url: str, tmp_path: Path) -> None:
    made(url, "x")
    run(url, "backup", tmp_path / "old")
    with served(url) as (ledger, runner):
        runner.run(charge(ledger, "y"))
    run(url, "backup", tmp_path / "new")
    assert run(url, "restore", tmp_path / "new").exit_code == 0
    assert run(url, "restore", tmp_path / "old", "--force").exit_code == 0
    assert run(url, "restore", tmp_path / "new").exit_code == 0
    assert verify(url).entries == 5


def test_restore_over_another_history_is_told(url: str, tmp_path: Path) -> None:
    made(url, "x")
    made(f"sqlite:///{tmp_path}/other.db", "x", "y")
    run(f"sqlite:///{tmp_path}/other.db", "backup", tmp_path / "backup")
    refused = run(url, "restore", tmp_path / "backup")
    assert refused.exit_code == 2
    assert "account a: the two journals part before entry 5 of the backup" in refused.output


def test_a_ledger_in_use_is_never_replaced(url: str, tmp_path: Path) -> None:
    made(url, "x")
    run(url, "backup", tmp_path / "backup")
    with served(url) as (ledger, runner):
        for force in ((), ("--force",)):
            refused = run(url, "restore", tmp_path / "backup", *force)
            assert (refused.exit_code, "is in use" in refused.output) == (2, True), refused.output
        runner.run(charge(ledger, "y"))
    assert verify(url).entries == 5
    assert not list(tmp_path.glob("*.partial*"))


def test_what_is_restored_has_the_entries_that_stood_in_the_backups_log(url: str, path: Path, tmp_path: Path) -> None:
    made(url, "x")
    with served(url) as (ledger, runner):
        runner.run(charge(ledger, "y", "z"))
        for ending in ("", "-wal"):  # as they lie there after a crash
            shutil.copy(f"{path}{ending}", tmp_path / f"crashed{ending}")
    assert (tmp_path / "crashed-wal").stat().st_size > 0
    done = run(f"sqlite:///{tmp_path}/new.db", "restore", tmp_path / "crashed")
    assert (done.exit_code, done.output) == (0, "restored 1 accounts and 7 entries\n")
    assert verify(f"sqlite:///{tmp_path}/new.db").entries == 7


def test_a_log_that_another_ledger_left_is_never_replayed_into_a_restored_one(
    url: str, path: Path, tmp_path: Path
) -> None:
    made(url, "x")
    run(url, "backup", tmp_path / "backup")
    with served(url) as (ledger, runner):
        runner.run(charge(ledger, "y"))
        shutil.copy(f"{path}-wal", tmp_path / "left")
    path.rename(tmp_path / "moved")
    shutil.copy(tmp_path / "left", f"{path}-wal")
    refused = run(url, "restore", tmp_path / "backup", "--force")
    assert (refused.exit_code, "ledger.db-wal: it holds the last entries of a ledger" in refused.output) == (2, True)
    assert not path.exists() and not list(tmp_path.glob("*.partial*"))
    refused = run(f"sqlite:///{tmp_path}/moved", "backup", path)
    assert (refused.exit_code, "ledger.db-wal" in refused.output) == (2, True)
    Path(f"{path}-wal").unlink()
    assert run(url, "restore", tmp_path / "backup").exit_code == 0
    assert verify(url).entries == 3


def test_a_ledger_that_cannot_be_read_is_replaced_when_told(url: str, path: Path, tmp_path: Path) -> None:
    made(url, "x")
    run(url, "backup", tmp_path / "backup")
    path.write_bytes(b"no ledger any more" * 1000)
    refused = run(url, "restore", tmp_path / "backup")
    assert (refused.exit_code, "cannot be read" in refused.output) == (2, True)
    assert run(url, "restore", tmp_path / "backup", "--force").exit_code == 0
    assert verify(url).entries == 3
    (kept,) = tmp_path.glob("ledger.db.before-restore-*")
    assert kept.read_bytes().startswith(b"no ledger any more")


def test_a_backup_that_does_not_verify_is_not_restored(url: str, path: Path, tmp_path: Path) -> None:
    made(url, "x")
    shutil.copy(path, tmp_path / "backup")
    connection = sqlite3.connect(tmp_path / "backup")
    connection.execute("UPDATE accounts SET granted = 5000")
    connection.commit()
    connection.close()
    refused = run(url, "restore", tmp_path / "backup", "--force")
    assert (refused.exit_code, "do not agree" in refused.output) == (2, True)
    assert run(url, "restore", tmp_path / "none").exit_code == 2


def test_a_restored_ledger_is_one_whole_file_or_the_old_one(url: str, tmp_path: Path, monkeypatch: Any) -> None:
    made(url, "x")
    run(url, "backup", tmp_path / "backup")
    with served(url) as (ledger, runner):
        runner.run(charge(ledger, "y"))

    def fail(*_: object) -> None:
        raise OSError("no more room")

    monkeypatch.setattr(ledger_files.os, "replace", fail)
    refused = run(url, "restore", tmp_path / "backup", "--force")
    assert (refused.exit_code, "no more room" in refused.output) == (2, True)
    with Store(url) as store:
        assert store.one("SELECT count(*) FROM entries") == 5
    assert not list(tmp_path.glob("*.partial*"))
