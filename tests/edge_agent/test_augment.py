from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_agent import augment

Change = Callable[[Tensor, torch.Generator], Tensor]

CHANGES: dict[str, Change] = {
    "shift": lambda images, rng: augment.shift(images, largest_px=2, rng=rng),
    "warp": lambda images, rng: augment.warp(images, strength=0.3, rng=rng),
    "recolour": lambda images, rng: augment.recolour(images, strength=0.3, rng=rng),
    "cutout": lambda images, rng: augment.cutout(images, fraction=0.5, rng=rng),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 40, channels: int = 1) -> Tensor:
    return 2.0 * torch.rand(count, channels, 8, 8, generator=seeded(99)) - 1.0


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("channels", [1, 3])
def test_same_seed_same_pictures_and_another_seed_others(name: str, channels: int) -> None:
    change, images_NCHW = CHANGES[name], pictures(channels=channels)
    first_NCHW = change(images_NCHW, seeded(1))
    assert first_NCHW.shape == images_NCHW.shape
    assert first_NCHW.equal(change(images_NCHW, seeded(1)))
    assert not first_NCHW.equal(change(images_NCHW, seeded(2)))


@pytest.mark.parametrize("name", CHANGES)
def test_pictures_of_a_batch_are_changed_independently(name: str) -> None:
    same_NCHW = pictures(1).expand(40, -1, -1, -1)
    changed_NCHW = CHANGES[name](same_NCHW, seeded(1))
    assert len(changed_NCHW.flatten(1).unique(dim=0)) > 10


@pytest.mark.parametrize(("reflect", "padding"), [(False, ("constant", -1.0)), (True, ("reflect",))])
def test_shift_moves_whole_pictures_and_fills_with_background_or_reflects(reflect: bool, padding: Any) -> None:
    images_NCHW = pictures(200, channels=3)
    shifted_NCHW = augment.shift(images_NCHW, largest_px=1, rng=seeded(1), reflect=reflect)
    seen = set()
    for image_CHW, shifted_CHW in zip(images_NCHW, shifted_NCHW, strict=True):
        padded_CHW = torch.nn.functional.pad(image_CHW, [1] * 4, *padding)
        places = [
            (y, x) for y in range(3) for x in range(3) if shifted_CHW.equal(padded_CHW[:, y : y + 8, x : x + 8])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 9


def test_warp_by_nothing_changes_nothing_and_by_a_quarter_turn_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    images_NCHW = pictures(channels=3)
    torch.testing.assert_close(augment.warp(images_NCHW, strength=0.0, rng=seeded(1)), images_NCHW)
    drawn_3N = torch.tensor([[1.0], [0.5], [0.5]]).expand(3, 40)  # all of the angle, nothing of the other two
    monkeypatch.setattr(augment.torch, "rand", lambda *shape, generator: drawn_3N)
    turned_NCHW = augment.warp(images_NCHW, strength=torch.pi / 2, rng=seeded(1))
    torch.testing.assert_close(turned_NCHW, images_NCHW.rot90(dims=(2, 3)), atol=1e-5, rtol=0)


def test_warp_brings_in_nothing_that_the_picture_has_not() -> None:
    columns_N1HW = torch.linspace(0.5, 1.0, 8).expand(200, 1, 8, 8)
    warped_NCHW = augment.warp(columns_N1HW, strength=0.3, rng=seeded(1))
    assert warped_NCHW.amin() >= 0.5 - 1e-6 and warped_NCHW.amax() <= 1.0 + 1e-6
    assert (warped_NCHW - columns_N1HW).abs().amax() > 0.1


def test_shift_by_nothing_changes_nothing() -> None:
    images_NCHW = pictures()
    assert augment.shift(images_NCHW, largest_px=0, rng=seeded(1)).equal(images_NCHW)


def test_about_half_of_the_pictures_are_mirrored_and_the_others_left() -> None:
    images_NCHW = pictures(200)
    mirrored_NCHW = augment.mirror(images_NCHW, rng=seeded(1))
    same_N = (mirrored_NCHW == images_NCHW).flatten(1).all(1)
    flipped_N = (mirrored_NCHW == images_NCHW.flip(3)).flatten(1).all(1)
    assert (same_N ^ flipped_N).all()
    assert 70 < int(flipped_N.sum()) < 130  # 200 fair coins: 30 is more than four standard deviations
    assert mirrored_NCHW.equal(augment.mirror(images_NCHW, rng=seeded(1)))


def test_recolour_changes_brightness_and_contrast_within_its_strength() -> None:
    images_NCHW = pictures(500)
    changed_NCHW = augment.recolour(images_NCHW, strength=0.2, rng=seeded(1))
    shift_N = changed_NCHW.mean(dim=(1, 2, 3)) - images_NCHW.mean(dim=(1, 2, 3))
    assert 0.19 < shift_N.max() <= 0.2001
    assert -0.2001 <= shift_N.min() < -0.19
    contrast_N = changed_NCHW.std(dim=(1, 2, 3)) / images_NCHW.std(dim=(1, 2, 3))
    assert 1.19 < contrast_N.max() <= 1.2001
    assert 0.7999 <= contrast_N.min() < 0.81


def test_cutout_hides_at_most_its_square() -> None:
    bright_NCHW = torch.ones(300, 3, 8, 8)
    hidden_N = (augment.cutout(bright_NCHW, fraction=0.5, rng=seeded(1)) == -1.0).sum(dim=(1, 2, 3))
    assert hidden_N.max() == 3 * 4 * 4  # half the side, where the whole square lies in the picture
    assert hidden_N.min() >= 3 * 2 * 2  # a quarter of it is left where the centre is a corner


@pytest.mark.parametrize("name", CHANGES)
def test_gradient_passes_with_its_size(name: str) -> None:
    # Where a change copies a pixel its gradient is 1, where it drops one 0; contrast scales by 1 +- strength.
    images_NCHW = pictures().requires_grad_()
    (gradient_NCHW,) = torch.autograd.grad(CHANGES[name](images_NCHW, seeded(1)).sum(), images_NCHW)
    if name == "recolour":  # contrast turns around the mean, so it leaves the sum alone
        torch.testing.assert_close(gradient_NCHW, torch.ones_like(gradient_NCHW))
    elif name == "warp":  # a pixel's weight of 1 is shared by the four next to where it came from
        assert gradient_NCHW.amin() >= 0 and 0.8 < gradient_NCHW.mean().item() <= 1
    else:
        assert set(gradient_NCHW.unique().tolist()) == {0.0, 1.0}
