"""Batch-norm statistics that follow the stream, as far as its classes do not explain what has changed.

Shape letters: N pictures of a batch, C channels, H and W height and width, K classes, L layers of batch norm,
S channels of all these layers, one after the other.

A batch can look unlike the training pictures for two reasons: the camera sees otherwise (noise, blur, dusk), or the
batch has other classes than usual, such as one alone. Batch norm with the batch's own statistics undoes the first and
is ruined by the second. So every layer remembers what each class looks like to it. A stream's statistics are compared
with the nearest mixture of classes, any mixture; only the rest, if it is more than what local pictures show, is
taken for the camera's doing and undone. Nothing is predicted or learnt for this, and one forward pass is enough.

"What it looks like" are the moments of a channel in the layer's own units: y = (x - mean) / deviation with the
statistics of the training, its mean and the mean of its square. Moments of a mixture are mixtures of moments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edge_agent.pixels import normalise
from networks.classifiers import Classifier

Floats = NDArray[np.float64]

WINDOW_COUNT = 128
"""Pictures of the past that count beside a batch, where nothing has changed."""
MOST_KINDS = 32
_LEAST_NARROWNESS = 0.02
_REFITS = 2
_LEAST_VARIANCE = 1e-3  # of the training's: a channel that a class leaves silent has none
_GROUP_COUNTS = (1, 16, 256)
_GROUPS = 60
_QUANTILE = 0.95
_MOST = 60_000.0  # that half precision holds
_LEAST_DISTANCE = 1e-12
_CERTAIN = 4.0  # twice as far as usual: single pictures of a disturbed stream differ more than undisturbed ones
_WATCHED_COUNT = 250
_MOST_BYTES = 128_000_000  # of what is seen of local pictures: a device of 1 GB has room for it


@dataclass(frozen=True, kw_only=True)
class SourceStatistics:
    """What the student's layers of batch norm see of each kind of local picture: a class, or alike classes."""

    kinds_G2S: NDArray[np.float16]
    """Mean and variance of each channel, by kind."""
    shares_G: NDArray[np.float32]
    """How many of the local pictures are of which kind."""
    usual_L22: NDArray[np.float32]
    """(a, b) twice: the squared distance of N local pictures from what they are compared with is at most a + b / N,
    but for one time in twenty. First of any pictures from the nearest mixture, then of mixed ones from the local
    mixture."""

    def layers(self, norms: list[nn.BatchNorm2d]) -> list["StreamNorm"]:
        """Return what stands in the place of a student's layers of batch norm, in their order.

        Raises:
            ValueError: the statistics are those of other layers.
        """
        widths = [norm.num_features for norm in norms]
        if (len(norms), sum(widths)) != (len(self.usual_L22), self.kinds_G2S.shape[2]):
            raise ValueError(
                f"expected a student with {len(self.usual_L22)} layers of batch norm and {self.kinds_G2S.shape[2]} "
                f"channels in them, got {len(norms)} and {sum(widths)}"
            )
        mean_GS, variance_GS = self.kinds_G2S.astype(np.float64).transpose(1, 0, 2)
        moments_G2S = np.stack([mean_GS, variance_GS + mean_GS**2], axis=1)
        tables = np.split(moments_G2S, np.cumsum(widths)[:-1], axis=2)
        shares_G = self.shares_G.astype(np.float64)
        return [
            StreamNorm(norm, Mixtures(table, shares_G), usual)
            for norm, table, usual in zip(norms, tables, self.usual_L22.astype(np.float64), strict=True)
        ]


