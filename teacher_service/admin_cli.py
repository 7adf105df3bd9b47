"""``teacher-admin``: accounts, budgets and keys on the books, and the facts of model files."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from protos.errors import Refusal
from teacher_service import auth, ledger_cli
from teacher_service.cli_parts import SETTINGS, facts_options, fail, given_facts, ledger_key, ledger_options
from teacher_service.ledger import (
    OPERATORS,
    Account,
    Entry,
    EntryKind,
    Ledger,
    LedgerError,
    LedgerIncomplete,
    LedgerUnavailable,
    Role,
    watch,
)
from teacher_service.ledger_remote import RemoteLedger
from teacher_service.server import open_ledger
from teacher_service.terms import FIELDS, Terms, TermsError

T = TypeVar("T")

INTERRUPTED = 130


def _terms_options(command: Callable[..., T]) -> Callable[..., T]:
    """The flags that say what an account is sold, and how much at a time."""
    for option in reversed(
        (
            click.option(
                "--answers",
                type=click.Choice(["soft", "hard"]),
                help="Sell probabilities, or the index of the likeliest class; unsaid: as the server's --answers.",
            ),
            click.option(
                "--top-k", type=int, metavar="K", help="Of soft answers: the K most probable classes alone."
            ),
            click.option(
                "--decimals", type=int, metavar="D", help="Of soft answers: probabilities rounded to D decimals."
            ),
            click.option(
                "--pictures-per-second", type=float, metavar="R", help="Most pictures asked for, replays included."
            ),
            click.option("--max-streams", type=int, metavar="N", help="Most streams open at once on one server."),
            click.option(
                "--max-outstanding-pictures",
                type=int,
                metavar="N",
                help="Most pictures asked for and not yet answered on one server.",
            ),
            click.option(
                "--suspended",
                is_flag=True,
                default=None,
                help="Refuse its customers, by key and by certificate; --unset suspended lets them in again.",
            ),
        )
    ):
        command = option(command)
    return command


_key_file_option = click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the key there, for its owner alone to read; a file that exists is left as it is.  [default: standard "
    "output]",
)


@contextlib.contextmanager
def _handed_over(text: str, file: Path | None) -> Iterator[None]:
    """Puts a key where it is to go, around what makes it good: into a file before, on standard output after.

    The file is removed where no key was made, and stays where one may have been.
    """
    if file is None:
        yield
        click.echo(text)
        return
    try:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
            print(text, file=opened, flush=True)
            os.fsync(opened.fileno())
    except FileExistsError:
        fail(f"--key-file {file}: expected a new file, but it exists; give another")
    except OSError as error:
        file.unlink(missing_ok=True)
        fail(f"--key-file {file}: {error.strerror}")
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, LedgerUnavailable | LedgerIncomplete):
            click.echo(f"{file} has the key, in case it was made", err=True)
        else:
            file.unlink()
        raise


def _given_terms(given: dict[str, Any]) -> Terms:
    try:
        return Terms(**given)
    except TermsError as error:
        fail(f"--{error.field.replace('_', '-')}: expected {error.expected}, got {error.got!r}")


class _Helpful(click.Group):
    """Says where flags go that are not a command's own but the program's, and what a negative number is taken for."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if error.option_name.startswith("--ledger"):
                advice = f"It goes before the command: teacher-admin {error.option_name} ... COMMAND"
            elif error.option_name[1:].isdecimal():
                advice = "Expected a number of at least 1."
            else:
                raise
            raise click.UsageError(f"{error.format_message()} {advice}", ctx=error.ctx) from None


@click.group("teacher-admin", cls=_Helpful, context_settings=SETTINGS)
@click.version_option(package_name="mekd")
@ledger_options
@click.pass_context
def admin(context: click.Context, ledger: str, ledger_ca: Path | None, ledger_insecure: bool) -> None:
    """Accounts, budgets and keys on a ledger, and the facts of model files.

    Works on the ledger's store itself, whether a server has it open or not, or through a server: with
    --ledger grpc://HOST:PORT and an admin's key, whose first is made on the store.

    \b
    teacher-admin account create my-device --budget 50000 --key-file key
    teacher-admin account show my-device --format json
    teacher-admin account grant my-device 10000
    teacher-admin account set my-device --answers soft --top-k 3 --decimals 2
    teacher-admin statement my-device --run-id RUN
    teacher-admin key revoke KEY_ID
    teacher-admin key create --role admin                     # then: MEKD_LEDGER_KEY=… teacher-admin --ledger grpc://…
    teacher-admin model describe rn56.pt --input-shape 3,32,32 --mean … --std …
    """
    context.obj = ledger


