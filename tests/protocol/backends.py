"""Back-ends for the suite: how each is started, looked at and stopped.

A `Backend` is a running process (or a socket that somebody else serves) with one disk. Its disk's
content is whatever the test before left. Used by the test's thread only.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vhostd.api.client import Client
from vhostd.virtqueue.block import BlockDevice
from vhostd.virtqueue.frontend import Frontend

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0


class BackendMissingError(Exception):
    """The executable of a back-end is not there, or does not start."""


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """The disk a test wants."""

    size_bytes: int = 64 << 20
    block_bytes: int = 512
    queues: int = 4
    read_only: bool = False


class Backend(ABC):
    """A disk at `path`. `kind` is a word of `--backends`, or `socket`."""

    kind: str
    timeout_s = 20.0

    def __init__(self, path: Path, spec: DiskSpec) -> None:
        self.path = path
        self.spec = spec

    def device(self, **options: Any) -> BlockDevice:
        """A connected block device; close it before the next one is opened."""
        options.setdefault("timeout_s", self.timeout_s)
        return BlockDevice(self.path, **options)

    def frontend(self) -> Frontend:
        """A bare connection."""
        return Frontend(self.path, timeout_s=self.timeout_s)

    @property
    def is_ours(self) -> bool:
        """Whether it is built of this project's protocol code, with its limits and strictness."""
        return self.kind in {"vhostd", "reference"}

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """Of the process, if it is known."""

    @abstractmethod
    def stop(self) -> None:
        """Ends it and waits for that."""

    def is_alive(self) -> bool:
        return self.pid is not None

    def open_files(self) -> list[str]:
        """What the descriptors of the process are, sorted; without the log's segments, which the
        engine opens and closes as it likes (and within bounds)."""
        found = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            # It may be closed meanwhile.
            with contextlib.suppress(OSError):
                found.append(str(fd.readlink()))
        return sorted(re.sub(r"\d{3,}", "N", name) for name in found if "/segments" not in name)

    def log_tail(self) -> str:
        return ""


class SocketBackend(Backend):
    """Somebody else's; nothing is known but what it says."""

    kind = "socket"

    @property
    def pid(self) -> int | None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(self.path))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], sys.byteorder)

    def is_alive(self) -> bool:
        return self.path.is_socket()

    def stop(self) -> None:
        pass


class ProcessBackend(Backend):
    """A child process, its output in a file beside the disk."""

    def __init__(self, path: Path, spec: DiskSpec, directory: Path) -> None:
        super().__init__(path, spec)
        self.directory = directory
        self._log = directory / "log"
        self.neighbour = directory / "n"
        """Of those that serve a second disk in the same process: its socket."""
        self.fewest_open_files: list[str] | None = None
        """At the start of any hostile test so far: the session before may still be closing then."""
        self._process = self._start()

    @abstractmethod
    def _start(self) -> subprocess.Popen[bytes]: ...

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process.poll() is None else None

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a command that says `ready:` on its standard output, and waits for that."""
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        said = b""
        while not any(line.startswith(b"ready:") for line in said.splitlines()):
            left_s = deadline - time.monotonic()
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, left_s))
            piece = os.read(process.stdout.fileno(), 4096) if readable else b""
            if not piece:
                process.kill()
                process.wait()
                process.stdout.close()
                raise BackendMissingError(
                    f"`{' '.join(command)}` did not get ready in {START_TIMEOUT_S:g} s; it said "
                    f"{said!r} and logged:\n{self.log_tail()}"
                )
            said += piece
        threading.Thread(target=self._drain, args=(process.stdout,), daemon=True).start()
        return process

    def _drain(self, output: IO[bytes]) -> None:
        """Whatever else it says: nobody must be stopped by a full pipe."""
        with output, self._log.open("ab") as log:
            shutil.copyfileobj(output, log)


def vhostd_executable() -> str:
    """Of the environment the tests run in, or what VHOSTD names."""
    beside = Path(sys.executable).with_name("vhostd")
    found = os.environ.get("VHOSTD") or (str(beside) if beside.exists() else shutil.which("vhostd"))
    if found is None:
        raise BackendMissingError(
            f"there is no vhostd beside {sys.executable} nor on the PATH; install the project "
            "(`make develop`), or set VHOSTD, or choose others with --backends"
        )
    return found


class VhostdBackend(ProcessBackend):
    """`vhostd disk`, with a staging directory of its own."""

    kind = "vhostd"

    def __init__(self, path: Path, spec: DiskSpec, directory: Path) -> None:
        self.config = directory / "config.toml"
        self._staging = Path(tempfile.mkdtemp(prefix="vhostd-test", dir="/dev/shm"))
        self.config.write_text(
            f'state_dir = "{directory}/state"\n'
            f'runtime_dir = "{directory}/run"\n'
            f'[engine]\nstaging_dir = "{self._staging}"\n'
        )
        super().__init__(path, spec, directory)

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self._staging)

    def _start(self) -> subprocess.Popen[bytes]:
        spec = self.spec
        disk = [vhostd_executable(), "disk", str(self.directory / "disk")]
        disk += ["--config", str(self.config)]
        options = ["--size", str(spec.size_bytes), "--socket", str(self.path)]
        options += ["--queues", str(spec.queues)]
        options += ["--logical-block-size", str(spec.block_bytes)]
        if spec.read_only:
            # A disk is made by its first opening, which therefore has to be a writable one.
            first = self._spawn([*disk, *options])
            first.terminate()
            first.wait(STOP_TIMEOUT_S)
            options.append("--read-only")
        return self._spawn([*disk, *options])


class VhostdServeBackend(VhostdBackend):
    """`vhostd serve` with two volumes of one pool, attached; the second is the neighbour's."""

    def _start(self) -> subprocess.Popen[bytes]:
        process = self._spawn([vhostd_executable(), "serve", "--config", str(self.config)])
        with Client(self.directory / "run" / "vhostd.sock") as client:
            client.call("pool.create", pool="pool", device=str(self.directory / "pool"))
            for name, path in (("target", self.path), ("neighbour", self.neighbour)):
                volume = f"pool/{name}"
                client.call("volume.create", volume=volume, size_bytes=self.spec.size_bytes)
                queues = self.spec.queues
                client.call("attach", volume=volume, socket=str(path), queues=queues)
        return process


