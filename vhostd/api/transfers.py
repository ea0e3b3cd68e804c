"""The methods that import and export need: differences, and streams that are received.

docs/json-rpc.md describes them.

All of it runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Any
from uuid import UUID

import msgspec
from msgspec import Meta, Struct

from vhostd.daemon import Daemon
from vhostd.errors import NotFoundError
from vhostd.receives import StreamIdentity
from vhostd.storage.names import parse_volume
from vhostd.storage.snapshots import DIFFERENCE_RANGES

__all__ = ["methods"]

Text = Annotated[str, Meta(max_length=4096)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 46)]


class _Params(Struct, forbid_unknown_fields=True, kw_only=True):
    volume: Text


class ReceiveBegin(_Params):
    snapshot: Text
    guid: UUID
    size_bytes: Bytes
    logical_block_bytes: Bytes
    from_guid: UUID | None = None
    quiesced: bool = False
    start_bytes: Bytes = 0
    force: bool = False


class ReceiveNote(_Params):
    guid: UUID
    applied_bytes: Bytes


class ReceiveCommit(_Params):
    guid: UUID


class ReceiveVolume(_Params):
    """The volume alone."""


class SnapshotDiff(_Params):
    snapshot: Text | None = None
    base: Text | None = msgspec.field(name="from", default=None)
    start: Bytes = 0
    limit: Annotated[int, Meta(ge=1, le=DIFFERENCE_RANGES)] = DIFFERENCE_RANGES


_Handler = Callable[[Any], Awaitable[Any]]


def methods(daemon: Daemon) -> dict[str, tuple[type[Struct], _Handler]]:
    """Names, parameters and functions."""

    async def begin(p: ReceiveBegin) -> dict[str, Any]:
        stream = StreamIdentity(
            snapshot=p.snapshot,
            guid=p.guid,
            from_guid=p.from_guid,
            size_bytes=p.size_bytes,
            logical_block_bytes=p.logical_block_bytes,
            quiesced=p.quiesced,
            start_bytes=p.start_bytes,
        )
        return await daemon.receives.begin(parse_volume(p.volume), stream, force=p.force)

    async def note(p: ReceiveNote) -> None:
        await daemon.receives.note(parse_volume(p.volume), p.guid, p.applied_bytes)

    async def commit(p: ReceiveCommit) -> dict[str, Any]:
        return await daemon.receives.commit(parse_volume(p.volume), p.guid)

    async def abandon(p: ReceiveVolume) -> dict[str, Any]:
        return await daemon.receives.abandon(parse_volume(p.volume))

    async def info(p: ReceiveVolume) -> dict[str, Any]:
        found = daemon.receives.describe(parse_volume(p.volume))
        if found is None:
            raise NotFoundError(f"volume {p.volume} waits for no stream; there is none to continue")
        return found

    async def diff(p: SnapshotDiff) -> dict[str, Any]:
        name = parse_volume(p.volume)
        pool = daemon.pool(name.pool)
        # Not a change, and long: guests and other people go on meanwhile.
        page = await asyncio.to_thread(
            pool.snapshots.difference,
            name.volume,
            p.base,
            p.snapshot,
            start=p.start,
            limit=p.limit,
        )
        return {
            "ranges": [
                (offset, length, "data" if mapped else "zero")
                for offset, length, mapped in page.ranges
            ],
            "next": page.next,
            "from_size_bytes": page.old_size_bytes,
            "size_bytes": page.new_size_bytes,
        }

    return {
        "snapshot.diff": (SnapshotDiff, diff),
        "receive.begin": (ReceiveBegin, begin),
        "receive.note": (ReceiveNote, note),
        "receive.commit": (ReceiveCommit, commit),
        "receive.abandon": (ReceiveVolume, abandon),
        "receive.info": (ReceiveVolume, info),
    }
