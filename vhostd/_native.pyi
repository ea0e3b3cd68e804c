"""The Rust engine as Python sees it: few, coarse calls.

Calls that wait for I/O or for a worker release the GIL and block; run them with
`asyncio.to_thread`. Errors arrive as the exceptions of `vhostd.errors`. Sizes and offsets are in
bytes; UUIDs are `uuid.UUID.bytes`.
"""

from collections.abc import Sequence
from typing import Any, TypedDict, final

__all__ = ["Device", "Engine", "Export", "Volume", "crc32c", "format_device", "version"]

def version() -> str: ...
def crc32c(data: bytes, /) -> int:
    """CRC-32C of `data`."""

def format_device(
    path: str, *, pool_uuid: bytes, device_uuid: bytes, pool_name: str, segment_bytes: int
) -> None:
    """Makes an existing empty directory a device: writes a durable superblock and `segments/`."""

class SuperblockInfo(TypedDict):
    pool_uuid: bytes
    device_uuid: bytes
    pool_name: str
    segment_bytes: int
    created_ns: int

class SegmentInfo(TypedDict):
    """A segment as its header tells it. `kind`: 1 log, 2 map."""

    number: int
    kind: int
    volume_uuid: bytes
    epoch: int

class SegmentRow(TypedDict):
    """What the catalog keeps of a segment.

    kind: 1 log, 2 map. sealed: nothing more will be written to it. used_blocks: blocks written,
    header and record headers included. live: live data blocks (log) or live node bytes (map).
    dead: which are not; punched_blocks: of those, given back; notes, unmaps: what a rebuild may need
    of it (docs/format.md, "Catalog").
    """

    number: int
    kind: int
    sealed: bool
    used_blocks: int
    live: int
    dead: bytes
    punched_blocks: int
    notes: int
    unmaps: int

class SnapshotRoot(TypedDict):
    """The map of a snapshot: what the catalog keeps of it once a checkpoint has written it.

    position: in the log. root: as in `CheckpointState`. mapped_blocks: blocks it holds.
    """

    uuid: bytes
    position: int
    root: bytes
    mapped_blocks: int

class ParentSnapshot(TypedDict):
    """The snapshot that a head descends from. Of two that the head may reach blocks through, the
    engine needs the newest: what lies before it in the log, or in map segments before the end of its
    root, is shared with it."""

    position: int
    root: bytes

class FoundSnapshot(TypedDict):
    """A snapshot's note that recovery found in the log behind the checkpoint."""

    uuid: bytes
    name: str
    created_ns: int
    size_bytes: int
    position: int

class CheckpointState(TypedDict):
    """A durable map and the log position up to which it holds.

    root: opaque bytes naming the map's root node (empty: empty map). segment: number of the newest
    log segment the checkpoint covers; every log segment up to it is covered whole or up to
    `end_block`. sequence, record_checksum: of the last record covered (0, 0: none).
    """

    root: bytes
    segment: int
    end_block: int
    sequence: int
    record_checksum: int

class CheckpointResult(TypedDict):
    """A checkpoint that is durable and wants to be committed in the catalog.

    changed: rows to insert or update; removed: numbers to delete from the catalog. The engine
    deletes their files only after `Volume.checkpoint_committed(id)`. snapshots: those that were pending
    and now have a root, oldest first.
    """

    id: int
    state: CheckpointState
    mapped_blocks: int
    snapshots: list[SnapshotRoot]
    changed: list[SegmentRow]
    removed: list[int]

