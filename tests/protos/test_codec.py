import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1.teacher_inference_pb2 import Answer, ImageBatch

SIZE = {"channels": 3, "height": 4, "width": 5}


@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.tuples(*[st.integers(1, 5)] * 4))
    return np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 256, shape, dtype=np.uint8)


def some_batch() -> ImageBatch:
    return codec.encode_images(np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5))


@given(pictures())
def test_pictures_survive_the_wire(images: np.ndarray) -> None:
    _, channels, height, width = images.shape
    batch = ImageBatch.FromString(codec.encode_images(images).SerializeToString())
    codec.check_images(batch, channels=channels, height=height, width=width, max_batch_pictures=5)
    decoded = codec.decode_images(batch)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, images)


def test_payload_is_row_major_whatever_the_memory_layout() -> None:
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    transposed = np.ascontiguousarray(images.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    assert not transposed.flags.c_contiguous
    assert codec.encode_images(transposed).payload == bytes(range(120))
    assert codec.pixel_digest(transposed) == hashlib.sha256(bytes(range(120))).digest()


def test_decoded_pictures_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        codec.decode_images(some_batch())[0, 0, 0, 0] = 1


@pytest.mark.parametrize("images", [np.zeros((1, 3, 4, 5), np.float32), np.zeros((3, 4, 5), np.uint8)])
def test_other_arrays_are_no_pictures(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(N, C, H, W\), got"):
        codec.encode_images(images)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("encoding", 0, "IMAGE_ENCODING_RAW_UINT8"),
        ("encoding", 77, "IMAGE_ENCODING_RAW_UINT8"),
        ("picture_count", 0, "1 to 8"),
        ("picture_count", -1, "1 to 8"),
        ("picture_count", 9, "1 to 8"),
        ("picture_count", 2**31 - 1, "1 to 8"),
        ("channels", 1, "3"),
        ("height", 5, "4"),
        ("width", -5, "5"),
        ("payload", b"", "120 bytes"),
        ("payload", bytes(119), "120 bytes"),
        ("payload", bytes(121), "120 bytes"),
    ],
)
def test_malformed_header_is_refused_naming_the_field(field: str, value: object, expected: str) -> None:
    batch = some_batch()
    setattr(batch, field, value)
    with pytest.raises(Refusal) as refused:
        codec.check_images(batch, **SIZE, max_batch_pictures=8)
    assert refused.value.reason is Reason.INVALID_IMAGES
    got = f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
    assert refused.value.variables == {"field": f"batch.images.{field}", "expected": expected, "got": got}


@given(st.integers(), st.integers(-(2**31), 2**31 - 1), st.binary(max_size=200))
def test_a_header_is_either_refused_or_decodes(seed: int, value: int, payload: bytes) -> None:
    batch = some_batch()
    field = ("encoding", "picture_count", "channels", "height", "width")[seed % 5]
    setattr(batch, field, value)
    if seed % 2:
        batch.payload = payload
    try:
        codec.check_images(batch, **SIZE, max_batch_pictures=8)
    except Refusal as refusal:
        assert refusal.reason is Reason.INVALID_IMAGES
    else:
        assert codec.decode_images(batch).shape == (batch.picture_count, 3, 4, 5)


def test_a_full_message_is_accepted() -> None:
    batch = codec.encode_images(np.zeros((8, 3, 4, 5), np.uint8))
    codec.check_images(batch, **SIZE, max_batch_pictures=8)


@pytest.mark.parametrize("field", ["encoding", "picture_count", "channels", "height", "width"])
def test_request_digest_covers_the_header(field: str) -> None:
    batch, changed = some_batch(), some_batch()
    assert codec.request_digest(batch) == codec.request_digest(changed)
    setattr(changed, field, getattr(batch, field) + 1)
    assert codec.request_digest(batch) != codec.request_digest(changed)


def test_request_digest_covers_every_byte_of_the_payload() -> None:
    digests = {codec.request_digest(some_batch())}
    for index in range(120):
        batch = some_batch()
        payload = bytearray(batch.payload)
        payload[index] ^= 1
        batch.payload = bytes(payload)
        digests.add(codec.request_digest(batch))
    assert len(digests) == 121


