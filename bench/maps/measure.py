"""Fills volumes in several patterns and asks what their maps take; kills, restarts, and waits.

Memory and nodes are asked of real volumes, with room for the whole map: the cap and eviction would
hide what it takes. Recovery and first reads are of cold page caches, where those may be dropped.
"""

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench import loadgen
from bench.backends import BackendError
from bench.daemon import Daemon
from bench.machine import drop_caches
from bench.maps.scale import Scale
from bench.session import SECTOR_BYTES, Session

__all__ = ["Fill", "FirstRead", "Found", "Recovery", "measure"]

VOLUME = "disk"
SEED = "7"
LARGE_CACHE = "8G"
NO_CHECKPOINTS = "512G"
NO_CHECKPOINTS_S = 86400.0
BLOCK_BYTES = 4096
KIND_AT = 6
KIND_MAP = 2


class Fill(msgspec.Struct, frozen=True):
    """A volume after one pattern of writes, checkpointed."""

    pattern: str
    mapped_blocks: int
    memory_bytes: int
    live_node_bytes: int
    """Of nodes that are current."""
    map_segment_bytes: int
    """What map segments take on the disk, as `du` counts, nodes that were replaced included."""
    checkpoint_s: float
    load: loadgen.Result


class Recovery(msgspec.Struct, frozen=True):
    """A daemon that was killed, and the next one."""

    round: int
    log_bytes: int
    """Since the checkpoint."""
    ready_s: float
    """From the start of the process until the disk could be connected to; `idle_s` of it a daemon
    without any log to read takes too."""
    idle_s: float
    recover_s: float
    """Of it, recovery by the engine's own clock."""
    records: int
    segments: int
    first_read_ms: float
    caches_dropped: bool


class FirstRead(msgspec.Struct, frozen=True):
    """A restart, clean or not, of a volume with a big map."""

    round: int
    mapped_blocks: int
    how: str
    ready_s: float
    first_read_ms: float
    then: loadgen.Result
    """Random reads one at a time right after the first."""
    node_reads: int
    caches_dropped: bool


class Found(msgspec.Struct):
    fills: list[Fill] = []
    recoveries: list[Recovery] = []
    first_reads: list[FirstRead] = []
    failures: list[str] = []


def measure(session: Session, scale: Scale) -> Found:
    """What fails is kept in `failures` and stops no other part."""
    found = Found()
    parts: list[tuple[str, float, Callable[[Session], None]]] = [
        ("fills", 0.5, lambda part: _fills(part, scale, found)),
        ("recovery", 0.7, lambda part: _recoveries(part, scale, found)),
        ("first reads", 1.0, lambda part: _first_reads(part, scale, found)),
    ]
    for name, share, work in parts:
        try:
            work(session.part(share))
        except (BackendError, loadgen.LoadgenError) as error:
            found.failures.append(f"{name}: {error}")
            session.say(f"maps: {name}: failed: {error}")
    return found


def _new(session: Session, checkpoint_log: str, interval_s: float) -> Daemon:
    directory = session.scratch / "bench-maps"
    Daemon(session.vhostd, directory).remove()
    return Daemon(
        session.vhostd,
        directory,
        core=session.cores[0],
        map_cache=LARGE_CACHE,
        checkpoint_log=checkpoint_log,
        checkpoint_interval_s=interval_s,
    )


# What a map takes


