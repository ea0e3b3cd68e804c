"""bench.report: what a reader is told, and that nothing is told that was not measured."""

import xml.etree.ElementTree as ET
from pathlib import Path

import msgspec

from bench import loadgen, report
from bench.matrix import CELLS, Mode
from bench.runner import Failure, judge
from tests.unit.bench.made import MACHINE, result


def made(results: dict[str, loadgen.Result]) -> report.Report:
    runs = [judge(raw, name, "rd-qd1", 0, dropped=True) for name, raw in results.items()]
    names = dict.fromkeys(results, "1.0")
    mode = Mode("test", CELLS, 1, 1.0, 0.1, 1 << 30)
    failures = [Failure("vhostd", "wr-qd1", 0, "it <broke>")]
    return report.Report(MACHINE, mode, (0, 1), names, ["spdk"], names, runs, failures)


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
    cpu_thief = result(1_000, busy_s=3.9)
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
