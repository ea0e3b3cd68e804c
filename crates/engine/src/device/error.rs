//! What can be wrong with a device, in words for the person who has to put it right.

use std::io;
use std::path::{Path, PathBuf};

use crate::segment::FormatError;
use crate::types::SegmentNumber;

/// Which row of the table in `vhostd/errors.py` an error belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceErrorKind {
    Usage,
    NotFound,
    Exists,
    Busy,
    NoSpace,
    Damaged,
    Device,
    Unsupported,
}

/// An error of opening, formatting or examining a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("{0} is not a directory; create it, or give the path of one that exists")]
    NotADirectory(PathBuf),
    #[error(
        "{path} is not empty (it holds '{found}'); a device is made only from an empty directory"
    )]
    NotEmpty { path: PathBuf, found: String },
    #[error("{0} is no vhostd device: it has no superblock; check the path, or format it first")]
    NotADevice(PathBuf),
    #[error(
        "device {path} is in use by {}; stop it, or use the daemon that has it open",
        holder_name(.holder)
    )]
    Locked { path: PathBuf, holder: Option<u32> },
    #[error("{path}: {fault}; restore it from another device of the pool or from a backup")]
    Damaged { path: PathBuf, fault: FormatError },
    #[error("{path}: {fault}; use the vhostd that wrote it, or a newer one")]
    NewerVersion { path: PathBuf, fault: FormatError },
    #[error(
        "{path}: {fault}; export its volumes with the vhostd that wrote it, and import them into a new pool"
    )]
    OlderVersion { path: PathBuf, fault: FormatError },
    #[error("device {path} has no segment {number}")]
    NoSegment {
        path: PathBuf,
        number: SegmentNumber,
    },
    #[error("{0}")]
    Usage(String),
    #[error("cannot {action} {path}: {source}{}", advice(.source))]
    Os {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl DeviceError {
    #[must_use]
    pub fn kind(&self) -> DeviceErrorKind {
        match self {
            Self::NotADirectory(_) | Self::NotADevice(_) | Self::NoSegment { .. } => {
                DeviceErrorKind::NotFound
            }
            Self::NotEmpty { .. } => DeviceErrorKind::Exists,
            Self::Locked { .. } => DeviceErrorKind::Busy,
            Self::Damaged { .. } => DeviceErrorKind::Damaged,
            Self::NewerVersion { .. } | Self::OlderVersion { .. } => DeviceErrorKind::Unsupported,
            Self::Usage(_) => DeviceErrorKind::Usage,
            Self::Os { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    DeviceErrorKind::NoSpace
                }
                _ => DeviceErrorKind::Device,
            },
        }
    }

    pub(super) fn format(path: &Path, fault: FormatError) -> Self {
        let path = path.to_owned();
        match fault {
            FormatError::Version(_, found, known) if found < known => {
                Self::OlderVersion { path, fault }
            }
            FormatError::Version(..) => Self::NewerVersion { path, fault },
            _ => Self::Damaged { path, fault },
        }
    }

    /// For `map_err`: the operating system refused to do `action` to `path`.
    pub(super) fn os<E: Into<io::Error>>(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Os {
            action,
            path: path.to_owned(),
            source: source.into(),
        }
    }
}

fn holder_name(holder: &Option<u32>) -> String {
    match holder {
        Some(pid) => format!("the process with PID {pid}"),
        None => "another process".to_owned(),
    }
}

fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free space on the file system"
        }
        io::ErrorKind::ReadOnlyFilesystem => "; mount the file system writable",
        io::ErrorKind::PermissionDenied => "; give the daemon's user access to it",
        _ => "",
    }
}
