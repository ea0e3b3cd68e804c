"""`python -m bench`: the side-by-side comparison, and what snapshots, space and maps cost.

Without the name of a benchmark it is the comparison.
"""

import dataclasses
import functools
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bench import loadgen, machine
from bench.backends import BackendError, Vhostd
from bench.compare import RESULTS, compare
from bench.disks import QsdDisk
from bench.maps import measure as maps_measure
from bench.maps import report as maps_report
from bench.maps.scale import FULL as MAPS_FULL
from bench.maps.scale import QUICK as MAPS_QUICK
from bench.session import Session
from bench.snapshots import create, first_write, throughput
from bench.snapshots import report as snapshots_report
from bench.snapshots.scale import FULL, QUICK
from bench.space import measure as space_measure
from bench.space import report as space_report
from bench.space.scale import FULL as SPACE_FULL
from bench.space.scale import QUICK as SPACE_QUICK

PARTS = ("create", "throughput", "first-write")


class _Group(click.Group):
    """Options without a command before them are those of `compare`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
            args = ["compare", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Benchmarks of vhostd and its peers; see bench/README.md."""


main.add_command(compare)


@dataclasses.dataclass(frozen=True)
class Options:
    """What all of these benchmarks take."""

    full: bool
    scratch: Path
    minutes: float | None
    vhostd: str | None
    binary: Path | None
    backend_core: int
    frontend_core: int
    results: Path

    def session(self) -> Session:
        if self.backend_core == self.frontend_core:
            raise click.UsageError("back-end and front-end need a core each")
        command = shlex.split(self.vhostd) if self.vhostd else Vhostd().command
        try:
            binary = self.binary or loadgen.build()
        except loadgen.LoadgenError as error:
            raise click.ClickException(str(error)) from error
        deadline_s = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        return Session(
            scratch=self.scratch,
            binary=binary,
            vhostd=command,
            cores=(self.backend_core, self.frontend_core),
            say=_say,
            deadline_s=deadline_s,
        )

    def versions(self, session: Session) -> dict[str, str | None]:
        return {"vhostd": Vhostd(shlex.join(session.vhostd)).version(), "qsd": QsdDisk.version()}


def _say(line: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)


def _common(command: Callable[..., None]) -> Callable[..., None]:
    @click.option("--full/--quick", default=False, help="Figures to quote, or a look (default).")
    @click.option(
        "--scratch",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        default=Path(tempfile.gettempdir()),
        show_default=True,
        help="Directory on the disk to measure.",
    )
    @click.option(
        "--minutes",
        type=click.FloatRange(min=0.1),
        help="Begin no further round after this; the first round of each part is always done.",
    )
    @click.option("--vhostd", help="Command that starts vhostd, as a shell would split it.")
    @click.option(
        "--loadgen",
        "binary",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="The load generator; default: it is built.",
    )
    @click.option("--backend-core", type=click.IntRange(0), default=0, show_default=True)
    @click.option("--frontend-core", type=click.IntRange(0), default=1, show_default=True)
    @click.option(
        "--results",
        type=click.Path(path_type=Path, file_okay=False),
        default=RESULTS,
        help="Where results are written.",
    )
    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        names = [field.name for field in dataclasses.fields(Options)]
        options = Options(**{name: arguments.pop(name) for name in names})
        command(options, **arguments)

    return wrapped


def _written(paths: Sequence[Path], failures: Sequence[str]) -> None:
    for path in paths:
        click.echo(path)
    if failures:
        for failure in failures:
            click.echo(f"failed: {failure}", err=True)
        sys.exit(1)


def _guarded(what: str, failures: list[str], work: Callable[[], Any]) -> Any:
    """The result, or None with the reason kept: a part that fails stops no other."""
    _say(f"--- {what}")
    try:
        return work()
    except (BackendError, loadgen.LoadgenError) as error:
        failures.append(f"{what}: {error}")
        _say(failures[-1])
        return None


