"""Disks that take snapshots while they are served: vhostd's, and qemu-storage-daemon's two ways.

A disk has a directory of its own and is served by one process at a time; what is written and the
snapshots stay from one serving to the next. `Live.snapshot` is the whole management call, while the
disk is served and whatever load is on it. One thread.

qemu-storage-daemon: qcow2, direct, io_uring, with an iothread, as `bench.backends` has it.
*Internal* snapshots are kept within the image; an *external* one puts a new image over the last,
and the files below are only read from then on. All files of a chain are opened the same way.
"""

import contextlib
import shutil
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench.backends import BackendError, QsdFile, stopped_at_the_end
from bench.daemon import Daemon
from bench.qmp import Monitor
from bench.session import Session

__all__ = ["Disk", "Live", "QsdDisk", "VhostdDisk", "fill", "fill_socket", "overwrite"]

KINDS = ("none", "internal", "external")


class Live(ABC):
    """A disk that is being served."""

    pid: int
    socket: Path

    @abstractmethod
    def snapshot(self, name: str) -> float:
        """Takes one; returns the seconds it took. Raises BackendError."""


class Disk(ABC):
    def __init__(self, name: str, directory: Path, size_bytes: int) -> None:
        self.name = name
        self.directory = directory
        self.size_bytes = size_bytes

    @abstractmethod
    def create(self) -> None:
        """Makes it, empty and thin; what was there before is removed."""

    @abstractmethod
    def serving(self, core: int) -> contextlib.AbstractContextManager[Live]: ...

    @abstractmethod
    def remove(self) -> None: ...


class _VhostdLive(Live):
    def __init__(self, daemon: Daemon) -> None:
        self.pid = daemon.pid
        self.socket = daemon.socket("disk")
        self._daemon = daemon

    def snapshot(self, name: str) -> float:
        return self._daemon.snapshot("disk", name)


class VhostdDisk(Disk):
    """A volume of its own pool, under `vhostd serve`; snapshots by JSON-RPC."""

    def __init__(self, name: str, directory: Path, size_bytes: int, command: list[str]) -> None:
        super().__init__(name, directory, size_bytes)
        self._command = command

    def create(self) -> None:
        self.remove()
        with self._daemon(None).running() as daemon:
            daemon.add("disk", self.size_bytes)

    def _daemon(self, core: int | None) -> Daemon:
        return Daemon(self._command, self.directory, core=core)

    @contextlib.contextmanager
    def serving(self, core: int) -> Iterator[Live]:
        with self._daemon(core).running() as daemon:
            yield _VhostdLive(daemon)

    def remove(self) -> None:
        if self.directory.exists():
            self._daemon(None).remove()


class _QsdLive(Live):
    def __init__(self, disk: "QsdDisk", pid: int, path: Path, monitor: Monitor) -> None:
        self.pid = pid
        self.socket = path
        self._disk = disk
        self._monitor = monitor

    def snapshot(self, name: str) -> float:
        if self._disk.kind == "internal":
            arguments = {"device": self._disk.node, "name": name}
            return self._monitor.call("blockdev-snapshot-internal-sync", arguments)
        return self._disk.add_overlay(self._monitor)


class QsdDisk(Disk):
    """An image under `qemu-storage-daemon`. `kind`: what a snapshot of it is; see above."""

    def __init__(
        self, name: str, directory: Path, size_bytes: int, *, image: str = "qcow2", kind: str
    ) -> None:
        super().__init__(name, directory, size_bytes)
        if kind not in KINDS:
            raise ValueError(kind)
        self.image = image
        self.kind = kind
        self._layers = 1

    @staticmethod
    def version() -> str | None:
        return QsdFile("qcow2", direct=True).version()

    @property
    def node(self) -> str:
        """Of the newest layer."""
        return f"disk{self._layers - 1}"

    def create(self) -> None:
        self.remove()
        self.directory.mkdir(parents=True)
        self._layers = 1
        self._make_image(0)

    def _path(self, layer: int) -> Path:
        return self.directory / f"image{layer}"

    def _make_image(self, layer: int) -> None:
        command = ["qemu-img", "create", "-q", "-f", self.image]
        if layer:
            # -u: it is told how the file below is opened, and opens none itself.
            command += ["-u", "-F", self.image, "-b", str(self._path(layer - 1))]
        try:
            subprocess.run(
                [*command, str(self._path(layer)), str(self.size_bytes)],
                check=True,
                capture_output=True,
            )
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()
            raise BackendError(f"{self.name}: cannot make an image: {said}") from error
        except OSError as error:
            raise BackendError(f"{self.name}: cannot make an image: {error}") from error

    def _blockdevs(self) -> list[dict[str, Any]]:
        nodes: list[dict[str, Any]] = []
        for layer in range(self._layers):
            nodes.append(
                {
                    "driver": "file",
                    "node-name": f"file{layer}",
                    "filename": str(self._path(layer)),
                    "aio": "io_uring",
                    "cache": {"direct": True},
                }
            )
            node: dict[str, Any] = {
                "driver": self.image,
                "node-name": f"disk{layer}",
                "file": f"file{layer}",
                "cache": {"direct": True},
            }
            if self.image == "qcow2":
                node["backing"] = f"disk{layer - 1}" if layer else None
            nodes.append(node)
        return nodes

    def add_overlay(self, monitor: Monitor) -> float:
        """Puts a new layer on top of a disk that is served; the seconds of all its steps but making
        the file."""
        below = self.node
        self._make_image(self._layers)
        self._layers += 1
        file, overlay = self._blockdevs()[-2:]
        seconds = monitor.call("blockdev-add", file)
        seconds += monitor.call("blockdev-add", {**overlay, "backing": None})
        return seconds + monitor.call("blockdev-snapshot", {"node": below, "overlay": self.node})

    @contextlib.contextmanager
    def serving(self, core: int) -> Iterator[Live]:
        path, qmp = self.directory / "socket", self.directory / "qmp"
        for old in (path, qmp):
            old.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((self.directory / "log").open("ab"))
            listeners = []
            for where in (path, qmp):
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(str(where))
                listener.listen()
                listeners.append(listener.fileno())
            command = ["taskset", "-c", str(core), "qemu-storage-daemon"]
            command += ["--object", "iothread,id=io"]
            command += ["--chardev", f"socket,id=qmp,fd={listeners[1]},server=on,wait=off"]
            command += ["--monitor", "chardev=qmp"]
            for blockdev in self._blockdevs():
                command += ["--blockdev", msgspec.json.encode(blockdev).decode()]
            export = f"vhost-user-blk,id=export,node-name={self.node},writable=on,iothread=io"
            command += ["--export", f"{export},addr.type=fd,addr.str={listeners[0]}"]
            process = subprocess.Popen(command, pass_fds=listeners, stdout=log, stderr=log)
            stack.enter_context(stopped_at_the_end(process, self.name))
            # Listening sockets were handed over: to connect is to wait until it is ready.
            monitor = Monitor(qmp)
            stack.callback(monitor.close)
            yield _QsdLive(self, process.pid, path, monitor)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def fill(session: Session, live: Live) -> None:
    """Writes the whole disk once in order, so that all of it is allocated."""
    fill_socket(session, live.socket)


def fill_socket(session: Session, path: Path) -> None:
    """As `fill`, of what is served on a socket."""
    session.load(path, "--workload", "fill", "--block", "128K", "--depth", "8")


def overwrite(session: Session, live: Live, blocks: int, seed: int) -> None:
    """Writes as many random blocks."""
    load = ["--workload", "randwrite", "--depth", "32", "--requests", str(blocks)]
    session.load(live.socket, *load, "--seed", str(seed))
