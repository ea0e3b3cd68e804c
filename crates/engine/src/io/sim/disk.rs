//! The state of a simulated disk, what operations do to it, and what is left of it after a crash.
//!
//! Invariants:
//! - `durable` of a segment with all of `unsynced` applied is `current`, but for what a failed or
//!   lying sync has lost.
//! - A change leaves `unsynced` only for `durable`, or by the loss of its segment, or by a fault.
//! - Nothing here keeps a pointer to the submitter's memory past the operation's completion.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::content::{Change, Content, Luck, SECTOR_BYTES, pieces, released, written};
use super::fault::{Fault, FaultRule, OpKind, SimEvent, SimOp};
use super::rng::SimRng;
use crate::io::{IoBuf, Op, Token};
use crate::segment::{FormatError, SegmentHeader};
use crate::types::{BLOCK_BYTES, SegmentNumber};

/// A directory of segments holds 2^10 of them, as `docs/format.md` says; creating one makes the
/// removals in its directory durable.
const SEGMENTS_IN_DIRECTORY_BITS: u32 = 10;

/// What power loss does to changes that no sync has covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashMode {
    /// Each 4 KiB of them is kept, lost or torn into 512-byte parts, independently.
    Random,
    /// Nothing of them is left; operations in flight never happened.
    LoseUnsynced,
    /// All of them are there, and operations in flight have happened.
    KeepAll,
}

