import copy
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from networks.modelfile import LoadedModel, load_model
from networks.registry import CLASSIFIERS, build
from teacher_service import admin_cli, cli, torch_engine
from teacher_service.config import ServerConfig
from teacher_service.engine import Engine, EngineError
from teacher_service.torch_engine import (
    BATCH_TOLERANCE,
    TorchEngine,
    _CudaLane,
    _fused,
    _graph_sizes,
    threads_beside_the_network,
)
from tests.models import resnet8_facts

MEAN, STD = (0.5, 0.25, 0.1), (0.5, 0.2, 0.3)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def loaded(module: nn.Module, output: Any = "logits") -> LoadedModel:
    facts = resnet8_facts(8, channels=3, width=12, mean=MEAN, std=STD, output=output)
    return LoadedModel(module, facts, "d" * 64)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3, 8, 12), dtype=np.uint8)


def channel_means(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


def test_answers_are_the_softmax_of_the_model_on_normalised_pictures() -> None:
    torch.manual_seed(0)
    module = build("resnet8", class_count=3, channels=3)
    images = pictures(5)
    engine: Engine = TorchEngine(loaded(module), device="cpu")
    answers = engine.answer(images)
    # by hand, in numpy's double precision
    normalised = (images / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.no_grad():
        expected = module.eval().double()(torch.tensor(normalised)).softmax(1).numpy()
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)


def test_probabilities_pass_through_and_sum_to_one() -> None:
    images = pictures(4)
    normalised = torch.tensor(images).double() / 255
    normalised = (normalised - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = channel_means(normalised).softmax(1)
    # a model in half precision whose rows sum to 1 only nearly
    engine = TorchEngine(loaded(Function(lambda x: channel_means(x).softmax(1) * 1.0005), "probabilities"))
    answers = engine.answer(images)
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)


def test_the_engine_says_what_the_model_is() -> None:
    engine = TorchEngine(loaded(Function(channel_means)))
    assert (engine.labels, engine.channels, engine.height, engine.width) == (("a", "b", "c"), 3, 8, 12)
    assert engine.model_digest == "d" * 64


def test_a_model_in_training_mode_is_served_in_eval_mode() -> None:
    module = nn.Sequential(nn.Dropout(0.9), Function(channel_means)).train()
    engine = TorchEngine(loaded(module))
    assert np.array_equal(engine.answer(pictures(3)), engine.answer(pictures(3)))


def test_read_only_pictures_and_an_empty_batch_are_answered() -> None:
    engine = TorchEngine(loaded(Function(channel_means)))
    images = pictures(2)
    images.setflags(write=False)
    assert engine.answer(images).shape == (2, 3)
    assert engine.answer(images[:0]).shape == (0, 3)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_an_error(number: float) -> None:
    def fails_on_white(images: Tensor) -> Tensor:
        means = channel_means(images)
        return torch.where(means > 3.5, number, means)

    engine = TorchEngine(loaded(Function(fails_on_white)))
    with pytest.raises(EngineError, match="expected finite answers"):
        engine.answer(np.full((2, 3, 8, 12), 255, np.uint8))


@pytest.mark.parametrize(
    ("function", "output", "said"),
    [
        (lambda x: channel_means(x) * torch.nan, "logits", "finite"),
        (lambda x: channel_means(x)[:, :2], "logits", r"expected answers \(16, 3\), got \(16, 2\)"),
        (lambda x: channel_means(x)[:1], "logits", r"expected answers \(16, 3\), got \(1, 3\)"),
        (lambda x: channel_means(x) * 0 + 3, "probabilities", "sum 9 .* --output logits"),
        (lambda x: channel_means(x).softmax(dim=1), "logits", "gave probabilities; .* --output probabilities"),
        (lambda x: channel_means(x) * 0 + torch.tensor([1.5, -0.5, 0]), "probabilities", "smallest -0.5"),
        (lambda x: x @ torch.zeros(5, 5), "logits", "cannot run on device 'cpu'"),
    ],
)
def test_a_model_that_cannot_answer_does_not_start(
    function: Callable[[Tensor], Tensor], output: str, said: str
) -> None:
    with pytest.raises(EngineError, match=said) as refused:
        TorchEngine(loaded(Function(function), output), device="cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([3.0, 3.0, 3.0], "a row with sum 9 and smallest 3;"),
        ([1.5, -0.5, 0.0], "a row with sum 1 and smallest -0.5;"),
    ],
)
def test_the_row_that_is_told_of_is_the_one_that_is_wrong(wrong: list[float], said: str) -> None:
    def last_row_wrong_on_white(images: Tensor) -> Tensor:
        means = channel_means(images)
        answers = means.softmax(1)
        if (means > 3.5).any():
            answers[-1] = torch.tensor(wrong)
        return answers

    engine = TorchEngine(loaded(Function(last_row_wrong_on_white), "probabilities"))
    with pytest.raises(EngineError, match=said):
        engine.answer(np.full((3, 3, 8, 12), 255, np.uint8))


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(EngineError, match=f"device '{device}'"):
        TorchEngine(loaded(Function(channel_means)), device=device)


