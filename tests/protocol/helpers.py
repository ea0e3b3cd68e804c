"""What several files of the suite need."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from vhostd.virtqueue.block import BlockDevice, Completion
from vhostd.virtqueue.constants import BlockStatus

POLL_PAUSE_S = 0.001


def pattern(tag: object, len_bytes: int) -> bytes:
    """Bytes that tell where they belong: the same for the same tag."""
    return random.Random(f"pattern {tag}").randbytes(len_bytes)


def poll_until(
    condition: Callable[[], bool], what: str | Callable[[], str], *, timeout_s: float = 20.0
) -> None:
    """For what no event tells of: a ring with its calls suppressed, a count in /proc."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            described = what if isinstance(what, str) else what()
            raise AssertionError(f"{described} did not happen in {timeout_s:g} s")
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


class NeighbourLoad:
    """Verified I/O on another disk, on a thread of its own, until the context ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._rounds = 0
        self._progress = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="neighbour")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise AssertionError(f"the neighbour's disk failed: {self._error}") from self._error

    def await_progress(self, *, rounds: int = 3, timeout_s: float = 20.0) -> None:
        """Returns when the neighbour has done so many rounds more."""
        with self._progress:
            goal = self._rounds + rounds
            reached = self._progress.wait_for(
                lambda: self._rounds >= goal or self._error is not None, timeout_s
            )
        if self._error is not None:
            raise AssertionError(f"the neighbour's disk failed: {self._error}") from self._error
        assert reached, f"the neighbour's disk stood still for {timeout_s:g} s"

    def _run(self) -> None:
        try:
            with BlockDevice(self._path, timeout_s=20, memory_bytes=4 << 20) as device:
                blocks = [b""] * 64
                for at in range(len(blocks)):
                    blocks[at] = pattern(("neighbour", at), 4096)
                    device.write(at * 4096, blocks[at])
                rng = random.Random("neighbour")
                while not self._stop.wait(0.001):
                    at = rng.randrange(len(blocks))
                    blocks[at] = pattern((self._rounds, at), 4096)
                    device.write(at * 4096, blocks[at])
                    if self._rounds % 16 == 0:
                        device.flush()
                    at = rng.randrange(len(blocks))
                    assert device.read(at * 4096, 4096) == blocks[at], f"block {at} is wrong"
                    with self._progress:
                        self._rounds += 1
                        self._progress.notify_all()
        except Exception as error:
            with self._progress:
                self._error = error
                self._progress.notify_all()
