//! Recovery: what of a log is there after its writer died, and making that its end for good.
//!
//! 1. What a dead daemon left in its staging ring is written to the segments (idempotent: dying here
//!    and starting again does the same). Segments that have a footer are left as they are: either it
//!    covers what is staged, or the log went on without that, which then is of an opening long past.
//! 2. The segments from the checkpoint on are read in order. A valid footer speaks for its segment;
//!    without one, records are read one by one, data checksums included. The log ends at the first
//!    record that is not valid and was not durable: what is applied is a prefix.
//! 3. Segments without a footer are written once more (a sync that failed may have left what was read
//!    without a way to the device), synced and given one, durably. Only then does the caller let the
//!    first new write in. So the end that this recovery saw is the end that every later one sees.
//! 4. Unsealed segments beyond the end are removed: nothing in them was ever flushed, since a flush
//!    makes everything before it durable first.
//!
//! **Damage** is told from a torn end by what is found behind it ([`Durable`]): a footer says that its
//! records were durable, and a record header says up to which record the log was durable before it. A
//! record that is not valid though it was durable is damage. If only its data is wrong it is applied all
//! the same, since the blocks that are right are good and those that are not must not read as what
//! was there before; if its header is wrong the log goes on behind it. Either is reported. A footer
//! then lists the records that are there, so that the end, and the gap, are the same ever after.

use std::io;
use std::path::PathBuf;

use super::scan::{Durable, Footer, Scan, end_of, failed, read_footer};
use super::{BLOCK, LogConfig, StagedLog, StagingIdentity};
use crate::io::{BlockingIo, Op};
use crate::segment::{FooterBuilder, Record, RecordSummary, SegmentHeader, SegmentKind, Trailer};
use crate::types::{BLOCK_BYTES, Epoch, SegmentNumber, Sequence};

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
    /// Maps are made again from all segments: nothing is written, what is staged is left alone, records
    /// of removed segments are not missed, and blocks of durable records may have been punched out.
    pub rebuild: bool,
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
    epoch: Option<Epoch>,
    /// `previous_checksum` of the first record.
    previous_checksum: u32,
    records: Vec<RecordSummary>,
    /// A trailer says that it was sealed, whatever can be read of it.
    was_sealed: bool,
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
    let mut durable = Durable::default();
    if !input.rebuild {
        drain_staging(io, input, &mut recovery)?;
    }
    let may_write = !input.read_only && !input.rebuild;
    // Of these no record was taken, and whether something in them was of the log.
    let mut empty: Vec<(SegmentNumber, bool)> = Vec::new();
    for &number in &input.segments {
        let found = read_segment(io, input, number, &mut durable, &mut recovery);
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
        let Some(last) = contents.records.last() else {
            let covered = number <= input.checkpoint.segment;
            empty.push((number, covered || contents.was_sealed));
            continue;
        };
        let used_blocks = last.end_blocks();
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
                end_blocks: record.end_blocks(),
                sequence: record.sequence,
                record_checksum: record.header_checksum,
            };
        }
        let sealed = contents.sealed
            || (may_write && {
                write_again(io, number, &contents.records, apply_from)?;
                seal(io, input.config, number, &contents)?
            });
        recovery.segments.push(RecoveredSegment {
            number,
            used_blocks,
            sealed,
            removed: false,
        });
    }
    report_lost_end(io, input, &mut durable, &mut recovery)?;
    // Only now: everything that stays is durable and has its end.
    for (number, stays) in empty {
        let removed = may_write && !stays;
        if removed {
            io.run(number, Op::Remove)
                .map_err(failed("removing", number))?;
        }
        recovery.segments.push(RecoveredSegment {
            number,
            used_blocks: u32::from(stays),
            // Nothing is written to it any more, and there is nothing that a footer could list.
            sealed: stays,
            removed,
        });
    }
    Ok(recovery)
}

