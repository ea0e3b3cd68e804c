"""Streams into volumes: chunks are applied as they come, and what is durable is told now and then.

Invariants:
- Only verified chunks are applied, in their order; nothing after a damage is.
- What is told to be applied is durable on the disk before, so that a receiver that dies in between
  does some of it again, with the same content, and never too little.
- At most DEPTH requests are in flight.

One thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from vhostd.errors import VhostdError
from vhostd.transfer.copy import DiskWriter
from vhostd.transfer.stream import Kind, StreamReader

__all__ = ["receive"]

NOTE_BYTES = 256 << 20
NOTE_INTERVAL_S = 10.0


def receive(
    reader: StreamReader,
    target: DiskWriter,
    note: Callable[[int], None],
    progress: Callable[[int, int], None],
    *,
    note_bytes: int = NOTE_BYTES,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Applies a whole stream; returns when all of it is durable and verified.

    Args:
        note: told that everything before this byte of the volume is durable.
        progress: told how much of the volume is dealt with, and its size.

    Raises:
        DamagedError: the stream is not whole; what came before that is applied, and noted.
        DeviceError: the volume cannot be written.
    """
    applied_bytes = noted_bytes = reader.header.start_bytes
    unnoted_bytes = 0
    noted_s = clock()

    def note_now() -> None:
        nonlocal noted_bytes, unnoted_bytes, noted_s
        # The order that matters: durable first, told afterwards.
        target.finish()
        if applied_bytes > noted_bytes:
            note(applied_bytes)
        noted_bytes, unnoted_bytes, noted_s = applied_bytes, 0, clock()

    try:
        for chunk in reader.chunks():
            if chunk.kind is Kind.DATA:
                target.write(chunk.offset_bytes, memoryview(chunk.data))
                unnoted_bytes += chunk.len_bytes
            else:
                target.zeroes(chunk.offset_bytes, chunk.len_bytes)
            applied_bytes = chunk.end_bytes
            progress(applied_bytes, reader.header.size_bytes)
            if unnoted_bytes >= note_bytes or clock() - noted_s >= NOTE_INTERVAL_S:
                note_now()
        note_now()
    except BaseException:
        # Whoever continues is glad of each byte; and what ended this matters more than a failure
        # to save it. A disk that failed does not confirm its last flush, so it is not told.
        with contextlib.suppress(VhostdError, OSError):
            note_now()
        raise
