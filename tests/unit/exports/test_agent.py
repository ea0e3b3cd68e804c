"""`snapshot create --quiesce`: whatever a guest's agent does, the guest is thawed in the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostd.errors import (
    BusyError,
    DeviceError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
    VhostdError,
)
from vhostd.exports import agent as module
from vhostd.exports.agent import GuestAgent, agent_socket, while_frozen

Reply = bytes | dict[str, Any] | None
Hook = Callable[[dict[str, Any]], "Reply | str"]


class FakeAgent(threading.Thread):
    """An agent behind QEMU's socket: one connection at a time, state that outlives them.

    Hooks answer a command in their own way: bytes as they are, a dict as the answer, None for no
    answer at all, "close" to close the connection, "default" for what a good agent does.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.frozen = False
        self.commands: list[str] = []
        self.hooks: dict[str, Hook] = {}
        self.stale = b""
        self.thawed = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self.start()

    def run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(self.stale)
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        buffer = b""
        while True:
            try:
                received = connection.recv(4096)
            except OSError:
                return
            if not received:
                return
            buffer += received
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                message = json.loads(line.rsplit(b"\xff", 1)[-1])
                answer = self._answer(message)
                if answer == "close":
                    return
                try:
                    connection.sendall(answer)  # type: ignore[arg-type]
                except OSError:
                    return

    def _answer(self, message: dict[str, Any]) -> bytes | str:
        command = message["execute"]
        self.commands.append(command)
        answer: Reply | str = "default"
        if command in self.hooks:
            answer = self.hooks[command](message)
        if answer == "default":
            answer = self._default(message)
        if answer is None:
            return b""
        if isinstance(answer, dict):
            return json.dumps(answer).encode() + b"\n"
        return answer

    def _default(self, message: dict[str, Any]) -> Reply:
        command = message["execute"]
        if command == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": message["arguments"]["id"]}).encode() + b"\n"
        if command == "guest-fsfreeze-status":
            return {"return": "frozen" if self.frozen else "thawed"}
        if command == "guest-fsfreeze-freeze":
            self.frozen = True
            return {"return": 2}
        if command == "guest-fsfreeze-thaw":
            self.frozen = False
            self.thawed.set()
            return {"return": 2}
        return {"error": {"class": "CommandNotFound", "desc": f"no {command}"}}

    def close(self) -> None:
        # Wakes `accept`; closing alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join(10)


@pytest.fixture
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAgent]:
    fake = FakeAgent(tmp_path_factory.mktemp("a") / "qga.sock")
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def short_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(GuestAgent.connect.__func__, "__kwdefaults__", {"timeout_s": 0.5})  # type: ignore[attr-defined]
    for method in (GuestAgent.sync, GuestAgent.is_frozen, GuestAgent.thaw):
        monkeypatch.setattr(method, "__kwdefaults__", {"timeout_s": 0.5})
    monkeypatch.setattr(module, "RECONNECT_WAIT_S", 0.01)


class Snapshots:
    """What `take` and `undo` do, and whether the guest was frozen meanwhile."""

    def __init__(self, agent: FakeAgent) -> None:
        self.agent = agent
        self.made: list[str] = []
        self.frozen_at_take: list[bool] = []

    def take(self) -> str:
        self.frozen_at_take.append(self.agent.frozen)
        self.made.append("s")
        return "s"

    def undo(self, name: str) -> None:
        self.made.remove(name)

    def quiesced(self, *, max_frozen_s: float = 5.0, thaw_timeout_s: float = 2.0) -> str:
        return while_frozen(
            self.agent.path,
            self.take,
            self.undo,
            max_frozen_s=max_frozen_s,
            thaw_timeout_s=thaw_timeout_s,
        )


@pytest.fixture
def snapshots(agent: FakeAgent) -> Snapshots:
    return Snapshots(agent)


def test_snapshot_is_taken_while_frozen_and_the_guest_is_thawed(snapshots: Snapshots) -> None:
    assert snapshots.quiesced() == "s"
    assert snapshots.frozen_at_take == [True]
    assert not snapshots.agent.frozen
    assert [c for c in snapshots.agent.commands if "fsfreeze" in c] == [
        "guest-fsfreeze-status",
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-status",
        "guest-fsfreeze-thaw",
    ]


def test_what_an_older_client_left_in_the_channel_is_skipped(snapshots: Snapshots) -> None:
    snapshots.agent.stale = (
        b'{"return": 17}\n{"ret' + b"\xff" + b'{"return": 5}\n' + b"\xff\xff" + b"nonsense\n"
    )
    assert snapshots.quiesced() == "s"


