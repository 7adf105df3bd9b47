"""Phase 2: train the student on the pool of synthetic pictures and the answers that were paid for.

Shape letters: N pictures, C channels, H and W height and width, K classes, L latent numbers.

Every picture is asked about once and then used many times: the student sees another view of it in each
pass, with the teacher's answer to the plain picture (a patient teacher, Beyer et al., CVPR 2022). The
schedule is fixed and the last average is the result; nothing is chosen by a score.

With `local_weight` above 0 local pictures take part, without labels, once the student has learnt something: it is
to say of a hard view what its average says of an easy one (FixMatch, Sohn et al., NeurIPS 2020), where that is sure.
All local pictures train, the privacy reference too: that is about what is sent, and the student is not.

Where the pool's pictures are mixes, the device knows of which local ones. With `mosaic_fraction` above 0 the student
sees part of each batch as a mosaic of those themselves, in the same regions: the teacher's answer was to a blurred
copy, but what the student will be used on is not blurred.

With `assistant` there is a larger network between teacher and student (Mirzadeh et al., AAAI 2020): `train_assistant`
makes it learn from the answers, and the student learns from it, too, what to say of local pictures, view by view, as
often as it likes. It stays on the device and costs no query. It is for students that are too small for mixes: a
ResNet8 trained on them agrees with the teacher on 53 % of mixes, seen or not, so it overfits nothing. Where a student
taught so is better on real pictures than its assistant, it makes a better one: `assistant_generations`.

What each of these brought, and what was tried and dropped: docs/ablations.md.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from edge_agent import augment, losses, responses
from edge_agent.config import DistillConfig
from edge_agent.phase import Checkpoint, Progress, Resumable, average_of, rise_and_fall
from edge_agent.pixels import normalise
from edge_agent.precision import training_precision
from networks import registry
from networks.classifiers import Classifier
from networks.gan import Generator
from networks.mixes import mosaic

_STATISTICS_BATCH_COUNT = 256
# How much harder a view of a local picture is for the student than for its average.
_WARP_STRENGTH = 0.2
_RECOLOUR_STRENGTH = 0.3
_CUTOUT_FRACTION = 0.375


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What was asked and what was answered: exactly one of the two kinds of answer."""

    images_NCHW: Tensor
    """The pictures as the teacher saw them, uint8."""
    latents_NL: Tensor
    """What the generator made them of, float32 (`generators`)."""
    probabilities_NK: Tensor | None = None
    """Soft answers, float32."""
    class_indices_N: Tensor | None = None
    """Hard answers, int64."""
    epsilon_N1: Tensor | None = None
    """Of soft answers, the smallest probability that a logarithm is taken of (`responses.epsilon`), float32; None:
    `responses.EPSILON` everywhere."""
    is_index_N1: Tensor | None = None
    """Of soft answers, bool: which are made of an index, where the teacher sold both; None: none."""

    def __post_init__(self) -> None:
        """Refuse a pool with both kinds of answer, or none, or parts of different length."""
        answers = [part for part in (self.probabilities_NK, self.class_indices_N) if part is not None]
        if len(answers) != 1:
            raise ValueError(f"answers: expected probabilities or class indices, got {len(answers)} of the two")
        counts = [len(self.images_NCHW), len(self.latents_NL), len(answers[0])]
        counts += [len(part) for part in (self.epsilon_N1, self.is_index_N1) if part is not None]
        if len(set(counts)) != 1:
            raise ValueError(f"pool: expected as many pictures, latents and answers, got {counts}")

    def __len__(self) -> int:
        """Return how many pictures were asked about."""
        return len(self.images_NCHW)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Pool":
        """Return the pool with every part changed: moved to a device, say."""
        parts = {field.name: cast(Tensor | None, getattr(self, field.name)) for field in fields(self)}
        return replace(self, **{name: change(part) for name, part in parts.items() if part is not None})

    def answers_as_probabilities(self, class_count: int) -> Tensor:
        """Return the answers (N, K) float32; an index becomes a one at its place."""
        if self.probabilities_NK is not None:
            return self.probabilities_NK
        assert self.class_indices_N is not None
        return responses.one_hot(self.class_indices_N, class_count)

    def hardened(self) -> "Pool":
        """Return the pool with every answer reduced to the index of its largest probability."""
        if self.probabilities_NK is None:
            return self
        indices_N = self.probabilities_NK.argmax(dim=1)
        return Pool(images_NCHW=self.images_NCHW, latents_NL=self.latents_NL, class_indices_N=indices_N)

    def balanced(self) -> "Pool":
        """Return the pool with its probabilities balanced (`responses.balanced`). Raises ValueError for indices."""
        if self.probabilities_NK is None:
            raise ValueError("expected probabilities to balance, got class indices")
        silent_K = (self.probabilities_NK <= self.epsilons()).all(dim=0)
        if silent_K.any():
            raise ValueError(
                f"expected answers that tell every class from the others, but class {int(silent_K.nonzero()[0, 0])} "
                f"is in none of {len(self)}"
            )
        balanced_NK = responses.balanced(self.probabilities_NK, self.epsilons())
        return replace(self, probabilities_NK=balanced_NK, epsilon_N1=None)

    def epsilons(self) -> Tensor:
        """Return the smallest probability (N, 1) that a logarithm is taken of."""
        if self.epsilon_N1 is not None:
            return self.epsilon_N1
        return torch.full((len(self), 1), responses.EPSILON, device=self.images_NCHW.device)


