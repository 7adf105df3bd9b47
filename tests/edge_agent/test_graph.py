import io
from typing import cast

import numpy as np
import pytest
import torch
from edge_agent.adapt import Adapter, Memory, build_memory, nearest, propagate
from torch import Tensor, nn

from edge_agent.config import AdaptConfig
from edge_agent.distill import Pool
from networks.classifiers import Classifier

CONFIG = AdaptConfig(memory_count=30, neighbour_count=3, strength=1.0)


class Flat(Classifier):
    """A student whose features are four pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def features(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW[:, 0, 0, :4] + 1.5


def pictures(count: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 8, 8), generator=rng).to(torch.uint8)


def pool(*, hard: bool = False) -> Pool:
    rng = torch.Generator().manual_seed(1)
    probabilities_NK = (3.0 * torch.randn(200, 3, generator=rng)).softmax(dim=1)
    answers = {"class_indices_N": probabilities_NK.argmax(dim=1)} if hard else {"probabilities_NK": probabilities_NK}
    return Pool(images_NCHW=pictures(200), latents_NL=torch.zeros(200, 5), **answers)


@pytest.mark.parametrize("hard", [False, True])
def test_memory_is_balanced_and_holds_unit_features_and_paid_answers(hard: bool) -> None:
    memory = build_memory(Flat(), pool(hard=hard), config=CONFIG)
    assert np.bincount(memory.answers_MK.argmax(axis=1)).tolist() == [10, 10, 10]
    np.testing.assert_allclose(np.linalg.norm(memory.features_MD, axis=1), 1.0, atol=1e-6)
    paid = pool(hard=hard).answers_as_probabilities(3).numpy()
    assert all((row == paid).all(axis=1).any() for row in memory.answers_MK)


def test_memory_takes_fewer_of_a_rare_class_and_stays_within_its_bytes() -> None:
    everything = build_memory(Flat(), pool(), config=AdaptConfig(memory_count=10_000))
    assert len(everything.features_MD) == 200
    config = AdaptConfig(memory_count=10_000, memory_bytes=28 * 30 + 27)  # 4 features and 3 answers are 28 bytes
    assert len(build_memory(Flat(), pool(), config=config).features_MD) == 30


def test_memory_survives_a_file() -> None:
    memory = build_memory(Flat(), pool(), config=CONFIG)
    buffer = io.BytesIO()
    np.savez(buffer, **memory.to_arrays())  # type: ignore[arg-type]
    again = Memory.from_arrays(np.load(io.BytesIO(buffer.getvalue())))
    np.testing.assert_array_equal(again.features_MD, memory.features_MD)
    np.testing.assert_array_equal(again.answers_MK, memory.answers_MK)


def test_one_picture_with_one_neighbour_solves_its_equation() -> None:
    p_NK, answers_MK = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.0, 1.0]])
    z_NK = propagate(p_NK.log(), answers_MK, torch.tensor([[1]]), strength=1.0, iterations=50)
    # Log-odds log(0.6 / 0.4) - 1 = -0.594535.
    torch.testing.assert_close(z_NK, torch.tensor([[0.355591, 0.644409]]), atol=1e-5, rtol=0)


def test_two_pictures_that_are_neighbours_settle_where_the_equation_says() -> None:
    p_NK = torch.tensor([[0.9, 0.1], [0.45, 0.55]])
    z_NK = propagate(p_NK.log(), torch.zeros(0, 2), torch.tensor([[1], [0]]), strength=1.5, iterations=200)
    again_NK = torch.softmax(p_NK.log() + 1.5 * z_NK.flip(0), dim=1)
    torch.testing.assert_close(z_NK, again_NK, atol=1e-5, rtol=0)
    assert z_NK.argmax(dim=1).tolist() == [0, 0]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.9])
def test_log_odds_move_by_no_more_than_the_strength(strength: float) -> None:
    torch.manual_seed(0)
    log_p_NK = (2.0 * torch.randn(40, 5)).log_softmax(dim=1)
    answers_MK = torch.eye(5)[torch.randint(5, (100,))]
    neighbours_NE = torch.randint(40, 140, (40, 1))
    z_NK = propagate(log_p_NK, answers_MK, neighbours_NE, strength=strength, iterations=30)
    moved_NKK = (z_NK.log()[:, :, None] - z_NK.log()[:, None]) - (log_p_NK[:, :, None] - log_p_NK[:, None])
    assert moved_NKK.abs().max().item() == pytest.approx(strength, abs=1e-4)


def test_nearest_leaves_the_picture_itself_out_and_takes_the_most_alike() -> None:
    batch_ND = nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    remembered_MD = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert nearest(batch_ND, remembered_MD, neighbour_count=1).tolist() == [[1], [0], [3]]
    assert nearest(batch_ND, remembered_MD, neighbour_count=99).shape == (3, 4)


@pytest.mark.parametrize("count", [1, 2, 17])
def test_predictions_are_probabilities_for_any_batch(count: int) -> None:
    student = Flat()
    adapter = Adapter(student, build_memory(student, pool(), config=CONFIG), CONFIG)
    before_NK, after_NK = adapter.predict(pictures(count, seed=7))
    assert before_NK.shape == after_NK.shape == (count, 3)
    assert before_NK.dtype == after_NK.dtype == np.float32
    np.testing.assert_allclose(before_NK.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(after_NK.sum(axis=1), 1.0, atol=1e-6)
    assert not np.allclose(before_NK, after_NK, atol=1e-3)


def test_order_within_a_batch_does_not_matter() -> None:
    student = Flat()
    adapter = Adapter(student, build_memory(student, pool(), config=CONFIG), CONFIG)
    images_NCHW = pictures(17, seed=7)
    np.testing.assert_allclose(
        adapter.predict(images_NCHW.flip(0))[1][::-1], adapter.predict(images_NCHW)[1], atol=1e-5
    )


def test_adaptation_changes_no_parameter() -> None:
    student = Flat()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    Adapter(student, build_memory(student, pool(), config=CONFIG), CONFIG).predict(pictures(5))
    assert all(cast(Tensor, before[name]).equal(value) for name, value in student.state_dict().items())


def test_strength_at_which_propagation_need_not_settle_is_refused() -> None:
    student = Flat()
    memory = build_memory(student, pool(), config=CONFIG)
    with pytest.raises(ValueError, match="got 2"):
        Adapter(student, memory, AdaptConfig(strength=2.0))


def test_memory_with_room_for_fewer_pictures_than_classes_remembers_those_named_first() -> None:
    class_count = 1000
    student = Flat()
    student.linear = nn.Linear(student.linear.in_features, class_count)
    named_N = torch.arange(class_count - 1, class_count - 41, -1).repeat(2)
    images_NCHW = pictures(len(named_N))
    many = Pool(images_NCHW=images_NCHW, latents_NL=torch.zeros(len(named_N), 3), class_indices_N=named_N)
    memory = build_memory(student, many, config=AdaptConfig(memory_count=30))
    assert memory.answers_MK.argmax(1).tolist() == named_N[:30].tolist()
    default = build_memory(student, many, config=AdaptConfig())
    assert len(default.features_MD) == 40
