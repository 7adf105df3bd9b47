"""TENT: one step of gradient descent a batch towards surer answers. Wang et al., ICLR 2021.

"Tent: Fully Test-Time Adaptation by Entropy Minimization", online, with the published settings for CIFAR-10-C. The
reference with a backward pass. As there, a batch is answered before its own step.

Shape letters: N pictures of a batch, C channels, H and W height and width, K classes.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from edge_agent.adaptation.method import Adapted
from edge_agent.pixels import normalise
from networks.classifiers import Classifier

LEARNING_RATE = 1e-3


class Tent:
    """A student normalised by the statistics of each batch, whose batch norms' scales and offsets learn.

    Raises:
        ValueError: the student has no batch norm.
    """

    def __init__(self, student: Classifier) -> None:
        self._source = deepcopy(student).eval().requires_grad_(False)
        if not any(isinstance(layer, nn.BatchNorm2d) for layer in self._source.modules()):
            raise ValueError("TENT: expected a student with batch norm, got one without")
        self.reset()

    def reset(self) -> None:
        self._student = deepcopy(self._source)
        layers = [layer for layer in self._student.modules() if isinstance(layer, nn.BatchNorm2d)]
        for layer in layers:
            # Without statistics of its own a layer takes those of the batch, in eval mode too.
            layer.running_mean = layer.running_var = None
            layer.requires_grad_(True)
        learning = [parameter for layer in layers for parameter in layer.parameters()]
        self._optimizer = torch.optim.Adam(learning, lr=LEARNING_RATE)

    @torch.enable_grad()
    def adapt(self, images_NCHW: Tensor) -> Adapted:
        log_p_NK = self._student(normalise(images_NCHW)).log_softmax(dim=1)
        p_NK = log_p_NK.exp()
        self._optimizer.zero_grad()
        torch.autograd.backward(-(p_NK * log_p_NK).sum(dim=1).mean())
        self._optimizer.step()
        return Adapted(probabilities_NK=p_NK.detach())
