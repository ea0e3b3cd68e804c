//! The map does what a plain table of blocks does, through snapshots, checkpoints, aborts,
//! evictions, relocations, rollbacks and reopening; and it accounts for each node exactly once.

use std::collections::HashSet;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::super::{
    CheckpointProgress, Displaced, Extent, Extents, MAX_BLOCKS, MAX_NODE_BYTES, Map, NodeLocation,
};
use super::walks;
use super::{Blocks, Store};
use crate::types::{Address, BlockNumber, SegmentNumber};

#[derive(Clone, Debug)]
enum Step {
    Insert {
        block: u64,
        len: u32,
        skip: u8,
    },
    Remove {
        block: u64,
        len: u32,
    },
    Lookup {
        block: u64,
        len: u32,
    },
    NextMapped {
        block: u64,
    },
    Freeze,
    /// Removes a committed snapshot that at most one line descends from.
    Forget {
        pick: usize,
    },
    Rollback {
        pick: usize,
    },
    /// Compares two roots, and takes one as if it were removed beside some others.
    Compare {
        picks: [usize; 4],
        block: u64,
        len: u64,
    },
    Begin,
    Write {
        space: u32,
    },
    Finish,
    Abort,
    Evict {
        keep_percent: u8,
    },
    Reopen,
    Relocate {
        pick: usize,
    },
}

/// Blocks in a few places, so that steps meet: two leaves, both sides of a border between inner
/// nodes of level 2, and the end of the largest volume.
fn block() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..2048,
        2 => (1u64 << 26) - 700..(1 << 26) + 700,
        1 => (0u64..12).prop_map(|leaf| leaf << 18),
        1 => MAX_BLOCKS - 1500..MAX_BLOCKS,
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![6 => Just(1u32), 3 => 2u32..20, 2 => 20u32..300, 1 => 300u32..2500]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (block(), len(), 0u8..100)
            .prop_map(|(block, len, skip)| Step::Insert { block, len, skip }),
        8 => (block(), len()).prop_map(|(block, len)| Step::Remove { block, len }),
        6 => (block(), len()).prop_map(|(block, len)| Step::Lookup { block, len }),
        3 => block().prop_map(|block| Step::NextMapped { block }),
        5 => Just(Step::Freeze),
        1 => any::<usize>().prop_map(|pick| Step::Forget { pick }),
        1 => any::<usize>().prop_map(|pick| Step::Rollback { pick }),
        2 => (any::<[usize; 4]>(), block(), prop_oneof![1u64..5000, Just(MAX_BLOCKS)])
            .prop_map(|(picks, block, len)| Step::Compare { picks, block, len }),
        4 => Just(Step::Begin),
        8 => prop_oneof![Just(0u32), 56..20_000u32, Just(1 << 20)]
            .prop_map(|space| Step::Write { space }),
        4 => Just(Step::Finish),
        2 => Just(Step::Abort),
        3 => (0u8..100).prop_map(|keep_percent| Step::Evict { keep_percent }),
        1 => Just(Step::Reopen),
        2 => any::<usize>().prop_map(|pick| Step::Relocate { pick }),
    ]
}

/// A snapshot: pending while it has no place on disk, see `Harness`.
#[derive(Clone)]
struct Snapshot {
    key: u64,
    parent: Option<u64>,
    root: Option<NodeLocation>,
    blocks: Blocks,
}

/// What a catalog would have.
#[derive(Clone, Default)]
struct Committed {
    root: Option<NodeLocation>,
    blocks: Blocks,
    snapshots: Vec<Snapshot>,
    parent: Option<u64>,
}

impl Committed {
    fn root_of(&self, key: Option<u64>) -> Option<NodeLocation> {
        let snapshot = self.snapshots.iter().find(|s| Some(s.key) == key);
        key.and_then(|_| snapshot.expect("parents are kept").root)
    }

    /// All roots: the snapshots', and the head's last.
    fn roots(&self) -> Vec<Option<NodeLocation>> {
        let snapshots = self.snapshots.iter().map(|s| s.root);
        snapshots.chain([self.root]).collect()
    }
}

