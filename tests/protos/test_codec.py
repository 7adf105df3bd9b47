import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1.teacher_inference_pb2 import Answer, ImageBatch, TopK

SIZE = {"channels": 3, "height": 4, "width": 5}
KNOWN = ", ".join(f"IMAGE_ENCODING_{name}" for name in ("RAW_UINT8", "PNG_MOSAIC", "JPEG_MOSAIC", "WEBP_MOSAIC"))


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
        ("encoding", 0, KNOWN),
        ("encoding", 77, KNOWN),
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


def digest_of(batch: ImageBatch) -> bytes:
    return codec.request_digest(batch, codec.payload_digest(batch))


def test_payload_digest_of_raw_pictures_is_their_pixel_digest() -> None:
    batch = some_batch()
    assert codec.payload_digest(batch) == codec.pixel_digest(codec.decode_images(batch))


@pytest.mark.parametrize("field", ["encoding", "picture_count", "channels", "height", "width"])
def test_request_digest_covers_the_header(field: str) -> None:
    batch, changed = some_batch(), some_batch()
    assert digest_of(batch) == digest_of(changed)
    setattr(changed, field, getattr(batch, field) + 1)
    assert digest_of(batch) != digest_of(changed)


def test_request_digest_covers_every_byte_of_the_payload() -> None:
    digests = {digest_of(some_batch())}
    for index in range(120):
        batch = some_batch()
        payload = bytearray(batch.payload)
        payload[index] ^= 1
        batch.payload = bytes(payload)
        digests.add(digest_of(batch))
    assert len(digests) == 121


def test_request_digest_keeps_header_and_payload_apart() -> None:
    one = ImageBatch(encoding=1, picture_count=1, channels=1, height=1, width=1, payload=b"2;rest")
    other = ImageBatch(encoding=1, picture_count=1, channels=1, height=1, width=12, payload=b"rest")
    assert digest_of(one) != digest_of(other)


