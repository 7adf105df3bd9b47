"""``teacher-serve`` and ``teacher-admin``: flags and environment in, config and one clear line out."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import structlog

from protos.errors import Refusal
from teacher_service import auth, heap, ledger_cli
from teacher_service.config import METRICS_PORT, ServerConfig, is_loopback
from teacher_service.health import LIVENESS
from teacher_service.ledger import (
    IDENTIFIER,
    OPERATORS,
    Account,
    Entry,
    EntryKind,
    Ledger,
    LedgerError,
    LedgerUnavailable,
    Role,
    watch,
)
from teacher_service.ledger_remote import RemoteLedger
from teacher_service.server import StartError, open_ledger, serve_ledger
from teacher_service.server import check as check_config
from teacher_service.server import serve as run_server
from teacher_service.terms import FIELDS, Terms, TermsError

T = TypeVar("T")

BAD_INPUT = 2
INTERRUPTED = 130
HEALTH_TIMEOUT_SECONDS = 5.0
DURATION_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
DEFAULT_LEDGER = "sqlite:///mekd-ledger.db"

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "auto_envvar_prefix": None}


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


def _model_name(_context: click.Context, parameter: click.Parameter, text: str) -> str:
    if not IDENTIFIER.fullmatch(text):
        raise click.BadParameter(f"expected 1 to 64 characters of A-Z, a-z, 0-9, '_' and '-', got {text[:80]!r}")
    return text


def _duration(_context: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    """Seconds of 90s, 30m, 12h or 7d."""
    if text is None:
        return None
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdecimal() and int(number) > 0 and unit in DURATION_SECONDS):
        raise click.BadParameter(f"expected a whole number above 0 with s, m, h or d, for example 30d; got {text!r}")
    return float(int(number) * DURATION_SECONDS[unit])


def _facts_options(command: Callable[..., T]) -> Callable[..., T]:
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


def _ledger_options(command: Callable[..., T]) -> Callable[..., T]:
    """The flags that say where the books are, the same for both programs."""
    for option in reversed(
        (
            click.option(
                "--ledger",
                default=DEFAULT_LEDGER,
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


def _terms_options(command: Callable[..., T]) -> Callable[..., T]:
    """The flags that say what an account is sold, and how much at a time."""
    for option in reversed(
        (
            click.option(
                "--answers",
                type=click.Choice(["soft", "hard"]),
                help="Sell probabilities, or the index of the likeliest class; unsaid: as the server's --answers.",
            ),
            click.option(
                "--top-k", type=int, metavar="K", help="Of soft answers: the K most probable classes alone."
            ),
            click.option(
                "--decimals", type=int, metavar="D", help="Of soft answers: probabilities rounded to D decimals."
            ),
            click.option(
                "--pictures-per-second", type=float, metavar="R", help="Most pictures asked for, replays included."
            ),
            click.option("--max-streams", type=int, metavar="N", help="Most streams open at once on one server."),
            click.option(
                "--max-outstanding-pictures",
                type=int,
                metavar="N",
                help="Most pictures asked for and not yet answered on one server.",
            ),
            click.option(
                "--suspended",
                is_flag=True,
                default=None,
                help="Refuse its customers, by key and by certificate; --unset suspended lets them in again.",
            ),
        )
    ):
        command = option(command)
    return command


def _given_terms(given: dict[str, Any]) -> Terms:
    try:
        return Terms(**given)
    except TermsError as error:
        _fail(f"--{error.field.replace('_', '-')}: expected {error.expected}, got {error.got!r}")


def _given_facts(
    arch: str | None,
    input_shape: tuple[int, ...] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    labels: Path | None,
    output: str | None,
) -> dict[str, object]:
    facts: dict[str, object] = {"architecture": arch, "mean": mean, "std": std, "output": output}
    if input_shape is not None:
        facts["channels"], facts["height"], facts["width"] = input_shape
    if labels is not None:
        try:
            facts["labels"] = tuple(line for line in labels.read_text("utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            _fail(f"--labels {labels}: expected a text file in UTF-8, one class name a line ({error})")
    return {name: value for name, value in facts.items() if value is not None}


@click.command("teacher-serve", context_settings=SETTINGS)
@click.version_option(package_name="mekd")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Weights: a checkpoint of this project, a bare state_dict, or a torch.export archive (.pt2). For drills "
    "without a model, array:CLASSES,CHANNELS,HEIGHT,WIDTH[,SEED] answers from a fixed random projection, and "
    "identity:CLASSES,CHANNELS,HEIGHT,WIDTH from the first pixels.",
)
@_facts_options
@click.option(
    "--model-name",
    default="teacher",
    show_default=True,
    metavar="NAME",
    callback=_model_name,
    help="The model's name in the Open Inference Protocol.",
)
@click.option(
    "--listen",
    default="127.0.0.1:50051",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to serve; port 0 picks a free one. Beyond loopback: with --tls-cert and --tls-key.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    show_default=f"{METRICS_PORT}; with --ledger-only: none",
    help="Prometheus metrics, at /metrics; 0 picks a free port.",
)
@click.option(
    "--metrics-host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where --metrics-port is. Beyond loopback: with TLS, as --listen.",
)
@click.option(
    "--metrics-max-accounts",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Accounts with metrics of their own; further ones are counted together.",
)
@_ledger_options
@click.option(
    "--ledger-only",
    is_flag=True,
    help="No model: serve the books alone, to teachers elsewhere (--ledger grpc://HOST:PORT) and to teacher-admin.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="In which the model computes. For another than fp32 the log says how far its answers are from fp32, and the "
    "model digest is another.",
)
@click.option(
    "--compile",
    is_flag=True,
    help="torch.compile on a CPU (tens of seconds at start, needs a C++ compiler), CUDA graphs on a GPU.",
)
@click.option(
    "--engine-threads",
    type=click.IntRange(1),
    metavar="N",
    help="Cores that the engine computes with; unsaid: OMP_NUM_THREADS, else all but one, of two both.",
)
@click.option(
    "--max-engine-pictures",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Most pictures the engine computes at once; fewer where it is found at start that so many gain nothing.",
)
@click.option(
    "--answers",
    type=click.Choice(["soft", "hard"]),
    default="soft",
    show_default=True,
    help="What is sold: probabilities, or the index of the most probable class.",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), metavar="FILE", help="Certificate chain, PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), metavar="FILE", help="Its private key, PEM.")
@click.option(
    "--tls-client-ca",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Mutual TLS: every client must show a certificate that this authority signed. Its one DNS name is the name "
    "of an account, whose customer it is where no key is given.",
)
@click.option(
    "--insecure-listen",
    is_flag=True,
    help="Allow --listen beyond loopback without TLS: keys and pictures travel in the clear.",
)
@click.option(
    "--grace-seconds",
    type=click.FloatRange(0, 86_400),
    default=20.0,
    show_default=True,
    help="After SIGTERM: how long batches under way may take. A second SIGTERM ends them at once.",
)
@click.option(
    "--max-streams",
    type=click.IntRange(1),
    default=10_000,
    show_default=True,
    help="Most streams open at once, over all callers.",
)
@click.option(
    "--lease-seconds",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    show_default=True,
    help="How long the holds of a server that died stand before others give them back. Servers renew theirs three "
    "times as often; agents wait 15 seconds for it.",
)
@click.option(
    "--answers-keep",
    "answers_keep_seconds",
    callback=_duration,
    metavar="DURATION",
    help="Delete the bytes of older answers, e.g. 30d, 12h; a repeat of such a batch is refused then, and never "
    "computed or charged again. Without it they are kept as long as the journal.",
)
@click.option(
    "--max-batch-pictures",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Most pictures in one message; fewer where those would not fit into one.",
)
@click.option(
    "--max-queue-pictures",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Most pictures waiting or being answered; beyond it a batch is asked to come again.",
)
@click.option(
    "--check",
    metavar="HOST:PORT",
    help="Serve nothing; ask the server there whether it is ready. Exit status 0 or 1.",
)
@click.option(
    "--liveness",
    is_flag=True,
    help="With --check: ask whether the process works at all, which it does, too, while the ledger is away.",
)
@click.option(
    "--tls-ca",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --check: the authority that signed the server's certificate, which must name HOST. Where the server "
    "has --tls-client-ca, --tls-cert and --tls-key are the client's.",
)
def serve(
    model: Path | None,
    arch: str | None,
    input_shape: tuple[int, ...] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    labels: Path | None,
    output: str | None,
    check: str | None,
    liveness: bool,
    tls_ca: Path | None,
    ledger_only: bool,
    **settings: Any,
) -> None:
    """Serve a classifier's answers over gRPC, each charged once to a prepaid account.

    Prints one line, "serving on HOST:PORT", when it is ready. Accounts and budgets are made with teacher-admin on the
    same --ledger. SIGTERM drains: batches under way are finished and booked first.

    \b
    teacher-admin account create my-device --budget 50000 > key
    teacher-serve --model teacher.pt
    teacher-serve --model rn56.pt --input-shape 3,32,32 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
    teacher-serve --ledger-only --listen 127.0.0.1:50050
    MEKD_LEDGER_KEY=… teacher-serve --model teacher.pt --ledger grpc://127.0.0.1:50050
    """
    if check is not None:
        sys.exit(_check(check, liveness, tls_ca, settings["tls_cert"], settings["tls_key"]))
    if liveness:
        raise click.UsageError("--liveness: expected --check HOST:PORT with it, got none")
    if model is None and not ledger_only:
        raise click.UsageError("Missing option '--model': expected a model FILE to serve.")
    if model is not None and ledger_only:
        raise click.UsageError("expected one of --model and --ledger-only, got both")
    if model is not None and settings["metrics_port"] is None:
        settings["metrics_port"] = METRICS_PORT
    # As a container's first process it would not hear the signal before the server listens to it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    heap.bound()
    _configure_logging()
    given = _given_facts(arch, input_shape, mean, std, labels, output)
    config = ServerConfig(model_given=given, ledger_key=_ledger_key(), **settings)
    try:
        if model is None:
            asyncio.run(serve_ledger(config))
        else:
            check_config(config)
            asyncio.run(run_server(config, _engine(config, model)))
    except (StartError, LedgerError) as error:
        _fail(str(error))


def _engine(config: ServerConfig, model: Path) -> Any:
    """The engine behind ``--model``. torch is imported here and only here, for real models alone."""
    from teacher_service.engine import ArrayEngine, EngineError, IdentityEngine

    kind, _, text = str(model).partition(":")
    if kind in ("array", "identity"):
        try:
            class_count, channels, height, width, *seed = (int(size) for size in text.split(","))
            sizes = {"class_count": class_count, "channels": channels, "height": height, "width": width}
            if min(sizes.values()) < 1 or len(seed) > (kind == "array"):
                raise ValueError
            return ArrayEngine(**sizes, seed=sum(seed)) if kind == "array" else IdentityEngine(**sizes)
        except ValueError:
            form = f"{kind}:CLASSES,CHANNELS,HEIGHT,WIDTH{'[,SEED]' if kind == 'array' else ''}"
            _fail(f"--model: expected {form}, got {str(model)!r}")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is imported. Its threads would spin for milliseconds after every layer, and with anything
        # else on the cores (gRPC, to begin with) take them from each other: up to a hundred times slower.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from networks.modelfile import ModelFileError, load_model
    from teacher_service.torch_engine import TorchEngine, threads_beside_the_network, use_threads

    try:
        threads = config.engine_threads
        if threads is None and not os.environ.get("OMP_NUM_THREADS"):
            threads = threads_beside_the_network()
        use_threads(threads)
        engine = TorchEngine(
            load_model(model, given=config.model_given),
            device=config.device,
            precision=config.precision,
            compiled=config.compile,
            max_batch_pictures=config.max_engine_pictures,
        )
        structlog.get_logger().info("engine ready", **engine.found)
        return engine
    except (ModelFileError, EngineError) as error:
        _fail(str(error))


def _check(target: str, liveness: bool, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    options = [("grpc.enable_http_proxy", 0)] if is_loopback(target.rpartition(":")[0]) else []
    if (tls_cert is None) != (tls_key is None):
        _fail("expected --tls-cert and --tls-key together, got one of them")
    if tls_ca is None:
        if tls_cert is not None:
            _fail("--tls-cert: expected --tls-ca with it, the authority of the server's certificate; got none")
        channel = grpc.insecure_channel(target, options)
    else:
        authority = _read("--tls-ca", tls_ca)
        pair = (_read("--tls-key", tls_key), _read("--tls-cert", tls_cert)) if tls_key and tls_cert else (None, None)
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(authority, *pair), options)
    state = "alive" if liveness else "ready"
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(service=LIVENESS if liveness else ""), timeout=HEALTH_TIMEOUT_SECONDS
            )
        except grpc.RpcError as error:
            click.echo(f"{target} is not {state}: {error.code().name}: {error.details()}", err=True)
            if "Socket closed" in str(error.details()):  # all that is heard of a handshake that failed
                if tls_ca is None:
                    click.echo("if the server has TLS, give --tls-ca, the authority of its certificate", err=True)
                elif tls_cert is None:
                    click.echo("if the server asks for certificates, give --tls-cert and --tls-key", err=True)
            return 1
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    click.echo(f"{target} is {state if serving else f'not {state}'}", err=True)
    return 0 if serving else 1


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _fail(f"{flag} {path}: {error.strerror}")


class _Helpful(click.Group):
    """Says where flags go that are not a command's own but the program's, and what a negative number is taken for."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if error.option_name.startswith("--ledger"):
                advice = f"It goes before the command: teacher-admin {error.option_name} ... COMMAND"
            elif error.option_name[1:].isdecimal():
                advice = "Expected a number of at least 1."
            else:
                raise
            raise click.UsageError(f"{error.format_message()} {advice}", ctx=error.ctx) from None


