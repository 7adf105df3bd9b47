"""``edge-agent``: flags, environment and run.toml in; a run, and an exit code that scripts can rely on, out."""

import io
import json
import os
import signal
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from edge_agent.config import (
    PHASES,
    PRESETS,
    ConfigError,
    RunConfig,
    build_config,
    differing,
    parse_setting,
    preset_layer,
)
from edge_agent.failures import BadInput, Failure

if TYPE_CHECKING:
    from edge_agent.journal import Totals

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

EXIT_CODES = """\b
Exit status:
  0 done                     4 the teacher is away        7 the disk refuses
  2 bad input                5 the key is refused         130 SIGINT
  3 the budget is spent      6 the run folder             143 SIGTERM
After any of them the same command goes on where it was, and pays for no picture twice.
(A kserve:// teacher keeps no books: there what is sent again counts again, within --budget.)"""


@click.group(context_settings=SETTINGS)
@click.version_option(package_name="mekd", prog_name="edge-agent")
def main() -> None:
    """Turn a teacher's paid answers into a small model of your own.

    Your pictures stay on this device: a generator learns to make synthetic ones, and only those are sent.
    """


@main.command(epilog=EXIT_CODES)
@click.option(
    "--phase",
    type=click.Choice(["all", *PHASES, "ask"]),
    required=True,
    help="deprivatize: train the generator on local pictures. distill: ask the teacher about synthetic ones and "
    "train the student. adapt: build what online adaptation needs. all: one after the other. ask: the first part of "
    "distill, to train later.",
)
@click.option(
    "--images", metavar="SOURCE", help="Local pictures: a folder (with subfolders), or digits, mnist or cifar10."
)
@click.option(
    "--teacher",
    metavar="ADDRESS",
    help="The teacher: HOST:PORT, or kserve://HOST:PORT/MODEL[/VERSION] for a model on Triton, OpenVINO Model Server "
    "or KServe (kserves:// with TLS).  [default: 127.0.0.1:50051]",
)
@click.option(
    "--student",
    metavar="NAME",
    help="Architecture of the small model: resnet8, resnet20, mobilenet, vgg11, …  [default: resnet8]",
)
@click.option(
    "--budget",
    type=int,
    metavar="N",
    help="Most pictures to pay for (of a kserve:// teacher: to send) in this run folder, over all phases and "
    "resumes. May be raised later.  "
    "[default: what the folder was given before, else 50000]",
)
@click.option(
    "--run-dir",
    metavar="DIR",
    help="Where everything is kept; the same folder goes on where it was.  [default: runs/mekd]",
)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    help="Settings to begin with; those of --config win. photographs: diffusion and assistants, hours in place of "
    "minutes.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Settings in TOML; flags win.  [default: ./run.toml where there is one]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any setting that 'edge-agent settings' lists, for example distill.passes=20; may be given several times.",
)
@click.option("--seed", type=int, metavar="N", help="Of every random choice.  [default: 0]")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option(
    "--data",
    metavar="DIR",
    envvar="MEKD_DATA",
    help="Where mnist and cifar10 lie, or are downloaded to; also in MEKD_DATA; a file and the flag win.",
)
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Holds the account's key; else it is taken from MEKD_API_KEY.",
)
@click.option("--wait-seconds", type=float, metavar="S", help="How long the teacher may be away.  [default: 600]")
@click.option("--tls-ca", metavar="FILE", help="The authority that signed the teacher's certificate, PEM.")
@click.option(
    "--tls-cert",
    metavar="FILE",
    help="This device's own certificate, for a teacher that wants one, PEM; without a key it names the account.",
)
@click.option("--tls-key", metavar="FILE", help="Its private key, PEM.")
@click.option("--insecure", is_flag=True, default=None, help="Let the key travel unencrypted beyond loopback.")
@click.option("--quiet", is_flag=True, help="No progress.")
def run(
    phase: str,
    preset: str | None,
    config_file: Path | None,
    settings: tuple[str, ...],
    key_file: Path | None,
    quiet: bool,
    **flags: Any,
) -> None:
    """Run one phase, or all of them.

    \b
    export MEKD_API_KEY=$(cat key)
    edge-agent run --phase all --images ~/pictures --teacher teacher.example:50051 --tls-ca ca.pem --budget 20000

    Results are in the run folder: student.pt (teacher-serve could serve it), generator.pt, memory.npz, summary.json.
    """
    _raise_on_sigterm()
    try:
        given = {name: value for name, value in flags.items() if value is not None}
        source = click.get_current_context().get_parameter_source
        environment = {name: given.pop(name) for name in list(given) if source(name) is ParameterSource.ENVIRONMENT}
        config = _config(config_file, settings, given, preset, environment)
        api_key = _api_key(key_file)
        if "OMP_WAIT_POLICY" not in os.environ:
            # Read when torch is imported: its threads would spin for milliseconds after every layer. A ResNet8's step
            # took 19 ms on two idle cores either way, and with another program on one of them 1.0 s in place of 1.6,
            # for as long as it takes `threads` to see it.
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        # torch takes seconds to import: not before the input is known to be good.
        from edge_agent import agent, threads
        from edge_agent.console import Console

        if "OMP_NUM_THREADS" not in os.environ:
            threads.look_for_the_best()
        phases = PHASES if phase == "all" else (phase,)
        console = Console(quiet=quiet)
        if preset and (others := differing(config, preset_layer(preset))):
            console.warn(f"--preset {preset}: a file or a flag gives other {', '.join(others)}")
        summary = agent.run(config, phases, api_key=api_key, console=console)
        if summary:  # none where the disk was full
            console.say(_outcome(Path(config.run_dir), summary))
    except Failure as failure:
        _fail(str(failure), failure.exit_code)
    except ConfigError as error:
        _fail(str(error), BadInput.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it was", 130)
    except _Terminated:
        _fail("terminated; the same command goes on where it was", 143)


def _outcome(run_dir: Path, summary: dict[str, Any]) -> str:
    """What a run has come to, in one line."""
    found = [f"{summary['queries']['charged']} of {summary['queries']['budget']} queries used"]
    if "distill" in summary["phases_done"]:
        found.append(f"the student is {run_dir / 'student.pt'}")
        if summary["agreement_synthetic"] is not None:
            among = "" if summary["held_out"] is None else f" ({summary['held_out']})"
            agreement = f"{summary['agreement_synthetic']:.1%} of answers it was not trained on{among}"
            found.append(f"it agrees with {agreement}")
    return f"{', '.join(found)}; all figures: {run_dir / 'summary.json'}"


@main.command()
@click.option(
    "--run-dir", default="runs/mekd", show_default=True, metavar="DIR", help="Has student.pt and memory.npz."
)
@click.option(
    "--images",
    required=True,
    metavar="FOLDER|-",
    help="A folder of pictures, by name; or - for paths on standard input, one a line, an empty line forgetting the "
    "stream so far.",
)
@click.option(
    "--batch",
    "batch_count",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="Pictures that are looked at together: more are faster, and later.",
)
def predict(run_dir: str, images: str, batch_count: int) -> None:
    """Say what pictures show, adapting to what the camera's pictures become.

    \b
    edge-agent predict --run-dir runs/mekd --images ~/camera --batch 16 > answers.jsonl

    One JSON object a line: picture, class, shift (0: as in training, to 1), and the probabilities before and after
    adaptation, in the order of the classes. A picture that cannot be read has an error instead. Where pictures lie in
    folders named as classes, the last line, on standard error, says how many were called so.
    """
    _raise_on_sigterm()
    try:
        from edge_agent.data import FORMATS, files_below
        from edge_agent.predict import Predictor, Score

        if images != "-" and not os.path.isdir(images):
            raise BadInput(f"--images: expected a folder of pictures or -, got {images!r}")
        if images != "-" and next(files_below(Path(images)), None) is None:
            raise BadInput(f"--images: expected pictures ({', '.join(FORMATS)}) in {images!r}, found no file")
        predictor = Predictor(Path(run_dir))
        if images == "-":
            lines = io.TextIOWrapper(sys.stdin.buffer, errors="surrogateescape")  # a path may be any bytes
            paths: Iterator[str] = (line.rstrip("\r\n") for line in lines)
        else:
            paths = map(str, files_below(Path(images)))
        score = Score(predictor.labels)
        for answer in predictor.predict(paths, batch_count=batch_count):
            click.echo(json.dumps(answer))
            score.add(answer)
        if said := score.in_words():
            click.echo(said, err=True)
    except Failure as failure:
        _fail(str(failure), failure.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except _Terminated:
        _fail("terminated", 143)


@main.command()
def settings() -> None:
    """Print all settings with their defaults and what they mean: a run.toml to begin with.

    \b
    edge-agent settings > run.toml
    """
    from edge_agent.manual import commented_defaults

    click.echo(commented_defaults(), nl=False)


@main.command()
@click.option("--run-dir", default="runs/mekd", show_default=True, metavar="DIR", help="The run folder.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def status(run_dir: str, form: str) -> None:
    """Show how far a run is, also while it works."""
    from edge_agent.journal import Journal

    path = Path(run_dir) / "journal.db"
    if not path.is_file():
        _fail(f"expected a run folder with a journal, found no {path}", 6)
    try:
        journal = Journal.open(path, to_read=True)
        totals = journal.totals()
        metered_by = journal.fact("metered_by") or "teacher"
        found: dict[str, Any] = {
            "run_id": journal.run_id,
            "metered_by": metered_by,
            "planned": totals.planned_pictures,
            "sent": totals.sent_pictures,
            "charged": _charged(totals, metered_by),
            "charged_by_phase": {phase: _charged(journal.totals(phase), metered_by) for phase in PHASES},
            "answers": journal.bought(),
            "unanswered": totals.planned_pictures - totals.charged_pictures,
            "phases_done": [phase for phase in PHASES if journal.fact(f"done.{phase}") is not None],
        }
        journal.close()
    except Failure as failure:
        _fail(str(failure), failure.exit_code)
    if form == "json":
        click.echo(json.dumps(found))
    else:
        for name, value in found.items():
            click.echo(f"{name:17}{_in_words(value)}")


def _charged(totals: "Totals", metered_by: str) -> int:
    """Pictures that use up the budget: where the teacher keeps no books, what was sent."""
    return totals.sent_pictures if metered_by == "agent" else totals.charged_pictures


def _in_words(value: Any) -> str:
    if isinstance(value, dict):  # kinds of answers have commas in their names
        return "; ".join(f"{number} {name}" for name, number in value.items() if number)
    return ", ".join(value) if isinstance(value, list) else str(value)


@main.command()
@click.option("--run-dir", default="runs/mekd", show_default=True, metavar="DIR", help="The run folder.")
def receipts(run_dir: str) -> None:
    """Print the receipt of every paid answer, one JSON object a line, also while a run works.

    With them 'teacher-admin ledger verify --receipts FILE' tells whether the books were rewritten or cut off.
    """
    from edge_agent.journal import Journal

    path = Path(run_dir) / "journal.db"
    if not path.is_file():
        _fail(f"expected a run folder with a journal, found no {path}", 6)
    try:
        journal = Journal.open(path, to_read=True)
        for batch_id, receipt in journal.receipts():
            row = {"account": receipt.account, "batch_id": batch_id, "sequence": receipt.sequence}
            click.echo(json.dumps(row | {"head": receipt.head.hex()}))
        journal.close()
    except Failure as failure:
        _fail(str(failure), failure.exit_code)


def _config(
    config_file: Path | None,
    settings: tuple[str, ...],
    flags: dict[str, Any],
    preset: str | None = None,
    environment: dict[str, Any] | None = None,
) -> RunConfig:
    layers: list[dict[str, Any]] = []
    path = config_file or Path("run.toml")
    if config_file is not None or path.is_file():
        try:
            layers.append(tomllib.loads(path.read_text("utf-8")))
        except OSError as error:
            raise ConfigError(f"--config {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: expected TOML: {error}") from None
        if layers[0].get("data") == "":  # what a run without one wrote down: no choice
            del layers[0]["data"]
        # The run.toml of a run folder speaks of that folder, from wherever it is read and however it was moved.
        if (path.parent / "journal.db").is_file():
            layers[0]["run_dir"] = str(path.parent)
    set_ones = [parse_setting(setting) for setting in settings]
    for layer in set_ones:
        # Sections go beside a flag of their name.
        flat = {name: value for name, value in layer.items() if not isinstance(value, dict)}
        if twice := [name for name, value in flat.items() if flags.get(name, value) != value]:
            raise ConfigError(f"{twice[0]}: given twice, as {flags[twice[0]]!r} and by --set as {layer[twice[0]]!r}")
    given = [environment or {}, *([preset_layer(preset)] if preset else []), *layers, flags, *set_ones]
    # Money is never spent because a flag was left out: a budget is changed by giving another.
    run_dir = next((layer["run_dir"] for layer in reversed(given) if "run_dir" in layer), RunConfig.run_dir)
    before = _budget_of(Path(run_dir)) if isinstance(run_dir, str) else None
    try:
        return build_config({} if before is None else {"budget": before}, *given)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if _fails_alike(error, layers) else str(error)) from None


def _fails_alike(error: ConfigError, layers: list[dict[str, Any]]) -> bool:
    """Whether the file is to blame: it says the same by itself, without flags."""
    try:
        build_config({"images": "."}, *layers)
    except ConfigError as alone:
        return str(alone) == str(error)
    return False


def _budget_of(run_dir: Path) -> int | None:
    """The budget that a run folder was given before; None where there is none."""
    try:
        budget = tomllib.loads((run_dir / "run.toml").read_text("utf-8")).get("budget")
    except (OSError, ValueError):
        return None
    return budget if type(budget) is int and budget > 0 else None


def _api_key(key_file: Path | None) -> str | None:
    if key_file is not None:
        try:
            text = key_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--key-file {key_file}: expected a file with a key ({error})") from None
        if not text:
            raise BadInput(f"--key-file {key_file}: expected the line that teacher-admin made, got an empty file")
    else:
        text = os.environ.get("MEKD_API_KEY", "").strip()
    if text and not (text.isascii() and text.isprintable() and " " not in text):
        raise BadInput("the key holds characters that no key has; give the line that teacher-admin printed")
    return text or None


class _Terminated(BaseException):
    """SIGTERM, raised where the work is, so that everything is closed on the way out."""


def _raise_on_sigterm() -> None:
    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)


def _fail(line: str, exit_code: int) -> NoReturn:
    click.echo(f"error: {line}", err=True)
    sys.exit(exit_code)
