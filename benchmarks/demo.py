"""The main job, end to end, on real pictures: ``python -m benchmarks.demo``, or ``make demo``.

scikit-learn's handwritten digits are split by a published rule (``edge_agent.splits``): the cloud's part trains a
small teacher, the device's part, without labels, is all that the agent has, and the test part serves the table at
the end.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console as RichConsole
from rich.table import Table

from benchmarks import datasets
from benchmarks.evaluation import add_test_figures
from benchmarks.services import ServiceError, create_account, run_agent, serving, show_account, stop_on_sigterm
from benchmarks.teachers import train_teacher
from edge_agent import threads
from edge_agent.console import Console

BUDGET = 5000
LOG = "teacher-serve.log"
TEACHER = {"architecture": "resnet20", "epochs": 40, "peak_learning_rate": 0.1, "shift_px": 1}


@click.command()
@click.option("--run-dir", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of teacher, generator, queries and student.")
@click.option("--budget", default=BUDGET, show_default=True, help="Pictures the account is granted.")
@click.option("--answers", type=click.Choice(["soft", "hard"]), default="soft", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Passed on to edge-agent.")
def main(run_dir: Path, seed: int, budget: int, answers: str, settings: tuple[str, ...]) -> None:
    """Train a teacher, sell its answers, distil a student from them, and show what it came to."""
    stop_on_sigterm()
    if "OMP_NUM_THREADS" not in os.environ:
        threads.look_for_the_best()
    console = Console()
    started = time.monotonic()
    empty(run_dir)
    with tempfile.TemporaryDirectory(prefix="mekd-demo-") as folder:
        cloud = Path(folder)
        teacher = cloud / "teacher.pt"
        with console.bar("cloud: train the teacher", "steps") as tell:
            train_teacher(datasets.digits("cloud"), path=teacher, seed=seed, progress=tell, **TEACHER)  # type: ignore[arg-type]
        ledger = f"sqlite:///{cloud / 'ledger.db'}"
        api_key = create_account(ledger, "demo", budget)
        with serving(teacher, ledger, log=run_dir / LOG, more=("--answers", answers)) as address:
            console.say(f"cloud: teacher-serve on {address}, account 'demo' with {budget} pictures")
            arguments = ["--phase", "all", "--images", "digits", "--teacher", address, "--budget", str(budget)]
            arguments += ["--run-dir", str(run_dir), "--seed", str(seed)]
            for setting in settings:
                arguments += ["--set", setting]
            status = run_agent(arguments, api_key=api_key)
            if status != 0:
                sys.exit(status)
        account = show_account(ledger, "demo")
        summary = add_test_figures(run_dir, teacher, datasets.digits("test"))
    show(summary, account, time.monotonic() - started, run_dir)


def empty(run_dir: Path) -> None:
    """Makes the folder, or empties a former demo's: it starts from nothing, but takes away nobody else's files."""
    if run_dir.is_dir() and any(run_dir.iterdir()) and not (run_dir / LOG).is_file():
        raise ServiceError(f"--run-dir {run_dir}: expected a new folder or a former demo's, got one with other files")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)


def show(summary: dict[str, Any], account: dict[str, int], seconds: float, run_dir: Path) -> None:
    """The table a person reads."""
    console = RichConsole(highlight=False)
    accuracy = Table(title="Accuracy on the test part", title_justify="left")
    accuracy.add_column("model")
    accuracy.add_column("accuracy", justify="right")
    accuracy.add_column("share of the teacher's", justify="right")
    for name in ("teacher", "student", "student_adapted"):
        value = summary["accuracy"][name]
        accuracy.add_row(name.replace("_", ", "), f"{value:.4f}", f"{value / summary['accuracy']['teacher']:.4f}")
    console.print(accuracy)
    phases = Table(title="What was sent and paid", title_justify="left")
    for column in ("phase", "queries", "bytes sent", "bytes received", "seconds"):
        phases.add_column(column, justify="left" if column == "phase" else "right")
    for name in ("deprivatize", "distill", "adapt"):
        traffic = summary["bytes"]["by_phase"][name]
        phases.add_row(
            name,
            str(summary["queries"][name]),
            f"{traffic['sent']:,}",
            f"{traffic['received']:,}",
            f"{summary['seconds'][name]:.1f}",
        )
    console.print(phases)
    found = summary["privacy"]
    privacy = Table(title="Privacy, measured", title_justify="left")
    privacy.add_column("figure")
    privacy.add_column("value", justify="right")
    privacy.add_row("local pictures sent, pixel for pixel", str(summary["private_images_sent"]))
    privacy.add_row("reference pictures that trained nothing", str(found["reference_pictures"]))
    privacy.add_row("near copies: within so many grey levels", f"{found['threshold']:.1f}")
    privacy.add_row("near copies dropped", f"{found['dropped']} ({found['dropped_share']:.2%})")
    interval = f"{found['membership_auc_low']:.3f} to {found['membership_auc_high']:.3f}"
    privacy.add_row("membership attack, AUC (0.5: a coin)", f"{found['membership_auc']:.3f} ({interval})")
    console.print(privacy)
    console.print(
        f"budget {summary['queries']['budget']}, charged {summary['queries']['charged']}, "
        f"debited by the ledger {account['posted']}, held {account['held']}, balance {account['balance']}; "
        f"{seconds:.0f} s in all"
    )
    console.print(f"Everything is in {run_dir}; the figures in {run_dir / 'summary.json'}")


if __name__ == "__main__":
    try:
        main()
    except ServiceError as error:
        sys.exit(f"error: {error}")
