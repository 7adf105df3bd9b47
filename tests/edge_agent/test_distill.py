import dataclasses
import math
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from edge_agent import distill, responses
from edge_agent.config import DistillConfig
from edge_agent.distill import Pool, train_student
from edge_agent.pixels import normalise
from networks import registry
from networks.classifiers import Classifier
from networks.gan import Generator
from tests.edge_agent.phase_parts import Keep, silent

CPU = torch.device("cpu")
SMALL = DistillConfig(passes=4, batch_count=16)
MOSAICS = dataclasses.replace(SMALL, mosaic_fraction=0.5)
BALANCED = dataclasses.replace(SMALL, balance_pictures=True)
WITH_LOCAL = dataclasses.replace(SMALL, local_weight=1.0, local_batch_count=8)


class Tiny(Classifier):
    """A student with everything that keeps a state: batch norm, and dropout with its random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(8 * 16, 2)

    def features(self, images_NCHW: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(self.norm(self.conv1(images_NCHW)).relu().flatten(1)))


@torch.random.fork_rng(devices=[])
def tiny_student() -> Tiny:
    torch.manual_seed(3)
    return Tiny()


@torch.random.fork_rng(devices=[])
def small_generator() -> Generator:
    torch.manual_seed(4)
    generator = Generator(class_count=2, noise_count=3, side=8, channels=1, width=4)
    return generator.eval().requires_grad_(False)


def two_kinds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures, bright on the left (class 0) or on the right (class 1)."""
    rng = torch.Generator().manual_seed(seed)
    classes_N = torch.arange(count) % 2
    images_NCHW = torch.randint(0, 120, (count, 1, 8, 8), generator=rng)
    images_NCHW[classes_N == 0, :, :, :4] += 100
    images_NCHW[classes_N == 1, :, :, 4:] += 100
    return images_NCHW.to(torch.uint8), classes_N


def local() -> Tensor:
    return two_kinds(40, seed=9)[0]


def pool(*, hard: bool = False) -> Pool:
    images_NCHW, classes_N = two_kinds(72, seed=0)
    latents_NL = torch.randn(72, 5, generator=torch.Generator().manual_seed(1))
    if hard:
        return Pool(images_NCHW=images_NCHW, latents_NL=latents_NL, class_indices_N=classes_N)
    probabilities_NK = 0.1 + 0.8 * nn.functional.one_hot(classes_N, 2).float()
    return Pool(images_NCHW=images_NCHW, latents_NL=latents_NL, probabilities_NK=probabilities_NK)


def train(
    config: DistillConfig = SMALL,
    *,
    student: Classifier | None = None,
    hard: bool = False,
    seed: int = 0,
    checkpoint: Keep | None = None,
    answers: Pool | None = None,
    local_NCHW: Tensor | None = None,
    mixed_MCHW: Tensor | None = None,
    assistant: Classifier | None = None,
) -> Classifier:
    return train_student(
        student or tiny_student(),
        small_generator(),
        answers or pool(hard=hard),
        class_count=2,
        config=config,
        seed=seed,
        device=CPU,
        checkpoint=checkpoint or Keep(),
        progress=silent,
        local_NCHW=local_NCHW,
        mixed_MCHW=mixed_MCHW,
        assistant=assistant,
    )


@pytest.mark.parametrize("hard", [False, True])
def test_student_learns_the_answers(hard: bool) -> None:
    config = DistillConfig(passes=20, batch_count=16, shift_px=0, ema_decay=0.9)
    images_NCHW, classes_N = two_kinds(200, seed=5)
    student = train(config, hard=hard)
    probabilities_NK = student(normalise(images_NCHW)).softmax(dim=1)
    assert probabilities_NK.argmax(dim=1).equal(classes_N)
    # It learns how sure the teacher was, too: 0.9, and for an index 1 less the smoothing's half.
    sure = probabilities_NK.amax(dim=1).mean().item()
    assert sure == pytest.approx(0.95 if hard else 0.9, abs=0.03)


