"""Batches of many callers, stacked for one engine. Knows arrays and futures; no torch, no grpc, no accounts.

One task owns the queue. There is no batching timer: whoever waits when the engine is free forms the next batch, so an
idle engine answers at once and a busy one gets large batches by itself. Callers who have gone are skipped.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


class QueueFull(Exception):
    """No place for so many pictures."""


class CallerGone(Exception):
    """The caller left before the engine began; nothing was computed."""


class _Waiting:
    def __init__(
        self, images_NCHW: UInt8Array, has_gone: Callable[[], bool], outcome: "asyncio.Future[Float32Array]"
    ) -> None:
        self.images_NCHW = images_NCHW
        self.has_gone = has_gone
        self.outcome = outcome


class Batcher:
    """Bounded queue before an engine that answers one stacked batch at a time.

    Args:
        answer: images_NCHW uint8 -> probabilities_NK float32; runs in the batcher's own thread.
        max_batch_pictures: most pictures the engine gets at once; a single submission may not be larger.
        max_queue_pictures: most pictures in places taken and not yet answered.
        on_batch: told the number of pictures of each engine call, for metrics.
    """

    def __init__(
        self,
        answer: Callable[[UInt8Array], Float32Array],
        *,
        max_batch_pictures: int,
        max_queue_pictures: int,
        on_batch: Callable[[int], None] = lambda pictures: None,
    ) -> None:
        self._answer = answer
        self._max_batch_pictures = max_batch_pictures
        self.max_queue_pictures = max_queue_pictures
        self._on_batch = on_batch
        self.taken_pictures = 0
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._owner: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self) -> None:
        """Starts the owner task; needs a running loop."""
        self._owner = asyncio.create_task(self._run(), name="batcher")

    async def stop(self) -> None:
        """Stops at once; what still waits, and whoever asks later, is told CallerGone."""
        self._stopped = True
        if self._owner is not None:
            self._owner.cancel()
            await asyncio.gather(self._owner, return_exceptions=True)
        for waiting in self._waiting:
            _fail(waiting, CallerGone())
        self._waiting.clear()
        self._engine_thread.shutdown(wait=True)

    @contextmanager
    def place(self, picture_count: int) -> Iterator[None]:
        """A place in the queue for a batch, taken before any other work is done for it. Raises QueueFull."""
        if self.taken_pictures + picture_count > self.max_queue_pictures:
            raise QueueFull
        self.taken_pictures += picture_count
        try:
            yield
        finally:
            self.taken_pictures -= picture_count

    async def ask(self, images_NCHW: UInt8Array, has_gone: Callable[[], bool] = lambda: False) -> Float32Array:
        """probabilities_NK for one submission, inside its ``place``.

        Raises CallerGone when ``has_gone`` is true at its turn, and whatever the engine raises.
        """
        if self._stopped:
            raise CallerGone
        outcome: asyncio.Future[Float32Array] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(images_NCHW, has_gone, outcome))
        self._arrived.set()
        return await outcome

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            try:
                stacked_NCHW = batch[0].images_NCHW
                if len(batch) > 1:
                    stacked_NCHW = np.concatenate([waiting.images_NCHW for waiting in batch])
                self._on_batch(len(stacked_NCHW))
                answers_NK = await loop.run_in_executor(self._engine_thread, self._compute, stacked_NCHW)
                if len(answers_NK) != len(stacked_NCHW):
                    raise RuntimeError(f"expected {len(stacked_NCHW)} answers of the engine, got {len(answers_NK)}")
            except Exception as error:  # every caller is told; the owner lives on
                for waiting in batch:
                    _fail(waiting, error)
                continue
            except asyncio.CancelledError:
                for waiting in batch:
                    _fail(waiting, CallerGone())
                raise
            start = 0
            for waiting in batch:
                end = start + len(waiting.images_NCHW)
                if not waiting.outcome.done():  # a caller may have been cancelled meanwhile
                    waiting.outcome.set_result(answers_NK[start:end])
                start = end

    def _compute(self, images_NCHW: UInt8Array) -> Float32Array:
        try:
            return self._answer(images_NCHW)
        except (StopIteration, SystemExit, KeyboardInterrupt) as error:
            # A future passes the first of these on to nobody, and the others would end the owner.
            raise RuntimeError(f"the engine raised {error!r}") from error

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        pictures = 0
        while self._waiting:
            waiting = self._waiting[0]
            if waiting.outcome.done() or waiting.has_gone():  # done before its turn: cancelled
                _fail(self._waiting.popleft(), CallerGone())
                continue
            if batch and pictures + len(waiting.images_NCHW) > self._max_batch_pictures:
                break
            batch.append(self._waiting.popleft())
            pictures += len(waiting.images_NCHW)
        return batch


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.outcome.done():
        waiting.outcome.set_exception(error)
