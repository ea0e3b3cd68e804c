//! Devices that fail, lie and rot, on a simulated disk: what the guest is told, and what it is not.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::history::{stamp_of, stamped};
use common::{Catalog, Harness, Model, Rng, Setup};
use vhostd_engine::io::DeviceId;
use vhostd_engine::io::sim::{CrashMode, Fault, FaultRule, OpKind, SimDisk, SimIo, When};
use vhostd_engine::types::SegmentNumber;
use vhostd_engine::volume::{RequestFailed, VolumeEvent};

const MIB: u64 = 1 << 20;

struct Rig {
    disk: SimDisk,
    io: SimIo,
    setup: Setup,
    _scratch: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let disk = SimDisk::new(1);
        let mut io = SimIo::new(2);
        io.add_device(DeviceId(0), disk.clone());
        let mut setup = Setup::small(scratch.path().join("staging"));
        setup.checkpoint_log_bytes = MIB;
        Self {
            disk,
            io,
            setup,
            _scratch: scratch,
        }
    }

    fn open(&mut self) -> Harness<'_> {
        let catalog = Catalog::new(self.setup.size_bytes);
        Harness::open(&mut self.io, &self.setup, catalog, &[]).unwrap()
    }
}

fn fault(kind: OpKind, when: When, fault: Fault) -> FaultRule {
    FaultRule {
        kind: Some(kind),
        segment: None,
        when,
        fault,
    }
}

/// Writes enough to push what was written before out of the staging ring.
fn push_out(harness: &mut Harness<'_>) {
    for i in 0..4 {
        harness
            .write(32 * MIB + i * MIB, &vec![1; MIB as usize])
            .unwrap();
    }
    harness.flush().unwrap();
}

fn damage(harness: &Harness<'_>) -> usize {
    let is_damage = |event: &&VolumeEvent| matches!(event, VolumeEvent::Corruption { .. });
    harness.events.iter().filter(is_damage).count()
}

#[test]
fn failed_sync_is_never_retried_into_success() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    harness.write(0, &[1; 4096]).unwrap();
    harness.flush().unwrap();
    harness.write(4096, &[2; 4096]).unwrap();
    disk.add_fault(fault(OpKind::Sync, When::Nth(0), Fault::Error(libc::EIO)));
    assert_eq!(harness.flush(), Err(RequestFailed::NotDurable));
    assert_eq!(harness.flush(), Err(RequestFailed::NotDurable));
    assert_eq!(
        harness.write(8192, &[3; 4096]),
        Err(RequestFailed::NotWritable)
    );
    // What is there can be read on.
    assert_eq!(harness.read(4096, 4096).unwrap(), vec![2; 4096]);
    let failures = |event: &&VolumeEvent| matches!(event, VolumeEvent::DeviceFailed { .. });
    assert_eq!(harness.events.iter().filter(failures).count(), 1);
    assert!(
        harness.checkpoint().is_err(),
        "a checkpoint must not speak for data that may be lost"
    );
}

#[test]
fn failed_write_out_fails_the_flush_and_what_follows() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    harness.write(0, &[1; 4096]).unwrap();
    disk.add_fault(fault(OpKind::Write, When::Nth(0), Fault::Error(libc::EIO)));
    assert_eq!(harness.flush(), Err(RequestFailed::NotDurable));
    assert_eq!(
        harness.write(8192, &[3; 4096]),
        Err(RequestFailed::NotWritable)
    );
}

#[test]
fn block_that_reads_wrong_once_is_read_again() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    harness.write(0, &Model::stamped(0, 65536, 7)).unwrap();
    push_out(&mut harness);
    for kind in [
        Fault::FlipBit,
        Fault::Error(libc::EIO),
        Fault::Misdirect { offset_bytes: 4096 },
    ] {
        disk.add_fault(fault(OpKind::Read, When::Nth(0), kind));
        assert!(harness.read(0, 65536).unwrap() == Model::stamped(0, 65536, 7));
        disk.clear_faults();
    }
    assert_eq!(damage(&harness), 0);
}

#[test]
fn rotten_block_is_an_error_and_its_neighbours_are_not() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    harness.write(0, &Model::stamped(0, 65536, 7)).unwrap();
    push_out(&mut harness);
    // The volume's first record is at block 1 of its first segment, its data behind it.
    assert!(disk.flip_bit(SegmentNumber(1), 4096 * 2 + 4096 * 5 + 17, 3));
    assert_eq!(harness.read(0, 65536), Err(RequestFailed::Damaged));
    assert_eq!(
        harness.read(5 * 4096 + 512, 512),
        Err(RequestFailed::Damaged)
    );
    assert_eq!(damage(&harness), 2);
    let whole = Model::stamped(0, 65536, 7);
    assert!(harness.read(0, 5 * 4096).unwrap() == whole[..5 * 4096]);
    assert!(harness.read(6 * 4096, 4096).unwrap() == whole[6 * 4096..7 * 4096]);
    // A write of a part of it must not make the rest of it look right.
    assert_eq!(
        harness.write(5 * 4096 + 512, &[1; 512]),
        Err(RequestFailed::Damaged)
    );
    // A write of all of it mends it.
    harness.write(5 * 4096, &[9; 4096]).unwrap();
    assert_eq!(harness.read(5 * 4096, 4096).unwrap(), vec![9; 4096]);
}

