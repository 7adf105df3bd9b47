"""A tensor of the KServe V2 protocol as an answer: what it may be, and what a policy took away."""

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from edge_agent import kserve_answers
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import policy
from teacher_service.terms import Terms
from tests.edge_agent.kserve_parts import CLASSES, read


def test_bfloat16_is_the_upper_half_of_a_float():
    rows_NK = np.array([[0.5, 0.25], [-3.0, 1.5]], np.float32)
    response = service_pb2.ModelInferResponse()
    response.outputs.add(name="y", datatype="BF16", shape=[2, 2])
    response.raw_output_contents.append((rows_NK.view("<u4") >> 16).astype("<u2").tobytes())
    assert kserve_answers._values(response, "y").tolist() == rows_NK.tolist()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0, 1, CLASSES], "labels from 0 to 3, got 0 to 4"),
        ([0, -1, 1], "got -1 to 1"),
        ([0.5, 1, 2], "whole"),
        ([0, 1], "3 labels"),
    ],
)
def test_labels_outside_the_classes_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        kserve_answers._labels(np.array(values), 3, CLASSES)


def test_large_logits_do_not_overflow():
    rows_NK = kserve_answers._probabilities(np.array([[1e4, 0.0], [0.0, -1e4]]), 2, read_two())
    assert rows_NK.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def read_two():
    return read(outputs=[("y", "FP32", [-1, 2])], output_kind="logits")


def test_classes_that_are_rounded_to_0_cost_a_top_k_answer_nothing():
    """In a tensor they look like those that are not named."""
    rows_NK = np.array([[0.99, 0.004, 0.003, 0.003], [1.0, 0.0, 0.0, 0.0]], np.float32)
    reading = read(outputs=[("probabilities", "FP32", [-1, 4])])
    for terms in (Terms(top_k=2, decimals=1), Terms(top_k=3), Terms(top_k=4, decimals=2)):
        sold_answer = policy.apply(terms, rows_NK)
        tensor_NK = codec.sold_probabilities(sold_answer, picture_count=2, class_count=4)
        answer = wire.Answer()
        kserve_answers._put_sold(answer, tensor_NK, 2, reading, terms.decimals, terms.top_k)
        assert codec.kind_of(answer) == codec.kind_of(sold_answer)
        decoded = [codec.decode_answer(found, picture_count=2, class_count=4) for found in (answer, sold_answer)]
        assert np.array_equal(*decoded)
