"""Bad input, a lot of it: ``python -m benchmarks.fuzz --messages 100000 [--seed N]``

Sessions drawn by hypothesis (``fuzz_sessions``) are played against a real ``teacher-serve`` with durable books: both
protocols, the books' own methods, bytes that are no message at all, and connections that speak no gRPC. All the time
one good client asks and must be answered correctly. Afterwards:

- every call ended with a status of the table of refusals (``protos.errors``), or one of the few that gRPC itself
  gives (``FROM_GRPC``); never UNKNOWN, never INTERNAL;
- the server has not crashed, nothing waits in its queue, no call is open and nothing is held;
- the books' posts are what clients were told, or batches that somebody sent and never heard about; the auditor,
  given every receipt, finds nothing;
- memory and open descriptors have not grown beyond ``MOST_GROWTH`` and ``MOST_DESCRIPTORS``, the least of the last
  quarter against the least of the second;
- the log has no traceback, no error, no key and no pixels.

Prints a JSON line and appends it to benchmarks/results/fuzz.jsonl; exit status 1 where one of them fails. The same
seed draws the same sessions, round by round; how they interleave is up to the machine.
"""

import asyncio
import base64
import collections
import contextlib
import itertools
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import grpc
import hypothesis
import numpy as np
from google.protobuf.message import DecodeError
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from tritonclient.grpc import service_pb2 as oip

from benchmarks import fuzz_sessions, record
from benchmarks.fuzz_sessions import (
    HOLD,
    INFER,
    METHODS,
    MODEL_INFER,
    MODEL_STREAM_INFER,
    POST,
    Cast,
    Sent,
    Session,
    batch_in,
)
from benchmarks.services import ServiceError, command
from protos import codec
from protos.errors import TABLE, Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as books_wire
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import audit, auth
from teacher_service.engine import ArrayEngine
from teacher_service.ledger import OPERATORS, Role
from teacher_service.ledger_sql import SqlLedger
from teacher_service.terms import Terms

CLASSES = 4
SHAPE_CHW = (fuzz_sessions.CHANNELS, fuzz_sessions.HEIGHT, fuzz_sessions.WIDTH)
MODEL = f"array:{CLASSES},{','.join(map(str, SHAPE_CHW))}"
FLAGS = (
    *("--max-batch-pictures", str(fuzz_sessions.MOST_PICTURES), "--max-queue-pictures", "128"),
    *("--lease-seconds", "1", "--grace-seconds", "5"),
)
GOOD_ACCOUNT = "good"

SESSIONS_AT_ONCE = 12
ROUND_MESSAGES = 2500
LEFT_OPEN = 40  # calls, and as many connections; then the oldest goes
STUCK_SECONDS = 20.0
SETTLE_SECONDS = 30.0
START_SECONDS = 60.0
BOMBS = (
    bytes(66 * 2**20),  # more than a message may have
    b"\x32\x00" * 2**23,  # empty parts: of a ModelInferRequest, outputs
)
MOST_FINDINGS = 40
MOST_GROWTH = 0.05
MOST_GROWTH_COLD = 0.25  # of a short run, which is warm-up to its end
WARM_ROUNDS = 16
MOST_DESCRIPTORS = 16

# Codes that gRPC itself gives, before or around any code of ours: what its text must begin with.
FROM_GRPC = {
    grpc.StatusCode.UNIMPLEMENTED: ("Method not found", "Unknown"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        "SERVER: ",
        "Received message larger",
        "Decompressed message larger",
        "received metadata size",
    ),
    grpc.StatusCode.NOT_FOUND: ("no service of this name",),  # grpc.health.v1
}
NOT_OURS = (
    Reason.UNKNOWN,
    Reason.ENGINE_FAILED,
    Reason.LEDGER_UNAVAILABLE,
)  # in the table, and never the answer to bad input


