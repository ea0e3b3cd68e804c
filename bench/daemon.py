"""`vhostd serve` as the benchmarks drive it: over its JSON-RPC socket, in a directory of its own.

A daemon keeps everything under one directory, so that a later one on it finds what the former left,
however that ended. Staging is on tmpfs and outlives a kill, as on a real host. One thread.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bench.backends import BackendError, await_ready
from vhostd.api.client import Client
from vhostd.errors import VhostdError

__all__ = ["POOL", "Daemon"]

POOL = "bench"
STOP_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 600.0


class Daemon:
    """A pool with volumes, and the daemon that serves them while one runs."""

    def __init__(
        self,
        command: list[str],
        directory: Path,
        *,
        core: int | None = None,
        map_cache: str = "256M",
        checkpoint_log: str = "256M",
        checkpoint_interval_s: float = 300.0,
    ) -> None:
        self.directory = directory
        self.pool_path = directory / "pool"
        self._command = command
        self._core = core
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._client = Client(directory / "run" / "api.sock", timeout_s=3600)
        self.staging = Path("/dev/shm") / f"vhostd-bench-{os.getpid()}-{directory.name}"
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("run", "state"):
            (directory / name).mkdir(exist_ok=True)
        (directory / "config.toml").write_text(
            f"""
state_dir = "{directory / "state"}"
runtime_dir = "{directory / "run"}"
checkpoint_interval_s = {checkpoint_interval_s}
[engine]
map_cache = "{map_cache}"
checkpoint_log = "{checkpoint_log}"
staging_dir = "{self.staging}"
[api]
socket = "{self._client.path}"
"""
        )

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BackendError(f"vhostd on {self.directory} is not running")
        return self._process.pid

    def start(self) -> float:
        """Starts the daemon; returns the seconds until it was ready.

        Raises BackendError.
        """
        assert self._process is None, "one at a time"
        pinned = [] if self._core is None else ["taskset", "-c", str(self._core)]
        command = [
            *pinned,
            *self._command,
            "serve",
            "--config",
            str(self.directory / "config.toml"),
        ]
        log_path = self.directory / "log"
        begin = time.monotonic()
        self._log = log_path.open("ab")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log)
        self._process = process
        assert process.stdout is not None
        try:
            await_ready(process.stdout, log_path, "vhostd", READY_TIMEOUT_S)
        except BackendError:
            self.kill()
            raise
        return time.monotonic() - begin

    def stop(self) -> None:
        """Ends it cleanly. Raises BackendError if it does not."""
        if self._process is None:
            return
        process = self._process
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise BackendError(f"vhostd did not end within {STOP_TIMEOUT_S:.0f} s") from None
        self._ended()
        if code:
            tail = (self.directory / "log").read_text(errors="replace")[-2000:]
            raise BackendError(f"vhostd ended with status {code}: {tail}")

    def kill(self) -> None:
        """As a crash would end it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._ended()

    def _ended(self) -> None:
        self._client.close()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        if self._log is not None:
            self._log.close()
        self._process = self._log = None

    @contextlib.contextmanager
    def running(self) -> Iterator["Daemon"]:
        """Started, and stopped at the end."""
        self.start()
        try:
            yield self
        except BaseException:
            self.kill()
            raise
        self.stop()

    def remove(self) -> None:
        """Kills what runs, and removes all that was made."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.staging, ignore_errors=True)

    # What is asked of it

    def call(self, method: str, **parameters: Any) -> Any:
        """Raises BackendError with the daemon's words."""
        try:
            return self._client.call(method, **parameters)
        except VhostdError as error:
            raise BackendError(f"vhostd: {method}: {error}") from error

    def control(self, *arguments: str) -> float:
        """Runs `vhostctl`; returns the seconds it took.

        Raises BackendError.
        """
        beside = Path(self._command[0]).with_name("vhostctl")
        program = str(beside) if beside.exists() else "vhostctl"
        command = [program, "--socket", str(self._client.path), *arguments]
        begin = time.monotonic()
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=600)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()
            raise BackendError(f"vhostctl {' '.join(arguments)}: {said}") from error
        except (OSError, subprocess.SubprocessError) as error:
            raise BackendError(f"vhostctl {' '.join(arguments)}: {error}") from error
        return time.monotonic() - begin

    def add(self, volume: str, size_bytes: int) -> Path:
        """Makes the pool if need be, and a volume in it; returns the socket it is attached on."""
        if not self.pool_path.exists():
            self.call("pool.create", pool=POOL, device=str(self.pool_path))
        self.call("volume.create", volume=f"{POOL}/{volume}", size_bytes=size_bytes)
        socket = self.socket(volume)
        self.call("attach", volume=f"{POOL}/{volume}", socket=str(socket))
        return socket

    def socket(self, volume: str) -> Path:
        """Where `volume` is attached, also after a restart."""
        return self.directory / "run" / f"{volume}.disk"

    def stats(self, volume: str) -> dict[str, Any]:
        """The engine's counters of an open volume."""
        volumes: dict[str, dict[str, Any]] = self.call("stats")["volumes"]
        return volumes[f"{POOL}/{volume}"]

    def checkpoint(self, volume: str) -> None:
        self.call("checkpoint", volume=f"{POOL}/{volume}")

    def snapshot(self, volume: str, name: str) -> float:
        """Takes a snapshot; returns the seconds that the call took."""
        begin = time.monotonic()
        self.call("snapshot.create", snapshot=f"{POOL}/{volume}@{name}")
        return time.monotonic() - begin

    def remove_snapshots(self, volume: str, names: list[str] | None = None) -> None:
        """Removes some, or all; their space is freed in the background."""
        self.call("snapshot.remove", volume=f"{POOL}/{volume}", snapshots=names)

    def removing(self, volume: str) -> int:
        """Snapshots that were removed and whose space is not free yet."""
        rows = self.call("snapshot.list", volume=f"{POOL}/{volume}", removing=True)
        return sum(row["state"] == "removing" for row in rows)

    def await_removals(self, volume: str, timeout_s: float = 600.0) -> None:
        """Until the space of removed snapshots is accounted for as dead.

        Raises BackendError.
        """
        deadline = time.monotonic() + timeout_s
        while left := self.removing(volume):
            if time.monotonic() > deadline:
                raise BackendError(f"{left} removed snapshots are not gone after {timeout_s:.0f} s")
            time.sleep(0.05)
