//! Recovery: what of a log is there after its writer died, and making that its end for good.
//!
//! 1. What a dead daemon left in its staging ring is written to the segments (idempotent: dying here
//!    and starting again does the same). Segments that have a footer are left as they are: either it
//!    covers what is staged, or the log went on without that, which then is of an opening long past.
//! 2. The segments from the checkpoint on are read in order. A valid footer speaks for its segment;
//!    without one, records are read one by one, data checksums included. The log ends at the first
//!    record that is not valid: what is applied is a prefix.
//! 3. Segments without a footer are synced and given one, durably. Only then does the caller let the
//!    first new write in. So the end that this recovery saw is the end that every later one sees.
//! 4. Unsealed segments beyond the end are removed: nothing in them was ever flushed, since a flush
//!    makes everything before it durable first.
//!
//! A *sealed* segment beyond an invalid record is another matter: its footer says that everything
//! before was durable once, so the invalid record is damage, not a torn end. Then the log goes on
//! behind the damage, and the loss is reported.

use std::io;
use std::path::PathBuf;

use super::{BLOCK, LogConfig, StagedLog, StagingIdentity};
use crate::crc::crc32c;
use crate::io::{AlignedBuf, BlockingIo, Op};
use crate::segment::{
    FooterBuilder, Record, RecordSummary, SegmentHeader, SegmentKind, TRAILER_BYTES, Trailer,
};
use crate::types::{BLOCK_BYTES, Epoch, SegmentNumber, Sequence};

/// How much of an unsealed segment is read at a time.
const SCAN_BYTES: usize = 4 << 20;

/// The end of a record in a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogPosition {
    pub segment: SegmentNumber,
    /// Behind the record, blocks from the segment's start.
    pub end_blocks: u32,
    /// Of the record; 0 if there is none.
    pub sequence: Sequence,
    pub record_checksum: u32,
}

/// Why a log cannot be recovered.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    #[error("{what} segment {segment}: {error}")]
    Io {
        what: &'static str,
        segment: SegmentNumber,
        error: io::Error,
    },
    #[error("staging file {path}: {error}")]
    Staging { path: PathBuf, error: io::Error },
    #[error("the volume was not closed cleanly and has staged writes; open it for writing once")]
    NeedsWriting,
    #[error("applying the log to the map: {0}")]
    Apply(String),
}

/// A log segment as recovery leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveredSegment {
    pub number: SegmentNumber,
    pub used_blocks: u32,
    pub sealed: bool,
    /// Its file is gone: it held no record of the log.
    pub removed: bool,
}

impl RecoveredSegment {
    const fn gone(number: SegmentNumber) -> Self {
        Self {
            number,
            used_blocks: 0,
            sealed: false,
            removed: true,
        }
    }
}

/// What recovery found.
#[derive(Clone, Debug, Default)]
pub struct Recovery {
    /// The log's end.
    pub end: LogPosition,
    pub segments: Vec<RecoveredSegment>,
    /// Records applied after the checkpoint.
    pub records: u64,
    /// Bytes that a dead daemon had left in its staging ring.
    pub staged_bytes: u64,
    /// Segments whose records were read one by one.
    pub scanned: u32,
    /// What is lost or odd, in words, one line each.
    pub warnings: Vec<String>,
}

/// What there is to recover.
#[derive(Clone, Debug)]
pub struct RecoveryInput<'a> {
    pub config: &'a LogConfig,
    /// The epoch of the opening before this one. It, and others before it, may have died before they
    /// had a staging ring: what is staged may be of an older one.
    pub previous_epoch: Epoch,
    pub checkpoint: LogPosition,
    /// Log segments that may hold records after the checkpoint or lack a footer, ascending.
    pub segments: Vec<SegmentNumber>,
    /// Whether anything may be written.
    pub read_only: bool,
}

