//! Appending entries: the part of the write path that runs for every guest write.
//!
//! `prepare` makes room (record, segment, reservation, ring memory) and may say "wait"; an append after
//! a successful `prepare` cannot fail. Ordering argument, for the daemon's death at any instruction:
//! data and checksums are stored in the ring, then the entry, then the record's `entries` field with
//! release order. Before that last store the entry does not exist; after it, it is complete. A write
//! that turns out to be partly zeroes becomes several entries, which the same one store commits.

use super::{
    AppendError, BLOCK, Log, LogOp, LogPosition, MAX_ATOMIC_BLOCKS, Now, OpenState,
    RECORD_TARGET_BLOCKS, RESERVE_BLOCKS, Reserved, Span,
};
use crate::crc::crc32c;
use crate::io::{Io, Op};
use crate::log::{Active, LogEvent};
use crate::segment::{
    Entry, EntryKind, FooterBuilder, MAX_NOTE_BLOCKS, OpenRecord, Record, RecordIdentity,
    RecordSummary, fits_in_record,
};
use crate::types::{Address, BLOCK_BYTES, BlockNumber};

impl Log {
    /// Makes room for one entry with `data_blocks` blocks of data.
    ///
    /// # Errors
    /// [`AppendError`]; with `Wait` the log has done what it can and will complete an operation.
    ///
    /// # Panics
    /// If `data_blocks` is more than a piece may have (see [`super::LogConfig::max_piece_blocks`]).
    pub fn prepare(
        &mut self,
        io: &mut dyn Io,
        data_blocks: u32,
        now: Now,
    ) -> Result<(), AppendError> {
        assert!(
            data_blocks <= MAX_ATOMIC_BLOCKS,
            "a piece of a write fits one record"
        );
        if self.failed.is_some() {
            return Err(AppendError::Failed);
        }
        if let Some(open) = &self.open
            && (open.data_blocks >= RECORD_TARGET_BLOCKS
                || !fits_in_record(open.entries + 1, open.data_blocks + data_blocks))
        {
            self.close_record();
            self.write_out(io);
        }
        if self.active.is_some() && !self.fits_in_segment(data_blocks) {
            self.close_record();
            self.begin_seal();
            self.write_out(io);
        }
        if self.active.is_none() {
            self.activate_spare(io, now)?;
        }
        self.reserve_for(io, data_blocks, now)?;
        self.back_ring(io, data_blocks, now)
    }

    /// Blocks that an entry adds to the segment, a new record's header included.
    fn blocks_needed(&self, data_blocks: u32) -> u32 {
        data_blocks + u32::from(self.open.is_none())
    }

    fn active_end_blocks(&self, active: &Active) -> u32 {
        ((self.tail - active.start) / BLOCK) as u32
    }

    /// Bytes of footer if one more entry goes into the active segment.
    fn footer_bytes_with(&self, active: &Active, data_blocks: u32) -> u64 {
        let (entries, blocks) = self
            .open
            .as_ref()
            .map_or((0, 0), |open| (open.entries, open.data_blocks));
        active
            .footer
            .footer_bytes_with(FooterBuilder::summary_bytes(
                entries + 1,
                blocks + data_blocks,
            ))
    }

    fn fits_in_segment(&self, data_blocks: u32) -> bool {
        self.active.as_ref().is_some_and(|active| {
            let end = self.active_end_blocks(active) + self.blocks_needed(data_blocks);
            u64::from(end) * BLOCK + self.footer_bytes_with(active, data_blocks)
                <= self.config.segment_bytes
        })
    }

    fn activate_spare(&mut self, io: &mut dyn Io, now: Now) -> Result<(), AppendError> {
        let Some(segment) = self.spare.take() else {
            return self.create_spare(io, now);
        };
        let start = self.tail;
        // Position of block 0, which was written when the segment was made; records follow it.
        self.tail += BLOCK;
        self.spans.push_back(Span { start, segment });
        self.staging.add_span(start, segment);
        self.forget_old_spans();
        self.active = Some(Active {
            segment,
            start,
            reserved_blocks: 0,
            footer_reserved_bytes: 0,
            reserving: false,
            footer: FooterBuilder::default(),
        });
        self.reserve_blocks = RESERVE_BLOCKS;
        self.events.push(LogEvent::Opened(segment));
        Ok(())
    }

