from unittest.mock import Mock

import numpy as np
import pytest

from teacher_service.engine import ArrayEngine, Engine, EngineError, IdentityEngine, is_quick


def pictures(count: int, channels: int = 1, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, channels, height, width), dtype=np.uint8)


@pytest.mark.parametrize(
    ("class_count", "channels", "height", "width"), [(10, 1, 8, 8), (3, 3, 32, 16), (2, 1, 1, 1)]
)
def test_array_engine_answers_with_probabilities(class_count: int, channels: int, height: int, width: int) -> None:
    engine: Engine = ArrayEngine(class_count=class_count, channels=channels, height=height, width=width)
    answers = engine.answer(pictures(50, channels, height, width))
    assert answers.shape == (50, class_count) and answers.dtype == np.float32
    assert len(engine.labels) == class_count
    assert answers.min() >= 0
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)


def test_array_engine_names_every_class_for_some_picture_and_is_neither_flat_nor_certain() -> None:
    answers = ArrayEngine().answer(pictures(2_000))
    assert set(answers.argmax(axis=1)) == set(range(10))
    assert 0.15 < answers.max(axis=1).mean() < 0.9


def test_array_engine_answers_a_picture_alike_alone_and_in_any_batch_and_process() -> None:
    images = pictures(40)
    engine = ArrayEngine()
    together = engine.answer(images)
    assert np.array_equal(together, np.concatenate([engine.answer(images[i : i + 1]) for i in range(40)]))
    assert np.array_equal(together, ArrayEngine().answer(images.copy()))


def test_array_engine_takes_the_read_only_arrays_of_the_wire() -> None:
    images = pictures(2)
    images.setflags(write=False)
    assert ArrayEngine().answer(images).shape == (2, 10)


def test_array_engine_digest_follows_shape_and_seed() -> None:
    digests = {ArrayEngine().model_digest, ArrayEngine(seed=1).model_digest, ArrayEngine(class_count=9).model_digest}
    assert len(digests) == 3 and ArrayEngine().model_digest in digests
    assert not np.array_equal(ArrayEngine().answer(pictures(2)), ArrayEngine(seed=1).answer(pictures(2)))


def test_identity_engine_answers_with_the_first_pixels_as_probabilities() -> None:
    engine: Engine = IdentityEngine(class_count=3, channels=1, height=2, width=2)
    answers = engine.answer(np.array([[1, 2, 0, 9], [0, 0, 9, 9]], np.uint8).reshape(2, 1, 2, 2))
    np.testing.assert_allclose(answers, [[2 / 6, 3 / 6, 1 / 6], [1 / 12, 1 / 12, 10 / 12]], rtol=1e-6)
    assert len({engine.model_digest, IdentityEngine().model_digest, ArrayEngine().model_digest}) == 3
    with pytest.raises(ValueError, match="expected at least 5 pixels"):
        IdentityEngine(class_count=5, channels=1, height=2, width=2)


def test_only_an_engine_that_answers_a_full_batch_quickly_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    seconds = {1: 0.0, 512: 0.0}
    now = 0.0

    class Timed(IdentityEngine):
        def answer(self, images_NCHW: np.ndarray) -> np.ndarray:
            nonlocal now
            sizes.append(len(images_NCHW))
            now += seconds[len(images_NCHW)]
            return super().answer(images_NCHW)

    monkeypatch.setattr("time.perf_counter", lambda: now)
    engine = Timed()
    assert is_quick(engine, 512) and sizes == [1, 512]
    seconds[512] = 0.001
    assert not is_quick(engine, 512)
    sizes.clear()
    seconds[1] = 1.0
    assert not is_quick(engine, 512) and sizes == [1]  # a real model is asked for one picture, once
    seconds[1] = 0.0
    engine.calls_at_once = 2
    assert not is_quick(engine, 1)


def test_an_engine_that_fails_when_it_is_timed_is_not_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = IdentityEngine()
    monkeypatch.setattr(engine, "answer", Mock(side_effect=EngineError("not these pictures")))
    assert not is_quick(engine, 4)
