//! A volume with a catalog and an exact model beside it, over any `Io`.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod catalog;
pub mod history;
pub mod oracle;

pub use catalog::Catalog;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vhostd_engine::device::SegmentNumbers;
use vhostd_engine::io::{AlignedBuf, DeviceId, Io, IoBuf};
use vhostd_engine::log::Recovery;
use vhostd_engine::types::{Address, SegmentNumber, Uuid};
use vhostd_engine::volume::{
    self, CheckpointResult, Finished, MapBudget, NewSnapshot, NotedAt, Now, Request, RequestFailed,
    RequestId, RequestKind, Volume, VolumeError, VolumeEvent, VolumeSpec, roots,
};

pub const SECTOR: u64 = 512;
pub const POOL: Uuid = Uuid([1; 16]);
pub const VOLUME: Uuid = Uuid([2; 16]);
/// Payload of state notes; the engine does not look into it.
const STATE: &[u8] = b"{}";

/// A small deterministic generator (xorshift64*), so that a seed tells everything.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// How a test volume is set up.
#[derive(Clone, Debug)]
pub struct Setup {
    pub size_bytes: u64,
    pub segment_bytes: u64,
    pub staging_bytes: u64,
    pub map_bytes: usize,
    pub checkpoint_log_bytes: u64,
    pub staging_path: PathBuf,
    /// Gets each state of the catalog as it is committed.
    pub mirror: Option<Arc<Mutex<Catalog>>>,
}

impl Setup {
    pub fn small(staging_path: PathBuf) -> Self {
        Self {
            size_bytes: 64 << 20,
            segment_bytes: 1 << 20,
            staging_bytes: 1 << 20,
            map_bytes: 1 << 20,
            checkpoint_log_bytes: 4 << 20,
            staging_path,
            mirror: None,
        }
    }

    fn publish(&self, catalog: &Catalog) {
        if let Some(mirror) = &self.mirror {
            mirror.lock().expect("one thread").clone_from(catalog);
        }
    }
}

/// An open volume and what drives it.
pub struct Harness<'a> {
    pub io: &'a mut dyn Io,
    pub volume: Volume,
    pub recovery: Recovery,
    pub catalog: Catalog,
    pub numbers: Arc<SegmentNumbers>,
    pub events: Vec<VolumeEvent>,
    pub clock_ns: u64,
    pub finished: Vec<Finished>,
    setup: Setup,
    next_id: u64,
}

impl<'a> Harness<'a> {
    /// Opens the volume, giving recovery the segments that `on_device` lists.
    pub fn open(
        io: &'a mut dyn Io,
        setup: &Setup,
        mut catalog: Catalog,
        on_device: &[SegmentNumber],
    ) -> Result<Self, VolumeError> {
        let numbers = Arc::new(SegmentNumbers::new());
        // The high-water mark goes up in the catalog before numbers are used.
        let first = catalog.next_number;
        catalog.next_number += 100_000;
        numbers
            .grant(SegmentNumber(first), SegmentNumber(catalog.next_number))
            .expect("a fresh table takes any grant");
        let previous_epoch = catalog.epoch;
        catalog.epoch = previous_epoch.plus(1);
        setup.publish(&catalog);
        let spec = VolumeSpec {
            device: DeviceId(0),
            pool: POOL,
            volume: catalog.uuid,
            name: "test".into(),
            size_bytes: catalog.size_bytes,
            logical_block_bytes: 512,
            segment_bytes: setup.segment_bytes,
            previous_epoch,
            epoch: catalog.epoch,
            read_only: false,
            checkpoint: catalog.checkpoint,
            mapped_blocks: catalog.mapped_blocks,
            segments: catalog.rows.values().cloned().collect(),
            uncatalogued: on_device
                .iter()
                .copied()
                .filter(|number| !catalog.rows.contains_key(number))
                .collect(),
            numbers: Arc::clone(&numbers),
            staging_path: setup.staging_path.clone(),
            staging_bytes: setup.staging_bytes,
            map_budget: Arc::new(MapBudget::new(setup.map_bytes)),
            checkpoint_log_bytes: setup.checkpoint_log_bytes,
            parent: catalog.head_parent(),
            newest_snapshot: catalog.newest_snapshot(),
            state_note: STATE.to_vec(),
            clone: catalog.clone,
            limit_bytes: None,
            pause_when_full: false,
        };
        let (mut volume, recovery, found) = volume::open(spec, io)?;
        volume.attach(0);
        catalog.add_found(&found);
        setup.publish(&catalog);
        Ok(Self {
            io,
            volume,
            recovery,
            catalog,
            numbers,
            events: Vec::new(),
            clock_ns: 1,
            finished: Vec::new(),
            setup: setup.clone(),
            next_id: 0,
        })
    }

