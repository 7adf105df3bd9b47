"""Propagation over a graph: pictures listen to those that look alike to the student.

Shape letters: N pictures of a batch, M remembered pictures, D features, K classes, E neighbours.

LAME's fixed point (Boudiaf et al., CVPR 2022) with two changes: remembered pictures take part as nodes whose answers
never move, synthetic ones with the answers that were paid for and recent ones with their own; and the neighbours of a
picture weigh 1 together. The published third phase of MEKD gives no formula; this is our own.
"""

import torch
from torch import Tensor

# In probability: below this nothing that anyone reads changes any more.
_SETTLED = 1e-4


def nearest(features_ND: Tensor, remembered_MD: Tensor, *, neighbour_count: int) -> Tensor:
    """Indices (N, E) of each picture's E nearest among N + M: the batch first, then the remembered.

    Features have length 1, so the nearest have the largest inner product. No picture is its own neighbour.
    """
    similarity_NA = features_ND @ torch.cat([features_ND, remembered_MD]).T
    similarity_NA.fill_diagonal_(-torch.inf)
    possible = similarity_NA.shape[1] - 1
    return similarity_NA.topk(min(neighbour_count, possible), dim=1).indices


def vote(features_ND: Tensor, remembered_MD: Tensor, answers_MK: Tensor, *, neighbour_count: int) -> Tensor:
    """Return the mean answer (N, K) of each picture's nearest among the remembered; uniform where there is none."""
    if len(remembered_MD) == 0 or neighbour_count == 0:
        return answers_MK.new_full((len(features_ND), answers_MK.shape[1]), 1.0 / answers_MK.shape[1])
    nearest_NE = (features_ND @ remembered_MD.T).topk(min(neighbour_count, len(remembered_MD)), dim=1).indices
    return answers_MK[nearest_NE].mean(dim=1)


def propagate(
    log_p_NK: Tensor, answers_MK: Tensor, neighbours_NE: Tensor, *, strength: float, iterations: int
) -> Tensor:
    """Return z (N, K) with z = softmax(log p + strength * mean of the neighbours' z); the remembered z is fixed.

    The mean lies between 0 and 1, so log-odds between two classes move by `strength` at most: a picture that the
    student is surer of keeps its class. The rounds begin at p and go down the energy of LAME (equation 5).
    """
    if neighbours_NE.shape[1] == 0 or strength == 0.0:
        return log_p_NK.exp()
    z_NK = log_p_NK.exp()
    for _ in range(iterations):
        heard_NK = torch.cat([z_NK, answers_MK])[neighbours_NE].mean(dim=1)
        before_NK, z_NK = z_NK, torch.softmax(log_p_NK + strength * heard_NK, dim=1)
        if (z_NK - before_NK).abs().max() < _SETTLED:
            break
    return z_NK
