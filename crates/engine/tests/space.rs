//! What a volume takes on its device: writes of zeroes, dead blocks that are given back, limits, and
//! waiting for space. On a simulated disk.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use common::{Catalog, Harness, Memory, Model, Rng, Setup};
use vhostd_engine::io::DeviceId;
use vhostd_engine::io::sim::{CrashMode, Fault, FaultRule, OpKind, SimDisk, SimIo, When};
use vhostd_engine::segment::SegmentKind;
use vhostd_engine::volume::{RequestFailed, RequestKind, VolumeEvent};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

struct Rig {
    disk: SimDisk,
    io: SimIo,
    setup: Setup,
    _scratch: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let setup = Setup::small(scratch.path().join("staging"));
        let disk = SimDisk::new(1);
        let io = Self::io_over(&disk);
        Self {
            disk,
            io,
            setup,
            _scratch: scratch,
        }
    }

    fn io_over(disk: &SimDisk) -> SimIo {
        let mut io = SimIo::new(2);
        io.add_device(DeviceId(0), disk.clone());
        io
    }

    fn open(&mut self) -> Harness<'_> {
        let catalog = Catalog::new(self.setup.size_bytes);
        Harness::open(&mut self.io, &self.setup, catalog, &[]).unwrap()
    }
}

fn seed() -> u64 {
    std::env::var("VHOSTD_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1)
}

/// Bytes of blocks: a letter each, '.' for zeroes.
fn blocks(pattern: &str) -> Vec<u8> {
    pattern
        .bytes()
        .flat_map(|letter| [if letter == b'.' { 0 } else { letter }; BLOCK])
        .collect()
}

#[test]
fn zeroes_that_are_written_over_nothing_leave_no_trace() {
    let mut rig = Rig::new();
    let mut harness = rig.open();
    harness.write(0, &[0; 64 * BLOCK]).unwrap();
    harness.write(512, &[0; 1024]).unwrap();
    harness.unmap(MIB + 512, 3 * 4096, true).unwrap();
    let stats = harness.volume.stats();
    assert_eq!(stats.mapped_blocks, 0);
    assert_eq!(stats.staged_bytes, 0);
    assert!(stats.zero_bytes >= 65 * 4096);
    assert_eq!(harness.read(0, 64 * BLOCK).unwrap(), [0; 64 * BLOCK]);
    harness.flush().unwrap();
}

#[test]
fn zeroes_over_data_unmap_it() {
    let mut rig = Rig::new();
    let mut harness = rig.open();
    harness.write(0, &blocks("abcdefgh")).unwrap();
    harness.write(2 * 4096, &blocks("...")).unwrap();
    let stats = harness.volume.stats();
    assert_eq!(stats.mapped_blocks, 5);
    assert_eq!(stats.space.dead_blocks, 3);
    assert_eq!(stats.zero_bytes, 3 * 4096);
    assert!(harness.read(0, 8 * BLOCK).unwrap() == blocks("ab...fgh"));
    // The rest of a block whose other parts are zeroes already.
    harness.write(4 * 4096 + 512, &[9; 512]).unwrap();
    harness.write(4 * 4096 + 512, &[0; 512]).unwrap();
    assert_eq!(harness.volume.stats().mapped_blocks, 5);
    assert!(harness.read(0, 8 * BLOCK).unwrap() == blocks("ab...fgh"));
}

#[test]
fn mixed_writes_keep_data_and_drop_zeroes() {
    let mut rig = Rig::new();
    let mut harness = rig.open();
    harness.write(0, &blocks("abcdefghijkl")).unwrap();
    let pattern = "..A.BC...D..";
    harness.write(0, &blocks(pattern)).unwrap();
    assert!(harness.read(0, 12 * BLOCK).unwrap() == blocks(pattern));
    assert_eq!(harness.volume.stats().mapped_blocks, 4);
    harness.write(20 * 4096, &blocks(pattern)).unwrap();
    assert!(harness.read(20 * 4096, 12 * BLOCK).unwrap() == blocks(pattern));
    assert_eq!(harness.volume.stats().mapped_blocks, 8);
    assert_eq!(harness.volume.stats().space.live_blocks, 8);
    let catalog = harness.close().unwrap();
    let unmaps: u32 = catalog.rows.values().map(|row| row.unmaps).sum();
    assert_eq!(unmaps, 4, "only what was mapped is unmapped");
    let mut harness = Harness::open(&mut rig.io, &rig.setup, catalog, &[]).unwrap();
    assert!(harness.read(0, 12 * BLOCK).unwrap() == blocks(pattern));
    assert!(harness.read(20 * 4096, 12 * BLOCK).unwrap() == blocks(pattern));
}

#[test]
fn a_record_without_room_for_the_entries_keeps_zeroes_as_data() {
    let mut rig = Rig::new();
    let mut harness = rig.open();
    let pattern = "a.".repeat(120);
    for i in 0..4 {
        let offset = i * 240 * 4096;
        harness.write(offset, &blocks(&pattern)).unwrap();
    }
    for i in 0..4 {
        let offset = i * 240 * 4096;
        assert!(harness.read(offset, 240 * BLOCK).unwrap() == blocks(&pattern));
    }
    let stats = harness.volume.stats();
    assert_eq!(stats.space.live_blocks, stats.mapped_blocks);
}

#[test]
fn random_writes_with_zeroes_are_whole_or_absent_after_a_crash() {
    let seed = seed();
    for case in 0..40 {
        let mut rng = Rng::new(seed * 1000 + case);
        let mut rig = Rig::new();
        let mut harness = rig.open();
        let mut random_pattern = |least: u64| -> Vec<u8> {
            let letters = (0..least + rng.below(30)).map(|_| match rng.below(3) {
                0 => '.',
                n => char::from(b'a' + (n * 7 + rng.below(5)) as u8),
            });
            blocks(&letters.collect::<String>())
        };
        let (before, after) = (random_pattern(40), random_pattern(10));
        harness.write(4096, &before).unwrap();
        harness.flush().unwrap();
        harness.write(2 * 4096, &after).unwrap();
        assert!(harness.read(2 * 4096, after.len()).unwrap() == after);
        // The staging memory lives on, or is lost; the disk loses what was not synced.
        let catalog = harness.catalog.clone();
        drop(harness);
        if case % 2 == 0 {
            std::fs::remove_file(&rig.setup.staging_path).unwrap();
        }
        let disk = rig.disk.crash(CrashMode::Random, seed + case);
        let mut io = Rig::io_over(&disk);
        let mut harness = Harness::open(&mut io, &rig.setup, catalog, &disk.list()).unwrap();
        let got = harness.read(4096, before.len()).unwrap();
        let mut changed = before.clone();
        let overlap = after.len().min(before.len() - BLOCK);
        changed[BLOCK..BLOCK + overlap].copy_from_slice(&after[..overlap]);
        let whole = got == changed;
        assert!(whole || got == before, "seed {seed}, case {case}");
        assert!(
            whole || case % 2 == 0,
            "seed {seed}, case {case}: acknowledged"
        );
        let stats = harness.volume.stats();
        assert_eq!(stats.space.live_blocks, stats.mapped_blocks);
    }
}

/// Takes turns until reclaim has nothing to do.
fn reclaim(harness: &mut Harness<'_>) {
    for _ in 0..10_000 {
        harness.settle();
        match harness.volume.deadline_ns() {
            Some(at) => harness.clock_ns = harness.clock_ns.max(at),
            None => return,
        }
    }
    panic!("an idle volume without anything to reclaim has a deadline");
}

/// Fills 8 MiB, then overwrites every second block of them.
fn fragment(harness: &mut Harness<'_>, model: &mut Model) {
    for i in 0..16 {
        let (offset, len) = (i * MIB / 2, (MIB / 2) as usize);
        harness
            .write(offset, &Model::stamped(offset, len, 1))
            .unwrap();
        model.write(offset, len, 1);
    }
    for i in 0..1024 {
        let offset = i * 8192;
        harness
            .write(offset, &Model::stamped(offset, BLOCK, 2))
            .unwrap();
        model.write(offset, BLOCK, 2);
    }
    harness.flush().unwrap();
}

fn assert_contents(harness: &mut Harness<'_>, model: &Model) {
    for i in 0..16 {
        let (offset, len) = (i * MIB / 2, (MIB / 2) as usize);
        assert!(harness.read(offset, len).unwrap() == model.bytes(offset, len));
    }
}

#[test]
fn dead_blocks_are_given_back_after_the_commit_and_not_before() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    let mut model = Model::default();
    fragment(&mut harness, &mut model);
    reclaim(&mut harness);
    assert_eq!(harness.volume.stats().punched_bytes, 0);
    harness.checkpoint().unwrap();
    reclaim(&mut harness);
    let stats = harness.volume.stats();
    assert!(stats.punched_bytes > 3 * MIB, "{stats:?}");
    assert!(
        stats.space.allocated_bytes < 10 * MIB,
        "12 MiB were written, 8 MiB are live: {stats:?}"
    );
    assert_contents(&mut harness, &model);
    // What counts as given back is gone from the disk, and nothing else.
    let catalog = harness.close().unwrap();
    for row in catalog.rows.values().filter(|r| r.punched_blocks > 0) {
        let bytes = disk.contents(row.number).unwrap();
        let zeroes = bytes[BLOCK..row.used_blocks as usize * BLOCK]
            .chunks(BLOCK)
            .filter(|block| block.iter().all(|byte| *byte == 0))
            .count();
        assert!(zeroes as u32 >= row.punched_blocks);
        assert!(row.punched_blocks <= row.dead.whole_blocks());
    }
    let mut harness = Harness::open(&mut rig.io, &rig.setup, catalog, &disk.list()).unwrap();
    assert_contents(&mut harness, &model);
}

