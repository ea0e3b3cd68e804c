//! The map of a volume: block → address + CRC-32C, as a persistent radix tree. No I/O: a call
//! that meets a node that is not in memory returns [`NeedNode`]; the caller reads those bytes,
//! hands them to [`Map::supply`] and calls again.
//!
//! ```text
//!   level 3     root, covers all 2^34 blocks of 64 TiB
//!   level 2, 1  inner nodes, 256 children each           (inner.rs)
//!   level 0     leaves, 1024 blocks each                  (leaf.rs)
//! ```
//!
//! The height is fixed, so that a resize changes nothing here, and absent subtrees cost nothing.
//!
//! # Checkpoints
//!
//! [`Map::begin_checkpoint`] freezes the tree by starting a new *generation*. From then on there
//! are two trees, the *frozen* one, being written, and the *head*, which the volume uses; they
//! share what has not changed since. A node's state says who may change it:
//!
//! ```text
//!                change                     begin_checkpoint
//!     Clean ──────────────▶ Dirty (this generation) ──▶ Dirty (older: frozen)
//!       ▲ ▲                   ▲     ▲                      │            │
//!       │ └─ finish ── Written ┘    └──── head copies it ──┤            │ written
//!       │                ▲    (changed: in place)          │            │
//!       supply           └─────────────────────────────────┴────────────┘
//! ```
//!
//! Invariants:
//! - A dirty node's slot has no location, and so its parent is dirty too: the walk of the frozen
//!   tree follows the slots without a location and nothing else.
//! - The head changes a frozen dirty node never; it makes a copy and marks the old one
//!   *superseded*. A superseded node's parent is superseded as well (paths are copied from the
//!   root), and it is dropped when the checkpoint has written it.
//! - A clean or written node may be changed in place by the head, even while a checkpoint runs:
//!   whoever else has it in a slot has its location there too, and needs no more.
//! - When the checkpoint gives a node that the head shares its location, it also puts it into the
//!   head's copy of the parent, if the parent was copied.
//! - Dirty nodes, and nodes written by a checkpoint that is not finished, are never evicted; an
//!   inner node only when none of its children is in memory. So every node in memory can be
//!   reached from the head, or is superseded.
//! - Each node written becomes dead exactly once, when the head has another in its place.
//!
//! Snapshots keep roots: what they need beyond this is that a location which a snapshot reaches
//! is not reported dead. Equal locations mean equal subtrees, for a difference of two roots.
//!
//! A map belongs to one thread at a time (`&mut self`; it is `Send`).

mod checkpoint;
mod inner;
mod leaf;
mod node;
mod slab;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use crate::types::{Address, BLOCK_BYTES, BlockNumber, MAX_VOLUME_BYTES, SegmentNumber};
use checkpoint::Checkpoint;
pub use checkpoint::CheckpointProgress;
use inner::{FAN_OUT, FAN_OUT_BITS, Inner, Slot};
use leaf::{LEAF_BITS, Leaf};
pub use node::NodeHead;
use slab::{Body, Slab, State};

/// Blocks that one leaf covers: what [`Map::ensure_resident`] asks one node for.
pub const LEAF_BLOCKS: u64 = leaf::LEAF_BLOCKS as u64;
/// Length of the longest node. [`Map::write_nodes`] gets on if it is given so much space.
pub const MAX_NODE_BYTES: u32 = node::MAX_NODE_BYTES;
/// Level of the root; leaves are level 0.
const ROOT_LEVEL: u8 = 3;
const MAX_BLOCKS: u64 = MAX_VOLUME_BYTES / BLOCK_BYTES as u64;
const _: () = assert!(MAX_BLOCKS == span_blocks(ROOT_LEVEL));
/// Reads that may be under way at once before the oldest are forgotten (and only checked less).
const MAX_WANTED: usize = 4096;

