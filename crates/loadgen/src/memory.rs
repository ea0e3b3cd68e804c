//! Guest memory: one memfd, mapped here and handed to the back-end.
//!
//! Invariants: every access is bounds-checked; no Rust reference to plain bytes of the mapping ever
//! exists, because the back-end may change them at any moment (reads and writes are volatile, or
//! atomic, or a copy into private memory). Used by one thread. The module holds `unsafe`.

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU16;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Where guest-physical memory begins. Not 0 and not our own addresses, so that a back-end that
/// mistakes one kind of address for another is found out at once.
pub const GUEST_BASE: u64 = 1 << 32;
pub const PAGE_BYTES: usize = 4096;

pub struct GuestMemory {
    fd: OwnedFd,
    base: NonNull<u8>,
    len_bytes: usize,
}

impl GuestMemory {
    /// Every page is populated, so that the measured time has no first faults in it.
    pub fn new(len_bytes: usize) -> std::io::Result<Self> {
        let len_bytes = len_bytes.next_multiple_of(PAGE_BYTES);
        let fd = memfd_create("vhostd-loadgen", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len_bytes as u64)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a file we own and never
        // shrink; it aliases no Rust object.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                &fd,
                0,
            )?
        };
        let base = NonNull::new(base.cast())
            .ok_or_else(|| std::io::Error::other("guest memory was mapped at address 0"))?;
        Ok(Self {
            fd,
            base,
            len_bytes,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn len_bytes(&self) -> u64 {
        self.len_bytes as u64
    }

    /// Address of the mapping in this process: vhost-user's "user address".
    pub fn user_base(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    fn at(&self, offset: usize, len_bytes: usize, align: usize) -> *mut u8 {
        let end = offset.checked_add(len_bytes);
        assert!(
            end.is_some_and(|end| end <= self.len_bytes),
            "offset {offset} outside memory"
        );
        assert!(
            offset.is_multiple_of(align),
            "offset {offset} is not a multiple of {align}"
        );
        // SAFETY: offset is inside the mapping (asserted above).
        unsafe { self.base.as_ptr().add(offset) }
    }

    pub fn read<T: FromBytes>(&self, offset: usize) -> T {
        let source = self.at(offset, size_of::<T>(), align_of::<T>()).cast::<T>();
        // SAFETY: in bounds and aligned (asserted in `at`); any bytes make a T (FromBytes).
        unsafe { ptr::read_volatile(source) }
    }

    pub fn write<T: IntoBytes + Immutable>(&self, offset: usize, value: T) {
        let target = self.at(offset, size_of::<T>(), align_of::<T>()).cast::<T>();
        // SAFETY: in bounds and aligned (asserted in `at`); no reference to these bytes exists.
        unsafe { ptr::write_volatile(target, value) }
    }

    pub fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        let target = self.at(offset, 2, 2).cast::<u16>();
        // SAFETY: in bounds and aligned; lives as long as the mapping (borrow of self); both sides
        // access a ring's indexes atomically.
        unsafe { AtomicU16::from_ptr(target) }
    }

    /// Copies private bytes in. The range must not belong to a request in flight.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let target = self.at(offset, bytes.len(), 1);
        // SAFETY: in bounds; `bytes` is private memory and cannot overlap the mapping, of which no
        // references are given out.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }

    /// Copies out to private memory. The range must not belong to a request in flight.
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        let source = self.at(offset, bytes.len(), 1);
        // SAFETY: as in `copy_in`; any bytes are valid u8.
        unsafe { ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; borrows of it end with self. A failure of munmap
        // leaves it mapped, which harms nobody.
        let _ = unsafe { munmap(self.base.as_ptr().cast::<c_void>(), self.len_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_nothing_beside_it() {
        let memory = GuestMemory::new(100).unwrap();
        assert_eq!(memory.len_bytes(), 4096);
        memory.write(8, 0x0102_0304_0506_0708_u64);
        let mut bytes = [0xaa; 10];
        memory.copy_out(7, &mut bytes);
        assert_eq!(bytes, [0, 8, 7, 6, 5, 4, 3, 2, 1, 0]);
        assert_eq!(memory.read::<u64>(8), 0x0102_0304_0506_0708);
    }

    #[test]
    #[should_panic(expected = "outside memory")]
    fn access_across_the_end_is_refused() {
        GuestMemory::new(4096).unwrap().read::<u64>(4092);
    }
}
