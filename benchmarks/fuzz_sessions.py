"""What ``benchmarks.fuzz`` says to the server: sessions, drawn by hypothesis.

A session is one call with all its messages and the way it ends, or, below gRPC, one connection. Messages begin as
something plausible (pool values in the fields that have a meaning, or a batch that is right), then up to three fields
get hostile values, and some are broken byte by byte. Nothing here talks to anybody.
"""

import gzip
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from tritonclient.grpc import service_pb2 as oip

from protos import codec
from protos.errors import Refusal
from protos.mekd.v1 import quota_ledger_pb2, teacher_inference_pb2
from protos.mekd.v1 import teacher_inference_pb2 as wire

Metadata = tuple[tuple[str, str | bytes], ...]

CHANNELS, HEIGHT, WIDTH = 1, 8, 8
PICTURE_BYTES = CHANNELS * HEIGHT * WIDTH
MOST_PICTURES = 16
MARKER = b"mekdpixel"
"""In every picture that is sent: it must not be found in a log."""
SECRET_MARKER = "5ec7e75ec7e7"
"""In every key that is made up: neither must this."""

GROUPS = ("mekd", "kserve", "ledger", "raw", "sockets")
REMOTE_ACCOUNT = "remote"
"""The account that teachers elsewhere hold and post on."""
POOR_ACCOUNT = "poor"
CUSTOMERS = ("rich", POOR_ACCOUNT, "limited", "hard")
CUSTOMER_WEIGHTS = ("rich", "rich", "rich", POOR_ACCOUNT, "limited", "hard")


class Method(NamedTuple):
    """One method of a service that is served."""

    path: str
    request: type[Message]
    response: type[Message]
    request_streams: bool
    response_streams: bool


def _methods() -> dict[str, Method]:
    found = {}
    for file in (teacher_inference_pb2, quota_ledger_pb2, oip, health_pb2, reflection_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                found[path] = Method(
                    path,
                    GetMessageClass(method.input_type),
                    GetMessageClass(method.output_type),
                    method.client_streaming,
                    method.server_streaming,
                )
    return found


METHODS = _methods()
INFER = "/mekd.v1.TeacherInference/Infer"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
MODEL_STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
HOLD, POST, VOID = (f"/mekd.v1.QuotaLedger/{name}" for name in ("Hold", "Post", "Void"))
NEVER_ENDING = ("/mekd.v1.QuotaLedger/WatchBalance", "/grpc.health.v1.Health/Watch")


@dataclass(frozen=True, kw_only=True, repr=False)
class Session:
    """One call, or one connection.

    ``account`` is whose key it shows; empty: none that is good. How it ends: "read" half-closes and reads all there
    is, "cancel" and "deadline" cut it short, "open" neither half-closes nor ends, "silent" never reads. Connections
    end by "close", "reset" or "open".
    """

    group: str
    path: str = ""
    account: str = ""
    metadata: Metadata = ()
    messages: tuple[bytes, ...] = ()
    ending: str = "read"
    answers_read: int = 0
    seconds: float = 0.0
    compressed: bool = False

    def __repr__(self) -> str:
        shown = [message[:200].hex() + ("…" if len(message) > 200 else "") for message in self.messages[:30]]
        metadata = [(name, value[:80]) for name, value in self.metadata[:9] if name != "authorization"]
        return f"{self.path or self.group} as {self.account or 'nobody'} {metadata} {self.ending}: {shown}"


@dataclass(frozen=True, kw_only=True)
class Cast:
    """Who may be played: keys by account ("teacher" and "admin" too), and what is served."""

    keys: Mapping[str, str]
    paths: frozenset[str]
    model_name: str = "teacher"


def _seldom(draw: DrawFn, times: int) -> bool:
    """One time in so many. Not by the ends of a range: those are drawn more often than others."""
    return draw(st.integers(0, times - 1)) == times // 3 + 1


def _binary(most: int) -> st.SearchStrategy[bytes]:
    """Not ``st.binary``, which also draws what it has found in sources, in another order in each process."""
    return st.lists(st.integers(0, 255), max_size=most).map(bytes)


# --- values ------------------------------------------------------------------------------------------

_TEXTS = (
    "",
    "x",
    "x" * 64,
    "x" * 65,
    "x" * 3000,
    "x" * 20_000,
    "\0",
    "a\0b",
    "é",
    "𝄞" * 30,
    "\ud7ff\ue000\uffff",
    "../../etc/passwd",
    "' OR 1=1 --",
    "{requested} {0} %s %n",
    "two\r\nlines\n",
    '"}\n{"level": "error", "event": "forged"}',
    " padded ",
    "-",
    f"mekd_{'0' * 16}_{SECRET_MARKER}{'0' * 52}",
)
_BYTES = (b"", b"\0", b"\xff" * 31, b"\xff" * 32, b"\xff" * 33, b"x" * 64, b"x" * 65, MARKER * 500, b"\x80" * 5000)
_INTS = {
    FieldDescriptor.CPPTYPE_INT32: (0, 1, -1, 2, 7, 17, 255, 256, 513, 65536, 2**24, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 255, 256, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 17, 2**31, 2**32, 2**53, 2**53 + 1, 2**62, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2**32, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 3, 99, -1, 2**31 - 1, -(2**31)),
}
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-320, 3e38, float("inf"), float("-inf"), float("nan"))


