//! Freezing trees, and writing them: a walk of each, children before parents, in steps of bounded
//! size.
//!
//! See the parent module for states and invariants. The walk holds only a path of inner nodes
//! that are frozen, dirty and not yet written: nobody else changes, evicts or frees those.

use super::inner::{FAN_OUT, Slot};
use super::slab::{Body, State};
use super::{Map, NodeLocation, ROOT_LEVEL, SegmentNumber, node, span_blocks};

/// How far a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointProgress {
    /// There are nodes left that the space did not suffice for.
    More,
    /// All nodes are in buffers. `root` names the head's tree at the freeze; `None`: nothing is
    /// mapped. [`Map::checkpoint_roots`] has it with those of the snapshots.
    Done { root: Option<NodeLocation> },
}

/// A tree that a checkpoint has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrozenRoot {
    /// What [`Map::freeze`] was given; `None`: the head as it was when the checkpoint began.
    pub key: Option<u64>,
    /// `None`: nothing is mapped.
    pub root: Option<NodeLocation>,
    pub mapped_blocks: u64,
}

/// A tree that was frozen and has still to be written, or is until that checkpoint has ended.
#[derive(Debug)]
pub(super) struct Tree {
    /// A snapshot's. Without one it is the running checkpoint's own.
    key: Option<u64>,
    /// The map's generation up to the freeze: nodes of a later stamp are not in it.
    generation: u32,
    root: Slot,
    mapped_blocks: u64,
}

impl Tree {
    fn frozen_root(&self) -> FrozenRoot {
        FrozenRoot {
            key: self.key,
            root: self.root.location(),
            mapped_blocks: self.mapped_blocks,
        }
    }
}

/// A checkpoint from its beginning until it is finished or aborted.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// The first so many trees are written by it; the last of these is its own.
    covered: usize,
    /// The tree that is being written, and whether its walk has begun.
    current: usize,
    entered: bool,
    path: Vec<Frame>,
    /// What was written, once it all is.
    roots: Vec<FrozenRoot>,
    /// All nodes of it that were handed out for writing.
    written: Vec<NodeLocation>,
    /// Nodes on disk before this checkpoint that the head has replaced, and no snapshot has.
    pub dead: Vec<NodeLocation>,
    /// Nodes of `written` that the head has replaced, and no snapshot has.
    pub dead_written: Vec<NodeLocation>,
    /// Written nodes that the head has replaced and snapshots have: in memory until it is certain
    /// that they need not be written again.
    pub retained: Vec<u32>,
}

/// An inner node on the walk's path.
#[derive(Clone, Copy, Debug)]
struct Frame {
    index: u32,
    level: u8,
    first_block: u64,
    /// The child to look at next, as a number in the bitmap and a position among the slots.
    child: usize,
    place: usize,
}

impl Map {
    /// Keeps the tree as it is for a snapshot: the next checkpoint that begins writes it, whatever
    /// happens to the head meanwhile. Costs the same for any size. May be called while a
    /// checkpoint runs, which does not write it then.
    pub fn freeze(&mut self, key: u64) {
        self.freeze_head(Some(key));
    }

    /// Snapshots that [`Self::freeze`] was called for and no finished checkpoint holds.
    #[must_use]
    pub fn pending_freezes(&self) -> usize {
        self.trees.iter().filter(|tree| tree.key.is_some()).count()
    }

    fn freeze_head(&mut self, key: Option<u64>) {
        self.trees.push_back(Tree {
            key,
            generation: self.generation,
            root: self.head,
            mapped_blocks: self.mapped_blocks,
        });
        self.generation = self
            .generation
            .checked_add(1)
            .expect("snapshots and checkpoints of one opening fit 32 bits");
        self.note_trees();
    }

    /// Keeps what is asked of the list of trees with each write at hand.
    fn note_trees(&mut self) {
        let after = |tree: Option<&Tree>| tree.map_or(0, |tree| tree.generation + 1);
        self.unshared_from = after(self.trees.back());
        self.snapshots_until = after(self.trees.iter().rev().find(|tree| tree.key.is_some()));
    }

