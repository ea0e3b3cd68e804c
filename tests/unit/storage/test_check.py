"""`check`: a healthy pool has no findings, every damage has one, and nothing is ever written."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random, SystemRandom

import msgspec
import pytest

from tests.unit.storage.poolwriter import BLOCK, PoolWriter, VolumeWriter, segment_file, summed
from vhostd.errors import NotFoundError
from vhostd.storage.check import CheckReport, check_device, device
from vhostd.storage.format import read_catalog


@pytest.fixture
def random() -> Random:
    seed = int(os.environ.get("VHOSTD_TEST_SEED", SystemRandom().getrandbits(32)))
    print(f"VHOSTD_TEST_SEED={seed}")
    return Random(seed)


@pytest.fixture
def pool(tmp_path: Path, random: Random) -> Iterator[PoolWriter]:
    pool = PoolWriter(tmp_path, random)
    yield pool
    pool.close()


def closed_volume(pool: PoolWriter, name: str = "root") -> VolumeWriter:
    """Three epochs, sealed and checkpointed; segments have died in between."""
    volume = pool.volume(name)
    volume.append([(0, 64, True), (64, 8, False), (2000, 16, True)])
    volume.churn(60, span_blocks=300, leave=64)
    volume.checkpoint()
    volume.reopen()
    volume.churn(60, span_blocks=300, leave=64)
    volume.checkpoint()
    volume.reopen()
    volume.churn(30)
    volume.seal()
    volume.checkpoint()
    return volume


def codes(report: CheckReport) -> list[str]:
    return [finding.code for finding in report.findings]


def shown(report: CheckReport) -> str:
    return "\n".join(f"{f.severity} {f.code} {f.text}" for f in report.findings)


def fingerprint(directory: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, offset_bytes: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset_bytes)
        byte = file.read(1)[0]
        file.seek(offset_bytes)
        file.write(bytes([byte ^ 1 << bit]))


# Healthy pools


@pytest.mark.parametrize("data", [False, True])
def test_healthy_pool_has_no_findings_and_is_not_touched(pool: PoolWriter, data: bool) -> None:
    volumes = [closed_volume(pool, "root"), closed_volume(pool, "scratch")]
    pool.close()
    before = fingerprint(pool.directory)
    report = check_device(pool.directory, data=data)
    assert shown(report) == ""
    assert report.ok
    assert not report.live
    assert fingerprint(pool.directory) == before
    assert [v.name for v in report.volumes] == ["root", "scratch"]
    for volume, found in zip(volumes, report.volumes, strict=True):
        assert found.mapped_blocks == len(volume.mapping)
        assert found.records == sum(len(s.records) for s in volume.segments)
        assert found.log_segments == len(volume.segments)
        assert found.replayable_records == 0
    written = sum(len(r.checksums) for v in volumes for s in v.segments for r in s.records)
    assert report.summary.blocks == written
    assert report.summary.data_blocks_read == (written if data else 0)
    assert (report.pool, report.pool_uuid) == ("fast", str(pool.uuid))


def test_pool_after_a_crash_is_healthy_and_tells_what_will_be_replayed(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    volume.churn(50)
    volume.checkpoint()
    volume.churn(70)
    newer = volume.sequence - 50
    assert not volume.segments[-1].sealed
    # The catalog is open: it has a write-ahead log, and no daemon holds the lock.
    assert (pool.directory / "catalog.sqlite-wal").stat().st_size > 0
    before = set(fingerprint(pool.directory))
    report = check_device(pool.directory)
    assert shown(report) == ""
    assert report.volumes[0].replayable_records == newer
    assert set(fingerprint(pool.directory)) == before


def test_volume_without_checkpoint_and_empty_volume_are_healthy(pool: PoolWriter) -> None:
    pool.volume("empty")
    pool.volume("new").churn(20)
    report = check_device(pool.directory)
    assert shown(report) == ""
    assert [v.replayable_records for v in report.volumes] == [0, 20]


def test_only_the_named_volume_is_looked_at(pool: PoolWriter) -> None:
    closed_volume(pool, "root")
    other = closed_volume(pool, "other")
    flip(segment_file(pool.directory, other.segments[0].number), 100, 3)
    assert check_device(pool.directory, volume="root").ok
    report = check_device(pool.directory, volume="other")
    assert not report.ok
    assert {finding.volume for finding in report.findings} == {"other"}
    with pytest.raises(NotFoundError, match="volume none does not exist in pool fast"):
        check_device(pool.directory, volume="none")


def test_what_is_no_pool_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no device of a pool"):
        check_device(tmp_path)


def test_report_is_json(pool: PoolWriter) -> None:
    volume = closed_volume(pool)
    flip(segment_file(pool.directory, volume.segments[0].number), 100, 3)
    report = check_device(pool.directory)
    decoded = msgspec.json.decode(msgspec.json.encode(report), type=CheckReport)
    assert decoded == report


def test_progress_ends_at_its_total(pool: PoolWriter) -> None:
    closed_volume(pool)
    calls: list[tuple[int, int]] = []
    check_device(pool.directory, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)


# A pool in use


def test_pool_in_use_is_checked_without_the_lock(pool: PoolWriter) -> None:
    volume = closed_volume(pool)
    with (pool.directory / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = check_device(pool.directory)
        assert report.live
        assert shown(report) == ""
        flip(segment_file(pool.directory, volume.segments[0].number), BLOCK + 9, 0)
        assert codes(check_device(pool.directory)) == ["record-damaged"]


def test_findings_of_a_state_that_is_over_are_not_reported(
    pool: PoolWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = pool.volume("root")
    volume.churn(40)
    volume.checkpoint()
    real = read_catalog
    reads = 0

    def read_then_move_on(directory: Path, *, in_use: bool) -> object:
        """The daemon commits the next checkpoint, and removes files, right after the first look."""
        nonlocal reads
        reads += 1
        catalog = real(directory, in_use=in_use)
        if reads == 1:
            volume.append([(0, 4096, False)])
            volume.churn(5)
            volume.checkpoint()
        return catalog

    monkeypatch.setattr(device, "read_catalog", read_then_move_on)
    with (pool.directory / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        report = check_device(pool.directory)
    assert reads > 1
    assert not [f for f in report.findings if f.severity != "note"], shown(report)


# Damage


def regions(pool: PoolWriter, volume: VolumeWriter) -> dict[str, list[tuple[Path, int, int]]]:
    """(file, first byte, length) of every structure in the pool."""
    found: dict[str, list[tuple[Path, int, int]]] = {
        "superblock": [(pool.directory / "superblock", 0, BLOCK)]
    }

    def add(name: str, number: int, first: int, length: int) -> None:
        place = (segment_file(pool.directory, number), first, length)
        found.setdefault(name, []).append(place)

    for segment in volume.segments:
        add("log header", segment.number, 0, BLOCK)
        body = struct.unpack_from(
            "<II",
            segment_file(pool.directory, segment.number).read_bytes(),
            pool.segment_bytes - BLOCK + 88,
        )
        add("footer body", segment.number, *body)
        add("trailer", segment.number, pool.segment_bytes - BLOCK, BLOCK)
        for record in segment.records:
            add("record", segment.number, record.offset * BLOCK, BLOCK)
            if record.checksums:
                start = (record.offset + 1) * BLOCK
                add("data", segment.number, start, BLOCK * len(record.checksums))
    for number, row in volume.map_rows.items():
        add("map header", number, 0, BLOCK)
        add("nodes", number, BLOCK, sum(length for _, length in row.nodes))
    return found


STRUCTURES = (
    "superblock",
    "log header",
    "record",
    "data",
    "footer body",
    "trailer",
    "map header",
    "nodes",
)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_flipped_bit_is_found(pool: PoolWriter, structure: str) -> None:
    volume = closed_volume(pool)
    pool.close()
    places = regions(pool, volume)[structure]
    for _ in range(25):
        path, first, length = pool.random.choice(places)
        at, bit = first + pool.random.randrange(length), pool.random.randrange(8)
        flip(path, at, bit)
        report = check_device(pool.directory, data=True)
        assert report.errors + report.warnings, f"bit {bit} of byte {at} of {path}"
        if structure != "data":
            assert report.errors, f"bit {bit} of byte {at} of {path}: {shown(report)}"
        flip(path, at, bit)
    assert check_device(pool.directory, data=True).ok


def test_damaged_data_is_an_error_where_it_is_read_and_a_warning_where_it_is_dead(
    pool: PoolWriter,
) -> None:
    volume = pool.volume("root")
    dead = volume.append([(10, 4, True), (100, 1, True)])
    live = volume.append([(10, 4, True)])
    volume.seal()
    volume.checkpoint()
    path = segment_file(pool.directory, dead.segment)
    flip(path, (dead.offset + 2) * BLOCK, 0)
    flip(path, (dead.offset + 3) * BLOCK, 0)
    flip(path, (live.offset + 1) * BLOCK, 0)
    assert shown(check_device(pool.directory)) == ""
    report = check_device(pool.directory, data=True)
    found = [
        (f.severity, f.code, f.volume_offset_bytes, f.length_bytes, f.segment)
        for f in report.findings
    ]
    assert found == [
        ("warning", "dead-data-damaged", 11 * BLOCK, 2 * BLOCK, dead.segment),
        ("error", "data-damaged", 10 * BLOCK, BLOCK, live.segment),
    ]


Damage = Callable[[PoolWriter, VolumeWriter], None]


def catalog(sql: str, *values: object) -> Damage:
    def change(pool: PoolWriter, volume: VolumeWriter) -> None:
        with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
            assert db.execute(sql, values).rowcount > 0

    return change


def lose_first_segment(pool: PoolWriter, volume: VolumeWriter) -> None:
    segment_file(pool.directory, volume.segments[0].number).unlink()


def lose_map_segment(pool: PoolWriter, volume: VolumeWriter) -> None:
    segment_file(pool.directory, next(iter(volume.map_rows))).unlink()


def cut_last_segment(pool: PoolWriter, volume: VolumeWriter) -> None:
    os.truncate(segment_file(pool.directory, volume.segments[-1].number), 2 * BLOCK)


def exchange_segments(pool: PoolWriter, volume: VolumeWriter) -> None:
    first, second = (segment_file(pool.directory, s.number) for s in volume.segments[:2])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def lie_in_the_map(pool: PoolWriter, volume: VolumeWriter) -> None:
    """Two live blocks change places, with checksums right all the way up to the catalog."""
    a, b = pool.random.sample(sorted(volume.mapping), 2)
    volume.mapping[a], volume.mapping[b] = volume.mapping[b], volume.mapping[a]
    volume.checkpoint()


def lie_about_a_checksum(pool: PoolWriter, volume: VolumeWriter) -> None:
    block = pool.random.choice(sorted(volume.mapping))
    address, checksum = volume.mapping[block]
    volume.mapping[block] = (address, checksum ^ 1 << pool.random.randrange(32))
    volume.checkpoint()


def map_twice(pool: PoolWriter, volume: VolumeWriter) -> None:
    volume.mapping[3000 << 5] = volume.mapping[0]
    volume.size_bytes = 1 << 40
    volume.checkpoint()


def map_to_a_header(pool: PoolWriter, volume: VolumeWriter) -> None:
    segment = volume.segments[-1]
    volume.mapping[1] = (segment.number << 13 | segment.records[0].offset, 7)
    volume.checkpoint()


def map_beyond_the_used_end(pool: PoolWriter, volume: VolumeWriter) -> None:
    segment = volume.segments[-1]
    volume.mapping[1] = (segment.number << 13 | segment.end + 3, 7)
    volume.checkpoint()


def map_to_an_unknown_segment(pool: PoolWriter, volume: VolumeWriter) -> None:
    volume.mapping[1] = (60_000 << 13 | 3, 7)
    volume.checkpoint()


def foreign_superblock(pool: PoolWriter, volume: VolumeWriter) -> None:
    path = pool.directory / "superblock"
    block = bytearray(path.read_bytes())
    block[8:24] = bytes(range(16))
    summed(block, 56)
    path.write_bytes(block)


DAMAGES: list[tuple[Damage, set[str]]] = [
    (lose_first_segment, {"segment-missing"}),
    (lose_map_segment, {"segment-missing", "map-node"}),
    (cut_last_segment, {"file-short"}),
    (exchange_segments, {"segment-header"}),
    (lie_in_the_map, {"map-differs"}),
    (lie_about_a_checksum, {"map-differs"}),
    (map_twice, {"map-differs"}),
    (map_to_a_header, {"map-differs"}),
    (map_beyond_the_used_end, {"map-differs"}),
    (map_to_an_unknown_segment, {"map-address"}),
    (foreign_superblock, {"superblock-differs"}),
    (catalog("UPDATE checkpoints SET mapped_blocks = mapped_blocks + 1"), {"mapped-blocks-differ"}),
    (catalog("UPDATE segments SET live = live - 1 WHERE live > 0"), {"live-count-differs"}),
    (catalog("UPDATE segments SET used_blocks = used_blocks + 1"), {"records-missing"}),
    (catalog("UPDATE segments SET used_blocks = 2 WHERE kind = 2"), {"map-node"}),
    (catalog("UPDATE checkpoints SET root = x''"), {"mapped-blocks-differ"}),
    (catalog("UPDATE checkpoints SET root = x'00'"), {"map-root"}),
    (catalog("UPDATE checkpoints SET root = zeroblob(20)"), {"map-root"}),
    (catalog("UPDATE checkpoints SET sequence = sequence + 1"), {"checkpoint-record-missing"}),
    (catalog("UPDATE checkpoints SET record_checksum = 1"), {"checkpoint-record-differs"}),
    (catalog("UPDATE checkpoints SET end_block = end_block - 1"), {"checkpoint-record-differs"}),
    (catalog("UPDATE volumes SET epoch = epoch - 1"), {"segment-header"}),
    (catalog("UPDATE pool SET uuid = zeroblob(16)"), {"superblock-differs", "segment-header"}),
    (catalog("UPDATE devices SET uuid = zeroblob(16)"), {"superblock-differs"}),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_damage_is_told_by_its_name(pool: PoolWriter, damage: Damage, expected: set[str]) -> None:
    volume = closed_volume(pool)
    damage(pool, volume)
    report = check_device(pool.directory)
    errors = {finding.code for finding in report.findings if finding.severity == "error"}
    assert expected <= errors, shown(report)
    assert not report.ok
    assert all(finding.action for finding in report.findings)


def test_map_that_differs_is_told_block_by_block(pool: PoolWriter) -> None:
    volume = closed_volume(pool)
    address, checksum = volume.mapping[7]
    volume.mapping[7] = (address, checksum ^ 1)
    volume.checkpoint()
    (finding,) = check_device(pool.directory).findings
    assert finding.code == "map-differs"
    assert finding.segment == address >> 13
    assert finding.offset_bytes == (address & 8191) * BLOCK
    assert finding.volume_offset_bytes == 7 * BLOCK
    assert finding.volume == "root"


def test_damage_before_a_sealed_segment_is_no_torn_end(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    volume.churn(10)
    volume.checkpoint()
    volume.reopen()
    volume.churn(10)
    lost = volume.segments[-1]
    volume.reopen()
    volume.churn(10)
    segment_file(pool.directory, lost.number).unlink()
    report = check_device(pool.directory)
    (finding,) = report.findings
    assert (finding.severity, finding.code) == ("error", "log-gap")
    assert "records 11 to 20 of the log are missing" in finding.text


def test_torn_end_of_the_log_is_a_warning(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    volume.churn(10)
    volume.checkpoint()
    volume.append([(5, 3, True)])
    last = volume.append([(5, 3, True)])
    flip(segment_file(pool.directory, last.segment), (last.offset + 2) * BLOCK, 1)
    report = check_device(pool.directory)
    assert [(f.severity, f.code) for f in report.findings] == [("warning", "torn-record")]
    assert report.volumes[0].replayable_records == 1


def test_record_lost_before_others_is_told_from_a_torn_end(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    volume.churn(10)
    volume.checkpoint()
    first = volume.append([(5, 3, True)])
    volume.append([(5, 3, True)])
    flip(segment_file(pool.directory, first.segment), first.offset * BLOCK + 50, 1)
    report = check_device(pool.directory)
    assert "log-ends-early" in codes(report)
    assert report.volumes[0].replayable_records == 0


def test_record_that_a_later_one_says_was_durable_is_damaged(pool: PoolWriter) -> None:
    volume = pool.volume("root")
    volume.churn(10)
    volume.checkpoint()
    lost = volume.append([(5, 3, True)])
    volume.append([(5, 3, True)])
    volume.append([(5, 3, True)], durable=lost.sequence)
    flip(segment_file(pool.directory, lost.segment), lost.offset * BLOCK + 50, 1)
    report = check_device(pool.directory)
    assert codes(report) == ["record-damaged", "log-gap"]
    assert report.errors == 2
    assert report.volumes[0].replayable_records == 2


def test_damage_that_the_checkpoint_covers_is_an_error_in_an_unsealed_segment(
    pool: PoolWriter,
) -> None:
    volume = pool.volume("root")
    volume.churn(10)
    volume.checkpoint()
    record = volume.segments[-1].records[4]
    flip(segment_file(pool.directory, record.segment), record.offset * BLOCK + 50, 1)
    report = check_device(pool.directory)
    assert report.findings[0].code == "record-damaged"
    assert report.findings[0].severity == "error"


def test_unsealed_segment_that_recovery_removed_is_a_note(pool: PoolWriter) -> None:
    closed_volume(pool)
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        identity = db.execute("SELECT id FROM volumes").fetchone()[0]
        db.execute("INSERT INTO segments VALUES (60000, ?, 1, 0, 1, 0, x'', 0, 0, 0)", (identity,))
    report = check_device(pool.directory)
    assert [(f.severity, f.code) for f in report.findings] == [("note", "segment-removed")]


# What belongs to nobody


def test_segments_of_unknown_volumes_are_kept_and_reported(pool: PoolWriter) -> None:
    volume = closed_volume(pool)
    orphans = {s.number for s in volume.segments} | set(volume.map_rows)
    with sqlite3.connect(pool.directory / "catalog.sqlite") as db:
        db.execute("DELETE FROM segments")
        db.execute("DELETE FROM checkpoints")
        db.execute("DELETE FROM volumes")
    report = check_device(pool.directory)
    assert {(f.code, f.segment) for f in report.findings} == {("orphan", n) for n in orphans}
    assert report.warnings == len(orphans)


def test_leftovers_of_an_interrupted_checkpoint_are_notes(pool: PoolWriter) -> None:
    volume = closed_volume(pool)
    number = pool.make_segment(volume, 2)
    (segment_file(pool.directory, number).parent / "stranger").write_bytes(b"x")
    report = check_device(pool.directory)
    assert [(f.severity, f.code) for f in report.findings] == [
        ("note", "leftover"),
        ("note", "stranger"),
    ]


def test_catalog_that_is_older_than_the_device_is_an_error(pool: PoolWriter) -> None:
    volume = closed_volume(pool)
    pool.next_segment = 70_000
    pool.make_segment(volume, 1)
    report = check_device(pool.directory)
    assert codes(report) == ["catalog-old"]
    assert not report.ok


# Without the rest


@pytest.mark.parametrize("how", ["missing", "garbage", "newer", "torn"])
def test_segments_are_checked_without_a_catalog(pool: PoolWriter, how: str) -> None:
    volume = closed_volume(pool)
    pool.close()
    path = pool.directory / "catalog.sqlite"
    if how == "missing":
        path.unlink()
    elif how == "garbage":
        path.write_bytes(pool.random.randbytes(8192))
    elif how == "newer":
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 3")
    else:
        os.truncate(path, 4096)
    report = check_device(pool.directory, data=True)
    assert codes(report) == ["catalog"]
    assert report.volumes[0].records == sum(len(s.records) for s in volume.segments)
    record = volume.segments[0].records[0]
    flip(segment_file(pool.directory, record.segment), (record.offset + 1) * BLOCK, 1)
    assert codes(check_device(pool.directory, data=True)) == ["data-damaged", "catalog"]


def test_flipped_bits_of_the_catalog_never_raise(pool: PoolWriter) -> None:
    closed_volume(pool)
    pool.close()
    path = pool.directory / "catalog.sqlite"
    size = path.stat().st_size
    for _ in range(40):
        places = [(pool.random.randrange(size), pool.random.randrange(8)) for _ in range(3)]
        for at, bit in places:
            flip(path, at, bit)
        check_device(pool.directory)
        for at, bit in places:
            flip(path, at, bit)


def test_random_garbage_over_segments_never_raises_and_is_found(pool: PoolWriter) -> None:
    volume = closed_volume(pool)
    pool.close()
    # Behind the last node, and behind the last record, bytes mean nothing.
    ends = {s.number: s.end * BLOCK for s in volume.segments}
    ends |= {n: BLOCK + sum(b for _, b in row.nodes) for n, row in volume.map_rows.items()}
    for _ in range(25):
        number = pool.random.choice(sorted(ends))
        path = segment_file(pool.directory, number)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        at = pool.random.randrange(min(3 * BLOCK, ends[number]))
        damaged[at : at + 3000] = pool.random.randbytes(3000)
        path.write_bytes(damaged)
        report = check_device(pool.directory, data=True)
        assert report.errors + report.warnings, f"3000 bytes from {at} of {path}"
        path.write_bytes(whole)
