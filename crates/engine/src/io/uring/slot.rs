//! One operation on its way through the kernel: what to ask for next, and what an answer means.
//!
//! Unsafe here: taking over descriptors that openat returned.

use std::collections::VecDeque;
use std::ffi::CString;
use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{opcode, squeue};

use super::super::{IoBuf, Target, Token};
use crate::device::{Access, DirectoryDevice, SegmentFile};
use crate::types::BLOCK_BYTES;

/// Most buffers one readv or writev takes (IOV_MAX); longer lists are carried on.
const MAX_BUFS: usize = 1024;
/// Most bytes one read or write is asked for; longer ones are carried on.
const MAX_TRANSFER_BYTES: usize = 1 << 30;
/// How often an operation is repeated after EINTR or EAGAIN before that is its error.
const MAX_RETRIES: u16 = 1000;

pub(super) struct Slot {
    pub(super) token: Token,
    pub(super) target: Target,
    pub(super) work: Work,
    pub(super) stage: Stage,
    pub(super) retries: u16,
}

pub(super) enum Stage {
    /// The device is kept for its directory's descriptor.
    Opening {
        path: CString,
        access: Access,
        device: Arc<DirectoryDevice>,
    },
    Running(Arc<SegmentFile>),
    Helped,
}

pub(super) enum Work {
    Read(Transfer),
    Write {
        transfer: Transfer,
        direct: bool,
    },
    /// `writes`: those of the file that the sync covers.
    Sync {
        writes: u64,
    },
    Reserve {
        offset_bytes: u64,
        len_bytes: u64,
    },
    /// The first range is the next; each is a call of its own, because a hole keeps every other
    /// user of the file waiting while it is punched.
    Release(VecDeque<Range<u64>>),
    Helped,
}

/// What of a read or write remains to be done.
pub(super) struct Transfer {
    offset_bytes: u64,
    bufs: Vec<IoBuf>,
    /// Buffers before this one are done.
    first: usize,
    done_bytes: usize,
    left_bytes: usize,
}

pub(super) enum Step {
    /// Issue the slot again.
    Again,
    Done(io::Result<usize>),
}

impl Slot {
    pub(super) fn entry(&mut self) -> squeue::Entry {
        let file = match &self.stage {
            Stage::Opening {
                path,
                access,
                device,
            } => {
                let (directory, _, flags) = device.open_arguments(self.target.segment, *access);
                return opcode::OpenAt::new(Fd(directory), path.as_ptr())
                    .flags(flags)
                    .build();
            }
            Stage::Running(file) => file,
            Stage::Helped => return opcode::Nop::new().build(),
        };
        let fd = Fd(file.raw_fd());
        match &mut self.work {
            Work::Read(transfer) => match transfer.next() {
                [one] => opcode::Read::new(fd, one.ptr(), transfer_len(one))
                    .offset(transfer.offset_bytes)
                    .build(),
                bufs => opcode::Readv::new(fd, bufs.as_ptr().cast(), bufs.len() as u32)
                    .offset(transfer.offset_bytes)
                    .build(),
            },
            Work::Write { transfer, .. } => match transfer.next() {
                [one] => opcode::Write::new(fd, one.ptr(), transfer_len(one))
                    .offset(transfer.offset_bytes)
                    .build(),
                bufs => opcode::Writev::new(fd, bufs.as_ptr().cast(), bufs.len() as u32)
                    .offset(transfer.offset_bytes)
                    .build(),
            },
            Work::Sync { writes } => {
                *writes = file.writes();
                opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build()
            }
            // The length of a segment tells how far it was written; never longer.
            Work::Reserve {
                offset_bytes,
                len_bytes,
            } => opcode::Fallocate::new(fd, *len_bytes)
                .offset(*offset_bytes)
                .mode(libc::FALLOC_FL_KEEP_SIZE)
                .build(),
            Work::Release(ranges) => match ranges.front() {
                Some(range) => opcode::Fallocate::new(fd, range.end - range.start)
                    .offset(range.start)
                    .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                    .build(),
                None => opcode::Nop::new().build(),
            },
            Work::Helped => opcode::Nop::new().build(),
        }
    }

