//! What a volume tells those who decide: events, errors, counters.

use std::io;

use super::space::SpaceTotals;
use crate::types::SegmentNumber;

/// What policy should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeEvent {
    CheckpointWanted,
    NumbersWanted,
    DeviceFailed {
        reason: String,
    },
    DeviceFull,
    StagingFull {
        reason: String,
    },
    SpaceBack,
    /// The volume takes as much as it may; writes find no space.
    VolumeFull {
        limit_bytes: u64,
    },
    /// It takes less than it may, again.
    VolumeSpaceBack,
    /// Dead blocks could not be given back.
    ReclaimFailed {
        reason: String,
    },
    Corruption {
        offset_bytes: u64,
        len_bytes: u64,
        segment: SegmentNumber,
        reason: String,
    },
}

/// Why a volume cannot be opened, checkpointed or closed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error(transparent)]
    Recovery(#[from] crate::log::RecoveryError),
    #[error("creating the staging file {path}: {error}")]
    Staging { path: String, error: io::Error },
    #[error("{what} segment {segment}: {error}")]
    Io {
        what: &'static str,
        segment: SegmentNumber,
        error: io::Error,
    },
    #[error("the map is damaged: {0}")]
    Map(String),
    #[error("the log has failed: {0}")]
    LogFailed(String),
    #[error("a checkpoint is already running")]
    CheckpointRunning,
    #[error("there are no segment numbers left; the daemon grants them")]
    NoNumbers,
    #[error("a note of {bytes} bytes is too large; the log takes {most}. Remove snapshots")]
    NoteTooLarge { bytes: usize, most: usize },
}

/// Counters, from the opening on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeStats {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub unmaps: u64,
    pub unmapped_bytes: u64,
    pub errors: u64,
    pub checksum_errors: u64,
    pub map_node_reads: u64,
    /// Blocks of zeroes that were written and took no space.
    pub zero_bytes: u64,
    /// Written to log segments, record headers included.
    pub log_bytes: u64,
    /// Written to map segments.
    pub node_bytes: u64,
    /// Given back of dead blocks.
    pub punched_bytes: u64,
    /// Requests that wait for space.
    pub waiting_for_space: u64,
    pub mapped_blocks: u64,
    pub map_memory_bytes: u64,
    pub log_bytes_since_checkpoint: u64,
    pub staged_bytes: u64,
    /// Snapshots that no checkpoint has written yet.
    pub pending_snapshots: u64,
    pub space: SpaceTotals,
}
