"""The money path and the stream, over real gRPC."""

import asyncio
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import inference, ledger_sql
from teacher_service.auth import CACHE_SECONDS
from teacher_service.engine import ArrayEngine, EngineError
from teacher_service.ledger import Held, HoldRequest, Posted
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_sql import SqlLedger
from tests.teacher_service.parts import GatedEngine, Service, Stream, pictures, serving, until, write_locked


async def outcomes(service: Service) -> dict[str, float]:
    """Batches done, by outcome."""
    found = {}
    for family in service.metrics.registry.collect():
        for sample in family.samples:
            if sample.name == "mekd_requests_total":
                found[sample.labels["outcome"]] = sample.value
    return found


# --- what is sold ---


async def test_describe_tells_what_is_sold() -> None:
    async with serving(max_batch_pictures=64, window_batches=3) as service:
        found = await service.stub.Describe(wire.DescribeRequest(), metadata=service.metadata())
    assert found == wire.DescribeResponse(
        model_digest=ArrayEngine().model_digest,
        labels=[str(k) for k in range(10)],
        channels=1,
        height=8,
        width=8,
        answer_kind=wire.ANSWER_KIND_PROBABILITIES,
        encodings=[wire.IMAGE_ENCODING_RAW_UINT8],
        max_batch_pictures=64,
        max_message_bytes=64 * 2**20,
        window_batches=3,
    )


async def test_soft_answers_are_the_models_own_bit_for_bit() -> None:
    images = pictures(5)
    async with serving() as service:
        stream = await service.stream()
        await stream.send("b-1", images)
        result = await stream.result()
        assert await service.balances() == (5, 0, 995)
    assert (result.batch_id, result.replayed, result.balance_count) == ("b-1", False, 995)
    answer = result.answer
    assert (
        codec.decode_answer(answer, picture_count=5, class_count=10).tobytes()
        == ArrayEngine().answer(images).tobytes()
    )
    assert answer.model_digest == ArrayEngine().model_digest and answer.charged_count == 5
    assert answer.pixel_digest == hashlib.sha256(images.tobytes()).digest()


async def test_hard_answers_are_indices_and_give_no_probabilities_away() -> None:
    images = pictures(5)
    async with serving(answers="hard") as service:
        found = await service.stub.Describe(wire.DescribeRequest(), metadata=service.metadata())
        assert found.answer_kind == wire.ANSWER_KIND_CLASS_INDICES
        stream = await service.stream()
        await stream.send("b", images)
        answer = (await stream.result()).answer
    assert answer.WhichOneof("outcome") == "class_indices"
    decoded = codec.decode_answer(answer, picture_count=5, class_count=10)
    assert decoded.tolist() == ArrayEngine().answer(images).argmax(axis=1).tolist()


async def test_many_batches_on_many_streams_are_each_answered_with_their_own() -> None:
    async with serving(MemoryLedger(), budget=10_000) as service:
        streams = [await service.stream(f"run-{i}") for i in range(4)]

        async def work(index: int) -> None:
            stream = streams[index]
            sent = {f"s{index}-{n}": pictures(1 + n % 3, seed=100 * index + n) for n in range(20)}

            async def send() -> None:
                for batch_id, images in list(sent.items()):
                    await stream.send(batch_id, images)

            sending = asyncio.create_task(send())
            for _ in range(len(sent)):
                result = await stream.result()
                images = sent.pop(result.batch_id)
                decoded = codec.decode_answer(result.answer, picture_count=len(images), class_count=10)
                assert decoded.tobytes() == ArrayEngine().answer(images).tobytes()
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

    async def hold(self, request: HoldRequest) -> Held | Posted:
        self.steps.append("hold")
        return await super().hold(request)

    async def post(self, account: str, batch_id: str, answer: bytes) -> Any:
        self.steps.append("post")
        return await super().post(account, batch_id, answer)

    async def void(self, account: str, batch_id: str) -> None:
        self.steps.append("void")
        await super().void(account, batch_id)