def test_failed_snapshot_thaws_the_guest_and_says_why(snapshots: Snapshots) -> None:
    def fail() -> str:
        raise BusyError("no snapshot today")

    with pytest.raises(BusyError, match="no snapshot today"):
        while_frozen(snapshots.agent.path, fail, snapshots.undo)
    assert not snapshots.agent.frozen
    assert snapshots.agent.thawed.is_set()


def test_guest_is_thawed_in_time_and_a_late_snapshot_is_removed(snapshots: Snapshots) -> None:
    agent = snapshots.agent

    def slow() -> str:
        # A daemon that takes longer than a guest may be frozen.
        assert agent.thawed.wait(30)
        return snapshots.take()

    began_s = time.monotonic()
    with pytest.raises(UnavailableError, match="there is no snapshot"):
        while_frozen(agent.path, slow, snapshots.undo, max_frozen_s=0.2)
    assert time.monotonic() - began_s < 10
    assert snapshots.frozen_at_take == [False]
    assert snapshots.made == []
    assert not agent.frozen


def test_guest_that_thaws_by_itself_has_no_snapshot(snapshots: Snapshots) -> None:
    def take() -> str:
        snapshots.agent.frozen = False
        return snapshots.take()

    with pytest.raises(UnavailableError, match="there is no snapshot"):
        while_frozen(snapshots.agent.path, take, snapshots.undo)
    assert snapshots.made == []


def test_guest_that_another_has_frozen_is_left_alone(snapshots: Snapshots) -> None:
    snapshots.agent.frozen = True
    with pytest.raises(BusyError, match="frozen already"):
        snapshots.quiesced()
    assert snapshots.agent.frozen
    assert "guest-fsfreeze-thaw" not in snapshots.agent.commands


def test_agent_that_does_not_answer_costs_seconds(snapshots: Snapshots) -> None:
    snapshots.agent.hooks["guest-sync-delimited"] = lambda _: None
    with pytest.raises(UnavailableError, match="qemu-guest-agent runs"):
        snapshots.quiesced()
    assert snapshots.made == []


def test_agent_that_never_ends_its_freeze_is_told_to_thaw(snapshots: Snapshots) -> None:
    def stuck(_: dict[str, Any]) -> Reply:
        snapshots.agent.frozen = True
        return None

    snapshots.agent.hooks["guest-fsfreeze-freeze"] = stuck
    with pytest.raises(UnavailableError):
        snapshots.quiesced(max_frozen_s=0.2)
    assert not snapshots.agent.frozen
    assert snapshots.made == []


@pytest.mark.parametrize("how", ["close", b"\x00\x01\n", {"surprise": 1}, b"x" * 100_000])
def test_channel_that_breaks_while_frozen_is_opened_again_to_thaw(
    snapshots: Snapshots, how: Any
) -> None:
    def broken(_: dict[str, Any]) -> Any:
        return how if snapshots.agent.frozen else "default"

    snapshots.agent.hooks["guest-fsfreeze-status"] = broken
    with pytest.raises((UnavailableError, DeviceError)):
        snapshots.quiesced()
    assert not snapshots.agent.frozen
    assert snapshots.made == []


def test_first_thaw_that_fails_is_repeated(snapshots: Snapshots) -> None:
    answers: list[Any] = ["close", {"error": {"class": "GenericError", "desc": "busy"}}]
    failures = iter(answers)
    snapshots.agent.hooks["guest-fsfreeze-thaw"] = lambda _: next(failures, "default")
    assert snapshots.quiesced() == "s"
    assert not snapshots.agent.frozen


def test_guest_that_does_not_confirm_its_thaw_is_reported(snapshots: Snapshots) -> None:
    snapshots.agent.hooks["guest-fsfreeze-thaw"] = lambda _: {
        "error": {"class": "GenericError", "desc": "cannot"}
    }
    with pytest.raises(UnavailableError, match="did not confirm"):
        snapshots.quiesced(thaw_timeout_s=0.3)


def test_agent_that_may_not_freeze_is_named_and_costs_no_wait(snapshots: Snapshots) -> None:
    refusal = {"error": {"class": "CommandNotFound", "desc": "disabled\x1b[2J by policy"}}
    for command in ("guest-fsfreeze-freeze", "guest-fsfreeze-thaw"):
        snapshots.agent.hooks[command] = lambda _: refusal
    began_s = time.monotonic()
    with pytest.raises(UnsupportedError, match=r"disabled \[2J by policy"):
        snapshots.quiesced(thaw_timeout_s=60)
    assert time.monotonic() - began_s < 20


