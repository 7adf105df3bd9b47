"""A server of the KServe V2 protocol in this process, whose model and whose faults each test writes down."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from benchmarks.services import lasting_address
from edge_agent.config import KServeConfig
from edge_agent.kserve_reading import Reading, read_model

TYPES = {"UINT8": "u1", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT32": "<i4"}
CLASSES = 4
# A model's tensors as its metadata names them.
PICTURES = [("x", "UINT8", [-1, 3, 32, 32])]
ROWS = [("y", "FP32", [-1, 10])]


def logits_of(images_NCHW: np.ndarray) -> np.ndarray:
    """What the model thinks of pictures (uint8): (N, CLASSES), different for different pictures."""
    flat_NP = images_NCHW.reshape(len(images_NCHW), -1).astype(np.float64) / 255
    weights_PK = np.random.default_rng(7).normal(size=(flat_NP.shape[1], CLASSES)) / np.sqrt(flat_NP.shape[1])
    return 4 * flat_NP @ weights_PK


def probabilities_of(images_NCHW: np.ndarray) -> np.ndarray:
    exponentials_NK = np.exp(logits_of(images_NCHW))
    return exponentials_NK / exponentials_NK.sum(axis=1, keepdims=True)


class Model(service_pb2_grpc.GRPCInferenceServiceServicer):
    """One model of small pictures; whatever arrives is turned back into bytes and noted."""

    def __init__(self, **changes: Any) -> None:
        self.name = "m"
        self.versions = ["1"]
        self.platform = "fake"
        self.datatype = "UINT8"
        self.layout = "NCHW"
        self.sizes = (1, 8, 8)
        self.batch = -1  # first dimension in the metadata; None: there is none
        self.max_batch: int | None = 64  # None: a server without ModelConfig
        self.format: str | None = None
        self.digest = ""  # that the configuration tells of the weights
        self.scale, self.mean, self.std = 255.0, 0.0, 1.0
        self.output, self.kind, self.answer_type = "output", "logits", "FP32"
        self.raw = True
        self.before: Callable[[int, Any], None] = lambda number, context: None
        self.change: Callable[[Any], None] = lambda response: None
        self.calls = 0
        self.received_pictures = 0
        self.received: list[np.ndarray] = []
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self._lock = Lock()
        for name, value in changes.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def ModelMetadata(self, request, context):
        self.metadata.append(dict(context.invocation_metadata()))
        if request.name != self.name or (request.version and request.version not in self.versions):
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        answer = service_pb2.ModelMetadataResponse(name=self.name, versions=self.versions, platform=self.platform)
        answer.inputs.add(name="pictures", datatype=self.datatype, shape=self._batched(self._picture_shape()))
        answer.outputs.add(name=self.output, datatype=self.answer_type, shape=self._batched(self._answer_shape()))
        return answer

    def ModelConfig(self, request, context):
        if self.max_batch is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not implemented!")
        answer = service_pb2.ModelConfigResponse()
        answer.config.max_batch_size = self.max_batch
        if self.digest:
            answer.config.parameters["model_digest"].string_value = self.digest
        tensor = answer.config.input.add(name="pictures")
        if self.format is not None:
            tensor.format = type(tensor).Format.Value(f"FORMAT_{self.format}")
        return answer

    def ModelInfer(self, request, context):
        images_NCHW = self._images(request)
        with self._lock:
            self.calls += 1
            number = self.calls
            self.received_pictures += len(images_NCHW)
            self.received.append(images_NCHW)
            self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.before(number, context)
        answer = self._answer(images_NCHW)
        response = service_pb2.ModelInferResponse(
            model_name=self.name, model_version=self.versions[-1], id=request.id
        )
        tensor = response.outputs.add(name=self.output, datatype=self.answer_type, shape=answer.shape)
        if self.raw:
            response.raw_output_contents.append(answer.tobytes())
        elif self.kind == "labels":
            tensor.contents.int64_contents.extend(answer.ravel().tolist())
        else:
            tensor.contents.fp32_contents.extend(answer.ravel().tolist())
        self.change(response)
        return response

    def _batched(self, shape: list[int]) -> list[int]:
        return shape if self.batch is None else [self.batch, *shape]

    def _picture_shape(self) -> list[int]:
        channels, height, width = self.sizes
        return [channels, height, width] if self.layout == "NCHW" else [height, width, channels]

    def _answer_shape(self) -> list[int]:
        if self.kind == "labels":
            return [] if self.batch is not None else [1]
        return [CLASSES]

    def _images(self, request: Any) -> np.ndarray:
        """The pictures (uint8, N, C, H, W) that a request stands for."""
        (tensor,), (raw,) = request.inputs, request.raw_input_contents
        assert (tensor.name, tensor.datatype) == ("pictures", self.datatype)
        assert (request.model_name, [output.name for output in request.outputs]) == (self.name, [self.output])
        shape = list(tensor.shape) if self.batch is not None else [1, *tensor.shape]
        assert shape[1:] == self._picture_shape()
        values = np.frombuffer(raw, TYPES[self.datatype]).reshape(shape).astype(np.float64)
        if self.layout == "NHWC":
            values = values.transpose(0, 3, 1, 2)
        if self.datatype != "UINT8":
            mean, std = (np.reshape(numbers, (-1, 1, 1)) for numbers in (self.mean, self.std))
            values = (values * std + mean) * 255.0 / self.scale
        return np.round(values).astype(np.uint8)

    def _answer(self, images_NCHW: np.ndarray) -> np.ndarray:
        if self.kind == "labels":
            return logits_of(images_NCHW).argmax(axis=1).astype(TYPES[self.answer_type])
        rows_NK = (logits_of if self.kind == "logits" else probabilities_of)(images_NCHW)
        return (rows_NK if self.batch is not None else rows_NK[0]).astype(TYPES[self.answer_type])


@contextmanager
def serving(
    model: Model, address: str | None = None, *, credentials: grpc.ServerCredentials | None = None
) -> Iterator[str]:
    """Yields kserve://HOST:PORT/m, kserves:// with credentials; what is under way is cut at the end."""
    address = address or lasting_address()
    server = grpc.server(
        ThreadPoolExecutor(16),
        options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(model, server)
    if credentials is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, credentials)
    server.start()
    try:
        yield f"kserve{'' if credentials is None else 's'}://{address}/{model.name}"
    finally:
        server.stop(0).wait()


def metadata(inputs, outputs):
    made = service_pb2.ModelMetadataResponse(name="m", versions=["1"], platform="p")
    for tensors, target in ((inputs, made.inputs), (outputs, made.outputs)):
        for name, datatype, shape in tensors:
            target.add(name=name, datatype=datatype, shape=shape)
    return made


def triton(max_batch_size: int = 0, **formats: int) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(max_batch_size=max_batch_size)
    for name, number in formats.items():
        config.input.add(name=name, format=number)
    return config


def read(inputs=PICTURES, outputs=ROWS, config=None, **given) -> Reading:
    return read_model(metadata(inputs, outputs), config, KServeConfig(**given))


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text
