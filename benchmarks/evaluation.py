"""Test accuracy, once a run is finished: the only place where test labels are read.

Shape letters: N pictures, K classes.
"""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.datasets import Labelled
from edge_agent.adaptation.adapter import Adapter
from edge_agent.adaptation.memory import Memory
from edge_agent.config import AdaptConfig, build_config
from networks.classifiers import Classifier
from networks.modelfile import load_model
from teacher_service.torch_engine import TorchEngine

BATCH_COUNT = 200


@dataclass(frozen=True)
class Looked:
    """What a model said of test pictures: a class each (int64, N), and whether it was right (bool, N)."""

    classes_N: np.ndarray[Any, np.dtype[np.int64]]
    right_N: np.ndarray[Any, np.dtype[np.bool_]]


def correct(model: Path, test: Labelled) -> Looked:
    """Asks a local copy of a model about every test picture."""
    classes_N = _classes(model, test)
    return Looked(classes_N, classes_N == test.labels_N)


def share(right_N: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    """The part that is true, to five decimals."""
    return round(float(right_N.mean()), 5)


def add_test_figures(run_dir: Path, teacher: Path, test: Labelled) -> dict[str, Any]:
    """Fills ``accuracy.*`` and ``agreement`` into a run's summary.json, and returns the summary.

    Test pictures go through local copies of the networks alone, never through a server, and are adapted to with the
    run's own settings.
    """
    adapt = build_config(tomllib.loads((run_dir / "run.toml").read_text("utf-8"))).adapt
    teachers, students = correct(teacher, test), correct(run_dir / "student.pt", test)
    adapted_N = _adapted_classes(run_dir, test, adapt)
    path = run_dir / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text())
    summary["accuracy"] = {
        "teacher": share(teachers.right_N),
        "student": share(students.right_N),
        "student_adapted": share(adapted_N == test.labels_N),
    }
    summary["agreement"] = share(students.classes_N == teachers.classes_N)
    beside = path.with_name(".summary.json.new")
    beside.write_text(json.dumps(summary, indent=2) + "\n")
    beside.replace(path)
    return summary


def _classes(model: Path, test: Labelled) -> np.ndarray[Any, np.dtype[np.int64]]:
    engine = TorchEngine(load_model(model), device="cpu")
    parts = np.array_split(test.images_NCHW, max(1, len(test.images_NCHW) // BATCH_COUNT))
    return np.concatenate([engine.answer(part).argmax(axis=1) for part in parts])


def _adapted_classes(run_dir: Path, test: Labelled, adapt: AdaptConfig) -> np.ndarray[Any, np.dtype[np.int64]]:
    memory = Memory.load(run_dir / "memory.npz")
    student = load_model(run_dir / "student.pt").module
    assert isinstance(student, Classifier)
    adapter = Adapter(student, memory, adapt)
    # In an order of chance: data sets are often listed class by class, and a stream that is tells classes away.
    order_N = torch.from_numpy(np.random.default_rng(0).permutation(len(test.images_NCHW)))
    parts = torch.from_numpy(test.images_NCHW)[order_N].split(BATCH_COUNT)
    classes_N = torch.empty_like(order_N)
    classes_N[order_N] = torch.cat([adapter.adapt(part).probabilities_NK.argmax(1) for part in parts])
    return classes_N.numpy()
