"""`vhostd`: the daemon itself, and one disk without any ceremony."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
import msgspec

import vhostd as package
from vhostd.cli.common import SIZE, run
from vhostd.config import DEFAULT_QUEUES, MAX_QUEUES, LogConfig, LogFormat, LogLevel, load_config
from vhostd.logs import configure_logs
from vhostd.service import DiskOptions, serve, serve_disk
from vhostd.storage.names import check_name

__all__ = ["main", "vhostd"]

UNCLEAN_EXIT_CODE = 1
LOG_LEVELS = ["debug", "info", "warning", "error"]
LOG_FORMATS = ["auto", "json", "human"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package.__version__, prog_name="vhostd")
def vhostd() -> None:
    """Serve disks to virtual machines over vhost-user.

    \b
    One disk, kept in a directory, no configuration:
      vhostd disk /srv/disk1 --size 20G --socket /run/disk1.sock
    \b
    Many disks, driven by vhostctl:
      vhostd serve --config /etc/vhostd.toml
    """


@vhostd.command("serve")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="TOML; without it, the defaults.",
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="Wins over the file.")
@click.option("--log-format", type=click.Choice(LOG_FORMATS), help="Wins over the file.")
def serve_command(
    config: Path | None, log_level: LogLevel | None, log_format: LogFormat | None
) -> None:
    """Serve pools and volumes until SIGTERM or SIGINT; vhostctl drives it.

    Prints `ready: SOCKET` when the API listens and all that was attached before is offered again.

    \b
    Example:
      vhostd serve --config /etc/vhostd.toml
    """
    loaded = load_config(config)
    configure_logs(_log_config(loaded.log, log_level, log_format))
    if not serve(loaded):
        sys.exit(UNCLEAN_EXIT_CODE)


@vhostd.command("disk")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--size", type=SIZE, help="As in 20G; needed at the first use only.")
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    required=True,
    help="Where the front-end connects.",
)
@click.option("--read-only", is_flag=True, help="Refuse the guest's writes.")
@click.option(
    "--queues",
    type=click.IntRange(1, MAX_QUEUES),
    default=DEFAULT_QUEUES,
    show_default=True,
    help="At most so many.",
)
@click.option(
    "--logical-block-size",
    type=click.Choice(["512", "4096"]),
    help="Of a new disk: what the guest sees as a sector; 512 by default.",
)
@click.option("--volume", help="Which volume, if DIR is a pool with several.")
@click.option(
    "--api-socket",
    type=click.Path(path_type=Path),
    help="Also listen here for vhostctl.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="TOML as for `serve`; its engine, exports and log tables count.",
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS))
@click.option("--log-format", type=click.Choice(LOG_FORMATS))
def disk_command(
    directory: Path,
    size: int | None,
    socket: Path,
    read_only: bool,
    queues: int,
    logical_block_size: str | None,
    volume: str | None,
    api_socket: Path | None,
    config: Path | None,
    log_level: LogLevel | None,
    log_format: LogFormat | None,
) -> None:
    """Serve one disk that is kept in DIR until SIGTERM or SIGINT.

    DIR becomes a pool with one volume at the first use, and is opened again later. Prints
    `ready: SOCKET` when a front-end can connect, and the QEMU arguments to use.

    \b
    Examples:
      vhostd disk /srv/disk1 --size 20G --socket /run/disk1.sock
      vhostd disk /srv/disk1 --socket /run/disk1.sock
    """
    if volume is not None:
        check_name(volume, "volume")
    # Only the socket of this command line is meant here, not the one that vhostctl would use.
    environment = {k: v for k, v in os.environ.items() if k != "VHOSTD_SOCKET"}
    loaded = load_config(config, environment)
    if api_socket is not None:
        api = msgspec.structs.replace(loaded.api, socket=str(api_socket.absolute()))
        loaded = msgspec.structs.replace(loaded, api=api)
    configure_logs(_log_config(loaded.log, log_level, log_format))
    options = DiskOptions(
        directory=directory,
        socket=socket,
        size_bytes=size,
        volume=volume,
        logical_block_bytes=None if logical_block_size is None else int(logical_block_size),
        queues=queues,
        read_only=read_only,
        api=api_socket is not None,
    )
    if not serve_disk(loaded, options):
        sys.exit(UNCLEAN_EXIT_CODE)


def _log_config(base: LogConfig, level: LogLevel | None, log_format: LogFormat | None) -> LogConfig:
    return LogConfig(level=level or base.level, format=log_format or base.format)


def main() -> None:
    """The entry point."""
    run(vhostd, "vhostd")
