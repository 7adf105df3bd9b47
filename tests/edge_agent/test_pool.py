"""The pool over a teacher that answers in this process: what is planned, sent, kept, and how budgets end."""

import time

import numpy as np
import pytest
import torch

from edge_agent import pool as pools
from edge_agent.egress import CopiesStopped, CopyGate, EgressDoor, PrivatePictureStopped
from edge_agent.failures import BadInput, BudgetSpent, TeacherAway
from edge_agent.guidance import TeachersConfidence
from edge_agent.journal import Journal
from edge_agent.outbox import PoolOutbox
from edge_agent.packing import Packing
from edge_agent.pixels import quantise, resize
from edge_agent.pool import fill_pool, load_pool, split_pool
from edge_agent.sources import PROBE_PICTURES, probe, synthetic
from edge_agent.teacher import Answered, Description, Refused
from networks.gan import Generator
from protos import codec
from protos.errors import Reason, Refusal
from protos.mekd.v1 import teacher_inference_pb2 as wire
from teacher_service import policy
from teacher_service.terms import Terms

DESCRIPTION = Description(
    model_digest="m", labels=("a", "b", "c"), channels=1, height=8, width=8, max_batch_pictures=64
)
NOTHING_LOCAL = EgressDoor(np.zeros((0, 1, 8, 8), np.uint8))
NO_PICTURES = torch.zeros((0, 1, 8, 8), dtype=torch.uint8)


@pytest.fixture
def journal(tmp_path):
    opened = Journal.open(tmp_path / "journal.db")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(class_count=3, noise_count=5, side=8, channels=1, width=4).eval().requires_grad_(False)


def outbox(
    journal,
    generator,
    *,
    budget=100,
    batch_pictures=16,
    seed=0,
    door=NOTHING_LOCAL,
    description=DESCRIPTION,
    gate=None,
    packing=None,
    warn=lambda line: None,
):
    return PoolOutbox(
        journal,
        synthetic(generator, gate or CopyGate(NO_PICTURES, 0.0), seed=seed),
        door,
        description,
        budget=budget,
        batch_pictures=batch_pictures,
        packing=packing,
        warn=warn,
    )


class Account:
    """A teacher with a balance, in this process; ``held`` pictures come back after so many refusals."""

    def __init__(self, balance: int, *, soft: bool = True, held: int = 0, held_for: int = 0):
        self.balance = balance
        self.soft = soft
        self.held, self.held_for = held, held_for
        self.asked: list[str] = []

    def answers(self, run_id, model_digest, outbox):
        while (batch := outbox.next_batch()) is not None:
            self.asked.append(batch.batch_id)
            if batch.picture_count > self.balance:
                yield Refused(
                    batch,
                    Refusal.of(
                        Reason.BUDGET_EXHAUSTED,
                        requested=batch.picture_count,
                        available=self.balance,
                        held=self.held,
                    ),
                )
                self.held_for -= 1
                if self.held and self.held_for == 0:
                    self.balance, self.held = self.balance + self.held, 0
                continue
            self.balance -= batch.picture_count
            yield Answered(batch, self.result(batch))

    def result(self, batch, **changes) -> wire.BatchResult:
        images_NCHW = codec.decode_images(wire.Batch.FromString(batch.request).images)
        answer = wire.Answer(
            model_digest="m", charged_count=len(images_NCHW), pixel_digest=codec.pixel_digest(images_NCHW)
        )
        if self.soft:
            rows_NK = np.tile(np.float32([0.7, 0.2, 0.1]), (len(images_NCHW), 1))
            answer.probabilities.CopyFrom(codec.encode_probabilities(rows_NK))
        else:
            indices_N = np.arange(len(images_NCHW)) % 3
            answer.class_indices.CopyFrom(codec.encode_class_indices(indices_N, 3))
        for name, value in changes.items():
            setattr(answer, name, value)
        return wire.BatchResult(batch_id=batch.batch_id, answer=answer)


class Windowed(Account):
    """A teacher that is sent several batches before it answers the first, as over a stream."""

    def answers(self, run_id, model_digest, outbox):
        under_way = []
        while True:
            while len(under_way) < 4 and (batch := outbox.next_batch()) is not None:
                self.asked.append(batch.batch_id)
                under_way.append(batch)
            if not under_way:
                return
            self.balance -= under_way[0].picture_count
            yield self.settled(under_way.pop(0))

    def settled(self, batch):
        return Answered(batch, self.result(batch))


def fill(teacher, journal, box):
    fill_pool(teacher, journal, box, DESCRIPTION, progress=lambda answered: None)


def test_budget_is_used_to_the_picture(journal, generator):
    fill(Account(1000), journal, outbox(journal, generator, budget=100))
    assert journal.totals().charged_pictures == 100
    assert [row.picture_count for row in journal.answered("distill")] == [16] * 6 + [4]