@click.group("teacher-admin", cls=_Helpful, context_settings=SETTINGS)
@click.version_option(package_name="mekd")
@_ledger_options
@click.pass_context
def admin(context: click.Context, ledger: str, ledger_ca: Path | None, ledger_insecure: bool) -> None:
    """Accounts, budgets and keys on a ledger, and the facts of model files.

    Works on the ledger's store itself, whether a server has it open or not, or through a server: with
    --ledger grpc://HOST:PORT and an admin's key, whose first is made on the store.

    \b
    teacher-admin account create my-device --budget 50000     # prints the key, once
    teacher-admin account show my-device --format json
    teacher-admin account grant my-device 10000
    teacher-admin account set my-device --answers soft --top-k 3 --decimals 2
    teacher-admin statement my-device --run-id RUN
    teacher-admin key revoke KEY_ID
    teacher-admin key create --role admin                     # then: MEKD_LEDGER_KEY=… teacher-admin --ledger grpc://…
    teacher-admin model describe rn56.pt --input-shape 3,32,32 --mean … --std …
    """
    context.obj = ledger


@admin.group()
def account() -> None:
    """Make, show and top up accounts."""


@account.command("create")
@click.argument("name")
@click.option("--budget", type=int, required=True, metavar="N", help="Pictures granted from the start.")
@_terms_options
@click.pass_obj
def account_create(ledger: str, /, name: str, budget: int, **given: Any) -> None:
    """Make an account with a budget; its key goes to standard output, once, and nowhere else."""
    terms = _given_terms(given)

    async def make(books: Ledger) -> str:
        text, stored = auth.new_key(name)
        await books.create_account(name, budget, stored, terms)
        return text

    click.echo(_on_books(ledger, make, create=True))


