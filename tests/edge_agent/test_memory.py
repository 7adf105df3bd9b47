import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_agent.adaptation import memory, statistics
from edge_agent.adaptation.memory import Memory, build_memory
from edge_agent.adaptation.statistics import MOST_KINDS
from edge_agent.config import AdaptConfig
from edge_agent.distill import Pool
from edge_agent.pixels import normalise
from networks import registry
from networks.classifiers import Classifier

CONFIG = AdaptConfig(memory_count=30)


class Flat(Classifier):
    """A student whose features are four pixels."""

    def __init__(self, class_count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, class_count)

    def features(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW[:, 0, 0, :4] + 1.5


class Normed(Flat):
    """The same with a layer of batch norm before."""

    def __init__(self, class_count: int = 3) -> None:
        super().__init__(class_count)
        self.bn1 = nn.BatchNorm2d(1)

    def features(self, images_NCHW: Tensor) -> Tensor:
        return super().features(self.bn1(images_NCHW))


def pictures(count: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 8, 8), generator=rng).to(torch.uint8)


def pool(*, hard: bool = False) -> Pool:
    rng = torch.Generator().manual_seed(1)
    probabilities_NK = (3.0 * torch.randn(200, 3, generator=rng)).softmax(dim=1)
    answers = {"class_indices_N": probabilities_NK.argmax(dim=1)} if hard else {"probabilities_NK": probabilities_NK}
    return Pool(images_NCHW=pictures(200), latents_NL=torch.zeros(200, 5), **answers)


def memory_of(student: Classifier, config: AdaptConfig = CONFIG, *, hard: bool = False) -> Memory:
    return build_memory(student, pool(hard=hard), pictures(40, seed=2), config=config, seed=0, digest="")


@pytest.mark.parametrize("hard", [False, True])
def test_memory_is_balanced_and_holds_unit_features_and_paid_answers(hard: bool) -> None:
    memory = memory_of(Flat(), hard=hard)
    assert np.bincount(memory.answers_MK.argmax(axis=1)).tolist() == [10, 10, 10]
    np.testing.assert_allclose(np.linalg.norm(memory.features_MD, axis=1), 1.0, atol=1e-6)
    paid_NK = pool(hard=hard).answers_as_probabilities(3).numpy()
    assert all((row == paid_NK).all(axis=1).any() for row in memory.answers_MK)


def test_remembered_features_belong_to_their_answers() -> None:
    student, memory = Flat(), memory_of(Flat())
    features_ND = nn.functional.normalize(student.features(normalise(pool().images_NCHW)), dim=1).numpy()
    paid_NK = pool().answers_as_probabilities(3).numpy()
    for feature_D, answer_K in zip(memory.features_MD, memory.answers_MK, strict=True):
        (i,) = np.flatnonzero((paid_NK == answer_K).all(axis=1))
        np.testing.assert_allclose(feature_D, features_ND[i], atol=1e-6)


def test_memory_takes_fewer_of_a_rare_class_and_stays_within_its_bytes() -> None:
    assert len(memory_of(Flat(), AdaptConfig(memory_count=10_000)).features_MD) == 200
    config = AdaptConfig(memory_count=10_000, memory_bytes=28 * 30 + 27)  # 4 features and 3 answers are 28 bytes
    memory = memory_of(Flat(), config)
    assert memory.features_MD.nbytes + memory.answers_MK.nbytes == 28 * 30
    named_N = torch.tensor([0] * 195 + [1] * 2 + [2] * 3)
    rare = Pool(images_NCHW=pictures(200), latents_NL=torch.zeros(200, 5), class_indices_N=named_N)
    few = build_memory(Flat(), rare, pictures(40), config=CONFIG, seed=0, digest="")
    assert np.bincount(few.answers_MK.argmax(axis=1)).tolist() == [10, 2, 3]


def test_memory_with_room_for_fewer_pictures_than_classes_remembers_those_named_first() -> None:
    named_N = torch.arange(999, 959, -1).repeat(2)
    many = Pool(images_NCHW=pictures(len(named_N)), latents_NL=torch.zeros(len(named_N), 3), class_indices_N=named_N)
    memory = build_memory(Flat(1000), many, pictures(10), config=AdaptConfig(memory_count=30), seed=0, digest="")
    assert memory.answers_MK.argmax(1).tolist() == named_N[:30].tolist()
    default = build_memory(Flat(1000), many, pictures(10), config=AdaptConfig(), seed=0, digest="")
    assert len(default.features_MD) == 40


