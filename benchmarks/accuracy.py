"""How accurate is a student whose every query was counted? ``python -m benchmarks.accuracy --data DIR``

MNIST, 10,000 local pictures without labels, a ResNet32 teacher behind teacher-serve, a ResNet8 student, 50,000
queries in all. The teacher trains on the cloud's part, which holds none of the device's pictures. Test pictures and
labels are read once, at the end, by this program alone. Interrupted or out of time, the same command goes on where it
was. Each finished run appends one line to benchmarks/results/accuracy.jsonl.
"""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click
import torch

from benchmarks import datasets, record
from benchmarks.evaluation import add_test_figures
from benchmarks.services import ServiceError, create_account, run_agent, serving, show_account, stop_on_sigterm
from benchmarks.teachers import train_teacher
from edge_agent.console import Console

HERE = Path(__file__).parent
CONFIG = HERE / "configs" / "mnist.toml"
BUDGET = 50_000
TEACHER = {"architecture": "resnet32", "epochs": 4, "peak_learning_rate": 0.2, "shift_px": 2}


class _OutOfTime(BaseException):
    pass


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="MEKD_DATA",
    default=Path("runs/data"),
    show_default=True,
    help="Where MNIST lies, or is downloaded to; also in MEKD_DATA.",
)
@click.option("--seed", default=0, show_default=True, help="Of teacher, generator, queries and student.")
@click.option("--answers", type=click.Choice(["soft", "hard"]), default="soft", show_default=True)
@click.option("--run-dir", type=click.Path(path_type=Path), help="[default: runs/accuracy/mnist-ANSWERS-SEED]")
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, path_type=Path),
    default=CONFIG,
    help="Settings of the run.  [default: benchmarks/configs/mnist.toml]",
)
@click.option("--max-minutes", type=float, help="Stop after so long; the same command goes on where it was.")
def main(
    data: Path, seed: int, answers: str, run_dir: Path | None, config_file: Path, max_minutes: float | None
) -> None:
    """Measure MNIST, ResNet32 to ResNet8, 50,000 counted queries."""
    run_dir = run_dir or Path(f"runs/accuracy/mnist-{answers}-{seed}")
    run_dir.mkdir(parents=True, exist_ok=True)
    stop_on_sigterm()
    begun = record.about("accuracy")
    if max_minutes is not None:
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, max_minutes * 60)
    try:
        summary = measure(data, seed, answers, run_dir, config_file)
    except (OSError, ServiceError) as error:
        sys.exit(f"error: {error}")
    except _OutOfTime:
        sys.exit(f"unfinished after {max_minutes} minutes; the same command goes on where {run_dir} stands")
    record.keep("accuracy", begun | _line(summary, answers, config_file))


def measure(data: Path, seed: int, answers: str, run_dir: Path, config_file: Path) -> dict[str, Any]:
    """Teacher, server, agent, test figures; each step is skipped where its result lies in ``run_dir``."""
    console = Console()
    teacher = run_dir.parent / f"mnist-teacher-{seed}.pt"
    test = datasets.mnist(data, "test")
    if not teacher.is_file():
        with console.bar("cloud: train the teacher", "steps") as tell:
            train_teacher(datasets.mnist(data, "cloud"), path=teacher, seed=seed, progress=tell, **TEACHER)  # type: ignore[arg-type]
    ledger = f"sqlite:///{run_dir / 'ledger.db'}"
    key_file = run_dir / "key"
    if not key_file.is_file():
        key_file.touch(mode=0o600)
        key_file.write_text(create_account(ledger, "benchmark", BUDGET))
    with serving(teacher, ledger, log=run_dir / "teacher-serve.log", more=("--answers", answers)) as address:
        status = run_agent(
            [
                *("--phase", "all", "--images", "mnist", "--data", str(data), "--config", str(config_file)),
                *("--teacher", address, "--budget", str(BUDGET), "--seed", str(seed), "--run-dir", str(run_dir)),
            ],
            api_key=key_file.read_text(),
        )
    if status != 0:
        raise ServiceError(f"edge-agent ended with exit status {status}")
    posted = show_account(ledger, "benchmark")["posted"]
    summary = add_test_figures(run_dir, teacher, test)
    if posted != summary["queries"]["charged"]:
        raise ServiceError(f"expected the ledger to have posted {summary['queries']['charged']}, got {posted}")
    return summary


def _line(summary: dict[str, Any], answers: str, config_file: Path) -> dict[str, Any]:
    return {
        "dataset": "mnist",
        "teacher": TEACHER["architecture"],
        "student": "resnet8",
        "answers": answers,
        "local_pictures": 10_000,
        **({"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "torch": torch.__version__,
        "config": config_file.read_text(),
        **{name: summary[name] for name in ("seed", "accuracy", "agreement", "agreement_synthetic", "queries")},
        **{name: summary[name] for name in ("ledger", "bytes", "private_images_sent", "privacy", "seconds")},
    }


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise _OutOfTime


if __name__ == "__main__":
    main()
