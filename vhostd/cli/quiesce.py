"""`vhostctl snapshot create --quiesce`: a snapshot with the guest's file systems frozen around it.

The guest's agent is spoken to from here, with the rights of whoever runs the command; the daemon
takes the snapshot and keeps that it was `quiesced`. docs/streams.md says what is frozen, and when
there is no snapshot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vhostd.api.client import Client
from vhostd.errors import NotFoundError, UsageError
from vhostd.storage.names import SnapshotName, VolumeName

__all__ = ["AUTO", "DEFAULT_MAX_FROZEN_S", "create_quiesced"]

AUTO = "auto"
DEFAULT_MAX_FROZEN_S = 10.0
LONGEST_FROZEN_S = 600.0


def create_quiesced(
    client: Client, name: VolumeName | SnapshotName, where: str, max_frozen_s: float
) -> dict[str, Any]:
    """Takes a snapshot of a guest whose agent froze its file systems; returns it.

    Args:
        where: the socket of the agent's channel, or `auto`: that of the QEMU process which has the
            volume attached.

    Raises:
        See `vhostd.exports.agent.while_frozen`.
    """
    # Here, and not above: it loads asyncio, which takes longer than most commands.
    from vhostd.exports import agent

    if not 0 < max_frozen_s <= LONGEST_FROZEN_S:
        raise UsageError(
            f"a guest cannot be frozen for {max_frozen_s:g} s; choose more than 0 and at most "
            f"{LONGEST_FROZEN_S:g} s"
        )
    volume = f"{name.pool}/{name.volume}"
    path = _find_socket(client, volume) if where == AUTO else Path(where)

    def take() -> dict[str, Any]:
        made: dict[str, Any] = client.call("snapshot.create", snapshot=str(name), quiesced=True)
        return made

    def undo(made: dict[str, Any]) -> None:
        client.call("snapshot.remove", volume=volume, snapshots=[made["snapshot"]])

    return agent.while_frozen(path, take, undo, max_frozen_s=max_frozen_s)


def _find_socket(client: Client, volume: str) -> Path:
    from vhostd.exports import agent

    for session in client.call("sessions"):
        if session["volume"] == volume and not session["read_only"]:
            return agent.agent_socket(session["peer_pid"])
    raise NotFoundError(
        f"no guest has volume {volume} attached, so there is none to freeze; leave out --quiesce, "
        "or name the agent's socket: --quiesce SOCKET"
    )
