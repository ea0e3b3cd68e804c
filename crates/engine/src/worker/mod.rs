//! Worker threads: each connects the rings of its exports to its volumes and its volumes to disks.
//!
//! Invariants:
//! - A volume and all its exports belong to one worker; nothing of them is shared but guest memory.
//! - A chain that was popped is answered exactly once, and its guest memory stays mapped until then
//!   (each request in flight holds the `Arc` of its table).
//! - Requests in flight are bounded by queue sizes, whatever a guest does to its indices.
//! - A guest that breaks a ring loses that ring; a front-end that takes memory away loses its
//!   session's rings; nobody else notices.
//! - A worker that panics ends the process: its volumes are in an unknown state, and a new daemon
//!   takes over every guest without an error (acknowledged writes are staged outside of it).
//!
//! [`WorkerHandle`] may be used from any thread but the worker's; its calls wait for the worker.
//! Files: `turn` is the loop, `export` rings and their state, `commands` what other threads ask,
//! `disk` what a worker knows of a volume.

mod clock;
mod commands;
mod disk;
mod eventfd;
mod events;
mod export;
mod handle;
mod turn;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use clock::now;
pub use commands::{CommandError, WorkerStats};
pub use disk::{Disk, WorkerIo};
pub use eventfd::EventFd;
pub use events::{Event, Events};
pub use export::{ExportSpec, QueueStart};
pub use handle::{ExportId, VolumeId, WorkerConfig, WorkerHandle};
