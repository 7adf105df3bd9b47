"""The student at work: pictures in, what they show out, one after the other, adapting on the way.

Shape letters: N pictures of a batch, C channels, H and W height and width, K classes.
"""

import hashlib
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_agent.adaptation.adapter import Adapter
from edge_agent.adaptation.memory import Memory
from edge_agent.config import AdaptConfig, ConfigError, build_config
from edge_agent.data import DataError, decode
from edge_agent.failures import BadInput, RunFolderProblem
from edge_agent.pixels import normalise
from networks.classifiers import Classifier
from networks.modelfile import LoadedModel, ModelFileError, load_model

RESET = ""
"""In the place of a picture's path: the stream ends here and another begins."""
_DECIMALS = 5


class Predictor:
    """A run's student and memory. Its state is bounded, however long the stream.

    Args:
        run_dir: holds ``student.pt`` and ``memory.npz``; of ``run.toml``, where it is there, the section ``[adapt]``.

    Raises:
        RunFolderProblem: one of the files is missing, damaged or not of this project.
        BadInput: the settings cannot be meant.
    """

    def __init__(self, run_dir: Path) -> None:
        self._student = _student(run_dir)
        self._facts = self._student.facts
        module = self._student.module
        assert isinstance(module, Classifier)
        self._plain = module.eval()
        memory = _memory(run_dir)
        if memory.student != hashlib.sha256((run_dir / "student.pt").read_bytes()).hexdigest():
            raise RunFolderProblem(
                f"{run_dir / 'memory.npz'}: expected one made with student.pt, got another's; run --phase adapt"
            )
        self._adapter = Adapter(module, memory, _settings(run_dir))

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(self._facts.labels)

    def predict(self, paths: Iterable[str], *, batch_count: int) -> Iterator[dict[str, Any]]:
        """Yield one line a picture, in order, `batch_count` at a time; a picture that cannot be read has an error.

        `before` is what the student says by itself: a second forward pass, for comparison only.
        """
        waiting: list[str] = []
        for path in paths:
            if path != RESET:
                waiting.append(path)
            if path == RESET or len(waiting) == batch_count:
                yield from self._answered(waiting)
                waiting = []
            if path == RESET:
                self._adapter.reset()
        yield from self._answered(waiting)

    def _answered(self, paths: list[str]) -> Iterator[dict[str, Any]]:
        pictures, errors = [], {}
        for i, path in enumerate(paths):
            try:
                pictures.append(decode(Path(path), self._facts.channels, self._facts.height, self._facts.width))
            except DataError as error:
                errors[i] = str(error)
        answers = self._answers(np.stack(pictures)) if pictures else iter(())
        for i, path in enumerate(paths):
            yield {"picture": path} | ({"error": errors[i]} if i in errors else next(answers))

    @torch.inference_mode()
    def _answers(self, images_NCHW: np.ndarray[Any, np.dtype[np.uint8]]) -> Iterator[dict[str, Any]]:
        images = torch.from_numpy(images_NCHW)
        before_NK = self._plain(normalise(images)).softmax(dim=1)
        adapted = self._adapter.adapt(images)
        for before_K, after_K in zip(before_NK, adapted.probabilities_NK, strict=True):
            yield {
                "class": self._facts.labels[int(after_K.argmax())],
                "shift": round(adapted.shift, 4),
                "before": [round(float(p), _DECIMALS) for p in before_K],
                "after": [round(float(p), _DECIMALS) for p in after_K],
            }


class Score:
    """How many pictures are called what the folder is called that they lie in, where that is a class's name."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self._labels = labels
        self._known = self._right = self._right_before = 0

    def add(self, answer: dict[str, Any]) -> None:
        """Count one line of `Predictor.predict`."""
        name = Path(answer["picture"]).parent.name
        if name not in self._labels or "error" in answer:
            return
        self._known += 1
        self._right += answer["class"] == name
        self._right_before += self._labels[int(np.argmax(answer["before"]))] == name

    def in_words(self) -> str | None:
        """One line; None where no folder has such a name."""
        if self._known == 0:
            return None
        adapted, before = self._right / self._known, self._right_before / self._known
        return (
            f"of {self._known} pictures in folders named as a class {adapted:.1%} are called so, "
            f"{before:.1%} before adapting"
        )


def _student(run_dir: Path) -> LoadedModel:
    try:
        loaded = load_model(run_dir / "student.pt")
    except ModelFileError as error:
        raise RunFolderProblem(str(error)) from None
    if not isinstance(loaded.module, Classifier):
        raise RunFolderProblem(f"{run_dir / 'student.pt'}: expected a checkpoint of this project, got another file")
    facts = loaded.facts
    if {*facts.mean, *facts.std} != {0.5}:  # what `normalise` does
        raise RunFolderProblem(
            f"{run_dir / 'student.pt'}: expected a student of pictures with mean 0.5 and std 0.5, got mean "
            f"{[*facts.mean]} and std {[*facts.std]}; give the run folder that edge-agent run left"
        )
    return loaded


def _memory(run_dir: Path) -> Memory:
    path = run_dir / "memory.npz"
    if not path.is_file():
        raise RunFolderProblem(f"expected {path}, found none; edge-agent run --phase adapt makes it")
    try:
        return Memory.load(path)
    except Exception as error:  # numpy, zipfile and zlib raise many kinds for a damaged file
        raise RunFolderProblem(
            f"{path}: expected a memory of this version, got another or a damaged file "
            f"({str(error) or type(error).__name__}); remove it and run --phase adapt"
        ) from None


def _settings(run_dir: Path) -> AdaptConfig:
    path = run_dir / "run.toml"
    if not path.is_file():
        return AdaptConfig()
    try:
        return build_config(tomllib.loads(path.read_text("utf-8"))).adapt
    except (ConfigError, OSError, ValueError) as error:
        raise BadInput(f"{path}: {error}") from None
