//! A device that is a directory of a file system: layout, superblock, lock, segment files.
//!
//! Invariants:
//! - One open device a directory: `lock` is held from `open` to drop.
//! - A segment's path follows from its number alone (`docs/format.md`).
//! - When `create` returns, the segment's header, its directory entry and every directory on the
//!   way to it are durable.
//!
//! Callable from any thread. All calls but the look-up of open files may block on the disk;
//! workers leave those to their helper threads.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

use super::files::{Access, Files, SegmentFile};
use super::{DeviceError, SegmentNumbers, Superblock};
use crate::io::AlignedBuf;
use crate::segment::{FormatError, SegmentHeader};
use crate::types::{ADDRESS_BLOCK_BITS, BLOCK_BYTES, SegmentNumber};

const SUPERBLOCK: &str = "superblock";
const SEGMENTS: &str = "segments";
const LOCK: &str = "lock";
/// A directory of segments holds 2^10 of them.
const SEGMENTS_IN_DIRECTORY_BITS: u32 = 10;
/// Open segment files a device may keep.
const MAX_OPEN_FILES: usize = 512;
/// What the process should be able to open, with room for a few devices and many guests.
const WANTED_OPEN_FILES: u64 = 16 * 1024;

/// An open directory device.
#[derive(Debug)]
pub struct DirectoryDevice {
    path: PathBuf,
    root: OwnedFd,
    segments: OwnedFd,
    superblock: Superblock,
    direct: bool,
    files: Files,
    numbers: Arc<SegmentNumbers>,
    /// Directories of segments that are known to exist durably.
    directories: Mutex<HashSet<u64>>,
    /// Held for its flock.
    _lock: File,
}

/// Space that reservations leave alone (see [`DirectoryDevice::may_reserve`]); a sixteenth of a small
/// file system.
const HEADROOM_BYTES: u64 = 64 << 20;

impl DirectoryDevice {
    /// Makes the existing, empty directory at `path` a device. A `lost+found` may be in it.
    ///
    /// # Errors
    /// `NotADirectory`, `NotEmpty`, `Usage` for a superblock with a field out of range, or what
    /// the operating system says. Nothing is left behind after an error.
    pub fn format(path: &Path, superblock: &Superblock) -> Result<(), DeviceError> {
        let mut block = [0; BLOCK_BYTES];
        superblock.encode(&mut block).map_err(|fault| {
            DeviceError::Usage(format!("cannot format {}: {fault}", path.display()))
        })?;
        if !path.is_dir() {
            return Err(DeviceError::NotADirectory(path.to_owned()));
        }
        let entries = fs::read_dir(path).map_err(DeviceError::os("list", path))?;
        for entry in entries {
            let name = entry.map_err(DeviceError::os("list", path))?.file_name();
            if name != "lost+found" {
                return Err(DeviceError::NotEmpty {
                    path: path.to_owned(),
                    found: name.to_string_lossy().into_owned(),
                });
            }
        }
        let result = Self::write_layout(path, &block);
        if result.is_err() {
            // The directory was empty, so all of this is ours. What cannot be removed is named by
            // the next attempt.
            let _ = fs::remove_file(path.join(SUPERBLOCK));
            let _ = fs::remove_dir(path.join(SEGMENTS));
        }
        result
    }

    fn write_layout(path: &Path, block: &[u8]) -> Result<(), DeviceError> {
        let segments = path.join(SEGMENTS);
        fs::create_dir(&segments).map_err(DeviceError::os("create", &segments))?;
        sync_directory(&segments)?;
        // Last, because it is what makes the directory a device.
        let superblock = path.join(SUPERBLOCK);
        let mut file =
            File::create_new(&superblock).map_err(DeviceError::os("create", &superblock))?;
        file.write_all(block)
            .and_then(|()| file.sync_all())
            .map_err(DeviceError::os("write", &superblock))?;
        sync_directory(path)
    }

