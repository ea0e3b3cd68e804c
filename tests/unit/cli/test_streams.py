"""`vhostctl export` and `import` of streams, from a daemon that is made of dictionaries."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.unit.transfer.disk import MemoryDisk
from vhostd.api import transfers
from vhostd.cli import attached as attached_module
from vhostd.cli import common, streams, transfer
from vhostd.cli.control import vhostctl
from vhostd.daemon import Daemon
from vhostd.errors import BusyError, DamagedError, NotFoundError, UsageError, VhostdError
from vhostd.transfer.stream import ResumePoint

MIB = 1 << 20
SIZE = 8 * MIB
BLOCK = 4096


class World:
    """Two pools with volumes, whose snapshots are bytes."""

    def __init__(self) -> None:
        self.disks: dict[str, MemoryDisk] = {}
        self.snapshots: dict[str, list[dict[str, Any]]] = {}
        self.waiting: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.attached: list[str] = []
        self.pages = 0

    def add_snapshot(self, volume: str, name: str, content: bytes, guid: str | None = None) -> None:
        rows = self.snapshots.setdefault(volume, [])
        rows.append(
            {
                "snapshot": name,
                "guid": guid or str(UUID(int=len(self.disks) + 100)),
                "size_bytes": len(content),
                "created_ns": len(rows) + 1,
                "quiesced": False,
            }
        )
        disk = MemoryDisk(len(content), seed=3)
        disk.content[:] = content
        self.disks[f"{volume}@{name}"] = disk

    def call(self, method: str, **params: Any) -> Any:
        # What the daemon would not take is not taken here.
        known = transfers.methods(cast(Daemon, None)).get(method)
        if known is not None:
            msgspec.convert(params, known[0])
        self.calls.append(method)
        return getattr(self, "_" + method.replace(".", "_"))(**params)

    def _volume_info(self, volume: str) -> dict[str, Any]:
        return {"uuid": str(UUID(int=1)), "size_bytes": SIZE, "logical_block_bytes": 512}

    def _snapshot_list(self, volume: str) -> list[dict[str, Any]]:
        return self.snapshots.get(volume, [])

    def _snapshot_info(self, snapshot: str) -> dict[str, Any]:
        volume, _, name = snapshot.partition("@")
        return next(row for row in self.snapshots[volume] if row["snapshot"] == name)

    def _snapshot_diff(self, volume: str, snapshot: str, start: int, **params: Any) -> Any:
        self.pages += 1
        new = self.disks[f"{volume}@{snapshot}"].content
        base = params["from"]
        old = self.disks[f"{volume}@{base}"].content if base else bytes(len(new))
        found: list[tuple[int, int, str]] = []
        for at in range(start, len(new), BLOCK):
            block = new[at : at + BLOCK]
            if block != old[at : at + BLOCK]:
                if len(found) == 3:
                    return {"ranges": found, "next": at}
                found.append((at, BLOCK, "data" if any(block) else "zero"))
        return {"ranges": found, "next": None}

    def _receive_begin(self, volume: str, **stream: Any) -> dict[str, Any]:
        point = self.waiting.setdefault(
            volume,
            {
                "volume": volume,
                "snapshot": stream["snapshot"],
                "guid": stream["guid"],
                "from_guid": stream["from_guid"],
                "size_bytes": stream["size_bytes"],
                "applied_bytes": 0,
            },
        )
        assert stream["start_bytes"] <= point["applied_bytes"]
        self.disks.setdefault(volume, MemoryDisk(stream["size_bytes"], seed=9))
        return {"socket": volume, "applied_bytes": point["applied_bytes"], "resumed": False}

    def _receive_note(self, volume: str, guid: str, applied_bytes: int) -> None:
        assert self.waiting[volume]["guid"] == guid
        self.waiting[volume]["applied_bytes"] = applied_bytes

    def _receive_info(self, volume: str) -> dict[str, Any]:
        if volume not in self.waiting:
            raise NotFoundError(f"volume {volume} waits for no stream")
        return self.waiting[volume]

    def _receive_commit(self, volume: str, guid: str) -> dict[str, Any]:
        point = self.waiting.pop(volume)
        assert point["guid"] == guid
        self.add_snapshot(volume, point["snapshot"], self.disks[volume].durable, guid)
        return {"name": f"{volume}@{point['snapshot']}"}

    def _receive_abandon(self, volume: str) -> dict[str, Any]:
        del self.waiting[volume]
        return {"volume": volume, "removed": True}

    def _detach(self, volume: str, socket: str) -> None:
        pass

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()

    @contextmanager
    def attached(client: World, name: str, *, read_only: bool) -> Iterator[MemoryDisk]:
        client.attached.append(name)
        yield client.disks[name]

    @contextmanager
    def open_disk(socket: Path) -> Iterator[MemoryDisk]:
        yield world.disks[str(socket)]

    for module in (streams, transfer, attached_module):
        monkeypatch.setattr(module, "attached", attached)
        monkeypatch.setattr(module, "open_disk", open_disk)
    monkeypatch.setattr(common.State, "client", lambda _self, *_: world)
    monkeypatch.setattr(streams, "RANGES_A_CALL", 3)
    first = bytearray(SIZE)
    for block in (0, 1, 7, 300, 1000):
        first[block * BLOCK : (block + 1) * BLOCK] = bytes([block % 255 + 1]) * BLOCK
    then = bytearray(first)
    then[BLOCK : 2 * BLOCK] = bytes(BLOCK)
    then[5 * MIB : 6 * MIB] = b"x" * MIB
    world.add_snapshot("fast/web", "mon", bytes(first))
    world.add_snapshot("fast/web", "tue", bytes(then))
    return world


def run(*words: str | Path, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(vhostctl, [str(word) for word in words], input=stdin)


def done(*words: str | Path, stdin: bytes = b"") -> Any:
    result = run("--json", *words, stdin=stdin)
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def failed(kind: type[VhostdError], *words: str | Path) -> str:
    result = run(*words)
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


def test_snapshot_and_increment_go_to_another_pool_by_files(world: World, tmp_path: Path) -> None:
    mon, tue = tmp_path / "mon.vhs", tmp_path / "tue.vhs"
    told = done("export", "fast/web@mon", mon)
    assert (told["data_bytes"], told["zero_bytes"], told["format"]) == (5 * BLOCK, 0, "stream")
    assert mon.stat().st_size < 6 * BLOCK
    told = done("export", "fast/web@tue", tue, "--from-snapshot", "mon")
    assert (told["data_bytes"], told["zero_bytes"]) == (MIB, BLOCK)
    # Both snapshots are held while the stream is made.
    assert world.attached[-2:] == ["fast/web@tue", "fast/web@mon"]
    assert world.pages > 3

    assert done("import", mon, "slow/web")["snapshot"]["name"] == "slow/web@mon"
    assert world.disks["slow/web"].durable == world.disks["fast/web@mon"].content
    done("import", tue, "slow/web")
    assert world.disks["slow/web"].durable == world.disks["fast/web@tue"].content
    guids = [[row["guid"] for row in world.snapshots[v]] for v in ("fast/web", "slow/web")]
    assert guids[0] == guids[1]
    assert world.waiting == {}


def test_stream_that_broke_is_continued_by_its_token(world: World, tmp_path: Path) -> None:
    whole, part, rest = (tmp_path / name for name in ("whole.vhs", "part.vhs", "rest.vhs"))
    done("export", "fast/web@tue", whole)
    part.write_bytes(whole.read_bytes()[:-200_000])
    result = run("import", part, "slow/web")
    assert isinstance(result.exception, DamagedError)
    assert "--resume-point slow/web" in result.stderr
    token = done("import", "--resume-point", "slow/web")["token"]
    assert run("import", "--resume-point", "slow/web").stdout.strip() == token
    applied = ResumePoint.parse(token).applied_bytes
    assert applied > 0
    told = done("export", "fast/web@tue", rest, "--resume", token)
    assert told["start_bytes"] == applied
    assert rest.stat().st_size < whole.stat().st_size
    done("import", rest, "slow/web")
    assert world.disks["slow/web"].durable == world.disks["fast/web@tue"].content


def test_stream_that_brought_nothing_leaves_nothing(world: World, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.vhs", tmp_path / "part.vhs"
    done("export", "fast/web@mon", whole)
    part.write_bytes(whole.read_bytes()[:200])
    failed(DamagedError, "import", part, "slow/web")
    assert world.calls[-1] == "receive.abandon"
    before = len(world.calls)
    part.write_bytes(b"no stream at all")
    failed(DamagedError, "import", part, "slow/web")
    # What is no stream is not worth a word to the daemon.
    assert len(world.calls) == before


def test_stream_comes_from_stdin(world: World, tmp_path: Path, capfdbinary: Any) -> None:
    with capfdbinary.disabled():
        done("export", "fast/web@mon", tmp_path / "mon.vhs")
    with (tmp_path / "mon.vhs").open("rb") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stream)
        streams.import_stream(common.State(), Path("-"), "slow/web", force=False)
    assert world.disks["slow/web"].durable == world.disks["fast/web@mon"].content


def test_stream_goes_to_stdout_and_what_is_said_of_it_does_not(
    world: World, tmp_path: Path, capfd: Any
) -> None:
    target = tmp_path / "out.vhs"
    with target.open("wb") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        streams.export_stream(
            common.State(as_json=True),
            "fast/web@mon",
            Path("-"),
            from_snapshot=None,
            resume=None,
            force=False,
        )
    assert json.loads(capfd.readouterr().err)["data_bytes"] == 5 * BLOCK
    done("import", target, "slow/web")
    assert world.disks["slow/web"].durable == world.disks["fast/web@mon"].content


def test_what_cannot_be_exported_is_explained(world: World, tmp_path: Path) -> None:
    out = tmp_path / "x.vhs"
    assert "snapshot create fast/web" in failed(UsageError, "export", "fast/web", out)
    assert "fast/web@wed" in failed(NotFoundError, "export", "fast/web@wed", out)
    since = ("--from-snapshot", "sun")
    assert "fast/web@sun" in failed(NotFoundError, "export", "fast/web@tue", out, *since)
    since = ("--from-snapshot", "tue")
    assert "itself" in failed(UsageError, "export", "fast/web@tue", out, *since)
    assert "token" in failed(UsageError, "export", "fast/web@tue", out, "--resume", "vhostd-1-xx")
    guid = UUID(world.snapshots["fast/web"][0]["guid"])
    of_mon = ResumePoint(guid, None, SIZE, 0).token()
    failed(UsageError, "export", "fast/web@tue", out, "--resume", of_mon)
    lost = ResumePoint(guid, UUID(int=77), SIZE, 0).token()
    said = failed(NotFoundError, "export", "fast/web@mon", out, "--resume", lost)
    assert "is not there any more" in said
    failed(UsageError, "export", "fast/web@mon", "-", "--format", "qcow2")
    failed(UsageError, "export", "fast/web@mon", out, "--format", "raw", "--from-snapshot", "tue")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_imported_is_explained(world: World, tmp_path: Path) -> None:
    failed(NotFoundError, "import", tmp_path / "none.vhs", "slow/web")
    failed(UsageError, "import", tmp_path / "none.vhs")
    failed(UsageError, "import", "-", "slow/web", "--format", "raw")
    failed(UsageError, "import", tmp_path / "x.vhs", "slow/web", "--size", "1G")
    failed(UsageError, "import", "x", "slow/web", "--resume-point", "slow/web")
    failed(UsageError, "import", tmp_path / "x.raw", "slow/web", "--force")
    failed(NotFoundError, "import", "--resume-point", "slow/web")


def test_daemon_that_refuses_leaves_its_volume_alone(world: World, tmp_path: Path) -> None:
    done("export", "fast/web@mon", tmp_path / "mon.vhs")

    def refuse(**_: Any) -> None:
        raise BusyError("it has changed")

    world._receive_begin = refuse  # type: ignore[method-assign,assignment]
    failed(BusyError, "import", tmp_path / "mon.vhs", "slow/web")
    assert world.calls[-1] == "receive.begin"


def test_raw_export_of_a_snapshot_reads_only_what_is_mapped(world: World, tmp_path: Path) -> None:
    told = done("export", "fast/web@mon", tmp_path / "mon.raw")
    assert (tmp_path / "mon.raw").read_bytes() == world.disks["fast/web@mon"].content
    assert world.disks["fast/web@mon"].read_bytes < SIZE // 4
    assert told["size_bytes"] == SIZE
