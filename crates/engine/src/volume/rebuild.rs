//! Making a volume's maps again from its log segments, when catalog or maps are lost.
//!
//! The log is replayed whole, in the order of positions: data and unmaps of its segments, unmaps that
//! were repeated for segments that are gone, snapshots (the tree as it is there is written out and its
//! root kept) and rollbacks (the tree goes on from the root that was kept at the place it goes back to).
//! Then the trees of all roots are walked, which tells what of every segment is live; the rest of its
//! data is dead.
//!
//! Invariants:
//! - Log segments are only read. Map segments of before are neither read nor removed.
//! - What the result names is durable: map segments are synced before it is returned. Until the caller
//!   commits it, nothing refers to them, and a crash leaves files that the next opening removes.
//! - Data is not verified, but in the log's unsealed tail: a block that is damaged stays mapped, and
//!   reading it fails. Nothing is dropped that the log still says.
//!
//! Runs on the caller's thread with an `Io` of its own, and may wait. Nobody has the volume open. Memory:
//! the map's share (`map_cache_bytes`), 2 KiB a segment, and one segment's block lists.

mod segments;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use self::segments::{Chain, Contents, Glance, Owner};
use super::{CheckpointState, LogPosition};
use crate::device::SegmentNumbers;
use crate::io::{AlignedBuf, BlockingIo, DeviceId, Io, Op};
use crate::log::read_note;
use crate::map::walk::{self, Reached, WalkError};
use crate::map::{CheckpointProgress, Displaced, Map, NeedNode, NodeLocation};
use crate::segment::{
    EntryKind, Note, NotedUnmap, PlacedEntry, RecordSummary, SegmentHeader, SegmentKind,
};
use crate::types::{Address, BLOCK_BYTES, BlockNumber, Epoch, SegmentNumber, Sequence, Uuid};

/// Bytes of nodes written in one operation.
const BATCH_BYTES: u32 = 1 << 20;
/// Every record was durable.
const ALL: Sequence = Sequence(u64::MAX);
/// Sentences about damage that are kept; the rest is counted.
const MAX_LOST: usize = 1000;

/// What a volume is rebuilt from.
#[derive(Clone, Debug)]
pub struct RebuildSpec {
    pub device: DeviceId,
    pub pool: Uuid,
    pub volume: Uuid,
    pub name: String,
    pub size_bytes: u64,
    pub logical_block_bytes: u32,
    pub segment_bytes: u64,
    /// Of the map segments that are made.
    pub epoch: Epoch,
    /// Its log segments.
    pub segments: Vec<SegmentNumber>,
    pub snapshots: Vec<(Uuid, Address)>,
    /// Position, and the position whose state the log goes on from there.
    pub rollbacks: Vec<(Address, Address)>,
    pub unmaps: Vec<NotedUnmap>,
    /// Of a clone: the root of the snapshot that it began with.
    pub origin: Option<NodeLocation>,
    pub numbers: Arc<SegmentNumbers>,
    pub map_cache_bytes: usize,
    /// Realtime clock, since the epoch; for headers.
    pub now_ns: u64,
}

/// A snapshot's map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RebuiltSnapshot {
    pub uuid: Uuid,
    pub position: Address,
    pub root: Option<NodeLocation>,
    pub mapped_blocks: u64,
}

/// A segment's row for the catalog. `dead`: as docs/format.md, "Catalog", has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebuiltSegment {
    pub number: SegmentNumber,
    pub kind: SegmentKind,
    pub sealed: bool,
    pub used_blocks: u32,
    pub live: u64,
    pub dead: Vec<u8>,
    pub notes: u32,
    pub unmaps: u32,
}

/// A volume that was rebuilt; its map segments are durable.
#[derive(Clone, Debug)]
pub struct RebuiltVolume {
    pub state: CheckpointState,
    pub mapped_blocks: u64,
    pub snapshots: Vec<RebuiltSnapshot>,
    /// All segments of the volume, map segments included, ascending. Log segments that are not there
    /// are behind the log's end: the next opening decides on them.
    pub segments: Vec<RebuiltSegment>,
    /// Damage of the log, as sentences.
    pub lost: Vec<String>,
    /// Places where records, or notes that may have been unmaps, cannot be read: these maps lack what
    /// they held.
    pub lost_records: u32,
}

