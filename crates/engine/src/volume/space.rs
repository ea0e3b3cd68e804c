//! What each segment of a volume holds: what is live, what is dead, and what of that is given back.
//!
//! Invariants:
//! - Counts are exact. What comes to life adds to `live`; what dies is marked in the segment's dead set,
//!   and `live` falls by what was not marked before, so that a report made twice counts once.
//! - What a snapshot still reaches does not die when the head replaces it: addresses grow with time, and
//!   what lies below the position of the head's parent was there when the parent was taken.
//! - Only the volume's own segments have rows. A clone's blocks in other volumes' segments are theirs.
//! - Nodes that a removed snapshot alone reached become dead in the checkpoint that has its blocks dead,
//!   or a later one, never earlier: a removal that starts again after a crash needs the nodes to find
//!   the blocks.
//!
//! A segment without anything live is dead; its file goes after a checkpoint that no longer needs it has
//! been committed in the catalog. A log segment may be needed for what it says beside its blocks:
//! notes, and unmaps that keep blocks of older segments from coming back when maps are rebuilt.
//!
//! Owned by one volume, called from its worker only.

use std::collections::{BTreeMap, BTreeSet};

use super::dead::DeadSet;
use crate::map::{Displaced, NodeLocation};
use crate::segment::SegmentKind;
use crate::types::{Address, BLOCK_BYTES, SegmentNumber};

/// What the catalog keeps of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentRow {
    pub number: SegmentNumber,
    pub kind: SegmentKind,
    /// Nothing more will be written to it.
    pub sealed: bool,
    /// Blocks written, header and record headers included.
    pub used_blocks: u32,
    /// Live data blocks (log) or live node bytes (map).
    pub live: u64,
    /// Which are not.
    pub dead: DeadSet,
    /// Dead blocks whose space was given back.
    pub punched_blocks: u32,
    /// Blocks of snapshot and state notes in it.
    pub notes: u32,
    /// Unmaps in it.
    pub unmaps: u32,
}

impl SegmentRow {
    /// A segment that has its header and nothing else.
    #[must_use]
    pub fn new(number: SegmentNumber, kind: SegmentKind) -> Self {
        Self {
            number,
            kind,
            sealed: false,
            used_blocks: 1,
            live: 0,
            dead: DeadSet::new(kind),
            punched_blocks: 0,
            notes: 0,
            unmaps: 0,
        }
    }

    /// Blocks that it takes on the device.
    #[must_use]
    pub fn taken_blocks(&self) -> u32 {
        self.used_blocks.saturating_sub(self.punched_blocks)
    }

    /// Dead blocks that could be given back.
    #[must_use]
    pub fn unpunched_blocks(&self) -> u32 {
        self.dead.whole_blocks().saturating_sub(self.punched_blocks)
    }
}

/// Log segments without a live block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removable {
    /// Nothing needs these any more.
    pub now: Vec<SegmentNumber>,
    /// These once their notes and unmaps were repeated.
    pub carry: Vec<SegmentNumber>,
}

/// The segments of one volume.
#[derive(Debug, Default)]
pub struct SpaceTable {
    rows: BTreeMap<SegmentNumber, SegmentRow>,
    /// Rows that the catalog does not have as they are.
    changed: BTreeSet<SegmentNumber>,
    totals: SpaceTotals,
    /// Nodes of removed snapshots, dead with the next freeze.
    released: Vec<NodeLocation>,
}

#[allow(
    dead_code,
    reason = "some are for snapshots, which come with the next change"
)]
impl SpaceTable {
    #[must_use]
    pub fn new(rows: &[SegmentRow]) -> Self {
        let mut table = Self::default();
        for row in rows {
            table.remove(row.number);
            table.totals.add(row);
            table.rows.insert(row.number, row.clone());
        }
        table
    }

    /// Adds a segment that was just made.
    pub fn add(&mut self, number: SegmentNumber, kind: SegmentKind) {
        let totals = &mut self.totals;
        self.rows.entry(number).or_insert_with(|| {
            let row = SegmentRow::new(number, kind);
            totals.add(&row);
            row
        });
        self.changed.insert(number);
    }

    pub fn rows(&self) -> impl Iterator<Item = &SegmentRow> {
        self.rows.values()
    }

