"""Run by Alembic: migrates over the connection that ``migrations.upgrade`` was given."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
