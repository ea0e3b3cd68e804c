//! The helper thread of a [`super::UringIo`]: calls that io_uring cannot do asynchronously or that
//! wait for directory entries to be durable.
//!
//! Jobs are done one after the other. Their number is bounded by what the engine has in flight.
//! The eventfd is written after a result can be taken, so whoever sleeps on it misses nothing.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use rustix::event::EventfdFlags;

use crate::device::DirectoryDevice;
use crate::io::AlignedBuf;
use crate::types::SegmentNumber;

pub(super) struct Job {
    /// Handed back with the result.
    pub(super) slot: u32,
    pub(super) device: Arc<DirectoryDevice>,
    pub(super) number: SegmentNumber,
    pub(super) task: Task,
}

pub(super) enum Task {
    Create(Box<AlignedBuf>),
    Remove,
}

pub(super) struct Helper {
    /// `None` only while being dropped.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

struct Shared {
    done: Mutex<Vec<(u32, io::Result<()>)>>,
    /// Whether `done` holds something: saves the owner the lock while it polls.
    has_done: AtomicBool,
    wake: OwnedFd,
}

impl Helper {
    pub(super) fn spawn() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let shared = Arc::new(Shared {
            done: Mutex::default(),
            has_done: AtomicBool::new(false),
            wake: rustix::event::eventfd(0, flags)?,
        });
        let (jobs, queue) = mpsc::channel::<Job>();
        let results = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("vhostd-io".to_owned())
            .spawn(move || {
                for job in queue {
                    let slot = job.slot;
                    results.put(slot, run(job));
                }
            })?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
            shared,
        })
    }

    /// # Errors
    /// If the thread is gone, which only a panic in it can cause.
    pub(super) fn submit(&self, job: Job) -> io::Result<()> {
        self.jobs
            .as_ref()
            .and_then(|jobs| jobs.send(job).ok())
            .ok_or_else(|| io::Error::other("the I/O helper thread has died"))
    }

    /// Becomes readable when there are results.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.shared.wake.as_fd()
    }

    /// Appends the results there are. Without any it costs one load.
    pub(super) fn take(&self, out: &mut Vec<(u32, io::Result<()>)>) {
        if self.shared.has_done.load(Ordering::Acquire) {
            let mut done = self.shared.lock();
            self.shared.has_done.store(false, Ordering::Relaxed);
            out.append(&mut done);
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it has been printed already, and dropping must not panic.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn put(&self, slot: u32, result: io::Result<()>) {
        let mut done = self.lock();
        done.push((slot, result));
        self.has_done.store(true, Ordering::Release);
        drop(done);
        // It only fails when the counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(u32, io::Result<()>)>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(job: Job) -> io::Result<()> {
    match job.task {
        Task::Create(header) => job.device.create(job.number, &header),
        Task::Remove => job.device.unlink(job.number),
    }
}
