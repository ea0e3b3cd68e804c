"""Runs the matrix: fresh disks a round, contenders interleaved, each run in a process of its own.

Within a round every cell is run for all back-ends one after the other, and their order turns from
round to round, so that a change of the machine meets all of them alike.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench import loadgen, stats
from bench.backends import Backend, BackendError, remove
from bench.machine import drop_caches
from bench.matrix import Cell, Mode

__all__ = ["Failure", "Run", "Runner"]

Say = Callable[[str], None]


class Run(msgspec.Struct, frozen=True):
    """One run of one back-end under one load."""

    backend: str
    cell: str
    round: int
    state: str
    noise: list[str]
    caches_dropped: bool
    result: loadgen.Result


class Failure(msgspec.Struct, frozen=True):
    """A run that gave no figure, and why."""

    backend: str
    cell: str
    round: int
    reason: str


class Runner:
    def __init__(
        self,
        *,
        backends: Sequence[Backend],
        mode: Mode,
        scratch: Path,
        binary: Path,
        cores: tuple[int, int],
        say: Say,
    ) -> None:
        self.backends = list(backends)
        self.mode = mode
        self.scratch = scratch
        self.binary = binary
        self.backend_core, self.frontend_core = cores
        self.say = say
        self.runs: list[Run] = []
        self.failures: list[Failure] = []

    def run(self) -> None:
        """Runs everything; what fails is kept in `failures` and stops nothing else."""
        for number in range(self.mode.repeats):
            turn = number % len(self.backends)
            order = self.backends[turn:] + self.backends[:turn]
            try:
                self._round(number, order)
            finally:
                for backend in order:
                    remove(self._directory(backend))

    def _directory(self, backend: Backend) -> Path:
        return self.scratch / f"bench-{backend.name}"

    def _round(self, number: int, order: Sequence[Backend]) -> None:
        filled = []
        for backend in order:
            try:
                self._create(backend, fill=True)
            except (BackendError, loadgen.LoadgenError) as error:
                self._failed(backend, "fill", number, str(error))
            else:
                filled.append(backend)
        for cell in self.mode.cells:
            if cell.thin:
                continue
            for backend in filled:
                self._until_quiet(number, backend, cell)
        for backend in order:
            remove(self._directory(backend))
        for cell in self.mode.cells:
            if not cell.thin:
                continue
            for backend in (backend for backend in order if backend.stores_data):
                try:
                    self._create(backend, fill=False)
                    self._one(number, backend, cell)
                except BackendError as error:
                    self._failed(backend, cell.name, number, str(error))
                remove(self._directory(backend))

    def _create(self, backend: Backend, *, fill: bool) -> None:
        directory = self._directory(backend)
        remove(directory)
        directory.mkdir(parents=True)
        backend.create(directory, self.mode.region_bytes)
        if fill and backend.stores_data:
            backend.fill(directory, self.mode.region_bytes, self.backend_core, self.binary)

    def _failed(self, backend: Backend, cell: str, number: int, reason: str) -> None:
        self.failures.append(Failure(backend.name, cell, number, reason))
        self.say(f"{backend.name} {cell}: failed: {reason}")

    def _until_quiet(self, number: int, backend: Backend, cell: Cell) -> None:
        """Runs again what was noisy, a bounded number of times; every run is kept.

        Chosen by what others did on the machine, never by the figure itself.
        """
        for _ in range(1 + self.mode.retries):
            run = self._one(number, backend, cell)
            if run is None or not run.noise:
                return

    def _one(self, number: int, backend: Backend, cell: Cell) -> Run | None:
        # Nothing is left of former runs in the page cache, dirty or clean.
        dropped = drop_caches()
        directory, size = self._directory(backend), self.mode.region_bytes
        try:
            with backend.serving(directory, size, self.backend_core) as running:
                if cell.reads and backend.warm_reads:
                    # In random order: sequential reads would leave large folios.
                    warm = ["--workload", "readonce", "--depth", "32"]
                    loadgen.run(self.binary, running.socket, *warm)
                result = loadgen.run(
                    self.binary,
                    running.socket,
                    *cell.arguments(),
                    *("--duration", str(self.mode.seconds)),
                    *("--warm-up", str(self.mode.warm_up_s)),
                    *("--core", str(self.frontend_core)),
                    *("--pingpong", f"{self.backend_core},{self.frontend_core}"),
                    *("--backend-pid", str(running.pid)),
                    *("--seed", str(number + 1)),
                )
        except (BackendError, loadgen.LoadgenError) as error:
            self._failed(backend, cell.name, number, str(error))
            return None
        if result.errors.total:
            reason = f"{result.errors.total} requests failed"
            self._failed(backend, cell.name, number, reason)
            return None
        run = judge(result, backend.name, cell.name, number, dropped=dropped)
        self.runs.append(run)
        self.say(
            f"round {number + 1} {cell.name:12} {backend.name:16} "
            f"{result.requests_per_s:12,.0f}/s  {run.state}"
            + (f"  noisy: {'; '.join(run.noise)}" if run.noise else "")
        )
        return run


def judge(result: loadgen.Result, backend: str, cell: str, number: int, *, dropped: bool) -> Run:
    """Adds what the machine's state and noise make of a result."""
    before, after = result.round_trip_before, result.round_trip_after
    state = "unknown"
    if before is not None and after is not None:
        state = stats.core_state(before.median_ns, after.median_ns)
    cpu = result.cpu
    noise = stats.noise(
        busy_ns=cpu.machine_busy_ns,
        own_ns=(cpu.backend_ns or 0) + cpu.frontend_ns,
        steal_ns=cpu.machine_steal_ns,
        elapsed_s=result.elapsed_s,
    )
    return Run(backend, cell, number, state, noise, dropped, result)
