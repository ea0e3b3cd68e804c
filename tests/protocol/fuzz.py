"""Fuzzes a vhost-user-blk back-end for as long as is wanted.

    python -m tests.protocol.fuzz --cases 1000000 [--seed N] [--what rings|messages|both]
        [--socket PATH | --backend vhostd|reference]

Without --socket it starts a back-end of its own. It ends at the first failure, with what is needed
to repeat it: the seed decides every choice. The disk at --socket is overwritten.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

from tests.protocol.backends import WITH_NEIGHBOUR, BackendCache, DiskSpec
from tests.protocol.fuzz_messages import MessageFuzzer
from tests.protocol.fuzz_rings import FuzzError, RingFuzzer

REPORT_EVERY_S = 10.0


class _Reporter:
    """Says something now and then."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def __call__(self, line: str) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= REPORT_EVERY_S:
            self._last_s = now_s
            print(line, flush=True)


def run(path: Path, *, what: str, cases: int, seed: int) -> None:
    """Raises FuzzError."""
    report = _Reporter()
    started_s = time.monotonic()
    if what in ("rings", "both"):
        rings = RingFuzzer(path, seed=seed)
        rings.run(cases, report=report)
        print(f"{rings.cases} chains, {rings.broken} broken rings, as foreseen")
    if what in ("messages", "both"):
        with MessageFuzzer(path, seed=seed) as messages:
            messages.run(cases, report=report)
            print(f"{messages.cases} messages in {messages.sessions} sessions")
    print(f"done in {time.monotonic() - started_s:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz a vhost-user-blk back-end.")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--what", choices=("rings", "messages", "both"), default="both")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", type=Path)
    where.add_argument("--backend", choices=sorted(WITH_NEIGHBOUR), default="vhostd")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="vhostd-fuzz") as directory:
        cache = BackendCache(Path(directory), options.socket)
        kind = "socket" if options.socket else options.backend
        backend = cache.get(kind, DiskSpec(), neighbour=True)
        try:
            run(backend.path, what=options.what, cases=options.cases, seed=options.seed)
        except FuzzError as error:
            print(f"FAILED: {error}\n{backend.log_tail()}", file=sys.stderr)
            return 1
        finally:
            alive = backend.is_alive()
            cache.stop()
        if not alive:
            print("FAILED: the back-end died", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
