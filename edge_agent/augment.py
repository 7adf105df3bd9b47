"""Random changes of pictures (N, C, H, W) on the networks' scale, -1..1; -1 is the empty background.

Each function draws from the `rng` it is given, on the CPU: the same seed gives the same pictures on
every device. All of them are differentiable, so a generator can be trained through them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def shift(images_NCHW: Tensor, *, largest_px: int, rng: torch.Generator, reflect: bool = False) -> Tensor:
    """Move each picture by whole pixels, up to `largest_px` each way; what comes in is background.

    With `reflect` it is what the picture has on this side of its edge, the other way round; then `largest_px` must be
    below height and width.
    """
    count, _, height, width = images_NCHW.shape
    device = images_NCHW.device
    offsets_2N = torch.randint(0, 2 * largest_px + 1, (2, count), generator=rng).to(device)
    rows_NH = offsets_2N[0, :, None] + torch.arange(height, device=device)
    columns_NW = offsets_2N[1, :, None] + torch.arange(width, device=device)
    pictures_N = torch.arange(count, device=device)
    padding = [largest_px] * 4
    padded_NCHW = F.pad(images_NCHW, padding, "reflect") if reflect else F.pad(images_NCHW, padding, value=-1.0)
    # Index tensors around the channels' slice put their own axes first, hence the permutation.
    shifted_NHWC = padded_NCHW[pictures_N[:, None, None], :, rows_NH[:, :, None], columns_NW[:, None, :]]
    return shifted_NHWC.permute(0, 3, 1, 2).contiguous()


def mirror(images_NCHW: Tensor, *, rng: torch.Generator) -> Tensor:
    """Mirror each picture left to right, or not: half of them on average."""
    mirrored_N = (torch.rand(len(images_NCHW), generator=rng) < 0.5).to(images_NCHW.device)
    return torch.where(mirrored_N[:, None, None, None], images_NCHW.flip(3), images_NCHW)


def warp(images_NCHW: Tensor, *, strength: float, rng: torch.Generator) -> Tensor:
    """Turn, scale and slant square pictures about their centre; what comes in is reflected at the edge.

    Each by up to `strength` either way: the angle in radians, the size as a factor less 1, the slant as the sideways
    move of a row for each row above the centre.
    """
    count = len(images_NCHW)
    angle_N, factor_N, slant_N = strength * (2.0 * torch.rand(3, count, generator=rng) - 1.0)
    cosine_N, sine_N = (1.0 + factor_N) * angle_N.cos(), (1.0 + factor_N) * angle_N.sin()
    nought_N = torch.zeros(count)
    rows = [[cosine_N, slant_N - sine_N, nought_N], [sine_N, cosine_N, nought_N]]
    matrices_N23 = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).to(images_NCHW.device)
    grid_NHW2 = F.affine_grid(matrices_N23, list(images_NCHW.shape), align_corners=False)
    return F.grid_sample(images_NCHW, grid_NHW2, padding_mode="reflection", align_corners=False)


def recolour(images_NCHW: Tensor, *, strength: float, rng: torch.Generator) -> Tensor:
    """Change each picture's brightness and contrast, by up to `strength` (1 = the half range) each.

    With several channels saturation changes too; a grey picture has none.
    """
    count, channels, _, _ = images_NCHW.shape
    uniform_3N111 = (2.0 * torch.rand(3, count, 1, 1, 1, generator=rng) - 1.0).to(images_NCHW.device)
    changed = images_NCHW + strength * uniform_3N111[0]
    if channels > 1:
        grey = changed.mean(dim=1, keepdim=True)
        changed = grey + (changed - grey) * (1.0 + strength * uniform_3N111[1])
    mean = changed.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (changed - mean) * (1.0 + strength * uniform_3N111[2])


def cutout(images_NCHW: Tensor, *, fraction: float, rng: torch.Generator) -> Tensor:
    """Overwrite a square of `fraction` of the side, centred anywhere, with background."""
    count, _, height, width = images_NCHW.shape
    device = images_NCHW.device
    centre_2N = torch.rand(2, count, generator=rng).to(device)
    rows_NH = (torch.arange(height, device=device) + 0.5) / height - centre_2N[0, :, None]
    columns_NW = (torch.arange(width, device=device) + 0.5) / width - centre_2N[1, :, None]
    rows_inside = rows_NH.abs() < fraction / 2
    columns_inside = columns_NW.abs() < fraction / 2
    inside_N1HW = (rows_inside[:, :, None] & columns_inside[:, None, :])[:, None]
    return images_NCHW.masked_fill(inside_N1HW, -1.0)
