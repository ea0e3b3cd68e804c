"""How long taking a snapshot takes, and what a guest notices: an empty volume beside a full one.

Both are volumes of the same size in one pool, served by one daemon; snapshots of the two are taken
in turns, each after a few writes, so that there is something to hold. Four ways are timed:

- `engine`: `Volume.snapshot` alone, and `storage`: that with the catalog's commit. In a process of
  their own (`bench.snapshots.direct`), with the daemon stopped.
- `json-rpc`: the call to the daemon, and `vhostctl`: the program from its start to its end, most of
  which is the start of Python.

Of all but `vhostctl` the first after a start is kept too: it is in the maximum. What waits for a
checkpoint is bounded (64), so checkpoints are made between the timed calls, not in them; a burst
without them is told apart (`burst`).
"""

import shutil
import subprocess
import sys
import time

import msgspec

from bench import loadgen
from bench.backends import BackendError
from bench.daemon import POOL, Daemon
from bench.machine import drop_caches
from bench.runner import judge
from bench.session import Session
from bench.snapshots.scale import Scale

__all__ = ["EMPTY", "MAPPED", "Creation", "Stall", "Timing", "measure"]

EMPTY, MAPPED = "empty", "mapped"
VOLUMES = (EMPTY, MAPPED)
WRITES_BETWEEN = 64
CHECKPOINT_EVERY = 32
VHOSTCTL_A_ROUND = 3
BURST = 128


class Timing(msgspec.Struct, frozen=True):
    volume: str
    way: str
    round: int
    seconds: float


class Stall(msgspec.Struct, frozen=True):
    """A load at a steady rate on one volume, with or without snapshots being taken of it."""

    volume: str
    round: int
    snapshots: int
    result: loadgen.Result
    noise: list[str]


class Creation(msgspec.Struct):
    volume_bytes: int
    mapped_blocks: dict[str, int] = {}
    """At the beginning and at the end, by volume (`name`, `name after`)."""
    fill_s: float = 0.0
    timings: list[Timing] = []
    stalls: list[Stall] = []
    rounds: int = 0
    failures: list[str] = []


def measure(session: Session, scale: Scale) -> Creation:
    """Raises BackendError or LoadgenError when nothing can be measured; later failures are kept."""
    outcome = Creation(scale.volume_bytes)
    directory = session.scratch / "bench-create"
    daemon = Daemon(session.vhostd, directory, core=session.cores[0])
    daemon.remove()
    daemon = Daemon(session.vhostd, directory, core=session.cores[0])
    needed = scale.mapped_blocks * 4096 * 1.1
    free = shutil.disk_usage(session.scratch).free
    if free < needed:
        raise BackendError(
            f"{session.scratch} has {free >> 30} GiB free, and {int(needed) >> 30} GiB are needed; "
            "give another --scratch or a smaller --mapped-blocks"
        )
    try:
        _fill(session, scale, daemon, outcome)
        last_s = 0.0
        while outcome.rounds < scale.create_rounds and session.has_time(outcome.rounds, last_s):
            begin = time.monotonic()
            try:
                _round(session, scale, daemon, outcome)
            except (BackendError, loadgen.LoadgenError) as error:
                outcome.failures.append(f"create, round {outcome.rounds + 1}: {error}")
                session.say(outcome.failures[-1])
                break
            outcome.rounds += 1
            last_s = time.monotonic() - begin
    finally:
        daemon.remove()
    return outcome


def _fill(session: Session, scale: Scale, daemon: Daemon, outcome: Creation) -> None:
    with daemon.running():
        for volume in VOLUMES:
            daemon.add(volume, scale.volume_bytes)
        session.say(f"create: mapping {scale.mapped_blocks:,} random blocks of 1 volume")
        load = ["--workload", "firstwrite", "--depth", "128", "--seed", "7"]
        begin = time.monotonic()
        session.load(daemon.socket(MAPPED), *load, "--requests", str(scale.mapped_blocks))
        outcome.fill_s = time.monotonic() - begin
        for volume in VOLUMES:
            daemon.checkpoint(volume)
            outcome.mapped_blocks[volume] = daemon.stats(volume)["mapped_blocks"]


