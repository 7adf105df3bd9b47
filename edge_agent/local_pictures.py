"""The device's own pictures, as one run knows them: at the generator's size, split once, and behind one door.

The teacher's description and the journal decide that size; where another is sent, they are read at both.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from edge_agent import privacy
from edge_agent.config import RunConfig
from edge_agent.console import Console
from edge_agent.data import DataError, LocalImages, load_local_images
from edge_agent.egress import EgressDoor
from edge_agent.failures import BadInput
from edge_agent.pixels import resize
from edge_agent.runs import RunFolder, digest_of
from edge_agent.teacher import Description
from protos.mekd.v1.teacher_inference_pb2 import Batch


class LocalPictures:
    """Owns the local pictures of a run. What it does not need yet it has not read."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, console: Console, *, describe: Callable[[], Description]
    ) -> None:
        self._config = config
        self._folder = folder
        self._journal = folder.journal
        self._console = console
        self._describe = describe

    @property
    def side(self) -> int:
        """Of the generator's pictures. Never more than is sent: the gate would see what shrinking takes away."""
        height, width = self._describe().height, self._describe().width
        square = height == width and 8 <= height <= 128 and height % 4 == 0
        side = height if square else min(self._config.image_size, min(height, width) // 4 * 4)
        if self._journal.totals().planned_pictures == 0:
            return side
        # What a former version began with may be larger, and is paid for.
        return int((self._journal.fact("identity") or {}).get("generator's side", side))

    @cached_property
    def _read(self) -> tuple[LocalImages, EgressDoor]:
        """What `found` and `door` are.

        Of one reading: files that were read again, hours later, need not be those that have trained.
        """
        described, side = self._describe(), self.side
        height, width = described.height, described.width
        door = EgressDoor(())
        try:
            local = load_local_images(
                self._config.images,
                channels=described.channels,
                height=side,
                width=side,
                data_root=Path(self._config.data) if self._config.data else None,
                limit=self._config.local_pictures or None,
                seed=self._config.seed,
                also=None if (height, width) == (side, side) else (height, width, door.learn),
                leave_out=self._folder.path,
            )
        except DataError as error:
            raise BadInput(str(error)) from None
        for image_CHW in local.images_NCHW:
            # A generator that copies does so at its own size: such a copy is resized as everything that is sent.
            door.learn(resize(torch.from_numpy(image_CHW)[None], height, width)[0].numpy())
        if local.skipped:
            name, why = local.skipped[0]
            self._console.say(f"{len(local.skipped)} files left out, such as {name}: {why}")
        skipped = digest_of({"skipped": local.skipped})
        if local.skipped and self._journal.fact("skipped") != skipped:  # else the list is there from an earlier start
            for name, why in local.skipped:
                self._folder.metric(skipped=name, why=why)
            self._journal.set_facts(skipped=skipped)
        self._console.say(f"{len(local.images_NCHW)} local pictures of {local.source}")
        return local, door

    @property
    def found(self) -> LocalImages:
        """All of them, at the generator's size. Raises BadInput."""
        return self._read[0]

    @property
    def door(self) -> EgressDoor:
        """The egress door: it knows the local pictures at the size that is sent. Raises BadInput."""
        return self._read[1]

    @property
    def images_NCHW(self) -> Tensor:
        """All of them (N, C, H, W), uint8: the memory of `found.images_NCHW` as a tensor."""
        return torch.from_numpy(self.found.images_NCHW)

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Those that train the generator, and the reference that it never sees; uint8. Raises BadInput."""
        images_NCHW = self.images_NCHW
        try:
            training_N, reference_N = privacy.split(images_NCHW, seed=self._config.seed)
        except ValueError as error:
            raise BadInput(f"{error}; give more pictures") from None
        return images_NCHW[training_N], images_NCHW[reference_N]

    @property
    def reference(self) -> str:
        """Which local pictures are the reference, in a word: their number and a digest."""
        _, reference_NCHW = self.split
        digest = hashlib.sha256(reference_NCHW.numpy().tobytes()).hexdigest()
        return f"{len(reference_NCHW)} of {len(self.found.images_NCHW)}, sha256 {digest}"

    def count_sent(self) -> int | None:
        """How many are among all that was ever planned to be sent; None where no local picture is known."""
        if self._journal.totals().planned_pictures == 0:
            return 0
        if "_read" not in self.__dict__:  # the run ended before it read them
            return None
        return sum(self.door.matches(Batch.FromString(request)) for request in self._journal.requests())
