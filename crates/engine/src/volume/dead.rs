//! Dead sets: which blocks of a log segment, or which bytes of a map segment, no root reaches any more.
//!
//! They make marking dead idempotent. What is reported twice (by a removal of a snapshot that a crash
//! interrupted, or by a replay of the log) counts once, so that counts of what is live stay exact
//! without reference counts.
//!
//! Invariants:
//! - What is dead stays dead: sets only grow.
//! - The cached counts are those of the set.
//! - Ranges of nodes ascend and never touch.
//!
//! Sets are shared between the table that changes them and checkpoints that hold them as they were:
//! a clone costs a reference count, and the first change after it a copy. A bitmap takes at most 1 KiB
//! for a segment of 32 MiB (0.003 %), nothing as long as nothing is dead. Ranges take 8 bytes each, and
//! nodes are at least 56 bytes long; in practice those of a segment are few, as what died together
//! merges.
//!
//! Plain data, no I/O; owned by one volume.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::segment::SegmentKind;
use crate::types::{ADDRESS_BLOCK_BITS, BLOCK_BYTES, MAX_SEGMENT_BYTES};

/// Blocks of the largest segment.
const MAX_BLOCKS: u32 = 1 << ADDRESS_BLOCK_BITS;
/// Bits of a word of the bitmap.
const WORD_BITS: u32 = u64::BITS;
/// Nodes lie at multiples of this.
const NODE_ALIGN_BYTES: u32 = 8;
const BLOCK: u32 = BLOCK_BYTES as u32;

/// Why stored bytes are no dead set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the set of what is dead in a segment is damaged: {0}")]
pub struct DeadSetError(pub &'static str);

/// What is dead in one segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeadSet {
    /// Blocks of a log segment.
    Blocks(Arc<Bitmap>),
    /// Bytes of a map segment.
    Nodes(Arc<Ranges>),
}

/// One bit a block of the segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap {
    /// As long as it has to be: the last word is not 0.
    words: Vec<u64>,
    count: u32,
}

/// Ranges of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// Start to end.
    ranges: BTreeMap<u32, u32>,
    bytes: u32,
    /// Blocks that lie in the ranges whole.
    whole_blocks: u32,
}

impl DeadSet {
    /// Nothing is dead.
    #[must_use]
    pub fn new(kind: SegmentKind) -> Self {
        match kind {
            SegmentKind::Log => Self::Blocks(Arc::default()),
            SegmentKind::Map => Self::Nodes(Arc::default()),
        }
    }

