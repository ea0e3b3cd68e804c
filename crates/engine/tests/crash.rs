//! Crashes of the real engine on a simulated disk, against an exact model.
//!
//! One seed tells everything. A few volumes, clones of each other's snapshots, take turns at being open.
//! The open one is driven with random writes, writes of zeroes, discards, write-zeroes, flushes, reads,
//! snapshots, removals of snapshots, checkpoints and reclaim; at a random moment power fails (unsynced
//! sectors are kept, lost or torn, each by itself, and the staging memory is gone) or the daemon dies (the
//! staging memory stays), in the middle of whatever is under way. Then the volume is recovered and held
//! against its history (`common::history`):
//!
//! - the head is what the volume was after some number of changes, at least all acknowledged ones after
//!   the daemon's death, and all that a completed flush or snapshot covers after a loss of power (2, 3);
//! - every snapshot that was acknowledged is there with what it held, whatever was done since (2, 6);
//! - every block is read, against its checksum (5, 6);
//! - walks over all roots find no block or node dead that is reached, and none live that is not (6, 7);
//! - the difference of two roots names all that differs.
//!
//! `VHOSTD_CRASHES=N` sets how many crashes are tried, `VHOSTD_SEED=S` where the seeds start;
//! `VHOSTD_SEEDS=a..b` runs just these seeds. Seeds that have found a defect are pinned at the end.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::ops::Range;
use std::path::{Path, PathBuf};

use common::history::{History, State, stamp_of, stamped};
use common::oracle::{check_difference, check_space, read_root};
use common::{Catalog, Harness, Memory, Rng, SECTOR, Setup};
use vhostd_engine::io::DeviceId;
use vhostd_engine::io::sim::{CrashMode, Fault, FaultRule, OpKind, SimDisk, SimIo, When};
use vhostd_engine::types::{SegmentNumber, Uuid};
use vhostd_engine::volume::{CheckpointResult, NotedAt, RequestId, RequestKind};

/// A little more than a leaf of the map covers.
const BLOCKS: u64 = 1072;
const VOLUME_BYTES: u64 = BLOCKS * 4096;
const SECTORS: usize = (VOLUME_BYTES / SECTOR) as usize;
/// Blocks that are written: around the ends of the first leaf. The others are only ever unmapped.
const PARTS: [Range<u64>; 2] = [0..56, 1000..BLOCKS];
/// A volume that was shrunk; then it may grow again.
const SMALL_BYTES: u64 = 1030 * 4096;
const SEGMENT_BYTES: u64 = 256 << 10;
const PIECE_BLOCKS: u64 = SEGMENT_BYTES / 4 / 4096;
const MOST_VOLUMES: usize = 3;
const MOST_SNAPSHOTS: usize = 6;

/// A volume, what its catalog says, and what it must be.
struct Disk {
    catalog: Catalog,
    history: History,
    /// The snapshot that it is a clone of.
    origin: Option<Uuid>,
    setup: Setup,
}

/// A request in flight that changes the volume, and how many changes it stands for.
struct Modification {
    id: RequestId,
    changes: usize,
    _memory: Option<Memory>,
}

/// A snapshot that is being taken.
struct Taking {
    id: RequestId,
    uuid: Uuid,
    at: NotedAt,
}

/// How far the freeing of a snapshot's space has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Release {
    /// The head has left it; the next checkpoint has a root after that.
    First(Uuid),
    /// What it alone reached is dead; the next checkpoint says so.
    Last(Uuid),
}

/// Why a volume is driven no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// A crash comes now.
    Crash,
    /// A request has failed, on a disk that may: what of it was done is not known, and after a crash it
    /// is there in part, as a prefix.
    Failed,
}

