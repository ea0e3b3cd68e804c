"""What the commands share: where the daemon is, how results and errors are shown.

Output for people goes to stdout as text, with `--json` as one JSON value of a stable shape
(docs/json-output.md). Errors go to stderr, with `--json` as `{"error": {"kind", "message"}}`, and
end the process with the exit code of `vhostd.errors`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from click.shell_completion import CompletionItem

from vhostd.api.client import Client
from vhostd.config import default_api_socket
from vhostd.errors import UsageError, VhostdError
from vhostd.storage.names import parse_snapshot, parse_volume, parse_volume_or_snapshot
from vhostd.storage.sizes import format_size, parse_size

__all__ = [
    "SIZE",
    "State",
    "common",
    "complete_pool",
    "complete_volume",
    "pass_state",
    "run",
    "show_table",
]

COMPLETION_TIMEOUT_S = 2.0


@dataclass
class State:
    """What the options before or behind a command said."""

    socket: Path | None = None
    as_json: bool = False

    def client(self, timeout_s: float | None = None) -> Client:
        """The daemon. Nothing is connected before the first call."""
        path = self.socket or default_api_socket()
        return Client(path) if timeout_s is None else Client(path, timeout_s=timeout_s)

    def call(self, method: str, **params: Any) -> Any:
        """One call."""
        with self.client() as client:
            return client.call(method, **params)

    def show(self, result: Any, text: str | Callable[[], str]) -> None:
        """A result: the value as JSON, or the text."""
        if self.as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(result), indent=2).decode())
        else:
            shown = text() if callable(text) else text
            if shown:
                click.echo(shown)


pass_state = click.make_pass_decorator(State, ensure=True)
F = TypeVar("F", bound=Callable[..., Any])


def _set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(State).as_json = True


def _set_socket(context: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.ensure_object(State).socket = value


def common(command: F) -> F:
    """Adds `--json` and `--daemon` to a command."""
    command = click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=_set_json,
        help="Print JSON of a stable shape.",
    )(command)
    return click.option(
        "--daemon",
        metavar="SOCKET",
        type=click.Path(path_type=Path),
        expose_value=False,
        callback=_set_socket,
        help="The daemon's API socket.  [env: VHOSTD_SOCKET]",
    )(command)


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


SIZE = _Size()
"""A size as in `20G`; the value is bytes."""


def show_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns, the numbers in them (and sizes) to the right; never cut, so that it can be piped."""
    cells = [list(headings), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    right = [
        bool(rows) and all(str(row[i])[:1].isdigit() for row in rows) for i in range(len(headings))
    ]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines)


def show_fields(fields: Sequence[tuple[str, object]]) -> str:
    """One object: a name and a value a line."""
    width = max(len(name) for name, _ in fields)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in fields)


def show_size(size_bytes: int) -> str:
    """`20G`."""
    return format_size(size_bytes)


def show_time(time_ns: int) -> str:
    """`2026-11-21 14:05:09`, in the time zone of this process."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns / 1e9))


def volume_argument(command: F) -> F:
    """Adds the argument POOL/VOLUME."""
    return click.argument("volume", metavar="POOL/VOLUME", shell_complete=complete_volume)(command)


def snapshot_argument(command: F) -> F:
    """Adds the argument POOL/VOLUME@SNAPSHOT."""
    return click.argument("name", metavar="POOL/VOLUME@SNAPSHOT", shell_complete=complete_snapshot)(
        command
    )


def volume_or_snapshot_argument(command: F) -> F:
    """Adds the argument POOL/VOLUME[@SNAPSHOT]."""
    return click.argument(
        "volume", metavar="POOL/VOLUME[@SNAPSHOT]", shell_complete=complete_volume_or_snapshot
    )(command)


def checked_snapshot(text: str) -> str:
    """`text` if it names a snapshot.

    Raises:
        UsageError: it does not.
    """
    return str(parse_snapshot(text))


def checked_either(text: str) -> str:
    """`text` if it names a volume or a snapshot.

    Raises:
        UsageError: it does neither.
    """
    return str(parse_volume_or_snapshot(text))


def checked_volume(text: str) -> str:
    """`text` if it names a volume: said before a daemon is needed.

    Raises:
        UsageError: it does not.
    """
    return str(parse_volume(text))


# Completion: no daemon, no answer, and never an error in the middle of a line.


def _complete(context: click.Context, method: str, incomplete: str) -> list[CompletionItem]:
    root = context.find_root()
    socket = root.params.get("socket") or context.ensure_object(State).socket
    state = State(socket=Path(socket) if socket else None)
    try:
        with state.client(COMPLETION_TIMEOUT_S) as client:
            names = [row["name"] for row in client.call(method)]
    except (VhostdError, KeyError, TypeError):
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_pool(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of pools."""
    return _complete(context, "pool.list", incomplete)


def complete_volume(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of volumes, with their pools."""
    return _complete(context, "volume.list", incomplete)


def complete_snapshot(
    context: click.Context, _: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of snapshots, with their volumes."""
    return _complete(context, "snapshot.list", incomplete)


def complete_volume_or_snapshot(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of volumes and, once there is an @, of snapshots."""
    if "@" in incomplete:
        return complete_snapshot(context, parameter, incomplete)
    return complete_volume(context, parameter, incomplete)


# Ending


def run(group: click.Command, name: str) -> None:
    """Runs a command line and ends the process."""
    state = State()
    try:
        group.main(prog_name=name, standalone_mode=False, obj=state)
    except VhostdError as error:
        _show_error(name, state, error.kind, str(error))
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        if state.as_json:
            _show_error(name, state, "usage", error.format_message())
        else:
            error.show()
        sys.exit(UsageError.exit_code)
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    sys.exit(0)


def _show_error(name: str, state: State, kind: str, message: str) -> None:
    if state.as_json:
        text = msgspec.json.encode({"error": {"kind": kind, "message": message}}).decode()
    else:
        text = f"{name}: {message}"
    click.echo(text, err=True)
