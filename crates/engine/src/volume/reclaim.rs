//! Giving the space of dead blocks back to the file system, without copying and without a change of any
//! map: holes are punched into segments.
//!
//! Ordering argument. A block may be punched when nothing can ever read it again:
//! - It is dead in a *committed* checkpoint: neither that checkpoint's map, which recovery starts from,
//!   nor any snapshot reaches it. Before the commit, the checkpoint before may still reach it.
//! - No read that began before the commit is in flight: later ones look it up in a map without it.
//! - Its segment is sealed, so that recovery takes the footer's word for what the records hold.
//!
//! Nodes of map segments follow the same rules, and are left alone while someone holds them.
//!
//! A hole counts when it is durable: release, sync, and only then `punched_blocks` grows, which the next
//! checkpoint commits. A crash in between costs nothing but punching again.
//!
//! It yields to guests: one operation in flight a volume, at a bounded rate, and while requests are
//! under way at most one in [`YIELD_NS`]; the more is dead, the less it yields, down to not at all at
//! [`PRESSING_PERCENT`], because a guest that overwrites fast makes dead blocks as fast. An idle volume goes on, by its deadline; one with nothing to
//! reclaim has none.
//!
//! Memory: for a segment that has something to reclaim, the committed dead set (shared with the table
//! of segments until that changes) and a bitmap of what was punched: at most 2 KiB for 32 MiB.
//!
//! Owned by one volume, called from its worker only.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;

use super::dead::{Bitmap, DeadSet};
use super::space::{SegmentRow, SpaceTotals};
use super::{BLOCK, Now, Volume, VolumeEvent, VolumeOp};
use crate::io::{Io, Op};
use crate::segment::SegmentKind;
use crate::types::SegmentNumber;

/// Reclaim begins when this part of what is live is dead and not given back, in percent…
const START_PERCENT: u64 = 8;
/// …and ends at this one.
const STOP_PERCENT: u64 = 4;
/// When this part is, reclaim does not wait for a pause of the guests any more.
const PRESSING_PERCENT: u64 = 14;
/// Less than so much is not worth a beginning, nor an operation unless nothing else is left.
const LEAST_BLOCKS: u64 = 64;
/// Holes of one operation.
const MAX_RANGES: usize = 512;
/// Bytes given back a second, unless told otherwise.
const DEFAULT_BYTES_PER_SECOND: u64 = 256 << 20;
/// While requests are under way, one operation in so long.
const YIELD_NS: u64 = 100_000_000;
/// After an error the next try comes so much later.
const RETRY_NS: u64 = 5_000_000_000;
/// A checkpoint is asked for, because much has died since the last one, no more often than this.
const CHECKPOINT_NS: u64 = 5_000_000_000;
/// Segments looked at to find one that may be punched now.
const LOOK_AT: usize = 64;

/// A segment as the newest committed checkpoint has it.
#[derive(Debug)]
struct Candidate {
    dead: DeadSet,
    /// What was punched since the volume was opened.
    punched: Bitmap,
    /// Blocks that are known to be punched; may be more than `punched` says which.
    punched_blocks: u32,
    /// Reads up to this one may still see what is dead.
    serial: u64,
}

impl Candidate {
    fn unpunched(&self) -> u32 {
        self.dead.whole_blocks().saturating_sub(self.punched_blocks)
    }
}

/// An operation that has come back.
#[derive(Debug)]
pub(super) enum ReclaimOp {
    Release {
        segment: SegmentNumber,
        runs: Vec<(u32, u32)>,
    },
    Sync {
        segment: SegmentNumber,
        runs: Vec<(u32, u32)>,
    },
}

/// What a volume could give back, and how fast it does.
#[derive(Debug)]
pub(super) struct Reclaim {
    candidates: BTreeMap<SegmentNumber, Candidate>,
    /// Those with something left, by how much.
    order: BTreeSet<(u32, SegmentNumber)>,
    /// Sum of `order`.
    unpunched_blocks: u64,
    /// Above the lower limit since the upper one was passed.
    going: bool,
    in_flight: bool,
    enabled: bool,
    /// The file system cannot punch holes.
    unsupported: bool,
    bytes_per_second: u64,
    /// The rate's bound: not before.
    not_before_ns: u64,
    started_ns: u64,
    /// When a checkpoint was asked for, to learn what has died since the last.
    asked_ns: Option<u64>,
    /// An error was reported, and nothing has succeeded since.
    reported: bool,
}

