"""The command `vm-images/build`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from . import debian, guest
from .cache import cached
from .packages import BuildError

__all__ = ["main"]

IMAGES: dict[str, Callable[[Path], None]] = {
    "test-guest": guest.build,
    "debian-rootfs": debian.build,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="vm-images/build", description="Builds guest images and prints their directories."
    )
    parser.add_argument("images", nargs="*", choices=[*IMAGES, []], help="default: all")
    parser.add_argument(
        "--refresh", action="store_true", help="build again, from the packages of today"
    )
    arguments = parser.parse_args()
    try:
        for name in arguments.images or IMAGES:
            print(cached(name, IMAGES[name], refresh=arguments.refresh), flush=True)
    except (BuildError, OSError) as error:
        print(f"vm-images/build: {error}", file=sys.stderr)
        return 1
    return 0
