"""A diffusion model of small pictures: noise becomes a picture while it is taken away bit by bit.

Shape letters: N pictures, C channels, H and W height and width (both `side`), F features, E embedding features,
Q frequencies, A heads of attention, D features of a head, P places (P = HW).

Noise levels are standard deviations on the scale of pictures, -1..1. Preconditioning and levels are those of EDM
(Karras et al., NeurIPS 2022), the way from level to level that of DPM-Solver++(2M) (Lu et al., 2022).
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.gan import halvings

DATA_DEVIATION = 0.5
"""What pictures on the scale -1..1 deviate by, as EDM assumes."""
HIGHEST_LEVEL = 40.0
"""At 8 the noise leaves the mean colour of a 32 x 32 picture half visible, and without it pictures come out grey."""
LOWEST_LEVEL = 0.03
_CURVATURE = 7.0
"""EDM's rho: how much closer to each other low levels are than high ones."""
_EMBEDDING = 128
_FREQUENCIES = 32
_HEADS = 4
_FEW_PLACES = 256
"""Up to so many, attention is written out: of 64 in bfloat16 on a CPU torch's fused one takes six times as long. Of
1,024 it takes two thirds of the time, and does not need the memory."""


class Diffusion(nn.Module):
    """A network that tells pictures from the noise on them, and how pictures are drawn with it.

    `Diffusion(**diffusion.arguments)` builds the same again, with fresh weights.

    Args:
        side: of the pictures, as `networks.gan` takes it.
        width: features at the finest level; the coarser have twice as many.
        drawing_steps: passes through the network a drawn picture, 2 or more.

    Raises ValueError for a side that `networks.gan` refuses.
    """

    def __init__(self, *, side: int, channels: int, width: int, drawing_steps: int) -> None:
        super().__init__()
        self.arguments = {"side": side, "channels": channels, "width": width, "drawing_steps": drawing_steps}
        self.side = side
        self.latent_count = 0  # a picture's noise has as many numbers as the picture
        self.network = UNet(side=side, channels=channels, width=width)
        # Here and not in training alone: with weights of another layout what is drawn rounds otherwise.
        self.to(memory_format=torch.channels_last)

    def forward(self, noisy_NCHW: Tensor, level_N: Tensor) -> Tensor:
        """Return the expected pictures (N, C, H, W), float32, under noisy ones; EDM's D(x; sigma)."""
        level_N111 = level_N.view(-1, 1, 1, 1)
        variance_N111 = level_N111.square() + DATA_DEVIATION**2
        found_NCHW: Tensor = self.network(noisy_NCHW / variance_N111.sqrt(), level_N.log() / 4)
        kept_NCHW = noisy_NCHW * (DATA_DEVIATION**2 / variance_N111)
        found_NCHW = found_NCHW.float() * (level_N111 * DATA_DEVIATION / variance_N111.sqrt())
        return kept_NCHW + found_NCHW

    def sample(self, count: int, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return no latents (N, 0), on the CPU, and pictures (N, C, H, W) in [-1, 1]; all chance is from `rng`."""
        shape = (count, self.arguments["channels"], self.side, self.side)
        device = next(self.parameters()).device
        levels = drawing_levels(self.arguments["drawing_steps"])
        x_NCHW = levels[0] * torch.randn(shape, generator=rng).to(device)
        before_NCHW, step_before = x_NCHW, math.inf  # so long ago that it counts for nothing
        for level, lower in itertools.pairwise(levels):
            expected_NCHW = self(x_NCHW, torch.full((count,), level, device=device))
            step = math.log(level / lower)
            # Second order: what is expected half-way, by how it changed over the last step.
            ahead = step / (2 * step_before)
            middle_NCHW = (1 + ahead) * expected_NCHW - ahead * before_NCHW
            x_NCHW = (lower / level) * x_NCHW - math.expm1(-step) * middle_NCHW
            before_NCHW, step_before = expected_NCHW, step
        images_NCHW = self(x_NCHW, torch.full((count,), levels[-1], device=device))
        return torch.empty(count, 0), images_NCHW.clamp(-1, 1)


def drawing_levels(count: int) -> list[float]:
    """Noise levels from the highest to the lowest, closer to each other the lower they are (EDM, equation 5)."""
    highest, lowest = HIGHEST_LEVEL ** (1 / _CURVATURE), LOWEST_LEVEL ** (1 / _CURVATURE)
    return [(highest + i / (count - 1) * (lowest - highest)) ** _CURVATURE for i in range(count)]


class UNet(nn.Module):
    """Pictures (N, C, H, W) and a number each (N,), its noise level, to as many pictures of the same size."""

    frequencies_Q: Tensor

    def __init__(self, *, side: int, channels: int, width: int) -> None:
        super().__init__()
        halvings(side)  # refuses what the other networks do
        # Large pictures come in as patches of 2 x 2: convolutions at their full side would cost more than all others.
        self.patch = 2 if side >= 24 else 1
        self.register_buffer("frequencies_Q", torch.linspace(0.0, 2.0, _FREQUENCIES), persistent=False)
        self.embedding = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, _EMBEDDING), nn.SiLU(), nn.Linear(_EMBEDDING, _EMBEDDING), nn.SiLU()
        )
        patched, inner = channels * self.patch**2, 2 * width
        self.conv_in = nn.Conv2d(patched, width, 3, padding=1)
        self.fine_down = _Block(width, width)
        self.halve_fine = nn.Conv2d(width, inner, 3, stride=2, padding=1)
        self.middle_down = _Block(inner, inner)
        self.halve_middle = nn.Conv2d(inner, inner, 3, stride=2, padding=1)
        self.coarse_before = _Block(inner, inner)
        self.coarse_attention = _Attention(inner)
        self.coarse_after = _Block(inner, inner)
        self.middle_up = _Block(2 * inner, inner)
        self.middle_attention = _Attention(inner)
        self.narrow = nn.Conv2d(inner, width, 3, padding=1)
        self.fine_up = _Block(2 * width, width)
        self.norm_out = _Norm(width)
        self.conv_out = nn.Conv2d(width, patched, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, images_NCHW: Tensor, level_N: Tensor) -> Tensor:
        """Return pictures (N, C, H, W)."""
        angle_NQ = 2 * math.pi * level_N[:, None] * self.frequencies_Q
        level_NE = self.embedding(torch.cat([angle_NQ.sin(), angle_NQ.cos()], dim=1))
        # Without this, convolutions on a CPU take twice as long.
        patches_NCHW = F.pixel_unshuffle(images_NCHW, self.patch).contiguous(memory_format=torch.channels_last)
        fine_NFHW = self.fine_down(self.conv_in(patches_NCHW), level_NE)
        middle_NFHW = self.middle_down(self.halve_fine(fine_NFHW), level_NE)
        x_NFHW = self.coarse_before(self.halve_middle(middle_NFHW), level_NE)
        x_NFHW = self.coarse_after(self.coarse_attention(x_NFHW), level_NE)
        x_NFHW = torch.cat([_enlarged(x_NFHW, middle_NFHW), middle_NFHW], dim=1)
        x_NFHW = self.narrow(_enlarged(self.middle_attention(self.middle_up(x_NFHW, level_NE)), fine_NFHW))
        x_NFHW = self.fine_up(torch.cat([x_NFHW, fine_NFHW], dim=1), level_NE)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x_NFHW))), self.patch)


class _Block(nn.Module):
    """Two convolutions beside a shortcut; the level scales and shifts what is between them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _Norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = _Norm(after), nn.Conv2d(after, after, 3, padding=1)
        self.level = nn.Linear(_EMBEDDING, 2 * after)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_NFHW: Tensor, level_NE: Tensor) -> Tensor:
        scale_NF11, shift_NF11 = self.level(level_NE)[:, :, None, None].chunk(2, dim=1)
        y_NFHW = self.conv1(F.silu(self.norm1(x_NFHW)))
        y_NFHW = self.conv2(F.silu(self.norm2(y_NFHW) * (1 + scale_NF11) + shift_NF11))
        found_NFHW: Tensor = self.shortcut(x_NFHW) + y_NFHW
        return found_NFHW


