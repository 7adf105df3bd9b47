"""What only a durable, shared store can get wrong: crashes, leases, full disks, other programs."""

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from protos.errors import Reason, Refusal
from teacher_service import audit, ledger_sql, ledger_store, ledger_tables
from teacher_service import ledger as rules
from teacher_service.auth import new_key
from teacher_service.ledger import Held, HoldRequest, LedgerError, LedgerUnavailable, Posted
from teacher_service.ledger_sql import SqlLedger
from teacher_service.ledger_store import unprotected
from tests.postgres import Postgres
from tests.teacher_service.parts import until, write_locked


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Any]:
    """``opened(lease_ms=…)``: instances on one file, closed with the test."""
    ledgers: list[SqlLedger] = []

    def open_(**settings: int) -> SqlLedger:
        ledgers.append(SqlLedger.open(f"sqlite:///{path}", **settings))
        return ledgers[-1]

    yield open_
    for ledger in ledgers:
        asyncio.run(ledger.close())


def wish(batch_id: str = "b", count: int = 5, *, account: str = "a") -> HoldRequest:
    return HoldRequest(account=account, batch_id=batch_id, run_id="run", digest=b"d", picture_count=count)


async def settled(ledger: SqlLedger) -> tuple[int, int, int]:
    """posted, held, balance of "a", once everything told so far can be read."""
    await ledger.void("nobody", "nothing")
    account = await ledger.account("a")
    return account.posted, account.held, account.balance


async def renewed(*ledgers: SqlLedger) -> None:
    """Waits until each has renewed its lease once more, and has swept after it."""
    instance = ledger_tables.instances.c

    async def lease_of(ledger: SqlLedger) -> int:
        query = sa.select(instance.lease_until_ms).where(instance.instance_id == ledger.instance_id)
        return int(await ledger._read(lambda connection: connection.execute(query).scalar_one()))

    before = [await lease_of(ledger) for ledger in ledgers]
    for ledger, lease_ms in zip(ledgers, before, strict=True):

        async def has_grown(ledger: SqlLedger = ledger, lease_ms: int = lease_ms) -> bool:
            return await lease_of(ledger) > lease_ms

        await until(has_grown)
        await ledger.void("nobody", "nothing")  # the writer comes to it after the sweep


async def replayed(ledger: SqlLedger, request: HoldRequest) -> bytes | None:
    """The kept answer of a batch that was posted."""
    posted = await ledger.hold(request)
    assert isinstance(posted, Posted)
    return posted.answer


async def kinds(ledger: SqlLedger) -> list[str]:
    return [entry.kind.value for entry in await ledger.statement("a")]


def query(path: Path, text: str) -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(text).fetchall()
    finally:
        connection.close()


