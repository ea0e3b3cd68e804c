//! `Volume`: a volume that is open on a worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use vhostd_engine::request::ID_BYTES;
use vhostd_engine::types::Uuid;
use vhostd_engine::volume::{CheckpointResult, NewSnapshot, NotedAt, RequestKind};
use vhostd_engine::worker::{CommandError, ExportSpec, VolumeId};

use crate::convert::{ParentSnapshot, checkpoint_dict};
use crate::engine::{Shared, Worker, check_shape};
use crate::errors::{Failure, Kind};
use crate::export::Export;
use crate::roots::OnDevice;

/// Queues of one export: more than any guest has vCPUs for, and few enough to look at each turn.
const MAX_QUEUES: u16 = 1024;

/// A volume on its worker, as the Python objects that use it share it.
pub struct Opened {
    shared: Arc<Shared>,
    worker: usize,
    pub id: VolumeId,
    pub device: OnDevice,
    uuid: Uuid,
    name: String,
    logical_block_bytes: u32,
    read_only: bool,
    serial: [u8; ID_BYTES],
    /// `close` was called; what is left is to hear of the commit.
    closing: AtomicBool,
    /// It is not on its worker any more.
    gone: AtomicBool,
}

impl Opened {
    #[expect(
        clippy::too_many_arguments,
        reason = "called once, with what the struct holds"
    )]
    pub fn new(
        shared: Arc<Shared>,
        worker: usize,
        id: VolumeId,
        device: OnDevice,
        uuid: Uuid,
        name: String,
        logical_block_bytes: u32,
        read_only: bool,
        serial: [u8; ID_BYTES],
    ) -> Self {
        let (closing, gone) = (AtomicBool::new(false), AtomicBool::new(false));
        Self {
            shared,
            worker,
            id,
            device,
            uuid,
            name,
            logical_block_bytes,
            read_only,
            serial,
            closing,
            gone,
        }
    }

    pub fn worker(&self) -> &Worker {
        &self.shared.workers[self.worker]
    }

    /// The worker, unless the volume has been closed: its place there may be another's by now.
    fn open(&self) -> Result<&Worker, Failure> {
        if self.gone.load(Ordering::Acquire) {
            return Err(Failure::new(
                Kind::NotFound,
                format!("volume '{}' is closed", self.name),
            ));
        }
        Ok(self.worker())
    }

    /// Runs `f` without the GIL; errors name the volume.
    pub fn run<T: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&Worker, VolumeId) -> Result<T, CommandError> + Send,
    ) -> PyResult<T> {
        let worker = self.open()?;
        let result = py.detach(|| f(worker, self.id));
        Ok(result.map_err(|error| self.name_in(error.into()))?)
    }

    pub fn name_in(&self, failure: Failure) -> Failure {
        failure.of(&format!("volume '{}'", self.name))
    }

    /// Takes the volume off its worker, once.
    fn leave(&self) -> Result<(), CommandError> {
        if self.gone.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let left = self.worker().drop_volume(self.id);
        // Should it still be there, nobody may open it a second time.
        if left.is_ok() {
            self.shared.release(self.uuid);
        }
        left
    }

    fn finish_close(&self) -> Result<(), CommandError> {
        if self.closing.load(Ordering::Acquire) {
            self.leave()
        } else {
            Ok(())
        }
    }
}

impl Drop for Opened {
    /// A volume that nobody has closed is left as after a crash. The GIL may be held here and the
    /// worker has I/O to wait for, so a thread of its own does the waiting.
    fn drop(&mut self) {
        if self.gone.swap(true, Ordering::AcqRel) {
            return;
        }
        let (shared, worker, id, uuid) =
            (Arc::clone(&self.shared), self.worker, self.id, self.uuid);
        let wait = move || {
            if shared.workers[worker].drop_volume(id).is_ok() {
                shared.release(uuid);
            }
        };
        // Without a thread the volume stays open, which is safe.
        let _ = std::thread::Builder::new()
            .name("vhostd-close".into())
            .spawn(wait);
    }
}

#[pyclass(frozen, module = "vhostd._native")]
pub struct Volume {
    pub opened: Arc<Opened>,
    #[pyo3(get)]
    recovered: Py<PyDict>,
}

impl Volume {
    pub fn new(opened: Opened, recovered: Py<PyDict>) -> Self {
        Self {
            opened: Arc::new(opened),
            recovered,
        }
    }
}

