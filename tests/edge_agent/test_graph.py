import pytest
import torch
from torch.nn import functional as F

from edge_agent.adaptation.graph import nearest, propagate, vote


def test_one_picture_with_one_neighbour_solves_its_equation() -> None:
    p_NK, answers_MK = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.0, 1.0]])
    z_NK = propagate(p_NK.log(), answers_MK, torch.tensor([[1]]), strength=1.0, iterations=50)
    # Log-odds log(0.6 / 0.4) - 1 = -0.594535.
    torch.testing.assert_close(z_NK, torch.tensor([[0.355591, 0.644409]]), atol=1e-5, rtol=0)


def test_two_pictures_that_are_neighbours_settle_where_the_equation_says() -> None:
    p_NK = torch.tensor([[0.9, 0.1], [0.45, 0.55]])
    z_NK = propagate(p_NK.log(), torch.zeros(0, 2), torch.tensor([[1], [0]]), strength=1.5, iterations=200)
    again_NK = torch.softmax(p_NK.log() + 1.5 * z_NK.flip(0), dim=1)
    torch.testing.assert_close(z_NK, again_NK, atol=1e-4, rtol=0)
    assert z_NK.argmax(dim=1).tolist() == [0, 0]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.9, 5.0])
def test_log_odds_move_by_no_more_than_the_strength(strength: float) -> None:
    torch.manual_seed(0)
    log_p_NK = (2.0 * torch.randn(40, 5)).log_softmax(dim=1)
    answers_MK = torch.eye(5)[torch.randint(5, (100,))]
    neighbours_NE = torch.randint(40, 140, (40, 1))
    z_NK = propagate(log_p_NK, answers_MK, neighbours_NE, strength=strength, iterations=30)
    moved_NKK = (z_NK.log()[:, :, None] - z_NK.log()[:, None]) - (log_p_NK[:, :, None] - log_p_NK[:, None])
    assert moved_NKK.abs().max().item() == pytest.approx(strength, abs=1e-4)


@pytest.mark.parametrize("iterations", [0, 30])
def test_a_picture_without_neighbours_keeps_the_students_answer(iterations: int) -> None:
    p_NK = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    nobody_NE = torch.zeros(2, 0, dtype=torch.long)
    z_NK = propagate(p_NK.log(), torch.zeros(0, 2), nobody_NE, strength=5.0, iterations=iterations)
    torch.testing.assert_close(z_NK, p_NK)


def test_nearest_leaves_the_picture_itself_out_and_takes_the_most_alike() -> None:
    batch_ND = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    remembered_MD = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert nearest(batch_ND, remembered_MD, neighbour_count=1).tolist() == [[1], [0], [3]]
    assert nearest(batch_ND, remembered_MD, neighbour_count=99).shape == (3, 4)


def test_a_picture_that_comes_alone_and_first_has_no_neighbour() -> None:
    assert nearest(torch.ones(1, 1), torch.zeros(0, 1), neighbour_count=5).shape == (1, 0)


def test_vote_is_the_mean_answer_of_the_nearest_remembered() -> None:
    features_ND = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0]]), dim=1)
    remembered_MD = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.3], [0.0, 1.0], [-1.0, 0.0]]), dim=1)
    answers_MK = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.2, 0.8]])
    two_NK = vote(features_ND, remembered_MD, answers_MK, neighbour_count=2)
    torch.testing.assert_close(two_NK, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    all_NK = vote(features_ND, remembered_MD, answers_MK, neighbour_count=99)
    torch.testing.assert_close(all_NK, answers_MK.mean(dim=0).expand(2, -1))


def test_vote_without_neighbours_is_uniform() -> None:
    voted_NK = vote(torch.ones(3, 1), torch.ones(2, 1), torch.eye(5)[:2], neighbour_count=0)
    torch.testing.assert_close(voted_NK, torch.full((3, 5), 0.2))
