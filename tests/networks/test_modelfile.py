"""Model files that load, and the one line that every other file gets."""

import copy
import io
import os
import pickle
import re
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks.modelfile import LoadedModel, ModelFacts, ModelFileError, describe_model, load_model, save_model
from networks.registry import build
from tests.models import resnet8_facts

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GIVEN: dict[str, object] = {"height": 32, "width": 32, "mean": MEAN, "std": STD}
FACTS = resnet8_facts(32, channels=3, labels="abcd", mean=MEAN, std=STD)


class Malice:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class Exported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2).softmax(1)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet8", class_count=4, channels=3).eval()


@pytest.fixture
def checkpoint(module: nn.Module, tmp_path: Path) -> Path:
    save_model(tmp_path / "checkpoint.pt", module, FACTS)
    return tmp_path / "checkpoint.pt"


@pytest.fixture
def bare(module: nn.Module, tmp_path: Path) -> Path:
    torch.save(module.state_dict(), tmp_path / "bare.pt")
    return tmp_path / "bare.pt"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    program = torch.export.export(
        Exported(), (torch.zeros(2, 3, 8, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def refusal(path: Path, **given: object) -> str:
    with pytest.raises(ModelFileError) as refused:
        load_model(path, given=given)
    text = str(refused.value)
    assert text.startswith(str(path)) and "\n" not in text and "Traceback" not in text
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
    return text


def answers(loaded: LoadedModel) -> Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        answer: Tensor = loaded.module(torch.rand(3, 3, 32, 32))
    return answer


def test_a_saved_checkpoint_comes_back_whole_with_nothing_else_said(checkpoint: Path, module: nn.Module) -> None:
    loaded = load_model(checkpoint)
    assert loaded.facts == FACTS
    assert not loaded.module.training
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.module.state_dict().items())
    assert answers(loaded).shape == (3, 4)


def test_a_checkpoint_holds_only_tensors_numbers_and_text(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    assert (content["format"], content["version"]) == ("mekd-model", 1)


def test_a_checkpoint_leaves_nothing_else_in_the_folder(checkpoint: Path) -> None:
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.pt"]


def test_a_failed_save_leaves_the_old_checkpoint_and_no_part(
    checkpoint: Path, module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checkpoint.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(checkpoint, module, FACTS)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "resnet14"}, "expected the weights of resnet14"),
        ({"labels": ("a", "b")}, "labels: expected 4, got 2"),
        ({"channels": 1}, "channels: the file says 3, got 1"),
        ({"std": (1.0,)}, "std: expected 3, got 1"),
    ],
)
def test_facts_that_do_not_fit_the_weights_are_not_saved(
    change: dict[str, Any], said: str, module: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=said):
        save_model(tmp_path / "new.pt", module, ModelFacts(**{**vars(FACTS), **change}))
    assert not list(tmp_path.iterdir())


def test_a_bare_state_dict_needs_no_architecture(bare: Path, checkpoint: Path) -> None:
    loaded = load_model(bare, given=GIVEN)
    assert loaded.facts == ModelFacts(**{**vars(FACTS), "labels": ("0", "1", "2", "3")})
    assert torch.equal(answers(loaded), answers(load_model(checkpoint)))


def test_none_is_not_given(bare: Path) -> None:
    assert load_model(bare, given=GIVEN | {"architecture": None, "labels": None}).facts.architecture == "resnet8"


def test_wrapped_and_prefixed_state_dicts_load(module: nn.Module, tmp_path: Path, bare: Path) -> None:
    weights = {f"module.{name}": value for name, value in module.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "wrapped.pt")
    assert load_model(tmp_path / "wrapped.pt", given=GIVEN).digest == load_model(bare, given=GIVEN).digest


def test_half_precision_weights_are_computed_with_in_full(module: nn.Module, tmp_path: Path) -> None:
    torch.save(copy.deepcopy(module).half().state_dict(), tmp_path / "half.pt")
    loaded = load_model(tmp_path / "half.pt", given=GIVEN)
    assert {value.dtype for value in loaded.module.parameters()} == {torch.float32}
    assert answers(loaded).shape == (3, 4)


