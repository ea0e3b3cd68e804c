"""`vhostctl import` and `export`: what goes in comes out."""

from __future__ import annotations

import hashlib
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.daemon.conftest import Host
from vhostd.errors import (
    BusyError,
    DeviceError,
    ExistsError,
    NotFoundError,
    UsageError,
)
from vhostd.virtqueue.block import BlockDevice

MIB = 1 << 20
SEED = 20260601


def make_raw(path: Path, size_bytes: int) -> str:
    """A sparse file with pieces of data at odd places; the digest of its content."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for _ in range(24):
            file.seek(rng.randrange(size_bytes - 300_000))
            file.write(rng.randbytes(rng.randrange(1, 300_000)))
    return digest(path)


def digest(path: Path, size_bytes: int | None = None) -> str:
    with path.open("rb") as file:
        content = file.read() if size_bytes is None else file.read(size_bytes)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def pool(host: Host) -> Host:
    host.serve()
    host.pool()
    return host


def test_raw_image_comes_out_as_it_went_in(pool: Host) -> None:
    source, result = pool.root / "in.raw", pool.root / "out.raw"
    expected = make_raw(source, 96 * MIB)
    told = pool.json("import", source, "fast/a")
    assert told["volume"]["size_bytes"] == 96 * MIB
    assert told["written_bytes"] < 16 * MIB
    assert told["volume"]["mapped_bytes"] < 16 * MIB
    assert told["volume"]["attachments"] == []
    pool.ctl("export", "fast/a", result)
    assert result.stat().st_size == 96 * MIB
    assert result.stat().st_blocks * 512 < 16 * MIB
    assert digest(result) == expected


@pytest.mark.qsd
@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi"])
def test_other_formats_come_out_as_they_went_in(pool: Host, image_format: str) -> None:
    raw, image = pool.root / "in.raw", pool.root / f"in.{image_format}"
    expected = make_raw(raw, 64 * MIB)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, raw, image], check=True)
    pool.ctl("import", image, "fast/a")
    back = pool.root / f"out.{image_format}"
    pool.ctl("export", "fast/a", back)
    again = pool.root / "again.raw"
    subprocess.run(
        ["qemu-img", "convert", "-f", image_format, "-O", "raw", back, again], check=True
    )
    assert digest(again, 64 * MIB) == expected
    assert back.stat().st_blocks * 512 < 32 * MIB


def test_odd_size_is_padded_with_zeroes(pool: Host) -> None:
    source = pool.root / "odd.raw"
    source.write_bytes(b"x" * 100_001)
    told = pool.json("import", source, "fast/a", "--logical-block-size", "4096")
    assert told["volume"]["size_bytes"] == 102_400
    pool.ctl("export", "fast/a", pool.root / "out.raw")
    assert (pool.root / "out.raw").read_bytes() == b"x" * 100_001 + bytes(2399)


def test_volume_can_be_larger_than_its_image(pool: Host) -> None:
    source = pool.root / "in.raw"
    source.write_bytes(b"x" * 4096)
    assert pool.json("import", source, "fast/a", "--size", "1G")["volume"]["size_bytes"] == 1 << 30


def test_import_that_cannot_be_leaves_no_volume(pool: Host) -> None:
    root, usage = pool.root, UsageError.exit_code
    (root / "empty.raw").touch()
    (root / "disguised.raw").write_bytes(b"QFI\xfb" + bytes(8192))
    (root / "bad.qcow2").write_bytes(b"nonsense" * 1024)
    (root / "small.raw").write_bytes(bytes(8192))
    pool.ctl("volume", "create", "fast/taken", "--size", "1M")
    before = pool.json("volume", "list")
    missing = NotFoundError.exit_code
    assert "nowhere.raw" in pool.refused(missing, "import", root / "nowhere.raw", "fast/a")
    assert "is empty" in pool.refused(usage, "import", root / "empty.raw", "fast/a")
    assert "--format raw" in pool.refused(usage, "import", root / "disguised.raw", "fast/a")
    code = DeviceError.exit_code
    assert "bad.qcow2" in pool.refused(code, "import", root / "bad.qcow2", "fast/a")
    small = root / "small.raw"
    assert "8192" in pool.refused(usage, "import", small, "fast/a", "--size", "4096")
    assert "exists" in pool.refused(ExistsError.exit_code, "import", small, "fast/taken")
    assert pool.json("volume", "list") == before


def test_temporary_attachment_ends_with_its_session(pool: Host) -> None:
    """As when vhostctl is killed in the middle of an import."""
    pool.ctl("volume", "create", "fast/a", "--size", "1M")
    with pool.client() as client:
        made = client.call("attach", volume="fast/a", temporary=True)
        assert made["temporary"]
        with BlockDevice(made["socket"]) as disk:
            disk.write(0, b"x" * 512)
        # The daemon tells nobody, so it is asked until it says so.
        deadline = time.monotonic() + 30
        while client.call("attachments"):
            assert time.monotonic() < deadline, "the attachment stays"
    assert not Path(made["socket"]).exists()
    pool.ctl("volume", "remove", "fast/a")


def test_export_does_not_replace_a_file_unless_told(pool: Host) -> None:
    pool.ctl("volume", "create", "fast/a", "--size", "1M")
    target = pool.root / "out.raw"
    target.write_text("mine")
    assert "--force" in pool.refused(ExistsError.exit_code, "export", "fast/a", target)
    assert target.read_text() == "mine"
    pool.ctl("export", "fast/a", target, "--force")
    assert target.stat().st_size == MIB
    assert [p.name for p in pool.root.glob("*out*")] == ["out.raw"]
    missing = pool.root / "no" / "out.raw"
    assert "does not exist" in pool.refused(NotFoundError.exit_code, "export", "fast/a", missing)


def test_export_of_a_volume_in_use_is_refused_and_of_a_shared_one_works(pool: Host) -> None:
    pool.ctl("volume", "create", "fast/a", "--size", "1M")
    socket = pool.json("attach", "fast/a")["socket"]
    with BlockDevice(socket) as disk:
        disk.write(0, b"x" * 512)
    target = pool.root / "out.raw"
    assert "attached" in pool.refused(BusyError.exit_code, "export", "fast/a", target)
    assert not list(pool.root.glob("*out*"))
    pool.ctl("detach", "fast/a")
    pool.ctl("attach", "fast/a", "--read-only")
    pool.ctl("export", "fast/a", target)
    assert target.read_bytes()[:512] == b"x" * 512
