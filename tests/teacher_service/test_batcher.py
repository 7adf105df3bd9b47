import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from teacher_service.batcher import Batcher, CallerGone, QueueFull
from tests.teacher_service.parts import until


class Doubler:
    """Answers every picture with twice its value, one call at a time; waits while its gate is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[list[int]] = []
        self.fail_on: dict[int, BaseException] = {}  # by picture value
        self.shorten = 0

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        values_N = images_NCHW[:, 0, 0, 0]
        self.calls.append(values_N.tolist())
        assert self.gate.wait(10)
        for value in self.fail_on.keys() & set(values_N.tolist()):
            raise self.fail_on[value]
        return (2.0 * values_N.astype(np.float32))[: len(values_N) - self.shorten, None]


def images(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1)


@contextlib.asynccontextmanager
async def running(engine: Doubler, **limits: object) -> AsyncIterator[Batcher]:
    given = {"max_batch_pictures": 4, "max_queue_pictures": 100} | limits
    batcher = Batcher(engine, **given)  # type: ignore[arg-type]
    batcher.start()
    try:
        yield batcher
    finally:
        engine.gate.set()
        await batcher.stop()


async def blocked(engine: Doubler, batcher: Batcher) -> "asyncio.Task[np.ndarray]":
    """The engine is busy with picture 0 until its gate opens."""
    engine.gate.clear()
    first = asyncio.create_task(batcher.ask(images(0)))
    await until(lambda: engine.calls)
    return first


async def asked(batcher: Batcher, *values: int) -> "asyncio.Task[np.ndarray]":
    """A submission that stands in the queue."""
    task = asyncio.create_task(batcher.ask(images(*values)))
    await asyncio.sleep(0)
    return task


async def test_an_idle_engine_answers_at_once() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        assert (await batcher.ask(images(3, 4))).tolist() == [[6.0], [8.0]]
        assert (await batcher.ask(images(5))).tolist() == [[10.0]]
    assert engine.calls == [[3, 4], [5]]


async def test_whoever_waits_while_the_engine_is_busy_forms_the_next_batch() -> None:
    engine, sizes = Doubler(), []
    async with running(engine, on_batch=sizes.append) as batcher:
        first = await blocked(engine, batcher)
        waiting = [await asked(batcher, *values) for values in ((1,), (2, 3), (4,), (5,))]
        engine.gate.set()
        answers = await asyncio.gather(first, *waiting)
    assert engine.calls == [[0], [1, 2, 3, 4], [5]]
    assert [answer.ravel().tolist() for answer in answers] == [[0], [2], [4, 6], [8], [10]]
    assert sizes == [1, 4, 1]


async def test_a_batch_grows_beyond_the_limit_only_by_one_submission_that_is_larger_alone() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        first = await blocked(engine, batcher)
        waiting = [await asked(batcher, *values) for values in ((1, 2, 3), (4, 5), (6, 7, 8, 9, 10, 11), (12,))]
        engine.gate.set()
        await asyncio.gather(first, *waiting)
    assert engine.calls == [[0], [1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11], [12]]


async def test_the_departed_are_skipped_and_not_computed() -> None:
    engine, left = Doubler(), [False]
    async with running(engine) as batcher:
        first = await blocked(engine, batcher)
        leaver = asyncio.create_task(batcher.ask(images(1), lambda: left[0]))
        await asyncio.sleep(0)
        stayer = await asked(batcher, 2)
        left[0] = True
        engine.gate.set()
        with pytest.raises(CallerGone):
            await leaver
        assert (await stayer).tolist() == [[4.0]]
        await first
    assert engine.calls == [[0], [2]]


async def test_a_cancelled_caller_is_skipped_and_the_owner_lives_on() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        computing = await blocked(engine, batcher)
        waiting, other = await asked(batcher, 1), await asked(batcher, 2)
        for task in (computing, waiting):  # one whose batch is with the engine, one still in the queue
            task.cancel()
        await asyncio.wait([computing, waiting])
        engine.gate.set()
        assert (await other).tolist() == [[4.0]]
        assert (await batcher.ask(images(3))).tolist() == [[6.0]]
    assert engine.calls == [[0], [2], [3]]


async def test_places_are_bounded_and_come_back() -> None:
    engine = Doubler()
    async with running(engine, max_queue_pictures=5) as batcher:
        with batcher.place(3):
            with pytest.raises(QueueFull), batcher.place(3):
                pass
            with batcher.place(2):
                assert batcher.taken_pictures == 5
            assert batcher.taken_pictures == 3
        with contextlib.suppress(ValueError), batcher.place(5):
            raise ValueError
        assert batcher.taken_pictures == 0


@pytest.mark.parametrize("error", [ValueError("broken"), MemoryError()])
async def test_an_engine_failure_reaches_every_caller_of_its_batch_and_no_other(error: Exception) -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        engine.fail_on[2] = error
        first = await blocked(engine, batcher)
        waiting = [await asked(batcher, *values) for values in ((1,), (2, 3), (4, 5))]
        engine.gate.set()
        told = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert engine.calls == [[0], [1, 2, 3], [4, 5]]
    assert told[1:3] == [error, error]
    assert (told[0].tolist(), told[3].tolist()) == ([[0.0]], [[8.0], [10.0]])


@pytest.mark.parametrize("error", [StopIteration(), SystemExit(3)])
async def test_an_engine_that_raises_what_no_future_carries_is_a_failure_and_not_the_end(
    error: BaseException,
) -> None:
    engine = Doubler()
    engine.fail_on[1] = error
    async with running(engine) as batcher:
        with pytest.raises(RuntimeError, match=f"the engine raised {type(error).__name__}"):
            await asyncio.wait_for(batcher.ask(images(1)), 5)
        assert (await asyncio.wait_for(batcher.ask(images(2)), 5)).tolist() == [[4.0]]


async def test_a_wrong_number_of_answers_is_a_failure_of_the_whole_batch() -> None:
    engine = Doubler()
    engine.shorten = 1
    async with running(engine) as batcher:
        with pytest.raises(RuntimeError, match="expected 2 answers of the engine, got 1"):
            await batcher.ask(images(1, 2))
        engine.shorten = 0
        assert (await batcher.ask(images(1))).tolist() == [[2.0]]


async def test_a_batch_that_cannot_be_stacked_is_a_failure_and_not_the_end() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        first = await blocked(engine, batcher)
        odd = [await asked(batcher, 1), asyncio.create_task(batcher.ask(np.zeros((1, 1, 2, 2), np.uint8)))]
        await asyncio.sleep(0)
        engine.gate.set()
        await first
        told = await asyncio.gather(*odd, return_exceptions=True)
        assert [type(outcome) for outcome in told] == [ValueError, ValueError]
        assert (await batcher.ask(images(3))).tolist() == [[6.0]]


async def test_stopping_tells_everyone_who_waits_or_comes_later() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        computing = await blocked(engine, batcher)
        waiting = await asked(batcher, 1)
        threading.Timer(0.05, engine.gate.set).start()
        await batcher.stop()
        for caller in (computing, waiting, asyncio.create_task(batcher.ask(images(2)))):
            with pytest.raises(CallerGone):
                await asyncio.wait_for(caller, 5)
    assert engine.calls == [[0]]


async def test_one_caller_cannot_see_anothers_answers() -> None:
    engine = Doubler()
    async with running(engine, max_batch_pictures=64) as batcher:
        first = await blocked(engine, batcher)
        waiting = [await asked(batcher, *range(i, i + 1 + i % 3)) for i in range(1, 21)]
        engine.gate.set()
        await first
        for index, task in enumerate(waiting, start=1):
            expected = [[2.0 * value] for value in range(index, index + 1 + index % 3)]
            assert (await task).tolist() == expected
    assert len(engine.calls) == 2


def test_the_batcher_knows_neither_torch_nor_grpc() -> None:
    code = "import sys, teacher_service.batcher as b; sys.exit(bool({'torch', 'grpc', 'google'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