def test_request_digest_is_pinned() -> None:
    # Books written by an older server must know their batches again.
    expected = hashlib.sha256(b"1,2,3,4,5;" + hashlib.sha256(bytes(range(120))).digest()).digest()
    assert digest_of(some_batch()) == expected


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
        (Answer(), "expected probabilities, top-k or class indices, got an unknown kind"),
    ],
)
def test_an_answer_that_is_none_is_told_apart(answer: Answer, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        codec.decode_answer(answer, picture_count=2, class_count=3)


def test_probabilities_cut_in_the_middle_of_a_number_are_no_answer() -> None:
    answer = soft([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    answer.probabilities.values = answer.probabilities.values[:-1]
    with pytest.raises(ValueError, match="expected 4 bytes for each probability, got 23 bytes"):
        codec.decode_answer(answer, picture_count=2, class_count=3)


def test_sums_may_be_off_by_what_half_precision_rounds_away() -> None:
    decoded = codec.decode_answer(soft([[0.5, 0.25, 0.255]]), picture_count=1, class_count=3)
    assert decoded.sum() == pytest.approx(1.005, abs=1e-6)


# --- answers of which a policy took something away ---


def sold(rows: list[list[float]] | np.ndarray, *, k: int | None = None, decimals: int | None = None) -> Answer:
    """What a teacher makes of its probabilities; exact enough for the few decimals of tests."""
    rows_NK = np.array(rows, np.float64)
    values_NK = rows_NK if decimals is None else np.round(rows_NK, decimals)
    if k is None:
        answer = soft(values_NK.tolist())
    else:
        indices_NJ = np.argsort(-rows_NK, axis=1, kind="stable")[:, :k]
        values_NJ = np.take_along_axis(values_NK, indices_NJ, axis=1).astype(np.float32)
        answer = Answer(top_k=codec.encode_top_k(indices_NJ, values_NJ, rows_NK.shape[1]))
    if decimals is not None:
        answer.decimals = decimals
    return answer


def named(indices: list[list[int]], values: list[list[float]], class_count: int = 4, **more: int) -> Answer:
    message = codec.encode_top_k(np.array(indices), np.array(values, np.float32), class_count)
    return Answer(top_k=message, **more)


def decoded(answer: Answer) -> list[list[float]]:
    kind = answer.WhichOneof("outcome")
    message = getattr(answer, str(kind))
    count = len(message.values) // 4 // (message.named_count if kind == "top_k" else message.class_count)
    values_NK = codec.decode_answer(answer, picture_count=count, class_count=message.class_count)
    assert values_NK.dtype == np.float32 and values_NK.shape == (count, message.class_count)
    return np.round(values_NK.astype(np.float64), 6).tolist()


def test_the_mass_that_top_k_leaves_out_is_spread_over_the_other_classes() -> None:
    assert decoded(named([[2, 0]], [[0.6, 0.3]])) == [[0.3, 0.05, 0.6, 0.05]]
    assert decoded(named([[1]], [[0.25]])) == [[0.25] * 4]  # each as probable as the one named, and no more
    assert decoded(named([[3, 2, 1, 0]], [[0.4, 0.3, 0.2, 0.1]])) == [[0.1, 0.2, 0.3, 0.4]]
    assert decoded(named([[0], [1]], [[1.0], [0.7]])) == [[1, 0, 0, 0], [0.1, 0.7, 0.1, 0.1]]


def test_what_top_k_names_stays_bit_for_bit() -> None:
    values = np.array([[1 / 3, 1 / 7]], np.float32)
    found = codec.decode_answer(named([[3, 0]], values.tolist(), 8), picture_count=1, class_count=8)
    assert found[0, [3, 0]].tobytes() == values.tobytes()


def test_rounded_probabilities_sum_to_1_again_and_none_leaves_the_interval_it_was_rounded_from() -> None:
    # Too little: 0.6 and 0.3 may have been 0.65 and 0.35, and each of the others up to 0.05.
    assert decoded(sold([[0.604, 0.304, 0.046, 0.046]], decimals=1)) == [[0.625, 0.325, 0.025, 0.025]]
    # Too much: zeros cannot have been less.
    assert decoded(sold([[0.56, 0.44 - 1e-9, 0, 0], [0.36, 0.36, 0.28, 0]], decimals=1)) == [
        [0.6, 0.4, 0, 0],
        [0.366667, 0.366667, 0.266667, 0],
    ]
    # Many classes, each too improbable to be more than 0: most of the mass is theirs.
    (row,) = decoded(sold([[0.3] + [0.7 / 999] * 999], decimals=2))
    assert row[:2] == [round(0.3 + 0.7 / 1000, 6), 0.0007]
    assert decoded(sold([[0.001] * 1000], decimals=2)) == [[0.001] * 1000]


def test_top_k_and_rounding_together() -> None:
    assert decoded(named([[0, 1]], [[0.6, 0.3]], decimals=1)) == [[0.6, 0.3, 0.05, 0.05]]
    # More is missing than two classes of at most 0.1 can hold: what is left over was rounded away from all four.
    assert decoded(named([[0, 1]], [[0.6, 0.1]], decimals=1)) == [[0.625, 0.125, 0.125, 0.125]]
    assert decoded(named([[0, 1]], [[0.6, 0.5]], decimals=1)) == [[0.55, 0.45, 0, 0]]
    assert decoded(named([[0, 1]], [[1, 0]], decimals=1)) == [[1, 0, 0, 0]]


@st.composite
def policies(draw: st.DrawFn) -> tuple[np.ndarray, int | None, int | None]:
    """Probabilities (N, K), k and decimals."""
    count, classes = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits_NK = rng.standard_normal((count, classes)) * draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    rows_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    rows_NK /= rows_NK.sum(axis=1, keepdims=True)
    k = draw(st.none() | st.integers(1, classes))
    return rows_NK, k, draw(st.none() | st.integers(1, codec.MOST_DECIMALS))


@given(policies())
def test_every_policy_of_true_probabilities_decodes_to_probabilities_that_could_have_been(
    drawn: tuple[np.ndarray, int | None, int | None],
) -> None:
    true_NK, k, decimals = drawn
    count, classes = true_NK.shape
    size = {"picture_count": count, "class_count": classes}
    answer = Answer.FromString(sold(true_NK, k=k, decimals=decimals).SerializeToString())
    found_NK = codec.decode_answer(answer, **size).astype(np.float64)
    sold_NK = codec.sold_probabilities(answer, **size).astype(np.float64)
    error = codec.rounding_error(codec.decimals_of(answer)) + 1e-6  # and what float32 rounds
    assert np.abs(found_NK.sum(axis=1) - 1).max() < 1e-5
    assert found_NK.min() >= 0
    chosen_NJ = np.argsort(-true_NK, axis=1, kind="stable")[:, : k or classes]
    is_named_NK = np.zeros_like(true_NK, dtype=bool)
    np.put_along_axis(is_named_NK, chosen_NJ, True, axis=1)
    assert np.abs(found_NK - sold_NK)[is_named_NK].max() <= error
    assert np.abs(sold_NK - true_NK)[is_named_NK].max() <= error
    assert not sold_NK[~is_named_NK].any()
    last_N1 = np.where(is_named_NK, found_NK, np.inf).min(axis=1, keepdims=True)
    assert (np.where(is_named_NK, 0, found_NK) <= last_N1 + 1e-6).all()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            named([[0, 1]], [[0.6, 0.1]]),
            "sum to 1 for each picture, within 0.01 and 2 classes left out, .*such as 0.7",
        ),
        (named([[0, 1]], [[0.6, 0.5]]), "sum to 1"),
        (named([[0, 1]], [[0.4, 0.1]], decimals=1), "2 classes left out.* and rounding to 1 decimals; .*such as 0.5"),
        (named([[0, 1]], [[0.7, 0.5]], decimals=1), "sum to 1"),
        (named([[0, 1]], [[0.6, 0.6]], decimals=2), "sum to 1"),
        (
            sold([[0.7, 0.1, 0.1, 0.05]], decimals=3),
            "within 0.01 and rounding to 3 decimals; got others, such as 0.95",
        ),
        (sold([[0.7, 0.2, 0.1, 0.03]], decimals=3), "sum to 1"),
        (sold([[0, 0, 0, 0]], decimals=2), "sum to 1"),
        (sold([[0.5, 0, 0, 0]], decimals=2), "such as 0.5"),
        (named([[0, 0]], [[0.6, 0.4]]), "each class named at most once"),
        (named([[0, 1]], [[0.4, 0.6]]), "in falling order"),
        (named([[0, 4]], [[0.6, 0.4]]), "expected class indices from 0 to 3"),
        (named([[0, -1]], [[0.6, 0.4]]), "expected class indices from 0 to 3"),
        (named([[0, 1]], [[0.6, np.nan]]), "expected finite probabilities"),
        (named([[0, 1]], [[1.2, -0.2]]), "at least 0"),
        (named([[0, 1]], [[0.6, 0.4]], decimals=0), "expected probabilities of 1 to 7 decimals, got 0"),
        (named([[0, 1]], [[0.6, 0.4]], decimals=8), "expected probabilities of 1 to 7 decimals, got 8"),
    ],
)
def test_what_neither_rounding_nor_classes_left_out_explain_is_refused(answer: Answer, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        codec.decode_answer(answer, picture_count=1, class_count=4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_count": 5}, "expected 1 to 4 of 4 classes named, got 2 of 5"),
        ({"named_count": 0}, "got 0 of 4"),
        ({"named_count": -2}, "got -2 of 4"),
        ({"named_count": 5}, "got 5 of 4"),
        ({"named_count": 1}, "expected 2 x 1 classes and probabilities, got 4 and 4"),
        ({"values": bytes(12)}, "expected 2 x 2 classes and probabilities, got 4 and 3"),
        ({"values": bytes(15)}, "expected 4 bytes for each probability, got 15 bytes"),
    ],
)
def test_top_k_of_another_size_is_refused(change: dict[str, Any], said: str) -> None:
    answer = named([[0, 1], [2, 3]], [[0.6, 0.4], [0.6, 0.4]])
    for field, value in change.items():
        setattr(answer.top_k, field, value)
    for decode in (codec.decode_answer, codec.sold_probabilities):
        with pytest.raises(ValueError, match=said):
            decode(answer, picture_count=2, class_count=4)


