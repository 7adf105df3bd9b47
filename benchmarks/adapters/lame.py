"""LAME: the answers of a batch drawn together along its nearest neighbours. Boudiaf et al., CVPR 2022.

"Parameter-free Online Test-time Adaptation"; binary affinity of the k nearest, as in the published code.

Shape letters: N pictures of a batch, C channels, H and W height and width, D features, K classes.
"""

from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_agent.adaptation.method import Adapted
from edge_agent.pixels import normalise
from networks.classifiers import Classifier

NEIGHBOURS = 5
STRENGTH = 1.0
MOST_ROUNDS = 100
_SETTLED = 1e-8
"""Relative change of the energy."""


class Lame:
    """The student's features and answers, corrected within each batch; no batch is remembered."""

    def __init__(self, student: Classifier, *, neighbour_count: int = NEIGHBOURS) -> None:
        self._student = deepcopy(student).eval()
        self._neighbour_count = neighbour_count

    @torch.inference_mode()
    def adapt(self, images_NCHW: Tensor) -> Adapted:
        features_ND = self._student.features(normalise(images_NCHW))
        log_p_NK = self._student.linear(features_ND).log_softmax(dim=1)
        affinity_NN = affinity(F.normalize(features_ND, dim=1), neighbour_count=self._neighbour_count)
        return Adapted(probabilities_NK=correct(log_p_NK, affinity_NN))

    def reset(self) -> None:
        """Nothing to forget."""


def affinity(features_ND: Tensor, *, neighbour_count: int) -> Tensor:
    """Return w (N, N): 1 where the column is among the row's nearest, itself left out. Features have length 1."""
    similarity_NN = (features_ND @ features_ND.T).fill_diagonal_(-torch.inf)
    nearest_NE = similarity_NN.topk(min(neighbour_count, len(features_ND) - 1), dim=1).indices
    return torch.zeros_like(similarity_NN).scatter_(1, nearest_NE, 1.0)


def correct(log_p_NK: Tensor, affinity_NN: Tensor) -> Tensor:
    """Return z (N, K) of z = softmax(log p + strength · w z), the paper's equation 5, repeated from z = p."""
    z_NK, energy = log_p_NK.exp(), float("inf")
    for count in range(MOST_ROUNDS):
        pull_NK = STRENGTH * affinity_NN @ z_NK
        z_NK = torch.softmax(log_p_NK + pull_NK, dim=1)
        before, energy = energy, float((z_NK * (z_NK.clamp(min=1e-20).log() - log_p_NK - pull_NK)).sum())
        if count > 1 and abs(energy - before) <= _SETTLED * abs(before):
            break
    return z_NK
