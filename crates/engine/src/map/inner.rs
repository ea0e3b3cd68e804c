//! An inner node: up to 256 children, in a bitmap and a packed list of slots.
//!
//! A slot has the child's location if the child is clean, and its handle if it is in memory; a
//! child that is dirty has only the handle. Single-threaded.

use super::slab::Handle;
use super::{NodeLocation, SegmentNumber};

pub(super) const FAN_OUT: usize = 1 << FAN_OUT_BITS;
pub(super) const FAN_OUT_BITS: u32 = 8;

/// How a parent (or the map, for the root) knows a node. Kept in 28 bytes: there is one for
/// each leaf.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    segment_low: u32,
    segment_high: u32,
    offset_bytes: u32,
    /// 0: no location.
    len_bytes: u32,
    checksum: u32,
    pub handle: Handle,
}

impl Slot {
    /// No node at all.
    pub const ABSENT: Self = Self::in_memory(Handle::NONE);

    pub const fn in_memory(handle: Handle) -> Self {
        Self {
            segment_low: 0,
            segment_high: 0,
            offset_bytes: 0,
            len_bytes: 0,
            checksum: 0,
            handle,
        }
    }

    pub fn on_disk(location: NodeLocation) -> Self {
        let mut slot = Self::ABSENT;
        slot.set_location(location);
        slot
    }

    pub fn is_absent(&self) -> bool {
        self.len_bytes == 0 && self.handle == Handle::NONE
    }

    pub fn location(&self) -> Option<NodeLocation> {
        (self.len_bytes > 0).then(|| NodeLocation {
            segment: SegmentNumber(
                u64::from(self.segment_high) << 32 | u64::from(self.segment_low),
            ),
            offset_bytes: self.offset_bytes,
            len_bytes: self.len_bytes,
            checksum: self.checksum,
        })
    }

    pub fn set_location(&mut self, location: NodeLocation) {
        self.segment_low = location.segment.0 as u32;
        self.segment_high = (location.segment.0 >> 32) as u32;
        self.offset_bytes = location.offset_bytes;
        self.len_bytes = location.len_bytes;
        self.checksum = location.checksum;
    }

    pub fn clear_location(&mut self) {
        *self = Self::in_memory(self.handle);
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Inner {
    bitmap: [u64; FAN_OUT / 64],
    slots: Vec<Slot>,
}

impl Inner {
    /// A node with these children; as many slots as bits.
    pub fn from_parts(bitmap: [u64; FAN_OUT / 64], slots: Vec<Slot>) -> Self {
        debug_assert_eq!(
            bitmap.iter().map(|word| word.count_ones()).sum::<u32>() as usize,
            slots.len()
        );
        Self { bitmap, slots }
    }

    pub fn bitmap(&self) -> &[u64; FAN_OUT / 64] {
        &self.bitmap
    }

    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub fn slots_mut(&mut self) -> &mut [Slot] {
        &mut self.slots
    }

    pub fn slot_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>()
    }

    /// Children before `child`.
    #[inline]
    fn rank(&self, child: usize) -> usize {
        let (word, bit) = (child / 64, child % 64);
        let before: u32 = self.bitmap[..word]
            .iter()
            .map(|word| word.count_ones())
            .sum();
        (before + (self.bitmap[word] & ((1 << bit) - 1)).count_ones()) as usize
    }

    /// The position in [`Self::slots`] of a child, if there is one.
    #[inline]
    pub fn find(&self, child: usize) -> Option<usize> {
        (self.bitmap[child / 64] >> (child % 64) & 1 == 1).then(|| self.rank(child))
    }

    /// The first child at `from` or later.
    pub fn next_child(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        if word >= self.bitmap.len() {
            return None;
        }
        let mut bits = self.bitmap[word] & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.bitmap.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    /// Puts a child's slot, in the place of the one it had.
    pub fn set(&mut self, child: usize, slot: Slot) {
        let rank = self.rank(child);
        if self.bitmap[child / 64] >> (child % 64) & 1 == 1 {
            self.slots[rank] = slot;
            return;
        }
        if self.slots.len() == self.slots.capacity() {
            // By an eighth, not by doubling: the slots of a sparse map are a good part of it.
            let room = (self.slots.len() / 8)
                .max(2)
                .min(FAN_OUT - self.slots.len());
            self.slots.reserve_exact(room);
        }
        self.slots.insert(rank, slot);
        self.bitmap[child / 64] |= 1 << (child % 64);
    }

    /// Takes a child out.
    ///
    /// # Panics
    /// If it is not there.
    pub fn remove(&mut self, child: usize) -> Slot {
        let rank = self.find(child).expect("a child that is removed is there");
        self.bitmap[child / 64] &= !(1 << (child % 64));
        let slot = self.slots.remove(rank);
        if self.slots.capacity() > self.slots.len() + self.slots.len() / 4 + 8 {
            self.slots.shrink_to_fit();
        }
        slot
    }
}