/// Says what was durable behind the end of what could be read.
fn report_lost_end(
    io: &mut BlockingIo<'_>,
    input: &RecoveryInput<'_>,
    durable: &mut Durable,
    recovery: &mut Recovery,
) -> Result<(), RecoveryError> {
    // Behind a whole footer that is the last there is nothing to look for.
    if recovery.scanned == 0 {
        return Ok(());
    }
    let claimed = durable.highest(io, input)?;
    let end = recovery.end;
    if end.sequence < claimed {
        recovery.warnings.push(format!(
            "segment {} is damaged from block {} on: records {} to {claimed} were durable and cannot \
             be read",
            end.segment,
            end.end_blocks,
            end.sequence.plus(1)
        ));
    }
    Ok(())
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
/// (said among the warnings).
fn read_segment(
    io: &mut BlockingIo<'_>,
    input: &RecoveryInput<'_>,
    number: SegmentNumber,
    durable: &mut Durable,
    recovery: &mut Recovery,
) -> Result<Option<Contents>, RecoveryError> {
    let config = input.config;
    let mut told = None;
    match read_footer(io, config, number)? {
        Footer::Whole(trailer, records) => {
            let end = recovery.end;
            let joined = trailer.first_sequence == end.sequence.plus(1)
                && trailer.previous_checksum == end.record_checksum;
            if number > input.checkpoint.segment && !joined && !input.rebuild {
                recovery
                    .warnings
                    .push(lost_before(number, end, trailer.first_sequence));
            }
            return Ok(Some(Contents {
                sealed: true,
                epoch: Some(trailer.epoch),
                previous_checksum: trailer.previous_checksum,
                records,
                was_sealed: true,
            }));
        }
        // Torn by a crash, perhaps: its records will tell.
        Footer::Torn(trailer) => told = Some(trailer),
        Footer::Missing => {}
    }
    let (block, got) = io
        .read(number, 0, BLOCK_BYTES)
        .map_err(failed("reading", number))?;
    let epoch = match SegmentHeader::parse(&block[..got.min(BLOCK_BYTES)]) {
        Ok(header)
            if header.kind == SegmentKind::Log
                && (header.pool, header.volume, header.number)
                    == (config.pool, config.volume, number) =>
        {
            Some(header.epoch)
        }
        Ok(_) => {
            recovery.warnings.push(format!(
                "segment {number} says that it is another one; left alone"
            ));
            return Ok(None);
        }
        Err(error) => {
            // Its records say by themselves where they belong.
            recovery.warnings.push(format!(
                "segment {number}: {error}; its records are read without it"
            ));
            None
        }
    };
    let mut reader = Reader {
        input,
        number,
        scan: Scan::new(config, number, epoch),
        contents: Contents {
            sealed: false,
            epoch: None,
            previous_checksum: 0,
            records: Vec::new(),
            was_sealed: told.is_some(),
        },
        offset_blocks: 1,
        told,
    };
    reader.covered(io, recovery)?;
    if number >= input.checkpoint.segment {
        reader.fresh(io, durable, recovery)?;
    }
    reader.contents.epoch = reader.scan.epoch;
    Ok(Some(reader.contents))
}

fn lost_before(number: SegmentNumber, end: LogPosition, first: Sequence) -> String {
    format!(
        "the log is damaged before segment {number}, behind block {} of segment {}: of records {} to {} \
         some are lost",
        end.end_blocks,
        end.segment,
        end.sequence.plus(1),
        first.0.saturating_sub(1)
    )
}

/// Reads the records of a segment that has no footer.
struct Reader<'a> {
    input: &'a RecoveryInput<'a>,
    number: SegmentNumber,
    scan: Scan<'a>,
    contents: Contents,
    /// Where the next record is expected.
    offset_blocks: u32,
    /// A trailer whose body is not its own.
    told: Option<Trailer>,
}

