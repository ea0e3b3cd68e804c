"""Snapshots, clones and rollbacks over an engine whose data are addresses.

The fake engine tells what is dead as the real one does, from what storage says of parents; here it
is held against what roots reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from tests.unit.storage.fake_engine import FakeVolume, Tree
from tests.unit.storage.test_pool import GIB, World
from vhostd.errors import BusyError, DeviceError, ExistsError, NotFoundError, UsageError
from vhostd.storage.snapshots import Snapshots


class Snapped(World):
    """A pool with a volume."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self.pool.create_volume("web", GIB)

    @property
    def snapshots(self) -> Snapshots:
        return self.pool.snapshots

    def uuid(self, volume: str = "web") -> UUID:
        return self.pool.catalog.volume(volume).uuid

    def open_web(self, name: str = "web") -> FakeVolume:
        volume = self.pool.open_volume(name)
        return self.engine_volume(volume.uuid)

    def close_web(self, name: str = "web") -> None:
        volume = self.pool.find_open(self.uuid(name))
        assert volume is not None
        self.pool.release_volume(volume)

    def content(self, volume: str, name: str | None = None) -> Tree:
        """What a snapshot, or the head of a closed volume, maps."""
        if name is not None:
            return self.device.store.read(self.snapshots.with_root(volume, name)[1])
        return self.device.store.read(self.pool.catalog.checkpoint(self.uuid(volume)).state["root"])

    def release_all(self, volume: str = "web") -> int:
        count = 0
        while self.snapshots.release_next(self.uuid(volume)) is not None:
            count += 1
        return count

    def check(self) -> None:
        """What the segments have as dead is just what no root reaches; volumes are closed."""
        catalog = self.pool.catalog
        reached: set[int] = set()
        for row in catalog.volumes():
            reached |= set(
                self.device.store.roots[catalog.checkpoint(row.uuid).state["root"]].values()
            )
            for snapshot in catalog.snapshots.of(row.uuid):
                reached |= set(self.device.store.roots[snapshot.root or b""].values())
        for row in catalog.volumes():
            for segment in catalog.segments(row.uuid):
                if segment["kind"] == 1:
                    number = segment["number"]
                    dead = int.from_bytes(segment["dead"], "little")
                    for address in self.device.store.owner:
                        if address >> 13 == number:
                            assert bool(dead >> (address & 8191) & 1) == (address not in reached)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Snapped]:
    world = Snapped(tmp_path)
    yield world
    world.engine.shutdown()


def test_snapshot_of_an_open_volume_is_pending_until_a_checkpoint_gives_it_a_root(
    world: Snapped,
) -> None:
    engine = world.open_web()
    engine.write(3)
    before = dict(engine.tree)
    row = world.snapshots.create("web", "a")
    assert (row.state, row.root) == ("pending", None)
    engine.put(0)
    assert world.content("web", "a") == before
    row = world.snapshots.find("web", "a")
    assert (row.state, row.mapped_blocks) == ("present", 3)


def test_snapshot_of_a_closed_volume_opens_and_closes_it(world: Snapped) -> None:
    row = world.snapshots.create("web", "a")
    assert world.pool.open_volumes() == []
    assert world.snapshots.find("web", "a").state == "present"
    assert world.pool.catalog.volume("web").parent == row.uuid


def test_pending_snapshot_survives_a_crash(world: Snapped) -> None:
    engine = world.open_web()
    engine.write(2)
    row = world.snapshots.create("web", "a")
    engine.write()
    world.crash()
    world.pool = world.open()
    assert world.snapshots.find("web", "a").state == "pending"
    world.open_web()
    world.close_web()
    assert world.snapshots.find("web", "a").uuid == row.uuid
    assert len(world.content("web", "a")) == 2
    world.check()


def test_snapshot_whose_row_was_lost_is_found_in_the_log(world: Snapped) -> None:
    engine = world.open_web()
    engine.write(2)
    engine.snapshot(uuid=b"u" * 16, name="lost", created_ns=5)
    engine.write()
    world.crash()
    world.pool = world.open()
    world.open_web()
    row = world.snapshots.find("web", "lost")
    assert (row.state, row.created_ns, row.uuid.bytes) == ("pending", 5, b"u" * 16)
    world.close_web()
    assert len(world.content("web", "lost")) == 2
    assert world.pool.catalog.volume("web").parent == row.uuid


