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
(All of this with views that had dark borders, see `_students_view`.) All local pictures train, the privacy reference
too: that is about what is sent, and the student is not.

Where the pool's pictures are mixes, the device knows of which local ones. With `mosaic_fraction` above 0 the student
sees part of each batch as a mosaic of those themselves, in the same regions: the teacher's answer was to a blurred
copy, but what the student will be used on is not blurred.

With `assistant` there is a larger network between teacher and student (Mirzadeh et al., AAAI 2020): `train_assistant`
makes it learn from the answers, and the student learns from it, too, what to say of local pictures, view by view, as
often as it likes. It stays on the device and costs no query. It is for students that are too small for mixes: a
ResNet8 trained on them agrees with the teacher on 53 % of mixes, seen or not, so it overfits nothing.

Where a student taught so is better on real pictures than its assistant, it makes a better one:
`assistant_generations`. CIFAR-10's development part, 10,000 pictures of a diffusion model after a quarter of its
training, answered by a copy of the teacher outside every row's budget, `balance_pictures`, 12 passes in batches
of 32, one run each, code not kept: ResNet20 53.1 %, a second one taught by the first 57.3; ResNet8 taught by the
first 56.0, by the second 58.3. Half of the local pictures mixed with each other (mixup): 55.5 in place of 56.0;
with an `assistant_weight` of 3: 55.3; 5,000 pictures tell such differences hardly from chance.