class Findings:
    """What is wrong, each kind with how often and its first example."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}
        self._lock = threading.Lock()

    def add(self, kind: str, example: object = "") -> None:
        """One more of a kind."""
        with self._lock:
            times, first = self._found.get(kind, (0, str(example)[:3000]))
            self._found[kind] = (times + 1, first)

    def lines(self) -> list[str]:
        """All of them."""
        return [f"{kind} ({times} times): {first}" for kind, (times, first) in sorted(self._found.items())]

    def __len__(self) -> int:
        return len(self._found)


# --- the server's side -------------------------------------------------------------------------------


class Server:
    """A ``teacher-serve`` of our own."""

    def __init__(self, folder: Path) -> None:
        self.ledger = f"sqlite:///{folder}/ledger.db"
        self.log = folder / "server.log"
        self.keys = asyncio.run(self._accounts())
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(command("teacher-serve"), "--model", MODEL, "--ledger", self.ledger, *FLAGS),
                    *("--listen", "127.0.0.1:0", "--metrics-port", "0"),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_SECONDS)
        line = self.process.stdout.readline().decode() if ready else ""
        if not line.startswith("serving on "):
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            self.kill()
            raise ServiceError(f"teacher-serve did not start: {' '.join(last)}")
        self.address = line.removeprefix("serving on ").strip()
        found = re.search(r'"metrics_port": (\d+)', self.log.read_text(errors="replace"))
        self.metrics_url = f"http://127.0.0.1:{found[1] if found else 0}/metrics"

    async def _accounts(self) -> dict[str, str]:
        ledger, keys = SqlLedger.open(self.ledger), {}
        terms = {
            "limited": Terms(top_k=2, decimals=2, pictures_per_second=30, max_streams=3, max_outstanding_pictures=40),
            "hard": Terms(answers="hard"),
        }
        for name in (*fuzz_sessions.CUSTOMERS, fuzz_sessions.REMOTE_ACCOUNT, GOOD_ACCOUNT):
            keys[name], stored = auth.new_key(name)
            budget = 200 if name == fuzz_sessions.POOR_ACCOUNT else 10**9
            await ledger.create_account(name, budget, stored, terms.get(name, Terms()))
        await ledger.create_account(OPERATORS, None)
        for role in (Role.TEACHER, Role.ADMIN):
            keys[role.value], stored = auth.new_key(OPERATORS, role)
            await ledger.add_key(stored)
        await ledger.close()
        return keys

    def alive(self) -> bool:
        """Whether it is still the process that was started."""
        return self.process.poll() is None

    def resident_mib(self, what: str = "VmRSS") -> float:
        """Memory now, or with "VmHWM" the most there ever was."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(what + ":"):
                return int(line.split()[1]) / 1024
        return 0.0

    def descriptors(self) -> int:
        """Files and sockets open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def metrics(self) -> dict[str, float]:
        """Every sample, by its name and labels."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        rows = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def unsettled(self) -> str:
        """What is still under way; empty where nothing is."""
        found = self.metrics()
        waiting = found["mekd_queue_pictures"]
        started, handled = (
            sum(value for name, value in found.items() if name.startswith(f"grpc_server_{what}_total"))
            for what in ("started", "handled")
        )
        held = sum(row[0] for row in _rows(self.ledger, "SELECT held FROM accounts"))
        if waiting or started != handled or held:
            return f"{waiting:.0f} pictures queued, {held} held, {started:.0f} calls begun and {handled:.0f} ended"
        return ""

    def stop(self) -> int | None:
        """SIGTERM; the exit status, None where it did not end."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(SETTLE_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """The end, whatever it is doing."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _rows(ledger: str, query: str) -> list[Any]:
    with audit.Store(ledger) as store:
        return list(store.rows(query))


# --- what was sent, and what was told ----------------------------------------------------------------


