"""What ``edge-agent settings`` prints: a run.toml of all defaults, each with what it means.

The meaning is the string below each setting in `config`, where whoever changes a setting sees it.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from edge_agent import config
from edge_agent.config import SECTIONS, KServeConfig, RunConfig

_WIDTH = 110


def commented_defaults() -> str:
    """TOML in which nothing is set: each setting stands behind a # with its default, to be taken away."""
    meanings = _meanings()
    lines = [*_settings(RunConfig, meanings)]
    for name, kind in SECTIONS.items():
        lines += [f"[{name}]", *_settings(kind, meanings)]
    lines += [
        "# For a kserve:// teacher, where its metadata leave it open; its address is here, and none above.",
        "#[teacher]",
    ]
    lines += ['#address = "kserve://HOST:PORT/MODEL"', *_settings(KServeConfig, meanings)]
    return "\n".join(lines[:-1]) + "\n"


def _settings(kind: type[Any], meanings: dict[tuple[str, str], str]) -> Iterator[str]:
    for field in fields(kind):
        if field.type in SECTIONS.values() or field.type is KServeConfig:
            continue
        yield from textwrap.wrap(
            meanings[kind.__name__, field.name], _WIDTH, initial_indent="# ", subsequent_indent="# "
        )
        # JSON's text, numbers, booleans and lists of these are TOML's too.
        yield f"#{field.name} = {json.dumps('' if field.default is MISSING else field.default)}"
        yield ""


def _meanings() -> dict[tuple[str, str], str]:
    """(Class, setting) -> the string below the setting."""
    found = {}
    for kind in ast.parse(inspect.getsource(config)).body:
        if isinstance(kind, ast.ClassDef):
            for setting, below in zip(kind.body, kind.body[1:], strict=False):
                if (
                    isinstance(setting, ast.AnnAssign)
                    and isinstance(setting.target, ast.Name)
                    and isinstance(below, ast.Expr)
                    and isinstance(below.value, ast.Constant)
                ):
                    found[kind.name, setting.target.id] = " ".join(str(below.value.value).split())
    return found
