"""What is sold: as pure functions, and through a served account."""

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import policy
from teacher_service.auth import CACHE_SECONDS
from teacher_service.engine import ArrayEngine
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.terms import Terms
from tests.teacher_service.parts import Service, pictures, serving

ROWS_NK = np.array([[0.125, 0.5, 0.125, 0.25], [0.25, 0.25, 0.25, 0.25], [0.0, 0.015, 0.98, 0.005]], np.float32)


def float32s(text: str) -> np.ndarray:
    return np.array([[float(part) for part in row.split()] for row in text.split(",")], np.float32)


def of_top_k(answer: wire.Answer) -> tuple[list[list[int]], np.ndarray]:
    named = answer.top_k
    assert named.class_count == ROWS_NK.shape[1]
    shape = (-1, named.named_count)
    return np.array(named.indices).reshape(shape).tolist(), np.frombuffer(named.values, "<f4").reshape(shape)


def test_soft_answers_are_the_engines_own_bit_for_bit() -> None:
    answer = policy.apply(Terms(answers="soft"), ROWS_NK)
    assert answer == wire.Answer(probabilities=codec.encode_probabilities(ROWS_NK))
    assert not answer.HasField("decimals")


def test_hard_answers_give_nothing_else_away_whatever_else_is_said() -> None:
    answer = policy.apply(Terms(answers="hard", top_k=3, decimals=2), ROWS_NK)
    assert answer == wire.Answer(class_indices=wire.ClassIndices(class_count=4, values=[1, 0, 2]))


def test_top_k_names_the_most_probable_first_and_of_equal_ones_the_lower_index() -> None:
    answer = policy.apply(Terms(top_k=3), ROWS_NK)
    indices, values_NJ = of_top_k(answer)
    assert indices == [[1, 3, 0], [0, 1, 2], [2, 1, 3]]
    assert np.array_equal(values_NJ, float32s("0.5 0.25 0.125, 0.25 0.25 0.25, 0.98 0.015 0.005"))
    assert not answer.HasField("decimals")


@pytest.mark.parametrize("top_k", [4, 5, 2**31 - 1])
def test_top_k_of_more_classes_than_there_are_names_them_all(top_k: int) -> None:
    indices, _ = of_top_k(policy.apply(Terms(top_k=top_k), ROWS_NK))
    assert indices == [[1, 3, 0, 2], [0, 1, 2, 3], [2, 1, 3, 0]]


def test_rounded_answers_are_the_nearest_decimals_half_to_even() -> None:
    answer = policy.apply(Terms(decimals=2), ROWS_NK)
    assert answer.decimals == 2
    values_NK = codec.sold_probabilities(answer, picture_count=3, class_count=4)
    # 0.125 is a half exactly and goes to the even 0.12; the float32 of 0.015 lies below a half, that of 0.005 too.
    assert np.array_equal(values_NK, float32s("0.12 0.5 0.12 0.25, 0.25 0.25 0.25 0.25, 0 0.01 0.98 0"))


def test_top_k_and_rounding_choose_by_the_unrounded_values() -> None:
    rows_NK = np.array([[0.31, 0.34, 0.33, 0.02]], np.float32)
    answer = policy.apply(Terms(top_k=2, decimals=1), rows_NK)
    indices, values_NJ = of_top_k(answer)
    assert indices == [[1, 2]] and np.array_equal(values_NJ, float32s("0.3 0.3")) and answer.decimals == 1


@given(st.floats(0, 1, width=32), st.integers(1, codec.MOST_DECIMALS))
@example(0.5, 1)
@example(0.25, 1)
@example(2.0**-24, 7)
@example(1.0, 7)
def test_rounding_is_that_of_exact_arithmetic(value: float, decimals: int) -> None:
    found = policy.rounded(np.array([[value]], np.float32), decimals)
    assert found.dtype == np.float32
    expected = Fraction(Decimal(value).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN))
    nearest = found[0, 0]
    for neighbour in (np.nextafter(nearest, np.float32(2)), np.nextafter(nearest, np.float32(-1))):
        assert abs(Fraction(float(nearest)) - expected) <= abs(Fraction(float(neighbour)) - expected)
    assert np.array_equal(policy.rounded(found, decimals), found)  # what is rounded stays


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), st.integers(0, 3), st.integers(0, 2**32))
def test_top_k_is_the_head_of_a_stable_sort(count: int, classes: int, k: int, coarse: int, seed: int) -> None:
    values_NK = np.random.default_rng(seed).random((count, classes)).astype(np.float32)
    values_NK = np.round(values_NK, coarse)  # coarse: many are equal
    before_NK = values_NK.copy()
    indices_NJ, found_NJ = policy.most_probable(values_NK, k)
    expected_NJ = np.argsort(-values_NK, axis=1, kind="stable")[:, :k]
    assert np.array_equal(indices_NJ, expected_NJ)
    assert np.array_equal(found_NJ, np.take_along_axis(values_NK, expected_NJ, axis=1))
    assert np.array_equal(values_NK, before_NK)


