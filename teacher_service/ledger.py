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

import asyncio
import contextlib
import dataclasses
import enum
import hashlib
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from protos.errors import Reason, Refusal
from teacher_service.terms import Terms, TermsError

ACCOUNT_NAME = re.compile(r"[a-z0-9-]{1,63}")
IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")
_IDENTIFIER_EXPECTED = "1 to 64 characters of A-Z, a-z, 0-9, '_' and '-'"
OPERATORS = "operators"
"""The account of teachers' and admins' keys, unless another is named; it needs no pictures."""
WATCH_SECONDS = 1.0
MAX_COUNT = 2**53  # sums stay exact in any reader, JSON's included
NO_TERMS = Terms()

R = TypeVar("R", "Account", "Hold")


class LedgerError(Exception):
    """The books cannot do what an operator asked; one line for a person: expected, got, what to do."""


class LedgerUnavailable(LedgerError):
    """The store cannot be read or written just now; nothing was changed."""


class LedgerIncomplete(LedgerError):
    """It was done, but not all that was asked for."""


class LedgerRefusesKey(LedgerUnavailable):
    """There is a ledger elsewhere, but not for this key: nothing was done, and only an operator can help."""


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
    TEACHER = enum.auto()
    ADMIN = enum.auto()


BOOKS_DEBITED_CREDITED = {
    EntryKind.GRANT: ("issuer", "available"),
    EntryKind.HOLD: ("available", "held"),
    EntryKind.POST: ("held", "posted"),
    EntryKind.VOID: ("held", "available"),
    EntryKind.EXPIRE: ("held", "available"),
}