@admin.group()
def account() -> None:
    """Make, show and top up accounts."""


@account.command("create")
@click.argument("name")
@click.option("--budget", type=int, required=True, metavar="N", help="Pictures granted from the start.")
@_key_file_option
@_terms_options
@click.pass_obj
def account_create(ledger: str, /, name: str, budget: int, key_file: Path | None, **given: Any) -> None:
    """Make an account with a budget; its key goes to --key-file or standard output, once, and nowhere else."""
    terms = _given_terms(given)
    text, stored = auth.new_key(name)

    async def make(books: Ledger) -> None:
        await books.create_account(name, budget, stored, terms)

    with _handed_over(text, key_file):
        _on_books(ledger, make, create=True)


@account.command("show")
@click.argument("name")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_obj
def account_show(ledger: str, name: str, form: str) -> None:
    """Show what an account was granted, what is posted and held, its balance, in pictures, and its terms."""

    async def look(books: Ledger) -> tuple[Account, Terms]:
        return await books.account(name), await books.terms(name)

    _print_account(*_on_books(ledger, look), form=form)


@account.command("set")
@click.argument("name")
@_terms_options
@click.option(
    "--unset",
    type=click.Choice([field.replace("_", "-") for field in FIELDS]),
    multiple=True,
    help="As the server has it, or no limit, again; may be given several times.",
)
@click.pass_obj
def account_set(ledger: str, /, name: str, unset: tuple[str, ...], **given: Any) -> None:
    """Set what an account is sold, and how much it may ask for at a time; what is not named stays.

    Running servers notice within five seconds. Answers already kept stay as they were sold.

    \b
    teacher-admin account set my-device --top-k 3 --decimals 2
    teacher-admin account set my-device --pictures-per-second 500 --max-streams 4
    teacher-admin account set my-device --unset top-k
    teacher-admin account set my-device --suspended
    """
    said, unsaid = _given_terms(given), [field.replace("-", "_") for field in unset]
    if said == Terms() and not unsaid:
        raise click.UsageError("expected something to set or --unset, got nothing")

    async def change(books: Ledger) -> tuple[Account, Terms]:
        terms = await books.set_terms(name, said, unsaid)
        return await books.account(name), terms

    _print_account(*_on_books(ledger, change), form="text")


@account.command("list")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_obj
def account_list(ledger: str, form: str) -> None:
    """List every account with its balances; as json, one object a line."""

    async def pages(books: Ledger) -> None:
        after_name = ""
        while page := await books.accounts(after_name=after_name):
            for found in page:
                _print_account(found, form=form)
            after_name = page[-1].name

    _on_books(ledger, pages)


@account.command("grant")
@click.argument("name")
@click.argument("pictures", type=int)
@click.option(
    "--grant-id",
    default="",
    metavar="ID",
    help="An order number, a UUID: with it the account is granted this once, however often a script runs again.",
)
@click.pass_obj
def account_grant(ledger: str, name: str, pictures: int, grant_id: str) -> None:
    """Grant an account more PICTURES; a stopped agent goes on with the same command."""
    granting = _on_books(ledger, lambda books: books.grant(name, pictures, grant_id=grant_id))
    _print_account(granting, form="text")


@account.command("watch")
@click.argument("name")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_obj
def account_watch(ledger: str, name: str, form: str) -> None:
    """Show an account now and whenever it has changed, at most once a second, until interrupted."""

    async def show(books: Ledger) -> None:
        async for found in books.watch(name) if isinstance(books, RemoteLedger) else watch(books, name):
            _print_account(found, form=form)

    try:
        _on_books(ledger, show)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@admin.group()
def key() -> None:
    """Make, list and revoke an account's keys."""


@key.command("create")
@click.argument("name", required=False)
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    default=Role.CUSTOMER.value,
    show_default=True,
    help="customer: buy answers and see its own account. teacher: sell them, a server with --ledger grpc://. "
    "admin: make accounts and keys, and grant.",
)
@_key_file_option
@click.pass_obj
def key_create(ledger: str, name: str | None, role: str, key_file: Path | None) -> None:
    """Make one more key for account NAME; it goes to --key-file or standard output, once.

    A teacher's or an admin's key needs no NAME: it belongs to the account "operators", which has no pictures and is
    made where it is missing.
    """
    wanted = Role(role)
    if name is None and wanted is Role.CUSTOMER:
        raise click.UsageError("Missing argument 'NAME': a customer's key belongs to the customer's account.")
    owner = name or OPERATORS
    first = wanted is not Role.CUSTOMER and owner == OPERATORS  # maybe the first key of all
    text, stored = auth.new_key(owner, wanted)

    async def make(books: Ledger) -> None:
        if first and not await _has_account(books, owner):
            await books.create_account(owner, None, stored)
        else:
            await books.add_key(stored)

    with _handed_over(text, key_file):
        _on_books(ledger, make, create=first)


