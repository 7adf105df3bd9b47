"""What a phase needs from the room it runs in: somewhere to keep its state and someone to tell."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edge_agent.threads import Threads


class Checkpoint(Protocol):
    """Keeps the newest state of one phase, so that a killed run goes on where it was."""

    def load(self) -> dict[str, Any] | None:
        """Return the newest state, or None at the first start."""
        ...

    def save_if_due(self, make_state: Callable[[], dict[str, Any]]) -> None:
        """Save `make_state()` if the last save is long ago. Called after every step, so cheap when not due.

        The state holds tensors, numbers, strings, lists and dicts only: it must load with
        `torch.load(weights_only=True)`.
        """
        ...


class NoCheckpoint:
    """Keeps nothing, for a training that is over before it would be worth it."""

    def load(self) -> None:
        """Return None: there is nothing."""

    def save_if_due(self, make_state: Callable[[], dict[str, Any]]) -> None:
        """Save nothing."""


class Progress(Protocol):
    """Told after every step how far the phase is."""

    def __call__(self, done: int, total: int, **figures: float) -> None:
        """Steps done of steps in total, and figures worth showing, such as a loss."""
        ...


class Resumable:
    """A training under way: what its next step depends on, taken from the checkpoint where there is one.

    Args:
        checkpoint: where it is kept.
        rng: all that is random is drawn from it.
        parts: networks and optimisers by name, as they are at the first step; loaded in place.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rng: torch.Generator,
        **parts: nn.Module | torch.optim.Optimizer,
    ) -> None:
        self.done = 0
        self.order = torch.empty(0, dtype=torch.int64)
        """Of the pictures in the pass under way, for a training that has passes."""
        self._checkpoint, self._rng, self._parts = checkpoint, rng, parts
        state = checkpoint.load()
        if state is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            rng.set_state(state["rng"])
            self.done, self.order = state["done"], state.get("order", self.order)
        self._threads = Threads()

    def goes_on(self, steps: int) -> bool:
        """Whether there are steps to do, of so many in all."""
        if self.done >= steps:
            self._threads.ended()
        return self.done < steps

    def stepped(self) -> None:
        """One step more is done; keep it, if that is due."""
        self.done += 1
        self._threads.stepped()
        self._checkpoint.save_if_due(self._state)

    def _state(self) -> dict[str, Any]:
        own = {"rng": self._rng.get_state(), "done": self.done, "order": self.order}
        return {name: part.state_dict() for name, part in self._parts.items()} | own


def average_of(network: nn.Module, *, decay: float) -> AveragedModel:
    """Return the average of a network along its training, of which `decay` survives each step.

    While it is young it remembers less, no more than a ninth of the steps so far: by a constant decay of 0.995 the
    untrained weights would still be 29 % of it after 250 steps.
    """
    return AveragedModel(network, multi_avg_fn=partial(_average, decay=decay))


def _average(averages: list[Tensor], weights: list[Tensor], count: Tensor | int, *, decay: float) -> None:
    young = (1 + int(count)) / (10 + int(count))
    get_ema_multi_avg_fn(min(decay, young))(averages, weights, count)


def fall(done: int, steps: int) -> float:
    """Factor of the step size after so many steps: half a cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * done / steps))


def rise_and_fall(part_done: float, warmup_fraction: float) -> float:
    """Factor of the step size: a straight rise to 1, then half a cosine to 0."""
    if part_done < warmup_fraction:
        return part_done / warmup_fraction
    return 0.5 * (1.0 + math.cos(math.pi * (part_done - warmup_fraction) / (1.0 - warmup_fraction)))
