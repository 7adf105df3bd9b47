"""Grants with an id of their own, made once each; and where the kept answers of an account begin."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_GRANT_WITH_ID = sa.text("kind = 'grant' AND batch_id <> ''")


def upgrade() -> None:
    """Adds one column and one index. No row is written anew: neither is slow on a journal of any length."""
    op.add_column("accounts", sa.Column("pruned_sequence", _COUNT, nullable=False, server_default="0"))
    op.create_index(
        "one_grant_an_id",
        "entries",
        ["account", "batch_id"],
        unique=True,
        sqlite_where=_GRANT_WITH_ID,
        postgresql_where=_GRANT_WITH_ID,
    )
