//! Reads: from the staging ring, or straight from a segment into the guest's memory.
//!
//! Every block is verified before the request finishes. A block that does not match is read again into
//! private memory (the guest may have scribbled on its buffer meanwhile, and a first read can be
//! bad); if it does not match there either, the request fails and the place is reported.

use std::io;

use super::{
    BLOCK, RequestFailed, Slot, Step, Volume, VolumeEvent, VolumeOp, Work, bufs_len, slice_bufs,
};
use crate::crc::crc32c;
use crate::io::{AlignedBuf, Io, IoBuf, Op};
use crate::map::Extent;
use crate::types::{Address, BLOCK_BYTES, BlockNumber};

/// A read request under way.
#[derive(Debug)]
pub(super) struct ReadState {
    offset_bytes: u64,
    into: Vec<IoBuf>,
    /// Operations that have not completed.
    in_flight: u32,
    failed: Option<RequestFailed>,
}

impl ReadState {
    pub(super) const fn new(offset_bytes: u64, into: Vec<IoBuf>) -> Self {
        Self {
            offset_bytes,
            into,
            in_flight: 0,
            failed: None,
        }
    }
}

/// One contiguous run of blocks, being read for a request.
#[derive(Debug)]
pub(super) struct ReadOp {
    slot: Slot,
    serial: u64,
    address: Address,
    block: BlockNumber,
    checksums: Vec<u32>,
    /// Where the bytes go.
    into: Vec<IoBuf>,
    /// Bytes of the first block that are not wanted.
    skip_bytes: usize,
    /// Read here first, copied from here: the run's ends are not block-aligned, or it is the second
    /// try.
    private: Option<AlignedBuf>,
    /// It did not match before.
    again: bool,
}

impl ReadOp {
    /// Index of the first block that does not match its checksum.
    fn first_mismatch(&self) -> Option<usize> {
        match &self.private {
            Some(buffer) => {
                let blocks = buffer.chunks_exact(BLOCK_BYTES).map(crc32c);
                blocks
                    .zip(&self.checksums)
                    .position(|(got, wanted)| got != *wanted)
            }
            None => first_mismatch(&self.into, &self.checksums),
        }
    }
}

/// Verifies blocks that lie back to back in a scatter/gather list.
fn first_mismatch(bufs: &[IoBuf], checksums: &[u32]) -> Option<usize> {
    let mut scratch = [0u8; BLOCK_BYTES];
    let (mut buf, mut at) = (0, 0);
    checksums.iter().position(|wanted| {
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            let take = (bufs[buf].len() - at).min(BLOCK_BYTES - filled);
            // Copied out: guest memory is never a Rust reference, and the copy stays in the cache.
            bufs[buf]
                .slice(at, take)
                .copy_to(&mut scratch[filled..filled + take]);
            filled += take;
            at += take;
            if at == bufs[buf].len() {
                (buf, at) = (buf + 1, 0);
            }
        }
        crc32c(&scratch) != *wanted
    })
}

impl Volume {
    pub(super) fn run_read(&mut self, io: &mut dyn Io, slot: Slot, read: &mut ReadState) -> Step {
        let len = bufs_len(&read.into);
        if len == 0 {
            return Step::Finish(Ok(()));
        }
        let first = BlockNumber(read.offset_bytes / BLOCK);
        let end = (read.offset_bytes + len as u64).div_ceil(BLOCK);
        let mut extents = std::mem::take(&mut self.extents);
        let looked_up = self.map.lookup(first, (end - first.0) as u32, &mut extents);
        let step = match looked_up {
            Err(need) => self.park_for_node(io, slot, need.0),
            Ok(()) => {
                self.stats.read_bytes += len as u64;
                for extent in &extents.extents {
                    self.read_extent(io, slot, read, extent, &extents.checksums);
                }
                if read.in_flight > 0 {
                    Step::Parked
                } else {
                    Step::Finish(read.failed.map_or(Ok(()), Err))
                }
            }
        };
        self.extents = extents;
        step
    }

