//! The bytes of simulated segments and the changes made to them. Sparse: what was never written
//! takes no memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::rng::SimRng;

/// What a disk keeps or loses at once (with luck).
pub(super) const SECTOR_BYTES: usize = 4096;
/// What a disk never tears.
const ATOM_BYTES: usize = 512;

/// A file: sectors, and holes between them.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    sectors: BTreeMap<u64, Arc<[u8; SECTOR_BYTES]>>,
    len_bytes: u64,
}

/// A change of one sector or a part of it.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// Grows with each change of a disk.
    pub(super) id: u64,
    pub(super) sector: u64,
    /// Where in the sector the change starts.
    start: usize,
    data: ChangeData,
}

#[derive(Clone, Debug)]
enum ChangeData {
    Written(Vec<u8>),
    /// A hole of this length; it does not make the file longer.
    Released(usize),
}

/// How changes come out of a crash.
#[derive(Clone, Copy, Debug)]
pub(super) struct Luck {
    pub(super) keep: f64,
    pub(super) tear: f64,
}

impl Change {
    /// The sector, if it is released as a whole, and so gives its space back.
    pub(super) fn whole_hole(&self) -> Option<u64> {
        matches!(self.data, ChangeData::Released(SECTOR_BYTES)).then_some(self.sector)
    }
}

impl Content {
    pub(super) const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Reads up to the end of the file; tells how much.
    pub(super) fn read(&self, offset_bytes: u64, into: &mut [u8]) -> usize {
        let left = self.len_bytes.saturating_sub(offset_bytes);
        let count = into.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        into[..count].fill(0);
        for (sector, start, range) in pieces(offset_bytes, count) {
            if let Some(bytes) = self.sectors.get(&sector) {
                let len = range.len();
                into[range].copy_from_slice(&bytes[start..start + len]);
            }
        }
        count
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len_bytes as usize];
        self.read(0, &mut bytes);
        bytes
    }

    pub(super) fn apply(&mut self, change: &Change) {
        match &change.data {
            ChangeData::Written(bytes) => self.write(change.sector, change.start, bytes),
            ChangeData::Released(len) => {
                if *len == SECTOR_BYTES {
                    self.sectors.remove(&change.sector);
                } else if let Some(bytes) = self.sectors.get_mut(&change.sector) {
                    Arc::make_mut(bytes)[change.start..change.start + len].fill(0);
                }
            }
        }
    }

    fn write(&mut self, sector: u64, start: usize, bytes: &[u8]) {
        let old = self
            .sectors
            .entry(sector)
            .or_insert_with(|| Arc::new([0; SECTOR_BYTES]));
        Arc::make_mut(old)[start..start + bytes.len()].copy_from_slice(bytes);
        let end = sector * SECTOR_BYTES as u64 + (start + bytes.len()) as u64;
        self.len_bytes = self.len_bytes.max(end);
    }

    /// Applies the change, loses it, or applies some of its 512-byte parts.
    pub(super) fn apply_with(&mut self, change: &Change, luck: Luck, rng: &mut SimRng) {
        if let ChangeData::Written(bytes) = &change.data
            && rng.chance(luck.tear)
        {
            let mut done = 0;
            while done < bytes.len() {
                let at = change.start + done;
                let len = (ATOM_BYTES - at % ATOM_BYTES).min(bytes.len() - done);
                if rng.coin() {
                    self.write(change.sector, at, &bytes[done..done + len]);
                }
                done += len;
            }
        } else if rng.chance(luck.keep) {
            self.apply(change);
        }
    }

    /// A file as long, with this sector alone.
    pub(super) fn only(&self, sector: u64) -> Self {
        let bytes = self.sectors.get(&sector).map(Arc::clone);
        Self {
            sectors: bytes.map(|bytes| (sector, bytes)).into_iter().collect(),
            len_bytes: self.len_bytes,
        }
    }

    /// Makes a sector what it is in `other`; the length stays.
    pub(super) fn revert(&mut self, sector: u64, other: &Self) {
        match other.sectors.get(&sector) {
            Some(bytes) => self.sectors.insert(sector, Arc::clone(bytes)),
            None => self.sectors.remove(&sector),
        };
    }

    /// Flips a bit of a byte that was written; tells whether it was.
    pub(super) fn flip(&mut self, offset_bytes: u64, bit: u8) -> bool {
        let sector = offset_bytes / SECTOR_BYTES as u64;
        let at = (offset_bytes % SECTOR_BYTES as u64) as usize;
        match self.sectors.get_mut(&sector) {
            Some(bytes) => {
                Arc::make_mut(bytes)[at] ^= 1 << (bit % 8);
                true
            }
            None => false,
        }
    }

    pub(super) fn has(&self, sector: u64) -> bool {
        self.sectors.contains_key(&sector)
    }

    /// The sectors that take space.
    pub(super) fn sectors(&self) -> impl Iterator<Item = u64> + '_ {
        self.sectors.keys().copied()
    }
}

/// The changes that writing `bytes` makes, one a sector, numbered from `next_id` on.
pub(super) fn written(offset_bytes: u64, bytes: &[u8], next_id: &mut u64) -> Vec<Change> {
    pieces(offset_bytes, bytes.len())
        .map(|(sector, start, range)| Change {
            id: take(next_id),
            sector,
            start,
            data: ChangeData::Written(bytes[range].to_vec()),
        })
        .collect()
}

/// The changes that punching holes makes, one a sector: a crash may leave any of them undone.
pub(super) fn released(ranges: &[Range<u64>], next_id: &mut u64) -> Vec<Change> {
    ranges
        .iter()
        .flat_map(|range| {
            let len_bytes = range.end.saturating_sub(range.start);
            pieces(range.start, len_bytes as usize)
        })
        .map(|(sector, start, range)| Change {
            id: take(next_id),
            sector,
            start,
            data: ChangeData::Released(range.len()),
        })
        .collect()
}

fn take(next_id: &mut u64) -> u64 {
    let id = *next_id;
    *next_id += 1;
    id
}

/// Cuts a range at sector borders: sector, start in it, range of the whole.
pub(super) fn pieces(
    offset_bytes: u64,
    len: usize,
) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset_bytes + done as u64;
        let start = (at % SECTOR_BYTES as u64) as usize;
        let count = (SECTOR_BYTES - start).min(len - done);
        let range = done..done + count;
        done += count;
        Some((at / SECTOR_BYTES as u64, start, range))
    })
}
