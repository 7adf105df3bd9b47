"""Model files: what is loaded, what it is said to be, and what is refused.

Three kinds are read: this package's own checkpoint (weights and facts in one file), a bare `state_dict`, and
an archive of `torch.export` (.pt2). Nothing in a file is ever executed. The facts that a file does not hold
come from FILE.toml beside it or from the caller's flags; a flag wins over FILE.toml, and neither may contradict
the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import tomli_w
import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from networks.archive import ArchiveError, members_of, read_archive
from networks.registry import CLASSIFIERS, build, fitting

_FORMAT = "mekd-model"
_VERSION = 1

EXPORTED = "torch.export"
"""The architecture of a model that brings its own graph."""


class ModelFileError(Exception):
    """A model file that is refused, in one line: the file, what was expected, what came, what to do."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a model is and wants.

    Pictures are `(N, channels, height, width)`, values in 0..1, then less `mean` and divided by `std`, one
    number a channel. `labels` names the classes in the order of the output.
    """

    architecture: str
    labels: tuple[str, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    output: Literal["logits", "probabilities"]


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode on the CPU, its facts, and the SHA-256 (hex) of all that shapes its answers."""

    module: nn.Module
    facts: ModelFacts
    digest: str


FACT_NAMES: tuple[str, ...] = tuple(fact.name for fact in fields(ModelFacts))
"""The keys of `given` and of FILE.toml."""


def load_model(path: Path, *, given: Mapping[str, object] = MappingProxyType({})) -> LoadedModel:
    """Return the model in `path`, described by itself, else by `given`, else by FILE.toml beside it.

    `given` has the keys of FACT_NAMES; None means not given. Labels default to "0" ... "K-1".

    Raises:
        ModelFileError: the file cannot be a model, holds code or numbers that are not finite, a fact is
            missing (named, with the command that adds it) or contradicts the file.
    """
    given = {name: value for name, value in given.items() if value is not None}
    found = _read(path)
    said = given if found.describes_itself else {**_read_toml(path), **given}
    said = {name: _checked(path, name, value) for name, value in said.items()}
    facts = _facts(path, found, said)
    module = found.module or _built(facts, found.tensors)
    return LoadedModel(module.eval(), facts, _digest(facts, found.graph, module.state_dict()))


def save_model(path: Path, module: nn.Module, facts: ModelFacts) -> None:
    """Write `module` and `facts` as one checkpoint that `load_model` reads with nothing else said.

    Raises:
        ModelFileError: as `model_bytes` does.
    """
    _write_then_rename(path, model_bytes(path, module, facts))