def test_batches_are_durable_before_they_are_handed_out(journal, generator):
    batch = outbox(journal, generator).next_batch()
    assert journal.unanswered("distill") == [batch]


def test_a_second_run_plans_what_the_first_would_have(tmp_path, generator):
    def requests(name, stop_after):
        journal = Journal.open(tmp_path / name)
        box = outbox(journal, generator)
        for _ in range(stop_after):
            box.next_batch()
        box = outbox(journal, generator)  # a new process
        while box.next_batch() is not None:
            pass
        pixels = [wire.Batch.FromString(row.request).images.payload for row in journal.unanswered("distill")]
        journal.close()
        return pixels

    assert requests("a", 0) == requests("b", 3)


def test_another_seed_asks_about_other_pictures(tmp_path, generator):
    first, second = (Journal.open(tmp_path / name) for name in "ab")
    a, b = (outbox(journal, generator, seed=seed).next_batch() for seed, journal in enumerate((first, second)))
    assert a.request[40:] != b.request[40:]
    first.close()
    second.close()


def test_what_was_left_unanswered_is_sent_first_byte_for_byte_and_counted_again(journal, generator):
    before = outbox(journal, generator).next_batch()
    after = outbox(journal, generator).next_batch()
    assert after == before
    assert journal.totals().sent_bytes == 2 * len(before.request)


def test_a_raised_budget_plans_the_rest(journal, generator):
    fill(Account(1000), journal, outbox(journal, generator, budget=20))
    fill(Account(1000), journal, outbox(journal, generator, budget=50))
    assert journal.totals().charged_pictures == 50


def test_batch_is_no_larger_than_the_teacher_takes(journal, generator):
    small = Description(**{**DESCRIPTION.__dict__, "max_batch_pictures": 5})
    batch = outbox(journal, generator, description=small).next_batch()
    assert batch.picture_count == 5


def test_local_picture_is_stopped_before_it_is_planned(journal, generator):
    sample = outbox(journal, generator).next_batch()
    images_NCHW = codec.decode_images(wire.Batch.FromString(sample.request).images)
    other = Journal.open(journal._path.with_name("other.db"))
    account = Account(1000)
    with pytest.raises(PrivatePictureStopped):
        fill(account, other, outbox(other, generator, door=EgressDoor(images_NCHW[3:4])))
    assert other.totals().planned_pictures == 0 and not account.asked
    other.close()


def pixels_planned(journal) -> np.ndarray:
    return np.concatenate(
        [codec.decode_images(wire.Batch.FromString(request).images) for request in journal.requests()]
    )


def gate_that_knows(images_NCHW) -> CopyGate:
    """With so many pictures behind it that a few copies do not stop the run."""
    return CopyGate(torch.from_numpy(images_NCHW.copy()), 0.5, seen=2000)


def test_near_copies_are_replaced_from_the_slots_own_stream_and_counted(tmp_path, generator):
    def planned(name, gate, *, stop_after=0):
        journal = Journal.open(tmp_path / name)
        for _ in range(stop_after):
            outbox(journal, generator, budget=48, gate=gate).next_batch()
        box = outbox(journal, generator, budget=48, gate=gate)
        while box.next_batch() is not None:
            pass
        found = pixels_planned(journal), journal.totals().dropped_pictures
        journal.close()
        return found

    free_NCHW, none = planned("free", CopyGate(NO_PICTURES, 0.0))
    known_NCHW = free_NCHW[[3, 20]]  # one of the first batch, one of the second
    gated_NCHW, dropped = planned("gated", gate_that_knows(known_NCHW))
    assert (none, dropped) == (0, 2)
    kept = [i for i in range(48) if i not in (3, 20)]
    assert all(any((gated == free_NCHW[i]).all() for gated in gated_NCHW) for i in kept), "only copies are replaced"
    assert not any((gated == known).all() for gated in gated_NCHW for known in known_NCHW)
    killed_NCHW, dropped_too = planned("killed", gate_that_knows(known_NCHW), stop_after=1)
    assert dropped_too == 2 and np.array_equal(killed_NCHW, gated_NCHW), "a resumed run plans what it would have"
    mirrored_NCHW, dropped_mirrored = planned("mirrored", gate_that_knows(known_NCHW[..., ::-1]))
    assert dropped_mirrored == 2 and np.array_equal(mirrored_NCHW, gated_NCHW)


def test_what_a_refused_batch_showed_the_teacher_stays_known_when_it_is_shrunk(journal, generator):
    box = outbox(journal, generator)
    whole = box.next_batch()
    shown_NCHW = pixels_planned(journal)
    box.shrink(whole, 5)
    assert journal.totals().planned_pictures == 5 and journal.totals().refused_pictures == len(shown_NCHW) - 5
    assert np.array_equal(pixels_planned(journal), shown_NCHW)


