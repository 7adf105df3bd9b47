"""Pictures decoded from mixes: each latent is put together of regions of several local pictures' latents, plus noise.

Shape letters: N pictures, C channels, H and W height and width (both `side`), Z latent channels, h and w height and
width of a latent, V views of a local picture (as it is, and perhaps mirrored), M local pictures, P pictures in a mix.
"""

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
        self.latent_count = 0  # the noise of all pictures would be many times as large as the pictures
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

    def draw(self, count: int, *, rng: torch.Generator) -> Tensor:
        """Draw mixed latents (N, Z, h, w) of the latents kept, on their device."""
        views, pictures = self.latents_VMZhw.shape[:2]
        # Neighbours in an order of chance: the pictures of a mix are different ones.
        order_M = torch.randperm(pictures, generator=rng)
        first_N1 = torch.randint(pictures, (count, 1), generator=rng)
        chosen_NP = order_M[(first_N1 + torch.arange(self.mix_pictures)) % pictures]
        view_NP = torch.randint(views, chosen_NP.shape, generator=rng)
        device = self.latents_VMZhw.device
        parts_NPZhw = self.latents_VMZhw[view_NP.to(device), chosen_NP.to(device)].float()
        return mix(parts_NPZhw, regions=self.mix_regions, noise=self.mix_noise, rng=rng)

    def sample(self, count: int, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return no latents (N, 0), and pictures (N, C, H, W) in [-1, 1]."""
        return torch.empty(count, 0), self(self.draw(count, rng=rng))


def mix(parts_NPZhw: Tensor, *, regions: int, noise: float, rng: torch.Generator) -> Tensor:
    """Deal the regions of each latent to its pictures at random, in parts as equal as they can be; then add noise.

    Returns latents (N, Z, h, w). All chance is drawn on the CPU, from `rng`.
    """
    count, pictures, _, height, width = parts_NPZhw.shape
    # The places of a random order, counted off: every picture gets as many regions as the next, or one more.
    dealt_NR = torch.rand(count, regions**2, generator=rng).argsort(dim=1) % pictures
    dealt_N1RR = dealt_NR.view(count, 1, regions, regions).float()
    owner_N1hw = F.interpolate(dealt_N1RR, size=(height, width), mode="nearest").long().to(parts_NPZhw.device)
    index_N1Zhw = owner_N1hw[:, :, None].expand(-1, 1, *parts_NPZhw.shape[2:])
    mixed_NZhw = parts_NPZhw.gather(1, index_N1Zhw).squeeze(1)
    return mixed_NZhw + noise * torch.randn(mixed_NZhw.shape, generator=rng).to(mixed_NZhw.device)