    /// What follows from the kernel's result for the slot.
    pub(super) fn advance(&mut self, result: i32) -> Step {
        if matches!(-result, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES {
            self.retries += 1;
            return Step::Again;
        }
        if let Stage::Opening { access, device, .. } = &self.stage {
            if matches!(-result, libc::EMFILE | libc::ENFILE) && self.retries < MAX_RETRIES {
                // Other devices and guests took what the cache was sized for.
                self.retries = MAX_RETRIES;
                device.close_idle_files();
                return Step::Again;
            }
            if result < 0 {
                return Step::failed(result);
            }
            // SAFETY: the kernel has just opened this descriptor for us alone.
            let fd = unsafe { OwnedFd::from_raw_fd(result) };
            let file = device.adopt_file(self.target.segment, *access, fd);
            self.stage = Stage::Running(file);
            return Step::Again;
        }
        let Stage::Running(file) = &self.stage else {
            return Step::Done(Err(io::Error::other("a completion nobody asked for")));
        };
        if result == -libc::EOPNOTSUPP && self.work.is_optional() {
            return Step::Done(Ok(0));
        }
        match &mut self.work {
            Work::Write { transfer, .. } if result < 0 => {
                // What was transferred before the error is in the file, and wants a sync.
                if transfer.done_bytes > 0 {
                    file.note_write();
                }
                Step::failed(result)
            }
            _ if result < 0 => Step::failed(result),
            Work::Read(transfer) => {
                // Nothing more to read: the end of the segment.
                if result == 0 || transfer.advance(result as usize) {
                    return Step::Done(Ok(transfer.done_bytes));
                }
                Step::Again
            }
            Work::Write { transfer, direct } => {
                let mut count = result as usize;
                if *direct && count < transfer.left_bytes {
                    // The rest has to be aligned as well, so the broken block is written again.
                    count -= count % BLOCK_BYTES;
                }
                if count == 0 {
                    return Step::Done(Err(io::ErrorKind::WriteZero.into()));
                }
                if transfer.advance(count) {
                    file.note_write();
                    return Step::Done(Ok(transfer.done_bytes));
                }
                Step::Again
            }
            Work::Sync { writes } => {
                file.note_sync(*writes);
                Step::Done(Ok(0))
            }
            Work::Release(ranges) => {
                ranges.pop_front();
                if ranges.is_empty() {
                    return Step::Done(Ok(0));
                }
                // Interruptions are counted for each range.
                self.retries = 0;
                Step::Again
            }
            Work::Reserve { .. } | Work::Helped => Step::Done(Ok(0)),
        }
    }
}

impl Step {
    fn failed(result: i32) -> Self {
        Self::Done(Err(io::Error::from_raw_os_error(-result)))
    }
}

impl Work {
    pub(super) fn release(ranges: Vec<Range<u64>>) -> Self {
        let mut ranges = VecDeque::from(ranges);
        ranges.retain(|range| !range.is_empty());
        Self::Release(ranges)
    }

    /// Whether a file system that cannot do it does no harm. Space that is not given back is not
    /// wrong, but reads of it have to yield zeroes, so a hole is not optional.
    const fn is_optional(&self) -> bool {
        matches!(self, Self::Reserve { .. })
    }

    pub(super) fn is_nothing(&self) -> bool {
        match self {
            Self::Read(transfer) | Self::Write { transfer, .. } => transfer.left_bytes == 0,
            Self::Reserve { len_bytes, .. } => *len_bytes == 0,
            Self::Release(ranges) => ranges.is_empty(),
            Self::Sync { .. } | Self::Helped => false,
        }
    }
}

impl Transfer {
    pub(super) fn new(offset_bytes: u64, mut bufs: Vec<IoBuf>) -> Self {
        bufs.retain(|buf| !buf.is_empty());
        let left_bytes = bufs.iter().map(IoBuf::len).sum();
        Self {
            offset_bytes,
            bufs,
            first: 0,
            done_bytes: 0,
            left_bytes,
        }
    }

    /// The buffers for the next call to the kernel.
    fn next(&self) -> &[IoBuf] {
        let end = self.bufs.len().min(self.first + MAX_BUFS);
        &self.bufs[self.first..end]
    }