class StreamNorm(nn.Module):
    """Stands in the place of one `BatchNorm2d`, and normalises with statistics that follow the stream."""

    def __init__(self, norm: nn.BatchNorm2d, mixtures: "Mixtures", usual_22: Floats) -> None:
        super().__init__()
        self._norm = norm
        self._mixtures = mixtures
        self._usual_22 = usual_22
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self._count = 0.0
        self._moments_2C: Floats | None = None
        self._unexplained_P: Floats = np.zeros(0)
        self._nearest_G: Floats | None = None
        self.shift = 0.0
        self.narrowness = 1.0

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return what batch norm would, with the stream's statistics as they are with this batch."""
        norm = self._norm
        assert norm.running_mean is not None and norm.running_var is not None
        # With epsilon, as batch norm divides by it: a channel that was silent in training has no variance of its own.
        mean_C, variance_C = norm.running_mean, norm.running_var + norm.eps
        move_C, stretch_C = self._follow(batch_moments(x_NCHW, mean_C, variance_C), len(x_NCHW)).astype(np.float32)
        if self.shift == 0.0:
            return norm.forward(x_NCHW)
        mean_C = mean_C + torch.from_numpy(move_C).to(mean_C.device) * variance_C.sqrt()
        variance_C = variance_C * torch.from_numpy(stretch_C).to(mean_C.device)
        return F.batch_norm(x_NCHW, mean_C, variance_C, norm.weight, norm.bias, False, 0.0, 0.0)

    def _follow(self, batch_2C: Floats, count: int) -> Floats:
        """Take a batch into the stream. Return by how much to move the mean, and to stretch the variance (2, C)."""
        mixed_2C, total = batch_2C, float(count)
        if self._moments_2C is not None:
            kept = min(self._count, WINDOW_COUNT)
            # Of a past further away than chance and classes have it little is kept: drift that ends is forgotten.
            batch_P, self._nearest_G = self._mixtures.unexplained(batch_2C, self._nearest_G)
            apart_P = batch_P - self._unexplained_P
            near = _CERTAIN * (self._most(count, 1.0) + self._most(kept, 1.0))
            kept *= min(1.0, near / max(float(apart_P @ apart_P), _LEAST_DISTANCE))
            total = count + kept
            mixed_2C = (count * batch_2C + kept * self._moments_2C) / total
        self._moments_2C, self._count = mixed_2C, total
        self._unexplained_P, self._nearest_G = self._mixtures.unexplained(mixed_2C, self._nearest_G)
        rest_P, expected_2C = self._mixtures.rest(mixed_2C, self._nearest_G, narrowness=self.narrowness)
        # Stein's estimator: of what is found, the part that cannot be usual is believed. What some mixture explains
        # is none of the camera's doing, however wide the stream was: another one may have begun.
        believed = 1.0 - self._most(total, self.narrowness) / max(float(rest_P @ rest_P), _LEAST_DISTANCE)
        far = float(self._unexplained_P @ self._unexplained_P)
        certain = 2.0 * (far / max(self._most(total, 1.0), _LEAST_DISTANCE) - 1.0)
        self.shift = max(0.0, min(believed, certain))
        stretch_C = (variance(mixed_2C) / variance(expected_2C)) ** self.shift
        return np.stack([self.shift * (mixed_2C[0] - expected_2C[0]), stretch_C])

    def _most(self, count: float, narrowness: float) -> float:
        (narrow, wide) = self._usual_22 @ (1.0, 1.0 / count)
        return float(narrowness * narrow + (1.0 - narrowness) * wide)


