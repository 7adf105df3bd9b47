"""No adaptation: the student as it was trained."""

from copy import deepcopy

import torch
from torch import Tensor

from edge_agent.adaptation.method import Adapted
from edge_agent.pixels import normalise
from networks.classifiers import Classifier


class Plain:
    """The student's own answers; what the others are compared with."""

    def __init__(self, student: Classifier) -> None:
        self._student = deepcopy(student).eval()

    @torch.inference_mode()
    def adapt(self, images_NCHW: Tensor) -> Adapted:
        return Adapted(probabilities_NK=self._student(normalise(images_NCHW)).softmax(dim=1))

    def reset(self) -> None:
        """Nothing to forget."""
