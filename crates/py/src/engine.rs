//! `Engine`: workers, devices, events, and the opening of volumes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use vhostd_engine::device::DirectoryDevice;
use vhostd_engine::io::{DeviceId, UringIo};
use vhostd_engine::log::Recovery;
use vhostd_engine::request::ID_BYTES;
use vhostd_engine::types::{Address, Epoch, MAX_VOLUME_BYTES, SegmentNumber, Uuid};
use vhostd_engine::volume::{self, FoundSnapshot, MapBudget, VolumeEvent, VolumeSpec};
use vhostd_engine::worker::{Event, Events, WorkerConfig, WorkerHandle};

use crate::convert::{ParentSnapshot, Row, State, found_dict, uuid};
use crate::device::Device;
use crate::errors::{Failure, Kind, os};
use crate::rebuild;
use crate::roots::{self, OnDevice};
use crate::volume::{Opened, Volume};

pub type Worker = WorkerHandle<volume::Volume, UringIo>;

/// Submissions a worker's ring takes at once; more wait in a backlog.
const RING_ENTRIES: u32 = 256;
/// The same for recovery, which waits for each operation.
pub const RECOVERY_RING_ENTRIES: u32 = 16;
/// Smallest staging ring: several records fit.
const MIN_STAGING_BYTES: u64 = 8 << 20;
/// Devices that one engine has open.
const MAX_DEVICES: usize = 1024;

/// What the engine's objects share.
pub struct Shared {
    pub workers: Vec<Worker>,
    events: Arc<Events<VolumeEvent>>,
    map_budget: Arc<MapBudget>,
    staging_dir: PathBuf,
    staging_bytes: u64,
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    devices: Vec<Option<Arc<DirectoryDevice>>>,
    /// Volumes that are open or being opened.
    volumes: HashMap<Uuid, Place>,
}

#[derive(Clone, Copy)]
struct Place {
    device: DeviceId,
    worker: usize,
}

impl Shared {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        // Each change is one insertion or removal.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_device(&self, device: Arc<DirectoryDevice>) -> Result<DeviceId, Failure> {
        let id = {
            let mut tables = self.tables();
            let free = tables.devices.iter().position(Option::is_none);
            let index = free.unwrap_or(tables.devices.len());
            if index == MAX_DEVICES {
                return Err(Failure::new(
                    Kind::Busy,
                    format!("{MAX_DEVICES} devices are open; close one first"),
                ));
            }
            if index == tables.devices.len() {
                tables.devices.push(None);
            }
            tables.devices[index] = Some(Arc::clone(&device));
            DeviceId(index as u32)
        };
        for worker in &self.workers {
            let device = Arc::clone(&device);
            worker.with_io(move |io| io.add_device(id, device))?;
        }
        Ok(id)
    }

    pub fn forget_device(&self, id: DeviceId) -> Result<(), Failure> {
        {
            let mut tables = self.tables();
            let open = tables
                .volumes
                .values()
                .filter(|place| place.device == id)
                .count();
            if open > 0 {
                let text = format!("{open} volumes on the device are open; close them first");
                return Err(Failure::new(Kind::Busy, text));
            }
            tables.devices[id.0 as usize] = None;
        }
        for worker in &self.workers {
            // A worker that is gone holds nothing.
            let _ = worker.with_io(move |io| drop(io.remove_device(id)));
        }
        Ok(())
    }

    /// Takes a volume's name in the table, on the worker that has the fewest.
    fn reserve(&self, volume: Uuid, name: &str, device: DeviceId) -> Result<usize, Failure> {
        let mut tables = self.tables();
        if tables.volumes.contains_key(&volume) {
            let text = format!("volume '{name}' is open already; close it first");
            return Err(Failure::new(Kind::Busy, text));
        }
        let load = |worker: usize| {
            tables
                .volumes
                .values()
                .filter(|place| place.worker == worker)
                .count()
        };
        let worker = (0..self.workers.len())
            .min_by_key(|&worker| load(worker))
            .unwrap_or(0);
        tables.volumes.insert(volume, Place { device, worker });
        Ok(worker)
    }

    pub fn release(&self, volume: Uuid) {
        self.tables().volumes.remove(&volume);
    }

    fn device_of(&self, volume: Uuid) -> Option<u32> {
        self.tables()
            .volumes
            .get(&volume)
            .map(|place| place.device.0)
    }

    /// Recovers a volume and hands it to its worker.
    fn open_volume(
        self: &Arc<Self>,
        device: &Arc<DirectoryDevice>,
        spec: VolumeSpec,
        serial: [u8; ID_BYTES],
    ) -> Result<(Opened, Recovery, Vec<FoundSnapshot>), Failure> {
        let uuid = spec.volume;
        let worker = self.reserve(uuid, &spec.name, spec.device)?;
        let opened = self.recover(device, spec, worker, serial);
        if opened.is_err() {
            self.release(uuid);
        }
        opened
    }

    fn recover(
        self: &Arc<Self>,
        device: &Arc<DirectoryDevice>,
        spec: VolumeSpec,
        worker: usize,
        serial: [u8; ID_BYTES],
    ) -> Result<(Opened, Recovery, Vec<FoundSnapshot>), Failure> {
        let name = spec.name.clone();
        let of = |failure: Failure| failure.of(&format!("volume '{name}'"));
        if let Some(directory) = spec.staging_path.parent() {
            make_private_directory(directory).map_err(of)?;
        }
        let (uuid, logical_block_bytes, read_only) =
            (spec.volume, spec.logical_block_bytes, spec.read_only);
        let device_id = spec.device;
        let mut io =
            UringIo::new(RECOVERY_RING_ENTRIES).map_err(os("make an io_uring for recovery"))?;
        io.add_device(spec.device, Arc::clone(device));
        let (volume, recovery, found) =
            volume::open(spec, &mut io).map_err(|error| of(error.into()))?;
        drop(io);
        let id = self.workers[worker]
            .add_volume(volume, uuid)
            .map_err(|error| of(error.into()))?;
        let shared = Arc::clone(self);
        let place = OnDevice {
            id: device_id,
            device: Arc::downgrade(device),
        };
        Ok((
            Opened::new(
                shared,
                worker,
                id,
                place,
                uuid,
                name,
                logical_block_bytes,
                read_only,
                serial,
            ),
            recovery,
            found,
        ))
    }
}

