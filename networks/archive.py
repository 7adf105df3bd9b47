"""Models exported with `torch.export.save` (`.pt2`), read without running anything they bring.

Shape legend: N pictures, C channels, H rows, W columns, K classes.

An archive is a zip: a graph as JSON, raw tensors, and sample inputs as a pickle. `torch.export.load` is not
used: it unpickles the samples (without `weights_only`, when the safe way fails), unpickles every tensor whose
JSON says so, evaluates symbolic sizes as Python and looks operators up by any dotted name below `torch`. So
the zip's members are held against an allow-list, the pickle is never opened, and the graph is executed here,
node by node: operators of ATen, tensors, numbers. A graph may still ask for more memory or time than there is.
"""

from __future__ import annotations

import json
import math
import operator
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

_SCHEMA_MAJOR = 8  # of the graph's JSON: torch 2.5 and later

_GRAPH = "models/model.json"
_FOLDERS = {"data/weights": r"weight_\d+", "data/constants": r"tensor_\d+"}
_CONFIGS = {"data/weights": "model_weights_config.json", "data/constants": "model_constants_config.json"}
_ALLOWED = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt"  # torch always writes the samples; they are never read
)
_REFUSED = {
    "compiled code": re.compile(r"data/aotinductor/.*|.*\.(so|o|a|cpp|cu|cubin|ptx|dll|dylib|py)"),
    "a custom object": re.compile(r"data/constants/(custom_obj|opaque_obj).*"),
    "pickled weights or constants": re.compile(r".*\.(pt|pth|pkl|pickle)"),
}

# Numbers of torch's export schema.
_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_FLOAT32 = 7
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_LAYOUTS = {7: torch.strided}

_TARGET = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_ARITHMETIC = {
    f"_operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "eq", "ne", "lt", "le", "gt", "ge")
}

# The operators of ATen that a graph may call, by packet name. Many others, public ones too, trust their numbers and
# reach outside a tensor's memory (`max_pool2d_with_indices_backward`), leave memory as others left it (`empty`: a
# customer's pictures may show) or act on the world. These are what torchvision's classifiers become, as exported and
# after `run_decompositions()`, and their relatives. Each was called on the CPU with wrong shapes, types, indices and
# numbers, its tensors between guard pages. Left out for what that showed: `native_batch_norm`, `_weight_norm`,
# `_upsample_*_aa`, `_transformer_encoder_layer_fwd`, `_scaled_dot_product_flash_attention_for_cpu`, `remainder`.
_ALSO_IN_PLACE = """
    abs add addcdiv addcmul ceil clamp clamp_max clamp_min clip cos div erf exp expm1 floor log log1p masked_fill mul
    neg pow reciprocal round rsqrt sigmoid sign sin sqrt square sub tanh
    celu elu gelu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu silu threshold
    alpha_dropout dropout feature_alpha_dropout feature_dropout
""".split()
_BY_KIND = {
    "pointwise": """
        eq fmod ge glu gt hardshrink isfinite isinf isnan le lerp log_sigmoid log_softmax _log_softmax logical_and
        logical_not logical_or lt maximum minimum ne prelu _prelu_kernel rsub softmax _softmax softplus softshrink
        true_divide where""",
    "in place": "copy_ detach_ fill_ zero_",
    "products": """
        addmm addmv baddbmm bmm conv1d conv2d conv3d conv_transpose2d convolution _convolution dot einsum im2col
        linear matmul mm mv outer scaled_dot_product_attention vdot""",
    "pooling, padding and resizing": """
        adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d
        avg_pool3d max_pool1d max_pool2d max_pool2d_with_indices constant_pad_nd pad reflection_pad2d
        replication_pad2d upsample_bicubic2d upsample_bilinear2d upsample_nearest2d _upsample_nearest_exact2d""",
    "normalisations": """
        batch_norm _native_batch_norm_legit_no_training group_norm instance_norm layer_norm linalg_vector_norm
        native_group_norm native_layer_norm norm rms_norm""",
    "reductions": """
        all amax amin any argmax argmin cumsum logsumexp max mean min prod std std_mean sum topk var var_mean""",
    # `as_strided` refuses what lies outside the bytes.
    "shapes": """
        alias as_strided broadcast_to cat channel_shuffle chunk clone contiguous copy detach diagonal expand expand_as
        flatten flip lift_fresh_copy meshgrid movedim narrow native_channel_shuffle permute pixel_shuffle
        pixel_unshuffle repeat reshape reshape_as roll select select_scatter slice slice_scatter split
        split_with_sizes squeeze stack swapaxes t tensor_split tile transpose tril triu unbind unflatten unfold
        unsafe_chunk unsafe_split unsqueeze _unsafe_view view view_as""",
    # On the CPU these compare every index with the size.
    "by index": "embedding gather index index_select",
    "types, sizes and new tensors": """
        arange eye full full_like linspace new_full new_ones new_zeros ones ones_like scalar_tensor sym_numel sym_size
        to _to_copy type_as zeros zeros_like""",
    "checks": "_assert_scalar _assert_tensor_metadata",
}
_OPERATORS = frozenset(
    [*_ALSO_IN_PLACE, *(f"{name}_" for name in _ALSO_IN_PLACE), *" ".join(_BY_KIND.values()).split()]
)

