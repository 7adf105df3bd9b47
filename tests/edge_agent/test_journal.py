import sqlite3
import subprocess
import sys

import pytest

from edge_agent.failures import DiskProblem, RunFolderProblem
from edge_agent.journal import FORMAT, Batch, Journal, Receipt


def batch(slot: int = 0, batch_id: str = "a", count: int = 3) -> Batch:
    return Batch(slot=slot, batch_id=batch_id, picture_count=count, request=b"request" * 10, latents=b"latents")


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "journal.db")
    yield opened
    opened.close()


def test_planned_batch_is_found_again_byte_for_byte_after_reopening(tmp_path):
    first = Journal.open(tmp_path / "journal.db")
    first.plan("distill", batch())
    run_id = first.run_id
    first.close()
    second = Journal.open(tmp_path / "journal.db")
    assert second.unanswered("distill") == [batch()]
    assert second.run_id == run_id
    second.close()


def test_every_commit_is_synced(journal):
    assert journal._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_answer_moves_a_batch_from_unanswered_to_answered_and_is_counted(journal):
    journal.plan("distill", batch())
    journal.keep_answer("a", answer=b"answer", charged_count=3, received_bytes=8)
    assert journal.unanswered("distill") == []
    assert [row.answer for row in journal.answered("distill")] == [b"answer"]
    totals = journal.totals("distill")
    assert (totals.planned_pictures, totals.charged_pictures) == (3, 3)
    assert (totals.sent_bytes, totals.received_bytes) == (70, 8)
    assert journal.charges() == {"a": 3}


def test_second_answer_to_a_batch_changes_nothing(journal):
    journal.plan("distill", batch())
    journal.keep_answer("a", answer=b"first", charged_count=3, received_bytes=8)
    journal.keep_answer("a", answer=b"second", charged_count=3, received_bytes=9)
    assert [row.answer for row in journal.answered("distill")] == [b"first"]
    assert journal.totals().received_bytes == 8


def test_repeats_count_towards_the_bytes_sent(journal):
    journal.plan("distill", batch())
    journal.count_repeat("a")
    assert journal.totals().sent_bytes == 140


def test_every_sending_counts_its_pictures_the_first_when_it_is_planned(journal):
    journal.plan("distill", batch())
    assert journal.totals().sent_pictures == 3
    journal.count_repeat("a")
    journal.count_repeat("a")
    assert journal.totals().sent_pictures == 9
    journal.plan("distill", batch(slot=1, batch_id="b", count=5))
    totals = journal.totals("distill")
    assert (totals.sent_pictures, totals.planned_pictures, totals.charged_pictures) == (14, 8, 0)


def test_bytes_count_as_they_travel_where_that_is_another_message(journal):
    journal.plan("distill", batch(), sent_bytes=1000)
    journal.count_repeat("a", sent_bytes=2000)
    assert journal.totals().sent_bytes == 3000


def test_pictures_sent_stay_counted_when_a_smaller_batch_takes_the_place(journal):
    journal.plan("distill", batch())
    journal.count_repeat("a")
    journal.replan("distill", "a", batch(batch_id="b", count=1), rest=batch(batch_id="c", count=2))
    assert journal.totals().sent_pictures == 6
    journal.count_repeat("b")
    assert journal.totals().sent_pictures == 7


