//! What worker tests stand on: an I/O queue without devices, a disk in memory that finishes requests
//! when the test lets it, and a bench with a guest in front of both.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::io::{Completion, Io, Op, Target, Token, WatchId};
use crate::request::{F_FLUSH, ID_BYTES};
use crate::ring::testing::*;
use crate::ring::{F_INDIRECT_DESC, F_VERSION_1};
use crate::types::Uuid;
use crate::volume::{Finished, Now, Request, RequestFailed, RequestKind};

pub const FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_FLUSH;
pub const DISK_BYTES: usize = 1 << 20;
pub const LIMIT: Duration = Duration::from_secs(20);

/// An I/O queue without devices: it sleeps on eventfds.
#[derive(Default)]
pub struct PollIo {
    pub control: Arc<Control>,
    pub watched: Vec<(i32, WatchId)>,
    pub fired: Vec<WatchId>,
}

impl Io for PollIo {
    fn submit(&mut self, _: Token, _: Target, _: Op) {
        unreachable!("the disk is in memory")
    }

    fn poll(&mut self, _: &mut Vec<Completion>) {}

    fn wait(&mut self, timeout: Option<Duration>, _: &mut Vec<Completion>) {
        let mut fds: Vec<_> = self
            .watched
            .iter()
            .map(|&(fd, _)| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        self.control.sleeps.fetch_add(1, Ordering::SeqCst);
        let timed = timeout.is_some();
        self.control
            .timed_sleeps
            .fetch_add(timed.into(), Ordering::SeqCst);
        let timeout_ms = timeout.map_or(-1, |t| t.as_micros().div_ceil(1000) as i32);
        // SAFETY: a list of that length, of descriptors that stay open while they are watched.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout_ms) };
        let fired = fds
            .iter()
            .zip(&self.watched)
            .filter(|(fd, _)| fd.revents != 0);
        self.fired.extend(fired.map(|(_, &(_, id))| id));
    }

    fn in_flight(&self) -> usize {
        0
    }
}

impl WorkerIo for PollIo {
    fn watch(&mut self, fd: BorrowedFd<'_>, id: WatchId) -> std::io::Result<()> {
        use std::os::fd::AsRawFd;
        self.watched.push((fd.as_raw_fd(), id));
        Ok(())
    }

    fn unwatch(&mut self, id: WatchId) {
        self.watched.retain(|&(_, watched)| watched != id);
    }

    fn take_fired(&mut self, out: &mut Vec<WatchId>) {
        out.append(&mut self.fired);
    }
}

/// What a test may do to its disk while a worker has it.
#[derive(Default)]
pub struct Control {
    /// Requests are kept and not finished.
    pub hold: AtomicBool,
    pub fail: AtomicBool,
    pub flushes: AtomicU64,
    pub write_throughs: AtomicU64,
    pub submitted: AtomicU64,
    pub sleeps: AtomicU64,
    pub timed_sleeps: AtomicU64,
    pub unmaps: Mutex<Vec<(u64, u64, bool)>>,
}

pub struct RamDisk {
    bytes: Vec<u8>,
    size_bytes: u64,
    control: Arc<Control>,
    waiting: Vec<Request>,
    checkpoint: bool,
    closing: bool,
    events: Vec<u32>,
}

impl RamDisk {
    pub fn new(control: &Arc<Control>) -> Self {
        Self {
            bytes: vec![0; DISK_BYTES],
            size_bytes: DISK_BYTES as u64,
            control: control.clone(),
            waiting: Vec::new(),
            checkpoint: false,
            closing: false,
            events: vec![7],
        }
    }
}

impl Disk for RamDisk {
    type Checkpoint = u64;
    type Error = String;
    type Event = u32;
    type Stats = u64;

    fn attach(&mut self, _: u64) {}

    fn submit(&mut self, _: &mut dyn Io, request: Request, _: Now) {
        self.control.submitted.fetch_add(1, Ordering::SeqCst);
        self.control
            .write_throughs
            .fetch_add(request.write_through.into(), Ordering::SeqCst);
        self.waiting.push(request);
    }

    fn on_completion(&mut self, _: &mut dyn Io, _: Completion, _: Now) {}

    fn advance(&mut self, _: &mut dyn Io, _: Now) {}

    fn take_finished(&mut self, out: &mut Vec<Finished>) {
        if self.control.hold.load(Ordering::SeqCst) {
            return;
        }
        let fail = self.control.fail.load(Ordering::SeqCst);
        for Request { id, kind, .. } in self.waiting.drain(..) {
            let mut at;
            match kind {
                RequestKind::Read { offset_bytes, into } => {
                    at = offset_bytes as usize;
                    for buf in into {
                        buf.copy_from(&self.bytes[at..at + buf.len()]);
                        at += buf.len();
                    }
                }
                RequestKind::Write { offset_bytes, from } => {
                    at = offset_bytes as usize;
                    for buf in from {
                        buf.copy_to(&mut self.bytes[at..at + buf.len()]);
                        at += buf.len();
                    }
                }
                RequestKind::Flush => {
                    self.control.flushes.fetch_add(1, Ordering::SeqCst);
                }
                RequestKind::Unmap {
                    offset_bytes,
                    len_bytes,
                    exact,
                } => {
                    self.control
                        .unmaps
                        .lock()
                        .unwrap()
                        .push((offset_bytes, len_bytes, exact));
                }
                RequestKind::Snapshot { .. }
                | RequestKind::StateNote { .. }
                | RequestKind::Adopt { .. } => unreachable!("no ring asks for it"),
            }
            let result = if fail {
                Err(RequestFailed::Damaged)
            } else {
                Ok(())
            };
            out.push(Finished { id, result });
        }
    }

