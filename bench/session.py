"""What every benchmark of a run shares: the disk, the load generator, the cores, and the time left.

Nothing here is measured. One thread.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import loadgen

__all__ = ["Session", "sectors_written", "segment_bytes_on_disk"]

SECTOR_BYTES = 512


@dataclass(frozen=True)
class Session:
    scratch: Path
    """A directory on the disk to measure."""
    binary: Path
    """The load generator."""
    vhostd: list[str]
    """Command that starts vhostd; `vhostctl` lies beside it."""
    cores: tuple[int, int]
    """Of the back-end and of the front-end."""
    say: Callable[[str], None]
    deadline_s: float | None = None
    """`time.monotonic()` at which no further round is begun."""

    def left_s(self) -> float:
        """Time left; infinite without a bound."""
        return float("inf") if self.deadline_s is None else self.deadline_s - time.monotonic()

    def part(self, share: float) -> "Session":
        """The same with a share of the time that is left."""
        left_s = self.left_s()
        deadline_s = None if left_s == float("inf") else time.monotonic() + share * left_s
        return Session(self.scratch, self.binary, self.vhostd, self.cores, self.say, deadline_s)

    def has_time(self, done: int, last_round_s: float) -> bool:
        """Whether another round is worth beginning. The first always is."""
        return done == 0 or self.left_s() > last_round_s

    def pinned(self, backend_pid: int) -> list[str]:
        """Arguments of a load whose cores and CPU time are told."""
        backend, frontend = self.cores
        return [
            *("--core", str(frontend)),
            *("--pingpong", f"{backend},{frontend}"),
            *("--backend-pid", str(backend_pid)),
        ]

    def load(self, socket: Path, *arguments: str, timeout_s: float = 3600) -> loadgen.Result:
        """Runs a load to its end; failed requests are an error.

        Raises LoadgenError.
        """
        core = [] if "--core" in arguments else ["--core", str(self.cores[1])]
        result = loadgen.run(self.binary, socket, *arguments, *core, timeout_s=timeout_s)
        if result.errors.total:
            raise loadgen.LoadgenError(f"{result.errors.total} requests failed")
        return result


def segment_bytes_on_disk(pool: Path) -> int:
    """What the segment files of a pool take, as `du` counts."""
    total = 0
    for directory, _, names in os.walk(pool / "segments"):
        for name in names:
            try:
                total += (Path(directory) / name).stat().st_blocks * SECTOR_BYTES
            except FileNotFoundError:
                continue  # removed since it was listed
    return total


def sectors_written(path: Path) -> int | None:
    """512-byte sectors written so far to the block device under `path` (Documentation/block/stat).

    None: the file system has no single block device.
    """
    device = path.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    try:
        return int(entry.read_text().split()[6])
    except (OSError, IndexError, ValueError):
        return None