impl RecoveryInput<'_> {
    /// Block offset in a segment from which on records are newer than the checkpoint.
    fn apply_from(&self, number: SegmentNumber) -> u32 {
        match number.cmp(&self.checkpoint.segment) {
            std::cmp::Ordering::Less => u32::MAX,
            std::cmp::Ordering::Equal => self.checkpoint.end_blocks,
            std::cmp::Ordering::Greater => 1,
        }
    }
}

/// One segment, read.
struct Contents {
    sealed: bool,
    epoch: Epoch,
    /// `previous_checksum` of the first record.
    previous_checksum: u32,
    records: Vec<RecordSummary>,
    /// Records before the checkpoint could not be read: there is no footer to be made of the rest.
    incomplete: bool,
}

/// Brings the log to a consistent end; calls `apply` for each record after the checkpoint, in order.
///
/// # Errors
/// [`RecoveryError`]; nothing is lost, and recovery may be tried again.
pub fn recover(
    io: &mut BlockingIo<'_>,
    input: &RecoveryInput<'_>,
    apply: &mut dyn FnMut(&mut BlockingIo<'_>, SegmentNumber, &RecordSummary) -> Result<(), String>,
) -> Result<Recovery, RecoveryError> {
    let mut recovery = Recovery {
        end: input.checkpoint,
        ..Recovery::default()
    };
    drain_staging(io, input, &mut recovery)?;
    let mut beyond_end = Vec::new();
    for &number in &input.segments {
        let found = read_segment(io, input, number, recovery.end, &mut recovery.warnings);
        let contents = match found {
            Ok(Some(contents)) => contents,
            Ok(None) => continue,
            // An earlier recovery removed it, and died before a checkpoint told the catalog.
            Err(RecoveryError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                recovery.segments.push(RecoveredSegment::gone(number));
                continue;
            }
            Err(error) => return Err(error),
        };
        if !contents.sealed {
            recovery.scanned += 1;
        }
        let fresh = number > input.checkpoint.segment;
        if fresh {
            match follows(&contents, recovery.end) {
                Follows::Yes => {}
                // Unsealed and not joined to the log: written, never flushed, its start lost.
                Follows::No if !contents.sealed => {
                    beyond_end.push(number);
                    continue;
                }
                Follows::No => recovery.warnings.push(format!(
                    "the log is damaged before segment {number}: records after number {} are lost",
                    recovery.end.sequence
                )),
            }
        }
        let apply_from = input.apply_from(number);
        for record in contents
            .records
            .iter()
            .filter(|r| r.offset_blocks >= apply_from)
        {
            apply(io, number, record).map_err(RecoveryError::Apply)?;
            recovery.records += 1;
            recovery.end = LogPosition {
                segment: number,
                end_blocks: record.offset_blocks + 1 + record.data_blocks,
                sequence: record.sequence,
                record_checksum: record.header_checksum,
            };
        }
        let sealed =
            contents.sealed || (!input.read_only && seal(io, input.config, number, &contents)?);
        let last = contents.records.last();
        recovery.segments.push(RecoveredSegment {
            number,
            used_blocks: last.map_or(1, |r| r.offset_blocks + 1 + r.data_blocks),
            sealed,
            removed: false,
        });
    }
    // Only now: everything that stays is durable and has its end.
    for number in beyond_end {
        if !input.read_only {
            io.run(number, Op::Remove)
                .map_err(failed("removing", number))?;
        }
        let gone = RecoveredSegment {
            number,
            used_blocks: 0,
            sealed: false,
            removed: !input.read_only,
        };
        recovery.segments.push(gone);
    }
    Ok(recovery)
}

fn failed(what: &'static str, segment: SegmentNumber) -> impl FnOnce(io::Error) -> RecoveryError {
    move |error| RecoveryError::Io {
        what,
        segment,
        error,
    }
}

/// Whether a segment goes on where the log has ended so far.
enum Follows {
    Yes,
    No,
}

fn follows(contents: &Contents, end: LogPosition) -> Follows {
    match contents.records.first() {
        Some(first)
            if first.sequence == end.sequence.plus(1)
                && contents.previous_checksum == end.record_checksum =>
        {
            Follows::Yes
        }
        _ => Follows::No,
    }
}

fn drain_staging(
    io: &mut BlockingIo<'_>,
    input: &RecoveryInput<'_>,
    recovery: &mut Recovery,
) -> Result<(), RecoveryError> {
    let config = input.config;
    let path = &config.staging_path;
    let identity = StagingIdentity {
        pool: config.pool,
        volume: config.volume,
        epoch: input.previous_epoch,
    };
    let staging_failed = |error| RecoveryError::Staging {
        path: path.clone(),
        error,
    };
    let staged = match StagedLog::open(path, identity) {
        Ok(Some(staged)) => staged,
        Ok(None) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::InvalidData && !input.read_only => {
            // Not ours to trust, and not ours to throw away.
            let aside = path.with_extension("stale");
            std::fs::rename(path, &aside).map_err(staging_failed)?;
            recovery
                .warnings
                .push(format!("{error}; kept as {}", aside.display()));
            return Ok(());
        }
        Err(error) => return Err(staging_failed(error)),
    };
    if input.read_only && !staged.pieces.is_empty() {
        return Err(RecoveryError::NeedsWriting);
    }
    let mut gone = None;
    for piece in &staged.pieces {
        match read_footer(io, config, piece.segment) {
            Ok(Footer::Whole(..)) => continue,
            Ok(Footer::Torn(_) | Footer::Missing) => {}
            // The log went on without it: recovery removed it, while the staging file was away.
            Err(RecoveryError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                gone = Some(piece.segment);
                continue;
            }
            Err(error) => return Err(error),
        }
        // SAFETY: `staged` lives until `write` has returned, which is when the operation has ended.
        let buf = unsafe { staged.io_buf(piece) };
        io.write(piece.segment, piece.offset_bytes, buf)
            .map_err(failed("writing staged data to", piece.segment))?;
        recovery.staged_bytes += piece.len as u64;
    }
    if let Some(segment) = gone {
        let aside = path.with_extension("stale");
        std::fs::rename(path, &aside).map_err(staging_failed)?;
        recovery.warnings.push(format!(
            "staged writes for segment {segment}, which is not there, are left out; kept as {}",
            aside.display()
        ));
    }
    // The same segments are unsealed, so `seal` syncs them before their footers.
    Ok(())
}

/// Reads a segment's records, by its footer or one by one. `None`: it is not a segment of this log
/// (said in `warnings`).
fn read_segment(
    io: &mut BlockingIo<'_>,
    input: &RecoveryInput<'_>,
    number: SegmentNumber,
    end: LogPosition,
    warnings: &mut Vec<String>,
) -> Result<Option<Contents>, RecoveryError> {
    let config = input.config;
    let promised = match read_footer(io, config, number)? {
        Footer::Whole(trailer, records) => {
            return Ok(Some(Contents {
                sealed: true,
                epoch: trailer.epoch,
                previous_checksum: trailer.previous_checksum,
                records,
                incomplete: false,
            }));
        }
        // Torn by a crash, perhaps: its records will tell.
        Footer::Torn(trailer) => Some(trailer.last_sequence),
        Footer::Missing => None,
    };
    let (block, got) = io
        .read(number, 0, BLOCK_BYTES)
        .map_err(failed("reading", number))?;
    let header = match SegmentHeader::parse(&block) {
        Ok(header)
            if got == BLOCK_BYTES
                && header.kind == SegmentKind::Log
                && (header.pool, header.volume, header.number)
                    == (config.pool, config.volume, number) =>
        {
            header
        }
        Ok(_) => {
            warnings.push(format!(
                "segment {number} says that it is another one; left alone"
            ));
            return Ok(None);
        }
        Err(error) => {
            warnings.push(format!("segment {number}: {error}; left alone"));
            return Ok(None);
        }
    };
    let checkpoint = input.checkpoint;
    let mut scan = Scan {
        config,
        number,
        contents: Contents {
            sealed: false,
            epoch: header.epoch,
            previous_checksum: 0,
            records: Vec::new(),
            incomplete: false,
        },
        chain: (number > checkpoint.segment).then_some((end.sequence, end.record_checksum)),
        offset_blocks: 1,
        verify_from: input.apply_from(number),
    };
    let mut window = Window::new(number, config.segment_bytes);
    scan.run(io, &mut window)?;
    if number == checkpoint.segment && scan.offset_blocks < checkpoint.end_blocks {
        warnings.push(format!(
            "segment {number} is damaged at block {}, before the checkpoint",
            scan.offset_blocks
        ));
        scan.contents.incomplete = true;
        scan.offset_blocks = checkpoint.end_blocks;
        scan.chain = Some((checkpoint.sequence, checkpoint.record_checksum));
        scan.run(io, &mut window)?;
    }
    let last = scan.chain.map(|(sequence, _)| sequence);
    if let Some(promised) = promised.filter(|promised| last.is_none_or(|last| last < *promised)) {
        warnings.push(format!(
            "segment {number} is damaged: its records up to number {promised} were durable, and those \
             from block {} on cannot be read",
            scan.offset_blocks
        ));
    }
    Ok(Some(scan.contents))
}

/// What stands at a segment's end.
enum Footer {
    Missing,
    /// A trailer, with a body that is not its own.
    Torn(Trailer),
    Whole(Trailer, Vec<RecordSummary>),
}

fn read_footer(
    io: &mut BlockingIo<'_>,
    config: &LogConfig,
    number: SegmentNumber,
) -> Result<Footer, RecoveryError> {
    let offset_bytes = config.segment_bytes - TRAILER_BYTES as u64;
    let (block, got) = io
        .read(number, offset_bytes, TRAILER_BYTES)
        .map_err(failed("reading", number))?;
    let ours = (config.pool, config.volume, number);
    let trailer = match Trailer::parse(&block, config.segment_bytes) {
        Ok(trailer)
            if got == TRAILER_BYTES && (trailer.pool, trailer.volume, trailer.segment) == ours =>
        {
            trailer
        }
        _ => return Ok(Footer::Missing),
    };
    let len = trailer.body_bytes as usize;
    let (body, got) = io
        .read(number, u64::from(trailer.body_offset), len.max(1))
        .map_err(failed("reading", number))?;
    Ok(match trailer.parse_body(&body[..got.min(len)]) {
        Ok(records) => Footer::Whole(trailer, records),
        Err(_) => Footer::Torn(trailer),
    })
}

/// Reads records one by one until one is not valid.
struct Scan<'a> {
    config: &'a LogConfig,
    number: SegmentNumber,
    contents: Contents,
    /// Sequence and checksum of the record before, if known.
    chain: Option<(Sequence, u32)>,
    offset_blocks: u32,
    /// Data is verified from this offset on; before it, a checkpoint says that it is durable.
    verify_from: u32,
}