# Within a pass and at its end; before the first step with local pictures, at it, and after it.
@pytest.mark.parametrize(
    ("config", "stop_after"),
    [(SMALL, 3), (SMALL, 4), (WITH_LOCAL, 5), (WITH_LOCAL, 8), (WITH_LOCAL, 11), (BALANCED, 3)],
)
def test_interrupted_and_resumed_training_gives_the_same_bits(config: DistillConfig, stop_after: int) -> None:
    expected = train(config, local_NCHW=local()).state_dict()
    keep = Keep(stop_after)
    with pytest.raises(InterruptedError):
        train(config, checkpoint=keep, local_NCHW=local())
    torch.manual_seed(12345)  # another process has another global state
    resumed = train(config, student=Tiny(), checkpoint=keep, local_NCHW=local()).state_dict()
    assert keep.saved == 16  # 72 pictures are 4 full batches a pass
    assert all(resumed[name].equal(expected[name]) for name in expected)


def test_seed_decides_the_weights_and_torchs_global_state_neither_matters_nor_changes() -> None:
    students = [tiny_student(), tiny_student(), tiny_student()]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = train(student=students[0]).state_dict()
    assert torch.rand(1).equal(expected)
    second = train(student=students[1]).state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    assert not train(student=students[2], seed=1).linear.weight.equal(first["linear.weight"])


def test_result_is_the_average_in_eval_mode_and_not_the_last_student() -> None:
    student = tiny_student()
    averaged = train(student=student)
    assert not averaged.training
    assert not averaged.linear.weight.equal(student.linear.weight)


def test_the_average_of_a_short_training_has_forgotten_the_untrained_weights() -> None:
    student = tiny_student()
    untrained_KD = student.linear.weight.detach().clone()
    averaged = train(DistillConfig(passes=8, batch_count=16, image_weight=0.0), student=student)
    trained_KD = student.linear.weight
    assert (averaged.linear.weight - trained_KD).norm() < 0.2 * (untrained_KD - trained_KD).norm()


