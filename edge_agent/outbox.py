"""What is sent and not yet answered: batches, each durable before it leaves.

A picture is quantised, measured and hashed against the local ones before it is planned, and planned before it is
sent.
"""

import uuid
from collections import deque
from collections.abc import Callable

from edge_agent.egress import CopiesStopped, EgressDoor, PrivatePictureStopped
from edge_agent.journal import Batch, Journal
from edge_agent.packing import Packing, is_lossy
from edge_agent.pixels import resize
from edge_agent.sources import Source
from edge_agent.teacher import Description
from protos import codec
from protos.mekd.v1 import teacher_inference_pb2 as wire

PHASE = "distill"
LOSSLESS_FACT = "lossless_only"  # remembered for a run whose teacher decodes lossy pictures otherwise


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
