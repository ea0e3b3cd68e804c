//! Opening a volume: recovery of its log over its last checkpoint.
//!
//! Runs on the caller's thread with an `Io` of its own, and may wait; the volume is then moved to its
//! worker. What is applied here is what the log holds after the checkpoint, in its order, so the map
//! and the counts come out as they were when the last record was appended.

use std::path::PathBuf;
use std::sync::Arc;

use super::checkpoint::{CheckpointState, Checkpoints};
use super::full::Full;
use super::note::{self, FoundSnapshot, History, NewSnapshot, Parent};
use super::reclaim::Reclaim;
use super::space::{SegmentRow, SpaceTable};
use super::{MapBudget, MapShare, Volume, VolumeError, VolumeStats};
use crate::device::SegmentNumbers;
use crate::io::{BlockingIo, DeviceId, Io, Op, Tokens};
use crate::log::{
    Log, LogConfig, LogPosition, Recovery, RecoveryInput, VolumeAttributes, read_note, recover,
};
use crate::map::{Displaced, Extents, Map, NeedNode, NodeLocation};
use crate::segment::{EntryKind, Note, RecordSummary, SegmentHeader, SegmentKind};
use crate::types::{Address, BLOCK_BYTES, BlockNumber, Epoch, SegmentNumber, Uuid};

/// Everything that opening a volume needs.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    pub device: DeviceId,
    pub pool: Uuid,
    pub volume: Uuid,
    pub name: String,
    pub size_bytes: u64,
    pub logical_block_bytes: u32,
    pub segment_bytes: u64,
    /// Of the opening before this one; 0 for the first.
    pub previous_epoch: Epoch,
    /// Of this opening, already in the catalog.
    pub epoch: Epoch,
    pub read_only: bool,
    pub checkpoint: CheckpointState,
    pub mapped_blocks: u64,
    pub segments: Vec<SegmentRow>,
    /// Segments of this volume that are on the device and in no row.
    pub uncatalogued: Vec<SegmentNumber>,
    pub numbers: Arc<SegmentNumbers>,
    pub staging_path: PathBuf,
    pub staging_bytes: u64,
    pub map_budget: Arc<MapBudget>,
    pub checkpoint_log_bytes: u64,
    /// The head's at the checkpoint.
    pub parent: Option<Parent>,
    /// Position of the newest snapshot, whichever line it is of; address 0: none.
    pub newest_snapshot: Address,
    /// Payload of the newest state note, for when it has to be repeated.
    pub state_note: Vec<u8>,
    /// The volume's first blocks are another one's.
    pub clone: bool,
    /// See [`Volume::set_limit`].
    pub limit_bytes: Option<u64>,
    /// See [`Volume::set_pause_when_full`].
    pub pause_when_full: bool,
}

/// Recovers and opens a volume. Snapshots that recovery met behind the checkpoint are returned too,
/// oldest first: they are pending again.
///
/// # Errors
/// [`VolumeError`]; nothing is lost, and opening may be tried again.
pub fn open(
    spec: VolumeSpec,
    io: &mut dyn Io,
) -> Result<(Volume, Recovery, Vec<FoundSnapshot>), VolumeError> {
    let config = LogConfig {
        device: spec.device,
        pool: spec.pool,
        volume: spec.volume,
        epoch: spec.epoch,
        segment_bytes: spec.segment_bytes,
        logical_block_bytes: spec.logical_block_bytes,
        staging_path: spec.staging_path.clone(),
        staging_bytes: spec.staging_bytes,
    };
    let mut io = BlockingIo::new(io, spec.device);
    let mut replay = Replay {
        map: Map::open(
            spec.checkpoint.root,
            spec.mapped_blocks,
            spec.parent.and_then(|parent| parent.root),
        ),
        history: History::new(
            spec.parent,
            spec.newest_snapshot,
            spec.state_note.clone(),
            spec.clone,
        ),
        found: Vec::new(),
        warnings: Vec::new(),
        space: SpaceTable::new(&spec.segments),
        displaced: Vec::new(),
        budget: Arc::clone(&spec.map_budget),
    };
    let mut warnings = Vec::new();
    let candidates = log_segments(&spec, &mut io, &mut replay.space, &mut warnings)?;
    let input = RecoveryInput {
        config: &config,
        previous_epoch: spec.previous_epoch,
        checkpoint: spec.checkpoint.position,
        segments: candidates,
        read_only: spec.read_only,
        rebuild: false,
    };
    let mut recovery = recover(&mut io, &input, &mut |io, segment, record| {
        replay
            .apply(io, segment, record)
            .map_err(|error| error.to_string())
    })?;
    recovery.warnings.append(&mut warnings);
    recovery.warnings.append(&mut replay.warnings);
    replay.note_segments(&mut recovery);
    let log = if spec.read_only {
        None
    } else {
        Some(create_log(&spec, config, &recovery)?)
    };
    let Replay {
        map,
        space,
        displaced,
        history,
        found,
        ..
    } = replay;
    let mut volume = Volume {
        device: spec.device,
        pool: spec.pool,
        uuid: spec.volume,
        epoch: spec.epoch,
        segment_bytes: spec.segment_bytes,
        logical_block_bytes: spec.logical_block_bytes,
        name: spec.name,
        size_bytes: spec.size_bytes,
        numbers: spec.numbers,
        map_share: MapShare::new(spec.map_budget),
        map,
        log,
        end: recovery.end,
        space,
        tokens: Tokens::new(0),
        running: Vec::new(),
        free_slots: Vec::new(),
        runnable: std::collections::VecDeque::new(),
        waiting_nodes: std::collections::HashMap::new(),
        waiting_append: std::collections::VecDeque::new(),
        waiting_notes: std::collections::VecDeque::new(),
        waiting_durable: Vec::new(),
        finished: Vec::new(),
        checkpoints: Checkpoints::new(&spec.checkpoint, spec.checkpoint_log_bytes),
        history,
        reclaim: Reclaim::new(&spec.segments),
        full: Full::default(),
        closing: false,
        turn_soon: false,
        reads_in_flight: std::collections::BTreeSet::new(),
        next_read: 0,
        stats: VolumeStats::default(),
        events: Vec::new(),
        extents: Extents::default(),
        checksums: Vec::new(),
        displaced,
        log_events: Vec::new(),
    };
    volume.set_limit(spec.limit_bytes);
    volume.set_pause_when_full(spec.pause_when_full);
    Ok((volume, recovery, found))
}

