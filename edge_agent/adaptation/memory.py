"""What adaptation needs beside the student: features with paid answers, and what local pictures look like inside.

Shape letters: N pictures, M remembered pictures, D features, K classes; others as in `statistics`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edge_agent.adaptation.statistics import SourceStatistics, most_pictures, source_statistics
from edge_agent.config import AdaptConfig
from edge_agent.distill import Pool
from edge_agent.pixels import normalise
from networks.classifiers import Classifier

VERSION = 2
_BATCH_COUNT = 256
_LOCAL_COUNT = 4000
"""Most local pictures looked at: what they show on average does not get any surer."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """All that `memory.npz` holds. No picture is in it."""

    student: str
    """Digest of the file of the student that it was made with: of no other are these the features."""
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
        own = {name: np.asarray(getattr(self, name)) for name in _OWN} | {"version": np.asarray(VERSION)}
        within = {} if self.statistics is None else {name: getattr(self.statistics, name) for name in _STATISTICS}
        return own | within

    @classmethod
    def load(cls, path: Path) -> "Memory":
        """Read the file of a run folder. Raises OSError or, for another file, whatever numpy makes of it."""
        # Opened here: of a damaged file numpy leaves its own open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return cls.from_arrays({name: arrays[name] for name in arrays.files})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "Memory":
        """Undo `to_arrays`; takes what `numpy.load` returns as well.

        Raises:
            ValueError: some are missing, of another version, not numbers, or do not go together.
        """
        try:
            if int(arrays["version"]) != VERSION:
                raise ValueError(f"expected version {VERSION}, got {arrays['version']}")
            memory = cls._of(arrays)
        except KeyError as error:
            raise ValueError(f"expected {error}, found none") from None
        parts: list[NDArray[Any]] = [memory.features_MD, memory.answers_MK, memory.usual_shares_K]
        if memory.statistics is not None:
            parts += [memory.statistics.kinds_G2S, memory.statistics.shares_G, memory.statistics.usual_L22]
        shapes = [part.shape for part in parts]
        if [len(shape) for shape in shapes] != [2, 2, 1, 3, 1, 3][: len(parts)] or shapes[0][0] != shapes[1][0]:
            raise ValueError(f"expected arrays that go together, got shapes {shapes}")
        if not all(np.isfinite(part).all() for part in parts):
            raise ValueError("expected finite numbers, got others")
        return memory

    @classmethod
    def _of(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "Memory":
        has_statistics = any(name in arrays for name in _STATISTICS)
        within = {name: arrays[name] for name in _STATISTICS} if has_statistics else {}
        statistics = SourceStatistics(**within) if within else None  # type: ignore[arg-type]
        own: dict[str, Any] = {name: arrays[name] for name in _OWN}
        return cls(**own | {"student": str(own["student"])}, statistics=statistics)


_OWN = tuple(field.name for field in fields(Memory) if field.name != "statistics")
_STATISTICS = tuple(field.name for field in fields(SourceStatistics))


@torch.inference_mode()
def build_memory(
    student: Classifier, pool: Pool, local_NCHW: Tensor, *, config: AdaptConfig, seed: int, digest: str
) -> Memory:
    """Remember pictures of the pool, the first of each class that the teacher named, and look at local ones.

    The memory holds at most `memory_count` features, and as many as `memory_bytes` has room for beside the
    statistics, which may be none; fewer where a class is rare.

    Args:
        student: on its device.
        pool: synthetic pictures and their answers.
        local_NCHW: the device's own, uint8, two or more; those of the stream to come, undisturbed.
        config: settings.
        seed: of the choice among local pictures.
        digest: of the file that the student is in.
    """
    student.eval()
    class_count, feature_count = student.linear.weight.shape
    order_N = np.random.default_rng(seed).permutation(len(local_NCHW))[:_LOCAL_COUNT]
    local_NCHW = local_NCHW[torch.from_numpy(order_N)]
    said_NK = torch.cat([student.linear(_features(student, part)) for part in local_NCHW.split(_BATCH_COUNT)])
    said_NK = said_NK.softmax(dim=1).cpu()
    few = most_pictures(student)
    statistics = source_statistics(student, local_NCHW[:few], said_NK[:few], seed=seed)
    taken = 0 if statistics is None else statistics.kinds_G2S.nbytes + statistics.usual_L22.nbytes
    bytes_a_picture = 4 * (feature_count + class_count)
    most = min(config.memory_count, max(0, config.memory_bytes - taken) // bytes_a_picture)
    named_N = pool.hardened().class_indices_N
    assert named_N is not None
    # With more classes than fit, one of each as long as there is room: those that the teacher named first.
    share = max(1, most // class_count)
    chosen = torch.cat([(named_N == k).nonzero()[:share, 0] for k in range(class_count)])
    if len(chosen) > most:
        chosen = chosen.sort().values[:most]
    kept = pool.each(lambda part: part[chosen])
    features_MD = torch.cat([_features(student, part) for part in kept.images_NCHW.split(_BATCH_COUNT)])
    return Memory(
        student=digest,
        features_MD=F.normalize(features_MD, dim=1).cpu().numpy(),
        answers_MK=kept.answers_as_probabilities(class_count).cpu().numpy(),
        usual_shares_K=said_NK.mean(dim=0).numpy(),
        usual_confidence=said_NK.max(dim=1).values.mean().numpy(),
        statistics=statistics,
    )


def _features(student: Classifier, images_NCHW: Tensor) -> Tensor:
    """Penultimate features (N, D) of pictures (uint8), on the student's device."""
    return student.features(normalise(images_NCHW.to(student.linear.weight.device)))
