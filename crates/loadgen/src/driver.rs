//! The polling loop: keeps every slot busy, times completions, checks what was read.
//!
//! One thread drives all queues. A slot is one request in flight; it owns its place in guest memory
//! (header, status, indirect table, data buffers), so slots never touch each other's bytes. The
//! clock is read once a batch of completions: latencies are exact to the length of a batch.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::error::Error;
use crate::frontend::Frontend;
use crate::histogram::Histogram;
use crate::machine::{MachineCpu, process_cpu_ns};
use crate::memory::{GUEST_BASE, GuestMemory, PAGE_BYTES};
use crate::options::Options;
use crate::ring::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESCRIPTOR_BYTES, Descriptor, Layout, Ring,
};
use crate::series::{Interval, Series};
use crate::stamp::{STAMP_BYTES, Stamps};
use crate::workload::{Generator, Operation, Random};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const HEADER_BYTES: u32 = 16;
/// A slot's own bytes: indirect table, and header and status in one cache line as Linux has them.
const SLOT_BYTES: usize = 256;
const SLOT_HEADER_AT: usize = 128;
const SLOT_STATUS_AT: usize = 144;
const STATUS_UNWRITTEN: u8 = 0xff;
/// Descriptors of the ring a request takes when there is no indirect table.
pub const DIRECT_DESCRIPTORS: u16 = 3;
/// No completion for so long: the disk hangs.
const STUCK: Duration = Duration::from_secs(30);
const LOOK_FOR_HANG_UP: Duration = Duration::from_millis(50);
const IDLE_TURNS_BETWEEN_CLOCKS: u32 = 256;

/// When a drive begins to count and when it ends.
#[derive(Clone, Copy)]
pub struct Limits {
    pub warm_up: Duration,
    pub duration: Option<Duration>,
    pub requests: Option<u64>,
    /// Requests a second, evenly spaced; None: as many as there can be.
    pub rate: Option<f64>,
    /// Cuts the measured time into intervals.
    pub series: Option<Duration>,
    /// Says on standard error when the measured time begins.
    pub announce: bool,
}

/// What was counted between the end of the warm-up and the end.
#[derive(Default)]
pub struct Counted {
    pub requests: u64,
    pub bytes: u64,
    pub elapsed_ns: u64,
    pub latency: Histogram,
    pub ioerr: u64,
    pub unsupp: u64,
    pub other_status: u64,
    pub wrong_used_len: u64,
    pub kicks: u64,
    pub sleeps: u64,
    pub backend_cpu_ns: u64,
    pub frontend_cpu_ns: u64,
    pub machine_busy_ns: u64,
    pub machine_steal_ns: u64,
    pub series: Vec<Interval>,
    /// When the measured time began, by the system's monotonic clock.
    pub began_monotonic_ns: u64,
}

impl Counted {
    pub fn errors(&self) -> u64 {
        self.ioerr + self.unsupp + self.other_status
    }
}

#[derive(Clone, Copy)]
struct Slot {
    /// None: idle.
    operation: Option<Operation>,
    flushing: bool,
    unit: u64,
    start_ns: u64,
    buffer: usize,
}

struct Queue<'m> {
    ring: Ring<'m>,
    kick: OwnedFd,
    call: OwnedFd,
    slots: Vec<Slot>,
}

/// CPU clocks at one moment.
#[derive(Clone, Copy, Default)]
struct Clocks {
    backend_ns: u64,
    frontend_ns: u64,
    machine: MachineCpu,
}

pub struct Driver<'m> {
    memory: &'m GuestMemory,
    queues: Vec<Queue<'m>>,
    options: &'m Options,
    slots_at: usize,
    buffers_at: usize,
    pub stamps: Option<Stamps>,
    /// Units (of the block size) with a request in flight; kept only with stamps.
    busy: Vec<bool>,
    scratch: Box<[u8]>,
    begin: Instant,
    in_flight: u32,
    issued: u64,
    counted: Counted,
    /// Time between requests; 0: each slot has its next one at once.
    period_ns: f64,
    /// Slots (queue, number) that wait until the next request is due.
    waiting: Vec<(usize, usize)>,
    series: Option<Series>,
}

