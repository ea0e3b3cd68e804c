"""Options and fixtures of all test suites; each suite's own are in its folder."""

from __future__ import annotations

import secrets

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vhostd")
    group.addoption(
        "--backends",
        default="vhostd,qsd,reference",
        help="back-ends for tests/protocol, of: vhostd, qsd, reference (default: all)",
    )
    group.addoption(
        "--backend-socket",
        default=None,
        metavar="PATH",
        help="run tests/protocol against this vhost-user-blk socket; its disk is overwritten",
    )
    group.addoption(
        "--seed", type=int, default=secrets.randbits(32), help="of the tests' random choices"
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('--seed')} (repeat with --seed)"


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Of every random choice in this run; `--seed` repeats one. It is in the report's header."""
    return int(request.config.getoption("--seed"))
