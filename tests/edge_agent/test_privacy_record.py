"""What a run knows of its own privacy, on a real journal: remembered, and never of less than was sent."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_agent import privacy
from edge_agent.config import DeprivatizeConfig
from edge_agent.console import Console
from edge_agent.egress import CopiesStopped
from edge_agent.journal import Batch, Journal
from edge_agent.privacy_record import PrivacyRecord, attackers_parts
from edge_agent.runs import digest_of
from networks.gan import Generator
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire

QUIET = Console(quiet=True)


@pytest.fixture
def journal(tmp_path: Path):
    opened = Journal.open(tmp_path / "journal.db")
    yield opened
    opened.close()


@pytest.fixture
def split() -> tuple[torch.Tensor, torch.Tensor]:
    pictures_NCHW = torch.randint(256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return pictures_NCHW[:54], pictures_NCHW[54:]


def plan(journal: Journal, slot: int, *, count: int = 4) -> None:
    images_NCHW = np.random.default_rng(slot).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    batch_id = f"batch {slot}"
    request = wire.Batch(batch_id=batch_id, images=codec.encode_images(images_NCHW)).SerializeToString()
    latents = np.zeros((count, 5), "<f4").tobytes()
    batch = Batch(slot=slot, batch_id=batch_id, picture_count=count, request=request, latents=latents)
    journal.plan("distill", batch)


def generator() -> Generator:
    return Generator(class_count=2, noise_count=3, side=8, channels=1, width=4).eval()


def test_the_strongest_attack_is_told_and_figures_of_fewer_attacks_are_none(journal, split):
    record = PrivacyRecord(journal, lambda: split)
    plan(journal, 0)
    record.attack(side_parts=2, console=QUIET)
    told = record.figures()
    assert set(told["membership_attacks"]) == set(privacy.ATTACKS)
    assert told["membership_auc"] == max(attack["auc"] for attack in told["membership_attacks"].values())
    # A former version's figures, kept beside the digest of the ids alone.
    now = journal.fact("privacy.membership")
    former = {name: now["attacks"][name] for name in ("nearest", "mean_of_nearest")}
    former_inputs = digest_of({"sent": ["batch 0"]})
    journal.set_facts(**{"privacy.membership": {"inputs": former_inputs, "attacks": former}})
    assert record.figures()["membership_auc"] is None
    record.attack(side_parts=2, console=QUIET)
    assert journal.fact("privacy.membership") == now
    assert record.figures() == told


def test_figures_of_less_than_was_sent_are_none_until_the_attack_is_run_again(journal, split):
    record = PrivacyRecord(journal, lambda: split)
    plan(journal, 0)
    record.attack(side_parts=2, console=QUIET)
    plan(journal, 1)
    assert record.figures()["membership_auc"] is None
    record.attack(side_parts=2, console=QUIET)
    assert record.figures()["membership_auc"] is not None


def test_an_attack_on_the_same_pictures_is_run_once_and_told_without_them(journal, split):
    plan(journal, 0)
    PrivacyRecord(journal, lambda: split).attack(side_parts=2, console=QUIET)
    later = PrivacyRecord(journal, lambda: pytest.fail("the local pictures were compared again"))
    later.attack(side_parts=2, console=QUIET)
    assert later.figures()["membership_auc"] is not None


def test_the_gate_goes_on_with_its_threshold_and_counts_and_probes_once_a_generator(journal, split, monkeypatch):
    probes = []

    def finds_none(_, gate, seed):  # the real one would: noise is nearer to a grey picture than to other noise
        probes.append(seed)
        gate.seen = 100

    monkeypatch.setattr("edge_agent.sources.probe", finds_none)
    first = PrivacyRecord(journal, lambda: split).gate(generator(), inputs="a", seed=7)
    plan(journal, 0, count=6)
    again = PrivacyRecord(journal, lambda: split).gate(generator(), inputs="a", seed=7)
    assert (first.threshold, first.seen, first.dropped) == (again.threshold, 100, 0)
    assert (again.seen, again.dropped) == (106, 0)
    assert probes == [7]
    PrivacyRecord(journal, lambda: split).gate(generator(), inputs="b", seed=7)
    assert probes == [7, 7]
    assert PrivacyRecord(journal, lambda: split).figures()["dropped_share"] == 0


def test_a_probe_that_found_copies_stops_every_later_process_too(journal, split, monkeypatch):
    def finds_copies(_, gate, seed):
        gate.seen, gate.dropped = 100, 2

    monkeypatch.setattr("edge_agent.sources.probe", finds_copies)
    for _ in range(2):
        with pytest.raises(CopiesStopped, match=r"^2 of 100 synthetic pictures"):
            PrivacyRecord(journal, lambda: split).gate(generator(), inputs="a", seed=7)
        monkeypatch.setattr("edge_agent.sources.probe", lambda *_, **__: pytest.fail("probed again"))


def test_what_is_not_known_is_none_and_asks_for_no_pictures(journal):
    figures = PrivacyRecord(journal, lambda: pytest.fail("the local pictures were read")).figures()
    assert set(figures.values()) == {None}


@pytest.mark.parametrize(("kind", "regions", "side_parts"), [("gan", 4, 2), ("mixes", 2, 2), ("mixes", 4, 4)])
def test_the_attack_cuts_as_finely_as_pictures_are_mixed(kind, regions, side_parts):
    assert attackers_parts(DeprivatizeConfig(generator=kind, mix_regions=regions)) == side_parts
