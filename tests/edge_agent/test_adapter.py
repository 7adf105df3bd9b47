"""The third phase on streams: a small student that knows four directions of stripes, well lit or not."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_agent.adaptation import graph
from edge_agent.adaptation.adapter import Adapter
from edge_agent.adaptation.memory import Memory, build_memory
from edge_agent.config import AdaptConfig
from edge_agent.distill import Pool
from edge_agent.pixels import normalise
from networks import registry
from networks.classifiers import Classifier

CLASSES, SIDE = 4, 12
CONFIG = AdaptConfig()
DIRECTIONS_K2 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.7, -0.7]])


def labels(count: int, seed: int) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def pictures(labels_N: Tensor, seed: int) -> Tensor:
    """Stripes whose direction is the class: of any phase and contrast, with noise."""
    rng = torch.Generator().manual_seed(seed)
    y_HW, x_HW = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    phase_N11, contrast_N11 = torch.rand(2, len(labels_N), 1, 1, generator=rng)
    along_N11 = DIRECTIONS_K2[labels_N][:, :, None, None]
    wave_NHW = torch.sin(np.pi / 2 * (along_N11[:, 0] * y_HW + along_N11[:, 1] * x_HW + 4 * phase_N11))
    noise_NHW = 0.12 * torch.randn(len(labels_N), SIDE, SIDE, generator=rng)
    images_NHW = 0.5 + (0.125 + 0.15 * contrast_N11) * wave_NHW + noise_NHW
    return (images_NHW.clamp(0, 1) * 255).round().to(torch.uint8)[:, None]


def trained(student: Classifier, steps: int) -> Classifier:
    optimiser = torch.optim.SGD(student.train().parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=steps)
    for step in range(steps):
        labels_N = labels(64, step)
        loss = F.cross_entropy(student(normalise(pictures(labels_N, step))), labels_N)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    optimiser.zero_grad()
    return student.eval()


def paid_pool(count: int = 100) -> Pool:
    paid_N = labels(count, 20_000)
    return Pool(images_NCHW=pictures(paid_N, 20_000), latents_NL=torch.zeros(count, 1), class_indices_N=paid_N)


def remembered(student: Classifier) -> Memory:
    return build_memory(student, paid_pool(), pictures(labels(800, 10_000), 10_000), config=CONFIG, seed=0, digest="")


@pytest.fixture(scope="module")
def student() -> Classifier:
    torch.manual_seed(0)
    return trained(registry.build("resnet8", class_count=CLASSES, channels=1), 80)


@pytest.fixture(scope="module")
def memory(student: Classifier) -> Memory:
    return remembered(student)


@pytest.fixture
def adapter(student: Classifier, memory: Memory) -> Adapter:
    return Adapter(student, memory, CONFIG)


def plain(student: Classifier, images_NCHW: Tensor, labels_N: Tensor) -> float:
    with torch.inference_mode():
        return (student(normalise(images_NCHW)).argmax(dim=1) == labels_N).double().mean().item()


def adapted(adapter: Adapter, images_NCHW: Tensor, labels_N: Tensor, count: int) -> float:
    """Accuracy on a stream that comes in batches of `count`."""
    adapter.reset()
    named = [adapter.adapt(part).probabilities_NK.argmax(dim=1) for part in images_NCHW.split(count)]
    return (torch.cat(named) == labels_N).double().mean().item()


def stream(order: str, count: int = 400) -> tuple[Tensor, Tensor]:
    """Pictures and labels: shuffled, class by class, or class by class forth and back."""
    labels_N = labels(count, 30_000)
    images_NCHW = pictures(labels_N, 30_000)
    half = count // 2
    order_N = {
        "shuffled": torch.arange(count),
        "by class": labels_N.argsort(stable=True),
        "forth and back": torch.cat(
            [labels_N[:half].argsort(stable=True), half + labels_N[half:].argsort(descending=True, stable=True)]
        ),
    }[order]
    return images_NCHW[order_N], labels_N[order_N]


def bright(images_NCHW: Tensor) -> Tensor:
    return (images_NCHW + 90.0).clamp(0, 255).round().to(torch.uint8)


def hazy(images_NCHW: Tensor) -> Tensor:
    return (0.3 * images_NCHW + 150).round().to(torch.uint8)


# --- forward passes only ---


@pytest.fixture
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever would build or follow a gradient fails, with gradients switched on."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a gradient")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(Tensor, "backward", refuse)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        yield


@pytest.mark.usefixtures("no_gradients")
def test_adaptation_never_builds_a_gradient(adapter: Adapter, student: Classifier) -> None:
    with pytest.raises(AssertionError, match="a gradient"):  # the guard works
        student(normalise(pictures(labels(2, 0), 0)))
    for seed in range(3):
        probabilities_NK = adapter.adapt(hazy(pictures(labels(16, seed), seed))).probabilities_NK
        assert probabilities_NK.grad_fn is None and not probabilities_NK.requires_grad
    for network in (student, adapter._student):
        assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in adapter._student.parameters())


def test_the_student_given_is_not_changed(adapter: Adapter, student: Classifier) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    for seed in range(3):
        adapter.adapt(hazy(pictures(labels(16, seed), seed)))
    after = student.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in student.modules()) == 9


# --- batches and state ---


@pytest.mark.parametrize("count", [1, 16, 200])
def test_answers_are_probabilities_for_any_batch(count: int, adapter: Adapter) -> None:
    for seed in range(3):
        found = adapter.adapt(bright(pictures(labels(count, seed), seed)))
        assert found.probabilities_NK.shape == (count, CLASSES)
        assert found.probabilities_NK.dtype == torch.float32
        assert (found.probabilities_NK >= 0).all()
        torch.testing.assert_close(found.probabilities_NK.sum(dim=1), torch.ones(count), atol=1e-5, rtol=0)
        assert 0 <= found.shift <= 1


def test_batches_of_changing_size_make_one_stream(adapter: Adapter) -> None:
    images_NCHW, labels_N = stream("shuffled", 274)
    parts = images_NCHW.split([1, 200, 16, 1, 56])
    named_N = torch.cat([adapter.adapt(part).probabilities_NK.argmax(dim=1) for part in parts])
    assert (named_N == labels_N).double().mean().item() >= 0.99


def test_reset_gives_the_first_answers_again(adapter: Adapter) -> None:
    batches = [hazy(pictures(labels(8, seed), seed)) for seed in range(4)]
    first = [adapter.adapt(batch) for batch in batches]
    adapter.reset()
    for batch, before in zip(batches, first, strict=True):
        again = adapter.adapt(batch)
        assert torch.equal(again.probabilities_NK, before.probabilities_NK) and again.shift == before.shift


def test_order_within_a_batch_does_not_matter(adapter: Adapter) -> None:
    images_NCHW = hazy(pictures(labels(17, 7), 7))
    forward_NK = adapter.adapt(images_NCHW).probabilities_NK
    adapter.reset()
    torch.testing.assert_close(
        adapter.adapt(images_NCHW.flip(0)).probabilities_NK.flip(0), forward_NK, atol=1e-4, rtol=0
    )


def sizes(thing: object) -> Iterator[int]:
    """How large every tensor, array and list is that an object holds, in its attributes and theirs."""
    if isinstance(thing, Tensor | np.ndarray):
        yield thing.untyped_storage().size() if isinstance(thing, Tensor) else thing.size
    elif isinstance(thing, list | tuple):
        yield len(thing)
        for part in thing:
            yield from sizes(part)
    elif isinstance(thing, dict):
        yield len(thing)
        yield from sizes(list(thing.values()))
    elif hasattr(thing, "__dict__"):
        yield from sizes(vars(thing))


def test_state_is_bounded_over_a_long_stream(adapter: Adapter) -> None:
    held, remembered_counts = [], []
    for i in range(50):
        adapter.adapt(pictures(labels(16, i), i))
        state = {name: value for name, value in vars(adapter).items() if name not in ("_recent_MD", "_said_MK")}
        held.append(list(sizes(state)))
        assert len(adapter._recent_MD) == len(adapter._said_MK)
        remembered_counts.append(len(adapter._recent_MD))
    assert held[49] == held[19]
    assert max(remembered_counts) == CONFIG.recent_count


def test_no_more_than_the_recent_pictures_are_remembered(student: Classifier, memory: Memory) -> None:
    for recent_count in (0, 5):
        adapter = Adapter(student, memory, AdaptConfig(recent_count=recent_count))
        for seed in range(2):
            adapter.adapt(pictures(labels(16, seed), seed))
            assert len(adapter._recent_MD) == len(adapter._said_MK) == recent_count


# --- what it is good for ---


@pytest.mark.parametrize(
    ("order", "count", "pictures_count"),
    [
        ("shuffled", 1, 80),
        ("shuffled", 16, 400),
        ("shuffled", 200, 400),
        ("by class", 1, 80),
        ("by class", 16, 400),
        ("by class", 200, 400),
        ("forth and back", 200, 400),
        ("forth and back", 16, 400),
    ],
)
def test_unshifted_streams_lose_at_most_half_a_point(
    order: str, count: int, pictures_count: int, adapter: Adapter, student: Classifier
) -> None:
    images_NCHW, labels_N = stream(order, pictures_count)
    before = plain(student, images_NCHW, labels_N)
    assert before >= 0.99
    assert adapted(adapter, images_NCHW, labels_N, count) >= before - 0.005


@pytest.mark.parametrize("order", ["shuffled", "by class", "forth and back"])
@pytest.mark.parametrize("count", [16, 200])
@pytest.mark.parametrize("spoil", [bright, hazy])
def test_shifted_streams_are_named_rightly_again(
    spoil: Callable[[Tensor], Tensor], count: int, order: str, adapter: Adapter, student: Classifier
) -> None:
    clean_NCHW, labels_N = stream(order)
    images_NCHW = spoil(clean_NCHW)
    # The student alone names about a quarter rightly: all are one class to it.
    assert plain(student, images_NCHW, labels_N) < 0.3
    # Found: 0.995 or more, but in batches of 16 class by class 0.90 or more.
    assert adapted(adapter, images_NCHW, labels_N, count) > (0.85 if count == 16 and order != "shuffled" else 0.98)


@pytest.mark.parametrize("order", ["shuffled", "by class"])
def test_shifted_pictures_that_come_one_by_one_are_named_rightly_again(
    order: str, adapter: Adapter, student: Classifier
) -> None:
    clean_NCHW, labels_N = stream(order, 80)
    images_NCHW = bright(clean_NCHW)
    assert plain(student, images_NCHW, labels_N) < 0.4
    assert adapted(adapter, images_NCHW, labels_N, 1) > 0.95  # found: 1.0


def test_shift_tells_a_changed_camera_from_one_class_at_a_time(adapter: Adapter) -> None:
    images_NCHW, _ = stream("by class")
    usual = [adapter.adapt(part).shift for part in images_NCHW.split(16)]
    adapter.reset()
    changed = [adapter.adapt(hazy(part)).shift for part in images_NCHW.split(16)]
    # Found: 0.06 and 0.76 on average, at most 0.21 and at least 0.57.
    assert np.mean(usual) < 0.12 and np.mean(changed) > 0.65 and max(usual) < min(changed)


def test_a_student_without_batch_norm_listens_to_neighbours_alone() -> None:
    torch.manual_seed(0)
    student = registry.build("vgg11", class_count=CLASSES, channels=1).eval()
    memory = build_memory(student, paid_pool(), pictures(labels(20, 1), 1), config=CONFIG, seed=0, digest="")
    images_NCHW = pictures(labels(16, 0), 0)
    found, quiet = (
        Adapter(student, memory, AdaptConfig(strength=strength)).adapt(images_NCHW) for strength in (5.0, 0.0)
    )
    assert found.shift == quiet.shift == 0.0
    torch.testing.assert_close(found.probabilities_NK.sum(dim=1), torch.ones(16), atol=1e-5, rtol=0)
    assert not torch.allclose(found.probabilities_NK, quiet.probabilities_NK, atol=1e-2)


# --- paid answers, classes just seen, confidence ---


class Unsure(Classifier):
    """A student without batch norm whose logits are its first three pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(3))
            self.linear.bias.zero_()

    def features(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW[:, 0, 0, :3]


def facts(*, confidence: float = 0.4, answer: int = 2, shares: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)) -> Memory:
    return Memory(
        student="",
        features_MD=F.normalize(torch.ones(4, 3), dim=1).numpy(),
        answers_MK=torch.eye(3)[[answer] * 4].numpy(),
        usual_shares_K=np.array(shares, np.float32),
        usual_confidence=np.array(confidence, np.float32),
        statistics=None,
    )


