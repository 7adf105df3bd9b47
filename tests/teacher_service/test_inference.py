"""TeacherInference as its own protocol has it, over real gRPC; what it shares with others: test_protocols."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service.auth import Caller
from teacher_service.engine import ArrayEngine
from teacher_service.ledger import Held, HoldRequest, LedgerError, Posted, Role
from teacher_service.ledger_memory import MemoryLedger
from teacher_service.ledger_sql import SqlLedger
from teacher_service.money_path import Batch, Gone
from teacher_service.terms import Terms
from tests.teacher_service.parts import GatedEngine, pictures, serving, until

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
        encodings=codec.ENCODINGS,
        max_batch_pictures=64,
        max_message_bytes=64 * 2**20,
        window_batches=3,
    )


async def test_an_answer_carries_the_digest_of_the_pixels_that_were_looked_at() -> None:
    async with serving() as service:
        stream = await service.stream()
        await stream.send("b", pictures(5))
        answer = (await stream.result()).answer
    assert answer.pixel_digest == hashlib.sha256(pictures(5).tobytes()).digest()


@pytest.mark.parametrize(("answers", "kind"), [("soft", "probabilities"), ("hard", "class_indices")])
async def test_answers_are_of_the_described_kind_and_give_nothing_else_away(answers: str, kind: str) -> None:
    async with serving(answers=answers) as service:
        found = await service.stub.Describe(wire.DescribeRequest(), metadata=service.metadata())
        stream = await service.stream()
        await stream.send("b", pictures(5))
        answer = (await stream.result()).answer
    assert wire.AnswerKind.Name(found.answer_kind) == f"ANSWER_KIND_{kind.upper()}"
    assert answer.WhichOneof("outcome") == kind
    codec.decode_answer(answer, picture_count=5, class_count=10)


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
    async with serving(max_batch_pictures=8) as service:
        stream = await service.stream()
        await stream.call.write(wire.InferRequest(batch=batch))
        refusal = await stream.refusal(batch.batch_id[:64])
        assert refusal.variables["field"] == field and refusal.retry_seconds is None
        assert [entry.kind.value for entry in await service.ledger.statement("device")] == ["grant"]
        await stream.send("good", pictures(8))
        assert (await stream.result()).batch_id == "good"


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


# --- callers who leave ---


async def test_a_caller_who_leaves_before_the_config_leaves_nothing_behind() -> None:
    async with serving() as service:
        stream = service.open()
        await asyncio.wait_for(stream.call.wait_for_connection(), 10)
        await until(lambda: service.calls.streams)
        stream.call.cancel()
        await until(lambda: not service.calls.streams)
        await until(lambda: {task.get_name() for task in asyncio.all_tasks()}.isdisjoint({"stream-read", "batch"}))


# --- draining ---


async def test_draining_finishes_what_is_under_way_tells_the_streams_and_ends_them_well() -> None:
    async with serving(grace_seconds=7) as service:
        service.engine.gate.clear()
        busy, idle, unconfigured = await service.stream(), await service.stream(), service.open()
        await unconfigured.call.wait_for_connection()
        await busy.send("b", pictures(2))
        await until(lambda: service.engine.calls and len(service.calls.streams) == 3)
        draining = asyncio.create_task(service.calls.drain())
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


async def test_the_books_have_no_line_of_a_batch_whose_caller_left_before_it_was_held() -> None:
    async with serving() as service:
        caller = Caller(account="device", role=Role.CUSTOMER)
        gone = Gone()
        gone.left = True
        batch = Batch("b", codec.ReceivedImages.of(codec.encode_images(pictures(2))))
        with pytest.raises(Refusal) as caught:
            await service.money_path.answer(caller, "run", batch, gone)
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        assert [entry.kind.value for entry in await service.ledger.statement("device")] == ["grant"]


@pytest.mark.parametrize("fails", ["hold", "post"])
async def test_what_the_books_cannot_do_is_told_as_that_and_nothing_stays_held(fails: str) -> None:
    class Refusing(MemoryLedger):
        async def hold(self, request: HoldRequest) -> Held | Posted:
            if fails == "hold":
                raise LedgerError("the account is not on these books")
            return await super().hold(request)

        async def post(self, account: str, batch_id: str, answer: bytes) -> Any:
            raise LedgerError("the account is not on these books")

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


async def test_a_batch_that_was_paid_for_is_replayed_though_the_rate_never_allows_as_many_now(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    async with serving(SqlLedger.open(url)) as service:
        await service.ledger.set_terms("device", Terms(pictures_per_second=1))
        stream = await service.stream()
        await stream.send("paid", pictures(5))
        first, key = await stream.result(), service.key
    async with serving(SqlLedger.open(url), key=key, max_batch_pictures=4) as service:
        stream = await service.stream()
        await stream.send("paid", pictures(5))
        again = await stream.result()
        assert again.replayed and again.receipt == first.receipt
        await stream.send("paid", pictures(5))
        assert (await stream.refusal("paid")).retry_seconds == 4.0


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
