"""Every Prometheus metric of the server, declared once, with its unit."""

import contextlib
import functools
import itertools
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from socketserver import ThreadingMixIn
from typing import Any, Literal, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

OTHER = "other"
PROTOCOLS = ("mekd", "kserve")
ANSWERED_OUTCOMES = ("charged", "replayed")
# By alerts.
WATCHED_OUTCOMES = ("ledger_unavailable", "engine_failed", "failed", "overloaded", "hold_lost", "ledger_refused")
_GO_CODES = {"OK": "OK", "CANCELLED": "Canceled"}  # the others differ by case and underscores alone
_HTTP_TIMEOUT_SECONDS = 10.0  # for any one read
_HTTP_WHOLE_SECONDS = 30.0
_HTTP_CONNECTIONS = 16
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """What the server counts. Label values that clients choose are bounded: beyond ``max_accounts`` it is "other".

    ``model_digest`` is of the model that answers; empty where there is none.
    """

    def __init__(
        self,
        *,
        max_accounts: int,
        queue_pictures: Callable[[], int],
        is_ready: Callable[[], bool],
        model_digest: str = "",
    ) -> None:
        self.registry = CollectorRegistry()
        self._max_accounts = max_accounts
        self._accounts: set[str] = set()
        self._pictures = Counter(
            "mekd_pictures_total", "Pictures, by account and outcome.", ["account", "outcome"], registry=self.registry
        )
        self._requests = Counter(
            "mekd_requests_total",
            "Batches, by protocol and outcome.",
            ["protocol", "outcome"],
            registry=self.registry,
        )
        # From the start, so that the first of them is an increase: a counter that only then appears shows none.
        for protocol, outcome in itertools.product(PROTOCOLS, WATCHED_OUTCOMES):
            self._requests.labels(protocol, outcome)
        self._duration = Histogram(
            "mekd_request_duration_seconds",
            "From a batch read to its answer ready to send, of batches that got one.",
            ["protocol"],
            buckets=_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._engine_batch = Histogram(
            "mekd_engine_batch_pictures",
            "Pictures in one engine call.",
            buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )
        self._engine_seconds = Histogram(
            "mekd_engine_seconds", "One engine call.", buckets=_SECONDS_BUCKETS, registry=self.registry
        )
        self._queue_wait = Histogram(
            "mekd_queue_wait_seconds",
            "From a batch held to the engine's beginning with it.",
            buckets=_SECONDS_BUCKETS,
            registry=self.registry,
        )
        ledger_seconds = Histogram(
            "mekd_ledger_seconds",
            "One call of the books, by what it does: hold or post.",
            ["operation"],
            buckets=_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._ledger_timers = {name: ledger_seconds.labels(name) for name in ("hold", "post")}
        self._balance = Gauge(
            "mekd_account_balance_pictures",
            "Pictures an account may still hold, as of its last charge here.",
            ["account"],
            registry=self.registry,
        )
        self.registry.register(_QueueCollector(queue_pictures))
        Gauge(
            "mekd_ready",
            "1 while the ledger can be read and written and the server is not stopping, else 0.",
            registry=self.registry,
        ).set_function(is_ready)
        Info("mekd_build", "What runs here.", registry=self.registry).info(
            {"version": version("mekd"), "model_digest": model_digest}
        )
        # To find a counter by its labels costs more than to count; as many as the registry has, at most.
        self._batches: dict[tuple[str, str, str], _BatchCounters] = {}
        self._balances: dict[str, Gauge] = {}
        self._rpcs: dict[tuple[str, str, str], RpcCounters] = {}
        rpc = ["grpc_type", "grpc_service", "grpc_method"]
        self._rpc_started = Counter("grpc_server_started_total", "Calls begun.", rpc, registry=self.registry)
        self._rpc_handled = Counter(
            "grpc_server_handled_total", "Calls ended, by their code.", [*rpc, "grpc_code"], registry=self.registry
        )
        self._rpc_received = Counter(
            "grpc_server_msg_received_total", "Messages that were read.", rpc, registry=self.registry
        )
        self._rpc_sent = Counter(
            "grpc_server_msg_sent_total", "Messages that were sent.", rpc, registry=self.registry
        )
        self._rpc_seconds = Histogram(
            "grpc_server_handling_seconds", "From a call's begin to its end.", rpc, registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def batch_done(self, *, protocol: str, account: str, outcome: str, pictures: int, seconds: float) -> None:
        """One batch answered ("charged", "replayed"), refused (the reason's name, lower case), failed or departed."""
        counters = self._batches.get((protocol, account, outcome))
        if counters is None:
            bounded = self._bounded(account)
            counters = _BatchCounters(
                requests=self._requests.labels(protocol, outcome),
                duration=self._duration.labels(protocol),
                pictures=self._pictures.labels(bounded, outcome),
            )
            if bounded == account:  # of the others there is no end
                self._batches[protocol, account, outcome] = counters
        counters.requests.inc()
        if outcome in ANSWERED_OUTCOMES:  # refusals cost next to nothing: among them slow answers would not show
            counters.duration.observe(seconds)
        counters.pictures.inc(pictures)

    def engine_batch(self, pictures: int, seconds: float, waited_seconds: Iterable[float]) -> None:
        """One engine call, and how long each batch of a caller in it had waited for it."""
        self._engine_batch.observe(pictures)
        self._engine_seconds.observe(seconds)
        for waited in waited_seconds:
            self._queue_wait.observe(waited)

    def ledger(self, operation: Literal["hold", "post"]) -> AbstractContextManager[object]:
        """Times what is inside, however it ends."""
        return self._ledger_timers[operation].time()

    def balance(self, account: str, pictures: int) -> None:
        """An account's balance; "other" has none."""
        balance = self._balances.get(account)
        if balance is None:
            if self._bounded(account) == OTHER:
                return
            balance = self._balances[account] = self._balance.labels(account)
        balance.set(pictures)

    def certificate(self, expires_seconds: Callable[[], float]) -> None:
        """From here on it is told when the server's certificate expires, asked at each scrape."""
        Gauge(
            "mekd_tls_certificate_expiry_timestamp_seconds",
            "When the first certificate of --tls-cert expires, since 1970.",
            registry=self.registry,
        ).set_function(expires_seconds)

    def serve(self, host: str, port: int, tls: Callable[[], ssl.SSLContext] | None = None) -> int:
        """Serves /metrics from threads of its own and returns the port. Raises OSError.

        ``tls`` gives what a connection that begins now is encrypted with; None: plain HTTP.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        kind = type("Server", (_HttpServer,), {"address_family": family})
        server: _HttpServer = make_server(host, port, make_wsgi_app(self.registry), kind, _QuietHandler)
        server.tls = tls
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        return int(server.server_port)

    def rpc(self, kind: str, service: str, method: str) -> "RpcCounters":
        """The counters of one method of ours; the names of others are callers' own and stay out: ``rpc_unknown``."""
        names = (kind, service, method)
        if names not in self._rpcs:
            handled = functools.cache(lambda code: self._rpc_handled.labels(*names, code))
            handled("OK")  # from the start, so that calls begun less calls ended is a number before the first end
            self._rpcs[names] = RpcCounters(
                started=self._rpc_started.labels(*names).inc,
                received=self._rpc_received.labels(*names).inc,
                sent=self._rpc_sent.labels(*names).inc,
                ended=lambda code: handled(code).inc(),
                took_seconds=self._rpc_seconds.labels(*names).observe,
            )
        return self._rpcs[names]

    def rpc_unknown(self) -> None:
        """A call of a method that is not there."""
        counters = self.rpc(OTHER, OTHER, OTHER)
        counters.started()
        counters.handled("UNIMPLEMENTED", 0.0)

    def _bounded(self, account: str) -> str:
        if account not in self._accounts:
            if len(self._accounts) >= self._max_accounts:
                return OTHER
            self._accounts.add(account)
        return account


class _BatchCounters(NamedTuple):
    """What is counted of batches alike."""

    requests: Counter
    duration: Histogram
    pictures: Counter


@dataclass(frozen=True, kw_only=True)
class RpcCounters:
    """What is counted of one method."""

    started: Callable[[], None]
    received: Callable[[], None]
    sent: Callable[[], None]
    ended: Callable[[str], None]
    took_seconds: Callable[[float], None]

    def handled(self, code: str, seconds: float) -> None:
        """One call ended; ``code`` as gRPC's libraries write it in Python, in the metric as in Go."""
        self.ended(_GO_CODES.get(code) or code.title().replace("_", ""))
        self.took_seconds(seconds)


class _HttpServer(ThreadingMixIn, WSGIServer):
    """A thread a connection, which makes the TLS handshake too: a silent client holds up nobody but itself.

    There are ``_HTTP_CONNECTIONS`` at once, each for ``_HTTP_WHOLE_SECONDS`` at most; further ones are closed.
    """

    daemon_threads = True
    tls: Callable[[], ssl.SSLContext] | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._places = threading.BoundedSemaphore(_HTTP_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread to be had
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(_HTTP_TIMEOUT_SECONDS)
            if self.tls is not None:
                request = self.tls().wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            # Who sends a byte now and then is within the time for any one read, for ever.
            end = threading.Timer(_HTTP_WHOLE_SECONDS, _cut_off, (request,))
            end.daemon = True
            end.start()
            try:
                if self.tls is not None:
                    request.do_handshake()
                super().process_request_thread(request, client_address)
            finally:
                end.cancel()
        except OSError:  # a timeout and a failed handshake are some
            self.shutdown_request(request)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that went away is no news."""


def _cut_off(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of TLS, too, without its farewell


class _QuietHandler(WSGIRequestHandler):
    timeout = _HTTP_TIMEOUT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


class _QueueCollector(Collector):
    def __init__(self, queue_pictures: Callable[[], int]) -> None:
        self._queue_pictures = queue_pictures

    def collect(self) -> list[GaugeMetricFamily]:
        depth = self._queue_pictures()
        return [
            GaugeMetricFamily("mekd_queue_pictures", "Pictures in places taken and not yet answered.", value=depth)
        ]
