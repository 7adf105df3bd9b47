"""What is seen of a message before it is parsed."""

import pytest
from tritonclient.grpc import service_pb2

from teacher_service import unparsed
from teacher_service.kserve import BULK
from teacher_service.unparsed import MOST_FIELDS, MOST_OTHER_BYTES, excess

PICTURES = BULK["/inference.GRPCInferenceService/ModelInfer"]


def infer_request(**more) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="teacher", id="1", **more)
    request.inputs.add(name="images", datatype="UINT8", shape=[1, 3, 32, 32])
    request.outputs.add(name="probabilities")
    request.parameters["run_id"].string_param = "run"
    return request


def test_pictures_may_be_large_raw_or_typed() -> None:
    raw = infer_request(raw_input_contents=[bytes(2 * MOST_OTHER_BYTES)])
    assert excess(raw.SerializeToString(), PICTURES) is None
    typed = infer_request()
    typed.inputs[0].contents.uint_contents.extend([255] * 2 * MOST_OTHER_BYTES)
    assert excess(typed.SerializeToString(), PICTURES) is None


def test_nothing_else_may_be_large() -> None:
    for change in (
        lambda request: setattr(request, "id", "x" * MOST_OTHER_BYTES),
        lambda request: request.inputs[0].shape.extend([1] * MOST_OTHER_BYTES),
        lambda request: request.inputs[0].contents.fp32_contents.extend([1.0] * MOST_OTHER_BYTES),
    ):
        request = infer_request()
        change(request)
        assert (
            excess(request.SerializeToString(), PICTURES) == f"more than {MOST_OTHER_BYTES} bytes beside its pictures"
        )


def test_parts_are_few_at_every_depth() -> None:
    for part in ("outputs", "inputs"):
        request = infer_request()
        for _ in range(MOST_FIELDS):
            getattr(request, part).add()
        assert excess(request.SerializeToString(), PICTURES) == f"more than {MOST_FIELDS} fields"
    one_by_one = bytes([4 << 3, 255, 1]) * MOST_FIELDS  # typed pixels, each with its own tag
    contents = b"\x2a" + _length(one_by_one) + one_by_one
    inputs = b"\x2a" + _length(contents) + contents
    assert len(service_pb2.ModelInferRequest.FromString(inputs).inputs[0].contents.uint_contents) == MOST_FIELDS
    assert excess(inputs, PICTURES) == f"more than {MOST_FIELDS} fields"


def _length(message: bytes) -> bytes:
    return bytes([len(message) & 0x7F | 0x80, len(message) >> 7])


@pytest.mark.parametrize(
    "message",
    [
        b"\x07",  # no such kind of field
        b"\x0b\x0c",  # a group
        b"\x0a\x05abcd",  # cut off
        b"\x32",
        b"\xff" * 11,  # a number without end
        b"\x0d\x00\x00",
    ],
)
def test_bytes_that_are_no_message_are_told_from_too_many(message: bytes) -> None:
    with pytest.raises(ValueError, match="expected"):
        unparsed.excess(message, PICTURES)


def test_every_kind_of_field_is_passed_over() -> None:
    message = b"\x08\x96\x01" + b"\x11" + bytes(8) + b"\x1d" + bytes(4) + b"\x22\x01x"
    assert excess(message, {}) is None and excess(b"", {}) is None
