//! One open volume: requests over its map and its log.
//!
//! A volume belongs to one worker, which calls it from one thread:
//! `submit` for each request of a batch, `on_completion` for each completed operation, then `advance`
//! once, then `take_finished`. Nothing here blocks. A request that cannot go on is parked (for a node
//! of the map, for room in the log, for a read) and run again from its current step when that came.
//!
//! Invariants (docs: design numbers in brackets):
//! - A write is acknowledged only after its record entry is committed in the staging ring (2).
//! - No bytes reach a guest that did not match their checksum (5).
//! - The map is changed only behind a committed entry, in the order of the log (3).
//! - A segment's file is removed only when a committed checkpoint that covers it has nothing live in
//!   it, and no read of it is in flight (6).

mod adopt;
mod budget;
mod carry;
mod checkpoint;
mod clean;
mod dead;
mod full;
mod modify;
mod note;
mod open;
mod read;
mod rebuild;
mod reclaim;
mod report;
mod request;
pub mod roots;
mod space;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;

pub use budget::MapBudget;
pub use checkpoint::{CheckpointResult, CheckpointState};
pub use dead::{DeadSet, DeadSetError};
pub use note::{FoundSnapshot, MAX_PENDING_SNAPSHOTS, NewSnapshot, NotedAt, Parent, SnapshotRoot};
pub use open::{VolumeSpec, open};
pub use rebuild::{
    RebuildError, RebuildSpec, RebuiltSegment, RebuiltSnapshot, RebuiltVolume, rebuild,
};
pub use report::{VolumeError, VolumeEvent, VolumeStats};
pub use request::{Finished, Request, RequestFailed, RequestId, RequestKind};
pub use space::{SegmentRow, SpaceTotals};

pub use crate::log::{LogPosition, Now};

use crate::device::SegmentNumbers;
use crate::io::{AlignedBuf, Completion, DeviceId, Io, IoBuf, Op, Target, Token, Tokens};
use crate::log::{Log, LogEvent};
use crate::map::{Displaced, Extents, Map, NodeLocation};
use crate::types::{BLOCK_BYTES, Epoch, SegmentNumber, Uuid};
use adopt::Adopt;
use budget::MapShare;
use carry::Carry;
use checkpoint::Checkpoints;
use full::Full;
use modify::Modify;
use note::{History, NoteWork};
use read::{ReadOp, ReadState};
use reclaim::Reclaim;
use space::SpaceTable;

/// Within a volume's token range, the log's tokens start here.
const LOG_TOKENS: u64 = 1 << 39;
/// Length of a volume's token range.
pub const TOKEN_RANGE: u64 = 1 << 40;

/// Where a request's state is kept.
type Slot = usize;

#[derive(Debug)]
enum Work {
    Read(ReadState),
    Modify(Modify),
    Note(NoteWork),
    Adopt(Adopt),
    /// The volume's own: nobody asked for it, nobody hears of its end.
    Carry(Box<Carry>),
}

#[derive(Debug)]
struct Running {
    id: RequestId,
    write_through: bool,
    work: Work,
}

#[derive(Debug)]
enum VolumeOp {
    Read(Box<ReadOp>),
    /// An old block that a write of a part of it needs.
    Edge {
        slot: Slot,
        edge: modify::Edge,
    },
    Node {
        location: NodeLocation,
        buffer: AlignedBuf,
    },
    Checkpoint(checkpoint::CheckpointOp),
    Adopt(Box<adopt::AdoptRead>),
    Reclaim(reclaim::ReclaimOp),
    /// A part of a segment that is carried.
    Carry {
        slot: Slot,
        buffer: AlignedBuf,
    },
    Remove,
}

/// What became of running a request's next step.
#[derive(Debug)]
enum Step {
    /// It is over.
    Finish(Result<(), RequestFailed>),
    /// It changed the volume and is over, once durable if that was asked for.
    Changed,
    /// It is parked where it will be found.
    Parked,
}

/// An open volume.
#[derive(Debug)]
pub struct Volume {
    device: DeviceId,
    pool: Uuid,
    uuid: Uuid,
    epoch: Epoch,
    segment_bytes: u64,
    logical_block_bytes: u32,
    name: String,
    size_bytes: u64,
    numbers: Arc<SegmentNumbers>,
    map_share: MapShare,

