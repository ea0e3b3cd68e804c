"""Keeps volumes within their limits, and tells people in time that a pool fills up.

Limits depend on what all volumes of a pool take, which changes as guests write. So while volumes
are open it looks again: after a second if something changed, later and later if not, and at once
after checkpoints and changes that people make. Nothing runs while no volume is open.

All of it runs on the event loop's thread; what blocks goes to helper threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from vhostd.errors import VhostdError
from vhostd.storage.pool import Pool

__all__ = ["SpaceKeeper"]

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0


class SpaceKeeper:
    """Of one daemon.

    Args:
        pools: those that are open.
    """

    def __init__(self, pools: Callable[[], list[Pool]]) -> None:
        self._pools = pools
        self._changed = asyncio.Event()
        self._log = structlog.get_logger()

    def look(self) -> None:
        """Something changed that limits depend on."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        wait_s: float | None = None
        seen: dict[str, int] = {}
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            if self._changed.is_set():
                wait_s = FIRST_WAIT_S
                self._changed.clear()
            now: dict[str, int] = {}
            for pool in self._pools():
                if pool.open_volumes():
                    with contextlib.suppress(VhostdError):
                        now[pool.name] = await asyncio.to_thread(self._look_at, pool)
            if not now:
                wait_s = None
            elif now != seen:
                wait_s = FIRST_WAIT_S
            else:
                wait_s = min(LONGEST_WAIT_S, 2 * (wait_s or FIRST_WAIT_S))
            seen = now

    def _look_at(self, pool: Pool) -> int:
        """In a helper thread. What changes when volumes grow."""
        pool.space.apply_limits()
        crossed = pool.space.crossed()
        if crossed == "full":
            info = pool.space.pool()
            self._log.warning(
                "the pool is nearly full; free space, make the device larger, or give volumes "
                "quotas, before writes find no space",
                pool=pool.name,
                used_percent=info["used_percent"],
                warn_percent=info["warn_percent"],
                free_bytes=info["free_bytes"],
                overcommit_percent=info["overcommit_percent"],
            )
        elif crossed == "room":
            self._log.info("the pool has room again", pool=pool.name)
        free_bytes, _ = pool.device.space()
        # Other things on the file system move it a little all the time.
        return free_bytes >> 20
