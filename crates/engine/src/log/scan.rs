//! Reading segments for recovery: footers, records one by one, and what later records say of them.
//!
//! Waits for its reads. Everything read may be torn, stale or damaged.

use std::collections::BTreeMap;
use std::io;

use super::recovery::{RecoveryError, RecoveryInput};
use super::{BLOCK, LogConfig};
use crate::crc::crc32c;
use crate::io::{AlignedBuf, BlockingIo};
use crate::segment::{Record, RecordSummary, Summaries, SummaryReader, TRAILER_BYTES, Trailer};
use crate::types::{BLOCK_BYTES, Epoch, SegmentNumber, Sequence};

/// How much of an unsealed segment is read at a time.
const SCAN_BYTES: usize = 4 << 20;

pub(super) fn failed(
    what: &'static str,
    segment: SegmentNumber,
) -> impl FnOnce(io::Error) -> RecoveryError {
    move |error| RecoveryError::Io {
        what,
        segment,
        error,
    }
}

/// What a segment says of its records, without looking at data: by its footer, or by headers.
///
/// For segments whose records were durable once; see [`SummaryReader`].
///
/// # Errors
/// The operations'.
pub fn read_summaries(
    io: &mut BlockingIo<'_>,
    config: &LogConfig,
    segment: SegmentNumber,
) -> io::Result<Summaries> {
    let mut reader = SummaryReader::new(config.pool, config.volume, segment, config.segment_bytes);
    while let Some(range) = reader.wants() {
        let len = (range.end - range.start) as usize;
        let (buffer, got) = io.read(segment, range.start, len)?;
        reader.supply(&buffer[..got.min(len)]);
    }
    Ok(reader.finish())
}

/// What stands at a segment's end.
pub(super) enum Footer {
    Missing,
    /// A trailer, with a body that is not its own.
    Torn(Trailer),
    Whole(Trailer, Vec<RecordSummary>),
}

pub(super) fn read_footer(
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

/// Up to which record the log was durable, as the trailers and record headers of its newest segments
/// say. Looked for only when a record is not valid, and once.
///
/// A trailer is written when the records it lists are durable, and a record header tells what was
/// durable before it was begun. So whatever of these is found, its claim is true, even if the rest of
/// the log around it is not there.
///
/// A claim is about the log of its own epoch. What a crash cut off from that may still lie in segments
/// behind the end, or be back after its removal, under numbers that the next epoch has used again: what
/// that epoch says of them must not bring these back.
#[derive(Default)]
pub(super) struct Durable(Option<BTreeMap<Epoch, Sequence>>);

impl Durable {
    /// The highest claim of any epoch.
    pub(super) fn highest(
        &mut self,
        io: &mut BlockingIo<'_>,
        input: &RecoveryInput<'_>,
    ) -> Result<Sequence, RecoveryError> {
        let claims = self.claims(io, input)?;
        Ok(claims.values().copied().max().unwrap_or_default())
    }

    /// What the records of `epoch` claim.
    pub(super) fn of(
        &mut self,
        epoch: Epoch,
        io: &mut BlockingIo<'_>,
        input: &RecoveryInput<'_>,
    ) -> Result<Sequence, RecoveryError> {
        let claims = self.claims(io, input)?;
        Ok(claims.get(&epoch).copied().unwrap_or_default())
    }

    fn claims(
        &mut self,
        io: &mut BlockingIo<'_>,
        input: &RecoveryInput<'_>,
    ) -> Result<&BTreeMap<Epoch, Sequence>, RecoveryError> {
        if self.0.is_none() {
            self.0 = Some(Self::look(io, input)?);
        }
        Ok(self.0.get_or_insert_default())
    }

    fn look(
        io: &mut BlockingIo<'_>,
        input: &RecoveryInput<'_>,
    ) -> Result<BTreeMap<Epoch, Sequence>, RecoveryError> {
        let mut durable = BTreeMap::new();
        let first = input.checkpoint.segment;
        for &number in input.segments.iter().filter(|number| **number >= first) {
            match add_claims(io, input.config, number, &mut durable) {
                Err(RecoveryError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                }
                claimed => claimed?,
            }
        }
        Ok(durable)
    }
}

fn add_claims(
    io: &mut BlockingIo<'_>,
    config: &LogConfig,
    number: SegmentNumber,
    durable: &mut BTreeMap<Epoch, Sequence>,
) -> Result<(), RecoveryError> {
    let mut add = |epoch, sequence: Sequence| {
        let claim: &mut Sequence = durable.entry(epoch).or_default();
        *claim = sequence.max(*claim);
    };
    if let Footer::Torn(trailer) | Footer::Whole(trailer, _) = read_footer(io, config, number)? {
        add(trailer.epoch, trailer.last_sequence);
    }
    let mut scan = Scan::new(config, number, None);
    let mut next = 1;
    while let Some(record) = scan.find(io, next)? {
        add(record.identity.epoch, record.durable);
        next = end_of(&record);
    }
    Ok(())
}

/// Behind the record, blocks from the segment's start.
pub(super) const fn end_of(record: &Record) -> u32 {
    record.identity.offset_blocks + 1 + record.data_blocks
}

/// Looks for records in a segment.
pub(super) struct Scan<'a> {
    config: &'a LogConfig,
    number: SegmentNumber,
    /// Of the segment; `None`: its header is damaged, and the first record will tell.
    pub(super) epoch: Option<Epoch>,
    window: Window,
}

