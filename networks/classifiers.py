"""Image classifiers: CIFAR ResNets, VGG without batch norm, MobileNet v1.

Shape legend: N pictures, C channels, H rows, W columns, D features, K classes.

Each takes pictures of any side from 8 to 128 that 4 divides, already normalised, and ends in a mean over
the picture, so the side is no part of the weights. Each begins with `conv1` and ends with `linear`: the
registry reads channels and classes from those two tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Pictures in, logits out; the last layer is always the `linear` on top of `features`."""

    linear: nn.Linear

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Return what the last layer sees, `features_ND`."""
        raise NotImplementedError

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return `logits_NK` for normalised float pictures."""
        return cast(Tensor, self.linear(self.features(images_NCHW)))


class ResNet(Classifier):
    """The CIFAR ResNet of He et al. 2015, section 4.2: three stages of 16, 32 and 64 channels.

    `depth` counts convolutions on the main path and the last layer: 6 x blocks + 2. With `pad_shortcut`
    a shortcut that changes shape takes every second pixel and pads channels with zeros (the paper's
    option A, no parameters); otherwise it is a 1x1 convolution with batch norm (option B).
    """

    def __init__(self, depth: int, *, class_count: int, channels: int, pad_shortcut: bool = False) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"expected a ResNet depth of 6 x blocks + 2, got {depth}")
        block_count = (depth - 2) // 6
        self.conv1 = _conv3x3(channels, 16, stride=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, block_count, stride=1, pad_shortcut=pad_shortcut)
        self.layer2 = _stage(16, 32, block_count, stride=2, pad_shortcut=pad_shortcut)
        self.layer3 = _stage(32, 64, block_count, stride=2, pad_shortcut=pad_shortcut)
        self.linear = nn.Linear(64, class_count)
        _initialise(self)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Return the mean of the last stage over the picture, 64 features."""
        x = F.relu(self.bn1(self.conv1(images_NCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(Tensor, x.mean(dim=(2, 3)))


class VGG(Classifier):
    """VGG of Simonyan and Zisserman 2014 without batch norm, with a head of 512, 512 and K units.

    Without batch norm it is fragile: a learning rate of 0.1 (the MEKD code's) often diverges, 0.02 does not.
    """

    def __init__(self, convs_per_stage: Sequence[int], *, class_count: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width_in = 64
        for stage, (conv_count, width) in enumerate(zip(convs_per_stage, (64, 128, 256, 512, 512), strict=True)):
            for conv in range(conv_count):
                if (stage, conv) != (0, 0):  # the very first convolution is conv1
                    layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU(inplace=True)]
                width_in = width
            # Rounding up keeps one pixel one pixel: five halvings of a side of 8 would leave nothing.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1)
        self.layers = nn.Sequential(*layers)
        self.hidden = nn.Sequential(
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(),
        )
        self.linear = nn.Linear(512, class_count)
        _initialise(self)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Return the second hidden layer of the head, 512 features."""
        x = self.layers(F.relu(self.conv1(images_NCHW)))
        return cast(Tensor, self.hidden(x.mean(dim=(2, 3))))


class MobileNet(Classifier):
    """MobileNet v1 of Howard et al. 2017 at width 1; a stem of stride 1, as is usual for small pictures."""

    def __init__(self, *, class_count: int, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, 32, stride=1)
        self.bn1 = nn.BatchNorm2d(32)
        blocks: list[nn.Module] = []
        width_in = 32
        for width, stride in (
            (64, 1),
            (128, 2),
            (128, 1),
            (256, 2),
            (256, 1),
            (512, 2),
            *[(512, 1)] * 5,
            (1024, 2),
            (1024, 1),
        ):
            blocks.append(_Separable(width_in, width, stride=stride))
            width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(1024, class_count)
        _initialise(self)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Return the mean of the last block over the picture, 1024 features."""
        x = self.blocks(F.relu(self.bn1(self.conv1(images_NCHW))))
        return cast(Tensor, x.mean(dim=(2, 3)))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut. Its names are those of the public CIFAR weights."""

    def __init__(self, width_in: int, width: int, *, stride: int, pad_shortcut: bool) -> None:
        super().__init__()
        self.conv1 = _conv3x3(width_in, width, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if width != width_in and pad_shortcut:
            self.shortcut = _SubsampleAndPad(stride=stride, extra_channels=width - width_in)
        elif width != width_in:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x_NCHW)))))
        return F.relu(y + self.shortcut(x_NCHW))


class _SubsampleAndPad(nn.Module):
    """A shortcut without parameters; half of the zero channels go before, half after (the public weights)."""

    def __init__(self, *, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = extra_channels // 2
        self.after = extra_channels - self.before

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.pad(x_NCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _stage(width_in: int, width: int, block_count: int, *, stride: int, pad_shortcut: bool) -> nn.Sequential:
    first = _BasicBlock(width_in, width, stride=stride, pad_shortcut=pad_shortcut)
    rest = [_BasicBlock(width, width, stride=1, pad_shortcut=pad_shortcut) for _ in range(block_count - 1)]
    return nn.Sequential(first, *rest)


class _Separable(nn.Sequential):
    """A convolution split in two: 3x3 within each channel, then 1x1 across channels.

    With a stride, the first computes in float32 on a CPU even where the rest has less precision: oneDNN's gradients
    of it in bfloat16 took two thirds of MobileNet's step, 0.33 s on one core for 32 pictures of 32 x 32, and 0.13 s
    this way. Its layers are torch's own, all of them: a server folds each batch norm into the convolution before.
    """

    def __init__(self, width_in: int, width: int, *, stride: int) -> None:
        super().__init__(
            nn.Conv2d(width_in, width_in, 3, stride=stride, padding=1, groups=width_in, bias=False),
            nn.BatchNorm2d(width_in),
            nn.ReLU(inplace=True),
            nn.Conv2d(width_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.stride = stride

    def forward(self, x_NCHW: Tensor) -> Tensor:
        depthwise, *others = self
        if self.stride > 1 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                x_NCHW = depthwise(x_NCHW.float())
        else:
            x_NCHW = depthwise(x_NCHW)
        for layer in others:
            x_NCHW = layer(x_NCHW)
        return x_NCHW


def _conv3x3(width_in: int, width: int, *, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)


def _initialise(module: nn.Module) -> None:
    """Keep the variance through rectifiers (He et al. 2015): without it VGG's many layers start mute."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
