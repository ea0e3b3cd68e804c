//! `Export`: the device side of one vhost-user session.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vhostd_engine::request::{DiskShape, config_space, offered_features};
use vhostd_engine::ring::{GuestMemory, QueueConfig, RegionSpec};
use vhostd_engine::worker::{CommandError, ExportId, ExportSpec, QueueStart};

use crate::engine::Worker;
use crate::errors::{Failure, Kind};
use crate::fds::{duplicate, duplicate_some};
use crate::volume::Opened;

/// `MemoryRegion` of the contract.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct MemoryRegion {
    guest_address: u64,
    size_bytes: u64,
    user_address: u64,
    mmap_offset: u64,
    fd: i32,
}

impl MemoryRegion {
    fn parse(&self) -> Result<RegionSpec, Failure> {
        Ok(RegionSpec {
            guest_address: self.guest_address,
            size_bytes: self.size_bytes,
            user_address: self.user_address,
            mmap_offset_bytes: self.mmap_offset,
            file: duplicate(self.fd)?,
        })
    }
}

#[pyclass(frozen, module = "vhostd._native")]
pub struct Export {
    volume: Arc<Opened>,
    id: ExportId,
    spec: ExportSpec,
    write_cache: AtomicBool,
    closed: AtomicBool,
    /// The table in force on the worker; locked while it is changed, so that changes are in order.
    memory: Mutex<Arc<GuestMemory>>,
}

impl Export {
    pub fn new(volume: Arc<Opened>, id: ExportId, spec: ExportSpec) -> Self {
        let write_cache = AtomicBool::new(spec.write_cache);
        Self {
            volume,
            id,
            spec,
            write_cache,
            closed: AtomicBool::new(false),
            memory: Mutex::default(),
        }
    }

    /// Runs `f` without the GIL; errors name the export.
    fn run<T: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&Worker, ExportId) -> Result<T, Failure> + Send,
    ) -> PyResult<T> {
        if self.closed.load(Ordering::Acquire) {
            return Err(self
                .name_in(Failure::new(Kind::NotFound, "it is closed"))
                .into());
        }
        let result = py.detach(|| f(self.volume.worker(), self.id));
        Ok(result.map_err(|failure| self.name_in(failure))?)
    }

    fn name_in(&self, failure: Failure) -> Failure {
        failure.of(&format!("export {}", self.spec.id))
    }

    /// Replaces the memory table by what `change` makes of it.
    fn change_memory(
        &self,
        py: Python<'_>,
        change: impl FnOnce(&GuestMemory) -> Result<GuestMemory, Failure> + Send,
    ) -> PyResult<()> {
        self.run(py, |worker, id| {
            let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            let changed = Arc::new(change(&memory)?);
            worker.set_memory(id, Arc::clone(&changed))?;
            *memory = changed;
            Ok(())
        })
    }
}

#[pymethods]
impl Export {
    fn set_memory(&self, py: Python<'_>, regions: Vec<MemoryRegion>) -> PyResult<()> {
        let specs = regions
            .iter()
            .map(MemoryRegion::parse)
            .collect::<Result<Vec<_>, _>>()?;
        self.change_memory(py, |_| Ok(GuestMemory::new(specs)?))
    }

    fn add_region(&self, py: Python<'_>, region: MemoryRegion) -> PyResult<()> {
        let spec = region.parse()?;
        self.change_memory(py, |memory| Ok(memory.with_region(&spec)?))
    }

