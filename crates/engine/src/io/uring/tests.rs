//! Tests against real files: on the default temporary directory, and on tmpfs, where file systems
//! differ in direct I/O.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use rustix::event::EventfdFlags;
use tempfile::TempDir;

use super::*;
use crate::device::Superblock;
use crate::io::{AlignedBuf, IoBuf};
use crate::types::{BLOCK_BYTES, SegmentNumber, Uuid};

const DEVICE: DeviceId = DeviceId(0);

struct Fixture {
    io: UringIo,
    device: Arc<DirectoryDevice>,
    next_token: u64,
    _directory: Option<TempDir>,
}

impl Fixture {
    fn at(path: &Path, entries: u32) -> Self {
        let superblock = Superblock {
            pool: Uuid([1; 16]),
            device: Uuid([2; 16]),
            segment_bytes: 1 << 20,
            created_ns: 3,
            pool_name: "tank".to_owned(),
        };
        DirectoryDevice::format(path, &superblock).unwrap();
        let device = Arc::new(DirectoryDevice::open(path, true).unwrap());
        let mut io = UringIo::new(entries).unwrap();
        io.add_device(DEVICE, Arc::clone(&device));
        Self {
            io,
            device,
            next_token: 0,
            _directory: None,
        }
    }

    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let mut fixture = Self::at(directory.path(), 32);
        fixture._directory = Some(directory);
        fixture
    }

    /// One on each kind of file system there is.
    fn each() -> Vec<Self> {
        let mut all = vec![Self::new()];
        if let Ok(directory) = TempDir::new_in("/dev/shm") {
            let mut fixture = Self::at(directory.path(), 32);
            fixture._directory = Some(directory);
            all.push(fixture);
        }
        all
    }

    fn submit(&mut self, segment: u64, op: Op) -> Token {
        let token = Token(self.next_token);
        self.next_token += 1;
        self.io.submit(token, target(segment), op);
        token
    }

    /// Does one operation alone.
    fn run(&mut self, segment: u64, op: Op) -> io::Result<usize> {
        let token = self.submit(segment, op);
        let mut done = Vec::new();
        while done.is_empty() {
            self.io.wait(None, &mut done);
        }
        assert_eq!(done.len(), 1);
        assert_eq!(done[0].token, token);
        assert_eq!(self.io.in_flight(), 0);
        done.remove(0).result
    }

    fn create(&mut self, segment: u64) {
        self.run(segment, create()).unwrap();
    }

    fn read(&mut self, segment: u64, offset_bytes: u64, len: usize) -> io::Result<Vec<u8>> {
        let buf = AlignedBuf::new(len);
        let count = self.run(segment, read(offset_bytes, &buf))?;
        Ok(buf[..count].to_vec())
    }
}

fn target(segment: u64) -> Target {
    Target {
        device: DEVICE,
        segment: SegmentNumber(segment),
    }
}

fn create() -> Op {
    let mut header = AlignedBuf::new(BLOCK_BYTES);
    header.fill(0xaa);
    Op::Create {
        header: Box::new(header),
    }
}

fn lend(buf: &AlignedBuf) -> IoBuf {
    // SAFETY: the tests keep their buffers until the operations have completed, or the UringIo
    // was dropped.
    unsafe { buf.io_buf() }
}

fn read(offset_bytes: u64, buf: &AlignedBuf) -> Op {
    let bufs = vec![lend(buf)];
    Op::Read { offset_bytes, bufs }
}

fn write(offset_bytes: u64, buf: &AlignedBuf, direct: bool) -> Op {
    Op::Write {
        offset_bytes,
        bufs: vec![lend(buf)],
        direct,
    }
}

