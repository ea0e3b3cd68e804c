//! The result of a run as one JSON object. Field names are an interface: `bench/` reads them.

use serde::Serialize;

use crate::driver::Counted;
use crate::error::Error;
use crate::machine::RoundTrip;
use crate::options::Options;
use crate::series::Interval;
use crate::stamp::Stamps;

#[derive(Serialize)]
pub struct Report {
    version: &'static str,
    workload: &'static str,
    block_bytes: u32,
    depth: u16,
    queues: u16,
    ring_size: u16,
    indirect: bool,
    event_idx: bool,
    sleep: bool,
    seed: u64,
    region_offset_bytes: u64,
    region_bytes: u64,
    buffers_bytes: u64,
    /// virtio features as negotiated.
    features: u64,
    requests: u64,
    bytes: u64,
    elapsed_s: f64,
    requests_per_s: f64,
    bytes_per_s: f64,
    latency_ns: Latency,
    errors: Errors,
    /// Used elements whose length is not what the device wrote (virtio 1.3, 2.7.8.2).
    wrong_used_len: u64,
    kicks: u64,
    sleeps: u64,
    cpu: Cpu,
    backend_resident_bytes: Option<u64>,
    backend_anonymous_bytes: Option<u64>,
    series: Vec<Interval>,
    began_monotonic_ns: u64,
    round_trip_before: Option<RoundTrip>,
    round_trip_after: Option<RoundTrip>,
    verify: Option<Verify>,
}

#[derive(Serialize)]
struct Latency {
    mean: f64,
    p50: u64,
    p99: u64,
    p99_9: u64,
    max: u64,
}

#[derive(Serialize)]
struct Errors {
    ioerr: u64,
    unsupp: u64,
    other: u64,
}

/// CPU time within the measured time.
#[derive(Serialize)]
struct Cpu {
    backend_ns: Option<u64>,
    backend_ns_per_request: Option<f64>,
    frontend_ns: u64,
    /// Of all cores, at a grain of 10 ms.
    machine_busy_ns: u64,
    machine_steal_ns: u64,
}

#[derive(Serialize)]
struct Verify {
    checked_blocks: u64,
    mismatches: u64,
    first_mismatch: Option<String>,
    read_back_errors: u64,
}

impl Report {
    pub fn new(
        options: &Options,
        features: u64,
        counted: Counted,
        read_back: Option<&Counted>,
        stamps: Option<&Stamps>,
    ) -> Self {
        let elapsed_s = counted.elapsed_ns as f64 / 1e9;
        let rate = |count: u64| {
            if elapsed_s > 0.0 {
                count as f64 / elapsed_s
            } else {
                0.0
            }
        };
        let backend_ns = options.backend_pid.map(|_| counted.backend_cpu_ns);
        let slots = u64::from(options.queues) * u64::from(options.depth);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            workload: options.workload_name,
            block_bytes: options.block_bytes,
            depth: options.depth,
            queues: options.queues,
            ring_size: options.ring_size,
            indirect: options.indirect,
            event_idx: options.event_idx,
            sleep: options.sleep,
            seed: options.seed,
            region_offset_bytes: options.region_offset_bytes,
            region_bytes: options.region_bytes,
            buffers_bytes: slots * (options.buffers_per_slot() * options.buffer_bytes()) as u64,
            features,
            requests: counted.requests,
            bytes: counted.bytes,
            elapsed_s,
            requests_per_s: rate(counted.requests),
            bytes_per_s: rate(counted.bytes),
            latency_ns: Latency {
                mean: counted.latency.mean(),
                p50: counted.latency.percentile(50.0),
                p99: counted.latency.percentile(99.0),
                p99_9: counted.latency.percentile(99.9),
                max: counted.latency.max(),
            },
            errors: Errors {
                ioerr: counted.ioerr,
                unsupp: counted.unsupp,
                other: counted.other_status,
            },
            wrong_used_len: counted.wrong_used_len,
            kicks: counted.kicks,
            sleeps: counted.sleeps,
            cpu: Cpu {
                backend_ns,
                backend_ns_per_request: backend_ns
                    .filter(|_| counted.requests > 0)
                    .map(|ns| ns as f64 / counted.requests as f64),
                frontend_ns: counted.frontend_cpu_ns,
                machine_busy_ns: counted.machine_busy_ns,
                machine_steal_ns: counted.machine_steal_ns,
            },
            backend_resident_bytes: None,
            backend_anonymous_bytes: None,
            series: counted.series,
            began_monotonic_ns: counted.began_monotonic_ns,
            round_trip_before: None,
            round_trip_after: None,
            verify: stamps.map(|stamps| Verify {
                checked_blocks: stamps.checked_blocks,
                mismatches: stamps.mismatches,
                first_mismatch: stamps.first_mismatch.clone(),
                read_back_errors: read_back.map_or(0, Counted::errors),
            }),
        }
    }

    pub fn with_machine(
        self,
        before: Option<RoundTrip>,
        after: Option<RoundTrip>,
        resident: Option<(u64, u64)>,
    ) -> Self {
        Self {
            round_trip_before: before,
            round_trip_after: after,
            backend_resident_bytes: resident.map(|(all, _)| all),
            backend_anonymous_bytes: resident.map(|(_, anonymous)| anonymous),
            ..self
        }
    }

    /// Every request succeeded and every block read was the right one.
    pub fn is_clean(&self) -> bool {
        let errors = self.errors.ioerr + self.errors.unsupp + self.errors.other;
        let wrong = self
            .verify
            .as_ref()
            .map_or(0, |verify| verify.mismatches + verify.read_back_errors);
        errors + wrong == 0
    }
}

pub fn json(value: &impl Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Io(error.into()))
}