/// What is under way in the open volume.
#[derive(Default)]
struct Driving {
    modification: Option<Modification>,
    flushes: Vec<(RequestId, usize)>,
    taking: Option<Taking>,
    adopting: Option<RequestId>,
    checkpoint_running: bool,
    /// Whether the checkpoint that runs began after the release came to its stage.
    for_release: bool,
    uncommitted: Option<CheckpointResult>,
    release: Option<Release>,
}

struct Simulation {
    rng: Rng,
    disk: SimDisk,
    volumes: Vec<Disk>,
    next_stamp: u64,
    tally: Tally,
    /// The disk refuses something now and then.
    faulty: bool,
    /// It has, and what a failed sync has lost, recovery may speak of.
    may_warn: bool,
}

/// What has happened, so that a run shows that it was about something.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    crashes: u64,
    changes: u64,
    snapshots: u64,
    clones: u64,
    rollbacks: u64,
    checkpoints: u64,
    /// Snapshots whose space was freed.
    released: u64,
    punched_blocks: u64,
    /// Segments that went as nothing in them was live.
    segments_removed: u64,
    segments_made: u64,
    /// Lives that an error of the disk has ended.
    failures: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.crashes += other.crashes;
        self.changes += other.changes;
        self.snapshots += other.snapshots;
        self.clones += other.clones;
        self.rollbacks += other.rollbacks;
        self.checkpoints += other.checkpoints;
        self.released += other.released;
        self.punched_blocks += other.punched_blocks;
        self.segments_removed += other.segments_removed;
        self.segments_made += other.segments_made;
        self.failures += other.failures;
    }
}

impl Simulation {
    fn new(seed: u64, scratch: &Path) -> Self {
        let mut simulation = Self {
            rng: Rng::new(seed),
            disk: SimDisk::new(seed),
            volumes: Vec::new(),
            next_stamp: 0,
            tally: Tally::default(),
            faulty: seed.is_multiple_of(4),
            may_warn: false,
        };
        let staging = scratch.join(format!("staging-{seed}"));
        let mut setup = Setup::small(staging);
        setup.size_bytes = VOLUME_BYTES;
        setup.segment_bytes = SEGMENT_BYTES;
        setup.checkpoint_log_bytes = u64::MAX;
        simulation.add(Catalog::new(VOLUME_BYTES), vec![0; SECTORS], None, &setup);
        simulation
    }

    fn add(&mut self, catalog: Catalog, base: State, origin: Option<Uuid>, setup: &Setup) {
        let mut setup = setup.clone();
        let number = self.volumes.len();
        setup.staging_path.set_extension(number.to_string());
        self.volumes.push(Disk {
            catalog,
            history: History::new(base),
            origin,
            setup,
        });
    }

    fn fresh_uuid(&mut self) -> Uuid {
        self.next_stamp += 1;
        let mut bytes = [0x5a; 16];
        bytes[..8].copy_from_slice(&self.next_stamp.to_be_bytes());
        Uuid(bytes)
    }

    /// The catalog of a volume as its next opening takes it, and segments that may be its own.
    fn to_open(&self, number: usize) -> (Catalog, Vec<SegmentNumber>) {
        let mut catalog = self.volumes[number].catalog.clone();
        let next = self.volumes.iter().map(|disk| disk.catalog.next_number);
        catalog.next_number = next.max().unwrap_or(1);
        let others = |segment: &SegmentNumber| {
            let has = |disk: &Disk| disk.catalog.rows.contains_key(segment);
            self.volumes
                .iter()
                .enumerate()
                .any(|(i, disk)| i != number && has(disk))
        };
        let ours = |segment: &SegmentNumber| {
            let header = self.disk.identify(*segment);
            header.is_ok_and(|header| header.volume == catalog.uuid)
                || self.disk.identify(*segment).is_err()
        };
        let listed = self.disk.list().into_iter();
        let listed = listed.filter(|n| !others(n) && ours(n)).collect();
        (catalog, listed)
    }

