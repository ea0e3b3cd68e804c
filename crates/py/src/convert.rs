//! Between the engine's structures and the dictionaries of `_native.pyi`.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use vhostd_engine::log::LogPosition;
use vhostd_engine::map::NodeLocation;
use vhostd_engine::segment::SegmentKind;
use vhostd_engine::types::{Address, SegmentNumber, Sequence, Uuid};
use vhostd_engine::volume::{
    CheckpointResult, CheckpointState, DeadSet, FoundSnapshot, Parent, SegmentRow, SnapshotRoot,
};

use crate::errors::Failure;

/// Length of a root as the catalog keeps it; `docs/format.md`, "Catalog".
const ROOT_BYTES: usize = 20;

pub fn uuid(bytes: &[u8], what: &str) -> Result<Uuid, Failure> {
    let array = bytes.try_into();
    array
        .map(Uuid)
        .map_err(|_| Failure::usage(format!("{what}: a UUID has 16 bytes, not {}", bytes.len())))
}

/// `CheckpointState` of the contract.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct State {
    root: Vec<u8>,
    segment: u64,
    end_block: u32,
    sequence: u64,
    record_checksum: u32,
}

impl State {
    pub fn parse(self) -> Result<CheckpointState, Failure> {
        Ok(CheckpointState {
            root: parse_root(&self.root)?,
            position: LogPosition {
                segment: SegmentNumber(self.segment),
                end_blocks: self.end_block,
                sequence: Sequence(self.sequence),
                record_checksum: self.record_checksum,
            },
        })
    }
}

/// `ParentSnapshot` of the contract.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct ParentSnapshot {
    position: u64,
    root: Vec<u8>,
}

impl ParentSnapshot {
    pub fn parse(self) -> Result<Parent, Failure> {
        Ok(Parent {
            position: Address::from_bits(self.position),
            root: parse_root(&self.root)?,
        })
    }
}

fn snapshot_dict<'py>(py: Python<'py>, root: &SnapshotRoot) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("uuid", PyBytes::new(py, &root.uuid.0))?;
    dict.set_item("position", root.position.bits())?;
    dict.set_item("root", PyBytes::new(py, &root_bytes(root.root)))?;
    dict.set_item("mapped_blocks", root.mapped_blocks)?;
    Ok(dict)
}

pub fn snapshots_list<'py>(
    py: Python<'py>,
    snapshots: &[SnapshotRoot],
) -> PyResult<Vec<Bound<'py, PyDict>>> {
    snapshots
        .iter()
        .map(|root| snapshot_dict(py, root))
        .collect()
}

pub fn found_dict<'py>(py: Python<'py>, found: &FoundSnapshot) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("uuid", PyBytes::new(py, &found.snapshot.uuid.0))?;
    dict.set_item("name", &found.snapshot.name)?;
    dict.set_item("created_ns", found.snapshot.created_ns)?;
    dict.set_item("size_bytes", found.size_bytes)?;
    dict.set_item("position", found.position.bits())?;
    Ok(dict)
}

pub fn parse_root(bytes: &[u8]) -> Result<Option<NodeLocation>, Failure> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let bytes: &[u8; ROOT_BYTES] = bytes.try_into().map_err(|_| {
        Failure::usage(format!(
            "a checkpoint's root has 0 or {ROOT_BYTES} bytes, not {}",
            bytes.len()
        ))
    })?;
    let u32_at =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Ok(Some(NodeLocation {
        segment: SegmentNumber(u64::from(u32_at(4)) << 32 | u64::from(u32_at(0))),
        offset_bytes: u32_at(8),
        len_bytes: u32_at(12),
        checksum: u32_at(16),
    }))
}

pub fn root_bytes(root: Option<NodeLocation>) -> Vec<u8> {
    let Some(node) = root else { return Vec::new() };
    let mut bytes = Vec::with_capacity(ROOT_BYTES);
    bytes.extend(node.segment.0.to_le_bytes());
    for field in [node.offset_bytes, node.len_bytes, node.checksum] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

/// `SegmentRow` of the contract.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Row {
    number: u64,
    kind: u8,
    sealed: bool,
    used_blocks: u32,
    live: u64,
    dead: Vec<u8>,
    punched_blocks: u32,
    notes: u32,
    unmaps: u32,
}

impl Row {
    pub fn parse(self) -> Result<SegmentRow, Failure> {
        let kind = SegmentKind::from_byte(self.kind).ok_or_else(|| {
            Failure::usage(format!(
                "segment {}: kind {} is not 1 or 2",
                self.number, self.kind
            ))
        })?;
        let dead = DeadSet::decode(kind, &self.dead)
            .map_err(|error| Failure::usage(format!("segment {}: {error}", self.number)))?;
        Ok(SegmentRow {
            number: SegmentNumber(self.number),
            kind,
            sealed: self.sealed,
            used_blocks: self.used_blocks,
            live: self.live,
            dead,
            punched_blocks: self.punched_blocks,
            notes: self.notes,
            unmaps: self.unmaps,
        })
    }
}

pub fn row_dict<'py>(py: Python<'py>, row: &SegmentRow) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("number", row.number.0)?;
    dict.set_item("kind", row.kind as u8)?;
    dict.set_item("sealed", row.sealed)?;
    dict.set_item("used_blocks", row.used_blocks)?;
    dict.set_item("live", row.live)?;
    dict.set_item("dead", PyBytes::new(py, &row.dead.encode()))?;
    dict.set_item("punched_blocks", row.punched_blocks)?;
    dict.set_item("notes", row.notes)?;
    dict.set_item("unmaps", row.unmaps)?;
    Ok(dict)
}

pub fn checkpoint_dict<'py>(
    py: Python<'py>,
    result: &CheckpointResult,
) -> PyResult<Bound<'py, PyDict>> {
    let position = &result.state.position;
    let state = PyDict::new(py);
    state.set_item("root", PyBytes::new(py, &root_bytes(result.state.root)))?;
    state.set_item("segment", position.segment.0)?;
    state.set_item("end_block", position.end_blocks)?;
    state.set_item("sequence", position.sequence.0)?;
    state.set_item("record_checksum", position.record_checksum)?;
    let dict = PyDict::new(py);
    dict.set_item("id", result.id)?;
    dict.set_item("state", state)?;
    dict.set_item("mapped_blocks", result.mapped_blocks)?;
    dict.set_item("snapshots", snapshots_list(py, &result.snapshots)?)?;
    let changed = result
        .changed
        .iter()
        .map(|row| row_dict(py, row))
        .collect::<PyResult<Vec<_>>>()?;
    dict.set_item("changed", changed)?;
    let removed: Vec<u64> = result.removed.iter().map(|number| number.0).collect();
    dict.set_item("removed", removed)?;
    Ok(dict)
}
