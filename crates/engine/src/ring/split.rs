//! The device side of a split virtqueue (virtio 1.3, 2.7).
//!
//! Invariants:
//! - `next_available` moves by one for each chain popped and never beyond the driver's index; the
//!   driver's index is never more than the queue size ahead, or the ring is broken.
//! - The used index is stored after the elements it covers (release), once a batch.
//! - Ring memory is accessed through the pointers below only, each field read once into a local.
//!   Pointers are inside mappings of `memory`, which the queue keeps alive.
//! - A chain's work is bounded: its descriptors by the table they are in, its pieces by
//!   [`MAX_CHAIN_PIECES`].
//!
//! A [`QueueError`] from `pop` or `available` means that the guest broke its ring: the caller stops
//! the queue. Belongs to one worker thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use super::chain::{Chain, MAX_CHAIN_PIECES};
use super::memory::{GuestMemory, MemoryError};

/// Largest queue (virtio 1.3, 2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Feature bits of the ring (virtio 1.3, 6 and 6.3; NOTIFY_ON_EMPTY: legacy).
pub const F_NOTIFY_ON_EMPTY: u64 = 1 << 24;
pub const F_INDIRECT_DESC: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

const DESCRIPTOR_BYTES: usize = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Why a queue could not start, or how the guest broke its ring.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error("queue size {size} is not a power of two from 1 to {MAX_QUEUE_SIZE}")]
    Size { size: u32 },
    #[error("{part} at user address {address:#x} is not aligned to {align} bytes")]
    Misaligned {
        part: &'static str,
        address: u64,
        align: usize,
    },
    #[error("{part} is outside memory: {error}")]
    OutsideMemory {
        part: &'static str,
        error: MemoryError,
    },
    #[error("available index {index} is {ahead} ahead of {next}, and the queue has {size} entries")]
    IndexJump {
        index: u16,
        next: u16,
        ahead: u16,
        size: u16,
    },
    #[error("descriptor {index} is outside its table of {count}")]
    DescriptorIndex { index: u16, count: u32 },
    #[error("the chain at descriptor {head} has a loop, or more descriptors than its table")]
    Loop { head: u16 },
    #[error("the chain at descriptor {head} has more than {MAX_CHAIN_PIECES} pieces")]
    TooLong { head: u16 },
    #[error("the chain at descriptor {head} has a descriptor of length 0")]
    ZeroLength { head: u16 },
    #[error("the chain at descriptor {head} has a readable descriptor after a writable one")]
    Direction { head: u16 },
    #[error("the chain at descriptor {head} has an indirect table, which was not negotiated")]
    IndirectNotNegotiated { head: u16 },
    #[error("the chain at descriptor {head} has an indirect table inside an indirect table")]
    IndirectNested { head: u16 },
    #[error("the chain at descriptor {head} has a descriptor with both INDIRECT and NEXT")]
    IndirectWithNext { head: u16 },
    #[error("the chain at descriptor {head} has an indirect table of {len_bytes} bytes")]
    IndirectLength { head: u16, len_bytes: u32 },
    #[error("the chain at descriptor {head}: {error}")]
    Address { head: u16, error: MemoryError },
}

/// Where a queue lies, in the front-end's (user) addresses, and what was negotiated.
#[derive(Debug, Clone, Copy)]
pub struct QueueConfig {
    pub size: u32,
    pub descriptor_address: u64,
    pub available_address: u64,
    pub used_address: u64,
    pub features: u64,
}

/// Host pointers to the three parts of a ring.
#[derive(Debug, Clone, Copy)]
struct Parts {
    descriptors: *const u8,
    available: *mut u8,
    used: *mut u8,
}

#[derive(Debug)]
pub struct SplitQueue {
    memory: Arc<GuestMemory>,
    config: QueueConfig,
    parts: Parts,
    size: u16,
    event_idx: bool,
    /// Index of the next chain to take; free running.
    next_available: u16,
    /// The driver's index as last read; `next_available..available` may be taken without looking.
    available: u16,
    /// Index of the next used element to write; free running.
    next_used: u16,
    /// Used index when the driver was last told, or nothing yet.
    signalled_used: Option<u16>,
}

// SAFETY: `parts` points into `memory`, which the queue keeps alive on whichever thread it is; the
// memory is shared with the guest anyway and only accessed by atomics and volatile reads.
unsafe impl Send for SplitQueue {}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(low: u64, high: u64) -> Self {
        Self {
            address: low,
            len: high as u32,
            flags: (high >> 32) as u16,
            next: (high >> 48) as u16,
        }
    }
}

impl SplitQueue {
    /// A queue that goes on at available index `base`. The used index is taken from the ring: it
    /// says what the driver was told before a reconnect.
    pub fn new(
        memory: Arc<GuestMemory>,
        config: QueueConfig,
        base: u16,
    ) -> Result<Self, QueueError> {
        let size = u16::try_from(config.size)
            .ok()
            .filter(|n| n.is_power_of_two() && *n <= MAX_QUEUE_SIZE);
        let size = size.ok_or(QueueError::Size { size: config.size })?;
        let parts = Parts::locate(&memory, &config, size)?;
        let mut queue = Self {
            memory,
            config,
            parts,
            size,
            event_idx: config.features & F_EVENT_IDX != 0,
            next_available: base,
            available: base,
            next_used: 0,
            signalled_used: None,
        };
        queue.next_used = queue.used_u16(2).load(Ordering::Acquire);
        queue.next_used = u16::from_le(queue.next_used);
        Ok(queue)
    }

