//! The log of a volume that is open for writing: records built in the staging ring, written to
//! segments, sealed, made durable.
//!
//! Positions (see [`staging`]) order everything:
//!
//! ```text
//!   durable ≤ written ≤ queued ≤ tail          and  tail − written ≤ ring_bytes
//!   ───────┬─────────┬────────┬───────┐
//!   synced │ on the  │ being  │ only  │ next append
//!          │ device  │ written│ staged│
//! ```
//!
//! Invariants:
//! - An entry is committed (and its request may complete) only into segment space that is reserved on
//!   the device, so that what was acknowledged never meets a full disk.
//! - `written` passes a position only when every write before it has completed; `durable` passes it
//!   only when, after that, every segment written since has been synced. A flush waits for `durable`.
//! - Nothing unwritten is ever overwritten in the ring.
//! - A segment's footer is written only after its last record is durable: a valid footer therefore
//!   speaks of durable records.
//! - After a failed write (other than for lack of space) or a failed sync nothing is retried: the log
//!   has failed, `durable` stands still, every later append and flush fails. (A kernel that reports a
//!   failed sync may have dropped the pages; asking again would be answered with a success that means
//!   nothing.)
//!
//! Owned by one volume, called from its worker only. Never blocks.

mod append;
mod notes;
mod recovery;
mod scan;
mod seal;
mod staging;
#[cfg(test)]
mod tests;
mod writeout;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub use notes::{NoteError, read_note};
pub use recovery::{
    LogPosition, RecoveredSegment, Recovery, RecoveryError, RecoveryInput, recover,
};
pub use scan::read_summaries;
pub use staging::{MIN_RING_BYTES, StagedLog, StagedPiece, Staging, StagingIdentity};

use crate::device::SegmentNumbers;
use crate::io::{Completion, DeviceId, Io, Op, Target, Tokens};
use crate::segment::{FooterBuilder, SegmentHeader, SegmentKind};
use crate::types::{Address, BLOCK_BYTES, Epoch, SegmentNumber, Sequence, Uuid};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Largest data of one guest write that is kept in one record, and so atomic.
pub const MAX_ATOMIC_BLOCKS: u32 = 257;
/// A record with this much data is closed and written out.
const RECORD_TARGET_BLOCKS: u32 = 256;
/// Space is reserved on the device this far at a time.
const RESERVE_BLOCKS: u32 = 1024;
/// With a disk nearly full, this little at a time.
const RESERVE_LEAST_BLOCKS: u32 = 16;
/// After the device said that it is full it is asked again this much later.
const FULL_RETRY_NS: u64 = 100_000_000;
/// Staged writes are written out and synced after this long without a flush.
const WRITE_BACK_NS: u64 = 1_000_000_000;
/// An idle volume gives its ring's memory back after this long.
const RELEASE_NS: u64 = 5_000_000_000;

/// A moment, as the owner of the clock sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// For time-outs; any origin, never goes back.
    pub monotonic_ns: u64,
    /// For time stamps; ns since the epoch.
    pub realtime_ns: u64,
}

/// What a log needs to know of its volume and pool.
#[derive(Clone, Debug)]
pub struct LogConfig {
    pub device: DeviceId,
    pub pool: Uuid,
    pub volume: Uuid,
    pub epoch: Epoch,
    pub segment_bytes: u64,
    pub logical_block_bytes: u32,
    pub staging_path: PathBuf,
    pub staging_bytes: u64,
}

impl LogConfig {
    /// Largest piece of one write, blocks: a piece is kept in one record.
    #[must_use]
    pub fn max_piece_blocks(&self) -> u32 {
        let quarter = (self.segment_bytes.min(self.staging_bytes) / 4 / BLOCK) as u32;
        MAX_ATOMIC_BLOCKS.min(quarter)
    }
}

/// Volume attributes that go into segment headers; they change while the volume is open.
#[derive(Clone, Debug)]
pub struct VolumeAttributes {
    pub name: String,
    pub size_bytes: u64,
}

/// Why an entry cannot be appended now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppendError {
    /// Try again when an operation of the log has completed.
    Wait,
    /// The device (or the tmpfs of the staging ring) is full.
    NoSpace,
    /// The log has failed.
    Failed,
}

