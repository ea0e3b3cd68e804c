//! The loop of a worker thread.
//!
//! One turn: commands, completions, new chains, the volumes' own work, answers. A turn that found
//! something to do is followed by another at once; after `poll_ns` of turns that did not, the worker
//! asks for notifications, looks once more, and sleeps in its I/O queue.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use super::clock::now;
use super::commands::{CommandError, Reply, WorkerStats};
use super::disk::{Disk, WorkerIo};
use super::eventfd::EventFd;
use super::events::{Event, Events};
use super::export::Export;
use super::handle::{Command, Slots};
use crate::io::{AlignedBuf, Completion, Io, IoBuf, Op, Target, Token, WatchId};
use crate::request::{self, Action, Status};
use crate::ring::{Chain, GuestMemory, QueueError, losses};
use crate::types::Uuid;
use crate::volume::{Finished, Now, Request, RequestFailed, RequestId, RequestKind};

/// Bits of a token below a volume's slot.
const TOKEN_BITS: u32 = 40;
/// Chains taken from one queue in a turn: its neighbours get their turn as well.
const BATCH: usize = 64;
/// Commands run in a turn, so that a flood of them does not stop the disks.
const COMMANDS: usize = 64;
/// A queue without a kick eventfd is looked at this often while the worker sleeps
/// (vhost-user.rst, VHOST_USER_SET_VRING_KICK: polling is used instead).
const POLLED_QUEUE_NS: u64 = 100_000;
/// Watch of the worker's own eventfd; kicks count from there.
const WAKE_WATCH: WatchId = WatchId(0);

/// Where a request came from and where its answer goes.
#[derive(Debug)]
pub(super) enum Origin {
    Nobody,
    /// `memory` keeps the request's buffers mapped.
    Guest {
        export: usize,
        queue: usize,
        reply: request::Reply,
        _memory: Arc<GuestMemory>,
    },
    Transfer {
        buffer: AlignedBuf,
        reply: Reply<AlignedBuf>,
    },
    Direct {
        reply: Reply<()>,
    },
}

/// A request in flight: one guest request may be several of the volume.
#[derive(Debug)]
struct Pending {
    origin: Origin,
    left: u32,
    failed: Option<RequestFailed>,
    /// Where a guest's read puts its data; zeroed if it fails, so that no unverified byte is shown.
    data: Vec<IoBuf>,
}

/// What a volume makes of a checkpoint, and of a close.
pub(super) type Checkpointed<D> = Result<<D as Disk>::Checkpoint, <D as Disk>::Error>;
pub(super) type Closed<D> = Result<Option<<D as Disk>::Checkpoint>, <D as Disk>::Error>;

pub(super) struct VolumeSlot<D: Disk> {
    pub disk: D,
    pub uuid: Uuid,
    pub exports: usize,
    pub checkpoint: Option<Reply<Checkpointed<D>>>,
    pub close: Option<Reply<Closed<D>>>,
    /// It takes no more requests.
    pub closing: bool,
    /// Its close went well: it is driven until it is quiet, also while it is dropped.
    pub closed: bool,
    /// It goes when its operations have come back: their buffers are its own.
    pub dropping: Option<Reply<()>>,
    operations: usize,
    requests: Vec<Pending>,
    free: Vec<u32>,
}

/// Counts a volume's operations.
struct SlotIo<'a> {
    io: &'a mut dyn Io,
    operations: &'a mut usize,
}

impl Io for SlotIo<'_> {
    fn submit(&mut self, token: Token, target: Target, op: Op) {
        *self.operations += 1;
        self.io.submit(token, target, op);
    }

    /// Completions are the worker's to collect and hand out.
    fn poll(&mut self, _out: &mut Vec<Completion>) {}

    fn wait(&mut self, _timeout: Option<Duration>, _out: &mut Vec<Completion>) {}

    fn in_flight(&self) -> usize {
        *self.operations
    }
}

