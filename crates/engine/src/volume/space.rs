//! What each segment of a volume holds: live blocks of log segments, live bytes of map segments.
//!
//! Counts are exact: an insert adds to the new address's segment, and what the map displaced is taken
//! from the old one's. A segment without anything live is dead; its file goes after a checkpoint that
//! no longer needs it has been committed in the catalog.

use std::collections::{BTreeMap, BTreeSet};

use crate::map::{Displaced, NodeLocation};
use crate::segment::SegmentKind;
use crate::types::{BLOCK_BYTES, SegmentNumber};

/// What the catalog keeps of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRow {
    pub number: SegmentNumber,
    pub kind: SegmentKind,
    /// Nothing more will be written to it.
    pub sealed: bool,
    /// Blocks written, header and record headers included.
    pub used_blocks: u32,
    /// Live data blocks (log) or live node bytes (map).
    pub live: u64,
}

/// The segments of one volume.
#[derive(Debug, Default)]
pub struct SpaceTable {
    rows: BTreeMap<SegmentNumber, SegmentRow>,
    /// Rows that the catalog does not have as they are.
    changed: BTreeSet<SegmentNumber>,
}

impl SpaceTable {
    #[must_use]
    pub fn new(rows: &[SegmentRow]) -> Self {
        Self {
            rows: rows.iter().map(|row| (row.number, *row)).collect(),
            changed: BTreeSet::new(),
        }
    }

    /// Adds a segment that was just made.
    pub fn add(&mut self, number: SegmentNumber, kind: SegmentKind) {
        let row = SegmentRow {
            number,
            kind,
            sealed: false,
            used_blocks: 1,
            live: 0,
        };
        self.rows.entry(number).or_insert(row);
        self.changed.insert(number);
    }

    pub fn rows(&self) -> impl Iterator<Item = &SegmentRow> {
        self.rows.values()
    }

    /// Changes a row by `change`, if there is one.
    pub fn update(&mut self, number: SegmentNumber, change: impl FnOnce(&mut SegmentRow)) {
        if let Some(row) = self.rows.get_mut(&number) {
            change(row);
            self.changed.insert(number);
        }
    }

    /// `blocks` of a log segment, or bytes of a map segment, came to life.
    pub fn revive(&mut self, number: SegmentNumber, amount: u64) {
        self.update(number, |row| row.live += amount);
    }

    /// Blocks lost their mapping.
    pub fn displace(&mut self, displaced: &mut Vec<Displaced>) {
        for Displaced { address, count } in displaced.drain(..) {
            self.update(address.segment(), |row| {
                debug_assert!(row.live >= u64::from(count), "more blocks died than lived");
                row.live = row.live.saturating_sub(u64::from(count));
            });
        }
    }

    /// Nodes were superseded.
    pub fn drop_nodes(&mut self, nodes: &mut Vec<NodeLocation>) {
        for node in nodes.drain(..) {
            self.update(node.segment, |row| {
                debug_assert!(
                    row.live >= u64::from(node.len_bytes),
                    "more nodes died than lived"
                );
                row.live = row.live.saturating_sub(u64::from(node.len_bytes));
            });
        }
    }

    /// The rows that changed since the last call, as they are now.
    pub fn take_changed(&mut self) -> Vec<SegmentRow> {
        std::mem::take(&mut self.changed)
            .iter()
            .filter_map(|n| self.rows.get(n).copied())
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
        !self.changed.is_empty()
    }

    /// Sealed segments of a kind with nothing live, if older than `before` or without any content.
    #[must_use]
    pub fn dead(&self, kind: SegmentKind, before: SegmentNumber) -> Vec<SegmentNumber> {
        self.rows
            .values()
            .filter(|row| row.kind == kind && row.sealed && row.live == 0)
            .filter(|row| row.number < before || row.used_blocks <= 1)
            .map(|row| row.number)
            .collect()
    }

    /// Sealed map segments worth emptying, emptiest first: none while nodes take less than twice what
    /// is live (and a little), else those less than half live, with at most `most_live_bytes` together.
    #[must_use]
    pub fn sparse_map_segments(&self, most_live_bytes: u64) -> Vec<SegmentNumber> {
        const LITTLE_BLOCKS: u64 = 256;
        let totals = self.totals();
        let live_blocks = totals.live_node_bytes.div_ceil(BLOCK_BYTES as u64);
        if totals.map_blocks <= 2 * live_blocks + LITTLE_BLOCKS {
            return Vec::new();
        }
        let mut sparse: Vec<&SegmentRow> = self
            .rows
            .values()
            .filter(|row| row.kind == SegmentKind::Map && row.sealed)
            .filter(|row| row.live * 2 < u64::from(row.used_blocks) * BLOCK_BYTES as u64)
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
        self.rows.remove(&number);
        self.changed.remove(&number);
    }

    /// Live data blocks, and blocks that log segments take on the device.
    #[must_use]
    pub fn totals(&self) -> SpaceTotals {
        let mut totals = SpaceTotals {
            segments: self.rows.len() as u64,
            ..SpaceTotals::default()
        };
        for row in self.rows.values() {
            match row.kind {
                SegmentKind::Log => {
                    totals.live_blocks += row.live;
                    totals.log_blocks += u64::from(row.used_blocks);
                }
                SegmentKind::Map => {
                    totals.live_node_bytes += row.live;
                    totals.map_blocks += u64::from(row.used_blocks);
                }
            }
        }
        totals
    }
}

/// Sums over a volume's segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceTotals {
    pub segments: u64,
    pub live_blocks: u64,
    pub log_blocks: u64,
    pub live_node_bytes: u64,
    pub map_blocks: u64,
}
