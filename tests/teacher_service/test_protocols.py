"""What both protocols have in common, each test on both: the money, the policies, the window, leaving, draining."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.errors import Reason
from teacher_service import ledger_sql, ledger_store, money_path
from teacher_service.auth import CACHE_SECONDS
from teacher_service.engine import ArrayEngine, EngineError
from teacher_service.ledger import Held, HoldRequest, Posted
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_sql import SqlLedger
from teacher_service.terms import Terms
from tests.teacher_service.lanes import KINDS, Lane, Result, every_protocol, every_stream, lane
from tests.teacher_service.parts import GatedEngine, Service, pictures, serving, until, write_locked
from tests.teacher_service.test_metrics import rpcs


async def outcomes(service: Service) -> dict[tuple[str, str], float]:
    """Batches done, by protocol and outcome."""
    return {
        (sample.labels["protocol"], sample.labels["outcome"]): sample.value
        for family in service.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "mekd_requests_total" and sample.value
    }


# --- what is sold ---


@every_protocol
async def test_soft_answers_are_the_models_own_bit_for_bit(protocol: str) -> None:
    images = pictures(5)
    async with serving() as service:
        found = await (await lane(protocol, service)).ask("b-1", images)
        (post,) = [entry for entry in await service.ledger.statement("device") if entry.kind.value == "post"]
        assert await service.balances() == (5, 0, 995)
    assert (found.batch_id, found.name, found.replayed, found.charged, found.balance) == (
        "b-1",
        "probabilities",
        False,
        5,
        995,
    )
    assert found.values.tobytes() == ArrayEngine().answer(images).tobytes()
    assert found.model_digest == ArrayEngine().model_digest
    assert found.receipt == f"device:{post.sequence}:{post.head.hex()}"


@every_protocol
async def test_hard_answers_are_indices(protocol: str) -> None:
    images = pictures(5)
    async with serving(answers="hard") as service:
        found = await (await lane(protocol, service)).ask("b", images)
    assert found.name == "labels" and found.values.dtype == np.int64
    assert found.values.tolist() == ArrayEngine().answer(images).argmax(axis=1).tolist()


@every_protocol
async def test_top_k_and_rounded_answers_name_the_most_probable_classes_alone(protocol: str) -> None:
    images = pictures(5)
    async with serving() as service:
        await service.ledger.set_terms("device", Terms(top_k=3, decimals=2))
        found = await (await lane(protocol, service)).ask("b", images)
    whole_NK = ArrayEngine().answer(images)
    assert found.values.shape == (5, 10) and found.values.dtype == np.float32
    for sold_K, whole_K in zip(found.values, whole_NK, strict=True):
        named = np.argsort(-whole_K, kind="stable")[:3]
        expected = np.zeros(10, np.float32)
        expected[named] = np.round(whole_K[named].astype(np.float64), 2)
        assert sold_K.tolist() == expected.tolist()


@every_protocol
async def test_many_batches_are_each_answered_with_their_own(protocol: str) -> None:
    async with serving(MemoryLedger(), budget=10_000) as service:

        async def work(index: int) -> None:
            mine = await lane(protocol, service, f"run-{index}")
            sent = {f"s{index}-{n}": pictures(1 + n % 3, seed=100 * index + n) for n in range(20)}

            async def send() -> None:
                for batch_id, images in list(sent.items()):
                    await mine.send(batch_id, images)

            sending = asyncio.create_task(send())
            for _ in range(20):
                found = await mine.result()
                assert found.values.tobytes() == ArrayEngine().answer(sent.pop(found.batch_id)).tobytes()
            await sending

        await asyncio.gather(*(work(index) for index in range(4)))
        charged = 4 * sum(1 + n % 3 for n in range(20))
        assert await service.balances() == (charged, 0, 10_000 - charged)
        assert await service.ledger.run_posted("device", "run-2") == charged // 4
        assert len(service.engine.calls) <= 80


# --- the order of the money path ---


class WatchedLedger(MemoryLedger):
    """A memory ledger that writes down what is asked of it."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps

    async def hold(self, request: HoldRequest, **more: Any) -> Held | Posted:
        self.steps.append("hold")
        return await super().hold(request, **more)

    async def post(self, account: str, batch_id: str, answer: bytes, *rest: Any, **more: Any) -> Any:
        self.steps.append("post")
        return await super().post(account, batch_id, answer, *rest, **more)

    async def void(self, account: str, batch_id: str, **more: Any) -> None:
        self.steps.append("void")
        await super().void(account, batch_id, **more)


