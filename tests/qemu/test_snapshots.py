"""Snapshots and clones of a disk that a real guest has a busy file system on.

The guest writes numbered files, and after each the file's sum, and syncs. So a snapshot that is
taken after file n was synced holds that file whole, and those before it which were not removed.
"""

from __future__ import annotations

import random
import time

import pytest

from .conftest import DaemonFactory, VmFactory
from .harness import DaemonBackend, Disk, Vm

GIB = 1 << 30
KEPT_FILES = 40
# Files of many sizes; some are overwritten in place, and all are removed again in turn.
WORKLOAD = f"""
(
    i=0
    while [ ! -e /tmp/stop ]; do
        i=$((i + 1))
        dd if=/dev/urandom of=/mnt/files/$i bs=8k count=$((1 + i * 7 % 40))
        dd if=/mnt/files/$i of=/mnt/over bs=8k seek=$((i * 3 % 64)) conv=notrunc
        echo "$i $(sha256sum </mnt/files/$i)" >>/mnt/sums
        sync
        echo $i >/tmp/now && mv /tmp/now /tmp/synced
        rm -f /mnt/files/$((i - {KEPT_FILES}))
    done
    touch /tmp/stopped
) >/dev/null 2>&1 &
"""
# Whether files $1 to $2 are below /mnt, each with its sum.
CHECK = """
check() {
    i=$1
    while [ $i -le $2 ]; do
        want=$(grep "^$i " /mnt/sums) || { echo "file $i is not in the sums"; return 1; }
        [ "$want" = "$i $(sha256sum </mnt/files/$i)" ] || { echo "file $i is wrong"; return 1; }
        i=$((i + 1))
    done
}
"""
TREE_SUM = "cd /mnt/tree && find . -type f | sort | xargs sha256sum | sha256sum"


class Busy:
    """A guest at work, and what the snapshots of its disk have to hold."""

    def __init__(self, daemon: DaemonBackend, vm: Vm) -> None:
        self.daemon = daemon
        self.vm = vm
        self.synced: dict[str, tuple[int, int]] = {}
        """Of each snapshot: the last file that was synced for certain, and the last that may be."""
        vm.run("mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt && mkdir /mnt/tree")
        vm.run("cp -a /bin /lib /mnt/tree")
        self.tree_sum = vm.output(TREE_SUM)
        # Unmounted, so that it can be mounted as it is.
        vm.run("umount /mnt")
        daemon.control("snapshot", "create", f"{daemon.VOLUME}@base")
        vm.run("mount -t ext4 /dev/vda /mnt && mkdir /mnt/files && dd if=/dev/zero of=/mnt/over "
               "bs=8k count=128 2>/dev/null && touch /mnt/sums && sync")  # fmt: skip
        vm.run(WORKLOAD)

    def now(self) -> int:
        return int(self.vm.output("cat /tmp/synced 2>/dev/null || echo 0"))

    def snapshot(self, name: str) -> None:
        """Taken while the guest works, once it has got on since the last one."""
        last = max((least for least, _ in self.synced.values()), default=0)
        before = int(
            self.vm.output(
                f"until [ -e /tmp/synced ] && [ $(cat /tmp/synced) -gt {last} ]; do sleep 0.1; done"
                "; cat /tmp/synced"
            )
        )
        self.daemon.control("snapshot", "create", f"{self.daemon.VOLUME}@{name}")
        # The next one may have been synced before the guest told.
        self.synced[name] = (before, self.now() + 1)

    def stop(self) -> None:
        self.vm.run("touch /tmp/stop; until [ -e /tmp/stopped ]; do sleep 0.1; done; umount /mnt")
        self.vm.run("e2fsck -f -n /dev/vda")
        errors = self.vm.run("dmesg | grep -E 'I/O error|EXT4-fs error'", check=False).output
        assert errors == ""

    def check(self, vm: Vm, disk: str, name: str) -> None:
        """A writable disk with the contents of a snapshot: sound, with all that was synced then."""
        least, most = self.synced[name]
        # Those before may have been removed by then.
        oldest = max(1, most - KEPT_FILES + 1)
        assert oldest <= least, "the guest was so fast that nothing can be told: keep more files"
        vm.run(f"mount -t ext4 /dev/{disk} /mnt")
        vm.run(f"{CHECK} check {oldest} {least}", limit_s=120)
        newest = int(vm.output("ls /mnt/files | sort -n | tail -1"))
        assert least <= newest <= most, (name, newest)
        assert vm.output(TREE_SUM) == self.tree_sum
        vm.run("umount /mnt")
        vm.run(f"e2fsck -f -n /dev/{disk}")


