"""The door for pictures: nothing leaves the device but through here.

It hashes every outgoing picture against all local ones at the size that is sent. A match is a private picture about
to leave: it stops the run. What was sent after all is counted from the journal by the same hashes. Where pictures
travel compressed, they are compared as they were made, since a lossy codec would hide a copy, and as they arrive.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from edge_agent.failures import Failure
from protos import codec
from protos.mekd.v1.teacher_inference_pb2 import Batch

UInt8Array = npt.NDArray[np.uint8]


class PrivatePictureStopped(Failure):
    """A local picture was about to leave the device."""

    exit_code = 2


class EgressDoor:
    """Knows the local pictures by hash alone.

    Args:
        local_images: every local picture (C, H, W), uint8, at the size that is sent.
    """

    def __init__(self, local_images: Iterable[UInt8Array]) -> None:
        self._local = {_digest(image_CHW) for image_CHW in local_images}

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