def test_batch_norm_statistics_are_those_of_the_pool_under_the_averaged_weights() -> None:
    student = cast(Tiny, train())
    mean_C = student.conv1(normalise(pool().images_NCHW)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(student.norm.running_mean, mean_C, atol=1e-5, rtol=0)


def test_the_students_views_have_the_statistics_of_the_pictures() -> None:
    """Or batch norm, which learns on views and is used on pictures, would be used on another kind of picture."""
    bright_NCHW = (200 + 20 * torch.randn(400, 1, 16, 16, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    config = DistillConfig(shift_px=4)
    view_NCHW = distill._students_view(bright_NCHW, config, torch.Generator().manual_seed(1))
    seen, used = view_NCHW, normalise(bright_NCHW)
    assert abs(seen.mean() - used.mean()) < 0.01 and abs(seen.std() / used.std() - 1) < 0.02


def test_batch_norm_statistics_are_those_of_local_pictures_where_these_took_part() -> None:
    student = cast(Tiny, train(WITH_LOCAL, local_NCHW=local() // 2))
    mean_C = student.conv1(normalise(local() // 2)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(student.norm.running_mean, mean_C, atol=1e-5, rtol=0)


def test_batch_norm_statistics_are_those_of_the_pool_where_only_an_assistant_spoke_of_local_pictures() -> None:
    config = dataclasses.replace(SMALL, image_weight=0.0, local_batch_count=8)
    student = cast(Tiny, train(config, local_NCHW=local() // 2, assistant=Sure()))
    mean_C = student.conv1(normalise(pool().images_NCHW)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(student.norm.running_mean, mean_C, atol=1e-5, rtol=0)


def test_local_pictures_that_are_switched_off_change_no_bit() -> None:
    expected, given = train().state_dict(), train(local_NCHW=local()).state_dict()
    assert all(given[name].equal(expected[name]) for name in expected)


def test_local_pictures_take_part_after_the_first_steps_as_many_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def noting(student: Any, averaged: Any, images_NCHW: Tensor, *parts: Any) -> Tensor:
        seen.append(images_NCHW)
        return torch.zeros(len(images_NCHW))

    monkeypatch.setattr(distill, "local_loss", noting)
    train(dataclasses.replace(WITH_LOCAL, local_start_fraction=0.25), local_NCHW=local())
    assert [len(images_NCHW) for images_NCHW in seen] == [8] * 12  # all of 16 steps but the first quarter
    theirs = {image.numpy().tobytes() for image in local()}
    assert all(image.numpy().tobytes() in theirs for images_NCHW in seen for image in images_NCHW)


def test_labels_of_local_pictures_are_read_by_the_batchs_statistics_and_without_dropout() -> None:
    student, averaged = tiny_student(), tiny_student()
    averaged.norm.running_mean = torch.full((8,), 100.0)  # of other pictures: must not matter
    config = dataclasses.replace(WITH_LOCAL, shift_px=0)
    images_NCHW, rng = local(), torch.Generator().manual_seed(0)
    labels_NK = cast(Tensor, None)

    def noting(probabilities_NK: Tensor, logits_NK: Tensor) -> Tensor:
        nonlocal labels_NK
        labels_NK = probabilities_NK
        return logits_NK.sum(dim=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "training_precision", lambda device: nullcontext())
        patch.setattr(distill.losses, "pseudo_label_loss", noting)
        loss_N = distill.local_loss(student, averaged, images_NCHW, config, rng)
    x = averaged.conv1(normalise(images_NCHW))
    x = nn.functional.batch_norm(x, None, None, averaged.norm.weight, averaged.norm.bias, training=True)
    torch.testing.assert_close(labels_NK, averaged.linear(x.relu().flatten(1)).softmax(dim=1))
    loss_N.sum().backward()
    assert student.linear.weight.grad is not None and averaged.linear.weight.grad is None


def test_local_pictures_help_a_student_whose_teacher_is_often_wrong() -> None:
    answers, wrong_N = pool(), torch.rand(72, generator=torch.Generator().manual_seed(2)) < 0.4
    probabilities_NK = cast(Tensor, answers.probabilities_NK).clone()
    probabilities_NK[wrong_N] = probabilities_NK[wrong_N].flip(1)
    noisy = dataclasses.replace(answers, probabilities_NK=probabilities_NK)
    images_NCHW, classes_N = two_kinds(200, seed=5)
    right = []
    for weight in (0.0, 1.0):
        config = DistillConfig(passes=20, batch_count=16, shift_px=0, ema_decay=0.9, local_weight=weight)
        student = train(config, answers=noisy, local_NCHW=two_kinds(100, seed=6)[0])
        right.append((student(normalise(images_NCHW)).argmax(dim=1) == classes_N).float().mean().item())
    assert right[1] > right[0] + 0.05


def blurred_mixes(count: int = 320) -> tuple[Pool, Tensor]:
    """A pool that shows nothing but grey, of local pictures that show what was answered; and those, half mirrored."""
    mixed_MCHW, classes_M = two_kinds(40, seed=9)
    rng = torch.Generator().manual_seed(6)
    picture_N, mirrored_N = (torch.randint(most, (count,), generator=rng) for most in (40, 2))
    plan_NR = (picture_N + 40 * mirrored_N)[:, None].expand(-1, 4)  # all four regions are of one picture
    classes_N = (classes_M[picture_N] + mirrored_N) % 2  # mirrored, bright on the other side
    grey_NCHW = torch.full((count, 1, 8, 8), 128, dtype=torch.uint8)
    return Pool(images_NCHW=grey_NCHW, latents_NL=plan_NR.float(), class_indices_N=classes_N), mixed_MCHW


def test_the_student_sees_mosaics_of_the_pictures_that_the_mixes_are_of() -> None:
    answers, mixed_MCHW = blurred_mixes()
    images_NCHW, classes_N = two_kinds(200, seed=5)

    def right(fraction: float) -> float:
        config = DistillConfig(passes=8, batch_count=16, shift_px=0, image_weight=0, mosaic_fraction=fraction)
        student = train(config, answers=answers, mixed_MCHW=mixed_MCHW).train()  # by the statistics of what it reads
        return float(student(normalise(images_NCHW)).argmax(1).eq(classes_N).float().mean())

    assert right(0.5) > 0.95 and right(1.0) > 0.95
    assert right(0.0) < 0.9


class Sure(Tiny):
    """Says of a picture that is bright on the left 0.9 to 0.1, and the other way round of the others."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        brighter_N = images_NCHW[..., :4].mean((1, 2, 3)) - images_NCHW[..., 4:].mean((1, 2, 3))
        return torch.stack([brighter_N.sign(), -brighter_N.sign()], dim=1) * 0.5 * math.log(9)


ASSISTED = DistillConfig(passes=20, batch_count=16, shift_px=0, ema_decay=0.9, image_weight=0, local_batch_count=16)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_the_assistant_says_of_local_pictures_is_learnt_and_as_surely(temperature: float) -> None:
    grey_NCHW = torch.full((72, 1, 8, 8), 128, dtype=torch.uint8)  # nothing to learn from what was asked
    answers = dataclasses.replace(pool(), images_NCHW=grey_NCHW)
    config = dataclasses.replace(ASSISTED, temperature=temperature)
    student = train(config, answers=answers, local_NCHW=local(), assistant=Sure()).train()
    images_NCHW, classes_N = two_kinds(200, seed=5)
    probabilities_NK = student(normalise(images_NCHW)).softmax(dim=1)  # by their own statistics; the pool's are grey
    assert probabilities_NK.argmax(dim=1).equal(classes_N)
    assert probabilities_NK.amax(dim=1).mean().item() == pytest.approx(0.9, abs=0.03)


def test_the_assistants_weight_counts() -> None:
    """The teacher's answers say the opposite: who is believed is a matter of the weight."""
    opposite_NK = cast(Tensor, pool().probabilities_NK).flip(1)
    answers = dataclasses.replace(pool(), probabilities_NK=opposite_NK)
    images_NCHW, classes_N = two_kinds(200, seed=5)
    for weight in (5.0, 0.2):
        config = dataclasses.replace(ASSISTED, assistant_weight=weight, learning_rate=0.02)
        student = train(config, answers=answers, local_NCHW=local(), assistant=Sure())
        right = student(normalise(images_NCHW)).argmax(1).eq(classes_N).float().mean()
        assert right > 0.8 if weight > 1 else right < 0.2


def test_the_assistant_is_asked_about_what_the_student_sees_and_learns_nothing_by_it() -> None:
    seen: dict[nn.Module, Tensor] = {}

    class Noting(Tiny):
        def forward(self, images_NCHW: Tensor) -> Tensor:
            seen[self] = images_NCHW
            return cast(Tensor, super().forward(images_NCHW))

    student, assistant = Noting().train(), Noting()
    before = {name: value.clone() for name, value in assistant.state_dict().items()}
    train(student=student, local_NCHW=local(), assistant=assistant.train(), config=ASSISTED)
    assert all(value.equal(before[name]) for name, value in assistant.state_dict().items())
    config = dataclasses.replace(ASSISTED, shift_px=2)
    loss_N = distill.assisted_loss(student, assistant, local(), config, torch.Generator().manual_seed(0))
    assert seen[student] is seen[assistant] and loss_N.shape == (40,) and loss_N.requires_grad


def test_a_shift_as_large_as_the_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="shift_px: expected less than the side of the pictures, got 8"):
        train(dataclasses.replace(SMALL, shift_px=8))


def test_an_assistant_needs_local_pictures() -> None:
    with pytest.raises(ValueError, match="expected local pictures for the assistant to answer, got none"):
        train(assistant=Sure())


def test_the_assistant_learns_from_the_answers_alone_and_from_its_seed() -> None:
    config = dataclasses.replace(
        SMALL, assistant="resnet8", assistant_passes=2, local_weight=1.0, image_weight=1.0, passes=7
    )
    keep = Keep()
    trained = [
        distill.train_assistant(
            pool(), class_count=2, config=config, seed=seed, device=CPU, checkpoint=checkpoint, progress=silent
        ).state_dict()
        for seed, checkpoint in ((0, keep), (0, Keep()), (1, Keep()))
    ]
    assert keep.saved == 2 * 4  # its own passes
    assert all(value.equal(trained[1][name]) for name, value in trained[0].items())
    assert not trained[0]["linear.weight"].equal(trained[2]["linear.weight"])


def test_interrupted_training_with_an_assistant_gives_the_same_bits() -> None:
    config = dataclasses.replace(SMALL, image_weight=0.0, local_batch_count=8)
    expected = train(config, local_NCHW=local(), assistant=Sure()).state_dict()
    keep = Keep(7)
    with pytest.raises(InterruptedError):
        train(config, local_NCHW=local(), assistant=Sure(), checkpoint=keep)
    resumed = train(config, student=Tiny(), local_NCHW=local(), assistant=Sure(), checkpoint=keep).state_dict()
    assert all(resumed[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("stop_after", [3, 20, 41])
def test_interrupted_training_with_mosaics_gives_the_same_bits(stop_after: int) -> None:
    answers, mixed_MCHW = blurred_mixes()
    config = dataclasses.replace(MOSAICS, image_weight=0.0)
    expected = train(config, answers=answers, mixed_MCHW=mixed_MCHW).state_dict()
    keep = Keep(stop_after)
    with pytest.raises(InterruptedError):
        train(config, answers=answers, mixed_MCHW=mixed_MCHW, checkpoint=keep)
    resumed = train(config, student=Tiny(), answers=answers, mixed_MCHW=mixed_MCHW, checkpoint=keep).state_dict()
    assert all(resumed[name].equal(expected[name]) for name in expected)


def test_mixes_whose_plans_were_not_kept_train_without_mosaics() -> None:
    answers, mixed_MCHW = blurred_mixes()
    unknown = dataclasses.replace(answers, latents_NL=answers.latents_NL[:, :0])
    config = dataclasses.replace(MOSAICS, image_weight=0.0)
    expected = train(dataclasses.replace(SMALL, image_weight=0.0), answers=unknown).state_dict()
    found = train(config, answers=unknown, mixed_MCHW=mixed_MCHW).state_dict()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_mosaics_change_no_bit_of_a_training_on_other_pictures() -> None:
    expected = train(SMALL).state_dict()
    assert all(value.equal(expected[name]) for name, value in train(MOSAICS).state_dict().items())


def test_balanced_answers_train_the_student_in_place_of_the_plain_ones() -> None:
    answers = pool()
    one_sided_NK = cast(Tensor, answers.probabilities_NK) * torch.tensor([1.0, 1e-3])
    one_sided_NK = one_sided_NK / one_sided_NK.sum(dim=1, keepdim=True)
    one_sided = dataclasses.replace(answers, probabilities_NK=one_sided_NK)
    config = DistillConfig(passes=20, batch_count=16, shift_px=0, ema_decay=0.9, image_weight=0.0)
    images_NCHW, classes_N = two_kinds(200, seed=5)
    plain = train(config, answers=one_sided)
    assert not plain(normalise(images_NCHW)).argmax(dim=1).any()  # all of the first class, as the teacher says
    balanced = train(config, answers=one_sided.balanced())
    assert balanced(normalise(images_NCHW)).argmax(dim=1).equal(classes_N)


@pytest.mark.parametrize("hard", [False, True])
def test_balanced_pictures_are_seen_until_both_kinds_are_seen_as_often(
    hard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images_NCHW, classes_N = two_kinds(72, seed=0)
    few = torch.cat([torch.nonzero(classes_N == 0).flatten(), torch.nonzero(classes_N == 1).flatten()[:6]])
    both = {"images_NCHW": images_NCHW[few], "latents_NL": torch.zeros(len(few), 5)}
    indices_N = classes_N[few]
    one_sided = (
        Pool(**both, class_indices_N=indices_N)
        if hard
        else Pool(**both, probabilities_NK=responses.one_hot(indices_N, 2))
    )
    seen: list[Tensor] = []

    def watched(asked: Pool, *others: Any) -> Tensor:
        seen.append(asked.answers_as_probabilities(2))
        return answer_loss(asked, *others)

    answer_loss = distill.answer_loss
    monkeypatch.setattr(distill, "answer_loss", watched)
    config = DistillConfig(passes=25, batch_count=16, image_weight=0.0)
    for balance, share in ((False, 6 / 42), (True, 0.5)):
        seen.clear()
        train(dataclasses.replace(config, balance_pictures=balance), answers=one_sided)
        assert torch.cat(seen)[:, 1].mean().item() == pytest.approx(share, abs=0.05)  # of 800 seen


def test_local_loss_without_local_pictures_and_balancing_without_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"local_weight: expected 0 without local pictures, got 1"):
        train(WITH_LOCAL)
    with pytest.raises(ValueError, match="expected probabilities to balance, got class indices"):
        pool(hard=True).balanced()


def test_balancing_takes_each_answers_own_smallest_probability() -> None:
    # Log-odds 2 log 10 and 4 log 10: a factor of 10 about the middle.
    epsilon_N1 = torch.tensor([[1e-2], [1e-4]])
    balanced_NK = responses.balanced(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), epsilon_N1)
    torch.testing.assert_close(balanced_NK, torch.tensor([[1 / 11, 10 / 11], [10 / 11, 1 / 11]]), atol=1e-4, rtol=0)


def test_balancing_a_class_that_no_answer_names_is_refused() -> None:
    pool = Pool(
        images_NCHW=torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        latents_NL=torch.zeros(2, 5),
        probabilities_NK=torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]),
    )
    with pytest.raises(ValueError, match="class 2 is in none of 2"):
        pool.balanced()


def test_image_loss_of_equal_answers_is_zero_and_grows_with_their_distance() -> None:
    generator, noise_NE = small_generator(), torch.randn(2, 3)
    p_NK = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    equal_N = distill.image_loss(generator, p_NK, p_NK.log(), noise_NE)
    assert equal_N.tolist() == pytest.approx([0.0, 0.0], abs=2e-3)
    near_NK, far_NK = torch.tensor([[0.7, 0.3]] * 2), torch.tensor([[0.1, 0.9]] * 2)
    near_N = distill.image_loss(generator, p_NK, near_NK.log(), noise_NE)
    far_N = distill.image_loss(generator, p_NK, far_NK.log(), noise_NE)
    assert (far_N > near_N).all()
    assert (near_N > 0).all()


def test_gradient_of_the_image_loss_reaches_the_logits_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "training_precision", lambda device: nullcontext())  # differences need digits
    generator = small_generator().double()
    noise_NE = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answers_NK = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    logits_NK = torch.tensor([[0.3, -0.2], [0.5, 0.1]], dtype=torch.float64, requires_grad=True)

    def total(logits_NK: Tensor) -> Tensor:
        return distill.image_loss(generator, answers_NK, logits_NK, noise_NE).double().sum()

    (gradient_NK,) = torch.autograd.grad(total(logits_NK), logits_NK)
    step_NK = torch.zeros_like(logits_NK)
    step_NK[0, 0] = 1e-2
    with torch.no_grad():
        difference = (total(logits_NK + step_NK) - total(logits_NK - step_NK)) / 2e-2
    assert abs(difference.item()) > 1e-3
    assert gradient_NK[0, 0].item() == pytest.approx(difference.item(), rel=0.02)


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    logits_NK = torch.tensor([[0.1, -0.1]], requires_grad=True)
    answers = Pool(
        images_NCHW=torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
        latents_NL=torch.zeros(1, 5),
        probabilities_NK=torch.tensor([[0.55, 0.45]]),
    )
    sizes = []
    for temperature in (1.0, 4.0):
        config = dataclasses.replace(SMALL, temperature=temperature)
        loss_N = distill.answer_loss(answers, logits_NK, config)
        sizes.append(torch.autograd.grad(loss_N.sum(), logits_NK)[0].abs().max().item())
    # Near each other, T² KL(soft(T)) has the same gradient for every T; without T² it would be 16 times less.
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_an_index_beside_probabilities_is_taken_as_where_the_teacher_sells_nothing_else() -> None:
    config = dataclasses.replace(SMALL, temperature=4.0, label_smoothing=0.1)
    smoothed_NK = torch.tensor([[0.95, 0.05]])
    both = Pool(
        images_NCHW=torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        latents_NL=torch.zeros(2, 5),
        probabilities_NK=smoothed_NK.repeat(2, 1),
        is_index_N1=torch.tensor([[True], [False]]),
    )
    logits_NK = torch.tensor([[1.0, -1.0]] * 2)
    of_index, of_soft = distill.answer_loss(both, logits_NK, config).tolist()
    cross_entropy = distill.answer_loss(both.hardened(), logits_NK, config)[0].item()
    entropy = -(smoothed_NK * smoothed_NK.log()).sum().item()
    assert of_index == pytest.approx(cross_entropy - entropy, abs=1e-5)
    softened = distill.answer_loss(dataclasses.replace(both, is_index_N1=None), logits_NK, config)[1].item()
    assert of_soft == pytest.approx(softened) and of_soft != pytest.approx(of_index)


def test_each_answer_is_softened_with_the_smallest_probability_of_its_own_rounding() -> None:
    answers_NK, logits_NK = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[1.0, -1.0]] * 3)
    answers = Pool(
        images_NCHW=torch.zeros(3, 1, 8, 8, dtype=torch.uint8),
        latents_NL=torch.zeros(3, 5),
        probabilities_NK=answers_NK,
        epsilon_N1=torch.tensor([[1e-7], [1e-3], [1e-1]]),
    )
    config = dataclasses.replace(SMALL, temperature=2.0)
    together_N = distill.answer_loss(answers, logits_NK, config)
    each = [answers.each(lambda part, i=i: part[i : i + 1]) for i in range(3)]  # type: ignore[misc]
    alone = [distill.answer_loss(answer, logits_NK[:1], config).item() for answer in each]
    assert together_N.tolist() == pytest.approx(alone)
    assert len(set(alone)) == 3
    plain = dataclasses.replace(answers, epsilon_N1=None)
    assert plain.epsilons().equal(torch.full((3, 1), 1e-7))


def test_rounded_answers_train_with_their_own_smallest_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = distill.answer_loss

    def noting(asked: Pool, logits_NK: Tensor, config: Any) -> Tensor:
        assert asked.probabilities_NK is not None
        seen.append((asked.epsilons()[:, 0] == asked.probabilities_NK[:, 0]).all())
        return original(asked, logits_NK, config)

    monkeypatch.setattr(distill, "answer_loss", noting)
    first_N1 = torch.linspace(0.1, 0.9, 72)[:, None]
    answers = dataclasses.replace(
        pool(), probabilities_NK=torch.cat([first_N1, 1 - first_N1], dim=1), epsilon_N1=first_N1
    )
    train_student(
        tiny_student(),
        small_generator(),
        answers,
        class_count=2,
        config=dataclasses.replace(SMALL, passes=2),
        seed=0,
        device=CPU,
        checkpoint=Keep(),
        progress=silent,
    )
    assert len(seen) == 8 and all(seen)


def test_generator_and_pool_stay_as_they_were() -> None:
    generator, answers = small_generator(), pool()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    images_NCHW = answers.images_NCHW.clone()
    train_student(
        tiny_student(),
        generator,
        answers,
        class_count=2,
        config=SMALL,
        seed=0,
        device=CPU,
        checkpoint=Keep(),
        progress=silent,
    )
    assert all(before[name].equal(value) for name, value in generator.state_dict().items())
    assert answers.images_NCHW.equal(images_NCHW)


def test_without_a_generator_there_is_no_image_loss() -> None:
    run = {"class_count": 2, "seed": 0, "device": CPU, "checkpoint": Keep(), "progress": silent}
    without = train_student(tiny_student(), None, pool(), config=dataclasses.replace(SMALL, image_weight=0.0), **run)  # type: ignore[arg-type]
    assert not without.training
    with pytest.raises(ValueError, match=r"image_weight: expected 0 without a generator, got 1"):
        train_student(tiny_student(), None, pool(), config=dataclasses.replace(SMALL, image_weight=1.0), **run)  # type: ignore[arg-type]


def test_step_size_rises_then_falls_to_zero() -> None:
    sizes = [distill.rise_and_fall(done / 100, 0.05) for done in range(101)]
    assert sizes[0] == 0.0
    assert sizes[5] == 1.0
    assert max(sizes) == 1.0
    assert sizes[100] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("both", [False, True])
def test_pool_with_no_answers_or_both_kinds_is_refused(both: bool) -> None:
    images_NCHW, classes_N = two_kinds(4, seed=0)
    answers: dict[str, Tensor] = {}
    if both:
        answers = {"class_indices_N": classes_N, "probabilities_NK": torch.full((4, 2), 0.5)}
    with pytest.raises(ValueError, match=f"got {2 if both else 0} of the two"):
        Pool(images_NCHW=images_NCHW, latents_NL=torch.zeros(4, 5), **answers)


def test_pool_with_parts_of_different_length_is_refused() -> None:
    images_NCHW, classes_N = two_kinds(4, seed=0)
    with pytest.raises(ValueError, match=r"got \[4, 3, 4\]"):
        Pool(images_NCHW=images_NCHW, latents_NL=torch.zeros(3, 5), class_indices_N=classes_N)
    with pytest.raises(ValueError, match=r"got \[4, 4, 4, 3\]"):
        Pool(
            images_NCHW=images_NCHW,
            latents_NL=torch.zeros(4, 5),
            probabilities_NK=torch.full((4, 2), 0.5),
            epsilon_N1=torch.full((3, 1), 0.5),
        )


@pytest.mark.parametrize("hard", [False, True])
def test_a_single_answer_trains_any_student(hard: bool) -> None:
    """MobileNet ends in one pixel: batch norm refuses to train on one number a channel.

    Seeded: two near-identical views can make the gradient overflow, which the agent reports as a training run away.
    """
    torch.manual_seed(0)
    images_NCHW = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    answers: dict[str, Tensor] = (
        {"class_indices_N": torch.tensor([1])} if hard else {"probabilities_NK": torch.tensor([[0.2, 0.8]])}
    )
    student = train_student(
        registry.build("mobilenet", class_count=2, channels=1),
        small_generator(),
        Pool(images_NCHW=images_NCHW, latents_NL=torch.randn(1, 5), **answers),
        class_count=2,
        config=DistillConfig(passes=1, image_weight=0.0),
        seed=0,
        device=CPU,
        checkpoint=Keep(),
        progress=silent,
    )
    assert all(value.isfinite().all() for value in student.state_dict().values())
