"""A real engine on a directory of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

native = pytest.importorskip("vhostd._native", reason="build the native module first: make build")

if TYPE_CHECKING:
    from vhostd._native import CheckpointResult, CheckpointState, Device, Engine, SegmentRow, Volume

EMPTY: CheckpointState = {
    "root": b"",
    "segment": 0,
    "end_block": 0,
    "sequence": 0,
    "record_checksum": 0,
}


class Store:
    """One device, one volume, and of the catalog what both need: in memory."""

    def __init__(self, path: Path) -> None:
        self.pool_uuid = uuid.uuid4().bytes
        self.volume_uuid = uuid.uuid4().bytes
        self.directory = path / "device"
        self.directory.mkdir()
        native.format_device(
            str(self.directory),
            pool_uuid=self.pool_uuid,
            device_uuid=uuid.uuid4().bytes,
            pool_name="test",
            segment_bytes=1 << 20,
        )
        self.staging = path / "staging"
        self.engine: Engine = native.Engine(
            workers=2, staging_dir=str(self.staging), staging_bytes=8 << 20
        )
        self.device: Device = self.engine.open_device(str(self.directory))
        self.device.grant_segment_numbers(1, 10_000)
        self.epoch = 0
        self.state = EMPTY
        self.mapped_blocks = 0
        self.rows: dict[int, SegmentRow] = {}

    def open(self, **changes: Any) -> Volume:
        self.epoch += 1
        arguments: dict[str, Any] = {
            "volume_uuid": self.volume_uuid,
            "name": "disk",
            "size_bytes": 64 << 20,
            "logical_block_bytes": 512,
            "serial": "serial-1",
            "previous_epoch": self.epoch - 1,
            "epoch": self.epoch,
            "read_only": False,
            "checkpoint": self.state,
            "mapped_blocks": self.mapped_blocks,
            "segments": list(self.rows.values()),
            "uncatalogued": [n for n in self.device.list_segments() if n not in self.rows],
        }
        return self.engine.open_volume(self.device, **(arguments | changes))

    def commit(self, volume: Volume, result: CheckpointResult | None) -> None:
        if result is None:
            return
        self.state, self.mapped_blocks = result["state"], result["mapped_blocks"]
        self.rows.update({row["number"]: row for row in result["changed"]})
        for number in result["removed"]:
            self.rows.pop(number, None)
        volume.checkpoint_committed(result["id"])

    def close(self, volume: Volume) -> None:
        self.commit(volume, volume.close())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    store.engine.shutdown()
