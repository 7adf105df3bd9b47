"""What adaptation needs beside the student: features with paid answers, and what local pictures look like inside.

Shape letters: N pictures, M remembered pictures, D features, K classes; others as in `statistics`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edge_agent.adaptation.statistics import SourceStatistics, source_statistics
from edge_agent.config import AdaptConfig
from edge_agent.distill import Pool
from edge_agent.pixels import normalise
from networks.classifiers import Classifier

_BATCH_COUNT = 256
_LOCAL_COUNT = 4000
"""Most local pictures looked at: what they show on average does not get any surer."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """All that `memory.npz` holds. No picture is in it."""

    features_MD: NDArray[np.float32]
    """Synthetic pictures as the student sees them: penultimate features, each of length 1."""
    answers_MK: NDArray[np.float32]
    """The teacher's answers to them; an index is a one at its place."""
    usual_shares_K: NDArray[np.float32]
    """How the student spreads local pictures over the classes."""
    usual_confidence: NDArray[np.float32]
    """How sure it is of them: the mean of the largest probability."""
    statistics: SourceStatistics | None
    """What its layers of batch norm see of them; None where it has none."""

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return named arrays, as `numpy.savez` takes them."""
        own = {name: getattr(self, name) for name in _OWN}
        within = {} if self.statistics is None else {name: getattr(self.statistics, name) for name in _STATISTICS}
        return own | within

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "Memory":
        """Undo `to_arrays`; takes what `numpy.load` returns as well. Raises KeyError for a file that lacks some."""
        within = {name: arrays[name] for name in _STATISTICS if name in arrays}
        statistics = SourceStatistics(**within) if within else None  # type: ignore[arg-type]
        return cls(**{name: arrays[name] for name in _OWN}, statistics=statistics)  # type: ignore[arg-type]


_OWN = tuple(field.name for field in fields(Memory) if field.name != "statistics")
_STATISTICS = tuple(field.name for field in fields(SourceStatistics))


@torch.inference_mode()
def build_memory(student: Classifier, pool: Pool, local_NCHW: Tensor, *, config: AdaptConfig, seed: int) -> Memory:
    """Remember pictures of the pool, the first of each class that the teacher named, and look at local ones.

    The memory holds at most `memory_count` features and `memory_bytes` bytes of them; fewer where a class is rare.

    Args:
        student: on its device.
        pool: synthetic pictures and their answers.
        local_NCHW: the device's own, uint8, two or more; those of the stream to come, undisturbed.
        config: settings.
        seed: of the choice among local pictures.
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
    order_N = np.random.default_rng(seed).permutation(len(local_NCHW))[:_LOCAL_COUNT]
    local_NCHW = local_NCHW[torch.from_numpy(order_N)]
    said_NK = torch.cat([student.linear(_features(student, part)) for part in local_NCHW.split(_BATCH_COUNT)])
    said_NK = said_NK.softmax(dim=1).cpu()
    features_MD = torch.cat([_features(student, part) for part in pool.images_NCHW[chosen].split(_BATCH_COUNT)])
    return Memory(
        features_MD=F.normalize(features_MD, dim=1).cpu().numpy(),
        answers_MK=answers_NK[chosen].numpy(),
        usual_shares_K=said_NK.mean(dim=0).numpy(),
        usual_confidence=said_NK.max(dim=1).values.mean().numpy(),
        statistics=source_statistics(student, local_NCHW, said_NK, seed=seed),
    )


def _features(student: Classifier, images_NCHW: Tensor) -> Tensor:
    """Penultimate features (N, D) of pictures (uint8), on the student's device."""
    return student.features(normalise(images_NCHW.to(student.linear.weight.device)))