/// Why a volume cannot be rebuilt. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    #[error("{what} segment {segment}: {error}")]
    Io {
        what: &'static str,
        segment: SegmentNumber,
        error: io::Error,
    },
    #[error("a map node that was just written cannot be read back: {0}")]
    Map(String),
    #[error(
        "the map of the snapshot that it is a clone of cannot be read: {0}; rebuild that volume first"
    )]
    Origin(String),
    #[error("no segment numbers are granted for its maps; grant some and try again")]
    NoNumbers,
    #[error(
        "the rollback at {0:?} goes back to {1:?}, which is not before it; the volume's state notes \
         contradict themselves"
    )]
    Rollback(Address, Address),
}

/// Rebuilds a volume's maps.
///
/// # Errors
/// [`RebuildError`]; the map segments made so far are removed again.
pub fn rebuild(spec: RebuildSpec, io: &mut dyn Io) -> Result<RebuiltVolume, RebuildError> {
    let mut io = BlockingIo::new(io, spec.device);
    let mut rebuild = Rebuild::new(spec, &mut io)?;
    let result = rebuild.run(&mut io);
    if result.is_err() {
        for &number in rebuild.nodes.segments.keys() {
            // They would be removed by the next opening; this is only sooner.
            let _ = io.run(number, Op::Remove);
        }
    }
    result
}

/// Something that happens to the tree at a place in the log. In the order in which they do at one
/// position: an unmap comes before data and notes at its position, and what a snapshot at a position
/// holds is known before a rollback that begins there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Unmap { block: u64, count: u32 },
    Keep,
    Rollback { to: Address },
}

/// A tree that is kept.
#[derive(Clone, Copy, Debug)]
struct Kept {
    root: Option<NodeLocation>,
    mapped_blocks: u64,
}

/// What a log segment's records say, without their order.
#[derive(Debug, Default)]
struct LogSegment {
    sealed: bool,
    used_blocks: u32,
    data: Bits,
    live: Bits,
    notes: u32,
    unmaps: u32,
}

struct Rebuild {
    spec: RebuildSpec,
    map: Map,
    displaced: Vec<Displaced>,
    /// What is still to come, ascending; the next at the end.
    events: Vec<(Address, Event)>,
    kept: BTreeMap<Address, Kept>,
    logs: BTreeMap<SegmentNumber, LogSegment>,
    nodes: NodeWriter,
    end: LogPosition,
    lost: Vec<String>,
    more_lost: u64,
    lost_records: u32,
}

impl Rebuild {
    fn new(spec: RebuildSpec, io: &mut BlockingIo<'_>) -> Result<Self, RebuildError> {
        let mapped_blocks = count_blocks(io, spec.origin)
            .map_err(|error| RebuildError::Origin(error.to_string()))?;
        let mut events: Vec<_> = spec
            .unmaps
            .iter()
            .map(|u| {
                let event = Event::Unmap {
                    block: u.block.0,
                    count: u.count,
                };
                (u.position, event)
            })
            .collect();
        let wanted = spec.snapshots.iter().map(|&(_, position)| position);
        let wanted: BTreeSet<_> = wanted.chain(spec.rollbacks.iter().map(|r| r.1)).collect();
        events.extend(wanted.into_iter().map(|position| (position, Event::Keep)));
        for &(position, to) in &spec.rollbacks {
            if to >= position {
                return Err(RebuildError::Rollback(position, to));
            }
            events.push((position, Event::Rollback { to }));
        }
        events.sort_unstable();
        events.reverse();
        Ok(Self {
            map: Map::open(spec.origin, mapped_blocks, None),
            displaced: Vec::new(),
            events,
            kept: BTreeMap::new(),
            logs: BTreeMap::new(),
            nodes: NodeWriter::default(),
            end: LogPosition::default(),
            lost: Vec::new(),
            more_lost: 0,
            lost_records: 0,
            spec,
        })
    }

    fn run(&mut self, io: &mut BlockingIo<'_>) -> Result<RebuiltVolume, RebuildError> {
        self.replay(io)?;
        // What is noted behind the log's end: the notes were durable, and the records before are lost.
        while let Some((_, event)) = self.events.last().copied() {
            self.happen(io, event)?;
        }
        let root = self.write_out(io)?;
        let mapped_blocks = self.map.mapped_blocks();
        let snapshots: Vec<_> = self
            .spec
            .snapshots
            .iter()
            .map(|&(uuid, position)| {
                let kept = self.kept[&position];
                RebuiltSnapshot {
                    uuid,
                    position,
                    root: kept.root,
                    mapped_blocks: kept.mapped_blocks,
                }
            })
            .collect();
        let roots: Vec<_> = snapshots.iter().map(|s| s.root).chain([root]).collect();
        let segments = self.mark(io, &roots)?;
        self.nodes.sync(io)?;
        if self.more_lost > 0 {
            self.lost
                .push(format!("… and {} more places", self.more_lost));
        }
        Ok(RebuiltVolume {
            state: CheckpointState {
                root,
                position: self.end,
            },
            mapped_blocks,
            snapshots,
            segments,
            lost: std::mem::take(&mut self.lost),
            lost_records: self.lost_records,
        })
    }

