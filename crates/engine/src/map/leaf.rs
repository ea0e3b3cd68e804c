//! A leaf of the map: up to 1024 consecutive blocks, each unmapped or mapped to address + CRC-32C.
//!
//! A leaf is one buffer of bytes whose used part is laid out exactly as on disk (docs/format.md,
//! "Map node"), so that writing a node is a copy and reading one is a check and a copy. Three
//! forms, chosen by size:
//!
//! - *sparse*: one row a mapped block; random writes into an empty volume;
//! - *runs*: one row a run of blocks whose addresses follow each other; sequential writes;
//! - *dense*: one row a block of the leaf; a volume overwritten at random.
//!
//! Addresses are kept as differences from the leaf's `base`, in 4 bytes while the oldest and the
//! newest block of the leaf lie within 16 TiB of log, else in 6 or 8.
//!
//! Invariants: rows ascend and do not overlap; a run never leaves its segment; `mapped` counts the
//! mapped blocks; a dense row without a mapping holds all ones and checksum 0. Single-threaded.

/// Blocks a leaf covers.
pub(super) const LEAF_BLOCKS: u32 = 1 << LEAF_BITS;
pub(super) const LEAF_BITS: u32 = 10;
/// A set of at most this many rows is spliced into a table; more are better re-encoded.
const MAX_SPLICE_ROWS: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Form {
    Sparse = 1,
    Runs = 2,
    Dense = 3,
}

#[derive(Clone, Debug)]
pub(super) struct Leaf {
    buf: Box<[u8]>,
    base: u64,
    mapped: u16,
    rows: u16,
    form: Form,
    width: u8,
}

/// Mapped blocks of a leaf with consecutive addresses.
pub(super) struct Piece<'a> {
    /// First block, counted from the start of the leaf.
    pub start: u32,
    pub address: u64,
    /// Little-endian checksums; their number is the length of the piece.
    pub crcs: &'a [[u8; 4]],
}

impl Piece<'_> {
    pub fn len(&self) -> u32 {
        self.crcs.len() as u32
    }
}

#[derive(Clone, Copy)]
struct Run {
    start: u32,
    len: u32,
    address: u64,
}

#[derive(Clone, Copy, Default)]
struct Row {
    start: u32,
    delta: u64,
    rank: u32,
}

/// Replaces checksums `crc_from..crc_to` and rows `row_from..row_to` of a table.
struct Splice {
    crc_from: usize,
    crc_to: usize,
    row_from: usize,
    row_to: usize,
    rows: [Row; MAX_SPLICE_ROWS],
    row_count: usize,
}

impl Splice {
    fn push(&mut self, start: u32, delta: u64, rank: usize) {
        self.rows[self.row_count] = Row {
            start,
            delta,
            rank: rank as u32,
        };
        self.row_count += 1;
    }
}

/// Byte offsets of the tables in the buffer.
struct Layout {
    deltas: usize,
    starts: usize,
    ranks: usize,
    end: usize,
}

fn layout(form: Form, width: usize, mapped: usize, rows: usize) -> Layout {
    let (crcs, starts_len, ranks_len) = match form {
        Form::Sparse => (mapped, 2 * rows, 0),
        Form::Runs => (mapped, 2 * rows, 2 * rows),
        Form::Dense => (rows, 0, 0),
    };
    let deltas = 4 * crcs;
    let starts = deltas + width * rows;
    let ranks = starts + starts_len;
    Layout {
        deltas,
        starts,
        ranks,
        end: ranks + ranks_len,
    }
}

/// Differences below this can be kept in `width` bytes; all ones means "not mapped".
const fn delta_limit(width: usize) -> u64 {
    u64::MAX >> (64 - 8 * width)
}

fn width_for(span: u64) -> usize {
    [4, 6]
        .into_iter()
        .find(|&width| span < delta_limit(width))
        .unwrap_or(8)
}

#[inline]
fn read_delta(table: &[u8], width: usize, row: usize) -> u64 {
    let at = row * width;
    let mut bytes = [0; 8];
    match width {
        4 => bytes[..4].copy_from_slice(&table[at..at + 4]),
        6 => bytes[..6].copy_from_slice(&table[at..at + 6]),
        _ => bytes.copy_from_slice(&table[at..at + 8]),
    }
    u64::from_le_bytes(bytes)
}

