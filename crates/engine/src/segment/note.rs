//! A note: what a volume's log says beside its blocks, so that the catalog can be rebuilt from segments
//! alone. `docs/format.md`, "Note", is the specification.
//!
//! A note is the data of one entry of kind 3: whole blocks, whose checksums are in the record as those
//! of any data. No I/O here; what is parsed comes from a disk and may be anything: every length is
//! checked before it is used, and nothing panics.

use super::{FormatError, VERSION, array, get_u16, get_u32, get_u64, put};
use crate::types::{Address, BLOCK_BYTES, BlockNumber, Uuid};

const MAGIC: &[u8; 4] = b"VHNT";
const WHAT: &str = "note";
const HEADER_BYTES: usize = 16;
const SNAPSHOT_BYTES: usize = 34;
const UNMAPS_BYTES: usize = 8;
const UNMAP_BYTES: usize = 24;

/// Most blocks a note may have: a quarter of the smallest segment and of the smallest staging ring, so
/// that a note fits a record of every volume.
pub const MAX_NOTE_BLOCKS: u32 = 64;
/// Most payload of one note, bytes.
pub const MAX_NOTE_PAYLOAD_BYTES: usize = MAX_NOTE_BLOCKS as usize * BLOCK_BYTES - HEADER_BYTES;
/// Most unmaps of one unmaps note; more go into further notes.
pub const MAX_NOTE_UNMAPS: usize = (MAX_NOTE_PAYLOAD_BYTES - UNMAPS_BYTES) / UNMAP_BYTES;
/// Most parts of a state: about 16 MiB, far beyond what any volume has to say.
pub const MAX_STATE_PARTS: usize = 64;
/// Longest state, bytes.
pub const MAX_STATE_BYTES: usize = MAX_STATE_PARTS * MAX_NOTE_PAYLOAD_BYTES;
/// Longest name of a snapshot, bytes: its note is one block.
pub const MAX_SNAPSHOT_NAME_BYTES: usize = BLOCK_BYTES - HEADER_BYTES - SNAPSHOT_BYTES;

#[derive(Clone, Copy, PartialEq, Eq)]
enum NoteType {
    Snapshot = 1,
    State = 2,
    Unmaps = 3,
}

/// An unmap of a segment that was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotedUnmap {
    pub block: BlockNumber,
    pub count: u32,
    /// Position in the log at which it takes effect.
    pub position: Address,
}

/// A note, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// A snapshot was taken here: it holds what the log says before this position.
    Snapshot {
        snapshot: Uuid,
        /// Realtime clock, since the epoch.
        created_ns: u64,
        /// Size of the volume then.
        size_bytes: u64,
        name: String,
    },
    /// What is known of the volume (JSON, not looked at here), or a part of it: see [`StateParts`].
    State {
        /// Number of this part, from 0.
        part: u16,
        /// Parts that follow this one.
        more: u16,
        payload: Vec<u8>,
    },
    /// Unmaps of segments that were removed, still needed by older segments.
    Unmaps(Vec<NotedUnmap>),
}

impl Note {
    /// A state as the notes that say it, to be appended one after the other.
    ///
    /// # Errors
    /// [`FormatError`] if it is longer than [`MAX_STATE_BYTES`].
    pub fn state(payload: &[u8]) -> Result<Vec<Self>, FormatError> {
        if payload.len() > MAX_STATE_BYTES {
            return Err(wrong("length"));
        }
        let parts = payload.len().div_ceil(MAX_NOTE_PAYLOAD_BYTES).max(1);
        Ok((0..parts)
            .map(|part| {
                let from = part * MAX_NOTE_PAYLOAD_BYTES;
                let to = payload.len().min(from + MAX_NOTE_PAYLOAD_BYTES);
                Self::State {
                    part: part as u16,
                    more: (parts - 1 - part) as u16,
                    payload: payload[from..to].to_vec(),
                }
            })
            .collect())
    }

    fn payload_bytes(&self) -> usize {
        match self {
            Self::Snapshot { name, .. } => SNAPSHOT_BYTES + name.len(),
            Self::State { payload, .. } => payload.len(),
            Self::Unmaps(unmaps) => UNMAPS_BYTES + unmaps.len() * UNMAP_BYTES,
        }
    }

