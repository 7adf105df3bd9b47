"""Pictures decoded from mixes: each latent is put together of regions of several local pictures' latents, plus noise.

Shape letters: N pictures, C channels, H and W height and width (both `side`), Z latent channels, h and w height and
width of a latent, V views of a local picture (as it is, and perhaps mirrored), M local pictures, P pictures in a mix,
R regions of a mix.

A plan (N, R) says of which view of which picture each region is: the number `view * M + picture`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.autoencoder import Decoder, latent_side


class Mixes(nn.Module):
    """A decoder and the latents of local pictures, which stay on the device as the pictures do.

    `Mixes(**mixes.arguments)` builds the same again, with fresh weights and empty latents.

    Args:
        picture_count: local pictures whose latents there is room for.
        view_count: 1, or 2 with their mirror images.
        mix_pictures: local pictures in each mix, in equal parts; fewer local ones are repeated.
        mix_regions: regions along each side of a latent; each is of one picture.
        mix_noise: standard deviation of the noise, where each latent channel has one of 1.
    """

    latents_VMZhw: Tensor

    def __init__(
        self,
        *,
        side: int,
        channels: int,
        width: int,
        latent_channels: int,
        picture_count: int,
        view_count: int,
        mix_pictures: int,
        mix_regions: int,
        mix_noise: float,
    ) -> None:
        super().__init__()
        self.arguments: dict[str, int | float] = {
            "side": side,
            "channels": channels,
            "width": width,
            "latent_channels": latent_channels,
            "picture_count": picture_count,
            "view_count": view_count,
            "mix_pictures": mix_pictures,
            "mix_regions": mix_regions,
            "mix_noise": mix_noise,
        }
        self.side = side
        self.latent_count = mix_regions**2  # the plan alone: noise would be many times as large as the pictures
        self.mix_pictures, self.mix_regions, self.mix_noise = mix_pictures, mix_regions, mix_noise
        self.decoder = Decoder(side=side, channels=channels, width=width, latent_channels=latent_channels)
        coarse = latent_side(side)
        # Half precision is finer than the noise, and half as large.
        size = (view_count, picture_count, latent_channels, coarse, coarse)
        self.register_buffer("latents_VMZhw", torch.zeros(size, dtype=torch.float16))

    def forward(self, latents_NZhw: Tensor) -> Tensor:
        """Return pictures (N, C, H, W) in [-1, 1] of mixed latents."""
        images_NCHW: Tensor = self.decoder(latents_NZhw)
        return images_NCHW

    def draw(self, count: int, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw plans (N, R) int64, on the CPU, and the mixed latents (N, Z, h, w) that they make, noise and all."""
        views, pictures = self.latents_VMZhw.shape[:2]
        # Neighbours in an order of chance: the pictures of a mix are different ones.
        order_M = torch.randperm(pictures, generator=rng)
        first_N1 = torch.randint(pictures, (count, 1), generator=rng)
        chosen_NP = order_M[(first_N1 + torch.arange(self.mix_pictures)) % pictures]
        view_NP = torch.randint(views, chosen_NP.shape, generator=rng)
        dealt_NR = deal(count, pictures=self.mix_pictures, regions=self.mix_regions, rng=rng)
        plan_NR = (view_NP * pictures + chosen_NP).gather(1, dealt_NR)
        parts_NRZhw = self.latents_VMZhw.flatten(0, 1)[plan_NR.to(self.latents_VMZhw.device)].float()
        return plan_NR, noisy(arrange(parts_NRZhw, cells=latent_side(self.side)), noise=self.mix_noise, rng=rng)

    def sample(self, count: int, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return plans (N, R), and pictures (N, C, H, W) in [-1, 1]."""
        plan_NR, latents_NZhw = self.draw(count, rng=rng)
        return plan_NR, self(latents_NZhw)


def deal(count: int, *, pictures: int, regions: int, rng: torch.Generator) -> Tensor:
    """Deal the regions of each mix to its pictures at random, in parts as equal as they can be.

    Returns the number of a picture (N, R), below `pictures`; R is the square of `regions`.
    """
    # The places of a random order, counted off: every picture gets as many regions as the next, or one more.
    return torch.rand(count, regions**2, generator=rng).argsort(dim=1) % pictures


def arrange(parts_NRCHW: Tensor, *, cells: int) -> Tensor:
    """Return (N, C, H, W): its region r is that of part r. The regions are those of a square grid, row by row.

    They are cut along the places of a latent, of which there are `cells` along each side; where these cannot be
    shared out evenly, some regions are a place larger than others.
    """
    count, parts, channels, height, width = parts_NRCHW.shape
    regions = math.isqrt(parts)
    grid_11RR = torch.arange(parts, dtype=torch.float32).view(1, 1, regions, regions)
    owner_hw = F.interpolate(grid_11RR, size=(cells, cells), mode="nearest")[0, 0].long()
    owner_HW = owner_hw.repeat_interleave(height // cells, 0).repeat_interleave(width // cells, 1)
    index_N1CHW = owner_HW.to(parts_NRCHW.device).expand(count, 1, channels, height, width)
    return parts_NRCHW.gather(1, index_N1CHW).squeeze(1)


def noisy(latents_NZhw: Tensor, *, noise: float, rng: torch.Generator) -> Tensor:
    """Return latents with noise of that standard deviation on them, drawn on the CPU from `rng`."""
    return latents_NZhw + noise * torch.randn(latents_NZhw.shape, generator=rng).to(latents_NZhw.device)


def mosaic(plan_NR: Tensor, images_MCHW: Tensor) -> Tensor:
    """Return pictures (N, C, H, W) put together of the local pictures themselves as their mixes were by `plan_NR`."""
    plan_NR = plan_NR.to(images_MCHW.device)
    parts_NRCHW = images_MCHW[plan_NR % len(images_MCHW)]
    mirrored_NR111 = (plan_NR >= len(images_MCHW))[:, :, None, None, None]
    parts_NRCHW = torch.where(mirrored_NR111, parts_NRCHW.flip(-1), parts_NRCHW)
    return arrange(parts_NRCHW, cells=latent_side(images_MCHW.shape[-1]))