#[inline]
fn write_delta(table: &mut [u8], width: usize, row: usize, delta: u64) {
    table[row * width..(row + 1) * width].copy_from_slice(&delta.to_le_bytes()[..width]);
}

#[inline]
fn write_u16(table: &mut [u8], row: usize, value: u32) {
    table[2 * row..2 * row + 2].copy_from_slice(&(value as u16).to_le_bytes());
}

fn write_crcs(table: &mut [u8], from: usize, crcs: &[u32]) {
    let place = &mut table[4 * from..4 * (from + crcs.len())];
    for (place, crc) in place.as_chunks_mut::<4>().0.iter_mut().zip(crcs) {
        *place = crc.to_le_bytes();
    }
}

/// Whether `len` blocks from `address` can be data: inside one segment, behind its header. The
/// last number of all is no segment, so that arithmetic on addresses never overflows.
pub(super) const fn is_valid_extent(address: u64, len: u64) -> bool {
    const BLOCKS: u64 = 1 << crate::types::ADDRESS_BLOCK_BITS;
    let block = address % BLOCKS;
    block > 0 && block + len <= BLOCKS && address / BLOCKS < u64::MAX / BLOCKS
}

/// Buffer size for a table of `need` bytes that is likely to grow.
fn with_slack(need: usize, mapped: usize) -> usize {
    // A full leaf gets no more checksums, only more rows.
    let slack = if mapped == LEAF_BLOCKS as usize {
        64
    } else {
        need / 8
    };
    (need + slack).next_multiple_of(16)
}

/// The borrowed tables of a leaf.
struct Tables<'a> {
    crcs: &'a [[u8; 4]],
    deltas: &'a [u8],
    starts: &'a [[u8; 2]],
    ranks: &'a [[u8; 2]],
    width: usize,
    base: u64,
}

impl Tables<'_> {
    #[inline]
    fn start(&self, row: usize) -> u32 {
        u32::from(u16::from_le_bytes(self.starts[row]))
    }

    #[inline]
    fn rank(&self, row: usize) -> usize {
        self.ranks.get(row).map_or(self.crcs.len(), |rank| {
            usize::from(u16::from_le_bytes(*rank))
        })
    }

    /// The block after run `row`.
    #[inline]
    fn end(&self, row: usize) -> u32 {
        self.start(row) + (self.rank(row + 1) - self.rank(row)) as u32
    }

    #[inline]
    fn delta(&self, row: usize) -> u64 {
        read_delta(self.deltas, self.width, row)
    }

    /// The first row that starts at `block` or later.
    #[inline]
    fn row_from(&self, block: u32) -> usize {
        self.starts
            .partition_point(|start| u32::from(u16::from_le_bytes(*start)) < block)
    }

    /// The first run that ends after `block`.
    #[inline]
    fn run_over(&self, block: u32) -> usize {
        let next = self.row_from(block + 1);
        if next > 0 && self.end(next - 1) > block {
            next - 1
        } else {
            next
        }
    }
}

impl Leaf {
    pub fn empty() -> Self {
        Self {
            buf: Box::default(),
            base: 0,
            mapped: 0,
            rows: 0,
            form: Form::Runs,
            width: 4,
        }
    }

    pub fn mapped(&self) -> u32 {
        u32::from(self.mapped)
    }

    pub fn form(&self) -> Form {
        self.form
    }

    pub fn width(&self) -> usize {
        usize::from(self.width)
    }

    pub fn rows(&self) -> usize {
        usize::from(self.rows)
    }

    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes of memory the buffer takes.
    pub fn buffer_bytes(&self) -> usize {
        self.buf.len()
    }

    /// The tables as they stand on disk.
    pub fn table_bytes(&self) -> &[u8] {
        &self.buf[..self.layout().end]
    }

    fn layout(&self) -> Layout {
        layout(
            self.form,
            self.width(),
            usize::from(self.mapped),
            self.rows(),
        )
    }

