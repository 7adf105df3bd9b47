"""One way of speaking to the server for each protocol, so that one test body can run on all of them."""

import asyncio
import re
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferResult, service_pb2

from protos import codec
from protos.errors import Reason, Refusal
from tests.teacher_service.parts import TIMEOUT_SECONDS, Service, Stream, refusal_of


@dataclass
class Result:
    """A paid answer, whatever protocol it came by."""

    batch_id: str
    name: str
    values: np.ndarray
    charged: int
    balance: int
    replayed: bool
    receipt: str
    model_digest: str

    @property
    def answer(self) -> tuple[Any, ...]:
        """What a repeat must get again, bit for bit."""
        return self.name, self.values.dtype, self.values.tobytes(), self.charged, self.receipt, self.model_digest


@dataclass
class Refused:
    batch_id: str
    reason: Reason
    message: str


class Lane:
    """Batches to the server and what comes back, in whatever order it comes."""

    async def send(self, batch_id: str, images: np.ndarray) -> None:
        raise NotImplementedError

    async def outcome(self) -> Result | Refused:
        raise NotImplementedError

    async def ended_by(self) -> Reason:
        """Waits for the refusal that ends the lane."""
        raise NotImplementedError

    def leave(self) -> None:
        """The caller goes away."""
        raise NotImplementedError

    async def result(self) -> Result:
        found = await self.outcome()
        assert isinstance(found, Result), found
        return found

    async def refusal(self, batch_id: str) -> Refused:
        found = await self.outcome()
        assert isinstance(found, Refused), found
        assert found.batch_id == batch_id
        return found

    async def ask(self, batch_id: str, images: np.ndarray) -> Result:
        await self.send(batch_id, images)
        return await self.result()


class MekdLane(Lane):
    """TeacherInference.Infer."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.call = stream.call

    async def send(self, batch_id: str, images: np.ndarray) -> None:
        await self.stream.send(batch_id, images)

    async def outcome(self) -> Result | Refused:
        response = await self.stream.receive()
        while response.WhichOneof("payload") == "draining":
            response = await self.stream.receive()
        if response.WhichOneof("payload") == "refusal":
            refusal = Refusal.from_status(response.refusal.status)
            return Refused(response.refusal.batch_id, refusal.reason, refusal.message)
        found = response.result
        answer, receipt = found.answer, found.receipt
        kind = answer.WhichOneof("outcome")
        if kind == "class_indices":
            name, values = "labels", np.array(answer.class_indices.values, np.int64)
        else:
            name = "probabilities"
            count = answer.charged_count
            values = codec.sold_probabilities(answer, picture_count=count, class_count=_class_count(answer))
        return Result(
            found.batch_id,
            name,
            values,
            answer.charged_count,
            found.balance_count,
            found.replayed,
            f"{receipt.account}:{receipt.sequence}:{receipt.head.hex()}",
            answer.model_digest,
        )

    async def ended_by(self) -> Reason:
        return (await self.stream.ended_by()).reason

    def leave(self) -> None:
        self.call.cancel()


class KserveStreamLane(Lane):
    """ModelStreamInfer."""

    def __init__(self, service: Service, run_id: str, key: str | None) -> None:
        self._run_id = run_id
        self.call = service.kserve.ModelStreamInfer(metadata=service.metadata(key))
        service.streams.append(Stream(self.call))

    async def send(self, batch_id: str, images: np.ndarray) -> None:
        await self.call.write(infer_request(batch_id, images, self._run_id))

    async def outcome(self) -> Result | Refused:
        response = await asyncio.wait_for(self.call.read(), TIMEOUT_SECONDS)
        assert response is not grpc.aio.EOF, await self.call.code()
        found = response.infer_response
        if not response.error_message:
            return kserve_result(found)
        told = re.fullmatch(r"\[([A-Z_]+)\]\[request id: (.*?)\] ([A-Z_]+): (.*)", response.error_message)
        assert told is not None and told[2] == found.id, response
        return Refused(found.id, Reason[told[3]], told[4])

    async def ended_by(self) -> Reason:
        return (await Stream(self.call).ended_by()).reason

    def leave(self) -> None:
        self.call.cancel()


class KserveUnaryLane(Lane):
    """ModelInfer, as many calls as there are batches."""

    def __init__(self, service: Service, run_id: str, key: str | None) -> None:
        self._service = service
        self._run_id = run_id
        self._key = key
        self._calls: list[Any] = []
        self._ended: asyncio.Queue[Result | Refused] = asyncio.Queue()
        self._waiting: set[asyncio.Task[None]] = set()

    async def send(self, batch_id: str, images: np.ndarray) -> None:
        request = infer_request(batch_id, images, self._run_id)
        call = self._service.kserve.ModelInfer(request, metadata=self._service.metadata(self._key))
        self._calls.append(call)
        task = asyncio.create_task(self._wait(batch_id, call))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _wait(self, batch_id: str, call: Any) -> None:
        try:
            found: Result | Refused = kserve_result(await call)
        except grpc.aio.AioRpcError as error:
            refusal = refusal_of(error)
            found = Refused(batch_id, refusal.reason, refusal.message)
        await self._ended.put(found)

    async def outcome(self) -> Result | Refused:
        return await asyncio.wait_for(self._ended.get(), TIMEOUT_SECONDS)

    async def ended_by(self) -> Reason:
        found = await self.outcome()
        assert isinstance(found, Refused), found
        return found.reason

    def leave(self) -> None:
        for call in self._calls:
            call.cancel()


KINDS = ("mekd", "kserve stream", "kserve")
every_protocol = pytest.mark.parametrize("protocol", KINDS)
every_stream = pytest.mark.parametrize("protocol", KINDS[:2])


async def lane(protocol: str, service: Service, run_id: str = "run", key: str | None = None) -> Lane:
    """Ready for batches."""
    if protocol == "mekd":
        stream = service.open(key)
        await stream.configure(run_id)
        return MekdLane(stream)
    return (KserveStreamLane if protocol == "kserve stream" else KserveUnaryLane)(service, run_id, key)


def infer_request(batch_id: str, images: np.ndarray, run_id: str = "", **more: Any) -> Any:
    """A ModelInferRequest with a key of the caller's own, which is its id too."""
    request = service_pb2.ModelInferRequest(
        model_name="teacher", id=batch_id, raw_input_contents=[images.tobytes()], **more
    )
    request.inputs.add(name="images", datatype="UINT8", shape=images.shape)
    if batch_id:
        request.parameters["idempotency_key"].string_param = batch_id
    if run_id:
        request.parameters["run_id"].string_param = run_id
    return request


def kserve_result(response: Any) -> Result:
    """A ModelInferResponse, by way of the stock client's own reading of it."""
    (output,) = response.outputs
    values = InferResult(response).as_numpy(output.name)
    said = response.parameters
    return Result(
        response.id,
        output.name,
        values,
        said["charged"].int64_param,
        said["balance"].int64_param,
        said["replayed"].bool_param,
        said["receipt"].string_param,
        said["model_digest"].string_param,
    )


def _class_count(answer: Any) -> int:
    return int(getattr(answer, answer.WhichOneof("outcome")).class_count)
