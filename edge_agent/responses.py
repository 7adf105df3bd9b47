"""A black box's answer, made into something a loss or the generator can take.

Shape letters: N pictures, K classes, E free noise numbers, L = K + E latent numbers.

A service sells probabilities, or only the index of the likeliest class. Both go through one path: an
index is the probability vector with a single one. The student's own probabilities take the same path, so
teacher and student meet in the same polytope of the generator's latent space, at no fitted scale. That map is
linear in the probabilities: what rounding or leaving out classes moves there is what it moved in the answer.
Only logarithms need more care where an answer was rounded (`epsilon`).
"""

import math
from functools import cache

import torch
from torch import Tensor

from protos import codec

# Smallest probability a logarithm is taken of: about what float32 can still tell from 0 beside a 1.
EPSILON = 1e-7
LARGEST_WEIGHT = 10.0
"""Of a picture beside the mean one, however seldom its classes are named."""
_BALANCE_ROUNDS = 200
_LIMIT_ROUNDS = 30


def epsilon(decimals: int | None, class_count: int) -> float:
    """Smallest probability a logarithm is taken of, for answers rounded to `decimals`; None: not rounded.

    A class that was rounded to 0 had half of 10^-decimals at most. Taking that for each of them makes targets far too
    flat, for they seldom all had it: with two decimals targets were off by 0.07 (sum of absolute differences) at ten
    classes and by 0.52 at a hundred. So they share it, a K-th each: off by 0.011 and 0.092. Of these two and
    float32's limit, the K-th came nearest to the unrounded targets (in KL) at 10, 100 and 1000 classes, with 1 to 3
    decimals and at temperatures 1, 2 and 4.
    """
    return max(EPSILON, codec.rounding_error(decimals) / class_count)


def centred_log_probabilities(probabilities_NK: Tensor, epsilon: float | Tensor = EPSILON) -> Tensor:
    """Recover the logits minus their mean, exactly where no probability is below `epsilon` (a number, or (N, 1)).

    The mean itself cannot be recovered: adding a constant to all logits doesn't change a probability.
    """
    log_p_NK = torch.clamp(probabilities_NK, min=epsilon).log()
    return log_p_NK - log_p_NK.mean(dim=1, keepdim=True)


def soften(probabilities_NK: Tensor, temperature: float | Tensor, epsilon: float | Tensor = EPSILON) -> Tensor:
    """Return softmax(logits / temperature) without the logits: p^(1/T), normalised. T: a number, or (N, 1)."""
    return torch.softmax(centred_log_probabilities(probabilities_NK, epsilon) / temperature, dim=1)


def balanced(probabilities_NK: Tensor, epsilon: float | Tensor = EPSILON) -> Tensor:
    """Return p · exp(b), normalised; b is one number a class, such that the mean answer is the same for all classes.

    A teacher that was never shown such pictures calls most of them by few names, and what tells the others apart is
    left in the small probabilities. If no class is rarer than another among the pictures, its favour for some names
    is an error, and b takes it off: logit adjustment (Menon et al., ICLR 2021) with the label distribution made
    uniform by fixed-point steps (Saerens et al., 2002, turned round).

    It is for pictures that are strange to the teacher; of others it makes answers a little worse (docs/ablations.md).
    """
    log_p_NK = centred_log_probabilities(probabilities_NK, epsilon).double()
    class_count = log_p_NK.shape[1]
    for _ in range(_BALANCE_ROUNDS):
        mean_K = torch.softmax(log_p_NK, dim=1).mean(dim=0)
        log_p_NK = log_p_NK - (class_count * mean_K).log()
    return torch.softmax(log_p_NK, dim=1).to(probabilities_NK.dtype)


def balancing_weights(probabilities_NK: Tensor) -> Tensor:
    """Return how often to see each picture (N,), float32, 1 on average, for all classes to be named alike.

    The answers stay what they are. A generator that seldom makes some classes teaches the student that they are
    seldom; with their pictures seen so much more often it does not. A weight is the sum over the classes of
    probability times one number a class, found by fixed-point steps. Where alike would take weights above
    LARGEST_WEIGHT or below its inverse, they stop there: a class that next to no answer names is not had by looking
    at a few pictures all the time, and none that was paid for goes unseen.
    """
    p_NK = probabilities_NK.double()
    mean_K = p_NK.mean(dim=0)
    scale_K = torch.ones_like(mean_K)
    for _ in range(_BALANCE_ROUNDS):
        named_K = (p_NK @ scale_K) @ p_NK / len(p_NK)
        # A class that is in no answer gets a large number, which weighs nothing.
        scale_K = (scale_K / (len(scale_K) * named_K).sqrt()).clamp(max=1 / EPSILON)
        for _ in range(_LIMIT_ROUNDS):
            scale_K = (scale_K / (mean_K @ scale_K)).clamp(1 / LARGEST_WEIGHT, LARGEST_WEIGHT)
    return (p_NK @ scale_K).float()


def one_hot(class_indices_N: Tensor, class_count: int) -> Tensor:
    """Class indices (int64) as probabilities: one where the index points, zero elsewhere."""
    shape = (len(class_indices_N), class_count)
    return torch.zeros(shape, device=class_indices_N.device).scatter_(1, class_indices_N[:, None], 1.0)


def class_axes(probabilities_NK: Tensor) -> Tensor:
    """The generator's class axes for an answer: the sum over k of p_k · E[z | z_k is the largest].

    z is the generator's own prior: K normal numbers, their mean taken off. By symmetry the conditional
    mean is m · (e_k - (1 - e_k) / (K - 1)) with m the expected largest of K normals, which is
    a · (e_k - 1/K) with a = m · K / (K - 1). So an index becomes a point of norm m · sqrt(K / (K - 1)):
    1.62 for 10 classes, 2.52 for 100, inside the prior's shell of radius sqrt(K - 1).
    """
    class_count = probabilities_NK.shape[1]
    scale = expected_largest_normal(class_count) * class_count / (class_count - 1)
    return scale * (probabilities_NK - 1.0 / class_count)


def generator_input(probabilities_NK: Tensor, noise_NE: Tensor) -> Tensor:
    """Latents (N, L): the answer on the class axes, the given numbers on the free ones."""
    return torch.cat([class_axes(probabilities_NK), noise_NE], dim=1)


@cache
def expected_largest_normal(count: int) -> float:
    """Mean of the largest of `count` independent standard normal numbers: 1.539 for 10, 2.508 for 100.

    It is the integral of 1 - F(x) - F(-x) over x > 0, where F(x) = Phi(x)^count is the chance that all
    of them stay below x.
    """
    if count < 2:
        raise ValueError(f"count: expected at least 2 classes, got {count}")
    x = torch.linspace(0.0, 12.0, 12_001, dtype=torch.float64)
    phi = 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
    return float(torch.trapezoid(1.0 - phi**count - (1.0 - phi) ** count, x))
