"""Statistics that follow a stream. Pictures have 16 channels; what a class looks like is known by construction."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_agent.adaptation.statistics import (
    MOST_KINDS,
    Floats,
    Mixtures,
    SourceStatistics,
    StreamNorm,
    batch_norms,
    by_kind,
    kind_means,
    nearest_mixture,
    picture_moments,
    place,
    source_statistics,
    variance,
)
from edge_agent.pixels import normalise
from networks.classifiers import Classifier

CLASSES, CHANNELS = 4, 16


class Layer(Classifier):
    """A student that is one layer of batch norm and little else."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn1 = nn.BatchNorm2d(channels)
        nn.init.uniform_(self.bn1.weight, 0.5, 1.5)
        nn.init.normal_(self.bn1.bias)
        self.linear = nn.Linear(channels, CLASSES)

    def features(self, images_NCHW: Tensor) -> Tensor:
        return F.relu(self.bn1(images_NCHW)).mean(dim=(2, 3))


def pictures(labels_N: Tensor, seed: int) -> Tensor:
    """Channels differ in brightness and contrast from class to class, and a little from picture to picture."""
    of_class = torch.Generator().manual_seed(7)
    bright_KC = 128 + 25 * torch.randn(CLASSES, CHANNELS, generator=of_class)
    contrast_KC = 20 + 15 * torch.rand(CLASSES, CHANNELS, generator=of_class)
    rng = torch.Generator().manual_seed(seed)
    bright_NC = bright_KC[labels_N] + 5 * torch.randn(len(labels_N), CHANNELS, generator=rng)
    noise_NCHW = torch.randn(len(labels_N), CHANNELS, 6, 6, generator=rng)
    images_NCHW = bright_NC[:, :, None, None] + contrast_KC[labels_N][:, :, None, None] * noise_NCHW
    return images_NCHW.clamp(0, 255).round().to(torch.uint8)


def labels(count: int, seed: int, only: int | None = None) -> Tensor:
    if only is not None:
        return torch.full((count,), only)
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


LOCAL_N = labels(1200, 0)


@pytest.fixture(scope="module")
def student() -> Layer:
    student = Layer().eval()
    x_NCHW = normalise(pictures(LOCAL_N, 0))
    student.bn1.running_mean = x_NCHW.mean(dim=(0, 2, 3))
    student.bn1.running_var = x_NCHW.var(dim=(0, 2, 3))
    return student.requires_grad_(False)


@pytest.fixture(scope="module")
def source(student: Layer) -> SourceStatistics:
    found = source_statistics(student, pictures(LOCAL_N, 0), torch.eye(CLASSES)[LOCAL_N], seed=0)
    assert found is not None
    return found


@pytest.fixture
def norm(student: Layer, source: SourceStatistics) -> StreamNorm:
    (norm,) = source.layers([student.bn1])
    return norm


def batch(count: int, seed: int, only: int | None = None) -> Tensor:
    """Pictures as the layer gets them; all of one class, or of all."""
    return normalise(pictures(labels(count, seed, only), seed))


# --- the nearest point of a hull ---


def best_by_trying_every_face(corners_KD: Floats, point_D: Floats) -> float:
    """The squared distance of a point from a hull: it is nearest on one of the faces."""
    nearest = np.inf
    for size in range(1, len(corners_KD) + 1):
        for face in itertools.combinations(range(len(corners_KD)), size):
            origin_D, *others = corners_KD[list(face)]
            edges_DE = np.array([corner_D - origin_D for corner_D in others]).reshape(-1, len(origin_D)).T
            weights_E = np.linalg.lstsq(edges_DE, point_D - origin_D, rcond=None)[0]
            if (weights_E >= -1e-10).all() and weights_E.sum() <= 1 + 1e-10:
                nearest = min(nearest, float(((origin_D + edges_DE @ weights_E - point_D) ** 2).sum()))
    return nearest


def mixed(corners_KD: Floats, point_D: Floats) -> Floats:
    shares_K = nearest_mixture(corners_KD @ corners_KD.T, corners_KD @ point_D)
    assert (shares_K >= 0).all() and shares_K.sum() == pytest.approx(1.0, abs=1e-9)
    return shares_K


def test_nearest_mixture_is_as_near_as_the_best_of_all_faces() -> None:
    rng = np.random.default_rng(0)
    for i in range(200):
        corners_KD = rng.normal(size=(rng.integers(1, 6), rng.integers(1, 9)))
        if len(corners_KD) > 2 and i % 3 == 0:  # kinds that look alike
            corners_KD[1] = corners_KD[0] * (1 + (i % 2) * 1e-7)
        point_D = rng.choice([0.1, 1.0, 10.0]) * rng.normal(size=corners_KD.shape[1])
        found = ((mixed(corners_KD, point_D) @ corners_KD - point_D) ** 2).sum()
        assert found == pytest.approx(best_by_trying_every_face(corners_KD, point_D), abs=1e-6)