@torch.random.fork_rng(devices=[])  # gives torch's global generator back as it was
def train_student(
    student: Classifier,
    generator: Generator | None,
    pool: Pool,
    *,
    class_count: int,
    config: DistillConfig,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint,
    progress: Progress,
    local_NCHW: Tensor | None = None,
    mixed_MCHW: Tensor | None = None,
    assistant: Classifier | None = None,
) -> Classifier:
    """Train `student` (pictures on the scale -1..1 to logits) and return its average, in eval mode on `device`.

    Per step: the divergence to the teacher's answer, plus `image_weight` times the distance between the
    generator's pictures of both answers, which needs a generator, plus `local_weight` times the loss on local
    pictures, which needs those (uint8, of the pool's size), plus, with an `assistant`, `assistant_weight` times the
    divergence to its answers on local pictures. `mixed_MCHW` are the local pictures that the pool's are mixes of, in
    the order of its plans, and seen as `mosaic_fraction` says; None where there are none. Raises ValueError where
    `image_weight` or `local_weight` is above 0, or there is an assistant, and what it needs is missing.
    """
    _refuse_what_lacks(config, pool, generator, local_NCHW, assistant)
    student.to(device).to(memory_format=torch.channels_last).train()
    if generator is not None:
        generator.to(device).eval().requires_grad_(False)
    if assistant is not None:
        assistant.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    pool = pool.each(lambda part: part.to(device))
    if len(pool) == 1:  # batch norm cannot train on a single number a channel
        pool = pool.each(lambda part: torch.cat([part, part]))
    averaged = average_of(student, decay=config.ema_decay)
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )
    # Dropout can only draw from the global generator, so everything else does too: one state to keep. On a GPU
    # dropout has a generator of its own: there a network with it (VGG) that was interrupted ends a little otherwise.
    rng = torch.manual_seed(seed)
    needs_local = assistant is not None or config.local_weight > 0
    lesson = _Lesson(
        student=student,
        averaged=averaged,
        generator=generator,
        assistant=assistant,
        pool=pool,
        class_count=class_count,
        local_NCHW=local_NCHW.to(device) if local_NCHW is not None and needs_local else None,
        mixed_MCHW=mixed_MCHW.to(device) if mixed_MCHW is not None and config.mosaic_fraction > 0 else None,
        config=config,
        rng=rng,
    )
    weight_N = None
    if config.balance_pictures:
        weight_N = responses.balancing_weights(pool.answers_as_probabilities(class_count)).cpu()
    # A pass leaves out what doesn't fill a batch, another part each time: batch norm wants batches alike.
    steps_a_pass = max(1, len(pool) // config.batch_count)
    steps = config.passes * steps_a_pass
    local_start = config.local_start_fraction * steps if config.local_weight > 0 else steps

    training = Resumable(checkpoint, rng, student=student, averaged=averaged, optimizer=optimizer)
    while training.goes_on(steps):
        place = training.done % steps_a_pass
        if place == 0:
            training.order = _order(len(pool), weight_N, rng)
        chosen = training.order[place * config.batch_count : (place + 1) * config.batch_count].to(device)
        optimizer.param_groups[0]["lr"] = config.learning_rate * rise_and_fall(
            training.done / steps, config.warmup_fraction
        )

        loss, parts = lesson.loss(chosen, with_local=training.done >= local_start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        averaged.update_parameters(student)
        training.stepped()
        progress(training.done, steps, **{name: mean.item() for name, mean in parts.items()})

    # The batch-norm statistics gathered on the way belong to other weights than the averaged ones. Where the student
    # has labelled local pictures by their own statistics, those are what it is used with. With an assistant alone,
    # the pool's are: what the teacher said, it said of the pool, and such students were right more often by them.
    images_NCHW = pool.images_NCHW
    if lesson.local_NCHW is not None and local_start <= steps - 1:
        images_NCHW = lesson.local_NCHW
    elif weight_N is not None:  # each as often as the student saw it
        images_NCHW = images_NCHW[_order(len(images_NCHW), weight_N, rng).to(device)]
    update_bn(_batches(images_NCHW), averaged)
    return cast(Classifier, averaged.module).eval()


def _refuse_what_lacks(
    config: DistillConfig,
    pool: Pool,
    generator: Generator | None,
    local_NCHW: Tensor | None,
    assistant: Classifier | None,
) -> None:
    if config.shift_px >= min(pool.images_NCHW.shape[2:]):
        raise ValueError(f"shift_px: expected less than the side of the pictures, got {config.shift_px}")
    if _image_count(config) > 0 and generator is None:
        raise ValueError(f"image_weight: expected 0 without a generator, got {config.image_weight}")
    if local_NCHW is None and assistant is not None:
        raise ValueError("expected local pictures for the assistant to answer, got none")
    if local_NCHW is None and config.local_weight > 0:
        raise ValueError(f"local_weight: expected 0 without local pictures, got {config.local_weight}")


def _image_count(config: DistillConfig) -> int:
    """Of how many pictures in a batch the generator's pictures of both answers are compared."""
    if config.image_weight == 0 or config.image_fraction == 0:
        return 0
    return max(1, round(config.image_fraction * config.batch_count))


@dataclass(frozen=True, kw_only=True)
class _Lesson:
    """What a student learns from, all on its device; `train_student` says what it is."""

    student: Classifier
    averaged: nn.Module
    generator: Generator | None
    assistant: Classifier | None
    pool: Pool
    class_count: int
    local_NCHW: Tensor | None
    mixed_MCHW: Tensor | None
    config: DistillConfig
    rng: torch.Generator

    def loss(self, chosen: Tensor, *, with_local: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a step's loss on the chosen pictures of the pool and its parts by name, unweighed; all numbers."""
        config, asked = self.config, self.pool.each(lambda part: part[chosen])
        with training_precision(chosen.device):
            logits_NK = self.student(_students_view(self._seen(asked), config, self.rng)).float()
        divergence_N = answer_loss(asked, logits_NK, config)
        weighed = [("answer_loss", 1.0, divergence_N)]
        image_count = _image_count(config)
        if self.generator is not None and image_count > 0:
            few = asked.each(lambda part: part[:image_count])
            answers_NK, noise_NE = (
                few.answers_as_probabilities(self.class_count),
                few.latents_NL[:, self.class_count :],
            )
            distance_N = image_loss(self.generator, answers_NK, logits_NK[:image_count], noise_NE)
            weighed.append(("image_loss", config.image_weight, distance_N))
        if self.local_NCHW is not None and self.assistant is not None:
            few_NCHW = _some(self.local_NCHW, config.local_batch_count, self.rng)
            assisted_N = assisted_loss(self.student, self.assistant, few_NCHW, config, self.rng)
            weighed.append(("assisted_loss", config.assistant_weight, assisted_N))
        if self.local_NCHW is not None and with_local:
            few_NCHW = _some(self.local_NCHW, config.local_batch_count, self.rng)
            disagreement_N = local_loss(self.student, self.averaged, few_NCHW, config, self.rng)
            weighed.append(("local_loss", config.local_weight, disagreement_N))
        means = [(name, weight, loss_N.mean()) for name, weight, loss_N in weighed]
        loss = sum((weight * mean for _, weight, mean in means), start=torch.zeros((), device=chosen.device))
        return loss, {name: mean.detach() for name, _, mean in means}

    def _seen(self, asked: Pool) -> Tensor:
        """Pictures that were asked about (N, C, H, W) uint8, part of them as mosaics where they are such mixes."""
        images_NCHW, plan_NR = asked.images_NCHW, asked.latents_NL
        # Without numbers they are mixes from before their plans were kept.
        if self.mixed_MCHW is None or plan_NR.shape[1] == 0:
            return images_NCHW
        count = round(self.config.mosaic_fraction * len(asked))
        return torch.cat([mosaic(plan_NR[:count].long(), self.mixed_MCHW), images_NCHW[count:]])


def train_assistant(
    pool: Pool,
    *,
    class_count: int,
    config: DistillConfig,
    seed: int,
    device: torch.device,
    checkpoint: Checkpoint,
    progress: Progress,
    local_NCHW: Tensor | None = None,
    mixed_MCHW: Tensor | None = None,
    before: Classifier | None = None,
) -> Classifier:
    """Train the network that `config.assistant` names, as `train_student` does; `before`: its own assistant, if any.

    The first learns from the answers alone. `config` is the student's (`assistants_own`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = registry.build(config.assistant, class_count=class_count, channels=pool.images_NCHW.shape[1])
    return train_student(
        network,
        None,
        pool,
        class_count=class_count,
        config=assistants_own(config, first=before is None),
        seed=seed,
        device=device,
        checkpoint=checkpoint,
        progress=progress,
        local_NCHW=local_NCHW,
        mixed_MCHW=mixed_MCHW,
        assistant=before,
    )


def assistants_own(config: DistillConfig, *, first: bool) -> DistillConfig:
    """The settings of an assistant's training: the student's, but for what that one alone learns from."""
    return replace(
        config,
        passes=config.assistant_passes,
        assistant="" if first else config.assistant,
        assistant_generations=1,
        image_weight=0.0,
        image_fraction=0.0,
        local_weight=0.0,
    )


def _order(count: int, weight_N: Tensor | None, rng: torch.Generator) -> Tensor:
    """Which pictures a pass goes through: each once, or each as often as it weighs, rounded up or down by chance."""
    order_N = torch.randperm(count, generator=rng)
    if weight_N is None:
        return order_N
    upto_N = weight_N.double().cumsum(0)
    upto_N = upto_N * (count / upto_N[-1]) + torch.rand((), generator=rng, dtype=torch.float64)
    upto_N[-1] = count  # whatever rounding made of it
    times_N = upto_N.long().diff(prepend=torch.zeros(1, dtype=torch.int64))
    return torch.repeat_interleave(times_N, output_size=count)[order_N]


def _some(images_NCHW: Tensor, count: int, rng: torch.Generator) -> Tensor:
    return images_NCHW[torch.randint(len(images_NCHW), (count,), generator=rng).to(images_NCHW.device)]


def _students_view(images_NCHW: Tensor, config: DistillConfig, rng: torch.Generator) -> Tensor:
    """Bytes to what the student sees: another view each time.

    Nothing comes in at the edges that no picture has: with dark borders on most views batch norm learns another kind
    of picture than the one whose statistics it is used with, and students of photographs lose 3 to 11 points
    (docs/ablations.md).
    """
    view_NCHW = normalise(images_NCHW)
    if config.mirror:
        view_NCHW = augment.mirror(view_NCHW, rng=rng)
    return augment.shift(view_NCHW, largest_px=config.shift_px, rng=rng, reflect=True)


def local_loss(
    student: Classifier, averaged: nn.Module, images_NCHW: Tensor, config: DistillConfig, rng: torch.Generator
) -> Tensor:
    """The student's disagreement on hard views with what its average says of easy ones (FixMatch). Returns (N,).

    Both see local pictures (uint8) in a pass without synthetic ones, so that batch norm takes each kind by its own
    statistics. The average learns nothing here: its labels have no gradient.
    """
    easy_NCHW = _students_view(images_NCHW, config, rng)
    hard_NCHW = augment.warp(_students_view(images_NCHW, config, rng), strength=_WARP_STRENGTH, rng=rng)
    hard_NCHW = augment.recolour(hard_NCHW, strength=_RECOLOUR_STRENGTH, rng=rng)
    hard_NCHW = augment.cutout(hard_NCHW, fraction=_CUTOUT_FRACTION, rng=rng)
    _take_statistics_of_the_batch(averaged)
    with training_precision(images_NCHW.device):
        with torch.no_grad():
            labels_NK = averaged(easy_NCHW).float().softmax(dim=1)
        logits_NK = student(hard_NCHW).float()
    return losses.pseudo_label_loss(labels_NK, logits_NK)


def assisted_loss(
    student: Classifier, assistant: Classifier, images_NCHW: Tensor, config: DistillConfig, rng: torch.Generator
) -> Tensor:
    """The divergence from what the assistant says of the same view of local pictures (uint8). Returns (N,)."""
    view_NCHW = _students_view(images_NCHW, config, rng)
    with training_precision(images_NCHW.device):
        with torch.no_grad():
            answers_NK = (assistant(view_NCHW).float() / config.temperature).softmax(dim=1)
        logits_NK = student(view_NCHW).float()
    return config.temperature**2 * losses.kl_divergence(answers_NK, logits_NK / config.temperature)


def _take_statistics_of_the_batch(model: nn.Module) -> None:
    """Dropout off, batch norm by the batch. The running statistics that this changes are set afresh at the end."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()


def answer_loss(asked: Pool, logits_NK: Tensor, config: DistillConfig) -> Tensor:
    """The divergence from soft answers, or the cross-entropy to hard ones. Returns (N,).

    An index says nothing of the other classes: soft answers that are made of one are not softened any further.
    """
    if asked.class_indices_N is not None:
        return losses.smoothed_cross_entropy(asked.class_indices_N, logits_NK, config.label_smoothing)
    assert asked.probabilities_NK is not None
    if asked.is_index_N1 is None:
        softened_NK = responses.soften(asked.probabilities_NK, config.temperature, asked.epsilons())
        return config.temperature**2 * losses.kl_divergence(softened_NK, logits_NK / config.temperature)
    temperature_N1 = torch.where(asked.is_index_N1, 1.0, config.temperature)
    softened_NK = responses.soften(asked.probabilities_NK, temperature_N1, asked.epsilons())
    return temperature_N1[:, 0] ** 2 * losses.kl_divergence(softened_NK, logits_NK / temperature_N1)


def image_loss(generator: Generator, answers_NK: Tensor, logits_NK: Tensor, noise_NE: Tensor) -> Tensor:
    """Distance between the pictures that both answers stand for, all else in the picture equal. Returns (N,).

    The generator is frozen; the gradient reaches the student through it. The teacher's picture needs none.
    """
    with training_precision(logits_NK.device):
        with torch.no_grad():
            wanted_NCHW = generator(responses.generator_input(answers_NK, noise_NE))
        got_NCHW = generator(responses.generator_input(logits_NK.softmax(dim=1), noise_NE))
    return losses.image_distance(got_NCHW.float(), wanted_NCHW.float())


def _batches(images_NCHW: Tensor) -> Iterator[Tensor]:
    for batch_NCHW in images_NCHW.tensor_split(math.ceil(len(images_NCHW) / _STATISTICS_BATCH_COUNT)):
        yield normalise(batch_NCHW)