GENESIS = bytes(32)
"""The head of a chain before its first entry."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """The balances of an account, in pictures, and the end of its journal: last number and head of the chain."""

    name: str
    granted: int = 0
    posted: int = 0
    held: int = 0
    sequence: int = 0
    head: bytes = GENESIS

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
    """One immutable line of an account's journal, chained to the line before it (docs/ledger.md)."""

    account: str
    sequence: int
    create_time_ms: int
    kind: EntryKind
    batch_id: str
    """Of a grant: its own id, where it has one."""
    run_id: str
    picture_count: int
    digest: bytes
    """What it is about: of a hold, the pictures' digest; of a post, SHA-256 of the answer as kept; of a grant with an
    id that made an account with a key, ``key_digest``; else empty."""
    head: bytes
    """SHA-256 over the head before and this line."""

    @property
    def debit_book(self) -> str:
        """The book the pictures leave."""
        return BOOKS_DEBITED_CREDITED[self.kind][0]

    @property
    def credit_book(self) -> str:
        """The book the pictures enter."""
        return BOOKS_DEBITED_CREDITED[self.kind][1]


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a customer keeps of a post: with it, a journal rewritten or cut off can be told (``audit``)."""

    account: str
    batch_id: str
    sequence: int
    head: bytes


class Step(NamedTuple):
    """What one rule makes of an account and a batch: both as they are now, and the entries that say so."""

    account: Account
    hold: Hold | None
    entries: tuple[Entry, ...]


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


class Credential(NamedTuple):
    """A key as stored, and the terms of its account."""

    key: Key
    terms: Terms


@dataclass(frozen=True)
class Held:
    """The pictures are held; ask the engine."""


@dataclass(frozen=True, kw_only=True)
class Posted:
    """This batch is answered and charged: the answer as kept (None where it was pruned), receipt and books."""

    answer: bytes | None
    receipt: Receipt
    account: Account


# --- pure rules: state in, state and entries out ----------------------------------------------------


def apply_grant(
    account: Account, picture_count: int, now_ms: int, grant_id: str = "", first_key: Key | None = None
) -> Step:
    """More pictures for an account. Raises LedgerError for a count that is not 1 to 2**53.

    With a ``grant_id`` the entry keeps all that a repeat is compared with; ``first_key`` was made with the account.
    """
    most = MAX_COUNT - account.granted
    if not 1 <= picture_count <= most:
        raise LedgerError(f"expected a grant of 1 to {most} pictures, got {picture_count}")
    after = dataclasses.replace(account, granted=account.granted + picture_count)
    digest = key_digest(first_key) if grant_id else b""
    return _step(after, None, EntryKind.GRANT, picture_count, now_ms, digest, grant_id=grant_id)


def check_grant_id(grant_id: str, picture_count: int | None) -> None:
    """Refuses (INVALID_REQUEST) what is no id of a grant, and an id without a grant. Empty: none was given."""
    if not grant_id:
        return
    check_identifier("grant_id", grant_id)
    if picture_count is None:
        raise Refusal.of(
            Reason.INVALID_REQUEST, field="grant_id", expected="none where nothing is granted", got=repr(grant_id)
        )


def check_same_grant(made: Entry, picture_count: int, first_key: Key | None = None) -> None:
    """Refuses GRANT_ID_REUSED, naming the field, where the id was used for something else than it is now."""
    for field, before, now in (
        ("picture_count", made.picture_count, picture_count),
        ("key", made.digest, key_digest(first_key)),
    ):
        if before != now:
            raise Refusal.of(Reason.GRANT_ID_REUSED, grant_id=made.batch_id, field=field)


def check_same_account(name: str, made: Entry | None, granted: int | None, first_key: Key | None) -> None:
    """Of an account that exists: whether ``made``, the grant of the id given, began it, and with the same.

    Raises LedgerError where the name is another's, Refusal GRANT_ID_REUSED as ``check_same_grant``.
    """
    if made is None or made.sequence != 1 or granted is None:
        raise LedgerError(f"expected a new account name, got {name!r}, which exists")
    check_same_grant(made, granted, first_key)


def no_such_key(key_id: str) -> LedgerError:
    """Told of so much of it as no secret is in, should somebody have given a whole key."""
    return LedgerError(f"expected the id of a key on these books, as 'key list' prints it, got {key_id[:16]!r}")


def key_digest(key: Key | None) -> bytes:
    """SHA-256 over a key as it was made; empty for none. Revoking changes nothing here."""
    if key is None:
        return b""
    line = f"{key.key_id}|{key.account}|{key.role}|{key.secret_sha256.hex()}"
    return hashlib.sha256(line.encode()).digest()


def apply_hold(account: Account, known: Hold | None, request: HoldRequest, instance_id: str, now_ms: int) -> Step:
    """Holds a batch that is not under way and was not answered.

    Raises Refusal: BATCH_ID_REUSED (in every state, naming the field), BATCH_IN_FLIGHT, BUDGET_EXHAUSTED. A posted
    batch is the caller's to replay (``is_replay``), not to hold.
    """
    if request.picture_count < 1:
        raise LedgerError(f"expected a hold of at least 1 picture, got {request.picture_count}")
    check_settled(known, request)
    if request.picture_count > account.balance:
        raise Refusal.of(
            Reason.BUDGET_EXHAUSTED,
            requested=request.picture_count,
            available=account.balance,
            held=account.held,
        )
    hold = Hold(
        account=request.account,
        batch_id=request.batch_id,
        run_id=request.run_id,
        digest=request.digest,
        picture_count=request.picture_count,
        state=HoldState.HELD,
        instance_id=instance_id,
    )
    after = _with(account, held=account.held + request.picture_count)
    return _step(after, hold, EntryKind.HOLD, request.picture_count, now_ms, request.digest)


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


def check_settled(known: Hold | None, request: HoldRequest) -> None:
    """Refuses a batch that may yet be charged (BATCH_IN_FLIGHT), or is another one (BATCH_ID_REUSED).

    Whose server died counts as held: the next sweep gives it back.
    """
    check_same_batch(known, request)
    if known is not None and known.state is HoldState.HELD:
        raise Refusal.of(Reason.BATCH_IN_FLIGHT, batch_id=request.batch_id)


def is_replay(known: Hold | None) -> bool:
    """Whether the batch was answered and charged before."""
    return known is not None and known.state is HoldState.POSTED


def apply_post(
    account: Account,
    hold: Hold | None,
    batch_id: str,
    instance_id: str,
    answer: bytes,
    now_ms: int,
    picture_count: int | None = None,
) -> Step:
    """Charges a held batch, or ``picture_count`` of it and gives the rest back in an entry of its own.

    Raises Refusal HOLD_LOST unless this instance still holds it, LedgerError for a count above what is held.
    """
    if hold is None or hold.state is not HoldState.HELD or hold.instance_id != instance_id:
        raise Refusal.of(Reason.HOLD_LOST, batch_id=batch_id)
    charged = hold.picture_count if picture_count is None else picture_count
    if not 1 <= charged <= hold.picture_count:
        raise LedgerError(f"expected to post 1 to {hold.picture_count} pictures of batch {batch_id}, got {charged}")
    after = _with(account, held=account.held - charged, posted=account.posted + charged)
    posted = _with(hold, state=HoldState.POSTED)
    step = _step(after, posted, EntryKind.POST, charged, now_ms, hashlib.sha256(answer).digest())
    rest = hold.picture_count - charged
    if rest == 0:
        return step
    after = dataclasses.replace(step.account, held=step.account.held - rest)
    given_back = _step(after, posted, EntryKind.VOID, rest, now_ms)
    return given_back._replace(entries=step.entries + given_back.entries)


def is_same_post(
    hold: Hold | None, entry: Entry, instance_id: str, answer: bytes, picture_count: int | None = None
) -> bool:
    """Whether a post is the one already on the books as ``entry``: its outcome was lost, and it was sent again."""
    return (
        hold is not None
        and hold.state is HoldState.POSTED
        and hold.instance_id == instance_id
        and entry.digest == hashlib.sha256(answer).digest()
        and entry.picture_count == (hold.picture_count if picture_count is None else picture_count)
    )


def is_same_hold(known: Hold | None, request: HoldRequest, instance_id: str) -> bool:
    """Whether this instance holds the very same already: the outcome was lost, and the wish was sent again."""
    return (
        known is not None
        and known.state is HoldState.HELD
        and (known.instance_id, known.picture_count) == (instance_id, request.picture_count)
        and (known.digest, known.run_id) == (request.digest, request.run_id)
    )


def receipt_of(posted: Step) -> Receipt:
    """The receipt of a post just made."""
    entry = posted.entries[0]
    return Receipt(account=entry.account, batch_id=entry.batch_id, sequence=entry.sequence, head=entry.head)


def apply_release(account: Account, hold: Hold, state: HoldState, now_ms: int) -> Step:
    """Gives a held batch's pictures back, as VOIDED or EXPIRED."""
    kind = {HoldState.VOIDED: EntryKind.VOID, HoldState.EXPIRED: EntryKind.EXPIRE}[state]
    after = dataclasses.replace(account, held=account.held - hold.picture_count)
    return _step(after, dataclasses.replace(hold, state=state), kind, hold.picture_count, now_ms)