# --- what of the answers is the same, and how nearly ---


def trained_a_little(name: str) -> nn.Module:
    """A network of random weights whose batch norms have seen some pictures."""
    torch.manual_seed(0)
    module = build(name, class_count=3, channels=3)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of all that it sees, without a memory of its beginning
    with torch.no_grad():
        for _ in range(5):
            module.train()(torch.randn(16, 3, 8, 12))
    return module.eval()


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if not name.startswith(("resnet1", "resnet4"))])
def test_a_fused_network_has_no_batch_norms_left_and_answers_alike(name: str) -> None:
    module = trained_a_little(name)
    images = torch.randn(4, 3, 8, 12)
    fused = _fused(module)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(images).softmax(1), module(images).softmax(1), atol=1e-5, rtol=0)
        assert "BatchNorm2d" in repr(module) or name.startswith("vgg")  # the given one is left as it was


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_answer_depends_on_its_batch_by_no_more_than_is_said(precision: Any) -> None:
    engine = TorchEngine(loaded(trained_a_little("resnet20")), device="cpu", precision=precision)
    images = pictures(512)
    together = engine.answer(images)
    # In bf16 a sum rounded the other way is rounded to 8 bits in the next layer: on other machines it may be more.
    tolerance = BATCH_TOLERANCE if precision == "fp32" else 0.05
    for size in (1, 7, 128):
        apart = np.concatenate([engine.answer(images[i : i + size]) for i in range(0, 256, size)])[:256]
        np.testing.assert_allclose(apart, together[:256], atol=tolerance, rtol=0)
    company = engine.answer(images[::-1].copy())[::-1]
    np.testing.assert_allclose(company, together, atol=tolerance, rtol=0)


def test_the_same_for_a_trained_resnet56_on_smooth_pictures_and_noise() -> None:
    if "MEKD_DATA" not in os.environ:
        pytest.skip("needs MEKD_DATA, a folder with teachers/rn56.pt")
    given = {"height": 32, "width": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    teacher = load_model(Path(os.environ["MEKD_DATA"]) / "teachers" / "rn56.pt", given=given)
    exact = copy.deepcopy(teacher.module).double()
    engine = TorchEngine(teacher, device="cpu")
    images = torch_engine._pictures(70, 3, 32, 32)
    together = engine.answer(images)
    for size in (1, 7):
        apart = np.concatenate([engine.answer(images[i : i + size]) for i in range(0, 70, size)])
        np.testing.assert_allclose(apart, together, atol=BATCH_TOLERANCE, rtol=0)
    normalised = (images / 255 - np.reshape(given["mean"], (3, 1, 1))) / np.reshape(given["std"], (3, 1, 1))
    with torch.no_grad():
        np.testing.assert_allclose(together, exact(torch.tensor(normalised)).softmax(1), atol=2e-5, rtol=0)


def test_any_number_of_pictures_is_answered_whatever_the_size_of_a_call() -> None:
    engine = TorchEngine(loaded(Function(channel_means)), device="cpu", max_batch_pictures=20)
    assert engine.batch_pictures == 20
    images = pictures(47)
    answers = engine.answer(images)
    assert answers.shape == (47, 3)
    np.testing.assert_allclose(answers[40:], engine.answer(images[40:]), atol=1e-6)


# --- sizes and threads ---


def with_seconds(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[TorchEngine, int], float]) -> list[int]:
    """Engines made from here on take this long for a batch, on two threads; returns what threads they were set to."""
    used: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(TorchEngine, "_seconds_a_picture", lambda self, size: seconds(self, size) / size)
    return used


