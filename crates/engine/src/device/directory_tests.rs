//! Tests of directory devices on real file systems. Those that need a file system of their own
//! mount a tmpfs and are passed over, with a note, where that is not allowed.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use tempfile::TempDir;

use super::*;
use crate::device::DeviceErrorKind;
use crate::segment::SegmentKind;
use crate::types::{Epoch, Uuid};

const SEGMENT_BYTES: u64 = 1 << 20;

fn superblock() -> Superblock {
    Superblock {
        pool: Uuid([1; 16]),
        device: Uuid([2; 16]),
        segment_bytes: SEGMENT_BYTES,
        created_ns: 3,
        pool_name: "tank".to_owned(),
    }
}

fn header(number: u64) -> AlignedBuf {
    header_of(SegmentHeader {
        kind: SegmentKind::Log,
        pool: Uuid([1; 16]),
        volume: Uuid([9; 16]),
        number: SegmentNumber(number),
        epoch: Epoch(1),
        segment_bytes: SEGMENT_BYTES,
        logical_block_bytes: 4096,
        volume_bytes: 1 << 30,
        created_ns: 4,
        volume_name: "disk".to_owned(),
    })
}

fn header_of(header: SegmentHeader) -> AlignedBuf {
    let mut block = AlignedBuf::new(BLOCK_BYTES);
    header.encode(&mut block);
    block
}

fn device() -> (TempDir, DirectoryDevice) {
    let directory = TempDir::new().unwrap();
    DirectoryDevice::format(directory.path(), &superblock()).unwrap();
    let device = DirectoryDevice::open(directory.path(), true).unwrap();
    (directory, device)
}

/// A tmpfs that is unmounted when dropped.
struct Mount(TempDir);

impl Mount {
    fn new(options: &str) -> Option<Self> {
        let directory = TempDir::new().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "none"])
            .arg(directory.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            Some(Self(directory))
        } else {
            eprintln!("passed over: mounting a tmpfs is not allowed here");
            None
        }
    }

    fn remount(&self, options: &str) {
        let status = Command::new("mount")
            .args(["-o", options])
            .arg(self.0.path())
            .status();
        assert!(status.unwrap().success());
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(status.unwrap().success());
    }
}

#[test]
fn formatted_device_opens_with_its_superblock() {
    let (directory, device) = device();
    assert_eq!(device.superblock(), &superblock());
    assert_eq!(device.list().unwrap(), []);
    assert_eq!(device.path(), directory.path());
    let (free, total) = device.space().unwrap();
    assert!(0 < free && free <= total);
}

#[test]
fn format_refuses_what_is_not_an_empty_directory() {
    let directory = TempDir::new().unwrap();
    let missing = directory.path().join("missing");
    let error = DirectoryDevice::format(&missing, &superblock()).unwrap_err();
    assert_eq!(error.kind(), DeviceErrorKind::NotFound);

    fs::create_dir(directory.path().join("lost+found")).unwrap();
    DirectoryDevice::format(directory.path(), &superblock()).unwrap();
    let error = DirectoryDevice::format(directory.path(), &superblock()).unwrap_err();
    assert_eq!(error.kind(), DeviceErrorKind::Exists, "{error}");

    let bad = Superblock {
        segment_bytes: 12345,
        ..superblock()
    };
    let error = DirectoryDevice::format(&missing, &bad).unwrap_err();
    assert_eq!(error.kind(), DeviceErrorKind::Usage, "{error}");
}

#[test]
fn second_opening_is_refused_and_names_the_holder() {
    let (directory, device) = device();
    let error = DirectoryDevice::open(directory.path(), true).unwrap_err();
    assert_eq!(error.kind(), DeviceErrorKind::Busy);
    let pid = std::process::id();
    assert!(
        error.to_string().contains(&format!("PID {pid};")),
        "{error}"
    );

    drop(device);
    // As another process would hold it: a lock of another open file, another PID in it.
    let mut lock = File::create(directory.path().join(LOCK)).unwrap();
    lock.try_lock().unwrap();
    writeln!(lock, "4242").unwrap();
    let error = DirectoryDevice::open(directory.path(), true).unwrap_err();
    assert!(
        matches!(
            error,
            DeviceError::Locked {
                holder: Some(4242),
                ..
            }
        ),
        "{error}"
    );
    drop(lock);
    DirectoryDevice::open(directory.path(), true).unwrap();
}

