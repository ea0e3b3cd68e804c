"""bench.space: what live data is, and what samples of a run say."""

import random
from pathlib import Path

import pytest

from bench.loadgen import Interval
from bench.space import account, holes, report
from bench.space.account import Sample
from bench.space.measure import Found, Rotation
from tests.unit.bench.made import MACHINE, result

MIB = 1 << 20


def sample(at_s: float, *, written: int = 0, du: int = 100, punched: int = 0) -> Sample:
    return Sample(
        at_s=at_s,
        written_bytes=written,
        du_bytes=du,
        reached_bytes=100,
        live_bytes=100,
        allocated_bytes=du,
        log_bytes=written + written // 10,
        node_bytes=written // 100,
        punched_bytes=punched,
        disk_bytes=written * 2,
        snapshots=1,
        removing=0,
    )


def test_a_volume_without_snapshots_reaches_each_block_once() -> None:
    assert account.reached_blocks(1000, [], 123_456) == 1000


def test_a_snapshot_just_taken_adds_nothing() -> None:
    assert account.reached_blocks(1000, [500], 500) == 1000


def test_expected_live_data_is_what_a_simulation_counts() -> None:
    seed = 20261121
    print(f"seed {seed}")
    chance = random.Random(seed)
    blocks, marks, written = 20_000, [5_000, 9_000, 30_000], 36_000
    head = [0] * blocks
    reached: set[tuple[int, int]] = set()
    for number in range(written):
        if number in marks:
            reached.update(enumerate(head))
        head[chance.randrange(blocks)] = number + 1
    reached.update(enumerate(head))
    expected = account.reached_blocks(blocks, marks, written)
    assert expected == pytest.approx(len(reached), rel=0.01)


def test_amplification_is_of_what_was_written_between_the_samples() -> None:
    samples = [sample(0, written=1000), sample(1, written=11_000)]
    assert list(account.amplification(samples) or ()) == pytest.approx([1.11, 2.0])
    assert account.amplification(samples[:1]) is None
    assert account.amplification([sample(0), sample(1)]) is None


def test_latencies_are_told_apart_by_whether_space_was_given_back() -> None:
    samples = [sample(0), sample(1), sample(2, punched=50), sample(3, punched=50)]
    series = [
        Interval(at_s=at_s, seconds=0.5, requests=requests, p50_ns=1, p99_ns=p99, max_ns=9)
        for at_s, requests, p99 in [(0.0, 5, 10), (1.2, 5, 70), (2.5, 5, 20), (2.9, 0, 0)]
    ]
    busy, idle = account.latencies(series, samples)
    assert (busy.p99_ns, busy.requests) == ([70], 5)
    assert (idle.p99_ns, idle.requests) == ([10, 20], 10)


def test_a_hole_is_timed_or_said_to_be_impossible(tmp_path: Path) -> None:
    cost_s = holes.hole_s(tmp_path)
    assert cost_s is None or 0 < cost_s < 10
    assert not list(tmp_path.iterdir())


def made(largest: int) -> report.Report:
    series = [Interval(at_s=0.0, seconds=1.0, requests=9, p50_ns=1, p99_ns=2000, max_ns=3000)]
    run = Rotation(
        rate=20_000,
        volume_bytes=MIB,
        keep=3,
        load=result(1000, series=series, total_bytes=10 * MIB),
        load_s=2.0,
        samples=[sample(0, written=1), sample(1, written=9, du=largest), sample(3, written=9)],
        snapshots=40,
        snapshot_s=[0.001],
    )
    return report.Report(MACHINE, "test", (0, 1), {"vhostd": "1"}, Found(0.005, [run]))


def test_the_largest_usage_decides_and_not_the_last() -> None:
    text = "\n".join(report.markdown(made(140)))
    assert "1.20, 1.40: **missed** (asked: ≤ 1.3)" in text
    assert "the same when all had settled | 1.00: reached" in text
    assert "written over 10.0 times" in text
    assert "takes 5,000 µs" in text
    assert "1.29: reached" in "\n".join(report.markdown(made(129)))


def test_all_forms_are_written(tmp_path: Path) -> None:
    paths = report.write(made(120), tmp_path)
    assert sorted(path.suffix for path in paths) == [".json", ".md", ".svg", ".svg", ".svg"]
    text = next(path for path in paths if path.suffix == ".md").read_text()
    assert all(path.name in text for path in paths if path.suffix == ".svg")
