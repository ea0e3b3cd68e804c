"""`vhostctl pool rebuild-catalog`: a lost catalog, made again from segments; what repairs share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from vhostd.cli.common import State, common, pass_state, show_size
from vhostd.cli.progress import progress_bar
from vhostd.errors import DamagedError

if TYPE_CHECKING:
    from vhostd.storage.rebuild import Report
    from vhostd.storage.rebuild.plan import Engine

__all__ = ["engine_for_repair", "outcome_lines", "rebuild_catalog"]


@click.command("rebuild-catalog")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what is there; change nothing.")
@click.option("--name", help="Name of the pool, if its superblock is lost.")
@click.option("--force", is_flag=True, help="Even if the catalog is whole.")
@common
@pass_state
def rebuild_catalog(
    state: State, directory: Path, dry_run: bool, name: str | None, force: bool
) -> None:
    """Make the catalog of the pool in DIR again, out of its segments alone.

    For a catalog that is lost, torn, or older than the device. No daemon may have the pool open.
    Volumes, snapshots, clones and their maps are made again from what the log says; log segments
    are only read. What was there before is kept beside it, as catalog.sqlite.damaged-TIME.

    Blocks whose records cannot be read are reported. Quotas, reservations and protection of
    snapshots that the log does not tell are not set.

    \b
    Examples:
      vhostctl pool rebuild-catalog /srv/vhostd/fast --dry-run
      vhostctl pool rebuild-catalog /srv/vhostd/fast
    """
    from vhostd.storage.rebuild import rebuild_catalog as rebuild

    with progress_bar(state, f"read {directory}") as progress:
        if dry_run:
            report = rebuild(directory, None, name=name, force=force, progress=progress)
        else:
            with engine_for_repair() as engine:
                report = rebuild(directory, engine, name=name, force=force, progress=progress)
    state.show(msgspec.to_builtins(report), lambda: _text(report))
    if not report.ok:
        raise DamagedError(
            f"{directory}: not all of what was there could be read; the report says what"
        )


@contextmanager
def engine_for_repair() -> Iterator[Engine]:
    """An engine that serves nobody. It leaves staged writes of a dead daemon where they are: the
    next daemon brings them to the segments."""
    from vhostd import _native

    with tempfile.TemporaryDirectory(prefix="vhostd-repair-") as scratch:
        engine = _native.Engine(workers=1, staging_dir=scratch)
        try:
            yield engine
        finally:
            engine.shutdown()


def outcome_lines(report: Report) -> list[str]:
    """What there is to say of each volume, and of what belongs to nobody."""
    lines = []
    for volume in report.volumes:
        if volume.failed is not None:
            lines.append(f"error: volume {volume.name}: {volume.failed}")
        else:
            snapshots = ", ".join(volume.snapshots[:10])
            more = len(volume.snapshots) - 10
            lines.append(
                f"volume {volume.name}: {show_size(volume.size_bytes)}, "
                f"{volume.log_segments} log segments"
                + (f", {volume.mapped_blocks} blocks" if volume.mapped_blocks else "")
                + (f", snapshots {snapshots}" if snapshots else "")
                + (f" and {more} more" if more > 0 else "")
            )
        lines += [f"lost: volume {volume.name}: {what}" for what in volume.lost]
    lines += [f"problem: {problem}" for problem in report.problems]
    lines += [f"kept: {path}" for path in report.kept]
    return lines


def _text(report: Report) -> str:
    verb = "would" if report.dry_run else "done"
    head = f"pool {report.pool} ({report.pool_uuid}), {report.segments} segments"
    return "\n".join(
        [head, *outcome_lines(report), *(f"{verb}: {action}" for action in report.actions)]
    )