    /// Reads what [`Self::encode`] gave (docs/format.md, "Catalog").
    ///
    /// # Errors
    /// [`DeadSetError`] if it is none of a segment of this kind.
    pub fn decode(kind: SegmentKind, bytes: &[u8]) -> Result<Self, DeadSetError> {
        match kind {
            SegmentKind::Log => Bitmap::decode(bytes).map(|set| Self::Blocks(Arc::new(set))),
            SegmentKind::Map => Ranges::decode(bytes).map(|set| Self::Nodes(Arc::new(set))),
        }
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Blocks(set) => set.encode(),
            Self::Nodes(set) => set.encode(),
        }
    }

    /// Marks blocks of a log segment; returns how many were not dead before. Those outside of any
    /// segment are left out.
    pub fn mark_blocks(&mut self, first: u32, count: u32) -> u32 {
        match self {
            Self::Blocks(set) if !set.contains_all(first, count) => {
                Arc::make_mut(set).mark(first, count)
            }
            _ => 0,
        }
    }

    /// Marks a node of a map segment; returns how many of its bytes were not dead before.
    pub fn mark_node(&mut self, offset_bytes: u32, len_bytes: u32) -> u32 {
        match self {
            Self::Nodes(set) if !set.contains_all(offset_bytes, len_bytes) => {
                Arc::make_mut(set).mark(offset_bytes, len_bytes)
            }
            _ => 0,
        }
    }

    /// Dead blocks, or bytes of nodes.
    #[must_use]
    pub fn count(&self) -> u32 {
        match self {
            Self::Blocks(set) => set.count,
            Self::Nodes(set) => set.bytes,
        }
    }

    /// Blocks whose space can be given back: those that are dead whole.
    #[must_use]
    pub fn whole_blocks(&self) -> u32 {
        match self {
            Self::Blocks(set) => set.count,
            Self::Nodes(set) => set.whole_blocks,
        }
    }

    /// End of the dead range of nodes that has this byte, if there is one.
    #[must_use]
    pub fn range_end(&self, byte: u32) -> Option<u32> {
        match self {
            Self::Blocks(_) => None,
            Self::Nodes(set) => set.range_at(byte).map(|(_, end)| end),
        }
    }

    /// Runs of blocks that are dead whole, as first block and count, ascending.
    #[must_use]
    pub fn block_runs(&self) -> Vec<(u32, u32)> {
        match self {
            Self::Blocks(set) => runs_of(&set.words),
            Self::Nodes(set) => set
                .ranges
                .iter()
                .map(|(&start, &end)| whole_blocks_of(start, end))
                .filter(|(_, count)| *count > 0)
                .collect(),
        }
    }

    /// Runs of blocks that are dead whole here and not in `other`, ascending.
    #[must_use]
    pub fn block_runs_without(&self, other: &Bitmap) -> Vec<(u32, u32)> {
        let mut words = match self {
            Self::Blocks(set) => set.words.clone(),
            Self::Nodes(_) => {
                let mut blocks = Bitmap::default();
                for (first, count) in self.block_runs() {
                    blocks.mark(first, count);
                }
                blocks.words
            }
        };
        for (word, without) in words.iter_mut().zip(&other.words) {
            *word &= !without;
        }
        runs_of(&words)
    }
}

impl Bitmap {
    /// Sets the bits; returns how many were not set.
    pub fn mark(&mut self, first: u32, count: u32) -> u32 {
        let end = first.saturating_add(count).min(MAX_BLOCKS);
        if first >= end {
            return 0;
        }
        let words = end.div_ceil(WORD_BITS) as usize;
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        let mut new = 0;
        for (at, mask) in masks(first, end) {
            let word = &mut self.words[at];
            new += (mask & !*word).count_ones();
            *word |= mask;
        }
        self.count += new;
        new
    }

    #[must_use]
    pub const fn count(&self) -> u32 {
        self.count
    }

    fn contains_all(&self, first: u32, count: u32) -> bool {
        let end = first.saturating_add(count).min(MAX_BLOCKS);
        masks(first, end).all(|(at, mask)| self.words.get(at).is_some_and(|w| w & mask == mask))
    }

    fn decode(bytes: &[u8]) -> Result<Self, DeadSetError> {
        if bytes.len() > (MAX_BLOCKS / 8) as usize {
            return Err(DeadSetError("it is longer than any segment"));
        }
        if bytes.first().is_some_and(|byte| byte & 1 != 0) {
            return Err(DeadSetError("it has the segment's header"));
        }
        let mut words: Vec<u64> = bytes
            .chunks(8)
            .map(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_le_bytes(word)
            })
            .collect();
        while words.last() == Some(&0) {
            words.pop();
        }
        let count = words.iter().map(|word| word.count_ones()).sum();
        Ok(Self { words, count })
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let len = bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |at| at + 1);
        bytes.truncate(len);
        bytes
    }
}

/// The words of bits `first..end`, and which bits of each.
fn masks(first: u32, end: u32) -> impl Iterator<Item = (usize, u64)> {
    let mut at = first;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (word, bit) = (at / WORD_BITS, at % WORD_BITS);
        let bits = (end - at).min(WORD_BITS - bit);
        at += bits;
        Some((word as usize, (u64::MAX >> (WORD_BITS - bits)) << bit))
    })
}

/// Runs of bits that are set, as first bit and count.
fn runs_of(words: &[u64]) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for (at, &word) in words.iter().enumerate() {
        let base = at as u32 * WORD_BITS;
        let mut rest = word;
        while rest != 0 {
            let bit = rest.trailing_zeros();
            let count = (!(rest >> bit)).trailing_zeros();
            rest &= !((u64::MAX >> (WORD_BITS - count)) << bit);
            match runs.last_mut() {
                Some((first, run)) if *first + *run == base + bit => *run += count,
                _ => runs.push((base + bit, count)),
            }
        }
    }
    runs
}

