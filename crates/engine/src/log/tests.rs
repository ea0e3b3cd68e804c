//! A log by itself, on a simulated disk: what it appends, and what recovery says of it after.

use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::io::BlockingIo;
use crate::io::sim::{CrashMode, SimDisk, SimIo};
use crate::segment::{EntryKind, Note, NotedUnmap, RecordSummary, StateParts};
use crate::types::BlockNumber;

const DEVICE: DeviceId = DeviceId(0);
const SEGMENT_BYTES: u64 = 1 << 20;

/// An entry as recovery applied it: its position, what it says, and its note or its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Applied {
    position: Address,
    kind: EntryKind,
    block: u64,
    count: u32,
    /// First byte of each block of data.
    data: Vec<u8>,
    note: Option<Note>,
}

/// A log and what it stands on. Each opening has an epoch of its own.
pub(super) struct Bench {
    disk: SimDisk,
    io: SimIo,
    config: LogConfig,
    numbers: Arc<SegmentNumbers>,
    log: Option<Log>,
    /// What was appended since the log began, with its end in the log's positions of this opening.
    appended: Vec<(Applied, u64)>,
    now: Now,
    done: Vec<Completion>,
    _scratch: TempDir,
}

impl Bench {
    pub(super) fn new(seed: u64) -> Self {
        let scratch = TempDir::new().unwrap();
        let mut bench = Self {
            disk: SimDisk::new(seed),
            io: SimIo::new(seed),
            config: LogConfig {
                device: DEVICE,
                pool: Uuid([1; 16]),
                volume: Uuid([2; 16]),
                epoch: Epoch(1),
                segment_bytes: SEGMENT_BYTES,
                logical_block_bytes: 4096,
                staging_path: PathBuf::from(scratch.path()).join("staging"),
                staging_bytes: MIN_RING_BYTES,
            },
            numbers: Arc::new(SegmentNumbers::new()),
            log: None,
            appended: Vec::new(),
            now: Now::default(),
            done: Vec::new(),
            _scratch: scratch,
        };
        bench.io.add_device(DEVICE, bench.disk.clone());
        bench
            .numbers
            .grant(SegmentNumber(1), SegmentNumber(1000))
            .unwrap();
        bench.open(LogPosition::default());
        bench
    }

    fn open(&mut self, last: LogPosition) {
        let attributes = VolumeAttributes {
            name: "volume".to_owned(),
            size_bytes: 1 << 30,
        };
        let numbers = Arc::clone(&self.numbers);
        self.log = Some(Log::create(self.config.clone(), attributes, numbers, last).unwrap());
    }

    fn log(&mut self) -> &mut Log {
        self.log.as_mut().expect("the log is open")
    }

    fn turn(&mut self) {
        self.now.monotonic_ns += 1000;
        let mut done = std::mem::take(&mut self.done);
        if self.io.in_flight() > 0 {
            self.io.wait(None, &mut done);
        }
        let log = self.log.as_mut().expect("the log is open");
        for completion in done.drain(..) {
            log.on_completion(&mut self.io, completion, self.now);
        }
        log.advance(&mut self.io, self.now);
        self.done = done;
    }

    fn prepare(&mut self, blocks: u32) {
        loop {
            let log = self.log.as_mut().expect("the log is open");
            match log.prepare(&mut self.io, blocks, self.now) {
                Ok(()) => return,
                Err(AppendError::Wait) => self.turn(),
                Err(error) => panic!("the log takes nothing: {error:?}"),
            }
        }
    }

    fn appended(&mut self, applied: Applied) -> Address {
        let position = applied.position;
        let end = self.log().tail();
        self.appended.push((applied, end));
        position
    }

    pub(super) fn data(&mut self, block: u64, count: u32, byte: u8) -> Address {
        self.prepare(count);
        let (now, mut checksums) = (self.now, Vec::new());
        let next = self.log().next_position();
        let first = BlockNumber(block);
        let position = self
            .log()
            .append_data(first, count, now, &mut checksums, |data| data.fill(byte));
        assert_eq!(position, next);
        self.appended(Applied {
            position,
            kind: EntryKind::Data,
            block,
            count,
            data: vec![byte; count as usize],
            note: None,
        })
    }