# torch takes any number for one of these, unchecked, and jumps where its tables end.
_ENUMERATIONS = {"ScalarType": torch.dtype, "MemoryFormat": torch.memory_format, "Layout": torch.layout}
_LARGEST = 2**31  # number that is a size, dimension or padding: sums of larger ones wrap around in torch's own checks
_UNCHECKED_BATCH_NORM = "aten::_native_batch_norm_legit_no_training"

# The arguments that may be text. A file name is none of them.
_TEXT_ARGUMENTS = {"approximate", "assert_msg", "equation", "mode", "padding", "rounding_mode"}

HOW_TO_EXPORT = (
    "export it with torch.export.export(model.eval(), (torch.zeros(2, C, H, W),), "
    "dynamic_shapes=({0: torch.export.Dim('n')},)) and torch.export.save"
)


class ArchiveError(Exception):
    """A zip that is refused: what was expected, what was found."""


@dataclass(frozen=True)
class ArchiveModel:
    """A model read from an archive, its input shape, and its graph as canonical bytes for a digest."""

    module: nn.Module
    graph: bytes
    class_count: int
    channels: int
    height: int
    width: int


def members_of(path: Path) -> list[str]:
    """Return the members of a zip as torch writes it, without their common root folder.

    Every member is stored, not compressed, and all together are no larger than the file: no zip bomb fits.

    Raises:
        ArchiveError: not a zip, cut short, compressed, overlapping, or with names that leave the folder.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ArchiveError(
            f"expected a zip, as torch.save and torch.export.save write it, got none or one cut short ({error}); "
            "copy the file again or save it with PyTorch 1.6 or later"
        ) from None
    # Archives hold small zips: of one that is cut short, the last of those is found, somewhere inside.
    if not infos or min(info.header_offset for info in infos) != 0:
        raise ArchiveError("the zip does not begin where the file does: it is empty or cut short; copy it again")
    names = [info.filename for info in infos]
    for info in infos:
        if info.filename.startswith("/") or "\\" in info.filename or ".." in info.filename.split("/"):
            raise ArchiveError(f"member {info.filename!r} leaves the archive's folder")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ArchiveError(
                f"member {info.filename!r} is compressed, expected it stored as torch writes it; save it again"
            )
    if len(set(names)) < len(names) or sum(info.file_size for info in infos) > path.stat().st_size:
        raise ArchiveError("members overlap or claim more bytes than the file has")
    roots = {name.split("/", 1)[0] for name in names}
    if len(roots) != 1 or any("/" not in name for name in names):
        raise ArchiveError(f"expected one folder in the zip, got {', '.join(sorted(roots)[:5])}")
    return [name.split("/", 1)[1] for name in names]


def read_archive(path: Path) -> ArchiveModel:
    """Return the model in a `torch.export` archive, ready to run on the CPU.

    Raises:
        ArchiveError: a member beyond graph and raw tensors, a graph that is no classifier of float pictures
            `(N, C, H, W)` with N left open, or an operator outside ATen.
    """
    for member in members_of(path):
        if not _ALLOWED.fullmatch(member):
            kind = next((kind for kind, names in _REFUSED.items() if names.fullmatch(member)), "an unknown member")
            raise ArchiveError(f"member {member!r} is {kind}; expected a graph and raw tensors only; {HOW_TO_EXPORT}")
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/", 1)[0]

        def read(member: str) -> bytes:
            return archive.read(f"{root}/{member}")

        try:
            if read("archive_format") != b"pt2" or read("byteorder").decode() != sys.byteorder:
                raise ArchiveError(f"expected a pt2 archive of a {sys.byteorder}-endian machine")
            program = json.loads(read(_GRAPH))
            weights = {
                **_tensors(read, "data/weights"),
                **_tensors(read, "data/constants"),
            }
            return _model(program, weights)
        except ArchiveError:
            raise
        except Exception as error:  # what a stranger's JSON can break is not to be listed
            reason = f"{type(error).__name__}: {error}"
            raise ArchiveError(f"its graph cannot be read or run ({reason}); {HOW_TO_EXPORT}") from None


def _tensors(read: Callable[[str], bytes], folder: str) -> dict[str, Tensor]:
    """Return the tensors of one folder by their names in the module."""
    tensors = {}
    members: dict[str, bytearray] = {}  # read once, however many tensors lie in them
    for name, entry in json.loads(read(f"{folder}/{_CONFIGS[folder]}"))["config"].items():
        if entry["use_pickle"]:
            raise ArchiveError(f"{folder}: {name!r} is pickled, expected a raw tensor; {HOW_TO_EXPORT}")
        if not re.fullmatch(_FOLDERS[folder], entry["path_name"]):
            raise ArchiveError(f"{folder}: {name!r} lies in {entry['path_name']!r}, expected {_FOLDERS[folder]}")
        meta = entry["tensor_meta"]
        dtype = _DTYPES[meta["dtype"]]
        size = [dimension["as_int"] for dimension in meta["sizes"]]
        stride = [dimension["as_int"] for dimension in meta["strides"]]
        if math.prod(size) == 0:
            tensors[name] = torch.zeros(size, dtype=dtype)
            continue
        member = entry["path_name"]
        if member not in members:
            members[member] = bytearray(read(f"{folder}/{member}"))
        stored = torch.frombuffer(members[member], dtype=dtype)
        if math.prod(size) > stored.numel():
            raise ArchiveError(f"{folder}: {name!r} claims {size}, more than the {stored.numel()} numbers stored")
        # as_strided refuses what lies outside the bytes.
        tensors[name] = stored.as_strided(size, stride, meta["storage_offset"]["as_int"])
        if folder == "data/weights" and not torch.isfinite(tensors[name]).all():
            raise ArchiveError(f"weight {name!r} holds NaN or infinity; expected finite numbers")
    return tensors


def _model(program: Any, weights: Mapping[str, Tensor]) -> ArchiveModel:
    if program["schema_version"]["major"] != _SCHEMA_MAJOR:
        raise ArchiveError(
            f"expected version {_SCHEMA_MAJOR} of the export schema, got {program['schema_version']['major']}; "
            "export it with a newer PyTorch"
        )
    graph = program["graph_module"]["graph"]
    signature = program["graph_module"]["signature"]
    images, weight_names = _inputs(signature["input_specs"])
    answer = _output(signature["output_specs"])
    batch, *picture = graph["tensor_values"][images]["sizes"]
    if graph["tensor_values"][images]["dtype"] != _FLOAT32 or len(picture) != 3:
        raise ArchiveError("expected one input of float32 pictures (N, C, H, W)")
    if "as_expr" not in batch:
        raise ArchiveError(f"it takes exactly {batch['as_int']} pictures a call, expected any; {HOW_TO_EXPORT}")
    if any("as_int" not in side for side in picture):
        raise ArchiveError(f"expected fixed channels, height and width; {HOW_TO_EXPORT}")
    channels, height, width = (side["as_int"] for side in picture)
    answer_shape = graph["tensor_values"][answer]["sizes"]
    if len(answer_shape) != 2 or "as_int" not in answer_shape[1]:
        raise ArchiveError("expected one output (N, K) of logits or probabilities")
    class_count = answer_shape[1]["as_int"]

    module = _Graph(
        steps=[_step(node) for node in graph["nodes"]],
        weights={name: weights[key] for name, key in weight_names.items()},
        images=images,
        answer=answer,
        largest_batch=_largest_batch(batch, program["range_constraints"]),
    ).eval()
    before = [weight._version for weight in module.buffers()]
    for count in (1, 3):
        with torch.inference_mode():
            shape = tuple(module(torch.zeros(count, channels, height, width)).shape)
        if shape != (count, class_count):
            raise ArchiveError(f"expected answers {(count, class_count)}, got {shape}")
    # Operators that change an argument without saying so, such as batch norm's.
    if before != [weight._version for weight in module.buffers()]:
        raise ArchiveError(
            f"it changes its own weights when it is called, expected pure computation; {HOW_TO_EXPORT}"
        )
    parts = [[node["target"], node["inputs"], node["outputs"]] for node in graph["nodes"]]
    text = json.dumps([parts, signature["input_specs"], signature["output_specs"]], sort_keys=True)
    return ArchiveModel(module, text.encode(), class_count, channels, height, width)


def _inputs(specs: Any) -> tuple[str, dict[str, str]]:
    """Return the graph's name of the pictures, and of each weight with its name in the module."""
    images, weights = [], {}
    for spec in specs:
        ((kind, value),) = spec.items()
        if kind == "user_input":
            images.append(value["arg"]["as_tensor"]["name"])
        elif kind in ("parameter", "buffer", "tensor_constant"):
            weights[value["arg"]["name"]] = value[f"{kind}_name"]
        else:
            raise ArchiveError(f"input of kind {kind!r}, expected pictures, weights and tensors only")
    if len(images) != 1:
        raise ArchiveError(f"expected one input of pictures, got {len(images)}")
    return images[0], weights


