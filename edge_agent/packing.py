"""How the pictures of a run become bytes: as small as the teacher takes them, and no smaller than is good for them.

Shape letters: N pictures, C channels, H height, W width.

Lossless is the reference. Where it is too large, the pictures go as JPEG, of the best quality that fits: with whole
chroma and tiles of whole blocks no picture depends on its neighbours, as it would in WebP, which filters across tiles
and halves the chroma. Teacher and student look at what is decoded, so nothing is lost between them; what a codec
changes is which pictures are asked about. Measured by benchmarks/encodings.py.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_agent.failures import BadInput
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire

UInt8Array = npt.NDArray[np.uint8]

MOST_BITS = 4.25
"""A pixel of every channel together, in `auto`: 544 bytes a picture of 32 x 32, so that with answers and envelopes
50,000 of them stay below 30 MB."""
LEAST_QUALITY = 75  # of JPEG in `auto`; what is still too large at that travels as it is
QUALITY_STEP = 2

_BY_NAME = {
    "raw": wire.IMAGE_ENCODING_RAW_UINT8,
    "png": wire.IMAGE_ENCODING_PNG_MOSAIC,
    "jpeg": wire.IMAGE_ENCODING_JPEG_MOSAIC,
    "webp": wire.IMAGE_ENCODING_WEBP_MOSAIC,
}


class Packing:
    """The encoding of one run.

    Args:
        name: raw, png, jpeg, webp or auto (``config.RunConfig.image_encoding``).
        quality: of jpeg and webp; of auto the most.
        offered: encodings that the teacher takes.

    Raises BadInput where the teacher does not take the named one.
    """

    def __init__(
        self, name: str = "raw", quality: int = 95, offered: Sequence[int] = (wire.IMAGE_ENCODING_RAW_UINT8,)
    ) -> None:
        if name != "auto" and _BY_NAME[name] not in offered:
            taken = [known for known, encoding in _BY_NAME.items() if encoding in offered]
            raise BadInput(
                f"image_encoding: expected one that the teacher takes ({', '.join(taken)}) or auto, got {name!r}"
            )
        self._name = name
        self._quality = quality
        self._offered = offered
        self.lossless_only = False
        """Set when the teacher was found to decode otherwise than this agent."""

    def pack(self, images_NCHW: UInt8Array) -> wire.ImageBatch:
        """uint8 pictures (N, C, H, W) as a message: as small as this run's encoding allows, never larger than raw."""
        raw = codec.encode_images(images_NCHW)
        count, _, height, width = images_NCHW.shape
        fitting_bytes = MOST_BITS / 8 * count * height * width
        best = raw
        for encoding, quality in self._attempts():
            try:
                packed = codec.encode_images(images_NCHW, encoding, quality=quality)
            except ValueError:  # too many or too large for a mosaic, or neither grey nor RGB
                continue
            if len(packed.payload) < len(best.payload):
                best = packed
            if len(packed.payload) <= fitting_bytes:
                break
        return best

    def _attempts(self) -> Sequence[tuple[int, int]]:
        """Encodings and qualities in the order in which they are tried."""
        if self._name == "raw":
            return []
        png, jpeg = _BY_NAME["png"], _BY_NAME["jpeg"]
        lossless = [(png, 100)] if png in self._offered else []
        if self.lossless_only:
            return lossless
        if self._name != "auto":
            return [(_BY_NAME[self._name], self._quality)]
        steps = range(self._quality, min(LEAST_QUALITY, self._quality) - 1, -QUALITY_STEP)
        return lossless + [(jpeg, quality) for quality in steps if jpeg in self._offered]


def is_lossy(images: wire.ImageBatch) -> bool:
    """Whether decoders may differ about its pixels."""
    return images.encoding not in codec.LOSSLESS
