"""T3A: each class's weights become the mean of the features that were said to be of it. Iwasawa and Matsuo 2021.

"Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization" (NeurIPS). The supports of a class
begin with its row of the last layer; the `support_count` surest stay.

Shape letters: N pictures of a batch, S supports, C channels, H and W height and width, D features, K classes.
"""

from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from edge_agent.adaptation.method import Adapted
from edge_agent.pixels import normalise
from networks.classifiers import Classifier

SUPPORTS = 100


class T3A:
    """The student's features and the supports that the stream has left; `support_count` None keeps all."""

    def __init__(self, student: Classifier, *, support_count: int | None = SUPPORTS) -> None:
        self._student = deepcopy(student).eval()
        self._support_count = support_count
        self.reset()

    def reset(self) -> None:
        device = self._student.linear.weight.device
        self._supports_SD = torch.empty(0, self._student.linear.in_features, device=device)
        self._classes_S = torch.empty(0, dtype=torch.int64, device=device)
        self._entropies_S = torch.empty(0, device=device)
        self._add(self._student.linear.weight.detach())

    @torch.inference_mode()
    def adapt(self, images_NCHW: Tensor) -> Adapted:
        features_ND = self._student.features(normalise(images_NCHW))
        self._add(features_ND)
        sums_KD = torch.zeros_like(self._student.linear.weight)
        sums_KD.index_add_(0, self._classes_S, F.normalize(self._supports_SD, dim=1))
        return Adapted(probabilities_NK=(features_ND @ F.normalize(sums_KD, dim=1).T).softmax(dim=1))

    @torch.inference_mode()
    def _add(self, features_ND: Tensor) -> None:
        log_p_NK = self._student.linear(features_ND).log_softmax(dim=1)
        self._supports_SD = torch.cat([self._supports_SD, features_ND])
        self._classes_S = torch.cat([self._classes_S, log_p_NK.argmax(dim=1)])
        self._entropies_S = torch.cat([self._entropies_S, -(log_p_NK.exp() * log_p_NK).sum(dim=1)])
        if self._support_count is None:
            return
        surest_S = self._entropies_S.argsort(stable=True)
        kept = [surest_S[self._classes_S[surest_S] == k][: self._support_count] for k in range(log_p_NK.shape[1])]
        kept_S = torch.cat(kept)
        self._supports_SD, self._classes_S = self._supports_SD[kept_S], self._classes_S[kept_S]
        self._entropies_S = self._entropies_S[kept_S]
