"""Whose account pays, and whether it can: told before anything is spent on it."""

import json


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
    assert "its answers were bought by account device, and this key is other's; give a key of" in stranger.stderr
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
