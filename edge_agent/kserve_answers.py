"""A tensor that a model behind the KServe V2 protocol answered with, as the answer of a teacher of our own.

Shape letters: N pictures, K classes.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_agent.kserve_reading import REAL_TYPES, WHOLE_TYPES, Reading
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire


def put_answer(answer: wire.Answer, response: Any, reading: Reading, *, count: int, of_ours: bool) -> None:
    """Put what a response says of `count` pictures into an answer. Raises ValueError where it is none.

    `of_ours`: a server of this project answered, whose parameters tell what its policy took away; of others,
    parameters of these names may mean anything.
    """
    values = _values(response, reading.output)
    decimals, top_k = _policy(response) if of_ours else (None, None)
    if decimals is not None or top_k is not None:
        _put_sold(answer, values, count, reading, decimals, top_k)
    elif reading.output_kind == "labels":
        indices_N = _labels(values, count, len(reading.labels))
        answer.class_indices.CopyFrom(codec.encode_class_indices(indices_N, len(reading.labels)))
    else:
        answer.probabilities.CopyFrom(codec.encode_probabilities(_probabilities(values, count, reading)))


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
