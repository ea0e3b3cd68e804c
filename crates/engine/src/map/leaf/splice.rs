//! Changing some rows of a sparse or runs table in place, or in a larger buffer.

use super::encode::with_slack;
use super::tables::{layout, write_crcs, write_delta, write_u16};
use super::{Form, LEAF_BLOCKS, Leaf};

/// A set of at most this many rows is spliced into a table; more are better re-encoded.
pub(super) const MAX_SPLICE_ROWS: usize = 8;

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

impl Leaf {
    /// Replaces what is mapped in `start..end` by `new`, which covers it whole, or by nothing.
    pub(super) fn splice(&mut self, start: u32, end: u32, new: Option<(u64, &[u32])>) {
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
        let moves = [
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
        let room = grows.then(|| with_slack(new_layout.end, mapped));
        self.move_tables(&moves, 4 * plan.crc_from, room);

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

    /// Moves parts of the buffer, given as (from, to, bytes); into a new one of `room` bytes, which
    /// also gets the first `head` bytes, if it must grow.
    fn move_tables(&mut self, moves: &[(usize, usize, usize)], head: usize, room: Option<usize>) {
        let moves = moves.iter().copied().filter(|&(_, _, len)| len > 0);
        if let Some(room) = room {
            let mut buf = vec![0; room].into_boxed_slice();
            buf[..head].copy_from_slice(&self.buf[..head]);
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
            // Some up, some down: rare, and not worth an order of their own.
            let old_buf = self.buf.clone();
            for (from, to, len) in moves {
                self.buf[to..to + len].copy_from_slice(&old_buf[from..from + len]);
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
}
