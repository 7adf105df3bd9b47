"""What the agent keeps of every charge, the auditor checks: a server's books against a real run."""

import json
import signal
import sys
import time
from typing import Any

from edge_agent import cli
from tests.conftest import in_process, teacher_admin_ends
from tests.end_to_end.conftest import SLOWING_SERVER
from tests.end_to_end.test_run import SMALL_BATCHES


def receipts(world) -> list[dict[str, Any]]:
    """The agent's receipts, also in the file "receipts"."""
    done = in_process(cli.main, "receipts", "--run-dir", str(world.run_dir))
    assert done.returncode == 0, done.stderr
    (world.folder / "receipts").write_text(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def verify(world) -> tuple[int, dict[str, Any]]:
    file = str(world.folder / "receipts")
    done = teacher_admin_ends(world.ledger, "ledger", "verify", "--receipts", file, "--format", "json")
    return done.returncode, json.loads(done.stdout)


def test_receipts_of_a_run_through_a_killed_server_prove_the_books(world):
    world.account(1000)
    world.start_server(serve=(sys.executable, "-c", SLOWING_SERVER))
    process = world.start_agent(*SMALL_BATCHES, budget=300)
    world.wait_for_answers(process, 20)
    world.stop_server(signal.SIGKILL)
    assert world.kept() < 300, "nothing was left to ask"
    time.sleep(1.0)
    world.start_server()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "is away" in errors
    world.assert_books_agree()
    kept = receipts(world)
    posts = world.posted_batches()
    assert {row["batch_id"] for row in kept} == set(posts)
    assert len(kept) == len(posts)
    assert {row["account"] for row in kept} == {"device"}
    status, report = verify(world)  # while the server runs
    assert (status, report["findings"]) == (0, [])
    assert (report["receipts"], report["posted_pictures"]) == (len(posts), 300)


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


def test_receipts_of_a_folder_without_a_run_are_one_line(tmp_path):
    done = in_process(cli.main, "receipts", "--run-dir", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (6, "", 1)
    assert done.stderr.startswith("error: expected a run folder with a journal")
