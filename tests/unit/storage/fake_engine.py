"""An engine without I/O: it makes segments with headers and numbers, and its data are numbers.

It keeps the rules of `vhostd._native` that storage relies on, and asserts those storage must keep:
an epoch is in the catalog before the volume opens, a number is granted before it is used, a
checkpoint is answered before the next, what is dead is dead once.

A block of data is nothing but its address. What is dead is told as the real engine does it: by
comparing a replaced block's address with the position of the head's parent, and by walks when a
snapshot goes. So a parent that storage tells wrongly shows as data that died or leaked
(`Store.check`).

What "is on disk" is in a `Store`, one a directory, that outlives engines.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import UUID

from vhostd.errors import BusyError, DamagedError, NotFoundError

Tree = dict[int, int]
"""Block of the volume to address."""

SEGMENT_BLOCKS = 200
MAX_PENDING = 64


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


class Store:
    """What a directory's segments hold."""

    def __init__(self) -> None:
        self.roots: dict[bytes, Tree] = {b"": {}}
        self.logs: dict[bytes, list[dict[str, Any]]] = {}
        self.owner: dict[int, bytes] = {}
        self.gone: set[int] = set()
        self.notes: dict[bytes, Any] = {}

    def read(self, root: bytes) -> Tree:
        """A tree, all of whose data must be there."""
        tree = self.roots[root]
        assert self.gone.isdisjoint(tree.values()), "a root reaches data that is gone"
        return tree


