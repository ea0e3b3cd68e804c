"""Work that takes long and that nobody's request waits for: freeing removed snapshots' space, and
making clones independent.

    waiting ─▶ running ─▶ done | failed | stopped

Invariants:
- One job a volume runs at a time, and RUNNING in all; a step of one never holds up a change to
  what exists, but for a change to the same volume, which waits for the step to end (`paused`).
- What is to be freed stands in the catalog (`removing`), so it goes on after a restart; a clone
  that is half independent is told to go on by a person.

All of it runs on the event loop's thread; the work itself in helper threads.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID
from weakref import WeakValueDictionary

import structlog

from vhostd.errors import BusyError, NotFoundError, VhostdError
from vhostd.storage.pool import Pool

__all__ = ["Job", "Jobs"]

RUNNING = 2
KEPT = 64
"""Jobs that have ended and are still listed."""


class _StoppedError(Exception):
    """A job was told to stop."""


@dataclass(eq=False, slots=True)
class Job:
    """One piece of work. done_bytes is set by the thread that does it."""

    id: int
    kind: str
    volume: str
    uuid: UUID
    state: str = "waiting"
    done_bytes: int = 0
    total_bytes: int = 0
    error: str | None = None
    result: list[str] | None = None
    stopping: bool = False

    def describe(self) -> dict[str, Any]:
        """The job for programs; docs/json-output.md."""
        return {
            "id": self.id,
            "kind": self.kind,
            "volume": self.volume,
            "state": self.state,
            "done_bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "error": self.error,
            "result": self.result,
        }

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        """Called by the work now and then; ends it if it is to stop."""
        self.done_bytes, self.total_bytes = done_bytes, total_bytes
        if self.stopping:
            raise _StoppedError


class Jobs:
    """The jobs of a daemon."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._ids = itertools.count(1)
        self._locks: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self._running = asyncio.Semaphore(RUNNING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._log = structlog.get_logger()

    def all(self) -> list[Job]:
        """Those that have not ended, and the last that have."""
        return list(self._jobs.values())

    def get(self, job_id: int) -> Job:
        """One job.

        Raises:
            NotFoundError: there is none, or it has ended long ago.
        """
        if job_id not in self._jobs:
            raise NotFoundError(f"job {job_id} is not known; `job.list` tells which are")
        return self._jobs[job_id]

    def of(self, uuid: UUID) -> list[Job]:
        """Those of a volume that have not ended."""
        return [
            job for job in self.all() if job.uuid == uuid and job.state in ("waiting", "running")
        ]

    def stop_job(self, job_id: int) -> Job:
        """Tells a job to end at its next step."""
        job = self.get(job_id)
        job.stopping = True
        return job

    async def stop(self) -> None:
        """Ends all jobs at their next steps, and waits for that."""
        self._stopping = True
        for job in self.all():
            job.stopping = True
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @asynccontextmanager
    async def paused(self, uuid: UUID) -> AsyncIterator[None]:
        """No job of the volume runs within; freeing space goes on afterwards.

        Raises:
            BusyError: it is being flattened.
        """
        for job in self.of(uuid):
            if job.kind == "flatten":
                raise BusyError(
                    f"volume {job.volume} is being flattened; wait, or `vhostctl volume flatten "
                    f"{job.volume} --stop` first"
                )
        async with self._lock(uuid):
            yield

    def _lock(self, uuid: UUID) -> asyncio.Lock:
        lock = self._locks.get(uuid)
        if lock is None:
            lock = self._locks[uuid] = asyncio.Lock()
        return lock

    # Kinds of work

    def release(self, pool: Pool, uuid: UUID, volume: str) -> Job | None:
        """Frees the space of a volume's removed snapshots. None: that is under way already."""
        for job in self.of(uuid):
            if job.kind == "release":
                return None

        async def work(job: Job) -> None:
            job.result = []
            while not job.stopping:
                async with self._lock(uuid):
                    freed = await asyncio.to_thread(pool.snapshots.release_next, uuid)
                if freed is None:
                    return
                job.result.append(str(freed.uuid))

        return self._start("release", uuid, volume, work)

    def release_all(self, pool: Pool) -> None:
        """Goes on with all that is to be freed in a pool."""
        for name, uuid in pool.catalog.snapshots.removing():
            self.release(pool, uuid, f"{pool.name}/{name}")

    def flatten(self, pool: Pool, volume: str) -> Job:
        """Makes a clone independent.

        Raises:
            UsageError: it is no clone.
            BusyError: that is under way already.
        """
        row = pool.snapshots.check_clone(volume)
        name = f"{pool.name}/{volume}"
        for job in self.of(row.uuid):
            if job.kind == "flatten":
                raise BusyError(f"volume {name} is being flattened already, as job {job.id}")

        async def work(job: Job) -> None:
            async with self._lock(row.uuid):
                job.result = await asyncio.to_thread(pool.snapshots.flatten, row.uuid, job.progress)

        return self._start("flatten", row.uuid, name, work)

    def _start(
        self, kind: str, uuid: UUID, volume: str, work: Callable[[Job], Awaitable[None]]
    ) -> Job:
        job = Job(next(self._ids), kind, volume, uuid, stopping=self._stopping)
        self._jobs[job.id] = job
        ended = [j.id for j in self.all() if j.state not in ("waiting", "running")]
        for old in ended[: max(0, len(ended) - KEPT)]:
            del self._jobs[old]
        task = asyncio.ensure_future(self._run(job, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[None]]) -> None:
        log = self._log.bind(volume=job.volume, job=job.kind)
        try:
            async with self._running:
                job.progress(0, 0)
                job.state = "running"
                await work(job)
        except _StoppedError:
            job.state = "stopped"
        except VhostdError as error:
            job.state, job.error = "failed", str(error)
            log.error(  # noqa: TRY400 -- the message says all
                "background work failed; it is tried again later", error=str(error)
            )
        except Exception as error:
            job.state, job.error = "failed", f"a defect: {error}"
            log.exception("background work failed")
        else:
            job.state = "stopped" if job.stopping else "done"
            log.info("background work has ended", state=job.state)
