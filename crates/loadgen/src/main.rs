//! `vhostd-loadgen`: loads a vhost-user-blk back-end as a polling guest would, and tells what came.
//!
//! It shares no code with the device side, so that a mistake there is not mirrored here. One thread
//! does all I/O; only `memory` and `machine` hold `unsafe`.

mod driver;
mod error;
mod frontend;
mod histogram;
mod machine;
mod memory;
mod options;
mod report;
mod ring;
mod series;
mod stamp;
mod workload;

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use crate::driver::{Counted, Driver, Limits};
use crate::error::Error;
use crate::frontend::{F_RING_EVENT_IDX, Frontend, Wish};
use crate::machine::{pin_to, resident_bytes, round_trip};
use crate::memory::GuestMemory;
use crate::options::{Command, HELP, Options, parse};
use crate::report::Report;
use crate::stamp::Stamps;
use crate::workload::{Generator, Workload, mix};

fn main() -> ExitCode {
    match command() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vhostd-loadgen: {error}");
            ExitCode::from(1)
        }
    }
}

fn command() -> Result<ExitCode, Error> {
    match parse(std::env::args_os().skip(1))? {
        Command::Help => print!("{HELP}"),
        Command::Pingpong(a, b) => {
            println!("{}", report::json(&round_trip(a, b)?)?);
        }
        Command::Run(options) => {
            let report = run(*options)?;
            println!("{}", report::json(&report)?);
            return Ok(ExitCode::from(if report.is_clean() { 0 } else { 2 }));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run(mut options: Options) -> Result<Report, Error> {
    // The distance is measured while the back-end has nothing to do.
    let measure = |cores: Option<(usize, usize)>| cores.map(|(a, b)| round_trip(a, b)).transpose();
    let before = measure(options.pingpong)?;
    if let Some(core) = options.core {
        pin_to(core)?;
    }
    let wish = Wish {
        queues: options.queues,
        indirect: options.indirect,
        event_idx: options.event_idx,
        write: options.workload.writes(),
        flush: options.workload == Workload::WriteFlush,
    };
    let mut frontend = Frontend::connect(&options.socket, wish)?;
    options.fit(frontend.capacity_bytes, frontend.logical_block_bytes)?;
    options.event_idx = frontend.features & F_RING_EVENT_IDX != 0;
    let options = options;

    let stamps = if options.verify {
        Some(stamps(&options)?)
    } else {
        None
    };
    let memory = GuestMemory::new(Driver::memory_bytes(&options))?;
    let mut driver = Driver::new(&memory, &options, stamps)?;
    driver.start(&mut frontend)?;

    let loaded = load(&mut driver, &frontend, &options);
    // What was promised until here is worth keeping even if the back-end died.
    if let (Some(stamps), Some(path)) = (&driver.stamps, &options.stamps) {
        stamps.save(path)?;
    }
    let (counted, read_back) = loaded?;
    let resident = options.backend_pid.map(resident_bytes).transpose()?;
    driver.stop(&mut frontend)?;
    let features = frontend.features;
    drop(frontend);
    let after = measure(options.pingpong)?;
    Ok(Report::new(
        &options,
        features,
        counted,
        read_back.as_ref(),
        driver.stamps.as_ref(),
    )
    .with_machine(before, after, resident))
}

/// The load, and with stamps one pass over the region that reads all of it back.
fn load(
    driver: &mut Driver<'_>,
    frontend: &Frontend,
    options: &Options,
) -> Result<(Counted, Option<Counted>), Error> {
    let mut generator = Generator::new(
        options.workload,
        options.units(),
        options.read_percent,
        options.seed,
    );
    let limits = Limits {
        warm_up: options.warm_up,
        duration: options.duration,
        requests: options.requests,
        rate: options.rate,
        series: options.series,
        announce: options.announce,
    };
    let counted = driver.drive(frontend, &mut generator, limits)?;
    if !options.verify {
        return Ok((counted, None));
    }
    let mut everything = Generator::new(Workload::ReadOnce, options.units(), 100, options.seed);
    let whole = Limits {
        warm_up: Duration::ZERO,
        duration: None,
        requests: None,
        rate: None,
        series: None,
        announce: false,
    };
    let read_back = driver.drive(frontend, &mut everything, whole)?;
    Ok((counted, Some(read_back)))
}

fn stamps(options: &Options) -> Result<Stamps, Error> {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let id = mix(now.as_nanos() as u64 ^ u64::from(std::process::id()) << 48);
    let mut stamps = Stamps::new(
        options.region_offset_bytes,
        options.region_bytes,
        id,
        options.fresh,
    );
    if let Some(path) = options.stamps.as_ref().filter(|path| path.exists()) {
        stamps.load(path)?;
    }
    Ok(stamps)
}
