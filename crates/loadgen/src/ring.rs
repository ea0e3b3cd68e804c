//! The driver's side of a split virtqueue (virtio 1.3, 2.7).
//!
//! Invariants: a head is in the available ring at most once until it came back used; indexes are
//! published after what they publish (release) and read before it (acquire). Which chain a head
//! stands for is the caller's matter. Used by one thread.

use std::sync::atomic::{Ordering, fence};

use crate::memory::{GuestMemory, PAGE_BYTES};

pub const DESC_F_NEXT: u16 = 1;
pub const DESC_F_WRITE: u16 = 2;
pub const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

pub const DESCRIPTOR_BYTES: usize = 16;

/// `struct virtq_desc`, little-endian; this program runs on little-endian machines only.
#[derive(Clone, Copy, zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::Immutable)]
#[repr(C)]
pub struct Descriptor {
    pub address: u64,
    pub len_bytes: u32,
    pub flags: u16,
    pub next: u16,
}

/// Offsets of the three parts in guest memory.
#[derive(Clone, Copy)]
pub struct Layout {
    pub descriptors: usize,
    pub available: usize,
    pub used: usize,
}

impl Layout {
    /// Places a ring at `offset` (page-aligned): each part has pages of its own.
    pub fn at(offset: usize, size: u16) -> Self {
        let size = usize::from(size);
        let pages = |bytes: usize| bytes.next_multiple_of(PAGE_BYTES);
        let available = offset + pages(size * DESCRIPTOR_BYTES);
        Self {
            descriptors: offset,
            available,
            used: available + pages(6 + 2 * size),
        }
    }

    /// Bytes of guest memory a ring takes.
    pub fn len_bytes(size: u16) -> usize {
        Self::at(0, size).used + (6 + 8 * usize::from(size)).next_multiple_of(PAGE_BYTES)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u32,
    pub written_bytes: u32,
}

pub struct Ring<'m> {
    memory: &'m GuestMemory,
    pub layout: Layout,
    size: u16,
    event_idx: bool,
    /// Next available index; what is below `published` the device may already see.
    next_available: u16,
    published: u16,
    next_used: u16,
}

impl<'m> Ring<'m> {
    /// `size` is a power of two (virtio 1.3, 2.7). Calls (interrupts) begin switched off.
    pub fn new(memory: &'m GuestMemory, layout: Layout, size: u16, event_idx: bool) -> Self {
        assert!(size.is_power_of_two());
        let ring = Self {
            memory,
            layout,
            size,
            event_idx,
            next_available: 0,
            published: 0,
            next_used: 0,
        };
        ring.disable_calls();
        ring
    }

    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    fn used_event_offset(&self) -> usize {
        self.layout.available + 4 + 2 * usize::from(self.size)
    }

