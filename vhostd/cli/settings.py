"""`KEY=VALUE` on the command line: `quota=20G`, `warn=80%`, `on-full=pause`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vhostd.errors import UsageError
from vhostd.storage.sizes import parse_size

__all__ = ["on_full", "parse_settings", "percent", "size_or_none"]

Parser = Callable[[str, str], Any]
"""Key and value to what the API takes; raises UsageError."""


def parse_settings(
    settings: Sequence[str], known: Mapping[str, tuple[str, Parser]]
) -> dict[str, Any]:
    """Parameters of the API for what was given. known: key to parameter and parser.

    Raises:
        UsageError: it is no KEY=VALUE, the key is unknown or given twice, or the value is wrong.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise UsageError(
                f"{setting!r} is not possible here; write KEY=VALUE with one of {', '.join(known)}"
            )
        parameter, parse = known[key]
        if parameter in found:
            raise UsageError(f"{key} is given twice; give it once")
        found[parameter] = parse(key, value)
    return found


def size_or_none(key: str, text: str) -> int | None:
    """A size, or `none`."""
    if text == "none":
        return None
    size_bytes = parse_size(text)
    if size_bytes == 0:
        raise UsageError(f"{key}=0 leaves nothing; write {key}=none to take it away")
    return size_bytes


def percent(key: str, text: str) -> int:
    """1 to 100, with or without a percent sign."""
    number = text.removesuffix("%")
    if not (number.isascii() and number.isdigit() and 1 <= int(number[:4]) <= 100):
        raise UsageError(f"{key}={text} is not possible; write 1% to 100%")
    return int(number)


def on_full(key: str, text: str) -> str:
    """`ioerr` or `pause`."""
    if text not in ("ioerr", "pause"):
        raise UsageError(f"{key}={text} is not possible; write {key}=ioerr or {key}=pause")
    return text
