"""The load generator and the runner of the benchmarks, against qemu-storage-daemon."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from bench import loadgen, matrix
from bench.backends import BackendError, QsdFile, QsdNull, Vhostd
from bench.runner import Runner

pytestmark = [
    pytest.mark.qsd,
    pytest.mark.skipif(
        shutil.which("qemu-storage-daemon") is None or shutil.which("cargo") is None,
        reason="needs qemu-storage-daemon and cargo",
    ),
    pytest.mark.timeout(300),
]

SIZE_BYTES = 64 << 20


@pytest.fixture(scope="module")
def binary() -> Path:
    return loadgen.build()


def test_data_written_is_data_read_and_survives_a_restart(binary: Path, tmp_path: Path) -> None:
    backend = QsdFile("qcow2", direct=True)
    backend.create(tmp_path, SIZE_BYTES)
    stamps = ["--verify", "--fresh", "--stamps", str(tmp_path / "stamps")]
    with backend.serving(tmp_path, SIZE_BYTES, 0) as running:
        load = ["--workload", "randrw", "--depth", "16", "--requests", "5000"]
        result = loadgen.run(binary, running.socket, *load, *stamps)
    assert result.errors.total == 0
    assert result.verify is not None
    assert result.verify.mismatches == 0, result.verify.first_mismatch
    assert result.verify.checked_blocks > SIZE_BYTES // 4096
    with backend.serving(tmp_path, SIZE_BYTES, 0) as running:
        load = ["--workload", "readonce", "--block", "64K", "--depth", "8"]
        result = loadgen.run(binary, running.socket, *load, *stamps)
    assert result.verify is not None
    assert result.verify.mismatches == 0, result.verify.first_mismatch


def test_a_disk_that_keeps_nothing_is_found_out(binary: Path, tmp_path: Path) -> None:
    with QsdNull().serving(tmp_path, SIZE_BYTES, 0) as running:
        load = ["--workload", "fill", "--verify", "--region", "1M"]
        result = loadgen.run(binary, running.socket, *load)
    assert result.verify is not None
    assert result.verify.mismatches > 0


@pytest.mark.parametrize(
    "options", [["--no-indirect"], ["--no-event-idx"], ["--sleep"], ["--sleep", "--no-event-idx"]]
)
def test_every_ring_option_completes_every_request(
    binary: Path, tmp_path: Path, options: list[str]
) -> None:
    with QsdNull().serving(tmp_path, SIZE_BYTES, 0) as running:
        load = ["--workload", "zipf", "--depth", "8", "--requests", "2000"]
        result = loadgen.run(binary, running.socket, *load, *options)
    assert result.requests == 2000
    assert result.errors.total == 0
    assert (result.sleeps > 0) == ("--sleep" in options)


def test_a_back_end_that_is_not_there_is_named(binary: Path, tmp_path: Path) -> None:
    with pytest.raises(loadgen.LoadgenError, match=r"nothing-here.*listening"):
        loadgen.run(binary, tmp_path / "nothing-here", "--workload", "randread")


STAND_IN = """
import os, pathlib, socket, sys
_, disk, directory, _, size, _, path = sys.argv
assert disk == "disk"
image = pathlib.Path(directory) / "image"
with image.open("ab") as file:
    file.truncate(int(size))
pathlib.Path(path).unlink(missing_ok=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
os.set_inheritable(listener.fileno(), True)
if image.name in os.environ.get("STAND_IN_FAILS", ""):
    sys.exit("it has no luck today")
print(f"ready: {path}", flush=True)
export = f"vhost-user-blk,id=e,node-name=d,writable=on,addr.type=fd,addr.str={listener.fileno()}"
os.execlp("qemu-storage-daemon", "qemu-storage-daemon", "--blockdev",
          f"driver=file,node-name=d,filename={image}", "--export", export)
"""


def test_vhostd_is_started_when_it_says_so_and_its_last_words_are_told(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    backend = Vhostd(shlex.join([sys.executable, str(stand_in)]))
    backend.create(tmp_path, SIZE_BYTES)
    backend.fill(tmp_path, SIZE_BYTES, 0, binary)
    with backend.serving(tmp_path, SIZE_BYTES, 0) as running:
        load = ["--workload", "readonce", "--depth", "8", "--backend-pid", str(running.pid)]
        result = loadgen.run(binary, running.socket, *load)
    assert result.requests == SIZE_BYTES // 4096
    assert result.cpu.backend_ns is not None
    assert result.cpu.backend_ns > 0
    monkeypatch.setenv("STAND_IN_FAILS", "image")
    with (
        pytest.raises(BackendError, match="no luck today"),
        backend.serving(tmp_path, SIZE_BYTES, 0),
    ):
        pass


def test_the_runner_measures_every_cell_of_every_back_end(binary: Path, tmp_path: Path) -> None:
    cells = [cell for cell in matrix.FULL.cells if cell.name in ("rd-qd32", "first-qd32")]
    runner = Runner(
        backends=[QsdFile("raw", direct=True), QsdNull()],
        mode=matrix.Mode("smoke", cells, 1, 0.1, 0.05, SIZE_BYTES),
        scratch=tmp_path,
        binary=binary,
        cores=(0, 1),
        say=lambda _line: None,
    )
    runner.run()
    assert runner.failures == []
    assert [(run.backend, run.cell) for run in runner.runs] == [
        ("qsd-raw-direct", "rd-qd32"),
        ("qsd-null-co", "rd-qd32"),
        ("qsd-raw-direct", "first-qd32"),
    ]
    assert not any(tmp_path.iterdir())
