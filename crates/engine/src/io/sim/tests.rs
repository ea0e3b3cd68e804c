//! Tests that the simulated disk is as good as a real one, and as bad.

use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::device::{DirectoryDevice, Superblock};
use crate::io::{AlignedBuf, IoBuf, UringIo};
use crate::types::{BLOCK_BYTES, SegmentNumber, Uuid};

const DEVICE: DeviceId = DeviceId(0);
const SEGMENT: SegmentNumber = SegmentNumber(1);
const SEEDS: std::ops::Range<u64> = 0..200;

struct Fixture {
    disk: SimDisk,
    io: SimIo,
    next_token: u64,
}

impl Fixture {
    /// A disk with segment 1.
    fn new(seed: u64) -> Self {
        let mut fixture = Self::on(SimDisk::new(seed), seed);
        fixture.run(SEGMENT, create()).unwrap();
        fixture
    }

    fn on(disk: SimDisk, seed: u64) -> Self {
        let mut io = SimIo::new(seed);
        io.add_device(DEVICE, disk.clone());
        Self {
            disk,
            io,
            next_token: 0,
        }
    }

    fn submit(&mut self, segment: SegmentNumber, op: Op) {
        let token = Token(self.next_token);
        self.next_token += 1;
        let device = DEVICE;
        self.io.submit(token, Target { device, segment }, op);
    }

    fn run(&mut self, segment: SegmentNumber, op: Op) -> io::Result<usize> {
        self.submit(segment, op);
        run(&mut self.io)
    }

    fn write(&mut self, offset_bytes: u64, len: usize, byte: u8) -> io::Result<usize> {
        let data = filled(len, byte);
        self.run(SEGMENT, write(offset_bytes, &data))
    }

    fn read(&mut self, offset_bytes: u64, len: usize) -> io::Result<Vec<u8>> {
        let buf = AlignedBuf::new(len);
        let count = self.run(SEGMENT, read(offset_bytes, &buf))?;
        Ok(buf[..count].to_vec())
    }

    fn sync(&mut self) -> io::Result<usize> {
        self.run(SEGMENT, Op::Sync)
    }

    fn fault(&self, kind: OpKind, when: When, fault: Fault) {
        self.disk.add_fault(FaultRule {
            kind: Some(kind),
            segment: None,
            when,
            fault,
        });
    }
}

/// Waits for the one operation in flight.
fn run(io: &mut impl Io) -> io::Result<usize> {
    let mut done = Vec::new();
    while done.is_empty() {
        io.wait(None, &mut done);
    }
    assert_eq!((done.len(), io.in_flight()), (1, 0));
    done.remove(0).result
}

fn create() -> Op {
    let header = Box::new(filled(BLOCK_BYTES, 0xaa));
    Op::Create { header }
}

fn filled(len: usize, byte: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::new(len);
    buf.fill(byte);
    buf
}

fn lend(buf: &AlignedBuf) -> IoBuf {
    // SAFETY: the tests keep their buffers until the operations have completed; the simulated
    // disk does not touch them after its queue was dropped.
    unsafe { buf.io_buf() }
}

fn write(offset_bytes: u64, buf: &AlignedBuf) -> Op {
    Op::Write {
        offset_bytes,
        bufs: vec![lend(buf)],
        direct: false,
    }
}

fn read(offset_bytes: u64, buf: &AlignedBuf) -> Op {
    let bufs = vec![lend(buf)];
    Op::Read { offset_bytes, bufs }
}

