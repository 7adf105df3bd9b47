"""A short run of benchmarks/fuzz.py, whether it can fail at all, and what its long runs have found."""

import asyncio
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from benchmarks import fuzz, fuzz_sessions
from benchmarks.fuzz_sessions import INFER, METHODS, MODEL_INFER, MODEL_STREAM_INFER, VOID, Cast, Session
from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as books_wire
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import auth
from teacher_service.ledger import OPERATORS, Role
from teacher_service.ledger_sql import SqlLedger
from tests.conftest import Server, StartServer

MESSAGES = 2500
ROOT = Path(__file__).resolve().parents[2]


def test_a_few_thousand_bad_messages_are_refused_cleanly_and_harm_nobody() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    result = fuzz.run(MESSAGES, seed)
    assert result.findings == []
    assert result.numbers["messages"] >= MESSAGES and result.numbers["frames_below_grpc"] > 0
    assert result.numbers["answers"] > result.numbers["good_answers"] > 0
    codes = {code for group in result.numbers["codes"].values() for code in group}
    for code in ("OK", "answered", "INVALID_ARGUMENT INVALID_REQUEST", "UNAUTHENTICATED UNAUTHENTICATED"):
        assert code in codes


class Played:
    """A run's own parts without a run: what is sent is said by the test."""

    def __init__(self, folder: Path) -> None:
        self.findings = fuzz.Findings()
        self.server = fuzz.Server(folder)
        self.told = fuzz.Told(self.findings)
        self.cast = Cast(keys=self.server.keys, paths=frozenset(METHODS))
        self.player = fuzz.Player(self.server.address, self.cast, self.findings, self.told)
        self.player.begin()

    def play(self, path: str, *messages: bytes, account: str = "rich", **more: Any) -> None:
        """One session, to its end."""
        metadata = (("authorization", f"Bearer {self.cast.keys[account]}"),)
        self.player.play(
            Session(group="mekd", path=path, account=account, metadata=metadata, messages=messages, **more)
        )
        self.player.rest()

    def end(self) -> None:
        self.player.end()
        self.server.stop()
        self.server.kill()


CONFIG = wire.InferRequest(config=wire.StreamConfig(run_id="run")).SerializeToString()


def batch(batch_id: str, fill: int = 1) -> bytes:
    images = wire.ImageBatch(
        encoding=wire.IMAGE_ENCODING_RAW_UINT8,
        picture_count=1,
        channels=1,
        height=8,
        width=8,
        payload=fuzz_sessions.pictures(1, fill),
    )
    return wire.InferRequest(batch=wire.Batch(batch_id=batch_id, images=images)).SerializeToString()


def test_the_comparison_sees_what_was_not_sent_or_not_told(tmp_path: Path) -> None:
    played = Played(tmp_path)
    try:
        played.play(INFER, CONFIG, batch("one"), batch("two"))
        played.play(INFER, CONFIG, batch("unheard"), ending="cancel", seconds=0.2)
    finally:
        played.end()
    assert played.findings.lines() == []
    ledger, told = played.server.ledger, played.told
    told.compare(ledger)
    assert played.findings.lines() == []
    del told._sent["rich", "one"]
    told._charged["rich", "two"] = (2, b"")
    told._charged["rich", "three"] = (1, b"")
    told.compare(ledger)
    kinds = [line.partition(" (")[0] for line in played.findings.lines()]
    assert kinds == [
        "a charge that nobody asked for",
        "a charge was told that is not on the books",
        "the books have another charge than was told",
    ]


def test_what_must_not_be_in_a_log_is_found_there() -> None:
    key, _ = auth.new_key("rich")
    assert fuzz.leaks(b'{"event": "serving", "level": "info"}\n', [key]) == []
    pixels = fuzz_sessions.pictures(2, 7)
    for line in (
        b"Traceback (most recent call last):",
        b'{"level": "error"}',
        key.encode(),
        b"before " + pixels,
        pixels.hex().encode(),
        fuzz.base64.b64encode(pixels[1:]),
        fuzz.base64.b64encode(pixels[2:]),
        fuzz_sessions.SECRET_MARKER.encode(),
    ):
        assert fuzz.leaks(b"fine\n" + line + b"\nfine\n", [key]) != [], line


SKETCH = """
import sys, tempfile
from pathlib import Path
from benchmarks import fuzz
from benchmarks.fuzz_sessions import CUSTOMERS, METHODS, Cast
cast = Cast(keys={name: "mekd_" + name for name in (*CUSTOMERS, "teacher", "admin")}, paths=frozenset(METHODS))
with tempfile.TemporaryDirectory() as folder, fuzz._home(Path(folder)):
    fuzz.draw(cast, int(sys.argv[1]), 0, 100, print)
"""


