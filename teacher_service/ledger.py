"""The books, as pure rules and as an interface; the stores are in ``ledger_memory`` and ``ledger_sql``.

An account's pictures stand in three of its books: *available*, *held* (batches under way) and *posted*
(answered and charged). Every step moves pictures from one book to another, so the journal's entries are
double-entry by construction: what one book is debited another is credited, and all books together sum to zero.

    grant   issuer    -> available
    hold    available -> held         checked against the balance here, so that a post never fails for want of it
    post    held      -> posted       together with the answer, in one transaction
    void    held      -> available    the engine failed, or the caller has gone
    expire  held      -> available    the server that held has died
"""

import dataclasses
import enum
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from protos.errors import Reason, Refusal

ACCOUNT_NAME = re.compile(r"[a-z0-9-]{1,63}")
MAX_COUNT = 2**53  # sums stay exact in any reader, JSON's included


class LedgerError(Exception):
    """The books cannot do what an operator asked; one line for a person: expected, got, what to do."""


class LedgerUnavailable(LedgerError):
    """The store cannot be read or written just now; nothing was changed."""


class HoldState(enum.StrEnum):
    """Where a batch stands. Posted is final; voided and expired pin nothing: the id may be held again."""

    HELD = enum.auto()
    POSTED = enum.auto()
    VOIDED = enum.auto()
    EXPIRED = enum.auto()


class EntryKind(enum.StrEnum):
    """What a journal entry records."""

    GRANT = enum.auto()
    HOLD = enum.auto()
    POST = enum.auto()
    VOID = enum.auto()
    EXPIRE = enum.auto()


class Role(enum.StrEnum):
    """What a key may do."""

    CUSTOMER = enum.auto()
    ADMIN = enum.auto()


BOOKS_DEBITED_CREDITED = {
    EntryKind.GRANT: ("issuer", "available"),
    EntryKind.HOLD: ("available", "held"),
    EntryKind.POST: ("held", "posted"),
    EntryKind.VOID: ("held", "available"),
    EntryKind.EXPIRE: ("held", "available"),
}


@dataclass(frozen=True, kw_only=True)
class Account:
    """The balances of an account, in pictures, and the number of its last journal entry."""

    name: str
    granted: int = 0
    posted: int = 0
    held: int = 0
    sequence: int = 0

    @property
    def balance(self) -> int:
        """What a new hold may take."""
        return self.granted - self.posted - self.held


@dataclass(frozen=True, kw_only=True)
class Hold:
    """One batch on the books. ``digest`` ties the id to its pictures; ``instance_id`` names who held it."""

    account: str
    batch_id: str
    run_id: str
    digest: bytes
    picture_count: int
    state: HoldState
    instance_id: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One immutable line of an account's journal."""

    account: str
    sequence: int
    create_time_ms: int
    kind: EntryKind
    batch_id: str
    run_id: str
    picture_count: int

    @property
    def debit_book(self) -> str:
        """The book the pictures leave."""
        return BOOKS_DEBITED_CREDITED[self.kind][0]

    @property
    def credit_book(self) -> str:
        """The book the pictures enter."""
        return BOOKS_DEBITED_CREDITED[self.kind][1]


@dataclass(frozen=True, kw_only=True)
class HoldRequest:
    """A wish to hold ``picture_count`` pictures for a batch."""

    account: str
    batch_id: str
    run_id: str
    digest: bytes
    picture_count: int


@dataclass(frozen=True, kw_only=True)
class Key:
    """A credential as stored: never the secret, only its SHA-256."""

    key_id: str
    account: str
    role: Role
    secret_sha256: bytes
    revoked: bool = False


@dataclass(frozen=True)
class Held:
    """The pictures are held; ask the engine."""


@dataclass(frozen=True)
class Posted:
    """This batch was answered and charged before: here is the answer as kept; None where it was pruned."""

    answer: bytes | None


# --- pure rules: state in, state and entry out ------------------------------------------------------


def apply_grant(account: Account, picture_count: int, now_ms: int) -> tuple[Account, Entry]:
    """More pictures for an account. Raises LedgerError for a count that is not 1 to 2**53."""
    if not 1 <= picture_count <= MAX_COUNT - account.granted:
        raise LedgerError(f"expected a grant of 1 to {MAX_COUNT - account.granted} pictures, got {picture_count}")
    after = _next(account, granted=account.granted + picture_count)
    return after, _entry(after, EntryKind.GRANT, picture_count, now_ms)


def apply_hold(
    account: Account, known: Hold | None, request: HoldRequest, instance_id: str, now_ms: int
) -> tuple[Account, Hold, Entry]:
    """Holds a batch that is not under way and was not answered.

    Raises Refusal: BATCH_ID_REUSED (in every state, naming the field), BATCH_IN_FLIGHT, BUDGET_EXHAUSTED. A posted
    batch is the caller's to replay (``is_replay``), not to hold.
    """
    if request.picture_count < 1:
        raise LedgerError(f"expected a hold of at least 1 picture, got {request.picture_count}")
    check_same_batch(known, request)
    if known is not None and known.state is HoldState.HELD:
        raise Refusal.of(Reason.BATCH_IN_FLIGHT, batch_id=request.batch_id)
    if request.picture_count > account.balance:
        raise Refusal.of(
            Reason.BUDGET_EXHAUSTED,
            requested=request.picture_count,
            available=account.balance,
            held=account.held,
        )
    after = _next(account, held=account.held + request.picture_count)
    hold = Hold(
        account=request.account,
        batch_id=request.batch_id,
        run_id=request.run_id,
        digest=request.digest,
        picture_count=request.picture_count,
        state=HoldState.HELD,
        instance_id=instance_id,
    )
    return after, hold, _entry(after, EntryKind.HOLD, request.picture_count, now_ms, hold)


