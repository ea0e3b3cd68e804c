//! Eventfds: our own for waking threads, and those a front-end hands us (kick, call, error).
//!
//! A front-end's file descriptor is checked to be an eventfd and made non-blocking: nothing it does
//! to the counter may stop a worker. `unsafe` is the system call that makes one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

#[derive(Debug)]
pub struct EventFd {
    file: File,
}

impl EventFd {
    pub fn new() -> io::Result<Self> {
        // SAFETY: a plain system call; the descriptor is checked and owned from here on.
        let file = unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(fd)
        };
        Ok(Self { file })
    }

    /// Takes a front-end's descriptor.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if kind.as_os_str() != "anon_inode:[eventfd]" {
            let text = format!("{} is not an eventfd", kind.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        // SAFETY: fcntl on a descriptor we own changes its flags only.
        let done = unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            flags >= 0 && libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
        };
        if !done {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { file: fd.into() })
    }

    /// Makes it readable. A full counter is readable already.
    pub fn signal(&self) {
        let _ = (&self.file).write(&1u64.to_ne_bytes());
    }

    /// Clears it; false if it was clear.
    pub fn clear(&self) -> bool {
        matches!((&self.file).read(&mut [0; 8]), Ok(8))
    }

    #[must_use]
    pub fn raw(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
