"""The local pictures of a run: at which size, what the door knows, what is said of files left out."""

import numpy as np
import pytest
import torch
from PIL import Image

from edge_agent.data import load_local_images
from edge_agent.pixels import resize
from edge_agent.runs import RunFolder
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire
from tests.edge_agent.agent_parts import agent, description, plan_one


def test_copies_made_at_the_generators_size_are_known_at_the_size_that_is_sent(tmp_path, pictures_NHW):
    """A generator that has learnt a picture by heart makes it at its own size; it is sent resized."""
    with RunFolder(tmp_path / "run") as folder:
        door = agent(folder, tmp_path, description(20, 30), image_size=8)._local.door
        copies_NCHW = resize(torch.from_numpy(pictures_NHW[:5, None]), 20, 30).numpy()
        assert door.matches(wire.Batch(images=codec.encode_images(copies_NCHW))) == 5
        others_NCHW = resize(torch.from_numpy(pictures_NHW[:5, None] ^ 1), 20, 30).numpy()
        assert door.matches(wire.Batch(images=codec.encode_images(others_NCHW))) == 0


def test_the_door_knows_the_very_pictures_that_train_whatever_becomes_of_their_folder(tmp_path, pictures_NHW):
    here = tmp_path / "pictures"
    for i in range(100):
        Image.fromarray(pictures_NHW[i % 64] ^ (1 + i)).save(here / f"more-{i}.png")
    shape = {"channels": 1, "data_root": None, "limit": 64, "seed": 0}
    training_NCHW = load_local_images(str(here), height=20, width=30, **shape).images_NCHW
    with RunFolder(tmp_path / "run") as folder:
        made = agent(folder, tmp_path, description(20, 30), image_size=8, local_pictures=64)
        assert made._local.found.digest == load_local_images(str(here), height=8, width=8, **shape).digest
        for i in range(64):
            Image.fromarray(pictures_NHW[i] ^ 128).save(here / f"{i:02}.png")
            Image.fromarray(pictures_NHW[i] ^ 64).save(here / f"new-{i}.png")
        assert made._local.door.matches(wire.Batch(images=codec.encode_images(training_NCHW))) == 64


def test_the_run_folder_is_no_part_of_the_pictures_it_lies_among(tmp_path, pictures_NHW):
    with RunFolder(tmp_path / "run") as folder:
        found = agent(folder, tmp_path, description(8, 8), images=str(tmp_path), local_pictures=1000)._local.found
        assert len(found.images_NCHW) == 64 and found.skipped == ()


@pytest.mark.parametrize(("height", "width", "side"), [(30, 30, 28), (32, 40, 32), (50, 70, 48), (224, 224, 64)])
def test_the_generator_makes_no_more_pixels_than_are_sent(tmp_path, height: int, width: int, side: int) -> None:
    """Or pictures could differ from local ones for the gate in what shrinking takes away."""
    with RunFolder(tmp_path / "run") as folder:
        made = agent(folder, tmp_path, description(height, width))
        assert made._local.side == side
        folder.journal.set_facts(identity={"generator's side": 72})  # of a former version, which has paid with it
        assert made._local.side == side
        plan_one(folder, np.zeros((1, 8, 8), np.uint8))
        assert made._local.side == 72


def test_files_left_out_are_listed_once_and_not_at_every_start(tmp_path, pictures_NHW):
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    with RunFolder(tmp_path / "run") as folder:
        for _ in range(3):
            assert len(agent(folder, tmp_path, description(8, 8))._local.found.skipped) == 1
        assert (folder.path / "metrics.jsonl").read_text().count("notes.txt") == 1
        (tmp_path / "pictures" / "more.txt").write_text("no picture")
        assert len(agent(folder, tmp_path, description(8, 8))._local.found.skipped) == 2
        assert (folder.path / "metrics.jsonl").read_text().count("notes.txt") == 2
