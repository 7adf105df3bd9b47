"""No Docker engine is needed: what the Dockerfile copies exists, and what it starts takes those arguments."""

import json
import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parent.parent
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{name} ")]


def command(program: str) -> click.Command:
    module, _, attribute = PROGRAMS[program].partition(":")
    return getattr(__import__(module, fromlist=[attribute]), attribute)


def test_every_copied_source_exists_and_is_not_ignored():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source.removeprefix("./"), pattern) for pattern in allowed), source


def test_every_package_of_the_project_is_copied():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= {source for line in instructions("COPY") for source in line.split()[:-1]}


def test_the_image_has_the_driver_of_every_store() -> None:
    (installs,) = [line for line in instructions("RUN") if "-c constraints.txt" in line]
    assert installs.endswith(" '.[postgres]'")


def test_there_are_the_two_targets_and_both_run_as_a_user():
    assert [line.split(" AS ")[1] for line in instructions("FROM")] == ["base", "teacher", "agent"]
    assert all(line.startswith("base ") for line in instructions("FROM")[1:])
    assert instructions("USER") == ["10001:10001"], "a number: Kubernetes' runAsNonRoot takes no name"


@pytest.mark.parametrize("entry", instructions("ENTRYPOINT"))
def test_entrypoint_is_a_program_of_the_project(entry):
    (program,) = json.loads(entry)
    assert program in PROGRAMS


def test_healthchecks_that_are_advised_are_command_lines_that_the_server_takes():
    """None is built in: the same one cannot ask a server with TLS and one without."""
    assert not instructions("HEALTHCHECK")
    advised = [shlex.split(text) for text in re.findall(r'--health-cmd "([^"]+)"', "\n".join(LINES))]
    assert [arguments[0] for arguments in advised] == ["teacher-serve"] * 2
    asked = [command(name).make_context(name, arguments).params for name, *arguments in advised]
    assert [given["check"] for given in asked] == ["teacher.example:50051", "127.0.0.1:50051"]
    assert all(given["liveness"] for given in asked)  # Swarm kills what is unhealthy
