"""Finds, builds and runs the load generator (`crates/loadgen`), and reads what it tells."""

import os
import subprocess
from pathlib import Path
from typing import Self

import msgspec

__all__ = [
    "Background",
    "Errors",
    "Interval",
    "LoadgenError",
    "Result",
    "RoundTrip",
    "build",
    "run",
]

REPOSITORY = Path(__file__).resolve().parent.parent
EXIT_UNCLEAN = 2


class LoadgenError(Exception):
    """The load could not be run, or not to its end; the message says why."""


class Latency(msgspec.Struct, frozen=True):
    mean: float
    p50: int
    p99: int
    p99_9: int
    max: int


class Errors(msgspec.Struct, frozen=True):
    ioerr: int
    unsupp: int
    other: int

    @property
    def total(self) -> int:
        return self.ioerr + self.unsupp + self.other


class Cpu(msgspec.Struct, frozen=True):
    backend_ns: int | None
    backend_ns_per_request: float | None
    frontend_ns: int
    machine_busy_ns: int
    machine_steal_ns: int


class RoundTrip(msgspec.Struct, frozen=True):
    """A cache line's way to the other core and back."""

    median_ns: float
    min_ns: float
    max_ns: float
    samples: int


class Verify(msgspec.Struct, frozen=True):
    checked_blocks: int
    mismatches: int
    first_mismatch: str | None
    read_back_errors: int


class Interval(msgspec.Struct, frozen=True):
    """A part of the measured time; a stall lengthens the one it falls into."""

    at_s: float
    seconds: float
    requests: int
    p50_ns: int
    p99_ns: int
    max_ns: int


class Result(msgspec.Struct, frozen=True):
    """What one run told; field names as in `crates/loadgen/src/report.rs`."""

    workload: str
    block_bytes: int
    depth: int
    requests: int
    bytes: int
    elapsed_s: float
    requests_per_s: float
    bytes_per_s: float
    latency_ns: Latency
    errors: Errors
    wrong_used_len: int
    kicks: int
    sleeps: int
    event_idx: bool
    cpu: Cpu
    backend_resident_bytes: int | None
    backend_anonymous_bytes: int | None
    round_trip_before: RoundTrip | None
    round_trip_after: RoundTrip | None
    verify: Verify | None
    series: list[Interval] = []
    began_monotonic_ns: int = 0
    """`time.monotonic_ns()` when the measured time began."""


def build() -> Path:
    """Builds the load generator in release mode; returns the binary's path."""
    command = ["cargo", "build", "--quiet", "--release", "--package", "vhostd-loadgen"]
    try:
        subprocess.run(command, cwd=REPOSITORY, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LoadgenError(f"cannot build the load generator: {error}") from error
    target = Path(os.environ.get("CARGO_TARGET_DIR", "target"))
    return REPOSITORY / target / "release" / "vhostd-loadgen"


def run(binary: Path, socket: Path, *arguments: str, timeout_s: float = 300) -> Result:
    """One `vhostd-loadgen run`. Failed requests and wrong data are told in the result.

    Raises LoadgenError when it could not run to its end.
    """
    command = [str(binary), "run", "--socket", str(socket), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoadgenError(f"{binary}: {error}") from error
    return _result(binary, done.returncode, done.stdout, done.stderr)


def _result(binary: Path, code: int, output: bytes, errors: bytes) -> Result:
    if code not in (0, EXIT_UNCLEAN):
        raise LoadgenError(errors.decode(errors="replace").strip())
    try:
        return msgspec.json.decode(output, type=Result)
    except msgspec.DecodeError as error:
        raise LoadgenError(f"{binary} told something else than a result: {error}") from error


class Background:
    """A load that goes on while something else is done.

    with Background(binary, socket, "--workload", "randwrite", ...) as load:
        ...                     # the measured time has begun
        result = load.finish()
    """

    def __init__(self, binary: Path, socket: Path, *arguments: str) -> None:
        self._binary = binary
        self._command = [str(binary), "run", "--socket", str(socket), "--announce", *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        self._process = process
        assert process.stderr is not None
        first = process.stderr.readline()
        if first.strip() != b"measuring":
            rest = process.communicate()[1]
            raise LoadgenError((first + rest).decode(errors="replace").strip() or "it ended early")
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.communicate()

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def finish(self, timeout_s: float = 300) -> Result:
        """Waits for its end. Raises LoadgenError when it could not run to it."""
        process = self._process
        assert process is not None, "entered before"
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LoadgenError(f"{self._binary}: no end after {timeout_s:.0f} s") from error
        return _result(self._binary, process.returncode, output, errors)
