"""The life of the server process, top-down: build, start, wait for SIGINT or SIGTERM, drain, stop."""

import asyncio
import contextlib
import dataclasses
import errno
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

from protos.mekd.v1 import quota_ledger_pb2_grpc, teacher_inference_pb2_grpc
from teacher_service import kserve
from teacher_service.auth import Authenticator, AuthInterceptor, new_key
from teacher_service.batcher import Batcher, EngineCall
from teacher_service.config import ServerConfig, is_loopback
from teacher_service.engine import Engine, is_quick
from teacher_service.health import Health, follow
from teacher_service.inference import InferenceServicer
from teacher_service.interceptors import Gate, Readable, RpcMetrics
from teacher_service.ledger import MAX_COUNT, Ledger, LedgerError
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_remote import SCHEMES, RemoteLedger
from teacher_service.ledger_sql import LEASE_MS, SqlLedger
from teacher_service.limits import Limits
from teacher_service.metrics import Metrics
from teacher_service.money_path import MoneyPath
from teacher_service.quota import QuotaServicer
from teacher_service.statistics import Statistics
from teacher_service.streams import Calls
from teacher_service.tls import Certificates, TlsError

log = structlog.get_logger()

IN_MEMORY = "memory:"
LEDGER_SERVICE = "mekd.v1.QuotaLedger"
SERVICES = ("mekd.v1.TeacherInference", kserve.SERVICE, LEDGER_SERVICE)
HEALTH_SERVICE = "grpc.health.v1.Health"
LAST_RESORT_SECONDS = 6.0
MAX_METADATA_BYTES = 16 * 2**10
MAX_CALLS_OF_A_CONNECTION = 128  # a call may hold a whole message before any limit of its account is looked at
SPARE_CONNECTIONS = 256  # for those who ask without a stream: admins, probes
OWN_DESCRIPTORS = 128  # the books, the log, metrics, what libraries open
HANDSHAKE_TIMEOUT_MS = 10_000
MAX_CONNECTION_IDLE_MS = 60_000
KEEPALIVE_MS = 60_000
KEEPALIVE_TIMEOUT_MS = 20_000
MESSAGE_HEADER_BYTES = 4096  # more than all of a message but its pictures or probabilities


class StartError(Exception):
    """The server cannot start; one line: expected, got, what to do."""


async def serve(config: ServerConfig, engine: Engine) -> None:
    """Serves until SIGINT or SIGTERM. Raises StartError and LedgerError before anything is served.

    For a process of its own: should something be stuck after the grace time, the process is ended without it.
    """
    config = _fitting(config, engine)
    certificates = _certificates(config)
    ledger = _books_in_memory(config) if config.ledger == IN_MEMORY else await _open_ledger(config)
    statistics = Statistics(max_accounts=config.metrics_max_accounts)

    def engine_called(call: EngineCall) -> None:
        metrics.engine_batch(call.picture_count, call.seconds, call.waited_seconds)
        statistics.engine_call(call)

    engine_pictures = min(config.max_engine_pictures, engine.batch_pictures)
    batcher = Batcher(
        engine.answer,
        max_batch_pictures=engine_pictures,
        max_queue_pictures=config.max_queue_pictures,
        calls_at_once=engine.calls_at_once,
        on_call=engine_called,
        is_quick=is_quick(engine, engine_pictures),
    )
    metrics = Metrics(
        max_accounts=config.metrics_max_accounts,
        queue_pictures=lambda: batcher.taken_pictures,
        is_ready=lambda: health.is_ready,
        model_digest=engine.model_digest,
    )
    if certificates is not None:
        metrics.certificate(certificates.expires_seconds)
    authenticator = Authenticator(ledger)
    limits = Limits(burst_pictures=config.max_batch_pictures, max_streams=config.max_streams)
    quota = QuotaServicer(ledger, authenticator)
    money_path = MoneyPath(
        engine=engine,
        ledger=ledger,
        batcher=batcher,
        metrics=metrics,
        limits=limits,
        statistics=statistics,
        config=config,
    )
    calls = Calls(money_path, authenticator, window_batches=config.window_batches)
    inference = InferenceServicer(calls, money_path, authenticator, engine, config)
    open_inference = kserve.KserveServicer(
        calls, money_path, authenticator, engine, statistics, config, is_ready=lambda: health.is_ready
    )
    gate = Gate(authenticator, limits)
    health = Health(SERVICES)
    server = grpc.aio.server(
        interceptors=(RpcMetrics(metrics), _authentication(authenticator, config), gate, Readable(kserve.BULK)),
        options=_channel_options(config),
    )
    teacher_inference_pb2_grpc.add_TeacherInferenceServicer_to_server(inference, server)
    add_GRPCInferenceServiceServicer_to_server(open_inference, server)
    quota_ledger_pb2_grpc.add_QuotaLedgerServicer_to_server(quota, server)
    _add_health_and_reflection(server, health, SERVICES)

    stopping = _Stopping(config.grace_seconds)
    try:
        address = _bind(server, config, certificates)
        metrics_port = _serve_metrics(metrics, config, certificates)
        batcher.start()
        await server.start()
        following = _now_ready(health, ledger)
        await _tell_if_empty(ledger)
        log.info("serving", address=address, metrics_port=metrics_port, model_digest=engine.model_digest)
        print(f"serving on {address}", flush=True)
        if config.ledger == IN_MEMORY:
            print(f"key {await _key_of_anyone(ledger)}", flush=True)
        await stopping.asked.wait()
        following.cancel()
        _no_longer_ready(health, gate, config)
        await stopping.within_grace(_all(calls.drain(), quota.drain()))
    finally:
        await server.stop(grace=1.0)
        await batcher.stop()
        money_path.stop()
        await ledger.close()
        stopping.books_are_closed()
    log.info("stopped")


