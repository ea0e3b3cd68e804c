//! The other threads' side: start a worker, ask it things, wait for its answers.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::commands::{CommandError, Reply, WorkerStats};
use super::disk::{Disk, WorkerIo};
use super::eventfd::EventFd;
use super::events::Events;
use super::export::{ExportSpec, QueueStart};
use super::turn::Worker;
use crate::io::{AlignedBuf, IoBuf};
use crate::ring::GuestMemory;
use crate::types::{SECTOR_BYTES, Uuid};
use crate::volume::RequestKind;

/// Bytes of one request of a direct read or write: bounds the memory it takes.
const DIRECT_BYTES: usize = 1 << 20;

/// A volume on a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VolumeId(pub(super) usize);

/// An export on a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExportId(pub(super) usize);

#[derive(Debug, Clone)]
pub struct WorkerConfig {
    pub index: usize,
    /// Pins the thread.
    pub cpu: Option<usize>,
    /// How long a worker without work polls before it sleeps.
    pub poll: Duration,
}

pub(super) type Command<D, I> = Box<dyn FnOnce(&mut Worker<D, I>) + Send>;

/// A worker thread. Dropping the handle shuts it down.
pub struct WorkerHandle<D: Disk, I: WorkerIo> {
    index: usize,
    commands: Sender<Command<D, I>>,
    wake: Arc<EventFd>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<D: Disk, I: WorkerIo> fmt::Debug for WorkerHandle<D, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerHandle")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl<D: Disk, I: WorkerIo> WorkerHandle<D, I> {
    /// Starts a worker; `make_io` runs on its thread.
    ///
    /// # Errors
    /// The thread cannot be started or pinned, or `make_io` fails.
    pub fn spawn(
        config: WorkerConfig,
        events: Arc<Events<D::Event>>,
        make_io: impl FnOnce() -> io::Result<I> + Send + 'static,
    ) -> io::Result<Self> {
        let (commands, received) = channel();
        let wake = Arc::new(EventFd::new()?);
        let (started, start) = channel();
        let index = config.index;
        let name = format!("vhostd-w{index}");
        let thread = {
            let wake = Arc::clone(&wake);
            std::thread::Builder::new().name(name).spawn(move || {
                let ran = catch_unwind(AssertUnwindSafe(|| {
                    let io = config.cpu.map_or(Ok(()), pin).and_then(|()| make_io());
                    let worker = io.and_then(|io| Worker::new(io, received, wake, events, config.poll));
                    // The starter waits for this.
                    match worker {
                        Ok(worker) => {
                            let _ = started.send(Ok(()));
                            worker.run();
                        }
                        Err(error) => {
                            let _ = started.send(Err(error));
                        }
                    }
                }));
                if ran.is_err() {
                    // The panic's own message is on standard error already.
                    eprintln!(
                        "vhostd: worker {index} failed; the process ends so that a new one can take over its disks"
                    );
                    std::process::abort();
                }
            })?
        };
        start
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the worker thread ended at once")))?;
        Ok(Self {
            index,
            commands,
            wake,
            thread: Mutex::new(Some(thread)),
        })
    }

    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }

    /// Runs `ask` on the worker and waits until somebody answers through the reply it is given.
    ///
    /// # Errors
    /// What was answered, or that the worker is not there any more.
    pub fn call<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&mut Worker<D, I>, Reply<T>) + Send + 'static,
    ) -> Result<T, CommandError> {
        self.post(ask)?
            .recv()
            .unwrap_or(Err(CommandError::Gone { worker: self.index }))
    }

    fn post<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&mut Worker<D, I>, Reply<T>) + Send + 'static,
    ) -> Result<Receiver<Result<T, CommandError>>, CommandError> {
        let (reply, answer) = Reply::new();
        let sent = self
            .commands
            .send(Box::new(move |worker| ask(worker, reply)));
        sent.map_err(|_| CommandError::Gone { worker: self.index })?;
        self.wake.signal();
        Ok(answer)
    }

    /// Runs `f` on the worker: for what needs no waiting there.
    ///
    /// # Errors
    /// The worker is gone, or what `f` returns.
    pub fn with<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Worker<D, I>) -> Result<T, CommandError> + Send + 'static,
    ) -> Result<T, CommandError> {
        self.call(move |worker, reply| reply.send(f(worker)))
    }

    /// Runs `f` on the worker's I/O queue, to register a device there.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn with_io(&self, f: impl FnOnce(&mut I) + Send + 'static) -> Result<(), CommandError> {
        self.with(move |worker| {
            f(worker.io_mut());
            Ok(())
        })
    }

    /// Hands an opened volume to the worker. `uuid` names it in events.
    ///
    /// # Errors
    /// The worker is gone.
    pub fn add_volume(&self, disk: D, uuid: Uuid) -> Result<VolumeId, CommandError> {
        self.with(move |worker| Ok(worker.add_volume(disk, uuid)))
    }

    /// Runs `f` on a volume, between two turns of its worker.
    ///
    /// # Errors
    /// There is no such volume.
    pub fn with_volume<T: Send + 'static>(
        &self,
        volume: VolumeId,
        f: impl FnOnce(&mut D) -> T + Send + 'static,
    ) -> Result<T, CommandError> {
        self.with(move |worker| Ok(f(worker.disk(volume)?)))
    }

    /// Submits a request of our own, and waits until it is over.
    ///
    /// # Errors
    /// The volume is not open, or the request failed.
    pub fn request(&self, volume: VolumeId, kind: RequestKind) -> Result<(), CommandError> {
        self.call(move |worker, reply| worker.direct(volume, kind, reply))
    }

    /// Reads whole sectors.
    ///
    /// # Errors
    /// The range is not whole sectors inside the volume, or the read failed.
    pub fn read(
        &self,
        volume: VolumeId,
        offset_bytes: u64,
        len_bytes: usize,
    ) -> Result<Vec<u8>, CommandError> {
        self.check_range(volume, offset_bytes, len_bytes as u64)?;
        let mut out = Vec::with_capacity(len_bytes);
        while out.len() < len_bytes {
            let here = (len_bytes - out.len()).min(DIRECT_BYTES);
            let at = offset_bytes + out.len() as u64;
            let kind = move |buffer: IoBuf| RequestKind::Read {
                offset_bytes: at,
                into: vec![buffer],
            };
            let buffer = self.transfer(volume, AlignedBuf::new(here), kind)?;
            out.extend_from_slice(&buffer);
        }
        Ok(out)
    }

    /// Writes whole sectors; durable after `flush`.
    ///
    /// # Errors
    /// The range is not whole sectors inside the volume, or the write failed.
    pub fn write(
        &self,
        volume: VolumeId,
        offset_bytes: u64,
        data: &[u8],
    ) -> Result<(), CommandError> {
        self.check_range(volume, offset_bytes, data.len() as u64)?;
        let mut at = offset_bytes;
        for part in data.chunks(DIRECT_BYTES) {
            let mut buffer = AlignedBuf::new(part.len());
            buffer.copy_from_slice(part);
            let kind = move |buffer: IoBuf| RequestKind::Write {
                offset_bytes: at,
                from: vec![buffer],
            };
            self.transfer(volume, buffer, kind)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn transfer(
        &self,
        volume: VolumeId,
        buffer: AlignedBuf,
        kind: impl FnOnce(IoBuf) -> RequestKind + Send + 'static,
    ) -> Result<AlignedBuf, CommandError> {
        self.call(move |worker, reply| worker.direct_transfer(volume, buffer, kind, reply))
    }

    /// # Errors
    /// The flush failed: what was written since the last one may not be durable.
    pub fn flush(&self, volume: VolumeId) -> Result<(), CommandError> {
        self.request(volume, RequestKind::Flush)
    }

    /// Discards (`exact` false) or zeroes a range of whole sectors.
    ///
    /// # Errors
    /// The range is not whole sectors inside the volume, or it failed.
    pub fn unmap(
        &self,
        volume: VolumeId,
        offset_bytes: u64,
        len_bytes: u64,
        exact: bool,
    ) -> Result<(), CommandError> {
        self.check_range(volume, offset_bytes, len_bytes)?;
        // As large as a guest may ask for at once; the volume bounds its work by that.
        let step = u64::from(crate::request::MAX_UNMAP_SECTORS) * SECTOR_BYTES;
        let (mut at, end) = (offset_bytes, offset_bytes + len_bytes);
        while at < end {
            let len_bytes = step.min(end - at);
            let kind = RequestKind::Unmap {
                offset_bytes: at,
                len_bytes,
                exact,
            };
            self.request(volume, kind)?;
            at += len_bytes;
        }
        Ok(())
    }

    /// # Errors
    /// The range is not whole sectors inside the volume.
    pub fn check_range(
        &self,
        volume: VolumeId,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<(), CommandError> {
        let size_bytes = self.size_bytes(volume)?;
        let inside = offset_bytes
            .checked_add(len_bytes)
            .is_some_and(|end| end <= size_bytes);
        let whole =
            offset_bytes.is_multiple_of(SECTOR_BYTES) && len_bytes.is_multiple_of(SECTOR_BYTES);
        if inside && whole {
            Ok(())
        } else {
            Err(CommandError::Range {
                offset_bytes,
                len_bytes,
                size_bytes,
            })
        }
    }

    /// # Errors
    /// There is no such volume.
    pub fn size_bytes(&self, volume: VolumeId) -> Result<u64, CommandError> {
        self.with(move |worker| Ok(worker.disk(volume)?.size_bytes()))
    }

    /// # Errors
    /// There is no such volume.
    pub fn resize(&self, volume: VolumeId, size_bytes: u64) -> Result<(), CommandError> {
        self.with(move |worker| {
            worker.disk(volume)?.resize(size_bytes);
            Ok(())
        })
    }

    /// # Errors
    /// There is no such volume.
    pub fn volume_stats(&self, volume: VolumeId) -> Result<D::Stats, CommandError> {
        self.with(move |worker| Ok(worker.disk(volume)?.stats()))
    }

    /// # Errors
    /// The worker is gone.
    pub fn stats(&self) -> Result<WorkerStats, CommandError> {
        self.with(|worker| Ok(worker.stats()))
    }

    /// Makes what changed of the map durable. The inner result is the volume's.
    ///
    /// # Errors
    /// A checkpoint is being made already, or the volume is closing.
    pub fn checkpoint(
        &self,
        volume: VolumeId,
    ) -> Result<Result<D::Checkpoint, D::Error>, CommandError> {
        self.call(move |worker, reply| worker.start_checkpoint(volume, reply))
    }

    /// # Errors
    /// There is no such volume.
    pub fn checkpoint_committed(&self, volume: VolumeId, id: u64) -> Result<(), CommandError> {
        self.with(move |worker| {
            worker.disk(volume)?.checkpoint_committed(id);
            Ok(())
        })
    }

    /// # Errors
    /// There is no such volume.
    pub fn checkpoint_failed(&self, volume: VolumeId, id: u64) -> Result<(), CommandError> {
        self.with(move |worker| {
            worker.disk(volume)?.checkpoint_failed(id);
            Ok(())
        })
    }

    /// Finishes requests and closes the volume. It stays to hear of the commit of its last
    /// checkpoint: call `drop_volume` then.
    ///
    /// # Errors
    /// Exports are open, or it is closing already.
    pub fn close_volume(
        &self,
        volume: VolumeId,
    ) -> Result<Result<Option<D::Checkpoint>, D::Error>, CommandError> {
        self.call(move |worker, reply| worker.start_close(volume, reply))
    }

    /// Forgets a volume, closed or not; without a close it is as after a crash. Waits for its I/O,
    /// and for the removal of files that a committed checkpoint has made useless.
    ///
    /// # Errors
    /// Exports are open.
    pub fn drop_volume(&self, volume: VolumeId) -> Result<(), CommandError> {
        self.call(move |worker, reply| worker.drop_volume(volume, reply))
    }

    /// # Errors
    /// There is no such volume.
    pub fn add_export(&self, volume: VolumeId, spec: ExportSpec) -> Result<ExportId, CommandError> {
        self.with(move |worker| worker.add_export(volume, spec))
    }

    /// # Errors
    /// A running ring is not inside the new memory; the old one stays.
    pub fn set_memory(
        &self,
        export: ExportId,
        memory: Arc<GuestMemory>,
    ) -> Result<(), CommandError> {
        self.with(move |worker| worker.set_memory(export, memory))
    }

    /// # Errors
    /// The queue runs already, or its description is wrong.
    pub fn start_queue(
        &self,
        export: ExportId,
        index: u16,
        start: QueueStart,
    ) -> Result<(), CommandError> {
        self.with(move |worker| worker.start_queue(export, index, start))
    }

    /// Disabled, a queue keeps its place and takes nothing.
    ///
    /// # Errors
    /// There is no such queue.
    pub fn set_queue_enabled(
        &self,
        export: ExportId,
        index: u16,
        enabled: bool,
    ) -> Result<(), CommandError> {
        self.with(move |worker| worker.set_enabled(export, index, enabled))
    }

    /// # Errors
    /// There is no such queue, or `fd` is not an eventfd; the same for the two below.
    pub fn set_queue_call(
        &self,
        export: ExportId,
        index: u16,
        fd: Option<OwnedFd>,
    ) -> Result<(), CommandError> {
        self.with(move |worker| worker.set_call(export, index, fd))
    }

    /// # Errors
    /// See `set_queue_call`.
    pub fn set_queue_kick(
        &self,
        export: ExportId,
        index: u16,
        fd: Option<OwnedFd>,
    ) -> Result<(), CommandError> {
        self.with(move |worker| worker.set_kick(export, index, fd))
    }

    /// # Errors
    /// See `set_queue_call`.
    pub fn set_queue_error(
        &self,
        export: ExportId,
        index: u16,
        fd: Option<OwnedFd>,
    ) -> Result<(), CommandError> {
        self.with(move |worker| worker.set_error(export, index, fd))
    }

    /// Finishes what was taken, stops, and returns the index of the next available chain.
    ///
    /// # Errors
    /// There is no such queue, or it is being stopped already.
    pub fn stop_queue(&self, export: ExportId, index: u16) -> Result<u16, CommandError> {
        self.call(move |worker, reply| worker.stop_queue(export, index, reply))
    }

    /// # Errors
    /// There is no such export.
    pub fn set_write_cache(&self, export: ExportId, enabled: bool) -> Result<(), CommandError> {
        self.with(move |worker| {
            worker.export(export)?.spec.write_cache = enabled;
            Ok(())
        })
    }

    /// Stops all queues and lets go of guest memory.
    ///
    /// # Errors
    /// There is no such export, or it is closing already.
    pub fn close_export(&self, export: ExportId) -> Result<(), CommandError> {
        self.call(move |worker, reply| worker.close_export(export, reply))
    }

    /// Stops the thread; volumes that are open stay as after a crash.
    pub fn shutdown(&self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            let _ = self.commands.send(Box::new(Worker::stop));
            self.wake.signal();
            // A worker that panicked has ended the process.
            let _ = thread.join();
        }
    }
}

impl<D: Disk, I: WorkerIo> Drop for WorkerHandle<D, I> {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        let text = format!("no CPU {cpu}: numbers end below {}", libc::CPU_SETSIZE);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // SAFETY: a cpu_set_t is plain data for which zeroes are valid; the bound was checked.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Slots that are named by index; an index is used again only after its slot was emptied.
#[derive(Debug)]
pub(super) struct Slots<T> {
    slots: Vec<Option<T>>,
    free: VecDeque<usize>,
}

impl<T> Slots<T> {
    pub const fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: VecDeque::new(),
        }
    }

    pub fn insert(&mut self, value: T) -> usize {
        if let Some(index) = self.free.pop_front() {
            self.slots[index] = Some(value);
            return index;
        }
        self.slots.push(Some(value));
        self.slots.len() - 1
    }

    pub fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.slots.get_mut(index)?.as_mut()
    }

    pub fn remove(&mut self, index: usize) -> Option<T> {
        let value = self.slots.get_mut(index)?.take();
        if value.is_some() {
            self.free.push_back(index);
        }
        value
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut T)> {
        self.slots
            .iter_mut()
            .enumerate()
            .filter_map(|(i, slot)| Some((i, slot.as_mut()?)))
    }
}
