"""`vhostctl attach`, `detach`, `attachments`, `sessions`, `qemu-args`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from vhostd.cli.common import (
    State,
    checked_either,
    common,
    complete_volume,
    pass_state,
    show_size,
    show_table,
    volume_or_snapshot_argument,
)
from vhostd.config import DEFAULT_QUEUES, MAX_QUEUES
from vhostd.errors import NotFoundError
from vhostd.exports.qemu import qemu_arguments

__all__ = ["attach", "attachments", "detach", "qemu_args", "sessions"]


@click.command()
@volume_or_snapshot_argument
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    help="Where to listen; by default RUNTIME_DIR/POOL/VOLUME.sock.",
)
@click.option(
    "--queues",
    type=click.IntRange(1, MAX_QUEUES),
    default=DEFAULT_QUEUES,
    show_default=True,
    help="At most so many queues; a guest uses as many as it has CPUs.",
)
@click.option("--read-only", is_flag=True, help="Refuse writes; several such attachments can be.")
@common
@pass_state
def attach(state: State, volume: str, socket: Path | None, queues: int, read_only: bool) -> None:
    """Offer a volume on a vhost-user socket. It is offered again after a restart of the daemon.

    A snapshot is offered read-only, while its volume may be attached too.

    \b
    Examples:
      vhostctl attach fast/web1
      vhostctl attach fast/web1@before-upgrade
      vhostctl attach fast/web1 --socket /run/vm/web1.sock
    """
    made = state.call(
        "attach",
        volume=checked_either(volume),
        socket=None if socket is None else str(socket.absolute()),
        queues=queues,
        read_only=read_only,
    )
    state.show(made, f"{_kind(volume)} {volume} is offered on {made['socket']}")


@click.command()
@volume_or_snapshot_argument
@click.option("--socket", type=click.Path(path_type=Path), help="Only from this one.")
@common
@pass_state
def detach(state: State, volume: str, socket: Path | None) -> None:
    """Stop offering a volume or a snapshot. A guest that still uses it gets I/O errors or waits.

    \b
    Example:
      vhostctl detach fast/web1
    """
    gone = state.call(
        "detach",
        volume=checked_either(volume),
        socket=None if socket is None else str(socket.absolute()),
    )
    sockets = ", ".join(a["socket"] for a in gone)
    state.show(gone, f"{_kind(volume)} {volume} detached from {sockets}")


def _kind(name: str) -> str:
    return "snapshot" if "@" in name else "volume"


@click.command()
@common
@pass_state
def attachments(state: State) -> None:
    """List the sockets that volumes are offered on.

    \b
    Example:
      vhostctl attachments
    """
    rows = state.call("attachments")
    state.show(
        rows,
        lambda: (
            show_table(
                ("VOLUME", "STATE", "MODE", "QUEUES", "SOCKET"),
                [
                    (
                        a["volume"],
                        a["state"],
                        "ro" if a["read_only"] else "rw",
                        a["queues"],
                        a["socket"],
                    )
                    for a in rows
                ],
            )
            if rows
            else "nothing is attached"
        ),
    )


@click.command()
@common
@pass_state
def sessions(state: State) -> None:
    """List the front-ends that are connected.

    \b
    Example:
      vhostctl sessions
    """
    rows = state.call("sessions")
    state.show(
        rows,
        lambda: (
            show_table(
                ("VOLUME", "PID", "UID", "QUEUES", "MEMORY", "SOCKET"),
                [
                    (
                        s["volume"],
                        s["peer_pid"],
                        s["peer_uid"],
                        len(s["queues_started"]),
                        show_size(s["memory_bytes"]),
                        s["socket"],
                    )
                    for s in rows
                ],
            )
            if rows
            else "no front-end is connected"
        ),
    )


@click.command("qemu-args")
@click.argument(
    "volumes",
    metavar="POOL/VOLUME[@SNAPSHOT]...",
    nargs=-1,
    required=True,
    shell_complete=complete_volume,
)
@click.option("--memory", default="4G", show_default=True, help="Of the guest; it must be shared.")
@click.option("--boot", is_flag=True, help="Boot from the first.")
@common
@pass_state
def qemu_args(state: State, volumes: tuple[str, ...], memory: str, boot: bool) -> None:
    """Print the QEMU arguments for attached volumes.

    \b
    Example:
      eval qemu-system-x86_64 -accel kvm $(vhostctl qemu-args fast/web1 --boot)
    """
    sockets = []
    attached = state.call("attachments")
    for volume in map(checked_either, volumes):
        found = [a for a in attached if a["volume"] == volume]
        if not found:
            if "@" not in volume:
                state.call("volume.info", volume=volume)  # says if there is none at all
            raise NotFoundError(
                f"{_kind(volume)} {volume} is not attached; `vhostctl attach {volume}` first"
            )
        sockets.append(found[0]["socket"])
    arguments = qemu_arguments(sockets, memory=memory, boot=boot)
    state.show(arguments, shlex.join(arguments))