    /// Opens and locks the device at `path`. Without `direct`, or where the file system has no
    /// direct I/O that suits, direct writes go through the page cache.
    ///
    /// # Errors
    /// `NotADevice`, `Locked`, `Damaged`, `NewerVersion`, or what the operating system says.
    pub fn open(path: &Path, direct: bool) -> Result<Self, DeviceError> {
        if !path.is_dir() {
            return Err(DeviceError::NotADirectory(path.to_owned()));
        }
        // Before the lock: a directory that is no device is not written to.
        let superblock = read_superblock(path)?;
        let lock = take_lock(path)?;
        let root = open_directory(path)?;
        let segments = open_directory(&path.join(SEGMENTS))?;
        let direct = direct && direct_io_works(&path.join(SUPERBLOCK));
        let device = Self {
            path: path.to_owned(),
            root,
            segments,
            superblock,
            direct,
            files: Files::new(open_files_limit()),
            numbers: Arc::new(SegmentNumbers::new()),
            directories: Mutex::default(),
            _lock: lock,
        };
        device.remove_empty_directories()?;
        Ok(device)
    }

    /// One directory stays behind for each 1024 segments that were removed; here nobody creates a
    /// segment in one at the same time.
    fn remove_empty_directories(&self) -> Result<(), DeviceError> {
        let segments = self.path.join(SEGMENTS);
        for entry in fs::read_dir(&segments).map_err(DeviceError::os("list", &segments))? {
            let name = entry
                .map_err(DeviceError::os("list", &segments))?
                .file_name();
            if name.to_str().and_then(|name| parse_hex(name, 11)).is_some() {
                // A directory in use is not empty, and staying is no harm.
                let _ = rustix::fs::unlinkat(&self.segments, &name, AtFlags::REMOVEDIR);
            }
        }
        Ok(())
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    #[must_use]
    pub const fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Whether direct writes are really direct.
    #[must_use]
    pub const fn uses_direct_io(&self) -> bool {
        self.direct
    }

    /// The segment numbers the catalog has granted for this device.
    #[must_use]
    pub const fn numbers(&self) -> &Arc<SegmentNumbers> {
        &self.numbers
    }

    /// The path of a segment's file.
    #[must_use]
    pub fn segment_path(&self, number: SegmentNumber) -> PathBuf {
        self.path.join(relative_path(number))
    }

    /// Numbers of all segments on the device, ascending. Files that are no segments are passed
    /// over. Reads names only.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn list(&self) -> Result<Vec<SegmentNumber>, DeviceError> {
        let segments = self.path.join(SEGMENTS);
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&segments).map_err(DeviceError::os("list", &segments))? {
            let name = entry
                .map_err(DeviceError::os("list", &segments))?
                .file_name();
            let Some(directory) = name.to_str().and_then(|name| parse_hex(name, 11)) else {
                continue;
            };
            let path = segments.join(&name);
            let entries = match fs::read_dir(&path) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => continue,
                Err(error) => return Err(DeviceError::os("list", &path)(error)),
            };
            for entry in entries {
                let name = entry.map_err(DeviceError::os("list", &path))?.file_name();
                let number = name
                    .to_str()
                    .and_then(|name| name.strip_suffix(".seg"))
                    .and_then(|name| parse_hex(name, 13));
                if let Some(number) = number
                    && number >> SEGMENTS_IN_DIRECTORY_BITS == directory
                    && number >> (64 - ADDRESS_BLOCK_BITS) == 0
                {
                    numbers.push(SegmentNumber(number));
                }
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Reads a segment's header and checks that it belongs here.
    ///
    /// # Errors
    /// `NoSegment`; `Damaged` also for the header of another pool or segment, and for a file that
    /// is shorter than a header (what a crash leaves of a segment that was being created).
    pub fn identify(&self, number: SegmentNumber) -> Result<SegmentHeader, DeviceError> {
        let path = self.segment_path(number);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => DeviceError::NoSegment {
                path: self.path.clone(),
                number,
            },
            _ => DeviceError::os("open", &path)(error),
        })?;
        let header = read_block(&file)
            .map_err(DeviceError::os("read", &path))?
            .ok_or(FormatError::Magic("segment header"))
            .and_then(|block| SegmentHeader::parse(&block))
            .map_err(|fault| DeviceError::format(&path, fault))?;
        let wrong = |field| {
            Err(DeviceError::Damaged {
                path: path.clone(),
                fault: FormatError::Field {
                    structure: "segment header",
                    field,
                },
            })
        };
        if header.number != number {
            return wrong("segment number");
        }
        if header.pool != self.superblock.pool {
            return wrong("pool");
        }
        if header.segment_bytes != self.superblock.segment_bytes {
            return wrong("segment_bytes");
        }
        Ok(header)
    }

    /// Creates a segment with `header` as its first block, all of it durable on return.
    ///
    /// # Errors
    /// `AlreadyExists` if there is one, or what the operating system says.
    pub fn create(&self, number: SegmentNumber, header: &AlignedBuf) -> io::Result<()> {
        self.ensure_directory(number)?;
        let path = relative_path(number);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.root, &path, flags, Mode::from_raw_mode(0o600))?;
        let file = File::from(fd);
        let result = file
            .write_all_at(header, 0)
            .and_then(|()| file.sync_all())
            .and_then(|()| self.sync_segment_directory(number));
        match result {
            Ok(()) => {
                self.files.adopt(number, Access::Buffered, file.into());
                Ok(())
            }
            Err(error) => {
                // It was never announced; if it cannot be removed, it stays without a use.
                let _ = rustix::fs::unlinkat(&self.root, &path, AtFlags::empty());
                Err(error)
            }
        }
    }

    fn ensure_directory(&self, number: SegmentNumber) -> io::Result<()> {
        let directory = number.0 >> SEGMENTS_IN_DIRECTORY_BITS;
        // Kept locked, so that nobody relies on a directory that is not durable yet.
        let mut known = self
            .directories
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if known.contains(&directory) {
            return Ok(());
        }
        let name = directory_name(number);
        match rustix::fs::mkdirat(&self.segments, &name, Mode::from_raw_mode(0o700)) {
            // One that exists may be what a crash left before it was made durable.
            Ok(()) | Err(Errno::EXIST) => rustix::fs::fsync(&self.segments)?,
            Err(error) => return Err(error.into()),
        }
        known.insert(directory);
        Ok(())
    }

    fn sync_segment_directory(&self, number: SegmentNumber) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let name = directory_name(number);
        let directory = rustix::fs::openat(&self.segments, &name, flags, Mode::empty())?;
        Ok(rustix::fs::fsync(directory)?)
    }

    /// Removes a segment; it is no error if it is not there. The removal is not waited for to be
    /// durable: after a crash the segment may be back.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn remove(&self, number: SegmentNumber) -> Result<(), DeviceError> {
        self.unlink(number)
            .map_err(DeviceError::os("remove", &self.segment_path(number)))
    }

    pub(crate) fn unlink(&self, number: SegmentNumber) -> io::Result<()> {
        self.files.forget(number);
        let path = relative_path(number);
        match rustix::fs::unlinkat(&self.root, &path, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        // Durable, so that removals reach the disk in the order in which they are made.
        let directory = rustix::fs::openat(
            &self.root,
            Path::new(&path).parent().unwrap_or(Path::new(".")),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(rustix::fs::fsync(&directory)?)
    }

    /// Bytes free for this process and bytes in all, of the file system.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn space(&self) -> Result<(u64, u64), DeviceError> {
        let stat = rustix::fs::fstatvfs(&self.root)
            .map_err(DeviceError::os("ask for the space of", &self.path))?;
        Ok((
            stat.f_bavail.saturating_mul(stat.f_frsize),
            stat.f_blocks.saturating_mul(stat.f_frsize),
        ))
    }

    /// Whether `len_bytes` more may be taken for guests' data. The last of the space is kept for what
    /// makes space again: without room for a checkpoint and the catalog, a full device could not even
    /// drop its dead segments.
    pub(crate) fn may_reserve(&self, len_bytes: u64) -> bool {
        self.space().map_or(true, |(free, total)| {
            free >= len_bytes.saturating_add(HEADROOM_BYTES.min(total / 16))
        })
    }

    /// Replaces `Direct` by `Buffered` where there is no direct I/O.
    pub(crate) const fn possible_access(&self, wanted: Access) -> Access {
        if self.direct {
            wanted
        } else {
            Access::Buffered
        }
    }

    /// The open file of a segment, if there is one. Never blocks on the disk.
    pub(crate) fn open_file(
        &self,
        number: SegmentNumber,
        access: Access,
    ) -> Option<Arc<SegmentFile>> {
        self.files.get(number, access)
    }

    /// Closes all files that may be closed, when the process has no descriptors left.
    pub(crate) fn close_idle_files(&self) {
        self.files.close_idle();
    }

    /// Arguments of the openat call that opens a segment.
    pub(crate) fn open_arguments(
        &self,
        number: SegmentNumber,
        access: Access,
    ) -> (RawFd, CString, libc::c_int) {
        let direct = match access {
            Access::Buffered => 0,
            Access::Direct => libc::O_DIRECT,
        };
        let path = CString::new(relative_path(number)).expect("digits hold no NUL");
        let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOFOLLOW | direct;
        (self.root.as_raw_fd(), path, flags)
    }

    /// Keeps what that call has opened.
    pub(crate) fn adopt_file(
        &self,
        number: SegmentNumber,
        access: Access,
        fd: OwnedFd,
    ) -> Arc<SegmentFile> {
        self.files.adopt(number, access, fd)
    }
}

