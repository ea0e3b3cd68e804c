"""Running a daemon as a process: engine, signals, API socket, telling who waits for it.

`serve` is what `vhostd serve` does and `serve_disk` what `vhostd disk` does. Both return when the
process was told to stop (SIGTERM, SIGINT, or the API's `shutdown`) and everything has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from vhostd.api.methods import Methods
from vhostd.api.server import ApiServer
from vhostd.config import Config
from vhostd.daemon import Daemon
from vhostd.errors import DeviceError, NotFoundError, UsageError
from vhostd.exports.qemu import qemu_arguments
from vhostd.storage.engine import Engine, FormatDevice
from vhostd.storage.names import VolumeName
from vhostd.storage.pool import DEFAULT_SEGMENT_BYTES, is_pool
from vhostd.storage.sizes import format_size

__all__ = ["DiskOptions", "serve", "serve_disk"]

DISK_POOL = "disk"
DISK_VOLUME = "disk"


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """`vhostd disk`: the directory, the socket, and what a new volume is to be."""

    directory: Path
    socket: Path
    size_bytes: int | None
    volume: str | None
    logical_block_bytes: int | None
    queues: int
    read_only: bool
    api: bool


def serve(config: Config) -> bool:
    """Serves what the registry names until told to stop; False if it did not end cleanly."""

    async def ready(daemon: Daemon) -> None:
        _say(f"ready: {daemon.config.api_socket}")

    return asyncio.run(_run(config, keep=True, api=True, prepare=ready))


def serve_disk(config: Config, options: DiskOptions) -> bool:
    """Serves one volume of one directory until told to stop, making both at the first use."""

    async def prepare(daemon: Daemon) -> None:
        name = await _disk_volume(daemon, options)
        socket_path = str(options.socket.absolute())
        await daemon.attach(
            name, socket=socket_path, queues=options.queues, read_only=options.read_only
        )
        _say(f"ready: {socket_path}")
        arguments = qemu_arguments([socket_path])
        pairs = [" ".join(arguments[i : i + 2]) for i in range(0, len(arguments), 2)]
        _say("QEMU arguments for this disk (choose the memory to your liking):")
        _say("  " + " \\\n  ".join(pairs))

    return asyncio.run(_run(config, keep=False, api=options.api, prepare=prepare))


async def _run(
    config: Config, *, keep: bool, api: bool, prepare: Callable[[Daemon], Awaitable[None]]
) -> bool:
    _raise_file_limit()
    engine, format_device = await asyncio.to_thread(_start_engine, config)
    daemon = Daemon(config, engine=engine, format_device=format_device, keep=keep)
    server = ApiServer(
        config.api_socket,
        Methods(daemon),
        mode=int(config.api.mode, 8),
        group=config.api.group,
    )
    clean = False
    try:
        async with _signals(daemon.stopping):
            await daemon.start()
            if api:
                await server.start()
            await prepare(daemon)
            _notify("READY=1")
            await daemon.stopping.wait()
            structlog.get_logger().info("stopping")
            _notify("STOPPING=1")
    finally:
        await server.stop()
        clean = await daemon.stop()
    return clean


def _start_engine(config: Config) -> tuple[Engine, FormatDevice]:
    # Here, and not above: commands that need no engine work where it was not built.
    from vhostd import _native

    try:
        Path(config.engine.staging_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DeviceError(
            f"staging directory {config.engine.staging_dir} cannot be made: {error.strerror}; set "
            "engine.staging_dir to a directory on a tmpfs"
        ) from error
    engine = _native.Engine(
        workers=config.engine.workers,
        cpus=config.engine.cpus,
        poll_us=config.engine.poll_us,
        map_cache_bytes=config.engine.map_cache_bytes,
        staging_dir=config.engine.staging_dir,
        staging_bytes=config.engine.staging_bytes,
    )
    return engine, _native.format_device


async def _disk_volume(daemon: Daemon, options: DiskOptions) -> VolumeName:
    """The volume to serve: the one there is, or a new one."""
    directory = options.directory.absolute()
    if is_pool(directory):
        pool = (await daemon.open_pool(directory))["name"]
    elif options.size_bytes is None:
        raise UsageError(
            f"{directory} holds no disk yet; say how large it shall be, as in --size 20G"
        )
    else:
        info = await daemon.create_pool(DISK_POOL, directory, DEFAULT_SEGMENT_BYTES)
        pool = info["name"]
    volumes = {row["volume"]: row for row in await daemon.list_volumes(pool)}
    wanted = options.volume or (next(iter(volumes)) if len(volumes) == 1 else DISK_VOLUME)
    name = VolumeName(pool, wanted)
    row = volumes.get(wanted)
    if row is None:
        if options.size_bytes is None or (volumes and options.volume is None):
            there = ", ".join(sorted(volumes)) or "none"
            raise NotFoundError(
                f"{directory} has no volume {wanted} (there are: {there}); choose one with "
                "--volume, or make one with --volume and --size"
            )
        await daemon.create_volume(
            name,
            size_bytes=options.size_bytes,
            logical_block_bytes=options.logical_block_bytes or 512,
        )
        return name
    if options.size_bytes not in (None, row["size_bytes"]):
        raise UsageError(
            f"volume {name} in {directory} has {format_size(row['size_bytes'])} "
            f"({row['size_bytes']} bytes), and --size says {format_size(options.size_bytes or 0)}; "
            "leave --size away to serve it as it is. To change it, serve the disk with "
            f"--api-socket SOCK and run `vhostctl --socket SOCK volume resize {name} SIZE`"
        )
    if options.logical_block_bytes not in (None, row["logical_block_bytes"]):
        raise UsageError(
            f"volume {name} in {directory} has logical blocks of {row['logical_block_bytes']} "
            "bytes for good; leave --logical-block-size away"
        )
    return name


@asynccontextmanager
async def _signals(stopping: asyncio.Event) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        yield
    finally:
        # From here on a second signal ends the process at once; what is staged survives that.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _raise_file_limit() -> None:
    """Each session has descriptors for memory and queues, each device for its segments."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _notify(state: str) -> None:
    """Tells systemd (sd_notify(3)), if it wants to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), address)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    # Whoever waits for this line may have closed the pipe after an earlier one.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
