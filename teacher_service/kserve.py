"""The Open Inference Protocol over the same money path: one model, one input tensor, one output tensor.

Messages and stubs are those of the stock client, ``tritonclient.grpc``: a second copy of the .proto in one process
would collide with it. Errors carry the codes that Triton gives for the same mistake.

Shape legend: N pictures, C channels, H rows, W columns, K classes.
"""

import json
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from importlib import metadata
from typing import Any, NamedTuple, NoReturn

import numpy as np
from google.rpc import code_pb2
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import policy, unparsed
from teacher_service.auth import Authenticator, Caller, caller_of, refusals_as_status
from teacher_service.config import ServerConfig
from teacher_service.engine import Engine
from teacher_service.ledger import Role, check_identifier
from teacher_service.money_path import Batch, Gone, MoneyPath
from teacher_service.statistics import Counters, Duration, Statistics
from teacher_service.streams import Calls

SERVICE = "inference.GRPCInferenceService"
SERVER_NAME = PLATFORM = "mekd"
VERSION = "1"
INPUT = "images"
PROBABILITIES = "probabilities"
LABELS = "labels"
EXTENSIONS = ("binary_tensor_data", "parameters", "model_configuration", "statistics")
DEFAULT_RUN_ID = "kserve"
"""Of batches that name no run of their own."""
_NO_REQUEST_ID = "<id_unknown>"
MOST_ID_CHARACTERS = 256
_MOST_TOLD = 80  # characters of what a caller sent that a refusal repeats


def _number(message: Any, field: str) -> int:
    return int(message.DESCRIPTOR.fields_by_name[field].number)


_PICTURES: unparsed.Bulk = {
    _number(service_pb2.ModelInferRequest, "raw_input_contents"): None,
    _number(service_pb2.ModelInferRequest, "inputs"): {
        _number(service_pb2.ModelInferRequest.InferInputTensor, "contents"): {
            _number(service_pb2.InferTensorContents, "uint_contents"): None
        }
    },
}
BULK = {f"/{SERVICE}/{method}": _PICTURES for method in ("ModelInfer", "ModelStreamInfer")}
"""By method, where in a request the pictures are: all else is small."""