impl Reclaim {
    /// Over the segments of the checkpoint that a volume is opened at.
    pub(super) fn new(rows: &[SegmentRow]) -> Self {
        let mut reclaim = Self {
            candidates: BTreeMap::new(),
            order: BTreeSet::new(),
            unpunched_blocks: 0,
            going: false,
            in_flight: false,
            enabled: true,
            unsupported: false,
            bytes_per_second: DEFAULT_BYTES_PER_SECOND,
            not_before_ns: 0,
            started_ns: 0,
            asked_ns: None,
            reported: false,
        };
        reclaim.committed(rows, &[], 0);
        reclaim
    }

    /// A checkpoint was committed with these rows, and without these segments. Reads up to `serial` may
    /// have begun before.
    pub(super) fn committed(
        &mut self,
        changed: &[SegmentRow],
        removed: &[SegmentNumber],
        serial: u64,
    ) {
        for row in changed.iter().filter(|row| row.sealed) {
            let known = self.candidates.contains_key(&row.number);
            if !known && row.unpunched_blocks() == 0 {
                continue;
            }
            self.change(row.number, |candidate| {
                candidate.dead = row.dead.clone();
                candidate.punched_blocks = candidate.punched_blocks.max(row.punched_blocks);
                candidate.serial = serial;
            });
        }
        for number in removed {
            self.change(*number, |candidate| {
                candidate.dead = DeadSet::new(SegmentKind::Log)
            });
            self.candidates.remove(number);
        }
    }

    fn change(&mut self, number: SegmentNumber, change: impl FnOnce(&mut Candidate)) {
        let candidate = self.candidates.entry(number).or_insert_with(|| Candidate {
            dead: DeadSet::new(SegmentKind::Log),
            punched: Bitmap::default(),
            punched_blocks: 0,
            serial: 0,
        });
        let before = candidate.unpunched();
        change(candidate);
        let after = candidate.unpunched();
        self.order.remove(&(before, number));
        if after > 0 {
            self.order.insert((after, number));
        }
        self.unpunched_blocks = self.unpunched_blocks - u64::from(before) + u64::from(after);
    }

    /// Whether there is enough to do; `pressing`: writes wait for space, so that anything is.
    fn is_due(&mut self, totals: &SpaceTotals, pressing: bool) -> bool {
        let live_blocks = totals.live_blocks + totals.live_node_bytes / BLOCK;
        let limit = match (pressing, self.going) {
            (true, _) => 0,
            (false, true) => live_blocks * STOP_PERCENT / 100,
            (false, false) => (live_blocks * START_PERCENT / 100).max(LEAST_BLOCKS - 1),
        };
        self.going = self.unpunched_blocks > limit;
        self.going && self.enabled && !self.unsupported
    }

    /// How long it waits between two operations while guests have requests under way.
    fn yield_ns(&self, totals: &SpaceTotals) -> u64 {
        let live_blocks = (totals.live_blocks + totals.live_node_bytes / BLOCK).max(1);
        let percent = self.unpunched_blocks.saturating_mul(100) / live_blocks;
        let slack = PRESSING_PERCENT.saturating_sub(percent.max(START_PERCENT));
        YIELD_NS * slack / (PRESSING_PERCENT - START_PERCENT)
    }

    /// The segment with most to give, of those that no read stands in the way of, and what of it.
    fn choose(
        &self,
        oldest_read: u64,
        nodes_held: bool,
    ) -> Option<(SegmentNumber, Vec<(u32, u32)>)> {
        let free = |(_, number): &&(u32, SegmentNumber)| {
            let candidate = &self.candidates[number];
            let is_map = matches!(candidate.dead, DeadSet::Nodes(_));
            candidate.serial < oldest_read && !(is_map && nodes_held)
        };
        let (_, number) = self.order.iter().rev().take(LOOK_AT).find(free)?;
        let candidate = &self.candidates[number];
        let mut runs = candidate.dead.block_runs_without(&candidate.punched);
        runs.truncate(MAX_RANGES);
        (!runs.is_empty()).then_some((*number, runs))
    }

