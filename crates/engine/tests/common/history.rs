//! The exact model of one volume: a history of changes, and what of it a crash must leave.
//!
//! Every sector of 512 bytes carries the *stamp* of the change that wrote it last (0: zeroes), and the
//! bytes of a sector follow from its number and its stamp, so that any mixture or wrong place is seen.
//!
//! A *change* is what the engine promises to do whole or not at all: a piece of a write that fits one
//! record, an unmap inside one leaf of the map. After a crash the volume must be what it was after some
//! number of changes (design.md, invariant 3), at least those that were promised (2); a snapshot must
//! be what the volume was after some number of changes that had begun when it was taken.

use std::collections::BTreeMap;

use vhostd_engine::types::Uuid;

use super::SECTOR;

/// Stamp of each sector; 0 is zeroes.
pub type State = Vec<u64>;

const BLOCK_SECTORS: u64 = 8;
const LEAF_SECTORS: u64 = 1024 * BLOCK_SECTORS;

/// A change of the volume that is all or nothing: sectors `from..to` get a stamp.
#[derive(Clone, Debug)]
pub struct Change {
    pub from: u64,
    pub to: u64,
    pub stamp: u64,
}

/// A snapshot whose contents a crash may still decide.
#[derive(Clone, Debug)]
pub struct Taken {
    pub uuid: Uuid,
    /// It holds at least so many changes, and at most so many.
    pub earliest: usize,
    pub latest: usize,
    /// It must be there.
    pub promised: bool,
}

/// The history that a recovered volume is held against.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// The state that all changes build on.
    pub base: State,
    pub changes: Vec<Change>,
    /// Changes that a completed flush covers, and acknowledged ones.
    pub flushed: usize,
    pub acknowledged: usize,
    pub taken: Vec<Taken>,
    /// Older snapshots, with their contents.
    pub settled: BTreeMap<Uuid, State>,
}

impl History {
    pub fn new(base: State) -> Self {
        Self {
            base,
            ..Self::default()
        }
    }

    pub fn apply(state: &mut State, change: &Change) {
        state[change.from as usize..change.to as usize].fill(change.stamp);
    }

    /// The state after all changes.
    pub fn now(&self) -> State {
        self.after(self.changes.len())
    }

    pub fn after(&self, changes: usize) -> State {
        let mut state = self.base.clone();
        for change in &self.changes[..changes] {
            Self::apply(&mut state, change);
        }
        state
    }

    /// Adds a write of sectors `from..to`, cut as the engine cuts it.
    pub fn write(&mut self, from: u64, to: u64, stamp: u64, piece_blocks: u64) {
        let mut at = from;
        while at < to {
            let end = ((at / BLOCK_SECTORS + piece_blocks) * BLOCK_SECTORS).min(to);
            self.push(at, end, stamp);
            at = end;
        }
    }

    /// Adds a discard, or (`exact`) a write-zeroes.
    pub fn unmap(&mut self, from: u64, to: u64, exact: bool) {
        let (inner_from, inner_to) = (
            from.next_multiple_of(BLOCK_SECTORS),
            to / BLOCK_SECTORS * BLOCK_SECTORS,
        );
        let mut at = inner_from;
        while at < inner_to {
            let end = ((at / LEAF_SECTORS + 1) * LEAF_SECTORS).min(inner_to);
            self.push(at, end, 0);
            at = end;
        }
        if exact && inner_from > inner_to {
            self.push(from, to, 0);
        } else if exact {
            self.push(from, inner_from, 0);
            self.push(inner_to, to, 0);
        }
    }

    fn push(&mut self, from: u64, to: u64, stamp: u64) {
        if from < to {
            self.changes.push(Change { from, to, stamp });
        }
    }

    /// A snapshot is taken; changes from `acknowledged` on may be in it or not.
    pub fn take(&mut self, uuid: Uuid) {
        self.taken.push(Taken {
            uuid,
            earliest: self.acknowledged,
            latest: usize::MAX,
            promised: false,
        });
    }

    /// Its note is in the log: no later change is in it.
    pub fn noted(&mut self, uuid: Uuid) {
        let latest = self.changes.len();
        for taken in self.taken.iter_mut().filter(|taken| taken.uuid == uuid) {
            taken.latest = taken.latest.min(latest);
        }
    }