def apply_terms(terms: Terms, said: Terms, unset: Collection[str]) -> Terms:
    """An account's terms after a change. Raises LedgerError for one that cannot be meant."""
    try:
        return terms.changed(said, unset)
    except TermsError as error:
        raise LedgerError(str(error)) from None


def _step(
    account: Account,
    hold: Hold | None,
    kind: EntryKind,
    picture_count: int,
    now_ms: int,
    digest: bytes = b"",
    *,
    grant_id: str = "",
) -> Step:
    """Numbers and chains one entry; ``account`` has its new balances already."""
    # The promise of the books, checked at every step: never negative, never overspent.
    assert account.held >= 0 and account.posted >= 0 and account.balance >= 0, account
    sequence = account.sequence + 1
    batch_id, run_id = (hold.batch_id, hold.run_id) if hold is not None else (grant_id, "")
    line = f"{account.name}|{sequence}|{now_ms}|{kind}|{batch_id}|{run_id}|{picture_count}|{digest.hex()}"
    head = hashlib.sha256(account.head + line.encode()).digest()
    entry = Entry(
        account=account.name,
        sequence=sequence,
        create_time_ms=now_ms,
        kind=kind,
        batch_id=batch_id,
        run_id=run_id,
        picture_count=picture_count,
        digest=digest,
        head=head,
    )
    return Step(_with(account, sequence=sequence, head=head), hold, (entry,))


def _with(record: R, **changes: Any) -> R:
    """``dataclasses.replace`` at a quarter of its cost, for a record of the books: it checks nothing when made."""
    changed = object.__new__(type(record))
    changed.__dict__.update(record.__dict__, **changes)
    return changed


def check_account_name(name: str) -> None:
    """Raises LedgerError unless the name may be an account's."""
    if not ACCOUNT_NAME.fullmatch(name):
        raise LedgerError(f"expected an account name of 1 to 63 characters of a-z, 0-9 and '-', got {name!r}")


def check_identifier(field: str, value: str) -> None:
    """Refuses (INVALID_REQUEST) what is no id of a batch, a run or an instance."""
    if not IDENTIFIER.fullmatch(value):
        raise Refusal.of(Reason.INVALID_REQUEST, field=field, expected=_IDENTIFIER_EXPECTED, got=repr(value[:80]))


def now_ms() -> int:
    """Wall-clock time in milliseconds since 1970: what journal and leases are written in."""
    return time.time_ns() // 1_000_000


# --- the interface ----------------------------------------------------------------------------------


