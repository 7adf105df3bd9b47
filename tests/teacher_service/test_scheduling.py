"""That the money path tells the batcher whose a batch is and how long its caller listens."""

import asyncio

import grpc
import pytest

from protos import codec
from protos.errors import Reason
from tests.teacher_service.parts import pictures, serving, until
from tests.teacher_service.test_kserve import infer_request


async def test_a_hold_is_given_back_at_its_callers_deadline_while_the_engine_is_still_busy() -> None:
    async with serving() as service:
        service.engine.gate.clear()
        stream = await service.stream()
        await stream.send("first", pictures(2))
        await until(lambda: service.engine.calls)
        late = infer_request("late", pictures(3))
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await service.kserve.ModelInfer(late, metadata=service.metadata(), timeout=0.3)
        assert told.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        async def only_the_first_is_held() -> bool:
            return await service.balances() == (0, 2, 998)

        await until(only_the_first_is_held)
        assert service.batcher.taken_pictures == 2
        service.engine.gate.set()
        await stream.result()
        assert service.engine.calls == [2] and await service.balances() == (2, 0, 998)


async def test_an_account_with_a_long_queue_neither_fills_it_nor_goes_first() -> None:
    async with serving(max_engine_pictures=4, max_queue_pictures=40, window_batches=64) as service:
        service.engine.gate.clear()
        many = await service.stream("many")
        for index in range(12):
            await many.send(f"many-{index}", pictures(2, seed=index))
        # Half of the queue is the most that one account gets.
        refused = [await many.refusal(f"many-{index}") for index in (10, 11)]
        assert {refusal.reason for refusal in refused} == {Reason.OVERLOADED}
        assert service.batcher.taken_pictures == 20

        one = service.open(await service.new_account("newcomer"))
        await one.configure()
        for index in range(3):
            await one.send(f"one-{index}", pictures(2, seed=100 + index))
        await until(lambda: service.batcher.taken_pictures == 26)
        await asyncio.sleep(0.05)  # past the holds
        service.engine.gate.set()
        answered: list[str] = []

        async def note(stream: object, count: int) -> None:
            for _ in range(count):
                result = await stream.result()  # type: ignore[attr-defined]
                codec.decode_answer(result.answer, picture_count=2, class_count=10)
                answered.append(result.batch_id)

        await asyncio.gather(note(many, 10), note(one, 3))
        await until(lambda: service.batcher.taken_pictures == 0)
    # The first batch was with the engine; then the accounts took turns until the newcomer had no more.
    assert {batch_id[:3] for batch_id in answered[-5:]} == {"man"}
    assert sum(service.engine.calls) == 26