    /// Blocks that the note takes.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        (HEADER_BYTES + self.payload_bytes()).div_ceil(BLOCK_BYTES) as u32
    }

    /// The note as whole blocks.
    ///
    /// # Errors
    /// [`FormatError`] if it is longer than its kind may be ([`MAX_NOTE_BLOCKS`], for a snapshot one
    /// block).
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let blocks = self.blocks();
        if blocks > MAX_NOTE_BLOCKS {
            return Err(wrong("length"));
        }
        let mut bytes = vec![0; blocks as usize * BLOCK_BYTES];
        let kind = match self {
            Self::Snapshot { .. } if blocks > 1 => return Err(wrong("snapshot's name")),
            Self::Snapshot { .. } => NoteType::Snapshot,
            Self::State { .. } => NoteType::State,
            Self::Unmaps(_) => NoteType::Unmaps,
        };
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 4, &VERSION.to_le_bytes());
        put(&mut bytes, 6, &(kind as u16).to_le_bytes());
        put(&mut bytes, 8, &(self.payload_bytes() as u32).to_le_bytes());
        if let Self::State { part, more, .. } = self {
            put(&mut bytes, 12, &part.to_le_bytes());
            put(&mut bytes, 14, &more.to_le_bytes());
        }
        let out = &mut bytes[HEADER_BYTES..];
        match self {
            Self::Snapshot {
                snapshot,
                created_ns,
                size_bytes,
                name,
            } => {
                put(out, 0, &snapshot.0);
                put(out, 16, &created_ns.to_le_bytes());
                put(out, 24, &size_bytes.to_le_bytes());
                put(out, 32, &(name.len() as u16).to_le_bytes());
                put(out, SNAPSHOT_BYTES, name.as_bytes());
            }
            Self::State { payload, .. } => put(out, 0, payload),
            Self::Unmaps(unmaps) => {
                put(out, 0, &(unmaps.len() as u32).to_le_bytes());
                for (row, unmap) in out[UNMAPS_BYTES..]
                    .chunks_exact_mut(UNMAP_BYTES)
                    .zip(unmaps)
                {
                    put(row, 0, &unmap.block.0.to_le_bytes());
                    put(row, 8, &unmap.count.to_le_bytes());
                    put(row, 16, &unmap.position.bits().to_le_bytes());
                }
            }
        }
        Ok(bytes)
    }

    /// Reads a note out of its blocks, whose checksums have been verified.
    ///
    /// # Errors
    /// [`FormatError`] if they hold no note of this version, or one that contradicts itself.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.is_empty() || !bytes.len().is_multiple_of(BLOCK_BYTES) || bytes[..4] != MAGIC[..] {
            return Err(FormatError::Magic(WHAT));
        }
        let version = get_u16(bytes, 4);
        if version != VERSION {
            return Err(FormatError::Version(WHAT, version, VERSION));
        }
        let length = get_u32(bytes, 8) as usize;
        let payload = bytes[HEADER_BYTES..].get(..length).ok_or(wrong("length"))?;
        if bytes.len() > MAX_NOTE_BLOCKS as usize * BLOCK_BYTES {
            return Err(wrong("length"));
        }
        match get_u16(bytes, 6) {
            kind if kind == NoteType::Snapshot as u16 => {
                if bytes.len() > BLOCK_BYTES {
                    return Err(wrong("length"));
                }
                parse_snapshot(payload)
            }
            kind if kind == NoteType::State as u16 => {
                let (part, more) = (get_u16(bytes, 12), get_u16(bytes, 14));
                if usize::from(part) + usize::from(more) >= MAX_STATE_PARTS {
                    return Err(wrong("part"));
                }
                Ok(Self::State {
                    part,
                    more,
                    payload: payload.to_vec(),
                })
            }
            kind if kind == NoteType::Unmaps as u16 => parse_unmaps(payload),
            _ => Err(wrong("type")),
        }
    }
}

fn parse_snapshot(payload: &[u8]) -> Result<Note, FormatError> {
    if payload.len() < SNAPSHOT_BYTES {
        return Err(wrong("length"));
    }
    let name = payload[SNAPSHOT_BYTES..]
        .get(..usize::from(get_u16(payload, 32)))
        .ok_or(wrong("length of the snapshot's name"))?;
    let name = std::str::from_utf8(name).map_err(|_| wrong("snapshot's name"))?;
    Ok(Note::Snapshot {
        snapshot: Uuid(array(payload, 0)),
        created_ns: get_u64(payload, 16),
        size_bytes: get_u64(payload, 24),
        name: name.to_owned(),
    })
}

