//! What must hold of a whole volume that no request works on: found out by walking every root, without
//! anything that the engine has counted.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use vhostd_engine::device::SegmentNumbers;
use vhostd_engine::io::sim::{SimDisk, SimIo};
use vhostd_engine::io::{BlockingIo, DeviceId};
use vhostd_engine::map::NodeLocation;
use vhostd_engine::map::walk::{self, Reached};
use vhostd_engine::segment::SegmentKind;
use vhostd_engine::types::{Address, BlockNumber, Epoch, SegmentNumber};
use vhostd_engine::volume::{
    self, CheckpointState, MapBudget, Now, Request, RequestId, RequestKind, SegmentRow, VolumeSpec,
    roots,
};

use super::catalog::{Catalog, SnapshotEntry};
use super::history::{State, stamp_of};
use super::{Memory, POOL, SECTOR, Setup};

/// What some roots reach.
#[derive(Debug, Default)]
struct Marks {
    blocks: BTreeSet<(SegmentNumber, u32)>,
    nodes: BTreeMap<(SegmentNumber, u32), u32>,
}

fn mark(disk: &SimDisk, roots: &[Option<NodeLocation>]) -> Result<Marks, String> {
    let mut io = SimIo::new(1);
    io.add_device(DeviceId(0), disk.clone());
    let mut io = BlockingIo::new(&mut io, DeviceId(0));
    let mut source = |location: NodeLocation| {
        let len = location.len_bytes as usize;
        let (bytes, got) = io.read(location.segment, location.offset_bytes.into(), len)?;
        Ok::<_, std::io::Error>(bytes[..got.min(len)].to_vec())
    };
    let mut marks = Marks::default();
    let walked = walk::mark(&mut source, roots, |reached| {
        match reached {
            Reached::Node(node) => {
                let place = (node.segment, node.offset_bytes);
                marks.nodes.insert(place, node.len_bytes);
            }
            Reached::Blocks(extent) => {
                let (segment, first) = (extent.address.segment(), extent.address.block());
                let blocks = first..first + extent.count;
                marks.blocks.extend(blocks.map(|block| (segment, block)));
            }
            Reached::Lost(node) => unreachable!("marking has no lost nodes: {node:?}"),
        }
        ControlFlow::Continue(())
    });
    match walked {
        Ok(_) => Ok(marks),
        Err(error) => Err(format!("a root cannot be walked: {error}")),
    }
}

/// Checks a committed checkpoint: nothing that a root reaches is dead, or in a segment that is gone; and
/// what none reaches is dead, to the block and the byte (invariants 6 and 7).
pub fn check_space(disk: &SimDisk, catalog: &Catalog) -> Result<(), String> {
    let rooted = |row: &&SnapshotEntry| row.root.is_some();
    let all = catalog.snapshots.iter().filter(rooted);
    // What the head replaces of a snapshot that it has left dies at once.
    let kept = all.clone().filter(|row| !row.left);
    let roots = |rows: &mut dyn Iterator<Item = &SnapshotEntry>| {
        let head = std::iter::once(catalog.checkpoint.root);
        head.chain(rows.filter_map(|row| row.root))
            .collect::<Vec<_>>()
    };
    let (kept, all) = (roots(&mut kept.clone()), roots(&mut all.clone()));
    let needed = mark(disk, &kept)?;
    let reached = if kept == all {
        None
    } else {
        mark(disk, &all).ok()
    };
    let exact = kept == all;
    let reached = reached.as_ref().unwrap_or(&needed);
    let on_disk: BTreeSet<_> = disk.list().into_iter().collect();
    for (segment, _) in needed.blocks.iter().chain(needed.nodes.keys()) {
        let own = catalog.rows.contains_key(segment);
        if !(own || catalog.clone) || !on_disk.contains(segment) {
            return Err(format!("a root reaches segment {segment}, which is gone"));
        }
    }
    for row in catalog.rows.values() {
        match row.kind {
            SegmentKind::Log => check_log(row, &needed, reached, exact)?,
            SegmentKind::Map => check_map(row, &needed, exact)?,
        }
    }
    Ok(())
}

fn check_log(row: &SegmentRow, needed: &Marks, reached: &Marks, exact: bool) -> Result<(), String> {
    let number = row.number;
    let of = |marks: &Marks| -> BTreeSet<u32> {
        let range = (number, 0)..=(number, u32::MAX);
        marks.blocks.range(range).map(|(_, block)| *block).collect()
    };
    let runs = row.dead.block_runs();
    let dead: BTreeSet<u32> = runs
        .iter()
        .flat_map(|&(first, n)| first..first + n)
        .collect();
    if let Some(block) = of(needed).intersection(&dead).next() {
        return Err(format!(
            "block {block} of segment {number} is dead, and reached"
        ));
    }
    if exact && row.live != of(reached).len() as u64 {
        return Err(format!(
            "segment {number} has {} live blocks by its row, {} are reached",
            row.live,
            of(reached).len()
        ));
    }
    if (row.live as usize) < of(needed).len() {
        return Err(format!(
            "segment {number} counts fewer live blocks than roots reach"
        ));
    }
    Ok(())
}

