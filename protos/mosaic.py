"""Many pictures as one, in a codec that others keep well: one header for all of them.

Shape letters: N pictures, C channels, H height, W width.

What arrives is looked at before anything is decompressed: its container is walked byte by byte, and nothing but one
plain picture of the expected size is let through to the decoder. That leaves out what decoders are attacked with
(sizes that promise gigabytes, hundreds of scans in a few bytes, compressed metadata, animations), and what would make
two decoders differ (palettes, alpha, 16 bits, colour profiles).
"""

import io
import math
import re
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from protos.mekd.v1.teacher_inference_pb2 import (
    IMAGE_ENCODING_JPEG_MOSAIC,
    IMAGE_ENCODING_PNG_MOSAIC,
    IMAGE_ENCODING_WEBP_MOSAIC,
)

UInt8Array = npt.NDArray[np.uint8]

MARGIN_BYTES = 1024  # of tables and headers, by which a payload may be larger than the raw pictures
MOST_SIDE = 16_383  # pixels; what the narrowest of the formats (WebP) holds
MOST_PIXELS = 2**26  # of one mosaic; where Pillow itself begins to suspect a bomb is a little above
_MOST_PARTS = 1024  # segments or chunks; walking them must cost nothing

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_APP0, _DQT, _SOF0, _DHT, _DRI, _SOS = 0xFFE0, 0xFFDB, 0xFFC0, 0xFFC4, 0xFFDD, 0xFFDA
# In the one scan of a baseline JPEG: escaped bytes and restart marks are its own, any other marker ends it.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)


@dataclass(frozen=True)
class _Format:
    name: str
    block: int
    """Sides of a tile are multiples of it, in pixels: tiles end where the codec's blocks do."""


_FORMATS: dict[int, _Format] = {
    IMAGE_ENCODING_PNG_MOSAIC: _Format("PNG", 1),
    IMAGE_ENCODING_JPEG_MOSAIC: _Format("JPEG", 8),
    IMAGE_ENCODING_WEBP_MOSAIC: _Format("WEBP", 16),
}
ENCODINGS = (IMAGE_ENCODING_PNG_MOSAIC, IMAGE_ENCODING_JPEG_MOSAIC, IMAGE_ENCODING_WEBP_MOSAIC)


