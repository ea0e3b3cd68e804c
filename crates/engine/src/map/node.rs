//! Bytes of map nodes, as docs/format.md ("Map node") describes them. No state, no I/O.
//!
//! Parsing never panics, and what it accepts keeps the invariants of `leaf` and `inner`.

use super::inner::{FAN_OUT, Inner, Slot};
use super::leaf::{Form, LEAF_BLOCKS, Leaf};
use super::slab::Body;
use super::{NodeLocation, ROOT_LEVEL, SegmentNumber};
use crate::crc::crc32c;
use crate::types::{ADDRESS_BLOCK_BITS, BlockNumber, MAX_SEGMENT_BYTES};

const MAGIC: [u8; 4] = *b"VHMN";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 40;
const CHECKSUM_AT: usize = 20;
const BITMAP_BYTES: usize = FAN_OUT / 8;
/// On disk, in an inner node.
pub(super) const LOCATION_BYTES: usize = 20;
/// Longest node: a dense leaf with 8-byte addresses.
pub(super) const MAX_NODE_BYTES: u32 = HEADER_BYTES as u32 + LEAF_BLOCKS * 12;
/// Shortest node: one mapped block, padded.
const MIN_NODE_BYTES: u32 = 56;

const _: () = assert!(
    MAX_NODE_BYTES as usize >= HEADER_BYTES + BITMAP_BYTES + FAN_OUT * LOCATION_BYTES
        && MAX_NODE_BYTES.is_multiple_of(8)
);

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at + 4)) << 32 | u64::from(u32_at(bytes, at))
}

pub(super) fn put_location(location: &NodeLocation, out: &mut Vec<u8>) {
    out.extend_from_slice(&location.segment.0.to_le_bytes());
    out.extend_from_slice(&location.offset_bytes.to_le_bytes());
    out.extend_from_slice(&location.len_bytes.to_le_bytes());
    out.extend_from_slice(&location.checksum.to_le_bytes());
}

/// A location out of its 20 bytes, if a node can be there.
pub(super) fn get_location(bytes: &[u8]) -> Option<NodeLocation> {
    let location = NodeLocation {
        segment: SegmentNumber(u64_at(bytes, 0)),
        offset_bytes: u32_at(bytes, 8),
        len_bytes: u32_at(bytes, 12),
        checksum: u32_at(bytes, 16),
    };
    let end = u64::from(location.offset_bytes) + u64::from(location.len_bytes);
    let valid = (1..1 << (64 - ADDRESS_BLOCK_BITS)).contains(&location.segment.0)
        && location.offset_bytes.is_multiple_of(8)
        && location.len_bytes.is_multiple_of(8)
        && (MIN_NODE_BYTES..=MAX_NODE_BYTES).contains(&location.len_bytes)
        && end <= MAX_SEGMENT_BYTES;
    valid.then_some(location)
}

/// Length on disk, padding included.
pub(super) fn node_bytes(body: &Body) -> usize {
    let payload = match body {
        Body::Leaf(leaf) => leaf.table_bytes().len(),
        Body::Inner(inner) => BITMAP_BYTES + inner.slots().len() * LOCATION_BYTES,
        Body::Free => unreachable!("a freed node has no bytes"),
    };
    (HEADER_BYTES + payload).next_multiple_of(8)
}

/// Appends the node and returns its length and checksum.
///
/// # Panics
/// If a child of an inner node has no location: children are written before their parents.
pub(super) fn put_node(body: &Body, level: u8, first_block: u64, out: &mut Vec<u8>) -> (u32, u32) {
    let start = out.len();
    let len = node_bytes(body);
    out.resize(start + HEADER_BYTES, 0);
    let (form, width, entries, rows, base) = match body {
        Body::Leaf(leaf) => (
            leaf.form() as u8,
            leaf.width(),
            leaf.mapped() as usize,
            leaf.rows(),
            leaf.base(),
        ),
        Body::Inner(inner) => (0, 0, inner.slots().len(), 0, 0),
        Body::Free => unreachable!("a freed node has no bytes"),
    };
    let header = &mut out[start..];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&VERSION.to_le_bytes());
    header[6] = level;
    header[7] = form;
    header[8..16].copy_from_slice(&first_block.to_le_bytes());
    header[16..20].copy_from_slice(&(len as u32).to_le_bytes());
    header[24..26].copy_from_slice(&(entries as u16).to_le_bytes());
    header[26..28].copy_from_slice(&(rows as u16).to_le_bytes());
    header[28] = width as u8;
    header[32..40].copy_from_slice(&base.to_le_bytes());
    match body {
        Body::Leaf(leaf) => out.extend_from_slice(leaf.table_bytes()),
        Body::Inner(inner) => {
            for word in inner.bitmap() {
                out.extend_from_slice(&word.to_le_bytes());
            }
            for slot in inner.slots() {
                let location = slot
                    .location()
                    .expect("a child is written before its parent");
                put_location(&location, out);
            }
        }
        Body::Free => {}
    }
    out.resize(start + len, 0);
    let checksum = crc32c(&out[start..]);
    out[start + CHECKSUM_AT..start + CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
    (len as u32, checksum)
}

