//! A device's superblock: which pool and device this is. `docs/format.md` is the specification.
//!
//! No I/O here. What is parsed comes from a disk and may be anything.

use crate::segment::{FormatError, array, check_block_of, checksum_without, get_u16, get_u64, put};
use crate::types::{BLOCK_BYTES, MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES, Uuid};

const MAGIC: &[u8; 4] = b"VHSB";
const WHAT: &str = "superblock";
/// Pools of version 1 had a catalog without snapshots and were never released.
const VERSION: u16 = 2;
const CHECKSUM_AT: usize = 56;
const NAME_LENGTH_AT: usize = 60;
const NAME_AT: usize = 64;
const MAX_NAME_BYTES: usize = 255;

/// A superblock, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub pool: Uuid,
    pub device: Uuid,
    /// A power of two, 1 MiB to 32 MiB.
    pub segment_bytes: u64,
    /// Realtime clock, since the epoch.
    pub created_ns: u64,
    /// 1 to 255 bytes of UTF-8.
    pub pool_name: String,
}

impl Superblock {
    /// # Errors
    /// The field that is outside its range.
    pub fn check(&self) -> Result<(), FormatError> {
        let wrong = |field| {
            Err(FormatError::Field {
                structure: WHAT,
                field,
            })
        };
        if !self.segment_bytes.is_power_of_two()
            || !(MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&self.segment_bytes)
        {
            return wrong("segment_bytes");
        }
        if !(1..=MAX_NAME_BYTES).contains(&self.pool_name.len()) {
            return wrong("pool name length");
        }
        Ok(())
    }

    /// Writes the superblock over `block`.
    ///
    /// # Errors
    /// As [`Self::check`].
    ///
    /// # Panics
    /// If `block` is not one block long.
    pub fn encode(&self, block: &mut [u8]) -> Result<(), FormatError> {
        assert_eq!(block.len(), BLOCK_BYTES, "a superblock is one block");
        self.check()?;
        block.fill(0);
        put(block, 0, MAGIC);
        put(block, 4, &VERSION.to_le_bytes());
        put(block, 8, &self.pool.0);
        put(block, 24, &self.device.0);
        put(block, 40, &self.segment_bytes.to_le_bytes());
        put(block, 48, &self.created_ns.to_le_bytes());
        let name = self.pool_name.as_bytes();
        put(block, NAME_LENGTH_AT, &(name.len() as u16).to_le_bytes());
        put(block, NAME_AT, name);
        let checksum = checksum_without(block, CHECKSUM_AT);
        put(block, CHECKSUM_AT, &checksum.to_le_bytes());
        Ok(())
    }

    /// # Errors
    /// [`FormatError`] if `block` is not a superblock of this version.
    pub fn parse(block: &[u8]) -> Result<Self, FormatError> {
        check_block_of(block, MAGIC, WHAT, CHECKSUM_AT, VERSION)?;
        let name_bytes = usize::from(get_u16(block, NAME_LENGTH_AT));
        if name_bytes > MAX_NAME_BYTES {
            return Err(FormatError::Field {
                structure: WHAT,
                field: "pool name length",
            });
        }
        let pool_name = std::str::from_utf8(&block[NAME_AT..NAME_AT + name_bytes])
            .map_err(|_| FormatError::Field {
                structure: WHAT,
                field: "pool name",
            })?
            .to_owned();
        let superblock = Self {
            pool: Uuid(array(block, 8)),
            device: Uuid(array(block, 24)),
            segment_bytes: get_u64(block, 40),
            created_ns: get_u64(block, 48),
            pool_name,
        };
        superblock.check()?;
        Ok(superblock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Superblock {
        Superblock {
            pool: Uuid([1; 16]),
            device: Uuid([2; 16]),
            segment_bytes: 1 << 20,
            created_ns: 3,
            pool_name: "n".repeat(255),
        }
    }

    #[test]
    fn superblock_survives_a_round_trip() {
        let mut block = vec![0xff; BLOCK_BYTES];
        example().encode(&mut block).unwrap();
        assert_eq!(Superblock::parse(&block), Ok(example()));
        assert_eq!(&block[..4], b"VHSB");
        assert_eq!(block[60..64], [255, 0, 0, 0]);
        assert!(block[64 + 255..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn every_flipped_bit_of_a_superblock_is_noticed() {
        let mut block = vec![0; BLOCK_BYTES];
        example().encode(&mut block).unwrap();
        for bit in 0..BLOCK_BYTES * 8 {
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::parse(&block).is_err(), "bit {bit}");
            block[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn fields_out_of_range_are_refused_even_with_a_right_checksum() {
        for (at, bytes) in [
            (40, &3u64.to_le_bytes()[..]),
            (40, &(64u64 << 20).to_le_bytes()[..]),
            (60, &0u16.to_le_bytes()[..]),
            (60, &256u16.to_le_bytes()[..]),
            (64, &[0xff][..]),
        ] {
            let mut block = vec![0; BLOCK_BYTES];
            example().encode(&mut block).unwrap();
            put(&mut block, at, bytes);
            let checksum = checksum_without(&block, CHECKSUM_AT);
            put(&mut block, CHECKSUM_AT, &checksum.to_le_bytes());
            assert!(
                matches!(Superblock::parse(&block), Err(FormatError::Field { .. })),
                "field at {at}"
            );
        }
        let nameless = Superblock {
            pool_name: String::new(),
            ..example()
        };
        assert!(nameless.encode(&mut [0; BLOCK_BYTES]).is_err());
    }
}