def sound(daemon: DaemonBackend) -> None:
    report = daemon.json("check", daemon.POOL, "--data")
    assert report["errors"] == 0, report["findings"]


def exercise(
    count: int, cloned: int, seed: int, daemon_factory: DaemonFactory, vm_factory: VmFactory
) -> None:
    """count: snapshots. cloned: how many are looked at by a second guest while the first works."""
    choose = random.Random(seed)
    daemon = daemon_factory(GIB)
    volume = daemon.VOLUME
    first = vm_factory([daemon])
    busy = Busy(daemon, first)
    for number in range(count):
        started_s = time.monotonic()
        busy.snapshot(f"s{number}")
        if number % 3 == 2:
            # Not the oldest alone: what a snapshot in the middle holds is freed, and no more.
            gone = choose.choice(sorted(busy.synced)[:-1])
            daemon.control("snapshot", "remove", f"{volume}@{gone}")
            del busy.synced[gone]
        # About one a second; the guest goes on in the meantime.
        time.sleep(max(0.0, 1 - (time.monotonic() - started_s)))

    # While the first guest still works: clones, read and written by a second, and a snapshot.
    names = choose.sample(sorted(busy.synced), min(cloned, len(busy.synced)))
    sockets = []
    for name in names:
        daemon.control("volume", "clone", f"{volume}@{name}", f"pool/of-{name}")
        sockets.append(daemon.attach(f"pool/of-{name}"))
    snapshot_socket = daemon.attach(f"{volume}@base")
    second = vm_factory([Disk(path) for path in [*sockets, snapshot_socket]])
    for index, name in enumerate(names):
        disk = f"vd{chr(ord('a') + index)}"
        busy.check(second, disk, name)
        second.run(f"mount -t ext4 /dev/{disk} /mnt && cp -a /bin /mnt/of-{name} && umount /mnt")
        second.run(f"e2fsck -f -n /dev/{disk}")
    base = f"vd{chr(ord('a') + len(names))}"
    check_base(second, base, busy)
    second.power_off()
    before = busy.now()
    first.run(f"until [ $(cat /tmp/synced) -gt {before} ]; do sleep 0.1; done")
    busy.stop()
    first.power_off()

    # Back to the oldest that is left; the newer ones stay.
    oldest = min(busy.synced, key=lambda name: busy.synced[name])
    daemon.control("detach", volume)
    daemon.control("snapshot", "rollback", f"{volume}@{oldest}", "--yes")
    daemon.attach_disk()
    third = vm_factory([Disk.of(daemon), Disk(snapshot_socket)])
    busy.check(third, "vda", oldest)
    check_base(third, "vdb", busy)
    third.run("mount -t ext4 /dev/vda /mnt && cp -a /bin /mnt/again && umount /mnt")
    third.run("e2fsck -f -n /dev/vda")
    third.power_off()
    left = [row["snapshot"] for row in daemon.json("snapshot", "list", volume)]
    assert sorted(left) == sorted(["base", *busy.synced])
    sound(daemon)


def check_base(vm: Vm, disk: str, busy: Busy) -> None:
    """The snapshot that was taken of an unmounted disk, on a disk that can only be read."""
    assert vm.output(f"cat /sys/block/{disk}/ro") == "1"
    vm.run(f"e2fsck -f -n /dev/{disk} && mount -t ext4 -o ro /dev/{disk} /mnt")
    assert vm.output(TREE_SUM) == busy.tree_sum
    assert "files" not in vm.output("ls /mnt").split()
    vm.run("umount /mnt")


@pytest.mark.timeout(400)
def test_snapshots_of_a_busy_guest_are_sound_and_clones_and_rollback_have_what_they_had(
    seed: int, daemon_factory: DaemonFactory, vm_factory: VmFactory
) -> None:
    exercise(6, 2, seed, daemon_factory, vm_factory)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_snapshots_of_a_busy_guest_are_sound(
    seed: int, daemon_factory: DaemonFactory, vm_factory: VmFactory
) -> None:
    exercise(100, 12, seed, daemon_factory, vm_factory)