_STORES: dict[Path, Store] = {}


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
        self.store = _STORES.setdefault(path, Store())
        self.free_bytes: int | None = None

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
        if self.free_bytes is not None:
            return self.free_bytes, 1 << 40
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
    """An open volume, or (read_only) an open snapshot."""

    def __init__(self, device: FakeDevice, opened: dict[str, Any]) -> None:
        self._device = device
        self._store = device.store
        self.opened = opened
        self.uuid: bytes = opened["volume_uuid"]
        self.log_bytes = 0
        self.size_bytes: int = opened["size_bytes"]
        self.calls: list[tuple[Any, ...]] = []
        self.pending: dict[str, Any] | None = None
        state = opened["checkpoint"]
        self.sequence: int = state["sequence"]
        self.segment: int = state["segment"]
        self.end: int = state["end_block"]
        self.fresh = True
        self.fail_next: Exception | None = None
        self.fail_snapshot: Exception | None = None
        self.held = 0
        self.limit_bytes: int | None = opened.get("limit_bytes")
        self.reclaim = (0, False)
        self.pause: bool = opened.get("pause_when_full", False)
        self.tree: Tree = dict(self._store.read(state["root"]))
        assert len(self.tree) == opened["mapped_blocks"]
        parent = opened.get("parent")
        self.parent: int = 0 if parent is None else parent["position"]
        self.waiting: list[tuple[bytes, int, Tree]] = []
        self.dead: set[int] = set()
        self.rows: dict[int, dict[str, Any]] = {}
        self.old_maps: list[int] = []
        for row in opened["segments"]:
            self.rows[row["number"]] = dict(row)
            if row["kind"] == 2:
                self.old_maps.append(row["number"])
                continue
            bits = int.from_bytes(row["dead"], "little")
            self.dead |= {row["number"] << 13 | i for i in range(8192) if bits >> i & 1}
        self.recovered: dict[str, Any] = {"clean": True, "records": 0, "snapshots": []}
        self._recover(state["segment"] << 13 | state["end_block"])

    def _recover(self, covered: int) -> None:
        for entry in self._store.logs.setdefault(self.uuid, []):
            if entry["position"] < covered or self.opened["read_only"]:
                continue
            self.recovered["records"] += 1
            if entry["kind"] == "data":
                self._map(entry["block"], entry["position"])
            elif entry["kind"] == "unmap":
                self._map(entry["block"], None)
            elif entry["kind"] == "snapshot":
                self._freeze(entry["uuid"], entry["position"])
                self.recovered["snapshots"].append({k: v for k, v in entry.items() if k != "kind"})
            self.sequence += 1
            at = entry["position"]
            self.segment, self.end = at >> 13, (at & 8191) + 1
            self._row(self.segment)["used_blocks"] = self.end

    # The log

    def _append(self, kind: str, **entry: Any) -> int:
        assert not self.opened["read_only"]
        if self.fresh or self.end >= SEGMENT_BLOCKS:
            self.segment = self._device.make_segment(self.uuid, self.opened["epoch"])
            self.end, self.fresh = 1, False
        self.end += 1  # its record's header
        position = self.segment << 13 | self.end
        self.end += 1
        self._row(self.segment)["used_blocks"] = self.end
        self._store.logs[self.uuid].append({"kind": kind, "position": position, **entry})
        return position

    def _row(self, number: int) -> dict[str, Any]:
        return self.rows.setdefault(
            number,
            {
                "number": number,
                "kind": 1,
                "sealed": False,
                "used_blocks": 1,
                "live": 0,
                "dead": b"",
                "punched_blocks": 0,
                "notes": 0,
                "unmaps": 0,
            },
        )

    def _map(self, block: int, address: int | None) -> None:
        old = self.tree.pop(block, None)
        if address is not None:
            self.tree[block] = address
            self._store.owner[address] = self.uuid
        if old is not None and self._store.owner[old] == self.uuid and old >= self.parent:
            assert old not in self.dead, "a block died twice"
            self.dead.add(old)

    def _freeze(self, uuid: bytes, position: int) -> None:
        self.waiting.append((uuid, position, dict(self.tree)))
        self.parent = position

    def write(self, count: int = 1) -> None:
        """Blocks that were not mapped are."""
        first = max(self.tree, default=-1) + 1
        for block in range(first, first + count):
            self.put(block)

    def put(self, block: int) -> int:
        """One block is written; its content is its address."""
        address = self._append("data", block=block)
        self._map(block, address)
        self.log_bytes += 8192
        self.sequence += 1
        return address

    def drop(self, block: int) -> None:
        """One block is discarded."""
        self._append("unmap", block=block)
        self._map(block, None)
        self.log_bytes += 4096
        self.sequence += 1

    def write_zeroes(self, offset: int, length: int, /) -> None:
        self.calls.append(("write_zeroes", offset, length))
        for block in [b for b in self.tree if offset <= b * 4096 < offset + length]:
            self.drop(block)
        self.log_bytes += 4096

    def flush(self) -> None:
        self.calls.append(("flush",))

    def resize(self, size_bytes: int, /) -> None:
        self._maybe_fail()
        self.size_bytes = size_bytes

    # Snapshots

    def snapshot(self, *, uuid: bytes, name: str, created_ns: int) -> int:
        if len(self.waiting) >= MAX_PENDING:
            raise BusyError(f"{MAX_PENDING} snapshots wait for a checkpoint; make one")
        position = self._append(
            "snapshot", uuid=uuid, name=name, created_ns=created_ns, size_bytes=self.size_bytes
        )
        self.sequence += 1
        self.log_bytes += 8192
        if self.fail_snapshot is not None:
            error, self.fail_snapshot = self.fail_snapshot, None
            raise error
        self._freeze(uuid, position)
        return position

    def note_state(self, payload: bytes, /, *, write: bool = True) -> None:
        note = json.loads(payload)
        self.calls.append(("note_state", note, write))
        if write:
            self._append("state")
            self.sequence += 1
            self._store.notes[self.uuid] = note

    def set_parent(self, parent: Any, /) -> None:
        self.calls.append(("set_parent", parent))
        assert not self.waiting, "the parent is pending"
        self.parent = 0 if parent is None else parent["position"]

    def hold_nodes(self) -> None:
        self.held += 1

    def release_nodes(self) -> None:
        assert self.held > 0
        self.held -= 1

    def adopt(self, offset: int, length: int, /) -> int:
        copied = 0
        for block in range(offset // 4096, (offset + length) // 4096):
            at = self.tree.get(block)
            if at is not None and self._store.owner[at] != self.uuid:
                self.put(block)
                copied += 4096
        return copied

    def foreign_blocks(self) -> int:
        return sum(self._store.owner[at] != self.uuid for at in self.tree.values())

    def set_reclaim(self, *, bytes_per_second: int, enabled: bool = True) -> None:
        self.reclaim = (bytes_per_second, enabled)

    def set_limit(self, limit_bytes: int | None, /) -> None:
        self.limit_bytes = limit_bytes

    def set_pause_when_full(self, pause: bool, /) -> None:
        self.pause = pause

    # Checkpoints

    def checkpoint(self) -> Any:
        assert self.pending is None, "the checkpoint before was not answered"
        self._maybe_fail()
        number = self._device.make_segment(self.uuid, self.opened["epoch"], 2)
        roots = [tree for *_, tree in self.waiting] + [dict(self.tree)]
        names = [
            number.to_bytes(8, "little") + bytes([i]) if t else b"" for i, t in enumerate(roots)
        ]
        self._store.roots.update(zip(names, roots, strict=True))
        self._store.roots[b""] = {}
        for row in self.rows.values():
            self._settle(row)
        changed = [dict(row) for row in self.rows.values() if row["kind"] == 1]
        changed.append(
            {**self._row(number), "kind": 2, "sealed": True, "used_blocks": 4, "live": 2}
        )
        del self.rows[number]
        # Only the newest map segment is needed, if no snapshot has its root in an older one.
        snapshots = self.parent or self.waiting or self.held
        self.pending = {
            "id": 7,
            "state": {
                "root": names[-1],
                "segment": self.segment,
                "end_block": self.end,
                "sequence": self.sequence,
                "record_checksum": 5 if self.sequence else 0,
            },
            "mapped_blocks": len(self.tree),
            "snapshots": [
                {"uuid": uuid, "position": position, "root": name, "mapped_blocks": len(tree)}
                for (uuid, position, tree), name in zip(self.waiting, names[:-1], strict=True)
            ],
            "changed": changed,
            "removed": [] if snapshots else list(self.old_maps),
            "map": number,
        }
        return {key: value for key, value in self.pending.items() if key != "map"}

    def _settle(self, row: dict[str, Any]) -> None:
        if row["kind"] == 1:
            number = row["number"]
            data = {
                a for a, who in self._store.owner.items() if who == self.uuid and a >> 13 == number
            }
            dead = sum(1 << (address & 8191) for address in self.dead & data)
            row["dead"] = dead.to_bytes((dead.bit_length() + 7) // 8, "little")
            row["live"] = len(data - self.dead)
            row["sealed"] = row["sealed"] or number != self.segment

    def checkpoint_committed(self, checkpoint_id: int, /) -> None:
        assert self.pending is not None
        assert checkpoint_id == self.pending["id"]
        for number in self.pending["removed"]:
            self._device.remove_segment(number)
            self.old_maps.remove(number)
        self.old_maps.append(self.pending["map"])
        done = {root["uuid"] for root in self.pending["snapshots"]}
        self.waiting = [entry for entry in self.waiting if entry[0] not in done]
        self._store.gone |= self.dead
        self.pending, self.log_bytes = None, 0

    def checkpoint_failed(self, checkpoint_id: int, /) -> None:
        assert self.pending is not None
        self.pending = None
        self.calls.append(("checkpoint_failed", checkpoint_id))

    def stats(self) -> dict[str, Any]:
        return {
            "log_bytes_since_checkpoint": self.log_bytes,
            "mapped_blocks": len(self.tree),
            "pending_snapshots": len(self.waiting),
            "allocated_bytes": 4096 * sum(row["used_blocks"] for row in self.rows.values()),
        }

    def close(self) -> Any:
        assert not self.held
        self.calls.append(("close",))
        if self.opened["read_only"]:
            return None
        covered = self.opened["checkpoint"]
        changed = (self.segment, self.end) != (covered["segment"], covered["end_block"])
        return self.checkpoint() if self.log_bytes or changed else None

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

    def difference(
        self,
        device: Any,
        /,
        *,
        old: bytes,
        new: bytes,
        start: int = 0,
        end: int = 1 << 46,
        limit: int = 65536,
    ) -> tuple[list[tuple[int, int, bool]], int | None]:
        before, after = device.store.read(old), device.store.read(new)
        ranges: list[tuple[int, int, bool]] = []
        for block in sorted(before.keys() | after.keys()):
            at, mapped = block * 4096, block in after
            if before.get(block) == after.get(block) or not start <= at < end:
                continue
            if ranges and ranges[-1][0] + ranges[-1][1] == at and ranges[-1][2] == mapped:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + 4096, mapped)
            elif len(ranges) == limit:
                return ranges, at
            else:
                ranges.append((at, 4096, mapped))
        return ranges, None

    def exclusive(self, device: Any, /, *, root: bytes, others: Any) -> tuple[int, int]:
        kept = {a for other in others for a in device.store.read(other).values()}
        return len(set(device.store.read(root).values()) - kept), 0

    def release_exclusive(self, volume: Any, /, *, root: bytes, others: Any) -> tuple[int, int]:
        store = volume._store
        kept = {a for other in others for a in store.read(other).values()}
        found = {a for a in store.roots[root].values() if store.owner[a] == volume.uuid} - kept
        volume.dead |= found
        return len(found), 0

    def stats(self) -> dict[str, Any]:
        return {"workers": 1}

    def shutdown(self) -> None:
        os.close(self._event_fd)
