"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostd.errors import UsageError
from vhostd.storage.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1024),
        ("1k", 1024),
        ("20G", 20 << 30),
        ("20GiB", 20 << 30),
        ("64T", 64 << 40),
        ("1KB", 1000),
        ("3MB", 3_000_000),
        ("2GB", 2_000_000_000),
        ("1TB", 10**12),
        ("1.5G", 3 << 29),
        (" 7 M ", 7 << 20),
        ("512B", 512),
    ],
)
def test_size_is_what_it_says(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1", "1X", "1.3", "0.1K", "1e3", "1 0", "١٢", "9" * 21, "9999999999T", "1G\0"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@given(st.integers(0, 64 << 40))
def test_bare_number_is_bytes(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes


@given(st.integers(1, 1023), st.sampled_from([0, 10, 20, 30, 40]))
def test_formatted_round_size_parses_to_itself(count: int, shift: int) -> None:
    assert parse_size(format_size(count << shift)) == count << shift


def test_odd_size_is_shown_with_two_decimals() -> None:
    assert format_size(3 * (1 << 30) // 2) == "1.50G"
