//! Walks over trees on disk agree with what reading the trees whole says. The model's random steps
//! (model.rs) call the checks here with the roots they make.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::convert::Infallible;
use std::ops::{ControlFlow, Range};

use super::super::walk::{self, Reached, WalkErrorCause};
use super::super::{CheckpointProgress, Displaced, MAX_BLOCKS, Map, NodeLocation};
use super::{Blocks, Store};
use crate::types::{Address, BlockNumber, SegmentNumber};

const ON: ControlFlow<()> = ControlFlow::Continue(());
const END: ControlFlow<()> = ControlFlow::Break(());

fn source(store: &Store) -> impl FnMut(NodeLocation) -> Result<Vec<u8>, Infallible> {
    |location| Ok(store.nodes[&location].clone())
}

fn addresses_of(extent: &Displaced) -> impl Iterator<Item = u64> + use<> {
    let first = extent.address.bits();
    first..first + u64::from(extent.count)
}

/// What walks say of a root is what it is to map.
pub(super) fn check_contents(store: &Store, root: Option<NodeLocation>, blocks: &Blocks) {
    let (read, nodes) = store.read_tree(root);
    assert!(read == *blocks, "the tree on disk maps something else");
    let (mut reached, mut addresses) = (HashSet::new(), BTreeSet::new());
    let flow = walk::mark(&mut source(store), &[root, None, root], |what| {
        match what {
            Reached::Node(location) => assert!(reached.insert(location), "told twice"),
            Reached::Blocks(extent) => addresses.extend(addresses_of(&extent)),
            Reached::Lost(location) => panic!("{location:?} is lost"),
        }
        ON
    });
    assert_eq!(flow.unwrap(), ON);
    assert_eq!(reached, nodes);
    assert!(
        addresses
            .iter()
            .eq(&blocks.values().map(|v| v.0).collect::<BTreeSet<_>>())
    );
    check_difference(store, None, root, 0..MAX_BLOCKS);
}

/// All nodes that any of the roots reaches.
pub(super) fn reached_nodes(
    store: &Store,
    roots: &[Option<NodeLocation>],
) -> HashSet<NodeLocation> {
    let mut marked = HashSet::new();
    let flow = walk::mark(&mut source(store), roots, |what| {
        if let Reached::Node(location) = what {
            assert!(marked.insert(location), "a node was marked twice");
        }
        ON
    });
    assert_eq!(flow.unwrap(), ON);
    let read = roots.iter().flat_map(|&root| store.read_tree(root).1);
    assert_eq!(marked, read.collect());
    marked
}

pub(super) fn check_difference(
    store: &Store,
    old: Option<NodeLocation>,
    new: Option<NodeLocation>,
    range: Range<u64>,
) {
    let (old_blocks, old_nodes) = store.read_tree(old);
    let (new_blocks, new_nodes) = store.read_tree(new);
    let mut expected = BTreeMap::new();
    for &block in old_blocks.keys().chain(new_blocks.keys()) {
        let (a, b) = (old_blocks.get(&block), new_blocks.get(&block));
        if range.contains(&block) && a.map(|a| a.0) != b.map(|b| b.0) {
            expected.insert(block, b.is_some());
        }
    }
    let mut told = BTreeMap::new();
    let mut last: Option<(u64, bool)> = None;
    let nodes_read = Cell::new(0);
    let mut counted = |location| {
        nodes_read.set(nodes_read.get() + 1);
        source(store)(location)
    };
    let blocks = BlockNumber(range.start)..BlockNumber(range.end);
    let flow = walk::difference(&mut counted, old, new, blocks, |block, count, mapped| {
        if let Some((end, kind)) = last {
            assert!(
                end < block.0 || (end == block.0 && kind != mapped),
                "ranges are joined"
            );
        }
        last = Some((block.0 + count, mapped));
        told.extend((block.0..block.0 + count).map(|block| (block, mapped)));
        ON
    });
    assert_eq!(flow.unwrap(), ON);
    assert!(told == expected, "a difference of other blocks");
    let most = old_nodes.symmetric_difference(&new_nodes).count();
    assert!(nodes_read.get() <= most, "nodes of both trees were read");
}

