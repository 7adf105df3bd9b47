"""The ledger: accounts, holds, answers, the journal, keys, instances."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_HELD = sa.text("state = 'held'")
_POST = sa.text("kind = 'post'")


def upgrade() -> None:
    """Makes every table, index and trigger."""
    op.create_table(
        "accounts",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("granted", _COUNT, nullable=False),
        sa.Column("posted", _COUNT, nullable=False),
        sa.Column("held", _COUNT, nullable=False),
        sa.Column("sequence", _COUNT, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
        sa.CheckConstraint("posted >= 0 AND held >= 0 AND posted + held <= granted", name="never_overspent"),
        sqlite_strict=True,
    )
    op.create_table(
        "holds",
        sa.Column("account", sa.Text, sa.ForeignKey("accounts.name"), primary_key=True),
        sa.Column("batch_id", sa.Text, primary_key=True),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("picture_count", _COUNT, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("instance_id", sa.Text, nullable=False),
        sqlite_strict=True,
    )
    op.create_index("holds_under_way", "holds", ["instance_id"], sqlite_where=_HELD, postgresql_where=_HELD)
    op.create_table(
        "answers",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("batch_id", sa.Text, primary_key=True),
        sa.Column("answer", sa.LargeBinary, nullable=False),
        sa.Column("sequence", _COUNT, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
        sqlite_strict=True,
    )
    op.create_table(
        "entries",
        sa.Column("account", sa.Text, sa.ForeignKey("accounts.name"), primary_key=True),
        sa.Column("sequence", _COUNT, primary_key=True),
        sa.Column("create_time_ms", _COUNT, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("batch_id", sa.Text, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("picture_count", _COUNT, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("head", sa.LargeBinary, nullable=False),
        sqlite_strict=True,
    )
    op.create_index("entries_by_run", "entries", ["account", "run_id", "sequence", "kind", "picture_count"])
    op.create_index(
        "one_post_a_batch",
        "entries",
        ["account", "batch_id"],
        unique=True,
        sqlite_where=_POST,
        postgresql_where=_POST,
    )
    op.create_table(
        "keys",
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("account", sa.Text, sa.ForeignKey("accounts.name"), nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("secret_sha256", sa.LargeBinary, nullable=False),
        sa.Column("revoked", sa.Integer, nullable=False),
        sqlite_strict=True,
    )
    op.create_table(
        "instances",
        sa.Column("instance_id", sa.Text, primary_key=True),
        sa.Column("lease_until_ms", _COUNT, nullable=False),
        sqlite_strict=True,
    )
    _make_journal_append_only()


def _make_journal_append_only() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER entries_no_{verb.lower()} BEFORE {verb} ON entries "
                "BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
            )
    else:
        op.execute(
            "CREATE FUNCTION journal_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the journal is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER entries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON entries "
            "FOR EACH STATEMENT EXECUTE FUNCTION journal_is_append_only()"
        )
