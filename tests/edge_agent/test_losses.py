import math

import pytest
import torch
from torch import Tensor

from edge_agent import losses

P_NK = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])


def test_divergence_from_a_uniform_student_is_log_k_minus_the_entropy() -> None:
    # log 3 - 0.801819 and log 3 - 0; a probability of 0 adds nothing.
    kl_N = losses.kl_divergence(P_NK, torch.zeros(2, 3))
    torch.testing.assert_close(kl_N, torch.tensor([0.296794, 1.098612]), atol=1e-5, rtol=0)


def test_divergence_is_from_teacher_to_student_and_not_back() -> None:
    # 0.7 log(0.7 / 0.1) + 0.2 log(0.2 / 0.2) + 0.1 log(0.1 / 0.7) = 0.6 log 7; the other way differs below.
    student_NK = torch.tensor([[0.5, 0.25, 0.25]]).log()
    kl_N = losses.kl_divergence(P_NK[:1], student_NK)
    expected = 0.7 * math.log(1.4) + 0.2 * math.log(0.8) + 0.1 * math.log(0.4)
    assert kl_N.item() == pytest.approx(expected, abs=1e-6)
    backwards = 0.5 * math.log(1 / 1.4) + 0.25 * math.log(1.25) + 0.25 * math.log(2.5)
    assert abs(expected - backwards) > 0.01


def test_gradient_of_the_divergence_is_student_minus_teacher() -> None:
    logits_NK = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 0.0]], requires_grad=True)
    (gradient_NK,) = torch.autograd.grad(losses.kl_divergence(P_NK, logits_NK).sum(), logits_NK)
    torch.testing.assert_close(gradient_NK, logits_NK.detach().softmax(dim=1) - P_NK, atol=1e-6, rtol=0)


def test_pseudo_labels_count_where_they_are_as_sure_as_the_mean_and_less_for_classes_seldom_meant() -> None:
    # Mean confidence 0.7, mean probabilities 0.5, 0.3 and 0.2: thresholds 0.7, 0.42 and 0.28.
    labels_NK = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.9, 0.1, 0.0], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    loss_N = losses.pseudo_label_loss(labels_NK, torch.zeros(5, 3))
    assert labels_NK.mean(dim=0).tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert loss_N.tolist() == pytest.approx([math.log(3), math.log(3), math.log(3), 0.0, math.log(3)])
    logits_NK = torch.tensor([[2.0, 0.0, -1.0]]).expand(5, 3)
    loss_N = losses.pseudo_label_loss(labels_NK, logits_NK)
    assert loss_N.tolist() == pytest.approx([0.169846, 2.169846, 0.169846, 0.0, 3.169846], abs=1e-5)


def test_pseudo_labels_that_are_not_sure_move_nothing() -> None:
    logits_NK = torch.zeros(2, 3, requires_grad=True)
    labels_NK = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.3, 0.3]])  # the second is below the mean of 0.65
    (gradient_NK,) = torch.autograd.grad(losses.pseudo_label_loss(labels_NK, logits_NK).sum(), logits_NK)
    torch.testing.assert_close(gradient_NK, torch.tensor([[-2 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 0.0]]))


def test_smoothed_cross_entropy_is_the_cross_entropy_to_the_smoothed_index() -> None:
    logits_NK = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    target_NK = torch.tensor([[0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3]])
    loss_N = losses.smoothed_cross_entropy(torch.tensor([1]), logits_NK, 0.1)
    torch.testing.assert_close(loss_N, -(target_NK * logits_NK.log_softmax(dim=1)).sum(dim=1))
    (gradient_NK,) = torch.autograd.grad(loss_N.sum(), logits_NK)
    torch.testing.assert_close(gradient_NK, logits_NK.detach().softmax(dim=1) - target_NK, atol=1e-6, rtol=0)


def test_image_distance_is_a_mean_over_channels_and_pixels() -> None:
    black_NCHW = torch.full((2, 3, 4, 4), -1.0)
    other_NCHW = black_NCHW.clone()
    other_NCHW[0, 1, 2, 3] = 0.92  # one number of 48
    other_NCHW[1] = 1.0
    distance_N = losses.image_distance(black_NCHW, other_NCHW)
    torch.testing.assert_close(distance_N, torch.tensor([1.92 / 48, 2.0]), atol=1e-6, rtol=0)


def test_gradient_of_image_distance_is_one_over_the_number_of_values() -> None:
    images_NCHW = torch.rand(2, 3, 4, 4, requires_grad=True)
    distance_N = losses.image_distance(images_NCHW, torch.full((2, 3, 4, 4), 2.0))
    (gradient_NCHW,) = torch.autograd.grad(distance_N.sum(), images_NCHW)
    torch.testing.assert_close(gradient_NCHW, torch.full((2, 3, 4, 4), -1 / 48))


def test_hinge_losses_stop_at_the_margin_and_the_generators_does_not() -> None:
    scores_N = torch.tensor([-2.0, -0.5, 0.5, 2.0], requires_grad=True)

    def loss_and_gradient(loss_N: Tensor) -> tuple[list[float], list[float]]:
        return loss_N.tolist(), torch.autograd.grad(loss_N.sum(), scores_N)[0].tolist()

    assert loss_and_gradient(losses.hinge_real(scores_N)) == ([3.0, 1.5, 0.5, 0.0], [-1, -1, -1, 0])
    assert loss_and_gradient(losses.hinge_synthetic(scores_N)) == ([0.0, 0.5, 1.5, 3.0], [0, 1, 1, 1])
    assert loss_and_gradient(losses.hinge_generator(scores_N)) == ([2.0, 0.5, -0.5, -2.0], [-1, -1, -1, -1])


def test_no_loss_reduces_over_pictures() -> None:
    logits_NK, images_NCHW, scores_N = torch.randn(5, 3), torch.randn(5, 1, 4, 4), torch.randn(5)
    p_NK = torch.randn(5, 3).softmax(dim=1)
    for loss_N in (
        losses.kl_divergence(p_NK, logits_NK),
        losses.smoothed_cross_entropy(p_NK.argmax(dim=1), logits_NK, 0.1),
        losses.image_distance(images_NCHW, -images_NCHW),
        losses.hinge_real(scores_N),
        losses.hinge_synthetic(scores_N),
        losses.hinge_generator(scores_N),
    ):
        assert loss_N.shape == (5,)
