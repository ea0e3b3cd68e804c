//! Crashes that are chosen instead of drawn: what power loss or the process's death may leave done or
//! not at this moment, item by item, and the disk that is left for any choice.
//!
//! The unit is what a disk does at once: a block (4 KiB) of a write or of a release, an entry of a
//! directory. Since any set of them may be chosen, this covers all reorderings of what no sync has
//! ordered, and writes torn at block boundaries; [`super::CrashMode::Random`] tears blocks, too.

use std::collections::{BTreeMap, BTreeSet};

use super::content::{Change, released, written};
use super::disk::{Segment, State};
use super::fault::SimOp;
use super::rng::SimRng;
use super::{SimDisk, disk::InFlight};
use crate::types::SegmentNumber;

/// One thing that a crash may leave done or not. Equal as long as it is the same thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Undecided {
    /// A completed change of a block that no sync has covered, by its number on this disk.
    Change(u64),
    /// A removal that has completed and is not durable.
    Removal(SegmentNumber),
    /// A part of an operation in flight. Of a write or release: the number of the block in it. Of a
    /// creation: 0 the directory entry, 1 the header. Of a removal: 0.
    InFlight { operation: u64, part: u32 },
}

impl SimDisk {
    /// What power loss now would decide, in a fixed order.
    #[must_use]
    pub fn undecided(&self) -> Vec<Undecided> {
        let state = self.lock();
        let mut items = Vec::new();
        let gone = state.removed.keys();
        let gone = gone.filter(|number| !state.segments.contains_key(number));
        items.extend(gone.map(|&number| Undecided::Removal(number)));
        for segment in state.segments.values() {
            items.extend(segment.undecided().map(Undecided::Change));
        }
        items.extend(state.in_flight.iter().flat_map(|op| state.parts(op)));
        items
    }

    /// What the death of the process now would decide: operations in flight only.
    #[must_use]
    pub fn in_flight_parts(&self) -> Vec<Undecided> {
        let state = self.lock();
        let in_flight = state.in_flight.iter();
        in_flight.flat_map(|op| state.parts(op)).collect()
    }

    /// The disk after power loss now, of which `done` says what is left; everything is durable then.
    /// A removal that is undone brings the segment back as it was, unsynced changes included.
    #[must_use]
    pub fn crash_with(&self, done: &dyn Fn(Undecided) -> bool) -> Self {
        let mut next = self.lock().after_power_loss(done);
        for segment in next.segments.values_mut() {
            segment.settle();
        }
        Self::from_state(next)
    }

    /// The disk after the death of the process now: completed operations have happened, `done` says
    /// which in flight.
    #[must_use]
    pub fn kill_with(&self, done: &dyn Fn(Undecided) -> bool) -> Self {
        let state = self.lock();
        let (segments, next_change) = (state.segments.clone(), state.next_change);
        let mut next = State::restarted(SimRng::new(next_change), segments, next_change);
        next.removed = state.removed.clone();
        for op in &state.in_flight {
            next.finish_in_flight(op, done);
        }
        drop(state);
        Self::from_state(next)
    }
}

fn changes(op: &InFlight, next_id: &mut u64) -> Vec<Change> {
    match &op.op {
        SimOp::Write {
            offset_bytes, data, ..
        } => written(*offset_bytes, data, next_id),
        SimOp::Release { ranges } => released(ranges, next_id),
        SimOp::Create { header } => written(0, header, next_id),
        _ => Vec::new(),
    }
}

impl Segment {
    /// The unsynced changes that make a difference, by their numbers: a hole where nothing is does not.
    fn undecided(&self) -> impl Iterator<Item = u64> {
        let mut filled = BTreeSet::new();
        self.unsynced.iter().filter_map(move |change| {
            match change.whole_hole() {
                Some(at) if !self.durable.has(at) && !filled.contains(&at) => return None,
                Some(_) => {}
                None => drop(filled.insert(change.sector)),
            }
            Some(change.id)
        })
    }
}

impl State {
    /// The parts of an operation in flight that may have happened by themselves and would be noticed.
    fn parts(&self, op: &InFlight) -> Vec<Undecided> {
        let segment = self.segments.get(&op.segment);
        let empty = |change: &Change| {
            let hole = change.whole_hole();
            hole.is_some_and(|at| segment.is_none_or(|segment| !segment.current.has(at)))
        };
        let count = match &op.op {
            SimOp::Create { .. } => 2,
            SimOp::Remove => 1,
            SimOp::Read { .. } | SimOp::Sync | SimOp::Reserve { .. } => 0,
            SimOp::Write { .. } | SimOp::Release { .. } => {
                let changes = (0..).zip(changes(op, &mut 0));
                let seen = changes.filter(|(_, change)| !empty(change));
                let operation = op.id;
                return seen
                    .map(|(part, _)| Undecided::InFlight { operation, part })
                    .collect();
            }
        };
        let operation = op.id;
        (0..count)
            .map(|part| Undecided::InFlight { operation, part })
            .collect()
    }

    fn after_power_loss(&self, done: &dyn Fn(Undecided) -> bool) -> Self {
        let mut segments = BTreeMap::new();
        for (&number, segment) in &self.segments {
            let mut current = segment.durable.clone();
            for change in &segment.unsynced {
                if done(Undecided::Change(change.id)) {
                    current.apply(change);
                }
            }
            segments.insert(number, Segment::of(current));
        }
        for (&number, segment) in &self.removed {
            if !segments.contains_key(&number) && !done(Undecided::Removal(number)) {
                segments.insert(number, Segment::of(segment.current.clone()));
            }
        }
        let seed = SimRng::new(self.next_change);
        let mut next = Self::restarted(seed, segments, self.next_change);
        for op in &self.in_flight {
            next.finish_in_flight(op, done);
        }
        next.removed.clear();
        next
    }

    fn finish_in_flight(&mut self, op: &InFlight, done: &dyn Fn(Undecided) -> bool) {
        let operation = op.id;
        let part_done = |part: u32| done(Undecided::InFlight { operation, part });
        match &op.op {
            SimOp::Remove => {
                if part_done(0) {
                    self.remove(op.segment);
                }
            }
            SimOp::Create { .. } => {
                if part_done(0) && !self.segments.contains_key(&op.segment) {
                    let mut segment = Segment::default();
                    if part_done(1) {
                        segment.change(changes(op, &mut self.next_change));
                    }
                    self.segments.insert(op.segment, segment);
                }
            }
            _ => {
                let changes = changes(op, &mut self.next_change);
                let Some(segment) = self.segments.get_mut(&op.segment) else {
                    return;
                };
                let kept = (0..).zip(changes).filter(|(part, _)| part_done(*part));
                segment.change(kept.map(|(_, change)| change));
            }
        }
    }
}
