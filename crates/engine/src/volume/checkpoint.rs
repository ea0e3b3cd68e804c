//! Checkpoints, the removal of dead segments, and closing.
//!
//! ```text
//!   Idle ─start─▶ (Clean: sparse map segments) ─▶ freeze
//!   freeze ─▶ Nodes ─all written─▶ Sync ─all synced─▶ WaitLog ─durable─▶ Ready
//!                                                                              │ taken by policy
//!   Idle ◀─committed: dead files go, nodes may be evicted──────────────── Committing
//!   Idle ◀─failed: what was written counts as never written─────────────────────┘
//! ```
//!
//! Ordering argument: the checkpoint's map may point only to durable blocks and nodes, so the result is
//! given out when (1) the log is durable up to the freeze and (2) every map segment that got nodes has
//! been synced. Policy then commits it in the catalog, durably, and only after that
//! (`checkpoint_committed`) do files go away that the checkpoint before still needed. Guest I/O goes on
//! throughout: nodes are written a bounded batch at a time, and new writes copy frozen nodes.

use std::collections::BTreeSet;
use std::io;

use super::clean::Cleaner;
use super::note::SnapshotRoot;
use super::{BLOCK, LogPosition, Now, SegmentRow, Volume, VolumeError, VolumeEvent, VolumeOp};
use crate::io::{AlignedBuf, Io, Op};
use crate::map::{CheckpointProgress, NodeLocation};
use crate::segment::{SegmentHeader, SegmentKind};
use crate::types::{BLOCK_BYTES, SegmentNumber};

/// After a failed checkpoint the next one is asked for this much later.
const RETRY_NS: u64 = 5_000_000_000;
/// Bytes of nodes written in one operation.
const BATCH_BYTES: u32 = 256 << 10;

/// A durable map and the log position up to which it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointState {
    /// `None`: nothing is mapped.
    pub root: Option<NodeLocation>,
    pub position: LogPosition,
}

/// A checkpoint that is durable and wants to be committed in the catalog.
#[derive(Clone, Debug)]
pub struct CheckpointResult {
    pub id: u64,
    pub state: CheckpointState,
    pub mapped_blocks: u64,
    /// Snapshots that were pending and have a root now, oldest first.
    pub snapshots: Vec<SnapshotRoot>,
    /// Rows to insert or update.
    pub changed: Vec<SegmentRow>,
    /// Rows to delete; the files go after the commit.
    pub removed: Vec<SegmentNumber>,
}

#[derive(Debug)]
pub(super) enum CheckpointOp {
    Create {
        segment: SegmentNumber,
    },
    Write {
        _buffer: AlignedBuf,
    },
    Sync,
    /// See [`super::clean`].
    CleanChunk {
        segment: SegmentNumber,
        buffer: AlignedBuf,
    },
    CleanNode {
        location: NodeLocation,
        buffer: AlignedBuf,
    },
}

/// The map segment that takes nodes.
#[derive(Clone, Copy, Debug)]
struct MapSegment {
    number: SegmentNumber,
    offset_bytes: u32,
}

#[derive(Debug)]
enum Stage {
    Nodes,
    Sync,
    WaitLog,
}

#[derive(Debug)]
struct Run {
    stage: Stage,
    position: LogPosition,
    mapped_blocks: u64,
    /// The log must be durable up to here.
    flush_to: u64,
    root: Option<NodeLocation>,
    /// Pending snapshots that it covers: the oldest ones.
    snapshots: usize,
    /// Log segments as they were at the freeze.
    changed: Vec<SegmentRow>,
    removed: Vec<SegmentNumber>,
    touched: BTreeSet<SegmentNumber>,
    in_flight: u32,
    failed: Option<VolumeError>,
}

/// Given out, not yet committed.
#[derive(Debug)]
struct Committing {
    id: u64,
    position: LogPosition,
    log_bytes: u64,
    root: Option<NodeLocation>,
    snapshots: usize,
    changed: Vec<SegmentRow>,
    removed: Vec<SegmentNumber>,
}

