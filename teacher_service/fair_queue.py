"""A queue that is fair between owners: whoever has been given the least goes next."""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Turn(NamedTuple):
    """Of an owner who waits; the smallest is next."""

    is_regular: bool
    """False: it was passed over, and goes first."""
    clock: int
    order: int
    """Of arrival."""
    owner: str


class FairQueue(Generic[T]):
    """Items with a size, in turn by owner and in order of arrival within one.

    Start-time fair queueing: every owner has a clock that advances by the size of what it is given, and the owner
    whose clock is lowest goes next. An owner who comes back begins at the present, so that idling saves up nothing,
    and at its own clock where that is ahead, so that leaving forgives nothing.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[tuple[T, int]]] = {}
        self._turns: list[_Turn] = []  # a heap
        self._ahead: dict[str, int] = {}  # clocks of owners who wait for nothing and are ahead of the present
        self._present = 0
        self._order = itertools.count()
        self.size = 0
        """Of all items together."""

    def put(self, owner: str, item: T, size: int) -> None:
        """One more item at the end of its owner's."""
        self.size += size
        if owner not in self._waiting:
            self._waiting[owner] = deque()
            clock = max(self._ahead.pop(owner, 0), self._present)
            heapq.heappush(self._turns, _Turn(True, clock, next(self._order), owner))
        self._waiting[owner].append((item, size))

    def take(self, most: int) -> list[T]:
        """Items of together at most this size, whole ones; an item that alone is larger comes alone.

        An owner whose next item does not fit is passed over and goes first the next time.
        """
        taken: list[T] = []
        passed: list[_Turn] = []
        left = most
        while self._turns and left > 0:
            turn = heapq.heappop(self._turns)
            clock, owner = turn.clock, turn.owner
            items = self._waiting[owner]
            item, size = items[0]
            if taken and size > left:
                passed.append(turn)
                continue
            items.popleft()
            taken.append(item)
            left -= size
            self.size -= size
            self._present = max(self._present, clock)
            if items:
                heapq.heappush(self._turns, _Turn(True, clock + size, next(self._order), owner))
            else:
                del self._waiting[owner]
                self._ahead[owner] = clock + size
        for turn in passed:
            heapq.heappush(self._turns, turn._replace(is_regular=False))
        if not self._turns:  # nobody waits: all begin alike
            self._present = max([self._present, *self._ahead.values()])
        self._ahead = {owner: clock for owner, clock in self._ahead.items() if clock > self._present}
        return taken

    def remove(self, is_unwanted: Callable[[T], bool]) -> list[T]:
        """Takes out what nobody wants any longer, and returns it; asked once of every item."""
        removed: list[T] = []
        emptied = False
        for owner, items in list(self._waiting.items()):
            kept: deque[tuple[T, int]] = deque()
            for item, size in items:
                if is_unwanted(item):
                    removed.append(item)
                    self.size -= size
                else:
                    kept.append((item, size))
            self._waiting[owner] = kept
            if not kept:
                del self._waiting[owner]
                emptied = True
        if emptied:
            gone = [turn for turn in self._turns if turn.owner not in self._waiting]
            self._ahead |= {turn.owner: turn.clock for turn in gone}
            self._turns = [turn for turn in self._turns if turn.owner in self._waiting]
            heapq.heapify(self._turns)
        return removed

    def __bool__(self) -> bool:
        return bool(self._turns)