fn filled(len: usize, byte: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::new(len);
    buf.fill(byte);
    buf
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn ring_bell(fd: &OwnedFd) {
    assert_eq!(rustix::io::write(fd, &1u64.to_ne_bytes()), Ok(8));
}

#[test]
fn what_is_written_is_read_back_directly_and_buffered() {
    for mut fixture in Fixture::each() {
        fixture.create(7);
        for (direct, offset) in [(false, 4096), (true, 65536)] {
            let data = filled(8192, if direct { 2 } else { 1 });
            assert_eq!(fixture.run(7, write(offset, &data, direct)).unwrap(), 8192);
            assert_eq!(fixture.run(7, Op::Sync).unwrap(), 0);
            assert_eq!(fixture.read(7, offset, 8192).unwrap(), data.to_vec());
        }
        assert_eq!(fixture.read(7, 0, 4096).unwrap(), vec![0xaa; 4096]);
        assert_eq!(
            fixture.read(7, 16384, 4096).unwrap(),
            vec![0; 4096],
            "a hole"
        );
    }
}

#[test]
fn lists_longer_than_one_system_call_takes_are_carried_on() {
    for mut fixture in Fixture::each() {
        fixture.create(1);
        let mut data = AlignedBuf::new(3000 * 100);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = (i / 100 * 7) as u8;
        }
        let whole = lend(&data);
        let mut bufs: Vec<_> = (0..3000).map(|i| whole.slice(i * 100, 100)).collect();
        bufs.insert(10, whole.slice(5, 0));
        let op = Op::Write {
            offset_bytes: 4096,
            bufs,
            direct: false,
        };
        assert_eq!(fixture.run(1, op).unwrap(), 300_000);
        let back = AlignedBuf::new(300_100);
        let bufs = (0..3001).map(|i| lend(&back).slice(i * 100, 100)).collect();
        let op = Op::Read {
            offset_bytes: 4096,
            bufs,
        };
        assert_eq!(fixture.run(1, op).unwrap(), 300_000, "short at the end");
        assert!(back[..300_000] == data[..]);
    }
}

#[test]
fn read_at_the_end_is_short_and_beyond_it_empty() {
    for mut fixture in Fixture::each() {
        fixture.create(1);
        assert_eq!(fixture.read(1, 0, 8192).unwrap().len(), 4096);
        assert_eq!(fixture.read(1, 8192, 4096).unwrap().len(), 0);
        let buf = AlignedBuf::new(4096);
        let nothing = Op::Read {
            offset_bytes: 0,
            bufs: vec![lend(&buf).slice(0, 0)],
        };
        assert_eq!(fixture.run(1, nothing).unwrap(), 0);
    }
}

#[test]
fn errors_keep_the_number_of_the_operating_system() {
    let mut fixture = Fixture::new();
    fixture.create(1);
    let errno = |result: io::Result<usize>| result.unwrap_err().raw_os_error();
    assert_eq!(errno(fixture.run(1, create())), Some(libc::EEXIST));
    assert_eq!(errno(fixture.run(2, Op::Sync)), Some(libc::ENOENT));
    fixture.run(1, Op::Remove).unwrap();
    fixture.run(1, Op::Remove).unwrap();
    let buf = AlignedBuf::new(4096);
    assert_eq!(errno(fixture.run(1, read(0, &buf))), Some(libc::ENOENT));
    fixture.io.remove_device(DEVICE);
    assert_eq!(errno(fixture.run(1, Op::Sync)), Some(libc::ENODEV));
}

#[test]
fn reserved_space_keeps_the_length_and_released_space_reads_as_zeroes() {
    for mut fixture in Fixture::each() {
        fixture.create(1);
        let reserve = Op::Reserve {
            offset_bytes: 4096,
            len_bytes: 512 << 10,
        };
        fixture.run(1, reserve).unwrap();
        let path = fixture.device.segment_path(SegmentNumber(1));
        let blocks = |path: &Path| {
            let meta = std::fs::metadata(path).unwrap();
            std::os::unix::fs::MetadataExt::blocks(&meta)
        };
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
        assert!(blocks(&path) >= 1024, "512 KiB are allocated");

        let data = filled(16384, 5);
        fixture.run(1, write(4096, &data, true)).unwrap();
        let release = Op::release(8192..12288);
        fixture.run(1, release).unwrap();
        let mut expected = vec![5; 16384];
        expected[4096..8192].fill(0);
        assert_eq!(fixture.read(1, 4096, 32768).unwrap(), expected);

        let before = blocks(&path);
        let release = Op::Release {
            ranges: vec![4096..8192, 16384..20480, 40960..40960, 1 << 30..2 << 30],
        };
        fixture.run(1, release).unwrap();
        expected[..4096].fill(0);
        expected[12288..].fill(0);
        assert_eq!(fixture.read(1, 4096, 32768).unwrap(), expected);
        assert!(blocks(&path) < before, "space was given back");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 20480);
    }
}

