//! [`Io`] on real devices through io_uring.
//!
//! Life of an operation (a *slot* of the table):
//!
//! ```text
//! submit ─┬─▶ the file is open ──┬─▶ Running ─┬─▶ completion
//!         ├─▶ Opening (openat) ──┘      ▲     │
//!         │                             └─────┘ short transfer, EINTR, EAGAIN
//!         └─▶ Helped (create, remove: on the helper thread) ─▶ completion
//! ```
//!
//! Invariants:
//! - Memory and files that the kernel may use belong to a slot until the kernel has completed it;
//!   dropping a [`UringIo`] waits for that.
//! - Every submission that the ring has no room for is in `backlog`, in order. Its length is
//!   bounded by what the submitters have in flight.
//! - A poll with nothing to submit and nothing completed makes no system call; a sleep without a
//!   time limit arms no timer.
//!
//! The thread that uses it first owns it (the ring has a single issuer); until then it may be
//! moved. Linux 5.13 or newer is needed; the flags of newer kernels are used where there are.
//!
//! Unsafe here: handing entries to the ring, and entering it with flags of our own.

mod helper;
mod slot;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use self::helper::{Helper, Job, Task};
use self::slot::{Slot, Stage, Step, Transfer, Work};
use super::{Completion, DeviceId, Io, Op, Target, Token};
use crate::device::{Access, DirectoryDevice};

/// Device ids are small indices; a larger one is a defect.
const MAX_DEVICES: u32 = 4096;

/// What a completion queue entry is about: the high byte of its user data.
const ABOUT_SHIFT: u32 = 56;
const ABOUT_SLOT: u64 = 0;
const ABOUT_WATCH: u64 = 1;
const ABOUT_HELPER: u64 = 2;
const ABOUT_NOTHING: u64 = 3;
/// A watch's user data: index in the low half, above it 24 bits of its generation.
const GENERATION_SHIFT: u32 = 32;
const GENERATION_MASK: u32 = 0x00ff_ffff;

/// Flags of io_uring_enter (linux/io_uring.h), which the crate keeps to itself.
const ENTER_GETEVENTS: u32 = 1;
const ENTER_EXT_ARG: u32 = 1 << 3;
/// Linux 6.15.
const ENTER_NO_IOWAIT: u32 = 1 << 7;

/// Chosen by who watches an eventfd, handed back when it has fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WatchId(pub u64);

/// See the module's description.
pub struct UringIo {
    ring: IoUring,
    /// Whether the ring has been enabled, and so belongs to a thread.
    enabled: bool,
    devices: Vec<Option<Arc<DirectoryDevice>>>,
    slots: Vec<Option<Slot>>,
    free_slots: Vec<u32>,
    backlog: VecDeque<squeue::Entry>,
    /// Completed and not handed back yet.
    ready: Vec<Completion>,
    watches: Vec<Option<Watch>>,
    /// Tells entries of an earlier watch in the same place from those of the present one.
    generation: u32,
    fired: Vec<WatchId>,
    /// Started with its first job.
    helper: Option<Helper>,
    /// System calls made for the ring.
    enters: u64,
    /// Buffers that are kept for their capacity.
    completed: Vec<(u64, i32, u32)>,
    helped: Vec<(u32, io::Result<()>)>,
}

struct Watch {
    id: WatchId,
    /// Ours, so that it can be armed again whatever the owner does with its own.
    fd: OwnedFd,
    generation: u32,
    /// In `fired` and not taken.
    fired: bool,
    armed: bool,
}