impl Ranges {
    fn range_at(&self, byte: u32) -> Option<(u32, u32)> {
        let (&start, &end) = self.ranges.range(..=byte).next_back()?;
        (byte < end).then_some((start, end))
    }

    fn contains_all(&self, start: u32, len: u32) -> bool {
        len == 0
            || self
                .range_at(start)
                .is_some_and(|(_, end)| u64::from(start) + u64::from(len) <= u64::from(end))
    }

    /// Adds a range; returns how many of its bytes were not in the set.
    fn mark(&mut self, start: u32, len: u32) -> u32 {
        let end = start.saturating_add(len).min(MAX_SEGMENT_BYTES as u32);
        if start >= end {
            return 0;
        }
        let (mut from, mut to, before) = (start, end, self.bytes);
        // Those that overlap or touch, last one first.
        while let Some((&s, &e)) = self.ranges.range(..=to).next_back() {
            if e < from {
                break;
            }
            self.ranges.remove(&s);
            self.bytes -= e - s;
            self.whole_blocks -= whole_blocks_of(s, e).1;
            (from, to) = (from.min(s), to.max(e));
        }
        self.ranges.insert(from, to);
        self.bytes += to - from;
        self.whole_blocks += whole_blocks_of(from, to).1;
        self.bytes - before
    }

    fn decode(bytes: &[u8]) -> Result<Self, DeadSetError> {
        if !bytes.len().is_multiple_of(8) {
            return Err(DeadSetError("its length is no multiple of 8 bytes"));
        }
        let mut set = Self::default();
        let mut least = BLOCK;
        for chunk in bytes.chunks_exact(8) {
            let half = |at: usize| {
                u32::from_le_bytes([chunk[at], chunk[at + 1], chunk[at + 2], chunk[at + 3]])
            };
            let (start, len) = (half(0), half(4));
            if len == 0 || !(start | len).is_multiple_of(NODE_ALIGN_BYTES) {
                return Err(DeadSetError("a range of it is no node's"));
            }
            if start < least {
                return Err(DeadSetError("its ranges do not ascend"));
            }
            let end = u64::from(start) + u64::from(len);
            if end > MAX_SEGMENT_BYTES {
                return Err(DeadSetError("a range of it lies outside of any segment"));
            }
            set.mark(start, len);
            // They do not touch either.
            least = end as u32 + NODE_ALIGN_BYTES;
        }
        Ok(set)
    }

    fn encode(&self) -> Vec<u8> {
        self.ranges
            .iter()
            .flat_map(|(start, end)| [*start, end - start])
            .flat_map(u32::to_le_bytes)
            .collect()
    }
}

