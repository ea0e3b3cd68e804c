//! Where the tables of a leaf stand in its buffer, and how their rows are read and written.

use super::Form;

/// Byte offsets of the tables in the buffer.
pub(super) struct Layout {
    pub deltas: usize,
    pub starts: usize,
    pub ranks: usize,
    pub end: usize,
}

pub(super) fn layout(form: Form, width: usize, mapped: usize, rows: usize) -> Layout {
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
pub(super) const fn delta_limit(width: usize) -> u64 {
    u64::MAX >> (64 - 8 * width)
}

pub(super) fn width_for(span: u64) -> usize {
    [4, 6]
        .into_iter()
        .find(|&width| span < delta_limit(width))
        .unwrap_or(8)
}

#[inline]
pub(super) fn read_delta(table: &[u8], width: usize, row: usize) -> u64 {
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
pub(super) fn write_delta(table: &mut [u8], width: usize, row: usize, delta: u64) {
    table[row * width..(row + 1) * width].copy_from_slice(&delta.to_le_bytes()[..width]);
}

#[inline]
pub(super) fn write_u16(table: &mut [u8], row: usize, value: u32) {
    table[2 * row..2 * row + 2].copy_from_slice(&(value as u16).to_le_bytes());
}

pub(super) fn write_crcs(table: &mut [u8], from: usize, crcs: &[u32]) {
    let place = &mut table[4 * from..4 * (from + crcs.len())];
    for (place, crc) in place.as_chunks_mut::<4>().0.iter_mut().zip(crcs) {
        *place = crc.to_le_bytes();
    }
}

/// The borrowed tables of a leaf.
pub(super) struct Tables<'a> {
    pub crcs: &'a [[u8; 4]],
    pub deltas: &'a [u8],
    pub starts: &'a [[u8; 2]],
    pub ranks: &'a [[u8; 2]],
    pub width: usize,
    pub base: u64,
}

impl Tables<'_> {
    #[inline]
    pub(super) fn start(&self, row: usize) -> u32 {
        u32::from(u16::from_le_bytes(self.starts[row]))
    }

    #[inline]
    pub(super) fn rank(&self, row: usize) -> usize {
        self.ranks.get(row).map_or(self.crcs.len(), |rank| {
            usize::from(u16::from_le_bytes(*rank))
        })
    }

    /// The block after run `row`.
    #[inline]
    pub(super) fn end(&self, row: usize) -> u32 {
        self.start(row) + (self.rank(row + 1) - self.rank(row)) as u32
    }

    #[inline]
    pub(super) fn delta(&self, row: usize) -> u64 {
        read_delta(self.deltas, self.width, row)
    }

    /// The first row that starts at `block` or later.
    #[inline]
    pub(super) fn row_from(&self, block: u32) -> usize {
        self.starts
            .partition_point(|start| u32::from(u16::from_le_bytes(*start)) < block)
    }

    /// The first run that ends after `block`.
    #[inline]
    pub(super) fn run_over(&self, block: u32) -> usize {
        let next = self.row_from(block + 1);
        if next > 0 && self.end(next - 1) > block {
            next - 1
        } else {
            next
        }
    }
}
