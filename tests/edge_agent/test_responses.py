import math

import pytest
import torch

from edge_agent import losses, responses
from networks.gan import draw_latents
from protos import codec
from protos.mekd.v1.teacher_inference_pb2 import Answer


def test_logits_are_recovered_up_to_a_constant() -> None:
    torch.manual_seed(0)
    logits_NK = 2.0 * torch.randn(50, 10)
    centred_NK = logits_NK - logits_NK.mean(dim=1, keepdim=True)
    recovered_NK = responses.centred_log_probabilities(logits_NK.softmax(dim=1))
    torch.testing.assert_close(recovered_NK, centred_NK, atol=1e-4, rtol=0)


def test_probability_of_zero_is_taken_as_epsilon() -> None:
    centred_NK = responses.centred_log_probabilities(torch.tensor([[1.0, 0.0]]), epsilon=1e-4)
    half = 0.5 * math.log(1e4)
    torch.testing.assert_close(centred_NK, torch.tensor([[half, -half]]))


def test_balanced_answers_name_all_classes_alike_and_differ_by_one_number_a_class() -> None:
    torch.manual_seed(0)
    logits_NK = 2.0 * torch.randn(400, 5) + torch.tensor([3.0, 0.0, -1.0, 0.0, 1.0])
    balanced_NK = responses.balanced(logits_NK.softmax(dim=1))
    torch.testing.assert_close(balanced_NK.mean(dim=0), torch.full((5,), 0.2), atol=1e-4, rtol=0)
    shift_NK = balanced_NK.log() - logits_NK
    shift_NK = shift_NK - shift_NK.mean(dim=1, keepdim=True)
    torch.testing.assert_close(shift_NK, shift_NK[:1].expand(400, 5), atol=1e-3, rtol=0)
    assert balanced_NK.dtype == torch.float32


