"""How much an account may ask for at a time: the state alone, then over real gRPC."""

import contextlib
import itertools
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.journal import Batch
from edge_agent.teacher import Answered, RemoteTeacher
from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import quota_ledger_pb2 as quota_wire
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import interceptors
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.limits import SMALLEST_SWEEP, Limits
from teacher_service.terms import Terms
from tests.conftest import teacher_admin
from tests.teacher_service.lanes import every_protocol, every_stream, lane
from tests.teacher_service.parts import Clock, Stream, pictures, serving, until


def limits(clock: Clock, *, burst_pictures: int = 10, max_streams: int = 100) -> Limits:
    return Limits(burst_pictures=burst_pictures, max_streams=max_streams, clock=clock)


def ask(found: Limits, terms: Terms, count: int, name: str = "a") -> Refusal | None:
    """One batch that is answered at once; the refusal, if it is refused."""
    try:
        with found.batch(name, terms, count):
            return None
    except Refusal as refusal:
        return refusal


# --- rates ---


def test_a_burst_is_one_batch_where_a_second_is_less_and_then_the_rate_holds() -> None:
    clock = Clock()
    found, slow = limits(clock), Terms(pictures_per_second=2)
    assert ask(found, slow, 10) is None
    refusal = ask(found, slow, 5)
    assert refusal == Refusal.of(Reason.RATE_LIMITED, limit="2", wait="2.5").after(2.5)
    clock.seconds += 2.5
    assert ask(found, slow, 5) is None
    assert ask(found, slow, 1) is not None


def test_a_burst_is_one_second_where_that_is_more_than_a_batch() -> None:
    clock = Clock()
    found, fast = limits(clock), Terms(pictures_per_second=30)
    assert [ask(found, fast, 10) for _ in range(3)] == [None, None, None]
    refusal = ask(found, fast, 10)
    assert refusal is not None and refusal.retry_seconds == pytest.approx(1 / 3, abs=0.001)


def test_a_batch_larger_than_any_allowance_takes_a_full_one_and_no_more() -> None:
    clock = Clock()
    found, slow = limits(clock), Terms(pictures_per_second=2)
    assert ask(found, slow, 1) is None
    assert ask(found, slow, 25) == Refusal.of(Reason.RATE_LIMITED, limit="2", wait="0.5").after(0.5)
    clock.seconds += 0.5
    assert ask(found, slow, 25) is None
    refusal = ask(found, slow, 10)
    assert refusal is not None and refusal.retry_seconds == 5.0
    clock.seconds += 5
    assert ask(found, slow, 10) is None


def test_a_refusal_uses_nothing_up_and_accounts_are_apart() -> None:
    clock = Clock()
    found, slow = limits(clock), Terms(pictures_per_second=1)
    assert ask(found, slow, 10) is None
    for _ in range(50):
        assert ask(found, slow, 3) is not None
    assert ask(found, slow, 10, name="b") is None
    clock.seconds += 3
    assert ask(found, slow, 3) is None


def test_batches_refused_together_are_told_to_come_one_after_the_other() -> None:
    clock = Clock()
    found, slow = limits(clock), Terms(pictures_per_second=10)
    assert ask(found, slow, 10) is None
    waits = [refusal.retry_seconds for _ in range(4) if (refusal := ask(found, slow, 10)) is not None]
    assert waits == [1.0, 2.0, 3.0, 4.0]
    start = clock.seconds
    for wait in waits:  # each that comes when it was told to is let in
        assert wait is not None
        clock.seconds = start + wait
        assert ask(found, slow, 10) is None


def test_a_caller_who_does_not_wait_is_not_told_to_wait_for_ever() -> None:
    clock = Clock()
    found, slow = limits(clock), Terms(pictures_per_second=10)
    ask(found, slow, 10)
    for _ in range(1000):
        refusal = ask(found, slow, 10)
        assert refusal is not None and refusal.retry_seconds is not None and refusal.retry_seconds <= 60
    crawl = Terms(pictures_per_second=0.01)  # but where the allowance itself takes longer, that is what it says
    assert ask(found, crawl, 10, name="b") is None
    refusal = ask(found, crawl, 10, name="b")
    assert refusal is not None and refusal.retry_seconds == 1000.0


