//! The command line of `vhostd-loadgen run` and `pingpong`.

use std::path::PathBuf;
use std::time::Duration;

use lexopt::prelude::{Long, Short, Value};

use crate::driver::DIRECT_DESCRIPTORS;
use crate::error::Error;
use crate::stamp::STAMP_BYTES;
use crate::workload::Workload;

pub const HELP: &str = "\
vhostd-loadgen: a polling vhost-user-blk front-end

Usage:
  vhostd-loadgen run --socket PATH --workload NAME [options]
  vhostd-loadgen pingpong [--cores A,B]

Workloads: randread randwrite seqread seqwrite randrw writeflush zipf run for --duration;
  fill (in order), firstwrite and readonce (in random order, no block twice) make one pass.

  --socket PATH         vhost-user-blk socket of the back-end
  --workload NAME       see above
  --block SIZE          bytes a request (4K)
  --depth N             requests in flight a queue (1)
  --queues N            virtqueues, all driven by one thread (1)
  --ring-size N         ring entries a queue, a power of two (256)
  --duration SECONDS    measured time (5; none for one-pass workloads)
  --warm-up SECONDS     time before it that is not counted (0.5; 0 for one-pass workloads)
  --requests N          end after so many requests, warm-up included
  --rate N              requests a second, evenly spaced (as many as there can be); latencies
                        are then told from when a request was due
  --series SECONDS      also tell requests and latencies by intervals (at least 0.01)
  --announce            print `measuring` on standard error when the measured time begins
  --offset SIZE         where the region begins on the disk (0)
  --region SIZE         size of the region (to the end of the disk)
  --read-percent N      reads in randrw and zipf (70)
  --buffers SIZE        guest memory the data buffers rotate over (one buffer a request in flight)
  --seed N              random seed (1)
  --no-indirect         chains in the ring instead of indirect tables
  --no-event-idx        do without VIRTIO_F_EVENT_IDX (else used where offered, as Linux does)
  --sleep               wait for calls instead of polling the used ring
  --core N              pin to this core
  --backend-pid PID     tell CPU time and resident memory of this process
  --pingpong A,B        measure the cores' round trip before and after
  --verify              stamp what is written, check what is read, read all back at the end
  --fresh               with --verify: what was never written must read as zeroes
  --stamps FILE         with --verify: take up the history in FILE if there is one, save it at the end

Sizes take K M G T (powers of 2). The result is one JSON object on standard output.
Exit status: 0 all well; 1 could not run or not finish; 2 failed requests or wrong data.
";

#[derive(Debug)]
pub struct Options {
    pub socket: PathBuf,
    pub workload_name: &'static str,
    pub workload: Workload,
    pub block_bytes: u32,
    pub depth: u16,
    pub queues: u16,
    pub ring_size: u16,
    pub duration: Option<Duration>,
    pub warm_up: Duration,
    pub requests: Option<u64>,
    pub rate: Option<f64>,
    pub series: Option<Duration>,
    pub announce: bool,
    pub region_offset_bytes: u64,
    /// 0 until the disk's size is known.
    pub region_bytes: u64,
    pub read_percent: u8,
    pub buffers_bytes: u64,
    pub seed: u64,
    pub indirect: bool,
    /// Wished for; after negotiation, whether it is so.
    pub event_idx: bool,
    pub sleep: bool,
    pub core: Option<usize>,
    pub backend_pid: Option<u32>,
    pub pingpong: Option<(usize, usize)>,
    pub verify: bool,
    pub fresh: bool,
    pub stamps: Option<PathBuf>,
}

pub enum Command {
    Help,
    Run(Box<Options>),
    Pingpong(usize, usize),
}

impl Options {
    pub fn units(&self) -> u64 {
        self.region_bytes / u64::from(self.block_bytes)
    }

    /// A data buffer's place in guest memory is page-aligned, as a guest's page cache is.
    pub fn buffer_bytes(&self) -> usize {
        (self.block_bytes as usize).next_multiple_of(crate::memory::PAGE_BYTES)
    }

    pub fn buffers_per_slot(&self) -> usize {
        let slots = u64::from(self.queues) * u64::from(self.depth);
        ((self.buffers_bytes / (slots * self.buffer_bytes() as u64)) as usize).max(1)
    }

    /// Settles the region once the disk is known, and refuses what does not fit it.
    pub fn fit(&mut self, capacity_bytes: u64, logical_block_bytes: u32) -> Result<(), Error> {
        let usage = |text: String| Err(Error::Usage(text));
        let room = capacity_bytes.saturating_sub(self.region_offset_bytes);
        if self.region_bytes == 0 {
            self.region_bytes = room;
        }
        let block = u64::from(self.block_bytes);
        self.region_bytes -= self.region_bytes % block;
        if self.region_bytes == 0 || self.region_bytes > room {
            return usage(format!(
                "a region of {} bytes at {} does not fit a disk of {capacity_bytes} bytes",
                self.region_bytes, self.region_offset_bytes
            ));
        }
        let logical = u64::from(logical_block_bytes.max(512));
        if !block.is_multiple_of(logical) || !self.region_offset_bytes.is_multiple_of(logical) {
            return usage(format!(
                "block and offset must be multiples of {logical} bytes"
            ));
        }
        let in_flight = u64::from(self.depth) * u64::from(self.queues);
        if self.verify && self.units() < 4 * in_flight {
            return usage("--verify needs a region of four times what is in flight".into());
        }
        Ok(())
    }