    /// Opens a volume, drives it, and ends its life by a crash. Returns how, and what must be there.
    fn live_and_die(&mut self, number: usize) -> Result<(&'static str, usize), String> {
        let mut io = SimIo::new(self.rng.next());
        io.add_device(DeviceId(0), self.disk.clone());
        let (catalog, listed) = self.to_open(number);
        let setup = self.volumes[number].setup.clone();
        let mut harness = Harness::open(&mut io, &setup, catalog, &listed)
            .map_err(|error| format!("opening: {error}"))?;
        refuse_warnings(&harness)?;
        if self.faulty {
            self.add_faults();
        }
        let failed = self.drive(number, &mut harness)? == End::Failed;
        self.tally.failures += u64::from(failed);
        self.may_warn = failed;
        self.volumes[number].catalog = harness.catalog.clone();
        self.tally.changes += self.volumes[number].history.changes.len() as u64;
        self.tally.punched_blocks += harness.volume.stats().punched_bytes / 4096;
        let volume = harness.volume;
        let power_loss = self.rng.chance(2);
        let seed = self.rng.next();
        let history = &self.volumes[number].history;
        let outcome = if power_loss {
            let mode = match self.rng.below(4) {
                0 => CrashMode::LoseUnsynced,
                1 => CrashMode::KeepAll,
                _ => CrashMode::Random,
            };
            self.disk = self.disk.crash(mode, seed);
            ("power loss", history.flushed)
        } else {
            self.disk = self.disk.kill(seed);
            // A sync that has failed may have lost what was acknowledged and never flushed.
            let promised = if failed {
                history.flushed
            } else {
                history.acknowledged
            };
            ("the daemon's death", promised)
        };
        drop(io);
        drop(volume);
        if power_loss {
            self.forget_staging();
        }
        self.tally.crashes += 1;
        Ok(outcome)
    }

    /// Errors of the disk, each once in a few hundred operations. They end with the volume's life.
    fn add_faults(&self) {
        for (kind, errno) in [
            (OpKind::Write, libc::EIO),
            (OpKind::Write, libc::ENOSPC),
            (OpKind::Sync, libc::EIO),
            (OpKind::Create, libc::ENOSPC),
            (OpKind::Create, libc::EIO),
            (OpKind::Reserve, libc::ENOSPC),
            (OpKind::Release, libc::EIO),
            (OpKind::Remove, libc::EIO),
        ] {
            self.disk.add_fault(FaultRule {
                kind: Some(kind),
                segment: None,
                when: When::Probability(0.003),
                fault: Fault::Error(errno),
            });
        }
    }

    fn forget_staging(&self) {
        for disk in &self.volumes {
            let _ = std::fs::remove_file(&disk.setup.staging_path);
        }
    }

    /// An opening that dies before it has a staging ring of its own: right after its epoch was
    /// committed, or with all that recovery does done.
    fn interrupted_opening(&mut self, number: usize) -> Result<(), String> {
        let epochs = 1 + self.rng.below(2);
        if self.rng.chance(2) {
            let catalog = &mut self.volumes[number].catalog;
            catalog.epoch = catalog.epoch.plus(epochs);
            return Ok(());
        }
        let setup = self.volumes[number].setup.clone();
        let staged = std::fs::read(&setup.staging_path).ok();
        let mut io = SimIo::new(self.rng.next());
        io.add_device(DeviceId(0), self.disk.clone());
        let (catalog, listed) = self.to_open(number);
        let harness = Harness::open(&mut io, &setup, catalog, &listed)
            .map_err(|error| format!("interrupted opening: {error}"))?;
        self.volumes[number].catalog = harness.catalog.clone();
        let volume = harness.volume;
        let seed = self.rng.next();
        self.disk = self.disk.kill(seed);
        drop(io);
        drop(volume);
        let back = match staged {
            Some(staged) => std::fs::write(&setup.staging_path, staged),
            None => std::fs::remove_file(&setup.staging_path),
        };
        back.map_err(|error| format!("putting the staging file back: {error}"))
    }