def _run_snapshots(
    options: Options,
    session: Session,
    parts: Sequence[str],
    *,
    mapped_blocks: int | None = None,
    rounds: int | None = None,
    peers: bool = True,
) -> tuple[list[Path], list[str]]:
    scale = FULL if options.full else QUICK
    if mapped_blocks is not None:
        scale = dataclasses.replace(scale, mapped_blocks=mapped_blocks)
    if rounds is not None:
        scale = dataclasses.replace(
            scale, create_rounds=rounds, load_rounds=rounds, first_rounds=rounds
        )
    versions = options.versions(session)
    peers = peers and versions["qsd"] is not None
    report = snapshots_report.Report(
        machine=machine.describe(session.scratch),
        mode=scale.name,
        cores=session.cores,
        versions=versions if peers else {**versions, "qsd": None},
    )
    # Each part takes its share of the time that is left when it begins.
    if "create" in parts:
        part = session.part(1 / 3)
        report.creation = _guarded("create", report.failures, lambda: create.measure(part, scale))
    if "throughput" in parts:
        part = session.part(2 / 3 if "first-write" in parts else 1.0)
        report.throughput = _guarded(
            "throughput",
            report.failures,
            lambda: throughput.measure(part, scale, peers=peers),
        )
    if "first-write" in parts:
        report.first_writes = _guarded(
            "first-write",
            report.failures,
            lambda: first_write.measure(session, scale, peers=peers),
        )
    failures = report.failures + (report.creation.failures if report.creation else [])
    for found in (report.throughput, report.first_writes):
        failures += [f"{f.backend} {f.cell}: {f.reason}" for f in (found.failures if found else [])]
    return snapshots_report.write(report, options.results), failures


def _run_space(options: Options, session: Session) -> tuple[list[Path], list[str]]:
    scale = SPACE_FULL if options.full else SPACE_QUICK
    report = space_report.Report(
        machine=machine.describe(session.scratch),
        mode=scale.name,
        cores=session.cores,
        versions=options.versions(session),
    )
    report.found = _guarded("space", report.failures, lambda: space_measure.measure(session, scale))
    failures = report.failures + (report.found.failures if report.found else [])
    return space_report.write(report, options.results), failures


def _run_maps(options: Options, session: Session) -> tuple[list[Path], list[str]]:
    scale = MAPS_FULL if options.full else MAPS_QUICK
    report = maps_report.Report(
        machine=machine.describe(session.scratch),
        mode=scale.name,
        cores=session.cores,
        versions=options.versions(session),
    )
    report.found = _guarded("maps", report.failures, lambda: maps_measure.measure(session, scale))
    failures = report.failures + (report.found.failures if report.found else [])
    return maps_report.write(report, options.results), failures


@main.command("snapshots")
@click.option(
    "--parts",
    default=",".join(PARTS),
    show_default=True,
    help="Which parts, separated by commas.",
)
@click.option("--mapped-blocks", type=click.IntRange(1), help="Of the volume that is not empty.")
@click.option("--rounds", type=click.IntRange(1, 100), help="Of each part.")
@click.option("--peers/--no-peers", default=True, help="qemu-storage-daemon beside it (default).")
@_common
def snapshots_command(
    options: Options, *, parts: str, mapped_blocks: int | None, rounds: int | None, peers: bool
) -> None:
    """What snapshots cost: to take, to have a thousand of, to write after."""
    wanted = parts.split(",")
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        raise click.UsageError(f"no part {unknown[0]}; there are: {', '.join(PARTS)}")
    session = options.session()
    _written(
        *_run_snapshots(
            options, session, wanted, mapped_blocks=mapped_blocks, rounds=rounds, peers=peers
        )
    )


@main.command("space")
@_common
def space_command(options: Options) -> None:
    """What a pool takes while a volume is overwritten and snapshots rotate."""
    _written(*_run_space(options, options.session()))


@main.command("maps")
@_common
def maps_command(options: Options) -> None:
    """What maps take of memory and disk, and how long recovery and first reads take."""
    _written(*_run_maps(options, options.session()))


@main.command("all")
@_common
def all_command(options: Options) -> None:
    """Snapshots, space and maps, one after another within the time."""
    session = options.session()
    paths: list[Path] = []
    failures: list[str] = []
    works: list[tuple[float, Callable[[Session], tuple[list[Path], list[str]]]]] = [
        (0.6, lambda part: _run_snapshots(options, part, PARTS)),
        (0.5, lambda part: _run_space(options, part)),
        (1.0, lambda part: _run_maps(options, part)),
    ]
    for share, work in works:
        written, failed = work(session.part(share))
        paths += written
        failures += failed
        for path in written:
            _say(f"written: {path}")
    _written(paths, failures)


if __name__ == "__main__":
    main()
