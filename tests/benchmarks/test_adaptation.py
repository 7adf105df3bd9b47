"""The benchmark of adaptation: a line for each cell, nothing measured twice, and a table of what the lines say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch

from benchmarks import adaptation, adaptation_table, datasets, record
from benchmarks.corruptions import DEVELOPMENT, TEST
from benchmarks.datasets import Labelled
from benchmarks.streams import shuffled
from networks import registry
from networks.modelfile import load_model, save_model
from tests.models import resnet8_facts

ROW = {"dataset": "mnist", "part": "test", "run": "r", "streams": "s", "pictures": 100, "batch": 16, "code": "c"}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student that was never trained, and 60 pictures instead of MNIST; results are kept beside."""
    torch.manual_seed(0)
    facts = resnet8_facts(16, labels="0123456789")
    save_model(tmp_path / "student.pt", registry.build("resnet8", class_count=10, channels=1).eval(), facts)
    rng = np.random.default_rng(0)
    shown = Labelled(rng.integers(0, 256, (60, 1, 16, 16), np.uint8), rng.integers(0, 10, 60))
    monkeypatch.setattr(datasets, "part", lambda *_: shown)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return tmp_path


def measure(run_dir: Path, *arguments: str) -> list[dict[str, Any]]:
    """Runs the command with three methods on one corruption; returns all lines that are kept."""
    chosen = ["--part", "development", "--order", "shuffled", "--batch", "16", "--pictures", "40", "--no-cost"]
    methods = ["--method", "none", "--method", "t3a", "--method", "tent"]
    command = ["--run-dir", str(run_dir), *chosen, *methods, *arguments]
    done = click.testing.CliRunner().invoke(adaptation.main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return adaptation.lines()


def test_each_method_writes_a_line_and_the_same_command_none_again(run_dir: Path) -> None:
    first = measure(run_dir, "--corruption", "fog")
    assert [(line["method"], line["order"], line["pictures"]) for line in first] == [
        (method, "shuffled", 40) for method in ("none", "t3a", "tent")
    ]
    assert all(line["accuracy"].keys() == {"fog/3", "fog/5"} for line in first)
    assert all(0 <= value <= 1 for line in first for value in line["accuracy"].values())
    assert measure(run_dir, "--corruption", "fog") == first
    more = measure(run_dir, "--corruption", "fog", "--corruption", "shear")[len(first) :]
    assert [set(line["accuracy"]) for line in more] == [{"shear/3", "shear/5"}] * 3


def test_changed_student_is_measured_again(run_dir: Path) -> None:
    first = measure(run_dir, "--corruption", "fog")
    (run_dir / "memory.npz").write_bytes(b"another memory")
    assert len(measure(run_dir, "--corruption", "fog")) == 2 * len(first)


def test_cost_is_a_line_of_its_own_and_the_trial_keeps_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptation, "_apart", lambda function, *arguments: function(*arguments))  # a second, not ten
    assert measure(run_dir, "--corruption", "fog", "--quick", "--cost") == []
    chosen = ["--method", "tent", "--order", "clean", "--batch", "16", "--pictures", "40", "--part", "development"]
    command = ["--run-dir", str(run_dir), *chosen]
    done = click.testing.CliRunner().invoke(adaptation.main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    accuracy, cost = adaptation.lines()
    assert accuracy["accuracy"].keys() == {"clean"} and "order" not in cost
    assert cost["ratio_shifted"] > 1 and cost["ratio_unshifted"] > 1 and cost["pictures_per_second"] > 0
    assert cost["peak_megabytes"] is None or 0 <= cost["peak_megabytes"] < 500


def test_part_has_its_own_corruptions_only(run_dir: Path) -> None:
    for part, other in (("development", "rotate"), ("test", "fog")):
        command = ["--run-dir", str(run_dir), "--part", part, "--corruption", other]
        done = click.testing.CliRunner().invoke(adaptation.main, command)
        assert done.exit_code == 2 and f"({part}), got {other}" in done.output
    assert adaptation.corruptions_of("mnist", "development") == tuple(DEVELOPMENT)
    assert adaptation.corruptions_of("mnist", "test") == (*TEST, "digits")


def test_missing_student_is_one_line(tmp_path: Path) -> None:
    done = click.testing.CliRunner().invoke(adaptation.main, ["--run-dir", str(tmp_path)])
    assert done.exit_code == 1 and str(tmp_path) in str(done.output)


def test_tent_is_left_out_for_a_student_without_batch_norm_and_the_others_go_on(run_dir: Path) -> None:
    facts = replace(load_model(run_dir / "student.pt").facts, architecture="vgg11", height=32, width=32)
    save_model(run_dir / "student.pt", registry.build("vgg11", class_count=10, channels=1).eval(), facts)
    command = ["--run-dir", str(run_dir), "--order", "clean", "--batch", "16", "--pictures", "20", "--no-cost"]
    methods = ["--method", "tent", "--method", "none", "--method", "batch-norm"]
    done = click.testing.CliRunner().invoke(adaptation.main, [*command, "--part", "development", *methods])
    assert done.exit_code == 0, done.output
    assert "tent: not applicable, the student has no batch norm" in done.stderr
    assert [line["method"] for line in adaptation.lines()] == ["none", "batch-norm"]


@pytest.mark.parametrize(("dataset", "other"), [("mnist", "digits"), ("mnist-digits", "mnist")])
def test_student_meets_the_same_classes_in_another_hand(
    dataset: str, other: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = adaptation.METHODS["none"](run_dir)
    images_NCHW = np.random.default_rng(1).integers(0, 256, (30, 1, 16, 16), np.uint8)
    named_N = student.adapt(torch.from_numpy(images_NCHW)).probabilities_NK.argmax(dim=1).numpy()
    shown = Labelled(images_NCHW, named_N)  # of these, unlike of the data set's own, the student names all rightly
    monkeypatch.setattr(datasets, "pen_digits" if other == "digits" else "mnist", lambda *_: shown)
    chosen = ["--dataset", dataset, "--corruption", other, "--order", "shuffled", "--order", "by class"]
    rest = ["--run-dir", str(run_dir), "--method", "none", "--batch", "16", "--no-cost"]
    done = click.testing.CliRunner().invoke(adaptation.main, [*chosen, *rest], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [(line["order"], line["accuracy"]) for line in adaptation.lines()] == [
        ("shuffled", {other: 1.0}),
        ("by class", {other: 1.0}),
    ]


def test_accuracy_is_the_share_named_rightly_whatever_the_batch(run_dir: Path) -> None:
    stream = shuffled(datasets.part("mnist", run_dir, "test"), count=50)
    method = adaptation.METHODS["none"](run_dir)
    right = (method.adapt(stream.images_NCHW).probabilities_NK.argmax(1) == stream.labels_N).double().mean().item()
    assert [adaptation.accuracy(method, stream, batch) for batch in (1, 16, 50)] == pytest.approx([right] * 3)


def test_table_has_means_and_the_worst_difference_of_the_newest_lines() -> None:
    def line(method: str, order: str, accuracy: dict[str, float], **more: Any) -> dict[str, Any]:
        return ROW | {"question": "accuracy", "method": method, "order": order, "accuracy": accuracy} | more

    cost = {"ratio_shifted": 2.5, "ratio_unshifted": 2.25, "pictures_per_second": 1234.5, "peak_megabytes": 7.25}
    lines = [
        line("none", "shuffled", {"fog/3": 0.1}, run="a former student"),
        line("none", "shuffled", {"fog/3": 0.9, "fog/5": 0.5}),
        line("tent", "shuffled", {"fog/3": 0.1}, code="a former method"),
        line("tent", "shuffled", {"fog/3": 0.8}),
        line("tent", "shuffled", {"fog/5": 0.7}),
        line("none", "clean", {"clean": 0.99}),
        line("tent", "clean", {"clean": 0.985}),
        ROW | {"question": "cost", "method": "tent"} | cost,
        line("none", "shuffled", {"fog/3": 0.25}, batch=200),
    ]
    told = "\n".join(adaptation_table.tables([json.loads(json.dumps(line)) for line in lines]))
    assert "| none | 70.00 | 99.00 |" in told
    assert "| tent | 75.00 (-10.00 fog/3) | 98.50 (-0.50) | 2.50, 2.25 | 1,234 | 7.2 |" in told
    assert told.index("batches of 16") < told.index("batches of 200") < told.index("25.00")
