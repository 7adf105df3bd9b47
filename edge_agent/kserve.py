"""A teacher behind the KServe V2 protocol: Triton, OpenVINO Model Server, KServe and their like.

Shape letters: N pictures, C channels, H and W height and width, K classes.

Such a server counts nothing and knows no batch ids: whatever is sent once more may be computed once more. So the
agent counts what it sends (``outbox.PoolOutbox``), durably before it is sent, and this module sends nothing that the
outbox did not hand out, and nothing to a server that does not answer a question that is free.

What the pictures' tensor looks like and what the answers mean is taken from the server's metadata where that leaves
no choice, and from the section ``[teacher]`` of run.toml where it does.
"""

import hashlib
import json
import math
import queue
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from edge_agent.config import KServeConfig
from edge_agent.failures import BadInput
from edge_agent.journal import Batch
from edge_agent.teacher import (
    ENGINE_ATTEMPTS,
    MAX_MESSAGE_BYTES,
    MESSAGE_MARGIN_BYTES,
    Answered,
    Description,
    Link,
    Outbox,
    Patience,
    Refused,
    brief,
    is_loopback,
    open_channel,
)
from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire

SCHEMES = {"kserve": False, "kserves": True}
FORM = "HOST:PORT of a teacher-serve, or kserve://HOST:PORT/MODEL[/VERSION] (kserves:// for TLS) of another server"
WINDOW = 4  # calls at once: one is computed while others travel, and a server with a batcher has something to join
CALL_SECONDS = 120.0
LONGEST_PAUSE_SECONDS = 60.0  # every attempt costs pictures of the budget
UNLIMITED = 2**31 - 1
OUR_PLATFORM = "mekd"  # a server of this project: it knows batches by their ids