    fn forget_old_spans(&mut self) {
        let oldest = self.tail.saturating_sub(self.staging.ring_bytes());
        while self.spans.len() > 1 && self.spans[1].start <= oldest {
            self.spans.pop_front();
        }
    }

    /// Takes the step towards a spare segment that is due.
    pub(super) fn create_spare(&mut self, io: &mut dyn Io, now: Now) -> Result<(), AppendError> {
        if self.creating {
            return Err(AppendError::Wait);
        }
        if self.still_full(now) {
            return Err(AppendError::NoSpace);
        }
        let Some(number) = self.numbers.take() else {
            self.events.push(LogEvent::NumbersWanted);
            return Err(AppendError::NoSpace);
        };
        let mut header = Box::new(crate::io::AlignedBuf::new(BLOCK_BYTES));
        self.segment_header(number, now).encode(&mut header);
        self.creating = true;
        self.submit(
            io,
            number,
            Op::Create { header },
            LogOp::Create { segment: number },
        );
        Err(AppendError::Wait)
    }

    /// Makes the next segment while the active one still has room.
    pub(super) fn prepare_spare(&mut self, io: &mut dyn Io, now: Now) {
        let Some(active) = &self.active else { return };
        let half = self.config.segment_bytes / 2;
        let used = u64::from(self.active_end_blocks(active)) * BLOCK;
        if used > half && self.spare.is_none() && !self.closing {
            // Whatever stands in the way will stand there when the segment is needed, and count then.
            let _ = self.create_spare(io, now);
        }
    }

    /// Checks that what the entry needs is reserved on the device, and reserves ahead.
    fn reserve_for(
        &mut self,
        io: &mut dyn Io,
        data_blocks: u32,
        now: Now,
    ) -> Result<(), AppendError> {
        let Some(active) = &self.active else {
            return Err(AppendError::Wait);
        };
        let needed_blocks = self.active_end_blocks(active) + self.blocks_needed(data_blocks);
        let footer_needed = self.footer_bytes_with(active, data_blocks);
        let segment_bytes = self.config.segment_bytes;
        let short_of_records = needed_blocks > active.reserved_blocks;
        let short_of_footer = footer_needed > active.footer_reserved_bytes;
        // Half a step ahead, so that a busy log seldom waits.
        let soon = needed_blocks + self.reserve_blocks / 2 > active.reserved_blocks
            && u64::from(active.reserved_blocks) * BLOCK + active.footer_reserved_bytes
                < segment_bytes;
        if !active.reserving && (short_of_records || short_of_footer || soon) {
            if self.still_full(now) {
                return if short_of_records || short_of_footer {
                    Err(AppendError::NoSpace)
                } else {
                    Ok(())
                };
            }
            let what = if short_of_footer {
                let bytes = (footer_needed * 2)
                    .max(segment_bytes / 128)
                    .min(segment_bytes / 2);
                Reserved::Footer {
                    bytes: bytes.max(footer_needed).next_multiple_of(BLOCK),
                }
            } else {
                let end = needed_blocks.max(active.reserved_blocks) + self.reserve_blocks;
                Reserved::Records {
                    end_blocks: end.min((segment_bytes / BLOCK) as u32),
                }
            };
            self.submit_reserve(io, what);
        }
        if short_of_records || short_of_footer {
            Err(AppendError::Wait)
        } else {
            Ok(())
        }
    }

    fn submit_reserve(&mut self, io: &mut dyn Io, what: Reserved) {
        let segment_bytes = self.config.segment_bytes;
        let active = self
            .active
            .as_mut()
            .expect("reserving for the active segment");
        active.reserving = true;
        let segment = active.segment;
        let (offset_bytes, end) = match what {
            Reserved::Records { end_blocks } => (
                u64::from(active.reserved_blocks.max(1)) * BLOCK,
                u64::from(end_blocks) * BLOCK,
            ),
            Reserved::Footer { bytes } => (
                segment_bytes - bytes,
                segment_bytes - active.footer_reserved_bytes,
            ),
        };
        let op = Op::Reserve {
            offset_bytes,
            len_bytes: end - offset_bytes,
        };
        self.submit(io, segment, op, LogOp::Reserve { segment, what });
    }

