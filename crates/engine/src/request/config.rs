//! What the device tells of itself: feature bits and configuration space (virtio 1.3, 5.2.3, 5.2.4).

use crate::ring::{F_EVENT_IDX, F_INDIRECT_DESC, F_NOTIFY_ON_EMPTY, F_VERSION_1};
use crate::types::{BLOCK_BYTES, SECTOR_BYTES};

/// Feature bits of virtio-blk (virtio 1.3, 5.2.3; GEOMETRY to MQ as numbered there).
pub const F_SIZE_MAX: u64 = 1 << 1;
pub const F_SEG_MAX: u64 = 1 << 2;
pub const F_GEOMETRY: u64 = 1 << 4;
pub const F_RO: u64 = 1 << 5;
pub const F_BLK_SIZE: u64 = 1 << 6;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_TOPOLOGY: u64 = 1 << 10;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_MQ: u64 = 1 << 12;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Data segments of one request: with header and status the 128 descriptors of the queue size
/// most front-ends default to.
pub const SEG_MAX: u32 = 126;
/// Bytes of one data segment. Together with [`SEG_MAX`] it bounds a request.
pub const SIZE_MAX_BYTES: u32 = 1 << 20;
/// Largest data of one read or write; a driver that honours both limits cannot exceed it.
pub const MAX_REQUEST_BYTES: u64 = SEG_MAX as u64 * SIZE_MAX_BYTES as u64;
/// Sectors of one discard or write-zeroes segment: 2 GiB.
pub const MAX_UNMAP_SECTORS: u32 = 1 << 22;
/// Segments of one discard or write-zeroes request.
pub const MAX_UNMAP_SEGMENTS: u32 = 32;
/// Size of `struct virtio_blk_config` with the secure-erase and zoned fields of virtio 1.3, the
/// length that current front-ends know. Fields of features that are not offered are zero.
pub const CONFIG_BYTES: usize = 96;

/// What of a disk shows in features and configuration space, and what requests are judged by.
#[derive(Debug, Clone, Copy)]
pub struct DiskShape {
    pub size_bytes: u64,
    /// 512 or 4096.
    pub logical_block_bytes: u32,
    pub read_only: bool,
    pub queues: u16,
}

/// Virtio and virtio-blk feature bits a disk offers (vhost-user's own bit 30 is not among them).
#[must_use]
pub const fn offered_features(shape: &DiskShape) -> u64 {
    let ring = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_NOTIFY_ON_EMPTY;
    let limits = F_SIZE_MAX | F_SEG_MAX | F_GEOMETRY | F_BLK_SIZE | F_TOPOLOGY;
    let commands = F_FLUSH | F_CONFIG_WCE | F_MQ | F_DISCARD | F_WRITE_ZEROES;
    ring | limits | commands | if shape.read_only { F_RO } else { 0 }
}

/// `struct virtio_blk_config`, whole and little-endian. `write_cache`: the `writeback` field.
#[must_use]
pub fn config_space(shape: &DiskShape, write_cache: bool) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put =
        |offset: usize, bytes: &[u8]| space[offset..offset + bytes.len()].copy_from_slice(bytes);
    let capacity_sectors = shape.size_bytes / SECTOR_BYTES;
    put(0, &capacity_sectors.to_le_bytes());
    put(8, &SIZE_MAX_BYTES.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    // The translation every PC firmware uses for disks it has no table for; 16383 cylinders say
    // "larger than this can express" (ATA/ATAPI-6, 6.2).
    let (heads, sectors) = (16u8, 63u8);
    let cylinders = (capacity_sectors / (u64::from(heads) * u64::from(sectors))).min(16383) as u16;
    put(16, &cylinders.to_le_bytes());
    put(18, &[heads, sectors]);
    put(20, &shape.logical_block_bytes.to_le_bytes());
    // Topology: blocks of the store are 4 KiB; exponent and sizes count logical blocks.
    let blocks = BLOCK_BYTES as u32 / shape.logical_block_bytes;
    put(24, &[blocks.trailing_zeros() as u8, 0]);
    put(26, &(blocks as u16).to_le_bytes());
    put(28, &blocks.to_le_bytes());
    put(32, &[u8::from(write_cache)]);
    put(34, &shape.queues.to_le_bytes());
    let alignment_sectors = (BLOCK_BYTES as u64 / SECTOR_BYTES) as u32;
    put(36, &MAX_UNMAP_SECTORS.to_le_bytes());
    put(40, &MAX_UNMAP_SEGMENTS.to_le_bytes());
    put(44, &alignment_sectors.to_le_bytes());
    put(48, &MAX_UNMAP_SECTORS.to_le_bytes());
    put(52, &MAX_UNMAP_SEGMENTS.to_le_bytes());
    // write_zeroes_may_unmap: zeroes are never stored.
    put(56, &[1]);
    space
}