    /// These runs have been punched, durably; returns how many blocks of the segment are.
    fn punched(&mut self, number: SegmentNumber, runs: &[(u32, u32)]) -> u32 {
        let mut punched_blocks = 0;
        if self.candidates.contains_key(&number) {
            self.change(number, |candidate| {
                for &(first, count) in runs {
                    candidate.punched.mark(first, count);
                }
                punched_blocks = candidate.punched_blocks.max(candidate.punched.count());
                candidate.punched_blocks = punched_blocks;
            });
        }
        punched_blocks
    }
}

impl Volume {
    /// How much dead space may be given back a second, at most.
    pub fn set_reclaim(&mut self, bytes_per_second: u64, enabled: bool) {
        self.reclaim.bytes_per_second = bytes_per_second.max(BLOCK);
        self.reclaim.enabled = enabled;
        self.turn_soon = true;
    }

    /// Whether nobody may lose a node of the map, dead or not.
    fn nodes_held(&self) -> bool {
        // A node's read takes no part in the order of reads.
        self.history.holds > 0 || !self.waiting_nodes.is_empty()
    }

    /// Starts the next operation if it is time. Called once a turn.
    pub(super) fn drive_reclaim(&mut self, io: &mut dyn Io, now: Now) {
        self.ask_for_checkpoint(now);
        let totals = self.space.totals();
        let pressing = self.is_short_of_space();
        // A volume that is open for reading changes nothing.
        let due = self.log.is_some() && self.reclaim.is_due(&totals, pressing);
        if !due || self.reclaim.in_flight || self.closing || now.monotonic_ns < self.reclaim_at() {
            return;
        }
        let oldest_read = self.reads_in_flight.first().copied().unwrap_or(u64::MAX);
        let Some((segment, runs)) = self.reclaim.choose(oldest_read, self.nodes_held()) else {
            // What stands in the way ends; a look now and then costs little.
            self.reclaim.not_before_ns = now.monotonic_ns + YIELD_NS;
            return;
        };
        let blocks: u64 = runs.iter().map(|(_, count)| u64::from(*count)).sum();
        let takes_ns =
            u128::from(blocks * BLOCK) * 1_000_000_000 / u128::from(self.reclaim.bytes_per_second);
        let takes_ns = u64::try_from(takes_ns).unwrap_or(u64::MAX);
        self.reclaim.not_before_ns = now.monotonic_ns.saturating_add(takes_ns);
        self.reclaim.started_ns = now.monotonic_ns;
        self.reclaim.in_flight = true;
        let ranges = runs
            .iter()
            .map(|&(first, count)| byte_range(first, count))
            .collect();
        let what = VolumeOp::Reclaim(ReclaimOp::Release { segment, runs });
        self.submit_op(io, segment, Op::Release { ranges }, what);
    }

    /// When the next operation may start; monotonic.
    fn reclaim_at(&self) -> u64 {
        let yields = if self.requests_in_flight() > self.full.waiting() {
            self.reclaim.started_ns + self.reclaim.yield_ns(&self.space.totals())
        } else {
            0
        };
        self.reclaim.not_before_ns.max(yields)
    }

    /// When a turn is needed to go on; monotonic.
    pub(super) fn reclaim_deadline_ns(&self) -> Option<u64> {
        let reclaim = &self.reclaim;
        let works = reclaim.going && reclaim.enabled && !reclaim.unsupported && !self.closing;
        let next = (works && !reclaim.in_flight).then(|| self.reclaim_at());
        let asks = reclaim
            .asked_ns
            .filter(|_| !self.checkpoints.wanted && self.much_has_died())
            .map(|at| at + CHECKPOINT_NS);
        next.into_iter().chain(asks).min()
    }