    /// Begins to write the trees frozen so far, oldest first, and then the head's as it is now,
    /// with [`Self::write_nodes`].
    ///
    /// # Panics
    /// If one is running.
    pub fn begin_checkpoint(&mut self) {
        assert!(self.checkpoint.is_none(), "one checkpoint at a time");
        self.freeze_head(None);
        self.running = self.generation;
        self.checkpoint = Some(Checkpoint {
            covered: self.trees.len(),
            current: 0,
            entered: false,
            path: Vec::new(),
            roots: Vec::new(),
            written: Vec::new(),
            dead: Vec::new(),
            dead_written: Vec::new(),
            retained: Vec::new(),
        });
    }

    /// What the running checkpoint has written, once [`Self::write_nodes`] said that it is done:
    /// the snapshots, oldest first, and the head's tree.
    #[must_use]
    pub fn checkpoint_roots(&self) -> &[FrozenRoot] {
        self.checkpoint
            .as_ref()
            .map_or(&[], |checkpoint| &checkpoint.roots)
    }

    /// Appends nodes of the frozen trees to `buffer`, children before parents, as they are to
    /// stand from `offset_bytes` on in the segment; at most `space_bytes` of them. With less than
    /// [`super::MAX_NODE_BYTES`] of space it may append nothing, and still return `More`. With
    /// none, it tells whether there is anything to write. Each place must be behind the last one:
    /// in a segment of a higher number, or further on in the same.
    ///
    /// The nodes count as written when they have been appended: if the bytes do not reach the
    /// disk, call [`Self::abort_checkpoint`].
    ///
    /// # Panics
    /// If no checkpoint is running, or `offset_bytes` is not a multiple of 8.
    pub fn write_nodes(
        &mut self,
        segment: SegmentNumber,
        offset_bytes: u32,
        space_bytes: u32,
        buffer: &mut Vec<u8>,
    ) -> CheckpointProgress {
        assert!(
            offset_bytes.is_multiple_of(8),
            "nodes are aligned to 8 bytes"
        );
        let mut checkpoint = self.checkpoint.take().expect("a checkpoint is running");
        let start = buffer.len();
        while let Some(frame) = self.top_frame(&mut checkpoint) {
            let (index, level, first_block) = match self.next_dirty_child(frame) {
                Some(child) if frame.level > 1 => {
                    checkpoint.path.push(child);
                    continue;
                }
                Some(leaf) => {
                    self.slab.change(leaf.index, |entry| {
                        if let Body::Leaf(leaf) = &mut entry.body {
                            leaf.compact();
                        }
                    });
                    (leaf.index, 0, leaf.first_block)
                }
                None => (frame.index, frame.level, frame.first_block),
            };
            let body = &self.slab.entry(index).body;
            let used = buffer.len() - start;
            if used + node::node_bytes(body) > space_bytes as usize {
                self.checkpoint = Some(checkpoint);
                return CheckpointProgress::More;
            }
            let (len_bytes, checksum) = node::put_node(body, level, first_block, buffer);
            let location = NodeLocation {
                segment,
                offset_bytes: offset_bytes + used as u32,
                len_bytes,
                checksum,
            };
            if level > 0 {
                checkpoint.path.pop();
            }
            self.written(&mut checkpoint, index, level, first_block, location);
        }
        if checkpoint.roots.is_empty() {
            let covered = self.trees.iter().take(checkpoint.covered);
            checkpoint.roots.extend(covered.map(Tree::frozen_root));
        }
        let root = checkpoint.roots[checkpoint.covered - 1].root;
        self.checkpoint = Some(checkpoint);
        CheckpointProgress::Done { root }
    }