INPUT_TYPES = {"UINT8": "u1", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
REAL_TYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2"}
WHOLE_TYPES = {
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
}
# What a missing entry of [teacher] may hold.
_HINTS = {
    "layout": "NCHW or NHWC",
    "channels": "1 or 3",
    "scale": "of a white pixel: 255 or 1",
    "mean": "taken off on that scale, such as [0, 0, 0]",
    "std": "divided by, such as [1, 1, 1]",
    "output_kind": "logits, probabilities or labels",
    "classes": "how many",
}
_MODEL_FAILED = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@dataclass(frozen=True)
class Address:
    """Where a model is served."""

    host_port: str
    model: str
    version: str
    """Empty: the server chooses."""
    tls: bool

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises BadInput."""
        scheme, separator, rest = text.partition("://")
        host_port, _, path = rest.partition("/")
        model, _, version = path.partition("/")
        if not separator or scheme not in SCHEMES or not host_port or not model or "/" in version:
            raise BadInput(f"--teacher: expected {FORM}, got {text!r}")
        return cls(host_port, model, version, SCHEMES[scheme])

    def __str__(self) -> str:
        path = f"{self.model}/{self.version}" if self.version else self.model
        return f"kserve{'s' if self.tls else ''}://{self.host_port}/{path}"


def is_address(teacher: str) -> bool:
    """Whether ``--teacher`` names a server of this protocol, well or badly."""
    return "://" in teacher


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What goes into a model and what comes out of it. ``mean`` and ``std``: one number a channel."""

    input: str
    datatype: str
    batched: bool
    """Whether tensors have a first dimension N; a model without one takes a picture a call."""
    layout: str
    channels: int
    height: int
    width: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    output: str
    output_kind: str
    labels: tuple[str, ...]
    max_batch_pictures: int

    def picture_bytes(self) -> int:
        """Size of one picture in a request."""
        return self.channels * self.height * self.width * np.dtype(INPUT_TYPES[self.datatype]).itemsize

    def tensor(self, images_NCHW: codec.UInt8Array) -> npt.NDArray[Any]:
        """Pictures (uint8, N, C, H, W) as the model takes them, little-endian and contiguous."""
        values: npt.NDArray[Any] = images_NCHW if self.layout == "NCHW" else images_NCHW.transpose(0, 2, 3, 1)
        if self.datatype != "UINT8":
            per_channel = (-1, 1, 1) if self.layout == "NCHW" else (-1,)
            mean, std = (np.array(numbers, np.float32).reshape(per_channel) for numbers in (self.mean, self.std))
            values = (values * np.float32(self.scale / 255.0) - mean) / std
        return np.ascontiguousarray(values, dtype=INPUT_TYPES[self.datatype])

    def shape(self, count: int) -> list[int]:
        """The input tensor's shape for so many pictures."""
        sides = [self.height, self.width]
        one = [self.channels, *sides] if self.layout == "NCHW" else [*sides, self.channels]
        return [count, *one] if self.batched else one


def read_model(
    metadata: service_pb2.ModelMetadataResponse, config: model_config_pb2.ModelConfig | None, given: KServeConfig
) -> Reading:
    """What metadata, Triton's model configuration (None: the server has none) and [teacher] say together.

    Raises BadInput naming every entry that is missing, or the first that contradicts the metadata.
    """
    named = _labels_said(config)
    reader = _Reader(given, len(named))
    tensor = reader.choose("input", metadata.inputs)
    answers = reader.choose("output", metadata.outputs)
    reader.stop_if_missing()  # nothing else can be said before tensors are chosen
    assert tensor is not None and answers is not None
    if tensor.datatype not in INPUT_TYPES:
        raise BadInput(
            f"input {tensor.name}: expected a tensor of {', '.join(INPUT_TYPES)}, got {tensor.datatype}; "
            "this agent sends pixels, nothing else"
        )
    batched, max_batch_pictures, dims = _batching(tensor, config)
    layout = reader.layout(dims, _format(tensor.name, config))
    sizes: dict[str, int | None] = dict.fromkeys(("channels", "height", "width"))
    if layout is not None:
        order = ("channels", "height", "width") if layout == "NCHW" else ("height", "width", "channels")
        sizes = {name: reader.size(name, dim) for name, dim in zip(order, dims, strict=True)}
    scale, mean, std = reader.pixels(tensor.datatype)
    kind = reader.kind(answers)
    classes = reader.class_count(answers, kind, batched)
    reader.stop_if_missing()
    assert layout and kind and classes
    channels, height, width = sizes["channels"], sizes["height"], sizes["width"]
    assert channels and height and width
    if channels not in (1, 3):
        raise BadInput(f"input {tensor.name}: expected 1 or 3 channels, got {channels} in layout {layout}")
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) not in (1, channels):
            raise BadInput(f"teacher.{name}: expected 1 or {channels} numbers, got {len(numbers)}")
    return Reading(
        input=tensor.name,
        datatype=tensor.datatype,
        batched=batched,
        layout=layout,
        channels=channels,
        height=height,
        width=width,
        scale=scale,
        mean=mean if len(mean) == channels else mean * channels,
        std=std if len(std) == channels else std * channels,
        output=answers.name,
        output_kind=kind,
        labels=named if len(named) == classes else tuple(str(k) for k in range(classes)),
        max_batch_pictures=max_batch_pictures,
    )