def first_answer(memory: Memory, config: AdaptConfig = CONFIG) -> tuple[Tensor, Tensor]:
    """The student's probabilities for a picture and what the adapter makes of it when it comes first and alone."""
    images_NCHW = torch.tensor([200, 180, 190], dtype=torch.uint8).reshape(1, 1, 1, 3)
    p_K = normalise(images_NCHW).reshape(3).softmax(dim=0)
    return p_K, Adapter(Unsure(), memory, config).adapt(images_NCHW).probabilities_NK[0]


def test_the_first_picture_alone_listens_to_paid_answers_and_expects_its_own_class() -> None:
    p_K, found_K = first_answer(facts())
    # One picture was named 0: by Laplace's rule 2/4, 1/4, 1/4 of what comes is 0, 1, 2; usual are thirds.
    wanted_K = p_K * torch.tensor([1.5, 0.75, 0.75]) * torch.tensor([1.0, 1.0, np.exp(5.0)])
    torch.testing.assert_close(found_K, (wanted_K / wanted_K.sum()).float(), atol=1e-5, rtol=0)
    assert (p_K.argmax().item(), found_K.argmax().item()) == (0, 2)


@pytest.mark.parametrize("config", [AdaptConfig(strength=0.0), AdaptConfig(neighbour_count=0)])
def test_without_neighbours_paid_answers_say_nothing(config: AdaptConfig) -> None:
    p_K, found_K = first_answer(facts(), config)
    wanted_K = p_K * torch.tensor([1.5, 0.75, 0.75])
    torch.testing.assert_close(found_K, wanted_K / wanted_K.sum(), atol=1e-5, rtol=0)


