//! Walks over trees on disk, by their roots: what differs, what only one of them reaches, what any
//! of them reaches. They use no [`super::Map`], so that they run beside one, on any thread.
//!
//! Nodes are got from a [`NodeSource`], verified, and dropped when the walk leaves them: a walk
//! has at most three nodes for each root in memory. All walks go down the trees together, place by
//! place: nodes at different places are never the same, so that each node is read once, and a
//! subtree that is the same node is not entered at all. The height is fixed: a damaged tree cannot
//! make a walk endless.
//!
//! A visitor ends a walk by [`ControlFlow::Break`]. A node that cannot be had ends it with an
//! error, which says which blocks are not known for that.

use std::collections::BTreeSet;
use std::ops::{ControlFlow, Range};

use super::inner::Inner;
use super::leaf::Leaf;
use super::slab::Body;
use super::{
    Displaced, LEAF_BLOCKS, MAX_BLOCKS, NodeError, NodeLocation, ROOT_LEVEL, child_of, node,
    push_displaced, span_blocks,
};
use crate::types::{Address, BlockNumber};

/// Where nodes come from. A closure is one.
pub trait NodeSource {
    type Error;
    /// The bytes at a location, all of them; they are verified by the walk.
    fn node(&mut self, location: NodeLocation) -> Result<Vec<u8>, Self::Error>;
}

impl<E, F: FnMut(NodeLocation) -> Result<Vec<u8>, E>> NodeSource for F {
    type Error = E;
    fn node(&mut self, location: NodeLocation) -> Result<Vec<u8>, E> {
        self(location)
    }
}

/// A node that a walk could not go through.
#[derive(Debug, thiserror::Error)]
#[error(
    "map node of blocks {first_block} to {} in segment {} at byte {}: {cause}",
    .first_block.0 + .count - 1, .location.segment, .location.offset_bytes
)]
pub struct WalkError<E> {
    pub location: NodeLocation,
    pub level: u8,
    /// The blocks that the node is for.
    pub first_block: BlockNumber,
    pub count: u64,
    pub cause: WalkErrorCause<E>,
}

#[derive(Debug, thiserror::Error)]
pub enum WalkErrorCause<E> {
    /// It could not be read.
    #[error("{0}")]
    Read(E),
    /// What was read is not the node.
    #[error("{0}")]
    Damaged(NodeError),
}

/// What a root reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    Node(NodeLocation),
    /// Data blocks at consecutive addresses.
    Blocks(Displaced),
    /// A node of its own that cannot be had: the walk goes on beside it. Only [`exclusive`] tells it.
    Lost(NodeLocation),
}

/// Whether the walk came to its end or its visitor ended it.
pub type WalkResult<E> = Result<ControlFlow<()>, WalkError<E>>;

/// Returns from a walk that its visitor ended.
macro_rules! go_on {
    ($flow:expr) => {
        if $flow.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    };
}

fn load<S: NodeSource>(
    source: &mut S,
    location: NodeLocation,
    level: u8,
    first: u64,
) -> Result<Body, WalkError<S::Error>> {
    let failed = |cause| WalkError {
        location,
        level,
        first_block: BlockNumber(first),
        count: span_blocks(level),
        cause,
    };
    let bytes = source
        .node(location)
        .map_err(|error| failed(WalkErrorCause::Read(error)))?;
    node::get_node(&location, level, first, &bytes)
        .map_err(|what| failed(WalkErrorCause::Damaged(NodeError(what))))
}

fn load_inner<S: NodeSource>(
    source: &mut S,
    location: NodeLocation,
    level: u8,
    first: u64,
) -> Result<Box<Inner>, WalkError<S::Error>> {
    match load(source, location, level, first)? {
        Body::Inner(inner) => Ok(inner),
        _ => unreachable!("a verified node of level {level} is an inner node"),
    }
}

fn load_leaf<S: NodeSource>(
    source: &mut S,
    location: NodeLocation,
    first: u64,
) -> Result<Leaf, WalkError<S::Error>> {
    match load(source, location, 0, first)? {
        Body::Leaf(leaf) => Ok(leaf),
        _ => unreachable!("a verified node of level 0 is a leaf"),
    }
}

/// The children of an inner node with their numbers, ascending.
fn children(inner: &Inner) -> impl Iterator<Item = (usize, NodeLocation)> {
    let mut child = 0;
    inner.slots().iter().map(move |slot| {
        let this = inner.next_child(child).expect("as many bits as slots");
        child = this + 1;
        let location = slot.location().expect("a node on disk has only such");
        (this, location)
    })
}

fn child_location(inner: &Inner, child: usize) -> Option<NodeLocation> {
    inner.slots()[inner.find(child)?].location()
}

/// The address of each block of a leaf; 0 where nothing is mapped, which no data has.
type Addresses = Box<[u64; LEAF_BLOCKS as usize]>;

