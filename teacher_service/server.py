"""The life of the server process, top-down: build, start, wait for SIGINT or SIGTERM, drain, stop."""

import asyncio
import contextlib
import dataclasses
import errno
import signal
import socket
import ssl
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos.mekd.v1 import quota_ledger_pb2_grpc, teacher_inference_pb2_grpc
from teacher_service.auth import Authenticator, AuthInterceptor
from teacher_service.batcher import Batcher
from teacher_service.config import ServerConfig, is_loopback
from teacher_service.engine import Engine
from teacher_service.inference import InferenceServicer, MoneyPath
from teacher_service.ledger import Ledger
from teacher_service.ledger_remote import SCHEMES, RemoteLedger
from teacher_service.ledger_sql import LEASE_MS, SqlLedger
from teacher_service.metrics import Metrics
from teacher_service.quota import QuotaServicer

log = structlog.get_logger()

LEDGER_SERVICE = "mekd.v1.QuotaLedger"
SERVICES = ("mekd.v1.TeacherInference", LEDGER_SERVICE)
MESSAGE_HEADER_BYTES = 4096  # more than all of a message but its pictures or probabilities


class StartError(Exception):
    """The server cannot start; one line: expected, got, what to do."""


async def serve(config: ServerConfig, engine: Engine) -> None:
    """Serves until SIGINT or SIGTERM. Raises StartError and LedgerError before anything is served."""
    config = _fitting(config, engine)
    ledger = await _open_ledger(config)
    batcher = Batcher(
        engine.answer,
        max_batch_pictures=config.max_engine_pictures,
        max_queue_pictures=config.max_queue_pictures,
        on_batch=lambda pictures: metrics.engine_batch(pictures),
    )
    metrics = Metrics(max_accounts=config.metrics_max_accounts, queue_pictures=lambda: batcher.taken_pictures)
    authenticator = Authenticator(ledger)
    quota = QuotaServicer(ledger, authenticator)
    money_path = MoneyPath(engine=engine, ledger=ledger, batcher=batcher, metrics=metrics, config=config)
    inference = InferenceServicer(money_path, authenticator, engine, config)
    readiness = health.aio.HealthServicer()
    server = grpc.aio.server(
        interceptors=(AuthInterceptor(authenticator),), options=_channel_options(config.max_message_bytes)
    )
    teacher_inference_pb2_grpc.add_TeacherInferenceServicer_to_server(inference, server)
    quota_ledger_pb2_grpc.add_QuotaLedgerServicer_to_server(quota, server)
    health_pb2_grpc.add_HealthServicer_to_server(readiness, server)

    stop_asked = _stop_asked()
    try:
        address = _bind(server, config)
        metrics_port = _serve_metrics(metrics, config)
        batcher.start()
        await server.start()
        for name in ("", *SERVICES):
            await readiness.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", address=address, metrics_port=metrics_port, model_digest=engine.model_digest)
        print(f"serving on {address}", flush=True)
        await stop_asked.wait()
        log.info("draining", grace_seconds=config.grace_seconds)
        await readiness.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(inference.drain(), quota.drain()), config.grace_seconds)
    finally:
        await server.stop(grace=1.0)
        money_path.stop()
        await batcher.stop()
        await ledger.close()
    log.info("stopped")


async def serve_ledger(config: ServerConfig) -> None:
    """Serves the books alone, to teachers elsewhere, until SIGINT or SIGTERM. Raises StartError and LedgerError."""
    if config.ledger.startswith(SCHEMES):
        raise StartError(f"--ledger-only: expected books of its own in --ledger, got {config.ledger}")
    ledger = await _open_ledger(config)
    authenticator = Authenticator(ledger)
    quota = QuotaServicer(ledger, authenticator)
    readiness = health.aio.HealthServicer()
    server = grpc.aio.server(
        interceptors=(AuthInterceptor(authenticator),), options=_channel_options(config.max_message_bytes)
    )
    quota_ledger_pb2_grpc.add_QuotaLedgerServicer_to_server(quota, server)
    health_pb2_grpc.add_HealthServicer_to_server(readiness, server)
    stop_asked = _stop_asked()
    try:
        address = _bind(server, config)
        await server.start()
        for name in ("", LEDGER_SERVICE):
            await readiness.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("serving the ledger", address=address)
        print(f"serving on {address}", flush=True)
        await stop_asked.wait()
        log.info("draining")
        await readiness.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(quota.drain(), config.grace_seconds)
    finally:
        await server.stop(grace=1.0)
        await ledger.close()
    log.info("stopped")


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
        lease_ms=round(config.lease_seconds * 1000),
    )
    if isinstance(ledger, SqlLedger) and config.answers_keep_seconds is not None:
        ledger.begin_pruning(round(config.answers_keep_seconds * 1000))
    if isinstance(ledger, RemoteLedger):
        try:
            await ledger.begin()  # a wrong key or address is told now, and not to the first customer
        except BaseException:
            await ledger.close()
            raise
    return ledger


def _stop_asked() -> asyncio.Event:
    stop_asked = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop_asked.set)
    return stop_asked


def _fitting(config: ServerConfig, engine: Engine) -> ServerConfig:
    """Limits that fit each other: what Describe promises must pass through message size and queue. StartError."""
    picture_bytes = max(engine.channels * engine.height * engine.width, 4 * len(engine.labels))
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


def _channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Without this a second server on the same port starts without a word and takes half of the calls.
        ("grpc.so_reuseport", 0),
        # Agents behind NAT ping every 30 s; the default would end their streams as floods.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    """Binds the port and returns HOST:PORT. Raises StartError."""
    host, _, port = config.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise StartError(f"--listen: expected HOST:PORT, got {config.listen!r}")
    credentials = None
    if config.tls_cert and config.tls_key:
        credentials = _tls(config.tls_cert, config.tls_key)
    elif config.tls_cert or config.tls_key:
        raise StartError("expected --tls-cert and --tls-key together, got one of them")
    elif not is_loopback(host) and not config.insecure_listen:
        raise StartError(
            f"--listen {config.listen} is not loopback: give --tls-cert and --tls-key, "
            "or --insecure-listen if keys and pictures may travel unencrypted"
        )
    try:
        _try_address(host.strip("[]"), int(port))
        if credentials is not None:
            bound = server.add_secure_port(config.listen, credentials)
        else:
            bound = server.add_insecure_port(config.listen)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StartError(
            f"cannot listen on {config.listen}: {reason}; give another --listen (port 0 picks a free one)"
        ) from None
    return f"{host}:{bound}"


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


def _tls(cert: Path, key: Path) -> grpc.ServerCredentials:
    pair = (_read(key, "--tls-key"), _read(cert, "--tls-cert"))
    try:  # gRPC itself would take any bytes here, and fail later without a reason
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        raise StartError(
            f"--tls-cert {cert}, --tls-key {key}: expected a PEM certificate and its unencrypted private key "
            f"({error.reason or error})"
        ) from None
    return grpc.ssl_server_credentials([pair])


def _serve_metrics(metrics: Metrics, config: ServerConfig) -> int:
    try:
        return metrics.serve("127.0.0.1", config.metrics_port)
    except OSError as error:
        raise StartError(
            f"--metrics-port {config.metrics_port}: {error.strerror}; give another (0 picks a free one)"
        ) from None


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{flag} {path}: {error.strerror}") from None
