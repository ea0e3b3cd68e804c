//! The one place where Rust errors become exceptions of `vhostd.errors`.

use std::io;

use pyo3::prelude::*;
use pyo3::types::PyType;
use vhostd_engine::device::{DeviceError, DeviceErrorKind};
use vhostd_engine::log::RecoveryError;
use vhostd_engine::ring::MemoryError;
use vhostd_engine::volume::{RequestFailed, VolumeError};
use vhostd_engine::worker::CommandError;

/// A row of the table in `vhostd/errors.py`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Usage,
    NotFound,
    Exists,
    Busy,
    NoSpace,
    Damaged,
    Device,
    Unsupported,
    Unavailable,
    Internal,
}

impl Kind {
    const fn class(self) -> &'static str {
        match self {
            Self::Usage => "UsageError",
            Self::NotFound => "NotFoundError",
            Self::Exists => "ExistsError",
            Self::Busy => "BusyError",
            Self::NoSpace => "NoSpaceError",
            Self::Damaged => "DamagedError",
            Self::Device => "DeviceError",
            Self::Unsupported => "UnsupportedError",
            Self::Unavailable => "UnavailableError",
            Self::Internal => "InternalError",
        }
    }
}

/// An error on its way to Python.
#[derive(Debug)]
pub struct Failure {
    kind: Kind,
    message: String,
}

impl Failure {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// The same error, told of `object`.
    pub fn of(self, object: &str) -> Self {
        Self {
            message: format!("{object}: {}", self.message),
            ..self
        }
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        Python::attach(|py| {
            let class = py
                .import("vhostd.errors")
                .and_then(|module| module.getattr(failure.kind.class()))
                .and_then(|class| Ok(class.cast_into::<PyType>()?));
            match class {
                Ok(class) => Self::from_type(class, failure.message),
                Err(error) => error,
            }
        })
    }
}

pub fn io_kind(error: &io::Error) -> Kind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::NoSpace,
        io::ErrorKind::NotFound => Kind::NotFound,
        io::ErrorKind::AlreadyExists => Kind::Exists,
        io::ErrorKind::Unsupported => Kind::Unsupported,
        io::ErrorKind::InvalidInput => Kind::Usage,
        _ => Kind::Device,
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        let kind = match error.kind() {
            DeviceErrorKind::Usage => Kind::Usage,
            DeviceErrorKind::NotFound => Kind::NotFound,
            DeviceErrorKind::Exists => Kind::Exists,
            DeviceErrorKind::Busy => Kind::Busy,
            DeviceErrorKind::NoSpace => Kind::NoSpace,
            DeviceErrorKind::Damaged => Kind::Damaged,
            DeviceErrorKind::Device => Kind::Device,
            DeviceErrorKind::Unsupported => Kind::Unsupported,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        let kind = match &error {
            MemoryError::Map { error, .. } => io_kind(error),
            MemoryError::NoSuchRegion { .. } => Kind::NotFound,
            _ => Kind::Usage,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Self {
        let kind = match error {
            CommandError::Memory(error) => return error.into(),
            CommandError::Gone { .. } => Kind::Unavailable,
            CommandError::NoVolume | CommandError::NoExport => Kind::NotFound,
            CommandError::Busy { .. } => Kind::Busy,
            CommandError::NoQueue { .. }
            | CommandError::Range { .. }
            | CommandError::Ring { .. }
            | CommandError::Moved(_)
            | CommandError::Fd { .. } => Kind::Usage,
            CommandError::Failed(failed) => return failed.into_failure(),
        };
        Self::new(kind, error.to_string())
    }
}

trait IntoFailure {
    fn into_failure(self) -> Failure;
}

impl IntoFailure for RequestFailed {
    fn into_failure(self) -> Failure {
        let (kind, message) = match self {
            Self::NoSpace => (
                Kind::NoSpace,
                "the device or the staging memory is full; free space or add some",
            ),
            Self::Damaged => (
                Kind::Damaged,
                "data cannot be read as it was written; see the log for the place, and restore it",
            ),
            Self::NotWritable => (
                Kind::Device,
                "it is read-only or its log has failed; see the log, then open it again",
            ),
            Self::SnapshotsPending => (
                Kind::Busy,
                "too many snapshots wait for a checkpoint; make one first",
            ),
            Self::NoteTooLarge => (
                Kind::NoSpace,
                "what is known of the volume does not fit its log any more; remove snapshots",
            ),
            Self::NotDurable => (
                Kind::Device,
                "what was written may not be durable: a write or sync of the device failed; see the log",
            ),
        };
        Failure::new(kind, message)
    }
}

impl From<VolumeError> for Failure {
    fn from(error: VolumeError) -> Self {
        let kind = match &error {
            VolumeError::Recovery(
                RecoveryError::Io { error, .. } | RecoveryError::Staging { error, .. },
            )
            | VolumeError::Staging { error, .. }
            | VolumeError::Io { error, .. } => io_kind(error),
            VolumeError::Recovery(RecoveryError::NeedsWriting) => Kind::Unsupported,
            VolumeError::Recovery(RecoveryError::Apply(_)) | VolumeError::Map(_) => Kind::Damaged,
            VolumeError::LogFailed(_) => Kind::Device,
            VolumeError::CheckpointRunning => Kind::Busy,
            VolumeError::NoNumbers => Kind::Unavailable,
            VolumeError::NoteTooLarge { .. } => Kind::NoSpace,
        };
        Self::new(kind, error.to_string())
    }
}

/// For `map_err`: the operating system refused `what`.
pub fn os(what: impl Into<String>) -> impl FnOnce(io::Error) -> Failure {
    let what = what.into();
    move |error| Failure::new(io_kind(&error), format!("cannot {what}: {error}"))
}