fn make_private_directory(path: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path);
    made.map_err(os(format!(
        "create the staging directory {}",
        path.display()
    )))
}

/// Serial numbers are at most 20 bytes of printable ASCII (virtio 1.3, 5.2.6: padded with NUL).
fn serial_bytes(serial: &str) -> Result<[u8; ID_BYTES], Failure> {
    if serial.len() > ID_BYTES
        || !serial
            .bytes()
            .all(|byte| byte.is_ascii_graphic() || byte == b' ')
    {
        let text = format!(
            "serial '{serial}': at most {ID_BYTES} printable ASCII characters are possible"
        );
        return Err(Failure::usage(text));
    }
    let mut bytes = [0; ID_BYTES];
    bytes[..serial.len()].copy_from_slice(serial.as_bytes());
    Ok(bytes)
}

#[pyclass(frozen, module = "vhostd._native")]
pub struct Engine {
    shared: Arc<Shared>,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (
        *, workers = 1, cpus = None, poll_us = 32, map_cache_bytes = 256 << 20,
        staging_dir = "/dev/shm/vhostd".into(), staging_bytes = 32 << 20,
    ))]
    fn new(
        py: Python<'_>,
        workers: usize,
        cpus: Option<Vec<usize>>,
        poll_us: u64,
        map_cache_bytes: usize,
        staging_dir: PathBuf,
        staging_bytes: u64,
    ) -> PyResult<Self> {
        if !(1..=256).contains(&workers) {
            return Err(Failure::usage(format!("workers: {workers} is not from 1 to 256")).into());
        }
        if !staging_bytes.is_power_of_two() || staging_bytes < MIN_STAGING_BYTES {
            let text = format!(
                "staging_bytes: {staging_bytes} is not a power of two from {MIN_STAGING_BYTES} up"
            );
            return Err(Failure::usage(text).into());
        }
        let cpus = cpus.filter(|cpus| !cpus.is_empty());
        let start = || -> Result<Shared, Failure> {
            make_private_directory(&staging_dir)?;
            let events = Arc::new(Events::new().map_err(os("make an eventfd"))?);
            let spawn = |index: usize| {
                let config = WorkerConfig {
                    index,
                    cpu: cpus.as_ref().map(|cpus| cpus[index % cpus.len()]),
                    poll: Duration::from_micros(poll_us),
                };
                let worker =
                    Worker::spawn(config, Arc::clone(&events), || UringIo::new(RING_ENTRIES));
                worker.map_err(os(format!("start worker {index}")))
            };
            let workers = (0..workers).map(spawn).collect::<Result<Vec<_>, _>>()?;
            Ok(Shared {
                workers,
                events,
                map_budget: Arc::new(MapBudget::new(map_cache_bytes)),
                staging_dir,
                staging_bytes,
                tables: Mutex::default(),
            })
        };
        Ok(Self {
            shared: Arc::new(py.detach(start)?),
        })
    }

    fn event_fd(&self) -> i32 {
        self.shared.events.fd()
    }

    fn take_events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for event in self.shared.events.take() {
            if let Some(dict) = self.event_dict(py, event)? {
                list.append(dict)?;
            }
        }
        Ok(list)
    }

    #[pyo3(signature = (path, *, direct = true))]
    fn open_device(&self, py: Python<'_>, path: PathBuf, direct: bool) -> PyResult<Device> {
        let open = || -> Result<_, Failure> {
            let device = Arc::new(DirectoryDevice::open(&path, direct)?);
            let id = self.shared.add_device(Arc::clone(&device))?;
            Ok(Device::new(Arc::clone(&self.shared), id, device))
        };
        Ok(py.detach(open)?)
    }

    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    #[pyo3(signature = (
        device, *, volume_uuid, name, size_bytes, logical_block_bytes, serial, previous_epoch, epoch,
        read_only, checkpoint, mapped_blocks, segments, uncatalogued, checkpoint_log_bytes = 256 << 20,
        parent = None, newest_snapshot = 0, state_note = Vec::new(), clone = false, limit_bytes = None,
        pause_when_full = false,
    ))]
    fn open_volume(
        &self,
        py: Python<'_>,
        device: &Device,
        volume_uuid: &[u8],
        name: String,
        size_bytes: u64,
        logical_block_bytes: u32,
        serial: &str,
        previous_epoch: u64,
        epoch: u64,
        read_only: bool,
        checkpoint: State,
        mapped_blocks: u64,
        segments: Vec<Row>,
        uncatalogued: Vec<u64>,
        checkpoint_log_bytes: u64,
        parent: Option<ParentSnapshot>,
        newest_snapshot: u64,
        state_note: Vec<u8>,
        clone: bool,
        limit_bytes: Option<u64>,
        pause_when_full: bool,
    ) -> PyResult<Volume> {
        let volume = uuid(volume_uuid, "volume_uuid")?;
        check_shape(&name, size_bytes, logical_block_bytes)?;
        if !read_only && epoch <= previous_epoch {
            let text =
                format!("volume '{name}': epoch {epoch} is not greater than {previous_epoch}");
            return Err(Failure::usage(text).into());
        }
        let serial = serial_bytes(serial)?;
        if !Arc::ptr_eq(&device.shared, &self.shared) {
            return Err(Failure::usage("the device was opened by another engine").into());
        }
        let open = device.open()?;
        let superblock = open.superblock();
        let staging_path = self
            .shared
            .staging_dir
            .join(superblock.pool.to_string())
            .join(volume.to_string());
        let spec = VolumeSpec {
            device: device.id,
            pool: superblock.pool,
            volume,
            name,
            size_bytes,
            logical_block_bytes,
            segment_bytes: superblock.segment_bytes,
            previous_epoch: Epoch(previous_epoch),
            epoch: Epoch(epoch),
            read_only,
            checkpoint: checkpoint.parse()?,
            mapped_blocks,
            segments: segments
                .into_iter()
                .map(Row::parse)
                .collect::<Result<_, _>>()?,
            uncatalogued: uncatalogued.into_iter().map(SegmentNumber).collect(),
            numbers: Arc::clone(open.numbers()),
            staging_path,
            staging_bytes: self.shared.staging_bytes,
            map_budget: Arc::clone(&self.shared.map_budget),
            checkpoint_log_bytes,
            parent: parent.map(ParentSnapshot::parse).transpose()?,
            newest_snapshot: Address::from_bits(newest_snapshot),
            state_note,
            clone,
            limit_bytes,
            pause_when_full,
        };
        let began = Instant::now();
        let (opened, recovery, found) =
            py.detach(|| self.shared.open_volume(&open, spec, serial))?;
        let seconds = began.elapsed().as_secs_f64();
        Ok(Volume::new(
            opened,
            recovery_dict(py, &recovery, &found, seconds)?.unbind(),
        ))
    }

    #[pyo3(signature = (device, *, old, new, start = 0, end = MAX_VOLUME_BYTES, limit = 65536))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    #[expect(clippy::unused_self, reason = "a method in Python")]
    fn difference(
        &self,
        py: Python<'_>,
        device: &Device,
        old: &[u8],
        new: &[u8],
        start: u64,
        end: u64,
        limit: usize,
    ) -> PyResult<roots::Ranges> {
        roots::difference(py, device, old, new, start..end, limit)
    }

    #[pyo3(signature = (device, *, root, others))]
    #[expect(clippy::unused_self, reason = "a method in Python")]
    fn exclusive(
        &self,
        py: Python<'_>,
        device: &Device,
        root: &[u8],
        others: Vec<Vec<u8>>,
    ) -> PyResult<(u64, u64)> {
        roots::exclusive(py, device, root, &others)
    }

    #[pyo3(signature = (volume, *, root, others))]
    #[expect(clippy::unused_self, reason = "a method in Python")]
    fn release_exclusive(
        &self,
        py: Python<'_>,
        volume: &Volume,
        root: &[u8],
        others: Vec<Vec<u8>>,
    ) -> PyResult<(u64, u64)> {
        roots::release_exclusive(py, volume, root, &others)
    }

    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    #[pyo3(signature = (
        device, *, volume_uuid, name, size_bytes, logical_block_bytes, epoch, segments, snapshots,
        rollbacks, unmaps, origin = Vec::new(),
    ))]
    fn rebuild_volume<'py>(
        &self,
        py: Python<'py>,
        device: &Device,
        volume_uuid: &[u8],
        name: String,
        size_bytes: u64,
        logical_block_bytes: u32,
        epoch: u64,
        segments: Vec<u64>,
        snapshots: Vec<(Vec<u8>, u64)>,
        rollbacks: Vec<(u64, u64)>,
        unmaps: Vec<(u64, u32, u64)>,
        origin: Vec<u8>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let volume = uuid(volume_uuid, "volume_uuid")?;
        check_shape(&name, size_bytes, logical_block_bytes)?;
        if !Arc::ptr_eq(&device.shared, &self.shared) {
            return Err(Failure::usage("the device was opened by another engine").into());
        }
        if self.shared.device_of(volume).is_some() {
            let text = format!("volume '{name}' is open; close it first");
            return Err(Failure::new(Kind::Busy, text).into());
        }
        let request = rebuild::Request {
            device: device.id,
            volume,
            name,
            size_bytes,
            logical_block_bytes,
            epoch,
            segments,
            snapshots,
            rollbacks,
            unmaps,
            origin,
            map_cache_bytes: self.shared.map_budget.share_bytes(),
        };
        let rebuilt = rebuild::run(py, &device.open()?, request)?;
        rebuild::dict(py, &rebuilt)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| {
            self.shared
                .workers
                .iter()
                .map(|worker| worker.stats())
                .collect::<Result<Vec<_>, _>>()
        });
        let workers = PyList::empty(py);
        for (index, stats) in stats.map_err(Failure::from)?.iter().enumerate() {
            let dict = PyDict::new(py);
            dict.set_item("index", index)?;
            dict.set_item("requests", stats.requests)?;
            dict.set_item("refused", stats.refused)?;
            dict.set_item("failed", stats.failed)?;
            dict.set_item("notifications", stats.notifications)?;
            dict.set_item("kicks", stats.kicks)?;
            dict.set_item("sleeps", stats.sleeps)?;
            dict.set_item("rings_broken", stats.rings_broken)?;
            workers.append(dict)?;
        }
        let dict = PyDict::new(py);
        dict.set_item("workers", workers)?;
        dict.set_item("volumes", self.shared.tables().volumes.len())?;
        dict.set_item("events_dropped", self.shared.events.dropped())?;
        Ok(dict)
    }

    fn shutdown(&self, py: Python<'_>) {
        py.detach(|| self.shared.workers.iter().for_each(Worker::shutdown));
        // They went with their workers.
        self.shared.tables().volumes.clear();
    }
}