/// A simulated disk. Clones are handles to the same one; [`Self::crash`] and [`Self::kill`] make
/// another and leave this one as it is, so that many crashes can be tried at one point.
#[derive(Clone, Debug)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
pub(super) struct State {
    rng: SimRng,
    pub(super) segments: BTreeMap<SegmentNumber, Segment>,
    /// Removed, but after a crash they may be back.
    pub(super) removed: BTreeMap<SegmentNumber, Segment>,
    pub(super) in_flight: Vec<InFlight>,
    next_op: u64,
    pub(super) next_change: u64,
    rules: Vec<FaultRule>,
    /// Operations of these kinds do not complete.
    held: Vec<OpKind>,
    /// Space for sectors that have none yet; `None`: no limit.
    free_bytes: Option<u64>,
    history: Option<Vec<SimEvent>>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Segment {
    pub(super) current: Content,
    pub(super) durable: Content,
    pub(super) unsynced: Vec<Change>,
    /// Sectors that have space, written or reserved.
    allocated: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
pub(super) struct InFlight {
    pub(super) id: u64,
    /// Which SimIo has submitted it; only that one may complete it.
    owner: u64,
    token: Token,
    pub(super) segment: SegmentNumber,
    pub(super) op: SimOp,
    /// Memory of the submitter, of a read or a write.
    bufs: Vec<IoBuf>,
    fault: Option<Fault>,
    /// Changes before this one were complete at the submission.
    changes: u64,
}

impl SimDisk {
    /// An empty disk. All it does follows from `seed` and the operations.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::from_state(State {
            rng: SimRng::new(seed),
            segments: BTreeMap::new(),
            removed: BTreeMap::new(),
            in_flight: Vec::new(),
            next_op: 0,
            next_change: 0,
            rules: Vec::new(),
            held: Vec::new(),
            free_bytes: None,
            history: None,
        })
    }

    pub(super) fn from_state(state: State) -> Self {
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Numbers of the segments there are, ascending.
    #[must_use]
    pub fn list(&self) -> Vec<SegmentNumber> {
        self.lock().segments.keys().copied().collect()
    }

    /// What a read of the whole segment yields now.
    #[must_use]
    pub fn contents(&self, number: SegmentNumber) -> Option<Vec<u8>> {
        let state = self.lock();
        Some(state.segments.get(&number)?.current.to_vec())
    }

    /// Parses a segment's header.
    ///
    /// # Errors
    /// [`FormatError`] if there is no valid one, or no segment.
    pub fn identify(&self, number: SegmentNumber) -> Result<SegmentHeader, FormatError> {
        let mut block = [0; BLOCK_BYTES];
        let state = self.lock();
        let segment = state.segments.get(&number);
        match segment.map(|segment| segment.current.read(0, &mut block)) {
            Some(BLOCK_BYTES) => SegmentHeader::parse(&block),
            _ => Err(FormatError::Magic("segment header")),
        }
    }

    /// Has faults happen from now on, besides those of earlier rules. The first rule that strikes
    /// decides.
    pub fn add_fault(&self, rule: FaultRule) {
        self.lock().rules.push(rule);
    }

    pub fn clear_faults(&self) {
        self.lock().rules.clear();
    }

    /// Keeps operations of these kinds in flight until it is called without them.
    pub fn hold(&self, kinds: &[OpKind]) {
        self.lock().held = kinds.to_vec();
    }

    /// Limits the space for what has none yet; beyond it operations fail with ENOSPC. `None`: no
    /// limit.
    pub fn set_free_bytes(&self, free_bytes: Option<u64>) {
        self.lock().free_bytes = free_bytes;
    }

    /// Rot: flips a bit of what is on the medium (and in the cache, as if it had been read again).
    /// False if nothing is written there.
    pub fn flip_bit(&self, number: SegmentNumber, offset_bytes: u64, bit: u8) -> bool {
        match self.lock().segments.get_mut(&number) {
            Some(segment) => {
                segment.durable.flip(offset_bytes, bit);
                segment.current.flip(offset_bytes, bit)
            }
            None => false,
        }
    }

    /// Starts recording (forgetting an earlier record), or stops it.
    pub fn record(&self, on: bool) {
        self.lock().history = on.then(Vec::new);
    }

    /// What happened since the recording started; empty without one.
    #[must_use]
    pub fn history(&self) -> Vec<SimEvent> {
        self.lock().history.clone().unwrap_or_default()
    }

    /// Operations submitted so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.lock().next_op
    }

    /// The disk after power loss now, as the next machine to run finds it. `seed` decides the
    /// fate of each change and, after that, all the new disk does. Faults and holds are gone.
    #[must_use]
    pub fn crash(&self, mode: CrashMode, seed: u64) -> Self {
        let mut rng = SimRng::new(seed);
        let luck = match mode {
            // Crashes where nearly all or nearly nothing is left find other defects than those
            // where half is.
            CrashMode::Random => Luck {
                keep: [0.1, 0.5, 0.9][rng.below(3) as usize],
                tear: [0.0, 0.1, 0.5][rng.below(3) as usize],
            },
            CrashMode::LoseUnsynced => Luck {
                keep: 0.0,
                tear: 0.0,
            },
            CrashMode::KeepAll => Luck {
                keep: 1.0,
                tear: 0.0,
            },
        };
        let state = self.lock();
        let mut segments = BTreeMap::new();
        for (&number, segment) in &state.segments {
            segments.insert(number, segment.after_crash(luck, &mut rng));
        }
        for (&number, segment) in &state.removed {
            if !segments.contains_key(&number) && !rng.chance(luck.keep) {
                segments.insert(number, segment.after_crash(luck, &mut rng));
            }
        }
        let in_flight = state.in_flight.clone();
        let next_change = state.next_change;
        drop(state);
        let mut next = State::restarted(rng, segments, next_change);
        next.resolve(in_flight, luck);
        for segment in next.segments.values_mut() {
            segment.settle();
        }
        next.removed.clear();
        Self::from_state(next)
    }

    /// The disk after the death of the process only: completed writes are there, though not
    /// durable yet, and each 4 KiB of what is in flight may have happened or not.
    #[must_use]
    pub fn kill(&self, seed: u64) -> Self {
        let mut rng = SimRng::new(seed);
        let luck = Luck {
            keep: [0.0, 0.5, 1.0][rng.below(3) as usize],
            tear: 0.0,
        };
        let state = self.lock();
        let mut next = State::restarted(rng, state.segments.clone(), state.next_change);
        next.removed = state.removed.clone();
        next.free_bytes = state.free_bytes;
        let in_flight = state.in_flight.clone();
        drop(state);
        next.resolve(in_flight, luck);
        Self::from_state(next)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked while it held the state has failed already.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Segment {
    pub(super) fn of(current: Content) -> Self {
        Self {
            current,
            ..Self::default()
        }
    }

    pub(super) fn change(&mut self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            self.current.apply(&change);
            self.unsynced.push(change);
        }
    }

    fn after_crash(&self, luck: Luck, rng: &mut SimRng) -> Self {
        let mut current = self.durable.clone();
        for change in &self.unsynced {
            current.apply_with(change, luck, rng);
        }
        Self::of(current)
    }

    /// What is there is durable.
    pub(super) fn settle(&mut self) {
        self.durable = self.current.clone();
        self.unsynced.clear();
        self.allocated = self.current.sectors().collect();
    }

    fn sync(&mut self, before_change: u64) {
        for change in self
            .unsynced
            .extract_if(.., |change| change.id < before_change)
        {
            self.durable.apply(&change);
        }
    }

    /// A sync has failed: some of what was dirty counts as clean now without being durable, and
    /// is seen until the cache drops it, or not even that long.
    fn lose_dirty(&mut self, rng: &mut SimRng) {
        let lost: Vec<_> = self.unsynced.extract_if(.., |_| rng.coin()).collect();
        for change in lost {
            if rng.coin() {
                self.current.revert(change.sector, &self.durable);
                for later in self.unsynced.iter().filter(|c| c.sector == change.sector) {
                    self.current.apply(later);
                }
            }
        }
    }
}