def python(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


PREAMBLE = """
import asyncio, os, signal, sys
from protos.errors import Refusal
from teacher_service.ledger import HoldRequest, LedgerError, LedgerUnavailable
from teacher_service.ledger_sql import SqlLedger
def wish(batch_id, count=5):
    return HoldRequest(account="a", batch_id=batch_id, run_id="run", digest=b"d", picture_count=count)
"""

CRASH = """
async def main():
    ledger = SqlLedger.open(sys.argv[1], lease_ms=int(sys.argv[2]))
    await ledger.create_account("a", 100)
    await ledger.hold(wish("posted", 7))
    await ledger.post("a", "posted", bytes(range(256)))
    await ledger.hold(wish("held"))
    await ledger.void("a", "nothing")  # the hold is on the disk
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


def crash(path: Path, lease_ms: int) -> None:
    """An instance is killed with one batch posted and one held."""
    done = python(CRASH, f"sqlite:///{path}", lease_ms)
    assert done.returncode == -signal.SIGKILL, done.stderr


# --- crashes, leases and several servers on one file ---


async def test_posts_survive_a_crash_and_are_replayed_byte_for_byte(path: Path, opened: Any) -> None:
    crash(path, 60_000)
    ledger = opened()
    assert await replayed(ledger, wish("posted", 7)) == bytes(range(256))
    assert await settled(ledger) == (7, 5, 88)


async def test_holds_of_a_crashed_instance_come_back_only_when_its_lease_has_lapsed(path: Path, opened: Any) -> None:
    crash(path, 600_000)
    assert query(path, "SELECT lease_until_ms FROM instances")[0][0] <= rules.now_ms() + 600_000
    ledger = opened(lease_ms=150)
    assert await settled(ledger) == (7, 5, 88)
    with pytest.raises(Refusal) as refused:
        await ledger.hold(wish("held"))
    assert refused.value.reason is Reason.BATCH_IN_FLIGHT
    # Only now is its end near: nothing above hurries.
    lapses_ms = rules.now_ms() + 300
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        of = (lapses_ms, ledger.instance_id)
        other.execute("UPDATE instances SET lease_until_ms = ? WHERE instance_id != ?", of)

    async def freed() -> bool:
        return (await ledger.account("a")).held == 0

    await until(freed)
    last = (await ledger.statement("a"))[-1]
    assert (last.kind.value, last.batch_id, last.picture_count) == ("expire", "held", 5)
    assert last.create_time_ms > lapses_ms
    assert await ledger.hold(wish("held")) == Held()
    assert await settled(ledger) == (7, 5, 88)


async def test_holds_of_a_living_instance_are_nobody_elses(opened: Any) -> None:
    living, other = opened(lease_ms=3000), opened(lease_ms=3000)
    await living.create_account("a", 100)
    await living.hold(wish())
    await renewed(living, other)
    third = opened()
    for ledger in (other, third):
        with pytest.raises(Refusal) as refused:
            await ledger.hold(wish())
        assert refused.value.reason is Reason.BATCH_IN_FLIGHT
        await ledger.void("a", "b")
        with pytest.raises(Refusal) as refused:
            await ledger.post("a", "b", b"not mine")
        assert refused.value.reason is Reason.HOLD_LOST
    await living.post("a", "b", b"mine")
    assert await replayed(other, wish()) == b"mine"
    assert await kinds(other) == ["grant", "hold", "post"]


async def test_closing_gives_back_more_than_one_transaction_takes(
    path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_sql, "SWEEP_HOLDS", 3)
    first, second = opened(lease_ms=60_000), opened(lease_ms=60_000)
    await first.create_account("a", 100)
    for index in range(7):
        await first.hold(wish(f"b{index}"))
    await first.close()
    assert await settled(second) == (0, 0, 100)
    assert query(path, "SELECT instance_id FROM instances") == [(second.instance_id,)]


async def test_closing_that_fails_half_way_leaves_the_lease_to_lapse(
    path: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_sql, "SWEEP_HOLDS", 3)
    first, second = opened(lease_ms=60_000), opened(lease_ms=60_000)
    await first.create_account("a", 100)
    for index in range(7):
        await first.hold(wish(f"b{index}"))
    retire, tries = first._retire, []

    def broken(connection: Any) -> bool:
        tries.append(None)
        if len(tries) == 2:
            raise sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("disk I/O error"))
        return bool(retire(connection))

    first._retire = broken
    await first.close()
    assert len(tries) == 2 and await settled(second) == (0, 20, 80)
    assert (first.instance_id,) in query(path, "SELECT instance_id FROM instances")


async def test_what_another_instance_holds_is_given_back_in_few_commits(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 1000)
    for index in range(300):
        await ledger.hold(wish(f"b{index}", 1), instance_id="operators/x")
    await ledger.hold(wish("own", 1))
    commits: list[None] = []
    sa.event.listen(ledger._engine, "commit", lambda _connection: commits.append(None))
    await ledger.end_lease("operators/x")
    assert await settled(ledger) == (0, 1, 999)
    assert len(commits) < 20


async def test_a_closed_ledger_says_so(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 1)
    await ledger.close()
    for call in (ledger.account("a"), ledger.grant("a", 1), ledger.hold(wish())):
        with pytest.raises(LedgerUnavailable, match="closed"):
            await call


async def test_the_dead_are_forgotten(path: Path, opened: Any) -> None:
    python(CRASH, f"sqlite:///{path}", 1)
    assert len(query(path, "SELECT 1 FROM instances")) == 1
    ledger = opened()
    assert query(path, "SELECT instance_id FROM instances") == [(ledger.instance_id,)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The wall clock runs ``clock[0]`` milliseconds ahead."""
    ahead: list[int] = [0]
    opened_by = SqlLedger.open

    def open_(url: str, **settings: Any) -> SqlLedger:
        return opened_by(url, clock=lambda: rules.now_ms() + ahead[0], **settings)

    monkeypatch.setattr(SqlLedger, "open", open_)
    yield ahead


async def test_a_clock_that_jumps_ahead_costs_an_answer_and_no_money(clock: list[int], opened: Any) -> None:
    first = opened()
    await first.create_account("a", 100)
    await first.hold(wish())
    first._clock = rules.now_ms  # has not looked yet: its writer follows a jump as soon as it does
    clock[0] = 3_600_000
    second = opened()  # takes the first for dead
    assert await settled(second) == (0, 0, 100)
    first._clock = second._clock
    with pytest.raises(Refusal) as refused:
        await first.post("a", "b", b"too late")
    assert refused.value.reason is Reason.HOLD_LOST
    assert await first.hold(wish()) == Held()
    await first.post("a", "b", b"answer")
    assert await settled(second) == (5, 0, 95)


async def test_a_server_never_takes_itself_for_dead(clock: list[int], opened: Any) -> None:
    ledger = opened(lease_ms=60_000)
    await ledger.create_account("a", 100)
    await ledger.hold(wish())
    await settled(ledger)
    await asyncio.sleep(0.1)  # the writer waits for work, and will renew the lease only after it
    clock[0] = 70_000
    with pytest.raises(Refusal) as refused:
        await ledger.hold(wish())
    assert refused.value.reason is Reason.BATCH_IN_FLIGHT
    await ledger.post("a", "b", b"answer")
    assert await kinds(ledger) == ["grant", "hold", "post"]


async def test_a_lease_that_cannot_be_renewed_stops_nobody(opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    ledger = opened(lease_ms=60)
    await ledger.create_account("a", 100)
    failures: list[str] = []

    def broken(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "INTO instances" in statement:
            failures.append(statement)
            raise ValueError("no fault that anybody thought of")

    sa.event.listen(ledger._engine, "before_cursor_execute", broken)
    await until(lambda: len(failures) >= 2)
    assert "the ledger failed at renewing the lease: no fault that anybody thought of" in caplog.text
    assert await asyncio.wait_for(ledger.hold(wish()), 5) == Held()
    assert (await asyncio.wait_for(ledger.post("a", "b", b"answer"), 5)).account.posted == 5


async def test_a_lease_that_could_not_be_renewed_is_tried_again_soon_however_long_it_is(
    clock: list[int], opened: Any
) -> None:
    ledger = opened(lease_ms=600_000)
    await ledger.create_account("a", 100)
    failures: list[str] = []

    def fails_once(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "INTO instances" in statement and not failures:
            failures.append(statement)
            raise sa.exc.OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    sa.event.listen(ledger._engine, "before_cursor_execute", fails_once)
    clock[0] = 300_000  # so that a renewal is due
    await ledger.void("a", "nothing")
    await until(lambda: failures)
    with pytest.raises(LedgerUnavailable, match="could not be written"):
        await ledger.check()

    async def is_written() -> bool:
        with contextlib.suppress(LedgerUnavailable):
            await ledger.check()
            return True
        return False

    await until(is_written)


async def test_a_sweep_that_fails_is_told_and_keeps_no_server_from_starting(
    opened: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_self: Any, _connection: Any) -> None:
        raise sa.exc.OperationalError("SELECT", {}, sqlite3.OperationalError("some hold is locked"))

    monkeypatch.setattr(SqlLedger, "_sweep", broken)
    ledger = opened(lease_ms=3000)
    await ledger.create_account("a", 100)
    assert "expiring what the dead left held: the ledger's store " in caplog.text
    assert "ledger.db failed: some hold is locked" in caplog.text
    monkeypatch.undo()
    await ledger.hold(wish())
    await settled(ledger)
    monkeypatch.setattr(SqlLedger, "_sweep", broken)
    for _ in range(2):  # the second comes after a sweep that failed
        await renewed(ledger)
    other = opened()
    with pytest.raises(Refusal, match="BATCH_IN_FLIGHT"):
        await other.hold(wish())
    await ledger.post("a", "b", b"answer")


async def test_a_sweep_never_expires_the_server_that_sweeps(opened: Any) -> None:
    ledger = opened(lease_ms=60_000)
    await ledger.create_account("a", 100)
    await ledger.hold(wish())

    def lapse_and_sweep(transaction: Any) -> None:
        transaction.connection.exec_driver_sql("UPDATE instances SET lease_until_ms = 0")
        ledger._sweep(transaction.connection)

    await ledger._write(lapse_and_sweep)
    assert await settled(ledger) == (0, 5, 95)


async def test_a_clock_that_jumps_back_leaves_no_lease_in_the_far_future(
    path: Path, clock: list[int], opened: Any
) -> None:
    clock[0] = 3_600_000
    ledger = opened(lease_ms=10_000)
    clock[0] = 0
    await ledger.create_account("a", 100)

    async def renewed() -> bool:
        return bool(query(path, "SELECT lease_until_ms FROM instances")[0][0] <= rules.now_ms() + 10_000)

    await until(renewed)


# --- what is told when ---


def fail_commits(ledger: SqlLedger) -> Any:
    """Every commit of this ledger fails from now on, as a broken disk makes it; returns what ends that."""

    def broken(_connection: Any) -> None:
        raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    sa.event.listen(ledger._engine, "commit", broken)
    return lambda: sa.event.remove(ledger._engine, "commit", broken)


async def test_a_hold_that_the_disk_forgot_charges_nothing_and_can_be_held_again(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    mend = fail_commits(ledger)
    assert await ledger.hold(wish()) == Held()  # told before the commit
    with pytest.raises(LedgerUnavailable, match="disk I/O error"):
        await ledger.void("a", "nothing")
    mend()
    with pytest.raises(Refusal) as refused:
        await ledger.post("a", "b", b"answer")
    assert refused.value.reason is Reason.HOLD_LOST
    assert await settled(ledger) == (0, 0, 100)
    assert await ledger.hold(wish()) == Held()
    await ledger.post("a", "b", b"answer")
    assert await settled(ledger) == (5, 0, 95)


async def test_a_post_whose_commit_failed_charges_nothing_and_its_hold_stands(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    await ledger.hold(wish())
    await settled(ledger)
    mend = fail_commits(ledger)
    with pytest.raises(LedgerUnavailable):
        await ledger.post("a", "b", b"answer")
    mend()
    assert await settled(ledger) == (0, 5, 95)
    await ledger.void("a", "b")
    assert await settled(ledger) == (0, 0, 100)


async def grouped(ledger: SqlLedger, *calls: Any) -> list[Any]:
    """Runs ledger calls so that the writer takes them in one transaction."""
    busy, go = threading.Event(), threading.Event()

    def occupy(_transaction: Any) -> None:
        busy.set()
        go.wait(10)

    occupied = asyncio.ensure_future(ledger._write(occupy))
    await asyncio.to_thread(busy.wait, 10)
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0.02)
    go.set()
    await occupied
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_kept_answer_is_not_told_before_its_post_is_durable(opened: Any) -> None:
    # The post and a repeat of its batch in one group, whose commit fails: nobody may get the answer for nothing.
    ledger = opened()
    await ledger.create_account("a", 100)
    await ledger.hold(wish())
    await settled(ledger)
    busy, go = threading.Event(), threading.Event()

    def occupy(_transaction: Any) -> None:
        busy.set()
        go.wait(10)

    occupied = asyncio.ensure_future(ledger._write(occupy))
    await asyncio.to_thread(busy.wait, 10)
    posting = asyncio.ensure_future(ledger.post("a", "b", b"answer"))
    repeat = asyncio.ensure_future(ledger.hold(wish()))
    await asyncio.sleep(0.02)
    commits = [0]

    def second_commit_fails(_connection: Any) -> None:
        commits[0] += 1
        if commits[0] == 2:
            raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    sa.event.listen(ledger._engine, "commit", second_commit_fails)
    go.set()
    await occupied
    told = await asyncio.gather(posting, repeat, return_exceptions=True)
    assert [type(outcome) for outcome in told] == [LedgerUnavailable, LedgerUnavailable]
    assert await settled(ledger) == (0, 5, 95)


async def test_steps_that_meet_in_one_group_see_each_other(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 10)
    await ledger.hold(wish("x", 6))
    told = await grouped(
        ledger,
        ledger.post("a", "x", b"answer"),
        ledger.hold(wish("x", 6)),
        ledger.hold(wish("y", 5)),
        ledger.grant("a", 3),
        ledger.hold(wish("y", 5)),
        ledger.hold(wish("y", 5)),
        ledger.void("a", "y"),
        ledger.hold(wish("y", 7)),
    )
    assert told[1] == dataclasses.replace(told[0], account=told[1].account) and told[1].account == told[0].account
    assert [outcome.reason.name for outcome in told if isinstance(outcome, Refusal)] == [
        "BUDGET_EXHAUSTED",
        "BATCH_IN_FLIGHT",
    ]
    assert told[4] == told[7] == Held()
    assert await settled(ledger) == (6, 7, 0)
    assert await kinds(ledger) == ["grant", "hold", "post", "grant", "hold", "void", "hold"]


async def test_holds_do_not_wait_for_the_disk_and_posts_do(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    disk = threading.Event()
    sa.event.listen(ledger._engine, "commit", lambda _connection: disk.wait(10))
    assert await asyncio.wait_for(ledger.hold(wish()), 5) == Held()
    posting = asyncio.ensure_future(ledger.post("a", "b", b"answer"))
    done, _ = await asyncio.wait([posting], timeout=0.2)
    assert not done
    disk.set()
    assert (await posting).account.posted == 5


async def test_callers_who_have_left_change_nothing(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    busy, go = threading.Event(), threading.Event()

    def occupy(_transaction: Any) -> None:
        busy.set()
        go.wait(10)

    occupied = asyncio.ensure_future(ledger._write(occupy))
    await asyncio.to_thread(busy.wait, 10)
    leaver = asyncio.ensure_future(ledger.hold(wish()))
    await asyncio.sleep(0.02)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    go.set()
    await occupied
    assert await settled(ledger) == (0, 0, 100)


async def test_a_step_that_breaks_the_store_is_undone_with_its_group_and_the_writer_lives_on(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)

    def spoil(transaction: Any) -> None:
        transaction.connection.exec_driver_sql("INSERT INTO nowhere VALUES (1)")

    told = await grouped(ledger, ledger.grant("a", 5), ledger._write(spoil))
    assert [type(outcome) for outcome in told] == [LedgerUnavailable, LedgerUnavailable]
    assert await settled(ledger) == (0, 0, 100)
    assert (await ledger.grant("a", 5)).granted == 105


async def test_what_nobody_expected_of_a_command_fails_that_command_alone(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)

    def surprise(_transaction: Any) -> None:
        raise KeyError("no fault that anybody thought of")

    told = await grouped(
        ledger,
        ledger.hold(wish("x")),
        ledger._write(surprise),
        ledger.post("a", "x", b"answer"),
        ledger.grant("a", 5),
    )
    assert told[0] == Held() and isinstance(told[1], LedgerUnavailable) and told[2].account.posted == 5
    assert told[3].granted == 105
    assert await settled(ledger) == (5, 0, 100)
    assert await kinds(ledger) == ["grant", "hold", "post", "grant"]


async def test_who_was_refused_in_a_group_that_is_undone_is_not_held_for_after_all(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)

    def spoil(transaction: Any) -> None:
        """Takes pictures, and breaks only when the group is written."""
        transaction.record(rules.apply_hold(transaction.account("a"), None, wish("s", 60), "i", transaction.now_ms))
        transaction._new_answers.append(
            {"account": "a", "batch_id": "s", "answer": None, "sequence": 1, "head": bytes(32)}
        )

    told = await grouped(ledger, ledger.hold(wish("x", 30)), ledger._write(spoil), ledger.hold(wish("y", 60)))
    assert told[0] == Held() and isinstance(told[1], LedgerUnavailable)
    assert isinstance(told[2], Refusal) and told[2].reason is Reason.BUDGET_EXHAUSTED
    assert await settled(ledger) == (0, 30, 70)


async def test_a_commit_whose_outcome_is_unknown_is_not_made_a_second_time(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)

    def broken(_connection: Any) -> None:
        raise sa.exc.IntegrityError("COMMIT", {}, sqlite3.IntegrityError("or not"))

    busy = await grouped(ledger)  # nothing is under way
    sa.event.listen(ledger._engine, "commit", broken)
    told = await asyncio.gather(ledger.grant("a", 5), ledger.grant("a", 6), return_exceptions=True)
    sa.event.remove(ledger._engine, "commit", broken)
    assert busy == [] and [type(outcome) for outcome in told] == [LedgerUnavailable] * 2
    assert await settled(ledger) == (0, 0, 100)


async def test_more_commands_than_the_queue_takes_are_refused_and_not_lost(
    monkeypatch: pytest.MonkeyPatch, opened: Any
) -> None:
    monkeypatch.setattr(ledger_sql, "MAX_WAITING_COMMANDS", 4)
    ledger = opened()
    await ledger.create_account("a", 100)
    told = await grouped(ledger, *(ledger.hold(wish(f"b{i}", 1)) for i in range(6)))
    assert told[:4] == [Held()] * 4
    assert [type(outcome) for outcome in told[4:]] == [LedgerUnavailable] * 2
    assert await settled(ledger) == (0, 4, 96)


@contextlib.asynccontextmanager
async def long_report(ledger: SqlLedger) -> AsyncIterator["asyncio.Future[Any]"]:
    """A customer's report is being read for as long as the context lasts."""
    busy, go = threading.Event(), threading.Event()

    def occupy(_connection: Any) -> str:
        busy.set()
        go.wait(10)
        return "read"

    report = asyncio.ensure_future(ledger._read(occupy))
    await asyncio.to_thread(busy.wait, 10)
    try:
        yield report
    finally:
        go.set()


async def test_a_long_report_holds_up_neither_authentication_nor_health(opened: Any) -> None:
    ledger = opened()
    _, key = new_key("a")
    await ledger.create_account("a", 100, key)
    async with long_report(ledger) as report:
        waiting = asyncio.ensure_future(ledger.run_posted("a", "run"))
        credential = await asyncio.wait_for(ledger.credential(key.key_id), 5)
        assert credential is not None and credential.key == key
        await asyncio.wait_for(ledger.terms("a"), 5)
        await asyncio.wait_for(ledger.check(), 5)
        assert not waiting.done()
    assert (await report, await waiting) == ("read", 0)


async def test_more_reads_than_may_wait_are_refused(monkeypatch: pytest.MonkeyPatch, opened: Any) -> None:
    monkeypatch.setattr(ledger_sql, "MAX_WAITING_READS", 4)
    ledger = opened()
    await ledger.create_account("a", 100)
    async with long_report(ledger) as report:
        waiting = [asyncio.ensure_future(ledger.run_posted("a", "r")) for _ in range(6)]
        await asyncio.sleep(0.02)
        assert [read.done() for read in waiting] == [False] * 4 + [True] * 2
    told = await asyncio.gather(report, *waiting, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in told] == ["str"] + ["int"] * 4 + ["LedgerUnavailable"] * 2
    assert "4 reads wait for the ledger already" in str(told[-1])


async def test_closing_waits_for_no_reports_and_stops_nobody_else(
    monkeypatch: pytest.MonkeyPatch, opened: Any
) -> None:
    monkeypatch.setattr(ledger_sql, "READERS_CLOSE_SECONDS", 0.2)
    ledger = opened()
    await ledger.create_account("a", 100)
    await ledger.hold(wish())
    async with long_report(ledger) as report:
        waiting = [asyncio.ensure_future(ledger.run_posted("a", "r")) for _ in range(3)]
        await asyncio.sleep(0)
        turned, join = threading.Event(), ledger._reader.join

        def join_once_the_loop_has_turned(seconds: float) -> None:
            turned.wait(5)  # in vain if this is called on the loop
            join(seconds)

        monkeypatch.setattr(ledger._reader, "join", join_once_the_loop_has_turned)
        closing = asyncio.ensure_future(ledger.close())
        turns = 0
        while not closing.done():
            await asyncio.sleep(0.01)
            turns += 1
            if turns == 5:
                turned.set()
        assert turns >= 5, "the event loop stood still"
        assert not report.done()
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, LedgerUnavailable) and "closed" in str(outcome)
    assert await report == "read"
    other = opened()
    assert (await other.account("a")).held == 0


async def test_books_locked_by_another_program_are_unavailable_and_unchanged(
    path: Path, monkeypatch: pytest.MonkeyPatch, opened: Any
) -> None:
    monkeypatch.setattr(ledger_store, "BUSY_TIMEOUT_SECONDS", 0.05)
    ledger = opened()
    await ledger.create_account("a", 100)
    with write_locked(path):
        for call in (ledger.hold(wish()), ledger.grant("a", 1), ledger.post("a", "b", b"")):
            with pytest.raises(LedgerUnavailable, match="locked"):
                await call
        assert (await ledger.account("a")).balance == 100  # reading goes on
    assert await ledger.hold(wish()) == Held()


# --- the file ---


async def test_commits_are_on_the_disk_before_they_return(opened: Any) -> None:
    ledger = opened()

    def pragmas(transaction: Any) -> list[Any]:
        run = transaction.connection.exec_driver_sql
        return [run(f"PRAGMA {name}").scalar() for name in ("synchronous", "journal_mode", "foreign_keys")]

    assert await ledger._write(pragmas) == [2, "wal", 1]  # 2: FULL


async def test_only_the_owner_can_read_the_books(path: Path, opened: Any) -> None:
    before = os.umask(0)
    try:
        ledger = opened()
        await ledger.create_account("a", 100)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob("ledger.db*")}
    assert modes == {"ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600}


_SHIFTED = "SELECT account, sequence + 100, create_time_ms, kind, batch_id, run_id, 1, digest, head FROM entries"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET picture_count = 1",
        "DELETE FROM entries",
        "REPLACE INTO entries SELECT * FROM entries",
        f"REPLACE INTO entries {_SHIFTED} WHERE kind = 'post'",  # in the way by the index of posts …
        f"REPLACE INTO entries {_SHIFTED} WHERE kind = 'grant' AND batch_id <> ''",  # … and of grants
        "INSERT INTO entries SELECT * FROM entries WHERE true "
        "ON CONFLICT (account, sequence) DO UPDATE SET picture_count = 1",
    ],
)
async def test_the_journal_refuses_to_be_rewritten(path: Path, opened: Any, statement: str) -> None:
    ledger = opened()
    await ledger.create_account("a", 100, grant_id="g")
    await ledger.hold(wish())
    await ledger.post("a", "b", b"answer")
    entries = await ledger.statement("a")
    with pytest.raises(sqlite3.IntegrityError, match="the journal is append-only"):
        query(path, statement)
    assert await ledger.statement("a") == entries


@pytest.mark.parametrize("change", ["held = -1", "posted = 101", "held = 60, posted = 60"])
async def test_the_store_itself_refuses_to_overspend(path: Path, opened: Any, change: str) -> None:
    await opened().create_account("a", 100)
    with pytest.raises(sqlite3.IntegrityError, match="never_overspent"):
        query(path, f"UPDATE accounts SET {change}")


async def test_the_books_are_read_again_as_they_were_written(opened: Any) -> None:
    ledger = opened()
    _, key = new_key("a")
    await ledger.create_account("a", 100, key)
    await ledger.hold(wish())
    await ledger.post("a", "b", b"\x00answer\xff")
    entries, account = await ledger.statement("a"), await ledger.account("a")
    await ledger.close()
    again = opened()
    assert await again.statement("a") == entries
    assert await again.account("a") == account
    assert await again.keys("a") == [key]
    assert await replayed(again, wish()) == b"\x00answer\xff"


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, opened: Any) -> None:
    path.write_bytes(b"my holiday pictures" * 100)
    with pytest.raises(LedgerError, match="file is not a database"):
        opened()
    assert path.read_bytes() == b"my holiday pictures" * 100


@pytest.mark.parametrize("url", ["ledger.db", "sqlite://", "sqlite:///:memory:", "mysql://host/db", "memory:", ""])
def test_another_kind_of_url_is_refused_with_the_form_that_is_expected(url: str) -> None:
    expected = "expected a ledger as sqlite:///FILE or postgresql://USER@HOST/DATABASE, got "
    with pytest.raises(LedgerError, match=expected):
        SqlLedger.open(url)


@pytest.mark.parametrize(
    ("where", "host"),
    [
        ("u:secret@db.example/books", "db.example"),
        ("u:secret[@db.example/books", "db.example"),
        ("u:se%2Fcret%23@db.example:5433/books", "db.example"),
        ("/books?host=db.example", "db.example"),
        ("/books?host=127.0.0.1:5432&host=db.example:5433", "db.example"),
        ("u@localhost/books?hostaddr=203.0.113.5", "203.0.113.5"),
        ("u@[2001:db8::1]:5432/books", "2001:db8::1"),
    ],
)
def test_a_postgresql_beyond_loopback_is_refused_until_somebody_says_how_the_way_is_protected(
    where: str, host: str
) -> None:
    url = f"postgresql://{where}"
    with pytest.raises(LedgerError, match=rf"{re.escape(host)} is not loopback: add \?sslmode=verify-full") as raised:
        SqlLedger.open(url)
    assert "secret" not in str(raised.value)
    assert unprotected(f"{url}{'&' if '?' in url else '?'}sslmode=require") is None


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u@127.0.0.1:5432/b",
        "postgresql://u:p%23w%2F@localhost/b",
        "postgresql:///b",
        "postgresql:///b?host=/run/postgresql",
        "postgresql:///b?host=::1",
        "postgresql://u@[::1]/b",
        "postgresql+psycopg://u@127.0.0.1/b",
        "sqlite:///books.db",
    ],
)
def test_books_on_this_machine_need_no_such_word(url: str) -> None:
    assert unprotected(url) is None


def test_a_missing_folder_or_file_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"expected a folder for the ledger, found no .*/nowhere"):
        SqlLedger.open(f"sqlite:///{tmp_path}/nowhere/ledger.db")
    with pytest.raises(LedgerError, match="found no file; 'teacher-admin account create' makes one"):
        SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db", create=False)
    with pytest.raises(LedgerUnavailable, match="unable to open"):
        SqlLedger.open(f"sqlite:///{tmp_path}")  # a folder
    assert list(tmp_path.iterdir()) == []


