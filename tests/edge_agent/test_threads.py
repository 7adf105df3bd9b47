"""How many threads a training computes with, on machines that other programs use, too."""

import time
from collections.abc import Callable

import pytest
import torch

from edge_agent import threads
from edge_agent.phase import NoCheckpoint, Resumable
from edge_agent.threads import Search

Cost = Callable[[int], float]


def run(search: Search, cost: Cost, *, seconds: float) -> list[int]:
    """Steps whose seconds a `Cost` tells of a number of threads, for so long. Returns the numbers of threads used."""
    used: list[int] = []
    passed = 0.0
    while passed < seconds:
        used.append(search.count)
        passed += cost(search.count)
        search.stepped(cost(search.count))
    return used


def alone(count: int, *, seconds: float = 0.04) -> float:
    return seconds / float(count**0.8)


def beside_another(count: int) -> float:
    """As measured on two cores, one of them busy."""
    return 0.04 if count == 1 else 1.0


@pytest.mark.parametrize("seconds", [0.04, 2.0, 30.0])
@pytest.mark.parametrize("most", [2, 6, 8, 24])
def test_a_machine_of_its_own_is_used_whole_nearly_all_the_time(most: int, seconds: float) -> None:
    search = Search(most)
    run(search, lambda count: alone(count, seconds=seconds), seconds=1000 * seconds)
    used = run(search, lambda count: alone(count, seconds=seconds), seconds=10_000 * seconds)
    lost = sum(alone(count, seconds=seconds) - alone(most, seconds=seconds) for count in used)
    assert lost < 0.04 * 10_000 * seconds


@pytest.mark.parametrize("most", [2, 3, 4, 8])
def test_threads_that_wait_for_a_busy_core_are_given_up_within_seconds(most: int) -> None:
    search = Search(most)
    used = run(search, beside_another, seconds=20)
    assert search.best == 1
    assert len(used) - used.count(1) < 18
    used = run(search, beside_another, seconds=600)
    assert len(used) - used.count(1) < 12, "trying again must stay cheap"


@pytest.mark.parametrize("most", [2, 6])
def test_a_core_that_becomes_busy_is_noticed_at_once_and_one_that_becomes_free_within_minutes(most: int) -> None:
    search = Search(most)
    run(search, alone, seconds=100)
    assert search.best == most
    run(search, beside_another, seconds=20)
    assert search.best == 1
    run(search, beside_another, seconds=900)
    assert search.best == 1
    run(search, alone, seconds=300)
    assert search.best == most


def test_a_container_with_a_quota_of_two_of_64_cores_ends_with_two_threads() -> None:
    search = Search(64)
    run(search, lambda count: alone(min(count, 2)) * max(1.0, count / 2), seconds=60)
    assert search.best == 2


def test_fewer_threads_that_are_hardly_faster_change_nothing() -> None:
    search = Search(2)
    run(search, lambda count: 0.0195 + 0.0005 * count, seconds=5)
    assert search.best == 2


def stepped(steps: int, monkeypatch: pytest.MonkeyPatch, cost: Cost) -> list[int]:
    """The numbers that a training of so many steps sets."""
    used = [4]
    now = [0.0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    training = Resumable(NoCheckpoint(), torch.manual_seed(0))
    while training.goes_on(steps):
        now[0] += cost(used[-1])
        training.stepped()
    return used[1:]


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the command line has said so, on a machine of four cores."""
    monkeypatch.setattr(threads, "_most", 4)


def test_a_training_ends_with_the_best_number_whatever_its_last_step_tried(
    looking: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in (5, 8, 10, 14, 20):
        assert stepped(steps, monkeypatch, alone)[-1:] == [4]
    assert stepped(40, monkeypatch, beside_another)[-1] == 1


def test_who_looks_again_is_not_bound_by_what_was_found(looking: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    threads.look_for_the_best()
    assert threads._most == 4


def test_nobody_looks_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_most", 0)
    assert stepped(20, monkeypatch, alone) == []
