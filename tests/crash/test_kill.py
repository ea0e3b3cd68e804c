"""The daemon is killed under load, at any moment; then the power goes, too.

After each kill the daemon starts again: every write that completed is there. A copy of the device
as it was at the kill, without the staging file, is opened by another daemon: every write that was
flushed is there. `model` says what exactly may be there of the rest.

`VHOSTD_KILL_ROUNDS` is the number of kills (6); `--seed` repeats a run.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.crash.rig import PowerDisk, Rig, Settings
from tests.daemon.conftest import Host

ROUNDS = int(os.environ.get("VHOSTD_KILL_ROUNDS", "6"))
ROUNDS_PER_POOL = 3
POOLS = -(-ROUNDS // ROUNDS_PER_POOL)
ENDS = ("moment", "count", "checkpoint", "close", "recovery")


@pytest.fixture
def choices(request: pytest.FixtureRequest) -> random.Random:
    """Depends on the seed and on the test."""
    print(f"--seed {request.config.getoption('--seed')}")
    return random.Random(f"{request.config.getoption('--seed')} {request.node.name}")


def kill_at_random(rig: Rig, end: str) -> None:
    """Load, and one of the ways to end."""
    choices = rig.choices
    if end == "count":
        rig.load(rig.kill, after=int(choices.expovariate(1 / 400)))
        return
    delay_s = choices.uniform(0, 0.5)
    if end == "close":
        rig.load(rig.terminate_then_kill(choices.uniform(0, 0.08)), delay_s=delay_s)
    elif end == "checkpoint":
        rig.load(rig.checkpoint_then_kill(choices.uniform(0, 0.2)), delay_s=delay_s)
    else:
        rig.load(rig.kill, delay_s=delay_s)
    if end == "recovery":
        for _ in range(choices.randint(1, 2)):
            rig.kill_recovery(rig.start_s * choices.uniform(0.6, 1.05))


def run_rounds(rig: Rig, rounds: int, ends: tuple[str, ...] = ENDS) -> None:
    for number in range(rounds):
        end = rig.choices.choice(ends)
        print(f"round {number}: {end}")
        rig.events[end] += 1
        kill_at_random(rig, end)
        copy = rig.device.snapshot()
        rig.restart()
        rig.check_power_loss(copy)
        rig.rebase()
    rig.stop()
    print(dict(rig.events), *(disk.counts for disk in rig.disks), sep="\n")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("pool", range(POOLS))
def test_completed_writes_survive_a_kill_and_flushed_ones_loss_of_power(
    host: Host, power_disk: PowerDisk, choices: random.Random, pool: int
) -> None:
    settings = Settings.chosen(choices, volumes=1 + pool % 2)
    print(f"{settings}, true loss of power: {power_disk.mountable}")
    rig = Rig(host, power_disk, settings, choices)
    run_rounds(rig, min(ROUNDS_PER_POOL, ROUNDS - pool * ROUNDS_PER_POOL))
