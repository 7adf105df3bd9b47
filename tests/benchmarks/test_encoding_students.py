"""Students of what encodings leave: a real teacher file, a real training, lines that are not measured twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from click.testing import CliRunner

from benchmarks import datasets, encoding_students, record
from edge_agent import generators
from networks import registry
from networks.gan import Generator
from networks.modelfile import save_model
from tests.models import resnet8_facts


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    (tmp_path / "encodings.jsonl").touch()
    torch.manual_seed(0)
    generator = Generator(class_count=2, noise_count=3, side=8, channels=3, width=4)
    torch.save(generators.to_content(generator), tmp_path / "generator.pt")
    (tmp_path / "run.toml").write_text(tomli_w.dumps({"images": "unread", "distill": {"shift_px": 0}}))
    facts = resnet8_facts(8, channels=3, labels="ab")
    save_model(tmp_path / "teacher.pt", registry.build("resnet8", class_count=2, channels=3).eval(), facts)
    images_NCHW = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    scored = datasets.Labelled(images_NCHW, np.arange(20) % 2)
    monkeypatch.setattr(datasets, "part", lambda dataset, root, name: {"development": scored}[name])
    told = ["--run-dir", str(tmp_path), "--teacher", str(tmp_path / "teacher.pt"), "--data", str(tmp_path)]
    return [*told, "--dataset", "mnist", "--count", "200", "--passes", "1", "--seed", "4"]


def test_each_encoding_and_seed_is_a_line_once(arguments: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        assert CliRunner().invoke(encoding_students.main, arguments, catch_exceptions=False).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "encodings.jsonl").read_text().splitlines()]
    assert [(line["encoding"], line["seed"]) for line in lines] == [("raw", 4), ("auto", 4)]
    assert lines[0]["megabytes"] == pytest.approx(200 * 3 * 64 / 1e6, abs=0.01) and lines[0]["part"] == "development"
    assert all(0 <= line["accuracy"] <= 1 for line in lines)


def test_a_folder_without_a_run_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "generator.pt").unlink()
    found = CliRunner().invoke(encoding_students.main, arguments)
    assert found.exit_code == 1 and found.output.startswith("error: ") and "generator.pt" in found.output
