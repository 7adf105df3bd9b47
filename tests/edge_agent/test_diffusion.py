import dataclasses

import pytest
import torch
from torch import Tensor

from edge_agent.config import DeprivatizeConfig
from edge_agent.diffusion import train_diffusion
from edge_agent.egress import CopyGate
from edge_agent.pixels import quantise
from edge_agent.pool import synthetic
from networks.diffusion import Diffusion
from tests.edge_agent.phase_parts import Keep, silent

CPU = torch.device("cpu")
SMALL = DeprivatizeConfig(generator="diffusion", steps=6, batch_count=8, generator_width=4, mirror=True)


def pictures(*shades: int, count: int = 64) -> Tensor:
    """Even ones, of each shade as many."""
    return torch.tensor(shades, dtype=torch.uint8).repeat(count // len(shades)).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)


def train(
    config: DeprivatizeConfig = SMALL,
    *,
    seed: int = 0,
    checkpoint: Keep | None = None,
    images_NCHW: Tensor | None = None,
) -> Diffusion:
    return train_diffusion(
        pictures(30, 220) if images_NCHW is None else images_NCHW,
        config=config,
        seed=seed,
        device=CPU,
        checkpoint=checkpoint or Keep(),
        progress=silent,
    )


def test_interrupted_and_resumed_training_gives_the_same_bits() -> None:
    expected = train().state_dict()
    keep = Keep(stop_after=3)
    with pytest.raises(InterruptedError):
        train(checkpoint=keep)
    torch.manual_seed(12345)  # another process has another global state
    resumed = train(checkpoint=keep).state_dict()
    assert keep.saved == 6
    assert all(resumed[name].equal(expected[name]) for name in expected)


def test_seed_decides_the_weights_and_torchs_global_state_neither_matters_nor_changes() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = train().state_dict()
    assert torch.rand(1).equal(expected)
    second, other = train().state_dict(), train(seed=1).state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    assert not other["network.conv_in.weight"].equal(first["network.conv_in.weight"])


def test_result_is_frozen_and_progress_hears_of_every_step() -> None:
    heard: list[tuple[int, int]] = []

    def listen(done: int, total: int, **figures: float) -> None:
        assert figures["denoising_loss"] > 0
        heard.append((done, total))

    made = train_diffusion(pictures(30, 220), config=SMALL, seed=0, device=CPU, checkpoint=Keep(), progress=listen)
    assert heard == [(step, 6) for step in range(1, 7)]
    assert not made.training and not any(p.requires_grad for p in made.parameters())


def test_pictures_that_are_no_squares_are_refused() -> None:
    with pytest.raises(ValueError, match="height 8 and width 12"):
        train(images_NCHW=torch.zeros(4, 1, 8, 12, dtype=torch.uint8))


@pytest.fixture(scope="module")
def learnt() -> Diffusion:
    config = dataclasses.replace(
        SMALL, steps=200, batch_count=32, generator_width=8, generator_learning_rate=1e-2, ema_decay=0.95
    )
    return train(config)


def test_it_draws_both_kinds_of_pictures_and_none_between(learnt: Diffusion) -> None:
    _, images_NCHW = learnt.sample(100, rng=torch.Generator().manual_seed(0))
    shades_N = quantise(images_NCHW).float().mean((1, 2, 3))
    dark_N, bright_N = (shades_N - 30).abs() < 30, (shades_N - 220).abs() < 30
    assert min(int(dark_N.sum()), int(bright_N.sum())) > 20
    assert int((dark_N | bright_N).sum()) > 90


def test_a_slot_is_always_made_the_same_and_another_differently(learnt: Diffusion) -> None:
    free = CopyGate(torch.zeros((0, 1, 8, 8), dtype=torch.uint8), 0.0)
    first, again = (synthetic(learnt, free, seed=0)(3, 8) for _ in range(2))
    assert first[0].shape == (8, 0) and first[1].dtype == torch.uint8 and first[2] == 0
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], synthetic(learnt, free, seed=0)(4, 8)[1])