impl Scan<'_> {
    fn run(&mut self, io: &mut BlockingIo<'_>, window: &mut Window) -> Result<(), RecoveryError> {
        while let Some(record) = self.next(io, window)? {
            if self.contents.records.is_empty() {
                self.contents.previous_checksum = record.identity.previous_checksum;
            }
            self.chain = Some((record.identity.sequence, record.header_checksum));
            self.offset_blocks += 1 + record.data_blocks;
            self.contents.records.push(RecordSummary::from(record));
        }
        Ok(())
    }

    /// The record at the current offset, if it is valid (docs/format.md, "Record").
    fn next(
        &self,
        io: &mut BlockingIo<'_>,
        window: &mut Window,
    ) -> Result<Option<Record>, RecoveryError> {
        let Some(block) = window.blocks(io, self.offset_blocks, 1)? else {
            return Ok(None);
        };
        let Ok(record) = Record::parse(block) else {
            return Ok(None);
        };
        let (identity, config) = (record.identity, self.config);
        let here = (
            identity.pool,
            identity.volume,
            identity.segment,
            identity.epoch,
        ) == (config.pool, config.volume, self.number, self.contents.epoch)
            && identity.offset_blocks == self.offset_blocks;
        let joined = self.chain.is_none_or(|(sequence, checksum)| {
            identity.sequence == sequence.plus(1) && identity.previous_checksum == checksum
        });
        if !here || !joined {
            return Ok(None);
        }
        if self.offset_blocks >= self.verify_from && record.data_blocks > 0 {
            let data = window.blocks(io, self.offset_blocks + 1, record.data_blocks)?;
            let matches = data.is_some_and(|data| {
                data.chunks_exact(BLOCK_BYTES)
                    .map(crc32c)
                    .eq(record.checksums.iter().copied())
            });
            if !matches {
                return Ok(None);
            }
        }
        Ok(Some(record))
    }
}