def test_a_changed_rate_counts_from_now_on() -> None:
    clock = Clock()
    found = limits(clock)
    assert ask(found, Terms(pictures_per_second=1), 10) is None
    assert ask(found, Terms(pictures_per_second=100), 90) is None
    assert ask(found, Terms(), 10_000) is None
    clock.seconds += 1000
    assert ask(found, Terms(pictures_per_second=1), 10) is None


@settings(max_examples=200, deadline=None)
@given(
    rate=st.floats(0.1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 10)), min_size=1, max_size=40),
)
def test_no_stretch_of_time_gets_more_than_burst_and_rate_and_who_waits_gets_in(
    rate: float, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    found, terms = limits(clock), Terms(pictures_per_second=rate)
    let_in: list[tuple[float, int]] = []
    for pause, count in steps:
        clock.seconds += pause
        if (refusal := ask(found, terms, count)) is not None:
            assert refusal.reason is Reason.RATE_LIMITED and refusal.retry_seconds is not None
            clock.seconds += refusal.retry_seconds
            assert ask(found, terms, count) is None
        let_in.append((clock.seconds, count))
    for first, last in itertools.combinations_with_replacement(range(len(let_in)), 2):
        stretch = let_in[last][0] - let_in[first][0]
        assert sum(count for _, count in let_in[first : last + 1]) <= max(rate, 10) + rate * stretch + 1e-3


# --- what is under way ---


def test_outstanding_pictures_are_bounded_until_they_are_answered() -> None:
    found, narrow = limits(Clock()), Terms(max_outstanding_pictures=8)
    with contextlib.ExitStack() as under_way:
        under_way.enter_context(found.batch("a", narrow, 5))
        refusal = ask(found, narrow, 4)
        assert refusal == Refusal.of(Reason.TOO_MANY_OUTSTANDING, limit=8, requested=4, outstanding=5)
        assert refusal.retry_seconds is not None
        assert ask(found, narrow, 3) is None and ask(found, narrow, 8, name="b") is None
    assert ask(found, narrow, 8) is None


def test_a_batch_that_fails_gives_its_place_back() -> None:
    found, narrow = limits(Clock()), Terms(max_outstanding_pictures=8)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), found.batch("a", narrow, 8):
            raise ZeroDivisionError


def test_streams_are_bounded_for_each_account_and_altogether() -> None:
    found = limits(Clock(), max_streams=3)
    with contextlib.ExitStack() as stack:
        stack.enter_context(found.stream("a", Terms(max_streams=1)))
        with pytest.raises(Refusal, match="the account may have 1 streams open at once"):
            stack.enter_context(found.stream("a", Terms(max_streams=1)))
        stack.enter_context(found.stream("b", Terms()))
        stack.enter_context(found.stream("b", Terms()))
        with pytest.raises(Refusal, match="all accounts together may have 3 streams"):
            stack.enter_context(found.stream("c", Terms()))
        assert found.streams == 3
    assert found.streams == 0
    with found.stream("a", Terms(max_streams=1)):
        pass


# --- memory ---


def test_accounts_that_are_idle_are_forgotten_and_those_with_something_to_remember_are_not() -> None:
    clock = Clock()
    found, slow = limits(clock), Terms(pictures_per_second=1)
    with found.stream("streaming", Terms()), found.batch("asking", Terms(max_outstanding_pictures=9), 5):
        ask(found, slow, 10, name="owing")
        for index in range(50 * SMALLEST_SWEEP):
            ask(found, Terms(pictures_per_second=1000), 1, name=f"passing-{index}")
            clock.seconds += 0.001
        assert len(found._accounts) <= 2 * SMALLEST_SWEEP
        assert {"streaming", "asking", "owing"} <= found._accounts.keys()
        assert ask(found, slow, 10, name="owing") is not None
        assert ask(found, Terms(max_outstanding_pictures=9), 5, name="asking") is not None
    clock.seconds += 1000
    found._forget_the_idle()
    assert found._accounts == {}


def test_an_account_without_limits_leaves_no_trace() -> None:
    found = limits(Clock())
    assert ask(found, Terms(answers="hard"), 10**6) is None
    assert found._accounts == {}


# --- over real gRPC ---


@contextlib.asynccontextmanager
async def limited(terms: Terms, **settings: Any) -> Any:
    """A service whose one account has these terms."""
    async with serving(**settings) as service:
        await service.ledger.set_terms("device", terms)
        yield service


class CountingLedger(MemoryLedger):
    def __init__(self) -> None:
        super().__init__()
        self.holds = 0

    async def hold(self, *arguments: Any, **more: Any) -> Any:
        self.holds += 1
        return await super().hold(*arguments, **more)