class Ledger(Protocol):
    """The books. Every method may raise LedgerUnavailable; then nothing was changed, or it cannot be known.

    Whoever holds is an *instance*: the ledger itself (``instance_id`` empty), or a teacher elsewhere on whose behalf
    it acts (``quota``). An instance that shows no life for a lease loses its holds.
    """

    async def hold(self, request: HoldRequest, *, instance_id: str = "") -> Held | Posted:
        """Holds a batch, or finds it answered before. Refusals as in ``apply_hold``.

        A new hold may be told before it is durable, and so before a reader sees it; a kept answer never is. Another
        instance may repeat its own hold, and renews its lease with it.
        """

    async def replay(self, request: HoldRequest) -> Posted | None:
        """The batch as it was answered and charged, None where it was not; reads alone, whatever its count is.

        Refusals as in ``hold``: BATCH_ID_REUSED, and BATCH_IN_FLIGHT, since what is held may yet be charged.
        LedgerError where there is no such account.
        """

    async def post(
        self, account: str, batch_id: str, answer: bytes, picture_count: int | None = None, *, instance_id: str = ""
    ) -> Posted:
        """Charges a held batch, or a part of it, and keeps its answer, durable on return. Refusal: HOLD_LOST.

        The same post of the same instance, made again, is answered as the first.
        """

    async def void(self, account: str, batch_id: str, *, instance_id: str = "") -> None:
        """Gives this instance's hold back; nothing happens where there is none."""

    async def renew_lease(self, instance_id: str) -> int:
        """Another instance lives: its holds stand for another lease, whose length in ms is returned."""

    async def end_lease(self, instance_id: str) -> None:
        """Another instance ends: voids whatever it holds."""

    async def create_account(
        self,
        name: str,
        granted: int | None,
        key: Key | None = None,
        terms: Terms = NO_TERMS,
        *,
        grant_id: str = "",
    ) -> Account:
        """A new account, its first key and its terms, all or nothing; without a grant where ``granted`` is None.

        LedgerError where the name is taken or no name, or the grant no count. With a ``grant_id`` the same, made
        again, returns the account as it is now; refusals: INVALID_REQUEST, GRANT_ID_REUSED.
        """

    async def grant(self, name: str, picture_count: int, *, grant_id: str = "") -> Account:
        """More pictures; with a ``grant_id`` once, however often. LedgerError where there is no such account.

        Refusals: INVALID_REQUEST for what is no id; GRANT_ID_REUSED where the account has the id with another count.
        """

    async def account(self, name: str) -> Account:
        """The balances. LedgerError where there is no such account."""

    async def accounts(self, *, after_name: str = "", limit: int = 1000) -> Sequence[Account]:
        """Accounts after ``after_name``, in the store's own order of names, at most ``limit``."""

    async def terms(self, name: str) -> Terms:
        """What was said of an account's answers and limits. LedgerError where there is no such account."""

    async def set_terms(self, name: str, said: Terms, unset: Collection[str] = ()) -> Terms:
        """Changes what is said, unsets the fields named, and returns the terms as they are now.

        No entry of the journal: terms move no pictures. LedgerError where there is no such account or field.
        """

    async def run_posted(self, account: str, run_id: str) -> int:
        """Pictures posted under one run."""

    async def statement(
        self, account: str, *, run_id: str = "", after_sequence: int = 0, limit: int = 1000
    ) -> Sequence[Entry]:
        """Journal entries after ``after_sequence``, oldest first, at most ``limit``."""

    async def add_key(self, key: Key) -> None:
        """Stores a credential; the same one again changes nothing. LedgerError where there is no such account."""

    async def credential(self, key_id: str) -> Credential | None:
        """A key as stored, revoked or not, and its account's terms; None where there is none."""

    async def keys(self, account: str) -> Sequence[Key]:
        """Every credential of an account."""

    async def revoke_key(self, key_id: str) -> None:
        """Ends a credential for good. LedgerError where there is none."""

    async def check(self) -> None:
        """Raises LedgerUnavailable while the books cannot be read, or this instance's lease could not be written."""

    async def close(self) -> None:
        """Gives back what this instance still holds and closes the store."""


async def watch(
    ledger: Ledger,
    name: str,
    stop: asyncio.Event | None = None,
    check: Callable[[], Awaitable[object]] | None = None,
) -> AsyncGenerator[Account]:
    """The account now, then whenever it has changed, until ``stop`` is set. Raises as ``Ledger.account`` does.

    It asks once a second: what changes an account may be another server on the same store. Before each look it
    awaits ``check``, which ends the watch by raising.
    """
    stop = stop or asyncio.Event()
    told = None
    while not stop.is_set():
        if check is not None:
            await check()
        found = await ledger.account(name)
        if found != told:
            told = found
            yield found
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), WATCH_SECONDS)