def test_nearest_mixture_of_many_kinds_leaves_no_kind_that_would_be_nearer() -> None:
    rng = np.random.default_rng(1)
    for i in range(40):
        corners_KD = rng.normal(size=(MOST_KINDS, 2 + 3 * i)) + 3.0
        point_D = corners_KD.mean(axis=0) + (0.1, 1.0, 10.0)[i % 3] * rng.normal(size=corners_KD.shape[1])
        shares_K = mixed(corners_KD, point_D)
        uphill_K = corners_KD @ (shares_K @ corners_KD - point_D)
        assert uphill_K @ shares_K - uphill_K.min() < 1e-5


def test_nearest_mixture_is_the_same_wherever_it_begins() -> None:
    rng = np.random.default_rng(4)
    for i in range(60):
        corners_KD = rng.normal(size=(10, 24)) + 1.0
        point_D = rng.dirichlet(np.full(10, 0.3)) @ corners_KD + (0.0, 0.3, 3.0)[i % 3] * rng.normal(size=24)
        found_K = mixed(corners_KD, point_D)
        for near_K in (rng.dirichlet(np.ones(10)), np.eye(10)[i % 10], found_K):
            again_K = nearest_mixture(corners_KD @ corners_KD.T, corners_KD @ point_D, near_K)
            np.testing.assert_allclose(again_K, found_K, atol=1e-6)


def test_nearest_mixture_is_found_at_once_where_the_kinds_are_those_of_a_near_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved, solve = [], np.linalg.solve
    monkeypatch.setattr(np.linalg, "solve", lambda *given: solved.append(given) or solve(*given))
    corners_KD = np.random.default_rng(5).normal(size=(10, 24)) + 1.0
    point_D = np.full(10, 0.1) @ corners_KD
    near_K = nearest_mixture(corners_KD @ corners_KD.T, corners_KD @ (1.01 * point_D))
    cold = len(solved)
    nearest_mixture(corners_KD @ corners_KD.T, corners_KD @ point_D, near_K)
    assert cold >= 10 and len(solved) == cold + 1


def test_nearest_mixture_of_a_corner_is_that_corner_and_of_a_point_within_its_own_shares() -> None:
    corners_KD = np.random.default_rng(2).normal(size=(5, 8))
    for k in range(5):
        np.testing.assert_allclose(mixed(corners_KD, corners_KD[k]), np.eye(5)[k], atol=1e-6)
        np.testing.assert_allclose(mixed(np.eye(5), 100.0 * np.eye(5)[k] - 40.0), np.eye(5)[k], atol=1e-6)
    shares_K = np.array([0.4, 0.0, 0.1, 0.2, 0.3])
    np.testing.assert_allclose(mixed(corners_KD, shares_K @ corners_KD), shares_K, atol=1e-6)
    assert mixed(corners_KD[:1], corners_KD[1]).tolist() == [1.0]


def test_nearest_mixture_of_kinds_that_are_all_one_and_the_same_is_any() -> None:
    mixed(np.ones((6, 3)), np.zeros(3))
    mixed(np.zeros((6, 3)), np.ones(3))


# --- moments ---


def test_moments_are_mean_and_variance_in_the_layers_units() -> None:
    torch.manual_seed(0)
    x_NCHW = 3.0 * torch.randn(5, 6, 7, 8) + 4.0
    mean_C, variance_C = torch.linspace(-2, 6, 6), torch.linspace(0.5, 9, 6)
    found_N2C = picture_moments(x_NCHW, mean_C, variance_C)
    units_NCHW = (x_NCHW.double() - mean_C.double()[:, None, None]) / variance_C.double().sqrt()[:, None, None]
    np.testing.assert_allclose(found_N2C[:, 0], units_NCHW.mean(dim=(2, 3)), atol=1e-5)
    spread_NC = units_NCHW.var(dim=(2, 3), correction=0)
    np.testing.assert_allclose(variance(found_N2C), spread_NC + 1e-3, rtol=1e-4)
    np.testing.assert_allclose(
        place(found_N2C), np.concatenate([found_N2C[:, 0], (spread_NC + 1e-3).log() / 2**0.5], axis=1), atol=1e-4
    )


