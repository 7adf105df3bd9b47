"""How near synthetic pictures come to local ones: the split, the gate's measure, and the attack on what was sent.

Shape letters: N pictures looked at, M pictures compared with, C channels, H and W height and width, K nearest,
P parts of a picture, R parts along each of its sides (P = R²).

Pure functions: no state, no files. Distances are root mean squares over the pixels of a picture or a part, in grey
levels (0 to 255), to a picture or its mirror image, whichever is nearer: a mirrored copy is a copy.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

REFERENCE_FRACTION = 0.1
LEAST_REFERENCE = 8
"""A tenth of the fewest pictures that a run takes would be six."""
QUANTILE = 0.001
NEIGHBOURS = 10
"""Sent pictures that the second attack looks at."""
ATTACKS = ("nearest", "mean_of_nearest", "mean_of_parts")
"""What ``membership`` always tries: figures of fewer are of a former version, and understate."""
_LEAST_TAIL = 4
_NORMAL_95 = 1.959964
_BLOCK_NUMBERS = 2**23  # of one block of pictures: 32 MiB
_BLOCK_ROWS = 1024  # pictures in one: products of twice as many leave the cache, and took half as long again by parts
_EXACT_DIMENSIONS = 1024


def split(images_NCHW: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Which pictures train the generator, and which tenth is the reference: two index vectors, ascending.

    Drawn by a hash of the seed and the pixels, so the order of the pictures is no matter. A picture, its copies and
    its mirror images stay together: a reference with a twin in training would say that strangers come near. Raises
    ValueError where so many are copies that fewer than LEAST_REFERENCE can be set aside.
    """
    count = len(images_NCHW)
    groups: dict[bytes, list[int]] = {}
    for i, image_CHW in enumerate(images_NCHW.numpy()):
        groups.setdefault(_key(image_CHW, seed), []).append(i)
    wanted = max(LEAST_REFERENCE, round(REFERENCE_FRACTION * count))
    is_reference_N = torch.zeros(count, dtype=torch.bool)
    for _, group in sorted(groups.items()):
        if len(group) <= wanted:
            is_reference_N[group] = True
            wanted -= len(group)
    if int(is_reference_N.sum()) < LEAST_REFERENCE:
        raise ValueError(
            f"expected {LEAST_REFERENCE} local pictures or more that can be set aside with all their copies, got "
            f"{int(is_reference_N.sum())} of {count}: there are only {len(groups)} different ones"
        )
    return torch.nonzero(~is_reference_N).flatten(), torch.nonzero(is_reference_N).flatten()


def _key(image_CHW: npt.NDArray[np.uint8], seed: int) -> bytes:
    pixels = min(image_CHW.tobytes(), np.flip(image_CHW, 2).tobytes())
    return hashlib.sha256(f"reference/{seed}\n".encode() + pixels).digest()


def nearest(images_NCHW: Tensor, others: Iterable[Tensor], *, count: int = 1) -> Tensor:
    """Distances (N, K) from each picture (N, C, H, W) uint8 to the `count` nearest of others, nearest first.

    `others` are blocks (M, C, H, W) uint8; where all of them are fewer than `count`, infinity stands for the rest.
    Exact, however near.
    """
    return nearest_by_parts(images_NCHW, others, count=count, side_parts=1)[0]


