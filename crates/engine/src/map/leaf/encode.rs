//! Leaves made anew: from runs in the smallest form, or from the bytes of a node.

use super::tables::{delta_limit, layout, width_for, write_crcs, write_delta, write_u16};
use super::{Form, LEAF_BLOCKS, Leaf, is_valid_extent};

#[derive(Clone, Copy)]
struct Run {
    start: u32,
    len: u32,
    address: u64,
}

/// Buffer size for a table of `need` bytes that is likely to grow.
pub(super) fn with_slack(need: usize, mapped: usize) -> usize {
    // A full leaf gets no more checksums, only more rows.
    let slack = if mapped == LEAF_BLOCKS as usize {
        64
    } else {
        need / 8
    };
    (need + slack).next_multiple_of(16)
}

/// The smallest form for so many mapped blocks in so many runs: form, bytes, rows.
pub(super) fn smallest(width: usize, mapped: usize, runs: usize) -> (Form, usize, usize) {
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

impl Leaf {
    /// Encodes the leaf anew, in its smallest form, with `start..end` replaced by `new`.
    pub(super) fn rebuild(
        &mut self,
        start: u32,
        end: u32,
        new: Option<(u64, &[u32])>,
        slack: bool,
    ) {
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