class _Reader:
    """Takes each fact from the metadata or from [teacher], and remembers those that neither tells.

    ``named_classes``: how many classes the model's configuration names; 0: none.
    """

    def __init__(self, given: KServeConfig, named_classes: int) -> None:
        self._given = given
        self._named_classes = named_classes
        self._missing: dict[str, str] = {}

    def stop_if_missing(self) -> None:
        """Raises BadInput naming what is missing."""
        if self._missing:
            named = ", ".join(f"{name} ({hint})" if hint else name for name, hint in self._missing.items())
            raise BadInput(
                f"expected in the section [teacher] of run.toml, as the metadata leaves it open: {named}; "
                "got no such entries; add them"
            )

    def _miss(self, name: str, hint: str | None = None) -> None:
        self._missing[name] = _HINTS.get(name, "") if hint is None else hint

    def choose(self, what: str, tensors: Any) -> Any:
        """The tensor that [teacher] names, or the only one; None: to be named."""
        names = [tensor.name for tensor in tensors]
        wanted = getattr(self._given, what)
        if wanted:
            if wanted not in names:
                raise BadInput(f"teacher.{what}: expected one of {', '.join(names)}, got {wanted!r}")
            return tensors[names.index(wanted)]
        if len(names) == 1:
            return tensors[0]
        self._miss(what, f"one of {', '.join(names)}")
        return None

    def layout(self, dims: list[int], said: str) -> str | None:
        """NCHW or NHWC, from [teacher], the server's configuration, or the only dimension that can be channels."""
        if self._given.layout or said:
            return self._given.layout or said
        first, last = dims[0] in (1, 3), dims[2] in (1, 3)
        if first != last:
            return "NCHW" if first else "NHWC"
        self._miss("layout")
        return None

    def size(self, name: str, dim: int) -> int | None:
        """A dimension of the picture; -1 in the metadata is left open."""
        wanted = getattr(self._given, name)
        if dim > 0 and wanted not in (0, dim):
            raise BadInput(f"teacher.{name}: expected {dim}, as the model's metadata says, got {wanted}")
        if dim <= 0 and not wanted:
            self._miss(name)
        return dim if dim > 0 else wanted or None

    def pixels(self, datatype: str) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
        """Scale, mean and std. Bytes travel as they are; what a real number should be, no metadata tells."""
        given = self._given
        if datatype == "UINT8":
            if given.scale not in (0.0, 255.0) or any(given.mean) or any(number != 1.0 for number in given.std):
                raise BadInput(
                    "teacher.scale, mean and std: expected none for an input of UINT8, which takes pixels as they "
                    f"are, got scale {given.scale:g}, mean {list(given.mean)}, std {list(given.std)}"
                )
            return 255.0, (0.0,), (1.0,)
        for name in ("scale", "mean", "std"):
            if not getattr(given, name):
                self._miss(name)
        return given.scale, given.mean, given.std

    def kind(self, tensor: Any) -> str | None:
        """What the answers are: whole numbers are labels; a name that says it is believed."""
        real, whole = tensor.datatype in REAL_TYPES, tensor.datatype in WHOLE_TYPES
        if not (real or whole):
            raise BadInput(f"output {tensor.name}: expected a tensor of numbers, got {tensor.datatype}")
        kind = self._given.output_kind
        if kind in ("logits", "probabilities") and whole:
            raise BadInput(f"teacher.output_kind: expected labels for an output of {tensor.datatype}, got {kind!r}")
        if kind or whole:
            return kind or "labels"
        if tensor.name.lower() in ("logits", "probabilities"):
            return str(tensor.name.lower())
        self._miss("output_kind")
        return None

    def class_count(self, tensor: Any, kind: str | None, batched: bool) -> int | None:
        """K: the output's last dimension, or [teacher]'s where that is open or answers are labels."""
        wanted = self._given.classes
        if kind is None:
            return None
        dims = list(tensor.shape[1:] if batched else tensor.shape)
        while len(dims) > 1 and dims[-1] == 1:  # convolutional heads answer K x 1 x 1
            dims.pop()
        if kind == "labels":
            if math.prod(dims) not in (1, -1):
                raise BadInput(
                    f"output {tensor.name}: expected one label a picture, got the shape {list(tensor.shape)}"
                )
            if not (wanted or self._named_classes):
                self._miss("classes")
            return wanted or self._named_classes or None
        if len(dims) != 1 or dims[0] in (0, 1):
            raise BadInput(
                f"output {tensor.name}: expected a number for each of two or more classes, "
                f"got the shape {list(tensor.shape)}"
            )
        if dims[0] > 0 and wanted not in (0, dims[0]):
            raise BadInput(f"teacher.classes: expected {dims[0]}, as the model's metadata says, got {wanted}")
        if dims[0] < 0 and not wanted:
            self._miss("classes")
        return dims[0] if dims[0] > 0 else wanted or None


