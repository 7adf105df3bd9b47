"""The money path of every batch, whichever protocol it came by.

    authenticate -> check size and limits -> take a place in the queue -> decode -> HOLD -> engine -> POST -> send

Money is touched here and nowhere else, in that order. Each batch runs in a task of its own that is never cancelled: a
caller who goes away is noticed by the batcher (which skips the departed) and not by interrupting a post.
"""

import asyncio
import contextlib
import dataclasses
import functools
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import policy
from teacher_service.auth import Caller
from teacher_service.batcher import Batcher, CallerGone, QueueFull
from teacher_service.config import ServerConfig
from teacher_service.engine import Engine
from teacher_service.ledger import HoldRequest, Ledger, LedgerError, LedgerUnavailable, Posted, check_identifier
from teacher_service.limits import Limits
from teacher_service.metrics import Metrics
from teacher_service.statistics import Parts, Statistics
from teacher_service.terms import Terms

log = structlog.get_logger()

VOID_RETRY_SECONDS = 1.0
DECODING_THREADS = 2  # each many times as fast as a network on its core; what waits for them has a place in the queue


@dataclass(frozen=True, slots=True)
class Batch:
    """What every protocol makes of a batch: the id it is booked under, and its pictures as they were sent."""

    batch_id: str
    images: codec.ReceivedImages


class MoneyPath:
    """A batch in, an answer out, charged exactly once: what every protocol front shares."""

    def __init__(
        self,
        *,
        engine: Engine,
        ledger: Ledger,
        batcher: Batcher,
        metrics: Metrics,
        limits: Limits,
        statistics: Statistics,
        config: ServerConfig,
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._batcher = batcher
        self._metrics = metrics
        self._limits = limits
        self._statistics = statistics
        self._config = config
        self._terms = Terms(answers=config.answers)
        self.draining = False
        self._releasing: set[asyncio.Task[None]] = set()
        self._decoding = ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="decode")

    def terms_of(self, caller: Caller) -> Terms:
        """What an account is sold, and how much at a time: its own terms, the server's where it has none."""
        return _over(caller.terms, self._terms)

    def max_batch_pictures(self, caller: Caller) -> int:
        """Most pictures in one batch of this account."""
        outstanding = caller.terms.max_outstanding_pictures
        return min(self._config.max_batch_pictures, outstanding or self._config.max_batch_pictures)

    async def answer(
        self,
        caller: Caller,
        run_id: str,
        batch: Batch,
        gone: "Gone",
        *,
        protocol: str = "mekd",
        unsold: Refusal | None = None,
    ) -> wire.BatchResult:
        """The paid answer of one batch. Raises Refusal; then nothing was charged.

        ``unsold``: why this one is not answered unless it was before.
        """
        started = time.perf_counter()
        outcome = "failed"
        parts = Parts()
        try:
            result = await self._answer(caller, run_id, batch, gone, parts, unsold)
            outcome = "replayed" if result.replayed else "charged"
            return result
        except Refusal as refusal:
            departed = refusal.reason is Reason.DEADLINE_EXCEEDED
            outcome = "departed" if departed else refusal.reason.name.lower()
            raise
        finally:
            seconds = time.perf_counter() - started
            self._statistics.batch_done(caller.account, outcome, batch.images.picture_count, seconds, parts)
            self._metrics.batch_done(
                protocol=protocol,
                account=caller.account,
                outcome=outcome,
                pictures=max(0, min(batch.images.picture_count, self._config.max_batch_pictures)),
                seconds=seconds,
            )

    async def _answer(
        self, caller: Caller, run_id: str, batch: Batch, gone: "Gone", parts: Parts, unsold: Refusal | None
    ) -> wire.BatchResult:
        if self.draining:
            raise Refusal.of(Reason.DRAINING)
        check_identifier("batch.batch_id", batch.batch_id)
        count = batch.images.picture_count
        try:
            try:
                if unsold is not None:
                    raise unsold
                codec.check_images(
                    batch.images,
                    channels=self._engine.channels,
                    height=self._engine.height,
                    width=self._engine.width,
                    max_batch_pictures=self.max_batch_pictures(caller),
                )
            except Refusal as refusal:
                return await self._answered_before(caller, run_id, batch, refusal)
            # The place first: a batch that finds none uses nothing of its account's rate up.
            with self._batcher.place(count, caller.account), self._limits.batch(caller.account, caller.terms, count):
                return await self._held_answer(caller, run_id, batch, gone, parts)
        except QueueFull:
            raise Refusal.of(Reason.OVERLOADED, limit=self._config.max_queue_pictures) from None
        except LedgerUnavailable as error:
            log.error("ledger unavailable", error=str(error))
            raise Refusal.of(Reason.LEDGER_UNAVAILABLE) from None
        except LedgerError as error:  # the account is not on these books, for example
            log.error("ledger refused", error=str(error))
            raise Refusal.of(Reason.LEDGER_REFUSED, problem=error) from None

    async def _answered_before(self, caller: Caller, run_id: str, batch: Batch, refusal: Refusal) -> wire.BatchResult:
        """The kept answer of a batch that is refused now and was paid for before; else raises the refusal."""
        if not codec.fits_its_header(batch.images):
            raise refusal
        # A replay like any other, but for the bound on a batch's size, which may be what is refused.
        terms = dataclasses.replace(caller.terms, max_outstanding_pictures=None)
        with self._limits.batch(caller.account, terms, batch.images.picture_count):
            digest = codec.payload_digest(batch.images)
            posted = await self._ledger.replay(_hold_request(caller, run_id, batch, digest))
        if posted is None:
            raise refusal
        return _replayed(batch.batch_id, posted)

    async def _held_answer(
        self, caller: Caller, run_id: str, batch: Batch, gone: "Gone", parts: Parts
    ) -> wire.BatchResult:
        started = time.perf_counter()
        payload_digest = codec.payload_digest(batch.images)
        request = _hold_request(caller, run_id, batch, payload_digest)
        try:
            images_NCHW, pixel_digest = await self._decoded(batch.images, payload_digest)
        except Refusal:
            # Another build of the decoder may have taken it, and then it was paid for.
            if (posted := await self._ledger.replay(request)) is None:
                raise
            return _replayed(batch.batch_id, posted)
        parts.input = time.perf_counter() - started
        if gone():  # before the books have lines of it
            raise self._departed()
        with self._metrics.ledger("hold"):
            held = await self._ledger.hold(request)
        if isinstance(held, Posted):
            return _replayed(batch.batch_id, held)
        try:
            asked = time.perf_counter()
            probabilities_NK = await self._batcher.ask(
                images_NCHW, gone, owner=caller.account, deadline=gone.deadline
            )
            answered = time.perf_counter()
            parts.wait = answered - asked
            answer = policy.apply(self.terms_of(caller), probabilities_NK)
            parts.output = time.perf_counter() - answered
        except Exception as error:
            await self._release(caller.account, batch.batch_id)
            if isinstance(error, CallerGone):
                raise self._departed() from None
            incident = uuid.uuid4().hex[:8]
            log.error("engine failed", incident=incident, account=caller.account, exc_info=error)
            raise Refusal.of(Reason.ENGINE_FAILED, incident=incident) from None
        answer.model_digest = self._engine.model_digest
        answer.charged_count = len(images_NCHW)
        answer.pixel_digest = pixel_digest
        try:
            with self._metrics.ledger("post"):
                posted = await self._ledger.post(
                    caller.account, batch.batch_id, answer.SerializeToString(deterministic=True)
                )
        except LedgerError:
            # Posted or not, we cannot know; the answer is thrown away. A repeat finds out: replay or a new hold.
            await self._release(caller.account, batch.batch_id)
            raise
        self._metrics.balance(caller.account, posted.account.balance)
        return _result(batch.batch_id, answer, posted, replayed=False)

    def _departed(self) -> Refusal:
        # Nobody hears the second, but for a caller whose clock is a little behind.
        return Refusal.of(Reason.DRAINING if self.draining else Reason.DEADLINE_EXCEEDED)

    async def _decoded(self, images: codec.ReceivedImages, payload_digest: bytes) -> tuple[codec.UInt8Array, bytes]:
        """The pictures (N, C, H, W) and their digest. Refusal: INVALID_IMAGES."""
        if images.encoding == wire.IMAGE_ENCODING_RAW_UINT8:  # the payload is the pixels: nothing to do
            return codec.decode_images(images), payload_digest
        return await asyncio.get_running_loop().run_in_executor(self._decoding, _decompressed, images)

    async def _release(self, account: str, batch_id: str) -> None:
        """Voids a hold of ours, however long the store is away: nobody else may while this server lives."""
        try:
            await self._ledger.void(account, batch_id)
        except LedgerUnavailable:
            task = asyncio.create_task(self._release_later(account, batch_id), name="void-later")
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _release_later(self, account: str, batch_id: str) -> None:
        while True:
            await asyncio.sleep(VOID_RETRY_SECONDS)
            with contextlib.suppress(LedgerUnavailable):
                return await self._ledger.void(account, batch_id)

    def stop(self) -> None:
        """Ends what still tries to void; closing the ledger gives those holds back."""
        self._decoding.shutdown(wait=False)
        for task in self._releasing:
            task.cancel()