    /// Moves the queue to a new memory table in which its rings must lie as well.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), QueueError> {
        self.parts = Parts::locate(&memory, &self.config, self.size)?;
        self.memory = memory;
        Ok(())
    }

    /// The memory its chains point into.
    #[must_use]
    pub const fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Index of the next chain to take: what GET_VRING_BASE returns.
    #[must_use]
    pub const fn next_available(&self) -> u16 {
        self.next_available
    }

    /// How many chains wait to be popped.
    pub fn available(&mut self) -> Result<u16, QueueError> {
        // Acquire: ring entries and descriptors are read after the index that covers them.
        let index = u16::from_le(self.available_u16(2).load(Ordering::Acquire));
        let ahead = index.wrapping_sub(self.next_available);
        if ahead > self.size {
            return Err(QueueError::IndexJump {
                index,
                next: self.next_available,
                ahead,
                size: self.size,
            });
        }
        self.available = index;
        Ok(ahead)
    }

    /// Takes the next chain into `chain`; false: there is none. The driver's index is read again
    /// only when everything known to be there has been taken.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.next_available == self.available && self.available()? == 0 {
            return Ok(false);
        }
        let slot = usize::from(self.next_available & (self.size - 1));
        let head = u16::from_le(self.available_u16(4 + 2 * slot).load(Ordering::Relaxed));
        self.walk(head, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Follows a chain from `head`: descriptors of the ring's table, and at its end perhaps one
    /// indirect table (virtio 1.3, 2.7.5.3).
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.reset(head);
        let mut index = head;
        let mut left = u32::from(self.size);
        loop {
            if index >= self.size {
                return Err(QueueError::DescriptorIndex {
                    index,
                    count: self.size.into(),
                });
            }
            left = left.checked_sub(1).ok_or(QueueError::Loop { head })?;
            let descriptor = self.descriptor(index);
            if descriptor.flags & DESC_F_INDIRECT != 0 {
                return self.walk_indirect(descriptor, chain);
            }
            self.append(descriptor, chain)?;
            if descriptor.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn walk_indirect(&self, table: Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        let head = chain.head;
        if self.config.features & F_INDIRECT_DESC == 0 {
            return Err(QueueError::IndirectNotNegotiated { head });
        }
        if table.flags & DESC_F_NEXT != 0 {
            return Err(QueueError::IndirectWithNext { head });
        }
        let count = table.len / DESCRIPTOR_BYTES as u32;
        // `next` has 16 bits, so a larger table cannot be meant.
        if count == 0 || !table.len.is_multiple_of(DESCRIPTOR_BYTES as u32) || count > 1 << 16 {
            return Err(QueueError::IndirectLength {
                head,
                len_bytes: table.len,
            });
        }
        let mut index = 0u16;
        let mut left = count;
        loop {
            if u32::from(index) >= count {
                return Err(QueueError::DescriptorIndex { index, count });
            }
            left = left.checked_sub(1).ok_or(QueueError::Loop { head })?;
            let outside = MemoryError::OutsideGuest {
                address: table.address,
                len_bytes: table.len.into(),
            };
            let at = table
                .address
                .checked_add(u64::from(index) * DESCRIPTOR_BYTES as u64);
            let at = at.ok_or(QueueError::Address {
                head,
                error: outside,
            })?;
            let mut bytes = [0; DESCRIPTOR_BYTES];
            self.memory
                .read(at, &mut bytes)
                .map_err(|error| QueueError::Address { head, error })?;
            let raw = u128::from_le_bytes(bytes);
            let descriptor = Descriptor::parse(raw as u64, (raw >> 64) as u64);
            if descriptor.flags & DESC_F_INDIRECT != 0 {
                return Err(QueueError::IndirectNested { head });
            }
            self.append(descriptor, chain)?;
            if descriptor.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn append(&self, descriptor: Descriptor, chain: &mut Chain) -> Result<(), QueueError> {
        let head = chain.head;
        let len = u64::from(descriptor.len);
        if len == 0 {
            return Err(QueueError::ZeroLength { head });
        }
        let translated = self
            .memory
            .translate(descriptor.address, len, &mut chain.pieces);
        translated.map_err(|error| QueueError::Address { head, error })?;
        if chain.pieces.len() > MAX_CHAIN_PIECES {
            return Err(QueueError::TooLong { head });
        }
        if descriptor.flags & DESC_F_WRITE != 0 {
            chain.writable_bytes += len;
        } else if chain.writable_bytes > 0 {
            return Err(QueueError::Direction { head });
        } else {
            chain.readable_bytes += len;
            chain.readable_pieces = chain.pieces.len();
        }
        Ok(())
    }

    /// Writes a used element; the driver sees it after `publish`.
    pub fn push(&mut self, head: u16, written_bytes: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let element = u64::from(head) | u64::from(written_bytes) << 32;
        let at = self.parts.used.wrapping_add(4 + 8 * slot);
        // The element is 4-byte aligned; two halves, in any order, before the index.
        for (offset, half) in [(0, element as u32), (4, (element >> 32) as u32)] {
            // SAFETY: slot < size, and the used ring of that size was checked to be in memory.
            unsafe { at.add(offset).cast::<u32>().write_volatile(half.to_le()) }
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows all pushed elements to the driver.
    pub fn publish(&self) {
        self.used_u16(2)
            .store(self.next_used.to_le(), Ordering::Release);
    }

    /// Whether the driver wants to be told of what was published since it was last told
    /// (virtio 1.3, 2.7.7). `all_done`: nothing popped is unfinished.
    pub fn needs_notify(&mut self, all_done: bool) -> bool {
        // The driver stores its wish and then looks at the used index; we the other way round.
        fence(Ordering::SeqCst);
        let old = self.signalled_used;
        let new = self.next_used;
        if all_done
            && self.config.features & F_NOTIFY_ON_EMPTY != 0
            && matches!(self.available(), Ok(0))
        {
            self.signalled_used = Some(new);
            return old != Some(new);
        }
        if !self.event_idx {
            let flags = u16::from_le(self.available_u16(0).load(Ordering::Relaxed));
            return flags & AVAIL_F_NO_INTERRUPT == 0;
        }
        self.signalled_used = Some(new);
        let event = self
            .available_u16(4 + 2 * usize::from(self.size))
            .load(Ordering::Relaxed);
        match old {
            None => true,
            Some(old) => {
                let event = u16::from_le(event);
                new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
            }
        }
    }

    /// Asks for notifications of new chains, and looks once more. True: there are chains already,
    /// for which no notification may come.
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        if self.event_idx {
            let event = self.used_u16(4 + 8 * usize::from(self.size));
            event.store(self.next_available.to_le(), Ordering::Relaxed);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
        }
        // The driver stores its index and then looks at our wish; we the other way round.
        fence(Ordering::SeqCst);
        Ok(self.available()? != 0)
    }

    /// Tells the driver that the ring is polled. With EVENT_IDX the event index simply stays
    /// behind: the driver notifies at most once more.
    pub fn disable_notifications(&self) {
        if !self.event_idx {
            self.used_u16(0)
                .store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    fn descriptor(&self, index: u16) -> Descriptor {
        debug_assert!(index < self.size);
        let at = self
            .parts
            .descriptors
            .wrapping_add(DESCRIPTOR_BYTES * usize::from(index));
        // SAFETY: index < size, the table was checked to be in memory and aligned to 16; atomics
        // because the guest may write at the same time.
        let (low, high) = unsafe {
            let words = at.cast::<u64>().cast_mut();
            (
                AtomicU64::from_ptr(words),
                AtomicU64::from_ptr(words.add(1)),
            )
        };
        let (low, high) = (low.load(Ordering::Relaxed), high.load(Ordering::Relaxed));
        Descriptor::parse(u64::from_le(low), u64::from_le(high))
    }

    /// A 16-bit field of the available ring. `offset` is at most that of its last field.
    fn available_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset <= 4 + 2 * usize::from(self.size));
        // SAFETY: inside the ring by construction of the offset, aligned to 2, mapped while
        // `self.memory` is; shared with the guest, hence atomic.
        unsafe { AtomicU16::from_ptr(self.parts.available.add(offset).cast()) }
    }

    /// A 16-bit field of the used ring.
    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset <= 4 + 8 * usize::from(self.size));
        // SAFETY: as in `available_u16`; the used ring is aligned to 4.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(offset).cast()) }
    }
}

impl Parts {
    /// Finds and checks the three parts (virtio 1.3, 2.7: sizes and alignments).
    fn locate(memory: &GuestMemory, config: &QueueConfig, size: u16) -> Result<Self, QueueError> {
        let size = u64::from(size);
        let event = if config.features & F_EVENT_IDX != 0 {
            2
        } else {
            0
        };
        let find = |part, address, len, align| {
            let range = memory
                .user_range(address, len)
                .map_err(|error| QueueError::OutsideMemory { part, error })?;
            // The host's alignment is what our accesses need; the guest's address has the same
            // one unless the front-end mapped memory askew.
            if !(range.ptr() as usize).is_multiple_of(align) {
                return Err(QueueError::Misaligned {
                    part,
                    address,
                    align,
                });
            }
            Ok(range.ptr())
        };
        Ok(Self {
            descriptors: find(
                "the descriptor table",
                config.descriptor_address,
                16 * size,
                16,
            )?,
            available: find(
                "the available ring",
                config.available_address,
                4 + 2 * size + event,
                2,
            )?,
            used: find(
                "the used ring",
                config.used_address,
                4 + 8 * size + event,
                4,
            )?,
        })
    }
}
