//! Notes in the log: snapshots, and what a rebuild needs to know of the volume.
//!
//! Ordering argument for a snapshot. Its note is committed to the log like a write, and the map is
//! frozen in the same step, so the frozen tree holds exactly what the log says before the note. The
//! request finishes when the note is durable, and with it everything before. Until a checkpoint has
//! written the frozen tree the snapshot is *pending*: its note lies behind the newest committed
//! checkpoint, so that recovery meets it and freezes the map at the same place. From the freeze on
//! nothing that the head replaces of an older address dies: `parent` is the note's position.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use super::space::SpaceTable;
use super::{RequestFailed, Slot, Step, Volume, VolumeError};
use crate::io::Io;
use crate::log::{AppendError, Now};
use crate::map::{Map, NodeLocation};
use crate::segment::{MAX_STATE_BYTES, Note};
use crate::types::{Address, Uuid};

/// Snapshots that no checkpoint has written yet. At the bound, taking another one fails until a
/// checkpoint was committed: each pins the nodes of the map that changed since the one before.
pub const MAX_PENDING_SNAPSHOTS: usize = 64;

/// A snapshot to be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    pub uuid: Uuid,
    pub name: String,
    /// Realtime.
    pub created_ns: u64,
}

/// Where a note came to lie; set when it has been appended.
pub type NotedAt = Arc<OnceLock<Address>>;

/// The snapshot that the head descends from, once it has a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    pub position: Address,
    /// `None`: nothing was mapped.
    pub root: Option<NodeLocation>,
}

/// A snapshot's note that recovery met behind the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundSnapshot {
    pub snapshot: NewSnapshot,
    pub size_bytes: u64,
    pub position: Address,
}

/// The map of a snapshot that a checkpoint has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotRoot {
    pub uuid: Uuid,
    pub position: Address,
    pub root: Option<NodeLocation>,
    pub mapped_blocks: u64,
}

/// A snapshot whose tree is frozen in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    /// What the map knows its tree by.
    pub key: u64,
    pub uuid: Uuid,
    pub position: Address,
}

/// What the volume knows of its snapshots and notes.
#[derive(Debug)]
pub(super) struct History {
    /// Position of the newest snapshot the head descends from; address 0 if there is none.
    pub parent: Address,
    /// Position of the newest snapshot of all; after a rollback it may be of another line.
    pub newest: Address,
    /// Oldest first.
    pub pending: Vec<Pending>,
    next_key: u64,
    /// Payload of the newest state note; empty: none was given.
    pub state: Vec<u8>,
    /// Where the log has it; `None`: not at all, or not in this opening.
    pub state_at: Option<Address>,
    /// Where its parts begin that are being appended.
    state_begins: Address,
    /// Its first blocks are another volume's.
    pub clone: bool,
    /// While not 0, no map segment is removed or punched.
    pub holds: u32,
}

impl History {
    pub(super) fn new(
        parent: Option<Parent>,
        newest: Address,
        state: Vec<u8>,
        clone: bool,
    ) -> Self {
        let parent = parent.map_or(Address::NONE, |parent| parent.position);
        Self {
            parent,
            newest: newest.max(parent),
            pending: Vec::new(),
            next_key: 0,
            state,
            state_at: None,
            state_begins: Address::NONE,
            clone,
            holds: 0,
        }
    }

    /// Notes that a part of a state note lies at `position`; the state counts with its last part.
    fn state_part(&mut self, part: u16, more: u16, position: Address) {
        if part == 0 {
            self.state_begins = position;
        }
        if more == 0 {
            self.state_at = Some(self.state_begins);
        }
    }

    /// Notes that a snapshot was taken at `position`; returns the key for the map's freeze.
    pub(super) fn freeze(&mut self, uuid: Uuid, position: Address) -> u64 {
        self.next_key += 1;
        let key = self.next_key;
        self.pending.push(Pending {
            key,
            uuid,
            position,
        });
        self.parent = position;
        self.newest = position;
        key
    }
}

/// Notes to be appended, one after the other.
#[derive(Debug)]
pub(super) struct NoteWork {
    notes: VecDeque<Note>,
    /// Gets the position of the first.
    at: NotedAt,
}

impl NoteWork {
    pub(super) fn new(notes: impl Into<VecDeque<Note>>, at: NotedAt) -> Self {
        let notes = notes.into();
        Self { notes, at }
    }
}

