//! Memory that operations read into and write from.
//!
//! Unsafe is confined to two places: the pointers of [`IoBuf`], whose owner promises to keep the
//! memory mapped, and the aligned allocation of [`AlignedBuf`].

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::types::BLOCK_BYTES;

/// A range of memory lent to an operation until its completion has been taken.
///
/// The memory may be a guest's: it can change under our hands at any time, so it is never seen
/// as a Rust reference, only copied through the pointer.
///
/// Laid out as `struct iovec`, so that a list of them is handed to the kernel as it is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct IoBuf {
    ptr: *mut u8,
    len: usize,
}

const _: () = {
    assert!(size_of::<IoBuf>() == size_of::<libc::iovec>());
    assert!(std::mem::offset_of!(IoBuf, ptr) == std::mem::offset_of!(libc::iovec, iov_base));
    assert!(std::mem::offset_of!(IoBuf, len) == std::mem::offset_of!(libc::iovec, iov_len));
};

// SAFETY: an IoBuf is a number and a length; whoever dereferences it relies on the promise given
// to `IoBuf::new`, which holds on every thread.
unsafe impl Send for IoBuf {}

impl IoBuf {
    /// # Safety
    /// `ptr..ptr + len` stays mapped and writable (readable, for a write operation) until the
    /// operation that carries it has completed and nobody copies through it any more. Rust
    /// references to the range may not exist while an operation writes to it.
    #[must_use]
    pub const unsafe fn new(ptr: *mut u8, len: usize) -> Self {
        Self { ptr, len }
    }

    #[must_use]
    pub const fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The part from `start`, `len` bytes long.
    ///
    /// # Panics
    /// If the part is not inside the range.
    #[must_use]
    pub fn slice(&self, start: usize, len: usize) -> Self {
        assert!(
            start.checked_add(len).is_some_and(|end| end <= self.len),
            "slice outside buffer"
        );
        // SAFETY: inside the range, by the assertion; the promise of the whole covers the part.
        unsafe { Self::new(self.ptr.add(start), len) }
    }

    /// Copies `from` into the start of the range.
    ///
    /// # Panics
    /// If `from` is longer than the range.
    pub fn copy_from(&self, from: &[u8]) {
        assert!(from.len() <= self.len, "copy larger than buffer");
        // SAFETY: the range is mapped by the promise of `new`; guest memory is never a Rust
        // object, so it cannot overlap `from`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.ptr, from.len()) }
    }

    /// Copies the start of the range into `to`.
    ///
    /// # Panics
    /// If `to` is longer than the range.
    pub fn copy_to(&self, to: &mut [u8]) {
        assert!(to.len() <= self.len, "copy larger than buffer");
        // SAFETY: as in `copy_from`.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr, to.as_mut_ptr(), to.len()) }
    }

    /// Fills the range with zeroes.
    pub fn zero(&self) {
        // SAFETY: as in `copy_from`.
        unsafe { std::ptr::write_bytes(self.ptr, 0, self.len) }
    }
}

/// Zeroed memory aligned to the block size, as direct I/O wants it.
#[derive(Debug)]
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory and hands it out under the usual borrow rules.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above; `&AlignedBuf` gives only `&[u8]` and a raw pointer.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes, aligned to 4 KiB.
    ///
    /// # Panics
    /// If `len` is 0 or exceeds the address space.
    #[must_use]
    pub fn new(len: usize) -> Self {
        assert!(len > 0, "an aligned buffer is never empty");
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero, by the assertion.
        let raw = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(raw).unwrap_or_else(|| handle_alloc_error(layout));
        Self { ptr, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, BLOCK_BYTES).expect("buffer fits the address space")
    }

    /// The buffer as an operation's memory.
    ///
    /// # Safety
    /// The buffer outlives the operation, and is not touched while the operation writes to it.
    #[must_use]
    pub const unsafe fn io_buf(&self) -> IoBuf {
        // SAFETY: handed on to the caller.
        unsafe { IoBuf::new(self.ptr.as_ptr(), self.len) }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `len` initialised bytes that this buffer owns.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
    }
}