@final
class Engine:
    """Worker threads and what they share. One a process."""

    def __init__(
        self,
        *,
        workers: int = 1,
        cpus: Sequence[int] | None = None,
        poll_us: int = 32,
        map_cache_bytes: int = 256 << 20,
        staging_dir: str = "/dev/shm/vhostd",
        staging_bytes: int = 32 << 20,
    ) -> None: ...
    def event_fd(self) -> int:
        """An eventfd that is readable while `take_events` has something; owned by the engine."""

    def take_events(self) -> list[dict[str, Any]]:
        """Clears the eventfd and returns what happened since the last call, oldest first.

        Events of a volume name it (`volume`) and its `device`; of a volume that has been closed
        since there are none. Each has `kind` and:
        - `checkpoint-wanted`: `volume` (uuid bytes). Enough log was written since the last one.
        - `segment-numbers-wanted`: `device` (index). Fewer than half of the granted numbers are left.
        - `ring-broken`: `export` (id), `queue`, `reason`. The guest broke its ring; it is stopped.
        - `memory-lost`: `export` (id), `reason`. The front-end truncated shared memory.
        - `staging-full`: `volume`, `device`, `reason`. The staging memory is full; writes are refused.
        - `device-failed`: `device`, `reason`. A write or sync failed; its volumes refuse writes.
        - `device-full` / `device-space-back`: `device`.
        - `volume-full` (`limit_bytes`) / `volume-space-back`: `volume`, `device`. Writes are at its limit.
        - `reclaim-failed`: `volume`, `device`, `reason`. Dead blocks could not be given back.
        - `corruption`: `volume`, `offset_bytes`, `len_bytes`, `segment`, `reason`.
        """

    def open_device(self, path: str, *, direct: bool = True) -> Device: ...
    def open_volume(
        self,
        device: Device,
        *,
        volume_uuid: bytes,
        name: str,
        size_bytes: int,
        logical_block_bytes: int,
        serial: str,
        previous_epoch: int,
        epoch: int,
        read_only: bool,
        checkpoint: CheckpointState,
        mapped_blocks: int,
        segments: Sequence[SegmentRow],
        uncatalogued: Sequence[int],
        checkpoint_log_bytes: int = 256 << 20,
        parent: ParentSnapshot | None = None,
        newest_snapshot: int = 0,
        state_note: bytes = b"",
        clone: bool = False,
        limit_bytes: int | None = None,
        pause_when_full: bool = False,
    ) -> Volume:
        """Recovers and opens a volume.

        `epoch` (greater than `previous_epoch`) is committed in the catalog before the call.
        `mapped_blocks`: of the checkpoint.
        `uncatalogued`: segments of this volume found on the device that no row names.
        `parent`: of the head at the checkpoint: the nearest ancestor that is not pending.
        `newest_snapshot`: position of the volume's newest snapshot, whichever line it is of.
        `state_note`: payload of the volume's state note as the catalog has it; repeated in the log when
        the segment that holds the last one goes. `clone`: its first blocks are another volume's.
        `limit_bytes`, `pause_when_full`: as in `Volume.set_limit`, `Volume.set_pause_when_full`.

        A snapshot is opened with `volume_uuid` its own, its root as the checkpoint's, the rest of that
        0, no segments, and `read_only`: no log is read.
        """

    def difference(
        self,
        device: Device,
        *,
        old: bytes,
        new: bytes,
        start: int = 0,
        end: int = 1 << 46,
        limit: int = 65536,
    ) -> tuple[list[tuple[int, int, bool]], int | None]:
        """Where two roots differ in `start..end` (bytes): (offset, length, mapped in `new`), ascending.

        At most `limit` ranges; the second value is where to go on, or None. The cost follows what
        differs. Both roots must stay pinned meanwhile: by their snapshots, or `Volume.hold_nodes`.
        `old` empty: everything that is mapped in `new`.
        """

    def exclusive(self, device: Device, *, root: bytes, others: Sequence[bytes]) -> tuple[int, int]:
        """Blocks and node bytes that `root` reaches and none of the `others` does."""

    def release_exclusive(
        self, volume: Volume, *, root: bytes, others: Sequence[bytes]
    ) -> tuple[int, int]:
        """As `exclusive`, and what it finds is dead from now on. May be repeated after a crash.

        `root`: of a snapshot that is being removed; `others`: its parent, and all that descend from it,
        the head in a checkpoint committed after `Volume.set_parent` among them. Nodes of `root` that are
        gone are those of an earlier run that was complete; a node of the others that cannot be read is an
        error, and nothing has changed.
        """

    def rebuild_volume(
        self,
        device: Device,
        *,
        volume_uuid: bytes,
        name: str,
        size_bytes: int,
        logical_block_bytes: int,
        epoch: int,
        segments: Sequence[int],
        snapshots: Sequence[tuple[bytes, int]],
        rollbacks: Sequence[tuple[int, int]],
        unmaps: Sequence[tuple[int, int, int]],
        origin: bytes = b"",
    ) -> RebuiltVolume:
        """Makes the maps of a volume again from its log segments, which nobody has open.

        `segments`: its log segments. `snapshots`: (uuid, position); `rollbacks`: (position, to);
        `unmaps`: (first block, blocks, position), of unmaps notes; `origin`: root of the snapshot that
        a clone began with. The map segments it writes are durable; the caller commits the result.
        """

    def stats(self) -> dict[str, Any]:
        """`workers`: a dict of counters each (`requests`, `refused`, `failed`, `notifications`,
        `kicks`, `sleeps`, `rings_broken`); `volumes`: open ones; `events_dropped`."""

    def shutdown(self) -> None:
        """Stops the workers. Volumes that are open stay as after a crash; close them first."""

