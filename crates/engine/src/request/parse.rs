//! A chain becomes an action and a place for the answer.
//!
//! Layout is the driver's choice (virtio 1.3, 2.7.4, 5.2.6): header, data and status are byte
//! ranges of the chain, wherever descriptors begin and end. The header is the first 16 readable
//! bytes, the status the last writable byte, data what lies between.

use super::config::{DiskShape, MAX_REQUEST_BYTES, MAX_UNMAP_SECTORS, MAX_UNMAP_SEGMENTS};
use crate::io::IoBuf;
use crate::ring::Chain;
use crate::types::SECTOR_BYTES;

/// Length of the identity GET_ID returns (virtio 1.3, 5.2.6).
pub const ID_BYTES: usize = 20;

const HEADER_BYTES: u64 = 16;
const SEGMENT_BYTES: usize = 16;
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const WRITE_ZEROES_F_UNMAP: u32 = 1;

/// Outcome of a request as the guest sees it (virtio 1.3, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// A part of the volume, in bytes, inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub offset_bytes: u64,
    pub len_bytes: u64,
}

/// What is asked of the volume.
#[derive(Debug)]
pub enum Action {
    Read {
        offset_bytes: u64,
        into: Vec<IoBuf>,
    },
    Write {
        offset_bytes: u64,
        from: Vec<IoBuf>,
    },
    Flush,
    /// Discard (`exact` false) or write-zeroes, one or more ranges, none of them empty.
    Unmap {
        ranges: Vec<Range>,
        exact: bool,
    },
    /// Nothing: the answer is known.
    Done(Status),
}

/// Where the answer goes and how much of the chain it fills.
#[derive(Debug, Clone, Copy)]
pub struct Reply {
    head: u16,
    /// The status byte; none if the driver left no room for one.
    status: Option<IoBuf>,
    /// Writable bytes before the status byte.
    data_bytes: u64,
    /// How many of them, from the first, are written when the request succeeds.
    filled_bytes: u64,
}

#[derive(Debug)]
pub struct Parsed {
    pub action: Action,
    pub reply: Reply,
}

impl Reply {
    /// Index of the chain's head, for the used ring.
    #[must_use]
    pub const fn head(&self) -> u16 {
        self.head
    }

    /// Writes the status byte. Returns the length for the used ring: bytes that are written from
    /// the start of the writable part without a gap (virtio 1.3, 2.7.8.2), so it includes the
    /// status byte only if all data before it is written. The caller of a failed read zeroes its
    /// data first, and says so in `filled`.
    pub fn write(&self, status: Status, filled: bool) -> u32 {
        let Some(byte) = self.status else { return 0 };
        byte.copy_from(&[status as u8]);
        let filled_bytes = if filled { self.filled_bytes } else { 0 };
        // Reads are bounded by MAX_REQUEST_BYTES, the identity by its length.
        if filled_bytes == self.data_bytes {
            filled_bytes as u32 + 1
        } else {
            filled_bytes as u32
        }
    }
}

/// Judges a chain against the disk's shape. `serial`: NUL-padded.
#[must_use]
pub fn parse(chain: &Chain, shape: &DiskShape, serial: &[u8; ID_BYTES]) -> Parsed {
    let data_bytes = chain.writable_bytes().saturating_sub(1);
    let status = chain
        .writable()
        .last()
        .map(|last| last.slice(last.len() - 1, 1));
    let mut reply = Reply {
        head: chain.head(),
        status,
        data_bytes,
        filled_bytes: 0,
    };
    let mut header = [0; HEADER_BYTES as usize];
    let complete = gather(chain.readable(), 0, &mut header) == header.len();
    let action = if complete && status.is_some() {
        judge(chain, header, shape, serial, &mut reply)
    } else {
        Action::Done(Status::IoErr)
    };
    Parsed { action, reply }
}

fn judge(
    chain: &Chain,
    header: [u8; HEADER_BYTES as usize],
    shape: &DiskShape,
    serial: &[u8; ID_BYTES],
    reply: &mut Reply,
) -> Action {
    let kind = u32_at(&header, 0);
    let sector = u64_at(&header, 8);
    let out_bytes = chain.readable_bytes() - HEADER_BYTES;
    let in_bytes = reply.data_bytes;
    match kind {
        T_IN => match data_range(shape, sector, in_bytes) {
            Some(offset_bytes) => {
                reply.filled_bytes = in_bytes;
                Action::Read {
                    offset_bytes,
                    into: cut(chain.writable(), 0, in_bytes),
                }
            }
            None => Action::Done(Status::IoErr),
        },
        T_OUT | T_DISCARD | T_WRITE_ZEROES if shape.read_only => Action::Done(Status::IoErr),
        T_OUT => match data_range(shape, sector, out_bytes) {
            Some(offset_bytes) => Action::Write {
                offset_bytes,
                from: cut(chain.readable(), HEADER_BYTES, out_bytes),
            },
            None => Action::Done(Status::IoErr),
        },
        T_FLUSH => Action::Flush,
        T_GET_ID => {
            let len = in_bytes.min(ID_BYTES as u64);
            scatter(chain.writable(), &serial[..len as usize]);
            reply.filled_bytes = len;
            Action::Done(Status::Ok)
        }
        T_DISCARD => unmap(chain, out_bytes, shape, false),
        T_WRITE_ZEROES => unmap(chain, out_bytes, shape, true),
        _ => Action::Done(Status::Unsupported),
    }
}