def _output(specs: Any) -> str:
    """Return the graph's name of the answer."""
    kinds = [kind for spec in specs for kind in spec]
    if kinds != ["user_output"]:
        raise ArchiveError(f"expected one output (N, K) and no change of weights, got {kinds}; {HOW_TO_EXPORT}")
    return cast(str, specs[0]["user_output"]["arg"]["as_tensor"]["name"])


def _largest_batch(batch: Any, ranges: Any) -> int | None:
    """Return the most pictures a call may hold, from the range of the batch size's symbol; None: any."""
    found = re.match(r"Symbol\('(\w+)'", batch["as_expr"]["expr_str"])
    if not found:
        raise ArchiveError(f"expected a free batch size, got a computed one; {HOW_TO_EXPORT}")
    bounds = ranges.get(found[1], {"min_val": 0, "max_val": None})
    # torch writes 2 where it means "not specialised for a single picture": one picture runs all the same.
    if bounds["min_val"] is not None and bounds["min_val"] > 2:
        raise ArchiveError(f"it takes at least {bounds['min_val']} pictures a call, expected 1; {HOW_TO_EXPORT}")
    return None if bounds["max_val"] is None else int(bounds["max_val"])


@dataclass(frozen=True)
class _Reference:
    """The value of an earlier node, by name."""

    name: str