@pytest.mark.parametrize("counted", ["plan", "count_repeat"])
def test_a_batch_and_its_sendings_survive_a_kill_right_after_the_call_returns(tmp_path, counted):
    repeat = 'journal.count_repeat("a")' if counted == "count_repeat" else "pass"
    script = f"""
import os, signal
from pathlib import Path
from edge_agent.journal import Batch, Journal
journal = Journal.open(Path({str(tmp_path / "journal.db")!r}))
journal.plan("distill", Batch(slot=0, batch_id="a", picture_count=3, request=b"request", latents=b""))
{repeat}
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], timeout=60)
    journal = Journal.open(tmp_path / "journal.db")
    assert [row.batch_id for row in journal.unanswered("distill")] == ["a"]
    assert journal.totals().sent_pictures == (6 if counted == "count_repeat" else 3)
    journal.close()


def test_position_and_id_are_taken_once(journal):
    journal.plan("distill", batch())
    with pytest.raises(sqlite3.IntegrityError):
        journal.plan("distill", batch(slot=0, batch_id="b"))
    with pytest.raises(sqlite3.IntegrityError):
        journal.plan("distill", batch(slot=1, batch_id="a"))


def test_replan_puts_a_smaller_batch_in_the_place_of_a_refused_one(journal):
    journal.plan("distill", batch())
    journal.replan("distill", "a", batch(batch_id="b", count=1), rest=batch(batch_id="c", count=2))
    assert [row.batch_id for row in journal.unanswered("distill")] == ["b"]
    assert journal.totals().planned_pictures == 1


def test_what_travelled_in_a_refused_batch_and_is_not_asked_again_stays_known(journal):
    journal.plan("distill", batch())
    journal.replan("distill", "a", batch(batch_id="b", count=1), rest=batch(batch_id="c", count=2))
    journal.replan("distill", "b", batch(batch_id="d", count=1), rest=None)
    assert journal.sent_ids() == {"a", "d"} and len(list(journal.requests())) == 2
    assert journal.totals().refused_pictures == journal.totals("distill").refused_pictures == 2
    assert journal.totals("deprivatize").refused_pictures == 0


def test_replan_never_drops_an_answered_batch(journal):
    journal.plan("distill", batch())
    journal.keep_answer("a", answer=b"paid", charged_count=3, received_bytes=1)
    with pytest.raises(sqlite3.IntegrityError):
        journal.replan("distill", "a", batch(batch_id="b", count=1), rest=batch(batch_id="c", count=2))
    assert journal.charges() == {"a": 3}


def test_phases_are_kept_apart(journal):
    journal.plan("deprivatize", batch(batch_id="a"))
    journal.plan("distill", batch(batch_id="b", count=5))
    assert journal.totals("deprivatize").planned_pictures == 3
    assert journal.totals().planned_pictures == 8
    assert journal.slots("distill") == 1 and journal.slots("adapt") == 0


def test_file_that_is_no_journal_is_one_line(tmp_path):
    (tmp_path / "journal.db").write_bytes(b"not a database at all, but long enough to be read as one" * 20)
    with pytest.raises(RunFolderProblem, match=r"^[^\n]*journal\.db[^\n]*$"):
        Journal.open(tmp_path / "journal.db")


def test_a_finished_journal_is_read_where_nothing_can_be_written_and_one_at_work_is_read_to_its_end(
    tmp_path, monkeypatch
):
    path = tmp_path / "journal.db"
    working = Journal.open(path)
    working.plan("distill", batch())
    monkeypatch.setattr("os.access", lambda *_: False)
    meanwhile = Journal.open(path, to_read=True)
    assert meanwhile.totals().planned_pictures == 3
    meanwhile.close()
    working.close()
    before = sorted(tmp_path.iterdir())
    finished = Journal.open(path, to_read=True)
    assert finished.totals().planned_pictures == 3 and sorted(tmp_path.iterdir()) == before == [path]
    finished.close()


def test_journal_of_another_format_is_refused(tmp_path):
    journal = Journal.open(tmp_path / "journal.db")
    journal.set_facts(format=99)
    journal.close()
    with pytest.raises(RunFolderProblem, match=f"format {FORMAT}, got 99"):
        Journal.open(tmp_path / "journal.db")


def test_receipt_is_kept_with_its_answer_and_only_the_first(journal):
    for slot, name in enumerate("abc"):
        journal.plan("distill", batch(slot, name))
    second = Receipt(account="device", sequence=9, head=b"2" * 32)
    journal.keep_answer("a", answer=b"x", charged_count=3, received_bytes=8, receipt=second)
    first = Receipt(account="device", sequence=3, head=b"1" * 32)
    journal.keep_answer("b", answer=b"x", charged_count=3, received_bytes=8, receipt=first)
    journal.keep_answer("b", answer=b"x", charged_count=3, received_bytes=8, receipt=second)
    journal.keep_answer("c", answer=b"x", charged_count=3, received_bytes=8)  # of a server that gives none
    assert list(journal.receipts()) == [("b", first), ("a", second)]


def test_journal_of_format_1_is_upgraded_in_place_and_loses_nothing(tmp_path):
    path = tmp_path / "journal.db"
    old = sqlite3.connect(path)
    old.executescript(
        """
        CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
        CREATE TABLE batches (
            phase TEXT NOT NULL,
            slot INTEGER NOT NULL,
            batch_id TEXT NOT NULL UNIQUE,
            picture_count INTEGER NOT NULL CHECK (picture_count > 0),
            request BLOB NOT NULL,
            latents BLOB NOT NULL,
            sent_bytes INTEGER NOT NULL,
            received_bytes INTEGER NOT NULL DEFAULT 0,
            charged_count INTEGER NOT NULL DEFAULT 0,
            answer BLOB,
            PRIMARY KEY (phase, slot)
        ) STRICT;
        INSERT INTO facts VALUES ('format', '1'), ('run_id', '"old"');
        INSERT INTO batches VALUES ('distill', 0, 'a', 3, x'01', x'02', 1, 8, 3, x'03');
        INSERT INTO batches VALUES ('distill', 1, 'b', 3, x'01', x'02', 1, 0, 0, NULL);
        """
    )
    old.close()
    for _ in range(2):
        journal = Journal.open(path)
        assert (journal.run_id, journal.fact("format")) == ("old", FORMAT)
        assert journal.totals().sent_pictures == 6
        assert journal.charges() == {"a": 3}
        assert [row.batch_id for row in journal.unanswered("distill")] == ["b"]
        assert list(journal.receipts()) == []
        journal.close()
    journal = Journal.open(path)
    receipt = Receipt(account="device", sequence=3, head=b"1" * 32)
    journal.keep_answer("b", answer=b"x", charged_count=3, received_bytes=8, receipt=receipt)
    assert list(journal.receipts()) == [("b", receipt)]
    journal.close()


def test_journal_of_format_2_is_upgraded_in_place_and_knows_what_was_sent(tmp_path):
    path = tmp_path / "journal.db"
    old = sqlite3.connect(path)
    old.executescript(
        """
        CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
        CREATE TABLE batches (
            phase TEXT NOT NULL,
            slot INTEGER NOT NULL,
            batch_id TEXT NOT NULL UNIQUE,
            picture_count INTEGER NOT NULL CHECK (picture_count > 0),
            request BLOB NOT NULL,
            latents BLOB NOT NULL,
            sent_bytes INTEGER NOT NULL,
            received_bytes INTEGER NOT NULL DEFAULT 0,
            charged_count INTEGER NOT NULL DEFAULT 0,
            answer BLOB,
            receipt_account TEXT,
            receipt_sequence INTEGER,
            receipt_head BLOB,
            PRIMARY KEY (phase, slot)
        ) STRICT;
        INSERT INTO facts VALUES ('format', '2'), ('run_id', '"old"');
        INSERT INTO batches VALUES ('distill', 0, 'a', 3, x'0101', x'02', 2, 8, 3, x'03', 'device', 3, x'04');
        INSERT INTO batches VALUES ('distill', 1, 'b', 5, x'0101', x'02', 6, 0, 0, NULL, NULL, NULL, NULL);
        """
    )
    old.close()
    for _ in range(2):
        journal = Journal.open(path)
        assert (journal.run_id, journal.fact("format")) == ("old", FORMAT)
        assert journal.totals().sent_pictures == 3 + 3 * 5
        assert journal.charges() == {"a": 3}
        assert list(journal.receipts()) == [("a", Receipt(account="device", sequence=3, head=b"\x04"))]
        journal.close()


def test_full_store_is_a_disk_problem_and_what_was_kept_stays(journal):
    journal.plan("distill", batch())
    pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")
    big = Batch(slot=1, batch_id="b", picture_count=1, request=b"x" * 100_000, latents=b"")
    with pytest.raises(DiskProblem, match="make room"):
        journal.plan("distill", big)
    assert [row.batch_id for row in journal.unanswered("distill")] == ["a"]


def test_a_journal_that_another_program_holds_does_not_want_room(journal, monkeypatch):
    monkeypatch.setattr(journal, "_connection", sqlite3.connect(journal._path, timeout=0.01, isolation_level=None))
    holder = sqlite3.connect(journal._path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(DiskProblem, match="locked; wait for the program that holds it and start"):
        journal.plan("distill", batch())
    holder.close()


def test_another_programs_database_is_named_and_left_alone(tmp_path):
    path = tmp_path / "journal.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE notes (text TEXT)")
    other.commit()
    other.close()
    with pytest.raises(RunFolderProblem, match="another program's database"):
        Journal.open(path)


def test_signal_right_after_a_transaction_began_leaves_the_journal_usable(journal):
    """A signal's handler raises between any two lines, this one between BEGIN and whatever comes next."""

    class Terminated(BaseException):
        pass

    class Signalled:
        def __init__(self, connection):
            self.connection = connection

        def __getattr__(self, name):
            return getattr(self.connection, name)

        def execute(self, statement, *values):
            done = self.connection.execute(statement, *values)
            if statement.startswith("BEGIN"):
                raise Terminated
            return done

    connection = journal._connection
    journal._connection = Signalled(connection)
    with pytest.raises(Terminated):
        journal.plan("distill", batch())
    journal._connection = connection
    journal.plan("distill", batch())
    assert journal.totals().planned_pictures == 3
