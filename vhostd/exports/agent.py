"""The QEMU guest agent: has a guest flush and freeze its file systems around a snapshot.

    connect ─▶ guest-sync-delimited ─▶ guest-fsfreeze-freeze ─▶ the snapshot
            ─▶ guest-fsfreeze-status (still frozen?) ─▶ guest-fsfreeze-thaw

Invariants:
- A guest that was told to freeze is told to thaw: after an error, a time-out, a signal; over a new
  connection where the old one broke. Only the death of this process or the guest prevents it.
- A guest that somebody else has frozen is left alone.
- What the guest sends is bounded (64 KiB a message, 1 MiB before an answer), and can do no more
  than fail the call: a guest is not trusted.

The protocol is JSON, a message a line, without QMP's greeting, and with a byte of 0xFF that says
where an answer begins when older ones may lie in the channel (QEMU, docs/interop/qemu-ga.rst and
qga/qapi-schema.json).

One event loop; the call that takes the snapshot runs in a helper thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vhostd.errors import (
    BusyError,
    DeviceError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
    VhostdError,
)

__all__ = ["GuestAgent", "agent_socket", "while_frozen"]

ANSWER_TIMEOUT_S = 5.0
THAW_TIMEOUT_S = 30.0
RECONNECT_WAIT_S = 0.2
MAX_LINE_BYTES = 64 << 10
MAX_SKIPPED_BYTES = 1 << 20
CHANNEL_NAME = "org.qemu.guest_agent.0"

_SILENT = (
    "answer at all; check that qemu-guest-agent runs in the guest, and that nobody else "
    "(libvirtd?) holds its channel"
)

T = TypeVar("T")


class _Error(msgspec.Struct):
    kind: str = msgspec.field(name="class", default="")
    desc: str = ""


class _Answer(msgspec.Struct):
    value: Any = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Error | None = None


class GuestAgent:
    """One connection to an agent; one command at a time.

    Raises (all methods):
        UnavailableError: no answer in time, or the channel broke.
        UnsupportedError: the agent refuses the command.
        DeviceError: what answers does not speak the protocol.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: Path
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._path = path
        self._buffer = bytearray()
        self._received_bytes = 0

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float = ANSWER_TIMEOUT_S) -> GuestAgent:
        """Connects, and makes sure that an agent answers.

        Raises:
            NotFoundError: there is no such socket.
        """
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(str(path))
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{path} does not exist; give the socket of the guest's agent channel "
                f"(virtserialport, name={CHANNEL_NAME})"
            ) from error
        except (OSError, TimeoutError) as error:
            raise UnavailableError(
                f"guest agent: {path} cannot be connected to "
                f"({getattr(error, 'strerror', None) or 'no answer'}); check that the guest runs "
                "and that you may open its socket"
            ) from error
        agent = cls(reader, writer, path)
        try:
            await agent.sync(timeout_s=timeout_s)
        except BaseException:
            await agent.close()
            raise
        return agent

    async def close(self) -> None:
        """Ends the connection. A second call does nothing."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def sync(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Skips whatever an earlier client left in the channel."""
        token = secrets.randbits(31)
        async with self._deadline(timeout_s, _SILENT):
            self._received_bytes = 0
            # The agent's parser drops what came before an 0xFF.
            await self._send("guest-sync-delimited", {"id": token}, prefix=b"\xff")
            while True:
                if self._received_bytes > MAX_SKIPPED_BYTES:
                    raise self._foreign("it sends without end, and never an answer")
                if (at := self._buffer.find(b"\xff")) < 0:
                    self._buffer.clear()
                    await self._receive()
                    continue
                del self._buffer[: at + 1]
                # Answers to older commands may lie before ours.
                with contextlib.suppress(UnsupportedError, DeviceError):
                    if await self._answer("guest-sync-delimited") == token:
                        return

    async def freeze(self, *, timeout_s: float) -> int:
        """Flushes and freezes all file systems that can be; returns how many."""
        return await self._count("guest-fsfreeze-freeze", timeout_s)

    async def thaw(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """Thaws them; returns how many."""
        return await self._count("guest-fsfreeze-thaw", timeout_s)

    async def is_frozen(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> bool:
        """Whether file systems are frozen by this agent."""
        state = await self._call("guest-fsfreeze-status", timeout_s)
        if state not in ("frozen", "thawed"):
            raise self._foreign("it tells a state that is none")
        return bool(state == "frozen")

    async def _count(self, command: str, timeout_s: float) -> int:
        count = await self._call(command, timeout_s)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise self._foreign(f"it answers {command} with something other than a count")
        return count

    async def _call(self, command: str, timeout_s: float) -> Any:
        async with self._deadline(timeout_s, f"answer {command}"):
            await self._send(command)
            return await self._answer(command)

    async def _send(
        self, command: str, arguments: dict[str, Any] | None = None, *, prefix: bytes = b""
    ) -> None:
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        try:
            self._writer.write(prefix + msgspec.json.encode(message) + b"\n")
            await self._writer.drain()
        except OSError as error:
            raise self._broken() from error

    async def _answer(self, command: str) -> Any:
        """The next message that is one; blank lines are none."""
        line = b""
        while not line:
            line = (await self._line()).strip()
        try:
            answer = msgspec.json.decode(line, type=_Answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._foreign("its answer is no message of an agent") from error
        if answer.error is not None:
            # The guest wrote it: shown short, and without what a terminal would obey.
            said = (answer.error.desc or answer.error.kind)[:200]
            said = "".join(c if c.isprintable() else " " for c in said)
            raise UnsupportedError(
                f"the guest's agent on {self._path} refuses {command}: {said}; see the "
                "configuration of qemu-guest-agent in the guest"
            )
        if answer.value is msgspec.UNSET:
            raise self._foreign("its answer has neither a result nor an error")
        return answer.value

    async def _line(self) -> bytes:
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise self._foreign(f"it sends more than {MAX_LINE_BYTES} bytes without a newline")
            start = len(self._buffer)
            await self._receive()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    async def _receive(self) -> None:
        try:
            received = await self._reader.read(4096)
        except OSError as error:
            raise self._broken() from error
        if not received:
            raise self._broken()
        self._buffer += received
        self._received_bytes += len(received)

    @contextlib.asynccontextmanager
    async def _deadline(self, timeout_s: float, what: str) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise UnavailableError(
                f"the guest's agent on {self._path} did not {what} ({timeout_s:g} s)"
            ) from error

    def _broken(self) -> UnavailableError:
        return UnavailableError(
            f"the channel to the guest's agent on {self._path} was closed; did the guest stop?"
        )

    def _foreign(self, why: str) -> DeviceError:
        return DeviceError(
            f"what answers on {self._path} is no guest agent: {why}; check the path, and the guest"
        )


# Freezing around a snapshot


def while_frozen(
    path: Path,
    take: Callable[[], T],
    undo: Callable[[T], None],
    *,
    max_frozen_s: float = 10.0,
    thaw_timeout_s: float = THAW_TIMEOUT_S,
) -> T:
    """Calls `take` while the guest's file systems are flushed and frozen; returns its result.

    Not for use within an event loop. SIGINT, SIGTERM and SIGHUP end it, thawed.

    Args:
        take: takes the snapshot; in a helper thread, and waited for in any case.
        undo: called with the result of `take` if the guest was not frozen all the time.
        max_frozen_s: the guest is thawed so long after it was told to freeze, whatever happens.

    Raises:
        NotFoundError, UnavailableError: no agent answers.
        UnsupportedError: it does not freeze.
        BusyError: somebody else has the file systems frozen.
        KeyboardInterrupt: a signal came; the guest is thawed, and nothing is taken.
        VhostdError: what `take` raises.
    """
    return asyncio.run(_guarded(_while_frozen(path, take, undo, max_frozen_s, thaw_timeout_s)))


async def _guarded(work: Awaitable[T]) -> T:
    """Signals cancel the work, as often as they come, and it ends in order."""
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        # Only the main thread can; elsewhere the caller has the signals.
        with contextlib.suppress(RuntimeError, ValueError):
            loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number in signals:
            with contextlib.suppress(RuntimeError, ValueError):
                loop.remove_signal_handler(number)


async def _while_frozen(
    path: Path,
    take: Callable[[], T],
    undo: Callable[[T], None],
    max_frozen_s: float,
    thaw_timeout_s: float,
) -> T:
    agent = await GuestAgent.connect(path)
    told = False
    count = 0
    taken: asyncio.Task[T] | None = None
    held = False
    try:
        if await agent.is_frozen():
            raise BusyError(
                f"the guest of {path} has its file systems frozen already, so another backup is "
                "under way; if none is, run guest-fsfreeze-thaw and try again"
            )
        try:
            async with asyncio.timeout(max_frozen_s):
                told = True
                count = await agent.freeze(timeout_s=max_frozen_s)
                if not count:
                    raise UnsupportedError(
                        f"the guest of {path} froze no file system; there is none mounted that "
                        "can be, so take the snapshot without --quiesce"
                    )
                taken = asyncio.create_task(asyncio.to_thread(take))
                await asyncio.shield(taken)
                # An agent thaws by itself in some guests (Windows, after 10 s).
                held = await agent.is_frozen(timeout_s=max_frozen_s)
        except TimeoutError as error:
            raise _too_long(path, max_frozen_s) from error
        if not held:
            raise _too_long(path, max_frozen_s)
    finally:
        try:
            if told:
                await _to_the_end(_thaw(path, agent, thaw_timeout_s, frozen=count > 0))
            else:
                await agent.close()
        finally:
            if taken is not None and not held:
                await _to_the_end(_take_back(taken, undo))
    return taken.result()


def _too_long(path: Path, max_frozen_s: float) -> UnavailableError:
    return UnavailableError(
        f"the guest of {path} could not be held frozen until the snapshot was taken "
        f"({max_frozen_s:g} s); it is thawed, and there is no snapshot: try again when it is less "
        "busy, or allow more with --max-frozen"
    )


async def _to_the_end(work: Awaitable[None]) -> None:
    """Awaits it, whatever signals come meanwhile; a cancellation counts afterwards."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
        except VhostdError:
            break
    if cancelled and task.exception() is None:
        raise asyncio.CancelledError
    task.result()


async def _thaw(path: Path, agent: GuestAgent, timeout_s: float, *, frozen: bool) -> None:
    """Tells the guest to thaw until it says that it has, and closes the connection.

    frozen: it said that it froze; otherwise an agent that refuses to thaw has nothing to thaw.
    """
    deadline = asyncio.get_running_loop().time() + timeout_s
    current: GuestAgent | None = agent
    while True:
        left_s = deadline - asyncio.get_running_loop().time()
        try:
            if current is None:
                current = await GuestAgent.connect(path, timeout_s=max(0.1, left_s))
            else:
                # The answer to a freeze that took too long may still come.
                await current.sync(timeout_s=max(0.1, left_s))
            await current.thaw(timeout_s=max(0.1, left_s))
        except VhostdError as error:
            if current is not None:
                await current.close()
                current = None
            if isinstance(error, UnsupportedError) and not frozen:
                return
            if asyncio.get_running_loop().time() + RECONNECT_WAIT_S >= deadline:
                raise UnavailableError(
                    f"the guest of {path} was told to thaw its file systems and did not confirm it "
                    f"({error}); look at it, and if it hangs, send it guest-fsfreeze-thaw"
                ) from error
            await asyncio.sleep(RECONNECT_WAIT_S)
        else:
            await current.close()
            return


async def _take_back(taken: asyncio.Task[T], undo: Callable[[T], None]) -> None:
    try:
        result = await taken
    except VhostdError:
        # Nothing was taken, so nothing is to be undone; whoever called is told of it, or of what
        # came before it.
        return
    await asyncio.to_thread(undo, result)


# Finding the channel


def agent_socket(process_id: int, proc: Path = Path("/proc")) -> Path:
    """The socket of the agent's channel of a QEMU process, from its command line.

    Raises:
        NotFoundError: it has none, or not one that another process can use.
    """
    process = proc / str(process_id)
    try:
        arguments = [word.decode(errors="replace") for word in
                     (process / "cmdline").read_bytes().split(b"\0")]  # fmt: skip
        directory = (process / "cwd").readlink()
    except OSError as error:
        raise NotFoundError(
            f"the command line of process {process_id} cannot be read ({error.strerror}); name the "
            "agent's socket: --quiesce SOCKET"
        ) from error
    chardev = next(
        (
            options["chardev"]
            for options in _options(arguments, "-device")
            if options.get("name") == CHANNEL_NAME and "chardev" in options
        ),
        None,
    )
    if chardev is None:
        raise NotFoundError(
            f"process {process_id}, which has the volume, has no channel {CHANNEL_NAME} for a "
            "guest agent; add one to the guest, or leave out --quiesce"
        )
    for options in _options(arguments, "-chardev"):
        if options.get("id") == chardev and "path" in options:
            return directory / options["path"]
    raise NotFoundError(
        f"the agent's channel of process {process_id} belongs to the program that started it "
        "(libvirt?); freeze the guest there (virsh domfsfreeze), or name a socket: --quiesce SOCKET"
    )


def _options(arguments: Sequence[str], name: str) -> Iterator[dict[str, str]]:
    """Values of a QEMU option: `key=value,…`, where a comma in a value is doubled; or JSON."""
    for word, value in itertools.pairwise(arguments):
        if word not in (name, f"-{name}"):
            continue
        if value.startswith("{"):
            with contextlib.suppress(msgspec.DecodeError):
                decoded = msgspec.json.decode(value, type=dict[str, Any])
                yield {key: str(item) for key, item in decoded.items()}
            continue
        pieces = value.replace(",,", "\0").split(",")
        pairs = (piece.replace("\0", ",").partition("=") for piece in pieces)
        yield {key: item for key, _, item in pairs}