def test_loading_draws_no_random_numbers(bare: Path) -> None:
    before = torch.get_rng_state()
    load_model(bare, given=GIVEN)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_facts_are_named_with_the_command_that_adds_them(bare: Path) -> None:
    said = refusal(bare, height=32, width=32)
    assert "missing mean, std;" in said
    assert f"teacher-admin model describe {bare} --input-shape C,H,W --mean a,b,c --std a,b,c" in said
    assert "[--labels FILE] [--arch NAME] [--output logits|probabilities]" in said


def test_a_described_model_needs_no_flags(bare: Path) -> None:
    written = describe_model(bare, given=GIVEN | {"labels": ["cat", "dog", "owl", "fox"]})
    assert written == bare.with_name("bare.pt.toml")
    assert tomllib.loads(written.read_text())["mean"] == list(MEAN)
    assert load_model(bare).facts == ModelFacts(**{**vars(FACTS), "labels": ("cat", "dog", "owl", "fox")})


def test_a_flag_wins_over_the_file_beside(bare: Path) -> None:
    describe_model(bare, given=GIVEN)
    facts = load_model(bare, given={"mean": [0.5, 0.5, 0.5]}).facts
    assert facts.mean == (0.5, 0.5, 0.5) and facts.std == STD


def test_nothing_is_described_that_does_not_load(bare: Path) -> None:
    with pytest.raises(ModelFileError, match="missing height"):
        describe_model(bare, given={"mean": MEAN, "std": STD, "width": 32})
    assert [path.name for path in bare.parent.iterdir()] == ["bare.pt"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mean", (0.0, 0.0, 0.0), "mean: the file says [0.485, 0.456, 0.406], got [0.0, 0.0, 0.0]"),
        ("height", 28, "height: the file says 32, got 28"),
        ("architecture", "resnet14", "architecture: the file says resnet8, got resnet14"),
        ("labels", ("x", "y", "z", "w"), "labels: the file says ['a', 'b', 'c', 'd'], got ['x', 'y', 'z', 'w']"),
        ("output", "probabilities", "output: the file says logits, got probabilities"),
    ],
)
def test_a_flag_may_not_contradict_a_checkpoint(name: str, value: object, said: str, checkpoint: Path) -> None:
    assert said in refusal(checkpoint, **{name: value})
    assert load_model(checkpoint, given={name: getattr(FACTS, name)}).facts == FACTS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": ["a", "b", "c"]}, "labels: expected 4, got 3"),
        ({"mean": [0.5]}, "mean: expected 3, got 1"),
        ({"std": [1, 1]}, "std: expected 3, got 2"),
        ({"std": [1, 0, 1]}, "std: expected a list of numbers above 0"),
        ({"mean": [0, float("nan"), 0]}, "mean: expected a list of numbers"),
        ({"mean": "0.5"}, "mean: expected a list of numbers"),
        ({"height": 0}, "height: expected a whole number"),
        ({"width": 3.5}, "width: expected a whole number"),
        ({"channels": 1}, "channels: the file says 3, got 1"),
        ({"output": "softmax"}, "output: expected logits or probabilities, got softmax"),
        ({"output": "probabilities"}, "output: the file says logits, got probabilities"),
        ({"architecture": "vgg11"}, "architecture: it is resnet8, got vgg11"),
        ({"colour": "red"}, "unknown fact 'colour'; known: architecture, labels"),
    ],
)
def test_a_wrong_fact_is_refused_by_name(change: dict[str, object], said: str, bare: Path) -> None:
    assert said in refusal(bare, **(GIVEN | change))


@pytest.mark.parametrize("text", [b"mean = [", b"\xff\xfe"])
def test_a_broken_file_beside_is_named(text: bytes, bare: Path) -> None:
    beside = bare.with_name("bare.pt.toml")
    beside.write_bytes(text)
    assert f"{beside}: expected the facts of a model as TOML" in refusal(bare)