async def test_a_batch_beyond_the_rate_is_refused_before_the_books_are_asked_and_let_in_later() -> None:
    ledger = CountingLedger()
    async with limited(Terms(pictures_per_second=4), ledger=ledger, max_batch_pictures=8) as service:
        stream = await service.stream()
        await stream.send("a", pictures(8))
        assert (await stream.result()).answer.charged_count == 8
        await stream.send("b", pictures(6))
        assert await stream.refusal("b") == Refusal.of(Reason.RATE_LIMITED, limit="4", wait="1.5").after(1.5)
        assert ledger.holds == 1 and await service.balances() == (8, 0, 992)
        service.clock.seconds += 1.5
        await stream.send("b", pictures(6))
        assert not (await stream.result()).replayed
        labels = {"protocol": "mekd", "outcome": "rate_limited"}
        assert service.metrics.registry.get_sample_value("mekd_requests_total", labels) == 1


async def test_replays_count() -> None:
    async with limited(Terms(pictures_per_second=1), max_batch_pictures=8) as service:
        stream = await service.stream()
        for index in range(2):
            await stream.send("a", pictures(4))
            assert (await stream.result()).replayed is (index == 1)
        await stream.send("a", pictures(4))
        assert (await stream.refusal("a")).reason is Reason.RATE_LIMITED


async def test_outstanding_pictures_are_counted_over_all_streams_of_an_account() -> None:
    async with limited(Terms(max_outstanding_pictures=8)) as service:
        assert (
            await service.stub.Describe(wire.DescribeRequest(), metadata=service.metadata())
        ).max_batch_pictures == 8
        first, second = await service.stream(), await service.stream()
        service.engine.gate.clear()
        await first.send("a", pictures(5))
        await until(lambda: service.engine.calls == [5])
        await second.send("b", pictures(4))
        expected = Refusal.of(Reason.TOO_MANY_OUTSTANDING, limit=8, requested=4, outstanding=5)
        assert await second.refusal("b") == expected
        await second.send("too-large", pictures(9))  # never: it is refused as what can never be answered
        assert (await second.refusal("too-large")).retry_seconds is None
        service.engine.gate.set()
        await first.result()
        await second.send("b", pictures(4))
        await second.result()


async def test_an_account_opens_its_streams_and_no_more_until_one_has_ended() -> None:
    async with limited(Terms(max_streams=2)) as service:
        streams = [await service.stream() for _ in range(2)]
        refused = service.open()
        refusal = await refused.ended_by()
        assert refusal == Refusal.of(Reason.TOO_MANY_STREAMS, whose="the account", limit=2)
        watching = service.quota.WatchBalance(quota_wire.WatchBalanceRequest(), metadata=service.metadata())
        assert (await watching.read()).account.name == "device"  # who only listens takes no place of the account's
        watching.cancel()
        other = await service.new_account("other")
        assert await service.open(other).configure()
        await streams[0].call.done_writing()
        assert await streams[0].call.read() is grpc.aio.EOF

        async def opened() -> (
            bool
        ):  # the caller may know of its stream's end a moment before the server is done with it
            try:
                return bool(await service.stream())
            except grpc.aio.AioRpcError:
                return False

        await until(opened)
        await streams[1].send("a", pictures(2))
        await streams[1].result()


async def test_who_only_listens_takes_no_stream_of_the_accounts_whichever_was_first() -> None:
    async with limited(Terms(max_streams=1)) as service:
        watching = service.quota.WatchBalance(quota_wire.WatchBalanceRequest(), metadata=service.metadata())
        await watching.read()
        stream = await service.stream()
        await stream.send("a", pictures(2))
        await stream.result()
        watching.cancel()


async def test_the_server_bounds_the_streams_of_all_and_gives_every_place_back() -> None:
    async with serving(max_streams=3) as service:
        for _ in range(5):
            streams = [await service.stream() for _ in range(3)]
            refusal = await service.open().ended_by()
            assert refusal == Refusal.of(Reason.TOO_MANY_STREAMS, whose="all accounts together", limit=3)
            streams[0].call.cancel()
            await streams[1].call.done_writing()
            assert await streams[1].call.read() is grpc.aio.EOF
            await streams[2].call.write(wire.InferRequest())  # no batch: ends the stream
            await streams[2].ended_by()
            await until(lambda: service.money_path._limits.streams == 0)


