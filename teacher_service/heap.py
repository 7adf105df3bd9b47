"""The C heap of a server that runs for months: what odd messages leave behind is given back.

glibc gives each thread a heap and keeps the free pieces of all of them. After 100,000 malformed messages a server
that used 23 MiB held 120 MiB of free pieces, and ever more. Two heaps, and giving back what is free every half
minute, end that (``benchmarks.fuzz``). Limits on the size of what is kept would, too, but networks allocate and free
megabytes for every layer: mapping those anew doubled the time of a batch.
"""

import ctypes
import sys
import threading

_M_ARENA_MAX = -8  # from malloc.h
_HEAPS = 2
_PAUSE_SECONDS = 30.0


def bound() -> None:
    """Has this process give back what its heap does not use; does nothing without glibc. Before any other thread."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        return
    libc.mallopt(_M_ARENA_MAX, _HEAPS)
    threading.Thread(target=_trim_for_ever, args=(libc,), name="heap", daemon=True).start()


def _trim_for_ever(libc: ctypes.CDLL) -> None:
    never = threading.Event()
    while not never.wait(_PAUSE_SECONDS):
        libc.malloc_trim(0)  # without the interpreter's lock; a millisecond or so
