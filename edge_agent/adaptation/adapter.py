"""The third phase: statistics that follow the stream, then a graph. Forward passes only.

Shape letters: N pictures of a batch, C channels, H and W height and width, D features, K classes, E neighbours.

How much of what is decided by two figures of the recent stream, both from the student's own answers (`answers`):

- its narrowness, 0 for the usual mixture of classes, 1 for a single one or for classes by turns. A narrow stream's
  statistics are compared with any mixture of classes, a wide one's with the usual (`statistics`); and in a narrow
  stream the classes that were just seen are likelier (Saerens et al. 2002).
- its confidence, against that on local pictures. Neighbours help a student that is mostly right and mislead one that
  is mostly wrong, so they are listened to no more as it becomes unsure.
"""

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_agent.adaptation import graph
from edge_agent.adaptation.answers import RecentAnswers
from edge_agent.adaptation.memory import Memory
from edge_agent.adaptation.method import Adapted
from edge_agent.adaptation.statistics import StreamNorm, batch_norms
from edge_agent.config import AdaptConfig
from edge_agent.pixels import normalise
from networks.classifiers import Classifier

_LEAST_SHARE = 1e-4
_YOUNG_COUNT = 16
_LEAST_PAID_SHARE = 0.05
_LEAST_PULL, _DOUBTFUL, _SURE = 0.1, 0.85, 0.92
"""Of neighbours in the widest stream, where many are of other classes: this for a student whose usual confidence is
at most the second, 1 from the third on. In a stream of a single class it is 1 for any.

Undisturbed development pictures of CIFAR-10: a student that is 73 % right and 77 % sure loses 4.4 points at 1; one
that is 81 % right and 84 % sure loses 1.8 at 0.5 and 0.3 at 0.1. One of MNIST (99 % right, 98 % sure) loses none at
1, and 0.1 of disturbed ones at 0.1.
"""
_DEAF_BELOW, _ALL_EARS_ABOVE = 0.65, 0.8
"""Confidence, as a part of the usual: below the one neighbours are not listened to, above the other fully."""


class Adapter:
    """A student that follows its stream; `adaptation.method.Method`. The student given is not changed.

    Raises:
        ValueError: the memory was built with another student.
    """

    def __init__(self, student: Classifier, memory: Memory, config: AdaptConfig) -> None:
        self._student = deepcopy(student).eval().requires_grad_(False)
        device = self._student.linear.weight.device
        self._norms: list[StreamNorm] = []
        if memory.statistics is not None:
            trained = batch_norms(self._student)
            self._norms = memory.statistics.layers(trained)
            _replace(self._student, dict(zip(trained, self._norms, strict=True)))
        last = self._student.linear
        found = (memory.features_MD.shape[1], memory.answers_MK.shape[1], len(memory.usual_shares_K))
        if found != (last.in_features, last.out_features, last.out_features):
            raise ValueError(
                f"expected a memory of {last.in_features} features and {last.out_features} classes, "
                f"got {found[0]} and {found[1]}"
            )
        self._paid_MD = torch.from_numpy(memory.features_MD).to(device)
        self._answers_MK = torch.from_numpy(memory.answers_MK).to(device)
        shares_K = np.maximum(memory.usual_shares_K.astype(np.float64), _LEAST_SHARE)
        self._usual_K = shares_K / shares_K.sum()
        self._usual_confidence = float(memory.usual_confidence)
        surety = (self._usual_confidence - _DOUBTFUL) / (_SURE - _DOUBTFUL)
        self._least_pull = min(1.0, max(_LEAST_PULL, surety))
        self._answers = RecentAnswers(self._usual_K)
        self._config = config
        self.reset()

    def reset(self) -> None:
        """Forget the stream: the next batch is the first."""
        for norm in self._norms:
            norm.reset()
        self._answers.reset()
        self._recent_MD, self._said_MK = self._paid_MD[:0], self._answers_MK[:0]

    @torch.inference_mode()
    def adapt(self, images_NCHW: Tensor) -> Adapted:
        """Return what pictures (uint8) show, and learn from them. `shift` is between 0 and 1."""
        features_ND = self._student.features(normalise(images_NCHW.to(self._paid_MD.device)))
        log_p_NK = self._student.linear(features_ND).log_softmax(dim=1)
        # Where the past has ended, neighbours of its classes would only mislead.
        left = int(self._answers.take(log_p_NK.exp()) * len(self._recent_MD))
        self._recent_MD, self._said_MK = self._recent_MD[:left], self._said_MK[:left]
        narrowness, ears = self._answers.narrowness, self._ears()
        for norm in self._norms:  # for the next batch: what this one shows is known only now
            norm.narrowness = narrowness
        # As if as many pictures as there are classes had been seen too, of the usual mixture: a class that did not
        # come lately is rare, not impossible.
        seen_K = self._answers.counts_K + len(self._usual_K) * self._usual_K
        likely_K = torch.from_numpy(seen_K / seen_K.sum() / self._usual_K)
        expected_NK = log_p_NK + ears * narrowness**0.5 * likely_K.log().to(log_p_NK)
        units_ND = F.normalize(features_ND, dim=1)
        pull = self._least_pull + (1.0 - self._least_pull) * narrowness**0.5
        strength, neighbour_count = ears * pull * self._config.strength, self._config.neighbour_count
        # Answers that were paid for speak while the stream is young; then its own pictures know better.
        paid_share = _YOUNG_COUNT / (_YOUNG_COUNT + len(units_ND) - 1 + len(self._recent_MD))
        if paid_share >= _LEAST_PAID_SHARE:
            paid_NK = graph.vote(units_ND, self._paid_MD, self._answers_MK, neighbour_count=neighbour_count)
            expected_NK = expected_NK + paid_share * strength * paid_NK
        z_NK = graph.propagate(
            expected_NK.log_softmax(dim=1),
            self._said_MK,
            graph.nearest(units_ND, self._recent_MD, neighbour_count=neighbour_count),
            strength=(1.0 - paid_share) * strength,
            iterations=self._config.iterations,
        )
        self._recent_MD = torch.cat([units_ND, self._recent_MD])[: self._config.recent_count]
        self._said_MK = torch.cat([z_NK, self._said_MK])[: self._config.recent_count]
        shift = float(np.mean([norm.shift for norm in self._norms])) if self._norms else 0.0
        return Adapted(probabilities_NK=z_NK.float().cpu(), shift=shift)

    def _ears(self) -> float:
        """How far to listen to neighbours, 0 to 1."""
        part = self._answers.confidence / self._usual_confidence
        return min(1.0, max(0.0, (part - _DEAF_BELOW) / (_ALL_EARS_ABOVE - _DEAF_BELOW)))


def _replace(parent: nn.Module, by: dict[nn.BatchNorm2d, StreamNorm]) -> None:
    for name, child in parent.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(parent, name, by[child])
        else:
            _replace(child, by)
