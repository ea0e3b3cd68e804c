"""What a daemon remembers."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostd.errors import BusyError, DamagedError, DeviceError, UnsupportedError
from vhostd.lockfile import LockFile
from vhostd.registry import FILE_NAME, AttachmentRecord, PoolRecord, Registry


def filled(directory: Path) -> Registry:
    registry = Registry(directory)
    registry.pools["fast"] = PoolRecord("fast", "/srv/fast")
    registry.attachments["/run/a.sock"] = AttachmentRecord(
        pool="fast", volume="a", socket="/run/a.sock", queues=4, read_only=False, write_cache=True
    )
    return registry


def test_content_survives(tmp_path: Path) -> None:
    registry = filled(tmp_path)
    registry.save()
    again = Registry.load(tmp_path)
    assert again.pools == registry.pools
    assert again.attachments == registry.attachments


def test_first_start_has_an_empty_one(tmp_path: Path) -> None:
    assert Registry.load(tmp_path).pools == {}


def test_without_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Registry(None).save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pools": 1}', '{"version": 1, "x": 2}', "\xff"])
def test_damage_is_named_and_not_repaired(tmp_path: Path, text: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DamagedError, match=FILE_NAME):
        Registry.load(tmp_path)
    assert path.read_text(encoding="latin-1") == text


def test_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"version": 2, "new": []}')
    with pytest.raises(UnsupportedError, match="version 2"):
        Registry.load(tmp_path)


def test_failed_save_leaves_the_old_one(tmp_path: Path) -> None:
    filled(tmp_path).save()
    before = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / "registry.new").mkdir()
    with pytest.raises(DeviceError, match="cannot be written"):
        filled(tmp_path).save()
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    import os

    first = LockFile(tmp_path / "lock", "the thing")
    with pytest.raises(
        BusyError, match=f"the thing is in use by the process with PID {os.getpid()}"
    ):
        LockFile(tmp_path / "lock", "the thing")
    first.release()
    LockFile(tmp_path / "lock", "the thing").release()
