"""The books' values <-> their messages, both ways side by side: ``quota`` serves them, ``ledger_remote`` asks."""

from google.protobuf.timestamp_pb2 import Timestamp

from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as wire
from teacher_service.ledger import Account, Entry, EntryKind, Key, Posted, Receipt, Role
from teacher_service.terms import FIELDS, Terms, TermsError

_KINDS = {
    EntryKind.GRANT: wire.ENTRY_KIND_GRANT,
    EntryKind.HOLD: wire.ENTRY_KIND_HOLD,
    EntryKind.POST: wire.ENTRY_KIND_POST,
    EntryKind.VOID: wire.ENTRY_KIND_VOID,
    EntryKind.EXPIRE: wire.ENTRY_KIND_EXPIRE,
}
_KINDS_BACK = {number: kind for kind, number in _KINDS.items()}
_ROLES = {Role.CUSTOMER: wire.ROLE_CUSTOMER, Role.TEACHER: wire.ROLE_TEACHER, Role.ADMIN: wire.ROLE_ADMIN}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}
_ANSWERS = {None: wire.SOLD_ANSWERS_UNSPECIFIED, "soft": wire.SOLD_ANSWERS_SOFT, "hard": wire.SOLD_ANSWERS_HARD}
_ANSWERS_BACK = {number: answers for answers, number in _ANSWERS.items()}
_TERMS_VALUES = tuple(name for name in FIELDS if name != "answers")


def account_message(account: Account) -> wire.Account:
    """An account to be sent."""
    return wire.Account(
        name=account.name,
        granted_count=account.granted,
        posted_count=account.posted,
        held_count=account.held,
        balance_count=account.balance,
        sequence=account.sequence,
        head=account.head,
    )


def account_of(message: wire.Account) -> Account:
    """An account received."""
    return Account(
        name=message.name,
        granted=message.granted_count,
        posted=message.posted_count,
        held=message.held_count,
        sequence=message.sequence,
        head=message.head,
    )


def terms_message(terms: Terms) -> wire.Terms:
    """Terms to be sent."""
    values = {name: getattr(terms, name) for name in _TERMS_VALUES}
    return wire.Terms(answers=_ANSWERS[terms.answers], **values)


def terms_of(message: wire.Terms) -> Terms:
    """Terms received. Refusal INVALID_REQUEST for what cannot be meant, or only by a newer program."""
    if message.answers not in _ANSWERS_BACK:
        raise Refusal.of(
            Reason.INVALID_REQUEST, field="terms.answers", expected="soft, hard or nothing", got=message.answers
        )
    values = {name: getattr(message, name) for name in _TERMS_VALUES if message.HasField(name)}
    try:
        return Terms(answers=_ANSWERS_BACK[message.answers], **values)
    except TermsError as error:
        raise Refusal.of(
            Reason.INVALID_REQUEST, field=f"terms.{error.field}", expected=error.expected, got=error.got
        ) from None


def key_message(key: Key) -> wire.StoredKey:
    """A credential to be sent: never the secret, which nobody here has."""
    return wire.StoredKey(
        key_id=key.key_id,
        account=key.account,
        role=_ROLES[key.role],
        secret_digest=key.secret_sha256,
        revoked=key.revoked,
    )


def key_of(message: wire.StoredKey) -> Key:
    """A credential received. Refusal INVALID_REQUEST for a role that this program does not know."""
    if message.role not in _ROLES_BACK:
        raise Refusal.of(
            Reason.INVALID_REQUEST, field="key.role", expected="customer, teacher or admin", got=message.role
        )
    return Key(
        key_id=message.key_id,
        account=message.account,
        role=_ROLES_BACK[message.role],
        secret_sha256=message.secret_digest,
        revoked=message.revoked,
    )


def entry_message(entry: Entry) -> wire.StatementEntry:
    """A line of the journal to be sent."""
    created = Timestamp()
    created.FromMilliseconds(entry.create_time_ms)
    return wire.StatementEntry(
        sequence=entry.sequence,
        create_time=created,
        kind=_KINDS[entry.kind],
        batch_id=entry.batch_id,
        run_id=entry.run_id,
        picture_count=entry.picture_count,
        debit_book=entry.debit_book,
        credit_book=entry.credit_book,
        digest=entry.digest,
        head=entry.head,
    )


def entry_of(account: str, message: wire.StatementEntry) -> Entry:
    """A line of an account's journal received."""
    return Entry(
        account=account,
        sequence=message.sequence,
        create_time_ms=message.create_time.ToMilliseconds(),
        kind=_KINDS_BACK[message.kind],
        batch_id=message.batch_id,
        run_id=message.run_id,
        picture_count=message.picture_count,
        digest=message.digest,
        head=message.head,
    )


def posted_message(posted: Posted) -> wire.PostedBatch:
    """A post to be sent; its answer goes beside it where the other side has none."""
    return wire.PostedBatch(
        sequence=posted.receipt.sequence, head=posted.receipt.head, account=account_message(posted.account)
    )


def posted_of(batch_id: str, message: wire.PostedBatch, answer: bytes | None) -> Posted:
    """A post received, with the answer that belongs to it."""
    account = account_of(message.account)
    receipt = Receipt(account=account.name, batch_id=batch_id, sequence=message.sequence, head=message.head)
    return Posted(answer=answer, receipt=receipt, account=account)


def answered_message(posted: Posted) -> wire.AnsweredBatch:
    """A batch answered before, to be sent with its answer as kept."""
    return wire.AnsweredBatch(posted=posted_message(posted), answer=posted.answer)


def answered_of(batch_id: str, message: wire.AnsweredBatch) -> Posted:
    """A batch answered before, received."""
    return posted_of(batch_id, message.posted, message.answer if message.HasField("answer") else None)