fn addresses(leaf: &Leaf) -> Addresses {
    let mut addresses = Box::new([0; LEAF_BLOCKS as usize]);
    leaf.pieces(0, LEAF_BLOCKS as u32, |piece| {
        for (i, place) in addresses[piece.start as usize..][..piece.crcs.len()]
            .iter_mut()
            .enumerate()
        {
            *place = piece.address + i as u64;
        }
    });
    addresses
}

/// Calls `visit` for the blocks of `range` whose address is not the same under both roots, in
/// ascending ranges of block, count and whether `new` maps them. Ranges of one kind that touch
/// are one. Costs what differs: reads the nodes that are not the same.
pub fn difference<S: NodeSource>(
    source: &mut S,
    old: Option<NodeLocation>,
    new: Option<NodeLocation>,
    range: Range<BlockNumber>,
    visit: impl FnMut(BlockNumber, u64, bool) -> ControlFlow<()>,
) -> WalkResult<S::Error> {
    let mut walk = Difference {
        source,
        range: range.start.0..range.end.0.min(MAX_BLOCKS),
        open: None,
        visit,
    };
    go_on!(walk.place(old, new, ROOT_LEVEL, 0)?);
    Ok(walk.close())
}

struct Difference<'a, S, V> {
    source: &'a mut S,
    range: Range<u64>,
    /// The range that the next blocks may belong to: block, count, mapped.
    open: Option<(u64, u64, bool)>,
    visit: V,
}

