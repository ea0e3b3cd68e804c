//! What the machine does meanwhile: core distance, CPU time of the back-end and of everyone else.
//!
//! The distance between two cores of a virtual machine changes under it, and in-memory figures
//! change with it by factors: so a cache line's round trip is told with every run. The module holds
//! `unsafe` for one system call.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use serde::Serialize;

/// Round trips timed together; the clock's own cost vanishes in them.
const ROUNDS_PER_SAMPLE: u64 = 500;
const SAMPLES: usize = 60;
/// Cores that are not given to us (busy with something else) must not hold us up for long.
const PATIENCE: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, Serialize)]
pub struct RoundTrip {
    /// Median over samples of 500 round trips each.
    pub median_ns: f64,
    pub min_ns: f64,
    pub max_ns: f64,
    pub samples: usize,
}

pub fn pin_to(core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    if core >= CpuSet::MAX_CPU {
        return Err(io::Error::other(format!("core {core} does not exist")));
    }
    set.set(core);
    sched_setaffinity(None, &set)
        .map_err(|error| io::Error::other(format!("cannot pin to core {core}: {error}")))
}

/// Bounces one cache line between two cores.
pub fn round_trip(near: usize, far: usize) -> io::Result<RoundTrip> {
    #[repr(align(128))]
    struct Line(AtomicU64);
    const STOP: u64 = u64::MAX;
    let line = Line(AtomicU64::new(0));

    let mut samples = std::thread::scope(|scope| -> io::Result<Vec<f64>> {
        let echo = scope.spawn(|| -> io::Result<()> {
            pin_to(far)?;
            let mut answered = 0;
            loop {
                let value = line.0.load(Ordering::Acquire);
                if value == STOP {
                    return Ok(());
                }
                // Odd values are questions, even ones answers.
                if value % 2 == 1 && value > answered {
                    answered = value;
                    line.0.store(value + 1, Ordering::Release);
                }
            }
        });
        let ask = scope.spawn(|| -> io::Result<Vec<f64>> {
            let result = pin_to(near).map(|()| {
                let begin = Instant::now();
                let mut samples = Vec::with_capacity(SAMPLES);
                let mut question = 1;
                while samples.len() < SAMPLES && begin.elapsed() < PATIENCE {
                    let start = Instant::now();
                    for _ in 0..ROUNDS_PER_SAMPLE {
                        line.0.store(question, Ordering::Release);
                        while line.0.load(Ordering::Acquire) == question {}
                        question += 2;
                    }
                    samples.push(start.elapsed().as_nanos() as f64 / ROUNDS_PER_SAMPLE as f64);
                }
                samples
            });
            line.0.store(STOP, Ordering::Release);
            result
        });
        let lost = || io::Error::other("a thread of the round trip died");
        let samples = ask.join().map_err(|_| lost())??;
        echo.join().map_err(|_| lost())??;
        Ok(samples)
    })?;
    // The first one holds the other thread's start.
    if samples.len() > 1 {
        samples.remove(0);
    }
    samples.sort_by(f64::total_cmp);
    Ok(RoundTrip {
        median_ns: samples[samples.len() / 2],
        min_ns: samples[0],
        max_ns: samples[samples.len() - 1],
        samples: samples.len(),
    })
}

/// CPU time, in ns, of all threads of a process, ended ones and io_uring workers included.
pub fn process_cpu_ns(pid: u32) -> io::Result<u64> {
    // The kernel's encoding of another process's CPU clock (what clock_getcpuclockid returns).
    let clock = (!(pid as libc::clockid_t) << 3) | 2;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec the kernel fills; a wrong clock id only yields EINVAL.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        let source = io::Error::last_os_error();
        return Err(io::Error::other(format!(
            "CPU time of process {pid}: {source}"
        )));
    }
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// CPU time of the whole machine since boot, in ns, at the grain of /proc/stat (10 ms).
#[derive(Clone, Copy, Default)]
pub struct MachineCpu {
    pub busy_ns: u64,
    pub steal_ns: u64,
}

impl MachineCpu {
    pub fn now() -> io::Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        Self::parse(&text).ok_or_else(|| io::Error::other("/proc/stat has no line for all CPUs"))
    }

    fn parse(text: &str) -> Option<Self> {
        const TICK_NS: u64 = 10_000_000;
        let fields: Vec<u64> = text
            .lines()
            .next()?
            .strip_prefix("cpu ")?
            .split_whitespace()
            .map_while(|field| field.parse().ok())
            .collect();
        // user nice system idle iowait irq softirq steal
        let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = fields[..] else {
            return None;
        };
        Some(Self {
            busy_ns: (user + nice + system + irq + softirq) * TICK_NS,
            steal_ns: steal * TICK_NS,
        })
    }
}

/// Resident memory of a process in bytes: all, and the part that is not shared or file-backed.
pub fn resident_bytes(pid: u32) -> io::Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok())
            .map_or(0, |kib| kib * 1024)
    };
    Ok((field("VmRSS:"), field("RssAnon:")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_time_counts_what_is_busy_and_not_what_is_idle() {
        let cpu = MachineCpu::parse("cpu  1 2 3 1000 50 4 5 7 0 0\ncpu0 1 2\n").unwrap();
        assert_eq!(cpu.busy_ns, 15 * 10_000_000);
        assert_eq!(cpu.steal_ns, 7 * 10_000_000);
        assert!(MachineCpu::parse("intr 5").is_none());
    }

    #[test]
    fn own_cpu_time_grows_with_work() {
        let pid = std::process::id();
        let before = process_cpu_ns(pid).unwrap();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(2) {}
        assert!(process_cpu_ns(pid).unwrap() > before);
        assert!(resident_bytes(pid).unwrap().0 > 0);
    }
}
