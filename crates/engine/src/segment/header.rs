//! A segment's first block.

use super::{
    FormatError, VERSION, array, check_block, checksum_without, get_u16, get_u32, get_u64, put,
};
use crate::types::{
    ADDRESS_BLOCK_BITS, BLOCK_BYTES, Epoch, LEAST_LAYOUT_BYTES, MAX_SEGMENT_BYTES, SegmentNumber,
    Uuid,
};

const MAGIC: &[u8; 4] = b"VHSG";
const WHAT: &str = "segment header";
const CHECKSUM_AT: usize = 64;
const NAME_AT: usize = 90;

/// What a segment is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    Log = 1,
    Map = 2,
}

impl SegmentKind {
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Log),
            2 => Some(Self::Map),
            _ => None,
        }
    }
}

/// A segment header, parsed. Volume attributes are those of the moment the segment was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    pub kind: SegmentKind,
    pub pool: Uuid,
    pub volume: Uuid,
    pub number: SegmentNumber,
    pub epoch: Epoch,
    pub segment_bytes: u64,
    pub logical_block_bytes: u32,
    pub volume_bytes: u64,
    pub created_ns: u64,
    pub volume_name: String,
}

impl SegmentHeader {
    /// Writes the header over `block`.
    ///
    /// # Panics
    /// If `block` is not one block long or the name is not 1 to 255 bytes.
    pub fn encode(&self, block: &mut [u8]) {
        assert_eq!(block.len(), BLOCK_BYTES, "a segment header is one block");
        assert!(
            (1..=255).contains(&self.volume_name.len()),
            "a name has 1 to 255 bytes"
        );
        block.fill(0);
        put(block, 0, MAGIC);
        put(block, 4, &VERSION.to_le_bytes());
        block[6] = self.kind as u8;
        put(block, 8, &self.pool.0);
        put(block, 24, &self.volume.0);
        put(block, 40, &self.number.0.to_le_bytes());
        put(block, 48, &self.epoch.0.to_le_bytes());
        put(block, 56, &self.segment_bytes.to_le_bytes());
        put(block, 68, &self.logical_block_bytes.to_le_bytes());
        put(block, 72, &self.volume_bytes.to_le_bytes());
        put(block, 80, &self.created_ns.to_le_bytes());
        put(block, 88, &(self.volume_name.len() as u16).to_le_bytes());
        put(block, NAME_AT, self.volume_name.as_bytes());
        let checksum = checksum_without(block, CHECKSUM_AT);
        put(block, CHECKSUM_AT, &checksum.to_le_bytes());
    }

    /// # Errors
    /// [`FormatError`] if `block` is not a segment header of this version.
    pub fn parse(block: &[u8]) -> Result<Self, FormatError> {
        check_block(block, MAGIC, WHAT, CHECKSUM_AT)?;
        let wrong = |field| FormatError::Field {
            structure: WHAT,
            field,
        };
        let kind = SegmentKind::from_byte(block[6]).ok_or(wrong("kind"))?;
        let number = get_u64(block, 40);
        if number >> (64 - ADDRESS_BLOCK_BITS) != 0 {
            return Err(wrong("segment number"));
        }
        let segment_bytes = get_u64(block, 56);
        if !segment_bytes.is_power_of_two()
            || !(LEAST_LAYOUT_BYTES..=MAX_SEGMENT_BYTES).contains(&segment_bytes)
        {
            return Err(wrong("segment_bytes"));
        }
        let name_len = usize::from(get_u16(block, 88));
        if !(1..=255).contains(&name_len) {
            return Err(wrong("name length"));
        }
        let volume_name = std::str::from_utf8(&block[NAME_AT..NAME_AT + name_len])
            .map_err(|_| wrong("name"))?
            .to_owned();
        Ok(Self {
            kind,
            pool: Uuid(array(block, 8)),
            volume: Uuid(array(block, 24)),
            number: SegmentNumber(number),
            epoch: Epoch(get_u64(block, 48)),
            segment_bytes,
            logical_block_bytes: get_u32(block, 68),
            volume_bytes: get_u64(block, 72),
            created_ns: get_u64(block, 80),
            volume_name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> SegmentHeader {
        SegmentHeader {
            kind: SegmentKind::Map,
            pool: Uuid([1; 16]),
            volume: Uuid([2; 16]),
            number: SegmentNumber(77),
            epoch: Epoch(3),
            segment_bytes: 32 << 20,
            logical_block_bytes: 512,
            volume_bytes: 64 << 40,
            created_ns: 5,
            volume_name: "größe".into(),
        }
    }

    #[test]
    fn header_survives_a_round_trip() {
        let mut block = vec![0xff; BLOCK_BYTES];
        example().encode(&mut block);
        assert_eq!(SegmentHeader::parse(&block), Ok(example()));
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed() {
        let mut block = vec![0; BLOCK_BYTES];
        example().encode(&mut block);
        for bit in 0..BLOCK_BYTES * 8 {
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::parse(&block).is_err(), "bit {bit}");
            block[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
