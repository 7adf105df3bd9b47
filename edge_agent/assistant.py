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
    local_NCHW: Tensor | None,
    mixed_MCHW: Tensor | None,
) -> Classifier | None:
    """Return the assistant that `config` asks for, from the folder where it lies there; None if it asks for none.

    Args:
        folder: keeps the last that is trained, and the training that is under way.
        pool: what it learns from.
        facts: of the student; the assistant's differ by the architecture.
        learnt_from: plain values that name the pool: the assistant is trained again where they are others.
        config, seed, device: of phase 2.
        console: is shown the progress.
        local_NCHW, mixed_MCHW: as for `train_student`.

    Raises BadInput where its training ran away.
    """
    if not config.assistant:
        return None
    wanted = _inputs(learnt_from, config, seed=seed, mixes=mixed_MCHW is not None)
    known = folder.journal.fact("done.assistant")
    done = wanted.index(known) + 1 if known in wanted and folder.has(FILE) else 0
    assistant = folder.read_network(FILE) if done > 0 else None
    for generation in range(done, len(wanted)):
        with console.bar(f"distill: assistant {generation + 1} of {len(wanted)}", "steps") as tell:
            assistant = train_assistant(
                pool,
                class_count=len(facts.labels),
                config=config,
                seed=seed + generation,  # another beginning, or it would go the same way again
                device=device,
                checkpoint=folder.checkpoint("assistant", wanted[generation]),
                progress=tell,
                local_NCHW=local_NCHW,
                mixed_MCHW=mixed_MCHW,
                before=assistant,
            ).cpu()
        refuse_runaway(assistant, config.assistant, config)
        folder.journal.set_facts(**{"done.assistant": None})  # the file is another's before it is said to be done
        folder.write_network(FILE, assistant, replace(facts, architecture=config.assistant))
        folder.finish("assistant", wanted[generation])
    return assistant


def _inputs(learnt_from: dict[str, Any], config: DistillConfig, *, seed: int, mixes: bool) -> list[str]:
    """A digest a generation, of all that its assistant depends on."""
    found: list[str] = []
    for generation in range(config.assistant_generations):
        own = {"settings": in_use(assistants_own(config, first=generation == 0), mixes=mixes)}
        from_what = {"before": found[-1]} if found else {"seed": seed, **learnt_from}
        found.append(digest_of({**own, "assistant": config.assistant, **from_what}))
    return found


def refuse_runaway(network: Classifier, name: str, config: DistillConfig) -> None:
    """Raise BadInput for a network, student or assistant, whose training ended in weights that are no numbers."""
    if not all(value.isfinite().all() for value in network.state_dict().values()):
        raise BadInput(
            f"the training of {name} ran away: its weights are no longer numbers. The answers are kept; train again "
            f"with --set distill.learning_rate={config.learning_rate / 10:g}"
        )
