"""How much is measured in each mode."""

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Scale"]


@dataclass(frozen=True)
class Scale:
    name: str
    volume_bytes: int
    passes: int
    """How often the volume is written over, in bytes."""
    snapshots_a_pass: int
    keep: int
    """Snapshots that are kept; the oldest goes when one more is taken."""
    rates: tuple[int | None, ...]
    """Requests a second of each run; None: as many as there can be."""
    depth: int
    checkpoint_log: str
    """A sixteenth of the volume, as 256 MiB are of 4 GiB: dead blocks are given back once a
    checkpoint says so, and until then they are a part of what the pool takes."""
    sample_every_s: float
    settle_s: float
    """At most, after the load."""


QUICK = Scale(
    name="quick",
    volume_bytes=256 << 20,
    passes=10,
    snapshots_a_pass=4,
    keep=3,
    rates=(20_000,),
    depth=32,
    checkpoint_log="16M",
    sample_every_s=0.25,
    settle_s=15.0,
)
FULL = Scale(
    name="full",
    volume_bytes=4 << 30,
    passes=10,
    snapshots_a_pass=4,
    keep=3,
    rates=(30_000, None),
    depth=32,
    checkpoint_log="256M",
    sample_every_s=0.5,
    settle_s=60.0,
)