def test_balancing_finds_what_a_one_sided_teacher_left_in_its_small_probabilities() -> None:
    # It says the first class of everything; the odds of both pictures are 9 apart, so balanced they are 3 and 1/3.
    balanced_NK = responses.balanced(torch.tensor([[0.99, 0.01], [0.99 / 9 / (0.99 / 9 + 0.01), 0.01 / 0.12]]))
    torch.testing.assert_close(balanced_NK, torch.tensor([[0.75, 0.25], [0.25, 0.75]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("hard", [False, True])
def test_weighed_pictures_name_all_classes_alike(hard: bool) -> None:
    torch.manual_seed(0)
    answers_NK = (4.0 * torch.randn(2000, 4) + torch.tensor([4.0, 0.0, -2.0, 0.0])).softmax(dim=1)
    if hard:
        answers_NK = responses.one_hot(answers_NK.argmax(dim=1), 4)
    weight_N = responses.balancing_weights(answers_NK)
    assert answers_NK.mean(dim=0).min() < 0.12
    torch.testing.assert_close(
        (weight_N[:, None] * answers_NK).mean(dim=0), torch.full((4,), 0.25), atol=1e-4, rtol=0
    )
    assert weight_N.dtype == torch.float32 and weight_N.min() > 0 and weight_N.mean() == pytest.approx(1.0)


@pytest.mark.parametrize(("classes", "common", "named"), [(4, 3, 0), (4, 3, 2), (10, 2, 1), (100, 10, 1)])
def test_a_class_that_next_to_no_answer_names_does_not_make_a_few_pictures_all_that_is_seen(
    classes: int, common: int, named: int
) -> None:
    indices_N = torch.arange(5000) % common
    indices_N[:named] = common
    weight_N = responses.balancing_weights(responses.one_hot(indices_N, classes))
    assert weight_N[:named].tolist() == pytest.approx([responses.LARGEST_WEIGHT] * named, rel=0.01)
    assert weight_N[named:].tolist() == pytest.approx([1.0] * (5000 - named), rel=0.01)


def test_no_picture_goes_unseen_where_no_weights_name_all_classes_alike() -> None:
    answers_NK = torch.tensor([[1.0, 0.0], [0.7, 0.3]]).repeat(500, 1)  # the second class is never the likelier one
    weight_N = responses.balancing_weights(answers_NK)
    assert weight_N.min() == pytest.approx(1 / responses.LARGEST_WEIGHT, rel=0.01)
    assert weight_N.mean() == pytest.approx(1.0)


def test_smallest_probability_follows_the_rounding_and_is_shared_by_the_classes() -> None:
    assert responses.epsilon(None, 10) == responses.EPSILON
    assert responses.epsilon(2, 10) == pytest.approx(0.0005)
    assert responses.epsilon(2, 1000) == pytest.approx(0.000005)
    assert responses.epsilon(7, 10) == responses.EPSILON  # never below what float32 can tell
    p_NK = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    centred_NK = responses.centred_log_probabilities(p_NK, torch.tensor([[1e-4], [1e-2]]))
    assert centred_NK[:, 0].tolist() == pytest.approx([0.5 * math.log(1e4), 0.5 * math.log(1e2)])


@pytest.mark.parametrize("class_count", [10, 100])
@pytest.mark.parametrize("decimals", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_softened_rounded_answers_are_nearest_to_the_unrounded_ones_with_that_smallest_probability(
    class_count: int, decimals: int, temperature: float
) -> None:
    rng = torch.Generator().manual_seed(0)
    true_NK = (3.0 * torch.randn(500, class_count, generator=rng)).softmax(dim=1)
    sold_NK = true_NK.double().round(decimals=decimals).float()
    answer = Answer(probabilities=codec.encode_probabilities(sold_NK.numpy()), decimals=decimals)
    rounded_NK = torch.from_numpy(codec.decode_answer(answer, picture_count=500, class_count=class_count))
    wanted_NK = responses.soften(true_NK, temperature)

    def off_by(epsilon: float) -> float:
        found_NK = responses.soften(rounded_NK, temperature, epsilon)
        return float(losses.kl_divergence(wanted_NK, found_NK.log()).mean())

    best = off_by(responses.epsilon(decimals, class_count))
    for other in (codec.rounding_error(decimals), responses.EPSILON):
        assert best <= off_by(other) + 1e-9


def test_rounding_moves_the_class_axes_by_no_more_than_it_moved_the_answer() -> None:
    p_NK = torch.tensor([[0.123456, 0.3, 0.576544]])
    moved_NK = responses.class_axes(p_NK.double().round(decimals=2).float()) - responses.class_axes(p_NK)
    scale = responses.expected_largest_normal(3) * 3 / 2
    assert moved_NK.abs().max() <= scale * codec.rounding_error(2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_softening_probabilities_is_softening_their_logits(temperature: float) -> None:
    torch.manual_seed(0)
    logits_NK = 2.0 * torch.randn(50, 10)
    softened_NK = responses.soften(logits_NK.softmax(dim=1), temperature)
    torch.testing.assert_close(softened_NK, (logits_NK / temperature).softmax(dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("count", "expected"), [(2, 1 / math.sqrt(math.pi)), (10, 1.53875), (100, 2.50759)])
def test_expected_largest_of_some_normals(count: int, expected: float) -> None:
    assert responses.expected_largest_normal(count) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("class_count", "norm"), [(10, 1.62), (100, 2.52)])
def test_an_index_becomes_a_point_of_known_norm(class_count: int, norm: float) -> None:
    indices_N = torch.arange(class_count)
    axes_NK = responses.class_axes(responses.one_hot(indices_N, class_count))
    assert axes_NK.norm(dim=1).tolist() == pytest.approx([norm] * class_count, abs=0.005)
    assert axes_NK.argmax(dim=1).equal(indices_N)


def test_an_index_becomes_the_mean_of_the_latents_whose_largest_class_axis_it_is() -> None:
    rng = torch.Generator().manual_seed(0)
    axes_NK = draw_latents(200_000, class_count=4, noise_count=0, rng=rng)
    mean_K = axes_NK[axes_NK.argmax(dim=1) == 2].mean(dim=0)
    expected_NK = responses.class_axes(responses.one_hot(torch.tensor([2]), 4))
    torch.testing.assert_close(mean_K, expected_NK[0], atol=0.015, rtol=0)  # about four standard errors


def test_soft_answers_lie_between_the_points_of_the_indices() -> None:
    p_NK = torch.tensor([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    corners_KK = responses.class_axes(torch.eye(3))
    torch.testing.assert_close(responses.class_axes(p_NK), p_NK @ corners_KK, atol=1e-6, rtol=0)
    torch.testing.assert_close(responses.class_axes(p_NK)[1], torch.zeros(3), atol=1e-6, rtol=0)


def test_generator_input_keeps_the_noise_beside_the_axes() -> None:
    noise_NE = torch.randn(2, 5)
    latents_NL = responses.generator_input(torch.eye(3)[:2], noise_NE)
    assert latents_NL.shape == (2, 8)
    assert latents_NL[:, 3:].equal(noise_NE)
    torch.testing.assert_close(latents_NL[:, :3].sum(dim=1), torch.zeros(2), atol=1e-6, rtol=0)
