import string

import pytest
from google.protobuf.any_pb2 import Any
from google.rpc import code_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from protos.errors import DOMAIN, TABLE, Reason, Refusal

EVERY = pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.name)


def variables_of(reason: Reason) -> dict[str, object]:
    names = {name for _, name, _, _ in string.Formatter().parse(TABLE[reason].sentence) if name}
    return {name: f"some {{{name}}}" for name in names}


def detail(status: Status, kind: type) -> object | None:
    for packed in status.details:
        found = kind()
        if packed.Is(found.DESCRIPTOR):
            packed.Unpack(found)
            return found
    return None


def test_every_reason_has_a_row_and_every_row_a_reason() -> None:
    assert set(TABLE) == set(Reason)


@EVERY
def test_every_row_renders_and_survives_the_wire(reason: Reason) -> None:
    refusal = Refusal.of(reason, **variables_of(reason))
    assert all(str(value) in refusal.message for value in variables_of(reason).values())
    status = Status.FromString(refusal.to_status().SerializeToString())
    assert Refusal.from_status(status) == refusal
    assert (status.code, status.message) == (TABLE[reason].code, refusal.message)


@EVERY
def test_every_status_names_reason_domain_and_variables(reason: Reason) -> None:
    refusal = Refusal.of(reason, **variables_of(reason))
    info = detail(refusal.to_status(), ErrorInfo)
    assert isinstance(info, ErrorInfo)
    assert (info.reason, info.domain) == (reason.name, DOMAIN) == (reason.name, "mekd")
    assert dict(info.metadata) == variables_of(reason)


@EVERY
def test_a_row_with_a_variable_missing_fails_where_it_is_made(reason: Reason) -> None:
    for missing in variables_of(reason):
        given = variables_of(reason)
        del given[missing]
        with pytest.raises(KeyError, match=missing):
            Refusal.of(reason, **given)


# Written out, not derived from the table: who waits for an exhausted budget waits for ever.
WAITING_HELPS = {
    Reason.OVERLOADED: 0.2,
    Reason.RATE_LIMITED: 1.0,
    Reason.TOO_MANY_STREAMS: 2.0,
    Reason.TOO_MANY_OUTSTANDING: 0.2,
    Reason.DRAINING: 1.0,
    Reason.LEDGER_UNAVAILABLE: 2.0,
    Reason.BATCH_IN_FLIGHT: 0.5,
    Reason.HOLD_LOST: 0.5,
}


@EVERY
def test_retry_advice_is_given_only_where_waiting_helps(reason: Reason) -> None:
    refusal = Refusal.of(reason, **variables_of(reason))
    advice = detail(refusal.to_status(), RetryInfo)
    seconds = advice.retry_delay.ToTimedelta().total_seconds() if isinstance(advice, RetryInfo) else None
    assert seconds == refusal.retry_seconds == WAITING_HELPS.get(reason)


@EVERY
@pytest.mark.parametrize("seconds", [0.0, 0.0004, 1 / 3, 1.0, 86_400.5])
def test_a_computed_wait_travels_where_waiting_helps(reason: Reason, seconds: float) -> None:
    refusal = Refusal.of(reason, **variables_of(reason)).after(seconds)
    assert Refusal.from_status(Status.FromString(refusal.to_status().SerializeToString())) == refusal
    if reason not in WAITING_HELPS:
        assert refusal.retry_seconds is None
    else:
        assert seconds <= refusal.retry_seconds < seconds + 0.001 + 1e-9
    assert Refusal.of(reason, **variables_of(reason)).after(-5).retry_seconds in (None, 0.0)


def test_a_wait_of_another_server_is_kept_and_never_negative() -> None:
    for nanos, kept in ((250_000_000, 0.25), (-5, 0.0)):
        status = Refusal.of(Reason.DRAINING).to_status()
        advice = RetryInfo()
        advice.retry_delay.nanos = nanos
        status.details[-1].Pack(advice)
        assert Refusal.from_status(status).retry_seconds == kept


