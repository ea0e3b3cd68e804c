//! [`Io`] on simulated disks: deterministic, seeded, with faults and crashes.
//!
//! It promises what `io` promises and not a bit more: operations complete in any order; what no
//! sync has covered may be kept, lost or torn by [`SimDisk::crash`]; a failed sync loses data for
//! good. It panics where a real device would hide a defect of the submitter: a buffer that is
//! changed while it is written, a direct write that is not aligned, a wait that nothing can end.
//!
//! For tests, on one thread. All randomness follows from the seeds.

mod content;
mod disk;
mod enumerate;
mod fault;
mod rng;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use disk::{CrashMode, SimDisk};
pub use enumerate::Undecided;
pub use fault::{Fault, FaultRule, OpKind, SimEvent, SimOp, When};
pub use rng::SimRng;

use super::{Completion, DeviceId, Io, Op, Target, Token};

/// Tells the operations of different queues on one disk apart; not part of what is simulated.
static NEXT_OWNER: AtomicU64 = AtomicU64::new(0);

/// A queue of operations to simulated disks. Dropping it leaves what is in flight undecided, for
/// [`SimDisk::crash`] or [`SimDisk::kill`] to decide.
#[derive(Debug)]
pub struct SimIo {
    owner: u64,
    rng: SimRng,
    disks: Vec<Option<SimDisk>>,
    ready: Vec<Completion>,
    /// With the disks, not completed.
    submitted: usize,
    one_at_a_time: bool,
}

impl SimIo {
    /// A queue whose order of completions follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            owner: NEXT_OWNER.fetch_add(1, Ordering::Relaxed),
            rng: SimRng::new(seed),
            disks: Vec::new(),
            ready: Vec::new(),
            submitted: 0,
            one_at_a_time: false,
        }
    }

    /// From now on `poll` and `wait` complete exactly one operation, if any can: no state of the disk
    /// is passed over between two calls.
    pub fn complete_one_at_a_time(&mut self) {
        self.one_at_a_time = true;
    }

    /// Registers a disk; operations on `id` go to it from now on.
    pub fn add_device(&mut self, id: DeviceId, disk: SimDisk) {
        let index = id.0 as usize;
        if self.disks.len() <= index {
            self.disks.resize(index + 1, None);
        }
        self.disks[index] = Some(disk);
    }

    /// Completes one operation of a disk picked at random; false if none can.
    fn complete_one(&mut self) -> bool {
        let count = self.disks.len();
        if count == 0 || self.submitted == 0 {
            return false;
        }
        let first = self.rng.below(count as u64) as usize;
        let completed = (0..count).find_map(|i| {
            let disk = self.disks[(first + i) % count].as_ref()?;
            disk.lock().complete_one(self.owner)
        });
        let Some((token, result)) = completed else {
            return false;
        };
        self.submitted -= 1;
        let result = result.map_err(io::Error::from_raw_os_error);
        self.ready.push(Completion { token, result });
        true
    }
}

impl Io for SimIo {
    fn submit(&mut self, token: Token, target: Target, op: Op) {
        match self.disks.get(target.device.0 as usize) {
            Some(Some(disk)) => {
                disk.lock().submit(self.owner, token, target.segment, op);
                self.submitted += 1;
            }
            _ => {
                let result = Err(io::Error::from_raw_os_error(libc::ENODEV));
                self.ready.push(Completion { token, result });
            }
        }
    }

    /// Completes some of what is in flight: none, all, or any number between (or one, if so told).
    fn poll(&mut self, out: &mut Vec<Completion>) {
        if self.one_at_a_time {
            self.complete_one();
        } else if self.submitted > 0 {
            let count = self.rng.below(self.submitted as u64 + 1);
            for _ in 0..count {
                if !self.complete_one() {
                    break;
                }
            }
        }
        out.append(&mut self.ready);
    }

    /// No time passes: without anything to complete it returns at once.
    ///
    /// # Panics
    /// If nothing can complete and there is no `timeout`: that would be waiting for ever.
    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completion>) {
        let before = out.len();
        self.poll(out);
        if out.len() > before {
            return;
        }
        let completed = self.complete_one();
        assert!(
            completed || timeout.is_some(),
            "waiting for ever: {} operations are in flight and none can complete",
            self.submitted
        );
        out.append(&mut self.ready);
    }

    fn in_flight(&self) -> usize {
        self.submitted + self.ready.len()
    }
}

#[cfg(test)]
mod tests;
