//! Writes that find no space: a volume's limit, a full device, and waiting until there is room again.
//!
//! A write finds no space when the volume's segments would take more than its limit, or when the log
//! says that the device or the staging memory is full. It fails then, or, if the volume pauses when it
//! is full, waits here. Unmaps, notes and flushes are never held to the limit: they are how space comes
//! back. Nothing of a write is committed before its space was found, so one that waits, or fails, has
//! changed nothing beyond the pieces that went before.
//!
//! Waiting writes are tried again when something may have made room (a limit was raised, a checkpoint
//! was committed, dead blocks were given back, the device has space), and every [`RETRY_NS`], all of
//! them: a small one may fit where a large one does not. They are requests in flight, and so bounded by
//! the sizes of the queues. While a queue is being stopped nothing waits: its end is waited for.
//!
//! Owned by one volume, called from its worker only.

use std::collections::VecDeque;

use super::{BLOCK, Now, Slot, Volume, VolumeEvent};
use crate::io::Io;
use crate::log::{Log, MAX_ATOMIC_BLOCKS};

/// Waiting writes are tried again this often.
const RETRY_NS: u64 = 100_000_000;
/// A volume that was full has space again when so much fits: the largest piece of a write with its
/// header, so that what was refused is not refused again at once.
const ROOM_BYTES: u64 = (MAX_ATOMIC_BLOCKS as u64 + 1) * BLOCK;

/// What a volume does without space, and who waits for it.
#[derive(Debug, Default)]
pub(super) struct Full {
    limit_bytes: Option<u64>,
    pause: bool,
    /// Queues are being stopped.
    draining: bool,
    /// A write was refused for the limit, and there was no room since.
    reached: bool,
    waiting: VecDeque<Slot>,
    may_be_back: bool,
    /// When waiting writes are tried again in any case; monotonic.
    retry_ns: u64,
}

impl Full {
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Something happened that may have made room.
    pub(super) fn may_be_back(&mut self) {
        self.may_be_back = true;
    }
}

impl Volume {
    /// Bytes that the volume's segments may take on the device; at it, writes find no space.
    pub fn set_limit(&mut self, limit_bytes: Option<u64>) {
        self.full.limit_bytes = limit_bytes;
        self.full.may_be_back();
        self.turn_soon = true;
    }

    /// A write that finds no space waits for it (true) or fails (false).
    pub fn set_pause_when_full(&mut self, pause: bool) {
        self.full.pause = pause;
        self.full.may_be_back();
        self.turn_soon = true;
    }

    /// While queues are being stopped, what finds no space fails, so that they come to an end.
    pub fn set_draining(&mut self, draining: bool) {
        if self.full.draining != draining {
            self.full.draining = draining;
            self.full.may_be_back();
            self.turn_soon = true;
        }
    }

    /// What the volume's segments take on the device, and will when all that is staged is written.
    pub(super) fn allocated_bytes(&self) -> u64 {
        let active = self.log.as_ref().and_then(Log::active_blocks);
        let beyond = active.map_or(0, |(segment, blocks)| {
            blocks.saturating_sub(self.space.used_blocks(segment))
        });
        self.space.totals().allocated_bytes + u64::from(beyond) * BLOCK
    }

    /// Whether so many blocks of data stay within the limit.
    pub(super) fn is_within_limit(&mut self, data_blocks: u32) -> bool {
        let Some(limit_bytes) = self.full.limit_bytes else {
            return true;
        };
        // With the header of a record.
        let needed_bytes = (u64::from(data_blocks) + 1) * BLOCK;
        let within = self.allocated_bytes() + needed_bytes <= limit_bytes;
        if !within && !std::mem::replace(&mut self.full.reached, true) {
            self.events.push(VolumeEvent::VolumeFull { limit_bytes });
        }
        within
    }

    /// A write found no space. True: it waits for it.
    pub(super) fn wait_for_space(&mut self, slot: Slot, now: Now) -> bool {
        let waits = self.full.pause && !self.full.draining && !self.closing;
        if waits {
            if self.full.waiting.is_empty() {
                self.full.retry_ns = now.monotonic_ns + RETRY_NS;
            }
            self.full.waiting.push_back(slot);
        }
        waits
    }

    /// Whether writes are refused or wait because there is no space.
    pub(super) fn is_short_of_space(&self) -> bool {
        self.full.reached
            || !self.full.waiting.is_empty()
            || self.log.as_ref().is_some_and(Log::is_full)
    }

    /// Tries waiting writes again when there may be room. Called once a turn.
    pub(super) fn retry_waiting_space(&mut self, io: &mut dyn Io, now: Now) {
        if self.full.reached {
            let room = |limit| self.allocated_bytes() + ROOM_BYTES <= limit;
            if self.full.limit_bytes.is_none_or(room) {
                self.full.reached = false;
                self.full.may_be_back();
                self.events.push(VolumeEvent::VolumeSpaceBack);
            }
        }
        if self.full.waiting.is_empty() {
            self.full.may_be_back = false;
            return;
        }
        let ended = self.closing || self.log.as_ref().is_none_or(|log| log.failure().is_some());
        if !std::mem::take(&mut self.full.may_be_back)
            && now.monotonic_ns < self.full.retry_ns
            && !ended
        {
            return;
        }
        self.full.retry_ns = now.monotonic_ns + RETRY_NS;
        for _ in 0..self.full.waiting.len() {
            if let Some(slot) = self.full.waiting.pop_front() {
                self.run(io, slot, now);
            }
        }
    }

    /// When waiting writes are tried again; monotonic.
    pub(super) fn space_retry_ns(&self) -> Option<u64> {
        (!self.full.waiting.is_empty()).then_some(self.full.retry_ns)
    }
}
