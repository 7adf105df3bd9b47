from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks.modelfile import LoadedModel, ModelFacts
from networks.registry import build
from teacher_service.engine import Engine, EngineError
from teacher_service.torch_engine import TorchEngine

MEAN, STD = (0.5, 0.25, 0.1), (0.5, 0.2, 0.3)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def loaded(module: nn.Module, output: Any = "logits") -> LoadedModel:
    facts = ModelFacts(
        architecture="resnet8",
        labels=("a", "b", "c"),
        channels=3,
        height=8,
        width=12,
        mean=MEAN,
        std=STD,
        output=output,
    )
    return LoadedModel(module, facts, "d" * 64)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3, 8, 12), dtype=np.uint8)


def channel_means(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


def test_answers_are_the_softmax_of_the_model_on_normalised_pictures() -> None:
    torch.manual_seed(0)
    module = build("resnet8", class_count=3, channels=3)
    images = pictures(5)
    engine: Engine = TorchEngine(loaded(module), device="cpu")
    answers = engine.answer(images)
    # by hand, in numpy's double precision
    normalised = (images / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.no_grad():
        expected = module.eval().double()(torch.tensor(normalised)).softmax(1).numpy()
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)


def test_probabilities_pass_through_and_sum_to_one() -> None:
    images = pictures(4)
    normalised = torch.tensor(images).double() / 255
    normalised = (normalised - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = channel_means(normalised).softmax(1)
    # a model in half precision whose rows sum to 1 only nearly
    engine = TorchEngine(loaded(Function(lambda x: channel_means(x).softmax(1) * 1.0005), "probabilities"))
    answers = engine.answer(images)
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)


def test_the_engine_says_what_the_model_is() -> None:
    engine = TorchEngine(loaded(Function(channel_means)))
    assert (engine.labels, engine.channels, engine.height, engine.width) == (("a", "b", "c"), 3, 8, 12)
    assert engine.model_digest == "d" * 64


def test_a_model_in_training_mode_is_served_in_eval_mode() -> None:
    module = nn.Sequential(nn.Dropout(0.9), Function(channel_means)).train()
    engine = TorchEngine(loaded(module))
    assert np.array_equal(engine.answer(pictures(3)), engine.answer(pictures(3)))


def test_read_only_pictures_and_an_empty_batch_are_answered() -> None:
    engine = TorchEngine(loaded(Function(channel_means)))
    images = pictures(2)
    images.setflags(write=False)
    assert engine.answer(images).shape == (2, 3)
    assert engine.answer(images[:0]).shape == (0, 3)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_an_error(number: float) -> None:
    def fails_on_white(images: Tensor) -> Tensor:
        means = channel_means(images)
        return torch.where(means > 2, number, means)

    engine = TorchEngine(loaded(Function(fails_on_white)))
    with pytest.raises(EngineError, match="expected finite answers"):
        engine.answer(np.full((2, 3, 8, 12), 255, np.uint8))


@pytest.mark.parametrize(
    ("function", "output", "said"),
    [
        (lambda x: channel_means(x) * torch.nan, "logits", "finite"),
        (lambda x: channel_means(x)[:, :2], "logits", r"expected answers \(2, 3\), got \(2, 2\)"),
        (lambda x: channel_means(x)[:1], "logits", r"expected answers \(2, 3\), got \(1, 3\)"),
        (lambda x: channel_means(x) * 0 + 3, "probabilities", "sum 9 .* --output logits"),
        (lambda x: channel_means(x) * 0 + torch.tensor([1.5, -0.5, 0]), "probabilities", "smallest -0.5"),
        (lambda x: x @ torch.zeros(5, 5), "logits", "cannot run on device 'cpu'"),
    ],
)
def test_a_model_that_cannot_answer_does_not_start(
    function: Callable[[Tensor], Tensor], output: str, said: str
) -> None:
    with pytest.raises(EngineError, match=said) as refused:
        TorchEngine(loaded(Function(function), output), device="cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(EngineError, match=f"device '{device}'"):
        TorchEngine(loaded(Function(channel_means)), device=device)
