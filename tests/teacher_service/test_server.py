"""The server as a process: how it starts, what it refuses, how it stops."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as quota_wire
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.quota_ledger_pb2_grpc import QuotaLedgerStub
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceStub
from teacher_service.config import ServerConfig
from teacher_service.engine import ArrayEngine
from teacher_service.ledger import MAX_COUNT
from teacher_service.server import SERVICES, StartError, _fitting, is_loopback
from tests.conftest import program, teacher_admin
from tests.teacher_service.parts import pictures

TEACHER = ("--model", "array:10,1,8,8", "--metrics-port", "0")


def connect(address: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0)]
    if credentials is not None:
        return grpc.secure_channel(address, credentials, options)
    return grpc.insecure_channel(address, options)


class Client:
    """One Infer stream of a plain gRPC client, sending from a queue of its own."""

    def __init__(self, channel: grpc.Channel, key: str | None) -> None:
        self._ready = threading.Condition()
        self._messages: list[wire.InferRequest | None] = [wire.InferRequest(config=wire.StreamConfig(run_id="run"))]
        stub = TeacherInferenceStub(channel)
        metadata = (("authorization", f"Bearer {key}"),) if key is not None else ()
        self.call: Any = stub.Infer(self._outgoing(), metadata=metadata, timeout=30)
        assert next(self.call).HasField("accepted")

    def _outgoing(self) -> Iterator[wire.InferRequest]:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._messages)
                message = self._messages.pop(0)
            if message is None:
                return
            yield message

    def send(self, batch_id: str, count: int = 2) -> None:
        images = codec.encode_images(pictures(count))
        self.put(wire.InferRequest(batch=wire.Batch(batch_id=batch_id, images=images)))

    def done(self) -> None:
        self.put(None)

    def put(self, message: wire.InferRequest | None) -> None:
        with self._ready:
            self._messages.append(message)
            self._ready.notify()

    def ask(self, batch_id: str, count: int = 2) -> wire.BatchResult:
        self.send(batch_id, count)
        response = next(self.call)
        assert response.HasField("result"), response
        return response.result  # type: ignore[no-any-return]


def status_of(error: grpc.RpcError) -> Refusal:
    """The refusal that ended a call of a plain client."""
    return Refusal.from_status(Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"]))


def fails(*flags: str, cwd: Path) -> str:
    """``teacher-serve`` exits with 2 and one line; returns it."""
    command = [program("teacher-serve"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


# --- starting ---


def test_the_server_says_one_line_when_it_is_ready_and_answers(start_server: Any) -> None:
    server = start_server()
    key = server.create_account(budget=10)
    with connect(server.address) as channel:
        for service in ("", *SERVICES):
            asked = health_pb2.HealthCheckRequest(service=service)
            answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        result = Client(channel, key).ask("b", 3)
        expected = ArrayEngine().answer(pictures(3))
        assert codec.decode_answer(result.answer, picture_count=3, class_count=10).tobytes() == expected.tobytes()
    assert server.stop() == 0
    assert server.process.stdout.read() == ""  # nothing but the one line
    assert server.balances() == {"name": "device", "granted": 10, "posted": 3, "held": 0, "balance": 7}


def test_books_in_memory_have_one_account_whose_key_is_the_second_line(start_server: Any) -> None:
    server = start_server(ledger="memory:")
    word, key = server.process.stdout.readline().split()
    assert word == "key" and key.startswith("mekd_")
    with connect(server.address) as channel:
        client = Client(channel, key)
        first, again = client.ask("b", 3), client.ask("b", 3)
    assert first.balance_count == MAX_COUNT - 3
    assert again.replayed and again.answer == first.answer
    assert server.log().count("the books are in memory: for measurements, and lost at exit") == 1
    assert server.stop() == 0


def test_metrics_are_served_on_loopback(start_server: Any) -> None:
    server = start_server()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    key = server.create_account()
    with connect(server.address) as channel:
        Client(channel, key).ask("b", 4)
    with opener.open(f"http://127.0.0.1:{server.metrics_port()}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'mekd_pictures_total{account="device",outcome="charged"} 4.0' in text
    assert 'mekd_account_balance_pictures{account="device"} 996.0' in text


def test_every_address_that_cannot_be_served_is_one_clear_line(start_server: Any, tmp_path: Path) -> None:
    server = start_server()
    taken = ("--listen", server.address)
    with socket.create_server(("127.0.0.1", 0)) as other:
        metrics = str(other.getsockname()[1])
        cases = {
            (*TEACHER, *taken): f"cannot listen on {server.address}: Address already in use; give another --listen",
            (*TEACHER, "--listen", "192.0.2.1:0", "--insecure-listen"): "Cannot assign requested address",
            (*TEACHER, "--listen", "no.such.host.invalid:0", "--insecure-listen"): "cannot listen on no.such.host",
            (*TEACHER, "--listen", "0.0.0.0:0"): "--listen 0.0.0.0:0 is not loopback: give --tls-cert and --tls-key",
            # No such model: what can be refused without one is not found out after it was loaded.
            ("--model", "none.pt", "--listen", "50051"): "--listen: expected HOST:PORT, got '50051'",
            (*TEACHER, "--listen", "127.0.0.1:70000"): "--listen: expected HOST:PORT, got '127.0.0.1:70000'",
            (
                *(*TEACHER[:2], "--listen", "127.0.0.1:0", "--metrics-port", metrics),
            ): f"--metrics-port {metrics}: Address already in use; give another --metrics-port",
            (
                *(*TEACHER, "--listen", "127.0.0.1:0", "--insecure-listen"),
                *("--metrics-host", "no.such.host.invalid"),
            ): "--metrics-host no.such.host.invalid, --metrics-port 0: ",
            (
                *(*TEACHER, "--listen", "127.0.0.1:0", "--insecure-listen"),
                *("--metrics-host", "192.0.2.1"),
            ): "--metrics-port 0: Cannot assign requested address; give another --metrics-host",
        }
        for flags, said in cases.items():
            assert said in fails("--ledger", server.ledger, *flags, cwd=tmp_path)


def test_limits_that_contradict_each_other_are_refused_before_a_ledger_is_made(tmp_path: Path) -> None:
    flags = ("--max-batch-pictures", "100", "--max-queue-pictures", "99")
    said = fails(*TEACHER, *flags, cwd=tmp_path)
    assert "--max-queue-pictures: expected at least --max-batch-pictures (100), got 99" in said
    assert list(tmp_path.iterdir()) == []


def test_a_message_is_never_promised_larger_than_it_may_be() -> None:
    config = ServerConfig(max_message_bytes=2**20)
    large_pictures = ArrayEngine(class_count=10, channels=3, height=64, width=64)
    assert _fitting(config, large_pictures).max_batch_pictures == (2**20 - 4096) // (3 * 64 * 64) == 85
    large_answers = ArrayEngine(class_count=5000)
    assert _fitting(config, large_answers).max_batch_pictures == (2**20 - 4096) // 30_000 == 34
    assert _fitting(config, ArrayEngine()).max_batch_pictures == 512
    with pytest.raises(StartError, match="expected a picture and its answer to fit into a message of 5000 bytes"):
        _fitting(ServerConfig(max_message_bytes=5000), large_pictures)


def test_what_is_read_does_not_shrink_with_the_model_or_the_batch() -> None:
    """Else what was paid for under a larger one could not be repeated, nor answers of other teachers be posted."""
    config = ServerConfig(max_batch_pictures=1)
    assert _fitting(config, ArrayEngine()).max_message_bytes == config.max_message_bytes == 64 * 2**20


def test_the_largest_promised_batch_passes_through(start_server: Any) -> None:
    # 3 x 256 x 256 pictures: 512 of them would not fit into 64 MiB
    server = start_server(model="array:2,3,256,256")
    key = server.create_account()
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.address, options) as channel:
        metadata = (("authorization", f"Bearer {key}"),)
        most = TeacherInferenceStub(channel).Describe(wire.DescribeRequest(), metadata=metadata).max_batch_pictures
        assert most == (64 * 2**20 - 4096) // (3 * 256 * 256) == 341
        client = Client(channel, key)
        zeros = wire.ImageBatch(
            encoding=wire.IMAGE_ENCODING_RAW_UINT8,
            picture_count=most,
            channels=3,
            height=256,
            width=256,
            payload=bytes(most * 3 * 256 * 256),
        )
        client.put(wire.InferRequest(batch=wire.Batch(batch_id="b" * 64, images=zeros)))
        assert next(client.call).result.answer.charged_count == most


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("192.168.1.2", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_loopback_is_told_from_what_leaves_the_machine(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-made certificate for 127.0.0.1, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2".split()
    command += ["-subj", "/CN=mekd test", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def test_tls_serves_who_trusts_its_certificate_and_nobody_else(
    start_server: Any, certificate: tuple[Path, Path]
) -> None:
    cert, key = map(str, certificate)
    server = start_server("--tls-cert", cert, "--tls-key", key, "--listen", "0.0.0.0:0")  # beyond loopback, with TLS
    address = server.address.replace("0.0.0.0", "127.0.0.1")
    account_key = server.create_account()
    with connect(address, grpc.ssl_channel_credentials(Path(cert).read_bytes())) as channel:
        assert Client(channel, account_key).ask("b").answer.charged_count == 2
    for flags, expected in ((("--tls-ca", cert), 0), ((), 1)):
        check = [program("teacher-serve"), "--check", address, *flags]
        assert subprocess.run(check, capture_output=True, timeout=60).returncode == expected


def test_a_ledger_elsewhere_is_reached_over_tls(
    start_server: Any, certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = map(str, certificate)
    store = f"sqlite:///{tmp_path}/books.db"
    monkeypatch.setenv("MEKD_LEDGER_KEY", teacher_admin(store, "key", "create", "--role", "admin").strip())
    ledger = start_server("--ledger-only", "--tls-cert", cert, "--tls-key", key, model="", ledger=store)
    assert teacher_admin(f"grpcs://{ledger.address}", "--ledger-ca", cert, "account", "list").startswith("name oper")
    for url, *flags in ((f"grpcs://{ledger.address}",), (f"grpc://{ledger.address}",)):
        command = [program("teacher-admin"), "--ledger", url, *flags, "account", "list"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        # gRPC may log on its own after it.
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: the ledger at "), done.stderr
    assert ledger.stop() == 0


def test_certificates_that_cannot_be_used_are_one_clear_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = map(str, certificate)
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    serve = (*TEACHER, "--listen", "127.0.0.1:0")
    cases = {
        ("--tls-cert", cert): "expected --tls-cert and --tls-key together",
        ("--tls-key", key): "expected --tls-cert and --tls-key together",
        ("--tls-cert", cert, "--tls-key", str(tmp_path / "none")): "none: No such file or directory",
        ("--tls-cert", str(junk), "--tls-key", key): "expected a PEM certificate and its unencrypted private key",
        ("--tls-cert", cert, "--tls-key", cert): "expected a PEM certificate and its unencrypted private key",
    }
    for flags, said in cases.items():
        assert said in fails(*serve, *flags, cwd=tmp_path)


# --- stopping ---


@pytest.mark.parametrize(("hard", "found"), [(4096, 1384), (600, 600)])
def test_the_server_takes_the_file_descriptors_that_its_streams_need(
    start_server: Any, hard: int, found: int
) -> None:
    limited = ("bash", "-c", f'ulimit -Sn 512; ulimit -Hn {hard}; exec "$@"', "-", program("teacher-serve"))
    server = start_server("--max-streams", "1000", command=limited)
    limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    (files,) = [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files")]
    assert files == [str(found), str(hard)]
    assert ("few file descriptors for --max-streams" in server.log()) is (found < 1384)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_at_once_with_status_0(start_server: Any, number: signal.Signals) -> None:
    server = start_server()
    key = server.create_account()
    with connect(server.address) as channel:
        client = Client(channel, key)  # a stream that stays open does not keep it
        started = time.monotonic()
        assert server.stop(number) == 0
        assert time.monotonic() - started < 20  # --grace-seconds
        assert [response.WhichOneof("payload") for response in client.call] == ["draining"]
        assert client.call.code() is grpc.StatusCode.OK
    events = [json.loads(line)["event"] for line in server.log().splitlines()]
    nobody = "the ledger has no account: every key is refused until teacher-admin makes one"
    assert events == [nobody, "serving", "draining", "stopped"]
    books = sqlite3.connect(server.ledger.removeprefix("sqlite:///"))
    assert books.execute("SELECT * FROM instances").fetchall() == []  # it gave up its lease
    books.close()


@pytest.mark.parametrize("flags", [(), ("--ledger-only",)])
def test_a_signal_ends_open_watches_as_draining(start_server: Any, flags: tuple[str, ...]) -> None:
    server = start_server(*flags, model="" if flags else "array:10,1,8,8")
    metadata = (("authorization", f"Bearer {server.create_account()}"),)
    with connect(server.address) as channel:
        watch: Any = QuotaLedgerStub(channel).WatchBalance(
            quota_wire.WatchBalanceRequest(), metadata=metadata, timeout=30
        )
        assert next(watch).account.balance_count == 1000
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 20  # --grace-seconds
        with pytest.raises(grpc.RpcError) as ended:
            next(watch)
        status = Status.FromString(dict(ended.value.trailing_metadata())["grpc-status-details-bin"])
        assert Refusal.from_status(status) == Refusal.of(Reason.DRAINING)


# teacher-serve with an engine that takes its time for every call but the first, which the server makes itself.
SLOW_SERVER = """
import sys, time
from teacher_service.cli import serve
from teacher_service.engine import ArrayEngine
answer, seconds = ArrayEngine.answer, [float(sys.argv.pop(1)), 0.05]
def slowly(self, images):
    time.sleep(seconds.pop() if len(seconds) > 1 else seconds[0])
    return answer(self, images)