    fn remove_region(
        &self,
        py: Python<'_>,
        guest_address: u64,
        user_address: u64,
        size_bytes: u64,
    ) -> PyResult<()> {
        self.change_memory(py, |memory| {
            Ok(memory.without_region(guest_address, user_address, size_bytes)?)
        })
    }

    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    #[pyo3(signature = (
        index, *, size, descriptor_address, available_address, used_address, base, kick_fd, call_fd,
        error_fd, features, enabled,
    ))]
    fn start_queue(
        &self,
        py: Python<'_>,
        index: u16,
        size: u32,
        descriptor_address: u64,
        available_address: u64,
        used_address: u64,
        base: u16,
        kick_fd: Option<i32>,
        call_fd: Option<i32>,
        error_fd: Option<i32>,
        features: u64,
        enabled: bool,
    ) -> PyResult<()> {
        let start = QueueStart {
            ring: QueueConfig {
                size,
                descriptor_address,
                available_address,
                used_address,
                features,
            },
            base,
            kick: duplicate_some(kick_fd)?,
            call: duplicate_some(call_fd)?,
            error: duplicate_some(error_fd)?,
            enabled,
        };
        self.run(py, |worker, id| Ok(worker.start_queue(id, index, start)?))
    }

    fn set_queue_enabled(&self, py: Python<'_>, index: u16, enabled: bool) -> PyResult<()> {
        self.run(py, |worker, id| {
            Ok(worker.set_queue_enabled(id, index, enabled)?)
        })
    }

    fn set_queue_call(&self, py: Python<'_>, index: u16, call_fd: Option<i32>) -> PyResult<()> {
        let fd = duplicate_some(call_fd)?;
        self.run(py, |worker, id| Ok(worker.set_queue_call(id, index, fd)?))
    }

    fn set_queue_kick(&self, py: Python<'_>, index: u16, kick_fd: Option<i32>) -> PyResult<()> {
        let fd = duplicate_some(kick_fd)?;
        self.run(py, |worker, id| Ok(worker.set_queue_kick(id, index, fd)?))
    }

    fn set_queue_error(&self, py: Python<'_>, index: u16, error_fd: Option<i32>) -> PyResult<()> {
        let fd = duplicate_some(error_fd)?;
        self.run(py, |worker, id| Ok(worker.set_queue_error(id, index, fd)?))
    }

    fn stop_queue(&self, py: Python<'_>, index: u16) -> PyResult<u16> {
        self.run(py, |worker, id| Ok(worker.stop_queue(id, index)?))
    }

    fn set_write_cache(&self, py: Python<'_>, enabled: bool) -> PyResult<()> {
        self.run(py, |worker, id| Ok(worker.set_write_cache(id, enabled)?))?;
        self.write_cache.store(enabled, Ordering::Release);
        Ok(())
    }

    /// Every field is there whatever was negotiated; a driver reads only those of its features.
    fn config_space<'py>(&self, py: Python<'py>, features: u64) -> PyResult<Bound<'py, PyBytes>> {
        let _ = features;
        let size_bytes = self.run(py, |worker, _| Ok(worker.size_bytes(self.volume.id)?))?;
        let space = config_space(
            &self.shape(size_bytes),
            self.write_cache.load(Ordering::Acquire),
        );
        Ok(PyBytes::new(py, &space))
    }

    fn features(&self) -> u64 {
        offered_features(&self.shape(0))
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let closed = py.detach(|| {
            let closed = self.volume.worker().close_export(self.id);
            // The worker has let go of it; so do we, or it would stay mapped.
            *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Arc::default();
            closed
        });
        Ok(closed.map_err(|error: CommandError| self.name_in(error.into()))?)
    }
}

impl Export {
    fn shape(&self, size_bytes: u64) -> DiskShape {
        DiskShape {
            size_bytes,
            logical_block_bytes: self.spec.logical_block_bytes,
            read_only: self.spec.read_only,
            queues: self.spec.queues,
        }
    }
}

impl Drop for Export {
    /// As for a volume: somebody forgot to close it, and the GIL may be held.
    fn drop(&mut self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let (volume, id) = (Arc::clone(&self.volume), self.id);
        let wait = move || {
            let _ = volume.worker().close_export(id);
        };
        let _ = std::thread::Builder::new()
            .name("vhostd-close".into())
            .spawn(wait);
    }
}
