//! Copying blocks of a clone's origin into the clone's own log, so that it can do without.
//!
//! Ordering argument: a block is copied only if the map, in the very step in which the copy is appended,
//! still has the address that was read. An address is written once, so the same address means the same
//! contents; whatever a guest wrote meanwhile has another address and is left alone. The copy is then a
//! write of the same contents as any other.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::modify::Pause;
use super::{BLOCK, RequestFailed, Slot, Step, Volume, VolumeOp, Work};
use crate::crc::crc32c;
use crate::io::{AlignedBuf, Io, Op};
use crate::log::Now;
use crate::map::{Extent, Extents, LEAF_BLOCKS};
use crate::types::{Address, BLOCK_BYTES, BlockNumber};

/// Blocks copied in one step, at most.
const STEP_BLOCKS: u32 = 64;

/// A request that copies what a range has in other volumes' segments.
#[derive(Debug)]
pub(super) struct Adopt {
    next: BlockNumber,
    end: BlockNumber,
    copied: Arc<AtomicU64>,
    /// What was read last, until it is appended or found stale.
    read: Option<Foreign>,
}

/// Consecutive blocks in another volume's segment.
#[derive(Debug)]
struct Foreign {
    block: BlockNumber,
    address: Address,
    checksums: Vec<u32>,
    data: AlignedBuf,
}

/// A read of such blocks.
#[derive(Debug)]
pub(super) struct AdoptRead {
    slot: Slot,
    serial: u64,
    blocks: Foreign,
}

impl Adopt {
    pub(super) fn new(offset_bytes: u64, len_bytes: u64, copied: Arc<AtomicU64>) -> Self {
        Self {
            next: BlockNumber(offset_bytes / BLOCK),
            end: BlockNumber((offset_bytes + len_bytes).div_ceil(BLOCK)),
            copied,
            read: None,
        }
    }
}

impl Volume {
    pub(super) fn run_adopt(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        adopt: &mut Adopt,
        now: Now,
    ) -> Step {
        if self.log.is_none() || self.closing {
            return Step::Finish(Err(RequestFailed::NotWritable));
        }
        let mut extents = std::mem::take(&mut self.extents);
        let step = self.adopt_steps(io, slot, adopt, &mut extents, now);
        self.extents = extents;
        step
    }

    fn adopt_steps(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        adopt: &mut Adopt,
        extents: &mut Extents,
        now: Now,
    ) -> Step {
        let most = STEP_BLOCKS.min(self.log_mut().config().max_piece_blocks());
        while adopt.next < adopt.end {
            let block = match self.map.next_mapped(adopt.next, adopt.end) {
                Err(need) => return self.park_for_node(io, slot, need.0),
                Ok(None) => break,
                Ok(Some(block)) => block,
            };
            let leaf_end = (block.0 / LEAF_BLOCKS + 1) * LEAF_BLOCKS;
            let count = (leaf_end.min(adopt.end.0) - block.0).min(most.into()) as u32;
            if let Err(need) = self.map.lookup(block, count, extents) {
                return self.park_for_node(io, slot, need.0);
            }
            let Some(&Extent::Mapped {
                block,
                count,
                address,
                first_crc,
            }) = extents.extents.first()
            else {
                adopt.next = block.plus(1);
                continue;
            };
            if self.space.has(address.segment()) {
                adopt.next = block.plus(count.into());
                continue;
            }
            let checksums = &extents.checksums[first_crc..first_crc + count as usize];
            let held = adopt.read.take_if(|read| {
                read.block == block && read.address == address && read.checksums == checksums
            });
            let Some(held) = held else {
                let blocks = Foreign {
                    block,
                    address,
                    checksums: checksums.to_vec(),
                    data: AlignedBuf::new(count as usize * BLOCK_BYTES),
                };
                return self.read_foreign(io, slot, blocks);
            };
            if !self.is_within_limit(count) {
                return Step::Finish(Err(RequestFailed::NoSpace));
            }
            if let Err(pause) = self.prepare(io, slot, count, now) {
                // It is still at hand when there is room.
                adopt.read = Some(held);
                return match pause {
                    Pause::Park(step) => step,
                    Pause::Fail(why) => Step::Finish(Err(why)),
                };
            }
            self.append_foreign(&held, now);
            adopt
                .copied
                .fetch_add(u64::from(count) * BLOCK, Ordering::Relaxed);
            adopt.next = block.plus(count.into());
        }
        Step::Changed
    }

    fn append_foreign(&mut self, held: &Foreign, now: Now) {
        let mut checksums = std::mem::take(&mut self.checksums);
        checksums.clear();
        let count = held.checksums.len() as u32;
        let address = self
            .log_mut()
            .append_data(held.block, count, now, &mut checksums, |data| {
                data.copy_from_slice(&held.data);
            });
        self.map
            .insert(held.block, address, &checksums, &mut self.displaced)
            .expect("the leaf was looked up in this very step");
        self.space
            .displace(&mut self.displaced, self.history.parent);
        self.space.revive(address.segment(), u64::from(count));
        self.checksums = checksums;
    }

    fn read_foreign(&mut self, io: &mut dyn Io, slot: Slot, blocks: Foreign) -> Step {
        let serial = self.begin_read();
        // SAFETY: the buffer travels with its operation in `tokens` until it completes.
        let bufs = vec![unsafe { blocks.data.io_buf() }];
        let (segment, offset_bytes) = (blocks.address.segment(), blocks.address.byte_offset());
        let what = VolumeOp::Adopt(Box::new(AdoptRead {
            slot,
            serial,
            blocks,
        }));
        self.submit_op(io, segment, Op::Read { offset_bytes, bufs }, what);
        Step::Parked
    }

    pub(super) fn adopt_read_done(
        &mut self,
        io: &mut dyn Io,
        op: AdoptRead,
        result: io::Result<usize>,
        now: Now,
    ) {
        let AdoptRead {
            slot,
            serial,
            blocks,
        } = op;
        self.end_read(serial);
        let problem = match result {
            Ok(got) if got >= blocks.data.len() => blocks
                .data
                .chunks_exact(BLOCK_BYTES)
                .zip(&blocks.checksums)
                .position(|(data, wanted)| crc32c(data) != *wanted)
                .map(|index| (index, "does not match its checksum".to_owned())),
            Ok(got) => Some((got / BLOCK_BYTES, "is missing from its segment".to_owned())),
            Err(error) => Some((0, format!("cannot be read: {error}"))),
        };
        if let Some((index, what)) = problem {
            let block = blocks.block.plus(index as u64);
            let address = blocks.address.plus(index as u32);
            self.report_damage(block, 1, address, &what);
            return self.fail_parked(slot, RequestFailed::Damaged);
        }
        if let Some(Work::Adopt(adopt)) = self.running[slot].as_mut().map(|r| &mut r.work) {
            adopt.read = Some(blocks);
        }
        self.run(io, slot, now);
    }
}