ArrayEngine.answer = slowly
serve()
"""


def slow(seconds: float) -> tuple[str, ...]:
    return (sys.executable, "-c", SLOW_SERVER, str(seconds))


def test_sigterm_finishes_and_books_what_is_under_way(start_server: Any) -> None:
    server = start_server(command=slow(0.5))
    key = server.create_account()
    with connect(server.address) as channel:
        client = Client(channel, key)
        for index in range(6):
            client.send(f"b{index}", 5)
        assert next(client.call).HasField("result")
        deadline = time.monotonic() + 20
        while (found := server.balances())["posted"] + found["held"] < 30:  # what comes after the signal is refused
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        kinds = [response.WhichOneof("payload") for response in client.call]
        assert client.call.code() is grpc.StatusCode.OK
    assert sorted(kinds) == ["draining"] + ["result"] * 5
    assert server.process.wait(30) == 0
    assert server.balances() == {"name": "device", "granted": 1000, "posted": 30, "held": 0, "balance": 970}


def test_a_batch_that_outlasts_the_grace_is_given_back(start_server: Any) -> None:
    server = start_server("--grace-seconds", "0.1", command=slow(5.0))
    key = server.create_account()
    with connect(server.address) as channel:
        client = Client(channel, key)
        client.send("slow", 150)
        books = sqlite3.connect(server.ledger.removeprefix("sqlite:///"))
        deadline = time.monotonic() + 20
        while books.execute("SELECT held FROM accounts").fetchone() != (150,):
            assert time.monotonic() < deadline
        books.close()
        assert server.stop() == 0
    assert server.balances() == {"name": "device", "granted": 1000, "posted": 0, "held": 0, "balance": 1000}


def test_a_killed_servers_posts_are_kept_and_its_successor_replays_them(start_server: Any) -> None:
    first = start_server()
    key = first.create_account()
    with connect(first.address) as channel:
        before = Client(channel, key).ask("b")
    first.process.kill()
    first.process.wait(10)
    second = start_server()
    with connect(second.address) as channel:
        after = Client(channel, key).ask("b")
    assert after.replayed and after.answer == before.answer
    assert second.balances()["posted"] == 2


def test_an_answer_older_than_it_is_kept_is_refused_and_neither_computed_nor_charged_again(start_server: Any) -> None:
    server = start_server("--answers-keep", "1s")
    key = server.create_account()
    with connect(server.address) as channel:
        client = Client(channel, key)
        client.ask("b")
        deadline = time.monotonic() + 20
        while True:
            assert time.monotonic() < deadline
            client.send("b")
            response = next(client.call)
            if response.HasField("refusal"):
                break
            assert response.result.replayed
            time.sleep(0.1)
        refusal = Refusal.from_status(response.refusal.status)
        assert refusal == Refusal.of(Reason.ANSWER_EXPIRED, batch_id="b")
        client.ask("next")
    assert server.stop() == 0
    assert server.balances()["posted"] == 4
    said = teacher_admin(server.ledger, "ledger", "verify")
    # The second was kept for a second too.
    assert re.search(r"\b[12] answers are no longer kept: pruned, as the books say \(--answers-keep\)", said)
    assert said.endswith("the books agree\n")


def test_answers_are_pruned_by_the_server_that_has_the_books_and_by_no_other(tmp_path: Path) -> None:
    said = fails(*TEACHER, "--ledger", "grpc://127.0.0.1:1", "--answers-keep", "30d", cwd=tmp_path)
    assert "--answers-keep: expected books of its own in --ledger, got grpc://127.0.0.1:1; give it to that" in said


def test_a_caller_who_vanishes_while_reading_leaves_no_traceback_in_the_log(start_server: Any) -> None:
    server = start_server("--max-batch-pictures", "200", model="array:2000,1,8,8")
    key = server.create_account(budget=100_000)
    for attempt in range(3):
        with connect(server.address) as channel:
            client = Client(channel, key)
            for index in range(12):
                client.send(f"b{attempt}-{index}", 200)
            time.sleep(0.3)
            client.call.cancel()
            client.done()
    assert server.stop() == 0
    events = [json.loads(line) for line in server.log().splitlines()]  # every line is JSON
    assert [event["event"] for event in events][1:] == ["serving", "draining", "stopped"]
    assert server.balances()["held"] == 0


# --- what must not get out ---


def test_nothing_secret_is_written_to_log_or_output(start_server: Any) -> None:
    server = start_server(env={"MEKD_LOG_LEVEL": "DEBUG", "GRPC_VERBOSITY": "INFO"})
    key = server.create_account()
    forged = key[:-4] + "beef"
    with connect(server.address) as channel:
        Client(channel, key).ask("b")
        with pytest.raises(grpc.RpcError) as ended:
            Client(channel, forged)
        assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
        said = f"{ended.value.details()} {ended.value.trailing_metadata()}"
    assert server.stop() == 0
    secret = key.rpartition("_")[2]
    written = server.log() + server.process.stdout.read() + said
    assert secret not in written and secret[:16] not in written
    database = b"".join(path.read_bytes() for path in server.log_file.parent.glob("ledger.db*"))
    assert database and secret.encode() not in database and bytes.fromhex(secret) not in database


def test_the_books_of_a_running_server_can_be_worked_on(start_server: Any) -> None:
    server = start_server()
    key = server.create_account(budget=2)
    with connect(server.address) as channel:
        client = Client(channel, key)
        client.ask("a")
        client.send("b")
        assert next(client.call).refusal.status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        teacher_admin(server.ledger, "account", "grant", "device", "2")
        assert client.ask("b").balance_count == 0
    assert os.stat(server.ledger.removeprefix("sqlite:///")).st_mode & 0o077 == 0
