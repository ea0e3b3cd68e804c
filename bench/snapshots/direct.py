"""Times snapshots in the storage layer and in the engine below it, without a daemon.

    python -m bench.snapshots.direct POOL STAGING_DIR TIMES ROUND VOLUME...

A process of its own, as there is one engine a process. It opens the pool as a daemon does and takes
snapshots of the volumes in turns. The engine's part is timed by standing between it and the storage
layer. Prints a JSON list of [way, volume, seconds], the ways `engine` and `storage`.
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from vhostd import _native
from vhostd.config import LogConfig
from vhostd.logs import configure_logs
from vhostd.storage.pool import Pool

WRITES_BETWEEN = 64
CHECKPOINT_EVERY = 32


class _TimedVolume:
    def __init__(self, volume: Any) -> None:
        self._volume = volume
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._volume, name)

    def snapshot(self, **arguments: Any) -> int:
        begin = time.perf_counter()
        try:
            position: int = self._volume.snapshot(**arguments)
        finally:
            self.seconds = time.perf_counter() - begin
        return position


class _TimedEngine:
    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.volumes: dict[str, _TimedVolume] = {}

        # It looks like the engine's own to who asks which arguments it takes.
        @functools.wraps(engine.open_volume)
        def open_volume(device: Any, **arguments: Any) -> Any:
            volume = _TimedVolume(engine.open_volume(device, **arguments))
            self.volumes[arguments["name"]] = volume
            return volume

        self.open_volume = open_volume

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def main(path: Path, staging: Path, times: int, number: int, names: list[str]) -> None:
    # The log goes to standard error: the timings have standard output.
    configure_logs(LogConfig(level="warning"))
    engine = _TimedEngine(_native.Engine(staging_dir=str(staging)))
    pool = Pool.open(path, engine, staging_dir=staging)
    timings: list[tuple[str, str, float]] = []
    try:
        opened = {name: pool.open_volume(name) for name in names}
        for turn in range(times):
            for name in names if turn % 2 else names[::-1]:
                timed = engine.volumes[name]
                for write in range(WRITES_BETWEEN):
                    block = (turn * WRITES_BETWEEN + write) * 7919 % 1_000_003
                    timed.write(block * 4096, (turn * 1000 + write + 1).to_bytes(4, "big") * 1024)
                if turn % CHECKPOINT_EVERY == 0:
                    opened[name].checkpoint()
                begin = time.perf_counter()
                pool.snapshots.create(name, f"direct-{number}-{turn}")
                timings.append(("storage", name, time.perf_counter() - begin))
                timings.append(("engine", name, timed.seconds))
        for volume in opened.values():
            pool.release_volume(volume)
    finally:
        pool.close()
    sys.stdout.write(msgspec.json.encode(timings).decode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
