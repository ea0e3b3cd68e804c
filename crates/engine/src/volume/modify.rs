//! Writes, discards and write-zeroes.
//!
//! Ordering argument, for one piece of a write: its data is committed to the log, and only then is the
//! map changed and, for the last piece, the request finished. A piece is all or nothing after a crash.
//!
//! A write of a part of a block reads the block first. Another request may write the block between
//! that read and the append; the old contents are then stale. They are used only if the map still has
//! the address that was read: an address is written once, so the same address means the same contents.
//! Otherwise the block is read again. No locks are needed, and aligned writes never wait for others.
//!
//! Blocks of zeroes take no space. They are found in our copy, never in guest memory, before anything of
//! the piece is committed: what is left of it moves together in the staging ring, behind everything that
//! is committed, and its entries (data, and unmaps for blocks of zeroes that are mapped) are committed
//! with one store. So the piece stays all or nothing. Data that is not zero pays one comparison of its
//! checksum a block.

use std::collections::VecDeque;
use std::io;

use super::{BLOCK, RequestFailed, Slot, Step, Volume, VolumeOp, Work, bufs_len};
use crate::crc::{ZERO_BLOCK_CRC, crc32c};
use crate::io::{AlignedBuf, Io, IoBuf, Op};
use crate::log::{AppendError, Log, Now};
use crate::map::Extent;
use crate::segment::{Entry, EntryKind};
use crate::types::{Address, BLOCK_BYTES, BlockNumber};

const ZERO_BLOCK: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// A request that changes the volume: copies and unmaps, one after the other.
#[derive(Debug)]
pub(super) struct Modify {
    steps: VecDeque<Change>,
}

#[derive(Debug)]
enum Change {
    Copy(Copy),
    /// Blocks `next..end`.
    Unmap {
        next: BlockNumber,
        end: BlockNumber,
    },
}

/// Bytes to be written; zeroes if `from` is empty.
#[derive(Debug)]
struct Copy {
    offset_bytes: u64,
    end_bytes: u64,
    from: Vec<IoBuf>,
    /// What has been taken of `from`.
    cursor: Cursor,
    /// Old contents of blocks that are written in part.
    edges: Vec<Edge>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    buf: usize,
    at: usize,
}

/// Old contents of a block.
#[derive(Debug)]
pub(super) struct Edge {
    block: BlockNumber,
    address: Address,
    checksum: u32,
    data: AlignedBuf,
    /// Of the read in flight, see [`Volume::begin_read`].
    serial: u64,
}

impl Modify {
    pub(super) fn write(offset_bytes: u64, from: Vec<IoBuf>) -> Self {
        let end_bytes = offset_bytes + bufs_len(&from) as u64;
        Self {
            steps: VecDeque::from([Change::Copy(Copy::new(offset_bytes, end_bytes, from))]),
        }
    }

    pub(super) fn unmap(offset_bytes: u64, len_bytes: u64, exact: bool) -> Self {
        let end_bytes = offset_bytes + len_bytes;
        let next = offset_bytes.div_ceil(BLOCK);
        let end = end_bytes / BLOCK;
        let zero = |from, to| Change::Copy(Copy::new(from, to, Vec::new()));
        let mut steps = VecDeque::new();
        if next < end {
            steps.push_back(Change::Unmap {
                next: BlockNumber(next),
                end: BlockNumber(end),
            });
        }
        if exact && next > end {
            // Inside one block.
            steps.push_back(zero(offset_bytes, end_bytes));
        } else if exact {
            if offset_bytes < next * BLOCK {
                steps.push_back(zero(offset_bytes, next * BLOCK));
            }
            if end * BLOCK < end_bytes {
                steps.push_back(zero(end * BLOCK, end_bytes));
            }
        }
        Self { steps }
    }
}

impl Copy {
    fn new(offset_bytes: u64, end_bytes: u64, from: Vec<IoBuf>) -> Self {
        Self {
            offset_bytes,
            end_bytes,
            from,
            cursor: Cursor::default(),
            edges: Vec::new(),
        }
    }
}