def test_a_student_that_is_far_less_sure_than_usual_is_left_alone() -> None:
    p_K, found_K = first_answer(facts(confidence=0.9))  # 0.35 is less than 0.65 of it
    torch.testing.assert_close(found_K, p_K, atol=1e-5, rtol=0)


def test_paid_answers_count_less_as_the_streams_own_pictures_become_many() -> None:
    picture_1CHW = torch.tensor([200, 180, 190], dtype=torch.uint8).reshape(1, 1, 1, 3)
    first_NK = Adapter(Unsure(), facts(), CONFIG).adapt(picture_1CHW).probabilities_NK
    many_NK = Adapter(Unsure(), facts(), CONFIG).adapt(picture_1CHW.expand(300, -1, -1, -1)).probabilities_NK
    assert first_NK[0].argmax() == 2
    assert (many_NK.argmax(dim=1) == 0).all()  # 300 like it say that it is what the student says


# --- memories of another student ---


@pytest.mark.parametrize(("confidence", "least"), [(0.5, 0.1), (0.99, 1.0)])
def test_neighbours_of_a_student_that_is_seldom_sure_pull_harder_the_narrower_the_stream_is(
    confidence: float, least: float, student: Classifier, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulls: dict[str, list[float]] = {}
    propagate = graph.propagate

    def noting(*given: Tensor, strength: float, iterations: int) -> Tensor:
        pulls[order].append(strength)
        return propagate(*given, strength=strength, iterations=iterations)

    monkeypatch.setattr(graph, "propagate", noting)
    usual = dataclasses.replace(memory, usual_confidence=np.array(confidence, np.float32))
    adapter = Adapter(student, usual, CONFIG)
    images_NCHW, labels_N = stream("shuffled", 1600)
    for order, shown_NCHW in (("mixed", images_NCHW), ("one class", images_NCHW[labels_N == 0])):
        pulls[order] = []
        adapter.reset()
        for batch_NCHW in shown_NCHW[:400].split(50):
            adapter.adapt(batch_NCHW)
    # The last batches: the paid answers have little to say any more, and all ears are open.
    assert 0.8 * least * CONFIG.strength < pulls["mixed"][-1] < (least + 0.25) * CONFIG.strength
    assert 0.85 * CONFIG.strength < pulls["one class"][-1] <= CONFIG.strength


def test_a_memory_of_another_student_is_refused(student: Classifier, memory: Memory) -> None:
    deeper = registry.build("resnet14", class_count=CLASSES, channels=1)
    with pytest.raises(ValueError, match=r"expected a student with 9 layers of batch norm .* got 1\d"):
        Adapter(deeper, memory, CONFIG)
    without = registry.build("vgg11", class_count=CLASSES, channels=1)
    with pytest.raises(ValueError, match="got 0 and 0"):
        Adapter(without, memory, CONFIG)
    with pytest.raises(ValueError, match="expected a memory of 64 features and 4 classes, got 3 and 3"):
        Adapter(student, facts(), CONFIG)