    /// Opens a volume and holds it against its history, which it then is the base of. Leaves it closed,
    /// or as after the daemon's death.
    fn verify(&mut self, number: usize, least: usize, close: bool) -> Result<(), String> {
        let mut io = SimIo::new(self.rng.next());
        io.add_device(DeviceId(0), self.disk.clone());
        let (catalog, listed) = self.to_open(number);
        let setup = self.volumes[number].setup.clone();
        let mut harness = Harness::open(&mut io, &setup, catalog, &listed)
            .map_err(|error| format!("recovery: {error}"))?;
        if !std::mem::take(&mut self.may_warn) {
            refuse_warnings(&harness)?;
        }
        let head = read_state(&mut harness)?;
        let failed = |error| format!("a checkpoint after recovery: {error}");
        let pending = harness.catalog.readable().any(|row| row.root.is_none());
        let checkpoint = pending || self.rng.chance(3);
        if checkpoint {
            harness.checkpoint().map_err(failed)?;
            check_space(&self.disk, &harness.catalog)?;
        }
        let mut snapshots: Vec<(Uuid, State)> = Vec::new();
        let mut before = None;
        for row in harness.catalog.readable() {
            let root = row.root.expect("a checkpoint gave it one");
            let (mapped, size) = (row.mapped_blocks, row.size_bytes);
            let mut contents = read_root(&self.disk, &setup, root, mapped, size, &PARTS)?;
            contents.resize(SECTORS, 0);
            if let Some((old, place)) = before {
                let (_, old_state): &(Uuid, State) = &snapshots[place];
                check_difference(&self.disk, (old, old_state), (root, &contents))?;
            }
            before = Some((root, snapshots.len()));
            snapshots.push((row.uuid, contents));
        }
        if let (Some((old, place)), true) = (before, checkpoint) {
            let new = (harness.catalog.checkpoint.root, &head);
            check_difference(&self.disk, (old, &snapshots[place].1), new)?;
        }
        let history = &mut self.volumes[number].history;
        history.check(&head, least, &snapshots)?;
        history.settle(head, snapshots);
        if checkpoint && self.rng.chance(3) {
            let mut walk = SimIo::new(2);
            walk.add_device(DeviceId(0), self.disk.clone());
            while harness.release_next(&mut walk).map_err(failed)? {
                check_space(&self.disk, &harness.catalog)?;
            }
        }
        if self.rng.chance(10) {
            shrink(&mut harness, &mut self.volumes[number].history)?;
        }
        let catalog = if close {
            harness
                .close()
                .map_err(|error| format!("closing: {error}"))?
        } else {
            harness.settle();
            harness.catalog.clone()
        };
        self.volumes[number].catalog = catalog;
        Ok(())
    }

    /// What policy does with a volume that is closed.
    fn manage(&mut self, number: usize) -> Result<(), String> {
        let rooted = |disk: &Disk| -> Vec<Uuid> {
            let readable = disk.catalog.readable();
            readable.map(|row| row.uuid).collect()
        };
        let snapshots = rooted(&self.volumes[number]);
        if snapshots.is_empty() {
            return Ok(());
        }
        let chosen = snapshots[self.rng.below(snapshots.len() as u64) as usize];
        let fresh = self.fresh_uuid();
        if self.rng.chance(2) {
            let disk = &mut self.volumes[number];
            self.tally.rollbacks += 1;
            disk.catalog.roll_back(chosen, fresh);
            let base = disk.history.settled[&chosen].clone();
            let settled = std::mem::take(&mut disk.history.settled);
            disk.history.settle(base, settled.into_iter().collect());
        } else if self.volumes.len() < MOST_VOLUMES {
            let disk = &self.volumes[number];
            self.tally.clones += 1;
            let clone = disk.catalog.clone_of(chosen, fresh);
            let base = disk.history.settled[&chosen].clone();
            let setup = disk.setup.clone();
            self.add(clone, base, Some(chosen), &setup);
        }
        Ok(())
    }

