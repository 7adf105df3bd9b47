"""benchmarks/README.md and benchmarks/accuracy.svg, written from benchmarks/results/accuracy.jsonl alone.

Shape letters: N test pictures, S seeds.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record, rows

HERE = Path(__file__).parent
RESAMPLES = 10_000
AIMS = (
    ("MNIST, ResNet32 → ResNet8", "accuracy", 0.994, ("mnist-soft", "mnist-kl-only", "mnist-patient", "mnist-local")),
    (
        "the same, class indices",
        "accuracy",
        0.9935,
        ("mnist-hard", "mnist-hard-kl-only", "mnist-hard-local", "mnist-hard-patient"),
    ),
    ("the same, 10,000 queries", "accuracy", 0.992, ("mnist-10k", "mnist-10k-local")),
    (
        "CIFAR-10 as JPEG, ResNet56 → ResNet8",
        "kept",
        0.92,
        (
            "cifar10-soft",
            "cifar10-assistant",
            "cifar10-generations",
            "cifar10-patient",
            "cifar10-diffusion-generations",
        ),
    ),
    (
        "the same, class indices",
        "kept",
        0.91,
        ("cifar10-hard", "cifar10-hard-assistant", "cifar10-hard-generations", "cifar10-hard-patient"),
    ),
    (
        "the same, 10,000 queries",
        "kept",
        0.897,
        ("cifar10-10k", "cifar10-10k-generations", "cifar10-10k-patient"),
    ),
    ("CIFAR-10 as JPEG, ResNet56 → MobileNet", "kept", 0.95, ("cifar10-mobilenet", "cifar10-mobilenet-assistant")),
    (
        "the same, class indices",
        "kept",
        0.94,
        ("cifar10-mobilenet-hard", "cifar10-mobilenet-hard-assistant"),
    ),
    ("the same, 10,000 queries", "kept", 0.922, ("cifar10-mobilenet-10k", "cifar10-mobilenet-10k-assistant")),
    ("another pen, another scanner", "gain", 0.0, ("mnist-digits",)),
)
"""What the rows are there to reach: the task, of what, at least how much, and the rows that try. Of the mean over
seeds: accuracy, or kept, as a share of the teacher's. Gain: the 2.5 % bound of student less teacher, above 0."""
_ROUNDING = 1e-9
CURVE = ("mnist-10k", "mnist-20k", "mnist-30k", "mnist-40k", "mnist-soft")
PLOT_WIDTH_PX, PLOT_HEIGHT_PX, LEFT_PX, BOTTOM_PX = 460, 240, 60, 40

