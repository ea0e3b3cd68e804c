//! The memory a mapped block takes, all allocations of the map counted.

use super::super::Map;
use super::{Random, Store};
use crate::types::{Address, BlockNumber};

struct Writer {
    map: Map,
    next: u64,
}

impl Writer {
    fn new() -> Self {
        Self {
            map: Map::empty(),
            next: 1 << 13 | 1,
        }
    }

    fn write(&mut self, block: u64, count: u64) {
        // As a log does: a record header now and then, and the next segment at its end.
        if self.next.is_multiple_of(8192) || self.next % 8192 + count > 8192 {
            self.next = (self.next / 8192 + 1) * 8192 + 1;
        }
        let crcs: Vec<u32> = (0..count)
            .map(|i| (self.next + i) as u32 ^ 0x5a5a)
            .collect();
        let address = Address::from_bits(self.next);
        self.map
            .insert(BlockNumber(block), address, &crcs, &mut Vec::new())
            .unwrap();
        self.next += count + u64::from(count > 1);
    }

    /// Bytes a mapped block takes now, and after a checkpoint.
    fn bytes_a_block(&mut self) -> (f64, f64) {
        let blocks = self.map.mapped_blocks() as f64;
        let dirty = self.map.slab.allocated_bytes() as f64 / blocks;
        self.map.begin_checkpoint();
        Store::default().write_step(&mut self.map, u32::MAX >> 1);
        self.map.finish_checkpoint();
        (dirty, self.map.slab.allocated_bytes() as f64 / blocks)
    }
}

/// 1/16 of 10 million mapped blocks of 268 million, uniformly.
fn uniform(jump: u64) -> (f64, f64) {
    let mut random = Random(42);
    let mut writer = Writer::new();
    while writer.map.mapped_blocks() < 625_000 {
        let block = random.below(16 << 20);
        writer.next += jump;
        writer.write(block, 1);
    }
    writer.bytes_a_block()
}

#[test]
fn uniform_random_writes_take_at_most_16_bytes_a_block() {
    let near = uniform(0);
    println!("uniform, log span up to 16 TiB: {near:.2?} B a block (dirty, clean)");
    assert!(near.0 <= 14.0 && near.1 <= 13.0);
    // The oldest and newest block of a leaf more than 16 TiB of log apart.
    let far = uniform(1 << 16);
    println!("uniform, wider log span: {far:.2?} B a block (dirty, clean)");
    assert!(far.0 <= 16.0 && far.1 <= 15.0);
}

#[test]
fn full_random_overwrite_takes_at_most_9_bytes_a_block() {
    let mut random = Random(7);
    let mut writer = Writer::new();
    for _ in 0..1_000_000 {
        writer.write(random.below(200_000), 1);
    }
    let (dirty, clean) = writer.bytes_a_block();
    println!("overwritten at random: {dirty:.2}, {clean:.2} B a block");
    assert!(dirty <= 9.0 && clean <= 9.0);
}

#[test]
fn skewed_writes_take_at_most_16_bytes_a_block() {
    let mut random = Random(11);
    let mut writer = Writer::new();
    for _ in 0..600_000 {
        // Zipf-like: the share of block n falls as 1/n.
        let unit = (random.next() >> 11) as f64 / (1u64 << 53) as f64;
        let block = ((4_000_000f64).powf(unit) - 1.0) as u64;
        writer.write(block, 1);
    }
    let (dirty, clean) = writer.bytes_a_block();
    println!("skewed: {dirty:.2}, {clean:.2} B a block");
    assert!(dirty <= 16.0 && clean <= 16.0);
}

#[test]
fn sequential_writes_take_at_most_5_bytes_a_block() {
    let mut writer = Writer::new();
    for i in 0..4096 {
        writer.write(i * 256, 256);
    }
    let (dirty, clean) = writer.bytes_a_block();
    println!("sequential: {dirty:.2}, {clean:.2} B a block");
    assert!(dirty <= 4.5 && clean <= 4.5);
    let mut writer = Writer::new();
    for i in 0..200_000 {
        writer.write(i, 1);
    }
    let (dirty, clean) = writer.bytes_a_block();
    println!("sequential by single blocks: {dirty:.2}, {clean:.2} B a block");
    assert!(dirty <= 5.0 && clean <= 4.5);
}
