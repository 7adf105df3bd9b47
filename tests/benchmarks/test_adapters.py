"""Reference methods: what each promises as a method, and what its paper says that it does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.adapters.batch_norm import BatchNorm
from benchmarks.adapters.lame import Lame, affinity, correct
from benchmarks.adapters.plain import Plain
from benchmarks.adapters.t3a import T3A
from benchmarks.adapters.tent import Tent
from edge_agent.adaptation.adapter import Adapter
from edge_agent.adaptation.memory import build_memory
from edge_agent.adaptation.method import Method
from edge_agent.config import AdaptConfig
from edge_agent.distill import Pool
from edge_agent.pixels import normalise
from networks import registry
from networks.classifiers import Classifier


def student_of(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    student = registry.build("resnet8", class_count=4, channels=1)
    with torch.no_grad():  # statistics of batch norm that are those of some pictures, as after training
        for _ in range(20):
            student.train()(normalise(pictures(16)))
    return student.eval()


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)


def ours(student: Classifier) -> Adapter:
    pool = Pool(images_NCHW=pictures(8), latents_NL=torch.zeros(8, 1), class_indices_N=torch.arange(8) % 4)
    memory = build_memory(student, pool, pictures(40), config=AdaptConfig(), seed=0, digest="")
    return Adapter(student, memory, AdaptConfig())


MAKERS: list[Callable[[Classifier], Method]] = [Plain, BatchNorm, Lame, T3A, Tent, ours]
EVERY_METHOD = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


@EVERY_METHOD
@pytest.mark.parametrize("count", [1, 16])
def test_probabilities_are_one_row_a_picture_that_sums_to_1(make: Callable[[Classifier], Method], count: int) -> None:
    method = make(student_of())
    for _ in range(3):
        probabilities_NK = method.adapt(pictures(count)).probabilities_NK
        assert probabilities_NK.shape == (count, 4) and probabilities_NK.dtype == torch.float32
        assert probabilities_NK.sum(dim=1).tolist() == pytest.approx([1.0] * count, abs=1e-5)
        assert not probabilities_NK.requires_grad


@EVERY_METHOD
def test_reset_forgets_the_stream(make: Callable[[Classifier], Method]) -> None:
    method = make(student_of())
    batches = [pictures(8) for _ in range(4)]
    first = [method.adapt(batch).probabilities_NK.clone() for batch in batches]
    method.reset()
    assert all(torch.equal(method.adapt(batches[i]).probabilities_NK, first[i]) for i in range(4))


@EVERY_METHOD
def test_students_weights_and_statistics_stay_as_they_were(make: Callable[[Classifier], Method]) -> None:
    student = student_of()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    method = make(student)
    for _ in range(3):
        method.adapt(pictures(8))
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_batch_norm_that_trusts_training_alone_is_the_plain_student() -> None:
    student = student_of()
    batch_NCHW = pictures(8)
    plain_NK = Plain(student).adapt(batch_NCHW).probabilities_NK
    trusting_NK = BatchNorm(student, source_count=float("inf")).adapt(batch_NCHW).probabilities_NK
    assert torch.allclose(trusting_NK, plain_NK, atol=1e-5)
    assert not torch.allclose(BatchNorm(student).adapt(batch_NCHW).probabilities_NK, plain_NK, atol=1e-3)


def test_batch_norm_that_trusts_the_batch_alone_is_a_student_that_trains() -> None:
    student = student_of()
    batch_NCHW = pictures(8)
    alone_NK = BatchNorm(student, source_count=0).adapt(batch_NCHW).probabilities_NK
    with torch.no_grad():
        training_NK = student.train()(normalise(batch_NCHW)).softmax(dim=1)
    assert torch.allclose(alone_NK, training_NK, atol=1e-5)
    student.eval()
    assert torch.allclose(Tent(student_of()).adapt(batch_NCHW).probabilities_NK, alone_NK, atol=1e-5)


def test_lame_draws_a_minority_of_identical_pictures_to_the_others() -> None:
    p_NK = torch.tensor([[0.6, 0.4]] * 5 + [[0.45, 0.55]])
    z_NK = correct(p_NK.log(), affinity(F.normalize(torch.ones(6, 3), dim=1), neighbour_count=5))
    assert z_NK.argmax(dim=1).tolist() == [0] * 6


def test_lame_solves_its_equation_and_no_picture_is_its_own_neighbour() -> None:
    torch.manual_seed(0)
    p_NK = torch.rand(30, 4).softmax(dim=1)
    affinity_NN = affinity(F.normalize(torch.randn(30, 6), dim=1), neighbour_count=5)
    assert affinity_NN.sum(dim=1).tolist() == [5.0] * 30 and affinity_NN.diagonal().sum() == 0
    z_NK = correct(p_NK.log(), affinity_NN)
    assert torch.allclose(z_NK, torch.softmax(p_NK.log() + affinity_NN @ z_NK, dim=1), atol=1e-3)


def test_lame_leaves_a_picture_that_comes_alone() -> None:
    student, picture_1CHW = student_of(), pictures(1)
    alone_1K = Lame(student).adapt(picture_1CHW).probabilities_NK
    assert torch.allclose(alone_1K, Plain(student).adapt(picture_1CHW).probabilities_NK, atol=1e-6)


def test_t3a_names_the_first_picture_as_the_last_layer_does() -> None:
    student = student_of()
    with torch.no_grad():  # rows that differ in direction alone, and no offset: cosine and last layer agree
        student.linear.weight.copy_(torch.eye(4, 64))
        student.linear.bias.zero_()
    for _ in range(5):
        picture_1CHW = pictures(1)
        named = T3A(student, support_count=None).adapt(picture_1CHW).probabilities_NK.argmax()
        assert named == Plain(student).adapt(picture_1CHW).probabilities_NK.argmax()


def test_t3a_keeps_no_more_than_the_surest_of_each_class() -> None:
    student = student_of()
    few, all_of_them = T3A(student, support_count=3), T3A(student, support_count=None)
    for _ in range(4):
        batch_NCHW = pictures(20)
        few.adapt(batch_NCHW)
        all_of_them.adapt(batch_NCHW)
    assert len(all_of_them._classes_S) == 4 + 80
    for k in range(4):
        every = sorted(all_of_them._entropies_S[all_of_them._classes_S == k].tolist())
        kept = sorted(few._entropies_S[few._classes_S == k].tolist())
        assert kept == pytest.approx(every[:3], abs=1e-5)


def test_tent_becomes_surer_of_a_batch_that_comes_again() -> None:
    method, batch_NCHW = Tent(student_of()), pictures(16)

    def entropy() -> float:
        p_NK = method.adapt(batch_NCHW).probabilities_NK
        return float(-(p_NK * p_NK.log()).sum(dim=1).mean())

    first = entropy()
    for _ in range(10):
        last = entropy()
    assert last < first


def test_tent_refuses_a_student_without_batch_norm() -> None:
    with pytest.raises(ValueError, match="expected a student with batch norm"):
        Tent(registry.build("vgg11", class_count=4, channels=1))