    pub(super) fn unmap(&mut self, block: u64, count: u32) -> Address {
        self.prepare(0);
        let (now, next) = (self.now, self.log().next_position());
        let position = self.log().append_unmap(BlockNumber(block), count, now);
        assert_eq!(position, next);
        self.appended(Applied {
            position,
            kind: EntryKind::Unmap,
            block,
            count,
            data: Vec::new(),
            note: None,
        })
    }

    pub(super) fn note(&mut self, note: &Note) -> Address {
        let (bytes, count) = (note.encode().unwrap(), note.blocks());
        self.prepare(count);
        let (now, next) = (self.now, self.log().next_position());
        let position = self.log().append_note(&bytes, now);
        assert_eq!(position, next);
        self.appended(Applied {
            position,
            kind: EntryKind::Note,
            block: 0,
            count,
            data: Vec::new(),
            note: Some(note.clone()),
        })
    }

    pub(super) fn flush(&mut self) {
        self.log().request_flush();
        let end = self.log().tail();
        while self.log().durable() < end {
            self.turn();
        }
    }

    /// Closes the open record and has it written, without a sync.
    pub(super) fn write_out(&mut self) {
        let log = self.log.as_mut().expect("the log is open");
        log.checkpoint_position();
        log.write_out(&mut self.io);
    }

    /// The entries that are durable.
    pub(super) fn durable(&mut self) -> usize {
        let durable = self.log().durable();
        self.appended
            .iter()
            .filter(|(_, end)| *end <= durable)
            .count()
    }

    pub(super) fn close(&mut self) {
        let log = self.log.as_mut().expect("the log is open");
        log.start_close(&mut self.io);
        while !self.log().closed() {
            self.turn();
        }
        self.log.take().unwrap().finish().unwrap();
    }

    /// Power loss, or (with `mode` `None`) the process's death.
    pub(super) fn crash(&mut self, mode: Option<CrashMode>, seed: u64) {
        let disk = match mode {
            Some(mode) => self.disk.crash(mode, seed),
            None => self.disk.kill(seed),
        };
        self.io = SimIo::new(seed);
        self.io.add_device(DEVICE, disk.clone());
        self.disk = disk;
        self.log = None;
        if mode.is_some() {
            let _ = std::fs::remove_file(&self.config.staging_path);
        }
    }

    /// Recovers from `checkpoint` on; tells what was applied.
    pub(super) fn recover_from(&mut self, checkpoint: LogPosition) -> (Recovery, Vec<Applied>) {
        let mut applied = Vec::new();
        // A segment that was being made has nothing in it yet; opening a volume removes it.
        let mut segments = self.disk.list();
        segments.retain(|&number| self.disk.identify(number).is_ok());
        let config = self.config.clone();
        let mut io = BlockingIo::new(&mut self.io, DEVICE);
        let input = RecoveryInput {
            config: &config,
            previous_epoch: config.epoch,
            checkpoint,
            segments,
            read_only: false,
            rebuild: false,
        };
        let recovery = recover(
            &mut io,
            &input,
            &mut |io, segment, record: &RecordSummary| {
                for placed in record.placed(segment) {
                    applied.push(read_entry(io, &placed)?);
                }
                Ok(())
            },
        )
        .unwrap();
        (recovery, applied)
    }

    pub(super) fn recover(&mut self) -> (Recovery, Vec<Applied>) {
        self.recover_from(LogPosition::default())
    }

    pub(super) fn expected(&self) -> Vec<Applied> {
        self.appended
            .iter()
            .map(|(applied, _)| applied.clone())
            .collect()
    }

    /// Goes on in a new epoch where recovery has ended.
    pub(super) fn reopen(&mut self, recovery: &Recovery, applied: Vec<Applied>) {
        self.config.epoch = self.config.epoch.plus(1);
        self.open(recovery.end);
        self.appended = applied.into_iter().map(|applied| (applied, 0)).collect();
    }
}