class _TheDevice:
    """Wherever the pictures are: a graph exported on one device runs on another."""


@dataclass
class _Step:
    """One node: what to call, with what, and which names its results take (a list for a list of tensors)."""

    call: Callable[..., Any]
    arguments: dict[str, Any]
    results: list[Any]
    forget: tuple[str, ...] = ()  # values that no later step reads
    writes: tuple[str, ...] = ()  # arguments that it changes in place
    numbers: tuple[str, ...] = ()  # arguments that are sizes, dimensions, paddings


def _step(node: Any) -> _Step:
    arguments = {argument["name"]: _argument(argument["name"], argument["arg"]) for argument in node["inputs"]}
    results = [_result(output) for output in node["outputs"]]
    target = node["target"]
    if target in _ARITHMETIC:
        function = _ARITHMETIC[target]
        return _Step(lambda **named: function(*named.values()), arguments, results)
    found = _TARGET.fullmatch(target)
    packet = getattr(torch.ops.aten, found[1], None) if found and found[1] in _OPERATORS else None
    overload = getattr(packet, found[2], None) if found else None
    if not isinstance(overload, torch._ops.OpOverload) or not _is_tensor_operator(overload):
        raise ArchiveError(
            f"operator {target!r}, expected one of torch.ops.aten that image classifiers use "
            f"(_OPERATORS in networks/archive.py); replace it in the model and {HOW_TO_EXPORT}"
        )
    # A flag that is computed may change from call to call.
    if any(arguments.get(name) not in (None, False) for name in ("train", "training")):
        raise ArchiveError(f"operator {target!r} is in training mode; {HOW_TO_EXPORT}")
    writes, numbers = [], []
    for argument in overload._schema.arguments:
        if "int" in str(argument.real_type) and argument.name not in ("start", "end"):  # of a slice: "to the end"
            numbers.append(argument.name)
        if argument.alias_info and argument.alias_info.is_write:
            writes.append(argument.name)
        if argument.name in arguments and not _fits(arguments[argument.name], str(argument.real_type)):
            got = arguments[argument.name]
            raise ArchiveError(
                f"operator {target!r} has {argument.name}={got!r}, expected {argument.real_type}; {HOW_TO_EXPORT}"
            )
    # It changes these without saying so.
    if arguments.get("use_input_stats", False) is not False:
        writes += ["running_mean", "running_var"]
    call = _batch_norm if overload.name() == _UNCHECKED_BATCH_NORM else overload
    return _Step(call, arguments, results, writes=tuple(writes), numbers=tuple(numbers))


