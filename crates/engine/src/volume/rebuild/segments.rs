//! Reading log segments that may be damaged, one at a time, for what their records say.
//!
//! The footer speaks for its segment. Without a readable one, records are taken by their headers:
//! - What was durable once (a sealed segment, or one of a newer opening, comes behind it, or a record says
//!   so) is taken whether its data matches or not: that is damaged, or it was punched since nothing
//!   reached it. Behind a header that cannot be read the next one is searched.
//! - Behind that, records are valid only with their data, and each follows on the one before, as in
//!   recovery: what is taken is a prefix.
//!
//! Nothing is changed. Damage of data blocks is not looked for: a read will tell it.

use std::io;

use super::RebuildError;
use crate::crc::crc32c;
use crate::io::{AlignedBuf, BlockingIo};
use crate::segment::{Record, RecordSummary, SegmentHeader, SegmentKind, TRAILER_BYTES, Trailer};
use crate::types::{BLOCK_BYTES, Epoch, SegmentNumber, Sequence, Uuid};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// How much of a segment without a footer is read at a time.
const SCAN_BYTES: usize = 4 << 20;

/// Whose segments these are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub pool: Uuid,
    pub volume: Uuid,
    pub segment_bytes: u64,
}

/// The end of the chain of records so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chain {
    pub sequence: Sequence,
    pub checksum: u32,
}

/// What a segment says without its records being read.
#[derive(Debug)]
pub(super) struct Glance {
    pub number: SegmentNumber,
    /// 0: nothing in it that is readable tells.
    pub epoch: Epoch,
    pub trailer: Option<Trailer>,
}

/// What a segment's records say.
#[derive(Debug)]
pub(super) struct Contents {
    pub records: Vec<RecordSummary>,
    /// Damage, as sentences.
    pub lost: Vec<String>,
    /// Places where records cannot be read.
    pub lost_records: u32,
    /// The log goes on behind it. False: it ended in this segment.
    pub goes_on: bool,
}

fn failed(segment: SegmentNumber) -> impl FnOnce(io::Error) -> RebuildError {
    move |error| RebuildError::Io {
        what: "reading",
        segment,
        error,
    }
}

/// Reads header and trailer.
pub(super) fn glance(
    io: &mut BlockingIo<'_>,
    owner: &Owner,
    number: SegmentNumber,
) -> Result<Glance, RebuildError> {
    let at = owner.segment_bytes - TRAILER_BYTES as u64;
    let trailer = match io.read(number, at, TRAILER_BYTES) {
        Ok((block, got)) => {
            Trailer::parse(&block[..got.min(TRAILER_BYTES)], owner.segment_bytes).ok()
        }
        Err(error) if is_bad_sector(&error) => None,
        Err(error) => return Err(failed(number)(error)),
    };
    let trailer =
        trailer.filter(|t| (t.pool, t.volume, t.segment) == (owner.pool, owner.volume, number));
    let header = match io.read(number, 0, BLOCK_BYTES) {
        Ok((block, got)) => SegmentHeader::parse(&block[..got.min(BLOCK_BYTES)]).ok(),
        Err(error) if is_bad_sector(&error) => None,
        Err(error) => return Err(failed(number)(error)),
    };
    let header = header.filter(|h| {
        h.kind == SegmentKind::Log
            && (h.pool, h.volume, h.number) == (owner.pool, owner.volume, number)
    });
    let epoch = trailer.map(|t| t.epoch).or(header.map(|h| h.epoch));
    Ok(Glance {
        number,
        epoch: epoch.unwrap_or_default(),
        trailer,
    })
}

