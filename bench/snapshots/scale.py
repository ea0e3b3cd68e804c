"""How much is measured in each mode."""

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Scale"]


@dataclass(frozen=True)
class Scale:
    name: str
    # Taking a snapshot.
    volume_bytes: int
    mapped_blocks: int
    """Of the volume that is not empty, at random places."""
    create_rounds: int
    creates_a_round: int
    """Of each volume and way, but of the slow ways fewer."""
    load_s: float
    """While snapshots are taken, or not."""
    load_rate: int
    """Requests a second of that load."""
    snapshot_every_s: float
    # Reading and writing with many.
    region_bytes: int
    overwritten_blocks: int
    """Spread over the times between snapshots, at random; the same for all disks."""
    counts: tuple[int, ...]
    """Snapshots of vhostd's disks."""
    internal: tuple[int, ...]
    external: tuple[int, ...]
    load_rounds: int
    load_retries: int
    """How often a noisy run is done again."""
    seconds: float
    warm_up_s: float
    # The first write.
    first_region_bytes: int
    first_blocks: int
    first_rounds: int
    first_cycles: int
    """Snapshots a round."""


QUICK = Scale(
    name="quick",
    volume_bytes=1 << 40,
    mapped_blocks=200_000,
    create_rounds=2,
    creates_a_round=10,
    load_s=2.0,
    load_rate=5_000,
    snapshot_every_s=0.1,
    region_bytes=256 << 20,
    overwritten_blocks=8192,
    counts=(0, 10, 100),
    internal=(10,),
    external=(1, 8),
    load_rounds=1,
    load_retries=0,
    seconds=1.0,
    warm_up_s=0.3,
    first_region_bytes=1 << 30,
    first_blocks=8192,
    first_rounds=1,
    first_cycles=2,
)
FULL = Scale(
    name="full",
    volume_bytes=1 << 40,
    mapped_blocks=10_000_000,
    create_rounds=5,
    creates_a_round=20,
    load_s=5.0,
    load_rate=20_000,
    snapshot_every_s=0.1,
    region_bytes=2 << 30,
    overwritten_blocks=65536,
    counts=(0, 10, 1000),
    internal=(10, 64),
    external=(1, 8, 64),
    load_rounds=5,
    load_retries=1,
    seconds=4.0,
    warm_up_s=1.0,
    first_region_bytes=16 << 30,
    first_blocks=65536,
    first_rounds=4,
    first_cycles=3,
)
