//! Tests of the map: against a model, of hostile bytes, and of the memory it takes.

mod leaf;
mod memory;
mod model;
mod node;
mod walks;

use std::collections::{BTreeMap, HashMap, HashSet};

use super::slab::Body;
use super::{CheckpointProgress, Map, NeedNode, NodeLocation, ROOT_LEVEL, node as nodes};
use super::{child_of, span_blocks};
use crate::types::SegmentNumber;

/// What is mapped: address and checksum by block.
type Blocks = BTreeMap<u64, (u64, u32)>;

/// A disk of map segments: nodes by where they were written.
#[derive(Clone, Debug, Default)]
struct Store {
    nodes: HashMap<NodeLocation, Vec<u8>>,
    next_segment: u64,
}

impl Store {
    /// Runs a call on the map, supplying what it asks for.
    fn with<T>(&self, map: &mut Map, mut call: impl FnMut(&mut Map) -> Result<T, NeedNode>) -> T {
        loop {
            match call(map) {
                Ok(value) => return value,
                Err(NeedNode(location)) => {
                    map.supply(location, &self.nodes[&location])
                        .expect("the node is intact");
                }
            }
        }
    }

    /// Writes some nodes of the running checkpoint into a segment of their own; returns where.
    fn write_step(&mut self, map: &mut Map, space: u32) -> (CheckpointProgress, Vec<NodeLocation>) {
        self.next_segment += 1;
        let segment = SegmentNumber(self.next_segment);
        let mut buffer = vec![0xee; 24];
        let progress = map.write_nodes(segment, 4096, space, &mut buffer);
        assert!(
            buffer.len() - 24 <= space as usize,
            "more was written than there is space"
        );
        let mut written = Vec::new();
        let mut at = 24;
        while at < buffer.len() {
            let word =
                |i: usize| u32::from_le_bytes(buffer[at + i..at + i + 4].try_into().unwrap());
            let location = NodeLocation {
                segment,
                offset_bytes: 4096 + at as u32 - 24,
                len_bytes: word(16),
                checksum: word(20),
            };
            let bytes = buffer[at..at + location.len_bytes as usize].to_vec();
            self.nodes.insert(location, bytes);
            written.push(location);
            at += location.len_bytes as usize;
        }
        (progress, written)
    }

    /// Reads a whole tree: its mappings and the places of its nodes.
    fn read_tree(&self, root: Option<NodeLocation>) -> (Blocks, HashSet<NodeLocation>) {
        let (mut blocks, mut places) = (BTreeMap::new(), HashSet::new());
        if let Some(root) = root {
            self.read_node(root, ROOT_LEVEL, 0, &mut blocks, &mut places);
        }
        (blocks, places)
    }

    fn read_node(
        &self,
        location: NodeLocation,
        level: u8,
        first: u64,
        blocks: &mut Blocks,
        places: &mut HashSet<NodeLocation>,
    ) {
        assert!(places.insert(location), "a node is in the tree twice");
        let bytes = &self.nodes[&location];
        match nodes::get_node(&location, level, first, bytes).expect("a written node is valid") {
            Body::Leaf(leaf) => leaf.pieces(0, 1024, |piece| {
                for (i, crc) in piece.crcs.iter().enumerate() {
                    let block = first + u64::from(piece.start) + i as u64;
                    blocks.insert(block, (piece.address + i as u64, u32::from_le_bytes(*crc)));
                }
            }),
            Body::Inner(inner) => {
                let mut child = 0;
                for slot in inner.slots() {
                    child = inner.next_child(child).unwrap();
                    let first = first + child as u64 * span_blocks(level - 1);
                    assert_eq!(child_of(first, level), child);
                    let location = slot.location().unwrap();
                    self.read_node(location, level - 1, first, blocks, places);
                    child += 1;
                }
            }
            Body::Free => unreachable!(),
        }
    }
}

/// A small generator of numbers for tests that need many (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
