"""Where the books in SQL lie: a URL, what connects to it, its schema, and what it says when it fails."""

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, make_url

from teacher_service.config import is_loopback
from teacher_service.ledger import LedgerError, LedgerUnavailable

SCHEMA_REVISION = "0003"  # the newest of migrations/versions; a test compares
BUSY_TIMEOUT_SECONDS = 5
CONNECTIONS = 3  # the writer's and the two readers'
# What a role or a database may have set otherwise; a session's own settings win. synchronous_commit: a commit is on
# the disk before it returns. The rest bounds what a lock costs: our transactions take milliseconds, so nobody waits
# longer than a second for a row, and a server that froze inside a transaction has lost its locks five seconds later.
POSTGRES_SETTINGS = (
    "-c synchronous_commit=on -c lock_timeout=1s -c statement_timeout=30s -c idle_in_transaction_session_timeout=5s"
)
_LOCK_NOT_AVAILABLE = "55P03"  # what PostgreSQL calls a lock_timeout that has run out
# A connection lost without a word (a NAT that forgot it, a failover) would block its thread, and one thread writes,
# for as long as the kernel sends again: a quarter of an hour. It is given up about ten seconds after the last sign of
# life. A slow query is no such thing: the other side's kernel answers.
POSTGRES_KEEPALIVE: dict[str, int] = {
    "keepalives_idle": 5,  # seconds
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds; of what was sent, which keepalives say nothing of
}
_SCHEMA_LOCK = 0x6D656B64  # "mekd", an advisory lock of PostgreSQL
_REMEDIES = {
    "database is locked": "; another program holds it, and nothing was changed: try again",
    "malformed": "; 'teacher-admin ledger restore' puts a backup in its place",
    "not a database": "; give another --ledger, or put a backup in its place with 'teacher-admin ledger restore'",
}
"""Of what SQLite says."""


def engine_at(url: str, *, create: bool) -> sa.Engine:
    """What connects to the store at ``sqlite:///FILE`` or ``postgresql://…``, each connection set up to be durable.

    ``create``: makes a file that is not there. Raises LedgerError for another kind of URL and a missing file.
    """
    location = _checked_url(url, create)
    return _postgres_engine(location) if location.get_backend_name() == "postgresql" else _sqlite_engine(location)


@contextlib.contextmanager
def store_errors(location: URL) -> Iterator[None]:
    """What the store says, as one line: which store it is, and what to do where that is known."""
    name = location.database if location.get_backend_name() == "sqlite" else location.host or "in PostgreSQL"
    try:
        yield
    except sa.exc.DatabaseError as error:
        said = _one_line(error.orig)
        remedy = next((remedy for part, remedy in _REMEDIES.items() if part in said), "")
        raise LedgerUnavailable(f"the ledger's store {name} failed: {said}{remedy}") from error
    except (sa.exc.SQLAlchemyError, OSError) as error:
        raise LedgerUnavailable(f"the ledger's store {name} failed: {_one_line(error)}") from error


def is_lock_timeout(error: BaseException | None) -> bool:
    """Whether PostgreSQL refused a statement because somebody else has locked what it is about."""
    return getattr(getattr(error, "orig", None), "sqlstate", None) == _LOCK_NOT_AVAILABLE


def bring_schema_up_to_date(connection: Connection, url: str) -> None:
    """An empty database gets its tables, an older ledger the newest ones. Raises LedgerError for anything else."""
    url = _without_password(url)
    if connection.dialect.name == "postgresql":
        # Two servers that start at once: the second waits for as long as the first migrates. Between two statements
        # Alembic is imported, which takes a busy machine its time.
        connection.exec_driver_sql(
            "SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0; "
            "SET LOCAL idle_in_transaction_session_timeout = '30s'"
        )
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
        connection.exec_driver_sql("SET LOCAL lock_timeout = '5s'")  # whoever wants a table waits behind our DDL
    found = set(sa.inspect(connection).get_table_names())
    revision = None
    if "alembic_version" in found:
        revision = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
        if revision == SCHEMA_REVISION:
            return
    elif found:
        raise LedgerError(f"expected a ledger at {url}, found a database of something else")
    from teacher_service import migrations  # Alembic is slow to import, and seldom needed

    if revision is not None and revision not in migrations.revisions():
        raise LedgerError(
            f"expected a ledger of schema {SCHEMA_REVISION} at {url}, got {revision}; "
            "use the program that made it, or a newer one"
        )
    migrations.upgrade(connection)