impl State {
    pub(super) fn restarted(
        rng: SimRng,
        segments: BTreeMap<SegmentNumber, Segment>,
        next_change: u64,
    ) -> Self {
        Self {
            rng,
            segments,
            removed: BTreeMap::new(),
            in_flight: Vec::new(),
            next_op: 0,
            next_change,
            rules: Vec::new(),
            held: Vec::new(),
            free_bytes: None,
            history: None,
        }
    }

    pub(super) fn submit(&mut self, owner: u64, token: Token, segment: SegmentNumber, op: Op) {
        let (op, bufs) = copy(op);
        let id = self.next_op;
        self.next_op += 1;
        if let Some(history) = &mut self.history {
            let op = op.clone();
            history.push(SimEvent::Submitted { id, segment, op });
        }
        let mut fault = None;
        for rule in &mut self.rules {
            // Every rule counts every operation, whichever strikes first.
            if rule.strikes(op.kind(), segment, &mut self.rng) && fault.is_none() {
                fault = Some(rule.fault);
            }
        }
        self.in_flight.push(InFlight {
            id,
            owner,
            token,
            segment,
            op,
            bufs,
            fault,
            changes: self.next_change,
        });
    }

    /// Completes one of the owner's operations that are not held, any one.
    pub(super) fn complete_one(&mut self, owner: u64) -> Option<(Token, Result<usize, i32>)> {
        let able: Vec<_> = (0..self.in_flight.len())
            .filter(|&i| {
                let op = &self.in_flight[i];
                op.owner == owner && !self.held.contains(&op.op.kind())
            })
            .collect();
        if able.is_empty() {
            return None;
        }
        let chosen = able[self.rng.below(able.len() as u64) as usize];
        let op = self.in_flight.swap_remove(chosen);
        let result = self.perform(&op);
        if let Some(history) = &mut self.history {
            let id = op.id;
            history.push(SimEvent::Completed { id, result });
        }
        Some((op.token, result))
    }

