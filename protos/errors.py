"""The table of refusals: reason -> status code, public sentence, retry advice; and its one translator.

A refusal travels as ``google.rpc.Status`` with ErrorInfo (reason, domain, the variables of the sentence) and,
where they help, QuotaFailure, BadRequest or RetryInfo. ``Refusal`` is that status as a Python exception, the
same on both sides of the wire: ``Refusal.from_status(refusal.to_status()) == refusal``.
"""

import enum
import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

DOMAIN = "mekd"


class Reason(enum.Enum):
    """Why a request was refused. The name travels in ErrorInfo.reason."""

    BUDGET_EXHAUSTED = enum.auto()
    OVERLOADED = enum.auto()
    RATE_LIMITED = enum.auto()
    TOO_MANY_STREAMS = enum.auto()
    TOO_MANY_OUTSTANDING = enum.auto()
    DRAINING = enum.auto()
    DEADLINE_EXCEEDED = enum.auto()
    LEDGER_UNAVAILABLE = enum.auto()
    LEDGER_OUTCOME_UNKNOWN = enum.auto()
    LEDGER_REFUSED = enum.auto()
    STREAM_NOT_CONFIGURED = enum.auto()
    INVALID_REQUEST = enum.auto()
    INVALID_IMAGES = enum.auto()
    BATCH_ID_REUSED = enum.auto()
    GRANT_ID_REUSED = enum.auto()
    BATCH_IN_FLIGHT = enum.auto()
    HOLD_LOST = enum.auto()
    ANSWER_EXPIRED = enum.auto()
    UNKNOWN_MODEL = enum.auto()
    UNIMPLEMENTED = enum.auto()
    UNAUTHENTICATED = enum.auto()
    PERMISSION_DENIED = enum.auto()
    ACCOUNT_SUSPENDED = enum.auto()
    WATCH_LIMIT = enum.auto()
    ENGINE_FAILED = enum.auto()
    UNKNOWN = enum.auto()


class Entry(NamedTuple):
    """One row of the table. ``retry_seconds`` is None where waiting does not help."""

    code: int
    sentence: str
    retry_seconds: float | None = None


TABLE: dict[Reason, Entry] = {
    Reason.BUDGET_EXHAUSTED: Entry(
        code_pb2.RESOURCE_EXHAUSTED,
        "the account has {available} pictures available, {requested} were asked for and {held} are held for "
        "batches under way; ask for fewer, or have the budget raised",
    ),
    Reason.OVERLOADED: Entry(
        code_pb2.UNAVAILABLE,
        "the queue is full ({limit} pictures); send the same batch again",
        0.2,
    ),
    # Limits of an account, or of the server as a whole. They pass by themselves: not to be taken for a spent budget.
    Reason.RATE_LIMITED: Entry(
        code_pb2.RESOURCE_EXHAUSTED,
        "the account may ask for {limit} pictures a second; send the same batch again in {wait} s",
        1.0,
    ),
    Reason.TOO_MANY_STREAMS: Entry(
        code_pb2.RESOURCE_EXHAUSTED, "{whose} may have {limit} streams open at once; connect again later", 2.0
    ),
    Reason.TOO_MANY_OUTSTANDING: Entry(
        code_pb2.RESOURCE_EXHAUSTED,
        "the account may have {limit} pictures outstanding, {requested} were asked for and {outstanding} are being "
        "answered; send the same batch again",
        0.2,
    ),
    Reason.DRAINING: Entry(
        code_pb2.UNAVAILABLE, "the server is stopping; connect again and send the same batch", 1.0
    ),
    Reason.DEADLINE_EXCEEDED: Entry(
        code_pb2.DEADLINE_EXCEEDED,
        "the call's deadline passed before the model had begun with the batch; nothing was charged",
    ),
    Reason.LEDGER_UNAVAILABLE: Entry(
        code_pb2.UNAVAILABLE,
        "the ledger cannot be written just now, so nothing is answered; send the same batch again, under the same "
        "id: it is charged once",
        2.0,
    ),
    # What an operator asked for and did not name with an id: done twice it counts twice, so no advice to repeat it.
    Reason.LEDGER_OUTCOME_UNKNOWN: Entry(
        code_pb2.UNKNOWN,
        "the ledger failed, and whether the change was made is not known; "
        "look whether it was done before you do it again",
    ),
    # What an operator asked of the books and they cannot do: no such account, a name taken, a grant that is no count.
    Reason.LEDGER_REFUSED: Entry(code_pb2.FAILED_PRECONDITION, "{problem}"),
    Reason.STREAM_NOT_CONFIGURED: Entry(
        code_pb2.INVALID_ARGUMENT,
        "expected one config as the first message of the stream, got {got}",
    ),
    Reason.INVALID_REQUEST: Entry(code_pb2.INVALID_ARGUMENT, "{field}: expected {expected}, got {got}"),
    Reason.INVALID_IMAGES: Entry(code_pb2.INVALID_ARGUMENT, "{field}: expected {expected}, got {got}"),
    Reason.BATCH_ID_REUSED: Entry(
        code_pb2.ALREADY_EXISTS,
        "batch id {batch_id} was used before with another {field}; new pictures need a new id",
    ),
    Reason.GRANT_ID_REUSED: Entry(
        code_pb2.ALREADY_EXISTS,
        "grant id {grant_id} was used before with another {field}; a new grant needs a new id",
    ),
    Reason.BATCH_IN_FLIGHT: Entry(
        code_pb2.ABORTED, "batch {batch_id} is still being answered; send it again in a moment", 0.5
    ),
    Reason.HOLD_LOST: Entry(
        code_pb2.ABORTED,
        "the hold of batch {batch_id} ended before its answer was booked; nothing was charged; "
        "send the same batch again",
        0.5,
    ),
    Reason.ANSWER_EXPIRED: Entry(
        code_pb2.FAILED_PRECONDITION,
        "batch {batch_id} was answered and charged before, but its answer is no longer kept",
    ),
    # Of the Open Inference Protocol. Clients look for the first four words.
    Reason.UNKNOWN_MODEL: Entry(code_pb2.NOT_FOUND, "Request for unknown model: {model} is not found"),
    Reason.UNIMPLEMENTED: Entry(code_pb2.UNIMPLEMENTED, "{method} is not offered by this server"),
    Reason.UNAUTHENTICATED: Entry(
        code_pb2.UNAUTHENTICATED, "expected 'authorization: Bearer KEY' with a valid key, got {got}"
    ),
    Reason.PERMISSION_DENIED: Entry(code_pb2.PERMISSION_DENIED, "{method}: expected {expected}, got {got}"),
    Reason.ACCOUNT_SUSPENDED: Entry(
        code_pb2.PERMISSION_DENIED,
        "account {account} is suspended; its balance stays as it is: ask whoever runs this teacher",
    ),
    Reason.WATCH_LIMIT: Entry(
        code_pb2.RESOURCE_EXHAUSTED,
        "{limit} watches or statements of {scope} are open already; end one, or ask with GetBalance or ListStatement",
    ),
    Reason.ENGINE_FAILED: Entry(
        code_pb2.INTERNAL, "the model failed on this batch; nothing was charged (incident {incident})"
    ),
    # What a peer with a newer table says: its message is kept, no advice is invented.
    Reason.UNKNOWN: Entry(code_pb2.UNKNOWN, "{message}"),
}


