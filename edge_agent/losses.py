"""The losses, one number a picture: no reduction, no weights, no state.

Shape letters: N pictures, C channels, H and W height and width, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def kl_divergence(teacher_probabilities_NK: Tensor, student_logits_NK: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats: sum over K of p log(p / q). Returns (N,).

    A class that the teacher gives probability 0 adds 0.
    """
    p_NK = teacher_probabilities_NK
    log_q_NK = F.log_softmax(student_logits_NK, dim=1)
    return (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(dim=1)


def smoothed_cross_entropy(class_indices_N: Tensor, student_logits_NK: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy in nats against (1 - smoothing) · one-hot + smoothing / K. Returns (N,)."""
    return F.cross_entropy(student_logits_NK, class_indices_N, reduction="none", label_smoothing=smoothing)


def pseudo_label_loss(label_probabilities_NK: Tensor, student_logits_NK: Tensor) -> Tensor:
    """Cross-entropy in nats to the likeliest class of the labels' probabilities, 0 where it isn't sure. Returns (N,).

    Sure is what reaches the mean confidence of the N, lowered for classes that are seldom meant: times the class's
    mean probability over the largest such mean. These are the self-adaptive thresholds of FreeMatch (Wang et al.,
    ICLR 2023, section 3), with the means of this batch in place of running ones: there is no state to keep.
    """
    confidence_N, class_N = label_probabilities_NK.max(dim=1)
    mean_K = label_probabilities_NK.mean(dim=0)
    threshold_N = confidence_N.mean() * (mean_K / mean_K.max())[class_N]
    loss_N = F.cross_entropy(student_logits_NK, class_N, reduction="none")
    return torch.where(confidence_N >= threshold_N, loss_N, 0.0)


def image_distance(images_NCHW: Tensor, others_NCHW: Tensor) -> Tensor:
    """L1 distance as the **mean** over C, H and W, so that its size doesn't depend on the side. Returns (N,).

    For the paper's norm of a whole picture (a sum) multiply by C · H · W.
    """
    return (images_NCHW - others_NCHW).abs().mean(dim=(1, 2, 3))


def log_real(scores_N: Tensor) -> Tensor:
    """The discriminator's loss on real pictures in nats: -log sigmoid(score). Returns (N,)."""
    return F.softplus(-scores_N)


def log_synthetic(scores_N: Tensor) -> Tensor:
    """The discriminator's loss on synthetic pictures in nats: -log(1 - sigmoid(score)). Returns (N,)."""
    return F.softplus(scores_N)


def log_generator(scores_N: Tensor) -> Tensor:
    """The generator's loss on its own pictures in nats, not saturating: -log sigmoid(score). Returns (N,)."""
    return F.softplus(-scores_N)


def hinge_real(scores_N: Tensor) -> Tensor:
    """The discriminator's loss on real pictures: max(0, 1 - score). Returns (N,)."""
    return F.relu(1.0 - scores_N)


def hinge_synthetic(scores_N: Tensor) -> Tensor:
    """The discriminator's loss on synthetic pictures: max(0, 1 + score). Returns (N,)."""
    return F.relu(1.0 + scores_N)


def hinge_generator(scores_N: Tensor) -> Tensor:
    """The generator's loss on its own pictures: minus the score. Returns (N,)."""
    return -scores_N