    /// Drives the volume for a while.
    fn drive(&mut self, number: usize, harness: &mut Harness<'_>) -> Result<End, String> {
        let turns = 20 + self.rng.below(300);
        let mut driving = Driving::default();
        for _ in 0..turns {
            self.begin_something(number, harness, &mut driving);
            harness.turn(false);
            if self.rng.chance(100) {
                harness.clock_ns += 2_000_000_000;
            }
            if let Some(taking) = &driving.taking
                && taking.at.get().is_some()
            {
                self.volumes[number].history.noted(taking.uuid);
            }
            if let Some(end) = self.end_something(number, harness, &mut driving)? {
                return Ok(end);
            }
            if let Some(end) = self.commit_something(harness, &mut driving)? {
                return Ok(end);
            }
            if self.rng.chance(30) && driving.modification.is_none() {
                self.read_some(number, harness)?;
            }
        }
        Ok(End::Crash)
    }

    fn begin_something(&mut self, number: usize, harness: &mut Harness<'_>, now: &mut Driving) {
        if now.modification.is_none() && self.rng.chance(2) {
            now.modification = Some(self.submit_change(number, harness));
        }
        let history = &self.volumes[number].history;
        if now.flushes.len() < 3 && self.rng.chance(12) {
            let id = harness.submit(RequestKind::Flush, false);
            now.flushes.push((id, history.acknowledged));
        }
        if now.taking.is_none() && harness.catalog.size_bytes < VOLUME_BYTES && self.rng.chance(40)
        {
            // The catalog first: nothing is written where a reopened volume would end.
            harness.catalog.size_bytes = VOLUME_BYTES;
            harness.volume.resize(VOLUME_BYTES);
        }
        let readable = harness.catalog.readable().count();
        if now.taking.is_none() && readable < MOST_SNAPSHOTS && self.rng.chance(40) {
            let uuid = self.fresh_uuid();
            self.volumes[number].history.take(uuid);
            let (kind, at) = Harness::snapshot_request(uuid);
            let id = harness.submit(kind, false);
            now.taking = Some(Taking { id, uuid, at });
        }
        if readable > 0 && self.rng.chance(60) {
            self.begin_removal(number, harness);
        }
        if now.adopting.is_none() && harness.catalog.clone && self.rng.chance(60) {
            let kind = RequestKind::Adopt {
                offset_bytes: 0,
                len_bytes: harness.catalog.size_bytes,
                copied: Default::default(),
            };
            now.adopting = Some(harness.submit(kind, false));
        }
        self.begin_checkpoint(harness, now);
    }

    fn begin_removal(&mut self, number: usize, harness: &mut Harness<'_>) {
        let cloned = |uuid: &Uuid| self.volumes.iter().any(|disk| disk.origin == Some(*uuid));
        let rows = harness.catalog.readable().map(|row| row.uuid);
        let rows: Vec<Uuid> = rows.filter(|uuid| !cloned(uuid)).collect();
        if !rows.is_empty() {
            let chosen = rows[self.rng.below(rows.len() as u64) as usize];
            harness.catalog.begin_removal(chosen);
            self.volumes[number].history.forget(chosen);
        }
    }

    fn begin_checkpoint(&mut self, harness: &mut Harness<'_>, now: &mut Driving) {
        if now.checkpoint_running || now.uncommitted.is_some() {
            return;
        }
        // Under the commit lock: no snapshot is between its note and its row.
        if now.release.is_none()
            && now.taking.is_none()
            && self.rng.chance(20)
            && let Some(uuid) = harness.catalog.next_to_release()
            && harness
                .catalog
                .snapshot(uuid)
                .is_some_and(|row| row.root.is_some())
        {
            harness.begin_release(uuid);
            now.release = Some(Release::First(uuid));
        }
        let one_in = if now.release.is_some() { 8 } else { 40 };
        if self.rng.chance(one_in) {
            harness.volume.start_checkpoint();
            now.checkpoint_running = true;
            now.for_release = now.release.is_some();
        }
    }