CIFAR-10's development part, 50,000 answers to mixes, half of them seen as mosaics, batches of 32, one seed: ResNet8
75.0 % after 10 passes and 80.6 after 40; ResNet20 83.0 after 15; ResNet8 taught by that one, too, 80.9 after 10. On
the test part: 79.4 after 40, and 81.2 after 20 with the assistant (rows cifar10-soft and cifar10-assistant).
The same with the pool of another seed, one run each, code not kept: ResNet20 81.0 % after 10 passes; a second one,
taught by it, 82.4 after 5, and both answering together 81.7; ResNet8 taught by the first 78.6 after 5, and 77.7 by
it alone, without the teacher's answers. At full length (row cifar10-generations) the second ResNet20 has 84.7 where
the first has 83.1, and the ResNet8 does not follow: 81.8, and 80.7 on the test part. What a ResNet8 lacks there is
no better assistant but time: after 60 passes in place of 20 it has 82.6, and 81.5 on the test part (row
cifar10-patient). A MobileNet follows the second ResNet20 closer: 83.7 after 20 passes, and 82.6 on the test part.
After 20 passes the ResNet8 agrees with its assistant on 91.5 % of the local pictures and on 89.1 % of the
development part's. Of 80.5 after 10 passes a weight decay of 1e-4 in place of 5e-4 made 80.7; learning rates of 0.04
and 0.25 in place of 0.1, 79.6 and 80.1; a temperature of 1 in place of 2, 80.1; and half of each answer to a mix what
the assistant says of the very view, 80.6. On the test part a ResNet8 that saw all 50,000 pictures and their labels
in 40 passes ends at 83.4 (row cifar10-supervised-all): there is little room left. With class indices the three have
79.1, 81.8 and 79.5 (row cifar10-hard-generations).
What came before, with dark borders and batches of 128, all after 10 passes and without an assistant: half mosaics and
each local picture with its part of the answers to all its mixes 73.3; FreeMatch's labels in their place 69.6; logits
of both whole pictures in sum held against the answer to their mix 70.4.
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
from edge_agent.phase import Checkpoint, Progress, Resumable, rise_and_fall
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
    if config.shift_px >= min(pool.images_NCHW.shape[2:]):
        raise ValueError(f"shift_px: expected less than the side of the pictures, got {config.shift_px}")
    image_count = 0
    if config.image_weight > 0 and config.image_fraction > 0:
        image_count = max(1, round(config.image_fraction * config.batch_count))
    if image_count > 0 and generator is None:
        raise ValueError(f"image_weight: expected 0 without a generator, got {config.image_weight}")
    if local_NCHW is None and assistant is not None:
        raise ValueError("expected local pictures for the assistant to answer, got none")
    if local_NCHW is None and config.local_weight > 0:
        raise ValueError(f"local_weight: expected 0 without local pictures, got {config.local_weight}")

    student.to(device).to(memory_format=torch.channels_last).train()
    if generator is not None:
        generator.to(device).eval().requires_grad_(False)
    if assistant is not None:
        assistant.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    images_NCHW, latents_NL = pool.images_NCHW.to(device), pool.latents_NL.to(device)
    answers_NK, epsilon_N1 = pool.answers_as_probabilities(class_count).to(device), pool.epsilons().to(device)
    if len(pool) == 1:  # batch norm cannot train on a single number a channel
        images_NCHW, latents_NL, answers_NK, epsilon_N1 = (
            torch.cat([x, x]) for x in (images_NCHW, latents_NL, answers_NK, epsilon_N1)
        )
    if assistant is None and config.local_weight == 0:
        local_NCHW = None
    elif local_NCHW is not None:
        local_NCHW = local_NCHW.to(device)
    if latents_NL.shape[1] == 0 or config.mosaic_fraction == 0:  # mixes from before their plans were kept, or no use
        mixed_MCHW = None
    elif mixed_MCHW is not None:
        mixed_MCHW = mixed_MCHW.to(device)
    weight_N = responses.balancing_weights(answers_NK).cpu() if config.balance_pictures else None
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
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
    # A pass leaves out what doesn't fill a batch, another part each time: batch norm wants batches alike.
    steps_a_pass = max(1, len(images_NCHW) // config.batch_count)
    steps = config.passes * steps_a_pass
    local_start = config.local_start_fraction * steps if config.local_weight > 0 else steps
    weights = {
        "answer_loss": 1.0,
        "image_loss": config.image_weight,
        "assisted_loss": config.assistant_weight,
        "local_loss": config.local_weight,
    }

    training = Resumable(checkpoint, rng, student=student, averaged=averaged, optimizer=optimizer)
    while training.goes_on(steps):
        place = training.done % steps_a_pass
        if place == 0:
            training.order = _order(len(images_NCHW), weight_N, rng)
        chosen = training.order[place * config.batch_count : (place + 1) * config.batch_count].to(device)
        optimizer.param_groups[0]["lr"] = config.learning_rate * rise_and_fall(
            training.done / steps, config.warmup_fraction
        )

        seen_NCHW = images_NCHW[chosen]
        if mixed_MCHW is not None:
            mosaic_count = round(config.mosaic_fraction * len(chosen))
            plan_NR = latents_NL[chosen[:mosaic_count]].long()
            seen_NCHW = torch.cat([mosaic(plan_NR, mixed_MCHW), seen_NCHW[mosaic_count:]])
        with training_precision(device):
            logits_NK = student(_students_view(seen_NCHW, config, rng)).float()
        found = {"answer_loss": answer_loss(pool, answers_NK[chosen], logits_NK, config, epsilon_N1[chosen])}
        if generator is not None and image_count > 0:
            few = chosen[:image_count]
            noise_NE = latents_NL[few, class_count:]
            found["image_loss"] = image_loss(generator, answers_NK[few], logits_NK[:image_count], noise_NE)
        if local_NCHW is not None and assistant is not None:
            few_NCHW = _some(local_NCHW, config.local_batch_count, rng)
            found["assisted_loss"] = assisted_loss(student, assistant, few_NCHW, config, rng)
        if local_NCHW is not None and training.done >= local_start:
            few_NCHW = _some(local_NCHW, config.local_batch_count, rng)
            found["local_loss"] = local_loss(student, averaged, few_NCHW, config, rng)
        means = {name: loss_N.mean() for name, loss_N in found.items()}
        loss = sum((weights[name] * mean for name, mean in means.items()), start=torch.zeros((), device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        averaged.update_parameters(student)
        training.stepped()
        progress(training.done, steps, **{name: mean.item() for name, mean in means.items()})

    # The batch-norm statistics gathered on the way belong to other weights than the averaged ones. Where the student
    # has labelled local pictures by their own statistics, those are what it is used with. With an assistant alone,
    # the pool's are: what the teacher said, it said of the pool, and such students were right more often by them
    # (CIFAR-10's development part, one seed each: mixes 80.8 and 80.5 %, diffusion 63.2 and 61.4).
    if local_NCHW is not None and local_start <= steps - 1:
        images_NCHW = local_NCHW
    elif weight_N is not None:  # as it saw them: 59.8 % for 58.7 with each once (diffusion, one student)
        images_NCHW = images_NCHW[_order(len(images_NCHW), weight_N, rng).to(device)]
    update_bn(_batches(images_NCHW), averaged)
    return cast(Classifier, averaged.module).eval()


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

    Nothing comes in at the edges that no picture has. Dark borders on most views, as there were before, and batch
    norm learns another kind of picture than the one whose statistics it is used with: on CIFAR-10's development part
    students that learnt so had 72.3, 63.8 and (a ResNet20) 79.0 % by the statistics of plain pictures, 78.3, 74.5 and
    82.3 by those of their views; the first, with views that reflect, 77.5 by either (10 and 15 passes, one seed).
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


def _batches(images_NCHW: Tensor) -> Iterator[Tensor]:
    for batch_NCHW in images_NCHW.tensor_split(math.ceil(len(images_NCHW) / _STATISTICS_BATCH_COUNT)):
        yield normalise(batch_NCHW)
