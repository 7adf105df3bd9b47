"""Pictures as a device meets them, one after the other: mixed, class by class, or spoiled more and then less again.

Shape letters: N pictures, C channels, H and W height and width.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from benchmarks.corruptions import SEVERITIES, corrupt
from benchmarks.datasets import Labelled


@dataclass(frozen=True)
class Stream:
    """Pictures (uint8, N C H W) in the order of their coming, their classes (int64, N), how spoiled each is (N)."""

    images_NCHW: Tensor
    labels_N: Tensor
    severities_N: Tensor


def shuffled(pictures: Labelled, corruption: str = "", severity: int = 0, *, count: int, seed: int = 0) -> Stream:
    """The first `count` pictures of the seed's permutation, all equally spoiled; without a corruption, not at all.

    The same seed gives the same pictures, and the same noise on them, at every call.
    """
    chosen = _first(pictures, count, seed)
    severities_N = torch.full_like(chosen.labels_N, severity)
    if severity == 0:
        return chosen
    images_NCHW = corrupt(chosen.images_NCHW, corruption, severity, _generator(corruption, seed))
    return Stream(images_NCHW, chosen.labels_N, severities_N)


def by_class(stream: Stream) -> Stream:
    """The same pictures, all of the first class before any of the second."""
    order_N = stream.labels_N.argsort(stable=True)
    return Stream(stream.images_NCHW[order_N], stream.labels_N[order_N], stream.severities_N[order_N])


def returning(pictures: Labelled, corruption: str, *, count: int, seed: int = 0) -> Stream:
    """Shuffled pictures, spoiled step by step: severity 0, 1, ... 5, ... 1, 0, each for as many pictures."""
    chosen = _first(pictures, count, seed)
    steps_N = torch.arange(len(chosen.labels_N)) * (2 * SEVERITIES + 1) // len(chosen.labels_N)
    severities_N = SEVERITIES - (steps_N - SEVERITIES).abs()
    generator = _generator(corruption, seed)
    parts = [
        corrupt(chosen.images_NCHW[steps_N == step], corruption, SEVERITIES - abs(step - SEVERITIES), generator)
        for step in range(2 * SEVERITIES + 1)
    ]
    return Stream(torch.cat(parts), chosen.labels_N, severities_N)


def _first(pictures: Labelled, count: int, seed: int) -> Stream:
    order_N = np.random.default_rng(seed).permutation(len(pictures.labels_N))[:count]
    labels_N = torch.from_numpy(pictures.labels_N[order_N])
    return Stream(torch.from_numpy(pictures.images_NCHW[order_N]), labels_N, torch.zeros_like(labels_N))


def _generator(corruption: str, seed: int) -> Generator:
    digest = hashlib.sha256(f"{corruption}/{seed}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7]))
