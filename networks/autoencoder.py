"""An autoencoder for small pictures, and the discriminator that keeps its pictures sharp.

Shape letters: N pictures, C channels, H and W height and width (both `side`), Z latent channels, h and w height and
width of a latent (both `latent_side(side)`), F features.

A latent is a small picture of Z channels: each place says what a patch of the picture looks like. Places of different
pictures can so stand side by side in one latent, and the decoder draws what lies between them.
"""

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from networks.gan import halvings


def latent_side(side: int) -> int:
    """Height and width of the latents of pictures of a side: a quarter, or less."""
    return side >> halvings(side)


class Encoder(nn.Module):
    """Pictures (N, C, H, W) in [-1, 1] to latents (N, Z, h, w), each channel with mean 0 and standard deviation 1."""

    def __init__(self, *, side: int, channels: int, width: int, latent_channels: int) -> None:
        super().__init__()
        widths = _widths(side, width)
        layers: list[nn.Module] = []
        for before, after in zip([channels, *widths[1:]], widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), _Residual(after)]
        layers += [
            nn.BatchNorm2d(widths[-1]),
            nn.LeakyReLU(0.2),
            nn.Conv2d(widths[-1], latent_channels, 1),
            # Without a scale of its own, which could grow until noise on the latents is nothing.
            nn.BatchNorm2d(latent_channels, affine=False),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return latents (N, Z, h, w)."""
        latents_NZhw: Tensor = self.layers(images_NCHW)
        return latents_NZhw


class Decoder(nn.Module):
    """Latents (N, Z, h, w) to pictures (N, C, H, W) in [-1, 1]."""

    def __init__(self, *, side: int, channels: int, width: int, latent_channels: int) -> None:
        super().__init__()
        *finer, coarsest = _widths(side, width)
        layers: list[nn.Module] = [
            nn.Conv2d(latent_channels, coarsest, 3, padding=1),
            _Residual(coarsest),
            _Residual(coarsest),
        ]
        before = coarsest
        for halving, after in reversed(list(enumerate(finer))):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1)]
            if halving > 0:  # at the full side it would take longer than all the rest
                layers.append(_Residual(after))
            before = after
        layers += [nn.BatchNorm2d(width), nn.LeakyReLU(0.2), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents_NZhw: Tensor) -> Tensor:
        """Return pictures (N, C, H, W) in [-1, 1]."""
        images_NCHW: Tensor = self.layers(latents_NZhw)
        return images_NCHW


class PatchDiscriminator(nn.Module):
    """Pictures (N, C, H, W) in [-1, 1] to one score a patch (N, h·w), above zero for real, and the features behind.

    It looks at patches, not at the whole picture (Isola et al., CVPR 2017): those tell sharp from blurred. Spectrally
    normalised and without batch normalisation, as `gan.Discriminator` is.
    """

    def __init__(self, *, side: int, channels: int, width: int) -> None:
        super().__init__()
        widths = _widths(side, width)[:-1]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(before, after, 4, stride=2, padding=1)),
                nn.LeakyReLU(0.1),
                spectral_norm(nn.Conv2d(after, after, 3, padding=1)),
                nn.LeakyReLU(0.1),
            )
            for before, after in zip([channels, *widths], widths, strict=False)
        )
        self.score = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the scores (N, h·w), and the features (N, F, ., .) after each halving of the side."""
        features: list[Tensor] = []
        inner_NFHW = images_NCHW
        for block in self.blocks:
            inner_NFHW = block(inner_NFHW)
            features.append(inner_NFHW)
        return self.score(inner_NFHW).flatten(1), features


class _Residual(nn.Module):
    """Normalise, bend, convolve, twice, beside a straight path (He et al., ECCV 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(width), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, inner_NFHW: Tensor) -> Tensor:
        """Return features of the same shape."""
        bent_NFHW: Tensor = self.layers(inner_NFHW)
        return inner_NFHW + bent_NFHW


def _widths(side: int, width: int) -> list[int]:
    """Channels at the full side, at half of it, and so on: coarse grids are cheap, so they get more."""
    return [width * min(2**halving, 4) for halving in range(halvings(side) + 1)]
