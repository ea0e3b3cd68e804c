//! What a log segment says of its records, read step by step by someone who must not wait.
//!
//! The reader names the bytes it wants next and is given them: the trailer, the footer's body, and, where
//! there is no footer or a damaged one, headers of records, a window at a time. Data is never read or
//! verified: this is for segments whose records were durable once (sealed, or covered by a checkpoint),
//! of which blocks may have been punched out since. Where a header is damaged, the next record is looked
//! for block by block.

use std::ops::Range;

use super::{Record, RecordSummary, TRAILER_BYTES, Trailer};
use crate::types::{BLOCK_BYTES, Epoch, SegmentNumber, Uuid};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Headers are read this many blocks at a time.
const WINDOW_BLOCKS: u32 = 16;

/// What a segment says of its records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summaries {
    /// In the log's order.
    pub records: Vec<RecordSummary>,
    /// Whether they are those of a whole footer.
    pub sealed: bool,
    /// Blocks between records (or, with a trailer that is whole, up to their end) where there should be
    /// records and none can be read.
    pub damaged: Vec<Range<u32>>,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub struct SummaryReader {
    pool: Uuid,
    volume: Uuid,
    segment: SegmentNumber,
    segment_bytes: u64,
    stage: Stage,
    found: Summaries,
}

#[derive(Clone, Debug)]
enum Stage {
    Trailer,
    Body(Trailer),
    Headers {
        /// The next header's place, in blocks.
        next: u32,
        /// Behind the last record that was found.
        found_to: u32,
        /// Where the records end, if a trailer has told.
        told_end: Option<u32>,
        epoch: Option<Epoch>,
    },
    Done,
}

impl SummaryReader {
    #[must_use]
    pub fn new(pool: Uuid, volume: Uuid, segment: SegmentNumber, segment_bytes: u64) -> Self {
        Self {
            pool,
            volume,
            segment,
            segment_bytes,
            stage: Stage::Trailer,
            found: Summaries::default(),
        }
    }

    /// Bytes of the segment that are wanted next, whole blocks; `None`: it is done.
    #[must_use]
    pub fn wants(&self) -> Option<Range<u64>> {
        match &self.stage {
            Stage::Trailer => Some(self.segment_bytes - TRAILER_BYTES as u64..self.segment_bytes),
            Stage::Body(trailer) => {
                let from = u64::from(trailer.body_offset);
                let len = u64::from(trailer.body_bytes).max(1).next_multiple_of(BLOCK);
                Some(from..from + len)
            }
            Stage::Headers { next, .. } => {
                let to = (next + WINDOW_BLOCKS).min(self.end_blocks());
                Some(u64::from(*next) * BLOCK..u64::from(to) * BLOCK)
            }
            Stage::Done => None,
        }
    }

    /// A record ends before the trailer at the latest.
    fn end_blocks(&self) -> u32 {
        ((self.segment_bytes - TRAILER_BYTES as u64) / BLOCK) as u32
    }

    /// Takes the bytes that [`Self::wants`] has named; fewer if the file ends there.
    pub fn supply(&mut self, bytes: &[u8]) {
        match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Trailer => {
                let ours = (self.pool, self.volume, self.segment);
                self.stage = match Trailer::parse(bytes, self.segment_bytes) {
                    Ok(trailer) if (trailer.pool, trailer.volume, trailer.segment) == ours => {
                        Stage::Body(trailer)
                    }
                    _ => headers(None),
                };
            }
            Stage::Body(trailer) => {
                let body = bytes.get(..trailer.body_bytes as usize).unwrap_or(bytes);
                match trailer.parse_body(body) {
                    Ok(records) => {
                        self.found.records = records;
                        self.found.sealed = true;
                    }
                    Err(_) => self.stage = headers(Some(&trailer)),
                }
            }
            Stage::Headers {
                mut next,
                mut found_to,
                told_end,
                mut epoch,
            } => {
                let first = next;
                let blocks = bytes.len() / BLOCK_BYTES;
                let end = self.end_blocks().min(told_end.unwrap_or(u32::MAX));
                while ((next - first) as usize) < blocks && next < end {
                    let at = (next - first) as usize * BLOCK_BYTES;
                    let Some(record) = self.record_at(next, epoch, &bytes[at..at + BLOCK_BYTES])
                    else {
                        next += 1;
                        continue;
                    };
                    if next > found_to {
                        self.found.damaged.push(found_to..next);
                    }
                    epoch = Some(record.identity.epoch);
                    next += 1 + record.data_blocks;
                    found_to = next;
                    self.found.records.push(RecordSummary::from(record));
                }
                let wanted = WINDOW_BLOCKS.min(self.end_blocks() - first) as usize;
                if next < end && blocks >= wanted {
                    self.stage = Stage::Headers {
                        next,
                        found_to,
                        told_end,
                        epoch,
                    };
                } else if let Some(end) = told_end.filter(|end| found_to < *end) {
                    self.found.damaged.push(found_to..end);
                }
            }
            Stage::Done => {}
        }
    }

    /// The record whose header is `block`, if it belongs there and comes after those before.
    fn record_at(&self, offset_blocks: u32, epoch: Option<Epoch>, block: &[u8]) -> Option<Record> {
        let record = Record::parse(block).ok()?;
        let identity = &record.identity;
        let here = (identity.pool, identity.volume, identity.segment)
            == (self.pool, self.volume, self.segment)
            && identity.offset_blocks == offset_blocks
            && epoch.is_none_or(|epoch| identity.epoch == epoch)
            && offset_blocks + 1 + record.data_blocks <= self.end_blocks();
        let last = self.found.records.last();
        let later = last.is_none_or(|last| identity.sequence > last.sequence);
        (here && later).then_some(record)
    }

    /// What was found; all there is once [`Self::wants`] says `None`.
    #[must_use]
    pub fn finish(self) -> Summaries {
        self.found
    }
}

