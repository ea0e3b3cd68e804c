//! Where the nodes of one map live in memory: a slab of entries in chunks that never move.
//!
//! A [`Handle`] names an entry and its generation. Freeing an entry ends its generation, so a
//! handle left behind in a parent resolves to nothing: eviction needs no way up. The slab counts
//! the bytes its nodes take. Single-threaded.

use super::inner::Inner;
use super::leaf::Leaf;

const CHUNK_ENTRIES: usize = 256;

/// A node in memory, or nothing ([`Handle::NONE`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handle {
    pub index: u32,
    generation: u32,
}

impl Handle {
    pub const NONE: Self = Self {
        index: u32::MAX,
        generation: 0,
    };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// On disk as it is in memory; the parent's slot has the location.
    Clean,
    /// Changed since it was read or made. Frozen if a tree was frozen since its stamp, and then only
    /// the checkpoint changes it: its slots' locations.
    Dirty,
    /// Written by the checkpoint in the mark; clean once that one is finished.
    Written,
}

#[derive(Clone, Debug)]
pub(super) enum Body {
    Free,
    Leaf(Leaf),
    Inner(Box<Inner>),
}

#[derive(Debug)]
pub(super) struct Entry {
    pub body: Body,
    generation: u32,
    /// The map's generation when the node was made dirty: trees frozen since have it, until the head
    /// superseded it.
    pub stamp: u32,
    /// Superseded: the map's generation when that happened. Else, if written: the checkpoint.
    pub mark: u32,
    pub state: State,
    /// Used since the clock's hand came by.
    pub referenced: bool,
    /// The head has another node in this place, or none; only frozen trees still need this one.
    pub superseded: bool,
}

impl Entry {
    /// The generation of the first tree that does not have the node any more.
    pub fn until(&self) -> u32 {
        if self.superseded { self.mark } else { u32::MAX }
    }

    /// Bytes of memory the node takes, its place in the slab included.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + match &self.body {
                Body::Free => 0,
                Body::Leaf(leaf) => leaf.buffer_bytes(),
                Body::Inner(inner) => size_of::<Inner>() + inner.slot_bytes(),
            }
    }
}

#[derive(Debug, Default)]
pub(super) struct Slab {
    chunks: Vec<Box<[Entry]>>,
    free: Vec<u32>,
    /// Bytes of all nodes.
    bytes: usize,
    /// Bytes of the nodes that are dirty.
    dirty_bytes: usize,
}

impl Slab {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn dirty_bytes(&self) -> usize {
        self.dirty_bytes
    }

    /// Entries there is room for, used or not.
    pub fn capacity(&self) -> u32 {
        (self.chunks.len() * CHUNK_ENTRIES) as u32
    }

    /// All bytes allocated: nodes, unused entries, and the slab's own lists.
    #[cfg(test)]
    pub fn allocated_bytes(&self) -> usize {
        let used = self.capacity() as usize - self.free.len();
        self.bytes
            + (self.capacity() as usize - used) * size_of::<Entry>()
            + self.chunks.capacity() * size_of::<Box<[Entry]>>()
            + self.free.capacity() * size_of::<u32>()
    }

    #[inline]
    pub fn entry(&self, index: u32) -> &Entry {
        &self.chunks[index as usize / CHUNK_ENTRIES][index as usize % CHUNK_ENTRIES]
    }

    /// The entry, for changes that do not change what it takes or whether it is dirty.
    #[inline]
    pub fn entry_mut(&mut self, index: u32) -> &mut Entry {
        &mut self.chunks[index as usize / CHUNK_ENTRIES][index as usize % CHUNK_ENTRIES]
    }

    /// The index of a handle whose node is still in memory.
    #[inline]
    pub fn resolve(&self, handle: Handle) -> Option<u32> {
        let chunk = self.chunks.get(handle.index as usize / CHUNK_ENTRIES)?;
        let entry = &chunk[handle.index as usize % CHUNK_ENTRIES];
        (entry.generation == handle.generation).then_some(handle.index)
    }

    pub fn insert(&mut self, body: Body, state: State, stamp: u32) -> Handle {
        if self.free.is_empty() {
            self.add_chunk();
        }
        let index = self.free.pop().expect("a chunk was added");
        let entry = self.entry_mut(index);
        entry.body = body;
        entry.state = state;
        entry.stamp = stamp;
        entry.mark = 0;
        entry.referenced = true;
        entry.superseded = false;
        let (bytes, generation) = (entry.bytes(), entry.generation);
        self.bytes += bytes;
        if state == State::Dirty {
            self.dirty_bytes += bytes;
        }
        Handle { index, generation }
    }

    fn add_chunk(&mut self) {
        let first = self.capacity();
        assert!(
            first < u32::MAX - CHUNK_ENTRIES as u32,
            "more map nodes than a handle can name"
        );
        let chunk = std::iter::repeat_with(|| Entry {
            body: Body::Free,
            generation: 0,
            stamp: 0,
            mark: 0,
            state: State::Clean,
            referenced: false,
            superseded: false,
        });
        self.chunks.push(chunk.take(CHUNK_ENTRIES).collect());
        self.free
            .extend((first..first + CHUNK_ENTRIES as u32).rev());
    }

    pub fn remove(&mut self, index: u32) {
        let entry = self.entry_mut(index);
        let (bytes, dirty) = (entry.bytes(), entry.state == State::Dirty);
        entry.body = Body::Free;
        entry.generation = entry.generation.wrapping_add(1);
        self.bytes -= bytes;
        if dirty {
            self.dirty_bytes -= bytes;
        }
        self.free.push(index);
    }

    /// Changes an entry in a way that may change what it takes or whether it is dirty.
    #[inline]
    pub fn change<R>(&mut self, index: u32, change: impl FnOnce(&mut Entry) -> R) -> R {
        let entry = self.entry_mut(index);
        let (bytes, dirty) = (entry.bytes(), entry.state == State::Dirty);
        let result = change(entry);
        let (new_bytes, new_dirty) = (entry.bytes(), entry.state == State::Dirty);
        self.bytes = self.bytes + new_bytes - bytes;
        self.dirty_bytes = self.dirty_bytes + if new_dirty { new_bytes } else { 0 }
            - if dirty { bytes } else { 0 };
        result
    }

    /// # Panics
    /// If the entry is not an inner node: levels tell them apart, so that would be a defect.
    #[inline]
    pub fn inner(&self, index: u32) -> &Inner {
        match &self.entry(index).body {
            Body::Inner(inner) => inner,
            _ => unreachable!("an inner node was expected here"),
        }
    }

    /// As [`Self::inner`], for changes that do not add or remove slots.
    #[inline]
    pub fn inner_mut(&mut self, index: u32) -> &mut Inner {
        match &mut self.entry_mut(index).body {
            Body::Inner(inner) => inner,
            _ => unreachable!("an inner node was expected here"),
        }
    }

    /// # Panics
    /// If the entry is not a leaf.
    #[inline]
    pub fn leaf(&self, index: u32) -> &Leaf {
        match &self.entry(index).body {
            Body::Leaf(leaf) => leaf,
            _ => unreachable!("a leaf was expected here"),
        }
    }
}
