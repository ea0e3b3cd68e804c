"""`vhostctl volume`: create, list, info, usage, set, resize, rename, clone, flatten, children,
remove."""

from __future__ import annotations

from typing import Any

import click

from vhostd.cli.common import (
    SIZE,
    State,
    checked_volume,
    common,
    complete_pool,
    pass_state,
    show_fields,
    show_size,
    show_table,
    volume_argument,
)
from vhostd.cli.volume_more import (
    children,
    clone,
    flatten,
    set_,
    show_job,
    show_limit,
    space_fields,
    usage,
)

__all__ = ["volume"]


@click.group()
def volume() -> None:
    """Volumes: the disks of virtual machines, named POOL/VOLUME.

    A volume takes space as it is written, and gives it back when the guest discards.
    """


@volume.command()
@volume_argument
@click.option("--size", type=SIZE, required=True, help="As in 20G (powers of 2) or 20GB.")
@click.option(
    "--logical-block-size",
    type=click.Choice(["512", "4096"]),
    default="512",
    show_default=True,
    help="What the guest sees as a sector; for good.",
)
@click.option("--serial", help="What the guest sees as the disk's ID; at most 20 characters.")
@common
@pass_state
def create(
    state: State, volume: str, size: int, logical_block_size: str, serial: str | None
) -> None:
    """Make a volume. It reads as zeroes, and takes no space yet.

    \b
    Example:
      vhostctl volume create fast/web1 --size 20G
    """
    made = state.call(
        "volume.create",
        volume=checked_volume(volume),
        size_bytes=size,
        logical_block_bytes=int(logical_block_size),
        serial=serial,
    )
    state.show(made, f"volume {volume} made, {show_size(made['size_bytes'])}")


@volume.command("list")
@click.argument("pool", required=False, shell_complete=complete_pool)
@common
@pass_state
def list_(state: State, pool: str | None) -> None:
    """List the volumes of all pools, or of one.

    \b
    Example:
      vhostctl volume list fast
    """
    volumes = state.call("volume.list", pool=pool)
    state.show(volumes, lambda: _table(volumes))


def _table(volumes: list[dict[str, Any]]) -> str:
    if not volumes:
        return "no volumes; `vhostctl volume create POOL/VOLUME --size SIZE` makes one"
    return show_table(
        ("NAME", "SIZE", "MAPPED", "USED", "SNAPSHOTS", "STATE", "SOCKET"),
        [
            (
                v["name"],
                show_size(v["size_bytes"]),
                show_size(v["mapped_bytes"]),
                show_size(v["allocated_bytes"]),
                v["snapshots"],
                _state(v),
                ", ".join(a["socket"] for a in v["attachments"]) or "-",
            )
            for v in volumes
        ],
    )


def _state(volume: dict[str, Any]) -> str:
    states = {a["state"] for a in volume["attachments"]}
    ranked = ("failed", "connected", "listening")
    state = next((state for state in ranked if state in states), "detached")
    if volume["status"] == "ok":
        return state
    waiting = volume["waiting_requests"]
    return f"{state}, {volume['status']}" + (f", {waiting} requests wait" if waiting else "")


@volume.command()
@volume_argument
@common
@pass_state
def info(state: State, volume: str) -> None:
    """Show one volume.

    \b
    Example:
      vhostctl volume info fast/web1
    """
    v = state.call("volume.info", volume=checked_volume(volume))
    state.show(
        v,
        lambda: show_fields(
            [
                ("name", v["name"]),
                ("uuid", v["uuid"]),
                ("serial", v["serial"]),
                ("size", f"{show_size(v['size_bytes'])} ({v['size_bytes']} bytes)"),
                ("logical block", f"{v['logical_block_bytes']} bytes"),
                ("mapped", show_size(v["mapped_bytes"])),
                *space_fields(v["space"]),
                ("snapshots", _snapshots(v)),
                *([("clone of", v["origin"])] if v["origin"] else []),
                ("quota", show_limit(v["quota_bytes"])),
                ("reservation", show_limit(v["reservation_bytes"])),
                ("when full", v["on_full"]),
                ("state", _state(v)),
                *(("working", show_job(job)) for job in v["jobs"]),
                *(("socket", a["socket"]) for a in v["attachments"]),
                *(("error", a["error"]) for a in v["attachments"] if a["error"]),
            ]
        ),
    )


def _snapshots(v: dict[str, Any]) -> str:
    removing = v["snapshots_removing"]
    return f"{v['snapshots']}" + (f", and {removing} whose space is being freed" * bool(removing))


@volume.command()
@volume_argument
@click.argument("size", type=SIZE)
@click.option("--force", is_flag=True, help="Shrink: what is beyond the new end is lost.")
@common
@pass_state
def resize(state: State, volume: str, size: int, force: bool) -> None:
    """Change the size of a volume. It grows while it is attached, and shrinks only when not.

    \b
    Examples:
      vhostctl volume resize fast/web1 40G
      vhostctl volume resize fast/web1 10G --force
    """
    v = state.call("volume.resize", volume=checked_volume(volume), size_bytes=size, force=force)
    state.show(v, f"volume {volume} has {show_size(v['size_bytes'])} now")


@volume.command()
@volume_argument
@click.argument("new_name")
@common
@pass_state
def rename(state: State, volume: str, new_name: str) -> None:
    """Give a volume another name, in the same pool. Sockets in use stay where they are.

    \b
    Example:
      vhostctl volume rename fast/web1 www
    """
    v = state.call("volume.rename", volume=checked_volume(volume), new_name=new_name)
    state.show(v, f"volume {volume} is {v['name']} now")


@volume.command()
@volume_argument
@click.option("--snapshots", is_flag=True, help="Even if it has snapshots: they are removed too.")
@common
@pass_state
def remove(state: State, volume: str, snapshots: bool) -> None:
    """Remove a volume and its data, for good. It must be detached, and have no clones.

    \b
    Examples:
      vhostctl volume remove fast/web1
      vhostctl volume remove fast/web1 --snapshots
    """
    state.call("volume.remove", volume=checked_volume(volume), snapshots=snapshots)
    state.show({"volume": volume, "removed": True}, f"volume {volume} removed")


for command in (usage, set_, clone, flatten, children):
    volume.add_command(command)
