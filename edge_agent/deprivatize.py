"""Phase 1: a generator of pictures like the local ones, so that no local picture needs to leave.

Shape letters: N pictures, C channels, H and W height and width, L latent numbers.

The paper (Ma et al., CVPR 2024) also asks the teacher about every synthetic picture in this phase, to
push the generator towards pictures that the teacher is sure of. Written out, that information
maximisation term only weighs the pictures of an ordinary adversarial loss by 1 + 0.5 · (the teacher's top
probability): with soft answers no two weights differ by more than a factor of 1.43, and with hard answers
all are equal, so the questions would buy nothing. Phase 1 asks none by default; the whole budget goes to phase 2.
With `im_queries` the term is there as written, over the last steps, as a control.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from edge_agent import augment, losses
from edge_agent.config import DeprivatizeConfig
from edge_agent.phase import Checkpoint, Progress, Resumable, average_of
from edge_agent.pixels import normalise, quantise
from edge_agent.precision import training_precision
from networks.gan import Discriminator, Generator, draw_latents


class Guide(Protocol):
    """Somebody who knows how sure the teacher is of pictures."""

    def begin(self, generator: Generator) -> None:
        """Told once, before the first question of a process, which generator its questions are about."""

    def confidence(self, number: int, latents_NL: Tensor, images_NCHW: Tensor) -> Tensor:
        """Return the teacher's top probabilities (N,) of pictures (N, C, H, W) uint8, asked under a number."""


# Name -> the discriminator's loss on real scores, on synthetic ones, and the generator's.
ADVERSARIAL_LOSSES = {
    "hinge": (losses.hinge_real, losses.hinge_synthetic, losses.hinge_generator),
    "bce": (losses.log_real, losses.log_synthetic, losses.log_generator),
}

# Batches over which the generator's batch-norm statistics are set afresh at the end.
_STATISTICS_BATCHES = 50


