"""What was done for each account, in the words of Triton's ModelStatistics. No grpc, no torch."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from teacher_service.batcher import EngineCall


@dataclass
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        """One more."""
        self.add_ns(_ns(seconds))

    def add_ns(self, ns: int) -> None:
        """The same in whole nanoseconds, for what is added to several."""
        self.count += 1
        self.ns += ns


@dataclass
class BatchCounters:
    """The computing of all batches of one size."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class Parts:
    """How long the parts of one batch took, in seconds; 0 for what it did not come to."""

    input: float = 0.0
    """Decoding."""
    wait: float = 0.0
    """From the queue to the engine's answer."""
    output: float = 0.0
    """What the account's terms make of the answer."""


@dataclass
class Counters:
    """Since the server started. Batches refused before they reached the money path are in none of these."""

    last_inference_ms: int = 0
    inference_count: int = 0
    """Pictures answered, replays included."""
    execution_count: int = 0
    """Engine calls; of an account, its batches that were computed."""
    success: Duration = field(default_factory=Duration)
    """Batches answered, replays included, from read to ready to send."""
    fail: Duration = field(default_factory=Duration)
    """Batches refused, failed or abandoned by their caller."""
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    """Batches replayed from the books."""
    cache_miss: Duration = field(default_factory=Duration)
    """Batches computed; the time is what the books took beside the computing."""
    batches: dict[int, BatchCounters] = field(default_factory=dict)
    """By pictures in an engine call; of an account, by pictures in its batch."""


class Statistics:
    """Counters of the server as a whole, and of the accounts that were served most recently.

    Args:
        max_accounts: beyond it, the account that was idle longest is forgotten and would begin at 0 again.
    """

    def __init__(self, *, max_accounts: int) -> None:
        self.total = Counters()
        self.engine_seconds = 0.0
        """Of the last engine call that ended: what an answer that has just come took of its wait."""
        self._max_accounts = max_accounts
        self._accounts: OrderedDict[str, Counters] = OrderedDict()

    def account(self, name: str) -> Counters:
        """The counters of one account; all 0 where it was not served, or is forgotten."""
        return self._accounts.get(name) or Counters()

    def batch_done(self, account: str, outcome: str, pictures: int, seconds: float, parts: Parts) -> None:
        """One batch "charged", "replayed", or neither: refused, failed, or left by its caller."""
        counters = self._accounts.get(account) or self._accounts.setdefault(account, Counters())
        self._accounts.move_to_end(account)
        if len(self._accounts) > self._max_accounts:
            self._accounts.popitem(last=False)
        # Of all that a batch waited, the engine had what its last call took: that call's answer ended the wait.
        engine = min(self.engine_seconds, parts.wait)
        all_ns, input_ns, engine_ns, output_ns = map(_ns, (seconds, parts.input, engine, parts.output))
        queue_ns, miss_ns = _ns(parts.wait - engine), _ns(seconds - parts.input - parts.wait - parts.output)
        now_ms = time.time_ns() // 1_000_000
        for each in (self.total, counters):
            if outcome not in ("charged", "replayed"):
                each.fail.add_ns(all_ns)
                continue
            each.last_inference_ms = now_ms
            each.inference_count += pictures
            each.success.add_ns(all_ns)
            if outcome == "replayed":
                each.cache_hit.add_ns(all_ns)
                continue
            each.cache_miss.add_ns(miss_ns)
            each.queue.add_ns(queue_ns)
            each.compute_input.add_ns(input_ns)
            each.compute_infer.add_ns(engine_ns)
            each.compute_output.add_ns(output_ns)
        if outcome == "charged":
            counters.execution_count += 1
            sized = counters.batches.get(pictures) or counters.batches.setdefault(pictures, BatchCounters())
            sized.compute_input.add_ns(input_ns)
            sized.compute_infer.add_ns(engine_ns)
            sized.compute_output.add_ns(output_ns)

    def engine_call(self, call: EngineCall) -> None:
        """One engine call, with whatever batches were stacked for it."""
        self.engine_seconds = call.seconds
        self.total.execution_count += 1
        batches, count = self.total.batches, call.picture_count
        sized = batches.get(count) or batches.setdefault(count, BatchCounters())
        sized.compute_infer.add(call.seconds)


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