    pub(super) fn reclaim_op_done(
        &mut self,
        io: &mut dyn Io,
        op: ReclaimOp,
        result: io::Result<usize>,
        now: Now,
    ) {
        let (ReclaimOp::Release { segment, .. } | ReclaimOp::Sync { segment, .. }) = op;
        if let Err(error) = result {
            self.reclaim.in_flight = false;
            return self.reclaim_failed(segment, &error, now);
        }
        match op {
            ReclaimOp::Release { segment, runs } => {
                let what = VolumeOp::Reclaim(ReclaimOp::Sync { segment, runs });
                self.submit_op(io, segment, Op::Sync, what);
            }
            ReclaimOp::Sync { segment, runs } => {
                self.reclaim.in_flight = false;
                self.reclaim.reported = false;
                let punched_blocks = self.reclaim.punched(segment, &runs);
                let before = self.space.row(segment).map_or(0, |row| row.punched_blocks);
                let more = punched_blocks.saturating_sub(before);
                if more > 0 {
                    self.space
                        .update(segment, |row| row.punched_blocks = punched_blocks);
                    self.stats.punched_bytes += u64::from(more) * BLOCK;
                }
                self.full.may_be_back();
                self.turn_soon = true;
            }
        }
    }

    fn reclaim_failed(&mut self, segment: SegmentNumber, error: &io::Error, now: Now) {
        if !self.space.has(segment) {
            // It was removed meanwhile: all of it is free.
            return;
        }
        self.reclaim.not_before_ns = now.monotonic_ns + RETRY_NS;
        let unsupported = matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS));
        self.reclaim.unsupported |= unsupported;
        if !std::mem::replace(&mut self.reclaim.reported, true) {
            let next = if unsupported {
                "only whole segments are given back; use a file system that supports fallocate's punch-hole mode"
            } else {
                "it is tried again"
            };
            self.events.push(VolumeEvent::ReclaimFailed {
                reason: format!("giving back dead blocks of segment {segment}: {error}; {next}"),
            });
        }
    }

    /// Whether so much has died since the last checkpoint that one would be worth while.
    fn much_has_died(&self) -> bool {
        let totals = self.space.totals();
        let fresh = totals
            .unpunched_blocks
            .saturating_sub(self.reclaim.unpunched_blocks);
        let least = if self.is_short_of_space() {
            0
        } else {
            (totals.live_blocks * START_PERCENT / 100).max(2 * self.segment_bytes / BLOCK)
        };
        fresh > least
    }

    fn ask_for_checkpoint(&mut self, now: Now) {
        let waits = |at| now.monotonic_ns < at + CHECKPOINT_NS;
        if self.closing || self.log.is_none() || self.reclaim.asked_ns.is_some_and(waits) {
            return;
        }
        self.reclaim.asked_ns = None;
        if self.much_has_died() {
            self.reclaim.asked_ns = Some(now.monotonic_ns);
            self.want_checkpoint(now);
        }
    }
}

