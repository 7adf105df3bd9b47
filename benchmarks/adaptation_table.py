"""docs/adaptation-results.md, written from benchmarks/results/adaptation.jsonl alone."""

from pathlib import Path
from statistics import mean
from typing import Any

TARGET = Path(__file__).parent.parent / "docs" / "adaptation-results.md"
ORDERS = ("shuffled", "by class", "returning", "clean", "clean by class")

_SETTING = ("dataset", "part", "batch")
_SAME = ("run", "streams", "pictures")
_FACTS = (*_SETTING, *_SAME, "question", "order", "method", "code")

_HEAD = """# Adaptation at test time, measured

Written by `python -m benchmarks.adaptation --table` from
[the results](../benchmarks/results/adaptation.jsonl), which have every line that was ever measured, with the command
and the accuracy on each stream.

Accuracy in percent, mean over the streams of an order. In brackets the worst difference to no adaptation (`none`) on
any single stream, in points, and that stream; `/3` and `/5` are severities.

- *shuffled*, *by class*: all pictures spoiled by one corruption at severity 3 or 5, or of another data set; every
  class at any time, or one class after the other.
- *returning*: shuffled, the severity goes from 0 to 5 and back.
- *clean*, *clean by class*: as they are.
- *cost*: processor time of one thread, as a multiple of the plain student's on the same batch; on shifted pictures,
  then on unshifted. *a second*: shifted pictures.
- *memory*: by how much a fresh process, its student loaded and used once, grows at most, in megabytes.
"""


def write(lines: list[dict[str, Any]]) -> None:
    """Write the page: a table for each data set, part and batch size, of its newest student and streams."""
    TARGET.write_text("\n".join([_HEAD, *tables(lines)]))


def matching(lines: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that say the same of whatever names a measurement."""
    return [line for line in lines if all(line.get(name) == facts.get(name) for name in _FACTS)]


def tables(lines: list[dict[str, Any]]) -> list[str]:
    """One table for each data set, part and batch size, in the order of these."""
    newest = {tuple(line[name] for name in _SETTING): line for line in lines if line["question"] == "accuracy"}
    found = []
    for (dataset, part, batch), last in sorted(newest.items()):
        same = [line for line in lines if all(line[name] == last[name] for name in (*_SETTING, *_SAME))]
        found.append(f"## {dataset}, {part} part, batches of {batch}\n")
        found.append(f"{last['pictures']:,} pictures a stream.\n")
        found.append(_table(same))
    return found


def _table(lines: list[dict[str, Any]]) -> str:
    costs = {line["method"]: line for line in lines if line["question"] == "cost"}
    cells = {(line["method"], line["order"]): line for line in lines if line["question"] == "accuracy"}
    accuracies = {key: _together(lines, newest) for key, newest in cells.items()}
    methods = list(dict.fromkeys(method for method, _ in cells))
    orders = [order for order in ORDERS if any((method, order) in cells for method in methods)]
    rows = [f"| method | {' | '.join(orders)} | cost | a second | memory |", "|---" * (len(orders) + 4) + "|"]
    for method in methods:
        row = [_cell(accuracies.get((method, order)), accuracies.get(("none", order))) for order in orders]
        cost = costs.get(method)
        told = ["", "", ""]
        if cost is not None:
            memory = cost["peak_megabytes"]
            told = [
                f"{cost['ratio_shifted']:.2f}, {cost['ratio_unshifted']:.2f}",
                f"{cost['pictures_per_second']:,.0f}",
                "" if memory is None else f"{memory:.1f}",
            ]
        rows.append(f"| {' | '.join([method, *row, *told])} |")
    return "\n".join(rows) + "\n"


def _together(lines: list[dict[str, Any]], newest: dict[str, Any]) -> dict[str, float]:
    """The streams of all lines that a measurement was kept in."""
    return {name: value for line in matching(lines, newest) for name, value in line["accuracy"].items()}


def _cell(found: dict[str, float] | None, plain: dict[str, float] | None) -> str:
    if found is None:
        return ""
    told = f"{100 * mean(found.values()):.2f}"
    if plain is None or plain is found or not found.keys() & plain.keys():
        return told
    worst, name = min((found[name] - plain[name], name) for name in found.keys() & plain.keys())
    return told + f" ({100 * worst:+.2f}{'' if name == 'clean' else ' ' + name})"
