"""What is read of a model behind the KServe V2 protocol: its tensors, from metadata and settings together."""

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2

from edge_agent import kserve_reading
from edge_agent.failures import BadInput
from edge_agent.kserve_reading import Reading
from tests.edge_agent.kserve_parts import PICTURES, ROWS, one_line, read, triton


def test_everything_unambiguous_needs_no_settings():
    found = read(outputs=[("probabilities", "FP32", [-1, 10])], config=triton(32))
    assert found == Reading(
        input="x",
        datatype="UINT8",
        batched=True,
        layout="NCHW",
        channels=3,
        height=32,
        width=32,
        scale=255.0,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        output="probabilities",
        output_kind="probabilities",
        labels=tuple("0123456789"),
        max_batch_pictures=32,
    )


def test_everything_that_is_missing_is_asked_for_by_name_in_one_line():
    with pytest.raises(BadInput, match=r"\[teacher\] of run\.toml") as error:
        read([("x", "FP32", [-1, 3, 1, 3])], [("y", "FP32", [-1, -1])])
    line = one_line(error)
    for name in ("layout", "scale", "mean", "std", "output_kind"):
        assert f"{name} (" in line, line
    with pytest.raises(BadInput, match="classes") as error:
        read(outputs=[("y", "FP32", [-1, -1])], output_kind="logits")
    with pytest.raises(BadInput, match="height, width"):
        read([("x", "UINT8", [-1, 3, -1, -1])], output_kind="logits")


def test_tensors_of_several_are_asked_for_first():
    two = [*PICTURES, ("mask", "UINT8", [-1, 1])]
    with pytest.raises(BadInput, match=r"input \(one of x, mask\), output \(one of y, z\)"):
        read(two, [*ROWS, ("z", "INT64", [-1])])
    found = read(two, [*ROWS, ("z", "INT64", [-1])], input="x", output="z", classes=7)
    assert (found.input, found.output, found.output_kind, len(found.labels)) == ("x", "z", "labels", 7)


@pytest.mark.parametrize(
    ("shape", "config", "given", "layout"),
    [
        ([-1, 3, 32, 32], None, "", "NCHW"),
        ([-1, 32, 32, 1], None, "", "NHWC"),
        ([-1, 3, 3, 3], triton(8, x=model_config_pb2.ModelInput.FORMAT_NHWC), "", "NHWC"),
        ([-1, 1, 3, 1], None, "NCHW", "NCHW"),
    ],
)
def test_layout_comes_from_the_configuration_or_the_only_possible_place_of_channels(shape, config, given, layout):
    assert read([("x", "UINT8", shape)], config=config, layout=given, output_kind="logits").layout == layout


@pytest.mark.parametrize(
    ("shape", "config", "batched", "most"),
    [
        ([-1, 3, 8, 8], triton(16), True, 16),
        ([-1, 3, 8, 8], triton(0), True, kserve_reading.UNLIMITED),
        ([-1, 3, 8, 8], None, True, kserve_reading.UNLIMITED),
        ([1, 3, 8, 8], triton(0), True, 1),
        ([3, 8, 8], triton(0), False, 1),
    ],
)
def test_batch_dimension_and_its_limit(shape, config, batched, most):
    rows = ROWS if batched else [("y", "FP32", [10])]
    found = read([("x", "UINT8", shape)], rows, config, output_kind="logits")
    assert (found.batched, found.max_batch_pictures, len(found.labels)) == (batched, most, 10)


