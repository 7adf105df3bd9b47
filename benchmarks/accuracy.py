"""How accurate is a student whose every query was counted? ``python -m benchmarks.accuracy --data DIR --all``

Each row of the table has a file in benchmarks/configs/accuracy, its seeds in it, fixed before the first look at a
test figure (``rows``). A finished cell (row, seed) appends one line to benchmarks/results/accuracy.jsonl and is not
measured again. Interrupted or out of time, the same command goes on where it was: generators, answers and students
under way are kept in runs/accuracy. Test pictures and labels are read once a cell, at its end, by this program alone.
``--table`` writes benchmarks/README.md and the picture beside it from the results.
"""

import hashlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click
import numpy as np
import tomli_w
import torch
from torch import Tensor

from benchmarks import accuracy_table, datasets, record, references, rows
from benchmarks.evaluation import add_test_figures, correct, share
from benchmarks.rows import Row
from benchmarks.services import ServiceError, account_key, run_agent, serving, show_account, stop_on_sigterm
from benchmarks.teachers import train_teacher
from edge_agent import pool as pools
from edge_agent import privacy
from edge_agent.agent import choose_device
from edge_agent.config import ConfigError, RunConfig, build_config, in_use
from edge_agent.console import Console
from edge_agent.data import DataError
from edge_agent.distill import Pool, assistants_own
from edge_agent.failures import Failure, FolderInUse
from edge_agent.generators import AnyGenerator, from_content
from edge_agent.mixes import mixed_pictures
from edge_agent.precision import training_dtype
from edge_agent.runs import RunFolder, digest_of
from edge_agent.teacher import Description
from edge_agent.training import Lessons, assistant_of, name_of, student_of
from networks.classifiers import Classifier
from networks.modelfile import ModelFacts, ModelFileError, load_model, save_model

RUNS = Path("runs/accuracy")
MNIST_TEACHER = {"architecture": "resnet32", "epochs": 4, "peak_learning_rate": 0.2, "shift_px": 2}
CIFAR_TEACHER = {
    "output": "logits",
    "channels": 3,
    "height": 32,
    "width": 32,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
ASSISTANT_WAIT_SECONDS = 12 * 3600.0
KEPT_TEST_PICTURES = 1000
"""Up to so many test pictures a line also says which of them were right, for paired comparisons."""

_ASSISTANTS_SECONDS = "seconds of assistants"


class _OutOfTime(BaseException):
    pass


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    envvar="MEKD_DATA",
    default=Path("runs/data"),
    show_default=True,
    help="Where MNIST, CIFAR-10 and teachers/rn56.pt lie; MNIST is downloaded if it is not there. Also in MEKD_DATA.",
)
@click.option("--row", "names", multiple=True, help="A row of the table; may be given several times.")
@click.option("--all", "everything", is_flag=True, help="Every row, in the order of the table.")
@click.option(
    "--seed", type=int, help="One of the row's seeds.  [default: all of them, the first of every row first]"
)
@click.option("--max-minutes", type=float, help="Stop after so long; the same command goes on where it was.")
@click.option("--table", is_flag=True, help="Measure nothing; write benchmarks/README.md from the results.")
def main(
    data: Path, names: tuple[str, ...], everything: bool, seed: int | None, max_minutes: float | None, table: bool
) -> None:
    """Measure the rows of the accuracy table, every query counted by the teacher's ledger."""
    if table:
        accuracy_table.write()
        return
    if not names and not everything:
        raise click.UsageError(f"expected --all or --row with one of {', '.join(rows.ORDER)}")
    stop_on_sigterm()
    if max_minutes is not None:
        signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, max_minutes * 60)
    try:
        chosen = [rows.read(name) for name in (names or rows.ORDER)]
        cells = sorted(
            ((row, number) for row in chosen for number in row.seeds if seed in (None, number)),
            key=lambda cell: cell[1],  # stable: the first seed of every row before the second of any
        )
        for row, number in cells:
            if not done(row, number):
                begun = record.about("accuracy")
                record.keep("accuracy", begun | facts_of(row, number) | measure(row, number, data))
    except (OSError, ValueError, ServiceError, Failure, ConfigError, DataError, ModelFileError) as error:
        sys.exit(f"error: {error}")
    except _OutOfTime:
        sys.exit(f"unfinished after {max_minutes} minutes; the same command goes on where {RUNS} stands")


