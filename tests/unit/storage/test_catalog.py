"""The catalog: what a commit promises, and what it refuses."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from vhostd.errors import (
    DamagedError,
    DeviceError,
    ExistsError,
    InternalError,
    NotFoundError,
    UnsupportedError,
)
from vhostd.storage.catalog import FILE_NAME, Catalog

if TYPE_CHECKING:
    from vhostd._native import CheckpointResult, SegmentRow


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = make(tmp_path)
    yield catalog
    catalog.close()


def make(directory: Path) -> Catalog:
    return Catalog.create(
        directory, uuid=uuid4(), name="fast", segment_bytes=1 << 20, device_uuid=uuid4()
    )


def row(number: int, *, kind: int = 1, sealed: bool = False, live: int = 3) -> SegmentRow:
    return {
        "number": number,
        "kind": kind,
        "sealed": sealed,
        "used_blocks": 5,
        "live": live,
        "dead": b"",
        "punched_blocks": 0,
        "notes": 0,
        "unmaps": 0,
    }


def result(
    *,
    sequence: int = 1,
    segment: int = 1,
    end_block: int = 4,
    checksum: int = 7,
    root: bytes = b"root",
    mapped: int = 3,
    changed: list[SegmentRow] | None = None,
    removed: list[int] | None = None,
) -> CheckpointResult:
    return {
        "id": 1,
        "state": {
            "root": root,
            "segment": segment,
            "end_block": end_block,
            "sequence": sequence,
            "record_checksum": checksum,
        },
        "mapped_blocks": mapped,
        "snapshots": [],
        "changed": [row(1)] if changed is None else changed,
        "removed": removed or [],
    }


def volume(catalog: Catalog, name: str = "web") -> Any:
    return catalog.add_volume(name=name, size_bytes=1 << 30, logical_block_bytes=512)


def test_volume_and_checkpoint_survive_reopening(catalog: Catalog, tmp_path: Path) -> None:
    made = volume(catalog)
    catalog.grant_segments(10)
    epoch = catalog.next_epoch(made.uuid)
    catalog.commit_checkpoint(made.uuid, epoch, result(changed=[row(1), row(2, kind=2)]))
    catalog.close()
    again = Catalog.open(tmp_path)
    found = again.volume("web")
    assert (found.uuid, found.size_bytes, found.epoch) == (made.uuid, 1 << 30, 1)
    assert again.checkpoint(made.uuid).state == result()["state"]
    assert again.segments(made.uuid) == [row(1), row(2, kind=2)]
    assert again.pool().next_segment == 11
    again.close()


def test_volume_without_checkpoint_has_the_empty_one(catalog: Catalog) -> None:
    state = catalog.checkpoint(volume(catalog).uuid).state
    assert state == {
        "root": b"",
        "segment": 0,
        "end_block": 0,
        "sequence": 0,
        "record_checksum": 0,
    }


def test_serial_is_of_the_uuid_and_fits_get_id(catalog: Catalog) -> None:
    made = volume(catalog)
    assert made.serial == made.uuid.hex[:20]


def test_grants_never_overlap(catalog: Catalog) -> None:
    assert [catalog.grant_segments(5), catalog.grant_segments(7)] == [(1, 6), (6, 13)]


def test_epoch_only_grows(catalog: Catalog) -> None:
    made = volume(catalog)
    assert [catalog.next_epoch(made.uuid) for _ in range(3)] == [1, 2, 3]


def test_taken_name_is_refused(catalog: Catalog) -> None:
    first, _ = volume(catalog), volume(catalog, "other")
    with pytest.raises(ExistsError, match="fast/web exists"):
        volume(catalog)
    with pytest.raises(ExistsError, match="fast/other exists"):
        catalog.rename_volume(first.uuid, "other")


def test_removal_is_begun_then_finished(catalog: Catalog) -> None:
    made = volume(catalog)
    catalog.grant_segments(2)
    catalog.commit_checkpoint(made.uuid, catalog.next_epoch(made.uuid), result())
    with pytest.raises(NotFoundError):
        catalog.finish_removal(made.uuid)
    catalog.begin_removal(made.uuid)
    with pytest.raises(NotFoundError, match="web does not exist"):
        catalog.volume("web")
    with pytest.raises(NotFoundError):
        catalog.next_epoch(made.uuid)
    with pytest.raises(ExistsError, match="still being removed"):
        volume(catalog)
    catalog.finish_removal(made.uuid)
    assert catalog.volumes() == []
    assert catalog.segment_numbers() == set()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (result(sequence=4, segment=2, end_block=9), "sequence 4 is before"),
        (result(sequence=6, segment=1, end_block=900), "log position 1:900 is before"),
        (result(sequence=5, segment=2, checksum=8), "two checksums"),
        (result(sequence=6, segment=2, root=b""), "without a root"),
        (result(sequence=6, segment=2, changed=[row(64)]), "never granted"),
        (result(sequence=6, segment=2, changed=[row(0)]), "never granted"),
        (result(sequence=6, segment=2, changed=[row(2, sealed=False)]), "sealed already"),
        (result(sequence=6, segment=2, changed=[row(2, kind=2, sealed=True)]), "another owner"),
        (result(sequence=6, segment=2, changed=[row(3)]), "another owner"),
        (result(sequence=6, segment=2, changed=[row(4)], removed=[4]), "changed and removed"),
        (result(sequence=6, segment=2, changed=[], removed=[3]), "another volume's"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_checkpoint_that_breaks_an_invariant_changes_nothing(
    catalog: Catalog, bad: CheckpointResult, reason: str
) -> None:
    catalog.grant_segments(63)
    other = volume(catalog, "other")
    catalog.commit_checkpoint(
        other.uuid, catalog.next_epoch(other.uuid), result(changed=[row(3)], segment=3)
    )
    made = volume(catalog)
    epoch = catalog.next_epoch(made.uuid)
    good = result(sequence=5, segment=2, changed=[row(1, sealed=True), row(2, sealed=True)])
    catalog.commit_checkpoint(made.uuid, epoch, good)
    before = list(catalog._db.connection.iterdump())
    with pytest.raises(InternalError, match=reason):
        catalog.commit_checkpoint(made.uuid, epoch, bad)
    assert list(catalog._db.connection.iterdump()) == before
    assert catalog.checkpoint(made.uuid).state == good["state"]


def test_checkpoint_of_an_epoch_that_is_over_is_refused(catalog: Catalog) -> None:
    made = volume(catalog)
    catalog.grant_segments(9)
    old = catalog.next_epoch(made.uuid)
    catalog.next_epoch(made.uuid)
    with pytest.raises(InternalError, match="epoch 1 is over"):
        catalog.commit_checkpoint(made.uuid, old, result())


def test_removed_segments_are_forgotten(catalog: Catalog) -> None:
    made = volume(catalog)
    catalog.grant_segments(9)
    epoch = catalog.next_epoch(made.uuid)
    catalog.commit_checkpoint(made.uuid, epoch, result(changed=[row(1), row(2)]))
    catalog.commit_checkpoint(made.uuid, epoch, result(sequence=2, changed=[], removed=[1, 5]))
    assert catalog.segment_numbers() == {2}


def test_newer_schema_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    catalog.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("PRAGMA user_version = 3")
    db.close()
    with pytest.raises(UnsupportedError, match="schema version 3"):
        Catalog.open(tmp_path)


def test_missing_catalog_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=FILE_NAME):
        Catalog.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a database" * 400])
def test_file_that_is_no_catalog_is_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{FILE_NAME} is damaged.*rebuild-catalog"):
        Catalog.open(tmp_path)
    assert path.read_bytes() == content


def test_other_sqlite_file_is_damaged(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / FILE_NAME)
    db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(DamagedError, match="not the catalog"):
        Catalog.open(tmp_path)


def test_overwritten_page_is_damaged(catalog: Catalog, tmp_path: Path) -> None:
    for number in range(200):
        volume(catalog, f"v{number}")
    catalog.close()
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    assert len(content) > 8 * 4096
    for page in range(2, len(content) // 4096):
        content[page * 4096 : page * 4096 + 512] = b"\xa5" * 512
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="damaged"):
        Catalog.open(tmp_path)


def test_directory_that_cannot_be_written_is_a_device_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be written"):
        make(tmp_path / "missing")
