"""What every kind of generator does, whichever it is; what is its own is in a file of its own."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_agent import generators
from edge_agent.config import DeprivatizeConfig
from edge_agent.deprivatize import train_generator
from edge_agent.diffusion import train_diffusion
from edge_agent.egress import CopyGate
from edge_agent.generators import AnyGenerator
from edge_agent.mixes import train_mixes
from edge_agent.sources import synthetic
from tests.edge_agent.phase_parts import Keep, silent

TRAININGS: dict[str, Callable[..., AnyGenerator]] = {
    "gan": partial(train_generator, class_count=2),
    "diffusion": train_diffusion,
    "mixes": train_mixes,
}
STEPS = 6
every_kind = pytest.mark.parametrize("kind", TRAININGS)


def pictures() -> Tensor:
    return torch.randint(256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def train(kind: str, *, images_NCHW: Tensor | None = None, **options: Any) -> AnyGenerator:
    config = DeprivatizeConfig(
        generator=kind,
        steps=STEPS,
        batch_count=8,
        generator_width=4,
        discriminator_width=4,
        noise_count=3,
        latent_channels=3,
        drawing_steps=3,
        mirror=True,
    )
    usual = {"seed": 0, "device": torch.device("cpu"), "checkpoint": Keep(), "progress": silent}
    return TRAININGS[kind](pictures() if images_NCHW is None else images_NCHW, config=config, **usual | options)


@every_kind
@pytest.mark.parametrize("stop_after", [1, 4])  # mixes: while pictures are blurred, and while they are sharpened
def test_interrupted_and_resumed_training_gives_the_same_bits(kind: str, stop_after: int) -> None:
    expected = train(kind).state_dict()
    keep = Keep(stop_after=stop_after)
    with pytest.raises(InterruptedError):
        train(kind, checkpoint=keep)
    torch.manual_seed(12345)  # another process has another global state
    resumed = train(kind, checkpoint=keep).state_dict()
    assert keep.saved == STEPS
    assert all(resumed[name].equal(expected[name]) for name in expected)


@every_kind
def test_seed_decides_the_weights_and_torchs_global_state_neither_matters_nor_changes(kind: str) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = train(kind).state_dict()
    assert torch.rand(1).equal(expected)
    second, other = train(kind).state_dict(), train(kind, seed=1).state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    assert any(not first[name].equal(other[name]) for name in first if name.endswith("weight"))


@every_kind
def test_progress_hears_of_every_step_and_the_result_is_frozen(kind: str) -> None:
    heard: list[tuple[int, int]] = []

    def listen(done: int, total: int, **figures: float) -> None:
        assert figures and all(figure == figure for figure in figures.values())
        heard.append((done, total))

    made = train(kind, progress=listen)
    assert heard == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert not made.training and not any(p.requires_grad for p in made.parameters())


@every_kind
def test_pictures_that_are_no_squares_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="height 8 and width 12"):
        train(kind, images_NCHW=torch.zeros(4, 1, 8, 12, dtype=torch.uint8))


@every_kind
def test_a_slot_is_always_made_the_same_and_another_differently(kind: str) -> None:
    free = CopyGate(torch.zeros((0, 1, 8, 8), dtype=torch.uint8), 0.0)
    made = train(kind)
    first, again = (synthetic(made, free, seed=0)(3, 8) for _ in range(2))
    assert first[0].shape == (8, made.latent_count) and first[1].dtype == torch.uint8 and first[2] == 0
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], synthetic(made, free, seed=0)(4, 8)[1])


@every_kind
def test_it_is_kept_without_code_and_read_back_as_it_was(kind: str) -> None:
    made = train(kind)
    content = generators.to_content(made)
    assert kind != "gan" or content.keys() == {"arguments", "state_dict"}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    twin = generators.from_content(torch.load(buffer, weights_only=True))
    assert type(twin) is type(made) and not twin.training
    assert all(twin.state_dict()[name].equal(value) for name, value in made.state_dict().items())
    drawn, drawn_too = (network.sample(4, rng=torch.Generator().manual_seed(5)) for network in (made, twin))
    assert all(torch.equal(a, b) for a, b in zip(drawn, drawn_too, strict=True))
