"""Any layout of a request over descriptors is served: virtio 1.3, 2.7.4 and 5.2.6.

A driver may cut the readable and the writable part of a request wherever it likes.
"""

from __future__ import annotations

import random

import pytest

from tests.protocol.backends import Backend
from tests.protocol.helpers import must_be_ok, pattern
from vhostd.protocol.features import VirtioFeature
from vhostd.virtqueue.block import DRIVER_FEATURES, EXTENT, BlockDevice
from vhostd.virtqueue.constants import ID_BYTES, BlockRequest, BlockStatus

IN, OUT = BlockRequest.IN, BlockRequest.OUT
HEADER_BYTES = 16
LENGTH = 4096

both_descriptors = pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])


def _write(device: BlockDevice, data: bytes, cuts: object, *, indirect: bool) -> None:
    must_be_ok(device.request(OUT, 8, data_out=data, readable_cuts=cuts, indirect=indirect))
    assert device.read(4096, len(data)) == data


def _read(device: BlockDevice, data: bytes, cuts: object, *, indirect: bool) -> None:
    done = device.request(IN, 8, data_in_bytes=len(data), writable_cuts=cuts, indirect=indirect)
    assert must_be_ok(done).data == data


@both_descriptors
def test_header_and_data_may_share_a_descriptor(backend: Backend, indirect: bool) -> None:
    with backend.device() as device:
        _write(device, pattern("shared", LENGTH), (), indirect=indirect)


@both_descriptors
def test_data_and_status_may_share_a_descriptor(backend: Backend, indirect: bool) -> None:
    with backend.device() as device:
        data = pattern("status", LENGTH)
        device.write(4096, data)
        _read(device, data, (), indirect=indirect)
        # The status beside the last bytes only.
        _read(device, data, (LENGTH - 1,), indirect=indirect)
        _read(device, data, (512, LENGTH - 512), indirect=indirect)


@both_descriptors
@pytest.mark.parametrize("cut", range(1, HEADER_BYTES))
def test_the_header_may_be_cut_anywhere(backend: Backend, cut: int, indirect: bool) -> None:
    with backend.device() as device:
        data = pattern(cut, LENGTH)
        _write(device, data, (cut,), indirect=indirect)
        _write(device, data[::-1], (cut, HEADER_BYTES), indirect=indirect)


@both_descriptors
def test_the_header_may_come_byte_by_byte(backend: Backend, indirect: bool) -> None:
    with backend.device() as device:
        cuts = range(1, HEADER_BYTES + 1)
        _write(device, pattern("bytes", LENGTH), cuts, indirect=indirect)
        flush = device.request(BlockRequest.FLUSH, readable_cuts=cuts, indirect=indirect)
        must_be_ok(flush)
        unknown = device.request(99, readable_cuts=cuts, indirect=indirect)
        assert unknown.status == BlockStatus.UNSUPP


@both_descriptors
def test_data_may_come_in_pieces_of_broken_sectors(backend: Backend, indirect: bool) -> None:
    with backend.device() as device:
        data = pattern("pieces", LENGTH)
        for step in (37, 100, 511, 513, 1000, 4095):
            _write(device, data, range(HEADER_BYTES, LENGTH, step), indirect=indirect)
            _read(device, data, range(step, LENGTH, step), indirect=indirect)


@both_descriptors
def test_a_single_byte_may_have_a_descriptor(backend: Backend, indirect: bool) -> None:
    with backend.device() as device:
        data = pattern("single", 512)
        for at in (0, 1, 255, 510):
            _write(device, data, (16, 16 + at, 17 + at), indirect=indirect)
            _read(device, data, (at, at + 1), indirect=indirect)


@both_descriptors
def test_get_id_may_be_cut_anywhere(backend: Backend, indirect: bool) -> None:
    with backend.device() as device:
        whole = device.request(BlockRequest.GET_ID, data_in_bytes=ID_BYTES).data
        for cuts in ((), (1,), (19,), (7, 13, 20), tuple(range(1, 21))):
            done = device.request(
                BlockRequest.GET_ID,
                data_in_bytes=ID_BYTES,
                writable_cuts=cuts,
                indirect=indirect,
            )
            # Some write nothing behind the terminating zero.
            assert must_be_ok(done).data.split(b"\0")[0] == whole.split(b"\0")[0]


