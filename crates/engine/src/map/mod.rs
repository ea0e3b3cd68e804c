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
//! # Frozen trees
//!
//! [`Map::freeze`] keeps the tree as it is for a snapshot, [`Map::begin_checkpoint`] for itself, by
//! starting a new *generation*. From then on there are several trees, frozen ones that are to be
//! written, oldest first, and the *head*, which the volume uses; they share what has not changed
//! since. A checkpoint writes those that were frozen when it began; snapshots taken while it runs
//! wait for the next one. A node's state says who may change it:
//!
//! ```text
//!                change                            freeze
//!     Clean ──────────────▶ Dirty (this generation) ──▶ Dirty (older: frozen)
//!       ▲ ▲                   ▲     ▲                      │            │
//!       │ └─ finish ── Written ┘    └──── head copies it ──┤            │ written
//!       │                ▲    (changed: in place)          │            │
//!       supply           └─────────────────────────────────┴────────────┘
//! ```
//!
//! Invariants:
//! - A dirty node keeps the generation it was made dirty in (its *stamp*), and from when the head
//!   has another in its place that generation too: the trees that have the node are those frozen
//!   in between. So a tree's walk knows its nodes from those the head put into their memory since.
//! - A dirty node's slot has no location, and so its parent is dirty too: the walk of a frozen
//!   tree follows the slots without a location and nothing else.
//! - The head changes a frozen dirty node never; it makes a copy and marks the old one
//!   *superseded*. A superseded node's parent is superseded as well (paths are copied from the
//!   root). It is dropped when it is written and, if a snapshot has it, committed.
//! - A clean node may be changed in place by the head, whatever trees have it: they have its
//!   location in a slot, and need no more. So may one that the running checkpoint wrote, unless
//!   a snapshot has it: if the checkpoint is aborted, the snapshot needs it to be written again.
//! - When a node is written, every tree that has it, and the head, gets the location into its
//!   copy of the parent: a node is written once.
//! - Dirty nodes, and nodes written by a checkpoint that is not finished, are never evicted; an
//!   inner node only when none of its children is in memory. So every node in memory can be
//!   reached from the head, or is superseded.
//! - Each node written becomes dead at most once: when the head has another in its place, and no
//!   snapshot has it. Which it is, is told by the stamp for nodes that the running checkpoint
//!   wrote. Others on disk all are in a snapshot that is not committed, if there is one; else
//!   the place tells: nodes are written behind each other, and the root of a tree last.
//! - Equal locations mean equal subtrees, for a difference of two roots ([`walk`]).
//!
//! A map belongs to one thread at a time (`&mut self`; it is `Send`).

mod checkpoint;
mod extents;
mod inner;
mod leaf;
mod node;
mod path;
mod slab;
#[cfg(test)]
mod tests;
pub mod walk;

use std::collections::{HashMap, VecDeque};

use crate::types::{Address, BLOCK_BYTES, BlockNumber, MAX_VOLUME_BYTES, SegmentNumber};
use checkpoint::{Checkpoint, Tree};
pub use checkpoint::{CheckpointProgress, FrozenRoot};
pub use extents::{Extent, Extents};
use inner::{FAN_OUT, FAN_OUT_BITS, Inner, Slot};
use leaf::LEAF_BITS;
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

/// The tree of one volume's head, and the trees of snapshots and of a checkpoint that are not on disk.
#[derive(Debug)]
pub struct Map {
    slab: Slab,
    head: Slot,
    generation: u32,
    mapped_blocks: u64,
    /// Frozen and not committed, oldest first.
    trees: VecDeque<Tree>,
    checkpoint: Option<Checkpoint>,
    /// The mark of nodes that the running checkpoint wrote; 0: none runs.
    running: u32,
    /// A node stamped before this is in the newest of `trees`, if the head has it and it is dirty.
    unshared_from: u32,
    /// Generation behind the newest snapshot in `trees`; 0: there is none.
    snapshots_until: u32,
    /// Nodes before this place are in the snapshot that the head descends from.
    held_until: (SegmentNumber, u64),
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
        Self::open(None, 0, None)
    }

    /// The map of a committed checkpoint: its root and its count of mapped blocks, and the root of
    /// the snapshot that it descends from, see [`Self::set_parent_root`].
    #[must_use]
    pub fn open(
        root: Option<NodeLocation>,
        mapped_blocks: u64,
        parent_root: Option<NodeLocation>,
    ) -> Self {
        let mut map = Self {
            slab: Slab::default(),
            head: root.map_or(Slot::ABSENT, Slot::on_disk),
            generation: 1,
            mapped_blocks: if root.is_some() { mapped_blocks } else { 0 },
            trees: VecDeque::new(),
            checkpoint: None,
            running: 0,
            unshared_from: 0,
            snapshots_until: 0,
            held_until: (SegmentNumber(0), 0),
            dead: Vec::new(),
            wanted: HashMap::new(),
            clock_hand: 0,
        };
        map.set_parent_root(parent_root);
        map
    }

    /// Sets the snapshot that the head descends from. Nodes up to the end of its root, the newest
    /// of its nodes, are *held*: they do not die when the head replaces them. Without a root,
    /// none are. A snapshot that [`Self::freeze`] made takes this place by itself when the
    /// checkpoint that holds it is finished; until then all nodes on disk are held.
    pub fn set_parent_root(&mut self, root: Option<NodeLocation>) {
        self.held_until = root.map_or((SegmentNumber(0), 0), |root| {
            let end = u64::from(root.offset_bytes) + u64::from(root.len_bytes);
            (root.segment, end)
        });
    }

    /// The newest segment with nodes that are held; `None`: none are.
    #[must_use]
    pub fn held_segment(&self) -> Option<SegmentNumber> {
        let (segment, _) = self.held_until;
        if self.pending_freezes() > 0 {
            Some(SegmentNumber(u64::MAX))
        } else {
            (segment.0 > 0).then_some(segment)
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

    /// What [`Self::remove`] is to be called for next, when `from..end` is unmapped: the first blocks
    /// there that one leaf maps, as block and count. The range ends with the leaf or at `end`, and
    /// its leaf is in memory, so that the removal asks for no node. `None`: nothing is mapped.
    ///
    /// An unmap is logged in these pieces, so that the map is changed right after each.
    pub fn next_unmap(
        &mut self,
        from: BlockNumber,
        end: BlockNumber,
    ) -> Result<Option<(BlockNumber, u32)>, NeedNode> {
        let next = self.next_mapped(from, end)?;
        Ok(next.map(|block| {
            let leaf_end = first_of(block.0, 0) + LEAF_BLOCKS;
            (block, (leaf_end.min(end.0) - block.0) as u32)
        }))
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
            let entry = self.slab.entry(index);
            let evictable = match (&entry.body, entry.state) {
                (Body::Free, _) | (_, State::Dirty) => false,
                (_, State::Clean) => true,
                (_, State::Written) => !entry.superseded && entry.mark != self.running,
            };
            if !evictable {
                continue;
            }
            if entry.referenced {
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
    /// reach any more, that no snapshot has, and that were not reported before.
    pub fn take_dead_nodes(&mut self, out: &mut Vec<NodeLocation>) {
        out.append(&mut self.dead);
    }

    /// If the node of this level and first block is still the one at `location`, makes it dirty,
    /// so that the next checkpoint writes it elsewhere, and returns true. A node that is held stays
    /// where it is.
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
        if self.is_held(location) {
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
}
