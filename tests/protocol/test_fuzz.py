"""A few seconds of each fuzzer; `python -m tests.protocol.fuzz` runs them for hours."""

from __future__ import annotations

from tests.protocol.backends import Backend
from tests.protocol.fuzz_messages import MessageFuzzer
from tests.protocol.fuzz_rings import RingFuzzer

RING_CASES = 5_000
MESSAGE_CASES = 1_500


def test_random_rings_are_served_as_the_reference_says(target: Backend, seed: int) -> None:
    fuzzer = RingFuzzer(target.path, seed=seed)
    fuzzer.run(RING_CASES)
    # A fuzzer that breaks no ring, or lets most pass unjudged, tests nothing.
    assert fuzzer.broken > 0
    # (A third is usual: where a chain lets the device overwrite memory that others share.)
    assert fuzzer.unjudged < fuzzer.cases / 2


def test_random_messages_cost_only_their_session(target: Backend, seed: int) -> None:
    with MessageFuzzer(target.path, seed=seed) as fuzzer:
        fuzzer.run(MESSAGE_CASES)
        assert fuzzer.sessions > 1
