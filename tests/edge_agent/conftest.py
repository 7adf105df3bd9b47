from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

COUNT = 64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and lose a lot where the processor is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pictures_NHW(tmp_path: Path) -> np.ndarray:
    """COUNT grey pictures of 8 x 8 in the folder ``pictures``."""
    made = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(made):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i:02}.png")
    return made
