"""The pool: synthetic pictures, asked about once, and the answers that were paid for.

Shape letters: N pictures, C channels, H and W height and width, K classes, L latent numbers.

A picture is quantised, measured and hashed against the local ones before it is planned, planned before it is sent,
and asked about once. Each slot's latents come from a random stream of its own, which goes on for the pictures that
replace dropped ones, so a resumed run plans what it would have, on the same kind of device to the bit.
"""

import contextlib
import hashlib
import time
import uuid
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from edge_agent import responses
from edge_agent.distill import Pool
from edge_agent.egress import CopiesStopped, CopyGate, EgressDoor, PrivatePictureStopped
from edge_agent.failures import BadInput, BudgetSpent, Failure
from edge_agent.generators import PictureGenerator
from edge_agent.journal import GONE, Batch, Journal, Receipt
from edge_agent.packing import Packing, is_lossy
from edge_agent.pixels import quantise
from edge_agent.precision import training_precision
from edge_agent.teacher import Answered, Description, Refused, Teacher
from networks.diffusion import Diffusion
from networks.mixes import Mixes
from protos import codec
from protos.errors import Reason
from protos.mekd.v1 import teacher_inference_pb2 as wire

PHASE = "distill"
HOLD_EXPIRY_SECONDS = 15.0  # a dead server's holds come back within one lease (10 s) and one sweep (3 s)
PAUSE_SECONDS = 0.5
PROBE_PICTURES = 2000
"""Looked at before the first sending. At a share of 1 % that is dropped, give or take 0.2 % (standard error)."""
_PROBE_BATCH = 200
LOSSLESS_FACT = "lossless_only"  # remembered for a run whose teacher decodes lossy pictures otherwise


Source = Callable[[int, int], tuple[Tensor, Tensor, int]]
"""Slot, most pictures -> latents (N, L), pictures (N, C, H, W) uint8 that may be sent, how many were dropped."""


