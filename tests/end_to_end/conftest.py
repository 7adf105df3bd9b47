"""A real server that can be killed and started again on its port, and agents: in this process, or killed too."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.services import lasting_address
from edge_agent import cli
from tests.conftest import in_process, teacher_admin

MODEL = "array:4,1,8,8"
START_SECONDS = 150
# teacher-serve that takes its time once it has answered some: whoever is to kill it then may be late.
SLOWING_SERVER = """
import time
from teacher_service.cli import serve
from teacher_service.engine import ArrayEngine
answer, asked = ArrayEngine.answer, []
def slower(self, images):
    asked.append(len(images))
    time.sleep(0.3 if sum(asked) > 60 else 0.0)
    return answer(self, images)

ArrayEngine.answer = slower
serve()
"""
FAST = ("--set", "deprivatize.steps=2", "--set", "distill.passes=1", "--set", "batch_pictures=16")


def program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


class World:
    """One ledger, one server port, one folder of pictures, any number of agents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = f"sqlite:///{folder / 'ledger.db'}"
        self.address = lasting_address()
        self.pictures = folder / "pictures"
        self.pictures.mkdir()
        rng = np.random.default_rng(0)
        for i in range(80):
            # Checks of black and white: nearer to each other than to the grey of a generator that learnt nothing.
            pixels = np.kron(255 * rng.integers(0, 2, (4, 4)), np.ones((2, 2))).astype(np.uint8)
            Image.fromarray(pixels).save(self.pictures / f"{i:03}.png")
        self.server: subprocess.Popen[str] | None = None
        self.agents: list[subprocess.Popen[str]] = []
        self.run_dir = folder / "run"

    def admin(self, *arguments: str) -> str:
        return teacher_admin(self.ledger, *arguments).strip()

    def account(self, budget: int) -> str:
        self.key = self.admin("account", "create", "device", "--budget", str(budget))
        return self.key

    def books(self) -> dict[str, Any]:
        books: dict[str, Any] = json.loads(self.admin("account", "show", "device", "--format", "json"))
        return books

    def posted_batches(self) -> dict[str, int]:
        """Batch id -> pictures, with every post of an id added up: a double charge would show."""
        posts: dict[str, int] = {}
        for line in self.admin("statement", "device", "--format", "json").splitlines():
            entry = json.loads(line)
            if entry["kind"] == "post":
                posts[entry["batch_id"]] = posts.get(entry["batch_id"], 0) + entry["pictures"]
        return posts

    def start_server(self, model: str = MODEL, *more: str, serve: Sequence[str] = ()) -> None:
        self.log = (self.folder / "server.log").open("a")
        self.server = subprocess.Popen(
            [
                *(serve or (program("teacher-serve"),)),
                *("--model", model, "--ledger", self.ledger),
                *("--listen", self.address, "--metrics-port", "0", *more),
            ],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line == f"serving on {self.address}\n", (self.folder / "server.log").read_text()

    def stop_server(self, number: int = signal.SIGTERM) -> None:
        assert self.server is not None and self.server.stdout is not None
        self.server.send_signal(number)
        self.server.wait(30)
        self.server.stdout.close()
        self.log.close()
        self.server = None

    def agent_command(self, *arguments: str, phase: str = "all", budget: int = 200) -> list[str]:
        return [
            *(program("edge-agent"), "run", "--phase", phase, "--images", str(self.pictures)),
            *("--teacher", self.address, "--run-dir", str(self.run_dir), "--budget", str(budget)),
            *FAST,
            *arguments,
        ]

    def environment(self, **changes: str) -> dict[str, str]:
        return os.environ | {"MEKD_API_KEY": self.key} | changes

    def start_agent(self, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
        agent = subprocess.Popen(
            self.agent_command(*arguments, **options),
            env=self.environment(),
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.agents.append(agent)
        return agent

    def agent(
        self, *arguments: str, environment: dict[str, str] | None = None, process: bool = False, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        changes = {"MEKD_API_KEY": self.key} | (environment or {})
        return self.run(self.agent_command(*arguments, **options), changes, process=process)

    def run(
        self, command: Sequence[str], environment: dict[str, str], *, process: bool = False
    ) -> "subprocess.CompletedProcess[str]":
        """``edge-agent`` to its end; in this process unless ``process``, whose import of torch takes seconds."""
        if process:
            return subprocess.run(
                command,
                env=os.environ | environment,
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=150,
            )
        with (
            contextlib.chdir(self.folder),
            mock.patch.dict(os.environ, environment),
            torch_as_in_a_new_process(),
            handlers_kept(),
        ):
            done = in_process(cli.main, *command[1:])
        if done.returncode > 128:  # the signal was meant for the tests
            signal.raise_signal(done.returncode - 128)
        return done

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary

    def kept(self) -> int:
        """Pictures whose answers the agent has; 0 where there is no journal yet."""
        if not (self.run_dir / "journal.db").is_file():
            return 0
        with contextlib.closing(sqlite3.connect(self.run_dir / "journal.db", timeout=1)) as journal:
            try:
                count: int = journal.execute("SELECT coalesce(sum(charged_count), 0) FROM batches").fetchone()[0]
            except sqlite3.OperationalError:  # the journal is being made
                return 0
        return count

    def wait_for_answers(self, process: "subprocess.Popen[str]", pictures: int) -> None:
        """Returns once the agent has kept so many answers."""
        deadline = time.monotonic() + START_SECONDS
        while self.kept() < pictures:
            if process.poll() is not None:
                assert process.stderr is not None
                raise AssertionError(f"it ended with {process.returncode} before: {process.stderr.read()}")
            assert time.monotonic() < deadline, f"{self.kept()} answers after {START_SECONDS} s, not {pictures}"
            time.sleep(0.002)

    def wait_until_it_is_away(self, process: "subprocess.Popen[str]") -> None:
        """Returns once the agent has said that the teacher is away."""
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            if "is away" in line:
                return
            said.append(line)
        raise AssertionError("".join(said))

    def kill_agent(self, process: "subprocess.Popen[str]", at_least: int, below: int) -> None:
        """Kills the agent while it asks: at so many answers, and below as many as it wants."""
        self.wait_for_answers(process, at_least)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL, "it had ended before"
        assert process.stderr is not None
        process.stderr.close()
        assert at_least <= self.kept() < below, "it was killed when there was nothing left to ask"

    def assert_books_agree(self) -> None:
        """Journal and ledger, to the picture and id by id."""
        with contextlib.closing(sqlite3.connect(self.run_dir / "journal.db")) as journal:
            kept = dict(journal.execute("SELECT batch_id, charged_count FROM batches WHERE answer IS NOT NULL"))
        assert self.posted_batches() == kept
        books = self.books()
        assert (books["held"], books["posted"]) == (0, sum(kept.values()))


@contextlib.contextmanager
def torch_as_in_a_new_process() -> Iterator[None]:
    """As many threads and the random numbers that torch begins with; afterwards all is as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(torch.Generator().initial_seed())
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """What an agent does about signals ends with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    if made.server is not None:
        made.stop_server(signal.SIGKILL)
    for agent in made.agents:  # a test that failed midway leaves one running
        agent.kill()
        agent.wait()
        assert agent.stderr is not None
        agent.stderr.close()
