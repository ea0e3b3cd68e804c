"""What several files of the suite need."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from vhostd.virtqueue.block import BlockDevice, Completion
from vhostd.virtqueue.constants import BlockStatus

POLL_PAUSE_S = 0.001


def pattern(tag: object, len_bytes: int) -> bytes:
    """Bytes that tell where they belong: the same for the same tag."""
    return random.Random(f"pattern {tag}").randbytes(len_bytes)


def poll_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 20.0) -> None:
    """For what no event tells of: a ring with its calls suppressed, a count in /proc."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {timeout_s:g} s"
        time.sleep(POLL_PAUSE_S)


def must_be_ok(completion: Completion) -> Completion:
    assert completion.status == BlockStatus.OK, completion
    return completion


def check_io(device: BlockDevice, tag: object, *, offset_bytes: int = 0) -> None:
    """Writes, flushes and reads back one block: the disk works."""
    data = pattern(tag, max(4096, device.block_bytes))
    device.write(offset_bytes, data)
    device.flush()
    assert device.read(offset_bytes, len(data)) == data
