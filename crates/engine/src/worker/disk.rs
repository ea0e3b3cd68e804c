//! What a worker knows of a volume and of its I/O: two small interfaces, so that the loop can be
//! tested with a disk in memory.

use std::io;
use std::os::fd::BorrowedFd;

use crate::io::{Completion, Io, UringIo, WatchId};
use crate::volume::{
    CheckpointResult, Finished, Now, Request, Volume, VolumeError, VolumeEvent, VolumeStats,
};

/// A volume as a worker drives it; `volume::Volume` in the daemon. I/O tokens are from
/// `token_base` to `token_base + (1 << 40)`.
pub trait Disk: Send + 'static {
    type Checkpoint: Send + 'static;
    type Error: Send + 'static;
    type Event: Send + 'static;
    type Stats: Send + 'static;

    fn attach(&mut self, token_base: u64);
    fn submit(&mut self, io: &mut dyn Io, request: Request, now: Now);
    fn on_completion(&mut self, io: &mut dyn Io, completion: Completion, now: Now);
    /// Once after each batch: write-out decisions, timers.
    fn advance(&mut self, io: &mut dyn Io, now: Now);
    fn take_finished(&mut self, out: &mut Vec<Finished>);
    /// Monotonic time at which `advance` wants to be called.
    fn deadline_ns(&self) -> Option<u64>;
    fn start_checkpoint(&mut self);
    fn take_checkpoint(&mut self) -> Option<Result<Self::Checkpoint, Self::Error>>;
    fn checkpoint_committed(&mut self, id: u64);
    fn checkpoint_failed(&mut self, id: u64);
    fn start_close(&mut self, io: &mut dyn Io);
    fn take_closed(&mut self) -> Option<Result<Option<Self::Checkpoint>, Self::Error>>;
    /// After a close that went well: nothing of it is in flight any more.
    fn is_closed(&self) -> bool;
    fn resize(&mut self, size_bytes: u64);
    /// Whether queues are being stopped: requests must come to an end soon.
    fn set_draining(&mut self, draining: bool);
    fn size_bytes(&self) -> u64;
    fn stats(&self) -> Self::Stats;
    fn take_events(&mut self, out: &mut Vec<Self::Event>);
}

/// An [`Io`] whose `wait` also returns when a watched eventfd becomes readable.
pub trait WorkerIo: Io + 'static {
    /// `fd` stays open until `unwatch`. An id is used once.
    fn watch(&mut self, fd: BorrowedFd<'_>, id: WatchId) -> io::Result<()>;
    fn unwatch(&mut self, id: WatchId);
    /// Appends the ids whose eventfds became readable since the last call.
    fn take_fired(&mut self, out: &mut Vec<WatchId>);
}

impl Disk for Volume {
    type Checkpoint = CheckpointResult;
    type Error = VolumeError;
    type Event = VolumeEvent;
    type Stats = VolumeStats;

    fn attach(&mut self, token_base: u64) {
        Self::attach(self, token_base);
    }

    fn submit(&mut self, io: &mut dyn Io, request: Request, now: Now) {
        Self::submit(self, io, request, now);
    }

    fn on_completion(&mut self, io: &mut dyn Io, completion: Completion, now: Now) {
        Self::on_completion(self, io, completion, now);
    }

    fn advance(&mut self, io: &mut dyn Io, now: Now) {
        Self::advance(self, io, now);
    }

    fn take_finished(&mut self, out: &mut Vec<Finished>) {
        Self::take_finished(self, out);
    }

    fn deadline_ns(&self) -> Option<u64> {
        Self::deadline_ns(self)
    }

    fn start_checkpoint(&mut self) {
        Self::start_checkpoint(self);
    }

    fn take_checkpoint(&mut self) -> Option<Result<CheckpointResult, VolumeError>> {
        Self::take_checkpoint(self)
    }

    fn checkpoint_committed(&mut self, id: u64) {
        Self::checkpoint_committed(self, id);
    }

    fn checkpoint_failed(&mut self, id: u64) {
        Self::checkpoint_failed(self, id);
    }

    fn start_close(&mut self, io: &mut dyn Io) {
        Self::start_close(self, io);
    }

    fn take_closed(&mut self) -> Option<Result<Option<CheckpointResult>, VolumeError>> {
        Self::take_closed(self)
    }

    fn is_closed(&self) -> bool {
        Self::is_closed(self)
    }

    fn resize(&mut self, size_bytes: u64) {
        Self::resize(self, size_bytes);
    }

    fn set_draining(&mut self, draining: bool) {
        Self::set_draining(self, draining);
    }

    fn size_bytes(&self) -> u64 {
        Self::size_bytes(self)
    }

    fn stats(&self) -> VolumeStats {
        Self::stats(self)
    }

    fn take_events(&mut self, out: &mut Vec<VolumeEvent>) {
        Self::take_events(self, out);
    }
}

impl WorkerIo for UringIo {
    fn watch(&mut self, fd: BorrowedFd<'_>, id: WatchId) -> io::Result<()> {
        Self::watch(self, fd, id)
    }

    fn unwatch(&mut self, id: WatchId) {
        Self::unwatch(self, id);
    }

    fn take_fired(&mut self, out: &mut Vec<WatchId>) {
        Self::take_fired(self, out);
    }
}