    /// Notes that `count` bytes were transferred; tells whether that was all.
    fn advance(&mut self, count: usize) -> bool {
        assert!(count <= self.left_bytes, "more bytes than asked for");
        self.offset_bytes += count as u64;
        self.done_bytes += count;
        self.left_bytes -= count;
        let mut rest = count;
        while rest > 0 {
            let buf = self.bufs[self.first];
            if rest < buf.len() {
                self.bufs[self.first] = buf.slice(rest, buf.len() - rest);
                break;
            }
            rest -= buf.len();
            self.first += 1;
        }
        self.left_bytes == 0
    }
}

fn transfer_len(buf: &IoBuf) -> u32 {
    buf.len().min(MAX_TRANSFER_BYTES) as u32
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::io::{AlignedBuf, DeviceId};
    use crate::types::SegmentNumber;

    fn slot(work: Work) -> Slot {
        Slot {
            token: Token(1),
            target: Target {
                device: DeviceId(0),
                segment: SegmentNumber(0),
            },
            work,
            stage: Stage::Running(Arc::new(SegmentFile::new(
                File::open("/dev/null").unwrap().into(),
                Access::Buffered,
            ))),
            retries: 0,
        }
    }

    fn write(buf: &AlignedBuf, direct: bool) -> Slot {
        // SAFETY: nothing is submitted, the memory is never touched.
        let whole = unsafe { buf.io_buf() };
        let bufs = vec![whole.slice(0, 8192), whole.slice(8192, 8192)];
        let transfer = Transfer::new(4096, bufs);
        slot(Work::Write { transfer, direct })
    }

    fn rest(slot: &Slot) -> (u64, usize, usize) {
        match &slot.work {
            Work::Write { transfer, .. } | Work::Read(transfer) => (
                transfer.offset_bytes,
                transfer.left_bytes,
                transfer.next().iter().map(IoBuf::len).sum(),
            ),
            _ => panic!("not a transfer"),
        }
    }

    #[test]
    fn short_writes_are_carried_on_from_where_they_stopped() {
        let buf = AlignedBuf::new(16384);
        let mut slot = write(&buf, false);
        assert!(matches!(slot.advance(8192 + 100), Step::Again));
        assert_eq!(rest(&slot), (4096 + 8292, 8092, 8092));
        assert!(matches!(slot.advance(8092), Step::Done(Ok(16384))));
    }

    #[test]
    fn rest_of_a_short_direct_write_stays_aligned() {
        let buf = AlignedBuf::new(16384);
        let mut slot = write(&buf, true);
        assert!(matches!(slot.advance(5000), Step::Again));
        assert_eq!(rest(&slot), (8192, 12288, 12288));
        assert!(
            matches!(slot.advance(100), Step::Done(Err(_))),
            "no progress"
        );
    }

    #[test]
    fn write_that_makes_no_progress_is_an_error() {
        let buf = AlignedBuf::new(16384);
        let Step::Done(Err(error)) = write(&buf, false).advance(0) else {
            panic!("carried on for ever");
        };
        assert_eq!(error.kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn interruptions_are_repeated_but_not_for_ever() {
        for errno in [libc::EINTR, libc::EAGAIN] {
            let buf = AlignedBuf::new(16384);
            let mut slot = write(&buf, false);
            for _ in 0..MAX_RETRIES {
                assert!(matches!(slot.advance(-errno), Step::Again));
            }
            let Step::Done(Err(error)) = slot.advance(-errno) else {
                panic!("repeated for ever");
            };
            assert_eq!(error.raw_os_error(), Some(errno));
        }
    }

    #[test]
    fn each_range_is_released_in_a_call_of_its_own() {
        let mut release = slot(Work::release(vec![0..4096, 8192..8192, 8192..12288]));
        assert!(matches!(release.advance(-libc::EINTR), Step::Again));
        assert!(matches!(release.advance(0), Step::Again));
        assert!(matches!(release.advance(-libc::EINTR), Step::Again));
        assert!(matches!(release.advance(0), Step::Done(Ok(0))));
        assert!(Work::release(Vec::new()).is_nothing());
    }

    #[test]
    fn only_a_reservation_may_be_unsupported() {
        let mut reserve = slot(Work::Reserve {
            offset_bytes: 0,
            len_bytes: 4096,
        });
        assert!(matches!(
            reserve.advance(-libc::EOPNOTSUPP),
            Step::Done(Ok(0))
        ));
        let mut release = slot(Work::release(vec![0..4096, 4096..8192]));
        assert!(matches!(
            release.advance(-libc::EOPNOTSUPP),
            Step::Done(Err(_))
        ));
        let mut sync = slot(Work::Sync { writes: 0 });
        assert!(matches!(sync.advance(-libc::EIO), Step::Done(Err(_))));
    }
}
