"""What a model behind the KServe V2 protocol takes and what it answers, read from what its server says of it.

The server's metadata says it where that leaves no choice, and the section ``[teacher]`` of run.toml where it does.

Shape letters: N pictures, C channels, H and W height and width, K classes.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import model_config_pb2, service_pb2

from edge_agent.config import KServeConfig
from edge_agent.failures import BadInput
from protos import codec

UNLIMITED = 2**31 - 1

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


def parameter(config: model_config_pb2.ModelConfig | None, name: str) -> str:
    """A parameter of Triton's model configuration; empty where it has none of this name."""
    return str(config.parameters[name].string_value) if config is not None and name in config.parameters else ""


def _labels_said(config: model_config_pb2.ModelConfig | None) -> tuple[str, ...]:
    """The classes' names in the configuration's parameter ``labels``, a JSON list; empty where there is none."""
    try:
        names = json.loads(parameter(config, "labels") or "[]")
    except ValueError:
        return ()
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return tuple(names) if fine and len(names) >= 2 else ()
