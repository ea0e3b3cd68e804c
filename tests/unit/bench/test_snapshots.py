"""bench.snapshots: which runs are compared, and what a reader is told."""

import pytest

from bench.runner import Run, judge
from bench.snapshots import report
from bench.snapshots.create import EMPTY, MAPPED, Creation, Stall, Timing
from bench.snapshots.first_write import AGAIN, FIRST, THIN, FirstWrites, Pass, Ratio, ratio
from bench.snapshots.throughput import LOADS, Throughput, ours
from tests.unit.bench.made import MACHINE, result


def run(name: str, number: int, rate: float, **how: float) -> Run:
    made = result(rate, **how)  # type: ignore[arg-type]
    return judge(made, name, LOADS[0].name, number, dropped=True)


def test_ratios_are_of_one_round_in_one_state() -> None:
    runs = [
        *(run("many", n, rate) for n, rate in enumerate([90.0, 96.0, 120.0])),
        *(run("none", n, 100.0) for n in range(3)),
        run("many", 3, 10.0, trip_ns=470.0),
        run("none", 3, 100.0),
    ]
    assert report.paired(runs, "many", "none") == Ratio(0.96, 0.9, 1.2, 3, False)


def test_noisy_rounds_count_only_where_no_round_was_quiet() -> None:
    quiet = [run("many", 0, 50.0), run("none", 0, 100.0)]
    noisy = [run("many", 1, 100.0, busy_s=3.9), run("none", 1, 100.0)]
    assert report.paired(quiet + noisy, "many", "none") == Ratio(0.5, 0.5, 0.5, 1, False)
    assert report.paired(noisy, "many", "none") == Ratio(1.0, 1.0, 1.0, 1, True)
    assert report.paired(noisy[:1], "many", "none") is None


def test_a_noisy_run_gives_way_to_the_one_that_was_done_again() -> None:
    again = [run("many", 0, 50.0, busy_s=3.9), run("many", 0, 90.0), run("none", 0, 100.0)]
    assert report.paired(again, "many", "none") == Ratio(0.9, 0.9, 0.9, 1, False)


def passes(disk: str, *rates: tuple[str, int, float]) -> list[Pass]:
    return [
        Pass(kind, cycle, judge(result(rate), disk, kind, 0, dropped=False))
        for kind, cycle, rate in rates
    ]


def test_each_first_write_is_compared_with_the_pass_behind_it() -> None:
    made = passes(
        "vhostd",
        (THIN, 0, 50.0),
        (AGAIN, 0, 100.0),
        (FIRST, 1, 90.0),
        (AGAIN, 1, 100.0),
        (FIRST, 2, 40.0),
        (AGAIN, 2, 50.0),
        (FIRST, 3, 70.0),
    )
    found = ratio(made, "vhostd", FIRST)
    assert found is not None
    assert found.median == pytest.approx(0.85)
    assert (found.low, found.high, found.pairs) == (0.8, 0.9, 2)
    thin = ratio(made, "vhostd", THIN)
    assert thin is not None
    assert (thin.median, thin.pairs) == (0.5, 1)
    assert ratio(made, "raw", FIRST) is None


def made_report() -> report.Report:
    timings = [
        Timing(volume, way, 0, seconds)
        for way in ("engine", "json-rpc")
        for volume, seconds in ((EMPTY, 0.001), (MAPPED, 0.002), (MAPPED, 0.009), (MAPPED, 0.001))
    ]
    stalls = [
        Stall(volume, 0, taken, result(1000, max_ns=3_000_000 + taken), [])
        for volume in (EMPTY, MAPPED)
        for taken in (0, 10)
    ]
    creation = Creation(1 << 40, {EMPTY: 0, MAPPED: 10_000_000}, 1.0, timings, stalls, 1)
    disks = {ours(0): 0, ours(1000): 1000, "qcow2-0": 0, "qcow2-external-8": 8}
    throughput = Throughput(
        disks=list(disks),
        snapshots=disks,
        create_s={name: [0.001] for name, count in disks.items() if count},
        runs=[run(name, 0, 100.0 - index) for index, name in enumerate(disks)],
        rounds=1,
    )
    first = FirstWrites(["vhostd"], passes("vhostd", (FIRST, 1, 80.0), (AGAIN, 1, 100.0)))
    return report.Report(
        MACHINE, "test", (0, 1), {"vhostd": "1", "qsd": None}, creation, throughput, first
    )


def test_all_that_is_asked_is_judged() -> None:
    text = "\n".join(report.markdown(made_report()))
    assert "| json-rpc | 1.00 / 1.00 / 1.00 | 2.00 / 9.00 / 9.00 | 2.00 | 1 |" in text
    assert f"- engine, {MAPPED}, ms: reached (asked: ≤ 5)" in text
    assert "vhostd with 1,000: 0.990, reached (asked: ≥ 0.95)" in text
    assert "first : again: 0.800, **missed** (asked: ≥ 0.9)" in text
    assert "no peer was installed" in text


def test_a_disk_is_compared_with_its_own_kind() -> None:
    text = "\n".join(report.markdown(made_report()))
    # 97 to 98 requests a second: not to vhostd's 100.
    assert "| qcow2-external-8 | 0.1 (0.1-0.1) | 2 | 0.99 (0.99-0.99) | 1 |" in text