struct Harness {
    map: Map,
    store: Store,
    blocks: Blocks,
    committed: Committed,
    /// Snapshots taken and not committed, oldest first; the running checkpoint has the first
    /// `covered` of them.
    pending: Vec<Snapshot>,
    covered: usize,
    /// Of the head.
    parent: Option<u64>,
    next_key: u64,
    /// What the running checkpoint is to hold of the head.
    frozen: Option<Blocks>,
    done: Option<Option<NodeLocation>>,
    /// Written and not reported dead.
    live: HashSet<NodeLocation>,
    next_address: u64,
    next_crc: u32,
}

fn clip(block: u64, len: u32) -> u32 {
    u64::from(len).min(MAX_BLOCKS - block) as u32
}

impl Harness {
    fn new() -> Self {
        Self {
            map: Map::empty(),
            store: Store::default(),
            blocks: Blocks::new(),
            committed: Committed::default(),
            pending: Vec::new(),
            covered: 0,
            parent: None,
            next_key: 0,
            frozen: None,
            done: None,
            live: HashSet::new(),
            next_address: 1 << 13 | 1,
            next_crc: 1,
        }
    }

    /// An address for `len` blocks: behind the last one, in the next segment, or far away.
    fn allocate(&mut self, len: u32, skip: u8) -> u64 {
        match skip {
            0 => self.next_address += 1 << 33,
            1 => self.next_address += 1 << 49,
            2 => self.next_address = self.next_address.saturating_sub(1 << 34).max(1 << 13 | 1),
            3..20 => self.next_address += 3,
            _ => {}
        }
        let block = self.next_address % 8192;
        if block == 0 || block + u64::from(len) > 8192 {
            self.next_address = (self.next_address / 8192 + 1) * 8192 + 1;
        }
        if self.next_address >> 13 >= (1 << 51) - 2 {
            self.next_address = 1 << 13 | 1;
        }
        let address = self.next_address;
        self.next_address += u64::from(len);
        address
    }

    fn take_dead(&mut self) {
        let mut dead = Vec::new();
        self.map.take_dead_nodes(&mut dead);
        for location in dead {
            assert!(
                self.live.remove(&location),
                "a node died twice or was never written"
            );
        }
    }

    fn check_displaced(&mut self, displaced: &[Displaced], removed: Vec<u64>) {
        let told: Vec<u64> = displaced
            .iter()
            .flat_map(|d| (0..u64::from(d.count)).map(|i| d.address.bits() + i))
            .collect();
        assert_eq!(told, removed);
    }

    fn lookup(&mut self, block: u64, len: u32) {
        let mut out = Extents::default();
        self.store.with(&mut self.map, |map| {
            map.lookup(BlockNumber(block), len, &mut out)
        });
        let mut at = block;
        let mut crcs_seen = 0;
        let mut last_was_hole = false;
        for extent in &out.extents {
            match *extent {
                Extent::Hole { block, count } => {
                    assert!(!last_was_hole && count > 0, "holes are joined");
                    last_was_hole = true;
                    assert_eq!(block.0, at);
                    let end = at + u64::from(count);
                    assert_eq!(self.blocks.range(at..end).next(), None);
                    at = end;
                }
                Extent::Mapped {
                    block,
                    count,
                    address,
                    first_crc,
                } => {
                    last_was_hole = false;
                    assert_eq!((block.0, first_crc), (at, crcs_seen));
                    for i in 0..count {
                        let crc = out.checksums[first_crc + i as usize];
                        let got = Some(&(address.plus(i).bits(), crc)).copied();
                        assert_eq!(got, self.blocks.get(&at).copied(), "block {at}");
                        at += 1;
                    }
                    crcs_seen += count as usize;
                }
            }
        }
        assert_eq!(
            (at, crcs_seen),
            (block + u64::from(len), out.checksums.len())
        );
    }

    /// The running checkpoint is done: what it wrote is what was frozen, and all nodes that are
    /// not dead are reached. Then it is committed.
    fn commit(&mut self, root: Option<NodeLocation>) {
        let frozen = self.frozen.take().expect("a checkpoint is running");
        let mut snapshots: Vec<_> = self.pending.drain(..self.covered).collect();
        self.covered = 0;
        let roots = self.map.checkpoint_roots();
        assert_eq!(roots.len(), snapshots.len() + 1);
        for (snapshot, written) in snapshots.iter_mut().zip(roots) {
            assert_eq!(written.key, Some(snapshot.key));
            assert_eq!(written.mapped_blocks, snapshot.blocks.len() as u64);
            walks::check_contents(&self.store, written.root, &snapshot.blocks);
            snapshot.root = written.root;
        }
        let last = roots.last().expect("the head's");
        assert_eq!((last.key, last.root), (None, root));
        assert_eq!(last.mapped_blocks, frozen.len() as u64);
        walks::check_contents(&self.store, root, &frozen);
        if let Some(newest) = snapshots.last() {
            self.committed.parent = Some(newest.key);
        }
        self.committed.snapshots.append(&mut snapshots);
        self.committed.root = root;
        self.committed.blocks = frozen;
        self.take_dead();
        self.check_live();
        self.map.finish_checkpoint();
        assert_eq!(self.map.pending_freezes(), self.pending.len());
    }

