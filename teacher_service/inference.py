"""TeacherInference: the stream that carries batches, each answered by the money path in a task of its own."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import structlog
from google.protobuf.duration_pb2 import Duration

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceServicer
from teacher_service import policy
from teacher_service.auth import Authenticator, Caller, abort, caller_of
from teacher_service.config import ServerConfig
from teacher_service.engine import Engine
from teacher_service.ledger import check_identifier
from teacher_service.money_path import Gone, MoneyPath

log = structlog.get_logger()


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
        """What the teacher is and accepts, and what this caller is sold."""
        terms = self._money_path.terms_of(await caller_of(self._authenticator, context))
        return wire.DescribeResponse(
            model_digest=self._engine.model_digest,
            labels=self._engine.labels,
            channels=self._engine.channels,
            height=self._engine.height,
            width=self._engine.width,
            answer_kind=policy.answer_kind(terms),
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
                caller = await caller_of(self._authenticator, context)
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