    fn avail_event_offset(&self) -> usize {
        self.layout.used + 4 + 8 * usize::from(self.size)
    }

    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        assert!(index < self.size);
        self.memory.write(
            self.layout.descriptors + usize::from(index) * DESCRIPTOR_BYTES,
            descriptor,
        );
    }

    /// Puts a chain's head into the available ring; [`Ring::publish`] shows it to the device.
    pub fn push(&mut self, head: u16) {
        let place = usize::from(self.next_available % self.size);
        self.memory
            .write(self.layout.available + 4 + 2 * place, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Shows all pushed heads to the device. True: the device asked to be kicked.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return false;
        }
        self.memory
            .atomic_u16(self.layout.available + 2)
            .store(new, Ordering::Release);
        self.published = new;
        // The device re-reads our index after it asks for a kick; we read its wish after we
        // stored the index: with both fences no kick is lost (virtio 1.3, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self
                .memory
                .atomic_u16(self.avail_event_offset())
                .load(Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = self
                .memory
                .atomic_u16(self.layout.used)
                .load(Ordering::Relaxed);
            flags & USED_F_NO_NOTIFY == 0
        }
    }

    fn device_index(&self) -> u16 {
        self.memory
            .atomic_u16(self.layout.used + 2)
            .load(Ordering::Acquire)
    }

    /// How many used elements wait. More than the ring's size: the device broke the ring.
    pub fn waiting(&self) -> u16 {
        self.device_index().wrapping_sub(self.next_used)
    }

    /// Takes the next used element; only after [`Ring::waiting`] said there is one.
    pub fn pop(&mut self) -> Used {
        let place = usize::from(self.next_used % self.size);
        let element = self.layout.used + 4 + 8 * place;
        self.next_used = self.next_used.wrapping_add(1);
        Used {
            head: self.memory.read(element),
            written_bytes: self.memory.read(element + 4),
        }
    }

    /// Asks for a call at the next used element. True: one is there already, do not sleep.
    pub fn enable_calls(&self) -> bool {
        if self.event_idx {
            let event = self.memory.atomic_u16(self.used_event_offset());
            event.store(self.next_used, Ordering::Relaxed);
        } else {
            self.memory
                .atomic_u16(self.layout.available)
                .store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.waiting() != 0
    }

    /// Asks for no calls. With EVENT_IDX the wish is the index just passed, a whole turn of the
    /// 16-bit counter away: one needless call in 65,536 elements is cheaper than renewing it.
    pub fn disable_calls(&self) {
        if self.event_idx {
            let event = self.memory.atomic_u16(self.used_event_offset());
            event.store(self.next_used.wrapping_sub(1), Ordering::Relaxed);
        } else {
            let flags = self.memory.atomic_u16(self.layout.available);
            flags.store(AVAIL_F_NO_INTERRUPT, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;

    /// The device's side, as short as it can be.
    fn device_uses(memory: &GuestMemory, layout: Layout, index: u16, head: u32) {
        let element = layout.used + 4 + 8 * usize::from(index % SIZE);
        memory.write(element, head);
        memory.write(element + 4, 1_u32);
        memory
            .atomic_u16(layout.used + 2)
            .store(index.wrapping_add(1), Ordering::Release);
    }

    #[test]
    fn heads_come_back_in_order_across_the_wrap_of_the_index() {
        let memory = GuestMemory::new(Layout::len_bytes(SIZE)).unwrap();
        let layout = Layout::at(0, SIZE);
        let mut ring = Ring::new(&memory, layout, SIZE, false);
        for turn in 0..=u16::MAX {
            let head = turn % SIZE;
            ring.push(head);
            assert!(ring.publish(), "the device did not ask for silence");
            assert_eq!(ring.waiting(), 0);
            let slot = layout.available + 4 + 2 * usize::from(turn % SIZE);
            assert_eq!(memory.read::<u16>(slot), head);
            device_uses(&memory, layout, turn, u32::from(head));
            assert_eq!(ring.waiting(), 1);
            assert_eq!(
                ring.pop(),
                Used {
                    head: u32::from(head),
                    written_bytes: 1
                }
            );
        }
        assert_eq!(ring.next_available(), 0);
    }

    #[test]
    fn kicks_follow_the_devices_flag_without_event_idx() {
        let memory = GuestMemory::new(Layout::len_bytes(SIZE)).unwrap();
        let layout = Layout::at(0, SIZE);
        let mut ring = Ring::new(&memory, layout, SIZE, false);
        memory.write(layout.used, USED_F_NO_NOTIFY);
        ring.push(0);
        assert!(!ring.publish());
        memory.write(layout.used, 0_u16);
        ring.push(1);
        assert!(ring.publish());
        assert!(!ring.publish(), "nothing new to show");
    }

    #[test]
    fn kicks_follow_the_devices_index_with_event_idx() {
        let memory = GuestMemory::new(Layout::len_bytes(SIZE)).unwrap();
        let layout = Layout::at(0, SIZE);
        let mut ring = Ring::new(&memory, layout, SIZE, true);
        let avail_event = layout.used + 4 + 8 * usize::from(SIZE);
        memory.write(avail_event, 1_u16);
        ring.push(0);
        assert!(!ring.publish(), "index 1 was not passed yet");
        ring.push(1);
        ring.push(2);
        assert!(ring.publish(), "index 1 lies in this batch");
        ring.push(3);
        assert!(!ring.publish(), "the device did not move its wish");
    }

    #[test]
    fn calls_are_not_asked_for_when_the_device_was_faster() {
        let memory = GuestMemory::new(Layout::len_bytes(SIZE)).unwrap();
        let layout = Layout::at(0, SIZE);
        let mut ring = Ring::new(&memory, layout, SIZE, true);
        ring.push(0);
        ring.publish();
        assert!(!ring.enable_calls());
        device_uses(&memory, layout, 0, 0);
        assert!(
            ring.enable_calls(),
            "sleeping now would lose the completion"
        );
    }
}