class Mixtures:
    """All mixtures of the kinds of pictures, as one layer sees them."""

    def __init__(self, moments_G2C: Floats, shares_G: Floats) -> None:
        self._moments_GP = moments_G2C.reshape(len(shares_G), -1)
        self._shares_G = shares_G
        self._places_GP = place(moments_G2C)
        self._products_GG = self._places_GP @ self._places_GP.T

    def unexplained(self, moments_2C: Floats, near_G: Floats | None = None) -> tuple[Floats, Floats]:
        """Return what no mixture explains (P), and the shares (G) of the one that explains most.

        `near_G` only saves time: shares of a mixture that may be near to that one.
        """
        place_P = place(moments_2C)
        shares_G = nearest_mixture(self._products_GG, self._places_GP @ place_P, near_G)
        return place_P - place(self._mixed(shares_G)), shares_G

    def far_from_any(self, moments_2C: Floats) -> Floats:
        """Return what no mixture explains (P)."""
        return self.unexplained(moments_2C)[0]

    def far_from_local(self, moments_2C: Floats) -> Floats:
        """Return what the local mixture leaves unexplained (P)."""
        return place(moments_2C) - place(self._mixed(self._shares_G))

    def rest(self, moments_2C: Floats, nearest_G: Floats, *, narrowness: float) -> tuple[Floats, Floats]:
        """Return what no likely mixture explains (P), and the moments (2, C) of the one that explains most.

        The likely ones are the nearer to the local mixture the wider the stream's recent pictures are spread over the
        kinds: with narrowness 1 (one kind alone) nearly any mixture will do, with 0 none but the local one. Between
        the two a ridge holds the shares, weighed by how much is left unexplained: the further away the camera is, the
        less a fit says about the kinds.

        Args:
            moments_2C: of the stream.
            nearest_G: shares of the mixture that explains most of them, likely or not.
            narrowness: of the stream, 0 to 1.
        """
        place_P = place(moments_2C)
        shares_G = self._shares_G
        if narrowness > _LEAST_NARROWNESS:
            shares_G = nearest_G
            towards_G = self._places_GP @ place_P
            freedom = narrowness**2 / len(self._shares_G)
            for _ in range(_REFITS):
                rest_P = place_P - place(self._mixed(shares_G))
                ridge = float(rest_P @ rest_P) / len(rest_P) / freedom
                held_GG = self._products_GG + ridge * np.eye(len(shares_G))
                shares_G = nearest_mixture(held_GG, towards_G + ridge * self._shares_G, shares_G)
        expected_2C = self._mixed(shares_G)
        return place_P - place(expected_2C), expected_2C

    def _mixed(self, shares_G: Floats) -> Floats:
        mixed_2C: Floats = (shares_G @ self._moments_GP).reshape(2, -1)
        return mixed_2C


def batch_moments(x_NCHW: Tensor, mean_C: Tensor, variance_C: Tensor) -> Floats:
    """Return mean and mean square (2, C) of each channel over a batch, in the layer's units."""
    # The kernel that batch norm trains with: several times faster than var_mean, and as exact.
    found_C, spread_C = torch.batch_norm_update_stats(x_NCHW, None, None, 0.0)
    first_C = (found_C - mean_C) / variance_C.sqrt()
    return torch.stack([first_C, spread_C / variance_C + first_C.square()]).double().cpu().numpy()


def picture_moments(x_NCHW: Tensor, mean_C: Tensor, variance_C: Tensor) -> Floats:
    """Return the same (N, 2, C) of each picture for itself; their mean over a batch is `batch_moments`."""
    spread_NC, found_NC = torch.var_mean(x_NCHW, dim=(2, 3), correction=0)
    first_NC = (found_NC - mean_C) / variance_C.sqrt()
    both_N2C = torch.stack([first_NC, spread_NC / variance_C + first_NC.square()], dim=1)
    return both_N2C.double().cpu().numpy()


def variance(moments_X2C: Floats) -> Floats:
    """Return the variance (..., C) that belongs to moments (..., 2, C), never quite 0."""
    found_XC: Floats = moments_X2C[..., 1, :] - moments_X2C[..., 0, :] ** 2
    floored_XC: Floats = np.maximum(found_XC, 0.0) + _LEAST_VARIANCE
    return floored_XC


def place(moments_X2C: Floats) -> Floats:
    """Return moments (..., 2, C) as a point (..., 2C) of a space where distances compare.

    That of two normal distributions whose means are apart by d and whose deviations by a factor f is about
    d^2 + 2 (log f)^2 for small ones (twice their divergence, Fisher's metric).
    """
    return np.concatenate([moments_X2C[..., 0, :], np.log(variance(moments_X2C)) / np.sqrt(2.0)], axis=-1)