class Told:
    """Every batch that may have been charged, every charge that was told, and whether the answers were right."""

    def __init__(self, findings: Findings) -> None:
        self.receipts: list[audit.Receipt] = []
        self._findings = findings
        self._engine = ArrayEngine(class_count=CLASSES)
        # By account and batch id: the pictures sent under it, by their digests; the answer and the count charged.
        self._sent: dict[tuple[str, str], dict[bytes, bytes]] = collections.defaultdict(dict)
        self._charged: dict[tuple[str, str], tuple[int, bytes]] = {}
        self._unnamed: Counter[str] = Counter()  # by account: batches whose ids the server made
        self._held: dict[tuple[str, str], int] = {}  # by teachers elsewhere: the most pictures of a hold
        self.answers = 0

    def sending(self, session: Session, message: bytes, model_name: str) -> None:
        """Before a message is sent."""
        sent = batch_in(session.path, message, model_name)
        if sent is not None and session.account:
            self.batch(session.account, sent)
        if session.path == HOLD and session.account == Role.TEACHER.value:
            with contextlib.suppress(DecodeError):
                hold = books_wire.HoldRequest.FromString(message)
                key = (hold.account, hold.batch_id)
                self._held[key] = max(self._held.get(key, 0), hold.picture_count)

    def batch(self, account: str, sent: Sent) -> None:
        """A batch that may be charged from now on."""
        if sent.batch_id:
            digest = codec.pixel_digest(_images(sent.pixels))
            self._sent[account, sent.batch_id][digest] = sent.pixels
        else:
            self._unnamed[account] += 1

    def result(self, account: str, result: wire.BatchResult, session: object) -> None:
        """An answer of our own protocol."""
        answer = result.answer
        pixels = self._sent[account, result.batch_id].get(answer.pixel_digest)
        if pixels is None:
            return self._findings.add("an answer about pictures that were not sent", session)
        count = len(pixels) // fuzz_sessions.PICTURE_BYTES
        if answer.WhichOneof("outcome") == "probabilities":
            self._compare(pixels, answer.probabilities.values, session)
        else:
            codec.decode_answer(answer, picture_count=count, class_count=CLASSES)
        receipt = result.receipt
        self._charge(account, result.batch_id, answer.charged_count, count, answer.SerializeToString(), session)
        self.receipts.append(audit.Receipt(receipt.account, result.batch_id, receipt.sequence, receipt.head))

    def model_result(self, account: str, response: oip.ModelInferResponse, session: object) -> None:
        """An answer of the Open Inference Protocol."""
        told, raw = response.parameters, response.raw_output_contents[0]
        batch_id, charged = told["idempotency_key"].string_param, told["charged"].int64_param
        name, sequence, head = told["receipt"].string_param.split(":")
        self.receipts.append(audit.Receipt(name, batch_id, int(sequence), bytes.fromhex(head)))
        count = response.outputs[0].shape[0]
        self._charge(account, batch_id, charged, count, b"", session)
        sent = self._sent.get((account, batch_id))
        if sent is None:
            if not self._unnamed[account]:
                self._findings.add("an answer under an id that nobody sent", session)
        elif response.outputs[0].name == "probabilities" and account not in ("limited",):
            same = [pixels for pixels in sent.values() if len(pixels) == count * fuzz_sessions.PICTURE_BYTES]
            if not any(self._is_answer(pixels, raw) for pixels in same):
                self._findings.add("a wrong answer", session)

    def _compare(self, pixels: bytes, values: bytes, session: object) -> None:
        if not self._is_answer(pixels, values):
            self._findings.add("a wrong answer", session)

    def _is_answer(self, pixels: bytes, values: bytes) -> bool:
        expected = self._engine.answer(_images(pixels))
        got = np.frombuffer(values, dtype="<f4")
        return got.size == expected.size and np.allclose(expected.ravel(), got, atol=1e-6)

    def _charge(self, account: str, batch_id: str, charged: int, count: int, answer: bytes, session: object) -> None:
        self.answers += 1
        before = self._charged.setdefault((account, batch_id), (charged, answer))
        if charged != count or before[0] != charged:
            self._findings.add("a batch charged for another number of pictures", session)
        if answer and before[1] and before[1] != answer:
            self._findings.add("two answers under one id", session)
        elif answer and not before[1]:
            self._charged[account, batch_id] = (charged, answer)

    def posted(self, request: books_wire.PostRequest, posted: books_wire.PostedBatch) -> None:
        """A charge by a teacher elsewhere."""
        self.receipts.append(audit.Receipt(request.account, request.batch_id, posted.sequence, posted.head))

    def compare(self, ledger: str) -> None:
        """With the books, at rest."""
        posts = _rows(ledger, "SELECT account, batch_id, picture_count FROM entries WHERE kind = 'post'")
        posted = {(account, batch_id): count for account, batch_id, count in posts}
        if len(posted) != len(posts):
            self._findings.add("a batch posted twice")
        unnamed: Counter[str] = Counter()
        for key, count in posted.items():
            told, sent = self._charged.get(key), self._sent.get(key, {})
            if told is not None and told[0] != count:
                self._findings.add("the books have another charge than was told", f"{key}: {count}, told {told[0]}")
            sizes = [len(pixels) // fuzz_sessions.PICTURE_BYTES for pixels in sent.values()]
            if key in self._held or sent:  # or both: a teacher elsewhere may have tried the same id
                right = count in sizes or 1 <= count <= self._held.get(key, 0)
            else:
                unnamed[key[0]] += 1
                right = unnamed[key[0]] <= self._unnamed[key[0]] and count <= fuzz_sessions.MOST_PICTURES
            if not right:
                self._findings.add("a charge that nobody asked for", f"{key}: {count}")
        for key in self._charged.keys() - posted.keys():
            self._findings.add("a charge was told that is not on the books", key)
        accounts = {name: count for name, count in _rows(ledger, "SELECT name, posted FROM accounts")}
        for name, count in accounts.items():
            if count != sum(posted[key] for key in posted if key[0] == name):
                self._findings.add("an account's posted pictures are not the sum of its posts", name)
        report = audit.verify(ledger, self.receipts)
        for line in report.findings:
            self._findings.add("the auditor", line)


def _images(pixels: bytes) -> codec.UInt8Array:
    return np.frombuffer(pixels, dtype=np.uint8).reshape(-1, *SHAPE_CHW)


# --- the client's side -------------------------------------------------------------------------------


class Player:
    """Plays sessions, several at once, in an event loop of its own; and the good client beside them."""

    def __init__(self, address: str, cast: Cast, findings: Findings, told: Told) -> None:
        self.cast = cast
        self.seen: Counter[tuple[str, str]] = Counter()
        self.messages = 0
        self.sessions = 0
        self.frames = 0
        self.good_seconds: list[float] = []
        self.good_retries = 0
        self._address = address
        self._findings = findings
        self._told = told
        self._open_calls: deque[Any] = deque()
        self._open_sockets: deque[asyncio.StreamWriter] = deque()
        self._channels: list[grpc.aio.Channel] = []
        self._slots = threading.BoundedSemaphore(SESSIONS_AT_ONCE)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="player", daemon=True)
        self._thread.start()
        self._good: Future[None] | None = None
        self._stop_good = threading.Event()

    # --- from the thread that draws ---

    def begin(self) -> None:
        """Connects, and lets the good client ask."""
        asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result(START_SECONDS)
        self._good = asyncio.run_coroutine_threadsafe(self._ask_for_ever(), self._loop)

    def play(self, session: Session) -> None:
        """Starts a session as soon as there is a place for it."""
        if not self._slots.acquire(timeout=2 * STUCK_SECONDS):
            raise ServiceError("no session has ended for a long time")
        playing = asyncio.run_coroutine_threadsafe(self._play(session), self._loop)
        playing.add_done_callback(lambda _: self._slots.release())

    def rest(self) -> None:
        """Waits for every session."""
        for _ in range(SESSIONS_AT_ONCE):
            if not self._slots.acquire(timeout=2 * STUCK_SECONDS):
                raise ServiceError("a session does not end")
        for _ in range(SESSIONS_AT_ONCE):
            self._slots.release()

    def bomb(self) -> None:
        """Messages that are larger than any may be, as they are and compressed to almost nothing."""
        asyncio.run_coroutine_threadsafe(self._bomb(), self._loop).result(10 * STUCK_SECONDS)

    def end(self) -> None:
        """Ends whatever was left open, the good client and the loop."""
        self._stop_good.set()
        if self._good is not None:
            self._good.result(2 * STUCK_SECONDS)
        asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result(START_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- in the loop ---

    async def _connect(self) -> None:
        # A pool of its own: else all channels to one address share one connection.
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(self._address, options=options) for _ in range(5)]

    async def _disconnect(self) -> None:
        for call in self._open_calls:
            call.cancel()
        for writer in self._open_sockets:
            writer.transport.abort()
        for channel in self._channels:
            await channel.close()
        await asyncio.sleep(0.1)  # for what the transports still have to say

    async def _play(self, session: Session) -> None:
        self.sessions += 1
        try:
            async with asyncio.timeout(STUCK_SECONDS + 10):
                if session.group == "sockets":
                    await self._play_socket(session)
                elif session.path in METHODS and METHODS[session.path].response_streams:
                    await self._play_stream(session)
                else:
                    await self._play_unary(session)
        except TimeoutError:
            self._findings.add(f"{session.path or session.group}: stuck", session)
        except Exception:
            self._findings.add(
                f"{session.path or session.group}: the client failed", f"{session}\n{traceback.format_exc()}"
            )

    def _settings(self, session: Session) -> dict[str, Any]:
        return {
            "metadata": session.metadata,
            "timeout": session.seconds if session.ending == "deadline" else STUCK_SECONDS,
            "compression": grpc.Compression.Gzip if session.compressed else None,
        }

    async def _play_unary(self, session: Session) -> None:
        (message,) = session.messages
        self._sending(session, message)
        method: Any = self._any_channel().unary_unary(session.path)
        call = method(message, **self._settings(session))
        if session.ending == "cancel":
            await asyncio.sleep(session.seconds)
            call.cancel()
        code = await call.code()
        if code is grpc.StatusCode.OK:
            self._answered(session, await call)
        await self._check(session, call)

    async def _play_stream(self, session: Session) -> None:
        method, left = METHODS[session.path], session.ending in ("open", "silent")
        channel: Any = self._channels[0] if left else self._any_channel()  # what nobody reads must not block others
        if method.request_streams:
            call = channel.stream_stream(session.path)(
                **self._settings(session) | ({"timeout": None} if left else {})
            )
            writing = asyncio.create_task(self._write(session, call))
        else:
            self._sending(session, session.messages[0])
            call = channel.unary_stream(session.path)(session.messages[0], **self._settings(session))
            writing = asyncio.create_task(asyncio.sleep(0))
        reading = None
        if session.ending != "silent":
            most = session.answers_read if session.ending in ("open", "cancel") else None
            reading = asyncio.create_task(self._read(session, call, most))
        for task in (writing, reading):
            if task is not None:  # how the call ended is asked of the call
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
        if session.ending == "read" or session.ending == "deadline":
            assert reading is not None
            await asyncio.gather(writing, reading, return_exceptions=True)
        else:
            await asyncio.wait([task for task in (writing, reading) if task], timeout=0.01 + session.seconds)
            if left:
                self._open_calls.append(call)
                call = self._open_calls.popleft() if len(self._open_calls) > LEFT_OPEN else None
            if call is not None:
                call.cancel()
        for task in (writing, reading):
            if task is not None and not left:
                task.cancel()
        if left:
            self._count(session, "left open")
        else:
            await self._check(session, call)

    async def _write(self, session: Session, call: Any) -> None:
        # Not by call.write(): where the server has ended the call meanwhile, that replaces its status by INTERNAL.
        await call.wait_for_connection()
        for message in session.messages:
            self._sending(session, message)
            await call._cython_call.send_serialized_message(message)
        if session.ending in ("read", "deadline"):
            await call._cython_call.send_receive_close()

    async def _read(self, session: Session, call: Any, most: int | None) -> None:
        for _ in itertools.count() if most is None else range(most):
            response = await call.read()
            if response is grpc.aio.EOF:
                return
            self._answered(session, response)

    async def _play_socket(self, session: Session) -> None:
        host, _, port = self._address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1 + session.seconds):
                for chunk in session.messages:
                    if writer.transport.is_closing():
                        break
                    self.frames += 1
                    writer.write(chunk)
                await writer.drain()
                if session.seconds:
                    async with asyncio.timeout(session.seconds):
                        while await reader.read(65536):
                            pass
        if session.ending == "open":
            self._open_sockets.append(writer)
            if len(self._open_sockets) <= LEFT_OPEN:
                return
            writer = self._open_sockets.popleft()
        elif session.ending == "reset":
            with contextlib.suppress(OSError):  # the server was faster
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def _bomb(self) -> None:
        metadata = (("authorization", f"Bearer {self.cast.keys['rich']}"),)
        paths = [INFER] + [MODEL_INFER] * (MODEL_INFER in self.cast.paths) + ["/mekd.v1.QuotaLedger/GetBalance"]
        for path, bomb in itertools.product(paths, BOMBS):
            for compressed in (True, False):
                session = Session(
                    group="raw",
                    path=path,
                    account="rich",
                    metadata=metadata,
                    messages=(bomb,),
                    compressed=compressed,
                )
                await self._play(session)

    def _any_channel(self) -> grpc.aio.Channel:
        return self._channels[1 + self.sessions % (len(self._channels) - 2)]

    def _sending(self, session: Session, message: bytes) -> None:
        self.messages += 1
        self._told.sending(session, message, self.cast.model_name)

    # --- whether what came back is right ---

    def _answered(self, session: Session, response: bytes) -> None:
        """One message of the server's."""
        found: Any = METHODS[session.path].response.FromString(response)
        if session.path == INFER and found.WhichOneof("payload") == "result":
            self._told.result(session.account, found.result, session)
            self._count(session, "answered")
        elif session.path == INFER and found.WhichOneof("payload") == "refusal":
            self._count(session, f"refused {self._judged(session, found.refusal.status)}")
        elif session.path == POST:
            self._told.posted(books_wire.PostRequest.FromString(session.messages[0]), found.posted)
        elif session.path == MODEL_INFER:
            self._told.model_result(session.account, found, session)
        elif session.path == MODEL_STREAM_INFER and found.error_message:
            told = re.match(r"\[([A-Z_]+)\]\[request id: .*?\] ([A-Z_]+): ", found.error_message, re.DOTALL)
            reason = next((reason for reason in Reason if told and reason.name == told[2]), None)
            if told is None or reason is None or reason in NOT_OURS:
                self._findings.add("an error message of another form", f"{found.error_message}: {session}")
            self._count(session, f"refused {told[1]} {told[2]}" if told else "refused")
        elif session.path == MODEL_STREAM_INFER:
            self._told.model_result(session.account, found.infer_response, session)
            self._count(session, "answered")

    async def _check(self, session: Session, call: Any) -> None:
        """How a call ended."""
        code: Any = await call.code()
        text = await call.details() or ""
        cut = {"cancel": grpc.StatusCode.CANCELLED, "deadline": grpc.StatusCode.DEADLINE_EXCEEDED}.get(session.ending)
        if code in (grpc.StatusCode.OK, cut):
            return self._count(session, code.name)
        trailing = dict(await call.trailing_metadata() or ())
        rich = trailing.get("grpc-status-details-bin")
        if rich is not None:
            status = Status.FromString(rich)
            self._count(session, self._judged(session, status))
            if (status.code, status.message) != (code.value[0], text):
                self._findings.add(f"{session.path}: two statuses", f"{code.name} {text}, {status}: {session}")
            return
        self._count(session, f"{code.name} by gRPC")
        if not text.startswith(FROM_GRPC.get(code, ())) or code not in FROM_GRPC:
            self._findings.add(f"{session.path}: {code.name}", f"{text}: {session}")

    def _judged(self, session: Session, status: Status) -> str:
        refusal = Refusal.from_status(status)
        if (
            refusal.reason in NOT_OURS
            or TABLE[refusal.reason].code != status.code
            or refusal.message != status.message
        ):
            self._findings.add(f"{session.path}: {refusal.reason.name}", f"{status}: {session}")
        return f"{Code.Name(status.code)} {refusal.reason.name}"

    def _count(self, session: Session, what: str) -> None:
        self.seen[session.group, what] += 1

    # --- the good client ---

    async def _ask_for_ever(self) -> None:
        rng = np.random.default_rng(0)
        key = self.cast.keys[GOOD_ACCOUNT]
        while not self._stop_good.is_set():
            count = int(rng.integers(1, fuzz_sessions.MOST_PICTURES + 1))
            images_NCHW = rng.integers(0, 256, (count, *SHAPE_CHW), dtype=np.uint8)
            batch = wire.Batch(batch_id=uuid.uuid4().hex, images=codec.encode_images(images_NCHW))
            self._told.batch(GOOD_ACCOUNT, Sent(batch.batch_id, batch.images.payload, count))
            began = time.perf_counter()
            try:
                async with asyncio.timeout(STUCK_SECONDS):
                    if MODEL_INFER in self.cast.paths and rng.integers(2):
                        await self._ask_kserve(key, batch)
                    else:
                        await self._ask_mekd(key, batch)
            except (TimeoutError, grpc.aio.AioRpcError, Refusal) as error:
                self._findings.add("the good client was not answered", repr(error))
            self.good_seconds.append(time.perf_counter() - began)
            await asyncio.sleep(0.02)

    async def _ask_mekd(self, key: str, batch: wire.Batch) -> None:
        call: Any = self._channels[-1].stream_stream(INFER)(metadata=(("authorization", f"Bearer {key}"),))
        try:
            await call.write(wire.InferRequest(config=wire.StreamConfig(run_id="good")).SerializeToString())
            await call.read()
            while True:
                await call.write(wire.InferRequest(batch=batch).SerializeToString())
                response = wire.InferResponse.FromString(await call.read())
                if response.WhichOneof("payload") == "result":
                    return self._told.result(GOOD_ACCOUNT, response.result, "the good client")
                await self._wait_as_told(Refusal.from_status(response.refusal.status))
        finally:
            call.cancel()

    async def _ask_kserve(self, key: str, batch: wire.Batch) -> None:
        images = batch.images
        request = oip.ModelInferRequest(model_name=self.cast.model_name, raw_input_contents=[images.payload])
        request.parameters["idempotency_key"].string_param = batch.batch_id
        request.inputs.add(name="images", datatype="UINT8", shape=(images.picture_count, *SHAPE_CHW))
        infer: Any = self._channels[-1].unary_unary(MODEL_INFER)
        while True:
            try:
                answer = await infer(request.SerializeToString(), metadata=(("authorization", f"Bearer {key}"),))
            except grpc.aio.AioRpcError as error:
                rich = dict(error.trailing_metadata()).get("grpc-status-details-bin")
                if rich is None:
                    raise
                await self._wait_as_told(Refusal.from_status(Status.FromString(rich)))
            else:
                found = oip.ModelInferResponse.FromString(answer)
                return self._told.model_result(GOOD_ACCOUNT, found, "the good client")

    async def _wait_as_told(self, refusal: Refusal) -> None:
        if refusal.retry_seconds is None:
            raise refusal
        self.good_retries += 1
        await asyncio.sleep(refusal.retry_seconds)


