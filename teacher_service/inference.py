"""TeacherInference: the money path of every batch, and the stream that carries batches.

    authenticate -> check size and limits -> take a place in the queue -> decode -> HOLD -> engine -> POST -> send

Money is touched here and nowhere else, in that order. Each batch runs in a task of its own that is never cancelled: a
caller who goes away is noticed by the batcher (which skips the departed) and not by interrupting a post.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import structlog
from google.protobuf.duration_pb2 import Duration

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceServicer
from teacher_service.auth import Authenticator, Caller, abort
from teacher_service.batcher import Batcher, CallerGone, QueueFull
from teacher_service.config import ServerConfig
from teacher_service.engine import Engine
from teacher_service.ledger import HoldRequest, Ledger, LedgerError, LedgerUnavailable, Posted, check_identifier
from teacher_service.metrics import Metrics

log = structlog.get_logger()

VOID_RETRY_SECONDS = 1.0


class MoneyPath:
    """A batch in, an answer out, charged exactly once: what every protocol front shares."""

    def __init__(
        self, *, engine: Engine, ledger: Ledger, batcher: Batcher, metrics: Metrics, config: ServerConfig
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._batcher = batcher
        self._metrics = metrics
        self._config = config
        self.answer_kind = (
            wire.ANSWER_KIND_PROBABILITIES if config.answers == "soft" else wire.ANSWER_KIND_CLASS_INDICES
        )
        self.draining = False
        self._releasing: set[asyncio.Task[None]] = set()

    async def answer(self, caller: Caller, run_id: str, batch: wire.Batch, gone: "Gone") -> wire.BatchResult:
        """The paid answer of one batch. Raises Refusal; then nothing was charged."""
        started = time.perf_counter()
        outcome = "failed"
        try:
            result = await self._answer(caller, run_id, batch, gone)
            outcome = "replayed" if result.replayed else "charged"
            return result
        except Refusal as refusal:
            departed = refusal.reason is Reason.DRAINING and gone() and not self.draining
            outcome = "departed" if departed else refusal.reason.name.lower()
            raise
        finally:
            self._metrics.batch_done(
                protocol="mekd",
                account=caller.account,
                outcome=outcome,
                pictures=max(0, min(batch.images.picture_count, self._config.max_batch_pictures)),
                seconds=time.perf_counter() - started,
            )

    async def _answer(self, caller: Caller, run_id: str, batch: wire.Batch, gone: "Gone") -> wire.BatchResult:
        if self.draining:
            raise Refusal.of(Reason.DRAINING)
        check_identifier("batch.batch_id", batch.batch_id)
        try:
            try:
                codec.check_images(
                    batch.images,
                    channels=self._engine.channels,
                    height=self._engine.height,
                    width=self._engine.width,
                    max_batch_pictures=self._config.max_batch_pictures,
                )
            except Refusal as refusal:
                return await self._answered_before(caller, run_id, batch, refusal)
            with self._batcher.place(batch.images.picture_count):
                return await self._held_answer(caller, run_id, batch, gone)
        except QueueFull:
            raise Refusal.of(Reason.OVERLOADED, limit=self._config.max_queue_pictures) from None
        except LedgerUnavailable as error:
            log.error("ledger unavailable", error=str(error))
            raise Refusal.of(Reason.LEDGER_UNAVAILABLE) from None
        except LedgerError as error:  # the account is not on these books, for example
            log.error("ledger refused", error=str(error))
            raise Refusal.of(Reason.LEDGER_REFUSED, problem=error) from None

    async def _answered_before(
        self, caller: Caller, run_id: str, batch: wire.Batch, refusal: Refusal
    ) -> wire.BatchResult:
        """The kept answer of a batch that is refused now and was paid for before; else raises the refusal."""
        if not codec.fits_its_header(batch.images):
            raise refusal
        posted = await self._ledger.replay(_hold_request(caller, run_id, batch))
        if posted is None:
            raise refusal
        return _replayed(batch.batch_id, posted)

    async def _held_answer(self, caller: Caller, run_id: str, batch: wire.Batch, gone: "Gone") -> wire.BatchResult:
        images_NCHW = codec.decode_images(batch.images)
        held = await self._ledger.hold(_hold_request(caller, run_id, batch))
        if isinstance(held, Posted):
            return _replayed(batch.batch_id, held)
        try:
            probabilities_NK = await self._batcher.ask(images_NCHW, gone)
            answer = self._policy(probabilities_NK)
        except Exception as error:
            await self._release(caller.account, batch.batch_id)
            if isinstance(error, CallerGone):
                raise Refusal.of(Reason.DRAINING) from None  # heard by nobody, unless the server is stopping
            incident = uuid.uuid4().hex[:8]
            log.error("engine failed", incident=incident, account=caller.account, exc_info=error)
            raise Refusal.of(Reason.ENGINE_FAILED, incident=incident) from None
        answer.charged_count = len(images_NCHW)
        answer.pixel_digest = codec.pixel_digest(images_NCHW)
        try:
            posted = await self._ledger.post(
                caller.account, batch.batch_id, answer.SerializeToString(deterministic=True)
            )
        except LedgerError:
            # Posted or not, we cannot know; the answer is thrown away. A repeat finds out: replay or a new hold.
            await self._release(caller.account, batch.batch_id)
            raise
        self._metrics.balance(caller.account, posted.account.balance)
        return _result(batch.batch_id, answer, posted, replayed=False)

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
        for task in self._releasing:
            task.cancel()

    def _policy(self, probabilities_NK: codec.Float32Array) -> wire.Answer:
        """What is sold: the answer as it will be kept and sent."""
        answer = wire.Answer(model_digest=self._engine.model_digest)
        if self.answer_kind == wire.ANSWER_KIND_PROBABILITIES:
            answer.probabilities.CopyFrom(codec.encode_probabilities(probabilities_NK))
        else:
            indices_N = probabilities_NK.argmax(axis=1).astype(np.int64)
            answer.class_indices.CopyFrom(codec.encode_class_indices(indices_N, probabilities_NK.shape[1]))
        return answer


class Gone:
    """Whether a caller has left; called by the batcher before it computes."""

    def __init__(self) -> None:
        self.left = False

    def __call__(self) -> bool:
        return self.left


class _Stream:
    """One open stream: its window, and what is to be sent on it."""

    def __init__(self, window_batches: int) -> None:
        self.gone = Gone()
        self.window = asyncio.Semaphore(window_batches)
        # At most one answer per batch of the window, the acceptance, a draining notice and the end mark.
        self.outgoing: asyncio.Queue[wire.InferResponse | Refusal | None] = asyncio.Queue(window_batches + 3)
        self.draining = asyncio.Event()


class InferenceServicer(TeacherInferenceServicer):
    """TeacherInference over one MoneyPath."""

    def __init__(
        self, money_path: MoneyPath, authenticator: Authenticator, engine: Engine, config: ServerConfig
    ) -> None:
        self._money_path = money_path
        self._authenticator = authenticator
        self._engine = engine
        self._config = config
        self._streams: set[_Stream] = set()
        self._batches: set[asyncio.Task[None]] = set()

    async def Describe(self, request: wire.DescribeRequest, context: Any) -> wire.DescribeResponse:
        """What the teacher is and accepts."""
        return wire.DescribeResponse(
            model_digest=self._engine.model_digest,
            labels=self._engine.labels,
            channels=self._engine.channels,
            height=self._engine.height,
            width=self._engine.width,
            answer_kind=self._money_path.answer_kind,
            encodings=codec.ENCODINGS,
            max_batch_pictures=self._config.max_batch_pictures,
            max_message_bytes=self._config.max_message_bytes,
            window_batches=self._config.window_batches,
        )

    async def Infer(
        self, requests: AsyncIterator[wire.InferRequest], context: Any
    ) -> AsyncIterator[wire.InferResponse]:
        """Batches in, answers out, in any order."""
        stream = _Stream(self._config.window_batches)
        self._streams.add(stream)
        if self._money_path.draining:
            stream.draining.set()
        reader = asyncio.create_task(self._read(requests, context, stream), name="stream-read")
        try:
            while (response := await stream.outgoing.get()) is not None:
                if isinstance(response, Refusal):  # one that ends the stream
                    await abort(context, response)
                    continue
                yield response
                if response.WhichOneof("payload") in ("result", "refusal"):
                    stream.window.release()  # only now: a slow reader must not pile up answers here
        finally:
            stream.gone.left = True
            self._streams.discard(stream)
            reader.cancel()

    async def drain(self) -> None:
        """Tells every stream to end, then waits for every batch under way. The caller sets the deadline."""
        self._money_path.draining = True
        for stream in self._streams:
            stream.draining.set()
        while self._batches:
            await asyncio.wait(self._batches)
        while self._streams:
            await asyncio.sleep(0.02)

    async def _read(self, requests: AsyncIterator[wire.InferRequest], context: Any, stream: _Stream) -> None:
        """Reads batches while the window has room, and starts a task for each; ends with the end mark."""
        batches: set[asyncio.Task[None]] = set()
        try:
            metadata = context.invocation_metadata()
            run_id = await self._accept(requests, stream)
            while True:
                await stream.window.acquire()
                request = await _next_or_draining(requests, stream)
                if request is None:
                    break
                if request.WhichOneof("payload") != "batch":
                    got = request.WhichOneof("payload") or "a message of no known kind"
                    raise Refusal.of(
                        Reason.INVALID_REQUEST, field="payload", expected="a batch after the config", got=got
                    )
                try:
                    caller = await self._authenticator.identify(metadata)
                except Refusal as refusal:
                    if refusal.reason is not Reason.LEDGER_UNAVAILABLE:
                        raise
                    stream.outgoing.put_nowait(_refused(request.batch, refusal))  # this batch alone: it comes again
                    continue
                task = asyncio.create_task(self._answer(caller, run_id, request.batch, stream), name="batch")
                for tasks in (batches, self._batches):
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            if stream.draining.is_set():
                grace = Duration(seconds=int(self._config.grace_seconds))
                notice = wire.InferResponse(draining=wire.StreamDraining(grace_duration=grace))
                stream.outgoing.put_nowait(notice)
            if batches:
                await asyncio.wait(batches)
            stream.outgoing.put_nowait(None)
        except Refusal as refusal:
            if batches:
                await asyncio.wait(batches)
            stream.outgoing.put_nowait(refusal)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("stream reader failed")
            await stream.outgoing.put(Refusal.of(Reason.ENGINE_FAILED, incident="stream"))

    async def _accept(self, requests: AsyncIterator[wire.InferRequest], stream: _Stream) -> str:
        first = await _next_or_draining(requests, stream)
        kind = first.WhichOneof("payload") if first is not None else None
        if first is None and stream.draining.is_set():
            raise Refusal.of(Reason.DRAINING)
        if first is None or kind != "config":
            raise Refusal.of(Reason.STREAM_NOT_CONFIGURED, got=kind or "nothing")
        check_identifier("config.run_id", first.config.run_id)
        accepted = wire.StreamAccepted(
            model_digest=self._engine.model_digest, window_batches=self._config.window_batches
        )
        await stream.outgoing.put(wire.InferResponse(accepted=accepted))
        return str(first.config.run_id)

    async def _answer(self, caller: Caller, run_id: str, batch: wire.Batch, stream: _Stream) -> None:
        try:
            result = await self._money_path.answer(caller, run_id, batch, stream.gone)
            response = wire.InferResponse(result=result)
        except Refusal as refusal:
            response = _refused(batch, refusal)
        except Exception:
            incident = uuid.uuid4().hex[:8]
            log.exception("batch failed", incident=incident)
            response = _refused(batch, Refusal.of(Reason.ENGINE_FAILED, incident=incident))
        if not stream.gone.left:
            stream.outgoing.put_nowait(response)


def _hold_request(caller: Caller, run_id: str, batch: wire.Batch) -> HoldRequest:
    return HoldRequest(
        account=caller.account,
        batch_id=batch.batch_id,
        run_id=run_id,
        digest=codec.request_digest(batch.images),
        picture_count=batch.images.picture_count,
    )


def _replayed(batch_id: str, posted: Posted) -> wire.BatchResult:
    """The answer as kept. Refusal: ANSWER_EXPIRED."""
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


def _refused(batch: wire.Batch, refusal: Refusal) -> wire.InferResponse:
    return wire.InferResponse(refusal=wire.BatchRefusal(batch_id=batch.batch_id[:64], status=refusal.to_status()))


async def _next_or_draining(requests: AsyncIterator[wire.InferRequest], stream: _Stream) -> wire.InferRequest | None:
    """The next message; None when the caller has half-closed or the server is draining."""
    reading = asyncio.ensure_future(anext(requests, None))
    draining = asyncio.ensure_future(stream.draining.wait())
    try:
        await asyncio.wait((reading, draining), return_when=asyncio.FIRST_COMPLETED)
        return reading.result() if reading.done() else None
    finally:
        reading.cancel()
        draining.cancel()