async def _has_account(books: Ledger, name: str) -> bool:
    try:
        await books.account(name)
    except LedgerUnavailable:
        raise
    except LedgerError:
        return False
    return True


@key.command("list")
@click.argument("name")
@click.pass_obj
def key_list(ledger: str, name: str) -> None:
    """List the ids of account NAME's keys, never their secrets."""
    for stored in _on_books(ledger, lambda books: books.keys(name)):
        click.echo(f"{stored.key_id}  {stored.role}  {'revoked' if stored.revoked else 'valid'}")


@key.command("revoke")
@click.argument("key_id")
@click.pass_obj
def key_revoke(ledger: str, key_id: str) -> None:
    """End a key for good; a running server notices within five seconds. KEY_ID as in key list, or the whole key."""
    if whole := auth.KEY.fullmatch(key_id.strip()):
        key_id = whole[1]
    _on_books(ledger, lambda books: books.revoke_key(key_id))
    click.echo(f"{key_id}  revoked")


@admin.command()
@click.argument("name")
@click.option("--run-id", default="", help="Only the entries of one run.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_obj
def statement(ledger: str, name: str, run_id: str, form: str) -> None:
    """Print an account's journal, oldest entry first; as json, one object a line."""

    async def pages(books: Ledger) -> None:
        await books.account(name)  # refuses an unknown name
        after = 0
        while page := await books.statement(name, run_id=run_id, after_sequence=after):
            for entry in page:
                row = {
                    "sequence": entry.sequence,
                    "create_time_ms": entry.create_time_ms,
                    "kind": entry.kind.value,
                    "pictures": entry.picture_count,
                    "debit_book": entry.debit_book,
                    "credit_book": entry.credit_book,
                    "run_id": entry.run_id,
                    "batch_id": entry.batch_id,
                }
                click.echo(json.dumps(row) if form == "json" else _statement_line(entry))
            after = page[-1].sequence

    _on_books(ledger, pages)


def _statement_line(entry: Entry) -> str:
    """Its sequence and time, what happened, and to which batch of which run."""
    when = datetime.fromtimestamp(entry.create_time_ms / 1000, UTC).isoformat(timespec="milliseconds")
    books = f"{entry.debit_book} -> {entry.credit_book}"
    of_run = f"run {entry.run_id}  " if entry.run_id else ""
    of_batch = f"{'grant' if entry.kind is EntryKind.GRANT else 'batch'} {entry.batch_id}" if entry.batch_id else ""
    line = f"{entry.sequence:>6}  {when}  {entry.kind.value:<6} {entry.picture_count:>9} pictures  {books:<23}"
    return f"{line}  {of_run}{of_batch}".rstrip()


admin.add_command(ledger_cli.ledger)


@admin.group()
def model() -> None:
    """Write down what a model file does not say of itself."""


@model.command("describe")
@click.argument("file", type=click.Path(path_type=Path))
@facts_options
def model_describe(file: Path, **facts: Any) -> None:
    """Write FILE.toml beside a model FILE: architecture, labels, input shape, normalisation.

    \b
    teacher-admin model describe rn56.pt --input-shape 3,32,32 \\
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
    """
    from networks.modelfile import ModelFileError, describe_model

    try:
        click.echo(f"wrote {describe_model(file, given=given_facts(**facts))}")
    except ModelFileError as error:
        fail(str(error))


def _on_books(url: str, work: Callable[[Ledger], Awaitable[T]], *, create: bool = False) -> T:
    given = click.get_current_context().find_root().params

    async def run() -> T:
        books = open_ledger(
            url,
            key=ledger_key(),
            tls_ca=given["ledger_ca"],
            insecure=given["ledger_insecure"],
            create=create,
        )
        try:
            return await work(books)
        finally:
            await books.close()

    try:
        return asyncio.run(run())
    except LedgerError as error:
        fail(str(error))
    except Refusal as refusal:
        fail(refusal.message)


def _print_account(found: Account, terms: Terms | None = None, *, form: str) -> None:
    row: dict[str, Any] = {
        "name": found.name,
        "granted": found.granted,
        "posted": found.posted,
        "held": found.held,
        "balance": found.balance,
    }
    if form == "json":
        click.echo(json.dumps(row if terms is None else row | {"terms": terms.said()}))
    else:
        row |= terms.said() if terms is not None else {}
        click.echo("  ".join(f"{name} {value}" for name, value in row.items()))
