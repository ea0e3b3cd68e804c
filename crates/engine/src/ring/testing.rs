//! A guest for tests: memory in memfds, and the driver side of a split ring written with plain
//! copies, sharing no code with the device side.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use super::*;

/// Added to a guest address, it gives the user address in [`guest_memory`].
pub const USER_BASE: u64 = 0x7f00_0000_0000;
pub const MIB: u64 = 1 << 20;
/// Where a test's data may lie; crosses from one region to the next at 2 MiB.
pub const DATA_ADDRESS: u64 = MIB;

pub fn memfd(size_bytes: u64) -> File {
    let name = CString::new("vhostd-test").unwrap();
    // SAFETY: a valid name; the result is checked and owned from here on.
    let file = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size_bytes).unwrap();
    file
}

pub fn region(guest_address: u64, size_bytes: u64, file: &File) -> RegionSpec {
    RegionSpec {
        guest_address,
        size_bytes,
        user_address: USER_BASE + guest_address,
        mmap_offset_bytes: 0,
        file: OwnedFd::from(file.try_clone().unwrap()),
    }
}

/// 0–2 MiB and 2–3 MiB in files of their own, and 8–9 MiB after a gap.
pub fn guest_memory() -> Arc<GuestMemory> {
    let specs = [(0, 2 * MIB), (2 * MIB, MIB), (8 * MIB, MIB)];
    let specs = specs
        .iter()
        .map(|&(at, size)| region(at, size, &memfd(size)))
        .collect();
    Arc::new(GuestMemory::new(specs).unwrap())
}

pub fn write_guest(memory: &GuestMemory, address: u64, bytes: &[u8]) {
    let mut pieces = Vec::new();
    memory
        .translate(address, bytes.len() as u64, &mut pieces)
        .unwrap();
    let mut done = 0;
    for piece in pieces {
        piece.copy_from(&bytes[done..done + piece.len()]);
        done += piece.len();
    }
}

pub fn read_guest(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(address, &mut bytes).unwrap();
    bytes
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

impl Desc {
    pub fn bytes(self) -> [u8; 16] {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&self.address.to_le_bytes());
        raw[8..12].copy_from_slice(&self.len.to_le_bytes());
        raw[12..14].copy_from_slice(&self.flags.to_le_bytes());
        raw[14..].copy_from_slice(&self.next.to_le_bytes());
        raw
    }
}

/// The driver side: rings at the start of memory.
pub struct Driver {
    pub memory: Arc<GuestMemory>,
    pub size: u32,
    pub features: u64,
    available: u16,
}

const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x8_0000;
const USED: u64 = 0xa_0000;

impl Driver {
    pub fn new(size: u32, features: u64) -> Self {
        Self {
            memory: guest_memory(),
            size,
            features,
            available: 0,
        }
    }

    pub fn config(&self) -> QueueConfig {
        QueueConfig {
            size: self.size,
            descriptor_address: USER_BASE + DESCRIPTORS,
            available_address: USER_BASE + AVAILABLE,
            used_address: USER_BASE + USED,
            features: self.features,
        }
    }

    pub fn queue(&self) -> SplitQueue {
        SplitQueue::new(self.memory.clone(), self.config(), self.available).unwrap()
    }

    pub fn start_at(&mut self, index: u16) {
        self.available = index;
        self.store_available_index(index);
        write_guest(&self.memory, USED + 2, &index.to_le_bytes());
    }

    pub fn describe(&self, index: u16, desc: Desc) {
        write_guest(
            &self.memory,
            DESCRIPTORS + 16 * u64::from(index),
            &desc.bytes(),
        );
    }

    /// Links `descs` from `first` on, in the ring's table.
    pub fn describe_chain(&self, first: u16, descs: &[Desc]) {
        for (i, desc) in descs.iter().enumerate() {
            let index = first + i as u16;
            let more = i + 1 < descs.len();
            let flags = desc.flags | if more { NEXT } else { 0 };
            self.describe(
                index,
                Desc {
                    flags,
                    next: if more { index + 1 } else { 0 },
                    ..*desc
                },
            );
        }
    }

    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available) % u64::from(self.size);
        write_guest(&self.memory, AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.store_available_index(self.available);
    }

    pub fn store_available_index(&self, index: u16) {
        write_guest(&self.memory, AVAILABLE + 2, &index.to_le_bytes());
    }

    pub fn store_available_flags(&self, flags: u16) {
        write_guest(&self.memory, AVAILABLE, &flags.to_le_bytes());
    }

    pub fn store_used_event(&self, index: u16) {
        write_guest(
            &self.memory,
            AVAILABLE + 4 + 2 * u64::from(self.size),
            &index.to_le_bytes(),
        );
    }

    pub fn available_event(&self) -> u16 {
        self.u16_at(USED + 4 + 8 * u64::from(self.size))
    }

    pub fn used_flags(&self) -> u16 {
        self.u16_at(USED)
    }

    pub fn used_index(&self) -> u16 {
        self.u16_at(USED + 2)
    }

    pub fn used_element(&self, index: u16) -> (u32, u32) {
        let slot = u64::from(index) % u64::from(self.size);
        let raw = read_guest(&self.memory, USED + 4 + 8 * slot, 8);
        (
            u32::from_le_bytes(raw[..4].try_into().unwrap()),
            u32::from_le_bytes(raw[4..].try_into().unwrap()),
        )
    }

    fn u16_at(&self, address: u64) -> u16 {
        u16::from_le_bytes(read_guest(&self.memory, address, 2).try_into().unwrap())
    }
}

/// Truncates the file behind a mapping, as a hostile front-end would.
pub fn truncate(file: &File) {
    // SAFETY: a plain system call on an open file.
    assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), 0) }, 0);
}

/// splitmix64: enough for tests, and the same on every machine.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
