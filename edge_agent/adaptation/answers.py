"""What a student's own answers say of its stream: which classes came lately, how narrow it is, how sure the student.

Shape letters: N pictures of a batch, K classes.

A narrow stream shows few classes at a time. That is seen in two ways. Where the student is mostly right, its recent
answers are spread otherwise than usual. Where it is mostly wrong, it names many classes even if one alone comes; but
in a stream that shows them by turns, the answers of late are spread otherwise than those before, by more than chance.
In a wide one they are not, however strange they are, while the camera stays as it is. One that changes by so much
that the answers do, too, looks the same for a while, until those before are as strange.
"""

import numpy as np
import torch
from torch import Tensor

from edge_agent.adaptation.statistics import WINDOW_COUNT, Floats

LONG_RUN_COUNT = 1000
"""Answers of before the recent ones that count."""
_COMPARED_COUNT = 16
"""Fewer answers than these say too little of how a stream is spread."""
_NEAR = 2.0
"""How far a batch may be from the recent answers, by chance 1 on average, before it ends them."""
_BY_TURNS, _SURELY_BY_TURNS = 6.0, 18.0
"""How far the recent answers may be from those before, by chance 1 on average: a stream is held for one that shows
its classes by turns from the first on, and fully from the second. With ten classes chance hardly ever gets there."""


class RecentAnswers:
    """The answers of late, and those of before. A batch that is further from the past than chance ends it."""

    def __init__(self, usual_K: Floats) -> None:
        self._usual_K = usual_K
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self.counts_K: Floats = np.zeros_like(self._usual_K)
        """How often each class was named of late."""
        self.confidence = 0.0
        """The mean probability of the class named of late."""
        self.narrowness = 0.0
        """0 for the usual mixture of classes, 1 for a single one or for classes that surely come by turns."""
        self._before_K: Floats = np.zeros_like(self._usual_K)
        self._seen_count = self._first_count = 0

    def take(self, p_NK: Tensor) -> float:
        """Take a batch's probabilities. Return what part of the past still counts: less than 1 where it has ended."""
        surest_N, named_N = p_NK.max(dim=1)
        new_K = torch.bincount(named_N, minlength=len(self._usual_K)).cpu().double().numpy()
        kept_K, part = _at_most(WINDOW_COUNT, self.counts_K), 1.0
        if min(len(p_NK), kept_K.sum()) >= _COMPARED_COUNT:
            part = _NEAR / max(_NEAR, apart(new_K, kept_K))
            kept_K = part * kept_K
        # Most of the first batch, answered before the statistics followed the stream, is no part of the long run.
        self._first_count = self._first_count or len(p_NK)
        if self._seen_count > max(WINDOW_COUNT, self._first_count):
            self._before_K = _at_most(LONG_RUN_COUNT, self._before_K + self.counts_K - kept_K)
        kept = float(kept_K.sum())
        self.confidence = (kept * self.confidence + float(surest_N.sum())) / (kept + len(p_NK))
        self.counts_K = kept_K + new_K
        self._seen_count += len(p_NK)
        self.narrowness = max(narrowness_of(self.counts_K, self._usual_K), self._by_turns())
        return part

    def _by_turns(self) -> float:
        if self._before_K.sum() < _COMPARED_COUNT:
            return 0.0
        far = apart(self.counts_K, self._before_K)
        return min(1.0, max(0.0, (far - _BY_TURNS) / (_SURELY_BY_TURNS - _BY_TURNS)))


def _at_most(most: float, counts_K: Floats) -> Floats:
    """Return counts with the same shares, in sum no more than that."""
    scaled_K: Floats = counts_K * (most / max(most, counts_K.sum()))
    return scaled_K


def narrowness_of(counts_K: Floats, usual_K: Floats) -> float:
    """Return how narrowly pictures are spread over classes: 1 for one class alone, 0 for the usual mixture.

    The squared distance of the shares from the usual ones, as a part of what one class has on average.
    """
    shares_K = counts_K / counts_K.sum()
    widest = 1.0 - float(usual_K @ usual_K)
    return float(min(1.0, ((shares_K - usual_K) ** 2).sum() / max(widest, 1e-12)))


def apart(first_K: Floats, second_K: Floats) -> float:
    """Return how far the shares of two counts are apart, squared: 1 is what chance gives on average.

    Chance is that of two samples of one mixture, the one that both make together.
    """
    first, second = float(first_K.sum()), float(second_K.sum())
    both_K = (first_K + second_K) / (first + second)
    by_chance = (1.0 - float(both_K @ both_K)) * (1.0 / first + 1.0 / second)
    squared = float(((first_K / first - second_K / second) ** 2).sum())
    return squared / max(by_chance, 1e-12)
