"""Where the pictures of a batch come from: the generator, past the gate, each slot by a random stream of its own.

Shape letters: N pictures, C channels, H and W height and width, L latent numbers.

A slot's stream goes on for the pictures that replace dropped ones, so a resumed run plans what it would have, on the
same kind of device to the bit.
"""

import contextlib
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from edge_agent.egress import CopyGate
from edge_agent.generators import PictureGenerator
from edge_agent.pixels import quantise
from edge_agent.precision import training_precision
from networks.diffusion import Diffusion

PROBE_PICTURES = 2000
"""Looked at before the first sending. At a share of 1 % that is dropped, give or take 0.2 % (standard error)."""
_PROBE_BATCH = 200

Source = Callable[[int, int], tuple[Tensor, Tensor, int]]
"""Slot, most pictures -> latents (N, L), pictures (N, C, H, W) uint8 that may be sent, how many were dropped."""


def synthetic(generator: PictureGenerator, gate: CopyGate, *, seed: int) -> Source:
    """A source of the generator's pictures; near copies are dropped by the gate and replaced."""

    def make(slot: int, count: int) -> tuple[Tensor, Tensor, int]:
        # The generator's randomness for a slot hangs on the run's seed and the slot alone.
        rng = _stream(f"pool/{seed}/{slot}")
        latents: list[Tensor] = []
        pictures: list[Tensor] = []
        missing, made = count, 0
        while missing > 0:
            drawn_NL, drawn_NCHW = _draw(generator, missing, rng)
            passing_N = gate.passing(drawn_NCHW)
            gate.check()  # before anything of this batch is planned; a loop without end ends here too
            latents.append(drawn_NL[passing_N])
            pictures.append(drawn_NCHW[passing_N])
            made += missing
            missing -= int(passing_N.sum())
        return torch.cat(latents), torch.cat(pictures), made - count

    return make


def probe(generator: PictureGenerator, gate: CopyGate, *, seed: int) -> None:
    """Shows the gate PROBE_PICTURES pictures that are never sent; they have a random stream of their own."""
    rng = _stream(f"probe/{seed}")
    for _ in range(PROBE_PICTURES // _PROBE_BATCH):
        gate.passing(_draw(generator, _PROBE_BATCH, rng)[1])


def _stream(name: str) -> torch.Generator:
    key = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def _draw(generator: PictureGenerator, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents (N, L) and their pictures (N, C, H, W) uint8, both on the CPU."""
    with torch.inference_mode(), _precision(generator):
        latents_NL, images_NCHW = generator.sample(count, rng=rng)
        return latents_NL, quantise(images_NCHW).cpu()


def _precision(generator: PictureGenerator) -> contextlib.AbstractContextManager[object]:
    """So many passes as diffusion takes are worth less precision: each corrects what the one before was wrong by."""
    if not isinstance(generator, Diffusion):
        return contextlib.nullcontext()
    return training_precision(next(generator.parameters()).device)
