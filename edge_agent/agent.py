"""One run, top-down: describe the teacher, read the local pictures, then the phases in their order.

The phases meet only through files in the run folder. Each records a digest of its inputs: what was finished on the
same inputs is not done again, changed training options train again on the answers already paid for, and a changed
generator or teacher needs a new folder.
"""

from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_agent import generators, guidance, sources
from edge_agent import outbox as outboxes
from edge_agent import pool as pools
from edge_agent.adaptation.adapter import Adapter
from edge_agent.adaptation.memory import VERSION as MEMORY_VERSION
from edge_agent.adaptation.memory import build_memory
from edge_agent.binding import Binding
from edge_agent.checks import check_budget, check_networks, check_questions, check_settings
from edge_agent.config import PHASES, RunConfig, as_layers, in_use
from edge_agent.console import Console
from edge_agent.dealings import SHORT_WAIT_SECONDS, Dealings
from edge_agent.deprivatize import train_generator
from edge_agent.diffusion import train_diffusion
from edge_agent.distill import Pool
from edge_agent.egress import CopiesStopped, CopyGate, PrivatePictureStopped
from edge_agent.failures import BadCredential, BadInput, BudgetSpent, DiskProblem, RunFolderProblem, TeacherAway
from edge_agent.generators import AnyGenerator, PictureGenerator
from edge_agent.guidance import TeachersConfidence
from edge_agent.local_pictures import LocalPictures
from edge_agent.mixes import mixed_pictures, train_mixes
from edge_agent.packing import Packing
from edge_agent.phase import Checkpoint, Progress
from edge_agent.pixels import normalise
from edge_agent.privacy_record import PrivacyRecord, attackers_parts
from edge_agent.runs import RunFolder, digest_of
from edge_agent.teacher import Description
from edge_agent.training import Lessons, assistant_of, refuse_runaway, student_of
from networks.mixes import Mixes
from networks.modelfile import ModelFacts

PARTS = {"ask": "distill"}
"""What may be called by itself, and the phase that it is the beginning of."""
EVALUATION_PICTURES = 256
MOST_SIGHTS = 300
"""How often a diffusion model may see each picture without a warning: a guess. Of 9,000 photographs seen 60 times 16
of 52,000 pictures were dropped; of 57 digits seen 900 times (one short run, width 32) 843 of 2,000."""


def run(config: RunConfig, phases: Sequence[str], *, api_key: str | None, console: Console) -> dict[str, Any]:
    """Runs `PHASES` or `PARTS` in a run folder and returns the summary, which is written however the run ends.

    Raises Failure (``failures``): what was paid for is kept, and the same call goes on.
    """
    with RunFolder(Path(config.run_dir)) as folder:
        agent = Agent(config, folder, api_key, console)
        prepared = stopped = False
        try:
            agent.prepare()
            prepared = True
            for phase in phases:
                with folder.clock(PARTS.get(phase, phase)):
                    getattr(agent, phase)()
            _reconcile(agent.dealings, folder, console)
        except BaseException as ended:
            stopped = not isinstance(ended, Exception)
            raise
        finally:
            summary: dict[str, Any] = {}
            with closing(agent.dealings), suppress(DiskProblem):
                # A command that was refused leaves the summary of the run that it is no part of.
                if prepared or not folder.has("summary.json"):
                    summary = agent.write_summary(in_a_hurry=stopped)
        return summary


def _reconcile(dealings: Dealings, folder: RunFolder, console: Console) -> None:
    """Compares the books, if they are there: a run whose phases are done has not failed where they are not."""
    try:
        dealings.reconcile()
    except (BadCredential, TeacherAway) as failure:
        if folder.journal.open_ids():
            raise
        console.warn(f"the books could not be compared, which the next start tries again: {failure}")


