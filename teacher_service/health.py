"""grpc.health.v1: whether this server is alive, and whether it can sell answers just now.

Two kinds of names: ``LIVENESS`` says SERVING for as long as the process works at all, the others (the empty name, and
every service's) only while the ledger can be read and written and the server is not stopping. Unlike the servicer of
grpcio-health-checking this one holds no lock while it writes, so a watcher that does not read holds up nobody.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2 as wire
from grpc_health.v1.health_pb2_grpc import HealthServicer

from protos.errors import Refusal
from teacher_service.ledger import Ledger, LedgerError, LedgerRefusesKey

log = structlog.get_logger()

LIVENESS = "liveness"
PROBE_SECONDS = 2.0
PROBE_TIMEOUT_SECONDS = 3.0

Status = wire.HealthCheckResponse


class Health(HealthServicer):
    """The state of each name, to whoever asks or watches."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = ("", *names)
        self._status: dict[str, Any] = dict.fromkeys(self._names, Status.NOT_SERVING)
        self._status[LIVENESS] = Status.SERVING
        self._changed = asyncio.Event()

    def set_ready(self, ready: bool) -> None:
        """Changes every name but liveness."""
        self._status.update(dict.fromkeys(self._names, Status.SERVING if ready else Status.NOT_SERVING))
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """What the empty name says."""
        return bool(self._status[""] == Status.SERVING)

    async def Check(self, request: wire.HealthCheckRequest, context: Any) -> wire.HealthCheckResponse:
        """The state of one name; NOT_FOUND for one that is not there."""
        status = self._status.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of this name")
        return Status(status=status)

    async def List(self, request: Any, context: Any) -> Any:
        """The state of every name."""
        return wire.HealthListResponse(  # type: ignore[attr-defined]  # newer than its stubs
            statuses={name: Status(status=now) for name, now in self._status.items()}
        )

    async def Watch(self, request: wire.HealthCheckRequest, context: Any) -> AsyncIterator[wire.HealthCheckResponse]:
        """The state of one name, now and whenever it has changed."""
        last = None
        while True:
            changed = self._changed
            status = self._status.get(request.service, Status.SERVICE_UNKNOWN)
            if status == last:
                await changed.wait()
                continue
            last = status
            yield Status(status=status)


async def follow(ledger: Ledger, health: Health) -> None:
    """Not ready while the ledger cannot be read or written, ready when it is back; for ever."""
    told = ""  # of the ledger: nothing, "away" or "refuses", since it was last there
    probe: asyncio.Task[Exception | None] | None = None
    try:
        while True:
            # A probe that hangs is waited for and not joined by others: what is away is asked once at a time.
            probe = probe or asyncio.create_task(_problem(ledger), name="ledger-probe")
            await asyncio.wait({probe}, timeout=PROBE_TIMEOUT_SECONDS)
            problem = probe.result() if probe.done() else TimeoutError(f"no answer in {PROBE_TIMEOUT_SECONDS:g} s")
            probe = None if probe.done() else probe
            before = told
            if problem is None:
                told = ""
            elif isinstance(problem, LedgerRefusesKey):  # which does not end by itself
                told = "refuses"
            else:
                told = told or "away"  # there are many ways to be, one after the other
            if bool(told) != bool(before):
                health.set_ready(not told)
            if told and told != before:
                log.error("ledger is away, not ready until it is back", problem=str(problem))
            elif before and not told:
                log.info("ledger is back")
            await asyncio.sleep(PROBE_SECONDS)
    finally:
        if probe is not None:
            probe.cancel()


async def _problem(ledger: Ledger) -> Exception | None:
    """Why the ledger does not answer; None where it does."""
    try:
        await ledger.check()
    except (LedgerError, Refusal) as error:
        return error
    return None