async def serve_ledger(config: ServerConfig) -> None:
    """Serves the books alone, to teachers elsewhere, as ``serve`` does. Raises StartError and LedgerError."""
    if config.ledger.startswith(SCHEMES):
        raise StartError(f"--ledger-only: expected books of its own in --ledger, got {config.ledger}")
    certificates = _certificates(config)
    ledger = await _open_ledger(config)
    authenticator = Authenticator(ledger)
    quota = QuotaServicer(ledger, authenticator)
    gate = Gate(authenticator, Limits(burst_pictures=config.max_batch_pictures, max_streams=config.max_streams))
    health = Health((LEDGER_SERVICE,))
    metrics = Metrics(
        max_accounts=config.metrics_max_accounts, queue_pictures=lambda: 0, is_ready=lambda: health.is_ready
    )
    if certificates is not None:
        metrics.certificate(certificates.expires_seconds)
    server = grpc.aio.server(
        interceptors=(RpcMetrics(metrics), _authentication(authenticator, config), gate, Readable({})),
        options=_channel_options(config),
    )
    quota_ledger_pb2_grpc.add_QuotaLedgerServicer_to_server(quota, server)
    _add_health_and_reflection(server, health, (LEDGER_SERVICE,))
    stopping = _Stopping(config.grace_seconds)
    try:
        address = _bind(server, config, certificates)
        metrics_port = _serve_metrics(metrics, config, certificates)
        await server.start()
        following = _now_ready(health, ledger)
        await _tell_if_empty(ledger)
        log.info("serving the ledger", address=address, metrics_port=metrics_port)
        print(f"serving on {address}", flush=True)
        await stopping.asked.wait()
        following.cancel()
        _no_longer_ready(health, gate, config)
        await stopping.within_grace(quota.drain())
    finally:
        await server.stop(grace=1.0)
        await ledger.close()
        stopping.books_are_closed()
    log.info("stopped")


