//! Stamps: every 4 KiB written says which block it is and which writing of it, under a checksum.
//!
//! The table remembers, for each block, the last write that was acknowledged; a read must yield
//! exactly that one. A write that was never answered (back-end killed, request failed) leaves the
//! block *pending*: the old or the new content is right, and what is seen first must then stay.
//! The table can be kept in a file, so that a later run checks what this one was promised.

use std::fs;
use std::path::Path;

use crc_fast::{CrcAlgorithm, checksum};

use crate::error::Error;
use crate::workload::mix;

pub const STAMP_BYTES: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"vhdstamp");
const FILE_MAGIC: &[u8; 8] = b"vhdstmp1";
const FILE_HEADER_BYTES: usize = 32;
/// Offsets in a stamped block: magic, block, sequence, table id, CRC-32C, then filling.
const CRC_AT: usize = 32;
const FILL_AT: usize = 40;
/// A write with the next sequence number may or may not have happened.
const PENDING: u32 = 1 << 31;

pub struct Stamps {
    /// Distinguishes this history of the disk from any other.
    id: u64,
    region_offset_bytes: u64,
    acknowledged: Vec<u32>,
    /// Never-written blocks must read as zeroes (a new disk); else they are not looked at.
    fresh: bool,
    pub checked_blocks: u64,
    pub mismatches: u64,
    pub first_mismatch: Option<String>,
}

impl Stamps {
    pub fn new(region_offset_bytes: u64, region_bytes: u64, id: u64, fresh: bool) -> Self {
        let blocks = (region_bytes / STAMP_BYTES as u64) as usize;
        Self {
            id,
            region_offset_bytes,
            acknowledged: vec![0; blocks],
            fresh,
            checked_blocks: 0,
            mismatches: 0,
            first_mismatch: None,
        }
    }

    /// Fills `bytes` with the next content of `block` (counted from the region's start).
    pub fn begin_write(&mut self, block: usize, bytes: &mut [u8]) {
        let sequence = (self.acknowledged[block] & !PENDING) + 1;
        self.acknowledged[block] |= PENDING;
        self.compose(block as u64, sequence, bytes);
    }

    pub fn end_write(&mut self, block: usize) {
        self.acknowledged[block] = (self.acknowledged[block] & !PENDING) + 1;
    }