def test_drops_of_a_batch_stay_counted_when_it_is_shrunk(journal, generator):
    sample = Journal.open(journal._path.with_name("sample.db"))
    outbox(sample, generator, budget=16).next_batch()
    gate = gate_that_knows(pixels_planned(sample)[:1])
    sample.close()
    box = outbox(journal, generator, gate=gate)
    box.shrink(box.next_batch(), 5)
    assert (journal.totals().planned_pictures, journal.totals().dropped_pictures) == (5, 1)


def test_generator_that_begins_to_copy_later_is_stopped_before_that_batch_is_planned(journal, generator):
    sample = Journal.open(journal._path.with_name("sample.db"))
    box = outbox(sample, generator, budget=100)
    while box.next_batch() is not None:
        pass
    later_NCHW = pixels_planned(sample)[32:]
    sample.close()
    gate = CopyGate(torch.from_numpy(later_NCHW), 0.5, seen=500)
    with pytest.raises(CopiesStopped, match=r"^16 of 548 synthetic pictures"):
        fill(Windowed(1000), journal, outbox(journal, generator, gate=gate))
    totals = journal.totals()
    assert totals.planned_pictures == totals.charged_pictures == 32, "what was under way is answered first"


def test_outbox_that_can_make_nothing_new_still_sends_what_a_killed_process_left(journal, generator):
    box = outbox(journal, generator)
    killed_with = [box.next_batch(), box.next_batch()]
    sample = Journal.open(journal._path.with_name("sample.db"))
    whole = outbox(sample, generator, budget=48)
    while whole.next_batch() is not None:
        pass
    gate = CopyGate(torch.from_numpy(pixels_planned(sample)[32:]), 0.5, seen=500)
    sample.close()
    account = Windowed(1000)
    with pytest.raises(CopiesStopped):
        fill(account, journal, outbox(journal, generator, gate=gate))
    assert account.asked == [batch.batch_id for batch in killed_with]
    assert not journal.unanswered("distill")


def test_probe_is_large_seeded_and_of_no_slots_pictures(journal, generator):
    class Noting(CopyGate):
        def passing(self, images_NCHW):
            self.noted = [*getattr(self, "noted", []), images_NCHW]
            return super().passing(images_NCHW)

    gates = [Noting(NO_PICTURES, 0.0) for _ in range(3)]
    for gate, seed in zip(gates, (0, 0, 1), strict=True):
        probe(generator, gate, seed=seed)
    first, again, other = (torch.cat(gate.noted) for gate in gates)
    assert len(first) == gates[0].seen == PROBE_PICTURES
    assert torch.equal(first, again) and not torch.equal(first, other)
    outbox(journal, generator, budget=16).next_batch()
    sent = {image.tobytes() for image in pixels_planned(journal)}
    assert not sent & {image.numpy().tobytes() for image in first}


def test_account_with_less_than_a_batch_gets_a_smaller_one_under_a_new_id(journal, generator):
    account = Account(20)
    with pytest.raises(BudgetSpent, match="after 20 answers"):
        fill(account, journal, outbox(journal, generator, budget=100))
    assert journal.totals().charged_pictures == 20
    assert len(set(account.asked)) == len(account.asked)


def test_run_goes_on_after_a_grant_and_pays_the_rest_alone(journal, generator):
    with pytest.raises(BudgetSpent):
        fill(Account(20), journal, outbox(journal, generator, budget=100))
    second = Account(1000)
    fill(second, journal, outbox(journal, generator, budget=100))
    assert second.balance == 1000 - 80
    assert journal.totals().charged_pictures == 100


def test_pictures_held_elsewhere_are_waited_for(journal, generator, monkeypatch):
    monkeypatch.setattr(pools, "PAUSE_SECONDS", 0.01)
    account = Account(0, held=100, held_for=3)
    fill(account, journal, outbox(journal, generator, budget=32))
    assert journal.totals().charged_pictures == 32
    assert account.asked[0] == account.asked[1], "waiting keeps the id"


def test_pictures_held_for_ever_are_not_waited_for_longer_than_a_hold_lives(journal, generator, monkeypatch):
    monkeypatch.setattr(pools, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(pools, "HOLD_EXPIRY_SECONDS", 0.1)
    started = time.monotonic()
    with pytest.raises(BudgetSpent):
        fill(Account(0, held=100, held_for=10**9), journal, outbox(journal, generator))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_digest": "other"}, "answered by other"),
        ({"pixel_digest": b"x" * 32}, "other pixels"),
        ({"charged_count": 99}, "expected 16 pictures charged, got 99"),
    ],
)
def test_answer_that_is_not_what_was_expected_is_kept_and_then_refused(journal, generator, changes, said):
    account = Account(1000)
    original = account.result
    account.result = lambda batch: original(batch, **changes)
    with pytest.raises(BadInput, match=said):
        fill(account, journal, outbox(journal, generator))
    assert len(list(journal.answered("distill"))) == 1, "paid for, so kept"


