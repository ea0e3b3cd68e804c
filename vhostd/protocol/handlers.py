"""What each request does: one function a request, and the table that names them.

A handler gets the session's state, the decoded payload and the descriptors. It returns the payload
of the request's own reply, or None for a request that has none. It raises RefusedError for what
cannot be done, without having changed anything, and ViolationError for what no front-end may send.
Descriptors it does not take are closed by the session. Event loop's thread.

Rules: vhost-user.rst, "Front-end message types", at each request's name, unless said otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from vhostd.protocol.features import (
    OFFERED_PROTOCOL_FEATURES,
    DeviceStatus,
    ProtocolFeature,
    VirtioFeature,
    names,
)
from vhostd.protocol.framing import ReceivedFds
from vhostd.protocol.memory import MAX_MEM_SLOTS, MemoryTable, check_file, for_engine
from vhostd.protocol.messages import (
    MAX_CONFIG_BYTES,
    RULES,
    Config,
    ConfigFlag,
    MemoryTableDescription,
    RefusedError,
    Request,
    SingleRegion,
    ViolationError,
    VringAddress,
    VringFd,
    VringState,
    encode_u64,
)
from vhostd.protocol.state import CONFIG_WRITEBACK_OFFSET, MAX_QUEUE_SIZE, SessionState

__all__ = ["HANDLERS", "Handler"]

Handler: TypeAlias = Callable[[SessionState, Any, ReceivedFds], Awaitable[bytes | None]]


# Features and ownership


async def get_features(state: SessionState, _payload: None, _fds: ReceivedFds) -> bytes:
    return encode_u64(state.offered)


async def set_features(state: SessionState, features: int, _fds: ReceivedFds) -> None:
    extra = features & ~state.offered
    if extra:
        state.features_refused = True
        state.status &= ~DeviceStatus.FEATURES_OK
        raise RefusedError(
            f"features {_list(VirtioFeature, extra)} are not offered",
            # With STATUS the front-end learns of it by FEATURES_OK staying clear.
            ends_session=not state.has(ProtocolFeature.STATUS),
        )
    if state.any_started and features != state.features:
        raise RefusedError("features cannot change while a vring is started; stop all vrings first")
    # virtio 1.3, 5.2.5: a driver with CONFIG_WCE and without FLUSH finds writeback as 0.
    wce, flush = VirtioFeature.BLK_CONFIG_WCE, VirtioFeature.BLK_FLUSH
    cannot_flush = features & wce and not features & flush
    await state.set_write_cache(state.wanted_write_cache and not cannot_flush)
    state.features = features
    state.features_negotiated = True
    state.features_refused = False


async def get_protocol_features(_state: SessionState, _payload: None, _fds: ReceivedFds) -> bytes:
    return encode_u64(OFFERED_PROTOCOL_FEATURES)


async def set_protocol_features(state: SessionState, features: int, _fds: ReceivedFds) -> None:
    extra = features & ~int(OFFERED_PROTOCOL_FEATURES)
    if extra:
        raise RefusedError(f"protocol features {_list(ProtocolFeature, extra)} are not offered")
    if state.any_started and features != state.protocol_features:
        raise RefusedError("protocol features cannot change while a vring is started")
    state.protocol_features = features
    state.protocol_negotiated = True


async def set_owner(state: SessionState, _payload: None, _fds: ReceivedFds) -> None:
    """Only noted. Front-ends send it at different places (QEMU: after GET_PROTOCOL_FEATURES)."""
    state.owned = True


async def reset_owner(state: SessionState, _payload: None, _fds: ReceivedFds) -> None:
    """Deprecated; "use it to disable all rings"."""
    for queue in state.queues:
        if queue.started:
            await state.ask(state.device.set_queue_enabled, queue.index, False)
        queue.enabled = False
    state.owned = False


async def reset_device(state: SessionState, _payload: None, _fds: ReceivedFds) -> None:
    await state.reset_device()


async def set_status(state: SessionState, value: int, _fds: ReceivedFds) -> None:
    """virtio 1.3, 2.1 and 3.1.1; 0 is a reset."""
    if value > 0xFF:
        raise ViolationError(f"device status {value:#x} has more than 8 bits")
    if value == 0:
        await state.reset_device()
        return
    status = DeviceStatus(value)
    if state.features_refused:
        status &= ~DeviceStatus.FEATURES_OK
    state.status = status


async def get_status(state: SessionState, _payload: None, _fds: ReceivedFds) -> bytes:
    return encode_u64(state.status)


async def get_queue_num(state: SessionState, _payload: None, _fds: ReceivedFds) -> bytes:
    return encode_u64(len(state.queues))


# Memory


async def set_mem_table(
    state: SessionState, table: MemoryTableDescription, fds: ReceivedFds
) -> None:
    memory = MemoryTable.of(table.regions)
    regions = []
    for region, fd in zip(table.regions, fds, strict=True):
        check_file(region, fd)
        regions.append(for_engine(region, fd))
    if not regions and state.any_started:
        raise RefusedError("guest memory cannot go while a vring is started; stop all vrings first")
    await state.ask(state.device.set_memory, regions)
    state.memory = memory


async def get_max_mem_slots(_state: SessionState, _payload: None, _fds: ReceivedFds) -> bytes:
    return encode_u64(MAX_MEM_SLOTS)


async def add_mem_reg(state: SessionState, single: SingleRegion, fds: ReceivedFds) -> None:
    memory = state.memory.with_region(single.region)
    (fd,) = fds
    check_file(single.region, fd)
    await state.ask(state.device.add_region, for_engine(single.region, fd))
    state.memory = memory


async def rem_mem_reg(state: SessionState, single: SingleRegion, _fds: ReceivedFds) -> None:
    region = single.region
    memory = state.memory.without(region)
    await state.ask(
        state.device.remove_region, region.guest_address, region.user_address, region.size_bytes
    )
    state.memory = memory


# Rings


async def set_vring_num(state: SessionState, vring: VringState, _fds: ReceivedFds) -> None:
    queue = state.queue(vring.index)
    # virtio 1.3, 2.7: the size of a split virtqueue is a power of 2.
    if not 1 <= vring.num <= MAX_QUEUE_SIZE or vring.num & (vring.num - 1):
        raise RefusedError(
            f"vring {vring.index} cannot have size {vring.num}; it must be a power of 2 up to "
            f"{MAX_QUEUE_SIZE}"
        )
    if queue.started and vring.num != queue.size:
        raise RefusedError(f"vring {vring.index} is started; its size cannot change")
    before, queue.size = queue.size, vring.num
    try:
        await state.start_if_ready(queue)
    except RefusedError:
        queue.size = before
        raise


async def set_vring_addr(state: SessionState, address: VringAddress, _fds: ReceivedFds) -> None:
    queue = state.queue(address.index)
    if address.flags:
        # VHOST_VRING_F_LOG (bit 0) belongs to LOG_ALL, which is not offered.
        raise RefusedError(
            f"vring {address.index} has flags {address.flags:#x}; none are offered (no LOG_ALL)"
        )
    # virtio 1.3, 2.7: alignment of the three parts of a split virtqueue.
    for what, value, alignment in (
        ("descriptor table", address.descriptor, 16),
        ("available ring", address.available, 2),
        ("used ring", address.used, 4),
    ):
        if value % alignment:
            raise RefusedError(
                f"vring {address.index}: the {what} at {value:#x} is not aligned to {alignment}"
            )
    if queue.started and address != queue.address:
        raise RefusedError(f"vring {address.index} is started; its addresses cannot change")
    before, queue.address = queue.address, address
    try:
        await state.start_if_ready(queue)
    except RefusedError:
        queue.address = before
        raise


async def set_vring_base(state: SessionState, vring: VringState, _fds: ReceivedFds) -> None:
    queue = state.queue(vring.index)
    if vring.num > 0xFFFF:
        raise RefusedError(f"vring {vring.index} cannot have base {vring.num}; it has 16 bits")
    if queue.started:
        raise RefusedError(
            f"vring {vring.index} is started; stop it with GET_VRING_BASE before SET_VRING_BASE"
        )
    queue.base = vring.num


async def get_vring_base(state: SessionState, vring: VringState, _fds: ReceivedFds) -> bytes:
    queue = state.queue(vring.index)
    return VringState(vring.index, await state.stop(queue)).encode()


async def set_vring_kick(state: SessionState, vring: VringFd, fds: ReceivedFds) -> None:
    queue = state.queue(vring.index)
    fd = _check_event_fd(vring, fds)
    if queue.started:
        await state.ask(state.device.set_queue_kick, queue.index, fd)
    queue.set_kick(fds.take() if vring.has_fd else None, given=True)
    try:
        await state.start_if_ready(queue)
    except RefusedError:
        queue.set_kick(None, given=False)
        raise


async def set_vring_call(state: SessionState, vring: VringFd, fds: ReceivedFds) -> None:
    queue = state.queue(vring.index)
    fd = _check_event_fd(vring, fds)
    if queue.started:
        await state.ask(state.device.set_queue_call, queue.index, fd)
    queue.set_call(fds.take() if vring.has_fd else None)


async def set_vring_err(state: SessionState, vring: VringFd, fds: ReceivedFds) -> None:
    queue = state.queue(vring.index)
    fd = _check_event_fd(vring, fds)
    if queue.started:
        await state.ask(state.device.set_queue_error, queue.index, fd)
    queue.set_error(fds.take() if vring.has_fd else None)


async def set_vring_enable(state: SessionState, vring: VringState, _fds: ReceivedFds) -> None:
    queue = state.queue(vring.index)
    if vring.num > 1:
        raise ViolationError(f"vring {vring.index} can be enabled (1) or not (0), not {vring.num}")
    # SET_PROTOCOL_FEATURES is proof enough: some front-ends enable before SET_FEATURES.
    if not (state.protocol_negotiated or state.features & VirtioFeature.PROTOCOL_FEATURES):
        raise RefusedError("it needs VHOST_USER_F_PROTOCOL_FEATURES, which was not negotiated")
    if queue.started:
        await state.ask(state.device.set_queue_enabled, queue.index, bool(vring.num))
    queue.enabled = bool(vring.num)


# Config space


async def get_config(state: SessionState, config: Config, _fds: ReceivedFds) -> bytes:
    """An access outside is answered with no payload, which is how this request says "error".

    The flags are for writing; front-ends put different things there when they read.
    """
    if not config.data or config.offset + len(config.data) > MAX_CONFIG_BYTES:
        return b""
    space = _config_space(state)
    data = space[config.offset : config.offset + len(config.data)]
    return Config(config.offset, config.flags, data).encode()


async def set_config(state: SessionState, config: Config, _fds: ReceivedFds) -> None:
    """The guest may write `writeback` only; a migration may also repeat what is there already."""
    end = config.offset + len(config.data)
    if config.flags not in (ConfigFlag.WRITABLE, ConfigFlag.MIGRATION):
        raise RefusedError(f"config access has flags {config.flags:#x}, which mean nothing here")
    if not config.data or end > MAX_CONFIG_BYTES:
        raise RefusedError(f"config bytes {config.offset} to {end} are not in the config space")
    before = CONFIG_WRITEBACK_OFFSET - config.offset
    covers_writeback = config.offset <= CONFIG_WRITEBACK_OFFSET < end
    if config.flags == ConfigFlag.WRITABLE:
        if not covers_writeback or len(config.data) != 1:
            raise RefusedError(
                f"config bytes {config.offset} to {end} are read-only; only writeback (byte "
                f"{CONFIG_WRITEBACK_OFFSET}) can be written"
            )
    else:
        ours = bytearray(_config_space(state)[config.offset : end])
        theirs = bytearray(config.data)
        if covers_writeback:
            ours[before] = theirs[before]
        if ours != theirs:
            raise RefusedError("the migrated config space is not that of this export")
    if not covers_writeback:
        return
    value = config.data[before]
    if value > 1:
        raise RefusedError(f"writeback can be 0 or 1, not {value}")
    if config.flags == ConfigFlag.WRITABLE:
        known = state.virtio_features if state.features_negotiated else state.offered
        if not known & VirtioFeature.BLK_CONFIG_WCE:
            raise RefusedError("writeback cannot be written without VIRTIO_BLK_F_CONFIG_WCE")
    await state.change_write_cache(value == 1)


def _config_space(state: SessionState) -> bytes:
    """What the engine has, with zeroes up to the largest access: front-ends ask for the fields
    they know, which may be more than ours."""
    known = state.features if state.features_negotiated else state.offered
    space = state.device.config_space(known & ~VirtioFeature.PROTOCOL_FEATURES)
    return space.ljust(MAX_CONFIG_BYTES, b"\0")


def _check_event_fd(vring: VringFd, fds: ReceivedFds) -> int | None:
    """The descriptor of a kick, call or error, still owned by `fds`; None if there is none.

    Only an eventfd will do: writing to anything else may block or reach what it should not.
    """
    if not vring.has_fd:
        return None
    (fd,) = fds
    kind = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - no path, a name of a kind
    if kind != "anon_inode:[eventfd]":
        raise ViolationError(
            f"the descriptor for vring {vring.index} is {kind.partition(':')[0]!r} and not an "
            "eventfd"
        )
    return fd


def _list(flags: type[VirtioFeature] | type[ProtocolFeature], bits: int) -> str:
    return ", ".join(names(flags, bits))


HANDLERS: dict[Request, Handler] = {
    Request.GET_FEATURES: get_features,
    Request.SET_FEATURES: set_features,
    Request.SET_OWNER: set_owner,
    Request.RESET_OWNER: reset_owner,
    Request.SET_MEM_TABLE: set_mem_table,
    Request.SET_VRING_NUM: set_vring_num,
    Request.SET_VRING_ADDR: set_vring_addr,
    Request.SET_VRING_BASE: set_vring_base,
    Request.GET_VRING_BASE: get_vring_base,
    Request.SET_VRING_KICK: set_vring_kick,
    Request.SET_VRING_CALL: set_vring_call,
    Request.SET_VRING_ERR: set_vring_err,
    Request.GET_PROTOCOL_FEATURES: get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: set_protocol_features,
    Request.GET_QUEUE_NUM: get_queue_num,
    Request.SET_VRING_ENABLE: set_vring_enable,
    Request.GET_CONFIG: get_config,
    Request.SET_CONFIG: set_config,
    Request.RESET_DEVICE: reset_device,
    Request.GET_MAX_MEM_SLOTS: get_max_mem_slots,
    Request.ADD_MEM_REG: add_mem_reg,
    Request.REM_MEM_REG: rem_mem_reg,
    Request.SET_STATUS: set_status,
    Request.GET_STATUS: get_status,
}
assert HANDLERS.keys() == RULES.keys()