    #[must_use]
    pub fn row(&self, number: SegmentNumber) -> Option<&SegmentRow> {
        self.rows.get(&number)
    }

    /// Whether the segment is one of this volume's own.
    #[must_use]
    pub fn has(&self, number: SegmentNumber) -> bool {
        self.rows.contains_key(&number)
    }

    /// Changes a row by `change`, if there is one.
    pub fn update(&mut self, number: SegmentNumber, change: impl FnOnce(&mut SegmentRow)) {
        if let Some(row) = self.rows.get_mut(&number) {
            self.totals.subtract(row);
            change(row);
            self.totals.add(row);
            self.changed.insert(number);
        }
    }

    /// `blocks` of a log segment, or bytes of a map segment, came to life.
    pub fn revive(&mut self, number: SegmentNumber, amount: u64) {
        self.update(number, |row| row.live += amount);
    }

    /// The head has something else in the place of these blocks. Those at `parent_position` and above
    /// die; those below are what the head's parent has, too ([`Address::NONE`]: there is none).
    pub fn displace(&mut self, displaced: &mut Vec<Displaced>, parent_position: Address) {
        for Displaced { address, count } in displaced.drain(..) {
            let held = if address >= parent_position {
                0
            } else if address.segment() == parent_position.segment() {
                parent_position.block() - address.block()
            } else {
                count
            };
            if held < count {
                self.kill_blocks(address.segment(), address.block() + held, count - held);
            }
        }
    }

    /// No root reaches these blocks and nodes any more: they were those of a removed snapshot alone.
    /// All of one removal come in one call, so that one checkpoint has them all dead.
    pub fn release(&mut self, blocks: &[Displaced], nodes: &[NodeLocation]) {
        for Displaced { address, count } in blocks {
            self.kill_blocks(address.segment(), address.block(), *count);
        }
        let own = |node: &&NodeLocation| self.rows.contains_key(&node.segment);
        let nodes: Vec<NodeLocation> = nodes.iter().filter(own).copied().collect();
        self.released.extend(nodes);
    }

    fn kill_blocks(&mut self, number: SegmentNumber, first: u32, count: u32) {
        self.update(number, |row| {
            let new = row.dead.mark_blocks(first, count).into();
            debug_assert!(row.live >= new, "more blocks died than lived");
            row.live = row.live.saturating_sub(new);
        });
    }

    /// Nodes were superseded; a checkpoint is about to freeze what is dead.
    pub fn drop_nodes(&mut self, nodes: &mut Vec<NodeLocation>) {
        let released = std::mem::take(&mut self.released);
        for node in nodes.drain(..).chain(released) {
            self.update(node.segment, |row| {
                let new = row.dead.mark_node(node.offset_bytes, node.len_bytes).into();
                debug_assert!(row.live >= new, "more nodes died than lived");
                row.live = row.live.saturating_sub(new);
            });
        }
    }

    /// A log segment got a snapshot or state note of so many blocks.
    pub fn count_notes(&mut self, number: SegmentNumber, blocks: u32) {
        self.update(number, |row| row.notes = row.notes.saturating_add(blocks));
    }

    /// A log segment got unmaps: entries, or those of an unmaps note.
    pub fn count_unmaps(&mut self, number: SegmentNumber, unmaps: u32) {
        self.update(number, |row| row.unmaps = row.unmaps.saturating_add(unmaps));
    }

    /// What a log segment says beside its blocks was repeated at the log's end: its unmaps, and with
    /// `state` a newer state note.
    pub fn carried(&mut self, number: SegmentNumber, state: bool) {
        self.update(number, |row| {
            row.unmaps = 0;
            if state {
                row.notes = 0;
            }
        });
    }

    /// The rows that changed since the last call, as they are now.
    pub fn take_changed(&mut self) -> Vec<SegmentRow> {
        std::mem::take(&mut self.changed)
            .iter()
            .filter_map(|n| self.rows.get(n).cloned())
            .collect()
    }

    /// The catalog did not take these after all.
    pub fn changed_again(&mut self, rows: &[SegmentRow]) {
        self.changed.extend(
            rows.iter()
                .map(|row| row.number)
                .filter(|n| self.rows.contains_key(n)),
        );
    }

    #[must_use]
    pub fn has_changes(&self) -> bool {
        !self.changed.is_empty() || !self.released.is_empty()
    }