class Agent:
    """The state that the phases of one run share."""

    def __init__(self, config: RunConfig, folder: RunFolder, api_key: str | None, console: Console) -> None:
        self._config = config
        self._folder = folder
        self._journal = folder.journal
        self._console = console
        self._device = choose_device(config.device)
        # Each needs the other: who answers says how large the pictures are, and nothing is sent but by their door.
        self.dealings = Dealings(
            config, folder, api_key, console, check_egress=lambda batch: self._local.door.check(batch)
        )
        self._local = LocalPictures(config, folder, console, describe=lambda: self.dealings.description)
        self._binding = Binding(config, folder, console, dealings=self.dealings, local=self._local)
        self._privacy = PrivacyRecord(folder.journal, lambda: self._local.split)

    def prepare(self) -> None:
        """Reads teacher and pictures, and refuses a folder that belongs to another run."""
        check_networks(self._config)
        check_questions(self._config, phase_2_began=self._journal.slots(outboxes.PHASE) > 0)
        described, totals = self.dealings.description, self._journal.totals()
        check_settings(
            self._config,
            described,
            side=self._local.side,
            anything_asked=totals.planned_pictures > 0,
            console=self._console,
        )
        identity = self._binding.check()
        check_budget(self._config, totals, self._folder.path, counts_sent=self.dealings.counts_sent)
        self._packing()  # refuses an encoding that the teacher does not take, before anything is trained
        self._binding.keep(identity)
        self._folder.write_toml("run.toml", as_layers(self._config))

    # --- the phases ---

    def deprivatize(self) -> None:
        """Phase 1: local pictures but the reference in, ``generator.pt`` out. Asks for ``im_queries`` alone."""
        inputs = self._binding.generators_inputs()
        if self._folder.done("deprivatize", inputs) and self._folder.has("generator.pt"):
            self._console.say("deprivatize: done before")
            return
        if self.dealings.may_connect:
            try:
                self.dealings.check_account(within_seconds=SHORT_WAIT_SECONDS)
            except TeacherAway:
                # As if it had not been looked for: where nothing is asked, there is nothing to compare.
                self.dealings.close()
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
        paid = self._paid(generator)
        if left_out := self._left_out():
            self._console.warn(
                f"{left_out} pictures were paid for and are left out of training: what came back for them is no "
                "answer of this teacher's to the very pixels that were sent"
            )
        # What is held out stays as it was sold: it measures whether the student says what the teacher says.
        train, held_out = pools.split_pool(paid, self._held_out(len(paid)))
        train = self._balanced(train)
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
        if self._folder.has("student.pt"):
            former = self._folder.keep_former("student.pt")
            self._console.warn(
                f"the student in {self._folder.path} learnt with other settings or other answers: it is trained "
                f"anew, and what is there is kept as {former}"
            )
        self._begin("distill", "adapt")
        self._journal.set_facts(trained_on=self._answers_digest())
        lessons = Lessons(
            pool=train,
            facts=facts,
            config=self._config.distill,
            seed=self._config.seed,
            device=self._device,
            console=self._console,
            local_NCHW=self._local.images_NCHW,
            mixed_MCHW=mixed_pictures(generator, self._local.split[0]),
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
        local_NCHW = self._local.images_NCHW
        memory = build_memory(
            student,
            self._balanced(self._paid(self._generator())),
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

    # --- parts of phases ---

    def _train_generator(self, checkpoint: Checkpoint, progress: Progress) -> AnyGenerator:
        """Trains the kind of generator that was asked for, on all local pictures but the reference."""
        config = self._config.deprivatize
        training_NCHW, _ = self._local.split
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
        return train_generator(
            training_NCHW, class_count=len(self.dealings.description.labels), guide=guide, **shared
        )

    def _begin(self, *phases: str) -> None:
        """Takes back that phases are done: their results are of other inputs from here on."""
        self._journal.set_facts(**{f"done.{phase}": None for phase in phases})
        if "distill" in phases:
            self._journal.set_facts(agreement_synthetic=None, held_out=None)

    def _answers_digest(self) -> str:
        """Which answers were paid for so far."""
        return digest_of({"answers": sorted(self._journal.charges())})

    def _generator(self) -> AnyGenerator:
        if not self._folder.has("generator.pt"):
            raise RunFolderProblem(f"{self._folder.path}: expected generator.pt; run --phase deprivatize first")
        return generators.from_content(self._folder.read_tensors("generator.pt")).to(self._device)

    def _gate(self, generator: PictureGenerator, digest: str) -> CopyGate:
        """The gate for what this generator makes. Raises CopiesStopped."""
        inputs = digest_of({"generator": digest, "identity": self._binding.generators_inputs()})
        return self._privacy.gate(generator, inputs=inputs, seed=self._config.seed)

    def _buy(self) -> tuple[AnyGenerator, str]:
        """Asks what is not asked yet, and attacks what was sent. Returns what all of it is by, and its digest."""
        generator = self._generator()
        # Paid for with this one, a later deprivatize would put another in its place and make the answers worthless.
        if not self._folder.done("deprivatize", self._binding.generators_inputs()):
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
        side_parts = attackers_parts(self._config.deprivatize, side=self._local.side)
        self._privacy.attack(side_parts=side_parts, console=self._console)
        return generator, digest

    def _ask(self, generator: PictureGenerator, digest: str) -> None:
        totals = self._journal.totals()
        if self.dealings.charged(totals) >= self._config.budget:
            if unanswered := totals.planned_pictures - totals.charged_pictures:
                self._console.say(f"{unanswered} pictures were sent and never answered; the budget is used")
            return
        gate = self._gate(generator, digest)
        teacher = self.dealings.paying_teacher()
        outbox = self._outbox(sources.synthetic(generator, gate, seed=self._config.seed))
        try:
            with self._console.bar("distill: ask", "pictures") as tell:

                def progress(answered: int) -> None:
                    tell(answered, self._config.budget)
                    self._folder.keep_clocks()

                pools.fill_pool(teacher, self._journal, outbox, self.dealings.description, progress=progress)
        except BudgetSpent:
            self.dealings.let_go_of_the_account()
            raise

    def _or_train(self) -> str:
        """What may be done with answers of a run that buys no more; empty where there are none."""
        if self._journal.totals(outboxes.PHASE).charged_pictures == 0:
            return ""
        paid = self.dealings.charged(self._journal.totals())
        return f"; or give --budget {paid} to train on the answers that are paid"

    def _packing(self) -> Packing:
        return Packing(self._config.image_encoding, self._config.image_quality, self.dealings.description.encodings)

    def _outbox(self, source: sources.Source, **of_a_phase: Any) -> outboxes.PoolOutbox:
        return outboxes.PoolOutbox(
            self._journal,
            source,
            self._local.door,
            self.dealings.description,
            budget=self._config.budget,
            batch_pictures=self._config.batch_pictures,
            counts_sent=self.dealings.counts_sent,
            message_bytes=self.dealings.teacher().message_bytes,
            packing=self._packing(),
            warn=self._console.warn,
            **of_a_phase,
        )

    def _guide(self) -> TeachersConfidence:
        """Asks in phase 1, within the same budget, by the same outbox, gate and door."""
        return TeachersConfidence(
            self._journal,
            self.dealings.description,
            teacher=self.dealings.paying_teacher,
            outbox=lambda source, number: self._outbox(source, phase=guidance.PHASE, only_slot=number),
            make_gate=lambda generator: self._gate(generator, "under way"),
        )

    def _paid(self, generator: PictureGenerator) -> Pool:
        """All answers that were paid for, as they were sold."""
        return pools.load_pool(
            self._journal,
            generator,
            self.dealings.description,
            label_smoothing=self._config.distill.label_smoothing,
        )

    def _balanced(self, pool: Pool) -> Pool:
        """The same answers, balanced where the settings say so."""
        try:
            return pool.balanced() if self._config.distill.balance_answers else pool
        except ValueError as error:
            raise BadInput(f"distill.balance_answers: {error}; set it to false") from None

    def _held_out(self, count: int) -> int:
        return int(count * self._config.held_out_fraction)

    def _student_facts(self) -> ModelFacts:
        channels = self.dealings.description.channels
        return ModelFacts(
            architecture=self._config.student,
            labels=self.dealings.description.labels,
            channels=channels,
            height=self._local.side,
            width=self._local.side,
            # pixels.normalise, said in the words of a model file
            mean=(0.5,) * channels,
            std=(0.5,) * channels,
            output="logits",
        )

    # --- the end ---

    def write_summary(self, *, in_a_hurry: bool = False) -> dict[str, Any]:
        """Writes ``summary.json`` and returns it; null where something is not known.

        In a hurry, because a signal has ended the run, that is what all pictures would have to be decoded for: of
        50,000 large ones most of a minute, and whoever sent SIGTERM may not wait so long.
        """
        balance = self.dealings.balance()
        by_phase = {phase: self._journal.totals(phase) for phase in PHASES}
        total = self._journal.totals()
        summary: dict[str, Any] = {
            "accuracy": {"teacher": None, "student": None, "student_adapted": None},
            "agreement": None,
            "agreement_synthetic": self._journal.fact("agreement_synthetic"),
            "held_out": self._journal.fact("held_out"),
            "queries": {
                "budget": self._config.budget,
                "charged": self.dealings.charged(total),
                **{phase: self.dealings.charged(totals) for phase, totals in by_phase.items()},
            },
            "answers": self._journal.bought(),
            "left_out": None if in_a_hurry else self._left_out(),
            "metered_by": self.dealings.metered_by,
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
            "private_images_sent": None if in_a_hurry else self._local.count_sent(),
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
