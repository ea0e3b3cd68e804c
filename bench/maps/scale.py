"""How much is measured in each mode."""

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Scale"]

MIB = 1 << 20


@dataclass(frozen=True)
class Scale:
    name: str
    volume_bytes: int
    """Of the volume on which writes are sparsest: one block in about 134."""
    blocks: int
    """That each fill maps, about."""
    recovery_volume_bytes: int
    log_bytes: tuple[int, ...]
    """Written since the checkpoint when the daemon is killed."""
    recovery_rounds: int
    first_reads: int
    first_read_rounds: int


QUICK = Scale(
    name="quick",
    volume_bytes=26 << 30,
    blocks=50_000,
    recovery_volume_bytes=1 << 30,
    log_bytes=(16 * MIB, 64 * MIB, 256 * MIB),
    recovery_rounds=1,
    first_reads=200,
    first_read_rounds=1,
)
FULL = Scale(
    name="full",
    volume_bytes=1 << 40,
    blocks=2_000_000,
    recovery_volume_bytes=64 << 30,
    log_bytes=(64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB),
    recovery_rounds=3,
    first_reads=2000,
    first_read_rounds=3,
)