    /// Nodes that were written and not reported dead are those that a root reaches.
    fn check_live(&self) {
        let reached = walks::reached_nodes(&self.store, &self.committed.roots());
        let unaccounted: Vec<_> = reached.symmetric_difference(&self.live).collect();
        let none: Vec<&NodeLocation> = Vec::new();
        assert_eq!(unaccounted, none, "not both live and reached");
    }

    /// As after a crash: what was not committed is gone.
    fn reopen(&mut self) {
        let committed = &self.committed;
        let parent_root = committed.root_of(committed.parent);
        self.map = Map::open(committed.root, committed.blocks.len() as u64, parent_root);
        self.blocks = committed.blocks.clone();
        self.parent = committed.parent;
        self.live = walks::reached_nodes(&self.store, &committed.roots());
        self.pending.clear();
        self.covered = 0;
        self.frozen = None;
        self.done = None;
    }

    /// Commits all there is.
    fn settle(&mut self) {
        self.run(&Step::Finish);
        self.run(&Step::Begin);
        self.run(&Step::Finish);
    }

    /// What the removal of `root` frees beside `others` dies, as far as it has not died before.
    fn kill_exclusive(&mut self, root: Option<NodeLocation>, others: &[Option<NodeLocation>]) {
        for location in walks::check_exclusive(&self.store, root, others) {
            self.live.remove(&location);
        }
    }

    fn forget(&mut self, pick: usize) {
        self.settle();
        let snapshots = &self.committed.snapshots;
        if snapshots.is_empty() {
            return;
        }
        let at = pick % snapshots.len();
        let Snapshot {
            key, parent, root, ..
        } = snapshots[at].clone();
        let is_child = |s: &&Snapshot| s.parent == Some(key);
        let children: Vec<_> = snapshots.iter().filter(is_child).map(|s| s.root).collect();
        let of_head = self.committed.parent == Some(key);
        if children.len() + usize::from(of_head) > 1 {
            return;
        }
        let parent_root = self.committed.root_of(parent);
        if of_head {
            self.map.set_parent_root(parent_root);
            self.parent = parent;
            self.committed.parent = parent;
            // What the head replaces from here on dies, whether or not the removed one has it.
            self.run(&Step::Remove { block: 700, len: 1 });
        }
        self.run(&Step::Begin);
        let mut written = CheckpointProgress::More;
        while written == CheckpointProgress::More {
            let (progress, nodes) = self.store.write_step(&mut self.map, 30_000);
            self.live.extend(nodes);
            written = progress;
        }
        let CheckpointProgress::Done { root: head } = written else {
            unreachable!()
        };
        let mut others = vec![parent_root];
        others.extend(children);
        if of_head {
            others.push(head);
        }
        self.kill_exclusive(root, &others);
        self.committed.snapshots.remove(at);
        for snapshot in &mut self.committed.snapshots {
            if snapshot.parent == Some(key) {
                snapshot.parent = parent;
            }
        }
        self.commit(head);
    }

    fn rollback(&mut self, pick: usize) {
        self.settle();
        self.take_dead();
        if self.committed.snapshots.is_empty() {
            return;
        }
        let at = pick % self.committed.snapshots.len();
        let old = (
            self.committed.root,
            self.committed.root_of(self.committed.parent),
        );
        let to = self.committed.snapshots[at].clone();
        self.kill_exclusive(old.0, &[old.1]);
        self.committed.root = to.root;
        self.committed.blocks = to.blocks;
        self.committed.parent = Some(to.key);
        self.check_live();
        self.reopen();
    }