impl Engine {
    /// None: an event of a volume that has been closed since.
    fn event_dict<'py>(
        &self,
        py: Python<'py>,
        event: Event<VolumeEvent>,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let dict = PyDict::new(py);
        let (volume, event) = match event {
            Event::RingBroken {
                export,
                queue,
                reason,
            } => {
                dict.set_item("kind", "ring-broken")?;
                dict.set_item("export", export)?;
                dict.set_item("queue", queue)?;
                dict.set_item("reason", reason)?;
                return Ok(Some(dict));
            }
            Event::MemoryLost { export, reason } => {
                dict.set_item("kind", "memory-lost")?;
                dict.set_item("export", export)?;
                dict.set_item("reason", reason)?;
                return Ok(Some(dict));
            }
            Event::Volume { volume, event } => (volume, event),
        };
        let Some(device) = self.shared.device_of(volume) else {
            return Ok(None);
        };
        dict.set_item("volume", PyBytes::new(py, &volume.0))?;
        dict.set_item("device", device)?;
        let kind = match event {
            VolumeEvent::CheckpointWanted => "checkpoint-wanted",
            VolumeEvent::NumbersWanted => "segment-numbers-wanted",
            VolumeEvent::DeviceFailed { reason } => {
                dict.set_item("reason", reason)?;
                "device-failed"
            }
            VolumeEvent::DeviceFull => "device-full",
            VolumeEvent::StagingFull { reason } => {
                dict.set_item("reason", reason)?;
                "staging-full"
            }
            VolumeEvent::SpaceBack => "device-space-back",
            VolumeEvent::VolumeFull { limit_bytes } => {
                dict.set_item("limit_bytes", limit_bytes)?;
                "volume-full"
            }
            VolumeEvent::VolumeSpaceBack => "volume-space-back",
            VolumeEvent::ReclaimFailed { reason } => {
                dict.set_item("reason", reason)?;
                "reclaim-failed"
            }
            VolumeEvent::Corruption {
                offset_bytes,
                len_bytes,
                segment,
                reason,
            } => {
                dict.set_item("offset_bytes", offset_bytes)?;
                dict.set_item("len_bytes", len_bytes)?;
                dict.set_item("segment", segment.0)?;
                dict.set_item("reason", reason)?;
                "corruption"
            }
        };
        dict.set_item("kind", kind)?;
        Ok(Some(dict))
    }
}