/// What the volume should know.
#[derive(Debug)]
pub enum LogEvent {
    /// A new segment takes records from now on.
    Opened(SegmentNumber),
    /// A segment is full, and takes no more records.
    Retired {
        segment: SegmentNumber,
        end_blocks: u32,
    },
    /// A segment is sealed, its footer durable.
    Sealed {
        segment: SegmentNumber,
        end_blocks: u32,
    },
    /// The segment that took records was given up without any; its file goes.
    Abandoned(SegmentNumber),
    /// The log has failed for good.
    Failed(String),
    /// The device is full; writes fail until it is not.
    Full,
    /// The tmpfs of the staging ring is full; writes fail until it is not.
    StagingFull(String),
    /// The device has space again.
    SpaceBack,
    /// Fewer segment numbers than needed are granted.
    NumbersWanted,
}

#[derive(Debug)]
enum LogOp {
    Create {
        segment: SegmentNumber,
    },
    Reserve {
        segment: SegmentNumber,
        what: Reserved,
    },
    Write {
        start: u64,
        end: u64,
        segment: SegmentNumber,
    },
    Sync {
        segment: SegmentNumber,
    },
    Footer {
        segment: SegmentNumber,
    },
    FooterSync {
        segment: SegmentNumber,
    },
    /// Release of unused space, removal of an unused segment: nobody waits for it.
    Tidy,
}

#[derive(Clone, Copy, Debug)]
enum Reserved {
    /// Records up to this block offset.
    Records { end_blocks: u32 },
    /// This many bytes at the segment's end.
    Footer { bytes: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    segment: SegmentNumber,
}

/// The record that takes entries.
#[derive(Clone, Debug)]
struct OpenState {
    position: u64,
    offset_blocks: u32,
    entries: u32,
    data_blocks: u32,
}

/// The segment that takes records.
#[derive(Debug)]
struct Active {
    segment: SegmentNumber,
    start: u64,
    reserved_blocks: u32,
    footer_reserved_bytes: u64,
    reserving: bool,
    footer: FooterBuilder,
}

#[derive(Debug)]
enum SealStage {
    WaitDurable,
    Writing,
    Syncing,
}

#[derive(Debug)]
struct Sealing {
    segment: SegmentNumber,
    end: u64,
    end_blocks: u32,
    footer_at: u64,
    footer: crate::io::AlignedBuf,
    stage: SealStage,
}

#[derive(Debug)]
enum FlushStage {
    Idle,
    /// Waiting until everything before the position, which the record ends, is written.
    Writing(u64, Sequence),
    /// Waiting for so many syncs.
    Syncing(u64, Sequence, usize),
}

#[derive(Clone, Copy, Debug)]
struct WriteRange {
    start: u64,
    end: u64,
    segment: SegmentNumber,
    state: WriteState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteState {
    InFlight,
    Done,
    /// The device was full; written again when it is not.
    Refused,
}

/// The log of one volume, open for writing.
#[derive(Debug)]
pub struct Log {
    config: LogConfig,
    attributes: VolumeAttributes,
    numbers: Arc<SegmentNumbers>,
    staging: Staging,
    tokens: Tokens<LogOp>,

    /// The last closed record.
    last: LogPosition,
    tail: u64,
    /// Up to where the ring was written to, committed or not: what was there a lap before is gone.
    filled: u64,
    open: Option<OpenState>,
    active: Option<Active>,
    /// Created and empty, the next active segment.
    spare: Option<SegmentNumber>,
    creating: bool,
    spans: VecDeque<Span>,
    /// The ring holds nothing before this position (its memory was released).
    released: u64,

    queued: u64,
    written: u64,
    writes: VecDeque<WriteRange>,
    durable: u64,
    /// Of the last record that is durable.
    durable_sequence: Sequence,
    unsynced: BTreeSet<SegmentNumber>,
    flush: FlushStage,
    flush_wanted: u64,
    flush_refused: bool,
    sealing: VecDeque<Sealing>,