    #[inline]
    fn tables(&self) -> Tables<'_> {
        let at = self.layout();
        Tables {
            crcs: self.buf[..at.deltas].as_chunks().0,
            deltas: &self.buf[at.deltas..at.starts],
            starts: self.buf[at.starts..at.ranks].as_chunks().0,
            ranks: self.buf[at.ranks..at.end].as_chunks().0,
            width: self.width(),
            base: self.base,
        }
    }

    /// Calls `f` for the mapped blocks in `from..to`, ascending, in pieces of consecutive
    /// addresses.
    #[inline]
    pub fn pieces<'a>(&'a self, from: u32, to: u32, mut f: impl FnMut(Piece<'a>)) {
        let tables = self.tables();
        match self.form {
            Form::Sparse => {
                let mut row = tables.row_from(from);
                while row < tables.starts.len() && tables.start(row) < to {
                    let (start, delta) = (tables.start(row), tables.delta(row));
                    let first = row;
                    row += 1;
                    while row < tables.starts.len()
                        && tables.start(row) == start + (row - first) as u32
                        && tables.start(row) < to
                        && tables.delta(row) == delta + (row - first) as u64
                    {
                        row += 1;
                    }
                    let crcs = &tables.crcs[first..row];
                    f(Piece {
                        start,
                        address: tables.base + delta,
                        crcs,
                    });
                }
            }
            Form::Runs => {
                let mut row = tables.run_over(from);
                while row < tables.starts.len() && tables.start(row) < to {
                    let first = tables.start(row);
                    let (start, end) = (first.max(from), tables.end(row).min(to));
                    let at = tables.rank(row) + (start - first) as usize;
                    f(Piece {
                        start,
                        address: tables.base + tables.delta(row) + u64::from(start - first),
                        crcs: &tables.crcs[at..at + (end - start) as usize],
                    });
                    row += 1;
                }
            }
            Form::Dense => {
                let hole = delta_limit(tables.width);
                let (mut at, to) = (from as usize, to as usize);
                while at < to {
                    let delta = tables.delta(at);
                    let first = at;
                    at += 1;
                    if delta == hole {
                        continue;
                    }
                    while at < to
                        && tables.delta(at) == delta + (at - first) as u64
                        && tables.delta(at) != hole
                    {
                        at += 1;
                    }
                    let crcs = &tables.crcs[first..at];
                    f(Piece {
                        start: first as u32,
                        address: tables.base + delta,
                        crcs,
                    });
                }
            }
        }
    }

    /// The first mapped block at `from` or later.
    pub fn next_mapped(&self, from: u32) -> Option<u32> {
        let tables = self.tables();
        match self.form {
            Form::Sparse => {
                let row = tables.row_from(from);
                (row < tables.starts.len()).then(|| tables.start(row))
            }
            Form::Runs => {
                let row = tables.run_over(from);
                (row < tables.starts.len()).then(|| tables.start(row).max(from))
            }
            Form::Dense => {
                let hole = delta_limit(tables.width);
                (from..LEAF_BLOCKS).find(|&block| tables.delta(block as usize) != hole)
            }
        }
    }

    /// Mapped blocks in `from..to`.
    pub fn mapped_in(&self, from: u32, to: u32) -> u32 {
        if from == 0 && to == LEAF_BLOCKS {
            return self.mapped();
        }
        let mut count = 0;
        self.pieces(from, to, |piece| count += piece.len());
        count
    }

    /// Maps the blocks from `start` to consecutive addresses from `address`; tells `lost` what
    /// was mapped there before. Returns how many blocks that was.
    pub fn set(
        &mut self,
        start: u32,
        address: u64,
        crcs: &[u32],
        mut lost: impl FnMut(u64, u32),
    ) -> u32 {
        let end = start + crcs.len() as u32;
        debug_assert!(!crcs.is_empty() && end <= LEAF_BLOCKS);
        let mut lost_count = 0;
        if self.mapped > 0 {
            self.pieces(start, end, |piece| {
                lost_count += piece.len();
                lost(piece.address, piece.len());
            });
        }
        let width = self.width();
        let fits = address >= self.base
            && (address - self.base)
                .checked_add(crcs.len() as u64)
                .is_some_and(|end| end <= delta_limit(width));
        if self.mapped == 0 || !fits {
            self.rebuild(start, end, Some((address, crcs)), true);
            return lost_count;
        }
        match self.form {
            Form::Dense => {
                let delta = address - self.base;
                let at = self.layout().deltas;
                let (crc_table, deltas) = self.buf.split_at_mut(at);
                write_crcs(crc_table, start as usize, crcs);
                for i in 0..crcs.len() {
                    write_delta(deltas, width, start as usize + i, delta + i as u64);
                }
                self.mapped += (crcs.len() as u32 - lost_count) as u16;
            }
            Form::Sparse if crcs.len() > MAX_SPLICE_ROWS => {
                self.rebuild(start, end, Some((address, crcs)), true);
            }
            Form::Sparse | Form::Runs => self.splice(start, end, Some((address, crcs))),
        }
        lost_count
    }

    /// Unmaps `from..to`; tells `lost` what was mapped there. Returns how many blocks that was.
    pub fn clear(&mut self, from: u32, to: u32, mut lost: impl FnMut(u64, u32)) -> u32 {
        let mut lost_count = 0;
        self.pieces(from, to, |piece| {
            lost_count += piece.len();
            lost(piece.address, piece.len());
        });
        if lost_count == 0 {
            return 0;
        }
        if self.form == Form::Dense {
            let (width, at) = (self.width(), self.layout().deltas);
            let (crc_table, deltas) = self.buf.split_at_mut(at);
            crc_table[4 * from as usize..4 * to as usize].fill(0);
            deltas[width * from as usize..width * to as usize].fill(0xff);
            self.mapped -= lost_count as u16;
            // Well below the size where dense begins to pay, so that a leaf at the edge does not
            // change its form with every request.
            if usize::from(self.mapped) * (6 + width) * 4 < self.layout().end * 3 {
                self.rebuild(0, 0, None, true);
            }
        } else {
            self.splice(from, to, None);
            let need = self.layout().end;
            if self.buf.len() > need + need / 4 + 64 {
                self.rebuild(0, 0, None, true);
            }
        }
        lost_count
    }

    /// Takes the smallest form and drops spare room. For a leaf that will not change soon.
    pub fn compact(&mut self) {
        let (width, mapped) = (self.width(), usize::from(self.mapped));
        let mut runs = 0;
        self.pieces(0, LEAF_BLOCKS, |_| runs += 1);
        let need = self.layout().end;
        if smallest(width, mapped, runs).1 < need {
            self.rebuild(0, 0, None, false);
        } else if need < self.buf.len() {
            self.buf = self.buf[..need].into();
        }
    }

    fn splice(&mut self, start: u32, end: u32, new: Option<(u64, &[u32])>) {
        let plan = match self.form {
            Form::Runs => self.plan_runs(start, end, new),
            _ => self.plan_sparse(start, end, new),
        };
        let crcs = new.map_or(&[][..], |(_, crcs)| crcs);
        let width = self.width();
        let mapped = usize::from(self.mapped) - (plan.crc_to - plan.crc_from) + crcs.len();
        let rows = self.rows() - (plan.row_to - plan.row_from) + plan.row_count;
        let old = self.layout();
        let new_layout = layout(self.form, width, mapped, rows);
        let grows = new_layout.end > self.buf.len();
        if grows && self.other_form_is_smaller(mapped, new_layout.end) {
            self.rebuild(start, end, new, true);
            return;
        }

        let tail = self.rows() - plan.row_to;
        let row_after = plan.row_from + plan.row_count;
        let ranks_head = if self.form == Form::Runs {
            2 * plan.row_from
        } else {
            0
        };
        let ranks_tail = if self.form == Form::Runs { 2 * tail } else { 0 };
        // (from, to, bytes), ascending in both.
        let all = [
            (
                4 * plan.crc_to,
                4 * (plan.crc_from + crcs.len()),
                4 * (usize::from(self.mapped) - plan.crc_to),
            ),
            (old.deltas, new_layout.deltas, width * plan.row_from),
            (
                old.deltas + width * plan.row_to,
                new_layout.deltas + width * row_after,
                width * tail,
            ),
            (old.starts, new_layout.starts, 2 * plan.row_from),
            (
                old.starts + 2 * plan.row_to,
                new_layout.starts + 2 * row_after,
                2 * tail,
            ),
            (old.ranks, new_layout.ranks, ranks_head),
            (
                old.ranks + 2 * plan.row_to,
                new_layout.ranks + 2 * row_after,
                ranks_tail,
            ),
        ];
        let moves = all.iter().copied().filter(|&(_, _, len)| len > 0);
        if grows {
            let mut buf = vec![0; with_slack(new_layout.end, mapped)].into_boxed_slice();
            buf[..4 * plan.crc_from].copy_from_slice(&self.buf[..4 * plan.crc_from]);
            for (from, to, len) in moves {
                buf[to..to + len].copy_from_slice(&self.buf[from..from + len]);
            }
            self.buf = buf;
        } else if moves.clone().all(|(from, to, _)| from <= to) {
            for (from, to, len) in moves.rev().filter(|&(from, to, _)| from < to) {
                self.buf.copy_within(from..from + len, to);
            }
        } else if moves.clone().all(|(from, to, _)| from >= to) {
            for (from, to, len) in moves.filter(|&(from, to, _)| from > to) {
                self.buf.copy_within(from..from + len, to);
            }
        } else {
            let old_buf = self.buf.clone();
            for (from, to, len) in moves {
                self.buf[to..to + len].copy_from_slice(&old_buf[from..from + len]);
            }
        }

        let rank_shift = crcs.len().wrapping_sub(plan.crc_to - plan.crc_from) as u16;
        self.mapped = mapped as u16;
        self.rows = rows as u16;
        write_crcs(&mut self.buf[..new_layout.deltas], plan.crc_from, crcs);
        let (head, ranks) = self.buf.split_at_mut(new_layout.ranks);
        let (head, starts) = head.split_at_mut(new_layout.starts);
        let deltas = &mut head[new_layout.deltas..];
        for (row, new) in (plan.row_from..).zip(&plan.rows[..plan.row_count]) {
            write_delta(deltas, width, row, new.delta);
            write_u16(starts, row, new.start);
            if self.form == Form::Runs {
                write_u16(ranks, row, new.rank);
            }
        }
        if self.form == Form::Runs && rank_shift != 0 {
            for rank in ranks[..2 * rows]
                .as_chunks_mut::<2>()
                .0
                .iter_mut()
                .skip(row_after)
            {
                *rank = u16::from_le_bytes(*rank)
                    .wrapping_add(rank_shift)
                    .to_le_bytes();
            }
        }
    }

    fn plan_sparse(&self, start: u32, end: u32, new: Option<(u64, &[u32])>) -> Splice {
        let tables = self.tables();
        let from = tables.row_from(start);
        let to = from
            + tables.starts[from..]
                .iter()
                .take_while(|start| u32::from(u16::from_le_bytes(**start)) < end)
                .count();
        let mut plan = Splice {
            crc_from: from,
            crc_to: to,
            row_from: from,
            row_to: to,
            rows: Default::default(),
            row_count: 0,
        };
        if let Some((address, crcs)) = new {
            for i in 0..crcs.len() {
                plan.push(start + i as u32, address - self.base + i as u64, 0);
            }
        }
        plan
    }

    fn plan_runs(&self, start: u32, end: u32, new: Option<(u64, &[u32])>) -> Splice {
        let tables = self.tables();
        let count = tables.starts.len();
        let row_from = tables.run_over(start);
        let row_to = row_from.max(tables.row_from(end));
        let overlaps = row_to > row_from;
        // What stays of the first run before `start`, and of the last one from `end`.
        let left = overlaps && tables.start(row_from) < start;
        let right = overlaps && tables.end(row_to - 1) > end;
        let crc_at = |row: usize, block: u32| -> usize {
            tables.rank(row) + (block - tables.start(row)) as usize
        };
        let crc_from = if left {
            crc_at(row_from, start)
        } else {
            tables.rank(row_from)
        };
        let crc_to = if right {
            crc_at(row_to - 1, end)
        } else {
            tables.rank(row_to)
        };
        let mut plan = Splice {
            crc_from,
            crc_to,
            row_from,
            row_to,
            rows: Default::default(),
            row_count: 0,
        };
        if left {
            plan.push(
                tables.start(row_from),
                tables.delta(row_from),
                tables.rank(row_from),
            );
        }
        let right_delta = || tables.delta(row_to - 1) + u64::from(end - tables.start(row_to - 1));
        let Some((address, crcs)) = new else {
            if right {
                plan.push(end, right_delta(), crc_from);
            }
            return plan;
        };
        let delta = address - self.base;
        // A run's length is the distance to the next one's rank: joining is leaving out a row.
        let before = if left {
            Some(row_from)
        } else {
            row_from
                .checked_sub(1)
                .filter(|&row| tables.end(row) == start)
        };
        let joins_before = before
            .is_some_and(|row| tables.delta(row) + u64::from(start - tables.start(row)) == delta);
        if !joins_before {
            plan.push(start, delta, crc_from);
        }
        let end_delta = delta + crcs.len() as u64;
        if right {
            if right_delta() != end_delta {
                plan.push(end, right_delta(), crc_from + crcs.len());
            }
        } else if row_to < count && tables.start(row_to) == end && tables.delta(row_to) == end_delta
        {
            plan.row_to += 1;
        }
        plan
    }

    /// Whether a table of `need` bytes with `mapped` blocks would be smaller in another form.
    fn other_form_is_smaller(&self, mapped: usize, need: usize) -> bool {
        let width = self.width();
        if layout(Form::Dense, width, mapped, LEAF_BLOCKS as usize).end < need {
            return true;
        }
        match self.form {
            Form::Runs => layout(Form::Sparse, width, mapped, mapped).end < need,
            _ => {
                let mut runs = 1;
                self.pieces(0, LEAF_BLOCKS, |_| runs += 1);
                layout(Form::Runs, width, mapped, runs).end < need
            }
        }
    }

    /// Encodes the leaf anew, in its smallest form, with `start..end` replaced by `new`.
    fn rebuild(&mut self, start: u32, end: u32, new: Option<(u64, &[u32])>, slack: bool) {
        let mut runs: Vec<Run> = Vec::new();
        let mut crcs: Vec<u32> = Vec::with_capacity(usize::from(self.mapped));
        let mut push = |start: u32, address: u64, len: u32| match runs.last_mut() {
            Some(run)
                if run.start + run.len == start && run.address + u64::from(run.len) == address =>
            {
                run.len += len;
            }
            _ => runs.push(Run {
                start,
                len,
                address,
            }),
        };
        if self.mapped > 0 {
            self.pieces(0, start, |piece| {
                push(piece.start, piece.address, piece.len());
                crcs.extend(piece.crcs.iter().map(|crc| u32::from_le_bytes(*crc)));
            });
        }
        if let Some((address, new_crcs)) = new {
            push(start, address, new_crcs.len() as u32);
            crcs.extend_from_slice(new_crcs);
        }
        if self.mapped > 0 {
            self.pieces(end, LEAF_BLOCKS, |piece| {
                push(piece.start, piece.address, piece.len());
                crcs.extend(piece.crcs.iter().map(|crc| u32::from_le_bytes(*crc)));
            });
        }
        *self = Self::encode(&runs, &crcs, slack);
    }

    fn encode(runs: &[Run], crcs: &[u32], slack: bool) -> Self {
        let base = runs.iter().map(|run| run.address).min().unwrap_or(0);
        let last = runs
            .iter()
            .map(|run| run.address + u64::from(run.len) - 1)
            .max()
            .unwrap_or(0);
        let width = width_for(last - base);
        let (form, need, rows) = smallest(width, crcs.len(), runs.len());
        let room = match form {
            Form::Dense => need,
            _ if slack => with_slack(need, crcs.len()),
            _ => need,
        };
        let at = layout(form, width, crcs.len(), rows);
        let mut buf = vec![0; room].into_boxed_slice();
        let (head, ranks) = buf.split_at_mut(at.ranks);
        let (head, starts) = head.split_at_mut(at.starts);
        let (crc_table, deltas) = head.split_at_mut(at.deltas);
        let mut rank = 0;
        if form == Form::Dense {
            deltas.fill(0xff);
        } else {
            write_crcs(crc_table, 0, crcs);
        }
        for (row, run) in runs.iter().enumerate() {
            let delta = run.address - base;
            match form {
                Form::Runs => {
                    write_delta(deltas, width, row, delta);
                    write_u16(starts, row, run.start);
                    write_u16(ranks, row, rank as u32);
                }
                Form::Sparse => {
                    for i in 0..run.len {
                        let row = rank + i as usize;
                        write_delta(deltas, width, row, delta + u64::from(i));
                        write_u16(starts, row, run.start + i);
                    }
                }
                Form::Dense => {
                    let len = run.len as usize;
                    write_crcs(crc_table, run.start as usize, &crcs[rank..rank + len]);
                    for i in 0..len {
                        write_delta(deltas, width, run.start as usize + i, delta + i as u64);
                    }
                }
            }
            rank += run.len as usize;
        }
        let (mapped, rows) = (crcs.len() as u16, rows as u16);
        Self {
            buf,
            base,
            mapped,
            rows,
            form,
            width: width as u8,
        }
    }

    /// The leaf that the tables of a node describe, or what is wrong with them. Whatever the
    /// bytes, an accepted leaf keeps the invariants of this file.
    pub fn decode(
        form: u8,
        width: usize,
        mapped: usize,
        rows: usize,
        base: u64,
        bytes: &[u8],
    ) -> Result<Self, &'static str> {
        const FULL: usize = LEAF_BLOCKS as usize;
        let form = match form {
            1 => Form::Sparse,
            2 => Form::Runs,
            3 => Form::Dense,
            _ => return Err("its form is unknown"),
        };
        if !matches!(width, 4 | 6 | 8) || !(1..=FULL).contains(&mapped) {
            return Err("its width or its count of blocks is out of range");
        }
        let rows_right = match form {
            Form::Sparse => rows == mapped,
            Form::Runs => (1..=mapped).contains(&rows),
            Form::Dense => rows == FULL,
        };
        if !rows_right {
            return Err("its count of rows does not fit its form");
        }
        if bytes.len() != layout(form, width, mapped, rows).end {
            return Err("its length does not fit its counts");
        }
        let leaf = Self {
            buf: bytes.into(),
            base,
            mapped: mapped as u16,
            rows: rows as u16,
            form,
            width: width as u8,
        };
        leaf.check()?;
        Ok(leaf)
    }

    fn check(&self) -> Result<(), &'static str> {
        let tables = self.tables();
        let hole = delta_limit(tables.width);
        let mut end = 0;
        let mut mapped = 0;
        for row in 0..self.rows() {
            let delta = tables.delta(row);
            if delta == hole {
                if self.form == Form::Dense {
                    continue;
                }
                return Err("a row has no address");
            }
            let (start, len) = match self.form {
                Form::Sparse => (tables.start(row), 1),
                Form::Runs => {
                    let len = tables.rank(row + 1).checked_sub(tables.rank(row));
                    (
                        tables.start(row),
                        len.filter(|&len| len > 0).ok_or("a run is empty")?,
                    )
                }
                Form::Dense => (row as u32, 1),
            };
            if row == 0 && self.form == Form::Runs && tables.rank(0) != 0 {
                return Err("its first run has not the first checksum");
            }
            if start < end {
                return Err("its rows overlap");
            }
            end = start + len as u32;
            mapped += len;
            let address = self.base.checked_add(delta).ok_or("an address overflows")?;
            if !is_valid_extent(address, len as u64) {
                return Err("an address is outside its segment");
            }
        }
        if end > LEAF_BLOCKS {
            return Err("a row is outside the leaf");
        }
        if mapped != usize::from(self.mapped) {
            return Err("its count of blocks is wrong");
        }
        Ok(())
    }
}

/// The smallest form for so many mapped blocks in so many runs: form, bytes, rows.
fn smallest(width: usize, mapped: usize, runs: usize) -> (Form, usize, usize) {
    let full = LEAF_BLOCKS as usize;
    let sparse = (
        Form::Sparse,
        layout(Form::Sparse, width, mapped, mapped).end,
        mapped,
    );
    let in_runs = (
        Form::Runs,
        layout(Form::Runs, width, mapped, runs).end,
        runs,
    );
    let dense = (
        Form::Dense,
        layout(Form::Dense, width, mapped, full).end,
        full,
    );
    let best = if in_runs.1 < sparse.1 {
        in_runs
    } else {
        sparse
    };
    if dense.1 < best.1 { dense } else { best }
}
