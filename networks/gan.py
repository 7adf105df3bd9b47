"""Generator and discriminator for small pictures.

Shape letters: N pictures, C channels, H and W height and width (both `side`), L latent numbers.

A latent is `[z ; n]`: one number a class, with mean zero (a black box hides the mean of its logits, so
the generator must not use that axis), then `noise_count` free numbers for everything a class does not say.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

# Both networks halve or double the picture until its side is no more than this, and twice at least.
_COARSEST_SIDE = 8


class Generator(nn.Module):
    """Latents (N, L) to pictures (N, C, H, W) in [-1, 1]: double the side, convolve, repeat.

    `Generator(**generator.arguments)` builds the same network again, with fresh weights.
    """

    def __init__(self, *, class_count: int, noise_count: int, side: int, channels: int, width: int) -> None:
        super().__init__()
        self.arguments = {
            "class_count": class_count,
            "noise_count": noise_count,
            "side": side,
            "channels": channels,
            "width": width,
        }
        self.side = side
        self.latent_count = class_count + noise_count
        doublings = halvings(side)
        coarse_side = side >> doublings
        inner = 2 * width
        layers: list[nn.Module] = [
            nn.Linear(class_count + noise_count, inner * coarse_side**2),
            nn.Unflatten(1, (inner, coarse_side, coarse_side)),
            nn.BatchNorm2d(inner),
        ]
        for doubling in range(1, doublings + 1):
            outer = width if doubling == doublings else inner
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(inner, outer, 3, padding=1, bias=False),
                nn.BatchNorm2d(outer),
                nn.LeakyReLU(0.2),
            ]
        layers += [nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents_NL: Tensor) -> Tensor:
        """Return pictures (N, C, H, W) in [-1, 1]."""
        images_NCHW: Tensor = self.layers(latents_NL)
        return images_NCHW

    def sample(self, count: int, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw latents (N, L), on the CPU, and return them with their pictures (N, C, H, W) in [-1, 1]."""
        class_count, noise_count = self.arguments["class_count"], self.arguments["noise_count"]
        latents_NL = draw_latents(count, class_count=class_count, noise_count=noise_count, rng=rng)
        return latents_NL, self(latents_NL.to(next(self.parameters()).device))


class Discriminator(nn.Module):
    """Pictures (N, C, H, W) in [-1, 1] to scores (N,), above zero for real.

    Every layer is spectrally normalised, which bounds how fast a score can change with the picture
    (Miyato et al., ICLR 2018). There is no batch normalisation: it would let one picture's score depend
    on its neighbours in the batch, and real and synthetic batches differ.
    """

    def __init__(self, *, side: int, channels: int, width: int) -> None:
        super().__init__()
        depth = halvings(side)
        layers: list[nn.Module] = []
        before = channels
        for halving in range(depth):
            after = width * min(2**halving, 4)
            layers += [
                spectral_norm(nn.Conv2d(before, after, 3, padding=1)),
                nn.LeakyReLU(0.1),
                spectral_norm(nn.Conv2d(after, after, 4, stride=2, padding=1)),
                nn.LeakyReLU(0.1),
            ]
            before = after
        layers += [nn.Flatten(), spectral_norm(nn.Linear(before * (side >> depth) ** 2, 1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return one score a picture (N,)."""
        scores_N1: Tensor = self.layers(images_NCHW)
        return scores_N1.squeeze(1)


def draw_latents(count: int, *, class_count: int, noise_count: int, rng: torch.Generator) -> Tensor:
    """Draw latents (N, L) on the CPU: normal numbers, the class axes with their mean taken off."""
    latents_NL = torch.randn(count, class_count + noise_count, generator=rng)
    latents_NL[:, :class_count] -= latents_NL[:, :class_count].mean(dim=1, keepdim=True)
    return latents_NL


def halvings(side: int) -> int:
    """How often the networks halve a side. Raises ValueError for one that they cannot halve twice, or too large."""
    if side % 4 or not 8 <= side <= 128:
        raise ValueError(f"side: expected a multiple of 4 from 8 to 128, got {side}; pad or resize")
    depth = 2
    while (side >> depth) > _COARSEST_SIDE and (side >> depth) % 2 == 0:
        depth += 1
    return depth
