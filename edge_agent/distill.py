"""Phase 2: train the student on the pool of synthetic pictures and the answers that were paid for.

Shape letters: N pictures, C channels, H and W height and width, K classes, L latent numbers.

Every picture is asked about once and then used many times: the student sees another view of it in each
pass, with the teacher's answer to the plain picture (a patient teacher, Beyer et al., CVPR 2022). The
schedule is fixed and the last average is the result; nothing is chosen by a score.

With `local_weight` above 0 local pictures take part, without labels, once the student has learnt something: it is
to say of a hard view what its average says of an easy one (FixMatch, Sohn et al., NeurIPS 2020), where that is sure.
In short runs on development pictures at half the side, local ones after a quarter of the steps, it took students from
97.6 to 98.0 % on MNIST (two seeds), and from 74.0 to 87.3 % where the pictures were made to look scanned otherwise,
past their teacher's 80.6 (one seed). In a longer run on stranger ones, answers balanced, a start half-way was better:
86.2, not 82.5 (74.8 without; one seed).
All local pictures train, the privacy reference too: that is about what is sent, and the student is not.

Where the pool's pictures are mixes, the device knows of which local ones. With `mosaic_fraction` above 0 the student
sees part of each batch as a mosaic of those themselves, in the same regions: the teacher's answer was to a blurred
copy, but what the student will be used on is not blurred. With `attributed_weight` above 0 it sees the local pictures
as a whole, too, each with its part of the answers to all its mixes (`responses.attributed`). Both are off: they make
a short training better, not a long one. CIFAR-10's development part, 50,000 answers, one seed: mixes alone 68.9 %
after 10 of 15 passes, 69.6 after 15 and 73.5 after 40; half mosaics 72.4 after 15; both 73.3 after 10 and 74.3 after
40, where the test part said 73.0 as it does of mixes alone. In place of the parts of the answers, after 10 passes:
FreeMatch's labels 69.6; a student's logits for both whole pictures in sum held against the answer to their mix 70.4;
parts that start from what a trained student says 71.2, though 82 % of those agree with the teacher, not 72 %.
What limits a ResNet8: trained on mixes alone it agrees with the teacher on 53 % of those mixes and on 53 % of others,
on 75 % of the local pictures and on 75 % of other ones. Mixes are too hard for it, and it overfits nothing. Trained
on the pictures themselves (cifar10-real-views, not private) it agrees on 92 and 80 %.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from edge_agent import augment, losses, responses
from edge_agent.config import DistillConfig
from edge_agent.phase import Checkpoint, Progress, Resumable
from edge_agent.pixels import normalise
from edge_agent.precision import training_precision
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

    def __post_init__(self) -> None:
        """Refuse a pool with both kinds of answer, or none, or parts of different length."""
        answers = [part for part in (self.probabilities_NK, self.class_indices_N) if part is not None]
        if len(answers) != 1:
            raise ValueError(f"answers: expected probabilities or class indices, got {len(answers)} of the two")
        counts = [len(self.images_NCHW), len(self.latents_NL), len(answers[0])]
        if self.epsilon_N1 is not None:
            counts.append(len(self.epsilon_N1))
        if len(set(counts)) != 1:
            raise ValueError(f"pool: expected as many pictures, latents and answers, got {counts}")

    def __len__(self) -> int:
        """Return how many pictures were asked about."""
        return len(self.images_NCHW)

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
        return self.epsilon_N1 if self.epsilon_N1 is not None else torch.full((len(self), 1), responses.EPSILON)


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
) -> Classifier:
    """Train `student` (pictures on the scale -1..1 to logits) and return its average, in eval mode on `device`.

    Per step: the divergence to the teacher's answer, plus `image_weight` times the distance between the
    generator's pictures of both answers, which needs a generator, plus `local_weight` times the loss on local
    pictures, which needs those (uint8, of the pool's size). `mixed_MCHW` are the local pictures that the pool's are
    mixes of, in the order of its plans, and seen as `mosaic_fraction` and `attributed_weight` say; None where there
    are none. Raises ValueError where `image_weight` or `local_weight` is above 0 and what it needs is missing.
    """
    student.to(device).to(memory_format=torch.channels_last).train()
    if generator is not None:
        generator.to(device).eval().requires_grad_(False)
    images_NCHW, latents_NL = pool.images_NCHW.to(device), pool.latents_NL.to(device)
    answers_NK, epsilon_N1 = pool.answers_as_probabilities(class_count).to(device), pool.epsilons().to(device)
    if config.local_weight == 0:
        local_NCHW = None
    elif local_NCHW is None:
        raise ValueError(f"local_weight: expected 0 without local pictures, got {config.local_weight}")
    else:
        local_NCHW = local_NCHW.to(device)
    mosaic_fraction, attributed_weight = config.mosaic_fraction, config.attributed_weight
    if mixed_MCHW is None or latents_NL.shape[1] == 0:  # no mixes, or some from before their plans were kept
        mosaic_fraction = attributed_weight = 0.0
    else:
        mixed_MCHW = mixed_MCHW.to(device)
    if mixed_MCHW is not None and attributed_weight > 0:
        picture_NR = pool.latents_NL.long() % len(mixed_MCHW)
        answers = pool.answers_as_probabilities(class_count)
        attributed_MK = responses.attributed(picture_NR, answers, len(mixed_MCHW)).to(device)
        in_mixes_X = picture_NR.unique()
    if len(pool) == 1:  # batch norm cannot train on a single number a channel
        images_NCHW, latents_NL, answers_NK, epsilon_N1 = (
            torch.cat([x, x]) for x in (images_NCHW, latents_NL, answers_NK, epsilon_N1)
        )
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )
    # Dropout can only draw from the global generator, so everything else does too: one state to keep.
    rng = torch.manual_seed(seed)
    # A pass leaves out what doesn't fill a batch, another part each time: batch norm wants batches alike.
    steps_a_pass = max(1, len(images_NCHW) // config.batch_count)
    steps = config.passes * steps_a_pass
    image_count = round(config.image_fraction * config.batch_count) if config.image_weight > 0 else 0
    if image_count > 0 and generator is None:
        raise ValueError(f"image_weight: expected 0 without a generator, got {config.image_weight}")

    training = Resumable(checkpoint, rng, student=student, averaged=averaged, optimizer=optimizer)
    while training.done < steps:
        place = training.done % steps_a_pass
        if place == 0:
            training.order = torch.randperm(len(images_NCHW), generator=rng)
        chosen = training.order[place * config.batch_count : (place + 1) * config.batch_count].to(device)
        optimizer.param_groups[0]["lr"] = config.learning_rate * rise_and_fall(
            training.done / steps, config.warmup_fraction
        )

        seen_NCHW = images_NCHW[chosen]
        if mixed_MCHW is not None and mosaic_fraction > 0:
            mosaic_count = round(mosaic_fraction * len(chosen))
            plan_NR = latents_NL[chosen[:mosaic_count]].long()
            seen_NCHW = torch.cat([mosaic(plan_NR, mixed_MCHW), seen_NCHW[mosaic_count:]])
        with training_precision(device):
            logits_NK = student(_students_view(seen_NCHW, config, rng)).float()
        loss = answer_loss(pool, answers_NK[chosen], logits_NK, config, epsilon_N1[chosen]).mean()
        figures = {"answer_loss": loss.item()}
        if generator is not None and image_count > 0:
            few = chosen[:image_count]
            noise_NE = latents_NL[few, class_count:]
            distance = image_loss(generator, answers_NK[few], logits_NK[:image_count], noise_NE).mean()
            figures["image_loss"] = distance.item()
            loss = loss + config.image_weight * distance
        if mixed_MCHW is not None and attributed_weight > 0:
            drawn = torch.randint(len(in_mixes_X), (config.local_batch_count,), generator=rng)
            whole = in_mixes_X[drawn].to(device)
            with training_precision(device):
                logits_NK = student(_students_view(mixed_MCHW[whole], config, rng)).float()
            # Not softened as answers are: what is left of other pictures in a part makes it flat enough.
            divergence_N = losses.kl_divergence(attributed_MK[whole], logits_NK / config.temperature)
            divergence = config.temperature**2 * divergence_N.mean()
            figures["attributed_loss"] = divergence.item()
            loss = loss + attributed_weight * divergence
        if local_NCHW is not None and training.done >= config.local_start_fraction * steps:
            local = torch.randint(len(local_NCHW), (config.local_batch_count,), generator=rng).to(device)
            consistency = local_loss(student, averaged, local_NCHW[local], config, rng).mean()
            figures["local_loss"] = consistency.item()
            loss = loss + config.local_weight * consistency
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        averaged.update_parameters(student)
        training.stepped()
        progress(training.done, steps, **figures)

    # The batch-norm statistics gathered on the way belong to other weights than the averaged ones. Where the student
    # was trained to read local pictures by their own statistics, those are what it is used with.
    learnt_local = local_NCHW is not None and steps - 1 >= config.local_start_fraction * steps
    update_bn(_batches(local_NCHW if local_NCHW is not None and learnt_local else images_NCHW), averaged)
    return cast(Classifier, averaged.module).eval()


def _students_view(images_NCHW: Tensor, config: DistillConfig, rng: torch.Generator) -> Tensor:
    """Bytes to what the student sees: another view each time."""
    view_NCHW = normalise(images_NCHW)
    if config.mirror:
        view_NCHW = augment.mirror(view_NCHW, rng=rng)
    return augment.shift(view_NCHW, largest_px=config.shift_px, rng=rng)


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


def _take_statistics_of_the_batch(model: nn.Module) -> None:
    """Dropout off, batch norm by the batch. The running statistics that this changes are set afresh at the end."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()


def answer_loss(
    pool: Pool,
    answers_NK: Tensor,
    logits_NK: Tensor,
    config: DistillConfig,
    epsilon: float | Tensor = responses.EPSILON,
) -> Tensor:
    """The divergence from a soft answer, or the cross-entropy to a hard one. Returns (N,).

    `epsilon`, a number or (N, 1): the smallest probability of a soft answer that a logarithm is taken of.
    """
    if pool.class_indices_N is not None:
        return losses.smoothed_cross_entropy(answers_NK.argmax(dim=1), logits_NK, config.label_smoothing)
    softened_NK = responses.soften(answers_NK, config.temperature, epsilon)
    return config.temperature**2 * losses.kl_divergence(softened_NK, logits_NK / config.temperature)


def image_loss(generator: Generator, answers_NK: Tensor, logits_NK: Tensor, noise_NE: Tensor) -> Tensor:
    """Distance between the pictures that both answers stand for, all else in the picture equal. Returns (N,).

    The generator is frozen; the gradient reaches the student through it. The teacher's picture needs none.
    """
    with training_precision(logits_NK.device):
        with torch.no_grad():
            wanted_NCHW = generator(responses.generator_input(answers_NK, noise_NE))
        got_NCHW = generator(responses.generator_input(logits_NK.softmax(dim=1), noise_NE))
    return losses.image_distance(got_NCHW.float(), wanted_NCHW.float())


def rise_and_fall(part_done: float, warmup_fraction: float) -> float:
    """Factor of the step size: a straight rise to 1, then half a cosine to 0."""
    if part_done < warmup_fraction:
        return part_done / warmup_fraction
    return 0.5 * (1.0 + math.cos(math.pi * (part_done - warmup_fraction) / (1.0 - warmup_fraction)))


def _batches(images_NCHW: Tensor) -> Iterator[Tensor]:
    for batch_NCHW in images_NCHW.tensor_split(math.ceil(len(images_NCHW) / _STATISTICS_BATCH_COUNT)):
        yield normalise(batch_NCHW)
