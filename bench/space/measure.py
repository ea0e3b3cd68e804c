"""Overwrites a volume ten times at random, snapshots rotating, and looks at what the pool takes.

A run: a new volume is filled once; then random 4 KiB writes go on, and each time another part of
the volume has been written a snapshot is taken and the oldest removed, so that a fixed number is
kept. Meanwhile the segment files' blocks are counted as `du` does, with vhostd's and the device's
counters beside. After the load samples go on until nothing changes.
"""

import time

import msgspec

from bench import loadgen
from bench.backends import BackendError
from bench.daemon import Daemon
from bench.disks import fill_socket
from bench.session import SECTOR_BYTES, Session, sectors_written, segment_bytes_on_disk
from bench.space.account import Sample, reached_blocks
from bench.space.holes import hole_s
from bench.space.scale import Scale

__all__ = ["Found", "Rotation", "measure"]

BLOCK_BYTES = 4096
VOLUME = "disk"
UNCHANGED_SAMPLES = 12


class Rotation(msgspec.Struct):
    """One run."""

    rate: int | None
    volume_bytes: int
    keep: int
    load: loadgen.Result
    load_s: float
    """When the load ended, on the clock of the samples."""
    samples: list[Sample]
    snapshots: int
    snapshot_s: list[float]


class Found(msgspec.Struct):
    hole_s: float | None = None
    """What punching one block costs on this file system, by itself."""
    runs: list[Rotation] = []
    failures: list[str] = []
    left_out: list[str] = []
    """Runs there was no time for."""


def measure(session: Session, scale: Scale) -> Found:
    """What fails is kept in `failures`, and the runs before it."""
    found = Found(hole_s(session.scratch))
    last_s = 0.0
    for rate in scale.rates:
        if not session.has_time(len(found.runs), last_s):
            found.left_out.append("full speed" if rate is None else f"{rate:,} requests a second")
            session.say(f"space: no time for {found.left_out[-1]}")
            continue
        begin = time.monotonic()
        try:
            found.runs.append(_rotate(session, scale, rate))
        except (BackendError, loadgen.LoadgenError) as error:
            found.failures.append(f"space: {error}")
            session.say(found.failures[-1])
            break
        last_s = time.monotonic() - begin
    return found


def _rotate(session: Session, scale: Scale, rate: int | None) -> Rotation:
    directory = session.scratch / "bench-space"
    Daemon(session.vhostd, directory).remove()
    daemon = Daemon(
        session.vhostd,
        directory,
        core=session.cores[0],
        checkpoint_log=scale.checkpoint_log,
    )
    try:
        with daemon.running():
            socket = daemon.add(VOLUME, scale.volume_bytes)
            fill_socket(session, socket)
            daemon.checkpoint(VOLUME)
            return _Run(session, scale, daemon).run(rate)
    finally:
        daemon.remove()


