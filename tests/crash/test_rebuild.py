"""Maps and catalogs made again from segments: nothing is lost that the segments hold.

The pools are those of the second writer (`tests/unit/storage/poolwriter`), so that what the engine
makes of them is judged by plain dictionaries; and the independent reader looks for anything else.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random, SystemRandom

import pytest

from tests.unit.storage.poolwriter import BLOCK, PoolWriter, VolumeWriter, segment_file
from vhostd import _native
from vhostd.errors import BusyError, ExistsError
from vhostd.storage.check import CheckReport, check_device
from vhostd.storage.check.files import SegmentFiles
from vhostd.storage.check.report import CheckSummary
from vhostd.storage.check.tree import Forest, Root
from vhostd.storage.format import KIND_MAP, MapRun, NodeLocation, read_catalog
from vhostd.storage.rebuild import Report, rebuild_catalog, repair

Mapping = dict[int, tuple[int, int]]


@pytest.fixture
def random() -> Random:
    seed = int(os.environ.get("VHOSTD_TEST_SEED", SystemRandom().getrandbits(32)))
    print(f"VHOSTD_TEST_SEED={seed}")
    return Random(seed)


@contextmanager
def engine(directory: Path) -> Iterator[_native.Engine]:
    """An engine with a small map cache: maps are written out while they are made."""
    made = _native.Engine(
        workers=1, map_cache_bytes=1 << 20, staging_dir=str(directory / "staging")
    )
    try:
        yield made
    finally:
        made.shutdown()


class _Sink:
    def __init__(self) -> None:
        self.found: Mapping = {}

    def node(self, location: NodeLocation) -> None:
        pass

    def run(self, run: MapRun) -> None:
        for index in range(run.count):
            checksum = int.from_bytes(run.checksums[4 * index : 4 * index + 4], "little")
            address = run.segment << 13 | run.offset_blocks + index
            self.found[run.block + index] = (address, checksum)


def trees(directory: Path) -> dict[str, Mapping]:
    """What every root of the device maps, heads by `VOLUME` and snapshots by `VOLUME@SNAPSHOT`."""
    catalog = read_catalog(directory, in_use=False)
    rows = {s.number: s for v in catalog.volumes for s in v.segments if s.kind == KIND_MAP}
    files = SegmentFiles(directory, CheckSummary())
    found = {}
    for volume in catalog.volumes:
        roots = [Root(volume.name, volume.checkpoint.root if volume.checkpoint else b"")]
        roots += [Root(f"{volume.name}@{s.name}", s.root) for s in volume.snapshots if s.name]
        for root in roots:
            sink = _Sink()
            mapped, whole = Forest(files, rows).walk(root, sink)
            assert whole
            assert mapped == len(sink.found)
            found[root.reader] = sink.found
    files.close()
    return found


def expected(volumes: list[VolumeWriter]) -> dict[str, Mapping]:
    found = {volume.name: volume.mapping for volume in volumes}
    for volume in volumes:
        found |= {f"{volume.name}@{s.name}": s.mapping for s in volume.snapshots if s.name}
    return found


def shown(report: CheckReport) -> str:
    return "\n".join(f"{f.severity} {f.code} {f.text}" for f in report.findings)


def history(pool: PoolWriter, name: str, steps: int) -> VolumeWriter:
    """A volume with a past: snapshots taken, removed, gone back to; openings; unmaps."""
    random = pool.random
    volume = pool.volume(name)
    volume.note_state()
    spans = (300, 3000, 3000, 200_000)
    for step in range(steps):
        volume.churn(random.randint(1, 25), span_blocks=random.choice(spans))
        what = random.random()
        present = [s for s in volume.snapshots if s.name is not None]
        if what < 0.35 or not present:
            volume.snapshot(f"s{step}")
        elif what < 0.45:
            volume.checkpoint()
            volume.remove(random.choice([s for s in present if s.state == "present"] or present))
        elif what < 0.6:
            volume.rollback(random.choice(present))
            volume.snapshots = [s for s in volume.snapshots if s.name is not None]
        elif what < 0.75:
            volume.reopen()
        if random.random() < 0.4:
            volume.checkpoint()
    volume.churn(3)
    return volume


def clone_of(pool: PoolWriter, origin: VolumeWriter, name: str) -> VolumeWriter:
    origin.snapshot(f"for-{name}")
    origin.checkpoint()
    clone = pool.clone(origin.snapshots[-1], name)
    clone.churn(10, span_blocks=3000)
    clone.snapshot("own")
    clone.churn(10, span_blocks=3000)
    return clone


def family(pool: PoolWriter, steps: int) -> list[VolumeWriter]:
    root = history(pool, "root", steps)
    clone = clone_of(pool, root, "clone")
    grandchild = clone_of(pool, clone, "grandchild")
    root.churn(10)
    volumes = [root, clone, grandchild, history(pool, "other", steps)]
    for volume in volumes:
        volume.seal()
        volume.checkpoint()
    return volumes


def lose_catalog(directory: Path) -> None:
    for path in directory.glob("catalog.sqlite*"):
        path.unlink()


def map_segments(volumes: list[VolumeWriter]) -> list[Path]:
    return [segment_file(v.pool.directory, n) for v in volumes for n in v.map_rows]


def rebuild(pool: PoolWriter, tmp_path: Path, *, force: bool = False) -> Report:
    with engine(tmp_path.parent) as made:
        return rebuild_catalog(pool.directory, made, force=force)


@pytest.mark.parametrize("round_", range(4))
def test_catalog_and_maps_come_back_from_log_segments_alone(
    tmp_path: Path, random: Random, round_: int
) -> None:
    pool = PoolWriter(tmp_path, random)
    volumes = family(pool, 6 + 6 * round_)
    wanted = expected(volumes)
    pool.close()
    before = read_catalog(tmp_path, in_use=False)
    lose_catalog(tmp_path)
    for path in map_segments(volumes):
        path.unlink()
    report = rebuild(pool, tmp_path)
    assert report.ok, report
    assert trees(tmp_path) == wanted
    found = check_device(tmp_path, data=True)
    assert not [f for f in found.findings if f.severity == "error"], shown(found)
    after = read_catalog(tmp_path, in_use=False)
    for old, new in zip(before.volumes, after.volumes, strict=True):
        assert (new.uuid, new.name, new.size_bytes) == (old.uuid, old.name, old.size_bytes)
        assert (new.origin, new.parent, new.rollbacks) == (old.origin, old.parent, old.rollbacks)
        kept = [s for s in old.snapshots if s.name is not None]
        assert [(s.uuid, s.name, s.position, s.parent) for s in new.snapshots] == [
            (s.uuid, s.name, s.position, s.parent) for s in kept
        ]
        # What is dead is known again, too: all but what a removal under way still held.
        if len(kept) == len(old.snapshots):
            rows = {r.number: (r.live, r.dead) for r in new.segments if r.kind == 1}
            assert rows == {r.number: (r.live, r.dead) for r in old.segments if r.kind == 1}
    # And again: the same comes out.
    report = rebuild(pool, tmp_path, force=True)
    assert report.ok, report
    assert trees(tmp_path) == wanted


def test_dry_run_changes_nothing_and_tells_the_same(tmp_path: Path, random: Random) -> None:
    pool = PoolWriter(tmp_path, random)
    family(pool, 5)
    pool.close()
    lose_catalog(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    foreseen = rebuild_catalog(tmp_path, None)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    done = rebuild(pool, tmp_path)
    assert [v.snapshots for v in foreseen.volumes] == [v.snapshots for v in done.volumes]
    assert foreseen.actions == done.actions


def test_whole_catalog_is_not_replaced_and_a_pool_in_use_is_left_alone(
    tmp_path: Path, random: Random
) -> None:
    pool = PoolWriter(tmp_path, random)
    family(pool, 3)
    pool.close()
    with pytest.raises(ExistsError, match="--force"):
        rebuild(pool, tmp_path)
    with engine(tmp_path.parent) as other, engine(tmp_path.parent) as made:
        device = other.open_device(str(tmp_path))
        with pytest.raises(BusyError):
            rebuild_catalog(tmp_path, made, force=True)
        with pytest.raises(BusyError):
            repair(tmp_path, made)
        device.close()


def test_clone_without_its_origin_is_left_alone_and_told(tmp_path: Path, random: Random) -> None:
    pool = PoolWriter(tmp_path, random)
    volumes = family(pool, 3)
    pool.close()
    lose_catalog(tmp_path)
    root = volumes[0]
    for number in [s.number for s in root.segments] + list(root.map_rows):
        segment_file(tmp_path, number).unlink()
    report = rebuild(pool, tmp_path)
    failed = {v.name for v in report.volumes if v.failed}
    assert failed == {"clone", "grandchild"}
    assert not report.ok
    assert set(trees(tmp_path)) == {r for r in expected(volumes) if r.startswith("other")}
    assert all(segment_file(tmp_path, s.number).exists() for s in volumes[1].segments)


def test_log_that_ends_torn_is_rebuilt_up_to_there(tmp_path: Path, random: Random) -> None:
    pool = PoolWriter(tmp_path, random)
    volume = pool.volume("root")
    volume.churn(40)
    kept = dict(volume.mapping)
    torn = volume.append([(1, 4, True)])
    volume.churn(3)
    pool.close()
    lose_catalog(tmp_path)
    pool.write(torn.segment, (torn.offset + 2) * BLOCK, b"torn")
    report = rebuild(pool, tmp_path)
    assert report.ok, report
    assert trees(tmp_path) == {"root": kept}


def test_unmaps_of_removed_segments_keep_old_blocks_dead(tmp_path: Path, random: Random) -> None:
    pool = PoolWriter(tmp_path, random)
    volume = pool.volume("root")
    volume.append([(0, 20, True)])
    volume.reopen()
    gone = volume.append([(5, 10, False)])
    volume.reopen()
    snapshot = volume.snapshot("s")
    position = gone.segment << 13 | gone.offset + 1
    volume.note_unmaps([(5, 10, position)])
    volume.seal()
    volume.checkpoint()
    wanted = expected([volume])
    pool.close()
    lose_catalog(tmp_path)
    segment_file(tmp_path, gone.segment).unlink()
    report = rebuild(pool, tmp_path)
    assert report.ok, report
    assert trees(tmp_path) == wanted
    assert len(snapshot.mapping) == 10


# Random damage


def damage(path: Path, random: Random, share: float, first: int = 0) -> int:
    """Overwrites a share of the blocks of a file from block `first` on; how many."""
    count = 0
    size_blocks = -(-path.stat().st_size // BLOCK)
    with path.open("r+b") as file:
        for block in range(first, size_blocks):
            if random.random() < share:
                file.seek(block * BLOCK)
                file.write(random.randbytes(BLOCK))
                count += 1
    return count


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_damage_to_all_that_is_no_log_segment_loses_nothing(
    tmp_path: Path, random: Random, share: float
) -> None:
    pool = PoolWriter(tmp_path, random)
    volumes = family(pool, 10)
    wanted = expected(volumes)
    pool.close()
    paths = [tmp_path / "superblock", tmp_path / "catalog.sqlite", *map_segments(volumes)]
    total = sum(-(-path.stat().st_size // BLOCK) for path in paths)
    count = sum(damage(path, random, share) for path in paths)
    if share < 1:
        # At least one block of each kind.
        count += damage(random.choice(paths[2:]), random, 1.0, first=1)
    with engine(tmp_path.parent) as made:
        found, done = repair(tmp_path, made)
    assert trees(tmp_path) == wanted
    # Nothing tells whose a map segment was if its header is gone with the catalog.
    errors = [f for f in found.findings if f.severity == "error" and f.code != "segment-header"]
    assert not errors, shown(found)
    print(f"{count} of {total} blocks of metadata damaged, 0 blocks of {len(wanted)} roots lost")
    print("\n".join(done.actions))


@pytest.mark.parametrize("flips", [1, 2, 4, 10])
def test_flipped_bits_of_the_catalog_lose_nothing(
    tmp_path: Path, random: Random, flips: int
) -> None:
    pool = PoolWriter(tmp_path, random)
    volumes = family(pool, 5)
    wanted = expected(volumes)
    pool.close()
    path = tmp_path / "catalog.sqlite"
    content = bytearray(path.read_bytes())
    for _ in range(flips):
        # SQLite fills its pages from their end.
        page = random.randrange(len(content) // BLOCK) * BLOCK
        used = [at for at in range(page, page + BLOCK) if content[at]]
        if used:
            content[random.choice(used)] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    with engine(tmp_path.parent) as made:
        found, _ = repair(tmp_path, made)
    assert trees(tmp_path) == wanted
    assert not [f for f in found.findings if f.severity == "error"], shown(found)


def damage_logs(volumes: list[VolumeWriter], random: Random, share: float) -> set[tuple[int, int]]:
    """Overwrites a share of all blocks of log segments; which, as (segment, block)."""
    damaged = set()
    for volume in volumes:
        for segment in volume.segments:
            path = segment_file(volume.pool.directory, segment.number)
            whole = path.read_bytes()
            damage(path, random, share)
            new = path.read_bytes()
            damaged |= {
                (segment.number, at // BLOCK)
                for at in range(0, len(whole), BLOCK)
                if whole[at : at + BLOCK] != new[at : at + BLOCK]
            }
    return damaged


def told_as_damaged(report: CheckReport) -> set[tuple[str, int]]:
    """(reader, block) of all data that a check found damaged."""
    told: set[tuple[str, int]] = set()
    for finding in report.findings:
        if finding.code == "data-damaged":
            assert finding.volume_offset_bytes is not None
            assert finding.length_bytes is not None
            first = finding.volume_offset_bytes // BLOCK
            blocks = range(first, first + finding.length_bytes // BLOCK)
            told |= {(reader, block) for reader in finding.readers for block in blocks}
    return told


def hit(wanted: dict[str, Mapping], damaged: set[tuple[int, int]]) -> set[tuple[str, int]]:
    """(reader, block) of all data that lies in damaged blocks."""
    return {
        (reader, block)
        for reader, mapping in wanted.items()
        for block, (address, _) in mapping.items()
        if (address >> 13, address & 8191) in damaged
    }


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_damage_to_log_segments_costs_the_blocks_in_them_and_all_is_told(
    tmp_path: Path, random: Random, share: float
) -> None:
    pool = PoolWriter(tmp_path, random)
    volumes = family(pool, 12)
    wanted = expected(volumes)
    pool.close()
    written = sum(segment.end for volume in volumes for segment in volume.segments)
    damaged = damage_logs(volumes, random, share)
    with engine(tmp_path.parent) as made:
        _, done = repair(tmp_path, made)
    # Whatever a repair does, it does not forget what maps know of records that are lost.
    assert trees(tmp_path) == wanted
    lost = hit(wanted, damaged)
    found = check_device(tmp_path, data=True)
    # What readers read of clones is told with the volume whose segments it lies in.
    assert told_as_damaged(found) >= lost
    blocks = sum(map(len, wanted.values()))
    print(
        f"{len(damaged)} of {written} blocks of log segments damaged "
        f"({100 * len(damaged) / written:.1f} %): {len(lost)} of {blocks} blocks of all roots lost "
        f"({100 * len(lost) / blocks:.1f} %), all told; {len(done.actions)} repairs"
    )


@pytest.mark.parametrize("share", [0.002, 0.01])
def test_damage_to_log_segments_without_a_catalog_is_all_told(
    tmp_path: Path, random: Random, share: float
) -> None:
    pool = PoolWriter(tmp_path, random)
    volumes = family(pool, 12)
    wanted = expected(volumes)
    pool.close()
    lose_catalog(tmp_path)
    for path in map_segments(volumes):
        path.unlink()
    damaged = damage_logs(volumes, random, share)
    report = rebuild(pool, tmp_path)
    found = trees(tmp_path)
    told = told_as_damaged(check_device(tmp_path, data=True))
    same = {
        (reader, block)
        for reader, mapping in wanted.items()
        for block, place in mapping.items()
        if found.get(reader, {}).get(block) == place
    }
    lost = hit(wanted, damaged)
    assert told >= lost & same
    blocks = sum(map(len, wanted.values()))
    print(
        f"{len(damaged)} blocks of log segments damaged, catalog and maps gone: "
        f"{len(lost & same)} of {blocks} blocks lost with their data, {blocks - len(same)} with "
        "what records and notes said"
    )
    if len(same) < blocks:
        # A record and its footer, or a note, are lost: that is said in words.
        assert not report.ok, report


def test_repair_of_one_volume_leaves_the_others_as_they_are(tmp_path: Path, random: Random) -> None:
    pool = PoolWriter(tmp_path, random)
    volumes = family(pool, 6)
    wanted = expected(volumes)
    pool.close()
    other = volumes[3]
    victim = random.choice(list(other.map_rows))
    damage(segment_file(tmp_path, victim), random, 1.0)
    assert not check_device(tmp_path).ok
    kept = {p: p.read_bytes() for v in volumes[:3] for p in map_segments([v])}
    with engine(tmp_path.parent) as made:
        found, done = repair(tmp_path, made)
    assert [v.name for v in done.volumes] == ["other"]
    assert found.ok, shown(found)
    assert trees(tmp_path) == wanted
    assert {p: p.read_bytes() for p in kept} == kept
    assert not segment_file(tmp_path, victim).exists()
    # Nothing is left to do.
    with engine(tmp_path.parent) as made:
        assert repair(tmp_path, made)[1].actions == []


def test_wrong_counts_are_set_right_and_snapshots_kept(tmp_path: Path, random: Random) -> None:
    pool = PoolWriter(tmp_path, random)
    volumes = family(pool, 6)
    wanted = expected(volumes)
    pool.close()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as db:
        db.execute("UPDATE segments SET live = live + 1, dead = x'' WHERE kind = 1")
        db.execute("UPDATE snapshots SET mapped_blocks = mapped_blocks + 1")
    with engine(tmp_path.parent) as made:
        found, _ = repair(tmp_path, made)
    assert found.ok, shown(found)
    assert trees(tmp_path) == wanted


def test_catalog_older_than_the_device_is_rebuilt(tmp_path: Path, random: Random) -> None:
    pool = PoolWriter(tmp_path, random)
    volumes = family(pool, 4)
    pool.close()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as db:
        # As it was before the newest segments were made.
        oldest = min(s.number for s in volumes[3].segments)
        db.execute("UPDATE pool SET next_segment = ?", (oldest,))
        db.execute("DELETE FROM segments WHERE number >= ?", (oldest,))
    with engine(tmp_path.parent) as made:
        found, done = repair(tmp_path, made)
    assert done.kept
    assert found.ok, shown(found)
    assert trees(tmp_path) == expected(volumes)


@pytest.mark.long
@pytest.mark.parametrize("round_", range(40))
def test_many_histories_come_back_from_damage_to_anything_but_log_segments(
    tmp_path: Path, random: Random, round_: int
) -> None:
    pool = PoolWriter(tmp_path, random, segment_bytes=4 << 20)
    volumes = family(pool, 30)
    wanted = expected(volumes)
    pool.close()
    share = (0.01, 0.1, 0.5, 1.0)[round_ % 4]
    paths = [tmp_path / "superblock", tmp_path / "catalog.sqlite", *map_segments(volumes)]
    count = sum(damage(path, random, share) for path in paths)
    with engine(tmp_path.parent) as made:
        repair(tmp_path, made)
    assert trees(tmp_path) == wanted
    print(f"{count} blocks of metadata damaged, 0 blocks of {len(wanted)} roots lost")
    damaged = damage_logs(volumes, random, 0.02)
    lost = hit(wanted, damaged)
    assert told_as_damaged(check_device(tmp_path, data=True)) >= lost
    print(f"{len(damaged)} blocks of log segments damaged, {len(lost)} of all roots lost, all told")