def test_layers_of_a_student_with_many_classes_remember_groups_of_them() -> None:
    student = Normed(100)
    named_N = torch.arange(200) % 100
    many = Pool(images_NCHW=pictures(200), latents_NL=torch.zeros(200, 3), class_indices_N=named_N)
    memory = build_memory(
        student, many, pictures(40, seed=2), config=AdaptConfig(memory_count=100), seed=0, digest=""
    )
    assert memory.statistics is not None and memory.statistics.kinds_G2S.shape == (MOST_KINDS, 2, 1)
    assert memory.statistics.shares_G.sum() == pytest.approx(1.0, abs=1e-5)
    assert np.bincount(memory.answers_MK.argmax(axis=1)).tolist() == [1] * 100


def test_usual_shares_and_confidence_are_those_of_local_pictures() -> None:
    student, memory = Flat(), memory_of(Flat())
    with torch.inference_mode():
        p_NK = student(normalise(pictures(40, seed=2))).softmax(dim=1)
    np.testing.assert_allclose(memory.usual_shares_K, p_NK.mean(dim=0), atol=1e-6)
    assert float(memory.usual_confidence) == pytest.approx(p_NK.amax(dim=1).mean().item(), abs=1e-6)


@pytest.mark.parametrize("name", ["resnet8", "vgg11"])
def test_memory_survives_a_file(name: str) -> None:
    torch.manual_seed(0)
    memory = memory_of(registry.build(name, class_count=3, channels=1))
    assert (memory.statistics is None) == (name == "vgg11")
    if memory.statistics is not None:  # 9 layers with 336 channels
        assert (memory.statistics.kinds_G2S.shape, len(memory.statistics.usual_L22)) == ((3, 2, 336), 9)
    buffer = io.BytesIO()
    np.savez(buffer, **memory.to_arrays())  # type: ignore[arg-type]
    with np.load(io.BytesIO(buffer.getvalue()), allow_pickle=False) as arrays:
        again = Memory.from_arrays(arrays)
    assert again.to_arrays().keys() == memory.to_arrays().keys()
    for key, part in memory.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[key], part)
        assert again.to_arrays()[key].dtype == part.dtype


def test_a_file_without_what_local_pictures_look_like_is_no_memory() -> None:
    arrays = memory_of(Normed()).to_arrays()
    with pytest.raises(ValueError, match="expected 'usual_shares_K', found none"):
        Memory.from_arrays({name: arrays[name] for name in ("version", "student", "features_MD", "answers_MK")})


def test_two_local_pictures_are_enough_and_the_seed_decides_the_rest() -> None:
    student = Normed()
    arrays = build_memory(student, pool(), pictures(2), config=CONFIG, seed=0, digest="").to_arrays()
    assert all(np.isfinite(part).all() for name, part in arrays.items() if name != "student")
    first, again = (memory_of(student).to_arrays() for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_student_with_many_channels_looks_at_fewer_local_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    student = registry.build("mobilenet", class_count=10, channels=3)
    seen_bytes = 16 * sum(norm.num_features for norm in statistics.batch_norms(student))  # of each, two float64
    assert seen_bytes * statistics.most_pictures(student) <= 128_000_000 < seen_bytes * memory._LOCAL_COUNT
    assert statistics.most_pictures(registry.build("resnet8", class_count=10, channels=3)) > memory._LOCAL_COUNT
    looked_at = []
    monkeypatch.setattr(memory, "most_pictures", lambda _: 7)
    monkeypatch.setattr(
        memory, "source_statistics", lambda _, local_NCHW, *args, **more: looked_at.append(local_NCHW)
    )
    memory_of(Normed())
    assert len(looked_at[0]) == 7


def test_building_a_memory_changes_neither_weights_nor_statistics_and_leaves_no_hook() -> None:
    student = Normed()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    memory_of(student.train())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in student.modules())
