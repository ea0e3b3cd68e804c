"""Names of pools and volumes."""

from __future__ import annotations

import pytest

from vhostd.errors import UsageError
from vhostd.storage.names import NAME_MAX_CHARS, check_name, parse_volume


@pytest.mark.parametrize("name", ["a", "web-1", "0", "A.b_c", "x" * NAME_MAX_CHARS])
def test_good_name_is_returned(name: str) -> None:
    assert check_name(name, "volume") == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "empty"),
        ("a/b", "slash"),
        ("a@b", "snapshot"),
        ("x" * (NAME_MAX_CHARS + 1), "129 characters"),
        (".hidden", "first a letter or digit"),
        ("-x", "first a letter or digit"),
        ("ä", "letters"),
        ("a\n", "letters"),
        ("a b", "letters"),
        ("..", "letters"),
    ],
)
def test_bad_name_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        check_name(name, "volume")


def test_volume_name_is_taken_apart() -> None:
    name = parse_volume("fast/web1")
    assert (name.pool, name.volume, str(name)) == ("fast", "web1", "fast/web1")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("web1", "POOL/VOLUME"),
        ("", "POOL/VOLUME"),
        ("a/b/c", "more than one slash"),
        ("a/b@c", "snapshot"),
        ("/b", "empty"),
        ("a/", "empty"),
    ],
)
def test_bad_volume_name_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_volume(text)