def test_several_programs_may_make_the_books_at_once(tmp_path: Path) -> None:
    # Alembic is imported before: by whoever has the lock, it would use up the others' patience.
    code = "import teacher_service.migrations\nasyncio.run(SqlLedger.open(sys.argv[1]).close())"
    command = [sys.executable, "-c", PREAMBLE + code, f"sqlite:///{tmp_path}/ledger.db"]
    programs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(program.communicate(timeout=60)[1], program.returncode) for program in programs] == [("", 0)] * 4


READ_ONLY = """
import ctypes
if os.geteuid() == 0:  # root writes everywhere: give that up (PR_CAPBSET_DROP, CAP_DAC_OVERRIDE), and start anew
    if len(sys.argv) == 2:
        assert ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) == 0
        os.execv(sys.executable, [sys.executable, "-c", *sys.orig_argv[2:], "again"])
try:
    ledger = SqlLedger.open(sys.argv[1])
except LedgerUnavailable as error:
    print(error)
"""


def test_books_that_may_only_be_read_are_refused_in_one_line(path: Path, opened: Any) -> None:
    asyncio.run(opened().close())
    path.chmod(0o400)
    done = python(READ_ONLY, f"sqlite:///{path}")
    assert done.stderr == ""
    assert done.stdout == f"the ledger's store {path} failed: attempt to write a readonly database\n"


