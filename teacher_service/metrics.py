"""Every Prometheus metric of the server, declared once, with its unit."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

OTHER = "other"
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """What the server counts. Label values that clients choose are bounded: beyond ``max_accounts`` it is "other"."""

    def __init__(self, *, max_accounts: int, queue_pictures: Callable[[], int]) -> None:
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
        self._duration = Histogram(
            "mekd_request_duration_seconds",
            "From a batch read to its answer ready to send.",
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
        self._balance = Gauge(
            "mekd_account_balance_pictures",
            "Pictures an account may still hold, as of its last batch here.",
            ["account"],
            registry=self.registry,
        )
        self.registry.register(_QueueCollector(queue_pictures))

    def batch_done(self, *, protocol: str, account: str, outcome: str, pictures: int, seconds: float) -> None:
        """One batch answered ("charged", "replayed"), refused (the reason's name, lower case), failed or departed."""
        self._requests.labels(protocol, outcome).inc()
        self._duration.labels(protocol).observe(seconds)
        self._pictures.labels(self._bounded(account), outcome).inc(pictures)

    def engine_batch(self, pictures: int) -> None:
        """One engine call."""
        self._engine_batch.observe(pictures)

    def balance(self, account: str, pictures: int) -> None:
        """An account's balance; "other" has none."""
        if self._bounded(account) != OTHER:
            self._balance.labels(account).set(pictures)

    def serve(self, host: str, port: int) -> int:
        """Serves /metrics over HTTP from a thread of its own; returns the port. Raises OSError."""
        server, _thread = start_http_server(port, host, self.registry)
        return int(server.server_port)

    def _bounded(self, account: str) -> str:
        if account not in self._accounts:
            if len(self._accounts) >= self._max_accounts:
                return OTHER
            self._accounts.add(account)
        return account


class _QueueCollector(Collector):
    def __init__(self, queue_pictures: Callable[[], int]) -> None:
        self._queue_pictures = queue_pictures

    def collect(self) -> list[GaugeMetricFamily]:
        depth = self._queue_pictures()
        return [
            GaugeMetricFamily("mekd_queue_pictures", "Pictures in places taken and not yet answered.", value=depth)
        ]