    map: Map,
    /// `None`: the volume is read-only, or its log has been closed.
    log: Option<Log>,
    /// End of the log that has been closed.
    end: LogPosition,
    space: SpaceTable,
    tokens: Tokens<VolumeOp>,

    running: Vec<Option<Running>>,
    free_slots: Vec<Slot>,
    /// To be run again at the next `advance`.
    runnable: VecDeque<Slot>,
    waiting_nodes: HashMap<NodeLocation, Vec<Slot>>,
    /// Wait for room in the log, oldest first.
    waiting_append: VecDeque<Slot>,
    /// The same for notes, which go first.
    waiting_notes: VecDeque<Slot>,
    /// Wait until the log is durable up to a position.
    waiting_durable: Vec<(u64, RequestId)>,
    finished: Vec<Finished>,

    checkpoints: Checkpoints,
    history: History,
    reclaim: Reclaim,
    full: Full,
    closing: bool,
    /// There is work left that nothing in flight will announce.
    turn_soon: bool,
    /// Reads in flight by the order of their submission, for the removal of segments.
    reads_in_flight: std::collections::BTreeSet<u64>,
    next_read: u64,

    stats: VolumeStats,
    events: Vec<VolumeEvent>,
    // Reused, so that the common path does not allocate.
    extents: Extents,
    checksums: Vec<u32>,
    displaced: Vec<Displaced>,
    log_events: Vec<LogEvent>,
}

