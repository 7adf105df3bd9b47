"""What a result says of how it came about."""

import sys
from pathlib import Path

import pytest

from benchmarks import record


def test_a_command_names_no_folder_of_the_machine_it_ran_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    below, beside = tmp_path / "runs" / "mnist", tmp_path.parent / "elsewhere"
    monkeypatch.setattr(
        sys, "argv", ["x", "--run-dir", str(below), f"--data={beside}", "--set", "a=1", f"sqlite:///{beside}/b=c.db"]
    )
    command = record.about("adaptation")["command"]
    assert (
        command == "python -m benchmarks.adaptation --run-dir runs/mnist --data=elsewhere --set a=1 sqlite://b=c.db"
    )
