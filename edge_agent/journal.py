"""Outbox and answers: what will be sent is durable before it goes, what was paid for is kept.

A batch is planned at a position (phase, slot). One synced transaction stores position, id, the very bytes to be sent
and the latents they came from; only then is it sent; its answer is added when it comes. On resume the journal wins:
an unanswered row is sent again byte for byte, an answered one is read and never asked again. What travelled in a
batch that was refused, and is not asked about again, is kept, too: the teacher has seen it.
"""

import json
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.failures import DiskProblem, RunFolderProblem
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire

FORMAT = 5

_REFUSED = (
    "CREATE TABLE refused (phase TEXT NOT NULL, batch_id TEXT PRIMARY KEY, picture_count INTEGER NOT NULL, "
    "request BLOB NOT NULL) STRICT;"
)
_SCHEMA = f"""
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE batches (
    phase TEXT NOT NULL,
    slot INTEGER NOT NULL,
    batch_id TEXT NOT NULL UNIQUE,
    picture_count INTEGER NOT NULL CHECK (picture_count > 0),
    request BLOB NOT NULL,
    latents BLOB NOT NULL,
    sent_bytes INTEGER NOT NULL,
    received_bytes INTEGER NOT NULL DEFAULT 0,
    charged_count INTEGER NOT NULL DEFAULT 0,
    answer BLOB,
    receipt_account TEXT,
    receipt_sequence INTEGER,
    receipt_head BLOB,
    sent_pictures INTEGER NOT NULL DEFAULT 0,
    dropped_pictures INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (phase, slot)
) STRICT;
{_REFUSED}
"""

# The format that a journal has -> what makes it the next one, a statement a line.
_UPGRADES = {
    # Format 1 kept no receipts.
    1: """
ALTER TABLE batches ADD COLUMN receipt_account TEXT;
ALTER TABLE batches ADD COLUMN receipt_sequence INTEGER;
ALTER TABLE batches ADD COLUMN receipt_head BLOB;
UPDATE facts SET value = '2' WHERE name = 'format';
""",
    # Format 2 counted the bytes of every sending, but not its pictures; the one follows from the other.
    2: """
ALTER TABLE batches ADD COLUMN sent_pictures INTEGER NOT NULL DEFAULT 0;
UPDATE batches SET sent_pictures = picture_count * max(1, sent_bytes / max(1, length(request)));
UPDATE facts SET value = '3' WHERE name = 'format';
""",
    # Format 3 knew no gate that drops pictures.
    3: """
ALTER TABLE batches ADD COLUMN dropped_pictures INTEGER NOT NULL DEFAULT 0;
UPDATE facts SET value = '4' WHERE name = 'format';
""",
    # Format 4 forgot what it had sent in batches that were refused.
    4: f"""
{_REFUSED}
UPDATE facts SET value = '5' WHERE name = 'format';
""",
}


GONE = b""
"""Kept for an answer that was charged and that its teacher no longer has."""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One row: what is or was sent (``request``: a serialised ``mekd.v1.Batch``), and the answer if it came."""

    slot: int
    batch_id: str
    picture_count: int
    request: bytes
    latents: bytes
    answer: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Where a charge stands in the teacher's books: proof for an auditor. ``head``: of the account's hash chain."""

    account: str
    sequence: int
    head: bytes


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over a phase's rows. Bytes are of messages as they travel, repeats included."""

    planned_pictures: int
    refused_pictures: int
    """Sent in batches that were refused, and not planned again: the teacher has seen them, without a charge."""
    sent_pictures: int
    """Every sending counts, a repeat too, and it counts before it is sent."""
    charged_pictures: int
    """Of answered batches."""
    dropped_pictures: int
    """Made for a batch, and replaced because they came too near to a local picture."""
    sent_bytes: int
    received_bytes: int

    @property
    def shown_pictures(self) -> int:
        """Different ones that the teacher has seen, or will: those of `Journal.requests`."""
        return self.planned_pictures + self.refused_pictures


