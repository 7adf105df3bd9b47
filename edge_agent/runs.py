"""The run folder: the sole writer to disk. Whole files are written beside their name, synced, then renamed.

run.toml       the resolved configuration
generator.pt   phase 1's result; of mixes it holds the local pictures' latents, so it's as private as they are
journal.db     outbox and paid answers (``journal``)
assistant.pt   of phase 2, where there is one: the larger network that the student also learns from, or the first of
               several; the next are assistant-2.pt and so on
student.pt     phase 2's result, a checkpoint that ``teacher-serve`` could serve
memory.npz     phase 3's result
metrics.jsonl  one line a figure
summary.json   what the run came to
*.checkpoint   where a phase under way can go on
lock           held by the process that works here
"""

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import tomli_w
import torch
from torch import nn

from edge_agent.failures import DiskProblem, FolderInUse, RunFolderProblem, disk_problems
from edge_agent.journal import Journal
from networks.classifiers import Classifier
from networks.modelfile import ModelFacts, ModelFileError, load_model, model_bytes

CHECKPOINT_SECONDS = 30.0
MEMORY_LIMIT_BYTES = 4 * 2**20
_RESULTS = ("generator.pt", "student.pt", "memory.npz", "summary.json")


class RunFolder:
    """One run's folder, locked while it is open. Raises RunFolderProblem where another process holds it."""

    def __init__(self, path: Path) -> None:
        try:
            with disk_problems(f"the run folder {path}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir(mode=0o700, exist_ok=True)
                self._lock = (path / "lock").open("a+")
        except DiskProblem as problem:
            if isinstance(problem.__cause__, FileExistsError | NotADirectoryError | PermissionError):
                raise RunFolderProblem(
                    f"{path}: expected a folder to write in ({problem.__cause__.strerror}); give another --run-dir"
                ) from None
            raise
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if isinstance(error, BlockingIOError):
                raise FolderInUse(
                    f"{path} is in use by another edge-agent; wait for it, or give another --run-dir"
                ) from None
            raise RunFolderProblem(
                f"{path}: expected a file system that can lock files, got: {error.strerror}; give another --run-dir"
            ) from None
        self.path = path
        if not (path / "journal.db").exists() and (results := [name for name in _RESULTS if self.has(name)]):
            self._lock.close()
            raise RunFolderProblem(
                f"{path} has {', '.join(results)} and no journal.db, which knows what was paid for; put it back, or "
                "give another --run-dir"
            )
        self._clocks: dict[str, tuple[float, float]] = {}  # phase -> seconds before, and when it was started
        self._clocks_kept = time.monotonic()
        try:
            self.journal = Journal.open(path / "journal.db")
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.journal.close()
        self._lock.close()

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).is_file()

    def write(self, name: str, content: bytes, *, mode: int | None = None) -> None:
        """Writes a whole file: a reader sees the old one or the new one, and a crash leaves one of them.

        `mode` are its permissions from the first byte on; None: the user's usual ones.
        """
        target = self.path / name
        beside = target.with_name(f".{name}.new")
        with disk_problems(str(target)):
            try:
                with beside.open("wb") as file:
                    if mode is not None:
                        os.fchmod(file.fileno(), mode)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(target)
            finally:  # what was written in part would keep a full disk full
                beside.unlink(missing_ok=True)
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def write_toml(self, name: str, content: dict[str, Any]) -> None:
        """Writes a TOML file."""
        self.write(name, tomli_w.dumps(content).encode())

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file for people and programs."""
        self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def write_tensors(self, name: str, content: dict[str, Any]) -> None:
        """Writes tensors, numbers, text, lists and dicts, for the owner alone: some are of local pictures."""
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self.write(name, buffer.getvalue(), mode=0o600)

    def read_tensors(self, name: str) -> dict[str, Any]:
        """What ``write_tensors`` wrote. Runs no code of the file. Raises RunFolderProblem."""
        try:
            content = torch.load(self.path / name, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises many kinds for a damaged file
            # Made again it may be another one, and the answers are about this one's pictures.
            is_paid_for = name == "generator.pt" and self.journal.totals().planned_pictures > 0
            remedy = "put a copy of it back: answers were paid for" if is_paid_for else "remove it to make it again"
            raise RunFolderProblem(
                f"{self.path / name}: expected a file of this project, got another or a damaged one "
                f"({type(error).__name__}); {remedy}"
            ) from None
        if not isinstance(content, dict):
            raise RunFolderProblem(f"{self.path / name}: expected a dict, got {type(content).__name__}")
        return content

    def write_arrays(self, name: str, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Writes numpy arrays, compressed. Raises ValueError above what the memory may take."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        if buffer.tell() > MEMORY_LIMIT_BYTES:
            raise ValueError(f"{name}: expected at most {MEMORY_LIMIT_BYTES} bytes, got {buffer.tell()}")
        self.write(name, buffer.getvalue())

    def write_network(self, name: str, network: nn.Module, facts: ModelFacts) -> None:
        """Writes a student or its assistant."""
        self.write(name, model_bytes(self.path / name, network, facts))

    def read_network(self, name: str) -> Classifier:
        """What ``write_network`` wrote, in eval mode. Raises RunFolderProblem."""
        try:
            network = load_model(self.path / name).module
        except ModelFileError:
            raise RunFolderProblem(
                f"{self.path / name}: expected what a run wrote there, got a damaged or another file; remove it, and "
                "--phase distill makes it again of the answers that are there"
            ) from None
        if not isinstance(network, Classifier):
            raise RunFolderProblem(f"{self.path / name}: expected a checkpoint of this project, got another file")
        return network

    def digest(self, name: str) -> str:
        """SHA-256 of a file, hex."""
        return hashlib.sha256((self.path / name).read_bytes()).hexdigest()

    def metric(self, **figures: Any) -> None:
        """Appends one line to ``metrics.jsonl``."""
        with disk_problems("metrics.jsonl"), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **figures}) + "\n")

    def checkpoint(self, phase: str, inputs: str) -> "FileCheckpoint":
        """Where a phase under way keeps its state; one of other inputs is not seen."""
        return FileCheckpoint(self, phase, inputs)

    def done(self, phase: str, inputs: str) -> bool:
        """Whether a phase was finished on these very inputs."""
        return bool(self.journal.fact(f"done.{phase}") == inputs)

    def finish(self, phase: str, inputs: str) -> None:
        """Remembers that a phase is finished; its checkpoint can go."""
        self.journal.set_facts(**{f"done.{phase}": inputs})
        with suppress(FileNotFoundError):
            (self.path / f"{phase}.checkpoint").unlink()

    def seconds(self, phase: str) -> float | None:
        """Seconds a phase has worked, over all starts; None where it never did."""
        spent = self.journal.fact(f"seconds.{phase}")
        return None if spent is None else float(spent)

    def keep_former(self, name: str) -> str:
        """Copies a file that is about to be replaced; returns the copy's name. An older copy is lost."""
        former = f"{Path(name).stem}.before{Path(name).suffix}"
        with disk_problems(str(self.path / name)):
            content = (self.path / name).read_bytes()
        self.write(former, content)
        return former

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Adds the seconds inside to the phase's, however it ends; `keep_clocks` is for ends that nobody notices."""
        self._clocks[phase] = self.seconds(phase) or 0.0, time.monotonic()
        try:
            yield
        finally:
            with suppress(DiskProblem):  # the reason why we are here is worth more than a clock
                self._keep_clock(phase)
            del self._clocks[phase]

    def keep_clocks(self) -> None:
        """Keeps what the clocks say, at most every CHECKPOINT_SECONDS: a kill stops them without another word."""
        if time.monotonic() - self._clocks_kept >= CHECKPOINT_SECONDS:
            for phase in self._clocks:
                self._keep_clock(phase)
            self._clocks_kept = time.monotonic()

    def _keep_clock(self, phase: str) -> None:
        before, started = self._clocks[phase]
        self.journal.set_facts(**{f"seconds.{phase}": round(before + time.monotonic() - started, 3)})


class FileCheckpoint:
    """``phase.Checkpoint`` in the run folder, at most every CHECKPOINT_SECONDS."""

    def __init__(self, folder: RunFolder, phase: str, inputs: str) -> None:
        self._folder = folder
        self._name = f"{phase}.checkpoint"
        self._inputs = inputs
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        if not self._folder.has(self._name):
            return None
        content = self._folder.read_tensors(self._name)
        state = content.get("state")
        return state if content.get("inputs") == self._inputs and isinstance(state, dict) else None

    def save_if_due(self, make_state: Callable[[], dict[str, Any]]) -> None:
        self._folder.keep_clocks()
        if time.monotonic() - self._saved >= CHECKPOINT_SECONDS:
            self._folder.write_tensors(self._name, {"inputs": self._inputs, "state": make_state()})
            self._saved = time.monotonic()


def digest_of(facts: dict[str, Any]) -> str:
    """SHA-256 of plain values, hex, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