fn create_log(
    spec: &VolumeSpec,
    config: LogConfig,
    recovery: &Recovery,
) -> Result<Log, VolumeError> {
    let attributes = VolumeAttributes {
        name: spec.name.clone(),
        size_bytes: spec.size_bytes,
    };
    let path = config.staging_path.display().to_string();
    Log::create(config, attributes, Arc::clone(&spec.numbers), recovery.end)
        .map_err(|error| VolumeError::Staging { path, error })
}

/// The log segments that recovery has to look at. Segments that nothing needs are removed: map segments
/// of a checkpoint that was never committed, and log segments that a committed checkpoint had removed
/// from the catalog before their files were gone.
fn log_segments(
    spec: &VolumeSpec,
    io: &mut BlockingIo<'_>,
    space: &mut SpaceTable,
    warnings: &mut Vec<String>,
) -> Result<Vec<SegmentNumber>, VolumeError> {
    let covered = spec.checkpoint.position.segment;
    let mut candidates: Vec<SegmentNumber> = Vec::new();
    for row in &spec.segments {
        match row.kind {
            SegmentKind::Log if row.number >= covered || !row.sealed => candidates.push(row.number),
            SegmentKind::Log => {}
            // An opening never appends to an older segment.
            SegmentKind::Map if !row.sealed => space.update(row.number, |row| row.sealed = true),
            SegmentKind::Map => {}
        }
    }
    for &number in &spec.uncatalogued {
        let failed = |error| VolumeError::Io {
            what: "reading",
            segment: number,
            error,
        };
        let (start, got) = io.read(number, 0, 2 * BLOCK_BYTES).map_err(failed)?;
        let header = match SegmentHeader::parse(&start[..got.min(BLOCK_BYTES)]) {
            Ok(header) if header.volume == spec.volume && header.pool == spec.pool => header,
            // A crash came while it was made; nothing is written to a segment before that is done.
            Err(_) if got <= BLOCK_BYTES && !spec.read_only => {
                io.run(number, Op::Remove)
                    .map_err(|error| VolumeError::Io {
                        what: "removing",
                        segment: number,
                        error,
                    })?;
                continue;
            }
            Ok(_) => {
                warnings.push(format!(
                    "segment {number} belongs to another volume; left alone"
                ));
                continue;
            }
            Err(error) => {
                warnings.push(format!("segment {number}: {error}; left alone"));
                continue;
            }
        };
        if header.kind == SegmentKind::Log && number > covered {
            space.add(number, SegmentKind::Log);
            candidates.push(number);
        } else if !spec.read_only {
            io.run(number, Op::Remove)
                .map_err(|error| VolumeError::Io {
                    what: "removing",
                    segment: number,
                    error,
                })?;
        }
    }
    candidates.sort_unstable();
    Ok(candidates)
}

