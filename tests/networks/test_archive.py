"""Archives as torch writes them, and archives that would run code, fill the memory or answer wrongly."""

import copy
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from networks.archive import _OPERATORS, ArchiveError, _tensors, read_archive
from networks.registry import build

Members = dict[str, bytes]


class Net(nn.Module):
    """Small, with what exports differ in: constants, symbolic sizes, in-place and many-valued operators, text."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), persistent=False)
        self.conv = nn.Conv2d(3, 8, 4, stride=4, padding="valid")
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / torch.tensor([0.2, 0.2, 0.25]).view(1, 3, 1, 1)
        x = self.norm(self.conv(x)).relu_()
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(images.shape[0], -1, -1), x], 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        low, high = x.chunk(2, dim=2)
        values, _ = torch.cat([high, low], 2).max(dim=1)
        x = nn.functional.gelu(self.drop(values), approximate="tanh").to(torch.float64).float()
        return self.head(x).softmax(1)


class OneInput(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        return self.function(x * self.scale)


def export(module: nn.Module, path: Path, *examples: Tensor, most: int | None = None) -> Path:
    batch = torch.export.Dim("n", max=most)
    dynamic = tuple({0: batch} for _ in examples)
    torch.export.save(torch.export.export(module, examples, dynamic_shapes=dynamic), path)
    return path


def members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {info.filename.split("/", 1)[1]: archive.read(info) for info in archive.infolist()}


def write(path: Path, content: Members, *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(f"net/{name}", data)
    return path


def edit(content: Members, member: str, change: Callable[[Any], None]) -> Members:
    value = json.loads(content[member])
    change(value)
    return content | {member: json.dumps(value).encode()}


class Malice:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def good(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(net, tmp_path_factory.mktemp("archive") / "net.pt2", torch.zeros(2, 3, 16, 12))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


def test_answers_are_those_of_the_module_and_of_torchs_own_loader(good: Path, net: nn.Module) -> None:
    model = read_archive(good)
    assert (model.channels, model.height, model.width, model.class_count) == (3, 16, 12, 5)
    with torch.inference_mode():
        own = torch.export.load(good).module()
        for count in (2, 1, 7):
            images = torch.randn(count, 3, 16, 12)
            assert torch.equal(model.module(images), own(images))
            torch.testing.assert_close(model.module(images), net(images))


@pytest.mark.parametrize("name", ["resnet8_pad", "vgg11"])
def test_exports_of_our_own_networks_answer_alike(name: str, tmp_path: Path) -> None:
    module = build(name, class_count=3, channels=1).eval()
    model = read_archive(export(module, tmp_path / "own.pt2", torch.zeros(2, 1, 8, 8)))
    images = torch.rand(4, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(model.module(images), module(images))


def test_a_larger_batch_than_the_graph_allows_is_answered_in_parts(net: nn.Module, tmp_path: Path) -> None:
    path = export(net, tmp_path / "net.pt2", torch.zeros(2, 3, 16, 12), most=4)
    model = read_archive(path)
    sizes: list[int] = []
    run = model.module._run  # type: ignore[operator,union-attr]
    model.module._run = lambda images: sizes.append(len(images)) or run(images)  # type: ignore[assignment,misc]
    images = torch.randn(9, 3, 16, 12)
    with torch.inference_mode():
        torch.testing.assert_close(model.module(images), net(images))
    assert sizes == [4, 4, 1]


def test_a_graph_exported_for_a_gpu_runs_on_the_cpu(good: Path, tmp_path: Path, net: nn.Module) -> None:
    content = members(good)
    text = content["models/model.json"].replace(b'"type": "cpu", "index": null', b'"type": "cuda", "index": 0')
    assert text != content["models/model.json"]
    model = read_archive(write(tmp_path / "gpu.pt2", content | {"models/model.json": text}))
    images = torch.rand(2, 3, 16, 12)
    with torch.inference_mode():
        torch.testing.assert_close(model.module(images), net(images))


def test_the_same_model_exported_twice_has_the_same_graph(good: Path, net: nn.Module, tmp_path: Path) -> None:
    again = export(net, tmp_path / "other name.pt2", torch.zeros(3, 3, 16, 12))
    assert read_archive(again).graph == read_archive(good).graph


def test_malicious_sample_inputs_are_never_opened(good: Path, tmp_path: Path, mark: Path) -> None:
    content = members(good) | {"data/sample_inputs/model.pt": pickle.dumps(Malice(mark))}
    read_archive(write(tmp_path / "bad.pt2", content))
    assert not mark.exists()


def test_malice_works_where_it_is_opened(mark: Path) -> None:
    with pytest.raises(TypeError):
        len(pickle.loads(pickle.dumps(Malice(mark))))
    assert mark.exists()


@pytest.mark.parametrize(
    ("member", "kind"),
    [
        ("data/weights/model.pt", "pickled weights or constants"),
        ("data/constants/model.pt", "pickled weights or constants"),
        ("data/constants/custom_obj_0", "a custom object"),
        ("data/constants/opaque_obj_0", "a custom object"),
        ("data/aotinductor/model/wrapper.so", "compiled code"),
        ("data/aotinductor/model/metadata.json", "compiled code"),
        ("extra/labels.txt", "an unknown member"),
        ("models/other.json", "an unknown member"),
    ],
)
def test_a_member_beyond_graph_and_tensors_is_refused_by_name(
    member: str, kind: str, good: Path, tmp_path: Path, mark: Path
) -> None:
    path = write(tmp_path / "bad.pt2", members(good) | {member: pickle.dumps(Malice(mark))})
    with pytest.raises(ArchiveError, match=f"member '{re.escape(member)}' is {kind}"):
        read_archive(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("folder", "config"),
    [("data/weights", "model_weights_config.json"), ("data/constants", "model_constants_config.json")],
)
def test_a_tensor_said_to_be_pickled_is_refused(
    folder: str, config: str, good: Path, tmp_path: Path, mark: Path
) -> None:
    content = members(good)
    first = json.loads(content[f"{folder}/{config}"])["config"]
    name, entry = next(iter(first.items()))
    content = edit(content, f"{folder}/{config}", lambda value: value["config"][name].update(use_pickle=True))
    content[f"{folder}/{entry['path_name']}"] = pickle.dumps(Malice(mark))
    with pytest.raises(ArchiveError, match=f"'{re.escape(name)}' is pickled"):
        read_archive(write(tmp_path / "bad.pt2", content))
    assert not mark.exists()


def test_a_tensor_from_another_member_is_refused(good: Path, tmp_path: Path) -> None:
    content = edit(
        members(good),
        "data/weights/model_weights_config.json",
        lambda value: value["config"]["conv.weight"].update(path_name="../../byteorder"),
    )
    with pytest.raises(ArchiveError, match="lies in"):
        read_archive(write(tmp_path / "bad.pt2", content))


@pytest.mark.parametrize("name", ["../outside", "net/../../outside", "/outside", "net\\outside"])
def test_a_member_that_leaves_the_folder_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.pt2", members(good))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ArchiveError, match="leaves the archive's folder"):
        read_archive(path)


def test_a_compressed_bomb_is_refused_unread(good: Path, tmp_path: Path) -> None:
    content = {"data/weights/weight_99": bytes(50_000_000)} | members(good)
    path = write(tmp_path / "bad.pt2", content, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ArchiveError, match="is compressed"):
        read_archive(path)


def test_a_bomb_of_overlapping_members_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data/weights/weight_0", bytes(100_000))
        for i in range(1, 50):
            twin = copy.copy(archive.filelist[0])
            twin.filename = f"net/data/weights/weight_{i}"
            archive.filelist.append(twin)
    with pytest.raises(ArchiveError, match="more bytes than the file has"):
        read_archive(path)


def test_a_tensor_larger_than_its_bytes_is_refused(good: Path, tmp_path: Path) -> None:
    def stretch(value: Any) -> None:
        meta = value["config"]["head.bias"]["tensor_meta"]
        meta.update(sizes=[{"as_int": 10**12}], strides=[{"as_int": 0}])

    content = edit(members(good), "data/weights/model_weights_config.json", stretch)
    with pytest.raises(ArchiveError, match=r"'head\.bias' claims"):
        read_archive(write(tmp_path / "bad.pt2", content))


def test_a_tensor_outside_its_bytes_is_refused(good: Path, tmp_path: Path) -> None:
    def shift(value: Any) -> None:
        value["config"]["head.bias"]["tensor_meta"]["storage_offset"] = {"as_int": 1}

    content = edit(members(good), "data/weights/model_weights_config.json", shift)
    with pytest.raises(ArchiveError, match="out of bounds"):
        read_archive(write(tmp_path / "bad.pt2", content))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(number: float, good: Path, tmp_path: Path) -> None:
    content = members(good)
    config = json.loads(content["data/weights/model_weights_config.json"])["config"]
    member = "data/weights/" + config["head.bias"]["path_name"]
    content[member] = torch.tensor([0, 0, number, 0, 0]).numpy().tobytes()
    with pytest.raises(ArchiveError, match=r"'head\.bias' holds NaN or infinity"):
        read_archive(write(tmp_path / "bad.pt2", content))


def node(content: Members, change: Callable[[Any], None], target: str = "softmax") -> Members:
    """Change the node with this operator."""

    def apply(value: Any) -> None:
        (found,) = [n for n in value["graph_module"]["graph"]["nodes"] if f".{target}." in n["target"]]
        change(found)

    return edit(content, "models/model.json", apply)


def text_argument(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "arg": {"as_string": text}, "kind": 1}


def test_an_operator_outside_aten_is_refused_by_name(good: Path, tmp_path: Path, mark: Path) -> None:
    def attack(found: Any) -> None:
        found.update(target="torch.hub.os.system", inputs=[text_argument("mode", f"touch {mark}")])

    with pytest.raises(ArchiveError, match=r"operator 'torch\.hub\.os\.system'"):
        read_archive(write(tmp_path / "bad.pt2", node(members(good), attack)))
    assert not mark.exists()


@pytest.mark.parametrize("target", ["torch.ops.aten.no_such.default", "torch.ops.aten.__class__.__init__", "eval"])
def test_an_operator_that_does_not_exist_is_refused(target: str, good: Path, tmp_path: Path) -> None:
    content = node(members(good), lambda found: found.update(target=target))
    with pytest.raises(ArchiveError, match=f"operator '{re.escape(target)}'"):
        read_archive(write(tmp_path / "bad.pt2", content))


@pytest.mark.parametrize("name", ["filename", "mode"])
def test_an_operator_that_opens_files_gets_no_file_name(name: str, good: Path, tmp_path: Path, mark: Path) -> None:
    def attack(found: Any) -> None:
        shared = {"name": "shared", "arg": {"as_bool": True}, "kind": 1}
        size = {"name": "size", "arg": {"as_int": 10}, "kind": 1}
        found.update(target="torch.ops.aten.from_file.default", inputs=[text_argument(name, str(mark)), shared, size])

    with pytest.raises(ArchiveError):
        read_archive(write(tmp_path / "bad.pt2", node(members(good), attack)))
    assert not mark.exists()
    torch.from_file(str(mark), shared=True, size=10)  # the operator itself would have made the file
    assert mark.exists()


def test_an_operator_called_for_its_effect_is_refused(good: Path, tmp_path: Path) -> None:
    content = node(members(good), lambda found: found.update(target="torch.ops.aten._print.default"))
    with pytest.raises(ArchiveError, match=r"operator .*_print.*expected one of torch\.ops\.aten"):
        read_archive(write(tmp_path / "bad.pt2", content))


@pytest.mark.parametrize(
    "name",
    ["empty.memory_format", "empty_like.default", "new_empty.default", "resize_.default", "set_.source_Tensor"],
)
def test_an_operator_that_shows_what_lay_in_memory_before_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    content = node(members(good), lambda found: found.update(target=f"torch.ops.aten.{name}"))
    with pytest.raises(ArchiveError, match=r"operator .*expected one of torch\.ops\.aten"):
        read_archive(write(tmp_path / "bad.pt2", content))


def test_sizes_are_never_evaluated(good: Path, tmp_path: Path, mark: Path) -> None:
    text = f"__import__('os').system('touch {mark}')"

    def attack(value: Any) -> None:
        for meta in value["graph_module"]["graph"]["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = text
        value["guards_code"] = [text]

    with pytest.raises(ArchiveError, match="expected a free batch size"):
        read_archive(write(tmp_path / "bad.pt2", edit(members(good), "models/model.json", attack)))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.clear(), "KeyError"),
        (lambda value: value["schema_version"].update(major=7), "expected version 8"),
        (lambda value: value["graph_module"]["graph"].update(nodes=None), "TypeError"),
        (lambda value: value["graph_module"]["graph"]["nodes"].pop(), "KeyError"),
        (lambda value: value["graph_module"]["signature"]["output_specs"].append({"token": {}}), "one output"),
        (lambda value: value["graph_module"]["signature"]["input_specs"].append({"custom_obj": {}}), "'custom_obj'"),
    ],
)
def test_a_broken_graph_is_refused(change: Callable[[Any], None], said: str, good: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=said):
        read_archive(write(tmp_path / "bad.pt2", edit(members(good), "models/model.json", change)))


@pytest.mark.parametrize("missing", ["models/model.json", "data/weights/model_weights_config.json", "byteorder"])
def test_a_missing_member_is_refused(missing: str, good: Path, tmp_path: Path) -> None:
    content = {name: data for name, data in members(good).items() if name != missing}
    with pytest.raises(ArchiveError, match=missing):
        read_archive(write(tmp_path / "bad.pt2", content))


def test_an_archive_cut_short_is_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt2"
    whole = good.read_bytes()
    for length in (20, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ArchiveError, match="cut short"):
            read_archive(path)


def test_flipped_bytes_are_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    weight = members(good)["data/weights/weight_0"]
    assert data.count(weight) == 1 and len(weight) > 8
    path = tmp_path / "flipped.pt2"
    path.write_bytes(data.replace(weight, weight[:-1] + bytes([weight[-1] ^ 1])))
    with pytest.raises(ArchiveError, match="CRC"):
        read_archive(path)


def test_a_fixed_batch_is_refused_with_how_to_export(tmp_path: Path) -> None:
    path = tmp_path / "fixed.pt2"
    torch.export.save(torch.export.export(OneInput(lambda x: x.flatten(1)), (torch.zeros(4, 1, 2, 2),)), path)
    with pytest.raises(ArchiveError, match=r"exactly 4 pictures .* torch\.export\.Dim\('n'\)"):
        read_archive(path)


def test_an_export_in_training_mode_is_refused(tmp_path: Path) -> None:
    path = export(
        OneInput(lambda x: nn.functional.dropout(x.flatten(1))), tmp_path / "t.pt2", torch.zeros(2, 1, 2, 2)
    )
    with pytest.raises(ArchiveError, match=r"training mode.*model\.eval"):
        read_archive(path)


def test_an_export_that_changes_its_own_buffers_is_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).train()
    with pytest.raises(ArchiveError, match=r"no change of weights|training mode"):
        read_archive(export(module, tmp_path / "t.pt2", torch.zeros(2, 1, 2, 2)))


@pytest.mark.parametrize(
    ("function", "example", "said"),
    [
        (lambda x: x.flatten(1), torch.zeros(2, 16), "float32 pictures"),
        (lambda x: x.flatten(1), torch.zeros(2, 1, 2, 2, dtype=torch.float64), "float32 pictures"),
        (lambda x: x, torch.zeros(2, 1, 2, 2), r"one output \(N, K\)"),
        (lambda x: (x.flatten(1), x), torch.zeros(2, 1, 2, 2), "one output"),
        (lambda x: x.flatten(1).sum(0, keepdim=True).expand(5, 4), torch.zeros(2, 1, 2, 2), "expected answers"),
    ],
)
def test_a_graph_that_is_no_classifier_of_pictures_is_refused(
    function: Callable[[Tensor], Any], example: Tensor, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ArchiveError, match=said):
        read_archive(export(OneInput(function), tmp_path / "odd.pt2", example))


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x + y).flatten(1)

    images = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ArchiveError, match="one input of pictures, got 2"):
        read_archive(export(Two(), tmp_path / "two.pt2", images, images))


def test_a_file_that_is_no_zip_is_refused(tmp_path: Path) -> None:
    legacy = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, legacy, _use_new_zipfile_serialization=False)
    path = tmp_path / "legacy.pt"
    path.write_bytes(legacy.getvalue())
    with pytest.raises(ArchiveError, match="expected a zip"):
        read_archive(path)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 5))
        self.linear = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) + self.seen


def call_of(target: str, result: str, /, **arguments: Any) -> dict[str, Any]:
    inputs = [{"name": name, "arg": argument, "kind": 1} for name, argument in arguments.items()]
    return {"target": target, "inputs": inputs, "outputs": [{"as_tensor": {"name": result}}], "metadata": {}}


def named(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


@pytest.mark.parametrize("view", ["alias.default", "_unsafe_view.default", "unsafe_chunk.default", "data.default"])
def test_a_graph_that_remembers_pictures_from_call_to_call_is_refused(
    view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("networks.archive._OPERATORS", _OPERATORS | {"data"})

    def change(program: Any) -> None:
        nodes = program["graph_module"]["graph"]["nodes"]
        more = (
            {"size": {"as_ints": [1, 5]}} if "view" in view else {"chunks": {"as_int": 1}} if "chunk" in view else {}
        )
        look = call_of(f"torch.ops.aten.{view}", "look", self=named("b_seen"), **more)
        if "chunk" in view:
            look["outputs"] = [{"as_tensors": [{"name": "look"}]}]
        mean = call_of(
            "torch.ops.aten.mean.dim",
            "mean",
            self=named("linear"),
            dim={"as_ints": [0]},
            keepdim={"as_bool": True},
        )
        keep = call_of("torch.ops.aten.add_.Tensor", "kept", self=named("look"), other=named("mean"))
        nodes[-1:-1] = [mean, look, keep]

    good = export(Remembering(), tmp_path / "good.pt2", torch.zeros(2, 3, 4, 4))
    path = write(tmp_path / "bad.pt2", edit(members(good), "models/model.json", change))
    with pytest.raises(ArchiveError, match="changes its own weights"):
        read_archive(path)


def test_an_operator_that_trusts_its_indices_is_refused_before_it_runs(tmp_path: Path) -> None:
    """The indices lie far outside: torch would read and write beyond the tensor."""

    def change(program: Any) -> None:
        sparse = call_of(
            "torch.ops.aten._sparse_coo_tensor_unsafe.default",
            "sparse",
            indices=named("b_seen"),
            values=named("b_seen"),
            size={"as_ints": [3, 5]},
        )
        program["graph_module"]["graph"]["nodes"].insert(0, sparse)

    good = export(Remembering(), tmp_path / "good.pt2", torch.zeros(2, 3, 4, 4))
    path = write(tmp_path / "bad.pt2", edit(members(good), "models/model.json", change))
    with pytest.raises(ArchiveError, match=r"_sparse_coo_tensor_unsafe.*expected one of torch\.ops\.aten"):
        read_archive(path)


@pytest.fixture
def never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("the graph was run")

    monkeypatch.setattr("networks.archive._Graph.forward", run)


def first(path: Path, *nodes: Any) -> Path:
    """Write an archive of `Remembering` whose graph begins with these nodes."""
    good = export(Remembering(), path.with_name("good.pt2"), torch.zeros(2, 3, 4, 4))
    change = lambda program: program["graph_module"]["graph"]["nodes"].__setitem__(slice(0, 0), nodes)  # noqa: E731
    return write(path, edit(members(good), "models/model.json", change))


def ints(*numbers: int) -> dict[str, Any]:
    return {"as_ints": list(numbers)}


FAR = {"as_int": 1_000_000_000}
POOL_2D = {"kernel_size": ints(2, 2), "stride": ints(2, 2), "padding": ints(0, 0), "dilation": ints(1, 1)}
POOL_3D = {name: ints(*value["as_ints"], value["as_ints"][0]) for name, value in POOL_2D.items()}
LOSS = {"weight": {"as_none": True}, "reduction": {"as_int": 1}}


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("max_pool2d_with_indices_backward.default", {**POOL_2D, "ceil_mode": {"as_bool": False}}),
        ("max_pool3d_with_indices_backward.default", {**POOL_3D, "ceil_mode": {"as_bool": False}}),
        ("adaptive_max_pool2d_backward.default", {}),
        ("adaptive_max_pool3d_backward.default", {}),
        ("max_unpool2d.default", {"output_size": ints(4, 4)}),
        ("nll_loss_backward.default", LOSS),
        ("nll_loss2d_backward.default", LOSS),
        ("ctc_loss.IntList", {"input_lengths": ints(10**9), "target_lengths": ints(10**9)}),
        ("native_batch_norm.default", {"training": {"as_bool": False}, "eps": {"as_float": 1.0}}),
        ("_weight_norm.default", {}),
        ("_transformer_encoder_layer_fwd.default", {}),
        ("_scaled_dot_product_flash_attention_for_cpu.default", {}),
        ("add.out", {"out": named("b_seen")}),  # listed, but not as what fills another tensor
        ("upsample_nearest2d.default", {"output_size": ints(3, 3), "scales_w": {"as_float": 1e-30}}),
        ("remainder.int", {}),
        ("slice.str", {}),  # TorchScript's own, of text
        ("sigmoid__.default", {}),
    ],
)
def test_an_operator_that_is_not_listed_is_refused_before_anything_is_run(
    operator: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    indices = call_of("torch.ops.aten.full.default", "indices", size=ints(1, 5), fill_value=FAR)
    target = f"torch.ops.aten.{operator}"
    packet, overload = operator.split(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    names = [argument.name for argument in found._schema.arguments] if found else []
    given = {name: named("b_seen") for name in names if name in ("grad_output", "self", "input", "weight", "v", "g")}
    given |= {name: named("indices") for name in names if name in ("indices", "target", "targets")}
    path = first(tmp_path / "bad.pt2", indices, call_of(target, "harm", **{**given, **arguments}))
    with pytest.raises(ArchiveError, match=f"operator '{target}', expected one of torch.ops.aten .*; replace it"):
        read_archive(path)


@pytest.mark.usefixtures("never_run")
@pytest.mark.parametrize(
    ("operator", "name", "value", "expected"),
    [
        ("sum.default", "dtype", {"as_int": -1}, "ScalarType"),
        ("zeros_like.default", "memory_format", {"as_int": 10**9}, "MemoryFormat"),
        ("zeros_like.default", "layout", {"as_int": 10**9}, "Layout"),
        ("sum.default", "dtype", {"as_sym_int": {"as_name": "n"}}, "ScalarType"),
        ("copy.default", "self", {"as_none": True}, "Tensor"),
    ],
)
def test_a_number_for_a_type_or_no_tensor_for_one_is_refused_before_anything_is_run(
    operator: str, name: str, value: Any, expected: str, tmp_path: Path
) -> None:
    """Torch looks such numbers up beyond the end of its tables."""
    bad = call_of(f"torch.ops.aten.{operator}", "bad", **{"self": named("b_seen"), name: value})
    with pytest.raises(ArchiveError, match=rf"operator .* has {name}=.*, expected .*{expected}"):
        read_archive(first(tmp_path / "bad.pt2", bad))


@pytest.mark.parametrize("computed", [False, True])
def test_a_padding_that_wraps_around_is_refused(computed: bool, tmp_path: Path) -> None:
    """Torch's own checks add such numbers up to a small one, and what reads with them crashes."""
    far = 2**63 - 1
    large = call_of("_operator.mul", "", a={"as_int": far}, b={"as_int": 1}) | {
        "outputs": [{"as_sym_int": {"as_name": "far"}}]
    }
    name = {"as_name": "far"} if computed else {"as_int": far}
    padding = {"as_sym_ints": [name, name, {"as_int": 2}, {"as_int": -1}]}
    pad = call_of("torch.ops.aten.replication_pad2d.default", "bad", self=named("x"), padding=padding)
    with pytest.raises(ArchiveError, match="sizes beyond"):
        read_archive(first(tmp_path / "bad.pt2", large, pad))


