//! Every crash in every short sequence of operations on a small volume with tiny segments.
//!
//! A sequence runs on the simulated disk, one completion at a time. Before each completion, the disk is
//! as some prefix of its operations left it; what no sync has covered there, and what is in flight, a
//! loss of power may have left done or not, item by item (blocks of writes, creations, removals,
//! releases), and the death of the daemon only what is in flight. Each such disk, up to a bound a point,
//! is opened and must hold what `common::history` says. Crashes inside of recovery are among them,
//! since sequences open the volume again.
//!
//! The crash points of a sequence's beginning are those of a shorter sequence, so only its last
//! operation is looked at. All sequences of up to three are tried on an empty volume, and of up to two on
//! some that have a past. `VHOSTD_ENUMERATE=long` tries more subsets a point, and one action more;
//! `VHOSTD_SEQUENCE=…` runs one, by the letters that a failure prints.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod common;

use std::cell::RefCell;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::history::{History, State, stamp_of, stamped};
use common::oracle::{check_space, read_root};
use common::{Catalog, Harness, Rng, SECTOR, Setup};
use vhostd_engine::io::sim::{SimDisk, SimIo, Undecided};
use vhostd_engine::io::{Completion, DeviceId, Io, Op, Target, Token};
use vhostd_engine::types::Uuid;

const BLOCKS: u64 = 16;
const VOLUME_BYTES: u64 = BLOCKS * 4096;
const SECTORS: usize = (VOLUME_BYTES / SECTOR) as usize;
/// Header, a few records, footer: a sequence of three fills and seals some.
const SEGMENT_BYTES: u64 = 64 << 10;
const PIECE_BLOCKS: u64 = SEGMENT_BYTES / 4 / 4096;

/// What sequences are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// Five blocks: two records.
    Write,
    /// Sectors of two blocks, both in part.
    WritePart,
    Discard,
    /// Sectors of three blocks, two of them in part.
    WriteZeroes,
    Flush,
    Checkpoint,
    /// A clean close, and recovery.
    Reopen,
    /// The daemon dies, and the next one recovers.
    Die,
    Snapshot,
    /// Removes the oldest snapshot, and frees its space.
    Remove,
    /// Goes back to the newest snapshot, which takes a clean close.
    RollBack,
}

impl Action {
    const ALL: [(char, Self); 11] = [
        ('w', Self::Write),
        ('p', Self::WritePart),
        ('d', Self::Discard),
        ('z', Self::WriteZeroes),
        ('f', Self::Flush),
        ('c', Self::Checkpoint),
        ('o', Self::Reopen),
        ('k', Self::Die),
        ('s', Self::Snapshot),
        ('x', Self::Remove),
        ('r', Self::RollBack),
    ];

    fn letter(self) -> char {
        let found = Self::ALL.iter().find(|(_, action)| *action == self);
        found.map_or('?', |(letter, _)| *letter)
    }

    fn parse(letters: &str) -> Vec<Self> {
        letters
            .chars()
            .filter_map(|c| Self::ALL.iter().find(|(letter, _)| *letter == c))
            .map(|(_, action)| *action)
            .collect()
    }
}

/// Where two more actions are tried from: volumes that have a past.
const BASES: [&str; 4] = ["wsx", "wcsw", "wswr", "wspsr"];

fn spell(actions: &[Action]) -> String {
    actions.iter().map(|action| action.letter()).collect()
}

/// How much is tried.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Subsets of what is undecided at a point: all of them if they are not more.
    power_losses: usize,
    deaths: usize,
    /// One recovered volume in so many is crashed again, and goes on.
    again_every: u64,
}

impl Bounds {
    const SHORT: Self = Self {
        power_losses: 8,
        deaths: 2,
        again_every: 8,
    };
    const LONG: Self = Self {
        power_losses: 256,
        deaths: 16,
        again_every: 1,
    };
}

