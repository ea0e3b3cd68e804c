//! What committed roots differ in, and what only one of them reaches: for `snapshot diff`, for the
//! accounting of space, and for the removal of snapshots.
//!
//! These run on the caller's thread with an `Io` of its own and may wait; guests do not notice. The roots
//! stay readable meanwhile because somebody pins them: a snapshot its own, and [`Volume::hold_nodes`]
//! those of checkpoints of the head.
//!
//! [`Volume::hold_nodes`]: super::Volume::hold_nodes

use std::collections::BTreeSet;
use std::io;
use std::ops::{ControlFlow, Range};

use super::BLOCK;
use crate::io::{BlockingIo, DeviceId, Io};
use crate::map::walk::{self, Reached, WalkError};
use crate::map::{Displaced, NodeLocation};
use crate::types::{BlockNumber, SegmentNumber};

/// Extents handed on at a time.
const BATCH: usize = 16384;

/// A walk met a node that it cannot do without.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    #[error("{0}; run a check with --repair on the pool")]
    Node(#[from] WalkError<io::Error>),
    /// Of the root itself; it may be readable the next time.
    #[error("a map node cannot be read: {0}; look after the device, and try again")]
    Read(io::Error),
}

/// A range of blocks that two roots differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    pub block: BlockNumber,
    pub count: u64,
    /// Whether the newer root maps it.
    pub mapped: bool,
}

/// What a root alone reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exclusive {
    pub blocks: u64,
    pub node_bytes: u64,
    /// A node of the root could not be read: what lies below it is not counted.
    pub incomplete: bool,
}

fn source(mut io: BlockingIo<'_>) -> impl FnMut(NodeLocation) -> io::Result<Vec<u8>> {
    move |location| {
        let len = location.len_bytes as usize;
        let (buffer, got) = io.read(location.segment, u64::from(location.offset_bytes), len)?;
        Ok(buffer[..got.min(len)].to_vec())
    }
}

/// Ranges in `range` (blocks) that two roots differ in, ascending: at most `limit`, and where to go on if
/// there are more. `old` without a root: everything that `new` maps.
///
/// # Errors
/// A node cannot be read.
pub fn difference(
    io: &mut dyn Io,
    device: DeviceId,
    old: Option<NodeLocation>,
    new: Option<NodeLocation>,
    range: Range<BlockNumber>,
    limit: usize,
) -> Result<(Vec<Difference>, Option<BlockNumber>), RootsError> {
    let mut found = Vec::new();
    let mut next = None;
    let mut source = source(BlockingIo::new(io, device));
    let visit = |block, count, mapped| {
        if found.len() >= limit {
            next = Some(block);
            return ControlFlow::Break(());
        }
        found.push(Difference {
            block,
            count,
            mapped,
        });
        ControlFlow::Continue(())
    };
    // Which way it ended, `next` says.
    let _ = walk::difference(&mut source, old, new, range, visit)?;
    Ok((found, next))
}

/// What `root` reaches and none of the `others` does. Blocks are handed to `blocks` in batches as they are
/// found; the nodes at the end, in one list.
///
/// A node of `root` that is gone or damaged is no error, and the walk goes on beside it: in a removal that
/// is repeated after a crash, nodes are gone that died as the head replaced them, or in an earlier run.
///
/// # Errors
/// A node of the others cannot be read: whether they reach a block is not known. Or the device failed to
/// read a node of `root` that is there.
pub fn exclusive(
    io: &mut dyn Io,
    device: DeviceId,
    root: Option<NodeLocation>,
    others: &[Option<NodeLocation>],
    mut blocks: impl FnMut(Vec<Displaced>),
) -> Result<(Exclusive, Vec<NodeLocation>), RootsError> {
    let mut total = Exclusive::default();
    let mut nodes = Vec::new();
    let mut batch = Vec::new();
    let mut read = source(BlockingIo::new(io, device));
    let mut unreadable = None;
    let mut source = |location| {
        let node = read(location);
        if let Err(error) = &node
            && error.kind() != io::ErrorKind::NotFound
        {
            unreadable = Some(io::Error::new(error.kind(), error.to_string()));
        }
        node
    };
    let walked = walk::exclusive(&mut source, root, others, |reached| {
        match reached {
            Reached::Node(node) => {
                total.node_bytes += u64::from(node.len_bytes);
                nodes.push(node);
            }
            Reached::Blocks(extent) => {
                total.blocks += u64::from(extent.count);
                batch.push(extent);
                if batch.len() >= BATCH {
                    blocks(std::mem::take(&mut batch));
                }
            }
            Reached::Lost(_) => total.incomplete = true,
        }
        ControlFlow::Continue(())
    });
    if !batch.is_empty() {
        blocks(batch);
    }
    // It has no reason to end early.
    let _ = walked?;
    match unreadable {
        Some(error) if total.incomplete => Err(RootsError::Read(error)),
        _ => Ok((total, nodes)),
    }
}

/// Blocks that a root maps to segments other than `own`.
///
/// # Errors
/// A node cannot be read.
pub fn foreign_blocks(
    io: &mut dyn Io,
    device: DeviceId,
    root: Option<NodeLocation>,
    own: &BTreeSet<SegmentNumber>,
) -> Result<u64, RootsError> {
    let mut foreign = 0;
    let mut source = source(BlockingIo::new(io, device));
    // It has no reason to end early.
    let _ = walk::mark(&mut source, &[root], |reached| {
        if let Reached::Blocks(extent) = reached
            && !own.contains(&extent.address.segment())
        {
            foreign += u64::from(extent.count);
        }
        ControlFlow::Continue(())
    })?;
    Ok(foreign)
}

/// Blocks of a range of bytes, as far as they are inside.
#[must_use]
pub fn blocks_of(start_bytes: u64, end_bytes: u64) -> Range<BlockNumber> {
    BlockNumber(start_bytes / BLOCK)..BlockNumber(end_bytes.div_ceil(BLOCK))
}
