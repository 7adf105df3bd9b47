"""The model that every server is measured with, as one would call it without a server. Needs numpy, and torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPE_CHW = (3, 32, 32)
CLASS_COUNT = 10


def answerer(model: str, threads: int) -> Callable[[Any], Any]:
    """What a server calls: uint8 pictures (N, C, H, W) -> float32 (N, K).

    ``model``: a model file; empty: a model that costs nothing, for which torch is not needed.
    """
    return bare_model(model, threads) if model else identity


def identity(images_NCHW: Any) -> Any:
    """The first pixels as answers."""
    return images_NCHW.reshape(len(images_NCHW), -1)[:, :CLASS_COUNT].astype(np.float32)


def bare_model(path: str, threads: int) -> Callable[[Any], Any]:
    """uint8 (N, C, H, W) -> float32 probabilities (N, K).

    Channels last and inference mode, as is usual, so that the ceiling is not a straw man.
    """
    import torch

    from networks.modelfile import load_model

    torch.set_num_threads(threads)
    loaded = load_model(Path(path))
    module = loaded.module.eval().to(memory_format=torch.channels_last)
    mean_C11 = torch.tensor(loaded.facts.mean).view(-1, 1, 1)
    std_C11 = torch.tensor(loaded.facts.std).view(-1, 1, 1)

    @torch.inference_mode()
    def answer(images_NCHW: Any) -> Any:
        images = (torch.tensor(images_NCHW).float() / 255 - mean_C11) / std_C11
        return module(images.contiguous(memory_format=torch.channels_last)).softmax(dim=1).numpy()

    return answer
