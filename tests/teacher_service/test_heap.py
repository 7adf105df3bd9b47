import subprocess
import sys

import pytest

# Frees a large block, then asks for one of 2 MiB: is that memory of its own, which goes back when it is freed?
PROGRAM = """
import ctypes, sys
from teacher_service import heap
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
libc = ctypes.CDLL(None)
if not hasattr(libc, "mallinfo2"):
    sys.exit(77)
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "bound":
    heap.bound()
libc.free(libc.malloc(16 * 2**20))
before = libc.mallinfo2().hblks
libc.malloc(2 * 2**20)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.parametrize(("how", "own_blocks"), [("bound", "1"), ("as it comes", "0")])
def test_a_large_block_is_memory_of_its_own_even_after_a_larger_one_was_freed(how: str, own_blocks: str) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60)
    if ended.returncode == 77:
        pytest.skip("expected glibc 2.33 or newer, found another C library")
    assert (ended.returncode, ended.stdout.strip()) == (0, own_blocks), ended.stderr
