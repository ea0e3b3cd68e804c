//! The bytes of segments: headers, records, footers. `docs/format.md` is the specification.
//!
//! Nothing here does I/O. Everything that is parsed comes from a disk and may be anything: parsing
//! checks every length before it is used, never panics, and says which field is wrong.

mod footer;
mod header;
mod note;
mod record;
mod summaries;

pub use footer::{FooterBuilder, PlacedEntry, RecordSummary, TRAILER_BYTES, Trailer};
pub use header::{SegmentHeader, SegmentKind};
pub use note::{
    MAX_NOTE_BLOCKS, MAX_NOTE_PAYLOAD_BYTES, MAX_NOTE_UNMAPS, MAX_SNAPSHOT_NAME_BYTES,
    MAX_STATE_BYTES, MAX_STATE_PARTS, Note, NotedUnmap, StateParts,
};
pub use record::{
    ENTRY_BYTES, Entry, EntryKind, MAX_RECORD_BLOCKS, MAX_RECORD_ENTRIES, OpenRecord,
    RECORD_ENTRIES_OFFSET, Record, RecordIdentity, fits_in_record,
};

pub use summaries::{Summaries, SummaryReader};

use crate::crc::crc32c;

/// Why bytes are not the structure they were taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("there is no {0} here (its magic is missing)")]
    Magic(&'static str),
    #[error("the {0} has format version {1}, and this vhostd knows only version {2}")]
    Version(&'static str, u16, u16),
    #[error("the {0} does not match its checksum")]
    Checksum(&'static str),
    #[error("the {structure}'s field '{field}' is out of its range or not that of this place")]
    Field {
        structure: &'static str,
        field: &'static str,
    },
}

/// The only format version there is of the structures in segments.
pub(crate) const VERSION: u16 = 1;

pub(crate) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

/// `N` bytes from `at`; the callers have checked the structure's length.
pub(crate) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// CRC-32C of a structure with its 4-byte checksum field at `field` taken as zero.
pub(crate) fn checksum_without(bytes: &[u8], field: usize) -> u32 {
    let mut copy = [0u8; crate::types::BLOCK_BYTES];
    let copy = &mut copy[..bytes.len()];
    copy.copy_from_slice(bytes);
    copy[field..field + 4].fill(0);
    crc32c(copy)
}

/// Checks magic, version ([`VERSION`]) and checksum of a one-block structure.
pub(crate) fn check_block(
    bytes: &[u8],
    magic: &[u8; 4],
    structure: &'static str,
    checksum_at: usize,
) -> Result<(), FormatError> {
    check_block_of(bytes, magic, structure, checksum_at, VERSION)
}

/// As [`check_block`], for a structure of another version.
pub(crate) fn check_block_of(
    bytes: &[u8],
    magic: &[u8; 4],
    structure: &'static str,
    checksum_at: usize,
    version: u16,
) -> Result<(), FormatError> {
    if bytes.len() != crate::types::BLOCK_BYTES || bytes[..4] != magic[..] {
        return Err(FormatError::Magic(structure));
    }
    if checksum_without(bytes, checksum_at) != get_u32(bytes, checksum_at) {
        return Err(FormatError::Checksum(structure));
    }
    match get_u16(bytes, 4) {
        found if found == version => Ok(()),
        found => Err(FormatError::Version(structure, found, version)),
    }
}
