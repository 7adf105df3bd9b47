"""The pool: synthetic pictures, asked about once, and the answers that were paid for.

Shape letters: N pictures, C channels, H and W height and width, K classes.

It is filled from an outbox (``outbox``), whose pictures are made by the generator (``sources``).
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from edge_agent import responses
from edge_agent.distill import Pool
from edge_agent.failures import BadInput, BudgetSpent, Failure
from edge_agent.generators import PictureGenerator
from edge_agent.journal import GONE, Batch, Journal, Receipt
from edge_agent.outbox import PHASE, PoolOutbox
from edge_agent.packing import is_lossy
from edge_agent.pixels import resize
from edge_agent.teacher import Answered, Description, Refused, Teacher
from networks.mixes import Mixes
from protos import codec
from protos.errors import Reason
from protos.mekd.v1 import teacher_inference_pb2 as wire

HOLD_EXPIRY_SECONDS = 15.0  # a dead server's holds come back within one lease (10 s) and one sweep (3 s)
PAUSE_SECONDS = 0.5


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
    count, totals = 0, journal.totals(PHASE)
    # Room for all at once: pictures in a list, and then together, would be there twice.
    images_NCHW = torch.empty((totals.planned_pictures, description.channels, side, side), dtype=torch.uint8)
    latents: list[Tensor] = []
    answers: list[codec.Float32Array | codec.Int64Array] = []
    epsilons: list[Tensor] = []
    for batch in journal.answered(PHASE):
        found = usable(batch, description)
        if found is None:
            continue
        sent_NCHW, answer, decimals = found
        images_NCHW[count : count + batch.picture_count] = resize(torch.from_numpy(sent_NCHW.copy()), side, side)
        count += batch.picture_count
        # Of mixes that were asked about before their plans were kept there is none; the answers are good without.
        columns = 0 if isinstance(generator, Mixes) and not batch.latents else generator.latent_count
        found_NL = np.frombuffer(batch.latents, dtype="<f4").reshape(batch.picture_count, columns).copy()
        latents.append(torch.from_numpy(found_NL))
        answers.append(answer)
        epsilon = responses.epsilon(decimals, class_count)
        epsilons.append(torch.full((batch.picture_count, 1), epsilon))
    images_NCHW = images_NCHW[:count]
    if count == 0:
        if totals.charged_pictures == 0:
            raise BadInput("expected answers to train on, the journal has none; raise --budget")
        raise BadInput(
            f"expected answers to train on: {totals.charged_pictures} pictures were paid for, and what came back for "
            "them is no answer of this teacher's to the very pixels that were sent, or is no longer kept; raise "
            "--budget"
        )
    fewest = min(latents_NL.shape[1] for latents_NL in latents)
    latents = [latents_NL[:, :fewest] for latents_NL in latents]
    kinds = {answer.ndim for answer in answers}
    if kinds == {1}:
        indices_N = torch.from_numpy(np.concatenate(answers))
        return Pool(images_NCHW=images_NCHW, latents_NL=torch.cat(latents), class_indices_N=indices_N)
    soft = [_as_probabilities(answer, class_count, label_smoothing) for answer in answers]
    is_index = [torch.full((len(answer), 1), answer.ndim == 1) for answer in answers]
    return Pool(
        images_NCHW=images_NCHW,
        latents_NL=torch.cat(latents),
        probabilities_NK=torch.cat(soft),
        epsilon_N1=torch.cat(epsilons),
        is_index_N1=None if kinds == {2} else torch.cat(is_index),
    )


def left_out(journal: Journal, description: Description) -> int:
    """Pictures that were paid for and are not trained on (``load_pool``)."""
    return sum(batch.picture_count for batch in journal.answered(PHASE) if usable(batch, description) is None)


def split_pool(pool: Pool, held_out: int) -> tuple[Pool, Pool]:
    """All but the last ``held_out`` pictures, and those: they are paid for, but never trained on."""
    border = len(pool) - held_out
    return pool.each(lambda part: part[:border]), pool.each(lambda part: part[border:])


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
