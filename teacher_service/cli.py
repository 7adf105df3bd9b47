"""``teacher-serve``: flags and environment in, config and one clear line out."""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click
import structlog

from teacher_service import heap
from teacher_service.cli_parts import SETTINGS, facts_options, fail, given_facts, ledger_key, ledger_options
from teacher_service.config import METRICS_PORT, ServerConfig, is_loopback
from teacher_service.health import LIVENESS
from teacher_service.ledger import IDENTIFIER, LedgerError
from teacher_service.server import StartError, serve_ledger
from teacher_service.server import check as check_config
from teacher_service.server import serve as run_server

HEALTH_TIMEOUT_SECONDS = 5.0
DURATION_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


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
@facts_options
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
@ledger_options
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
    teacher-admin account create my-device --budget 50000 --key-file key
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
    given = given_facts(arch, input_shape, mean, std, labels, output)
    config = ServerConfig(model_given=given, ledger_key=ledger_key(), **settings)
    try:
        if model is None:
            asyncio.run(serve_ledger(config))
        else:
            check_config(config)
            asyncio.run(run_server(config, _engine(config, model)))
    except (StartError, LedgerError) as error:
        fail(str(error))


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
            fail(f"--model: expected {form}, got {str(model)!r}")
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
        fail(str(error))


def _check(target: str, liveness: bool, tls_ca: Path | None, tls_cert: Path | None, tls_key: Path | None) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    options = [("grpc.enable_http_proxy", 0)] if is_loopback(target.rpartition(":")[0]) else []
    if (tls_cert is None) != (tls_key is None):
        fail("expected --tls-cert and --tls-key together, got one of them")
    if tls_ca is None:
        if tls_cert is not None:
            fail("--tls-cert: expected --tls-ca with it, the authority of the server's certificate; got none")
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
        fail(f"{flag} {path}: {error.strerror}")


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
