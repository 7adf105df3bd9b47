"""What is sold of the engine's probabilities: pure functions of an account's terms.

Shape legend: N pictures, K classes.
"""

import numpy as np

from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service.terms import Terms


def answer_kind(terms: Terms) -> wire.AnswerKind:
    """The kind of every answer under these terms."""
    if terms.answers == "hard":
        return wire.ANSWER_KIND_CLASS_INDICES
    return wire.ANSWER_KIND_PROBABILITIES


def apply(terms: Terms, probabilities_NK: codec.Float32Array) -> wire.Answer:
    """The answer as it will be kept and sent."""
    answer = wire.Answer()
    if terms.answers == "hard":
        indices_N = probabilities_NK.argmax(axis=1).astype(np.int64)
        answer.class_indices.CopyFrom(codec.encode_class_indices(indices_N, probabilities_NK.shape[1]))
    else:
        answer.probabilities.CopyFrom(codec.encode_probabilities(probabilities_NK))
    return answer