class _Run:
    def __init__(self, session: Session, scale: Scale, daemon: Daemon) -> None:
        self._session = session
        self._scale = scale
        self._daemon = daemon
        self._blocks = scale.volume_bytes // BLOCK_BYTES
        self._base_bytes: int = daemon.stats(VOLUME)["written_bytes"]
        self._marks: list[int] = []
        self._taken = 0
        self._snapshot_s: list[float] = []
        self._samples: list[Sample] = []
        self._begin_s = 0.0

    def run(self, rate: int | None) -> Rotation:
        scale, session = self._scale, self._session
        requests = self._blocks * scale.passes
        load = ["--workload", "randwrite", "--depth", str(scale.depth), "--seed", "5"]
        load += ["--requests", str(requests), "--series", str(scale.sample_every_s)]
        load += session.pinned(self._daemon.pid)
        if rate is not None:
            load += ["--rate", str(rate)]
        step = self._blocks // scale.snapshots_a_pass
        session.say(
            f"space: {scale.passes} x {scale.volume_bytes >> 20} MiB at "
            f"{'full speed' if rate is None else f'{rate:,}/s'}, keeping {scale.keep} snapshots"
        )
        self._begin_s = time.monotonic()
        socket = self._daemon.socket(VOLUME)
        with loadgen.Background(session.binary, socket, *load) as background:
            next_mark = step
            told_pass = 0
            while background.running():
                sample = self._sample()
                written = (sample.written_bytes - self._base_bytes) // BLOCK_BYTES
                if written >= next_mark:
                    self._rotate_snapshots(written)
                    next_mark += step
                if written * scale.passes // requests > told_pass:
                    told_pass = written * scale.passes // requests
                    self._tell(f"pass {told_pass}", sample)
                self._pause(scale.sample_every_s / 2)
            result = background.finish()
        if result.errors.total:
            raise loadgen.LoadgenError(f"{result.errors.total} requests failed")
        load_s = time.monotonic() - self._begin_s
        self._tell("settled", self._settle(load_s + scale.settle_s))
        # Samples on the clock of the load's intervals.
        shift_s = result.began_monotonic_ns / 1e9 - self._begin_s
        samples = [
            msgspec.structs.replace(sample, at_s=sample.at_s - shift_s) for sample in self._samples
        ]
        return Rotation(
            rate=rate,
            volume_bytes=scale.volume_bytes,
            keep=scale.keep,
            load=result,
            load_s=load_s - shift_s,
            samples=samples,
            snapshots=self._taken,
            snapshot_s=self._snapshot_s,
        )

    def _rotate_snapshots(self, written: int) -> None:
        self._snapshot_s.append(self._daemon.snapshot(VOLUME, f"s{self._taken}"))
        # Blocks that were written while it was taken are on either side of it.
        self._marks.append(written)
        self._taken += 1
        if len(self._marks) > self._scale.keep:
            oldest = self._taken - len(self._marks)
            self._daemon.remove_snapshots(VOLUME, [f"s{oldest}"])
            self._marks.pop(0)

    def _sample(self) -> Sample:
        stats = self._daemon.stats(VOLUME)
        sectors = sectors_written(self._daemon.pool_path)
        written = (stats["written_bytes"] - self._base_bytes) // BLOCK_BYTES
        reached = reached_blocks(self._blocks, self._marks, written)
        sample = Sample(
            at_s=time.monotonic() - self._begin_s,
            written_bytes=stats["written_bytes"],
            du_bytes=segment_bytes_on_disk(self._daemon.pool_path),
            reached_bytes=int(reached * BLOCK_BYTES),
            live_bytes=stats["live_blocks"] * BLOCK_BYTES,
            allocated_bytes=stats["allocated_bytes"],
            log_bytes=stats["log_bytes"],
            node_bytes=stats["node_bytes"],
            punched_bytes=stats["punched_bytes"],
            disk_bytes=None if sectors is None else sectors * SECTOR_BYTES,
            snapshots=len(self._marks),
            removing=self._daemon.removing(VOLUME),
        )
        self._samples.append(sample)
        return sample

    def _settle(self, until_s: float) -> Sample:
        """Samples until what is on the disk stays the same for a while, or the time is over."""
        self._daemon.checkpoint(VOLUME)
        unchanged, last = 0, self._sample()
        while unchanged < UNCHANGED_SAMPLES and last.at_s < until_s:
            self._pause(self._scale.sample_every_s)
            now = self._sample()
            unchanged = unchanged + 1 if _level(now) == _level(last) else 0
            last = now
        return last

    def _pause(self, seconds: float) -> None:
        # The pool is looked at now and then: there is no event to wait for.
        time.sleep(seconds)

    def _tell(self, what: str, sample: Sample) -> None:
        self._session.say(
            f"space: {what}: {sample.du_bytes >> 20} MiB for {sample.reached_bytes >> 20} MiB of "
            f"live data ({sample.du_bytes / sample.reached_bytes:.2f}), "
            f"{sample.punched_bytes >> 20} MiB punched so far, {sample.removing} snapshots "
            "being removed"
        )


def _level(sample: Sample) -> tuple[int, int]:
    return sample.du_bytes, sample.removing