def test_a_broken_file_is_named_with_what_to_do(path: Path, opened: Any) -> None:
    path.write_bytes(b"no ledger at all" * 999)
    with pytest.raises(LedgerUnavailable, match=f"{path} failed: file is not a database; give another --ledger, or"):
        opened()
    path.unlink()
    asyncio.run(opened().close())
    path.write_bytes(path.read_bytes()[:40000])
    with pytest.raises(LedgerUnavailable, match=f"{path} failed: .*malformed; 'teacher-admin ledger restore' puts"):
        opened()


FULL_DISK = """
import resource
async def main():
    ledger = SqlLedger.open(sys.argv[1], lease_ms=600_000)  # a renewal that fails would be told
    path = sys.argv[1].removeprefix("sqlite:///")
    await ledger.create_account("a", 100)
    await ledger.hold(wish("b"))
    await ledger.void("a", "nothing")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path + "-wal"), limits[1]))  # no file may grow
    for call in (ledger.post("a", "b", b"answer"), ledger.grant("a", 1), ledger.void("a", "b")):
        try:
            await call
        except LedgerUnavailable as error:
            print("unavailable")
    print(await standing(ledger))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    await ledger.post("a", "b", b"answer")
    print(await standing(ledger))
    await ledger.close()
async def standing(ledger):
    account = await ledger.account("a")
    return account.granted, account.posted, account.held
asyncio.run(main())
"""


