"""Fixtures that hand a test whole running guests.

`vm_factory(...)` and `backend_factory(...)` make as many as a test wants; all are ended after it.
When a test fails, the end of every console, QEMU's and back-end's log is put in its report.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest

from .harness import (
    TEST_GUEST,
    Backend,
    DaemonBackend,
    Disk,
    Guest,
    HarnessError,
    QsdBackend,
    VhostdBackend,
    Vm,
    vhostd_program,
)
from .harness.process import tail

VmFactory = Callable[..., Vm]
BackendFactory = Callable[..., Backend]
DaemonFactory = Callable[[int], DaemonBackend]
LOGS = pytest.StashKey[list[Callable[[], tuple[str, str]]]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.qemu)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.CallInfo[None], None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        report.sections.extend(tell() for tell in item.stash.get(LOGS, []))


@pytest.fixture
def workshop() -> Iterator[Path]:
    """A directory with a short name: socket paths end at 107 bytes. Removed after the test."""
    directory = Path(tempfile.mkdtemp(prefix="vhostd-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def backend_factory(request: pytest.FixtureRequest, workshop: Path) -> Iterator[BackendFactory]:
    """`backend_factory(kind, size_bytes=... or image=..., queues=...)`: a started back-end.

    kind: "vhostd" (`vhostd disk`), "daemon" (`vhostd serve`) or "qsd".
    """
    made: list[Backend] = []
    logs = request.node.stash.setdefault(LOGS, [])

    def make(
        kind: str, *, size_bytes: int = 0, image: Path | None = None, queues: int = 1
    ) -> Backend:
        directory = workshop / f"{kind}{len(made)}"
        size_bytes = size_bytes or (image.stat().st_size if image else 0)
        backend: Backend
        if kind == "qsd":
            backend = QsdBackend(directory, size_bytes=size_bytes, queues=queues, image=image)
        elif kind == "daemon":
            require_vhostd()
            backend = DaemonBackend(directory, size_bytes=size_bytes, queues=queues, image=image)
        else:
            require_vhostd()
            backend = VhostdBackend(directory, size_bytes=size_bytes, queues=queues)
        made.append(backend)
        logs.append(lambda: (f"{directory.name}: back-end", tail(backend.log_path)))
        backend.start()
        return backend

    yield make
    failed = []
    for backend in made:
        try:
            backend.stop()
        except HarnessError as error:
            failed.append(str(error))
            backend.kill()
    assert not failed, failed


@pytest.fixture
def daemon_factory(backend_factory: BackendFactory) -> DaemonFactory:
    """`daemon_factory(size_bytes)`: a started daemon that offers one empty volume."""

    def make(size_bytes: int) -> DaemonBackend:
        backend = backend_factory("daemon", size_bytes=size_bytes)
        assert isinstance(backend, DaemonBackend)
        return backend

    return make


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest, workshop: Path) -> Iterator[VmFactory]:
    """`vm_factory(disks, guest=...)`: a booted guest; a disk is a Disk or a Backend."""
    made: list[Vm] = []
    logs = request.node.stash.setdefault(LOGS, [])

    def make(
        disks: Sequence[Disk | Backend],
        *,
        guest: Guest = TEST_GUEST,
        cpus: int = 2,
        arguments: Sequence[str] = (),
    ) -> Vm:
        name = f"vm{len(made)}"
        chosen = [disk if isinstance(disk, Disk) else Disk.of(disk) for disk in disks]
        vm = Vm(workshop / name, guest, chosen, cpus=cpus, arguments=arguments, name=name)
        made.append(vm)
        logs.append(lambda: (f"{name}: console and QEMU", vm.logs()))
        vm.start()
        return vm

    yield make
    for vm in made:
        vm.kill()


def require_vhostd() -> None:
    """Skips a test if vhostd is not built; with VHOSTD_REQUIRED=1 (`make test`) fails it."""
    if vhostd_program() is not None:
        return
    reason = "vhostd is not installed in .venv: run 'make build'"
    if os.environ.get("VHOSTD_REQUIRED") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
