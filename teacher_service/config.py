"""One frozen config, built once at the entry; leaves get plain values. Every limit carries its unit in its name."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

METRICS_PORT = 9464


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What ``teacher-serve`` was asked to do."""

    model_given: dict[str, object] = field(default_factory=dict)
    """Facts of the model from the command line; they complete the file's own (``networks.modelfile``)."""
    model_name: str = "teacher"
    """The model's name in the Open Inference Protocol."""
    listen: str = "127.0.0.1:50051"
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = METRICS_PORT
    """None: no metrics."""
    ledger: str = "sqlite:///mekd-ledger.db"
    ledger_key: str = field(default="", repr=False)
    """Of a ledger elsewhere: this teacher's credential there."""
    ledger_ca: Path | None = None
    ledger_insecure: bool = False
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    """torch.compile on a CPU, graphs on CUDA."""
    engine_threads: int | None = None
    """Of the engine on a CPU; None: fitting the machine."""
    answers: Literal["soft", "hard"] = "soft"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """Given: every client must show a certificate that this authority signed."""
    insecure_listen: bool = False
    max_batch_pictures: int = 512
    """Most pictures in one message."""
    max_engine_pictures: int = 512
    """Most pictures in one engine call; fewer where the engine gains nothing by so many."""
    max_queue_pictures: int = 8192
    """Most pictures waiting or being answered, over all callers; beyond it a batch is refused as OVERLOADED."""
    max_streams: int = 10_000
    """Most streams open at once, over all callers."""
    window_batches: int = 8
    """Batches one stream may have unanswered; the server reads no further."""
    max_message_bytes: int = 64 * 2**20
    """Most that a message may have, whoever sends it: gRPC reads each whole before any other limit is looked at."""
    grace_seconds: float = 20.0
    """After SIGTERM: how long batches under way may take."""
    lease_seconds: float = 10.0
    """How long the holds of a server that died stand, at least; of SQLite and PostgreSQL."""
    answers_keep_seconds: float | None = None
    """How long the bytes of an answer are kept for repeats of its batch; None: as long as the journal."""
    metrics_max_accounts: int = 200
    """Accounts with metrics of their own; further ones share those of `other`."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address never leaves this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