impl UringIo {
    /// A ring with room for `entries` submissions at once (rounded up to a power of two).
    ///
    /// # Errors
    /// What the operating system says; `Unsupported` if the kernel lacks what is needed.
    pub fn new(entries: u32) -> io::Result<Self> {
        let (ring, enabled) = build_ring(entries)?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "io_uring of this kernel is too old; Linux 5.13 or newer is needed",
            ));
        }
        Ok(Self {
            ring,
            enabled,
            devices: Vec::new(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            backlog: VecDeque::new(),
            ready: Vec::new(),
            watches: Vec::new(),
            generation: 0,
            fired: Vec::new(),
            helper: None,
            completed: Vec::new(),
            enters: 0,
            helped: Vec::new(),
        })
    }

    /// Registers a device; operations on `id` go to it from now on.
    ///
    /// # Panics
    /// If `id` is 4096 or more.
    pub fn add_device(&mut self, id: DeviceId, device: Arc<DirectoryDevice>) {
        assert!(id.0 < MAX_DEVICES, "device ids are small indices");
        let index = id.0 as usize;
        if self.devices.len() <= index {
            self.devices.resize(index + 1, None);
        }
        self.devices[index] = Some(device);
    }

    /// Forgets a device. Operations in flight end as they would; new ones fail with ENODEV.
    pub fn remove_device(&mut self, id: DeviceId) -> Option<Arc<DirectoryDevice>> {
        self.devices.get_mut(id.0 as usize)?.take()
    }

    /// Has `wait` return when `eventfd` becomes readable, and [`Self::take_fired`] tell `id`. It
    /// fires at once if it is readable now, and then for each write to it. The owner reads it.
    ///
    /// # Errors
    /// If the descriptor cannot be duplicated.
    pub fn watch(&mut self, eventfd: BorrowedFd<'_>, id: WatchId) -> io::Result<()> {
        let fd = eventfd.try_clone_to_owned()?;
        let index = self.watches.iter().position(Option::is_none);
        let index = index.unwrap_or_else(|| {
            self.watches.push(None);
            self.watches.len() - 1
        });
        self.generation = (self.generation + 1) & GENERATION_MASK;
        self.watches[index] = Some(Watch {
            id,
            fd,
            generation: self.generation,
            fired: false,
            armed: false,
        });
        self.arm(index);
        Ok(())
    }

    /// Stops watching; `id` is not reported any more, not even if it has fired already.
    pub fn unwatch(&mut self, id: WatchId) {
        self.fired.retain(|&fired| fired != id);
        for index in 0..self.watches.len() {
            if self.watches[index]
                .as_ref()
                .is_some_and(|watch| watch.id == id)
                && let Some(watch) = self.watches[index].take()
                && watch.armed
            {
                let poll = watch_data(index, watch.generation);
                let entry = opcode::PollRemove::new(poll).build();
                self.push(entry.user_data(ABOUT_NOTHING << ABOUT_SHIFT));
            }
        }
    }

    /// Appends the ids of the watches that have fired since they were taken last, each once.
    pub fn take_fired(&mut self, out: &mut Vec<WatchId>) {
        if self.fired.is_empty() {
            return;
        }
        out.append(&mut self.fired);
        for index in 0..self.watches.len() {
            if let Some(watch) = &mut self.watches[index]
                && watch.fired
            {
                watch.fired = false;
                if !watch.armed {
                    self.arm(index);
                }
            }
        }
    }

    /// Whether [`Self::take_fired`] has something.
    #[must_use]
    pub fn has_fired(&self) -> bool {
        !self.fired.is_empty()
    }

    /// System calls made for the ring so far, for statistics.
    #[must_use]
    pub const fn system_calls(&self) -> u64 {
        self.enters
    }

    fn arm(&mut self, index: usize) {
        if let Some(watch) = &mut self.watches[index] {
            watch.armed = true;
            let fd = Fd(watch.fd.as_raw_fd());
            let data = watch_data(index, watch.generation);
            self.push(poll_entry(fd).user_data(data));
        }
    }

    /// Starts an operation whose slot says what to do: on the open file, or by opening it.
    fn start(&mut self, index: u32, device: Arc<DirectoryDevice>) {
        let Some(slot) = self.slots[index as usize].as_mut() else {
            return;
        };
        let wanted = match slot.work {
            Work::Write { direct: true, .. } => Access::Direct,
            _ => Access::Buffered,
        };
        let access = device.possible_access(wanted);
        let number = slot.target.segment;
        if let Some(file) = device.open_file(number, access) {
            slot.stage = Stage::Running(file);
        } else {
            let (_, path, _) = device.open_arguments(number, access);
            slot.stage = Stage::Opening {
                path,
                access,
                device,
            };
        }
        self.issue(index);
    }

    /// Queues the kernel's part of a slot, from the start or carrying on.
    fn issue(&mut self, index: u32) {
        if let Some(slot) = self.slots[index as usize].as_mut() {
            let entry = slot.entry().user_data(u64::from(index));
            self.push(entry);
        }
    }

    fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            // SAFETY: the buffers, paths and descriptors that entries point to belong to slots
            // and watches, which live until the kernel has completed the entry (see the
            // invariants; IoBuf's owner keeps its memory mapped until the completion is taken).
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    /// Submits everything that is queued; lets the kernel post completions it has deferred.
    fn flush(&mut self) {
        loop {
            let (queued, deferred) = {
                let mut queue = self.ring.submission();
                while let Some(entry) = self.backlog.front() {
                    // SAFETY: as in `push`.
                    if unsafe { queue.push(entry) }.is_err() {
                        break;
                    }
                    self.backlog.pop_front();
                }
                (queue.len(), queue.taskrun() || queue.cq_overflow())
            };
            if queued == 0 && !deferred {
                return;
            }
            self.enable();
            self.enters += 1;
            match self.ring.submit() {
                Ok(_) if self.backlog.is_empty() => return,
                Ok(_) => {}
                Err(error) if is_interrupted(&error) => {}
                // The rest is submitted after completions have been taken.
                Err(error) if is_busy(&error) => return,
                Err(error) => panic!("io_uring_enter failed: {error}"),
            }
        }
    }

    /// The first use: from here on the ring belongs to this thread.
    fn enable(&mut self) {
        if !self.enabled {
            self.enabled = true;
            if let Err(error) = self.ring.submitter().register_enable_rings() {
                panic!("the io_uring cannot be enabled: {error}");
            }
        }
    }

    /// Submits and takes completions until nothing more follows from them, without blocking.
    fn turn(&mut self, out: &mut Vec<Completion>) {
        loop {
            self.flush();
            let mut completed = std::mem::take(&mut self.completed);
            completed.extend(
                self.ring
                    .completion()
                    .map(|entry| (entry.user_data(), entry.result(), entry.flags())),
            );
            let seen = !completed.is_empty();
            for (data, result, flags) in completed.drain(..) {
                match data >> ABOUT_SHIFT {
                    ABOUT_SLOT => self.on_slot(data as u32, result),
                    ABOUT_WATCH => self.on_watch(data, result, flags),
                    ABOUT_HELPER => self.on_helper_wake(flags),
                    _ => {}
                }
            }
            self.completed = completed;
            self.take_helped();
            if !seen || self.ring.submission().is_empty() {
                break;
            }
        }
        out.append(&mut self.ready);
    }

    fn on_slot(&mut self, index: u32, result: i32) {
        let Some(mut slot) = self.slots[index as usize].take() else {
            debug_assert!(false, "a completion for a free slot");
            return;
        };
        match slot.advance(result) {
            Step::Again => {
                self.slots[index as usize] = Some(slot);
                self.issue(index);
            }
            Step::Done(result) => {
                self.free_slots.push(index);
                self.ready.push(Completion {
                    token: slot.token,
                    result,
                });
            }
        }
    }

    fn on_watch(&mut self, data: u64, result: i32, flags: u32) {
        let index = data as u32 as usize;
        let generation = (data >> GENERATION_SHIFT) as u32 & GENERATION_MASK;
        let Some(watch) = self.watches.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        if watch.generation != generation {
            return;
        }
        if !watch.fired {
            watch.fired = true;
            self.fired.push(watch.id);
        }
        if !cqueue::more(flags) {
            watch.armed = false;
            // After an error it is armed again when the owner has looked at the eventfd, so that
            // neither a write is missed nor time spent on repeating the error.
            if result >= 0 {
                self.arm(index);
            }
        }
    }

    fn on_helper_wake(&mut self, flags: u32) {
        let Some(helper) = &self.helper else {
            return;
        };
        let fd = helper.wake_fd();
        // It may have been read with an earlier wake-up.
        let _ = rustix::io::read(fd, &mut [0u8; 8]);
        let raw = fd.as_raw_fd();
        if !cqueue::more(flags) {
            self.arm_helper(raw);
        }
    }

    fn arm_helper(&mut self, fd: RawFd) {
        self.push(poll_entry(Fd(fd)).user_data(ABOUT_HELPER << ABOUT_SHIFT));
    }

    fn take_helped(&mut self) {
        let Some(helper) = &self.helper else {
            return;
        };
        let mut helped = std::mem::take(&mut self.helped);
        helper.take(&mut helped);
        for (index, result) in helped.drain(..) {
            if let Some(slot) = self.slots[index as usize].take() {
                self.free_slots.push(index);
                self.ready.push(Completion {
                    token: slot.token,
                    result: result.map(|()| 0),
                });
            }
        }
        self.helped = helped;
    }

    fn help(&mut self, slot: u32, device: Arc<DirectoryDevice>, task: Task) -> io::Result<()> {
        if self.helper.is_none() {
            let helper = Helper::spawn()?;
            let wake = helper.wake_fd().as_raw_fd();
            self.helper = Some(helper);
            self.arm_helper(wake);
        }
        let number = match &self.slots[slot as usize] {
            Some(slot) => slot.target.segment,
            None => return Ok(()),
        };
        match &self.helper {
            Some(helper) => helper.submit(Job {
                slot,
                device,
                number,
                task,
            }),
            None => Ok(()),
        }
    }

    fn take_slot(&mut self, slot: Slot) -> u32 {
        if let Some(index) = self.free_slots.pop() {
            self.slots[index as usize] = Some(slot);
            index
        } else {
            self.slots.push(Some(slot));
            (self.slots.len() - 1) as u32
        }
    }

    /// Sleeps until an entry is in the completion queue. `None`: no limit.
    ///
    /// With watches only, the kernel is told that this is no wait for I/O: an idle daemon would
    /// count as a busy disk, and keep its CPU from sleeping deeply.
    fn sleep(&mut self, limit: Option<Duration>) {
        self.enable();
        self.enters += 1;
        let limit = limit.map(Timespec::from);
        let mut args = SubmitArgs::new();
        if let Some(limit) = &limit {
            args = args.timespec(limit);
        }
        let idle = self.slots.len() == self.free_slots.len() && self.ring.submission().is_empty();
        let slept = if idle && self.ring.params().is_feature_no_iowait() {
            let flags = ENTER_GETEVENTS | ENTER_EXT_ARG | ENTER_NO_IOWAIT;
            // SAFETY: the flags say that the argument is a `SubmitArgs`; nothing is submitted.
            unsafe { self.ring.submitter().enter(0, 1, flags, Some(&args)) }
        } else {
            self.ring.submitter().submit_with_args(1, &args)
        };
        match slept {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => {}
            Err(error) if is_interrupted(&error) => {}
            Err(error) if is_busy(&error) => std::thread::yield_now(),
            Err(error) => panic!("io_uring_enter failed: {error}"),
        }
    }
}