    /// Sealed log segments without a live block, if older than `before` or without any content.
    ///
    /// `newest_state`: where the newest state note is, which is durable when the segments go. `clone`:
    /// the volume's first blocks are another volume's, so that its unmaps always matter. Ascending; in
    /// this order files should go, because unmaps matter as long as an older segment is there.
    #[must_use]
    pub fn removable(
        &self,
        before: SegmentNumber,
        newest_state: Option<Address>,
        clone: bool,
    ) -> Removable {
        let mut removable = Removable::default();
        let mut older_stays = clone;
        for row in self.rows.values().filter(|r| r.kind == SegmentKind::Log) {
            let is_dead = row.sealed && row.live == 0;
            if !is_dead || (row.number >= before && row.used_blocks > 1) {
                older_stays = true;
                continue;
            }
            let newer_state = newest_state.is_some_and(|state| state.segment() > row.number);
            if (row.notes > 0 && !newer_state) || (row.unmaps > 0 && older_stays) {
                removable.carry.push(row.number);
                older_stays = true;
            } else {
                removable.now.push(row.number);
            }
        }
        removable
    }

    /// Sealed map segments without a live node.
    #[must_use]
    pub fn dead_map_segments(&self) -> Vec<SegmentNumber> {
        self.rows
            .values()
            .filter(|row| row.kind == SegmentKind::Map && row.sealed && row.live == 0)
            .map(|row| row.number)
            .collect()
    }

    /// Sealed map segments worth emptying, emptiest first: none while nodes take less than twice what
    /// is live (and a little), else those less than half live, with at most `most_live_bytes` together.
    ///
    /// Only those above `held` count: nodes of snapshots, in older ones, stay where they are.
    #[must_use]
    pub fn sparse_map_segments(
        &self,
        held: Option<SegmentNumber>,
        most_live_bytes: u64,
    ) -> Vec<SegmentNumber> {
        const LITTLE_BLOCKS: u64 = 256;
        let taken_bytes = |row: &SegmentRow| u64::from(row.taken_blocks()) * BLOCK_BYTES as u64;
        let movable = || {
            self.rows
                .values()
                .filter(|row| row.kind == SegmentKind::Map)
                .filter(|row| held.is_none_or(|held| row.number > held))
        };
        let live_bytes: u64 = movable().map(|row| row.live).sum();
        let all_bytes: u64 = movable().map(taken_bytes).sum();
        if all_bytes <= 2 * live_bytes + LITTLE_BLOCKS * BLOCK_BYTES as u64 {
            return Vec::new();
        }
        let mut sparse: Vec<&SegmentRow> = movable()
            .filter(|row| row.sealed && row.live * 2 < taken_bytes(row))
            .collect();
        sparse.sort_by_key(|row| (row.live, row.number));
        let mut left = most_live_bytes;
        sparse
            .into_iter()
            .map_while(|row| {
                left = left.checked_sub(row.live)?;
                Some(row.number)
            })
            .collect()
    }

    /// Blocks written to a segment.
    #[must_use]
    pub fn used_blocks(&self, number: SegmentNumber) -> u32 {
        self.rows.get(&number).map_or(0, |row| row.used_blocks)
    }

    pub fn remove(&mut self, number: SegmentNumber) {
        if let Some(row) = self.rows.remove(&number) {
            self.totals.subtract(&row);
        }
        self.changed.remove(&number);
    }

    /// Sums over all segments; costs the same for any number of them.
    #[must_use]
    pub const fn totals(&self) -> SpaceTotals {
        self.totals
    }
}

/// Sums over a volume's segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceTotals {
    pub segments: u64,
    pub live_blocks: u64,
    /// Written to log segments, punched or not.
    pub log_blocks: u64,
    pub live_node_bytes: u64,
    /// Written to map segments, punched or not.
    pub map_blocks: u64,
    /// Dead blocks of data, punched or not.
    pub dead_blocks: u64,
    pub punched_blocks: u64,
    /// Dead blocks, of data or whole of nodes, that were not given back.
    pub unpunched_blocks: u64,
    /// What the segments take on the device.
    pub allocated_bytes: u64,
}

impl SpaceTotals {
    fn add(&mut self, row: &SegmentRow) {
        self.apply(row, u64::checked_add);
    }

