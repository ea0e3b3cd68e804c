//! Repeating at the log's end what a rebuild of maps needs of segments that are otherwise dead.
//!
//! A log segment without a live block may still hold notes of snapshots and of the volume's state, and
//! unmaps: without these, a rebuild from segments alone would bring back older blocks that still lie in
//! other segments. So what is needed of it is appended again, and only then may it be removed
//! (docs/format.md, "Note").
//!
//! Ordering argument: the segment counts as free of notes and unmaps when their repetition has been
//! appended. It is removed by a checkpoint whose freeze comes after that, and a checkpoint is given out
//! only when the log is durable up to its freeze: the repetition is durable before the segment goes.
//!
//! What is not repeated: an unmap that no snapshot lies behind, where the head maps the block again (the
//! newer data says so by itself). Those where the head has a hole are merged with their neighbours, at
//! the newest of their positions: the block was never mapped for good in between, and no snapshot has
//! looked. So the unmaps carried are bounded by the holes of the head and those of the snapshots.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::note::NotedAt;
use super::{RequestFailed, Slot, Step, Volume, VolumeOp, Work};
use crate::crc::crc32c;
use crate::io::{AlignedBuf, Io, Op};
use crate::log::Now;
use crate::map::{Extent, Extents, LEAF_BLOCKS};
use crate::segment::{EntryKind, MAX_NOTE_UNMAPS, Note, NotedUnmap, RecordSummary, SummaryReader};
use crate::types::{Address, BLOCK_BYTES, BlockNumber, SegmentNumber};

/// Segments carried at a time.
const SEGMENTS_AT_A_TIME: usize = 16;
/// Pieces of unmaps looked at in one turn, so that guests get theirs.
const PIECES_A_TURN: u32 = 256;

/// One round: some segments from their footers to the notes that repeat them.
#[derive(Debug)]
pub(super) struct Carry {
    /// To be read; the first one is being read.
    segments: VecDeque<SegmentNumber>,
    reader: Option<SummaryReader>,
    /// Notes of the first segment that are to be read.
    notes: VecDeque<(Address, Vec<u32>)>,
    /// A read that has come back.
    arrived: Option<io::Result<Vec<u8>>>,
    /// Read whole: these are free of what they held when the round is over.
    done: Vec<SegmentNumber>,
    state_needed: bool,
    found: VecDeque<NotedUnmap>,
    kept: Vec<NotedUnmap>,
    /// What is to be appended, once it is known.
    appending: Option<super::note::NoteWork>,
}

impl Carry {
    fn new(segments: VecDeque<SegmentNumber>) -> Self {
        Self {
            segments,
            reader: None,
            notes: VecDeque::new(),
            arrived: None,
            done: Vec::new(),
            state_needed: false,
            found: VecDeque::new(),
            kept: Vec::new(),
            appending: None,
        }
    }

    /// The segment being read cannot be: it stays.
    fn skip_segment(&mut self) {
        self.reader = None;
        self.notes.clear();
        self.segments.pop_front();
    }

    fn take_summaries(&mut self, segment: SegmentNumber, records: &[RecordSummary]) {
        for record in records {
            for placed in record.placed(segment) {
                match placed.entry.kind {
                    EntryKind::Data => {}
                    EntryKind::Unmap => self.found.push_back(NotedUnmap {
                        block: placed.entry.block,
                        count: placed.entry.count,
                        position: placed.position,
                    }),
                    EntryKind::Note => {
                        let checksums = placed.checksums.to_vec();
                        self.notes.push_back((placed.position, checksums));
                    }
                }
            }
        }
    }
}

