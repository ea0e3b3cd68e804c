"""`vhostctl volume`: what concerns space and clones."""

from __future__ import annotations

import time
from typing import Any

import click

from vhostd.api.client import Client
from vhostd.cli.common import (
    State,
    checked_either,
    checked_snapshot,
    checked_volume,
    common,
    pass_state,
    show_fields,
    show_size,
    show_table,
    snapshot_argument,
    volume_argument,
    volume_or_snapshot_argument,
)
from vhostd.cli.progress import progress_bar
from vhostd.cli.settings import on_full, parse_settings, size_or_none
from vhostd.errors import BusyError, NotFoundError, VhostdError

__all__ = [
    "children",
    "clone",
    "flatten",
    "set_",
    "show_job",
    "show_limit",
    "space_fields",
    "usage",
]

POLL_S = 0.2


def space_fields(space: dict[str, Any]) -> list[tuple[str, object]]:
    """Where the space of a volume is, for people."""
    return [
        ("used on the device", show_size(space["allocated_bytes"])),
        ("  live data", show_size(space["live_bytes"])),
        ("  dead, to be freed", show_size(space["dead_bytes"])),
        ("  metadata", show_size(space["metadata_bytes"])),
    ]


def show_limit(size_bytes: int | None) -> str:
    """`20G` or `none`."""
    return "none" if size_bytes is None else show_size(size_bytes)


def show_job(job: dict[str, Any]) -> str:
    """What is done in the background, on one line."""
    total = job["total_bytes"]
    done = f", {show_size(job['done_bytes'])} of {show_size(total)}" if total else ""
    return f"{job['kind']} ({job['state']}{done})"


@click.command()
@volume_argument
@click.option("--exact", is_flag=True, help="Also what each snapshot alone holds; reads maps.")
@common
@pass_state
def usage(state: State, volume: str, exact: bool) -> None:
    """Show where the space of a volume is.

    What a snapshot holds alone is what removing it, and only it, would free.

    \b
    Example:
      vhostctl volume usage fast/web1 --exact
    """
    found = state.call("volume.usage", volume=checked_volume(volume), exact=exact)
    state.show(found, lambda: _usage_text(found))


def _usage_text(found: dict[str, Any]) -> str:
    lines = show_fields(
        [
            ("provisioned", show_size(found["provisioned_bytes"])),
            ("referenced by the head", show_size(found["referenced_bytes"])),
            *space_fields(found),
            ("freed so far", show_size(found["punched_bytes"])),
            *(
                [("of its origin", show_size(found["foreign_bytes"]))]
                if found["foreign_bytes"]
                else []
            ),
        ]
    )
    if not found["snapshots"]:
        return lines
    table = show_table(
        ("SNAPSHOT", "REFERENCED", "ALONE"),
        [
            (s["name"], show_size(s["referenced_bytes"]), show_size(s["unique_bytes"]))
            for s in found["snapshots"]
        ],
    )
    return f"{lines}\n\n{table}"


@click.command("set")
@volume_argument
@click.argument("settings", metavar="KEY=VALUE...", nargs=-1, required=True)
@common
@pass_state
def set_(state: State, volume: str, settings: tuple[str, ...]) -> None:
    """Change what a volume may take of its pool.

    \b
    quota=SIZE|none        its segments, snapshots included, take no more than this
    reservation=SIZE|none  this much is kept for it: other volumes cannot take it
    on-full=ioerr|pause    a write that finds no space fails, or waits until there is some

    \b
    Examples:
      vhostctl volume set fast/web1 quota=30G on-full=pause
      vhostctl volume set fast/db reservation=100G
    """
    changes = parse_settings(
        settings,
        {
            "quota": ("quota_bytes", size_or_none),
            "reservation": ("reservation_bytes", size_or_none),
            "on-full": ("on_full", on_full),
        },
    )
    v = state.call("volume.set", volume=checked_volume(volume), **changes)
    state.show(
        v,
        f"volume {volume}: quota {show_limit(v['quota_bytes'])}, reservation "
        f"{show_limit(v['reservation_bytes'])}, on-full {v['on_full']}",
    )


@click.command()
@snapshot_argument
@click.argument("volume", metavar="POOL/NEW")
@click.option("--serial", help="What the guest sees as the disk's ID; at most 20 characters.")
@common
@pass_state
def clone(state: State, name: str, volume: str, serial: str | None) -> None:
    """Make a writable volume with the content of a snapshot, at once and in no space.

    It shares the blocks of the snapshot, which cannot be removed meanwhile; `volume flatten` makes
    it independent. There is no `promote`: a segment says which volume it belongs to, so what a
    clone shares stays its origin's.

    \b
    Example:
      vhostctl volume clone fast/golden@v1 fast/web7
    """
    made = state.call(
        "volume.clone",
        snapshot=checked_snapshot(name),
        volume=checked_volume(volume),
        serial=serial,
    )
    state.show(made, f"volume {made['name']} made of {name}, {show_size(made['size_bytes'])}")


@click.command()
@volume_or_snapshot_argument
@common
@pass_state
def children(state: State, volume: str) -> None:
    """List the clones of a snapshot, or of all snapshots of a volume.

    \b
    Examples:
      vhostctl volume children fast/golden
      vhostctl volume children fast/golden@v1
    """
    rows = state.call("volume.children", volume=checked_either(volume))
    state.show(
        rows,
        lambda: (
            show_table(("CLONE", "OF"), [(row["name"], row["origin"]) for row in rows])
            if rows
            else f"{volume} has no clones"
        ),
    )


@click.command()
@volume_argument
@click.option("--stop", is_flag=True, help="Stop flattening; repeat it to go on.")
@common
@pass_state
def flatten(state: State, volume: str, stop: bool) -> None:
    """Copy what a clone shares with its origin, so that it needs it no more.

    The guest may go on. It takes as much space as it copies. What was interrupted goes on where it
    was, when it is repeated. Snapshots of the clone that were taken before still share: they have
    to be removed, and flatten repeated.

    \b
    Example:
      vhostctl volume flatten fast/web7
    """
    name = checked_volume(volume)
    with state.client() as client:
        if stop:
            job = _stop(client, name)
        else:
            job = client.call("volume.flatten", volume=name)
            with progress_bar(state, f"flatten {name}") as progress:
                job = _follow(client, job, progress)
    if job["state"] == "failed":
        raise VhostdError(f"volume {name} was not flattened: {job['error']}")
    if job["result"]:
        raise BusyError(
            f"volume {name} shares nothing any more, and its snapshots do: "
            f"{', '.join(job['result'])}; remove them, and flatten it again"
        )
    state.show(
        job,
        f"volume {name} is independent now"
        if job["state"] == "done"
        else f"flattening {name} is stopped; repeat it to go on",
    )


def _follow(client: Client, job: dict[str, Any], progress: Any) -> dict[str, Any]:
    while job["state"] in ("waiting", "running"):
        time.sleep(POLL_S)
        job = client.call("job.info", job=job["id"])
        if job["total_bytes"]:
            progress(job["done_bytes"], job["total_bytes"])
    return job


def _stop(client: Client, name: str) -> dict[str, Any]:
    jobs = [
        job for job in client.call("volume.info", volume=name)["jobs"] if job["kind"] == "flatten"
    ]
    if not jobs:
        raise NotFoundError(f"volume {name} is not being flattened; there is nothing to stop")
    job = client.call("job.stop", job=jobs[0]["id"])
    return _follow(client, job, lambda _done, _total: None)