def model_bytes(path: Path, module: nn.Module, facts: ModelFacts) -> bytes:
    """Return what `save_model` writes to `path`, which names the file in errors.

    Raises:
        ModelFileError: the weights are not those of `facts.architecture`, or the facts do not fit them.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    fits = fitting(tensors)
    if facts.architecture not in fits:
        raise _refusal(path, f"expected the weights of {facts.architecture}, got those of {fits or 'no known one'}")
    own: dict[str, object] = {"channels": tensors["conv1.weight"].shape[1], "output": "logits"}
    _facts(path, _Found(own, fits, tensors["linear.weight"].shape[0]), asdict(facts))
    # Lists: the loader admits tensors, numbers, text, lists and dicts.
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(facts).items()}
    data = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, "facts": plain, "state_dict": tensors}, data)
    return data.getvalue()


def describe_model(path: Path, *, given: Mapping[str, object]) -> Path:
    """Write FILE.toml beside a model and return where; the model is loaded first, to be sure that it fits.

    Raises:
        ModelFileError: as `load_model` does.
    """
    facts = load_model(path, given=given).facts
    target = _toml_path(path)
    _write_then_rename(target, tomli_w.dumps(asdict(facts)).encode())
    return target


@dataclass(frozen=True)
class _Found:
    """What a file holds: the facts it settles by itself, and weights or a module that brings its graph."""

    facts: dict[str, object]
    architectures: list[str]  # those it can be
    class_count: int
    describes_itself: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)
    module: nn.Module | None = None
    graph: bytes = b""


def _read(path: Path) -> _Found:
    try:
        if path.is_dir():
            raise _refusal(path, "expected a model file, got a folder")
        if not path.is_file():
            raise _refusal(path, "expected a model file, found none")
        if path.stat().st_size == 0:
            raise _refusal(path, "expected a model, got an empty file; copy it again")
        members = members_of(path)
        if "archive_format" in members:
            return _read_exported(path)
    except ArchiveError as error:
        raise _refusal(path, str(error)) from None
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror}") from None
    if "constants.pkl" in members:
        raise _refusal(path, "expected weights, got TorchScript, which holds code; use torch.export.save instead")
    if "data.pkl" not in members:
        raise _refusal(path, "expected a file of torch.save or torch.export.save, got another zip")
    return _read_saved(path)


def _read_exported(path: Path) -> _Found:
    archive = read_archive(path)
    facts: dict[str, object] = {
        "channels": archive.channels,
        "height": archive.height,
        "width": archive.width,
    }
    return _Found(facts, [EXPORTED], archive.class_count, module=archive.module, graph=archive.graph)


def _read_saved(path: Path) -> _Found:
    try:
        named = sorted(get_unsafe_globals_in_checkpoint(path))
        content: Any = None if named else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a stranger's pickle can break is not to be listed
        raise _refusal(path, f"its content cannot be read ({type(error).__name__}); save it again") from None
    if named:
        raise _refusal(
            path,
            f"expected tensors, numbers and text, got a pickle that calls {', '.join(named[:3])}; "
            "none of it was run; save model.state_dict() instead",
        )
    facts: dict[str, object] = {}
    describes_itself = isinstance(content, dict) and content.get("format") == _FORMAT
    if describes_itself:
        version = content.get("version")
        if type(version) is not int or version != _VERSION:
            raise _refusal(path, f"expected {_FORMAT} of version {_VERSION}, got {_text(version)}; update mekd")
        if not isinstance(content.get("facts"), dict):
            raise _refusal(path, "expected a checkpoint with its facts, got none; save it again")
        facts = {name: _checked(path, name, value) for name, value in content["facts"].items()}
    tensors = _state_dict(path, content)
    fits = fitting(tensors)
    if not fits:
        if tensors.get("linear.weight", torch.empty(2, 0)).shape[:1] == (1,):
            raise _refusal(path, "expected at least 2 classes, got 1")
        raise _refusal(
            path, f"its weights fit none of {', '.join(CLASSIFIERS)}; save the model with torch.export.save instead"
        )
    linear, conv = tensors["linear.weight"], tensors["conv1.weight"]
    facts = {**facts, "channels": conv.shape[1], "output": "logits"}
    return _Found(facts, fits, linear.shape[0], describes_itself, tensors)


def _state_dict(path: Path, content: object) -> dict[str, Tensor]:
    """Return the tensors of a `state_dict`, out of a `{"state_dict": ...}` and without `module.` prefixes."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise _refusal(path, f"expected a state_dict, got {type(content).__name__}; save model.state_dict()")
    tensors = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or not _is_plain(value):
            raise _refusal(path, f"expected dense tensors of real numbers by name, got another thing at {key!r}")
        tensors[key.removeprefix("module.")] = value.detach()
        if not torch.isfinite(value).all():
            raise _refusal(path, f"weight {key!r} holds NaN or infinity; expected finite numbers")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Say whether every number of a tensor is stored: a stride of zero could claim terabytes."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _facts(path: Path, found: _Found, said: Mapping[str, object]) -> ModelFacts:
    """Return the facts of the file and those said about it, together; the file's own may not be contradicted."""
    for name in said.keys() & found.facts.keys():
        if said[name] != found.facts[name]:
            raise _refusal(path, f"{name}: the file says {_text(found.facts[name])}, got {_text(said[name])}")
    known: dict[str, Any] = {**said, **found.facts}
    if "architecture" not in known:
        if len(found.architectures) > 1:
            raise _refusal(path, f"its weights fit {', '.join(found.architectures)}; {_describe_command(path)}")
        known["architecture"] = found.architectures[0]
    if known["architecture"] not in found.architectures:
        raise _refusal(
            path, f"architecture: it is {', '.join(found.architectures)}, got {known['architecture']}; leave it out"
        )
    known.setdefault("labels", tuple(str(k) for k in range(found.class_count)))
    missing = [name for name in FACT_NAMES if name not in known]
    if missing:
        raise _refusal(path, f"missing {', '.join(missing)}; add with: {_describe_command(path)}")
    for name, count in (("labels", found.class_count), ("mean", known["channels"]), ("std", known["channels"])):
        if len(known[name]) != count:
            raise _refusal(path, f"{name}: expected {count}, got {len(known[name])}")
    if found.class_count < 2:
        raise _refusal(path, f"expected at least 2 classes, got {found.class_count}")
    return ModelFacts(**known)


