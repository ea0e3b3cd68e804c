"""Snapshots as streams between pools of a real daemon: what was sent is there, or is continued."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.conftest import PROGRAMS, Host
from vhostd.errors import BusyError, DamagedError, ExistsError
from vhostd.virtqueue.block import BlockDevice

MIB = 1 << 20
SIZE = 64 * MIB
BLOCK = 4096
SEED = 20261121


class Disk:
    """A volume that is written, and what it should read as."""

    def __init__(self, host: Host, name: str) -> None:
        print(f"seed {SEED}")
        self.host = host
        self.name = name
        self.content = bytearray(SIZE)
        self.rng = random.Random(SEED)
        host.ctl("volume", "create", name, "--size", str(SIZE))
        self.socket = host.json("attach", name)["socket"]
        self.device = BlockDevice(self.socket)

    def change(self, count: int) -> None:
        """Writes and discards at odd places."""
        for _ in range(count):
            at = self.rng.randrange(SIZE // 512 - 600) * 512
            length = self.rng.randrange(1, 600) * 512
            if self.rng.random() < 0.3:
                self.device.write_zeroes(at, length)
                self.content[at : at + length] = bytes(length)
            else:
                data = self.rng.randbytes(length)
                self.device.write(at, data)
                self.content[at : at + length] = data

    def snapshot(self, name: str) -> str:
        """Returns the digest of its content."""
        with self.host.client() as client:
            client.call("snapshot.create", snapshot=f"{self.name}@{name}")
        return hashlib.sha256(self.content).hexdigest()


def digest_of(host: Host, name: str) -> str:
    """Of a volume or a snapshot, as a guest would read it."""
    with host.client() as client:
        made = client.call("attach", volume=name, read_only=True, temporary=True)
        with BlockDevice(made["socket"]) as disk:
            content = disk.read(0, disk.capacity_bytes)
        client.call("detach", volume=name, socket=made["socket"])
    return hashlib.sha256(content).hexdigest()


def piped(host: Host, export: list[str], import_: list[str]) -> tuple[Any, Any]:
    """`vhostctl export … - | vhostctl import - …`; what both say."""
    program = [*PROGRAMS["vhostctl"], "--json"]
    with subprocess.Popen(
        [*program, "export", *export],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=host.environment,
    ) as sender:
        received = subprocess.run(
            [*program, "import", *import_],
            stdin=sender.stdout,
            capture_output=True,
            env=host.environment,
            check=False,
            timeout=100,
        )
        assert sender.stdout is not None
        assert sender.stderr is not None
        sender.stdout.close()
        said = sender.stderr.read()
    assert (sender.returncode, received.returncode) == (0, 0), (said, received.stderr)
    return json.loads(said), json.loads(received.stdout)


@pytest.fixture
def web() -> Iterator[Callable[[Host], Disk]]:
    """Makes fast/web, attached."""
    with ExitStack() as stack:

        def make(host: Host) -> Disk:
            disk = Disk(host, "fast/web")
            stack.callback(disk.device.close)
            return disk

        yield make


@pytest.fixture
def pools(host: Host) -> Host:
    host.serve()
    host.pool("fast")
    host.pool("slow")
    return host


def test_increments_follow_a_volume_that_is_written_all_the_time(
    pools: Host, web: Callable[[Host], Disk]
) -> None:
    disk = web(pools)
    disk.device.write(0, b"x" * MIB)
    disk.content[:MIB] = b"x" * MIB
    disk.change(60)
    mon = disk.snapshot("mon")
    disk.change(20)
    sent, received = piped(pools, ["fast/web@mon", "-"], ["-", "slow/web"])
    assert sent["guid"] == received["snapshot"]["guid"]
    assert digest_of(pools, "slow/web@mon") == mon
    disk.device.write_zeroes(0, MIB)
    disk.content[:MIB] = bytes(MIB)
    tue = disk.snapshot("tue")
    disk.change(20)
    increment = ["fast/web@tue", "-", "--from-snapshot", "mon"]
    told, _ = piped(pools, increment, ["-", "slow/web"])
    assert digest_of(pools, "slow/web@tue") == tue
    assert digest_of(pools, "slow/web") == tue
    assert digest_of(pools, "slow/web@mon") == mon
    # It follows what changed, and discards are among it.
    assert told["data_bytes"] < sent["data_bytes"]
    assert told["zero_bytes"] > 0


def test_whole_stream_has_only_what_is_mapped(pools: Host, web: Callable[[Host], Disk]) -> None:
    disk = web(pools)
    disk.device.write(40 * MIB, b"x" * MIB)
    disk.snapshot("a")
    stream = pools.root / "a.vhs"
    told = pools.json("export", "fast/web@a", stream)
    assert told["data_bytes"] == MIB
    assert stream.stat().st_size < MIB + 8192
    raw = pools.root / "a.raw"
    pools.ctl("export", "fast/web@a", raw)
    assert raw.stat().st_size == SIZE
    assert raw.stat().st_blocks * 512 < 2 * MIB


def test_receiver_that_dies_is_continued_after_a_restart_of_the_daemon(
    host: Host, web: Callable[[Host], Disk]
) -> None:
    first = host.serve()
    host.pool("fast")
    host.pool("slow")
    disk = web(host)
    disk.device.write(0, disk.rng.randbytes(48 * MIB))
    disk.content[: 48 * MIB] = disk.device.read(0, 48 * MIB)
    expected = disk.snapshot("mon")
    disk.device.close()
    stream = host.root / "mon.vhs"
    host.ctl("export", "fast/web@mon", stream)
    whole = stream.read_bytes()
    damaged = host.root / "damaged.vhs"
    at = 20 * MIB
    damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    said = host.refused(DamagedError.exit_code, "import", damaged, "slow/web")
    assert "damaged at byte" in said
    assert "--resume-point" in said
    assert "--abandon slow/web" in host.refused(BusyError.exit_code, "attach", "slow/web")

    first.kill()
    host.serve()
    info = host.json("volume", "info", "slow/web")
    # Up to the damaged chunk all is there, and nothing behind it.
    assert 18 * MIB < info["receiving"]["applied_bytes"] < 20 * MIB
    token = host.ctl("import", "--resume-point", "slow/web").strip()
    told, _ = piped(host, ["fast/web@mon", "-", "--resume", token], ["-", "slow/web"])
    assert told["data_bytes"] < 31 * MIB
    assert digest_of(host, "slow/web@mon") == expected
    host.ctl("attach", "slow/web")


def test_volume_that_has_changed_is_rolled_back_only_by_force(
    pools: Host, web: Callable[[Host], Disk]
) -> None:
    disk = web(pools)
    disk.change(20)
    disk.snapshot("mon")
    disk.change(10)
    tue = disk.snapshot("tue")
    disk.device.close()
    mon_stream, tue_stream = pools.root / "mon.vhs", pools.root / "tue.vhs"
    pools.ctl("export", "fast/web@mon", mon_stream)
    pools.ctl("export", "fast/web@tue", tue_stream, "--from-snapshot", "mon")
    pools.ctl("import", mon_stream, "slow/web")
    assert "exists" in pools.refused(ExistsError.exit_code, "import", mon_stream, "slow/web")
    with BlockDevice(pools.json("attach", "slow/web")["socket"]) as device:
        device.write(0, b"mine" * 1024)
    said = pools.refused(BusyError.exit_code, "import", tue_stream, "slow/web")
    assert "attached" in said
    pools.ctl("detach", "slow/web")
    said = pools.refused(BusyError.exit_code, "import", tue_stream, "slow/web")
    assert "--force" in said
    pools.ctl("import", tue_stream, "slow/web", "--force")
    assert digest_of(pools, "slow/web@tue") == tue
    assert digest_of(pools, "slow/web") == tue


def test_stream_that_is_given_up_leaves_what_was_before(
    pools: Host, web: Callable[[Host], Disk]
) -> None:
    disk = web(pools)
    disk.device.write(0, disk.rng.randbytes(8 * MIB))
    disk.snapshot("mon")
    before = digest_of(pools, "fast/web@mon")
    disk.device.write(4 * MIB, disk.rng.randbytes(8 * MIB))
    disk.snapshot("tue")
    disk.device.close()
    mon, tue = pools.root / "mon.vhs", pools.root / "tue.vhs"
    pools.ctl("export", "fast/web@mon", mon)
    pools.ctl("export", "fast/web@tue", tue, "--from-snapshot", "mon")
    pools.ctl("import", mon, "slow/web")
    cut(tue, 3 * MIB)
    cut(mon, 3 * MIB)
    pools.refused(DamagedError.exit_code, "import", tue, "slow/web")
    pools.refused(DamagedError.exit_code, "import", mon, "slow/new")
    assert len(pools.json("volume", "list", "slow")) == 2
    pools.ctl("import", "--abandon", "slow/web")
    pools.ctl("import", "--abandon", "slow/new")
    assert [v["name"] for v in pools.json("volume", "list", "slow")] == ["slow/web"]
    assert digest_of(pools, "slow/web") == before


def cut(path: Path, size_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size_bytes)