class WatchedEngine(GatedEngine):
    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps

    def answer(self, images_NCHW: np.ndarray) -> np.ndarray:
        self.steps.append("engine")
        return super().answer(images_NCHW)


@every_protocol
async def test_money_is_held_before_the_engine_and_posted_before_the_answer(protocol: str) -> None:
    steps: list[str] = []
    async with serving(WatchedLedger(steps), engine=WatchedEngine(steps)) as service:
        mine = await lane(protocol, service)
        await mine.ask("b", pictures(2))
        assert steps == ["hold", "engine", "post"]
        assert (await mine.ask("b", pictures(2))).replayed
        assert steps == ["hold", "engine", "post", "hold"]
        steps.clear()
        service.engine.fail_with = EngineError("broken")
        await mine.send("c", pictures(2))
        await mine.refusal("c")
        assert steps == ["hold", "engine", "void"]


@every_protocol
async def test_a_bad_batch_is_refused_before_anything_is_written_and_the_next_is_answered(protocol: str) -> None:
    steps: list[str] = []
    async with serving(WatchedLedger(steps), max_batch_pictures=8) as service:
        mine = await lane(protocol, service)
        for batch_id, images in (
            ("x" * 65, pictures(1)),
            ("a b", pictures(1)),
            ("large", pictures(9)),
            ("wide", np.zeros((1, 1, 8, 9), np.uint8)),
            ("none", pictures(0)),
        ):
            await mine.send(batch_id, images)
            refused = await mine.outcome()
            assert not isinstance(refused, Result)
            assert refused.reason in (Reason.INVALID_REQUEST, Reason.INVALID_IMAGES), refused
        assert steps == []
        assert (await mine.ask("good", pictures(8))).charged == 8


@every_protocol
async def test_other_pictures_or_another_run_under_a_used_id_are_refused(protocol: str) -> None:
    async with serving() as service:
        mine = await lane(protocol, service)
        first = await mine.ask("b", pictures(2))
        await mine.send("b", pictures(2, seed=9))
        refused = await mine.refusal("b")
        assert refused.reason is Reason.BATCH_ID_REUSED and "another pictures" in refused.message
        other_run = await lane(protocol, service, "other-run")
        await other_run.send("b", pictures(2))
        assert "another run_id" in (await other_run.refusal("b")).message
        again = await mine.ask("b", pictures(2))
        assert again.answer == first.answer and again.replayed
        assert await service.balances() == (2, 0, 998)


@pytest.mark.parametrize("then", KINDS)
@every_protocol
async def test_a_batch_is_the_same_whichever_protocol_it_comes_by(protocol: str, then: str) -> None:
    async with serving() as service:
        first = await (await lane(protocol, service)).ask("b", pictures(2))
        other = await lane(then, service)
        second = await other.ask("b", pictures(2))
        assert second.replayed and second.answer == first.answer
        await other.send("b", pictures(2, seed=9))
        assert (await other.refusal("b")).reason is Reason.BATCH_ID_REUSED
        assert service.engine.calls == [2] and await service.balances() == (2, 0, 998)