    fn run(&mut self, step: &Step) {
        let (map, store) = (&mut self.map, &mut self.store);
        match *step {
            Step::Insert { block, len, skip } => {
                let len = clip(block, len);
                let address = self.allocate(len, skip);
                let crcs: Vec<u32> = (0..len).map(|i| self.next_crc.wrapping_add(i)).collect();
                self.next_crc = self.next_crc.wrapping_mul(0x9e37_79b1).wrapping_add(len);
                let mut removed = Vec::new();
                for (i, crc) in crcs.iter().enumerate() {
                    let new = (address + i as u64, *crc);
                    removed.extend(self.blocks.insert(block + i as u64, new).map(|old| old.0));
                }
                let mut displaced = Vec::new();
                self.store.with(&mut self.map, |map| {
                    let result = map.insert(
                        BlockNumber(block),
                        Address::from_bits(address),
                        &crcs,
                        &mut displaced,
                    );
                    assert!(
                        result.is_ok() || displaced.is_empty(),
                        "an insert was not all or nothing"
                    );
                    result
                });
                self.check_displaced(&displaced, removed);
            }
            Step::Remove { block, len } => {
                let len = clip(block, len);
                let keys: Vec<u64> = self
                    .blocks
                    .range(block..block + u64::from(len))
                    .map(|(key, _)| *key)
                    .collect();
                let removed = keys
                    .iter()
                    .map(|key| self.blocks.remove(key).unwrap().0)
                    .collect();
                let mut displaced = Vec::new();
                store.with(map, |map| {
                    map.remove(BlockNumber(block), len, &mut displaced)
                });
                self.check_displaced(&displaced, removed);
            }
            Step::Lookup { block, len } => self.lookup(block, clip(block, len)),
            Step::NextMapped { block } => {
                for end in [block, block + 5000, MAX_BLOCKS] {
                    let got = store.with(map, |map| {
                        map.next_mapped(BlockNumber(block), BlockNumber(end))
                    });
                    let expected = self.blocks.range(block..end).next().map(|(key, _)| *key);
                    assert_eq!(got.map(|b| b.0), expected);
                }
            }
            Step::Begin if self.frozen.is_none() => {
                self.take_dead();
                self.map.begin_checkpoint();
                assert_eq!(self.map.checkpoint_roots(), []);
                self.covered = self.pending.len();
                self.frozen = Some(self.blocks.clone());
            }
            Step::Write { space } if self.frozen.is_some() => {
                let (progress, written) = store.write_step(map, space);
                if space >= MAX_NODE_BYTES && progress == CheckpointProgress::More {
                    assert!(!written.is_empty(), "no progress with space for any node");
                }
                self.live.extend(written);
                if let CheckpointProgress::Done { root } = progress {
                    self.done = Some(root);
                }
            }
            Step::Finish if self.frozen.is_some() => {
                let mut root = self.done.take();
                while root.is_none() {
                    let (progress, written) = self.store.write_step(&mut self.map, 30_000);
                    self.live.extend(written);
                    if let CheckpointProgress::Done { root: done } = progress {
                        root = Some(done);
                    }
                }
                self.commit(root.unwrap());
            }
            Step::Abort if self.frozen.is_some() => {
                map.abort_checkpoint();
                assert_eq!(map.checkpoint_roots(), []);
                self.covered = 0;
                self.frozen = None;
                self.done = None;
            }
            Step::Evict { keep_percent } => {
                let before = map.memory_bytes();
                let freed = map.evict(before * usize::from(keep_percent) / 100);
                assert_eq!(map.memory_bytes() + freed, before);
                assert!(map.memory_bytes() >= map.dirty_bytes());
            }
            Step::Reopen => self.reopen(),
            Step::Freeze if self.pending.len() < 8 => {
                let (memory, dirty) = (map.memory_bytes(), map.dirty_bytes());
                map.freeze(self.next_key);
                assert_eq!((map.memory_bytes(), map.dirty_bytes()), (memory, dirty));
                let parent = self.parent.replace(self.next_key);
                self.pending.push(Snapshot {
                    key: self.next_key,
                    parent,
                    root: None,
                    blocks: self.blocks.clone(),
                });
                self.next_key += 1;
                assert_eq!(map.pending_freezes(), self.pending.len());
            }
            Step::Forget { pick } => self.forget(pick),
            Step::Rollback { pick } => self.rollback(pick),
            Step::Compare { picks, block, len } => {
                let roots = self.committed.roots();
                let pick = |i: usize| roots[picks[i] % roots.len()];
                let end = block.saturating_add(len).min(MAX_BLOCKS);
                walks::check_difference(&self.store, pick(0), pick(1), block..end);
                let others: Vec<_> = (1..roots.len()).map(|i| pick(i % 4)).take(3).collect();
                walks::check_exclusive(&self.store, pick(0), &others);
            }
            Step::Relocate { pick } => {
                let mut all: Vec<_> = self.live.iter().copied().collect();
                all.sort();
                let Some(location) = all.get(pick % all.len().max(1)).copied() else {
                    return;
                };
                let bytes = &store.nodes[&location];
                let (level, first) = (
                    bytes[6],
                    u64::from_le_bytes(bytes[8..16].try_into().unwrap()),
                );
                let first = BlockNumber(first);
                if store.with(map, |map| map.relocate(level, first, location)) {
                    let again = store.with(map, |map| map.relocate(level, first, location));
                    assert!(!again, "a node was moved away from a place twice");
                }
            }
            Step::Begin | Step::Write { .. } | Step::Finish | Step::Abort | Step::Freeze => {}
        }
        assert_eq!(self.map.mapped_blocks(), self.blocks.len() as u64);
    }
}

