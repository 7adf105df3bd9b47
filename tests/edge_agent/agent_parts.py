"""An agent without a teacher, as tests of its parts want it."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from edge_agent.agent import Agent
from edge_agent.config import build_config
from edge_agent.console import Console
from edge_agent.generators import to_content
from edge_agent.journal import Batch
from edge_agent.runs import RunFolder
from edge_agent.teacher import Description
from networks.gan import Generator
from networks.mixes import Mixes
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire


def description(height: int, width: int) -> Description:
    return Description(
        model_digest="m", labels=("a", "b"), channels=1, height=height, width=width, max_batch_pictures=64
    )


def agent(folder: RunFolder, tmp_path: Path, teacher: Description, **settings: object) -> Agent:
    folder.journal.set_facts(teacher=asdict(teacher))
    config = build_config({"images": str(tmp_path / "pictures"), "run_dir": str(folder.path), **settings})
    return Agent(config, folder, None, Console(quiet=True))


def plan_one(folder: RunFolder, pictures_NHW: np.ndarray) -> None:
    images = codec.encode_images(pictures_NHW[:1, None] ^ 1)
    request = wire.Batch(batch_id="a", images=images).SerializeToString()
    folder.journal.plan("distill", Batch(slot=0, batch_id="a", picture_count=1, request=request, latents=b""))


def asked(
    folder: RunFolder,
    tmp_path: Path,
    pictures_NHW: np.ndarray,
    generator: Generator | Mixes | None = None,
    latents: bytes | None = None,
    **settings: object,
) -> Agent:
    """An agent whose whole budget of four is asked and answered by a label-only teacher: only training is left."""
    made = agent(folder, tmp_path, description(8, 8), budget=4, **settings)
    generator = generator or Generator(class_count=2, noise_count=3, side=8, channels=1, width=4)
    folder.write_tensors("generator.pt", to_content(generator))
    images_NCHW = pictures_NHW[:4, None] ^ 1
    folder.finish("deprivatize", made._binding.generators_inputs())
    request = wire.Batch(batch_id="a", images=codec.encode_images(images_NCHW)).SerializeToString()
    if latents is None:
        latents = np.zeros((4, generator.latent_count), "<f4").tobytes()
    folder.journal.plan("distill", Batch(slot=0, batch_id="a", picture_count=4, request=request, latents=latents))
    answer = wire.Answer(model_digest="m", charged_count=4, pixel_digest=codec.pixel_digest(images_NCHW))
    answer.class_indices.CopyFrom(codec.encode_class_indices(np.array([0, 1, 0, 1]), 2))
    folder.journal.keep_answer("a", answer=answer.SerializeToString(), charged_count=4, received_bytes=1)
    return made


def mixes() -> Mixes:
    shape = {"side": 8, "channels": 1, "width": 4, "latent_channels": 2, "view_count": 1}
    return Mixes(**shape, picture_count=56, mix_pictures=2, mix_regions=2, mix_noise=0.3)