@both_descriptors
def test_an_extent_may_be_cut_anywhere(backend: Backend, indirect: bool) -> None:
    with backend.device() as device:
        for cuts in ((), (16,), (3, 16, 17), (20, 25, 31), tuple(range(1, 32))):
            device.write(0, pattern(cuts, 8192))
            done = device.request(
                BlockRequest.WRITE_ZEROES,
                data_out=EXTENT.pack(8, 8, 0),
                readable_cuts=cuts,
                indirect=indirect,
            )
            must_be_ok(done)
            assert device.read(0, 8192) == pattern(cuts, 8192)[:4096] + bytes(4096)


def test_a_chain_may_be_as_long_as_the_queue(backend: Backend) -> None:
    with backend.device(queue_size=64) as device:
        data = pattern("long", 62 * 512)
        # The header, 62 pieces, the status.
        _write(device, data, range(HEADER_BYTES, len(data), 512), indirect=False)
        _read(device, data, range(512, len(data) + 1, 512), indirect=False)


def test_an_indirect_table_may_be_longer_than_the_queue(backend: Backend) -> None:
    """virtio 1.3, 2.7.5.3.1 forbids it to drivers, who do it; all devices accept it."""
    with backend.device(queue_size=16) as device:
        data = pattern("longer", 100 * 512)
        _write(device, data, range(HEADER_BYTES, len(data), 512), indirect=True)
        _read(device, data, range(512, len(data) + 1, 512), indirect=True)


def test_direct_and_indirect_chains_mix(backend: Backend) -> None:
    with backend.device(queue_size=64) as device:
        tokens = {}
        for at in range(16):
            data = pattern(("mix", at), LENGTH)
            token = device.submit(OUT, at * 8, data_out=data, indirect=bool(at % 2), kick=False)
            tokens[token] = at
        device.publish()
        assert {c.token for c in device.reap(minimum=16)} == tokens.keys()
        for at in range(16):
            assert device.read(at * 4096, LENGTH) == pattern(("mix", at), LENGTH)


def test_indirect_tables_may_lie_anywhere(backend: Backend) -> None:
    """Descriptors of a table have no alignment: virtio 1.3, 2.7.5.3."""
    with backend.device() as device:
        data = pattern("table", LENGTH)
        device.memory.allocate(5, align=1)
        _write(device, data, (7, 16, 1000), indirect=True)
        _read(device, data, (7, 1000), indirect=True)


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
def test_random_layouts_move_the_right_bytes(backend: Backend, seed: int, event_idx: bool) -> None:
    """Random cuts, places, alignments and lengths; several requests at a time."""
    rng = random.Random(seed)
    features = DRIVER_FEATURES & ~(0 if event_idx else VirtioFeature.EVENT_IDX)
    with backend.device(features=features, queue_size=256) as device:
        blocks = 64
        content = bytearray(rng.randbytes(blocks * 4096))
        device.write(0, content)
        held: list[int] = []

        def place(size_bytes: int) -> int:
            gap = rng.choice([0, 0, 1, 3, 17, 511])
            address = device.memory.allocate(size_bytes + gap, align=rng.choice([1, 2, 8, 512]))
            held.append(address)
            return address + gap

        for _ in range(150):
            expected: dict[int, bytes] = {}
            # Different blocks, because requests in flight have no order.
            for block in rng.sample(range(blocks), rng.randint(1, 6)):
                sector = block * 8 + rng.randrange(8)
                length = rng.randint(1, block * 8 + 8 - sector) * 512
                cuts = sorted(rng.choices(range(length + HEADER_BYTES), k=rng.randrange(9)))
                start = sector * 512
                if rng.random() < 0.5:
                    data = rng.randbytes(length)
                    content[start : start + length] = data
                    token = device.submit(
                        OUT,
                        sector,
                        data_out=data,
                        readable_cuts=cuts,
                        indirect=rng.random() < 0.5,
                        place=place,
                        kick=False,
                    )
                    expected[token] = b""
                else:
                    token = device.submit(
                        IN,
                        sector,
                        data_in_bytes=length,
                        writable_cuts=cuts,
                        indirect=rng.random() < 0.5,
                        place=place,
                        kick=False,
                    )
                    expected[token] = bytes(content[start : start + length])
            device.publish()
            for done in device.reap(minimum=len(expected)):
                assert must_be_ok(done).data == expected.pop(done.token), f"seed {seed}"
            assert not expected
            for address in held:
                device.memory.release(address)
            held.clear()
        assert device.read(0, len(content)) == content, f"seed {seed}"