def _is_tensor_operator(overload: Any) -> bool:
    """Return whether it is none of TorchScript's own (of numbers, lists and text), and none with unsafe arguments.

    `out` would be a tensor to fill; a scale beside a size is trusted where the size should be.
    """
    unsafe = any(one.is_out or one.name in ("scales_h", "scales_w") for one in overload._schema.arguments)
    return torch._C._dispatch_has_kernel(overload.name()) and not unsafe


def _fits(value: Any, kind: str) -> bool:
    """Return whether an argument is what torch does not check itself: no missing tensor, no number as a dtype."""
    if value is None:
        return kind.startswith("Optional[")
    return all(isinstance(value, type_) for name, type_ in _ENUMERATIONS.items() if name in kind)


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Answer as `_native_batch_norm_legit_no_training`, which does not compare its weights with the channels."""
    answer = torch.batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, False)
    return answer, answer.new_zeros(0), answer.new_zeros(0)


def _argument(name: str, argument: Any) -> Any:
    """Return a node's argument: plain values, _Reference and _TheDevice, in lists where the graph has lists."""
    ((kind, value),) = argument.items()
    match kind:
        case "as_none":
            return None
        case "as_tensor":
            return _Reference(value["name"])
        case "as_tensors":
            return [_Reference(item["name"]) for item in value]
        case "as_optional_tensors":
            return [_Reference(item["as_tensor"]["name"]) if "as_tensor" in item else None for item in value]
        case "as_sym_int" | "as_sym_float" | "as_sym_bool":
            return _symbol(value)
        case "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
            return [_symbol(item) for item in value]
        case "as_bool" | "as_int" | "as_bools" | "as_ints":
            return value
        case "as_float":
            return float(value)  # infinities are written as text
        case "as_floats":
            return [float(item) for item in value]
        case "as_scalar_type":
            return _DTYPES[value]
        case "as_memory_format":
            return _MEMORY_FORMATS[value]
        case "as_layout":
            return _LAYOUTS[value]
        case "as_device":
            return _TheDevice()
        case "as_string" if name in _TEXT_ARGUMENTS:
            return value
    raise ArchiveError(f"argument {name!r} of kind {kind!r}, expected tensors and numbers; {HOW_TO_EXPORT}")


