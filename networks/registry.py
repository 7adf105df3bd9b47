"""Classifiers by name, and the names that a bare `state_dict` fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from networks.classifiers import VGG, Classifier, MobileNet, ResNet

_DEPTHS = (8, 14, 20, 32, 44, 56, 110)

_BUILDERS: dict[str, Callable[..., Classifier]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in _DEPTHS},
    **{f"resnet{depth}_pad": partial(ResNet, depth, pad_shortcut=True) for depth in _DEPTHS},
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "mobilenet": MobileNet,
}

CLASSIFIERS: tuple[str, ...] = tuple(_BUILDERS)
"""Every architecture that can be built by name."""


def build(name: str, *, class_count: int, channels: int) -> Classifier:
    """Return a freshly initialised classifier on the current default device.

    Raises:
        ValueError: the name is unknown, fewer than two classes, or channels other than 1 (grey) or 3 (RGB).
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown architecture {name!r}; known: {', '.join(CLASSIFIERS)}")
    if class_count < 2:
        raise ValueError(f"expected at least 2 classes, got {class_count}")
    if channels not in (1, 3):
        raise ValueError(f"expected 1 (grey) or 3 (RGB) channels, got {channels}")
    return _BUILDERS[name](class_count=class_count, channels=channels)


def fitting(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose keys and shapes are exactly those of `state_dict`, in the order of CLASSIFIERS.

    Channels are read from `conv1.weight` and classes from `linear.weight`. The candidates are built on the
    meta device: no memory, no random numbers.
    """
    conv, linear = state_dict.get("conv1.weight"), state_dict.get("linear.weight")
    if conv is None or linear is None or conv.ndim != 4 or linear.ndim != 2:
        return []
    class_count, channels = linear.shape[0], conv.shape[1]
    if class_count < 2 or channels not in (1, 3):
        return []
    wanted = _shapes(state_dict)
    return [name for name in CLASSIFIERS if _shapes_of(name, class_count, channels) == wanted]


@cache
def _shapes_of(name: str, class_count: int, channels: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return _shapes(build(name, class_count=class_count, channels=channels).state_dict())


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}