    /// The snapshot is there for good, and with it all that came before.
    pub fn promise(&mut self, uuid: Uuid) {
        let taken = self.taken.iter_mut().find(|taken| taken.uuid == uuid);
        let taken = taken.expect("it was taken");
        taken.promised = true;
        taken.latest = taken.latest.min(self.changes.len());
        self.flushed = self.flushed.max(taken.earliest);
    }

    /// It is being removed; nobody may read it again.
    pub fn forget(&mut self, uuid: Uuid) {
        self.taken.retain(|taken| taken.uuid != uuid);
        self.settled.remove(&uuid);
    }

    /// The volume is in this state now, and so are its snapshots; the past is past.
    pub fn settle(&mut self, base: State, snapshots: Vec<(Uuid, State)>) {
        *self = Self::new(base);
        self.settled = snapshots.into_iter().collect();
    }

    /// Holds what was found after a crash against the history. `least`: changes that must be there.
    /// `snapshots`: those found, with their contents; each must be known.
    pub fn check(
        &self,
        found: &State,
        least: usize,
        snapshots: &[(Uuid, State)],
    ) -> Result<(), String> {
        for (uuid, contents) in &self.settled {
            match snapshots.iter().find(|(found, _)| found == uuid) {
                None => return Err(format!("snapshot {uuid} is lost")),
                Some((_, found)) if found != contents => {
                    return Err(format!("snapshot {uuid} has changed"));
                }
                Some(_) => {}
            }
        }
        for (uuid, _) in snapshots {
            let taken = self.taken.iter().any(|taken| taken.uuid == *uuid);
            if !taken && !self.settled.contains_key(uuid) {
                return Err(format!("snapshot {uuid} is there, and should not be"));
            }
        }
        // What the snapshots allow: all found ones had been taken, all missing ones had not.
        let (mut least, mut most) = (least, self.changes.len());
        let mut wanted = Vec::new();
        for taken in &self.taken {
            match snapshots.iter().find(|(uuid, _)| *uuid == taken.uuid) {
                Some((_, contents)) => {
                    least = least.max(taken.earliest);
                    wanted.push((taken, contents, false));
                }
                None if taken.promised => {
                    return Err(format!("snapshot {} is lost", taken.uuid));
                }
                None => most = most.min(taken.latest),
            }
        }
        let mut state = self.base.clone();
        let mut fits = None;
        for count in 0..=self.changes.len() {
            if (least..=most).contains(&count) && state == *found {
                fits = Some(count);
            }
            for (taken, contents, seen) in &mut wanted {
                let place = (taken.earliest..=taken.latest).contains(&count);
                *seen |= place && state == **contents;
            }
            if let Some(change) = self.changes.get(count) {
                Self::apply(&mut state, change);
            }
        }
        if fits.is_none() {
            return Err(format!(
                "the volume is not a prefix of {least} to {most} of {} changes (flushed {}, \
                 acknowledged {}); prefixes that fit: {:?}",
                self.changes.len(),
                self.flushed,
                self.acknowledged,
                self.fitting(found)
            ));
        }
        match wanted.iter().find(|(_, _, seen)| !seen) {
            Some((taken, contents, _)) => Err(format!(
                "snapshot {} is not what the volume was after {} to {} changes; it would be after {:?}",
                taken.uuid,
                taken.earliest,
                taken.latest,
                self.fitting(contents)
            )),
            None => Ok(()),
        }
    }

    fn fitting(&self, found: &State) -> Vec<usize> {
        (0..=self.changes.len())
            .filter(|&count| self.after(count) == *found)
            .collect()
    }
}

/// The bytes of a sector with this stamp.
pub fn sector_bytes(sector: u64, stamp: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    if stamp != 0 {
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = stamp.rotate_left(i as u32) ^ sector.wrapping_mul(i as u64);
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
}

/// What a write of sectors `from..to` with this stamp writes.
pub fn stamped(from: u64, to: u64, stamp: u64) -> Vec<u8> {
    (from..to).flat_map(|s| sector_bytes(s, stamp)).collect()
}

/// The stamp that sector `sector` carries, if its bytes are whole.
pub fn stamp_of(sector: u64, bytes: &[u8]) -> Option<u64> {
    let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("a sector has 512 bytes"));
    let fits = bytes.chunks_exact(8).enumerate().all(|(i, word)| {
        let value = stamp.rotate_left(i as u32) ^ sector.wrapping_mul(i as u64);
        word == if stamp == 0 {
            [0; 8]
        } else {
            value.to_le_bytes()
        }
    });
    fits.then_some(stamp)
}