def nearest_mixture(products_KK: Floats, towards_K: Floats, near_K: Floats | None = None) -> Floats:
    """Return the shares (K, at least 0, in sum 1) of the point of a hull that is nearest to a given one.

    Args:
        products_KK: inner products of the hull's corners.
        towards_K: those of the corners and the point.
        near_K: shares to begin at, which only saves time where they are near: but for corners that are nearly alike
            the result does not depend on them. None: at the nearest corner.

    The active set of Lawson and Hanson's NNLS (1974), with the sum held at 1 throughout.
    """
    count = len(towards_K)
    if near_K is None:
        near_K = np.eye(count)[np.argmin(np.diagonal(products_KK) - 2.0 * towards_K)]
    # Kinds that look alike would leave more than one answer.
    products_KK = products_KK + 1e-9 * (1.0 + np.trace(products_KK)) * np.eye(count)
    # The last row and column hold the sum.
    system_XX = np.ones((count + 1, count + 1))
    system_XX[:count, :count] = products_KK
    system_XX[count, count] = 0.0
    aims_X = np.append(towards_K, 1.0)
    least_pull = 1e-9 * (1.0 + abs(products_KK).max())
    shares_K = near_K.copy()
    active_X = np.append(shares_K > 0, True)
    active_K = active_X[:count]
    for _ in range(4 * count):
        while True:
            wanted = np.linalg.solve(system_XX[active_X][:, active_X], aims_X[active_X])[:-1]
            leaving = wanted <= 0
            if not leaving.any():
                shares_K[active_K] = wanted
                break
            # As far towards it as no share becomes negative; who is at 0 then leaves.
            now = shares_K[active_K]
            step = (now[leaving] / np.maximum(now[leaving] - wanted[leaving], 1e-300)).min()
            shares_K[active_K] = now + step * (wanted - now)
            active_K &= shares_K > 1e-12
            shares_K[~active_K] = 0.0
        pull_K = towards_K - products_KK @ shares_K
        pull_K -= pull_K[active_K].mean()
        pull_K[active_K] = 0.0
        entering = pull_K.argmax()
        if pull_K[entering] <= least_pull:
            break
        active_K[entering] = True
    found: Floats = shares_K / shares_K.sum()
    return found


# --- made once, from local pictures ---


@torch.inference_mode()
def source_statistics(
    student: Classifier, images_NCHW: Tensor, said_NK: Tensor, *, seed: int
) -> SourceStatistics | None:
    """Watch a student's layers of batch norm look at local pictures; None where it has no such layer.

    Args:
        student: in eval mode.
        images_NCHW: local pictures, uint8, two or more.
        said_NK: its probabilities for them: which picture is of which class nobody on the device knows better.
        seed: of the groups of pictures that show what is usual.

    Half of the pictures show what the kinds look like, the other half how far others are from that.
    """
    norms = batch_norms(student)
    if not norms:
        return None
    seen: list[list[Floats]] = [[] for _ in norms]
    handles = [norm.register_forward_pre_hook(_watcher(norm, found)) for norm, found in zip(norms, seen, strict=True)]
    try:
        for part_NCHW in images_NCHW.split(_WATCHED_COUNT):
            student(normalise(part_NCHW.to(student.linear.weight.device)))
    finally:
        for handle in handles:
            handle.remove()
    weights_NG = by_kind(said_NK.double().cpu().numpy(), student.linear.weight.double().cpu().numpy())
    half = len(images_NCHW) // 2
    shares_G = weights_NG.mean(axis=0)
    narrow, wide = _groups(weights_NG[half:], np.random.default_rng(seed))
    anything = {count: narrow[count] + wide[count] for count in _GROUP_COUNTS}
    tables, usual = [], []
    for found in seen:
        moments_N2C = np.concatenate(found)
        table_G2C = kind_means(moments_N2C[:half], weights_NG[:half])
        mixtures = Mixtures(table_G2C, shares_G)
        tables.append(table_G2C)
        others_N2C = moments_N2C[half:]
        usual.append(
            [
                _usual(others_N2C, anything, mixtures.far_from_any),
                _usual(others_N2C, wide, mixtures.far_from_local),
            ]
        )
    all_G2S = np.concatenate(tables, axis=2)
    kinds_G2S = np.stack([all_G2S[:, 0], all_G2S[:, 1] - all_G2S[:, 0] ** 2], axis=1)
    return SourceStatistics(
        kinds_G2S=kinds_G2S.clip(-_MOST, _MOST).astype(np.float16),
        shares_G=shares_G.astype(np.float32),
        usual_L22=np.array(usual, np.float32),
    )


