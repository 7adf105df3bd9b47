"""``edge-agent predict`` as typed: a line for each picture, or one line that says what is wrong."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from edge_agent.adaptation.memory import Memory
from edge_agent.cli import main
from networks import registry
from networks.modelfile import ModelFacts, save_model
from tests.models import resnet8_facts

FACTS = resnet8_facts(8)


def finished(run_dir: Path, facts: ModelFacts = FACTS) -> Path:
    """A run folder as far as predictions need one, its student never trained."""
    torch.manual_seed(0)
    run_dir.mkdir()
    student = registry.build("resnet8", class_count=3, channels=facts.channels).eval()
    save_model(run_dir / "student.pt", student, facts)
    memory = Memory(
        student=hashlib.sha256((run_dir / "student.pt").read_bytes()).hexdigest(),
        features_MD=np.full((3, 64), 0.125, np.float32),
        answers_MK=np.eye(3, dtype=np.float32),
        usual_shares_K=np.full(3, 1 / 3, np.float32),
        usual_confidence=np.array(0.5, np.float32),
        statistics=None,
    )
    np.savez(run_dir / "memory.npz", **memory.to_arrays())  # type: ignore[arg-type]
    return run_dir


def predict(run_dir: Path, images: Path) -> Result:
    return CliRunner().invoke(main, ["predict", "--run-dir", str(run_dir), "--images", str(images)])


def one_line(result: Result, exit_code: int) -> str:
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two pictures and a file that is none."""
    folder = tmp_path / "camera"
    folder.mkdir()
    for name, grey in (("1.png", 40), ("2.png", 200)):
        Image.new("L", (8, 8), grey).save(folder / name)
    (folder / "3.png").write_text("no picture")
    return folder


def test_each_file_has_a_line_and_one_that_is_no_picture_an_error(tmp_path: Path, images: Path) -> None:
    done = predict(finished(tmp_path / "run"), images)
    assert done.exit_code == 0, done.output
    *lines, broken = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["picture"] for line in lines] == [str(images / "1.png"), str(images / "2.png")]
    for line in lines:
        assert line["class"] == "abc"[int(np.argmax(line["after"]))] and line["shift"] == 0.0
        assert sum(line["before"]) == pytest.approx(1.0, abs=1e-4) == sum(line["after"])
    assert broken.keys() == {"picture", "error"} and broken["picture"] == str(images / "3.png")


@pytest.mark.parametrize("hidden", [[], [".thumbnail.png"]])
def test_folder_without_a_picture_is_bad_input_and_says_which_are_meant(tmp_path: Path, hidden: list[str]) -> None:
    folder = tmp_path / "empty"
    (folder / "deeper").mkdir(parents=True)
    for name in hidden:
        (folder / "deeper" / name).touch()
    line = one_line(predict(finished(tmp_path / "run"), folder), 2)
    assert f"in {str(folder)!r}, found no file" in line and "expected pictures (" in line and "JPEG, PNG" in line


@pytest.mark.parametrize("other", [{"mean": (0.1307,), "std": (0.3081,)}, {"std": (0.25,)}, {"mean": (0.0,)}])
def test_student_of_pictures_on_another_scale_is_refused(
    other: dict[str, tuple[float, ...]], tmp_path: Path, images: Path
) -> None:
    facts = replace(FACTS, **other)  # type: ignore[arg-type]
    line = one_line(predict(finished(tmp_path / "run", facts), images), 6)
    assert f"expected a student of pictures with mean 0.5 and std 0.5, got mean {[*facts.mean]}" in line
    assert f"std {[*facts.std]}" in line and str(tmp_path / "run" / "student.pt") in line


def test_student_of_colour_pictures_has_the_scale_in_every_channel(tmp_path: Path, images: Path) -> None:
    colour = replace(FACTS, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert predict(finished(tmp_path / "run", colour), images).exit_code == 0
    colour = replace(colour, std=(0.5, 0.5, 0.4))
    assert "0.4" in one_line(predict(finished(tmp_path / "another", colour), images), 6)


def stream(run_dir: Path, *paths: Path | str) -> list[object]:
    """What is said of each picture of a stream, one by one; an empty path ends it and begins another."""
    lines = "".join(f"{path}\n" for path in paths)
    asked = ["predict", "--run-dir", str(run_dir), "--images", "-", "--batch", "1"]
    done = CliRunner().invoke(main, asked, input=lines)
    assert done.exit_code == 0, done.output
    return [json.loads(line)["after"] for line in done.stdout.splitlines()]


def test_an_empty_line_forgets_the_stream_before_it(tmp_path: Path, images: Path) -> None:
    run_dir, first, second = finished(tmp_path / "run"), images / "1.png", images / "2.png"
    alone = stream(run_dir, first, second)
    assert stream(run_dir, first, second, "", first, second) == alone + alone
    assert stream(run_dir, first, second, first, second) != alone + alone


def test_memory_that_is_not_this_students_is_refused(tmp_path: Path, images: Path) -> None:
    run_dir = finished(tmp_path / "run")
    memory = run_dir / "memory.npz"
    whole = memory.read_bytes()
    memory.unlink()
    assert "run --phase adapt" in one_line(predict(run_dir, images), 6)
    memory.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in one_line(predict(run_dir, images), 6)
    memory.write_bytes(whole)
    torch.manual_seed(1)
    save_model(run_dir / "student.pt", registry.build("resnet8", class_count=3, channels=1).eval(), FACTS)
    assert "expected one made with student.pt, got another's" in one_line(predict(run_dir, images), 6)


def test_pictures_in_folders_named_as_classes_are_scored_and_others_are_not(tmp_path: Path, images: Path) -> None:
    run_dir = finished(tmp_path / "run")
    plain = predict(run_dir, images)
    assert plain.exit_code == 0 and plain.stderr == ""
    called = [json.loads(line)["class"] for line in plain.stdout.splitlines()[:2]]
    assert called[0] == called[1], "both are grey, and the student never learnt anything"
    other = next(name for name in "abc" if name != called[0])
    for name in (called[0], other):
        (images / name).mkdir()
    (images / "1.png").rename(images / called[0] / "1.png")
    (images / "2.png").rename(images / other / "2.png")
    scored = predict(run_dir, images)
    assert scored.stderr == ("of 2 pictures in folders named as a class 50.0% are called so, 50.0% before adapting\n")
