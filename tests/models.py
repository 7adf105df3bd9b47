"""Facts of a model for tests: a ResNet8 with logits, pictures on the scale -1..1."""

from typing import Any

from networks.modelfile import ModelFacts


def resnet8_facts(side: int, *, channels: int = 1, labels: str = "abc", **others: Any) -> ModelFacts:
    """Return the facts of a model of square pictures, one letter a class; `others` are those that differ."""
    usual: dict[str, Any] = {
        "architecture": "resnet8",
        "labels": tuple(labels),
        "channels": channels,
        "height": side,
        "width": side,
        "mean": (0.5,) * channels,
        "std": (0.5,) * channels,
        "output": "logits",
    }
    return ModelFacts(**usual | others)