class _Stopping:
    """SIGINT or SIGTERM: the first asks for an orderly end, another one for an end at once.

    Whatever is stuck (an engine call that never returns, a store that does not let go) must not keep the process: a
    thread ends it when the grace time and ``LAST_RESORT_SECONDS`` have passed. By then the holds are given back, or
    lapse with this server's lease.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._hurry = asyncio.Event()
        self._exit_status = 1
        self.asked = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._ask)

    def _ask(self) -> None:
        if self.asked.is_set():
            self._hurry.set()
            self._end_after(LAST_RESORT_SECONDS)
        else:
            self.asked.set()
            self._end_after(self._grace_seconds + LAST_RESORT_SECONDS)

    async def within_grace(self, work: Coroutine[Any, Any, None]) -> None:
        """Waits for work, no longer than the grace time nor than a second signal."""
        tasks = [asyncio.create_task(work), asyncio.create_task(self._hurry.wait())]
        await asyncio.wait(tasks, timeout=self._grace_seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    def books_are_closed(self) -> None:
        """From here on nothing is lost when the process is ended."""
        self._exit_status = 0

    def _end_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        what = "the engine" if self._exit_status == 0 else "the ledger"
        log.error("ended without waiting any longer", waited_for=what)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self._exit_status)


async def _all(*work: Coroutine[Any, Any, None]) -> None:
    await asyncio.gather(*work)


def _authentication(authenticator: Authenticator, config: ServerConfig) -> AuthInterceptor:
    return AuthInterceptor(authenticator, certificates=config.tls_client_ca is not None)


def _add_health_and_reflection(server: grpc.aio.Server, health: Health, services: Sequence[str]) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((*services, HEALTH_SERVICE, reflection.SERVICE_NAME), server)


def _now_ready(health: Health, ledger: Ledger) -> "asyncio.Task[None]":
    health.set_ready(True)
    return asyncio.create_task(follow(ledger, health), name="ledger-follow")


def _no_longer_ready(health: Health, gate: Gate, config: ServerConfig) -> None:
    """First no traffic from balancers, then no new work."""
    health.set_ready(False)
    gate.draining = True
    log.info("draining", grace_seconds=config.grace_seconds)


def open_ledger(
    url: str,
    *,
    key: str = "",
    tls_ca: Path | None = None,
    insecure: bool = False,
    create: bool = True,
    lease_ms: int = LEASE_MS,
) -> Ledger:
    """The books at a URL, here or on another server. Raises LedgerError."""
    if url.startswith(SCHEMES):
        return RemoteLedger(url, key=key, tls_ca=tls_ca, insecure=insecure)
    return SqlLedger.open(url, create=create, lease_ms=lease_ms)


async def _open_ledger(config: ServerConfig) -> Ledger:
    if config.answers_keep_seconds is not None and config.ledger.startswith(SCHEMES):
        raise StartError(
            f"--answers-keep: expected books of its own in --ledger, got {config.ledger}; give it to that server"
        )
    ledger = open_ledger(
        config.ledger,
        key=config.ledger_key,
        tls_ca=config.ledger_ca,
        insecure=config.ledger_insecure,
        create=False,  # a mistyped path, or a volume that is not there, is no new business
        lease_ms=round(config.lease_seconds * 1000),
    )
    try:
        if isinstance(ledger, RemoteLedger):
            await ledger.begin()  # a wrong key or address is told now, and not to the first customer
        if isinstance(ledger, SqlLedger) and config.answers_keep_seconds is not None:
            ledger.begin_pruning(round(config.answers_keep_seconds * 1000))
    except BaseException:
        await ledger.close()
        raise
    return ledger


async def _tell_if_empty(ledger: Ledger) -> None:
    """Warns of a ledger without accounts: maybe it is not the one that was meant."""
    if not isinstance(ledger, SqlLedger):
        return
    with contextlib.suppress(LedgerError):  # a store that is away just now is health's matter
        if not await ledger.accounts(limit=1):
            log.warning("the ledger has no account: every key is refused until teacher-admin makes one")


def _books_in_memory(config: ServerConfig) -> Ledger:
    """Books for measuring what a durable ledger costs. StartError beyond loopback: nobody is to sell by them."""
    if not is_loopback(config.listen.rpartition(":")[0]):
        raise StartError(f"--ledger {IN_MEMORY} is for measurements on loopback, got --listen {config.listen}")
    log.warning("the books are in memory: for measurements, and lost at exit")
    return MemoryLedger()


async def _key_of_anyone(books: Ledger) -> str:
    """Makes the one account of books in memory, of as many pictures as books can count; returns its key."""
    text, stored = new_key("anyone")
    await books.create_account("anyone", MAX_COUNT, stored)
    return text


def _fitting(config: ServerConfig, engine: Engine) -> ServerConfig:
    """Limits that fit each other: what Describe promises must pass through message size and queue. StartError.

    What gRPC reads does not shrink with the model: a batch that was paid for under a larger one is repeated whole,
    and posts of teachers elsewhere are as large as their answers.
    """
    # The largest answer is a top-k one that names every class: a float and an index, a varint, for each.
    index_bytes = max(1, -(-(len(engine.labels) - 1).bit_length() // 7))
    picture_bytes = max(engine.channels * engine.height * engine.width, (4 + index_bytes) * len(engine.labels))
    most = (config.max_message_bytes - MESSAGE_HEADER_BYTES) // picture_bytes
    if most < 1:
        raise StartError(
            f"expected a picture and its answer to fit into a message of {config.max_message_bytes} bytes, "
            f"they take {picture_bytes}"
        )
    config = dataclasses.replace(config, max_batch_pictures=min(config.max_batch_pictures, most))
    if config.max_queue_pictures < config.max_batch_pictures:
        raise StartError(
            f"--max-queue-pictures: expected at least --max-batch-pictures ({config.max_batch_pictures}), "
            f"got {config.max_queue_pictures}"
        )
    return config


def _raise_descriptor_limit(wanted: int) -> None:
    """Every connection is a file descriptor: takes as many as this process may; a line in the log if that is less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):  # less than the hard limit is allowed where the kernel has its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < wanted:
        log.warning("few file descriptors for --max-streams: raise the limit", allowed=allowed, wanted=wanted)


