"""Corruptions: the same again for the same seed, stronger by severity, and two sets that share nothing."""

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from benchmarks.corruptions import DEVELOPMENT, SEVERITIES, TEST, corrupt

EVERY_CORRUPTION = pytest.mark.parametrize("name", [*TEST, *DEVELOPMENT])


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def drawn(channels: int) -> Tensor:
    """Twenty smooth shapes, each in the middle of black."""
    grid = torch.rand(20, channels, 5, 5, generator=seeded()).square()
    shapes = F.interpolate(grid, (18, 18), mode="bicubic").clamp(0, 1)
    return (F.pad(shapes, (7, 7, 7, 7)) * 255).to(torch.uint8)


@EVERY_CORRUPTION
@pytest.mark.parametrize("channels", [1, 3])
def test_spoils_copies_and_the_same_seed_spoils_alike(name: str, channels: int) -> None:
    images_NCHW = drawn(channels)
    spoiled = [corrupt(images_NCHW, name, 3, seeded()) for _ in range(2)]
    assert spoiled[0].shape == images_NCHW.shape and spoiled[0].dtype == torch.uint8
    assert torch.equal(spoiled[0], spoiled[1]) and not torch.equal(spoiled[0], images_NCHW)
    assert torch.equal(images_NCHW, drawn(channels))
    assert torch.equal(corrupt(images_NCHW, name, 0, seeded()), images_NCHW)


@EVERY_CORRUPTION
def test_severity_5_is_farther_off_than_3_and_3_than_1(name: str) -> None:
    images_NCHW = drawn(1)
    off = [(corrupt(images_NCHW, name, k, seeded()).float() - images_NCHW).abs().mean().item() for k in (1, 3, 5)]
    assert 0 < off[0] < off[1] < off[2]


@pytest.mark.parametrize("name", ["gaussian_noise", "rotate", "translate", "elastic", "occlusion", "lines", "fog"])
def test_what_is_random_differs_between_pictures_and_between_seeds(name: str) -> None:
    first_NCHW, second_NCHW = (corrupt(drawn(1), name, 3, seeded(seed)) for seed in (0, 1))
    assert not torch.equal(first_NCHW, second_NCHW)
    assert len(first_NCHW.flatten(1).unique(dim=0)) > 1


def test_test_and_development_share_neither_name_nor_formula() -> None:
    assert len(TEST) >= 12 and not TEST.keys() & DEVELOPMENT.keys()
    assert not {row.apply for row in TEST.values()} & {row.apply for row in DEVELOPMENT.values()}


def test_unknown_name_and_severity_are_refused() -> None:
    with pytest.raises(KeyError, match="snow"):
        corrupt(drawn(1), "snow", 1, seeded())
    with pytest.raises(ValueError, match="from 0 to 5, got 6"):
        corrupt(drawn(1), "fog", SEVERITIES + 1, seeded())


def test_kernels_keep_the_light_of_a_picture_whose_border_is_black() -> None:
    images_NCHW = drawn(3)
    for name in ("motion_blur", "gaussian_blur", "defocus_blur"):
        spoiled_NCHW = corrupt(images_NCHW, name, 2, seeded())
        assert spoiled_NCHW.float().mean().item() == pytest.approx(images_NCHW.float().mean().item(), rel=0.02)


def test_translation_is_as_far_as_the_table_says() -> None:
    images_NCHW = torch.zeros(20, 1, 32, 32, dtype=torch.uint8)
    images_NCHW[:, :, 15:17, 15:17] = 255  # its middle is the picture's
    light_NHW = corrupt(images_NCHW, "translate", 2, seeded())[:, 0].double()
    from_middle_S = torch.arange(32) - 15.5
    y_N = (light_NHW.sum(2) * from_middle_S).sum(1) / light_NHW.sum((1, 2))
    x_N = (light_NHW.sum(1) * from_middle_S).sum(1) / light_NHW.sum((1, 2))
    assert torch.hypot(y_N, x_N).tolist() == pytest.approx([TEST["translate"].strengths[1]] * 20, abs=0.05)
