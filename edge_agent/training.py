"""The networks of a run in their order: assistants, each once for the answers at hand, then the student.

How and why they learn is in `distill`; here is what of it is kept in the run folder, and taken from there.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edge_agent.config import DistillConfig, in_use
from edge_agent.console import Console
from edge_agent.distill import Pool, assistants_own, train_assistant, train_student
from edge_agent.failures import BadInput
from edge_agent.generators import AnyGenerator
from edge_agent.runs import RunFolder, digest_of
from networks import registry
from networks.classifiers import Classifier
from networks.gan import Generator
from networks.modelfile import ModelFacts


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What assistants and student of a run learn from, and how."""

    pool: Pool
    facts: ModelFacts
    """Of the student; an assistant's differ by the architecture."""
    config: DistillConfig
    seed: int
    device: torch.device
    console: Console
    """Is shown the progress."""
    local_NCHW: Tensor | None
    mixed_MCHW: Tensor | None
    """Both as for `train_student`."""


def student_of(
    folder: RunFolder,
    lessons: Lessons,
    *,
    assistant: Classifier | None,
    generator: AnyGenerator | None,
    inputs: str,
    title: str,
) -> Classifier:
    """Return the student that the lessons' facts describe, trained.

    Args:
        folder: keeps the training that is under way, not the student: that is the caller's.
        lessons: what it learns from.
        assistant: who teaches it, too (`assistant_of`).
        generator: what the pool's pictures are by; only a GAN's takes part. None where there is none.
        inputs: a digest of all that the student depends on.
        title: of its progress.

    Raises BadInput where the training ran away.
    """
    facts, config, seed = lessons.facts, lessons.config, lessons.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = registry.build(facts.architecture, class_count=len(facts.labels), channels=facts.channels)
    with lessons.console.bar(title, "steps") as tell:
        student = train_student(
            student,
            generator if isinstance(generator, Generator) else None,
            lessons.pool,
            class_count=len(facts.labels),
            config=config,
            seed=seed,
            device=lessons.device,
            checkpoint=folder.checkpoint("distill", inputs if assistant is None else inputs + _digest(assistant)),
            progress=tell,
            local_NCHW=lessons.local_NCHW,
            mixed_MCHW=lessons.mixed_MCHW,
            assistant=assistant,
        )
    refuse_runaway(student, facts.architecture, "distill.learning_rate", config.learning_rate)
    return student


def assistant_of(folder: RunFolder, lessons: Lessons, *, learnt_from: dict[str, Any]) -> Classifier | None:
    """Return the assistant that the settings ask for, from the folder where it lies there; None if they ask for none.

    Args:
        folder: keeps each generation's when it is trained, and the training that is under way.
        lessons: what it learns from.
        learnt_from: plain values that name the pool: the assistant is trained again where they are others.

    Raises BadInput where its training ran away.
    """
    config, seed = lessons.config, lessons.seed
    if not config.assistant:
        return None
    assistant: Classifier | None = None
    depends_on = {"assistant": config.assistant, "seed": seed, **learnt_from}
    for generation in range(1, config.assistant_generations + 1):
        settings = in_use(assistants_own(config, first=generation == 1), mixes=lessons.mixed_MCHW is not None)
        inputs = digest_of({"settings": settings, **depends_on})
        name = name_of(generation)
        if not (folder.done(name, inputs) and folder.has(f"{name}.pt")):
            # The file will be another's before that is said to be done, and whom it teaches another's pupil.
            folder.journal.set_facts(**{f"done.{name_of(number)}": None for number in (generation, generation + 1)})
            with folder.clock(name), lessons.console.bar(f"distill: {name}", "steps") as tell:
                trained = train_assistant(
                    lessons.pool,
                    class_count=len(lessons.facts.labels),
                    config=config,
                    seed=seed + generation - 1,  # another beginning, or it would go the same way again
                    device=lessons.device,
                    checkpoint=folder.checkpoint(name, inputs if assistant is None else inputs + _digest(assistant)),
                    progress=tell,
                    local_NCHW=lessons.local_NCHW,
                    mixed_MCHW=lessons.mixed_MCHW,
                    before=assistant,
                ).cpu()
            refuse_runaway(trained, config.assistant, "distill.learning_rate", config.learning_rate)
            folder.write_network(f"{name}.pt", trained, replace(lessons.facts, architecture=config.assistant))
            folder.finish(name, inputs)
        assistant = folder.read_network(f"{name}.pt")
        depends_on = {"assistant": config.assistant, "seed": seed, "before": inputs}
    return assistant


def _digest(network: nn.Module) -> str:
    """Of its weights: a training that was begun by one assistant is not ended by another."""
    found = hashlib.sha256()
    for tensor in network.state_dict().values():
        found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def name_of(generation: int) -> str:
    """What an assistant's file, checkpoint and facts are called: assistant, assistant-2, assistant-3."""
    return "assistant" if generation == 1 else f"assistant-{generation}"


def refuse_runaway(network: nn.Module, name: str, setting: str, learning_rate: float, *, where: str = "") -> None:
    """Raise BadInput for a network whose weights are no numbers any more, naming the setting to lower."""
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise BadInput(
            f"the training of {name} ran away: its weights are no longer numbers. What was paid for is kept; train "
            f"again with --set {setting}={learning_rate / 10:g}{where}"
        )