async def test_a_full_disk_loses_nothing_and_charges_nothing(path: Path, opened: Any) -> None:
    done = python(FULL_DISK, f"sqlite:///{path}")
    assert (done.stdout.splitlines(), done.stderr) == (
        ["unavailable"] * 3 + ["(100, 0, 5)", "(100, 5, 0)"],
        "",
    )
    ledger = opened()
    assert await replayed(ledger, wish("b")) == b"answer"
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


async def test_books_that_may_not_grow_charge_nothing_and_go_on_where_they_stopped(path: Path, opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 10_000)

    def limit(pages: int) -> Any:
        return ledger._write(lambda t: t.connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}").scalar())

    assert await limit(1) > 1  # as many as there are now
    posted = 0
    with pytest.raises(LedgerUnavailable, match="database or disk is full") as full:
        for posted in range(10_000):
            await ledger.hold(wish(f"b{posted}", 1))
            await ledger.post("a", f"b{posted}", bytes(3000))
    assert "\n" not in str(full.value)
    await limit(10**6)
    assert (await settled(ledger))[0] == posted  # all that was told, and nothing else
    await ledger.hold(wish("room", 1))
    assert (await ledger.post("a", "room", bytes(3000))).account.posted == posted + 1
    assert await replayed(ledger, wish("room", 1)) == bytes(3000)
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("table", ["accounts", "holds", "answers", "entries"])
async def test_a_corrupted_page_is_told_in_one_line_and_gives_nothing_away(
    path: Path, opened: Any, table: str
) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    await ledger.hold(wish("posted"))
    await ledger.post("a", "posted", b"answer")
    await ledger.close()
    root, size = query(path, f"SELECT rootpage, (SELECT page_size FROM pragma_page_size) FROM sqlite_master "
                             f"WHERE name = '{table}'")[0]  # fmt: skip
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)
    failures: list[str] = []
    try:
        ledger = opened()
    except LedgerUnavailable as error:  # the sweep has noticed
        failures.append(str(error))
    else:
        # What was paid for may still be read where it is whole; nothing new is answered, and nobody gets pictures.
        for call in (ledger.hold(wish("posted")), ledger.hold(wish("new")), ledger.grant("a", 1)):
            try:
                await call
            except LedgerUnavailable as error:
                failures.append(str(error))
        with pytest.raises((LedgerUnavailable, Refusal)):
            await ledger.post("a", "new", b"answer")
    assert failures and all("malformed" in line and "\n" not in line for line in failures)


