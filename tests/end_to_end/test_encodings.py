"""Pictures that travel compressed, between real processes."""

import sqlite3
import sys

import pytest

from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire

# A codec of another build: what is lossy comes out a little different, in every pixel.
OTHER_DECODER = """
from protos import codec
from teacher_service import money_path
right = money_path._decompressed
def wrong(images):
    images_NCHW, digest = right(images)
    if images.encoding not in codec.LOSSLESS:
        images_NCHW = images_NCHW ^ 1
        digest = codec.pixel_digest(images_NCHW)
    return images_NCHW, digest
money_path._decompressed = wrong
from teacher_service.cli import serve
serve()
"""
# Of so many pictures of 8 x 8: fewer are smaller as they are.
LARGE = ("--set", "batch_pictures=64")
JPEG = (*LARGE, "--set", "image_encoding=jpeg")


def rows(world):
    """Batch id -> encoding, pictures, whether answered, and the bytes that were sent."""
    journal = sqlite3.connect(world.run_dir / "journal.db")
    found = journal.execute("SELECT batch_id, request, picture_count, answer FROM batches ORDER BY slot").fetchall()
    journal.close()
    return {
        batch_id: (wire.Batch.FromString(request).images.encoding, count, answer is not None, request)
        for batch_id, request, count, answer in found
    }


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_a_run_over_each_encoding_is_answered_and_sends_fewer_bytes(world, name):
    world.account(1000)
    world.start_server()
    done = world.agent(*LARGE, "--set", f"image_encoding={name}", budget=192)
    assert done.returncode == 0, done.stderr
    summary = world.summary()
    assert (summary["queries"]["charged"], summary["left_out"], summary["private_images_sent"]) == (192, 0, 0)
    assert world.posted_batches() == {batch_id: count for batch_id, (_, count, _, _) in rows(world).items()}
    if name != "png":  # what a generator makes after two steps is noise, and may be smallest as it is
        wanted = wire.ImageEncoding.Value(f"IMAGE_ENCODING_{name.upper()}_MOSAIC")
        assert {encoding for encoding, _, _, _ in rows(world).values()} == {wanted}
        assert summary["bytes"]["sent"] < 192 * 64


def test_teacher_with_another_decoder_turns_the_run_lossless_loudly_and_nothing_paid_is_lost(world):
    world.account(1000)
    world.start_server(serve=(sys.executable, "-c", OTHER_DECODER))
    done = world.agent(*JPEG, "--quiet", budget=256)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING") == 1 and "other pixels" in done.stderr
    first, *others = rows(world).values()
    assert first[0] == wire.IMAGE_ENCODING_JPEG_MOSAIC
    assert len(others) == 3 and {encoding for encoding, _, _, _ in others} <= set(codec.LOSSLESS)
    summary = world.summary()
    assert (summary["queries"]["charged"], summary["left_out"]) == (256, 64)
    assert summary["ledger"]["debited"] == 256
    assert world.posted_batches() == {batch_id: count for batch_id, (_, count, _, _) in rows(world).items()}
    again = world.agent(*JPEG, budget=320)
    assert again.returncode == 0 and "WARNING" not in again.stderr
    assert sum(encoding not in codec.LOSSLESS for encoding, _, _, _ in rows(world).values()) == 1


def test_agent_killed_on_the_way_sends_the_same_bytes_again(world):
    world.account(2000)
    world.start_server()
    world.kill_agent(world.start_agent(*JPEG, budget=1280), 128, 1280)
    before = rows(world)
    done = world.agent(*JPEG, budget=1280)
    assert done.returncode == 0, done.stderr
    after = rows(world)
    assert {batch_id: after[batch_id][3] for batch_id in before} == {key: row[3] for key, row in before.items()}
    assert world.posted_batches() == {batch_id: count for batch_id, (_, count, _, _) in after.items()}
    assert world.books()["posted"] == 1280
