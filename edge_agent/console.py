"""What a person sees while a run works: bars on a terminal, a line now and then on anything else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 15.0

Tell = Callable[..., None]


class Console:
    """Writes to standard error; ``quiet`` leaves failures only."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._rich = RichConsole(stderr=True, quiet=quiet, highlight=False)

    def say(self, line: str) -> None:
        """One line."""
        self._rich.print(line, markup=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """One line that is shown even where ``quiet``."""
        quiet, self._rich.quiet = self._rich.quiet, False
        self._rich.print(line, markup=False, soft_wrap=True)
        self._rich.quiet = quiet

    @contextmanager
    def bar(self, what: str, unit: str) -> Iterator[Tell]:
        """A bar for one piece of work; call what it yields with (done, total, **figures)."""
        if self._rich.is_terminal:
            with self._terminal_bar(what, unit) as tell:
                yield tell
        else:
            yield self._lines(what, unit)

    @contextmanager
    def _terminal_bar(self, what: str, unit: str) -> Iterator[Tell]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._rich, transient=False) as progress:
            task = progress.add_task(what, total=None, figures="")

            def tell(done: int, total: int, **figures: float) -> None:
                progress.update(task, completed=done, total=total, figures=_text(figures))

            yield tell

    def _lines(self, what: str, unit: str) -> Tell:
        last = time.monotonic()

        def tell(done: int, total: int, **figures: float) -> None:
            nonlocal last
            if done == total or time.monotonic() - last >= LINE_EVERY_SECONDS:
                last = time.monotonic()
                line_now = f"{what}: {done}/{total} {unit} {_text(figures)}".rstrip()
                self._rich.print(line_now, markup=False, soft_wrap=True)

        return tell


def _text(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
