"""TeacherInference: what is sold, and the stream that carries batches."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from google.protobuf.duration_pb2 import Duration

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceServicer
from teacher_service import policy
from teacher_service.auth import Authenticator, Caller, caller_of
from teacher_service.config import ServerConfig
from teacher_service.engine import Engine
from teacher_service.ledger import check_identifier
from teacher_service.money_path import Batch, Gone, MoneyPath
from teacher_service.streams import Calls


class InferenceServicer(TeacherInferenceServicer):
    """TeacherInference over one MoneyPath."""

    def __init__(
        self, calls: Calls, money_path: MoneyPath, authenticator: Authenticator, engine: Engine, config: ServerConfig
    ) -> None:
        self._calls = calls
        self._money_path = money_path
        self._authenticator = authenticator
        self._engine = engine
        self._config = config

    async def Describe(self, request: wire.DescribeRequest, context: Any) -> wire.DescribeResponse:
        """What the teacher is and accepts, and what this caller is sold."""
        caller = await caller_of(self._authenticator, context)
        terms = self._money_path.terms_of(caller)
        return wire.DescribeResponse(
            model_digest=self._engine.model_digest,
            labels=self._engine.labels,
            channels=self._engine.channels,
            height=self._engine.height,
            width=self._engine.width,
            **policy.described(terms, len(self._engine.labels)),
            encodings=codec.ENCODINGS,
            max_batch_pictures=self._money_path.max_batch_pictures(caller),
            max_message_bytes=self._config.max_message_bytes,
            window_batches=self._config.window_batches,
        )

    async def Infer(
        self, requests: AsyncIterator[wire.InferRequest], context: Any
    ) -> AsyncIterator[wire.InferResponse]:
        """Batches in, answers out, in any order."""
        front = _Front(self._money_path, self._engine, self._config)
        async with aclosing(self._calls.stream(requests, context, front)) as responses:
            async for response in responses:
                yield response


class _Front:
    """One Infer stream: a config first, then batches; a drain is told in a message of its own."""

    def __init__(self, money_path: MoneyPath, engine: Engine, config: ServerConfig) -> None:
        self._money_path = money_path
        self._engine = engine
        self._config = config
        self._run_id = ""

    async def begin(self, read: Callable[[], Awaitable[wire.InferRequest | None]]) -> wire.InferResponse:
        first = await read()
        if first is None and self._money_path.draining:
            raise Refusal.of(Reason.DRAINING)
        kind = first.WhichOneof("payload") if first is not None else None
        if first is None or kind != "config":
            raise Refusal.of(Reason.STREAM_NOT_CONFIGURED, got=kind or "nothing")
        check_identifier("config.run_id", first.config.run_id)
        self._run_id = first.config.run_id
        accepted = wire.StreamAccepted(
            model_digest=self._engine.model_digest, window_batches=self._config.window_batches
        )
        return wire.InferResponse(accepted=accepted)

    def check(self, request: wire.InferRequest) -> None:
        kind = request.WhichOneof("payload")
        if kind != "batch":
            got = kind or "a message of no known kind"
            raise Refusal.of(Reason.INVALID_REQUEST, field="payload", expected="a batch after the config", got=got)

    async def answer(self, caller: Caller, request: wire.InferRequest, gone: Gone) -> wire.InferResponse:
        batch = Batch(request.batch.batch_id, codec.ReceivedImages.of(request.batch.images))
        return wire.InferResponse(result=await self._money_path.answer(caller, self._run_id, batch, gone))

    def refused(self, request: wire.InferRequest, refusal: Refusal) -> wire.InferResponse:
        told = wire.BatchRefusal(batch_id=request.batch.batch_id[:64], status=refusal.to_status())
        return wire.InferResponse(refusal=told)

    def draining(self) -> wire.InferResponse:
        grace = Duration(seconds=int(self._config.grace_seconds))
        return wire.InferResponse(draining=wire.StreamDraining(grace_duration=grace))

    def drained(self) -> None:
        return None