fn read_entry(
    io: &mut BlockingIo<'_>,
    placed: &crate::segment::PlacedEntry<'_>,
) -> Result<Applied, String> {
    let (entry, position) = (placed.entry, placed.position);
    let mut data = Vec::new();
    let mut note = None;
    match entry.kind {
        EntryKind::Data => {
            let len = entry.count as usize * BLOCK_BYTES;
            let (bytes, got) = io
                .read(position.segment(), position.byte_offset(), len)
                .map_err(|error| error.to_string())?;
            assert_eq!(got, len);
            data.extend(bytes.chunks_exact(BLOCK_BYTES).map(|block| block[0]));
        }
        EntryKind::Note => {
            let found = read_note(io, position, placed.checksums);
            note = Some(found.map_err(|error| error.to_string())?);
        }
        EntryKind::Unmap => {}
    }
    Ok(Applied {
        position,
        kind: entry.kind,
        block: entry.block.0,
        count: entry.count,
        data,
        note,
    })
}

fn snapshot(name: &str) -> Note {
    Note::Snapshot {
        snapshot: Uuid([name.len() as u8; 16]),
        created_ns: 1,
        size_bytes: 1 << 30,
        name: name.to_owned(),
    }
}

fn unmaps(count: u64) -> Note {
    Note::Unmaps(
        (0..count)
            .map(|i| NotedUnmap {
                block: BlockNumber(i),
                count: 1,
                position: Address::new(SegmentNumber(1), 2),
            })
            .collect(),
    )
}

/// Appends something of each kind, over several segments.
fn append_some(bench: &mut Bench, rng: &mut crate::io::sim::SimRng, count: u64) {
    for i in 0..count {
        let block = rng.below(1 << 20);
        match rng.below(6) {
            0 => drop(bench.unmap(block, 1 + rng.below(1000) as u32)),
            1 => drop(bench.note(&snapshot(&format!("snapshot {i}")))),
            2 => drop(bench.note(&unmaps(rng.below(1500)))),
            _ => drop(bench.data(block, 1 + rng.below(40) as u32, i as u8)),
        }
        if rng.below(4) == 0 {
            bench.turn();
        }
        if rng.below(10) == 0 {
            bench.flush();
        }
    }
}

#[test]
fn notes_stand_in_the_log_where_they_were_appended() {
    for sealed in [false, true] {
        let mut bench = Bench::new(1);
        bench.data(5, 3, 1);
        bench.note(&snapshot("one"));
        bench.unmap(5, 2);
        let positions: Vec<_> = bench
            .expected()
            .iter()
            .map(|a| a.position.block())
            .collect();
        assert_eq!(positions, [2, 5, 6]);
        bench.data(5, 1, 2);
        let state = vec![b'x'; 70 * BLOCK_BYTES];
        for note in Note::state(&state).unwrap() {
            bench.note(&note);
        }
        bench.note(&unmaps(crate::segment::MAX_NOTE_UNMAPS as u64));
        if sealed {
            bench.close();
        } else {
            bench.flush();
            bench.crash(Some(CrashMode::LoseUnsynced), 2);
        }
        let (recovery, applied) = bench.recover();
        assert_eq!(recovery.warnings, Vec::<String>::new());
        assert_eq!(applied, bench.expected());
        assert!(applied.iter().is_sorted_by_key(|applied| applied.position));
        let mut parts = StateParts::default();
        let whole: Vec<_> = applied
            .iter()
            .filter_map(|applied| match &applied.note {
                Some(Note::State {
                    part,
                    more,
                    payload,
                }) => parts.push(applied.position, *part, *more, payload),
                _ => None,
            })
            .collect();
        assert_eq!(whole, [(applied[4].position, state)]);
    }
}