def test_request_digest_keeps_header_and_payload_apart() -> None:
    one = ImageBatch(encoding=1, picture_count=1, channels=1, height=1, width=1, payload=b"2;rest")
    other = ImageBatch(encoding=1, picture_count=1, channels=1, height=1, width=12, payload=b"rest")
    assert codec.request_digest(one) != codec.request_digest(other)


def test_request_digest_is_pinned() -> None:
    # Books written by an older server must know their batches again.
    expected = hashlib.sha256(b"1,2,3,4,5;" + bytes(range(120))).digest()
    assert codec.request_digest(some_batch()) == expected


# --- answers ---


def soft(rows: list[list[float]]) -> Answer:
    return Answer(probabilities=codec.encode_probabilities(np.array(rows, np.float32)))


def hard(indices: list[int], class_count: int = 3) -> Answer:
    return Answer(class_indices=codec.encode_class_indices(np.array(indices, np.int64), class_count))


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**32))
def test_probabilities_survive_the_wire_bit_for_bit(count: int, classes: int, seed: int) -> None:
    values_NK = np.random.default_rng(seed).random((count, classes)) + 1e-3
    values_NK = (values_NK / values_NK.sum(axis=1, keepdims=True)).astype(np.float32)
    answer = Answer.FromString(Answer(probabilities=codec.encode_probabilities(values_NK)).SerializeToString())
    decoded = codec.decode_answer(answer, picture_count=count, class_count=classes)
    assert decoded.dtype == np.float32 and decoded.tobytes() == values_NK.tobytes()


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8))
def test_class_indices_survive_the_wire(indices: list[int]) -> None:
    answer = Answer.FromString(hard(indices, 100).SerializeToString())
    decoded = codec.decode_answer(answer, picture_count=len(indices), class_count=100)
    assert decoded.dtype == np.int64 and decoded.tolist() == indices


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (soft([[0.5, 0.25, 0.25]]), "expected 2 x 3 probabilities, got 3 values for 3 classes"),
        (soft([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]), "expected 2 x 3 probabilities, got 6 values for 2 classes"),
        (soft([[0.5, 0.25, 0.25], [np.nan, 0.5, 0.5]]), "expected finite probabilities"),
        (soft([[0.5, 0.25, 0.25], [np.inf, 0, 0]]), "expected finite probabilities"),
        (soft([[0.5, 0.25, 0.25], [1.5, -0.25, -0.25]]), "at least 0"),
        (soft([[0.5, 0.25, 0.25], [0.5, 0.25, 0.27]]), "sum to 1"),
        (soft([[0.5, 0.25, 0.25], [0, 0, 0]]), "sum to 1"),
        (hard([1]), "expected 2 indices of 3 classes, got 1 of 3"),
        (hard([1, 2, 0]), "expected 2 indices of 3 classes, got 3 of 3"),
        (hard([1, 2], 4), "expected 2 indices of 3 classes, got 2 of 4"),
        (hard([1, 3]), "expected class indices from 0 to 2"),
        (hard([-1, 1]), "expected class indices from 0 to 2"),
        (Answer(), "expected probabilities or class indices, got an unknown kind"),
    ],
)
def test_an_answer_that_is_none_is_told_apart(answer: Answer, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        codec.decode_answer(answer, picture_count=2, class_count=3)


def test_probabilities_cut_in_the_middle_of_a_number_are_no_answer() -> None:
    answer = soft([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    answer.probabilities.values = answer.probabilities.values[:-1]
    with pytest.raises(ValueError):
        codec.decode_answer(answer, picture_count=2, class_count=3)


def test_sums_may_be_off_by_what_half_precision_rounds_away() -> None:
    decoded = codec.decode_answer(soft([[0.5, 0.25, 0.255]]), picture_count=1, class_count=3)
    assert decoded.sum() == pytest.approx(1.005, abs=1e-6)


def test_the_contract_costs_numpy_and_not_torch() -> None:
    code = "import sys, protos.codec, protos.errors; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