fn parse_unmaps(payload: &[u8]) -> Result<Note, FormatError> {
    if payload.len() < UNMAPS_BYTES {
        return Err(wrong("length"));
    }
    let rows = &payload[UNMAPS_BYTES..];
    if u64::from(get_u32(payload, 0)) * UNMAP_BYTES as u64 != rows.len() as u64 {
        return Err(wrong("count"));
    }
    let unmaps = rows
        .chunks_exact(UNMAP_BYTES)
        .map(|row| {
            let unmap = NotedUnmap {
                block: BlockNumber(get_u64(row, 0)),
                count: get_u32(row, 8),
                position: Address::from_bits(get_u64(row, 16)),
            };
            let end = unmap.block.0.checked_add(u64::from(unmap.count));
            if unmap.count == 0 || end.is_none() {
                return Err(wrong("unmap"));
            }
            Ok(unmap)
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Note::Unmaps(unmaps))
}

const fn wrong(field: &'static str) -> FormatError {
    FormatError::Field {
        structure: WHAT,
        field,
    }
}

/// Puts a state together from the state notes of a log, in the log's order.
///
/// A state of several parts counts once its last one is there; whatever does not go on with what came
/// before it is dropped (a writer died between two parts).
#[derive(Clone, Debug, Default)]
pub struct StateParts {
    payload: Vec<u8>,
    /// The part that comes next and those after it; `None`: only a first part is taken.
    wanted: Option<(u16, u16)>,
    /// Of the first part.
    position: Option<Address>,
}

impl StateParts {
    /// Takes the next state note, which stands at `position`. Returns a state that is complete with it,
    /// and its position: that of its first part.
    pub fn push(
        &mut self,
        position: Address,
        part: u16,
        more: u16,
        payload: &[u8],
    ) -> Option<(Address, Vec<u8>)> {
        if part == 0 {
            self.payload.clear();
            self.position = Some(position);
        } else if self.wanted != Some((part, more)) {
            *self = Self::default();
            return None;
        }
        self.payload.extend_from_slice(payload);
        if more > 0 {
            self.wanted = part.checked_add(1).zip(Some(more - 1));
            return None;
        }
        let whole = std::mem::take(self);
        whole.position.map(|position| (position, whole.payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::SegmentNumber;
    use proptest::prelude::*;

    fn address(bits: u64) -> Address {
        Address::from_bits(bits)
    }

    fn any_note() -> impl Strategy<Value = Note> {
        let unmap = (0..1u64 << 34, 1..u32::MAX, any::<u64>()).prop_map(|(block, count, bits)| {
            NotedUnmap {
                block: BlockNumber(block),
                count,
                position: address(bits),
            }
        });
        prop_oneof![
            (any::<[u8; 16]>(), any::<u64>(), any::<u64>(), "\\PC{0,128}").prop_map(
                |(uuid, created_ns, size_bytes, name)| Note::Snapshot {
                    snapshot: Uuid(uuid),
                    created_ns,
                    size_bytes,
                    name,
                }
            ),
            (
                0..32u16,
                0..32u16,
                prop::collection::vec(any::<u8>(), 0..20_000)
            )
                .prop_map(|(part, more, payload)| Note::State {
                    part,
                    more,
                    payload
                }),
            prop::collection::vec(unmap, 0..400).prop_map(Note::Unmaps),
        ]
    }

    proptest! {
        #[test]
        fn note_survives_a_round_trip(note in any_note()) {
            let bytes = note.encode().unwrap();
            prop_assert_eq!(bytes.len(), note.blocks() as usize * BLOCK_BYTES);
            prop_assert_eq!(Note::parse(&bytes), Ok(note));
        }

        #[test]
        fn a_damaged_note_never_panics(
            note in any_note(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
            header in prop::collection::vec((4..60usize, any::<u8>()), 0..6),
            keep_blocks in 0..8usize,
        ) {
            let mut bytes = note.encode().unwrap();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            for (at, value) in header {
                bytes[at] = value;
            }
            let len = bytes.len().min(keep_blocks * BLOCK_BYTES);
            for bytes in [&bytes[..], &bytes[..len], &bytes[..bytes.len() - 1]] {
                if let Ok(note) = Note::parse(bytes) {
                    // What is taken at all can be written again.
                    prop_assert_eq!(Note::parse(&note.encode().unwrap()), Ok(note));
                }
            }
        }

        #[test]
        fn hostile_bytes_never_panic(kind in 0..5u16, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = vec![0; BLOCK_BYTES];
            put(&mut bytes, 8, &body);
            put(&mut bytes, 0, MAGIC);
            put(&mut bytes, 4, &VERSION.to_le_bytes());
            put(&mut bytes, 6, &kind.to_le_bytes());
            let _ = Note::parse(&bytes);
            put(&mut bytes, 8, &300u32.to_le_bytes());
            let _ = Note::parse(&bytes);
        }

        #[test]
        fn state_of_any_length_is_put_together_again(
            len in 0..3 * MAX_NOTE_PAYLOAD_BYTES, seed in any::<u8>(), lost in any::<prop::sample::Index>()
        ) {
            let payload: Vec<u8> = (0..len).map(|i| (i / 7) as u8 ^ seed).collect();
            let notes = Note::state(&payload).unwrap();
            let mut parts = StateParts::default();
            let mut push = |skip: Option<usize>| {
                let mut whole = None;
                for (i, note) in notes.iter().enumerate().filter(|(i, _)| Some(*i) != skip) {
                    let Ok(Note::State { part, more, payload }) = Note::parse(&note.encode().unwrap()) else {
                        panic!("not a state");
                    };
                    assert!(whole.is_none(), "complete before its last part");
                    whole = parts.push(address(100 + i as u64), part, more, &payload);
                }
                whole
            };
            // With any part lost there is no state, and the next one is not harmed by that.
            prop_assert_eq!(push(Some(lost.index(notes.len()))), None);
            prop_assert_eq!(push(None), Some((address(100), payload)));
        }
    }

    #[test]
    fn layout_is_the_documented_one() {
        let note = Note::Snapshot {
            snapshot: Uuid([9; 16]),
            created_ns: 3,
            size_bytes: 5,
            name: "é".to_owned(),
        };
        let bytes = note.encode().unwrap();
        assert_eq!(bytes[..8], *b"VHNT\x01\0\x01\0");
        assert_eq!(bytes[8..16], [36, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..32], [9; 16]);
        assert_eq!((bytes[32], bytes[40], bytes[48]), (3, 5, 2));
        assert_eq!(bytes[50..52], *"é".as_bytes());
        let unmap = NotedUnmap {
            block: BlockNumber(1),
            count: 2,
            position: Address::new(SegmentNumber(1), 3),
        };
        let bytes = Note::Unmaps(vec![unmap; 2]).encode().unwrap();
        assert_eq!(bytes[6..12], [3, 0, 56, 0, 0, 0]);
        assert_eq!((bytes[16], bytes[24], bytes[32]), (2, 1, 2));
        assert_eq!(bytes[40..42], [3, 32]);
        assert_eq!(bytes[48], 1);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let snapshot = |len| Note::Snapshot {
            snapshot: Uuid::default(),
            created_ns: 0,
            size_bytes: 0,
            name: "n".repeat(len),
        };
        assert!(snapshot(MAX_SNAPSHOT_NAME_BYTES).encode().is_ok());
        assert!(snapshot(MAX_SNAPSHOT_NAME_BYTES + 1).encode().is_err());
        let unmap = NotedUnmap {
            block: BlockNumber(0),
            count: 1,
            position: address(8193),
        };
        let full = Note::Unmaps(vec![unmap; MAX_NOTE_UNMAPS]);
        assert_eq!(full.blocks(), MAX_NOTE_BLOCKS);
        assert_eq!(Note::parse(&full.encode().unwrap()), Ok(full));
        assert!(
            Note::Unmaps(vec![unmap; MAX_NOTE_UNMAPS + 1])
                .encode()
                .is_err()
        );
        assert_eq!(
            Note::state(&vec![0; MAX_STATE_BYTES]).unwrap().len(),
            MAX_STATE_PARTS
        );
        assert!(Note::state(&vec![0; MAX_STATE_BYTES + 1]).is_err());
    }
}
