import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImageEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_ENCODING_UNSPECIFIED: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_RAW_UINT8: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_PNG_MOSAIC: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_JPEG_MOSAIC: _ClassVar[ImageEncoding]
    IMAGE_ENCODING_WEBP_MOSAIC: _ClassVar[ImageEncoding]

class AnswerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ANSWER_KIND_UNSPECIFIED: _ClassVar[AnswerKind]
    ANSWER_KIND_PROBABILITIES: _ClassVar[AnswerKind]
    ANSWER_KIND_CLASS_INDICES: _ClassVar[AnswerKind]
    ANSWER_KIND_TOP_K: _ClassVar[AnswerKind]
IMAGE_ENCODING_UNSPECIFIED: ImageEncoding
IMAGE_ENCODING_RAW_UINT8: ImageEncoding
IMAGE_ENCODING_PNG_MOSAIC: ImageEncoding
IMAGE_ENCODING_JPEG_MOSAIC: ImageEncoding
IMAGE_ENCODING_WEBP_MOSAIC: ImageEncoding
ANSWER_KIND_UNSPECIFIED: AnswerKind
ANSWER_KIND_PROBABILITIES: AnswerKind
ANSWER_KIND_CLASS_INDICES: AnswerKind
ANSWER_KIND_TOP_K: AnswerKind

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("model_digest", "labels", "channels", "height", "width", "answer_kind", "encodings", "max_batch_pictures", "max_message_bytes", "window_batches", "top_k", "decimals")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    ANSWER_KIND_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_PICTURES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BATCHES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    DECIMALS_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    channels: int
    height: int
    width: int
    answer_kind: AnswerKind
    encodings: _containers.RepeatedScalarFieldContainer[ImageEncoding]
    max_batch_pictures: int
    max_message_bytes: int
    window_batches: int
    top_k: int
    decimals: int
    def __init__(self, model_digest: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., answer_kind: _Optional[_Union[AnswerKind, str]] = ..., encodings: _Optional[_Iterable[_Union[ImageEncoding, str]]] = ..., max_batch_pictures: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., window_batches: _Optional[int] = ..., top_k: _Optional[int] = ..., decimals: _Optional[int] = ...) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("config", "batch")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    config: StreamConfig
    batch: Batch
    def __init__(self, config: _Optional[_Union[StreamConfig, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class StreamConfig(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("batch_id", "images")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    images: ImageBatch
    def __init__(self, batch_id: _Optional[str] = ..., images: _Optional[_Union[ImageBatch, _Mapping]] = ...) -> None: ...

class ImageBatch(_message.Message):
    __slots__ = ("encoding", "picture_count", "channels", "height", "width", "payload")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PICTURE_COUNT_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    encoding: ImageEncoding
    picture_count: int
    channels: int
    height: int
    width: int
    payload: bytes
    def __init__(self, encoding: _Optional[_Union[ImageEncoding, str]] = ..., picture_count: _Optional[int] = ..., channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class InferResponse(_message.Message):
    __slots__ = ("accepted", "result", "refusal", "draining")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    accepted: StreamAccepted
    result: BatchResult
    refusal: BatchRefusal
    draining: StreamDraining
    def __init__(self, accepted: _Optional[_Union[StreamAccepted, _Mapping]] = ..., result: _Optional[_Union[BatchResult, _Mapping]] = ..., refusal: _Optional[_Union[BatchRefusal, _Mapping]] = ..., draining: _Optional[_Union[StreamDraining, _Mapping]] = ...) -> None: ...

class StreamAccepted(_message.Message):
    __slots__ = ("model_digest", "window_batches")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BATCHES_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    window_batches: int
    def __init__(self, model_digest: _Optional[str] = ..., window_batches: _Optional[int] = ...) -> None: ...

class StreamDraining(_message.Message):
    __slots__ = ("grace_duration",)
    GRACE_DURATION_FIELD_NUMBER: _ClassVar[int]
    grace_duration: _duration_pb2.Duration
    def __init__(self, grace_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class BatchResult(_message.Message):
    __slots__ = ("batch_id", "answer", "replayed", "balance_count", "receipt")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    BALANCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    answer: Answer
    replayed: bool
    balance_count: int
    receipt: Receipt
    def __init__(self, batch_id: _Optional[str] = ..., answer: _Optional[_Union[Answer, _Mapping]] = ..., replayed: _Optional[bool] = ..., balance_count: _Optional[int] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("account", "sequence", "head")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    account: str
    sequence: int
    head: bytes
    def __init__(self, account: _Optional[str] = ..., sequence: _Optional[int] = ..., head: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("probabilities", "class_indices", "top_k", "decimals", "model_digest", "charged_count", "pixel_digest")
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDICES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    DECIMALS_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHARGED_COUNT_FIELD_NUMBER: _ClassVar[int]
    PIXEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    probabilities: Probabilities
    class_indices: ClassIndices
    top_k: TopK
    decimals: int
    model_digest: str
    charged_count: int
    pixel_digest: bytes
    def __init__(self, probabilities: _Optional[_Union[Probabilities, _Mapping]] = ..., class_indices: _Optional[_Union[ClassIndices, _Mapping]] = ..., top_k: _Optional[_Union[TopK, _Mapping]] = ..., decimals: _Optional[int] = ..., model_digest: _Optional[str] = ..., charged_count: _Optional[int] = ..., pixel_digest: _Optional[bytes] = ...) -> None: ...

class Probabilities(_message.Message):
    __slots__ = ("class_count", "values")
    CLASS_COUNT_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    class_count: int
    values: bytes
    def __init__(self, class_count: _Optional[int] = ..., values: _Optional[bytes] = ...) -> None: ...

class ClassIndices(_message.Message):
    __slots__ = ("class_count", "values")
    CLASS_COUNT_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    class_count: int
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, class_count: _Optional[int] = ..., values: _Optional[_Iterable[int]] = ...) -> None: ...

class TopK(_message.Message):
    __slots__ = ("class_count", "named_count", "indices", "values")
    CLASS_COUNT_FIELD_NUMBER: _ClassVar[int]
    NAMED_COUNT_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    class_count: int
    named_count: int
    indices: _containers.RepeatedScalarFieldContainer[int]
    values: bytes
    def __init__(self, class_count: _Optional[int] = ..., named_count: _Optional[int] = ..., indices: _Optional[_Iterable[int]] = ..., values: _Optional[bytes] = ...) -> None: ...

class BatchRefusal(_message.Message):
    __slots__ = ("batch_id", "status")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    status: _status_pb2.Status
    def __init__(self, batch_id: _Optional[str] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...