class _Attention(nn.Module):
    """Every place asks all others (Vaswani et al., NeurIPS 2017)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = _Norm(features)
        self.ask = nn.Conv2d(features, 3 * features, 1)
        self.answer = nn.Conv2d(features, features, 1)
        nn.init.zeros_(self.answer.weight)

    def forward(self, x_NFHW: Tensor) -> Tensor:
        count, features, height, width = x_NFHW.shape
        heads = math.gcd(_HEADS, features)
        asked_N3ADP = self.ask(self.norm(x_NFHW)).reshape(count, 3, heads, features // heads, height * width)
        query_NAPD, key_NAPD, value_NAPD = asked_N3ADP.transpose(-1, -2).unbind(1)
        if height * width <= _FEW_PLACES:
            alike_NAPP = query_NAPD @ key_NAPD.transpose(-1, -2) / math.sqrt(features // heads)
            heard_NAPD = alike_NAPP.softmax(dim=-1).to(value_NAPD.dtype) @ value_NAPD
        else:  # wants the features of a place next to each other
            heard_NAPD = F.scaled_dot_product_attention(
                query_NAPD.contiguous(), key_NAPD.contiguous(), value_NAPD.contiguous()
            )
        found_NFHW: Tensor = x_NFHW + self.answer(heard_NAPD.transpose(-1, -2).reshape(x_NFHW.shape))
        return found_NFHW


class _Norm(nn.GroupNorm):
    """In float32: in bfloat16, with few features a group next to each other, torch takes eight times as long."""

    def __init__(self, features: int) -> None:
        super().__init__(math.gcd(8, features), features)

    def forward(self, x_NFHW: Tensor) -> Tensor:
        return super().forward(x_NFHW.float())


def _enlarged(x_NFHW: Tensor, like_NFHW: Tensor) -> Tensor:
    return F.interpolate(x_NFHW, size=like_NFHW.shape[2:], mode="nearest")
