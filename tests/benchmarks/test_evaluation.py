"""Test figures of a finished run: from its own files, with its own settings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import evaluation
from benchmarks.datasets import Labelled
from benchmarks.evaluation import add_test_figures
from edge_agent.adaptation.memory import Memory
from edge_agent.adaptation.method import Adapted
from edge_agent.agent import predict_classes
from networks import registry
from networks.modelfile import save_model
from tests.models import resnet8_facts

FACTS = resnet8_facts(8)


@pytest.mark.parametrize("strength", [0.0, 20.0])
def test_adapted_predictions_are_made_with_the_runs_own_settings(strength: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = registry.build("resnet8", class_count=3, channels=1).eval()
    torch.nn.init.normal_(student.linear.weight, std=0.01)  # unsure, so that neighbours decide
    save_model(tmp_path / "student.pt", student, FACTS)
    (tmp_path / "run.toml").write_text(f'images = "a"\n[adapt]\nstrength = {strength}\n')
    (tmp_path / "summary.json").write_text(json.dumps({"accuracy": {}, "seed": 3}))
    images_NCHW = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    labels_N = predict_classes(student, torch.from_numpy(images_NCHW)).numpy()
    # Everything remembered is of a class that the student names the least.
    rarest = int(np.bincount(labels_N, minlength=3).argmin())
    memory = Memory(
        student="",
        features_MD=torch.nn.functional.normalize(student.features(torch.rand(40, 1, 8, 8)), dim=1).detach().numpy(),
        answers_MK=np.eye(3, dtype=np.float32)[[rarest] * 40],
        usual_shares_K=((np.bincount(labels_N, minlength=3) + 1) / 33).astype(np.float32),  # so the stream is usual
        usual_confidence=np.array(1 / 3, np.float32),
        statistics=None,
    )
    np.savez(tmp_path / "memory.npz", **memory.to_arrays())  # type: ignore[arg-type]
    summary = add_test_figures(tmp_path, tmp_path / "student.pt", Labelled(images_NCHW, labels_N))
    assert summary["accuracy"]["student"] == summary["agreement"] == 1.0
    assert (summary["accuracy"]["student_adapted"] == 1.0) == (strength == 0.0)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_data_set_listed_class_by_class_is_adapted_to_in_an_order_of_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[list[int]] = []

    class Reads:
        """Says what is written in the first pixel."""

        def __init__(self, *given: object) -> None:
            streams.append([])

        def adapt(self, images_NCHW: torch.Tensor) -> Adapted:
            classes_N = images_NCHW[:, 0, 0, 0].long()
            streams[-1] += classes_N.tolist()
            return Adapted(probabilities_NK=torch.nn.functional.one_hot(classes_N, 3).float())

    student = registry.build("resnet8", class_count=3, channels=1).eval()
    save_model(tmp_path / "student.pt", student, FACTS)
    (tmp_path / "run.toml").write_text('images = "a"\n')
    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr(evaluation, "Adapter", Reads)
    monkeypatch.setattr(evaluation.Memory, "from_arrays", lambda arrays: None)
    np.savez(tmp_path / "memory.npz")
    labels_N = np.repeat(np.arange(3), 100)
    images_NCHW = np.broadcast_to(labels_N.astype(np.uint8)[:, None, None, None], (300, 1, 8, 8)).copy()
    summary = add_test_figures(tmp_path, tmp_path / "student.pt", Labelled(images_NCHW, labels_N))
    assert summary["accuracy"]["student_adapted"] == 1.0
    ((*stream,),) = streams
    assert sorted(stream) == labels_N.tolist() and set(stream[:20]) == {0, 1, 2}