/// Which of `items` are done, for each case to be tried: all subsets, or if they are too many none, all,
/// each prefix, all but one, one alone, and random ones up to the bound.
fn subsets(count: usize, most: usize, rng: &mut Rng) -> Vec<Vec<bool>> {
    if count < usize::BITS as usize - 1 && 1 << count <= most {
        let all = 0..1_usize << count;
        return all
            .map(|bits| (0..count).map(|i| bits >> i & 1 == 1).collect())
            .collect();
    }
    let mut chosen = vec![vec![false; count], vec![true; count]];
    let mut some: Vec<Vec<bool>> = Vec::new();
    for i in 0..count {
        some.push((0..count).map(|j| j < i).collect());
        some.push((0..count).map(|j| j != i).collect());
        some.push((0..count).map(|j| j == i).collect());
    }
    while chosen.len() < most && !some.is_empty() {
        let at = rng.below(some.len() as u64) as usize;
        chosen.push(some.swap_remove(at));
    }
    while chosen.len() < most {
        chosen.push((0..count).map(|_| rng.chance(2)).collect());
    }
    chosen
}

/// Tries the crashes at each moment that it is shown.
struct Explorer {
    disk: SimDisk,
    setup: Setup,
    catalog: Arc<Mutex<Catalog>>,
    history: History,
    /// Off while the beginning of a sequence runs.
    on: bool,
    bounds: Bounds,
    rng: Rng,
    seen: HashSet<u64>,
    cases: u64,
    points: u64,
    what: String,
}

impl Explorer {
    fn look(&mut self) {
        if !self.on {
            return;
        }
        let catalog = self.catalog.lock().unwrap().clone();
        let version = (catalog.epoch.0, catalog.commits);
        let snapshots = self
            .history
            .taken
            .iter()
            .filter(|taken| taken.promised)
            .count();
        let items = self.disk.undecided();
        let promised = (self.history.flushed, snapshots, &items, version);
        if self.seen.insert(hash(&(0, promised))) {
            self.points += 1;
            for chosen in subsets(items.len(), self.bounds.power_losses, &mut self.rng) {
                let after = self.disk.crash_with(&chooser(&items, &chosen));
                let least = self.history.flushed;
                self.try_one(after, &catalog, least, None, &chosen);
            }
        }
        let changes = (
            self.history.acknowledged,
            snapshots,
            self.history.changes.len(),
        );
        if self.seen.insert(hash(&(1, changes, &items, version))) {
            self.points += 1;
            let staged = std::fs::read(&self.setup.staging_path).ok();
            let items = self.disk.in_flight_parts();
            for chosen in subsets(items.len(), self.bounds.deaths, &mut self.rng) {
                let after = self.disk.kill_with(&chooser(&items, &chosen));
                let least = self.history.acknowledged;
                self.try_one(after, &catalog, least, staged.as_deref(), &chosen);
            }
        }
    }

    /// Opens what a crash has left.
    fn try_one(
        &mut self,
        after: SimDisk,
        catalog: &Catalog,
        least: usize,
        staged: Option<&[u8]>,
        chosen: &[bool],
    ) {
        self.cases += 1;
        let again = self.cases.is_multiple_of(self.bounds.again_every);
        let result = self.open_and_check(after, catalog, least, staged, again);
        if let Err(what) = result {
            let how = if staged.is_some() {
                "death"
            } else {
                "power loss"
            };
            panic!(
                "{}: crash {} ({how}, done: {chosen:?}): {what}",
                self.what, self.cases
            );
        }
    }

    fn open_and_check(
        &mut self,
        disk: SimDisk,
        catalog: &Catalog,
        least: usize,
        staged: Option<&[u8]>,
        again: bool,
    ) -> Result<(), String> {
        let mut setup = self.setup.clone();
        setup.mirror = None;
        setup.staging_path.set_extension("after");
        match staged {
            Some(bytes) => std::fs::write(&setup.staging_path, bytes).unwrap(),
            None => drop(std::fs::remove_file(&setup.staging_path)),
        }
        let first = recovered(&disk, &setup, catalog.clone(), None, again)?;
        self.history.check(&first.head, least, &first.snapshots)?;
        if !again {
            return Ok(());
        }
        // Recovery has decided for good: what it saw is what is seen after a loss of power right behind
        // it, and what is written and flushed then is kept.
        let disk = disk.crash_with(&|_| false);
        let _ = std::fs::remove_file(&setup.staging_path);
        let next = stamped(0, 8, 999);
        let second = recovered(&disk, &setup, first.catalog, Some(&next), false)?;
        if (&second.head, &second.snapshots) != (&first.head, &first.snapshots) {
            return Err("a second recovery found something else".into());
        }
        let disk = disk.crash_with(&|_| false);
        let _ = std::fs::remove_file(&setup.staging_path);
        let mut last = recovered(&disk, &setup, second.catalog, None, true)?;
        let written = last.head.splice(..8, first.head[..8].iter().copied());
        if written.collect::<Vec<_>>() != [999; 8]
            || (last.head, last.snapshots) != (first.head, first.snapshots)
        {
            return Err("a write flushed after recovery was lost, or did harm".into());
        }
        Ok(())
    }
}

