//! Devices: places for segments. So far one kind, a directory of a file system.
//!
//! A device knows names, files and the lock that keeps a second daemon out; what is inside a
//! segment is the business of [`crate::segment`], and the I/O path goes through [`crate::io`].

mod directory;
mod error;
mod files;
mod numbers;
mod superblock;

pub use directory::DirectoryDevice;
pub use error::{DeviceError, DeviceErrorKind};
pub(crate) use files::{Access, SegmentFile};
pub use numbers::SegmentNumbers;
pub use superblock::Superblock;