impl Volume {
    /// Sets the range of the volume's tokens: `token_base..token_base + TOKEN_RANGE`. Nothing is in
    /// flight.
    pub fn attach(&mut self, token_base: u64) {
        self.tokens.rebase(token_base);
        if let Some(log) = &mut self.log {
            log.rebase(token_base + LOG_TOKENS);
        }
    }

    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    #[must_use]
    pub const fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
    }

    /// Requests that are not finished.
    #[must_use]
    pub fn requests_in_flight(&self) -> usize {
        self.running.len() - self.free_slots.len() + self.waiting_durable.len()
    }

    /// Grows or shrinks the volume; blocks beyond a smaller size stay mapped until they are unmapped,
    /// which the caller does first.
    pub fn resize(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
        if let Some(log) = &mut self.log {
            let name = self.name.clone();
            log.set_attributes(crate::log::VolumeAttributes { name, size_bytes });
        }
    }

    /// Starts a request. It may finish at once: see [`Self::take_finished`].
    pub fn submit(&mut self, io: &mut dyn Io, request: Request, now: Now) {
        let Request {
            id,
            kind,
            write_through,
        } = request;
        let work = match kind {
            RequestKind::Flush => {
                self.stats.flushes += 1;
                return self.finish_when_durable(id);
            }
            RequestKind::Read { offset_bytes, into } => {
                self.stats.reads += 1;
                Work::Read(ReadState::new(offset_bytes, into))
            }
            RequestKind::Write { offset_bytes, from } => {
                self.stats.writes += 1;
                Work::Modify(Modify::write(offset_bytes, from))
            }
            RequestKind::Unmap {
                offset_bytes,
                len_bytes,
                exact,
            } => {
                self.stats.unmaps += 1;
                self.stats.unmapped_bytes += len_bytes;
                Work::Modify(Modify::unmap(offset_bytes, len_bytes, exact))
            }
            RequestKind::Snapshot { snapshot, at } => {
                let note = self.snapshot_note(snapshot);
                let work = Work::Note(NoteWork::new([note], at));
                return self.start(io, id, true, work, now);
            }
            RequestKind::StateNote { payload, at } => {
                let (kept, notes) = (self.set_state_note(payload), self.state_notes());
                if kept.is_err() {
                    return self.finish(id, Err(RequestFailed::NoteTooLarge));
                }
                return self.start(io, id, true, Work::Note(NoteWork::new(notes, at)), now);
            }
            RequestKind::Adopt {
                offset_bytes,
                len_bytes,
                copied,
            } => Work::Adopt(Adopt::new(offset_bytes, len_bytes, copied)),
        };
        self.start(io, id, write_through, work, now);
    }

    /// Starts work of the volume's own, of whose end nobody hears.
    fn start_own(&mut self, io: &mut dyn Io, work: Work, now: Now) {
        self.start(io, RequestId(u64::MAX), false, work, now);
    }

    fn start(&mut self, io: &mut dyn Io, id: RequestId, write_through: bool, work: Work, now: Now) {
        let running = Running {
            id,
            write_through,
            work,
        };
        let slot = match self.free_slots.pop() {
            Some(slot) => {
                self.running[slot] = Some(running);
                slot
            }
            None => {
                self.running.push(Some(running));
                self.running.len() - 1
            }
        };
        self.run(io, slot, now);
    }

    /// Runs a request until it is over or parked.
    fn run(&mut self, io: &mut dyn Io, slot: Slot, now: Now) {
        // Taken out, so that its state and the volume's can both be changed.
        let Some(mut running) = self.running[slot].take() else {
            return;
        };
        let step = match &mut running.work {
            Work::Read(read) => self.run_read(io, slot, read),
            Work::Modify(modify) => self.run_modify(io, slot, modify, now),
            Work::Note(note) => self.run_note(io, slot, note, now),
            Work::Adopt(adopt) => self.run_adopt(io, slot, adopt, now),
            Work::Carry(carry) => self.run_carry(io, slot, carry, now),
        };
        let own = matches!(running.work, Work::Carry(_));
        let Running {
            id, write_through, ..
        } = running;
        match step {
            Step::Parked => {
                self.running[slot] = Some(running);
                return;
            }
            Step::Finish(_) | Step::Changed if own => self.checkpoints.carrying = false,
            Step::Finish(result) => self.finish(id, result),
            Step::Changed if write_through => self.finish_when_durable(id),
            Step::Changed => self.finish(id, Ok(())),
        }
        self.free_slots.push(slot);
    }

    fn finish(&mut self, id: RequestId, result: Result<(), RequestFailed>) {
        if result.is_err() {
            self.stats.errors += 1;
        }
        self.finished.push(Finished { id, result });
    }

    fn finish_when_durable(&mut self, id: RequestId) {
        match &mut self.log {
            None => self.finish(id, Ok(())),
            Some(log) if log.failure().is_some() => {
                self.finish(id, Err(RequestFailed::NotDurable));
            }
            Some(log) if log.durable() >= log.tail() => self.finish(id, Ok(())),
            Some(log) => {
                log.request_flush();
                self.waiting_durable.push((log.tail(), id));
            }
        }
    }

    /// Ends the requests whose changes have become durable, or never will.
    fn release_durable(&mut self) {
        let Some(log) = &mut self.log else { return };
        let refused = log.take_flush_refused() || log.failure().is_some();
        let durable = log.durable();
        let mut i = 0;
        while i < self.waiting_durable.len() {
            let (position, id) = self.waiting_durable[i];
            if position <= durable {
                self.waiting_durable.swap_remove(i);
                self.finish(id, Ok(()));
            } else if refused {
                self.waiting_durable.swap_remove(i);
                self.finish(id, Err(RequestFailed::NotDurable));
            } else {
                i += 1;
            }
        }
    }

    /// Takes the completion of an operation whose token is in this volume's range.
    pub fn on_completion(&mut self, io: &mut dyn Io, completion: Completion, now: Now) {
        let is_log = completion.token.0 & LOG_TOKENS != 0;
        if is_log {
            if let Some(log) = &mut self.log {
                log.on_completion(io, completion, now);
            }
            return;
        }
        let Completion { token, result } = completion;
        match self.tokens.take(token) {
            VolumeOp::Read(op) => self.read_done(io, *op, result),
            VolumeOp::Edge { slot, edge } => self.edge_read(io, slot, edge, result, now),
            VolumeOp::Node { location, buffer } => {
                self.node_read(io, location, &buffer, result, now);
            }
            VolumeOp::Checkpoint(op) => self.checkpoint_op_done(op, result),
            VolumeOp::Adopt(op) => self.adopt_read_done(io, *op, result, now),
            VolumeOp::Reclaim(op) => self.reclaim_op_done(io, op, result, now),
            VolumeOp::Carry { slot, buffer } => self.carry_read(io, slot, &buffer, result, now),
            VolumeOp::Remove => self.removed(io),
        }
    }

    fn submit_op(&mut self, io: &mut dyn Io, segment: SegmentNumber, op: Op, what: VolumeOp) {
        let token: Token = self.tokens.insert(what);
        io.submit(
            token,
            Target {
                device: self.device,
                segment,
            },
            op,
        );
    }

    /// Parks a request until a node of the map is there.
    fn park_for_node(&mut self, io: &mut dyn Io, slot: Slot, location: NodeLocation) -> Step {
        let waiting = self.waiting_nodes.entry(location).or_default();
        waiting.push(slot);
        if waiting.len() == 1 {
            self.stats.map_node_reads += 1;
            let buffer = AlignedBuf::new(location.len_bytes as usize);
            // SAFETY: the buffer travels with its operation's entry in `tokens` until it completes;
            // moving an AlignedBuf does not move its memory.
            let bufs = vec![unsafe { buffer.io_buf() }];
            let op = Op::Read {
                offset_bytes: u64::from(location.offset_bytes),
                bufs,
            };
            self.submit_op(
                io,
                location.segment,
                op,
                VolumeOp::Node { location, buffer },
            );
        }
        Step::Parked
    }

    fn node_read(
        &mut self,
        io: &mut dyn Io,
        location: NodeLocation,
        buffer: &AlignedBuf,
        result: io::Result<usize>,
        now: Now,
    ) {
        let outcome = match result {
            Ok(got) => self
                .map
                .supply(location, &buffer[..got.min(buffer.len())])
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let waiting = self.waiting_nodes.remove(&location).unwrap_or_default();
        match outcome {
            Ok(()) => {
                for slot in waiting {
                    self.run(io, slot, now);
                }
            }
            Err(reason) => {
                self.stats.checksum_errors += 1;
                self.events.push(VolumeEvent::Corruption {
                    offset_bytes: 0,
                    len_bytes: 0,
                    segment: location.segment,
                    reason: format!("map node at byte {}: {reason}", location.offset_bytes),
                });
                for slot in waiting {
                    self.fail_parked(slot, RequestFailed::Damaged);
                }
            }
        }
    }

    fn fail_parked(&mut self, slot: Slot, why: RequestFailed) {
        if let Some(running) = self.running[slot].take() {
            if matches!(running.work, Work::Carry(_)) {
                self.checkpoints.carrying = false;
            } else {
                self.finish(running.id, Err(why));
            }
            self.free_slots.push(slot);
        }
    }

    /// Does what is due. Called once after each batch, and at [`Self::deadline_ns`].
    pub fn advance(&mut self, io: &mut dyn Io, now: Now) {
        for _ in 0..self.runnable.len() {
            if let Some(slot) = self.runnable.pop_front() {
                self.run(io, slot, now);
            }
        }
        for _ in 0..self.waiting_notes.len() {
            if let Some(slot) = self.waiting_notes.pop_front() {
                self.run(io, slot, now);
            }
        }
        self.retry_appends(io, now);
        self.retry_waiting_space(io, now);
        if let Some(log) = &mut self.log {
            log.advance(io, now);
        }
        self.take_log_events();
        self.release_durable();
        self.turn_soon = false;
        self.drive_checkpoint(io, now);
        self.drive_carry(io, now);
        self.drive_close(io, now);
        self.remove_dead(io);
        self.drive_reclaim(io, now);
        self.keep_map_in_budget(now);
    }

    /// Runs the writes that waited for the log, oldest first, until one has to wait again.
    fn retry_appends(&mut self, io: &mut dyn Io, now: Now) {
        for _ in 0..self.waiting_append.len() {
            let Some(slot) = self.waiting_append.pop_front() else {
                return;
            };
            let before = self.waiting_append.len();
            self.run(io, slot, now);
            if self.waiting_append.len() > before {
                // It waits again, at the end of the queue; it was the first, and stays the first.
                self.waiting_append.rotate_right(1);
                return;
            }
        }
    }

    fn take_log_events(&mut self) {
        let Some(log) = &mut self.log else { return };
        let mut log_events = std::mem::take(&mut self.log_events);
        log.take_events(&mut log_events);
        for event in log_events.drain(..) {
            match event {
                LogEvent::Opened(number) => {
                    self.space.add(number, crate::segment::SegmentKind::Log)
                }
                LogEvent::Retired {
                    segment,
                    end_blocks,
                } => {
                    self.space
                        .update(segment, |row| row.used_blocks = end_blocks);
                }
                LogEvent::Sealed {
                    segment,
                    end_blocks,
                } => self.space.update(segment, |row| {
                    row.sealed = true;
                    row.used_blocks = end_blocks;
                }),
                LogEvent::Abandoned(segment) => self.space.update(segment, |row| row.sealed = true),
                LogEvent::Failed(reason) => self.events.push(VolumeEvent::DeviceFailed { reason }),
                LogEvent::Full => self.events.push(VolumeEvent::DeviceFull),
                LogEvent::StagingFull(reason) => {
                    self.events.push(VolumeEvent::StagingFull { reason });
                }
                LogEvent::SpaceBack => {
                    self.full.may_be_back();
                    self.events.push(VolumeEvent::SpaceBack);
                }
                LogEvent::NumbersWanted => self.events.push(VolumeEvent::NumbersWanted),
            }
        }
        self.log_events = log_events;
    }

    fn keep_map_in_budget(&mut self, now: Now) {
        let share = self.map_share.bytes();
        if self.map.memory_bytes() > share {
            // A little lower than the share, so that eviction comes in batches.
            self.map.evict(share - share / 16);
        }
        self.want_checkpoint_if_due(share, now);
    }

    /// Whether unwritten nodes fill the map's memory: writes wait for a checkpoint then.
    fn map_is_full(&self) -> bool {
        self.map.dirty_bytes() > self.map_share.bytes()
    }

    /// When `advance` has something to do that no completion announces; monotonic.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        if !self.runnable.is_empty() || self.turn_soon {
            return Some(0);
        }
        let log = self.log.as_ref().and_then(Log::deadline_ns);
        [
            log,
            self.checkpoint_retry_ns(),
            self.reclaim_deadline_ns(),
            self.space_retry_ns(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    pub fn take_finished(&mut self, out: &mut Vec<Finished>) {
        out.append(&mut self.finished);
    }

    pub fn take_events(&mut self, out: &mut Vec<VolumeEvent>) {
        out.append(&mut self.events);
    }

    #[must_use]
    pub fn stats(&self) -> VolumeStats {
        VolumeStats {
            mapped_blocks: self.map.mapped_blocks(),
            map_memory_bytes: self.map.memory_bytes() as u64,
            log_bytes_since_checkpoint: self.log_bytes_since_checkpoint(),
            staged_bytes: self.log.as_ref().map_or(0, Log::staged_bytes),
            space: SpaceTotals {
                allocated_bytes: self.allocated_bytes(),
                ..self.space.totals()
            },
            log_bytes: self.log.as_ref().map_or(0, Log::written_bytes),
            waiting_for_space: self.full.waiting() as u64,
            ..self.stats
        }
    }

    /// The root of the last committed checkpoint.
    #[must_use]
    pub const fn committed_root(&self) -> Option<NodeLocation> {
        self.checkpoints.committed_root
    }

    /// No root reaches these any more: they were those of a snapshot that is being removed, alone. All its
    /// nodes come in one call, after all its blocks. May be repeated.
    pub fn release(&mut self, blocks: &[Displaced], nodes: &[NodeLocation]) {
        self.space.release(blocks, nodes);
    }

    /// The segments that hold the volume.
    pub fn segments(&self) -> impl Iterator<Item = &SegmentRow> {
        self.space.rows()
    }

    fn is_quiet(&self) -> bool {
        self.tokens.is_empty() && self.log.as_ref().is_none_or(Log::idle)
    }
}

/// The part of a scatter/gather list from byte `start`, `len` bytes long.
///
/// # Panics
/// If the list is shorter.
fn slice_bufs(bufs: &[IoBuf], mut start: usize, mut len: usize) -> Vec<IoBuf> {
    let mut out = Vec::with_capacity(1);
    for buf in bufs {
        if len == 0 {
            break;
        }
        if start >= buf.len() {
            start -= buf.len();
            continue;
        }
        let take = len.min(buf.len() - start);
        out.push(buf.slice(start, take));
        (start, len) = (0, len - take);
    }
    assert_eq!(len, 0, "the list holds what is taken from it");
    out
}

/// Total length of a scatter/gather list, bytes.
fn bufs_len(bufs: &[IoBuf]) -> usize {
    bufs.iter().map(IoBuf::len).sum()
}

const BLOCK: u64 = BLOCK_BYTES as u64;