fn headers(trailer: Option<&Trailer>) -> Stage {
    Stage::Headers {
        next: 1,
        found_to: 1,
        told_end: trailer.map(|trailer| trailer.end_blocks),
        epoch: trailer.map(|trailer| trailer.epoch),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::{Entry, EntryKind, FooterBuilder, OpenRecord, RecordIdentity};
    use crate::types::{BlockNumber, Sequence};
    use proptest::prelude::*;

    const SEGMENT_BYTES: u64 = 1 << 20;
    const SEGMENT: SegmentNumber = SegmentNumber(9);

    /// A segment with records of so many blocks of data; the data itself is punched out.
    fn segment(sizes: &[u32], sealed: bool) -> (Vec<u8>, Vec<RecordSummary>) {
        let mut bytes = vec![0; SEGMENT_BYTES as usize];
        let (mut offset, mut previous_checksum) = (1u32, 7);
        let mut records = Vec::new();
        let mut footer = FooterBuilder::default();
        for (i, &count) in sizes.iter().enumerate() {
            let at = offset as usize * BLOCK_BYTES;
            let block = &mut bytes[at..at + BLOCK_BYTES];
            let identity = RecordIdentity {
                pool: Uuid([1; 16]),
                volume: Uuid([2; 16]),
                epoch: Epoch(3),
                segment: SEGMENT,
                offset_blocks: offset,
                sequence: Sequence(10 + i as u64),
                previous_checksum,
            };
            let entry = Entry {
                block: BlockNumber(i as u64),
                count: count.max(1),
                kind: if count == 0 {
                    EntryKind::Unmap
                } else {
                    EntryKind::Data
                },
            };
            let checksums: Vec<u32> = (0..count).collect();
            OpenRecord::start(block, &identity, Sequence(9), 0).put_entry(0, &entry, 0, &checksums);
            block[72] = 1;
            OpenRecord::resume(block).close(count);
            let summary = RecordSummary::from(Record::parse(block).unwrap());
            footer.push(&summary, previous_checksum);
            previous_checksum = summary.header_checksum;
            offset += 1 + count;
            records.push(summary);
        }
        if sealed && !records.is_empty() {
            let (at, buffer) = footer.finish(
                Uuid([1; 16]),
                Uuid([2; 16]),
                SEGMENT,
                Epoch(3),
                SEGMENT_BYTES,
            );
            bytes[at as usize..].copy_from_slice(&buffer);
        }
        (bytes, records)
    }

    fn read(bytes: &[u8]) -> Summaries {
        let mut reader = SummaryReader::new(Uuid([1; 16]), Uuid([2; 16]), SEGMENT, SEGMENT_BYTES);
        let mut steps = 0;
        while let Some(range) = reader.wants() {
            assert!(
                range.start < range.end && range.end <= SEGMENT_BYTES,
                "{range:?}"
            );
            let len = bytes.len() as u64;
            reader.supply(&bytes[range.start.min(len) as usize..range.end.min(len) as usize]);
            steps += 1;
            assert!(steps <= 300, "it never ends");
        }
        reader.finish()
    }

    proptest! {
        #[test]
        fn records_are_found_by_footer_or_by_headers(
            sizes in prop::collection::vec(0..12u32, 0..20), damage in 0..4u8
        ) {
            let (mut bytes, records) = segment(&sizes, damage > 0);
            match damage {
                2 => bytes[SEGMENT_BYTES as usize - 4000] ^= 1,
                3 => bytes[SEGMENT_BYTES as usize - 2 * BLOCK_BYTES] ^= 1,
                _ => {}
            }
            let found = read(&bytes);
            prop_assert_eq!(found.sealed, damage == 1 && !records.is_empty());
            prop_assert_eq!(&found.records, &records);
            prop_assert_eq!(&found.damaged, &[]);
            if damage == 0 {
                // A file that ends behind its last record.
                let end = records.last().map_or(1, RecordSummary::end_blocks);
                prop_assert_eq!(read(&bytes[..end as usize * BLOCK_BYTES]), found);
            }
        }

        #[test]
        fn a_damaged_header_costs_its_record_only(
            sizes in prop::collection::vec(0..12u32, 1..20), which in any::<prop::sample::Index>(),
            torn_footer in any::<bool>(),
        ) {
            let (mut bytes, mut records) = segment(&sizes, torn_footer);
            let lost = records.remove(which.index(records.len()));
            bytes[lost.offset_blocks as usize * BLOCK_BYTES + 50] ^= 4;
            if torn_footer {
                bytes[SEGMENT_BYTES as usize - 2 * BLOCK_BYTES] ^= 1;
            }
            let found = read(&bytes);
            prop_assert_eq!(&found.records, &records);
            // Of the last record only a trailer knows.
            let known = torn_footer || records.last().is_some_and(|last| last.sequence > lost.sequence);
            let damaged = lost.offset_blocks..lost.end_blocks();
            prop_assert_eq!(found.damaged, if known { vec![damaged] } else { vec![] });
        }

        #[test]
        fn random_damage_never_panics_and_never_makes_records_up(
            sizes in prop::collection::vec(0..12u32, 1..20),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..300),
        ) {
            let (mut bytes, records) = segment(&sizes, true);
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            for record in read(&bytes).records {
                prop_assert!(records.contains(&record));
            }
        }
    }
}
