//! The staging ring: acknowledged writes in shared memory that outlives the daemon.
//!
//! A file on tmpfs holds a control block and a ring. The ring is mapped twice in a row, so that any
//! range of it up to its whole length is contiguous in memory. `docs/format.md`, "Staging", has the
//! layout and the meaning of a *position*.
//!
//! Ordering argument: the file is shared memory of one machine. A daemon that dies by a signal leaves
//! it exactly as its stores left it, so plain store order is the only order there is to keep: an
//! entry's data, checksums and bytes come before the release store of the record's `entries` field
//! ([`Staging::commit`]), and a record header comes before the release store of its position
//! ([`Staging::set_open`]). Loss of power loses the whole file, and flushes do not count on it.
//!
//! Unsafe here: the mapping and the slices of it. A range is handed out as `&mut` only through
//! `&mut self`; the kernel reads ranges that are being written out, and nobody writes to those.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::io::IoBuf;
use crate::segment::{OpenRecord, RECORD_ENTRIES_OFFSET, Record};
use crate::types::{BLOCK_BYTES, Epoch, SegmentNumber, Uuid};

const MAGIC: &[u8; 4] = b"VHST";
const VERSION: u16 = 1;
const CONTROL_BYTES: usize = BLOCK_BYTES;
const EPOCH_AT: usize = 40;
const RING_BYTES_AT: usize = 48;
const OPEN_AT: usize = 56;
const WRITTEN_AT: usize = 64;
const SPAN_COUNT_AT: usize = 72;
const SPANS_AT: usize = 128;
const SPAN_SLOTS: u32 = 128;
/// `open` before the first record.
const NO_RECORD: u64 = u64::MAX;
/// Memory is allocated for the ring in pieces of this size, so that a full tmpfs is an error of a
/// call and not a SIGBUS.
const BACKING_BYTES: u64 = 1 << 20;
/// Smallest ring: holds a few records of the largest size that small segments allow.
pub const MIN_RING_BYTES: u64 = 1 << 20;
/// Largest ring.
pub const MAX_RING_BYTES: u64 = 1 << 30;

/// Whose log a staging file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagingIdentity {
    pub pool: Uuid,
    pub volume: Uuid,
    pub epoch: Epoch,
}

/// A file mapped as a control block and a ring twice.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    ring_bytes: u64,
}

// SAFETY: the mapping is plain memory; access goes through the owner's borrow rules.
unsafe impl Send for Mapping {}

impl Mapping {
    fn len(ring_bytes: u64) -> usize {
        CONTROL_BYTES + 2 * ring_bytes as usize
    }

    fn new(file: &File, ring_bytes: u64) -> io::Result<Self> {
        let map = |at: *mut libc::c_void, len: usize, flags: i32, fd: i32, offset: i64| {
            let prot = if fd < 0 {
                libc::PROT_NONE
            } else {
                libc::PROT_READ | libc::PROT_WRITE
            };
            // SAFETY: either a fresh anonymous reservation (`at` null), or a fixed mapping inside
            // the reservation made just before, which nothing else uses.
            let address = unsafe { libc::mmap(at, len, prot, flags, fd, offset) };
            if address == libc::MAP_FAILED {
                Err(io::Error::last_os_error())
            } else {
                Ok(address)
            }
        };
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let base = map(ptr::null_mut(), Self::len(ring_bytes), anonymous, -1, 0)?.cast::<u8>();
        let base = NonNull::new(base).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        // From here on dropping the value unmaps everything.
        let mapping = Self { base, ring_bytes };
        let fixed = libc::MAP_SHARED | libc::MAP_FIXED;
        let ring = ring_bytes as usize;
        for (at, len, offset) in [
            (0, CONTROL_BYTES, 0),
            (CONTROL_BYTES, ring, CONTROL_BYTES),
            (CONTROL_BYTES + ring, ring, CONTROL_BYTES),
        ] {
            // SAFETY: `at` is inside the reservation.
            let address = unsafe { base.as_ptr().add(at) };
            map(address.cast(), len, fixed, file.as_raw_fd(), offset as i64)?;
        }
        Ok(mapping)
    }

