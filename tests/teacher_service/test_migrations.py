"""The schema: what the steps make is what the program expects, on both stores; nobody opens what they do not know."""

import asyncio
import hashlib
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from teacher_service import audit, ledger_tables, migrations
from teacher_service.ledger import HoldRequest, LedgerError, Posted
from teacher_service.ledger_sql import SCHEMA_REVISION, SqlLedger
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


def made_at_0001(url: str) -> bytes:
    """A ledger as the first release left it: account "a", a batch "b" posted of 100 granted. Returns the head."""
    if url.startswith("postgres"):  # made from a template that has a ledger
        run(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    head, answer, pictures = bytes(32), b"answer", bytes(range(32))
    lines = [
        ("grant", "", "", 100, b""),
        ("hold", "b", "run", 5, pictures),
        ("post", "b", "run", 5, hashlib.sha256(answer).digest()),
    ]
    with engine.begin() as connection:
        command.upgrade(migrations._config(connection), "0001")
        add = connection.execute
        account = (
            "INSERT INTO accounts (name, granted, posted, held, sequence, head) VALUES ('a', 100, 5, 0, 3, :head)"
        )
        entry = "INSERT INTO entries VALUES ('a', :sequence, 7, :kind, :batch, :run, :count, :digest, :head)"
        add(sa.text(account), {"head": head})
        for sequence, (kind, batch, run_id, count, digest) in enumerate(lines, start=1):
            line = f"a|{sequence}|7|{kind}|{batch}|{run_id}|{count}|{digest.hex()}"
            head = hashlib.sha256(head + line.encode()).digest()
            values = {"sequence": sequence, "kind": kind, "batch": batch, "run": run_id, "count": count}
            add(sa.text(entry), values | {"digest": digest, "head": head})
        add(sa.text("UPDATE accounts SET head = :head"), {"head": head})
        hold = "INSERT INTO holds VALUES ('a', 'b', 'run', :digest, 5, 'posted', 'gone')"
        add(sa.text(hold), {"digest": pictures})
        kept = "INSERT INTO answers (account, batch_id, answer, sequence, head) VALUES ('a', 'b', :answer, 3, :head)"
        add(sa.text(kept), {"answer": answer, "head": head})
        key = "INSERT INTO keys VALUES (:id, 'a', 'customer', :digest, 0)"
        add(sa.text(key), {"id": "0" * 16, "digest": bytes(32)})
    engine.dispose()
    return head


def test_a_ledger_of_the_first_release_keeps_all_it_has_and_gets_terms_that_say_nothing(url: str) -> None:
    head = made_at_0001(url)

    async def look() -> None:
        books = SqlLedger.open(url)
        account = await books.account("a")
        assert (account.granted, account.posted, account.held, account.head) == (100, 5, 0, head)
        found = await books.credential("0" * 16)
        assert found is not None and (found.key.account, found.terms) == ("a", Terms())
        wish = HoldRequest(account="a", batch_id="b", run_id="run", digest=bytes(range(32)), picture_count=5)
        again = await books.hold(wish)
        assert isinstance(again, Posted) and again.answer == b"answer"
        assert await books.set_terms("a", Terms(decimals=2)) == await books.terms("a") == Terms(decimals=2)
        await books.grant("a", 1)
        await books.close()

    asyncio.run(look())
    assert differences(url) == []
    assert audit.verify(url).agrees


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