    /// Takes what has finished.
    fn end_something(
        &mut self,
        number: usize,
        harness: &mut Harness<'_>,
        now: &mut Driving,
    ) -> Result<Option<End>, String> {
        let history = &mut self.volumes[number].history;
        for finished in std::mem::take(&mut harness.finished) {
            let id = finished.id;
            match finished.result {
                Ok(()) => {}
                Err(_) if self.faulty => return Ok(Some(End::Failed)),
                Err(why) => return Err(format!("request {id:?} failed: {why:?}")),
            }
            if let Some(done) = now.modification.take_if(|m| m.id == id) {
                history.acknowledged += done.changes;
            } else if let Some(at) = now.flushes.iter().position(|f| f.0 == id) {
                let covered = now.flushes.swap_remove(at).1;
                history.flushed = history.flushed.max(covered);
            } else if let Some(taken) = now.taking.take_if(|t| t.id == id) {
                history.promise(taken.uuid);
                self.tally.snapshots += 1;
                if self.rng.chance(8) {
                    // The row was not written yet; the note is enough.
                    return Ok(Some(End::Crash));
                }
                let position = *taken.at.get().expect("it has a position");
                let size_bytes = harness.catalog.size_bytes;
                harness
                    .catalog
                    .add_snapshot(taken.uuid, position, size_bytes);
            } else {
                now.adopting.take_if(|adopting| *adopting == id);
            }
        }
        Ok(None)
    }

    /// Commits a checkpoint that is ready, in its time.
    fn commit_something(
        &mut self,
        harness: &mut Harness<'_>,
        now: &mut Driving,
    ) -> Result<Option<End>, String> {
        if let Some(result) = harness.volume.take_checkpoint() {
            now.checkpoint_running = false;
            match result {
                Ok(result) => now.uncommitted = Some(result),
                // The one before still holds, and the next is as good.
                Err(_) if self.faulty => {}
                Err(error) => return Err(format!("a checkpoint failed: {error}")),
            }
            return Ok(None);
        }
        let free = now.taking.is_none() && self.rng.chance(4);
        let Some(result) = now.uncommitted.take_if(|_| free) else {
            return Ok(None);
        };
        let release = now.release.filter(|_| now.for_release);
        self.tally.checkpoints += 1;
        self.tally.segments_removed += result.removed.len() as u64;
        let known = |number| harness.catalog.rows.contains_key(number);
        let made = result.changed.iter().filter(|row| !known(&row.number));
        self.tally.segments_made += made.count() as u64;
        match release {
            Some(Release::Last(uuid)) => {
                harness.commit_released(&result, Some(uuid));
                self.tally.released += 1;
                now.release = None;
            }
            _ => harness.commit(&result),
        }
        check_space(&self.disk, &harness.catalog)?;
        if self.rng.chance(10) {
            return Ok(Some(End::Crash));
        }
        harness.volume.checkpoint_committed(result.id);
        if let Some(Release::First(uuid)) = release {
            let mut walk = SimIo::new(self.rng.next());
            walk.add_device(DeviceId(0), self.disk.clone());
            harness.walk_released(uuid, &mut walk);
            now.release = Some(Release::Last(uuid));
        }
        Ok(None)
    }