class Gone:
    """Whether a caller has left; called by the batcher before it computes.

    ``deadline`` is when the caller will no longer listen, a time of ``time.monotonic()``; None: it waits.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.left = False
        self.deadline = deadline

    def __call__(self) -> bool:
        return self.left or (self.deadline is not None and time.monotonic() >= self.deadline)


@functools.lru_cache(maxsize=1024)
def _over(terms: Terms, default: Terms) -> Terms:
    """``Terms.over``, which checks every field anew: asked for every batch, of terms that hardly ever change."""
    return terms.over(default)


def _decompressed(images: codec.ReceivedImages) -> tuple[codec.UInt8Array, bytes]:
    images_NCHW = codec.decode_images(images)
    return images_NCHW, codec.pixel_digest(images_NCHW)


def _hold_request(caller: Caller, run_id: str, batch: Batch, payload_digest: bytes) -> HoldRequest:
    return HoldRequest(
        account=caller.account,
        batch_id=batch.batch_id,
        run_id=run_id,
        digest=codec.request_digest(batch.images, payload_digest),
        picture_count=batch.images.picture_count,
    )


def _replayed(batch_id: str, posted: Posted) -> wire.BatchResult:
    """A kept answer. Refusal: ANSWER_EXPIRED."""
    if posted.answer is None:
        raise Refusal.of(Reason.ANSWER_EXPIRED, batch_id=batch_id)
    return _result(batch_id, wire.Answer.FromString(posted.answer), posted, replayed=True)


def _result(batch_id: str, answer: wire.Answer, posted: Posted, *, replayed: bool) -> wire.BatchResult:
    receipt = wire.Receipt(account=posted.receipt.account, sequence=posted.receipt.sequence, head=posted.receipt.head)
    return wire.BatchResult(
        batch_id=batch_id,
        answer=answer,
        replayed=replayed,
        balance_count=posted.account.balance,
        receipt=receipt,
    )