_HEAD = """# Accuracy, every query counted

Written by `python -m benchmarks.accuracy --table` from [results/accuracy.jsonl](results/accuracy.jsonl), which has
every line that was ever measured: date, commit, device, settings, queries by phase from the ledger, bytes, seconds.
A cell is measured by `python -m benchmarks.accuracy --data DIR --row ROW --seed S`; its settings and seeds are in
[configs/accuracy](configs/accuracy), each row's written before its own first test figure; `mnist-paper-*` and
`*-patient` were written knowing those of other rows. No phase and no checkpoint sees a test label; the last average
of a fixed schedule is the student.

`kept` is the student's accuracy as a share of the teacher's. Rows `of` another learn from the pool of answers that it
buys. Lines name that pool by `pool_digest`, those of before 2026-11-23, 02:30 UTC, do not: the pools of MNIST and of
CIFAR-10's seed 0 were bought more than once (below). `membership AUC` is that of the strongest
[attack](../docs/privacy.md#the-attacks) on what was sent, the largest of the seeds; "whole": a line of the row was
measured before there was an attack by parts of pictures. Bytes and AUC are of the seeds whose lines have them.

Lines of before 2026-11-21, 19:57 UTC, and those of `mnist-soft`, `mnist-local` and `mnist-hard-local` with seed 2,
are of students whose views had dark borders; so two of the three seeds of `mnist-digits` are, and the third is not.
[The ablations](../docs/ablations.md) say what that did to photographs; MNIST's own borders are dark. Lines of
`*-assistant` of before 2026-11-22, 00:30 UTC, are of students with the batch-norm statistics of local pictures;
since, they have those of the pool's (`train_student`).

Lines of `cifar10-diffusion*` with seeds 0 and 1 are of a generator whose average still had 1.4 % of its untrained
weights; those of other rows of before 2026-11-22, 18:40 UTC, had such averages, too, whose untrained share is
nothing after the thousands of steps that they took (`average_of` in [phase.py](../edge_agent/phase.py)).

The lines of 2026-11-22 of `cifar10-mobilenet`, `cifar10-diffusion-balanced` and `cifar10-diffusion-assistant`, seed
1, were not made by quite the command that they name: a script of a few lines, not kept, called the same code but
gave the row that they are `of` a student of one pass, to save the hour; that row's own student is not measured. The
students measured are of the settings shown. The diffusion model under the last two was trained over two commits
(2a4f319 up to step 6,400 or so, then ae1b5b9), so neither their commit nor their seed makes it again to the bit.

The generators under `cifar10-diffusion-generations`, seed 2, and `mnist-10k-local`, seed 0, were begun at an earlier
commit than their lines name (6fc77e2 and 4a356ce); what trains them and draws with them did not change in between.
The first 900 of the 8,000 steps under `mnist-paper`, seed 0, were made earlier, too, maybe in float32. Rows of its
answers have the 45,008 of phase 2: the other 4,992 of its 50,000 were spent on training the generator.
So were generator, answers and the first assistant under `cifar10-generations`, seed 1 (c2eaac8); the same answers and
assistants of 7ea5cfc are under `cifar10-hard-generations`, seed 1, whose student was trained on two processors.
The pool of `mnist-soft`, seed 0, was bought three times, each with a generator and a teacher of the same seed that
are not the same to the bit: `mnist-local` and `mnist-hard-local`, seed 0, are of the first, `mnist-10k-local` of the
second, all other rows of it of the third. What such a repetition changes, 99.22 and 99.16 % by `mnist-10k` say;
99.34 and 99.24 % by `mnist-soft` also have dark borders and none between them. Before all of these, at commit
`440cd09`, `mnist-soft`'s settings made 99.36 with seed 0, on a line without a row's name.
The pool of `mnist-soft`, seed 1, was bought a second time for the rows of it that are dated 2026-11-23: its teacher
and the first 2,100 or so of its generator's 8,000 steps were made in bfloat16 (80d06ef, 775c25b), all else not.
The pool of `cifar10-soft`, seed 0, was bought twice: `cifar10-soft`, `cifar10-assistant` and `cifar10-hard-assistant`
are of the first, `cifar10-patient` and `cifar10-mobilenet-assistant` of the second.

Lines name the `precision` that networks trained in where it was written down; the others are of bfloat16 or float32,
as the processor of that day had matrix units or not. `seconds.distill` of a row `of` another has its assistants' in
it up to 2026-11-22, 10:50 UTC; later ones have figures of their own, the same in rows that share assistants, and none
under `cifar10-patient`, `cifar10-mobilenet-assistant` and `cifar10-mobilenet-hard-assistant`, seed 1, whose
assistants are those of `cifar10-generations` and `cifar10-hard-generations`; that of `cifar10-assistant`, seed 1, is
of reading its. The seconds of `cifar10-10k` and `cifar10-mobilenet-hard`, seed 1, have a pause of ten minutes
or more in them, and those of all rows whatever else the machine did.

A commit that is "-dirty" was so, up to 2026-11-22, 15:20 UTC, by lines of results alone where benchmarks ran one
after the other.

Ideas that were tried on the development part alone have no line here; their figures are in
[docs/ablations.md](../docs/ablations.md).
"""

_AIMS_HEAD = """## Aims

Means over the seeds that are there, at the end the mean's 2.5 % bound (below); bold: reached. `cifar10-soft` and
the rows `of` it ask about mixes, from which [members can be told](../docs/privacy.md#what-a-mix-sells); of what
diffusion (CIFAR-10) and GANs (MNIST) made the attacks told none.

| task | aim | reached |
|---|---|---|"""


def write() -> None:
    """Write both files; unfinished cells are listed with their commands."""
    measured = record.kept("accuracy")
    lines = present(measured)
    picture = curve(lines)
    parts = [_HEAD, aims(lines), table(lines), former(measured), unfinished(lines)]
    if picture is not None:
        (HERE / "accuracy.svg").write_text(picture)
        parts.insert(4, "![Accuracy against queries](accuracy.svg)\n")
    (HERE / "README.md").write_text("\n".join(part for part in parts if part))