def test_found_snapshot_whose_name_is_taken_gets_another(world: Snapped) -> None:
    world.snapshots.create("web", "other")
    engine = world.open_web()
    engine.snapshot(uuid=b"u" * 16, name="lost", created_ns=5)
    world.crash()
    world.pool = world.open()
    world.snapshots.rename("web", "other", "lost")
    world.open_web()
    names = [s["snapshot"] for s in world.snapshots.describe("web")]
    assert names == ["lost", "lost-75757575"]


def test_snapshot_that_failed_behind_its_note_is_cleaned_up(world: Snapped) -> None:
    engine = world.open_web()
    engine.write(2)
    engine.fail_snapshot = DeviceError("the flush failed")
    with pytest.raises(DeviceError):
        world.snapshots.create("web", "a")
    engine._freeze(b"u" * 16, engine.segment << 13 | engine.end - 1)
    engine.put(0)
    world.close_web()
    assert world.snapshots.describe("web") == []
    assert world.release_all() == 1
    world.check()


def test_names_are_unique_and_checked_before_anything_is_written(world: Snapped) -> None:
    world.snapshots.create("web", "a")
    epoch = world.pool.catalog.volume("web").epoch
    with pytest.raises(ExistsError, match="fast/web@a exists"):
        world.snapshots.create("web", "a")
    with pytest.raises(UsageError, match="a@b"):
        world.snapshots.create("web", "a@b")
    assert world.pool.catalog.volume("web").epoch == epoch


def test_more_than_the_engine_can_hold_pending_makes_checkpoints(world: Snapped) -> None:
    world.open_web()
    for number in range(150):
        world.snapshots.create("web", f"s{number}")
    states = [s["state"] for s in world.snapshots.describe("web")]
    assert states.count("present") >= 86


def test_removal_frees_just_what_the_snapshot_alone_held(world: Snapped) -> None:
    engine = world.open_web()
    engine.write(10)
    world.snapshots.create("web", "a")
    first = {engine.tree[0]}
    engine.put(0)
    world.snapshots.create("web", "b")
    second = {engine.tree[0], engine.tree[1]}
    engine.put(0)
    engine.put(1)
    world.snapshots.create("web", "c")
    world.snapshots.remove("web", ["b"])
    assert [s["snapshot"] for s in world.snapshots.describe("web")] == ["a", "c"]
    assert world.release_all() == 1
    assert engine.dead == second - {
        engine._store.roots[world.snapshots.with_root("web", "a")[1]][1]
    }
    world.snapshots.remove("web", ["a"])
    world.release_all()
    assert engine.dead == first | second
    world.close_web()
    world.check()


def test_head_stops_holding_what_only_a_removed_parent_held(world: Snapped) -> None:
    engine = world.open_web()
    engine.write(4)
    world.snapshots.create("web", "a")
    engine.put(0)
    world.snapshots.remove("web", ["a"])
    world.release_all()
    old = engine.tree[1]
    engine.put(1)
    assert old in engine.dead
    world.close_web()
    world.check()