#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    cleaning: Option<Cleaner>,
    run: Option<Run>,
    ready: Option<Result<CheckpointResult, VolumeError>>,
    committing: Option<Committing>,
    map_segment: Option<MapSegment>,
    next_id: u64,
    /// Dead log segments whose notes and unmaps are needed, and so have to be repeated first.
    pub(super) to_carry: Vec<SegmentNumber>,
    /// Something of them is being repeated at the log's end; see [`super::carry`].
    pub(super) carrying: bool,
    /// Root of the last committed checkpoint.
    pub(super) committed_root: Option<NodeLocation>,
    /// The log's end at the last committed checkpoint, and what was asked for since.
    committed: LogPosition,
    committed_log_bytes: u64,
    pub(super) wanted: bool,
    /// After a failure: when it makes sense to try again.
    not_before_ns: u64,
    pub(super) wanted_after_bytes: u64,
    /// Files to be removed when reads with a serial up to this one have ended.
    removals: Vec<(SegmentNumber, u64)>,
    /// One of them is on its way.
    removing: bool,
    closed: Option<Result<Option<CheckpointResult>, VolumeError>>,
}

impl Checkpoints {
    fn is_running(&self) -> bool {
        self.run.is_some() || self.cleaning.is_some()
    }

    pub(super) fn new(state: &CheckpointState, wanted_after_bytes: u64) -> Self {
        Self {
            committed: state.position,
            committed_root: state.root,
            wanted_after_bytes,
            ..Self::default()
        }
    }
}

impl Volume {
    /// Starts a checkpoint; [`Self::take_checkpoint`] gives its result.
    pub fn start_checkpoint(&mut self) {
        if self.checkpoints.is_running() || self.checkpoints.committing.is_some() {
            self.checkpoints
                .ready
                .get_or_insert(Err(VolumeError::CheckpointRunning));
            return;
        }
        if self.closing {
            return self.freeze();
        }
        self.checkpoints.cleaning = Some(self.plan_cleaning());
    }

    /// Freezes the map at the log's end: what the checkpoint will hold.
    fn freeze(&mut self) {
        let (position, flush_to) = match &mut self.log {
            Some(log) => {
                let position = log.checkpoint_position();
                log.request_flush();
                (position, log.tail())
            }
            None => (self.end, 0),
        };
        // Nodes that die after the freeze are still part of this checkpoint.
        let mut dead_nodes = Vec::new();
        self.map.take_dead_nodes(&mut dead_nodes);
        self.space.drop_nodes(&mut dead_nodes);
        self.note_used_blocks(position);
        self.map.begin_checkpoint();
        // The state note that counts must stay; it is durable when this checkpoint is.
        let removable =
            self.space
                .removable(position.segment, self.history.state_at, self.history.clone);
        self.checkpoints.to_carry = removable.carry;
        self.checkpoints.run = Some(Run {
            stage: Stage::Nodes,
            position,
            mapped_blocks: self.map.mapped_blocks(),
            flush_to,
            root: None,
            snapshots: self.history.pending.len(),
            changed: self.space.take_changed(),
            removed: removable.now,
            touched: BTreeSet::new(),
            in_flight: 0,
            failed: None,
        });
    }

    fn note_used_blocks(&mut self, position: LogPosition) {
        self.space.update(position.segment, |row| {
            if row.kind == SegmentKind::Log {
                row.used_blocks = row.used_blocks.max(position.end_blocks);
            }
        });
    }

    /// The result of the checkpoint that was started, once.
    pub fn take_checkpoint(&mut self) -> Option<Result<CheckpointResult, VolumeError>> {
        self.checkpoints.ready.take()
    }

