"""What a phase needs from the room it runs in: somewhere to keep its state and someone to tell."""

from collections.abc import Callable
from typing import Any, Protocol


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


class Progress(Protocol):
    """Told after every step how far the phase is."""

    def __call__(self, done: int, total: int, **figures: float) -> None:
        """Steps done of steps in total, and figures worth showing, such as a loss."""
        ...