@given(st.binary(max_size=40), st.integers(-1, 5), st.lists(st.integers(-1, 5), max_size=6), st.integers(-1, 9))
def test_any_top_k_decodes_or_is_refused_with_a_value_error(
    values: bytes, named_count: int, indices: list[int], decimals: int
) -> None:
    answer = Answer(decimals=decimals)
    answer.top_k.MergeFrom(TopK(class_count=4, named_count=named_count, indices=indices, values=values))
    try:
        found_NK = codec.decode_answer(answer, picture_count=2, class_count=4)
    except ValueError:
        return
    assert found_NK.shape == (2, 4) and np.abs(found_NK.sum(axis=1) - 1).max() < 2e-2


def test_kinds_of_answers_have_names() -> None:
    row = [[0.5, 0.25, 0.25, 0]]
    assert codec.kind_of(sold(row)) == "soft" and codec.kind_of(hard([1])) == "hard"
    assert codec.kind_of(sold(row, decimals=1)) == "soft, 1 decimal"
    assert codec.kind_of(sold(row, k=3)) == "top-3"
    assert codec.kind_of(sold(row, k=3, decimals=2)) == "top-3, 2 decimals"
    assert codec.kind_of(Answer()) == "unknown"


def test_what_was_sold_is_seen_as_it_was_sold() -> None:
    size = {"picture_count": 1, "class_count": 4}
    assert codec.sold_probabilities(named([[2, 0]], [[0.5, 0.25]]), **size).tolist() == [[0.25, 0, 0.5, 0]]
    assert codec.sold_probabilities(sold([[0.5, 0.25, 0, 0]], decimals=2), **size).tolist() == [[0.5, 0.25, 0, 0]]
    with pytest.raises(ValueError, match="expected probabilities or top-k, got class_indices"):
        codec.sold_probabilities(hard([1], 4), **size)


def test_the_contract_costs_numpy_and_not_torch() -> None:
    code = "import sys, protos.codec, protos.errors; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
