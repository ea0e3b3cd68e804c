"""`vhostctl import` and `export`: whole disks from and to image files, and snapshots as streams."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click

from vhostd.api.client import Client
from vhostd.cli import streams
from vhostd.cli.attached import appearing, attached, open_disk
from vhostd.cli.common import (
    SIZE,
    State,
    checked_volume,
    common,
    complete_volume,
    pass_state,
    show_size,
)
from vhostd.cli.progress import progress_bar
from vhostd.errors import DeviceError, UsageError, VhostdError
from vhostd.storage.names import SnapshotName, VolumeName, parse_volume_or_snapshot
from vhostd.transfer import copy as copying
from vhostd.transfer import images
from vhostd.transfer.copy import DiskReader, DiskWriter, Extent, FileReader, FileWriter

__all__ = ["export", "import_"]

STREAM = "stream"
GAP_BYTES = 256 << 10
"""Less that is not mapped between data is read along with it."""
FORMAT = click.Choice([*images.FORMATS, STREAM])


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.argument("volume", metavar="POOL/VOLUME", required=False, shell_complete=complete_volume)
@click.option("--format", "image_format", type=FORMAT, help="By default what the name says.")
@click.option("--size", type=SIZE, help="Of the volume; by default that of the disk in the image.")
@click.option("--force", is_flag=True, help="Of a stream: roll the volume back first if need be.")
@click.option(
    "--resume-point",
    metavar="POOL/VOLUME",
    shell_complete=complete_volume,
    help="Print what `export --resume` takes to continue a stream that broke.",
)
@click.option(
    "--abandon",
    metavar="POOL/VOLUME",
    shell_complete=complete_volume,
    help="Give up a stream that broke, and what came of it.",
)
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
    file: Path | None,
    volume: str | None,
    image_format: str | None,
    size: int | None,
    force: bool,
    resume_point: str | None,
    abandon: str | None,
    logical_block_size: str,
) -> None:
    """Make a volume from an image file, or receive a stream of a snapshot. FILE may be `-` for
    a stream. Holes and zeroes take no space.

    \b
    Examples:
      vhostctl import debian.qcow2 fast/web1
      vhostctl import disk.raw fast/web2 --size 40G
      vhostctl import monday.vhs fast/web3
      ssh host vhostctl export fast/web3@tue - --from-snapshot mon | vhostctl import - fast/web3
      vhostctl import --resume-point fast/web3
    """
    if resume_point is not None or abandon is not None:
        if file is not None or (resume_point is not None and abandon is not None):
            raise UsageError("--resume-point and --abandon take a volume, and stand alone")
        if resume_point is not None:
            streams.resume_point(state, checked_volume(resume_point))
        elif abandon is not None:
            streams.abandon(state, checked_volume(abandon))
        return
    if file is None or volume is None:
        raise UsageError("say from which FILE to which POOL/VOLUME; `vhostctl import --help`")
    name = checked_volume(volume)
    if _is_stream(file, image_format):
        if size is not None:
            raise UsageError("a stream says the size of its volume; leave out --size")
        streams.import_stream(state, file, name, force=force)
        return
    if force:
        raise UsageError("--force is for streams; an image makes a volume that is not there yet")
    _import_image(state, file, name, image_format, size, int(logical_block_size))


def _is_stream(file: Path, image_format: str | None) -> bool:
    """Only streams can come from a pipe, and go to one."""
    if str(file) == "-":
        if image_format not in (None, STREAM):
            raise UsageError(f"{image_format} cannot go through a pipe; --format stream can")
        return True
    return image_format == STREAM or (image_format is None and file.suffix == streams.SUFFIX)


def _import_image(
    state: State,
    file: Path,
    name: str,
    image_format: str | None,
    size: int | None,
    block_bytes: int,
) -> None:
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
        target = stack.enter_context(attached(client, name, read_only=False))
        reader: copying.Reader
        if kind == "raw":
            reader = FileReader(fd, file, block_bytes=block_bytes)
        else:
            served = stack.enter_context(images.served_image(file, kind, writable=False))
            reader = DiskReader(stack.enter_context(open_disk(served)), str(file))
        progress = stack.enter_context(progress_bar(state, f"import {name}"))
        writer = DiskWriter(target, f"volume {name}")
        total_bytes = sum(extent.len_bytes for extent in extents)
        return copying.copy(reader, writer, extents, progress, total_bytes=total_bytes)


@click.command()
@click.argument("volume", metavar="POOL/VOLUME[@SNAPSHOT]", shell_complete=complete_volume)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--format", "image_format", type=FORMAT, help="By default what the name says.")
@click.option(
    "--from-snapshot", metavar="SNAPSHOT", help="A stream of what has changed since this one."
)
@click.option("--resume", metavar="TOKEN", help="Continue a stream that broke, from there.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@common
@pass_state
def export(
    state: State,
    volume: str,
    file: Path,
    image_format: str | None,
    from_snapshot: str | None,
    resume: str | None,
    force: bool,
) -> None:
    """Write a volume or a snapshot to an image file: sparse raw, or another format by name or
    --format. Or a snapshot as a stream, for `vhostctl import`; FILE may be `-` then.

    A volume must be detached, or attached --read-only; a snapshot can always be exported. FILE
    appears when it is whole.

    \b
    Examples:
      vhostctl export fast/web1 web1.raw
      vhostctl export fast/web1@monday web1.qcow2
      vhostctl export fast/web1@monday monday.vhs
      vhostctl export fast/web1@tue - --from-snapshot monday | ssh host vhostctl import - slow/web1
    """
    name = parse_volume_or_snapshot(volume)
    if _is_stream(file, image_format) or from_snapshot is not None or resume is not None:
        if image_format not in (None, STREAM):
            raise UsageError(
                f"--from-snapshot and --resume are for streams, and {image_format} is an image; "
                "leave out --format"
            )
        streams.export_stream(
            state, volume, file, from_snapshot=from_snapshot, resume=resume, force=force
        )
        return
    kind = image_format or images.guess_format(file, existing=False)
    started_s = time.monotonic()
    with ExitStack() as stack:
        part = stack.enter_context(appearing(file, force=force))
        client = stack.enter_context(state.client())
        size_bytes = _size_of(client, name)
        written_bytes = _drain(client, state, name, part, kind, size_bytes)
    what = "snapshot" if isinstance(name, SnapshotName) else "volume"
    state.show(
        {
            "volume": str(name),
            "file": str(file),
            "format": kind,
            "size_bytes": size_bytes,
            "written_bytes": written_bytes,
            "seconds": round(time.monotonic() - started_s, 3),
        },
        f"{what} {name} written to {file}: {show_size(size_bytes)}, "
        f"{show_size(written_bytes)} of data",
    )


def _size_of(client: Client, name: VolumeName | SnapshotName) -> int:
    if isinstance(name, SnapshotName):
        found = client.call("snapshot.info", snapshot=str(name))
    else:
        found = client.call("volume.info", volume=str(name))
    size_bytes: int = found["size_bytes"]
    return size_bytes


def _drain(
    client: Client,
    state: State,
    name: VolumeName | SnapshotName,
    part: Path,
    kind: str,
    size_bytes: int,
) -> int:
    with ExitStack() as stack:
        source = stack.enter_context(attached(client, str(name), read_only=True))
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
            writer = DiskWriter(stack.enter_context(open_disk(served)), str(part))
        progress = stack.enter_context(progress_bar(state, f"export {name}"))
        mapped = copying.close_together(_mapped(client, name, size_bytes), GAP_BYTES)
        reader = DiskReader(source, str(name))
        return copying.copy(reader, writer, mapped, progress, total_bytes=size_bytes)


def _mapped(client: Client, name: VolumeName | SnapshotName, size_bytes: int) -> Iterator[Extent]:
    """The parts that are not known to be zeroes."""
    for offset_bytes, len_bytes, _ in streams.changed_ranges(client, name, None):
        end = min(offset_bytes + len_bytes, size_bytes)
        if offset_bytes < end:
            yield Extent(offset_bytes, end - offset_bytes)