@account.command("show")
@click.argument("name")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_obj
def account_show(ledger: str, name: str, form: str) -> None:
    """Show what an account was granted, what is posted and held, its balance, in pictures, and its terms."""

    async def look(books: Ledger) -> tuple[Account, Terms]:
        return await books.account(name), await books.terms(name)

    _print_account(*_on_books(ledger, look), form=form)


@account.command("set")
@click.argument("name")
@_terms_options
@click.option(
    "--unset",
    type=click.Choice([field.replace("_", "-") for field in FIELDS]),
    multiple=True,
    help="As the server has it, or no limit, again; may be given several times.",
)
@click.pass_obj
def account_set(ledger: str, /, name: str, unset: tuple[str, ...], **given: Any) -> None:
    """Set what an account is sold, and how much it may ask for at a time; what is not named stays.

    Running servers notice within five seconds. Answers already kept stay as they were sold.

    \b
    teacher-admin account set my-device --top-k 3 --decimals 2
    teacher-admin account set my-device --pictures-per-second 500 --max-streams 4
    teacher-admin account set my-device --unset top-k
    teacher-admin account set my-device --suspended
    """
    said, unsaid = _given_terms(given), [field.replace("-", "_") for field in unset]
    if said == Terms() and not unsaid:
        raise click.UsageError("expected something to set or --unset, got nothing")

    async def change(books: Ledger) -> tuple[Account, Terms]:
        terms = await books.set_terms(name, said, unsaid)
        return await books.account(name), terms

    _print_account(*_on_books(ledger, change), form="text")


