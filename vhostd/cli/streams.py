"""`vhostctl export --format stream` and `import --format stream`: snapshots as streams of bytes.

docs/streams.md has the format and the way of a stream that broke. Data goes through temporary
attachments: of the snapshot when sending, of the volume when receiving. What the receiving volume
waits for is kept by the daemon, so that it outlives this process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

import click

from vhostd.api.client import Client
from vhostd.cli.attached import appearing, attached, open_disk
from vhostd.cli.common import State, show_size
from vhostd.cli.progress import progress_bar
from vhostd.errors import (
    DeviceError,
    NoSpaceError,
    NotFoundError,
    UsageError,
    VhostdError,
)
from vhostd.storage.names import SnapshotName, VolumeName, parse_snapshot
from vhostd.transfer.copy import DiskReader, DiskWriter
from vhostd.transfer.receiving import receive
from vhostd.transfer.sending import Changed, send
from vhostd.transfer.stream import Counts, ResumePoint, StreamHeader, StreamReader, StreamWriter

__all__ = [
    "SUFFIX",
    "abandon",
    "changed_ranges",
    "export_stream",
    "import_stream",
    "resume_point",
]

SUFFIX = ".vhs"
RANGES_A_CALL = 16384
PIPE_BYTES = 1 << 20


# Sending


def export_stream(
    state: State,
    source: str,
    file: Path,
    *,
    from_snapshot: str | None,
    resume: str | None,
    force: bool,
) -> None:
    """Writes a snapshot, or what differs from an older one, to a file or to stdout."""
    name = _named_snapshot(source)
    point = ResumePoint.parse(resume) if resume is not None else None
    if point is not None and from_snapshot is not None:
        raise UsageError("--resume says what the stream begins with; leave out --from-snapshot")
    to_stdout = str(file) == "-"
    if to_stdout and sys.stdout.isatty():
        raise UsageError("a stream is not for a terminal; send stdout to a pipe or a file")
    started_s = time.monotonic()
    with ExitStack() as stack:
        client = stack.enter_context(state.client())
        header, base = _header(client, name, from_snapshot, point)
        # Both are in use until the stream ends, so that nobody removes one in the middle of it.
        disk = stack.enter_context(attached(client, str(name), read_only=True))
        if base is not None:
            base_name = SnapshotName(name.pool, name.volume, base)
            stack.enter_context(attached(client, str(base_name), read_only=True))
        if to_stdout:
            fd = sys.stdout.fileno()
        else:
            part = stack.enter_context(appearing(file, force=force))
            with _os_errors(file):
                fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
        progress = stack.enter_context(progress_bar(state, f"export {name}"))
        writer = StreamWriter(_writing(fd, file), header)
        changes = changed_ranges(client, name, base, header.start_bytes)
        counts = send(DiskReader(disk, f"snapshot {name}"), changes, writer, header, progress)
    result = {
        "snapshot": str(name),
        "guid": str(header.guid),
        "from_snapshot": base,
        "file": str(file),
        "format": "stream",
        "size_bytes": header.size_bytes,
        "start_bytes": header.start_bytes,
        **_counted(counts),
        "seconds": round(time.monotonic() - started_s, 3),
    }
    since = f" since {base}" if base is not None else ""
    text = f"{name}{since} written to {file}: {show_size(counts.data_bytes)} of data"
    _show(state, result, text, err=to_stdout)


def _named_snapshot(text: str) -> SnapshotName:
    if "@" not in text:
        raise UsageError(
            f"{text} is a volume, and a stream is of a snapshot: take one with `vhostctl snapshot "
            f"create {text}`, and export POOL/VOLUME@SNAPSHOT"
        )
    return parse_snapshot(text)


def _header(
    client: Client, name: SnapshotName, from_snapshot: str | None, point: ResumePoint | None
) -> tuple[StreamHeader, str | None]:
    """What the stream is of, and the name of the snapshot it begins with."""
    volume_name = f"{name.pool}/{name.volume}"
    volume = client.call("volume.info", volume=volume_name)
    rows = {row["snapshot"]: row for row in client.call("snapshot.list", volume=volume_name)}
    if name.snapshot not in rows:
        raise NotFoundError(
            f"snapshot {name} does not exist; `vhostctl snapshot list {volume_name}` shows those "
            "that do"
        )
    snapshot = rows[name.snapshot]
    base: dict[str, Any] | None = None
    if from_snapshot is not None:
        # `mon`, `@mon` and `fast/web1@mon` are the same.
        wanted = from_snapshot.removeprefix(volume_name).removeprefix("@")
        if wanted not in rows:
            raise NotFoundError(
                f"snapshot {volume_name}@{wanted}, which the stream is to begin with, does not "
                f"exist; `vhostctl snapshot list {volume_name}` shows those that do"
            )
        base = rows[wanted]
        if base is snapshot:
            raise UsageError(f"nothing has changed from {name} to itself; begin with another one")
    elif point is not None:
        if point.guid != UUID(snapshot["guid"]) or point.size_bytes != snapshot["size_bytes"]:
            raise UsageError(
                f"the resume token is of another snapshot than {name}; export that one, or send "
                "this one from its beginning"
            )
        if point.from_guid is not None:
            base = next((r for r in rows.values() if UUID(r["guid"]) == point.from_guid), None)
            if base is None:
                raise NotFoundError(
                    f"the snapshot that the stream began with is not there any more in "
                    f"{volume_name}, so it cannot be continued; receive another increment"
                )
    header = StreamHeader(
        volume_uuid=UUID(volume["uuid"]),
        volume=name.volume,
        size_bytes=snapshot["size_bytes"],
        logical_block_bytes=volume["logical_block_bytes"],
        snapshot=name.snapshot,
        guid=UUID(snapshot["guid"]),
        created_ns=snapshot["created_ns"],
        from_guid=UUID(base["guid"]) if base is not None else None,
        quiesced=snapshot["quiesced"],
        start_bytes=point.applied_bytes if point is not None else 0,
    )
    return header, base["snapshot"] if base is not None else None


def changed_ranges(
    client: Client, name: VolumeName | SnapshotName, base: str | None, start_bytes: int = 0
) -> Iterator[Changed]:
    """What differs from a snapshot (or from nothing) to another one or the head, by pages."""
    at: int | None = start_bytes
    while at is not None:
        page = client.call(
            "snapshot.diff",
            volume=f"{name.pool}/{name.volume}",
            snapshot=name.snapshot if isinstance(name, SnapshotName) else None,
            start=at,
            limit=RANGES_A_CALL,
            **{"from": base},
        )
        for offset_bytes, len_bytes, kind in page["ranges"]:
            yield Changed(offset_bytes, len_bytes, kind == "data")
        at = page["next"]


# Receiving


def import_stream(state: State, file: Path, volume: str, *, force: bool) -> None:
    """Makes a volume from a stream, or brings it forward by an increment."""
    started_s = time.monotonic()
    with ExitStack() as stack:
        source: BinaryIO
        if str(file) == "-":
            source = stack.enter_context(
                open(sys.stdin.fileno(), "rb", buffering=PIPE_BYTES, closefd=False)
            )
        else:
            with _os_errors(file):
                source = stack.enter_context(file.open("rb", buffering=PIPE_BYTES))
        # Nothing is made or asked before the header is seen to be right.
        reader = StreamReader(_reading(source, file))
        header = reader.header
        client = stack.enter_context(state.client())
        begun = client.call(
            "receive.begin",
            volume=volume,
            snapshot=header.snapshot,
            guid=str(header.guid),
            from_guid=str(header.from_guid) if header.from_guid is not None else None,
            size_bytes=header.size_bytes,
            logical_block_bytes=header.logical_block_bytes,
            quiesced=header.quiesced,
            start_bytes=header.start_bytes,
            force=force,
        )
        identity = {"volume": volume, "guid": str(header.guid)}
        try:
            with open_disk(Path(begun["socket"])) as disk:
                progress = stack.enter_context(progress_bar(state, f"import {volume}"))
                receive(
                    reader,
                    DiskWriter(disk, f"volume {volume}"),
                    lambda applied: client.call("receive.note", **identity, applied_bytes=applied),
                    progress,
                )
            made = client.call("receive.commit", **identity)
        except BaseException:
            _stop_receiving(client, volume, begun)
            raise
    counts = reader.counts
    state.show(
        {
            "volume": volume,
            "snapshot": made,
            "from_guid": str(header.from_guid) if header.from_guid is not None else None,
            "file": str(file),
            "format": "stream",
            "size_bytes": header.size_bytes,
            "start_bytes": header.start_bytes,
            **_counted(counts),
            "seconds": round(time.monotonic() - started_s, 3),
        },
        f"{volume}@{header.snapshot} received from {file}: {show_size(counts.data_bytes)} of data",
    )


def _stop_receiving(client: Client, volume: str, begun: dict[str, Any]) -> None:
    """Leaves the volume waiting for the rest; one that has nothing yet is given up."""
    with contextlib.suppress(VhostdError):
        # The daemon does so itself when the session ends; this waits for it.
        with contextlib.suppress(NotFoundError):
            client.call("detach", volume=volume, socket=begun["socket"])
        point = client.call("receive.info", volume=volume)
        if not point["applied_bytes"]:
            client.call("receive.abandon", volume=volume)
        else:
            click.echo(
                f"{volume} waits for the rest of the stream, from byte {point['applied_bytes']}: "
                f"`vhostctl import --resume-point {volume}` says how to continue",
                err=True,
            )


def resume_point(state: State, volume: str) -> None:
    """Shows the token that `export --resume` takes."""
    point = state.call("receive.info", volume=volume)
    token = ResumePoint(
        guid=UUID(point["guid"]),
        from_guid=UUID(point["from_guid"]) if point["from_guid"] is not None else None,
        size_bytes=point["size_bytes"],
        applied_bytes=point["applied_bytes"],
    ).token()
    state.show({**point, "token": token}, token)


def abandon(state: State, volume: str) -> None:
    """Gives up a stream that broke."""
    done = state.call("receive.abandon", volume=volume)
    state.show(
        done,
        f"volume {volume} removed"
        if done["removed"]
        else f"volume {volume} is as in its newest snapshot again",
    )


# Both


def _counted(counts: Counts) -> dict[str, int]:
    return {
        "data_bytes": counts.data_bytes,
        "zero_bytes": counts.zero_bytes,
        "chunks": counts.data_chunks + counts.zero_chunks,
    }


def _show(state: State, result: dict[str, Any], text: str, *, err: bool) -> None:
    """A result; on stderr where stdout has the stream."""
    if not err:
        state.show(result, text)
        return
    with contextlib.redirect_stdout(sys.stderr):
        state.show(result, text)


def _writing(fd: int, file: Path) -> Callable[[bytes], None]:
    # Without a buffer of Python's: nothing is left to be written, and to fail, when it is closed.
    def write(data: bytes) -> None:
        left = memoryview(data)
        with _os_errors(file):
            while left:
                left = left[os.write(fd, left) :]

    return write


def _reading(source: BinaryIO, file: Path) -> Callable[[int], bytes]:
    def read(len_bytes: int) -> bytes:
        with _os_errors(file):
            return source.read(len_bytes)

    return read


@contextlib.contextmanager
def _os_errors(file: Path) -> Iterator[None]:
    """Errors of the operating system as ours; a pipe that nobody reads stays what it is."""
    try:
        yield
    except BrokenPipeError:
        # Whoever was to receive has said why on its own stderr.
        raise DeviceError(
            "what the stream was written to has closed it; see what that said"
        ) from None
    except FileNotFoundError as error:
        raise NotFoundError(f"{file} does not exist; check its path") from error
    except OSError as error:
        kind = NoSpaceError if error.errno == errno.ENOSPC else DeviceError
        raise kind(f"{file}: {error.strerror}; choose another place") from error