# --- PostgreSQL ---


async def test_a_post_whose_commit_was_made_and_its_reply_lost_is_answered(
    postgres_url: str,
) -> None:
    ledger = SqlLedger.open(postgres_url)
    await ledger.create_account("a", 100)
    await ledger.hold(wish())
    await settled(ledger)
    lost = [0]

    def reply_lost(connection: Any) -> None:
        posts = connection.exec_driver_sql("SELECT count(*) FROM entries WHERE kind = 'post'").scalar_one()
        if posts and not lost[0]:
            lost[0] = 1
            connection.exec_driver_sql("COMMIT")
            raise sa.exc.OperationalError("COMMIT", {}, psycopg.OperationalError("the connection was lost"))

    sa.event.listen(ledger._engine, "commit", reply_lost)
    posted = await ledger.post("a", "b", b"answer")
    assert lost == [1] and posted.answer == b"answer"
    assert await settled(ledger) == (5, 0, 95)
    assert [entry.kind.value for entry in await ledger.statement("a")] == ["grant", "hold", "post"]
    await ledger.close()


async def test_a_connection_that_postgresql_lost_without_a_word_is_given_up_within_seconds(postgres_url: str) -> None:
    expected = {
        "keepalives_idle": "5",
        "keepalives_interval": "2",
        "keepalives_count": "3",
        "tcp_user_timeout": "10000",
    }
    ledger = SqlLedger.open(postgres_url)
    with ledger._engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        assert expected.items() <= driver.info.get_parameters().items()
    await ledger.close()
    with audit.Store(postgres_url) as store:
        assert expected.items() <= store._connection.info.get_parameters().items()


def test_postgresql_without_its_driver_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = "postgresql://mekd@/books"
    said = r"expected psycopg for postgresql://, found none; pip install 'mekd\[postgres\]'"
    with pytest.raises(LedgerError, match=said):
        SqlLedger.open(url)
    with pytest.raises(audit.AuditError, match=said), audit.Store(url):
        pass


async def test_postgresql_syncs_before_it_answers_whatever_role_and_database_say(postgres_url: str) -> None:
    name = sa.make_url(postgres_url).database
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for setting in ("synchronous_commit = off", "default_transaction_isolation = 'serializable'"):
            connection.execute(f"ALTER DATABASE {name} SET {setting}")
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("off",)
    ledger = SqlLedger.open(postgres_url)

    def session(transaction: Any) -> list[Any]:
        names = ("synchronous_commit", "transaction_isolation", "fsync")
        return [transaction.connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names]

    assert await ledger._write(session) == ["on", "read committed", "on"]
    await ledger.close()


@contextlib.contextmanager
def server_setting(postgres: Postgres, name: str) -> Iterator[None]:
    """The whole PostgreSQL server has a setting off as long as the context lasts."""
    with psycopg.connect(f"host={postgres.folder} user=mekd dbname=postgres", autocommit=True) as connection:

        def change(statement: str, value: str) -> None:
            connection.execute(statement)
            connection.execute("SELECT pg_reload_conf()")
            while connection.execute(f"SHOW {name}").fetchone() != (value,):  # told by a signal
                time.sleep(0.01)

        change(f"ALTER SYSTEM SET {name} = off", "off")
        try:
            yield
        finally:
            change(f"ALTER SYSTEM RESET {name}", "on")


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
async def test_a_postgresql_that_may_lose_what_it_committed_is_refused_at_open(
    postgres: Postgres, postgres_url: str, setting: str
) -> None:
    running = SqlLedger.open(postgres_url)
    await running.create_account("a", 100)
    with server_setting(postgres, setting):
        with pytest.raises(LedgerError) as refused:
            SqlLedger.open(postgres_url)
        assert str(refused.value) == (
            f"expected a PostgreSQL that keeps what it has committed, got {setting} = off; set {setting} = on "
            "(ALTER SYSTEM SET …, then SELECT pg_reload_conf()) and start again"
        )
        # Who runs already notices with its next connection, and sells nothing more.
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        with pytest.raises(LedgerUnavailable, match=f"got {setting} = off"):
            await running.hold(wish())
    assert await running.hold(wish()) == Held()
    await running.close()


