//! Sealing: a full segment gets its footer, in the background.
//!
//! Ordering argument: the footer is written only when `durable` has passed the segment's last record,
//! and it counts (the segment is reported sealed) only after a sync of its own. A crash in between
//! leaves a segment without a valid footer, whose records recovery reads one by one.

use std::io;

use super::{Log, LogEvent, LogOp, Now, SealStage, Sealing, is_full};
use crate::io::{Io, Op};
use crate::types::{BLOCK_BYTES, SegmentNumber};

impl Log {
    /// Retires the active segment; its record must be closed. The next append opens another.
    pub(super) fn begin_seal(&mut self) {
        debug_assert!(
            self.open.is_none(),
            "a segment is retired behind a closed record"
        );
        let Some(active) = self.active.take() else {
            return;
        };
        assert!(
            !active.footer.is_empty(),
            "a segment is retired when it is full, so not empty"
        );
        let (footer_at, footer) = active.footer.finish(
            self.config.pool,
            self.config.volume,
            active.segment,
            self.config.epoch,
            self.config.segment_bytes,
        );
        self.events.push(LogEvent::Retired {
            segment: active.segment,
            end_blocks: self.last.end_blocks,
        });
        self.sealing.push_back(Sealing {
            segment: active.segment,
            end: self.tail,
            end_blocks: self.last.end_blocks,
            footer_at,
            footer,
            stage: SealStage::WaitDurable,
        });
        self.request_flush();
    }

    pub(super) fn drive_seals(&mut self, io: &mut dyn Io) {
        for i in 0..self.sealing.len() {
            let sealing = &mut self.sealing[i];
            if !matches!(sealing.stage, SealStage::WaitDurable) || sealing.end > self.durable {
                continue;
            }
            sealing.stage = SealStage::Writing;
            // SAFETY: the buffer stays in `sealing` until its write has completed, and a log is not
            // dropped with operations in flight.
            let buf = unsafe { sealing.footer.io_buf() };
            let (segment, offset_bytes) = (sealing.segment, sealing.footer_at);
            let op = Op::Write {
                offset_bytes,
                bufs: vec![buf],
                direct: true,
            };
            self.submit(io, segment, op, LogOp::Footer { segment });
        }
    }

    pub(super) fn footer_written(
        &mut self,
        io: &mut dyn Io,
        segment: SegmentNumber,
        result: io::Result<usize>,
        now: Now,
    ) {
        let stage = match result {
            Ok(bytes) => {
                self.written_bytes += bytes as u64;
                self.submit(io, segment, Op::Sync, LogOp::FooterSync { segment });
                SealStage::Syncing
            }
            Err(error) if is_full(&error) => {
                // Where space cannot be reserved: the footer is tried again with the next flush.
                self.device_full(now);
                SealStage::WaitDurable
            }
            Err(error) => return self.fail("writing the footer of", segment, &error),
        };
        if let Some(sealing) = self.sealing.iter_mut().find(|s| s.segment == segment) {
            sealing.stage = stage;
        }
    }

    pub(super) fn footer_synced(
        &mut self,
        io: &mut dyn Io,
        segment: SegmentNumber,
        result: io::Result<usize>,
    ) {
        if let Err(error) = result {
            return self.fail("syncing the footer of", segment, &error);
        }
        let Some(at) = self
            .sealing
            .iter()
            .position(|sealing| sealing.segment == segment)
        else {
            return;
        };
        let Some(sealing) = self.sealing.remove(at) else {
            return;
        };
        // Reserved space between the last record and the footer goes back.
        let end_bytes = u64::from(sealing.end_blocks) * BLOCK_BYTES as u64;
        if end_bytes < sealing.footer_at {
            let op = Op::release(end_bytes..sealing.footer_at);
            self.submit(io, segment, op, LogOp::Tidy);
        }
        self.events.push(LogEvent::Sealed {
            segment,
            end_blocks: sealing.end_blocks,
        });
    }

    /// Begins to end the log: everything durable, the active segment sealed, unused segments gone.
    /// [`Self::closed`] tells when it is done.
    pub fn start_close(&mut self, io: &mut dyn Io) {
        self.closing = true;
        self.close_record();
        self.request_flush();
        if let Some(spare) = self.spare.take() {
            self.submit(io, spare, Op::Remove, LogOp::Tidy);
        }
        match &self.active {
            Some(active) if active.footer.is_empty() => {
                let segment = active.segment;
                self.active = None;
                self.events.push(LogEvent::Abandoned(segment));
                self.submit(io, segment, Op::Remove, LogOp::Tidy);
            }
            Some(_) => self.begin_seal(),
            None => {}
        }
    }

    /// Whether a log that is being closed has nothing left to do.
    #[must_use]
    pub fn closed(&self) -> bool {
        self.closing
            && self.idle()
            && (self.failed.is_some() || (self.sealing.is_empty() && self.durable >= self.tail))
    }

    /// Ends the log: the staging file goes, unless something in it is not durable.
    ///
    /// # Errors
    /// What the file system says; the failure of the log.
    pub fn finish(self) -> io::Result<()> {
        match self.failed {
            Some(reason) => Err(io::Error::other(reason)),
            None => self.staging.remove(),
        }
    }
}
