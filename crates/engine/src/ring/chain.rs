//! A descriptor chain whose every descriptor has been checked and translated.
//!
//! Readable pieces come before writable ones (virtio 1.3, 2.7.4.2), so one list and a split point
//! hold both. A worker keeps one chain and fills it again for each request: no allocation on the
//! common path. The pieces are valid while the memory table of the queue that filled it is alive.

use crate::io::IoBuf;

/// Pieces of one chain. A driver that honours our SEG_MAX needs 128; the bound is what one
/// vectored I/O takes.
pub const MAX_CHAIN_PIECES: usize = 1024;

/// A parsed chain; see `SplitQueue::pop`.
#[derive(Debug, Default)]
pub struct Chain {
    pub(super) head: u16,
    pub(super) pieces: Vec<IoBuf>,
    pub(super) readable_pieces: usize,
    pub(super) readable_bytes: u64,
    pub(super) writable_bytes: u64,
}

impl Chain {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn reset(&mut self, head: u16) {
        self.head = head;
        self.pieces.clear();
        self.readable_pieces = 0;
        self.readable_bytes = 0;
        self.writable_bytes = 0;
    }

    /// Index of the chain's first descriptor; names the chain in the used ring.
    #[must_use]
    pub const fn head(&self) -> u16 {
        self.head
    }

    /// What the driver wrote for us.
    #[must_use]
    pub fn readable(&self) -> &[IoBuf] {
        &self.pieces[..self.readable_pieces]
    }

    /// Where the driver wants our answer.
    #[must_use]
    pub fn writable(&self) -> &[IoBuf] {
        &self.pieces[self.readable_pieces..]
    }

    #[must_use]
    pub const fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    #[must_use]
    pub const fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }
}
