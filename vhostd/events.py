"""What the engine tells: work that it wants done, and what people should know.

What people should know is logged with what to do next; what lasts (a volume or a device without
space) is kept with the open volume, where `volume info` and `pool info` find it. While space is
being freed, a volume may have some and be full again many times a second: the end is logged when
it has lasted a moment, and until then nothing begins anew.

All of it runs on the event loop's thread, and returns at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID
from weakref import WeakKeyDictionary, WeakSet

import structlog

from vhostd.protocol.session import EndKind
from vhostd.storage.pool import Pool
from vhostd.storage.volume import OpenVolume

if TYPE_CHECKING:
    from vhostd.daemon import Daemon

__all__ = ["EngineEvents"]

LASTING_S = 1.0


class EngineEvents:
    """Of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._log = structlog.get_logger()
        self._told_full: WeakSet[OpenVolume | Pool] = WeakSet()
        """Those that were logged to be full, and not yet that they have space again."""
        self._ending: WeakKeyDictionary[OpenVolume | Pool, asyncio.TimerHandle] = (
            WeakKeyDictionary()
        )
        """Of these, those that have space again, since less than a moment."""

    def handle(self, event: dict[str, Any]) -> None:
        """One event; `_native.Engine.take_events` lists them. What is wrong with it is logged."""
        try:
            self._handle(event)
        except Exception:
            self._log.exception("an event of the engine could not be handled", engine_event=event)

    def _handle(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "checkpoint-wanted":
            volume = self._find_open(event)
            if volume is not None:
                self._daemon.checkpoint_soon(volume)
        elif kind == "segment-numbers-wanted":
            for pool in self._on_device(event):
                self._daemon.grant_soon(pool)
        elif kind in ("ring-broken", "memory-lost"):
            self._export_event(event)
        elif kind in ("volume-full", "volume-space-back"):
            self._limit_event(event)
        elif kind in ("device-full", "device-space-back"):
            self._space_event(event)
        elif kind == "device-failed":
            for pool in self._on_device(event):
                self._log.error(
                    "the device failed; its volumes refuse writes until they are attached again",
                    pool=pool.name,
                    device=str(pool.path),
                    reason=event["reason"],
                )
        elif kind == "reclaim-failed":
            self._log.warning(
                "dead space of the volume could not be given back to the file system, so it takes "
                "more than it needs; look at the device",
                volume=self._name_of(event),
                reason=event["reason"],
            )
        elif kind == "corruption":
            details = {k: v for k, v in event.items() if k not in ("kind", "volume")}
            self._log.error(
                "data does not match its checksum; the guest got an I/O error. Run `vhostctl "
                "check`, and restore what it names",
                volume=self._name_of(event),
                **details,
            )
        elif kind == "staging-full":
            self._log.error(
                "the staging directory is full, so writes are refused; make its tmpfs larger, or "
                "engine.staging smaller",
                staging_dir=self._daemon.config.engine.staging_dir,
                reason=event["reason"],
            )
        else:
            self._log.warning("the engine told something unknown", engine_event=event)

    def _export_event(self, event: dict[str, Any]) -> None:
        attachment = self._daemon.attachments.by_export(event["export"])
        if attachment is None:
            return
        self._log.warning(
            "the guest broke its ring"
            if event["kind"] == "ring-broken"
            else "guest memory is gone",
            volume=attachment.name,
            queue=event.get("queue"),
            reason=event["reason"],
        )
        if event["kind"] == "memory-lost":
            self._daemon.end_session_soon(attachment, event["reason"], EndKind.VIOLATION)

    # Space

    def _limit_event(self, event: dict[str, Any]) -> None:
        volume = self._find_open(event)
        if volume is None:
            return
        volume.at_limit = event["kind"] == "volume-full"
        if not volume.at_limit:
            self._tell_end(
                volume, lambda: self._log.info("the volume has space again", volume=volume.name)
            )
            return
        if not self._is_news(volume):
            return
        of_quota = event["limit_bytes"] == volume.row.quota_bytes
        self._log.warning(
            "the volume takes all of its quota, so what its guest writes finds no space; raise "
            "the quota (`vhostctl volume set`), remove snapshots, or discard in the guest"
            if of_quota
            else "the volume takes all that its pool has for it, so what its guest writes finds no "
            "space; raise the pool's quota (`vhostctl pool set`), lower reservations, remove "
            "snapshots, or discard in the guest",
            volume=volume.name,
            limit_bytes=event["limit_bytes"],
            on_full=volume.row.on_full,
        )

    def _space_event(self, event: dict[str, Any]) -> None:
        # Each volume finds out by itself; people are told once a pool.
        full = event["kind"] == "device-full"
        volume = self._find_open(event)
        for pool in self._on_device(event):
            known = any(v.device_full for v in pool.open_volumes())
            if volume is not None:
                volume.device_full = full
            if not full:
                if not any(v.device_full for v in pool.open_volumes()):
                    self._tell_pool_end(pool)
                continue
            if not known and pool not in self._ending:
                # Those that were full have been closed: nothing told of their end.
                self._told_full.discard(pool)
            if self._is_news(pool):
                self._log.error(
                    "the device is full; writes to new space fail until there is room, or wait in "
                    "volumes that pause: free space on its file system, remove snapshots or "
                    "volumes, or discard in guests",
                    pool=pool.name,
                    device=str(pool.path),
                )

    def _tell_pool_end(self, pool: Pool) -> None:
        self._tell_end(pool, lambda: self._log.info("the device has space again", pool=pool.name))

    def _is_news(self, full: OpenVolume | Pool) -> bool:
        ending = self._ending.pop(full, None)
        if ending is not None:
            ending.cancel()
        if full in self._told_full:
            return False
        self._told_full.add(full)
        return True

    def _tell_end(self, full: OpenVolume | Pool, tell: Callable[[], object]) -> None:
        def lasted() -> None:
            del self._ending[full]
            self._told_full.discard(full)
            tell()

        if full in self._told_full and full not in self._ending:
            self._ending[full] = asyncio.get_running_loop().call_later(LASTING_S, lasted)

    # Who is meant

    def _find_open(self, event: dict[str, Any]) -> OpenVolume | None:
        uuid = UUID(bytes=event["volume"])
        found = (pool.find_open(uuid) for pool in self._daemon.pools())
        return next((volume for volume in found if volume is not None), None)

    def _name_of(self, event: dict[str, Any]) -> str:
        uuid = UUID(bytes=event["volume"])
        for pool in self._daemon.pools():
            names = {volume.uuid: volume.name for volume in pool.open_volumes()}
            names |= {snapshot.uuid: snapshot.name for snapshot in pool.open_snapshots()}
            if uuid in names:
                return names[uuid]
        return str(uuid)

    def _on_device(self, event: dict[str, Any]) -> list[Pool]:
        return [pool for pool in self._daemon.pools() if pool.device.index == event["device"]]