    /// Reads see what was acknowledged.
    fn read_some(&mut self, number: usize, harness: &mut Harness<'_>) -> Result<(), String> {
        let part = PARTS[self.rng.below(2) as usize].clone();
        let end = (part.end * 8).min(harness.catalog.size_bytes / SECTOR);
        let at = part.start * 8 + self.rng.below(end - part.start * 8 - 64);
        let bytes = harness
            .read(at * SECTOR, 64 * SECTOR as usize)
            .map_err(|why| format!("a read failed: {why:?}"))?;
        let state = self.volumes[number].history.now();
        for (sector, bytes) in (at..).zip(bytes.chunks_exact(SECTOR as usize)) {
            if stamp_of(sector, bytes) != Some(state[sector as usize]) {
                return Err(format!("a read of sector {sector} is wrong"));
            }
        }
        Ok(())
    }

    /// Submits one random change; the model gets its parts in the order in which the engine commits
    /// them.
    fn submit_change(&mut self, number: usize, harness: &mut Harness<'_>) -> Modification {
        let rng = &mut self.rng;
        let history = &mut self.volumes[number].history;
        let part = PARTS[rng.below(2) as usize].clone();
        let size = harness.catalog.size_bytes / SECTOR;
        let (first, last) = (part.start * 8, (part.end * 8).min(size));
        let mut from = first + rng.below(last - first);
        let most = if rng.chance(6) { 400 } else { 24 };
        let mut to = (from + 1 + rng.below(most)).min(last);
        if rng.chance(2) {
            from &= !7;
            to = to.next_multiple_of(8).min(last);
        }
        let before = history.changes.len();
        let kind = rng.below(10);
        if kind >= 2 {
            self.next_stamp += 1;
            // Some writes are of zeroes, which take no space.
            let stamp = if kind == 2 { 0 } else { self.next_stamp };
            let memory = Memory::new(&stamped(from, to, stamp));
            history.write(from, to, stamp, PIECE_BLOCKS);
            let kind = RequestKind::Write {
                offset_bytes: from * SECTOR,
                from: memory.bufs(),
            };
            return Modification {
                id: harness.submit(kind, false),
                changes: history.changes.len() - before,
                _memory: Some(memory),
            };
        }
        if rng.chance(8) {
            // Over what is never mapped, and over the leaf's end.
            (from, to) = (PARTS[0].end * 8 - 24, PARTS[1].start * 8 + 260);
        }
        let exact = kind == 0;
        history.unmap(from, to, exact);
        let kind = RequestKind::Unmap {
            offset_bytes: from * SECTOR,
            len_bytes: (to - from) * SECTOR,
            exact,
        };
        Modification {
            id: harness.submit(kind, false),
            changes: history.changes.len() - before,
            _memory: None,
        }
    }
}

impl Drop for Simulation {
    fn drop(&mut self) {
        self.forget_staging();
    }
}

/// Shrinks a volume that nobody uses: what goes reads as zeroes first, durably.
fn shrink(harness: &mut Harness<'_>, history: &mut History) -> Result<(), String> {
    let (from, size) = (SMALL_BYTES, harness.catalog.size_bytes);
    if from < size {
        let erased = harness.unmap(from, size - from, true);
        erased
            .and_then(|()| harness.flush())
            .map_err(|why| format!("shrinking: {why:?}"))?;
        history.base[(from / SECTOR) as usize..].fill(0);
        harness.catalog.size_bytes = from;
        harness.volume.resize(from);
    }
    Ok(())
}

fn refuse_warnings(harness: &Harness<'_>) -> Result<(), String> {
    let warnings = &harness.recovery.warnings;
    if warnings.is_empty() {
        Ok(())
    } else {
        Err(format!("recovery warns: {warnings:?}"))
    }
}

fn read_state(harness: &mut Harness<'_>) -> Result<State, String> {
    let mut state = vec![0; SECTORS];
    for part in PARTS {
        let end = (part.end * 4096).min(harness.catalog.size_bytes);
        let (offset, len) = (part.start * 4096, end - part.start * 4096);
        let bytes = harness
            .read(offset, len as usize)
            .map_err(|why| format!("reading at {offset}: {why:?}"))?;
        let first = offset / SECTOR;
        for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR as usize)) {
            let stamp = stamp_of(sector, bytes).ok_or(format!("sector {sector} is torn"))?;
            state[sector as usize] = stamp;
        }
    }
    Ok(state)
}

