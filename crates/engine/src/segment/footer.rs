//! The footer of a sealed segment: its records' block lists again, so that recovery reads no data.

use super::record::ENTRY_BYTES;
use super::{
    Entry, FormatError, Record, VERSION, array, check_block, checksum_without, get_u32, get_u64,
    put,
};
use crate::crc::crc32c;
use crate::io::AlignedBuf;
use crate::types::{Address, BLOCK_BYTES, Epoch, SegmentNumber, Sequence, Uuid};

const MAGIC: &[u8; 4] = b"VHFT";
const WHAT: &str = "segment trailer";
const BODY: &str = "segment footer";
const CHECKSUM_AT: usize = 100;
const SUMMARY_BYTES: usize = 24;
/// Length of the trailer, the last block of a sealed segment.
pub const TRAILER_BYTES: usize = BLOCK_BYTES;

/// A record as the footer tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordSummary {
    pub sequence: Sequence,
    pub offset_blocks: u32,
    pub data_blocks: u32,
    pub header_checksum: u32,
    pub entries: Vec<Entry>,
    /// Checksums of the data blocks, first block first.
    pub checksums: Vec<u32>,
}

/// An entry, where it stands in the log, and the checksums of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedEntry<'a> {
    pub entry: Entry,
    /// Address of the first block of data; for an unmap, that of the data which would come next.
    pub position: Address,
    /// Of the entry's data, first block first; none for an unmap.
    pub checksums: &'a [u32],
}

impl RecordSummary {
    /// Behind the record, blocks from the segment's start.
    #[must_use]
    pub const fn end_blocks(&self) -> u32 {
        self.offset_blocks + 1 + self.data_blocks
    }

    /// The entries in their order, each with its position (docs/format.md, "Record").
    ///
    /// # Panics
    /// If the record does not lie inside a segment, which parsing has checked.
    pub fn placed(&self, segment: SegmentNumber) -> impl Iterator<Item = PlacedEntry<'_>> {
        let mut done = 0;
        self.entries.iter().map(move |&entry| {
            let from = done;
            done += entry.data_blocks();
            PlacedEntry {
                entry,
                position: Address::new(segment, self.offset_blocks + 1 + from),
                checksums: &self.checksums[from as usize..done as usize],
            }
        })
    }
}

impl From<Record> for RecordSummary {
    fn from(record: Record) -> Self {
        Self {
            sequence: record.identity.sequence,
            offset_blocks: record.identity.offset_blocks,
            data_blocks: record.data_blocks,
            header_checksum: record.header_checksum,
            entries: record.entries,
            checksums: record.checksums,
        }
    }
}

/// A sealed segment's last block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    pub pool: Uuid,
    pub volume: Uuid,
    pub segment: SegmentNumber,
    pub epoch: Epoch,
    pub first_sequence: Sequence,
    pub last_sequence: Sequence,
    /// `previous_checksum` of the first record.
    pub previous_checksum: u32,
    /// Header checksum of the last record.
    pub last_checksum: u32,
    pub records: u32,
    pub end_blocks: u32,
    pub body_offset: u32,
    pub body_bytes: u32,
    body_checksum: u32,
}

impl Trailer {
    fn encode(&self, block: &mut [u8]) {
        block.fill(0);
        put(block, 0, MAGIC);
        put(block, 4, &VERSION.to_le_bytes());
        put(block, 8, &self.pool.0);
        put(block, 24, &self.volume.0);
        put(block, 40, &self.segment.0.to_le_bytes());
        put(block, 48, &self.epoch.0.to_le_bytes());
        put(block, 56, &self.first_sequence.0.to_le_bytes());
        put(block, 64, &self.last_sequence.0.to_le_bytes());
        let fields = [
            self.previous_checksum,
            self.last_checksum,
            self.records,
            self.end_blocks,
            self.body_offset,
            self.body_bytes,
            self.body_checksum,
        ];
        for (i, field) in fields.iter().enumerate() {
            put(block, 72 + 4 * i, &field.to_le_bytes());
        }
        let checksum = checksum_without(block, CHECKSUM_AT);
        put(block, CHECKSUM_AT, &checksum.to_le_bytes());
    }