fn directory_name(number: SegmentNumber) -> String {
    format!("{:011x}", number.0 >> SEGMENTS_IN_DIRECTORY_BITS)
}

fn relative_path(number: SegmentNumber) -> String {
    format!(
        "{SEGMENTS}/{}/{:013x}.seg",
        directory_name(number),
        number.0
    )
}

/// The number that `name` is the only spelling of, in `digits` hexadecimal digits.
fn parse_hex(name: &str, digits: usize) -> Option<u64> {
    let right = name.len() == digits
        && name
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if right {
        u64::from_str_radix(name, 16).ok()
    } else {
        None
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, DeviceError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(DeviceError::os("open", path))
}

fn sync_directory(path: &Path) -> Result<(), DeviceError> {
    rustix::fs::fsync(open_directory(path)?).map_err(DeviceError::os("make durable", path))
}

/// The first block of a file; `None` if the file is shorter.
fn read_block(file: &File) -> io::Result<Option<[u8; BLOCK_BYTES]>> {
    let mut block = [0; BLOCK_BYTES];
    let mut done = 0;
    while done < BLOCK_BYTES {
        match file.read_at(&mut block[done..], done as u64) {
            Ok(0) => return Ok(None),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(block))
}

fn read_superblock(path: &Path) -> Result<Superblock, DeviceError> {
    let file_path = path.join(SUPERBLOCK);
    let file = File::open(&file_path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => DeviceError::NotADevice(path.to_owned()),
        _ => DeviceError::os("open", &file_path)(error),
    })?;
    let block = read_block(&file).map_err(DeviceError::os("read", &file_path))?;
    block
        .ok_or(FormatError::Checksum("superblock"))
        .and_then(|block| Superblock::parse(&block))
        .map_err(|fault| DeviceError::format(&file_path, fault))
}

fn take_lock(path: &Path) -> Result<File, DeviceError> {
    let lock_path = path.join(LOCK);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock_path)
        .map_err(DeviceError::os("open", &lock_path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            // The name of the holder is a help; without it the fact remains.
            let _ = (&mut file).take(32).read_to_string(&mut text);
            return Err(DeviceError::Locked {
                path: path.to_owned(),
                holder: text.trim().parse().ok(),
            });
        }
        Err(TryLockError::Error(error)) => return Err(DeviceError::os("lock", &lock_path)(error)),
    }
    file.set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| writeln!(file, "{}", std::process::id()))
        .map_err(DeviceError::os("write", &lock_path))?;
    Ok(file)
}

/// Tries what will be done later, on a file that is a block long: some file systems accept the
/// flag and fail the read, others want more alignment than a block has.
fn direct_io_works(path: &Path) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let Ok(fd) = rustix::fs::open(path, flags, Mode::empty()) else {
        return false;
    };
    let mut block = AlignedBuf::new(BLOCK_BYTES);
    matches!(File::from(fd).read_at(&mut block, 0), Ok(BLOCK_BYTES))
}

/// Raises the soft limit of open files if it is low, and says how many a device may keep open.
fn open_files_limit() -> usize {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|soft| soft < WANTED_OPEN_FILES) {
        let wanted = Some(
            limit
                .maximum
                .map_or(WANTED_OPEN_FILES, |hard| hard.min(WANTED_OPEN_FILES)),
        );
        let raised = Rlimit {
            current: wanted,
            maximum: limit.maximum,
        };
        if rustix::process::setrlimit(Resource::Nofile, raised).is_ok() {
            limit = raised;
        }
    }
    // Where even the hard limit is low, sockets, guests and other devices need their part.
    limit.current.map_or(MAX_OPEN_FILES, |soft| {
        (soft / 4).min(MAX_OPEN_FILES as u64) as usize
    })
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
