"""Whose account pays, and whether it can: told before anything is spent on it."""

import json
import shutil

import pytest

from edge_agent.failures import DiskProblem
from edge_agent.journal import Journal


def balance_of(world, name: str) -> int:
    return json.loads(world.admin("account", "show", name, "--format", "json"))["balance"]


def test_an_account_that_cannot_pay_is_told_first_and_what_it_paid_for_is_its_own(world):
    world.account(100)
    other = world.admin("account", "create", "other", "--budget", "1000")
    world.start_server()
    short = world.agent(budget=300)
    assert short.returncode == 3
    told, ended = "account device has 100 pictures, 200 fewer than --budget 300 needs", "error: the account's budget"
    assert told in short.stderr and short.stderr.index(told) < short.stderr.index(ended)
    assert (
        "Start the same command again after a grant, or with --budget 100 to train on what is there" in short.stderr
    )

    stranger = world.agent(budget=300, environment={"MEKD_API_KEY": other})
    assert stranger.returncode == 6
    assert "account device pays for it, and this key is other's; give a key of that account" in stranger.stderr
    assert balance_of(world, "other") == 1000

    content = world.agent(budget=100)
    assert content.returncode == 0, content.stderr
    assert world.summary()["queries"]["charged"] == 100
    world.assert_books_agree()


def test_a_folder_that_lost_its_journal_does_not_pay_again(world):
    world.account(1000)
    world.start_server()
    assert world.agent(budget=40).returncode == 0
    (world.run_dir / "journal.db").unlink()
    again = world.agent(budget=40)
    assert again.returncode == 6 and "and no journal.db, which knows what was paid for; put it back" in again.stderr
    assert balance_of(world, "device") == 960


def test_another_accounts_key_does_not_pay_again_for_what_was_paid_for_and_never_kept(world, monkeypatch):
    world.account(400)
    other = world.admin("account", "create", "other", "--budget", "400")
    world.start_server()

    def full(*arguments: object, **given: object) -> None:
        raise DiskProblem("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep_answer", full)
        assert world.agent(budget=200).returncode == 7
    assert world.kept() == 0 and balance_of(world, "device") < 400

    stranger = world.agent(budget=200, environment={"MEKD_API_KEY": other})
    assert stranger.returncode == 6 and "account device pays for it" in stranger.stderr
    assert balance_of(world, "other") == 400

    again = world.agent(budget=200)
    assert again.returncode == 0, again.stderr
    assert balance_of(world, "device") == 200


def test_an_account_that_was_never_asked_with_may_be_another_one_the_next_time(world):
    world.account(400)
    other = world.admin("account", "create", "other", "--budget", "400")
    world.start_server()
    assert world.agent(phase="deprivatize").returncode == 0
    assert world.agent(budget=40, environment={"MEKD_API_KEY": other}).returncode == 0
    assert (balance_of(world, "device"), balance_of(world, "other")) == (400, 360)


def test_an_account_that_had_nothing_to_pay_with_may_be_another_one_the_next_time(world):
    world.account(40)
    other = world.admin("account", "create", "other", "--budget", "400")
    world.start_server()
    assert world.agent("--run-dir", str(world.folder / "before"), budget=40).returncode == 0
    assert world.agent(budget=40).returncode == 3
    assert world.agent(budget=40, environment={"MEKD_API_KEY": other}).returncode == 0
    assert balance_of(world, "other") == 360
    assert world.agent(budget=60).returncode == 6  # bound again, to the one that paid


@pytest.mark.parametrize("what", ["an older copy of the folder", "another teacher's address"])
def test_books_that_do_not_know_what_the_run_has_paid_are_refused_before_anything_is_asked(world, what):
    world.account(400)
    world.start_server()
    assert world.agent(budget=48).returncode == 0
    if what == "an older copy of the folder":
        shutil.copytree(world.run_dir, world.folder / "copy")
        assert world.agent(budget=200).returncode == 0
        shutil.rmtree(world.run_dir)
        shutil.copytree(world.folder / "copy", world.run_dir)
    else:
        world.stop_server()
        world.ledger = f"sqlite:///{world.folder / 'other.db'}"
        world.account(400)
        world.start_server()
    balance = balance_of(world, "device")

    refused = world.agent(budget=300)
    assert refused.returncode == 6
    assert "go on with the newest; where the address is another teacher's, give another --run-dir" in refused.stderr
    assert balance_of(world, "device") == balance