/// Runs one seed: a few lives of volumes, each ended by a crash. Returns what happened.
fn simulate(seed: u64, scratch: &Path) -> Result<Tally, String> {
    let mut simulation = Simulation::new(seed, scratch);
    let lives = 2 + simulation.rng.below(8);
    for life in 0..lives {
        let number = simulation.rng.below(simulation.volumes.len() as u64) as usize;
        one_life(&mut simulation, number)
            .map_err(|what| format!("life {life}, volume {number}: {what}"))?;
    }
    for number in 0..simulation.volumes.len() {
        simulation
            .verify(number, 0, true)
            .map_err(|what| format!("at the end, volume {number}: {what}"))?;
    }
    Ok(simulation.tally)
}

fn one_life(simulation: &mut Simulation, number: usize) -> Result<(), String> {
    let (how, least) = simulation.live_and_die(number)?;
    if simulation.rng.chance(3) {
        simulation.interrupted_opening(number)?;
    }
    let close = simulation.rng.chance(2);
    simulation
        .verify(number, least, close)
        .map_err(|what| format!("after {how}: {what}"))?;
    if close && simulation.rng.chance(2) {
        simulation.manage(number)?;
    }
    Ok(())
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Where the staging files go: memory, as in production, where there is some.
fn scratch(name: &str) -> PathBuf {
    let (memory, temporary) = (Path::new("/dev/shm"), std::env::temp_dir());
    let base = if memory.is_dir() { memory } else { &temporary };
    let path = base.join(format!("vhostd-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// A sync fails, the daemon dies, and power fails after the recovery: what recovery saw in the page
/// cache, and sealed with a footer, was never on the device.
#[test]
fn what_a_failed_sync_left_in_the_cache_only_is_written_again_by_recovery() {
    let scratch = scratch("pinned");
    for seed in [1008, 1132, 1192, 2092] {
        if let Err(what) = simulate(seed, &scratch) {
            panic!("VHOSTD_SEEDS={seed}..{}: {what}", seed + 1);
        }
    }
    let _ = std::fs::remove_dir_all(&scratch);
}

/// A removal is interrupted after the head has left the snapshot and replaced nodes of it; their segment
/// goes, and the removal that starts again has to find the rest without them.
#[test]
fn removal_that_starts_again_frees_what_lies_beside_nodes_that_are_gone() {
    let scratch = scratch("pinned-removal");
    if let Err(what) = simulate(7480, &scratch) {
        panic!("VHOSTD_SEEDS=7480..7481: {what}");
    }
    let _ = std::fs::remove_dir_all(&scratch);
}

#[test]
fn every_crash_leaves_a_prefix_with_all_that_was_promised() {
    let scratch = scratch("crash");
    let range = std::env::var("VHOSTD_SEEDS").ok().and_then(|range| {
        let (first, end) = range.split_once("..")?;
        Some((first.parse::<u64>().ok()?, end.parse::<u64>().ok()?))
    });
    let (first, end) = range.unwrap_or((number("VHOSTD_SEED").unwrap_or(1), u64::MAX));
    let wanted = match range {
        Some(_) => u64::MAX,
        None => number("VHOSTD_CRASHES").unwrap_or(3000),
    };
    let (mut seed, mut tally) = (first, Tally::default());
    while tally.crashes < wanted && seed < end {
        match simulate(seed, &scratch) {
            Ok(happened) => tally.add(happened),
            Err(what) => panic!("VHOSTD_SEEDS={seed}..{}: {what}", seed + 1),
        }
        seed += 1;
    }
    println!("seeds {first}..{seed}: {tally:?}");
    let _ = std::fs::remove_dir_all(&scratch);
}