class Journal:
    """The journal of one run folder; used by one thread of one process at a time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    def open(cls, path: Path, *, to_read: bool = False) -> "Journal":
        """Opens or makes the journal. Raises RunFolderProblem for a file that is none, DiskProblem.

        ``to_read``: it is there, and may be where nothing can be written.
        """
        with _store_problems(path):
            # What is still in a write-ahead log would be overlooked, and whoever writes it.
            is_final = (
                to_read and not os.access(path.parent, os.W_OK) and not _size(path.with_name(f"{path.name}-wal"))
            )
            if not to_read:  # pictures that were sent are nobody else's to read
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            name = path.absolute().as_uri() + ("?immutable=1" if is_final else "")
            connection = sqlite3.connect(name, uri=True, isolation_level=None, timeout=5.0)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk before it returns
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables:
                connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            elif not tables >= {"facts", "batches"}:
                raise RunFolderProblem(f"{path}: expected a journal, got another program's database")
            journal = cls(connection)
            journal._path = path
            if journal.fact("format") is None:
                journal.set_facts(format=FORMAT, run_id=uuid.uuid4().hex)
            while journal.fact("format") in _UPGRADES and not is_final:
                journal._upgrade(journal.fact("format"))
        if journal.fact("format") != FORMAT:
            raise RunFolderProblem(
                f"{path}: expected a journal of format {FORMAT}, got {journal.fact('format')}; give another --run-dir"
                + (", or a copy that can be written" if is_final else "")
            )
        return journal

    _path: Path

    @property
    def run_id(self) -> str:
        """The id under which every batch of this folder is booked."""
        return str(self.fact("run_id"))

    def fact(self, name: str) -> Any:
        """A remembered value; None where there is none."""
        with _store_problems(self._path):
            row = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def set_facts(self, **facts: Any) -> None:
        """Remembers values, durable on return."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT INTO facts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                [(name, json.dumps(value)) for name, value in facts.items()],
            )

    def plan(self, phase: str, batch: Batch, *, sent_bytes: int | None = None, dropped_pictures: int = 0) -> None:
        """Makes a batch, and that it is sent, durable before it is sent. The position must be free.

        ``sent_bytes``: its size as it travels, where that is not ``request``. ``dropped_pictures``: see Totals.
        """
        bytes_now = len(batch.request) if sent_bytes is None else sent_bytes
        with self._transaction() as connection:
            self._insert(connection, phase, batch, bytes_now, batch.picture_count, dropped_pictures)

    def replan(self, phase: str, refused_id: str, batch: Batch, *, rest: Batch | None) -> None:
        """Puts another batch in the place of one that the teacher refused (and so never charged).

        ``rest``: the refused pictures that the other does not have, None where it has all.
        """
        with self._transaction() as connection:
            # What the refused one cost on the wire stays counted; the new one counts when it is sent.
            gone = connection.execute(
                "DELETE FROM batches WHERE batch_id = ? AND answer IS NULL "
                "RETURNING sent_bytes, sent_pictures, dropped_pictures",
                (refused_id,),
            ).fetchone()
            self._insert(connection, phase, batch, *(gone or (0, 0, 0)))
            if rest is not None:
                values = (phase, refused_id, rest.picture_count, rest.request)
                connection.execute("INSERT INTO refused VALUES (?, ?, ?, ?)", values)

    def count_repeat(self, batch_id: str, *, sent_bytes: int | None = None) -> None:
        """Adds one more sending to a row's pictures and bytes, durable before it is sent; ``sent_bytes`` as above."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE batches SET sent_bytes = sent_bytes + coalesce(?, length(request)), "
                "sent_pictures = sent_pictures + picture_count WHERE batch_id = ?",
                (sent_bytes, batch_id),
            )

    def keep_answer(
        self, batch_id: str, *, answer: bytes, charged_count: int, received_bytes: int, receipt: Receipt | None = None
    ) -> None:
        """Keeps what was paid for, durable on return. A second answer to the same batch changes nothing."""
        proof = (receipt.account, receipt.sequence, receipt.head) if receipt is not None else (None, None, None)
        with self._transaction() as connection:
            connection.execute(
                "UPDATE batches SET answer = ?, charged_count = ?, received_bytes = received_bytes + ?, "
                "receipt_account = ?, receipt_sequence = ?, receipt_head = ? WHERE batch_id = ? AND answer IS NULL",
                (answer, charged_count, received_bytes, *proof, batch_id),
            )

    def unanswered(self, phase: str) -> list[Batch]:
        """What was planned and, as far as this side knows, not answered; by slot."""
        return list(self._select("phase = ? AND answer IS NULL", phase))

    def answered(self, phase: str) -> Iterator[Batch]:
        """What was answered, by slot."""
        return self._select("phase = ? AND answer IS NOT NULL", phase)

    def bought(self) -> dict[str, int]:
        """Kind of answer -> pictures answered so, by phase and slot: more than one where the policy changed."""
        found: dict[str, int] = {}
        with _store_problems(self._path):
            for picture_count, answer in self._connection.execute(
                "SELECT picture_count, answer FROM batches WHERE answer IS NOT NULL ORDER BY phase, slot"
            ):
                kind = "gone" if answer == GONE else codec.kind_of(wire.Answer.FromString(answer))
                found[kind] = found.get(kind, 0) + picture_count
        return found

    def answered_slot(self, phase: str, slot: int) -> Batch | None:
        """What was answered at one slot; None where nothing was."""
        return next(self._select("phase = ? AND answer IS NOT NULL AND slot = ?", phase, slot), None)

    def slots(self, phase: str) -> int:
        """The first slot never planned."""
        return int(self._one("SELECT coalesce(max(slot) + 1, 0) FROM batches WHERE phase = ?", phase)[0])

    def totals(self, phase: str | None = None) -> Totals:
        """Sums over one phase, or over all."""
        planned, sent_pictures, charged, sent_bytes, received_bytes, dropped = self._one(
            "SELECT coalesce(sum(picture_count), 0), coalesce(sum(sent_pictures), 0), "
            "coalesce(sum(charged_count), 0), coalesce(sum(sent_bytes), 0), coalesce(sum(received_bytes), 0), "
            "coalesce(sum(dropped_pictures), 0) FROM batches WHERE ?1 IS NULL OR phase = ?1",
            phase,
        )
        (refused,) = self._one(
            "SELECT coalesce(sum(picture_count), 0) FROM refused WHERE ?1 IS NULL OR phase = ?1", phase
        )
        return Totals(
            planned_pictures=planned,
            refused_pictures=refused,
            sent_pictures=sent_pictures,
            charged_pictures=charged,
            sent_bytes=sent_bytes,
            received_bytes=received_bytes,
            dropped_pictures=dropped,
        )

    def charges(self) -> dict[str, int]:
        """Batch id -> pictures charged, for every answered batch."""
        with _store_problems(self._path):
            return dict(
                self._connection.execute("SELECT batch_id, charged_count FROM batches WHERE answer IS NOT NULL")
            )

    def receipts(self) -> Iterator[tuple[str, Receipt]]:
        """Batch id and receipt of every answer that came with one, by their order in the teacher's books."""
        with _store_problems(self._path):
            for batch_id, account, sequence, head in self._connection.execute(
                "SELECT batch_id, receipt_account, receipt_sequence, receipt_head FROM batches "
                "WHERE receipt_head IS NOT NULL ORDER BY receipt_account, receipt_sequence"
            ):
                yield batch_id, Receipt(account=account, sequence=sequence, head=head)

    def sent_ids(self) -> set[str]:
        """Ids of all that was ever planned to be sent."""
        with _store_problems(self._path):
            rows = self._connection.execute("SELECT batch_id FROM batches UNION SELECT batch_id FROM refused")
            return {row[0] for row in rows}

    def open_ids(self) -> set[str]:
        """Ids planned and not answered."""
        with _store_problems(self._path):
            return {row[0] for row in self._connection.execute("SELECT batch_id FROM batches WHERE answer IS NULL")}

    def requests(self) -> Iterator[bytes]:
        """Serialised batches of all that was ever planned to be sent, each picture once."""
        with _store_problems(self._path):
            for statement in (
                "SELECT request FROM batches ORDER BY phase, slot",
                "SELECT request FROM refused ORDER BY rowid",
            ):
                for row in self._connection.execute(statement):
                    yield row[0]

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def _upgrade(self, before: int) -> None:
        with self._transaction() as connection:
            if self.fact("format") == before:  # and not upgraded by another program meanwhile
                for statement in _UPGRADES[before].strip().split("\n"):
                    connection.execute(statement)

    def _insert(
        self,
        connection: sqlite3.Connection,
        phase: str,
        batch: Batch,
        sent_bytes: int,
        sent_pictures: int,
        dropped_pictures: int,
    ) -> None:
        connection.execute(
            "INSERT INTO batches (phase, slot, batch_id, picture_count, request, latents, sent_bytes, sent_pictures, "
            "dropped_pictures) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                phase,
                batch.slot,
                batch.batch_id,
                batch.picture_count,
                batch.request,
                batch.latents,
                sent_bytes,
                sent_pictures,
                dropped_pictures,
            ),
        )

    def _select(self, where: str, *values: str | int) -> Iterator[Batch]:
        with _store_problems(self._path):
            for slot, batch_id, count, request, latents, answer in self._connection.execute(
                "SELECT slot, batch_id, picture_count, request, latents, answer FROM batches "
                f"WHERE {where} ORDER BY slot",
                values,
            ):
                yield Batch(
                    slot=slot,
                    batch_id=batch_id,
                    picture_count=count,
                    request=request,
                    latents=latents,
                    answer=answer,
                )

    def _one(self, query: str, *values: object) -> tuple[Any, ...]:
        with _store_problems(self._path):
            row: tuple[Any, ...] = self._connection.execute(query, values).fetchone()
            return row

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _store_problems(self._path):
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise


@contextmanager
def _store_problems(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError:
        raise  # a mistake of ours, not of the disk
    except sqlite3.OperationalError as error:
        raise DiskProblem(
            f"cannot keep the journal {path}: {error}; {_remedies(error)} and start the same command again"
        ) from error
    except sqlite3.DatabaseError as error:
        raise RunFolderProblem(f"{path}: expected a journal, got a file that is none ({error})") from error


def _remedies(error: sqlite3.OperationalError) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without what SQLite adds to some of them
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "wait for the program that holds it"
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return "give this user write access"
    return "make room"
