"""Batches of many callers, stacked for one engine. Knows arrays and futures; no torch, no grpc, no accounts.

One task owns the queue. There is no batching timer: whoever waits when the engine is free forms the next batch, so an
idle engine answers at once and a busy one gets large batches by itself. Between owners the queue is fair by pictures,
and so are its places. Callers who have gone are skipped.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from teacher_service.fair_queue import FairQueue

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


LONGEST_ON_LOOP_SECONDS = 0.01
MOST_LONG_CALLS = 3
"""In a row, by an engine that was quick: one may be the machine's fault, so many are its own."""


class QueueFull(Exception):
    """No place for so many pictures."""


class CallerGone(Exception):
    """The caller left, or its deadline passed, before the engine began; it was answered nothing."""


@dataclass(frozen=True)
class EngineCall:
    """One engine call that gave answers."""

    picture_count: int
    seconds: float
    waited_seconds: tuple[float, ...]
    """Of each submission in it: from being asked to the begin of this call."""


class _Submission:
    """What a caller asked for. It knows its parts by number alone: no cycle keeps pictures from being freed."""

    def __init__(self, has_gone: Callable[[], bool], part_count: int) -> None:
        self.has_gone = has_gone
        self.outcome: asyncio.Future[Float32Array] = asyncio.get_running_loop().create_future()
        self.asked_at = time.perf_counter()
        self.has_begun = False
        self._answers: list[Float32Array | None] = [None] * part_count

    def is_over(self) -> bool:
        """Whether nobody waits for an answer: cancelled, failed in another part, or gone."""
        return self.outcome.done() or self.has_gone()

    def fail(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def leave_unless_begun(self) -> None:
        if not self.has_begun:
            self.fail(CallerGone())

    def answer(self, number: int, answers_NK: Float32Array) -> None:
        """The answers of one part; they are given together with those of the last."""
        self._answers[number] = answers_NK
        answers = [part for part in self._answers if part is not None]
        if len(answers) == len(self._answers) and not self.outcome.done():
            self.outcome.set_result(answers[0] if len(answers) == 1 else np.concatenate(answers))


@dataclass(frozen=True, eq=False)
class _Part:
    """What of a submission goes into one engine call: all of it, unless it is larger than the engine takes."""

    submission: _Submission
    number: int
    images_NCHW: UInt8Array


class Batcher:
    """Bounded queue before an engine.

    Args:
        answer: images_NCHW uint8 -> probabilities_NK float32; runs in the batcher's own threads.
        max_batch_pictures: most pictures the engine gets at once; a larger submission is computed in parts.
        max_queue_pictures: most pictures in places taken and not yet answered.
        calls_at_once: engine calls under way together. With more than one, a call beyond the first begins only with
            a full batch: a batch that is not full gains more by waiting for company.
        on_call: told of each engine call that gave answers, for metrics.
        is_quick: its calls are so short that each is made at once, on the event loop, without queue or thread; until
            ``MOST_LONG_CALLS`` in a row took longer than ``LONGEST_ON_LOOP_SECONDS``.
    """

    def __init__(
        self,
        answer: Callable[[UInt8Array], Float32Array],
        *,
        max_batch_pictures: int,
        max_queue_pictures: int,
        calls_at_once: int = 1,
        on_call: Callable[[EngineCall], None] = lambda call: None,
        is_quick: bool = False,
    ) -> None:
        self._answer = answer
        self._max_batch_pictures = max_batch_pictures
        self.max_queue_pictures = max_queue_pictures
        self._calls_at_once = calls_at_once
        self._on_call = on_call
        self._is_quick = is_quick
        self._long_calls = 0
        self.taken_pictures = 0
        self._taken_by_owner: Counter[str] = Counter()
        self._queue: FairQueue[_Part] = FairQueue()
        self._under_way: list[list[_Part]] = []
        self._wake = asyncio.Event()
        self._engine_threads = ThreadPoolExecutor(calls_at_once, thread_name_prefix="engine")
        self._owner: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        """Starts the owner task; needs a running loop."""
        self._owner = asyncio.create_task(self._run(), name="batcher")

    async def stop(self) -> None:
        """Stops at once; who waits, is being computed or asks later is told CallerGone."""
        self._stopped = True
        if self._owner is not None:
            self._owner.cancel()
            await asyncio.gather(self._owner, return_exceptions=True)
        for part in [*self._queue.remove(lambda part: True), *(part for batch in self._under_way for part in batch)]:
            part.submission.fail(CallerGone())
        self._engine_threads.shutdown(wait=False)  # a call that never returns must not keep the books open

    @contextmanager
    def place(self, picture_count: int, owner: str = "") -> Iterator[None]:
        """A place in the queue for a batch, taken before any other work is done for it. Raises QueueFull.

        An owner without one gets any that is free. One that has some gets another only where that leaves at least as
        many free as it then has: nobody fills more than half of the queue, two owners at most a third each, and
        whoever comes anew finds room. What an owner may not take would have waited anyway, so the engine loses no
        work by it.
        """
        free = self.max_queue_pictures - self.taken_pictures - picture_count
        has = self._taken_by_owner[owner]
        if free < 0 or (has and free < has + picture_count):
            raise QueueFull
        self.taken_pictures += picture_count
        self._taken_by_owner[owner] += picture_count
        try:
            yield
        finally:
            self.taken_pictures -= picture_count
            self._taken_by_owner[owner] -= picture_count
            if not self._taken_by_owner[owner]:
                del self._taken_by_owner[owner]

    async def ask(
        self,
        images_NCHW: UInt8Array,
        has_gone: Callable[[], bool] = lambda: False,
        *,
        owner: str = "",
        deadline: float | None = None,
    ) -> Float32Array:
        """probabilities_NK for one submission, inside its ``place``.

        ``deadline`` is a time of ``time.monotonic()``, in seconds. Raises CallerGone when it passes before the engine
        has begun (at that moment, however long the engine is busy) or when ``has_gone`` is true at the submission's
        turn, and whatever the engine raises.
        """
        if self._stopped:
            raise CallerGone
        if self._is_quick:
            return self._answered_at_once(images_NCHW, has_gone, deadline)
        starts = range(0, max(1, len(images_NCHW)), self._max_batch_pictures)
        submission = _Submission(has_gone, len(starts))
        for number, start in enumerate(starts):
            part = _Part(submission, number, images_NCHW[start : start + self._max_batch_pictures])
            self._queue.put(owner, part, len(part.images_NCHW))
        self._wake.set()
        if deadline is None:
            return await submission.outcome
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(deadline - time.monotonic(), submission.leave_unless_begun)
        try:
            return await submission.outcome
        finally:
            expiry.cancel()

    def _answered_at_once(
        self, images_NCHW: UInt8Array, has_gone: Callable[[], bool], deadline: float | None
    ) -> Float32Array:
        """What ``ask`` promises, of a quick engine: nobody ever waits for it, so there is no queue to be fair in."""
        if has_gone() or (deadline is not None and time.monotonic() >= deadline):
            raise CallerGone
        answers = []
        for start in range(0, max(1, len(images_NCHW)), self._max_batch_pictures):
            part_NCHW = images_NCHW[start : start + self._max_batch_pictures]
            started = time.perf_counter()
            outcome = self._outcome([part_NCHW])
            seconds = time.perf_counter() - started
            self._long_calls = self._long_calls + 1 if seconds > LONGEST_ON_LOOP_SECONDS else 0
            self._is_quick = self._long_calls < MOST_LONG_CALLS
            if isinstance(outcome, Exception):
                raise outcome
            self._on_call(EngineCall(len(part_NCHW), seconds, (0.0,)))
            answers.append(outcome)
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._has_room():
                self._begin_calls(loop)

    def _begin_calls(self, loop: asyncio.AbstractEventLoop) -> None:
        for part in self._queue.remove(lambda part: part.submission.is_over()):
            part.submission.fail(CallerGone())
        while self._queue and self._has_room():
            batch = self._queue.take(self._max_batch_pictures)
            for part in batch:
                part.submission.has_begun = True
            self._under_way.append(batch)
            self._engine_threads.submit(self._call, batch, loop)

    def _has_room(self) -> bool:
        if not self._under_way:
            return True
        return len(self._under_way) < self._calls_at_once and self._queue.size >= self._max_batch_pictures

    def _call(self, batch: list[_Part], loop: asyncio.AbstractEventLoop) -> None:
        """One engine call, in an engine thread: stacking costs the loop nothing, and the engine a thousandth.

        Where it fails each part is tried alone: one caller's picture must not fail another's batch.
        """
        images = [part.images_NCHW for part in batch]
        started = time.perf_counter()
        outcome = self._outcome(images)
        if isinstance(outcome, Exception) and len(batch) > 1:
            outcomes = [self._outcome([alone_NCHW]) for alone_NCHW in images]
        elif isinstance(outcome, Exception):
            outcomes = [outcome]
        else:
            ends = np.cumsum([len(alone_NCHW) for alone_NCHW in images])
            outcomes = list(np.split(outcome, ends[:-1]))
        ended = time.perf_counter()
        with contextlib.suppress(RuntimeError):  # the loop is closed: stopped long ago, and everyone told
            loop.call_soon_threadsafe(self._called, batch, outcomes, started, ended)

    def _outcome(self, images: list[UInt8Array]) -> Float32Array | Exception:
        outcome: Float32Array | Exception
        try:
            outcome = self._answers(images)
        except Exception as error:  # every caller is told; the thread lives on
            outcome = error
        except BaseException as error:  # SystemExit and its like would end nothing but this answer
            outcome = RuntimeError(f"the engine raised {error!r}")
        if isinstance(outcome, StopIteration):  # which no future carries
            outcome = RuntimeError(f"the engine raised {outcome!r}")
        return outcome

    def _answers(self, images: list[UInt8Array]) -> Float32Array:
        stacked_NCHW = images[0] if len(images) == 1 else np.concatenate(images)
        answers_NK = self._answer(stacked_NCHW)
        if len(answers_NK) != len(stacked_NCHW):
            raise RuntimeError(f"expected {len(stacked_NCHW)} answers of the engine, got {len(answers_NK)}")
        return answers_NK

    def _called(
        self, batch: list[_Part], outcomes: list[Float32Array | Exception], started: float, ended: float
    ) -> None:
        self._under_way.remove(batch)
        answered = []
        for part, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                part.submission.fail(outcome)
            else:
                part.submission.answer(part.number, outcome)
                answered.append(part)
        self._wake.set()  # last: whoever asks again in the same breath has a part in the next batch
        if answered:
            pictures = sum(len(part.images_NCHW) for part in answered)
            waited_seconds = tuple(started - part.submission.asked_at for part in answered)
            self._on_call(EngineCall(pictures, ended - started, waited_seconds))
