"""What punching a hole costs on a file system: what giving space back can be at best.

A mount with `discard` may send a TRIM for every hole at once, and make it a thousand times dearer.
"""

import ctypes
import os
import statistics
import time
from pathlib import Path

__all__ = ["hole_s"]

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
BLOCK_BYTES = 4096
FILE_BYTES = 4 << 20
HOLES = 64


def hole_s(directory: Path) -> float | None:
    """Median seconds that a hole of one block takes; None: there are none on this file system."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    path = directory / f"bench-holes-{os.getpid()}"
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    taken: list[float] = []
    with path.open("wb") as file:
        try:
            file.write(os.urandom(FILE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            for number in range(HOLES):
                # Apart from each other, so that each is an extent of its own.
                offset = number * (FILE_BYTES // HOLES)
                begin = time.perf_counter()
                if libc.fallocate(file.fileno(), mode, offset, BLOCK_BYTES):
                    return None
                taken.append(time.perf_counter() - begin)
        finally:
            path.unlink()
    return statistics.median(taken)
