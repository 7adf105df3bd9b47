"""What a benchmark leaves behind: one JSON line a run in benchmarks/results, with all it takes to judge it."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_WRITTEN = [f":(top,exclude)benchmarks/{name}" for name in ("results", "README.md", "accuracy.svg")]


def about(name: str, note: str = "") -> dict[str, Any]:
    """Date, commit, command and device, as they are when a run begins."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(RESULTS),
        "command": " ".join([f"python -m benchmarks.{name}", *map(_anywhere, sys.argv[1:])]),
        "device": f"cpu, {_processor()}, {os.cpu_count()} cores",
        **({"note": note} if note else {}),
    }


def _commit(results: Path) -> str | None:
    """None: no repository. "-dirty": with changes that are in no commit, but for what benchmarks have written."""

    def git(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=results)

    head = git("rev-parse", "HEAD")
    if head.returncode != 0:
        return None
    changed = git("status", "--porcelain", "--", ":/", *_WRITTEN)
    return head.stdout.strip() + ("-dirty" if changed.stdout or changed.returncode != 0 else "")


def _processor() -> str:
    """Its name where the system tells one, and what it is built to run."""
    try:
        known = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        known = ""
    names = [line.partition(":")[2].strip() for line in known.splitlines() if line.startswith("model name")]
    return ", ".join([*names[:1], platform.machine()])


def _anywhere(argument: str) -> str:
    """Say an argument as it would be on any machine: of a path from the root, what lies below here, or its name."""
    option, value = ("", argument) if argument.startswith("/") else _before_the_root(argument)
    path = Path(value)
    if not path.is_absolute():
        return argument
    return option + str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name)


def _before_the_root(argument: str) -> tuple[str, str]:
    """Cut an argument before the path from the root that follows a ``=`` or a ``://``; nothing if there is none."""
    cuts = [place + len(mark) for mark in ("=", "://") if (place := argument.find(f"{mark}/")) >= 0]
    return (argument[: min(cuts)], argument[min(cuts) :]) if cuts else (argument, "")


def kept(name: str) -> list[dict[str, Any]]:
    """The lines of benchmarks/results/NAME.jsonl, oldest first."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def keep(name: str, result: dict[str, Any]) -> None:
    """Appends a line to benchmarks/results/NAME.jsonl, and prints it."""
    line = json.dumps(result)
    with (RESULTS / f"{name}.jsonl").open("a") as results:
        results.write(line + "\n")
    print(line, flush=True)
