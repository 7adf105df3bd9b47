"""The engine that runs a loaded model with torch.

Shape legend: N pictures, C channels, H rows, W columns, K classes.

How far an answer may depend on what else is in its batch: a picture is never mixed with another, but kernels are
chosen by the size of a batch, and differ in the order of their sums. In fp32 no probability differs by more than
`BATCH_TOLERANCE`, whatever the batch; with the same size and other company the bits have been the same wherever it
was measured. Equal bits for every size are not promised: they would need batches padded to one size, at which a
single picture costs many times as much, and nothing rests on them, since an answer that is asked for again is read
from the books and never computed twice.
"""

from __future__ import annotations

import copy
import hashlib
import math
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from networks.classifiers import Classifier
from networks.modelfile import LoadedModel
from teacher_service.engine import EngineError, Float32Array, UInt8Array

Precision = Literal["fp32", "bf16", "fp16"]

BATCH_TOLERANCE = 1e-5
"""Most that a probability in fp32 depends on the size of its batch."""

CONTAINER_SHARE = Path("/sys/fs/cgroup/cpu.max")  # of the control group that a container is

_TYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SUM_TOLERANCE = 1e-3  # half-precision softmax inside an exported model stays within it
_SMALLEST_BATCH = 64  # pictures; where a call's size begins to be tried out
_WORTHWHILE = 0.95  # a batch twice as large must take at most this share of the time for each picture
_CALL_SECONDS = 5e-4  # what the service around the engine takes for a call, however large
_WORTH_THREADS = 0.8  # for small batches: several threads must take at most this share of the time of one


