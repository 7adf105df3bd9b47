"""Mosaics: what is drawn comes back, and nothing but a plain picture of the right size reaches a decoder."""

import io
import re
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from protos import codec, mosaic
from protos.errors import Reason, Refusal
from protos.mekd.v1.teacher_inference_pb2 import (
    IMAGE_ENCODING_JPEG_MOSAIC as JPEG,
)
from protos.mekd.v1.teacher_inference_pb2 import (
    IMAGE_ENCODING_PNG_MOSAIC as PNG,
)
from protos.mekd.v1.teacher_inference_pb2 import (
    IMAGE_ENCODING_WEBP_MOSAIC as WEBP,
)
from protos.mekd.v1.teacher_inference_pb2 import (
    ImageBatch,
)

EACH = pytest.mark.parametrize("encoding", mosaic.ENCODINGS, ids=["png", "jpeg", "webp"])
COUNT, SIDE = 10, 16
SIZES = {"picture_count": COUNT, "channels": 3, "height": SIDE, "width": SIDE}
WHOLE = mosaic.Layout.of(PNG, COUNT, SIDE, SIDE)


def smooth(count: int = COUNT, channels: int = 3, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Pictures that a codec can do something with, each another: waves of all directions and colours."""
    n, c, y, x = np.meshgrid(*(np.arange(size) for size in (count, channels, height, width)), indexing="ij")
    waves = np.sin(0.3 * x + 0.2 * n) + np.cos(0.25 * y - 0.4 * n + c)
    return (127.5 + 60 * waves).astype(np.uint8)


def check(batch: ImageBatch) -> None:
    codec.check_images(batch, channels=3, height=SIDE, width=SIDE, max_batch_pictures=16)


def drawn(mode: str = "RGB", size: tuple[int, int] = (WHOLE.width, WHOLE.height)) -> Image.Image:
    return Image.new(mode, size, 0)


def saved(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def refusal_of(payload: bytes, encoding: int) -> Refusal:
    batch = ImageBatch(encoding=encoding, payload=payload, **SIZES)
    with pytest.raises(Refusal) as refused:
        check(batch)
        codec.decode_images(batch)
    assert refused.value.reason is Reason.INVALID_IMAGES
    assert refused.value.variables["field"] == "batch.images.payload"
    return refused.value


# --- what is drawn comes back ---


@EACH
@given(
    count=st.integers(1, 20), channels=st.sampled_from((1, 3)), height=st.integers(1, 33), width=st.integers(1, 33)
)
@settings(max_examples=40, deadline=None)
def test_pictures_come_back_each_in_its_place(
    encoding: int, count: int, channels: int, height: int, width: int
) -> None:
    images_NCHW = smooth(count, channels, height, width)
    batch = ImageBatch.FromString(codec.encode_images(images_NCHW, encoding, quality=95).SerializeToString())
    assert codec.fits_its_header(batch)
    decoded_NCHW = codec.decode_images(batch)
    assert (decoded_NCHW.shape, decoded_NCHW.dtype) == (images_NCHW.shape, np.uint8)
    assert not decoded_NCHW.flags.writeable and decoded_NCHW.flags.c_contiguous
    if encoding == PNG:
        assert np.array_equal(decoded_NCHW, images_NCHW)
    else:  # the chroma of WebP is halved, and in pictures of a few pixels nothing is left of it
        off_N = np.abs(decoded_NCHW.astype(int) - images_NCHW).reshape(count, -1).mean(axis=1)
        assert off_N.max() < (4 if encoding == JPEG else 40)


@EACH
def test_noise_of_the_whole_range_is_encoded_too(encoding: int) -> None:
    noise_NCHW = np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIDE, SIDE), dtype=np.uint8)
    batch = codec.encode_images(noise_NCHW, encoding, quality=100)
    assert codec.decode_images(batch).shape == noise_NCHW.shape


def test_a_picture_in_a_jpeg_depends_on_no_neighbour() -> None:
    images_NCHW, others_NCHW = smooth(), smooth()
    others_NCHW[[*range(3), *range(4, COUNT)]] ^= 0xA5
    one, two = (
        codec.decode_images(codec.encode_images(each, JPEG, quality=90)) for each in (images_NCHW, others_NCHW)
    )
    assert np.array_equal(one[3], two[3]) and not np.array_equal(one[2], two[2])


@EACH
def test_the_same_pictures_are_the_same_bytes(encoding: int) -> None:
    assert codec.encode_images(smooth(), encoding) == codec.encode_images(smooth(), encoding)


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (0, 3, 8, 8), (200, 1, 2000, 2000), (1, 1, 20_000, 8)])
@EACH
def test_what_no_mosaic_holds_is_a_value_error(encoding: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"channels|too much"):
        codec.encode_images(np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), shape, (0,) * 4), encoding)


def test_layout_is_pinned() -> None:
    # Both sides must agree about it for as long as journals keep requests.
    assert mosaic.Layout.of(PNG, 128, 28, 30) == mosaic.Layout(12, 11, 28, 30)
    assert mosaic.Layout.of(JPEG, 1, 28, 30) == mosaic.Layout(1, 1, 32, 32)
    assert mosaic.Layout.of(WEBP, 5, 33, 16) == mosaic.Layout(3, 2, 48, 16)


# --- what is let through to a decoder ---

FORMATS = {PNG: "PNG", JPEG: "JPEG", WEBP: "WEBP"}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *how: int, data: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG that says whatever is wanted, with correct sums."""
    header = struct.pack(">IIBBBBB", width, height, *(how or (8, 2, 0, 0, 0)))
    content = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def sized(payload: bytes, encoding: int, width: int, height: int) -> bytes:
    """The same file with another size in its header."""
    if encoding == PNG:
        return png_of(width, height)
    if encoding == JPEG:
        at = payload.index(b"\xff\xc0") + 5
        return payload[:at] + struct.pack(">HH", height, width) + payload[at + 4 :]
    return payload[:26] + struct.pack("<HH", width, height) + payload[30:]


@EACH
@pytest.mark.parametrize("other", ["PNG", "JPEG", "WEBP", "GIF", "PPM"])
def test_another_format_inside_is_refused(encoding: int, other: str) -> None:
    if other != FORMATS[encoding]:
        assert refusal_of(saved(drawn(), other)[:4000], encoding).variables["got"] == "another format"


@EACH
def test_another_size_than_the_pictures_need_is_refused_naming_both(encoding: int) -> None:
    payload = saved(drawn(size=(WHOLE.width + 1, WHOLE.height)), FORMATS[encoding])
    said = refusal_of(payload, encoding).variables
    assert said["got"] == f"one of {WHOLE.width + 1} x {WHOLE.height} pixels"
    assert f"{FORMATS[encoding]} of {WHOLE.width} x {WHOLE.height} pixels" in said["expected"]


@EACH
def test_a_header_that_promises_gigabytes_is_refused_at_once(encoding: int) -> None:
    payload = sized(saved(drawn(), FORMATS[encoding]), encoding, 16_000, 16_000)
    started = time.perf_counter()
    refusal_of(payload, encoding)
    assert time.perf_counter() - started < 0.5


@EACH
def test_every_truncation_is_refused(encoding: int) -> None:
    payload = codec.encode_images(smooth(), encoding).payload
    for length in [*range(0, min(len(payload), 700), 7), len(payload) // 2, *range(len(payload) - 40, len(payload))]:
        refusal_of(payload[:length], encoding)


@EACH
def test_bytes_after_the_end_are_refused(encoding: int) -> None:
    payload = codec.encode_images(smooth(), encoding).payload
    for more in (b"\0", payload, b"\xff\xd9"):
        refusal_of(payload + more, encoding)


@EACH
def test_a_payload_larger_than_the_pictures_is_refused_before_it_is_read(encoding: int) -> None:
    most = COUNT * 3 * SIDE * SIDE + mosaic.MARGIN_BYTES
    said = refusal_of(bytes(most + 1), encoding).variables
    assert (said["expected"], said["got"]) == (f"at most {most} bytes", f"{most + 1} bytes")


ODDITIES: dict[str, tuple[int, Callable[[], bytes]]] = {
    "png, palette": (PNG, lambda: saved(drawn("P"), "PNG")),
    "png, alpha": (PNG, lambda: saved(drawn("RGBA"), "PNG")),
    "png, grey": (PNG, lambda: saved(drawn("L"), "PNG")),
    "png, 1 bit": (PNG, lambda: saved(drawn("1"), "PNG")),
    "png, 16 bits": (PNG, lambda: saved(drawn("I;16"), "PNG")),
    "png, 16 bits RGB": (PNG, lambda: png_of(WHOLE.width, WHOLE.height, 16, 2, 0, 0, 0)),
    "png, interlaced": (PNG, lambda: png_of(WHOLE.width, WHOLE.height, 8, 2, 0, 0, 1)),
    "png, colour profile": (PNG, lambda: saved(drawn(), "PNG", icc_profile=b"x" * 50)),
    "png, exif": (PNG, lambda: saved(drawn(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")),
    "png, transparent colour": (PNG, lambda: saved(drawn(), "PNG", transparency=(0, 0, 0))),
    "png, animated": (
        PNG,
        lambda: saved(drawn(), "PNG", save_all=True, append_images=[Image.new("RGB", drawn().size, 9)]),
    ),
    "png, text that unpacks to megabytes": (
        PNG,
        lambda: png_of(WHOLE.width, WHOLE.height, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(5_000_000)))),
    ),
    "png, too few pixels": (PNG, lambda: png_of(WHOLE.width, WHOLE.height, data=bytes(100))),
    "png, thousands of chunks": (PNG, lambda: saved(drawn(), "PNG")[:-12] + chunk(b"IDAT", b"") * 600),
    "jpeg, progressive": (JPEG, lambda: saved(drawn(), "JPEG", progressive=True)),
    "jpeg, grey": (JPEG, lambda: saved(drawn("L"), "JPEG")),
    "jpeg, CMYK": (JPEG, lambda: saved(drawn("CMYK"), "JPEG")),
    "jpeg, exif": (JPEG, lambda: saved(drawn(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")),
    "jpeg, colour profile": (JPEG, lambda: saved(drawn(), "JPEG", icc_profile=b"x" * 50)),
    "jpeg, comment": (JPEG, lambda: saved(drawn(), "JPEG", comment=b"hello")),
    "jpeg, two pictures": (JPEG, lambda: saved(drawn(), "MPO", save_all=True, append_images=[drawn()])),
    "jpeg, hundreds of scans": (JPEG, lambda: many_scans(200)),
    "jpeg, two sizes": (JPEG, lambda: two_sizes()),
    "webp, alpha": (WEBP, lambda: saved(drawn("RGBA"), "WEBP")),
    "webp, lossless alpha": (WEBP, lambda: saved(drawn("RGBA"), "WEBP", lossless=True)),
    "webp, animated": (
        WEBP,
        lambda: saved(drawn(), "WEBP", save_all=True, append_images=[Image.new("RGB", drawn().size, 9)]),
    ),
    "webp, exif": (WEBP, lambda: saved(drawn(), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")),
    "webp, colour profile": (WEBP, lambda: saved(drawn(), "WEBP", icc_profile=b"x" * 50)),
}


def many_scans(count: int) -> bytes:
    """Scans of a few bytes that a decoder takes for the whole picture each: seconds of work in a kilobyte."""
    payload = saved(drawn(), "JPEG")
    at = payload.index(b"\xff\xda")
    return payload[:at] + payload[at : at + 14] * count + payload[at:]


def two_sizes() -> bytes:
    payload = saved(drawn(), "JPEG")
    at = payload.index(b"\xff\xc0")
    header = payload[at : at + 19]
    return payload[:at] + header[:5] + struct.pack(">HH", 9000, 9000) + header[9:] + payload[at:]


@pytest.mark.parametrize("what", ODDITIES)
def test_what_is_no_plain_picture_is_refused(what: str) -> None:
    encoding, payload = ODDITIES[what]
    refusal_of(payload(), encoding)


@pytest.mark.parametrize("encoding", [PNG, JPEG])
def test_a_lossless_webp_and_an_unoptimised_file_are_plain_too(encoding: int) -> None:
    layout = mosaic.Layout.of(WEBP, COUNT, SIDE, SIDE)
    image = drawn(size=(layout.width, layout.height))
    batch = ImageBatch(encoding=WEBP, payload=saved(image, "WEBP", lossless=True), **SIZES)
    check(batch)
    assert not codec.decode_images(batch).any()
    check(ImageBatch(encoding=encoding, payload=saved(drawn(), FORMATS[encoding]), **SIZES))


_VALID = {encoding: codec.encode_images(smooth(), encoding, quality=80).payload for encoding in mosaic.ENCODINGS}


@EACH
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_changed_bytes_are_refused_or_give_pictures_of_the_right_size(encoding: int, data: st.DataObject) -> None:
    payload = bytearray(_VALID[encoding])
    for _ in range(data.draw(st.integers(1, 6))):
        # Headers are few among all the bytes, and the more interesting.
        at = data.draw(st.integers(0, len(payload) - 1) | st.integers(0, min(60, len(payload) - 1)))
        how = data.draw(st.sampled_from(("set", "cut", "insert", "repeat")))
        if how == "set":
            payload[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del payload[at : at + data.draw(st.integers(1, 30))]
        elif how == "insert":
            payload[at:at] = data.draw(st.binary(min_size=1, max_size=30))
        else:
            payload[at:at] = payload[at : at + data.draw(st.integers(1, 300))]
        if not payload:
            break
    batch = ImageBatch(encoding=encoding, payload=bytes(payload), **SIZES)
    try:
        check(batch)
        assert codec.decode_images(batch).shape == (COUNT, 3, SIDE, SIDE)
    except Refusal as refusal:
        assert refusal.reason is Reason.INVALID_IMAGES


@EACH
@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_any_bytes_behind_a_right_beginning_are_refused_or_decode(encoding: int, tail: bytes) -> None:
    head = _VALID[encoding][:40]
    batch = ImageBatch(encoding=encoding, payload=head + tail, **SIZES)
    try:
        check(batch)
        assert codec.decode_images(batch).shape == (COUNT, 3, SIDE, SIDE)
    except Refusal as refusal:
        assert refusal.reason is Reason.INVALID_IMAGES


def test_a_refusal_says_nothing_of_the_pictures() -> None:
    assert re.fullmatch(r"[\w ,.()x-]+", refusal_of(b"secret" * 9, PNG).variables["got"])
