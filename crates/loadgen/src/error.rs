//! Why a load could not be run, or had to end early.

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}; see --help")]
    Usage(String),
    #[error("cannot connect to {path}: {source}; is the back-end listening there?")]
    Connect { path: PathBuf, source: io::Error },
    #[error("{what} failed: {source}; see the back-end's log")]
    Message { what: String, source: io::Error },
    #[error("the back-end broke vhost-user: {0}")]
    Protocol(String),
    #[error(
        "the back-end does not offer feature bits {missing:#x} (it offers {offered:#x}); \
         choose options that do without them"
    )]
    FeaturesMissing { missing: u64, offered: u64 },
    #[error("the back-end offers no CONFIG (protocol features {offered:#x}): no disk to load")]
    ConfigMissing { offered: u64 },
    #[error("{wanted} queues wanted, the back-end offers {offered}; lower --queues")]
    Queues { wanted: u16, offered: u64 },
    #[error("the disk is read-only; choose a reading workload")]
    ReadOnly,
    #[error("the back-end hung up with {in_flight} requests in flight; see its log")]
    HungUp { in_flight: u32 },
    #[error("no completion for {seconds} s with {in_flight} requests in flight: the disk hangs")]
    Stuck { seconds: u64, in_flight: u32 },
    #[error("the back-end broke queue {queue}: {reason}")]
    Ring { queue: u16, reason: String },
    #[error("stamps file {path}: {reason}")]
    Stamps { path: PathBuf, reason: String },
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}