    /// Where the walk is; begins with the next tree where one has come to its end.
    fn top_frame<'a>(&self, checkpoint: &'a mut Checkpoint) -> Option<&'a mut Frame> {
        while checkpoint.path.is_empty() {
            if checkpoint.entered {
                checkpoint.current += 1;
                checkpoint.entered = false;
            }
            if checkpoint.current == checkpoint.covered {
                return None;
            }
            checkpoint.entered = true;
            let root = &self.trees[checkpoint.current].root;
            if !root.is_absent() && root.location().is_none() {
                let frame = Frame::new(root.handle.index, ROOT_LEVEL, 0);
                checkpoint.path.push(frame);
            }
        }
        checkpoint.path.last_mut()
    }

    /// The next child of a frame that is to be written, as a frame of its own.
    fn next_dirty_child(&self, frame: &mut Frame) -> Option<Frame> {
        let inner = self.slab.inner(frame.index);
        while let Some(slot) = inner.slots().get(frame.place) {
            let child = inner
                .next_child(frame.child)
                .expect("as many bits as slots");
            frame.child = child;
            if slot.location().is_none() {
                let first = frame.first_block + child as u64 * span_blocks(frame.level - 1);
                return Some(Frame::new(slot.handle.index, frame.level - 1, first));
            }
            frame.child += 1;
            frame.place += 1;
        }
        debug_assert!(inner.next_child(frame.child.min(FAN_OUT)).is_none());
        None
    }

    /// Gives a node its location in every tree that has it: those from the one being written to
    /// the last one frozen before the head superseded it, or the head.
    ///
    /// Trees that share the parent have it with the parent; so there is one way down a tree for
    /// each copy of the parent, not for each tree.
    fn written(
        &mut self,
        checkpoint: &mut Checkpoint,
        index: u32,
        level: u8,
        first_block: u64,
        location: NodeLocation,
    ) {
        checkpoint.written.push(location);
        // Trees of a generation before this one know it.
        let mut known_until = match checkpoint.path.last() {
            Some(frame) => {
                let (parent, place) = (frame.index, frame.place);
                self.slab.inner_mut(parent).slots_mut()[place].set_location(location);
                self.slab.entry(parent).until()
            }
            None => {
                let tree = &mut self.trees[checkpoint.current];
                tree.root.set_location(location);
                tree.generation + 1
            }
        };
        let until = self.slab.entry(index).until();
        for at in checkpoint.current + 1..self.trees.len() {
            let generation = self.trees[at].generation;
            if generation >= until {
                break;
            }
            if generation < known_until {
                continue;
            }
            if level == ROOT_LEVEL {
                self.trees[at].root.set_location(location);
                known_until = generation + 1;
                continue;
            }
            let parent = self
                .parent_of(&self.trees[at].root, level, first_block)
                .expect("above a node without a location, a tree has all in memory");
            let slot = self.child_slot_mut(parent, level, first_block);
            debug_assert!(slot.handle.index == index && slot.location().is_none());
            slot.set_location(location);
            known_until = self.slab.entry(parent).until();
        }
        let (stamp, superseded) = {
            let entry = self.slab.entry(index);
            (entry.stamp, entry.superseded)
        };
        if superseded && !self.in_snapshot(stamp, until) {
            checkpoint.dead_written.push(location);
            self.slab.remove(index);
            return;
        }
        let running = self.running;
        self.slab.change(index, |entry| {
            entry.state = State::Written;
            if !superseded {
                entry.mark = running;
            }
        });
        if superseded {
            checkpoint.retained.push(index);
        } else if known_until < u32::MAX {
            let slot = self.head_slot(level, first_block);
            debug_assert!(slot.is_some_and(|slot| slot.handle.index == index));
            self.edit_head_slot(level, first_block, |slot| slot.set_location(location));
        }
    }

    /// Whether a snapshot that is not committed was frozen in these generations.
    fn in_snapshot(&self, from: u32, until: u32) -> bool {
        let first = self.trees.partition_point(|tree| tree.generation < from);
        self.trees
            .range(first..)
            .take_while(|tree| tree.generation < until)
            .any(|tree| tree.key.is_some())
    }

    /// The checkpoint is committed: its nodes are clean. If it held snapshots, the newest of them
    /// is what the head descends from (see [`Self::set_parent_root`]).
    ///
    /// # Panics
    /// If none is running, or it is not done.
    pub fn finish_checkpoint(&mut self) {
        let mut checkpoint = self.checkpoint.take().expect("a checkpoint is running");
        assert!(
            checkpoint.current == checkpoint.covered,
            "a checkpoint is finished when all its nodes are written"
        );
        self.running = 0;
        self.dead.append(&mut checkpoint.dead);
        self.dead.append(&mut checkpoint.dead_written);
        for index in checkpoint.retained {
            self.slab.remove(index);
        }
        let newest = self
            .trees
            .drain(..checkpoint.covered)
            .rfind(|tree| tree.key.is_some());
        if let Some(newest) = newest {
            self.set_parent_root(newest.root.location());
        }
        self.note_trees();
    }

    /// The checkpoint failed, or was not committed: all it wrote is dead, and the snapshots' and
    /// the head's share of it is dirty again.
    ///
    /// # Panics
    /// If none is running.
    pub fn abort_checkpoint(&mut self) {
        let mut checkpoint = self.checkpoint.take().expect("a checkpoint is running");
        let own = self
            .trees
            .remove(checkpoint.covered - 1)
            .expect("a checkpoint has a tree of its own");
        self.free_superseded(&own.root, own.generation);
        // Each tree's nodes that the one before has are done with it.
        let mut done_until = 0;
        for at in 0..self.trees.len() {
            let (root, generation) = (self.trees[at].root, self.trees[at].generation);
            self.trees[at].root = self.unwrite(root, generation, done_until);
            done_until = generation + 1;
        }
        self.head = self.unwrite(self.head, self.generation, done_until);
        self.running = 0;
        self.dead.append(&mut checkpoint.dead);
        self.dead.append(&mut checkpoint.written);
        self.note_trees();
    }

    /// Frees the nodes of the checkpoint's own tree that were not written and that neither a
    /// snapshot nor the head has.
    fn free_superseded(&mut self, slot: &Slot, generation: u32) {
        let Some(index) = self.slab.resolve(slot.handle) else {
            return;
        };
        let entry = self.slab.entry(index);
        // A slot with a location may have the handle of a node that the head changed since.
        let own = entry.superseded && entry.state == State::Dirty && entry.stamp <= generation;
        if !own || self.in_snapshot(entry.stamp, entry.until()) {
            return;
        }
        if let Body::Inner(inner) = &self.slab.entry(index).body {
            for slot in inner.slots().to_vec() {
                self.free_superseded(&slot, generation);
            }
        }
        self.slab.remove(index);
    }

    /// Makes the nodes below a slot of a tree dirty again that the running checkpoint wrote, and
    /// returns the slot as it is to be. `generation` is the tree's; nodes stamped before
    /// `done_until` have been visited.
    fn unwrite(&mut self, mut slot: Slot, generation: u32, done_until: u32) -> Slot {
        let Some(index) = self.slab.resolve(slot.handle) else {
            return slot;
        };
        let entry = self.slab.entry(index);
        let unwritten = match entry.state {
            State::Clean => false,
            State::Dirty => true,
            State::Written => entry.superseded || entry.mark == self.running,
        };
        // A node of a later stamp stands where the tree's own, which is on disk, stood.
        if !unwritten || entry.stamp > generation {
            return slot;
        }
        let visited = entry.stamp < done_until;
        slot.clear_location();
        self.slab.change(index, |entry| entry.state = State::Dirty);
        if visited {
            return slot;
        }
        if let Body::Inner(inner) = &self.slab.entry(index).body {
            for place in 0..inner.slots().len() {
                let child = self.slab.inner(index).slots()[place];
                let child = self.unwrite(child, generation, done_until);
                self.slab.inner_mut(index).slots_mut()[place] = child;
            }
        }
        slot
    }
}

impl Frame {
    const fn new(index: u32, level: u8, first_block: u64) -> Self {
        Self {
            index,
            level,
            first_block,
            child: 0,
            place: 0,
        }
    }
}
