//! virtio-blk requests (virtio 1.3, 5.2): from a checked chain to what is asked of the volume, and
//! from the volume's answer to a status byte.
//!
//! Invariants:
//! - The header and discard segments are copied once and judged from the copy.
//! - Every range that leaves here lies inside the volume, in whole sectors.
//! - A request that makes no sense costs only itself: it ends with a status, or, if it has no
//!   room for one, with nothing written.
//!
//! Pure functions over a chain; no ring index is touched here. Any thread.

mod config;
mod parse;

#[cfg(test)]
mod tests;

pub use config::{
    CONFIG_BYTES, DiskShape, F_BLK_SIZE, F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_GEOMETRY, F_MQ, F_RO,
    F_SEG_MAX, F_SIZE_MAX, F_TOPOLOGY, F_WRITE_ZEROES, MAX_REQUEST_BYTES, MAX_UNMAP_SECTORS,
    MAX_UNMAP_SEGMENTS, SEG_MAX, SIZE_MAX_BYTES, config_space, offered_features,
};
pub use parse::{Action, ID_BYTES, Parsed, Range, Reply, Status, parse};