@account.command("list")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_obj
def account_list(ledger: str, form: str) -> None:
    """List every account with its balances; as json, one object a line."""

    async def pages(books: Ledger) -> None:
        after_name = ""
        while page := await books.accounts(after_name=after_name):
            for found in page:
                _print_account(found, form=form)
            after_name = page[-1].name

    _on_books(ledger, pages)


@account.command("grant")
@click.argument("name")
@click.argument("pictures", type=int)
@click.option(
    "--grant-id",
    default="",
    metavar="ID",
    help="An order number, a UUID: with it the account is granted this once, however often a script runs again.",
)
@click.pass_obj
def account_grant(ledger: str, name: str, pictures: int, grant_id: str) -> None:
    """Grant an account more PICTURES; a stopped agent goes on with the same command."""
    granting = _on_books(ledger, lambda books: books.grant(name, pictures, grant_id=grant_id))
    _print_account(granting, form="text")


@account.command("watch")
@click.argument("name")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_obj
def account_watch(ledger: str, name: str, form: str) -> None:
    """Show an account now and whenever it has changed, at most once a second, until interrupted."""

    async def show(books: Ledger) -> None:
        async for found in books.watch(name) if isinstance(books, RemoteLedger) else watch(books, name):
            _print_account(found, form=form)

    try:
        _on_books(ledger, show)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@admin.group()