    /// # Errors
    /// [`FormatError`] if `block` is not a trailer, or one that contradicts itself.
    pub fn parse(block: &[u8], segment_bytes: u64) -> Result<Self, FormatError> {
        check_block(block, MAGIC, WHAT, CHECKSUM_AT)?;
        let trailer = Self {
            pool: Uuid(array(block, 8)),
            volume: Uuid(array(block, 24)),
            segment: SegmentNumber(get_u64(block, 40)),
            epoch: Epoch(get_u64(block, 48)),
            first_sequence: Sequence(get_u64(block, 56)),
            last_sequence: Sequence(get_u64(block, 64)),
            previous_checksum: get_u32(block, 72),
            last_checksum: get_u32(block, 76),
            records: get_u32(block, 80),
            end_blocks: get_u32(block, 84),
            body_offset: get_u32(block, 88),
            body_bytes: get_u32(block, 92),
            body_checksum: get_u32(block, 96),
        };
        let wrong = |field| {
            Err(FormatError::Field {
                structure: WHAT,
                field,
            })
        };
        let body_end = u64::from(trailer.body_offset) + u64::from(trailer.body_bytes);
        if body_end > segment_bytes - TRAILER_BYTES as u64
            || !(trailer.body_offset as usize).is_multiple_of(BLOCK_BYTES)
        {
            return wrong("body");
        }
        if u64::from(trailer.end_blocks) * BLOCK_BYTES as u64 > u64::from(trailer.body_offset) {
            return wrong("end of the last record");
        }
        let spanned = trailer
            .last_sequence
            .0
            .checked_sub(trailer.first_sequence.0);
        // Between them some may be missing, which recovery found damaged.
        if trailer.records == 0 || spanned.is_none_or(|n| n < u64::from(trailer.records) - 1) {
            return wrong("records");
        }
        Ok(trailer)
    }

    /// The summaries in `body`, which is `body_bytes` long.
    ///
    /// # Errors
    /// [`FormatError`] if the body is not the one this trailer was written with.
    pub fn parse_body(&self, body: &[u8]) -> Result<Vec<RecordSummary>, FormatError> {
        if body.len() != self.body_bytes as usize || crc32c(body) != self.body_checksum {
            return Err(FormatError::Checksum(BODY));
        }
        let wrong = |field| FormatError::Field {
            structure: BODY,
            field,
        };
        let mut rest = body;
        let mut summaries = Vec::new();
        let mut next_block = 1u32;
        for _ in 0..self.records {
            let head = rest.get(..SUMMARY_BYTES).ok_or(wrong("length"))?;
            let sequence = Sequence(get_u64(head, 0));
            let offset_blocks = get_u32(head, 8);
            let data_blocks = get_u32(head, 12);
            let entry_count = get_u32(head, 16) as usize;
            let before = summaries.last().map(|last: &RecordSummary| last.sequence);
            let in_order = match before {
                None => sequence == self.first_sequence,
                Some(before) => before < sequence && sequence <= self.last_sequence,
            };
            if !in_order {
                return Err(wrong("sequence number"));
            }
            let end = u64::from(offset_blocks) + 1 + u64::from(data_blocks);
            if offset_blocks < next_block || end > u64::from(self.end_blocks) {
                return Err(wrong("offset"));
            }
            next_block = end as u32;
            let length = SUMMARY_BYTES + entry_count * ENTRY_BYTES + data_blocks as usize * 4;
            let whole = rest.get(..length).ok_or(wrong("length"))?;
            let (entry_bytes, crc_bytes) =
                whole[SUMMARY_BYTES..].split_at(entry_count * ENTRY_BYTES);
            let entries = entry_bytes
                .chunks_exact(ENTRY_BYTES)
                .map(Entry::parse)
                .collect::<Result<Vec<_>, _>>()?;
            if entries
                .iter()
                .map(|e| u64::from(e.data_blocks()))
                .sum::<u64>()
                != u64::from(data_blocks)
            {
                return Err(wrong("data_blocks"));
            }
            summaries.push(RecordSummary {
                sequence,
                offset_blocks,
                data_blocks,
                header_checksum: get_u32(head, 20),
                entries,
                checksums: crc_bytes.chunks_exact(4).map(|c| get_u32(c, 0)).collect(),
            });
            rest = &rest[length..];
        }
        if !rest.is_empty() {
            return Err(wrong("length"));
        }
        Ok(summaries)
    }
}

/// Collects a segment's records while it is written, for its footer.
#[derive(Clone, Debug, Default)]
pub struct FooterBuilder {
    body: Vec<u8>,
    records: u32,
    first: Option<(Sequence, u32)>,
    last: Option<(Sequence, u32)>,
    end_blocks: u32,
}

impl FooterBuilder {
    /// Bytes at the end of the segment that the footer will take, trailer and padding included, if
    /// `more_bytes` are added to its body.
    #[must_use]
    pub fn footer_bytes_with(&self, more_bytes: usize) -> u64 {
        ((self.body.len() + more_bytes).next_multiple_of(BLOCK_BYTES) + TRAILER_BYTES) as u64
    }

