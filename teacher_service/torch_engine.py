"""The engine that runs a loaded model with torch.

Shape legend: N pictures, C channels, H rows, W columns, K classes.
"""

import numpy as np
import torch

from networks.modelfile import LoadedModel
from teacher_service.engine import EngineError, Float32Array, UInt8Array

_SUM_TOLERANCE = 1e-3  # half-precision softmax inside an exported model stays within it


class TorchEngine:
    """Normalises pictures on the device, runs the model in float32, answers with probabilities.

    `device` is a torch device, or "auto": a GPU where there is one. One call is made at once, so that the
    first caller does not wait for start-up and a model that cannot answer does not start.

    Raises:
        EngineError: no such device, or the model gives no `(N, K)` probabilities.
    """

    def __init__(self, loaded: LoadedModel, *, device: str = "auto") -> None:
        facts = loaded.facts
        self.labels = facts.labels
        self.channels = facts.channels
        self.height = facts.height
        self.width = facts.width
        self.model_digest = loaded.digest
        self._gives_logits = facts.output == "logits"
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self._device = torch.device(name)
            self._module = loaded.module.to(self._device).eval()
            self._mean_C11 = torch.tensor(facts.mean, device=self._device).view(-1, 1, 1)
            self._std_C11 = torch.tensor(facts.std, device=self._device).view(-1, 1, 1)
            self.answer(np.full((2, self.channels, self.height, self.width), 128, np.uint8))
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise EngineError(f"the model cannot run on device {name!r}: {reason}") from error

    @torch.inference_mode()
    def answer(self, images_NCHW: UInt8Array) -> Float32Array:
        """Return `probabilities_NK` whose rows sum to 1.

        Raises:
            EngineError: the model's output is not finite, has another shape, or is said to be probabilities
                and is not.
        """
        # torch.tensor copies: a batch fresh from the wire is read-only, which from_numpy does not take.
        images = torch.tensor(images_NCHW, device=self._device).float() / 255
        output_NK = self._module((images - self._mean_C11) / self._std_C11).float()
        if output_NK.shape != (len(images_NCHW), len(self.labels)):
            raise EngineError(
                f"expected answers {(len(images_NCHW), len(self.labels))}, got {tuple(output_NK.shape)}"
            )
        if not torch.isfinite(output_NK).all():
            raise EngineError("expected finite answers, the model gave NaN or infinity")
        if self._gives_logits:
            return _array(output_NK.softmax(dim=1))
        sums_N = output_NK.sum(dim=1)
        if (output_NK < 0).any() or ((sums_N - 1).abs() > _SUM_TOLERANCE).any():
            raise EngineError(
                f"expected probabilities, the model gave a row with sum {sums_N[0]:.3g} and smallest "
                f"{output_NK.min():.3g}; describe it with --output logits"
            )
        return _array(output_NK / sums_N[:, None])


def _array(values_NK: torch.Tensor) -> Float32Array:
    array: Float32Array = values_NK.cpu().numpy()
    return array
