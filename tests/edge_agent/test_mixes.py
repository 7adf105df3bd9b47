import dataclasses

import pytest
import torch
from torch import Tensor

from edge_agent.config import DeprivatizeConfig
from edge_agent.egress import CopiesStopped, CopyGate
from edge_agent.mixes import feature_distance, train_mixes
from edge_agent.pixels import normalise
from edge_agent.sources import probe, synthetic
from networks.mixes import Mixes
from tests.edge_agent.phase_parts import Keep, silent

CPU = torch.device("cpu")
SMALL = DeprivatizeConfig(
    generator="mixes",
    steps=6,
    batch_count=8,
    generator_width=4,
    discriminator_width=4,
    latent_channels=3,
    mirror=True,
)


def pictures(count: int = 64, *, seed: int = 0) -> Tensor:
    """A bright square on a dark ground, somewhere."""
    rng = torch.Generator().manual_seed(seed)
    corners_N2 = torch.randint(0, 5, (count, 2), generator=rng)
    images_NCHW = torch.full((count, 1, 8, 8), 30, dtype=torch.uint8)
    for image_CHW, (row, column) in zip(images_NCHW, corners_N2.tolist(), strict=True):
        image_CHW[:, row : row + 4, column : column + 4] = 220
    return images_NCHW


def train(
    config: DeprivatizeConfig = SMALL,
    *,
    images_NCHW: Tensor | None = None,
) -> Mixes:
    return train_mixes(
        pictures() if images_NCHW is None else images_NCHW,
        config=config,
        seed=0,
        device=CPU,
        checkpoint=Keep(),
        progress=silent,
    )


def test_discriminator_joins_in_after_a_third_and_progress_hears_of_every_step() -> None:
    heard: list[tuple[int, int, bool]] = []

    def listen(done: int, total: int, **figures: float) -> None:
        heard.append((done, total, "discriminator_loss" in figures))

    train_mixes(pictures(), config=SMALL, seed=0, device=CPU, checkpoint=Keep(), progress=listen)
    assert heard == [(step, 6, step > 2) for step in range(1, 7)]


@pytest.mark.parametrize("loss", ["hinge", "bce"])
@pytest.mark.parametrize("mix_pictures", [1, 2, 3])
def test_every_adversarial_loss_and_number_of_pictures_trains(loss: str, mix_pictures: int) -> None:
    made = train(dataclasses.replace(SMALL, loss=loss, mix_pictures=mix_pictures))
    assert all(value.isfinite().all() for value in made.state_dict().values())


def test_result_is_frozen_and_has_a_latent_of_every_picture_and_mirror_image() -> None:
    mixes = train()
    assert not mixes.training and not any(p.requires_grad for p in mixes.parameters())
    assert mixes.latents_VMZhw.shape == (2, 64, 3, 2, 2) and mixes.latents_VMZhw.dtype == torch.float16
    assert mixes.latents_VMZhw.flatten(1).std(1).min() > 0.5, "none was left empty"
    unmirrored = train(dataclasses.replace(SMALL, mirror=False))
    assert unmirrored.latents_VMZhw.shape == (1, 64, 3, 2, 2)


def test_distance_of_features_is_a_part_of_their_size() -> None:
    wanted = [torch.full((2, 3, 4, 4), 2.0), torch.full((2, 3, 2, 2), 5.0)]
    got = [torch.full((2, 3, 4, 4), 3.0), torch.full((2, 3, 2, 2), 4.0)]
    assert feature_distance(got, wanted).item() == pytest.approx(0.5 + 0.2)
    assert feature_distance(wanted, wanted).item() == 0.0


# --- what phase 2 does with them ---


@pytest.fixture(scope="module")
def copier() -> Mixes:
    """An autoencoder that has learnt its pictures, asked for each as it is."""
    config = DeprivatizeConfig(
        generator="mixes",
        steps=400,
        batch_count=32,
        generator_width=16,
        discriminator_width=4,
        generator_learning_rate=3e-3,
        ema_decay=0.95,
        latent_channels=16,
        mix_pictures=1,
        mix_noise=0.0,
    )
    return train(config, images_NCHW=pictures(25, seed=3))


def test_copies_are_stopped_by_the_gate_before_anything_is_planned(copier: Mixes) -> None:
    training_NCHW = pictures(25, seed=3)
    gate = CopyGate(training_NCHW, threshold=20.0)
    probe(copier, gate, seed=0)
    with pytest.raises(CopiesStopped, match="None of those was sent"):
        gate.check()
    with pytest.raises(CopiesStopped):
        synthetic(copier, gate, seed=0)(0, 16)


def test_a_copier_gives_its_pictures_back(copier: Mixes) -> None:
    _, images_NCHW = copier.sample(50, rng=torch.Generator().manual_seed(0))
    distances_NM = (images_NCHW[:, None] - normalise(pictures(25, seed=3))[None]).abs().mean((2, 3, 4))
    assert distances_NM.amin(1).mean() < 0.1