#[test]
fn every_crash_keeps_notes_and_data_as_one_prefix() {
    for seed in 1..60 {
        let mut rng = crate::io::sim::SimRng::new(seed);
        let mut bench = Bench::new(seed);
        for life in 0..3 {
            let count = rng.below(80);
            append_some(&mut bench, &mut rng, count);
            let durable = bench.durable();
            let power_loss = rng.coin();
            let least = if power_loss {
                durable
            } else {
                bench.appended.len()
            };
            let mode = match rng.below(4) {
                0 => CrashMode::LoseUnsynced,
                1 => CrashMode::KeepAll,
                _ => CrashMode::Random,
            };
            bench.crash(power_loss.then_some(mode), seed ^ life);
            let (recovery, applied) = bench.recover();
            assert_eq!(recovery.warnings, Vec::<String>::new(), "seed {seed}");
            assert!(applied.len() >= least, "seed {seed}, life {life}");
            assert_eq!(
                applied,
                bench.expected()[..applied.len()],
                "seed {seed}, life {life}"
            );
            bench.reopen(&recovery, applied);
        }
    }
}

#[test]
fn a_damaged_note_is_reported_and_ends_no_sealed_segment() {
    let mut bench = Bench::new(1);
    let position = bench.note(&snapshot("one"));
    bench.data(1, 1, 1);
    bench.close();
    bench
        .disk
        .flip_bit(position.segment(), position.byte_offset() + 60, 3);
    let mut errors = Vec::new();
    let config = bench.config.clone();
    let segments = bench.disk.list();
    let mut io = BlockingIo::new(&mut bench.io, DEVICE);
    let input = RecoveryInput {
        config: &config,
        previous_epoch: config.epoch,
        checkpoint: LogPosition::default(),
        segments,
        read_only: false,
        rebuild: false,
    };
    let recovery = recover(&mut io, &input, &mut |io, segment, record| {
        for placed in record.placed(segment) {
            if let Err(error) = read_entry(io, &placed) {
                errors.push(error);
            }
        }
        Ok(())
    });
    assert_eq!(recovery.unwrap().records, 1);
    assert_eq!(errors.len(), 1);
    assert!(
        errors[0].contains("does not") || errors[0].contains("do not match"),
        "{errors:?}"
    );
}

/// Bytes of a block are overwritten on the medium.
fn spoil(bench: &Bench, segment: SegmentNumber, block: u32) {
    for byte in [0, 60, 1000, 4095] {
        let at = u64::from(block) * BLOCK + byte;
        assert!(bench.disk.flip_bit(segment, at, 5));
    }
}

/// A log of 8 records of two blocks each, each flushed, and one that no flush has covered.
fn flushed_records() -> (Bench, Vec<Address>) {
    let mut bench = Bench::new(1);
    let mut positions = Vec::new();
    for i in 0..9 {
        positions.push(bench.data(i * 10, 2, 1 + i as u8));
        if i < 8 {
            bench.flush();
        }
    }
    bench.write_out();
    while bench.log().staged_bytes() > 0 {
        bench.turn();
    }
    (bench, positions)
}

#[test]
fn a_durable_record_whose_data_is_damaged_is_applied_and_reported() {
    let (mut bench, positions) = flushed_records();
    bench.crash(Some(CrashMode::KeepAll), 1);
    spoil(&bench, positions[3].segment(), positions[3].block() + 1);
    let (recovery, applied) = bench.recover();
    assert_eq!(applied.len(), 9);
    assert_eq!(recovery.warnings.len(), 1, "{:?}", recovery.warnings);
    let said = "segment 1 is damaged: 1 of blocks 11 to 12 do not match";
    assert!(
        recovery.warnings[0].contains(said),
        "{:?}",
        recovery.warnings
    );
    assert!(recovery.segments[0].sealed);
    // The footer that it got lists all of them, and says the same ever after.
    let (again, same) = bench.recover();
    assert_eq!((again.end, same), (recovery.end, applied));
    assert!(again.warnings.is_empty());
}

#[test]
fn a_damaged_record_header_costs_its_record_and_not_those_behind_it() {
    let (mut bench, positions) = flushed_records();
    let mut expected = bench.expected();
    bench.crash(Some(CrashMode::KeepAll), 1);
    spoil(&bench, positions[3].segment(), positions[3].block() - 1);
    expected.remove(3);
    let (recovery, applied) = bench.recover();
    assert_eq!(applied, expected);
    assert_eq!(recovery.warnings.len(), 1, "{:?}", recovery.warnings);
    let said = "segment 1 is damaged in blocks 10 to 12: of records 4 to 4";
    assert!(
        recovery.warnings[0].contains(said),
        "{:?}",
        recovery.warnings
    );
    assert!(recovery.segments[0].sealed);
    let (again, same) = bench.recover();
    assert_eq!((again.end, same), (recovery.end, expected));
    assert!(again.warnings.is_empty());
}

