"""Image files of other formats, read and written by QEMU's own tools.

`qemu-storage-daemon` offers the image on a vhost-user socket that we made, so import and export use
one kind of disk at both ends and no temporary space; `qemu-img` tells size and holes. Both must be
installed for formats other than raw. One thread.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from vhostd.errors import (
    DeviceError,
    ExistsError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from vhostd.transfer.copy import Extent

__all__ = ["FORMATS", "create_image", "guess_format", "image_extents", "image_size", "served_image"]

FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc")
_SUFFIXES = {
    ".qcow2": "qcow2",
    ".vmdk": "vmdk",
    ".vdi": "vdi",
    ".vhdx": "vhdx",
    ".vhd": "vpc",
}
_MAGICS = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx"}
TOOL_TIMEOUT_S = 600
STOP_TIMEOUT_S = 600


def guess_format(path: Path, *, existing: bool) -> str:
    """The format that a file's name says.

    Raises:
        UsageError: the name says raw, and the content looks like something else. What a guest has
            written into a raw disk must not decide how it is read.
    """
    by_name = _SUFFIXES.get(path.suffix.lower(), "raw")
    if not existing or by_name != "raw":
        return by_name
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        # Whoever opens it next says what is wrong with it.
        return by_name
    for magic, found in _MAGICS.items():
        if head.startswith(magic):
            raise UsageError(
                f"{path} looks like {found}, and its name does not say so; say which it is with "
                f"--format raw or --format {found}"
            )
    return by_name


def image_size(path: Path, image_format: str) -> int:
    """Bytes of the disk in an image."""
    size: int = _qemu_img_json("info", path, image_format)["virtual-size"]
    return size


def image_extents(path: Path, image_format: str) -> list[Extent]:
    """The parts of the disk that are not known to be zero."""
    return [
        Extent(row["start"], row["length"])
        for row in _qemu_img_json("map", path, image_format)
        if row["data"] and not row["zero"]
    ]


def create_image(path: Path, image_format: str, size_bytes: int) -> None:
    """Makes an empty image.

    Raises:
        ExistsError: the file exists.
    """
    if path.exists():
        raise ExistsError(f"{path} exists; remove it, or choose another name")
    _run("qemu-img", "create", "-q", "-f", image_format, str(path), str(size_bytes))


@contextmanager
def served_image(path: Path, image_format: str, *, writable: bool) -> Iterator[Path]:
    """The image behind a vhost-user socket, while the context lasts.

    Raises:
        DeviceError: QEMU could not open it; or not close it, when it was writable.
        UnsupportedError: qemu-storage-daemon is not installed.
    """
    tool = _tool("qemu-storage-daemon")
    with tempfile.TemporaryDirectory(prefix="vhostd-") as directory:
        socket_path = Path(directory) / "image.sock"
        # We listen, and QEMU accepts: so connecting needs no waiting for QEMU to be ready.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(socket_path))
            listener.listen(1)
            file = {"driver": "file", "filename": str(path.absolute()), "node-name": "file"}
            node = {"driver": image_format, "file": "file", "node-name": "image"}
            export = {
                "type": "vhost-user-blk",
                "id": "export",
                "node-name": "image",
                "writable": writable,
                "num-queues": 1,
                "addr": {"type": "fd", "str": str(listener.fileno())},
            }
            read_only = {"read-only": not writable}
            process = subprocess.Popen(
                [
                    tool,
                    *("--blockdev", _json(file | read_only)),
                    *("--blockdev", _json(node | read_only | {"discard": "unmap"})),
                    *("--export", _json(export)),
                ],
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        clean = False
        try:
            yield socket_path
            clean = True
        except UnavailableError as error:
            # It said why it ended, if it did.
            process.terminate()
            _, said = process.communicate(timeout=STOP_TIMEOUT_S)
            reason = said.decode(errors="replace").strip() or str(error)
            raise DeviceError(f"{path} cannot be used as {image_format}: {reason}") from error
        finally:
            _stop(process, path, must_be_clean=writable and clean)


def _stop(process: subprocess.Popen[bytes], path: Path, *, must_be_clean: bool) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        _, said = process.communicate(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        said = b"it did not end"
    if must_be_clean and process.returncode != 0:
        raise DeviceError(f"{path} was not written wholly: {said.decode(errors='replace').strip()}")


def _json(value: dict[str, Any]) -> str:
    return msgspec.json.encode(value).decode()


def _qemu_img_json(verb: str, path: Path, image_format: str) -> Any:
    # A path is never taken for QEMU's own syntax (`json:{…}`, `nbd:…`).
    return msgspec.json.decode(
        _run("qemu-img", verb, "--output=json", "-f", image_format, f"file:{path.absolute()}")
    )


def _run(name: str, *arguments: str) -> bytes:
    try:
        done = subprocess.run(
            [_tool(name), *arguments],
            capture_output=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=TOOL_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{name} {arguments[0]} took more than {TOOL_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise DeviceError(done.stderr.decode(errors="replace").strip() or f"{name} failed")
    return done.stdout


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UnsupportedError(
            f"formats other than raw need {name}, which is not installed; install QEMU's tools "
            "(qemu-utils on Debian), or convert the image to raw"
        )
    return found


def open_image(path: Path) -> int:
    """A descriptor of an image for reading.

    Raises:
        NotFoundError, DeviceError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist; check the path of the image") from error
    except OSError as error:
        raise DeviceError(f"{path} cannot be read: {error.strerror}") from error


def raw_size(fd: int) -> int:
    """Bytes of a raw file or block device."""
    with contextlib.suppress(OSError):
        return os.lseek(fd, 0, os.SEEK_END)
    return 0