def check_same_batch(known: Hold | None, request: HoldRequest) -> None:
    """Refuses BATCH_ID_REUSED where the id stands for other pictures or another run, whatever its state."""
    if known is None:
        return
    for field, before, now in (
        ("pictures", known.digest, request.digest),
        ("run_id", known.run_id, request.run_id),
    ):
        if before != now:
            raise Refusal.of(Reason.BATCH_ID_REUSED, batch_id=request.batch_id, field=field)


def is_replay(known: Hold | None) -> bool:
    """Whether the batch was answered and charged before."""
    return known is not None and known.state is HoldState.POSTED


def apply_post(
    account: Account, hold: Hold | None, batch_id: str, instance_id: str, now_ms: int
) -> tuple[Account, Hold, Entry]:
    """Charges a held batch. Raises Refusal HOLD_LOST unless this instance still holds it."""
    if hold is None or hold.state is not HoldState.HELD or hold.instance_id != instance_id:
        raise Refusal.of(Reason.HOLD_LOST, batch_id=batch_id)
    after = _next(account, held=account.held - hold.picture_count, posted=account.posted + hold.picture_count)
    posted = dataclasses.replace(hold, state=HoldState.POSTED)
    return after, posted, _entry(after, EntryKind.POST, hold.picture_count, now_ms, hold)


def apply_release(account: Account, hold: Hold, state: HoldState, now_ms: int) -> tuple[Account, Hold, Entry]:
    """Gives a held batch's pictures back, as VOIDED or EXPIRED."""
    kind = {HoldState.VOIDED: EntryKind.VOID, HoldState.EXPIRED: EntryKind.EXPIRE}[state]
    after = _next(account, held=account.held - hold.picture_count)
    return (
        after,
        dataclasses.replace(hold, state=state),
        _entry(after, kind, hold.picture_count, now_ms, hold),
    )


def _next(account: Account, **balances: int) -> Account:
    changes: dict[str, Any] = {"sequence": account.sequence + 1, **balances}
    after = dataclasses.replace(account, **changes)
    # The promise of the books, checked at every step: never negative, never overspent.
    assert after.held >= 0 and after.posted >= 0 and after.balance >= 0, after
    return after


def _entry(account: Account, kind: EntryKind, picture_count: int, now_ms: int, hold: Hold | None = None) -> Entry:
    return Entry(
        account=account.name,
        sequence=account.sequence,
        create_time_ms=now_ms,
        kind=kind,
        batch_id=hold.batch_id if hold else "",
        run_id=hold.run_id if hold else "",
        picture_count=picture_count,
    )


def check_account_name(name: str) -> None:
    """Raises LedgerError unless the name may be an account's."""
    if not ACCOUNT_NAME.fullmatch(name):
        raise LedgerError(f"expected an account name of 1 to 63 characters of a-z, 0-9 and '-', got {name!r}")


def now_ms() -> int:
    """Wall-clock time in milliseconds since 1970: what journal and leases are written in."""
    return time.time_ns() // 1_000_000


# --- the interface ----------------------------------------------------------------------------------


class Ledger(Protocol):
    """The books. Every method may raise LedgerUnavailable; then nothing was changed."""

    async def hold(self, request: HoldRequest) -> Held | Posted:
        """Holds a batch, or finds it answered before. Refusals as in ``apply_hold``.

        A new hold may be told before it is durable, and so before a reader sees it; a kept answer never is.
        """

    async def post(self, account: str, batch_id: str, answer: bytes) -> Account:
        """Charges a held batch and keeps its answer, durable on return. Refusal: HOLD_LOST."""

    async def void(self, account: str, batch_id: str) -> None:
        """Gives this instance's hold back; nothing happens where there is none."""

    async def create_account(self, name: str, granted: int, key: Key | None = None) -> Account:
        """A new account and its first key, both or neither.

        LedgerError where the name is taken or no name, or the grant no count.
        """

    async def grant(self, name: str, picture_count: int) -> Account:
        """More pictures. LedgerError where there is no such account."""

    async def account(self, name: str) -> Account:
        """The balances. LedgerError where there is no such account."""

    async def accounts(self) -> Sequence[Account]:
        """Every account, by name."""

    async def run_posted(self, account: str, run_id: str) -> int:
        """Pictures posted under one run."""

    async def statement(
        self, account: str, *, run_id: str = "", after_sequence: int = 0, limit: int = 1000
    ) -> Sequence[Entry]:
        """Journal entries after ``after_sequence``, oldest first, at most ``limit``."""

    async def add_key(self, key: Key) -> None:
        """Stores a credential. LedgerError where there is no such account."""

    async def key(self, key_id: str) -> Key | None:
        """The credential as stored, revoked or not; None where there is none."""

    async def keys(self, account: str) -> Sequence[Key]:
        """Every credential of an account."""

    async def revoke_key(self, key_id: str) -> None:
        """Ends a credential for good. LedgerError where there is none."""

    async def close(self) -> None:
        """Gives back what this instance still holds and closes the store."""
