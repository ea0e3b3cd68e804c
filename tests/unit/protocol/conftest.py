"""Every test of the protocol is also a test that it leaves no descriptor behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest


def open_fds() -> dict[str, str]:
    """Descriptor numbers and what they are."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        except FileNotFoundError:
            continue  # the one listdir itself used
    return found


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    # Garbage of earlier tests would give its numbers to what is opened here.
    gc.collect()
    before = open_fds()
    yield
    after = open_fds()
    assert {fd: what for fd, what in after.items() if before.get(fd) != what} == {}