def test_moments_of_a_mixture_are_mixtures_of_moments() -> None:
    torch.manual_seed(0)
    x_NCHW = torch.cat([torch.randn(6, 2, 4, 4), 5 + 2 * torch.randn(18, 2, 4, 4)])
    found_N2C = picture_moments(x_NCHW, torch.zeros(2), torch.ones(2))
    mixed_2C = 0.25 * found_N2C[:6].mean(axis=0) + 0.75 * found_N2C[6:].mean(axis=0)
    np.testing.assert_allclose(mixed_2C, found_N2C.mean(axis=0), atol=1e-9)
    whole_C = x_NCHW.double().var(dim=(0, 2, 3), correction=0)
    np.testing.assert_allclose(variance(mixed_2C), whole_C + 1e-3, rtol=1e-5)


def test_a_channel_that_is_silent_has_a_variance_above_0() -> None:
    found_N2C = picture_moments(torch.full((2, 1, 4, 4), 1e3), torch.tensor([1e3]), torch.tensor([1.0]))
    assert (variance(found_N2C) >= 1e-3).all() and np.isfinite(place(found_N2C)).all()


def test_a_kind_that_no_picture_shows_looks_like_all_together() -> None:
    moments_N2C = np.random.default_rng(0).normal(size=(6, 2, 3))
    weights_NG = np.eye(3)[[0, 0, 0, 1, 1, 1]]
    found_G2C = kind_means(moments_N2C, weights_NG)
    everything_2C = moments_N2C.mean(axis=0)
    np.testing.assert_allclose(found_G2C[2], everything_2C, atol=1e-12)
    np.testing.assert_allclose(found_G2C[1], (moments_N2C[3:].sum(axis=0) + everything_2C) / 4, atol=1e-12)


# --- narrowness, kinds, mixtures ---


def test_few_classes_are_kinds_and_a_hundred_make_32_of_classes_alike() -> None:
    rng = np.random.default_rng(0)
    few_NK = rng.dirichlet(np.ones(MOST_KINDS), size=9)
    assert by_kind(few_NK, rng.normal(size=(MOST_KINDS, 8))) is few_NK
    family_K = np.arange(100) % MOST_KINDS
    rows_KD = np.eye(MOST_KINDS)[family_K] * rng.uniform(0.5, 2.0, (100, 1)) + 0.01 * rng.normal(
        size=(100, MOST_KINDS)
    )
    joined_KG = by_kind(np.eye(100), rows_KD)
    assert joined_KG.shape == (100, MOST_KINDS) and (joined_KG.sum(axis=1) == 1).all()
    kind_K = joined_KG.argmax(axis=1)
    assert ((kind_K[:, None] == kind_K) == (family_K[:, None] == family_K)).all()
    weights_NK = rng.dirichlet(np.ones(100), size=9)
    np.testing.assert_allclose(by_kind(weights_NK, rows_KD), weights_NK @ joined_KG, atol=1e-12)


def of_equal_means(count: int = 5) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(3)
    moments_G2C = np.stack([rng.normal(size=(count, 12)), np.zeros((count, 12))], axis=1)
    moments_G2C[:, 1] = moments_G2C[:, 0] ** 2 + rng.uniform(0.5, 2.0, (count, 12))
    return moments_G2C, rng.dirichlet(np.ones(count))


def test_one_kind_leaves_no_rest_in_a_narrow_stream_and_the_local_mixture_none_in_a_wide_one() -> None:
    moments_G2C, shares_G = of_equal_means()
    mixtures = Mixtures(moments_G2C, shares_G)
    for kind_2C in moments_G2C:
        rest_P, expected_2C = mixtures.rest(kind_2C, mixtures.unexplained(kind_2C)[1], narrowness=1.0)
        np.testing.assert_allclose(rest_P, 0.0, atol=1e-5)
        np.testing.assert_allclose(expected_2C, kind_2C, atol=1e-5)
        assert np.linalg.norm(mixtures.rest(kind_2C, mixtures.unexplained(kind_2C)[1], narrowness=0.0)[0]) > 1.0
    local_2C = np.tensordot(shares_G, moments_G2C, axes=1)
    for narrowness in (0.0, 0.01):
        rest_P, expected_2C = mixtures.rest(local_2C, mixtures.unexplained(local_2C)[1], narrowness=narrowness)
        np.testing.assert_allclose(rest_P, 0.0, atol=1e-12)
        np.testing.assert_allclose(expected_2C, local_2C, atol=1e-12)