class ReferenceBackend(ProcessBackend):
    """vhostd's protocol code over the readable device side: `reference_backend`."""

    kind = "reference"

    def _start(self) -> subprocess.Popen[bytes]:
        spec = self.spec
        command = [sys.executable, "-m", "tests.protocol.reference_backend"]
        command += ["--socket", str(self.path), "--size", str(spec.size_bytes)]
        command += ["--queues", str(spec.queues), "--block", str(spec.block_bytes)]
        command += ["--neighbour", str(self.neighbour)]
        return self._spawn([*command, *(["--read-only"] if spec.read_only else [])])


class QsdBackend(ProcessBackend):
    """qemu-storage-daemon over a raw file. It inherits a listening socket: nothing is awaited."""

    kind = "qsd"

    def _start(self) -> subprocess.Popen[bytes]:
        executable = shutil.which("qemu-storage-daemon")
        if executable is None:
            raise BackendMissingError("there is no qemu-storage-daemon on the PATH")
        image = self.directory / "image"
        image.touch()
        os.truncate(image, self.spec.size_bytes)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listener, self._log.open("ab") as log:
            listener.bind(str(self.path))
            listener.listen(1)
            read_only = "on" if self.spec.read_only else "off"
            options = f"discard=unmap,read-only={read_only}"
            command = [
                executable,
                "--blockdev",
                f"driver=file,node-name=file,filename={image},{options}",
                "--blockdev",
                f"driver=raw,node-name=disk,file=file,{options}",
                "--export",
                f"vhost-user-blk,id=disk0,node-name=disk,addr.type=fd,addr.str={listener.fileno()},"
                f"writable={'off' if self.spec.read_only else 'on'},"
                f"num-queues={self.spec.queues},logical-block-size={self.spec.block_bytes}",
            ]
            return subprocess.Popen(command, stdout=log, stderr=log, pass_fds=[listener.fileno()])


WITH_NEIGHBOUR: dict[str, type[ProcessBackend]] = {
    "vhostd": VhostdServeBackend,
    "reference": ReferenceBackend,
}
KINDS: dict[str, type[ProcessBackend]] = {
    "vhostd": VhostdBackend,
    "qsd": QsdBackend,
    "reference": ReferenceBackend,
}


class BackendCache:
    """One running back-end for each kind and disk, for a whole test run: starting costs."""

    def __init__(self, directory: Path, socket_path: Path | None) -> None:
        self._directory = directory
        self._socket_path = socket_path
        self._running: dict[tuple[type[Backend], DiskSpec], Backend] = {}
        self._missing: dict[type[Backend], BackendMissingError] = {}

    def get(self, kind: str, spec: DiskSpec, *, neighbour: bool = False) -> Backend:
        """A running one; a new one if the last has died."""
        if kind == "socket":
            assert self._socket_path is not None
            return SocketBackend(self._socket_path, spec)
        made_by = (WITH_NEIGHBOUR if neighbour else KINDS)[kind]
        found = self._running.get((made_by, spec))
        if found is not None and found.is_alive():
            return found
        if made_by in self._missing:
            raise self._missing[made_by]
        directory = Path(tempfile.mkdtemp(prefix=kind[0], dir=self._directory))
        try:
            found = self._running[made_by, spec] = made_by(directory / "s", spec, directory)
        except BackendMissingError as error:
            # It will not start for the next test either, which should not wait for that.
            self._missing[made_by] = error
            raise
        return found

    def stop(self) -> None:
        with contextlib.ExitStack() as stack:
            for backend in self._running.values():
                stack.callback(backend.stop)