#[test]
fn reclaim_keeps_to_its_rate() {
    let mut rig = Rig::new();
    let mut harness = rig.open();
    let mut model = Model::default();
    fragment(&mut harness, &mut model);
    harness.volume.set_reclaim(MIB, true);
    harness.checkpoint().unwrap();
    let start_ns = harness.clock_ns;
    reclaim(&mut harness);
    let punched_bytes = harness.volume.stats().punched_bytes;
    let seconds = (harness.clock_ns - start_ns) as f64 / 1e9;
    let a_second = punched_bytes as f64 / seconds / MIB as f64;
    assert!(punched_bytes > 3 * MIB);
    // The last operation's time is not waited for.
    assert!(a_second < 1.5, "{a_second} MiB/s");
}

#[test]
fn a_read_from_before_the_commit_is_waited_for() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    let mut model = Model::default();
    fragment(&mut harness, &mut model);
    let memory = Memory::new(&vec![0xee; 1 << 20]);
    disk.hold(&[OpKind::Read]);
    let into = memory.bufs();
    let offset_bytes = 0;
    let read = harness.submit(RequestKind::Read { offset_bytes, into }, false);
    harness.volume.start_checkpoint();
    let result = loop {
        harness.turn(false);
        if let Some(result) = harness.volume.take_checkpoint() {
            break result.unwrap();
        }
    };
    harness.catalog.commit(&result);
    harness.volume.checkpoint_committed(result.id);
    for _ in 0..100 {
        harness.clock_ns += 200_000_000;
        harness.turn(false);
    }
    assert_eq!(harness.volume.stats().punched_bytes, 0);
    disk.hold(&[]);
    harness.wait_for(read).unwrap();
    assert!(memory.bytes() == model.bytes(0, 1 << 20));
    reclaim(&mut harness);
    assert!(harness.volume.stats().punched_bytes > 0);
}

