//! From the ring to the device: writes, flushes.
//!
//! Ordering argument for a flush: its target is the log's end when it began. Writes of everything
//! before the target complete first; then every segment written since its last sync is synced; only
//! then does `durable` move to the target. The sync is submitted after the writes' completions were
//! seen, which is what [`crate::io`] promises durability for. Writes that complete while the syncs run
//! mark their segments for the next flush.

use std::io;

use super::{
    BLOCK, FlushStage, Log, LogOp, Now, RESERVE_LEAST_BLOCKS, Reserved, WriteRange, WriteState,
    is_full,
};
use crate::io::{Io, Op};
use crate::types::SegmentNumber;

impl Log {
    /// Asks that everything committed so far becomes durable. Compare [`Self::durable`] with
    /// [`Self::tail`] of now to learn when it is.
    pub fn request_flush(&mut self) {
        self.flush_wanted = self.flush_wanted.max(self.tail);
    }

    /// Whether a flush was given up because the device is full, since the last call: whoever waits for
    /// one must be told that it failed. What was committed stays staged, and is written later.
    pub fn take_flush_refused(&mut self) -> bool {
        std::mem::take(&mut self.flush_refused)
    }

    /// End of the closed records.
    fn closed_end(&self) -> u64 {
        self.open.as_ref().map_or(self.tail, |open| open.position)
    }

    /// Submits writes for closed records that are not on their way yet.
    pub(super) fn write_out(&mut self, io: &mut dyn Io) {
        let end = self.closed_end();
        while self.queued < end {
            let at = self
                .spans
                .iter()
                .rposition(|span| span.start <= self.queued)
                .expect("the ring's spans cover what is not written");
            let (span, next) = (self.spans[at], self.spans.get(at + 1));
            // Block 0 was written when the segment was made.
            let start = self.queued.max(span.start + BLOCK);
            let stop = next.map_or(end, |next| next.start.min(end));
            self.queued = stop;
            if start < stop {
                let range = WriteRange {
                    start,
                    end: stop,
                    segment: span.segment,
                    state: WriteState::InFlight,
                };
                self.writes.push_back(range);
                self.submit_write(io, range);
            } else if self.writes.is_empty() {
                self.written = self.queued;
            }
        }
    }

    fn submit_write(&mut self, io: &mut dyn Io, range: WriteRange) {
        let WriteRange {
            start,
            end,
            segment,
            ..
        } = range;
        let span = self
            .spans
            .iter()
            .rfind(|span| span.segment == segment)
            .expect("the ring's spans cover what is not written");
        let offset_bytes = start - span.start;
        // SAFETY: the ring lives as long as the log, which is not dropped with operations in flight;
        // closed records are not written to until `written` has passed them.
        let buf = unsafe { self.staging.io_buf(start, (end - start) as usize) };
        let op = Op::Write {
            offset_bytes,
            bufs: vec![buf],
            direct: true,
        };
        self.submit(
            io,
            segment,
            op,
            LogOp::Write {
                start,
                end,
                segment,
            },
        );
    }

    pub(super) fn wrote(
        &mut self,
        start: u64,
        end: u64,
        segment: SegmentNumber,
        result: io::Result<usize>,
        now: Now,
    ) {
        let state = match result {
            Ok(_) => {
                self.written_bytes += end - start;
                self.unsynced.insert(segment);
                WriteState::Done
            }
            Err(error) if is_full(&error) => {
                // Only where space cannot be reserved. Nothing is lost: the ring has it.
                self.device_full(now);
                self.refuse_flush(now);
                WriteState::Refused
            }
            Err(error) => return self.fail("writing", segment, &error),
        };
        for write in &mut self.writes {
            if (write.start, write.end) == (start, end) {
                write.state = state;
            }
        }
        while let Some(write) = self
            .writes
            .pop_front_if(|write| write.state == WriteState::Done)
        {
            self.written = write.end;
        }
        if self.writes.is_empty() {
            self.written = self.queued;
        }
        self.staging.set_written(self.written);
    }

    fn refuse_flush(&mut self, now: Now) {
        self.dirty_since_ns.get_or_insert(now.monotonic_ns);
        self.flush = FlushStage::Idle;
        self.flush_wanted = self.durable;
        self.flush_refused = true;
    }

    /// Writes again what the full device refused, when it is time.
    pub(super) fn retry_refused(&mut self, io: &mut dyn Io, now: Now) {
        if self.still_full(now) || !self.writes.iter().any(|w| w.state == WriteState::Refused) {
            return;
        }
        for i in 0..self.writes.len() {
            if self.writes[i].state == WriteState::Refused {
                self.writes[i].state = WriteState::InFlight;
                self.submit_write(io, self.writes[i]);
            }
        }
    }

    /// Takes the flush's next step.
    pub(super) fn drive_flush(&mut self, io: &mut dyn Io) {
        loop {
            match self.flush {
                FlushStage::Idle if self.flush_wanted > self.durable => {
                    // Everything committed by now rides along.
                    self.close_record();
                    self.write_out(io);
                    self.dirty_since_ns = None;
                    self.flush = FlushStage::Writing(self.closed_end(), self.last.sequence);
                }
                FlushStage::Writing(target, sequence) if self.written >= target => {
                    let segments = std::mem::take(&mut self.unsynced);
                    self.flush = FlushStage::Syncing(target, sequence, segments.len());
                    for segment in segments {
                        self.submit(io, segment, Op::Sync, LogOp::Sync { segment });
                    }
                }
                FlushStage::Syncing(target, sequence, 0) => {
                    self.durable = target;
                    self.durable_sequence = sequence;
                    self.flush = FlushStage::Idle;
                }
                _ => return,
            }
        }
    }

    pub(super) fn synced(&mut self, segment: SegmentNumber, result: io::Result<usize>) {
        if let Err(error) = result {
            return self.fail("syncing", segment, &error);
        }
        if let FlushStage::Syncing(_, _, waiting) = &mut self.flush {
            *waiting -= 1;
        }
    }

    pub(super) fn created(
        &mut self,
        io: &mut dyn Io,
        segment: SegmentNumber,
        result: io::Result<usize>,
        now: Now,
    ) {
        self.creating = false;
        match result {
            Ok(_) if self.closing => self.submit(io, segment, Op::Remove, LogOp::Tidy),
            Ok(_) => {
                self.device_has_space();
                self.spare = Some(segment);
            }
            Err(error) if is_full(&error) => self.device_full(now),
            Err(error) => self.fail("creating", segment, &error),
        }
    }

    pub(super) fn reserved(
        &mut self,
        segment: SegmentNumber,
        what: Reserved,
        result: io::Result<usize>,
        now: Now,
    ) {
        let Some(active) = self
            .active
            .as_mut()
            .filter(|active| active.segment == segment)
        else {
            return;
        };
        active.reserving = false;
        match (result, what) {
            (Ok(_), Reserved::Records { end_blocks }) => {
                active.reserved_blocks = end_blocks;
                self.device_has_space();
            }
            (Ok(_), Reserved::Footer { bytes }) => {
                active.footer_reserved_bytes = bytes;
                self.device_has_space();
            }
            (Err(error), _) if is_full(&error) => {
                if self.reserve_blocks > RESERVE_LEAST_BLOCKS {
                    // Nearly full: there may be room for less.
                    self.reserve_blocks = RESERVE_LEAST_BLOCKS;
                } else {
                    self.device_full(now);
                }
            }
            (Err(error), _) => self.fail("reserving space in", segment, &error),
        }
    }
}