CODES = {
    Reason.BUDGET_EXHAUSTED: code_pb2.RESOURCE_EXHAUSTED,
    Reason.OVERLOADED: code_pb2.UNAVAILABLE,
    Reason.RATE_LIMITED: code_pb2.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_STREAMS: code_pb2.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_OUTSTANDING: code_pb2.RESOURCE_EXHAUSTED,
    Reason.DRAINING: code_pb2.UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: code_pb2.DEADLINE_EXCEEDED,
    Reason.LEDGER_UNAVAILABLE: code_pb2.UNAVAILABLE,
    Reason.LEDGER_OUTCOME_UNKNOWN: code_pb2.UNKNOWN,
    Reason.INVALID_IMAGES: code_pb2.INVALID_ARGUMENT,
    Reason.BATCH_ID_REUSED: code_pb2.ALREADY_EXISTS,
    Reason.GRANT_ID_REUSED: code_pb2.ALREADY_EXISTS,
    Reason.WATCH_LIMIT: code_pb2.RESOURCE_EXHAUSTED,
    Reason.ANSWER_EXPIRED: code_pb2.FAILED_PRECONDITION,
    Reason.BATCH_IN_FLIGHT: code_pb2.ABORTED,
    Reason.UNKNOWN_MODEL: code_pb2.NOT_FOUND,
    Reason.UNIMPLEMENTED: code_pb2.UNIMPLEMENTED,
    Reason.UNAUTHENTICATED: code_pb2.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: code_pb2.PERMISSION_DENIED,
    Reason.ENGINE_FAILED: code_pb2.INTERNAL,
}


@pytest.mark.parametrize(("reason", "code"), CODES.items(), ids=lambda value: getattr(value, "name", ""))
def test_codes_are_those_of_the_contract(reason: Reason, code: int) -> None:
    assert Refusal.of(reason, **variables_of(reason)).code == code


def test_exhausted_budget_travels_as_a_quota_failure() -> None:
    refusal = Refusal.of(Reason.BUDGET_EXHAUSTED, requested=9, available=5, held=2)
    failure = detail(refusal.to_status(), QuotaFailure)
    assert isinstance(failure, QuotaFailure)
    assert [violation.quota_metric for violation in failure.violations] == ["pictures"]
    assert refusal.variables == {"requested": "9", "available": "5", "held": "2"}
    assert detail(Refusal.of(Reason.DRAINING).to_status(), QuotaFailure) is None


@pytest.mark.parametrize("reason", [Reason.INVALID_IMAGES, Reason.INVALID_REQUEST])
def test_malformed_requests_name_the_field(reason: Reason) -> None:
    status = Refusal.of(reason, field="batch.images.width", expected=8, got=9).to_status()
    broken = detail(status, BadRequest)
    assert isinstance(broken, BadRequest)
    assert [violation.field for violation in broken.field_violations] == ["batch.images.width"]
    assert status.message == "batch.images.width: expected 8, got 9"


def info(reason: str, domain: str = DOMAIN, **metadata: str) -> Any:
    packed = Any()
    packed.Pack(ErrorInfo(reason=reason, domain=domain, metadata=metadata))
    return packed


@pytest.mark.parametrize(
    "details",
    [
        [],
        [info("TEACHER_ON_HOLIDAY", until="monday")],
        [info("OVERLOADED")],  # of this table, with a variable missing
        [info("DRAINING", domain="other.example")],
        [Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff\xff")],
        [Any(type_url="type.googleapis.com/of.the.Future", value=b"\xff")],
    ],
    ids=["none", "reason", "variable", "domain", "garbage", "type"],
)
def test_what_the_table_does_not_know_keeps_its_message_and_gets_no_advice(details: list[Any]) -> None:
    status = Status(code=code_pb2.UNAVAILABLE, message="gone fishing", details=details)
    refusal = Refusal.from_status(status)
    assert refusal.reason is Reason.UNKNOWN and refusal.retry_seconds is None
    assert refusal.message == "UNAVAILABLE: gone fishing"


def test_a_code_of_the_future_is_no_crash() -> None:
    assert Refusal.from_status(Status(code=99, message="new")).message == "code 99: new"


def test_variables_of_any_name_survive() -> None:
    # "reason" and "cls" are parameter names on this side of the wire.
    packed = Any()
    packed.Pack(ErrorInfo(reason="DRAINING", domain=DOMAIN, metadata={"reason": "x", "cls": "y"}))
    status = Status(code=code_pb2.UNAVAILABLE, details=[packed])
    refusal = Refusal.from_status(status)
    assert refusal.reason is Reason.DRAINING and refusal.variables == {"reason": "x", "cls": "y"}


def test_a_refusal_reads_as_one_line() -> None:
    refusal = Refusal.of(Reason.BATCH_IN_FLIGHT, batch_id="b-1")
    assert str(refusal) == "BATCH_IN_FLIGHT: batch b-1 is still being answered; send it again in a moment"