@pytest.mark.parametrize("first", ["a wrong answer", "a refusal for good"])
def test_what_is_under_way_is_kept_before_a_run_stops_and_nothing_more_is_sent(journal, generator, first):
    account = Windowed(1000)
    settled = account.settled

    def wrong_at_first(batch):
        if batch.slot > 0:
            return settled(batch)
        if first == "a wrong answer":
            return Answered(batch, account.result(batch, model_digest="other"))
        return Refused(batch, Refusal.of(Reason.UNIMPLEMENTED, method="this"))

    account.settled = wrong_at_first
    with pytest.raises(BadInput, match="answered by other" if first == "a wrong answer" else "refused a batch"):
        fill(account, journal, outbox(journal, generator))
    assert len(account.asked) == 4
    assert len(list(journal.answered("distill"))) == (4 if first == "a wrong answer" else 3)


def guidance(journal, account, gate=None, budget=100, counts_sent=False):
    def box(source, number):
        return PoolOutbox(
            journal,
            source,
            NOTHING_LOCAL,
            DESCRIPTION,
            budget=budget,
            batch_pictures=16,
            phase="deprivatize",
            counts_sent=counts_sent,
            only_slot=number,
        )

    made = TeachersConfidence(
        journal,
        DESCRIPTION,
        teacher=lambda: account,
        outbox=box,
        make_gate=lambda generator: gate or CopyGate(NO_PICTURES, 0.0),
    )
    made.begin(None)
    return made


def question(seed, count=8):
    rng = torch.Generator().manual_seed(seed)
    images_NCHW = torch.randint(0, 256, (count, 1, 8, 8), generator=rng, dtype=torch.uint8)
    return torch.randn(count, 8, generator=rng), images_NCHW


@pytest.mark.parametrize(("soft", "sure"), [(True, 0.7), (False, 1.0)])
def test_confidence_is_asked_once_for_each_number_and_paid_by_its_own_phase(journal, generator, soft, sure):
    account = Account(1000, soft=soft)
    for _ in range(2):  # the second time as after a kill: trained again from a checkpoint
        guide = guidance(journal, account)
        for number in (0, 1):
            assert guide.confidence(number, *question(number)).tolist() == pytest.approx([sure] * 8)
    assert journal.totals("deprivatize").charged_pictures == 16 == journal.totals().charged_pictures
    assert account.balance == 1000 - 16
    fill(account, journal, outbox(journal, generator, budget=40))
    assert journal.totals("distill").charged_pictures == 24, "one budget for both phases"


def test_confidence_of_a_number_asked_for_but_not_answered_is_sent_again_under_its_id(journal):
    account = Account(1000)
    account.answers = lambda run_id, model_digest, outbox: iter([outbox.next_batch()][:0])
    assert guidance(journal, account).confidence(0, *question(0)).sum() == 0
    [unanswered] = journal.unanswered("deprivatize")
    account = Account(1000)
    assert guidance(journal, account).confidence(0, *question(0)).tolist() == pytest.approx([0.7] * 8)
    assert account.asked == [unanswered.batch_id]


def test_where_the_agent_counts_a_question_given_up_does_not_stop_the_phase(journal):
    unanswered = Account(1000)
    unanswered.answers = lambda run_id, model_digest, outbox: iter([outbox.next_batch()][:0])
    counting = {"budget": 8, "counts_sent": True}
    guidance(journal, unanswered, **counting).confidence(0, *question(0))
    assert journal.totals().sent_pictures == 8, "the budget is used"
    assert guidance(journal, Account(1000), **counting).confidence(0, *question(0)).tolist() == [0.0] * 8


def test_near_copies_are_not_asked_about_and_numbers_without_a_question_are_passed_over(journal):
    account = Account(1000)
    latents_NL, images_NCHW = question(3, count=200)
    guide = guidance(journal, account, gate=CopyGate(images_NCHW[:1], 1.0, seen=1000))  # as after the probe
    assert guide.confidence(0, latents_NL[:1], images_NCHW[:1]).tolist() == [0.0], "nothing left to ask"
    sure_N = guide.confidence(1, latents_NL[:16], images_NCHW[:16])
    assert sure_N.tolist() == pytest.approx([0.0] + [0.7] * 15)
    assert [batch.slot for batch in journal.answered("deprivatize")] == [1]
    # After a kill the gate may judge a hair otherwise: answers stay with the pictures that they are about.
    later = guidance(journal, Account(0), gate=CopyGate(images_NCHW[1:2], 1.0, seen=1000))
    assert later.confidence(1, latents_NL[:16], images_NCHW[:16]).tolist() == sure_N.tolist()
    assert journal.totals().dropped_pictures == 1


