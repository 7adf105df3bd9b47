"""Labelled parts of the data sets, for whoever has labels: the cloud's teacher and the final table. Never the agent.

Shape letters: N pictures, C channels, H and W height and width.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from edge_agent.config import RunConfig
from edge_agent.data import digit_bytes, load_local_images, pixels_CHW
from edge_agent.splits import Part, digits_part, training_part

DIGITS_SIDE = 16
MNIST_SIDE = 32
CIFAR_SIDE = 32
PEN_TEST_PICTURES = 500


@dataclass(frozen=True)
class Labelled:
    """Pictures (uint8, N C H W) with their classes (int64, N)."""

    images_NCHW: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]


def part(dataset: str, root: Path, name: Part) -> Labelled:
    """A part of mnist, mnist-digits or cifar10. Raises OSError without the data, ValueError for a part it has not."""
    if dataset == "mnist":
        return mnist(root, name)
    if dataset == "cifar10":
        return cifar10(root, name)
    if dataset == "mnist-digits" and name == "test":
        return pen_digits()
    raise ValueError(
        f"expected a part of mnist or cifar10, or the test part of mnist-digits; got {name} of {dataset}"
    )


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


def cifar10(root: Path, part: Part) -> Labelled:
    """A part of CIFAR-10 as JPEG files in `root/cifar10/{train,test}/CLASS/`. Raises OSError without them."""
    folder = root / "cifar10" / ("test" if part == "test" else "train")
    if not folder.is_dir():
        raise OSError(f"expected a folder {folder} with a folder of pictures for each class")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
    if part != "test":
        files = [files[i] for i in training_part("cifar10", part).tolist()]
    images_NCHW = np.stack([pixels_CHW(Image.open(path), 3, CIFAR_SIDE, CIFAR_SIDE) for path, _ in files])
    return Labelled(images_NCHW, np.array([label for _, label in files], np.int64))


def cifar10_root(root: Path, *, unpacked: Path) -> Path:
    """Where CIFAR-10 lies as files: `root`, or `unpacked` after unpacking `root/cifar10-jpeg.tar.xz` there once.

    The teacher's file is linked beside it. Raises OSError where there is neither.
    """
    if (root / "cifar10" / "train").is_dir():
        return root
    archive = root / "cifar10-jpeg.tar.xz"
    if not (unpacked / "cifar10").is_dir():
        if not archive.is_file():
            raise OSError(f"expected {root / 'cifar10'} or {archive}")
        beside = unpacked / ".unpacking"
        with tarfile.open(archive) as files:
            files.extractall(beside, filter="data")
        (beside / "cifar10").rename(unpacked / "cifar10")
    if not (unpacked / "teachers").exists():
        (unpacked / "teachers").unlink(missing_ok=True)  # a link to where the data was
        (unpacked / "teachers").symlink_to((root / "teachers").resolve())
    return unpacked


def local_pictures(config: RunConfig, *, channels: int, side: int) -> Tensor:
    """A device's pictures (uint8, N C H W), without labels, as its agent reads them: all that its settings allow."""
    local = load_local_images(
        config.images,
        channels=channels,
        height=side,
        width=side,
        data_root=Path(config.data),
        limit=config.local_pictures or None,
        seed=config.seed,
    )
    return torch.from_numpy(local.images_NCHW)


def pen_digits() -> Labelled:
    """500 of scikit-learn's digits for the test, as large as MNIST's padded pictures."""
    pictures, labels_N = _pen_digits(slice(None, PEN_TEST_PICTURES))
    images_NCHW = np.stack([pixels_CHW(picture, 1, MNIST_SIDE, MNIST_SIDE) for picture in pictures])
    return Labelled(images_NCHW, labels_N)


def pen_digits_folder(folder: Path) -> Path:
    """The other 1,297, as a device has them: a folder of pictures without labels."""
    if not folder.is_dir():
        beside = folder.with_name(f".{folder.name}.new")
        beside.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(_pen_digits(slice(PEN_TEST_PICTURES, None))[0]):
            picture.save(beside / f"{i:04}.png")
        beside.rename(folder)
    return folder


def _pen_digits(chosen: slice) -> tuple[list[Image.Image], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order_N = np.random.default_rng(0).permutation(len(bunch.target))[chosen]
    pictures = [Image.fromarray(image) for image in digit_bytes(bunch.images[order_N])]
    return pictures, bunch.target[order_N].astype(np.int64)
