//! A record: one header block and the data blocks it describes.
//!
//! A record is built in place: [`OpenRecord`] is laid over the header block in the staging ring and
//! grows entry by entry; [`OpenRecord::close`] sets its checksum. [`Record`] is a closed one, parsed.

use super::{FormatError, VERSION, array, check_block, checksum_without, get_u32, get_u64, put};
use crate::types::{BLOCK_BYTES, BlockNumber, Epoch, SegmentNumber, Sequence, Uuid};

const MAGIC: &[u8; 4] = b"VHRC";
const WHAT: &str = "record header";
const CHECKSUM_AT: usize = 80;
const ENTRIES_AT: usize = 128;
/// Where the `entries` field is: in the staging ring it is stored last, as the commit of an entry.
pub const RECORD_ENTRIES_OFFSET: usize = 72;
/// Length of an entry, bytes.
pub const ENTRY_BYTES: usize = 16;
/// Most data blocks a record may hold.
pub const MAX_RECORD_BLOCKS: u32 = 960;
/// Most entries a record may hold.
pub const MAX_RECORD_ENTRIES: u32 = ((BLOCK_BYTES - ENTRIES_AT) / ENTRY_BYTES) as u32;

/// Whether a header block has room for so many entries and data checksums.
#[must_use]
pub const fn fits_in_record(entries: u32, data_blocks: u32) -> bool {
    data_blocks <= MAX_RECORD_BLOCKS
        && ENTRIES_AT + entries as usize * ENTRY_BYTES + data_blocks as usize * 4 <= BLOCK_BYTES
}

/// What an entry says of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// Their data follows, in the order of the entries.
    Data = 1,
    /// They read as zeroes.
    Unmap = 2,
    /// No blocks of the volume: the data that follows is a [`super::Note`].
    Note = 3,
}

/// One guest write, discard or write-zeroes, or a part of one; or a note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub block: BlockNumber,
    pub count: u32,
    pub kind: EntryKind,
}

impl Entry {
    /// Data blocks that the entry brings with it.
    #[must_use]
    pub const fn data_blocks(&self) -> u32 {
        match self.kind {
            EntryKind::Data | EntryKind::Note => self.count,
            EntryKind::Unmap => 0,
        }
    }

    #[must_use]
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        put(&mut bytes, 0, &self.block.0.to_le_bytes());
        put(&mut bytes, 8, &self.count.to_le_bytes());
        bytes[12] = self.kind as u8;
        bytes
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let wrong = |field| FormatError::Field {
            structure: "record entry",
            field,
        };
        let kind = match bytes[12] {
            1 => EntryKind::Data,
            2 => EntryKind::Unmap,
            3 => EntryKind::Note,
            _ => return Err(wrong("kind")),
        };
        let entry = Self {
            block: BlockNumber(get_u64(bytes, 0)),
            count: get_u32(bytes, 8),
            kind,
        };
        if entry.count == 0 || entry.block.0.checked_add(u64::from(entry.count)).is_none() {
            return Err(wrong("count"));
        }
        if entry.kind == EntryKind::Note && entry.block.0 != 0 {
            return Err(wrong("block"));
        }
        Ok(entry)
    }
}

/// What a record must be to be the one that belongs at a place in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordIdentity {
    pub pool: Uuid,
    pub volume: Uuid,
    pub epoch: Epoch,
    pub segment: SegmentNumber,
    /// Offset of the header in the segment, blocks.
    pub offset_blocks: u32,
    pub sequence: Sequence,
    /// Header checksum of the record before; 0 for the first of a volume.
    pub previous_checksum: u32,
}

/// A header block under construction.
pub struct OpenRecord<'a> {
    block: &'a mut [u8],
}

impl<'a> OpenRecord<'a> {
    /// Lays an empty record over `block`.
    ///
    /// # Panics
    /// If `block` is not one block long.
    ///
    /// `durable` is the sequence number up to which the log is durable now. A record that says so can
    /// only be found if that is true, which tells a record that is missing from one that never was.
    pub fn start(
        block: &'a mut [u8],
        identity: &RecordIdentity,
        durable: Sequence,
        opened_ns: u64,
    ) -> Self {
        assert_eq!(block.len(), BLOCK_BYTES, "a record header is one block");
        block.fill(0);
        put(block, 0, MAGIC);
        put(block, 4, &VERSION.to_le_bytes());
        put(block, 8, &identity.pool.0);
        put(block, 24, &identity.volume.0);
        put(block, 40, &identity.epoch.0.to_le_bytes());
        put(block, 48, &identity.sequence.0.to_le_bytes());
        put(block, 56, &identity.segment.0.to_le_bytes());
        put(block, 64, &identity.offset_blocks.to_le_bytes());
        put(block, 76, &identity.previous_checksum.to_le_bytes());
        put(block, 88, &opened_ns.to_le_bytes());
        put(block, 96, &durable.0.to_le_bytes());
        Self { block }
    }

