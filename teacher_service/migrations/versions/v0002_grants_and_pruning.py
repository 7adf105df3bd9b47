"""Grants with an id of their own, made once each; where the kept answers of an account begin; no REPLACE."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_GRANT_WITH_ID = sa.text("kind = 'grant' AND batch_id <> ''")


def upgrade() -> None:
    """Adds a column, an index and a trigger. No row is written anew; the index reads the journal once."""
    op.add_column("accounts", sa.Column("pruned_sequence", _COUNT, nullable=False, server_default="0"))
    op.create_index(
        "one_grant_an_id",
        "entries",
        ["account", "batch_id"],
        unique=True,
        sqlite_where=_GRANT_WITH_ID,
        postgresql_where=_GRANT_WITH_ID,
    )
    if op.get_bind().dialect.name == "sqlite":
        # REPLACE deletes whatever is in its way, and fires no trigger of a DELETE.
        same = "SELECT 1 FROM entries WHERE account = NEW.account AND"
        op.execute(
            "CREATE TRIGGER entries_no_replace BEFORE INSERT ON entries "
            f"WHEN EXISTS ({same} sequence = NEW.sequence) "
            f"OR (NEW.kind = 'post' AND EXISTS ({same} batch_id = NEW.batch_id AND kind = 'post')) "
            "OR (NEW.kind = 'grant' AND EXISTS "
            f"({same} batch_id = NEW.batch_id AND kind = 'grant' AND batch_id <> '')) "
            "BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
        )
