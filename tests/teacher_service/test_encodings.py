"""Compressed pictures over real gRPC: answered as their pixels would be, refused uncharged where they are none."""

import random
import threading
from typing import Any

import pytest

from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import money_path
from teacher_service.engine import ArrayEngine
from tests.teacher_service.parts import Service, Stream, pictures, serving, until

MOSAICS = codec.ENCODINGS[1:]
EACH = pytest.mark.parametrize("encoding", MOSAICS, ids=["png", "jpeg", "webp"])


async def send(stream: Stream, batch_id: str, images: wire.ImageBatch) -> None:
    await stream.call.write(wire.InferRequest(batch=wire.Batch(batch_id=batch_id, images=images)))


async def assert_nothing_was_written(service: Service) -> None:
    assert [entry.kind.value for entry in await service.ledger.statement("device")] == ["grant"]
    assert service.batcher.taken_pictures == 0


def undecodable(encoding: int) -> wire.ImageBatch:
    """A mosaic with nothing wrong on its outside, whose pixels do not decode."""
    images = codec.encode_images(pictures(64), encoding)
    payload = bytearray(images.payload)
    if encoding == wire.IMAGE_ENCODING_PNG_MOSAIC:
        at = payload.index(b"IDAT") + 4
        payload[at : at + 2] = b"\0\0"  # no zlib stream
    elif encoding == wire.IMAGE_ENCODING_JPEG_MOSAIC:
        at = payload.index(b"\xff\xc4")
        payload[at + 4] = 0xFF  # a table of no kind
    else:
        payload[23:26] = b"\x9d\x01\x2a"
        payload[30:60] = b"\xff" * 30
        payload[20] |= 0xE0  # a first partition longer than the file
        payload[21:23] = b"\xff\xff"
    images.payload = bytes(payload)
    codec.check_images(images, channels=1, height=8, width=8, max_batch_pictures=64)
    return images


@EACH
async def test_a_mosaic_is_answered_as_the_pixels_that_it_decodes_to(encoding: int) -> None:
    images = codec.encode_images(pictures(64), encoding)
    decoded_NCHW = codec.decode_images(images)
    async with serving() as service:
        stream = await service.stream()
        await send(stream, "b", images)
        result = await stream.result()
        assert await service.balances() == (64, 0, 936)
    answer = result.answer
    assert answer.pixel_digest == codec.pixel_digest(decoded_NCHW) and answer.charged_count == 64
    expected_NK = ArrayEngine().answer(decoded_NCHW)
    assert codec.decode_answer(answer, picture_count=64, class_count=10).tobytes() == expected_NK.tobytes()


@EACH
async def test_a_repeat_is_free_and_the_same_pixels_in_other_bytes_are_another_batch(encoding: int) -> None:
    async with serving() as service:
        stream = await service.stream()
        await send(stream, "b", codec.encode_images(pictures(64), encoding))
        first = await stream.result()
        await send(stream, "b", codec.encode_images(pictures(64), encoding))
        again = await stream.result()
        assert again.replayed and again.answer == first.answer
        await send(stream, "b", codec.encode_images(pictures(64)))
        assert (await stream.refusal("b")).reason is Reason.BATCH_ID_REUSED
        assert await service.balances() == (64, 0, 936)


@EACH
async def test_what_does_not_decode_is_refused_without_a_charge_and_the_stream_goes_on(encoding: int) -> None:
    async with serving() as service:
        stream = await service.stream()
        await send(stream, "bad", undecodable(encoding))
        refusal = await stream.refusal("bad")
        assert (refusal.reason, refusal.variables["field"]) == (Reason.INVALID_IMAGES, "batch.images.payload")
        assert refusal.variables["got"].startswith("one that does not decode")
        await assert_nothing_was_written(service)
        await send(stream, "bad", codec.encode_images(pictures(64), encoding))
        assert (await stream.result()).answer.charged_count == 64, "a refusal pins nothing"


@EACH
async def test_a_paid_mosaic_is_replayed_though_it_is_not_taken_any_more(
    encoding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(images: Any) -> Any:
        raise Refusal.of(Reason.INVALID_IMAGES, field="batch.images.payload", expected="another", got="one")

    images = codec.encode_images(pictures(64), encoding)
    async with serving() as service:
        stream = await service.stream()
        await send(stream, "b", images)
        paid = await stream.result()
        monkeypatch.setattr(money_path, "_decompressed", fails)
        await send(stream, "b", images)
        again = await stream.result()
        assert again.replayed and again.answer == paid.answer
        await send(stream, "new", images)
        assert (await stream.refusal("new")).reason is Reason.INVALID_IMAGES
        assert await service.balances() == (64, 0, 936)


async def test_decoding_keeps_nobody_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, right = threading.Event(), money_path._decompressed
    begun = []

    def slow(images: Any) -> Any:
        begun.append(images)
        assert go_on.wait(30)
        return right(images)

    monkeypatch.setattr(money_path, "_decompressed", slow)
    async with serving() as service:
        stream = await service.stream()
        await send(stream, "slow", codec.encode_images(pictures(64), MOSAICS[0]))
        await until(lambda: begun)
        await stream.send("raw", pictures(3))
        assert (await stream.result()).batch_id == "raw"
        assert service.batcher.taken_pictures == 64, "what is being decoded has its place"
        go_on.set()
        assert (await stream.result()).batch_id == "slow"


@EACH
async def test_mutated_mosaics_are_answered_and_charged_or_refused_and_not(encoding: int) -> None:
    rng, charged = random.Random(encoding), 0
    good = codec.encode_images(pictures(16, seed=1), encoding).payload
    async with serving(budget=10_000) as service:
        stream = await service.stream()
        for n in range(150):
            payload = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(min(len(payload), rng.choice((60, 10**6))))
                payload[at : at + rng.choice((0, 1, 1, 9))] = rng.randbytes(rng.choice((0, 1, 1, 7)))
            images = wire.ImageBatch(
                encoding=encoding, picture_count=16, channels=1, height=8, width=8, payload=bytes(payload)
            )
            await send(stream, f"b{n}", images)
            response = await stream.receive()
            if response.WhichOneof("payload") == "result":
                charged += 16
                assert response.result.answer.pixel_digest == codec.pixel_digest(codec.decode_images(images))
            else:
                assert Refusal.from_status(response.refusal.status).reason is Reason.INVALID_IMAGES
        assert await service.balances() == (charged, 0, 10_000 - charged)
        assert charged < 150 * 16