impl Cursor {
    /// Fills `to` with the next bytes of `from`.
    fn take(&mut self, from: &[IoBuf], mut to: &mut [u8]) {
        if from.is_empty() {
            return to.fill(0);
        }
        while !to.is_empty() {
            let buf = from[self.buf];
            let take = to.len().min(buf.len() - self.at);
            let (part, rest) = to.split_at_mut(take);
            buf.slice(self.at, take).copy_to(part);
            to = rest;
            self.at += take;
            if self.at == buf.len() {
                *self = Self {
                    buf: self.buf + 1,
                    at: 0,
                };
            }
        }
    }
}

/// Why a step did not go through at once.
pub(super) enum Pause {
    Park(Step),
    Fail(RequestFailed),
}

impl Volume {
    pub(super) fn run_modify(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        modify: &mut Modify,
        now: Now,
    ) -> Step {
        if self.log.is_none() || self.closing {
            return Step::Finish(Err(RequestFailed::NotWritable));
        }
        while let Some(change) = modify.steps.front_mut() {
            let done = match change {
                Change::Copy(copy) => self.run_copy(io, slot, copy, now),
                Change::Unmap { next, end } => self.run_unmap(io, slot, next, *end, now),
            };
            match done {
                Ok(()) => drop(modify.steps.pop_front()),
                Err(Pause::Park(step)) => return step,
                Err(Pause::Fail(why)) => return Step::Finish(Err(why)),
            }
        }
        Step::Changed
    }

    fn run_copy(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        copy: &mut Copy,
        now: Now,
    ) -> Result<(), Pause> {
        let max_blocks = self.log_mut().config().max_piece_blocks();
        while copy.offset_bytes < copy.end_bytes {
            let first = BlockNumber(copy.offset_bytes / BLOCK);
            let limit = (first.0 + u64::from(max_blocks)) * BLOCK;
            let to_bytes = copy.end_bytes.min(limit);
            let count = (to_bytes.div_ceil(BLOCK) - first.0) as u32;
            self.map
                .ensure_resident(first, count)
                .map_err(|need| Pause::Park(self.park_for_node(io, slot, need.0)))?;
            if !copy.offset_bytes.is_multiple_of(BLOCK) {
                self.fetch_edge(io, slot, copy, first)?;
            }
            let last = BlockNumber(first.0 + u64::from(count) - 1);
            if !to_bytes.is_multiple_of(BLOCK) {
                self.fetch_edge(io, slot, copy, last)?;
            }
            if !self.is_within_limit(count) {
                return Err(self.no_space(slot, now));
            }
            self.prepare(io, slot, count, now)?;
            self.append_piece(copy, first, count, to_bytes, now);
        }
        Ok(())
    }

    pub(super) fn log_mut(&mut self) -> &mut Log {
        self.log
            .as_mut()
            .expect("changes run only while the volume has a log")
    }

    /// Makes room in the log, or parks the request.
    pub(super) fn prepare(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        data_blocks: u32,
        now: Now,
    ) -> Result<(), Pause> {
        let room = if self.map_is_full() {
            Err(AppendError::Wait)
        } else {
            self.log_mut().prepare(io, data_blocks, now)
        };
        room.map_err(|error| match error {
            AppendError::Wait => {
                self.waiting_append.push_back(slot);
                Pause::Park(Step::Parked)
            }
            AppendError::NoSpace => self.no_space(slot, now),
            AppendError::Failed => Pause::Fail(RequestFailed::NotWritable),
        })
    }

    /// A request found no space: it waits for it, or fails.
    fn no_space(&mut self, slot: Slot, now: Now) -> Pause {
        if self.wait_for_space(slot, now) {
            Pause::Park(Step::Parked)
        } else {
            Pause::Fail(RequestFailed::NoSpace)
        }
    }

    /// Appends blocks `first..first + count`, of which the copy changes the bytes up to `to_bytes`.
    /// Nothing can fail any more.
    fn append_piece(
        &mut self,
        copy: &mut Copy,
        first: BlockNumber,
        count: u32,
        to_bytes: u64,
        now: Now,
    ) {
        let start = first.0 * BLOCK;
        let (from, to) = (
            (copy.offset_bytes - start) as usize,
            (to_bytes - start) as usize,
        );
        let mut checksums = std::mem::take(&mut self.checksums);
        checksums.clear();
        let Copy {
            from: source,
            cursor,
            edges,
            ..
        } = copy;
        self.log_mut().stage_data(count, &mut checksums, |data| {
            // Old contents first, over whole edge blocks; then what is written.
            if from != 0 {
                old_contents(edges, first, &mut data[..BLOCK_BYTES]);
            }
            let last = count as usize - 1;
            if to < data.len() && (last > 0 || from == 0) {
                let block = first.plus(last as u64);
                old_contents(edges, block, &mut data[last * BLOCK_BYTES..]);
            }
            cursor.take(source, &mut data[from..to]);
        });
        let whole = Entry {
            block: first,
            count,
            kind: EntryKind::Data,
        };
        if checksums.contains(&ZERO_BLOCK_CRC) {
            self.append_without_zeroes(whole, &mut checksums, now);
        } else {
            self.apply_staged(&[whole], &checksums, now);
        }
        self.checksums = checksums;
        self.stats.written_bytes += to_bytes - copy.offset_bytes;
        copy.offset_bytes = to_bytes;
        copy.edges.clear();
    }