    /// The catalog has the checkpoint `id`: what only the one before needed goes away.
    pub fn checkpoint_committed(&mut self, id: u64) {
        let Some(done) = self.checkpoints.committing.take_if(|c| c.id == id) else {
            return;
        };
        self.map.finish_checkpoint();
        self.history.pending.drain(..done.snapshots);
        self.checkpoints.committed = done.position;
        self.checkpoints.committed_root = done.root;
        self.checkpoints.committed_log_bytes = done.log_bytes;
        self.checkpoints.wanted = false;
        for number in &done.removed {
            self.space.remove(*number);
            self.checkpoints.removals.push((*number, self.next_read));
        }
        let serial = self.next_read;
        self.reclaim.committed(&done.changed, &done.removed, serial);
        self.full.may_be_back();
    }

    /// The catalog refused the checkpoint `id`: everything in it is to be written again.
    pub fn checkpoint_failed(&mut self, id: u64) {
        let Some(failed) = self.checkpoints.committing.take_if(|c| c.id == id) else {
            return;
        };
        self.map.abort_checkpoint();
        self.space.changed_again(&failed.changed);
        self.checkpoints.wanted = false;
    }

    /// Takes the checkpoint's next steps.
    pub(super) fn drive_checkpoint(&mut self, io: &mut dyn Io, now: Now) {
        if let Some(mut cleaner) = self.checkpoints.cleaning.take() {
            self.drive_cleaning(io, &mut cleaner);
            if !cleaner.is_done() {
                // More of what is at hand comes in the next turn.
                self.turn_soon = !cleaner.is_reading();
                self.checkpoints.cleaning = Some(cleaner);
                return;
            }
            self.freeze();
        }
        let Some(mut run) = self.checkpoints.run.take() else {
            return;
        };
        if run.failed.is_none()
            && let Some(reason) = self.log.as_ref().and_then(|log| log.failure())
        {
            run.failed = Some(VolumeError::LogFailed(reason.to_owned()));
        }
        if run.failed.is_none() {
            self.step_checkpoint(io, &mut run, now);
        }
        match run.failed.take() {
            Some(error) if run.in_flight == 0 => {
                self.map.abort_checkpoint();
                self.space.changed_again(&run.changed);
                self.checkpoints.wanted = false;
                self.checkpoints.not_before_ns = now.monotonic_ns + RETRY_NS;
                self.checkpoints.ready = Some(Err(error));
            }
            failed => {
                run.failed = failed;
                let durable = self
                    .log
                    .as_ref()
                    .is_none_or(|log| log.durable() >= run.flush_to);
                let synced = matches!(run.stage, Stage::WaitLog) && run.in_flight == 0;
                if synced && durable && run.failed.is_none() {
                    self.checkpoint_ready(run);
                } else {
                    self.checkpoints.run = Some(run);
                }
            }
        }
    }

    fn step_checkpoint(&mut self, io: &mut dyn Io, run: &mut Run, now: Now) {
        // One batch in flight: guests' reads and writes come first.
        if run.in_flight > 0 {
            return;
        }
        if matches!(run.stage, Stage::Nodes) {
            match self.write_batch(io, run, now) {
                Ok(true) => run.stage = Stage::Sync,
                Ok(false) => return,
                Err(error) => {
                    run.failed = Some(error);
                    return;
                }
            }
        }
        // A sync covers only writes that had completed before it was submitted.
        if matches!(run.stage, Stage::Sync) && run.in_flight == 0 {
            let touched: Vec<_> = run.touched.iter().copied().collect();
            run.stage = Stage::WaitLog;
            for segment in touched {
                run.in_flight += 1;
                self.submit_op(
                    io,
                    segment,
                    Op::Sync,
                    VolumeOp::Checkpoint(CheckpointOp::Sync),
                );
            }
        }
    }

