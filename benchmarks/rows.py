"""The rows of the accuracy table: one file each in benchmarks/configs/accuracy, written before its first test figure.

A row is one of

- a run of edge-agent (`dataset`): teacher-serve, an account, all phases, as processes of their own;
- another student on the answers that such a run has paid for (`of`): the first `queries` of them, as probabilities
  or, with `answers = "hard"`, the index of the largest: what a label-only account gets;
- a reference without any synthetic picture (`reference`): "labels", supervised, or "views", the local pictures
  themselves sent to the teacher.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from edge_agent.config import build_config, generator_in_use, in_use

FOLDER = Path(__file__).parent / "configs" / "accuracy"

# The order in which missing cells are filled: what the others stand on first, then what is asked about most.
ORDER = (
    "mnist-soft",
    "mnist-hard",
    "mnist-kl-only",
    "mnist-hard-kl-only",
    "mnist-10k",
    "mnist-paper",
    "mnist-paper-mean",
    "mnist-paper-kl-only",
    "mnist-paper-no-im",
    "mnist-local",
    "mnist-10k-local",
    "mnist-hard-local",
    "mnist-patient",
    "mnist-hard-patient",
    "mnist-digits",
    "mnist-digits-balanced",
    "mnist-digits-plain",
    "cifar10-soft",
    "cifar10-hard",
    "cifar10-assistant",
    "cifar10-hard-assistant",
    "cifar10-generations",
    "cifar10-hard-generations",
    "cifar10-patient",
    "cifar10-hard-patient",
    "cifar10-diffusion",
    "cifar10-diffusion-balanced",
    "cifar10-diffusion-assistant",
    "cifar10-diffusion-generations",
    "cifar10-gan",
    "cifar10-image-loss",
    "cifar10-local",
    "cifar10-10k",
    "cifar10-10k-generations",
    "cifar10-10k-patient",
    "cifar10-mobilenet",
    "cifar10-mobilenet-hard",
    "cifar10-mobilenet-10k",
    "cifar10-mobilenet-assistant",
    "cifar10-mobilenet-hard-assistant",
    "cifar10-mobilenet-10k-assistant",
    "mnist-20k",
    "mnist-30k",
    "mnist-40k",
    "mnist-real-views",
    "mnist-supervised-10k",
    "mnist-supervised-all",
    "cifar10-real-views",
    "cifar10-supervised-10k",
    "cifar10-supervised-all",
)


_TOP_LEVEL = ("student", "budget", "held_out_fraction", "local_pictures", "image_encoding", "image_quality")
"""Settings outside a section that a student depends on."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row's file says; the settings of the row that it is `of` are underneath its own."""

    name: str
    seeds: tuple[int, ...]
    dataset: str = ""
    """mnist, mnist-digits or cifar10."""
    of: str = ""
    reference: str = ""
    answers: str = "soft"
    queries: int = 0
    """How many of the pool's answers, in the order that they were asked for; 0: all."""
    pictures: str = "device"
    """Of a supervised reference: device (the local pictures) or all (the whole training set)."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Settings of edge-agent, as layers."""
    text: str = ""
    """The file, and that of the row it is `of`: what a result depends on."""

    @property
    def digest(self) -> str:
        """Of the text; a result of another one is a result of former settings."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def settings_digest(self) -> str:
        """Of the settings of edge-agent that a student depends on, those that the text does not name included."""
        config = build_config(merged({"images": self.dataset}, self.run))
        settings = {
            "deprivatize": generator_in_use(config.deprivatize),
            "distill": in_use(config.distill, mixes=config.deprivatize.generator == "mixes"),
            **{name: getattr(config, name) for name in _TOP_LEVEL},
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def is_measured_by(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the results is of this row under its present settings.

        Lines of before 2026-11-22, 18:40 UTC, do not say what the settings were that their text does not name.
        """
        named = (line.get("row"), line.get("config_digest")) == (self.name, self.digest)
        return named and line.get("settings_digest", self.settings_digest) == self.settings_digest


def read(name: str) -> Row:
    """Return a row. Raises ValueError for a file that says what no row has, OSError where there is none."""
    text = (FOLDER / f"{name}.toml").read_text("utf-8")
    said = tomllib.loads(text)
    known = {field.name for field in fields(Row)} - {"name", "text"}
    if unknown := sorted(said.keys() - known):
        raise ValueError(f"{name}.toml: expected some of {', '.join(sorted(known))}; got {', '.join(unknown)}")
    said["seeds"] = tuple(said["seeds"])
    if "of" in said:
        below = read(said["of"])
        if bought := sorted(said.get("run", {}).keys() - {"student", "distill", "device", "held_out_fraction"}):
            raise ValueError(
                f"{name}.toml: expected {', '.join(bought)} in {below.name}.toml, whose answers it is of"
            )
        said["dataset"] = below.dataset
        said["run"] = merged(below.run, said.get("run", {}))
        text += f"\n# --- {below.name} ---\n{below.text}"
    return Row(name=name, text=text, **said)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers of settings as one: sections are merged, a value above wins."""
    found = dict(below)
    for name, value in above.items():
        found[name] = merged(below.get(name, {}), value) if isinstance(value, Mapping) else value
    return found
