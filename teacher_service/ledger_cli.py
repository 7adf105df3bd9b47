"""``teacher-admin ledger …``: proof, export, backup and restore of the books."""

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from teacher_service import audit, ledger_files
from teacher_service.cli_parts import fail
from teacher_service.ledger_store import unprotected

FOUND = 1
COLUMNS = (
    "account",
    "sequence",
    "create_time_ms",
    "kind",
    "debit_book",
    "credit_book",
    "picture_count",
    "batch_id",
    "run_id",
    "digest",
    "head",
)


@click.group()
@click.pass_obj
def ledger(url: str) -> None:
    """Verify, export, back up and restore the books, on the store itself."""
    if (problem := unprotected(url)) is not None:
        fail(problem)


@ledger.command()
@click.option(
    "--receipts",
    "receipt_files",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Receipts that a customer kept ('edge-agent receipts'); may be given several times.",
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_obj
def verify(url: str, receipt_files: tuple[Path, ...], form: str) -> None:
    """Replay the journal, with code that the servers do not use, and compare everything else with it.

    Works on SQLite and PostgreSQL, also while servers write. Exit status: 0 the books agree, 1 they do not, 2 they
    cannot be read.
    """
    try:
        receipts = [receipt for file in receipt_files for receipt in audit.read_receipts(file)]
        report = audit.verify(url, receipts, progress=_progress)
    except audit.AuditError as error:
        fail(str(error))
    if form == "json":
        click.echo(json.dumps({"agrees": report.agrees} | dataclasses.asdict(report)))
    else:
        for line in _sentences(report):
            click.echo(line)
    sys.exit(0 if report.agrees else FOUND)


@ledger.command()
@click.argument("name", required=False)
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), required=True)
@click.pass_obj
def export(url: str, name: str | None, form: str) -> None:
    """Print the journal of account NAME, or of all, oldest entry first; digests and heads in hex.

    With docs/ledger.md beside it anyone can recompute the chain from it.
    """
    table = csv.writer(sys.stdout, lineterminator="\n")
    try:
        with audit.Store(url) as store:
            if form == "csv":
                table.writerow(COLUMNS)
            for row in _journal(store, name):
                if form == "csv":
                    table.writerow(row)
                else:
                    click.echo(json.dumps(dict(zip(COLUMNS, row, strict=True))))
    except audit.AuditError as error:
        fail(str(error))


@ledger.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE where it exists.")
@click.pass_obj
def backup(url: str, file: Path, force: bool) -> None:
    """Copy a SQLite ledger to FILE while servers go on writing; the copy is verified before it gets its name.

    FILE holds the digests of keys, answers and the journal; it is readable by its owner alone. What is posted after
    the backup is not in it. PostgreSQL: pg_dump.
    """
    try:
        report = ledger_files.backup(ledger_files.sqlite_path(url), file, force=force)
    except (ledger_files.FilesError, audit.AuditError) as error:
        fail(str(error))
    click.echo(f"wrote {file}: {report.accounts} accounts, {report.entries} entries, verified", err=True)


@ledger.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Go back even where the ledger has what FILE lacks; it is kept aside.")
@click.pass_obj
def restore(url: str, file: Path, force: bool) -> None:
    """Put the backup FILE in the place of a SQLite ledger that no program has open.

    \b
    What is lost is what came after the backup:
      answers   were delivered, and are charged to nobody any more; a repeat would be computed and charged again
      grants    have to be made again
      keys      made since are gone, revoked ones are valid again
      receipts  the customers' own still name every lost post: 'ledger verify --receipts FILE'

    Where the ledger has anything that FILE lacks, nothing is done without --force. The ledger that was there is kept
    beside the new one, as NAME.before-restore-TIME. One that is open is never replaced.
    """
    try:
        report, undone, kept = ledger_files.restore(file, ledger_files.sqlite_path(url), force=force)
    except (ledger_files.FilesError, audit.AuditError) as error:
        fail(str(error))
    click.echo(f"restored {report.accounts} accounts and {report.entries} entries", err=True)
    for line in undone.lines:
        click.echo(f"undone: {line}", err=True)
    if kept is not None:
        click.echo(f"the ledger that was there: {kept}", err=True)


def _journal(store: audit.Store, name: str | None) -> Iterator[tuple[Any, ...]]:
    names = [found for (found,) in store.rows("SELECT name FROM accounts ORDER BY name")]
    if name is not None and name not in names:
        raise audit.AuditError(f"expected the name of an account on these books, got {name!r}")
    for account in names if name is None else [name]:
        for sequence, create_time_ms, kind, batch_id, run_id, count, digest, head in store.entries(account):
            debited, credited = (audit.BOOKS[book] for book in audit.MOVES[kind])
            numbers = (account, sequence, create_time_ms, kind, debited, credited, count)
            yield (*numbers, batch_id, run_id, digest.hex(), head.hex())


def _sentences(report: audit.Report) -> Iterator[str]:
    yield (
        f"{report.accounts} accounts, {report.entries} entries, {report.granted_pictures} pictures granted, "
        f"{report.posted_pictures} posted; {report.receipts} receipts; {report.seconds:.1f} s"
    )
    if report.live_holds:
        orphaned = len(report.orphaned_holds)
        yield f"{report.live_holds} batches under way; {orphaned} whose server is gone: the next sweep frees them"
        yield from (f"  orphaned: {line}" for line in report.orphaned_holds)
    if report.pruned_answers:
        yield f"{report.pruned_answers} answers are no longer kept: pruned, as the books say (--answers-keep)"
    yield from (f"cannot be known: {line}" for line in report.unknown)
    yield from (f"FOUND: {line}" for line in report.findings)
    yield "the books agree" if report.agrees else "the books do NOT agree"


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and done % 1_000_000 == 0:
        click.echo(f"{done:,} of {total:,} entries", err=True)
