"""Both sides as real processes: a server on a free port, an account, an agent."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
STOP_SECONDS = 30.0


class ServiceError(Exception):
    """A process did not do what it was started for."""


def stop_on_sigterm() -> None:
    """SIGTERM ends this process through its ``finally`` clauses, so that the server it started ends too."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))


def command(name: str) -> str:
    """The installed program beside this interpreter."""
    return str(Path(sys.executable).with_name(name))


def lasting_address() -> str:
    """127.0.0.1:PORT for a server that will be killed and started again there.

    Below the range from which Linux and macOS take ports for outgoing connections and for port 0: from
    within it, another program, or the agent's own attempt to reconnect, may take the port while the server
    is away (a socket on loopback can even connect to itself).

    Raises:
        ServiceError: after 100 ports that are all in use.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return f"127.0.0.1:{port}"
    raise ServiceError("expected a free port on 127.0.0.1 from 10000 to 31999, found none in 100 attempts")


def descendants(of: int | None = None) -> set[int]:
    """All processes below one; None: below this one. Linux only."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    generation = {of or os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        found |= generation
    return found


def create_account(ledger: str, name: str, budget: int) -> str:
    """Makes an account and returns its key."""
    return _admin(ledger, "account", "create", name, "--budget", str(budget)).strip()


def account_key(ledger: str, name: str, budget: int, key_file: Path) -> str:
    """The key of an account that is made at the first call; it's kept in a file for its owner's eyes."""
    if not key_file.is_file():
        beside = key_file.with_name(f".{key_file.name}")
        beside.unlink(missing_ok=True)
        beside.touch(mode=0o600)
        beside.write_text(create_account(ledger, name, budget))
        beside.rename(key_file)
    return key_file.read_text()


def show_account(ledger: str, name: str) -> dict[str, int]:
    """granted, posted, held and balance."""
    found: dict[str, int] = json.loads(_admin(ledger, "account", "show", name, "--format", "json"))
    return found


def list_accounts(ledger: str) -> list[dict[str, int]]:
    """The same of every account."""
    return [json.loads(line) for line in _admin(ledger, "account", "list", "--format", "json").splitlines()]


def _admin(ledger: str, *arguments: str) -> str:
    done = subprocess.run(
        [command("teacher-admin"), "--ledger", ledger, *arguments], capture_output=True, text=True, timeout=60
    )
    if done.returncode != 0:
        raise ServiceError(f"teacher-admin {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def serving_anyone(model: Path, *, log: Path, more: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """A ``teacher-serve`` whose books are in memory; yields HOST:PORT and the key of its one account."""
    with _served(model, "memory:", log, more) as (address, process):
        assert process.stdout is not None
        yield address, process.stdout.readline().removeprefix("key ").strip()


@contextmanager
def serving(model: Path, ledger: str, *, log: Path, more: Sequence[str] = ()) -> Iterator[str]:
    """A ``teacher-serve`` on a free port; yields HOST:PORT. SIGTERM and a wait at the end."""
    with _served(model, ledger, log, more) as (address, _):
        yield address


def end(process: "subprocess.Popen[Any]", within_seconds: float) -> None:
    """Asks a process to end, and kills it where it does not."""
    process.terminate()
    try:
        process.wait(within_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _served(
    model: Path, ledger: str, log: Path, more: Sequence[str]
) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [
                command("teacher-serve"),
                *("--model", str(model), "--ledger", ledger),
                *("--listen", "127.0.0.1:0", "--metrics-port", "0"),
                *more,
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield _address(process, log), process
    finally:
        end(process, STOP_SECONDS)
        if process.stdout is not None:
            process.stdout.close()


def run_agent(arguments: Sequence[str], *, api_key: str, timeout_seconds: float | None = None) -> int:
    """Runs ``edge-agent run`` with its progress shown, and returns its exit code.

    However this ends, the agent is asked to end first, not killed: the seconds on its clock would be lost.
    """
    environment = os.environ | {"MEKD_API_KEY": api_key}
    process = subprocess.Popen([command("edge-agent"), "run", *arguments], env=environment)
    try:
        return process.wait(timeout_seconds)
    finally:
        end(process, STOP_SECONDS)


def _address(process: "subprocess.Popen[str]", log: Path) -> str:
    """HOST:PORT from the server's one line of output."""
    assert process.stdout is not None
    line: list[str] = []
    reader = threading.Thread(target=lambda: line.append(process.stdout.readline()), daemon=True)  # type: ignore[union-attr]
    reader.start()
    reader.join(START_SECONDS)
    if not line or not line[0].startswith("serving on "):
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise ServiceError(f"teacher-serve did not start: {' '.join(last) or 'no message'}")
    return line[0].removeprefix("serving on ").strip()