async def test_a_pooler_that_drops_our_settings_does_not_let_commits_be_forgotten(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_store, "POSTGRES_SETTINGS", "")
    await SqlLedger.open(postgres_url).close()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {sa.make_url(postgres_url).database} SET synchronous_commit = off")
    with pytest.raises(LedgerError, match="got synchronous_commit = off; set synchronous_commit = on"):
        SqlLedger.open(postgres_url)


async def test_the_journal_in_postgresql_refuses_to_be_rewritten(postgres_url: str) -> None:
    ledger = SqlLedger.open(postgres_url)
    await ledger.create_account("a", 100)
    await ledger.close()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        for statement in (
            "UPDATE entries SET picture_count = 1",
            "DELETE FROM entries",
            "TRUNCATE entries",
            "INSERT INTO entries SELECT * FROM entries "
            "ON CONFLICT (account, sequence) DO UPDATE SET picture_count = 1",
        ):
            with pytest.raises(psycopg.errors.RaiseException, match="the journal is append-only"):
                connection.execute(statement)
        with pytest.raises(psycopg.errors.CheckViolation, match="never_overspent"):
            connection.execute("UPDATE accounts SET posted = 101")


async def test_an_account_locked_by_somebody_costs_no_server_its_lease_and_no_other_account_its_pictures(
    postgres_url: str,
) -> None:
    server = SqlLedger.open(postgres_url, lease_ms=3000)
    for account in ("a", "locked"):
        await server.create_account(account, 100)
        await server.hold(wish("orphan", account=account), instance_id="operators/dead")
    await server.hold(wish("alive"))
    await settled(server)
    with psycopg.connect(postgres_url) as somebody:
        somebody.execute("SELECT * FROM accounts WHERE name = 'locked' FOR UPDATE")
        with psycopg.connect(postgres_url, autocommit=True) as other:
            other.execute("UPDATE instances SET lease_until_ms = 0 WHERE instance_id = 'operators/dead'")

        async def swept() -> bool:
            return (await server.account("a")).held == 5

        await until(swept)
        for _ in range(2):  # the second comes after a sweep that met the lock
            await renewed(server)
        second = await asyncio.to_thread(SqlLedger.open, postgres_url)
        with pytest.raises(Refusal, match="BATCH_IN_FLIGHT"):
            await second.hold(wish("alive"))
        assert (await server.post("a", "alive", b"answer")).account.held == 0
        assert (await server.account("locked")).held == 5
        somebody.rollback()

    async def swept_too() -> bool:
        return (await server.account("locked")).held == 0

    await until(swept_too)
    await second.close()
    await server.close()


@contextlib.contextmanager
def locked(url: str, *accounts: str) -> Iterator[psycopg.Connection[Any]]:
    """Somebody has accounts' rows locked for as long as the context lasts, or until they roll back."""
    with psycopg.connect(url) as somebody:
        somebody.execute("SELECT * FROM accounts WHERE name = ANY(%s) FOR UPDATE", [list(accounts)])
        yield somebody
        somebody.rollback()


async def waits_for_a_lock(url: str, *, what: str) -> None:
    """Returns when somebody on this database waits for a lock, in a statement that says ``what``."""
    waiting = (
        "SELECT 1 FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ~ %s"
    )
    with psycopg.connect(url, autocommit=True) as connection:
        await until(lambda: connection.execute(waiting, [what]).fetchone() is not None)


async def test_an_account_locked_by_somebody_keeps_no_other_from_holding_and_posting(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_sql, "STUCK_SECONDS", 600.0)
    monkeypatch.setattr(ledger_sql, "POST_SECONDS", 0.0)  # no second try
    server = SqlLedger.open(postgres_url)
    for account in ("a", "locked", "z"):
        await server.create_account(account, 100)
        await server.hold(wish("before", account=account))
    waits: list[str] = []
    sa.event.listen(server._engine, "handle_error", lambda context: waits.append(str(context.original_exception)))
    with locked(postgres_url, "locked"):
        for number in range(3):
            told = await grouped(
                server,
                server.hold(wish(f"{number}", 1, account="locked")),
                server.post("a", "before", b"answer") if number == 0 else server.hold(wish(f"{number}", 1)),
                server.create_account("locked", 100),
                server.hold(wish(f"{number}", 1, account="z")),
                server.post("locked", "before", b"answer"),
                server.grant("z", 5),
                server.grant(f"new-{number}", 5),
                server.grant("a", 5),
            )
            assert [type(outcome).__name__ for outcome in told] == [
                "LedgerUnavailable",
                "Posted" if number == 0 else "Held",
                "LedgerUnavailable",
                "Held",
                "LedgerUnavailable",
                "Account",
                "LedgerError",
                "Account",
            ]
            # The group waited for it once, and it was waited for once alone; after that it is known.
            assert len(waits) == 2 and all("lock timeout" in wait for wait in waits)
        assert "the account locked is locked by another program" in str(told[0])
    assert (await server.hold(wish("0", 1, account="locked"))) == Held()
    assert (await server.post("locked", "before", b"answer")).account.posted == 5
    assert await settled(server) == (5, 2, 108)
    await server.close()


async def test_many_locked_accounts_take_no_more_of_the_writers_time_than_one(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_sql, "STUCK_SECONDS", 600.0)
    server = SqlLedger.open(postgres_url)
    names = [f"locked-{number}" for number in range(12)]
    for account in ("a", *names):
        await server.create_account(account, 100)
    waits: list[str] = []
    sa.event.listen(server._engine, "handle_error", lambda context: waits.append(str(context.original_exception)))
    with locked(postgres_url, *names):
        for number in range(2):
            holds = [server.hold(wish(f"{number}", 1, account=name)) for name in ("a", *names)]
            told = await grouped(server, *holds)
            assert told[0] == Held() and all(isinstance(outcome, LedgerUnavailable) for outcome in told[1:])
        assert len(waits) == 2, waits  # of the first group together, and of one account alone
    assert [await server.hold(wish("after", 1, account=name)) for name in names] == [Held()] * 12
    await server.close()


