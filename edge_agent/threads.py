"""How many threads a training computes with: as many as its steps are shortest with, looked for again and again.

torch takes one thread for every core that it sees. They wait for each other after every layer, so that one whose core
another program uses, or which a container's quota keeps still, keeps all of them waiting: steps take fifty times as
long (docs/run.md). A small network gains little from many anyway. What else a device has to do changes by the minute
and can hardly be foreseen, but a step's time can be measured.
"""

import time
from collections.abc import Generator
from statistics import median

import torch

_TIMED_STEPS = 5
_TIMED_SECONDS = 2.0  # steps that take longer are timed as often as fits, and once at least
_WORTHWHILE = 0.9  # another number must take at most this share of the time
_HOPELESS = 3.0  # a number that takes so many times as long is not tried to the end
_REST_SECONDS = (30.0, 60.0, 120.0, 240.0)  # the longer, the more often nothing better was found
_REST_TRIALS = 30.0  # and at least so many times as long as the looking took
_SLOW_STEPS = 3  # as many hopeless steps in a row end the rest: something else has begun to compute

Steps = Generator[int, float, None]

_most = 0


def look_for_the_best() -> None:
    """From here on trainings of this process look for their number, up to torch's of now; else it stays as it is."""
    global _most
    _most = _most or torch.get_num_threads()


class Search:
    """Says with how many threads, ``most`` at most, to take the next step, and is told the seconds that it took.

    Half and twice as many, and a single one, are tried as long as that helps, and again some minutes later, or when
    steps become slow.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.best = most
        """As far as it is known."""
        self._trial_seconds = 0.0
        self._steps = self._look()
        self.count = next(self._steps)
        """Of the next step."""

    def stepped(self, seconds: float) -> None:
        """One step with ``count`` threads took so long."""
        self.count = self._steps.send(seconds)

    def _look(self) -> Steps:
        rests = 0
        while True:
            seconds = yield from self._timed(self.best)
            for other in sorted({self.best // 2, min(2 * self.best, self._most), 1} - {0, self.best}, reverse=True):
                others_seconds = yield from self._timed(other, hopeless_seconds=_HOPELESS * seconds)
                if others_seconds <= _WORTHWHILE * seconds:
                    self.best, rests = other, 0
                    break
            else:
                calm = yield from self._rest(_REST_SECONDS[min(rests, 3)], slow_seconds=_HOPELESS * seconds)
                rests = rests + 1 if calm else 0

    def _timed(self, count: int, *, hopeless_seconds: float = float("inf")) -> Generator[int, float, float]:
        """Steps with so many threads. Returns the median of their seconds."""
        self._trial_seconds += yield count  # with another number than before, kernels are prepared anew
        taken: list[float] = []
        while not taken or (
            len(taken) < _TIMED_STEPS and sum(taken) < _TIMED_SECONDS and taken[-1] < hopeless_seconds
        ):
            taken.append((yield count))
        self._trial_seconds += sum(taken)
        return median(taken)

    def _rest(self, long_seconds: float, *, slow_seconds: float) -> Generator[int, float, bool]:
        """Steps with the best number. Returns whether they stayed as fast."""
        long_seconds = max(long_seconds, _REST_TRIALS * self._trial_seconds)
        rested, slow_steps = 0.0, 0
        while rested < long_seconds and slow_steps < _SLOW_STEPS:
            seconds = yield self.best
            rested += seconds
            slow_steps = slow_steps + 1 if seconds >= slow_seconds else 0
        self._trial_seconds = 0.0
        return slow_steps < _SLOW_STEPS


class Threads:
    """torch's number of threads during one training."""

    def __init__(self) -> None:
        self._search = Search(_most) if _most > 1 else None
        self._began = time.perf_counter()
        self._use()

    def stepped(self) -> None:
        """One step more is done."""
        if self._search is not None:
            now = time.perf_counter()
            self._search.stepped(now - self._began)
            self._began = now
            self._use()

    def ended(self) -> None:
        """The training is over: what comes next computes with the best number that was found."""
        if self._search is not None:
            torch.set_num_threads(self._search.best)

    def _use(self) -> None:
        if self._search is not None and torch.get_num_threads() != self._search.count:
            torch.set_num_threads(self._search.count)