impl Reader<'_> {
    fn take(&mut self, record: Record) {
        if self.contents.records.is_empty() {
            self.contents.previous_checksum = record.identity.previous_checksum;
        }
        self.offset_blocks = end_of(&record);
        self.contents.records.push(RecordSummary::from(record));
    }

    /// Records that the checkpoint covers: durable, so taken by their headers alone.
    fn covered(
        &mut self,
        io: &mut BlockingIo<'_>,
        recovery: &mut Recovery,
    ) -> Result<(), RecoveryError> {
        let checkpoint = self.input.checkpoint;
        let known_end = match self.number.cmp(&checkpoint.segment) {
            std::cmp::Ordering::Greater => return Ok(()),
            std::cmp::Ordering::Equal => Some(checkpoint.end_blocks),
            std::cmp::Ordering::Less => self.told.map(|trailer| trailer.end_blocks),
        };
        let end = known_end.unwrap_or(u32::MAX);
        let mut damaged = |from: u32, to: u32| {
            recovery.warnings.push(format!(
                "segment {} is damaged in blocks {from} to {}, which the checkpoint covers: maps know \
                 what is in them, and could not be rebuilt",
                self.number,
                to - 1
            ));
        };
        while self.offset_blocks < end {
            let found = self.scan.find(io, self.offset_blocks)?;
            let Some(record) = found.filter(|record| end_of(record) <= end) else {
                break;
            };
            if record.identity.offset_blocks > self.offset_blocks {
                damaged(self.offset_blocks, record.identity.offset_blocks);
            }
            if self.contents.records.is_empty() {
                self.contents.previous_checksum = record.identity.previous_checksum;
            }
            self.offset_blocks = end_of(&record);
            self.contents.records.push(RecordSummary::from(record));
        }
        if let Some(end) = known_end.filter(|end| self.offset_blocks < *end) {
            damaged(self.offset_blocks, end);
            self.offset_blocks = end;
        }
        Ok(())
    }

    /// Records behind the checkpoint: a valid one after the other, and behind damage.
    fn fresh(
        &mut self,
        io: &mut BlockingIo<'_>,
        durable: &mut Durable,
        recovery: &mut Recovery,
    ) -> Result<(), RecoveryError> {
        let mut last = (recovery.end.sequence, recovery.end.record_checksum);
        loop {
            let expected = last.0.plus(1);
            let here = self.scan.record_at(io, self.offset_blocks)?;
            if let Some(record) = here.filter(|record| {
                (record.identity.sequence, record.identity.previous_checksum) == (expected, last.1)
            }) {
                let wrong = self.scan.wrong_blocks(io, &record)?;
                if wrong > 0 && expected > durable.of(record.identity.epoch, io, self.input)? {
                    return Ok(());
                }
                if wrong > 0 && !self.input.rebuild {
                    recovery.warnings.push(format!(
                        "segment {} is damaged: {wrong} of blocks {} to {} do not match their checksums",
                        self.number,
                        self.offset_blocks + 1,
                        end_of(&record) - 1
                    ));
                }
                last = (record.identity.sequence, record.header_checksum);
                self.take(record);
                continue;
            }
            // Not valid: the end, or damage.
            if expected > durable.highest(io, self.input)? {
                return Ok(());
            }
            let Some(next) = self.next_after_damage(io, expected, durable)? else {
                return Ok(());
            };
            let (first, offset_blocks) = (next.identity.sequence, next.identity.offset_blocks);
            if self.contents.records.is_empty() && self.offset_blocks == offset_blocks {
                if !self.input.rebuild {
                    recovery
                        .warnings
                        .push(lost_before(self.number, recovery.end, first));
                }
            } else {
                recovery.warnings.push(format!(
                    "segment {} is damaged in blocks {} to {}: of records {expected} to {} some are lost",
                    self.number,
                    self.offset_blocks,
                    offset_blocks.max(self.offset_blocks + 1) - 1,
                    first.0 - 1
                ));
            }
            // It is taken, or not, by the rules for any record.
            self.offset_blocks = offset_blocks;
            last = (Sequence(first.0 - 1), next.identity.previous_checksum);
        }
    }

    /// The next record of the log behind one that was durable and cannot be read. Records that are
    /// missing between them must have been durable, too: otherwise they are the log's end.
    fn next_after_damage(
        &mut self,
        io: &mut BlockingIo<'_>,
        expected: Sequence,
        durable: &mut Durable,
    ) -> Result<Option<Record>, RecoveryError> {
        let mut from = self.offset_blocks;
        while let Some(record) = self.scan.find(io, from)? {
            let sequence = record.identity.sequence;
            if sequence >= expected {
                let claimed = durable.of(record.identity.epoch, io, self.input)?;
                return Ok((sequence <= claimed.plus(1)).then_some(record));
            }
            from = record.identity.offset_blocks + 1;
        }
        Ok(None)
    }
}

/// Writes the records from a block offset on once more, as they were read.
///
/// A sync that failed may have left them readable and never to be durable: the kernel counts pages that
/// it could not write as clean, and the next sync, of this process, succeeds without them. What a
/// checkpoint covers was synced with success. The bytes are the same, so a crash in between does no harm.
fn write_again(
    io: &mut BlockingIo<'_>,
    number: SegmentNumber,
    records: &[RecordSummary],
    from_blocks: u32,
) -> Result<(), RecoveryError> {
    for record in records.iter().filter(|r| r.offset_blocks >= from_blocks) {
        let offset_bytes = u64::from(record.offset_blocks) * BLOCK;
        let len = (1 + record.data_blocks as usize) * BLOCK_BYTES;
        let (buffer, got) = io
            .read(number, offset_bytes, len)
            .map_err(failed("reading", number))?;
        // SAFETY: `buffer` lives until `write` has returned.
        let buf = unsafe { buffer.io_buf() }.slice(0, got / BLOCK_BYTES * BLOCK_BYTES);
        io.write(number, offset_bytes, buf)
            .map_err(failed("writing", number))?;
    }
    Ok(())
}

/// Makes a segment's records durable and gives it its footer. False: it has no record to seal.
fn seal(
    io: &mut BlockingIo<'_>,
    config: &LogConfig,
    number: SegmentNumber,
    contents: &Contents,
) -> Result<bool, RecoveryError> {
    let mut builder = FooterBuilder::default();
    let mut previous_checksum = contents.previous_checksum;
    for record in &contents.records {
        builder.push(record, previous_checksum);
        previous_checksum = record.header_checksum;
    }
    let (Some(last), Some(epoch)) = (contents.records.last(), contents.epoch) else {
        return Ok(false);
    };
    io.sync(number).map_err(failed("syncing", number))?;
    let (offset_bytes, footer) = builder.finish(
        config.pool,
        config.volume,
        number,
        epoch,
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