/// A sliding view of a segment.
struct Window {
    number: SegmentNumber,
    segment_bytes: u64,
    buffer: Option<AlignedBuf>,
    start_bytes: u64,
    len: usize,
}

impl Window {
    fn new(number: SegmentNumber, segment_bytes: u64) -> Self {
        Self {
            number,
            segment_bytes,
            buffer: None,
            start_bytes: 0,
            len: 0,
        }
    }

    /// Blocks `first..first + count`, or `None` if the segment ends before.
    fn blocks(
        &mut self,
        io: &mut BlockingIo<'_>,
        first: u32,
        count: u32,
    ) -> Result<Option<&[u8]>, RecoveryError> {
        let (from, len) = (u64::from(first) * BLOCK, count as usize * BLOCK_BYTES);
        if from + len as u64 > self.segment_bytes {
            return Ok(None);
        }
        let inside =
            from >= self.start_bytes && from + len as u64 <= self.start_bytes + self.len as u64;
        if !inside {
            let left = self.segment_bytes - from;
            let ahead = SCAN_BYTES.min(usize::try_from(left).unwrap_or(SCAN_BYTES));
            let (buffer, got) = io
                .read(self.number, from, len.max(ahead))
                .map_err(failed("reading", self.number))?;
            (self.buffer, self.start_bytes, self.len) = (Some(buffer), from, got);
        }
        let at = (from - self.start_bytes) as usize;
        Ok(self
            .buffer
            .as_deref()
            .filter(|_| at + len <= self.len)
            .map(|b| &b[at..at + len]))
    }
}