def key() -> None:
    """Make, list and revoke an account's keys."""


@key.command("create")
@click.argument("name", required=False)
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    default=Role.CUSTOMER.value,
    show_default=True,
    help="customer: buy answers and see its own account. teacher: sell them, a server with --ledger grpc://. "
    "admin: make accounts and keys, and grant.",
)
@click.pass_obj
def key_create(ledger: str, name: str | None, role: str) -> None:
    """Make one more key for account NAME; it goes to standard output, once.

    A teacher's or an admin's key needs no NAME: it belongs to the account "operators", which has no pictures and is
    made where it is missing.
    """
    wanted = Role(role)
    if name is None and wanted is Role.CUSTOMER:
        raise click.UsageError("Missing argument 'NAME': a customer's key belongs to the customer's account.")
    owner = name or OPERATORS
    first = wanted is not Role.CUSTOMER and owner == OPERATORS  # maybe the first key of all

    async def make(books: Ledger) -> str:
        text, stored = auth.new_key(owner, wanted)
        if first and not await _has_account(books, owner):
            await books.create_account(owner, None, stored)
        else:
            await books.add_key(stored)
        return text

    click.echo(_on_books(ledger, make, create=first))


async def _has_account(books: Ledger, name: str) -> bool:
    try:
        await books.account(name)
    except LedgerUnavailable:
        raise
    except LedgerError:
        return False
    return True


@key.command("list")
@click.argument("name")
@click.pass_obj
def key_list(ledger: str, name: str) -> None:
    """List the ids of account NAME's keys, never their secrets."""
    for stored in _on_books(ledger, lambda books: books.keys(name)):
        click.echo(f"{stored.key_id}  {stored.role}  {'revoked' if stored.revoked else 'valid'}")


@key.command("revoke")
@click.argument("key_id")
@click.pass_obj
def key_revoke(ledger: str, key_id: str) -> None:
    """End a key for good; a running server notices within five seconds. KEY_ID as in key list, or the whole key."""
    if whole := auth.KEY.fullmatch(key_id.strip()):
        key_id = whole[1]
    _on_books(ledger, lambda books: books.revoke_key(key_id))
    click.echo(f"{key_id}  revoked")