impl<S: NodeSource, V: FnMut(BlockNumber, u64, bool) -> ControlFlow<()>> Difference<'_, S, V> {
    fn place(
        &mut self,
        old: Option<NodeLocation>,
        new: Option<NodeLocation>,
        level: u8,
        first: u64,
    ) -> WalkResult<S::Error> {
        let range = self.range.start.max(first)..self.range.end.min(first + span_blocks(level));
        if old == new || range.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        if level == 0 {
            return self.leaf(old, new, first, range);
        }
        let mut load = |location: Option<NodeLocation>| {
            location
                .map(|location| load_inner(self.source, location, level, first))
                .transpose()
        };
        let (old, new) = (load(old)?, load(new)?);
        let span = span_blocks(level - 1);
        for child in child_of(range.start, level)..=child_of(range.end - 1, level) {
            let at = |inner: &Option<Box<Inner>>| child_location(inner.as_ref()?, child);
            go_on!(self.place(at(&old), at(&new), level - 1, first + child as u64 * span)?);
        }
        Ok(ControlFlow::Continue(()))
    }

    fn leaf(
        &mut self,
        old: Option<NodeLocation>,
        new: Option<NodeLocation>,
        first: u64,
        range: Range<u64>,
    ) -> WalkResult<S::Error> {
        let mut load = |location: Option<NodeLocation>| match location {
            Some(location) => Ok(addresses(&load_leaf(self.source, location, first)?)),
            None => Ok(Box::new([0; LEAF_BLOCKS as usize])),
        };
        let (old, new) = (load(old)?, load(new)?);
        for block in range {
            let i = (block - first) as usize;
            if old[i] != new[i] {
                go_on!(self.push(block, new[i] != 0));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn push(&mut self, block: u64, mapped: bool) -> ControlFlow<()> {
        match &mut self.open {
            Some((start, count, kind)) if *start + *count == block && *kind == mapped => {
                *count += 1;
                ControlFlow::Continue(())
            }
            _ => {
                let flow = self.close();
                self.open = Some((block, 1, mapped));
                flow
            }
        }
    }

    fn close(&mut self) -> ControlFlow<()> {
        match self.open.take() {
            Some((block, count, mapped)) => (self.visit)(BlockNumber(block), count, mapped),
            None => ControlFlow::Continue(()),
        }
    }
}

/// Calls `visit` for every node, and every data block, that `root` reaches and none of `others`
/// does: what dies with a root if these are all others.
///
/// A node of `root` that is gone is told, and what only it led to is not: a removed snapshot's nodes that
/// its head shared and replaced since may be gone, and what the head replaced with them is dead already.
/// A node of the others that cannot be had is an error.
///
/// Costs what differs from the nearest of the others if that one comes first: the next is looked
/// at only where all before differ.
pub fn exclusive<S: NodeSource>(
    source: &mut S,
    root: Option<NodeLocation>,
    others: &[Option<NodeLocation>],
    visit: impl FnMut(Reached) -> ControlFlow<()>,
) -> WalkResult<S::Error> {
    let others: Vec<_> = others.iter().copied().flatten().collect();
    match root {
        Some(root) => Exclusive { source, visit }.place(root, &others, ROOT_LEVEL, 0),
        None => Ok(ControlFlow::Continue(())),
    }
}

struct Exclusive<'a, S, V> {
    source: &'a mut S,
    visit: V,
}

impl<S: NodeSource, V: FnMut(Reached) -> ControlFlow<()>> Exclusive<'_, S, V> {
    /// `others` are the nodes of the others at this place.
    fn place(
        &mut self,
        own: NodeLocation,
        others: &[NodeLocation],
        level: u8,
        first: u64,
    ) -> WalkResult<S::Error> {
        if others.contains(&own) {
            return Ok(ControlFlow::Continue(()));
        }
        go_on!((self.visit)(Reached::Node(own)));
        let Ok(body) = load(self.source, own, level, first) else {
            return Ok((self.visit)(Reached::Lost(own)));
        };
        let own = match body {
            Body::Inner(own) => own,
            Body::Leaf(own) => return self.leaf(&own, others, first),
            Body::Free => unreachable!("a verified node of level {level} is one"),
        };
        let mut left: Vec<_> = children(&own).collect();
        let mut seen: Vec<Box<Inner>> = Vec::new();
        for (i, &other) in others.iter().enumerate() {
            if left.is_empty() {
                break;
            }
            if !others[..i].contains(&other) {
                let other = load_inner(self.source, other, level, first)?;
                left.retain(|&(child, location)| child_location(&other, child) != Some(location));
                seen.push(other);
            }
        }
        drop(own);
        for (child, location) in left {
            let mut others: Vec<NodeLocation> = Vec::new();
            for other in seen.iter().filter_map(|other| child_location(other, child)) {
                if !others.contains(&other) {
                    others.push(other);
                }
            }
            let first = first + child as u64 * span_blocks(level - 1);
            go_on!(self.place(location, &others, level - 1, first)?);
        }
        Ok(ControlFlow::Continue(()))
    }

    fn leaf(&mut self, own: &Leaf, others: &[NodeLocation], first: u64) -> WalkResult<S::Error> {
        let mut own = addresses(own);
        for &other in others {
            if own.iter().all(|&address| address == 0) {
                break;
            }
            let other = addresses(&load_leaf(self.source, other, first)?);
            for (own, other) in own.iter_mut().zip(other.iter()) {
                if own == other {
                    *own = 0;
                }
            }
        }
        let mut extents = Vec::new();
        for &address in own.iter().filter(|&&address| address != 0) {
            push_displaced(&mut extents, address, 1);
        }
        for extent in extents {
            go_on!((self.visit)(Reached::Blocks(extent)));
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// Calls `visit` for every node that any of the roots reaches, once, and for every data block, as
/// often as leaves map it.
pub fn mark<S: NodeSource>(
    source: &mut S,
    roots: &[Option<NodeLocation>],
    visit: impl FnMut(Reached) -> ControlFlow<()>,
) -> WalkResult<S::Error> {
    let roots: BTreeSet<_> = roots.iter().copied().flatten().collect();
    let mut walk = Mark { source, visit };
    for root in roots.iter().copied() {
        go_on!((walk.visit)(Reached::Node(root)));
    }
    walk.place(&Vec::from_iter(roots), ROOT_LEVEL, 0)
}

struct Mark<'a, S, V> {
    source: &'a mut S,
    visit: V,
}

impl<S: NodeSource, V: FnMut(Reached) -> ControlFlow<()>> Mark<'_, S, V> {
    /// `nodes` are all at this place, each once, and have been visited.
    fn place(&mut self, nodes: &[NodeLocation], level: u8, first: u64) -> WalkResult<S::Error> {
        if level == 0 {
            for &location in nodes {
                let leaf = load_leaf(self.source, location, first)?;
                let mut flow = ControlFlow::Continue(());
                leaf.pieces(0, LEAF_BLOCKS as u32, |piece| {
                    if flow.is_continue() {
                        let address = Address::from_bits(piece.address);
                        let count = piece.len();
                        flow = (self.visit)(Reached::Blocks(Displaced { address, count }));
                    }
                });
                go_on!(flow);
            }
            return Ok(ControlFlow::Continue(()));
        }
        let mut below: BTreeSet<(usize, NodeLocation)> = BTreeSet::new();
        for &location in nodes {
            let inner = load_inner(self.source, location, level, first)?;
            for (child, location) in children(&inner) {
                if below.insert((child, location)) {
                    go_on!((self.visit)(Reached::Node(location)));
                }
            }
        }
        let below = Vec::from_iter(below);
        for group in below.chunk_by(|a, b| a.0 == b.0) {
            let first = first + group[0].0 as u64 * span_blocks(level - 1);
            let nodes: Vec<_> = group.iter().map(|&(_, location)| location).collect();
            go_on!(self.place(&nodes, level - 1, first)?);
        }
        Ok(ControlFlow::Continue(()))
    }
}