/// Does what a note at `position` says, when it has been appended or when recovery meets it.
pub(super) fn take_note(
    note: &Note,
    position: Address,
    history: &mut History,
    map: &mut Map,
    space: &mut SpaceTable,
) {
    match note {
        Note::Snapshot { snapshot, .. } => {
            map.freeze(history.freeze(*snapshot, position));
            space.count_notes(position.segment(), note.blocks());
        }
        Note::State { part, more, .. } => {
            history.state_part(*part, *more, position);
            space.count_notes(position.segment(), note.blocks());
        }
        Note::Unmaps(unmaps) => space.count_unmaps(position.segment(), unmaps.len() as u32),
    }
}

impl Volume {
    /// Appends notes; a snapshot's freezes the map behind it.
    pub(super) fn run_note(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        work: &mut NoteWork,
        now: Now,
    ) -> Step {
        if self.log.is_none() || self.closing {
            return Step::Finish(Err(RequestFailed::NotWritable));
        }
        while let Some(note) = work.notes.front() {
            let is_snapshot = matches!(note, Note::Snapshot { .. });
            if is_snapshot && self.history.pending.len() >= MAX_PENDING_SNAPSHOTS {
                return Step::Finish(Err(RequestFailed::SnapshotsPending));
            }
            let Ok(bytes) = note.encode() else {
                return Step::Finish(Err(RequestFailed::NoteTooLarge));
            };
            if let Err(step) = self.prepare_note(io, slot, note.blocks(), now) {
                return step;
            }
            let position = self.log_mut().append_note(&bytes, now);
            // Only the first is asked for.
            let _ = work.at.set(position);
            take_note(
                note,
                position,
                &mut self.history,
                &mut self.map,
                &mut self.space,
            );
            work.notes.pop_front();
        }
        Step::Changed
    }

    /// Makes room in the log for a note, or parks the request.
    ///
    /// A note waits for the log only, ahead of all writes, and never for space or for the map's memory:
    /// these may come with the commit of a checkpoint, and whoever asked for a snapshot holds that up.
    fn prepare_note(
        &mut self,
        io: &mut dyn Io,
        slot: Slot,
        blocks: u32,
        now: Now,
    ) -> Result<(), Step> {
        self.log_mut()
            .prepare(io, blocks, now)
            .map_err(|error| match error {
                AppendError::Wait => {
                    self.waiting_notes.push_back(slot);
                    Step::Parked
                }
                AppendError::NoSpace => Step::Finish(Err(RequestFailed::NoSpace)),
                AppendError::Failed => Step::Finish(Err(RequestFailed::NotWritable)),
            })
    }

    /// The note that a snapshot of now is.
    pub(super) fn snapshot_note(&self, snapshot: NewSnapshot) -> Note {
        let NewSnapshot {
            uuid,
            name,
            created_ns,
        } = snapshot;
        Note::Snapshot {
            snapshot: uuid,
            created_ns,
            size_bytes: self.size_bytes,
            name,
        }
    }

    /// Takes a new state note, for when the engine has to repeat it. It is in the log only when a
    /// request has put it there.
    ///
    /// # Errors
    /// It is longer than a state can be.
    pub fn set_state_note(&mut self, payload: Vec<u8>) -> Result<(), VolumeError> {
        if payload.len() > MAX_STATE_BYTES {
            return Err(VolumeError::NoteTooLarge {
                bytes: payload.len(),
                most: MAX_STATE_BYTES,
            });
        }
        self.history.state = payload;
        Ok(())
    }

    /// The state that the volume was given, as notes; none if it was given none. Each part is there
    /// twice over: should the catalog be lost, one damaged block must not cost the rest.
    pub(super) fn state_notes(&self) -> Vec<Note> {
        if self.history.state.is_empty() {
            return Vec::new();
        }
        // Longer states are refused when they are given.
        let notes = Note::state(&self.history.state).unwrap_or_default();
        [notes.clone(), notes].concat()
    }

    /// The head now descends from `parent`: snapshots between are being removed.
    pub fn set_parent(&mut self, parent: Option<Parent>) {
        let position = parent.map_or(Address::NONE, |parent| parent.position);
        match self.history.pending.last() {
            // A snapshot was taken since: it is the head's parent, whatever goes before it.
            Some(_) => {}
            None => {
                self.history.parent = position;
                self.map.set_parent_root(parent.and_then(|p| p.root));
            }
        }
    }

    /// Until [`Self::release_nodes`], no map segment is removed or punched; calls nest.
    pub fn hold_nodes(&mut self) {
        self.history.holds += 1;
    }

    pub fn release_nodes(&mut self) {
        self.history.holds = self.history.holds.saturating_sub(1);
    }
}