def nearest_by_parts(
    images_NCHW: Tensor, others: Iterable[Tensor], *, count: int = 1, side_parts: int
) -> tuple[Tensor, Tensor]:
    """Distances (N, K) as of ``nearest``, and distances (N, P) from each part to the nearest of others' at its place.

    Each part is looked up by itself. `side_parts` a side, which both sides are divisible by. Of a mirrored picture a
    part stands at the mirrored place, mirrored. The parts cost few more multiplications than none: their squared
    distances add up to the whole's.

    Exact: |a - b|² = |a|² + |b|² - 2ab loses near copies to rounding, so nothing is rounded here. Less 128, pixels
    are whole numbers up to 128 in size, and float32 holds every whole number up to 2²⁴ = 1024 · 128²: products over
    1024 dimensions at a time are exact in whatever order they are added, and float64 adds those up.
    """
    dimensions = images_NCHW[0].numel()
    rows = max(1, min(_BLOCK_NUMBERS // dimensions, _BLOCK_ROWS))
    blocks = images_NCHW.split(rows)
    near = [torch.full((len(block_NCHW), count), math.inf, dtype=torch.float64) for block_NCHW in blocks]
    near_parts = [
        torch.full((len(block_NCHW), side_parts, side_parts), math.inf, dtype=torch.float64) for block_NCHW in blocks
    ]
    for other_MCHW in (other_MCHW for block in others if len(block) for other_MCHW in block.split(rows)):
        other_parts = [_slices(part_MCHW) for part_MCHW in _parts(other_MCHW, side_parts)]
        other_squares = [_squares(slices) for slices in other_parts]
        for i, block_NCHW in enumerate(blocks):
            squares_NM = torch.full((len(block_NCHW), len(other_MCHW)), math.inf, dtype=torch.float64)
            for mirrored in (False, True):
                view_NCHW = block_NCHW.flip(3) if mirrored else block_NCHW
                view_NM = torch.zeros_like(squares_NM)
                part_minima = []
                for part_NCHW, other_slices, other_M in zip(
                    _parts(view_NCHW, side_parts), other_parts, other_squares, strict=True
                ):
                    part_slices = _slices(part_NCHW)
                    # |a|² is the same for all others: added once the nearest is known, it costs no pass over them.
                    part_NM = other_M.expand(len(part_NCHW), -1)
                    for part_ND, other_MD in zip(part_slices, other_slices, strict=True):
                        part_NM = torch.sub(part_NM, part_ND @ other_MD.T, alpha=2)
                    part_minima.append(part_NM.amin(1) + _squares(part_slices))
                    view_NM += part_NM
                torch.minimum(squares_NM, view_NM, out=squares_NM)
                minima_NRR = torch.stack(part_minima, 1).view(-1, side_parts, side_parts)
                # What stands on the left of a mirror image is the picture's right.
                near_parts[i] = torch.minimum(near_parts[i], minima_NRR.flip(2) if mirrored else minima_NRR)
            squares_NM += _squares(_slices(block_NCHW))[:, None]
            near_NK = squares_NM.topk(min(count, len(other_MCHW)), largest=False).values
            near[i] = torch.cat([near[i], near_NK], 1).topk(count, largest=False).values
    near_NP = torch.cat(near_parts).flatten(1)
    return torch.cat(near).div_(dimensions).sqrt_(), near_NP.div_(dimensions / side_parts**2).sqrt_()


def _parts(images_NCHW: Tensor, side_parts: int) -> list[Tensor]:
    """Views of all parts (N, C, H / R, W / R), row by row."""
    height, width = images_NCHW.shape[2] // side_parts, images_NCHW.shape[3] // side_parts
    return [part_NCHW for row_NCHW in images_NCHW.split(height, 2) for part_NCHW in row_NCHW.split(width, 3)]


def _slices(images_NCHW: Tensor) -> list[Tensor]:
    """Pixels less 128 as float32, (N, D) with at most _EXACT_DIMENSIONS of them each."""
    return list(images_NCHW.flatten(1).float().sub_(128.0).split(_EXACT_DIMENSIONS, 1))


def _squares(slices: list[Tensor]) -> Tensor:
    """Squared lengths (N,) float64, exact as the products are."""
    return torch.stack([slice_ND.square().sum(1).double() for slice_ND in slices]).sum(0)


def threshold(distances_N: Tensor) -> float:
    """The distance that 0.1 % of the reference pictures lie within, of the nearest training picture to each.

    Fewer than 1,000 reference pictures have no such quantile: their smallest distance is the 1/(N + 1) quantile, and
    with 44 of them a generator of perfectly honest pictures would lose 2 %. So it is extrapolated, from how the
    smallest quarter (four at least) falls towards 0: a power law (Weissman, JASA 73, 1978), its exponent by Hill
    (Annals of Statistics 3, 1975). Never more than the smallest distance seen.
    """
    count = len(distances_N)
    if count * QUANTILE >= 1:
        return float(distances_N.quantile(QUANTILE).item())
    sorted_N = distances_N.sort().values
    smallest = float(sorted_N[0])
    tail = max(_LEAST_TAIL, count // 4)
    if count <= tail or smallest == 0:
        raise ValueError(f"expected more than {_LEAST_TAIL} distances, all above 0; got {count}, from {smallest}")
    border = float(sorted_N[tail])
    shape = float((border / sorted_N[:tail]).log().mean())
    return min(smallest, border * math.pow(QUANTILE * count / tail, shape))


@dataclass(frozen=True)
class Auc:
    """Area under the ROC curve of one attack: 0.5 is a coin, 1 knows every member; and its 95 % interval."""

    auc: float
    low: float
    high: float


def membership(
    near_NK: Tensor, near_NP: Tensor, finest_NP: Tensor | None = None, *, member_count: int
) -> dict[str, Auc]:
    """Attack -> how well it tells the first `member_count` local pictures, the members, from the others.

    By the distances (N, K) to the K nearest sent pictures, and (N, P) of each part to the nearest at its place:

    ``nearest``: a member has a nearer nearest one (the full black-box attack of GAN-Leaks, Chen et al., CCS 2020).
    ``mean_of_nearest``: the K nearest are nearer on average, which one chance hit sways less (after the Monte Carlo
    attack of Hilprecht et al., PoPETs 2019, that looks at all within a radius).
    ``mean_of_parts``: its parts are nearer on average, each to whichever sent picture has the nearest. This one knows
    pictures that are put together of several. (The nearest part alone tells less: empty corners are near to all.)
    ``mean_of_finest_parts``: the same of `finest_NP`, distances of smaller parts, where these are given.
    """
    scores = {
        "nearest": near_NK[:, 0],
        "mean_of_nearest": near_NK.mean(1),
        "mean_of_parts": near_NP.mean(1),
    }
    if finest_NP is not None:
        scores["mean_of_finest_parts"] = finest_NP.mean(1)
    return {name: auc(-score_N[:member_count], -score_N[member_count:]) for name, score_N in scores.items()}


def auc(members_N: Tensor, others_M: Tensor) -> Auc:
    """How often a member's score is above another's, ties counting half, with its interval."""
    sorted_M = others_M.sort().values
    below_N = torch.searchsorted(sorted_M, members_N, right=False)
    upto_N = torch.searchsorted(sorted_M, members_N, right=True)
    area = float((below_N + upto_N).double().mean()) / (2 * len(others_M))
    low, high = auc_interval(area, len(members_N), len(others_M))
    return Auc(area, low, high)


def auc_interval(area: float, member_count: int, other_count: int) -> tuple[float, float]:
    """95 % interval of an area: all values whose own standard error makes the measured one no surprise.

    Standard error after Hanley and McNeil (Radiology 143, 1982), turned round as Newcombe's method 5 (Statistics in
    Medicine 25, 2006): it stays within 0 to 1, and does not collapse where the attack is always right.
    """
    half = (member_count + other_count) / 2 - 1
    pairs = member_count * other_count

    def surprising(value: float) -> bool:
        spread = 1 + half * ((1 - value) / (2 - value) + value / (1 + value))
        return abs(value - area) > _NORMAL_95 * math.sqrt(value * (1 - value) * spread / pairs)

    def border(outside: float) -> float:
        inside = area
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if surprising(middle) else (middle, outside)
        return inside

    return border(0.0), border(1.0)