def present(lines: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """The last line of each cell (row, seed) under the row's present settings; lines of former ones are no cell's."""
    known = {name: rows.read(name) for name in rows.ORDER}
    return {
        (line["row"], line["seed"]): line
        for line in lines
        if line.get("row") in known and known[line["row"]].is_measured_by(line)
    }


def former(lines: list[dict[str, Any]]) -> str:
    """Of which rows there are more test figures than the table shows, and how many; empty if of none."""
    shown = present(lines)
    more = {
        name: sum(line.get("row") == name for line in lines) - sum(row == name for row, _ in shown)
        for name in rows.ORDER
    }
    found = ", ".join(f"`{name}` {count}" for name, count in more.items() if count > 0)
    if not found:
        return ""
    return (
        "Test figures that the table does not show, of former settings or measured again, are in the results, too;\n"
        f"present settings may have been written with these in mind: {found}.\n"
    )


def aims(lines: dict[tuple[str, int], dict[str, Any]]) -> str:
    """What was aimed at and, row by row, what was reached on how many seeds."""
    found = [_AIMS_HEAD]
    for task, measure, aim, names in AIMS:
        reached = []
        for name in names:
            cells = [line for (row, _), line in sorted(lines.items()) if row == name]
            if cells:
                value = _reached(measure, cells)
                shown = f"{100 * value:+.2f} at least" if measure == "gain" else _percent(value)
                enough = value > 0 if measure == "gain" else value >= aim - _ROUNDING
                shown = f"**{shown}**" if enough else shown
                reached.append(f"{shown} by `{name}` ({len(cells)} of {len(rows.read(name).seeds)} seeds)")
        wanted = "student above teacher" if measure == "gain" else f"{_percent(aim)} {measure}"
        found.append(f"| {task} | {wanted} | {', '.join(reached) or 'not measured'} |")
    return "\n".join([*found, "", "## Rows", ""])


def _reached(measure: str, cells: list[dict[str, Any]]) -> float:
    if measure == "gain":
        return difference(cells)[0]
    return float(
        np.mean([cell["share_kept"] if measure == "kept" else cell["accuracy"]["student"] for cell in cells])
    )


def table(lines: dict[tuple[str, int], dict[str, Any]]) -> str:
    """One line a row: means over the seeds that are there, and the smallest and largest."""
    found = ["| row | seeds | queries | teacher | student (min to max) | kept | agreement | bytes | membership AUC |"]
    found.append("|---|---|---|---|---|---|---|---|---|")
    for name in rows.ORDER:
        cells = [line for (row, _), line in sorted(lines.items()) if row == name]
        if not cells:
            continue
        students = [cell["accuracy"]["student"] for cell in cells]
        queries = " or ".join(f"{count:,}" for count in sorted({cell["queries"]["charged"] for cell in cells}))
        sent = [sum(cell["bytes"][way] for way in ("sent", "received")) / 1e6 for cell in cells if "bytes" in cell]
        attacked = [cell["privacy"] for cell in cells if cell.get("privacy")]
        risks = [privacy["membership_auc"] for privacy in attacked]
        whole = any("mean_of_parts" not in privacy["membership_attacks"] for privacy in attacked)
        risk = f"{max(risks):.3f}" + " whole" * whole if risks else ""
        found.append(
            f"| [{name}](configs/accuracy/{name}.toml) | {len(cells)} of {len(rows.read(name).seeds)} | {queries} "
            f"| {_percent(np.mean([cell['accuracy']['teacher'] for cell in cells]))} "
            f"| **{_percent(np.mean(students))}** ({_percent(min(students))} to {_percent(max(students))}) "
            f"| {_percent(np.mean([cell['share_kept'] for cell in cells]))} "
            f"| {_percent(np.mean([cell['agreement'] for cell in cells]))} "
            f"| {f'{np.mean(sent):.1f} MB' if sent else ''} | {risk} |"
        )
    bootstrapped = [
        (name, difference(cells), _gains(cells))
        for name in rows.ORDER
        if len(cells := [line for (row, _), line in sorted(lines.items()) if row == name and "right" in line]) > 0
    ]
    for name, (low, middle, high), gains in bootstrapped:
        found.append(
            f"\n`{name}`: student less teacher {100 * middle:+.1f} points, by seed "
            f"{', '.join(f'{100 * gain:+.1f}' for gain in gains)} (95 % of the mean: {100 * low:+.1f} to "
            f"{100 * high:+.1f}, paired bootstrap over seeds and test pictures)."
        )
    return "\n".join(found) + "\n"


def difference(cells: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Student's less teacher's accuracy, mean of the cells: 2.5 % bound, mean, 97.5 % bound.

    A paired bootstrap: seeds are drawn again with replacement, and so are test pictures, each with all its answers.
    """
    gains_SN = np.stack([_right(cell, "student") - _right(cell, "teacher") for cell in cells])
    seed_count, count = gains_SN.shape
    rng = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        gain_N = gains_SN[rng.integers(seed_count, size=seed_count)].mean(axis=0)
        means[i] = gain_N[rng.integers(count, size=count)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(gains_SN.mean()), float(high)


def _gains(cells: list[dict[str, Any]]) -> list[float]:
    """Student's less teacher's accuracy, seed by seed."""
    return [float((_right(cell, "student") - _right(cell, "teacher")).mean()) for cell in cells]


def _right(cell: dict[str, Any], who: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(cell["right"][who]), np.uint8))
    return bits[: cell["test_pictures"]].astype(np.float64)


def unfinished(lines: dict[tuple[str, int], dict[str, Any]]) -> str:
    """The rows with cells that no line has yet, and the commands that measure those; empty if there are none."""
    said = []
    for name in rows.ORDER:
        missing = [str(seed) for seed in rows.read(name).seeds if (name, seed) not in lines]
        if missing:
            said.append(f"| `python -m benchmarks.accuracy --row {name}` | {', '.join(missing)} |")
    return "\n".join(["## Unfinished", "", "| command | seeds left |", "|---|---|", *said, ""]) if said else ""


def curve(lines: dict[tuple[str, int], dict[str, Any]]) -> str | None:
    """Accuracy against queries as a picture, a dot a cell and a line through the means; None without two points."""
    points = {
        cells[0]["queries"]["charged"]: [cell["accuracy"]["student"] for cell in cells]
        for name in CURVE
        if (cells := [line for (row, _), line in sorted(lines.items()) if row == name])
    }
    if len(points) < 2:
        return None
    values = [value for found in points.values() for value in found]
    low, high = min(values) - 0.001, max(values) + 0.001
    right = max(points)

    def x(queries: int) -> float:
        return float(LEFT_PX + PLOT_WIDTH_PX * queries / right)

    def y(accuracy: float) -> float:
        return float(10 + PLOT_HEIGHT_PX * (high - accuracy) / (high - low))

    marks = []
    for queries, found in sorted(points.items()):
        base = PLOT_HEIGHT_PX + 26
        marks.append(f'<text x="{x(queries):.0f}" y="{base}" text-anchor="middle">{queries // 1000}K</text>')
        marks += [f'<circle cx="{x(queries):.1f}" cy="{y(value):.1f}" r="3" fill="#4477aa"/>' for value in found]
    for tick in np.linspace(low, high, 5):
        marks.append(f'<text x="{LEFT_PX - 8}" y="{y(tick) + 4:.0f}" text-anchor="end">{_percent(tick)}</text>')
    line = " ".join(f"{x(queries):.1f},{y(float(np.mean(found))):.1f}" for queries, found in sorted(points.items()))
    marks.append(f'<polyline points="{line}" fill="none" stroke="#4477aa"/>')
    middle, bottom = LEFT_PX + PLOT_WIDTH_PX / 2, PLOT_HEIGHT_PX + BOTTOM_PX + 6
    marks.append(f'<text x="{middle:.0f}" y="{bottom}" text-anchor="middle">queries charged (MNIST, soft)</text>')
    size = f'width="{LEFT_PX + PLOT_WIDTH_PX + 30}" height="{bottom + 8}" font-family="sans-serif" font-size="12"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *marks, "</svg>"]) + "\n"


def _percent(value: Any) -> str:
    return f"{100 * float(value):.2f}"