@every_protocol
async def test_a_replay_is_free_and_the_same_whatever_is_served_by_then(protocol: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    async with serving(SqlLedger.open(url)) as service:
        mine = await lane(protocol, service)
        first = await mine.ask("b", pictures(3))
        key = service.key
        mine.leave()
        second = await (await lane(protocol, service)).ask("b", pictures(3))
        assert service.engine.calls == [3]
    books = SqlLedger.open(url)
    before = await books.account("device")
    async with serving(books, engine=GatedEngine(seed=7), answers="hard", key=key) as service:
        third = await (await lane(protocol, service)).ask("b", pictures(3))
        assert service.engine.calls == []
        assert await service.ledger.account("device") == before
    assert [found.replayed for found in (first, second, third)] == [False, True, True]
    assert first.answer == second.answer == third.answer
    assert third.balance == 997


@every_protocol
async def test_a_repeat_while_the_first_is_under_way_is_told_to_wait(protocol: str) -> None:
    async with serving() as service:
        service.engine.gate.clear()
        mine, again = await lane(protocol, service), await lane(protocol, service)
        await mine.send("b", pictures(2))
        await until(lambda: service.engine.calls)
        await again.send("b", pictures(2))
        assert (await again.refusal("b")).reason is Reason.BATCH_IN_FLIGHT
        service.engine.gate.set()
        assert not (await mine.result()).replayed
        assert (await again.ask("b", pictures(2))).replayed
        assert await service.balances() == (2, 0, 998)


@every_protocol
async def test_an_exhausted_budget_is_told_with_numbers_and_a_smaller_batch_still_fits(protocol: str) -> None:
    async with serving(budget=10) as service:
        mine = await lane(protocol, service)
        await mine.ask("a", pictures(7))
        await mine.send("b", pictures(4))
        refused = await mine.refusal("b")
        assert refused.reason is Reason.BUDGET_EXHAUSTED
        assert "has 3 pictures available, 4 were asked for and 0 are held" in refused.message
        assert (await mine.ask("c", pictures(3))).balance == 0
        await service.ledger.grant("device", 4)
        assert (await mine.ask("b", pictures(4))).balance == 0  # a refusal pins nothing


@every_protocol
async def test_callers_at_the_same_time_never_overspend(protocol: str) -> None:
    async with serving(budget=25) as service:
        service.engine.gate.clear()
        lanes = [await lane(protocol, service, f"r{i}") for i in range(5)]
        for index, each in enumerate(lanes):
            for n in range(3):
                await each.send(f"{index}-{n}", pictures(5))
        await until(lambda: service.engine.calls)
        service.engine.gate.set()
        found = [isinstance(await each.outcome(), Result) for each in lanes for _ in range(3)]
        assert (found.count(True), found.count(False)) == (5, 10)
        assert await service.balances() == (25, 0, 0)


@every_protocol
async def test_limits_are_kept_before_anything_is_held(protocol: str) -> None:
    async with serving(max_queue_pictures=8) as service:
        service.engine.gate.clear()
        mine = await lane(protocol, service)
        await mine.send("a", pictures(5))
        await until(lambda: service.engine.calls)
        await mine.send("b", pictures(4))
        assert (await mine.refusal("b")).reason is Reason.OVERLOADED
        assert await service.balances() == (0, 5, 995)
        service.engine.gate.set()
        await mine.result()
        assert (await mine.ask("b", pictures(4))).batch_id == "b"
        assert service.batcher.taken_pictures == 0


@every_protocol
async def test_outstanding_pictures_of_an_account_are_bounded_over_all_protocols(protocol: str) -> None:
    async with serving() as service:
        await service.ledger.set_terms("device", Terms(max_outstanding_pictures=6))
        service.engine.gate.clear()
        first, mine = await lane("mekd", service), await lane(protocol, service)
        await first.send("a", pictures(5))
        await until(lambda: service.engine.calls)
        await mine.send("b", pictures(4))
        assert (await mine.refusal("b")).reason is Reason.TOO_MANY_OUTSTANDING
        assert await service.balances() == (0, 5, 995)
        service.engine.gate.set()
        await first.result()
        assert (await mine.ask("b", pictures(4))).charged == 4


@every_protocol
async def test_an_engine_failure_charges_nothing_and_tells_nothing_of_its_cause(protocol: str) -> None:
    async with serving() as service:
        mine = await lane(protocol, service)
        service.engine.fail_with = EngineError("weights at /secret/place")
        await mine.send("b", pictures(2))
        refused = await mine.refusal("b")
        assert refused.reason is Reason.ENGINE_FAILED and "secret" not in refused.message
        assert await service.balances() == (0, 0, 1000)
        service.engine.fail_with = None
        assert (await mine.ask("b", pictures(2))).charged == 2


@every_protocol
async def test_every_batch_is_counted_by_its_outcome(protocol: str) -> None:
    async with serving(budget=5) as service:
        mine = await lane(protocol, service)
        await mine.ask("a", pictures(3))
        await mine.ask("a", pictures(3))
        await mine.send("b", pictures(3))
        await mine.refusal("b")
        service.engine.fail_with = EngineError("broken")
        await mine.send("c", pictures(1))
        await mine.refusal("c")
        word = protocol.partition(" ")[0]
        names = ("charged", "replayed", "budget_exhausted", "engine_failed")
        assert await outcomes(service) == {(word, name): 1.0 for name in names}


# --- the window ---


@every_stream
async def test_the_server_reads_no_further_than_the_window(protocol: str) -> None:
    async with serving(window_batches=3) as service:
        service.engine.gate.clear()
        mine = await lane(protocol, service)
        for index in range(10):
            await mine.send(f"b{index}", pictures(1))
        await until(lambda: service.batcher.taken_pictures == 3)
        await asyncio.sleep(0.2)
        assert service.batcher.taken_pictures == 3
        service.engine.gate.set()
        assert {(await mine.result()).batch_id for _ in range(10)} == {f"b{index}" for index in range(10)}


async def send_many(mine: Lane, count: int) -> None:
    """Batches of 100 pictures, one after the other."""
    for index in range(count):
        await mine.send(f"b{index}", pictures(100))


async def posted_when_full(service: Service) -> int:
    """Waits until the transport is full: nothing more is posted, look after look."""
    posted, same = -1, 0
    while same < 25:
        await asyncio.sleep(0.02)
        before, posted = posted, (await service.balances())[0]
        same = same + 1 if posted == before else 0
    return posted


@every_stream
async def test_answers_do_not_pile_up_for_a_reader_who_does_not_read(protocol: str) -> None:
    # Answers of 800 kB: the transport takes a few of them, and no more than the window waits in the server.
    engine = GatedEngine(class_count=2000)
    async with serving(engine=engine, budget=100_000, window_batches=4) as service:
        mine = await lane(protocol, service)
        sending = asyncio.create_task(send_many(mine, 60))

        async def window_full() -> bool:
            return (await service.balances())[0] >= 400

        await until(window_full)
        assert await posted_when_full(service) <= 2500  # of 6000
        for _ in range(60):
            await mine.result()
        await sending
        assert (await service.balances())[0] == 6000


@every_stream
async def test_answers_come_out_of_order_when_the_first_takes_longer(protocol: str) -> None:
    async with serving(budget=4) as service:
        service.engine.gate.clear()
        mine = await lane(protocol, service)
        await mine.send("slow", pictures(3))
        await until(lambda: service.engine.calls)
        await mine.send("refused-at-once", pictures(2))
        await mine.refusal("refused-at-once")
        service.engine.gate.set()
        assert (await mine.result()).batch_id == "slow"


@every_stream
async def test_a_half_closed_stream_ends_well_after_its_last_answer(protocol: str) -> None:
    async with serving() as service:
        service.engine.gate.clear()
        mine: Any = await lane(protocol, service)
        for batch_id in ("a", "b"):
            await mine.send(batch_id, pictures(1))
        await mine.call.done_writing()
        await until(lambda: service.engine.calls)
        service.engine.gate.set()
        assert {(await mine.result()).batch_id for _ in range(2)} == {"a", "b"}
        assert await mine.call.read() is grpc.aio.EOF
        assert await mine.call.code() is grpc.StatusCode.OK
        await until(lambda: not service.calls.streams)


# --- callers who leave ---


async def has_left(service: Service) -> None:
    """Waits until the server knows that a caller has left: its one call that was cancelled has ended."""

    def cancelled() -> int:
        handled = rpcs(service, "grpc_server_handled_total")
        return int(sum(value for labels, value in handled.items() if labels[-1] == "Canceled"))

    await until(lambda: cancelled() == 1, "the end of the cancelled call")


@every_protocol
async def test_a_batch_still_queued_when_its_caller_leaves_is_voided_and_not_computed(protocol: str) -> None:
    async with serving(max_engine_pictures=4) as service:
        service.engine.gate.clear()
        other, leaver = await lane(protocol, service, "other"), await lane(protocol, service, "leaver")
        await other.send("first", pictures(4))
        await until(lambda: service.engine.calls)
        await leaver.send("queued", pictures(3))
        await until(lambda: service.batcher._queue.size == 3)  # past the hold, before the engine
        leaver.leave()
        await has_left(service)
        service.engine.gate.set()
        await other.result()
        await until(lambda: service.batcher.taken_pictures == 0)
        assert service.engine.calls == [4]
        assert await service.balances() == (4, 0, 996)
        word = protocol.partition(" ")[0]
        assert await outcomes(service) == {(word, "charged"): 1.0, (word, "departed"): 1.0}
        kinds = [(entry.kind.value, entry.batch_id) for entry in await service.ledger.statement("device")]
        assert ("void", "queued") in kinds


@every_protocol
async def test_a_batch_with_the_engine_when_its_caller_leaves_is_posted_and_replayed_to_whoever_returns(
    protocol: str,
) -> None:
    async with serving() as service:
        service.engine.gate.clear()
        mine = await lane(protocol, service)
        await mine.send("b", pictures(3))
        await until(lambda: service.engine.calls)
        mine.leave()
        await has_left(service)
        service.engine.gate.set()
        await until(lambda: not service.calls.batches)
        assert await service.balances() == (3, 0, 997)
        found = await (await lane(protocol, service)).ask("b", pictures(3))
        assert found.replayed and service.engine.calls == [3]
        assert await service.balances() == (3, 0, 997)


@every_stream
async def test_a_caller_who_leaves_while_an_answer_is_being_written_is_noticed(protocol: str) -> None:
    engine = GatedEngine(class_count=2000)
    async with serving(engine=engine, budget=100_000, window_batches=4) as service:
        mine = await lane(protocol, service)
        sending = asyncio.create_task(send_many(mine, 40))
        await until(lambda: len(engine.calls) > 4)
        await posted_when_full(service)
        mine.leave()
        await until(lambda: not service.calls.streams)
        await until(lambda: not service.calls.batches)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        posted, held, balance = await service.balances()
        assert held == 0 and posted + balance == 100_000 and service.batcher.taken_pictures == 0


# --- credentials and draining ---


@every_protocol
async def test_a_revoked_key_is_refused_at_its_next_batch(protocol: str) -> None:
    async with serving() as service:
        mine = await lane(protocol, service)
        await mine.ask("a", pictures(1))
        (stored,) = await service.ledger.keys("device")
        await service.ledger.revoke_key(stored.key_id)
        service.clock.seconds += CACHE_SECONDS
        await mine.send("b", pictures(1))
        assert await mine.ended_by() is Reason.UNAUTHENTICATED
        assert await service.balances() == (1, 0, 999)


@every_protocol
async def test_draining_finishes_what_is_under_way_and_takes_nothing_new(protocol: str) -> None:
    async with serving() as service:
        service.engine.gate.clear()
        mine = await lane(protocol, service)
        await mine.send("b", pictures(2))
        await until(lambda: service.engine.calls)
        draining = asyncio.create_task(service.calls.drain())
        await asyncio.sleep(0.1)
        assert not draining.done()
        service.engine.gate.set()
        assert (await mine.result()).batch_id == "b"
        await asyncio.wait_for(draining, 5)
        assert await service.balances() == (2, 0, 998)
        assert not service.calls.streams and not service.calls.batches


@every_stream
async def test_a_reader_who_does_not_read_cannot_keep_a_drain_from_being_cut_short(protocol: str) -> None:
    engine = GatedEngine(class_count=2000)
    async with serving(engine=engine, budget=100_000, window_batches=4) as service:
        mine = await lane(protocol, service)
        sending = asyncio.create_task(send_many(mine, 40))
        await until(lambda: len(engine.calls) > 4)
        await posted_when_full(service)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.calls.drain(), 0.3)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    assert (await service.ledger.account("device")).held == 0