    // The log

    fn replay(&mut self, io: &mut BlockingIo<'_>) -> Result<(), RebuildError> {
        let owner = Owner {
            pool: self.spec.pool,
            volume: self.spec.volume,
            segment_bytes: self.spec.segment_bytes,
        };
        let mut numbers = self.spec.segments.clone();
        numbers.sort_unstable();
        numbers.dedup();
        let mut glances = Vec::with_capacity(numbers.len());
        for number in numbers {
            glances.push(segments::glance(io, &owner, number)?);
        }
        // Records of segments before the tail were all durable; in the tail, records tell.
        let tail = durable_segments(&glances);
        let mut durable = Sequence::default();
        for glance in &glances[tail..] {
            durable = durable.max(segments::durable_sequence(io, &owner, glance)?);
        }
        for (index, glance) in glances.iter().enumerate() {
            let chain = Chain {
                sequence: self.end.sequence,
                checksum: self.end.record_checksum,
            };
            let durable = if index < tail { ALL } else { durable };
            let contents = segments::read(io, &owner, glance, durable, chain)?;
            if !contents.goes_on {
                break;
            }
            self.take_segment(io, glance, index < tail, contents)?;
        }
        Ok(())
    }

    fn take_segment(
        &mut self,
        io: &mut BlockingIo<'_>,
        glance: &Glance,
        durable: bool,
        contents: Contents,
    ) -> Result<(), RebuildError> {
        let number = glance.number;
        self.lost_records += contents.lost_records;
        for sentence in contents.lost {
            self.lose(sentence);
        }
        let mut log = LogSegment {
            sealed: durable || glance.trailer.is_some(),
            used_blocks: 1,
            ..LogSegment::default()
        };
        for record in &contents.records {
            self.apply(io, number, record, &mut log)?;
            self.end = LogPosition {
                segment: number,
                end_blocks: record.offset_blocks + 1 + record.data_blocks,
                sequence: record.sequence,
                record_checksum: record.header_checksum,
            };
            log.used_blocks = self.end.end_blocks;
        }
        if contents.records.is_empty() {
            self.lost_records += 1;
            self.lose(format!(
                "segment {number}: none of its records can be read; what they held is in no map"
            ));
            self.end = LogPosition {
                segment: number,
                end_blocks: 1,
                ..self.end
            };
        }
        self.logs.insert(number, log);
        Ok(())
    }

    fn apply(
        &mut self,
        io: &mut BlockingIo<'_>,
        segment: SegmentNumber,
        record: &RecordSummary,
        log: &mut LogSegment,
    ) -> Result<(), RebuildError> {
        for placed in record.placed(segment) {
            let PlacedEntry {
                entry,
                position,
                checksums,
            } = placed;
            if entry.kind == EntryKind::Unmap {
                log.unmaps += 1;
                // What is noted at its own position comes behind it.
                self.happen_before(io, position)?;
                self.unmap(io, entry.block, entry.count)?;
                continue;
            }
            self.happen_up_to(io, position)?;
            match entry.kind {
                EntryKind::Data => {
                    log.data.set(position.block(), entry.count);
                    self.resolve(io, |map, displaced| {
                        map.ensure_resident(entry.block, entry.count)?;
                        map.insert(entry.block, position, checksums, displaced)
                    })?;
                    self.displaced.clear();
                }
                EntryKind::Note => match read_note(io, position, checksums) {
                    Ok(Note::Unmaps(unmaps)) => log.unmaps += unmaps.len() as u32,
                    Ok(_) => log.notes += entry.count,
                    Err(error) => {
                        // What it was is not known, so that it is taken for all that it may be.
                        log.notes += entry.count;
                        log.unmaps += 1;
                        let known = self.spec.snapshots.iter().any(|s| s.1 == position);
                        self.lost_records += u32::from(!known);
                        self.lose(error.to_string());
                    }
                },
                EntryKind::Unmap => {}
            }
        }
        self.bound_memory(io)
    }

