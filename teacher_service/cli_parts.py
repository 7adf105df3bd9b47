"""What the service's command lines share: flags, the key of the books, and how they refuse."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import click

T = TypeVar("T")

_BAD_INPUT = 2
_DEFAULT_LEDGER = "sqlite:///mekd-ledger.db"
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "auto_envvar_prefix": None}


def facts_options(command: Callable[..., T]) -> Callable[..., T]:
    """The flags that state facts of a model, the same for ``teacher-serve`` and ``model describe``."""
    for option in reversed(
        (
            click.option(
                "--arch", metavar="NAME", help="Architecture, where the weights fit more than one (resnet56, …)."
            ),
            click.option(
                "--input-shape", metavar="C,H,W", callback=_shape, help="Pictures the model takes, e.g. 3,32,32."
            ),
            click.option(
                "--mean", metavar="A,B,C", callback=_numbers, help="Subtracted per channel, of pixels in [0, 1]."
            ),
            click.option("--std", metavar="A,B,C", callback=_numbers, help="Divided by per channel, after the mean."),
            click.option(
                "--labels",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                metavar="FILE",
                help="Class names, one a line, in the order of the model's outputs.",
            ),
            click.option(
                "--output",
                type=click.Choice(["logits", "probabilities"]),
                help="What the model returns; needed for .pt2 archives only.",
            ),
        )
    ):
        command = option(command)
    return command


def ledger_options(command: Callable[..., T]) -> Callable[..., T]:
    """The flags that say where the books are, the same for both programs."""
    for option in reversed(
        (
            click.option(
                "--ledger",
                default=_DEFAULT_LEDGER,
                show_default=True,
                envvar="MEKD_LEDGER",
                show_envvar=True,
                metavar="URL",
                help="The books: sqlite:///FILE or postgresql://USER@HOST/DATABASE; or a server that has them, "
                "grpc://HOST:PORT or grpcs://HOST:PORT, with its key in MEKD_LEDGER_KEY.",
            ),
            click.option(
                "--ledger-ca",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="Of grpcs://, the authority that signed the ledger server's certificate.",
            ),
            click.option(
                "--ledger-insecure",
                is_flag=True,
                help="Allow grpc:// beyond loopback: key and answers travel in the clear.",
            ),
        )
    ):
        command = option(command)
    return command


def given_facts(
    arch: str | None,
    input_shape: tuple[int, ...] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    labels: Path | None,
    output: str | None,
) -> dict[str, object]:
    """What `facts_options` were given, as a model file names it. Ends the program where --labels is unreadable."""
    facts: dict[str, object] = {"architecture": arch, "mean": mean, "std": std, "output": output}
    for name, given in (("mean", mean), ("std", std)):
        if given is not None and not all(0 <= number <= 1 for number in given):
            fail(
                f"--{name}: expected numbers from 0 to 1, for pixels from 0 to 1, got "
                f"{','.join(f'{number:g}' for number in given)}; divide those for pixels from 0 to 255 by 255"
            )
    if input_shape is not None:
        facts["channels"], facts["height"], facts["width"] = input_shape
    if labels is not None:
        try:
            facts["labels"] = tuple(line for line in labels.read_text("utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            fail(f"--labels {labels}: expected a text file in UTF-8, one class name a line ({error})")
    return {name: value for name, value in facts.items() if value is not None}


def ledger_key() -> str:
    """The credential for a ledger elsewhere: from the environment alone, for every user can read a command line."""
    return os.environ.get("MEKD_LEDGER_KEY", "").strip()


def fail(line: str) -> NoReturn:
    """Ends the program with one line on standard error and exit status 2."""
    click.echo(f"error: {line}", err=True)
    sys.exit(_BAD_INPUT)


def _numbers(_context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"expected numbers with commas between, got {text!r}") from None


def _shape(_context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(f"expected CHANNELS,HEIGHT,WIDTH, for example 3,32,32; got {text!r}")
    return tuple(int(part) for part in parts)
