"""`check` of snapshots, clones, notes and dead sets: what holds, and how each lie is told."""

from __future__ import annotations

import os
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random, SystemRandom

import pytest

from tests.unit.storage.poolwriter import BLOCK, PoolWriter, VolumeWriter, segment_file
from vhostd.storage.check import CheckReport, Finding, check_device


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PoolWriter]:
    seed = int(os.environ.get("VHOSTD_TEST_SEED", SystemRandom().getrandbits(32)))
    print(f"VHOSTD_TEST_SEED={seed}")
    pool = PoolWriter(tmp_path, Random(seed))
    yield pool
    pool.close()


def shown(report: CheckReport) -> str:
    return "\n".join(f"{f.severity} {f.code} {f.text}" for f in report.findings)


def flip(pool: PoolWriter, segment: int, offset_bytes: int) -> None:
    with segment_file(pool.directory, segment).open("r+b") as file:
        file.seek(offset_bytes)
        byte = file.read(1)[0]
        file.seek(offset_bytes)
        file.write(bytes([byte ^ 8]))


def family(pool: PoolWriter) -> tuple[VolumeWriter, VolumeWriter]:
    """A volume with snapshots, one of them removed, one being removed; and a clone with its own."""
    root = pool.volume("root")
    root.append([(0, 32, True), (3000, 8, True)])
    root.churn(20, span_blocks=3000, leave=32)
    root.snapshot("base")
    root.churn(20, span_blocks=3000, leave=16)
    root.checkpoint()
    gone = root.snapshot("gone")
    root.append([(16, 8, True)])
    root.checkpoint()
    going = root.snapshot("going")
    root.churn(20, span_blocks=3000, leave=16)
    root.checkpoint()
    root.remove(gone)
    root.remove(going, begin_only=True)
    root.churn(10, span_blocks=3000, leave=16)
    root.reopen()
    root.note_state()
    root.checkpoint()
    clone = pool.clone(root.snapshots[0], "clone")
    clone.churn(20, span_blocks=3000, leave=16)
    clone.snapshot("own")
    clone.churn(10, span_blocks=3000, leave=16)
    clone.checkpoint()
    return root, clone


def test_snapshots_and_clones_are_healthy(pool: PoolWriter) -> None:
    root, clone = family(pool)
    report = check_device(pool.directory, data=True)
    assert shown(report) == ""
    found = {volume.name: volume for volume in report.volumes}
    assert (found["root"].snapshots, found["clone"].snapshots) == (2, 1)
    assert found["clone"].mapped_blocks == len(clone.mapping)
    assert found["root"].dead_blocks > 0
    # A rollback leaves the old head as a snapshot that is being removed.
    root.rollback(root.snapshots[0])
    root.churn(10, span_blocks=3000)
    root.checkpoint()
    report = check_device(pool.directory, data=True)
    assert shown(report) == ""
    assert report.volumes[-1].snapshots == 3


