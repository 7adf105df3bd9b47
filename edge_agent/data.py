"""The device's own pictures: a folder, or the device's part of a data set. They never leave the device.

Shape legend: N pictures, C channels, H rows, W columns.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from edge_agent.splits import TRAINING_PICTURES, digits_part, training_part

LEAST_PICTURES = 64
"""Fewer teach a generator nothing."""

# What Pillow decodes by itself; for some others it starts programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

UInt8Array = npt.NDArray[np.uint8]


class DataError(Exception):
    """Local pictures that cannot be used, in one line: expected, got, what to do."""


@dataclass(frozen=True)
class LocalImages:
    """The pictures at the size the model wants, what was left out and why, and a digest of the pixels."""

    images_NCHW: UInt8Array
    skipped: tuple[tuple[str, str], ...]
    source: str
    digest: str


def load_local_images(
    source: str,
    *,
    channels: int,
    height: int,
    width: int,
    data_root: Path | None,
    limit: int | None,
    seed: int,
    also: tuple[int, int, Callable[[UInt8Array], None]] | None = None,
    leave_out: Path | None = None,
) -> LocalImages:
    """Return local pictures, `images_NCHW` uint8, in the order of the source.

    Args:
        source: "digits" (scikit-learn's), "mnist" or "cifar10" (their device part), or a folder's path.
        channels: 1 (grey) or 3 (RGB); pictures are converted.
        height: rows in pixels; the shorter side is resized and the centre kept.
        width: columns in pixels.
        data_root: where data sets lie or are downloaded to; cifar10 may be JPEGs in `cifar10/train/CLASS/`.
        limit: most pictures; a choice by `seed`, decoded only until there are enough. None: all.
        seed: of that choice.
        also: another height and width, and who is told each of these pictures (C, H, W) at that size, in any order.
        leave_out: a folder that is no part of a source it lies in.

    Raises:
        DataError: no such source, or fewer than LEAST_PICTURES usable pictures.
    """
    if channels not in (1, 3):
        raise DataError(f"expected 1 (grey) or 3 (RGB) channels, got {channels}")
    if limit is not None and limit < LEAST_PICTURES:
        raise DataError(f"local_pictures: expected 0 (all) or at least {LEAST_PICTURES}, got {limit}")
    pictures, order = _pictures(source, data_root, leave_out, None if limit is None else seed)
    usable: dict[int, UInt8Array] = {}
    skipped: dict[int, tuple[str, str]] = {}
    for i in order:
        if len(usable) == limit:
            break
        picture = pictures[i]
        try:
            image_CHW = _sized(picture, source, channels, height, width)
            also_CHW = None if also is None else _sized(picture, source, channels, *also[:2])
        except DataError as error:
            if isinstance(picture, Path) and picture.is_relative_to(source):
                picture = picture.relative_to(source)
            skipped[i] = (str(picture), str(error))
            continue
        usable[i] = image_CHW
        if also is not None and also_CHW is not None:
            also[2](also_CHW)
    if len(usable) < LEAST_PICTURES:
        raise DataError(
            f"expected at least {LEAST_PICTURES} usable pictures in {source}, "
            f"found {len(usable)} and skipped {len(skipped)}{_first(skipped)}"
        )
    images_NCHW = np.empty((len(usable), channels, height, width), np.uint8)
    for row, i in enumerate(sorted(usable)):
        images_NCHW[row] = usable.pop(i)  # all of them twice may be more than a device has
    digest = hashlib.sha256(f"{images_NCHW.shape}\n".encode())
    digest.update(images_NCHW.data)
    return LocalImages(images_NCHW, tuple(skipped[i] for i in sorted(skipped)), source, digest.hexdigest())


def _pictures(
    source: str, data_root: Path | None, leave_out: Path | None, seed: int | None
) -> tuple[Sequence[Image.Image | Path], Sequence[int]]:
    """Return all that a source may hold, and in which order it is looked at: by `seed`; None: as it is."""
    pictures: Sequence[Image.Image | Path]
    if source == "digits":
        pictures = _digits()
    elif source == "mnist":
        pictures = _mnist(_root(source, data_root))
    elif source == "cifar10":
        pictures = _cifar10(_root(source, data_root))
    elif os.path.isdir(source):  # Path.is_dir raises where it may not look
        files = list(files_below(Path(source), leave_out=leave_out))
        return files, range(len(files)) if seed is None else _by_hash(files, Path(source), seed)
    else:
        raise DataError(f"expected digits, mnist, cifar10 or a folder of pictures, got {source!r}")
    in_order = range(len(pictures))
    return pictures, in_order if seed is None else np.random.default_rng(seed).permutation(len(pictures)).tolist()


def _by_hash(files: Sequence[Path], folder: Path, seed: int) -> list[int]:
    """Return an order by `seed` in which a file's place is its own: one more, or one less, moves no other's."""

    def place(i: int) -> bytes:
        return hashlib.sha256(f"{seed}/".encode() + os.fsencode(files[i].relative_to(folder))).digest()

    return sorted(range(len(files)), key=place)


def _sized(picture: Image.Image | Path, source: str, channels: int, height: int, width: int) -> UInt8Array:
    """Return one picture of a source (C, H, W). Raises DataError with the reason for one that is not usable."""
    if isinstance(picture, Path):
        return decode(picture, channels, height, width)
    if source == "mnist" and (height, width) == (32, 32):  # 28 + 2 + 2: a border of paper, not a blur
        picture = ImageOps.expand(picture, 2)
    return pixels_CHW(picture, channels, height, width)


def _digits() -> list[Image.Image]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("digits needs scikit-learn: pip install 'mekd[demo]'") from None
    images_NHW = digit_bytes(load_digits().images)
    return [Image.fromarray(image) for i, image in enumerate(images_NHW) if digits_part(i) == "device"]


def digit_bytes(images_NHW: npt.NDArray[np.float64]) -> UInt8Array:
    """scikit-learn's digits, 0 to 16, as bytes."""
    return np.rint(images_NHW * (255 / 16)).astype(np.uint8)


def _mnist(root: Path) -> list[Image.Image]:
    from torchvision.datasets import MNIST

    root = root / "mnist" if (root / "mnist" / "MNIST").is_dir() else root
    images_NHW = _downloaded(MNIST, root).data.numpy()[training_part("mnist", "device")]
    return [Image.fromarray(image) for image in images_NHW]


def _cifar10(root: Path) -> Sequence[Image.Image | Path]:
    device_N = training_part("cifar10", "device")
    for folder in (root / "cifar10" / "train", root / "cifar10-jpeg" / "train"):
        if folder.is_dir():
            files = list(files_below(folder))  # ImageFolder's order: by class, then by name
            if len(files) != TRAINING_PICTURES["cifar10"]:
                raise DataError(f"expected {TRAINING_PICTURES['cifar10']} pictures in {folder}, got {len(files)}")
            return [files[i] for i in device_N.tolist()]
    from torchvision.datasets import CIFAR10

    root = root / "cifar10" if (root / "cifar10" / "cifar-10-batches-py").is_dir() else root
    return [Image.fromarray(image) for image in _downloaded(CIFAR10, root).data[device_N]]


def _root(source: str, data_root: Path | None) -> Path:
    if data_root is None:
        raise DataError(
            f"{source}: expected a folder where it lies or may be downloaded to, got none; give --data or MEKD_DATA"
        )
    return data_root


def _downloaded(dataset: type, root: Path) -> Any:
    try:
        return dataset(root, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{dataset.__name__} is not in {root} and cannot be downloaded: {_reason(error)}") from None


def files_below(folder: Path, *, leave_out: Path | None = None) -> Iterator[Path]:
    """Yield every file below a folder by name, hidden ones, links to folders and those in `leave_out` left out."""
    no_part = None if leave_out is None else os.path.realpath(leave_out)
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and os.path.realpath(Path(here, name)) != no_part
        )
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(here, name)


def decode(path: Path, channels: int, height: int, width: int) -> UInt8Array:
    """One file as `pixels_CHW` has it. Raises DataError with the reason for one that is no usable picture."""
    try:
        if not path.is_file():
            raise DataError("no plain file")  # a pipe would be waited for
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does no harm
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                # A large JPEG is decoded at a fraction of its size, yet twice as large as needed at least.
                image.draft(None, (2 * max(height, width),) * 2)
                return pixels_CHW(ImageOps.exif_transpose(image), channels, height, width)
    except Exception as error:  # whatever a broken file makes a decoder raise
        raise DataError(_reason(error)) from None


def pixels_CHW(image: Image.Image, channels: int, height: int, width: int) -> UInt8Array:
    """One picture as uint8 (C, H, W): opaque, of the channels asked for, shorter side resized, centre kept."""
    mode = "L" if channels == 1 else "RGB"
    fitted = ImageOps.fit(_opaque(image).convert(mode), (width, height), Image.Resampling.BILINEAR)
    return np.asarray(fitted, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)


def _opaque(image: Image.Image) -> Image.Image:
    """Return a picture of 8 bits a channel that covers what is behind it: white."""
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16
        values_HW = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(np.rint(values_HW / 257).astype(np.uint8))
    if image.mode == "F":
        raise DataError("a picture of floating-point numbers has no known white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, DataError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _first(skipped: dict[int, tuple[str, str]]) -> str:
    return f" (first: {': '.join(skipped[min(skipped)])})" if skipped else ""