/// Brings unmaps behind the newest snapshot together where they touch.
fn merge(mut unmaps: Vec<NotedUnmap>, newest: Address) -> Vec<NotedUnmap> {
    unmaps.sort_unstable_by_key(|unmap| (unmap.position >= newest, unmap.block, unmap.position));
    let mut merged: Vec<NotedUnmap> = Vec::new();
    for unmap in unmaps {
        let end = unmap.block.0 + u64::from(unmap.count);
        match merged.last_mut() {
            Some(last)
                if unmap.position >= newest
                    && last.position >= newest
                    && unmap.block.0 <= last.block.0 + u64::from(last.count)
                    && end - last.block.0 <= u64::from(u32::MAX) =>
            {
                last.count = last.count.max((end - last.block.0) as u32);
                last.position = last.position.max(unmap.position);
            }
            _ => merged.push(unmap),
        }
    }
    merged
}

impl Volume {
    /// Starts a round if a checkpoint has found something to carry.
    pub(super) fn drive_carry(&mut self, io: &mut dyn Io, now: Now) {
        if self.checkpoints.carrying || self.checkpoints.to_carry.is_empty() || self.closing {
            return;
        }
        let mut segments: VecDeque<_> = std::mem::take(&mut self.checkpoints.to_carry).into();
        segments.truncate(SEGMENTS_AT_A_TIME);
        self.checkpoints.carrying = true;
        self.start_own(io, Work::Carry(Box::new(Carry::new(segments))), now);
    }

    pub(super) fn run_carry(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        carry: &mut Carry,
        now: Now,
    ) -> Step {
        if self.log.is_none() || self.closing {
            return Step::Finish(Err(RequestFailed::NotWritable));
        }
        if let Err(step) = self.read_to_carry(io, slot, carry) {
            return step;
        }
        if carry.appending.is_none() {
            if let Err(step) = self.sift_unmaps(io, slot, carry) {
                return step;
            }
            let mut notes: VecDeque<Note> =
                merge(std::mem::take(&mut carry.kept), self.history.newest)
                    .chunks(MAX_NOTE_UNMAPS)
                    .map(|part| Note::Unmaps(part.to_vec()))
                    .collect();
            // Without a state to repeat, segments with notes stay.
            if carry.state_needed {
                notes.extend(self.state_notes());
            }
            let at: NotedAt = Arc::default();
            carry.appending = Some(super::note::NoteWork::new(notes, at));
        }
        if let Some(work) = &mut carry.appending {
            match self.run_note(io, slot, work, now) {
                Step::Changed => {}
                step => return step,
            }
        }
        let state_repeated = !self.history.state.is_empty();
        for segment in carry.done.drain(..) {
            self.space.carried(segment, state_repeated);
        }
        Step::Changed
    }

    /// Reads the segments' footers, and the notes that these tell of.
    fn read_to_carry(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        carry: &mut Carry,
    ) -> Result<(), Step> {
        while let Some(&segment) = carry.segments.front() {
            if let Some((position, checksums)) = carry.notes.front() {
                let position = *position;
                let len = checksums.len() * BLOCK_BYTES;
                let Some(arrived) = carry.arrived.take() else {
                    return Err(self.read_part(io, slot, segment, position.byte_offset(), len));
                };
                let note = arrived.ok().filter(|bytes| {
                    let found = bytes.chunks_exact(BLOCK_BYTES).map(crc32c);
                    bytes.len() == len && found.eq(checksums.iter().copied())
                });
                match note.map(|bytes| Note::parse(&bytes)) {
                    Some(Ok(Note::Unmaps(unmaps))) => carry.found.extend(unmaps),
                    Some(Ok(Note::Snapshot { .. } | Note::State { .. })) => {
                        carry.state_needed = true;
                    }
                    // Damage costs the note. What it said is in the catalog, as long as that lives.
                    Some(Err(_)) | None => carry.state_needed = true,
                }
                carry.notes.pop_front();
                if carry.notes.is_empty() {
                    carry.done.push(segment);
                    carry.segments.pop_front();
                }
                continue;
            }
            let (pool, volume, segment_bytes) = (self.pool, self.uuid, self.segment_bytes);
            let reader = carry
                .reader
                .get_or_insert_with(|| SummaryReader::new(pool, volume, segment, segment_bytes));
            match carry.arrived.take() {
                Some(Ok(bytes)) => reader.supply(&bytes),
                Some(Err(_)) => {
                    carry.skip_segment();
                    continue;
                }
                None => {}
            }
            if let Some(range) = reader.wants() {
                let len = (range.end - range.start) as usize;
                return Err(self.read_part(io, slot, segment, range.start, len));
            }
            let Some(reader) = carry.reader.take() else {
                continue;
            };
            let found = reader.finish();
            if !found.damaged.is_empty() {
                // What it says is not known whole: it stays, and a check reports it.
                carry.skip_segment();
                continue;
            }
            carry.take_summaries(segment, &found.records);
            if carry.notes.is_empty() {
                carry.done.push(segment);
                carry.segments.pop_front();
            }
        }
        Ok(())
    }