    /// Writes the next nodes. True: all are written.
    fn write_batch(
        &mut self,
        io: &mut dyn Io,
        run: &mut Run,
        now: Now,
    ) -> Result<bool, VolumeError> {
        let segment_bytes = self.segment_bytes as u32;
        let mut nodes = Vec::new();
        let (place, progress) = match self.checkpoints.map_segment {
            Some(place) => {
                let space = (segment_bytes - place.offset_bytes).min(BATCH_BYTES);
                let progress =
                    self.map
                        .write_nodes(place.number, place.offset_bytes, space, &mut nodes);
                (place, progress)
            }
            // No segment yet: this only finds out whether there is anything to write.
            None => match self.map.write_nodes(SegmentNumber(0), 0, 0, &mut nodes) {
                CheckpointProgress::Done { root } => {
                    run.root = root;
                    return Ok(true);
                }
                CheckpointProgress::More => {
                    self.create_map_segment(io, run, now)?;
                    return Ok(false);
                }
            },
        };
        if !nodes.is_empty() {
            let live = nodes.len() as u64;
            nodes.resize(nodes.len().next_multiple_of(BLOCK_BYTES), 0);
            let mut buffer = AlignedBuf::new(nodes.len());
            buffer.copy_from_slice(&nodes);
            // SAFETY: the buffer travels with its operation in `tokens` until it completes.
            let bufs = vec![unsafe { buffer.io_buf() }];
            let offset_bytes = u64::from(place.offset_bytes);
            run.in_flight += 1;
            self.stats.node_bytes += nodes.len() as u64;
            run.touched.insert(place.number);
            let op = Op::Write {
                offset_bytes,
                bufs,
                direct: false,
            };
            let what = VolumeOp::Checkpoint(CheckpointOp::Write { _buffer: buffer });
            self.submit_op(io, place.number, op, what);
            let end = place.offset_bytes + nodes.len() as u32;
            self.checkpoints.map_segment = Some(MapSegment {
                offset_bytes: end,
                ..place
            });
            self.space.update(place.number, |row| {
                row.live += live;
                row.used_blocks = (u64::from(end) / BLOCK) as u32;
            });
        }
        match progress {
            CheckpointProgress::Done { root } => {
                run.root = root;
                Ok(true)
            }
            CheckpointProgress::More if nodes.is_empty() => {
                // Not even one node fits: the segment is full.
                self.retire_map_segment();
                self.create_map_segment(io, run, now)?;
                Ok(false)
            }
            CheckpointProgress::More => Ok(false),
        }
    }

    fn retire_map_segment(&mut self) {
        if let Some(full) = self.checkpoints.map_segment.take() {
            self.space.update(full.number, |row| row.sealed = true);
        }
    }

    fn create_map_segment(
        &mut self,
        io: &mut dyn Io,
        run: &mut Run,
        now: Now,
    ) -> Result<(), VolumeError> {
        let Some(number) = self.numbers.take() else {
            self.events.push(VolumeEvent::NumbersWanted);
            return Err(VolumeError::NoNumbers);
        };
        let mut header = Box::new(AlignedBuf::new(BLOCK_BYTES));
        SegmentHeader {
            kind: SegmentKind::Map,
            pool: self.pool,
            volume: self.uuid,
            number,
            epoch: self.epoch,
            segment_bytes: self.segment_bytes,
            logical_block_bytes: self.logical_block_bytes,
            volume_bytes: self.size_bytes,
            created_ns: now.realtime_ns,
            volume_name: self.name.clone(),
        }
        .encode(&mut header);
        run.in_flight += 1;
        let what = VolumeOp::Checkpoint(CheckpointOp::Create { segment: number });
        self.submit_op(io, number, Op::Create { header }, what);
        Ok(())
    }