def test_pool_pairs_pictures_latents_and_answers(journal, generator):
    fill(Account(1000), journal, outbox(journal, generator, budget=40))
    pool = load_pool(journal, generator, DESCRIPTION, label_smoothing=0.1)
    assert pool.images_NCHW.shape == (40, 1, 8, 8) and pool.images_NCHW.dtype == torch.uint8
    assert torch.equal(quantise(generator(pool.latents_NL)), pool.images_NCHW), "trained on what was sent"
    assert torch.allclose(pool.probabilities_NK, torch.tensor([0.7, 0.2, 0.1]).expand(40, 3))


def test_hard_answers_make_a_pool_of_indices(journal, generator):
    fill(Account(1000, soft=False), journal, outbox(journal, generator, budget=32))
    pool = load_pool(journal, generator, DESCRIPTION, label_smoothing=0.1)
    assert pool.class_indices_N.tolist() == [i % 3 for i in range(16)] * 2
    assert pool.probabilities_NK is None


def test_policy_changed_on_the_way_makes_smoothed_probabilities(journal, generator):
    fill(Account(1000), journal, outbox(journal, generator, budget=16))
    fill(Account(1000, soft=False), journal, outbox(journal, generator, budget=32))
    pool = load_pool(journal, generator, DESCRIPTION, label_smoothing=0.3)
    assert torch.allclose(pool.probabilities_NK[0], torch.tensor([0.7, 0.2, 0.1]))
    assert torch.allclose(pool.probabilities_NK[16], torch.tensor([0.8, 0.1, 0.1]))
    assert pool.is_index_N1[:, 0].tolist() == [False] * 16 + [True] * 16


def test_every_policy_of_a_run_is_kept_with_its_answers_and_told(journal, generator):
    def selling(**terms):
        account = Account(1000)
        original = account.result

        def result(batch, **changes):
            made = original(batch, **changes)
            rows_NK = np.tile(np.float32([0.712, 0.184, 0.104]), (batch.picture_count, 1))
            made.answer.MergeFrom(policy.apply(Terms(**terms), rows_NK))
            return made

        account.result = result
        return account

    sold = [{}, {"top_k": 1}, {"decimals": 1}, {"top_k": 2, "decimals": 2}, {"answers": "hard", "decimals": 2}]
    for index, terms in enumerate([*sold, {}], start=1):
        fill(selling(**terms), journal, outbox(journal, generator, budget=16 * index))
    assert journal.bought() == {
        "soft": 32, "top-1": 16, "soft, 1 decimal": 16, "top-2, 2 decimals": 16, "hard": 16
    }  # fmt: skip
    pool = load_pool(journal, generator, DESCRIPTION, label_smoothing=0.3)
    rows = [
        [0.712, 0.184, 0.104],
        [0.712, 0.144, 0.144],
        [0.7, 0.2, 0.1],
        [0.71, 0.18, 0.11],
        [0.8, 0.1, 0.1],
        [0.712, 0.184, 0.104],
    ]
    assert torch.allclose(pool.probabilities_NK[::16], torch.tensor(rows), atol=1e-6)
    assert pool.epsilon_N1[::16, 0].tolist() == pytest.approx([1e-7, 1e-7, 0.05 / 3, 0.005 / 3, 1e-7, 1e-7])
    train, held_out = split_pool(pool, 16)
    assert torch.equal(torch.cat([train.epsilon_N1, held_out.epsilon_N1]), pool.epsilon_N1)


def test_empty_pool_is_refused(journal, generator):
    with pytest.raises(BadInput, match="the journal has none; raise --budget"):
        load_pool(journal, generator, DESCRIPTION, label_smoothing=0.1)


def test_held_out_pictures_are_the_last_and_in_no_other_part(journal, generator):
    fill(Account(1000), journal, outbox(journal, generator, budget=40))
    pool = load_pool(journal, generator, DESCRIPTION, label_smoothing=0.1)
    train, held_out = split_pool(pool, 7)
    assert (len(train), len(held_out)) == (33, 7)
    assert torch.equal(torch.cat([train.images_NCHW, held_out.images_NCHW]), pool.images_NCHW)
    everything, nothing = split_pool(pool, 0)
    assert (len(everything), len(nothing)) == (40, 0)


def test_teacher_of_another_size_is_sent_resized_pictures_and_trained_on_the_generators_size(journal, generator):
    wide = Description(**{**DESCRIPTION.__dict__, "height": 20, "width": 30})
    batch = outbox(journal, generator, budget=4, description=wide).next_batch()
    sent = wire.Batch.FromString(batch.request).images
    assert (sent.height, sent.width) == (20, 30)
    account = Account(10)
    fill_pool(account, journal, outbox(journal, generator, budget=4, description=wide), wide, progress=lambda n: None)
    pool = load_pool(journal, generator, wide, label_smoothing=0.1)
    assert pool.images_NCHW.shape == (4, 1, 8, 8)


