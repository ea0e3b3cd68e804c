"""Random steps through pool, volume and snapshot objects over the real engine, against a model.

The daemon "dies" when the engine stops without closing anything: everything acknowledged must be
there. Power "fails" when the staging memory goes as well: then a volume may be what it was after
any step since its last flush, and its snapshots are what they were. Hypothesis prints what
repeats a failure.
"""

from __future__ import annotations

import gc
import itertools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from vhostd.errors import BusyError
from vhostd.storage.pool import Pool, create_pool

native = pytest.importorskip("vhostd._native", reason="build the native module first: make build")

if TYPE_CHECKING:
    from vhostd.storage.volume import OpenVolume

BLOCK = 4096
BLOCKS = 40
MAX_VOLUMES = 3
POOL = "pool"

Content = list[int]
"""What each block was filled with; 0: zeroes."""

index = st.integers(0, 1 << 16)
ranges = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 12))


def block(number: int, stamp: int) -> bytes:
    """Says where it belongs and which write it is of."""
    if stamp == 0:
        return bytes(BLOCK)
    return (stamp.to_bytes(8) + number.to_bytes(8)) * (BLOCK // 16)


def blocks(content: Content, first: int = 0) -> bytes:
    return b"".join(block(i, stamp) for i, stamp in enumerate(content, first))


class Storage(RuleBasedStateMachine):
    """past: for each volume what it was after each step since its last flush, the last one now."""

    @initialize()
    def make(self) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.path = Path(self.scratch.name)
        (self.path / "device").mkdir()
        create_pool(
            self.path / "device", POOL, format_device=native.format_device, segment_bytes=1 << 20
        )
        self.past: dict[str, list[Content]] = {"web": [[0] * BLOCKS]}
        self.snapshots: dict[str, dict[str, Content]] = {"web": {}}
        self.origins: dict[str, tuple[str, str] | None] = {"web": None}
        self.opened: dict[str, OpenVolume] = {}
        # Volumes whose staging memory went before they were opened again.
        self.lost: set[str] = set()
        self.stamps = itertools.count(1)
        self.start()
        self.pool.create_volume("web", BLOCKS * BLOCK)

    def start(self) -> None:
        self.engine: Any = native.Engine(
            staging_dir=str(self.path / "staging"), staging_bytes=8 << 20
        )
        self.pool = Pool.open(
            self.path / "device",
            self.engine,
            staging_dir=self.path / "staging",
            checkpoint_log_bytes=1 << 40,
        )

    def die(self) -> None:
        self.opened.clear()
        self.engine.shutdown()
        self.pool.catalog.close()
        self.pool.device.close()
        # Open volumes keep the device locked, as their process would.
        del self.pool, self.engine
        gc.collect()

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        try:
            for name in list(self.past):
                self.check(name)
                self.close(name)
                uuid = self.pool.catalog.volume(name).uuid
                while self.pool.snapshots.release_next(uuid) is not None:
                    pass
                self.check(name)
        finally:
            # Not one by one: a step may have failed with one open.
            self.opened.clear()
            self.pool.close()
            self.engine.shutdown()
            self.scratch.cleanup()

    # Helpers

    def volume(self, i: int) -> str:
        return sorted(self.past)[i % len(self.past)]

    def open(self, name: str) -> Any:
        if name not in self.opened:
            self.opened[name] = self.pool.open_volume(name)
            self.settle(name)
        return self.opened[name].engine

    def settle(self, name: str) -> None:
        """Recovery has decided which of its past states the volume is in."""
        engine: Any = self.opened[name].engine
        found = engine.read(0, BLOCKS * BLOCK)
        possible = self.past[name] if name in self.lost else self.past[name][-1:]
        self.lost.discard(name)
        fitting = [content for content in possible if blocks(content) == found]
        assert fitting, f"{name} is in none of {len(possible)} states that it may be in"
        self.past[name] = [fitting[-1]]

    def close(self, name: str) -> None:
        if name in self.opened:
            self.pool.release_volume(self.opened.pop(name))
            self.past[name] = self.past[name][-1:]

    def some_snapshot(self, i: int) -> tuple[str, str] | None:
        found = [(v, s) for v in sorted(self.snapshots) for s in sorted(self.snapshots[v])]
        return found[i % len(found)] if found else None

    def change(self, name: str, first: int, content: Content) -> None:
        now = list(self.past[name][-1])
        now[first : first + len(content)] = content
        self.past[name].append(now)

    def check(self, name: str) -> None:
        engine = self.open(name)
        assert engine.read(0, BLOCKS * BLOCK) == blocks(self.past[name][-1])
        rows = self.pool.snapshots.describe(name)
        assert {row["snapshot"] for row in rows} == self.snapshots[name].keys()
        for snapshot, content in self.snapshots[name].items():
            opened = self.pool.open_snapshot(name, snapshot)
            try:
                assert opened._engine.read(0, BLOCKS * BLOCK) == blocks(content)  # type: ignore[attr-defined]
            finally:
                self.pool.release_volume(opened)

    # Steps

    @rule(i=index, where=ranges)
    def write(self, i: int, where: tuple[int, int]) -> None:
        name, first = self.volume(i), where[0]
        content = [next(self.stamps)] * min(where[1], BLOCKS - first)
        self.open(name).write(first * BLOCK, blocks(content, first))
        self.change(name, first, content)

    @rule(i=index, where=ranges, exact=st.booleans())
    def unmap(self, i: int, where: tuple[int, int], exact: bool) -> None:
        name, first = self.volume(i), where[0]
        count = min(where[1], BLOCKS - first)
        engine = self.open(name)
        (engine.write_zeroes if exact else engine.discard)(first * BLOCK, count * BLOCK)
        self.change(name, first, [0] * count)

    @rule(i=index)
    def flush(self, i: int) -> None:
        name = self.volume(i)
        self.open(name).flush()
        self.past[name] = self.past[name][-1:]

    @rule(i=index)
    def checkpoint(self, i: int) -> None:
        name = self.volume(i)
        self.open(name)
        self.opened[name].checkpoint()
        self.past[name] = self.past[name][-1:]

    @rule(i=index)
    def snapshot(self, i: int) -> None:
        name, snapshot = self.volume(i), f"s{next(self.stamps)}"
        self.open(name)
        self.pool.snapshots.create(name, snapshot)
        self.past[name] = self.past[name][-1:]
        self.snapshots[name][snapshot] = list(self.past[name][-1])

    @rule(i=index)
    def remove(self, i: int) -> None:
        if (found := self.some_snapshot(i)) is not None:
            try:
                self.pool.snapshots.remove(found[0], [found[1]])
            except BusyError:
                assert found in self.origins.values()
            else:
                assert found not in self.origins.values()
                del self.snapshots[found[0]][found[1]]

    @rule(i=index)
    def release(self, i: int) -> None:
        name = self.volume(i)
        self.open(name)
        self.pool.snapshots.release_next(self.pool.catalog.volume(name).uuid)

    @rule(i=index)
    def roll_back(self, i: int) -> None:
        if (found := self.some_snapshot(i)) is not None:
            self.open(found[0])
            self.close(found[0])
            self.pool.snapshots.rollback(*found)
            self.past[found[0]] = [list(self.snapshots[found[0]][found[1]])]

    @precondition(lambda self: len(self.past) < MAX_VOLUMES)
    @rule(i=index)
    def clone(self, i: int) -> None:
        if (found := self.some_snapshot(i)) is not None:
            self.open(found[0])
            name = f"c{next(self.stamps)}"
            self.pool.snapshots.clone(*found, name)
            self.past[name] = [list(self.snapshots[found[0]][found[1]])]
            self.snapshots[name], self.origins[name] = {}, found

    @rule(i=index)
    def flatten(self, i: int) -> None:
        name = self.volume(i)
        if self.origins[name] is not None:
            self.open(name)
            uuid = self.pool.catalog.volume(name).uuid
            if not self.pool.snapshots.flatten(uuid, lambda _done, _total: None):
                self.origins[name] = None
            self.past[name] = self.past[name][-1:]

    @rule(i=index)
    def difference(self, i: int) -> None:
        """Names every block that differs between the first two snapshots of a volume."""
        name = self.volume(i)
        if len(self.snapshots[name]) > 1:
            old, new = list(self.snapshots[name])[:2]
            page = self.pool.snapshots.difference(name, old, new)
            named = {
                at // BLOCK
                for offset, length, _ in page.ranges
                for at in range(offset, offset + length, BLOCK)
            }
            pairs = zip(self.snapshots[name][old], self.snapshots[name][new], strict=True)
            assert named >= {at for at, (a, b) in enumerate(pairs) if a != b}

    @rule(i=index)
    def look(self, i: int) -> None:
        self.check(self.volume(i))

    @rule(i=index)
    def reopen(self, i: int) -> None:
        self.close(self.volume(i))

    @rule()
    def daemon_dies(self) -> None:
        self.die()
        self.start()

    @rule()
    def power_fails(self) -> None:
        self.die()
        shutil.rmtree(self.path / "staging", ignore_errors=True)
        self.lost = set(self.past)
        self.start()


TestStorage = Storage.TestCase
TestStorage.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
