"""A reader of the on-disk format, written from `docs/format.md` alone.

It shares no code with the engine, so that each finds the other's defects. Parsers are pure: any
bytes are accepted, and `FormatError` is all they raise.
"""

from vhostd.storage.format.catalog import (
    CatalogCheckpoint,
    CatalogPool,
    CatalogSegment,
    CatalogSnapshot,
    CatalogVolume,
    read_catalog,
)
from vhostd.storage.format.device import (
    CATALOG_FILE,
    LOCK_FILE,
    SEGMENTS_DIRECTORY,
    SUPERBLOCK_FILE,
    Superblock,
    parse_superblock,
    segment_number_of,
    segment_path,
)
from vhostd.storage.format.errors import FormatError, Place
from vhostd.storage.format.fields import (
    BLOCK_BYTES,
    MAX_SEGMENT_BLOCKS,
    MAX_SEGMENT_NUMBER,
    MAX_VOLUME_BLOCKS,
    crc32c,
    is_zero,
)
from vhostd.storage.format.node import (
    LEAF_BLOCKS,
    ROOT_LEVEL,
    MapRun,
    Node,
    NodeLocation,
    node_span_blocks,
    parse_node,
    parse_root,
)
from vhostd.storage.format.segment import (
    KIND_LOG,
    KIND_MAP,
    MAX_DATA_BLOCKS,
    MAX_ENTRIES,
    Entry,
    Record,
    SegmentHeader,
    Summary,
    Trailer,
    parse_footer_body,
    parse_record,
    parse_segment_header,
    parse_trailer,
)

__all__ = [
    "BLOCK_BYTES",
    "CATALOG_FILE",
    "KIND_LOG",
    "KIND_MAP",
    "LEAF_BLOCKS",
    "LOCK_FILE",
    "MAX_DATA_BLOCKS",
    "MAX_ENTRIES",
    "MAX_SEGMENT_BLOCKS",
    "MAX_SEGMENT_NUMBER",
    "MAX_VOLUME_BLOCKS",
    "ROOT_LEVEL",
    "SEGMENTS_DIRECTORY",
    "SUPERBLOCK_FILE",
    "CatalogCheckpoint",
    "CatalogPool",
    "CatalogSegment",
    "CatalogSnapshot",
    "CatalogVolume",
    "Entry",
    "FormatError",
    "MapRun",
    "Node",
    "NodeLocation",
    "Place",
    "Record",
    "SegmentHeader",
    "Summary",
    "Superblock",
    "Trailer",
    "crc32c",
    "is_zero",
    "node_span_blocks",
    "parse_footer_body",
    "parse_node",
    "parse_record",
    "parse_root",
    "parse_segment_header",
    "parse_superblock",
    "parse_trailer",
    "read_catalog",
    "segment_number_of",
    "segment_path",
]
