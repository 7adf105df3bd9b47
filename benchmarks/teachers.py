"""Supervised training of the cloud's teacher: labels, SGD with one cycle, small shifts. The agent sees none of it.

Shape letters: N pictures, C channels, H and W height and width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.datasets import Labelled
from edge_agent import augment
from edge_agent.pixels import normalise
from edge_agent.precision import training_precision
from edge_agent.threads import Threads
from networks import registry
from networks.modelfile import ModelFacts, save_model

BATCH_COUNT = 64


def train_teacher(
    data: Labelled,
    architecture: str,
    *,
    path: Path,
    epochs: int,
    peak_learning_rate: float,
    shift_px: int,
    seed: int,
    progress: Callable[..., None] = lambda done, total, **figures: None,
) -> None:
    """Trains ``architecture`` on labelled pictures and writes a checkpoint that teacher-serve takes."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    class_count = int(data.labels_N.max()) + 1
    _, channels, height, width = data.images_NCHW.shape
    model = registry.build(architecture, class_count=class_count, channels=channels)
    images_NCHW, labels_N = torch.from_numpy(data.images_NCHW), torch.from_numpy(data.labels_N)
    steps = epochs * (len(images_NCHW) // BATCH_COUNT)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=peak_learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak_learning_rate, total_steps=steps)
    model.train().to(memory_format=torch.channels_last)
    order_N = torch.randperm(len(images_NCHW), generator=rng)
    threads = Threads()
    for step in range(steps):
        at = step * BATCH_COUNT % (len(images_NCHW) // BATCH_COUNT * BATCH_COUNT)
        if at == 0:
            order_N = torch.randperm(len(images_NCHW), generator=rng)
        chosen_N = order_N[at : at + BATCH_COUNT]
        view_NCHW = augment.shift(normalise(images_NCHW[chosen_N]), largest_px=shift_px, rng=rng)
        with training_precision(torch.device("cpu")):
            logits_NK = model(view_NCHW.to(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits_NK.float(), labels_N[chosen_N])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        threads.stepped()
        progress(step + 1, steps, loss=loss.item())
    threads.ended()
    facts = ModelFacts(
        architecture=architecture,
        labels=tuple(str(label) for label in range(class_count)),
        channels=channels,
        height=height,
        width=width,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        output="logits",
    )
    save_model(path, model.eval(), facts)
