"""The life of the server process, top-down: build, start, wait for SIGINT or SIGTERM, drain, stop."""

import asyncio
import contextlib
import ipaddress
import signal
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos.mekd.v1 import quota_ledger_pb2_grpc, teacher_inference_pb2_grpc
from teacher_service.auth import Authenticator, AuthInterceptor
from teacher_service.batcher import Batcher
from teacher_service.config import ServerConfig
from teacher_service.engine import Engine
from teacher_service.inference import InferenceServicer, MoneyPath
from teacher_service.ledger import Ledger
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_sql import SqlLedger
from teacher_service.metrics import Metrics
from teacher_service.quota import QuotaServicer

log = structlog.get_logger()

SERVICES = ("mekd.v1.TeacherInference", "mekd.v1.QuotaLedger")


class StartError(Exception):
    """The server cannot start; one line: expected, got, what to do."""


def open_ledger(url: str, *, create: bool = True) -> Ledger:
    """The books at ``sqlite:///FILE`` or ``memory:``. Raises LedgerError."""
    return MemoryLedger() if url == "memory:" else SqlLedger.open(url, create=create)


async def serve(config: ServerConfig, engine: Engine) -> None:
    """Serves until SIGINT or SIGTERM. Raises StartError and LedgerError before anything is served."""
    ledger = open_ledger(config.ledger)
    batcher = Batcher(
        engine.answer,
        max_batch_pictures=config.max_engine_pictures,
        max_queue_pictures=config.max_queue_pictures,
        on_batch=lambda pictures: metrics.engine_batch(pictures),
    )
    metrics = Metrics(max_accounts=config.metrics_max_accounts, queue_pictures=lambda: batcher.taken_pictures)
    authenticator = Authenticator(ledger)
    money_path = MoneyPath(engine=engine, ledger=ledger, batcher=batcher, metrics=metrics, config=config)
    inference = InferenceServicer(money_path, authenticator, engine, config)
    readiness = health.aio.HealthServicer()
    server = grpc.aio.server(
        interceptors=(AuthInterceptor(authenticator),), options=_channel_options(config.max_message_bytes)
    )
    teacher_inference_pb2_grpc.add_TeacherInferenceServicer_to_server(inference, server)
    quota_ledger_pb2_grpc.add_QuotaLedgerServicer_to_server(QuotaServicer(ledger, authenticator), server)
    health_pb2_grpc.add_HealthServicer_to_server(readiness, server)

    stop_asked = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop_asked.set)
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
            await asyncio.wait_for(inference.drain(), config.grace_seconds)
    finally:
        await server.stop(grace=1.0)
        money_path.stop()
        await batcher.stop()
        await ledger.close()
        log.info("stopped")


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
    try:
        if config.tls_cert and config.tls_key:
            pair = (_read(config.tls_key, "--tls-key"), _read(config.tls_cert, "--tls-cert"))
            bound = server.add_secure_port(config.listen, grpc.ssl_server_credentials([pair]))
        elif config.tls_cert or config.tls_key:
            raise StartError("expected --tls-cert and --tls-key together, got one of them")
        elif is_loopback(host) or config.insecure_listen:
            bound = server.add_insecure_port(config.listen)
        else:
            raise StartError(
                f"--listen {config.listen} is not loopback: give --tls-cert and --tls-key, "
                "or --insecure-listen if keys and pictures may travel unencrypted"
            )
    except RuntimeError:
        raise StartError(
            f"cannot listen on {config.listen}: the port is in use or the address is not this host's; "
            "give another --listen (port 0 picks a free one)"
        ) from None
    if bound == 0:
        raise StartError(f"cannot listen on {config.listen}: check certificate and key, or the address")
    return f"{host}:{bound}"


def _serve_metrics(metrics: Metrics, config: ServerConfig) -> int:
    try:
        return metrics.serve("127.0.0.1", config.metrics_port)
    except OSError as error:
        raise StartError(
            f"--metrics-port {config.metrics_port}: {error.strerror}; give another (0 picks a free one)"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether a host name or address never leaves this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{flag} {path}: {error.strerror}") from None
