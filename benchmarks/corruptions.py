"""What happens to pictures between a student's training and its use: corruptions to test on, others to develop on.

Shape letters: N pictures, C channels, H and W height and width, S the side of a kernel, L lines, G groups.

One table of strengths for all data sets, five a corruption, mild to strong. "ImageNet-C" beside a row: strengths and
formula of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(ICLR 2019), from its published code; those of CIFAR-10-C in the same code hardly move a student of MNIST. The other
rows are our own, in pixels of a picture of side 32.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

SEVERITIES = 5
_SMOOTH_PX = 3.0


@dataclass(frozen=True)
class Corruption:
    """A way to spoil pictures (float32 N C H W, values in 0..1), and how strongly at severity 1 to 5."""

    apply: Callable[[Tensor, float, Generator], Tensor]
    strengths: tuple[float, float, float, float, float]


def corrupt(images_NCHW: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """Return spoiled copies (uint8) of pictures (uint8, C 1 or 3); severity 0 changes nothing.

    Whatever is random comes from the generator alone, each picture for itself.

    Raises:
        KeyError: no such corruption, of the test or of the development.
        ValueError: a severity outside 0 to 5.
    """
    corruption = (TEST | DEVELOPMENT)[name]
    if not 0 <= severity <= SEVERITIES:
        raise ValueError(f"expected a severity from 0 to {SEVERITIES}, got {severity}")
    if severity == 0:
        return images_NCHW
    spoiled_NCHW = corruption.apply(images_NCHW.float() / 255, corruption.strengths[severity - 1], generator)
    return (spoiled_NCHW * 255).round_().clamp_(0, 255).to(torch.uint8)


# --- noise ---


def _gaussian_noise(x_NCHW: Tensor, deviation: float, generator: Generator) -> Tensor:
    return x_NCHW + deviation * torch.randn(x_NCHW.shape, generator=generator)


def _shot_noise(x_NCHW: Tensor, photons: float, generator: Generator) -> Tensor:
    return torch.poisson(x_NCHW * photons, generator=generator) / photons


def _impulse_noise(x_NCHW: Tensor, share: float, generator: Generator) -> Tensor:
    hit_NCHW = torch.rand(x_NCHW.shape, generator=generator) < share
    salt_NCHW = torch.randint(0, 2, x_NCHW.shape, generator=generator).float()
    return torch.where(hit_NCHW, salt_NCHW, x_NCHW)


def _speckle_noise(x_NCHW: Tensor, deviation: float, generator: Generator) -> Tensor:
    return x_NCHW + x_NCHW * deviation * torch.randn(x_NCHW.shape, generator=generator)


# --- blur and resolution ---


def _gaussian_blur(x_NCHW: Tensor, deviation_px: float, generator: Generator) -> Tensor:
    side = 2 * math.ceil(3 * deviation_px) + 1
    return cast(Tensor, V.gaussian_blur(x_NCHW, kernel_size=[side, side], sigma=[deviation_px, deviation_px]))


def _motion_blur(x_NCHW: Tensor, length_px: float, generator: Generator) -> Tensor:
    """Smear each picture along a line of a direction of its own."""
    angle_N11 = torch.rand(len(x_NCHW), 1, 1, generator=generator) * math.pi
    y_SS, x_SS = _coordinates(2 * math.ceil(length_px / 2) + 1)
    along_NSS = x_SS * angle_N11.cos() + y_SS * angle_N11.sin()
    across_NSS = y_SS * angle_N11.cos() - x_SS * angle_N11.sin()
    return _convolve(x_NCHW, (1 - across_NSS.abs()).clamp(min=0) * (along_NSS.abs() <= length_px / 2))


def _defocus_blur(x_NCHW: Tensor, radius_px: float, generator: Generator) -> Tensor:
    y_SS, x_SS = _coordinates(2 * math.ceil(radius_px) + 1)
    disc_SS = (radius_px + 0.5 - torch.hypot(x_SS, y_SS)).clamp(0, 1)  # its edge covers pixels in part
    return _convolve(x_NCHW, disc_SS.expand(len(x_NCHW), *disc_SS.shape))


def _pixelate(x_NCHW: Tensor, share: float, generator: Generator) -> Tensor:
    height, width = x_NCHW.shape[2:]
    small_NCHW = F.interpolate(x_NCHW, (int(height * share), int(width * share)), mode="area")
    return F.interpolate(small_NCHW, (height, width), mode="nearest")


def _jpeg(x_NCHW: Tensor, quality: float, generator: Generator) -> Tensor:
    return torch.stack([_jpeg_of(picture, int(quality)) for picture in (x_NCHW * 255).round().to(torch.uint8)])


def _jpeg_of(bytes_CHW: Tensor, quality: int) -> Tensor:
    grey = len(bytes_CHW) == 1
    packed = io.BytesIO()
    Image.fromarray((bytes_CHW[0] if grey else bytes_CHW.permute(1, 2, 0)).numpy()).save(
        packed, "JPEG", quality=quality
    )
    unpacked = torch.from_numpy(np.array(Image.open(packed)))
    return (unpacked[None] if grey else unpacked.permute(2, 0, 1)).float() / 255


# --- light ---


def _contrast(x_NCHW: Tensor, share: float, generator: Generator) -> Tensor:
    mean_NC11 = x_NCHW.mean(dim=(2, 3), keepdim=True)
    return (x_NCHW - mean_NC11) * share + mean_NC11


def _brightness(x_NCHW: Tensor, more: float, generator: Generator) -> Tensor:
    """Add light to every channel; the original adds it to the value of HSV, the same for grey pictures."""
    return x_NCHW + more


def _darkness(x_NCHW: Tensor, less: float, generator: Generator) -> Tensor:
    return x_NCHW - less


def _gamma(x_NCHW: Tensor, exponent: float, generator: Generator) -> Tensor:
    return x_NCHW**exponent


def _posterize(x_NCHW: Tensor, levels: float, generator: Generator) -> Tensor:
    return (x_NCHW * levels).floor().clamp(max=levels - 1) / (levels - 1)


def _fog(x_NCHW: Tensor, thickness: float, generator: Generator) -> Tensor:
    """Mix clouds in as the original does; ours are random grids of 2, 4 and 8 points a side, halved in height."""
    count, _, height, width = x_NCHW.shape
    fog_N1HW = torch.zeros(count, 1, height, width)
    for points in (2, 4, 8):
        grid_N1HW = torch.rand(count, 1, points, points, generator=generator)
        fog_N1HW += F.interpolate(grid_N1HW, (height, width), mode="bilinear", align_corners=True) * 2 / points
    low_N111, high_N111 = fog_N1HW.amin((1, 2, 3), keepdim=True), fog_N1HW.amax((1, 2, 3), keepdim=True)
    brightest_N111 = x_NCHW.amax((1, 2, 3), keepdim=True)
    foggy_NCHW = x_NCHW + thickness * (fog_N1HW - low_N111) / (high_N111 - low_N111)
    return foggy_NCHW * brightest_N111 / (brightest_N111 + thickness)


# --- shape ---


def _rotate(x_NCHW: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Turn each picture to the left or to the right."""
    angle_N = math.radians(degrees) * _signs(len(x_NCHW), generator)
    return _affine(x_NCHW, xx=angle_N.cos(), xy=-angle_N.sin(), yx=angle_N.sin(), yy=angle_N.cos())


