"""`vhostctl pool`: create, open, close, list, info, set, destroy; `rebuild` has another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vhostd.cli.common import (
    SIZE,
    State,
    common,
    complete_pool,
    pass_state,
    show_fields,
    show_size,
    show_table,
)
from vhostd.cli.rebuild import rebuild_catalog
from vhostd.cli.settings import parse_settings, percent, size_or_none
from vhostd.errors import UsageError
from vhostd.storage.names import check_name

__all__ = ["pool"]


@click.group()
def pool() -> None:
    """Pools: where volumes are kept.

    A pool is a directory with a catalog and segments. It is open in one daemon at a time.
    """


pool.add_command(rebuild_catalog)


@pool.command()
@click.argument("name")
@click.option(
    "--device",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="An empty directory, or one that can be made.",
)
@click.option("--segment-size", type=SIZE, default="32M", show_default=True, help="1M to 32M.")
@common
@pass_state
def create(state: State, name: str, device: Path, segment_size: int) -> None:
    """Make a pool in a directory.

    \b
    Example:
      vhostctl pool create fast --device /srv/vhostd/fast
    """
    check_name(name, "pool")
    info = state.call(
        "pool.create", pool=name, device=str(device.absolute()), segment_bytes=segment_size
    )
    state.show(info, f"pool {name} made in {info['device']}")


@pool.command("open")
@click.argument("device", metavar="DIR", type=click.Path(path_type=Path))
@common
@pass_state
def open_(state: State, device: Path) -> None:
    """Take over a pool that exists, made by another daemon or host.

    \b
    Example:
      vhostctl pool open /srv/vhostd/fast
    """
    info = state.call("pool.open", device=str(device.absolute()))
    state.show(info, f"pool {info['name']} opened, with {info['volumes']} volumes")


@pool.command()
@click.argument("name", shell_complete=complete_pool)
@common
@pass_state
def close(state: State, name: str) -> None:
    """Close a pool and forget where it is. Its data stays; `pool open` takes it back.

    \b
    Example:
      vhostctl pool close fast
    """
    state.call("pool.close", pool=name)
    state.show({"pool": name, "closed": True}, f"pool {name} closed")


@pool.command("list")
@common
@pass_state
def list_(state: State) -> None:
    """List the pools of the daemon, with their space.

    \b
    Example:
      vhostctl pool list --json
    """
    pools = state.call("pool.list")
    state.show(pools, lambda: _table(pools))


def _table(pools: list[dict[str, Any]]) -> str:
    if not pools:
        return "no pools; `vhostctl pool create NAME --device DIR` makes one"
    good = [p for p in pools if p["error"] is None]
    text = show_table(
        ("NAME", "STATUS", "VOLUMES", "PROVISIONED", "USED", "FREE", "DEVICE"),
        [
            (
                p["name"],
                p["status"],
                p["volumes"],
                show_size(p["provisioned_bytes"]),
                show_size(p["allocated_bytes"]),
                show_size(p["free_bytes"]),
                p["device"],
            )
            for p in good
        ],
    )
    failed = [f"{p['name']}: {p['error']}" for p in pools if p["error"] is not None]
    return "\n".join([*([text] if good else []), *failed])


@pool.command()
@click.argument("name", shell_complete=complete_pool)
@common
@pass_state
def info(state: State, name: str) -> None:
    """Show one pool.

    \b
    Example:
      vhostctl pool info fast
    """
    p = state.call("pool.info", pool=name)
    state.show(
        p,
        lambda: show_fields(
            [
                ("name", p["name"]),
                ("uuid", p["uuid"]),
                ("device", p["device"]),
                ("volumes", f"{p['volumes']} ({p['volumes_open']} open)"),
                (
                    "status",
                    f"{p['status']} ({p['used_percent']}% used, warns at {p['warn_percent']}%)",
                ),
                (
                    "provisioned",
                    f"{show_size(p['provisioned_bytes'])} "
                    f"({p['overcommit_percent']}% of what there is)",
                ),
                ("used", show_size(p["allocated_bytes"])),
                ("reserved", show_size(p["reserved_bytes"])),
                ("quota", "none" if p["quota_bytes"] is None else show_size(p["quota_bytes"])),
                ("free", f"{show_size(p['free_bytes'])} of {show_size(p['total_bytes'])}"),
                ("segment size", show_size(p["segment_bytes"])),
                ("segments without owner", p["segments_without_owner"]),
            ]
        ),
    )


@pool.command("set")
@click.argument("name", shell_complete=complete_pool)
@click.argument("settings", metavar="KEY=VALUE...", nargs=-1, required=True)
@common
@pass_state
def set_(state: State, name: str, settings: tuple[str, ...]) -> None:
    """Change what a pool may take, and from when on it is warned.

    \b
    quota=SIZE|none  what all volumes together may take of the device
    warn=PERCENT     of the device, or of the quota, from which on it is nearly full

    \b
    Example:
      vhostctl pool set fast quota=500G warn=80%
    """
    changes = parse_settings(
        settings, {"quota": ("quota_bytes", size_or_none), "warn": ("warn_percent", percent)}
    )
    p = state.call("pool.set", pool=name, **changes)
    quota = "none" if p["quota_bytes"] is None else show_size(p["quota_bytes"])
    state.show(p, f"pool {name}: quota {quota}, warns at {p['warn_percent']}%")


@pool.command()
@click.argument("name", shell_complete=complete_pool)
@click.option("--force", is_flag=True, help="Even if it has volumes: their data is lost.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@pass_state
def destroy(state: State, name: str, force: bool, yes: bool) -> None:
    """Remove a pool and everything in it, for good.

    \b
    Example:
      vhostctl pool destroy fast
    """
    if force and not yes:
        if state.as_json:
            raise UsageError("with --json nobody is asked: say --yes as well to destroy the pool")
        click.confirm(f"Destroy pool {name} and all its volumes?", abort=True)
    state.call("pool.destroy", pool=name, force=force)
    state.show({"pool": name, "destroyed": True}, f"pool {name} destroyed")