def test_guest_without_file_systems_to_freeze_is_refused(snapshots: Snapshots) -> None:
    snapshots.agent.hooks["guest-fsfreeze-freeze"] = lambda _: {"return": 0}
    with pytest.raises(UnsupportedError, match="froze no file system"):
        snapshots.quiesced()
    assert snapshots.made == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_thaw_the_guest_and_leave_no_snapshot(
    snapshots: Snapshots, number: signal.Signals
) -> None:
    agent = snapshots.agent

    def take() -> str:
        os.kill(os.getpid(), number)
        assert agent.thawed.wait(30)
        # Impatience must not cut short what is left to be done.
        os.kill(os.getpid(), number)
        return snapshots.take()

    with pytest.raises(KeyboardInterrupt):
        while_frozen(agent.path, take, snapshots.undo)
    assert not agent.frozen
    assert snapshots.made == []


def test_socket_that_is_not_there_or_has_no_guest_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        while_frozen(tmp_path / "none", lambda: 0, lambda _: None)
    deaf = tmp_path / "deaf"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(deaf))
        with pytest.raises(UnavailableError, match="cannot be connected"):
            while_frozen(deaf, lambda: 0, lambda _: None)


@given(said=st.binary(max_size=600))
@settings(max_examples=150, deadline=None)
def test_nothing_a_guest_says_does_more_than_fail_the_call(said: bytes) -> None:
    """Whatever answers the status command, the outcome is one of our errors or a good one."""

    async def attempt() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(said)
        reader.feed_eof()
        agent = GuestAgent(reader, _NoWriter(), Path("/fuzz"))  # type: ignore[arg-type]
        for call in (agent.is_frozen, agent.sync, agent.thaw):
            with contextlib.suppress(VhostdError):
                await call(timeout_s=5)

    asyncio.run(attempt())


def test_endless_talk_is_bounded() -> None:
    async def attempt(piece: bytes) -> None:
        reader = asyncio.StreamReader()
        agent = GuestAgent(reader, _NoWriter(), Path("/fuzz"))  # type: ignore[arg-type]
        fed_bytes = 0

        async def feed(_: int) -> bytes:
            nonlocal fed_bytes
            fed_bytes += len(piece)
            return piece

        reader.read = feed  # type: ignore[method-assign,assignment]
        with pytest.raises(DeviceError, match="sends"):
            await agent.sync(timeout_s=60)
        assert fed_bytes < 4 << 20

    for piece in (b"x" * 4096, b"\xff" + b"x" * 4095, (b"\xff" + b"{}\n") * 1000):
        asyncio.run(attempt(piece))


class _NoWriter:
    def write(self, _: bytes) -> None:
        pass

    async def drain(self) -> None:
        pass


# Finding the socket


def proc_with(tmp_path: Path, *arguments: str) -> Path:
    process = tmp_path / "77"
    process.mkdir()
    (process / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in arguments))
    (process / "cwd").symlink_to("/srv/vm")
    return tmp_path


DEVICE = "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["-chardev", "socket,path=/run/a,,b.sock,server=on,id=qga0", "-device", DEVICE],
            "/run/a,b.sock",
        ),
        (["-device", DEVICE, "-chardev", "socket,id=qga0,path=q.sock"], "/srv/vm/q.sock"),
        (
            [
                "-chardev",
                "socket,id=x,path=/other",
                "-chardev",
                "socket,id=c,path=/run/q",
                "-device",
                '{"driver":"virtserialport","chardev":"c","name":"org.qemu.guest_agent.0"}',
            ],
            "/run/q",
        ),
    ],
)
def test_agents_socket_is_found_on_qemus_command_line(
    tmp_path: Path, arguments: list[str], expected: str
) -> None:
    assert agent_socket(77, proc_with(tmp_path, "qemu", *arguments)) == Path(expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "no channel"),
        (["-chardev", "socket,id=qga0,fd=33", "-device", DEVICE], "virsh domfsfreeze"),
        (["-device", "{nonsense"], "no channel"),
    ],
)
def test_channels_that_cannot_be_used_are_explained(
    tmp_path: Path, arguments: list[str], match: str
) -> None:
    with pytest.raises(NotFoundError, match=match):
        agent_socket(77, proc_with(tmp_path, "qemu", *arguments))
    with pytest.raises(NotFoundError, match="cannot be read"):
        agent_socket(78, tmp_path)
