"""The assistant of a run: trained once for the answers at hand, kept in the run folder, whatever becomes its student.

What it is good for is in `distill`; here is only where it comes from.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edge_agent.config import DistillConfig, in_use
from edge_agent.console import Console
from edge_agent.distill import Pool, assistants_own, train_assistant
from edge_agent.failures import BadInput
from edge_agent.runs import RunFolder, digest_of
from networks.classifiers import Classifier
from networks.modelfile import ModelFacts

FILE = "assistant.pt"


def assistant_of(
    folder: RunFolder,
    pool: Pool,
    facts: ModelFacts,
    *,
    learnt_from: dict[str, Any],
    config: DistillConfig,
    seed: int,
    device: torch.device,
    console: Console,
    mixed_MCHW: Tensor | None,
) -> Classifier | None:
    """Return the assistant that `config` asks for, from the folder where it lies there; None if it asks for none.

    Args:
        folder: keeps it, and its training while that is under way.
        pool: what it learns from.
        facts: of the student; the assistant's differ by the architecture.
        learnt_from: plain values that name the pool: the assistant is trained again where they are others.
        config, seed, device: of phase 2.
        console: is shown the progress.
        mixed_MCHW: as for `train_student`.

    Raises BadInput where its training ran away.
    """
    if not config.assistant:
        return None
    settings = in_use(assistants_own(config), mixes=mixed_MCHW is not None)
    inputs = digest_of({"settings": settings, "assistant": config.assistant, "seed": seed, **learnt_from})
    if folder.done("assistant", inputs) and folder.has(FILE):
        return folder.read_network(FILE)
    folder.journal.set_facts(**{"done.assistant": None})  # its file will be another's before it is said to be done
    with console.bar("distill: assistant", "steps") as tell:
        assistant = train_assistant(
            pool,
            class_count=len(facts.labels),
            config=config,
            seed=seed,
            device=device,
            checkpoint=folder.checkpoint("assistant", inputs),
            progress=tell,
            mixed_MCHW=mixed_MCHW,
        ).cpu()
    refuse_runaway(assistant, config.assistant, config)
    folder.write_network(FILE, assistant, replace(facts, architecture=config.assistant))
    folder.finish("assistant", inputs)
    return assistant


def refuse_runaway(network: Classifier, name: str, config: DistillConfig) -> None:
    """Raise BadInput for a network, student or assistant, whose training ended in weights that are no numbers."""
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise BadInput(
            f"the training of {name} ran away: its weights are no longer numbers. The answers are kept; train again "
            f"with --set distill.learning_rate={config.learning_rate / 10:g}"
        )