@pytest.mark.parametrize(
    ("inputs", "outputs", "given", "said"),
    [
        ([("x", "UINT8", [8, 3, 32, 32])], ROWS, {"output_kind": "logits"}, "always 8 pictures"),
        ([("x", "UINT8", [-1, 3072])], ROWS, {"output_kind": "logits"}, "expected pictures, 3 dimensions"),
        ([("x", "BYTES", [-1, 1])], ROWS, {}, "got BYTES"),
        (PICTURES, [("y", "BYTES", [-1, 1])], {}, "expected a tensor of numbers, got BYTES"),
        (PICTURES, ROWS, {"output_kind": "logits", "scale": 1.0}, "UINT8, which takes pixels as they are"),
        (PICTURES, ROWS, {"output_kind": "logits", "height": 64}, "teacher.height: expected 32"),
        (PICTURES, ROWS, {"output_kind": "logits", "classes": 11}, "teacher.classes: expected 10"),
        (PICTURES, ROWS, {"output_kind": "logits", "layout": "NHWC"}, "expected 1 or 3 channels, got 32"),
        (PICTURES, [("y", "INT64", [-1])], {"output_kind": "logits", "classes": 4}, "expected labels for an output"),
        (PICTURES, [("y", "INT64", [-1, 5])], {"classes": 4}, "expected one label a picture"),
        (PICTURES, [("y", "FP32", [-1, 1])], {"output_kind": "probabilities"}, "two or more classes"),
        (PICTURES, [("y", "FP32", [-1, 10, 4])], {"output_kind": "logits"}, "two or more classes"),
        (PICTURES, ROWS, {"input": "z"}, "teacher.input: expected one of x, got 'z'"),
        (PICTURES, ROWS, {"output": "z"}, "teacher.output: expected one of y, got 'z'"),
        (
            [("x", "FP32", [-1, 1, 8, 8])],
            ROWS,
            {"output_kind": "logits", "scale": 1.0, "mean": (0.0, 0.0, 0.0), "std": (1.0,)},
            "teacher.mean: expected 1 or 1 numbers, got 3",
        ),
    ],
)
def test_what_cannot_be_is_one_line_that_names_it(inputs, outputs, given, said):
    with pytest.raises(BadInput) as error:
        read(inputs, outputs, **given)
    assert said in one_line(error)


def test_convolutional_head_counts_its_classes():
    assert len(read(outputs=[("y", "FP32", [-1, 10, 1, 1])], output_kind="logits").labels) == 10


def named(labels: str) -> model_config_pb2.ModelConfig:
    config = triton(8)
    config.parameters["labels"].string_value = labels
    return config


def test_names_of_classes_come_from_a_parameter_of_the_configuration():
    whole = [("y", "INT64", [-1])]
    assert read(outputs=whole, config=named('["cat", "dog"]')).labels == ("cat", "dog")
    assert read(outputs=[("logits", "FP32", [-1, 2])], config=named('["cat", "dog"]')).labels == ("cat", "dog")
    assert read(outputs=[("logits", "FP32", [-1, 3])], config=named('["cat", "dog"]')).labels == ("0", "1", "2")
    for none in ("", "no JSON", '["cat"]', '["cat", "cat"]', "[1, 2]", "{}"):
        with pytest.raises(BadInput, match="classes"):
            read(outputs=whole, config=named(none))


def test_numbers_for_all_channels_are_numbers_for_each():
    found = read([("x", "FP32", [-1, 3, 8, 8])], output_kind="logits", scale=1.0, mean=(0.5,), std=(0.1, 0.2, 0.3))
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))


def test_colours_and_their_own_means_keep_their_channels():
    rng = np.random.default_rng(0)
    images_NCHW = rng.integers(0, 256, (5, 3, 4, 6), dtype=np.uint8)
    numbers = {"scale": 255.0, "mean": (120.0, 110.0, 100.0), "std": (60.0, 61.0, 62.0)}
    for layout, shape in (("NCHW", [-1, 3, 4, 6]), ("NHWC", [-1, 4, 6, 3])):
        reading = read([("x", "FP32", shape)], output_kind="logits", layout=layout, **numbers)
        tensor = reading.tensor(images_NCHW)
        assert list(tensor.shape) == reading.shape(5)
        back = tensor if layout == "NCHW" else tensor.transpose(0, 3, 1, 2)
        for c in range(3):
            expected = (images_NCHW[:, c].astype(np.float64) - numbers["mean"][c]) / numbers["std"][c]
            assert np.allclose(back[:, c], expected, atol=1e-5)
