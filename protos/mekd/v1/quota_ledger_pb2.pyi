import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_CUSTOMER: _ClassVar[Role]
    ROLE_TEACHER: _ClassVar[Role]
    ROLE_ADMIN: _ClassVar[Role]

class EntryKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENTRY_KIND_UNSPECIFIED: _ClassVar[EntryKind]
    ENTRY_KIND_GRANT: _ClassVar[EntryKind]
    ENTRY_KIND_HOLD: _ClassVar[EntryKind]
    ENTRY_KIND_POST: _ClassVar[EntryKind]
    ENTRY_KIND_VOID: _ClassVar[EntryKind]
    ENTRY_KIND_EXPIRE: _ClassVar[EntryKind]

class SoldAnswers(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOLD_ANSWERS_UNSPECIFIED: _ClassVar[SoldAnswers]
    SOLD_ANSWERS_SOFT: _ClassVar[SoldAnswers]
    SOLD_ANSWERS_HARD: _ClassVar[SoldAnswers]
ROLE_UNSPECIFIED: Role
ROLE_CUSTOMER: Role
ROLE_TEACHER: Role
ROLE_ADMIN: Role
ENTRY_KIND_UNSPECIFIED: EntryKind
ENTRY_KIND_GRANT: EntryKind
ENTRY_KIND_HOLD: EntryKind
ENTRY_KIND_POST: EntryKind
ENTRY_KIND_VOID: EntryKind
ENTRY_KIND_EXPIRE: EntryKind
SOLD_ANSWERS_UNSPECIFIED: SoldAnswers
SOLD_ANSWERS_SOFT: SoldAnswers
SOLD_ANSWERS_HARD: SoldAnswers

class GetBalanceRequest(_message.Message):
    __slots__ = ("run_id", "account")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    account: str
    def __init__(self, run_id: _Optional[str] = ..., account: _Optional[str] = ...) -> None: ...

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
    __slots__ = ("run_id", "after_sequence", "page_size", "account")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    after_sequence: int
    page_size: int
    account: str
    def __init__(self, run_id: _Optional[str] = ..., after_sequence: _Optional[int] = ..., page_size: _Optional[int] = ..., account: _Optional[str] = ...) -> None: ...

class ListStatementResponse(_message.Message):
    __slots__ = ("entries", "next_after_sequence")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[StatementEntry]
    next_after_sequence: int
    def __init__(self, entries: _Optional[_Iterable[_Union[StatementEntry, _Mapping]]] = ..., next_after_sequence: _Optional[int] = ...) -> None: ...

class StatementEntry(_message.Message):
    __slots__ = ("sequence", "create_time", "kind", "batch_id", "run_id", "picture_count", "debit_book", "credit_book", "digest", "head")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PICTURE_COUNT_FIELD_NUMBER: _ClassVar[int]
    DEBIT_BOOK_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BOOK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    create_time: _timestamp_pb2.Timestamp
    kind: EntryKind
    batch_id: str
    run_id: str
    picture_count: int
    debit_book: str
    credit_book: str
    digest: bytes
    head: bytes
    def __init__(self, sequence: _Optional[int] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., kind: _Optional[_Union[EntryKind, str]] = ..., batch_id: _Optional[str] = ..., run_id: _Optional[str] = ..., picture_count: _Optional[int] = ..., debit_book: _Optional[str] = ..., credit_book: _Optional[str] = ..., digest: _Optional[bytes] = ..., head: _Optional[bytes] = ...) -> None: ...

class StreamStatementRequest(_message.Message):
    __slots__ = ("run_id", "after_sequence", "account")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    after_sequence: int
    account: str
    def __init__(self, run_id: _Optional[str] = ..., after_sequence: _Optional[int] = ..., account: _Optional[str] = ...) -> None: ...

class StreamStatementResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[StatementEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[StatementEntry, _Mapping]]] = ...) -> None: ...

class WatchBalanceRequest(_message.Message):
    __slots__ = ("account",)
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    account: str
    def __init__(self, account: _Optional[str] = ...) -> None: ...

class WatchBalanceResponse(_message.Message):
    __slots__ = ("account",)
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    account: Account
    def __init__(self, account: _Optional[_Union[Account, _Mapping]] = ...) -> None: ...

class Account(_message.Message):
    __slots__ = ("name", "granted_count", "posted_count", "held_count", "balance_count", "sequence", "head")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GRANTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    POSTED_COUNT_FIELD_NUMBER: _ClassVar[int]
    HELD_COUNT_FIELD_NUMBER: _ClassVar[int]
    BALANCE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    granted_count: int
    posted_count: int
    held_count: int
    balance_count: int
    sequence: int
    head: bytes
    def __init__(self, name: _Optional[str] = ..., granted_count: _Optional[int] = ..., posted_count: _Optional[int] = ..., held_count: _Optional[int] = ..., balance_count: _Optional[int] = ..., sequence: _Optional[int] = ..., head: _Optional[bytes] = ...) -> None: ...