async def test_a_stream_without_a_valid_key_takes_no_place() -> None:
    async with serving(max_streams=1) as service:
        for _ in range(3):
            assert (await service.open("nonsense").ended_by()).reason is Reason.UNAUTHENTICATED
        await service.stream()


async def test_watchers_without_a_key_share_places_and_take_them_from_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interceptors, "STREAMS_WITHOUT_CREDENTIAL", 2)
    async with serving(max_streams=1) as service:
        health = health_pb2_grpc.HealthStub(service.channel)
        request = health_pb2.HealthCheckRequest()

        async def watch() -> Any:
            watching = health.Watch(request)
            assert await watching.read() is not grpc.aio.EOF
            return watching

        watchers = [await watch() for _ in range(2)]
        refusal = await Stream(health.Watch(request)).ended_by()
        whose = "callers without a key together"
        assert refusal == Refusal.of(Reason.TOO_MANY_STREAMS, whose=whose, limit=2)
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stream = await service.stream()
        await stream.send("a", pictures(2))
        await stream.result()
        watchers[0].cancel()

        async def let_in() -> bool:  # the caller knows of its own leaving before the server does
            try:
                watchers.append(await watch())
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(let_in)
        assert (await Stream(health.Watch(request)).ended_by()) == refusal
        for watching in watchers:
            watching.cancel()


# --- every protocol ---


@every_protocol
async def test_the_rate_is_the_same_for_all_protocols_and_a_repeat_after_the_wait_is_answered(protocol: str) -> None:
    async with limited(Terms(pictures_per_second=4), max_batch_pictures=8) as service:
        asking = await lane(protocol, service)
        await asking.ask("a", pictures(8))
        await asking.send("b", pictures(6))
        refused = await asking.refusal("b")
        assert refused.reason is Reason.RATE_LIMITED and "send the same batch again in 1.5 s" in refused.message
        service.clock.seconds += 1.5
        assert (await asking.ask("b", pictures(6))).charged == 6


@every_stream
async def test_streams_of_all_protocols_share_one_bound(protocol: str) -> None:
    async with limited(Terms(max_streams=1)) as service:
        await (await lane(protocol, service)).ask("a", pictures(2))
        for _ in range(2):
            assert (await service.open().ended_by()).reason is Reason.TOO_MANY_STREAMS


# --- the agent ---


class Box:
    """An outbox with some batches of eight pictures."""

    def __init__(self, run: str, count: int) -> None:
        self.waiting = [made(f"{run}-{index}") for index in range(count)]
        self.repeats: list[str] = []

    def next_batch(self) -> Batch | None:
        return self.waiting.pop(0) if self.waiting else None

    def repeated(self, batch: Batch) -> None:
        self.repeats.append(batch.batch_id)

    def again(self, batch: Batch) -> bool:
        raise AssertionError("nothing is counted here")


def made(batch_id: str) -> Batch:
    request = wire.Batch(batch_id=batch_id, images=codec.encode_images(pictures(8)))
    return Batch(slot=0, batch_id=batch_id, picture_count=8, request=request.SerializeToString(), latents=b"")


def test_an_agent_waits_and_sends_the_same_batch_again_where_a_limit_says_so(start_server: Any) -> None:
    server = start_server("--max-batch-pictures", "8")
    key = server.create_account()
    teacher_admin(server.ledger, "account", "set", "device", "--pictures-per-second", "32", "--max-streams", "1")
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if "streams open" in line:
            blocker.close()  # type: ignore[attr-defined]

    blocking, teacher = (
        RemoteTeacher(server.address, api_key=key, check_egress=lambda batch: None, wait_seconds=30, tell=tell)
        for _ in range(2)
    )
    digest = teacher.describe().model_digest
    blocker = blocking.answers("blocker", digest, Box("blocker", 2))
    next(blocker)  # the account's one stream is taken
    box = Box("run", 10)
    answered = list(teacher.answers("run", digest, box))
    assert all(isinstance(outcome, Answered) for outcome in answered)
    assert sorted(outcome.batch.batch_id for outcome in answered) == sorted(f"run-{index}" for index in range(10))
    assert box.repeats, "80 pictures at 32 a second are not let in at once"
    assert any("may have 1 streams open at once" in line for line in told)
    assert teacher.balance("run").run_posted == 80
    teacher.close()
    blocking.close()