/// The state that the log is applied to.
struct Replay {
    map: Map,
    space: SpaceTable,
    displaced: Vec<Displaced>,
    budget: Arc<MapBudget>,
    history: History,
    found: Vec<FoundSnapshot>,
    warnings: Vec<String>,
}

impl Replay {
    fn apply(
        &mut self,
        io: &mut BlockingIo<'_>,
        segment: SegmentNumber,
        record: &RecordSummary,
    ) -> Result<(), VolumeError> {
        for placed in record.placed(segment) {
            let entry = placed.entry;
            match entry.kind {
                EntryKind::Data => {
                    self.resolve(io, |map, displaced| {
                        map.ensure_resident(entry.block, entry.count)?;
                        map.insert(entry.block, placed.position, placed.checksums, displaced)
                    })?;
                    self.space.revive(segment, u64::from(entry.count));
                }
                EntryKind::Unmap => {
                    self.unmap(io, entry.block, entry.count)?;
                    self.space.count_unmaps(segment, 1);
                }
                EntryKind::Note => self.note(io, placed.position, placed.checksums),
            }
            self.space
                .displace(&mut self.displaced, self.history.parent);
        }
        let share = self.budget.share_bytes();
        if self.map.memory_bytes() > share {
            self.map.evict(share - share / 16);
        }
        Ok(())
    }

    /// Takes a note: what it says of snapshots is done here as it was when it was appended.
    fn note(&mut self, io: &mut BlockingIo<'_>, position: Address, checksums: &[u32]) {
        let note = match read_note(io, position, checksums) {
            Ok(note) => note,
            Err(error) => {
                self.warnings.push(format!(
                    "{error}; if it was a snapshot's, that snapshot is lost"
                ));
                return;
            }
        };
        if let Note::Snapshot {
            snapshot: uuid,
            created_ns,
            size_bytes,
            name,
        } = &note
        {
            self.found.push(FoundSnapshot {
                snapshot: NewSnapshot {
                    uuid: *uuid,
                    name: name.clone(),
                    created_ns: *created_ns,
                },
                size_bytes: *size_bytes,
                position,
            });
        }
        note::take_note(
            &note,
            position,
            &mut self.history,
            &mut self.map,
            &mut self.space,
        );
    }

    fn unmap(
        &mut self,
        io: &mut BlockingIo<'_>,
        block: BlockNumber,
        count: u32,
    ) -> Result<(), VolumeError> {
        let end = block.plus(u64::from(count));
        let mut from = block;
        while let Some((next, count)) = self.resolve(io, |map, _| map.next_unmap(from, end))? {
            self.resolve(io, |map, displaced| map.remove(next, count, displaced))?;
            from = next.plus(u64::from(count));
        }
        Ok(())
    }

    /// Runs a step on the map, reading the nodes it asks for.
    fn resolve<T>(
        &mut self,
        io: &mut BlockingIo<'_>,
        mut step: impl FnMut(&mut Map, &mut Vec<Displaced>) -> Result<T, NeedNode>,
    ) -> Result<T, VolumeError> {
        loop {
            match step(&mut self.map, &mut self.displaced) {
                Ok(value) => return Ok(value),
                Err(NeedNode(location)) => supply(&mut self.map, io, location)?,
            }
        }
    }

    fn note_segments(&mut self, recovery: &mut Recovery) {
        for segment in &recovery.segments {
            self.space.update(segment.number, |row| {
                if segment.removed && row.live > 0 {
                    recovery.warnings.push(format!(
                        "segment {} is missing; {} blocks in it cannot be read",
                        segment.number, row.live
                    ));
                }
                row.sealed = segment.sealed || segment.removed;
                row.used_blocks = segment.used_blocks;
            });
        }
    }
}

fn supply(
    map: &mut Map,
    io: &mut BlockingIo<'_>,
    location: NodeLocation,
) -> Result<(), VolumeError> {
    let NodeLocation {
        segment,
        offset_bytes,
        len_bytes,
        ..
    } = location;
    let (buffer, got) = io
        .read(segment, u64::from(offset_bytes), len_bytes as usize)
        .map_err(|error| VolumeError::Io {
            what: "reading a map node in",
            segment,
            error,
        })?;
    map.supply(location, &buffer[..got.min(len_bytes as usize)])
        .map_err(|error| {
            VolumeError::Map(format!(
                "node in segment {segment} at byte {offset_bytes}: {error}"
            ))
        })
}

/// A volume's first opening starts here.
impl CheckpointState {
    /// Nothing written yet.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            root: None,
            position: LogPosition::default(),
        }
    }
}