class RebuiltVolume(TypedDict):
    """What `Engine.rebuild_volume` made. lost: damage found in segments, as sentences; blocks whose
    record cannot be read are in no map. lost_records: places where that is so, or where unmaps may be
    missing. segments: all rows of the volume, map segments included; log segments behind the log's end
    are not among them."""

    state: CheckpointState
    mapped_blocks: int
    snapshots: list[SnapshotRoot]
    segments: list[SegmentRow]
    lost: list[str]
    lost_records: int

@final
class Device:
    """A directory device, locked and open."""

    index: int
    superblock: SuperblockInfo
    def grant_segment_numbers(self, first: int, end: int) -> None:
        """Lets the engine make segments with numbers `first` to `end - 1`; replaces an earlier grant's rest."""

    def list_segments(self) -> list[int]:
        """Numbers of all segments on the device, ascending."""

    def identify_segment(self, number: int) -> SegmentInfo: ...
    def remove_segment(self, number: int) -> None: ...
    def space(self) -> tuple[int, int]:
        """Bytes free and bytes in all, of the file system."""

    def close(self) -> None: ...

@final
class Volume:
    """A volume that is open on a worker."""

    recovered: dict[str, Any]
    """What recovery did: `clean` (bool), `records`, `staged_bytes`, `segments_scanned`, `seconds`,
    `warnings` (list of str: what is lost or odd), `snapshots` (list of `FoundSnapshot`, oldest first)."""

    def read(self, offset: int, length: int) -> bytes:
        """Offset and length of direct access are multiples of 512 inside the volume."""

    def write(self, offset: int, data: bytes) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def write_zeroes(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...
    def resize(self, size_bytes: int) -> None: ...
    def snapshot(self, *, uuid: bytes, name: str, created_ns: int) -> int:
        """Takes a snapshot and returns its position, when it is durable. Requests that have completed
        are in it. Costs the same whatever the volume's size; guests' I/O goes on.

        Raises:
            BusyError: 64 snapshots wait for a checkpoint already: make one first.
        """

    def note_state(self, payload: bytes, *, write: bool = True) -> None:
        """Takes a new state note (docs/format.md, "Note"); with `write`, it is durable in the log when
        this returns, otherwise it is kept for when the engine has to repeat it."""

    def set_parent(self, parent: ParentSnapshot | None) -> None:
        """The head now descends from this snapshot: those between are being removed."""

    def hold_nodes(self) -> None:
        """Until `release_nodes` (calls nest), no map segment is removed or punched, so that the root of
        a checkpoint committed meanwhile can be walked."""

    def release_nodes(self) -> None: ...
    def adopt(self, offset: int, length: int) -> int:
        """Copies what the range has in other volumes' segments into this volume's log; returns the
        bytes copied. Guests may write meanwhile."""

    def foreign_blocks(self) -> int:
        """Blocks that the head of a clone still has in other volumes' segments. Reads the whole map."""

    def set_limit(self, limit_bytes: int | None) -> None:
        """Bytes that the volume's segments may take on the device; at it, writes find no space."""

    def set_pause_when_full(self, pause: bool) -> None:
        """A write that finds no space waits for it (True) or fails (False)."""

    def set_reclaim(self, *, bytes_per_second: int, enabled: bool = True) -> None:
        """How much dead space may be given back a second, at most."""
    def checkpoint(self) -> CheckpointResult:
        """Writes what changed of the map, and makes it durable."""

    def checkpoint_committed(self, checkpoint_id: int) -> None:
        """The catalog has it: removes the files of the segments it named as removed."""

    def checkpoint_failed(self, checkpoint_id: int) -> None:
        """The catalog refused it: the next one starts from the state before."""

    def stats(self) -> dict[str, Any]:
        """Counters: `reads`, `read_bytes`, `writes`, `written_bytes`, `flushes`, `discards`,
        `discarded_bytes`, `errors`, `checksum_errors`, `map_node_reads`. Levels: `mapped_blocks`,
        `map_memory_bytes`, `log_bytes_since_checkpoint`, `staged_bytes`, `segments`,
        `live_blocks`, `log_blocks`, `live_node_bytes`, `map_blocks`, `punched_blocks`,
        `dead_blocks` (of data, punched or not), `allocated_bytes` (what its segments take),
        `pending_snapshots`, `waiting_for_space` (requests). More counters: `log_bytes`, `node_bytes`
        (written to the device), `punched_bytes`, `zero_bytes` (writes of zeroes that took no space)."""

    def close(self) -> CheckpointResult | None:
        """Finishes requests, flushes, seals, checkpoints; exports must be closed first.

        Commit the result, call `checkpoint_committed`, and then drop the volume. None: nothing
        changed since the last one. With an error the volume is closed as after a crash.
        """

    def export(
        self, *, export_id: int, queues: int, read_only: bool, write_cache: bool = True
    ) -> Export: ...

class MemoryRegion(TypedDict):
    """One guest memory region of SET_MEM_TABLE or ADD_MEM_REG; `fd` is duplicated, not taken."""

    guest_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int
    fd: int

@final
class Export:
    """The device side of one vhost-user session: guest memory and virtqueues on a worker."""

    def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Replaces all regions (queues must be stopped, or their rings must lie in both)."""

    def add_region(self, region: MemoryRegion) -> None: ...
    def remove_region(self, guest_address: int, user_address: int, size_bytes: int) -> None: ...
    def start_queue(
        self,
        index: int,
        *,
        size: int,
        descriptor_address: int,
        available_address: int,
        used_address: int,
        base: int,
        kick_fd: int | None,
        call_fd: int | None,
        error_fd: int | None,
        features: int,
        enabled: bool,
    ) -> None:
        """Starts servicing. Ring addresses are the front-end's (user) addresses. fds are duplicated."""

    def set_queue_enabled(self, index: int, enabled: bool) -> None: ...
    def set_queue_call(self, index: int, call_fd: int | None) -> None: ...
    def set_queue_kick(self, index: int, kick_fd: int | None) -> None: ...
    def set_queue_error(self, index: int, error_fd: int | None) -> None: ...
    def stop_queue(self, index: int) -> int:
        """Finishes what was taken from the ring, stops, and returns the next available index."""

    def set_write_cache(self, enabled: bool) -> None: ...
    def config_space(self, features: int) -> bytes:
        """struct virtio_blk_config (virtio 1.3, 5.2.4), whole."""

    def features(self) -> int:
        """virtio-blk and ring feature bits this export can offer (without vhost-user's bit 30)."""

    def close(self) -> None:
        """Stops all queues and unmaps guest memory."""