    fn perform(&mut self, op: &InFlight) -> Result<usize, i32> {
        match &op.op {
            SimOp::Create { header } => return self.create(op, header),
            SimOp::Remove => {
                if let Some(Fault::Error(errno)) = op.fault {
                    return Err(errno);
                }
                if op.fault != Some(Fault::Lost) {
                    self.remove(op.segment);
                }
                return Ok(0);
            }
            _ => {}
        }
        let Some(segment) = self.segments.get_mut(&op.segment) else {
            return Err(libc::ENOENT);
        };
        match &op.op {
            SimOp::Read { offset_bytes, .. } => read(segment, *offset_bytes, op, &mut self.rng),
            SimOp::Write {
                offset_bytes, data, ..
            } => {
                assert_unchanged(&op.bufs, data);
                self.write(op, *offset_bytes, data)
            }
            SimOp::Sync => {
                match op.fault {
                    Some(Fault::Error(errno)) => {
                        segment.lose_dirty(&mut self.rng);
                        return Err(errno);
                    }
                    Some(Fault::Lost) => {}
                    _ => segment.sync(op.changes),
                }
                Ok(0)
            }
            SimOp::Reserve {
                offset_bytes,
                len_bytes,
            } => {
                if let Some(Fault::Error(errno)) = op.fault {
                    return Err(errno);
                }
                let len = *len_bytes as usize;
                let sectors: Vec<_> = pieces(*offset_bytes, len).map(|piece| piece.0).collect();
                match allocate(segment, &mut self.free_bytes, &sectors) {
                    done if done == sectors.len() => Ok(0),
                    _ => Err(libc::ENOSPC),
                }
            }
            SimOp::Release { ranges } => {
                if op.fault == Some(Fault::Lost) {
                    return Ok(0);
                }
                let mut changes = released(ranges, &mut self.next_change);
                if let Some(Fault::Error(_)) = op.fault {
                    changes.retain(|_| self.rng.coin());
                }
                for sector in changes.iter().filter_map(Change::whole_hole) {
                    if segment.allocated.remove(&sector) {
                        give_back(&mut self.free_bytes, 1);
                    }
                }
                segment.change(changes);
                match op.fault {
                    Some(Fault::Error(errno)) => Err(errno),
                    _ => Ok(0),
                }
            }
            SimOp::Create { .. } | SimOp::Remove => Ok(0),
        }
    }

    fn create(&mut self, op: &InFlight, header: &[u8]) -> Result<usize, i32> {
        if let Some(Fault::Error(errno)) = op.fault {
            return Err(errno);
        }
        if self.segments.contains_key(&op.segment) {
            return Err(libc::EEXIST);
        }
        let mut segment = Segment::default();
        if allocate(&mut segment, &mut self.free_bytes, &[0]) == 0 {
            return Err(libc::ENOSPC);
        }
        let mut header = header.to_vec();
        if op.fault == Some(Fault::FlipBit) {
            flip_any(&mut header, &mut self.rng);
        }
        segment.change(written(0, &header, &mut self.next_change));
        if op.fault != Some(Fault::Lost) {
            segment.sync(self.next_change);
        }
        let directory = |number: SegmentNumber| number.0 >> SEGMENTS_IN_DIRECTORY_BITS;
        self.removed
            .retain(|&number, _| directory(number) != directory(op.segment));
        self.segments.insert(op.segment, segment);
        Ok(0)
    }

    pub(super) fn remove(&mut self, number: SegmentNumber) {
        if let Some(segment) = self.segments.remove(&number) {
            give_back(&mut self.free_bytes, segment.allocated.len());
            self.removed.insert(number, segment);
        }
    }