def _channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        # Refused by gRPC itself, before a message is decoded.
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        # Of one connection; a client waits with the next one. A proxy may bring many callers over one.
        ("grpc.max_concurrent_streams", MAX_CALLS_OF_A_CONNECTION),
        # Of the server: every stream may have one of its own. Further ones are closed at once.
        ("grpc.max_allowed_incoming_connections", config.max_streams + SPARE_CONNECTIONS),
        # All share those: who holds a connection without a call, key or not, must not keep it from others.
        ("grpc.max_connection_idle_ms", MAX_CONNECTION_IDLE_MS),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        # Without this a second server on the same port starts without a word and takes half of the calls.
        ("grpc.so_reuseport", 0),
        # Agents behind NAT ping every 30 s, also while nothing is said; the default would end their streams as
        # floods. Who pings more often than every 10 s is cut off after the third time.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 2),
        # An agent that died without a word gives back its streams' places when it leaves these unanswered.
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # The one above is not obeyed on its own: measured with grpcio 1.85.1, where a minute is the default.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ]


def _certificates(config: ServerConfig) -> Certificates | None:
    """What --tls-cert and the flags beside it name. Raises StartError."""
    if config.tls_cert is None or config.tls_key is None:
        if config.tls_cert or config.tls_key:
            raise StartError("expected --tls-cert and --tls-key together, got one of them")
        if config.tls_client_ca:
            raise StartError("--tls-client-ca: expected --tls-cert and --tls-key with it, got neither")
        return None
    try:
        return Certificates(config.tls_cert, config.tls_key, config.tls_client_ca)
    except TlsError as error:
        raise StartError(str(error)) from None


def check(config: ServerConfig) -> None:
    """Refuses what ``serve`` would refuse without a model: loading one may take long. Raises StartError."""
    certificates = _certificates(config)
    _listening_on(config, certificates)
    _metrics_certificates(config, certificates)


def _listening_on(config: ServerConfig, certificates: Certificates | None) -> str:
    """The host that --listen names, where a server may and can listen. Raises StartError."""
    host, _, port = config.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise StartError(f"--listen: expected HOST:PORT, got {config.listen!r}")
    if certificates is None and not is_loopback(host) and not config.insecure_listen:
        raise StartError(
            f"--listen {config.listen} is not loopback: give --tls-cert and --tls-key, "
            "or --insecure-listen if keys and pictures may travel unencrypted"
        )
    try:
        _try_address(host.strip("[]"), int(port))
    except OSError as error:
        raise _cannot_listen(config, error.strerror) from None
    return host


def _bind(server: grpc.aio.Server, config: ServerConfig, certificates: Certificates | None) -> str:
    """Binds the port and returns HOST:PORT. Raises StartError."""
    host = _listening_on(config, certificates)
    _raise_descriptor_limit(config.max_streams + SPARE_CONNECTIONS + OWN_DESCRIPTORS)
    try:
        if certificates is not None:
            bound = server.add_secure_port(config.listen, certificates.credentials())
        else:
            bound = server.add_insecure_port(config.listen)
    except RuntimeError as error:
        raise _cannot_listen(config, error) from None
    return f"{host}:{bound}"


def _cannot_listen(config: ServerConfig, reason: object) -> StartError:
    return StartError(f"cannot listen on {config.listen}: {reason}; give another --listen (port 0 picks a free one)")


def _try_address(host: str, port: int) -> None:
    """Binds and lets go, because gRPC itself would not say why it cannot. Raises OSError."""
    failure: OSError | None = None
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:  # one of a name's addresses is enough, but none may be another server's
            if error.errno == errno.EADDRINUSE or len(found) == 1:
                raise
            failure = error
        else:
            return
    if failure is not None:
        raise failure


def _metrics_certificates(config: ServerConfig, certificates: Certificates | None) -> Certificates | None:
    """Plain HTTP on loopback (None); beyond it as --listen: with TLS, or with leave. Raises StartError."""
    host = config.metrics_host.strip("[]")
    if is_loopback(host):
        return None
    if certificates is None and not config.insecure_listen:
        raise StartError(
            f"--metrics-host {host} is not loopback: give --tls-cert and --tls-key, "
            "or --insecure-listen if metrics may travel unencrypted"
        )
    return certificates


def _serve_metrics(metrics: Metrics, config: ServerConfig, certificates: Certificates | None) -> int | None:
    """Returns the port; None where none is wanted. Raises StartError."""
    if config.metrics_port is None:
        return None
    shown = _metrics_certificates(config, certificates)
    try:
        return metrics.serve(config.metrics_host.strip("[]"), config.metrics_port, shown.context if shown else None)
    except OSError as error:
        of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)  # the latter: a port that is for root alone
        advice = "--metrics-port (0 picks a free one)" if of_port else "--metrics-host"
        raise StartError(
            f"--metrics-host {config.metrics_host}, --metrics-port {config.metrics_port}: {error.strerror}; "
            f"give another {advice}"
        ) from None