def test_pending_snapshot_and_one_behind_the_checkpoint_are_healthy(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    volume.churn(10)
    volume.checkpoint()
    volume.snapshot("known")
    volume.churn(5)
    assert shown(check_device(pool.directory)) == ""
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        # A crash came between the note and the row.
        db.execute("UPDATE volumes SET parent = NULL")
        db.execute("DELETE FROM snapshots")
    assert shown(check_device(pool.directory)) == ""


def test_punched_blocks_are_no_damage_and_live_ones_are(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    first = volume.append([(0, 8, True)])
    volume.append([(2, 4, True)])
    volume.seal()
    volume.checkpoint()
    at = (first.offset + 1) * BLOCK
    pool.write(first.segment, at + 2 * BLOCK, bytes(4 * BLOCK))
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        db.execute("UPDATE segments SET punched_blocks = 4 WHERE kind = 1")
    report = check_device(pool.directory, data=True)
    assert shown(report) == ""
    assert (report.volumes[0].dead_blocks, report.volumes[0].punched_blocks) == (4, 4)
    pool.write(first.segment, at + BLOCK, bytes(BLOCK))
    (finding,) = check_device(pool.directory, data=True).findings
    assert (finding.severity, finding.code) == ("error", "data-damaged")
    assert (finding.volume_offset_bytes, finding.length_bytes) == (BLOCK, BLOCK)


def test_damaged_data_is_told_with_everything_that_reads_it(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    record = volume.append([(0, 8, True)])
    volume.snapshot("one")
    volume.append([(0, 2, True)])
    volume.snapshot("two")
    volume.append([(2, 2, True)])
    volume.checkpoint()
    clone = pool.clone(volume.snapshots[1], "clone")
    clone.append([(4, 1, True)])
    clone.checkpoint()
    for block in range(6):
        flip(pool, record.segment, (record.offset + 1 + block) * BLOCK + 77)
    report = check_device(pool.directory, data=True)
    found = [
        (f.code, f.volume_offset_bytes, f.length_bytes, f.readers)
        for f in report.findings
        if f.volume == "root"
    ]
    assert found == [
        ("data-damaged", 0, 2 * BLOCK, ["root@one"]),
        ("data-damaged", 2 * BLOCK, 2 * BLOCK, ["root@one", "root@two", "clone"]),
        ("data-damaged", 4 * BLOCK, BLOCK, ["root", "root@one", "root@two"]),
        ("data-damaged", 5 * BLOCK, BLOCK, ["root", "root@one", "root@two", "clone"]),
    ]
    assert [v.name for v in report.volumes] == ["clone", "root"]


def test_damaged_node_is_told_with_everything_that_reads_below_it(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    volume.append([(0, 1, True), (1024, 1, True), (2048, 1, True)])
    volume.snapshot("one")
    volume.append([(0, 1, True)])
    volume.snapshot("two")
    volume.append([(1024, 1, True)])
    volume.checkpoint()
    (number,) = volume.map_rows
    # Of the second leaf: that of the snapshots, and the head's.
    leaves = sorted(
        struct.unpack_from("<I", location, 8)[0]
        for key, location in volume.known.items()
        if key[:2] == (0, 1)
    )
    assert len(leaves) == 2
    flip(pool, number, leaves[0] + 44)
    flip(pool, number, leaves[1] + 44)
    report = check_device(pool.directory)
    found = sorted((f.readers, f.volume_offset_bytes) for f in report.findings)
    assert found == [(["root"], 1024 * BLOCK), (["root@two", "root@one"], 1024 * BLOCK)]
    assert {f.code for f in report.findings} == {"map-node"}


def test_what_an_unfinished_removal_left_is_no_damage(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    volume.churn(10)
    volume.checkpoint()
    snapshot = volume.snapshot("going")
    volume.append([(0, 4096, False)])
    volume.churn(10)
    volume.checkpoint()
    volume.remove(snapshot, begin_only=True)
    volume.checkpoint()
    volume.snapshots.clear()
    kept = _rows(pool, "snapshots")
    # All that it held is dead and gone, and then the crash came.
    volume.checkpoint()
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        db.executemany("INSERT INTO snapshots VALUES (" + ", ".join("?" * 14) + ")", kept)
    report = check_device(pool.directory)
    assert shown(report) == ""


def _rows(pool: PoolWriter, table: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        return db.execute(f"SELECT * FROM {table}").fetchall()


def _log_segment_with_dead(pool: PoolWriter) -> tuple[int, int]:
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        number, dead = db.execute(
            "SELECT number, dead FROM segments WHERE kind = 1 AND length(dead) > 0 AND live > 0"
            " AND volume = (SELECT id FROM volumes WHERE name = 'root') LIMIT 1"
        ).fetchone()
    return number, int.from_bytes(dead, "little")


def _set_dead(pool: PoolWriter, number: int, dead: int, live: int) -> None:
    data = dead.to_bytes((dead.bit_length() + 7) // 8, "little")
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        db.execute(
            "UPDATE segments SET dead = ?, live = live + ? WHERE number = ?", (data, live, number)
        )


def kill_a_live_block(pool: PoolWriter, root: VolumeWriter) -> None:
    number, dead = _log_segment_with_dead(pool)
    base = root.snapshots[0].mapping
    address = next(a for a, _ in base.values() if a >> 13 == number)
    _set_dead(pool, number, dead | 1 << (address & 8191), -1)


def revive_a_dead_block(pool: PoolWriter, root: VolumeWriter) -> None:
    root.remove(next(s for s in root.snapshots if s.state == "removing"))
    root.checkpoint()
    number, dead = _log_segment_with_dead(pool)
    _set_dead(pool, number, dead & (dead - 1), 1)


def miscount(pool: PoolWriter, root: VolumeWriter) -> None:
    number, dead = _log_segment_with_dead(pool)
    _set_dead(pool, number, dead, -1)


def kill_the_header(pool: PoolWriter, root: VolumeWriter) -> None:
    number, dead = _log_segment_with_dead(pool)
    _set_dead(pool, number, dead | 1, 0)


def kill_a_node(pool: PoolWriter, root: VolumeWriter) -> None:
    location = root.snapshots[0].root
    assert location is not None
    number, at, length = struct.unpack_from("<QII", location)
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        dead = struct.pack("<II", at, length)
        db.execute("UPDATE segments SET dead = ? WHERE number = ?", (dead, number))


def sql(statement: str) -> Callable[[PoolWriter, VolumeWriter], None]:
    def change(pool: PoolWriter, root: VolumeWriter) -> None:
        with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
            assert db.execute(statement).rowcount > 0

    return change


def damage_the_last_note(pool: PoolWriter, root: VolumeWriter) -> None:
    record = next(r for s in reversed(root.segments) for r in reversed(s.records))
    flip(pool, record.segment, (record.offset + 1) * BLOCK + 40)


LIES: list[tuple[Callable[[PoolWriter, VolumeWriter], None], str, str]] = [
    (kill_a_live_block, "error", "dead-but-reached"),
    (revive_a_dead_block, "warning", "space-leaked"),
    (miscount, "error", "live-count-differs"),
    (kill_the_header, "error", "dead-set"),
    (kill_a_node, "error", "dead-but-reached"),
    (damage_the_last_note, "error", "note-damaged"),
    (
        sql("UPDATE segments SET punched_blocks = 8000 WHERE kind = 1"),
        "error",
        "punched-count-differs",
    ),
    (sql("UPDATE segments SET notes = 0 WHERE notes > 0"), "warning", "notes-not-counted"),
    (sql("UPDATE segments SET unmaps = 0 WHERE unmaps > 0"), "warning", "unmaps-not-counted"),
    (
        sql("UPDATE snapshots SET mapped_blocks = 1 WHERE name = 'base'"),
        "error",
        "mapped-blocks-differ",
    ),
    (sql("UPDATE snapshots SET root = x'00' WHERE name = 'base'"), "error", "map-root"),
    (
        sql("UPDATE snapshots SET position = position + 1 WHERE name = 'base'"),
        "error",
        "snapshot-differs",
    ),
    (
        sql("UPDATE snapshots SET name = 'renamed' WHERE name = 'base'"),
        "error",
        "snapshot-differs",
    ),
    (
        sql("UPDATE snapshots SET uuid = zeroblob(16) WHERE name = 'base'"),
        "error",
        "note-without-snapshot",
    ),
    (
        sql("UPDATE snapshots SET uuid = zeroblob(16) WHERE name = 'base'"),
        "warning",
        "snapshot-not-noted",
    ),
    (sql("UPDATE volumes SET name = 'toor' WHERE name = 'root'"), "error", "volume-differs"),
    (sql("UPDATE volumes SET size_bytes = 4096"), "error", "volume-differs"),
    (
        sql("INSERT INTO rollbacks SELECT id, 90000, 80000 FROM volumes"),
        "warning",
        "state-not-noted",
    ),
    (sql("UPDATE volumes SET origin = NULL"), "error", "map-address"),
]


@pytest.mark.parametrize(("lie", "severity", "code"), LIES)
def test_every_lie_of_the_catalog_is_told(
    pool: PoolWriter, lie: Callable[[PoolWriter, VolumeWriter], None], severity: str, code: str
) -> None:
    root, _ = family(pool)
    assert shown(check_device(pool.directory)) == ""
    lie(pool, root)
    report = check_device(pool.directory)

    def matches(finding: Finding) -> bool:
        return (finding.severity, finding.code) == (severity, code)

    assert any(map(matches, report.findings)), shown(report)


def test_clone_that_reads_what_is_dead_is_an_error(pool: PoolWriter) -> None:
    root, _ = family(pool)
    # The snapshot that the clone began with is removed behind its back.
    base = root.snapshots[0]
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        db.execute("UPDATE snapshots SET state = 'removing', name = NULL WHERE name = 'base'")
    base.state, base.name = "removing", None
    report = check_device(pool.directory)
    assert "clone-reaches-dead" in {finding.code for finding in report.findings}, shown(report)


def test_state_that_is_still_to_be_noted_is_not_missed(pool: PoolWriter) -> None:
    family(pool)
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        db.execute("UPDATE snapshots SET name = 'renamed' WHERE name = 'base'")
        db.execute("UPDATE volumes SET state_noted = 0")
    assert shown(check_device(pool.directory)) == ""