    /// Checks that the ring has room for the entry, and memory for it.
    fn back_ring(
        &mut self,
        io: &mut dyn Io,
        data_blocks: u32,
        now: Now,
    ) -> Result<(), AppendError> {
        let end = self.tail + u64::from(self.blocks_needed(data_blocks)) * BLOCK;
        if end - self.written > self.staging.ring_bytes() {
            // What is in the open record must get out, too.
            self.close_record();
            self.write_out(io);
            return if self.still_full(now) {
                Err(AppendError::NoSpace)
            } else {
                Err(AppendError::Wait)
            };
        }
        self.staging.back(self.tail, end).map_err(|error| {
            self.staging_full(&error, now);
            AppendError::NoSpace
        })
    }

    /// Appends a write of `count` blocks from `block`. `fill` gets the memory for the data, all of
    /// which it must write. The checksums are appended to `checksums`.
    pub fn append_data(
        &mut self,
        block: BlockNumber,
        count: u32,
        now: Now,
        checksums: &mut Vec<u32>,
        fill: impl FnOnce(&mut [u8]),
    ) -> Address {
        let entry = Entry {
            block,
            count,
            kind: EntryKind::Data,
        };
        let first = checksums.len();
        self.stage_data(count, checksums, fill);
        self.append_staged(&[entry], &checksums[first..], now)
    }

    /// Puts `count` blocks where those of the next entry go, without committing anything:
    /// [`Self::append_staged`] does, or the next append writes over them. `fill` gets the memory for
    /// the data, all of which it must write. The checksums are appended to `checksums`.
    pub fn stage_data(
        &mut self,
        count: u32,
        checksums: &mut Vec<u32>,
        fill: impl FnOnce(&mut [u8]),
    ) {
        let data = self.uncommitted(count);
        fill(data);
        // Of our copy: the guest may have changed its own meanwhile.
        checksums.extend(data.chunks_exact(BLOCK_BYTES).map(crc32c));
    }

    /// The first `count` blocks that [`Self::stage_data`] put there.
    pub fn uncommitted(&mut self, count: u32) -> &mut [u8] {
        let position = match &self.open {
            Some(open) => open.position + u64::from(1 + open.data_blocks) * BLOCK,
            // The record's header comes first.
            None => self.tail + BLOCK,
        };
        self.filled = self.filled.max(position + u64::from(count) * BLOCK);
        self.staging
            .bytes_mut(position, count as usize * BLOCK_BYTES)
    }

    /// Whether, after a successful [`Self::prepare`], there is room for so many entries with
    /// `data_blocks` blocks of data in all, which are no more than was prepared for.
    #[must_use]
    pub fn fits_staged(&self, entries: u32, data_blocks: u32) -> bool {
        let Some(active) = &self.active else {
            return false;
        };
        let (open_entries, open_blocks) = self
            .open
            .as_ref()
            .map_or((0, 0), |open| (open.entries, open.data_blocks));
        let (entries, blocks) = (open_entries + entries, open_blocks + data_blocks);
        let footer_bytes = active
            .footer
            .footer_bytes_with(FooterBuilder::summary_bytes(entries, blocks));
        let end = self.active_end_blocks(active) + self.blocks_needed(data_blocks);
        fits_in_record(entries, blocks)
            && footer_bytes <= active.footer_reserved_bytes
            && u64::from(end) * BLOCK + footer_bytes <= self.config.segment_bytes
    }

    /// Commits entries, all at once, of which those with data have what was staged, in their order.
    /// Returns the address of the first block of data (without data: where it would be).
    pub fn append_staged(&mut self, entries: &[Entry], checksums: &[u32], now: Now) -> Address {
        let open = self.open_record(now);
        let offset_blocks = open.offset_blocks + 1 + open.data_blocks;
        self.commit_entries(&open, entries, checksums, now);
        Address::new(self.active_segment(), offset_blocks)
    }

    /// Appends a discard or write-zeroes of `count` blocks from `block`. Returns its position.
    pub fn append_unmap(&mut self, block: BlockNumber, count: u32, now: Now) -> Address {
        let open = self.open_record(now);
        let position = Address::new(
            self.active_segment(),
            open.offset_blocks + 1 + open.data_blocks,
        );
        let entry = Entry {
            block,
            count,
            kind: EntryKind::Unmap,
        };
        self.commit_entries(&open, &[entry], &[], now);
        position
    }