#[test]
fn damaged_superblock_is_refused_with_file_and_fault() {
    let (directory, device) = device();
    drop(device);
    let path = directory.path().join(SUPERBLOCK);
    let good = fs::read(&path).unwrap();

    let mut flipped = good.clone();
    flipped[70] ^= 1;
    fs::write(&path, &flipped).unwrap();
    let error = DirectoryDevice::open(directory.path(), true).unwrap_err();
    assert_eq!(error.kind(), DeviceErrorKind::Damaged);
    assert!(
        error
            .to_string()
            .contains("superblock does not match its checksum"),
        "{error}"
    );
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );

    fs::write(&path, &good[..100]).unwrap();
    let error = DirectoryDevice::open(directory.path(), true).unwrap_err();
    assert_eq!(
        error.kind(),
        DeviceErrorKind::Damaged,
        "a short one: {error}"
    );

    fs::remove_file(&path).unwrap();
    let error = DirectoryDevice::open(directory.path(), true).unwrap_err();
    assert!(matches!(error, DeviceError::NotADevice(_)), "{error}");
    assert_eq!(error.kind(), DeviceErrorKind::NotFound);
}

#[test]
fn superblock_of_another_version_is_not_called_damage() {
    let (directory, device) = device();
    drop(device);
    let path = directory.path().join(SUPERBLOCK);
    for (version, advice) in [(1, "new pool"), (3, "newer one")] {
        let mut block = fs::read(&path).unwrap();
        assert_ne!(block[4], version);
        block[4] = version;
        let checksum = crate::segment::checksum_without(&block, 56);
        block[56..60].copy_from_slice(&checksum.to_le_bytes());
        fs::write(&path, block).unwrap();
        let error = DirectoryDevice::open(directory.path(), true).unwrap_err();
        assert_eq!(error.kind(), DeviceErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(advice), "{error}");
    }
}

#[test]
fn created_segment_is_where_the_format_says_and_identifies_itself() {
    let (directory, device) = device();
    let number = 0x12345;
    device
        .create(SegmentNumber(number), &header(number))
        .unwrap();
    let path = directory
        .path()
        .join("segments/00000000048/0000000012345.seg");
    assert_eq!(fs::read(&path).unwrap(), header(number).to_vec());
    let found = device.identify(SegmentNumber(number)).unwrap();
    assert_eq!(found.volume_name, "disk");
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );

    let error = device
        .create(SegmentNumber(number), &header(number))
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert!(
        device.identify(SegmentNumber(number)).is_ok(),
        "it is left alone"
    );
}

#[test]
fn list_is_sorted_and_passes_over_foreign_files() {
    let (directory, device) = device();
    for number in [5000, 3, 1024, 1023] {
        device
            .create(SegmentNumber(number), &header(number))
            .unwrap();
    }
    let segments = directory.path().join(SEGMENTS);
    fs::write(segments.join("README"), "").unwrap();
    fs::write(segments.join("00000000009"), "").unwrap();
    let first = segments.join("00000000000");
    fs::write(first.join("000000000000A.seg"), "").unwrap();
    fs::write(first.join("0000000000400.seg"), "in the wrong directory").unwrap();
    fs::write(first.join("0000000000004.seg.tmp"), "").unwrap();
    let numbers: Vec<_> = device.list().unwrap().iter().map(|n| n.0).collect();
    assert_eq!(numbers, [3, 1023, 1024, 5000]);
}

