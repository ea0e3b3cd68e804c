//! Crashes of the real engine on a simulated disk, against an exact model.
//!
//! One seed tells everything. A volume is driven with random writes, discards, write-zeroes, flushes,
//! reads and checkpoints; at a random moment power fails (unsynced sectors are kept, lost or torn, each
//! by itself, and the staging memory is gone) or the daemon dies (the staging memory stays). Then the
//! volume is recovered and must be what the model was after some number of changes:
//!
//! - after the daemon's death, at least all acknowledged ones (design.md, invariant 2);
//! - after power loss, at least all that a completed flush covers (2);
//! - and in any case exactly a prefix of them, in order (3).
//!
//! `VHOSTD_CRASHES=N` sets how many crashes are tried, `VHOSTD_SEED=S` where the seeds start.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use common::{Catalog, Harness, Memory, Rng, SECTOR, Setup};
use vhostd_engine::io::DeviceId;
use vhostd_engine::io::sim::{CrashMode, SimDisk, SimIo};
use vhostd_engine::volume::{RequestId, RequestKind};

const VOLUME_BYTES: u64 = 8 << 20;
const SECTORS: usize = (VOLUME_BYTES / SECTOR) as usize;
const LEAF_SECTORS: u64 = 1024 * 8;

/// Stamp of each sector; 0 is zeroes.
type State = Vec<u64>;

/// A change of the volume that is all or nothing.
#[derive(Clone, Debug)]
struct Change {
    from: u64,
    to: u64,
    stamp: u64,
}

/// The history that a recovered volume is held against.
struct History {
    /// The state that all changes build on.
    base: State,
    changes: VecDeque<Change>,
    /// Changes that a completed flush covers, and acknowledged ones.
    flushed: usize,
    acknowledged: usize,
}

impl History {
    fn apply(state: &mut State, change: &Change) {
        state[change.from as usize..change.to as usize].fill(change.stamp);
    }

    /// Finds the number of changes, at least `least`, after which the volume was as `found`.
    fn prefix(&self, found: &State, least: usize) -> Option<usize> {
        let mut state = self.base.clone();
        for (count, change) in self.changes.iter().enumerate() {
            if count >= least && state == *found {
                return Some(count);
            }
            Self::apply(&mut state, change);
        }
        (state == *found).then_some(self.changes.len())
    }

    fn now(&self) -> State {
        let mut state = self.base.clone();
        self.changes
            .iter()
            .for_each(|change| Self::apply(&mut state, change));
        state
    }
}