    fn happen_before(
        &mut self,
        io: &mut BlockingIo<'_>,
        position: Address,
    ) -> Result<(), RebuildError> {
        while let Some(&(at, event)) = self.events.last()
            && at < position
        {
            self.happen(io, event)?;
        }
        Ok(())
    }

    fn happen_up_to(
        &mut self,
        io: &mut BlockingIo<'_>,
        position: Address,
    ) -> Result<(), RebuildError> {
        while let Some(&(at, event)) = self.events.last()
            && at <= position
        {
            self.happen(io, event)?;
        }
        Ok(())
    }

    /// The next of the events.
    fn happen(&mut self, io: &mut BlockingIo<'_>, event: Event) -> Result<(), RebuildError> {
        let Some((position, _)) = self.events.pop() else {
            return Ok(());
        };
        match event {
            Event::Unmap { block, count } => self.unmap(io, BlockNumber(block), count),
            Event::Keep => {
                let kept = Kept {
                    root: self.write_out(io)?,
                    mapped_blocks: self.map.mapped_blocks(),
                };
                self.kept.insert(position, kept);
                Ok(())
            }
            Event::Rollback { to } => {
                // `Keep` at `to` came before: it is a smaller position.
                let kept = self.kept[&to];
                self.map = Map::open(kept.root, kept.mapped_blocks, None);
                Ok(())
            }
        }
    }

    // The map

    fn unmap(
        &mut self,
        io: &mut BlockingIo<'_>,
        block: BlockNumber,
        count: u32,
    ) -> Result<(), RebuildError> {
        let end = block.plus(u64::from(count));
        while let Some((first, count)) = self.resolve(io, |map, _| map.next_unmap(block, end))? {
            self.resolve(io, |map, displaced| map.remove(first, count, displaced))?;
            self.displaced.clear();
        }
        Ok(())
    }

    /// Runs a step on the map, reading the nodes it asks for.
    fn resolve<T>(
        &mut self,
        io: &mut BlockingIo<'_>,
        mut step: impl FnMut(&mut Map, &mut Vec<Displaced>) -> Result<T, NeedNode>,
    ) -> Result<T, RebuildError> {
        loop {
            match step(&mut self.map, &mut self.displaced) {
                Ok(value) => return Ok(value),
                Err(NeedNode(location)) => {
                    let bytes = read_node(io, location).map_err(|error| RebuildError::Io {
                        what: "reading a map node in",
                        segment: location.segment,
                        error,
                    })?;
                    self.map
                        .supply(location, &bytes)
                        .map_err(|error| RebuildError::Map(error.to_string()))?;
                }
            }
        }
    }

    fn bound_memory(&mut self, io: &mut BlockingIo<'_>) -> Result<(), RebuildError> {
        let limit = self.spec.map_cache_bytes;
        if self.map.memory_bytes() <= limit {
            return Ok(());
        }
        if self.map.dirty_bytes() > limit / 2 {
            self.write_out(io)?;
        }
        self.map.evict(limit - limit / 4);
        Ok(())
    }

    /// Writes the tree as it is, and returns its root. What it replaces of what was written before dies,
    /// as the walk at the end finds.
    fn write_out(&mut self, io: &mut BlockingIo<'_>) -> Result<Option<NodeLocation>, RebuildError> {
        self.map.begin_checkpoint();
        let root = loop {
            if let CheckpointProgress::Done { root } =
                self.nodes.write(io, &self.spec, &mut self.map)?
            {
                break root;
            }
        };
        self.map.finish_checkpoint();
        let mut dead = Vec::new();
        self.map.take_dead_nodes(&mut dead);
        Ok(root)
    }

    // What is live

    /// Walks all trees, and makes the rows.
    fn mark(
        &mut self,
        io: &mut BlockingIo<'_>,
        roots: &[Option<NodeLocation>],
    ) -> Result<Vec<RebuiltSegment>, RebuildError> {
        let (logs, nodes) = (&mut self.logs, &mut self.nodes);
        let mut source = |location| read_node(io, location);
        // The visitor never ends the walk.
        let _ = walk::mark(&mut source, roots, |reached| {
            match reached {
                Reached::Node(node) => nodes.mark(node),
                // Marking ends with an error instead.
                Reached::Lost(_) => {}
                Reached::Blocks(extent) => {
                    // Blocks of a clone's origin are accounted there.
                    if let Some(log) = logs.get_mut(&extent.address.segment()) {
                        log.live.set(extent.address.block(), extent.count);
                    }
                }
            }
            ControlFlow::Continue(())
        })
        .map_err(|error| RebuildError::Map(error.to_string()))?;
        let mut rows: Vec<_> = self
            .logs
            .iter()
            .map(|(&number, log)| RebuiltSegment {
                number,
                kind: SegmentKind::Log,
                sealed: log.sealed,
                used_blocks: log.used_blocks,
                live: log.data.common(&log.live),
                dead: log.data.without(&log.live),
                notes: log.notes,
                unmaps: log.unmaps,
            })
            .collect();
        rows.extend(self.nodes.rows(io)?);
        rows.sort_unstable_by_key(|row| row.number);
        Ok(rows)
    }

