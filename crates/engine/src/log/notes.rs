//! Reading notes out of a log's segments while it is recovered or its maps are rebuilt.
//!
//! A footer repeats what records say, not their data, so a note is always read from its own blocks, and
//! verified against the checksums that its record (or footer) has of them. Runs where waiting is allowed.

use std::io;

use crate::crc::crc32c;
use crate::io::BlockingIo;
use crate::segment::{FormatError, Note};
use crate::types::{Address, BLOCK_BYTES};

/// Why a note cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum NoteError {
    #[error("reading the note at {0:?}: {1}")]
    Io(Address, io::Error),
    #[error("the note at {0:?} is damaged: its blocks do not match their checksums")]
    Damaged(Address),
    #[error("the note at {0:?}: {1}")]
    Format(Address, FormatError),
}

/// Reads the note at `position` whose blocks have these checksums, as
/// [`crate::segment::RecordSummary::placed`] tells both.
///
/// # Errors
/// [`NoteError`]; a damaged note is no end of the log, only itself is lost.
pub fn read_note(
    io: &mut BlockingIo<'_>,
    position: Address,
    checksums: &[u32],
) -> Result<Note, NoteError> {
    let len = checksums.len() * BLOCK_BYTES;
    let (buffer, got) = io
        .read(position.segment(), position.byte_offset(), len)
        .map_err(|error| NoteError::Io(position, error))?;
    let bytes = &buffer[..got.min(len)];
    let matches = bytes
        .chunks(BLOCK_BYTES)
        .map(crc32c)
        .eq(checksums.iter().copied());
    if !matches {
        return Err(NoteError::Damaged(position));
    }
    Note::parse(bytes).map_err(|fault| NoteError::Format(position, fault))
}
