"""What is measured: loads (cells) and modes."""

from dataclasses import dataclass

__all__ = ["CELLS", "FIRST_WRITE", "FULL", "QUICK", "Cell", "Mode"]


@dataclass(frozen=True)
class Cell:
    """One column of the comparison."""

    name: str
    workload: str
    block: str
    depth: int
    title: str
    reads: bool = False
    thin: bool = False
    """On a new disk that was never written, instead of one filled before."""

    def arguments(self) -> list[str]:
        return ["--workload", self.workload, "--block", self.block, "--depth", str(self.depth)]


CELLS = [
    Cell("rd-qd1", "randread", "4K", 1, "4 KiB random read, depth 1", reads=True),
    Cell("rd-qd32", "randread", "4K", 32, "4 KiB random read, depth 32", reads=True),
    Cell("wr-qd1", "randwrite", "4K", 1, "4 KiB random write, depth 1"),
    Cell("wr-qd32", "randwrite", "4K", 32, "4 KiB random write, depth 32"),
    Cell("seqrd-qd8", "seqread", "128K", 8, "128 KiB sequential read, depth 8", reads=True),
    Cell("seqwr-qd8", "seqwrite", "128K", 8, "128 KiB sequential write, depth 8"),
    Cell("wrflush-qd1", "writeflush", "4K", 1, "4 KiB write + flush, depth 1"),
]
FIRST_WRITE = Cell(
    "first-qd32", "firstwrite", "4K", 32, "4 KiB first write, thin, depth 32", thin=True
)


@dataclass(frozen=True)
class Mode:
    name: str
    cells: list[Cell]
    repeats: int
    seconds: float
    warm_up_s: float
    region_bytes: int
    retries: int = 0
    """How often a noisy run is done again."""


QUICK = Mode("quick", CELLS, repeats=1, seconds=1.0, warm_up_s=0.3, region_bytes=512 << 20)
FULL = Mode(
    "full",
    [*CELLS, FIRST_WRITE],
    repeats=5,
    seconds=4.0,
    warm_up_s=1.0,
    region_bytes=2 << 30,
    retries=1,
)