    /// Commits what was staged, and changes the map as it says.
    fn apply_staged(&mut self, entries: &[Entry], mut checksums: &[u32], now: Now) {
        let mut address = self.log_mut().append_staged(entries, checksums, now);
        let segment = address.segment();
        for entry in entries {
            let changed = if entry.kind == EntryKind::Data {
                let (own, rest) = checksums.split_at(entry.count as usize);
                self.space.revive(segment, own.len() as u64);
                let inserted = self
                    .map
                    .insert(entry.block, address, own, &mut self.displaced);
                // The next block's, if one follows: an address never leaves its segment.
                if !rest.is_empty() {
                    address = address.plus(entry.count);
                }
                checksums = rest;
                inserted
            } else {
                self.space.count_unmaps(segment, 1);
                self.map
                    .remove(entry.block, entry.count, &mut self.displaced)
            };
            changed.expect("the leaves were made resident in this very step");
            self.space
                .displace(&mut self.displaced, self.history.parent);
        }
    }

    /// Appends what was staged for `whole`, of which some blocks may be zeroes, without those: they are
    /// unmapped, where they are mapped at all. What is left moves together, before anything of it is
    /// committed, and all entries are committed at once. Without room for them it stays as it is.
    fn append_without_zeroes(&mut self, whole: Entry, checksums: &mut Vec<u32>, now: Now) {
        let (first, count) = (whole.block, whole.count);
        let log = self
            .log
            .as_mut()
            .expect("changes run only while the volume has a log");
        let data = log.uncommitted(count);
        // The checksum says where to look, the contents decide.
        let is_zero = |i: usize| {
            checksums[i] == ZERO_BLOCK_CRC
                && data[i * BLOCK_BYTES..(i + 1) * BLOCK_BYTES] == ZERO_BLOCK
        };
        let zero: Vec<bool> = (0..count as usize).map(is_zero).collect();
        let mut entries: Vec<Entry> = Vec::new();
        let mut at = 0;
        for run in zero.chunk_by(|a, b| a == b) {
            let (block, end) = (first.plus(at), first.plus(at + run.len() as u64));
            at += run.len() as u64;
            if !run[0] {
                entries.push(Entry {
                    block,
                    count: run.len() as u32,
                    kind: EntryKind::Data,
                });
            } else if let Some(mapped) = self
                .map
                .next_mapped(block, end)
                .expect("the leaves were made resident in this very step")
            {
                entries.push(Entry {
                    block: mapped,
                    count: (end.0 - mapped.0) as u32,
                    kind: EntryKind::Unmap,
                });
            }
        }
        let zeroes = zero.iter().filter(|zero| **zero).count();
        let kept = count - zeroes as u32;
        if zeroes > 0 && !log.fits_staged(entries.len() as u32, kept) {
            return self.apply_staged(&[whole], checksums, now);
        }
        self.stats.zero_bytes += (zeroes * BLOCK_BYTES) as u64;
        if entries.is_empty() {
            return;
        }
        let data = log.uncommitted(count);
        let mut to = 0;
        for from in (0..count as usize).filter(|i| !zero[*i]) {
            if from != to {
                data.copy_within(
                    from * BLOCK_BYTES..(from + 1) * BLOCK_BYTES,
                    to * BLOCK_BYTES,
                );
                checksums[to] = checksums[from];
            }
            to += 1;
        }
        checksums.truncate(to);
        self.apply_staged(&entries, checksums, now);
    }