def most_pictures(student: Classifier) -> int:
    """Return how many local pictures `source_statistics` may look at: it holds two numbers a channel of each."""
    channels = sum(norm.num_features for norm in batch_norms(student))
    return max(2, _MOST_BYTES // (2 * np.dtype(np.float64).itemsize * max(1, channels)))


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    """Return a network's layers of batch norm, in the order of `modules`."""
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


def by_kind(weights_NK: Floats, rows_KD: Floats) -> Floats:
    """Return how much each picture is of each kind (N, G): a class, or where there are many, a group of alike ones.

    Alike are classes whose rows in the last layer are. The groups' first members are those furthest from each other
    (Gonzalez 1985), the others join the nearest.
    """
    if weights_NK.shape[1] <= MOST_KINDS:
        return weights_NK
    rows_KD = rows_KD / np.linalg.norm(rows_KD, axis=1, keepdims=True)
    first = [0]
    likeness_KG = rows_KD @ rows_KD[first].T
    while len(first) < MOST_KINDS:
        first.append(int(likeness_KG.max(axis=1).argmin()))
        likeness_KG = rows_KD @ rows_KD[first].T
    joined_KG = np.eye(MOST_KINDS)[likeness_KG.argmax(axis=1)]
    grouped_NG: Floats = weights_NK @ joined_KG
    return grouped_NG


def kind_means(moments_N2C: Floats, weights_NG: Floats) -> Floats:
    """Return the moments (G, 2, C) of each kind. One that no picture shows looks like all of them together."""
    sums_G2C = np.tensordot(weights_NG.T, moments_N2C, axes=1)
    # As if one picture more, of all kinds, had been seen: a kind that is hardly there is hardly known.
    found: Floats = (sums_G2C + moments_N2C.mean(axis=0)) / (weights_NG.sum(axis=0) + 1.0)[:, None, None]
    return found


Groups = dict[int, list[NDArray[np.int64]]]


def _groups(weights_NG: Floats, rng: np.random.Generator) -> tuple[Groups, Groups]:
    """Return pictures of one kind, and pictures of all, for each size of a batch: as streams may bring them."""
    named_N = weights_NG.argmax(axis=1)
    kinds = [np.flatnonzero(named_N == g) for g in np.unique(named_N)]
    narrow = {count: [rng.choice(kinds[i % len(kinds)], count) for i in range(_GROUPS)] for count in _GROUP_COUNTS}
    wide = {count: [rng.choice(len(named_N), count) for _ in range(_GROUPS)] for count in _GROUP_COUNTS}
    return narrow, wide


def _usual(moments_N2C: Floats, groups: Groups, rest: Callable[[Floats], Floats]) -> tuple[float, float]:
    """Return (a, b) so that a + b / N bounds what was found for each size; a is what the largest has."""
    found = {}
    for count, chosen in groups.items():
        rests = [rest(moments_N2C[group].mean(axis=0)) for group in chosen]
        found[count] = float(np.quantile([each @ each for each in rests], _QUANTILE))
    floor = found[max(found)]
    return floor, max(count * (far - floor) for count, far in found.items())


def _watcher(norm: nn.BatchNorm2d, seen: list[Floats]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return a hook that keeps each picture's moments (N, 2, C) of what a layer is given."""

    def watch(_layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        seen.append(picture_moments(given[0], norm.running_mean, norm.running_var + norm.eps))

    return watch
