"""Payloads are decoded exactly or not at all.

`VHOSTD_FUZZ_CASES` sets the number of random cases of each test; hypothesis prints how to repeat a
failure (`--hypothesis-seed` sets the seed).
"""

from __future__ import annotations

import os
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostd.protocol.features import ProtocolFeature, VirtioFeature, names
from vhostd.protocol.handlers import HANDLERS
from vhostd.protocol.messages import (
    MAX_FDS,
    MAX_PAYLOAD_BYTES,
    RULES,
    Config,
    Header,
    HeaderFlag,
    MemoryTableDescription,
    RegionDescription,
    Request,
    SingleRegion,
    ViolationError,
    VringAddress,
    VringFd,
    VringState,
    decode_u64,
    encode_message,
    encode_u64,
    request_name,
)

CASES = int(os.environ.get("VHOSTD_FUZZ_CASES", "500"))
fuzz = settings(max_examples=CASES, deadline=None, database=None, print_blob=True)

U8 = st.integers(0, 0xFF)
U32 = st.integers(0, 0xFFFF_FFFF)
U64 = st.integers(0, 0xFFFF_FFFF_FFFF_FFFF)
REGIONS = st.builds(RegionDescription, U64, U64, U64, U64)
PAYLOADS = st.one_of(
    st.builds(VringState, U32, U32),
    st.builds(VringAddress, U32, U32, U64, U64, U64, U64),
    st.builds(VringFd, U8, st.booleans()),
    st.builds(MemoryTableDescription, st.lists(REGIONS, max_size=8).map(tuple)),
    st.builds(SingleRegion, REGIONS),
    st.builds(Config, U32, U32, st.binary(max_size=300)),
)


@fuzz
@given(PAYLOADS)
def test_a_payload_decodes_to_what_was_encoded(
    payload: VringState | VringAddress | VringFd | MemoryTableDescription | SingleRegion | Config,
) -> None:
    assert type(payload).decode(payload.encode()) == payload


@fuzz
@given(PAYLOADS, st.data())
def test_a_payload_cut_short_or_long_is_a_violation(
    payload: VringState | VringAddress | VringFd | MemoryTableDescription | SingleRegion | Config,
    data: st.DataObject,
) -> None:
    encoded = payload.encode()
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ViolationError):
        type(payload).decode(encoded[:cut])
    with pytest.raises(ViolationError):
        type(payload).decode(encoded + b"\0")


@fuzz
@given(st.sampled_from(sorted(RULES)), st.binary(max_size=400), st.integers(0, MAX_FDS))
def test_any_bytes_decode_or_are_a_violation(request: Request, data: bytes, fds: int) -> None:
    rule = RULES[request]
    try:
        payload = rule.decode(data)
        rule.check_fds(payload, fds)
    except ViolationError:
        return
    assert fds <= rule.max_fds
    if payload is not None and not isinstance(payload, int):
        # Nothing of what came was ignored.
        assert len(payload.encode()) == len(data)


@fuzz
@given(st.binary(min_size=12, max_size=12))
def test_any_header_decodes_or_is_a_violation(data: bytes) -> None:
    try:
        header = Header.decode(data)
    except ViolationError:
        return
    assert header.size_bytes <= MAX_PAYLOAD_BYTES
    assert header.encode() == data


def test_header_is_laid_out_as_the_specification_says() -> None:
    message = encode_message(Request.SET_FEATURES, encode_u64(5), flags=HeaderFlag.NEED_REPLY)
    assert message == bytes.fromhex("02000000 09000000 08000000 0500000000000000")
    assert Header.decode(message[:12]).need_reply
    assert decode_u64(message[12:]) == 5


def test_vring_address_is_laid_out_as_the_specification_says() -> None:
    layout = [f.name for f in fields(VringAddress)]
    assert layout == ["index", "flags", "descriptor", "used", "available", "log"]
    assert VringAddress(1, 2, 3, 4, 5, 6).encode().hex() == (
        "01000000020000000300000000000000040000000000000005000000000000000600000000000000"
    )


def test_memory_region_is_laid_out_as_the_specification_says() -> None:
    one = RegionDescription(guest_address=1, size_bytes=2, user_address=3, mmap_offset=4)
    body = bytes.fromhex("0100000000000000 0200000000000000 0300000000000000 0400000000000000")
    assert MemoryTableDescription((one,)).encode() == bytes.fromhex("01000000 00000000") + body
    assert SingleRegion(one).encode() == bytes(8) + body


def test_config_access_is_laid_out_as_the_specification_says() -> None:
    access = Config(offset=32, flags=1, data=b"\x01")
    assert access.encode() == bytes.fromhex("20000000 01000000 01000000 01")


def test_every_rule_has_a_handler_and_every_handler_a_rule() -> None:
    assert HANDLERS.keys() == RULES.keys()


def test_bits_and_requests_have_the_names_people_look_for() -> None:
    assert names(VirtioFeature, 1 << 30 | 1 << 9 | 1 << 63) == [
        "BLK_FLUSH",
        "PROTOCOL_FEATURES",
        "bit 63",
    ]
    assert names(ProtocolFeature, 0) == []
    assert request_name(34) == "RESET_DEVICE"
    assert request_name(99) == "request 99"
