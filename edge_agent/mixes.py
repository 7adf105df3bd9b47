"""Phase 1, another kind: an autoencoder of the local pictures, whose latents are mixed (`networks.mixes`).

Shape letters: N pictures, C channels, H and W height and width, Z latent channels, h and w height and width of a
latent, V views of a picture (as it is, and perhaps mirrored), M local pictures, P pictures in a mix.

A GAN has to invent whole pictures, which on natural ones takes far longer than a small machine has. Mixes only
rearrange: each region is drawn after one local picture, the whole after none. That sells privacy for accuracy, and
region by region more of it than the gate sees, which compares whole pictures; of the attacks, the one by parts does
(``docs/privacy.md``).

First the autoencoder learns to give pictures back (the mean absolute difference of pixels), through noise on the
latents as strong as will be added later. Such pictures are blurred: where the latent leaves details open, their
middle is the best guess. Then a discriminator of patches joins in, which looks at pictures given back and mixes, and
the decoder learns to draw details that it holds for real (VQGAN, Esser et al., CVPR 2021), and seams that it doesn't
see.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from edge_agent import augment, losses
from edge_agent.config import DeprivatizeConfig
from edge_agent.deprivatize import ADVERSARIAL_LOSSES, adam
from edge_agent.generators import PictureGenerator
from edge_agent.phase import Checkpoint, Progress, Resumable, average_of, fall
from edge_agent.pixels import normalise
from edge_agent.precision import training_precision
from networks.autoencoder import Decoder, Encoder, PatchDiscriminator
from networks.mixes import Mixes, arrange, deal, noisy

_BLURRED_PART = 1 / 3
"""Part of all steps before the discriminator joins in."""
_FEATURE_WEIGHT = 0.1
_SCORE_WEIGHT = 0.02
"""At 0.05, with a discriminator that learnt more slowly, the decoder covered seams with chequered patterns."""
_BATCH = 256
_STATISTICS_BATCHES = 20


@torch.random.fork_rng(devices=[])  # gives torch's global generator back as it was
def train_mixes(
    images_NCHW: Tensor,
    *,
    config: DeprivatizeConfig,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Mixes:
    """Train an autoencoder on local pictures (N, C, H, W) uint8, without labels, and keep their latents.

    Returns the average of the decoders along the way, in eval mode on `device`, its gradients off, with the latents
    of the average of the encoders. Raises ValueError for pictures that are no squares.
    """
    _, _, side, width = images_NCHW.shape
    if width != side:
        raise ValueError(f"local pictures: expected squares, got height {side} and width {width}")
    # Initial weights can only be drawn from the global generator, so everything else is too: one state to keep.
    rng = torch.manual_seed(seed)
    learning = _Learning(images_NCHW, config=config, rng=rng, device=device)
    first_sharpened = math.ceil(_BLURRED_PART * config.steps)
    training = Resumable(checkpoint, rng, **learning.parts())
    while training.goes_on(config.steps):
        learning.set_step_sizes(fall(training.done, config.steps))
        figures = learning.step(sharpens=training.done >= first_sharpened)
        training.stepped()
        progress(training.done, config.steps, **figures)
    return learning.average()


class _Learning:
    """An autoencoder and its discriminator, what they learn from, and a step of both; all on their device."""

    def __init__(
        self, images_NCHW: Tensor, *, config: DeprivatizeConfig, rng: torch.Generator, device: torch.device
    ) -> None:
        _, channels, side, _ = images_NCHW.shape
        shape: dict[str, int] = {
            "side": side,
            "channels": channels,
            "width": config.generator_width,
            "latent_channels": config.latent_channels,
        }
        # Convolutions on a CPU are about twice as fast with the channels next to each other.
        self._encoder = Encoder(**shape).to(device).to(memory_format=torch.channels_last)
        self._decoder = Decoder(**shape).to(device).to(memory_format=torch.channels_last)
        self._discriminator = PatchDiscriminator(side=side, channels=channels, width=config.discriminator_width).to(
            device
        )
        self._discriminator.to(memory_format=torch.channels_last)
        self._averaged_encoder = average_of(self._encoder, decay=config.ema_decay)
        self._averaged_decoder = average_of(self._decoder, decay=config.ema_decay)
        both = [*self._encoder.parameters(), *self._decoder.parameters()]
        self._autoencoder_optimizer = adam(both, config.generator_learning_rate)
        self._discriminator_optimizer = adam(self._discriminator.parameters(), config.discriminator_learning_rate)
        self._images_NCHW = images_NCHW.to(device)
        self._config, self._rng, self._device = config, rng, device
        self._real_loss, self._synthetic_loss, self._generators_loss = ADVERSARIAL_LOSSES[config.loss]

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """All that a step changes."""
        return {
            "encoder": self._encoder,
            "decoder": self._decoder,
            "discriminator": self._discriminator,
            "averaged_encoder": self._averaged_encoder,
            "averaged_decoder": self._averaged_decoder,
            "autoencoder_optimizer": self._autoencoder_optimizer,
            "discriminator_optimizer": self._discriminator_optimizer,
        }

    def set_step_sizes(self, factor: float) -> None:
        """Set the step sizes to a part of the configured ones."""
        self._autoencoder_optimizer.param_groups[0]["lr"] = factor * self._config.generator_learning_rate
        self._discriminator_optimizer.param_groups[0]["lr"] = factor * self._config.discriminator_learning_rate

    def step(self, *, sharpens: bool) -> dict[str, float]:
        """Teach both networks a batch, or the autoencoder alone before it sharpens; return the losses by name."""
        chosen = torch.randint(len(self._images_NCHW), (self._config.batch_count,), generator=self._rng)
        real_NCHW = normalise(self._images_NCHW[chosen.to(self._device)])
        if self._config.mirror:  # but no shifts: the background that comes in would be drawn in mixes, too
            real_NCHW = augment.mirror(real_NCHW, rng=self._rng)
        half = self._config.batch_count // 2
        back_NCHW, mixed_NCHW = self._back_and_mixed(real_NCHW, half if sharpens else 0)
        loss = losses.image_distance(back_NCHW, real_NCHW).mean()
        figures = {"image_loss": loss.item()}
        if sharpens:
            synthetic_NCHW = torch.cat([back_NCHW[:half], mixed_NCHW])
            figures["discriminator_loss"] = self._step_of_the_discriminator(real_NCHW, synthetic_NCHW.detach())
            loss = loss + self._looks(real_NCHW[:half], synthetic_NCHW)
        self._autoencoder_optimizer.zero_grad()
        loss.backward()
        self._autoencoder_optimizer.step()
        self._averaged_encoder.update_parameters(self._encoder)
        self._averaged_decoder.update_parameters(self._decoder)
        return figures

    def average(self) -> Mixes:
        """Return the averages so far as what makes mixes of the local pictures' latents."""
        encoder, decoder = self._averaged_encoder.module, self._averaged_decoder.module
        return _with_latents(encoder, decoder, self._images_NCHW, self._config, self._rng)

    def _back_and_mixed(self, real_NCHW: Tensor, mixed_count: int) -> tuple[Tensor, Tensor]:
        """All pictures as they come back, and so many mixes of them."""
        config, rng = self._config, self._rng
        with training_precision(self._device):
            latents_NZhw = self._encoder(real_NCHW).float()
            own_NZhw = noisy(latents_NZhw, noise=config.mix_noise, rng=rng)
            # Each picture's neighbours in the batch are as random as the batch.
            dealt_NR = deal(mixed_count, pictures=config.mix_pictures, regions=config.mix_regions, rng=rng)
            plan_NR = (torch.arange(mixed_count)[:, None] - dealt_NR) % len(latents_NZhw)
            # Mixes train the decoder alone: the encoder is there to describe pictures, not to hide seams.
            mixed_NZhw = arrange(latents_NZhw.detach()[plan_NR.to(self._device)], cells=latents_NZhw.shape[-1])
            mixed_NZhw = noisy(mixed_NZhw, noise=config.mix_noise, rng=rng)
            pictures_NCHW = self._decoder(torch.cat([own_NZhw, mixed_NZhw])).float()
        return pictures_NCHW[: len(real_NCHW)], pictures_NCHW[len(real_NCHW) :]

    def _step_of_the_discriminator(self, real_NCHW: Tensor, synthetic_NCHW: Tensor) -> float:
        scores_NX, _ = self._score(torch.cat([real_NCHW, synthetic_NCHW]))
        real_NX, synthetic_NX = scores_NX[: len(real_NCHW)], scores_NX[len(real_NCHW) :]
        loss = self._real_loss(real_NX).mean() + self._synthetic_loss(synthetic_NX).mean()
        self._discriminator_optimizer.zero_grad()
        loss.backward()
        self._discriminator_optimizer.step()
        return loss.item()

    def _looks(self, real_NCHW: Tensor, synthetic_NCHW: Tensor) -> Tensor:
        """What the discriminator has against pictures, the first of which are the real ones given back; a number."""
        self._discriminator.requires_grad_(False)
        with torch.no_grad():
            _, wanted = self._score(real_NCHW)
        scores_NX, got = self._score(synthetic_NCHW)
        distance = feature_distance([features_NFHW[: len(real_NCHW)] for features_NFHW in got], wanted)
        self._discriminator.requires_grad_(True)
        return _FEATURE_WEIGHT * distance + _SCORE_WEIGHT * self._generators_loss(scores_NX).mean()

    def _score(self, pictures_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        with training_precision(self._device):
            scores_NX, features = self._discriminator(pictures_NCHW)
        return scores_NX.float(), [feature_NFHW.float() for feature_NFHW in features]


def mixed_pictures(generator: PictureGenerator, training_NCHW: Tensor) -> Tensor | None:
    """Return the local pictures that a generator's are mixes of: those it was trained on; None where it makes none.

    Raises ValueError where these cannot be the ones.
    """
    if not isinstance(generator, Mixes):
        return None
    if len(training_NCHW) != generator.arguments["picture_count"]:
        raise ValueError(
            f"expected the {generator.arguments['picture_count']} local pictures that the generator was trained on, "
            f"got {len(training_NCHW)}"
        )
    return training_NCHW


def feature_distance(got: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """How far the features of pictures given back are from those of the originals; a number.

    The mean absolute difference as a part of the features' own mean size, added up over the layers (feature matching:
    Larsen et al., ICML 2016): details count as the discriminator sees them, wherever they are to the pixel.
    """
    return torch.stack(
        [
            (got_NFHW - wanted_NFHW).abs().mean() / wanted_NFHW.abs().mean().clamp_min(1e-6)
            for got_NFHW, wanted_NFHW in zip(got, wanted, strict=True)
        ]
    ).sum()


def _with_latents(
    encoder: nn.Module, decoder: nn.Module, images_NCHW: Tensor, config: DeprivatizeConfig, rng: torch.Generator
) -> Mixes:
    """Averaged networks as what makes mixes of the latents of these pictures."""
    count, channels, side, _ = images_NCHW.shape
    mixes = Mixes(
        side=side,
        channels=channels,
        width=config.generator_width,
        latent_channels=config.latent_channels,
        picture_count=count,
        view_count=2 if config.mirror else 1,
        mix_pictures=config.mix_pictures,
        mix_regions=config.mix_regions,
        mix_noise=config.mix_noise,
    ).to(images_NCHW.device)
    views = [images_NCHW, images_NCHW.flip(3)][: len(mixes.latents_VMZhw)]
    with training_precision(images_NCHW.device), torch.no_grad():
        # The batch-norm statistics gathered on the way belong to other weights than the averaged ones.
        update_bn((batch_NCHW for view_NCHW in views for batch_NCHW in _batches(view_NCHW)), encoder)
        encoder.eval()
        for latents_MZhw, view_NCHW in zip(mixes.latents_VMZhw, views, strict=True):
            latents_MZhw.copy_(torch.cat([encoder(batch_NCHW) for batch_NCHW in _batches(view_NCHW)]))
        mixes.decoder.load_state_dict(decoder.state_dict())
        # Those of the decoder are set on what it will be given.
        update_bn((mixes.draw(_BATCH, rng=rng)[1] for _ in range(_STATISTICS_BATCHES)), mixes)
    return mixes.eval().requires_grad_(False)


def _batches(images_NCHW: Tensor) -> Iterator[Tensor]:
    for batch_NCHW in images_NCHW.tensor_split(math.ceil(len(images_NCHW) / _BATCH)):
        yield normalise(batch_NCHW)