class TorchEngine:
    """Normalises pictures on the device, runs the model, answers with probabilities.

    Networks of this package are fused (batch norm into convolution) and laid out channels-last; a graph that came
    with its file is run as it is. Batches from one picture to the largest are computed here once, so that the first
    caller does not wait for a start-up and a model that cannot answer does not start.

    Args:
        device: a torch device, or "auto": a GPU where there is one.
        precision: in which the network computes. Pictures are normalised and probabilities made in fp32. Other than
            fp32 it is a part of `model_digest`, and `largest_deviation` says how far answers are from fp32.
        compiled: on a CPU torch.compile, which takes tens of seconds at start and a C++ compiler; on CUDA graphs of a
            few sizes, to which batches are padded.
        max_batch_pictures: most pictures that `batch_pictures` may be.

    Raises:
        EngineError: no such device, or the model gives no `(N, K)` probabilities.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        device: str = "auto",
        precision: Precision = "fp32",
        compiled: bool = False,
        max_batch_pictures: int = 512,
    ) -> None:
        facts = loaded.facts
        self.labels = facts.labels
        self.channels = facts.channels
        self.height = facts.height
        self.width = facts.width
        self.model_digest = _digest(loaded.digest, precision)
        self.batch_pictures = max_batch_pictures
        self.largest_deviation: float | None = None
        """Of a probability from fp32, on fixed pictures; None: it computes in fp32."""
        self._gives_logits = facts.output == "logits"
        self._threads = torch.get_num_threads()
        self._one_thread_pictures = 0
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            self._device = torch.device(name)
            if self._device.type == "cuda":  # fp32 means fp32: TF32 would cut it to 10 bits without a word
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            self._mean_C11 = torch.tensor(facts.mean, device=self._device).view(-1, 1, 1)
            self._std_C11 = torch.tensor(facts.std, device=self._device).view(-1, 1, 1)
            self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
            self.calls_at_once = 2 if self._device.type == "cuda" else 1
            self._load(loaded.module.eval(), precision, compiled)
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise EngineError(f"the model cannot run on device {name!r}: {reason}") from error
        self.found: dict[str, object] = {
            "device": str(self._device),
            "precision": precision,
            "compiled": compiled,
            "threads": self._threads,
            "one_thread_up_to_pictures": self._one_thread_pictures,
            "batch_pictures": self.batch_pictures,
            "largest_deviation_from_fp32": self.largest_deviation,
        }
        """What was asked for and what was measured at load, for the log."""

    def answer(self, images_NCHW: UInt8Array) -> Float32Array:
        """Return `probabilities_NK` whose rows sum to 1.

        Raises:
            EngineError: the model's output is not finite, has another shape, or is said to be probabilities
                and is not.
        """
        lane = self._lanes.get()  # never waits where calls come at most `calls_at_once` together
        try:
            parts = []
            for start in range(0, len(images_NCHW), self.batch_pictures):
                part_NCHW = images_NCHW[start : start + self.batch_pictures]
                if self._threads > 1:
                    torch.set_num_threads(1 if len(part_NCHW) <= self._one_thread_pictures else self._threads)
                parts.append(self._checked(lane.run(self._forward, part_NCHW)))
        finally:
            self._lanes.put(lane)
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.labels)), np.float32)

    def _load(self, module: nn.Module, precision: Precision, compiled: bool) -> None:
        self._layout = torch.contiguous_format  # a graph that came with its file may count on it
        if isinstance(module, Classifier):
            self._layout = torch.channels_last
            module = _fused(module).to(memory_format=self._layout)
        self._type = torch.float32
        self._module = module.to(self._device)
        self._lanes.put(_Lane(self._device))
        try_out = _pictures(16, self.channels, self.height, self.width)
        exact_NK = self.answer(try_out)
        if self._gives_logits:
            self._refuse_probabilities(try_out)
        if precision != "fp32":
            self._type = _TYPES[precision]
            self._module = copy.deepcopy(self._module).to(self._type)  # whoever gave it keeps it as it is
            self.largest_deviation = float(np.abs(self.answer(try_out) - exact_NK).max())
        if compiled and self._device.type == "cpu":
            self._module.compile(dynamic=True)  # of any size but 1, which is compiled by itself
        self.batch_pictures = self._best_batch(self.batch_pictures)
        if self._device.type == "cpu" and not compiled:  # what is compiled is so for a number of threads
            self._one_thread_pictures = self._largest_for_one_thread()
        self.answer(try_out[:1])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # from here on other streams read the weights
            shape = (self.channels, self.height, self.width)
            self._lanes.get()
            for _ in range(self.calls_at_once):
                lane = _CudaLane(self._device, self.batch_pictures, shape)
                for size in _graph_sizes(self.batch_pictures) if compiled else ():
                    lane.capture(self._forward, size)
                lane.run(self._forward, try_out[:1])
                self._lanes.put(lane)

    def _best_batch(self, most: int) -> int:
        """The size beyond which a picture becomes no cheaper: of a CPU where the cache ends, of a GPU its width."""
        size = min(_SMALLEST_BATCH, most)
        seconds = self._seconds_a_picture(size)
        while 2 * size <= most:
            try:
                doubled = self._seconds_a_picture(2 * size)
            except torch.OutOfMemoryError:
                break
            if doubled > _WORTHWHILE * seconds:
                break
            size, seconds = 2 * size, doubled
        return size

    def _largest_for_one_thread(self) -> int:
        """The size up to which several threads gain little: they meet after every layer, and wait for a busy core."""
        largest = 0
        for size in (1, 2, 4, 8) if self._threads > 1 else ():
            several = self._seconds_a_picture(size)
            self._one_thread_pictures = size
            one = self._seconds_a_picture(size)
            self._one_thread_pictures = 0
            if several < _WORTH_THREADS * one:
                break
            largest = size
        return largest

    def _seconds_a_picture(self, size: int) -> float:
        images_NCHW = _pictures(size, self.channels, self.height, self.width)
        self.answer(images_NCHW)
        taken = []
        for _ in range(2):
            started = time.perf_counter()
            self.answer(images_NCHW)
            taken.append(time.perf_counter() - started)
        return (min(taken) + _CALL_SECONDS) / size

    @torch.inference_mode()
    def _forward(self, images_NCHW: Tensor) -> Tensor:
        """Pictures on the device -> the output there; of logits the probabilities, NaN where they are not finite."""
        output_NK = self._output(images_NCHW)
        if not self._gives_logits:
            return output_NK
        is_finite_N1 = torch.isfinite(output_NK).all(dim=1, keepdim=True)
        return output_NK.softmax(dim=1).masked_fill_(~is_finite_N1, torch.nan)

    def _output(self, images_NCHW: Tensor) -> Tensor:
        """Pictures on the device -> what the model says of them, as it says it."""
        normalised = images_NCHW.float().div_(255).sub_(self._mean_C11).div_(self._std_C11)
        output_NK: Tensor = self._module(normalised.to(self._type, memory_format=self._layout)).float()
        if output_NK.shape != (len(images_NCHW), len(self.labels)):
            raise EngineError(
                f"expected answers {(len(images_NCHW), len(self.labels))}, got {tuple(output_NK.shape)}"
            )
        return output_NK

    @torch.inference_mode()
    def _refuse_probabilities(self, images_NCHW: UInt8Array) -> None:
        """Softmax of a softmax is nearly even: such answers would be sold without a word, and be worth little."""
        output_NK = self._output(torch.tensor(images_NCHW, device=self._device))
        if (output_NK >= 0).all() and ((output_NK.sum(dim=1) - 1).abs() <= _SUM_TOLERANCE).all():
            raise EngineError(
                "expected logits, the model gave probabilities; describe it with --output probabilities"
            )

    def _checked(self, answers_NK: Float32Array) -> Float32Array:
        if not np.isfinite(answers_NK).all():
            raise EngineError("expected finite answers, the model gave NaN or infinity")
        if self._gives_logits:
            return answers_NK
        sums_N = answers_NK.sum(axis=1)
        deviations_N, smallest_N = np.abs(sums_N - 1), answers_NK.min(axis=1)
        if (smallest_N < 0).any() or (deviations_N > _SUM_TOLERANCE).any():
            wrong = int(deviations_N.argmax())
            if deviations_N[wrong] <= _SUM_TOLERANCE:
                wrong = int(smallest_N.argmin())
            raise EngineError(
                f"expected probabilities, the model gave a row with sum {sums_N[wrong]:.3g} and smallest "
                f"{smallest_N[wrong]:.3g}; describe it with --output logits"
            )
        rescaled_NK: Float32Array = answers_NK / sums_N[:, None]
        return rescaled_NK


class _Lane:
    """What one call under way has of its own. On a CPU: nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def run(self, forward: Callable[[Tensor], Tensor], images_NCHW: UInt8Array) -> Float32Array:
        """`forward` of these pictures, back on the CPU."""
        # torch.tensor copies: a batch fresh from the wire is read-only, which from_numpy does not take.
        return _array(forward(torch.tensor(images_NCHW, device=self._device)))


