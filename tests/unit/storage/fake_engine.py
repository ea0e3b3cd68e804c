"""An engine without I/O: it makes segments with headers, numbers and checkpoints, and no data.

It keeps the rules of `vhostd._native` that storage relies on, and asserts those storage must keep:
an epoch is in the catalog before the volume opens, a number is granted before it is used, a
checkpoint is answered before the next.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import UUID

from vhostd.errors import BusyError, DamagedError, NotFoundError


def format_device(
    path: str, /, *, pool_uuid: bytes, device_uuid: bytes, pool_name: str, segment_bytes: int
) -> None:
    directory = Path(path)
    (directory / "segments").mkdir()
    superblock = {
        "pool_uuid": pool_uuid.hex(),
        "device_uuid": device_uuid.hex(),
        "pool_name": pool_name,
        "segment_bytes": segment_bytes,
        "created_ns": 1,
    }
    (directory / "superblock").write_text(json.dumps(superblock))


class FakeDevice:
    index = 0

    def __init__(self, engine: FakeEngine, path: Path) -> None:
        self._engine = engine
        self.path = path
        values = json.loads((path / "superblock").read_text())
        for key in ("pool_uuid", "device_uuid"):
            values[key] = bytes.fromhex(values[key])
        self.superblock: Any = values
        self.granted = range(0)
        self.used = 0

    def grant_segment_numbers(self, first: int, end: int, /) -> None:
        assert first >= self.granted.stop
        self.granted, self.used = range(first, end), 0

    def segment_path(self, number: int) -> Path:
        return self.path / "segments" / f"{number >> 10:011x}" / f"{number:013x}.seg"

    def make_segment(self, volume_uuid: bytes, epoch: int, kind: int = 1) -> int:
        number = self.granted[self.used]
        self.used += 1
        path = self.segment_path(number)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"volume": volume_uuid.hex(), "epoch": epoch, "kind": kind}))
        return number

    def list_segments(self) -> list[int]:
        return sorted(int(p.stem, 16) for p in (self.path / "segments").glob("*/*.seg"))

    def identify_segment(self, number: int, /) -> Any:
        path = self.segment_path(number)
        if not path.exists():
            raise NotFoundError(f"no segment {number}")
        try:
            header = json.loads(path.read_text())
        except ValueError:
            raise DamagedError(f"{path}: no header; restore it") from None
        return {
            "number": number,
            "kind": header["kind"],
            "volume_uuid": bytes.fromhex(header["volume"]),
            "epoch": header["epoch"],
        }

    def remove_segment(self, number: int, /) -> None:
        self.segment_path(number).unlink()

    def space(self) -> tuple[int, int]:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize

    def close(self) -> None:
        self._engine.locked.discard(self.path)


class FakeExport:
    """Enough of an export to be closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


class FakeVolume:
    def __init__(self, device: FakeDevice, opened: dict[str, Any]) -> None:
        self._device = device
        self.opened = opened
        self.recovered: dict[str, Any] = {"clean": True, "records": 0}
        self.log_bytes = 0
        self.size_bytes: int = opened["size_bytes"]
        self.calls: list[tuple[Any, ...]] = []
        self.pending: dict[str, Any] | None = None
        self.sequence: int = opened["checkpoint"]["sequence"]
        self.segment: int = opened["checkpoint"]["segment"]
        self.old_maps: list[int] = [s["number"] for s in opened["segments"] if s["kind"] == 2]
        self.fail_next: Exception | None = None

    def write(self, count: int = 1) -> None:
        """Records are appended, to a segment of this opening."""
        if self.log_bytes == 0:
            self.segment = self._device.make_segment(
                self.opened["volume_uuid"], self.opened["epoch"]
            )
        self.log_bytes += 8192 * count
        self.sequence += count

    def write_zeroes(self, offset: int, length: int, /) -> None:
        self.calls.append(("write_zeroes", offset, length))
        self.write()

    def flush(self) -> None:
        self.calls.append(("flush",))

    def resize(self, size_bytes: int, /) -> None:
        self._maybe_fail()
        self.size_bytes = size_bytes

    def checkpoint(self) -> Any:
        assert self.pending is None, "the checkpoint before was not answered"
        self._maybe_fail()
        root = self._device.make_segment(self.opened["volume_uuid"], self.opened["epoch"], 2)
        changed = [(root, 2)] + ([(self.segment, 1)] if self.log_bytes else [])
        self.pending = {
            "id": 7,
            "state": {
                "root": root.to_bytes(8, "little"),
                "segment": self.segment,
                "end_block": 3,
                "sequence": self.sequence,
                "record_checksum": 5 if self.sequence else 0,
            },
            "mapped_blocks": self.sequence,
            "changed": [
                {
                    "number": n,
                    "kind": kind,
                    "sealed": True,
                    "used_blocks": 4,
                    "live": 2,
                    "dead": b"",
                    "punched_blocks": 0,
                    "notes": 0,
                    "unmaps": 0,
                }
                for n, kind in changed
            ],
            "removed": self.old_maps,
        }
        return self.pending

    def checkpoint_committed(self, checkpoint_id: int, /) -> None:
        assert self.pending is not None
        assert checkpoint_id == self.pending["id"]
        for number in self.pending["removed"]:
            self._device.remove_segment(number)
        self.old_maps = [s["number"] for s in self.pending["changed"] if s["kind"] == 2]
        self.pending, self.log_bytes = None, 0

    def checkpoint_failed(self, checkpoint_id: int, /) -> None:
        assert self.pending is not None
        self.pending = None
        self.calls.append(("checkpoint_failed", checkpoint_id))

    def stats(self) -> dict[str, Any]:
        return {"log_bytes_since_checkpoint": self.log_bytes, "mapped_blocks": self.sequence}

    def close(self) -> Any:
        self.calls.append(("close",))
        return self.checkpoint() if self.log_bytes else None

    def export(self, **arguments: Any) -> Any:
        self.calls.append(("export", arguments))
        return FakeExport()

    def _maybe_fail(self) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error


class FakeEngine:
    def __init__(self) -> None:
        self.locked: set[Path] = set()
        self.volumes: dict[UUID, FakeVolume] = {}
        self.events: list[dict[str, Any]] = []
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def event_fd(self) -> int:
        return self._event_fd

    def tell(self, **event: Any) -> None:
        self.events.append(event)
        os.eventfd_write(self._event_fd, 1)

    def take_events(self) -> list[dict[str, Any]]:
        os.eventfd_read(self._event_fd)
        events, self.events = self.events, []
        return events

    def open_device(self, path: str, /, *, direct: bool = True) -> FakeDevice:
        directory = Path(path)
        if directory in self.locked:
            raise BusyError(f"device {path} is in use by the process with PID 1; stop it")
        if not (directory / "superblock").exists():
            raise NotFoundError(f"{path} is no vhostd device: it has no superblock")
        self.locked.add(directory)
        return FakeDevice(self, directory)

    def open_volume(self, device: Any, /, **arguments: Any) -> FakeVolume:
        assert arguments["epoch"] == arguments["previous_epoch"] + 1
        volume = FakeVolume(device, arguments)
        self.volumes[UUID(bytes=arguments["volume_uuid"])] = volume
        return volume

    def stats(self) -> dict[str, Any]:
        return {"workers": 1}

    def shutdown(self) -> None:
        os.close(self._event_fd)
