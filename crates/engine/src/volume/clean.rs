//! Emptying sparse map segments, so that maps take a bounded part of the disk.
//!
//! Each checkpoint writes changed nodes behind each other, and what they supersede leaves gaps in older
//! map segments. A segment without live nodes goes by itself. Where too little is live in too many, the
//! emptiest are gone through before a checkpoint: each node in them that the tree still has is marked
//! dirty, the checkpoint writes it elsewhere, and the segment is dead when that is committed.
//!
//! Nodes that are known to be dead are passed over: they may be holes by now (`reclaim.rs`).
//!
//! Nothing here can harm: a node is only marked if the tree has it at exactly this place, and the old
//! copy stays until a committed checkpoint no longer needs it.

use std::collections::VecDeque;
use std::io;

use super::checkpoint::CheckpointOp;
use super::dead::DeadSet;
use super::{BLOCK, Volume, VolumeOp};
use crate::io::{AlignedBuf, Io, Op};
use crate::map::{MAX_NODE_BYTES, NeedNode, NodeHead, NodeLocation};
use crate::types::{BLOCK_BYTES, BlockNumber, SegmentNumber};

/// Read of a segment at a time; a node that starts in it is whole in it, by the overhang.
const CHUNK_BYTES: u32 = 256 << 10;
/// Live nodes moved by one checkpoint.
const MOST_LIVE_BYTES: u64 = 8 << 20;
/// Nodes looked at in one turn, so that guests get theirs.
const NODES_A_TURN: usize = 64;

/// A node found in a sparse segment.
#[derive(Clone, Copy, Debug)]
struct Found {
    level: u8,
    first_block: BlockNumber,
    location: NodeLocation,
}

/// The walk through sparse segments.
#[derive(Debug, Default)]
pub(super) struct Cleaner {
    segments: VecDeque<SegmentNumber>,
    /// Where the next chunk of the first segment begins.
    offset_bytes: u32,
    found: VecDeque<Found>,
    reading: bool,
}

impl Cleaner {
    pub(super) fn is_done(&self) -> bool {
        !self.reading && self.found.is_empty() && self.segments.is_empty()
    }

    pub(super) fn is_reading(&self) -> bool {
        self.reading
    }

    fn next_segment(&mut self) {
        self.segments.pop_front();
        self.offset_bytes = BLOCK_BYTES as u32;
    }

    /// Takes the nodes that begin in a chunk.
    fn take_chunk(
        &mut self,
        segment: SegmentNumber,
        used_bytes: u32,
        dead: &DeadSet,
        bytes: &[u8],
    ) {
        let start = self.offset_bytes;
        let end = start + CHUNK_BYTES.min(bytes.len() as u32);
        let mut at = start;
        while at < end {
            if let Some(behind) = dead.range_end(at) {
                // Nothing in it is current, and its space may have been given back.
                at = behind;
            } else if let Some(head) = NodeHead::parse(&bytes[(at - start) as usize..]) {
                let location = NodeLocation {
                    segment,
                    offset_bytes: at,
                    len_bytes: head.len_bytes,
                    checksum: head.checksum,
                };
                let NodeHead {
                    level, first_block, ..
                } = head;
                self.found.push_back(Found {
                    level,
                    first_block,
                    location,
                });
                at += head.len_bytes;
            } else if at.is_multiple_of(BLOCK_BYTES as u32) {
                // No node at a block boundary: nothing follows (docs/format.md, "Map segment").
                return self.next_segment();
            } else {
                at = at.next_multiple_of(BLOCK_BYTES as u32);
            }
        }
        self.offset_bytes = at;
        if at >= used_bytes || bytes.len() < CHUNK_BYTES as usize {
            self.next_segment();
        }
    }
}

impl Volume {
    /// What is worth emptying before the next checkpoint.
    pub(super) fn plan_cleaning(&self) -> Cleaner {
        let segments = self
            .space
            .sparse_map_segments(self.map.held_segment(), MOST_LIVE_BYTES);
        Cleaner {
            segments: segments.into(),
            offset_bytes: BLOCK_BYTES as u32,
            ..Cleaner::default()
        }
    }

    /// Takes the walk's next steps; damage ends the walk through its segment, and is left to others to
    /// report.
    pub(super) fn drive_cleaning(&mut self, io: &mut dyn Io, cleaner: &mut Cleaner) {
        if cleaner.reading {
            return;
        }
        for _ in 0..NODES_A_TURN {
            let Some(found) = cleaner.found.front().copied() else {
                break;
            };
            match self
                .map
                .relocate(found.level, found.first_block, found.location)
            {
                Ok(_) => drop(cleaner.found.pop_front()),
                Err(NeedNode(location)) => {
                    cleaner.reading = true;
                    let offset_bytes = u64::from(location.offset_bytes);
                    return self.read_to_clean(
                        io,
                        location.segment,
                        offset_bytes,
                        |buffer| CheckpointOp::CleanNode { location, buffer },
                        location.len_bytes as usize,
                    );
                }
            }
        }
        if cleaner.found.is_empty()
            && let Some(&segment) = cleaner.segments.front()
        {
            cleaner.reading = true;
            let len = (CHUNK_BYTES + MAX_NODE_BYTES) as usize;
            let offset_bytes = u64::from(cleaner.offset_bytes);
            self.read_to_clean(
                io,
                segment,
                offset_bytes,
                |buffer| CheckpointOp::CleanChunk { segment, buffer },
                len,
            );
        }
    }

    fn read_to_clean(
        &mut self,
        io: &mut dyn Io,
        segment: SegmentNumber,
        offset_bytes: u64,
        what: impl FnOnce(AlignedBuf) -> CheckpointOp,
        len: usize,
    ) {
        let buffer = AlignedBuf::new(len);
        // SAFETY: the buffer travels with its operation in `tokens` until it completes.
        let bufs = vec![unsafe { buffer.io_buf() }];
        let op = Op::Read { offset_bytes, bufs };
        self.submit_op(io, segment, op, VolumeOp::Checkpoint(what(buffer)));
    }

    /// Takes the completion of a read of the walk's.
    pub(super) fn cleaning_op_done(
        &mut self,
        cleaner: &mut Cleaner,
        op: CheckpointOp,
        result: io::Result<usize>,
    ) {
        cleaner.reading = false;
        match (op, result) {
            (CheckpointOp::CleanChunk { segment, buffer }, Ok(got)) => {
                let bytes = &buffer[..got.min(buffer.len())];
                if let Some(row) = self.space.row(segment) {
                    let used_bytes = (u64::from(row.used_blocks) * BLOCK) as u32;
                    cleaner.take_chunk(segment, used_bytes, &row.dead, bytes);
                } else {
                    cleaner.next_segment();
                }
            }
            (CheckpointOp::CleanNode { location, buffer }, Ok(got))
                if self
                    .map
                    .supply(location, &buffer[..got.min(buffer.len())])
                    .is_ok() => {}
            // The path to a node cannot be read: the node stays where it is.
            (CheckpointOp::CleanNode { .. }, _) => drop(cleaner.found.pop_front()),
            (CheckpointOp::CleanChunk { .. }, Err(_)) => cleaner.next_segment(),
            _ => unreachable!("only the walk's own reads come here"),
        }
    }
}