/// Where a node is on disk. 20 bytes there, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeLocation {
    pub segment: SegmentNumber,
    pub offset_bytes: u32,
    pub len_bytes: u32,
    /// The node's own checksum, so that stale or misplaced bytes are never taken for it.
    pub checksum: u32,
}

/// This node must be read and given to [`Map::supply`] before the call can succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NeedNode(pub NodeLocation);

/// Why bytes are not the node they were read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the map node cannot be used: {0}")]
pub struct NodeError(pub &'static str);

/// Blocks that lost their mapping: `count` of them at consecutive addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Displaced {
    pub address: Address,
    pub count: u32,
}

/// Consecutive blocks of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Not mapped: reads as zeroes.
    Hole { block: BlockNumber, count: u32 },
    /// At consecutive addresses in one segment; the checksums start at `first_crc` in
    /// [`Extents::checksums`].
    Mapped {
        block: BlockNumber,
        count: u32,
        address: Address,
        first_crc: usize,
    },
}

/// The answer of [`Map::lookup`]; keep it to save allocations.
#[derive(Clone, Debug, Default)]
pub struct Extents {
    /// Ascending, without gaps.
    pub extents: Vec<Extent>,
    /// CRC-32C of each mapped block, ascending.
    pub checksums: Vec<u32>,
}

impl Extents {
    pub fn clear(&mut self) {
        self.extents.clear();
        self.checksums.clear();
    }

    fn push_hole(&mut self, from: u64, to: u64) {
        if from == to {
            return;
        }
        let more = (to - from) as u32;
        if let Some(Extent::Hole { count, .. }) = self.extents.last_mut() {
            *count += more;
            return;
        }
        self.extents.push(Extent::Hole {
            block: BlockNumber(from),
            count: more,
        });
    }

    fn push_piece(&mut self, block: u64, piece: &leaf::Piece<'_>) {
        let first_crc = self.checksums.len();
        self.checksums
            .extend(piece.crcs.iter().map(|crc| u32::from_le_bytes(*crc)));
        // Block 0 of a segment is never data: consecutive addresses are in one segment.
        match self.extents.last_mut() {
            Some(Extent::Mapped { count, address, .. })
                if address.bits() + u64::from(*count) == piece.address =>
            {
                *count += piece.len();
            }
            _ => self.extents.push(Extent::Mapped {
                block: BlockNumber(block),
                count: piece.len(),
                address: Address::from_bits(piece.address),
                first_crc,
            }),
        }
    }
}

/// Blocks that a node of this level covers.
const fn span_blocks(level: u8) -> u64 {
    1 << (LEAF_BITS + FAN_OUT_BITS * level as u32)
}

/// Which child of an inner node of `level` has the block.
#[inline]
const fn child_of(block: u64, level: u8) -> usize {
    (block / span_blocks(level - 1)) as usize % FAN_OUT
}

/// The first block of the node of `level` that has the block.
#[inline]
const fn first_of(block: u64, level: u8) -> u64 {
    block / span_blocks(level) * span_blocks(level)
}

/// What stands at a block.
enum Seek {
    /// Index of the leaf, in memory.
    Leaf(u32),
    /// Nothing is mapped up to this block.
    Hole(u64),
}

/// The tree of one volume's head, and of a checkpoint while that runs.
#[derive(Debug)]
pub struct Map {
    slab: Slab,
    head: Slot,
    generation: u32,
    mapped_blocks: u64,
    checkpoint: Option<Checkpoint>,
    dead: Vec<NodeLocation>,
    /// Level and first block of the nodes that calls have asked for.
    wanted: HashMap<NodeLocation, (u8, u64)>,
    clock_hand: u32,
}

fn end_of(block: BlockNumber, count: u64) -> u64 {
    let end = block.0.checked_add(count).filter(|&end| end <= MAX_BLOCKS);
    end.expect("the range is inside the largest volume; callers check against the volume's size")
}