    /// Sees to it that the old contents of a block are at hand, and are those of now.
    fn fetch_edge(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        copy: &mut Copy,
        block: BlockNumber,
    ) -> Result<(), Pause> {
        let mut extents = std::mem::take(&mut self.extents);
        let looked_up = self.map.lookup(block, 1, &mut extents);
        let mapped = match (looked_up, extents.extents.first()) {
            (Err(need), _) => {
                self.extents = extents;
                return Err(Pause::Park(self.park_for_node(io, slot, need.0)));
            }
            (
                Ok(()),
                Some(&Extent::Mapped {
                    address, first_crc, ..
                }),
            ) => Some((address, extents.checksums[first_crc])),
            (Ok(()), _) => None,
        };
        self.extents = extents;
        let held = copy.edges.iter().position(|edge| edge.block == block);
        let Some((address, checksum)) = mapped else {
            // A hole: no edge means zeroes.
            held.map(|at| copy.edges.swap_remove(at));
            return Ok(());
        };
        if held.is_some_and(|at| copy.edges[at].address == address) {
            return Ok(());
        }
        held.map(|at| copy.edges.swap_remove(at));
        let data = AlignedBuf::new(BLOCK_BYTES);
        let mut edge = Edge {
            block,
            address,
            checksum,
            data,
            serial: 0,
        };
        if let Some(staged) = self.log_mut().staged(address, 1) {
            edge.data.copy_from_slice(staged);
            if crc32c(&edge.data) != checksum {
                self.report_damage(block, 1, address, "in the staging ring");
                return Err(Pause::Fail(RequestFailed::Damaged));
            }
            copy.edges.push(edge);
            return Ok(());
        }
        edge.serial = self.begin_read();
        // SAFETY: the buffer travels with `edge` in `tokens` until the operation completes.
        let bufs = vec![unsafe { edge.data.io_buf() }];
        let op = Op::Read {
            offset_bytes: address.byte_offset(),
            bufs,
        };
        self.submit_op(io, address.segment(), op, VolumeOp::Edge { slot, edge });
        Err(Pause::Park(Step::Parked))
    }

    pub(super) fn edge_read(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        edge: Edge,
        result: io::Result<usize>,
        now: Now,
    ) {
        self.end_read(edge.serial);
        let problem = match result {
            Ok(BLOCK_BYTES) if crc32c(&edge.data) == edge.checksum => None,
            Ok(BLOCK_BYTES) => Some("does not match its checksum".to_owned()),
            Ok(_) => Some("is missing from its segment".to_owned()),
            Err(error) => Some(format!("cannot be read: {error}")),
        };
        if let Some(what) = problem {
            self.report_damage(edge.block, 1, edge.address, &what);
            return self.fail_parked(slot, RequestFailed::Damaged);
        }
        if let Some(Work::Modify(modify)) = self.running[slot].as_mut().map(|r| &mut r.work)
            && let Some(Change::Copy(copy)) = modify.steps.front_mut()
        {
            copy.edges.push(edge);
        }
        self.run(io, slot, now);
    }

    fn run_unmap(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        next: &mut BlockNumber,
        end: BlockNumber,
        now: Now,
    ) -> Result<(), Pause> {
        /// Leaves that one turn may change, so that others get theirs.
        const LEAVES_A_TURN: u32 = 64;
        for _ in 0..LEAVES_A_TURN {
            let piece = self.map.next_unmap(*next, end);
            let piece = piece.map_err(|need| Pause::Park(self.park_for_node(io, slot, need.0)))?;
            let Some((block, count)) = piece else {
                return Ok(());
            };
            *next = block;
            self.prepare(io, slot, 0, now)?;
            let position = self.log_mut().append_unmap(block, count, now);
            self.space.count_unmaps(position.segment(), 1);
            self.map
                .remove(block, count, &mut self.displaced)
                .expect("the leaf was made resident in this very step");
            self.space
                .displace(&mut self.displaced, self.history.parent);
            *next = block.plus(u64::from(count));
        }
        self.runnable.push_back(slot);
        Err(Pause::Park(Step::Parked))
    }
}

/// Fills `data` with a block's old contents: the edge's, or zeroes where there is none.
fn old_contents(edges: &[Edge], block: BlockNumber, data: &mut [u8]) {
    match edges.iter().find(|edge| edge.block == block) {
        Some(edge) => data.copy_from_slice(&edge.data),
        None => data.fill(0),
    }
}
