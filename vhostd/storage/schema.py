"""The catalog's SQLite schema, version 2. `docs/format.md`, "Catalog", describes it.

The tables are STRICT and the CHECKs repeat what the code promises, so that a defect or a foreign
hand is refused by SQLite itself. A snapshot that a clone or another snapshot needs cannot be
deleted: foreign keys have no cascade there.
"""

from __future__ import annotations

__all__ = ["APPLICATION_ID", "SCHEMA", "SCHEMA_VERSION"]

SCHEMA_VERSION = 2
APPLICATION_ID = 0x56484344  # "VHCD"

SCHEMA = """
CREATE TABLE pool (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    uuid BLOB NOT NULL CHECK (length(uuid) = 16),
    name TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 128),
    segment_bytes INTEGER NOT NULL CHECK (segment_bytes BETWEEN 1048576 AND 33554432),
    next_segment INTEGER NOT NULL CHECK (next_segment BETWEEN 1 AND 2251799813685248),
    created_ns INTEGER NOT NULL,
    quota_bytes INTEGER CHECK (quota_bytes > 0),
    warn_percent INTEGER NOT NULL DEFAULT 80 CHECK (warn_percent BETWEEN 1 AND 100)
) STRICT;

CREATE TABLE devices (
    uuid BLOB PRIMARY KEY CHECK (length(uuid) = 16),
    state TEXT NOT NULL CHECK (state IN ('online')),
    added_ns INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE volumes (
    id INTEGER PRIMARY KEY,
    uuid BLOB NOT NULL UNIQUE CHECK (length(uuid) = 16),
    name TEXT NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 128),
    size_bytes INTEGER NOT NULL CHECK (size_bytes BETWEEN 512 AND 70368744177664),
    logical_block_bytes INTEGER NOT NULL CHECK (logical_block_bytes IN (512, 4096)),
    serial TEXT NOT NULL CHECK (length(serial) <= 20),
    epoch INTEGER NOT NULL CHECK (epoch >= 0),
    state TEXT NOT NULL CHECK (state IN ('present', 'removing')),
    created_ns INTEGER NOT NULL,
    parent INTEGER REFERENCES snapshots (id),
    origin INTEGER REFERENCES snapshots (id),
    flattened_position INTEGER CHECK (flattened_position IS NULL OR origin IS NOT NULL),
    quota_bytes INTEGER CHECK (quota_bytes > 0),
    reservation_bytes INTEGER CHECK (reservation_bytes > 0),
    on_full TEXT NOT NULL DEFAULT 'ioerr' CHECK (on_full IN ('ioerr', 'pause')),
    state_noted INTEGER NOT NULL DEFAULT 0 CHECK (state_noted IN (0, 1)),
    CHECK (size_bytes % logical_block_bytes = 0)
) STRICT;

CREATE INDEX volumes_of_parent ON volumes (parent);
CREATE INDEX volumes_of_origin ON volumes (origin);

CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY,
    uuid BLOB NOT NULL UNIQUE CHECK (length(uuid) = 16),
    volume INTEGER NOT NULL REFERENCES volumes (id) ON DELETE CASCADE,
    name TEXT CHECK (length(name) BETWEEN 1 AND 128),
    guid BLOB NOT NULL CHECK (length(guid) = 16),
    parent INTEGER REFERENCES snapshots (id),
    position INTEGER NOT NULL CHECK (position > 0),
    size_bytes INTEGER NOT NULL CHECK (size_bytes BETWEEN 512 AND 70368744177664),
    state TEXT NOT NULL CHECK (state IN ('pending', 'present', 'removing')),
    root BLOB,
    mapped_blocks INTEGER NOT NULL CHECK (mapped_blocks >= 0),
    protected INTEGER NOT NULL DEFAULT 0 CHECK (protected IN (0, 1)),
    quiesced INTEGER NOT NULL DEFAULT 0 CHECK (quiesced IN (0, 1)),
    created_ns INTEGER NOT NULL,
    UNIQUE (volume, name),
    CHECK ((name IS NULL) = (state = 'removing')),
    CHECK (state != 'removing' OR protected = 0),
    CHECK (state != 'pending' OR root IS NULL),
    CHECK (state != 'present' OR root IS NOT NULL),
    CHECK (mapped_blocks = 0 OR length(root) > 0)
) STRICT;

CREATE INDEX snapshots_of_parent ON snapshots (parent);
CREATE INDEX snapshots_in_order ON snapshots (volume, position);

CREATE TABLE rollbacks (
    volume INTEGER NOT NULL REFERENCES volumes (id) ON DELETE CASCADE,
    position INTEGER NOT NULL CHECK (position > 0),
    to_position INTEGER NOT NULL CHECK (to_position > 0 AND to_position < position),
    PRIMARY KEY (volume, position)
) STRICT, WITHOUT ROWID;

CREATE TABLE checkpoints (
    volume INTEGER PRIMARY KEY REFERENCES volumes (id) ON DELETE CASCADE,
    root BLOB NOT NULL,
    segment INTEGER NOT NULL CHECK (segment >= 0),
    end_block INTEGER NOT NULL CHECK (end_block >= 0),
    sequence INTEGER NOT NULL CHECK (sequence >= 0),
    record_checksum INTEGER NOT NULL CHECK (record_checksum BETWEEN 0 AND 4294967295),
    mapped_blocks INTEGER NOT NULL CHECK (mapped_blocks >= 0),
    epoch INTEGER NOT NULL CHECK (epoch >= 0),
    committed_ns INTEGER NOT NULL
) STRICT;

CREATE TABLE segments (
    number INTEGER PRIMARY KEY CHECK (number BETWEEN 1 AND 2251799813685247),
    volume INTEGER NOT NULL REFERENCES volumes (id) ON DELETE CASCADE,
    kind INTEGER NOT NULL CHECK (kind IN (1, 2)),
    sealed INTEGER NOT NULL CHECK (sealed IN (0, 1)),
    used_blocks INTEGER NOT NULL CHECK (used_blocks BETWEEN 0 AND 8192),
    live INTEGER NOT NULL CHECK (live >= 0),
    dead BLOB NOT NULL DEFAULT x'',
    punched_blocks INTEGER NOT NULL DEFAULT 0 CHECK (punched_blocks BETWEEN 0 AND 8192),
    notes INTEGER NOT NULL DEFAULT 0 CHECK (notes >= 0),
    unmaps INTEGER NOT NULL DEFAULT 0 CHECK (unmaps >= 0)
) STRICT;

CREATE INDEX segments_of_volume ON segments (volume);
"""