def _batching(tensor: Any, config: model_config_pb2.ModelConfig | None) -> tuple[bool, int, list[int]]:
    """Whether there is a batch dimension, the most pictures it takes, and a picture's dimensions."""
    shape = list(tensor.shape)
    if len(shape) == 3 and not (config is not None and config.max_batch_size > 0):
        return False, 1, shape
    if len(shape) != 4:
        raise BadInput(f"input {tensor.name}: expected pictures, 3 dimensions and the batch, got the shape {shape}")
    if config is not None and config.max_batch_size > 0:
        return True, config.max_batch_size, shape[1:]
    if shape[0] > 1:
        raise BadInput(
            f"input {tensor.name}: expected a batch of any size, or of 1, got always {shape[0]} pictures; "
            "have the model served with a batch dimension"
        )
    return True, UNLIMITED if shape[0] < 1 else 1, shape[1:]


def _format(name: str, config: model_config_pb2.ModelConfig | None) -> str:
    """The layout that Triton's model configuration declares; empty where it does not."""
    formats = model_config_pb2.ModelInput
    for tensor in config.input if config is not None else ():
        if tensor.name == name:
            return {formats.FORMAT_NCHW: "NCHW", formats.FORMAT_NHWC: "NHWC"}.get(tensor.format, "")
    return ""


def _parameter(config: model_config_pb2.ModelConfig | None, name: str) -> str:
    """A parameter of Triton's model configuration; empty where it has none of this name."""
    return str(config.parameters[name].string_value) if config is not None and name in config.parameters else ""


def _labels_said(config: model_config_pb2.ModelConfig | None) -> tuple[str, ...]:
    """The classes' names in the configuration's parameter ``labels``, a JSON list; empty where there is none."""
    try:
        names = json.loads(_parameter(config, "labels") or "[]")
    except ValueError:
        return ()
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return tuple(names) if fine and len(names) >= 2 else ()


