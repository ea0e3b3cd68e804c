"""Fixtures of the protocol suite: which back-ends, and a disk of each.

`backend` runs a test once for each kind; `ours` only for what is built of this project's protocol
code (vhostd, and the reference device behind the same code): for what others do not do, which the
test says; `vhostd` only for vhostd itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.protocol.backends import KINDS, Backend, BackendCache, BackendMissingError, DiskSpec

Factory = Callable[..., Backend]

_DEFAULT_KINDS = "vhostd,qsd,reference"
_BY_FIXTURE = {
    "backend": ("vhostd", "qsd", "reference"),
    "ours": ("vhostd", "reference"),
    "vhostd": ("vhostd",),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    socket_path = metafunc.config.getoption("--backend-socket")
    chosen = metafunc.config.getoption("--backends").split(",")
    unknown = set(chosen) - KINDS.keys()
    if unknown:
        raise pytest.UsageError(f"--backends knows {', '.join(KINDS)}, not {', '.join(unknown)}")
    for fixture, kinds in _BY_FIXTURE.items():
        if fixture in metafunc.fixturenames:
            marked = [
                pytest.param(kind, marks=pytest.mark.qsd) if kind == "qsd" else kind
                for kind in kinds
                if kind in chosen
            ]
            metafunc.parametrize(
                fixture, ["socket"] if socket_path else marked, indirect=True, scope="function"
            )


@pytest.fixture(scope="session")
def backend_cache(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[BackendCache]:
    socket_path = request.config.getoption("--backend-socket")
    cache = BackendCache(
        tmp_path_factory.mktemp("backends"), Path(socket_path) if socket_path else None
    )
    yield cache
    cache.stop()


def _running(cache: BackendCache, kind: str, spec: DiskSpec) -> Backend:
    if kind == "socket" and spec != DiskSpec():
        pytest.skip("the disk at --backend-socket is what it is; this test needs another")
    try:
        return cache.get(kind, spec)
    except BackendMissingError as error:
        if kind == "qsd":
            pytest.skip(str(error))
        pytest.fail(str(error), pytrace=False)


@pytest.fixture
def backend(request: pytest.FixtureRequest, backend_cache: BackendCache) -> Iterator[Backend]:
    """A back-end with the default disk, which must live on after the test."""
    found = _running(backend_cache, request.param, DiskSpec())
    yield found
    assert found.is_alive(), f"{found.kind} died:\n{found.log_tail()}"


ours = backend
vhostd = backend


@pytest.fixture
def backend_with(request: pytest.FixtureRequest, backend_cache: BackendCache) -> Factory:
    """More disks of the kind the test has: `backend_with(block_bytes=4096)`."""
    name = next(name for name in _BY_FIXTURE if name in request.fixturenames)
    kind = request.getfixturevalue(name).kind
    return lambda **spec: _running(backend_cache, kind, DiskSpec(**spec))


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """Of every random choice in this run; `--seed` repeats one. It is in the report's header."""
    return int(request.config.getoption("--seed"))
