"""Statistics of batch norm from the batch and from training, mixed: Schneider et al., NeurIPS 2020.

"Improving robustness against common corruptions by covariate shift adaptation", equation 2: mean and variance of
training count as much as those of `source_count` pictures, those of the batch as much as the batch has.

Shape letters: N pictures of a batch, C channels, H and W height and width.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_agent.adaptation.method import Adapted
from edge_agent.pixels import normalise
from networks.classifiers import Classifier

SOURCE_COUNT = 16.0
"""The paper's optimum for small batches of ImageNet-C."""


class BatchNorm:
    """A student whose batch norms listen to each batch; no batch is remembered.

    `source_count` 0 trusts the batch alone, infinity the training alone. A student without batch norm stays as it is.
    """

    def __init__(self, student: Classifier, *, source_count: float = SOURCE_COUNT) -> None:
        self._student = deepcopy(student).eval()
        for parent in list(self._student.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, _Mixed(child, source_count))

    @torch.inference_mode()
    def adapt(self, images_NCHW: Tensor) -> Adapted:
        return Adapted(probabilities_NK=self._student(normalise(images_NCHW)).softmax(dim=1))

    def reset(self) -> None:
        """Nothing to forget."""


class _Mixed(nn.Module):
    def __init__(self, trained: nn.BatchNorm2d, source_count: float) -> None:
        super().__init__()
        self.trained = trained
        self.source_count = source_count

    def forward(self, x_NCHW: Tensor) -> Tensor:
        trained, count = self.trained, len(x_NCHW)
        assert trained.running_mean is not None and trained.running_var is not None
        share = count / (self.source_count + count)
        # Batch norm's own pass over the pictures, a quarter of the time of torch.var_mean's.
        mean_C, var_C = torch.batch_norm_update_stats(x_NCHW, None, None, 0.0)
        return F.batch_norm(
            x_NCHW,
            (1 - share) * trained.running_mean + share * mean_C,
            (1 - share) * trained.running_var + share * var_C,
            trained.weight,
            trained.bias,
            eps=trained.eps,
        )