    fn deadline_ns(&self) -> Option<u64> {
        // A test that changes `control` is noticed soon.
        (!self.waiting.is_empty()).then(|| now().monotonic_ns + 1_000_000)
    }

    fn start_checkpoint(&mut self) {
        self.checkpoint = true;
    }

    fn take_checkpoint(&mut self) -> Option<Result<u64, String>> {
        std::mem::take(&mut self.checkpoint).then_some(Ok(3))
    }

    fn checkpoint_committed(&mut self, _: u64) {}

    fn checkpoint_failed(&mut self, _: u64) {}

    fn start_close(&mut self, _: &mut dyn Io) {
        self.closing = true;
    }

    fn take_closed(&mut self) -> Option<Result<Option<u64>, String>> {
        self.closing.then_some(Err("damaged".to_owned()))
    }

    fn is_closed(&self) -> bool {
        self.closing
    }

    fn set_draining(&mut self, _: bool) {}

    fn resize(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn stats(&self) -> u64 {
        42
    }

    fn take_events(&mut self, out: &mut Vec<u32>) {
        out.append(&mut self.events);
    }
}

pub type Handle = WorkerHandle<RamDisk, PollIo>;

/// A worker with one volume and one export of two queues, and a guest in front of it.
pub struct Bench {
    pub worker: Handle,
    pub events: Arc<Events<u32>>,
    pub control: Arc<Control>,
    pub volume: VolumeId,
    pub export: ExportId,
    pub driver: Driver,
    pub kick: EventFd,
    pub call: EventFd,
    pub error: EventFd,
}

pub fn duplicate(fd: &EventFd) -> OwnedFd {
    use std::os::fd::AsFd;
    fd.as_fd().try_clone_to_owned().unwrap()
}

pub fn readable(fd: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry, on the stack.
    unsafe { libc::poll(&raw mut poll, 1, LIMIT.as_millis() as i32) == 1 }
}

impl Bench {
    pub fn new(features: u64, polling: bool) -> Self {
        let events = Arc::new(Events::new().unwrap());
        let config = WorkerConfig {
            index: 0,
            cpu: None,
            poll: Duration::from_micros(20),
        };
        let control = Arc::new(Control::default());
        let io = PollIo {
            control: control.clone(),
            ..Default::default()
        };
        let worker = Handle::spawn(config, events.clone(), || Ok(io)).unwrap();
        let volume = worker
            .add_volume(RamDisk::new(&control), Uuid([1; 16]))
            .unwrap();
        let spec = ExportSpec {
            id: 9,
            queues: 2,
            read_only: false,
            logical_block_bytes: 512,
            serial: [b's'; ID_BYTES],
            write_cache: true,
        };
        let export = worker.add_export(volume, spec).unwrap();
        let driver = Driver::new(16, features);
        worker.set_memory(export, driver.memory.clone()).unwrap();
        let bench = Self {
            worker,
            events,
            control,
            volume,
            export,
            driver,
            kick: EventFd::new().unwrap(),
            call: EventFd::new().unwrap(),
            error: EventFd::new().unwrap(),
        };
        bench.start(0, polling).unwrap();
        bench
    }

    pub fn start(&self, base: u16, polling: bool) -> Result<(), CommandError> {
        let start = QueueStart {
            ring: self.driver.config(),
            base,
            kick: (!polling).then(|| duplicate(&self.kick)),
            call: Some(duplicate(&self.call)),
            error: Some(duplicate(&self.error)),
            enabled: true,
        };
        self.worker.start_queue(self.export, 0, start)
    }

    /// Puts a request into descriptors from `slot * 4` on and offers it.
    pub fn offer(&mut self, slot: u16, readable: &[u8], writable_bytes: u32) {
        let at = DATA_ADDRESS + u64::from(slot) * 0x8000;
        write_guest(&self.driver.memory, at, readable);
        write_guest(
            &self.driver.memory,
            at + 0x4000,
            &vec![0xee; writable_bytes as usize],
        );
        let descs = [
            Desc {
                address: at,
                len: readable.len() as u32,
                flags: 0,
                next: 0,
            },
            Desc {
                address: at + 0x4000,
                len: writable_bytes,
                flags: WRITE,
                next: 0,
            },
        ];
        self.driver.describe_chain(slot * 4, &descs);
        self.driver.offer(slot * 4);
    }

    pub fn answer(&self, slot: u16, len: usize) -> Vec<u8> {
        read_guest(
            &self.driver.memory,
            DATA_ADDRESS + u64::from(slot) * 0x8000 + 0x4000,
            len,
        )
    }

    /// Waits for the call eventfd until the used index is `index`.
    pub fn wait_used(&self, index: u16) {
        let start = Instant::now();
        while self.driver.used_index() != index {
            assert!(
                start.elapsed() < LIMIT,
                "used index {} of {index}",
                self.driver.used_index()
            );
            assert!(
                readable(self.call.raw()),
                "no notification within {LIMIT:?}"
            );
            self.call.clear();
        }
    }

    /// Waits until the disk was given `count` requests; the worker is asked, so nothing is slept.
    pub fn wait_submitted(&self, count: u64) {
        let start = Instant::now();
        while self.control.submitted.load(Ordering::SeqCst) < count {
            assert!(start.elapsed() < LIMIT);
            self.worker.stats().unwrap();
        }
    }

    pub fn wait_event(&self, wanted: impl Fn(&Event<u32>) -> bool) {
        loop {
            if self.events.take().iter().any(&wanted) {
                return;
            }
            assert!(readable(self.events.fd()), "no event within {LIMIT:?}");
        }
    }
}

pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}
