//! What the catalog holds of one volume, and the commits that policy makes: the rules of
//! ARCHITECTURE.md, "Snapshots, clones, and what is dead", without a database.
//!
//! Each method that changes it is one transaction: a crash comes before or after.

use std::collections::BTreeMap;

use vhostd_engine::map::NodeLocation;
use vhostd_engine::types::{Address, Epoch, SegmentNumber, Uuid};
use vhostd_engine::volume::{
    CheckpointResult, CheckpointState, FoundSnapshot, Parent, SegmentRow, SnapshotRoot,
};

use super::VOLUME;

/// A row of the table of snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotEntry {
    pub uuid: Uuid,
    pub parent: Option<Uuid>,
    pub position: Address,
    pub size_bytes: u64,
    /// Never to be read again.
    pub removing: bool,
    /// The head has left it: what it replaces of this snapshot's dies at once.
    pub left: bool,
    /// `None`: pending.
    pub root: Option<Option<NodeLocation>>,
    pub mapped_blocks: u64,
}

/// What the catalog would hold.
#[derive(Clone, Debug)]
pub struct Catalog {
    pub uuid: Uuid,
    pub checkpoint: CheckpointState,
    pub mapped_blocks: u64,
    pub rows: BTreeMap<SegmentNumber, SegmentRow>,
    pub epoch: Epoch,
    pub size_bytes: u64,
    pub next_number: u64,
    pub parent: Option<Uuid>,
    pub clone: bool,
    /// In the order of the log.
    pub snapshots: Vec<SnapshotEntry>,
    /// (position, to).
    pub rollbacks: Vec<(Address, Address)>,
    /// Tells the states of the catalog apart.
    pub commits: u64,
}

impl Catalog {
    pub fn new(size_bytes: u64) -> Self {
        Self {
            uuid: VOLUME,
            checkpoint: CheckpointState::nothing(),
            mapped_blocks: 0,
            rows: BTreeMap::new(),
            epoch: Epoch(0),
            size_bytes,
            next_number: 1,
            parent: None,
            clone: false,
            snapshots: Vec::new(),
            rollbacks: Vec::new(),
            commits: 0,
        }
    }

    /// A clone of one of this volume's snapshots, which has a root.
    pub fn clone_of(&self, snapshot: Uuid, uuid: Uuid) -> Self {
        let of = self.snapshot(snapshot).expect("the snapshot is there");
        let mut made = Self::new(of.size_bytes);
        made.uuid = uuid;
        made.checkpoint.root = of.root.expect("the snapshot has a root");
        made.mapped_blocks = of.mapped_blocks;
        made.next_number = self.next_number;
        made.clone = true;
        made
    }

    pub fn snapshot(&self, uuid: Uuid) -> Option<&SnapshotEntry> {
        self.snapshots.iter().find(|row| row.uuid == uuid)
    }

    fn snapshot_mut(&mut self, uuid: Uuid) -> Option<&mut SnapshotEntry> {
        self.snapshots.iter_mut().find(|row| row.uuid == uuid)
    }

    /// Those that can be read.
    pub fn readable(&self) -> impl Iterator<Item = &SnapshotEntry> {
        self.snapshots.iter().filter(|row| !row.removing)
    }

    /// What the engine is told of the head's line: its nearest ancestor that has a root.
    pub fn head_parent(&self) -> Option<Parent> {
        let mut at = self.parent;
        while let Some(row) = at.and_then(|uuid| self.snapshot(uuid)) {
            if let Some(root) = row.root {
                return Some(Parent {
                    position: row.position,
                    root,
                });
            }
            at = row.parent;
        }
        None
    }

    pub fn newest_snapshot(&self) -> Address {
        let rooted = self.snapshots.iter().filter(|row| row.root.is_some());
        rooted
            .map(|row| row.position)
            .max()
            .unwrap_or(Address::NONE)
    }

    /// A snapshot whose note is durable in the log.
    pub fn add_snapshot(&mut self, uuid: Uuid, position: Address, size_bytes: u64) {
        self.commits += 1;
        // One that was lost sight of has its place in the head's line before those that came later.
        let (mut child, mut parent) = (None, self.parent);
        while let Some(row) = parent.and_then(|uuid| self.snapshot(uuid)) {
            if row.position < position {
                break;
            }
            (child, parent) = (parent, row.parent);
        }
        let at = self.snapshots.partition_point(|r| r.position < position);
        let row = SnapshotEntry {
            uuid,
            parent,
            position,
            size_bytes,
            removing: false,
            left: false,
            root: None,
            mapped_blocks: 0,
        };
        self.snapshots.insert(at, row);
        match child.and_then(|uuid| self.snapshot_mut(uuid)) {
            Some(child) => child.parent = Some(uuid),
            None => self.parent = Some(uuid),
        }
    }

    /// Rows for snapshots that only the log knows.
    pub fn add_found(&mut self, found: &[FoundSnapshot]) {
        for found in found {
            match self.snapshot(found.snapshot.uuid) {
                Some(row) => assert_eq!(row.position, found.position, "it has moved in the log"),
                None => self.add_snapshot(found.snapshot.uuid, found.position, found.size_bytes),
            }
        }
    }