#[test]
fn a_file_system_without_holes_is_told_of_once_and_left_alone() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    let mut model = Model::default();
    fragment(&mut harness, &mut model);
    disk.add_fault(FaultRule {
        kind: Some(OpKind::Release),
        segment: None,
        when: When::Probability(1.0),
        fault: Fault::Error(libc::EOPNOTSUPP),
    });
    harness.checkpoint().unwrap();
    reclaim(&mut harness);
    let told = |event: &&VolumeEvent| matches!(event, VolumeEvent::ReclaimFailed { .. });
    assert_eq!(harness.events.iter().filter(told).count(), 1);
    assert_eq!(harness.volume.stats().punched_bytes, 0);
    assert_contents(&mut harness, &model);
}

#[test]
fn a_failed_hole_is_tried_again() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    let mut model = Model::default();
    fragment(&mut harness, &mut model);
    disk.add_fault(FaultRule {
        kind: Some(OpKind::Release),
        segment: None,
        when: When::Nth(0),
        fault: Fault::Error(libc::EIO),
    });
    harness.checkpoint().unwrap();
    reclaim(&mut harness);
    let told = |event: &&VolumeEvent| matches!(event, VolumeEvent::ReclaimFailed { .. });
    assert_eq!(harness.events.iter().filter(told).count(), 1);
    assert!(harness.volume.stats().punched_bytes > 3 * MIB);
}

