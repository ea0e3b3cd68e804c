"""What `snapshot create --quiesce` asks of the daemon and of the guest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from vhostd.api.client import Client
from vhostd.cli.quiesce import create_quiesced
from vhostd.errors import NotFoundError, UsageError
from vhostd.exports import agent
from vhostd.storage.names import SnapshotName, VolumeName

WEB = VolumeName("fast", "web")
MON = SnapshotName("fast", "web", "mon")


class Daemon:
    def __init__(self, *sessions: dict[str, Any]) -> None:
        self.sessions = list(sessions)
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, **params: Any) -> Any:
        if method == "sessions":
            return self.sessions
        self.calls.append((method, params))
        return {"snapshot": "mon"}


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, float]]:
    """Guests that were frozen; each thaws by itself, so that what was taken is undone too."""
    seen: list[tuple[Path, float]] = []

    def while_frozen(
        path: Path, take: Callable[[], Any], undo: Callable[[Any], None], *, max_frozen_s: float
    ) -> Any:
        seen.append((path, max_frozen_s))
        made = take()
        undo(made)
        return made

    monkeypatch.setattr(agent, "while_frozen", while_frozen)
    monkeypatch.setattr(agent, "agent_socket", lambda pid: Path(f"/run/{pid}.sock"))
    return seen


def asked(daemon: Daemon, name: VolumeName | SnapshotName, where: str, limit_s: float) -> Any:
    return create_quiesced(cast(Client, daemon), name, where, limit_s)


def test_snapshot_says_that_it_was_quiesced_and_is_removed_if_it_was_not(
    frozen: list[tuple[Path, float]],
) -> None:
    daemon = Daemon()
    assert asked(daemon, MON, "/run/qga.sock", 3) == {"snapshot": "mon"}
    assert frozen == [(Path("/run/qga.sock"), 3)]
    assert daemon.calls == [
        ("snapshot.create", {"snapshot": "fast/web@mon", "quiesced": True}),
        ("snapshot.remove", {"volume": "fast/web", "snapshots": ["mon"]}),
    ]


def test_guest_that_writes_the_volume_is_the_one_to_freeze(
    frozen: list[tuple[Path, float]],
) -> None:
    sessions = [
        {"volume": "fast/other", "read_only": False, "peer_pid": 1},
        {"volume": "fast/web", "read_only": True, "peer_pid": 2},
        {"volume": "fast/web", "read_only": False, "peer_pid": 3},
    ]
    asked(Daemon(*sessions), WEB, "auto", 10)
    assert frozen == [(Path("/run/3.sock"), 10)]
    with pytest.raises(NotFoundError, match="no guest has volume fast/web"):
        asked(Daemon(*sessions[:2]), WEB, "auto", 10)


@pytest.mark.parametrize("limit_s", [0, -1, 601, float("nan")])
def test_limit_that_makes_no_sense_is_refused(
    frozen: list[tuple[Path, float]], limit_s: float
) -> None:
    with pytest.raises(UsageError, match="frozen for"):
        asked(Daemon(), MON, "/run/qga.sock", limit_s)
    assert frozen == []