    pub fn now(&self) -> Now {
        Now {
            monotonic_ns: self.clock_ns,
            realtime_ns: 1_700_000_000_000_000_000 + self.clock_ns,
        }
    }

    pub fn submit(&mut self, kind: RequestKind, write_through: bool) -> RequestId {
        self.next_id += 1;
        let id = RequestId(self.next_id);
        let now = self.now();
        self.volume.submit(
            self.io,
            Request {
                id,
                kind,
                write_through,
            },
            now,
        );
        id
    }

    /// One turn of a worker's loop. `block`: sleep until something happens.
    pub fn turn(&mut self, block: bool) {
        let mut completions = Vec::new();
        let now = self.now();
        self.volume.advance(self.io, now);
        if block && self.io.in_flight() > 0 {
            self.io
                .wait(Some(Duration::from_millis(100)), &mut completions);
        } else {
            self.io.poll(&mut completions);
        }
        for completion in completions {
            self.volume.on_completion(self.io, completion, now);
        }
        self.volume.advance(self.io, now);
        self.volume.take_finished(&mut self.finished);
        self.volume.take_events(&mut self.events);
        self.clock_ns += 10_000;
    }

    pub fn wait_for(&mut self, id: RequestId) -> Result<(), RequestFailed> {
        loop {
            self.volume.take_finished(&mut self.finished);
            if let Some(at) = self.finished.iter().position(|finished| finished.id == id) {
                return self.finished.swap_remove(at).result;
            }
            self.turn(true);
        }
    }

    pub fn run(&mut self, kind: RequestKind, write_through: bool) -> Result<(), RequestFailed> {
        let id = self.submit(kind, write_through);
        self.wait_for(id)
    }

    pub fn write(&mut self, offset_bytes: u64, data: &[u8]) -> Result<(), RequestFailed> {
        let buffer = Memory::new(data);
        self.run(
            RequestKind::Write {
                offset_bytes,
                from: buffer.bufs(),
            },
            false,
        )
    }

    pub fn read(&mut self, offset_bytes: u64, len: usize) -> Result<Vec<u8>, RequestFailed> {
        let buffer = Memory::new(&vec![0xee; len]);
        self.run(
            RequestKind::Read {
                offset_bytes,
                into: buffer.bufs(),
            },
            false,
        )?;
        Ok(buffer.bytes())
    }

    pub fn flush(&mut self) -> Result<(), RequestFailed> {
        self.run(RequestKind::Flush, false)
    }

    pub fn unmap(&mut self, offset_bytes: u64, len: u64, exact: bool) -> Result<(), RequestFailed> {
        self.run(
            RequestKind::Unmap {
                offset_bytes,
                len_bytes: len,
                exact,
            },
            false,
        )
    }

    pub fn checkpoint(&mut self) -> Result<CheckpointResult, VolumeError> {
        self.checkpoint_released(None)
    }

    fn checkpoint_released(
        &mut self,
        released: Option<Uuid>,
    ) -> Result<CheckpointResult, VolumeError> {
        self.volume.start_checkpoint();
        let result = loop {
            self.turn(true);
            if let Some(result) = self.volume.take_checkpoint() {
                break result?;
            }
        };
        self.commit_released(&result, released);
        self.volume.checkpoint_committed(result.id);
        self.settle();
        Ok(result)
    }

    /// Puts a checkpoint into the catalog.
    pub fn commit(&mut self, result: &CheckpointResult) {
        self.commit_released(result, None);
    }

    pub fn commit_released(&mut self, result: &CheckpointResult, released: Option<Uuid>) {
        self.catalog.commit_released(result, released);
        self.setup.publish(&self.catalog);
    }

    /// Takes a snapshot, as the daemon does: the note first, then the row.
    pub fn snapshot(&mut self, uuid: Uuid) -> Result<Address, RequestFailed> {
        let (kind, at) = Self::snapshot_request(uuid);
        self.run(kind, false)?;
        let position = *at.get().expect("a snapshot that was taken has a position");
        let size_bytes = self.catalog.size_bytes;
        self.catalog.add_snapshot(uuid, position, size_bytes);
        self.publish();
        Ok(position)
    }

    pub fn snapshot_request(uuid: Uuid) -> (RequestKind, NotedAt) {
        let at = NotedAt::default();
        let snapshot = NewSnapshot {
            uuid,
            name: uuid.to_string(),
            created_ns: 1,
        };
        let kind = RequestKind::Snapshot {
            snapshot,
            at: Arc::clone(&at),
        };
        (kind, at)
    }

