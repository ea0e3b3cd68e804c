"""bench.stats: medians, states, and which runs may be compared."""

import pytest

from bench.stats import Sample, compare, core_state, noise, summarise


def quiet(*values: float, state: str = "near") -> list[Sample]:
    return [Sample(value, state, noisy=False) for value in values]


def test_summary_tells_median_and_extremes() -> None:
    summary = summarise([5.0, 1.0, 3.0])
    assert (summary.median, summary.low, summary.high, summary.runs) == (3.0, 1.0, 5.0, 3)
    assert summary.spread == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match="no runs"):
        summarise([])


def test_state_is_mixed_when_the_distance_changed_during_a_run() -> None:
    assert core_state(54, 55) == "sibling"
    assert core_state(105, 210) == "near"
    assert core_state(470, 460) == "far"
    assert core_state(54, 180) == "mixed"
    assert core_state(105, 470) == core_state(470, 105) == "mixed"


def test_only_runs_of_the_same_state_are_compared() -> None:
    found = compare(
        [*quiet(300, 330, 360), *quiet(90, state="far")],
        [*quiet(100, 110, 120), *quiet(1, 1, 1, 1, state="mixed")],
    )
    assert found is not None
    assert found.state == "near"
    assert found.ratio == pytest.approx(3.0)
    assert found.low == pytest.approx(2.5)
    assert found.high == pytest.approx(3.6)
    assert not found.noisy


def test_back_ends_that_never_met_in_one_state_have_no_ratio() -> None:
    assert compare(quiet(100), quiet(50, state="far")) is None
    assert compare(quiet(100, state="mixed"), quiet(50, state="mixed")) is None
    assert compare([], quiet(1)) is None


def test_the_state_both_have_most_runs_of_is_chosen() -> None:
    found = compare(
        [*quiet(10), *quiet(20, 20, state="far")], [*quiet(10, 10, 10), *quiet(5, 5, state="far")]
    )
    assert found is not None
    assert (found.state, found.subject_runs, found.peer_runs) == ("far", 2, 2)


def test_noisy_runs_are_compared_only_for_want_of_quiet_ones_and_marked() -> None:
    noisy = [Sample(1000.0, "near", noisy=True)]
    found = compare([*noisy, *quiet(100)], quiet(50))
    assert found is not None
    assert found.ratio == pytest.approx(2.0)
    assert not found.noisy
    found = compare(noisy, quiet(50))
    assert found is not None
    assert found.noisy


def test_noise_names_who_took_the_time() -> None:
    second = 10**9
    assert noise(busy_ns=2 * second, own_ns=2 * second, steal_ns=0, elapsed_s=1.0) == []
    assert noise(busy_ns=2 * second, own_ns=second, steal_ns=0, elapsed_s=1.0) == [
        "others used 100% of a core"
    ]
    assert noise(busy_ns=0, own_ns=0, steal_ns=second // 2, elapsed_s=1.0) == [
        "the host took 50% of a core"
    ]
    assert noise(busy_ns=0, own_ns=0, steal_ns=0, elapsed_s=0.0) == ["no time passed"]