    pub(super) fn checkpoint_op_done(&mut self, op: CheckpointOp, result: io::Result<usize>) {
        let (what, segment) = match op {
            CheckpointOp::CleanChunk { .. } | CheckpointOp::CleanNode { .. } => {
                if let Some(mut cleaner) = self.checkpoints.cleaning.take() {
                    self.cleaning_op_done(&mut cleaner, op, result);
                    self.checkpoints.cleaning = Some(cleaner);
                }
                return;
            }
            CheckpointOp::Create { segment } => {
                if result.is_ok() {
                    let offset_bytes = BLOCK_BYTES as u32;
                    self.checkpoints.map_segment = Some(MapSegment {
                        number: segment,
                        offset_bytes,
                    });
                    self.space.add(segment, SegmentKind::Map);
                }
                ("creating map", segment)
            }
            CheckpointOp::Write { .. } => ("writing map", self.current_map_segment()),
            CheckpointOp::Sync => ("syncing map", self.current_map_segment()),
        };
        let Some(run) = &mut self.checkpoints.run else {
            return;
        };
        run.in_flight -= 1;
        if let Err(error) = result {
            run.failed.get_or_insert(VolumeError::Io {
                what,
                segment,
                error,
            });
            // What is behind a failed write or sync is not known: nothing more goes there.
            self.retire_map_segment();
        }
    }

    fn current_map_segment(&self) -> SegmentNumber {
        self.checkpoints
            .map_segment
            .map_or(SegmentNumber(0), |place| place.number)
    }

    fn checkpoint_ready(&mut self, mut run: Run) {
        // Map segments' counts include this checkpoint's nodes, and nothing that died after its freeze.
        let current = self.current_map_segment();
        if self.history.holds == 0 {
            let dead = self.space.dead_map_segments();
            let others = dead.into_iter().filter(|number| *number != current);
            run.removed.extend(others);
        }
        for row in self.space.rows().filter(|row| row.kind == SegmentKind::Map) {
            if run.touched.contains(&row.number) {
                run.changed.retain(|old| old.number != row.number);
                run.changed.push(row.clone());
            }
        }
        let Run {
            position,
            mapped_blocks,
            flush_to,
            root,
            snapshots,
            mut changed,
            removed,
            ..
        } = run;
        let covered = self.history.pending[..snapshots].iter();
        let roots = covered.map(|pending| {
            let written = self
                .map
                .checkpoint_roots()
                .iter()
                .find(|tree| tree.key == Some(pending.key))
                .expect("a checkpoint writes every tree that was pending at its freeze");
            SnapshotRoot {
                uuid: pending.uuid,
                position: pending.position,
                root: written.root,
                mapped_blocks: written.mapped_blocks,
            }
        });
        let roots = roots.collect();
        changed.retain(|row| !removed.contains(&row.number));
        self.checkpoints.next_id += 1;
        let id = self.checkpoints.next_id;
        self.checkpoints.committing = Some(Committing {
            id,
            position,
            log_bytes: flush_to,
            root,
            snapshots,
            changed: changed.clone(),
            removed: removed.clone(),
        });
        let state = CheckpointState { root, position };
        let result = CheckpointResult {
            id,
            state,
            mapped_blocks,
            snapshots: roots,
            changed,
            removed,
        };
        self.checkpoints.ready = Some(Ok(result));
    }

    /// Removes files of dead segments when no read that could see them is in flight.
    pub(super) fn remove_dead(&mut self, io: &mut dyn Io) {
        if self.checkpoints.removals.is_empty() {
            return;
        }
        let oldest = self.reads_in_flight.first().copied().unwrap_or(u64::MAX);
        // One at a time, oldest first, each durable before the next: the unmaps of a segment may keep
        // blocks of an older one from coming back when maps are rebuilt after a crash.
        if self.checkpoints.removing {
            return;
        }
        let next = self.checkpoints.removals.first().copied();
        if let Some((number, _)) = next.filter(|(_, serial)| *serial < oldest) {
            self.checkpoints.removing = true;
            self.checkpoints.removals.remove(0);
            self.submit_op(io, number, Op::Remove, VolumeOp::Remove);
        }
    }