fn check_map(row: &SegmentRow, needed: &Marks, exact: bool) -> Result<(), String> {
    let number = row.number;
    let range = (number, 0)..=(number, u32::MAX);
    let mut bytes = 0;
    for (&(_, offset), &len) in needed.nodes.range(range) {
        bytes += u64::from(len);
        for byte in [offset, offset + len - 1] {
            if row.dead.range_end(byte).is_some() {
                return Err(format!(
                    "node at byte {offset} of segment {number} is dead, and reached"
                ));
            }
        }
    }
    if row.live < bytes || (exact && row.live != bytes) {
        return Err(format!(
            "segment {number} has {} live node bytes by its row, {bytes} are reached",
            row.live
        ));
    }
    Ok(())
}

/// Reads a root whole, every block against its checksum; sectors outside of `parts` (blocks) are not
/// looked at, and come as zeroes.
pub fn read_root(
    disk: &SimDisk,
    setup: &Setup,
    root: Option<NodeLocation>,
    mapped_blocks: u64,
    size_bytes: u64,
    parts: &[std::ops::Range<u64>],
) -> Result<State, String> {
    let mut io = SimIo::new(1);
    io.add_device(DeviceId(0), disk.clone());
    let spec = VolumeSpec {
        device: DeviceId(0),
        pool: POOL,
        volume: vhostd_engine::types::Uuid([7; 16]),
        name: "snapshot".into(),
        size_bytes,
        logical_block_bytes: 512,
        segment_bytes: setup.segment_bytes,
        previous_epoch: Epoch(0),
        epoch: Epoch(1),
        read_only: true,
        checkpoint: CheckpointState {
            root,
            ..CheckpointState::nothing()
        },
        mapped_blocks,
        segments: Vec::new(),
        uncatalogued: Vec::new(),
        numbers: Arc::new(SegmentNumbers::new()),
        staging_path: setup.staging_path.with_extension("none"),
        staging_bytes: setup.staging_bytes,
        map_budget: Arc::new(MapBudget::new(setup.map_bytes)),
        checkpoint_log_bytes: u64::MAX,
        parent: None,
        newest_snapshot: Address::NONE,
        state_note: Vec::new(),
        clone: false,
        limit_bytes: None,
        pause_when_full: false,
    };
    let (mut volume, _, _) =
        volume::open(spec, &mut io).map_err(|error| format!("opening a snapshot: {error}"))?;
    volume.attach(0);
    let mut state = vec![0; (size_bytes / SECTOR) as usize];
    for part in parts {
        let end = (part.end * 4096).min(size_bytes);
        let offset_bytes = (part.start * 4096).min(end);
        let memory = Memory::new(&vec![0xee; (end - offset_bytes) as usize]);
        let kind = RequestKind::Read {
            offset_bytes,
            into: memory.bufs(),
        };
        let id = RequestId(1);
        let request = Request {
            id,
            kind,
            write_through: false,
        };
        let now = Now::default();
        volume.submit(&mut io, request, now);
        let (mut finished, mut completions) = (Vec::new(), Vec::new());
        loop {
            volume.advance(&mut io, now);
            volume.take_finished(&mut finished);
            if let Some(done) = finished.pop() {
                let mut events = Vec::new();
                volume.take_events(&mut events);
                done.result
                    .map_err(|why| format!("reading a snapshot: {why:?}, {events:?}"))?;
                break;
            }
            vhostd_engine::io::Io::wait(&mut io, None, &mut completions);
            for completion in completions.drain(..) {
                volume.on_completion(&mut io, completion, now);
            }
        }
        let first = offset_bytes / SECTOR;
        for (i, bytes) in memory.bytes().chunks_exact(SECTOR as usize).enumerate() {
            let sector = first + i as u64;
            let stamp = stamp_of(sector, bytes).ok_or(format!("sector {sector} is torn"))?;
            state[sector as usize] = stamp;
        }
    }
    Ok(state)
}

/// Whether the difference of two roots names every block whose contents differ, and none that both have
/// at the same address.
pub fn check_difference(
    disk: &SimDisk,
    (old, old_state): (Option<NodeLocation>, &State),
    (new, new_state): (Option<NodeLocation>, &State),
) -> Result<(), String> {
    let mut io = SimIo::new(1);
    io.add_device(DeviceId(0), disk.clone());
    let all = BlockNumber(0)..BlockNumber(1 << 34);
    let (found, next) = roots::difference(&mut io, DeviceId(0), old, new, all, usize::MAX)
        .map_err(|error| format!("difference: {error}"))?;
    assert!(next.is_none());
    let named: BTreeSet<u64> = found
        .iter()
        .flat_map(|range| range.block.0..range.block.0 + range.count)
        .collect();
    let blocks = old_state.len().max(new_state.len()).div_ceil(8);
    let of = |state: &State, block: usize| -> Vec<u64> {
        let sectors = block * 8..block * 8 + 8;
        sectors
            .map(|sector| state.get(sector).copied().unwrap_or(0))
            .collect()
    };
    for block in 0..blocks {
        let differs = of(old_state, block) != of(new_state, block);
        if differs && !named.contains(&(block as u64)) {
            return Err(format!(
                "the difference of two roots does not name block {block}"
            ));
        }
    }
    if old == new && !named.is_empty() {
        return Err("a root differs from itself".into());
    }
    Ok(())
}
