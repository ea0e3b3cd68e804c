//! Bytes that are not the node asked for are refused, and no bytes make the parser panic.

use proptest::prelude::*;
use proptest::test_runner::Config;

use super::super::inner::{Inner, Slot};
use super::super::leaf::Leaf;
use super::super::node::{MAX_NODE_BYTES, get_node, node_bytes, put_node};
use super::super::slab::Body;
use super::super::{Map, NodeLocation};
use super::Random;
use crate::crc::crc32c;
use crate::types::{Address, BlockNumber, SegmentNumber};

fn location(bytes: &[u8]) -> NodeLocation {
    NodeLocation {
        segment: SegmentNumber(3),
        offset_bytes: 4096,
        len_bytes: bytes.len() as u32,
        checksum: u32::from_le_bytes(bytes[20..24].try_into().unwrap()),
    }
}

fn put(body: &Body, level: u8, first: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (len, checksum) = put_node(body, level, first, &mut bytes);
    assert_eq!(
        (len as usize, checksum),
        (bytes.len(), location(&bytes).checksum)
    );
    assert_eq!(bytes.len(), node_bytes(body));
    assert!(bytes.len() % 8 == 0 && len <= MAX_NODE_BYTES);
    bytes
}

/// Nodes of every kind: (level, first block, bytes).
fn samples() -> Vec<(u8, u64, Vec<u8>)> {
    let mut random = Random(1);
    let mut leaves = vec![];
    let mut one = Leaf::empty();
    one.set(1023, 1 << 13 | 1, &[5], |_, _| {});
    leaves.push(one);
    let mut runs = Leaf::empty();
    runs.set(0, 1 << 13 | 1, &[9; 300], |_, _| {});
    runs.set(100, 1 << 14 | 1, &[8; 30], |_, _| {});
    leaves.push(runs);
    for (count, spread) in [
        (40, 1 << 20),
        (1024, 1 << 20),
        (1024, 1 << 45),
        (1024, 1u64 << 63),
    ] {
        let mut leaf = Leaf::empty();
        for _ in 0..count {
            let address = random.below(spread) << 13 >> 13 << 1 | 1;
            leaf.set(
                random.below(1024) as u32,
                address,
                &[random.next() as u32],
                |_, _| {},
            );
        }
        leaf.compact();
        leaves.push(leaf);
    }
    let mut all: Vec<_> = leaves
        .into_iter()
        .map(|leaf| (0, 7 << 10, put(&Body::Leaf(leaf), 0, 7 << 10)))
        .collect();
    for count in [1, 256] {
        let mut inner = Inner::default();
        for child in 0..count {
            let location = NodeLocation {
                segment: SegmentNumber(1 + random.below((1 << 51) - 1)),
                offset_bytes: 4096 + child as u32 * 64,
                len_bytes: 56,
                checksum: random.next() as u32,
            };
            inner.set(child * 101 % 256, Slot::on_disk(location));
        }
        all.push((2, 3 << 26, put(&Body::Inner(Box::new(inner)), 2, 3 << 26)));
    }
    all
}

#[test]
fn a_node_reads_as_it_was_written() {
    for (level, first, bytes) in samples() {
        let body = get_node(&location(&bytes), level, first, &bytes).unwrap();
        assert_eq!(put(&body, level, first), bytes);
    }
}

#[test]
fn every_flipped_bit_and_every_truncation_is_detected() {
    for (level, first, mut bytes) in samples() {
        let at = location(&bytes);
        // All bits of short nodes, and of headers; of long ones every 61st bit.
        let step = if bytes.len() < 1500 { 1 } else { 61 };
        for bit in (0..40 * 8).chain((40 * 8..bytes.len() * 8).step_by(step)) {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(
                get_node(&at, level, first, &bytes).is_err(),
                "bit {bit} is not guarded"
            );
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        for len in (0..bytes.len()).step_by(step) {
            assert!(get_node(&at, level, first, &bytes[..len]).is_err());
        }
    }
}

#[test]
fn a_node_of_another_place_is_refused() {
    for (level, first, bytes) in samples() {
        let at = location(&bytes);
        assert!(get_node(&at, level, first + (1 << 34), &bytes).is_err());
        assert!(get_node(&at, level + 1, first, &bytes).is_err());
        let other = NodeLocation {
            checksum: at.checksum ^ 1,
            ..at
        };
        assert!(get_node(&other, level, first, &bytes).is_err());
    }
}

#[test]
fn supply_refuses_damage_and_takes_the_node_after() {
    let mut map = Map::empty();
    let at = Address::new(SegmentNumber(4), 9);
    map.insert(BlockNumber(70), at, &[6], &mut Vec::new())
        .unwrap();
    let mut store = super::Store::default();
    map.begin_checkpoint();
    store.write_step(&mut map, 1 << 20);
    map.finish_checkpoint();
    map.evict(0);
    let need = map.ensure_resident(BlockNumber(70), 1).unwrap_err();
    let bytes = &store.nodes[&need.0];
    let mut damaged = bytes.clone();
    damaged[50] ^= 4;
    assert!(
        map.supply(need.0, &damaged)
            .unwrap_err()
            .to_string()
            .contains("checksum")
    );
    assert_eq!(
        map.ensure_resident(BlockNumber(70), 1),
        Err(need),
        "damage leaves no trace"
    );
    map.supply(need.0, bytes).unwrap();
    map.supply(need.0, bytes).unwrap();
    store.with(&mut map, |map| map.ensure_resident(BlockNumber(70), 1));
}

proptest! {
    #![proptest_config(Config { cases: 3000, failure_persistence: None, ..Config::default() })]

    /// The checksum is made right, so that the checks behind it are reached.
    #[test]
    fn hostile_bytes_never_panic(
        sample in 0usize..8,
        edits in proptest::collection::vec((0usize..200, any::<u8>()), 1..6),
        cut in 0usize..40,
        level in 0u8..5,
    ) {
        let (_, first, mut bytes) = samples().swap_remove(sample);
        for (at, value) in edits {
            // Most edits in the header and the start of the tables.
            let at = if at < 40 { 4 + at * 36 / 40 } else { at };
            let len = bytes.len();
            bytes[at % len] = value;
        }
        bytes[0..6].copy_from_slice(b"VHMN\x01\x00");
        bytes.truncate((bytes.len() - cut.min(bytes.len() - 40)).max(40));
        bytes[6] = level;
        bytes[8..16].copy_from_slice(&first.to_le_bytes());
        if cut % 2 == 0 {
            let len = bytes.len() as u32;
            bytes[16..20].copy_from_slice(&len.to_le_bytes());
        }
        bytes[20..24].fill(0);
        let checksum = crc32c(&bytes);
        bytes[20..24].copy_from_slice(&checksum.to_le_bytes());
        let at = location(&bytes);
        // What is accepted can be used.
        if let Ok(Body::Leaf(mut leaf)) = get_node(&at, level, first, &bytes) {
            let mut seen = 0;
            leaf.pieces(0, 1024, |piece| {
                seen += piece.len();
                let address = Address::from_bits(piece.address);
                assert!(address.block() > 0);
                let _ = address.plus(piece.len() - 1);
            });
            assert_eq!(seen, leaf.mapped());
            leaf.set(3, 1 << 13 | 1, &[1; 20], |_, _| {});
            leaf.clear(5, 700, |_, _| {});
            leaf.compact();
        }
    }
}
