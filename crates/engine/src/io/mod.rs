//! Asynchronous segment I/O: one trait, an io_uring implementation for real devices and a
//! simulated one for crash tests. Everything the engine does to a disk goes through here.
//!
//! Invariants:
//! - Every submitted operation completes exactly once, in any order.
//! - Operations are unordered unless the submitter waits for a completion in between. The one
//!   promise: when [`Op::Sync`] completes with success, every write to and release in that
//!   segment whose completion the submitter had seen *before submitting the sync* is durable.
//! - An implementation belongs to one thread.

mod blocking;
mod buffer;
pub mod sim;
mod tokens;
mod uring;

pub use blocking::BlockingIo;
pub use buffer::{AlignedBuf, IoBuf};
pub use tokens::Tokens;
pub use uring::{UringIo, WatchId};

use std::io;
use std::ops::Range;
use std::time::Duration;

use crate::types::SegmentNumber;

/// A device registered with the engine; an index into its device table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// The segment of a device that an operation works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    pub device: DeviceId,
    pub segment: SegmentNumber,
}

/// Chosen by the submitter, handed back with the completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// One operation. Buffers are scatter/gather lists; see [`IoBuf`] for who keeps them alive.
#[derive(Debug)]
pub enum Op {
    /// Reads into `bufs` from `offset_bytes`. A read past the end of the segment completes short.
    Read { offset_bytes: u64, bufs: Vec<IoBuf> },
    /// Writes `bufs` at `offset_bytes`. `direct` asks for O_DIRECT: offset, lengths and buffer
    /// addresses are then multiples of 4 KiB. A short write is carried on by the implementation:
    /// the completion is for the whole or an error.
    Write {
        offset_bytes: u64,
        bufs: Vec<IoBuf>,
        direct: bool,
    },
    /// Makes completed writes durable (fdatasync).
    Sync,
    /// Creates the segment with `header` as its first block; both the block and the segment's
    /// existence are durable when it completes. Fails with `AlreadyExists` if it exists.
    Create { header: Box<AlignedBuf> },
    /// Allocates space for the byte range so that writes into it cannot fail for lack of space.
    /// `StorageFull` when there is none, or only what is kept for checkpoints; devices that cannot
    /// allocate ahead complete at once.
    Reserve { offset_bytes: u64, len_bytes: u64 },
    /// Gives the space of byte ranges back (punches holes); reads of them yield zeroes after. It is
    /// done one range after the other, so that reads of the segment get in between, and never waited
    /// for on the submitting thread. After an error some of it may be done. Like a write, it may come
    /// undone in a crash, block by block, until a [`Op::Sync`] submitted after its completion is done.
    Release { ranges: Vec<Range<u64>> },
    /// Removes the segment, durably. Completes with success if it is not there.
    Remove,
}

impl Op {
    /// Gives the space of one range back.
    #[must_use]
    pub fn release(range: Range<u64>) -> Self {
        Self::Release {
            ranges: vec![range],
        }
    }
}

/// The outcome of one operation.
#[derive(Debug)]
pub struct Completion {
    pub token: Token,
    /// Bytes transferred for reads and writes, 0 otherwise.
    pub result: io::Result<usize>,
}

/// A queue of operations to devices and of their completions.
pub trait Io {
    /// Queues an operation. Never blocks and never fails: errors come as completions.
    fn submit(&mut self, token: Token, target: Target, op: Op);

    /// Hands queued operations to the device and appends what has completed to `out`, without
    /// blocking.
    fn poll(&mut self, out: &mut Vec<Completion>);

    /// As `poll`, but sleeps until something completes, an external wake-up comes (see the
    /// implementation), or `timeout` passes (`None`: no limit).
    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completion>);

    /// Operations submitted and not yet handed back by `poll` or `wait`.
    fn in_flight(&self) -> usize;
}
