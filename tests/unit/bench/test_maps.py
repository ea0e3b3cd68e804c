"""bench.maps: figures a block, and limits."""

from pathlib import Path

from bench.maps import report
from bench.maps.measure import Fill, FirstRead, Found, Recovery, map_segment_bytes
from tests.unit.bench.made import MACHINE, result

MIB = 1 << 20


def made(memory_bytes: int, node_bytes: int) -> report.Report:
    fill = Fill("uniform", 1000, memory_bytes, node_bytes, 2 * node_bytes, 0.1, result(10))
    recoveries = [
        Recovery(number, size * MIB, 1.0 + number, 0.8, 0.1 * size, 9, 9, 0.5, True)
        for number in range(2)
        for size in (64, 256)
    ]
    first = FirstRead(0, 1000, "killed", 1.0, 0.25, result(10), 4, True)
    return report.Report(
        MACHINE, "test", (0, 1), {"vhostd": "1"}, Found([fill], recoveries, [first])
    )


def test_memory_is_told_a_block_and_nodes_a_byte_of_data() -> None:
    text = "\n".join(report.markdown(made(15_500, 40_960)))
    assert "| 15.50 | reached (asked: ≤ 16) | 1.000 | **missed** (asked: ≤ 0.5) | 2.000 |" in text


def test_recoveries_of_one_size_are_one_row() -> None:
    text = "\n".join(report.markdown(made(1, 1)))
    assert "| 64 | 6.400 | 1.50 | 0.80 | 0.5 | 9 | 2 |" in text
    assert "| 256 | 25.600 |" in text
    assert "| killed | 1,000 | 1.00 | 0.25 |" in text


def test_only_map_segments_count(tmp_path: Path) -> None:
    directory = tmp_path / "segments" / "00000000000"
    directory.mkdir(parents=True)
    for name, kind in (("a", 1), ("b", 2), ("c", 2)):
        (directory / f"{name}.seg").write_bytes(b"VHSG\x01\x00" + bytes([kind]) + bytes(8185))
    (directory / "empty.seg").touch()
    blocks = sum((directory / f"{name}.seg").stat().st_blocks for name in "bc")
    assert map_segment_bytes(tmp_path) == blocks * 512 > 0
