"""How a ledger's schema came to be, step by step (Alembic); ``upgrade`` brings a store to this program's."""

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection


def upgrade(connection: Connection) -> None:
    """Brings the store to the newest schema, inside the connection's transaction, however long that takes."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
    command.upgrade(_config(connection), "head")


def revisions() -> list[str]:
    """Every schema that this program knows, newest first."""
    return [script.revision for script in ScriptDirectory.from_config(_config(None)).walk_revisions()]


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", "teacher_service:migrations")
    config.attributes["connection"] = connection
    return config
