import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_agent.config import DeprivatizeConfig
from edge_agent.deprivatize import Guide, train_generator
from networks.gan import Generator, draw_latents
from tests.edge_agent.phase_parts import Keep, silent

CPU = torch.device("cpu")
SMALL = DeprivatizeConfig(steps=6, batch_count=8, generator_width=4, discriminator_width=4, noise_count=3)


def bars(count: int = 64) -> Tensor:
    """Pictures with a bright left half."""
    images_NCHW = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images_NCHW[..., :4] = 255
    return images_NCHW


def train(
    config: DeprivatizeConfig = SMALL, *, checkpoint: Keep | None = None, guide: Guide | None = None
) -> Generator:
    return train_generator(
        bars(),
        class_count=2,
        config=config,
        seed=0,
        device=CPU,
        checkpoint=checkpoint or Keep(),
        progress=silent,
        guide=guide,
    )


def test_generator_learns_the_local_pictures() -> None:
    config = DeprivatizeConfig(
        steps=100,
        batch_count=16,
        generator_width=8,
        discriminator_width=8,
        noise_count=3,
        generator_learning_rate=2e-3,
        discriminator_learning_rate=2e-3,
        ema_decay=0.9,
        shift_fraction=0.0,
    )
    generator = train(config)
    latents_NL = draw_latents(100, class_count=2, noise_count=3, rng=torch.Generator().manual_seed(0))
    images_NCHW = generator(latents_NL)
    assert images_NCHW[..., :4].mean() > 0.9
    assert images_NCHW[..., 4:].mean() < -0.9


def test_result_is_frozen_in_eval_mode_with_statistics_of_its_own_weights() -> None:
    generator = train()
    assert not generator.training
    assert not any(p.requires_grad for p in generator.parameters())
    latents_NL = draw_latents(20_000, class_count=2, noise_count=3, rng=torch.Generator().manual_seed(0))
    first_norm = generator.layers[2]
    inputs_NCHW = generator.layers[:2](latents_NL)
    torch.testing.assert_close(first_norm.running_mean, inputs_NCHW.mean(dim=(0, 2, 3)), atol=0.03, rtol=0)
    torch.testing.assert_close(first_norm.running_var, inputs_NCHW.var(dim=(0, 2, 3)), atol=0, rtol=0.05)


def test_class_axes_of_latents_have_mean_zero_and_the_noise_is_free() -> None:
    latents_NL = draw_latents(10_000, class_count=10, noise_count=4, rng=torch.Generator().manual_seed(0))
    assert latents_NL.shape == (10_000, 14)
    torch.testing.assert_close(latents_NL[:, :10].sum(dim=1), torch.zeros(10_000), atol=1e-5, rtol=0)
    # The shell's radius: the squared length of the class axes is 9 on average, each noise number's is 1.
    assert latents_NL[:, :10].square().sum(dim=1).mean().item() == pytest.approx(9.0, abs=0.2)
    assert latents_NL[:, 10:].square().mean().item() == pytest.approx(1.0, abs=0.03)


class Notes:
    """A guide that is sure of the first half of each batch, and notes what it is asked."""

    def __init__(self) -> None:
        self.begun = 0
        self.numbers: list[int] = []

    def begin(self, generator: Generator) -> None:
        self.begun += 1

    def confidence(self, number: int, latents_NL: Tensor, images_NCHW: Tensor) -> Tensor:
        assert latents_NL.shape == (8, 5) and images_NCHW.shape == (8, 1, 8, 8) and images_NCHW.dtype == torch.uint8
        self.numbers.append(number)
        return (torch.arange(8) < 4).float()


@pytest.mark.parametrize("loss", ["hinge", "bce"])
def test_teacher_is_asked_in_the_last_steps_and_its_confidence_weighs_the_generators_loss(loss: str) -> None:
    def guided(guide: Notes | None, **changes: Any) -> dict[str, Tensor]:
        return train(dataclasses.replace(SMALL, loss=loss, im_queries=19, **changes), guide=guide).state_dict()

    notes = Notes()
    weighed = guided(notes)
    assert (notes.begun, notes.numbers) == (1, [0, 1])  # 19 queries are two batches of eight
    plain, weightless = guided(None), guided(Notes(), im_weight=0.0)
    assert all(plain[name].equal(weightless[name]) for name in plain)
    assert not all(plain[name].equal(weighed[name]) for name in plain)


def test_of_a_training_that_ran_away_nothing_is_asked() -> None:
    notes = Notes()
    generator = train(dataclasses.replace(SMALL, im_queries=19, generator_learning_rate=1e30), guide=notes)
    assert not all(value.isfinite().all() for value in generator.state_dict().values())
    assert (notes.begun, notes.numbers) == (0, [])


def test_resumed_training_asks_under_the_same_numbers() -> None:
    config = dataclasses.replace(SMALL, im_queries=32)
    keep, first, second = Keep(stop_after=4), Notes(), Notes()
    with pytest.raises(InterruptedError):
        train(config, checkpoint=keep, guide=first)
    train(config, checkpoint=keep, guide=second)
    assert (first.numbers, second.numbers) == ([0, 1], [2, 3])
