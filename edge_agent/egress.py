"""The door for pictures and the gate before it: nothing leaves the device but through here.

The gate drops synthetic pictures that come too near to one that trained their generator, and stops a run whose
generator makes many of those. The door hashes every outgoing picture against all local ones at the size that is sent.
A match is a private picture about to leave: it stops the run. What was sent after all is counted from the journal by
the same hashes. Where pictures travel compressed, they are compared as they were made, since a lossy codec would hide
a copy, and as they arrive.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from edge_agent import privacy
from edge_agent.failures import Failure
from protos import codec
from protos.mekd.v1.teacher_inference_pb2 import Batch

UInt8Array = npt.NDArray[np.uint8]

MOST_DROPPED = 0.01
"""Share of synthetic pictures that may come too near; chance alone makes it 0.001."""


class PrivatePictureStopped(Failure):
    """A local picture was about to leave the device."""

    exit_code = 2


class CopiesStopped(Failure):
    """The generator makes copies of the pictures that it was trained on."""

    exit_code = 2


class CopyGate:
    """Lets a synthetic picture pass unless it comes nearer to a training picture than strangers do.

    Args:
        training_NCHW: what the generator was trained on, uint8, at the generator's size.
        threshold: the distance below which a picture is dropped (``privacy.threshold``), in grey levels.
        seen: pictures looked at by earlier processes of this run.
        dropped: and dropped by them.
    """

    def __init__(self, training_NCHW: Tensor, threshold: float, *, seen: int = 0, dropped: int = 0) -> None:
        self._training_NCHW = training_NCHW
        self.threshold = threshold
        self.seen = seen
        self.dropped = dropped

    def passing(self, images_NCHW: Tensor) -> Tensor:
        """Which synthetic pictures (uint8, at the generator's size) may be sent: (N,) bool. Counts the others."""
        passing_N = privacy.nearest(images_NCHW, [self._training_NCHW])[:, 0] >= self.threshold
        self.seen += len(images_NCHW)
        self.dropped += int((~passing_N).sum())
        return passing_N

    def check(self) -> None:
        """Raises CopiesStopped once more than MOST_DROPPED of all pictures seen were dropped."""
        if self.dropped > MOST_DROPPED * self.seen:
            raise CopiesStopped(
                f"{self.dropped} of {self.seen} synthetic pictures are within {self.threshold:.1f} grey levels of a "
                f"picture that trained the generator, expected {MOST_DROPPED:.0%} at most: of pictures that it never "
                "saw, 0.1 % are. None of those was sent. The generator has copied, or blurs so much that its "
                "pictures are near to all: train it on more pictures or with other [deprivatize] settings, in a new "
                "--run-dir"
            )


class EgressDoor:
    """Knows the local pictures by hash alone.

    Args:
        local_images: local pictures (C, H, W), uint8, at the size that is sent; `learn` adds others.
    """

    def __init__(self, local_images: Iterable[UInt8Array]) -> None:
        self._local = {_digest(image_CHW) for image_CHW in local_images}

    def learn(self, image_CHW: UInt8Array) -> None:
        """Makes one more local picture known."""
        self._local.add(_digest(image_CHW))

    def matches(self, batch: Batch) -> int:
        """How many pictures of a message are local ones, pixel for pixel."""
        return self._matches(codec.decode_images(batch.images))

    def check(self, batch: Batch) -> None:
        """Raises PrivatePictureStopped before a local picture can leave."""
        self.check_pictures(codec.decode_images(batch.images))

    def check_pictures(self, images_NCHW: UInt8Array) -> None:
        """The same of pictures (N, C, H, W) that are about to become a message."""
        if found := self._matches(images_NCHW):
            raise PrivatePictureStopped(
                f"{found} of {len(images_NCHW)} outgoing pictures are local pictures, pixel for pixel; "
                "nothing of this batch was sent. The generator has copied: train it on more pictures, or for fewer "
                "steps, in a new --run-dir"
            )

    def _matches(self, images_NCHW: UInt8Array) -> int:
        return sum(_digest(image_CHW) in self._local for image_CHW in images_NCHW)


def _digest(image_CHW: UInt8Array) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image_CHW).data).digest()
