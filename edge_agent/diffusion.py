"""Phase 1, the third kind: a diffusion model of the local pictures (`networks.diffusion`).

Shape letters: N pictures, C channels, H and W height and width.

A GAN of an hour on a small CPU does not get beyond textures. To tell a picture from the noise on it is plain
regression, which needs no balance of two networks and does not forget what is rare; and unlike mixes nothing that is
drawn begins with a local picture.

How its pictures compare with those of the others, what they give away, and what was tried: docs/ablations.md.
"""

from typing import cast

import torch
from torch import Tensor

from edge_agent import augment
from edge_agent.config import DeprivatizeConfig
from edge_agent.phase import Checkpoint, Progress, Resumable, average_of, rise_and_fall
from edge_agent.pixels import normalise
from edge_agent.precision import training_precision
from networks.diffusion import DATA_DEVIATION, Diffusion

# Levels are log-normal, a little higher than EDM's (-1.2, 1.2): objects are decided there, finest details below. This
# was not compared with others. Hardly any level is as high as the first that drawing begins with: under so much noise
# the network is right with what is always so.
_LOG_LEVEL_MEAN = -0.6
_LOG_LEVEL_DEVIATION = 1.1
_WARMUP_FRACTION = 0.05
_WEIGHT_DECAY = 0.01
_LARGEST_GRADIENT = 1.0


@torch.random.fork_rng(devices=[])  # gives torch's global generator back as it was
def train_diffusion(
    images_NCHW: Tensor,
    *,
    config: DeprivatizeConfig,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Diffusion:
    """Train a diffusion model on local pictures (N, C, H, W) uint8, without labels.

    The loss is EDM's: the squared distance of pictures to what is expected under their noise, each level weighed so
    that an untrained network is as wrong at all of them (Karras et al., NeurIPS 2022, table 1 and equation 8).

    Returns the average of the networks along the way, in eval mode on `device`, its gradients off. Raises ValueError
    for pictures that are no squares.
    """
    count, channels, side, width = images_NCHW.shape
    if width != side:
        raise ValueError(f"local pictures: expected squares, got height {side} and width {width}")
    # Initial weights can only be drawn from the global generator, so everything else is too: one state to keep.
    rng = torch.manual_seed(seed)
    diffusion = Diffusion(
        side=side, channels=channels, width=config.generator_width, drawing_steps=config.drawing_steps
    ).to(device)
    averaged = average_of(diffusion, decay=config.ema_decay)
    optimizer = torch.optim.AdamW(
        diffusion.parameters(), lr=config.generator_learning_rate, betas=(0.9, 0.99), weight_decay=_WEIGHT_DECAY
    )
    images_NCHW = images_NCHW.to(device)

    training = Resumable(checkpoint, rng, diffusion=diffusion, averaged=averaged, optimizer=optimizer)
    while training.goes_on(config.steps):
        optimizer.param_groups[0]["lr"] = config.generator_learning_rate * rise_and_fall(
            training.done / config.steps, _WARMUP_FRACTION
        )

        chosen = torch.randint(count, (config.batch_count,), generator=rng)
        real_NCHW = normalise(images_NCHW[chosen.to(device)])
        if config.mirror:  # but no shifts: the borders that come in would be drawn, too
            real_NCHW = augment.mirror(real_NCHW, rng=rng)
        log_level_N = _LOG_LEVEL_MEAN + _LOG_LEVEL_DEVIATION * torch.randn(config.batch_count, generator=rng)
        level_N111 = log_level_N.exp().to(device).view(-1, 1, 1, 1)
        noise_NCHW = torch.randn(real_NCHW.shape, generator=rng).to(device)
        with training_precision(device):
            expected_NCHW = diffusion(real_NCHW + level_N111 * noise_NCHW, level_N111.flatten())
        weight_N111 = (level_N111.square() + DATA_DEVIATION**2) / (level_N111 * DATA_DEVIATION).square()
        loss = (weight_N111 * (expected_NCHW - real_NCHW).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), _LARGEST_GRADIENT)
        optimizer.step()

        averaged.update_parameters(diffusion)
        training.stepped()
        progress(training.done, config.steps, denoising_loss=loss.item())

    return cast(Diffusion, averaged.module).eval().requires_grad_(False)
