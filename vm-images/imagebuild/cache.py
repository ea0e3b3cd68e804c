"""Where built images are kept.

Invariants:
- A directory in the cache is whole: it is built beside its place and renamed into it.
- Its name holds a hash of the recipe (every file under vm-images/), so a changed recipe is a
  different image, and a cache can be shared by several checkouts.
- One build of an image runs at a time; others wait for it and then find it done.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["RECIPES", "cache_dir", "cached", "locked"]

RECIPES = Path(__file__).resolve().parent.parent
"""The folder vm-images/."""


def cache_dir() -> Path:
    """`$VHOSTD_IMAGE_CACHE`, or vhostd-images in the user's cache directory."""
    chosen = os.environ.get("VHOSTD_IMAGE_CACHE")
    if chosen:
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vhostd-images"


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the lock of that name, waiting for whoever has it."""
    directory = cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def recipe_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(RECIPES.rglob("*")):
        if path.is_file() and path.suffix != ".pyc" and path.name != "README.md":
            digest.update(str(path.relative_to(RECIPES)).encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cached(name: str, build: Callable[[Path], None], *, refresh: bool = False) -> Path:
    """The directory of an image, built by `build(empty directory)` if it is not there yet.

    refresh: build it again (to take newer packages) even if it is there. Older versions of the same
    image are removed when a new one is in place.
    """
    with locked(name):
        place = cache_dir() / f"{name}-{recipe_hash()}"
        if place.is_dir() and not refresh:
            return place
        workshop = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache_dir()))
        try:
            result = workshop / "result"
            result.mkdir()
            build(result)
            for stale in cache_dir().glob(f"{name}-*"):
                shutil.rmtree(stale)
            result.rename(place)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
        return place
