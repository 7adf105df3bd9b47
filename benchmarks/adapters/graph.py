"""The first release's third phase, as a method: propagation over each batch and a memory of paid answers."""

from copy import deepcopy

import torch
from torch import Tensor

from edge_agent.adapt import Adapter, Memory
from edge_agent.adaptation.method import Adapted
from edge_agent.config import AdaptConfig
from networks.classifiers import Classifier


class Graph:
    """`edge_agent.adapt.Adapter` with its default settings; no batch is remembered."""

    def __init__(self, student: Classifier, memory: Memory) -> None:
        self._adapter = Adapter(deepcopy(student), memory, AdaptConfig())

    def adapt(self, images_NCHW: Tensor) -> Adapted:
        return Adapted(probabilities_NK=torch.from_numpy(self._adapter.predict(images_NCHW)[1]))

    def reset(self) -> None:
        """Nothing to forget."""