def test_an_exported_model_says_its_shape_and_is_told_the_rest(exported: Path) -> None:
    assert "missing mean, std, output;" in refusal(exported)
    given = {"mean": [0, 0, 0], "std": [1, 1, 1], "output": "probabilities"}
    describe_model(exported, given=given)
    facts = load_model(exported).facts
    assert (facts.architecture, facts.channels, facts.height, facts.width) == ("torch.export", 3, 8, 4)
    assert facts.labels == ("0", "1", "2") and facts.output == "probabilities"
    assert "height: the file says 8, got 9" in refusal(exported, height=9)
    assert "architecture: it is torch.export, got resnet8" in refusal(exported, architecture="resnet8")
    with pytest.raises(ModelFileError, match=re.escape("expected the weights of torch.export")):
        save_model(exported.with_name("copy.pt"), load_model(exported).module, facts)


def test_an_archive_with_code_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with zipfile.ZipFile(exported, "a") as archive:
        archive.writestr("net/data/constants/opaque_obj_0", pickle.dumps(Malice(mark)))
    assert "member 'data/constants/opaque_obj_0' is a custom object" in refusal(exported)
    assert not mark.exists()


def test_the_digest_follows_weights_and_preprocessing_but_not_labels(bare: Path, checkpoint: Path) -> None:
    digest = load_model(bare, given=GIVEN).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert load_model(checkpoint).digest == digest
    assert load_model(bare, given=GIVEN | {"labels": list("wxyz")}).digest == digest
    for change in ({"mean": (0.5, 0.456, 0.406)}, {"std": (0.5, 0.224, 0.225)}, {"height": 28}):
        assert load_model(bare, given=GIVEN | change).digest != digest
    weights = torch.load(bare, weights_only=True)
    weights["linear.bias"][0] += 1e-3
    torch.save(weights, bare)
    assert load_model(bare, given=GIVEN).digest != digest


def test_the_digest_of_an_exported_model_follows_its_graph(exported: Path) -> None:
    given = {"mean": [0, 0, 0], "std": [1, 1, 1], "output": "logits"}
    digest = load_model(exported, given=given).digest
    assert load_model(exported, given=given | {"output": "probabilities"}).digest != digest
    program = torch.export.export(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (torch.zeros(2, 3, 8, 4),),
        dynamic_shapes=({0: torch.export.Dim("n")},),
    )
    torch.export.save(program, exported)
    assert load_model(exported, given=given).digest != digest


def test_a_pickle_with_code_is_named_and_not_run(bare: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    weights = torch.load(bare, weights_only=True)
    torch.save(weights | {"extra": Malice(mark)}, bare)
    said = refusal(bare, **GIVEN)
    assert f"{os.name}.system" in said and "none of it was run" in said
    assert not mark.exists()
    with pytest.raises(TypeError):
        len(torch.load(bare, weights_only=False)["extra"])
    assert mark.exists()  # it would have run


def test_a_whole_pickled_module_is_refused_with_what_to_save(module: nn.Module, tmp_path: Path) -> None:
    torch.save(module, tmp_path / "whole.pt")
    said = refusal(tmp_path / "whole.pt", **GIVEN)
    assert "a pickle that calls " in said and "networks.classifiers.ResNet" in said
    assert "save model.state_dict() instead" in said


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:  # the members that torch.jit.save writes
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"script/{name}", b"x")
    assert "TorchScript" in refusal(path)


def legacy(weights: dict[str, Tensor]) -> bytes:
    data = io.BytesIO()
    torch.save(weights, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda whole: b"", "empty file"),
        (lambda whole: b"hello", "expected a zip"),
        (lambda whole: whole[: len(whole) // 2], "cut short"),
        (lambda whole: whole[:-50], "cut short"),
        (lambda whole: legacy({"a": torch.zeros(1)}), "save it with PyTorch 1.6 or later"),
        (lambda whole: pickle.dumps({"a": 1}), "expected a zip"),
    ],
)
def test_a_file_that_is_no_model_is_refused(content: Callable[[bytes], bytes], said: str, bare: Path) -> None:
    bare.write_bytes(content(bare.read_bytes()))
    assert said in refusal(bare, **GIVEN)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "found none" in refusal(tmp_path / "no.pt")
    assert "got a folder" in refusal(tmp_path)


