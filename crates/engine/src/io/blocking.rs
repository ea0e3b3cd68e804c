//! Waiting for one operation at a time, for recovery, which runs on a thread of its own.

use std::io;

use super::{AlignedBuf, Completion, DeviceId, Io, IoBuf, Op, Target, Token};
use crate::types::SegmentNumber;

/// An [`Io`] with nothing else in flight, used synchronously on one device.
pub struct BlockingIo<'a> {
    io: &'a mut dyn Io,
    device: DeviceId,
    done: Vec<Completion>,
}

impl<'a> BlockingIo<'a> {
    pub fn new(io: &'a mut dyn Io, device: DeviceId) -> Self {
        debug_assert_eq!(
            io.in_flight(),
            0,
            "blocking use shares its queue with nobody"
        );
        Self {
            io,
            device,
            done: Vec::new(),
        }
    }

    /// Runs one operation to its end.
    ///
    /// # Errors
    /// The operation's.
    pub fn run(&mut self, segment: SegmentNumber, op: Op) -> io::Result<usize> {
        self.io.submit(
            Token(u64::MAX),
            Target {
                device: self.device,
                segment,
            },
            op,
        );
        loop {
            if let Some(completion) = self.done.pop() {
                return completion.result;
            }
            self.io.wait(None, &mut self.done);
        }
    }

    /// Reads up to `len` bytes; what is returned is shorter at the segment's end.
    ///
    /// # Errors
    /// The operation's.
    pub fn read(
        &mut self,
        segment: SegmentNumber,
        offset_bytes: u64,
        len: usize,
    ) -> io::Result<(AlignedBuf, usize)> {
        let buffer = AlignedBuf::new(len);
        // SAFETY: `run` returns only when the operation has completed, and `buffer` lives until then.
        let bufs = vec![unsafe { buffer.io_buf() }];
        let got = self.run(segment, Op::Read { offset_bytes, bufs })?;
        Ok((buffer, got))
    }

    /// Writes the buffer whole.
    ///
    /// # Errors
    /// The operation's.
    pub fn write(
        &mut self,
        segment: SegmentNumber,
        offset_bytes: u64,
        buf: IoBuf,
    ) -> io::Result<()> {
        self.run(
            segment,
            Op::Write {
                offset_bytes,
                bufs: vec![buf],
                direct: true,
            },
        )
        .map(drop)
    }

    /// # Errors
    /// The operation's.
    pub fn sync(&mut self, segment: SegmentNumber) -> io::Result<()> {
        self.run(segment, Op::Sync).map(drop)
    }
}