@pytest.mark.parametrize("name", ["index.Tensor", "index_select.default", "gather.default", "embedding.default"])
@pytest.mark.parametrize("far", [5, -6, 10**9, -(2**63), 2**63 - 1])
def test_an_index_outside_is_refused_by_the_operators_that_are_listed(name: str, far: int, tmp_path: Path) -> None:
    indices = call_of("torch.ops.aten.full.default", "indices", size=ints(1), fill_value={"as_int": far})
    flat = call_of("torch.ops.aten.view.default", "flat", self=named("b_seen"), size=ints(5))
    arguments: dict[str, dict[str, Any]] = {
        "index.Tensor": {"self": named("flat"), "indices": {"as_tensors": [{"name": "indices"}]}},
        "embedding.default": {"weight": named("b_seen"), "indices": named("indices")},
    }
    other = {"self": named("flat"), "dim": {"as_int": 0}, "index": named("indices")}
    look = call_of(f"torch.ops.aten.{name}", "look", **arguments.get(name, other))
    with pytest.raises(ArchiveError, match=r"out of (range|bounds)"):
        read_archive(first(tmp_path / "bad.pt2", indices, flat, look))


def test_a_decomposed_batch_norm_with_too_few_weights_is_refused(tmp_path: Path) -> None:
    """Torch's own operator reads beyond their end."""
    module = nn.Sequential(nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5)).eval()
    program = torch.export.export(module, (torch.zeros(2, 8, 2, 2),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program.run_decompositions(), tmp_path / "good.pt2")
    read_archive(tmp_path / "good.pt2")

    def change(found: Any) -> None:
        (mean,) = [item for item in found["inputs"] if item["name"] == "running_mean"]
        mean["arg"] = named("p_2_bias")  # 5 numbers for 8 channels

    content = node(members(tmp_path / "good.pt2"), change, "_native_batch_norm_legit_no_training")
    with pytest.raises(ArchiveError, match="running_mean should contain 8 elements"):
        read_archive(write(tmp_path / "bad.pt2", content))


SIZE = call_of("torch.ops.aten.sym_size.int", "", self=named("x"), dim={"as_int": 0}) | {
    "outputs": [{"as_sym_int": {"as_name": "n"}}]
}
MANY = call_of("_operator.gt", "", a={"as_sym_int": {"as_name": "n"}}, b={"as_int": 4}) | {
    "outputs": [{"as_sym_bool": {"as_name": "many"}}]
}


@pytest.mark.parametrize(
    ("operator", "flag"), [("batch_norm", "training"), ("instance_norm", "use_input_stats"), ("dropout", "train")]
)
@pytest.mark.parametrize("value", [{"as_sym_bool": {"as_name": "many"}}, {"as_int": 1}])
def test_a_graph_that_would_learn_from_larger_batches_is_refused(
    operator: str, flag: str, value: Any, tmp_path: Path
) -> None:
    """At loading the batches hold at most 3 pictures: what changes only with more would not show."""
    look = call_of("torch.ops.aten.view.default", "look", self=named("b_seen"), size=ints(5))
    repeated = call_of("torch.ops.aten.expand.default", "repeated", self=named("b_seen"), size=ints(2, 5))
    stats = {"running_mean": named("look"), "running_var": named("look")}
    rest = {"momentum": {"as_float": 0.1}, "eps": {"as_float": 1.0}, "cudnn_enabled": {"as_bool": False}}
    none = {"weight": {"as_none": True}, "bias": {"as_none": True}}
    norm = {"input": named("repeated"), **none, **stats, flag: value, **rest}
    drop = {"input": named("repeated"), "p": {"as_float": 0.5}, flag: value}
    call = call_of(f"torch.ops.aten.{operator}.default", "kept", **(drop if operator == "dropout" else norm))
    with pytest.raises(ArchiveError, match=r"training mode|changes its own weights"):
        read_archive(first(tmp_path / "bad.pt2", SIZE, MANY, look, repeated, call))


def test_a_graph_sees_no_pictures_but_those_it_is_given(tmp_path: Path) -> None:
    """Pictures of one batch may be a part of a tensor whose rest belongs to others."""
    path = tmp_path / "look.pt2"
    module = OneInput(lambda x: x).eval()
    module.forward = lambda x: x.as_strided((x.shape[0], 4), (0, 1), 0) * module.scale  # type: ignore[method-assign]
    model = read_archive(export(module, path, torch.zeros(2, 1, 2, 2)))
    images = torch.arange(12.0).view(3, 1, 2, 2)
    with torch.inference_mode():
        assert torch.equal(model.module(images[1:]), images[1].view(1, 4).expand(2, 4))


SMALL: dict[str, Callable[[], nn.Module]] = {
    "mobilenet": lambda: models.MobileNetV2(5, inverted_residual_setting=[[1, 8, 1, 1]]),
    "vit": lambda: models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=5),
    "swin": lambda: models.SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=5),
    "convnext": lambda: ConvNeXt([CNBlockConfig(8, None, 2)], num_classes=5),
}