    fn control(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Memory of `len` bytes at `position`.
    fn at(&self, position: u64, len: usize) -> *mut u8 {
        assert!(
            len as u64 <= self.ring_bytes,
            "range longer than the staging ring"
        );
        let offset = CONTROL_BYTES + (position & (self.ring_bytes - 1)) as usize;
        // SAFETY: offset < control + ring, and the ring is mapped twice, so offset + len is inside.
        unsafe { self.base.as_ptr().add(offset) }
    }

    fn u64_at(&self, at: usize) -> &AtomicU64 {
        // SAFETY: in the control block, aligned to 8, and only ever accessed atomically.
        unsafe { &*self.control().add(at).cast::<AtomicU64>() }
    }

    fn u32_at(&self, at: usize) -> &AtomicU32 {
        // SAFETY: in the control block, aligned to 4, and only ever accessed atomically.
        unsafe { &*self.control().add(at).cast::<AtomicU32>() }
    }

    fn control_bytes(&self) -> &[u8] {
        // SAFETY: the control block is mapped for the life of `self`; readers of it as bytes are
        // the constructors only, before anyone stores to it.
        unsafe { std::slice::from_raw_parts(self.control(), CONTROL_BYTES) }
    }

    fn bytes(&self, position: u64, len: usize) -> &[u8] {
        // SAFETY: mapped; `&self` excludes `bytes_mut`.
        unsafe { std::slice::from_raw_parts(self.at(position, len), len) }
    }

    fn bytes_mut(&mut self, position: u64, len: usize) -> &mut [u8] {
        // SAFETY: mapped; `&mut self` excludes every other reference.
        unsafe { std::slice::from_raw_parts_mut(self.at(position, len), len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped; nothing outlives the owner (I/O is finished
        // before a log is dropped).
        unsafe { libc::munmap(self.base.as_ptr().cast(), Self::len(self.ring_bytes)) };
    }
}

/// The staging ring of a volume that is open for writing. Owned by its log.
#[derive(Debug)]
pub struct Staging {
    mapping: Mapping,
    file: File,
    path: PathBuf,
    /// One bit of knowledge for each `BACKING_BYTES` of the ring: memory is allocated.
    backed: Vec<bool>,
    spans: u32,
}

impl Staging {
    /// Creates the file anew, replacing an older one in a single step.
    ///
    /// # Errors
    /// What the file system says; `ring_bytes` that is not a power of two in its range.
    pub fn create(path: &Path, identity: StagingIdentity, ring_bytes: u64) -> io::Result<Self> {
        if !ring_bytes.is_power_of_two() || !(MIN_RING_BYTES..=MAX_RING_BYTES).contains(&ring_bytes)
        {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                "the staging ring must be a power of two between 1 MiB and 1 GiB",
            ));
        }
        let draft = path.with_extension("new");
        let file = match create_private(&draft) {
            // The pool's directory went with its last volume, just now.
            Err(error) if error.kind() == ErrorKind::NotFound => create_private(&draft)?,
            created => created?,
        };
        file.set_len(CONTROL_BYTES as u64 + ring_bytes)?;
        allocate(&file, 0, CONTROL_BYTES as u64)?;
        let mut control = [0u8; CONTROL_BYTES];
        control[..4].copy_from_slice(MAGIC);
        control[4..6].copy_from_slice(&VERSION.to_le_bytes());
        control[8..24].copy_from_slice(&identity.pool.0);
        control[24..40].copy_from_slice(&identity.volume.0);
        control[EPOCH_AT..EPOCH_AT + 8].copy_from_slice(&identity.epoch.0.to_le_bytes());
        control[RING_BYTES_AT..RING_BYTES_AT + 8].copy_from_slice(&ring_bytes.to_le_bytes());
        control[OPEN_AT..OPEN_AT + 8].copy_from_slice(&NO_RECORD.to_le_bytes());
        std::os::unix::fs::FileExt::write_all_at(&file, &control, 0)?;
        let mapping = Mapping::new(&file, ring_bytes)?;
        // A daemon killed before this line leaves the older file, killed after it the new one.
        fs::rename(&draft, path)?;
        let backed = vec![false; ring_bytes.div_ceil(BACKING_BYTES) as usize];
        Ok(Self {
            mapping,
            file,
            path: path.to_owned(),
            backed,
            spans: 0,
        })
    }

    #[must_use]
    pub fn ring_bytes(&self) -> u64 {
        self.mapping.ring_bytes
    }

    /// Makes sure that memory is there for positions `from..to`.
    ///
    /// # Errors
    /// `StorageFull` if the tmpfs is full.
    pub fn back(&mut self, from: u64, to: u64) -> io::Result<()> {
        let pieces = self.backed.len() as u64;
        for piece in from / BACKING_BYTES..to.div_ceil(BACKING_BYTES) {
            let slot = (piece % pieces) as usize;
            if !self.backed[slot] {
                let offset = CONTROL_BYTES as u64 + slot as u64 * BACKING_BYTES;
                allocate(&self.file, offset, BACKING_BYTES)?;
                self.backed[slot] = true;
            }
        }
        Ok(())
    }

    /// Gives the ring's memory back; every byte of it must be in its segment file.
    pub fn release(&mut self) {
        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (CONTROL_BYTES as i64, self.ring_bytes() as i64);
        // SAFETY: a plain system call on a file that we own; the mapping stays valid.
        if unsafe { libc::fallocate(self.file.as_raw_fd(), flags, offset, len) } == 0 {
            self.backed.fill(false);
        }
    }

    /// # Panics
    /// If the range is longer than the ring.
    #[must_use]
    pub fn bytes(&self, position: u64, len: usize) -> &[u8] {
        self.mapping.bytes(position, len)
    }

    /// # Panics
    /// If the range is longer than the ring.
    pub fn bytes_mut(&mut self, position: u64, len: usize) -> &mut [u8] {
        self.mapping.bytes_mut(position, len)
    }

    /// The range as memory of a write operation.
    ///
    /// # Safety
    /// The staging ring outlives the operation, and the range is not written to before it ends.
    #[must_use]
    pub unsafe fn io_buf(&self, position: u64, len: usize) -> IoBuf {
        // SAFETY: mapped, and the caller's promise.
        unsafe { IoBuf::new(self.mapping.at(position, len), len) }
    }

    /// Says that block 0 of `segment` is at `position` and everything from there on belongs to it.
    pub fn add_span(&mut self, position: u64, segment: SegmentNumber) {
        let at = SPANS_AT + (self.spans % SPAN_SLOTS) as usize * 16;
        self.mapping.u64_at(at).store(position, Ordering::Relaxed);
        self.mapping
            .u64_at(at + 8)
            .store(segment.0, Ordering::Relaxed);
        self.spans += 1;
        // The slot must be complete before it counts.
        self.mapping
            .u32_at(SPAN_COUNT_AT)
            .store(self.spans, Ordering::Release);
    }

    /// Makes the record whose empty header is at `position` the open one; the one before is closed.
    pub fn set_open(&mut self, position: u64) {
        self.mapping
            .u64_at(OPEN_AT)
            .store(position, Ordering::Release);
    }

    /// Commits the first `entries` entries of the record at `position`.
    pub fn commit(&mut self, position: u64, entries: u32) {
        let header = self.mapping.at(position, BLOCK_BYTES);
        // SAFETY: inside the ring, aligned (positions are multiples of 4 KiB), and until the record
        // is closed this field is only stored here.
        let field = unsafe { &*header.add(RECORD_ENTRIES_OFFSET).cast::<AtomicU32>() };
        field.store(entries.to_le(), Ordering::Release);
    }

    /// Everything before `position` is in its segment file.
    pub fn set_written(&mut self, position: u64) {
        self.mapping
            .u64_at(WRITTEN_AT)
            .store(position, Ordering::Release);
    }

    /// Removes the file: its log is in the segments, whole and durable.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)?;
        if let Some(parent) = self.path.parent() {
            // The pool's directory goes with its last volume; with others in it, it stays.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// Makes a file, and its directories, for this user only.
fn create_private(path: &Path) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)?;
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: a plain system call on a file that we own.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, offset as i64, len as i64) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // Not a tmpfs: pages come when they are touched.
            error if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            error => Err(error),
        },
    }
}