# --- a ledger that fails ---


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_store, "BUSY_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(money_path, "VOID_RETRY_SECONDS", 0.05)


@every_protocol
async def test_books_that_cannot_be_written_answer_nothing(protocol: str, tmp_path: Path, brisk: None) -> None:
    async with serving(SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")) as service:
        mine = await lane(protocol, service)
        with write_locked(tmp_path / "ledger.db"):
            await mine.send("b", pictures(2))
            assert (await mine.refusal("b")).reason is Reason.LEDGER_UNAVAILABLE
            assert service.engine.calls == []
        assert (await mine.ask("b", pictures(2))).charged == 2


@every_protocol
async def test_an_answer_that_cannot_be_posted_is_thrown_away_and_its_hold_comes_back(
    protocol: str, tmp_path: Path, brisk: None
) -> None:
    async with serving(SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")) as service:
        service.engine.gate.clear()
        mine = await lane(protocol, service)
        await mine.send("b", pictures(2))
        await until(lambda: service.engine.calls)
        await service.ledger.void("nobody", "nothing")  # the hold is on the disk
        with write_locked(tmp_path / "ledger.db"):
            service.engine.gate.set()
            assert (await mine.refusal("b")).reason is Reason.LEDGER_UNAVAILABLE
            assert await service.balances() == (0, 2, 998)
            await asyncio.sleep(0.2)  # voiding is tried, in vain

        async def given_back() -> bool:
            return await service.balances() == (0, 0, 1000)

        await until(given_back)
        await until(lambda: not service.money_path._releasing)
        assert not (await mine.ask("b", pictures(2))).replayed and service.engine.calls == [2, 2]
        assert await service.balances() == (2, 0, 998)


@every_protocol
async def test_a_post_that_happened_though_the_store_said_otherwise_is_found_by_the_repeat(
    protocol: str, brisk: None
) -> None:
    class Lying(MemoryLedger):
        async def post(self, account: str, batch_id: str, answer: bytes, *rest: Any, **more: Any) -> Any:
            await super().post(account, batch_id, answer, *rest, **more)
            raise ledger_sql.LedgerUnavailable("connection lost")  # the commit went through, its word was lost

    async with serving(Lying()) as service:
        mine = await lane(protocol, service)
        await mine.send("b", pictures(2))
        assert (await mine.refusal("b")).reason is Reason.LEDGER_UNAVAILABLE
        assert (await mine.ask("b", pictures(2))).replayed
        assert await service.balances() == (2, 0, 998)


@every_protocol
async def test_a_pruned_answer_is_neither_computed_nor_charged_again(protocol: str) -> None:
    class Pruned(MemoryLedger):
        async def hold(self, request: HoldRequest, **more: Any) -> Held | Posted:
            held = await super().hold(request, **more)
            return dataclasses.replace(held, answer=None) if isinstance(held, Posted) else held

    async with serving(Pruned()) as service:
        mine = await lane(protocol, service)
        await mine.ask("b", pictures(2))
        await mine.send("b", pictures(2))
        assert (await mine.refusal("b")).reason is Reason.ANSWER_EXPIRED
        assert service.engine.calls == [2] and await service.balances() == (2, 0, 998)
