"""A teacher behind the KServe V2 protocol: Triton, OpenVINO Model Server, KServe and their like.

Shape letters: N pictures, C channels, H and W height and width, K classes.

Such a server counts nothing and knows no batch ids: whatever is sent once more may be computed once more. So the
agent counts what it sends (``outbox.PoolOutbox``), durably before it is sent, and this module sends nothing that the
outbox did not hand out, and nothing to a server that does not answer a question that is free.

What its tensors look like is read in ``kserve_reading``, its answers in ``kserve_answers``.
"""

import hashlib
import json
import queue
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from edge_agent.config import KServeConfig
from edge_agent.failures import BadInput
from edge_agent.journal import Batch
from edge_agent.kserve_answers import put_answer
from edge_agent.kserve_reading import Reading, parameter, read_model
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
OUR_PLATFORM = "mekd"  # a server of this project: it knows batches by their ids

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
            put_answer(answer, response, reading, count=batch.picture_count, of_ours=self._knows_ids)
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
        self._said_digest = parameter(config, "model_digest")
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
