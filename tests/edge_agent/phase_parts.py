"""The room that a phase runs in, as tests want it: a checkpoint that interrupts, progress that nobody reads."""

import io
from collections.abc import Callable
from typing import Any

import torch


class Keep:
    """A checkpoint that keeps every state as bytes, and stops the phase after `stop_after` of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.saved = 0
        self.stop_after = stop_after
        self.newest: bytes | None = None

    def load(self) -> dict[str, Any] | None:
        if self.newest is None:
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(self.newest), weights_only=True)
        return state

    def save_if_due(self, make_state: Callable[[], dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        torch.save(make_state(), buffer)
        self.newest = buffer.getvalue()
        self.saved += 1
        if self.saved == self.stop_after:
            raise InterruptedError


def silent(done: int, total: int, **figures: float) -> None:
    """Progress that nobody reads."""