    pub(super) fn removed(&mut self, io: &mut dyn Io) {
        self.checkpoints.removing = false;
        self.full.may_be_back();
        self.remove_dead(io);
    }

    /// When writes that wait for a checkpoint should have one tried again; monotonic.
    pub(super) fn checkpoint_retry_ns(&self) -> Option<u64> {
        let at = self.checkpoints.not_before_ns;
        (at > 0 && !self.checkpoints.wanted && self.map_is_full()).then_some(at)
    }

    pub(super) fn log_bytes_since_checkpoint(&self) -> u64 {
        let tail = self.log.as_ref().map_or(0, |log| log.tail());
        tail.saturating_sub(self.checkpoints.committed_log_bytes)
    }

    /// Reports once that a checkpoint is due: by bytes of log, or by memory of unwritten nodes.
    pub(super) fn want_checkpoint_if_due(&mut self, map_share_bytes: usize, now: Now) {
        let due = self.log_bytes_since_checkpoint() >= self.checkpoints.wanted_after_bytes
            || self.map.dirty_bytes() > map_share_bytes / 2;
        if due {
            self.want_checkpoint(now);
        }
    }

    /// Reports once that a checkpoint is wanted, if one can be made.
    pub(super) fn want_checkpoint(&mut self, now: Now) {
        let failed = self.log.as_ref().is_none_or(|log| log.failure().is_some());
        let waits = now.monotonic_ns < self.checkpoints.not_before_ns;
        if !self.checkpoints.wanted && !self.closing && !failed && !waits {
            self.checkpoints.wanted = true;
            self.events.push(VolumeEvent::CheckpointWanted);
        }
    }

    /// Begins to close the volume; its exports are gone and no request is in flight or will come.
    /// [`Self::take_closed`] gives the result.
    pub fn start_close(&mut self, io: &mut dyn Io) {
        self.closing = true;
        match &mut self.log {
            Some(log) => log.start_close(io),
            // Opened to read only: nothing is in the log, and nothing of the map has changed.
            None => self.checkpoints.closed = Some(Ok(None)),
        }
    }

    /// A last checkpoint (`None`: nothing has changed since the one before); commit it, call
    /// [`Self::checkpoint_committed`], wait for [`Self::is_closed`], drop the volume.
    pub fn take_closed(&mut self) -> Option<Result<Option<CheckpointResult>, VolumeError>> {
        self.checkpoints.closed.take()
    }

    /// Whether nothing of the volume is in flight any more, so that it can be dropped.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closing
            && self.log.is_none()
            && self.is_quiet()
            && self.checkpoints.removals.is_empty()
    }

    pub(super) fn drive_close(&mut self, io: &mut dyn Io, now: Now) {
        if !self.closing || self.checkpoints.closed.is_some() {
            return;
        }
        if let Some(log) = &mut self.log {
            if !log.closed() || self.checkpoints.is_running() || self.checkpoints.ready.is_some() {
                return;
            }
            self.end = log.checkpoint_position();
            self.take_log_events();
            let Some(log) = self.log.take() else { return };
            if let Err(error) = log.finish() {
                self.checkpoints.closed = Some(Err(VolumeError::LogFailed(error.to_string())));
                return;
            }
            if self.checkpoints.committing.is_some() {
                // Policy is late with a commit; its outcome no longer matters to the files.
                self.checkpoints.committing = None;
                self.map.abort_checkpoint();
            }
            let unchanged = self.end == self.checkpoints.committed
                && self.map.dirty_bytes() == 0
                && !self.space.has_changes();
            if unchanged {
                self.checkpoints.closed = Some(Ok(None));
                return;
            }
            self.retire_map_segment();
            self.checkpoints.ready = None;
            self.start_checkpoint();
            self.drive_checkpoint(io, now);
        }
        if let Some(result) = self.checkpoints.ready.take() {
            self.checkpoints.closed = Some(result.map(Some));
        }
    }
}