impl Io for UringIo {
    fn submit(&mut self, token: Token, target: Target, op: Op) {
        let device = self.devices.get(target.device.0 as usize);
        let Some(device) = device.and_then(Option::as_ref).map(Arc::clone) else {
            let result = Err(io::Error::from_raw_os_error(libc::ENODEV));
            self.ready.push(Completion { token, result });
            return;
        };
        let (work, task) = match op {
            Op::Read { offset_bytes, bufs } => {
                (Work::Read(Transfer::new(offset_bytes, bufs)), None)
            }
            Op::Write {
                offset_bytes,
                bufs,
                direct,
            } => {
                let transfer = Transfer::new(offset_bytes, bufs);
                (Work::Write { transfer, direct }, None)
            }
            Op::Sync => (Work::Sync { writes: 0 }, None),
            Op::Reserve { len_bytes, .. } if !device.may_reserve(len_bytes) => {
                let result = Err(io::Error::from_raw_os_error(libc::ENOSPC));
                self.ready.push(Completion { token, result });
                return;
            }
            Op::Reserve {
                offset_bytes,
                len_bytes,
            } => (
                Work::Reserve {
                    offset_bytes,
                    len_bytes,
                },
                None,
            ),
            Op::Release { ranges } => (Work::release(ranges), None),
            Op::Create { header } => (Work::Helped, Some(Task::Create(header))),
            Op::Remove => (Work::Helped, Some(Task::Remove)),
        };
        if work.is_nothing() {
            let result = Ok(0);
            self.ready.push(Completion { token, result });
            return;
        }
        let index = self.take_slot(Slot {
            token,
            target,
            work,
            stage: Stage::Helped,
            retries: 0,
        });
        let Some(task) = task else {
            self.start(index, device);
            return;
        };
        if let Err(error) = self.help(index, device, task) {
            self.slots[index as usize] = None;
            self.free_slots.push(index);
            let result = Err(error);
            self.ready.push(Completion { token, result });
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) {
        self.turn(out);
    }

    /// External wake-ups are the watched eventfds: it also returns when one has fired that
    /// [`UringIo::take_fired`] has not told yet.
    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completion>) {
        let before = out.len();
        // A limit beyond what a clock can tell is none.
        let deadline = timeout.map(|timeout| Instant::now().checked_add(timeout));
        loop {
            self.turn(out);
            if out.len() > before || !self.fired.is_empty() {
                return;
            }
            let limit = match deadline.flatten() {
                None => None,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    Some(left)
                }
            };
            self.sleep(limit);
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free_slots.len() + self.ready.len()
    }
}