@pytest.mark.parametrize(
    ("name", "decomposed"), [*((name, False) for name in SMALL), ("mobilenet", True), ("convnext", True)]
)
def test_torchvisions_networks_answer_as_the_module_does(name: str, decomposed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SMALL[name]().eval()
    program = torch.export.export(module, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program.run_decompositions() if decomposed else program, tmp_path / "net.pt2")
    model = read_archive(tmp_path / "net.pt2")
    images = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.module(images), module(images))


def test_a_sparse_tensor_is_refused_however_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("networks.archive._OPERATORS", _OPERATORS | {"to_sparse"})

    def change(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"].insert(
            0, call_of("torch.ops.aten.to_sparse.default", "sparse", self=named("b_seen"))
        )

    good = export(Remembering(), tmp_path / "good.pt2", torch.zeros(2, 3, 4, 4))
    path = write(tmp_path / "bad.pt2", edit(members(good), "models/model.json", change))
    with pytest.raises(ArchiveError, match="expected dense tensors"):
        read_archive(path)


def test_tensors_in_one_member_share_its_memory(good: Path, tmp_path: Path) -> None:
    """A small file that names a large member a thousand times must not fill the memory."""

    def change(config: Any) -> None:
        entry = next(iter(config["config"].values()))
        config["config"].update({f"more{i}": entry for i in range(3)})

    path = write(tmp_path / "n.pt2", edit(members(good), "data/weights/model_weights_config.json", change))
    read: list[str] = []
    with zipfile.ZipFile(path) as archive:

        def noted(member: str) -> bytes:
            read.append(member)
            return archive.read(f"net/{member}")

        _tensors(noted, "data/weights")
    assert len(read) == len(set(read))
