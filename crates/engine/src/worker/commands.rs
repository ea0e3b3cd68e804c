//! What other threads ask of a worker; runs on the worker, between its turns.
//!
//! A command that must wait (a drain, a checkpoint) keeps its [`Reply`] in the worker's state and
//! answers in a later turn.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::clock::now;
use super::disk::{Disk, WorkerIo};
use super::eventfd::EventFd;
use super::export::{Export, ExportSpec, Kick, QueueStart};
use super::handle::{ExportId, VolumeId};
use super::turn::{Checkpointed, Closed, Origin, VolumeSlot, Worker};
use crate::io::{AlignedBuf, IoBuf};
use crate::ring::{GuestMemory, MemoryError, QueueError, SplitQueue};
use crate::types::Uuid;
use crate::volume::{RequestFailed, RequestKind};

/// Why a worker did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("worker {worker} is not running; restart the daemon")]
    Gone { worker: usize },
    #[error("the volume is not open")]
    NoVolume,
    #[error("the export is closed")]
    NoExport,
    #[error("the export has {queues} queues, and no queue {index}")]
    NoQueue { index: u16, queues: usize },
    #[error("{what}")]
    Busy { what: &'static str },
    #[error(
        "offset {offset_bytes}, {len_bytes} bytes: not whole sectors of 512 bytes inside the volume's {size_bytes} bytes"
    )]
    Range {
        offset_bytes: u64,
        len_bytes: u64,
        size_bytes: u64,
    },
    #[error("queue {index}: {error}")]
    Ring { index: u16, error: QueueError },
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
    #[error("a running queue does not fit the new memory: {0}")]
    Moved(#[from] QueueError),
    #[error("queue {index}: its {what} file descriptor cannot be used: {error}")]
    Fd {
        index: u16,
        what: &'static str,
        error: std::io::Error,
    },
    #[error("the request failed: {0:?}")]
    Failed(RequestFailed),
}

const EXPORTED: CommandError = CommandError::Busy {
    what: "the volume is exported; close its exports first",
};

/// Counters of a worker, from its start on.
#[derive(Debug, Default, Clone, Copy)]
pub struct WorkerStats {
    /// Guest requests taken from rings.
    pub requests: u64,
    /// Of them, refused or answered without the volume with a status that is not OK.
    pub refused: u64,
    /// Of them, failed by the volume.
    pub failed: u64,
    pub notifications: u64,
    pub kicks: u64,
    pub sleeps: u64,
    pub rings_broken: u64,
}

/// The other end of a caller that waits. Dropped without an answer, the caller learns that.
#[derive(Debug)]
pub struct Reply<T>(Sender<Result<T, CommandError>>);

impl<T> Reply<T> {
    pub(super) fn new() -> (Self, Receiver<Result<T, CommandError>>) {
        let (sender, receiver) = channel();
        (Self(sender), receiver)
    }

    pub fn send(self, answer: Result<T, CommandError>) {
        // A caller that does not wait any more does not want to know.
        let _ = self.0.send(answer);
    }
}

impl<D: Disk, I: WorkerIo> Worker<D, I> {
    fn slot(&mut self, volume: VolumeId) -> Result<&mut VolumeSlot<D>, CommandError> {
        let slot = self
            .volumes
            .get_mut(volume.0)
            .filter(|slot| slot.dropping.is_none());
        slot.ok_or(CommandError::NoVolume)
    }

    pub(super) fn disk(&mut self, volume: VolumeId) -> Result<&mut D, CommandError> {
        Ok(&mut self.slot(volume)?.disk)
    }

    pub(super) fn export(&mut self, export: ExportId) -> Result<&mut Export, CommandError> {
        let export = self
            .exports
            .get_mut(export.0)
            .filter(|export| export.closing.is_none());
        export.ok_or(CommandError::NoExport)
    }

    pub(super) const fn stats(&self) -> WorkerStats {
        self.stats
    }

    pub(super) fn add_volume(&mut self, disk: D, uuid: Uuid) -> VolumeId {
        let index = self.volumes.insert(VolumeSlot::new(disk, uuid));
        if let Some(slot) = self.volumes.get_mut(index) {
            slot.disk.attach((index as u64) << 40);
        }
        VolumeId(index)
    }

    /// A volume that is not about to close, and the I/O queue.
    fn open_slot(
        &mut self,
        volume: VolumeId,
    ) -> Result<(&mut VolumeSlot<D>, &mut I), CommandError> {
        let slot = self
            .volumes
            .get_mut(volume.0)
            .filter(|slot| slot.dropping.is_none());
        let slot = slot.ok_or(CommandError::NoVolume)?;
        if slot.closing {
            return Err(CommandError::Busy {
                what: "the volume is closing",
            });
        }
        Ok((slot, &mut self.io))
    }

