"""The README's commands, as a new user types them. Only ports are chosen here, so that tests can run side by side."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from networks import registry
from networks.modelfile import save_model
from tests.models import resnet8_facts

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.S)


def commands(containing: str) -> list[str]:
    (block,) = [block for block in BLOCKS if containing in block]
    return [line.split("#")[0].strip() for line in block.splitlines()]


def test_both_make_commands_are_targets():
    for command in commands("make demo"):
        assert re.fullmatch(r"make \w+", command)
        planned = subprocess.run(
            [*shlex.split(command), "--dry-run", "--always-make"], cwd=ROOT, capture_output=True, text=True
        )
        assert planned.returncode == 0, planned.stderr


def test_ones_own_model_and_pictures(world, monkeypatch):
    model = registry.build("resnet8", class_count=3, channels=1)
    save_model(world.folder / "teacher.pt", model, resnet8_facts(8))
    # What a user would have in ./run.toml, here to be quick.
    (world.folder / "run.toml").write_text("[deprivatize]\nsteps = 2\n[distill]\npasses = 1\n")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    create, serve = commands("teacher-serve")
    subprocess.run(create, shell=True, cwd=world.folder, check=True, timeout=60)
    server = subprocess.Popen(
        [*shlex.split(serve), "--listen", world.address, "--metrics-port", "0"],
        cwd=world.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == f"serving on {world.address}\n"
        export, run = commands("edge-agent run")
        script = f"{export}\n{run} --teacher {world.address}"
        done = subprocess.run(["bash", "-ec", script], cwd=world.folder, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
    finally:
        server.terminate()
        server.wait(30)
        server.stdout.close()
    student = torch.load(world.folder / "runs/mekd/student.pt", weights_only=True)
    assert student["facts"]["architecture"] == "resnet8"
    shown = subprocess.run(
        ["teacher-admin", "account", "show", "my-device"], cwd=world.folder, capture_output=True, text=True
    )
    assert "posted 5000" in shown.stdout


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w/.]+)\)", README))
def test_every_linked_file_exists(path):
    assert (ROOT / path).is_file()
