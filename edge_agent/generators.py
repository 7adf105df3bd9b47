"""What phase 1 hands to phase 2: something that makes pictures, and the file that it is kept in.

Shape letters: N pictures, C channels, H and W height and width, L latent numbers.

There are three kinds: the generator of a GAN, a diffusion model, and mixes of an autoencoder's latents. Who asks the
teacher need not know which: it draws pictures, and reads `side` and `latent_count`.
"""

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from networks.diffusion import Diffusion
from networks.gan import Generator
from networks.mixes import Mixes


class PictureGenerator(Protocol):
    """Makes synthetic pictures. Every `AnyGenerator` does."""

    side: int
    """Height and width of the pictures."""
    latent_count: int
    """Numbers that say what each picture was made of: those of a GAN make it anew, those of mixes are its plan,
    diffusion has none."""

    def sample(self, count: int, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents (N, L) on the CPU, and their pictures (N, C, H, W) in [-1, 1]; all chance is from `rng`."""
        ...


AnyGenerator: TypeAlias = Generator | Diffusion | Mixes
_KINDS: dict[str, type[AnyGenerator]] = {
    "gan": Generator,
    "diffusion": Diffusion,
    "mixes": Mixes,
}


def to_content(generator: AnyGenerator) -> dict[str, Any]:
    """What ``generator.pt`` holds: tensors, numbers and text. Of mixes that is the local pictures' latents, too."""
    content = {"arguments": generator.arguments, "state_dict": generator.state_dict()}
    kind = next(name for name, made in _KINDS.items() if isinstance(generator, made))
    return content if kind == "gan" else content | {"kind": kind}  # a GAN's is what it was when there was no other


def from_content(content: dict[str, Any]) -> AnyGenerator:
    """The generator of such a content, in eval mode on the CPU, its gradients off."""
    generator = _KINDS[content.get("kind", "gan")](**content["arguments"])
    generator.load_state_dict(content["state_dict"])
    return generator.eval().requires_grad_(False)
