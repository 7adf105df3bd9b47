"""TLS with renewal, and mutual TLS: certificates as identity, over a server process."""

import json
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import services
from edge_agent.failures import BadCredential, BadInput
from edge_agent.teacher import RemoteTeacher
from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as quota_wire
from protos.mekd.v1 import teacher_inference_pb2 as wire
from protos.mekd.v1.quota_ledger_pb2_grpc import QuotaLedgerStub
from protos.mekd.v1.teacher_inference_pb2_grpc import TeacherInferenceStub
from teacher_service.tls import Certificates, TlsError
from tests.conftest import program, teacher_admin
from tests.teacher_service.certificates import Authority
from tests.teacher_service.test_server import Client, connect, fails, status_of

HERE = "IP:127.0.0.1,DNS:localhost"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "another authority")


def install(pair: tuple[Path, Path], folder: Path) -> tuple[Path, Path]:
    """Puts a pair where the server looks, the way certificate tools do: new files, renamed over the old."""
    places = folder / "tls.pem", folder / "tls.key"
    for source, place in zip(reversed(pair), reversed(places), strict=True):
        fresh = place.with_suffix(".new")
        shutil.copy(source, fresh)
        os.replace(fresh, place)
    return places


def shown_by(address: str, authority: Authority, pair: tuple[Path, Path] | None = None) -> str:
    """The certificate that a server shows a new connection, PEM."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=authority.pem)
    context.set_alpn_protocols(["h2"])
    if pair is not None:
        context.load_cert_chain(*pair)
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as encrypted,
    ):
        return ssl.DER_cert_to_PEM_cert(encrypted.getpeercert(binary_form=True) or b"")


def pem_of(pair: tuple[Path, Path]) -> str:
    return pair[0].read_text()


# --- renewal ---


def test_a_renewed_certificate_is_shown_to_new_connections_and_old_ones_go_on(
    start_server: Any, authority: Authority, tmp_path: Path
) -> None:
    first, second, third = (authority.issue(HERE) for _ in range(3))
    cert, key = install(first, tmp_path)
    server = start_server("--tls-cert", str(cert), "--tls-key", str(key))
    account_key = server.create_account()
    assert shown_by(server.address, authority) == pem_of(first)
    with connect(server.address, authority.trusted_by()) as channel:
        client = Client(channel, account_key)
        assert client.ask("before").answer.charged_count == 2
        install(second, tmp_path)
        assert shown_by(server.address, authority) == pem_of(second)
        assert client.ask("after").answer.charged_count == 2
    # A pair that does not fit, then no certificate at all: each is told once, and the old one stays.
    install((third[0], second[1]), tmp_path)
    for _ in range(3):
        assert shown_by(server.address, authority) == pem_of(second)
    cert.write_text("no certificate")
    for _ in range(3):
        assert shown_by(server.address, authority) == pem_of(second)
    install(third, tmp_path)
    assert shown_by(server.address, authority) == pem_of(third)
    with connect(server.address, authority.trusted_by()) as channel:
        assert Client(channel, account_key).ask("new").answer.charged_count == 2
    assert server.stop() == 0
    logged = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    told = [(entry["event"], entry["level"]) for entry in logged if "certificate" in entry["event"]]
    assert told == [
        ("renewed certificate in use", "info"),
        ("renewed certificate cannot be used, the old one stays", "error"),
        ("renewed certificate cannot be used, the old one stays", "error"),
        ("renewed certificate in use", "info"),
    ]


def test_files_that_are_gone_for_a_moment_change_nothing(authority: Authority, tmp_path: Path) -> None:
    first, second = authority.issue(HERE), authority.issue(HERE)
    cert, key = install(first, tmp_path)
    certificates = Certificates(cert, key)
    before = certificates.context()
    assert certificates._renewed() is None
    cert.unlink()
    assert certificates._renewed() is None and certificates.context() is before
    install(second, tmp_path)
    assert certificates.context() is not before
    assert certificates._renewed() is not None and certificates._renewed() is None
    with pytest.raises(TlsError, match=r"--tls-client-ca .*: expected certificates in PEM"):
        Certificates(cert, key, key)


# --- mutual TLS ---


@dataclass
class Mutual:
    """A running server that asks for certificates; one for all tests, so each has accounts of its own."""

    address: str
    ledger: str

    def create_account(self, name: str, budget: int = 1000) -> str:
        """A new account; returns its key."""
        return teacher_admin(self.ledger, "account", "create", name, "--budget", str(budget)).strip()

    def posted(self, name: str) -> int:
        found = json.loads(teacher_admin(self.ledger, "account", "show", name, "--format", "json"))
        return int(found["posted"])


@pytest.fixture(scope="module")
def mutual(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mutual]:
    folder = tmp_path_factory.mktemp("mutual")
    cert, key = authority.issue(HERE)
    found = Mutual("", f"sqlite:///{folder}/ledger.db")
    found.create_account("device-7")  # for the certificates that come near to naming it
    flags = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.pem))
    flags += ("--metrics-host", "127.0.0.2")
    model = Path("array:10,1,8,8")
    with services.serving(model, found.ledger, log=folder / "log", more=flags) as found.address:
        yield found


def test_who_shows_no_certificate_of_the_authority_is_not_let_in_even_with_a_key(
    mutual: Mutual, authority: Authority, stranger: Authority
) -> None:
    key = mutual.create_account("uncertified")
    for pair in (None, stranger.issue("DNS:device")):
        with connect(mutual.address, authority.trusted_by(pair)) as channel:
            with pytest.raises(grpc.RpcError) as ended:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.RpcError):
                Client(channel, key)


def test_a_certificate_is_its_accounts_customer_and_nothing_more(mutual: Mutual, authority: Authority) -> None:
    mutual.create_account("customer", budget=10)
    with connect(mutual.address, authority.trusted_by(authority.issue("DNS:customer"))) as channel:
        client = Client(channel, None)
        assert client.ask("b", 3).answer.charged_count == 3
        ledger = QuotaLedgerStub(channel)
        found = ledger.GetBalance(quota_wire.GetBalanceRequest(), timeout=10)
        assert (found.account, found.posted_count, found.balance_count) == ("customer", 3, 7)
        watched = ledger.WatchBalance(quota_wire.WatchBalanceRequest(), timeout=10)
        assert next(watched).account.name == "customer"
        watched.cancel()
        assert TeacherInferenceStub(channel).Describe(wire.DescribeRequest(), timeout=10).channels == 1
        for call, request in (
            (ledger.Grant, quota_wire.GrantRequest(account="customer", picture_count=5)),
            (ledger.Hold, quota_wire.HoldRequest(account="customer")),
            (ledger.GetBalance, quota_wire.GetBalanceRequest(account="operators")),
        ):
            with pytest.raises(grpc.RpcError) as ended:
                call(request, timeout=10)
            assert status_of(ended.value).reason is Reason.PERMISSION_DENIED
    assert mutual.posted("customer") == 3


def test_a_key_wins_over_the_certificate(mutual: Mutual, authority: Authority) -> None:
    mutual.create_account("certified", budget=10)
    key = mutual.create_account("keyed", budget=20)
    with connect(mutual.address, authority.trusted_by(authority.issue("DNS:certified"))) as channel:
        metadata = (("authorization", f"Bearer {key}"),)
        ledger = QuotaLedgerStub(channel)
        found = ledger.GetBalance(quota_wire.GetBalanceRequest(), metadata=metadata, timeout=10)
        assert (found.account, found.balance_count) == ("keyed", 20)
        assert Client(channel, key).ask("b").answer.charged_count == 2
        for wrong in ("Bearer nonsense", "Basic x"):  # a wrong key is not made good by a right certificate
            with pytest.raises(grpc.RpcError) as ended:
                ledger.GetBalance(quota_wire.GetBalanceRequest(), metadata=(("authorization", wrong),), timeout=10)
            assert status_of(ended.value).reason is Reason.UNAUTHENTICATED
    assert mutual.posted("certified") == 0 and mutual.posted("keyed") == 2


@pytest.mark.parametrize(
    ("names", "common_name", "got"),
    [
        ("DNS:nobody", "device-7", "no key, and a certificate for 'nobody', which names no account"),
        ("DNS:device-7.example", "device-7", "'device-7.example', which names no account"),
        ("DNS:*", "device-7", "'*', which names no account"),
        ("DNS:device-7,DNS:device-8", "device-7", "a certificate with 2 DNS names instead of one"),
        ("URI:device-7,email:device-7", "device-7", "no such header"),
        ("", "device-7", "no such header"),
    ],
)
def test_a_certificate_that_names_no_account_is_refused(
    mutual: Mutual, authority: Authority, names: str, common_name: str, got: str
) -> None:
    with connect(mutual.address, authority.trusted_by(authority.issue(names, common_name))) as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)  # needs no account
        with pytest.raises(grpc.RpcError) as ended:
            QuotaLedgerStub(channel).GetBalance(quota_wire.GetBalanceRequest(), timeout=10)
        refusal = status_of(ended.value)
        assert refusal.reason is Reason.UNAUTHENTICATED and got in refusal.variables["got"]
        with pytest.raises(grpc.RpcError) as ended:
            Client(channel, None)
        assert status_of(ended.value) == refusal


def test_without_a_client_authority_no_certificate_is_asked_for_or_believed(
    start_server: Any, authority: Authority
) -> None:
    cert, key = authority.issue(HERE)
    server = start_server("--tls-cert", str(cert), "--tls-key", str(key))
    server.create_account("device-7")
    with connect(server.address, authority.trusted_by(authority.issue("DNS:device-7"))) as channel:
        with pytest.raises(grpc.RpcError) as ended:
            QuotaLedgerStub(channel).GetBalance(quota_wire.GetBalanceRequest(), timeout=10)
        assert status_of(ended.value) == Refusal.of(Reason.UNAUTHENTICATED, got="no such header")


def test_the_client_authority_needs_a_pair_and_must_be_one(authority: Authority, tmp_path: Path) -> None:
    serve = ("--model", "array:10,1,8,8", "--listen", "127.0.0.1:0", "--metrics-port", "0")
    cert, key = map(str, authority.issue(HERE))
    pair = ("--tls-cert", cert, "--tls-key", key)
    empty = tmp_path / "empty.pem"
    empty.touch()
    cases = {
        (*pair, "--tls-client-ca", str(empty)): f"--tls-client-ca {empty}: expected certificates in PEM (",
        ("--tls-client-ca", str(authority.pem)): "--tls-client-ca: expected --tls-cert and --tls-key with it",
        (*pair, "--tls-client-ca", key): f"--tls-client-ca {key}: expected certificates in PEM",
        (*pair, "--tls-client-ca", str(tmp_path / "none")): "none: No such file or directory",
        ("--metrics-host", "0.0.0.0"): "--metrics-host 0.0.0.0 is not loopback: give --tls-cert and --tls-key",
    }
    for flags, said in cases.items():
        assert said in fails(*serve, *flags, cwd=tmp_path)


def test_check_shows_a_certificate_where_it_has_one(mutual: Mutual, authority: Authority) -> None:
    cert, key = map(str, authority.issue("DNS:probe"))
    pair = ("--tls-cert", cert, "--tls-key", key)
    trust = ("--tls-ca", str(authority.pem))
    for flags, expected, said in (
        ((*trust, *pair), 0, "is ready"),
        ((*trust, *pair, "--liveness"), 0, "is alive"),
        (trust, 1, "give --tls-cert and --tls-key"),
        ((), 1, "give --tls-ca"),
    ):
        check = [program("teacher-serve"), "--check", mutual.address, *flags]
        done = subprocess.run(check, capture_output=True, text=True, timeout=60)
        assert done.returncode == expected and said in done.stderr


# --- the agent's side ---


def test_an_agent_with_a_certificate_needs_no_key(mutual: Mutual, authority: Authority) -> None:
    mutual.create_account("keyless", budget=10)
    settings: dict[str, Any] = {"api_key": None, "tls_ca": authority.pem, "check_egress": lambda batch: None}
    teacher = RemoteTeacher(mutual.address, tls_pair=authority.issue("DNS:keyless"), **settings)
    assert teacher.describe().max_batch_pictures == 512
    assert teacher.balance("run").balance == 10
    teacher.close()
    nobody = RemoteTeacher(mutual.address, tls_pair=authority.issue("DNS:nobody"), **settings)
    with pytest.raises(BadCredential, match="names no account"):
        nobody.describe()
    nobody.close()
    with pytest.raises(BadInput, match=r"--tls-key .*none: No such file"):
        RemoteTeacher(mutual.address, tls_pair=(authority.pem, Path("/none")), **settings)


def test_the_agents_pair_comes_complete_and_with_the_teachers_authority(tmp_path: Path) -> None:
    command = [
        program("edge-agent"),
        "run",
        "--phase",
        "all",
        "--images",
        "digits",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    for flags, said in (
        (("--tls-cert", "a"), "tls_cert: expected it and tls_key, or neither"),
        (("--tls-key", "a"), "tls_cert: expected it and tls_key, or neither"),
        (("--tls-cert", "a", "--tls-key", "b"), "tls_cert: expected tls_ca with it"),
    ):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_a_run_is_paid_by_the_certificates_account(mutual: Mutual, authority: Authority, tmp_path: Path) -> None:
    mutual.create_account("payer", budget=64)
    cert, key = map(str, authority.issue("DNS:payer"))
    small = ("deprivatize.steps=1", "deprivatize.batch_count=2", "distill.passes=1", "distill.batch_count=8")
    command = [program("edge-agent"), "run", "--phase", "all", "--images", "digits", "--quiet", "--budget", "64"]
    command += ["--teacher", mutual.address, "--tls-ca", str(authority.pem), "--tls-cert", cert, "--tls-key", key]
    command += [part for setting in small for part in ("--set", setting)]
    done = subprocess.run([*command, "--run-dir", "run"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert mutual.posted("payer") == 64