/// Checks what only `root` reaches, and returns its nodes.
pub(super) fn check_exclusive(
    store: &Store,
    root: Option<NodeLocation>,
    others: &[Option<NodeLocation>],
) -> HashSet<NodeLocation> {
    let (blocks, nodes) = store.read_tree(root);
    let others_read: Vec<_> = others.iter().map(|&root| store.read_tree(root)).collect();
    let mut expected_nodes = nodes;
    let mut expected: Vec<u64> = Vec::new();
    for (block, (address, _)) in blocks {
        let shared = |(blocks, _): &(Blocks, _)| blocks.get(&block).map(|b| b.0) == Some(address);
        if !others_read.iter().any(shared) {
            expected.push(address);
        }
    }
    for (_, nodes) in &others_read {
        expected_nodes.retain(|node| !nodes.contains(node));
    }
    let (mut told, mut told_nodes) = (Vec::new(), HashSet::new());
    let flow = walk::exclusive(&mut source(store), root, others, |what| {
        match what {
            Reached::Node(location) => assert!(told_nodes.insert(location), "told twice"),
            Reached::Blocks(extent) => told.extend(addresses_of(&extent)),
            Reached::Lost(location) => panic!("{location:?} is lost"),
        }
        ON
    });
    assert_eq!(flow.unwrap(), ON);
    assert_eq!(told, expected, "not the blocks of this root alone");
    assert_eq!(told_nodes, expected_nodes);
    told_nodes
}

/// Two trees of 4000 blocks that differ in one: the store, the older root and the newer.
fn two_trees() -> (Store, [Option<NodeLocation>; 2]) {
    let mut map = Map::empty();
    let mut store = Store::default();
    for leaf in 0..4 {
        let address = Address::new(SegmentNumber(1 + leaf), 1);
        map.insert(
            BlockNumber(leaf << 18),
            address,
            &[3; 1000],
            &mut Vec::new(),
        )
        .unwrap();
    }
    map.freeze(1);
    let address = Address::new(SegmentNumber(9), 1);
    map.insert(BlockNumber(500), address, &[4], &mut Vec::new())
        .unwrap();
    map.begin_checkpoint();
    let (progress, _) = store.write_step(&mut map, 1 << 20);
    assert!(matches!(progress, CheckpointProgress::Done { .. }));
    let roots = [0, 1].map(|i| map.checkpoint_roots()[i].root);
    (store, roots)
}

#[test]
fn a_walk_reads_what_differs_and_no_more() {
    let (store, [old, new]) = two_trees();
    let reads = Cell::new(0);
    let mut counted = |location| {
        reads.set(reads.get() + 1);
        source(&store)(location)
    };
    let all = BlockNumber(0)..BlockNumber(MAX_BLOCKS);
    let mut told = Vec::new();
    let _ = walk::difference(&mut counted, old, new, all, |block, count, mapped| {
        told.push((block.0, count, mapped));
        ON
    })
    .unwrap();
    assert_eq!(told, [(500, 1, true)]);
    assert_eq!(reads.replace(0), 8, "one path of four nodes in each");
    let mut told = Vec::new();
    let _ = walk::exclusive(&mut counted, old, &[new, None], |what| {
        told.extend(match what {
            Reached::Blocks(extent) => Some(extent),
            Reached::Node(_) | Reached::Lost(_) => None,
        });
        ON
    })
    .unwrap();
    let address = Address::new(SegmentNumber(1), 501);
    assert_eq!(told, [Displaced { address, count: 1 }]);
    assert_eq!(reads.replace(0), 8);
    // The nearest of the others comes first: one that has nothing in common costs no more than
    // the path on which that one differs.
    let (mut map, mut store) = (Map::empty(), store);
    store.next_segment = 100;
    for leaf in 0..4 {
        let address = Address::new(SegmentNumber(50 + leaf), 1);
        map.insert(
            BlockNumber(leaf << 18),
            address,
            &[3; 1000],
            &mut Vec::new(),
        )
        .unwrap();
    }
    map.begin_checkpoint();
    store.write_step(&mut map, 1 << 20);
    let far = map.checkpoint_roots()[0].root;
    let mut counted = |location| {
        reads.set(reads.get() + 1);
        source(&store)(location)
    };
    let _ = walk::exclusive(&mut counted, old, &[new, far], |_| ON).unwrap();
    assert_eq!(reads.get(), 12);
}