@dataclass(eq=True)
class Refusal(Exception):
    """A request refused for a reason of the table.

    ``variables`` fill the sentence and travel in ErrorInfo.metadata; a missing one is a programming error
    (KeyError at the first rendering, and a test renders every row). ``wait_seconds`` is a wait computed for this very
    request, in place of the table's; only where the table gives advice at all.
    """

    reason: Reason
    variables: dict[str, str] = field(default_factory=dict)
    wait_seconds: float | None = None

    __hash__ = Exception.__hash__  # a dataclass with eq drops it, and the runtime keeps exceptions in sets

    @classmethod
    def of(cls, reason: Reason, **variables: object) -> "Refusal":
        """A refusal with its variables as text, its sentence proven complete."""
        refusal = cls(reason, {name: str(value) for name, value in variables.items()})
        refusal.message  # noqa: B018  a missing variable must fail here, not on the wire
        return refusal

    @property
    def code(self) -> int:
        """The canonical code, ``google.rpc.Code``."""
        return TABLE[self.reason].code

    @property
    def message(self) -> str:
        """The public sentence: what was expected, what came, what to do."""
        return TABLE[self.reason].sentence.format(**self.variables)

    @property
    def retry_seconds(self) -> float | None:
        """How long to wait before the same request may succeed; None where waiting does not help."""
        advised = TABLE[self.reason].retry_seconds
        return advised if advised is None or self.wait_seconds is None else self.wait_seconds

    def after(self, seconds: float) -> "Refusal":
        """The same refusal with a computed wait, in whole milliseconds; for reasons where waiting helps."""
        advised, rounded = TABLE[self.reason].retry_seconds, math.ceil(max(0.0, seconds) * 1000) / 1000
        return self if advised is None else replace(self, wait_seconds=None if rounded == advised else rounded)

    def __str__(self) -> str:
        return f"{self.reason.name}: {self.message}"

    def to_status(self) -> Status:
        """The refusal as it travels."""
        status = Status(code=self.code, message=self.message)
        status.details.add().Pack(ErrorInfo(reason=self.reason.name, domain=DOMAIN, metadata=dict(self.variables)))
        if self.reason is Reason.BUDGET_EXHAUSTED:
            violation = QuotaFailure.Violation(subject="account", description=self.message, quota_metric="pictures")
            status.details.add().Pack(QuotaFailure(violations=[violation]))
        if "field" in self.variables and self.code == code_pb2.INVALID_ARGUMENT:
            broken = BadRequest.FieldViolation(field=self.variables["field"], description=self.message)
            status.details.add().Pack(BadRequest(field_violations=[broken]))
        if self.retry_seconds is not None:
            delay = Duration()
            delay.FromNanoseconds(round(self.retry_seconds * 1e9))
            status.details.add().Pack(RetryInfo(retry_delay=delay))
        return status

    @classmethod
    def from_status(cls, status: Status) -> "Refusal":
        """The refusal in a status; UNKNOWN with the status's own message where the table has no such row."""
        info, advice = ErrorInfo(), RetryInfo()
        found: Refusal | None = None
        try:
            for detail in status.details:
                if detail.Is(RetryInfo.DESCRIPTOR):
                    detail.Unpack(advice)
                elif detail.Is(ErrorInfo.DESCRIPTOR) and found is None:
                    detail.Unpack(info)
                    if info.domain == DOMAIN:
                        found = cls(Reason[info.reason], dict(info.metadata))
                        found.message  # noqa: B018  a variable may be missing
        except (KeyError, DecodeError):  # a reason, or a variable of one, that this table does not know
            found = None
        if found is not None:
            delay = advice.retry_delay
            seconds = round(max(0.0, delay.seconds + delay.nanos / 1e9), 9)
            if advice.HasField("retry_delay") and seconds != found.retry_seconds:
                found.wait_seconds = seconds
            return found
        code = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else f"code {status.code}"
        return cls.of(Reason.UNKNOWN, message=f"{code}: {status.message}")