    /// Appends a note, encoded ([`crate::segment::Note::encode`]); [`Self::prepare`] has made room for
    /// its blocks. Returns its position.
    ///
    /// It is committed, ordered and made durable as the data of a guest's write is: everything appended
    /// before it is before it after any crash, and a flush begun after it covers it.
    ///
    /// # Panics
    /// If `note` is not whole blocks, at most [`crate::segment::MAX_NOTE_BLOCKS`].
    pub fn append_note(&mut self, note: &[u8], now: Now) -> Address {
        assert!(
            note.len().is_multiple_of(BLOCK_BYTES) && !note.is_empty(),
            "a note is whole blocks"
        );
        let count = (note.len() / BLOCK_BYTES) as u32;
        assert!(count <= MAX_NOTE_BLOCKS, "a note fits one record");
        let entry = Entry {
            block: BlockNumber(0),
            count,
            kind: EntryKind::Note,
        };
        let mut checksums = Vec::new();
        self.stage_data(count, &mut checksums, |data| data.copy_from_slice(note));
        self.append_staged(&[entry], &checksums, now)
    }

    /// The position that an entry appended now gets; follows a successful [`Self::prepare`].
    ///
    /// # Panics
    /// Without one, if there is no segment to append to.
    #[must_use]
    pub fn next_position(&self) -> Address {
        let block = match (&self.open, &self.active) {
            (Some(open), _) => open.offset_blocks + 1 + open.data_blocks,
            // A new record starts with its header.
            (None, Some(active)) => self.active_end_blocks(active) + 1,
            (None, None) => 0,
        };
        Address::new(self.active_segment(), block)
    }

    fn active_segment(&self) -> crate::types::SegmentNumber {
        self.active
            .as_ref()
            .expect("an append follows a successful prepare")
            .segment
    }

    /// The open record; starts one if there is none.
    fn open_record(&mut self, now: Now) -> OpenState {
        if let Some(open) = &self.open {
            return open.clone();
        }
        let active = self
            .active
            .as_ref()
            .expect("an append follows a successful prepare");
        let position = self.tail;
        let offset_blocks = self.active_end_blocks(active);
        let identity = RecordIdentity {
            pool: self.config.pool,
            volume: self.config.volume,
            epoch: self.config.epoch,
            segment: active.segment,
            offset_blocks,
            sequence: self.last.sequence.plus(1),
            previous_checksum: self.last.record_checksum,
        };
        OpenRecord::start(
            self.staging.bytes_mut(position, BLOCK_BYTES),
            &identity,
            self.durable_sequence,
            now.realtime_ns,
        );
        self.staging.set_open(position);
        self.tail += BLOCK;
        self.filled = self.filled.max(self.tail);
        let open = OpenState {
            position,
            offset_blocks,
            entries: 0,
            data_blocks: 0,
        };
        self.open = Some(open.clone());
        open
    }

    /// Writes the entries, then commits them with one store: all of them or none.
    fn commit_entries(&mut self, open: &OpenState, entries: &[Entry], checksums: &[u32], now: Now) {
        let header = self.staging.bytes_mut(open.position, BLOCK_BYTES);
        let mut record = OpenRecord::resume(header);
        let (mut count, mut data_blocks, mut rest) = (open.entries, open.data_blocks, checksums);
        for entry in entries {
            let (own, others) = rest.split_at(entry.data_blocks() as usize);
            record.put_entry(count, entry, data_blocks, own);
            count += 1;
            data_blocks += entry.data_blocks();
            rest = others;
        }
        debug_assert!(rest.is_empty(), "every checksum belongs to an entry");
        self.staging.commit(open.position, count);
        self.tail += u64::from(data_blocks - open.data_blocks) * BLOCK;
        if let Some(record) = &mut self.open {
            record.entries = count;
            record.data_blocks = data_blocks;
        }
        self.last_append_ns = now.monotonic_ns;
        self.dirty_since_ns.get_or_insert(now.monotonic_ns);
    }

    /// Finishes the open record, if there is one; its bytes change no more.
    pub(super) fn close_record(&mut self) {
        let Some(open) = self.open.take() else { return };
        let header = self.staging.bytes_mut(open.position, BLOCK_BYTES);
        OpenRecord::resume(header).close(open.data_blocks);
        let record = Record::parse(header).expect("a record that we closed is valid");
        let active = self
            .active
            .as_mut()
            .expect("an open record is in the active segment");
        let previous_checksum = self.last.record_checksum;
        self.last = LogPosition {
            segment: active.segment,
            end_blocks: open.offset_blocks + 1 + open.data_blocks,
            sequence: record.identity.sequence,
            record_checksum: record.header_checksum,
        };
        active
            .footer
            .push(&RecordSummary::from(record), previous_checksum);
    }
}