class Terms(_message.Message):
    __slots__ = ("answers", "top_k", "decimals", "pictures_per_second", "max_streams", "max_outstanding_pictures", "suspended")
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    DECIMALS_FIELD_NUMBER: _ClassVar[int]
    PICTURES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTSTANDING_PICTURES_FIELD_NUMBER: _ClassVar[int]
    SUSPENDED_FIELD_NUMBER: _ClassVar[int]
    answers: SoldAnswers
    top_k: int
    decimals: int
    pictures_per_second: float
    max_streams: int
    max_outstanding_pictures: int
    suspended: bool
    def __init__(self, answers: _Optional[_Union[SoldAnswers, str]] = ..., top_k: _Optional[int] = ..., decimals: _Optional[int] = ..., pictures_per_second: _Optional[float] = ..., max_streams: _Optional[int] = ..., max_outstanding_pictures: _Optional[int] = ..., suspended: _Optional[bool] = ...) -> None: ...

class StoredKey(_message.Message):
    __slots__ = ("key_id", "account", "role", "secret_digest", "revoked")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    SECRET_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    account: str
    role: Role
    secret_digest: bytes
    revoked: bool
    def __init__(self, key_id: _Optional[str] = ..., account: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., secret_digest: _Optional[bytes] = ..., revoked: _Optional[bool] = ...) -> None: ...