fn chooser(items: &[Undecided], chosen: &[bool]) -> impl Fn(Undecided) -> bool {
    let done: HashSet<Undecided> = items
        .iter()
        .zip(chosen)
        .filter(|(_, chosen)| **chosen)
        .map(|(item, _)| *item)
        .collect();
    move |item| done.contains(&item)
}

fn hash(what: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

/// A volume as recovery left it.
struct Recovered {
    head: State,
    snapshots: Vec<(Uuid, State)>,
    catalog: Catalog,
}

/// Opens the volume, reads all of it and of its snapshots, perhaps writes and flushes a block, and leaves
/// it as a crash would. With `tidy` it makes a checkpoint and ends removals of snapshots, and all counts
/// must be exact after each.
fn recovered(
    disk: &SimDisk,
    setup: &Setup,
    catalog: Catalog,
    write: Option<&[u8]>,
    tidy: bool,
) -> Result<Recovered, String> {
    let mut io = SimIo::new(1);
    io.add_device(DeviceId(0), disk.clone());
    let mut harness = Harness::open(&mut io, setup, catalog, &disk.list())
        .map_err(|error| format!("recovery: {error}"))?;
    if !harness.recovery.warnings.is_empty() {
        return Err(format!("recovery: {:?}", harness.recovery.warnings));
    }
    let head = read_state(&mut harness)?;
    let failed = |error| format!("a checkpoint after recovery: {error}");
    if tidy || harness.catalog.readable().any(|row| row.root.is_none()) {
        harness.checkpoint().map_err(failed)?;
        check_space(disk, &harness.catalog)?;
    }
    let mut walk = SimIo::new(2);
    walk.add_device(DeviceId(0), disk.clone());
    while tidy && harness.release_next(&mut walk).map_err(failed)? {
        check_space(disk, &harness.catalog)?;
    }
    let mut snapshots = Vec::new();
    for row in harness.catalog.readable() {
        let root = row.root.expect("a checkpoint gave it one");
        let contents = read_root(
            disk,
            setup,
            root,
            row.mapped_blocks,
            row.size_bytes,
            std::slice::from_ref(&(0..BLOCKS)),
        )?;
        snapshots.push((row.uuid, contents));
    }
    if let Some(bytes) = write {
        let done = harness.write(0, bytes).and_then(|()| harness.flush());
        done.map_err(|why| format!("a write after recovery failed: {why:?}"))?;
    }
    let catalog = harness.catalog.clone();
    let volume = harness.volume;
    drop(io);
    drop(volume);
    Ok(Recovered {
        head,
        snapshots,
        catalog,
    })
}

fn read_state(harness: &mut Harness<'_>) -> Result<State, String> {
    let bytes = harness
        .read(0, VOLUME_BYTES as usize)
        .map_err(|why| format!("reading: {why:?}"))?;
    let sectors = bytes.chunks_exact(SECTOR as usize).enumerate();
    sectors
        .map(|(i, bytes)| stamp_of(i as u64, bytes).ok_or(format!("sector {i} is torn")))
        .collect()
}

/// Shows each state of the disk to the explorer before it changes.
struct Watched {
    io: SimIo,
    explorer: Rc<RefCell<Explorer>>,
}

impl Watched {
    fn new(seed: u64, disk: SimDisk, explorer: Rc<RefCell<Explorer>>) -> Self {
        let mut io = SimIo::new(seed);
        io.complete_one_at_a_time();
        io.add_device(DeviceId(0), disk);
        Self { io, explorer }
    }
}

impl Io for Watched {
    fn submit(&mut self, token: Token, target: Target, op: Op) {
        self.io.submit(token, target, op);
    }

    fn poll(&mut self, out: &mut Vec<Completion>) {
        self.explorer.borrow_mut().look();
        self.io.poll(out);
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completion>) {
        self.explorer.borrow_mut().look();
        self.io.wait(timeout, out);
    }

    fn in_flight(&self) -> usize {
        self.io.in_flight()
    }
}

/// Runs one sequence, and tries the crashes in its last action.
struct Run<'a> {
    actions: &'a [Action],
    next: usize,
    stamp: u64,
    explorer: Rc<RefCell<Explorer>>,
}

