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
_WORTHWHILE = 0.9  # another number must take at most this share of the time
_HOPELESS = 3.0  # a number that takes so many times as long is not tried to the end
_REST_SECONDS = (30.0, 60.0, 120.0, 240.0)  # the longer, the more often nothing better was found
_SLOW_STEPS = 3  # as many hopeless steps in a row end the rest: something else has begun to compute

Search = Generator[int, float, None]

_most = 0


def look_for_the_best() -> None:
    """From here on trainings of this process look for their number, up to torch's of now; else it stays as it is."""
    global _most
    _most = torch.get_num_threads()


def search(most: int) -> Search:
    """Yield with how many threads, `most` at most, to take the next step; to be sent the seconds that it took.

    Half and twice as many are tried as long as that helps, and again some minutes later, or when steps become slow.
    """
    count, rests = most, 0
    while True:
        seconds = yield from _timed(count)
        for other in (count // 2, 2 * count):
            if 1 <= other <= most:
                others_seconds = yield from _timed(other, hopeless_seconds=_HOPELESS * seconds)
                if others_seconds <= _WORTHWHILE * seconds:
                    count, rests = other, 0
                    break
        else:
            long_seconds = _REST_SECONDS[min(rests, len(_REST_SECONDS) - 1)]
            calm = yield from _rest(count, long_seconds, slow_seconds=_HOPELESS * seconds)
            rests = rests + 1 if calm else 0


def _timed(count: int, *, hopeless_seconds: float = float("inf")) -> Generator[int, float, float]:
    """Steps with so many threads. Returns the median of their seconds."""
    yield count  # with another number than before, kernels are prepared anew
    taken: list[float] = []
    while len(taken) < _TIMED_STEPS and (not taken or taken[-1] < hopeless_seconds):
        taken.append((yield count))
    return median(taken)


def _rest(count: int, long_seconds: float, *, slow_seconds: float) -> Generator[int, float, bool]:
    """Steps with so many threads for so long. Returns whether they stayed as fast."""
    rested, slow_steps = 0.0, 0
    while rested < long_seconds and slow_steps < _SLOW_STEPS:
        seconds = yield count
        rested += seconds
        slow_steps = slow_steps + 1 if seconds >= slow_seconds else 0
    return slow_steps < _SLOW_STEPS


class Threads:
    """torch's number of threads during one training."""

    def __init__(self) -> None:
        self._search = search(_most) if _most > 1 else None
        if self._search is not None:
            self._use(next(self._search))
        self._began = time.perf_counter()

    def stepped(self) -> None:
        """One step more is done."""
        if self._search is not None:
            now = time.perf_counter()
            self._use(self._search.send(now - self._began))
            self._began = now

    @staticmethod
    def _use(count: int) -> None:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