fn sector_bytes(sector: u64, stamp: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    if stamp != 0 {
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = stamp.rotate_left(i as u32) ^ sector.wrapping_mul(i as u64);
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

/// The stamp that sector `sector` carries, if its bytes are whole.
fn stamp_of(sector: u64, bytes: &[u8]) -> Option<u64> {
    let stamp = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    (sector_bytes(sector, stamp) == *bytes).then_some(stamp)
}

fn read_state(harness: &mut Harness<'_>) -> Result<State, String> {
    let mut state = Vec::with_capacity(SECTORS);
    let step = 1 << 20;
    for offset in (0..VOLUME_BYTES).step_by(step) {
        let bytes = harness
            .read(offset, step)
            .map_err(|why| format!("reading at {offset}: {why:?}"))?;
        for (i, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
            let number = offset / SECTOR + i as u64;
            let stamp = stamp_of(number, sector).ok_or(format!("sector {number} is torn"))?;
            state.push(stamp);
        }
    }
    Ok(state)
}

/// A request in flight that changes the volume, and how many changes it stands for.
struct Modification {
    id: RequestId,
    changes: usize,
    _memory: Option<Memory>,
}

struct Simulation {
    rng: Rng,
    history: History,
    next_stamp: u64,
}

impl Simulation {
    /// Submits one random change; the model gets its parts in the order in which the engine commits
    /// them.
    fn submit_change(&mut self, harness: &mut Harness<'_>) -> Modification {
        let rng = &mut self.rng;
        let sectors = SECTORS as u64;
        // Some places are hot, so that records overwrite each other.
        let start = if rng.chance(2) {
            rng.below(256)
        } else {
            rng.below(sectors)
        };
        let most = if rng.chance(6) { 1200 } else { 24 };
        let mut from = start;
        let mut to = (start + 1 + rng.below(most)).min(sectors);
        if rng.chance(2) {
            from &= !7;
            to = to.next_multiple_of(8).min(sectors);
        }
        let (offset_bytes, len_bytes) = (from * SECTOR, (to - from) * SECTOR);
        let before = self.history.changes.len();
        let kind = rng.below(8);
        if kind >= 2 {
            self.next_stamp += 1;
            let stamp = self.next_stamp;
            let data: Vec<u8> = (from..to).flat_map(|s| sector_bytes(s, stamp)).collect();
            let memory = Memory::new(&data);
            // Pieces: a write is split where a record or a small segment ends.
            let piece = 64 * 8;
            let mut at = from;
            while at < to {
                let end = ((at / 8 * 8) + piece).min(to);
                self.history.changes.push_back(Change {
                    from: at,
                    to: end,
                    stamp,
                });
                at = end;
            }
            let id = harness.submit(
                RequestKind::Write {
                    offset_bytes,
                    from: memory.bufs(),
                },
                false,
            );
            let changes = self.history.changes.len() - before;
            return Modification {
                id,
                changes,
                _memory: Some(memory),
            };
        }
        let exact = kind == 0;
        let (inner_from, inner_to) = (from.next_multiple_of(8), to & !7);
        let mut push = |from: u64, to: u64| {
            if from < to {
                self.history
                    .changes
                    .push_back(Change { from, to, stamp: 0 });
            }
        };
        let mut at = inner_from;
        while at < inner_to {
            let end = ((at / LEAF_SECTORS + 1) * LEAF_SECTORS).min(inner_to);
            push(at, end);
            at = end;
        }
        if exact && inner_from > inner_to {
            push(from, to);
        } else if exact {
            push(from, inner_from);
            push(inner_to, to);
        }
        let id = harness.submit(
            RequestKind::Unmap {
                offset_bytes,
                len_bytes,
                exact,
            },
            false,
        );
        Modification {
            id,
            changes: self.history.changes.len() - before,
            _memory: None,
        }
    }

    /// Drives the volume for a while; returns how the checkpoint stood.
    fn drive(&mut self, harness: &mut Harness<'_>) -> Result<(), String> {
        let turns = 20 + self.rng.below(400);
        let mut modification: Option<Modification> = None;
        let mut flushes: Vec<(RequestId, usize)> = Vec::new();
        let mut uncommitted = None;
        let mut checkpoint_running = false;
        for _ in 0..turns {
            if modification.is_none() && self.rng.chance(2) {
                modification = Some(self.submit_change(harness));
            }
            if flushes.len() < 3 && self.rng.chance(12) {
                let id = harness.submit(RequestKind::Flush, false);
                flushes.push((id, self.history.acknowledged));
            }
            if !checkpoint_running && uncommitted.is_none() && self.rng.chance(40) {
                harness.volume.start_checkpoint();
                checkpoint_running = true;
            }
            harness.turn(false);
            if self.rng.chance(200) {
                harness.clock_ns += 2_000_000_000;
            }
            for finished in std::mem::take(&mut harness.finished) {
                if modification.as_ref().is_some_and(|m| m.id == finished.id) {
                    finished
                        .result
                        .map_err(|why| format!("a write failed: {why:?}"))?;
                    self.history.acknowledged += modification.take().unwrap().changes;
                } else if let Some(at) = flushes.iter().position(|f| f.0 == finished.id) {
                    finished
                        .result
                        .map_err(|why| format!("a flush failed: {why:?}"))?;
                    let covered = flushes.swap_remove(at).1;
                    self.history.flushed = self.history.flushed.max(covered);
                }
            }
            if let Some(result) = harness.volume.take_checkpoint() {
                checkpoint_running = false;
                let result = result.map_err(|error| format!("a checkpoint failed: {error}"))?;
                uncommitted = Some(result);
            } else if let Some(result) = uncommitted.take_if(|_| self.rng.chance(4)) {
                // A crash may come before or after this, and between the two steps.
                harness.commit(&result);
                if self.rng.chance(10) {
                    break;
                }
                harness.volume.checkpoint_committed(result.id);
            }
            if self.rng.chance(30) && modification.is_none() {
                // Reads see what was acknowledged.
                let at = self.rng.below(SECTORS as u64 - 64);
                let bytes = harness
                    .read(at * SECTOR, 64 * SECTOR as usize)
                    .map_err(|why| format!("a read failed: {why:?}"))?;
                let state = self.history.now();
                for (i, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
                    let number = at + i as u64;
                    if stamp_of(number, sector) != Some(state[number as usize]) {
                        return Err(format!("a read of sector {number} is wrong"));
                    }
                }
            }
        }
        Ok(())
    }
}

struct Staging(PathBuf);

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// An opening that dies before it has a staging ring of its own: right after its epoch was committed,
/// or with all that recovery does done.
fn interrupted_opening(
    rng: &mut Rng,
    setup: &Setup,
    disk: SimDisk,
    mut catalog: Catalog,
) -> Result<(SimDisk, Catalog), String> {
    if rng.chance(2) {
        catalog.epoch = catalog.epoch.plus(1 + rng.below(2));
        return Ok((disk, catalog));
    }
    let staged = std::fs::read(&setup.staging_path).ok();
    let mut io = SimIo::new(rng.next());
    io.add_device(DeviceId(0), disk.clone());
    let harness = Harness::open(&mut io, setup, catalog, &disk.list())
        .map_err(|error| format!("opening: {error}"))?;
    catalog = harness.catalog.clone();
    let volume = harness.volume;
    let after = disk.kill(rng.next());
    drop(io);
    drop(volume);
    match staged {
        Some(staged) => std::fs::write(&setup.staging_path, staged),
        None => std::fs::remove_file(&setup.staging_path),
    }
    .map_err(|error| format!("putting the staging file back: {error}"))?;
    Ok((after, catalog))
}

/// Runs one seed: a few lives of a volume, each ended by a crash. Returns how many crashes.
fn simulate(seed: u64, scratch: &Path) -> Result<u64, String> {
    let staging = Staging(scratch.join(format!("staging-{seed}")));
    let mut setup = Setup::small(staging.0.clone());
    setup.size_bytes = VOLUME_BYTES;
    setup.checkpoint_log_bytes = u64::MAX;
    let mut catalog = Catalog::new(VOLUME_BYTES);
    let mut disk = SimDisk::new(seed);
    let mut simulation = Simulation {
        rng: Rng::new(seed),
        history: History {
            base: vec![0; SECTORS],
            changes: VecDeque::new(),
            flushed: 0,
            acknowledged: 0,
        },
        next_stamp: 0,
    };
    let lives = 2 + simulation.rng.below(4);
    for life in 0..lives {
        let mut io = SimIo::new(seed ^ life);
        io.add_device(DeviceId(0), disk.clone());
        let mut harness = Harness::open(&mut io, &setup, catalog, &disk.list())
            .map_err(|error| format!("life {life}: opening: {error}"))?;
        if !harness.recovery.warnings.is_empty() {
            return Err(format!("life {life}: {:?}", harness.recovery.warnings));
        }
        simulation
            .drive(&mut harness)
            .map_err(|what| format!("life {life}: {what}"))?;
        catalog = harness.catalog.clone();
        let volume = harness.volume;
        let power_loss = simulation.rng.chance(2);
        let (after, least) = if power_loss {
            let mode = match simulation.rng.below(4) {
                0 => CrashMode::LoseUnsynced,
                1 => CrashMode::KeepAll,
                _ => CrashMode::Random,
            };
            (
                disk.crash(mode, simulation.rng.next()),
                simulation.history.flushed,
            )
        } else {
            (
                disk.kill(simulation.rng.next()),
                simulation.history.acknowledged,
            )
        };
        drop(io);
        drop(volume);
        if power_loss {
            let _ = std::fs::remove_file(&staging.0);
        }
        disk = after;
        if simulation.rng.chance(3) {
            (disk, catalog) = interrupted_opening(&mut simulation.rng, &setup, disk, catalog)
                .map_err(|what| format!("life {life}: interrupted opening: {what}"))?;
        }
        // What is there now?
        let mut io = SimIo::new(seed ^ life ^ 0xff);
        io.add_device(DeviceId(0), disk.clone());
        let mut harness = Harness::open(&mut io, &setup, catalog, &disk.list())
            .map_err(|error| format!("life {life}: recovery: {error}"))?;
        if !harness.recovery.warnings.is_empty() {
            return Err(format!(
                "life {life}: recovery: {:?}",
                harness.recovery.warnings
            ));
        }
        let found = read_state(&mut harness).map_err(|what| format!("life {life}: {what}"))?;
        let history = &mut simulation.history;
        let how = if power_loss {
            "power loss"
        } else {
            "the daemon's death"
        };
        if history.prefix(&found, least).is_none() {
            let anywhere = history.prefix(&found, 0);
            return Err(format!(
                "life {life}: after {how} the volume is not a prefix of at least {least} of {} \
                 changes (acknowledged {}; a shorter prefix that fits: {anywhere:?})",
                history.changes.len(),
                history.acknowledged,
            ));
        }
        *history = History {
            base: found,
            changes: VecDeque::new(),
            flushed: 0,
            acknowledged: 0,
        };
        let live: u64 = harness.volume.stats().space.live_blocks;
        if live != harness.volume.stats().mapped_blocks {
            return Err(format!(
                "life {life}: {live} blocks are counted live, {} are mapped",
                harness.volume.stats().mapped_blocks
            ));
        }
        // Either goes on from a clean close, or crashes again at once.
        catalog = if simulation.rng.chance(2) {
            harness
                .close()
                .map_err(|error| format!("life {life}: closing: {error}"))?
        } else {
            harness.settle();
            harness.catalog.clone()
        };
    }
    Ok(lives)
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

#[test]
fn every_crash_leaves_a_prefix_with_all_that_was_promised() {
    let scratch = std::env::temp_dir().join(format!("vhostd-crash-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).unwrap();
    let wanted = number("VHOSTD_CRASHES", 400);
    let mut seed = number("VHOSTD_SEED", 1);
    let mut crashes = 0;
    while crashes < wanted {
        match simulate(seed, &scratch) {
            Ok(count) => crashes += count,
            Err(what) => panic!("VHOSTD_SEED={seed} VHOSTD_CRASHES=1: {what}"),
        }
        seed += 1;
    }
    println!("{crashes} crashes, seeds up to {}", seed - 1);
    let _ = std::fs::remove_dir_all(&scratch);
}
