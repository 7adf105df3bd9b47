"""What answers pictures: the protocol that the service knows, and an engine of numpy alone.

Shape legend: N pictures, C channels, H rows, W columns, K classes.
"""

import hashlib
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


QUICK_SECONDS = 100e-6
"""A call no longer than this costs less than handing it to a thread and its answer back."""
_TRIES = 3


class EngineError(Exception):
    """No answer can be given, in one line; what was asked stays unanswered and uncharged."""


class Engine(Protocol):
    """A classifier with its preprocessing."""

    @property
    def labels(self) -> Sequence[str]:
        """K names, in the order of the answers."""

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""

    @property
    def height(self) -> int:
        """Rows of a picture, in pixels."""

    @property
    def width(self) -> int:
        """Columns of a picture, in pixels."""

    @property
    def model_digest(self) -> str:
        """SHA-256 (hex) of all that shapes the answers: weights, architecture, preprocessing."""

    @property
    def batch_pictures(self) -> int:
        """Pictures a call beyond which larger calls gain nothing; `answer` takes any number."""

    @property
    def calls_at_once(self) -> int:
        """Calls of `answer` that may be under way together, from as many threads."""

    def answer(self, images_NCHW: UInt8Array) -> Float32Array:
        """Return `probabilities_NK` whose rows sum to 1.

        Raises:
            EngineError: the answers are not finite, or are no probabilities.
        """


def is_quick(engine: Engine, picture_count: int) -> bool:
    """Whether calls of so many pictures are so short that an event loop may wait for them; measured.

    One picture is tried first, and one call that is far too long is enough: a real model costs this next to nothing.
    """
    if engine.calls_at_once > 1:  # it computes elsewhere, and gains by being asked from several threads
        return False
    for count in (1, picture_count):
        images_NCHW = np.zeros((count, engine.channels, engine.height, engine.width), dtype=np.uint8)
        if not _answers_quickly(engine, images_NCHW):
            return False
    return True


def _answers_quickly(engine: Engine, images_NCHW: UInt8Array) -> bool:
    """Whether the best of a few calls is short enough: the first pays for what is loaded, any for a busy machine."""
    for _ in range(_TRIES):
        started = time.perf_counter()
        try:
            engine.answer(images_NCHW)
        except Exception:  # of a picture that nobody sent; those who ask are told of theirs
            return False
        seconds = time.perf_counter() - started
        if seconds <= QUICK_SECONDS or seconds > 100 * QUICK_SECONDS:
            return seconds <= QUICK_SECONDS
    return False


class IdentityEngine:
    """Answers with the first K pixels of each picture, made to sum to 1: costs next to nothing.

    For measuring the service around a model.
    """

    def __init__(self, *, class_count: int = 10, channels: int = 1, height: int = 8, width: int = 8) -> None:
        if class_count > channels * height * width:
            raise ValueError(f"expected at least {class_count} pixels a picture")
        self.labels = tuple(str(k) for k in range(class_count))
        self.channels = channels
        self.height = height
        self.width = width
        self.batch_pictures = 512
        self.calls_at_once = 1
        self.model_digest = hashlib.sha256(
            f"IdentityEngine {class_count} {channels} {height} {width}".encode()
        ).hexdigest()

    def answer(self, images_NCHW: UInt8Array) -> Float32Array:
        """Return `probabilities_NK` whose rows sum to 1."""
        # One more than the pixel: no row is all zeros.
        odds_NK = images_NCHW.reshape(len(images_NCHW), -1)[:, : len(self.labels)].astype(np.float32) + 1
        probabilities_NK: Float32Array = odds_NK / odds_NK.sum(axis=1, keepdims=True)
        return probabilities_NK


class ArrayEngine:
    """Answers from a fixed random projection of the pixels: starts at once, needs no torch, learns nothing.

    The projection is in whole numbers, so an answer does not depend on what else is in the batch.
    """

    def __init__(
        self, *, class_count: int = 10, channels: int = 1, height: int = 8, width: int = 8, seed: int = 0
    ) -> None:
        self.labels = tuple(str(k) for k in range(class_count))
        self.channels = channels
        self.height = height
        self.width = width
        shape = (channels * height * width, class_count)
        self.batch_pictures = 512
        self.calls_at_once = 1
        self._weights_PK = np.random.default_rng(seed).integers(-3, 4, shape, dtype=np.int32)
        self.model_digest = hashlib.sha256(f"ArrayEngine {shape} {seed}".encode()).hexdigest()

    def answer(self, images_NCHW: UInt8Array) -> Float32Array:
        """Return `probabilities_NK` whose rows sum to 1."""
        pixels_NP = 2 * images_NCHW.reshape(len(images_NCHW), -1).astype(np.int32) - 255
        # Divided by about the spread of the sums, so that the softmax is neither flat nor certain.
        logits_NK = (pixels_NP @ self._weights_PK) / (256.0 * np.sqrt(len(self._weights_PK)))
        odds_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
        probabilities_NK: Float32Array = (odds_NK / odds_NK.sum(axis=1, keepdims=True)).astype(np.float32)
        return probabilities_NK
