"""What a result says of how it came about."""

import subprocess
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


def test_a_commit_is_dirty_by_what_changed_in_the_code_and_not_by_results(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        ).stdout.strip()

    results, code = tmp_path / "benchmarks" / "results", tmp_path / "code.py"
    results.mkdir(parents=True)
    assert record._commit(results) is None
    for file in (results / "a.jsonl", code):
        file.write_text("1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    head = git("rev-parse", "HEAD")
    assert record._commit(results) == head
    (results / "a.jsonl").write_text("2\n")
    assert record._commit(results) == head
    code.write_text("2\n")
    assert record._commit(results) == f"{head}-dirty"
    code.write_text("1\n")
    assert record._commit(results) == head
    (tmp_path / "new.py").write_text("1\n")
    assert record._commit(results) == f"{head}-dirty"