    fn compose(&self, block: u64, sequence: u32, bytes: &mut [u8]) {
        debug_assert_eq!(bytes.len(), STAMP_BYTES);
        let fields = [MAGIC, block, u64::from(sequence), self.id, 0];
        for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        // Every word differs from every other and from those of other writes: a block put
        // together from two writes, or shifted, cannot pass.
        let start = mix(self.id ^ mix(block) ^ u64::from(sequence).rotate_left(32));
        for (index, place) in bytes[FILL_AT..].chunks_exact_mut(8).enumerate() {
            let word = start.wrapping_add((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            place.copy_from_slice(&word.to_le_bytes());
        }
        let crc = checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32;
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Checks what was read of a block on which no write is in flight.
    pub fn check(&mut self, block: usize, bytes: &mut [u8]) {
        let entry = self.acknowledged[block];
        let expected = entry & !PENDING;
        if entry == 0 && !self.fresh {
            return;
        }
        self.checked_blocks += 1;
        let found = self.sequence_in(block as u64, bytes);
        let never_written = || bytes.iter().all(|byte| *byte == 0);
        let right = match found {
            Ok(sequence) => {
                let newer = entry & PENDING != 0 && sequence == expected + 1;
                if newer || sequence == expected {
                    self.acknowledged[block] = sequence;
                }
                newer || sequence == expected
            }
            Err(_) if expected == 0 => {
                let right = !self.fresh || never_written();
                if right {
                    self.acknowledged[block] = 0;
                }
                right
            }
            Err(_) => false,
        };
        if !right {
            self.mismatches += 1;
            let offset = self.region_offset_bytes + (block * STAMP_BYTES) as u64;
            let found = match found {
                Ok(sequence) => format!("writing {sequence} of it"),
                Err(reason) => reason.to_owned(),
            };
            let promised = match expected {
                0 => "zeroes (it was never written)".to_owned(),
                _ => format!("writing {expected}"),
            };
            let maybe = if entry & PENDING != 0 {
                " or the writing after"
            } else {
                ""
            };
            self.first_mismatch.get_or_insert_with(|| {
                format!("offset {offset}: promised was {promised}{maybe}, found {found}")
            });
        }
    }

    fn sequence_in(&self, block: u64, bytes: &mut [u8]) -> Result<u32, &'static str> {
        let word = |at: usize| -> u64 {
            bytes[at..at + 8]
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        if word(0) != MAGIC {
            let zero = bytes.iter().all(|byte| *byte == 0);
            return Err(if zero {
                "zeroes"
            } else {
                "bytes that are no stamp"
            });
        }
        let (of_block, sequence, id, crc) = (word(8), word(16), word(24), word(CRC_AT));
        bytes[CRC_AT..CRC_AT + 8].fill(0);
        if u64::from(checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32) != crc {
            return Err("a stamp with a wrong checksum (torn or corrupt)");
        }
        match (id == self.id, of_block == block) {
            (false, _) => Err("a stamp of an earlier history of this disk"),
            (true, false) => Err("the stamp of another block"),
            (true, true) => u32::try_from(sequence).map_err(|_| "an impossible sequence number"),
        }
    }

    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(FILE_HEADER_BYTES + 4 * self.acknowledged.len());
        bytes.extend_from_slice(FILE_MAGIC);
        for field in [
            self.acknowledged.len() as u64,
            self.id,
            self.region_offset_bytes,
        ] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend(
            self.acknowledged
                .iter()
                .flat_map(|entry| entry.to_le_bytes()),
        );
        fs::write(path, bytes).map_err(|error| Error::Stamps {
            path: path.to_owned(),
            reason: error.to_string(),
        })
    }

    /// Takes up the history a former run saved for the same region.
    pub fn load(&mut self, path: &Path) -> Result<(), Error> {
        let fail = |reason: String| Error::Stamps {
            path: path.to_owned(),
            reason,
        };
        let bytes = fs::read(path).map_err(|error| fail(error.to_string()))?;
        let field = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
        };
        if !bytes.starts_with(FILE_MAGIC)
            || field(8) != Some(self.acknowledged.len() as u64)
            || field(24) != Some(self.region_offset_bytes)
            || bytes.len() != FILE_HEADER_BYTES + 4 * self.acknowledged.len()
        {
            return Err(fail(
                "does not describe this region; give the region it was made for".into(),
            ));
        }
        self.id = field(16).unwrap_or_default();
        for (entry, raw) in self
            .acknowledged
            .iter_mut()
            .zip(bytes[FILE_HEADER_BYTES..].chunks_exact(4))
        {
            *entry = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(stamps: &mut Stamps, block: usize) -> Vec<u8> {
        let mut bytes = vec![0; STAMP_BYTES];
        stamps.begin_write(block, &mut bytes);
        stamps.end_write(block);
        bytes
    }

    fn mismatches(stamps: &mut Stamps, block: usize, bytes: &[u8]) -> u64 {
        let before = stamps.mismatches;
        stamps.check(block, &mut bytes.to_vec());
        stamps.mismatches - before
    }

    #[test]
    fn only_the_last_acknowledged_write_passes() {
        let mut stamps = Stamps::new(0, 1 << 20, 7, true);
        let old = written(&mut stamps, 3);
        let new = written(&mut stamps, 3);
        let other = written(&mut stamps, 4);
        assert_eq!(mismatches(&mut stamps, 3, &new), 0);
        for wrong in [&old, &other, &vec![0; STAMP_BYTES], &vec![1; STAMP_BYTES]] {
            assert_eq!(mismatches(&mut stamps, 3, wrong), 1);
        }
        assert_eq!(stamps.checked_blocks, 5);
        assert!(stamps.first_mismatch.unwrap().contains("writing 2"));
    }

    #[test]
    fn one_flipped_bit_anywhere_is_found() {
        let mut stamps = Stamps::new(0, 1 << 20, 7, true);
        let right = written(&mut stamps, 0);
        for at in 0..STAMP_BYTES {
            let mut wrong = right.clone();
            wrong[at] ^= 1 << (at % 8);
            assert_eq!(mismatches(&mut stamps, 0, &wrong), 1, "byte {at}");
        }
    }

    #[test]
    fn an_unanswered_write_may_be_there_or_not_but_not_both() {
        let mut stamps = Stamps::new(0, 1 << 20, 7, true);
        let old = written(&mut stamps, 0);
        let mut new = vec![0; STAMP_BYTES];
        stamps.begin_write(0, &mut new);
        assert_eq!(mismatches(&mut stamps, 0, &new), 0);
        assert_eq!(
            mismatches(&mut stamps, 0, &old),
            1,
            "what was seen must stay"
        );
        let mut first = vec![0; STAMP_BYTES];
        stamps.begin_write(1, &mut first);
        assert_eq!(mismatches(&mut stamps, 1, &[0; STAMP_BYTES]), 0);
        assert_eq!(
            mismatches(&mut stamps, 1, &first),
            1,
            "what was seen must stay"
        );
    }

    #[test]
    fn a_saved_history_binds_the_next_run() {
        let path = std::env::temp_dir().join(format!("stamps-{}", std::process::id()));
        let mut first = Stamps::new(4096, 1 << 20, 7, true);
        let bytes = written(&mut first, 9);
        first.save(&path).unwrap();
        let mut second = Stamps::new(4096, 1 << 20, 8, true);
        second.load(&path).unwrap();
        assert_eq!(mismatches(&mut second, 9, &bytes), 0);
        assert_eq!(mismatches(&mut second, 9, &[0; STAMP_BYTES]), 1);
        let refused = Stamps::new(0, 1 << 20, 8, true).load(&path);
        fs::remove_file(&path).unwrap();
        assert!(matches!(refused, Err(Error::Stamps { .. })));
    }
}