#[test]
fn lying_disk_is_found_out_by_checksums() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    harness.write(0, &Model::stamped(0, 65536, 7)).unwrap();
    disk.add_fault(fault(OpKind::Write, When::Nth(0), Fault::Lost));
    harness.flush().unwrap();
    disk.clear_faults();
    push_out(&mut harness);
    assert_eq!(harness.read(0, 65536), Err(RequestFailed::Damaged));
    assert_eq!(damage(&harness), 1);
}

#[test]
fn failed_checkpoint_loses_nothing_and_is_asked_for_again_later() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    harness.write(0, &Model::stamped(0, 65536, 7)).unwrap();
    push_out(&mut harness);
    let wanted = |harness: &Harness<'_>| {
        let is_wanted = |event: &&VolumeEvent| **event == VolumeEvent::CheckpointWanted;
        harness.events.iter().filter(is_wanted).count()
    };
    assert_eq!(wanted(&harness), 1);
    for error in [libc::ENOSPC, libc::EIO] {
        disk.add_fault(fault(OpKind::Create, When::Nth(0), Fault::Error(error)));
        assert!(harness.checkpoint().is_err());
    }
    harness.settle();
    assert_eq!(wanted(&harness), 1, "not at once");
    harness.clock_ns += 10_000_000_000;
    harness.turn(false);
    assert_eq!(wanted(&harness), 2);
    harness.checkpoint().unwrap();
    let catalog = harness.close().unwrap();
    let (setup, listed) = (rig.setup.clone(), disk.list());
    let mut harness = Harness::open(&mut rig.io, &setup, catalog, &listed).unwrap();
    assert!(harness.read(0, 65536).unwrap() == Model::stamped(0, 65536, 7));
}

/// A few lives of a volume on a disk that loses, misplaces and spoils writes and says nothing. What was
/// promised may be lost then. What is read is something that was written there once, or an error.
fn live_with_a_liar(seed: u64) -> (u64, u64) {
    const BLOCKS: u64 = 64;
    let scratch = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(seed);
    let mut disk = SimDisk::new(seed);
    let mut setup = Setup::small(scratch.path().join("staging"));
    setup.size_bytes = BLOCKS * 4096;
    setup.segment_bytes = 256 << 10;
    let mut catalog = Catalog::new(setup.size_bytes);
    let mut written: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    let (mut right, mut damaged) = (0, 0);
    for life in 0..4 {
        let mut io = SimIo::new(seed + life);
        io.add_device(DeviceId(0), disk.clone());
        // Too much is lost for a volume: an honest end.
        let Ok(mut harness) = Harness::open(&mut io, &setup, catalog, &disk.list()) else {
            return (right, damaged);
        };
        for (block, stamps) in &written {
            match harness.read(block * 4096, 4096) {
                Ok(bytes) => {
                    for (sector, bytes) in (block * 8..).zip(bytes.chunks_exact(512)) {
                        let stamp = stamp_of(sector, bytes);
                        let known = stamp.is_some_and(|s| s == 0 || stamps.contains(&s));
                        assert!(known, "seed {seed}: sector {sector} has {stamp:?}");
                    }
                    right += 1;
                }
                Err(why) => {
                    assert_eq!(why, RequestFailed::Damaged, "seed {seed}");
                    damaged += 1;
                }
            }
        }
        let offset_bytes = 4096 * rng.below(60);
        for lie in [
            Fault::Lost,
            Fault::FlipBit,
            Fault::Misdirect { offset_bytes },
        ] {
            disk.add_fault(fault(OpKind::Write, When::Probability(0.03), lie));
        }
        for _ in 0..rng.below(120) {
            let (first, count) = (rng.below(BLOCKS - 2), 1 + rng.below(2));
            let stamp = 1 + rng.below(1 << 40);
            for block in first..first + count {
                written.entry(block).or_default().insert(stamp);
            }
            let data = stamped(first * 8, (first + count) * 8, stamp);
            // A node of the map may be what is damaged.
            if let Err(why) = harness.write(first * 4096, &data) {
                assert_eq!(why, RequestFailed::Damaged, "seed {seed}");
            }
            if rng.chance(4) {
                harness.flush().unwrap();
            }
            if rng.chance(30) && harness.checkpoint().is_err() {
                break;
            }
        }
        catalog = harness.catalog.clone();
        let volume = harness.volume;
        disk = disk.crash(CrashMode::Random, rng.next());
        drop(io);
        drop(volume);
        let _ = std::fs::remove_file(&setup.staging_path);
    }
    (right, damaged)
}

#[test]
fn disks_that_lie_never_have_wrong_data_taken_for_right() {
    let (mut right, mut damaged) = (0, 0);
    for seed in 0..150 {
        let blocks = live_with_a_liar(seed);
        (right, damaged) = (right + blocks.0, damaged + blocks.1);
    }
    println!("{right} blocks were read, {damaged} refused");
    assert!(
        right > 1000 && damaged > 10,
        "{right} read, {damaged} refused"
    );
}
