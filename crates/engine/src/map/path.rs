//! How the head comes to have nodes of its own, and what becomes of those it replaces.
//!
//! A change copies the path from the root down, as far as other trees share it; see the parent
//! module for who may change what. Every node that the head replaces goes through
//! [`Map::lose`] (if it is on disk) and [`Map::supersede`] (if a tree needs it in memory).

use super::inner::Slot;
use super::leaf::Leaf;
use super::slab::{Body, State};
use super::{Map, NodeLocation, ROOT_LEVEL, child_of};

impl Map {
    /// Whether the head may change the node as it is, and has its path to itself.
    #[inline]
    pub(super) fn may_change(&self, index: u32) -> bool {
        let entry = self.slab.entry(index);
        entry.state == State::Dirty && entry.stamp >= self.unshared_from
    }

    /// Makes the nodes of a block from the root down to `to_level` the head's own and dirty, and
    /// makes those that are missing. All that exist are in memory. Returns the lowest one.
    pub(super) fn own_path(&mut self, block: u64, to_level: u8) -> u32 {
        let mut parent: Option<u32> = None;
        for level in (to_level..=ROOT_LEVEL).rev() {
            let slot = match parent {
                None => self.head,
                Some(parent) => {
                    let inner = self.slab.inner(parent);
                    let place = inner.find(child_of(block, level + 1));
                    place.map_or(Slot::ABSENT, |place| inner.slots()[place])
                }
            };
            let owned = self.own(slot, level);
            match parent {
                None => self.head = owned,
                Some(parent) => self.slab.change(parent, |entry| {
                    let Body::Inner(inner) = &mut entry.body else {
                        unreachable!("a parent is an inner node")
                    };
                    inner.set(child_of(block, level + 1), owned);
                }),
            }
            parent = Some(owned.handle.index);
        }
        parent.expect("the loop runs at least once")
    }

    fn own(&mut self, mut slot: Slot, level: u8) -> Slot {
        if slot.is_absent() {
            let body = if level == 0 {
                Body::Leaf(Leaf::empty())
            } else {
                Body::Inner(Box::default())
            };
            return Slot::in_memory(self.slab.insert(body, State::Dirty, self.generation));
        }
        let index = self
            .slab
            .resolve(slot.handle)
            .expect("a node on a path to own is in memory");
        if self.may_change(index) {
            return slot;
        }
        let generation = self.generation;
        self.lose(&slot);
        if self.is_needed(index) {
            let body = self.slab.entry(index).body.clone();
            self.supersede(index);
            return Slot::in_memory(self.slab.insert(body, State::Dirty, generation));
        }
        slot.clear_location();
        self.slab.change(index, |entry| {
            entry.state = State::Dirty;
            entry.stamp = generation;
        });
        slot
    }

    /// Whether a tree needs the contents of this node of the head in memory: it has still to be
    /// written, or it would be again if the running checkpoint were aborted.
    fn is_needed(&self, index: u32) -> bool {
        let entry = self.slab.entry(index);
        match entry.state {
            State::Dirty => entry.stamp < self.unshared_from,
            State::Written => entry.mark == self.running && entry.stamp < self.snapshots_until,
            State::Clean => false,
        }
    }

    /// Notes that the head has another node, or none, in the place of this one, which trees need.
    fn supersede(&mut self, index: u32) {
        let generation = self.generation;
        let entry = self.slab.entry_mut(index);
        entry.superseded = true;
        entry.mark = generation;
        if entry.state == State::Written
            && let Some(running) = &mut self.checkpoint
        {
            running.retained.push(index);
        }
    }

    /// Notes that the head no longer has the node at the slot's location: it is dead, unless a
    /// snapshot has it.
    ///
    /// A node of the running checkpoint is in the snapshots that froze while the head had it, and
    /// its stamp tells which. Any other node on disk that the head has was there before the oldest
    /// snapshot that is pending, so that all of those have it.
    fn lose(&mut self, slot: &Slot) {
        let Some(location) = slot.location() else {
            return;
        };
        let written_now = self.slab.resolve(slot.handle).and_then(|index| {
            let entry = self.slab.entry(index);
            let by_running = entry.state == State::Written && entry.mark == self.running;
            by_running.then_some(entry.stamp)
        });
        let held = match written_now {
            Some(stamp) => stamp < self.snapshots_until,
            None => self.is_held(location),
        };
        match (&mut self.checkpoint, written_now) {
            _ if held => {}
            (Some(running), Some(_)) => running.dead_written.push(location),
            (Some(running), None) => running.dead.push(location),
            (None, _) => self.dead.push(location),
        }
    }

    /// Whether a snapshot has this node, which the head has too, and which no checkpoint that is
    /// still running wrote.
    pub(super) fn is_held(&self, location: NodeLocation) -> bool {
        self.snapshots_until > 0
            || (location.segment, u64::from(location.offset_bytes)) < self.held_until
    }

    /// Takes the leaf of a block out of the tree, and the inner nodes that have no other child.
    pub(super) fn drop_leaf(&mut self, block: u64) {
        self.own_path(block, 1);
        for level in 1..=ROOT_LEVEL {
            let parent = self
                .head_slot(level, block)
                .expect("the path was just made")
                .handle
                .index;
            let slot = self.slab.change(parent, |entry| {
                let Body::Inner(inner) = &mut entry.body else {
                    unreachable!("a parent is an inner node")
                };
                inner.remove(child_of(block, level))
            });
            self.lose(&slot);
            if let Some(index) = self.slab.resolve(slot.handle) {
                if self.is_needed(index) {
                    self.supersede(index);
                } else {
                    self.slab.remove(index);
                }
            }
            if !self.slab.inner(parent).slots().is_empty() {
                return;
            }
        }
        let root = self.head.handle.index;
        self.slab.remove(root);
        self.head = Slot::ABSENT;
    }

    /// The inner node above a node, in the tree of this root, if the path to it is in memory.
    pub(super) fn parent_of(&self, root: &Slot, level: u8, block: u64) -> Option<u32> {
        let mut index = self.slab.resolve(root.handle)?;
        for at in (level + 2..=ROOT_LEVEL).rev() {
            let inner = self.slab.inner(index);
            let slot = inner.slots()[inner.find(child_of(block, at))?];
            index = self.slab.resolve(slot.handle)?;
        }
        Some(index)
    }

    /// The head's slot for a node, if the path to it is in memory.
    pub(super) fn head_slot(&self, level: u8, block: u64) -> Option<Slot> {
        let slot = if level == ROOT_LEVEL {
            self.head
        } else {
            let inner = self.slab.inner(self.parent_of(&self.head, level, block)?);
            inner.slots()[inner.find(child_of(block, level + 1))?]
        };
        (!slot.is_absent()).then_some(slot)
    }

    /// Changes the slot that [`Self::head_slot`] finds.
    pub(super) fn edit_head_slot(&mut self, level: u8, block: u64, edit: impl FnOnce(&mut Slot)) {
        if level == ROOT_LEVEL {
            return edit(&mut self.head);
        }
        let parent = self.parent_of(&self.head, level, block);
        let parent = parent.expect("the slot was found before");
        edit(self.child_slot_mut(parent, level, block));
    }

    /// The slot of a child that an inner node has.
    pub(super) fn child_slot_mut(&mut self, parent: u32, level: u8, block: u64) -> &mut Slot {
        let inner = self.slab.inner_mut(parent);
        let place = inner
            .find(child_of(block, level + 1))
            .expect("the parent has this child");
        &mut inner.slots_mut()[place]
    }
}
