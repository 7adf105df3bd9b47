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
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from edge_agent import augment, losses
from edge_agent.config import DeprivatizeConfig
from edge_agent.phase import Checkpoint, Progress, Resumable, average_of, fall
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
    _, _, side, width = images_NCHW.shape
    if width != side:
        raise ValueError(f"local pictures: expected squares, got height {side} and width {width}")
    # Initial weights can only be drawn from the global generator, so everything else is too: one state to keep.
    rng = torch.manual_seed(seed)
    game = _Game(images_NCHW, class_count=class_count, config=config, rng=rng, device=device)
    guidance = _Guidance(guide, config)
    training = Resumable(checkpoint, rng, **game.parts())
    while training.goes_on(config.steps):
        game.set_step_sizes(fall(training.done, config.steps))
        discriminator_loss = game.step_of_the_discriminator()
        game.step_of_the_generator(partial(guidance.weights, training.done, game.generator))
        training.stepped()
        progress(training.done, config.steps, discriminator_loss=discriminator_loss)
    return game.average()


class _Game:
    """A generator and a discriminator, what they learn from, and a step of each; all on their device."""

    def __init__(
        self,
        images_NCHW: Tensor,
        *,
        class_count: int,
        config: DeprivatizeConfig,
        rng: torch.Generator,
        device: torch.device,
    ) -> None:
        _, channels, side, _ = images_NCHW.shape
        self.generator = Generator(
            class_count=class_count,
            noise_count=config.noise_count,
            side=side,
            channels=channels,
            width=config.generator_width,
        ).to(device)
        self._discriminator = Discriminator(side=side, channels=channels, width=config.discriminator_width).to(device)
        # Convolutions on a CPU are about twice as fast with the channels next to each other.
        self.generator.to(memory_format=torch.channels_last)
        self._discriminator.to(memory_format=torch.channels_last)
        self._averaged = average_of(self.generator, decay=config.ema_decay)
        self._generator_optimizer = adam(self.generator.parameters(), config.generator_learning_rate)
        self._discriminator_optimizer = adam(self._discriminator.parameters(), config.discriminator_learning_rate)
        self._images_NCHW = images_NCHW.to(device)
        self._class_count, self._config, self._rng, self._device = class_count, config, rng, device
        self._real_loss, self._synthetic_loss, self._generators_loss = ADVERSARIAL_LOSSES[config.loss]

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """All that a step changes."""
        return {
            "generator": self.generator,
            "discriminator": self._discriminator,
            "averaged": self._averaged,
            "generator_optimizer": self._generator_optimizer,
            "discriminator_optimizer": self._discriminator_optimizer,
        }

    def set_step_sizes(self, factor: float) -> None:
        """Set the step sizes to a part of the configured ones."""
        self._generator_optimizer.param_groups[0]["lr"] = factor * self._config.generator_learning_rate
        self._discriminator_optimizer.param_groups[0]["lr"] = factor * self._config.discriminator_learning_rate

    def step_of_the_discriminator(self) -> float:
        """Teach the discriminator a batch of both kinds; return its loss."""
        count = self._config.batch_count
        chosen = torch.randint(len(self._images_NCHW), (count,), generator=self._rng)
        real_NCHW = normalise(self._images_NCHW[chosen.to(self._device)])
        if self._config.mirror:
            real_NCHW = augment.mirror(real_NCHW, rng=self._rng)
        with torch.no_grad():
            _, synthetic_NCHW = self._fake()
        real_N, synthetic_N = self._score(torch.cat([real_NCHW, synthetic_NCHW])).split(count)
        loss = self._real_loss(real_N).mean() + self._synthetic_loss(synthetic_N).mean()
        self._discriminator_optimizer.zero_grad()
        loss.backward()
        self._discriminator_optimizer.step()
        return loss.item()

    def step_of_the_generator(self, weights: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        """Teach the generator a batch; `weights` of latents and pictures says how much each counts; None: alike."""
        self._discriminator.requires_grad_(False)
        latents_NL, synthetic_NCHW = self._fake()
        loss_N = self._generators_loss(self._score(synthetic_NCHW))
        weight_N = weights(latents_NL, synthetic_NCHW.detach())
        if weight_N is not None:
            loss_N = weight_N.to(self._device) * loss_N
        self._generator_optimizer.zero_grad()
        loss_N.mean().backward()
        self._generator_optimizer.step()
        self._discriminator.requires_grad_(True)
        self._averaged.update_parameters(self.generator)

    def average(self) -> Generator:
        """Return the average of the generators so far, in eval mode, its gradients off."""

        def latents() -> Iterator[Tensor]:
            for _ in range(_STATISTICS_BATCHES):
                yield self._latents(256)

        # The batch-norm statistics gathered on the way belong to other weights than the averaged ones.
        update_bn(latents(), self._averaged, device=self._device)
        return cast(Generator, self._averaged.module).eval().requires_grad_(False)

    def _latents(self, count: int) -> Tensor:
        return draw_latents(count, class_count=self._class_count, noise_count=self._config.noise_count, rng=self._rng)

    def _fake(self) -> tuple[Tensor, Tensor]:
        latents_NL = self._latents(self._config.batch_count)
        with training_precision(self._device):
            pictures_NCHW: Tensor = self.generator(latents_NL.to(self._device))
        return latents_NL, pictures_NCHW.float()

    def _score(self, pictures_NCHW: Tensor) -> Tensor:
        view_NCHW = _discriminators_view(pictures_NCHW, self._config, self._rng)
        with training_precision(self._device):
            scores_N: Tensor = self._discriminator(view_NCHW)
        return scores_N.float()


class _Guidance:
    """Asks the guide, if there is one, in the last `im_queries / batch_count` steps."""

    def __init__(self, guide: Guide | None, config: DeprivatizeConfig) -> None:
        self._guide, self._config = guide, config
        self._first_step = config.steps - config.im_queries // config.batch_count
        self._begun = False

    def weights(self, step: int, generator: Generator, latents_NL: Tensor, images_NCHW: Tensor) -> Tensor | None:
        """Return how much each picture (N, C, H, W) counts in the generator's loss (N,); None: alike."""
        # Of a training that ran away nothing is asked.
        if self._guide is None or step < self._first_step or not images_NCHW.isfinite().all():
            return None
        if not self._begun:
            self._guide.begin(copy.deepcopy(generator))  # what it draws must not move the batch-norm statistics
            self._begun = True
        sure_N = self._guide.confidence(step - self._first_step, latents_NL, quantise(images_NCHW).cpu())
        return 1.0 + self._config.im_weight * sure_N


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