def test_another_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    assert "got another zip" in refusal(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "expected a state_dict, got list"),
        ({}, "expected a state_dict, got dict"),
        ({"a": 1}, "at 'a'"),
        ({"a": torch.zeros(2, device="meta")}, "at 'a'"),
        ({"a": torch.zeros(1, dtype=torch.complex64)}, "at 'a'"),
        ({"a": torch.zeros(1).expand(10**12)}, "at 'a'"),
        ({"a": torch.zeros(3)}, "its weights fit none of resnet8,"),
        ({"format": "mekd-model", "version": 2, "facts": {}}, "expected mekd-model of version 1, got 2"),
        (
            {"format": "mekd-model", "version": torch.ones(2), "facts": {}},
            "expected mekd-model of version 1, got tens",
        ),
        ({"format": "mekd-model", "version": 1}, "expected a checkpoint with its facts"),
        ({"format": "mekd-model", "version": 1, "facts": {"mean": 3}}, "mean: expected a list of numbers"),
    ],
)
def test_other_content_is_refused(content: object, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pt")
    assert said in refusal(tmp_path / "odd.pt", **GIVEN)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(number: float, bare: Path) -> None:
    weights = torch.load(bare, weights_only=True)
    weights["bn1.bias"][3] = number
    torch.save(weights, bare)
    assert "weight 'bn1.bias' holds NaN or infinity" in refusal(bare, **GIVEN)


def test_a_single_class_is_refused(bare: Path, tmp_path: Path) -> None:
    weights = torch.load(bare, weights_only=True)
    weights["linear.weight"], weights["linear.bias"] = weights["linear.weight"][:1].clone(), torch.zeros(1)
    torch.save(weights, bare)
    assert "at least 2 classes, got 1" in refusal(bare, **GIVEN)
    program = torch.export.export(
        nn.Flatten(), (torch.zeros(2, 1, 1, 1),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, tmp_path / "one.pt2")
    assert "at least 2 classes, got 1" in refusal(tmp_path / "one.pt2", mean=[0], std=[1], output="logits")


def test_weights_that_fit_several_architectures_need_a_name(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("networks.modelfile.fitting", lambda weights: ["resnet8", "resnet8_twin"])
    assert "its weights fit resnet8, resnet8_twin; teacher-admin model describe" in refusal(bare, **GIVEN)
    assert load_model(bare, given=GIVEN | {"architecture": "resnet8"}).facts.architecture == "resnet8"


@pytest.mark.skipif("MEKD_DATA" not in os.environ, reason="MEKD_DATA names no folder with the real teacher")
def test_the_real_teacher_knows_cifar_pictures(tmp_path: Path) -> None:
    import tarfile

    from PIL import Image

    root = Path(os.environ["MEKD_DATA"])
    loaded = load_model(root / "teachers" / "rn56.pt", given=GIVEN)
    assert loaded.facts.architecture == "resnet56_pad"
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    pictures, truth = [], []
    with tarfile.open(root / "cifar10-jpeg.tar.xz") as archive:
        for member in archive:
            _, part, *rest = member.name.rstrip("/").split("/")
            if part == "test" and len(rest) == 2 and int(rest[1].removesuffix(".jpg")) < 30:
                file = archive.extractfile(member)
                assert file is not None
                pictures.append(np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1))
                truth.append(classes.index(rest[0]))
    assert len(pictures) == 300
    images = torch.tensor(np.stack(pictures)).float() / 255
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        right = loaded.module(images).argmax(1) == torch.tensor(truth)
    assert right.float().mean() >= 0.85