    fn lose(&mut self, sentence: String) {
        if self.lost.len() < MAX_LOST {
            self.lost.push(sentence);
        } else {
            self.more_lost += 1;
        }
    }
}

/// How many of the segments, from the first, were durable once: a segment that is sealed, or of a newer
/// opening, comes only after everything before it was.
fn durable_segments(glances: &[Glance]) -> usize {
    let sealed = glances.iter().rposition(|g| g.trailer.is_some());
    let newest = glances.iter().map(|g| g.epoch).max().unwrap_or_default();
    let older = glances
        .iter()
        .rposition(|g| g.epoch < newest && g.epoch > Epoch::default());
    sealed.max(older).map_or(0, |last| last + 1)
}

fn read_node(io: &mut BlockingIo<'_>, location: NodeLocation) -> io::Result<Vec<u8>> {
    let len = location.len_bytes as usize;
    let (buffer, got) = io.read(location.segment, u64::from(location.offset_bytes), len)?;
    Ok(buffer[..got.min(len)].to_vec())
}

/// Blocks that a root maps.
fn count_blocks(
    io: &mut BlockingIo<'_>,
    root: Option<NodeLocation>,
) -> Result<u64, WalkError<io::Error>> {
    let mut blocks = 0;
    let mut source = |location| read_node(io, location);
    // The visitor never ends the walk.
    let _ = walk::mark(&mut source, &[root], |reached| {
        if let Reached::Blocks(extent) = reached {
            blocks += u64::from(extent.count);
        }
        ControlFlow::Continue(())
    })?;
    Ok(blocks)
}

/// A map segment that was made here.
#[derive(Debug, Default)]
struct MapSegment {
    /// Behind the last write.
    end_bytes: u32,
    /// Nodes in it: length by offset; and whether a root reaches it.
    nodes: BTreeMap<u32, (u32, bool)>,
}

/// Writes nodes to map segments of their own.
#[derive(Debug, Default)]
struct NodeWriter {
    segments: BTreeMap<SegmentNumber, MapSegment>,
}

impl NodeWriter {
    /// Writes the next nodes.
    fn write(
        &mut self,
        io: &mut BlockingIo<'_>,
        spec: &RebuildSpec,
        map: &mut Map,
    ) -> Result<CheckpointProgress, RebuildError> {
        let mut nodes = Vec::new();
        let Some((&number, segment)) = self.segments.last_key_value() else {
            // This only finds out whether there is anything to write.
            let progress = map.write_nodes(SegmentNumber(0), 0, 0, &mut nodes);
            if progress == CheckpointProgress::More {
                self.create(io, spec)?;
            }
            return Ok(progress);
        };
        let start = segment.end_bytes;
        let space = (spec.segment_bytes as u32 - start).min(BATCH_BYTES);
        let progress = map.write_nodes(number, start, space, &mut nodes);
        if nodes.is_empty() {
            if progress == CheckpointProgress::More {
                self.create(io, spec)?;
            }
            return Ok(progress);
        }
        self.note_nodes(number, start, &nodes);
        nodes.resize(nodes.len().next_multiple_of(BLOCK_BYTES), 0);
        let mut buffer = AlignedBuf::new(nodes.len());
        buffer.copy_from_slice(&nodes);
        // SAFETY: `write` returns when the operation has ended, and `buffer` lives until then.
        let buf = unsafe { buffer.io_buf() };
        io.write(number, u64::from(start), buf)
            .map_err(|error| RebuildError::Io {
                what: "writing map nodes to",
                segment: number,
                error,
            })?;
        Ok(progress)
    }

    fn note_nodes(&mut self, number: SegmentNumber, start: u32, nodes: &[u8]) {
        let segment = self.segments.entry(number).or_default();
        let mut at = 0;
        while let Some(head) = nodes.get(at..).and_then(crate::map::NodeHead::parse) {
            segment
                .nodes
                .insert(start + at as u32, (head.len_bytes, false));
            at += head.len_bytes as usize;
        }
        segment.end_bytes = start + nodes.len().next_multiple_of(BLOCK_BYTES) as u32;
    }