def test_snapshot_taken_while_another_is_released_keeps_its_data(
    world: Snapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = world.open_web()
    engine.write(4)
    world.snapshots.create("web", "a")
    volume = world.pool.find_open(world.uuid())
    assert volume is not None
    world.snapshots.remove("web", ["a"])
    leave = volume.leave

    def then_snapshot(snapshot: UUID) -> None:
        # Between the head's leaving and the checkpoint: a snapshot, and what it has is replaced.
        leave(snapshot)
        world.snapshots.create("web", "b")
        engine.put(0)

    world_content = dict(engine.tree)
    with monkeypatch.context() as patch:
        patch.setattr(volume, "leave", then_snapshot)
        assert world.snapshots.release_next(world.uuid()) is not None
    assert world.content("web", "b") == world_content
    world.close_web()
    world.check()


@pytest.mark.parametrize("step", ["leave", "checkpoint", "release_exclusive"])
def test_interrupted_removal_is_done_again_from_the_beginning(
    world: Snapped, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    engine = world.open_web()
    engine.write(4)
    world.snapshots.create("web", "a")
    engine.put(0)
    world.pool.find_open(world.uuid()).checkpoint()  # type: ignore[union-attr]
    world.snapshots.remove("web", ["a"])
    volume = world.pool.find_open(world.uuid())
    owner = world.engine if step == "release_exclusive" else volume
    real = getattr(owner, step)

    def once(*arguments: object, **more: object) -> None:
        real(*arguments, **more)
        raise DeviceError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, once)
        with pytest.raises(DeviceError):
            world.snapshots.release_next(world.uuid())
    engine.put(1)
    world.crash()
    world.pool = world.open()
    assert world.pool.catalog.snapshots.removing() == [("web", world.uuid())]
    assert world.release_all() == 1
    world.check()
    assert world.pool.catalog.snapshots.removing() == []


def test_protected_cloned_and_open_snapshots_are_not_removed(world: Snapped) -> None:
    for name in ("a", "b", "c"):
        world.snapshots.create("web", name)
    world.snapshots.protect("web", "a", True)
    world.snapshots.clone("web", "b", "copy")
    opened = world.pool.open_snapshot("web", "c")
    for name, reason in (("a", "protected"), ("b", "fast/copy"), ("c", "in use")):
        with pytest.raises(BusyError, match=reason):
            world.snapshots.remove("web", [name])
    with pytest.raises(BusyError):
        world.snapshots.remove("web", None)
    assert len(world.snapshots.describe("web")) == 3
    world.snapshots.protect("web", "a", False)
    world.pool.remove_volume("copy")
    world.pool.release_volume(opened)
    assert world.snapshots.remove("web", None) == ["a", "b", "c"]
    assert world.release_all() == 3


def test_volume_with_snapshots_or_clones_is_removed_only_when_that_is_meant(
    world: Snapped,
) -> None:
    world.snapshots.create("web", "a")
    world.snapshots.clone("web", "a", "copy")
    for with_snapshots in (False, True):
        with pytest.raises(BusyError, match="fast/copy"):
            world.pool.remove_volume("web", with_snapshots=with_snapshots)
    world.pool.remove_volume("copy")
    with pytest.raises(BusyError, match="--snapshots"):
        world.pool.remove_volume("web")
    world.pool.remove_volume("web", with_snapshots=True)
    assert world.device.list_segments() == []


def test_rollback_gives_content_and_size_back_and_keeps_all_snapshots(world: Snapped) -> None:
    engine = world.open_web()
    engine.write(4)
    world.snapshots.create("web", "a")
    engine.put(0)
    world.snapshots.create("web", "b")
    engine.put(1)
    world.pool.resize_volume("web", 2 * GIB)
    with pytest.raises(BusyError, match="attached"):
        world.snapshots.rollback("web", "a")
    world.close_web()
    world.snapshots.rollback("web", "a")
    assert world.content("web") == world.content("web", "a")
    assert world.pool.catalog.volume("web").size_bytes == GIB
    assert [s["snapshot"] for s in world.snapshots.describe("web")] == ["a", "b"]
    assert len(world.snapshots.describe("web", removing=True)) == 3
    assert world.release_all() == 1
    world.check()
    engine = world.open_web()
    engine.put(2)
    world.close_web()
    world.check()


def test_snapshot_between_two_lines_keeps_its_space_until_one_is_left(world: Snapped) -> None:
    engine = world.open_web()
    engine.write(4)
    world.snapshots.create("web", "a")
    engine.put(0)
    world.snapshots.create("web", "b")
    world.close_web()
    world.snapshots.rollback("web", "a")
    engine = world.open_web()
    engine.put(1)
    world.snapshots.remove("web", ["a"])
    world.release_all()
    assert [s["state"] for s in world.snapshots.describe("web", removing=True)] == [
        "removing",
        "present",
    ]
    world.snapshots.remove("web", ["b"])
    assert world.release_all() == 2
    world.close_web()
    world.check()


def test_rollback_is_told_in_the_state_note(world: Snapped) -> None:
    world.open_web().write(2)
    row = world.snapshots.create("web", "a")
    world.close_web()
    world.snapshots.rollback("web", "a")
    note = world.device.store.notes[world.uuid().bytes]
    [rollback] = note["rollbacks"]
    assert rollback["to"] == row.position < rollback["position"]
    assert [s["name"] for s in note["snapshots"]] == ["a"]
    assert world.pool.catalog.volume("web").state_noted


def test_rollbacks_that_nothing_needs_any_more_are_forgotten(world: Snapped) -> None:
    world.open_web().write(2)
    world.snapshots.create("web", "a")
    world.close_web()
    for _ in range(5):
        world.open_web().write(1)
        world.close_web()
        world.snapshots.rollback("web", "a")
    assert len(world.pool.catalog.snapshots.rollbacks(world.uuid())) == 1
    world.open_web().write(1)
    world.snapshots.create("web", "b")
    world.close_web()
    world.snapshots.rollback("web", "a")
    assert len(world.pool.catalog.snapshots.rollbacks(world.uuid())) == 2
    world.release_all()
    world.check()


def test_change_that_was_not_noted_is_noted_at_the_next_opening(world: Snapped) -> None:
    world.snapshots.create("web", "a")
    world.snapshots.rename("web", "a", "b")
    assert not world.pool.catalog.volume("web").state_noted
    world.open_web()
    assert world.pool.catalog.volume("web").state_noted
    assert world.device.store.notes[world.uuid().bytes]["snapshots"][0]["name"] == "b"
    world.snapshots.protect("web", "b", True)
    assert world.device.store.notes[world.uuid().bytes]["snapshots"][0]["protected"]


def test_clone_is_made_at_once_and_its_writes_are_its_own(world: Snapped) -> None:
    world.open_web().write(4)
    world.snapshots.create("web", "a")
    row = world.snapshots.clone("web", "a", "copy")
    assert (row.size_bytes, row.origin) == (GIB, world.snapshots.find("web", "a").uuid)
    engine = world.open_web("copy")
    assert engine.opened["clone"]
    before = world.content("web", "a")
    assert engine.tree == before
    engine.put(0)
    world.snapshots.create("copy", "x")
    world.snapshots.clone("copy", "x", "copy2")
    assert world.snapshots.clones("web") == [{"name": "fast/copy", "origin": "fast/web@a"}]
    assert world.content("web", "a") == before
    world.close_web("copy")
    world.close_web()
    assert world.content("copy2") == world.content("copy", "x") != before
    world.check()


def test_flattened_clone_needs_its_origin_no_more(world: Snapped) -> None:
    world.open_web().write(9)
    world.snapshots.create("web", "a")
    world.close_web()
    world.snapshots.clone("web", "a", "copy")
    world.snapshots.create("copy", "x")
    uuid = world.uuid("copy")
    steps: list[tuple[int, int]] = []
    assert world.snapshots.flatten(uuid, lambda *step: steps.append(step)) == ["fast/copy@x"]
    assert steps[-1] == (9 * 4096, 9 * 4096)
    world.snapshots.create("copy", "later")
    world.snapshots.remove("copy", ["x"])
    world.release_all("copy")
    with pytest.raises(BusyError, match="clones"):
        world.snapshots.remove("web", ["a"])
    assert world.snapshots.flatten(uuid, lambda *step: None) == []
    assert world.pool.catalog.volume("copy").origin is None
    with pytest.raises(UsageError, match="no clone"):
        world.snapshots.check_clone("copy")
    world.snapshots.remove("web", ["a"])
    world.release_all()
    world.check()


def test_flatten_that_was_stopped_goes_on_where_it_was(world: Snapped) -> None:
    world.open_web().write(9)
    world.snapshots.create("web", "a")
    world.snapshots.clone("web", "a", "copy")

    def stop(done: int, total: int) -> None:
        raise BusyError("stopped")

    with pytest.raises(BusyError):
        world.snapshots.flatten(world.uuid("copy"), stop)
    assert world.pool.catalog.volume("copy").origin is not None
    assert world.snapshots.flatten(world.uuid("copy"), lambda *step: None) == []


def test_difference_tells_what_changed_in_pages(world: Snapped) -> None:
    engine = world.open_web()
    engine.write(10)
    world.snapshots.create("web", "a")
    engine.put(2)
    engine.drop(5)
    engine.put(8)
    world.snapshots.create("web", "b")
    engine.put(9)
    page = world.snapshots.difference("web", "a", "b", limit=2)
    assert page.ranges == [(2 * 4096, 4096, True), (5 * 4096, 4096, False)]
    assert page.next == 8 * 4096
    rest = world.snapshots.difference("web", "a", "b", start=page.next)
    assert (rest.ranges, rest.next) == ([(8 * 4096, 4096, True)], None)
    assert world.snapshots.difference("web", "b", None).ranges == [(9 * 4096, 4096, True)]


def test_snapshot_is_open_once_for_all_its_readers(world: Snapped) -> None:
    world.open_web().write(2)
    world.snapshots.create("web", "a")
    first, second = (world.pool.open_snapshot("web", "a") for _ in range(2))
    assert first is second
    engine = world.engine_volume(first.uuid)
    assert engine.opened["read_only"]
    with pytest.raises(UsageError, match="clone"):
        first.export(export_id=1, queues=1, read_only=False)
    world.pool.release_volume(first)
    assert ("close",) not in engine.calls
    world.pool.release_volume(second)
    assert ("close",) in engine.calls
    with pytest.raises(NotFoundError, match="fast/web@no"):
        world.pool.open_snapshot("web", "no")