    fn subtract(&mut self, row: &SegmentRow) {
        self.apply(row, u64::checked_sub);
    }

    fn apply(&mut self, row: &SegmentRow, operation: fn(u64, u64) -> Option<u64>) {
        let sum = |field: &mut u64, amount: u64| {
            *field = operation(*field, amount).expect("sums are those of the rows");
        };
        sum(&mut self.segments, 1);
        sum(&mut self.punched_blocks, row.punched_blocks.into());
        sum(&mut self.unpunched_blocks, row.unpunched_blocks().into());
        let taken_bytes = u64::from(row.taken_blocks()) * BLOCK_BYTES as u64;
        sum(&mut self.allocated_bytes, taken_bytes);
        match row.kind {
            SegmentKind::Log => {
                sum(&mut self.live_blocks, row.live);
                sum(&mut self.log_blocks, row.used_blocks.into());
                sum(&mut self.dead_blocks, row.dead.count().into());
            }
            SegmentKind::Map => {
                sum(&mut self.live_node_bytes, row.live);
                sum(&mut self.map_blocks, row.used_blocks.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(number: u64, live: u64) -> SegmentRow {
        SegmentRow {
            sealed: true,
            used_blocks: 100,
            live,
            ..SegmentRow::new(SegmentNumber(number), SegmentKind::Log)
        }
    }

    fn map(number: u64, live: u64) -> SegmentRow {
        SegmentRow {
            sealed: true,
            used_blocks: 1000,
            live,
            ..SegmentRow::new(SegmentNumber(number), SegmentKind::Map)
        }
    }

    fn displaced(segment: u64, block: u32, count: u32) -> Displaced {
        let address = Address::new(SegmentNumber(segment), block);
        Displaced { address, count }
    }

    fn live(table: &SpaceTable, number: u64) -> u64 {
        table.row(SegmentNumber(number)).unwrap().live
    }

    fn node(segment: u64, offset_bytes: u32, len_bytes: u32) -> NodeLocation {
        NodeLocation {
            segment: SegmentNumber(segment),
            offset_bytes,
            len_bytes,
            checksum: 0,
        }
    }

    fn numbers(list: &[u64]) -> Vec<SegmentNumber> {
        list.iter().copied().map(SegmentNumber).collect()
    }

    #[test]
    fn blocks_below_the_parents_position_stay_live() {
        let mut table = SpaceTable::new(&[log(5, 50), log(6, 50), log(7, 50)]);
        let parent = Address::new(SegmentNumber(6), 40);
        let mut list = vec![
            displaced(5, 60, 10),
            displaced(6, 30, 20),
            displaced(6, 20, 20),
            displaced(6, 60, 5),
            displaced(7, 2, 3),
            displaced(99, 2, 3),
        ];
        table.displace(&mut list, parent);
        assert!(list.is_empty());
        assert_eq!(live(&table, 5), 50);
        assert_eq!(live(&table, 6), 50 - 10 - 5);
        assert_eq!(live(&table, 7), 47);
        let dead = &table.row(SegmentNumber(6)).unwrap().dead;
        assert_eq!(dead.block_runs(), [(40, 10), (60, 5)]);
    }

    #[test]
    fn what_is_reported_dead_twice_counts_once() {
        let mut table = SpaceTable::new(&[log(5, 50), map(6, 4096)]);
        table.displace(&mut vec![displaced(5, 10, 10)], Address::NONE);
        let nodes = [node(6, 4096, 2048), node(77, 4096, 2048)];
        for _ in 0..2 {
            table.release(&[displaced(5, 15, 10), displaced(77, 1, 1)], &nodes);
            assert_eq!(live(&table, 5), 35);
            table.drop_nodes(&mut vec![nodes[0]]);
            assert_eq!(live(&table, 6), 2048);
        }
        assert_eq!(table.totals().dead_blocks, 15);
        assert_eq!(table.totals().live_blocks, 35);
    }

    #[test]
    fn released_nodes_die_with_the_next_freeze_and_not_before() {
        let mut table = SpaceTable::new(&[map(6, 4096)]);
        table.release(&[], &[node(6, 4096, 4096)]);
        assert!(table.has_changes());
        assert_eq!(live(&table, 6), 4096);
        table.drop_nodes(&mut Vec::new());
        assert_eq!(live(&table, 6), 0);
        assert_eq!(table.dead_map_segments(), numbers(&[6]));
    }

    #[test]
    fn unmaps_keep_a_dead_segment_only_while_an_older_one_stays() {
        let unmaps = |row| SegmentRow { unmaps: 3, ..row };
        let rows = [
            unmaps(log(1, 0)),
            log(2, 0),
            log(3, 1),
            unmaps(log(4, 0)),
            log(5, 0),
        ];
        let mut table = SpaceTable::new(&rows);
        let before = SegmentNumber(9);
        let removable = table.removable(before, None, false);
        assert_eq!(removable.now, numbers(&[1, 2, 5]));
        assert_eq!(removable.carry, numbers(&[4]));
        let of_a_clone = table.removable(before, None, true);
        assert_eq!(of_a_clone.now, numbers(&[2, 5]));
        assert_eq!(of_a_clone.carry, numbers(&[1, 4]));
        table.carried(SegmentNumber(4), false);
        let removable = table.removable(before, None, false);
        assert_eq!(removable.now, numbers(&[1, 2, 4, 5]));
    }

    #[test]
    fn notes_keep_a_dead_segment_until_a_newer_segment_has_the_state() {
        let notes = |row| SegmentRow { notes: 1, ..row };
        let table = SpaceTable::new(&[notes(log(1, 0)), notes(log(2, 0)), log(3, 0)]);
        let before = SegmentNumber(9);
        let state = |number| Some(Address::new(SegmentNumber(number), 2));
        assert_eq!(table.removable(before, None, false).now, numbers(&[3]));
        let removable = table.removable(before, state(2), false);
        assert_eq!(removable.now, numbers(&[1, 3]));
        assert_eq!(removable.carry, numbers(&[2]));
        let removable = table.removable(before, state(3), false);
        assert_eq!(removable.now, numbers(&[1, 2, 3]));
    }

    #[test]
    fn segments_that_no_checkpoint_covers_stay_unless_they_are_empty() {
        let empty = SegmentRow {
            used_blocks: 1,
            ..log(12, 0)
        };
        let unsealed = SegmentRow {
            sealed: false,
            ..log(3, 0)
        };
        let table = SpaceTable::new(&[unsealed, log(9, 0), log(10, 0), empty]);
        let removable = table.removable(SegmentNumber(10), None, false);
        assert_eq!(removable.now, numbers(&[9, 12]));
        assert_eq!(removable.carry, numbers(&[]));
    }

    #[test]
    fn segments_with_nodes_of_snapshots_are_not_emptied() {
        let rows: Vec<_> = (1..=8).map(|n| map(n, 50_000)).collect();
        let table = SpaceTable::new(&rows);
        let sparse = |held| table.sparse_map_segments(held, 200_000);
        assert_eq!(sparse(None), numbers(&[1, 2, 3, 4]));
        assert_eq!(sparse(Some(SegmentNumber(5))), numbers(&[6, 7, 8]));
        assert_eq!(sparse(Some(SegmentNumber(8))), numbers(&[]));
    }

    #[test]
    fn totals_follow_every_change() {
        let mut table = SpaceTable::new(&[log(1, 50), map(2, 4096)]);
        table.add(SegmentNumber(3), SegmentKind::Log);
        table.add(SegmentNumber(3), SegmentKind::Log);
        table.revive(SegmentNumber(3), 7);
        table.update(SegmentNumber(1), |row| {
            row.dead.mark_blocks(4, 30);
            row.punched_blocks = 20;
        });
        let totals = table.totals();
        assert_eq!(totals.segments, 3);
        assert_eq!(totals.live_blocks, 57);
        assert_eq!(totals.log_blocks, 101);
        assert_eq!((totals.dead_blocks, totals.punched_blocks), (30, 20));
        assert_eq!(totals.unpunched_blocks, 10);
        assert_eq!(totals.allocated_bytes, (100 + 1000 + 1 - 20) * 4096);
        assert_eq!(table.row(SegmentNumber(1)).unwrap().unpunched_blocks(), 10);
        for number in 1..=3 {
            table.remove(SegmentNumber(number));
        }
        assert_eq!(table.totals(), SpaceTotals::default());
    }
}