def test_a_wider_stream_is_explained_less() -> None:
    moments_G2C, shares_G = of_equal_means()
    mixtures = Mixtures(moments_G2C, shares_G)
    kind_2C = moments_G2C[0] + np.array([[0.2], [0.1]])
    rests = [
        np.linalg.norm(mixtures.rest(kind_2C, mixtures.unexplained(kind_2C)[1], narrowness=narrowness)[0])
        for narrowness in (1.0, 0.3, 0.1, 0.0)
    ]
    assert rests == sorted(rests) and rests[0] < 0.5 * rests[-1]


# --- the layer ---


@pytest.mark.parametrize("only", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("count", [1, 16, 200])
def test_unshifted_pictures_are_normalised_exactly_as_batch_norm_does_but_rarely(
    only: int | None, count: int, norm: StreamNorm, student: Layer
) -> None:
    untouched = 0
    for seed in range(20):
        norm.reset()
        norm.narrowness = 0.0 if only is None else 1.0
        x_NCHW = batch(count, 100 + seed, only if count > 1 or only is not None else seed % CLASSES)
        y_NCHW = norm(x_NCHW)
        if norm.shift == 0.0:
            untouched += 1
            assert torch.equal(y_NCHW, student.bn1(x_NCHW))
        else:
            assert norm.shift < 0.6
    assert untouched >= 16


def undone(norm: StreamNorm, bn: nn.BatchNorm2d, x_NCHW: Tensor, changed_NCHW: Tensor) -> float:
    """How much is left of a change in what comes out, as a part of what batch norm leaves of it."""
    clean_NCHW = bn(x_NCHW)
    return float((norm(changed_NCHW) - clean_NCHW).norm() / (bn(changed_NCHW) - clean_NCHW).norm())


@pytest.mark.parametrize("only", [None, 0, 1, 2, 3])
def test_a_channels_change_of_contrast_and_brightness_is_undone(
    only: int | None, norm: StreamNorm, student: Layer
) -> None:
    rng = torch.Generator().manual_seed(5)
    a_C = 0.5 + torch.rand(CHANNELS, 1, 1, generator=rng)
    b_C = 0.6 * torch.randn(CHANNELS, 1, 1, generator=rng)
    left = []
    for seed in range(4):
        x_NCHW = batch(128, 200 + seed, only)
        norm.narrowness = 0.0 if only is None else 1.0
        left.append(undone(norm, student.bn1, x_NCHW, a_C * x_NCHW + b_C))
        assert norm.shift > 0.9
    # 0.01 where the classes are known; of one class alone, which other classes explain a little, 0.10 to 0.37.
    assert max(left) < (0.03 if only is None else 0.45)


def test_a_shift_that_ends_is_forgotten_within_two_batches(norm: StreamNorm) -> None:
    norm.narrowness = 0.0
    for seed in range(4):
        norm(0.5 * batch(64, 300 + seed) + 0.6)
    assert norm.shift > 0.9
    shifts = []
    for seed in range(4):
        norm(batch(64, 310 + seed))
        shifts.append(norm.shift)
    assert shifts[1:] == [0.0] * 3


def test_a_shift_that_stays_is_found_out_picture_by_picture(norm: StreamNorm, student: Layer) -> None:
    norm.narrowness = 0.0
    left = []
    for seed in range(60):
        x_NCHW = batch(1, 400 + seed)
        left.append(undone(norm, student.bn1, x_NCHW, 0.6 * x_NCHW + 0.3))
    assert left[0] > 0.5 and np.mean(left[40:]) < 0.15  # 0.69 of the first is left, of the last ones 0.06


def test_reset_gives_the_first_answers_again(norm: StreamNorm) -> None:
    batches = [0.7 * batch(8, seed) + 0.2 for seed in range(4)]
    first = [norm(x_NCHW) for x_NCHW in batches]
    norm.narrowness = 0.3
    norm.reset()
    assert norm.shift == 0.0
    assert all(torch.equal(norm(x_NCHW), y_NCHW) for x_NCHW, y_NCHW in zip(batches, first, strict=True))


def test_trained_statistics_stay_as_they_were(norm: StreamNorm, student: Layer) -> None:
    before = {name: value.clone() for name, value in student.bn1.state_dict().items()}
    norm.train()(0.5 * batch(16, 0) + 0.5)
    assert norm.shift > 0.5
    assert all(torch.equal(before[name], value) for name, value in student.bn1.state_dict().items())


def test_statistics_of_another_student_are_refused(student: Layer, source: SourceStatistics) -> None:
    with pytest.raises(ValueError, match=r"with 1 layers of batch norm and 16 channels .* got 1 and 8"):
        source.layers(batch_norms(Layer(8)))
    with pytest.raises(ValueError, match="got 2 and 16"):
        source.layers([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
    with pytest.raises(ValueError, match="got 0 and 0"):
        source.layers([])