/// Byte offset of a transfer, or nothing if it is not whole sectors inside the volume.
fn data_range(shape: &DiskShape, sector: u64, len_bytes: u64) -> Option<u64> {
    let whole = len_bytes.is_multiple_of(SECTOR_BYTES) && len_bytes <= MAX_REQUEST_BYTES;
    whole.then(|| sectors_inside(shape, sector, len_bytes / SECTOR_BYTES))?
}

fn sectors_inside(shape: &DiskShape, sector: u64, sectors: u64) -> Option<u64> {
    let capacity = shape.size_bytes / SECTOR_BYTES;
    if sector > capacity || sectors > capacity - sector {
        return None;
    }
    // No overflow: sector ≤ capacity.
    let offset_bytes = sector * SECTOR_BYTES;
    offset_bytes
        .is_multiple_of(shape.logical_block_bytes.into())
        .then_some(offset_bytes)
}

/// Discard and write-zeroes: all segments are judged before any is carried out
/// (virtio 1.3, 5.2.6.2).
fn unmap(chain: &Chain, out_bytes: u64, shape: &DiskShape, exact: bool) -> Action {
    if out_bytes > u64::from(MAX_UNMAP_SEGMENTS) * SEGMENT_BYTES as u64 {
        return Action::Done(Status::Unsupported);
    }
    if out_bytes == 0 || !out_bytes.is_multiple_of(SEGMENT_BYTES as u64) {
        return Action::Done(Status::IoErr);
    }
    let mut raw = [0; MAX_UNMAP_SEGMENTS as usize * SEGMENT_BYTES];
    let raw = &mut raw[..out_bytes as usize];
    gather(chain.readable(), HEADER_BYTES, raw);
    let known_flags = if exact { WRITE_ZEROES_F_UNMAP } else { 0 };
    let mut ranges = Vec::with_capacity(raw.len() / SEGMENT_BYTES);
    let mut outside = false;
    for segment in raw.chunks_exact(SEGMENT_BYTES) {
        let (sector, sectors, flags) =
            (u64_at(segment, 0), u32_at(segment, 8), u32_at(segment, 12));
        if flags & !known_flags != 0 {
            return Action::Done(Status::Unsupported);
        }
        match sectors_inside(shape, sector, sectors.into()) {
            Some(offset_bytes) if sectors <= MAX_UNMAP_SECTORS => {
                if sectors > 0 {
                    ranges.push(Range {
                        offset_bytes,
                        len_bytes: u64::from(sectors) * SECTOR_BYTES,
                    });
                }
            }
            _ => outside = true,
        }
    }
    match (outside, ranges.is_empty()) {
        (true, _) => Action::Done(Status::IoErr),
        (false, true) => Action::Done(Status::Ok),
        (false, false) => Action::Unmap { ranges, exact },
    }
}

/// The pieces that make up `len_bytes` from `skip_bytes` on; both are inside `pieces`.
fn cut(pieces: &[IoBuf], skip_bytes: u64, len_bytes: u64) -> Vec<IoBuf> {
    let mut out = Vec::with_capacity(pieces.len());
    let (mut skip, mut left) = (skip_bytes, len_bytes);
    for piece in pieces {
        let len = piece.len() as u64;
        if skip >= len {
            skip -= len;
            continue;
        }
        let here = (len - skip).min(left);
        if here == 0 {
            break;
        }
        out.push(piece.slice(skip as usize, here as usize));
        left -= here;
        skip = 0;
    }
    out
}

/// Copies from `pieces`, from `skip_bytes` on, into `to`; returns how much there was.
fn gather(pieces: &[IoBuf], skip_bytes: u64, to: &mut [u8]) -> usize {
    let mut skip = skip_bytes;
    let mut done = 0;
    for piece in pieces {
        let len = piece.len() as u64;
        if skip >= len {
            skip -= len;
            continue;
        }
        let here = (piece.len() - skip as usize).min(to.len() - done);
        piece
            .slice(skip as usize, here)
            .copy_to(&mut to[done..done + here]);
        done += here;
        skip = 0;
        if done == to.len() {
            break;
        }
    }
    done
}

/// Copies `from` to the start of `pieces`, which are large enough.
fn scatter(pieces: &[IoBuf], from: &[u8]) {
    let mut done = 0;
    for piece in pieces {
        let here = piece.len().min(from.len() - done);
        piece.copy_from(&from[done..done + here]);
        done += here;
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}
