"""The ledger's tables, and rows <-> values. With ``ledger_sql`` and the migrations, the only importers of SQLAlchemy.

One schema for SQLite and PostgreSQL; ``migrations/`` makes it, and a test compares the two.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from teacher_service.ledger import Account, Entry, EntryKind, Hold, HoldState, Key, LedgerError, Role
from teacher_service.terms import Terms, TermsError

metadata = sa.MetaData()

# 64 bits on both: in SQLite INTEGER is, in PostgreSQL it is not.
Count = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# sqlite_strict: SQLite then checks column types as PostgreSQL does.
_STRICT: dict[str, Any] = {"sqlite_strict": True}

accounts = sa.Table(
    "accounts",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("granted", Count, nullable=False),
    sa.Column("posted", Count, nullable=False),
    sa.Column("held", Count, nullable=False),
    sa.Column("sequence", Count, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),
    # Terms.to_json. Apart from the balances: no step of the journal reads or writes it.
    sa.Column("terms", sa.Text, nullable=False, server_default="{}"),
    # Answers of posts up to this entry are no longer kept.
    sa.Column("pruned_sequence", Count, nullable=False, server_default="0"),
    # The same promise as in ledger._step, kept by the store as well.
    sa.CheckConstraint("posted >= 0 AND held >= 0 AND posted + held <= granted", name="never_overspent"),
    **_STRICT,
)
holds = sa.Table(
    "holds",
    metadata,
    sa.Column("account", sa.Text, sa.ForeignKey("accounts.name"), primary_key=True),
    sa.Column("batch_id", sa.Text, primary_key=True),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("picture_count", Count, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("instance_id", sa.Text, nullable=False),
    **_STRICT,
)
_UNDER_WAY = holds.c.state == sa.literal_column(f"'{HoldState.HELD.value}'")
sa.Index("holds_under_way", holds.c.instance_id, sqlite_where=_UNDER_WAY, postgresql_where=_UNDER_WAY)
answers = sa.Table(
    "answers",
    metadata,
    sa.Column("account", sa.Text, primary_key=True),
    sa.Column("batch_id", sa.Text, primary_key=True),
    sa.Column("answer", sa.LargeBinary, nullable=False),
    sa.Column("sequence", Count, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),
    **_STRICT,
)
entries = sa.Table(
    "entries",
    metadata,
    sa.Column("account", sa.Text, sa.ForeignKey("accounts.name"), primary_key=True),
    sa.Column("sequence", Count, primary_key=True),
    sa.Column("create_time_ms", Count, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("batch_id", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("picture_count", Count, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("head", sa.LargeBinary, nullable=False),
    **_STRICT,
)
# With kind and count the sum of a run's posts is read from the index alone.
sa.Index(
    "entries_by_run",
    entries.c.account,
    entries.c.run_id,
    entries.c.sequence,
    entries.c.kind,
    entries.c.picture_count,
)
_POSTS = entries.c.kind == sa.literal_column(f"'{EntryKind.POST.value}'")
# One post a key, whatever a program believes.
sa.Index(
    "one_post_a_batch",
    entries.c.account,
    entries.c.batch_id,
    unique=True,
    sqlite_where=_POSTS,
    postgresql_where=_POSTS,
)
_GRANTS_WITH_ID: sa.ColumnElement[bool] = sa.literal_column(f"kind = '{EntryKind.GRANT.value}' AND batch_id <> ''")
# One grant an id, likewise.
sa.Index(
    "one_grant_an_id",
    entries.c.account,
    entries.c.batch_id,
    unique=True,
    sqlite_where=_GRANTS_WITH_ID,
    postgresql_where=_GRANTS_WITH_ID,
)
keys = sa.Table(
    "keys",
    metadata,
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("account", sa.Text, sa.ForeignKey("accounts.name"), nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("secret_sha256", sa.LargeBinary, nullable=False),
    sa.Column("revoked", sa.Integer, nullable=False),
    **_STRICT,
)
instances = sa.Table(
    "instances",
    metadata,
    sa.Column("instance_id", sa.Text, primary_key=True),
    sa.Column("lease_until_ms", Count, nullable=False),
    **_STRICT,
)


def account_of(row: Row[Any]) -> Account:
    """A row of ``accounts``."""
    return Account(
        name=row.name,
        granted=row.granted,
        posted=row.posted,
        held=row.held,
        sequence=row.sequence,
        head=bytes(row.head),
    )


def account_values(account: Account) -> dict[str, Any]:
    """An account as a row of ``accounts``, but for its terms."""
    return {
        "name": account.name,
        "granted": account.granted,
        "posted": account.posted,
        "held": account.held,
        "sequence": account.sequence,
        "head": account.head,
    }


def terms_of(account: str, text: str) -> Terms:
    """The terms in a row of ``accounts``. Raises LedgerError for what another program wrote there."""
    try:
        return Terms.from_json(text)
    except TermsError as error:
        raise LedgerError(f"account {account} on these books: {error}") from None


def hold_of(row: Row[Any]) -> Hold:
    """A row of ``holds``."""
    return Hold(
        account=row.account,
        batch_id=row.batch_id,
        run_id=row.run_id,
        digest=bytes(row.digest),
        picture_count=row.picture_count,
        state=HoldState(row.state),
        instance_id=row.instance_id,
    )


def hold_values(hold: Hold) -> dict[str, Any]:
    """A hold as a row of ``holds``."""
    return {
        "account": hold.account,
        "batch_id": hold.batch_id,
        "run_id": hold.run_id,
        "digest": hold.digest,
        "picture_count": hold.picture_count,
        "state": hold.state.value,
        "instance_id": hold.instance_id,
    }


def entry_of(row: Row[Any]) -> Entry:
    """A row of ``entries``."""
    return Entry(
        account=row.account,
        sequence=row.sequence,
        create_time_ms=row.create_time_ms,
        kind=EntryKind(row.kind),
        batch_id=row.batch_id,
        run_id=row.run_id,
        picture_count=row.picture_count,
        digest=bytes(row.digest),
        head=bytes(row.head),
    )


def entry_values(entry: Entry) -> dict[str, Any]:
    """An entry as a row of ``entries``."""
    return {
        "account": entry.account,
        "sequence": entry.sequence,
        "create_time_ms": entry.create_time_ms,
        "kind": entry.kind.value,
        "batch_id": entry.batch_id,
        "run_id": entry.run_id,
        "picture_count": entry.picture_count,
        "digest": entry.digest,
        "head": entry.head,
    }


def key_of(row: Row[Any]) -> Key:
    """A row of ``keys``."""
    return Key(
        key_id=row.key_id,
        account=row.account,
        role=Role(row.role),
        secret_sha256=bytes(row.secret_sha256),
        revoked=bool(row.revoked),
    )


def key_values(key: Key) -> dict[str, Any]:
    """A credential as a row of ``keys``."""
    return {
        "key_id": key.key_id,
        "account": key.account,
        "role": key.role.value,
        "secret_sha256": key.secret_sha256,
        "revoked": int(key.revoked),
    }
