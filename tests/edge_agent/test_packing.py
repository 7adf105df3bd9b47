import numpy as np
import pytest

from edge_agent.failures import BadInput
from edge_agent.packing import LEAST_QUALITY, MOST_BITS, QUALITY_STEP, Packing, is_lossy
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire

RAW, PNG, JPEG, WEBP = codec.ENCODINGS
COUNT, SIDE = 64, 32


def waves() -> np.ndarray:
    """Smooth pictures in colour, with a little noise: too much for a lossless codec, nothing for a lossy one."""
    n, c, y, x = np.meshgrid(*(np.arange(size) for size in (COUNT, 3, SIDE, SIDE)), indexing="ij")
    noise = np.random.default_rng(0).normal(0, 2, n.shape)
    return (127.5 + 50 * (np.sin(0.3 * x + n) + np.cos(0.2 * y - 0.4 * n + c)) + noise).clip(0, 255).astype(np.uint8)


def strokes() -> np.ndarray:
    """Pictures of few levels, as digits are."""
    images_NCHW = np.zeros((COUNT, 1, SIDE, SIDE), np.uint8)
    images_NCHW[:, :, 8:24, 12:16] = 200
    return images_NCHW


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIDE, SIDE), dtype=np.uint8)


def fitting_bytes() -> float:
    return MOST_BITS / 8 * COUNT * SIDE**2


def test_auto_is_lossless_where_that_is_small() -> None:
    packed = Packing("auto", 95, codec.ENCODINGS).pack(strokes())
    assert packed.encoding == PNG and len(packed.payload) < fitting_bytes()
    assert np.array_equal(codec.decode_images(packed), strokes())


def test_auto_takes_the_best_quality_that_fits() -> None:
    packed = Packing("auto", 95, codec.ENCODINGS).pack(waves())
    assert packed.encoding == JPEG and len(packed.payload) <= fitting_bytes()
    qualities = range(95, LEAST_QUALITY - 1, -QUALITY_STEP)
    sizes = [len(codec.encode_images(waves(), JPEG, quality=quality).payload) for quality in qualities]
    assert len(packed.payload) == max(size for size in sizes if size <= fitting_bytes())


def test_auto_goes_below_its_least_quality_for_no_picture_at_all() -> None:
    packed = Packing("auto", 95, codec.ENCODINGS).pack(noise())
    assert packed == codec.encode_images(noise(), JPEG, quality=LEAST_QUALITY)
    asked = Packing("auto", 50, codec.ENCODINGS).pack(noise())
    assert asked == codec.encode_images(noise(), JPEG, quality=50), "but for one that was asked for"


@pytest.mark.parametrize(("name", "encoding"), [("raw", RAW), ("png", PNG), ("jpeg", JPEG), ("webp", WEBP)])
def test_a_named_encoding_is_taken_whatever_its_size(name: str, encoding: int) -> None:
    assert Packing(name, 95, codec.ENCODINGS).pack(waves()).encoding == encoding


@pytest.mark.parametrize("name", ["auto", "png", "jpeg", "webp"])
def test_nothing_travels_larger_than_it_is(name: str) -> None:
    few_NCHW = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4), dtype=np.uint8)
    assert Packing(name, 100, codec.ENCODINGS).pack(few_NCHW) == codec.encode_images(few_NCHW)


def test_a_teacher_that_takes_raw_alone_gets_raw() -> None:
    assert Packing("auto", 95, (RAW,)).pack(waves()) == codec.encode_images(waves())
    assert Packing("auto", 95, (RAW, PNG)).pack(waves()).encoding == PNG
    with pytest.raises(BadInput, match=r"takes \(raw, png\) or auto, got 'webp'"):
        Packing("webp", 95, (RAW, PNG))


@pytest.mark.parametrize("name", ["auto", "jpeg", "webp", "png"])
def test_lossless_only_is_lossless(name: str) -> None:
    packing = Packing(name, 95, codec.ENCODINGS)
    packing.lossless_only = True
    packed = packing.pack(waves())
    assert packed.encoding == PNG and np.array_equal(codec.decode_images(packed), waves())


def test_lossy_are_jpeg_and_webp() -> None:
    assert [is_lossy(wire.ImageBatch(encoding=each)) for each in codec.ENCODINGS] == [False, False, True, True]
