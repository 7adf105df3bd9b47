"""Accounts have terms: which answers they are sold, and how much they may ask for at a time."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Gives every account terms that say nothing: all is as it was."""
    op.add_column("accounts", sa.Column("terms", sa.Text, nullable=False, server_default="{}"))