fn errno(result: io::Result<usize>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn at(disk: &SimDisk, offset: usize) -> u8 {
    let contents = disk.contents(SEGMENT).unwrap();
    contents.get(offset).copied().unwrap_or(0)
}

/// Each seed's outcome of `f`, sorted, each once.
fn outcomes<T: Ord>(f: impl FnMut(u64) -> T) -> Vec<T> {
    let mut all: Vec<_> = SEEDS.map(f).collect();
    all.sort();
    all.dedup();
    all
}

/// A workload of writes, syncs and removals with several operations in flight.
fn workload(seed: u64) -> Vec<SimEvent> {
    let disk = SimDisk::new(seed);
    disk.record(true);
    let mut fixture = Fixture::on(disk.clone(), seed);
    fixture.run(SEGMENT, create()).unwrap();
    let buf = filled(BLOCK_BYTES, 1);
    let mut done = Vec::new();
    for i in 0..50 {
        fixture.submit(SEGMENT, write(4096 * (1 + i % 7), &buf));
        if i % 5 == 0 {
            fixture.submit(SEGMENT, Op::Sync);
        }
        fixture.io.poll(&mut done);
    }
    while fixture.io.in_flight() > 0 {
        fixture.io.wait(None, &mut done);
    }
    assert_eq!(done.len(), 60);
    disk.history()
}

#[test]
fn same_seed_gives_the_same_run_and_another_gives_another() {
    let first = workload(1);
    assert_eq!(
        first.len(),
        2 * 61,
        "each operation is submitted and completed"
    );
    assert_eq!(first, workload(1));
    assert_ne!(first, workload(2));
}

#[test]
fn operations_complete_in_any_order() {
    let order = |seed| {
        let mut fixture = Fixture::new(seed);
        let bufs = [filled(4096, 1), filled(4096, 2), filled(4096, 3)];
        for buf in &bufs {
            fixture.submit(SEGMENT, write(4096, buf));
        }
        let mut done = Vec::new();
        while fixture.io.in_flight() > 0 {
            fixture.io.wait(None, &mut done);
        }
        // The last one that completes is the one that is seen.
        let last = done.last().unwrap().token.0 as u8;
        assert_eq!(at(&fixture.disk, 4096), last);
        done.iter().map(|c| c.token.0).collect::<Vec<_>>()
    };
    assert_eq!(outcomes(order).len(), 6, "all permutations of three");
}

#[test]
fn what_a_sync_covers_survives_every_crash() {
    for seed in SEEDS {
        let mut fixture = Fixture::new(seed);
        fixture.write(4096, 16384, 7).unwrap();
        fixture.sync().unwrap();
        let release = Op::release(8192..12288);
        fixture.run(SEGMENT, release).unwrap();
        fixture.sync().unwrap();
        for mode in [
            CrashMode::Random,
            CrashMode::LoseUnsynced,
            CrashMode::KeepAll,
        ] {
            let after = fixture.disk.crash(mode, seed);
            assert_eq!(
                after.contents(SEGMENT),
                fixture.disk.contents(SEGMENT),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn each_released_block_may_be_back_until_a_sync() {
    let mut fixture = Fixture::new(1);
    fixture.write(4096, 16384, 7).unwrap();
    fixture.sync().unwrap();
    let release = || Op::Release {
        ranges: vec![4096..8192, 12288..20480],
    };
    fixture.run(SEGMENT, release()).unwrap();
    let after =
        |disk: &SimDisk| [4096, 8192, 12288, 16384].map(|offset_bytes| at(disk, offset_bytes));
    assert_eq!(after(&fixture.disk), [0, 7, 0, 0]);
    let kinds = outcomes(|seed| after(&fixture.disk.crash(CrashMode::Random, seed)));
    assert_eq!(kinds.len(), 8, "every subset: {kinds:?}");
    fixture.sync().unwrap();
    let kinds = outcomes(|seed| after(&fixture.disk.crash(CrashMode::Random, seed)));
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), [[0, 7, 0, 0]]);
    // One that fails may have been done in part.
    let kinds = outcomes(|seed| {
        let mut fixture = Fixture::new(seed);
        fixture.write(4096, 16384, 7).unwrap();
        fixture.fault(OpKind::Release, When::Nth(0), Fault::Error(libc::EIO));
        assert_eq!(errno(fixture.run(SEGMENT, release())), libc::EIO);
        after(&fixture.disk)
    });
    assert_eq!(kinds.len(), 8, "every subset: {kinds:?}");
}

#[test]
fn what_no_sync_covers_may_be_kept_lost_or_torn() {
    let mut fixture = Fixture::new(1);
    fixture.write(4096, 4096, 1).unwrap();
    fixture.sync().unwrap();
    fixture.write(4096, 4096, 2).unwrap();
    let kinds = outcomes(|seed| {
        let after = fixture.disk.crash(CrashMode::Random, seed);
        let contents = after.contents(SEGMENT).unwrap();
        let block = &contents[4096..];
        for atom in block.chunks(512) {
            assert!(
                atom.iter().all(|&byte| byte == atom[0]),
                "512 bytes are never torn"
            );
        }
        match block.iter().filter(|&&byte| byte == 2).count() {
            0 => "lost",
            4096 => "kept",
            _ => "torn",
        }
    });
    assert_eq!(kinds, ["kept", "lost", "torn"]);
    let lost = fixture.disk.crash(CrashMode::LoseUnsynced, 0);
    assert_eq!(at(&lost, 4096), 1);
    let kept = fixture.disk.crash(CrashMode::KeepAll, 0);
    assert_eq!(at(&kept, 4096), 2);
}

#[test]
fn blocks_of_one_write_have_fates_of_their_own_and_order_is_not_kept() {
    let mut fixture = Fixture::new(1);
    fixture.write(4096, 4096, 1).unwrap();
    fixture.write(8192, 4096, 2).unwrap();
    let seen = outcomes(|seed| {
        let after = fixture.disk.crash(CrashMode::Random, seed);
        let kept = |offset, byte| at(&after, offset) == byte;
        (kept(4096, 1), kept(8192, 2))
    });
    assert!(
        seen.contains(&(false, true)),
        "the later one without the earlier one"
    );
    assert!(seen.contains(&(true, false)));
    assert!(seen.contains(&(true, true)) && seen.contains(&(false, false)));
}

#[test]
fn writes_in_flight_may_have_happened_or_not() {
    let seen = outcomes(|seed| {
        let mut fixture = Fixture::new(seed);
        fixture.disk.hold(&[OpKind::Write]);
        let buf = filled(4096, 5);
        fixture.submit(SEGMENT, write(4096, &buf));
        drop(fixture.io);
        let dead = fixture.disk.kill(seed);
        (
            at(&dead, 4096),
            at(&fixture.disk.crash(CrashMode::Random, seed), 4096),
        )
    });
    assert_eq!(seen.iter().map(|seen| seen.0).min(), Some(0));
    assert_eq!(seen.iter().map(|seen| seen.0).max(), Some(5));
    assert_eq!(seen.iter().map(|seen| seen.1).min(), Some(0));
    assert_eq!(seen.iter().map(|seen| seen.1).max(), Some(5));
}

#[test]
fn sync_promises_nothing_for_writes_after_its_submission() {
    let mut fixture = Fixture::new(3);
    fixture.write(4096, 4096, 1).unwrap();
    fixture.disk.hold(&[OpKind::Sync]);
    fixture.submit(SEGMENT, Op::Sync);
    let buf = filled(4096, 2);
    fixture.submit(SEGMENT, write(8192, &buf));
    let mut done = Vec::new();
    fixture.io.wait(None, &mut done);
    assert_eq!(done.len(), 1, "the write");
    fixture.disk.hold(&[]);
    fixture.io.wait(None, &mut done);
    assert_eq!(done.len(), 2);
    let after = fixture.disk.crash(CrashMode::LoseUnsynced, 0);
    assert_eq!((at(&after, 4096), at(&after, 8192)), (1, 0));
}

#[test]
fn death_of_the_process_keeps_completed_writes_but_power_loss_after_it_may_not() {
    for seed in SEEDS {
        let mut fixture = Fixture::new(seed);
        fixture.write(4096, 8192, 3).unwrap();
        let dead = fixture.disk.kill(seed);
        assert_eq!(
            dead.contents(SEGMENT),
            fixture.disk.contents(SEGMENT),
            "seed {seed}"
        );
        let after = dead.crash(CrashMode::LoseUnsynced, seed);
        assert_eq!(after.contents(SEGMENT).unwrap().len(), 4096, "seed {seed}");
        // And the next process can save it.
        let mut next = Fixture::on(dead, seed);
        next.sync().unwrap();
        let after = next.disk.crash(CrashMode::LoseUnsynced, seed);
        assert_eq!(
            after.contents(SEGMENT),
            fixture.disk.contents(SEGMENT),
            "seed {seed}"
        );
    }
}

#[test]
fn failed_sync_loses_data_that_a_later_sync_does_not_save() {
    let seen = outcomes(|seed| {
        let mut fixture = Fixture::new(seed);
        fixture.write(4096, 4096, 9).unwrap();
        fixture.fault(OpKind::Sync, When::Nth(0), Fault::Error(libc::EIO));
        assert_eq!(errno(fixture.sync()), libc::EIO);
        fixture.sync().unwrap();
        let now = at(&fixture.disk, 4096);
        let after = at(&fixture.disk.crash(CrashMode::KeepAll, 0), 4096);
        (now, after)
    });
    assert_eq!(seen, [(0, 0), (9, 0), (9, 9)]);
}

#[test]
fn lying_sync_makes_nothing_durable() {
    let mut fixture = Fixture::new(1);
    fixture.write(4096, 4096, 9).unwrap();
    fixture.fault(OpKind::Sync, When::Nth(0), Fault::Lost);
    fixture.sync().unwrap();
    assert_eq!(at(&fixture.disk.crash(CrashMode::LoseUnsynced, 0), 4096), 0);
}

#[test]
fn created_segment_survives_and_one_being_created_may_be_there_in_part() {
    let fixture = Fixture::new(1);
    let after = fixture.disk.crash(CrashMode::LoseUnsynced, 0);
    assert_eq!(after.contents(SEGMENT).unwrap(), vec![0xaa; 4096]);

    let seen = outcomes(|seed| {
        let mut fixture = Fixture::on(SimDisk::new(seed), seed);
        fixture.disk.hold(&[OpKind::Create]);
        fixture.submit(SEGMENT, create());
        let after = fixture.disk.crash(CrashMode::Random, seed);
        match after.contents(SEGMENT) {
            None => "absent",
            Some(contents) if contents.is_empty() => "empty",
            Some(contents) if contents == [0xaa; 4096] => "whole",
            Some(_) => "torn",
        }
    });
    assert_eq!(seen, ["absent", "empty", "torn", "whole"]);
}

#[test]
fn removed_segment_may_be_back_until_its_directory_is_durable() {
    let mut fixture = Fixture::new(1);
    fixture.run(SEGMENT, Op::Remove).unwrap();
    fixture.run(SEGMENT, Op::Remove).unwrap();
    assert_eq!(fixture.disk.list(), []);
    let back = |disk: &SimDisk| {
        outcomes(|seed| {
            !disk
                .crash(CrashMode::Random, seed)
                .list()
                .contains(&SEGMENT)
        })
    };
    assert_eq!(back(&fixture.disk), [false, true]);
    fixture.run(SegmentNumber(5000), create()).unwrap();
    assert_eq!(back(&fixture.disk), [false, true], "another directory");
    fixture.run(SegmentNumber(2), create()).unwrap();
    assert_eq!(back(&fixture.disk), [true]);
}

#[test]
fn full_disk_fails_writes_and_reservations_until_space_is_given_back() {
    let mut fixture = Fixture::new(1);
    fixture.disk.set_free_bytes(Some(3 * 4096));
    let range = |offset_bytes, len_bytes| (offset_bytes, len_bytes);
    let reserve = |(offset_bytes, len_bytes)| Op::Reserve {
        offset_bytes,
        len_bytes,
    };
    fixture
        .run(SEGMENT, reserve(range(4096, 2 * 4096)))
        .unwrap();
    fixture.write(4096, 2 * 4096, 1).unwrap();
    assert_eq!(errno(fixture.write(12288, 2 * 4096, 1)), libc::ENOSPC);
    assert_eq!(errno(fixture.run(SegmentNumber(2), create())), libc::ENOSPC);
    let error = fixture
        .run(SEGMENT, reserve(range(16384, 4096)))
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    let release = Op::release(4096..8192);
    fixture.run(SEGMENT, release).unwrap();
    fixture.run(SEGMENT, reserve(range(16384, 4096))).unwrap();
    assert_eq!(at(&fixture.disk, 4096), 0);
    fixture.run(SEGMENT, Op::Remove).unwrap();
    fixture.run(SegmentNumber(2), create()).unwrap();
}

#[test]
fn faults_strike_the_operation_they_are_meant_for() {
    let mut fixture = Fixture::new(1);
    fixture.fault(OpKind::Write, When::Nth(1), Fault::Error(libc::EIO));
    fixture.write(4096, 4096, 1).unwrap();
    fixture.sync().unwrap();
    assert_eq!(errno(fixture.write(8192, 4096, 1)), libc::EIO);
    fixture.write(8192, 4096, 1).unwrap();

    fixture.disk.add_fault(FaultRule {
        kind: None,
        segment: Some(SegmentNumber(2)),
        when: When::Probability(1.0),
        fault: Fault::Error(libc::EIO),
    });
    assert_eq!(errno(fixture.run(SegmentNumber(2), create())), libc::EIO);
    fixture.sync().unwrap();
    fixture.disk.clear_faults();
    fixture.run(SegmentNumber(2), create()).unwrap();
}

#[test]
fn failed_write_may_have_happened_in_part() {
    let seen = outcomes(|seed| {
        let mut fixture = Fixture::new(seed);
        fixture.fault(OpKind::Write, When::Nth(0), Fault::Error(libc::EIO));
        assert_eq!(errno(fixture.write(4096, 8192, 6)), libc::EIO);
        (at(&fixture.disk, 4096), at(&fixture.disk, 8192))
    });
    assert_eq!(seen, [(0, 0), (0, 6), (6, 0), (6, 6)]);
}

#[test]
fn wrong_bytes_are_read_once_written_for_good_or_rot() {
    let ones = |bytes: &[u8]| bytes.iter().map(|byte| byte.count_ones()).sum::<u32>();
    let mut fixture = Fixture::new(1);
    fixture.write(4096, 4096, 0).unwrap();
    fixture.fault(OpKind::Read, When::Nth(0), Fault::FlipBit);
    assert_eq!(ones(&fixture.read(4096, 4096).unwrap()), 1);
    assert_eq!(ones(&fixture.read(4096, 4096).unwrap()), 0);

    fixture.fault(OpKind::Write, When::Nth(0), Fault::FlipBit);
    fixture.write(4096, 4096, 0).unwrap();
    assert_eq!(ones(&fixture.read(4096, 4096).unwrap()), 1);

    fixture.write(4096, 4096, 0).unwrap();
    fixture.sync().unwrap();
    assert!(fixture.disk.flip_bit(SEGMENT, 5000, 3));
    assert!(
        !fixture.disk.flip_bit(SEGMENT, 50_000, 3),
        "nothing is there"
    );
    let after = fixture.disk.crash(CrashMode::KeepAll, 0);
    assert_eq!(at(&after, 5000), 8);
}

#[test]
fn misdirected_and_lost_writes_claim_success() {
    let mut fixture = Fixture::new(1);
    fixture.write(4096, 8192, 1).unwrap();
    let elsewhere = Fault::Misdirect { offset_bytes: 8192 };
    fixture.fault(OpKind::Write, When::Nth(0), elsewhere);
    assert_eq!(fixture.write(4096, 4096, 2).unwrap(), 4096);
    assert_eq!((at(&fixture.disk, 4096), at(&fixture.disk, 8192)), (1, 2));
    fixture.fault(OpKind::Write, When::Nth(0), Fault::Lost);
    assert_eq!(fixture.write(4096, 4096, 3).unwrap(), 4096);
    assert_eq!(at(&fixture.disk, 4096), 1);
    fixture.fault(OpKind::Read, When::Nth(0), elsewhere);
    assert_eq!(fixture.read(4096, 4096).unwrap(), vec![2; 4096]);
}

#[test]
#[should_panic(expected = "changed while it was being written")]
fn changing_a_buffer_in_flight_is_caught() {
    let mut fixture = Fixture::new(1);
    let mut buf = filled(4096, 1);
    fixture.submit(SEGMENT, write(4096, &buf));
    buf[100] = 2;
    fixture.io.wait(None, &mut Vec::new());
}

#[test]
#[should_panic(expected = "not aligned")]
fn direct_write_without_alignment_is_caught() {
    let mut fixture = Fixture::new(1);
    let buf = filled(4096, 1);
    let bufs = vec![lend(&buf).slice(0, 512)];
    let op = Op::Write {
        offset_bytes: 4096,
        bufs,
        direct: true,
    };
    fixture.submit(SEGMENT, op);
}

#[test]
#[should_panic(expected = "waiting for ever")]
fn waiting_for_what_cannot_come_is_caught() {
    Fixture::new(1).io.wait(None, &mut Vec::new());
}

#[test]
fn unknown_device_and_missing_segment_are_errors() {
    let mut fixture = Fixture::new(1);
    assert_eq!(errno(fixture.run(SegmentNumber(9), Op::Sync)), libc::ENOENT);
    assert_eq!(errno(fixture.run(SEGMENT, create())), libc::EEXIST);
    let target = Target {
        device: DeviceId(3),
        segment: SEGMENT,
    };
    fixture.io.submit(Token(1), target, Op::Sync);
    assert_eq!(errno(run(&mut fixture.io)), libc::ENODEV);
    assert!(fixture.disk.identify(SEGMENT).is_err(), "0xaa is no header");
}

/// The two implementations side by side: every result and every byte is the same.
#[test]
fn simulated_and_real_devices_agree() {
    let seed = 0x5eed;
    println!("seed {seed:#x}");
    let directory = TempDir::new().unwrap();
    let superblock = Superblock {
        pool: Uuid([1; 16]),
        device: Uuid([2; 16]),
        segment_bytes: 1 << 20,
        created_ns: 3,
        pool_name: "tank".to_owned(),
    };
    DirectoryDevice::format(directory.path(), &superblock).unwrap();
    let device = Arc::new(DirectoryDevice::open(directory.path(), true).unwrap());
    let mut real = UringIo::new(8).unwrap();
    real.add_device(DEVICE, Arc::clone(&device));
    let disk = SimDisk::new(seed);
    let mut simulated = SimIo::new(seed);
    simulated.add_device(DEVICE, disk.clone());
    let mut rng = SimRng::new(seed);

    for step in 0..600 {
        let segment = SegmentNumber(rng.below(3));
        let block = rng.below(32);
        let blocks = 1 + rng.below(8);
        let kind = rng.below(12);
        let direct = rng.coin();
        let (skew, cut) = match direct {
            true => (0, 0),
            false => (rng.below(4096), rng.below(4096) as usize),
        };
        let offset_bytes = block * 4096 + skew;
        let len_bytes = blocks * 4096;
        let buf = filled(len_bytes as usize, 1 + (step % 255) as u8);
        let back = [filled(buf.len(), 0), filled(buf.len(), 0)];
        let mut results = Vec::new();
        for (which, io) in [&mut real as &mut dyn Io, &mut simulated]
            .into_iter()
            .enumerate()
        {
            let op = match kind {
                0 => create(),
                1 => Op::Remove,
                2 => Op::Sync,
                3 => Op::Release {
                    ranges: vec![
                        offset_bytes..offset_bytes + len_bytes / 2,
                        offset_bytes + len_bytes..offset_bytes + len_bytes + 4096,
                    ],
                },
                4 => Op::Reserve {
                    offset_bytes,
                    len_bytes,
                },
                5..=8 => Op::Read {
                    offset_bytes,
                    bufs: vec![lend(&back[which])],
                },
                _ => Op::Write {
                    offset_bytes,
                    bufs: vec![lend(&buf).slice(0, buf.len() - cut)],
                    direct,
                },
            };
            let device = DEVICE;
            io.submit(Token(step), Target { device, segment }, op);
            let mut done = Vec::new();
            while done.is_empty() {
                io.wait(None, &mut done);
            }
            let result = done.remove(0).result;
            results.push(result.map_err(|error| error.raw_os_error()));
        }
        assert_eq!(results[0], results[1], "step {step}, kind {kind}");
        assert!(
            back[0][..] == back[1][..],
            "step {step}: different bytes were read"
        );
        assert_eq!(device.list().unwrap(), disk.list(), "step {step}");
        for number in disk.list() {
            let real = std::fs::read(device.segment_path(number)).unwrap();
            assert!(
                real == disk.contents(number).unwrap(),
                "step {step}: {number}"
            );
        }
    }
}
