"""Fixtures of the protocol suite: which back-ends, and a disk of each.

`backend` runs a test once for each kind; `ours` only for what is built of this project's protocol
code (vhostd, and the reference device behind the same code): for what others do not do, which the
test says; `target` likewise, for hostile tests; `vhostd_target` only for vhostd itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.protocol.backends import (
    KINDS,
    Backend,
    BackendCache,
    BackendMissingError,
    DiskSpec,
    ProcessBackend,
)
from tests.protocol.helpers import NeighbourLoad, check_io, poll_until

Factory = Callable[..., Backend]

ALL_FILES = [""] * 1_000_000
"""Longer than any list of open files."""
_BY_FIXTURE = {
    "backend": ("vhostd", "qsd", "reference"),
    "ours": ("vhostd", "reference"),
    "vhostd_target": ("vhostd",),
    "target": ("vhostd", "reference"),
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


def _running(cache: BackendCache, kind: str, spec: DiskSpec, *, neighbour: bool = False) -> Backend:
    if kind == "socket" and spec != DiskSpec():
        pytest.skip("the disk at --backend-socket is what it is; this test needs another")
    try:
        return cache.get(kind, spec, neighbour=neighbour)
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


@pytest.fixture
def target(request: pytest.FixtureRequest, backend_cache: BackendCache) -> Iterator[Backend]:
    """A victim for hostile tests. Another disk of the same daemon is used meanwhile, and must
    neither stop nor go wrong; and the daemon must live, with no descriptor more than before."""
    found = _running(backend_cache, request.param, DiskSpec(), neighbour=True)
    assert found.is_alive()
    if not isinstance(found, ProcessBackend):
        yield found
        return
    with NeighbourLoad(found.neighbour) as load:
        # Whatever the first session leaves open for good.
        with found.device() as device:
            check_io(device, "warm up")
        load.await_progress()
        before = min(found.open_files(), found.fewest_open_files or ALL_FILES, key=len)
        found.fewest_open_files = before
        yield found
        assert found.is_alive(), f"{found.kind} died:\n{found.log_tail()}"
        load.await_progress()
        poll_until(
            lambda: len(found.open_files()) <= len(before),
            lambda: f"closing all descriptors but {before} (there are {found.open_files()})",
        )
        with found.device() as device:
            check_io(device, "afterwards")


vhostd_target = target


@pytest.fixture
def backend_with(request: pytest.FixtureRequest, backend_cache: BackendCache) -> Factory:
    """More disks of the kind the test has: `backend_with(block_bytes=4096)`."""
    name = next(name for name in _BY_FIXTURE if name in request.fixturenames)
    kind = request.getfixturevalue(name).kind
    return lambda **spec: _running(backend_cache, kind, DiskSpec(**spec))
