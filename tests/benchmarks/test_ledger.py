"""The made journal that is measured is a ledger like any other."""

import asyncio
from pathlib import Path

from benchmarks import ledger as benchmark
from teacher_service.audit import verify
from teacher_service.ledger import Held, HoldRequest
from teacher_service.ledger_sql import SqlLedger


def test_a_made_journal_verifies_and_servers_go_on_with_it(tmp_path: Path) -> None:
    made = benchmark._make_journal(tmp_path / "ledger.db", 2000)
    url = f"sqlite:///{tmp_path}/ledger.db"
    assert 1800 <= made <= 2000
    report = verify(url)
    assert (report.findings, report.entries, report.accounts) == ([], made, 100)

    async def charge() -> None:
        books = SqlLedger.open(url)
        wish = HoldRequest(account="account-00", batch_id="new", run_id="run", digest=b"d" * 32, picture_count=3)
        assert await books.hold(wish) == Held()
        await books.post("account-00", "new", b"answer")
        await books.close()

    asyncio.run(charge())
    report = verify(url)
    assert (report.findings, report.entries) == ([], made + 2)
