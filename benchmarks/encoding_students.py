"""Does what an encoding loses cost the student accuracy? ``python -m benchmarks.encoding_students --run-dir RUN``

The generator of a finished run makes pictures as phase 2 would. For every encoding a teacher answers them as its
decoder gives them back, and students are trained on those and their answers with the run's settings, but for
``--passes``, once a seed, and scored on the development part: labelled training pictures that no phase sees. The
teacher is asked as a file, not as a service, so nothing here is a run's query. Encodings of a seed share pictures,
first weights and the order of training.

Appends a JSON line to benchmarks/results/encodings.jsonl for each encoding and seed; a finished one is not measured
again. Images that travel raw or as PNG are the reference.
"""

import hashlib
import io
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks import datasets, record
from edge_agent import generators, privacy, sources
from edge_agent.agent import choose_device, predict_classes
from edge_agent.config import ConfigError, RunConfig, build_config, in_use
from edge_agent.console import Console
from edge_agent.distill import Pool, train_student
from edge_agent.egress import CopyGate
from edge_agent.generators import AnyGenerator
from edge_agent.mixes import mixed_pictures
from edge_agent.packing import Packing
from edge_agent.phase import NoCheckpoint
from networks import registry
from networks.gan import Generator
from networks.mixes import Mixes
from networks.modelfile import ModelFileError, load_model
from protos import codec
from teacher_service.torch_engine import TorchEngine


@click.command()
@click.option("--run-dir", type=click.Path(path_type=Path), required=True, help="generator.pt, run.toml of a run.")
@click.option("--teacher", type=click.Path(path_type=Path), required=True, help="Its teacher's checkpoint.")
@click.option("--dataset", type=click.Choice(["mnist", "cifar10"]), default="cifar10", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), envvar="MEKD_DATA", required=True)
@click.option("--encoding", "encodings", multiple=True, default=("raw", "auto"), show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True, help="Of students.")
@click.option("--count", default=50_000, show_default=True, help="Pictures.")
@click.option("--passes", default=5, show_default=True)
def main(
    run_dir: Path,
    teacher: Path,
    dataset: str,
    data: Path,
    encodings: tuple[str, ...],
    seeds: tuple[int, ...],
    count: int,
    passes: int,
) -> None:
    """Train students on what encodings leave of the same pictures, and compare them on the development part."""
    begun = record.about("encoding_students")
    try:
        if dataset == "cifar10":
            data = datasets.cifar10_root(data, unpacked=Path("runs/data"))
        scored = datasets.part(dataset, data, "development")
        layers = tomllib.loads((run_dir / "run.toml").read_text("utf-8"))
        # What teaches every student the same whatever the encoding, or would need to know more than the pool.
        own = {"passes": passes, "assistant": "", "local_weight": 0.0, "balance_answers": False}
        config = build_config(layers, {"data": str(data), "distill": layers["distill"] | own})
        kept = (run_dir / "generator.pt").read_bytes()
        generator = generators.from_content(torch.load(io.BytesIO(kept), weights_only=True))
        generator.to(choose_device(config.device))
        loaded = load_model(teacher)
    except (OSError, ValueError, ConfigError, ModelFileError) as error:
        sys.exit(f"error: {error}")
    facts = {
        "question": "students",
        "dataset": dataset,
        "part": "development",
        "teacher_digest": loaded.digest[:16],
        "generator_digest": hashlib.sha256(kept).hexdigest()[:16],
        "settings": in_use(config.distill, mixes=isinstance(generator, Mixes)),
        "count": count,
        "quality": config.image_quality,
    }
    engine = TorchEngine(loaded, device="cpu")
    made_NL, made_NCHW = _pictures(generator, count, seed=config.seed)
    mixed_MCHW = _mixed(generator, config)
    for encoding in encodings:
        missing = [seed for seed in seeds if not _done(facts | {"encoding": encoding, "seed": seed})]
        if not missing:
            continue
        packing = Packing(encoding, config.image_quality, codec.ENCODINGS)
        parts = [packing.pack(part_NCHW.numpy()) for part_NCHW in made_NCHW.split(config.batch_pictures)]
        decoded_NCHW = np.concatenate([codec.decode_images(part) for part in parts])
        answers = [engine.answer(decoded_NCHW[i : i + 256]) for i in range(0, count, 256)]
        pool = Pool(
            images_NCHW=torch.from_numpy(decoded_NCHW),
            latents_NL=made_NL,
            probabilities_NK=torch.from_numpy(np.concatenate(answers)),
        )
        for seed in missing:
            student = _student(pool, generator, mixed_MCHW, config, seed, classes=len(loaded.facts.labels))
            right_N = predict_classes(student, torch.from_numpy(scored.images_NCHW)).numpy() == scored.labels_N
            figures = {
                "megabytes": round(sum(part.ByteSize() for part in parts) / 1e6, 2),
                "accuracy": round(float(right_N.mean()), 5),
            }
            record.keep("encodings", begun | facts | {"encoding": encoding, "seed": seed} | figures)


def _pictures(generator: AnyGenerator, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Latents (N, L) and pictures (N, C, H, W) uint8, as the slots of phase 2 make them."""
    channels = int(generator.arguments["channels"])
    nothing_local = CopyGate(torch.zeros((0, channels, generator.side, generator.side), dtype=torch.uint8), 0.0)
    source = sources.synthetic(generator, nothing_local, seed=seed)
    slots = [source(slot, min(128, count - 128 * slot)) for slot in range(-(-count // 128))]
    return torch.cat([slot[0] for slot in slots]).float(), torch.cat([slot[1] for slot in slots])


def _mixed(generator: AnyGenerator, config: RunConfig) -> Tensor | None:
    """The local pictures that mixes are of."""
    if not isinstance(generator, Mixes):  # whose local pictures nobody asks for
        return None
    channels = int(generator.arguments["channels"])
    local_NCHW = datasets.local_pictures(config, channels=channels, side=generator.side)
    return mixed_pictures(generator, local_NCHW[privacy.split(local_NCHW, seed=config.seed)[0]])


def _student(
    pool: Pool, generator: AnyGenerator, mixed_MCHW: Tensor | None, config: RunConfig, seed: int, *, classes: int
) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = registry.build(config.student, class_count=classes, channels=pool.images_NCHW.shape[1])
    with Console().bar(f"seed {seed}", "steps") as tell:
        return train_student(
            student,
            generator if isinstance(generator, Generator) else None,
            pool,
            class_count=classes,
            config=config.distill,
            seed=seed,
            device=choose_device(config.device),
            checkpoint=NoCheckpoint(),
            progress=tell,
            mixed_MCHW=mixed_MCHW,
        ).cpu()


def _done(facts: dict[str, Any]) -> bool:
    """Whether a line of these very facts is there."""
    return any(facts.items() <= line.items() for line in record.kept("encodings"))


if __name__ == "__main__":
    main()