class KServeTeacher:
    """A model behind the KServe V2 protocol.

    Args:
        address: ``kserve://HOST:PORT/MODEL[/VERSION]``.
        given: section ``[teacher]``.
        api_key: travels as ``authorization: Bearer KEY``; None: nothing does.
        tls_ca: authority of the server's certificate, for ``kserves://``; None: those that gRPC knows.
        tls_pair: this device's own certificate and its private key, PEM; None: it shows none.
        insecure: a key may travel unencrypted beyond loopback.
        wait_seconds: how long the teacher may be away before TeacherAway.
        check_egress: sees every batch just before it leaves, and raises to keep it here (``egress``).
        tell: gets one line when a person should know something.
    """

    def __init__(
        self,
        address: str,
        given: KServeConfig,
        *,
        api_key: str | None = None,
        tls_ca: Path | None = None,
        tls_pair: tuple[Path, Path] | None = None,
        insecure: bool = False,
        wait_seconds: float = 600.0,
        check_egress: Callable[[wire.Batch], None],
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._address = Address.parse(address)
        self._given = given
        self._wait_seconds = wait_seconds
        self._check_egress = check_egress
        self._tell = tell
        if tls_ca is not None and not self._address.tls:
            raise BadInput(f"--tls-ca: expected kserves:// for an encrypted connection, got {address}")
        if tls_pair is not None and not self._address.tls:
            raise BadInput(f"--tls-cert: expected kserves:// for an encrypted connection, got {address}")
        if api_key is not None and not (self._address.tls or insecure or is_loopback(self._address.host_port)):
            raise BadInput(
                f"--teacher {address} is not loopback: give kserves://, "
                "or --insecure if the key may travel unencrypted"
            )
        self._link = Link(address, api_key=api_key, wait_seconds=wait_seconds, tell=tell)
        # Without pings: servers of gRPC's defaults end a connection that pings during a long call.
        self._channel = open_channel(
            self._address.host_port,
            tls=self._address.tls,
            tls_ca=tls_ca,
            tls_pair=tls_pair,
            insecure=True,  # a key's way was looked at above; without one nothing here is secret
            keepalive=False,
            retries=False,  # every sending is counted, so none happens behind our back
        )
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._reading: Reading | None = None
        self._versions: tuple[str, ...] = ()
        self._said_digest = ""
        self._knows_ids = False
        self._run_id = ""

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def describe(self) -> Description:
        digest, reading = self._read()
        if not self._said_digest:
            self._tell(
                f"{self._address} does not tell its weights: a change is noticed only in its metadata, its version "
                "or [teacher]"
            )
        self._tell(f"{self._address}: every picture sent counts against the budget, resends too")
        if reading.max_batch_pictures == 1:
            self._tell(f"{self._address} takes one picture a call, which is slow; a batch dimension would help")
        return Description(
            model_digest=digest,
            labels=reading.labels,
            channels=reading.channels,
            height=reading.height,
            width=reading.width,
            max_batch_pictures=_most_pictures(reading),
            indices_only=reading.output_kind == "labels",
        )

    def message_bytes(self, batch: Batch) -> int:
        assert self._reading is not None
        payload_bytes = batch.picture_count * self._reading.picture_bytes()
        length_bytes = max(1, -(-payload_bytes.bit_length() // 7))
        return int(self._head(batch, self._reading).ByteSize()) + 1 + length_bytes + payload_bytes

    def answers(self, run_id: str, model_digest: str, outbox: Outbox) -> Iterator[Answered | Refused]:
        self._run_id = run_id
        calls = _Calls()
        patience = Patience(self._wait_seconds, LONGEST_PAUSE_SECONDS)
        attempts: dict[str, int] = {}
        reading = self._same_model(model_digest)
        outbox.limit(_most_pictures(reading))
        window, most = 1, WINDOW  # it grows with every answer: a wrong setting or an overload costs one batch
        failed: list[tuple[Batch, Any]] = []
        problem: BadInput | None = None  # with an answer; those under way with it are paid for, and kept first
        try:
            while True:
                # Once one has failed nothing is sent until all is settled: it would likely fail too, and it is paid.
                fine = not failed and problem is None
                while fine and len(calls) < window and (batch := outbox.next_batch()) is not None:
                    calls.add(batch, self._sent(batch, reading))
                if calls:
                    batch, call = calls.next()
                    if call.code() is grpc.StatusCode.OK:
                        patience.renew()
                        window = min(window + 1, most)
                        try:
                            answered = self._answered(batch, call.result(), reading, model_digest)
                        except BadInput as error:
                            problem = problem or error
                        else:
                            yield answered
                    else:
                        failed.append((batch, call))
                    continue
                if problem is not None:
                    raise problem
                if not failed:
                    return
                if any(call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED for _, call in failed):
                    most = max(1, window - 1)  # a limit on what is under way, most likely: each try beyond it is paid
                pauses: dict[float, Any] = {}
                for batch, call in failed:
                    outcome = self._outcome(batch, call, attempts)
                    if isinstance(outcome, Refused):
                        yield outcome
                    elif outbox.again(batch):
                        pauses[outcome] = call
                failed = []
                if pauses:
                    self._link.sleep(pauses[max(pauses)], patience, at_least_seconds=max(pauses))
                    reading = self._same_model(model_digest)  # answers before anything is sent again
                    outbox.limit(_most_pictures(reading))
                    window = 1
        finally:
            calls.cancel()

    def _sent(self, batch: Batch, reading: Reading) -> Any:
        message = wire.Batch.FromString(batch.request)
        self._check_egress(message)  # the last line before the network; the tensor is made of this very message
        images_NCHW = codec.decode_images(message.images)
        if images_NCHW.shape[1:] != (reading.channels, reading.height, reading.width):
            raise BadInput(
                f"{self._address}: expected pictures of {reading.channels} x {reading.height} x {reading.width}, the "
                f"journal has {' x '.join(map(str, images_NCHW.shape[1:]))}; give another --run-dir"
            )
        request = self._head(batch, reading)
        request.raw_input_contents.append(reading.tensor(images_NCHW).tobytes())
        return self._stub.ModelInfer.future(request, metadata=self._link.metadata, timeout=CALL_SECONDS)

    def _head(self, batch: Batch, reading: Reading) -> Any:
        """All of a request but its pixels."""
        request = service_pb2.ModelInferRequest(
            model_name=self._address.model, model_version=self._address.version, id=batch.batch_id
        )
        request.inputs.add(name=reading.input, datatype=reading.datatype, shape=reading.shape(batch.picture_count))
        request.outputs.add(name=reading.output)
        if self._knows_ids:  # others may refuse a parameter that they do not know
            request.parameters["idempotency_key"].string_param = batch.batch_id
            request.parameters["run_id"].string_param = self._run_id
        return request

    def _answered(self, batch: Batch, response: Any, reading: Reading, model_digest: str) -> Answered:
        """The answer as our own teacher would have given it. Raises BadInput where it is none."""
        if response.model_version and self._versions and response.model_version not in self._versions:
            raise BadInput(
                f"this run began with version {', '.join(self._versions)} of {self._address}, batch {batch.batch_id} "
                f"was answered by version {response.model_version}; give another --run-dir to distil the new one"
            )
        if "model_digest" in response.parameters:
            said = response.parameters["model_digest"].string_param
            if self._said_digest and said != self._said_digest:
                raise BadInput(
                    f"this run began with the model {self._said_digest} of {self._address}, "
                    f"batch {batch.batch_id} was answered by {said}; give another --run-dir to distil the new one"
                )
        answer = wire.Answer(model_digest=model_digest, charged_count=batch.picture_count)
        images = wire.Batch.FromString(batch.request).images
        answer.pixel_digest = codec.pixel_digest(codec.decode_images(images))
        try:
            values = _values(response, reading.output)
            # Of others, parameters of these names may mean anything.
            decimals, top_k = _policy(response) if self._knows_ids else (None, None)
            if decimals is not None or top_k is not None:
                _put_sold(answer, values, batch.picture_count, reading, decimals, top_k)
            elif reading.output_kind == "labels":
                indices_N = _labels(values, batch.picture_count, len(reading.labels))
                answer.class_indices.CopyFrom(codec.encode_class_indices(indices_N, len(reading.labels)))
            else:
                rows_NK = _probabilities(values, batch.picture_count, reading)
                answer.probabilities.CopyFrom(codec.encode_probabilities(rows_NK))
        except ValueError as error:
            raise BadInput(
                f"{self._address}: the answer in {reading.output}, read as {reading.output_kind}, is not one: {error}"
            ) from None
        result = wire.BatchResult(batch_id=batch.batch_id, answer=answer)
        return Answered(batch, result, received_bytes=response.ByteSize())

    def _outcome(self, batch: Batch, call: Any, attempts: dict[str, int]) -> Refused | float:
        """What becomes of a failed call: a refusal for good, or the seconds to wait at least. Raises Failure."""
        refusal = _refusal(call)
        if refusal is not None and refusal.retry_seconds is not None:
            return refusal.retry_seconds
        if refusal is not None and refusal.reason in (Reason.BUDGET_EXHAUSTED, Reason.ANSWER_EXPIRED):
            return Refused(batch, refusal)
        if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise BadInput(
                f"the teacher at {self._address} refuses: {brief(call)}; where messages are too large, "
                f"--set batch_pictures=N makes them smaller (this one had {batch.picture_count} pictures)"
            )
        self._link.raise_if_final(call)
        if call.code() in _MODEL_FAILED:
            attempts[batch.batch_id] = attempts.get(batch.batch_id, 0) + 1
            if attempts[batch.batch_id] >= ENGINE_ATTEMPTS:
                raise BadInput(
                    f"the teacher at {self._address} failed {ENGINE_ATTEMPTS} times on the same batch: {brief(call)}"
                )
        return 0.0

    def _same_model(self, model_digest: str) -> Reading:
        """Asks what is served. Raises BadInput where it is not what this run began with."""
        digest, reading = self._read()
        if digest != model_digest:
            raise BadInput(
                f"this run began with the model {model_digest}, {self._address} with this [teacher] is {digest}; "
                "nothing was sent to it. Give another --run-dir to distil the new one"
            )
        return reading

    def _read(self) -> tuple[str, Reading]:
        name, version = self._address.model, self._address.version
        metadata = self._link.unary(
            self._stub.ModelMetadata, service_pb2.ModelMetadataRequest(name=name, version=version)
        )
        config = self._config()
        try:
            reading = read_model(metadata, config, self._given)
        except BadInput as problem:
            raise BadInput(f"{self._address}: {problem}") from None
        self._reading, self._versions = reading, tuple(metadata.versions)
        self._said_digest = _parameter(config, "model_digest")
        self._knows_ids = metadata.platform == OUR_PLATFORM
        return _digest(metadata, self._said_digest, reading), reading

    def _config(self) -> model_config_pb2.ModelConfig | None:
        """Triton's model configuration; None where the server has no such call."""
        request = service_pb2.ModelConfigRequest(name=self._address.model, version=self._address.version)
        try:
            return self._link.unary(self._stub.ModelConfig, request).config
        except BadInput:  # it is an extension: UNIMPLEMENTED elsewhere
            return None


class _Calls:
    """Calls under way, and those that have ended in the order of their ends."""

    def __init__(self) -> None:
        self._batches: dict[Any, Batch] = {}
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, batch: Batch, call: Any) -> None:
        self._batches[call] = batch
        call.add_done_callback(self._ended.put)

    def next(self) -> tuple[Batch, Any]:
        """Waits for one; each has a deadline, so this ends."""
        call = self._ended.get()
        return self._batches.pop(call), call

    def cancel(self) -> None:
        for call in self._batches:
            call.cancel()


def _digest(metadata: Any, said: str, reading: Reading) -> str:
    """What stands for the model's digest. The weights are unknown, so it is named differently than our teacher's.

    ``said``: a digest of weights in the configuration's parameter ``model_digest``, where somebody put one.
    """
    tensors = {
        name: [[tensor.name, tensor.datatype, list(tensor.shape)] for tensor in getattr(metadata, name)]
        for name in ("inputs", "outputs")
    }
    read = asdict(reading)
    del read["max_batch_pictures"]  # an operator may tune it, the model stays the same
    facts = {
        "name": metadata.name,
        "versions": sorted(metadata.versions),
        "platform": metadata.platform,
        "model_digest": said,
        **tensors,
        "reading": read,
    }
    return f"metadata-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}"


def _most_pictures(reading: Reading) -> int:
    """In one call: an operator may tune it while a run goes on."""
    fitting = (MAX_MESSAGE_BYTES - MESSAGE_MARGIN_BYTES) // reading.picture_bytes()
    return max(1, min(reading.max_batch_pictures, fitting))


def _refusal(call: Any) -> Refusal | None:
    """The refusal of a server of this project; None of any other."""
    for key, value in call.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            try:
                refusal = Refusal.from_status(Status.FromString(value))
            except DecodeError:
                return None
            return None if refusal.reason is Reason.UNKNOWN else refusal
    return None


def _values(response: Any, name: str) -> npt.NDArray[Any]:
    """One output tensor, real or whole numbers. Raises ValueError."""
    names = [tensor.name for tensor in response.outputs]
    if name not in names:
        raise ValueError(f"expected an output {name}, got {', '.join(names) or 'none'}")
    place = names.index(name)
    tensor = response.outputs[place]
    dtype = (REAL_TYPES | WHOLE_TYPES).get(tensor.datatype)
    if dtype is None:
        raise ValueError(f"expected numbers, got {tensor.datatype}")
    if response.raw_output_contents:
        if len(response.raw_output_contents) != len(names):
            raise ValueError(f"expected {len(names)} tensors, got {len(response.raw_output_contents)}")
        raw = response.raw_output_contents[place]
        if len(raw) % np.dtype(dtype).itemsize:
            raise ValueError(f"expected whole numbers of {np.dtype(dtype).itemsize} bytes, got {len(raw)} bytes")
        values = np.frombuffer(raw, dtype)
        if tensor.datatype == "BF16":  # the upper half of a binary32
            values = (values.astype("<u4") << 16).view("<f4")
    else:
        filled = [list(content) for _, content in tensor.contents.ListFields()]
        values = np.array(filled[0] if filled else [])
    if values.size != math.prod(tensor.shape) or min(tensor.shape, default=1) < 0:
        raise ValueError(f"expected the numbers of a tensor {list(tensor.shape)}, got {values.size}")
    return values.reshape(tensor.shape)


def _labels(values: npt.NDArray[Any], count: int, classes: int) -> codec.Int64Array:
    """Class indices (N,) of a tensor (N,), (N, 1) or alike. Raises ValueError."""
    if values.size != count:
        raise ValueError(f"expected {count} labels, got a tensor {list(values.shape)}")
    flat_N = values.reshape(count)
    if not (np.isfinite(flat_N).all() and (flat_N == np.floor(flat_N)).all()):
        raise ValueError("expected whole numbers, got others")
    if flat_N.min() < 0 or flat_N.max() >= classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {flat_N.min()} to {flat_N.max()}")
    return flat_N.astype(np.int64)


def _policy(response: Any) -> tuple[int | None, int | None]:
    """Decimals and classes named of an answer, as a server of this project says; None: nothing was taken away."""
    decimals, top_k = (
        int(response.parameters[name].int64_param) if name in response.parameters else None
        for name in ("decimals", "top_k")
    )
    return decimals, top_k


def _put_sold(
    answer: wire.Answer,
    values: npt.NDArray[Any],
    count: int,
    reading: Reading,
    decimals: int | None,
    top_k: int | None,
) -> None:
    """Puts probabilities into an answer as they were sold, with what the policy took away. Raises ValueError.

    Which of the classes at 0 a top-k answer named is lost in a tensor, and makes no difference to what is decoded.
    """
    if reading.output_kind != "probabilities":
        raise ValueError("expected output_kind probabilities of answers that are rounded or top-k")
    rows_NK = _rows(values, count, reading).astype(np.float32)
    if top_k is None:
        answer.probabilities.CopyFrom(codec.encode_probabilities(rows_NK))
    else:
        named = int((rows_NK != 0).sum(axis=1).max())
        if not max(1, named) <= top_k <= rows_NK.shape[1]:
            raise ValueError(f"expected {top_k} classes named of {rows_NK.shape[1]}, got {named} that are not 0")
        indices_NJ = np.argsort(-rows_NK, axis=1, kind="stable")[:, :top_k]
        values_NJ = np.take_along_axis(rows_NK, indices_NJ, axis=1)
        answer.top_k.CopyFrom(codec.encode_top_k(indices_NJ, values_NJ, rows_NK.shape[1]))
    if decimals is not None:
        answer.decimals = decimals
    codec.decode_answer(answer, picture_count=count, class_count=rows_NK.shape[1])


def _probabilities(values: npt.NDArray[Any], count: int, reading: Reading) -> codec.Float32Array:
    """Probabilities (N, K) as float32; logits become some by softmax, in double precision. Raises ValueError."""
    rows_NK = _rows(values, count, reading)
    sums_N = rows_NK.sum(axis=1)
    if reading.output_kind == "logits":
        # Of one picture or two, logits may look so by chance.
        if count >= 16 and rows_NK.min() >= 0.0 and np.abs(sums_N - 1.0).max() <= codec.SUM_TOLERANCE:
            raise ValueError(
                "expected logits, got numbers of at least 0 that sum to 1 for each picture; they are probabilities: "
                "say so, output_kind"
            )
        rows_NK = np.exp(rows_NK - rows_NK.max(axis=1, keepdims=True))
        rows_NK /= rows_NK.sum(axis=1, keepdims=True)
    else:
        worst = float(sums_N[np.abs(sums_N - 1.0).argmax()])
        if rows_NK.min() < 0.0 or abs(worst - 1.0) > codec.SUM_TOLERANCE:
            raise ValueError(
                "expected numbers of at least 0 that sum to 1 for each picture, got a smallest of "
                f"{rows_NK.min():.6g} and a sum of {worst:.6g}; if they are logits, say so: output_kind"
            )
    return rows_NK.astype(np.float32)


def _rows(values: npt.NDArray[Any], count: int, reading: Reading) -> npt.NDArray[np.float64]:
    """A tensor's finite numbers as (N, K). Raises ValueError."""
    classes = len(reading.labels)
    expected = [count, classes] if reading.batched else [classes]
    got = list(values.shape)
    while len(got) > len(expected) and got[-1] == 1:
        got.pop()
    if got != expected:
        raise ValueError(f"expected a tensor {expected}, got {list(values.shape)}")
    rows_NK = values.reshape(count, classes).astype(np.float64)
    if not np.isfinite(rows_NK).all():
        raise ValueError("expected finite numbers, got others")
    return rows_NK
