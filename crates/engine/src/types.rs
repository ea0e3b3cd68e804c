//! The words of the store as types: block numbers, addresses, sequence numbers.
//!
//! A bare `u64` says nothing of what it counts, and mixing a guest's block number with a
//! segment number loses data without a sound. Each has a type of its own here; arithmetic
//! that crosses them is written as a method with a name.

use std::fmt;

/// Unit of mapping and of checksums, in bytes.
pub const BLOCK_BYTES: usize = 4096;
/// Unit of virtio-blk's sector numbers, in bytes, whatever the logical block size
/// (virtio 1.3, 5.2.4).
pub const SECTOR_BYTES: u64 = 512;
/// Low bits of an [`Address`] that hold the block offset within the segment.
pub const ADDRESS_BLOCK_BITS: u32 = 13;
/// Largest (and default) size of a segment: what [`ADDRESS_BLOCK_BITS`] can address.
pub const MAX_SEGMENT_BYTES: u64 = (BLOCK_BYTES as u64) << ADDRESS_BLOCK_BITS;
/// Smallest segment a pool may be made with; small ones are for tests.
pub const MIN_SEGMENT_BYTES: u64 = 1 << 20;
/// Smallest segment that headers, records and footers can be laid out in. Below what any pool has, so
/// that the simulator can fill segments with a few writes.
pub const LEAST_LAYOUT_BYTES: u64 = 64 << 10;
/// Largest volume: 64 TiB.
pub const MAX_VOLUME_BYTES: u64 = 64 << 40;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl $name {
            /// The number `n` further on.
            ///
            /// # Panics
            /// On overflow, which no valid state reaches.
            #[must_use]
            pub const fn plus(self, n: u64) -> Self {
                Self(self.0.checked_add(n).expect("64-bit number overflowed"))
            }
        }
    };
}

number!(
    /// A 4 KiB block of a volume, counted from its start.
    BlockNumber
);
number!(
    /// A segment of a pool. Grows for ever, is never reused; 51 bits are usable.
    SegmentNumber
);
number!(
    /// A record's place in its volume's log; grows by one a record, never reused.
    Sequence
);
number!(
    /// Counts the openings of a volume for writing; fences off older writers.
    Epoch
);

/// Where a block lives: a segment and a block offset in it. Never changes while any root uses it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(u64);

impl Address {
    /// No address at all: lower than any.
    pub const NONE: Self = Self(0);

    /// # Panics
    /// If `block` or `segment` is outside the bits an address has for it.
    #[must_use]
    pub const fn new(segment: SegmentNumber, block: u32) -> Self {
        assert!(block < 1 << ADDRESS_BLOCK_BITS && segment.0 < 1 << (64 - ADDRESS_BLOCK_BITS));
        Self(segment.0 << ADDRESS_BLOCK_BITS | block as u64)
    }

    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    #[must_use]
    pub const fn segment(self) -> SegmentNumber {
        SegmentNumber(self.0 >> ADDRESS_BLOCK_BITS)
    }

    /// Block offset in the segment; 0 is the segment's header and never data.
    #[must_use]
    pub const fn block(self) -> u32 {
        (self.0 & ((1 << ADDRESS_BLOCK_BITS) - 1)) as u32
    }

    /// Byte offset in the segment.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.block() as u64 * BLOCK_BYTES as u64
    }

    /// The address `blocks` further on in the same segment.
    ///
    /// # Panics
    /// If that leaves the segment.
    #[must_use]
    pub const fn plus(self, blocks: u32) -> Self {
        Self::new(self.segment(), self.block() + blocks)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.segment(), self.block())
    }
}

/// A UUID as its 16 bytes in textual order (RFC 9562).
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_keeps_segment_and_block_apart_at_their_limits() {
        let last = Address::new(SegmentNumber((1 << 51) - 1), 8191);
        assert_eq!(last.segment(), SegmentNumber((1 << 51) - 1));
        assert_eq!(last.block(), 8191);
        assert_eq!(last.byte_offset(), MAX_SEGMENT_BYTES - 4096);
        assert_eq!(Address::from_bits(last.bits()), last);
    }

    #[test]
    fn uuid_prints_in_textual_order() {
        let uuid = Uuid([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(uuid.to_string(), "00010203-0405-0607-0809-0a0b0c0d0e0f");
    }
}
