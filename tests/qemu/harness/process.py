"""A process that serves: started, awaited by a line it prints, stopped or killed, log kept."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["HarnessError", "Service", "tail", "time_limit_s"]


class HarnessError(Exception):
    """A guest, QEMU or a back-end did not do what it was started for."""


def time_limit_s(seconds: float) -> float:
    """A time limit for a machine that is busy or slow: times VHOSTD_TEST_TIME_SCALE (default 1)."""
    return seconds * float(os.environ.get("VHOSTD_TEST_TIME_SCALE", "1"))


def tail(path: Path, lines: int = 40) -> str:
    """The last lines of a log, or a word on why there are none."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        return f"({path.name} cannot be read: {error.strerror})"
    return "\n".join(text.splitlines()[-lines:]) or f"({path.name} is empty)"


class Service:
    """A child process whose stdout and stderr go to `log_path` through a thread of ours.

    The thread only appends and notifies; it ends when the process closes its output.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log_path: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [str(word) for word in command],
            # A pipe nobody writes to: QSD's monitor on stdio ends the process at end of input.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
        )
        threading.Thread(target=self._drain, name=f"log of {name}", daemon=True).start()

    def _drain(self) -> None:
        assert self._process.stdout is not None
        with self.log_path.open("a") as log, self._process.stdout as output:
            for line in output:
                log.write(line)
                log.flush()
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_for_line(self, prefix: str, limit_s: float) -> str:
        """The first line that starts with `prefix`; raises if the process ends or time is up."""

        def found() -> str | None:
            return next((line for line in self._lines if line.startswith(prefix)), None)

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, time_limit_s(limit_s))
            line = found()
        if line is not None:
            return line
        what = "ended" if self._ended else f"did not print '{prefix}' in {limit_s:.0f} s"
        raise HarnessError(f"{self.name} {what}; its log ends:\n{tail(self.log_path)}")

    def stop(self, limit_s: float = 60) -> int:
        """SIGTERM, then wait; returns the exit code. A process that does not stop is an error."""
        self._process.terminate()
        try:
            return self.wait(limit_s)
        except HarnessError:
            self.kill()
            raise

    def wait(self, limit_s: float) -> int:
        try:
            code = self._process.wait(time_limit_s(limit_s))
        except subprocess.TimeoutExpired as error:
            raise HarnessError(
                f"{self.name} still runs after {limit_s:.0f} s; its log ends:\n"
                f"{tail(self.log_path)}"
            ) from error
        self._release()
        return code

    def kill(self) -> None:
        """SIGKILL: what a crash of the process looks like to everybody else."""
        self._process.kill()
        self._process.wait()
        self._release()

    def _release(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        # The log is whole once the thread has seen the end of the output.
        with self._changed:
            self._changed.wait_for(lambda: self._ended, 5)