# --- a run -------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a run found, and what it saw."""

    findings: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def run(messages: int, seed: int) -> Result:
    """Plays sessions until so many messages were sent, and looks at what is left."""
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="mekd-fuzz-") as name, _home(Path(name) / "hypothesis"):
        server = Server(Path(name))
        try:
            result = _run(server, messages, seed, findings)
        finally:
            server.kill()
        for line in leaks(server.log.read_bytes(), list(server.keys.values())):
            findings.add("the log", line)
        result.numbers["log_lines"] = len(server.log.read_bytes().splitlines())
    result.findings = findings.lines()
    return result


def _run(server: Server, messages: int, seed: int, findings: Findings) -> Result:
    told = Told(findings)
    player = Player(server.address, Cast(keys=server.keys, paths=_served(server)), findings, told)
    resident: list[float] = []
    descriptors: list[float] = []
    peak = 0.0
    try:
        player.begin()
        round_messages = min(ROUND_MESSAGES, max(200, messages // 8))
        for n in itertools.count():
            if player.messages >= messages or len(findings) > MOST_FINDINGS or not server.alive():
                break
            if n == 0:
                player.bomb()
            draw(player.cast, seed, n, min(round_messages, messages - player.messages), player.play)
            player.rest()
            if server.alive():
                resident.append(server.resident_mib())
                descriptors.append(server.descriptors())
        player.bomb()  # after the last sample: what it took is given back when the allocator likes
    finally:
        player.end()
    if not server.alive():
        findings.add("the server has crashed", f"exit status {server.process.returncode}")
    else:
        until = time.monotonic() + SETTLE_SECONDS
        while (unsettled := server.unsettled()) and time.monotonic() < until:
            time.sleep(0.2)
        if unsettled:
            findings.add("not at rest", unsettled)
        peak = server.resident_mib("VmHWM")
        if (status := server.stop()) != 0:
            findings.add("the server did not end well", f"exit status {status}")
    told.compare(server.ledger)
    (before, after), (files_before, files_after) = _growth(resident), _growth(descriptors)
    most_growth = MOST_GROWTH if len(resident) >= WARM_ROUNDS else MOST_GROWTH_COLD
    if after > (1 + most_growth) * before:
        findings.add("memory grows", resident)
    if files_after > files_before + MOST_DESCRIPTORS:
        findings.add("descriptors grow", descriptors)
    codes: dict[str, dict[str, int]] = {group: {} for group in fuzz_sessions.GROUPS}
    for (group, what), times in sorted(player.seen.items()):
        codes[group][what] = times
    p50, p99 = np.percentile(player.good_seconds or [0.0], [50, 99]) * 1000
    numbers = {
        "messages": player.messages,
        "sessions": player.sessions,
        "frames_below_grpc": player.frames,
        "codes": codes,
        "answers": told.answers,
        "receipts": len(told.receipts),
        "good_answers": len(player.good_seconds),
        "good_retries": player.good_retries,
        "good_p50_ms": round(p50, 1),
        "good_p99_ms": round(p99, 1),
        "resident_mib": [round(value, 1) for value in resident],
        "resident_growth": round(after / before - 1, 4) if before else None,
        "resident_peak_mib": round(peak, 1),
        "descriptors": [int(files_before), int(files_after)],
    }
    return Result(numbers=numbers)


def draw(cast: Cast, seed: int, number: int, messages: int, play: Callable[[Session], None]) -> None:
    """The sessions of one round, until they have so many messages; always the same ones in a fresh process."""
    left = messages

    class Enough(BaseException):
        """The round has its share. No failure: hypothesis lets through what is no Exception."""

    @hypothesis.seed(seed * 100_003 + number)
    @settings(
        max_examples=100_000,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(session=fuzz_sessions.sessions(cast, number))
    def drawn(session: Session) -> None:
        nonlocal left
        play(session)
        left -= len(session.messages) if session.path else 0
        if left <= 0:
            raise Enough

    with contextlib.suppress(Enough):
        drawn()


def _growth(samples: Sequence[float]) -> tuple[float, float]:
    """The least of the second quarter (the first is warm-up), and of the last: what is given back is no leak."""
    quarter = max(1, len(samples) // 4)
    return min(samples[quarter : 2 * quarter], default=0.0), min(samples[-quarter:], default=0.0)


def _served(server: Server) -> frozenset[str]:
    """The methods that there are: a server may lack a protocol."""
    metadata = (("authorization", f"Bearer {server.keys['rich']}"),)
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    served = set(METHODS)
    with grpc.insecure_channel(server.address, options) as channel:
        try:
            ask: Any = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            ask(b"", metadata=metadata, timeout=10)
        except grpc.RpcError:
            served = {path for path in served if not path.startswith("/inference.")}
    return frozenset(served)


@contextlib.contextmanager
def _home(folder: Path) -> Iterator[None]:
    """Hypothesis keeps what it works out in a folder of the run's own, not beside the sources."""
    set_hypothesis_home_dir(folder)
    try:
        yield
    finally:
        set_hypothesis_home_dir(None)


def leaks(log: bytes, keys: Sequence[str]) -> list[str]:
    """What must not be in a log: tracebacks, errors, secrets of keys, real and made up, and pixels."""
    marker = fuzz_sessions.MARKER
    wanted = {"a traceback": b"Traceback", "an error": b'"level": "error"', "pixels": marker}
    wanted |= {"pixels in hex": marker.hex().encode(), "a made-up key": fuzz_sessions.SECRET_MARKER.encode()}
    for skip in range(3):  # as base64 has them, wherever they begin
        wanted[f"pixels in base64, {skip}"] = base64.b64encode(marker[skip:][: (len(marker) - skip) // 3 * 3])
    wanted |= {f"key {key[5:21]}": key.rpartition("_")[2][:32].encode() for key in keys}
    found = []
    for what, needle in wanted.items():
        lines = [line for line in log.splitlines() if needle in line]
        if lines:
            found.append(f"{what}, {len(lines)} times: {lines[0][:1500].decode(errors='replace')}")
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--messages", type=click.IntRange(1), default=10_000, show_default=True)
@click.option("--seed", type=int, help="Of what is drawn; drawn itself and printed by default.")
@click.option("--note", default="", help="Kept with the result.")
def main(messages: int, seed: int | None, note: str) -> None:
    """Send bad input, then compare books, log, memory and statuses with what they must be."""
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    click.echo(f"seed {seed}")
    begun, started = record.about("fuzz", note), time.monotonic()
    result = run(messages, seed)
    line = begun | {"seed": seed, **result.numbers, "findings": len(result.findings)}
    record.keep("fuzz", line | {"seconds": round(time.monotonic() - started, 1)})
    for finding in result.findings:
        click.echo(finding, err=True)
    sys.exit(1 if result.findings else 0)


if __name__ == "__main__":
    try:
        main()
    except ServiceError as error:
        sys.exit(f"error: {error}")