def _patterns(scale: Scale) -> list[tuple[str, int, list[list[str]]]]:
    """Name, size of the volume, loads."""
    blocks = scale.blocks
    dense = blocks * BLOCK_BYTES
    write = ["--depth", "64", "--seed", SEED]
    fill = ["--workload", "fill", "--block", "128K", "--depth", "8"]
    again = ["--workload", "randwrite", *write, "--requests", str(2 * blocks)]
    zipf = ["--workload", "zipf", "--read-percent", "0", *write, "--requests", str(2 * blocks)]
    sparse = ["--workload", "firstwrite", *write, "--requests", str(blocks)]
    aligned = -(-dense // (128 << 10)) * (128 << 10)
    return [
        ("sequential", aligned, [fill]),
        ("zipf on a full volume", aligned, [fill, zipf]),
        ("uniform random on a full volume", aligned, [fill, again]),
        ("uniform random, 1 block in 32", dense * 32, [sparse]),
        (f"uniform random, 1 block in {scale.volume_bytes // dense}", scale.volume_bytes, [sparse]),
    ]


def _fills(session: Session, scale: Scale, found: Found) -> None:
    for pattern, size_bytes, loads in _patterns(scale):
        daemon = _new(session, "256M", 300.0)
        try:
            with daemon.running():
                socket = daemon.add(VOLUME, size_bytes)
                for load in loads:
                    result = session.load(socket, *load)
                found.fills.append(_filled(daemon, pattern, result))
        finally:
            daemon.remove()
        fill = found.fills[-1]
        session.say(
            f"maps: {pattern}: {fill.mapped_blocks:,} blocks, "
            f"{fill.memory_bytes / fill.mapped_blocks:.2f} B a block in memory"
        )


def _filled(daemon: Daemon, pattern: str, result: loadgen.Result) -> Fill:
    begin = time.monotonic()
    daemon.checkpoint(VOLUME)
    checkpoint_s = time.monotonic() - begin
    stats = daemon.stats(VOLUME)
    return Fill(
        pattern=pattern,
        mapped_blocks=stats["mapped_blocks"],
        memory_bytes=stats["map_memory_bytes"],
        live_node_bytes=stats["live_node_bytes"],
        map_segment_bytes=map_segment_bytes(daemon.pool_path),
        checkpoint_s=checkpoint_s,
        load=result,
    )


def map_segment_bytes(pool: Path) -> int:
    """What map segments take on the disk (docs/format.md, "Segment header")."""
    total = 0
    for path in (pool / "segments").glob("*/*.seg"):
        try:
            with path.open("rb") as file:
                head = file.read(KIND_AT + 1)
            if len(head) > KIND_AT and head[KIND_AT] == KIND_MAP:
                total += path.stat().st_blocks * SECTOR_BYTES
        except FileNotFoundError:
            continue  # removed since it was listed
    return total


# Recovery


def _first_read(session: Session, socket: Path, *more: str) -> float:
    load = ["--workload", "readonce", "--depth", "1", "--seed", SEED, "--requests", "1", *more]
    return session.load(socket, *load).latency_ns.max / 1e6


def _recoveries(session: Session, scale: Scale, found: Found) -> None:
    daemon = _new(session, NO_CHECKPOINTS, NO_CHECKPOINTS_S)
    try:
        daemon.start()
        socket = daemon.add(VOLUME, scale.recovery_volume_bytes)
        session.load(socket, "--workload", "randwrite", "--depth", "32", "--requests", "1000")
        last_s, rounds = 0.0, 0
        while rounds < scale.recovery_rounds and session.has_time(rounds, last_s):
            begin = time.monotonic()
            # What a daemon takes to start with nothing to recover.
            daemon.stop()
            drop_caches()
            idle_s = daemon.start()
            for log_bytes in scale.log_bytes:
                found.recoveries.append(_recover(session, daemon, rounds, log_bytes, idle_s))
            rounds += 1
            last_s = time.monotonic() - begin
    finally:
        daemon.remove()


def _recover(
    session: Session, daemon: Daemon, number: int, log_bytes: int, idle_s: float
) -> Recovery:
    socket = daemon.socket(VOLUME)
    daemon.checkpoint(VOLUME)
    writes = log_bytes // BLOCK_BYTES
    load = ["--workload", "randwrite", "--depth", "32", "--seed", str(number + 2)]
    session.load(socket, *load, "--requests", str(writes))
    since = daemon.stats(VOLUME)["log_bytes_since_checkpoint"]
    daemon.kill()
    dropped = drop_caches()
    ready_s = daemon.start()
    first_ms = _first_read(session, socket)
    recovered = daemon.stats(VOLUME)["recovered"]
    session.say(
        f"maps: round {number + 1}: {since >> 20} MiB of log: ready after {ready_s:.2f} s "
        f"({idle_s:.2f} s with none), first read {first_ms:.1f} ms"
    )
    return Recovery(
        round=number,
        log_bytes=since,
        ready_s=ready_s,
        idle_s=idle_s,
        recover_s=recovered["seconds"],
        records=recovered["records"],
        segments=recovered["segments_scanned"],
        first_read_ms=first_ms,
        caches_dropped=dropped,
    )


# The first read


def _first_reads(session: Session, scale: Scale, found: Found) -> None:
    # With the cap that a daemon has by default.
    daemon = Daemon(session.vhostd, session.scratch / "bench-first-read")
    daemon.remove()
    daemon = Daemon(session.vhostd, session.scratch / "bench-first-read", core=session.cores[0])
    try:
        daemon.start()
        socket = daemon.add(VOLUME, scale.volume_bytes)
        load = ["--workload", "firstwrite", "--depth", "64", "--seed", SEED]
        session.load(socket, *load, "--requests", str(scale.blocks))
        last_s, rounds = 0.0, 0
        while rounds < scale.first_read_rounds and session.has_time(rounds, last_s):
            begin = time.monotonic()
            for how in ("stopped", "killed"):
                if how == "stopped":
                    daemon.stop()
                else:
                    daemon.kill()
                dropped = drop_caches()
                ready_s = daemon.start()
                first_ms = _first_read(session, socket)
                # The same order as they were written in: each lies in a part of the map of its own.
                load = ["--workload", "readonce", "--depth", "1", "--seed", SEED]
                load += ["--requests", str(scale.first_reads)]
                then = session.load(socket, *load)
                stats = daemon.stats(VOLUME)
                found.first_reads.append(
                    FirstRead(
                        round=rounds,
                        mapped_blocks=stats["mapped_blocks"],
                        how=how,
                        ready_s=ready_s,
                        first_read_ms=first_ms,
                        then=then,
                        node_reads=stats["map_node_reads"],
                        caches_dropped=dropped,
                    )
                )
                session.say(
                    f"maps: {how}: ready after {ready_s:.2f} s, first read {first_ms:.1f} ms, then "
                    f"{then.latency_ns.mean / 1e6:.2f} ms on average"
                )
            rounds += 1
            last_s = time.monotonic() - begin
        daemon.stop()
    finally:
        daemon.remove()