    pub(super) fn direct(&mut self, volume: VolumeId, kind: RequestKind, reply: Reply<()>) {
        match self.open_slot(volume) {
            Ok((slot, io)) => slot.submit(io, Origin::Direct { reply }, kind, false, now()),
            Err(error) => reply.send(Err(error)),
        }
    }

    pub(super) fn direct_transfer(
        &mut self,
        volume: VolumeId,
        buffer: AlignedBuf,
        kind: impl FnOnce(IoBuf) -> RequestKind,
        reply: Reply<AlignedBuf>,
    ) {
        match self.open_slot(volume) {
            Ok((slot, io)) => {
                // SAFETY: the buffer goes into the table of requests and is not touched before the
                // request has finished; moving it does not move its memory. A worker that ends
                // drops its I/O queue, which waits, before that table.
                let lent = unsafe { buffer.io_buf() };
                slot.submit(
                    io,
                    Origin::Transfer { buffer, reply },
                    kind(lent),
                    false,
                    now(),
                );
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    pub(super) fn start_checkpoint(&mut self, volume: VolumeId, reply: Reply<Checkpointed<D>>) {
        match self.open_slot(volume) {
            Ok((slot, _)) if slot.checkpoint.is_some() => {
                reply.send(Err(CommandError::Busy {
                    what: "a checkpoint is being made already",
                }));
            }
            Ok((slot, _)) => {
                slot.checkpoint = Some(reply);
                slot.disk.start_checkpoint();
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    pub(super) fn start_close(&mut self, volume: VolumeId, reply: Reply<Closed<D>>) {
        match self.open_slot(volume) {
            Ok((slot, _)) if slot.exports > 0 => reply.send(Err(EXPORTED)),
            Ok((slot, io)) => {
                slot.closing = true;
                slot.close = Some(reply);
                slot.run(io, |disk, io| disk.start_close(io));
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    pub(super) fn drop_volume(&mut self, volume: VolumeId, reply: Reply<()>) {
        match self.slot(volume) {
            Ok(slot) if slot.exports > 0 => reply.send(Err(EXPORTED)),
            Ok(slot) => slot.dropping = Some(reply),
            Err(error) => reply.send(Err(error)),
        }
    }

    pub(super) fn add_export(
        &mut self,
        volume: VolumeId,
        spec: ExportSpec,
    ) -> Result<ExportId, CommandError> {
        let (slot, _) = self.open_slot(volume)?;
        slot.exports += 1;
        Ok(ExportId(self.exports.insert(Export::new(spec, volume.0))))
    }

    pub(super) fn set_memory(
        &mut self,
        export: ExportId,
        memory: Arc<GuestMemory>,
    ) -> Result<(), CommandError> {
        let export = self.export(export)?;
        export.set_memory(memory)?;
        export.lost = false;
        Ok(())
    }

    pub(super) fn start_queue(
        &mut self,
        id: ExportId,
        index: u16,
        start: QueueStart,
    ) -> Result<(), CommandError> {
        let export = self.export(id)?;
        let memory = Arc::clone(&export.memory);
        if export.queue(index)?.ring.is_some() {
            return Err(CommandError::Busy {
                what: "the queue is running; stop it first",
            });
        }
        let ring = SplitQueue::new(memory, start.ring, start.base);
        let ring = ring.map_err(|error| CommandError::Ring { index, error })?;
        let call = adopt(index, "call", start.call)?;
        let error = adopt(index, "error", start.error)?;
        self.set_kick(id, index, start.kick)?;
        let queue = self.export(id)?.queue(index)?;
        queue.ring = Some(ring);
        queue.features = start.ring.features;
        queue.size = start.ring.size;
        queue.enabled = start.enabled;
        queue.broken = false;
        queue.call = call;
        queue.error = error;
        self.active_stale = true;
        Ok(())
    }

    pub(super) fn set_enabled(
        &mut self,
        id: ExportId,
        index: u16,
        enabled: bool,
    ) -> Result<(), CommandError> {
        self.export(id)?.queue(index)?.enabled = enabled;
        self.active_stale = true;
        Ok(())
    }

    /// A new call eventfd is signalled once: what the driver was told through the old one before the
    /// change may have been lost with it, and one notification too many does no harm.
    pub(super) fn set_call(
        &mut self,
        id: ExportId,
        index: u16,
        fd: Option<OwnedFd>,
    ) -> Result<(), CommandError> {
        let call = adopt(index, "call", fd)?;
        let queue = self.export(id)?.queue(index)?;
        if queue.ring.is_some()
            && let Some(call) = &call
        {
            call.signal();
        }
        queue.call = call;
        Ok(())
    }

    pub(super) fn set_error(
        &mut self,
        id: ExportId,
        index: u16,
        fd: Option<OwnedFd>,
    ) -> Result<(), CommandError> {
        let error = adopt(index, "error", fd)?;
        let queue = self.export(id)?.queue(index)?;
        queue.error = error;
        Ok(())
    }

    pub(super) fn set_kick(
        &mut self,
        id: ExportId,
        index: u16,
        fd: Option<OwnedFd>,
    ) -> Result<(), CommandError> {
        let kick = adopt(index, "kick", fd)?;
        self.export(id)?.queue(index)?;
        let watch = self.fresh_watch();
        if let Some(fd) = &kick {
            let watched = self.io.watch(fd.as_fd(), watch);
            watched.map_err(|error| CommandError::Fd {
                index,
                what: "kick",
                error,
            })?;
            self.watches.insert(watch.0, (id.0, index.into()));
        }
        let queue = self.export(id)?.queue(index)?;
        let old = std::mem::replace(&mut queue.kick, kick.map(|fd| Kick { fd, watch }));
        if let Some(old) = old {
            self.forget_kick(&old);
        }
        Ok(())
    }

    fn forget_kick(&mut self, kick: &Kick) {
        self.io.unwatch(kick.watch);
        self.watches.remove(&kick.watch.0);
    }

    pub(super) fn stop_queue(&mut self, id: ExportId, index: u16, reply: Reply<u16>) {
        let queue = match self.export(id).and_then(|export| export.queue(index)) {
            Ok(queue) => queue,
            Err(error) => return reply.send(Err(error)),
        };
        if queue.stopping.is_some() {
            return reply.send(Err(CommandError::Busy {
                what: "the queue is being stopped already",
            }));
        }
        queue.stopping = Some(reply);
        self.active_stale = true;
        // Perhaps there is nothing to wait for.
        self.touched.push((id.0, index.into()));
    }

    /// The last request of a stopping queue was answered.
    pub(super) fn finish_stop(&mut self, e: usize, q: usize) {
        let Some(export) = self.exports.get_mut(e) else {
            return;
        };
        let queue = &mut export.queues[q];
        if let Some(ring) = queue.ring.take() {
            queue.base = ring.next_available();
        }
        let base = queue.base;
        let (kick, reply) = (queue.kick.take(), queue.stopping.take());
        *queue = super::export::Queue {
            base,
            ..Default::default()
        };
        if let Some(kick) = kick {
            self.forget_kick(&kick);
        }
        self.active_stale = true;
        if let Some(reply) = reply {
            reply.send(Ok(base));
        }
        self.close_if_stopped(e);
    }

    pub(super) fn close_export(&mut self, id: ExportId, reply: Reply<()>) {
        let open = self
            .exports
            .get_mut(id.0)
            .filter(|export| export.closing.is_none());
        let Some(export) = open else {
            return reply.send(Err(CommandError::NoExport));
        };
        export.closing = Some(reply);
        for (q, queue) in export.queues.iter_mut().enumerate() {
            if queue.stopping.is_none() {
                // Nobody waits for this index.
                queue.stopping = Some(Reply::new().0);
            }
            self.touched.push((id.0, q));
        }
        self.active_stale = true;
        self.close_if_stopped(id.0);
    }

    fn close_if_stopped(&mut self, e: usize) {
        let stopped = self.exports.get_mut(e).is_some_and(|export| {
            export.closing.is_some() && export.queues.iter().all(|queue| queue.stopping.is_none())
        });
        if !stopped {
            return;
        }
        let Some(mut export) = self.exports.remove(e) else {
            return;
        };
        self.active_stale = true;
        if let Some(slot) = self.volumes.get_mut(export.volume) {
            slot.exports -= 1;
        }
        let reply = export.closing.take();
        // Guest memory is unmapped before the caller hears that it was.
        drop(export);
        if let Some(reply) = reply {
            reply.send(Ok(()));
        }
    }
}

fn adopt(
    index: u16,
    what: &'static str,
    fd: Option<OwnedFd>,
) -> Result<Option<EventFd>, CommandError> {
    fd.map(EventFd::adopt)
        .transpose()
        .map_err(|error| CommandError::Fd { index, what, error })
}
