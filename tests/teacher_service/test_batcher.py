import asyncio
import contextlib
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator

import numpy as np
import pytest

from teacher_service.batcher import LONGEST_ON_LOOP_SECONDS, MOST_LONG_CALLS, Batcher, CallerGone, QueueFull
from tests.teacher_service.parts import until


class Doubler:
    """Answers every picture with twice its value, one call at a time; waits while its gate is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[list[int]] = []
        self.fail_on: dict[int, BaseException] = {}  # by picture value
        self.shorten = 0
        self.seconds = 0.0  # that a call takes at least

    def __call__(self, images_NCHW: np.ndarray) -> np.ndarray:
        values_N = images_NCHW[:, 0, 0, 0]
        self.calls.append(values_N.tolist())
        assert self.gate.wait(10)
        time.sleep(self.seconds)
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
    async with running(engine, on_call=lambda call: sizes.append(call.picture_count)) as batcher:
        first = await blocked(engine, batcher)
        waiting = [await asked(batcher, *values) for values in ((1,), (2, 3), (4,), (5,))]
        engine.gate.set()
        answers = await asyncio.gather(first, *waiting)
    assert engine.calls == [[0], [1, 2, 3, 4], [5]]
    assert [answer.ravel().tolist() for answer in answers] == [[0], [2], [4, 6], [8], [10]]
    assert sizes == [1, 4, 1]


async def test_submissions_go_whole_into_a_batch_and_larger_ones_in_parts() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        first = await blocked(engine, batcher)
        waiting = [await asked(batcher, *values) for values in ((1, 2, 3), (4, 5), (6, 7, 8, 9, 10, 11), (12,))]
        engine.gate.set()
        answers = await asyncio.gather(first, *waiting)
    assert engine.calls == [[0], [1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12]]
    assert answers[3].ravel().tolist() == [12, 14, 16, 18, 20, 22]


async def test_a_submission_that_fails_in_one_part_fails_whole_and_its_rest_is_not_computed() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        engine.fail_on[2] = ValueError("broken")
        with pytest.raises(ValueError, match="broken"):
            await batcher.ask(images(*range(1, 13)))
        assert (await batcher.ask(images(20))).tolist() == [[40.0]]
    assert engine.calls == [[1, 2, 3, 4], [20]]


async def test_no_pictures_are_answered_with_no_answers() -> None:
    async with running(Doubler()) as batcher:
        assert (await batcher.ask(images())).shape == (0, 1)


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
        with batcher.place(3, "a"):
            with pytest.raises(QueueFull), batcher.place(3, "b"):
                pass
            with batcher.place(2, "b"):
                assert batcher.taken_pictures == 5
            assert batcher.taken_pictures == 3
        with contextlib.suppress(ValueError), batcher.place(5, "a"):
            raise ValueError
        assert batcher.taken_pictures == 0


def takes_what_it_gets(batcher: Batcher, owner: str, picture_count: int) -> list[contextlib.ExitStack]:
    """Places of one owner, until it is refused another."""
    places = []
    with contextlib.suppress(QueueFull):
        while True:
            place = contextlib.ExitStack()
            place.enter_context(batcher.place(picture_count, owner))
            places.append(place)
    return places


async def test_an_owner_fills_half_of_the_queue_and_two_a_third_each() -> None:
    async with running(Doubler(), max_queue_pictures=120) as batcher:
        places = {owner: takes_what_it_gets(batcher, owner, 4) for owner in "ab"}
        assert [len(places[owner]) * 4 for owner in "ab"] == [60, 28]
        for _ in range(30):  # as batches are answered, each takes what it can
            for owner in "ab":
                places[owner].pop().close()
            for owner in "ab":
                places[owner] += takes_what_it_gets(batcher, owner, 4)
        assert all(36 <= len(places[owner]) * 4 <= 44 for owner in "ab")


async def test_a_newcomer_finds_a_place_however_greedy_the_others_are() -> None:
    chance = random.Random(1)
    async with running(Doubler(), max_queue_pictures=100) as batcher:
        greedy: dict[str, list[contextlib.ExitStack]] = {owner: [] for owner in "abcde"}
        for _ in range(2000):
            owner = chance.choice("abcde")
            if greedy[owner] and chance.random() < 0.5:
                greedy[owner].pop().close()
            greedy[owner] += takes_what_it_gets(batcher, owner, chance.choice((1, 2, 4)))
            with batcher.place(4, "newcomer"):
                pass
            assert batcher.taken_pictures == sum(batcher._taken_by_owner.values()) <= 100
        for places in greedy.values():
            for place in places:
                place.close()
        assert (batcher.taken_pictures, batcher._taken_by_owner) == (0, {})


@pytest.mark.parametrize("window", [1, 8])
async def test_one_stream_gets_its_half_beside_sixty_four_of_another_owner(window: int) -> None:
    engine = Doubler()
    engine.seconds = 0.002
    async with running(engine, max_batch_pictures=4) as batcher:

        async def stream(owner: str, value: int) -> None:
            while True:
                await batcher.ask(images(value, value), owner=owner)

        callers = [asyncio.create_task(stream("many", 0)) for _ in range(64)]
        await until(lambda: len(engine.calls) > 5)
        begun = len(engine.calls)
        callers += [asyncio.create_task(stream("one", 1)) for _ in range(window)]
        await until(lambda: len(engine.calls) > begun + 100)
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
    served = [value for call in engine.calls[begun : begun + 100] for value in call]
    assert 0.45 < sum(served) / len(served) < 0.55
    assert len(served) >= 390  # and no call went half empty for it


async def test_whoever_comes_first_into_a_long_queue_of_another_goes_with_the_next_batch() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        first = asyncio.create_task(batcher.ask(images(0), owner="many"))
        engine.gate.clear()
        await until(lambda: engine.calls)
        many = [asyncio.create_task(batcher.ask(images(1), owner="many")) for _ in range(40)]
        await asyncio.sleep(0)
        one = asyncio.create_task(batcher.ask(images(2), owner="one"))
        await asyncio.sleep(0)
        engine.gate.set()
        await asyncio.gather(first, one, *many)
    assert 2 in engine.calls[1]


async def test_a_caller_whose_deadline_passes_is_told_at_once_while_the_engine_is_busy() -> None:
    engine = Doubler()
    async with running(engine, max_queue_pictures=3) as batcher:
        first = await blocked(engine, batcher)
        with pytest.raises(CallerGone), batcher.place(2):
            await asyncio.wait_for(batcher.ask(images(1, 2), deadline=time.monotonic() + 0.05), 5)
        assert not first.done() and batcher.taken_pictures == 0
        with pytest.raises(CallerGone):
            await batcher.ask(images(4), deadline=time.monotonic() - 1)
        in_time = asyncio.create_task(batcher.ask(images(3), deadline=time.monotonic() + 60))
        await asyncio.sleep(0)
        engine.gate.set()
        assert (await in_time).tolist() == [[6.0]]
        await first
    assert engine.calls == [[0], [3]]


async def test_a_deadline_that_passes_while_the_engine_computes_the_submission_changes_nothing() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        engine.gate.clear()
        computing = asyncio.create_task(batcher.ask(images(1), deadline=time.monotonic() + 0.05))
        await asyncio.sleep(0.1)
        engine.gate.set()
        assert (await computing).tolist() == [[2.0]]


async def test_a_second_call_begins_beside_the_first_only_with_a_full_batch() -> None:
    engine = Doubler()
    async with running(engine, calls_at_once=2) as batcher:
        first = await blocked(engine, batcher)
        waiting = [await asked(batcher, 1), await asked(batcher, 2)]
        await asyncio.sleep(0.05)
        assert engine.calls == [[0]]
        waiting.append(await asked(batcher, 3, 4))
        await until(lambda: len(engine.calls) == 2)
        waiting.append(await asked(batcher, *range(5, 13)))  # two more batches, and both threads are busy
        await asyncio.sleep(0.05)
        assert engine.calls == [[0], [1, 2, 3, 4]]
        engine.gate.set()
        answers = await asyncio.gather(first, *waiting)
    assert sorted(engine.calls[2:]) == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert [answer.ravel().tolist() for answer in answers] == [
        [0], [2], [4], [6, 8], [10, 12, 14, 16, 18, 20, 22, 24],
    ]  # fmt: skip


async def test_every_call_is_told_with_its_size_its_seconds_and_what_was_waited_for_it() -> None:
    engine, told = Doubler(), []
    async with running(engine, on_call=told.append) as batcher:
        engine.fail_on[9] = ValueError("broken")
        first = await blocked(engine, batcher)
        waiting = [await asked(batcher, 1), await asked(batcher, 2, 3), await asked(batcher, 9, 9, 9)]
        await asyncio.sleep(0.1)
        engine.gate.set()
        await asyncio.gather(first, *waiting, return_exceptions=True)
    assert [call.picture_count for call in told] == [1, 3]  # the failed one gave no answers
    assert told[0].seconds >= 0.1 and len(told[0].waited_seconds) == 1
    assert len(told[1].waited_seconds) == 2 and min(told[1].waited_seconds) >= 0.1


@pytest.mark.parametrize("error", [ValueError("broken"), MemoryError()])
async def test_an_engine_failure_reaches_those_it_belongs_to_and_no_other(error: Exception) -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        engine.fail_on[1] = error
        first = await blocked(engine, batcher)
        waiting = [await asked(batcher, *values) for values in ((1,), (2, 3), (4, 5))]
        engine.gate.set()
        told = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert engine.calls == [[0], [1, 2, 3], [1], [2, 3], [4, 5]]
    assert told[1] is error
    assert [told[0].tolist(), told[2].tolist(), told[3].tolist()] == [[[0.0]], [[4.0], [6.0]], [[8.0], [10.0]]]


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


async def test_what_cannot_be_stacked_is_computed_apart() -> None:
    engine = Doubler()
    async with running(engine) as batcher:
        first = await blocked(engine, batcher)
        odd = [await asked(batcher, 1), asyncio.create_task(batcher.ask(np.zeros((1, 1, 2, 2), np.uint8)))]
        await asyncio.sleep(0)
        engine.gate.set()
        await first
        told = await asyncio.gather(*odd, return_exceptions=True)
        assert told[0].tolist() == [[2.0]]  # computed alone
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


async def test_pictures_are_freed_as_soon_as_they_are_answered() -> None:
    engine, freed = Doubler(), []
    gc.disable()  # what only the collector of cycles would find counts as kept
    try:
        async with running(engine) as batcher:
            for count in (3, 9):
                asked_for = np.zeros((count, 1, 1, 1), np.uint8)  # an owner of its numbers, not a view
                weakref.finalize(asked_for, freed.append, count)
                await batcher.ask(asked_for, deadline=time.monotonic() + 60)
                del asked_for
                await until(lambda count=count: freed[-1:] == [count])
    finally:
        gc.enable()


async def test_a_picture_that_breaks_the_engine_fails_its_own_batch_and_nobody_elses() -> None:
    begun, gate = threading.Event(), threading.Event()
    sizes: list[int] = []

    def answer(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        begun.set()
        assert gate.wait(10)
        if (images == 255).any():
            raise ValueError("not finite")
        return images.reshape(len(images), -1)[:, :1].astype(np.float32)

    def images(count: int, value: int) -> np.ndarray:
        return np.full((count, 1, 2, 2), value, np.uint8)

    calls: list[int] = []
    batcher = Batcher(
        answer, max_batch_pictures=64, max_queue_pictures=64, on_call=lambda call: calls.append(call.picture_count)
    )
    batcher.start()
    try:
        first = asyncio.create_task(batcher.ask(images(1, 7), owner="a"))
        await asyncio.to_thread(begun.wait, 10)
        good = asyncio.create_task(batcher.ask(images(3, 5), owner="b"))
        evil = asyncio.create_task(batcher.ask(images(2, 255), owner="c"))
        await asyncio.sleep(0.05)
        gate.set()
        assert (await first).tolist() == [[7.0]]
        assert (await good).tolist() == [[5.0]] * 3
        with pytest.raises(ValueError, match="not finite"):
            await evil
        assert sizes[:2] == [1, 5] and sorted(sizes[2:]) == [2, 3] and calls == [1, 3]
    finally:
        await batcher.stop()


async def test_a_quick_engine_is_asked_on_the_loop_and_keeps_every_promise() -> None:
    engine = Doubler()
    threads: list[int] = []
    calls: list[int] = []

    def answer(images_NCHW: np.ndarray) -> np.ndarray:
        threads.append(threading.get_ident())
        return engine(images_NCHW)

    batcher = Batcher(
        answer,
        max_batch_pictures=4,
        max_queue_pictures=100,
        on_call=lambda call: calls.append(call.picture_count),
        is_quick=True,
    )
    batcher.start()
    assert (await batcher.ask(images(1, 2, 3, 4, 5))).tolist() == [[2.0], [4.0], [6.0], [8.0], [10.0]]
    assert (engine.calls, calls) == ([[1, 2, 3, 4], [5]], [4, 1])
    for left in ({"has_gone": lambda: True}, {"deadline": time.monotonic() - 1}):
        with pytest.raises(CallerGone):
            await batcher.ask(images(6), **left)
    engine.fail_on = {7: OSError("broken"), 8: SystemExit(1)}
    with pytest.raises(OSError, match="broken"):
        await batcher.ask(images(7))
    with pytest.raises(RuntimeError, match="SystemExit"):
        await batcher.ask(images(8))
    assert (await batcher.ask(images(9))).tolist() == [[18.0]]
    assert [6] not in engine.calls and set(threads) == {threading.get_ident()}
    await batcher.stop()
    with pytest.raises(CallerGone):
        await batcher.ask(images(1))


async def test_an_engine_that_is_quick_no_longer_leaves_the_loop_for_its_thread() -> None:
    engine = Doubler()
    async with running(engine, is_quick=True) as batcher:
        engine.seconds = 2 * LONGEST_ON_LOOP_SECONDS
        for value in range(MOST_LONG_CALLS):
            assert (await batcher.ask(images(value))).tolist() == [[2.0 * value]]
        engine.calls.clear()
        first = await blocked(engine, batcher)  # the loop goes on while the engine is held up
        assert not first.done()
        engine.gate.set()
        assert (await first).tolist() == [[0.0]]
