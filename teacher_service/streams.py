"""Calls that carry batches, of every protocol: what a stream's window, a caller's leaving and a drain mean, once.

A *front* speaks a protocol; what it says goes through here. Each batch is answered in a task of its own that is never
cancelled: a caller who goes away is told to the batcher, which skips the departed, and interrupts no post.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

import structlog

from protos.errors import Reason, Refusal
from teacher_service.auth import Authenticator, Caller, abort, asks_for, caller_of
from teacher_service.money_path import Gone, MoneyPath

log = structlog.get_logger()

DEADLINE_SLACK_SECONDS = 0.2
"""At its deadline gRPC itself tells the caller, in its own words; only then is the batch given up here."""

# What a stream receives, and what it sends.
Q = TypeVar("Q")
R = TypeVar("R")
Q_contra = TypeVar("Q_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class StreamFront(Protocol[Q_contra, R_co]):
    """One open stream as its protocol has it."""

    async def begin(self, read: Callable[[], Awaitable[Q_contra | None]]) -> R_co | None:
        """What comes before the first batch; None where nothing does. A Refusal ends the stream.

        ``read`` is the next message, or None where there is none: half-closed, or the server is draining.
        """

    def check(self, request: Q_contra) -> None:
        """Refuses what is no batch at all: that ends the stream, after the answers under way."""

    async def answer(self, caller: Caller, request: Q_contra, gone: Gone) -> R_co:
        """The answer of one batch. A Refusal refuses this batch alone."""

    def refused(self, request: Q_contra, refusal: Refusal) -> R_co:
        """The refusal of one batch as it travels."""

    def draining(self) -> R_co | None:
        """Said as soon as the server drains; None where the protocol has no word for it."""

    def drained(self) -> Refusal | None:
        """How the stream of a draining server ends after its last answer; None: well."""


class _Stream(Generic[Q, R]):
    """One open stream: its window, and what is to be sent on it."""

    def __init__(self, requests: AsyncIterator[Q], gone: Gone, window_batches: int) -> None:
        self.gone = gone
        self.window = asyncio.Semaphore(window_batches)
        # Each with whether it frees a place in the window; a Refusal ends the stream badly, None ends it well.
        # At most one answer per batch of the window, what begins it, a draining notice and the end mark.
        self.outgoing: asyncio.Queue[tuple[R, bool] | Refusal | None] = asyncio.Queue(window_batches + 3)
        self.is_draining = False
        self._requests = requests
        self._reader: asyncio.Task[Any] | None = None  # while it waits for a message
        self._is_interrupted = False

    async def read(self) -> Q | None:
        """The next message; None when the caller has half-closed or the server is draining.

        For one task alone. A drain cancels the wait and not the task: a task of its own for each message would cost
        more than all else that reading does.
        """
        if self.is_draining:
            return None
        self._reader = reader = asyncio.current_task()
        assert reader is not None
        try:
            return await anext(self._requests, None)
        except asyncio.CancelledError:
            if self._is_interrupted:
                reader.uncancel()
            if reader.cancelling():  # by what ended the stream
                raise
            return None  # the call itself may be cancelled, too: nothing more will come
        finally:
            self._reader = None

    def drain(self) -> None:
        self.is_draining = True
        if self._reader is not None and not self._is_interrupted:
            self._is_interrupted = True
            self._reader.cancel()


class Calls:
    """Every open stream, and every batch under way, of all the fronts of one server."""

    def __init__(self, money_path: MoneyPath, authenticator: Authenticator, *, window_batches: int) -> None:
        self._money_path = money_path
        self._authenticator = authenticator
        self._window_batches = window_batches
        self.streams: set[_Stream[Any, Any]] = set()
        self.batches: set[asyncio.Task[Any]] = set()

    async def stream(self, requests: AsyncIterator[Q], context: Any, front: StreamFront[Q, R]) -> AsyncGenerator[R]:
        """Batches in, answers out, in any order: at most a window of them unanswered, no batch read beyond it."""
        stream: _Stream[Q, R] = _Stream(requests, _gone(context), self._window_batches)
        self.streams.add(stream)
        stream.is_draining = self._money_path.draining
        who = asks_for(self._authenticator, context)
        reader = asyncio.create_task(self._read(who, stream, front), name="stream-read")

        def end() -> None:
            stream.gone.left = True
            self.streams.discard(stream)
            reader.cancel()

        # Of a caller who left while an answer was being written, this generator is told only when it is collected.
        context.add_done_callback(lambda _context: end())
        try:
            while (outgoing := await stream.outgoing.get()) is not None:
                if isinstance(outgoing, Refusal):
                    await abort(context, outgoing)
                    continue
                response, frees = outgoing
                yield response
                if frees:
                    stream.window.release()  # only now: a slow reader must not pile up answers here
        finally:
            end()

    async def unary(self, context: Any, answer: Callable[[Caller, Gone], Awaitable[R]]) -> R:
        """The answer of one batch outside any stream. Raises Refusal."""
        caller, gone = await caller_of(self._authenticator, context), _gone(context)
        try:
            answered = await asyncio.shield(self._start(_answered(answer(caller, gone))))
        except asyncio.CancelledError:  # the caller's, or its deadline's; the batch goes on, or is skipped
            gone.left = True
            raise
        if isinstance(answered, Refusal):
            raise answered
        return answered

    async def drain(self) -> None:
        """Tells every stream to end, then waits for every batch under way. The caller sets the deadline."""
        self._money_path.draining = True
        for stream in self.streams:
            stream.drain()
        while self.batches:
            await asyncio.wait(self.batches)
        while self.streams:
            await asyncio.sleep(0.02)

    async def _read(
        self, who: Callable[[], Awaitable[Caller]], stream: _Stream[Q, R], front: StreamFront[Q, R]
    ) -> None:
        """Reads batches while the window has room, and starts a task for each; ends with the end mark."""
        batches: set[asyncio.Task[None]] = set()
        end: Refusal | None = None
        try:
            try:
                if (first := await front.begin(stream.read)) is not None:
                    stream.outgoing.put_nowait((first, False))
                while True:
                    await stream.window.acquire()
                    request = await stream.read()
                    if request is None:
                        break
                    front.check(request)
                    try:
                        caller = await who()
                    except Refusal as refusal:
                        if refusal.reason is not Reason.LEDGER_UNAVAILABLE:
                            raise
                        stream.outgoing.put_nowait((front.refused(request, refusal), True))  # it comes again
                        continue
                    task = self._start(self._answer(caller, request, stream, front))
                    batches.add(task)
                    task.add_done_callback(batches.discard)
                if stream.is_draining:
                    if (notice := front.draining()) is not None:
                        stream.outgoing.put_nowait((notice, False))
                    end = front.drained()
            except Refusal as refusal:
                end = refusal
            if batches:
                await asyncio.wait(batches)
            stream.outgoing.put_nowait(end)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("stream reader failed")
            await stream.outgoing.put(Refusal.of(Reason.ENGINE_FAILED, incident="stream"))

    async def _answer(self, caller: Caller, request: Q, stream: _Stream[Q, R], front: StreamFront[Q, R]) -> None:
        answered = await _answered(front.answer(caller, request, stream.gone))
        if not stream.gone.left:
            response = front.refused(request, answered) if isinstance(answered, Refusal) else answered
            stream.outgoing.put_nowait((response, True))

    def _start(self, answering: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        task = asyncio.create_task(answering, name="batch")
        self.batches.add(task)
        task.add_done_callback(self.batches.discard)
        return task


def _gone(context: Any) -> Gone:
    """Of a call's caller, who listens until the call's deadline where it has one."""
    seconds = context.time_remaining()
    return Gone(None if seconds is None else time.monotonic() + seconds + DEADLINE_SLACK_SECONDS)


async def _answered(answering: Awaitable[R]) -> R | Refusal:
    """The answer or the refusal; an error of ours is logged, and told without its cause."""
    try:
        return await answering
    except Refusal as refusal:
        return refusal
    except Exception:
        incident = uuid.uuid4().hex[:8]
        log.exception("batch failed", incident=incident)
        return Refusal.of(Reason.ENGINE_FAILED, incident=incident)