    fn write(&mut self, op: &InFlight, offset_bytes: u64, data: &[u8]) -> Result<usize, i32> {
        let Some(segment) = self.segments.get_mut(&op.segment) else {
            return Err(libc::ENOENT);
        };
        let mut data = data.to_vec();
        let offset_bytes = match op.fault {
            Some(Fault::Misdirect { offset_bytes }) => offset_bytes,
            _ => offset_bytes,
        };
        match op.fault {
            Some(Fault::FlipBit) => flip_any(&mut data, &mut self.rng),
            Some(Fault::Lost) => return Ok(data.len()),
            _ => {}
        }
        let mut changes = written(offset_bytes, &data, &mut self.next_change);
        if let Some(Fault::Error(errno)) = op.fault {
            changes.retain(|_| self.rng.coin());
            segment.change(changes);
            return Err(errno);
        }
        let sectors: Vec<_> = changes.iter().map(|change| change.sector).collect();
        let fit = allocate(segment, &mut self.free_bytes, &sectors);
        changes.truncate(fit);
        segment.change(changes);
        if fit < sectors.len() {
            return Err(libc::ENOSPC);
        }
        Ok(data.len())
    }

    /// Decides what operations in flight have done when nobody waits for them any more.
    fn resolve(&mut self, mut in_flight: Vec<InFlight>, luck: Luck) {
        while !in_flight.is_empty() {
            let chosen = self.rng.below(in_flight.len() as u64) as usize;
            let op = in_flight.swap_remove(chosen);
            if op.fault == Some(Fault::Lost) {
                continue;
            }
            match &op.op {
                SimOp::Write {
                    offset_bytes, data, ..
                } => {
                    let offset_bytes = match op.fault {
                        Some(Fault::Misdirect { offset_bytes }) => offset_bytes,
                        _ => *offset_bytes,
                    };
                    let changes = written(offset_bytes, data, &mut self.next_change);
                    self.resolve_changes(op.segment, &changes, luck);
                }
                SimOp::Release { ranges } => {
                    let changes = released(ranges, &mut self.next_change);
                    self.resolve_changes(op.segment, &changes, luck);
                }
                SimOp::Create { header } => {
                    if !self.segments.contains_key(&op.segment) && self.rng.chance(luck.keep) {
                        // The entry is there; the header may be as well, in part, or not at all.
                        let mut segment = Segment::default();
                        for change in written(0, header, &mut self.next_change) {
                            let mut seen = Content::default();
                            seen.apply_with(&change, luck, &mut self.rng);
                            let bytes = seen.to_vec();
                            segment.change(written(0, &bytes, &mut self.next_change));
                        }
                        self.segments.insert(op.segment, segment);
                    }
                }
                SimOp::Remove => {
                    if self.rng.chance(luck.keep) {
                        self.remove(op.segment);
                    }
                }
                SimOp::Sync => {
                    if self.rng.chance(luck.keep)
                        && let Some(segment) = self.segments.get_mut(&op.segment)
                    {
                        segment.sync(op.changes);
                    }
                }
                SimOp::Read { .. } | SimOp::Reserve { .. } => {}
            }
        }
    }

    fn resolve_changes(&mut self, number: SegmentNumber, changes: &[Change], luck: Luck) {
        let Some(segment) = self.segments.get_mut(&number) else {
            return;
        };
        for change in changes {
            let mut one = segment.current.only(change.sector);
            one.apply_with(change, luck, &mut self.rng);
            // A torn change cannot be told as one: what it has left of its sector can.
            let start = change.sector * SECTOR_BYTES as u64;
            let len = one.len_bytes().saturating_sub(start);
            let mut bytes = vec![0; len.min(SECTOR_BYTES as u64) as usize];
            one.read(start, &mut bytes);
            segment.change(written(start, &bytes, &mut self.next_change));
        }
    }
}