/// A part of a segment that a dead daemon left in the ring.
#[derive(Clone, Copy, Debug)]
pub struct StagedPiece {
    pub segment: SegmentNumber,
    pub offset_bytes: u64,
    position: u64,
    pub len: usize,
}

/// The staging file of a daemon that died, opened to drain it.
#[derive(Debug)]
pub struct StagedLog {
    mapping: Mapping,
    pub pieces: Vec<StagedPiece>,
}

impl StagedLog {
    /// Opens what an earlier writer of the volume left, closes its open record in place, and lists
    /// what has not reached the segments. `None`: there is no file.
    ///
    /// Doing this again, after dying half-way, gives the same result.
    ///
    /// `identity.epoch` is that of the last opening. The file may be of an older one: openings since
    /// then died before they made a file of their own, which replaces this one.
    ///
    /// # Errors
    /// `InvalidData` if the file is not a staging file of `identity`; what the file system says.
    pub fn open(path: &Path, mut identity: StagingIdentity) -> io::Result<Option<Self>> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let invalid = |what: &str| {
            let message = format!("staging file {}: {what}", path.display());
            io::Error::new(ErrorKind::InvalidData, message)
        };
        let len = file.metadata()?.len();
        let ring_bytes = len.saturating_sub(CONTROL_BYTES as u64);
        if !ring_bytes.is_power_of_two() || !(MIN_RING_BYTES..=MAX_RING_BYTES).contains(&ring_bytes)
        {
            return Err(invalid("its length is not that of a staging file"));
        }
        let mapping = Mapping::new(&file, ring_bytes)?;
        let control = mapping.control_bytes();
        if control[..4] != MAGIC[..] || control[4..6] != VERSION.to_le_bytes() {
            return Err(invalid("it is not a staging file of this version"));
        }
        if control[8..24] != identity.pool.0 || control[24..40] != identity.volume.0 {
            return Err(invalid("it belongs to another volume"));
        }
        let epoch = Epoch(mapping.u64_at(EPOCH_AT).load(Ordering::Acquire));
        if epoch > identity.epoch {
            return Err(invalid(
                "it was left by an opening that the catalog knows nothing of",
            ));
        }
        identity.epoch = epoch;
        if mapping.u64_at(RING_BYTES_AT).load(Ordering::Acquire) != ring_bytes {
            return Err(invalid("its ring has another length than it says"));
        }
        let mut staged = Self {
            mapping,
            pieces: Vec::new(),
        };
        staged
            .close_and_list(identity)
            .map_err(|what| invalid(&what))?;
        Ok(Some(staged))
    }

    fn close_and_list(&mut self, identity: StagingIdentity) -> Result<(), String> {
        let load = |at| self.mapping.u64_at(at).load(Ordering::Acquire);
        let (open, written) = (load(OPEN_AT), load(WRITTEN_AT));
        if open == NO_RECORD {
            return Ok(());
        }
        let count = self.mapping.u32_at(SPAN_COUNT_AT).load(Ordering::Acquire);
        let spans: Vec<(u64, SegmentNumber)> = (count.saturating_sub(SPAN_SLOTS)..count)
            .map(|n| SPANS_AT + (n % SPAN_SLOTS) as usize * 16)
            .map(|at| (load(at), SegmentNumber(load(at + 8))))
            .collect();
        if spans.windows(2).any(|w| w[0].0 >= w[1].0) || open % BLOCK_BYTES as u64 != 0 {
            return Err("its table of segments is damaged".into());
        }
        // The open record's span is the last one that starts before it: a new segment gets its span
        // before its first record.
        let span_of = |position: u64| spans.iter().rposition(|(start, _)| *start < position);
        let open_span = span_of(open).ok_or("its open record belongs to no segment")?;
        let (start, segment) = spans[open_span];
        let end = self.close_open(
            open,
            segment,
            ((open - start) / BLOCK_BYTES as u64) as u32,
            identity,
        );
        if end.saturating_sub(written) > self.mapping.ring_bytes {
            return Err("it says that more is staged than fits".into());
        }
        // Split by segments; block 0 of each is its header, which never is in the ring.
        for (i, (start, segment)) in spans.iter().enumerate() {
            let next = spans.get(i + 1).map_or(u64::MAX, |span| span.0);
            let from = written.max(start + BLOCK_BYTES as u64);
            let to = end.min(next);
            if from < to {
                self.pieces.push(StagedPiece {
                    segment: *segment,
                    offset_bytes: from - start,
                    position: from,
                    len: (to - from) as usize,
                });
            }
        }
        let listed: usize = self.pieces.iter().map(|piece| piece.len).sum();
        let headers = spans
            .iter()
            .filter(|(s, _)| *s >= written && *s < end)
            .count()
            * BLOCK_BYTES;
        if ((listed + headers) as u64) < end.saturating_sub(written) {
            return Err("its table of segments does not cover what is staged".into());
        }
        Ok(())
    }

    /// Closes the open record and returns the position where the log ends.
    fn close_open(
        &mut self,
        open: u64,
        segment: SegmentNumber,
        offset_blocks: u32,
        identity: StagingIdentity,
    ) -> u64 {
        let header = self.mapping.bytes_mut(open, BLOCK_BYTES);
        let Some(data_blocks) = OpenRecord::close_committed(header) else {
            return open;
        };
        // Memory of an earlier lap of the ring may stand where no new header was begun.
        let own = Record::parse(header).is_ok_and(|record| {
            record.identity.segment == segment
                && record.identity.offset_blocks == offset_blocks
                && record.identity.volume == identity.volume
                && record.identity.epoch == identity.epoch
        });
        if own {
            open + (1 + u64::from(data_blocks)) * BLOCK_BYTES as u64
        } else {
            open
        }
    }

    /// Memory of a piece.
    ///
    /// # Safety
    /// `self` outlives the operation.
    #[must_use]
    pub unsafe fn io_buf(&self, piece: &StagedPiece) -> IoBuf {
        // SAFETY: mapped, and the caller's promise.
        unsafe { IoBuf::new(self.mapping.at(piece.position, piece.len), piece.len) }
    }
}
