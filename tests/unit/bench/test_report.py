"""bench.report: what a reader is told, and that nothing is told that was not measured."""

import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec

from bench import loadgen, report
from bench.machine import Machine
from bench.matrix import CELLS, Mode
from bench.runner import Failure, judge


def result(requests_per_s: float, *, trip_ns: float = 105.0, busy_s: float = 2.0) -> object:
    trip = {"median_ns": trip_ns, "min_ns": trip_ns, "max_ns": trip_ns, "samples": 9}
    return {
        "workload": "randread",
        "block_bytes": 4096,
        "depth": 1,
        "requests": int(requests_per_s),
        "bytes": int(requests_per_s) * 4096,
        "elapsed_s": 1.0,
        "requests_per_s": requests_per_s,
        "bytes_per_s": requests_per_s * 4096,
        "latency_ns": {"mean": 1.0, "p50": 1000, "p99": 2000, "p99_9": 3000, "max": 4000},
        "errors": {"ioerr": 0, "unsupp": 0, "other": 0},
        "wrong_used_len": 0,
        "kicks": 0,
        "sleeps": 0,
        "event_idx": True,
        "cpu": {
            "backend_ns": 10**9,
            "backend_ns_per_request": 1e9 / requests_per_s,
            "frontend_ns": 10**9,
            "machine_busy_ns": int(busy_s * 1e9),
            "machine_steal_ns": 0,
        },
        "backend_resident_bytes": 10 << 20,
        "backend_anonymous_bytes": 1 << 20,
        "round_trip_before": trip,
        "round_trip_after": trip,
        "verify": None,
    }


def made(results: dict[str, object]) -> report.Report:
    runs = [
        judge(msgspec.convert(raw, loadgen.Result), name, "rd-qd1", 0, dropped=True)
        for name, raw in results.items()
    ]
    machine = Machine("cpu", 2, 1 << 30, True, "6.18", "ext4", "2026-01-01T00:00:00+00:00", "c", 0)
    names = dict.fromkeys(results, "1.0")
    mode = Mode("test", CELLS, 1, 1.0, 0.1, 1 << 30)
    failures = [Failure("vhostd", "wr-qd1", 0, "it <broke>")]
    return report.Report(machine, mode, (0, 1), names, ["spdk"], names, runs, failures)


def test_ratio_is_told_for_runs_of_like_state() -> None:
    text = report.markdown(made({"vhostd": result(200_000), "qsd": result(50_000)}))
    assert "| rd-qd1 | 4.00 (4.00-4.00) near |" in text
    assert "| vhostd | 200 (200-200) |" in text


def test_no_ratio_is_told_across_states() -> None:
    text = report.markdown(made({"vhostd": result(9), "qsd": result(9, trip_ns=470)}))
    assert "| rd-qd1 | no like state |" in text


def test_noise_failures_and_absent_peers_are_told() -> None:
    text = report.markdown(made({"vhostd": result(9, busy_s=3.9), "qsd": result(9)}))
    assert "1 of 2 runs were **noisy**" in text
    assert "near, noisy" in text
    assert "Not installed, so not measured: spdk" in text
    assert "it &lt;broke&gt;" in text


def test_quiet_runs_alone_make_a_figure_where_there_are_some() -> None:
    made_report = made({"vhostd": result(100_000), "qsd": result(9)})
    cpu_thief = msgspec.convert(result(1_000, busy_s=3.9), loadgen.Result)
    made_report.runs.append(judge(cpu_thief, "vhostd", "rd-qd1", 1, dropped=True))
    text = report.markdown(made_report)
    assert "| vhostd | 100 (100-100) |" in text
    assert "1 near; 1 noisy left out |" in text


def test_all_three_forms_are_written_and_well_formed(tmp_path: Path) -> None:
    paths = report.write(made({"vhostd": result(200_000), "qsd": result(50_000)}), tmp_path)
    assert [path.suffix for path in paths] == [".json", ".md", ".svg"]
    data = msgspec.json.decode(paths[0].read_bytes())
    assert [run["backend"] for run in data["runs"]] == ["vhostd", "qsd"]
    tree = ET.fromstring(paths[2].read_text())
    assert "200 k/s" in [node.text for node in tree.iter() if node.text]