impl Run<'_> {
    fn all(mut self) -> (u64, u64) {
        let mut disk = self.explorer.borrow().disk.clone();
        let mut life = 0;
        let mut catalog = Catalog::new(VOLUME_BYTES);
        loop {
            life += 1;
            self.explorer.borrow_mut().disk = disk.clone();
            let setup = self.explorer.borrow().setup.clone();
            let mut io = Watched::new(life, disk.clone(), Rc::clone(&self.explorer));
            let mut harness = Harness::open(&mut io, &setup, catalog, &disk.list()).unwrap();
            let Some(end) = self.live(&mut harness) else {
                let volume = harness.volume;
                drop(io);
                drop(volume);
                break;
            };
            if end != Action::Die {
                catalog = harness.close().unwrap();
                let mut explorer = self.explorer.borrow_mut();
                // Closing has flushed.
                explorer.history.flushed = explorer.history.changes.len();
                if end == Action::RollBack {
                    roll_back(&mut explorer.history, &mut catalog);
                    explorer.catalog.lock().unwrap().clone_from(&catalog);
                }
            } else {
                catalog = harness.catalog.clone();
                let volume = harness.volume;
                disk = disk.kill(life);
                drop(io);
                drop(volume);
            }
        }
        let explorer = self.explorer.borrow();
        let _ = std::fs::remove_file(&explorer.setup.staging_path);
        (explorer.cases, explorer.points)
    }

    /// Until the volume has to be opened again, or (`None`) the sequence is over.
    fn live(&mut self, harness: &mut Harness<'_>) -> Option<Action> {
        while self.next < self.actions.len() {
            let action = self.actions[self.next];
            self.next += 1;
            self.explorer.borrow_mut().on = self.next == self.actions.len();
            match action {
                Action::Reopen | Action::Die | Action::RollBack => return Some(action),
                _ => self.act(harness, action),
            }
            self.explorer.borrow_mut().look();
        }
        None
    }

    fn act(&mut self, harness: &mut Harness<'_>, action: Action) {
        self.stamp += 1;
        let stamp = self.stamp;
        // Later actions overwrite a part of what earlier ones wrote.
        let shift = (stamp - 1) % 3 * 8;
        match action {
            Action::Write => self.write(harness, shift, shift + 40, stamp),
            Action::WritePart => self.write(harness, shift + 13, shift + 19, stamp),
            Action::Discard => self.unmap(harness, shift + 8, shift + 24, false),
            Action::WriteZeroes => self.unmap(harness, shift + 4, shift + 20, true),
            Action::Flush => {
                let covered = self.explorer.borrow().history.acknowledged;
                harness.flush().unwrap();
                self.explorer.borrow_mut().history.flushed = covered;
            }
            Action::Checkpoint => drop(harness.checkpoint().unwrap()),
            Action::Snapshot => {
                let uuid = Uuid([stamp as u8; 16]);
                self.explorer.borrow_mut().history.take(uuid);
                harness.snapshot(uuid).unwrap();
                self.explorer.borrow_mut().history.promise(uuid);
            }
            Action::Remove => self.remove(harness),
            Action::Reopen | Action::Die | Action::RollBack => {
                unreachable!("ends the volume's life")
            }
        }
    }

    fn remove(&mut self, harness: &mut Harness<'_>) {
        let Some(uuid) = harness.catalog.readable().next().map(|row| row.uuid) else {
            return;
        };
        harness.catalog.begin_removal(uuid);
        self.explorer.borrow_mut().history.forget(uuid);
        harness.publish();
        let mut walk = SimIo::new(3);
        let disk = self.explorer.borrow().disk.clone();
        walk.add_device(DeviceId(0), disk);
        while harness.release_next(&mut walk).unwrap() {}
    }

    fn write(&mut self, harness: &mut Harness<'_>, from: u64, to: u64, stamp: u64) {
        let history = |run: &Self| run.explorer.clone();
        let add = |e: &mut Explorer| e.history.write(from, to, stamp, PIECE_BLOCKS);
        add(&mut history(self).borrow_mut());
        harness
            .write(from * SECTOR, &stamped(from, to, stamp))
            .unwrap();
        self.acknowledge();
    }

    fn unmap(&mut self, harness: &mut Harness<'_>, from: u64, to: u64, exact: bool) {
        self.explorer.borrow_mut().history.unmap(from, to, exact);
        let (offset, len) = (from * SECTOR, (to - from) * SECTOR);
        harness.unmap(offset, len, exact).unwrap();
        self.acknowledge();
    }

    fn acknowledge(&mut self) {
        let history = &mut self.explorer.borrow_mut().history;
        history.acknowledged = history.changes.len();
    }
}

