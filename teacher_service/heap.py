"""The C heap of a server that runs for months: glibc's defaults keep what odd messages leave behind.

glibc raises by itself, up to 32 MiB, the size from which a block is memory of its own that goes back when it is
freed, and the free top that it keeps; each thread may have a heap. After 100,000 malformed messages a server that
used 23 MiB held 120 MiB of free pieces, and ever more. With fixed limits they go back (``benchmarks.fuzz``).
"""

import ctypes
import sys

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

# Above a full batch of small pictures (128 of 3 x 32 x 32 bytes), which is allocated and freed thousands of times a
# second and had better stay on the heap.
_MMAP_THRESHOLD_BYTES = 2**20
_TRIM_THRESHOLD_BYTES = 4 * 2**20
_HEAPS = 2


def bound() -> None:
    """Fixes glibc's limits for this process; does nothing where there is another C library. Before any thread."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
    mallopt(_M_ARENA_MAX, _HEAPS)
