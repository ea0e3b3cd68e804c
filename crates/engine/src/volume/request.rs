//! What can be asked of a volume, and how it ends.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::note::{NewSnapshot, NotedAt};
use crate::io::IoBuf;

/// Chosen by whoever submits a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u64);

/// What a request asks. Offsets and lengths are multiples of 512, inside the volume; the submitter has
/// checked that against [`super::Volume::size_bytes`].
#[derive(Debug)]
pub enum RequestKind {
    Read {
        offset_bytes: u64,
        into: Vec<IoBuf>,
    },
    Write {
        offset_bytes: u64,
        from: Vec<IoBuf>,
    },
    Flush,
    /// Discard (`exact` false: parts of blocks may be left alone) or write-zeroes (`exact` true).
    Unmap {
        offset_bytes: u64,
        len_bytes: u64,
        exact: bool,
    },
    /// Takes a snapshot. It is over when the snapshot is durable.
    Snapshot {
        snapshot: NewSnapshot,
        at: NotedAt,
    },
    /// Puts a state note into the log, and keeps it as [`super::Volume::set_state_note`] does.
    StateNote {
        payload: Vec<u8>,
        at: NotedAt,
    },
    /// Copies what the range has in other volumes' segments into this volume's log; whole blocks. The
    /// bytes copied are added to `copied`.
    Adopt {
        offset_bytes: u64,
        len_bytes: u64,
        copied: Arc<AtomicU64>,
    },
}

/// A request. The memory it names stays mapped until it is finished.
#[derive(Debug)]
pub struct Request {
    pub id: RequestId,
    pub kind: RequestKind,
    /// It finishes only when what it changed is durable.
    pub write_through: bool,
}

/// A request failed; the guest is told IOERR, the log why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestFailed {
    /// The device or the staging memory is full.
    NoSpace,
    /// Data could not be read, or not as it was written.
    Damaged,
    /// The volume's log has failed, or the volume is read-only.
    NotWritable,
    /// A flush could not make everything durable.
    NotDurable,
    /// [`super::MAX_PENDING_SNAPSHOTS`] wait for a checkpoint.
    SnapshotsPending,
    /// A note is larger than an entry of the log can be.
    NoteTooLarge,
}

/// A request is over.
#[derive(Debug)]
pub struct Finished {
    pub id: RequestId,
    pub result: Result<(), RequestFailed>,
}