    /// Goes on with a record that was started before.
    pub fn resume(block: &'a mut [u8]) -> Self {
        Self { block }
    }

    /// Writes entry number `index` and the checksums of its data, which follow `data_blocks` data
    /// blocks of earlier entries. The `entries` field is *not* touched: storing it is the commit,
    /// and it is the caller's.
    pub fn put_entry(&mut self, index: u32, entry: &Entry, data_blocks: u32, checksums: &[u32]) {
        debug_assert_eq!(checksums.len(), entry.data_blocks() as usize);
        debug_assert!(fits_in_record(index + 1, data_blocks + entry.data_blocks()));
        put(
            self.block,
            ENTRIES_AT + index as usize * ENTRY_BYTES,
            &entry.encode(),
        );
        for (i, checksum) in checksums.iter().enumerate() {
            let at = BLOCK_BYTES - 4 * (data_blocks as usize + i + 1);
            put(self.block, at, &checksum.to_le_bytes());
        }
    }

    /// Finishes the header and returns its checksum.
    pub fn close(&mut self, data_blocks: u32) -> u32 {
        put(self.block, 68, &data_blocks.to_le_bytes());
        let checksum = checksum_without(self.block, CHECKSUM_AT);
        put(self.block, CHECKSUM_AT, &checksum.to_le_bytes());
        checksum
    }

    /// After a daemon's death: finishes a record that was open, keeping the entries that were
    /// committed. Returns `None` if it has none (or is nonsense), else its data blocks.
    pub fn close_committed(block: &'a mut [u8]) -> Option<u32> {
        if block.len() != BLOCK_BYTES || block[..4] != MAGIC[..] {
            return None;
        }
        let entries = get_u32(block, RECORD_ENTRIES_OFFSET);
        if entries == 0 || entries > MAX_RECORD_ENTRIES {
            return None;
        }
        let mut data_blocks = 0u32;
        for i in 0..entries as usize {
            let at = ENTRIES_AT + i * ENTRY_BYTES;
            let entry = Entry::parse(&block[at..at + ENTRY_BYTES]).ok()?;
            data_blocks = data_blocks.checked_add(entry.data_blocks())?;
        }
        if !fits_in_record(entries, data_blocks) {
            return None;
        }
        // What an uncommitted entry left behind between the two tables is not part of the record.
        let entries_end = ENTRIES_AT + entries as usize * ENTRY_BYTES;
        block[entries_end..BLOCK_BYTES - 4 * data_blocks as usize].fill(0);
        Self { block }.close(data_blocks);
        Some(data_blocks)
    }
}

/// A closed record's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub identity: RecordIdentity,
    pub data_blocks: u32,
    pub entries: Vec<Entry>,
    /// Checksums of the data blocks, first block first.
    pub checksums: Vec<u32>,
    /// The header's own checksum: the next record's `previous_checksum`.
    pub header_checksum: u32,
    pub opened_ns: u64,
    /// The log was durable up to this record when this one was opened.
    pub durable: Sequence,
}