impl<'m> Driver<'m> {
    /// Bytes of guest memory that rings, slots and buffers take.
    pub fn memory_bytes(options: &Options) -> usize {
        let slots = usize::from(options.queues) * usize::from(options.depth);
        usize::from(options.queues) * Layout::len_bytes(options.ring_size)
            + (slots * SLOT_BYTES).next_multiple_of(PAGE_BYTES)
            + slots * options.buffers_per_slot() * options.buffer_bytes()
    }

    pub fn new(
        memory: &'m GuestMemory,
        options: &'m Options,
        stamps: Option<Stamps>,
    ) -> Result<Self, Error> {
        let ring_bytes = Layout::len_bytes(options.ring_size);
        let queues = (0..usize::from(options.queues))
            .map(|index| {
                let layout = Layout::at(index * ring_bytes, options.ring_size);
                Ok(Queue {
                    ring: Ring::new(memory, layout, options.ring_size, options.event_idx),
                    kick: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
                    call: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
                    slots: vec![
                        Slot {
                            operation: None,
                            flushing: false,
                            unit: 0,
                            start_ns: 0,
                            buffer: 0
                        };
                        usize::from(options.depth)
                    ],
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let slots_at = queues.len() * ring_bytes;
        let slots = queues.len() * usize::from(options.depth);
        let buffers_at = (slots_at + slots * SLOT_BYTES).next_multiple_of(PAGE_BYTES);
        // What is written is neither zero nor the same twice, whatever the back-end may detect.
        let mut random = Random::new(options.seed);
        let mut page = [0; PAGE_BYTES];
        for offset in (buffers_at..memory.len_bytes() as usize).step_by(PAGE_BYTES) {
            for word in page.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
            memory.copy_in(offset, &page);
        }
        let busy = if stamps.is_some() {
            vec![false; options.units() as usize]
        } else {
            vec![]
        };
        Ok(Self {
            memory,
            queues,
            options,
            slots_at,
            buffers_at,
            stamps,
            busy,
            scratch: vec![0; STAMP_BYTES].into_boxed_slice(),
            begin: Instant::now(),
            in_flight: 0,
            issued: 0,
            counted: Counted::default(),
            period_ns: 0.0,
            waiting: Vec::new(),
            series: None,
        })
    }

    pub fn start(&self, frontend: &mut Frontend) -> Result<(), Error> {
        frontend.share_memory(self.memory, self.options.queues, self.options.ring_size)?;
        for (index, queue) in (0..).zip(&self.queues) {
            frontend.start_ring(
                index,
                self.options.ring_size,
                queue.ring.layout,
                self.memory.user_base(),
                queue.kick.as_fd(),
                queue.call.as_fd(),
            )?;
        }
        Ok(())
    }

    /// Stops all rings; a back-end that stops elsewhere than at the last request lost count.
    pub fn stop(&self, frontend: &mut Frontend) -> Result<(), Error> {
        for (index, queue) in (0..).zip(&self.queues) {
            let stopped_at = frontend.stop_ring(index)?;
            let expected = queue.ring.next_available();
            if stopped_at != expected {
                let reason = format!("it stopped at index {stopped_at}, not at {expected}");
                return Err(Error::Ring {
                    queue: index,
                    reason,
                });
            }
        }
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        self.begin.elapsed().as_nanos() as u64
    }

    fn clocks(&self) -> Result<Clocks, Error> {
        Ok(Clocks {
            backend_ns: self.options.backend_pid.map_or(Ok(0), process_cpu_ns)?,
            frontend_ns: process_cpu_ns(std::process::id())?,
            machine: MachineCpu::now()?,
        })
    }

    /// Runs one load to its end, all requests completed. One drive after another may be run.
    pub fn drive(
        &mut self,
        frontend: &Frontend,
        generator: &mut Generator,
        limits: Limits,
    ) -> Result<Counted, Error> {
        self.counted = Counted::default();
        self.issued = 0;
        self.period_ns = limits.rate.map_or(0.0, |rate| 1e9 / rate);
        self.waiting.clear();
        self.series = limits.series.map(Series::new);
        self.begin = Instant::now();
        let warm_up_ns = limits.warm_up.as_nanos() as u64;
        let duration_ns = limits
            .duration
            .map_or(u64::MAX, |limit| limit.as_nanos() as u64);
        let mut source = Source {
            generator,
            left: limits.requests.unwrap_or(u64::MAX),
        };
        let mut window_start_ns = 0;
        let mut clocks = self.clocks()?;
        let mut warm = warm_up_ns > 0;
        let mut deadline_ns = if warm { warm_up_ns } else { duration_ns };
        let mut last_progress_ns = 0;
        let mut last_look_ns = 0;
        let mut idle_turns = 0;
        if !warm {
            self.begin_to_measure(0, limits.announce);
        }

        for queue in 0..self.queues.len() {
            for slot in 0..self.queues[queue].slots.len() {
                self.issue(queue, slot, 0, &mut source);
            }
            self.show(queue)?;
        }
        while self.in_flight > 0 || !self.waiting.is_empty() {
            let mut progress_ns = self.harvest(&mut source)?;
            if !self.waiting.is_empty() && self.issue_due(&mut source)? {
                progress_ns = progress_ns.or_else(|| Some(self.now_ns()));
            }
            let now_ns = if let Some(now_ns) = progress_ns {
                idle_turns = 0;
                last_progress_ns = now_ns;
                now_ns
            } else {
                if self.options.sleep {
                    self.sleep()?;
                } else {
                    std::hint::spin_loop();
                }
                idle_turns += 1;
                if !self.options.sleep && idle_turns % IDLE_TURNS_BETWEEN_CLOCKS != 0 {
                    continue;
                }
                let now_ns = self.now_ns();
                if now_ns - last_progress_ns > STUCK.as_nanos() as u64 {
                    let in_flight = self.in_flight;
                    return Err(Error::Stuck {
                        seconds: STUCK.as_secs(),
                        in_flight,
                    });
                }
                if now_ns - last_look_ns > LOOK_FOR_HANG_UP.as_nanos() as u64 {
                    last_look_ns = now_ns;
                    if frontend.hung_up() {
                        return Err(Error::HungUp {
                            in_flight: self.in_flight,
                        });
                    }
                }
                now_ns
            };
            if let Some(series) = &mut self.series {
                series.look(now_ns);
            }
            if now_ns < deadline_ns {
                continue;
            }
            if warm {
                warm = false;
                clocks = self.clocks()?;
                self.counted = Counted::default();
                window_start_ns = self.now_ns();
                deadline_ns = window_start_ns.saturating_add(duration_ns);
                self.begin_to_measure(window_start_ns, limits.announce);
            } else {
                self.close_window(window_start_ns, now_ns, clocks)?;
                self.series = None;
                let counted = std::mem::take(&mut self.counted);
                source.left = 0;
                self.drain(frontend, &mut source)?;
                // Errors while draining are errors all the same.
                let late = std::mem::take(&mut self.counted);
                return Ok(Counted {
                    ioerr: counted.ioerr + late.ioerr,
                    unsupp: counted.unsupp + late.unsupp,
                    other_status: counted.other_status + late.other_status,
                    ..counted
                });
            }
        }
        self.close_window(window_start_ns, last_progress_ns, clocks)?;
        self.series = None;
        Ok(std::mem::take(&mut self.counted))
    }

    /// The clocks' counts begin at this moment too; see `close_window`.
    fn begin_to_measure(&mut self, now_ns: u64, announce: bool) {
        let clock = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        self.counted.began_monotonic_ns =
            clock.tv_sec as u64 * 1_000_000_000 + clock.tv_nsec as u64;
        if let Some(series) = &mut self.series {
            series.begin(now_ns);
        }
        if announce {
            eprintln!("measuring");
        }
    }

    fn close_window(&mut self, from_ns: u64, to_ns: u64, from: Clocks) -> Result<(), Error> {
        let to = self.clocks()?;
        self.counted.elapsed_ns = to_ns - from_ns;
        if let Some(series) = &mut self.series {
            self.counted.series = series.finish(to_ns);
        }
        self.counted.backend_cpu_ns = to.backend_ns - from.backend_ns;
        self.counted.frontend_cpu_ns = to.frontend_ns - from.frontend_ns;
        self.counted.machine_busy_ns = to.machine.busy_ns.saturating_sub(from.machine.busy_ns);
        self.counted.machine_steal_ns = to.machine.steal_ns.saturating_sub(from.machine.steal_ns);
        Ok(())
    }

    fn drain(&mut self, frontend: &Frontend, source: &mut Source<'_>) -> Result<(), Error> {
        let mut last_progress = Instant::now();
        while self.in_flight > 0 {
            if self.harvest(source)?.is_some() {
                last_progress = Instant::now();
            } else if self.options.sleep {
                self.sleep()?;
            }
            let in_flight = self.in_flight;
            if last_progress.elapsed() > STUCK {
                return Err(Error::Stuck {
                    seconds: STUCK.as_secs(),
                    in_flight,
                });
            }
            if last_progress.elapsed() > LOOK_FOR_HANG_UP && frontend.hung_up() {
                return Err(Error::HungUp { in_flight });
            }
        }
        Ok(())
    }

    /// Gives waiting slots the requests that are due by now. False: none was.
    fn issue_due(&mut self, source: &mut Source<'_>) -> Result<bool, Error> {
        let now_ns = self.now_ns();
        let mut any = false;
        while !self.waiting.is_empty() && self.due_ns() <= now_ns {
            // The longest idle first, so that all slots take part.
            let (queue, number) = self.waiting.remove(0);
            self.issue(queue, number, now_ns, source);
            self.show(queue)?;
            any = true;
        }
        Ok(any)
    }

    /// When the next request is due.
    fn due_ns(&self) -> u64 {
        (self.issued as f64 * self.period_ns) as u64
    }

    /// Takes what every queue completed and puts new requests in its place. None: nothing had.
    fn harvest(&mut self, source: &mut Source<'_>) -> Result<Option<u64>, Error> {
        let mut now_ns = None;
        for index in 0..self.queues.len() {
            let waiting = self.queues[index].ring.waiting();
            if waiting == 0 {
                continue;
            }
            if u32::from(waiting) > self.in_flight {
                let reason = format!("{waiting} used elements for {} requests", self.in_flight);
                return Err(Error::Ring {
                    queue: index as u16,
                    reason,
                });
            }
            let now_ns = *now_ns.get_or_insert_with(|| self.now_ns());
            for _ in 0..waiting {
                self.complete(index, now_ns, source)?;
            }
            self.show(index)?;
        }
        Ok(now_ns)
    }

    fn complete(
        &mut self,
        index: usize,
        now_ns: u64,
        source: &mut Source<'_>,
    ) -> Result<(), Error> {
        let used = self.queues[index].ring.pop();
        let per_slot = if self.options.indirect {
            1
        } else {
            u32::from(DIRECT_DESCRIPTORS)
        };
        let number = (used.head / per_slot) as usize;
        let slot = self.queues[index].slots.get(number).copied();
        let Some((slot, operation)) = slot
            .filter(|_| used.head.is_multiple_of(per_slot))
            .and_then(|slot| slot.operation.map(|operation| (slot, operation)))
        else {
            let reason = format!("head {} came back, which is not in flight", used.head);
            return Err(Error::Ring {
                queue: index as u16,
                reason,
            });
        };
        let status: u8 = self
            .memory
            .read(self.slot_at(index, number) + SLOT_STATUS_AT);
        match status {
            0 => {}
            1 => self.counted.ioerr += 1,
            2 => self.counted.unsupp += 1,
            _ => self.counted.other_status += 1,
        }
        let data_bytes = if operation == Operation::Read {
            self.options.block_bytes
        } else {
            0
        };
        if status == 0 && used.written_bytes != data_bytes + 1 {
            self.counted.wrong_used_len += 1;
        }
        self.in_flight -= 1;
        if operation == Operation::WriteFlush && !slot.flushing && status == 0 {
            self.settle(index, number, slot, Operation::Write, status);
            self.queues[index].slots[number].flushing = true;
            self.submit(index, number, T_FLUSH);
            return Ok(());
        }
        if !slot.flushing {
            self.settle(index, number, slot, operation, status);
        }
        self.counted.requests += 1;
        self.counted.bytes += u64::from(self.options.block_bytes);
        let latency_ns = now_ns.saturating_sub(slot.start_ns);
        self.counted.latency.record(latency_ns);
        if let Some(series) = &mut self.series {
            series.record(latency_ns);
        }
        self.queues[index].slots[number].operation = None;
        self.issue(index, number, now_ns, source);
        Ok(())
    }

    /// With stamps: checks what was read, notes what was written.
    fn settle(&mut self, index: usize, number: usize, slot: Slot, op: Operation, status: u8) {
        let buffer = self.buffer_at(index, number, slot.buffer);
        let Some(stamps) = &mut self.stamps else {
            return;
        };
        self.busy[slot.unit as usize] = false;
        if status != 0 {
            return;
        }
        let blocks = self.options.block_bytes as usize / STAMP_BYTES;
        for part in 0..blocks {
            let block = slot.unit as usize * blocks + part;
            if op == Operation::Read {
                self.memory
                    .copy_out(buffer + part * STAMP_BYTES, &mut self.scratch);
                stamps.check(block, &mut self.scratch);
            } else {
                stamps.end_write(block);
            }
        }
    }

    /// Gives an idle slot the next request, if there is one.
    ///
    /// With a rate, a request is timed from when it is due: what waits behind a stall tells of it.
    fn issue(&mut self, index: usize, number: usize, now_ns: u64, source: &mut Source<'_>) {
        let paced = self.period_ns > 0.0;
        let due_ns = self.due_ns();
        if paced && due_ns > now_ns {
            self.waiting.push((index, number));
            return;
        }
        let (operation, unit) = loop {
            let Some(next) = source.next() else { return };
            // Two requests on one block at once have no defined outcome to check against.
            if self.stamps.is_none() || !self.busy[next.1 as usize] {
                break next;
            }
            source.left = source.left.saturating_add(1);
        };
        let buffers = self.options.buffers_per_slot();
        let slot = &mut self.queues[index].slots[number];
        *slot = Slot {
            operation: Some(operation),
            flushing: false,
            unit,
            start_ns: if paced { due_ns } else { now_ns },
            buffer: (slot.buffer + 1) % buffers,
        };
        let at = self.buffer_at(index, number, self.queues[index].slots[number].buffer);
        if let Some(stamps) = &mut self.stamps {
            self.busy[unit as usize] = true;
            if operation != Operation::Read {
                let blocks = self.options.block_bytes as usize / STAMP_BYTES;
                for part in 0..blocks {
                    stamps.begin_write(unit as usize * blocks + part, &mut self.scratch);
                    self.memory.copy_in(at + part * STAMP_BYTES, &self.scratch);
                }
            }
        }
        self.issued += 1;
        self.submit(
            index,
            number,
            if operation == Operation::Read {
                T_IN
            } else {
                T_OUT
            },
        );
    }

    fn submit(&mut self, index: usize, number: usize, request_type: u32) {
        let slot = self.queues[index].slots[number];
        let at = self.slot_at(index, number);
        let offset_bytes =
            self.options.region_offset_bytes + slot.unit * u64::from(self.options.block_bytes);
        let sector = if request_type == T_FLUSH {
            0
        } else {
            offset_bytes / 512
        };
        self.memory.write(
            at + SLOT_HEADER_AT,
            [request_type, 0, sector as u32, (sector >> 32) as u32],
        );
        self.memory.write(at + SLOT_STATUS_AT, STATUS_UNWRITTEN);

        let part = |offset: usize, len_bytes: u32, flags: u16| Descriptor {
            address: GUEST_BASE + offset as u64,
            len_bytes,
            flags,
            next: 0,
        };
        let header = part(at + SLOT_HEADER_AT, HEADER_BYTES, DESC_F_NEXT);
        let status = part(at + SLOT_STATUS_AT, 1, DESC_F_WRITE);
        let buffer = self.buffer_at(index, number, slot.buffer);
        let write_flag = if request_type == T_IN {
            DESC_F_WRITE
        } else {
            0
        };
        let data = part(buffer, self.options.block_bytes, DESC_F_NEXT | write_flag);
        let chain: &mut [Descriptor] = if request_type == T_FLUSH {
            &mut [header, status]
        } else {
            &mut [header, data, status]
        };

        let ring = &mut self.queues[index].ring;
        let first = if self.options.indirect {
            0
        } else {
            number as u16 * DIRECT_DESCRIPTORS
        };
        for (place, descriptor) in (first..).zip(chain.iter_mut()) {
            if descriptor.flags & DESC_F_NEXT != 0 {
                descriptor.next = place + 1;
            }
            if self.options.indirect {
                self.memory
                    .write(at + usize::from(place) * DESCRIPTOR_BYTES, *descriptor);
            } else {
                ring.set_descriptor(place, *descriptor);
            }
        }
        if self.options.indirect {
            let len_bytes = (chain.len() * DESCRIPTOR_BYTES) as u32;
            ring.set_descriptor(number as u16, part(at, len_bytes, DESC_F_INDIRECT));
            ring.push(number as u16);
        } else {
            ring.push(first);
        }
        self.in_flight += 1;
    }

    fn slot_at(&self, index: usize, number: usize) -> usize {
        self.slots_at + (index * usize::from(self.options.depth) + number) * SLOT_BYTES
    }

    fn buffer_at(&self, index: usize, number: usize, buffer: usize) -> usize {
        let slot = index * usize::from(self.options.depth) + number;
        let buffer = slot * self.options.buffers_per_slot() + buffer;
        self.buffers_at + buffer * self.options.buffer_bytes()
    }

    fn show(&mut self, index: usize) -> Result<(), Error> {
        let queue = &mut self.queues[index];
        if queue.ring.publish() {
            rustix::io::write(&queue.kick, &1_u64.to_ne_bytes())?;
            self.counted.kicks += 1;
        }
        Ok(())
    }

    /// Waits for a call on any queue, as a guest that does not poll would.
    fn sleep(&mut self) -> Result<(), Error> {
        let mut ready = false;
        for queue in &self.queues {
            ready |= queue.ring.enable_calls();
        }
        if !ready {
            let mut fds: Vec<PollFd<'_>> = self
                .queues
                .iter()
                .map(|queue| PollFd::new(&queue.call, PollFlags::IN))
                .collect();
            // A bound, so that a dead back-end is noticed.
            let bound = Timespec {
                tv_sec: 0,
                tv_nsec: 100_000_000,
            };
            match poll(&mut fds, Some(&bound)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => self.counted.sleeps += 1,
                Err(errno) => return Err(errno.into()),
            }
        }
        for queue in &self.queues {
            queue.ring.disable_calls();
            // Empty is as good as full here: the ring says what there is.
            let _ = rustix::io::read(&queue.call, &mut [0; 8]);
        }
        Ok(())
    }
}

/// A generator with an end.
struct Source<'g> {
    generator: &'g mut Generator,
    left: u64,
}

impl Source<'_> {
    fn next(&mut self) -> Option<(Operation, u64)> {
        self.left = self.left.checked_sub(1)?;
        self.generator.next()
    }
}
