"""`python -m bench compare`: runs the comparison and writes what came of it."""

import dataclasses
import sys
import tempfile
from pathlib import Path

import click

from bench import loadgen, machine, matrix, report
from bench.backends import Backend, all_backends
from bench.runner import Runner

__all__ = ["RESULTS", "compare"]

MIB = 1 << 20
RESULTS = Path(__file__).parent / "results"


def _chosen_backends(names: str | None, vhostd: str | None) -> list[Backend]:
    known = {backend.name: backend for backend in all_backends(vhostd)}
    wanted = names.split(",") if names else list(known)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise click.UsageError(f"no back-end {unknown[0]}; there are: {', '.join(known)}")
    return [known[name] for name in wanted]


def _chosen_mode(
    *,
    full: bool,
    cells: str | None,
    repeats: int | None,
    seconds: float | None,
    region_mib: int | None,
    retries: int | None,
) -> matrix.Mode:
    mode = matrix.FULL if full else matrix.QUICK
    if cells:
        known = {cell.name: cell for cell in matrix.FULL.cells}
        unknown = [name for name in cells.split(",") if name not in known]
        if unknown:
            raise click.UsageError(f"no load {unknown[0]}; there are: {', '.join(known)}")
        mode = dataclasses.replace(mode, cells=[known[name] for name in cells.split(",")])
    return dataclasses.replace(
        mode,
        repeats=repeats or mode.repeats,
        seconds=seconds or mode.seconds,
        region_bytes=region_mib * MIB if region_mib else mode.region_bytes,
        retries=mode.retries if retries is None else retries,
    )


@click.command()
@click.option("--full/--quick", default=False, help="Half an hour, or two minutes (default).")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path(tempfile.gettempdir()),
    show_default=True,
    help="Directory on the disk to measure.",
)
@click.option("--backends", help="Comma-separated names; default: all.")
@click.option("--cells", help="Comma-separated names of loads; default: all of the mode.")
@click.option("--repeats", type=click.IntRange(1, 100), help="Rounds.")
@click.option("--seconds", type=click.FloatRange(0.1, 600), help="Measured time a run.")
@click.option("--region-mib", type=click.IntRange(64), help="Size of the disks.")
@click.option("--retries", type=click.IntRange(0, 100), help="How often a noisy run is done again.")
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
def compare(
    *,
    full: bool,
    scratch: Path,
    backends: str | None,
    cells: str | None,
    repeats: int | None,
    seconds: float | None,
    region_mib: int | None,
    retries: int | None,
    vhostd: str | None,
    binary: Path | None,
    backend_core: int,
    frontend_core: int,
    results: Path,
) -> None:
    """Measures vhostd and its peers side by side; see bench/README.md."""
    if backend_core == frontend_core:
        raise click.UsageError("back-end and front-end need a core each")
    mode = _chosen_mode(
        full=full,
        cells=cells,
        repeats=repeats,
        seconds=seconds,
        region_mib=region_mib,
        retries=retries,
    )
    wanted = _chosen_backends(backends, vhostd)
    versions = {backend.name: backend.version() for backend in wanted}
    missing = [name for name, version in versions.items() if version is None]
    installed = [backend for backend in wanted if backend.name not in missing]
    for name in missing:
        click.echo(f"{name}: not installed, left out", err=True)
    if not installed:
        raise click.ClickException("no back-end is installed")
    try:
        binary = binary or loadgen.build()
    except loadgen.LoadgenError as error:
        raise click.ClickException(str(error)) from error
    facts = machine.describe(scratch)
    runner = Runner(
        backends=installed,
        mode=mode,
        scratch=scratch,
        binary=binary,
        cores=(backend_core, frontend_core),
        say=lambda line: click.echo(line, err=True),
    )
    runner.run()
    outcome = report.Report(
        machine=facts,
        mode=mode,
        cores=(backend_core, frontend_core),
        versions={name: version for name, version in versions.items() if version is not None},
        missing=missing,
        page_cache={backend.name: backend.page_cache for backend in installed},
        runs=runner.runs,
        failures=runner.failures,
    )
    for path in report.write(outcome, results):
        click.echo(path)
    if not runner.runs:
        click.echo("no run gave a figure; see the failures above", err=True)
        sys.exit(1)