class KserveServicer(GRPCInferenceServiceServicer):  # type: ignore[misc]  # the stubs carry no types
    """inference.GRPCInferenceService over one MoneyPath; what is not here is UNIMPLEMENTED."""

    def __init__(
        self,
        calls: Calls,
        money_path: MoneyPath,
        authenticator: Authenticator,
        engine: Engine,
        statistics: Statistics,
        config: ServerConfig,
        *,
        is_ready: Callable[[], bool],
    ) -> None:
        self._calls = calls
        self._money_path = money_path
        self._authenticator = authenticator
        self._engine = engine
        self._statistics = statistics
        self._config = config
        self._is_ready = is_ready
        self._model = _Model(money_path, engine, config)

    # --- what needs no credential ---

    async def ServerLive(
        self, request: service_pb2.ServerLiveRequest, context: Any
    ) -> service_pb2.ServerLiveResponse:
        """Whether the process answers at all."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: service_pb2.ServerReadyRequest, context: Any
    ) -> service_pb2.ServerReadyResponse:
        """Whether answers are sold just now: what the health service says of this one."""
        return service_pb2.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(
        self, request: service_pb2.ModelReadyRequest, context: Any
    ) -> service_pb2.ModelReadyResponse:
        """The same of one model; one that is not here is not ready, and no error."""
        ready = self._model.is_named(request.name, request.version) and self._is_ready()
        return service_pb2.ModelReadyResponse(ready=ready)

    # --- what is served ---

    async def ServerMetadata(
        self, request: service_pb2.ServerMetadataRequest, context: Any
    ) -> service_pb2.ServerMetadataResponse:
        """Name and version of this software, and the protocol's extensions that it has."""
        return service_pb2.ServerMetadataResponse(
            name=SERVER_NAME, version=metadata.version("mekd"), extensions=EXTENSIONS
        )

    @refusals_as_status
    async def ModelMetadata(
        self, request: service_pb2.ModelMetadataRequest, context: Any
    ) -> service_pb2.ModelMetadataResponse:
        """The two tensors; the output is the one that this caller's account is sold."""
        self._model.check_named(request.name, request.version)
        return self._model.metadata(await self._caller(context))

    @refusals_as_status
    async def ModelConfig(
        self, request: service_pb2.ModelConfigRequest, context: Any
    ) -> service_pb2.ModelConfigResponse:
        """The same as Triton's tools read it; ``parameters`` say what the protocol has no field for."""
        self._model.check_named(request.name, request.version)
        return service_pb2.ModelConfigResponse(config=self._model.config(await self._caller(context)))

    @refusals_as_status
    async def RepositoryIndex(
        self, request: service_pb2.RepositoryIndexRequest, context: Any
    ) -> service_pb2.RepositoryIndexResponse:
        """The one model."""
        index = service_pb2.RepositoryIndexResponse()
        if self._is_ready():
            index.models.add(name=self._config.model_name, version=VERSION, state="READY")
        elif not request.ready:
            index.models.add(name=self._config.model_name, version=VERSION, state="UNAVAILABLE")
        return index

    @refusals_as_status
    async def ModelStatistics(
        self, request: service_pb2.ModelStatisticsRequest, context: Any
    ) -> service_pb2.ModelStatisticsResponse:
        """What this server did for the caller's account; for an admin, all that it did."""
        if not self._model.is_named(request.name or self._config.model_name, request.version):
            # Triton calls it a bad argument here, and an unknown model everywhere else.
            _refuse(
                "name", f"{self._config.model_name!r} version {VERSION}, or none", request.name or request.version
            )
        caller = await self._caller(context)
        if caller.role is Role.ADMIN:
            counters = self._statistics.total
        else:
            counters = self._statistics.account(caller.account)
        found = _statistics_message(self._config.model_name, counters)
        return service_pb2.ModelStatisticsResponse(model_stats=[found])

    # --- what is sold ---

    @refusals_as_status
    async def ModelInfer(
        self, request: service_pb2.ModelInferRequest, context: Any
    ) -> service_pb2.ModelInferResponse:
        """One batch in, its answer out."""
        return await self._calls.unary(context, lambda caller, gone: self._model.answer(caller, request, gone))

    async def ModelStreamInfer(
        self, requests: AsyncIterator[service_pb2.ModelInferRequest], context: Any
    ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
        """Batches in, answers out, in any order; a bad batch is told as an error message, and the stream goes on."""
        async with aclosing(self._calls.stream(requests, context, _Front(self._model))) as responses:
            async for response in responses:
                yield response

    async def _caller(self, context: Any) -> Caller:
        return await caller_of(self._authenticator, context)


@refusals_as_status
async def _not_here(_servicer: KserveServicer, request: Any, _context: Any) -> NoReturn:
    method = type(request).__name__.removesuffix("Request")
    raise Refusal.of(Reason.UNIMPLEMENTED, method=f"{SERVICE}/{method}")


for _method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
    if _method.name not in vars(KserveServicer):
        # The stubs' own refusal raises, and every such call would put a traceback into the log.
        setattr(KserveServicer, _method.name, _not_here)


class _Tensor(NamedTuple):
    """An output tensor as it travels."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes


class _Model:
    """The one model in the protocol's terms: its description, and its answers out of the money path."""

    def __init__(self, money_path: MoneyPath, engine: Engine, config: ServerConfig) -> None:
        self._money_path = money_path
        self._engine = engine
        self._config = config
        self._shape_CHW = (engine.channels, engine.height, engine.width)

    def is_named(self, name: str, version: str) -> bool:
        """Whether a caller means this model."""
        return name == self._config.model_name and version in ("", VERSION)

    def check_named(self, name: str, version: str) -> None:
        """Refusal: UNKNOWN_MODEL, and INVALID_REQUEST for a version that is no number."""
        if name != self._config.model_name:
            raise Refusal.of(Reason.UNKNOWN_MODEL, model=_told(name))
        if version and not (version.isascii() and version.isdecimal()):
            _refuse("model_version", f"{VERSION}, or none", version)
        if version not in ("", VERSION):
            raise Refusal.of(Reason.UNKNOWN_MODEL, model=f"{_told(name)} version {version[:_MOST_TOLD]}")

    def metadata(self, caller: Caller) -> service_pb2.ModelMetadataResponse:
        found = service_pb2.ModelMetadataResponse(name=self._config.model_name, versions=[VERSION], platform=PLATFORM)
        found.inputs.add(name=INPUT, datatype="UINT8", shape=(-1, *self._shape_CHW))
        if self._sold_output(caller) == LABELS:
            found.outputs.add(name=LABELS, datatype="INT64", shape=(-1,))
        else:
            found.outputs.add(name=PROBABILITIES, datatype="FP32", shape=(-1, len(self._engine.labels)))
        return found

    def config(self, caller: Caller) -> model_config_pb2.ModelConfig:
        found = model_config_pb2.ModelConfig(
            name=self._config.model_name,
            platform=PLATFORM,
            max_batch_size=self._money_path.max_batch_pictures(caller),
            input=[
                model_config_pb2.ModelInput(name=INPUT, data_type=model_config_pb2.TYPE_UINT8, dims=self._shape_CHW)
            ],
            dynamic_batching=model_config_pb2.ModelDynamicBatching(),
        )
        if self._sold_output(caller) == LABELS:
            # Without its batch dimension an index has none left, and the format must have one: as long as 1, and
            # taken away again.
            output = found.output.add(name=LABELS, data_type=model_config_pb2.TYPE_INT64, dims=[1])
            output.reshape.SetInParent()
        else:
            found.output.add(
                name=PROBABILITIES, data_type=model_config_pb2.TYPE_FP32, dims=[len(self._engine.labels)]
            )
        terms = self._money_path.terms_of(caller)
        for name, value in (
            ("model_digest", self._engine.model_digest),
            ("labels", json.dumps(list(self._engine.labels), ensure_ascii=False)),
            ("top_k", terms.top_k),
            ("decimals", terms.decimals),
            ("window_batches", self._config.window_batches),
            ("max_message_bytes", self._config.max_message_bytes),
        ):
            if value is not None:
                found.parameters[name].string_value = str(value)
        return found

    async def answer(
        self, caller: Caller, request: service_pb2.ModelInferRequest, gone: Gone
    ) -> service_pb2.ModelInferResponse:
        """The paid answer of one batch. Raises Refusal; before the hold, unless a kept answer is of another kind."""
        self.check_named(request.model_name, request.model_version)
        if len(request.id) > MOST_ID_CHARACTERS:  # it is sent back, in a message whose size is promised
            _refuse("id", f"at most {MOST_ID_CHARACTERS} characters", f"{len(request.id)}")
        batch_id = _identifier(request, "idempotency_key") or uuid.uuid4().hex
        run_id = _identifier(request, "run_id") or DEFAULT_RUN_ID
        asked, unsold = self._asked_output(caller, request.outputs)
        images, misfit = self._images(request, self._money_path.max_batch_pictures(caller))
        try:
            batch = Batch(batch_id, images)
            result = await self._money_path.answer(caller, run_id, batch, gone, protocol="kserve", unsold=unsold)
        except Refusal as refusal:
            raise (misfit if misfit is not None and refusal.reason is Reason.INVALID_IMAGES else refusal) from None
        tensor = _tensor(result.answer, images.picture_count)
        if asked not in ("", tensor.name):  # the terms have changed since it was answered
            _refuse("outputs", f"{tensor.name!r}, which is kept for {batch_id}, or none by name", asked)
        return self._response(request, batch_id, result, tensor)

    def _response(
        self, request: service_pb2.ModelInferRequest, batch_id: str, result: wire.BatchResult, tensor: _Tensor
    ) -> service_pb2.ModelInferResponse:
        response = service_pb2.ModelInferResponse(
            model_name=self._config.model_name,
            model_version=VERSION,
            id=request.id,
            raw_output_contents=[tensor.raw],
        )
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        receipt = result.receipt
        response.parameters["charged"].int64_param = result.answer.charged_count
        response.parameters["balance"].int64_param = result.balance_count
        response.parameters["replayed"].bool_param = result.replayed
        response.parameters["receipt"].string_param = f"{receipt.account}:{receipt.sequence}:{receipt.head.hex()}"
        response.parameters["idempotency_key"].string_param = batch_id
        response.parameters["model_digest"].string_param = result.answer.model_digest
        # Of this very answer: a kept one has the policy that it was sold under.
        if result.answer.HasField("decimals"):
            response.parameters["decimals"].int64_param = result.answer.decimals
        if result.answer.WhichOneof("outcome") == "top_k":
            response.parameters["top_k"].int64_param = result.answer.top_k.named_count
        return response

    def _sold_output(self, caller: Caller) -> str:
        kind = policy.answer_kind(self._money_path.terms_of(caller))
        return LABELS if kind == wire.ANSWER_KIND_CLASS_INDICES else PROBABILITIES

    def _asked_output(self, caller: Caller, outputs: Sequence[Any]) -> tuple[str, Refusal | None]:
        """The one output asked for, empty where none is named; and why it is not sold, where it is not.

        Such a one may be in an answer that was sold under other terms.
        """
        sold = self._sold_output(caller)
        for output in outputs:
            if output.name in (LABELS, PROBABILITIES) and output.parameters:
                _refuse(f"outputs.{output.name}.parameters", "none", ", ".join(sorted(output.parameters)))
        names = {output.name for output in outputs}  # the same one twice is one, as with Triton
        if not names - {sold}:
            return (sold if names else ""), None
        strange = min(names - {sold})
        expected, got = f"{sold!r}, which is what this account is sold", strange[:_MOST_TOLD]
        unsold = Refusal.of(Reason.INVALID_REQUEST, field="outputs", expected=expected, got=got)
        if names not in ({LABELS}, {PROBABILITIES}):
            raise unsold
        return strange, unsold

    def _images(
        self, request: service_pb2.ModelInferRequest, most: int
    ) -> tuple[codec.ReceivedImages, Refusal | None]:
        """The pictures as our own protocol has them, so that digest and limits are the same on both.

        With the refusal of a shape that is not served: such a batch, sent raw, may have been paid for under another
        model.
        """
        if len(request.inputs) != 1:
            _refuse("inputs", f"one, {INPUT!r}", len(request.inputs))
        tensor = request.inputs[0]
        if tensor.name != INPUT:
            _refuse("inputs", repr(INPUT), tensor.name)
        field = f"inputs.{INPUT}"
        if tensor.datatype != "UINT8":
            _refuse(f"{field}.datatype", "UINT8", tensor.datatype)
        if tensor.parameters:
            _refuse(f"{field}.parameters", "none (no shared memory)", ", ".join(sorted(tensor.parameters)))
        shape = tuple(tensor.shape[:5])
        misfit = None
        if shape[1:] != self._shape_CHW or not 1 <= shape[0] <= most:
            expected = f"[N, {', '.join(map(str, self._shape_CHW))}] with N from 1 to {most}"
            got = f"[{', '.join(map(str, shape))}{', …' * (len(tensor.shape) > 5)}]"
            misfit = Refusal.of(Reason.INVALID_REQUEST, field=f"{field}.shape", expected=expected, got=got)
            # Typed values are converted one by one, before any limit is looked at: as many as are served, at most.
            if len(shape) != 4 or min(shape) < 1 or not request.raw_input_contents:
                raise misfit
        try:
            payload = _payload(request, tensor, math.prod(shape))
        except Refusal as refusal:
            raise (misfit or refusal) from None
        count, channels, height, width = shape
        return codec.ReceivedImages(wire.IMAGE_ENCODING_RAW_UINT8, count, channels, height, width, payload), misfit


class _Front:
    """One ModelStreamInfer stream. It ends with an error when the server drains.

    A stock client takes no notice of a stream that ends well: it would go on queueing requests that nobody reads.
    """

    def __init__(self, model: _Model) -> None:
        self._model = model

    async def begin(self, read: Callable[[], Awaitable[service_pb2.ModelInferRequest | None]]) -> None:
        return None

    def check(self, request: service_pb2.ModelInferRequest) -> None:
        return None

    async def answer(
        self, caller: Caller, request: service_pb2.ModelInferRequest, gone: Gone
    ) -> service_pb2.ModelStreamInferResponse:
        answer = await self._model.answer(caller, request, gone)
        return service_pb2.ModelStreamInferResponse(infer_response=answer)

    def refused(
        self, request: service_pb2.ModelInferRequest, refusal: Refusal
    ) -> service_pb2.ModelStreamInferResponse:
        # The stock client drops all but the text: code, id and reason must be in it.
        code = code_pb2.Code.Name(refusal.code)
        text = f"[{code}][request id: {request.id[:_MOST_TOLD] or _NO_REQUEST_ID}] {refusal}"
        answer = service_pb2.ModelInferResponse(id=request.id[:MOST_ID_CHARACTERS])
        return service_pb2.ModelStreamInferResponse(error_message=text, infer_response=answer)

    def draining(self) -> None:
        return None

    def drained(self) -> Refusal:
        return Refusal.of(Reason.DRAINING)


def _identifier(request: service_pb2.ModelInferRequest, name: str) -> str:
    """A parameter that is an id; empty where it is not given. Refusal: INVALID_REQUEST."""
    if name not in request.parameters:
        return ""
    value = request.parameters[name]
    if value.WhichOneof("parameter_choice") != "string_param":
        _refuse(f"parameters.{name}", "a string", value.WhichOneof("parameter_choice") or "nothing")
    check_identifier(f"parameters.{name}", value.string_param)
    return str(value.string_param)


def _payload(request: service_pb2.ModelInferRequest, tensor: Any, size: int) -> bytes:
    """The pixels, raw or typed; their number is checked before any is looked at. Refusal: INVALID_REQUEST."""
    raw = len(request.raw_input_contents)
    typed = tensor.contents.ListFields() if tensor.HasField("contents") else []
    if raw:
        if typed:
            _refuse(f"inputs.{INPUT}.contents", "nothing beside raw_input_contents", typed[0][0].name)
        if raw > 1:
            _refuse("raw_input_contents", "1 for the one input", raw)
        content: bytes = request.raw_input_contents[0]
        if len(content) != size:
            _refuse("raw_input_contents", f"{size} bytes", f"{len(content)} bytes")
        return content
    if [field.name for field, _ in typed] != ["uint_contents"]:
        got = ", ".join(field.name for field, _ in typed) or "neither"
        _refuse(f"inputs.{INPUT}", "raw_input_contents, or uint_contents alone", got)
    values = typed[0][1]
    if len(values) != size:
        _refuse(f"inputs.{INPUT}.contents.uint_contents", f"{size} values", f"{len(values)} values")
    pixels = np.array(values, dtype=np.uint32)
    if pixels.max() > 255:
        _refuse(f"inputs.{INPUT}.contents.uint_contents", "values from 0 to 255", int(pixels.max()))
    return pixels.astype(np.uint8).tobytes()


def _tensor(answer: wire.Answer, picture_count: int) -> _Tensor:
    """An answer as kept, as a tensor: of top-k answers the probability of every class that is not named is 0."""
    kind = answer.WhichOneof("outcome")
    if kind == "class_indices":
        indices_N = np.array(answer.class_indices.values, dtype="<i8")
        return _Tensor(LABELS, "INT64", (picture_count,), indices_N.tobytes())
    if kind == "probabilities":  # of a replay too: as many classes as it was answered with
        shape = (picture_count, answer.probabilities.class_count)
        return _Tensor(PROBABILITIES, "FP32", shape, answer.probabilities.values)
    sold_NK = codec.sold_probabilities(answer, picture_count=picture_count, class_count=answer.top_k.class_count)
    return _Tensor(PROBABILITIES, "FP32", sold_NK.shape, sold_NK.astype("<f4").tobytes())


def _statistics_message(name: str, counters: Counters) -> service_pb2.ModelStatistics:
    def duration(found: Duration) -> service_pb2.StatisticDuration:
        return service_pb2.StatisticDuration(count=found.count, ns=found.ns)

    return service_pb2.ModelStatistics(
        name=name,
        version=VERSION,
        last_inference=counters.last_inference_ms,
        inference_count=counters.inference_count,
        execution_count=counters.execution_count,
        inference_stats=service_pb2.InferStatistics(
            success=duration(counters.success),
            fail=duration(counters.fail),
            queue=duration(counters.queue),
            compute_input=duration(counters.compute_input),
            compute_infer=duration(counters.compute_infer),
            compute_output=duration(counters.compute_output),
            cache_hit=duration(counters.cache_hit),
            cache_miss=duration(counters.cache_miss),
        ),
        batch_stats=[
            service_pb2.InferBatchStatistics(
                batch_size=size,
                compute_input=duration(found.compute_input),
                compute_infer=duration(found.compute_infer),
                compute_output=duration(found.compute_output),
            )
            for size, found in sorted(counters.batches.items())
        ],
    )


def _told(text: str) -> str:
    return repr(text[:_MOST_TOLD])


def _refuse(field: str, expected: object, got: object) -> NoReturn:
    raise Refusal.of(Reason.INVALID_REQUEST, field=field, expected=expected, got=str(got)[:_MOST_TOLD])
