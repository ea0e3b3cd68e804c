"""`vhostctl import` and `export`: whole disks from and to image files.

Data goes through a temporary attachment, the way a guest's would; the daemon ends the attachment by
itself if this process dies.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from vhostd.api.client import Client
from vhostd.cli.common import (
    SIZE,
    State,
    checked_volume,
    common,
    pass_state,
    show_size,
    volume_argument,
)
from vhostd.cli.progress import progress_bar
from vhostd.errors import DeviceError, ExistsError, NotFoundError, UsageError, VhostdError
from vhostd.transfer import copy as copying
from vhostd.transfer import images
from vhostd.transfer.copy import DiskReader, DiskWriter, Extent, FileReader, FileWriter

__all__ = ["export", "import_"]

FORMAT = click.Choice(images.FORMATS)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@volume_argument
@click.option("--format", "image_format", type=FORMAT, help="By default what the name says.")
@click.option("--size", type=SIZE, help="Of the volume; by default that of the disk in the image.")
@click.option(
    "--logical-block-size",
    type=click.Choice(["512", "4096"]),
    default="512",
    show_default=True,
    help="What the guest sees as a sector; for good.",
)
@common
@pass_state
def import_(
    state: State,
    file: Path,
    volume: str,
    image_format: str | None,
    size: int | None,
    logical_block_size: str,
) -> None:
    """Make a volume from an image file. Holes and zeroes take no space in it.

    \b
    Examples:
      vhostctl import debian.qcow2 fast/web1
      vhostctl import disk.raw fast/web2 --size 40G
    """
    name = checked_volume(volume)
    block_bytes = int(logical_block_size)
    fd = images.open_image(file)
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        kind = image_format or images.guess_format(file, existing=True)
        disk_bytes = images.raw_size(fd) if kind == "raw" else images.image_size(file, kind)
        disk_bytes = -(-disk_bytes // block_bytes) * block_bytes
        if disk_bytes == 0:
            raise UsageError(f"{file} is empty; there is no disk in it to import")
        if size is not None and size < disk_bytes:
            raise UsageError(
                f"{file} holds a disk of {show_size(disk_bytes)}, and --size says "
                f"{show_size(size)}; give at least {disk_bytes}"
            )
        if kind == "raw":
            extents = list(copying.file_extents(fd, disk_bytes))
        else:
            extents = images.image_extents(file, kind)
        client = stack.enter_context(state.client())
        client.call(
            "volume.create",
            volume=name,
            size_bytes=size or disk_bytes,
            logical_block_bytes=block_bytes,
        )
        started_s = time.monotonic()
        try:
            written_bytes = _fill(client, state, name, file, kind, fd, extents, block_bytes)
        except BaseException:
            # Half a disk under a good name would be taken for a whole one.
            with contextlib.suppress(VhostdError):
                client.call("volume.remove", volume=name)
            raise
        made = client.call("volume.info", volume=name)
    state.show(
        {
            "volume": made,
            "file": str(file),
            "format": kind,
            "written_bytes": written_bytes,
            "seconds": round(time.monotonic() - started_s, 3),
        },
        f"volume {name} made from {file}: {show_size(made['size_bytes'])}, "
        f"{show_size(written_bytes)} of data",
    )


def _fill(
    client: Client,
    state: State,
    name: str,
    file: Path,
    kind: str,
    fd: int,
    extents: list[Extent],
    block_bytes: int,
) -> int:
    with ExitStack() as stack:
        target = stack.enter_context(_attached(client, name, read_only=False))
        reader: copying.Reader
        if kind == "raw":
            reader = FileReader(fd, file, block_bytes=block_bytes)
        else:
            served = stack.enter_context(images.served_image(file, kind, writable=False))
            reader = DiskReader(stack.enter_context(_disk(served)), str(file))
        progress = stack.enter_context(progress_bar(state, f"import {name}"))
        return copying.copy(reader, DiskWriter(target, f"volume {name}"), extents, progress)


@click.command()
@volume_argument
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "image_format", type=FORMAT, help="By default what the name says.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@common
@pass_state
def export(state: State, volume: str, file: Path, image_format: str | None, force: bool) -> None:
    """Write a volume to an image file: sparse raw, or another format by name or --format.

    The volume must be detached, or attached --read-only. FILE appears when it is whole.

    \b
    Examples:
      vhostctl export fast/web1 web1.raw
      vhostctl export fast/web1 web1.qcow2
    """
    name = checked_volume(volume)
    kind = image_format or images.guess_format(file, existing=False)
    if file.exists() and not force:
        raise ExistsError(f"{file} exists; replace it with --force, or choose another name")
    if not file.parent.is_dir():
        raise NotFoundError(f"{file.parent} does not exist; make that directory first")
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    started_s = time.monotonic()
    with ExitStack() as stack:
        stack.callback(copying.remove_quietly, part)
        client = stack.enter_context(state.client())
        size_bytes = client.call("volume.info", volume=name)["size_bytes"]
        written_bytes = _drain(client, state, name, part, kind, size_bytes)
        _appear(part, file)
    state.show(
        {
            "volume": name,
            "file": str(file),
            "format": kind,
            "size_bytes": size_bytes,
            "written_bytes": written_bytes,
            "seconds": round(time.monotonic() - started_s, 3),
        },
        f"volume {name} written to {file}: {show_size(size_bytes)}, "
        f"{show_size(written_bytes)} of data",
    )


def _drain(client: Client, state: State, name: str, part: Path, kind: str, size_bytes: int) -> int:
    with ExitStack() as stack:
        source = stack.enter_context(_attached(client, name, read_only=True))
        writer: copying.Writer
        if kind == "raw":
            try:
                fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise DeviceError(f"{part} cannot be made: {error.strerror}") from error
            stack.callback(os.close, fd)
            writer = FileWriter(fd, part, size_bytes)
        else:
            images.create_image(part, kind, size_bytes)
            served = stack.enter_context(images.served_image(part, kind, writable=True))
            writer = DiskWriter(stack.enter_context(_disk(served)), str(part))
        progress = stack.enter_context(progress_bar(state, f"export {name}"))
        everything = [Extent(0, size_bytes)]
        return copying.copy(DiskReader(source, f"volume {name}"), writer, everything, progress)


def _appear(part: Path, file: Path) -> None:
    """Durably under its name, or not at all."""
    try:
        with part.open("rb") as whole:
            os.fsync(whole.fileno())
        part.replace(file)
        directory = os.open(file.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise DeviceError(f"{file} cannot be made: {error.strerror}") from error


@contextmanager
def _attached(client: Client, name: str, *, read_only: bool) -> Iterator[Any]:
    """The volume as a disk, over a socket that lasts as long."""
    made = client.call("attach", volume=name, read_only=read_only, temporary=True)
    try:
        with _disk(Path(made["socket"])) as disk:
            yield disk
    finally:
        # The daemon does so itself when the session ends; this waits for it.
        with contextlib.suppress(NotFoundError):
            client.call("detach", volume=name, socket=made["socket"])


@contextmanager
def _disk(socket: Path) -> Iterator[copying.Disk]:
    # Here, and not above: most commands do not need it.
    from vhostd.virtqueue.block import BlockDevice

    with BlockDevice(socket) as disk:
        yield disk