def _round(session: Session, scale: Scale, daemon: Daemon, outcome: Creation) -> None:
    number = outcome.rounds
    drop_caches()
    _direct(session, scale, daemon, outcome)
    with daemon.running():
        _ask(session, scale, daemon, outcome)
        _stalls(session, scale, daemon, outcome)
        for volume in VOLUMES:
            outcome.mapped_blocks[f"{volume} after"] = daemon.stats(volume)["mapped_blocks"]
            _forget(daemon, volume)
    for way in ("engine", "json-rpc"):
        session.say(f"create: round {number + 1} {way}: {_told(outcome, way)}")


def _told(outcome: Creation, way: str) -> str:
    parts = []
    for volume in VOLUMES:
        found = sorted(t.seconds for t in outcome.timings if (t.volume, t.way) == (volume, way))
        if found:
            parts.append(f"{volume} {found[len(found) // 2] * 1e3:.2f} ms")
    return ", ".join(parts)


def _direct(session: Session, scale: Scale, daemon: Daemon, outcome: Creation) -> None:
    """Times the engine and the storage layer in a process of their own."""
    command = ["taskset", "-c", str(session.cores[0]), sys.executable]
    command += ["-m", "bench.snapshots.direct", str(daemon.pool_path), str(daemon.staging)]
    command += [str(scale.creates_a_round), str(outcome.rounds), *VOLUMES]
    root = loadgen.REPOSITORY
    try:
        done = subprocess.run(command, check=True, capture_output=True, timeout=3600, cwd=root)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[-2000:]
        raise BackendError(f"the storage layer by itself: {said}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendError(f"the storage layer by itself: {error}") from error
    for way, volume, seconds in msgspec.json.decode(done.stdout, type=list[tuple[str, str, float]]):
        outcome.timings.append(Timing(volume, way, outcome.rounds, seconds))


def _ask(session: Session, scale: Scale, daemon: Daemon, outcome: Creation) -> None:
    number = outcome.rounds
    ways = [("json-rpc", scale.creates_a_round), ("vhostctl", VHOSTCTL_A_ROUND)]
    for way, times in ways:
        for turn in range(times):
            for volume in VOLUMES if turn % 2 else VOLUMES[::-1]:
                load = ["--workload", "randwrite", "--depth", "16", "--seed", str(turn)]
                session.load(daemon.socket(volume), *load, "--requests", str(WRITES_BETWEEN))
                if turn % CHECKPOINT_EVERY == 0:
                    daemon.checkpoint(volume)
                name = f"{way}-{number}-{turn}"
                if way == "vhostctl":
                    taken_s = daemon.control("snapshot", "create", f"{POOL}/{volume}@{name}")
                else:
                    taken_s = daemon.snapshot(volume, name)
                outcome.timings.append(Timing(volume, way, number, taken_s))
    for volume in VOLUMES:
        for turn in range(BURST):
            taken_s = daemon.snapshot(volume, f"burst-{number}-{turn}")
            outcome.timings.append(Timing(volume, "burst", number, taken_s))


def _stalls(session: Session, scale: Scale, daemon: Daemon, outcome: Creation) -> None:
    number = outcome.rounds
    every_s = scale.snapshot_every_s
    for volume in VOLUMES if number % 2 else VOLUMES[::-1]:
        for taking in (False, True) if number % 2 else (True, False):
            daemon.checkpoint(volume)
            load = ["--workload", "randrw", "--depth", "32", "--seed", str(number)]
            load += ["--rate", str(scale.load_rate), "--duration", str(scale.load_s)]
            load += session.pinned(daemon.pid)
            socket = daemon.socket(volume)
            taken = 0
            with loadgen.Background(session.binary, socket, *load) as background:
                end_s = time.monotonic() + scale.load_s - every_s
                while taking and (now_s := time.monotonic()) < end_s:
                    took_s = daemon.snapshot(volume, f"load-{number}-{taken}")
                    outcome.timings.append(Timing(volume, "json-rpc under load", number, took_s))
                    taken += 1
                    time.sleep(max(0.0, now_s + every_s - time.monotonic()))
                result = background.finish()
            if result.errors.total:
                raise loadgen.LoadgenError(f"{result.errors.total} requests failed")
            noise = judge(result, volume, "stall", number, dropped=False).noise
            outcome.stalls.append(Stall(volume, number, taken, result, noise))
            session.say(
                f"create: round {number + 1} load on {volume}, {taken} snapshots: longest "
                f"{result.latency_ns.max / 1e6:.2f} ms"
            )


def _forget(daemon: Daemon, volume: str) -> None:
    """Removes all snapshots, so that rounds are alike and their number stays bounded."""
    daemon.remove_snapshots(volume)
    daemon.await_removals(volume)
