"""vhost-user-blk back-ends as processes: vhostd in its two ways of running, and
qemu-storage-daemon to compare with.

Life of a back-end: made with a place and a size, `start`, then any number of `stop` (SIGTERM,
clean), `kill` (SIGKILL) and `start` again; what was written stays in its place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from .images import REPOSITORY
from .process import HarnessError, Service, tail

__all__ = ["Backend", "DaemonBackend", "QsdBackend", "VhostdBackend", "vhostd_program"]


def allocated_bytes(place: Path) -> int:
    """Disk space taken by a file, or by all files below a directory."""
    paths = [place, *place.rglob("*")] if place.is_dir() else [place]
    return sum(path.stat().st_blocks * 512 for path in paths if path.is_file())


class Backend(ABC):
    """One disk on one socket."""

    kind: str

    def __init__(self, directory: Path, *, size_bytes: int, queues: int = 1) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.size_bytes = size_bytes
        self.queues = queues
        self.socket_path = directory / "disk.sock"
        self.log_path = directory / f"{self.kind}.log"
        self.service: Service | None = None

    @abstractmethod
    def _start(self) -> Service: ...

    @abstractmethod
    def allocated_bytes(self) -> int:
        """Disk space its data takes on the host."""

    def start(self) -> None:
        """Returns when the socket is being listened on."""
        self.service = self._start()

    def stop(self) -> None:
        """A clean end; an exit code other than 0 is an error."""
        if self.service is None:
            return
        service, self.service = self.service, None
        if not service.is_running():
            raise HarnessError(f"{self.kind} ended by itself; its log:\n{tail(self.log_path)}")
        code = service.stop()
        if code != 0:
            raise HarnessError(f"{self.kind} ended with {code}; its log: {self.log_path}")

    def kill(self) -> None:
        if self.service is not None:
            self.service.kill()
            self.service = None


class QsdBackend(Backend):
    """qemu-storage-daemon over a sparse raw file."""

    kind = "qsd"

    def __init__(
        self, directory: Path, *, size_bytes: int, queues: int = 1, image: Path | None = None
    ) -> None:
        """image: a raw file whose contents the disk begins with."""
        super().__init__(directory, size_bytes=size_bytes, queues=queues)
        self.file = directory / "disk.raw"
        if image is not None:
            subprocess.run(["cp", "--sparse=always", image, self.file], check=True)
        with self.file.open("ab") as file:
            file.truncate(size_bytes)

    def _start(self) -> Service:
        program = shutil.which("qemu-storage-daemon")
        if program is None:
            raise HarnessError("qemu-storage-daemon is not installed: run scripts/install-deps")
        self.socket_path.unlink(missing_ok=True)
        command = [
            program,
            "--blockdev",
            f"driver=file,node-name=file,filename={self.file},discard=unmap",
            "--export",
            "type=vhost-user-blk,id=disk,node-name=file,writable=on,"
            f"addr.type=unix,addr.path={self.socket_path},num-queues={self.queues}",
            # Options are carried out in order: the greeting is printed once the export is there.
            "--chardev",
            "stdio,id=monitor",
            "--monitor",
            "chardev=monitor",
        ]
        service = Service("qemu-storage-daemon", command, self.log_path)
        service.wait_for_line('{"QMP"', 30)
        return service

    def allocated_bytes(self) -> int:
        return allocated_bytes(self.file)


def vhostd_program(name: str = "vhostd") -> Path | None:
    """A program of ours: beside $VHOSTD, beside this Python, or in the project's .venv."""
    chosen = os.environ.get("VHOSTD")
    folders = [Path(chosen).parent] if chosen else []
    folders += [Path(sys.executable).parent, REPOSITORY / ".venv" / "bin"]
    return next((folder / name for folder in folders if (folder / name).exists()), None)


class VhostdBackend(Backend):
    """`vhostd disk`, over a directory."""

    kind = "vhostd"

    def __init__(
        self,
        directory: Path,
        *,
        size_bytes: int,
        queues: int = 1,
        arguments: tuple[str, ...] = (),
    ) -> None:
        super().__init__(directory, size_bytes=size_bytes, queues=queues)
        self.store = directory / "store"
        self.arguments = arguments

    def _start(self) -> Service:
        program = vhostd_program()
        if program is None:
            raise HarnessError("vhostd is not installed in .venv: run 'make build'")
        command: list[str | Path] = [
            program, "disk", self.store, "--size", str(self.size_bytes),
            "--socket", self.socket_path, "--queues", str(self.queues), *self.arguments,
        ]  # fmt: skip
        service = Service("vhostd", command, self.log_path)
        try:
            service.wait_for_line("ready: ", 60)
        except HarnessError:
            service.kill()
            raise
        return service

    def allocated_bytes(self) -> int:
        return allocated_bytes(self.store)


class DaemonBackend(Backend):
    """`vhostd serve` with one pool, and in it one volume: empty, or imported from a raw image.

    The volume and its attachment are made when it is started for the first time; later starts
    find them again.
    """

    kind = "daemon"
    POOL = "pool"
    VOLUME = "pool/disk"

    def __init__(
        self,
        directory: Path,
        *,
        size_bytes: int = 0,
        queues: int = 1,
        image: Path | None = None,
    ) -> None:
        """size_bytes: without an image."""
        super().__init__(
            directory, size_bytes=image.stat().st_size if image else size_bytes, queues=queues
        )
        self.image = image
        self.store = directory / "store"
        run_dir = directory / "run"
        self.control_socket = run_dir / "vhostd.sock"
        self.config = directory / "vhostd.toml"
        self.config.write_text(f'state_dir = "{directory / "state"}"\nruntime_dir = "{run_dir}"\n')

    def _start(self) -> Service:
        program = vhostd_program()
        if program is None:
            raise HarnessError("vhostd is not installed in .venv: run 'make build'")
        service = Service("vhostd", [program, "serve", "--config", self.config], self.log_path)
        try:
            service.wait_for_line("ready: ", 60)
            if not self.store.exists():
                self.control("pool", "create", self.POOL, "--device", str(self.store))
                if self.image is not None:
                    self.control("import", str(self.image), self.VOLUME)
                else:
                    self.control("volume", "create", self.VOLUME, "--size", str(self.size_bytes))
                self.attach_disk()
        except HarnessError:
            service.kill()
            raise
        return service

    def attach_disk(self) -> None:
        """Offers the volume on `socket_path`, as from the start; after it was detached."""
        self.control(
            "attach", self.VOLUME,
            "--socket", str(self.socket_path), "--queues", str(self.queues),
        )  # fmt: skip

    def attach(self, name: str) -> Path:
        """Offers another volume or a snapshot; its socket."""
        return Path(self.json("attach", name)["socket"])

    def json(self, *words: str) -> Any:
        """What vhostctl tells programs."""
        return json.loads(self.control("--json", *words))

    def control(self, *words: str) -> str:
        """Runs vhostctl against this daemon; returns what it printed."""
        program = vhostd_program("vhostctl")
        if program is None:
            raise HarnessError("vhostctl is not installed in .venv: run 'make build'")
        done = subprocess.run(
            [program, *words],
            env={**os.environ, "VHOSTD_SOCKET": str(self.control_socket)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise HarnessError(
                f"vhostctl {' '.join(words)} ended with {done.returncode}:\n{done.stderr}"
            )
        return done.stdout

    def allocated_bytes(self) -> int:
        return allocated_bytes(self.store)
