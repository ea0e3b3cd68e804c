"""bench.paper: tables, verdicts and charts."""

import xml.etree.ElementTree as ET

from bench import paper


def test_a_verdict_says_what_was_asked() -> None:
    assert paper.verdict(4.9, 5.0) == "reached (asked: ≤ 5)"
    assert paper.verdict(5.1, 5.0) == "**missed** (asked: ≤ 5)"
    assert paper.verdict(0.95, 0.95, at_least=True) == "reached (asked: ≥ 0.95)"
    assert paper.verdict(0.94, 0.95, at_least=True) == "**missed** (asked: ≥ 0.95)"


def test_the_slowest_of_a_hundred_is_the_maximum_and_not_the_99th_percentile() -> None:
    values = [0.001] * 99 + [1.0]
    assert paper.milliseconds(values) == "1.00 / 1.00 / 1000.00"
    assert paper.milliseconds([*values, 1.0]) == "1.00 / 1000.00 / 1000.00"
    assert paper.milliseconds([]) == "-"


def test_a_chart_is_well_formed_and_has_every_line_and_the_limit() -> None:
    lines = [paper.Line("a<b", [(0, 1), (2, 3)]), paper.Line("empty", [])]
    text = "\n".join(paper.chart("t & t", lines, x="s", y="MiB", limit=4))
    tree = ET.fromstring(text)
    told = [node.text for node in tree.iter() if node.text]
    assert {"a<b", "empty", "t & t"} <= set(told)
    drawn = [node for node in tree.iter() if node.tag.endswith("polyline")]
    assert len(drawn) == 4
    assert sum("stroke-dasharray" in node.attrib for node in drawn) == 1


def test_the_highest_point_lies_inside_the_axes() -> None:
    text = "\n".join(paper.chart("t", [paper.Line("l", [(0, 0), (10, 7)])], x="x", y="y"))
    line = [n for n in ET.fromstring(text).iter() if n.tag.endswith("polyline")][-1]
    (left, bottom), (right, top) = (
        tuple(map(float, point.split(","))) for point in line.attrib["points"].split()
    )
    assert paper.MARGIN_PX == left < right <= paper.WIDTH_PX - paper.MARGIN_PX
    assert paper.MARGIN_PX < top < bottom == paper.HEIGHT_PX - paper.MARGIN_PX
