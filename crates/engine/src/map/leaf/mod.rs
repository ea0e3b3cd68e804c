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

mod encode;
mod splice;
mod tables;

use encode::smallest;
use splice::MAX_SPLICE_ROWS;
use tables::{Layout, Tables, delta_limit, layout, write_crcs, write_delta};

/// Blocks a leaf covers.
pub(super) const LEAF_BLOCKS: u32 = 1 << LEAF_BITS;
pub(super) const LEAF_BITS: u32 = 10;

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

/// Whether `len` blocks from `address` can be data: inside one segment, behind its header. The
/// last number of all is no segment, so that arithmetic on addresses never overflows.
pub(super) const fn is_valid_extent(address: u64, len: u64) -> bool {
    const BLOCKS: u64 = 1 << crate::types::ADDRESS_BLOCK_BITS;
    let block = address % BLOCKS;
    block > 0 && block + len <= BLOCKS && address / BLOCKS < u64::MAX / BLOCKS
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
}
