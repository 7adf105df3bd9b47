"""What every way of adapting is: pictures in, probabilities out, and a state that it keeps between batches.

Shape letters: N pictures of a batch, C channels, H and W height and width, K classes.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What a method makes of a batch."""

    probabilities_NK: Tensor
    """One row a picture, float32, on the CPU; each sums to 1."""
    shift: float = 0.0
    """How far the stream is from what the student was trained on, as the method sees it; 0: not at all."""


class Method(Protocol):
    """One stream's state. A method owns its copy of the student: what it was made from stays as it was."""

    def adapt(self, images_NCHW: Tensor) -> Adapted:
        """Return what the pictures (uint8, N at least 1) show, and learn from them. Takes a stream batch by batch."""
        ...

    def reset(self) -> None:
        """Forget the stream: the next batch is the first."""
        ...
