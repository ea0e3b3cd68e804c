//! `Device`: a directory device, locked and open.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use vhostd_engine::device::{DirectoryDevice, Superblock};
use vhostd_engine::io::DeviceId;
use vhostd_engine::types::SegmentNumber;
use vhostd_engine::worker::now;

use crate::convert::uuid;
use crate::engine::Shared;
use crate::errors::{Failure, Kind};

/// Makes an existing empty directory a device.
#[pyfunction]
#[pyo3(signature = (path, *, pool_uuid, device_uuid, pool_name, segment_bytes))]
pub fn format_device(
    py: Python<'_>,
    path: String,
    pool_uuid: &[u8],
    device_uuid: &[u8],
    pool_name: String,
    segment_bytes: u64,
) -> PyResult<()> {
    let superblock = Superblock {
        pool: uuid(pool_uuid, "pool_uuid")?,
        device: uuid(device_uuid, "device_uuid")?,
        segment_bytes,
        created_ns: now().realtime_ns,
        pool_name,
    };
    let formatted = py.detach(|| DirectoryDevice::format(Path::new(&path), &superblock));
    Ok(formatted.map_err(Failure::from)?)
}

#[pyclass(frozen, module = "vhostd._native")]
pub struct Device {
    pub shared: Arc<Shared>,
    pub id: DeviceId,
    /// None: closed.
    pub device: Mutex<Option<Arc<DirectoryDevice>>>,
    superblock: Superblock,
}

impl Device {
    pub fn new(shared: Arc<Shared>, id: DeviceId, device: Arc<DirectoryDevice>) -> Self {
        let superblock = device.superblock().clone();
        Self {
            shared,
            id,
            device: Mutex::new(Some(device)),
            superblock,
        }
    }

    pub fn open(&self) -> Result<Arc<DirectoryDevice>, Failure> {
        let device = self
            .device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        device.ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                format!(
                    "the device of pool '{}' is closed",
                    self.superblock.pool_name
                ),
            )
        })
    }

    /// Runs `f` on the device without the GIL.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&DirectoryDevice) -> Result<T, vhostd_engine::device::DeviceError> + Send,
    ) -> PyResult<T> {
        let device = self.open()?;
        Ok(py.detach(|| f(&device)).map_err(Failure::from)?)
    }
}

#[pymethods]
impl Device {
    #[getter]
    fn index(&self) -> u32 {
        self.id.0
    }

    #[getter]
    fn superblock<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        dict.set_item("pool_uuid", PyBytes::new(py, &self.superblock.pool.0))?;
        dict.set_item("device_uuid", PyBytes::new(py, &self.superblock.device.0))?;
        dict.set_item("pool_name", &self.superblock.pool_name)?;
        dict.set_item("segment_bytes", self.superblock.segment_bytes)?;
        dict.set_item("created_ns", self.superblock.created_ns)?;
        Ok(dict)
    }

    fn grant_segment_numbers(&self, first: u64, end: u64) -> PyResult<()> {
        let granted = self
            .open()?
            .numbers()
            .grant(SegmentNumber(first), SegmentNumber(end));
        Ok(granted.map_err(Failure::from)?)
    }

    fn list_segments(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        let numbers = self.with(py, DirectoryDevice::list)?;
        Ok(numbers.iter().map(|number| number.0).collect())
    }

    fn identify_segment<'py>(&self, py: Python<'py>, number: u64) -> PyResult<Bound<'py, PyDict>> {
        let header = self.with(py, |device| device.identify(SegmentNumber(number)))?;
        let dict = PyDict::new(py);
        dict.set_item("number", header.number.0)?;
        dict.set_item("kind", header.kind as u8)?;
        dict.set_item("volume_uuid", PyBytes::new(py, &header.volume.0))?;
        dict.set_item("epoch", header.epoch.0)?;
        Ok(dict)
    }

    fn remove_segment(&self, py: Python<'_>, number: u64) -> PyResult<()> {
        self.with(py, |device| device.remove(SegmentNumber(number)))
    }

    fn space(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        self.with(py, DirectoryDevice::space)
    }

    /// Gives the lock back; volumes on the device must be closed.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if self.open().is_err() {
            return Ok(());
        }
        py.detach(|| self.shared.forget_device(self.id))?;
        drop(
            self.device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        Ok(())
    }
}
