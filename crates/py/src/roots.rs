//! Walks over committed roots: `Engine.difference`, `exclusive`, `release_exclusive`, and
//! `Volume.foreign_blocks`. Each has an I/O queue of its own and runs without the GIL.

use std::collections::BTreeSet;
use std::sync::Weak;

use pyo3::prelude::*;
use vhostd_engine::io::{DeviceId, UringIo};
use vhostd_engine::map::NodeLocation;
use vhostd_engine::volume::roots::{self, Exclusive, RootsError};

use crate::convert::parse_root;
use crate::device::Device;
use crate::engine::RECOVERY_RING_ENTRIES;
use crate::errors::{Failure, Kind, os};
use crate::volume::Volume;

pub type Ranges = (Vec<(u64, u64, bool)>, Option<u64>);

/// An I/O queue for one walk.
fn queue(device: &Device) -> Result<UringIo, Failure> {
    let mut io = UringIo::new(RECOVERY_RING_ENTRIES).map_err(os("make an io_uring for a walk"))?;
    io.add_device(device.id, device.open()?);
    Ok(io)
}

impl From<RootsError> for Failure {
    fn from(error: RootsError) -> Self {
        Self::new(Kind::Damaged, error.to_string())
    }
}

fn parse_roots(roots: &[Vec<u8>]) -> Result<Vec<Option<NodeLocation>>, Failure> {
    roots.iter().map(|root| parse_root(root)).collect()
}

pub fn difference(
    py: Python<'_>,
    device: &Device,
    old: &[u8],
    new: &[u8],
    range_bytes: std::ops::Range<u64>,
    limit: usize,
) -> PyResult<Ranges> {
    let (old, new) = (parse_root(old)?, parse_root(new)?);
    let walk = || -> Result<_, Failure> {
        let blocks = roots::blocks_of(range_bytes.start, range_bytes.end);
        let mut io = queue(device)?;
        Ok(roots::difference(
            &mut io,
            device.id,
            old,
            new,
            blocks,
            limit.max(1),
        )?)
    };
    let (found, next) = py.detach(walk)?;
    let block_bytes = vhostd_engine::types::BLOCK_BYTES as u64;
    let ranges = found
        .iter()
        .map(|range| {
            (
                range.block.0 * block_bytes,
                range.count * block_bytes,
                range.mapped,
            )
        })
        .collect();
    Ok((ranges, next.map(|block| block.0 * block_bytes)))
}

pub fn exclusive(
    py: Python<'_>,
    device: &Device,
    root: &[u8],
    others: &[Vec<u8>],
) -> PyResult<(u64, u64)> {
    let (root, others) = (parse_root(root)?, parse_roots(others)?);
    let walk = || -> Result<Exclusive, Failure> {
        let mut io = queue(device)?;
        let (found, _) = roots::exclusive(&mut io, device.id, root, &others, drop)?;
        Ok(found)
    };
    let found = py.detach(walk)?;
    Ok((found.blocks, found.node_bytes))
}

pub fn release_exclusive(
    py: Python<'_>,
    volume: &Volume,
    root: &[u8],
    others: &[Vec<u8>],
) -> PyResult<(u64, u64)> {
    let (root, others) = (parse_root(root)?, parse_roots(others)?);
    let opened = &volume.opened;
    let found = opened.run(py, |worker, id| {
        worker.with_volume(id, |volume| volume.hold_nodes())?;
        let walk = || -> Result<Exclusive, Failure> {
            let mut io = own_queue(volume)?;
            let mut gone = None;
            let (found, nodes) =
                roots::exclusive(&mut io, opened.device.id, root, &others, |blocks| {
                    let told = worker.with_volume(id, move |volume| volume.release(&blocks, &[]));
                    if let Err(error) = told {
                        gone = Some(error);
                    }
                })?;
            if let Some(error) = gone {
                return Err(error.into());
            }
            worker.with_volume(id, move |volume| volume.release(&[], &nodes))?;
            Ok(found)
        };
        let found = walk();
        worker.with_volume(id, |volume| volume.release_nodes())?;
        Ok(found)
    })?;
    let found = found.map_err(|failure| opened.name_in(failure))?;
    Ok((found.blocks, found.node_bytes))
}

pub fn foreign_blocks(py: Python<'_>, volume: &Volume) -> PyResult<u64> {
    let opened = &volume.opened;
    let found = opened.run(py, |worker, id| {
        worker.with_volume(id, |volume| volume.hold_nodes())?;
        let walk = || -> Result<u64, Failure> {
            let (root, own) = worker.with_volume(id, |volume| {
                let own: BTreeSet<_> = volume.segments().map(|row| row.number).collect();
                (volume.committed_root(), own)
            })?;
            let mut io = own_queue(volume)?;
            Ok(roots::foreign_blocks(
                &mut io,
                opened.device.id,
                root,
                &own,
            )?)
        };
        let found = walk();
        worker.with_volume(id, |volume| volume.release_nodes())?;
        Ok(found)
    })?;
    Ok(found.map_err(|failure| opened.name_in(failure))?)
}

fn own_queue(volume: &Volume) -> Result<UringIo, Failure> {
    let place = &volume.opened.device;
    let mut io = UringIo::new(RECOVERY_RING_ENTRIES).map_err(os("make an io_uring for a walk"))?;
    let device = place.device.upgrade().ok_or_else(|| {
        Failure::new(
            Kind::NotFound,
            "the volume's device is closed; open its pool",
        )
    })?;
    io.add_device(place.id, device);
    Ok(io)
}

/// The device that a volume is on. A volume that somebody forgot to let go must not keep it locked.
pub struct OnDevice {
    pub id: DeviceId,
    pub device: Weak<vhostd_engine::device::DirectoryDevice>,
}
