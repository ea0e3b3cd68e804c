//! What a simulated disk is told to do wrong, and the record of what it was asked to do.

use std::ops::Range;
use std::sync::Arc;

use super::rng::SimRng;
use crate::types::SegmentNumber;

/// Kinds of operations, as [`crate::io::Op`] has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpKind {
    Read,
    Write,
    Sync,
    Create,
    Reserve,
    Release,
    Remove,
}

/// What goes wrong with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this errno. A write or a release may have been done in part; after a failed sync, data
    /// that was not durable may never be, whatever later syncs say, as with real kernels.
    Error(i32),
    /// One bit of what is read or written is wrong; reads only this once.
    FlipBit,
    /// The data comes from or goes to this place of the segment instead.
    Misdirect { offset_bytes: u64 },
    /// It succeeds and nothing was done: a lying disk.
    Lost,
}

/// When a fault happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// Once, at the nth matching operation submitted from now on, counted from 0.
    Nth(u64),
    /// At each matching operation with this probability (0.0 to 1.0).
    Probability(f64),
}

/// A fault and the operations it befalls.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FaultRule {
    /// `None`: all kinds.
    pub kind: Option<OpKind>,
    /// `None`: all segments.
    pub segment: Option<SegmentNumber>,
    pub when: When,
    pub fault: Fault,
}

impl FaultRule {
    /// Whether the fault happens to this operation; counts it.
    pub(super) fn strikes(
        &mut self,
        kind: OpKind,
        segment: SegmentNumber,
        rng: &mut SimRng,
    ) -> bool {
        if self.kind.is_some_and(|wanted| wanted != kind)
            || self.segment.is_some_and(|wanted| wanted != segment)
        {
            return false;
        }
        match &mut self.when {
            When::Probability(probability) => rng.chance(*probability),
            When::Nth(0) => {
                // Never again.
                self.when = When::Probability(0.0);
                true
            }
            When::Nth(left) => {
                *left -= 1;
                false
            }
        }
    }
}

/// What happened at a simulated disk, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SimEvent {
    Submitted {
        /// Counts the operations of the disk.
        id: u64,
        segment: SegmentNumber,
        op: SimOp,
    },
    Completed {
        id: u64,
        /// Bytes, or an errno.
        result: Result<usize, i32>,
    },
}

/// An operation as it is recorded: with a copy of what was to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SimOp {
    Read {
        offset_bytes: u64,
        len_bytes: usize,
    },
    Write {
        offset_bytes: u64,
        data: Arc<[u8]>,
        direct: bool,
    },
    Sync,
    Create {
        header: Arc<[u8]>,
    },
    Reserve {
        offset_bytes: u64,
        len_bytes: u64,
    },
    Release {
        ranges: Vec<Range<u64>>,
    },
    Remove,
}

impl SimOp {
    #[must_use]
    pub const fn kind(&self) -> OpKind {
        match self {
            Self::Read { .. } => OpKind::Read,
            Self::Write { .. } => OpKind::Write,
            Self::Sync => OpKind::Sync,
            Self::Create { .. } => OpKind::Create,
            Self::Reserve { .. } => OpKind::Reserve,
            Self::Release { .. } => OpKind::Release,
            Self::Remove => OpKind::Remove,
        }
    }
}
