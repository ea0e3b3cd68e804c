"""`vhostctl`: the command line of a daemon."""

from __future__ import annotations

from pathlib import Path

import click

from vhostd.cli.attach import attach, attachments, detach, qemu_args, sessions
from vhostd.cli.check import check
from vhostd.cli.common import State, pass_state, run
from vhostd.cli.pool import pool
from vhostd.cli.service import checkpoint, completion, jobs, shutdown, stats, version
from vhostd.cli.snapshot import snapshot
from vhostd.cli.transfer import export, import_
from vhostd.cli.volume import volume

__all__ = ["main", "vhostctl"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--socket",
    "--daemon",
    "socket",
    metavar="SOCKET",
    type=click.Path(path_type=Path),
    help="The daemon's API socket.  [env: VHOSTD_SOCKET; default: /run/vhostd/vhostd.sock]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON of a stable shape.")
@pass_state
def vhostctl(state: State, socket: Path | None, as_json: bool) -> None:
    """Drive vhostd: pools, volumes, snapshots, and the sockets virtual machines find them on.

    \b
    From nothing to a disk, with `vhostd serve` running:
      vhostctl pool create fast --device /srv/vhostd/fast
      vhostctl volume create fast/web1 --size 20G
      vhostctl attach fast/web1
      vhostctl qemu-args fast/web1
    \b
    From an image:
      vhostctl import debian.qcow2 fast/web2
    \b
    Exit codes: 0 done, 2 wrong usage, 3 not found, 4 exists, 5 busy, 6 no space, 7 damaged,
    8 device error, 9 not supported, 10 no daemon, 70 a defect.
    """
    if socket is not None:
        state.socket = socket
    state.as_json = state.as_json or as_json


for command in (
    pool,
    volume,
    snapshot,
    attach,
    detach,
    attachments,
    sessions,
    qemu_args,
    import_,
    export,
    check,
    stats,
    jobs,
    checkpoint,
    shutdown,
    version,
    completion,
):
    vhostctl.add_command(command)


def main() -> None:
    """The entry point."""
    run(vhostctl, "vhostctl")