class _CudaLane(_Lane):
    """A stream and pinned memory: while this lane copies, stacks or waits for Python, the other one computes."""

    def __init__(self, device: torch.device, most: int, shape: tuple[int, ...]) -> None:
        super().__init__(device)
        is_cuda = device.type == "cuda"  # else a test of the rest, without a stream
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._staged = torch.empty((most, *shape), dtype=torch.uint8, pin_memory=is_cuda)
        self._staged_array = self._staged.numpy()
        self._graphs: dict[int, tuple[Callable[[], None], Tensor, Tensor]] = {}

    def run(self, forward: Callable[[Tensor], Tensor], images_NCHW: UInt8Array) -> Float32Array:
        """As of any lane. The end waits for the stream, so that what is staged is free again."""
        count = len(images_NCHW)
        np.copyto(self._staged_array[:count], images_NCHW)
        with torch.cuda.stream(self._stream):
            size = min((size for size in self._graphs if size >= count), default=None)
            if size is None:
                return _array(forward(self._staged[:count].to(self._device, non_blocking=True)))
            replay, images, answers_NK = self._graphs[size]
            images[:count].copy_(self._staged[:count], non_blocking=True)
            replay()  # of whatever is left in the rows beyond, too
            return _array(answers_NK[:count])

    def capture(self, forward: Callable[[Tensor], Tensor], size: int) -> None:
        """Records `forward` at one size: a batch of it is then one launch instead of hundreds."""
        images = torch.zeros((size, *self._staged.shape[1:]), dtype=torch.uint8, device=self._device)
        with torch.cuda.stream(self._stream):
            for _ in range(3):  # what libraries set up in their first calls cannot be recorded
                forward(images)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                answers_NK = forward(images)
        self._graphs[size] = (graph.replay, images, answers_NK)


def use_threads(count: int | None) -> None:
    """How many threads of this process an engine on the CPU computes with; to be said before anything is computed.

    None: as many as torch found, which is every core, or OMP_NUM_THREADS.
    """
    if count is not None:
        torch.set_num_threads(count)
    torch.set_num_interop_threads(1)  # nothing here runs beside the one network


def threads_beside_the_network() -> int:
    """Every core but one, which is left to gRPC; of two both, for gRPC needs a small part of one.

    Of a container's share of the processor no more is taken than that: threads beyond it would wait for each other.
    """
    cores = min(torch.get_num_threads(), _cores_of_the_container(CONTAINER_SHARE))
    return cores if cores <= 2 else cores - 1


def _cores_of_the_container(share: Path) -> int:
    """How many cores a container's limit allows, at least 1; as many as anybody has where there is none."""
    try:
        quota_us, period_us = share.read_text().split()
        return max(1, math.floor(int(quota_us) / int(period_us)))
    except (OSError, ValueError):  # no Linux, no control group, or its quota is "max"
        return sys.maxsize


def _fused(module: Classifier) -> nn.Module:
    """The same network with every batch norm folded into the convolution before it, which then has a bias."""
    graph_module = fx.symbolic_trace(module)
    layers = dict(graph_module.named_modules())
    for node in list(graph_module.graph.nodes):
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        norm, conv = layers[str(node.target)], layers[str(before.target)]
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d) and len(before.users) == 1:
            graph_module.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            graph_module.graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module.eval()


def _digest(digest: str, precision: Precision) -> str:
    """Of all that shapes the answers beyond rounding: how fp32 is rounded on some machine is no part of it."""
    return digest if precision == "fp32" else hashlib.sha256(f"{digest} {precision}".encode()).hexdigest()


def _graph_sizes(most: int) -> list[int]:
    """1, 8, 64 and so on, and the largest: a batch is padded to the next of them."""
    return [*(size for size in (8**power for power in range(6)) if size < most), most]


def _pictures(count: int, channels: int, height: int, width: int) -> UInt8Array:
    """Always the same `images_NCHW`: every second one noise, the others patches of even colour."""
    random = np.random.default_rng(0)
    images_NCHW = random.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    patches = random.integers(0, 256, (count, channels, 4, 4), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    images_NCHW[1::2] = patches[1::2][:, :, rows][:, :, :, columns]
    return images_NCHW


def _array(values_NK: Tensor) -> Float32Array:
    array: Float32Array = values_NK.cpu().numpy()
    return array