    fn check(self) -> Result<Self, Error> {
        let per_request = if self.indirect { 1 } else { DIRECT_DESCRIPTORS };
        let wrong = if self.socket.as_os_str().is_empty() {
            "--socket is missing"
        } else if self.depth == 0 || self.queues == 0 || self.block_bytes == 0 {
            "--depth, --queues and --block must be at least 1"
        } else if !self.ring_size.is_power_of_two() {
            "--ring-size must be a power of two"
        } else if u32::from(self.depth) * u32::from(per_request) > u32::from(self.ring_size) {
            "--depth does not fit the ring"
        } else if !self.block_bytes.is_multiple_of(512) || self.block_bytes > 64 << 20 {
            "--block must be a multiple of 512, at most 64M"
        } else if self.verify && !(self.block_bytes as usize).is_multiple_of(STAMP_BYTES) {
            "--verify needs blocks that are multiples of 4K"
        } else if self.rate.is_some() && self.sleep {
            "--rate needs polling, so it does not go with --sleep"
        } else if self
            .series
            .is_some_and(|every| every < crate::series::SHORTEST)
        {
            "--series must be at least 0.01 seconds"
        } else if self.read_percent > 100 {
            "--read-percent is at most 100"
        } else if !self.verify && (self.fresh || self.stamps.is_some()) {
            "--fresh and --stamps go with --verify"
        } else if self.verify && !self.region_offset_bytes.is_multiple_of(STAMP_BYTES as u64) {
            "--verify needs an offset that is a multiple of 4K"
        } else {
            return Ok(self);
        };
        Err(Error::Usage(wrong.into()))
    }
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M')) => (&text[..at], 20),
        Some((at, 'G')) => (&text[..at], 30),
        Some((at, 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text} is no size"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text} is too large"))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text
        .parse()
        .map_err(|_| format!("{text} is no number of seconds"))?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

fn rate(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|rate| (1.0..=1e9).contains(rate))
        .ok_or_else(|| format!("{text} is no rate of requests a second"))
}

fn cores(text: &str) -> Result<(usize, usize), String> {
    let pair = text
        .split_once(',')
        .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    pair.filter(|(a, b)| a != b)
        .ok_or_else(|| format!("{text} is no pair of two cores (A,B)"))
}