@dataclass(frozen=True)
class Layout:
    """Where the tiles of a mosaic are; sizes in pixels."""

    columns: int
    rows: int
    tile_height: int
    tile_width: int

    @classmethod
    def of(cls, encoding: int, picture_count: int, height: int, width: int) -> "Layout":
        """As square as it goes, a function of these four alone."""
        block = _FORMATS[encoding].block
        columns = math.isqrt(picture_count - 1) + 1
        rows = -(-picture_count // columns)
        return cls(columns, rows, -(-height // block) * block, -(-width // block) * block)

    @property
    def height(self) -> int:
        """Of the whole."""
        return self.rows * self.tile_height

    @property
    def width(self) -> int:
        """Of the whole."""
        return self.columns * self.tile_width

    def is_drawable(self) -> bool:
        """Whether the formats hold a picture of this size."""
        return max(self.height, self.width) <= MOST_SIDE and self.height * self.width <= MOST_PIXELS


def encode(images_NCHW: UInt8Array, encoding: int, quality: int) -> bytes:
    """uint8 pictures (N, C, H, W), C being 1 or 3, as a mosaic; ``quality`` 1 to 100, of JPEG and WebP.

    Raises ValueError for another C, or pictures too many or too large for one mosaic.
    """
    count, channels, height, width = images_NCHW.shape
    if count < 1 or channels not in (1, 3) or min(height, width) < 1:
        raise ValueError(f"expected pictures of 1 or 3 channels, got {images_NCHW.shape}")
    layout = Layout.of(encoding, count, height, width)
    if not layout.is_drawable():
        raise ValueError(f"{count} pictures of {height} x {width} are too much for one mosaic")
    mosaic = _drawn(images_NCHW, layout)
    if encoding == IMAGE_ENCODING_PNG_MOSAIC:
        return _saved(mosaic, "PNG")
    if encoding == IMAGE_ENCODING_WEBP_MOSAIC:
        return _saved(mosaic.convert("RGB"), "WEBP", quality=quality)
    payload = _saved(mosaic, "JPEG", quality=quality, subsampling=0)
    # Tables made for this very picture save a sixth and never cost anything. For those Pillow needs the whole result
    # to fit into a buffer of a byte a pixel.
    if len(payload) < layout.height * layout.width:
        payload = _saved(mosaic, "JPEG", quality=quality, subsampling=0, optimize=True)
    return payload


def check(payload: bytes, encoding: int, *, picture_count: int, channels: int, height: int, width: int) -> None:
    """Raises ValueError (what is wrong, in words) unless it is a plain picture of exactly the size that these need.

    Decompresses nothing, and takes no longer than reading the payload once.
    """
    layout = Layout.of(encoding, picture_count, height, width)
    if channels not in (1, 3) or not layout.is_drawable():
        raise ValueError(f"a mosaic of {layout.width} x {layout.height} pixels and {channels} channels")
    try:
        if encoding == IMAGE_ENCODING_PNG_MOSAIC:
            size = _walk_png(payload, channels)
        elif encoding == IMAGE_ENCODING_JPEG_MOSAIC:
            size = _walk_jpeg(payload, channels)
        else:
            size = _walk_webp(payload)
    except struct.error:
        raise ValueError("one that ends too soon") from None
    if size != (layout.width, layout.height):
        raise ValueError(f"one of {size[0]} x {size[1]} pixels")


def decode(
    payload: bytes, encoding: int, *, picture_count: int, channels: int, height: int, width: int
) -> UInt8Array:
    """The pictures (N, C, H, W) of a checked mosaic, read-only. Raises ValueError for one that does not decode."""
    layout = Layout.of(encoding, picture_count, height, width)
    name = _FORMATS[encoding].name
    try:
        with Image.open(io.BytesIO(payload), formats=(name,)) as image:
            # Once more, by the decoder's own reading: it is what allocates.
            if image.size != (layout.width, layout.height) or getattr(image, "n_frames", 1) != 1:
                raise ValueError(f"{image.size}")
            image.load()
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except MemoryError:
        raise
    except Exception as error:  # decoders give up in many ways; all of them mean the same
        raise ValueError(f"one that does not decode ({type(error).__name__})") from None
    tiles = pixels.reshape(layout.rows, layout.tile_height, layout.columns, layout.tile_width, channels)
    tiles_NCHW = tiles.transpose(0, 2, 4, 1, 3).reshape(-1, channels, layout.tile_height, layout.tile_width)
    images_NCHW = np.ascontiguousarray(tiles_NCHW[:picture_count, :, :height, :width])
    images_NCHW.setflags(write=False)
    return images_NCHW


def expected(encoding: int, *, picture_count: int, channels: int, height: int, width: int) -> str:
    """What ``check`` lets through, in words."""
    layout = Layout.of(encoding, picture_count, height, width)
    kind = "grey" if channels == 1 and encoding != IMAGE_ENCODING_WEBP_MOSAIC else "RGB"
    return f"one plain 8-bit {kind} {_FORMATS[encoding].name} of {layout.width} x {layout.height} pixels"


def _drawn(images_NCHW: UInt8Array, layout: Layout) -> Image.Image:
    _, channels, height, width = images_NCHW.shape
    more = ((0, 0), (0, 0), (0, layout.tile_height - height), (0, layout.tile_width - width))
    tiles_NCHW = np.pad(images_NCHW, more, mode="edge")
    empty = layout.rows * layout.columns - len(tiles_NCHW)
    tiles_NCHW = np.pad(tiles_NCHW, ((0, empty), (0, 0), (0, 0), (0, 0)))  # black costs next to nothing
    tiles = tiles_NCHW.reshape(layout.rows, layout.columns, channels, layout.tile_height, layout.tile_width)
    pixels = tiles.transpose(0, 3, 1, 4, 2).reshape(layout.height, layout.width, channels)
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if channels == 1 else pixels))


def _saved(image: Image.Image, name: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def _walk_png(payload: bytes, channels: int) -> tuple[int, int]:
    """Width and height."""
    if not payload.startswith(_PNG_SIGNATURE):
        raise ValueError("another format")
    kinds: list[bytes] = []
    at = len(_PNG_SIGNATURE)
    while at < len(payload) and len(kinds) <= _MOST_PARTS:
        length, kind = struct.unpack_from(">I4s", payload, at)
        kinds.append(kind)
        at += 12 + length
    if at != len(payload):
        raise ValueError("one that ends too soon, or in too many chunks")
    if len(kinds) < 3 or kinds[0] != b"IHDR" or set(kinds[1:-1]) != {b"IDAT"} or kinds[-1] != b"IEND":
        raise ValueError("one with other chunks than IHDR, IDAT and IEND")
    width, height, *how = struct.unpack_from(">IIBBBBB", payload, 16)
    if how != [8, 0 if channels == 1 else 2, 0, 0, 0]:
        raise ValueError("one of another depth or colour type, or interlaced")
    return width, height


def _walk_jpeg(payload: bytes, channels: int) -> tuple[int, int]:
    """Width and height."""
    if not payload.startswith(b"\xff\xd8"):
        raise ValueError("another format")
    size: tuple[int, int] | None = None
    at, parts, marker = 2, 0, 0
    while marker != _SOS:
        marker, length = struct.unpack_from(">HH", payload, at)
        parts += 1
        if marker not in (_APP0, _DQT, _SOF0, _DHT, _DRI, _SOS) or length < 2 or parts > _MOST_PARTS:
            raise ValueError("one with metadata, or not baseline")
        if marker == _SOF0:
            depth, height, width, components = struct.unpack_from(">BHHB", payload, at + 4)
            if size is not None or (depth, components) != (8, channels):
                raise ValueError("one of another depth or number of channels")
            size = width, height
        if marker == _SOS and struct.unpack_from(">B", payload, at + 4) != (channels,):
            raise ValueError("one of several scans")
        at += 2 + length
    end = _END_OF_SCAN.search(payload, at)
    if end is None or payload[end.start() :] != b"\xff\xd9":
        raise ValueError("one that ends too soon, or of several scans")
    if size is None:
        raise ValueError("one without a size")
    return size


def _walk_webp(payload: bytes) -> tuple[int, int]:
    """Width and height."""
    riff, size, webp, kind, length = struct.unpack_from("<4sI4s4sI", payload)
    if (riff, webp) != (b"RIFF", b"WEBP"):
        raise ValueError("another format")
    if size != len(payload) - 8 or 20 + length + length % 2 != len(payload):
        raise ValueError("one that ends too soon, or of several chunks")
    if kind == b"VP8 ":
        tag, start, width, height = struct.unpack_from("<B2x3sHH", payload, 20)
        if tag & 1 or start != b"\x9d\x01\x2a":
            raise ValueError("one that does not begin with a key frame")
        return width & 0x3FFF, height & 0x3FFF
    if kind != b"VP8L":
        raise ValueError("one with metadata, alpha or animation")
    signature, bits = struct.unpack_from("<BI", payload, 20)
    if signature != 0x2F or bits >> 28:  # alpha, or another version
        raise ValueError("one with alpha, or of another version")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
