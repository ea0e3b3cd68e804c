//! What a lookup answers: holes and mapped extents, ascending. Plain data, any thread.

use super::leaf;
use crate::types::{Address, BlockNumber};

/// Consecutive blocks of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Not mapped: reads as zeroes.
    Hole { block: BlockNumber, count: u32 },
    /// At consecutive addresses in one segment; the checksums start at `first_crc` in
    /// [`Extents::checksums`].
    Mapped {
        block: BlockNumber,
        count: u32,
        address: Address,
        first_crc: usize,
    },
}

/// The answer of [`super::Map::lookup`]; keep it to save allocations.
#[derive(Clone, Debug, Default)]
pub struct Extents {
    /// Ascending, without gaps.
    pub extents: Vec<Extent>,
    /// CRC-32C of each mapped block, ascending.
    pub checksums: Vec<u32>,
}

impl Extents {
    pub fn clear(&mut self) {
        self.extents.clear();
        self.checksums.clear();
    }

    pub(super) fn push_hole(&mut self, from: u64, to: u64) {
        if from == to {
            return;
        }
        let more = (to - from) as u32;
        if let Some(Extent::Hole { count, .. }) = self.extents.last_mut() {
            *count += more;
            return;
        }
        self.extents.push(Extent::Hole {
            block: BlockNumber(from),
            count: more,
        });
    }

    pub(super) fn push_piece(&mut self, block: u64, piece: &leaf::Piece<'_>) {
        let first_crc = self.checksums.len();
        self.checksums
            .extend(piece.crcs.iter().map(|crc| u32::from_le_bytes(*crc)));
        // Block 0 of a segment is never data: consecutive addresses are in one segment.
        match self.extents.last_mut() {
            Some(Extent::Mapped { count, address, .. })
                if address.bits() + u64::from(*count) == piece.address =>
            {
                *count += piece.len();
            }
            _ => self.extents.push(Extent::Mapped {
                block: BlockNumber(block),
                count: piece.len(),
                address: Address::from_bits(piece.address),
                first_crc,
            }),
        }
    }
}
