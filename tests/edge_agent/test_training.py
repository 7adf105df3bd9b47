"""Assistants in their folder: trained when what they depend on is new, and never mistaken for others."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_agent import training
from edge_agent.config import DistillConfig
from edge_agent.console import Console
from edge_agent.distill import Pool
from edge_agent.failures import BadInput
from edge_agent.runs import RunFolder
from edge_agent.training import Lessons, assistant_of
from networks.modelfile import load_model
from tests.models import resnet8_facts

CONFIG = DistillConfig(passes=1, batch_count=8, assistant="resnet14", assistant_passes=2)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run") as opened:
        yield opened


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[DistillConfig]:
    """The settings of every training there was."""
    known: list[DistillConfig] = []
    train: Callable[..., Any] = training.train_assistant

    def noting(*parts: Any, config: DistillConfig, **options: Any) -> Any:
        known.append(config)
        return train(*parts, config=config, **options)

    monkeypatch.setattr(training, "train_assistant", noting)
    return known


def pool() -> Pool:
    rng = torch.Generator().manual_seed(0)
    images_NCHW = torch.randint(0, 256, (24, 1, 8, 8), generator=rng).to(torch.uint8)
    return Pool(images_NCHW=images_NCHW, latents_NL=torch.zeros(24, 5), class_indices_N=torch.arange(24) % 2)


def ask(folder: RunFolder, config: DistillConfig = CONFIG, *, answers: int = 24, seed: int = 0) -> Any:
    lessons = Lessons(
        pool=pool(),
        facts=resnet8_facts(8, channels=1, labels="ab"),
        config=config,
        seed=seed,
        device=torch.device("cpu"),
        console=Console(quiet=True),
        local_NCHW=pool().images_NCHW,
        mixed_MCHW=None,
    )
    return assistant_of(folder, lessons, learnt_from={"answers": answers})


def test_none_is_asked_for_none_is_trained(folder: RunFolder, trained: list[DistillConfig]) -> None:
    assert ask(folder, replace(CONFIG, assistant="")) is None
    assert not trained and not folder.has("assistant.pt")


def test_it_is_trained_once_whatever_only_the_student_depends_on(
    folder: RunFolder, trained: list[DistillConfig]
) -> None:
    first = ask(folder)
    students = {"passes": 9, "image_weight": 7.0, "image_fraction": 1.0, "local_weight": 3.0, "assistant_weight": 2.0}
    again = ask(folder, replace(CONFIG, **students, local_batch_count=9))  # type: ignore[arg-type]
    assert len(trained) == 1 and load_model(folder.path / "assistant.pt").facts.architecture == "resnet14"
    images_NCHW = torch.randn(4, 1, 8, 8)
    assert again(images_NCHW).equal(first(images_NCHW)) and not again.training


@pytest.mark.parametrize(
    "change",
    [
        {"config": replace(CONFIG, assistant="resnet8")},
        {"config": replace(CONFIG, assistant_passes=3)},
        {"config": replace(CONFIG, temperature=2.0)},
        {"answers": 23},
        {"seed": 1},
    ],
    ids=str,
)
def test_it_is_trained_again_where_what_it_learns_from_changes(
    folder: RunFolder, trained: list[DistillConfig], change: dict[str, Any]
) -> None:
    ask(folder)
    ask(folder, **change)
    assert len(trained) == 2
    ask(folder, **change)
    assert len(trained) == 2


def test_each_generation_is_taught_by_the_one_before_from_a_beginning_of_its_own_and_kept(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(folder).state_dict()
    begun: list[tuple[int, Any]] = []
    train: Callable[..., Any] = training.train_assistant

    def noting(*parts: Any, seed: int, before: Any, **options: Any) -> Any:
        begun.append((seed, before))
        if len(begun) == 1:
            raise KeyboardInterrupt
        return train(*parts, seed=seed, before=before, **options)

    monkeypatch.setattr(training, "train_assistant", noting)
    two = replace(CONFIG, assistant_generations=2, local_batch_count=8)
    with pytest.raises(KeyboardInterrupt):
        ask(folder, two)
    second = ask(folder, two).state_dict()
    assert [seed for seed, _ in begun] == [1, 1]
    assert all(value.equal(first[name]) for name, value in begun[1][1].state_dict().items())
    assert not all(value.equal(first[name]) for name, value in second.items())
    assert all(value.equal(second[name]) for name, value in ask(folder, two).state_dict().items())
    assert all(value.equal(first[name]) for name, value in ask(folder).state_dict().items()) and len(begun) == 2
    ask(folder, replace(two, assistant_weight=2.0))  # what the second learns by, and the first does not
    assert [seed for seed, _ in begun] == [1, 1, 1]


def test_a_generation_whose_teacher_is_trained_anew_is_trained_anew_too(
    folder: RunFolder, trained: list[DistillConfig]
) -> None:
    two = replace(CONFIG, assistant_generations=2, local_batch_count=8)
    ask(folder, two)
    (folder.path / "assistant-2.pt").unlink()
    ask(folder, two)
    assert len(trained) == 3
    (folder.path / "assistant.pt").unlink()
    ask(folder, two)
    assert len(trained) == 5


def test_one_that_was_written_but_not_said_to_be_done_is_no_former_one(
    folder: RunFolder, trained: list[DistillConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(folder).state_dict()
    with monkeypatch.context() as killed:
        killed.setattr(RunFolder, "finish", lambda *parts: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ask(folder, replace(CONFIG, assistant_passes=3))
    found = ask(folder).state_dict()
    assert all(value.equal(expected[name]) for name, value in found.items())
    assert [config.assistant_passes for config in trained] == [2, 3, 2]


def test_one_whose_training_ran_away_is_refused_by_its_name_and_not_kept(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    train: Callable[..., Any] = training.train_assistant

    def ran_away(*parts: Any, **options: Any) -> Any:
        network = train(*parts, **options)
        network.linear.weight.data.fill_(float("nan"))
        return network

    monkeypatch.setattr(training, "train_assistant", ran_away)
    with pytest.raises(BadInput, match=r"training of resnet14 ran away.*--set distill\.learning_rate=0\.01"):
        ask(folder)
    assert not folder.has("assistant.pt")
