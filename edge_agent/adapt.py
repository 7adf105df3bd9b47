"""Phase 3: correct the student's predictions by their neighbours, with forward passes only.

Shape letters: N pictures of a batch, M remembered pictures, C channels, H and W height and width,
D features, K classes.

The graph's nodes are the pictures of a batch and those of a memory: synthetic pictures whose answers were
paid for in phase 2. The propagation is LAME's (Boudiaf et al., CVPR 2022) with two changes: the memory takes
part as nodes whose answers never move, and each picture's neighbours weigh 1 together. The published third
phase of MEKD gives no formula; this is our own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edge_agent.config import AdaptConfig
from edge_agent.distill import Pool
from edge_agent.pixels import normalise
from networks.classifiers import Classifier

_BATCH_COUNT = 256
# In probability: below this nothing that anyone reads changes any more.
_SETTLED = 1e-6


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Synthetic pictures as the student sees them, and what the teacher said about them."""

    features_MD: NDArray[np.float32]
    """Penultimate features of the student, each of length 1."""
    answers_MK: NDArray[np.float32]
    """The teacher's answers; an index is a one at its place."""

    def to_arrays(self) -> dict[str, NDArray[np.float32]]:
        """Return named arrays, as `numpy.savez` takes them."""
        return {"features_MD": self.features_MD, "answers_MK": self.answers_MK}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float32]]) -> "Memory":
        """Undo `to_arrays`; takes what `numpy.load` returns as well."""
        return cls(features_MD=arrays["features_MD"], answers_MK=arrays["answers_MK"])


@torch.inference_mode()
def build_memory(student: Classifier, pool: Pool, *, config: AdaptConfig) -> Memory:
    """Remember pictures of the pool: the first of each class that the teacher named, as many of each.

    The memory holds at most `memory_count` pictures and `memory_bytes` bytes; fewer where a class is rare.
    """
    student.eval()
    class_count, feature_count = student.linear.weight.shape
    bytes_a_picture = 4 * (feature_count + class_count)
    most = min(config.memory_count, config.memory_bytes // bytes_a_picture)
    answers_NK = pool.answers_as_probabilities(class_count).cpu()
    named_N = answers_NK.argmax(dim=1)
    # With more classes than fit, one of each as long as there is room: those that the teacher named first.
    share = max(1, most // class_count)
    chosen = torch.cat([(named_N == k).nonzero()[:share, 0] for k in range(class_count)])
    if len(chosen) > most:
        chosen = chosen.sort().values[:most]
    features_MD = torch.cat([_features(student, part) for part in pool.images_NCHW[chosen].split(_BATCH_COUNT)])
    return Memory(
        features_MD=F.normalize(features_MD, dim=1).cpu().numpy(),
        answers_MK=answers_NK[chosen].numpy(),
    )


class Adapter:
    """A student, its memory, and how far the one may correct the other."""

    def __init__(self, student: Classifier, memory: Memory, config: AdaptConfig) -> None:
        if not 0.0 <= config.strength < 2.0:
            raise ValueError(f"strength: expected from 0 to below 2 (propagation settles), got {config.strength}")
        device = student.linear.weight.device
        self._student = student.eval()
        self._features_MD = torch.from_numpy(memory.features_MD).to(device)
        self._answers_MK = torch.from_numpy(memory.answers_MK).to(device)
        self._config = config

    @torch.inference_mode()
    def predict(self, images_NCHW: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the student's probabilities (N, K) for pictures (uint8), before and after propagation.

        The pictures of one call are each other's neighbours, so what is returned for one depends on the
        others; a call with a single picture listens to the memory only.
        """
        features_ND = _features(self._student, images_NCHW)
        log_p_NK = self._student.linear(features_ND).log_softmax(dim=1)
        neighbours_NE = nearest(
            F.normalize(features_ND, dim=1), self._features_MD, neighbour_count=self._config.neighbour_count
        )
        after_NK = propagate(
            log_p_NK,
            self._answers_MK,
            neighbours_NE,
            strength=self._config.strength,
            iterations=self._config.iterations,
        )
        return log_p_NK.exp().cpu().numpy(), after_NK.cpu().numpy()


def nearest(features_ND: Tensor, remembered_MD: Tensor, *, neighbour_count: int) -> Tensor:
    """Indices (N, E) of each picture's E nearest among N + M: the batch first, then the memory.

    Features have length 1, so the nearest have the largest inner product. No picture is its own neighbour.
    """
    similarity_NA = features_ND @ torch.cat([features_ND, remembered_MD]).T
    similarity_NA.fill_diagonal_(-torch.inf)
    possible = similarity_NA.shape[1] - 1
    return similarity_NA.topk(min(neighbour_count, possible), dim=1).indices


def propagate(
    log_p_NK: Tensor, answers_MK: Tensor, neighbours_NE: Tensor, *, strength: float, iterations: int
) -> Tensor:
    """Return z (N, K) with z = softmax(log p + strength · mean of the neighbours' z); the memory's z is fixed.

    The mean lies between 0 and 1, so log-odds between two classes move by `strength` at most: a picture
    that the student is surer of keeps its class. For strength < 2 the right-hand side is a contraction
    (softmax at most halves a difference), so there is one solution and the rounds approach it.
    """
    if neighbours_NE.shape[1] == 0:
        return log_p_NK.exp()
    z_NK = log_p_NK.exp()
    for _ in range(iterations):
        heard_NK = torch.cat([z_NK, answers_MK])[neighbours_NE].mean(dim=1)
        before_NK, z_NK = z_NK, torch.softmax(log_p_NK + strength * heard_NK, dim=1)
        if (z_NK - before_NK).abs().max() < _SETTLED:
            break
    return z_NK


def _features(student: Classifier, images_NCHW: Tensor) -> Tensor:
    """Penultimate features (N, D) of pictures (uint8), on the student's device."""
    return student.features(normalise(images_NCHW.to(student.linear.weight.device)))