# --- served ---

POLICIES: list[tuple[Terms, dict[str, Any]]] = [
    (Terms(), {"answer_kind": wire.ANSWER_KIND_PROBABILITIES}),
    (Terms(answers="soft"), {"answer_kind": wire.ANSWER_KIND_PROBABILITIES}),
    (Terms(answers="hard"), {"answer_kind": wire.ANSWER_KIND_CLASS_INDICES}),
    (Terms(answers="hard", top_k=3, decimals=2), {"answer_kind": wire.ANSWER_KIND_CLASS_INDICES}),
    (Terms(top_k=3), {"answer_kind": wire.ANSWER_KIND_TOP_K, "top_k": 3}),
    (Terms(top_k=99), {"answer_kind": wire.ANSWER_KIND_TOP_K, "top_k": 10}),
    (Terms(decimals=2), {"answer_kind": wire.ANSWER_KIND_PROBABILITIES, "decimals": 2}),
    (Terms(top_k=3, decimals=2), {"answer_kind": wire.ANSWER_KIND_TOP_K, "top_k": 3, "decimals": 2}),
]


async def described(service: Service) -> dict[str, Any]:
    found = await service.stub.Describe(wire.DescribeRequest(), metadata=service.metadata())
    said: dict[str, Any] = {"answer_kind": found.answer_kind}
    if found.top_k:
        said["top_k"] = found.top_k
    if found.HasField("decimals"):
        said["decimals"] = found.decimals
    return said


@pytest.mark.parametrize(("terms", "told"), POLICIES, ids=lambda value: getattr(value, "to_json", str)())
async def test_an_account_is_told_and_sold_what_its_terms_say_and_the_kept_answer_is_what_was_sold(
    terms: Terms, told: dict[str, Any]
) -> None:
    images = pictures(5)
    books = MemoryLedger()
    async with serving(books) as service:
        await books.set_terms("device", terms)
        service.clock.seconds += CACHE_SECONDS
        assert await described(service) == told
        stream = await service.stream()
        await stream.send("b", images)
        answer = (await stream.result()).answer
        await stream.send("b", images)
        assert (await stream.result()).answer == answer
    sold = policy.apply(terms, ArrayEngine().answer(images))
    sold.model_digest, sold.charged_count = answer.model_digest, answer.charged_count
    sold.pixel_digest = answer.pixel_digest
    assert answer == sold
    assert books._answers["device", "b"] == answer.SerializeToString(deterministic=True)
    decoded = codec.decode_answer(answer, picture_count=5, class_count=10)
    assert decoded.shape == ((5,) if terms.answers == "hard" else (5, 10))


async def test_an_account_without_terms_is_sold_what_the_server_sells() -> None:
    async with serving(answers="hard") as service:
        assert (await described(service))["answer_kind"] == wire.ANSWER_KIND_CLASS_INDICES
        await service.ledger.set_terms("device", Terms(answers="soft"))
        service.clock.seconds += CACHE_SECONDS
        assert (await described(service))["answer_kind"] == wire.ANSWER_KIND_PROBABILITIES


async def test_changed_terms_are_noticed_within_five_seconds_on_an_open_stream_and_not_by_replays() -> None:
    async with serving() as service:
        stream = await service.stream()

        async def kind(batch_id: str) -> str | None:
            await stream.send(batch_id, pictures(2))
            return (await stream.result()).answer.WhichOneof("outcome")

        assert await kind("a") == "probabilities"
        await service.ledger.set_terms("device", Terms(top_k=1))
        service.clock.seconds += CACHE_SECONDS - 0.001
        assert await kind("b") == "probabilities"
        service.clock.seconds += 0.001
        assert await kind("c") == "top_k"
        assert await kind("a") == "probabilities"  # as it was sold


def test_the_order_of_values_that_rounding_made_equal_tells_nothing() -> None:
    probabilities = np.array([[0.16, 0.15, 0.18, 0.19, 0.17, 0.15]], np.float32)
    sold = policy.apply(Terms(top_k=5, decimals=1), probabilities).top_k
    assert list(sold.indices) == sorted(sold.indices)
    falling = np.array([[0.1, 0.6, 0.3]], np.float32)
    assert list(policy.apply(Terms(top_k=3, decimals=1), falling).top_k.indices) == [1, 2, 0]
