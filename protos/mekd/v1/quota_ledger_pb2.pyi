import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EntryKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENTRY_KIND_UNSPECIFIED: _ClassVar[EntryKind]
    ENTRY_KIND_GRANT: _ClassVar[EntryKind]
    ENTRY_KIND_HOLD: _ClassVar[EntryKind]
    ENTRY_KIND_POST: _ClassVar[EntryKind]
    ENTRY_KIND_VOID: _ClassVar[EntryKind]
    ENTRY_KIND_EXPIRE: _ClassVar[EntryKind]
ENTRY_KIND_UNSPECIFIED: EntryKind
ENTRY_KIND_GRANT: EntryKind
ENTRY_KIND_HOLD: EntryKind
ENTRY_KIND_POST: EntryKind
ENTRY_KIND_VOID: EntryKind
ENTRY_KIND_EXPIRE: EntryKind

class GetBalanceRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class GetBalanceResponse(_message.Message):
    __slots__ = ("account", "granted_count", "posted_count", "held_count", "balance_count", "run_posted_count")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    GRANTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    POSTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    HELD_COUNT_FIELD_NUMBER: _ClassVar[int]
    BALANCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    RUN_POSTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    account: str
    granted_count: int
    posted_count: int
    held_count: int
    balance_count: int
    run_posted_count: int
    def __init__(self, account: _Optional[str] = ..., granted_count: _Optional[int] = ..., posted_count: _Optional[int] = ..., held_count: _Optional[int] = ..., balance_count: _Optional[int] = ..., run_posted_count: _Optional[int] = ...) -> None: ...

class ListStatementRequest(_message.Message):
    __slots__ = ("run_id", "after_sequence", "page_size")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    after_sequence: int
    page_size: int
    def __init__(self, run_id: _Optional[str] = ..., after_sequence: _Optional[int] = ..., page_size: _Optional[int] = ...) -> None: ...

class ListStatementResponse(_message.Message):
    __slots__ = ("entries", "next_after_sequence")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[StatementEntry]
    next_after_sequence: int
    def __init__(self, entries: _Optional[_Iterable[_Union[StatementEntry, _Mapping]]] = ..., next_after_sequence: _Optional[int] = ...) -> None: ...

class StatementEntry(_message.Message):
    __slots__ = ("sequence", "create_time", "kind", "batch_id", "run_id", "picture_count", "debit_book", "credit_book")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PICTURE_COUNT_FIELD_NUMBER: _ClassVar[int]
    DEBIT_BOOK_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BOOK_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    create_time: _timestamp_pb2.Timestamp
    kind: EntryKind
    batch_id: str
    run_id: str
    picture_count: int
    debit_book: str
    credit_book: str
    def __init__(self, sequence: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., kind: _Optional[_Union[EntryKind, str]] = ..., batch_id: _Optional[str] = ..., run_id: _Optional[str] = ..., picture_count: _Optional[int] = ..., debit_book: _Optional[str] = ..., credit_book: _Optional[str] = ...) -> None: ...