def test_resize_leaves_a_fitting_picture_alone():
    images_NCHW = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert resize(images_NCHW, 8, 8) is images_NCHW
    grey = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    assert (resize(grey, 16, 24) == 77).all()


@pytest.mark.parametrize(
    "changes",
    [{"model_digest": "other"}, {"pixel_digest": b"x" * 32}, {"charged_count": 99}, {"charged_count": 2**40}],
    ids=str,
)
def test_answer_that_stopped_a_run_is_never_trained_on_and_does_not_spoil_the_others(journal, generator, changes):
    account = Account(1000)
    original = account.result
    account.result = lambda batch: original(batch, **changes)
    with pytest.raises(BadInput):
        fill(account, journal, outbox(journal, generator, budget=48))
    with pytest.raises(BadInput, match=r"^expected answers to train on: \d+ pictures were paid for.*raise --budget$"):
        load_pool(journal, generator, DESCRIPTION, label_smoothing=0.1)
    account.result = original
    fill(account, journal, outbox(journal, generator, budget=48))
    pool = load_pool(journal, generator, DESCRIPTION, label_smoothing=0.1)
    assert len(pool) == 32 and pools.left_out(journal, DESCRIPTION) == 16


def test_an_answer_that_is_kept_no_longer_is_paid_for_in_vain_and_the_run_goes_on(journal, generator):
    account = Windowed(1000)
    settled = account.settled
    account.settled = lambda batch: (
        Refused(batch, Refusal.of(Reason.ANSWER_EXPIRED, batch_id=batch.batch_id))
        if batch.slot == 1
        else settled(batch)
    )
    fill(account, journal, outbox(journal, generator, budget=48))
    assert journal.totals().charged_pictures == 48 and journal.bought() == {"soft": 32, "gone": 16}
    assert len(load_pool(journal, generator, DESCRIPTION, label_smoothing=0.1)) == 32
    assert pools.left_out(journal, DESCRIPTION) == 16
    again = Windowed(1000)
    fill(again, journal, outbox(journal, generator, budget=48))
    assert not again.asked


def test_what_another_server_was_paid_for_meanwhile_is_not_cut_but_asked_for_once_more(
    journal, generator, monkeypatch
):
    """Two batches are under way there when the connection is lost; one is answered, the other is given up."""
    monkeypatch.setattr(pools.time, "sleep", lambda seconds: None)
    box = outbox(journal, generator, budget=32)
    first, second = box.next_batch(), box.next_batch()

    class Elsewhere(Windowed):
        def describe(self):
            return Description(**{**DESCRIPTION.__dict__, "max_batch_pictures": 5})

        def settled(self, batch):
            paid_there = batch.batch_id == second.batch_id and self.asked.count(second.batch_id) > 1
            if batch.picture_count <= 5 or paid_there:
                return super().settled(batch)
            field = codec.PICTURE_COUNT_FIELD
            return Refused(
                batch, Refusal.of(Reason.INVALID_IMAGES, field=field, expected="1 to 5", got=batch.picture_count)
            )

    fill(Elsewhere(1000), journal, outbox(journal, generator, budget=32))
    assert journal.charges()[second.batch_id] == 16 and first.batch_id not in journal.charges()
    assert journal.totals().charged_pictures == 32


def test_a_teacher_that_goes_away_does_not_hide_why_the_run_stops(journal, generator):
    account = Windowed(1000)
    account.settled = lambda batch: Answered(batch, account.result(batch, model_digest="other"))

    def away(run_id, model_digest, box):
        yield account.settled(box.next_batch())
        raise TeacherAway("no answer for 600 s")

    account.answers = away
    with pytest.raises(BadInput, match="answered by other"):
        fill(account, journal, outbox(journal, generator))


def test_a_lossy_batch_on_trial_whose_answer_is_gone_makes_room_for_another(journal, generator):
    account = Windowed(1000)
    settled = account.settled
    account.settled = lambda batch: (
        Refused(batch, Refusal.of(Reason.ANSWER_EXPIRED, batch_id=batch.batch_id))
        if batch.slot == 0
        else settled(batch)
    )
    fill(account, journal, jpeg(journal, generator))
    assert journal.totals().charged_pictures == 256 and journal.bought() == {"soft": 192, "gone": 64}