fn push_displaced(displaced: &mut Vec<Displaced>, address: u64, count: u32) {
    match displaced.last_mut() {
        Some(last) if last.address.bits() + u64::from(last.count) == address => last.count += count,
        _ => displaced.push(Displaced {
            address: Address::from_bits(address),
            count,
        }),
    }
}

impl Map {
    /// A map that maps nothing.
    #[must_use]
    pub fn empty() -> Self {
        Self::open(None, 0)
    }

    /// The map of a committed checkpoint: its root and its count of mapped blocks.
    #[must_use]
    pub fn open(root: Option<NodeLocation>, mapped_blocks: u64) -> Self {
        Self {
            slab: Slab::default(),
            head: root.map_or(Slot::ABSENT, Slot::on_disk),
            generation: 1,
            mapped_blocks: if root.is_some() { mapped_blocks } else { 0 },
            checkpoint: None,
            dead: Vec::new(),
            wanted: HashMap::new(),
            clock_hand: 0,
        }
    }

    /// Blocks of the head that are mapped.
    #[must_use]
    pub fn mapped_blocks(&self) -> u64 {
        self.mapped_blocks
    }

    /// Bytes that the nodes in memory take.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.slab.bytes()
    }

    /// Bytes of the nodes that no checkpoint has written; at most [`Self::memory_bytes`].
    #[must_use]
    pub fn dirty_bytes(&self) -> usize {
        self.slab.dirty_bytes()
    }

    /// What `count` blocks from `block` are mapped to. `out` is cleared first, and is meaningless
    /// after an error.
    pub fn lookup(
        &mut self,
        block: BlockNumber,
        count: u32,
        out: &mut Extents,
    ) -> Result<(), NeedNode> {
        out.clear();
        let end = end_of(block, u64::from(count));
        let mut at = block.0;
        while at < end {
            match self.seek(at)? {
                Seek::Hole(next) => {
                    out.push_hole(at, next.min(end));
                    at = next;
                }
                Seek::Leaf(index) => {
                    let first = first_of(at, 0);
                    let to = end.min(first + LEAF_BLOCKS);
                    let leaf = self.slab.leaf(index);
                    leaf.pieces((at - first) as u32, (to - first) as u32, |piece| {
                        let block = first + u64::from(piece.start);
                        out.push_hole(at, block);
                        out.push_piece(block, &piece);
                        at = block + u64::from(piece.len());
                    });
                    out.push_hole(at, to);
                    at = to;
                }
            }
        }
        Ok(())
    }

    /// After `Ok`, no call for this range asks for a node until the next [`Self::evict`].
    pub fn ensure_resident(&mut self, block: BlockNumber, count: u32) -> Result<(), NeedNode> {
        let end = end_of(block, u64::from(count));
        let mut at = block.0;
        while at < end {
            at = match self.seek(at)? {
                Seek::Hole(next) => next,
                Seek::Leaf(_) => first_of(at, 0) + LEAF_BLOCKS,
            };
        }
        Ok(())
    }

    /// Maps `crcs.len()` blocks to consecutive addresses, and appends to `displaced` what they
    /// were mapped to. All or nothing: with an error, nothing has changed.
    ///
    /// # Panics
    /// If the addresses leave their segment or include its header: no write has such.
    pub fn insert(
        &mut self,
        block: BlockNumber,
        address: Address,
        crcs: &[u32],
        displaced: &mut Vec<Displaced>,
    ) -> Result<(), NeedNode> {
        let count = crcs.len() as u64;
        let end = end_of(block, count);
        assert!(
            leaf::is_valid_extent(address.bits(), count),
            "{count} blocks at {address:?} are not data of one segment"
        );
        if block.0 / LEAF_BLOCKS != end.saturating_sub(1) / LEAF_BLOCKS {
            self.ensure_resident(block, crcs.len() as u32)?;
        }
        let mut at = block.0;
        while at < end {
            let found = self.seek(at)?;
            let leaf = match found {
                Seek::Leaf(index) if self.may_change(index) => index,
                _ => self.own_path(at, 0),
            };
            let first = first_of(at, 0);
            let to = end.min(first + LEAF_BLOCKS);
            let done = (at - block.0) as usize;
            let crcs = &crcs[done..done + (to - at) as usize];
            let lost = self.slab.change(leaf, |entry| {
                let Body::Leaf(leaf) = &mut entry.body else {
                    unreachable!("level 0 is a leaf")
                };
                let address = address.bits() + done as u64;
                leaf.set((at - first) as u32, address, crcs, |address, count| {
                    push_displaced(displaced, address, count);
                })
            });
            self.mapped_blocks += crcs.len() as u64 - u64::from(lost);
            at = to;
        }
        Ok(())
    }

    /// Unmaps `count` blocks, and appends to `displaced` what they were mapped to. With an error,
    /// the blocks before the missing node are unmapped and told; call again for the rest.
    pub fn remove(
        &mut self,
        block: BlockNumber,
        count: u32,
        displaced: &mut Vec<Displaced>,
    ) -> Result<(), NeedNode> {
        let end = end_of(block, u64::from(count));
        let mut at = block.0;
        while at < end {
            let index = match self.seek(at)? {
                Seek::Hole(next) => {
                    at = next;
                    continue;
                }
                Seek::Leaf(index) => index,
            };
            let first = first_of(at, 0);
            let to = end.min(first + LEAF_BLOCKS);
            let (from_block, to_block) = ((at - first) as u32, (to - first) as u32);
            let leaf = self.slab.leaf(index);
            let lost = leaf.mapped_in(from_block, to_block);
            if lost == leaf.mapped() {
                leaf.pieces(from_block, to_block, |piece| {
                    push_displaced(displaced, piece.address, piece.len());
                });
                self.drop_leaf(at);
            } else if lost > 0 {
                let index = if self.may_change(index) {
                    index
                } else {
                    self.own_path(at, 0)
                };
                self.slab.change(index, |entry| {
                    let Body::Leaf(leaf) = &mut entry.body else {
                        unreachable!("level 0 is a leaf")
                    };
                    leaf.clear(from_block, to_block, |address, count| {
                        push_displaced(displaced, address, count);
                    })
                });
            }
            self.mapped_blocks -= u64::from(lost);
            at = to;
        }
        Ok(())
    }

    /// The first mapped block in `from..end`. Skips subtrees where nothing is mapped.
    pub fn next_mapped(
        &mut self,
        from: BlockNumber,
        end: BlockNumber,
    ) -> Result<Option<BlockNumber>, NeedNode> {
        let end = end.0.min(MAX_BLOCKS);
        let mut at = from.0;
        while at < end {
            match self.seek(at)? {
                Seek::Hole(next) => at = next,
                Seek::Leaf(index) => {
                    let first = first_of(at, 0);
                    if let Some(next) = self.slab.leaf(index).next_mapped((at - first) as u32) {
                        let block = first + u64::from(next);
                        return Ok((block < end).then_some(BlockNumber(block)));
                    }
                    at = first + LEAF_BLOCKS;
                }
            }
        }
        Ok(None)
    }

    /// Takes the bytes of a node that a call asked for. Bytes that are not that node are refused;
    /// a node that is no longer wanted is dropped without a sound.
    pub fn supply(&mut self, location: NodeLocation, bytes: &[u8]) -> Result<(), NodeError> {
        let Some((level, first)) = self.wanted.remove(&location) else {
            return Ok(());
        };
        let body = node::get_node(&location, level, first, bytes).map_err(NodeError)?;
        let wanted = self
            .head_slot(level, first)
            .filter(|slot| slot.location() == Some(location));
        if wanted.is_some_and(|slot| self.slab.resolve(slot.handle).is_none()) {
            let handle = self.slab.insert(body, State::Clean, self.generation);
            self.edit_head_slot(level, first, |slot| slot.handle = handle);
        }
        Ok(())
    }

    /// Drops clean nodes that were not used of late, until the nodes take at most `target_bytes`
    /// or nothing more can go. Returns the bytes freed. A call that frees little has looked at
    /// every node: give it a target well below the limit that made it necessary.
    pub fn evict(&mut self, target_bytes: usize) -> usize {
        let before = self.slab.bytes();
        let capacity = self.slab.capacity();
        // One round may only find that every node was used, and parents follow their children.
        let mut idle = 0;
        while idle < capacity {
            if self.slab.bytes() <= target_bytes || self.slab.bytes() == self.slab.dirty_bytes() {
                break;
            }
            idle += 1;
            let index = self.clock_hand % capacity;
            self.clock_hand = (index + 1) % capacity;
            let (evictable, referenced) = {
                let entry = self.slab.entry(index);
                let here = !matches!(entry.body, Body::Free);
                (
                    here && self.is_clean(entry.state, entry.stamp),
                    entry.referenced,
                )
            };
            if !evictable {
                continue;
            }
            if referenced {
                self.slab.entry_mut(index).referenced = false;
                idle = 0;
                continue;
            }
            if let Body::Inner(inner) = &self.slab.entry(index).body
                && inner
                    .slots()
                    .iter()
                    .any(|slot| self.slab.resolve(slot.handle).is_some())
            {
                continue;
            }
            self.slab.remove(index);
            idle = 0;
        }
        before - self.slab.bytes()
    }

    /// Appends the nodes that the checkpoint begun last, or the next one if none runs, does not
    /// reach any more, and that were not reported before.
    pub fn take_dead_nodes(&mut self, out: &mut Vec<NodeLocation>) {
        out.append(&mut self.dead);
    }

    /// If the node of this level and first block is still the one at `location`, makes it dirty,
    /// so that the next checkpoint writes it elsewhere, and returns true.
    pub fn relocate(
        &mut self,
        level: u8,
        first_block: BlockNumber,
        location: NodeLocation,
    ) -> Result<bool, NeedNode> {
        let first = first_block.0;
        if level > ROOT_LEVEL || first >= MAX_BLOCKS || first != first_of(first, level) {
            return Ok(false);
        }
        let mut slot = self.head;
        for at in (level..=ROOT_LEVEL).rev() {
            if slot.is_absent() {
                return Ok(false);
            }
            if at == level && slot.location() != Some(location) {
                return Ok(false);
            }
            let index = self.resident(&slot, at, first)?;
            if at > level {
                let inner = self.slab.inner(index);
                slot = match inner.find(child_of(first, at)) {
                    Some(place) => inner.slots()[place],
                    None => return Ok(false),
                };
            }
        }
        self.own_path(first, level);
        Ok(true)
    }

    /// Goes down to the leaf of a block.
    #[inline]
    fn seek(&mut self, block: u64) -> Result<Seek, NeedNode> {
        if self.head.is_absent() {
            return Ok(Seek::Hole(MAX_BLOCKS));
        }
        let mut level = ROOT_LEVEL;
        let mut handle = self.head.handle;
        let mut parent = None;
        loop {
            let Some(index) = self.slab.resolve(handle) else {
                let slot = match parent {
                    None => self.head,
                    Some((index, place)) => {
                        let inner: &Inner = self.slab.inner(index);
                        inner.slots()[place]
                    }
                };
                return Err(self.want(&slot, level, block));
            };
            let entry = self.slab.entry_mut(index);
            if !entry.referenced {
                entry.referenced = true;
            }
            let Body::Inner(inner) = &entry.body else {
                return Ok(Seek::Leaf(index));
            };
            let child = child_of(block, level);
            let Some(place) = inner.find(child) else {
                let next = inner.next_child(child + 1).unwrap_or(FAN_OUT) as u64;
                return Ok(Seek::Hole(
                    first_of(block, level) + next * span_blocks(level - 1),
                ));
            };
            handle = inner.slots()[place].handle;
            parent = Some((index, place));
            level -= 1;
        }
    }

    #[cold]
    fn want(&mut self, slot: &Slot, level: u8, block: u64) -> NeedNode {
        let location = slot
            .location()
            .expect("a node that is not in memory is on disk");
        if self.wanted.len() >= MAX_WANTED {
            self.wanted.clear();
        }
        self.wanted
            .insert(location, (level, first_of(block, level)));
        NeedNode(location)
    }

    fn resident(&mut self, slot: &Slot, level: u8, block: u64) -> Result<u32, NeedNode> {
        self.slab
            .resolve(slot.handle)
            .ok_or_else(|| self.want(slot, level, block))
    }

    /// Whether the head may change the node as it is, and has its path to itself.
    #[inline]
    fn may_change(&self, index: u32) -> bool {
        let entry = self.slab.entry(index);
        entry.state == State::Dirty && (self.checkpoint.is_none() || entry.stamp == self.generation)
    }

    fn is_clean(&self, state: State, stamp: u32) -> bool {
        match state {
            State::Clean => true,
            State::Dirty => false,
            State::Written => self.checkpoint.is_none() || stamp != self.generation,
        }
    }

    /// Makes the nodes of a block from the root down to `to_level` the head's own and dirty, and
    /// makes those that are missing. All that exist are in memory. Returns the lowest one.
    fn own_path(&mut self, block: u64, to_level: u8) -> u32 {
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
        if self.slab.entry(index).state == State::Dirty {
            let body = self.slab.entry(index).body.clone();
            self.slab.entry_mut(index).superseded = true;
            return Slot::in_memory(self.slab.insert(body, State::Dirty, generation));
        }
        self.bury(&slot);
        slot.clear_location();
        self.slab.change(index, |entry| {
            entry.state = State::Dirty;
            entry.stamp = generation;
        });
        slot
    }

    /// Notes that the head no longer has the node at the slot's location.
    fn bury(&mut self, slot: &Slot) {
        let Some(location) = slot.location() else {
            return;
        };
        let written_now = self.slab.resolve(slot.handle).is_some_and(|index| {
            let entry = self.slab.entry(index);
            entry.state == State::Written && entry.stamp == self.generation
        });
        match &mut self.checkpoint {
            None => self.dead.push(location),
            Some(running) if written_now => running.dead_written.push(location),
            Some(running) => running.dead.push(location),
        }
    }

    /// Takes the leaf of a block out of the tree, and the inner nodes that have no other child.
    fn drop_leaf(&mut self, block: u64) {
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
            self.bury(&slot);
            if let Some(index) = self.slab.resolve(slot.handle) {
                let frozen =
                    self.slab.entry(index).state == State::Dirty && !self.may_change(index);
                if frozen {
                    self.slab.entry_mut(index).superseded = true;
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

    /// The head's slot for a node, if the path to it is in memory.
    fn head_slot(&self, level: u8, block: u64) -> Option<Slot> {
        let mut slot = self.head;
        for at in (level + 1..=ROOT_LEVEL).rev() {
            let inner = self.slab.inner(self.slab.resolve(slot.handle)?);
            slot = inner.slots()[inner.find(child_of(block, at))?];
        }
        (!slot.is_absent()).then_some(slot)
    }

    /// Changes the slot that [`Self::head_slot`] finds.
    fn edit_head_slot(&mut self, level: u8, block: u64, edit: impl FnOnce(&mut Slot)) {
        if level == ROOT_LEVEL {
            edit(&mut self.head);
            return;
        }
        let parent = self
            .head_slot(level + 1, block)
            .and_then(|s| self.slab.resolve(s.handle));
        let parent = parent.expect("the slot was found before");
        let inner = self.slab.inner_mut(parent);
        let place = inner
            .find(child_of(block, level + 1))
            .expect("the slot was found before");
        edit(&mut inner.slots_mut()[place]);
    }
}