/// Copies what is written, because memory must not be touched after a crash.
fn copy(op: Op) -> (SimOp, Vec<IoBuf>) {
    match op {
        Op::Read { offset_bytes, bufs } => {
            let len_bytes = bufs.iter().map(IoBuf::len).sum();
            let op = SimOp::Read {
                offset_bytes,
                len_bytes,
            };
            (op, bufs)
        }
        Op::Write {
            offset_bytes,
            bufs,
            direct,
        } => {
            if direct {
                assert_aligned(offset_bytes, &bufs);
            }
            let op = SimOp::Write {
                offset_bytes,
                data: gather(&bufs).into(),
                direct,
            };
            (op, bufs)
        }
        Op::Sync => (SimOp::Sync, Vec::new()),
        Op::Create { header } => {
            let header = Arc::from(&header[..]);
            (SimOp::Create { header }, Vec::new())
        }
        Op::Reserve {
            offset_bytes,
            len_bytes,
        } => {
            let op = SimOp::Reserve {
                offset_bytes,
                len_bytes,
            };
            (op, Vec::new())
        }
        Op::Release { ranges } => (SimOp::Release { ranges }, Vec::new()),
        Op::Remove => (SimOp::Remove, Vec::new()),
    }
}

fn gather(bufs: &[IoBuf]) -> Vec<u8> {
    let mut data = vec![0; bufs.iter().map(IoBuf::len).sum()];
    let mut rest = &mut data[..];
    for buf in bufs {
        let (part, after) = rest.split_at_mut(buf.len());
        buf.copy_to(part);
        rest = after;
    }
    data
}

/// A real disk may take the data at any time before the completion.
fn assert_unchanged(bufs: &[IoBuf], data: &[u8]) {
    assert!(
        gather(bufs) == data,
        "a buffer was changed while it was being written"
    );
}

/// As a real disk would, with EINVAL; here the defect is shown where it is made.
fn assert_aligned(offset_bytes: u64, bufs: &[IoBuf]) {
    let aligned = |value: usize| value.is_multiple_of(BLOCK_BYTES);
    assert!(
        offset_bytes.is_multiple_of(BLOCK_BYTES as u64)
            && bufs
                .iter()
                .all(|buf| aligned(buf.len()) && aligned(buf.ptr() as usize)),
        "a direct write at {offset_bytes} is not aligned to {BLOCK_BYTES} bytes"
    );
}

fn read(
    segment: &Segment,
    offset_bytes: u64,
    op: &InFlight,
    rng: &mut SimRng,
) -> Result<usize, i32> {
    let mut data = vec![0; op.bufs.iter().map(IoBuf::len).sum()];
    let from = match op.fault {
        Some(Fault::Misdirect { offset_bytes }) => offset_bytes,
        _ => offset_bytes,
    };
    let mut count = segment.current.read(from, &mut data);
    match op.fault {
        Some(Fault::Error(errno)) => return Err(errno),
        Some(Fault::FlipBit) => flip_any(&mut data[..count], rng),
        Some(Fault::Lost) => data.fill(0),
        Some(Fault::Misdirect { .. }) => {
            // The place read instead may be nearer to the end; what is missing is stale memory.
            let mut right = vec![0; data.len()];
            count = segment.current.read(offset_bytes, &mut right);
        }
        None => {}
    }
    let mut rest = &data[..count];
    for buf in &op.bufs {
        let (part, after) = rest.split_at(buf.len().min(rest.len()));
        buf.copy_from(part);
        rest = after;
    }
    Ok(count)
}

/// Gives space to sectors in turn; tells how many of them have it before it ran out.
fn allocate(segment: &mut Segment, free_bytes: &mut Option<u64>, sectors: &[u64]) -> usize {
    for (i, &sector) in sectors.iter().enumerate() {
        if segment.allocated.contains(&sector) {
            continue;
        }
        if let Some(free) = free_bytes {
            match free.checked_sub(SECTOR_BYTES as u64) {
                Some(left) => *free = left,
                None => return i,
            }
        }
        segment.allocated.insert(sector);
    }
    sectors.len()
}

fn give_back(free_bytes: &mut Option<u64>, sectors: usize) {
    if let Some(free) = free_bytes {
        *free += (sectors * SECTOR_BYTES) as u64;
    }
}

fn flip_any(data: &mut [u8], rng: &mut SimRng) {
    if !data.is_empty() {
        let bit = rng.below(data.len() as u64 * 8);
        data[(bit / 8) as usize] ^= 1 << (bit % 8);
    }
}