    /// Set while the device is full: when to ask it again.
    full_until_ns: Option<u64>,
    reserve_blocks: u32,
    failed: Option<String>,
    closing: bool,
    written_bytes: u64,
    /// When the oldest staged, not yet synced entry was committed.
    dirty_since_ns: Option<u64>,
    last_append_ns: u64,
    events: Vec<LogEvent>,
}

impl Log {
    /// A log that goes on after `last` (recovery has sealed everything before it).
    ///
    /// # Errors
    /// What creating the staging file says.
    pub fn create(
        config: LogConfig,
        attributes: VolumeAttributes,
        numbers: Arc<SegmentNumbers>,
        last: LogPosition,
    ) -> io::Result<Self> {
        let identity = StagingIdentity {
            pool: config.pool,
            volume: config.volume,
            epoch: config.epoch,
        };
        let staging = Staging::create(&config.staging_path, identity, config.staging_bytes)?;
        Ok(Self {
            config,
            attributes,
            numbers,
            staging,
            tokens: Tokens::new(0),
            last,
            tail: 0,
            filled: 0,
            open: None,
            active: None,
            spare: None,
            creating: false,
            spans: VecDeque::new(),
            released: 0,
            queued: 0,
            written: 0,
            writes: VecDeque::new(),
            durable: 0,
            // Recovery has made everything up to its end durable.
            durable_sequence: last.sequence,
            unsynced: BTreeSet::new(),
            flush: FlushStage::Idle,
            flush_wanted: 0,
            flush_refused: false,
            sealing: VecDeque::new(),
            full_until_ns: None,
            reserve_blocks: RESERVE_BLOCKS,
            failed: None,
            closing: false,
            written_bytes: 0,
            dirty_since_ns: None,
            last_append_ns: 0,
            events: Vec::new(),
        })
    }

    /// Moves the log's tokens; nothing may be in flight.
    pub fn rebase(&mut self, base: u64) {
        self.tokens.rebase(base);
    }

    pub fn set_attributes(&mut self, attributes: VolumeAttributes) {
        self.attributes = attributes;
    }

    #[must_use]
    pub fn config(&self) -> &LogConfig {
        &self.config
    }

    /// Where the next entry goes; everything before is committed.
    #[must_use]
    pub const fn tail(&self) -> u64 {
        self.tail
    }

    /// Everything before is durable.
    #[must_use]
    pub const fn durable(&self) -> u64 {
        self.durable
    }

    #[must_use]
    pub fn staged_bytes(&self) -> u64 {
        self.tail - self.written
    }

    /// The segment that takes records, and blocks of it that are in use.
    #[must_use]
    pub fn active_blocks(&self) -> Option<(SegmentNumber, u32)> {
        let active = self.active.as_ref()?;
        Some((active.segment, ((self.tail - active.start) / BLOCK) as u32))
    }

    /// Whether the device, or the memory for staging, was full when it was asked last.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.full_until_ns.is_some()
    }

    /// Records and footers written to segments since the log was created.
    #[must_use]
    pub const fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    pub fn take_events(&mut self, out: &mut Vec<LogEvent>) {
        out.append(&mut self.events);
    }

    /// The log's end, for a checkpoint. Closes the open record, so that it is the end of a record.
    pub fn checkpoint_position(&mut self) -> LogPosition {
        self.close_record();
        self.last
    }

    /// The data at `address`, if the ring still has it.
    #[must_use]
    pub fn staged(&self, address: Address, blocks: u32) -> Option<&[u8]> {
        let position = self.position_of(address)?;
        let len = u64::from(blocks) * BLOCK;
        let oldest = self
            .released
            .max(self.filled.saturating_sub(self.staging.ring_bytes()));
        (position >= oldest && position + len <= self.tail)
            .then(|| self.staging.bytes(position, len as usize))
    }

    fn position_of(&self, address: Address) -> Option<u64> {
        let wanted = address.segment();
        // The newest spans are asked for most.
        let span = self
            .spans
            .iter()
            .rev()
            .find(|span| span.segment == wanted)?;
        Some(span.start + address.byte_offset())
    }

    fn submit(&mut self, io: &mut dyn Io, segment: SegmentNumber, op: Op, what: LogOp) {
        let token = self.tokens.insert(what);
        io.submit(
            token,
            Target {
                device: self.config.device,
                segment,
            },
            op,
        );
    }