/// Makes a segment's records durable and gives it its footer. False: it has no record to seal.
fn seal(
    io: &mut BlockingIo<'_>,
    config: &LogConfig,
    number: SegmentNumber,
    contents: &Contents,
) -> Result<bool, RecoveryError> {
    if contents.incomplete {
        return Ok(false);
    }
    let mut builder = FooterBuilder::default();
    let mut previous_checksum = contents.previous_checksum;
    for record in &contents.records {
        builder.push(record, previous_checksum);
        previous_checksum = record.header_checksum;
    }
    let Some(last) = contents.records.last() else {
        return Ok(false);
    };
    io.sync(number).map_err(failed("syncing", number))?;
    let (offset_bytes, footer) = builder.finish(
        config.pool,
        config.volume,
        number,
        contents.epoch,
        config.segment_bytes,
    );
    // SAFETY: `footer` lives until `write` has returned.
    let buf = unsafe { footer.io_buf() };
    io.write(number, offset_bytes, buf)
        .map_err(failed("writing the footer of", number))?;
    io.sync(number)
        .map_err(failed("syncing the footer of", number))?;
    // Torn records and reserved space behind the end. Only tidiness: the footer has spoken.
    let end_bytes = u64::from(last.offset_blocks + 1 + last.data_blocks) * BLOCK;
    if end_bytes < offset_bytes {
        let op = Op::release(end_bytes..offset_bytes);
        let _ = io.run(number, op);
    }
    Ok(true)
}
