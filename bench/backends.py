"""The back-ends under test: how each is made ready, started, and stopped.

Each run has a process of its own, so that nothing but the disk's content is carried over. Listening
sockets are made here and handed over where the back-end can take one, or else its word that it is
ready is awaited: nothing sleeps and hopes.
"""

import contextlib
import os
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from bench import loadgen

__all__ = [
    "Backend",
    "BackendError",
    "QsdFile",
    "QsdNull",
    "Running",
    "Vhostd",
    "all_backends",
    "await_ready",
    "stopped_at_the_end",
]

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 60.0


class BackendError(Exception):
    """A back-end could not be made ready, started or stopped."""


@dataclass(frozen=True)
class Running:
    """A back-end that is listening."""

    pid: int
    socket: Path


def _version(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


@contextlib.contextmanager
def stopped_at_the_end(process: "subprocess.Popen[bytes]", name: str) -> Iterator[None]:
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise BackendError(f"{name} did not end within {STOP_TIMEOUT_S:.0f} s") from None
        finally:
            if process.stdout is not None:
                process.stdout.close()


def await_ready(
    output: IO[bytes], log: Path, name: str, timeout_s: float = READY_TIMEOUT_S
) -> None:
    """Reads a vhostd's standard output until the line `ready: SOCKET`.

    Raises BackendError.
    """
    seen = b""
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while not any(line.startswith(b"ready: ") for line in seen.splitlines()):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not selector.select(left_s):
                raise BackendError(f"{name} is not ready after {timeout_s:.0f} s")
            chunk = os.read(output.fileno(), 4096)
            if not chunk:
                tail = log.read_text(errors="replace")[-2000:] if log.exists() else ""
                raise BackendError(f"{name} ended before it was ready: {tail}")
            seen += chunk


class Backend(ABC):
    """A contender. `name` is its key in results."""

    name: str
    page_cache: str
    """What of the page cache its figures contain, in words for the reader."""
    warm_reads: bool = False
    """Reads are measured with the region in the page cache: that is what this one is for."""
    stores_data: ClassVar[bool] = True

    @abstractmethod
    def version(self) -> str | None:
        """None: not installed."""

    @abstractmethod
    def create(self, directory: Path, size_bytes: int) -> None:
        """Makes an empty, thin disk in an empty directory."""

    @abstractmethod
    def serving(
        self, directory: Path, size_bytes: int, core: int, *, fill: bool = False
    ) -> contextlib.AbstractContextManager[Running]:
        """Serves the disk from `core` until the context ends. `fill`: the load is to fill it."""

    def fill(self, directory: Path, size_bytes: int, core: int, binary: Path) -> None:
        """Writes the whole disk once in order, past the page cache, so that all is allocated."""
        arguments = ["--workload", "fill", "--block", "128K", "--depth", "8"]
        with self.serving(directory, size_bytes, core, fill=True) as running:
            result = loadgen.run(binary, running.socket, *arguments)
        if result.errors.total:
            raise BackendError(f"{self.name}: {result.errors.total} writes failed in filling")


class _Qsd(Backend):
    """qemu-storage-daemon, with an iothread as one does who wants speed of it."""

    def version(self) -> str | None:
        return _version(["qemu-storage-daemon", "--version"])

    @abstractmethod
    def blockdevs(self, directory: Path, size_bytes: int, *, fill: bool) -> list[str]:
        """The last one has node-name `disk`."""

    @contextlib.contextmanager
    def serving(
        self, directory: Path, size_bytes: int, core: int, *, fill: bool = False
    ) -> Iterator[Running]:
        path = directory / "socket"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener, (directory / "log").open("ab") as log:
            listener.bind(str(path))
            listener.listen()
            command = ["taskset", "-c", str(core), "qemu-storage-daemon"]
            command += ["--object", "iothread,id=io"]
            for blockdev in self.blockdevs(directory, size_bytes, fill=fill):
                command += ["--blockdev", blockdev]
            export = "vhost-user-blk,id=export,node-name=disk,writable=on,iothread=io"
            command += ["--export", f"{export},addr.type=fd,addr.str={listener.fileno()}"]
            process = subprocess.Popen(
                command, pass_fds=[listener.fileno()], stdout=log, stderr=log
            )
        with stopped_at_the_end(process, self.name):
            yield Running(process.pid, path)


class QsdNull(_Qsd):
    """No disk and no data: what the way to a back-end and back costs by itself."""

    name = "qsd-null-co"
    page_cache = "no data is moved at all"
    stores_data = False

    def create(self, directory: Path, size_bytes: int) -> None:
        pass

    def blockdevs(self, directory: Path, size_bytes: int, *, fill: bool) -> list[str]:
        return [f"driver=null-co,node-name=disk,size={size_bytes},read-zeroes=off"]


class QsdFile(_Qsd):
    """An image file by io_uring, with or without the page cache."""

    def __init__(self, image: str, *, direct: bool) -> None:
        self.image = image
        self.direct = direct
        self.warm_reads = not direct
        self.name = f"qsd-{image}-{'direct' if direct else 'cache'}"
        self.page_cache = (
            "bypassed (O_DIRECT)"
            if direct
            else "used: reads are measured warm, writes go to it until a flush"
        )

    def create(self, directory: Path, size_bytes: int) -> None:
        command = ["qemu-img", "create", "-q", "-f", self.image, str(directory / "image")]
        try:
            subprocess.run([*command, str(size_bytes)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BackendError(f"{self.name}: cannot make an image: {error}") from error

    def blockdevs(self, directory: Path, size_bytes: int, *, fill: bool) -> list[str]:
        # Filled past the page cache always: large folios left by sequential writes would slow
        # later random ones down many times over, which is no fault of this back-end.
        direct = "on" if self.direct or fill else "off"
        file = f"driver=file,node-name=file,filename={directory / 'image'},aio=io_uring"
        return [
            f"{file},cache.direct={direct}",
            f"driver={self.image},node-name=disk,file=file",
        ]


class Vhostd(Backend):
    """vhostd's one-disk form, on a directory."""

    name = "vhostd"
    page_cache = (
        "writes bypass it (O_DIRECT); reads go through it, and find it cold; recent writes are "
        "read from the staging ring in memory"
    )

    def __init__(self, command: str | None = None) -> None:
        beside_python = Path(sys.executable).parent / "vhostd"
        default = str(beside_python) if beside_python.exists() else "vhostd"
        self.command = shlex.split(command or default)

    def version(self) -> str | None:
        version = _version([*self.command, "--version"])
        if version is None and _version([*self.command, "disk", "--help"]) is not None:
            return "of unknown version"
        return version

    def create(self, directory: Path, size_bytes: int) -> None:
        (directory / "disk").mkdir()

    @contextlib.contextmanager
    def serving(
        self, directory: Path, size_bytes: int, core: int, *, fill: bool = False
    ) -> Iterator[Running]:
        path = directory / "socket"
        command = ["taskset", "-c", str(core), *self.command, "disk", str(directory / "disk")]
        command += ["--size", str(size_bytes), "--socket", str(path)]
        with (directory / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        with stopped_at_the_end(process, self.name):
            assert process.stdout is not None
            await_ready(process.stdout, directory / "log", self.name)
            yield Running(process.pid, path)


def all_backends(vhostd_command: str | None = None) -> list[Backend]:
    """Every contender, whether installed or not, in the order of the tables."""
    return [
        Vhostd(vhostd_command),
        QsdFile("raw", direct=True),
        QsdFile("raw", direct=False),
        QsdFile("qcow2", direct=True),
        QsdFile("qcow2", direct=False),
        QsdNull(),
    ]


def remove(directory: Path) -> None:
    """Removes what a back-end left."""
    shutil.rmtree(directory, ignore_errors=True)