def _translate(x_NCHW: Tensor, distance_px: float, generator: Generator) -> Tensor:
    """Move each picture in a direction of its own."""
    height, width = x_NCHW.shape[2:]
    angle_N = 2 * math.pi * torch.rand(len(x_NCHW), generator=generator)
    return _affine(x_NCHW, x=2 * distance_px / width * angle_N.cos(), y=2 * distance_px / height * angle_N.sin())


def _shear(x_NCHW: Tensor, slope: float, generator: Generator) -> Tensor:
    return _affine(x_NCHW, xy=slope * _signs(len(x_NCHW), generator))


def _shrink(x_NCHW: Tensor, share: float, generator: Generator) -> Tensor:
    larger_N = torch.full((len(x_NCHW),), 1 / share)
    return _affine(x_NCHW, xx=larger_N, yy=larger_N)


def _elastic(x_NCHW: Tensor, distance_px: float, generator: Generator) -> Tensor:
    """Move every pixel by a smooth random field, `distance_px` in the root mean square."""
    count, _, height, width = x_NCHW.shape
    side = 2 * math.ceil(3 * _SMOOTH_PX) + 1
    noise_N2HW = torch.randn(count, 2, height, width, generator=generator)
    field_N2HW = V.gaussian_blur(noise_N2HW, kernel_size=[side, side], sigma=[_SMOOTH_PX, _SMOOTH_PX])
    mean_N111 = field_N2HW.square().sum(1, keepdim=True).mean((2, 3), keepdim=True).sqrt()
    moved_NHW2 = (field_N2HW / mean_N111 * distance_px).permute(0, 2, 3, 1) * 2 / torch.tensor([width, height])
    still_NHW2 = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(x_NCHW.shape), align_corners=False)
    return F.grid_sample(x_NCHW, still_NHW2 + moved_NHW2, align_corners=False)


# --- in the way ---


def _occlusion(x_NCHW: Tensor, side_px: float, generator: Generator) -> Tensor:
    """Put a grey square before each picture, anywhere within it."""
    count, _, height, width = x_NCHW.shape
    top_N11 = (torch.rand(count, 1, 1, generator=generator) * (height - side_px)).round()
    left_N11 = (torch.rand(count, 1, 1, generator=generator) * (width - side_px)).round()
    y_H1, x_1W = torch.arange(height)[:, None], torch.arange(width)[None]
    hidden_NHW = (top_N11 <= y_H1) & (y_H1 < top_N11 + side_px) & (left_N11 <= x_1W) & (x_1W < left_N11 + side_px)
    return torch.where(hidden_NHW[:, None], 0.5, x_NCHW)