fn config(cases: u32) -> Config {
    Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    }
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn map_agrees_with_a_table_through_checkpoints_and_evictions(
        steps in proptest::collection::vec(step(), 1..250)
    ) {
        let mut harness = Harness::new();
        for step in &steps {
            harness.run(step);
        }
        harness.settle();
        harness.map.evict(0);
        prop_assert_eq!(harness.map.memory_bytes(), 0, "all nodes of a clean map can go");
        harness.run(&Step::Reopen);
        harness.lookup(0, 4096);
        harness.lookup((1 << 26) - 3000, 6000);
        harness.lookup(MAX_BLOCKS - 4000, 4000);
    }
}

/// Longer than what shrinks well; the seed repeats it: `MAP_SEED=… cargo test long_runs`.
#[test]
fn map_agrees_with_a_table_in_long_runs() {
    let seeds = match std::env::var("MAP_SEED") {
        Ok(seed) => vec![seed.parse().expect("MAP_SEED is a number")],
        Err(_) => {
            let clock = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
            vec![1, 2, clock]
        }
    };
    for seed in seeds {
        println!("seed {seed}");
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&u64::to_le_bytes(seed));
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let mut harness = Harness::new();
        for _ in 0..600 {
            let step = step().new_tree(&mut runner).unwrap().current();
            harness.run(&step);
        }
        harness.settle();
        harness.map.evict(0);
        assert_eq!(harness.map.memory_bytes(), 0, "seed {seed}");
    }
}

fn map_with(blocks: &[u64]) -> (Map, Store) {
    let mut map = Map::empty();
    for &block in blocks {
        let address = Address::new(SegmentNumber(1 + block / 8000), 1 + (block % 8000) as u32);
        map.insert(BlockNumber(block), address, &[7], &mut Vec::new())
            .unwrap();
    }
    (map, Store::default())
}

fn commit(map: &mut Map, store: &mut Store) -> Option<NodeLocation> {
    map.begin_checkpoint();
    let (progress, _) = store.write_step(map, u32::MAX >> 1);
    map.finish_checkpoint();
    let CheckpointProgress::Done { root } = progress else {
        panic!("space for all was given")
    };
    root
}

#[test]
fn a_map_that_was_emptied_has_no_root_and_takes_no_memory() {
    let (mut map, mut store) = map_with(&[5, 1 << 20, 1 << 30]);
    let mut displaced = Vec::new();
    for block in [5, 1 << 20, 1 << 30] {
        map.remove(BlockNumber(block), 1, &mut displaced).unwrap();
    }
    assert_eq!(displaced.len(), 3);
    assert_eq!((map.memory_bytes(), map.dirty_bytes()), (0, 0));
    assert_eq!(commit(&mut map, &mut store), None);
}