def facts_of(row: Row, seed: int) -> dict[str, Any]:
    """What names a cell in the results."""
    return {
        "row": row.name,
        "seed": seed,
        "config_digest": row.digest,
        "settings_digest": row.settings_digest,
        "config": row.text,
        **({"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "torch": torch.__version__,
        "precision": str(training_dtype(choose_device("auto"))).removeprefix("torch."),
    }


def done(row: Row, seed: int) -> bool:
    """Whether the results have this cell, under its present settings."""
    return any(line.get("seed") == seed and row.is_measured_by(line) for line in record.kept("accuracy"))


def measure(row: Row, seed: int, data: Path) -> dict[str, Any]:
    """One cell: train, then look at the test part once. Each step is skipped where its result lies in its folder."""
    folder = RUNS / f"{row.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if row.dataset == "cifar10":
        data = datasets.cifar10_root(data, unpacked=RUNS.parent / "data")
    teacher = teacher_of(row.dataset, seed, data)
    if row.of:
        return _on_a_pool(row, seed, data, teacher, folder)
    if row.reference:
        return _reference(row, seed, data, teacher, folder)
    run(row, seed, data, teacher, folder, phases=("all",))
    summary = add_test_figures(folder, teacher, datasets.part(row.dataset, data, "test"))
    kept = ("queries", "ledger", "bytes", "private_images_sent", "privacy", "seconds", "agreement_synthetic")
    pool, _, _ = _bought(folder)
    return _test_figures(row, data, teacher, folder / "student.pt") | {
        "accuracy": summary["accuracy"],
        "pool_digest": _digest(pool)[:16],
        **{name: summary[name] for name in kept if name in summary},
    }


def teacher_of(dataset: str, seed: int, data: Path) -> Path:
    """A checkpoint that teacher-serve takes: trained on the cloud's part, or given with the data."""
    if dataset == "cifar10":
        path = RUNS / "cifar10-teacher.pt"
        if not path.is_file():
            found = load_model(data / "teachers" / "rn56.pt", given=CIFAR_TEACHER)
            save_model(path, found.module, found.facts)
        return path
    path = RUNS / f"mnist-teacher-{seed}.pt"
    if not path.is_file():
        with Console().bar("cloud: train the teacher", "steps") as tell:
            cloud = datasets.part("mnist", data, "cloud")
            train_teacher(cloud, path=path, seed=seed, progress=tell, **MNIST_TEACHER)  # type: ignore[arg-type]
    return path


def run(row: Row, seed: int, data: Path, teacher: Path, folder: Path, *, phases: Sequence[str]) -> None:
    """teacher-serve and edge-agent as processes, with a fresh account; what is done already is not done again."""
    settings = {"images": _images(row.dataset), **row.run}
    config = folder / "row.toml"
    config.write_text(tomli_w.dumps(settings))
    ledger = f"sqlite:///{folder / 'ledger.db'}"
    key = account_key(ledger, "benchmark", int(settings["budget"]), folder / "key")
    with serving(teacher, ledger, log=folder / "teacher-serve.log", more=("--answers", row.answers)) as address:
        for phase in phases:
            status = run_agent(
                [
                    *("--phase", phase, "--data", str(data), "--config", str(config)),
                    *("--teacher", address, "--seed", str(seed), "--run-dir", str(folder)),
                ],
                api_key=key,
            )
            if status != 0:
                raise ServiceError(f"edge-agent ended with exit status {status}")
    with RunFolder(folder) as opened:
        charged = opened.journal.totals().charged_pictures
    posted = show_account(ledger, "benchmark")["posted"]
    if posted != charged:
        raise ServiceError(f"expected the ledger to have posted {charged}, got {posted}")


def _on_a_pool(row: Row, seed: int, data: Path, teacher: Path, folder: Path) -> dict[str, Any]:
    """Another student on the answers that another row pays for, whether that row's own student is trained or not."""
    below = rows.read(row.of)
    bought = RUNS / f"{below.name}-{seed}"
    bought.mkdir(parents=True, exist_ok=True)
    run(below, seed, data, teacher, bought, phases=("deprivatize", "ask"))
    summary = json.loads((bought / "summary.json").read_text())
    pool, generator, charged = _bought(bought)
    pool_digest = _digest(pool)[:16]
    config = _config(row, seed, data)
    pool, _ = pools.split_pool(pool, len(pool) - (row.queries or len(pool)))
    if row.answers == "hard":
        pool = pool.hardened()
    if config.distill.balance_answers:
        pool = pool.balanced()
    trained, _ = pools.split_pool(pool, int(len(pool) * config.held_out_fraction))
    facts = _students_facts(teacher, config.student)
    seconds = _train(
        row,
        config,
        trained,
        generator,
        facts,
        folder,
        datasets.local_pictures(config, channels=facts.channels, side=facts.height),
    )
    # Of a part of the pool, or of indices alone, fewer bytes would have been sent, or received.
    as_bought = ("bytes", "privacy") if len(pool) == charged and row.answers == below.answers else ()
    return _test_figures(row, data, teacher, folder / "student.pt") | {
        "queries": {"charged": len(pool), "pool": charged},
        "pool_digest": pool_digest,
        **{name: summary[name] for name in ("ledger", "private_images_sent", *as_bought)},
        "seconds": {"deprivatize": summary["seconds"]["deprivatize"], **seconds},
    }


def _bought(folder: Path) -> tuple[Pool, AnyGenerator, int]:
    """What a run folder's queries bought, the generator of its pictures, and how many were charged in all."""
    with RunFolder(folder) as opened:
        description = Description.from_facts(opened.journal.fact("teacher"))
        generator = from_content(opened.read_tensors("generator.pt"))
        pool = pools.load_pool(opened.journal, generator, description, label_smoothing=0.0)
        return pool, generator, opened.journal.totals().charged_pictures


def _digest(pool: Pool) -> str:
    """Of pictures and answers: rows whose lines have the same one learnt from the very same pool, or a part of it."""
    answers = pool.class_indices_N if pool.probabilities_NK is None else pool.probabilities_NK
    assert answers is not None
    return hashlib.sha256(pool.images_NCHW.numpy().tobytes() + answers.numpy().tobytes()).hexdigest()


def _reference(row: Row, seed: int, data: Path, teacher: Path, folder: Path) -> dict[str, Any]:
    config = _config(row, seed, data)
    if row.reference == "views":
        pool, queries = references.views(
            datasets.part(row.dataset, data, "device").images_NCHW,
            teacher=teacher,
            budget=config.budget,
            mirror=config.distill.mirror,
            seed=seed,
            folder=folder,
        )
    else:
        pool, queries = references.labels(row.dataset, data, row.pictures), {"charged": 0}
    seconds = _train(row, config, pool, None, _students_facts(teacher, config.student), folder)
    return _test_figures(row, data, teacher, folder / "student.pt") | {
        "queries": queries,
        "private_images_sent": queries["charged"],
        "seconds": seconds,
    }


def _students_facts(teacher: Path, architecture: str) -> ModelFacts:
    """As the agent writes them for pictures of the teacher's size."""
    facts = load_model(teacher).facts
    half = (0.5,) * facts.channels
    return replace(facts, architecture=architecture, mean=half, std=half, output="logits")


def _config(row: Row, seed: int, data: Path) -> RunConfig:
    own = {"images": _images(row.dataset), "seed": seed, "data": str(data)}
    return build_config(rows.merged(own, row.run))


def _images(dataset: str) -> str:
    """What the agent is told to take as local pictures."""
    if dataset != "mnist-digits":
        return dataset
    return str(datasets.pen_digits_folder(RUNS.parent / "data" / "pen-digits"))


def _train(
    row: Row,
    config: RunConfig,
    pool: Pool,
    generator: AnyGenerator | None,
    facts: ModelFacts,
    folder: Path,
    local_NCHW: Tensor | None = None,
) -> dict[str, float | None]:
    """The agent's training, checkpointed in a run folder of its own; returns seconds over all starts."""
    if config.distill.assistant and local_NCHW is None:
        raise ValueError(f"{row.name}: expected no assistant in a reference, got {config.distill.assistant}")
    mixed_MCHW = None
    if generator is not None and local_NCHW is not None:
        mixed_MCHW = mixed_pictures(generator, local_NCHW[privacy.split(local_NCHW, seed=config.seed)[0]])
    learnt_from = {"asked": _digest(pool), "latents": hashlib.sha256(pool.latents_NL.numpy().tobytes()).hexdigest()}
    inputs = digest_of(
        {
            "row": row.text,
            "settings": in_use(config.distill, mixes=mixed_MCHW is not None),
            "student": config.student,
            "seed": config.seed,
            **learnt_from,
        }
    )
    lessons = Lessons(
        pool=pool,
        facts=facts,
        config=config.distill,
        seed=config.seed,
        device=choose_device(config.device),
        console=Console(),
        local_NCHW=local_NCHW,
        mixed_MCHW=mixed_MCHW,
    )
    with RunFolder(folder) as own:
        if not (own.done("distill", inputs) and own.has("student.pt")):
            assistant = _assistant(row, lessons, learnt_from, own)
            with own.clock("distill"):
                student = student_of(
                    own, lessons, assistant=assistant, generator=generator, inputs=inputs, title=folder.name
                )
            own.write_network("student.pt", student.cpu(), facts)
            own.finish("distill", inputs)
        return {"distill": own.seconds("distill"), **(own.journal.fact(_ASSISTANTS_SECONDS) or {})}


def _assistant(row: Row, lessons: Lessons, learnt_from: dict[str, Any], own: RunFolder) -> Classifier | None:
    """The row's assistant, trained once for all rows whose assistants learn the same from the same answers.

    It lies in a folder of its own; its seconds are noted in the row's, `own`.
    """
    config = lessons.config
    if not config.assistant:
        return None
    settings = [
        in_use(assistants_own(config, first=it), mixes=lessons.mixed_MCHW is not None) for it in (True, False)
    ]
    name = digest_of({"assistant": config.assistant, "settings": settings, **learnt_from})[:8]
    with _once_free(RUNS / f"{row.of}-{lessons.seed}-assistants-{name}") as shared:
        assistant = assistant_of(shared, lessons, learnt_from=learnt_from)
        names = [name_of(generation) for generation in range(1, config.assistant_generations + 1)]
        own.journal.set_facts(**{_ASSISTANTS_SECONDS: {name: shared.seconds(name) for name in names}})
    return assistant


def _once_free(path: Path) -> RunFolder:
    """A folder that another row may be training in: it trains what this one waits for."""
    begun = time.monotonic()
    while True:
        try:
            return RunFolder(path)
        except FolderInUse:
            if time.monotonic() - begun > ASSISTANT_WAIT_SECONDS:
                raise
        time.sleep(1.0)


def _test_figures(row: Row, data: Path, teacher: Path, student: Path) -> dict[str, Any]:
    """Test accuracy of student and teacher, and how often they agree."""
    test = datasets.part(row.dataset, data, "test")
    teachers, students = (correct(path, test) for path in (teacher, student))
    figures: dict[str, Any] = {
        "accuracy": {"teacher": share(teachers.right_N), "student": share(students.right_N)},
        "share_kept": round(float(students.right_N.mean() / teachers.right_N.mean()), 5),
        "agreement": share(teachers.classes_N == students.classes_N),
        "test_pictures": len(test.labels_N),
        "teacher_digest": hashlib.sha256(teacher.read_bytes()).hexdigest()[:16],
    }
    if len(test.labels_N) <= KEPT_TEST_PICTURES:
        figures["right"] = {
            "teacher": np.packbits(teachers.right_N).tobytes().hex(),
            "student": np.packbits(students.right_N).tobytes().hex(),
        }
    return figures


def _out_of_time(_number: int, _frame: FrameType | None) -> None:
    raise _OutOfTime


if __name__ == "__main__":
    main()
