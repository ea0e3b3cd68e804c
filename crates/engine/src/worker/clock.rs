//! The clock that volumes are driven by: one origin for all threads.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::volume::Now;

/// The present moment: CLOCK_MONOTONIC and ns since the epoch.
#[must_use]
pub fn now() -> Now {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: fills the structure it is given; this clock always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let realtime = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Now {
        monotonic_ns: time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64,
        // Until the year 2554.
        realtime_ns: realtime.as_nanos() as u64,
    }
}