    /// Whether nothing of the log is in flight.
    #[must_use]
    pub fn idle(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Takes the completion of one of the log's own operations.
    pub fn on_completion(&mut self, io: &mut dyn Io, completion: Completion, now: Now) {
        let Completion { token, result } = completion;
        match self.tokens.take(token) {
            LogOp::Create { segment } => self.created(io, segment, result, now),
            LogOp::Reserve { segment, what } => self.reserved(segment, what, result, now),
            LogOp::Write {
                start,
                end,
                segment,
            } => self.wrote(start, end, segment, result, now),
            LogOp::Sync { segment } => self.synced(segment, result),
            LogOp::Footer { segment } => self.footer_written(io, segment, result, now),
            LogOp::FooterSync { segment } => self.footer_synced(io, segment, result),
            LogOp::Tidy => {}
        }
    }

    /// Does what is due: write-out, flush, seal. Called once after each batch of requests and
    /// completions, and at [`Self::deadline_ns`].
    pub fn advance(&mut self, io: &mut dyn Io, now: Now) {
        if self.failed.is_some() {
            return;
        }
        if self
            .dirty_since_ns
            .is_some_and(|since| now.monotonic_ns >= since + WRITE_BACK_NS)
        {
            self.request_flush();
        }
        self.retry_refused(io, now);
        self.drive_flush(io);
        self.write_out(io);
        self.drive_seals(io);
        self.prepare_spare(io, now);
        if self.may_release() && now.monotonic_ns >= self.last_append_ns + RELEASE_NS {
            self.staging.release();
            self.released = self.tail;
            self.spans.drain(..self.spans.len().saturating_sub(1));
        }
    }

    fn may_release(&self) -> bool {
        self.released < self.tail && self.written == self.tail && self.writes.is_empty()
    }

    /// When `advance` has something to do that no completion announces; monotonic.
    #[must_use]
    pub fn deadline_ns(&self) -> Option<u64> {
        if self.failed.is_some() {
            return None;
        }
        // While a flush runs its completions drive it.
        let flushing = !matches!(self.flush, FlushStage::Idle);
        let write_back = self
            .dirty_since_ns
            .filter(|_| !flushing)
            .map(|since| since + WRITE_BACK_NS);
        let retry = self.full_until_ns.filter(|_| {
            self.writes
                .iter()
                .any(|write| write.state == WriteState::Refused)
        });
        let release = self.may_release().then(|| self.last_append_ns + RELEASE_NS);
        [write_back, retry, release].into_iter().flatten().min()
    }

    fn fail(&mut self, what: &str, segment: SegmentNumber, error: &io::Error) {
        if self.failed.is_none() {
            let reason = format!("{what} segment {segment}: {error}");
            self.failed = Some(reason.clone());
            self.events.push(LogEvent::Failed(reason));
        }
    }

    fn device_full(&mut self, now: Now) {
        if self.full_until_ns.is_none() {
            self.events.push(LogEvent::Full);
        }
        self.full_until_ns = Some(now.monotonic_ns + FULL_RETRY_NS);
    }

    fn staging_full(&mut self, error: &io::Error, now: Now) {
        if self.full_until_ns.is_none() {
            let path = self.config.staging_path.display();
            self.events.push(LogEvent::StagingFull(format!(
                "staging file {path}: {error}"
            )));
        }
        self.full_until_ns = Some(now.monotonic_ns + FULL_RETRY_NS);
    }

    fn device_has_space(&mut self) {
        if self.full_until_ns.take().is_some() {
            self.events.push(LogEvent::SpaceBack);
        }
    }

    /// Whether the device, known to be full, should be left alone for now.
    fn still_full(&self, now: Now) -> bool {
        self.full_until_ns
            .is_some_and(|until| now.monotonic_ns < until)
    }

    fn segment_header(&self, number: SegmentNumber, now: Now) -> SegmentHeader {
        SegmentHeader {
            kind: SegmentKind::Log,
            pool: self.config.pool,
            volume: self.config.volume,
            number,
            epoch: self.config.epoch,
            segment_bytes: self.config.segment_bytes,
            logical_block_bytes: self.config.logical_block_bytes,
            volume_bytes: self.attributes.size_bytes,
            created_ns: now.realtime_ns,
            volume_name: self.attributes.name.clone(),
        }
    }
}

/// Says whether an error means that there is no space: retrying later makes sense.
fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
