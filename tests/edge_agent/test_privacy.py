"""The maths of the gate and of the attack, against brute force, known ranks and simulated truth."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edge_agent import privacy
from networks.mixes import deal, mosaic, noisy


def pictures(count, *, channels=1, side=8, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8))


# --- the split ---


def test_a_tenth_is_the_reference_whatever_the_order():
    images_NCHW = pictures(444)
    training_N, reference_N = privacy.split(images_NCHW, seed=0)
    assert (len(training_N), len(reference_N)) == (400, 44)
    assert sorted(torch.cat([training_N, reference_N]).tolist()) == list(range(444))
    order = torch.randperm(444, generator=torch.Generator().manual_seed(1))
    _, again_N = privacy.split(images_NCHW[order], seed=0)
    assert set(order[again_N].tolist()) == set(reference_N.tolist())
    _, other_N = privacy.split(images_NCHW, seed=1)
    assert set(other_N.tolist()) != set(reference_N.tolist())


def test_few_pictures_still_leave_a_handful():
    training_N, reference_N = privacy.split(pictures(64), seed=0)
    assert (len(training_N), len(reference_N)) == (56, privacy.LEAST_REFERENCE)


def test_copies_and_mirror_images_stay_on_one_side():
    once = pictures(100)
    images_NCHW = torch.cat([once, once, once.flip(3)])
    _, reference_N = privacy.split(images_NCHW, seed=0)
    assert len(reference_N) == 30
    chosen = set(reference_N.tolist())
    assert all({i, i + 100, i + 200} <= chosen or not {i, i + 100, i + 200} & chosen for i in range(100))


def test_a_picture_with_very_many_copies_trains():
    images_NCHW = torch.cat([pictures(60), pictures(1, seed=1).expand(140, 1, 8, 8)])
    for seed in range(20):
        _, reference_N = privacy.split(images_NCHW, seed=seed)
        assert len(reference_N) == 20 and (reference_N < 60).all()


def test_a_folder_of_copies_is_refused():
    with pytest.raises(ValueError, match=r"expected 8 local pictures or more .* only 1 different ones"):
        privacy.split(pictures(1).expand(80, 1, 8, 8), seed=0)


# --- distances ---


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32)])
def test_nearest_is_what_brute_force_finds(channels, side, monkeypatch):
    monkeypatch.setattr(privacy, "_BLOCK_NUMBERS", 7 * channels * side**2)  # blocks that do not fit evenly
    images_NCHW = pictures(10, channels=channels, side=side)
    others_MCHW = pictures(30, channels=channels, side=side, seed=1)
    others_MCHW[4] = images_NCHW[2].flip(2)
    others_MCHW[11] = images_NCHW[5]
    others_MCHW[17, 0, 0, 0] = 255 - images_NCHW[5, 0, 0, 0]
    found_NK = privacy.nearest(images_NCHW, others_MCHW.split(13), count=3)
    left_N1CHW, right_1MCHW = images_NCHW.double()[:, None], others_MCHW.double()[None]
    squares_NM = torch.minimum(
        (left_N1CHW - right_1MCHW).square().mean((2, 3, 4)),
        (left_N1CHW.flip(4) - right_1MCHW).square().mean((2, 3, 4)),
    )
    assert torch.allclose(found_NK, squares_NM.sqrt().sort(1).values[:, :3], rtol=1e-12, atol=0)
    assert found_NK[5, 0] == 0


@pytest.mark.parametrize("shade", [0, 255])
def test_one_grey_level_in_one_pixel_of_a_large_picture_is_not_lost_to_rounding(shade):
    image_NCHW = torch.full((1, 3, 128, 128), shade, dtype=torch.uint8)
    near_NCHW = image_NCHW.clone()
    near_NCHW[0, 1, 50, 60] ^= 1
    assert privacy.nearest(image_NCHW, [near_NCHW])[0, 0] == pytest.approx(math.sqrt(1 / 49152), rel=1e-12)


def test_where_fewer_are_there_than_asked_for_the_rest_is_infinite():
    found_NK = privacy.nearest(pictures(2), [pictures(1, seed=1), pictures(1, seed=2)], count=4)
    assert found_NK[:, :2].isfinite().all() and found_NK[:, 2:].isinf().all()
    assert privacy.nearest(pictures(2), []).isinf().all()
    assert privacy.nearest(pictures(2), [pictures(0)]).isinf().all()


@pytest.mark.parametrize(("channels", "side", "side_parts"), [(1, 8, 2), (3, 32, 4), (3, 64, 2), (1, 60, 15)])
def test_parts_are_what_brute_force_finds_and_the_whole_stays_what_it_is(channels, side, side_parts, monkeypatch):
    monkeypatch.setattr(privacy, "_BLOCK_NUMBERS", 7 * channels * side**2)
    images_NCHW = pictures(10, channels=channels, side=side)
    others_MCHW = pictures(20, channels=channels, side=side, seed=1)
    step = side // side_parts
    others_MCHW[3, :, :step, :step] = images_NCHW[5, :, :step, :step]
    others_MCHW[4, :, :step, -step:] = images_NCHW[6, :, :step, :step].flip(2)  # of its mirror image
    others_MCHW[5, :, :step, -step:] = images_NCHW[7, :, :step, :step]  # another place: no match
    near_NK, near_NP = privacy.nearest_by_parts(images_NCHW, others_MCHW.split(13), count=3, side_parts=side_parts)
    assert torch.equal(near_NK, privacy.nearest(images_NCHW, [others_MCHW], count=3))

    def cut(images_NCHW, row, column):
        return images_NCHW[:, :, row * step : (row + 1) * step, column * step : (column + 1) * step].double()

    for part in range(side_parts**2):
        row, column = divmod(part, side_parts)
        one_NCHW = cut(images_NCHW, row, column)[:, None]
        squares_NM = torch.minimum(
            (one_NCHW - cut(others_MCHW, row, column)).square().mean((2, 3, 4)),
            (one_NCHW.flip(4) - cut(others_MCHW, row, side_parts - 1 - column)).square().mean((2, 3, 4)),
        )
        assert torch.allclose(near_NP[:, part], squares_NM.min(1).values.sqrt(), rtol=1e-12, atol=0)
    assert near_NP[5, 0] == 0 == near_NP[6, 0] and near_NP[7, 0] > 20


# --- the threshold ---


def test_threshold_of_a_thousand_and_more_is_the_quantile():
    assert privacy.threshold(torch.arange(10.0, 1011.0, dtype=torch.float64)) == pytest.approx(11.0)


def test_threshold_of_few_follows_the_power_law_they_fall_by():
    """Distances whose distribution is (d / 50)^6 up to 50: the 0.1 % quantile is 50 / 1000^(1/6) = 15.8."""
    rng = np.random.default_rng(0)
    for count, spread in ((8, 9.0), (44, 5.0), (400, 3.0)):
        found = [privacy.threshold(torch.from_numpy(50 * rng.random(count) ** (1 / 6))) for _ in range(200)]
        assert np.median(found) == pytest.approx(50 * 0.001 ** (1 / 6), abs=spread)
        assert np.std(found) < spread


def test_threshold_of_few_is_never_above_the_smallest_and_is_pinned():
    assert privacy.threshold(torch.tensor([5.0, 6, 7, 8, 9, 10, 20, 30])) == pytest.approx(1.08395, rel=1e-4)
    assert privacy.threshold(torch.full((10,), 7.0)) == 7.0


@pytest.mark.parametrize("distances", [[1.0, 2, 3, 4], [0.0, 1, 2, 3, 4, 5]])
def test_no_threshold_comes_of_too_few_or_of_twins(distances):
    with pytest.raises(ValueError, match="expected more than 4 distances, all above 0"):
        privacy.threshold(torch.tensor(distances))


# --- the attack ---


def test_area_of_known_ranks():
    members_N, others_M = torch.tensor([4.0, 3, 1]), torch.tensor([2.0, 1])
    assert privacy.auc(members_N, others_M).auc == pytest.approx((2 + 2 + 0.5) / 6)
    assert privacy.auc(torch.ones(5), torch.ones(7)).auc == 0.5
    assert privacy.auc(torch.arange(5.0) + 10, torch.arange(7.0)).auc == 1.0
    assert privacy.auc(torch.arange(5.0) - 10, torch.arange(7.0)).auc == 0.0


def test_interval_is_pinned_symmetric_and_open_at_the_ends():
    assert privacy.auc_interval(0.5, 400, 44) == pytest.approx((0.41175, 0.58825), abs=1e-5)
    low, high = privacy.auc_interval(1.0, 400, 44)
    assert (low, high) == (pytest.approx(0.97543, abs=1e-5), 1.0)
    assert privacy.auc_interval(0.0, 44, 400) == pytest.approx((0.0, 1 - low), abs=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_interval_holds_the_truth_nineteen_times_of_twenty(shift):
    rng = torch.Generator().manual_seed(0)
    truth = 0.5 * (1 + math.erf(shift / 2))
    held = 0
    for _ in range(1000):
        found = privacy.auc(torch.randn(400, generator=rng) + shift, torch.randn(44, generator=rng))
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 1000 <= 0.98


def attacked(local_NCHW, sent_NCHW, *, member_count, side_parts=2):
    near = privacy.nearest_by_parts(local_NCHW, sent_NCHW.split(100), count=10, side_parts=side_parts)
    found = privacy.membership(*near, member_count=member_count)
    assert tuple(found) == privacy.ATTACKS
    return {name: attack.auc for name, attack in found.items()}


def smooth_pictures(count, *, seed):
    """Pictures (N, 1, 8, 8) that differ as photographs do: by few patches, not by every pixel."""
    coarse = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(coarse, size=(8, 8), mode="bilinear").round().to(torch.uint8)


def test_attacks_tell_members_that_were_copied_and_none_where_nothing_was():
    local_NCHW, fresh_NCHW = pictures(240), pictures(300, seed=1)
    for sent_NCHW, low, high in ((fresh_NCHW, 0.35, 0.65), (torch.cat([fresh_NCHW, local_NCHW[:200] ^ 1]), 0.99, 1)):
        found = attacked(local_NCHW, sent_NCHW, member_count=200)
        assert low <= min(found.values()) and max(found.values()) <= high


def test_independent_pictures_are_a_coin_to_all_attacks():
    local_NCHW, sent_NCHW = smooth_pictures(1000, seed=0), smooth_pictures(1000, seed=1)
    for side_parts in (2, 4):
        found = attacked(local_NCHW, sent_NCHW, member_count=500, side_parts=side_parts)
        assert all(0.46 < auc < 0.54 for auc in found.values()), found


@pytest.mark.parametrize("mirrored", [False, True])
def test_mixes_of_quarters_hide_from_the_whole_and_not_from_the_parts(mirrored):
    """Each sent picture has two quarters of one member and two of another, a little changed."""
    local_NCHW = smooth_pictures(1000, seed=0)
    rng = torch.Generator().manual_seed(2)
    members_NP = torch.randint(500, (3000, 2), generator=rng) + 500 * mirrored
    plan_NR = members_NP.gather(1, deal(3000, pictures=2, regions=2, rng=rng))
    sent_NCHW = noisy(mosaic(plan_NR, local_NCHW[:500]).float(), noise=12.0, rng=rng)
    sent_NCHW = sent_NCHW.clamp(0, 255).round().to(torch.uint8)
    found = attacked(local_NCHW, sent_NCHW, member_count=500)
    assert found["mean_of_parts"] > 0.97, found
    assert all(0.47 < found[name] < 0.75 for name in ("nearest", "mean_of_nearest")), found
