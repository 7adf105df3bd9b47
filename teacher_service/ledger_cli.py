"""``teacher-admin ledger …``: proof, export, backup and restore of the books."""

import click


@click.group()
def ledger() -> None:
    """Verify, export, back up and restore the books."""
