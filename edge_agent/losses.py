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