class PoolOutbox:
    """Batches to send: first what a former run left unanswered, then new ones until the budget is planned.

    Args:
        source: makes the pictures of a slot.
        phase: whose batches they are.
        only_slot: the one to plan, unless it is already; None: as many as the budget allows.
        budget: most pictures that are planned, or sent where the agent counts them.
        counts_sent: the teacher counts nothing, so the agent counts: every sending uses up the budget, a repeat too.
        message_bytes: size of a batch as it travels; None: the request's own.
        packing: how pictures travel; None: as they are.
        warn: gets one line when the teacher is found to decode otherwise.
    """

    def __init__(
        self,
        journal: Journal,
        source: Source,
        door: EgressDoor,
        description: Description,
        *,
        budget: int,
        batch_pictures: int,
        phase: str = PHASE,
        only_slot: int | None = None,
        counts_sent: bool = False,
        message_bytes: Callable[[Batch], int] | None = None,
        packing: Packing | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.counts_sent = counts_sent
        self.given_up_pictures = 0
        """Sent and not answered, and no budget left to send them again."""
        self.failure: CopiesStopped | PrivatePictureStopped | None = None
        """Why no new batch is made any more; what was sent before is paid for, and its answers are taken first."""
        self._message_bytes = message_bytes
        self._packing = packing or Packing()
        self._packing.lossless_only = journal.fact(LOSSLESS_FACT) is True
        self._warn = warn
        self._is_trusted = False  # to decode as we do: an answer to a lossy batch has shown it
        self._on_trial: str | None = None  # id of such a batch: the first, which is not settled
        self._journal = journal
        self._source = source
        self._door = door
        self.phase = phase
        self._only_slot = only_slot
        self._description = description
        self._budget = budget
        self.batch_pictures = min(batch_pictures, description.max_batch_pictures)
        """Most pictures in a new batch."""
        self._again: deque[Batch] = deque(journal.unanswered(phase))
        totals = journal.totals()
        self._planned_pictures = totals.planned_pictures
        self._sent_pictures = totals.sent_pictures
        self._next_slot = max(journal.slots(phase), only_slot or 0)
        self._stopped = False

    def next_batch(self) -> Batch | None:
        if self._stopped:
            return None
        if self._again:
            again = self._repeatable()
            if again is not None:
                self.repeated(again)
            return again
        count = min(self.batch_pictures, self._left())
        if self._only_slot not in (None, self._next_slot):
            return None
        if count <= 0 or self._on_trial is not None or self.failure is not None:
            return None
        try:
            batch, dropped = self._new_batch(self._next_slot, count)
        except (CopiesStopped, PrivatePictureStopped) as failure:
            self.failure = failure
            return None
        self._try(batch)
        count = batch.picture_count
        self._journal.plan(self.phase, batch, sent_bytes=self._bytes(batch), dropped_pictures=dropped)
        self._next_slot += 1
        self._planned_pictures += count
        self._sent_pictures += count
        return batch

    def repeated(self, batch: Batch) -> None:
        self._journal.count_repeat(batch.batch_id, sent_bytes=self._bytes(batch))
        self._sent_pictures += batch.picture_count

    def compared(self, batch: Batch, *, alike: bool) -> None:
        """Told whether the teacher looked at the very pixels of an answered batch.

        Of the first lossy batch that is planned nothing further is sent before this is known: should decoders differ,
        one batch is lost to training and not a window full.
        """
        if not is_lossy(wire.Batch.FromString(batch.request).images):
            return
        self._on_trial = None
        self._is_trusted = self._is_trusted or alike
        if not alike and not self._packing.lossless_only:
            self._packing.lossless_only = True
            self._journal.set_facts(**{LOSSLESS_FACT: True})
            self._warn(
                f"WARNING: the teacher decoded batch {batch.batch_id} to other pixels than this agent. Answers to "
                "such batches are paid for and kept, but left out of training; from here on pictures travel "
                "lossless, which costs more bytes"
            )

    def gone(self, batch: Batch) -> None:
        """Told that a batch will have no answer to compare by: another goes on trial in its place."""
        if self._on_trial == batch.batch_id:
            self._on_trial = None

    def shrink(self, refused: Batch, picture_count: int) -> None:
        """Plans the first pictures of a refused batch under a new id, in its place."""
        images_NCHW = codec.decode_images(wire.Batch.FromString(refused.request).images)
        latent_bytes = len(refused.latents) // refused.picture_count * picture_count
        first = self._packing.pack(images_NCHW[:picture_count])
        smaller = _batch(refused.slot, first, refused.latents[:latent_bytes])
        rest = None
        if picture_count < refused.picture_count:
            as_decoded = codec.encode_images(images_NCHW[picture_count:])
            rest = _batch(refused.slot, as_decoded, refused.latents[latent_bytes:])
        self._journal.replan(self.phase, refused.batch_id, smaller, rest=rest)
        self._planned_pictures -= refused.picture_count - picture_count
        self._again.appendleft(smaller)
        if self._on_trial == refused.batch_id:
            self._try(smaller)

    def limit(self, picture_count: int) -> None:
        """New batches have so many pictures at most from here on."""
        self.batch_pictures = min(self.batch_pictures, picture_count)

    def again(self, batch: Batch) -> bool:
        self._again.append(batch)
        return not self._stopped and (not self.counts_sent or self._left() > 0)

    def stop(self) -> None:
        """Nothing more is sent; what is planned stays in the journal for the next run."""
        self._stopped = True

    def _try(self, batch: Batch) -> None:
        """Puts a batch on trial where there is something to find out by it."""
        lossy = not self._is_trusted and is_lossy(wire.Batch.FromString(batch.request).images)
        self._on_trial = batch.batch_id if lossy else None

    def _left(self) -> int:
        """Pictures that the budget still allows."""
        return self._budget - (self._sent_pictures if self.counts_sent else self._planned_pictures)

    def _repeatable(self) -> Batch | None:
        """The next batch to be sent once more; where the budget has no room for all of it, its first pictures."""
        while self._again:
            batch = self._again.popleft()
            # A teacher that keeps books has charged a batch once at most, and under its id alone: it stays whole.
            fitting = min(batch.picture_count, self.batch_pictures, self._left()) if self.counts_sent else None
            if fitting is None or fitting == batch.picture_count:
                return batch
            if fitting > 0:
                self.shrink(batch, fitting)
            else:
                self.given_up_pictures += batch.picture_count
        return None

    def _bytes(self, batch: Batch) -> int | None:
        return None if self._message_bytes is None else self._message_bytes(batch)

    def _new_batch(self, slot: int, count: int) -> tuple[Batch, int]:
        latents_NL, images_NCHW, dropped = self._source(slot, count)
        sized_NCHW = resize(images_NCHW, self._description.height, self._description.width)
        self._door.check_pictures(sized_NCHW.numpy())
        images = self._packing.pack(sized_NCHW.numpy())
        batch = _batch(slot, images, latents_NL.numpy().astype("<f4").tobytes())
        self._door.check(wire.Batch.FromString(batch.request))
        return batch, dropped


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


def fill_pool(
    teacher: Teacher,
    journal: Journal,
    outbox: PoolOutbox,
    description: Description,
    *,
    progress: Callable[[int], None],
) -> None:
    """Asks until the budget is used; every answer is durable before the next one is looked at.

    ``progress`` is told the pictures answered so far. Raises BudgetSpent when the account is empty before that,
    BadInput when the teacher refuses for good or answers nonsense, what stopped the outbox, and TeacherAway. Whatever
    it is, what is under way is answered and kept first: it may be paid for.
    """
    filling = _Filling(teacher, journal, outbox, description, progress)
    try:
        for settled in teacher.answers(journal.run_id, description.model_digest, outbox):
            if isinstance(settled, Answered):
                filling.keep(settled)
            else:
                filling.refused(settled)
    except Failure as error:  # such as a teacher that went away before all was settled
        if filling.problem is not None:
            raise filling.problem from error
        raise
    filling.finish()


class _Filling:
    """A pool while it is bought: what each answer and each kind of refusal means for the batches to come."""

    def __init__(
        self,
        teacher: Teacher,
        journal: Journal,
        outbox: PoolOutbox,
        description: Description,
        progress: Callable[[int], None],
    ) -> None:
        self._teacher = teacher
        self._journal = journal
        self._outbox = outbox
        self._description = description
        self._progress = progress
        self._answered = 0  # pictures, of this run's former starts too
        self._waiting_since: float | None = None  # for pictures held elsewhere, since the last answer
        self._waited_for: set[str] = set()  # batches that are larger than what the teacher takes by now
        self._spent: str | None = None
        self._problem: Failure | None = None
        self._count(journal.totals(outbox.phase).charged_pictures)

    @property
    def problem(self) -> Failure | None:
        """What stops the run once all that was sent is settled."""
        return self._problem or self._outbox.failure

    def keep(self, answered: Answered) -> None:
        """Keeps an answer; one that is not what was expected ends the sending."""
        try:
            self._outbox.compared(answered.batch, alike=keep(self._journal, answered, self._description))
        except BadInput as error:
            self._stop(error)
        self._waiting_since = None
        self._count(answered.batch.picture_count)

    def refused(self, refused: Refused) -> None:
        """Sends a refused batch again, sends less of it, or sends nothing more."""
        reason = refused.refusal.reason
        if reason is Reason.BUDGET_EXHAUSTED:
            self._budget_exhausted(refused)
        elif reason is Reason.ANSWER_EXPIRED:
            self._answer_expired(refused.batch)
        elif (most := _lowered_limit(self._teacher, refused)) > 0:
            self._too_large(refused.batch, most)
        else:
            self._stop(BadInput(f"the teacher refused a batch for good: {refused.refusal.message}"))

    def finish(self) -> None:
        """Raises what stopped the run before its budget was used, if anything did."""
        if self.problem is not None:
            raise self.problem
        if self._spent is not None:
            totals = self._journal.totals()
            paid = totals.sent_pictures if self._outbox.counts_sent else totals.charged_pictures
            is_trainable = self._answered > 0 and self._outbox.phase == PHASE
            or_train = f", or with --budget {paid} to train on what is there" if is_trainable else ""
            raise BudgetSpent(
                f"the account's budget is spent after {self._answered} answers of this run ({self._spent}); they are "
                f"kept. Start the same command again after a grant{or_train}"
            )
        if (given_up := self._outbox.given_up_pictures) > 0:
            raise BudgetSpent(
                f"the budget is used: {given_up} pictures were sent and not answered, and sending them again would "
                f"be more than --budget. {self._answered} answers are kept: raise --budget, or start the same "
                "command again to train on those"
            )

    def _budget_exhausted(self, refused: Refused) -> None:
        batch, variables = refused.batch, refused.refusal.variables
        available, held = (int(variables[name]) for name in ("available", "held"))
        self._waiting_since = self._waiting_since or time.monotonic()
        if available > 0:
            self._outbox.shrink(batch, min(available, batch.picture_count))
        elif held > 0 and time.monotonic() - self._waiting_since < HOLD_EXPIRY_SECONDS:
            # Where asking costs, it is asked once.
            time.sleep(HOLD_EXPIRY_SECONDS if self._outbox.counts_sent else PAUSE_SECONDS)
            self._outbox.again(batch)
        else:
            self._spent = refused.refusal.message
            self._outbox.stop()

    def _too_large(self, batch: Batch, most: int) -> None:
        """A server with the former limit may have it under way, and charge for it, as long as a hold lives."""
        self._outbox.limit(most)
        if batch.batch_id in self._waited_for:
            self._outbox.shrink(batch, most)
            return
        if not self._waited_for:
            time.sleep(HOLD_EXPIRY_SECONDS)
        self._waited_for.add(batch.batch_id)
        self._outbox.again(batch)

    def _answer_expired(self, batch: Batch) -> None:
        """Paid for by a process that was stopped before it came; the rest of the budget is as good as before."""
        count = batch.picture_count
        self._journal.keep_answer(batch.batch_id, answer=GONE, charged_count=count, received_bytes=0)
        self._outbox.gone(batch)
        self._count(count)

    def _stop(self, problem: Failure) -> None:
        self._problem = self._problem or problem
        self._outbox.stop()

    def _count(self, picture_count: int) -> None:
        self._answered += picture_count
        self._progress(self._answered)


def _lowered_limit(teacher: Teacher, refused: Refused) -> int:
    """Most pictures in a batch, where the teacher takes fewer than when the refused one was planned; else 0.

    What it had charged before it would answer, however large: a batch that is refused so was not paid for.
    """
    refusal = refused.refusal
    if refusal.reason is not Reason.INVALID_IMAGES or refusal.variables["field"] != codec.PICTURE_COUNT_FIELD:
        return 0
    most = teacher.describe().max_batch_pictures
    return most if most < refused.batch.picture_count else 0


def keep(journal: Journal, answered: Answered, description: Description) -> bool:
    """Keeps a paid answer, then looks at it: nothing paid for is lost, even where it is not what was expected.

    Returns whether the teacher looked at the pixels that this agent decodes. Raises BadInput.
    """
    batch, result = answered.batch, answered.result
    journal.keep_answer(
        batch.batch_id,
        answer=result.answer.SerializeToString(),
        charged_count=result.answer.charged_count,
        received_bytes=result.ByteSize() if answered.received_bytes is None else answered.received_bytes,
        receipt=_receipt(result),
    )
    _, _, alike = _checked(batch, result.answer, description)
    return alike


def load_pool(
    journal: Journal, generator: PictureGenerator, description: Description, *, label_smoothing: float
) -> Pool:
    """Every answered picture as the teacher decoded it, at the generator's size, each answer as its policy left it.

    What the teacher decoded to other pixels is left out, since which ones they were is not known, and so is what is
    no answer of this teacher's to the batch that was sent: it stopped the run that got it (``keep``), and the others
    are as good as before. ``left_out`` counts both. Where some answers are indices and others are not, indices become
    probabilities smoothed by ``label_smoothing``. Raises BadInput for an empty pool.
    """
    class_count = len(description.labels)
    side = generator.side
    images: list[Tensor] = []
    latents: list[Tensor] = []
    answers: list[codec.Float32Array | codec.Int64Array] = []
    epsilons: list[Tensor] = []
    for batch in journal.answered(PHASE):
        found = usable(batch, description)
        if found is None:
            continue
        sent_NCHW, answer, decimals = found
        images.append(resize(torch.from_numpy(sent_NCHW.copy()), side, side))
        # Of mixes that were asked about before their plans were kept there is none; the answers are good without.
        columns = 0 if isinstance(generator, Mixes) and not batch.latents else generator.latent_count
        found_NL = np.frombuffer(batch.latents, dtype="<f4").reshape(batch.picture_count, columns).copy()
        latents.append(torch.from_numpy(found_NL))
        answers.append(answer)
        epsilon = responses.epsilon(decimals, class_count)
        epsilons.append(torch.full((batch.picture_count, 1), epsilon))
    if not images:
        raise BadInput("expected answers to train on, the journal has none; raise --budget")
    fewest = min(latents_NL.shape[1] for latents_NL in latents)
    latents = [latents_NL[:, :fewest] for latents_NL in latents]
    kinds = {answer.ndim for answer in answers}
    if kinds == {1}:
        indices_N = torch.from_numpy(np.concatenate(answers))
        return Pool(images_NCHW=torch.cat(images), latents_NL=torch.cat(latents), class_indices_N=indices_N)
    soft = [_as_probabilities(answer, class_count, label_smoothing) for answer in answers]
    return Pool(
        images_NCHW=torch.cat(images),
        latents_NL=torch.cat(latents),
        probabilities_NK=torch.cat(soft),
        epsilon_N1=torch.cat(epsilons),
    )


def left_out(journal: Journal, description: Description) -> int:
    """Pictures that were paid for and are not trained on (``load_pool``)."""
    return sum(batch.picture_count for batch in journal.answered(PHASE) if usable(batch, description) is None)


def split_pool(pool: Pool, held_out: int) -> tuple[Pool, Pool]:
    """All but the last ``held_out`` pictures, and those: they are paid for, but never trained on."""

    def part(where: slice) -> Pool:
        return Pool(
            images_NCHW=pool.images_NCHW[where],
            latents_NL=pool.latents_NL[where],
            probabilities_NK=None if pool.probabilities_NK is None else pool.probabilities_NK[where],
            class_indices_N=None if pool.class_indices_N is None else pool.class_indices_N[where],
            epsilon_N1=None if pool.epsilon_N1 is None else pool.epsilon_N1[where],
        )

    border = len(pool) - held_out
    return part(slice(0, border)), part(slice(border, None))


def resize(images_NCHW: Tensor, height: int, width: int) -> Tensor:
    """Pictures (uint8) at another size, bilinear and antialiased; the very same ones where the size fits."""
    if images_NCHW.shape[2:] == (height, width):
        return images_NCHW
    sized = torch.nn.functional.interpolate(
        images_NCHW.float(), size=(height, width), mode="bilinear", antialias=True
    )
    return sized.round_().clamp_(0, 255).to(torch.uint8)


def _batch(slot: int, images: wire.ImageBatch, latents: bytes) -> Batch:
    batch_id = uuid.uuid4().hex
    message = wire.Batch(batch_id=batch_id, images=images)
    return Batch(
        slot=slot,
        batch_id=batch_id,
        picture_count=images.picture_count,
        request=message.SerializeToString(deterministic=True),
        latents=latents,
    )


def _receipt(result: wire.BatchResult) -> Receipt | None:
    if not result.HasField("receipt"):
        return None
    found = result.receipt
    return Receipt(account=found.account, sequence=found.sequence, head=found.head)


def _checked(
    batch: Batch, answer: wire.Answer, description: Description
) -> tuple[codec.UInt8Array, codec.Float32Array | codec.Int64Array, bool]:
    """The pictures that were sent, what was answered, and whether that was about the same pixels.

    Raises BadInput where the answer is not theirs. Of lossy encodings the pixels may differ: decoders do.
    """
    if answer.model_digest != description.model_digest:
        raise BadInput(
            f"this run began with the model {description.model_digest}, batch {batch.batch_id} was answered by "
            f"{answer.model_digest}; give another --run-dir to distil the new one"
        )
    images = wire.Batch.FromString(batch.request).images
    sent_NCHW = codec.decode_images(images)
    alike = answer.pixel_digest == codec.pixel_digest(sent_NCHW)
    if not alike and not is_lossy(images):
        raise BadInput(f"the teacher looked at other pixels than were sent in batch {batch.batch_id}")
    try:
        if answer.charged_count != batch.picture_count:
            raise ValueError(f"expected {batch.picture_count} pictures charged, got {answer.charged_count}")
        class_count = len(description.labels)
        decoded = codec.decode_answer(answer, picture_count=batch.picture_count, class_count=class_count)
    except ValueError as error:
        raise BadInput(f"the answer to batch {batch.batch_id} is not one: {error}") from None
    return sent_NCHW, decoded, alike


def usable(
    batch: Batch, description: Description
) -> tuple[codec.UInt8Array, codec.Float32Array | codec.Int64Array, int | None] | None:
    """The pictures of an answered batch, the answer and its decimals; None where it is nothing to train on."""
    assert batch.answer is not None
    answer = wire.Answer.FromString(batch.answer)
    try:
        sent_NCHW, decoded, alike = _checked(batch, answer, description)
    except BadInput:
        return None
    return (sent_NCHW, decoded, codec.decimals_of(answer)) if alike else None


def _as_probabilities(
    answer: codec.Float32Array | codec.Int64Array, class_count: int, label_smoothing: float
) -> Tensor:
    if answer.ndim == 2:
        return torch.from_numpy(answer)
    hard_NK = responses.one_hot(torch.from_numpy(answer), class_count)
    return hard_NK * (1.0 - label_smoothing) + label_smoothing / class_count