impl Drop for UringIo {
    /// Waits for the kernel to be done with all memory and files. What was not submitted is not
    /// started any more.
    fn drop(&mut self) {
        self.helper = None;
        for entry in std::mem::take(&mut self.backlog) {
            let data = entry.get_user_data();
            if data >> ABOUT_SHIFT == ABOUT_SLOT {
                self.slots[data as u32 as usize] = None;
            }
        }
        for slot in &mut self.slots {
            if matches!(slot, Some(slot) if matches!(slot.stage, Stage::Helped)) {
                *slot = None;
            }
        }
        while self.slots.iter().any(Option::is_some) {
            self.enable();
            if let Err(error) = self.ring.submit_and_wait(1)
                && !is_interrupted(&error)
                && !is_busy(&error)
            {
                // The kernel may still write to memory that the caller is about to free.
                eprintln!("vhostd: cannot wait for I/O in flight ({error}); aborting");
                std::process::abort();
            }
            for entry in self.ring.completion() {
                if entry.user_data() >> ABOUT_SHIFT != ABOUT_SLOT {
                    continue;
                }
                let slot = self.slots[entry.user_data() as u32 as usize].take();
                if let Some(mut slot) = slot
                    && matches!(slot.stage, Stage::Opening { .. })
                {
                    // Takes the descriptor over, so that it is closed with the device.
                    let _ = slot.advance(entry.result());
                }
            }
        }
    }
}