    /// A checkpoint.
    pub fn commit(&mut self, result: &CheckpointResult) {
        self.commit_released(result, None);
    }

    /// `released`: a snapshot whose space the checkpoint has as dead.
    pub fn commit_released(&mut self, result: &CheckpointResult, released: Option<Uuid>) {
        self.commits += 1;
        self.checkpoint = result.state;
        self.mapped_blocks = result.mapped_blocks;
        for row in &result.changed {
            self.rows.insert(row.number, row.clone());
        }
        for number in &result.removed {
            self.rows.remove(number);
        }
        for root in &result.snapshots {
            self.give_root(root);
        }
        let end = result.state.position;
        let covered = (end.segment, end.end_blocks);
        for row in self.snapshots.iter().filter(|row| row.root.is_none()) {
            let place = (row.position.segment(), row.position.block());
            assert!(
                place >= covered,
                "snapshot {} is before the checkpoint, and has no root",
                row.uuid
            );
        }
        if let Some(uuid) = released {
            self.forget(uuid);
        }
    }

    fn give_root(&mut self, root: &SnapshotRoot) {
        if self.snapshot(root.uuid).is_none() {
            // The checkpoint was faster than the row, which the daemon then makes, or a crash
            // prevents: nobody was told of the snapshot, and it is cleaned up.
            self.add_snapshot(root.uuid, root.position, self.size_bytes);
            let row = self.snapshot_mut(root.uuid).expect("just added");
            row.removing = true;
        }
        let row = self.snapshot_mut(root.uuid).expect("it is there");
        assert_eq!((row.position, row.root), (root.position, None));
        row.root = Some(root.root);
        row.mapped_blocks = root.mapped_blocks;
    }

    fn forget(&mut self, uuid: Uuid) {
        let row = self.snapshot(uuid).expect("it is being removed").clone();
        assert!(row.removing && self.lines(uuid) <= 1);
        for other in &mut self.snapshots {
            if other.parent == Some(uuid) {
                other.parent = row.parent;
            }
        }
        if self.parent == Some(uuid) {
            self.parent = row.parent;
        }
        self.snapshots.retain(|row| row.uuid != uuid);
    }

    fn lines(&self, uuid: Uuid) -> usize {
        let children = self.snapshots.iter().filter(|r| r.parent == Some(uuid));
        children.count() + usize::from(self.parent == Some(uuid))
    }

    pub fn begin_removal(&mut self, uuid: Uuid) {
        self.commits += 1;
        self.snapshot_mut(uuid).expect("it is there").removing = true;
    }

    /// The next snapshot whose space can be freed: one line at most descends from it.
    pub fn next_to_release(&self) -> Option<Uuid> {
        let removing = self.snapshots.iter().rev().filter(|row| row.removing);
        removing
            .map(|row| row.uuid)
            .find(|&uuid| self.lines(uuid) <= 1)
    }

    /// The head leaves the snapshot. False: it does not descend from it.
    pub fn leave(&mut self, uuid: Uuid) -> bool {
        let row = self.snapshot(uuid).expect("it is being removed").clone();
        if self.parent != Some(uuid) {
            return false;
        }
        self.commits += 1;
        self.parent = row.parent;
        self.snapshot_mut(uuid).expect("it is there").left = true;
        true
    }

    /// Roots that hold what a snapshot shares.
    pub fn neighbours(&self, uuid: Uuid) -> Vec<Option<NodeLocation>> {
        let row = self.snapshot(uuid).expect("it is being removed");
        let mut roots = vec![self.checkpoint.root];
        for other in &self.snapshots {
            let descends = other.parent == Some(uuid);
            let sibling = other.parent == row.parent && other.position > row.position;
            if Some(other.uuid) == row.parent || descends || sibling {
                roots.extend(other.root);
            }
        }
        roots
    }

    /// Gives the head a snapshot's root; its volume is closed. What the head alone had goes as a
    /// snapshot `leftover` that is being removed.
    pub fn roll_back(&mut self, to: Uuid, leftover: Uuid) {
        self.commits += 1;
        let target = self.snapshot(to).expect("the snapshot is there").clone();
        let end = self.checkpoint.position;
        let end = Address::new(end.segment, end.end_blocks);
        assert!(end > target.position, "the log ends before the snapshot");
        let parent_root = self.parent.and_then(|uuid| self.snapshot(uuid)?.root);
        if parent_root != Some(self.checkpoint.root) {
            self.snapshots.push(SnapshotEntry {
                uuid: leftover,
                parent: self.parent,
                position: end,
                size_bytes: self.size_bytes,
                removing: true,
                left: false,
                root: Some(self.checkpoint.root),
                mapped_blocks: self.mapped_blocks,
            });
        }
        self.checkpoint.root = target.root.expect("closing gave it a root");
        self.mapped_blocks = target.mapped_blocks;
        self.size_bytes = target.size_bytes;
        self.parent = Some(to);
        self.rollbacks.push((end, target.position));
    }
}
