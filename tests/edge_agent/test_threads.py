"""How many threads a training computes with, on machines that other programs use, too."""

from collections.abc import Callable

import pytest
import torch

from edge_agent import threads
from edge_agent.phase import NoCheckpoint, Resumable
from edge_agent.threads import search

Cost = Callable[[int], float]


class _Training:
    """Steps whose seconds a `Cost` tells of a number of threads, up to `most`."""

    def __init__(self, most: int) -> None:
        self._search = search(most)
        self.threads = next(self._search)

    def run(self, cost: Cost, *, seconds: float) -> list[int]:
        """For so long. Returns the numbers of threads used."""
        used: list[int] = []
        passed = 0.0
        while passed < seconds:
            passed += cost(self.threads)
            used.append(self.threads)
            self.threads = self._search.send(cost(self.threads))
        return used


def _alone(count: int) -> float:
    return 0.04 / float(count**0.8)


def _beside_another(count: int) -> float:
    """As measured on two cores, one of them busy."""
    return 0.04 if count == 1 else 1.0


def test_a_machine_of_its_own_is_used_whole_nearly_all_the_time() -> None:
    used = _Training(8).run(_alone, seconds=300)
    assert used.count(8) > 0.98 * len(used)


def test_threads_that_wait_for_a_busy_core_are_given_up_within_seconds() -> None:
    training = _Training(2)
    used = training.run(_beside_another, seconds=15)
    assert training.threads == 1
    assert used.count(2) < 12
    assert training.run(_beside_another, seconds=600).count(2) < 12, "trying again must stay cheap"


def test_a_core_that_becomes_busy_is_noticed_at_once_and_one_that_becomes_free_within_minutes() -> None:
    training = _Training(2)
    assert training.run(_alone, seconds=100)[-1] == 2
    assert training.run(_beside_another, seconds=15)[-1] == 1
    assert training.run(_beside_another, seconds=900)[-1] == 1
    assert training.run(_alone, seconds=300)[-1] == 2


def test_a_container_with_a_quota_of_two_of_64_cores_ends_with_two_threads() -> None:
    used = _Training(64).run(lambda count: _alone(min(count, 2)) * max(1.0, count / 2), seconds=60)
    assert used[-1] == 2


def test_fewer_threads_that_are_hardly_faster_change_nothing() -> None:
    assert set(_Training(2).run(lambda count: 0.0195 + 0.0005 * count, seconds=5)[100:]) == {2}


def _stepped(steps: int) -> None:
    training = Resumable(NoCheckpoint(), torch.manual_seed(0))
    for _ in range(steps):
        training.stepped()


def test_a_training_uses_the_number_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1] if used else 4)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(threads, "_most", 0)
    threads.look_for_the_best()
    _stepped(20)
    assert 2 in used and max(used) == 4


def test_nobody_looks_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    _stepped(20)
    assert used == []
