"""What a figure is worth depends on: the machine, its kernel, its disk, and what ran beside."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import msgspec

__all__ = ["Machine", "describe", "drop_caches"]


class Machine(msgspec.Struct, frozen=True):
    """Facts that stand at the head of a report."""

    cpu: str
    cores: int
    memory_bytes: int
    hypervisor: bool
    kernel: str
    filesystem: str
    started: str
    commit: str
    load_average: float
    """Of the minute before: what else the machine was busy with."""


def _filesystem(path: Path) -> str:
    """Type, device and options of the file system that holds `path`."""
    best: tuple[str, str] = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind, options = line.split()[:4]
        inside = path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= len(best[0]):
            best = (point, f"{kind} on {device} ({options})")
    return best[1]


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    where = Path(__file__).parent
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def describe(scratch: Path) -> Machine:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    flags = next((line for line in info if line.startswith("flags")), "")
    return Machine(
        cpu=models[0] if models else platform.processor() or "unknown",
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        hypervisor=" hypervisor" in flags,
        kernel=platform.release(),
        filesystem=_filesystem(scratch.resolve()),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        load_average=os.getloadavg()[0],
    )


def drop_caches() -> bool:
    """Writes everything back and empties the page cache. False: that takes root."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True
