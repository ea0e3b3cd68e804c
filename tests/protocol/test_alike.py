"""The same requests to all back-ends at once: one random script, equal answers.

What is left to the device (limits, the identity, what a discard leaves) is not compared.
"""

from __future__ import annotations

import contextlib
import random

import pytest

from tests.protocol.backends import KINDS, BackendCache, BackendMissingError, DiskSpec
from vhostd.virtqueue.block import EXTENT, BlockDevice
from vhostd.virtqueue.constants import BlockRequest, BlockStatus

STEPS = 400
AREA_SECTORS = 512
SAME_FIELDS = ("capacity_sectors", "block_bytes", "num_queues")


def _step(rng: random.Random, capacity: int) -> tuple[int, int, bytes, int]:
    """kind, sector, data out, bytes in."""
    kind = rng.choice([0, 0, 0, 1, 1, 1, 4, 13, 13, 2, 99])
    sector = rng.randrange(AREA_SECTORS)
    if rng.random() < 0.1:
        sector = rng.choice([capacity - 1, capacity, 1 << 55, 2**64 - 1, rng.randrange(1 << 64)])
    sectors = rng.randint(1, 24)
    ragged = rng.choice([1, 100, 511]) if rng.random() < 0.1 else 0
    if kind == BlockRequest.IN:
        return kind, sector, b"", sectors * 512 + ragged
    if kind == BlockRequest.OUT:
        return kind, sector, rng.randbytes(sectors * 512 + ragged), 0
    if kind == BlockRequest.WRITE_ZEROES:
        # One fault at a time: which is told first is not specified.
        flags = rng.choice([0, 0, 1, 2]) if sector < AREA_SECTORS else 0
        if flags == 2:
            sector = sector // 8 * 8
        return kind, 0, EXTENT.pack(sector, sectors, flags), 0
    return kind, 0, b"", 0


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_all_back_ends_answer_alike(
    backend_cache: BackendCache,
    request: pytest.FixtureRequest,
    seed: int,
    block_bytes: int,
) -> None:
    if request.config.getoption("--backend-socket"):
        pytest.skip("one socket has nothing to be compared with")
    kinds = request.config.getoption("--backends").split(",")
    spec = DiskSpec(block_bytes=block_bytes)
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        devices: dict[str, BlockDevice] = {}
        for kind in kinds:
            assert kind in KINDS
            try:
                found = backend_cache.get(kind, spec)
            except BackendMissingError as error:
                if kind == "qsd":
                    continue
                pytest.fail(str(error), pytrace=False)
            devices[kind] = stack.enter_context(found.device())
        if len(devices) < 2:
            pytest.skip("there is only one back-end to be asked")
        first = next(iter(devices))
        for name in SAME_FIELDS:
            values = {kind: getattr(device.config, name) for kind, device in devices.items()}
            assert len(set(values.values())) == 1, (name, values)
        # What was there before differs.
        start = rng.randbytes((AREA_SECTORS + 64) * 512)
        for device in devices.values():
            device.write(0, start)
            device.write(device.capacity_bytes - (64 << 10), bytes(64 << 10))
        capacity = devices[first].config.capacity_sectors
        for step in range(STEPS):
            kind, sector, out, room = _step(rng, capacity)
            cuts = sorted(rng.choices(range(16 + len(out)), k=rng.randrange(4)))
            indirect = rng.random() < 0.5
            answers = {}
            for name, device in devices.items():
                done = device.request(
                    kind,
                    sector,
                    data_out=out,
                    data_in_bytes=room,
                    readable_cuts=cuts,
                    indirect=indirect,
                )
                data = done.data if done.status == BlockStatus.OK else b""
                answers[name] = (done.status, data)
            expected = answers[first]
            assert all(answer == expected for answer in answers.values()), (
                f"seed {seed}, step {step}: request {kind} at sector {sector}, {len(out)} bytes "
                f"out, {room} in: {[(name, a[0], len(a[1])) for name, a in answers.items()]}"
            )
        contents = {name: device.read(0, len(start)) for name, device in devices.items()}
        assert len(set(contents.values())) == 1, f"seed {seed}"
