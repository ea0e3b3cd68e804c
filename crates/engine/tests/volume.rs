//! Volumes on a real directory through io_uring: contents against an exact model, over closing, the
//! daemon's death, lost staging memory and a full file system.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Catalog, Harness, Memory, Model, POOL, Rng, SECTOR, Setup};
use vhostd_engine::device::{DirectoryDevice, Superblock};
use vhostd_engine::io::{DeviceId, UringIo};
use vhostd_engine::types::{SegmentNumber, Uuid};
use vhostd_engine::volume::{RequestFailed, RequestKind, VolumeEvent};

const MIB: u64 = 1 << 20;

/// A directory that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vhostd-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.join("device")).unwrap();
        Self(path)
    }

    fn staging(&self) -> PathBuf {
        self.0.join("staging")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Rig {
    device: Arc<DirectoryDevice>,
    io: UringIo,
}

impl Rig {
    fn format(path: &Path, setup: &Setup) -> Self {
        let superblock = Superblock {
            pool: POOL,
            device: Uuid([9; 16]),
            segment_bytes: setup.segment_bytes,
            created_ns: 1,
            pool_name: "pool".into(),
        };
        DirectoryDevice::format(path, &superblock).unwrap();
        Self::open(path)
    }

    fn open(path: &Path) -> Self {
        let device = Arc::new(DirectoryDevice::open(path, true).unwrap());
        let mut io = UringIo::new(256).unwrap();
        io.add_device(DeviceId(0), Arc::clone(&device));
        Self { device, io }
    }

    fn list(&self) -> Vec<SegmentNumber> {
        self.device.list().unwrap()
    }
}

/// One random change, in the volume and in the model.
fn random_change(harness: &mut Harness<'_>, model: &mut Model, rng: &mut Rng, stamp: u64) {
    let sectors = harness.catalog.size_bytes / SECTOR;
    let most = if rng.chance(8) { 3000 } else { 40 };
    let mut start = rng.below(sectors);
    let mut count = (1 + rng.below(most)).min(sectors - start);
    if rng.chance(2) {
        start &= !7;
        count = count.next_multiple_of(8).min(sectors - start);
    }
    let (offset, len) = (start * SECTOR, (count * SECTOR) as usize);
    match rng.below(10) {
        0 => {
            harness.unmap(offset, len as u64, true).unwrap();
            model.write(offset, len, 0);
        }
        1 => {
            // A discard may leave parts of blocks alone: aligned ones are exact.
            let (from, to) = (offset.next_multiple_of(4096), (offset + len as u64) & !4095);
            if from < to {
                harness.unmap(from, to - from, false).unwrap();
                model.write(from, (to - from) as usize, 0);
            }
        }
        _ => {
            harness
                .write(offset, &Model::stamped(offset, len, stamp))
                .unwrap();
            model.write(offset, len, stamp);
        }
    }
}

fn check(harness: &mut Harness<'_>, model: &Model, seed: u64) {
    let size = harness.catalog.size_bytes;
    let step = 257 * 4096 + 512;
    let mut offset = 0;
    while offset < size {
        let len = (step as u64).min(size - offset) as usize;
        let got = harness.read(offset, len).unwrap();
        if got != model.bytes(offset, len) {
            let wrong = got
                .iter()
                .zip(model.bytes(offset, len))
                .position(|(a, b)| *a != b)
                .unwrap();
            panic!("seed {seed}: byte {} is wrong", offset + wrong as u64);
        }
        offset += len as u64;
    }
}

fn seed() -> u64 {
    std::env::var("VHOSTD_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(0x5eed)
}

#[test]
fn contents_survive_closing_and_checkpoints() {
    let scratch = Scratch::new("close");
    let setup = Setup::small(scratch.staging());
    let mut rig = Rig::format(&scratch.0.join("device"), &setup);
    let mut catalog = Catalog::new(setup.size_bytes);
    let (mut model, mut rng) = (Model::default(), Rng::new(seed()));
    let mut stamp = 0;
    for _ in 0..4 {
        let listed = rig.list();
        let mut harness = Harness::open(&mut rig.io, &setup, catalog, &listed).unwrap();
        assert_eq!(
            harness.recovery.records, 0,
            "a closed volume needs no replay"
        );
        assert!(
            harness.recovery.warnings.is_empty(),
            "{:?}",
            harness.recovery.warnings
        );
        check(&mut harness, &model, seed());
        for i in 0..120 {
            stamp += 1;
            random_change(&mut harness, &mut model, &mut rng, stamp);
            if i % 50 == 49 {
                harness.checkpoint().unwrap();
            }
        }
        check(&mut harness, &model, seed());
        catalog = harness.close().unwrap();
        assert!(
            !setup.staging_path.exists(),
            "a closed volume has nothing staged"
        );
    }
}

#[test]
fn acknowledged_writes_survive_the_death_of_the_daemon() {
    let scratch = Scratch::new("kill");
    let setup = Setup::small(scratch.staging());
    let mut rig = Rig::format(&scratch.0.join("device"), &setup);
    let mut catalog = Catalog::new(setup.size_bytes);
    let (mut model, mut rng) = (Model::default(), Rng::new(seed() + 1));
    let mut stamp = 0;
    for round in 0..12 {
        let listed = rig.list();
        let mut harness = Harness::open(&mut rig.io, &setup, catalog, &listed).unwrap();
        assert!(
            harness.recovery.warnings.is_empty(),
            "{:?}",
            harness.recovery.warnings
        );
        check(&mut harness, &model, seed());
        for _ in 0..rng.below(60) {
            stamp += 1;
            random_change(&mut harness, &mut model, &mut rng, stamp);
            if rng.chance(20) {
                harness.checkpoint().unwrap();
            }
            if rng.chance(10) {
                harness.flush().unwrap();
            }
        }
        // Dead: nothing is closed; what was in flight may or may not have happened.
        catalog = harness.catalog.clone();
        drop(harness);
        let _ = round;
        drop(rig);
        rig = Rig::open(&scratch.0.join("device"));
    }
}

#[test]
fn a_staging_file_that_comes_back_late_harms_nothing() {
    let scratch = Scratch::new("late");
    let mut setup = Setup::small(scratch.staging());
    let mut rig = Rig::format(&scratch.0.join("device"), &setup);
    let mut catalog = Catalog::new(setup.size_bytes);
    let (mut model, mut rng) = (Model::default(), Rng::new(seed() + 3));
    let early = scratch.0.join("early");
    for (round, path) in [
        scratch.staging(),
        scratch.0.join("other"),
        scratch.staging(),
    ]
    .into_iter()
    .enumerate()
    {
        setup.staging_path = path;
        if round == 2 {
            // As it was when the first daemon died: it has staged writes that nobody drained.
            std::fs::copy(&early, &setup.staging_path).unwrap();
        }
        let listed = rig.list();
        let mut harness = Harness::open(&mut rig.io, &setup, catalog, &listed).unwrap();
        if round == 0 {
            // Not flushed, and staged only: gone with the file, and gone for good.
            for stamp in 0..40 {
                let at = rng.below(200) * 4096;
                let data = Model::stamped(at, 8192, 1000 + stamp);
                harness.write(at, &data).unwrap();
            }
        } else {
            if round == 2 {
                check(&mut harness, &model, seed());
            }
            model = Model::default();
            for block in 0..256 {
                model.write(block * 4096, 4096, 10 * round as u64 + 1);
                let data = model.bytes(block * 4096, 4096);
                harness.write(block * 4096, &data).unwrap();
            }
            harness.flush().unwrap();
            check(&mut harness, &model, seed());
        }
        catalog = harness.catalog.clone();
        drop(harness);
        drop(rig);
        if round == 0 {
            std::fs::rename(&setup.staging_path, &early).unwrap();
        }
        rig = Rig::open(&scratch.0.join("device"));
    }
    let listed = rig.list();
    let mut harness = Harness::open(&mut rig.io, &setup, catalog, &listed).unwrap();
    check(&mut harness, &model, seed());
}

#[test]
fn flushed_writes_survive_the_loss_of_the_staging_memory() {
    let scratch = Scratch::new("power");
    let setup = Setup::small(scratch.staging());
    let mut rig = Rig::format(&scratch.0.join("device"), &setup);
    let mut catalog = Catalog::new(setup.size_bytes);
    let (mut model, mut rng) = (Model::default(), Rng::new(seed() + 2));
    let mut stamp = 0;
    for _ in 0..8 {
        let listed = rig.list();
        let mut harness = Harness::open(&mut rig.io, &setup, catalog, &listed).unwrap();
        check(&mut harness, &model, seed());
        for _ in 0..rng.below(60) {
            stamp += 1;
            random_change(&mut harness, &mut model, &mut rng, stamp);
        }
        harness.flush().unwrap();
        catalog = harness.catalog.clone();
        drop(harness);
        drop(rig);
        let _ = std::fs::remove_file(&setup.staging_path);
        rig = Rig::open(&scratch.0.join("device"));
    }
}

#[test]
fn writes_in_parallel_to_parts_of_the_same_blocks_all_arrive() {
    let scratch = Scratch::new("edges");
    let setup = Setup::small(scratch.staging());
    let mut rig = Rig::format(&scratch.0.join("device"), &setup);
    let mut harness =
        Harness::open(&mut rig.io, &setup, Catalog::new(setup.size_bytes), &[]).unwrap();
    let mut model = Model::default();
    let mut rng = Rng::new(seed() + 3);
    for round in 0..60u64 {
        // Every sector of two blocks by a request of its own, all at once.
        let base = rng.below(4) * 8192;
        let mut pending = Vec::new();
        for sector in 0..16 {
            let offset = base + sector * SECTOR;
            let memory = Memory::new(&Model::stamped(offset, SECTOR as usize, round + 1));
            let kind = RequestKind::Write {
                offset_bytes: offset,
                from: memory.bufs(),
            };
            pending.push((harness.submit(kind, false), memory));
            model.write(offset, SECTOR as usize, round + 1);
        }
        for (id, _memory) in &pending {
            harness.wait_for(*id).unwrap();
        }
        // Pushes the blocks out of the staging ring, so that the next round reads them from disk.
        harness.write(32 * MIB, &vec![1; MIB as usize]).unwrap();
        model.write(32 * MIB, MIB as usize, 0);
    }
    let got = harness.read(0, 65536).unwrap();
    assert!(got == model.bytes(0, 65536), "seed {}", seed());
}

#[test]
fn space_of_dead_segments_is_freed() {
    let scratch = Scratch::new("dead");
    let setup = Setup::small(scratch.staging());
    let mut rig = Rig::format(&scratch.0.join("device"), &setup);
    let device = Arc::clone(&rig.device);
    let mut harness =
        Harness::open(&mut rig.io, &setup, Catalog::new(setup.size_bytes), &[]).unwrap();
    for round in 0..20u64 {
        for i in 0..8 {
            let offset = i * MIB;
            harness
                .write(offset, &Model::stamped(offset, MIB as usize, round + 1))
                .unwrap();
        }
        harness.flush().unwrap();
        harness.checkpoint().unwrap();
    }
    let segments = device.list().unwrap().len();
    // 160 MiB were written; 8 MiB are live, in segments of 1 MiB (and a few of maps).
    assert!(segments < 30, "{segments} segments are left");
    harness.unmap(0, 8 * MIB, false).unwrap();
    harness.write(0, &[7; 4096]).unwrap();
    harness.flush().unwrap();
    harness.checkpoint().unwrap();
    harness.write(0, &[8; 4096]).unwrap();
    harness.checkpoint().unwrap();
    let segments = device.list().unwrap().len();
    assert!(
        segments < 12,
        "{segments} segments are left after everything was discarded"
    );
    assert_eq!(harness.read(0, 4096).unwrap(), vec![8; 4096]);
    assert_eq!(harness.read(MIB, 4096).unwrap(), vec![0; 4096]);
}

#[test]
fn a_volume_of_64_tib_takes_nothing_and_keeps_its_far_end() {
    let scratch = Scratch::new("huge");
    let mut setup = Setup::small(scratch.staging());
    setup.size_bytes = 64 << 40;
    let mut rig = Rig::format(&scratch.0.join("device"), &setup);
    let catalog = Catalog::new(setup.size_bytes);
    let mut harness = Harness::open(&mut rig.io, &setup, catalog, &[]).unwrap();
    let offsets = [0, 1 << 30, 1 << 40, (32 << 40) + 4096, (64 << 40) - 4096];
    for offset in offsets {
        harness
            .write(offset, &Model::stamped(offset, 4096, 5))
            .unwrap();
    }
    let catalog = harness.close().unwrap();
    let listed = rig.list();
    let mut harness = Harness::open(&mut rig.io, &setup, catalog, &listed).unwrap();
    for offset in offsets {
        assert!(harness.read(offset, 4096).unwrap() == Model::stamped(offset, 4096, 5));
    }
    harness.unmap(0, 64 << 40, true).unwrap();
    assert_eq!(harness.volume.stats().mapped_blocks, 0);
}

#[test]
fn a_full_file_system_fails_writes_and_heals_when_space_returns() {
    let scratch = Scratch::new("full");
    let setup = Setup::small(scratch.staging());
    let mount = scratch.0.join("small");
    std::fs::create_dir(&mount).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=24m", "none"])
        .arg(&mount)
        .status()
        .unwrap();
    assert!(
        mounted.success(),
        "this test mounts a small tmpfs and needs to be root"
    );
    let result = std::panic::catch_unwind(|| {
        let device = mount.join("device");
        std::fs::create_dir(&device).unwrap();
        let ballast = mount.join("ballast");
        std::fs::write(&ballast, vec![1; 8 << 20]).unwrap();
        let mut rig = Rig::format(&device, &setup);
        let mut harness =
            Harness::open(&mut rig.io, &setup, Catalog::new(setup.size_bytes), &[]).unwrap();
        let mut written = Vec::new();
        let mut refused = 0;
        for i in 0..40u64 {
            let offset = i * (MIB / 2);
            let data = Model::stamped(offset, (MIB / 2) as usize, i + 1);
            match harness.write(offset, &data) {
                Ok(()) => written.push((offset, i + 1)),
                Err(why) => {
                    assert_eq!(why, RequestFailed::NoSpace);
                    refused += 1;
                }
            }
        }
        assert!(refused > 0, "the file system was not filled");
        assert!(harness.events.contains(&VolumeEvent::DeviceFull));
        harness
            .flush()
            .expect("what was acknowledged has its space");
        for &(offset, stamp) in &written {
            let wanted = Model::stamped(offset, (MIB / 2) as usize, stamp);
            assert!(harness.read(offset, (MIB / 2) as usize).unwrap() == wanted);
        }
        harness
            .checkpoint()
            .expect("room for a checkpoint was kept");
        std::fs::remove_file(&ballast).unwrap();
        harness.clock_ns += 1_000_000_000;
        harness
            .write(60 * MIB, &vec![3; MIB as usize])
            .expect("space is back");
        harness.flush().unwrap();
        assert!(harness.events.contains(&VolumeEvent::SpaceBack));
        harness.settle();
    });
    let _ = std::process::Command::new("umount")
        .arg("-l")
        .arg(&mount)
        .status();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn maps_take_a_bounded_part_of_the_disk_however_many_checkpoints() {
    let scratch = Scratch::new("clean");
    let mut setup = Setup::small(scratch.staging());
    setup.size_bytes = 1 << 40;
    let mut rig = Rig::format(&scratch.0.join("device"), &setup);
    let catalog = Catalog::new(setup.size_bytes);
    let mut harness = Harness::open(&mut rig.io, &setup, catalog, &[]).unwrap();
    let mut rng = Rng::new(seed() + 4);
    // Leaves far apart, most of them cold: what stays live of old checkpoints is spread thin.
    let place = |i: u64| i * (8 << 20);
    for i in 0..400 {
        let offset = place(i);
        harness
            .write(offset, &Model::stamped(offset, 65536, i + 1))
            .unwrap();
    }
    let mut stamps: Vec<u64> = (1..=400).collect();
    for round in 0..300 {
        for _ in 0..20 {
            let i = rng.below(400);
            stamps[i as usize] = 1000 + round;
            let data = Model::stamped(place(i), 65536, 1000 + round);
            harness.write(place(i), &data).unwrap();
        }
        harness.checkpoint().unwrap();
    }
    let space = harness.volume.stats().space;
    let live = space.live_node_bytes.div_ceil(4096);
    assert!(
        space.map_blocks <= 2 * live + 256 + 2 * 256,
        "{} blocks of map segments for {live} live ones, seed {}",
        space.map_blocks,
        seed()
    );
    let catalog = harness.close().unwrap();
    let listed = rig.list();
    let mut harness = Harness::open(&mut rig.io, &setup, catalog, &listed).unwrap();
    for (i, stamp) in stamps.iter().enumerate() {
        let offset = place(i as u64);
        assert!(harness.read(offset, 65536).unwrap() == Model::stamped(offset, 65536, *stamp));
    }
}

/// Whoever asks for a snapshot holds up the commit of checkpoints meanwhile; so it must not wait for one.
#[test]
fn a_snapshot_is_taken_while_writes_wait_for_a_checkpoint_to_free_memory() {
    let scratch = Scratch::new("waiting");
    let mut setup = Setup::small(scratch.staging());
    setup.size_bytes = 64 << 30;
    let mut rig = Rig::format(&scratch.0.join("device"), &setup);
    let mut harness =
        Harness::open(&mut rig.io, &setup, Catalog::new(setup.size_bytes), &[]).unwrap();
    // A leaf of the map each, until nodes that no checkpoint has written fill its memory.
    let buffer = Memory::new(&[7; 4096]);
    let mut waiting = None;
    for leaf in 0..16_000u64 {
        let kind = RequestKind::Write {
            offset_bytes: leaf * 4 * MIB,
            from: buffer.bufs(),
        };
        let id = harness.submit(kind, false);
        let is_over = |harness: &mut Harness<'_>| {
            let over = harness.finished.iter().any(|finished| finished.id == id);
            harness.finished.retain(|finished| finished.id != id);
            over
        };
        let turns = (0..2000).find(|_| {
            harness.turn(harness.io.in_flight() > 0);
            is_over(&mut harness)
        });
        if turns.is_none() {
            waiting = Some(id);
            break;
        }
    }
    let waiting = waiting.expect("the memory of the map has a bound");
    let (kind, at) = Harness::snapshot_request(Uuid([5; 16]));
    let id = harness.submit(kind, false);
    let over = (0..10_000).find(|_| {
        harness.turn(harness.io.in_flight() > 0);
        harness.finished.iter().any(|finished| finished.id == id)
    });
    assert!(over.is_some(), "the snapshot waits");
    assert!(at.get().is_some());
    assert!(
        harness
            .finished
            .iter()
            .all(|finished| finished.id != waiting),
        "the write went on without a checkpoint"
    );
}
