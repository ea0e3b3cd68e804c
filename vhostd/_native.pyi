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
    """

    number: int
    kind: int
    sealed: bool
    used_blocks: int
    live: int

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
    deletes their files only after `Volume.checkpoint_committed(id)`.
    """

    id: int
    state: CheckpointState
    mapped_blocks: int
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
    ) -> Volume:
        """Recovers and opens a volume.

        `epoch` (greater than `previous_epoch`) is committed in the catalog before the call.
        `mapped_blocks`: of the checkpoint.
        `uncatalogued`: segments of this volume found on the device that no row names.
        """

    def stats(self) -> dict[str, Any]:
        """`workers`: a dict of counters each (`requests`, `refused`, `failed`, `notifications`,
        `kicks`, `sleeps`, `rings_broken`); `volumes`: open ones; `events_dropped`."""

    def shutdown(self) -> None:
        """Stops the workers. Volumes that are open stay as after a crash; close them first."""

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
    `warnings` (list of str: what is lost or odd)."""

    def read(self, offset: int, length: int) -> bytes:
        """Offset and length of direct access are multiples of 512 inside the volume."""

    def write(self, offset: int, data: bytes) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def write_zeroes(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...
    def resize(self, size_bytes: int) -> None: ...
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
        `live_blocks`, `log_blocks`, `live_node_bytes`, `map_blocks`."""

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