@admin.command()
@click.argument("name")
@click.option("--run-id", default="", help="Only the entries of one run.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_obj
def statement(ledger: str, name: str, run_id: str, form: str) -> None:
    """Print an account's journal, oldest entry first; as json, one object a line."""

    async def pages(books: Ledger) -> None:
        await books.account(name)  # refuses an unknown name
        after = 0
        while page := await books.statement(name, run_id=run_id, after_sequence=after):
            for entry in page:
                row = {
                    "sequence": entry.sequence,
                    "create_time_ms": entry.create_time_ms,
                    "kind": entry.kind.value,
                    "pictures": entry.picture_count,
                    "debit_book": entry.debit_book,
                    "credit_book": entry.credit_book,
                    "run_id": entry.run_id,
                    "batch_id": entry.batch_id,
                }
                click.echo(json.dumps(row) if form == "json" else _statement_line(entry))
            after = page[-1].sequence

    _on_books(ledger, pages)


def _statement_line(entry: Entry) -> str:
    """Its sequence and time, what happened, and to which batch of which run."""
    when = datetime.fromtimestamp(entry.create_time_ms / 1000, UTC).isoformat(timespec="milliseconds")
    books = f"{entry.debit_book} -> {entry.credit_book}"
    of_run = f"run {entry.run_id}  " if entry.run_id else ""
    of_batch = f"{'grant' if entry.kind is EntryKind.GRANT else 'batch'} {entry.batch_id}" if entry.batch_id else ""
    line = f"{entry.sequence:>6}  {when}  {entry.kind.value:<6} {entry.picture_count:>9} pictures  {books:<23}"
    return f"{line}  {of_run}{of_batch}".rstrip()


admin.add_command(ledger_cli.ledger)


@admin.group()
def model() -> None:
    """Write down what a model file does not say of itself."""


@model.command("describe")
@click.argument("file", type=click.Path(path_type=Path))
@_facts_options
def model_describe(file: Path, **facts: Any) -> None:
    """Write FILE.toml beside a model FILE: architecture, labels, input shape, normalisation.

    \b
    teacher-admin model describe rn56.pt --input-shape 3,32,32 \\
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
    """
    from networks.modelfile import ModelFileError, describe_model

    try:
        click.echo(f"wrote {describe_model(file, given=_given_facts(**facts))}")
    except ModelFileError as error:
        _fail(str(error))


def _on_books(url: str, work: Callable[[Ledger], Awaitable[T]], *, create: bool = False) -> T:
    given = click.get_current_context().find_root().params

    async def run() -> T:
        books = open_ledger(
            url,
            key=_ledger_key(),
            tls_ca=given["ledger_ca"],
            insecure=given["ledger_insecure"],
            create=create,
        )
        try:
            return await work(books)
        finally:
            await books.close()

    try:
        return asyncio.run(run())
    except LedgerError as error:
        _fail(str(error))
    except Refusal as refusal:
        _fail(refusal.message)


def _ledger_key() -> str:
    """The credential for a ledger elsewhere: from the environment alone, for every user can read a command line."""
    return os.environ.get("MEKD_LEDGER_KEY", "").strip()


def _print_account(found: Account, terms: Terms | None = None, *, form: str) -> None:
    row: dict[str, Any] = {
        "name": found.name,
        "granted": found.granted,
        "posted": found.posted,
        "held": found.held,
        "balance": found.balance,
    }
    if form == "json":
        click.echo(json.dumps(row if terms is None else row | {"terms": terms.said()}))
    else:
        row |= terms.said() if terms is not None else {}
        click.echo("  ".join(f"{name} {value}" for name, value in row.items()))


def _configure_logging() -> None:
    """Once, before the event loop: reconfiguring logging under a running grpc.aio server can deadlock it."""
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    level = logging.getLevelNamesMapping().get(os.environ.get("MEKD_LOG_LEVEL", "INFO").upper(), logging.INFO)
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What libraries log comes in the same form; without a handler gRPC would drop even a handler's own exception.
    libraries = logging.StreamHandler(sys.stderr)
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    libraries.setFormatter(
        structlog.stdlib.ProcessorFormatter(processors=[remove_meta, renderer], foreign_pre_chain=shared)
    )
    # A caller who vanishes while an answer is being written is no fault, and comes with a traceback.
    libraries.addFilter(lambda record: "ExecuteBatchError" not in record.getMessage())
    logging.basicConfig(level=logging.WARNING, handlers=[libraries])


def _fail(line: str) -> NoReturn:
    click.echo(f"error: {line}", err=True)
    sys.exit(BAD_INPUT)
