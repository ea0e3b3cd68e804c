//! Times the map's calls: `cargo run --release -p vhostd-engine --example map_bench`.
//!
//! Single-threaded, everything resident, a fixed seed. Prints nanoseconds of CPU a call, so that
//! other work on the machine disturbs only through the caches.

use std::hint::black_box;
use vhostd_engine::map::{CheckpointProgress, Extents, Map};
use vhostd_engine::types::{Address, BlockNumber, SegmentNumber};

/// CPU time of this thread, ns (first field of schedstat; see proc(5)).
fn cpu_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let first = text.split(' ').next().and_then(|word| word.parse().ok());
    first.expect("the kernel accounts CPU time (CONFIG_SCHED_INFO)")
}

struct Bench {
    map: Map,
    random: u64,
    next_address: u64,
    out: Extents,
}

impl Bench {
    fn new() -> Self {
        Self {
            map: Map::empty(),
            random: 1,
            next_address: 1 << 13 | 1,
            out: Extents::default(),
        }
    }

    /// xorshift64*: cheap enough not to be measured.
    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }

    fn insert(&mut self, block: u64, crcs: &[u32]) {
        let count = crcs.len() as u64;
        if self.next_address % 8192 + count > 8192 || self.next_address.is_multiple_of(8192) {
            self.next_address = (self.next_address / 8192 + 1) * 8192 + 1;
        }
        let address = Address::from_bits(self.next_address);
        self.next_address += count;
        let mut displaced = Vec::new();
        let done = self
            .map
            .insert(BlockNumber(block), address, crcs, &mut displaced);
        assert!(done.is_ok(), "all nodes are resident");
        black_box(displaced);
    }

    fn lookup(&mut self, block: u64, count: u32) {
        let found = self.map.lookup(BlockNumber(block), count, &mut self.out);
        assert!(found.is_ok(), "all nodes are resident");
        black_box(&self.out);
    }

    fn time(&mut self, what: &str, times: u64, mut call: impl FnMut(&mut Self, u64)) {
        let start = cpu_ns();
        for i in 0..times {
            call(self, i);
        }
        let ns = (cpu_ns() - start) as f64 / times as f64;
        println!("{what:<58} {ns:>9.1} ns");
    }

    fn checkpoint(&mut self) {
        let start = cpu_ns();
        let (mut bytes, mut steps) = (0, 0);
        self.map.begin_checkpoint();
        let mut buffer = Vec::new();
        loop {
            buffer.clear();
            let progress = self
                .map
                .write_nodes(SegmentNumber(1), 4096, 256 << 10, &mut buffer);
            steps += 1;
            bytes += buffer.len();
            if let CheckpointProgress::Done { .. } = progress {
                break;
            }
        }
        self.map.finish_checkpoint();
        println!(
            "checkpoint: {:.1} MB in {:.0} ms, {steps} steps of at most 256 KiB",
            bytes as f64 / 1e6,
            (cpu_ns() - start) as f64 / 1e6,
        );
    }

    fn report(&self) {
        let blocks = self.map.mapped_blocks();
        let bytes = self.map.memory_bytes();
        println!(
            "{blocks} blocks mapped, {:.1} MB, {:.2} B a block",
            bytes as f64 / 1e6,
            bytes as f64 / blocks as f64
        );
    }
}

/// `blocks` blocks of a volume of `volume_blocks`, at random, as single blocks.
fn random(volume_blocks: u64, blocks: u64) {
    println!("--- random, volume of {volume_blocks} blocks");
    let mut bench = Bench::new();
    bench.time("insert of a new block", blocks, |bench, i| {
        let block = bench.below(volume_blocks);
        bench.insert(block, &[i as u32]);
    });
    bench.report();
    bench.time("lookup of 1 block", 2_000_000, |bench, _| {
        let block = bench.below(volume_blocks);
        bench.lookup(block, 1);
    });
    bench.checkpoint();
    bench.time("insert after a checkpoint", 1_000_000, |bench, i| {
        let block = bench.below(volume_blocks);
        bench.insert(block, &[i as u32]);
    });
}

fn main() {
    random(1 << 16, 2_000_000);
    random(1 << 20, 2_000_000);
    random(268 << 20, 10_000_000);

    println!("--- sequential");
    let mut bench = Bench::new();
    let crcs = [7; 256];
    bench.time("insert of 256 new blocks", 40_000, |bench, i| {
        bench.insert(i * 256, &crcs);
    });
    bench.report();
    bench.time("lookup of 256 blocks", 200_000, |bench, i| {
        bench.lookup(i % 40_000 * 256, 256);
    });
    bench.time("insert of 256 blocks over others", 40_000, |bench, i| {
        bench.insert(i * 256, &crcs);
    });
    let blocks = 40_000 * 256;
    bench.time("lookup of 1 random block", 2_000_000, |bench, _| {
        let block = bench.below(blocks);
        bench.lookup(block, 1);
    });
    bench.checkpoint();
    bench.time(
        "insert of 1 random block over a run",
        2_000_000,
        |bench, i| {
            let block = bench.below(blocks);
            bench.insert(block, &[i as u32]);
        },
    );
    bench.report();
}