impl Record {
    /// # Errors
    /// [`FormatError`] if `block` is not a record header of this version.
    pub fn parse(block: &[u8]) -> Result<Self, FormatError> {
        check_block(block, MAGIC, WHAT, CHECKSUM_AT)?;
        let wrong = |field| FormatError::Field {
            structure: WHAT,
            field,
        };
        let data_blocks = get_u32(block, 68);
        let count = get_u32(block, RECORD_ENTRIES_OFFSET);
        if count == 0 || count > MAX_RECORD_ENTRIES {
            return Err(wrong("entries"));
        }
        if !fits_in_record(count, data_blocks) {
            return Err(wrong("data_blocks"));
        }
        let mut entries = Vec::with_capacity(count as usize);
        for chunk in block[ENTRIES_AT..]
            .chunks_exact(ENTRY_BYTES)
            .take(count as usize)
        {
            entries.push(Entry::parse(chunk)?);
        }
        if entries
            .iter()
            .map(|e| u64::from(e.data_blocks()))
            .sum::<u64>()
            != u64::from(data_blocks)
        {
            return Err(wrong("data_blocks"));
        }
        if get_u64(block, 96) >= get_u64(block, 48) {
            return Err(wrong("durable sequence number"));
        }
        let checksums = (0..data_blocks as usize)
            .map(|i| get_u32(block, BLOCK_BYTES - 4 * (i + 1)))
            .collect();
        Ok(Self {
            identity: RecordIdentity {
                pool: Uuid(array(block, 8)),
                volume: Uuid(array(block, 24)),
                epoch: Epoch(get_u64(block, 40)),
                sequence: Sequence(get_u64(block, 48)),
                segment: SegmentNumber(get_u64(block, 56)),
                offset_blocks: get_u32(block, 64),
                previous_checksum: get_u32(block, 76),
            },
            data_blocks,
            entries,
            checksums,
            header_checksum: get_u32(block, CHECKSUM_AT),
            opened_ns: get_u64(block, 88),
            durable: Sequence(get_u64(block, 96)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity() -> RecordIdentity {
        RecordIdentity {
            pool: Uuid([7; 16]),
            volume: Uuid([8; 16]),
            epoch: Epoch(9),
            segment: SegmentNumber(10),
            offset_blocks: 11,
            sequence: Sequence(12),
            previous_checksum: 13,
        }
    }

    fn build(entries: &[(u64, u32, bool)]) -> (Vec<u8>, u32, u32) {
        let mut block = vec![0xaa; BLOCK_BYTES];
        let mut open = OpenRecord::start(&mut block, &identity(), Sequence(11), 14);
        let mut data_blocks = 0;
        let mut kept = 0;
        for &(first, count, data) in entries {
            let kind = if data {
                EntryKind::Data
            } else {
                EntryKind::Unmap
            };
            let entry = Entry {
                block: BlockNumber(first),
                count,
                kind,
            };
            if !fits_in_record(kept + 1, data_blocks + entry.data_blocks()) {
                break;
            }
            let checksums: Vec<u32> = (0..entry.data_blocks()).map(|i| i ^ first as u32).collect();
            open.put_entry(kept, &entry, data_blocks, &checksums);
            data_blocks += entry.data_blocks();
            kept += 1;
        }
        put(&mut block, RECORD_ENTRIES_OFFSET, &kept.to_le_bytes());
        (block, kept, data_blocks)
    }

    proptest! {
        #[test]
        fn record_survives_a_round_trip(
            entries in prop::collection::vec((0..1u64 << 34, 1..300u32, any::<bool>()), 1..260)
        ) {
            let (mut block, kept, data_blocks) = build(&entries);
            let checksum = OpenRecord::resume(&mut block).close(data_blocks);
            let record = Record::parse(&block).expect("valid");
            prop_assert_eq!(record.identity, identity());
            prop_assert_eq!(record.header_checksum, checksum);
            prop_assert_eq!(record.entries.len(), kept as usize);
            prop_assert_eq!(record.checksums.len(), data_blocks as usize);
            let mut i = 0;
            for (entry, wanted) in record.entries.iter().zip(&entries) {
                prop_assert_eq!((entry.block.0, entry.count), (wanted.0, wanted.1));
                for k in 0..entry.data_blocks() {
                    prop_assert_eq!(record.checksums[i], k ^ wanted.0 as u32);
                    i += 1;
                }
            }
        }

        #[test]
        fn a_record_left_open_closes_with_just_what_was_committed(
            entries in prop::collection::vec((0..1u64 << 34, 1..20u32, any::<bool>()), 2..40),
            cut in 1..40usize,
        ) {
            let (mut block, kept, _) = build(&entries);
            let committed = (cut as u32).min(kept);
            put(&mut block, RECORD_ENTRIES_OFFSET, &committed.to_le_bytes());
            let data_blocks = OpenRecord::close_committed(&mut block).expect("has entries");
            let (mut wanted, _, wanted_blocks) = build(&entries[..committed as usize]);
            OpenRecord::resume(&mut wanted).close(wanted_blocks);
            prop_assert_eq!(data_blocks, wanted_blocks);
            prop_assert_eq!(block, wanted);
        }

        #[test]
        fn hostile_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), BLOCK_BYTES)) {
            let _ = Record::parse(&bytes);
            bytes[..4].copy_from_slice(MAGIC);
            put(&mut bytes, 4, &VERSION.to_le_bytes());
            let checksum = checksum_without(&bytes, CHECKSUM_AT);
            put(&mut bytes, CHECKSUM_AT, &checksum.to_le_bytes());
            let _ = Record::parse(&bytes);
            let _ = OpenRecord::close_committed(&mut bytes);
        }
    }

    #[test]
    fn a_one_mebibyte_write_that_is_not_aligned_fits_one_record() {
        assert!(fits_in_record(1, 257));
        assert!(fits_in_record(MAX_RECORD_ENTRIES, 0));
        assert!(fits_in_record(1, MAX_RECORD_BLOCKS));
    }
}