#[test]
fn a_record_that_was_not_durable_and_is_not_valid_is_the_end() {
    let (mut bench, positions) = flushed_records();
    let expected = bench.expected();
    bench.crash(Some(CrashMode::KeepAll), 1);
    // Its header says that the eighth was durable; nobody says so of the ninth.
    spoil(&bench, positions[8].segment(), positions[8].block());
    let (recovery, applied) = bench.recover();
    assert_eq!(applied, expected[..8]);
    assert_eq!(recovery.warnings, Vec::<String>::new());
}

#[test]
fn records_that_a_crash_cut_off_stay_away_whatever_later_epochs_say() {
    let mut cut = 0;
    for seed in 1..60 {
        let mut bench = Bench::new(seed);
        bench.data(0, 1, 1);
        bench.flush();
        // Records in flight: a later one may survive without an earlier one.
        for i in 0..6 {
            bench.data(10 + i, 1, 10 + i as u8);
            bench.write_out();
        }
        bench.crash(Some(CrashMode::Random), seed);
        let (recovery, applied) = bench.recover();
        let warnings = &recovery.warnings;
        assert!(warnings.is_empty(), "seed {seed}: {warnings:?}");
        cut += usize::from(applied.len() < 6);
        bench.reopen(&recovery, applied);
        for i in 0..8 {
            bench.data(20 + i, 1, 20 + i as u8);
            bench.flush();
        }
        let expected = bench.expected();
        bench.crash(Some(CrashMode::KeepAll), seed);
        // The trailer of the first epoch's segment is damaged.
        let trailer = SEGMENT_BYTES - BLOCK;
        assert!(bench.disk.flip_bit(SegmentNumber(1), trailer + 9, 1));
        let (recovery, applied) = bench.recover();
        assert_eq!(applied, expected, "seed {seed}: {:?}", recovery.warnings);
    }
    assert!(cut > 10, "crashes cut off something in {cut} of 60 runs");
}

#[test]
fn covered_records_are_known_by_their_headers_when_footer_and_data_are_gone() {
    let mut bench = Bench::new(1);
    let first = bench.data(1, 8, 1);
    bench.flush();
    bench.data(20, 8, 2);
    bench.close();
    let expected = bench.expected();
    let segment = first.segment();
    assert!(bench.disk.flip_bit(segment, SEGMENT_BYTES - BLOCK + 9, 1));
    let config = bench.config.clone();
    let mut io = BlockingIo::new(&mut bench.io, DEVICE);
    let hole = first.byte_offset()..first.byte_offset() + 8 * BLOCK;
    io.run(segment, Op::release(hole)).unwrap();
    let found = read_summaries(&mut io, &config, segment).unwrap();
    let placed: Vec<_> = found
        .records
        .iter()
        .flat_map(|record| record.placed(segment).map(|placed| placed.position))
        .collect();
    let positions: Vec<_> = expected.iter().map(|a| a.position).collect();
    assert_eq!(placed, positions);
    let last = found.records.last().unwrap();
    let checkpoint = LogPosition {
        segment,
        end_blocks: last.end_blocks(),
        sequence: last.sequence,
        record_checksum: last.header_checksum,
    };
    let (recovery, applied) = bench.recover_from(checkpoint);
    assert_eq!(applied, []);
    assert_eq!(recovery.end, checkpoint);
    assert!(recovery.warnings.is_empty(), "{:?}", recovery.warnings);
    // It has a footer again.
    let mut io = BlockingIo::new(&mut bench.io, DEVICE);
    let again = read_summaries(&mut io, &config, segment).unwrap();
    assert!(again.sealed);
    assert_eq!(again.records, found.records);
}