class PostedBatch(_message.Message):
    __slots__ = ("sequence", "head", "account")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    head: bytes
    account: Account
    def __init__(self, sequence: _Optional[int] = ..., head: _Optional[bytes] = ..., account: _Optional[_Union[Account, _Mapping]] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("account", "batch_id", "run_id", "digest", "picture_count", "instance_id")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PICTURE_COUNT_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    account: str
    batch_id: str
    run_id: str
    digest: bytes
    picture_count: int
    instance_id: str
    def __init__(self, account: _Optional[str] = ..., batch_id: _Optional[str] = ..., run_id: _Optional[str] = ..., digest: _Optional[bytes] = ..., picture_count: _Optional[int] = ..., instance_id: _Optional[str] = ...) -> None: ...

class HoldResponse(_message.Message):
    __slots__ = ("held", "answered")
    HELD_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    held: HeldBatch
    answered: AnsweredBatch
    def __init__(self, held: _Optional[_Union[HeldBatch, _Mapping]] = ..., answered: _Optional[_Union[AnsweredBatch, _Mapping]] = ...) -> None: ...

class HeldBatch(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AnsweredBatch(_message.Message):
    __slots__ = ("posted", "answer")
    POSTED_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    posted: PostedBatch
    answer: bytes
    def __init__(self, posted: _Optional[_Union[PostedBatch, _Mapping]] = ..., answer: _Optional[bytes] = ...) -> None: ...

class LookupPostRequest(_message.Message):
    __slots__ = ("account", "batch_id", "run_id", "digest")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    account: str
    batch_id: str
    run_id: str
    digest: bytes
    def __init__(self, account: _Optional[str] = ..., batch_id: _Optional[str] = ..., run_id: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...

class LookupPostResponse(_message.Message):
    __slots__ = ("answered",)
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    answered: AnsweredBatch
    def __init__(self, answered: _Optional[_Union[AnsweredBatch, _Mapping]] = ...) -> None: ...

class PostRequest(_message.Message):
    __slots__ = ("account", "batch_id", "instance_id", "answer", "picture_count")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    PICTURE_COUNT_FIELD_NUMBER: _ClassVar[int]
    account: str
    batch_id: str
    instance_id: str
    answer: bytes
    picture_count: int
    def __init__(self, account: _Optional[str] = ..., batch_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., answer: _Optional[bytes] = ..., picture_count: _Optional[int] = ...) -> None: ...

class PostResponse(_message.Message):
    __slots__ = ("posted",)
    POSTED_FIELD_NUMBER: _ClassVar[int]
    posted: PostedBatch
    def __init__(self, posted: _Optional[_Union[PostedBatch, _Mapping]] = ...) -> None: ...

class VoidRequest(_message.Message):
    __slots__ = ("account", "batch_id", "instance_id")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    account: str
    batch_id: str
    instance_id: str
    def __init__(self, account: _Optional[str] = ..., batch_id: _Optional[str] = ..., instance_id: _Optional[str] = ...) -> None: ...

class VoidResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("instance_id",)
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    def __init__(self, instance_id: _Optional[str] = ...) -> None: ...

class RenewLeaseResponse(_message.Message):
    __slots__ = ("lease_duration",)
    LEASE_DURATION_FIELD_NUMBER: _ClassVar[int]
    lease_duration: _duration_pb2.Duration
    def __init__(self, lease_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class EndLeaseRequest(_message.Message):
    __slots__ = ("instance_id",)
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    def __init__(self, instance_id: _Optional[str] = ...) -> None: ...

class EndLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LookupKeyRequest(_message.Message):
    __slots__ = ("key_id",)
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    def __init__(self, key_id: _Optional[str] = ...) -> None: ...

class LookupKeyResponse(_message.Message):
    __slots__ = ("key", "terms")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    key: StoredKey
    terms: Terms
    def __init__(self, key: _Optional[_Union[StoredKey, _Mapping]] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ...) -> None: ...

class GetAccountRequest(_message.Message):
    __slots__ = ("account",)
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    account: str
    def __init__(self, account: _Optional[str] = ...) -> None: ...

class GetAccountResponse(_message.Message):
    __slots__ = ("account", "terms")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    account: Account
    terms: Terms
    def __init__(self, account: _Optional[_Union[Account, _Mapping]] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ...) -> None: ...

class ListAccountsRequest(_message.Message):
    __slots__ = ("after_name", "page_size")
    AFTER_NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    after_name: str
    page_size: int
    def __init__(self, after_name: _Optional[str] = ..., page_size: _Optional[int] = ...) -> None: ...

class ListAccountsResponse(_message.Message):
    __slots__ = ("accounts", "next_after_name")
    ACCOUNTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_AFTER_NAME_FIELD_NUMBER: _ClassVar[int]
    accounts: _containers.RepeatedCompositeFieldContainer[Account]
    next_after_name: str
    def __init__(self, accounts: _Optional[_Iterable[_Union[Account, _Mapping]]] = ..., next_after_name: _Optional[str] = ...) -> None: ...

class CreateAccountRequest(_message.Message):
    __slots__ = ("account", "picture_count", "key", "grant_id", "terms")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    PICTURE_COUNT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    GRANT_ID_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    account: str
    picture_count: int
    key: StoredKey
    grant_id: str
    terms: Terms
    def __init__(self, account: _Optional[str] = ..., picture_count: _Optional[int] = ..., key: _Optional[_Union[StoredKey, _Mapping]] = ..., grant_id: _Optional[str] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ...) -> None: ...

class CreateAccountResponse(_message.Message):
    __slots__ = ("account", "terms")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    account: Account
    terms: Terms
    def __init__(self, account: _Optional[_Union[Account, _Mapping]] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("account", "picture_count", "grant_id")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    PICTURE_COUNT_FIELD_NUMBER: _ClassVar[int]
    GRANT_ID_FIELD_NUMBER: _ClassVar[int]
    account: str
    picture_count: int
    grant_id: str
    def __init__(self, account: _Optional[str] = ..., picture_count: _Optional[int] = ..., grant_id: _Optional[str] = ...) -> None: ...

class GrantResponse(_message.Message):
    __slots__ = ("account",)
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    account: Account
    def __init__(self, account: _Optional[_Union[Account, _Mapping]] = ...) -> None: ...

class SetTermsRequest(_message.Message):
    __slots__ = ("account", "terms", "unset_fields")
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    UNSET_FIELDS_FIELD_NUMBER: _ClassVar[int]
    account: str
    terms: Terms
    unset_fields: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, account: _Optional[str] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ..., unset_fields: _Optional[_Iterable[str]] = ...) -> None: ...

class SetTermsResponse(_message.Message):
    __slots__ = ("terms",)
    TERMS_FIELD_NUMBER: _ClassVar[int]
    terms: Terms
    def __init__(self, terms: _Optional[_Union[Terms, _Mapping]] = ...) -> None: ...

class CreateKeyRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: StoredKey
    def __init__(self, key: _Optional[_Union[StoredKey, _Mapping]] = ...) -> None: ...

class CreateKeyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListKeysRequest(_message.Message):
    __slots__ = ("account",)
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    account: str
    def __init__(self, account: _Optional[str] = ...) -> None: ...

class ListKeysResponse(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[StoredKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[StoredKey, _Mapping]]] = ...) -> None: ...

class RevokeKeyRequest(_message.Message):
    __slots__ = ("key_id",)
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    def __init__(self, key_id: _Optional[str] = ...) -> None: ...

class RevokeKeyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
