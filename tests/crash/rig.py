"""Daemons to be killed, on disks that can lose power.

`PowerDisk` is a file system of its own in an image file: a copy of the image is what a device
holds when power is lost at that moment, without what only the page cache had. Where file systems
cannot be mounted it is a directory, whose copy shows less: only the staging file is lost.

`Rig` is a daemon with a pool and volumes on such a disk, and a model of what each volume must hold.
Used by the test's thread only, but for the threads that `Rig` makes itself.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.model import CrashModel
from tests.crash.workload import Counts, Workload, read_all
from tests.daemon.conftest import PROGRAMS, STOP_TIMEOUT_S, Host
from vhostd.protocol.features import VirtioFeature
from vhostd.storage.check import check_device
from vhostd.virtqueue.block import DRIVER_FEATURES, BlockDevice

__all__ = ["Disk", "PowerDisk", "Rig", "Settings", "can_mount", "must_be_sound", "quietly"]

POOL = "p"
WRITE_THROUGH = DRIVER_FEATURES & ~int(VirtioFeature.BLK_FLUSH | VirtioFeature.BLK_CONFIG_WCE)


def quietly(*command: str | Path) -> bool:
    """Runs a command; whether it succeeded."""
    done = subprocess.run([str(word) for word in command], capture_output=True, check=False)
    return done.returncode == 0


def can_mount(scratch: Path) -> bool:
    """Whether images can be mounted here (root, loop devices)."""
    image, mount = scratch / "probe.img", scratch / "probe"
    mount.mkdir()
    try:
        _make_image(image, 16 << 20)
        mounted = quietly("mount", "-o", "loop", image, mount)
        return mounted and quietly("umount", mount)
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        image.unlink(missing_ok=True)
        mount.rmdir()


def _make_image(image: Path, size_bytes: int) -> None:
    image.touch()
    os.truncate(image, size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)


class PowerDisk:
    """A directory whose device can lose power."""

    def __init__(self, root: Path, *, mountable: bool, size_bytes: int = 2 << 30) -> None:
        self.path = root / "disk"
        self.path.mkdir()
        self.mountable = mountable
        self._image = root / "disk.img"
        self._copies = 0
        if mountable:
            _make_image(self._image, size_bytes)
            # Nothing but what is synced gets to the device while a test runs.
            subprocess.run(
                ["mount", "-o", "loop,commit=300", str(self._image), str(self.path)], check=True
            )

    def snapshot(self) -> Path:
        """What the device holds now; to be looked at with `opened`."""
        self._copies += 1
        copy = self._image.with_name(f"copy{self._copies}")
        source = self._image if self.mountable else self.path
        subprocess.run(["cp", "-a", "--sparse=always", str(source), str(copy)], check=True)
        return copy

    @contextmanager
    def opened(self, copy: Path) -> Iterator[Path]:
        """The directory as it comes back after the loss of power; the copy is removed then."""
        if not self.mountable:
            yield copy
            shutil.rmtree(copy)
            return
        mount = copy.with_suffix(".mounted")
        mount.mkdir()
        subprocess.run(["mount", "-o", "loop", str(copy), str(mount)], check=True)
        try:
            yield mount
        finally:
            subprocess.run(["umount", str(mount)], check=True)
            mount.rmdir()
            copy.unlink()

    def close(self) -> None:
        if self.mountable:
            for mount in (self.path, *self._image.parent.glob("*.mounted")):
                quietly("umount", mount)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a rig's daemon and pool are."""

    volumes: int = 1
    size_bytes: int = 16 << 20
    segment_bytes: int = 1 << 20
    checkpoint_log: str = "1M"
    queues: int = 2
    workers: int = 1

    @classmethod
    def chosen(cls, choices: random.Random, *, volumes: int = 1) -> Settings:
        return cls(
            volumes=volumes,
            segment_bytes=choices.choice([1, 4, 32]) << 20,
            checkpoint_log=choices.choice(["1M", "4M", "64M"]),
            queues=choices.randint(1, 4),
            workers=choices.randint(1, 2),
        )

    def config(self, host: Host, staging: Path) -> str:
        return (
            f'state_dir = "{host.state}"\nruntime_dir = "{host.run}"\n'
            f'[engine]\nstaging_dir = "{staging}"\nstaging = "8M"\nworkers = {self.workers}\n'
            f'checkpoint_log = "{self.checkpoint_log}"\n'
            '[log]\nlevel = "debug"\nformat = "json"\n'
        )