#[test]
fn identify_refuses_headers_that_do_not_belong_there() {
    let (_directory, device) = device();
    let path = |number| device.segment_path(SegmentNumber(number));
    for number in 1..=5 {
        device
            .create(SegmentNumber(number), &header(number))
            .unwrap();
    }
    let kind = |number| device.identify(SegmentNumber(number)).unwrap_err().kind();
    fs::copy(path(1), path(2)).unwrap();
    assert_eq!(kind(2), DeviceErrorKind::Damaged, "another number");
    fs::write(path(3), "").unwrap();
    assert_eq!(kind(3), DeviceErrorKind::Damaged, "empty");
    let good = device.identify(SegmentNumber(1)).unwrap();
    let foreign = SegmentHeader {
        pool: Uuid([7; 16]),
        number: SegmentNumber(4),
        ..good.clone()
    };
    fs::write(path(4), &*header_of(foreign)).unwrap();
    assert_eq!(kind(4), DeviceErrorKind::Damaged, "another pool");
    let sized = SegmentHeader {
        segment_bytes: SEGMENT_BYTES * 2,
        number: SegmentNumber(5),
        ..good
    };
    fs::write(path(5), &*header_of(sized)).unwrap();
    assert_eq!(kind(5), DeviceErrorKind::Damaged, "another size");
    assert_eq!(kind(6), DeviceErrorKind::NotFound);
}

#[test]
fn removal_is_done_once_and_repeating_it_is_no_error() {
    let (directory, device) = device();
    device.create(SegmentNumber(1), &header(1)).unwrap();
    device.remove(SegmentNumber(1)).unwrap();
    device.remove(SegmentNumber(1)).unwrap();
    device.remove(SegmentNumber(99_999)).unwrap();
    assert_eq!(device.list().unwrap(), []);
    assert!(
        device
            .open_file(SegmentNumber(1), Access::Buffered)
            .is_none()
    );

    let left = directory.path().join("segments/00000000000");
    assert!(left.exists());
    drop(device);
    let device = DirectoryDevice::open(directory.path(), true).unwrap();
    assert!(!left.exists(), "opening tidies up empty directories");
    device.create(SegmentNumber(1), &header(1)).unwrap();
}

#[test]
fn full_device_says_so_and_keeps_no_half_of_a_segment() {
    let Some(mount) = Mount::new("size=64k") else {
        return;
    };
    DirectoryDevice::format(mount.path(), &superblock()).unwrap();
    let device = DirectoryDevice::open(mount.path(), true).unwrap();
    let error = (0..64)
        .find_map(|n| device.create(SegmentNumber(n), &header(n)).err())
        .expect("64 KiB cannot hold 64 segments");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    let listed = device.list().unwrap();
    assert!(!listed.is_empty());
    for number in listed {
        device.identify(number).unwrap();
    }

    let full = Mount::new("size=4k").unwrap();
    fs::write(full.path().join("lost+found"), [1; 4096]).unwrap();
    let error = DirectoryDevice::format(full.path(), &superblock()).unwrap_err();
    assert_eq!(error.kind(), DeviceErrorKind::NoSpace, "{error}");
    assert_eq!(
        fs::read_dir(full.path()).unwrap().count(),
        1,
        "nothing is left behind"
    );
}

#[test]
fn read_only_file_system_is_refused_with_advice() {
    let Some(mount) = Mount::new("size=1m") else {
        return;
    };
    mount.remount("remount,ro");
    let error = DirectoryDevice::format(mount.path(), &superblock()).unwrap_err();
    assert_eq!(error.kind(), DeviceErrorKind::Device);
    mount.remount("remount,rw");
    DirectoryDevice::format(mount.path(), &superblock()).unwrap();
    mount.remount("remount,ro");
    let error = DirectoryDevice::open(mount.path(), true).unwrap_err();
    assert!(
        error.to_string().contains("mount the file system writable"),
        "{error}"
    );
}

#[test]
fn creating_from_many_threads_makes_every_segment() {
    let (_directory, device) = device();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let device = &device;
            scope.spawn(move || {
                for n in 0..8 {
                    let number = n * 1024 + thread;
                    device
                        .create(SegmentNumber(number), &header(number))
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(device.list().unwrap().len(), 32);
}