class WatchedEngine(GatedEngine):
    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps

    def answer(self, images_NCHW: np.ndarray) -> np.ndarray:
        self.steps.append("engine")
        return super().answer(images_NCHW)


async def test_money_is_held_before_the_engine_and_posted_before_the_answer() -> None:
    steps: list[str] = []
    async with serving(WatchedLedger(steps), engine=WatchedEngine(steps)) as service:
        stream = await service.stream()
        await stream.send("b", pictures(2))
        await stream.result()
        assert steps == ["hold", "engine", "post"]
        await stream.send("b", pictures(2))
        assert (await stream.result()).replayed
        assert steps == ["hold", "engine", "post", "hold"]
        steps.clear()
        service.engine.fail_with = EngineError("broken")
        await stream.send("c", pictures(2))
        await stream.refusal("c")
        assert steps == ["hold", "engine", "void"]


@pytest.mark.parametrize(
    ("batch", "field"),
    [
        (wire.Batch(batch_id="", images=codec.encode_images(pictures(1))), "batch.batch_id"),
        (wire.Batch(batch_id="a" * 65, images=codec.encode_images(pictures(1))), "batch.batch_id"),
        (wire.Batch(batch_id="ä/../b\n", images=codec.encode_images(pictures(1))), "batch.batch_id"),
        (wire.Batch(batch_id="b"), "batch.images.encoding"),
        (wire.Batch(batch_id="b", images=codec.encode_images(pictures(9))), "batch.images.picture_count"),
        (
            wire.Batch(batch_id="b", images=codec.encode_images(np.zeros((1, 1, 8, 9), np.uint8))),
            "batch.images.width",
        ),
    ],
)
async def test_a_bad_batch_is_refused_before_anything_is_written_and_the_stream_goes_on(
    batch: wire.Batch, field: str
) -> None:
    steps: list[str] = []
    async with serving(WatchedLedger(steps), max_batch_pictures=8) as service:
        stream = await service.stream()
        await stream.call.write(wire.InferRequest(batch=batch))
        refusal = await stream.refusal(batch.batch_id[:64])
        assert refusal.variables["field"] == field and refusal.retry_seconds is None
        assert steps == []
        await stream.send("good", pictures(8))
        assert (await stream.result()).batch_id == "good"


async def test_other_pictures_under_a_used_id_are_refused() -> None:
    async with serving() as service:
        stream = await service.stream()
        await stream.send("b", pictures(2))
        first = await stream.result()
        await stream.send("b", pictures(2, seed=9))
        assert await stream.refusal("b") == Refusal.of(Reason.BATCH_ID_REUSED, batch_id="b", field="pictures")
        other_run = await service.stream("other-run")
        await other_run.send("b", pictures(2))
        assert await other_run.refusal("b") == Refusal.of(Reason.BATCH_ID_REUSED, batch_id="b", field="run_id")
        await stream.send("b", pictures(2))
        again = await stream.result()
        assert again.answer == first.answer and again.replayed
        assert await service.balances() == (2, 0, 998)