def test_a_call_is_no_larger_than_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_ends_at = 200

    def seconds(engine: TorchEngine, size: int) -> float:
        return 5 + size * (1 if size <= cache_ends_at else 2)

    with_seconds(monkeypatch, seconds)
    assert TorchEngine(loaded(Function(channel_means)), device="cpu").batch_pictures == 64  # 4 % more are not enough
    with_seconds(monkeypatch, lambda engine, size: 50 + size)
    assert TorchEngine(loaded(Function(channel_means)), device="cpu").batch_pictures == 512
    with_seconds(monkeypatch, lambda engine, size: 50 + size if size <= 200 else 4 * size)
    assert TorchEngine(loaded(Function(channel_means)), device="cpu").batch_pictures == 128
    assert TorchEngine(loaded(Function(channel_means)), device="cpu", max_batch_pictures=3).batch_pictures == 3


def test_small_batches_are_left_to_one_thread_where_several_gain_little(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(engine: TorchEngine, size: int) -> float:
        is_one = size <= engine._one_thread_pictures
        return size if is_one else max(2.0, size / 2)

    used = with_seconds(monkeypatch, seconds)
    engine = TorchEngine(loaded(Function(channel_means)), device="cpu")
    used.clear()
    for count in (1, 2, 3, 64):
        engine.answer(pictures(count))
    assert used == [1, 1, 2, 2]


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (3, 2), (8, 7)])
def test_of_more_than_two_cores_one_is_left_to_the_network(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch_engine, "CONTAINER_SHARE", Path("/nowhere"))
    assert threads_beside_the_network() == threads