/// A device that cannot give these bytes, and can give others.
fn is_bad_sector(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// Up to which record the log was durable, as the records of a segment without a footer tell.
pub(super) fn durable_sequence(
    io: &mut BlockingIo<'_>,
    owner: &Owner,
    glance: &Glance,
) -> Result<Sequence, RebuildError> {
    let mut scan = Scan::new(owner, glance);
    let mut durable = Sequence::default();
    let mut at = 1;
    while at < scan.end_blocks {
        at += match scan.record(io, at)? {
            Some(record) => {
                scan.epoch = record.identity.epoch;
                durable = durable.max(record.durable);
                1 + record.data_blocks
            }
            None => 1,
        };
    }
    Ok(durable)
}

/// Reads what the records of a segment say. `durable`: the log was durable up to this record. `chain`:
/// the end of the log before the segment.
pub(super) fn read(
    io: &mut BlockingIo<'_>,
    owner: &Owner,
    glance: &Glance,
    durable: Sequence,
    chain: Chain,
) -> Result<Contents, RebuildError> {
    let number = glance.number;
    let mut lost = Vec::new();
    if let Some(trailer) = &glance.trailer {
        let len = trailer.body_bytes as usize;
        let read = io.read(number, u64::from(trailer.body_offset), len.max(1));
        match read {
            Ok((body, got)) => {
                if let Ok(records) = trailer.parse_body(&body[..got.min(len)]) {
                    return Ok(Contents {
                        records,
                        lost,
                        lost_records: 0,
                        goes_on: true,
                    });
                }
            }
            Err(error) if is_bad_sector(&error) => {}
            Err(error) => return Err(failed(number)(error)),
        }
        lost.push(format!(
            "segment {number} has a damaged footer; its records were read instead"
        ));
    }
    let told = lost.len();
    let records = Scan::new(owner, glance).run(io, durable, chain, &mut lost)?;
    let last = records.last().map(|r| r.sequence);
    if let Some(trailer) = &glance.trailer
        && last.is_none_or(|last| last < trailer.last_sequence)
    {
        lost.push(format!(
            "segment {number}: the records up to number {} at its end cannot be read",
            trailer.last_sequence
        ));
    }
    Ok(Contents {
        lost_records: (lost.len() - told) as u32,
        goes_on: !records.is_empty() || chain.sequence < durable,
        records,
        lost,
    })
}

struct Scan<'a> {
    owner: &'a Owner,
    number: SegmentNumber,
    /// 0: that of the first record that can be read.
    epoch: Epoch,
    end_blocks: u32,
    window: Window,
}

impl<'a> Scan<'a> {
    fn new(owner: &'a Owner, glance: &Glance) -> Self {
        let segment_blocks = (owner.segment_bytes / BLOCK) as u32;
        Self {
            owner,
            number: glance.number,
            epoch: glance.epoch,
            // What lies behind is the footer.
            end_blocks: glance.trailer.map_or(segment_blocks, |t| t.end_blocks),
            window: Window::new(glance.number, owner.segment_bytes),
        }
    }

    fn run(
        &mut self,
        io: &mut BlockingIo<'_>,
        durable: Sequence,
        mut chain: Chain,
        lost: &mut Vec<String>,
    ) -> Result<Vec<RecordSummary>, RebuildError> {
        let mut records: Vec<RecordSummary> = Vec::new();
        let mut at = 1;
        let mut bad_from: Option<u32> = None;
        while at < self.end_blocks {
            let record = match self.record(io, at)? {
                // Data of a guest may look like a record; it is not the next one.
                Some(record) if record.identity.sequence <= chain.sequence => None,
                Some(record) if record.identity.sequence <= durable => Some(record),
                Some(record) if self.is_next(io, at, &record, durable, chain)? => Some(record),
                _ => None,
            };
            let Some(record) = record else {
                if chain.sequence >= durable {
                    break;
                }
                bad_from.get_or_insert(at);
                at += 1;
                continue;
            };
            if let Some(first) = bad_from.take() {
                lost.push(self.lost_records(first, at));
            }
            self.epoch = record.identity.epoch;
            chain = Chain {
                sequence: record.identity.sequence,
                checksum: record.header_checksum,
            };
            at += 1 + record.data_blocks;
            records.push(RecordSummary::from(record));
        }
        // Behind the last record there is nothing, or the footer.
        if let Some(first) = bad_from
            && self.has_magic(io, first)?
        {
            lost.push(self.lost_records(first, self.end_blocks));
        }
        Ok(records)
    }

    /// A record that nothing says was durable: is it whole, and the one that follows?
    fn is_next(
        &mut self,
        io: &mut BlockingIo<'_>,
        at: u32,
        record: &Record,
        durable: Sequence,
        chain: Chain,
    ) -> Result<bool, RebuildError> {
        let identity = &record.identity;
        let follows = if chain.sequence >= durable && chain.sequence.0 > 0 {
            identity.sequence == chain.sequence.plus(1)
                && identity.previous_checksum == chain.checksum
        } else {
            // The one before it is damaged; or all before are gone, since nothing in them was live.
            durable.0 == 0 || identity.sequence == durable.plus(1)
        };
        Ok(follows && self.data_matches(io, at, record)?)
    }

