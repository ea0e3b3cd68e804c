"""Whole guests for tests and the demo: images, back-ends, and QEMU around them.

Standard library only, so that `scripts/demo` can use it too. Everything here is synchronous and
used from one thread; waiting is always for an event, with a time limit.
"""

from .agent import Agent, CommandFailedError, CommandResult
from .backend import Backend, DaemonBackend, QsdBackend, VhostdBackend, vhostd_program
from .images import DEBIAN, TEST_GUEST, Guest, image_dir
from .process import HarnessError, Service
from .qmp import Qmp
from .vm import Disk, Vm

__all__ = [
    "DEBIAN",
    "TEST_GUEST",
    "Agent",
    "Backend",
    "CommandFailedError",
    "CommandResult",
    "DaemonBackend",
    "Disk",
    "Guest",
    "HarnessError",
    "Qmp",
    "QsdBackend",
    "Service",
    "VhostdBackend",
    "Vm",
    "image_dir",
    "vhostd_program",
]