def _lines(x_NCHW: Tensor, line_count: float, generator: Generator) -> Tensor:
    """Draw white lines of one pixel's width over each picture, none far from its middle."""
    count, _, height, width = x_NCHW.shape
    angle_NL11 = torch.rand(count, int(line_count), 1, 1, generator=generator) * math.pi
    offset_NL11 = (torch.rand(count, int(line_count), 1, 1, generator=generator) - 0.5) * min(height, width) / 2
    y_H1, x_1W = torch.arange(height)[:, None] - height / 2, torch.arange(width)[None] - width / 2
    across_NLHW = x_1W * angle_NL11.cos() + y_H1 * angle_NL11.sin() - offset_NL11
    ink_N1HW = (1 - across_NLHW.abs()).clamp(min=0).amax(dim=1, keepdim=True)
    return torch.maximum(x_NCHW, ink_N1HW)


# --- what several of them need ---


def _signs(count: int, generator: Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1


def _coordinates(side: int) -> tuple[Tensor, Tensor]:
    """Return how far each pixel of a kernel is below its middle, and how far to the right, in pixels."""
    from_middle_S = torch.arange(side) - (side - 1) / 2
    return from_middle_S[:, None].expand(side, side), from_middle_S[None].expand(side, side)


def _convolve(x_NCHW: Tensor, kernels_NSS: Tensor) -> Tensor:
    """Filter each picture by a kernel of its own, which need not sum to 1; its border goes on outside."""
    channels, (height, width), side = x_NCHW.shape[1], x_NCHW.shape[2:], kernels_NSS.shape[1]
    weights_NSS = kernels_NSS / kernels_NSS.sum((1, 2), keepdim=True)
    # Every channel of every picture is a group of one big picture.
    groups_G1SS = weights_NSS.repeat_interleave(channels, 0)[:, None]
    padded_NCHW = F.pad(x_NCHW, [side // 2] * 4, mode="replicate")
    padded_1GHW = padded_NCHW.flatten(0, 1)[None]
    return F.conv2d(padded_1GHW, groups_G1SS, groups=len(groups_G1SS)).reshape(-1, channels, height, width)


def _affine(
    x_NCHW: Tensor,
    *,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    y: Tensor | float = 0.0,
) -> Tensor:
    """Take the pixel at (u, v) from (xx u + xy v + x, yx u + yy v + y), each edge at -1 or 1; black outside."""
    rows = [[torch.as_tensor(value).expand(len(x_NCHW)) for value in row] for row in ((xx, xy, x), (yx, yy, y))]
    matrices_N23 = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    return F.grid_sample(
        x_NCHW, F.affine_grid(matrices_N23, list(x_NCHW.shape), align_corners=False), align_corners=False
    )


TEST: dict[str, Corruption] = {
    "gaussian_noise": Corruption(_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # deviation; ImageNet-C
    "shot_noise": Corruption(_shot_noise, (60, 25, 12, 5, 3)),  # photons of a white pixel; ImageNet-C
    "impulse_noise": Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),  # share of pixels; ImageNet-C
    "gaussian_blur": Corruption(_gaussian_blur, (0.6, 0.9, 1.3, 1.8, 2.4)),  # deviation, pixels
    "motion_blur": Corruption(_motion_blur, (3, 5, 7, 9, 12)),  # length, pixels
    "pixelate": Corruption(_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),  # share of the side; ImageNet-C
    "jpeg": Corruption(_jpeg, (25, 18, 15, 10, 7)),  # quality; ImageNet-C
    "contrast": Corruption(_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),  # share that is left; ImageNet-C
    "brightness": Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # added; ImageNet-C
    "darkness": Corruption(_darkness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # taken away
    "rotate": Corruption(_rotate, (10, 20, 30, 40, 50)),  # degrees
    "translate": Corruption(_translate, (2, 4, 6, 8, 10)),  # pixels
    "elastic": Corruption(_elastic, (0.8, 1.2, 1.6, 2.0, 2.5)),  # pixels
    "occlusion": Corruption(_occlusion, (6, 8, 10, 12, 14)),  # side, pixels
}
"""What results are reported on; nothing may be chosen by them."""

DEVELOPMENT: dict[str, Corruption] = {
    "speckle_noise": Corruption(_speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6)),  # deviation; ImageNet-C
    "defocus_blur": Corruption(_defocus_blur, (0.8, 1.3, 1.8, 2.4, 3.0)),  # radius, pixels
    "gamma": Corruption(_gamma, (0.7, 0.5, 0.35, 0.25, 0.15)),  # exponent
    "posterize": Corruption(_posterize, (8, 5, 4, 3, 2)),  # levels
    "fog": Corruption(_fog, (0.2, 0.5, 0.75, 1.0, 1.5)),  # thickness; CIFAR-10-C of the same code
    "shear": Corruption(_shear, (0.2, 0.35, 0.5, 0.65, 0.8)),  # slope
    "shrink": Corruption(_shrink, (0.85, 0.75, 0.65, 0.55, 0.45)),  # share of the side
    "lines": Corruption(_lines, (1, 2, 3, 4, 6)),  # lines
}
"""What methods are developed and tuned on: none of the test's."""
