"""Backup and restore of a SQLite ledger: whole files, put in place in one step.

A backup is taken while servers write; it is one consistent moment of the books. A restore takes the books back to
that moment: what was posted after it is charged to nobody any more, though its answers were delivered. So a restore
looks at what it would undo and refuses until told; the file that it replaces is kept beside the new one.
"""

import contextlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from teacher_service import audit

BUSY_TIMEOUT_SECONDS = 5.0


class FilesError(Exception):
    """A backup or restore that was not done; one line: expected, got, what to do."""


@dataclass
class Undone:
    """What a restore takes back: one line each; empty where the backup holds all there is."""

    lines: list[str] = field(default_factory=list)
    posted_pictures: int = 0


def sqlite_path(url: str) -> Path:
    """The file of a SQLite ledger. Raises FilesError for another kind."""
    if not url.startswith("sqlite:///"):
        raise FilesError("expected a ledger at sqlite:///FILE; for PostgreSQL use pg_dump and pg_restore")
    return Path(url.removeprefix("sqlite:///"))


def backup(ledger: Path, target: Path, *, force: bool = False) -> audit.Report:
    """Copies the books of one moment to ``target``, verified, synced and then renamed; servers may go on writing."""
    if not ledger.is_file():
        raise FilesError(f"expected a ledger at {ledger}, found no file")
    if target.exists():
        if target.samefile(ledger):
            raise FilesError(f"expected another file than the ledger's own, got {target}")
        if not force:
            raise FilesError(f"expected a new file, but {target} exists; give another, or --force")
    with _sqlite_errors(f"backup to {target}"), _partial(target) as partial, contextlib.ExitStack() as locked:
        _copy(ledger, partial)
        report = audit.verify(f"sqlite:///{partial}")
        if not report.agrees:
            raise FilesError(
                f"the copy's books do not agree ({report.findings[0]}); run 'ledger verify' on the ledger"
            )
        if target.exists():
            try:
                locked.enter_context(_exclusive(target))
            except sqlite3.DatabaseError as error:
                if _is_busy(error):
                    raise FilesError(f"{target} is a ledger in use; give another file") from None
        _refuse_strays(target)
        os.replace(partial, target)
        _sync(target.parent)
    return report


def restore(source: Path, ledger: Path, *, force: bool = False) -> tuple[audit.Report, Undone, Path | None]:
    """Puts a backup in the place of the ledger.

    Returns the audit of the backup, what was undone, and where the ledger that was there is kept now. Raises
    FilesError for a backup that does not verify; for a ledger that any program has open; and, unless ``force``, for a
    ledger that the backup would take something from, or that cannot be read.
    """
    if not source.is_file():
        raise FilesError(f"expected a backup at {source}, found no file")
    with _sqlite_errors(f"restore to {ledger}"), _partial(ledger) as partial:
        with _sqlite_errors(f"expected a backup in {source}"), contextlib.closing(_connect(source)) as found:
            found.execute("PRAGMA schema_version")
        _copy(source, partial)  # what is verified and compared from here on is what will be there
        report = audit.verify(f"sqlite:///{partial}")
        if not report.agrees:
            raise FilesError(f"the books of {source} do not agree: {report.findings[0]}")
        undone, kept = Undone(), None
        with contextlib.ExitStack() as locked:
            if ledger.exists():
                try:
                    locked.enter_context(_exclusive(ledger))
                    undone = undone_by(partial, ledger)
                except (audit.AuditError, sqlite3.DatabaseError) as error:
                    if _is_busy(error):
                        raise FilesError(
                            f"{ledger} is in use; stop every server and program that has it open, then restore"
                        ) from None
                    undone.lines.append(f"{ledger} cannot be read ({error}), so what is lost cannot be told")
                if undone.lines and not force:
                    advice = "--force goes back all the same, and keeps the ledger aside"
                    raise FilesError("; ".join(["the ledger has what the backup lacks", *undone.lines[:20], advice]))
                kept = _keep_aside(ledger)
            _refuse_strays(ledger)
            os.replace(partial, ledger)
            _sync(ledger.parent)
    return report, undone, kept


