"""teacher-serve, and what it shares with teacher-admin: what they print, refuse and exit with."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from teacher_service.cli import serve
from tests.conftest import program, teacher_admin


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


def run(name: str, *arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([program(name), *arguments], capture_output=True, text=True, timeout=60, **more)


def refused(name: str, *arguments: str, **more: Any) -> str:
    """The one line of a program that exits with 2."""
    done = run(name, *arguments, **more)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("url", ["memory", "ledger.db", "mysql://host/db"])
def test_another_kind_of_ledger_is_refused_with_the_form_that_is_expected(url: str, tmp_path: Path) -> None:
    for name, arguments in (
        ("teacher-admin", ("account", "create", "a", "--budget", "5")),
        ("teacher-serve", ("--model", "array:10,1,8,8", "--listen", "127.0.0.1:0")),
    ):
        flags = ("--ledger", url)
        given = (*flags, *arguments) if name == "teacher-admin" else (*arguments, *flags)
        assert refused(name, *given, cwd=tmp_path) == (
            f"error: expected a ledger as sqlite:///FILE or postgresql://USER@HOST/DATABASE, got {url!r}"
        )
    assert list(tmp_path.iterdir()) == []


def test_both_programs_take_the_ledger_from_the_environment(start_server: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/from-environment.db"
    environment = {"MEKD_LEDGER": url}
    made = run(
        "teacher-admin", "account", "create", "device", "--budget", "5", env=os.environ | environment, cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    process = subprocess.Popen(
        [program("teacher-serve"), "--model", "array:10,1,8,8", "--listen", "127.0.0.1:0", "--metrics-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("serving on ")
        assert [path.name for path in tmp_path.glob("*.db")] == ["from-environment.db"]
        assert len(teacher_admin(url, "account", "list").splitlines()) == 1
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        process.stdout.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "Missing option '--model'"),
        (("--ledger-only", "--model", "x"), "expected one of --model and --ledger-only, got both"),
        (("--model", "x", "--max-batch-pictures", "0"), "0 is not in the range x>=1"),
        (("--model", "x", "--max-queue-pictures", "-1"), "-1 is not in the range x>=1"),
        (("--model", "x", "--grace-seconds", "-1"), "is not in the range 0<=x<=86400"),
        (("--model", "x", "--metrics-port", "70000"), "70000 is not in the range 0<=x<=65535"),
        (("--model", "x", "--answers", "loud"), "'loud' is not one of 'soft', 'hard'"),
        *(
            (("--model", "x", "--answers-keep", text), f"above 0 with s, m, h or d, for example 30d; got '{text}'")
            for text in ("", "d", "30", "0d", "-1d", "1.5h", "3w", "²d", "30 d")
        ),
        (
            ("--model", "x", "--input-shape", "3,32"),
            "expected CHANNELS,HEIGHT,WIDTH, for example 3,32,32; got '3,32'",
        ),
        (("--model", "x", "--mean", "a,b"), "expected numbers with commas between, got 'a,b'"),
        (("--check", "127.0.0.1:1", "--tls-ca", "/no/such.pem"), "--tls-ca /no/such.pem: No such file or directory"),
        *(
            (
                ("--check", "127.0.0.1:1", "--tls-ca", __file__, "--tls-cert", cert, "--tls-key", key),
                f"{flag} /no/such.pem: No such file or directory",
            )
            for flag, cert, key in (
                ("--tls-cert", "/no/such.pem", __file__),
                ("--tls-key", __file__, "/no/such.pem"),
            )
        ),
        *(
            (("--check", "127.0.0.1:1", *half), "expected --tls-cert and --tls-key together, got one of them")
            for half in (("--tls-cert", "x"), ("--tls-key", "x"), ("--tls-ca", __file__, "--tls-cert", "x"))
        ),
        (
            ("--check", "127.0.0.1:1", "--tls-cert", "x", "--tls-key", "x"),
            "--tls-cert: expected --tls-ca with it",
        ),
        (("--model", "x", "--liveness"), "--liveness: expected --check HOST:PORT with it"),
    ],
)
def test_flags_that_make_no_sense_are_refused_with_what_was_expected(flags: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(serve, list(flags))
    assert done.exit_code == 2 and said in done.output


@pytest.mark.parametrize(
    "model",
    [
        "array:10",
        "array:a,b,c,d",
        "array:10,1,8,8,1,1",
        "identity:10,1,8,0",
        "identity:10,1,8,8,1",
        "identity:9,1,2,2",
    ],
)
def test_an_array_that_is_none_is_one_line(model: str, tmp_path: Path) -> None:
    said = refused("teacher-serve", "--model", model, cwd=tmp_path)
    assert said.startswith(f"error: --model: expected {model.partition(':')[0]}:CLASSES,CHANNELS,HEIGHT,WIDTH")
    assert said.endswith(f"got {model!r}") and list(tmp_path.iterdir()) == []


def test_a_model_file_that_is_missing_is_one_line(tmp_path: Path) -> None:
    said = refused("teacher-serve", "--model", str(tmp_path / "none.pt"), "--ledger", f"sqlite:///{tmp_path}/l.db")
    assert said.startswith("error: ") and "none.pt" in said
    assert list(tmp_path.iterdir()) == []


def test_check_tells_a_server_that_is_ready_from_one_that_is_not(start_server: Any) -> None:
    server = start_server()
    # A proxy in the environment is not asked about this machine.
    nobody = {
        "http_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "grpc_proxy": "http://127.0.0.1:9",
    }
    ready = run("teacher-serve", "--check", server.address, env=os.environ | nobody)
    assert (ready.returncode, ready.stdout, ready.stderr) == (0, "", f"{server.address} is ready\n")
    assert server.stop() == 0
    gone = run("teacher-serve", "--check", server.address)
    assert gone.returncode == 1 and f"{server.address} is not ready: UNAVAILABLE" in gone.stderr


def test_a_server_that_still_loads_its_model_ends_at_once_when_it_is_told_to(tmp_path: Path) -> None:
    """Also as the first process of a container, which does not hear a signal that it has no handler for."""
    code = (
        "import time, teacher_service.cli as cli\n"
        "cli._engine = lambda *given: (print('loading', flush=True), time.sleep(60))\n"
        "cli.serve(['--model', 'teacher.pt'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM  # -SIGTERM: no handler


def test_check_asks_for_liveness_too(start_server: Any, ledger: str) -> None:
    server = start_server("--lease-seconds", "0.6", ledger=ledger)
    asked = ("teacher-serve", "--check", server.address)
    with contextlib.closing(sqlite3.connect(ledger.removeprefix("sqlite:///"))) as other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON instances BEGIN SELECT RAISE(FAIL, 'full'); END")
    deadline = time.monotonic() + 30
    while run(*asked).returncode == 0:
        assert time.monotonic() < deadline
    ready, alive = run(*asked), run(*asked, "--liveness")
    assert (ready.returncode, ready.stderr) == (1, f"{server.address} is not ready\n")
    assert (alive.returncode, alive.stderr) == (0, f"{server.address} is alive\n")


LIBRARY_LOGS = """
import logging, teacher_service.cli
teacher_service.cli._configure_logging()
log = logging.getLogger("grpc._cython.cygrpc")
log.error("ExecuteBatchError raised in core by servicer method [/x]")
log.info("idle talk")
try:
    {}["missing"]
