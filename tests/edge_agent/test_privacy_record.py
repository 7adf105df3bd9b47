"""What a run knows of its own privacy, on a real journal: remembered, and never of less than was sent."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from edge_agent import privacy
from edge_agent.config import DeprivatizeConfig
from edge_agent.console import Console
from edge_agent.egress import CopiesStopped
from edge_agent.journal import Batch, Journal
from edge_agent.privacy_record import PrivacyRecord, attackers_parts
from edge_agent.runs import digest_of
from networks.autoencoder import latent_side
from networks.gan import Generator
from networks.mixes import deal, mosaic, noisy
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


def plan(journal: Journal, slot: int, *, count: int = 4, phase: str = "distill", dropped: int = 0) -> None:
    images_NCHW = np.random.default_rng(slot).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    plan_pictures(journal, slot, images_NCHW, phase=phase, dropped=dropped)


def plan_pictures(
    journal: Journal,
    slot: int,
    images_NCHW: npt.NDArray[np.uint8],
    *,
    phase: str = "distill",
    dropped: int = 0,
) -> None:
    count = len(images_NCHW)
    batch_id = f"batch {slot}" if phase == "distill" else f"batch {slot} of {phase}"
    request = wire.Batch(batch_id=batch_id, images=codec.encode_images(images_NCHW)).SerializeToString()
    latents = np.zeros((count, 5), "<f4").tobytes()
    batch = Batch(slot=slot, batch_id=batch_id, picture_count=count, request=request, latents=latents)
    journal.plan(phase, batch, dropped_pictures=dropped)


def generator() -> Generator:
    return Generator(class_count=2, noise_count=3, side=8, channels=1, width=4).eval()


def test_the_strongest_attack_is_told_and_figures_of_fewer_attacks_are_none(journal, split):
    record = PrivacyRecord(journal, lambda: split)
    plan(journal, 0)
    record.attack(side_parts=(2,), console=QUIET)
    told = record.figures()
    assert set(told["membership_attacks"]) == set(privacy.ATTACKS)
    assert told["membership_auc"] == max(attack["auc"] for attack in told["membership_attacks"].values())
    # A former version's figures, kept beside the digest of the ids alone.
    now = journal.fact("privacy.membership")
    former = {name: now["attacks"][name] for name in ("nearest", "mean_of_nearest")}
    former_inputs = digest_of({"sent": ["batch 0"]})
    journal.set_facts(**{"privacy.membership": {"inputs": former_inputs, "attacks": former}})
    assert record.figures()["membership_auc"] is None
    record.attack(side_parts=(2,), console=QUIET)
    assert journal.fact("privacy.membership") == now
    assert record.figures() == told


def test_figures_of_less_than_was_sent_are_none_until_the_attack_is_run_again(journal, split):
    record = PrivacyRecord(journal, lambda: split)
    plan(journal, 0)
    record.attack(side_parts=(2,), console=QUIET)
    plan(journal, 1)
    assert record.figures()["membership_auc"] is None
    record.attack(side_parts=(2,), console=QUIET)
    assert record.figures()["membership_auc"] is not None


def test_an_attack_on_the_same_pictures_is_run_once_and_told_without_them(journal, split):
    plan(journal, 0)
    PrivacyRecord(journal, lambda: split).attack(side_parts=(2,), console=QUIET)
    later = PrivacyRecord(journal, lambda: pytest.fail("the local pictures were compared again"))
    later.attack(side_parts=(2,), console=QUIET)
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


@pytest.mark.parametrize(
    ("kind", "regions", "side", "side_parts"),
    [
        ("gan", 8, 32, (2,)),
        ("mixes", 2, 32, (2,)),
        ("mixes", 4, 32, (4,)),
        ("mixes", 5, 32, (4, 8)),
        ("mixes", 8, 64, (4, 8)),
        ("mixes", 5, 60, (4, 15)),
    ],
)
def test_the_attack_cuts_as_finely_as_pictures_are_mixed(kind, regions, side, side_parts):
    assert attackers_parts(DeprivatizeConfig(generator=kind, mix_regions=regions), side=side) == side_parts


@pytest.mark.parametrize("side", range(8, 129, 4))
def test_the_attacks_parts_divide_every_side(side):
    config = DeprivatizeConfig(generator="mixes", mix_regions=max(2, latent_side(side)))
    assert all(side % parts == 0 for parts in attackers_parts(config, side=side))


def test_mixes_of_small_regions_are_told_by_the_finest_parts(journal):
    """Every part of what was sent is of a member, a little changed: 8 x 8 regions of 4 x 4 pixels."""
    rng = torch.Generator().manual_seed(0)
    local_NCHW = torch.randint(256, (200, 1, 8, 8), generator=rng).float()
    local_NCHW = F.interpolate(local_NCHW, size=(32, 32), mode="bilinear").to(torch.uint8)
    dealt_NR = deal(400, pictures=16, regions=8, rng=rng)
    plan_NR = torch.randint(100, (400, 16), generator=rng).gather(1, dealt_NR)
    sent_NCHW = noisy(mosaic(plan_NR, local_NCHW[:100]).float(), noise=12.0, rng=rng)
    plan_pictures(journal, 0, sent_NCHW.clamp(0, 255).to(torch.uint8).numpy())
    record = PrivacyRecord(journal, lambda: (local_NCHW[:100], local_NCHW[100:]))
    parts = attackers_parts(DeprivatizeConfig(generator="mixes", mix_regions=8, mix_pictures=16), side=32)
    record.attack(side_parts=parts, console=QUIET)
    told = record.figures()
    assert told["membership_auc"] > 0.9, told
    assert told["membership_auc"] == max(attack["auc"] for attack in told["membership_attacks"].values())


def test_figures_by_other_parts_are_not_taken_for_these(journal, split):
    record = PrivacyRecord(journal, lambda: split)
    plan(journal, 0)
    record.attack(side_parts=(2,), console=QUIET)
    record.attack(side_parts=(2, 4), console=QUIET)
    assert "mean_of_finest_parts" in record.figures()["membership_attacks"]
    # As a former version kept them, which did not say by which parts.
    inputs = digest_of({"sent": ["batch 0"], "attacks": privacy.ATTACKS})
    attacks = journal.fact("privacy.membership")["attacks"]
    journal.set_facts(**{"privacy.membership": {"inputs": inputs, "attacks": attacks}})
    assert "mean_of_finest_parts" in record.figures()["membership_attacks"]  # quarters were all that it knew
    record.attack(side_parts=(4, 8), console=QUIET)
    assert journal.fact("privacy.membership")["side_parts"] == [4, 8]


def probe_that_drops(count):
    def probe(_, gate, seed):
        gate.seen, gate.dropped = 2000, count

    return probe


def test_what_phase_1_asked_with_another_generator_hides_no_copies(journal, split, monkeypatch):
    monkeypatch.setattr("edge_agent.sources.probe", probe_that_drops(0))
    record = PrivacyRecord(journal, lambda: split)
    record.gate(generator(), inputs="under way", seed=7)
    plan(journal, 0, count=20_000, phase="deprivatize")
    monkeypatch.setattr("edge_agent.sources.probe", probe_that_drops(102))
    for _ in range(2):
        with pytest.raises(CopiesStopped, match=r"^102 of 2000 synthetic pictures"):
            record.gate(generator(), inputs="finished", seed=7)
    # The summary is of the whole run.
    assert record.figures()["dropped"] == 102
    assert record.figures()["dropped_share"] == 102 / 22_000


def test_copies_of_an_earlier_generator_stop_no_honest_one(journal, split, monkeypatch):
    monkeypatch.setattr("edge_agent.sources.probe", probe_that_drops(0))
    plan(journal, 0, count=900, phase="deprivatize", dropped=100)
    gate = PrivacyRecord(journal, lambda: split).gate(generator(), inputs="finished", seed=7)
    assert (gate.seen, gate.dropped) == (2000, 0)
    plan(journal, 0, count=90, dropped=10)
    again = PrivacyRecord(journal, lambda: split).gate(generator(), inputs="finished", seed=7)
    assert (again.seen, again.dropped) == (2100, 10)
    figures = PrivacyRecord(journal, lambda: split).figures()
    assert (figures["dropped"], figures["dropped_share"]) == (110, 110 / 3100)


def test_a_gate_of_a_former_version_goes_on_with_all_of_the_run(journal, split, monkeypatch):
    monkeypatch.setattr("edge_agent.sources.probe", probe_that_drops(3))
    record = PrivacyRecord(journal, lambda: split)
    plan(journal, 0, count=900, phase="deprivatize", dropped=10)
    record.gate(generator(), inputs="a", seed=7)
    former = {name: value for name, value in journal.fact("privacy.gate").items() if name != "before"}
    journal.set_facts(**{"privacy.gate": former})
    gate = record.gate(generator(), inputs="a", seed=7)
    assert (gate.seen, gate.dropped) == (2910, 13)