def _symbol(value: Any) -> Any:
    return _Reference(value["as_name"]) if "as_name" in value else next(iter(value.values()))


def _result(output: Any) -> Any:
    ((kind, value),) = output.items()
    match kind:
        case "as_tensor":
            return value["name"]
        case "as_tensors":
            return [item["name"] for item in value]
        case "as_sym_int" | "as_sym_float" | "as_sym_bool":
            return value["as_name"]
        case "as_none":
            return None
    raise ArchiveError(f"result of kind {kind!r}, expected tensors and numbers")


class _Graph(nn.Module):
    """Runs the steps in order, on the device of the pictures."""

    def __init__(
        self,
        *,
        steps: list[_Step],
        weights: Mapping[str, Tensor],
        images: str,
        answer: str,
        largest_batch: int | None,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.images = images
        self.answer = answer
        self.largest_batch = largest_batch
        self.weight_names = list(weights)
        for i, tensor in enumerate(weights.values()):
            self.register_buffer(f"weight_{i}", tensor)
        kept = {answer, *weights}
        for step in reversed(steps):
            read = set(_references(list(step.arguments.values())))
            step.forget = tuple(read - kept)
            kept |= read

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return `answers_NK`, in as many calls as the largest batch asks for."""
        if self.largest_batch is None or len(images_NCHW) <= self.largest_batch:
            return self._run(images_NCHW)
        return torch.cat([self._run(part) for part in torch.split(images_NCHW, self.largest_batch)])

    def _run(self, images_NCHW: Tensor) -> Tensor:
        values: dict[str, Any] = {name: self.get_buffer(f"weight_{i}") for i, name in enumerate(self.weight_names)}
        # A part of a larger tensor would let `as_strided` see the rest.
        whole = images_NCHW.untyped_storage().nbytes() <= images_NCHW.nbytes
        values[self.images] = images_NCHW if whole else images_NCHW.clone()
        # One customer's pictures must not show in another's answers. Views share the memory they look at.
        weights = _memory_of(list(self.buffers()))
        for step in self.steps:
            named = {key: _value(item, values, images_NCHW.device) for key, item in step.arguments.items()}
            if any(_memory_of(named.get(name)) & weights for name in step.writes):
                raise ArchiveError(f"it changes its own weights: {step.call}; expected pure computation")
            if any(_too_large(named.get(name)) for name in step.numbers):
                raise ArchiveError(f"{step.call} is given sizes beyond {_LARGEST}, expected those of pictures")
            result = step.call(**named)
            results = [result] if len(step.results) == 1 else result
            for name, item in zip(step.results, results or (), strict=True):
                for part in item if isinstance(item, list | tuple) else [item]:
                    # Sparse and quantised tensors hold indices that torch trusts.
                    if isinstance(part, Tensor) and (part.layout != torch.strided or part.is_quantized):
                        raise ArchiveError(f"expected dense tensors of plain numbers, got another from {step.call}")
                values.update(zip(name, item, strict=True) if isinstance(name, list) else [(name, item)])
            for name in step.forget:
                del values[name]
        return cast(Tensor, values[self.answer])


def _value(item: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    if isinstance(item, _Reference):
        return values[item.name]
    if isinstance(item, _TheDevice):
        return device
    if isinstance(item, list):
        return [_value(part, values, device) for part in item]
    return item


def _too_large(item: Any) -> bool:
    if isinstance(item, list):
        return any(_too_large(part) for part in item)
    return isinstance(item, int) and abs(item) > _LARGEST


def _memory_of(item: Any) -> set[int]:
    """Return the addresses that tensors, in lists or alone, have their numbers at."""
    if isinstance(item, list):
        return set().union(*(_memory_of(part) for part in item))
    return {item.untyped_storage().data_ptr()} - {0} if isinstance(item, Tensor) else set()


def _references(items: list[Any]) -> list[str]:
    names = []
    for item in items:
        if isinstance(item, _Reference):
            names.append(item.name)
        elif isinstance(item, list):
            names += _references(item)
    return names