#[test]
fn a_crash_during_reclaim_costs_nothing() {
    let seed = seed();
    for case in 0..20 {
        let mut rig = Rig::new();
        let mut harness = rig.open();
        let mut model = Model::default();
        fragment(&mut harness, &mut model);
        harness.checkpoint().unwrap();
        for _ in 0..case {
            harness.turn(false);
        }
        let catalog = harness.catalog.clone();
        drop(harness);
        let disk = rig.disk.crash(CrashMode::Random, seed + case);
        let mut io = Rig::io_over(&disk);
        let mut harness = Harness::open(&mut io, &rig.setup, catalog, &disk.list()).unwrap();
        assert_contents(&mut harness, &model);
        harness.checkpoint().unwrap();
        reclaim(&mut harness);
        assert_contents(&mut harness, &model);
        let stats = harness.volume.stats();
        assert!(
            stats.space.allocated_bytes < 10 * MIB,
            "seed {seed}, case {case}"
        );
    }
}

#[test]
fn a_volume_stays_near_what_is_live_however_often_it_is_overwritten() {
    let seed = seed();
    let mut rig = Rig::new();
    let mut harness = rig.open();
    let mut rng = Rng::new(seed);
    let live_bytes = 16 * MIB;
    for i in 0..live_bytes / 65536 {
        harness
            .write(i * 65536, &Model::stamped(i * 65536, 65536, 1))
            .unwrap();
    }
    for n in 0..10 * live_bytes / 8192 {
        let offset = rng.below(live_bytes / 8192) * 8192;
        harness
            .write(offset, &Model::stamped(offset, 8192, n + 2))
            .unwrap();
        if n % 256 == 0 {
            harness.checkpoint().unwrap();
            reclaim(&mut harness);
        }
    }
    harness.checkpoint().unwrap();
    reclaim(&mut harness);
    let stats = harness.volume.stats();
    let ratio = stats.space.allocated_bytes as f64 / live_bytes as f64;
    assert!(ratio < 1.3, "{ratio}, seed {seed}, {stats:?}");
}

#[test]
fn writes_beyond_the_limit_fail_and_unmaps_make_room() {
    let mut rig = Rig::new();
    let mut harness = rig.open();
    harness.volume.set_limit(Some(4 * MIB));
    let mut written = 0;
    let refused = loop {
        match harness.write(written, &Model::stamped(written, 65536, 1)) {
            Ok(()) => written += 65536,
            Err(why) => break why,
        }
    };
    assert_eq!(refused, RequestFailed::NoSpace);
    assert!(written > 3 * MIB, "{written}");
    assert!(harness.volume.stats().space.allocated_bytes <= 4 * MIB);
    let full = |event: &&VolumeEvent| matches!(event, VolumeEvent::VolumeFull { .. });
    for _ in 0..3 {
        assert!(harness.write(written, &[1; 65536]).is_err());
        harness.turn(false);
    }
    assert_eq!(harness.events.iter().filter(full).count(), 1);
    harness.unmap(0, 2 * MIB, true).unwrap();
    harness.flush().unwrap();
    assert!(harness.events.contains(&VolumeEvent::CheckpointWanted));
    harness.checkpoint().unwrap();
    reclaim_while_full(&mut harness);
    harness.write(written, &[1; 65536]).unwrap();
    assert!(harness.events.contains(&VolumeEvent::VolumeSpaceBack));
    harness.volume.set_limit(None);
    harness.write(32 * MIB, &vec![1; 8 << 20]).unwrap();
}

/// A full volume may ask for checkpoints again and again: some turns.
fn reclaim_while_full(harness: &mut Harness<'_>) {
    for _ in 0..50 {
        harness.settle();
        harness.clock_ns += 50_000_000;
    }
}

#[test]
fn a_paused_write_goes_on_when_the_limit_is_raised() {
    let mut rig = Rig::new();
    let mut harness = rig.open();
    harness.volume.set_pause_when_full(true);
    harness.volume.set_limit(Some(2 * MIB));
    let data = Model::stamped(0, 4 << 20, 5);
    let memory = Memory::new(&data);
    let from = memory.bufs();
    let write = harness.submit(
        RequestKind::Write {
            offset_bytes: 0,
            from,
        },
        false,
    );
    reclaim_while_full(&mut harness);
    assert!(harness.finished.is_empty());
    assert_eq!(harness.volume.stats().waiting_for_space, 1);
    // Others are not held up: reads, flushes, and unmaps.
    assert!(harness.read(0, BLOCK).unwrap() == data[..BLOCK]);
    harness.flush().unwrap();
    harness.unmap(8 * MIB, MIB, true).unwrap();
    harness.volume.set_limit(Some(8 * MIB));
    harness.wait_for(write).unwrap();
    assert!(harness.read(0, 4 << 20).unwrap() == data);
    assert_eq!(harness.volume.stats().waiting_for_space, 0);
}

