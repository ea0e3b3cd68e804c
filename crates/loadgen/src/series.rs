//! A run cut into intervals of time: how many requests each had, and how long they took.
//!
//! A request counts in the interval in which it completed. An interval is closed by the first look
//! at the clock after its end, so a stall lengthens the interval it falls into, and its row says by
//! how much. Owned by one thread; memory is bounded by the shortest interval that is allowed.

use std::time::Duration;

use serde::Serialize;

use crate::histogram::Histogram;

/// Clearing the histogram costs microseconds; shorter intervals would show that.
pub const SHORTEST: Duration = Duration::from_millis(10);

#[derive(Debug, Serialize)]
pub struct Interval {
    /// Where it begins, from the start of the measured time.
    pub at_s: f64,
    pub seconds: f64,
    pub requests: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
    pub max_ns: u64,
}

pub struct Series {
    every_ns: u64,
    /// None: not measuring yet.
    open: Option<Open>,
    latency: Histogram,
    requests: u64,
    rows: Vec<Interval>,
}

#[derive(Clone, Copy)]
struct Open {
    start_ns: u64,
    interval_ns: u64,
}

impl Series {
    pub fn new(every: Duration) -> Self {
        Self {
            every_ns: every.max(SHORTEST).as_nanos() as u64,
            open: None,
            latency: Histogram::default(),
            requests: 0,
            rows: Vec::new(),
        }
    }

    /// The measured time begins now; what was recorded before is forgotten.
    pub fn begin(&mut self, now_ns: u64) {
        self.open = Some(Open {
            start_ns: now_ns,
            interval_ns: now_ns,
        });
        self.latency = Histogram::default();
        self.requests = 0;
        self.rows.clear();
    }

    pub fn record(&mut self, latency_ns: u64) {
        self.latency.record(latency_ns);
        self.requests += 1;
    }

    /// Closes the interval if its time is over.
    pub fn look(&mut self, now_ns: u64) {
        if let Some(open) = self.open
            && now_ns - open.interval_ns >= self.every_ns
        {
            self.close(open, now_ns);
        }
    }

    /// Closes the last interval and gives all of them; nothing is recorded until `begin`.
    pub fn finish(&mut self, now_ns: u64) -> Vec<Interval> {
        if let Some(open) = self.open.take()
            && now_ns > open.interval_ns
        {
            self.close(open, now_ns);
            self.open = None;
        }
        std::mem::take(&mut self.rows)
    }

    fn close(&mut self, open: Open, now_ns: u64) {
        let latency = std::mem::take(&mut self.latency);
        self.rows.push(Interval {
            at_s: (open.interval_ns - open.start_ns) as f64 / 1e9,
            seconds: (now_ns - open.interval_ns) as f64 / 1e9,
            requests: std::mem::take(&mut self.requests),
            p50_ns: latency.percentile(50.0),
            p99_ns: latency.percentile(99.0),
            max_ns: latency.max(),
        });
        self.open = Some(Open {
            interval_ns: now_ns,
            ..open
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn each_request_counts_in_the_interval_it_completed_in() {
        let mut series = Series::new(Duration::from_millis(100));
        series.record(999 * MS);
        series.begin(50 * MS);
        for (now, latency) in [(60, 1), (149, 3), (160, 2), (251, 9)] {
            series.record(latency);
            series.look(now * MS);
        }
        let rows = series.finish(260 * MS);
        let counts: Vec<_> = rows.iter().map(|row| (row.requests, row.max_ns)).collect();
        assert_eq!(counts, [(3, 3), (1, 9)]);
        let total: f64 = rows.iter().map(|row| row.seconds).sum();
        assert!((total - 0.21).abs() < 1e-9, "{rows:?}");
        assert!((rows[1].at_s - 0.11).abs() < 1e-9, "{rows:?}");
    }

    #[test]
    fn a_stall_lengthens_its_interval_and_is_told_in_it() {
        let mut series = Series::new(Duration::from_millis(10));
        series.begin(0);
        series.record(75 * MS);
        series.look(80 * MS);
        series.record(1);
        let rows = series.finish(85 * MS);
        assert_eq!(rows.len(), 2);
        assert!((rows[0].seconds - 0.08).abs() < 1e-9);
        assert_eq!(rows[0].max_ns, 75 * MS);
        assert!((rows[1].at_s - 0.08).abs() < 1e-9);
    }
}