#[test]
fn more_operations_than_the_ring_holds_all_complete_once() {
    let directory = TempDir::new().unwrap();
    let mut fixture = Fixture::at(directory.path(), 2);
    fixture.create(1);
    let bufs: Vec<_> = (0..200u8).map(|i| filled(4096, i)).collect();
    let mut tokens = HashSet::new();
    for (i, buf) in bufs.iter().enumerate() {
        let offset = 4096 * (i as u64 + 1);
        tokens.insert(fixture.submit(1, write(offset, buf, i % 2 == 0)));
    }
    tokens.insert(fixture.submit(2, create()));
    assert_eq!(fixture.io.in_flight(), 201);
    let mut done = Vec::new();
    while fixture.io.in_flight() > 0 {
        fixture.io.wait(None, &mut done);
    }
    for completion in done {
        completion.result.unwrap();
        assert!(tokens.remove(&completion.token), "completed twice");
    }
    assert!(tokens.is_empty());
    for i in 0..200u8 {
        let offset = 4096 * (u64::from(i) + 1);
        assert_eq!(fixture.read(1, offset, 4096).unwrap(), vec![i; 4096]);
    }
}

#[test]
fn many_segments_are_served_with_few_open_files() {
    let mut fixture = Fixture::each().pop().unwrap();
    let header = AlignedBuf::new(BLOCK_BYTES);
    for number in 0..600 {
        fixture
            .device
            .create(SegmentNumber(number), &header)
            .unwrap();
    }
    let open = |fixture: &Fixture| {
        (0..600)
            .filter(|&n| {
                let file = fixture.device.open_file(SegmentNumber(n), Access::Buffered);
                file.is_some()
            })
            .count()
    };
    assert!(open(&fixture) <= 512);
    let bufs: Vec<_> = (0..600).map(|_| filled(4096, 1)).collect();
    for (number, buf) in bufs.iter().enumerate() {
        fixture.submit(number as u64, read(0, buf));
    }
    let mut done = Vec::new();
    while fixture.io.in_flight() > 0 {
        fixture.io.wait(None, &mut done);
    }
    assert_eq!(done.len(), 600);
    for completion in done {
        assert_eq!(completion.result.unwrap(), 4096);
    }
    assert!(bufs.iter().all(|buf| buf.iter().all(|&byte| byte == 0)));
    // The cache grew by what was in flight, and shrinks with the next file.
    fixture.create(600);
    assert!(open(&fixture) <= 512);
}

#[test]
fn full_device_fails_a_reservation_and_a_write_with_storage_full() {
    let directory = TempDir::new().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "none"])
        .arg(directory.path())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("passed over: mounting a tmpfs is not allowed here");
        return;
    }
    let mut fixture = Fixture::at(directory.path(), 8);
    fixture.create(1);
    let reserve = Op::Reserve {
        offset_bytes: 0,
        len_bytes: 1 << 20,
    };
    let error = fixture.run(1, reserve).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    let data = filled(512 << 10, 1);
    let error = fixture.run(1, write(4096, &data, true)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    drop(fixture);
    let unmounted = Command::new("umount").arg(directory.path()).status();
    assert!(unmounted.unwrap().success(), "no file is left open");
}

#[test]
fn watched_eventfd_wakes_a_sleeper_and_is_told_once() {
    let mut io = UringIo::new(8).unwrap();
    let bell = eventfd();
    let other = eventfd();
    io.watch(bell.as_fd(), WatchId(1)).unwrap();
    io.watch(other.as_fd(), WatchId(2)).unwrap();
    let mut done = Vec::new();
    let mut fired = Vec::new();
    for _ in 0..3 {
        std::thread::scope(|scope| {
            scope.spawn(|| ring_bell(&bell));
            io.wait(None, &mut done);
        });
        assert!(io.has_fired());
        io.take_fired(&mut fired);
        assert_eq!(std::mem::take(&mut fired), [WatchId(1)]);
        rustix::io::read(&bell, &mut [0; 8]).unwrap();
    }
    // Rung twice before anyone looks: told once.
    ring_bell(&bell);
    ring_bell(&bell);
    ring_bell(&other);
    while fired.len() < 2 {
        io.wait(None, &mut done);
        io.take_fired(&mut fired);
    }
    fired.sort_unstable();
    assert_eq!(fired, [WatchId(1), WatchId(2)]);
    assert!(done.is_empty());
}

#[test]
fn eventfd_that_was_readable_before_it_is_watched_fires() {
    let mut io = UringIo::new(8).unwrap();
    let bell = eventfd();
    ring_bell(&bell);
    io.watch(bell.as_fd(), WatchId(5)).unwrap();
    io.wait(None, &mut Vec::new());
    let mut fired = Vec::new();
    io.take_fired(&mut fired);
    assert_eq!(fired, [WatchId(5)]);
}