#[test]
fn a_visitor_ends_a_walk() {
    let (store, [old, new]) = two_trees();
    let all = BlockNumber(0)..BlockNumber(MAX_BLOCKS);
    let mut calls = 0;
    let flow = walk::difference(&mut source(&store), None, new, all, |_, _, _| {
        calls += 1;
        END
    });
    assert_eq!(flow.unwrap(), END);
    for stop_at in 1..10 {
        for exclusive in [false, true] {
            let mut seen = 0;
            let visit = |_| {
                seen += 1;
                if seen == stop_at { END } else { ON }
            };
            let flow = if exclusive {
                walk::exclusive(&mut source(&store), old, &[], visit)
            } else {
                walk::mark(&mut source(&store), &[old, new], visit)
            };
            assert_eq!((flow.unwrap(), seen), (END, stop_at));
        }
    }
    assert_eq!(calls, 1);
}

#[test]
fn a_node_that_cannot_be_had_is_named_with_its_blocks() {
    let (mut store, [old, new]) = two_trees();
    let (_, mut shared) = store.read_tree(old);
    let (_, others) = store.read_tree(new);
    shared.retain(|node| others.contains(node));
    // A leaf of blocks that both trees have: only a walk that needs it finds the damage.
    let leaf = *shared.iter().find(|at| store.nodes[*at][6] == 0).unwrap();
    let bytes = store.nodes.get_mut(&leaf).unwrap();
    let first = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    bytes[40] ^= 1;
    let all = BlockNumber(0)..BlockNumber(MAX_BLOCKS);
    let difference = walk::difference(&mut source(&store), old, new, all, |_, _, _| ON);
    assert_eq!(difference.unwrap(), ON);
    let error = walk::mark(&mut source(&store), &[new], |_| ON).unwrap_err();
    assert_eq!((error.location, error.level), (leaf, 0));
    assert_eq!((error.first_block.0, error.count), (first, 1024));
    assert!(matches!(error.cause, WalkErrorCause::Damaged(_)));
    let mut broken = |location: NodeLocation| match location == leaf {
        true => Err("the disk is gone"),
        false => Ok(store.nodes[&location].clone()),
    };
    let error = walk::exclusive(&mut broken, old, &[new, new], |_| ON);
    assert_eq!(error.unwrap(), ON, "what both have is not entered");
    let error = walk::mark(&mut broken, &[new], |_| ON).unwrap_err();
    let text = error.to_string();
    let place = format!("byte {}: the disk is gone", leaf.offset_bytes);
    assert!(text.ends_with(&place), "{text}");
}

#[test]
fn exclusive_goes_on_beside_a_node_that_is_gone() {
    let (store, [_, new]) = two_trees();
    let walked = |gone: Option<NodeLocation>| {
        let mut source = |location: NodeLocation| match Some(location) == gone {
            true => Err("its segment is gone"),
            false => Ok(store.nodes[&location].clone()),
        };
        let (mut nodes, mut addresses, mut lost) = (HashSet::new(), BTreeSet::new(), Vec::new());
        let flow = walk::exclusive(&mut source, new, &[None], |what| {
            match what {
                Reached::Node(location) => drop(nodes.insert(location)),
                Reached::Blocks(extent) => addresses.extend(addresses_of(&extent)),
                Reached::Lost(location) => lost.push(location),
            }
            ON
        });
        assert_eq!(flow.unwrap(), ON);
        (nodes, addresses, lost)
    };
    let (nodes, addresses, lost) = walked(None);
    assert_eq!(lost, []);
    let leaves: Vec<_> = nodes.iter().filter(|at| store.nodes[*at][6] == 0).collect();
    assert!(leaves.len() > 1);
    let mut seen = BTreeSet::new();
    for &leaf in leaves {
        let (others, rest, lost) = walked(Some(leaf));
        assert_eq!((lost, others), (vec![leaf], nodes.clone()));
        assert!(rest.is_subset(&addresses) && rest.len() < addresses.len());
        seen.extend(rest);
    }
    assert_eq!(
        seen, addresses,
        "what lies under a leaf is told without the others"
    );
    // As in a removal that has come to its end before.
    let (nodes, addresses, lost) = walked(new);
    assert_eq!((nodes.len(), addresses.len(), lost.len()), (1, 0, 1));
}