impl<D: Disk> VolumeSlot<D> {
    pub fn new(disk: D, uuid: Uuid) -> Self {
        Self {
            disk,
            uuid,
            exports: 0,
            checkpoint: None,
            close: None,
            closing: false,
            closed: false,
            dropping: None,
            operations: 0,
            requests: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Whether the volume goes on with its work; otherwise its operations are waited for, no more.
    fn is_driven(&self) -> bool {
        self.dropping.is_none() || (self.closed && !self.disk.is_closed())
    }

    /// Calls the volume with an I/O queue that counts.
    pub fn run<T>(&mut self, io: &mut dyn Io, f: impl FnOnce(&mut D, &mut dyn Io) -> T) -> T {
        f(
            &mut self.disk,
            &mut SlotIo {
                io,
                operations: &mut self.operations,
            },
        )
    }

    /// A place for a request that is `parts` requests of the volume.
    fn begin(&mut self, origin: Origin, parts: u32) -> u32 {
        if let Some(index) = self.free.pop() {
            let pending = &mut self.requests[index as usize];
            pending.origin = origin;
            pending.left = parts;
            return index;
        }
        self.requests.push(Pending {
            origin,
            left: parts,
            failed: None,
            data: Vec::new(),
        });
        (self.requests.len() - 1) as u32
    }

    /// Submits one request. Ids are unique: the part's number is above the place's.
    fn submit_part(
        &mut self,
        io: &mut dyn Io,
        index: u32,
        part: u32,
        kind: RequestKind,
        write_through: bool,
        now: Now,
    ) {
        let id = RequestId(u64::from(part) << 32 | u64::from(index));
        self.run(io, |disk, io| {
            disk.submit(
                io,
                Request {
                    id,
                    kind,
                    write_through,
                },
                now,
            )
        });
    }

    pub fn submit(
        &mut self,
        io: &mut dyn Io,
        origin: Origin,
        kind: RequestKind,
        write_through: bool,
        now: Now,
    ) {
        let index = self.begin(origin, 1);
        if let (RequestKind::Read { into, .. }, Origin::Guest { .. }) =
            (&kind, &self.requests[index as usize].origin)
        {
            self.requests[index as usize].data.extend_from_slice(into);
        }
        self.submit_part(io, index, 0, kind, write_through, now);
    }

    /// What a guest asks; `action` is not `Done`.
    fn submit_action(
        &mut self,
        io: &mut dyn Io,
        origin: Origin,
        action: Action,
        write_through: bool,
        now: Now,
    ) {
        let kind = match action {
            Action::Read { offset_bytes, into } => RequestKind::Read { offset_bytes, into },
            Action::Write { offset_bytes, from } => RequestKind::Write { offset_bytes, from },
            Action::Flush => RequestKind::Flush,
            Action::Unmap { ranges, exact } => {
                let index = self.begin(origin, ranges.len() as u32);
                for (part, range) in ranges.iter().enumerate() {
                    let kind = RequestKind::Unmap {
                        offset_bytes: range.offset_bytes,
                        len_bytes: range.len_bytes,
                        exact,
                    };
                    self.submit_part(io, index, part as u32, kind, write_through, now);
                }
                return;
            }
            Action::Done(_) => unreachable!("an answer is not a question for the volume"),
        };
        self.submit(io, origin, kind, write_through, now);
    }

    /// Takes one finished part; when it was the last, the origin and the outcome of the whole.
    fn finish(&mut self, finished: &Finished) -> Option<(Origin, Result<(), RequestFailed>)> {
        let index = finished.id.0 as u32;
        let pending = &mut self.requests[index as usize];
        if let Err(failed) = finished.result {
            pending.failed.get_or_insert(failed);
        }
        pending.left -= 1;
        if pending.left > 0 {
            return None;
        }
        let outcome = pending.failed.take().map_or(Ok(()), Err);
        if outcome.is_err() {
            // The origin still holds the memory.
            pending.data.iter().for_each(IoBuf::zero);
        }
        pending.data.clear();
        let origin = std::mem::replace(&mut pending.origin, Origin::Nobody);
        self.free.push(index);
        Some((origin, outcome))
    }
}

/// Everything a worker thread owns.
pub struct Worker<D: Disk, I: WorkerIo> {
    /// First, so that it is dropped first: it waits for operations whose buffers are below.
    pub(super) io: I,
    pub(super) volumes: Slots<VolumeSlot<D>>,
    pub(super) exports: Slots<Export>,
    /// Queues to look at: (export, queue).
    active: Vec<(usize, usize)>,
    /// A queue started, stopped or broke since `active` was made.
    pub(super) active_stale: bool,
    /// Queues to publish and, if draining, perhaps to stop.
    pub(super) touched: Vec<(usize, usize)>,
    pub(super) watches: HashMap<u64, (usize, usize)>,
    next_watch: u64,
    commands: Receiver<Command<D, I>>,
    wake: Arc<EventFd>,
    pub(super) events: Arc<Events<D::Event>>,
    poll_ns: u64,
    stop: bool,
    losses_seen: u64,
    pub(super) stats: WorkerStats,
    chain: Chain,
    completions: Vec<Completion>,
    finished: Vec<Finished>,
    fired: Vec<WatchId>,
    volume_events: Vec<D::Event>,
}

impl<D: Disk, I: WorkerIo> Worker<D, I> {
    pub(super) fn new(
        mut io: I,
        commands: Receiver<Command<D, I>>,
        wake: Arc<EventFd>,
        events: Arc<Events<D::Event>>,
        poll: Duration,
    ) -> io::Result<Self> {
        io.watch(wake.as_fd(), WAKE_WATCH)?;
        Ok(Self {
            io,
            volumes: Slots::new(),
            exports: Slots::new(),
            active: Vec::new(),
            active_stale: false,
            touched: Vec::new(),
            watches: HashMap::new(),
            next_watch: WAKE_WATCH.0,
            commands,
            wake,
            events,
            poll_ns: poll.as_nanos() as u64,
            stop: false,
            losses_seen: losses(),
            stats: WorkerStats::default(),
            chain: Chain::new(),
            completions: Vec::new(),
            finished: Vec::new(),
            fired: Vec::new(),
            volume_events: Vec::new(),
        })
    }

    pub(super) fn run(mut self) {
        let mut busy_at = now().monotonic_ns;
        while !self.stop {
            let now = now();
            let mut busy = self.run_commands();
            busy |= self.collect(now);
            self.check_memory();
            busy |= self.serve(now);
            for (_, slot) in self.volumes.iter_mut().filter(|(_, slot)| slot.is_driven()) {
                slot.run(&mut self.io, |disk, io| disk.advance(io, now));
            }
            busy |= self.deliver();
            busy |= self.reap();
            self.settle();
            if busy {
                busy_at = now.monotonic_ns;
            } else if now.monotonic_ns.saturating_sub(busy_at) >= self.poll_ns {
                self.sleep(now);
                busy_at = super::clock::now().monotonic_ns;
            }
        }
    }

    /// Ends the loop after this turn.
    pub(super) fn stop(&mut self) {
        self.stop = true;
    }

    pub fn io_mut(&mut self) -> &mut I {
        &mut self.io
    }

    /// Runs what other threads asked; at most so much that disks get their turn.
    fn run_commands(&mut self) -> bool {
        for done in 0..COMMANDS {
            match self.commands.try_recv() {
                Ok(command) => command(self),
                Err(_) => return done > 0,
            }
        }
        true
    }

    /// Hands completed operations to their volumes.
    fn collect(&mut self, now: Now) -> bool {
        self.io.poll(&mut self.completions);
        let any = !self.completions.is_empty();
        for completion in self.completions.drain(..) {
            let slot = (completion.token.0 >> TOKEN_BITS) as usize;
            let Some(slot) = self.volumes.get_mut(slot) else {
                unreachable!("a volume stays until its operations have come back")
            };
            slot.operations -= 1;
            if slot.is_driven() {
                slot.run(&mut self.io, |disk, io| {
                    disk.on_completion(io, completion, now)
                });
            }
        }
        any
    }

    /// Stops the rings of sessions whose front-end took their memory away.
    fn check_memory(&mut self) {
        let losses = losses();
        if losses == self.losses_seen {
            return;
        }
        self.losses_seen = losses;
        for (_, export) in self.exports.iter_mut().filter(|(_, export)| !export.lost) {
            let Some(region) = export.memory.lost() else {
                continue;
            };
            export.lost = true;
            for queue in &mut export.queues {
                queue.broken = true;
                if let Some(error) = &queue.error {
                    error.signal();
                }
            }
            self.active_stale = true;
            let reason = format!(
                "the front-end truncated the file behind guest memory at {region:#x}; its queues are stopped until it connects again"
            );
            self.events.push(Event::MemoryLost {
                export: export.spec.id,
                reason,
            });
        }
    }

    /// Takes new chains from every active queue.
    fn serve(&mut self, now: Now) -> bool {
        if self.active_stale {
            self.active_stale = false;
            self.active.clear();
            for (e, export) in self.exports.iter_mut() {
                let running = export
                    .queues
                    .iter()
                    .enumerate()
                    .filter(|(_, queue)| queue.runs());
                self.active.extend(running.map(|(q, _)| (e, q)));
            }
            self.tell_draining();
        }
        let mut any = false;
        for at in 0..self.active.len() {
            let (e, q) = self.active[at];
            any |= self.serve_queue(e, q, now);
        }
        any
    }

    /// Tells volumes whether someone waits for the end of their requests.
    fn tell_draining(&mut self) {
        let stops = |queue: &super::export::Queue| queue.stopping.is_some();
        let draining: Vec<usize> = self
            .exports
            .iter_mut()
            .filter(|(_, export)| export.queues.iter().any(stops))
            .map(|(_, export)| export.volume)
            .collect();
        for (index, slot) in self.volumes.iter_mut() {
            slot.disk.set_draining(draining.contains(&index));
        }
    }

    fn serve_queue(&mut self, e: usize, q: usize, now: Now) -> bool {
        let Some(export) = self.exports.get_mut(e) else {
            return false;
        };
        let Some(slot) = self.volumes.get_mut(export.volume) else {
            return false;
        };
        let shape = export.shape(slot.disk.size_bytes());
        let write_through = export.write_through(q);
        let queue = &mut export.queues[q];
        let Some(ring) = &mut queue.ring else {
            return false;
        };
        let mut taken = 0;
        // A guest may offer a chain again before it was answered; the bound holds all the same.
        while taken < BATCH && queue.in_flight < queue.size {
            match ring.pop(&mut self.chain) {
                Ok(true) => taken += 1,
                Ok(false) => break,
                Err(error) => {
                    self.break_ring(e, q, &error);
                    return true;
                }
            }
            let request::Parsed { action, reply } =
                request::parse(&self.chain, &shape, &export.spec.serial);
            if let Action::Done(status) = action {
                let written = reply.write(status, true);
                ring.push(reply.head(), written);
                if !std::mem::replace(&mut queue.unpublished, true) {
                    self.touched.push((e, q));
                }
                self.stats.refused += u64::from(status != Status::Ok);
                continue;
            }
            queue.in_flight += 1;
            let origin = Origin::Guest {
                export: e,
                queue: q,
                reply,
                _memory: Arc::clone(ring.memory()),
            };
            slot.submit_action(&mut self.io, origin, action, write_through, now);
        }
        self.stats.requests += taken as u64;
        taken > 0
    }

    /// The guest broke a ring: that ring stops, and whoever should know is told.
    fn break_ring(&mut self, e: usize, q: usize, error: &QueueError) {
        let Some(export) = self.exports.get_mut(e) else {
            return;
        };
        let queue = &mut export.queues[q];
        queue.broken = true;
        if let Some(fd) = &queue.error {
            fd.signal();
        }
        self.active_stale = true;
        self.stats.rings_broken += 1;
        let reason = format!("{error}; the queue is stopped until the guest resets its device");
        self.events.push(Event::RingBroken {
            export: export.spec.id,
            queue: q as u16,
            reason,
        });
    }

    /// Answers what volumes have finished.
    fn deliver(&mut self) -> bool {
        let mut any = false;
        for (_, slot) in self.volumes.iter_mut() {
            if slot.dropping.is_some() {
                continue;
            }
            slot.disk.take_finished(&mut self.finished);
            any |= !self.finished.is_empty();
            for finished in self.finished.drain(..) {
                let Some((origin, outcome)) = slot.finish(&finished) else {
                    continue;
                };
                match origin {
                    Origin::Guest {
                        export: e,
                        queue: q,
                        reply,
                        ..
                    } => {
                        let Some(export) = self.exports.get_mut(e) else {
                            unreachable!("an export stays until its requests are answered")
                        };
                        let queue = &mut export.queues[q];
                        let status = if outcome.is_ok() {
                            Status::Ok
                        } else {
                            Status::IoErr
                        };
                        self.stats.failed += u64::from(outcome.is_err());
                        let written = reply.write(status, true);
                        if let Some(ring) = &mut queue.ring {
                            ring.push(reply.head(), written);
                        }
                        queue.in_flight -= 1;
                        if !std::mem::replace(&mut queue.unpublished, true) {
                            self.touched.push((e, q));
                        }
                    }
                    Origin::Transfer { buffer, reply } => {
                        reply.send(outcome.map(|()| buffer).map_err(CommandError::Failed));
                    }
                    Origin::Direct { reply } => reply.send(outcome.map_err(CommandError::Failed)),
                    Origin::Nobody => unreachable!("a request finishes once"),
                }
            }
        }
        any
    }

    /// Ends what volumes did for other threads, and passes their events on.
    fn reap(&mut self) -> bool {
        let mut any = false;
        let mut gone = Vec::new();
        for (index, slot) in self.volumes.iter_mut() {
            if slot.dropping.is_some() {
                if slot.operations == 0 && !slot.is_driven() {
                    gone.push(index);
                }
                continue;
            }
            slot.disk.take_events(&mut self.volume_events);
            for event in self.volume_events.drain(..) {
                self.events.push(Event::Volume {
                    volume: slot.uuid,
                    event,
                });
            }
            if slot.checkpoint.is_some()
                && let Some(result) = slot.disk.take_checkpoint()
                && let Some(reply) = slot.checkpoint.take()
            {
                reply.send(Ok(result));
                any = true;
            }
            if slot.close.is_some()
                && let Some(result) = slot.disk.take_closed()
                && let Some(reply) = slot.close.take()
            {
                slot.closed = result.is_ok();
                reply.send(Ok(result));
                any = true;
            }
        }
        for index in gone {
            if let Some(slot) = self.volumes.remove(index)
                && let Some(reply) = slot.dropping
            {
                drop(slot.disk);
                reply.send(Ok(()));
            }
            any = true;
        }
        any
    }

    /// Shows drivers what was pushed, tells them if they want, and stops queues that have drained.
    fn settle(&mut self) {
        let mut touched = std::mem::take(&mut self.touched);
        for (e, q) in touched.drain(..) {
            let Some(export) = self.exports.get_mut(e) else {
                continue;
            };
            let queue = &mut export.queues[q];
            let drained = queue.in_flight == 0;
            if let Some(ring) = &mut queue.ring
                && std::mem::take(&mut queue.unpublished)
            {
                ring.publish();
                if ring.needs_notify(drained)
                    && let Some(call) = &queue.call
                {
                    call.signal();
                    self.stats.notifications += 1;
                }
            }
            if drained && queue.stopping.is_some() {
                self.finish_stop(e, q);
            }
        }
        // Stopping closes exports and touches nothing new.
        self.touched = touched;
    }

    /// Sleeps until there is something to do.
    fn sleep(&mut self, now: Now) {
        // What fired until here is cleared before we look; what fires from here on ends the wait.
        self.clear_fired();
        if !self.ready_to_sleep() {
            return;
        }
        // The wake-up eventfd is signalled after a command was sent; it may have been cleared above.
        if self.run_commands() {
            return;
        }
        let mut timeout_ns: Option<u64> = None;
        let mut limit = |ns: u64| timeout_ns = Some(timeout_ns.map_or(ns, |t| t.min(ns)));
        for (_, slot) in self.volumes.iter_mut().filter(|(_, slot)| slot.is_driven()) {
            if let Some(deadline_ns) = slot.disk.deadline_ns() {
                limit(deadline_ns.saturating_sub(now.monotonic_ns));
            }
        }
        for &(e, q) in &self.active {
            if self
                .exports
                .get_mut(e)
                .is_some_and(|export| export.queues[q].kick.is_none())
            {
                limit(POLLED_QUEUE_NS);
            }
        }
        self.stats.sleeps += 1;
        self.io
            .wait(timeout_ns.map(Duration::from_nanos), &mut self.completions);
        self.clear_fired();
        for at in 0..self.active.len() {
            let (e, q) = self.active[at];
            if let Some(export) = self.exports.get_mut(e)
                && let Some(ring) = &export.queues[q].ring
            {
                ring.disable_notifications();
            }
        }
    }

    /// Asks all drivers for notifications; false if one has offered something meanwhile that can be
    /// taken.
    fn ready_to_sleep(&mut self) -> bool {
        if self.active_stale {
            return false;
        }
        let mut ready = true;
        for at in 0..self.active.len() {
            let (e, q) = self.active[at];
            let Some(export) = self.exports.get_mut(e) else {
                continue;
            };
            let queue = &mut export.queues[q];
            let Some(ring) = &mut queue.ring else {
                continue;
            };
            match ring.enable_notifications() {
                Ok(more) => ready &= !more || queue.in_flight >= queue.size,
                Err(error) => {
                    self.break_ring(e, q, &error);
                    ready = false;
                }
            }
        }
        ready
    }

    fn clear_fired(&mut self) {
        let mut fired = std::mem::take(&mut self.fired);
        self.io.take_fired(&mut fired);
        for id in fired.drain(..) {
            if id == WAKE_WATCH {
                self.wake.clear();
            } else if let Some(&(e, q)) = self.watches.get(&id.0)
                && let Some(export) = self.exports.get_mut(e)
                && let Some(kick) = &export.queues[q].kick
            {
                self.stats.kicks += u64::from(kick.fd.clear());
            }
        }
        self.fired = fired;
    }

    /// An id for a watch that was never used.
    pub(super) fn fresh_watch(&mut self) -> WatchId {
        self.next_watch += 1;
        WatchId(self.next_watch)
    }
}