    fn create(&mut self, io: &mut BlockingIo<'_>, spec: &RebuildSpec) -> Result<(), RebuildError> {
        let number = spec.numbers.take().ok_or(RebuildError::NoNumbers)?;
        let mut header = Box::new(AlignedBuf::new(BLOCK_BYTES));
        SegmentHeader {
            kind: SegmentKind::Map,
            pool: spec.pool,
            volume: spec.volume,
            number,
            epoch: spec.epoch,
            segment_bytes: spec.segment_bytes,
            logical_block_bytes: spec.logical_block_bytes,
            volume_bytes: spec.size_bytes,
            created_ns: spec.now_ns,
            volume_name: spec.name.clone(),
        }
        .encode(&mut header);
        io.run(number, Op::Create { header })
            .map_err(|error| RebuildError::Io {
                what: "making map",
                segment: number,
                error,
            })?;
        let segment = MapSegment {
            end_bytes: BLOCK_BYTES as u32,
            ..MapSegment::default()
        };
        self.segments.insert(number, segment);
        Ok(())
    }

    fn mark(&mut self, node: NodeLocation) {
        let place = self
            .segments
            .get_mut(&node.segment)
            .and_then(|segment| segment.nodes.get_mut(&node.offset_bytes));
        if let Some((_, live)) = place {
            *live = true;
        }
    }

    /// The rows; segments that no root needs are removed.
    fn rows(&mut self, io: &mut BlockingIo<'_>) -> Result<Vec<RebuiltSegment>, RebuildError> {
        let mut rows = Vec::new();
        let mut unused = Vec::new();
        for (&number, segment) in &self.segments {
            let mut live = 0;
            let mut dead: Vec<(u32, u32)> = Vec::new();
            for (&offset, &(len, is_live)) in &segment.nodes {
                match dead.last_mut() {
                    _ if is_live => live += u64::from(len),
                    Some((start, total)) if *start + *total == offset => *total += len,
                    _ => dead.push((offset, len)),
                }
            }
            if live == 0 {
                unused.push(number);
                continue;
            }
            let mut bytes = Vec::with_capacity(8 * dead.len());
            for (offset, len) in dead {
                bytes.extend(offset.to_le_bytes());
                bytes.extend(len.to_le_bytes());
            }
            rows.push(RebuiltSegment {
                number,
                kind: SegmentKind::Map,
                sealed: true,
                used_blocks: segment.end_bytes / BLOCK_BYTES as u32,
                live,
                dead: bytes,
                notes: 0,
                unmaps: 0,
            });
        }
        for number in unused {
            io.run(number, Op::Remove)
                .map_err(|error| RebuildError::Io {
                    what: "removing map",
                    segment: number,
                    error,
                })?;
            self.segments.remove(&number);
        }
        Ok(rows)
    }

    fn sync(&self, io: &mut BlockingIo<'_>) -> Result<(), RebuildError> {
        for &number in self.segments.keys() {
            io.sync(number).map_err(|error| RebuildError::Io {
                what: "syncing map",
                segment: number,
                error,
            })?;
        }
        Ok(())
    }
}

/// One bit a block of a segment.
#[derive(Debug, Default)]
struct Bits(Vec<u8>);

impl Bits {
    fn set(&mut self, first: u32, count: u32) {
        let end = (first + count) as usize;
        if self.0.len() * 8 < end {
            self.0.resize(end.div_ceil(8), 0);
        }
        for bit in first as usize..end {
            self.0[bit / 8] |= 1 << (bit % 8);
        }
    }

    /// How many bits both have.
    fn common(&self, other: &Self) -> u64 {
        let both = self.0.iter().zip(&other.0).map(|(a, b)| a & b);
        both.map(|byte| u64::from(byte.count_ones())).sum()
    }

    /// The bits that `other` has not, without zeroes at the end.
    fn without(&self, other: &Self) -> Vec<u8> {
        let others = other.0.iter().copied().chain(std::iter::repeat(0));
        let mut left: Vec<u8> = self.0.iter().zip(others).map(|(a, b)| a & !b).collect();
        let len = left
            .iter()
            .rposition(|&byte| byte != 0)
            .map_or(0, |at| at + 1);
        left.truncate(len);
        left
    }
}