def unprotected(url: str) -> str | None:
    """What is wrong with a PostgreSQL URL that leads beyond loopback and doesn't say how that way is protected.

    The driver would encrypt where the server offers to, whoever that is, and say nothing where it doesn't. None: it
    does, or the way never leaves this machine. (With no host at all the driver's own settings say which one.)
    """
    try:
        location = make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # whoever opens it says what is wrong
        return None
    query = {name: [value] if isinstance(value, str) else value for name, value in location.query.items()}
    if location.get_backend_name() != "postgresql" or query.keys() & {"sslmode", "service"}:
        return None
    named = [location.host or "", *query.get("host", ()), *query.get("hostaddr", ())]
    # HOST:PORT in a list; an IPv6 address has more than one colon.
    hosts = [re.sub(r"^([^:]*):\d*$", r"\1", host) for text in named for host in text.split(",") if host]
    outside = [host for host in hosts if not host.startswith(("/", "@")) and not is_loopback(host)]
    if not outside:
        return None
    return (
        f"--ledger: {outside[0]} is not loopback: add ?sslmode=verify-full&sslrootcert=FILE to the URL, or another "
        "sslmode (require takes any certificate, disable is for networks that nobody else is on)"
    )


def _checked_url(url: str, create: bool) -> URL:
    expected = "expected a ledger as sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    try:
        location = make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # the second of a port that is no number
        raise LedgerError(f"{expected}, got {_without_password(url)!r}") from None
    if location.get_backend_name() == "postgresql":
        if (problem := unprotected(url)) is not None:
            raise LedgerError(problem)
        return location.set(drivername="postgresql+psycopg")
    if location.get_backend_name() != "sqlite" or not location.database or location.database == ":memory:":
        raise LedgerError(f"{expected}, got {_without_password(url)!r}")
    path = Path(location.database)
    with store_errors(location):
        if not path.exists():
            if not create:
                raise LedgerError(
                    f"expected a ledger at {path}, found no file; 'teacher-admin account create' makes one"
                )
            if not path.parent.is_dir():
                raise LedgerError(f"expected a folder for the ledger, found no {path.parent}")
            path.touch(mode=0o600)
    return location.set(drivername="sqlite+pysqlite")


def _postgres_engine(location: URL) -> sa.Engine:
    given = location.query.get("options", ())
    # After those of the URL, so that ours win.
    options = " ".join([*((given,) if isinstance(given, str) else given), POSTGRES_SETTINGS])
    connect_args = {"options": options, "connect_timeout": BUSY_TIMEOUT_SECONDS} | POSTGRES_KEEPALIVE
    # pool_pre_ping: a connection that died while it was idle is found out before it is used.
    # READ COMMITTED: what is read after the account's row was locked is what its last holder left.
    try:
        engine = sa.create_engine(
            location,
            pool_size=CONNECTIONS,
            pool_pre_ping=True,
            isolation_level="READ COMMITTED",
            connect_args=connect_args,
        )
    except ImportError:  # SQLAlchemy imports the driver here; one without libpq is none
        message = "expected psycopg for postgresql://, found none; pip install 'mekd[postgres]'"
        raise LedgerError(message) from None
    sa.event.listen(engine, "connect", _check_postgres_durable)
    return engine


def _sqlite_engine(location: URL) -> sa.Engine:
    engine = sa.create_engine(
        location, poolclass=sa.pool.QueuePool, pool_size=CONNECTIONS, connect_args={"timeout": BUSY_TIMEOUT_SECONDS}
    )
    sa.event.listen(engine, "connect", _configure_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _check_postgres_durable(connection: Any, _record: Any) -> None:
    """Refuses (LedgerUnavailable) a server that may lose what it has committed, at every new connection.

    The synchronous_commit of POSTGRES_SETTINGS holds everywhere but behind a pooler that drops such options.
    """
    rows = connection.execute(
        "SELECT name FROM pg_settings WHERE setting = 'off' "
        "AND name IN ('fsync', 'full_page_writes', 'synchronous_commit') ORDER BY name"
    ).fetchall()
    connection.rollback()
    if rows:
        connection.close()
        names = [name for (name,) in rows]
        raise LedgerUnavailable(
            "expected a PostgreSQL that keeps what it has committed, "
            f"got {', '.join(f'{name} = off' for name in names)}; set {', '.join(f'{name} = on' for name in names)} "
            "(ALTER SYSTEM SET …, then SELECT pg_reload_conf()) and start again"
        )


def _configure_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say so (see _begin_sqlite)
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # a commit is on the disk before it returns
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE: a writer takes its lock at the start, so that what it reads is what it may change.
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _without_password(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except (sa.exc.ArgumentError, ValueError):
        return url if "@" not in url else "***"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