pub fn parse(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Command, Error> {
    parse_with(lexopt::Parser::from_args(arguments)).map_err(|error| match error {
        Failed::Lexopt(error) => Error::Usage(error.to_string()),
        Failed::Ours(error) => error,
    })
}

enum Failed {
    Lexopt(lexopt::Error),
    Ours(Error),
}

impl From<lexopt::Error> for Failed {
    fn from(error: lexopt::Error) -> Self {
        Self::Lexopt(error)
    }
}

fn parse_with(mut parser: lexopt::Parser) -> Result<Command, Failed> {
    use lexopt::ValueExt;
    let command = match parser.next()? {
        Some(Value(word)) => word.string()?,
        Some(Long("help") | Short('h')) | None => return Ok(Command::Help),
        Some(other) => return Err(other.unexpected().into()),
    };
    if command == "pingpong" {
        let mut pair = (0, 1);
        while let Some(argument) = parser.next()? {
            match argument {
                Long("cores") => pair = parser.value()?.parse_with(cores)?,
                Long("help") | Short('h') => return Ok(Command::Help),
                other => return Err(other.unexpected().into()),
            }
        }
        return Ok(Command::Pingpong(pair.0, pair.1));
    }
    if command != "run" {
        return Err(Failed::Ours(Error::Usage(format!(
            "there is no command {command}"
        ))));
    }
    let mut options = Options {
        socket: PathBuf::new(),
        workload_name: "",
        workload: Workload::RandRead,
        block_bytes: 4096,
        depth: 1,
        queues: 1,
        ring_size: 256,
        duration: None,
        warm_up: Duration::ZERO,
        requests: None,
        rate: None,
        series: None,
        announce: false,
        region_offset_bytes: 0,
        region_bytes: 0,
        read_percent: 70,
        buffers_bytes: 0,
        seed: 1,
        indirect: true,
        event_idx: true,
        sleep: false,
        core: None,
        backend_pid: None,
        pingpong: None,
        verify: false,
        fresh: false,
        stamps: None,
    };
    let mut warm_up = None;
    while let Some(argument) = parser.next()? {
        match argument {
            Long("help") | Short('h') => return Ok(Command::Help),
            Long("socket") => options.socket = parser.value()?.into(),
            Long("workload") => {
                let name = parser.value()?.string()?;
                let known = Workload::ALL.iter().find(|(known, _)| *known == name);
                (options.workload_name, options.workload) = *known
                    .ok_or_else(|| Failed::Ours(Error::Usage(format!("no workload {name}"))))?;
            }
            Long("block") => {
                let bytes = parser.value()?.parse_with(size)?;
                options.block_bytes = u32::try_from(bytes)
                    .map_err(|_| Failed::Ours(Error::Usage("--block is too large".into())))?;
            }
            Long("depth") => options.depth = parser.value()?.parse()?,
            Long("queues") => options.queues = parser.value()?.parse()?,
            Long("ring-size") => options.ring_size = parser.value()?.parse()?,
            Long("duration") => options.duration = Some(parser.value()?.parse_with(seconds)?),
            Long("warm-up") => warm_up = Some(parser.value()?.parse_with(seconds)?),
            Long("requests") => options.requests = Some(parser.value()?.parse()?),
            Long("rate") => options.rate = Some(parser.value()?.parse_with(rate)?),
            Long("series") => options.series = Some(parser.value()?.parse_with(seconds)?),
            Long("announce") => options.announce = true,
            Long("offset") => options.region_offset_bytes = parser.value()?.parse_with(size)?,
            Long("region") => options.region_bytes = parser.value()?.parse_with(size)?,
            Long("read-percent") => options.read_percent = parser.value()?.parse()?,
            Long("buffers") => options.buffers_bytes = parser.value()?.parse_with(size)?,
            Long("seed") => options.seed = parser.value()?.parse()?,
            Long("no-indirect") => options.indirect = false,
            Long("no-event-idx") => options.event_idx = false,
            Long("sleep") => options.sleep = true,
            Long("core") => options.core = Some(parser.value()?.parse()?),
            Long("backend-pid") => options.backend_pid = Some(parser.value()?.parse()?),
            Long("pingpong") => options.pingpong = Some(parser.value()?.parse_with(cores)?),
            Long("verify") => options.verify = true,
            Long("fresh") => options.fresh = true,
            Long("stamps") => options.stamps = Some(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    if options.workload_name.is_empty() {
        return Err(Failed::Ours(Error::Usage("--workload is missing".into())));
    }
    if options.workload.one_pass() {
        options.warm_up = Duration::ZERO;
    } else {
        options.warm_up = warm_up.unwrap_or(Duration::from_millis(500));
        if options.duration.is_none() && options.requests.is_none() {
            options.duration = Some(Duration::from_secs(5));
        }
    }
    // With a number of requests all of them are counted.
    if options.requests.is_some() && options.duration.is_none() {
        options.warm_up = Duration::ZERO;
    }
    options
        .check()
        .map(|options| Command::Run(Box::new(options)))
        .map_err(Failed::Ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Options, Error> {
        match parse(line.split_whitespace().map(Into::into))? {
            Command::Run(options) => Ok(*options),
            _ => Err(Error::Usage("not a run".into())),
        }
    }

    #[test]
    fn sizes_are_powers_of_two() {
        let line = "run --socket s --workload seqread --block 128K --region 1G --depth 8";
        let options = run(line).unwrap();
        assert_eq!(options.block_bytes, 128 << 10);
        assert_eq!(options.region_bytes, 1 << 30);
        assert_eq!(options.duration, Some(Duration::from_secs(5)));
    }

    #[test]
    fn what_cannot_work_is_refused_before_connecting() {
        for line in [
            "run --workload randread",
            "run --socket s",
            "run --socket s --workload nothing",
            "run --socket s --workload randread --depth 257",
            "run --socket s --workload randread --depth 86 --no-indirect",
            "run --socket s --workload randread --ring-size 100",
            "run --socket s --workload randread --block 100",
            "run --socket s --workload randread --verify --block 512",
            "run --socket s --workload randread --fresh",
            "run --socket s --workload randread --rate 0",
            "run --socket s --workload randread --rate 1000 --sleep",
            "run --socket s --workload randread --series 0.001",
            "run --socket s --workload randread --pingpong 1,1",
        ] {
            assert!(matches!(run(line), Err(Error::Usage(_))), "{line}");
        }
    }

    #[test]
    fn the_region_ends_with_the_disk() {
        let mut options = run("run --socket s --workload randread --offset 1M").unwrap();
        options.fit((2 << 20) + 512, 512).unwrap();
        assert_eq!(options.region_bytes, 1 << 20);
        let mut options = run("run --socket s --workload randread --region 4M").unwrap();
        assert!(options.fit(2 << 20, 512).is_err());
        let mut options = run("run --socket s --workload randread --block 512").unwrap();
        assert!(options.fit(2 << 20, 4096).is_err());
    }
}
