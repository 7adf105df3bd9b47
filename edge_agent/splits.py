"""The published splits of the data sets that benchmarks and the demo use.

The device sees its own part and no labels; the development part tunes, the cloud part trains the teacher.
Shape legend: N pictures.
"""

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt

Part = Literal["device", "development", "cloud", "test"]

TRAINING_PICTURES = {"mnist": 60_000, "cifar10": 50_000}
_DEVICE_PICTURES = 10_000
_DEVELOPMENT_PICTURES = 5_000


def digits_part(i: int) -> Part:
    """Return the part of scikit-learn's digit number `i`: a quarter test, a quarter device, half cloud."""
    parts: tuple[Part, ...] = ("test", "device", "cloud", "cloud")
    return parts[hashlib.sha256(f"digits/{i}".encode()).digest()[0] % 4]


def training_part(dataset: str, part: Part) -> npt.NDArray[np.int64]:
    """Return which training pictures of "mnist" or "cifar10" belong to a part: `indices_N`, in the split's order.

    The test part is the data set's own test set and has no indices here.

    Raises:
        ValueError: another data set, or the test part.
    """
    if dataset not in TRAINING_PICTURES or part == "test":
        raise ValueError(f"expected a part of the training pictures of mnist or cifar10, got {part} of {dataset}")
    order_N = np.random.default_rng(0).permutation(TRAINING_PICTURES[dataset])
    end = _DEVICE_PICTURES + _DEVELOPMENT_PICTURES
    return {
        "device": order_N[:_DEVICE_PICTURES],
        "development": order_N[_DEVICE_PICTURES:end],
        "cloud": order_N[end:],
    }[part]
