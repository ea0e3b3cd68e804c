//! File descriptors that Python lends us as numbers.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use crate::errors::Failure;

/// A duplicate of a descriptor of Python's; a number that is none is an error.
pub fn duplicate(fd: i32) -> Result<OwnedFd, Failure> {
    // SAFETY: fcntl checks the number; what it returns is new and ours alone.
    unsafe {
        let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
        if copy < 0 {
            let error = io::Error::last_os_error();
            return Err(Failure::usage(format!(
                "file descriptor {fd} cannot be duplicated: {error}"
            )));
        }
        Ok(OwnedFd::from_raw_fd(copy))
    }
}

/// The same for one that may be absent.
pub fn duplicate_some(fd: Option<i32>) -> Result<Option<OwnedFd>, Failure> {
    fd.map(duplicate).transpose()
}