/// The node that stands at `location`, or what is wrong with the bytes read from there.
pub(super) fn get_node(
    location: &NodeLocation,
    level: u8,
    first_block: u64,
    bytes: &[u8],
) -> Result<Body, &'static str> {
    if bytes.len() != location.len_bytes as usize || bytes.len() < HEADER_BYTES {
        return Err("the read was short");
    }
    if bytes[..4] != MAGIC {
        return Err("there is no map node here");
    }
    if u16_at(bytes, 4) != VERSION {
        return Err("its version is not known here; a newer vhostd wrote it");
    }
    if u32_at(bytes, 16) != location.len_bytes {
        return Err("its length is not the one its parent has");
    }
    let stored = u32_at(bytes, CHECKSUM_AT);
    if stored != location.checksum || checksum_of(bytes) != stored {
        return Err("its checksum does not match");
    }
    if bytes[6] != level || level > ROOT_LEVEL || u64_at(bytes, 8) != first_block {
        return Err("it is the node of other blocks");
    }
    let entries = usize::from(u16_at(bytes, 24));
    let rows = usize::from(u16_at(bytes, 26));
    let (form, width) = (bytes[7], usize::from(bytes[28]));
    let payload = &bytes[HEADER_BYTES..];
    let body = if level == 0 {
        let tables = match form {
            f if f == Form::Sparse as u8 => entries * (6 + width),
            f if f == Form::Runs as u8 => entries * 4 + rows * (4 + width),
            _ => rows * (4 + width),
        };
        let tables = payload
            .get(..tables)
            .ok_or("its length does not fit its counts")?;
        Body::Leaf(Leaf::decode(
            form,
            width,
            entries,
            rows,
            u64_at(bytes, 32),
            tables,
        )?)
    } else {
        if form != 0 || !(1..=FAN_OUT).contains(&entries) {
            return Err("its form or its count of children is out of range");
        }
        let list = payload
            .get(BITMAP_BYTES..BITMAP_BYTES + entries * LOCATION_BYTES)
            .ok_or("its length does not fit its counts")?;
        let bitmap = std::array::from_fn(|word| u64_at(payload, 8 * word));
        if bitmap.iter().map(|word| word.count_ones()).sum::<u32>() as usize != entries {
            return Err("its count of children is wrong");
        }
        let mut slots = Vec::with_capacity(entries);
        for bytes in list.chunks_exact(LOCATION_BYTES) {
            let location = get_location(bytes).ok_or("the place of a child is out of range")?;
            slots.push(Slot::on_disk(location));
        }
        Body::Inner(Box::new(Inner::from_parts(bitmap, slots)))
    };
    if node_bytes(&body) != bytes.len() {
        return Err("its length does not fit its counts");
    }
    Ok(body)
}

/// What a node says of itself, for going through a map segment without a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeHead {
    pub level: u8,
    pub first_block: BlockNumber,
    pub len_bytes: u32,
    pub checksum: u32,
}

impl NodeHead {
    /// The head of the node whose bytes begin here, if one does. Nothing is verified but its form:
    /// compare it with the tree.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < HEADER_BYTES || bytes[..4] != MAGIC {
            return None;
        }
        let len_bytes = u32_at(bytes, 16);
        let fits =
            len_bytes.is_multiple_of(8) && (MIN_NODE_BYTES..=MAX_NODE_BYTES).contains(&len_bytes);
        fits.then(|| Self {
            level: bytes[6],
            first_block: BlockNumber(u64_at(bytes, 8)),
            len_bytes,
            checksum: u32_at(bytes, CHECKSUM_AT),
        })
    }
}

fn checksum_of(bytes: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&bytes[..CHECKSUM_AT]);
    digest.update(&[0; 4]);
    digest.update(&bytes[CHECKSUM_AT + 4..]);
    digest.finalize() as u32
}
