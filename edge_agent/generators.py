"""What phase 1 hands to phase 2: something that makes pictures, and the file that it is kept in.

Shape letters: N pictures, C channels, H and W height and width, L latent numbers.

There are two kinds: the generator of a GAN, and mixes of an autoencoder's latents. Who asks the teacher need not know
which: it draws pictures, and reads `side` and `latent_count`.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from networks.gan import Generator
from networks.mixes import Mixes


class PictureGenerator(Protocol):
    """Makes synthetic pictures. Both networks do: `networks.gan.Generator` and `networks.mixes.Mixes`."""

    side: int
    """Height and width of the pictures."""
    latent_count: int
    """Numbers that say what each picture was made of: those of a GAN make it anew, those of mixes are its plan."""

    def sample(self, count: int, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents (N, L) on the CPU, and their pictures (N, C, H, W) in [-1, 1]; all chance is from `rng`."""
        ...


def to_content(generator: Generator | Mixes) -> dict[str, Any]:
    """What ``generator.pt`` holds: tensors, numbers and text. Of mixes that is the local pictures' latents, too."""
    content = {"arguments": generator.arguments, "state_dict": generator.state_dict()}
    return content | {"kind": "mixes"} if isinstance(generator, Mixes) else content


def from_content(content: dict[str, Any]) -> Generator | Mixes:
    """The generator of such a content, in eval mode on the CPU, its gradients off."""
    make: type[Generator] | type[Mixes] = Mixes if content.get("kind") == "mixes" else Generator
    generator = make(**content["arguments"])
    generator.load_state_dict(content["state_dict"])
    return generator.eval().requires_grad_(False)