except KeyError:
    log.exception("Unexpected [%s] raised by servicer method [%s]", "KeyError", "/x")
"""


def test_what_grpc_reports_is_logged_as_json_but_not_a_caller_who_vanished() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARY_LOGS], capture_output=True, text=True, timeout=60)
    (line,) = done.stderr.splitlines()
    entry = json.loads(line)
    assert entry["event"] == "Unexpected [KeyError] raised by servicer method [/x]" and entry["level"] == "error"
    assert "KeyError: 'missing'" in entry["exception"] and entry["timestamp"]


def test_help_names_every_flag_and_shows_commands_to_copy() -> None:
    for name in ("teacher-serve", "teacher-admin"):
        done = run(name, "--help")
        assert done.returncode == 0 and "--ledger" in done.stdout and f"{name} " in done.stdout


def test_books_in_memory_are_for_measuring_on_loopback_alone(tmp_path: Path) -> None:
    said = refused(
        "teacher-serve",
        *("--model", "array:10,1,8,8", "--ledger", "memory:", "--listen", "0.0.0.0:0", "--insecure-listen"),
        cwd=tmp_path,
    )
    assert said == "error: --ledger memory: is for measurements on loopback, got --listen 0.0.0.0:0"
    for name, arguments in (
        ("teacher-admin", ("--ledger", "memory:", "account", "create", "a", "--budget", "5")),
        ("teacher-serve", ("--ledger-only", "--ledger", "memory:", "--listen", "127.0.0.1:0")),
    ):
        assert "expected a ledger as sqlite:///FILE" in refused(name, *arguments, cwd=tmp_path)