    /// Serves the part of a request that an extent covers, or starts to.
    fn read_extent(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        read: &mut ReadState,
        extent: &Extent,
        checksums: &[u32],
    ) {
        let (block, count) = match *extent {
            Extent::Hole { block, count } | Extent::Mapped { block, count, .. } => (block, count),
        };
        // The request's bytes in this extent.
        let request_end = read.offset_bytes + bufs_len(&read.into) as u64;
        let from = read.offset_bytes.max(block.0 * BLOCK);
        let to = request_end.min((block.0 + u64::from(count)) * BLOCK);
        let into = slice_bufs(
            &read.into,
            (from - read.offset_bytes) as usize,
            (to - from) as usize,
        );
        let Extent::Mapped {
            address, first_crc, ..
        } = *extent
        else {
            return into.iter().for_each(IoBuf::zero);
        };
        let checksums = &checksums[first_crc..first_crc + count as usize];
        let skip_bytes = (from - block.0 * BLOCK) as usize;
        let staged = self.log.as_ref().and_then(|log| log.staged(address, count));
        if let Some(data) = staged {
            let matches = data
                .chunks_exact(BLOCK_BYTES)
                .map(crc32c)
                .eq(checksums.iter().copied());
            if matches {
                return scatter(&data[skip_bytes..], &into);
            }
            read.failed = Some(RequestFailed::Damaged);
            return self.report_damage(block, u64::from(count), address, "in the staging ring");
        }
        let aligned = skip_bytes == 0 && to == (block.0 + u64::from(count)) * BLOCK;
        read.in_flight += 1;
        let op = ReadOp {
            slot,
            serial: self.begin_read(),
            address,
            block,
            checksums: checksums.to_vec(),
            into,
            skip_bytes,
            private: (!aligned).then(|| AlignedBuf::new(count as usize * BLOCK_BYTES)),
            again: false,
        };
        self.submit_read(io, op);
    }

    /// Counts a read of a data block in: segments removed from now on wait for it.
    pub(super) fn begin_read(&mut self) -> u64 {
        self.next_read += 1;
        self.reads_in_flight.insert(self.next_read);
        self.next_read
    }

    pub(super) fn end_read(&mut self, serial: u64) {
        self.reads_in_flight.remove(&serial);
    }

    fn submit_read(&mut self, io: &mut dyn Io, op: ReadOp) {
        let bufs = match &op.private {
            // SAFETY: the buffer travels with `op` in `tokens` until the operation completes.
            Some(buffer) => vec![unsafe { buffer.io_buf() }],
            None => op.into.clone(),
        };
        let (segment, offset_bytes) = (op.address.segment(), op.address.byte_offset());
        let what = VolumeOp::Read(Box::new(op));
        self.submit_op(io, segment, Op::Read { offset_bytes, bufs }, what);
    }

    pub(super) fn read_done(&mut self, io: &mut dyn Io, mut op: ReadOp, result: io::Result<usize>) {
        let wanted = op.checksums.len() * BLOCK_BYTES;
        let problem = match result {
            Ok(got) if got >= wanted => op
                .first_mismatch()
                .map(|block| (block, "does not match its checksum".to_owned())),
            Ok(got) => Some((got / BLOCK_BYTES, "is missing from its segment".to_owned())),
            Err(error) => Some((0, format!("cannot be read: {error}"))),
        };
        let result = match problem {
            None => {
                if let Some(buffer) = &op.private {
                    scatter(&buffer[op.skip_bytes..], &op.into);
                }
                Ok(())
            }
            Some(_) if !op.again => {
                op.again = true;
                op.private.get_or_insert_with(|| AlignedBuf::new(wanted));
                return self.submit_read(io, op);
            }
            Some((index, what)) => {
                let block = op.block.plus(index as u64);
                self.report_damage(block, 1, op.address.plus(index as u32), &what);
                Err(RequestFailed::Damaged)
            }
        };
        self.end_read(op.serial);
        self.finish_read_part(op.slot, result);
    }

    fn finish_read_part(&mut self, slot: Slot, result: Result<(), RequestFailed>) {
        let Some(Work::Read(read)) = self.running[slot].as_mut().map(|r| &mut r.work) else {
            return;
        };
        read.in_flight -= 1;
        if let Err(why) = result {
            read.failed = Some(why);
        }
        if read.in_flight == 0 {
            let result = read.failed.map_or(Ok(()), Err);
            if let Some(running) = self.running[slot].take() {
                self.finish(running.id, result);
                self.free_slots.push(slot);
            }
        }
    }

    pub(super) fn report_damage(
        &mut self,
        block: BlockNumber,
        count: u64,
        address: Address,
        what: &str,
    ) {
        self.stats.checksum_errors += 1;
        self.events.push(VolumeEvent::Corruption {
            offset_bytes: block.0 * BLOCK,
            len_bytes: count * BLOCK,
            segment: address.segment(),
            reason: format!("block {block} at {address:?} {what}"),
        });
    }
}

/// Copies the start of `data` into a scatter/gather list, all of it.
fn scatter(mut data: &[u8], into: &[IoBuf]) {
    for buf in into {
        let (part, rest) = data.split_at(buf.len());
        buf.copy_from(part);
        data = rest;
    }
}
