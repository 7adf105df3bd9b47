"""Questions of phase 1: how sure is the teacher of what the generator makes? The paper's information maximisation.

Shape letters: N pictures, C channels, H and W height and width, L latent numbers.

Each question is a batch under a number (its slot), planned, sent, paid for and kept like every other. A phase that
was interrupted trains again from its checkpoint and comes to numbers that are answered: those answers are used.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from edge_agent import pool as pools
from edge_agent.deprivatize import Guide
from edge_agent.egress import CopyGate
from edge_agent.failures import BudgetSpent
from edge_agent.journal import Batch, Journal
from edge_agent.outbox import PoolOutbox
from edge_agent.sources import Source
from edge_agent.teacher import Description, Teacher
from networks.gan import Generator
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire

PHASE = "deprivatize"


class TeachersConfidence(Guide):
    """The teacher's top probability of each picture, asked about once.

    Args:
        teacher: asked for when there is something to ask.
        outbox: makes the outbox of one number, given a source of its pictures.
        make_gate: the gate for what this generator makes; raises CopiesStopped.
    """

    def __init__(
        self,
        journal: Journal,
        description: Description,
        *,
        teacher: Callable[[], Teacher],
        outbox: Callable[[Source, int], PoolOutbox],
        make_gate: Callable[[Generator], CopyGate],
    ) -> None:
        self._journal = journal
        self._description = description
        self._teacher = teacher
        self._outbox = outbox
        self._make_gate = make_gate
        self._gate: CopyGate | None = None
        self._most_pictures: int | None = None  # in one question, as far as the teacher has said

    def begin(self, generator: Generator) -> None:
        self._gate = self._make_gate(generator)

    def confidence(self, number: int, latents_NL: Tensor, images_NCHW: Tensor) -> Tensor:
        assert self._gate is not None, "begin comes first"
        passing_N = self._gate.passing(images_NCHW)
        confidence_N = torch.zeros(len(images_NCHW))  # what may not leave is not asked about, and weighs as without
        kept = self._kept(number)
        if kept is None and passing_N.any():
            self._gate.check()
            dropped = int((~passing_N).sum())

            def source(_slot: int, count: int) -> tuple[Tensor, Tensor, int]:
                return latents_NL[passing_N][:count], images_NCHW[passing_N][:count], dropped

            outbox = self._outbox(source, number)
            if self._most_pictures is not None:
                outbox.limit(self._most_pictures)
            try:
                pools.fill_pool(
                    self._teacher(), self._journal, outbox, self._description, progress=lambda answered: None
                )
            except BudgetSpent:
                # Where nobody else counts, what was sent in vain used up the budget: more of it won't be had here.
                if outbox.given_up_pictures == 0:
                    raise
            self._most_pictures = outbox.batch_pictures
            kept = self._kept(number)
        # What is no answer of this teacher's to those pictures weighs as without.
        if kept is not None and pools.usable(kept, self._description) is not None:
            # By latents, which a resumed run draws to the bit: what the gate let pass may differ by a hair.
            asked_ML = torch.from_numpy(np.frombuffer(kept.latents, "<f4").reshape(kept.picture_count, -1).copy())
            same_NM = (latents_NL[:, None] == asked_ML[None]).all(dim=2)
            found_N = same_NM.any(dim=1)
            confidence_N[found_N] = self._top(kept)[same_NM[found_N].float().argmax(dim=1)]
        return confidence_N

    def _kept(self, number: int) -> Batch | None:
        return self._journal.answered_slot(PHASE, number)

    def _top(self, kept: Batch) -> Tensor:
        """The top probability (N,) of an answer; of an index it is 1."""
        assert kept.answer is not None
        answer = codec.decode_answer(
            wire.Answer.FromString(kept.answer),
            picture_count=kept.picture_count,
            class_count=len(self._description.labels),
        )
        return torch.from_numpy(answer.max(axis=1).copy()) if answer.ndim == 2 else torch.ones(len(answer))
