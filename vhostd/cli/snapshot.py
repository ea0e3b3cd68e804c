"""`vhostctl snapshot`: create, list, info, rename, protect, unprotect, remove, rollback, diff."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click

from vhostd.api.client import Client
from vhostd.cli.common import (
    State,
    checked_snapshot,
    checked_volume,
    common,
    complete_snapshot,
    complete_volume,
    pass_state,
    show_fields,
    show_size,
    show_table,
    show_time,
    snapshot_argument,
)
from vhostd.cli.quiesce import DEFAULT_MAX_FROZEN_S, create_quiesced
from vhostd.errors import UsageError
from vhostd.storage.names import parse_snapshot, parse_volume_or_snapshot

__all__ = ["diff_pages", "snapshot"]

SHOWN_RANGES = 20


@click.group()
def snapshot() -> None:
    """Snapshots: what a volume held at a moment, named POOL/VOLUME@SNAPSHOT.

    Taking one costs the same whatever the size of the volume, and reading and writing do not become
    slower with their number. A snapshot takes the space of what was overwritten since.
    """


@snapshot.command()
@click.argument("name", metavar="POOL/VOLUME[@SNAPSHOT]", shell_complete=complete_volume)
@click.option(
    "--quiesce",
    metavar="SOCKET|auto",
    help="Have the guest's agent freeze its file systems around it: the socket of its channel, or "
    "`auto` to find it.",
)
@click.option(
    "--max-frozen",
    metavar="SECONDS",
    type=float,
    default=DEFAULT_MAX_FROZEN_S,
    show_default=True,
    help="The guest is thawed after so long, and there is no snapshot then.",
)
@common
@pass_state
def create(state: State, name: str, quiesce: str | None, max_frozen: float) -> None:
    """Take a snapshot, of a running guest too: as if the power had gone at that moment, or with
    --quiesce, as if the guest had unmounted its file systems.

    Without a name it is called by the time, in UTC.

    \b
    Examples:
      vhostctl snapshot create fast/web1@before-upgrade
      vhostctl snapshot create fast/web1
      vhostctl snapshot create fast/web1 --quiesce /run/vm/web1-qga.sock
      vhostctl snapshot create fast/web1 --quiesce auto
    """
    target = parse_volume_or_snapshot(name)
    if quiesce is None:
        made = state.call("snapshot.create", snapshot=str(target))
    else:
        with state.client() as client:
            made = create_quiesced(client, target, quiesce, max_frozen)
    quiesced = ", the guest's file systems frozen" if made["quiesced"] else ""
    state.show(made, f"snapshot {made['name']} taken{quiesced}")


@snapshot.command("list")
@click.argument("volume", metavar="[POOL/VOLUME]", required=False, shell_complete=complete_volume)
@click.option("--all", "removing", is_flag=True, help="Also those whose space is being freed.")
@common
@pass_state
def list_(state: State, volume: str | None, removing: bool) -> None:
    """List the snapshots of a volume, or of all volumes, oldest first.

    \b
    Examples:
      vhostctl snapshot list fast/web1
      vhostctl snapshot list --all --json
    """
    name = None if volume is None else checked_volume(volume)
    rows = state.call("snapshot.list", volume=name, removing=removing)
    state.show(rows, lambda: _table(rows))


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no snapshots; `vhostctl snapshot create POOL/VOLUME@NAME` takes one"
    return show_table(
        ("NAME", "TAKEN", "SIZE", "REFERENCED", "STATE", "CLONES"),
        [
            (
                row["name"] or f"{row['volume']}@({row['uuid'][:8]})",
                show_time(row["created_ns"]),
                show_size(row["size_bytes"]),
                "-" if row["referenced_bytes"] is None else show_size(row["referenced_bytes"]),
                _state(row),
                len(row["clones"]),
            )
            for row in rows
        ],
    )


def _state(row: dict[str, Any]) -> str:
    words = [row["state"]]
    words += [word for word in ("protected", "attached", "quiesced") if row[word]]
    return ", ".join(words)


@snapshot.command()
@snapshot_argument
@click.option("--exact", is_flag=True, help="Also what it alone holds; this reads maps.")
@common
@pass_state
def info(state: State, name: str, exact: bool) -> None:
    """Show one snapshot.

    \b
    Example:
      vhostctl snapshot info fast/web1@before-upgrade --exact
    """
    row = state.call("snapshot.info", snapshot=checked_snapshot(name), exact=exact)
    state.show(row, lambda: show_fields(_fields(row)))


def _fields(row: dict[str, Any]) -> list[tuple[str, object]]:
    referenced, unique = row["referenced_bytes"], row["unique_bytes"]
    return [
        ("name", row["name"]),
        ("uuid", row["uuid"]),
        ("guid", row["guid"]),
        ("taken", show_time(row["created_ns"])),
        ("state", _state(row)),
        ("descends from", row["parent"] or "-"),
        ("size", show_size(row["size_bytes"])),
        ("referenced", "-" if referenced is None else show_size(referenced)),
        *([("held by it alone", show_size(unique))] if unique is not None else []),
        *(("clone", clone) for clone in row["clones"]),
    ]


@snapshot.command()
@snapshot_argument
@click.argument("new_name")
@common
@pass_state
def rename(state: State, name: str, new_name: str) -> None:
    """Give a snapshot another name.

    \b
    Example:
      vhostctl snapshot rename fast/web1@before-upgrade v1
    """
    row = state.call("snapshot.rename", snapshot=checked_snapshot(name), new_name=new_name)
    state.show(row, f"snapshot {name} is {row['name']} now")


@snapshot.command()
@snapshot_argument
@common
@pass_state
def protect(state: State, name: str) -> None:
    """Protect a snapshot from being removed.

    \b
    Example:
      vhostctl snapshot protect fast/golden@v1
    """
    row = state.call("snapshot.protect", snapshot=checked_snapshot(name))
    state.show(row, f"snapshot {name} is protected")


@snapshot.command()
@snapshot_argument
@common
@pass_state
def unprotect(state: State, name: str) -> None:
    """Let a snapshot be removed again.

    \b
    Example:
      vhostctl snapshot unprotect fast/golden@v1
    """
    row = state.call("snapshot.protect", snapshot=checked_snapshot(name), protected=False)
    state.show(row, f"snapshot {name} is not protected any more")


@snapshot.command()
@click.argument(
    "names",
    metavar="POOL/VOLUME@SNAPSHOT...",
    nargs=-1,
    required=True,
    shell_complete=complete_snapshot,
)
@click.option("--all", "everything", is_flag=True, help="All of POOL/VOLUME.")
@common
@pass_state
def remove(state: State, names: tuple[str, ...], everything: bool) -> None:
    """Remove snapshots of one volume, all of those given or none. Their space is freed afterwards.

    A snapshot that is protected, attached, or has clones is not removed.

    \b
    Examples:
      vhostctl snapshot remove fast/web1@before-upgrade
      vhostctl snapshot remove fast/web1 --all
    """
    wanted: list[str] | None = None
    if everything:
        if len(names) != 1:
            raise UsageError("--all takes one volume: snapshot remove POOL/VOLUME --all")
        volume = checked_volume(names[0])
    else:
        parsed = [parse_snapshot(name) for name in names]
        volumes = {str(name.of) for name in parsed}
        if len(volumes) > 1:
            raise UsageError(
                f"these snapshots are of {len(volumes)} volumes; remove those of one at a time"
            )
        volume, wanted = volumes.pop(), [name.snapshot for name in parsed]
    removed = state.call("snapshot.remove", volume=volume, snapshots=wanted)
    state.show(
        removed,
        f"removed {', '.join(removed)}; the space is being freed"
        if removed
        else f"volume {volume} has no snapshots",
    )


@snapshot.command()
@snapshot_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@common
@pass_state
def rollback(state: State, name: str, yes: bool) -> None:
    """Give a volume the content and size of one of its snapshots. It must be detached.

    What was written since is lost, unless a newer snapshot has it: all snapshots stay.

    \b
    Example:
      vhostctl snapshot rollback fast/web1@before-upgrade
    """
    name = checked_snapshot(name)
    volume = str(parse_snapshot(name).of)
    if not yes:
        if state.as_json:
            raise UsageError("with --json nobody is asked: say --yes as well to roll back")
        click.confirm(f"Lose what was written to {volume} since {name}?", abort=True)
    info = state.call("snapshot.rollback", snapshot=name)
    state.show(info, f"volume {volume} is as at {name}, {show_size(info['size_bytes'])}")


@snapshot.command()
@snapshot_argument
@click.argument("to", metavar="[@SNAPSHOT|head]", default="head")
@common
@pass_state
def diff(state: State, name: str, to: str) -> None:
    """Show which parts of a volume changed from one snapshot to another, or to the head.

    It costs what changed, not what the volume holds. With --json all ranges, in bytes: `data`, or
    `zero` for what reads as zeroes now. While a guest writes, the head is of no one moment; take a
    snapshot for a backup.

    \b
    Examples:
      vhostctl snapshot diff fast/web1@monday @tuesday --json
      vhostctl snapshot diff fast/web1@monday
    """
    old = parse_snapshot(name)
    new = None if to == "head" else _sibling(str(old.of), to)
    started_s = time.monotonic()
    with state.client() as client:
        result: dict[str, Any] = {"from": str(old), "to": str(old.of) + (f"@{new}" if new else "")}
        ranges = []
        for page in diff_pages(client, str(old.of), old.snapshot, new):
            ranges += page["ranges"]
            result |= {key: page[key] for key in ("from_size_bytes", "size_bytes")}
    result["ranges"] = [
        {"offset_bytes": offset, "length_bytes": length, "type": kind}
        for offset, length, kind in ranges
    ]
    totals = {kind: sum(r[1] for r in ranges if r[2] == kind) for kind in ("data", "zero")}
    result |= {f"{kind}_bytes": total for kind, total in totals.items()}
    result["seconds"] = round(time.monotonic() - started_s, 3)
    state.show(result, lambda: _diff_text(result))


def _sibling(volume: str, text: str) -> str:
    name = parse_snapshot(f"{volume}{text}" if text.startswith("@") else text)
    if str(name.of) != volume:
        raise UsageError(
            f"{text} is of another volume; compare snapshots of {volume}, written as @SNAPSHOT"
        )
    return name.snapshot


def diff_pages(client: Client, volume: str, old: str, new: str | None) -> Iterator[dict[str, Any]]:
    """The pages of a difference."""
    start: int | None = 0
    while start is not None:
        page = client.call(
            "snapshot.diff", volume=volume, snapshot=new, **{"from": old}, start=start
        )
        yield page
        start = page["next"]


def _diff_text(result: dict[str, Any]) -> str:
    ranges = result["ranges"]
    shown = show_table(
        ("OFFSET", "LENGTH", "TYPE"),
        [
            (r["offset_bytes"], show_size(r["length_bytes"]), r["type"])
            for r in ranges[:SHOWN_RANGES]
        ],
    )
    more = len(ranges) - SHOWN_RANGES
    lines = [shown] if ranges else []
    if more > 0:
        lines.append(f"… and {more} more; --json has all")
    lines.append(
        f"{result['from']} to {result['to']}: {show_size(result['data_bytes'])} of data and "
        f"{show_size(result['zero_bytes'])} of zeroes in {len(ranges)} ranges"
    )
    if result["from_size_bytes"] != result["size_bytes"]:
        lines.append(
            f"the size changed from {show_size(result['from_size_bytes'])} to "
            f"{show_size(result['size_bytes'])}"
        )
    return "\n".join(lines)
