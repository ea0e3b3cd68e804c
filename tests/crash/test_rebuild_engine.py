"""What the engine wrote comes back from its segments: snapshots, clones and rollbacks too."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import pytest

from vhostd import _native
from vhostd.storage.check import check_device
from vhostd.storage.pool import Pool, create_pool
from vhostd.storage.rebuild import rebuild_catalog, repair

BLOCK = 4096
SIZE_BLOCKS = 3000


class Store:
    """A pool under a real engine, and what every head and snapshot reads as."""

    def __init__(self, path: Path, random: Random) -> None:
        self.random = random
        self.directory, self.staging = path / "pool", path / "staging"
        create_pool(
            self.directory, "fast", format_device=_native.format_device, segment_bytes=1 << 20
        )
        self.start()
        self.heads: dict[str, bytes] = {}
        self.kept: dict[tuple[str, str], bytes] = {}

    def start(self) -> None:
        self.engine: Any = _native.Engine(staging_dir=str(self.staging), staging_bytes=8 << 20)
        self.pool = Pool.open(self.directory, self.engine, staging_dir=self.staging)

    def stop(self) -> None:
        assert self.pool.close() == []
        self.engine.shutdown()

    def churn(self, name: str, requests: int) -> None:
        opened = self.pool.open_volume(name)
        volume: Any = opened._engine
        content = bytearray(self.heads[name])
        for _ in range(requests):
            count = self.random.choice((1, 1, 2, 7, 64))
            first = self.random.randrange(self.random.choice((80, SIZE_BLOCKS)) - count)
            at, length = first * BLOCK, count * BLOCK
            if self.random.random() < 0.8:
                content[at : at + length] = data = self.random.randbytes(length)
                volume.write(at, data)
            else:
                content[at : at + length] = bytes(length)
                volume.discard(at, length)
            if self.random.random() < 0.05:
                opened.checkpoint()
        self.heads[name] = bytes(content)
        self.pool.release_volume(opened)

    def build(self) -> None:
        snapshots = self.pool.snapshots
        self.pool.create_volume("root", SIZE_BLOCKS * BLOCK)
        self.heads["root"] = bytes(SIZE_BLOCKS * BLOCK)
        for name in ("a", "b", "c"):
            self.churn("root", 25)
            snapshots.create("root", name)
            self.kept["root", name] = self.heads["root"]
        self.churn("root", 20)
        snapshots.rollback("root", "b")
        self.heads["root"] = self.kept["root", "b"]
        self.churn("root", 20)
        snapshots.create("root", "d")
        self.kept["root", "d"] = self.heads["root"]
        snapshots.remove("root", ["a"])
        del self.kept["root", "a"]
        snapshots.clone("root", "d", "clone")
        self.heads["clone"] = self.heads["root"]
        self.churn("clone", 20)
        snapshots.create("clone", "own")
        self.kept["clone", "own"] = self.heads["clone"]
        self.churn("clone", 10)
        self.churn("root", 30)

    def compare(self) -> None:
        for name, wanted in self.heads.items():
            opened: Any = self.pool.open_volume(name)
            assert opened._engine.read(0, SIZE_BLOCKS * BLOCK) == wanted, name
            self.pool.release_volume(opened)
        for (volume, name), wanted in self.kept.items():
            snapshot: Any = self.pool.open_snapshot(volume, name)
            assert snapshot._engine.read(0, SIZE_BLOCKS * BLOCK) == wanted, (volume, name)
            self.pool.release_volume(snapshot)


@pytest.mark.parametrize("how", ["catalog", "maps", "everything"])
def test_what_the_engine_wrote_comes_back(tmp_path: Path, how: str) -> None:
    seed = int(os.environ.get("VHOSTD_TEST_SEED", SystemRandom().getrandbits(32)))
    print(f"VHOSTD_TEST_SEED={seed}")
    store = Store(tmp_path, Random(seed))
    store.build()
    store.compare()
    store.stop()
    report = check_device(store.directory, data=True)
    assert report.ok, report.findings
    if how != "maps":
        for path in store.directory.glob("catalog.sqlite*"):
            path.unlink()
    if how != "catalog":
        for path in store.directory.glob("segments/*/*.seg"):
            if path.read_bytes()[6] == 2:
                path.unlink()
    engine = _native.Engine(workers=1, staging_dir=str(tmp_path / "other"))
    if how == "maps":
        _, done = repair(store.directory, engine)
        assert not any(volume.failed for volume in done.volumes), done
    else:
        done = rebuild_catalog(store.directory, engine)
        assert done.ok, done
    engine.shutdown()
    store.start()
    store.compare()
    store.churn("clone", 10)
    store.churn("root", 10)
    store.compare()
    store.stop()
    report = check_device(store.directory, data=True)
    assert report.ok, report.findings
