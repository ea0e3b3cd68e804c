//! `Engine.rebuild_volume`: the maps of a volume made again from its log.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use vhostd_engine::device::DirectoryDevice;
use vhostd_engine::io::{DeviceId, UringIo};
use vhostd_engine::segment::NotedUnmap;
use vhostd_engine::types::{Address, BlockNumber, Epoch, SegmentNumber, Uuid};
use vhostd_engine::volume::{RebuildError, RebuildSpec, RebuiltSegment, RebuiltVolume, rebuild};
use vhostd_engine::worker::now;

use crate::convert::{parse_root, root_bytes, uuid};
use crate::errors::{Failure, Kind, io_kind, os};

/// Submissions in flight: one at a time.
const RING_ENTRIES: u32 = 16;

/// What Python gives.
pub struct Request {
    pub device: DeviceId,
    pub volume: Uuid,
    pub name: String,
    pub size_bytes: u64,
    pub logical_block_bytes: u32,
    pub epoch: u64,
    pub segments: Vec<u64>,
    pub snapshots: Vec<(Vec<u8>, u64)>,
    pub rollbacks: Vec<(u64, u64)>,
    pub unmaps: Vec<(u64, u32, u64)>,
    pub origin: Vec<u8>,
    pub map_cache_bytes: usize,
}

impl Request {
    fn spec(self, device: &DirectoryDevice) -> Result<RebuildSpec, Failure> {
        let superblock = device.superblock();
        let snapshots = self
            .snapshots
            .iter()
            .map(|(bytes, at)| Ok((uuid(bytes, "snapshots")?, Address::from_bits(*at))))
            .collect::<Result<_, Failure>>()?;
        let pair = |&(at, to): &(u64, u64)| (Address::from_bits(at), Address::from_bits(to));
        let unmap = |&(block, count, at): &(u64, u32, u64)| NotedUnmap {
            block: BlockNumber(block),
            count,
            position: Address::from_bits(at),
        };
        Ok(RebuildSpec {
            device: self.device,
            pool: superblock.pool,
            volume: self.volume,
            name: self.name,
            size_bytes: self.size_bytes,
            logical_block_bytes: self.logical_block_bytes,
            segment_bytes: superblock.segment_bytes,
            epoch: Epoch(self.epoch),
            segments: self.segments.iter().copied().map(SegmentNumber).collect(),
            snapshots,
            rollbacks: self.rollbacks.iter().map(pair).collect(),
            unmaps: self.unmaps.iter().map(unmap).collect(),
            origin: parse_root(&self.origin)?,
            numbers: Arc::clone(device.numbers()),
            map_cache_bytes: self.map_cache_bytes,
            now_ns: now().realtime_ns,
        })
    }
}

/// Rebuilds, without the GIL.
pub fn run(
    py: Python<'_>,
    device: &Arc<DirectoryDevice>,
    request: Request,
) -> Result<RebuiltVolume, Failure> {
    let name = request.name.clone();
    let id = request.device;
    let spec = request.spec(device)?;
    py.detach(|| {
        let mut io = UringIo::new(RING_ENTRIES).map_err(os("make an io_uring for rebuilding"))?;
        io.add_device(id, Arc::clone(device));
        rebuild(spec, &mut io).map_err(|error| failure(&error).of(&format!("volume '{name}'")))
    })
}

fn failure(error: &RebuildError) -> Failure {
    let kind = match error {
        RebuildError::Io { error, .. } => io_kind(error),
        RebuildError::Map(_) | RebuildError::Origin(_) | RebuildError::Rollback(..) => {
            Kind::Damaged
        }
        RebuildError::NoNumbers => Kind::Unavailable,
    };
    Failure::new(kind, error.to_string())
}

/// `RebuiltVolume` of the contract.
pub fn dict<'py>(py: Python<'py>, rebuilt: &RebuiltVolume) -> PyResult<Bound<'py, PyDict>> {
    let snapshots = PyList::empty(py);
    for snapshot in &rebuilt.snapshots {
        let dict = PyDict::new(py);
        dict.set_item("uuid", PyBytes::new(py, &snapshot.uuid.0))?;
        dict.set_item("position", snapshot.position.bits())?;
        dict.set_item("root", PyBytes::new(py, &root_bytes(snapshot.root)))?;
        dict.set_item("mapped_blocks", snapshot.mapped_blocks)?;
        snapshots.append(dict)?;
    }
    let segments = PyList::empty(py);
    for segment in &rebuilt.segments {
        segments.append(row(py, segment)?)?;
    }
    let position = &rebuilt.state.position;
    let state = PyDict::new(py);
    state.set_item("root", PyBytes::new(py, &root_bytes(rebuilt.state.root)))?;
    state.set_item("segment", position.segment.0)?;
    state.set_item("end_block", position.end_blocks)?;
    state.set_item("sequence", position.sequence.0)?;
    state.set_item("record_checksum", position.record_checksum)?;
    let dict = PyDict::new(py);
    dict.set_item("state", state)?;
    dict.set_item("mapped_blocks", rebuilt.mapped_blocks)?;
    dict.set_item("snapshots", snapshots)?;
    dict.set_item("segments", segments)?;
    dict.set_item("lost", &rebuilt.lost)?;
    dict.set_item("lost_records", rebuilt.lost_records)?;
    Ok(dict)
}

fn row<'py>(py: Python<'py>, segment: &RebuiltSegment) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("number", segment.number.0)?;
    dict.set_item("kind", segment.kind as u8)?;
    dict.set_item("sealed", segment.sealed)?;
    dict.set_item("used_blocks", segment.used_blocks)?;
    dict.set_item("live", segment.live)?;
    dict.set_item("dead", PyBytes::new(py, &segment.dead))?;
    dict.set_item("punched_blocks", 0)?;
    dict.set_item("notes", segment.notes)?;
    dict.set_item("unmaps", segment.unmaps)?;
    Ok(dict)
}