fn watch_data(index: usize, generation: u32) -> u64 {
    ABOUT_WATCH << ABOUT_SHIFT | u64::from(generation) << GENERATION_SHIFT | index as u64
}

fn poll_entry(fd: Fd) -> squeue::Entry {
    opcode::PollAdd::new(fd, libc::POLLIN as u32)
        .multi(true)
        .build()
}

/// The ring with the best flags the kernel takes, and whether it is enabled already.
fn build_ring(entries: u32) -> io::Result<(IoUring, bool)> {
    // Linux 6.1: completions are posted when we ask for them and never interrupt the worker.
    let mut builder = IoUring::builder();
    builder
        .dontfork()
        .setup_r_disabled()
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag();
    if let Ok(ring) = builder.build(entries) {
        return Ok((ring, false));
    }
    // Linux 5.19: at least no interrupts.
    let mut builder = IoUring::builder();
    builder.dontfork().setup_coop_taskrun().setup_taskrun_flag();
    if let Ok(ring) = builder.build(entries) {
        return Ok((ring, true));
    }
    Ok((IoUring::builder().dontfork().build(entries)?, true))
}

fn is_interrupted(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted
}

/// The kernel wants completions to be taken first, or is short of memory for a moment.
fn is_busy(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM)
    )
}

#[cfg(test)]
mod tests;
