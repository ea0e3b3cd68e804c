"""bench.session and bench.__main__: time that is left, what is counted, which command is meant."""

import dataclasses
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.session import Session, sectors_written, segment_bytes_on_disk


def session(deadline_s: float | None) -> Session:
    return Session(Path(), Path(), ["vhostd"], (0, 1), print, deadline_s)


def test_the_first_round_is_done_however_little_time_there_is() -> None:
    late = session(time.monotonic() - 1)
    assert late.has_time(0, 0.0)
    assert not late.has_time(1, 0.0)


def test_a_round_begins_only_if_one_like_the_last_would_end_in_time() -> None:
    bounded = session(time.monotonic() + 100)
    assert bounded.has_time(3, 50.0)
    assert not bounded.has_time(3, 150.0)
    assert session(None).has_time(3, 1e9)


def test_a_part_has_its_share_of_what_is_left() -> None:
    part = session(time.monotonic() + 100).part(0.25)
    assert part.left_s() == pytest.approx(25, abs=1)
    assert dataclasses.replace(session(None)).part(0.25).deadline_s is None


def test_holes_in_segments_are_not_counted(tmp_path: Path) -> None:
    directory = tmp_path / "segments" / "0"
    directory.mkdir(parents=True)
    with (directory / "a.seg").open("wb") as file:
        file.truncate(32 << 20)
        file.write(bytes(range(256)) * 16)
    (tmp_path / "catalog").write_bytes(bytes(1 << 20))
    assert 4096 <= segment_bytes_on_disk(tmp_path) < 1 << 20


def test_what_the_device_was_written_only_grows_or_is_not_known(tmp_path: Path) -> None:
    before = sectors_written(tmp_path)
    after = sectors_written(tmp_path)
    assert (before is None) == (after is None)
    assert before is None or after is None or after >= before


def test_without_a_benchmark_it_is_the_comparison() -> None:
    told = CliRunner().invoke(main, ["--backends", "nobody"])
    assert told.exit_code == 2
    assert "no back-end nobody" in told.output


def test_parts_that_do_not_exist_are_refused() -> None:
    arguments = ["snapshots", "--parts", "create,nothing", "--loadgen", __file__]
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 2
    assert "no part nothing" in told.output
