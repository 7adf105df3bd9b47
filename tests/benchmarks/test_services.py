import subprocess
from pathlib import Path

import pytest

from benchmarks import services


def test_an_agent_that_takes_too_long_is_asked_to_end_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = tmp_path / "edge-agent"
    agent.write_text(f"#!/bin/sh\ntrap 'echo $1 > {tmp_path}/asked; exit 143' TERM\nwhile :; do sleep 0.1; done\n")
    agent.chmod(0o755)
    monkeypatch.setattr(services, "command", lambda name: str(tmp_path / name))
    with pytest.raises(subprocess.TimeoutExpired):
        services.run_agent([], api_key="key", timeout_seconds=3)
    assert (tmp_path / "asked").read_text() == "run\n"
