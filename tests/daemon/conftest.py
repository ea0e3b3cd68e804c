"""A daemon as a process, and vhostctl as a process: what a person has."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vhostd.api.client import Client

READY_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60

PROGRAMS = {
    "vhostd": [sys.executable, "-c", "from vhostd.cli.daemon import main; main()"],
    "vhostctl": [sys.executable, "-c", "from vhostd.cli.control import main; main()"],
}


class Process:
    """A `vhostd` that said it is ready."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [*PROGRAMS["vhostd"], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
            )
        self.ready = self._await_ready()

    @property
    def pid(self) -> int:
        return self.process.pid

    def _await_ready(self) -> str:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + READY_TIMEOUT_S
        said = b""
        while b"\n" not in said:
            left_s = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([fd], [], [], left_s)
            received = os.read(fd, 4096) if readable else b""
            if not received:
                self.kill()
                pytest.fail(f"vhostd did not become ready:\n{self.log.read_text()}")
            said += received
        line = said.split(b"\n", 1)[0].decode()
        assert line.startswith("ready: "), line
        return line.removeprefix("ready: ")

    def kill(self) -> None:
        """As a crash of the daemon."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"vhostd did not end:\n{self.log.read_text()}")
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()


class Host:
    """Directories, a configuration, and the daemons that use them one after another."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state, self.run = root / "state", root / "run"
        self.api = self.run / "vhostd.sock"
        self.staging = Path("/dev/shm") / f"vhostd-test-{os.getpid()}-{root.name}"
        self.config = root / "vhostd.toml"
        self.config.write_text(
            f'state_dir = "{self.state}"\nruntime_dir = "{self.run}"\n'
            f'[engine]\nstaging_dir = "{self.staging}"\nstaging = "8M"\n'
            '[log]\nlevel = "debug"\nformat = "json"\n'
        )
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("VHOSTD_")},
            "VHOSTD_SOCKET": str(self.api),
        }
        self.processes: list[Process] = []

    def start(self, *arguments: str, name: str = "vhostd") -> Process:
        process = Process(arguments, self.root / f"{name}.log", self.environment)
        self.processes.append(process)
        return process

    def serve(self) -> Process:
        return self.start("serve", "--config", str(self.config))

    def disk(self, directory: Path, socket: Path, *options: str) -> Process:
        return self.start(
            "disk", str(directory), "--socket", str(socket), "--config", str(self.config), *options
        )

    def client(self) -> Client:
        return Client(self.api, timeout_s=60)

    def run_program(self, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAMS[name], *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            timeout=100,
        )

    def ctl(self, *arguments: str | Path) -> str:
        """What vhostctl prints; it must succeed."""
        done = self.run_program("vhostctl", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self.ctl("--json", *arguments))

    def refused(self, code: int, *arguments: str | Path) -> str:
        """What vhostctl says when it ends with `code`."""
        done = self.run_program("vhostctl", *arguments)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stderr

    def pool(self, name: str = "fast") -> Path:
        device = self.root / f"device-{name}"
        self.ctl("pool", "create", name, "--device", device)
        return device

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        subprocess.run(["rm", "-rf", str(self.staging)], check=False)

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self.root.glob("*.log"))


@pytest.fixture
def host(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Host]:
    # Not tmp_path: it repeats the test's name, and a socket's path has 107 bytes.
    host = Host(tmp_path_factory.mktemp("h"))
    yield host
    host.close()
    sys.stderr.write(host.logs())