def test_a_limit_that_was_lowered_since_a_batch_was_planned_cuts_it_where_it_was_not_paid_for(
    journal, generator, monkeypatch
):
    waited = []
    monkeypatch.setattr(pools.time, "sleep", waited.append)
    outbox(journal, generator).next_batch()  # of 16, by a process that was killed

    class Narrow(Windowed):
        def describe(self):
            return Description(**{**DESCRIPTION.__dict__, "max_batch_pictures": 5})

        def settled(self, batch):
            if batch.picture_count <= 5:
                return super().settled(batch)
            field = codec.PICTURE_COUNT_FIELD
            return Refused(
                batch, Refusal.of(Reason.INVALID_IMAGES, field=field, expected="1 to 5", got=batch.picture_count)
            )

    account = Narrow(1000)
    fill(account, journal, outbox(journal, generator, budget=40))
    assert journal.totals().charged_pictures == 40
    assert all(row.picture_count <= 5 for row in journal.answered("distill"))
    assert waited == [pools.HOLD_EXPIRY_SECONDS], "once, for a server that may have the first under way"
    assert account.asked.count(account.asked[0]) == 2, "and then asked again, as it may be paid for by then"


def test_guidance_whose_answer_is_kept_no_longer_weighs_as_without(journal, generator):
    account = Windowed(1000)
    account.settled = lambda batch: Refused(batch, Refusal.of(Reason.ANSWER_EXPIRED, batch_id=batch.batch_id))
    latents_NL, images_NCHW = question(0)
    for _ in range(2):
        assert not guidance(journal, account).confidence(0, latents_NL, images_NCHW).any()
    assert len(account.asked) == 1 and journal.totals("deprivatize").charged_pictures == len(images_NCHW)


@pytest.mark.parametrize("changes", [{"model_digest": "other"}, {"charged_count": 99}], ids="".join)
def test_guidance_by_a_wrong_answer_stops_once_and_weighs_as_without_later(journal, generator, changes):
    account = Account(1000)
    original = account.result
    account.result = lambda batch: original(batch, **changes)
    latents_NL, images_NCHW = question(0)
    with pytest.raises(BadInput):
        guidance(journal, account).confidence(0, latents_NL, images_NCHW)
    assert not guidance(journal, account).confidence(0, latents_NL, images_NCHW).any()


def test_bytes_of_a_refused_batch_stay_counted_and_those_of_the_smaller_one_count_once(journal, generator):
    sent: list[int] = []

    class Counting(Account):
        def answers(self, run_id, model_digest, box):
            class Noted:
                def next_batch(self):
                    batch = box.next_batch()
                    sent.extend([] if batch is None else [len(batch.request)])
                    return batch

            return super().answers(run_id, model_digest, Noted())

    with pytest.raises(BudgetSpent):
        fill(Counting(20), journal, outbox(journal, generator, budget=100))
    assert len(sent) > 2
    assert journal.totals().sent_bytes == sum(sent)