#[pymethods]
impl Volume {
    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let data = self
            .opened
            .run(py, |worker, id| worker.read(id, offset, length))?;
        Ok(PyBytes::new(py, &data))
    }

    fn write(&self, py: Python<'_>, offset: u64, data: &[u8]) -> PyResult<()> {
        self.opened
            .run(py, |worker, id| worker.write(id, offset, data))
    }

    fn discard(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        self.opened
            .run(py, |worker, id| worker.unmap(id, offset, length, false))
    }

    fn write_zeroes(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        self.opened
            .run(py, |worker, id| worker.unmap(id, offset, length, true))
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.opened.run(py, |worker, id| worker.flush(id))
    }

    fn resize(&self, py: Python<'_>, size_bytes: u64) -> PyResult<()> {
        check_shape(
            &self.opened.name,
            size_bytes,
            self.opened.logical_block_bytes,
        )?;
        self.opened
            .run(py, |worker, id| worker.resize(id, size_bytes))
    }

    #[pyo3(signature = (*, uuid, name, created_ns))]
    fn snapshot(
        &self,
        py: Python<'_>,
        uuid: &[u8],
        name: String,
        created_ns: u64,
    ) -> PyResult<u64> {
        let snapshot = NewSnapshot {
            uuid: crate::convert::uuid(uuid, "uuid")?,
            name,
            created_ns,
        };
        let at = NotedAt::default();
        let kind = RequestKind::Snapshot {
            snapshot,
            at: Arc::clone(&at),
        };
        self.opened.run(py, |worker, id| worker.request(id, kind))?;
        Ok(at.get().map_or(0, |position| position.bits()))
    }

    #[pyo3(signature = (payload, *, write = true))]
    fn note_state(&self, py: Python<'_>, payload: Vec<u8>, write: bool) -> PyResult<()> {
        if write {
            let kind = RequestKind::StateNote {
                payload,
                at: NotedAt::default(),
            };
            return self.opened.run(py, |worker, id| worker.request(id, kind));
        }
        let kept = self.opened.run(py, |worker, id| {
            worker.with_volume(id, |volume| volume.set_state_note(payload))
        })?;
        Ok(kept.map_err(|error| self.opened.name_in(error.into()))?)
    }

    fn set_parent(&self, py: Python<'_>, parent: Option<ParentSnapshot>) -> PyResult<()> {
        let parent = parent.map(ParentSnapshot::parse).transpose()?;
        self.opened.run(py, |worker, id| {
            worker.with_volume(id, move |volume| volume.set_parent(parent))
        })
    }

    fn hold_nodes(&self, py: Python<'_>) -> PyResult<()> {
        self.opened.run(py, |worker, id| {
            worker.with_volume(id, |volume| volume.hold_nodes())
        })
    }

    fn release_nodes(&self, py: Python<'_>) -> PyResult<()> {
        self.opened.run(py, |worker, id| {
            worker.with_volume(id, |volume| volume.release_nodes())
        })
    }

    fn adopt(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<u64> {
        let copied = Arc::new(AtomicU64::new(0));
        let kind = RequestKind::Adopt {
            offset_bytes: offset,
            len_bytes: length,
            copied: Arc::clone(&copied),
        };
        self.opened.run(py, |worker, id| {
            worker.check_range(id, offset, length)?;
            worker.request(id, kind)
        })?;
        Ok(copied.load(Ordering::Relaxed))
    }

    fn foreign_blocks(&self, py: Python<'_>) -> PyResult<u64> {
        crate::roots::foreign_blocks(py, self)
    }

    fn set_limit(&self, py: Python<'_>, limit_bytes: Option<u64>) -> PyResult<()> {
        self.opened.run(py, |worker, id| {
            worker.with_volume(id, move |volume| volume.set_limit(limit_bytes))
        })
    }

    fn set_pause_when_full(&self, py: Python<'_>, pause: bool) -> PyResult<()> {
        self.opened.run(py, |worker, id| {
            worker.with_volume(id, move |volume| volume.set_pause_when_full(pause))
        })
    }

    #[pyo3(signature = (*, bytes_per_second, enabled = true))]
    fn set_reclaim(&self, py: Python<'_>, bytes_per_second: u64, enabled: bool) -> PyResult<()> {
        self.opened.run(py, |worker, id| {
            worker.with_volume(id, move |volume| {
                volume.set_reclaim(bytes_per_second, enabled);
            })
        })
    }

    fn checkpoint<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let result = self.opened.run(py, |worker, id| worker.checkpoint(id))?;
        let result = result.map_err(|error| self.opened.name_in(error.into()))?;
        checkpoint_dict(py, &result)
    }

    fn checkpoint_committed(&self, py: Python<'_>, checkpoint_id: u64) -> PyResult<()> {
        self.opened.run(py, |worker, id| {
            worker.checkpoint_committed(id, checkpoint_id)?;
            self.opened.finish_close()
        })
    }

    fn checkpoint_failed(&self, py: Python<'_>, checkpoint_id: u64) -> PyResult<()> {
        self.opened.run(py, |worker, id| {
            worker.checkpoint_failed(id, checkpoint_id)?;
            self.opened.finish_close()
        })
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.opened.run(py, |worker, id| worker.volume_stats(id))?;
        let dict = PyDict::new(py);
        dict.set_item("reads", stats.reads)?;
        dict.set_item("read_bytes", stats.read_bytes)?;
        dict.set_item("writes", stats.writes)?;
        dict.set_item("written_bytes", stats.written_bytes)?;
        dict.set_item("flushes", stats.flushes)?;
        dict.set_item("discards", stats.unmaps)?;
        dict.set_item("discarded_bytes", stats.unmapped_bytes)?;
        dict.set_item("errors", stats.errors)?;
        dict.set_item("checksum_errors", stats.checksum_errors)?;
        dict.set_item("map_node_reads", stats.map_node_reads)?;
        dict.set_item("mapped_blocks", stats.mapped_blocks)?;
        dict.set_item("map_memory_bytes", stats.map_memory_bytes)?;
        dict.set_item(
            "log_bytes_since_checkpoint",
            stats.log_bytes_since_checkpoint,
        )?;
        dict.set_item("staged_bytes", stats.staged_bytes)?;
        dict.set_item("segments", stats.space.segments)?;
        dict.set_item("live_blocks", stats.space.live_blocks)?;
        dict.set_item("log_blocks", stats.space.log_blocks)?;
        dict.set_item("live_node_bytes", stats.space.live_node_bytes)?;
        dict.set_item("map_blocks", stats.space.map_blocks)?;
        dict.set_item("dead_blocks", stats.space.dead_blocks)?;
        dict.set_item("punched_blocks", stats.space.punched_blocks)?;
        dict.set_item("allocated_bytes", stats.space.allocated_bytes)?;
        dict.set_item("waiting_for_space", stats.waiting_for_space)?;
        dict.set_item("log_bytes", stats.log_bytes)?;
        dict.set_item("node_bytes", stats.node_bytes)?;
        dict.set_item("punched_bytes", stats.punched_bytes)?;
        dict.set_item("zero_bytes", stats.zero_bytes)?;
        dict.set_item("pending_snapshots", stats.pending_snapshots)?;
        Ok(dict)
    }

    fn close<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let result: Option<CheckpointResult> = self
            .opened
            .run(py, |worker, id| {
                let closed = worker.close_volume(id)?;
                self.opened.closing.store(true, Ordering::Release);
                // With a checkpoint to commit it stays until it has heard of that.
                if !matches!(closed, Ok(Some(_))) {
                    self.opened.leave()?;
                }
                Ok(closed.map_err(Failure::from))
            })?
            .map_err(|failure| self.opened.name_in(failure))?;
        result
            .map(|result| checkpoint_dict(py, &result))
            .transpose()
    }

    #[pyo3(signature = (*, export_id, queues, read_only, write_cache = true))]
    fn export(
        &self,
        py: Python<'_>,
        export_id: u64,
        queues: u16,
        read_only: bool,
        write_cache: bool,
    ) -> PyResult<Export> {
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(self
                .opened
                .name_in(Failure::usage(format!(
                    "{queues} queues are not from 1 to {MAX_QUEUES}"
                )))
                .into());
        }
        let spec = ExportSpec {
            id: export_id,
            queues,
            read_only: read_only || self.opened.read_only,
            logical_block_bytes: self.opened.logical_block_bytes,
            serial: self.opened.serial,
            write_cache,
        };
        let id = self
            .opened
            .run(py, |worker, volume| worker.add_export(volume, spec.clone()))?;
        Ok(Export::new(Arc::clone(&self.opened), id, spec))
    }
}