def _hostile(field: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type that nobody means; no message."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return st.sampled_from(_BYTES if field.type == FieldDescriptor.TYPE_BYTES else _TEXTS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return st.sampled_from(_FLOATS)
    return st.sampled_from(_INTS[kind])


def _is_message(field: Any) -> bool:
    return bool(field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE)


def _is_map(field: Any) -> bool:
    return _is_message(field) and bool(field.message_type.GetOptions().map_entry)


def _mutate(draw: DrawFn, message: Message, depth: int = 0) -> None:
    """Changes one field of a message, or of one inside it."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    if _seldom(draw, 10):
        message.ClearField(field.name)
    elif _is_map(field):
        _mutate_map(draw, getattr(message, field.name), field, depth)
    elif field.is_repeated:
        _mutate_repeated(draw, getattr(message, field.name), field, depth)
    elif _is_message(field):
        inside = getattr(message, field.name)
        inside.SetInParent()
        if depth < 3:
            _mutate(draw, inside, depth + 1)
    else:
        setattr(message, field.name, draw(_hostile(field)))


def _mutate_map(draw: DrawFn, entries: Any, field: Any, depth: int) -> None:
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    if _seldom(draw, 20) and key.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        names: list[Any] = [f"many-{n}" for n in range(300)]
    elif len(entries) and draw(st.booleans()):
        names = [draw(st.sampled_from(sorted(entries)))]
    else:
        names = [draw(_hostile(key))]
    for name in names:
        if _is_message(value):
            entries[name].SetInParent()
            if depth < 3 and len(names) == 1:
                _mutate(draw, entries[name], depth + 1)
        else:
            entries[name] = draw(_hostile(value))


def _mutate_repeated(draw: DrawFn, values: Any, field: Any, depth: int) -> None:
    how = draw(st.sampled_from(("change", "change", "add", "twice", "many", "drop")))
    if how == "drop" and len(values):
        del values[-1]
    elif how == "twice" and len(values):
        values.append(values[0])
    elif _is_message(field):
        inside = values[0] if how == "change" and len(values) else values.add()
        if depth < 3:
            _mutate(draw, inside, depth + 1)
    elif how == "many":
        values.extend([draw(_hostile(field))] * 10)
    elif how == "change" and len(values):
        values[draw(st.integers(0, len(values) - 1))] = draw(_hostile(field))
    else:
        values.append(draw(_hostile(field)))


def _encoded(draw: DrawFn, message: Message) -> bytes:
    """A message's bytes, now and then with something in them that is no field of it, or broken."""
    encoded = message.SerializeToString(deterministic=True)
    how = draw(st.integers(0, 40)) - 10
    if how == 0:  # unknown fields: a number, text, and one of a number that may come some day
        return encoded + b"\xf8\x7f\x01" + b"\xfa\x7f\x03abc" + b"\xa2\x06\x02hi"
    if how == 1:
        return encoded[: draw(st.integers(0, len(encoded)))]
    if how == 2 and encoded:
        at = draw(st.integers(0, len(encoded) - 1))
        return encoded[:at] + bytes([encoded[at] ^ 1 << draw(st.integers(0, 7))]) + encoded[at + 1 :]
    if how == 3:
        return encoded + encoded
    return encoded


_BROKEN = (
    b"",
    b"\0",
    b"\x07",  # a wire type that there is not
    b"\x00\x01",  # field number 0
    b"\x0c",  # the end of a group that never began
    b"\x0b" * 300,  # groups that never end
    b"\x0a\xff\xff\xff\xff\x0f",  # 4 GiB of text
    b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\xff" * 11,  # a number without an end
    b"\x0a\x02\xff\xfe",  # text that is not UTF-8
    b"\x12\x02\x0a\xff",
    b"\x0a\x01" * 200,
    b"\x80" * 2000,
)
_broken = st.sampled_from(_BROKEN) | _binary(64)


# --- who calls ---------------------------------------------------------------------------------------


def _metadata(draw: DrawFn, cast: Cast, account: str) -> tuple[str, Metadata]:
    """Whose key is shown, and the call's metadata with it; seldom a key that is none, or metadata that are large."""
    how = draw(st.integers(0, 59)) - 20
    key = cast.keys.get(account, "")
    if how == 0 or not key:
        return "", ()
    if how == 1:
        wrong = (
            f"Bearer mekd_{'0' * 16}_{SECRET_MARKER}{'0' * 52}",
            f"Bearer {key[:-12]}{SECRET_MARKER}",
            f"Basic {SECRET_MARKER}",
            "Bearer",
            "Bearer " + SECRET_MARKER * 300,
            f"{SECRET_MARKER} " * 20,
        )
        return "", (("authorization", draw(st.sampled_from(wrong))),)
    shown = ("authorization", f"bearer  {key} " if how == 2 else f"Bearer {key}")
    more: Metadata = ()
    if how == 3:
        more = (("x-large", "v" * draw(st.sampled_from((1000, 7000, 9000, 20_000)))),)
    elif how == 4:
        more = tuple((f"x-many-{n}", "v") for n in range(100))
    elif how == 5:
        more = (("x-bytes-bin", b"\0\xff" * 50), ("grpc-trace-bin", b"\xff" * 40), ("traceparent", "zz"))
    elif how == 6:
        more = (("authorization", f"Bearer {SECRET_MARKER}"),)
    return account, (shown, *more)


def _customer(draw: DrawFn, cast: Cast) -> tuple[str, Metadata]:
    others = ("teacher", "admin")
    account = draw(st.sampled_from(others if _seldom(draw, 30) else CUSTOMER_WEIGHTS))
    return _metadata(draw, cast, account)


_stream_endings = st.sampled_from(("read", "read", "read", "read", "cancel", "deadline", "open", "silent"))
_unary_endings = st.sampled_from(("read",) * 14 + ("cancel", "deadline"))
_short_times = st.sampled_from((0.0005, 0.002, 0.01, 0.03))


# --- batches -----------------------------------------------------------------------------------------


def pictures(count: int, fill: int) -> bytes:
    """Pictures with the marker in each; ``fill`` tells them apart."""
    return (bytes([fill]) + (MARKER * PICTURE_BYTES)[: PICTURE_BYTES - 1]) * count


def _batch_id(draw: DrawFn) -> str:
    if _seldom(draw, 6):  # one that others use, too
        return f"shared-{draw(st.integers(0, 50))}"
    return f"fuzz-{draw(st.integers(0, 2**48)) ^ draw(st.integers(0, 2**48)):x}"


def _good_batch(draw: DrawFn) -> wire.Batch:
    count = draw(st.integers(1, MOST_PICTURES))
    images = wire.ImageBatch(
        encoding=wire.IMAGE_ENCODING_RAW_UINT8,
        picture_count=count,
        channels=CHANNELS,
        height=HEIGHT,
        width=WIDTH,
        payload=pictures(count, draw(st.integers(0, 255))),
    )
    if _seldom(draw, 3):  # the same pictures, compressed
        encoding = draw(st.sampled_from(codec.ENCODINGS[1:]))
        images = codec.encode_images(codec.decode_images(images), encoding, quality=draw(st.sampled_from((50, 95))))
    return wire.Batch(batch_id=_batch_id(draw), images=images)


def _mutate_batch(draw: DrawFn, batch: wire.Batch) -> None:
    images = batch.images
    how = draw(st.sampled_from(("fields", "fields", "payload", "counts", "swapped", "bytes", "bytes")))
    if how == "bytes":
        payload = bytearray(images.payload)
        for _ in range(draw(st.integers(1, 4))):  # where headers are, more often than not
            at = draw(st.integers(0, min(60, len(payload))) | st.integers(0, len(payload)))
            payload[at : at + draw(st.integers(0, 3))] = draw(_binary(3))
        images.payload = bytes(payload)
    elif how == "payload":
        size = draw(st.sampled_from((0, 1, PICTURE_BYTES - 1, PICTURE_BYTES + 1, 5000, 300_000)))
        images.payload = (MARKER * (size // len(MARKER) + 1))[:size]
    elif how == "counts":  # of which some products overflow to the payload's length
        counts = draw(st.sampled_from(((-1, -1), (2**16, 2**16), (2**31 - 1, 2**31 - 1), (2**30, 4), (-(2**31), 2))))
        images.picture_count, images.channels = counts
    elif how == "swapped":
        images.height, images.width = 2 * HEIGHT, WIDTH // 2
    else:
        for _ in range(draw(st.integers(1, 3))):
            _mutate(draw, batch)


def _infer_message(draw: DrawFn) -> bytes:
    how = draw(st.integers(0, 25)) - 5
    if how == 0:
        return draw(_broken)
    if how == 1:
        return wire.InferRequest(config=wire.StreamConfig(run_id="again")).SerializeToString()
    if how == 2:
        return b""
    batch = _good_batch(draw)
    if 3 <= how < 10:
        _mutate_batch(draw, batch)
    return _encoded(draw, wire.InferRequest(batch=batch))


@st.composite
def _infer_sessions(draw: DrawFn, cast: Cast) -> Session:
    account, metadata = _customer(draw, cast)
    messages = []
    config = wire.InferRequest(config=wire.StreamConfig(run_id=draw(st.sampled_from(("run-1", "run-2")))))
    how = draw(st.integers(0, 18)) - 4
    if how == 0:
        _mutate(draw, config)
    if how != 1:
        messages.append(_encoded(draw, config) if how == 2 else config.SerializeToString())
    messages += [_infer_message(draw) for _ in range(draw(st.integers(0, 14)))]
    return Session(
        group="mekd",
        path=INFER,
        account=account,
        metadata=metadata,
        messages=tuple(messages),
        ending=draw(_stream_endings),
        answers_read=draw(st.integers(0, 4)),
        seconds=draw(_short_times),
        compressed=_seldom(draw, 20),
    )


def _good_model_infer(draw: DrawFn, cast: Cast) -> Any:
    count = draw(st.integers(1, MOST_PICTURES))
    content = pictures(count, draw(st.integers(0, 255)))
    request = oip.ModelInferRequest(model_name=cast.model_name)
    request.id = draw(st.sampled_from(("", "7", "request")))
    request.model_version = draw(st.sampled_from(("", "1")))
    if not _seldom(draw, 10):
        request.parameters["idempotency_key"].string_param = _batch_id(draw)
    if draw(st.booleans()):
        request.parameters["run_id"].string_param = "run-1"
    tensor = request.inputs.add(name="images", datatype="UINT8", shape=(count, CHANNELS, HEIGHT, WIDTH))
    if not _seldom(draw, 4):
        request.raw_input_contents.append(content)
    else:
        tensor.contents.uint_contents.extend(content)
    if draw(st.booleans()):
        request.outputs.add(name="probabilities")
    return request


def _mutate_model_infer(draw: DrawFn, request: Any) -> None:
    tensor = request.inputs[0]
    how = draw(st.integers(0, 7))
    if how == 0:
        shapes: tuple[tuple[int, ...], ...] = (
            (),
            (-1, CHANNELS, HEIGHT, WIDTH),
            (2**62, 2, HEIGHT, WIDTH),
            (2**32, 2**32, 1, 1),
            (2**63 - 1,) * 4,
            (-(2**63),) * 4,
            (1,) * 10,
            (1, CHANNELS, HEIGHT, WIDTH, 1),
            (0, CHANNELS, HEIGHT, WIDTH),
            (1, HEIGHT, WIDTH, CHANNELS),
            (1, PICTURE_BYTES),
            (1,) * 1000,
        )
        del tensor.shape[:]
        tensor.shape.extend(draw(st.sampled_from(shapes)))
    elif how == 1:
        tensor.datatype = draw(st.sampled_from(("FP32", "INT8", "BYTES", "uint8", "", "UINT8\0", "X" * 3000)))
    elif how == 2:  # contents of both kinds, of another type, cut short, out of range
        both = draw(st.sampled_from(("fp32_contents", "bytes_contents", "int_contents", "bool_contents")))
        getattr(tensor.contents, both).append({"bytes_contents": MARKER, "bool_contents": True}.get(both, 1))
    elif how == 3:
        if request.raw_input_contents:
            request.raw_input_contents[0] = request.raw_input_contents[0][: draw(st.integers(0, 200))]
        else:
            tensor.contents.uint_contents[0] = draw(st.sampled_from((256, 2**31, 2**32 - 1)))
    elif how == 4:
        request.raw_input_contents.append(MARKER * draw(st.sampled_from((0, 1, 1000))))
    elif how == 5:
        name = draw(st.sampled_from(("idempotency_key", "run_id", "sequence_id", "shared_memory_region", "x" * 5000)))
        value = request.parameters[name]
        choice = draw(st.sampled_from([*value.DESCRIPTOR.fields]))
        setattr(value, choice.name, draw(_hostile(choice)))
    else:
        for _ in range(draw(st.integers(1, 3))):
            _mutate(draw, request)


def _model_infer_message(draw: DrawFn, cast: Cast) -> bytes:
    if _seldom(draw, 20):
        return draw(_broken)
    request = _good_model_infer(draw, cast)
    if draw(st.booleans()):
        _mutate_model_infer(draw, request)
    return _encoded(draw, request)


@st.composite
def _kserve_sessions(draw: DrawFn, cast: Cast) -> Session:
    account, metadata = _customer(draw, cast)
    how = draw(st.integers(0, 9))
    if how < 4:
        return Session(
            group="kserve",
            path=MODEL_STREAM_INFER,
            account=account,
            metadata=metadata,
            messages=tuple(_model_infer_message(draw, cast) for _ in range(draw(st.integers(0, 12)))),
            ending=draw(_stream_endings),
            answers_read=draw(st.integers(0, 4)),
            seconds=draw(_short_times),
            compressed=_seldom(draw, 20),
        )
    if how < 8:
        path, message = MODEL_INFER, _model_infer_message(draw, cast)
    else:
        path = draw(st.sampled_from(sorted(path for path in METHODS if path.startswith("/inference."))))
        pools = {"name": (cast.model_name, cast.model_name, "nope"), "version": ("", "1", "2")}
        message = _plausible_message(draw, METHODS[path], pools)
        if METHODS[path].request_streams:
            path = MODEL_INFER
    return Session(
        group="kserve",
        path=path,
        account=account,
        metadata=metadata,
        messages=(message,),
        ending=draw(_unary_endings),
        seconds=draw(_short_times),
        compressed=_seldom(draw, 20),
    )


# --- the books, and the small services ---------------------------------------------------------------

_POOLS: dict[str, Sequence[Any]] = {
    "account": (REMOTE_ACCOUNT,) * 8 + ("", "rich", "operators", "nobody", REMOTE_ACCOUNT),
    "batch_id": ("held",),
    "run_id": ("run-1", "run-2", ""),
    "instance_id": ("instance-0", "instance-0", "instance-1"),
    "digest": (b"\1" * 32, b"\2" * 32),
    "picture_count": (1, 2, 3, 16),
    "answer": (MARKER, MARKER * 20),
    "page_size": (0, 1, 10),
    "after_sequence": (0, 1, 10),
    "key_id": ("0" * 16, "f" * 16),
    "service": ("", "liveness", "mekd.v1.QuotaLedger", "nope"),
    "unset_fields": ("top_k", "nope"),
    "file_containing_symbol": ("mekd.v1.QuotaLedger", "nope"),
    "file_by_filename": ("protos/mekd/v1/quota_ledger.proto", "/etc/passwd"),
}
# What a teacher would say.
_MEANT: dict[str, Sequence[Any]] = {
    "account": (REMOTE_ACCOUNT,),
    "run_id": ("run-1",),
    "instance_id": ("instance-0",),
    "digest": (b"\1" * 32,),
    "picture_count": (2,),
}
_OF_ADMINS = ("ListAccounts", "CreateAccount", "Grant", "SetTerms", "CreateKey", "ListKeys", "RevokeKey")
# An admin is trusted: what it does to a customer it means. It is drawn for accounts of its own alone.
_ADMIN_POOLS: dict[str, Sequence[Any]] = _POOLS | {"account": ("scratch-0", "scratch-1", "scratch-2", "Scratch", "")}


def _plausible(draw: DrawFn, descriptor: Any, pools: Mapping[str, Sequence[Any]], depth: int = 0) -> Message:
    """A message that could be meant: fields with a pool from it, small numbers in the others, or nothing."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if field.is_repeated and not (field.name in pools and not _is_message(field)):
            continue
        if field.name in pools and not _is_message(field):
            value = draw(st.sampled_from(pools[field.name]))
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
        elif draw(st.integers(0, 3)):
            continue
        elif _is_message(field):
            if depth < 2:
                getattr(message, field.name).CopyFrom(_plausible(draw, field.message_type, pools, depth + 1))
        elif field.cpp_type != FieldDescriptor.CPPTYPE_STRING:
            setattr(message, field.name, draw(st.integers(0, 1)))
    return message


def _plausible_message(draw: DrawFn, method: Method, pools: Mapping[str, Sequence[Any]]) -> bytes:
    message = _plausible(draw, method.request.DESCRIPTOR, pools)
    for _ in range(draw(st.sampled_from((0, 1, 0, 2, 3, 1, 0)))):
        _mutate(draw, message)
    return _encoded(draw, message)


def _safe_for_admins(path: str, message: bytes) -> bool:
    """Whether an admin's request leaves alone what the run relies on: the keys, and the accounts that are played."""
    try:
        request: Any = METHODS[path].request.FromString(message)
    except Exception:
        return True
    names = [getattr(request, "account", ""), getattr(getattr(request, "key", None), "account", "")]
    return not any(name in (*CUSTOMERS, REMOTE_ACCOUNT, "operators", "good") for name in names)


@st.composite
def _ledger_sessions(draw: DrawFn, cast: Cast, number: int) -> Session:
    paths = [HOLD, POST, VOID] * 4 + sorted(path for path in METHODS if path.startswith("/mekd.v1.QuotaLedger"))
    method = METHODS[draw(st.sampled_from(paths))]
    able = "admin" if method.path.endswith(_OF_ADMINS) else "teacher"
    role = draw(st.sampled_from((able, able, able, "", "rich", "teacher", "admin", able, able, able)))
    # Posted ids are done with: each round has its own.
    ids = tuple(f"held-{number}-{n}" for n in range(12))
    pools = (_ADMIN_POOLS if role == "admin" else _POOLS) | {"batch_id": ids}
    if method.path in (HOLD, POST, VOID) and draw(st.booleans()):
        message = _plausible(draw, method.request.DESCRIPTOR, pools | _MEANT).SerializeToString()
    else:
        message = _plausible_message(draw, method, pools)
    if role == "admin" and not _safe_for_admins(method.path, message):
        role = "teacher"
    account, metadata = _metadata(draw, cast, role)
    return _small_session(draw, "ledger", method, account, metadata, message)


@st.composite
def _service_sessions(draw: DrawFn, cast: Cast) -> Session:
    """Health, reflection and Describe, plausible; and every method with bytes that are no message of it."""
    others = sorted(path for path in METHODS if path.startswith(("/grpc.", "/mekd.v1.TeacherInference/Describe")))
    if draw(st.integers(0, 3)) == 0:
        method = METHODS[draw(st.sampled_from(others))]
        message = _plausible_message(draw, method, _POOLS)
    elif draw(st.integers(0, 9)) == 0:
        path = draw(st.sampled_from(("/nope", "/mekd.v1.TeacherInference/Nope", "/x.Y/Z", "/mekd.v1.QuotaLedger/")))
        method = Method(path, wire.InferRequest, wire.InferResponse, False, False)
        message = draw(_broken)
    else:
        method = METHODS[draw(st.sampled_from(sorted(METHODS)))]
        message = draw(_broken)
    role = draw(st.sampled_from(("rich", "teacher", "", "admin", "rich")))
    if role == "admin" and not (method.path in METHODS and _safe_for_admins(method.path, message)):
        role = ""
    account, metadata = _metadata(draw, cast, role)
    return _small_session(draw, "raw", method, account, metadata, message)


def _small_session(
    draw: DrawFn, group: str, method: Method, account: str, metadata: Metadata, message: bytes
) -> Session:
    if method.path in NEVER_ENDING:
        ending = draw(st.sampled_from(("cancel", "deadline", "open", "silent")))
    else:
        ending = draw(_stream_endings if method.request_streams else _unary_endings)
    return Session(
        group=group,
        path=method.path,
        account=account,
        metadata=metadata,
        messages=(message,) * (draw(st.integers(1, 3)) if method.request_streams else 1),
        ending=ending,
        answers_read=1,
        seconds=draw(_short_times),
        compressed=_seldom(draw, 30),
    )


# --- below gRPC --------------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """One HTTP/2 frame; ``length`` where the header is to lie."""
    said = len(payload) if length is None else length
    return struct.pack(">I", said)[1:] + struct.pack(">BBI", kind, flags, stream & 0xFFFFFFFF) + payload


def _hpack_length(size: int) -> bytes:
    if size < 127:
        return bytes([size])
    found, size = b"\x7f", size - 127
    while size >= 128:
        found, size = found + bytes([size & 127 | 128]), size >> 7
    return found + bytes([size])


def _hpack(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Headers as literals, none of them to be remembered."""
    return b"".join(
        b"\0" + _hpack_length(len(name)) + name + _hpack_length(len(value)) + value for name, value in headers
    )


def _call(path: str, key: str, more: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    return _hpack(
        (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"authorization", b"Bearer " + key.encode()),
            *more,
        )
    )


_SMALL_BOMB = gzip.compress(bytes(4 * 2**20))


def _grpc_data(draw: DrawFn) -> bytes:
    """A length-prefixed message, or what looks like the begin of one."""
    return draw(
        st.sampled_from(
            (
                b"\0\xff\xff\xff\xff" + MARKER,
                b"\0\x7f\xff\xff\xff",
                b"\1\0\0\0\4junk",
                b"\x02\0\0\0\0",
                b"\xff\0\0\0\1x",
                b"\0\0\0",
                b"\1" + struct.pack(">I", len(_SMALL_BOMB)) + _SMALL_BOMB,
                b"\0\0\0\0\0" * 50,
            )
        )
    )


def _frames(draw: DrawFn, cast: Cast) -> list[bytes]:
    """What follows the preface."""
    key, path = cast.keys["rich"], draw(st.sampled_from((INFER, "/mekd.v1.QuotaLedger/GetBalance", "/nope")))
    how = draw(st.integers(0, 9))
    times = draw(st.sampled_from((3, 30, 300)))
    if how == 0:  # anything
        return [
            frame(
                draw(st.integers(0, 12)),
                draw(st.integers(0, 255)),
                draw(st.sampled_from((0, 1, 2, 3, 2**31 - 1, 2**32 - 1))),
                draw(_binary(40)),
                draw(st.sampled_from((None, None, None, 0, 5, 2**24 - 1))),
            )
            for _ in range(draw(st.integers(1, 6)))
        ]
    if how == 1:
        return [frame(PING, 0, 0, b"mekdping")] * times
    if how == 2:
        setting = struct.pack(">HI", draw(st.integers(0, 8)), draw(st.sampled_from((0, 1, 2**14, 2**31, 2**32 - 1))))
        return [frame(SETTINGS, 0, 0, setting)] * times
    if how == 3:  # calls that are taken back at once
        block = _call(path, key)
        return [
            frame(HEADERS, END_HEADERS, stream, block) + frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
            for stream in range(1, 2 * times, 2)
        ]
    if how == 4:
        return [frame(WINDOW_UPDATE, 0, draw(st.integers(0, 1)), struct.pack(">I", 2**31 - 1))] * times
    if how == 5:  # headers without an end
        size = draw(st.sampled_from((0, 1, 16, 4000)))
        return [frame(HEADERS, 0, 1, _call(path, key))] + [frame(CONTINUATION, 0, 1, b"\0\1a" * size)] * min(
            times, 30
        )
    if how == 6:  # large headers, and ones that are remembered and named again and again
        large = [(b"x-%d" % n, b"v" * draw(st.sampled_from((10, 3000)))) for n in range(draw(st.integers(1, 20)))]
        again = b"\x40\1a" + _hpack_length(4000) + b"v" * 4000 + b"\xbe" * draw(st.sampled_from((1, 1000, 10_000)))
        block = draw(st.sampled_from((_call(path, key, large), _call(path, key) + again)))
        return [frame(HEADERS, END_HEADERS, 1, block)]
    if how == 7:  # a call with data that are no message, or only the begin of one
        encoding = draw(st.sampled_from((b"gzip", b"deflate", b"identity", b"nope")))
        headers = _call(path, key, [(b"grpc-encoding", encoding)])
        flags = draw(st.sampled_from((0, END_STREAM)))
        return [frame(HEADERS, END_HEADERS, 1, headers), frame(DATA, flags, 1, _grpc_data(draw))]
    if how == 8:  # headers that a call must not have, or lacks
        timeout = draw(st.sampled_from((b"-1S", b"99999999999H", b"1", b"", b"0n", b"1S")))
        return [
            frame(HEADERS, END_HEADERS, 1, _call(path, key, [(b"grpc-timeout", timeout)])),
            frame(HEADERS, END_HEADERS, 3, _hpack(((b":method", b"GET"), (b":path", path.encode())))),
            frame(HEADERS, END_HEADERS, 5, _call(path, key, [(b"Upper", b"x"), (b":late", b"x"), (b"nul", b"\0")])),
            frame(HEADERS, END_HEADERS, 4, _call(path, key)),
        ]
    return [frame(DATA, 0, draw(st.sampled_from((0, 1, 2**31 - 1))), b"")] * times


@st.composite
def _socket_sessions(draw: DrawFn, cast: Cast) -> Session:
    how = draw(st.integers(0, 5))
    if how == 0:
        chunks = [
            draw(st.sampled_from((b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc")))
        ]
        chunks.append(draw(_binary(200)))
    elif how == 1:
        chunks = [PREFACE[: draw(st.integers(0, len(PREFACE)))]]
    else:
        chunks = [PREFACE + frame(SETTINGS, 0, 0), *_frames(draw, cast)]
    return Session(
        group="sockets",
        messages=tuple(chunks),
        ending=draw(st.sampled_from(("close", "close", "reset", "open"))),
        seconds=draw(st.sampled_from((0.0, 0.0, 0.02, 0.1))),
    )


def sessions(cast: Cast, number: int) -> st.SearchStrategy[Session]:
    """All of them, in the round of a number."""
    kinds = [_infer_sessions(cast)] * 4 + [_socket_sessions(cast)]
    kinds += [_ledger_sessions(cast, number)] * 6 + [_service_sessions(cast)] * 4
    if MODEL_INFER in cast.paths:
        kinds += [_kserve_sessions(cast)] * 5
    return st.integers(0, len(kinds) - 1).flatmap(lambda n: kinds[n])


# --- which batches are right -------------------------------------------------------------------------


class Sent(NamedTuple):
    """A batch that may be charged: the id it may be booked under (empty: the server makes one), and its pictures."""

    batch_id: str
    pixels: bytes
    picture_count: int


def _is_identifier(text: str) -> bool:
    return 0 < len(text) <= 64 and all(c.isascii() and (c.isalnum() or c in "_-") for c in text)


def batch_in(path: str, message: bytes, model_name: str) -> Sent | None:
    """The batch in a message where it is right in itself, else None; read without any code of ``teacher_service``."""
    try:
        if path == INFER:
            batch = wire.InferRequest.FromString(message).batch
            images = batch.images
            sizes = (images.encoding, images.channels, images.height, images.width)
            count, payload, batch_id = images.picture_count, images.payload, batch.batch_id
            right = sizes[1:] == (CHANNELS, HEIGHT, WIDTH) and _is_identifier(batch_id)
            if images.encoding in codec.ENCODINGS[1:] and right:
                payload = _decompressed(images)
            else:
                right &= images.encoding == wire.IMAGE_ENCODING_RAW_UINT8
        elif path in (MODEL_INFER, MODEL_STREAM_INFER):
            request = oip.ModelInferRequest.FromString(message)
            right = len(request.inputs) == 1 and len(request.inputs[0].shape) == 4
            if not right:
                return None
            tensor = request.inputs[0]
            count, batch_id = tensor.shape[0], request.parameters["idempotency_key"].string_param
            payload = b"".join(request.raw_input_contents) or bytes(v & 255 for v in tensor.contents.uint_contents)
            right = request.model_name == model_name and (tensor.name, tensor.datatype) == ("images", "UINT8")
            right &= tuple(tensor.shape[1:]) == (CHANNELS, HEIGHT, WIDTH)
        else:
            return None
    except Exception:  # no message at all
        return None
    right &= 1 <= count <= MOST_PICTURES and len(payload) == count * PICTURE_BYTES
    return Sent(batch_id, payload, count) if right else None


def _decompressed(images: wire.ImageBatch) -> bytes:
    """The pixels of a mosaic, as both sides agree to read it; empty where it is none."""
    limits = {"channels": CHANNELS, "height": HEIGHT, "width": WIDTH, "max_batch_pictures": MOST_PICTURES}
    try:
        codec.check_images(images, **limits)
        return codec.decode_images(images).tobytes()
    except Refusal:
        return b""