async def test_an_account_that_was_locked_for_long_is_waited_for_again_and_by_nobody_else(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = ledger_store.POSTGRES_SETTINGS + " -c lock_timeout=60s"
    monkeypatch.setattr(ledger_store, "POSTGRES_SETTINGS", patient)
    server = SqlLedger.open(postgres_url)
    for account in ("a", "locked"):
        await server.create_account(account, 100)
    server._stuck["locked"] = time.monotonic()  # until now
    with locked(postgres_url, "locked") as somebody:
        holding = asyncio.ensure_future(grouped(server, server.hold(wish(account="locked")), server.grant("a", 5)))
        await waits_for_a_lock(postgres_url, what="accounts")
        assert (await server.account("a")).granted == 105
        somebody.rollback()
        assert (await holding)[0] == Held()
    await server.close()


async def test_an_answer_outlasts_another_server_that_froze_with_its_account_locked(postgres_url: str) -> None:
    server, frozen = SqlLedger.open(postgres_url), SqlLedger.open(postgres_url)
    await server.create_account("a", 100)
    await server.hold(wish())
    await settled(server)
    busy, go = threading.Event(), threading.Event()

    def freeze(_transaction: Any) -> None:
        busy.set()
        go.wait(30)

    freezing = asyncio.ensure_future(frozen._write(freeze, "a"))
    await asyncio.to_thread(busy.wait, 10)
    assert (await server.post("a", "b", b"answer")).account.posted == 5
    go.set()
    with pytest.raises(LedgerUnavailable):
        await freezing
    assert await frozen.hold(wish("c")) == Held()
    await frozen.close()
    await server.close()


async def test_who_opens_the_books_waits_for_whoever_migrates_them_however_long_that_takes(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = ledger_store.POSTGRES_SETTINGS + " -c lock_timeout=50ms"
    monkeypatch.setattr(ledger_store, "POSTGRES_SETTINGS", hasty)
    with psycopg.connect(postgres_url) as migrating:
        migrating.execute("SELECT pg_advisory_xact_lock(%s)", [ledger_store._SCHEMA_LOCK])
        opening = asyncio.ensure_future(asyncio.to_thread(SqlLedger.open, postgres_url))
        await waits_for_a_lock(postgres_url, what="pg_advisory_xact_lock")
        done, _ = await asyncio.wait([opening], timeout=0.3)
        assert not done
        migrating.rollback()
    await (await opening).close()


async def test_leases_that_postgresql_measures_are_renewed_whatever_the_servers_own_clock_does(
    postgres_url: str,
) -> None:
    now_ms = rules.now_ms()
    server, other = SqlLedger.open(postgres_url, lease_ms=3000, clock=lambda: now_ms), SqlLedger.open(postgres_url)
    await server.create_account("a", 100)
    await server.hold(wish())
    await renewed(server)
    with pytest.raises(Refusal, match="BATCH_IN_FLIGHT"):
        await other.hold(wish())
    assert (await server.post("a", "b", b"answer")).account.posted == 5
    await other.close()
    await server.close()


async def test_a_nul_in_a_name_fails_its_own_command_alone(postgres_url: str) -> None:
    ledger = SqlLedger.open(postgres_url)
    await ledger.create_account("a", 100)
    await ledger.hold(wish())
    told = await grouped(
        ledger,
        ledger.hold(wish("c", account="\0")),
        ledger.post("a", "b", b"answer"),
        ledger.void("a", "\0"),
        ledger.void("", ""),
        ledger.grant("a", 5),
    )
    assert [type(outcome).__name__ for outcome in told] == [
        "LedgerUnavailable",
        "Posted",
        "LedgerUnavailable",
        "NoneType",
        "Account",
    ]
    assert await settled(ledger) == (5, 0, 100)
    await ledger.close()


async def test_options_in_the_url_are_obeyed_beside_our_own(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA elsewhere")
    url = f"{postgres_url}&options=-csearch_path%3Delsewhere%20-csynchronous_commit%3Doff"
    ledger = SqlLedger.open(url)
    await ledger.create_account("a", 100)
    assert await ledger._write(lambda t: t.connection.exec_driver_sql("SHOW synchronous_commit").scalar()) == "on"
    await ledger.close()
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT count(*) FROM elsewhere.accounts").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM public.accounts").fetchone() == (0,)
    assert (await asyncio.to_thread(audit.verify, url)).accounts == 1


async def test_a_connection_that_postgresql_ends_costs_one_try_and_no_money(postgres_url: str) -> None:
    ledger = SqlLedger.open(postgres_url)
    await ledger.create_account("a", 100)
    await ledger.hold(wish())
    await ledger.void("nobody", "nothing")

    def end_all() -> None:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    def end_mine(transaction: Any) -> None:
        transaction.connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")

    end_all()
    assert (await ledger.post("a", "b", b"answer")).account.posted == 5  # idle connections are found out
    with pytest.raises(LedgerUnavailable) as ended:
        await ledger._write(end_mine)
    assert "\n" not in str(ended.value)
    assert await replayed(ledger, wish()) == b"answer"
    await ledger.close()


# --- books that have grown ---


async def test_no_query_of_the_running_server_reads_the_whole_books(opened: Any) -> None:
    ledger = opened()
    await ledger.create_account("a", 100)
    await ledger.hold(wish())
    statements: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            statements.append((statement, parameters[0] if isinstance(parameters, list) else parameters))

    sa.event.listen(ledger._engine, "before_cursor_execute", note)
    await ledger.hold(wish("c"))
    await ledger.post("a", "b", b"")
    await ledger.void("a", "c")
    await ledger.hold(wish("b"))
    await ledger.statement("a", after_sequence=1)
    await ledger.statement("a", run_id="run")
    await ledger.run_posted("a", "run")
    await ledger.credential("0" * 16)
    await ledger.terms("a")
    await ledger.accounts(after_name="0", limit=10)
    for _ in range(2):
        await ledger.grant("a", 1, grant_id="g")
    assert await ledger.prune_answers(rules.now_ms() + 1000) == 1
    await ledger.hold(wish("b"))  # its answer is gone

    def sweep_and_explain(transaction: Any) -> list[str]:
        ledger._renew(transaction.connection)
        ledger._sweep(transaction.connection)
        ledger._retire(transaction.connection)
        plans = []
        for statement, parameters in list(statements):
            rows = transaction.connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans += [row.detail for row in rows]
        return plans

    plans = await ledger._write(sweep_and_explain)
    assert len(statements) >= 18 and any("holds_under_way" in plan for plan in plans)
    assert any("one_grant_an_id" in plan for plan in plans)
    full = [plan for plan in plans if plan.startswith("SCAN") and "holds_under_way" not in plan]
    assert set(full) <= {"SCAN instances"}  # as many rows as there are servers