    /// Bytes that a record of so many entries and data blocks adds to the body.
    #[must_use]
    pub const fn summary_bytes(entries: u32, data_blocks: u32) -> usize {
        SUMMARY_BYTES + entries as usize * ENTRY_BYTES + data_blocks as usize * 4
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Adds the segment's next record.
    pub fn push(&mut self, summary: &RecordSummary, previous_checksum: u32) {
        self.first
            .get_or_insert((summary.sequence, previous_checksum));
        self.last = Some((summary.sequence, summary.header_checksum));
        self.end_blocks = summary.offset_blocks + 1 + summary.data_blocks;
        self.records += 1;
        self.body
            .extend_from_slice(&summary.sequence.0.to_le_bytes());
        for field in [
            summary.offset_blocks,
            summary.data_blocks,
            summary.entries.len() as u32,
            summary.header_checksum,
        ] {
            self.body.extend_from_slice(&field.to_le_bytes());
        }
        for entry in &summary.entries {
            self.body.extend_from_slice(&entry.encode());
        }
        for checksum in &summary.checksums {
            self.body.extend_from_slice(&checksum.to_le_bytes());
        }
    }

    /// The padded body and the trailer, and the byte offset in the segment where they belong.
    ///
    /// # Panics
    /// If no record was pushed: a segment without records is removed, not sealed.
    #[must_use]
    pub fn finish(
        &self,
        pool: Uuid,
        volume: Uuid,
        segment: SegmentNumber,
        epoch: Epoch,
        segment_bytes: u64,
    ) -> (u64, AlignedBuf) {
        let (first, last) = self
            .first
            .zip(self.last)
            .expect("a sealed segment has records");
        let footer_bytes = self.footer_bytes_with(0);
        let offset = segment_bytes - footer_bytes;
        let mut buffer = AlignedBuf::new(footer_bytes as usize);
        buffer[..self.body.len()].copy_from_slice(&self.body);
        let trailer = Trailer {
            pool,
            volume,
            segment,
            epoch,
            first_sequence: first.0,
            last_sequence: last.0,
            previous_checksum: first.1,
            last_checksum: last.1,
            records: self.records,
            end_blocks: self.end_blocks,
            body_offset: offset as u32,
            body_bytes: self.body.len() as u32,
            body_checksum: crc32c(&self.body),
        };
        let at = buffer.len() - TRAILER_BYTES;
        trailer.encode(&mut buffer[at..]);
        (offset, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::EntryKind;
    use crate::types::BlockNumber;
    use proptest::prelude::*;

    const SEGMENT_BYTES: u64 = 1 << 20;

    fn example(records: u64) -> (u64, AlignedBuf, Vec<RecordSummary>) {
        let mut builder = FooterBuilder::default();
        let mut wanted = Vec::new();
        let mut offset_blocks = 1;
        for i in 0..records {
            let summary = RecordSummary {
                sequence: Sequence(40 + i),
                offset_blocks,
                data_blocks: 2,
                header_checksum: i as u32,
                entries: vec![
                    Entry {
                        block: BlockNumber(i * 3),
                        count: 2,
                        kind: EntryKind::Data,
                    },
                    Entry {
                        block: BlockNumber(1 << 33),
                        count: u32::MAX,
                        kind: EntryKind::Unmap,
                    },
                ],
                checksums: vec![i as u32, 99],
            };
            offset_blocks += 3;
            builder.push(&summary, 5);
            wanted.push(summary);
        }
        let (offset, buffer) = builder.finish(
            Uuid([1; 16]),
            Uuid([2; 16]),
            SegmentNumber(3),
            Epoch(4),
            SEGMENT_BYTES,
        );
        (offset, buffer, wanted)
    }

    fn parse(offset: u64, buffer: &[u8]) -> Result<Vec<RecordSummary>, FormatError> {
        let trailer = Trailer::parse(&buffer[buffer.len() - TRAILER_BYTES..], SEGMENT_BYTES)?;
        assert_eq!(u64::from(trailer.body_offset), offset);
        trailer.parse_body(&buffer[..trailer.body_bytes as usize])
    }

    #[test]
    fn footer_survives_a_round_trip() {
        let (offset, buffer, wanted) = example(70);
        assert_eq!(offset + buffer.len() as u64, SEGMENT_BYTES);
        assert_eq!(parse(offset, &buffer), Ok(wanted));
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_noticed(bit in 0..(BLOCK_BYTES * 2) * 8) {
            let (offset, mut buffer, wanted) = example(20);
            buffer[bit / 8] ^= 1 << (bit % 8);
            // Only the padding behind the body is not covered.
            if let Ok(got) = parse(offset, &buffer) {
                prop_assert_eq!(got, wanted);
            }
        }

        #[test]
        fn a_hostile_body_never_panics(records in 1..9u32, body in prop::collection::vec(any::<u8>(), 0..400)) {
            let trailer = Trailer {
                pool: Uuid::default(), volume: Uuid::default(), segment: SegmentNumber(1),
                epoch: Epoch(1), first_sequence: Sequence(1), last_sequence: Sequence(8),
                previous_checksum: 0, last_checksum: 0, records, end_blocks: 200, body_offset: 0,
                body_bytes: body.len() as u32, body_checksum: crc32c(&body),
            };
            let _ = trailer.parse_body(&body);
        }
    }
}
