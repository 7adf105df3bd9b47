"""Both sides as real processes: a server that can be killed and started again on its port, and agents."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.services import lasting_address

MODEL = "array:4,1,8,8"
START_SECONDS = 60
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
        done = subprocess.run(
            [program("teacher-admin"), "--ledger", self.ledger, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.strip()

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
        self, *arguments: str, environment: dict[str, str] | None = None, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.agent_command(*arguments, **options),
            env=self.environment(**(environment or {})),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=150,
        )

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary

    def wait_for_answers(self, process: "subprocess.Popen[str]", pictures: int) -> None:
        """Returns once the agent has kept so many answers, or has ended."""
        import sqlite3

        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            if (self.run_dir / "journal.db").is_file():
                try:
                    with sqlite3.connect(self.run_dir / "journal.db", timeout=1) as journal:
                        kept = journal.execute("SELECT coalesce(sum(charged_count), 0) FROM batches").fetchone()[0]
                    journal.close()
                    if kept >= pictures:
                        return
                except sqlite3.OperationalError:  # the journal is being made
                    pass
            time.sleep(0.002)


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
