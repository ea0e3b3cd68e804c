"""`check` on what the engine writes: the reader's word against the writer's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostd.storage.check import CheckReport, check_device
from vhostd.storage.format import crc32c, segment_path
from vhostd.storage.pool import Pool, create_pool
from vhostd.storage.volume import OpenVolume

native = pytest.importorskip("vhostd._native", reason="build the native module first: make build")

if TYPE_CHECKING:
    from vhostd._native import Engine, Volume

BLOCK = 4096
SIZE_BLOCKS = 16384


class Store:
    """A pool with one volume under a real engine; small segments, so that many come and go."""

    def __init__(self, path: Path, random: Random) -> None:
        self.random = random
        self.directory = path / "pool"
        self.staging = path / "staging"
        create_pool(
            self.directory, "fast", format_device=native.format_device, segment_bytes=1 << 20
        )
        self.engine: Engine
        self.pool: Pool
        self.start()
        self.pool.create_volume("root", SIZE_BLOCKS * BLOCK)

    def start(self) -> None:
        self.engine = native.Engine(staging_dir=str(self.staging), staging_bytes=8 << 20)
        engine: Any = self.engine
        self.pool = Pool.open(self.directory, engine, staging_dir=self.staging)

    def open(self) -> tuple[OpenVolume, Volume]:
        opened = self.pool.open_volume("root")
        volume: Any = opened._engine
        return opened, volume

    def churn(self, volume: Volume, requests: int) -> None:
        """Writes, discards and zeroes, also of parts of blocks."""
        random = self.random
        for _ in range(requests):
            # Half of them fall on a few blocks: those die soon, and segments with them.
            end = random.choice((256, SIZE_BLOCKS))
            start = random.randrange(end - 64) * BLOCK
            length = random.choice((512, BLOCK, 3 * BLOCK, 64 * BLOCK))
            kind = random.random()
            if kind < 0.8:
                volume.write(start + random.choice((0, 512)) * (length < BLOCK), self.data(length))
            elif kind < 0.9:
                volume.discard(start, max(length, BLOCK))
            else:
                volume.write_zeroes(start, max(length, BLOCK))

    def data(self, length: int) -> bytes:
        return self.random.randbytes(length)

    def stop(self) -> None:
        """A clean end."""
        assert self.pool.close() == []
        self.engine.shutdown()

    def crash(self) -> None:
        """What is open stays as it is on the device; the staging ring has the rest."""
        self.engine.shutdown()
        self.pool.catalog.close()
        self.pool.device.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    seed = int(os.environ.get("VHOSTD_TEST_SEED", SystemRandom().getrandbits(32)))
    print(f"VHOSTD_TEST_SEED={seed}")
    store = Store(tmp_path, Random(seed))
    yield store
    store.engine.shutdown()


def shown(report: CheckReport, *severities: str) -> str:
    wanted = severities or ("error", "warning", "note")
    return "\n".join(
        f"{f.severity} {f.code} {f.text}" for f in report.findings if f.severity in wanted
    )


@given(st.binary(max_size=9000))
def test_crc32c_of_reader_and_writer_agree(data: bytes) -> None:
    assert crc32c(data) == native.crc32c(data)


def test_pool_that_was_closed_cleanly_has_no_findings(store: Store) -> None:
    for _ in range(3):
        opened, volume = store.open()
        store.churn(volume, 150)
        opened.checkpoint()
        store.churn(volume, 150)
        store.pool.release_volume(opened)
    mapped_blocks = store.pool.catalog.checkpoint(opened.uuid).mapped_blocks
    store.stop()
    report = check_device(store.directory, data=True)
    assert shown(report) == ""
    assert not report.live
    assert report.volumes[0].mapped_blocks == mapped_blocks > 0
    assert report.volumes[0].replayable_records == 0
    assert report.summary.nodes > 0
    assert report.summary.data_blocks_read > mapped_blocks


def test_pool_in_use_has_no_findings_with_and_without_a_fresh_checkpoint(store: Store) -> None:
    opened, volume = store.open()
    for step in range(6):
        store.churn(volume, 60)
        if step % 2:
            opened.checkpoint()
        volume.flush()
        report = check_device(store.directory, data=True)
        assert shown(report, "error", "warning") == ""
        assert report.live
    assert report.volumes[0].records > 0


def test_pool_after_a_crash_has_no_errors_and_none_after_recovery(store: Store) -> None:
    opened, volume = store.open()
    store.churn(volume, 200)
    opened.checkpoint()
    store.churn(volume, 200)
    volume.flush()
    store.churn(volume, 50)
    store.crash()
    report = check_device(store.directory, data=True)
    assert report.ok, shown(report)
    assert report.volumes[0].replayable_records > 0
    store.start()
    opened, volume = store.open()
    store.churn(volume, 50)
    store.stop()
    assert shown(check_device(store.directory, data=True)) == ""


def test_bits_that_flip_under_a_real_pool_are_found(store: Store) -> None:
    opened, volume = store.open()
    store.churn(volume, 200)
    store.pool.release_volume(opened)
    segments = [
        row
        for row in store.pool.catalog.segments(opened.uuid)
        if row["sealed"] and row["used_blocks"] > 1
    ]
    store.stop()
    for _ in range(40):
        row = store.random.choice(segments)
        path = store.directory / segment_path(row["number"])
        # The used part: its header, then records and their data, or nodes.
        length = row["used_blocks"] * BLOCK
        if row["kind"] == 2:
            length = BLOCK
        at = store.random.randrange(length)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[at] ^= 1 << store.random.randrange(8)
        path.write_bytes(damaged)
        report = check_device(store.directory, data=True)
        assert report.errors + report.warnings, f"byte {at} of {path}"
        path.write_bytes(whole)
    assert shown(check_device(store.directory, data=True)) == ""


def test_a_check_of_an_idle_pool_leaves_no_trace(store: Store) -> None:
    opened, volume = store.open()
    store.churn(volume, 20)
    store.pool.release_volume(opened)
    store.stop()
    before = sorted((p, p.stat().st_mtime_ns) for p in store.directory.rglob("*"))
    check_device(store.directory, data=True)
    assert sorted((p, p.stat().st_mtime_ns) for p in store.directory.rglob("*")) == before