async def test_replay_after_a_reconnect_is_free_and_byte_identical_whatever_is_served_by_then(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    async with serving(SqlLedger.open(url)) as service:
        stream = await service.stream()
        await stream.send("b", pictures(3))
        first = await stream.result()
        key = service.key
        stream.call.cancel()
        stream = await service.stream()
        await stream.send("b", pictures(3))
        second = await stream.result()
        assert service.engine.calls == [3]
    books = SqlLedger.open(url)
    before = await books.account("device")
    async with serving(books, engine=GatedEngine(seed=7), answers="hard", key=key) as service:
        stream = await service.stream()
        await stream.send("b", pictures(3))
        third = await stream.result()
        assert service.engine.calls == []
        assert await service.ledger.account("device") == before
    assert [first.replayed, second.replayed, third.replayed] == [False, True, True]
    assert len({result.answer.SerializeToString(deterministic=True) for result in (first, second, third)}) == 1
    assert third.balance_count == 997


async def test_a_repeat_while_the_first_is_under_way_is_told_to_wait() -> None:
    async with serving() as service:
        service.engine.gate.clear()
        stream, again = await service.stream(), await service.stream()
        await stream.send("b", pictures(2))
        await until(lambda: service.engine.calls)
        await again.send("b", pictures(2))
        refusal = await again.refusal("b")
        assert refusal.reason is Reason.BATCH_IN_FLIGHT and refusal.retry_seconds == 0.5
        service.engine.gate.set()
        assert not (await stream.result()).replayed
        await again.send("b", pictures(2))
        assert (await again.result()).replayed
        assert await service.balances() == (2, 0, 998)


async def test_an_exhausted_budget_is_told_with_numbers_and_a_smaller_batch_still_fits() -> None:
    async with serving(budget=10) as service:
        stream = await service.stream()
        await stream.send("a", pictures(7))
        await stream.result()
        await stream.send("b", pictures(4))
        assert await stream.refusal("b") == Refusal.of(Reason.BUDGET_EXHAUSTED, requested=4, available=3, held=0)
        await stream.send("c", pictures(3))
        assert (await stream.result()).balance_count == 0
        await service.ledger.grant("device", 4)
        await stream.send("b", pictures(4))  # a refusal pins nothing: the same id, after the budget was raised
        assert (await stream.result()).balance_count == 0


async def test_concurrent_streams_never_overspend() -> None:
    async with serving(budget=25) as service:
        service.engine.gate.clear()
        streams = [await service.stream(f"r{i}") for i in range(5)]
        for index, stream in enumerate(streams):
            for n in range(3):
                await stream.send(f"{index}-{n}", pictures(5))
        await until(lambda: service.engine.calls)
        service.engine.gate.set()
        kinds = [(await stream.receive()).WhichOneof("payload") for stream in streams for _ in range(3)]
        assert (kinds.count("result"), kinds.count("refusal")) == (5, 10)
        assert await service.balances() == (25, 0, 0)


async def test_a_full_queue_is_told_before_anything_is_held() -> None:
    async with serving(max_queue_pictures=8) as service:
        service.engine.gate.clear()
        stream = await service.stream()
        await stream.send("a", pictures(5))
        await until(lambda: service.engine.calls)
        await stream.send("b", pictures(4))
        refusal = await stream.refusal("b")
        assert refusal == Refusal.of(Reason.OVERLOADED, limit=8)
        assert await service.balances() == (0, 5, 995)
        service.engine.gate.set()
        await stream.result()
        await stream.send("b", pictures(4))
        assert (await stream.result()).batch_id == "b"
        assert service.batcher.taken_pictures == 0


async def test_an_engine_failure_charges_nothing_and_tells_nothing_of_its_cause() -> None:
    async with serving() as service:
        stream = await service.stream()
        service.engine.fail_with = EngineError("weights at /secret/place")
        await stream.send("b", pictures(2))
        refusal = await stream.refusal("b")
        assert refusal.reason is Reason.ENGINE_FAILED and len(refusal.variables["incident"]) == 8
        assert "secret" not in str(refusal)
        assert await service.balances() == (0, 0, 1000)
        service.engine.fail_with = None
        await stream.send("b", pictures(2))
        assert (await stream.result()).answer.charged_count == 2


# --- the stream ---


async def test_the_stream_is_accepted_before_any_batch() -> None:
    async with serving(window_batches=5) as service:
        accepted = await service.open().configure()
        assert (accepted.model_digest, accepted.window_batches) == (ArrayEngine().model_digest, 5)


async def test_the_first_message_must_be_the_config() -> None:
    async with serving() as service:
        stream = service.open()
        await stream.send("b", pictures(1))
        assert await stream.ended_by() == Refusal.of(Reason.STREAM_NOT_CONFIGURED, got="batch")
        empty = service.open()
        await empty.call.write(wire.InferRequest())
        assert await empty.ended_by() == Refusal.of(Reason.STREAM_NOT_CONFIGURED, got="nothing")
        silent = service.open()
        await silent.call.done_writing()
        assert await silent.ended_by() == Refusal.of(Reason.STREAM_NOT_CONFIGURED, got="nothing")
        assert await service.balances() == (0, 0, 1000)


@pytest.mark.parametrize("run_id", ["", "a b", "x" * 65, "../run"])
async def test_a_run_id_that_is_none_is_refused(run_id: str) -> None:
    async with serving() as service:
        stream = service.open()
        await stream.call.write(wire.InferRequest(config=wire.StreamConfig(run_id=run_id)))
        refusal = await stream.ended_by()
        assert (refusal.reason, refusal.variables["field"]) == (Reason.INVALID_REQUEST, "config.run_id")


@pytest.mark.parametrize("message", [wire.InferRequest(config=wire.StreamConfig(run_id="x")), wire.InferRequest()])
async def test_what_is_no_batch_ends_the_stream_after_the_answers_under_way(message: wire.InferRequest) -> None:
    async with serving() as service:
        service.engine.gate.clear()
        stream = await service.stream()
        await stream.send("b", pictures(1))
        await until(lambda: service.engine.calls)
        await stream.call.write(message)
        service.engine.gate.set()
        assert (await stream.result()).batch_id == "b"
        assert (await stream.ended_by()).variables["field"] == "payload"


async def test_a_half_closed_stream_ends_well_after_its_last_answer() -> None:
    async with serving() as service:
        service.engine.gate.clear()
        stream = await service.stream()
        for batch_id in ("a", "b"):
            await stream.send(batch_id, pictures(1))
        await stream.call.done_writing()
        await until(lambda: service.engine.calls)
        service.engine.gate.set()
        assert {(await stream.result()).batch_id for _ in range(2)} == {"a", "b"}
        assert await stream.call.read() is grpc.aio.EOF
        assert await stream.call.code() is grpc.StatusCode.OK
        await until(lambda: not service.inference._streams)


async def test_answers_come_out_of_order_when_the_first_takes_longer() -> None:
    async with serving(budget=4) as service:
        service.engine.gate.clear()
        stream = await service.stream()
        await stream.send("slow", pictures(3))
        await until(lambda: service.engine.calls)
        await stream.send("refused-at-once", pictures(2))
        await stream.refusal("refused-at-once")
        service.engine.gate.set()
        assert (await stream.result()).batch_id == "slow"


async def test_the_server_reads_no_further_than_the_window() -> None:
    async with serving(window_batches=3) as service:
        service.engine.gate.clear()
        stream = await service.stream()
        for index in range(10):
            await stream.send(f"b{index}", pictures(1))
        await until(lambda: service.batcher.taken_pictures == 3)
        await asyncio.sleep(0.2)
        assert service.batcher.taken_pictures == 3
        service.engine.gate.set()
        answered = {(await stream.result()).batch_id for _ in range(10)}
        assert answered == {f"b{index}" for index in range(10)}


async def send_many(stream: Stream, count: int) -> None:
    """Batches of 100 pictures, one after the other."""
    for index in range(count):
        await stream.send(f"b{index}", pictures(100))


async def test_answers_do_not_pile_up_for_a_reader_who_does_not_read() -> None:
    # Answers of 800 kB: the transport takes a few of them, and no more than the window waits in the server.
    engine = GatedEngine(class_count=2000)
    async with serving(engine=engine, budget=100_000, window_batches=4) as service:
        stream = await service.stream()
        sending = asyncio.create_task(send_many(stream, 60))

        async def window_full() -> bool:
            return (await service.balances())[0] >= 400

        await until(window_full)
        posted = -1
        while posted != (posted := (await service.balances())[0]):
            await asyncio.sleep(0.5)
        assert posted <= 2500  # of 6000
        for _ in range(60):
            await stream.result()
        await sending
        assert (await service.balances())[0] == 6000


# --- callers who leave ---


async def test_a_batch_still_queued_when_its_caller_leaves_is_voided_and_not_computed() -> None:
    async with serving(max_engine_pictures=4) as service:
        service.engine.gate.clear()
        other, leaver = await service.stream("other"), await service.stream("leaver")
        await other.send("first", pictures(4))
        await until(lambda: service.engine.calls)
        await leaver.send("queued", pictures(3))
        await until(lambda: service.batcher.taken_pictures == 7)
        await until(lambda: len(service.batcher._waiting) == 1)
        leaver.call.cancel()
        await until(lambda: len(service.inference._streams) == 1)
        service.engine.gate.set()
        await other.result()
        await until(lambda: service.batcher.taken_pictures == 0)
        assert service.engine.calls == [4]
        assert await service.balances() == (4, 0, 996)
        assert await outcomes(service) == {"charged": 1.0, "departed": 1.0}
        kinds = [(e.kind.value, e.batch_id) for e in await service.ledger.statement("device")]
        assert ("void", "queued") in kinds


async def test_a_batch_with_the_engine_when_its_caller_leaves_is_posted_and_replayed_to_whoever_returns() -> None:
    async with serving() as service:
        service.engine.gate.clear()
        stream = await service.stream()
        await stream.send("b", pictures(3))
        await until(lambda: service.engine.calls)
        stream.call.cancel()
        await until(lambda: not service.inference._streams)
        service.engine.gate.set()
        await until(lambda: service.batcher.taken_pictures == 0)
        assert await service.balances() == (3, 0, 997)
        again = await service.stream()
        await again.send("b", pictures(3))
        result = await again.result()
        assert result.replayed and service.engine.calls == [3]
        assert await service.balances() == (3, 0, 997)


async def test_a_caller_who_leaves_while_an_answer_is_being_written_is_noticed() -> None:
    engine = GatedEngine(class_count=2000)
    async with serving(engine=engine, budget=100_000, window_batches=4) as service:
        stream = await service.stream()
        sending = asyncio.create_task(send_many(stream, 40))
        await until(lambda: len(engine.calls) > 4)
        await asyncio.sleep(0.3)  # the transport is full
        stream.call.cancel()
        await until(lambda: not service.inference._streams)
        await until(lambda: not service.inference._batches)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        posted, held, balance = await service.balances()
        assert held == 0 and posted + balance == 100_000 and service.batcher.taken_pictures == 0


async def test_a_caller_who_leaves_before_the_config_leaves_nothing_behind() -> None:
    async with serving() as service:
        stream = service.open()
        await asyncio.wait_for(stream.call.wait_for_connection(), 10)
        await until(lambda: service.inference._streams)
        stream.call.cancel()
        await until(lambda: not service.inference._streams)
        await until(lambda: {task.get_name() for task in asyncio.all_tasks()}.isdisjoint({"stream-read", "batch"}))


# --- credentials and draining ---


async def test_a_revoked_key_ends_an_open_stream_at_its_next_batch() -> None:
    async with serving() as service:
        stream = await service.stream()
        await stream.send("a", pictures(1))
        await stream.result()
        (stored,) = await service.ledger.keys("device")
        await service.ledger.revoke_key(stored.key_id)
        service.clock.seconds += CACHE_SECONDS
        await stream.send("b", pictures(1))
        assert (await stream.ended_by()).reason is Reason.UNAUTHENTICATED
        assert await service.balances() == (1, 0, 999)


async def test_draining_finishes_what_is_under_way_tells_the_streams_and_ends_them_well() -> None:
    async with serving(grace_seconds=7) as service:
        service.engine.gate.clear()
        busy, idle, unconfigured = await service.stream(), await service.stream(), service.open()
        await unconfigured.call.wait_for_connection()
        await busy.send("b", pictures(2))
        await until(lambda: service.engine.calls and len(service.inference._streams) == 3)
        draining = asyncio.create_task(service.inference.drain())
        for stream in (busy, idle):
            response = await stream.receive()
            assert response.draining.grace_duration.seconds == 7
        assert await idle.call.read() is grpc.aio.EOF
        assert await idle.call.code() is grpc.StatusCode.OK
        assert (await unconfigured.ended_by()).reason is Reason.DRAINING
        assert not draining.done()
        service.engine.gate.set()
        assert (await busy.result()).batch_id == "b"
        assert await busy.call.read() is grpc.aio.EOF
        await asyncio.wait_for(draining, 5)
        assert await service.balances() == (2, 0, 998)
        assert (await service.open().ended_by()).reason is Reason.DRAINING  # who comes now is sent away


async def test_a_reader_who_does_not_read_cannot_keep_a_drain_from_being_cut_short() -> None:
    engine = GatedEngine(class_count=2000)
    async with serving(engine=engine, budget=100_000, window_batches=4) as service:
        stream = await service.stream()
        sending = asyncio.create_task(send_many(stream, 40))
        await until(lambda: len(engine.calls) > 4)
        await asyncio.sleep(0.3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.inference.drain(), 0.3)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    assert (await service.ledger.account("device")).held == 0


# --- a ledger that fails ---


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_sql, "BUSY_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(inference, "VOID_RETRY_SECONDS", 0.05)


async def test_books_that_cannot_be_written_answer_nothing(tmp_path: Path, brisk: None) -> None:
    async with serving(SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")) as service:
        stream = await service.stream()
        with write_locked(tmp_path / "ledger.db"):
            await stream.send("b", pictures(2))
            refusal = await stream.refusal("b")
            assert refusal == Refusal.of(Reason.LEDGER_UNAVAILABLE)
            assert service.engine.calls == []
        await stream.send("b", pictures(2))
        assert (await stream.result()).answer.charged_count == 2


async def test_an_answer_that_cannot_be_posted_is_thrown_away_and_its_hold_comes_back(
    tmp_path: Path, brisk: None
) -> None:
    async with serving(SqlLedger.open(f"sqlite:///{tmp_path}/ledger.db")) as service:
        service.engine.gate.clear()
        stream = await service.stream()
        await stream.send("b", pictures(2))
        await until(lambda: service.engine.calls)
        await service.ledger.void("nobody", "nothing")  # the hold is on the disk
        with write_locked(tmp_path / "ledger.db"):
            service.engine.gate.set()
            assert (await stream.refusal("b")).reason is Reason.LEDGER_UNAVAILABLE
            assert await service.balances() == (0, 2, 998)
            await asyncio.sleep(0.2)  # voiding is tried, in vain

        async def given_back() -> bool:
            return await service.balances() == (0, 0, 1000)

        await until(given_back)
        await until(lambda: not service.money_path._releasing)
        await stream.send("b", pictures(2))
        result = await stream.result()
        assert not result.replayed and service.engine.calls == [2, 2]
        assert await service.balances() == (2, 0, 998)


async def test_a_post_that_happened_though_the_store_said_otherwise_is_found_by_the_repeat(brisk: None) -> None:
    class Lying(MemoryLedger):
        lie = True

        async def post(self, account: str, batch_id: str, answer: bytes) -> Any:
            after = await super().post(account, batch_id, answer)
            if self.lie:  # the commit went through, its confirmation was lost
                raise ledger_sql.LedgerUnavailable("connection lost")
            return after

    async with serving(Lying()) as service:
        stream = await service.stream()
        await stream.send("b", pictures(2))
        assert (await stream.refusal("b")).reason is Reason.LEDGER_UNAVAILABLE
        await stream.send("b", pictures(2))
        assert (await stream.result()).replayed
        assert await service.balances() == (2, 0, 998)


@pytest.mark.parametrize("fails", ["hold", "post"])
async def test_what_the_books_cannot_do_is_told_as_that_and_nothing_stays_held(fails: str) -> None:
    class Refusing(MemoryLedger):
        async def hold(self, request: HoldRequest) -> Held | Posted:
            if fails == "hold":
                raise ledger_sql.LedgerError("the account is not on these books")
            return await super().hold(request)

        async def post(self, account: str, batch_id: str, answer: bytes) -> Any:
            raise ledger_sql.LedgerError("the account is not on these books")

    async with serving(Refusing()) as service:
        stream = await service.stream()
        await stream.send("b", pictures(2))
        refusal = await stream.refusal("b")
        assert refusal == Refusal.of(Reason.LEDGER_REFUSED, problem="the account is not on these books")
        assert await service.balances() == (0, 0, 1000) and service.batcher.taken_pictures == 0


@pytest.mark.parametrize(
    ("sizes", "limit"), [({}, 4), ({"height": 16, "width": 4}, 512), ({"channels": 3}, 512)], ids=str
)
async def test_a_batch_that_was_paid_for_is_replayed_whatever_model_or_limit_came_since(
    tmp_path: Path, sizes: dict[str, int], limit: int
) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    async with serving(SqlLedger.open(url)) as service:
        stream = await service.stream()
        await stream.send("paid", pictures(5))
        first, key = await stream.result(), service.key
    async with serving(
        SqlLedger.open(url), engine=GatedEngine(**sizes), key=key, max_batch_pictures=limit
    ) as service:
        stream = await service.stream()
        await stream.send("paid", pictures(5))
        again = await stream.result()
        assert again.replayed and (again.answer, again.receipt) == (first.answer, first.receipt)
        assert service.engine.calls == [] and await service.balances() == (5, 0, 995)
        await stream.send("unpaid", pictures(5))
        assert (await stream.refusal("unpaid")).reason is Reason.INVALID_IMAGES
        await stream.send("paid", pictures(5, seed=2))
        assert (await stream.refusal("paid")).reason is Reason.BATCH_ID_REUSED
        entries = await service.ledger.statement("device")
        assert [entry.kind for entry in entries] == ["grant", "hold", "post"]


@pytest.mark.parametrize("field", ["picture_count", "channels", "encoding"])
async def test_a_message_that_contradicts_itself_is_not_looked_up(field: str) -> None:
    class Unasked(MemoryLedger):
        async def replay(self, request: HoldRequest) -> Posted | None:
            raise AssertionError("the books were asked")

    async with serving(Unasked()) as service:
        stream = await service.stream()
        batch = wire.Batch(batch_id="b", images=codec.encode_images(pictures(2)))
        setattr(batch.images, field, 99)
        await stream.call.write(wire.InferRequest(batch=batch))
        assert (await stream.refusal("b")).reason is Reason.INVALID_IMAGES


async def test_a_pruned_answer_is_neither_computed_nor_charged_again() -> None:
    class Pruned(MemoryLedger):
        async def hold(self, request: HoldRequest) -> Held | Posted:
            held = await super().hold(request)
            return dataclasses.replace(held, answer=None) if isinstance(held, Posted) else held

    async with serving(Pruned()) as service:
        stream = await service.stream()
        await stream.send("b", pictures(2))
        await stream.result()
        await stream.send("b", pictures(2))
        refusal = await stream.refusal("b")
        assert refusal.reason is Reason.ANSWER_EXPIRED and refusal.retry_seconds is None
        assert service.engine.calls == [2] and await service.balances() == (2, 0, 998)


# --- what is counted ---


async def test_every_batch_is_counted_by_its_outcome() -> None:
    async with serving(budget=5) as service:
        stream = await service.stream()
        await stream.send("a", pictures(3))
        await stream.result()
        await stream.send("a", pictures(3))
        await stream.result()
        await stream.send("b", pictures(3))
        await stream.refusal("b")
        service.engine.fail_with = EngineError("broken")
        await stream.send("c", pictures(1))
        await stream.refusal("c")
        assert await outcomes(service) == {
            "charged": 1.0,
            "replayed": 1.0,
            "budget_exhausted": 1.0,
            "engine_failed": 1.0,
        }
