"""What each output policy costs the student: ``python -m benchmarks.policies``.

One teacher and one pool of synthetic pictures on scikit-learn's digits; the same pictures are answered under each
policy, through the server's own code and the agent's, and a student is trained on each. No server, no ledger.
"""

import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import datasets
from benchmarks.demo import BUDGET, TEACHER
from benchmarks.teachers import train_teacher
from edge_agent.agent import predict_classes
from edge_agent.config import DeprivatizeConfig, DistillConfig
from edge_agent.deprivatize import train_generator
from edge_agent.distill import Pool, train_student
from edge_agent.phase import NoCheckpoint
from edge_agent.pixels import quantise
from edge_agent.responses import epsilon
from networks import registry
from networks.gan import draw_latents
from networks.modelfile import load_model
from protos import codec
from teacher_service import policy
from teacher_service.terms import Terms
from teacher_service.torch_engine import TorchEngine

SOFT, TOP_3, HARD = Terms(), Terms(top_k=3), Terms(answers="hard")
POLICIES = (SOFT, TOP_3, Terms(decimals=2), Terms(decimals=1), Terms(top_k=3, decimals=2), Terms(top_k=1), HARD)
CPU = torch.device("cpu")


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of teacher, generator, pictures and students.")
def main(seed: int) -> None:
    """Print one line a policy: bytes of an answered batch of 128, and the student's test accuracy."""
    test, device, quiet = datasets.digits("test"), datasets.digits("device"), lambda *done, **figures: None
    with tempfile.TemporaryDirectory(prefix="mekd-policies-") as folder:
        path = Path(folder) / "teacher.pt"
        train_teacher(datasets.digits("cloud"), path=path, seed=seed, **TEACHER)  # type: ignore[arg-type]
        teacher = TorchEngine(load_model(path), device="cpu")
    config = DeprivatizeConfig()
    run: dict[str, Any] = {"seed": seed, "device": CPU, "checkpoint": NoCheckpoint(), "progress": quiet}
    generator = train_generator(torch.from_numpy(device.images_NCHW), class_count=10, config=config, **run)
    rng = torch.Generator().manual_seed(seed)
    latents_NL = draw_latents(BUDGET, class_count=10, noise_count=config.noise_count, rng=rng)
    with torch.inference_mode():
        images_NCHW = torch.cat([quantise(generator(part)) for part in latents_NL.split(250)])
    probabilities_NK = teacher.answer(images_NCHW.numpy())
    right = teacher.answer(test.images_NCHW).argmax(1) == test.labels_N
    click.echo(f"teacher: {right.mean():.4f} of {len(right)} test pictures")
    for terms in POLICIES:
        answer = policy.apply(terms, probabilities_NK)
        decoded = torch.from_numpy(codec.decode_answer(answer, picture_count=BUDGET, class_count=10))
        answers: dict[str, Any] = {"class_indices_N": decoded}
        if decoded.ndim == 2:
            answers = {
                "probabilities_NK": decoded,
                "epsilon_N1": torch.full((BUDGET, 1), epsilon(terms.decimals, 10)),
            }
        torch.manual_seed(seed)
        student = registry.build("resnet8", class_count=10, channels=1)
        pool = Pool(images_NCHW=images_NCHW, latents_NL=latents_NL, **answers)
        student = train_student(student, generator, pool, class_count=10, config=DistillConfig(), **run)
        accuracy = (predict_classes(student, torch.from_numpy(test.images_NCHW)).numpy() == test.labels_N).mean()
        size = policy.apply(terms, probabilities_NK[:128]).ByteSize()
        click.echo(f"{codec.kind_of(answer)}: {accuracy:.4f} with {BUDGET} queries; {size} bytes a batch of 128")


if __name__ == "__main__":
    main()
