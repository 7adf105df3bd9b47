"""What is sold of the engine's probabilities: pure functions of an account's terms.

The engine never sees them: it answers as if everything were sold, and what is kept on the books is what was sold.

Shape legend: N pictures, K classes, J classes named for each picture.
"""

from typing import Any

import numpy as np

from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service.terms import Terms


def answer_kind(terms: Terms) -> wire.AnswerKind:
    """The kind of every answer under these terms."""
    if terms.answers == "hard":
        return wire.ANSWER_KIND_CLASS_INDICES
    return wire.ANSWER_KIND_PROBABILITIES if terms.top_k is None else wire.ANSWER_KIND_TOP_K


def described(terms: Terms, class_count: int) -> dict[str, Any]:
    """The fields of DescribeResponse that say what is sold."""
    fields: dict[str, Any] = {"answer_kind": answer_kind(terms)}
    if terms.answers != "hard":
        fields["decimals"] = terms.decimals
        if terms.top_k is not None:
            fields["top_k"] = min(terms.top_k, class_count)
    return fields


def apply(terms: Terms, probabilities_NK: codec.Float32Array) -> wire.Answer:
    """The answer as it will be kept and sent.

    Classes are chosen by the probabilities as they are, before any rounding.
    """
    class_count = probabilities_NK.shape[1]
    if terms.answers == "hard":
        indices_N = probabilities_NK.argmax(axis=1).astype(np.int64)
        return wire.Answer(class_indices=codec.encode_class_indices(indices_N, class_count))
    answer = wire.Answer(decimals=terms.decimals)
    if terms.top_k is None:
        answer.probabilities.CopyFrom(codec.encode_probabilities(rounded(probabilities_NK, terms.decimals)))
    else:
        indices_NJ, values_NJ = most_probable(probabilities_NK, terms.top_k)
        values_NJ = rounded(values_NJ, terms.decimals)
        # Of values that rounding made equal the order would tell more than was sold.
        order_NJ = np.lexsort((indices_NJ, -values_NJ), axis=-1)
        indices_NJ = np.take_along_axis(indices_NJ, order_NJ, axis=1)
        values_NJ = np.take_along_axis(values_NJ, order_NJ, axis=1)
        named = codec.encode_top_k(indices_NJ, values_NJ, class_count)
        answer.top_k.CopyFrom(named)
    return answer


def most_probable(probabilities_NK: codec.Float32Array, count: int) -> tuple[codec.Int64Array, codec.Float32Array]:
    """Indices and probabilities (N, J) of each picture's ``count`` most probable classes, in falling order.

    Of equal ones the lower index comes first. J is ``count``, or K where there are no more classes.
    """
    # One maximum after the other: for few of many classes far cheaper than sorting them all.
    left_NK = probabilities_NK.copy()
    indices_NJ = np.empty((len(left_NK), min(count, left_NK.shape[1])), dtype=np.int64)
    for column in range(indices_NJ.shape[1]):
        indices_NJ[:, column] = left_NK.argmax(axis=1)
        np.put_along_axis(left_NK, indices_NJ[:, column, None], -1.0, axis=1)
    return indices_NJ, np.take_along_axis(probabilities_NK, indices_NJ, axis=1)


def rounded(probabilities_NJ: codec.Float32Array, decimals: int | None) -> codec.Float32Array:
    """Each value (0 to 1) at the nearest decimal, half to even, as the float32 nearest to that; None: as it is.

    Exact: a float32 times 10^7 still fits into a float64, so what is rounded is the value itself; and no decimal of 7
    places lies so near the middle of two float32 that going through float64 could choose the wrong one.
    """
    if decimals is None:
        return probabilities_NJ
    scale = 10.0**decimals
    return (np.rint(probabilities_NJ.astype(np.float64) * scale) / scale).astype(np.float32)