def undone_by(source: Path, ledger: Path) -> Undone:
    """What the books at ``ledger`` have and those at ``source`` lack."""
    undone = Undone()
    entry = "SELECT head FROM entries WHERE account = {} AND sequence = {}"
    with audit.Store(f"sqlite:///{source}") as old, audit.Store(f"sqlite:///{ledger}") as new:
        ends = "SELECT name, sequence, head FROM accounts ORDER BY name"
        before = {name: (sequence, head) for name, sequence, head in old.rows(ends)}
        for name, sequence, head in new.rows(ends):
            kept, kept_head = before.get(name, (0, bytes(32)))
            if (sequence, head) == (kept, kept_head) or list(old.rows(entry, (name, sequence))) == [(head,)]:
                continue
            ((batches, pictures),) = new.rows(
                "SELECT count(*), coalesce(sum(picture_count), 0) FROM entries "
                "WHERE account = {} AND sequence > {} AND kind = 'post'",
                (name, kept),
            )
            undone.posted_pictures += pictures
            if kept and list(new.rows(entry, (name, kept))) != [(kept_head,)]:
                undone.lines.append(f"account {name}: the two journals part before entry {kept} of the backup")
            else:
                undone.lines.append(
                    f"account {name}: {sequence - kept} entries after {kept}, with {batches} answers of {pictures} "
                    "pictures that would be charged to nobody"
                )
        terms_before = _terms(old)
        for name, text in sorted(_terms(new).items()):
            if name in before and text != terms_before.get(name, "{}"):
                undone.lines.append(f"account {name}: terms {text}, would be {terms_before.get(name, '{}')} again")
        known = {key_id: revoked for key_id, revoked in old.rows("SELECT key_id, revoked FROM keys")}
        for key_id, revoked in new.rows("SELECT key_id, revoked FROM keys ORDER BY key_id"):
            if key_id not in known:
                undone.lines.append(f"key {key_id}: made after the backup, would be gone")
            elif revoked and not known[key_id]:
                undone.lines.append(f"key {key_id}: revoked after the backup, would be valid again")
    return undone


def _terms(store: audit.Store) -> dict[str, str]:
    """Account -> its terms; none in a ledger from before there were any."""
    columns = [name for (name,) in store.rows("SELECT name FROM pragma_table_info('accounts')")]
    return dict(store.rows("SELECT name, terms FROM accounts")) if "terms" in columns else {}


def _copy(source: Path, target: Path) -> None:
    """One moment of the books, with what still stands in a write-ahead log beside them, as one synced file."""
    with contextlib.closing(_connect(source)) as books, contextlib.closing(_connect(target)) as copy:
        books.execute("PRAGMA query_only = ON")
        books.execute("BEGIN")  # the moment; without it every commit of a server would start the copy anew
        books.execute("SELECT count(*) FROM sqlite_master").fetchone()
        books.backup(copy)
        # Readable wherever it is put; the writer turns WAL on again when it opens it.
        copy.execute("PRAGMA journal_mode = DELETE")
    _sync(target)


def _refuse_strays(ledger: Path) -> None:
    """A log of another database under this name would be replayed into the file that is put here."""
    for ending in ("-wal", "-journal"):
        stray = ledger.with_name(ledger.name + ending)
        if stray.exists() and stray.stat().st_size:
            raise FilesError(
                f"expected no {stray}: it holds the last entries of a ledger that was moved away; move it back "
                "beside that ledger, or elsewhere"
            )


@contextlib.contextmanager
def _exclusive(ledger: Path) -> Iterator[None]:
    """Holds a ledger that nobody else has open, for as long as the context lasts. Raises sqlite3.OperationalError."""
    connection = _connect(ledger, timeout=0.5)
    try:
        # Leaving WAL needs to be alone, and brings everything into the one file.
        connection.execute("PRAGMA journal_mode = DELETE").fetchone()
        connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchone()
        connection.execute("BEGIN IMMEDIATE")  # others may still read: we do
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def _keep_aside(ledger: Path) -> Path:
    """Gives the ledger a second name, so that at every moment there is one under the first."""
    name = f"{ledger.name}.before-restore-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    names = (ledger.with_name(name + ending) for ending in ("", *(f"-{number}" for number in range(2, 1000))))
    kept = next(path for path in names if not path.exists())
    for ending in ("-wal", "-shm"):  # only where it could not be read; they must not meet the new file
        if (beside := ledger.with_name(ledger.name + ending)).exists():
            beside.rename(kept.with_name(kept.name + ending))
    os.link(ledger, kept)
    return kept


def _connect(path: Path, timeout: float = BUSY_TIMEOUT_SECONDS) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=timeout)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _is_busy(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _sqlite_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise FilesError(f"{doing}: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A new file beside `target` that is to become it, private and of a name of its own; removed where that fails."""
    handle, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    path = Path(name)
    try:
        yield path
    except BaseException:
        for ending in ("", "-journal", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        raise