#[test]
fn unwatched_eventfd_is_never_told_again() {
    let mut io = UringIo::new(8).unwrap();
    let bell = eventfd();
    let other = eventfd();
    io.watch(bell.as_fd(), WatchId(1)).unwrap();
    ring_bell(&bell);
    io.wait(None, &mut Vec::new());
    io.unwatch(WatchId(1));
    assert!(!io.has_fired(), "fired already, but not taken");
    // Another one in its place: it must not be told for the old one's late entries.
    io.watch(other.as_fd(), WatchId(2)).unwrap();
    ring_bell(&bell);
    io.wait(Some(Duration::from_millis(10)), &mut Vec::new());
    assert!(!io.has_fired());
    ring_bell(&other);
    io.wait(None, &mut Vec::new());
    let mut fired = Vec::new();
    io.take_fired(&mut fired);
    assert_eq!(fired, [WatchId(2)]);
}

#[test]
fn wait_ends_at_its_time_limit() {
    let mut io = UringIo::new(8).unwrap();
    let start = Instant::now();
    io.wait(Some(Duration::from_millis(20)), &mut Vec::new());
    assert!(start.elapsed() >= Duration::from_millis(20));
    io.wait(Some(Duration::ZERO), &mut Vec::new());
}

#[test]
fn completion_ends_a_wait_long_before_its_limit() {
    let mut fixture = Fixture::new();
    for op in [create(), Op::Sync] {
        fixture.submit(1, op);
        let mut done = Vec::new();
        fixture.io.wait(Some(Duration::from_secs(3600)), &mut done);
        assert_eq!(done.len(), 1);
        done.remove(0).result.unwrap();
    }
}

#[test]
fn ring_may_move_to_another_thread_before_its_first_use() {
    let Fixture {
        mut io,
        device,
        _directory,
        ..
    } = Fixture::new();
    let bell = eventfd();
    io.watch(bell.as_fd(), WatchId(1)).unwrap();
    io.submit(Token(1), target(1), create());
    std::thread::spawn(move || {
        let mut done = Vec::new();
        io.wait(None, &mut done);
        assert_eq!(done[0].token, Token(1));
    })
    .join()
    .unwrap();
    assert_eq!(device.list().unwrap(), [SegmentNumber(1)]);
}

#[test]
fn dropping_waits_for_what_the_kernel_has() {
    for direct in [false, true] {
        let mut fixture = Fixture::new();
        fixture.create(1);
        // The file is open, so that the writes go to the kernel at once.
        let first = filled(4096, 1);
        fixture.run(1, write(4096, &first, direct)).unwrap();
        let mut data = filled(900 << 10, 7);
        fixture.submit(1, write(4096, &data, direct));
        fixture.io.flush();
        let path = fixture.device.segment_path(SegmentNumber(1));
        drop(fixture.io);
        data.fill(9);
        let written = std::fs::read(path).unwrap();
        assert_eq!(written.len(), 4096 + data.len());
        assert!(written[4096..].iter().all(|&byte| byte == 7));
    }
}

#[test]
fn dropping_with_unsubmitted_and_helped_work_ends() {
    let directory = TempDir::new().unwrap();
    let mut fixture = Fixture::at(directory.path(), 2);
    let bufs: Vec<_> = (0..20).map(|_| AlignedBuf::new(4096)).collect();
    for (i, buf) in bufs.iter().enumerate() {
        fixture.submit(i as u64, read(0, buf));
    }
    fixture.submit(100, create());
    drop(fixture);
    DirectoryDevice::open(directory.path(), true).expect("nobody holds the device any more");
}

#[test]
fn polling_with_nothing_to_do_makes_no_system_call() {
    let mut fixture = Fixture::new();
    let bell = eventfd();
    fixture.io.watch(bell.as_fd(), WatchId(1)).unwrap();
    fixture.create(1);
    let mut done = Vec::new();
    fixture.io.poll(&mut done);
    let before = fixture.io.system_calls();
    for _ in 0..1000 {
        fixture.io.poll(&mut done);
    }
    assert_eq!(fixture.io.system_calls(), before);
    ring_bell(&bell);
    while !fixture.io.has_fired() {
        fixture.io.poll(&mut done);
    }
    assert!(fixture.io.system_calls() <= before + 2);
    assert!(done.is_empty());
}
