"""A progress bar for what takes long: on stderr if that is a terminal, else nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vhostd.cli.common import State

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(state: State, title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is to be called with the bytes that are done, and those in all."""
    if state.as_json or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    # Here, and not above: it takes longer to load than most commands to run.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