#[test]
fn a_paused_write_goes_on_when_dead_blocks_are_given_back() {
    let mut rig = Rig::new();
    let mut harness = rig.open();
    harness.volume.set_pause_when_full(true);
    for i in 0..3 {
        harness
            .write(i * MIB, &Model::stamped(i * MIB, 1 << 20, 1))
            .unwrap();
    }
    harness.volume.set_limit(Some(4 * MIB));
    let memory = Memory::new(&Model::stamped(4 * MIB, 2 << 20, 5));
    let from = memory.bufs();
    let offset_bytes = 4 * MIB;
    let write = harness.submit(RequestKind::Write { offset_bytes, from }, false);
    reclaim_while_full(&mut harness);
    assert_eq!(harness.volume.stats().waiting_for_space, 1);
    harness.unmap(0, 3 * MIB - 4096, true).unwrap();
    harness.checkpoint().unwrap();
    harness.wait_for(write).unwrap();
    assert!(harness.read(4 * MIB, 2 << 20).unwrap() == memory.bytes());
}

#[test]
fn paused_writes_end_when_queues_are_stopped_or_pausing_is_over() {
    for stop in [true, false] {
        let mut rig = Rig::new();
        let mut harness = rig.open();
        harness.volume.set_pause_when_full(true);
        harness.volume.set_limit(Some(BLOCK as u64));
        let memory = Memory::new(&[1; BLOCK]);
        let submit = |harness: &mut Harness<'_>| {
            let from = memory.bufs();
            harness.submit(
                RequestKind::Write {
                    offset_bytes: 0,
                    from,
                },
                false,
            )
        };
        let first = submit(&mut harness);
        reclaim_while_full(&mut harness);
        assert_eq!(harness.volume.stats().waiting_for_space, 1);
        if stop {
            harness.volume.set_draining(true);
        } else {
            harness.volume.set_pause_when_full(false);
        }
        assert_eq!(harness.wait_for(first), Err(RequestFailed::NoSpace));
        let second = submit(&mut harness);
        assert_eq!(harness.wait_for(second), Err(RequestFailed::NoSpace));
    }
}

#[test]
fn a_paused_write_goes_on_when_a_full_device_has_space_again() {
    let mut rig = Rig::new();
    let disk = rig.disk.clone();
    let mut harness = rig.open();
    harness.volume.set_pause_when_full(true);
    disk.set_free_bytes(Some(2 * MIB));
    let data = Model::stamped(0, 8 << 20, 5);
    let memory = Memory::new(&data);
    let from = memory.bufs();
    let write = harness.submit(
        RequestKind::Write {
            offset_bytes: 0,
            from,
        },
        false,
    );
    reclaim_while_full(&mut harness);
    assert!(harness.finished.is_empty());
    assert!(harness.events.contains(&VolumeEvent::DeviceFull));
    disk.set_free_bytes(None);
    for _ in 0..100 {
        harness.clock_ns += 100_000_000;
        harness.settle();
    }
    harness.wait_for(write).unwrap();
    assert!(harness.read(0, 8 << 20).unwrap() == data);
    assert!(harness.events.contains(&VolumeEvent::SpaceBack));
}

#[test]
fn counters_tell_what_went_to_the_disk() {
    let mut rig = Rig::new();
    let mut harness = rig.open();
    let mut model = Model::default();
    fragment(&mut harness, &mut model);
    harness.checkpoint().unwrap();
    let stats = harness.volume.stats();
    assert_eq!(stats.written_bytes, 12 * MIB);
    assert!((12 * MIB..13 * MIB).contains(&stats.log_bytes), "{stats:?}");
    assert!(stats.node_bytes > 0 && stats.node_bytes < MIB);
    let maps = harness.catalog.rows.values();
    let map_blocks: u32 = maps
        .filter(|row| row.kind == SegmentKind::Map)
        .map(|row| row.used_blocks - 1)
        .sum();
    assert_eq!(stats.node_bytes, u64::from(map_blocks) * 4096);
}
