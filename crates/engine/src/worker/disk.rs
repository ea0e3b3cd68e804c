//! What a worker knows of a volume and of its I/O: two small interfaces, so that the loop can be
//! tested with a disk in memory.

use std::io;
use std::os::fd::BorrowedFd;

use crate::io::{Completion, Io};
use crate::volume::{Finished, Now, Request};

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
    fn start_checkpoint(&mut self, io: &mut dyn Io);
    fn take_checkpoint(&mut self) -> Option<Result<Self::Checkpoint, Self::Error>>;
    fn checkpoint_committed(&mut self, io: &mut dyn Io, id: u64);
    fn checkpoint_failed(&mut self, id: u64);
    fn start_close(&mut self, io: &mut dyn Io);
    fn take_closed(&mut self) -> Option<Result<Option<Self::Checkpoint>, Self::Error>>;
    fn resize(&mut self, size_bytes: u64);
    fn size_bytes(&self) -> u64;
    fn stats(&self) -> Self::Stats;
    fn take_events(&mut self, out: &mut Vec<Self::Event>);
}

/// An [`Io`] whose `wait` also returns when a watched eventfd becomes readable.
pub trait WorkerIo: Io + 'static {
    /// `fd` stays open until `unwatch`. An id is used once.
    fn watch(&mut self, fd: BorrowedFd<'_>, id: u64) -> io::Result<()>;
    fn unwatch(&mut self, id: u64);
    /// Appends the ids whose eventfds became readable since the last call.
    fn take_fired(&mut self, out: &mut Vec<u64>);
}
