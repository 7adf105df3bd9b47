"""The schema: what the steps make is what the program expects, on both stores; nobody opens what they do not know."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from teacher_service import audit, ledger_files, ledger_tables, migrations
from teacher_service import ledger as rules
from teacher_service.auth import new_key
from teacher_service.ledger import Entry, HoldRequest, LedgerError, Posted
from teacher_service.ledger_sql import SqlLedger
from teacher_service.ledger_store import SCHEMA_REVISION
from teacher_service.terms import Terms


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/ledger.db"


def run(url: str, *statements: str) -> None:
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def differences(url: str) -> list[object]:
    """What must change in the store to make it what ``ledger_tables`` says, column types and constraints included."""
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        found = compare_metadata(context, ledger_tables.metadata)
        checks = {check["name"] for check in sa.inspect(connection).get_check_constraints("accounts")}
    engine.dispose()
    return [*found, *checks ^ {"never_overspent"}]


def test_the_migrated_schema_is_the_one_the_program_expects(url: str) -> None:
    asyncio.run(SqlLedger.open(url).close())
    assert differences(url) == []


@pytest.mark.parametrize(
    "change",
    [
        "DROP INDEX holds_under_way",
        "DROP INDEX one_post_a_batch",
        "DROP INDEX one_grant_an_id",
        "ALTER TABLE accounts RENAME COLUMN pruned_sequence TO pruned",
        "ALTER TABLE keys ADD COLUMN extra TEXT",
        "ALTER TABLE accounts RENAME COLUMN head TO tail",
    ],
)
def test_the_comparison_sees_a_schema_that_differs(url: str, change: str) -> None:
    asyncio.run(SqlLedger.open(url).close())
    run(url, change)
    assert differences(url) != []


def test_the_program_expects_the_newest_step() -> None:
    assert migrations.revisions()[0] == SCHEMA_REVISION


@pytest.mark.parametrize("revision", ["0004", "9999", "fade0ffcafe"])
def test_a_schema_that_this_program_does_not_know_is_refused_and_left_alone(url: str, revision: str) -> None:
    asyncio.run(SqlLedger.open(url).close())
    run(url, f"UPDATE alembic_version SET version_num = '{revision}'")
    expected = f"expected a ledger of schema {SCHEMA_REVISION} at .*, got {revision}; use the program that made it"
    with pytest.raises(LedgerError, match=expected):
        SqlLedger.open(url)
    run(url, f"UPDATE alembic_version SET version_num = '{SCHEMA_REVISION}'")
    asyncio.run(SqlLedger.open(url).close())


async def traffic(ledger: SqlLedger) -> dict[str, Posted]:
    posts = {}
    for name in ("a", "b"):
        await ledger.create_account(name, 100, new_key(name)[1])
        for number in range(3):
            await ledger.hold(wish(name, number))
            posts[f"{name}{number}"] = await ledger.post(name, f"{name}{number}", b"answer %d" % number)
        await ledger.grant(name, 7)
    return posts


def wish(name: str, number: int) -> HoldRequest:
    return HoldRequest(account=name, batch_id=f"{name}{number}", run_id="r", digest=b"d", picture_count=5)


def first_schema(url: str, rows_of: str) -> None:
    """Makes a ledger of schema 0001 at ``url``, with the rows of a newer one."""
    if url.startswith("postgres"):  # made from a template that has a ledger
        run(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    old, new = (sa.create_engine(u.replace("postgresql://", "postgresql+psycopg://")) for u in (rows_of, url))
    with old.connect() as source, new.begin() as target:
        command.upgrade(migrations._config(target), "0001")
        metadata = sa.MetaData()
        metadata.reflect(target)
        assert "pruned_sequence" not in metadata.tables["accounts"].c
        for table in metadata.sorted_tables:
            columns = [sa.column(column.name) for column in table.c]
            rows = source.execute(sa.select(*columns).select_from(sa.table(table.name))).mappings().all()
            if rows and table.name != "alembic_version":
                target.execute(sa.insert(table), [dict(row) for row in rows])
    old.dispose()
    new.dispose()


def test_books_of_the_first_schema_are_read_brought_up_to_date_and_gone_on_with(url: str, tmp_path: Path) -> None:
    async def made() -> tuple[dict[str, Posted], list[Entry]]:
        ledger = SqlLedger.open(f"sqlite:///{tmp_path}/source.db")
        posts = await traffic(ledger)
        entries = list(await ledger.statement("a"))
        # instances is a table of the first schema too, and this one is still running: its row comes along
        await asyncio.to_thread(first_schema, url, f"sqlite:///{tmp_path}/source.db")
        await ledger.close()
        return posts, entries

    posts, entries = asyncio.run(made())
    before = audit.verify(url)  # as of a backup, which nobody brings up to date
    assert (before.findings, before.entries, before.pruned_answers) == ([], 16, 0)

    async def go_on() -> None:
        ledger = SqlLedger.open(url)
        assert list(await ledger.statement("a")) == entries
        assert (await ledger.account("a")).granted == 107
        assert await ledger.terms("a") == Terms()
        assert await ledger.set_terms("a", Terms(decimals=2)) == await ledger.terms("a") == Terms(decimals=2)
        for batch_id, posted in posts.items():
            again = await ledger.hold(wish(batch_id[0], int(batch_id[1])))
            assert isinstance(again, Posted) and (again.answer, again.receipt) == (posted.answer, posted.receipt)
        for _ in range(2):
            assert (await ledger.grant("a", 3, grant_id="g")).granted == 110
        assert await ledger.prune_answers(rules.now_ms() + 1000) == 6
        await ledger.close()

    asyncio.run(go_on())
    assert differences(url) == []
    after = audit.verify(url)
    assert (after.findings, after.entries, after.pruned_answers) == ([], 17, 6)


def test_a_backup_of_the_first_schema_is_restored_and_brought_up_to_date(tmp_path: Path) -> None:
    ledger, backup = tmp_path / "ledger.db", tmp_path / "backup.db"

    async def made() -> None:
        books = SqlLedger.open(f"sqlite:///{ledger}")
        await traffic(books)
        await books.close()
        first_schema(f"sqlite:///{backup}", f"sqlite:///{ledger}")
        books = SqlLedger.open(f"sqlite:///{ledger}")
        await books.grant("a", 50, grant_id="after")
        assert await books.prune_answers(rules.now_ms() + 1000) == 6
        await books.close()

    asyncio.run(made())
    report, undone, _ = ledger_files.restore(backup, ledger, force=True)
    assert report.findings == [] and undone.lines[0].startswith("account a: 1 entries after 8")

    async def repeated() -> Any:
        books = SqlLedger.open(f"sqlite:///{ledger}")
        try:
            return await books.hold(wish("a", 0))
        finally:
            await books.close()

    assert asyncio.run(repeated()).answer == b"answer 0"  # the backup has it still
    assert differences(f"sqlite:///{ledger}") == []


def test_a_database_of_something_else_is_refused_and_left_alone(url: str) -> None:
    if url.startswith("postgres"):  # made from a template that has a ledger
        run(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    run(url, "CREATE TABLE batches (id INTEGER)")
    with pytest.raises(LedgerError, match="found a database of something else"):
        SqlLedger.open(url)
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    assert sa.inspect(engine).get_table_names() == ["batches"]
    engine.dispose()


def test_a_password_is_never_told() -> None:
    with pytest.raises(LedgerError) as refused:
        SqlLedger.open("postgresql://mekd:secret@127.0.0.1:1/ledger")
    assert "secret" not in str(refused.value)
    with pytest.raises(LedgerError) as refused:
        SqlLedger.open("mysql://mekd:secret@host/ledger")
    assert "secret" not in str(refused.value) and "mysql://mekd:***@host/ledger" in str(refused.value)