/// Sizes that a volume can have.
pub fn check_shape(name: &str, size_bytes: u64, logical_block_bytes: u32) -> Result<(), Failure> {
    if !matches!(logical_block_bytes, 512 | 4096) {
        return Err(Failure::usage(format!(
            "volume '{name}': a logical block of {logical_block_bytes} bytes is neither 512 nor 4096"
        )));
    }
    if size_bytes == 0
        || size_bytes > MAX_VOLUME_BYTES
        || !size_bytes.is_multiple_of(logical_block_bytes.into())
    {
        return Err(Failure::usage(format!(
            "volume '{name}': {size_bytes} bytes are not whole logical blocks of {logical_block_bytes} bytes, \
             at most {MAX_VOLUME_BYTES}"
        )));
    }
    Ok(())
}

fn recovery_dict<'py>(
    py: Python<'py>,
    recovery: &Recovery,
    found: &[FoundSnapshot],
    seconds: f64,
) -> PyResult<Bound<'py, PyDict>> {
    let clean = recovery.records == 0 && recovery.staged_bytes == 0 && recovery.warnings.is_empty();
    let dict = PyDict::new(py);
    dict.set_item("clean", clean)?;
    dict.set_item("records", recovery.records)?;
    dict.set_item("staged_bytes", recovery.staged_bytes)?;
    dict.set_item("segments_scanned", recovery.scanned)?;
    dict.set_item("warnings", recovery.warnings.clone())?;
    dict.set_item("seconds", seconds)?;
    let found = found.iter().map(|found| found_dict(py, found));
    dict.set_item("snapshots", found.collect::<PyResult<Vec<_>>>()?)?;
    Ok(dict)
}
