"""One run, top-down: describe the teacher, read the local pictures, then the phases in their order.

The phases meet only through files in the run folder. Each records a digest of its inputs: what was finished on the
same inputs is not done again, changed training options train again on the answers already paid for, and a changed
generator or teacher needs a new folder.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_agent import generators, guidance, kserve, privacy, sources
from edge_agent import outbox as outboxes
from edge_agent import pool as pools
from edge_agent.adaptation.adapter import Adapter
from edge_agent.adaptation.memory import VERSION as MEMORY_VERSION
from edge_agent.adaptation.memory import build_memory
from edge_agent.config import (
    PHASES,
    RunConfig,
    as_layers,
    generator_in_use,
    given_settings,
    idle_settings,
    in_use,
)
from edge_agent.console import Console
from edge_agent.data import DataError, LocalImages, UInt8Array, each_local_image, load_local_images
from edge_agent.deprivatize import train_generator
from edge_agent.diffusion import train_diffusion
from edge_agent.distill import Pool
from edge_agent.egress import CopiesStopped, CopyGate, EgressDoor, PrivatePictureStopped
from edge_agent.failures import BadInput, BudgetSpent, DiskProblem, Failure, RunFolderProblem, TeacherAway
from edge_agent.generators import AnyGenerator, PictureGenerator
from edge_agent.guidance import TeachersConfidence
from edge_agent.journal import Totals
from edge_agent.mixes import mixed_pictures, train_mixes
from edge_agent.packing import Packing
from edge_agent.phase import Checkpoint, Progress
from edge_agent.pixels import normalise, resize
from edge_agent.privacy_record import PrivacyRecord, attackers_parts
from edge_agent.runs import RunFolder, digest_of
from edge_agent.teacher import Balance, Books, Description, RemoteTeacher, Teacher
from edge_agent.training import Lessons, assistant_of, refuse_runaway, student_of
from networks import registry
from networks.autoencoder import latent_side
from networks.mixes import Mixes
from networks.modelfile import ModelFacts
from protos.mekd.v1.teacher_inference_pb2 import Batch

PARTS = {"ask": "distill"}
"""What may be called by itself, and the phase that it is the beginning of."""
EVALUATION_PICTURES = 256
MOST_SIGHTS = 300
"""How often a diffusion model may see each picture without a warning: a guess. Of 9,000 photographs seen 60 times 16
of 52,000 pictures were dropped; of 57 digits seen 900 times (one short run, width 32) 843 of 2,000."""
CORRECTABLE = ("teacher's model", "[teacher]")  # of a KServe server's identity, until the first answer is kept
SUMMARY_SECONDS = 2.0  # a summary asks for the balance, but waits no longer: its run may be ending on SIGTERM


def run(config: RunConfig, phases: Sequence[str], *, api_key: str | None, console: Console) -> dict[str, Any]:
    """Runs `PHASES` or `PARTS` in a run folder and returns the summary, which is written however the run ends.

    Raises Failure (``failures``): what was paid for is kept, and the same call goes on.
    """
    with RunFolder(Path(config.run_dir)) as folder:
        agent = Agent(config, folder, api_key, console)
        prepared = False
        try:
            agent.prepare()
            prepared = True
            for phase in phases:
                with folder.clock(PARTS.get(phase, phase)):
                    getattr(agent, phase)()
            agent.reconcile()
        finally:
            summary: dict[str, Any] = {}
            with closing(agent), suppress(DiskProblem):
                # A command that was refused leaves the summary of the run that it is no part of.
                if prepared or not folder.has("summary.json"):
                    summary = agent.write_summary()
        return summary


class Agent:
    """The state that the phases of one run share."""

    def __init__(self, config: RunConfig, folder: RunFolder, api_key: str | None, console: Console) -> None:
        self._config = config
        self._folder = folder
        self._journal = folder.journal
        self._api_key = api_key
        self._console = console
        self._device = choose_device(config.device)
        self._teacher: Teacher | None = None
        self._account_is_known = False
        self._privacy = PrivacyRecord(folder.journal, lambda: self._split)
        # Of a teacher without books the agent counts what it sends; then that is what the budget bounds.
        self._counts_sent = kserve.is_address(config.teacher)

    # --- what the phases need ---

    def prepare(self) -> None:
        """Reads teacher and pictures, and refuses a folder that belongs to another run."""
        if self._config.student not in registry.CLASSIFIERS:
            raise BadInput(
                f"--student: expected one of {', '.join(registry.CLASSIFIERS)}; got {self._config.student!r}"
            )
        if self._config.distill.assistant not in ("", *registry.CLASSIFIERS):
            raise BadInput(
                f"distill.assistant: expected one of {', '.join(registry.CLASSIFIERS)}, or nothing for none; "
                f"got {self._config.distill.assistant!r}"
            )
        if self._side < 8:
            raise BadInput(
                "expected a teacher of pictures with 8 x 8 pixels or more, "
                f"got {self._description.height} x {self._description.width}"
            )
        if self._config.distill.shift_px >= self._side:
            raise BadInput(
                f"distill.shift_px: expected less than the side of the pictures, {self._side}, "
                f"got {self._config.distill.shift_px}"
            )
        totals = self._journal.totals()
        planned, charged = totals.planned_pictures, totals.charged_pictures
        # Before the first alone: of an account that is sold other answers since, the description is of former times.
        if self._config.distill.balance_answers and self._description.indices_only and planned == 0:
            raise BadInput(
                "distill.balance_answers: expected probabilities to balance, and this account is sold class indices; "
                "set it to false"
            )
        if idle := idle_settings(self._config):
            self._console.warn(f"settings that change nothing in this run: {', '.join(idle)}")
        settings = self._config.deprivatize
        if planned == 0:  # with answers, former versions took them as they are
            self._check_counts()
            self._warn_of_little_use()
        most = latent_side(self._side)
        if settings.generator == "mixes" and settings.mix_regions > most:
            raise BadInput(
                f"deprivatize.mix_regions: expected at most {most} for pictures of side {self._side}, "
                f"got {settings.mix_regions}"
            )
        identity = {
            "pictures": self._local.digest,
            "seed": self._config.seed,
            "teacher's model": self._description.model_digest,
            "generator's side": self._side,
            "reference pictures": self._reference,
            **{f"deprivatize.{name}": value for name, value in generator_in_use(settings).items()},
        }
        self._check_meter(planned)
        if self._counts_sent:
            described = self._description
            identity |= {
                "pictures' shape": [described.channels, described.height, described.width],
                "classes": len(described.labels),
                "[teacher]": given_settings(self._config.kserve),
            }
        self._check_identity(identity, planned=planned, charged=charged)
        if self._counts_sent and self._config.budget < totals.sent_pictures:
            raise BadInput(
                f"--budget: expected at least the {totals.sent_pictures} pictures that {self._folder.path} has sent "
                f"already, got {self._config.budget}"
            )
        if self._config.budget < charged:
            raise BadInput(
                f"--budget: expected at least the {charged} pictures that {self._folder.path} was charged already, "
                f"got {self._config.budget}"
            )
        # What is planned may have been sent, and so be paid for: it is asked about again, or nothing is.
        if charged < self._config.budget < planned and not self._counts_sent:
            raise BadInput(
                f"--budget: {self._folder.path} has asked about {planned} pictures and was answered {charged}; "
                f"expected at least {planned}, or {charged} to train on those alone, got {self._config.budget}"
            )
        self._packing()  # refuses an encoding that the teacher does not take, before anything is trained
        if self._journal.fact("first_model") is None:
            before = self._journal.fact("identity") or identity
            self._journal.set_facts(first_model=before["teacher's model"])
        self._journal.set_facts(identity=identity)
        self._folder.write_toml("run.toml", as_layers(self._config))

    def _check_counts(self) -> None:
        """Refuses counts of phase 1 that would quietly come to less than they say."""
        settings, step = self._config.deprivatize, self._config.deprivatize.batch_count
        if settings.generator == "mixes" and settings.mix_pictures > settings.mix_regions**2:
            raise BadInput(
                f"deprivatize.mix_pictures: expected one for each of {settings.mix_regions**2} regions at most, "
                f"got {settings.mix_pictures}"
            )
        if 0 < settings.im_queries < step:
            raise BadInput(
                f"deprivatize.im_queries: expected the questions of one step ({step}, deprivatize.batch_count) or "
                f"more, or 0, got {settings.im_queries}"
            )
        if settings.im_queries > 0 and self._config.batch_pictures < step:
            raise BadInput(
                f"batch_pictures: expected {step} (deprivatize.batch_count) or more with deprivatize.im_queries, "
                f"whose steps ask in one batch, got {self._config.batch_pictures}"
            )

    def _warn_of_little_use(self) -> None:
        """Says what will be paid for and teach little."""
        described, questions = self._description, self._config.deprivatize.im_queries
        if described.indices_only and questions > 0:
            self._console.warn(
                f"deprivatize.im_queries: {questions} questions will change nothing: the teacher answers by class "
                "indices, so it seems equally sure of all pictures"
            )
        if described.height != described.width:
            self._console.warn(
                f"the teacher takes pictures of {described.height} x {described.width}, and the generator makes "
                "squares: the middle of each local picture is learnt from, and stretched when it is sent, which the "
                "teacher may understand less well"
            )

    def _check_identity(self, identity: dict[str, Any], *, planned: int, charged: int) -> None:
        """Refuses another identity than answers were paid for with; says so where a generator would be replaced."""
        known = self._journal.fact("identity")
        if known is None:
            return
        # A GAN's identity says nothing of its kind (`generator_in_use`); here it is compared, first of all.
        known = {"deprivatize.generator": "gan"} | known
        now = {"deprivatize.generator": self._config.deprivatize.generator} | identity
        changed = [
            name
            for name in now
            if known.get(name) != now[name] and not self._may_change(name, planned=planned, answered=charged)
        ]
        if changed and planned > 0:
            refusal = f"{self._folder.path} has paid answers for other {changed[0]}: "
            if changed[0] == "pictures":
                before = str(known.get("reference pictures")).partition(",")[0].rpartition(" of ")[2]
                raise RunFolderProblem(
                    f"{refusal}it began with {before}, now there are {len(self._local.images_NCHW)} in "
                    f"{self._config.images}, and not the same; bring those back, or give another --run-dir"
                )
            raise RunFolderProblem(
                f"{refusal}it began with {known.get(changed[0])!r}, now it is {now[changed[0]]!r}; give another "
                f"--run-dir, or the former value (all of them: --config {self._folder.path / 'run.toml'})"
            )
        if changed and self._folder.has("generator.pt"):
            self._console.warn(
                f"{self._folder.path / 'generator.pt'} was trained with other {', '.join(changed)}; phase 1 "
                "replaces it"
            )

    def _check_meter(self, planned: int) -> None:
        """Refuses to go on with another way to count than what was sent so far was counted by."""
        before, now = self._journal.fact("metered_by") or "teacher", self._metered_by
        if planned > 0 and before != now:
            raise RunFolderProblem(
                f"{self._folder.path}: its pictures so far were counted by the {before}, those of "
                f"{self._config.teacher} would be by the {now}; give another --run-dir"
            )
        self._journal.set_facts(metered_by=now)

    @property
    def _metered_by(self) -> str:
        return "agent" if self._counts_sent else "teacher"

    def _may_change(self, name: str, *, planned: int, answered: int) -> bool:
        """How a server's tensors are read may be corrected until the first answer is kept.

        And a teacher that phase 1 asked nothing may have other weights by the first question.
        """
        if self._counts_sent:
            return answered == 0 and name in CORRECTABLE
        return planned == 0 and name == "teacher's model" and self._config.deprivatize.im_queries == 0

    @cached_property
    def _description(self) -> Description:
        known = self._journal.fact("teacher")
        totals = self._journal.totals()
        # With answers in the journal the run is bound to its first teacher; asking checks that it is still there.
        if self._counts_sent:
            bound = totals.charged_pictures > 0
        else:
            bound = not self._may_connect or totals.planned_pictures > 0
        if known is not None and bound:
            return Description.from_facts(known)
        described = self._connected().describe()
        self._journal.set_facts(teacher=asdict(described))
        return described

    @cached_property
    def _local(self) -> LocalImages:
        """The local pictures at the generator's size."""
        try:
            local = load_local_images(**self._source(self._side, self._side))
        except DataError as error:
            raise BadInput(str(error)) from None
        if local.skipped:
            name, why = local.skipped[0]
            self._console.say(f"{len(local.skipped)} files left out, such as {name}: {why}")
        skipped = digest_of({"skipped": local.skipped})
        if local.skipped and self._journal.fact("skipped") != skipped:  # else the list is there from an earlier start
            for name, why in local.skipped:
                self._folder.metric(skipped=name, why=why)
            self._journal.set_facts(skipped=skipped)
        self._console.say(f"{len(local.images_NCHW)} local pictures of {local.source}")
        return local

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor]:
        """Local pictures that train the generator, and the reference that it never sees; both at its size."""
        local_NCHW = torch.from_numpy(self._local.images_NCHW)
        try:
            training_N, reference_N = privacy.split(local_NCHW, seed=self._config.seed)
        except ValueError as error:
            raise BadInput(f"{error}; give more pictures") from None
        return local_NCHW[training_N], local_NCHW[reference_N]

    @property
    def _reference(self) -> str:
        """Which local pictures are the reference, in a word: their number and a digest."""
        _, reference_NCHW = self._split
        digest = hashlib.sha256(reference_NCHW.numpy().tobytes()).hexdigest()
        return f"{len(reference_NCHW)} of {len(self._local.images_NCHW)}, sha256 {digest}"

    @property
    def _side(self) -> int:
        """Of the generator's pictures. Never more than is sent: the gate would see what shrinking takes away."""
        height, width = self._description.height, self._description.width
        square = height == width and 8 <= height <= 128 and height % 4 == 0
        side = height if square else min(self._config.image_size, min(height, width) // 4 * 4)
        if self._journal.totals().planned_pictures == 0:
            return side
        # What a former version began with may be larger, and is paid for.
        return int((self._journal.fact("identity") or {}).get("generator's side", side))

    @cached_property
    def _door(self) -> EgressDoor:
        """The egress door: it knows the local pictures at the size that is sent."""
        height, width = self._description.height, self._description.width
        local_NCHW = self._local.images_NCHW
        if (height, width) == (self._side, self._side):
            return EgressDoor(local_NCHW)
        # A generator that copies does so at its own size: such a copy is resized as everything that is sent.
        resized = (resize(torch.from_numpy(image)[None], height, width)[0].numpy() for image in local_NCHW)
        return EgressDoor(itertools.chain(self._each(height, width), resized))

    def _each(self, height: int, width: int) -> Iterator[UInt8Array]:
        """The local pictures (C, H, W) at a size, one by one."""
        count = 0
        try:
            for image_CHW in each_local_image(**self._source(height, width)):
                count += 1
                yield image_CHW
        except DataError as error:
            raise BadInput(str(error)) from None
        if count != len(self._local.images_NCHW):  # the door would not know those that are missing
            raise BadInput(
                f"{self._config.images} changed during the run: it began with {len(self._local.images_NCHW)} usable "
                f"pictures, now there are {count}; bring those back and start the same command again"
            )

    def _source(self, height: int, width: int) -> dict[str, Any]:
        """Where the local pictures come from, as `data` takes it."""
        return {
            "source": self._config.images,
            "channels": self._description.channels,
            "height": height,
            "width": width,
            "data_root": Path(self._config.data) if self._config.data else None,
            "limit": self._config.local_pictures or None,
            "seed": self._config.seed,
        }

    def _connected(self) -> Teacher:
        if self._teacher is None:
            self._teacher = self._kserve_teacher() if self._counts_sent else self._remote_teacher()
        return self._teacher

    @property
    def _may_connect(self) -> bool:
        """Whether there is anything to show the teacher: a key, or a certificate of this device's own."""
        return self._api_key is not None or self._config.tls_cert != ""

    def _books(self) -> Books | None:
        """The teacher's books; None where it keeps none."""
        teacher = self._connected()
        return teacher if isinstance(teacher, RemoteTeacher) else None

    @property
    def _tls_pair(self) -> tuple[Path, Path] | None:
        """This device's own certificate and its private key; None without."""
        return (Path(self._config.tls_cert), Path(self._config.tls_key)) if self._config.tls_cert else None

    def _kserve_teacher(self) -> kserve.KServeTeacher:
        return kserve.KServeTeacher(
            self._config.teacher,
            self._config.kserve,
            api_key=self._api_key,
            tls_ca=Path(self._config.tls_ca) if self._config.tls_ca else None,
            tls_pair=self._tls_pair,
            insecure=self._config.insecure,
            wait_seconds=self._config.wait_seconds,
            check_egress=lambda batch: self._door.check(batch),
            tell=self._console.say,
        )

    def _remote_teacher(self) -> RemoteTeacher:
        if not self._may_connect:
            raise BadInput("expected a key in MEKD_API_KEY or --key-file, got neither; teacher-admin makes one")
        return RemoteTeacher(
            self._config.teacher,
            api_key=self._api_key,
            tls_ca=Path(self._config.tls_ca) if self._config.tls_ca else None,
            tls_pair=self._tls_pair,
            insecure=self._config.insecure,
            wait_seconds=self._config.wait_seconds,
            check_egress=lambda batch: self._door.check(batch),
            tell=self._console.say,
        )

    # --- the phases ---

    def deprivatize(self) -> None:
        """Phase 1: local pictures but the reference in, ``generator.pt`` out. Asks for ``im_queries`` alone."""
        inputs = self._generators_inputs()
        if self._folder.done("deprivatize", inputs) and self._folder.has("generator.pt"):
            self._console.say("deprivatize: done before")
            return
        if self._may_connect:
            try:
                self._check_account(within_seconds=SUMMARY_SECONDS)
            except TeacherAway:
                self.close()  # as if it had not been looked for: where nothing is asked, there is nothing to compare
                self._console.say("nothing is asked yet; the account is looked at when it is")
        self._begin("deprivatize", "distill", "adapt")
        with self._console.bar("deprivatize", "steps") as tell:
            generator = self._train_generator(self._folder.checkpoint("deprivatize", inputs), tell)
        learning_rate = self._config.deprivatize.generator_learning_rate
        # Answers that were paid for are bound to the settings of their generator.
        where = ", in another --run-dir" if self._journal.totals().planned_pictures > 0 else ""
        refuse_runaway(generator, "the generator", "deprivatize.generator_learning_rate", learning_rate, where=where)
        self._folder.write_tensors("generator.pt", generators.to_content(generator.cpu()))
        self._folder.finish("deprivatize", inputs)

    def ask(self) -> None:
        """The first part of phase 2: ``generator.pt`` and the budget in, paid answers out. Trains no student."""
        self._buy()

    def distill(self) -> None:
        """Phase 2: ``generator.pt`` and the budget in, paid answers and ``student.pt`` out."""
        generator, digest = self._buy()
        paid = self._pool(generator)
        if left_out := self._left_out():
            self._console.warn(
                f"{left_out} pictures were paid for and are left out of training: what came back for them is no "
                "answer of this teacher's to the very pixels that were sent"
            )
        facts = self._student_facts()
        learnt_from = {
            "held out": self._config.held_out_fraction,
            "generator": digest,
            "answers": sorted(self._journal.charges()),
        }
        inputs = digest_of(
            {
                "settings": in_use(self._config.distill, mixes=isinstance(generator, Mixes)),
                "student": self._config.student,
                "seed": self._config.seed,
                **learnt_from,
            }
        )
        if self._folder.done("distill", inputs) and self._folder.has("student.pt"):
            self._console.say("distill: done before")
            return
        self._begin("distill", "adapt")
        self._journal.set_facts(trained_on=self._answers_digest())
        train, held_out = pools.split_pool(paid, self._held_out(len(paid)))
        lessons = Lessons(
            pool=train,
            facts=facts,
            config=self._config.distill,
            seed=self._config.seed,
            device=self._device,
            console=self._console,
            local_NCHW=torch.from_numpy(self._local.images_NCHW),
            mixed_MCHW=mixed_pictures(generator, self._split[0]),
        )
        student = student_of(
            self._folder,
            lessons,
            assistant=assistant_of(self._folder, lessons, learnt_from=learnt_from),
            generator=generator,
            inputs=inputs,
            title="distill: train",
        )
        agreement = agreement_with_answers(student, held_out) if len(held_out) else None
        self._folder.write_network("student.pt", student.cpu(), facts)
        self._journal.set_facts(agreement_synthetic=agreement, held_out=len(held_out))
        self._folder.finish("distill", inputs)

    def adapt(self) -> None:
        """Phase 3: ``student.pt`` and the paid answers in, ``memory.npz`` out: what online adaptation needs."""
        if not self._folder.has("student.pt"):
            raise RunFolderProblem(f"{self._folder.path}: expected student.pt; run --phase distill first")
        student_digest = self._folder.digest("student.pt")
        settings = asdict(self._config.adapt) | {"balanced": self._config.distill.balance_answers}
        inputs = digest_of({"settings": settings, "student": student_digest, "memory": MEMORY_VERSION})
        if self._folder.done("adapt", inputs) and self._folder.has("memory.npz"):
            self._console.say("adapt: done before")
            return
        self._begin("adapt")
        student = self._folder.read_network("student.pt")
        local_NCHW = torch.from_numpy(self._local.images_NCHW)
        memory = build_memory(
            student,
            self._pool(self._generator()),
            local_NCHW,
            config=self._config.adapt,
            seed=self._config.seed,
            digest=student_digest,
        )
        self._folder.write_arrays("memory.npz", memory.to_arrays())
        adapter = Adapter(student, memory, self._config.adapt)
        changed, shifts = 0, []
        with self._console.bar("adapt: local pictures", "pictures") as tell:
            for start in range(0, len(local_NCHW), EVALUATION_PICTURES):
                images_NCHW = local_NCHW[start : start + EVALUATION_PICTURES]
                adapted = adapter.adapt(images_NCHW)
                changed += int((adapted.probabilities_NK.argmax(1) != predict_classes(student, images_NCHW)).sum())
                shifts.append(adapted.shift)
                tell(start + len(images_NCHW), len(local_NCHW))
        # On the device's own pictures both should be small: they are what adaptation is measured from.
        self._folder.metric(
            phase="adapt", local_pictures=len(local_NCHW), changed=changed, largest_shift=round(max(shifts), 4)
        )
        self._folder.finish("adapt", inputs)

    def reconcile(self) -> None:
        """Compares the journal with the teacher's books, id by id. Raises RunFolderProblem naming the ids."""
        if self._counts_sent:
            sent = self._journal.totals().sent_pictures
            if self._teacher is not None or sent > 0:
                self._console.say(f"{sent} pictures sent by this agent's own count; no books to compare with")
            return
        ours = self._journal.charges()
        compared = digest_of(ours)
        # A run that was killed after its last answer still has to compare; one that has compared need not again.
        if self._teacher is None and (
            not ours or not self._may_connect or self._journal.fact("compared") == compared
        ):
            return
        books = self._books()
        assert books is not None
        self._compare(books)
        self._journal.set_facts(compared=compared)

    def _compare(self, books: Books, *, within_seconds: float | None = None) -> None:
        """Raises RunFolderProblem where journal and books disagree on what this run has paid for."""
        ours = self._journal.charges()
        theirs = books.posts(self._journal.run_id, within_seconds=within_seconds)
        open_ids = self._journal.open_ids()
        wrong = sorted(
            batch_id
            for batch_id in ours.keys() | theirs.keys()
            # An answer that is still on its way, or was lost with a connection, is ours for the asking.
            if ours.get(batch_id, 0) != theirs.get(batch_id, 0) and batch_id not in open_ids
        )
        if wrong:
            raise RunFolderProblem(
                f"this journal and the teacher's books disagree on {len(wrong)} batches: {', '.join(wrong[:20])}; "
                f"journal {sum(ours.values())} pictures, books {sum(theirs.values())}. Where this is an older copy "
                "of the run's folder, go on with the newest; where the address is another teacher's, give another "
                "--run-dir. Else keep the folder: what 'edge-agent receipts' prints of it is what the teacher's "
                "operator can hold against the books ('teacher-admin ledger verify --receipts FILE')"
            )

    # --- parts of phases ---

    def _train_generator(self, checkpoint: Checkpoint, progress: Progress) -> AnyGenerator:
        """Trains the kind of generator that was asked for, on all local pictures but the reference."""
        config = self._config.deprivatize
        training_NCHW, _ = self._split
        shared: dict[str, Any] = {
            "config": config,
            "seed": self._config.seed,
            "device": self._device,
            "checkpoint": checkpoint,
            "progress": progress,
        }
        if config.generator == "mixes":
            return train_mixes(training_NCHW, **shared)
        if config.generator == "diffusion":
            seen = config.steps * config.batch_count // len(training_NCHW)
            if seen > MOST_SIGHTS:
                self._console.warn(
                    f"deprivatize.steps: each of {len(training_NCHW)} pictures will be seen {seen} times, and above "
                    f"{MOST_SIGHTS} a diffusion model may learn copies, which stops the run; fewer steps are safer"
                )
            return train_diffusion(training_NCHW, **shared)
        guide = self._guide() if config.im_queries > 0 else None
        return train_generator(training_NCHW, class_count=len(self._description.labels), guide=guide, **shared)

    def _begin(self, *phases: str) -> None:
        """Takes back that phases are done: their results are of other inputs from here on."""
        self._journal.set_facts(**{f"done.{phase}": None for phase in phases})
        if "distill" in phases:
            self._journal.set_facts(agreement_synthetic=None, held_out=None)

    def _answers_digest(self) -> str:
        """Which answers were paid for so far."""
        return digest_of({"answers": sorted(self._journal.charges())})

    def _generators_inputs(self) -> str:
        identity = self._journal.fact("identity")
        if self._counts_sent:  # how its tensors are read may still be corrected, and is no matter for the generator
            identity = {name: value for name, value in identity.items() if name not in CORRECTABLE}
        elif self._config.deprivatize.im_queries == 0 and (first := self._journal.fact("first_model")) is not None:
            identity |= {"teacher's model": first}  # nor are weights of a teacher that was not asked
        return digest_of({"identity": identity, "classes": len(self._description.labels)})

    def _generator(self) -> AnyGenerator:
        if not self._folder.has("generator.pt"):
            raise RunFolderProblem(f"{self._folder.path}: expected generator.pt; run --phase deprivatize first")
        return generators.from_content(self._folder.read_tensors("generator.pt")).to(self._device)

    def _gate(self, generator: PictureGenerator, digest: str) -> CopyGate:
        """The gate for what this generator makes. Raises CopiesStopped."""
        inputs = digest_of({"generator": digest, "identity": self._generators_inputs()})
        return self._privacy.gate(generator, inputs=inputs, seed=self._config.seed)

    def _buy(self) -> tuple[AnyGenerator, str]:
        """Asks what is not asked yet, and attacks what was sent. Returns what all of it is by, and its digest."""
        generator = self._generator()
        # Paid for with this one, a later deprivatize would put another in its place and make the answers worthless.
        if not self._folder.done("deprivatize", self._generators_inputs()):
            raise RunFolderProblem(
                f"{self._folder.path}: generator.pt is unfinished, or of other settings or pictures than these; "
                "give those it was trained with, or run --phase deprivatize first"
            )
        digest = self._folder.digest("generator.pt")
        asked_with = self._journal.fact("generator")
        if self._journal.slots(outboxes.PHASE) > 0 and asked_with not in (None, digest):
            raise RunFolderProblem(
                f"{self._folder.path}: generator.pt changed since answers were paid for; give another --run-dir"
            )
        self._journal.set_facts(generator=digest)
        trained_on = self._journal.fact("trained_on") or self._answers_digest()
        try:
            self._ask(generator, digest)
        except (CopiesStopped, PrivatePictureStopped) as stopped:
            raise type(stopped)(f"{stopped}{self._or_train()}") from None
        finally:
            with suppress(DiskProblem):  # the reason why we are here is worth more
                if self._answers_digest() != trained_on:
                    self._begin("distill", "adapt")
        self._privacy.attack(side_parts=attackers_parts(self._config.deprivatize), console=self._console)
        return generator, digest

    def _ask(self, generator: PictureGenerator, digest: str) -> None:
        totals = self._journal.totals()
        if self._charged(totals) >= self._config.budget:
            if unanswered := totals.planned_pictures - totals.charged_pictures:
                self._console.say(f"{unanswered} pictures were sent and never answered; the budget is used")
            return
        gate = self._gate(generator, digest)
        teacher = self._paid_for()
        outbox = self._outbox(sources.synthetic(generator, gate, seed=self._config.seed))
        try:
            with self._console.bar("distill: ask", "pictures") as tell:
                pools.fill_pool(
                    teacher,
                    self._journal,
                    outbox,
                    self._description,
                    progress=lambda answered: tell(answered, self._config.budget),
                )
        except BudgetSpent:
            self._let_go_of_the_account()
            raise

    def _or_train(self) -> str:
        """What may be done with answers of a run that buys no more; empty where there are none."""
        if self._journal.totals(outboxes.PHASE).charged_pictures == 0:
            return ""
        paid = self._charged(self._journal.totals())
        return f"; or give --budget {paid} to train on the answers that are paid"

    def _paid_for(self) -> Teacher:
        """The teacher, once it is known who pays it: no question is asked before."""
        if not self._account_is_known:
            self._check_account()
        return self._connected()

    def _check_account(self, *, within_seconds: float | None = None) -> None:
        """Refuses another account than was asked with so far, and books that do not know what it has paid.

        Warns of an account that cannot pay for the rest.
        """
        books = self._books()
        if books is None:
            return
        account = books.balance(self._journal.run_id, within_seconds=within_seconds)
        totals = self._journal.totals()
        # Before anything is asked: ids of batches are an account's own, so another would pay for the same ones again.
        bound_to = self._journal.fact("account") if totals.planned_pictures > 0 else None
        paid_by = {bound_to} if bound_to else {receipt.account for _, receipt in self._journal.receipts()}
        if paid_by and account.account not in paid_by:
            raise RunFolderProblem(
                f"{self._folder.path}: account {', '.join(sorted(paid_by))} pays for it, and this key is "
                f"{account.account}'s; give a key of that account, or another --run-dir"
            )
        if account.run_posted != totals.charged_pictures:
            self._compare(books, within_seconds=within_seconds)
        self._journal.set_facts(account=account.account)
        self._account_is_known = True
        # Before it was stopped this run may have paid for more than its journal knows, and what is held may be its.
        paid = max(totals.charged_pictures, account.run_posted)
        missing = self._config.budget - paid - account.balance - account.held
        if missing > 0:
            self._console.warn(
                f"account {account.account} has {account.balance} pictures, {missing} fewer than --budget "
                f"{self._config.budget} needs; have it granted more meanwhile, or lower --budget"
            )

    def _let_go_of_the_account(self) -> None:
        """An account that had nothing to pay with, and paid for nothing, may be another one the next time."""
        books = self._books()
        if books is not None and self._journal.totals().charged_pictures == 0:
            with suppress(Failure):
                account = books.balance(self._journal.run_id, within_seconds=SUMMARY_SECONDS)
                if account.run_posted == account.held == 0:
                    self._journal.set_facts(account=None)

    def _packing(self) -> Packing:
        return Packing(self._config.image_encoding, self._config.image_quality, self._description.encodings)

    def _outbox(self, source: sources.Source, **of_a_phase: Any) -> outboxes.PoolOutbox:
        return outboxes.PoolOutbox(
            self._journal,
            source,
            self._door,
            self._description,
            budget=self._config.budget,
            batch_pictures=self._config.batch_pictures,
            counts_sent=self._counts_sent,
            message_bytes=self._connected().message_bytes,
            packing=self._packing(),
            warn=self._console.warn,
            **of_a_phase,
        )

    def _guide(self) -> TeachersConfidence:
        """Asks in phase 1, within the same budget, by the same outbox, gate and door."""
        return TeachersConfidence(
            self._journal,
            self._description,
            teacher=self._paid_for,
            outbox=lambda source, number: self._outbox(source, phase=guidance.PHASE, only_slot=number),
            make_gate=lambda generator: self._gate(generator, "under way"),
        )

    def _charged(self, totals: Totals) -> int:
        """What the budget bounds: answers that were paid for, or pictures sent where nobody but the agent counts."""
        return totals.sent_pictures if self._counts_sent else totals.charged_pictures

    def _pool(self, generator: PictureGenerator) -> Pool:
        """All answers that were paid for, balanced where the settings say so."""
        settings = self._config.distill
        pool = pools.load_pool(self._journal, generator, self._description, label_smoothing=settings.label_smoothing)
        try:
            return pool.balanced() if settings.balance_answers else pool
        except ValueError as error:
            raise BadInput(f"distill.balance_answers: {error}; set it to false") from None

    def _held_out(self, count: int) -> int:
        return int(count * self._config.held_out_fraction)

    def _student_facts(self) -> ModelFacts:
        channels = self._description.channels
        return ModelFacts(
            architecture=self._config.student,
            labels=self._description.labels,
            channels=channels,
            height=self._side,
            width=self._side,
            # pixels.normalise, said in the words of a model file
            mean=(0.5,) * channels,
            std=(0.5,) * channels,
            output="logits",
        )

    # --- the end ---

    def write_summary(self) -> dict[str, Any]:
        """Writes ``summary.json`` and returns it; null where something is not known."""
        balance: Balance | None = None
        asked = self._teacher is not None or self._journal.totals().planned_pictures > 0
        if asked and not self._counts_sent:
            with suppress(Exception):  # a summary is written even where the teacher is away
                books = self._books()
                assert books is not None
                balance = books.balance(self._journal.run_id, within_seconds=SUMMARY_SECONDS)
        by_phase = {phase: self._journal.totals(phase) for phase in PHASES}
        total = self._journal.totals()
        summary: dict[str, Any] = {
            "accuracy": {"teacher": None, "student": None, "student_adapted": None},
            "agreement": None,
            "agreement_synthetic": self._journal.fact("agreement_synthetic"),
            "held_out": self._journal.fact("held_out"),
            "queries": {
                "budget": self._config.budget,
                "charged": self._charged(total),
                **{phase: self._charged(totals) for phase, totals in by_phase.items()},
            },
            "answers": self._journal.bought(),
            "left_out": self._left_out(),
            "metered_by": self._metered_by,
            "ledger": {
                "debited": balance.run_posted if balance else None,
                "held": balance.held if balance else None,
                "balance": balance.balance if balance else None,
            },
            "bytes": {
                "sent": total.sent_bytes,
                "received": total.received_bytes,
                "by_phase": {
                    phase: {"sent": totals.sent_bytes, "received": totals.received_bytes}
                    for phase, totals in by_phase.items()
                },
            },
            "private_images_sent": self._private_images_sent(),
            "privacy": self._privacy.figures(),
            "run_id": self._journal.run_id,
            "seed": self._config.seed,
            "seconds": {phase: self._folder.seconds(phase) for phase in PHASES},
            "phases_done": [phase for phase in PHASES if self._journal.fact(f"done.{phase}") is not None],
        }
        self._folder.write_json("summary.json", summary)
        return summary

    def _left_out(self) -> int:
        """Pictures that were paid for and are of no use to training."""
        known = self._journal.fact("teacher")
        return 0 if known is None else pools.left_out(self._journal, Description.from_facts(known))

    def _private_images_sent(self) -> int | None:
        """Local pictures among all that was ever planned to be sent; None where no local picture is known."""
        if self._journal.totals().planned_pictures == 0:
            return 0
        if "_local" not in self.__dict__:  # the run ended before it read them
            return None
        try:
            door = self._door  # may read them once more, at another size
        except BadInput:  # which they have gone away from since
            return None
        return sum(door.matches(Batch.FromString(request)) for request in self._journal.requests())

    def close(self) -> None:
        """Closes the connection; the next question opens another."""
        if self._teacher is not None:
            self._teacher.close()
            self._teacher = None


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises BadInput."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(
            f"--device: expected auto, cpu, cuda or cuda:N that this machine has, got {name!r} ({first})"
        ) from None
    return device


@torch.inference_mode()
def predict_classes(student: nn.Module, images_NCHW: Tensor) -> Tensor:
    """Class indices (N,) for pictures (uint8); ``student`` in eval mode."""
    device = next(student.parameters()).device
    parts = [student(normalise(part.to(device))).argmax(1).cpu() for part in images_NCHW.split(EVALUATION_PICTURES)]
    return torch.cat(parts)


def agreement_with_answers(student: nn.Module, answered: Pool) -> float:
    """Share of pictures on which student and teacher name the same class."""
    answers_N = answered.class_indices_N
    if answers_N is None:
        assert answered.probabilities_NK is not None
        answers_N = answered.probabilities_NK.argmax(1)
    return float(np.mean((predict_classes(student, answered.images_NCHW) == answers_N).numpy()))