    /// Frees the space of one snapshot that is being removed, the way of ARCHITECTURE.md. `walk`: a
    /// queue of its own on the same disk. False: none can be.
    pub fn release_next(&mut self, walk: &mut dyn Io) -> Result<bool, VolumeError> {
        let Some(uuid) = self.catalog.next_to_release() else {
            return Ok(false);
        };
        let pending = |harness: &Self| {
            harness
                .catalog
                .snapshot(uuid)
                .is_some_and(|r| r.root.is_none())
        };
        if pending(self) {
            self.checkpoint()?;
        }
        self.begin_release(uuid);
        self.checkpoint()?;
        self.walk_released(uuid, walk);
        self.checkpoint_released(Some(uuid))?;
        Ok(true)
    }

    /// The head leaves the snapshot; then a checkpoint is to be committed, and [`Self::walk_released`].
    pub fn begin_release(&mut self, uuid: Uuid) {
        if self.catalog.leave(uuid) {
            self.publish();
            self.volume.set_parent(self.catalog.head_parent());
        }
        self.volume.hold_nodes();
    }

    /// Marks dead what the snapshot alone reaches; a checkpoint that forgets it is to be committed.
    pub fn walk_released(&mut self, uuid: Uuid, walk: &mut dyn Io) {
        let row = self.catalog.snapshot(uuid).expect("it is being removed");
        let root = row.root.expect("a checkpoint was committed");
        let others = self.catalog.neighbours(uuid);
        let volume = &mut self.volume;
        let walked = roots::exclusive(walk, DeviceId(0), root, &others, |blocks| {
            volume.release(&blocks, &[]);
        });
        let (_, nodes) = walked.expect("the nodes of committed roots can be read");
        self.volume.release(&[], &nodes);
        self.volume.release_nodes();
    }

    pub fn publish(&self) {
        self.setup.publish(&self.catalog);
    }

    /// Takes turns until nothing is in flight.
    pub fn settle(&mut self) {
        self.turn(false);
        while self.io.in_flight() > 0 {
            self.turn(true);
        }
    }

    /// Closes the volume and gives the catalog back.
    pub fn close(mut self) -> Result<Catalog, VolumeError> {
        self.volume.start_close(self.io);
        let result = loop {
            self.turn(true);
            if let Some(result) = self.volume.take_closed() {
                break result?;
            }
        };
        if let Some(result) = result {
            self.commit(&result);
            self.volume.checkpoint_committed(result.id);
        }
        while !self.volume.is_closed() {
            self.turn(true);
        }
        Ok(self.catalog)
    }
}

/// Memory that a request may use, split in uneven parts as a guest's might be.
pub struct Memory {
    buffer: AlignedBuf,
    len: usize,
}

impl Memory {
    pub fn new(data: &[u8]) -> Self {
        let mut buffer = AlignedBuf::new(data.len().max(1));
        buffer[..data.len()].copy_from_slice(data);
        Self {
            buffer,
            len: data.len(),
        }
    }

    pub fn bufs(&self) -> Vec<IoBuf> {
        // SAFETY: the tests keep the memory until the request has finished.
        let whole = unsafe { self.buffer.io_buf() };
        let first = (self.len / 3)
            .next_multiple_of(SECTOR as usize)
            .min(self.len);
        [whole.slice(0, first), whole.slice(first, self.len - first)]
            .into_iter()
            .filter(|buf| !buf.is_empty())
            .collect()
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.buffer[..self.len].to_vec()
    }
}

/// Contents of a volume, sector by sector: a stamp, or 0 for zeroes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    sectors: BTreeMap<u64, u64>,
}

impl Model {
    /// Bytes that stamp `stamp` writes to sector `sector`.
    pub fn sector_bytes(sector: u64, stamp: u64) -> Vec<u8> {
        if stamp == 0 {
            return vec![0; SECTOR as usize];
        }
        let mut rng = Rng::new(stamp ^ sector.rotate_left(32));
        (0..SECTOR / 8)
            .flat_map(|_| rng.next().to_le_bytes())
            .collect()
    }

    pub fn bytes(&self, offset_bytes: u64, len: usize) -> Vec<u8> {
        let first = offset_bytes / SECTOR;
        (first..first + len as u64 / SECTOR)
            .flat_map(|s| Self::sector_bytes(s, self.sectors.get(&s).copied().unwrap_or(0)))
            .collect()
    }

    pub fn write(&mut self, offset_bytes: u64, len: usize, stamp: u64) {
        for sector in offset_bytes / SECTOR..(offset_bytes + len as u64) / SECTOR {
            if stamp == 0 {
                self.sectors.remove(&sector);
            } else {
                self.sectors.insert(sector, stamp);
            }
        }
    }

    pub fn stamped(offset_bytes: u64, len: usize, stamp: u64) -> Vec<u8> {
        let first = offset_bytes / SECTOR;
        (first..first + len as u64 / SECTOR)
            .flat_map(|s| Self::sector_bytes(s, stamp))
            .collect()
    }

    /// Sectors that are not zero.
    pub fn sectors(&self) -> impl Iterator<Item = u64> {
        self.sectors.keys().copied()
    }
}