    fn read_part(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        segment: SegmentNumber,
        offset_bytes: u64,
        len: usize,
    ) -> Step {
        let buffer = AlignedBuf::new(len);
        // SAFETY: the buffer travels with its operation in `tokens` until it completes.
        let bufs = vec![unsafe { buffer.io_buf() }];
        let op = Op::Read { offset_bytes, bufs };
        self.submit_op(io, segment, op, VolumeOp::Carry { slot, buffer });
        Step::Parked
    }

    pub(super) fn carry_read(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        buffer: &AlignedBuf,
        result: io::Result<usize>,
        now: Now,
    ) {
        if let Some(Work::Carry(carry)) = self.running[slot].as_mut().map(|r| &mut r.work) {
            carry.arrived = Some(result.map(|got| buffer[..got.min(buffer.len())].to_vec()));
        }
        self.run(io, slot, now);
    }

    /// Keeps of the unmaps found what a rebuild still needs.
    fn sift_unmaps(&mut self, io: &mut dyn Io, slot: Slot, carry: &mut Carry) -> Result<(), Step> {
        let newest = self.history.newest;
        let mut extents = Extents::default();
        let mut left = PIECES_A_TURN;
        while let Some(unmap) = carry.found.front_mut() {
            if unmap.position < newest {
                // A snapshot has looked since: it must stay as it is.
                carry.kept.extend(carry.found.pop_front());
                continue;
            }
            if left == 0 {
                self.runnable.push_back(slot);
                return Err(Step::Parked);
            }
            left -= 1;
            // Up to the end of a leaf, where the map is sure to answer after one node more.
            let leaf_end = (unmap.block.0 / LEAF_BLOCKS + 1) * LEAF_BLOCKS;
            let count = (leaf_end - unmap.block.0).min(unmap.count.into()) as u32;
            if let Err(need) = self.map.lookup(unmap.block, count, &mut extents) {
                return Err(self.park_for_node(io, slot, need.0));
            }
            for extent in &extents.extents {
                if let Extent::Hole { block, count } = *extent {
                    carry.kept.push(NotedUnmap {
                        block,
                        count,
                        position: unmap.position,
                    });
                }
            }
            unmap.block = BlockNumber(unmap.block.0 + u64::from(count));
            unmap.count -= count;
            if unmap.count == 0 {
                carry.found.pop_front();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unmap(block: u64, count: u32, position: u64) -> NotedUnmap {
        NotedUnmap {
            block: BlockNumber(block),
            count,
            position: Address::from_bits(position),
        }
    }

    #[test]
    fn neighbours_behind_the_newest_snapshot_merge_at_the_newest_position() {
        let merged = merge(
            vec![unmap(8, 8, 30), unmap(0, 8, 20), unmap(20, 1, 25)],
            Address::from_bits(10),
        );
        assert_eq!(merged, [unmap(0, 16, 30), unmap(20, 1, 25)]);
    }

    #[test]
    fn unmaps_that_a_snapshot_has_seen_stay_as_they_are() {
        let unmaps = vec![unmap(0, 8, 5), unmap(8, 8, 7), unmap(16, 8, 20)];
        assert_eq!(merge(unmaps.clone(), Address::from_bits(10)), unmaps);
    }
}
