"""Labelled parts of the data sets, for whoever has labels: the cloud's teacher and the final table. Never the agent.

Shape letters: N pictures, C channels, H and W height and width.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_agent.data import digit_bytes, pixels_CHW
from edge_agent.splits import Part, digits_part, training_part

DIGITS_SIDE = 16
MNIST_SIDE = 32


@dataclass(frozen=True)
class Labelled:
    """Pictures (uint8, N C H W) with their classes (int64, N)."""

    images_NCHW: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]


def digits(part: Part) -> Labelled:
    """A part of scikit-learn's bundled digits, 16x16, by the published split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    chosen = [i for i in range(len(bunch.target)) if digits_part(i) == part]
    pictures = [Image.fromarray(image) for image in digit_bytes(bunch.images[chosen])]
    images_NCHW = np.stack([pixels_CHW(picture, 1, DIGITS_SIDE, DIGITS_SIDE) for picture in pictures])
    return Labelled(images_NCHW, bunch.target[chosen].astype(np.int64))


def mnist(root: Path, part: Part) -> Labelled:
    """A part of MNIST, padded to 32x32; its own test set is the test part. Raises OSError without it."""
    from torchvision.datasets import MNIST

    folder = root / "mnist" if (root / "mnist" / "MNIST").is_dir() else root
    try:
        dataset = MNIST(root=str(folder), train=part != "test", download=not (folder / "MNIST" / "raw").is_dir())
    except Exception as error:  # torchvision's download fails in many ways
        raise OSError(f"expected MNIST under {root}, or a network to download it: {error}") from None
    images_NHW, labels_N = dataset.data.numpy(), dataset.targets.numpy().astype(np.int64)
    if part != "test":
        chosen_N = training_part("mnist", part)
        images_NHW, labels_N = images_NHW[chosen_N], labels_N[chosen_N]
    padded_NHW = np.pad(images_NHW, ((0, 0), (2, 2), (2, 2)))
    return Labelled(padded_NHW[:, None], labels_N)
