"""teacher-admin: what it prints, refuses and exits with."""

import asyncio
import json
import os
import re
import signal
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from teacher_service.admin_cli import admin
from teacher_service.ledger_sql import SqlLedger
from tests.conftest import program, teacher_admin
from tests.teacher_service.test_cli import run

KEY = re.compile(r"mekd_([0-9a-f]{16})_[0-9a-f]{64}")


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


def admin_says(ledger: str, *arguments: str, status: int = 0) -> str:
    """What ``teacher-admin`` prints, run in this process."""
    done = CliRunner().invoke(admin, ["--ledger", ledger, *arguments])
    assert done.exit_code == status, done.output
    assert status == 0 or (done.output.count("\n") == 1) == done.output.startswith("error: ")
    return done.output


def test_the_key_of_a_new_account_is_alone_on_standard_output_and_the_file_is_its_owners(ledger: str) -> None:
    done = run("teacher-admin", "--ledger", ledger, "account", "create", "device", "--budget", "50")
    assert (done.returncode, done.stderr) == (0, "")
    assert KEY.fullmatch(done.stdout.removesuffix("\n"))
    assert os.stat(ledger.removeprefix("sqlite:///")).st_mode & 0o777 == 0o600


def test_a_key_goes_to_a_new_file_of_its_owners_and_never_over_another(ledger: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    create = ("account", "create", "device", "--budget", "50", "--key-file", str(file))
    assert admin_says(ledger, *create) == ""
    key = file.read_text()
    assert KEY.fullmatch(key.removesuffix("\n")) and file.stat().st_mode & 0o777 == 0o600
    assert "expected a new file, but it exists" in admin_says(ledger, *create, status=2)
    other = tmp_path / "other"
    assert "which exists" in admin_says(ledger, *create[:-1], str(other), status=2)
    assert file.read_text() == key and not other.exists()
    assert admin_says(ledger, "key", "create", "device", "--key-file", str(other)) == ""
    assert KEY.fullmatch(other.read_text().strip()) and other.read_text() != key
    assert "No such file" in admin_says(ledger, *create[:-1], str(tmp_path / "none" / "key"), status=2)


def test_a_key_that_may_have_been_made_is_not_thrown_away(ledger: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    create = ("account", "create", "device", "--budget", "50", "--key-file", str(file))
    nowhere = ["--ledger", "grpc://127.0.0.1:9", *create]
    done = CliRunner().invoke(admin, nowhere, env={"MEKD_LEDGER_KEY": "mekd_0123456789abcdef_" + "0" * 64})
    assert done.exit_code == 2 and f"{file} has the key, in case it was made" in done.output
    assert KEY.fullmatch(file.read_text().strip())


@pytest.mark.parametrize(("flag", "numbers"), [("--mean", "123.7,116.3,103.5"), ("--std", "58.4,57.1,57.4")])
def test_numbers_for_pixels_up_to_255_are_refused(ledger: str, tmp_path: Path, flag: str, numbers: str) -> None:
    said = admin_says(ledger, "model", "describe", str(tmp_path / "m.pt"), flag, numbers, status=2)
    assert f"{flag}: expected numbers from 0 to 1, for pixels from 0 to 1, got {numbers}; divide" in said


def test_an_account_lives_through_grant_show_list_and_statement(ledger: str) -> None:
    admin_says(ledger, "account", "create", "device", "--budget", "50")
    admin_says(ledger, "account", "create", "another", "--budget", "7")
    said = admin_says(ledger, "account", "grant", "device", "8")
    assert said == "name device  granted 58  posted 0  held 0  balance 58\n"
    device = {"name": "device", "granted": 58, "posted": 0, "held": 0, "balance": 58}
    shown = json.loads(admin_says(ledger, "account", "show", "device", "--format", "json"))
    assert shown == device | {"terms": {}}
    rows = [json.loads(line) for line in admin_says(ledger, "account", "list", "--format", "json").splitlines()]
    assert [row["name"] for row in rows] == ["another", "device"] and rows[1] == device
    entries = [
        json.loads(line) for line in admin_says(ledger, "statement", "device", "--format", "json").splitlines()
    ]
    assert [(entry["kind"], entry["pictures"], entry["debit_book"], entry["credit_book"]) for entry in entries] == [
        ("grant", 50, "issuer", "available"),
        ("grant", 8, "issuer", "available"),
    ]
    lines = admin_says(ledger, "statement", "device").splitlines()
    assert [line.split()[2:] for line in lines] == [
        ["grant", "50", "pictures", "issuer", "->", "available"],
        ["grant", "8", "pictures", "issuer", "->", "available"],
    ]
    assert all(datetime.fromisoformat(line.split()[1]).utcoffset() == timedelta(0) for line in lines)


def test_terms_are_made_set_unset_and_shown(ledger: str) -> None:
    flags = ("--answers", "soft", "--top-k", "3", "--decimals", "2", "--pictures-per-second", "0.5")
    limits = ("--max-streams", "4", "--max-outstanding-pictures", "512")
    terms = {"answers": "soft", "top_k": 3, "decimals": 2, "pictures_per_second": 0.5}
    terms |= {"max_streams": 4, "max_outstanding_pictures": 512}

    def shown(name: str) -> object:
        return json.loads(admin_says(ledger, "account", "show", name, "--format", "json"))["terms"]

    admin_says(ledger, "account", "create", "device", "--budget", "50", *flags, *limits)
    admin_says(ledger, "account", "create", "plain", "--budget", "50")
    assert (shown("device"), shown("plain")) == (terms, {})
    said = admin_says(ledger, "account", "set", "device", "--top-k", "5", "--unset", "decimals", "--unset", "answers")
    assert (
        said
        == admin_says(ledger, "account", "show", "device")
        == (
            "name device  granted 50  posted 0  held 0  balance 50  top_k 5  pictures_per_second 0.5  max_streams 4  "
            "max_outstanding_pictures 512\n"
        )
    )
    admin_says(ledger, "account", "set", "plain", *flags, *limits)
    assert shown("plain") == terms
    assert admin_says(ledger, "account", "set", "plain", "--suspended").endswith(" suspended True\n")
    assert shown("plain") == terms | {"suspended": True}
    admin_says(ledger, "account", "set", "plain", "--unset", "suspended")
    assert shown("plain") == terms
    assert len(admin_says(ledger, "statement", "plain").splitlines()) == 1


def test_terms_through_a_server_that_has_the_books(start_server: Any, ledger: str) -> None:
    key = admin_says(ledger, "key", "create", "--role", "admin").strip()
    server = start_server(ledger=ledger)
    environment = os.environ | {"MEKD_LEDGER_KEY": key}
    remote = ("--ledger", f"grpc://{server.address}", "account")
    made = run("teacher-admin", *remote, "create", "far", "--budget", "5", "--decimals", "2", env=environment)
    assert made.returncode == 0 and KEY.fullmatch(made.stdout.strip()), made
    done = run("teacher-admin", *remote, "set", "far", "--top-k", "3", "--unset", "decimals", env=environment)
    assert (done.returncode, done.stdout) == (0, "name far  granted 5  posted 0  held 0  balance 5  top_k 3\n"), done
    assert admin_says(ledger, "account", "show", "far") == done.stdout


def test_a_grant_with_an_id_is_made_once_however_often_a_script_runs(ledger: str) -> None:
    admin_says(ledger, "account", "create", "device", "--budget", "50")
    for _ in range(2):
        said = admin_says(ledger, "account", "grant", "device", "8", "--grant-id", "order-7")
        assert said == "name device  granted 58  posted 0  held 0  balance 58\n"
    for count, grant_id, said in (
        ("9", "order-7", "grant id order-7 was used before with another picture_count; a new grant needs a new id"),
        ("9", "order 8", "grant_id: expected 1 to 64 characters of A-Z, a-z, 0-9, '_' and '-', got 'order 8'"),
    ):
        again = ("account", "grant", "device", count, "--grant-id", grant_id)
        assert admin_says(ledger, *again, status=2) == f"error: {said}\n"
    assert "order-7" in admin_says(ledger, "statement", "device")
    assert json.loads(admin_says(ledger, "account", "show", "device", "--format", "json"))["granted"] == 58


def test_accounts_are_listed_to_the_last_however_many_pages_they_fill(ledger: str) -> None:
    async def make() -> None:
        books = SqlLedger.open(ledger)
        await asyncio.gather(*(books.create_account(f"a{n:04}", 1) for n in range(1003)))
        await books.close()

    asyncio.run(make())
    names = [
        json.loads(line)["name"] for line in admin_says(ledger, "account", "list", "--format", "json").splitlines()
    ]
    assert names == [f"a{n:04}" for n in range(1003)]


def test_keys_are_added_listed_without_their_secret_and_revoked(ledger: str) -> None:
    first = admin_says(ledger, "account", "create", "device", "--budget", "50").strip()
    second = admin_says(ledger, "key", "create", "device").strip()
    listed = admin_says(ledger, "key", "list", "device")
    for key in (first, second):
        _, key_id, secret = key.split("_")
        assert f"{key_id}  customer  valid" in listed and secret not in listed
    revoked_id = KEY.fullmatch(first)[1]  # type: ignore[index]
    assert admin_says(ledger, "key", "revoke", revoked_id) == f"{revoked_id}  revoked\n"
    listed = admin_says(ledger, "key", "list", "device").splitlines()
    assert sorted(line.split("  ", 1)[1] for line in listed) == ["customer  revoked", "customer  valid"]
    assert f"{revoked_id}  customer  revoked" in listed


def test_a_whole_key_can_be_revoked_and_is_never_printed_again(ledger: str) -> None:
    key = admin_says(ledger, "account", "create", "device", "--budget", "50").strip()
    unknown = f"mekd_{'0' * 16}_{'1' * 64}"
    for text in (unknown, "x" + key):
        assert "1111" not in admin_says(ledger, "key", "revoke", text, status=2)
        assert key.split("_")[2] not in admin_says(ledger, "key", "revoke", text, status=2)
    assert admin_says(ledger, "key", "revoke", key) == f"{key.split('_')[1]}  revoked\n"
    assert "revoked" in admin_says(ledger, "key", "list", "device")


@pytest.mark.parametrize("role", ["admin", "teacher"])
def test_the_first_key_of_an_operator_is_made_on_the_store(ledger: str, role: str) -> None:
    text = admin_says(ledger, "key", "create", "--role", role).strip()
    assert KEY.fullmatch(text)
    assert os.stat(ledger.removeprefix("sqlite:///")).st_mode & 0o777 == 0o600
    admin_says(ledger, "key", "create", "--role", "admin")
    listed = admin_says(ledger, "key", "list", "operators").splitlines()
    assert len(listed) == 2 and f"{text.split('_')[1]}  {role}  valid" in listed
    assert admin_says(ledger, "account", "list") == "name operators  granted 0  posted 0  held 0  balance 0\n"
    admin_says(ledger, "account", "create", "device", "--budget", "5")
    admin_says(ledger, "key", "create", "device", "--role", role)
    assert f"  {role}  valid" in admin_says(ledger, "key", "list", "device")


def test_an_operators_key_for_an_account_that_is_not_there_is_refused(ledger: str) -> None:
    admin_says(ledger, "account", "create", "device", "--budget", "5")
    said = admin_says(ledger, "key", "create", "nobody", "--role", "admin", status=2)
    assert "expected the name of an account on these books, got 'nobody'" in said
    done = CliRunner().invoke(admin, ["--ledger", ledger, "key", "create"])
    assert done.exit_code == 2 and "a customer's key belongs to the customer's account" in done.output


def test_a_balance_is_watched_until_interrupted(ledger: str) -> None:
    admin_says(ledger, "account", "create", "device", "--budget", "50")
    command = [program("teacher-admin"), "--ledger", ledger, "account", "watch", "device", "--format", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["balance"] == 50
        teacher_admin(ledger, "account", "grant", "device", "5")
        assert json.loads(process.stdout.readline())["balance"] == 55
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


def test_what_cannot_be_done_is_one_line_and_status_2(ledger: str, tmp_path: Path) -> None:
    missing = admin_says(ledger, "account", "list", status=2)
    remedy = "'teacher-admin account create' makes one"
    assert missing == f"error: expected a ledger at {tmp_path}/ledger.db, found no file; {remedy}\n"
    assert list(tmp_path.iterdir()) == []
    admin_says(ledger, "account", "create", "device", "--budget", "50")
    for arguments, said in (
        (("account", "create", "device", "--budget", "5"), "error: expected a new account name, got 'device'"),
        (("account", "create", "Device", "--budget", "5"), "error: expected an account name of 1 to 63 characters"),
        (("account", "create", "zero", "--budget", "0"), "error: expected a grant of 1 to"),
        (("account", "grant", "device", "--", "-5"), "error: expected a grant of 1 to"),
        (("account", "grant", "device", "9007199254740992"), "error: expected a grant of 1 to 9007199254740942"),
        (("account", "create", "new", "--budget", "5", "--top-k", "0"), "error: --top-k: expected a whole number, 1"),
        (
            ("account", "set", "device", "--decimals", "9"),
            "error: --decimals: expected a whole number, 1 to 7, got 9",
        ),
        (
            ("account", "set", "device", "--pictures-per-second", "nan"),
            "error: --pictures-per-second: expected a num",
        ),
        (
            ("account", "set", "device", "--top-k", "3", "--unset", "top-k"),
            "error: top_k: expected to be set or unset",
        ),
        (("account", "set", "device"), "expected something to set or --unset, got nothing"),
        (("account", "set", "device", "--unset", "budget"), "'budget' is not one of 'answers', 'top-k'"),
        (("account", "set", "nobody", "--top-k", "3"), "error: expected the name of an account on these books"),
        (("account", "grant", "device", "-5"), "No such option '-5'. Expected a number of at least 1."),
        (("account", "list", "--ledger", ledger), "It goes before the command: teacher-admin --ledger ... COMMAND"),
        (("account", "show", "nobody"), "error: expected the name of an account on these books, got 'nobody'"),
        (("statement", "nobody"), "error: expected the name of an account on these books, got 'nobody'"),
        (("key", "create", "nobody"), "error: expected the name of an account on these books, got 'nobody'"),
        (("key", "revoke", "none"), "error: expected the id of a key on these books, as 'key list' prints it"),
        (("--ledger", "postgresql://a:secret@h:54x/db", "account", "list"), "DATABASE, got '***'"),
    ):
        assert said in admin_says(ledger, *arguments, status=2)
    assert json.loads(admin_says(ledger, "account", "list", "--format", "json"))["granted"] == 50


def test_a_reader_who_closes_the_pipe_ends_the_statement_quietly(ledger: str) -> None:
    teacher_admin(ledger, "account", "create", "device", "--budget", "50")
    command = f"{program('teacher-admin')} --ledger {ledger} statement device | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
