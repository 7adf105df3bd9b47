"""What a run knows of its own privacy: the gate before what it sends and the attacks on what it sent.

Both are kept in the journal, so that every process of a run goes on with the same threshold and counts, and the
summary of one that only trains still has the figures. The maths is in ``privacy``, the gate itself in ``egress``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from edge_agent import privacy, sources
from edge_agent.config import DeprivatizeConfig
from edge_agent.console import Console
from edge_agent.egress import CopyGate
from edge_agent.generators import PictureGenerator
from edge_agent.journal import Journal
from edge_agent.pixels import resize
from edge_agent.runs import digest_of
from networks.autoencoder import latent_side
from protos import codec
from protos.mekd.v1.teacher_inference_pb2 import Batch

SENT_BLOCK_PICTURES = 2048
_GATE, _MEMBERSHIP = "privacy.gate", "privacy.membership"


class PrivacyRecord:
    """The one owner of the journal's facts about privacy.

    Args:
        journal: of the run.
        split: gives the local pictures that train the generator and the reference that it never sees, both uint8 at
            the generator's size; asked only by what compares pictures.
    """

    def __init__(self, journal: Journal, split: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._journal = journal
        self._split = split

    def gate(self, generator: PictureGenerator, *, inputs: str, seed: int) -> CopyGate:
        """The gate before the door, with all seen of this generator; its probe is drawn once for the same `inputs`.

        What others made for phase 1 says nothing of this one: 20,000 honest pictures would hide a probe of copies.
        Raises CopiesStopped, first of all for a failed probe.
        """
        training_NCHW, reference_NCHW = self._split()
        known = self._journal.fact(_GATE)
        if known is None or known["inputs"] != inputs:
            strangers_N = privacy.nearest(reference_NCHW, [training_NCHW])[:, 0]
            gate = CopyGate(training_NCHW, privacy.threshold(strangers_N))
            sources.probe(generator, gate, seed=seed)
            totals = self._journal.totals()
            known = {
                "inputs": inputs,
                "reference_pictures": len(reference_NCHW),
                "threshold": gate.threshold,
                "probed": gate.seen,
                "dropped": gate.dropped,
                "before": {"shown": totals.shown_pictures, "dropped": totals.dropped_pictures},
            }
            self._journal.set_facts(**{_GATE: known})
        # A former version kept no totals: all of the run counts, as it did then.
        before = known.get("before", {"shown": 0, "dropped": 0})
        seen, dropped = self._counts(known)
        seen, dropped = seen - before["shown"] - before["dropped"], dropped - before["dropped"]
        gate = CopyGate(training_NCHW, known["threshold"], seen=seen, dropped=dropped)
        gate.check()
        return gate

    def attack(self, *, side_parts: tuple[int, ...], console: Console) -> None:
        """The membership attacks on everything sent so far, remembered until more is sent, or there are others.

        `side_parts`: as of ``attackers_parts``.
        """
        known = self._journal.fact(_MEMBERSHIP)
        inputs = self._attacked(side_parts)
        if known is not None and known["inputs"] == inputs:
            return
        training_NCHW, reference_NCHW = self._split()
        sent_pictures = self._journal.totals().shown_pictures
        local_NCHW = torch.cat([training_NCHW, reference_NCHW])
        near = [self._near_sent(local_NCHW, sent_pictures, parts, console) for parts in side_parts]
        near_NK = near[0][0]  # of whole pictures, the same however they are cut
        found = privacy.membership(near_NK, *(near_NP for _, near_NP in near), member_count=len(training_NCHW))
        strongest = max(found.values(), key=lambda attack: attack.auc)
        console.say(
            f"membership attack on {sent_pictures} sent pictures: AUC {strongest.auc:.3f} "
            f"({strongest.low:.3f} to {strongest.high:.3f}); 0.5 is a coin"
            + (f", and {len(reference_NCHW)} reference pictures tell little" if len(reference_NCHW) <= 20 else "")
        )
        figures = {name: asdict(attack) for name, attack in found.items()}
        self._journal.set_facts(**{_MEMBERSHIP: {"inputs": inputs, "side_parts": side_parts, "attacks": figures}})

    def figures(self) -> dict[str, Any]:
        """What the gate dropped, and the strongest attack on what was sent; None: not known.

        Dropped of all that was made to be sent, by whichever generator, and of the latest one's probe.
        """
        gate, membership = self._journal.fact(_GATE), self._journal.fact(_MEMBERSHIP)
        found: dict[str, Any] = dict.fromkeys(
            (
                *("reference_pictures", "threshold", "dropped", "dropped_share"),
                *("membership_auc", "membership_auc_low", "membership_auc_high", "membership_attacks"),
            )
        )
        if gate is not None:
            seen, dropped = self._counts(gate)
            found |= {name: gate[name] for name in ("reference_pictures", "threshold")}
            found |= {"dropped": dropped, "dropped_share": dropped / seen}
        if membership is not None and membership["inputs"] == self._attacked(membership.get("side_parts", ())):
            attacks = membership["attacks"]
            strongest = max(attacks.values(), key=lambda attack: attack["auc"])
            found |= {
                "membership_auc": strongest["auc"],
                "membership_auc_low": strongest["low"],
                "membership_auc_high": strongest["high"],
                "membership_attacks": attacks,
            }
        return found

    def _counts(self, gate: dict[str, Any]) -> tuple[int, int]:
        """Pictures looked at in this run, of probes in the latest one alone, and how many of them were dropped."""
        totals = self._journal.totals()
        dropped = gate["dropped"] + totals.dropped_pictures
        return gate["probed"] + totals.shown_pictures + totals.dropped_pictures, dropped

    def _attacked(self, side_parts: Sequence[int]) -> str:
        """Of the ids of all that was ever planned to be sent, and of the attacks: fewer or coarser understate."""
        found: dict[str, Any] = {"sent": sorted(self._journal.sent_ids()), "attacks": privacy.ATTACKS}
        # A former version attacked by quarters, too, and did not say so.
        return digest_of(found if tuple(side_parts) in ((), (2,)) else found | {"side_parts": list(side_parts)})

    def _near_sent(
        self, local_NCHW: Tensor, sent_pictures: int, side_parts: int, console: Console
    ) -> tuple[Tensor, Tensor]:
        """``privacy.nearest_by_parts`` of what was sent, with a bar."""
        with console.bar(f"distill: membership attack, {side_parts} x {side_parts} parts", "pictures") as tell:
            return privacy.nearest_by_parts(
                local_NCHW,
                self._sent_blocks(local_NCHW.shape[-1], lambda done: tell(done, sent_pictures)),
                count=min(privacy.NEIGHBOURS, sent_pictures),
                side_parts=side_parts,
            )

    def _sent_blocks(self, side: int, tell: Callable[[int], None]) -> Iterator[Tensor]:
        """All pictures ever planned to be sent, at the generator's size, in blocks worth a multiplication."""
        block: list[Tensor] = []
        done = 0
        for request in self._journal.requests():
            sent_NCHW = torch.from_numpy(codec.decode_images(Batch.FromString(request).images).copy())
            block.append(resize(sent_NCHW, side, side))
            done += len(sent_NCHW)
            if sum(map(len, block)) >= SENT_BLOCK_PICTURES:
                yield torch.cat(block)
                block.clear()
                tell(done)
        if block:
            yield torch.cat(block)
        tell(done)


def attackers_parts(config: DeprivatizeConfig, *, side: int) -> tuple[int, ...]:
    """Parts along each side, for each time that the attack cuts: an attacker cuts as finely as pictures were mixed.

    Quarters, or 4 x 4 cells: these say more than finer ones where regions are as large. Smaller regions hide from
    them, so there the attack also cuts into the places of a latent, which no region divides. Each of these divides
    `side`, that of the generator's pictures.
    """
    if config.generator != "mixes" or config.mix_regions <= 2:
        return (2,)
    return (4,) if config.mix_regions <= 4 else (4, latent_side(side))