/// Goes back to the newest snapshot, if there is one, in model and catalog.
fn roll_back(history: &mut History, catalog: &mut Catalog) {
    let Some(to) = catalog.readable().last().map(|row| row.uuid) else {
        return;
    };
    let mut snapshots: Vec<(Uuid, State)> = history.settled.clone().into_iter().collect();
    for taken in &history.taken {
        // Requests come one after the other here: it holds these changes exactly.
        assert_eq!(taken.earliest, taken.latest);
        snapshots.push((taken.uuid, history.after(taken.earliest)));
    }
    let found = snapshots.iter().find(|(uuid, _)| *uuid == to);
    let base = found.expect("the model has it").1.clone();
    history.settle(base, snapshots);
    catalog.roll_back(to, Uuid([100 + catalog.commits as u8; 16]));
}

fn explore(actions: &[Action], bounds: Bounds, scratch: &Path) -> (u64, u64) {
    let catalog = Arc::new(Mutex::new(Catalog::new(VOLUME_BYTES)));
    let mut setup = Setup::small(scratch.join("staging"));
    setup.size_bytes = VOLUME_BYTES;
    setup.segment_bytes = SEGMENT_BYTES;
    setup.checkpoint_log_bytes = u64::MAX;
    setup.mirror = Some(Arc::clone(&catalog));
    let what = format!("VHOSTD_SEQUENCE={}", spell(actions));
    let explorer = Explorer {
        disk: SimDisk::new(1),
        setup,
        catalog,
        history: History::new(vec![0; SECTORS]),
        on: false,
        bounds,
        rng: Rng::new(hash(&what)),
        seen: HashSet::new(),
        cases: 0,
        points: 0,
        what,
    };
    let run = Run {
        actions,
        next: 0,
        stamp: 0,
        explorer: Rc::new(RefCell::new(explorer)),
    };
    run.all()
}

/// All sequences of `length` actions.
fn sequences(length: u32) -> impl Iterator<Item = Vec<Action>> {
    let count = Action::ALL.len();
    (0..count.pow(length)).map(move |mut number| {
        (0..length)
            .map(|_| {
                let action = Action::ALL[number % count].1;
                number /= count;
                action
            })
            .collect()
    })
}

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        // Memory, where there is some: the staging files are on tmpfs in production as well.
        let base = Path::new("/dev/shm");
        let temporary = std::env::temp_dir();
        let base = if base.is_dir() { base } else { &temporary };
        let path = base.join(format!("vhostd-enumerate-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_crash_of_every_short_sequence_leaves_a_prefix_with_all_that_was_promised() {
    let scratch = Scratch::new();
    let long = std::env::var("VHOSTD_ENUMERATE").is_ok_and(|mode| mode == "long");
    let bounds = if long { Bounds::LONG } else { Bounds::SHORT };
    let one = std::env::var("VHOSTD_SEQUENCE").ok();
    let (mut sequence_count, mut cases, mut points) = (0_u64, 0, 0);
    let mut run = |actions: &[Action]| {
        let done = explore(actions, bounds, &scratch.0);
        sequence_count += 1;
        cases += done.0;
        points += done.1;
    };
    match one {
        Some(letters) => run(&Action::parse(&letters)),
        None => {
            for length in 1..=if long { 4 } else { 3 } {
                sequences(length).for_each(|actions| run(&actions));
            }
            for base in BASES.map(Action::parse) {
                for actions in sequences(1).chain(sequences(2)) {
                    run(&[base.clone(), actions].concat());
                }
            }
        }
    }
    println!("{sequence_count} sequences, {points} points, {cases} crashes");
}