    fn lost_records(&self, first: u32, end: u32) -> String {
        format!(
            "segment {}: records at blocks {first} to {} cannot be read; what they held is in no map",
            self.number,
            end - 1
        )
    }

    fn has_magic(&mut self, io: &mut BlockingIo<'_>, at: u32) -> Result<bool, RebuildError> {
        let block = self.window.blocks(io, at, 1)?;
        Ok(block.is_some_and(|block| block.starts_with(b"VHRC")))
    }

    /// The record whose header is at this block.
    fn record(&mut self, io: &mut BlockingIo<'_>, at: u32) -> Result<Option<Record>, RebuildError> {
        let Some(block) = self.window.blocks(io, at, 1)? else {
            return Ok(None);
        };
        let Ok(record) = Record::parse(block) else {
            return Ok(None);
        };
        let identity = &record.identity;
        let here = (
            identity.pool,
            identity.volume,
            identity.segment,
            identity.offset_blocks,
        ) == (self.owner.pool, self.owner.volume, self.number, at);
        let same_epoch = self.epoch == Epoch::default() || identity.epoch == self.epoch;
        Ok((here && same_epoch).then_some(record))
    }

    fn data_matches(
        &mut self,
        io: &mut BlockingIo<'_>,
        at: u32,
        record: &Record,
    ) -> Result<bool, RebuildError> {
        if record.data_blocks == 0 {
            return Ok(true);
        }
        let data = self.window.blocks(io, at + 1, record.data_blocks)?;
        Ok(data.is_some_and(|data| {
            data.chunks_exact(BLOCK_BYTES)
                .map(crc32c)
                .eq(record.checksums.iter().copied())
        }))
    }
}

/// A sliding view of a segment. A part that the device cannot read is read block by block, and blocks
/// that it cannot give at all read as zeroes, which are no structure.
struct Window {
    number: SegmentNumber,
    segment_bytes: u64,
    buffer: Vec<u8>,
    start_bytes: u64,
}

impl Window {
    const fn new(number: SegmentNumber, segment_bytes: u64) -> Self {
        Self {
            number,
            segment_bytes,
            buffer: Vec::new(),
            start_bytes: 0,
        }
    }

    /// Blocks `first..first + count`, or `None` if the segment ends before.
    fn blocks(
        &mut self,
        io: &mut BlockingIo<'_>,
        first: u32,
        count: u32,
    ) -> Result<Option<&[u8]>, RebuildError> {
        let (from, len) = (u64::from(first) * BLOCK, count as usize * BLOCK_BYTES);
        if from + len as u64 > self.segment_bytes {
            return Ok(None);
        }
        let end = self.start_bytes + self.buffer.len() as u64;
        if from < self.start_bytes || from + len as u64 > end {
            self.fill(io, from, len.max(SCAN_BYTES))?;
        }
        let at = (from - self.start_bytes) as usize;
        Ok(self.buffer.get(at..at + len))
    }

    fn fill(&mut self, io: &mut BlockingIo<'_>, from: u64, len: usize) -> Result<(), RebuildError> {
        self.start_bytes = from;
        self.buffer.clear();
        match io.read(self.number, from, len) {
            Ok((buffer, got)) => self.take(&buffer, got.min(len)),
            Err(error) if is_bad_sector(&error) => {
                let end = self.segment_bytes.min(from + len as u64);
                for at in (from..end).step_by(BLOCK_BYTES) {
                    match io.read(self.number, at, BLOCK_BYTES) {
                        Ok((block, got)) => self.take(&block, got.min(BLOCK_BYTES)),
                        Err(error) if is_bad_sector(&error) => {
                            self.buffer.resize(self.buffer.len() + BLOCK_BYTES, 0);
                        }
                        Err(error) => return Err(failed(self.number)(error)),
                    }
                }
            }
            Err(error) => return Err(failed(self.number)(error)),
        }
        Ok(())
    }

    fn take(&mut self, buffer: &AlignedBuf, len: usize) {
        self.buffer.extend_from_slice(&buffer[..len]);
    }
}