#[test]
fn a_checkpoint_of_an_unchanged_map_writes_nothing() {
    let (mut map, mut store) = map_with(&[5, 1 << 20]);
    let root = commit(&mut map, &mut store);
    assert!(root.is_some());
    // Neither a read nor the removal of what is not there changes anything.
    map.remove(BlockNumber(6), 1000, &mut Vec::new()).unwrap();
    map.lookup(BlockNumber(0), 1 << 21, &mut Extents::default())
        .unwrap();
    let nodes = store.nodes.len();
    assert_eq!(map.dirty_bytes(), 0);
    assert_eq!(commit(&mut map, &mut store), root);
    assert_eq!(store.nodes.len(), nodes);
}

#[test]
fn nodes_of_an_unfinished_checkpoint_stay_in_memory() {
    let (mut map, mut store) = map_with(&[5, 1 << 20]);
    map.begin_checkpoint();
    store.write_step(&mut map, u32::MAX >> 1);
    assert_eq!(map.dirty_bytes(), 0);
    assert_eq!(map.evict(0), 0);
    map.finish_checkpoint();
    assert!(map.evict(0) > 0);
    assert_eq!(map.memory_bytes(), 0);
}

#[test]
fn a_resident_range_asks_for_nothing() {
    let (mut map, mut store) = map_with(&[1000, 1030, 5000]);
    commit(&mut map, &mut store);
    map.evict(0);
    store.with(&mut map, |map| map.ensure_resident(BlockNumber(1000), 5000));
    let at = Address::new(SegmentNumber(9), 1);
    map.insert(BlockNumber(1000), at, &[1; 3000], &mut Vec::new())
        .unwrap();
    map.remove(BlockNumber(900), 5000, &mut Vec::new()).unwrap();
    assert_eq!(map.mapped_blocks(), 0);
}

#[test]
#[should_panic(expected = "not data of one segment")]
fn an_insert_across_segments_is_refused() {
    let at = Address::new(SegmentNumber(1), 8191);
    let _ = Map::empty().insert(BlockNumber(0), at, &[1, 2], &mut Vec::new());
}

#[test]
fn a_freeze_touches_no_node() {
    let (mut map, mut store) = map_with(&[5, 1 << 20, 1 << 30]);
    let root = commit(&mut map, &mut store);
    map.evict(0);
    let nodes = store.nodes.len();
    for key in 0..64 {
        map.freeze(key);
    }
    // No node is in memory, none is asked for, and none has to be written.
    assert_eq!((map.memory_bytes(), map.pending_freezes()), (0, 64));
    map.begin_checkpoint();
    assert_eq!(
        map.write_nodes(SegmentNumber(9), 0, 0, &mut Vec::new()),
        CheckpointProgress::Done { root }
    );
    assert_eq!(map.checkpoint_roots().len(), 65);
    assert!(map.checkpoint_roots().iter().all(|tree| tree.root == root));
    map.finish_checkpoint();
    assert_eq!((map.pending_freezes(), store.nodes.len()), (0, nodes));
}

#[test]
fn trees_that_share_a_node_have_it_written_once() {
    let (mut map, mut store) = map_with(&[5, 1 << 20, 1 << 30]);
    for key in 0..64 {
        map.freeze(key);
        let address = Address::new(SegmentNumber(7), 1 + key as u32);
        map.insert(BlockNumber(6), address, &[1], &mut Vec::new())
            .unwrap();
    }
    map.begin_checkpoint();
    let (_, written) = store.write_step(&mut map, u32::MAX >> 1);
    // All of the first tree; then, in each of the others, one path.
    let (_, first) = store.read_tree(map.checkpoint_roots()[0].root);
    assert_eq!(written.len(), first.len() + 64 * 4);
    map.finish_checkpoint();
    let mut dead = Vec::new();
    map.take_dead_nodes(&mut dead);
    assert_eq!(dead, []);
}

#[test]
fn what_a_snapshot_has_does_not_die_and_does_not_move() {
    let (mut map, mut store) = map_with(&[5]);
    let root = commit(&mut map, &mut store).unwrap();
    let head = |map: &mut Map| map.relocate(3, BlockNumber(0), root).unwrap();
    map.freeze(0);
    assert!(!head(&mut map), "held while the snapshot is pending");
    commit(&mut map, &mut store);
    assert!(!head(&mut map), "held by the snapshot on disk");
    map.set_parent_root(None);
    assert!(head(&mut map), "free to move when the snapshot goes");
    let mut dead = Vec::new();
    map.take_dead_nodes(&mut dead);
    assert_eq!(dead, [root]);
}