fn byte_range(first: u32, count: u32) -> Range<u64> {
    u64::from(first) * BLOCK..u64::from(first + count) * BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(number: u64, marks: &[(u32, u32)]) -> SegmentRow {
        let mut row = SegmentRow::new(SegmentNumber(number), SegmentKind::Log);
        row.sealed = true;
        row.used_blocks = 8000;
        for &(first, count) in marks {
            row.dead.mark_blocks(first, count);
        }
        row
    }

    fn totals(live_blocks: u64) -> SpaceTotals {
        SpaceTotals {
            live_blocks,
            ..SpaceTotals::default()
        }
    }

    #[test]
    fn it_starts_above_one_limit_and_stops_below_the_other() {
        let mut reclaim = Reclaim::new(&[row(1, &[(2, 100)]), row(2, &[(2, 30)])]);
        // Of so many live blocks, the 130 dead ones are just the limit.
        let (start, stop) = (130 * 100 / START_PERCENT, 130 * 100 / STOP_PERCENT);
        assert!(!reclaim.is_due(&totals(start), false));
        assert!(reclaim.is_due(&totals(start - 1), false));
        assert!(reclaim.is_due(&totals(start), false), "it has begun");
        assert!(!reclaim.is_due(&totals(stop), false));
        assert!(!reclaim.is_due(&totals(start), false), "it has ended");
        assert!(reclaim.is_due(&totals(100_000), true), "space is short");
        let mut little = Reclaim::new(&[row(1, &[(2, 63)])]);
        assert!(!little.is_due(&totals(0), false));
        assert!(little.is_due(&totals(0), true));
    }

    #[test]
    fn it_yields_less_the_more_is_dead() {
        let reclaim = Reclaim::new(&[row(1, &[(2, 1000)])]);
        let yields = |percent| reclaim.yield_ns(&totals(1000 * 100 / percent));
        assert_eq!(yields(START_PERCENT), YIELD_NS);
        let between = yields(u64::midpoint(START_PERCENT, PRESSING_PERCENT));
        assert!(0 < between && between < YIELD_NS);
        assert_eq!(yields(PRESSING_PERCENT), 0);
        assert_eq!(yields(50), 0);
    }

    #[test]
    fn the_segment_with_most_to_give_is_first_and_waits_for_older_reads() {
        let mut reclaim = Reclaim::new(&[row(1, &[(2, 10)])]);
        reclaim.committed(&[row(2, &[(5, 20), (40, 1)])], &[], 7);
        let all = u64::MAX;
        let (first, runs) = reclaim.choose(all, false).unwrap();
        assert_eq!((first, runs), (SegmentNumber(2), vec![(5, 20), (40, 1)]));
        let (first, _) = reclaim.choose(7, false).unwrap();
        assert_eq!(first, SegmentNumber(1), "a read may still see the other");
        assert_eq!(reclaim.choose(8, false).unwrap().0, SegmentNumber(2));
    }

    #[test]
    fn what_was_punched_is_not_punched_again_and_counts_once() {
        let mut reclaim = Reclaim::new(&[row(1, &[(2, 10)])]);
        assert_eq!(reclaim.punched(SegmentNumber(1), &[(2, 4)]), 4);
        assert_eq!(reclaim.choose(1, false).unwrap().1, [(6, 6)]);
        assert_eq!(reclaim.punched(SegmentNumber(1), &[(6, 6)]), 10);
        assert_eq!(reclaim.choose(1, false), None);
        assert_eq!(reclaim.unpunched_blocks, 0);
        reclaim.committed(&[row(1, &[(2, 12)])], &[], 0);
        assert_eq!(reclaim.choose(1, false).unwrap().1, [(12, 2)]);
    }

    #[test]
    fn of_an_earlier_opening_only_the_number_is_known() {
        let known = SegmentRow {
            punched_blocks: 9,
            ..row(1, &[(2, 10)])
        };
        let mut reclaim = Reclaim::new(&[known, row(2, &[])]);
        assert_eq!(reclaim.unpunched_blocks, 1);
        assert_eq!(reclaim.candidates.len(), 1, "nothing to do in the other");
        assert_eq!(reclaim.choose(1, false).unwrap().1, [(2, 10)]);
        assert_eq!(reclaim.punched(SegmentNumber(1), &[(2, 10)]), 10);
        assert_eq!(reclaim.unpunched_blocks, 0);
    }

    #[test]
    fn removed_segments_and_held_nodes_are_left_alone() {
        let mut nodes = SegmentRow::new(SegmentNumber(3), SegmentKind::Map);
        nodes.sealed = true;
        nodes.dead.mark_node(4096 + 512, 3 * 4096);
        let mut reclaim = Reclaim::new(&[row(1, &[(2, 100)]), nodes]);
        reclaim.committed(&[], &[SegmentNumber(1)], 0);
        assert_eq!(reclaim.unpunched_blocks, 2);
        assert_eq!(reclaim.choose(1, true), None);
        assert_eq!(reclaim.choose(1, false).unwrap().1, [(2, 2)]);
        assert_eq!(reclaim.punched(SegmentNumber(1), &[(2, 100)]), 0);
    }

    #[test]
    fn unsealed_segments_are_left_alone() {
        let open = SegmentRow {
            sealed: false,
            ..row(1, &[(2, 100)])
        };
        assert_eq!(Reclaim::new(&[open]).choose(1, false), None);
    }

    #[test]
    fn one_operation_has_a_bounded_number_of_holes() {
        let marks: Vec<_> = (0..2000).map(|i| (2 + 2 * i, 1)).collect();
        let mut reclaim = Reclaim::new(&[row(1, &marks)]);
        let mut operations = 0;
        while let Some((segment, runs)) = reclaim.choose(1, false) {
            assert!(runs.len() <= MAX_RANGES);
            reclaim.punched(segment, &runs);
            operations += 1;
        }
        assert_eq!(operations, 2000usize.div_ceil(MAX_RANGES));
    }
}