@dataclass(slots=True)
class Disk:
    """A volume and what it must hold."""

    name: str
    socket: Path
    model: CrashModel
    counts: Counts = field(default_factory=Counts)
    recovered: bytes = b""
    """What the last start found."""


class Rig:
    """A daemon with volumes, killed and started again.

    Every method that looks at data raises WrongDataError if it is not what it must be.
    """

    def __init__(
        self, host: Host, device: PowerDisk, settings: Settings, choices: random.Random
    ) -> None:
        self.host, self.device, self.settings = host, device, settings
        self.choices = choices
        self.events: Counter[str] = Counter()
        """What was done to the daemon, for the report."""
        self._epoch = 1
        self.pool = device.path / POOL
        host.config.write_text(settings.config(host, host.staging))
        self._other = host.root / "after-power-loss.toml"
        self._other_staging = host.staging / "after-power-loss"
        self._other.write_text(settings.config(host, self._other_staging))
        self._start()
        self.disks = [self._make(number) for number in range(settings.volumes)]

    def _start(self) -> None:
        begun = time.monotonic()
        self.process = self.host.serve()
        self.start_s = time.monotonic() - begun

    def _count_openings(self) -> None:
        """Every opening has an epoch, also one that was killed on its way."""
        with self.host.client() as client:
            volumes = client.call("stats")["volumes"]
        epoch = volumes[self.disks[0].name]["epoch"]
        self.events["openings cut short"] += epoch - self._epoch - 1
        self._epoch = epoch

    def _make(self, number: int) -> Disk:
        name = f"{POOL}/v{number}"
        with self.host.client() as client:
            if number == 0:
                client.call(
                    "pool.create",
                    pool=POOL,
                    device=str(self.pool),
                    segment_bytes=self.settings.segment_bytes,
                )
            client.call("volume.create", volume=name, size_bytes=self.settings.size_bytes)
            made = client.call("attach", volume=name, queues=self.settings.queues)
        model = CrashModel(number + 1, bytes(self.settings.size_bytes))
        return Disk(name, Path(made["socket"]), model)

    def connect(self, disk: Disk) -> BlockDevice:
        features = WRITE_THROUGH if disk.model.write_through else DRIVER_FEATURES
        return BlockDevice(
            disk.socket, queues=self.settings.queues, features=features, memory_bytes=32 << 20
        )

    def work(self, disk: Disk, *, budget_bytes: int, may_fail: bool = False) -> None:
        """Load that ends by itself."""
        with self.connect(disk) as device:
            workload = Workload(
                device,
                disk.model,
                self.choices,
                budget_bytes=budget_bytes,
                counts=disk.counts,
                may_fail=may_fail,
            )
            assert not workload.run(), "the daemon went away"

    # Ends

    def load(
        self,
        kill: Callable[[], None],
        *,
        delay_s: float | None = None,
        after: int | None = None,
        budget_bytes: int = 24 << 20,
    ) -> None:
        """Load on all disks until `kill`, which is called `delay_s` after the beginning, or when
        the first disk has completed so many requests; returns when every guest has seen the end."""
        process = self.process.process
        begun = threading.Event()

        def killer() -> None:
            begun.wait()
            if delay_s is not None:
                threading.Event().wait(delay_s)
            kill()

        def at(completed: int) -> None:
            if delay_s is not None or completed >= (after or 0):
                begun.set()

        def guest(disk: Disk, device: BlockDevice, seed: int) -> None:
            with device:
                workload = Workload(
                    device,
                    disk.model,
                    random.Random(seed),
                    budget_bytes=budget_bytes,
                    counts=disk.counts,
                )
                watch = at if disk is self.disks[0] else (lambda completed: None)
                gone = workload.run(after=watch)
                begun.set()
                if gone:
                    process.wait(STOP_TIMEOUT_S)

        devices = []
        for disk in self.disks:
            disk.model.write_through = self.choices.random() < 0.2
            devices.append(self.connect(disk))
        thread = threading.Thread(target=killer)
        thread.start()
        with ThreadPoolExecutor(len(devices)) as guests:
            running = [
                guests.submit(guest, disk, device, self.choices.getrandbits(64))
                for disk, device in zip(self.disks, devices, strict=True)
            ]
        thread.join()
        self.process.wait()
        for result in running:
            result.result()

    def kill(self) -> None:
        self.process.process.kill()

    def terminate_then_kill(self, delay_s: float) -> Callable[[], None]:
        def kill() -> None:
            self.process.process.send_signal(signal.SIGTERM)
            try:
                self.process.process.wait(delay_s)
            except subprocess.TimeoutExpired:
                self.process.process.kill()

        return kill

    def checkpoint_then_kill(self, delay_s: float) -> Callable[[], None]:
        """Asks for checkpoints until the kill, so that it meets one."""

        def kill() -> None:
            timer = threading.Timer(delay_s, self.kill)
            timer.start()
            with self.host.client() as client:
                while timer.is_alive():
                    try:
                        client.call("checkpoint")
                    except Exception as error:
                        if timer.is_alive():
                            raise AssertionError("a checkpoint failed") from error
            timer.join()

        return kill

    def kill_recovery(self, delay_s: float) -> None:
        """Starts the daemon and kills it so much later."""
        with (self.host.root / "vhostd.log").open("ab") as log:
            process = subprocess.Popen(
                [*PROGRAMS["vhostd"], "serve", "--config", str(self.host.config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self.host.environment,
            )
        try:
            code = process.wait(delay_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return
        raise AssertionError(f"vhostd ended by itself with {code}; see {log.name}")

    # After

    def restart(self) -> None:
        """Starts the daemon again; every disk must hold what its model says."""
        self._start()
        self._count_openings()
        for disk in self.disks:
            with self.connect(disk) as device:
                content = read_all(device)
            disk.model.check(content)
            disk.recovered = content

    def check_power_loss(self, copy: Path) -> None:
        """Starts another daemon on what was left without power."""
        with self.device.opened(copy) as directory:
            pool = directory / POOL
            must_be_sound(pool)
            for disk in self.disks:
                socket = self.host.root / "power.sock"
                options = ["--volume", disk.name.split("/")[1]]
                process = self.host.start(
                    "disk",
                    str(pool),
                    "--socket",
                    str(socket),
                    "--config",
                    str(self._other),
                    *options,
                    name="power",
                )
                with BlockDevice(socket) as device:
                    content = read_all(device)
                disk.model.check(content, power_lost=True)
                assert process.stop() == 0
            must_be_sound(pool)
        shutil.rmtree(self._other_staging)

    def rebase(self) -> None:
        """What the last restart found is where the models go on."""
        for disk in self.disks:
            disk.model.rebase(disk.recovered)

    def stop(self) -> None:
        """Stops cleanly; the pool must be sound, and hold the same when opened again."""
        assert self.process.stop() == 0
        must_be_sound(self.pool)
        self.restart()
        assert self.process.stop() == 0


def must_be_sound(pool: Path) -> None:
    """What `vhostctl check --data` does must find nothing."""
    report = check_device(pool, volume=None, data=True, progress=None)
    assert report.ok, [f for f in report.findings if f.severity == "error"]
