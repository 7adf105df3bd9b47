"""The two scales of a picture: bytes 0..255, which travel and are kept, and -1..1, which networks see."""

import torch
from torch import Tensor


def normalise(images_NCHW: Tensor) -> Tensor:
    """Bytes (uint8) to the networks' scale: (x/255 - 0.5) / 0.5, as float32."""
    return images_NCHW.float().div_(127.5).sub_(1.0)


def quantise(images_NCHW: Tensor) -> Tensor:
    """The networks' scale to the nearest bytes (uint8): undoes `normalise` exactly.

    What the student trains on is what the teacher was shown, so this comes before both.
    """
    return images_NCHW.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def resize(images_NCHW: Tensor, height: int, width: int) -> Tensor:
    """Pictures (uint8) at another size, bilinear and antialiased; the very same ones where the size fits."""
    if images_NCHW.shape[2:] == (height, width):
        return images_NCHW
    sized = torch.nn.functional.interpolate(
        images_NCHW.float(), size=(height, width), mode="bilinear", antialias=True
    )
    return sized.round_().clamp_(0, 255).to(torch.uint8)
