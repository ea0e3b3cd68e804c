"""The disks that benchmarks take snapshots of: what is written stays right across snapshots."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from bench import loadgen
from bench.disks import Disk, Live, QsdDisk, VhostdDisk
from bench.session import Session, segment_bytes_on_disk

pytestmark = [pytest.mark.timeout(300)]

SIZE_BYTES = 32 << 20
VHOSTD = [sys.executable, "-c", "from vhostd.cli.daemon import main; main()"]
QSD = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None, reason="needs qemu-storage-daemon"
)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    if shutil.which("cargo") is None:
        pytest.skip("needs cargo")
    scratch = tmp_path_factory.mktemp("bench")
    return Session(scratch, loadgen.build(), VHOSTD, (0, 1), print)


def disk(session: Session, kind: str) -> Disk:
    directory = session.scratch / kind
    if kind == "vhostd":
        pytest.importorskip("vhostd._native")
        return VhostdDisk(kind, directory, SIZE_BYTES, VHOSTD)
    return QsdDisk(kind, directory, SIZE_BYTES, kind=kind)


def checked(session: Session, live: Live, workload: str, *more: str) -> loadgen.Result:
    stamps = ["--verify", "--fresh", "--stamps", str(session.scratch / "stamps")]
    result = session.load(live.socket, "--workload", workload, "--depth", "8", *more, *stamps)
    assert result.verify is not None
    assert result.verify.mismatches == 0, result.verify.first_mismatch
    return result


@pytest.mark.parametrize(
    "kind",
    ["vhostd", *(pytest.param(k, marks=(QSD, pytest.mark.qsd)) for k in ("internal", "external"))],
)
def test_data_is_right_across_snapshots_and_restarts(session: Session, kind: str) -> None:
    (session.scratch / "stamps").unlink(missing_ok=True)
    tested = disk(session, kind)
    tested.create()
    try:
        for serving in range(2):
            with tested.serving(0) as live:
                for number in range(2):
                    checked(session, live, "randrw", "--requests", "2000")
                    assert live.snapshot(f"s{serving}-{number}") > 0
                    checked(session, live, "randwrite", "--requests", "500")
        with tested.serving(0) as live:
            checked(session, live, "readonce")
    finally:
        tested.remove()
    assert not tested.directory.exists()


@QSD
@pytest.mark.qsd
def test_a_rate_is_kept_and_told_by_intervals(session: Session) -> None:
    tested = disk(session, "internal")
    tested.create()
    try:
        with tested.serving(0) as live:
            load = ["--workload", "randread", "--depth", "4", "--rate", "200", "--warm-up", "0"]
            load += ["--requests", "200", "--series", "0.1"]
            begin = time.monotonic_ns()
            with loadgen.Background(session.binary, live.socket, *load) as background:
                result = background.finish()
    finally:
        tested.remove()
    assert result.requests == 200
    # The last is due 199/200 s after the first; how late it completes is the machine's affair.
    assert result.elapsed_s >= 0.99
    assert sum(interval.requests for interval in result.series) == 200
    total_s = sum(interval.seconds for interval in result.series)
    assert total_s == pytest.approx(result.elapsed_s, abs=1e-3)
    assert begin <= result.began_monotonic_ns <= time.monotonic_ns()


def test_what_vhostd_wrote_is_in_its_segments(session: Session) -> None:
    tested = disk(session, "vhostd")
    tested.create()
    try:
        with tested.serving(0) as live:
            session.load(live.socket, "--workload", "fill", "--block", "128K", "--depth", "4")
        assert segment_bytes_on_disk(Path(tested.directory) / "pool") >= SIZE_BYTES
    finally:
        tested.remove()