def _checked(path: Path, name: object, value: object) -> Any:
    """Return one fact in the type that ModelFacts gives it."""
    match name:
        case "architecture" if isinstance(value, str):
            return value
        case "output" if value in ("logits", "probabilities"):
            return value
        case "channels" | "height" | "width" if type(value) is int and value > 0:
            return value
        case "labels" if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        case "mean" | "std" if isinstance(value, list | tuple) and all(_is_number(item) for item in value):
            if name == "mean" or min(value, default=1) > 0:
                return tuple(float(item) for item in value)
    if name not in FACT_NAMES:
        raise _refusal(path, f"unknown fact {name!r}; known: {', '.join(FACT_NAMES)}")
    raise _refusal(path, f"{name}: expected {_EXPECTED[str(name)]}, got {_text(value)}")


_EXPECTED = {
    "architecture": "a name",
    "labels": "a list of names, one a class",
    "channels": "a whole number above 0",
    "height": "a whole number of pixels above 0",
    "width": "a whole number of pixels above 0",
    "mean": "a list of numbers, one a channel",
    "std": "a list of numbers above 0, one a channel",
    "output": "logits or probabilities",
}


def _is_number(item: Any) -> bool:
    return type(item) in (int, float) and math.isfinite(item)


def _text(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value)[:200]


def _read_toml(path: Path) -> dict[str, object]:
    target = _toml_path(path)
    try:
        return tomllib.loads(target.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _refusal(target, f"expected the facts of a model as TOML: {error}") from None


def _toml_path(path: Path) -> Path:
    return path.with_name(path.name + ".toml")


def _built(facts: ModelFacts, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return the named architecture with these weights, in the types it computes in."""
    with torch.device("meta"):  # no random numbers are drawn for weights that are replaced at once
        module = build(facts.architecture, class_count=len(facts.labels), channels=facts.channels)
    types = {name: value.dtype for name, value in module.state_dict().items()}
    module.load_state_dict({name: tensors[name].to(types[name]) for name in types}, assign=True)
    return module


def _digest(facts: ModelFacts, graph: bytes, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over architecture, preprocessing and weights; labels change no answer."""
    said = {name: value for name, value in asdict(facts).items() if name != "labels"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode() + b"\n" + graph + b"\n")
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe_command(path: Path) -> str:
    return (
        f"teacher-admin model describe {path} --input-shape C,H,W --mean a,b,c --std a,b,c "
        "[--labels FILE] [--arch NAME] [--output logits|probabilities]"
    )


def _refusal(path: Path, what: str) -> ModelFileError:
    return ModelFileError(" ".join(f"{path}: {what}".split()))  # one line, whatever it quotes


def _write_then_rename(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, durable when this returns."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
