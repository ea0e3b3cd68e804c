"""`vhostctl version`, `stats`, `jobs`, `checkpoint`, `shutdown`, `completion`."""

from __future__ import annotations

from typing import Any

import click
import msgspec
from click.shell_completion import get_completion_class

import vhostd
from vhostd.cli.common import (
    State,
    checked_volume,
    common,
    complete_volume,
    pass_state,
    show_size,
    show_table,
)
from vhostd.errors import UnavailableError

__all__ = ["checkpoint", "completion", "jobs", "shutdown", "stats", "version"]


@click.command()
@common
@pass_state
def version(state: State) -> None:
    """Print the version of this program, and of the daemon if one answers.

    \b
    Example:
      vhostctl version
    """
    try:
        daemon = state.call("version")
    except UnavailableError:
        daemon = None
    shown = f"vhostctl {vhostd.__version__}\n" + (
        f"vhostd   {daemon['version']} (PID {daemon['pid']})" if daemon else "no daemon answers"
    )
    state.show({"version": vhostd.__version__, "daemon": daemon}, shown)


@click.command()
@common
@pass_state
def stats(state: State) -> None:
    """Print the counters of the engine and of all open volumes, always as JSON.

    \b
    Example:
      vhostctl stats
    """
    result = state.call("stats")
    state.show(result, lambda: msgspec.json.format(msgspec.json.encode(result), indent=2).decode())


@click.command()
@click.argument("volume", metavar="[POOL/VOLUME]", required=False, shell_complete=complete_volume)
@common
@pass_state
def checkpoint(state: State, volume: str | None) -> None:
    """Checkpoint one open volume or all, so that the next recovery has less to read.

    \b
    Example:
      vhostctl checkpoint fast/web1
    """
    name = None if volume is None else checked_volume(volume)
    done = state.call("checkpoint", volume=name)
    state.show(done, "checkpointed: " + (", ".join(done) or "nothing had changed"))


@click.command()
@common
@pass_state
def jobs(state: State) -> None:
    """List what is done in the background: space being freed, clones being flattened.

    \b
    Example:
      vhostctl jobs
    """
    rows = state.call("job.list")
    state.show(rows, lambda: _jobs_table(rows))


def _jobs_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "nothing is done in the background"
    return show_table(
        ("ID", "WHAT", "VOLUME", "STATE", "DONE", "ERROR"),
        [
            (
                row["id"],
                row["kind"],
                row["volume"],
                row["state"],
                f"{show_size(row['done_bytes'])} of {show_size(row['total_bytes'])}"
                if row["total_bytes"]
                else "-",
                row["error"] or "-",
            )
            for row in rows
        ],
    )


@click.command()
@common
@pass_state
def shutdown(state: State) -> None:
    """End the daemon cleanly, as SIGTERM does. Front-ends wait and reconnect.

    \b
    Example:
      vhostctl shutdown
    """
    state.call("shutdown")
    state.show({"stopping": True}, "the daemon is stopping")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, pools and volumes.

    \b
    Examples:
      vhostctl completion bash > /etc/bash_completion.d/vhostctl
      vhostctl completion zsh  > "${fpath[1]}/_vhostctl"
      vhostctl completion fish > ~/.config/fish/completions/vhostctl.fish
    """
    # Here, as the group names this command.
    from vhostd.cli.control import vhostctl

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(vhostctl, {}, "vhostctl", "_VHOSTCTL_COMPLETE").source())