impl<'a> Scan<'a> {
    pub(super) fn new(config: &'a LogConfig, number: SegmentNumber, epoch: Option<Epoch>) -> Self {
        Self {
            config,
            number,
            epoch,
            window: Window::new(number, config.segment_bytes - TRAILER_BYTES as u64),
        }
    }

    /// The record whose header is at this block, if that is its place. `Err(())` inside: nothing
    /// follows, the segment ends.
    fn header_at(
        &mut self,
        io: &mut BlockingIo<'_>,
        offset_blocks: u32,
    ) -> Result<Result<Option<Record>, ()>, RecoveryError> {
        let Some(block) = self.window.blocks(io, offset_blocks, 1)? else {
            return Ok(Err(()));
        };
        let Ok(record) = Record::parse(block) else {
            return Ok(Ok(None));
        };
        let identity = record.identity;
        let ours = (self.config.pool, self.config.volume, self.number);
        let here = (identity.pool, identity.volume, identity.segment) == ours
            && identity.offset_blocks == offset_blocks
            && self.epoch.is_none_or(|epoch| identity.epoch == epoch)
            && u64::from(end_of(&record)) * BLOCK
                <= self.config.segment_bytes - TRAILER_BYTES as u64;
        if here {
            self.epoch = Some(identity.epoch);
        }
        Ok(Ok(here.then_some(record)))
    }

    pub(super) fn record_at(
        &mut self,
        io: &mut BlockingIo<'_>,
        offset_blocks: u32,
    ) -> Result<Option<Record>, RecoveryError> {
        Ok(self.header_at(io, offset_blocks)?.unwrap_or(None))
    }

    /// The first record at this block or behind it.
    pub(super) fn find(
        &mut self,
        io: &mut BlockingIo<'_>,
        mut offset_blocks: u32,
    ) -> Result<Option<Record>, RecoveryError> {
        loop {
            match self.header_at(io, offset_blocks)? {
                Ok(Some(record)) => return Ok(Some(record)),
                Ok(None) => offset_blocks += 1,
                Err(()) => return Ok(None),
            }
        }
    }

    /// How many of a record's data blocks do not match their checksums.
    pub(super) fn wrong_blocks(
        &mut self,
        io: &mut BlockingIo<'_>,
        record: &Record,
    ) -> Result<usize, RecoveryError> {
        if record.data_blocks == 0 {
            return Ok(0);
        }
        let first = record.identity.offset_blocks + 1;
        let Some(data) = self.window.blocks(io, first, record.data_blocks)? else {
            return Ok(record.data_blocks as usize);
        };
        Ok(data
            .chunks_exact(BLOCK_BYTES)
            .zip(&record.checksums)
            .filter(|(block, checksum)| crc32c(block) != **checksum)
            .count())
    }
}

/// A sliding view of a segment.
struct Window {
    number: SegmentNumber,
    end_bytes: u64,
    buffer: Option<AlignedBuf>,
    start_bytes: u64,
    len: usize,
}

impl Window {
    fn new(number: SegmentNumber, end_bytes: u64) -> Self {
        Self {
            number,
            end_bytes,
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
        if from + len as u64 > self.end_bytes {
            return Ok(None);
        }
        let inside =
            from >= self.start_bytes && from + len as u64 <= self.start_bytes + self.len as u64;
        if !inside {
            // Inside, by the check above.
            let left = self.end_bytes - from;
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