def test_the_same_seed_draws_the_same_sessions() -> None:
    def drawn(seed: int) -> str:
        return subprocess.run(
            [sys.executable, "-c", SKETCH, str(seed)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            cwd=ROOT,
        ).stdout

    assert drawn(1) == drawn(1) != drawn(2)


# --- what long runs have found -----------------------------------------------------------------------


@pytest.fixture
def books(start_server: StartServer, tmp_path: Path) -> tuple[Server, dict[str, str]]:
    """A server, and a key of each role."""
    url, keys = f"sqlite:///{tmp_path}/ledger.db", {}

    async def make() -> None:
        ledger = SqlLedger.open(url)
        for name in ("device", OPERATORS):
            await ledger.create_account(name, 1000)
        for account, role in (("device", Role.CUSTOMER), (OPERATORS, Role.TEACHER), (OPERATORS, Role.ADMIN)):
            keys[role.value], stored = auth.new_key(account, role)
            await ledger.add_key(stored)
        await ledger.close()

    asyncio.run(make())
    return start_server(ledger=url), keys


def ask(server: Server, path: str, message: bytes, key: str = "") -> tuple[grpc.StatusCode, Refusal | None]:
    """How a call with one message, whatever it is, ends."""
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    with grpc.insecure_channel(server.address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            if METHODS[path].request_streams:
                list(channel.stream_stream(path)(iter([message]), metadata=metadata, timeout=10))
            elif METHODS[path].response_streams:
                list(channel.unary_stream(path)(message, metadata=metadata, timeout=10))
            else:
                channel.unary_unary(path)(message, metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            rich = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
            return error.code(), Refusal.from_status(fuzz.Status.FromString(rich)) if rich else None
    return grpc.StatusCode.OK, None


@pytest.mark.parametrize(
    ("path", "role"),
    [
        (INFER, "customer"),
        (MODEL_INFER, "customer"),
        (MODEL_STREAM_INFER, "customer"),
        ("/mekd.v1.QuotaLedger/GetBalance", "customer"),
        ("/mekd.v1.QuotaLedger/StreamStatement", "customer"),
        ("/grpc.health.v1.Health/Check", ""),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", ""),
    ],
)
def test_bytes_that_are_no_message_are_a_bad_argument_and_leave_no_trace_in_the_log(
    books: tuple[Server, dict[str, str]], path: str, role: str
) -> None:
    server, keys = books
    code, refusal = ask(server, path, b"\x07" + fuzz_sessions.MARKER, keys.get(role, ""))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal == Refusal.of(
        Reason.INVALID_REQUEST, field="message", expected=f"a message of {path}", got="10 bytes that are none"
    )
    if role:  # who has no key learns nothing about the message
        assert ask(server, path, b"\x07")[0] is grpc.StatusCode.UNAUTHENTICATED
    assert fuzz.leaks(server.log().encode(), list(keys.values())) == []


@pytest.mark.parametrize("path", [MODEL_INFER, MODEL_STREAM_INFER])
def test_a_message_of_empty_parts_is_refused_before_it_is_parsed_and_holds_nobody_up(
    books: tuple[Server, dict[str, str]], path: str
) -> None:
    server, keys = books
    outputs = b"\x32\x00" * 1_000_000  # a second on the event loop, were they looked at
    code, refusal = ask(server, path, outputs, keys["customer"])
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal == Refusal.of(
        Reason.INVALID_REQUEST, field="message", expected=f"a message of {path}", got="more than 256 fields"
    )


@pytest.mark.parametrize("path", ["/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/Check"])
def test_who_shows_no_key_sends_small_messages(books: tuple[Server, dict[str, str]], path: str) -> None:
    server, _ = books
    long_name = health_pb2.HealthCheckRequest(service="x" * 5000).SerializeToString()
    code, refusal = ask(server, path, long_name)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal is not None and "at most 4096 bytes, got 5003 bytes" in refusal.message


def test_a_void_without_an_account_or_a_batch_is_nobodys_and_disturbs_nobody(
    books: tuple[Server, dict[str, str]],
) -> None:
    server, keys = books
    nothing = books_wire.VoidRequest(account="device", instance_id="one")
    assert ask(server, VOID, nothing.SerializeToString(), keys["teacher"])[0] is grpc.StatusCode.INVALID_ARGUMENT
    nobody = books_wire.VoidRequest(batch_id="one", instance_id="one")
    assert ask(server, VOID, nobody.SerializeToString(), keys["teacher"])[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_a_refusal_that_repeats_a_long_name_still_reaches_its_caller(books: tuple[Server, dict[str, str]]) -> None:
    server, keys = books
    for name in ("x" * 20_000, "𝄞" * 5000):
        request = books_wire.GetAccountRequest(account=name)
        code, refusal = ask(server, "/mekd.v1.QuotaLedger/GetAccount", request.SerializeToString(), keys["teacher"])
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert refusal is not None and refusal.reason is Reason.LEDGER_REFUSED and name[:20] in refusal.message


async def test_what_a_call_shows_is_not_read_again_when_it_has_ended(tmp_path: Path) -> None:
    text, stored = auth.new_key("device")
    ledger = SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")
    await ledger.create_account("device", 1000, stored)

    class Context:
        ended = False

        def invocation_metadata(self) -> auth.Metadata:
            assert not self.ended  # gRPC has freed what it would read
            return (("authorization", f"Bearer {text}"),)

    context = Context()
    who = auth.asks_for(auth.Authenticator(ledger), context)
    context.ended = True
    assert (await who()).account == (await who()).account == "device"
    await ledger.close()
