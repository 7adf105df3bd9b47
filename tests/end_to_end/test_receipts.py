"""What the agent keeps of every charge, the auditor checks: a server's books against a real run."""

import json
import signal
import sqlite3
import subprocess
from typing import Any

from tests.conftest import program


def receipts(world) -> list[dict[str, Any]]:
    """The agent's receipts, also in the file "receipts"."""
    command = [program("edge-agent"), "receipts", "--run-dir", str(world.run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    (world.folder / "receipts").write_text(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def verify(world) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [
            *(program("teacher-admin"), "--ledger", world.ledger, "ledger", "verify"),
            *("--receipts", str(world.folder / "receipts"), "--format", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, json.loads(done.stdout)


def test_receipts_of_a_run_through_a_killed_server_prove_the_books(world):
    world.account(1000)
    world.start_server()
    process = world.start_agent()
    world.wait_for_answers(process, 100)
    world.stop_server(signal.SIGKILL)
    world.start_server()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    kept = receipts(world)
    posts = world.posted_batches()
    assert {row["batch_id"] for row in kept} == set(posts)
    assert len(kept) == len(posts)
    assert {row["account"] for row in kept} == {"device"}
    status, report = verify(world)  # while the server runs
    assert (status, report["findings"]) == (0, [])
    assert (report["receipts"], report["posted_pictures"]) == (len(posts), 200)


def test_a_teacher_whose_journal_was_cut_off_is_found_out_by_the_agents_receipts(world):
    world.account(1000)
    world.start_server()
    assert world.agent(budget=64).returncode == 0
    world.admin("ledger", "backup", str(world.folder / "backup"))
    before = len(receipts(world))
    assert world.agent(budget=128).returncode == 0
    world.stop_server()
    late = receipts(world)[before:]
    assert len(late) == 4
    assert verify(world)[0] == 0
    world.admin("ledger", "restore", str(world.folder / "backup"), "--force")
    status, report = verify(world)
    assert status == 1
    assert "receipts for 4 entries" in report["findings"][0]
    assert late[0]["batch_id"] in report["findings"][0]


def test_receipts_are_kept_beside_their_answers(world):
    world.account(100)
    world.start_server()
    assert world.agent(budget=32).returncode == 0
    journal = sqlite3.connect(world.run_dir / "journal.db")
    rows = journal.execute("SELECT answer IS NULL, length(receipt_head), receipt_account FROM batches").fetchall()
    journal.close()
    assert rows == [(0, 32, "device")] * 2


def test_receipts_of_a_folder_without_a_run_are_one_line(tmp_path):
    command = [program("edge-agent"), "receipts", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (6, "", 1)
    assert done.stderr.startswith("error: expected a run folder with a journal")
