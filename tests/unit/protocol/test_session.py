"""Every message does what vhost-user.rst says, over a real socket."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.unit.protocol.frontend import (
    ALL_FEATURES,
    BLK_FEATURES,
    CONFIG_BYTES,
    DEFAULT_PROTOCOL,
    GUEST_ADDRESS,
    MEMORY_BYTES,
    USER_ADDRESS,
    FakeDevice,
    address,
    event_fd,
    memory_file,
    region,
    run_async,
    served,
    table,
)
from vhostd.errors import DeviceError
from vhostd.protocol.features import DeviceStatus, ProtocolFeature, VirtioFeature
from vhostd.protocol.messages import (
    Config,
    ConfigFlag,
    Request,
    SingleRegion,
    VringFd,
    VringState,
    encode_u64,
)
from vhostd.protocol.session import EndKind


@run_async
async def test_features_offered_are_the_devices_and_bit_30() -> None:
    async with served() as s:
        assert await s.front.get(Request.GET_FEATURES) == BLK_FEATURES | 1 << 30


@run_async
async def test_protocol_features_are_offered_before_set_features() -> None:
    async with served() as s:
        assert await s.front.get(Request.GET_PROTOCOL_FEATURES) == DEFAULT_PROTOCOL


@run_async
async def test_features_not_offered_are_refused() -> None:
    async with served() as s:
        await s.front.negotiate(protocol=ProtocolFeature.REPLY_ACK)
        assert await s.front.result(Request.SET_FEATURES, encode_u64(1 << 34)) == 1
        assert await s.front.result(Request.SET_PROTOCOL_FEATURES, encode_u64(1 << 12)) == 1
        assert s.session.info().virtio_features[-1] == "VERSION_1"
        await s.front.send(Request.SET_FEATURES, encode_u64(1 << 34))
        end = await s.end()
    assert end.kind is EndKind.REFUSED
    assert end.reason == "SET_FEATURES: features RING_PACKED are not offered"


@run_async
async def test_feature_bits_without_a_name_are_refused() -> None:
    async with served() as s:
        await s.front.negotiate(protocol=ProtocolFeature.REPLY_ACK)
        for bit in (60, 63, 20):
            assert await s.front.result(Request.SET_FEATURES, encode_u64(1 << bit)) == 1
            assert await s.front.result(Request.SET_PROTOCOL_FEATURES, encode_u64(1 << bit)) == 1


@run_async
async def test_a_session_knows_what_it_negotiated() -> None:
    async with served() as s:
        await s.front.running()
        info = s.session.info()
    assert info.virtio_features[:2] == ["BLK_SEG_MAX", "BLK_FLUSH"]
    assert "PROTOCOL_FEATURES" in info.virtio_features
    assert info.protocol_features[0] == "MQ"
    assert info.queues_started == [0]
    assert (info.memory_regions, info.memory_bytes) == (1, MEMORY_BYTES)


@run_async
async def test_reply_ack_is_given_only_when_negotiated() -> None:
    async with served() as s:
        await s.front.negotiate(protocol=0)
        await s.front.send(Request.SET_OWNER, need_reply=True)
        # The next reply is that of GET_QUEUE_NUM, so SET_OWNER had none.
        assert await s.front.get(Request.GET_QUEUE_NUM) == 4
        await s.front.send(Request.SET_PROTOCOL_FEATURES, encode_u64(ProtocolFeature.REPLY_ACK))
        await s.front.do(Request.SET_OWNER)


@run_async
async def test_need_reply_on_a_message_with_a_reply_adds_none() -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.send(Request.GET_QUEUE_NUM, need_reply=True)
        assert (await s.front.reply())[0] == Request.GET_QUEUE_NUM
        assert await s.front.get(Request.GET_MAX_MEM_SLOTS) == 509


@run_async
async def test_memory_table_reaches_the_engine() -> None:
    async with served() as s:
        await s.front.negotiate()
        with memory_file() as fd:
            await s.front.do(Request.SET_MEM_TABLE, table(region(0), region(1)), [fd, fd])
        first = s.device.calls[-1][1][0]
        assert first["guest_address"] == GUEST_ADDRESS
        assert first["user_address"] == USER_ADDRESS
        assert first["size_bytes"] == MEMORY_BYTES
        assert len(s.device.regions) == 2


@run_async
async def test_memory_is_plugged_and_unplugged_while_a_ring_runs() -> None:
    async with served() as s:
        await s.front.running()
        with memory_file() as fd:
            await s.front.do(Request.ADD_MEM_REG, SingleRegion(region(1)).encode(), [fd])
            # One descriptor with REM_MEM_REG is tolerated, and closed.
            await s.front.do(Request.REM_MEM_REG, SingleRegion(region(1)).encode(), [fd])
        assert s.device.names()[-2:] == ["add_region", "remove_region"]
        # The ring's own memory cannot go.
        assert await s.front.result(Request.REM_MEM_REG, SingleRegion(region(0)).encode()) == 1
        assert s.session.info().memory_regions == 1


@run_async
async def test_a_guest_has_509_memory_slots_and_no_more() -> None:
    async with served() as s:
        await s.front.negotiate()
        with memory_file() as fd:
            for slot in range(509):
                await s.front.do(Request.ADD_MEM_REG, SingleRegion(region(slot)).encode(), [fd])
            one_more = SingleRegion(region(509)).encode()
            assert await s.front.result(Request.ADD_MEM_REG, one_more, [fd]) == 1
        assert len(s.device.regions) == 509


@pytest.mark.parametrize(
    "bad",
    [
        region(0, size_bytes=0),
        region(0, size_bytes=MEMORY_BYTES + 1),
        region(0, offset=4096),
        region(0, size_bytes=1 << 63),
    ],
    ids=["empty", "longer-than-file", "offset-beyond-file", "wraps"],
)
@run_async
async def test_a_region_that_cannot_be_is_refused_and_changes_nothing(bad: object) -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.share_memory()
        with memory_file() as fd:
            assert await s.front.result(Request.SET_MEM_TABLE, table(bad), [fd]) == 1  # type: ignore[arg-type]
        assert s.device.names() == ["set_memory"]
        assert s.session.info().memory_bytes == MEMORY_BYTES


@run_async
async def test_a_ring_starts_with_what_was_set() -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.share_memory()
        await s.front.start_ring(1, size=256, base=77)
        assert s.device.started[1] == {
            "size": 256,
            "descriptor_address": address(1).descriptor,
            "available_address": address(1).available,
            "used_address": address(1).used,
            "base": 77,
            "has_kick": True,
            "has_call": True,
            "has_error": False,
            "features": BLK_FEATURES,
            "enabled": False,
        }


@run_async
async def test_a_ring_waits_for_whatever_comes_last() -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.share_memory()
        with event_fd() as fd:
            await s.front.do(Request.SET_VRING_KICK, VringFd(0, True).encode(), [fd])
        await s.front.do(Request.SET_VRING_ADDR, address(0).encode())
        assert s.device.started == {}
        await s.front.do(Request.SET_VRING_NUM, VringState(0, 64).encode())
        assert s.device.started[0]["has_kick"]


@run_async
async def test_a_ring_without_kick_descriptor_is_polled() -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.share_memory()
        await s.front.do(Request.SET_VRING_NUM, VringState(0, 64).encode())
        await s.front.do(Request.SET_VRING_ADDR, address(0).encode())
        await s.front.do(Request.SET_VRING_KICK, VringFd(0, False).encode())
        assert s.device.started[0]["has_kick"] is False


@run_async
async def test_a_ring_is_processed_only_when_enabled() -> None:
    async with served() as s:
        await s.front.running()
        assert s.device.started[0]["enabled"] is False
        await s.front.do(Request.SET_VRING_ENABLE, VringState(0, 1).encode())
        assert s.device.started[0]["enabled"] is True
        await s.front.do(Request.SET_VRING_ENABLE, VringState(0, 0).encode())
        assert s.device.started[0]["enabled"] is False


@run_async
async def test_a_ring_may_be_enabled_before_it_starts() -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.do(Request.SET_VRING_ENABLE, VringState(0, 1).encode())
        await s.front.share_memory()
        await s.front.start_ring()
        assert s.device.started[0]["enabled"] is True


@run_async
async def test_without_protocol_features_a_ring_starts_enabled() -> None:
    async with served() as s:
        await s.front.send(Request.SET_FEATURES, encode_u64(BLK_FEATURES))
        await s.front.share_memory()
        await s.front.start_ring()
        assert s.device.started[0]["enabled"] is True


@run_async
async def test_enable_without_protocol_features_is_refused() -> None:
    async with served() as s:
        await s.front.send(Request.SET_FEATURES, encode_u64(BLK_FEATURES))
        await s.front.send(Request.SET_VRING_ENABLE, VringState(0, 1).encode())
        assert (await s.end()).kind is EndKind.REFUSED


@run_async
async def test_get_vring_base_drains_and_stops_and_a_new_kick_starts_again() -> None:
    async with served() as s:
        await s.front.running()
        s.device.next_available = 1234
        reply = await s.front.ask(Request.GET_VRING_BASE, VringState(0, 0).encode())
        assert VringState.decode(reply) == VringState(0, 1234)
        assert s.device.names()[-1] == "stop_queue"
        # Asked again, it says the same and stops nothing.
        again = await s.front.ask(Request.GET_VRING_BASE, VringState(0, 0).encode())
        assert again == reply
        assert s.device.names().count("stop_queue") == 1
        with event_fd() as fd:
            await s.front.do(Request.SET_VRING_KICK, VringFd(0, True).encode(), [fd])
        assert s.device.started[0]["base"] == 1234


@run_async
async def test_kick_call_and_err_reach_a_started_ring() -> None:
    async with served() as s:
        await s.front.running()
        with event_fd() as fd:
            for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
                await s.front.do(request, VringFd(0, True).encode(), [fd])
        assert s.device.names()[-3:] == ["set_queue_kick", "set_queue_call", "set_queue_error"]
        await s.front.do(Request.SET_VRING_CALL, VringFd(0, False).encode())
        assert s.device.calls[-1] == ("set_queue_call", 0, False)


@run_async
async def test_an_err_descriptor_set_early_is_there_at_the_start() -> None:
    async with served() as s:
        await s.front.negotiate()
        with event_fd() as fd:
            await s.front.do(Request.SET_VRING_ERR, VringFd(0, True).encode(), [fd])
        await s.front.share_memory()
        await s.front.start_ring()
        assert s.device.started[0]["has_error"]


@run_async
async def test_a_started_ring_does_not_change() -> None:
    async with served() as s:
        await s.front.running()
        other = address(1)
        for request, payload in (
            (Request.SET_VRING_NUM, VringState(0, 256).encode()),
            (Request.SET_VRING_BASE, VringState(0, 3).encode()),
            (Request.SET_VRING_ADDR, b"\0\0\0\0" + other.encode()[4:]),
            (Request.SET_FEATURES, encode_u64(BLK_FEATURES)),
            (Request.SET_PROTOCOL_FEATURES, encode_u64(ProtocolFeature.REPLY_ACK)),
        ):
            assert await s.front.result(request, payload) == 1
        # The same again is no change.
        await s.front.do(Request.SET_FEATURES, encode_u64(ALL_FEATURES))
        await s.front.do(Request.SET_VRING_ADDR, address(0).encode())
        assert s.device.names().count("start_queue") == 1


@pytest.mark.parametrize("size", [0, 3, 100, 65536, 0xFFFFFFFF])
@run_async
async def test_a_ring_size_that_is_no_power_of_2_is_refused(size: int) -> None:
    async with served() as s:
        await s.front.negotiate()
        assert await s.front.result(Request.SET_VRING_NUM, VringState(0, size).encode()) == 1


@pytest.mark.parametrize("field", ["descriptor", "used", "available", "flags"])
@run_async
async def test_ring_addresses_out_of_line_are_refused(field: str) -> None:
    async with served() as s:
        await s.front.negotiate()
        good = address(0)
        values = {
            name: getattr(good, name)
            for name in ("index", "flags", "descriptor", "used", "available", "log")
        }
        values[field] += 1
        bad = type(good)(**values)
        assert await s.front.result(Request.SET_VRING_ADDR, bad.encode()) == 1
        await s.front.do(Request.SET_VRING_ADDR, good.encode())


@run_async
async def test_a_ring_outside_memory_is_refused_and_can_be_set_right() -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.share_memory()
        await s.front.do(Request.SET_VRING_NUM, VringState(0, 64).encode())
        outside = type(address())(0, 0, 0x1000, 0x2000, 0x3000, 0)
        await s.front.do(Request.SET_VRING_ADDR, outside.encode())
        with event_fd() as fd:
            assert await s.front.result(Request.SET_VRING_KICK, VringFd(0, True).encode(), [fd])
            await s.front.do(Request.SET_VRING_ADDR, address(0).encode())
            assert s.device.started == {}
            await s.front.do(Request.SET_VRING_KICK, VringFd(0, True).encode(), [fd])
        assert list(s.device.started) == [0]


@run_async
async def test_config_space_is_read_whole_in_part_and_padded() -> None:
    async with served() as s:
        await s.front.negotiate()
        whole = Config.decode(
            await s.front.ask(Request.GET_CONFIG, Config(0, 0, bytes(256)).encode())
        )
        assert whole.data[:CONFIG_BYTES] == s.device.config_space(0)
        assert whole.data[CONFIG_BYTES:] == bytes(256 - CONFIG_BYTES)
        part = await s.front.ask(Request.GET_CONFIG, Config(20, 2, bytes(4)).encode())
        assert Config.decode(part) == Config(20, 2, bytes([20, 21, 22, 23]))


@pytest.mark.parametrize(
    "access",
    [Config(256, 0, bytes(1)), Config(255, 0, bytes(2)), Config(0, 0, b"")],
)
@run_async
async def test_a_config_access_outside_is_answered_with_nothing(access: Config) -> None:
    async with served() as s:
        await s.front.negotiate()
        assert await s.front.ask(Request.GET_CONFIG, access.encode()) == b""
        assert await s.front.result(Request.SET_CONFIG, access.encode()) == 1


@run_async
async def test_writeback_is_honoured_and_all_else_is_read_only() -> None:
    async with served() as s:
        await s.front.negotiate()
        await s.front.do(Request.SET_CONFIG, Config(32, 0, b"\0").encode())
        assert s.device.write_cache is False
        await s.front.do(Request.SET_CONFIG, Config(32, 0, b"\1").encode())
        assert s.device.write_cache is True
        for bad in (
            Config(32, 0, b"\2"),
            Config(32, 2, b"\0"),
            Config(0, 0, bytes(8)),
            Config(32, 0, b"\0\0"),
        ):
            assert await s.front.result(Request.SET_CONFIG, bad.encode()) == 1
        assert s.device.write_cache is True


@run_async
async def test_a_migration_may_repeat_the_config_space_and_bring_writeback() -> None:
    async with served() as s:
        await s.front.negotiate()
        space = bytearray(s.device.config_space(0))
        space[32] = 0
        migrated = Config(0, ConfigFlag.MIGRATION, bytes(space))
        await s.front.do(Request.SET_CONFIG, migrated.encode())
        assert s.device.write_cache is False
        space[0] ^= 1
        migrated = Config(0, ConfigFlag.MIGRATION, bytes(space))
        assert await s.front.result(Request.SET_CONFIG, migrated.encode()) == 1


@run_async
async def test_writeback_needs_config_wce() -> None:
    async with served() as s:
        await s.front.negotiate(ALL_FEATURES & ~VirtioFeature.BLK_CONFIG_WCE)
        assert await s.front.result(Request.SET_CONFIG, Config(32, 0, b"\0").encode()) == 1


@run_async
async def test_a_guest_without_flush_begins_with_writeback_off() -> None:
    async with served() as s:
        await s.front.negotiate(ALL_FEATURES & ~VirtioFeature.BLK_FLUSH)
        assert s.device.write_cache is False
        await s.front.do(Request.SET_FEATURES, encode_u64(ALL_FEATURES))
        assert s.device.write_cache is True


@run_async
async def test_writeback_off_survives_reset_and_reconnect_and_is_reported() -> None:
    reported: list[bool] = []

    async def keep(enabled: bool) -> None:
        reported.append(enabled)

    async with served(on_write_cache=keep) as s:
        await s.front.running()
        await s.front.do(Request.SET_CONFIG, Config(32, 0, b"\0").encode())
        await s.front.do(Request.SET_STATUS, encode_u64(0))
        await s.front.do(Request.SET_FEATURES, encode_u64(ALL_FEATURES))
        assert s.device.write_cache is False
    assert reported == [False]
    async with served(write_cache=reported[0]) as s:
        await s.front.negotiate()
        assert s.device.write_cache is False


@pytest.mark.parametrize("by_status", [False, True])
@run_async
async def test_device_reset_stops_rings_and_forgets_features_but_keeps_the_session(
    by_status: bool,
) -> None:
    async with served() as s:
        await s.front.running()
        await s.front.do(Request.SET_VRING_ENABLE, VringState(0, 1).encode())
        if by_status:
            await s.front.do(Request.SET_STATUS, encode_u64(0))
        else:
            await s.front.do(Request.RESET_DEVICE)
        info = s.session.info()
        assert s.device.started == {}
        assert info.queues_enabled == []
        assert info.virtio_features == ["PROTOCOL_FEATURES"]
        assert info.protocol_features[0] == "MQ"
        assert info.memory_regions == 1
        # What QEMU sends while it stops a device that was reset.
        await s.front.do(Request.SET_VRING_ENABLE, VringState(0, 0).encode())
        reply = await s.front.ask(Request.GET_VRING_BASE, VringState(0, 0).encode())
        assert VringState.decode(reply).num == 0
        await s.front.do(Request.SET_FEATURES, encode_u64(ALL_FEATURES))
        await s.front.start_ring()
        assert list(s.device.started) == [0]


@run_async
async def test_reset_owner_disables_all_rings_and_stops_none() -> None:
    async with served() as s:
        await s.front.running()
        await s.front.do(Request.SET_VRING_ENABLE, VringState(0, 1).encode())
        await s.front.do(Request.RESET_OWNER)
        assert s.device.started[0]["enabled"] is False


@run_async
async def test_features_ok_stays_clear_when_features_were_refused() -> None:
    wanted = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK
    async with served() as s:
        await s.front.negotiate()
        # Without need_reply, too, the session lives: this is how it is reported.
        await s.front.send(Request.SET_FEATURES, encode_u64(1 << 34))
        await s.front.do(Request.SET_STATUS, encode_u64(wanted))
        status = await s.front.get(Request.GET_STATUS)
        assert status == DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER
        await s.front.do(Request.SET_FEATURES, encode_u64(ALL_FEATURES))
        await s.front.do(Request.SET_STATUS, encode_u64(wanted))
        assert await s.front.get(Request.GET_STATUS) == wanted


@run_async
async def test_the_ends_of_a_session_release_the_engine() -> None:
    async with served() as s:
        await s.front.running()
        s.front.socket.close()
        end = await s.end()
    assert end.kind is EndKind.PEER_CLOSED
    assert s.device.names()[-1] == "close"


@run_async
async def test_a_session_that_is_told_to_end_says_why() -> None:
    async with served() as s:
        await s.front.running()
        s.session.end(EndKind.STOPPED, "the export is being removed")
        end = await s.end()
    assert (end.kind, end.reason) == (EndKind.STOPPED, "the export is being removed")


@run_async
async def test_a_cancelled_session_waits_for_the_engine_and_releases_it() -> None:
    entered, leave = threading.Event(), threading.Event()

    class SlowDevice(FakeDevice):
        def stop_queue(self, index: int) -> int:
            entered.set()
            assert leave.wait(10)
            return super().stop_queue(index)

    async with served(device=SlowDevice()) as s:
        await s.front.running()
        await s.front.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
        assert await asyncio.to_thread(entered.wait, 10)
        s.task.cancel()
        s.session.end(EndKind.STOPPED, "also told")
        await asyncio.sleep(0)
        assert not s.device.closed
        leave.set()
        await asyncio.wait([s.task])
        assert s.task.cancelled()
        assert s.device.names()[-2:] == ["stop_queue", "close"]


@run_async
async def test_what_the_engine_refuses_is_the_result() -> None:
    async with served() as s:
        await s.front.negotiate()
        s.device.fail["set_memory"] = DeviceError("cannot map")
        with memory_file() as fd:
            assert await s.front.result(Request.SET_MEM_TABLE, table(region()), [fd]) == 1
            assert s.session.info().memory_regions == 0
            await s.front.send(Request.SET_MEM_TABLE, table(region()), [fd])
        assert (await s.end()).reason == "SET_MEM_TABLE: cannot map"


@run_async
async def test_a_ring_that_cannot_be_stopped_ends_the_session() -> None:
    async with served() as s:
        await s.front.running()
        s.device.fail["stop_queue"] = DeviceError("worker is gone")
        await s.front.send(Request.GET_VRING_BASE, VringState(0, 0).encode())
        end = await s.end()
    assert (end.kind, end.reason) == (EndKind.ENGINE, "worker is gone")


@run_async
async def test_a_defect_costs_the_session_and_releases_everything() -> None:
    async with served() as s:
        await s.front.negotiate()
        s.device.fail["set_memory"] = ZeroDivisionError("a defect")
        with memory_file() as fd:
            await s.front.send(Request.SET_MEM_TABLE, table(region()), [fd])
        end = await s.end()
    assert end.kind is EndKind.INTERNAL