/// Blocks that lie whole in a range of bytes: the first one, and how many.
const fn whole_blocks_of(start: u32, end: u32) -> (u32, u32) {
    let first = start.div_ceil(BLOCK);
    (first, (end / BLOCK).saturating_sub(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn runs_of_model(model: &BTreeSet<u32>) -> Vec<(u32, u32)> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for &bit in model {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == bit => *count += 1,
                _ => runs.push((bit, 1)),
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn blocks_are_what_a_model_has(
            marks in prop::collection::vec((1..MAX_BLOCKS, 1..300u32), 0..60),
            others in prop::collection::vec((1..MAX_BLOCKS, 1..300u32), 0..20),
        ) {
            let mut set = DeadSet::new(SegmentKind::Log);
            let mut model = BTreeSet::new();
            for (first, count) in marks {
                let new = (first..(first + count).min(MAX_BLOCKS))
                    .filter(|bit| model.insert(*bit))
                    .count();
                prop_assert_eq!(set.mark_blocks(first, count) as usize, new);
                prop_assert_eq!(set.mark_blocks(first, count), 0);
            }
            prop_assert_eq!(set.count() as usize, model.len());
            prop_assert_eq!(set.block_runs(), runs_of_model(&model));
            let bytes = set.encode();
            prop_assert_ne!(bytes.last(), Some(&0));
            for bit in 0..MAX_BLOCKS {
                let stored = bytes.get(bit as usize / 8).is_some_and(|b| b >> (bit % 8) & 1 == 1);
                prop_assert_eq!(stored, model.contains(&bit));
            }
            prop_assert_eq!(&DeadSet::decode(SegmentKind::Log, &bytes), &Ok(set.clone()));
            let mut other = Bitmap::default();
            for (first, count) in others {
                other.mark(first, count);
                model.retain(|bit| !(first..first + count).contains(bit));
            }
            prop_assert_eq!(set.block_runs_without(&other), runs_of_model(&model));
        }

        #[test]
        fn nodes_are_what_a_model_has(
            marks in prop::collection::vec((512..8192u32, 7..1541u32), 0..60),
        ) {
            let mut set = DeadSet::new(SegmentKind::Map);
            let mut model = BTreeSet::new();
            for (at, units) in marks {
                let new = (at..at + units).filter(|unit| model.insert(*unit)).count();
                prop_assert_eq!(set.mark_node(at * 8, units * 8) as usize, new * 8);
                prop_assert_eq!(set.mark_node(at * 8, units * 8), 0);
            }
            prop_assert_eq!(set.count() as usize, model.len() * 8);
            let whole: BTreeSet<u32> = (0..MAX_BLOCKS)
                .filter(|block| (block * 512..(block + 1) * 512).all(|unit| model.contains(&unit)))
                .collect();
            prop_assert_eq!(set.whole_blocks() as usize, whole.len());
            prop_assert_eq!(set.block_runs(), runs_of_model(&whole));
            prop_assert_eq!(set.block_runs_without(&Bitmap::default()), runs_of_model(&whole));
            let ranges: Vec<u8> = runs_of_model(&model)
                .into_iter()
                .flat_map(|(at, units)| [at * 8, units * 8])
                .flat_map(u32::to_le_bytes)
                .collect();
            prop_assert_eq!(&set.encode(), &ranges);
            prop_assert_eq!(DeadSet::decode(SegmentKind::Map, &ranges), Ok(set));
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..1100)) {
            for kind in [SegmentKind::Log, SegmentKind::Map] {
                if let Ok(set) = DeadSet::decode(kind, &bytes) {
                    prop_assert_eq!(DeadSet::decode(kind, &set.encode()), Ok(set));
                }
            }
        }
    }

    #[test]
    fn damaged_sets_are_refused() {
        let refused = |kind, bytes: &[u8]| DeadSet::decode(kind, bytes).unwrap_err();
        refused(SegmentKind::Log, &[0xff; 1025]);
        refused(SegmentKind::Log, &[1]);
        let ranges = |list: &[u32]| {
            let bytes: Vec<u8> = list.iter().flat_map(|n| n.to_le_bytes()).collect();
            refused(SegmentKind::Map, &bytes)
        };
        ranges(&[4096]);
        ranges(&[4096, 0]);
        ranges(&[4096, 57]);
        ranges(&[0, 64]);
        ranges(&[8192, 64, 4096, 64]);
        ranges(&[4096, 64, 4096 + 64, 64]);
        ranges(&[u32::MAX - 7, 64]);
    }

    #[test]
    fn a_set_that_a_checkpoint_holds_stays_as_it_was() {
        let mut set = DeadSet::new(SegmentKind::Log);
        set.mark_blocks(5, 2);
        let held = set.clone();
        set.mark_blocks(9, 1);
        assert_eq!(held.block_runs(), [(5, 2)]);
        assert_eq!(set.block_runs(), [(5, 2), (9, 1)]);
    }

    #[test]
    fn marks_outside_of_any_segment_are_left_out() {
        let mut set = DeadSet::new(SegmentKind::Log);
        assert_eq!(set.mark_blocks(MAX_BLOCKS - 1, u32::MAX), 1);
        assert_eq!(set.mark_blocks(MAX_BLOCKS, 1), 0);
        let mut set = DeadSet::new(SegmentKind::Map);
        assert_eq!(set.mark_node(MAX_SEGMENT_BYTES as u32 - 64, u32::MAX), 64);
    }
}
