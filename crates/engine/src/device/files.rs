//! Open files of segments: a cache with a bound.
//!
//! Invariants:
//! - A file is closed only when no operation uses it: operations hold the `Arc`.
//! - A file with buffered writes that no sync has covered yet is not evicted. The kernel reports a failed
//!   write-back to the descriptors that were open when it failed; closing the last one could lose
//!   the error, and the sync after that would claim success for data that is gone.
//!
//! Callable from any thread.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::types::SegmentNumber;

/// How a segment's file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Access {
    /// Through the page cache: reads, writes without alignment, syncs.
    Buffered,
    /// O_DIRECT.
    Direct,
}

/// One open descriptor of a segment.
#[derive(Debug)]
pub(crate) struct SegmentFile {
    fd: OwnedFd,
    access: Access,
    /// Writes completed through this descriptor.
    written: AtomicU64,
    /// How many of them a successful sync has covered.
    synced: AtomicU64,
}

impl SegmentFile {
    pub(crate) const fn new(fd: OwnedFd, access: Access) -> Self {
        Self {
            fd,
            access,
            written: AtomicU64::new(0),
            synced: AtomicU64::new(0),
        }
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// A write has completed. Only write-back can fail later on and unseen: the errors of direct
    /// writes come with their completions, and syncs go through the buffered descriptor.
    pub(crate) fn note_write(&self) {
        if self.access == Access::Direct {
            return;
        }
        self.written.fetch_add(1, Ordering::Relaxed);
    }

    /// To be asked before a sync is submitted, for [`Self::note_sync`] after it.
    pub(crate) fn writes(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// A sync that was submitted when there were `writes` writes has succeeded.
    pub(crate) fn note_sync(&self, writes: u64) {
        self.synced.fetch_max(writes, Ordering::Relaxed);
    }

    fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Relaxed) == self.written.load(Ordering::Relaxed)
    }
}

/// The open files of a device, least recently used ones closed beyond a bound.
#[derive(Debug)]
pub(super) struct Files {
    limit: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    files: HashMap<(SegmentNumber, Access), Entry>,
    /// Counts uses; an entry's stamp tells its age.
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    file: Arc<SegmentFile>,
    used: u64,
}

impl Files {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit: limit.max(1),
            inner: Mutex::default(),
        }
    }

    pub(super) fn get(&self, number: SegmentNumber, access: Access) -> Option<Arc<SegmentFile>> {
        let mut inner = self.lock();
        inner.clock += 1;
        let used = inner.clock;
        let entry = inner.files.get_mut(&(number, access))?;
        entry.used = used;
        Some(Arc::clone(&entry.file))
    }

    /// Takes `fd` in, unless another thread was first: then that file is returned, `fd` closed.
    pub(super) fn adopt(
        &self,
        number: SegmentNumber,
        access: Access,
        fd: OwnedFd,
    ) -> Arc<SegmentFile> {
        let mut inner = self.lock();
        inner.clock += 1;
        let used = inner.clock;
        if inner.files.len() >= self.limit && !inner.files.contains_key(&(number, access)) {
            self.evict(&mut inner);
        }
        let entry = inner
            .files
            .entry((number, access))
            .or_insert_with(|| Entry {
                file: Arc::new(SegmentFile::new(fd, access)),
                used,
            });
        entry.used = used;
        Arc::clone(&entry.file)
    }

    /// Makes room for one file: closes what is beyond the limit and, to sort seldom, a sixteenth
    /// more; the oldest of those that may be closed. If none may, the cache grows past its limit,
    /// by what is in flight or unsynced.
    fn evict(&self, inner: &mut Inner) {
        let excess = inner.files.len() + 1 - self.limit;
        inner.close(excess + self.limit / 16);
    }

    /// Closes every file that may be closed.
    pub(super) fn close_idle(&self) {
        self.lock().close(usize::MAX);
    }

    pub(super) fn forget(&self, number: SegmentNumber) {
        let mut inner = self.lock();
        inner.files.remove(&(number, Access::Buffered));
        inner.files.remove(&(number, Access::Direct));
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.lock().files.len()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The map is whole whenever the lock is released, also by a panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Closes up to `count` files, the oldest first, of those that may be closed.
    fn close(&mut self, count: usize) {
        let mut idle: Vec<_> = self
            .files
            .iter()
            .filter(|(_, entry)| Arc::strong_count(&entry.file) == 1 && entry.file.is_synced())
            .map(|(&key, entry)| (entry.used, key))
            .collect();
        idle.sort_unstable_by_key(|&(used, _)| used);
        for (_, key) in idle.into_iter().take(count) {
            self.files.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn adopt(files: &Files, number: u64) -> Arc<SegmentFile> {
        files.adopt(SegmentNumber(number), Access::Buffered, fd())
    }

    fn has(files: &Files, number: u64) -> bool {
        files.get(SegmentNumber(number), Access::Buffered).is_some()
    }

    #[test]
    fn least_recently_used_file_is_closed_at_the_limit() {
        let files = Files::new(3);
        for number in 0..3 {
            adopt(&files, number);
        }
        assert!(has(&files, 0), "and is now younger than 1");
        adopt(&files, 3);
        assert_eq!(files.len(), 3);
        assert!(has(&files, 0) && !has(&files, 1) && has(&files, 2) && has(&files, 3));
    }

    #[test]
    fn file_in_use_or_unsynced_is_never_closed() {
        let files = Files::new(2);
        let in_use = adopt(&files, 0);
        let unsynced = adopt(&files, 1);
        unsynced.note_write();
        let covered = unsynced.writes();
        drop(unsynced);
        adopt(&files, 2);
        assert!(has(&files, 0) && has(&files, 1) && has(&files, 2));

        files
            .get(SegmentNumber(1), Access::Buffered)
            .unwrap()
            .note_sync(covered);
        drop(in_use);
        adopt(&files, 3);
        assert!(!has(&files, 0), "the oldest is closed once it may be");
        adopt(&files, 4);
        assert!(!has(&files, 1));
    }

    #[test]
    fn all_but_what_is_in_use_can_be_closed_at_once() {
        let files = Files::new(8);
        let in_use = adopt(&files, 0);
        adopt(&files, 1);
        adopt(&files, 2).note_write();
        adopt(&files, 3);
        files.close_idle();
        assert_eq!(files.len(), 2);
        assert!(has(&files, 0) && has(&files, 2));
        drop(in_use);
    }

    #[test]
    fn sync_covers_only_writes_before_it() {
        let file = SegmentFile::new(fd(), Access::Buffered);
        file.note_write();
        let covered = file.writes();
        file.note_write();
        file.note_sync(covered);
        assert!(!file.is_synced());
        file.note_sync(file.writes());
        assert!(file.is_synced());
    }

    #[test]
    fn direct_writes_do_not_keep_a_file_open() {
        let files = Files::new(1);
        for number in 0..10 {
            let file = files.adopt(SegmentNumber(number), Access::Direct, fd());
            file.note_write();
        }
        assert_eq!(files.len(), 1);
    }

    #[test]
    fn the_first_of_two_adopted_descriptors_stays() {
        let files = Files::new(2);
        let first = adopt(&files, 0);
        let second = adopt(&files, 0);
        assert!(Arc::ptr_eq(&first, &second));
        files.forget(SegmentNumber(0));
        assert!(!has(&files, 0));
    }
}
