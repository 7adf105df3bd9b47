"""What answers say of a stream, on answers made up."""

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_agent.adaptation.answers import LONG_RUN_COUNT, RecentAnswers, apart, narrowness_of

EVEN_K = np.full(4, 0.25)
# How often a student that is often wrong names each class, by the class that is shown.
WEAK_KK = torch.tensor([[0.55, 0.25, 0.15, 0.05]] * 4).gather(1, (torch.arange(4) - torch.arange(4)[:, None]) % 4)


def answers(classes_N: Tensor, seed: int, by_class_KK: Tensor = WEAK_KK) -> Tensor:
    """Probabilities (N, K), 0.7 for the class that is named."""
    named_N1 = torch.multinomial(by_class_KK[classes_N], 1, generator=torch.Generator().manual_seed(seed))
    return torch.full((len(classes_N), 4), 0.1).scatter_(1, named_N1, 0.7)


def taken(
    shown: list[Tensor], by_class_KK: Tensor = WEAK_KK, seed: int = 0
) -> tuple[RecentAnswers, list[float], list[float]]:
    """The answers after these batches of classes, and after each the narrowness, and the part of the past kept."""
    recent, narrow, kept = RecentAnswers(EVEN_K), [], []
    for number, classes_N in enumerate(shown, seed):
        kept.append(recent.take(answers(classes_N, number, by_class_KK)))
        narrow.append(recent.narrowness)
    return recent, narrow, kept


def mixed(batch: int, pictures: int) -> list[Tensor]:
    classes_N = torch.randint(4, (pictures,), generator=torch.Generator().manual_seed(7))
    return list(classes_N.split(batch))


def by_turns(batch: int, pictures: int) -> list[Tensor]:
    return list((torch.arange(pictures) * 8 // pictures % 4).split(batch))


def test_narrowness_is_0_at_the_usual_mixture_and_1_at_one_class() -> None:
    even_K, uneven_K = np.full(10, 0.1), np.array([0.7, 0.2, 0.1])
    assert narrowness_of(7 * even_K, even_K) == pytest.approx(0.0, abs=1e-12)
    assert narrowness_of(100 * uneven_K, uneven_K) == pytest.approx(0.0, abs=1e-12)
    assert narrowness_of(30 * np.eye(10)[3], even_K) == pytest.approx(1.0, abs=1e-12)
    # Of the usual mixture the widest are the common classes: the rare one alone is more than on average, so 1.
    assert narrowness_of(np.eye(3)[2], uneven_K) == 1.0
    assert narrowness_of(np.array([5.0, 5.0, *[0.0] * 8]), even_K) == pytest.approx(0.4 / 0.9, abs=1e-9)
    assert narrowness_of(np.array([5.0, 0.0]), np.array([1.0, 0.0])) == 0.0


def test_shares_are_as_far_apart_as_chance_has_them_or_further() -> None:
    rng = np.random.default_rng(0)
    mixture_K = np.array([0.5, 0.3, 0.2])
    by_chance = [apart(rng.multinomial(200, mixture_K), rng.multinomial(60, mixture_K)) for _ in range(2000)]
    assert np.mean(by_chance) == pytest.approx(1.0, abs=0.1)
    assert apart(np.array([100.0, 0.0]), np.array([0.0, 100.0])) == pytest.approx(2.0 / (0.5 * 0.02))
    assert apart(np.array([50.0, 0.0]), np.array([7.0, 0.0])) == 0.0


@pytest.mark.parametrize(("batch", "least"), [(16, 0.35), (200, 0.95)])
def test_a_weak_students_stream_is_narrow_where_its_classes_come_by_turns(batch: int, least: float) -> None:
    by_shares_alone = narrowness_of(WEAK_KK[0].double().numpy(), EVEN_K)
    narrow = [taken(by_turns(batch, 1600), seed=100 * i)[1][-(-600 // batch) :] for i in range(10)]
    assert np.mean(narrow) > least > by_shares_alone


@pytest.mark.parametrize("batch", [1, 16, 200])
def test_a_wide_stream_stays_wide_however_one_sided_the_answers_are(batch: int) -> None:
    one_sided_KK = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).expand(4, 4)
    by_shares_alone = narrowness_of(one_sided_KK[0].double().numpy(), EVEN_K)
    narrow = [taken(mixed(batch, 2000), one_sided_KK, seed=4000 * i)[1][-(-600 // batch) :] for i in range(5)]
    assert np.mean(narrow) == pytest.approx(by_shares_alone, abs=0.05)


@pytest.mark.parametrize(("first", "later"), [(200, 200), (200, 16)])
def test_answers_given_before_the_statistics_followed_are_no_sign_of_turns(first: int, later: int) -> None:
    recent = RecentAnswers(EVEN_K)
    recent.take(answers(mixed(first, first)[0], 0, torch.eye(4)[[0, 0, 1, 1]]))
    narrow = []
    for number, classes_N in enumerate(mixed(later, 1000), 1):
        recent.take(answers(classes_N, number, torch.full((4, 4), 0.25)))
        narrow.append(recent.narrowness)
    assert max(narrow[-(-400 // later) :]) < 0.1


def test_a_batch_of_other_classes_ends_the_past_and_one_of_the_same_does_not() -> None:
    zeros_N = torch.zeros(100, dtype=torch.int64)
    recent, _, kept = taken([zeros_N, zeros_N], torch.eye(4))
    assert kept == [1.0, 1.0]
    assert recent.take(answers(zeros_N + 2, 0, torch.eye(4)) * 0.5) < 0.03
    assert recent.counts_K == pytest.approx([0, 0, 100, 0], abs=3)
    assert recent.confidence == pytest.approx(0.35, abs=0.01)


@pytest.mark.parametrize("batch", [16, 200])
def test_a_wide_stream_keeps_its_past_but_for_chance(batch: int) -> None:
    kept = np.array(taken(mixed(batch, 6000), torch.full((4, 4), 0.25))[2])
    assert (kept == 1.0).mean() > 0.75 and kept.mean() > 0.94


def test_pictures_one_by_one_never_end_the_past_but_leave_it() -> None:
    recent, _, kept = taken(by_turns(1, 800), torch.eye(4))
    assert set(kept) == {1.0}
    assert recent.counts_K.sum() == pytest.approx(129) and recent.counts_K.argmax() == 3


def test_reset_forgets_the_stream() -> None:
    recent, _, _ = taken(by_turns(16, 1600))
    recent.reset()
    assert str(vars(recent)) == str(vars(RecentAnswers(EVEN_K)))


def test_the_long_run_is_bounded() -> None:
    recent, _, _ = taken(mixed(200, 4000))
    assert recent._before_K.sum() == pytest.approx(LONG_RUN_COUNT)
