//! Writing the frozen tree: a walk, children before parents, in steps of bounded size.
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
    /// All nodes are in buffers. `root` names the frozen tree; `None`: nothing is mapped.
    Done { root: Option<NodeLocation> },
}

/// A checkpoint from its beginning until it is finished or aborted.
#[derive(Debug)]
pub(super) struct Checkpoint {
    root: Slot,
    started: bool,
    path: Vec<Frame>,
    /// All nodes of it that were handed out for writing.
    written: Vec<NodeLocation>,
    /// Nodes of the frozen tree, older than this checkpoint, that the head has replaced.
    pub dead: Vec<NodeLocation>,
    /// Nodes of `written` that the head has replaced.
    pub dead_written: Vec<NodeLocation>,
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
    /// Freezes the tree as it is: [`Self::write_nodes`] will write it, whatever happens to the
    /// head meanwhile. Costs the same for any size.
    ///
    /// # Panics
    /// If one is running.
    pub fn begin_checkpoint(&mut self) {
        assert!(self.checkpoint.is_none(), "one checkpoint at a time");
        self.generation = self
            .generation
            .checked_add(1)
            .expect("checkpoints fit 32 bits");
        self.checkpoint = Some(Checkpoint {
            root: self.head,
            started: false,
            path: Vec::new(),
            written: Vec::new(),
            dead: Vec::new(),
            dead_written: Vec::new(),
        });
    }

    /// Appends nodes of the frozen tree to `buffer`, children before parents, as they are to
    /// stand from `offset_bytes` on in the segment; at most `space_bytes` of them. With less than
    /// [`super::MAX_NODE_BYTES`] of space it may append nothing, and still return `More`. With
    /// none, it tells whether there is anything to write.
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
        if !checkpoint.started {
            checkpoint.started = true;
            if !checkpoint.root.is_absent() && checkpoint.root.location().is_none() {
                let index = checkpoint.root.handle.index;
                checkpoint.path.push(Frame::new(index, ROOT_LEVEL, 0));
            }
        }
        while let Some(frame) = checkpoint.path.last_mut() {
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
        let root = checkpoint.root.location();
        self.checkpoint = Some(checkpoint);
        CheckpointProgress::Done { root }
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

    /// Gives a node its location: in the frozen parent, and in the head's if that is another.
    fn written(
        &mut self,
        checkpoint: &mut Checkpoint,
        index: u32,
        level: u8,
        first_block: u64,
        location: NodeLocation,
    ) {
        checkpoint.written.push(location);
        let parent_is_shared = match checkpoint.path.last() {
            Some(frame) => {
                let (parent, place) = (frame.index, frame.place);
                self.slab.inner_mut(parent).slots_mut()[place].set_location(location);
                !self.slab.entry(parent).superseded
            }
            None => {
                checkpoint.root.set_location(location);
                false
            }
        };
        if self.slab.entry(index).superseded {
            checkpoint.dead_written.push(location);
            self.slab.remove(index);
            return;
        }
        let generation = self.generation;
        self.slab.change(index, |entry| {
            entry.state = State::Written;
            entry.stamp = generation;
        });
        if !parent_is_shared {
            let slot = self.head_slot(level, first_block);
            debug_assert!(slot.is_some_and(|slot| slot.handle.index == index));
            self.edit_head_slot(level, first_block, |slot| slot.set_location(location));
        }
    }

    /// The checkpoint is committed: its nodes are clean.
    ///
    /// # Panics
    /// If none is running, or it is not done.
    pub fn finish_checkpoint(&mut self) {
        let mut checkpoint = self.checkpoint.take().expect("a checkpoint is running");
        assert!(
            checkpoint.started && checkpoint.path.is_empty(),
            "a checkpoint is finished when all its nodes are written"
        );
        self.dead.append(&mut checkpoint.dead);
        self.dead.append(&mut checkpoint.dead_written);
    }

    /// The checkpoint failed, or was not committed: all it wrote is dead, and the head's share of
    /// it is dirty again.
    ///
    /// # Panics
    /// If none is running.
    pub fn abort_checkpoint(&mut self) {
        let mut checkpoint = self.checkpoint.take().expect("a checkpoint is running");
        self.free_superseded(&checkpoint.root);
        self.head = self.unwrite(self.head);
        self.dead.append(&mut checkpoint.dead);
        self.dead.append(&mut checkpoint.written);
    }

    /// Frees the nodes of the frozen tree that were not written and that the head does not share.
    fn free_superseded(&mut self, slot: &Slot) {
        if slot.location().is_some() {
            return;
        }
        let Some(index) = self.slab.resolve(slot.handle) else {
            return;
        };
        if !self.slab.entry(index).superseded {
            return;
        }
        if let Body::Inner(inner) = &self.slab.entry(index).body {
            for slot in inner.slots().to_vec() {
                self.free_superseded(&slot);
            }
        }
        self.slab.remove(index);
    }

    /// Makes the nodes below a slot of the head dirty again that this generation's checkpoint
    /// wrote, and returns the slot as it is to be.
    fn unwrite(&mut self, mut slot: Slot) -> Slot {
        let Some(index) = self.slab.resolve(slot.handle) else {
            return slot;
        };
        let (state, stamp) = (self.slab.entry(index).state, self.slab.entry(index).stamp);
        let written = state == State::Written && stamp == self.generation;
        if written {
            self.slab.change(index, |entry| entry.state = State::Dirty);
            slot.clear_location();
        } else if state != State::Dirty {
            return slot;
        }
        if let Body::Inner(inner) = &self.slab.entry(index).body {
            for place in 0..inner.slots().len() {
                let child = self.slab.inner(index).slots()[place];
                let child = self.unwrite(child);
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