def test_waiting_for_held_pictures_begins_with_the_refusal_and_not_with_the_last_answer(
    journal, generator, monkeypatch
):
    """A teacher that takes longer for an answer than a hold lives is no empty account."""
    monkeypatch.setattr(pools, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(pools, "HOLD_EXPIRY_SECONDS", 0.5)

    class Slow(Account):
        def answers(self, run_id, model_digest, outbox):
            time.sleep(0.7)
            yield from super().answers(run_id, model_digest, outbox)

    fill(Slow(0, held=100, held_for=2), journal, outbox(journal, generator, budget=32))
    assert journal.totals().charged_pictures == 32


# --- pictures that travel compressed ---


def jpeg(journal, generator, **given):
    """An outbox of JPEG mosaics, 64 pictures in each: fewer of 8 x 8 would be smaller as they are."""
    packing = Packing("jpeg", 90, codec.ENCODINGS)
    return outbox(journal, generator, **{"batch_pictures": 64, "packing": packing, "budget": 256, **given})


def encodings(journal):
    rows = [*journal.answered("distill"), *journal.unanswered("distill")]
    return [wire.Batch.FromString(row.request).images.encoding for row in rows]


def decoding_otherwise(account):
    """A teacher whose decoder is another build: of lossy pictures every pixel may differ a little."""
    original = account.result

    def result(batch):
        images = wire.Batch.FromString(batch.request).images
        if images.encoding in codec.LOSSLESS:
            return original(batch)
        return original(batch, pixel_digest=codec.pixel_digest(codec.decode_images(images) ^ 1))

    account.result = result
    return account


def test_budget_that_ends_in_the_first_lossy_batch_is_said_to_be_spent(journal, generator):
    """What is left of that batch may be small enough to travel lossless: then there is nothing more to find out."""
    packing = Packing("jpeg", 90, codec.ENCODINGS)
    with pytest.raises(BudgetSpent):
        fill(Account(1), journal, outbox(journal, generator, batch_pictures=64, packing=packing))
    assert journal.totals().charged_pictures == 1
    with pytest.raises(BudgetSpent):
        fill(Account(0), journal, outbox(journal, generator, batch_pictures=64, packing=packing))


def test_student_trains_on_what_was_decoded(journal, generator):
    fill(Account(1000), journal, jpeg(journal, generator))
    assert set(encodings(journal)) == {wire.IMAGE_ENCODING_JPEG_MOSAIC}
    pool = load_pool(journal, generator, DESCRIPTION, label_smoothing=0.1)
    requests = [wire.Batch.FromString(row.request).images for row in journal.answered("distill")]
    decoded_NCHW = np.concatenate([codec.decode_images(images) for images in requests])
    assert np.array_equal(pool.images_NCHW.numpy(), decoded_NCHW)
    generated_NCHW = quantise(generator(pool.latents_NL))
    difference = (pool.images_NCHW.int() - generated_NCHW.int()).abs().float().mean()
    assert 0 < difference < 16, "close to what was generated, and not the same"
    assert pools.left_out(journal, DESCRIPTION) == 0


def test_copy_of_a_local_picture_is_stopped_though_the_codec_would_hide_it(journal, generator):
    sample = outbox(journal, generator, batch_pictures=64).next_batch()
    generated_NCHW = codec.decode_images(wire.Batch.FromString(sample.request).images)
    other = Journal.open(journal._path.with_name("other.db"))
    copying = jpeg(other, generator, door=EgressDoor(generated_NCHW[3:4]))
    assert copying.next_batch() is None and isinstance(copying.failure, PrivatePictureStopped)
    packed = jpeg(other, generator).next_batch()
    decoded_NCHW = codec.decode_images(wire.Batch.FromString(packed.request).images)
    other.close()
    with pytest.raises(PrivatePictureStopped):
        EgressDoor(decoded_NCHW[5:6]).check(wire.Batch.FromString(packed.request))


def test_of_the_first_lossy_batch_nothing_further_is_sent_before_its_answer(journal, generator):
    account, box = Account(1000), jpeg(journal, generator)
    first = box.next_batch()
    assert box.next_batch() is None and box.next_batch() is None
    assert pools.keep(journal, Answered(first, account.result(first)), DESCRIPTION)
    box.compared(first, alike=True)
    assert box.next_batch() is not None and box.next_batch() is not None


def test_teacher_that_decodes_otherwise_gets_lossless_pictures_from_then_on_and_it_is_told_once(journal, generator):
    said = []
    fill(decoding_otherwise(Account(1000)), journal, jpeg(journal, generator, warn=said.append))
    first, *others = encodings(journal)
    assert first == wire.IMAGE_ENCODING_JPEG_MOSAIC and len(others) == 3 and set(others) <= set(codec.LOSSLESS)
    assert len(said) == 1 and "other pixels" in said[0]
    assert journal.totals().charged_pictures == 256, "paid for, and kept"
    pool = load_pool(journal, generator, DESCRIPTION, label_smoothing=0.1)
    assert len(pool) == 192 and pools.left_out(journal, DESCRIPTION) == 64
    assert torch.equal(quantise(generator(pool.latents_NL)), pool.images_NCHW)


def test_a_run_that_went_lossless_stays_so_when_it_is_started_again(journal, generator):
    fill(decoding_otherwise(Account(1000)), journal, jpeg(journal, generator, budget=128))
    said = []
    fill(Account(1000), journal, jpeg(journal, generator, warn=said.append))
    assert sum(encoding not in codec.LOSSLESS for encoding in encodings(journal)) == 1 and said == []


def test_other_pixels_of_a_lossless_batch_are_an_error_still(journal, generator):
    account = Account(1000)
    original = account.result
    account.result = lambda batch: original(batch, pixel_digest=b"x" * 32)
    box = outbox(journal, generator, batch_pictures=64, packing=Packing("png", 90, codec.ENCODINGS))
    with pytest.raises(BadInput, match="other pixels"):
        fill(account, journal, box)


def test_lossy_batch_is_sent_again_byte_for_byte_whatever_the_settings_are_now(journal, generator):
    before = jpeg(journal, generator).next_batch()
    after = outbox(journal, generator, packing=Packing("webp", 50, codec.ENCODINGS)).next_batch()
    assert after == before


def test_smaller_batch_of_a_mosaic_has_the_first_of_its_pictures(journal, generator):
    box = jpeg(journal, generator)
    whole = box.next_batch()
    box.shrink(whole, 40)
    smaller = box.next_batch()
    images = wire.Batch.FromString(smaller.request).images
    assert (smaller.picture_count, smaller.latents) == (40, whole.latents[: len(whole.latents) // 64 * 40])
    assert images.encoding == wire.IMAGE_ENCODING_JPEG_MOSAIC and smaller.batch_id != whole.batch_id
    first_NCHW = codec.decode_images(wire.Batch.FromString(whole.request).images)[:40]
    assert np.abs(codec.decode_images(images).astype(int) - first_NCHW).mean() < 2
    assert box.next_batch() is None, "it is the first lossy one now"


def test_account_that_holds_less_than_the_first_lossy_batch_is_still_used_up(journal, generator):
    account = Account(50)
    with pytest.raises(BudgetSpent, match="after 50 answers"):
        fill(account, journal, jpeg(journal, generator))