@torch.random.fork_rng(devices=[])  # gives torch's global generator back as it was
def train_generator(
    images_NCHW: Tensor,
    *,
    class_count: int,
    config: DeprivatizeConfig,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint,
    progress: Progress,
    guide: Guide | None = None,
) -> Generator:
    """Train a generator on local pictures (N, C, H, W) uint8, without labels.

    `guide` asks the teacher in the last `im_queries / batch_count` steps; without one the teacher takes no part. A
    resumed run asks again under the numbers that it asked under before.

    Returns the average of the generators along the way, in eval mode on `device`, its gradients off.
    """
    count, channels, side, width = images_NCHW.shape
    if width != side:
        raise ValueError(f"local pictures: expected squares, got height {side} and width {width}")
    # Initial weights can only be drawn from the global generator, so everything else is too: one state to keep.
    rng = torch.manual_seed(seed)
    generator = Generator(
        class_count=class_count,
        noise_count=config.noise_count,
        side=side,
        channels=channels,
        width=config.generator_width,
    ).to(device)
    discriminator = Discriminator(side=side, channels=channels, width=config.discriminator_width).to(device)
    # Convolutions on a CPU are about twice as fast with the channels next to each other.
    generator.to(memory_format=torch.channels_last)
    discriminator.to(memory_format=torch.channels_last)
    averaged = average_of(generator, decay=config.ema_decay)
    generator_optimizer = adam(generator.parameters(), config.generator_learning_rate)
    discriminator_optimizer = adam(discriminator.parameters(), config.discriminator_learning_rate)
    images_NCHW = images_NCHW.to(device)

    real_loss, synthetic_loss, generators_loss = ADVERSARIAL_LOSSES[config.loss]
    first_guided = config.steps - (config.im_queries // config.batch_count if guide else 0)
    guided = False

    def fake() -> tuple[Tensor, Tensor]:
        latents_NL = draw_latents(
            config.batch_count, class_count=class_count, noise_count=config.noise_count, rng=rng
        )
        with training_precision(device):
            pictures_NCHW: Tensor = generator(latents_NL.to(device))
        return latents_NL, pictures_NCHW.float()

    def score(pictures_NCHW: Tensor) -> Tensor:
        view_NCHW = _discriminators_view(pictures_NCHW, config, rng)
        with training_precision(device):
            scores_N: Tensor = discriminator(view_NCHW)
        return scores_N.float()

    training = Resumable(
        checkpoint,
        rng,
        generator=generator,
        discriminator=discriminator,
        averaged=averaged,
        generator_optimizer=generator_optimizer,
        discriminator_optimizer=discriminator_optimizer,
    )
    while training.goes_on(config.steps):
        fall = 0.5 * (1.0 + math.cos(math.pi * training.done / config.steps))
        generator_optimizer.param_groups[0]["lr"] = fall * config.generator_learning_rate
        discriminator_optimizer.param_groups[0]["lr"] = fall * config.discriminator_learning_rate

        chosen = torch.randint(count, (config.batch_count,), generator=rng)
        real_NCHW = normalise(images_NCHW[chosen.to(device)])
        if config.mirror:
            real_NCHW = augment.mirror(real_NCHW, rng=rng)
        with torch.no_grad():
            _, synthetic_NCHW = fake()
        real_N, synthetic_N = score(torch.cat([real_NCHW, synthetic_NCHW])).split(config.batch_count)
        discriminator_loss = real_loss(real_N).mean() + synthetic_loss(synthetic_N).mean()
        discriminator_optimizer.zero_grad()
        discriminator_loss.backward()
        discriminator_optimizer.step()

        discriminator.requires_grad_(False)
        latents_NL, synthetic_NCHW = fake()
        loss_N = generators_loss(score(synthetic_NCHW))
        # Of a training that ran away nothing is asked.
        if guide is not None and training.done >= first_guided and synthetic_NCHW.isfinite().all():
            if not guided:
                guide.begin(copy.deepcopy(generator))  # what it draws must not move the batch-norm statistics
                guided = True
            sure_N = guide.confidence(
                training.done - first_guided, latents_NL, quantise(synthetic_NCHW.detach()).cpu()
            )
            loss_N = (1.0 + config.im_weight * sure_N.to(device)) * loss_N
        generator_loss = loss_N.mean()
        generator_optimizer.zero_grad()
        generator_loss.backward()
        generator_optimizer.step()
        discriminator.requires_grad_(True)

        averaged.update_parameters(generator)
        training.stepped()
        progress(training.done, config.steps, discriminator_loss=discriminator_loss.item())

    def latents() -> Iterator[Tensor]:
        for _ in range(_STATISTICS_BATCHES):
            yield draw_latents(256, class_count=class_count, noise_count=config.noise_count, rng=rng)

    # The batch-norm statistics gathered on the way belong to other weights than the averaged ones.
    update_bn(latents(), averaged, device=device)
    return cast(Generator, averaged.module).eval().requires_grad_(False)


def _discriminators_view(images_NCHW: Tensor, config: DeprivatizeConfig, rng: torch.Generator) -> Tensor:
    """Change real and synthetic pictures alike before the discriminator sees them.

    It can then not learn a few hundred pictures by heart, and as the generator is trained through the
    same changes it doesn't learn to make them (DiffAugment, Zhao et al., NeurIPS 2020).
    """
    view_NCHW = images_NCHW
    if config.recolour_strength > 0:
        view_NCHW = augment.recolour(view_NCHW, strength=config.recolour_strength, rng=rng)
    if config.shift_fraction > 0:
        largest_px = round(config.shift_fraction * images_NCHW.shape[-1])
        view_NCHW = augment.shift(view_NCHW, largest_px=largest_px, rng=rng)
    if config.cutout_fraction > 0:
        view_NCHW = augment.cutout(view_NCHW, fraction=config.cutout_fraction, rng=rng)
    return view_NCHW


def adam(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Adam:
    """Adam with a short memory of its direction, since what the two networks want changes (DCGAN, ICLR 2016)."""
    return torch.optim.Adam(parameters, lr=learning_rate, betas=(0.5, 0.99))