@pytest.mark.parametrize(
    ("share", "threads"),
    [
        ("max 100000", 63),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("800000 100000", 7),
        ("5000 100000", 1),
        ("", 63),
    ],
)
def test_a_containers_share_of_the_processor_counts_and_not_the_machines_cores(
    share: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(share + "\n")
    monkeypatch.setattr(torch_engine, "CONTAINER_SHARE", tmp_path / "cpu.max")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert threads_beside_the_network() == threads


def test_threads_are_those_that_were_said() -> None:
    code = (
        "import torch; from teacher_service.torch_engine import use_threads\n"
        "use_threads(5); print(torch.get_num_threads(), torch.get_num_interop_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", "1"]


# --- precision ---


def test_a_lower_precision_says_how_far_it_is_from_fp32_and_is_another_model() -> None:
    module = trained_a_little("resnet20")
    images = pictures(64)
    digests, exact = set(), TorchEngine(loaded(module), device="cpu")
    assert exact.largest_deviation is None
    for precision in ("bf16", "fp16"):
        engine = TorchEngine(loaded(module), device="cpu", precision=precision)  # type: ignore[arg-type]
        assert engine.largest_deviation is not None and 1e-5 < engine.largest_deviation < 0.2
        answers = engine.answer(images)
        assert answers.dtype == np.float32
        np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(answers, exact.answer(images), atol=4 * engine.largest_deviation)
        digests.add(engine.model_digest)
    assert exact.model_digest == "d" * 64 and len(digests | {exact.model_digest}) == 3
    assert digests == {
        TorchEngine(loaded(module), device="cpu", precision=precision).model_digest  # type: ignore[arg-type]
        for precision in ("bf16", "fp16")
    }


def test_a_network_that_fp16_cannot_hold_does_not_start() -> None:
    module = build("resnet8", class_count=3, channels=3)
    with torch.no_grad():
        module.linear.weight.fill_(60_000).mul_(torch.tensor([[1.0], [-1.0], [1.0]]))
    with pytest.raises(EngineError, match="expected finite answers"):
        TorchEngine(loaded(module), device="cpu", precision="fp16")


# --- from the command line ---


def test_what_a_file_does_not_say_of_itself_is_said_by_flags_or_once_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, labels = tmp_path / "bare.pt", tmp_path / "labels.txt"
    torch.save(build("resnet8", class_count=3, channels=1).state_dict(), bare)
    labels.write_text("cat\ndog\nowl\n", "utf-8")
    facts = ("--input-shape", "1,8,12", "--mean", "0.5", "--std", "0.25", "--labels", str(labels))
    free = ("--listen", "127.0.0.1:0", "--metrics-port", "0")
    engines: list[TorchEngine] = []
    threads: list[int | None] = []

    async def run_server(_config: ServerConfig, engine: TorchEngine) -> None:
        engines.append(engine)

    monkeypatch.setattr(cli, "run_server", run_server)
    # What a server does to its whole process is not for the process of the tests.
    monkeypatch.setattr(torch_engine, "use_threads", threads.append)
    monkeypatch.setattr(cli.heap, "bound", lambda: None)
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "2000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def served(*flags: str) -> TorchEngine:
        command = ["--model", str(bare), *free, "--device", "cpu", "--max-engine-pictures", "1", *flags]
        done = CliRunner().invoke(cli.serve, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return engines.pop()

    refused = CliRunner().invoke(cli.serve, ["--model", str(bare), *free])
    asked_for = f"error: {bare}: missing height, width, mean, std; add with: teacher-admin model describe {bare} "
    assert refused.exit_code == 2 and refused.output.count("\n") == 1 and refused.output.startswith(asked_for)
    by_flags = served(*facts, "--engine-threads", "2")
    described = CliRunner().invoke(admin_cli.admin, ["model", "describe", str(bare), *facts])
    assert (described.exit_code, described.output) == (0, f"wrote {bare}.toml\n")
    beside, other, lower = served(), served("--mean", "0.25"), served("--precision", "bf16")
    for engine in (by_flags, beside, other, lower):
        assert engine.labels == ("cat", "dog", "owl")
        assert (engine.channels, engine.height, engine.width) == (1, 8, 12)
    given = {"height": 8, "width": 12, "mean": (0.5,), "std": (0.25,)}
    assert by_flags.model_digest == beside.model_digest == load_model(bare, given=given).digest
    assert len({engine.model_digest for engine in (beside, other, lower)}) == 3
    assert [engine.found["precision"] for engine in (beside, lower)] == ["fp32", "bf16"]
    assert threads == [None, 2, None, None, None]


# --- compiled ---


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler, found none")
def test_a_compiled_network_answers_alike_at_every_size(tmp_path: Path) -> None:
    code = """
import numpy as np
from torch import nn
from tests.teacher_service.test_torch_engine import Function, channel_means, loaded, pictures
from teacher_service.torch_engine import BATCH_TOLERANCE, TorchEngine
module = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), Function(channel_means))
exact = TorchEngine(loaded(module), device="cpu")
compiled = TorchEngine(loaded(module), device="cpu", compiled=True)
assert compiled._module._compiled_call_impl is not None
for size in (1, 2, 7, 64, 600):
    np.testing.assert_allclose(compiled.answer(pictures(size)), exact.answer(pictures(size)), atol=BATCH_TOLERANCE)
"""
    # In a process of its own: the compiler's workers and warnings are no affair of the other tests.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- lanes of CUDA: what of them a machine without a GPU can try ---


def test_graph_sizes_end_with_the_largest_batch() -> None:
    assert _graph_sizes(512) == [1, 8, 64, 512]
    assert _graph_sizes(100) == [1, 8, 64, 100]
    assert _graph_sizes(1) == [1]


def test_a_lane_stages_pads_and_cuts_batches() -> None:
    lane = _CudaLane(torch.device("cpu"), 20, (3, 8, 12))
    seen: list[int] = []

    def forward(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.float().sum(dim=(2, 3))

    def record(size: int) -> None:  # as capture does on CUDA
        static, answers = torch.zeros((size, 3, 8, 12), dtype=torch.uint8), torch.zeros((size, 3))

        def replay() -> None:
            answers.copy_(forward(static))

        lane._graphs[size] = (replay, static, answers)

    for sizes in ([], [1, 8]):
        for size in sizes:
            record(size)
        seen.clear()
        for count in (1, 5, 8, 9, 20):
            images = pictures(count)
            images.setflags(write=False)
            np.testing.assert_array_equal(lane.run(forward, images), images.sum(axis=(2, 3), dtype=np.float32))
        assert seen == ([1, 8, 8, 9, 20] if sizes else [1, 5, 8, 9, 20])


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda_two_calls_at_once_answer_as_the_cpu_does(compiled: bool) -> None:
    module = trained_a_little("resnet20")
    exact = TorchEngine(loaded(copy.deepcopy(module)), device="cpu")
    engine = TorchEngine(loaded(module), device="cuda", compiled=compiled)
    assert engine.calls_at_once == 2
    wrong: list[int] = []

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            images = random.integers(0, 256, (random.integers(1, 200), 3, 8, 12), dtype=np.uint8)
            if not np.allclose(engine.answer(images), exact_answer(images), atol=1e-4):
                wrong.append(seed)

    lock = threading.Lock()

    def exact_answer(images: np.ndarray) -> np.ndarray:
        with lock:
            return exact.answer(images)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
