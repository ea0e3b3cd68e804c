//! Random ring memory thrown at the queue and the request parser: no panic, bounded work.
//!
//! `VHOSTD_FUZZ_CASES` sets the number of cases, `VHOSTD_FUZZ_SEED` the first seed; each case has
//! a seed of its own, printed when it fails.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::testing::*;
use super::*;
use crate::request::{Action, DiskShape, MAX_REQUEST_BYTES, Status, parse};

const REGION_BYTES: u64 = 16 << 10;
/// Descriptors fill this much from the start of memory, rings included.
const TABLE_BYTES: u64 = 0x1000;
/// Request headers behind the tables, each with a discard segment after it.
const HEADERS: u64 = 16;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |text| text.parse().expect("a number"))
}

/// A value a hostile guest might choose: near a limit more often than not.
fn nasty(rng: &mut Rng) -> u64 {
    match rng.below(6) {
        0 => rng.next(),
        1 => rng.below(64),
        2 => (2 * REGION_BYTES).wrapping_sub(rng.below(32)),
        3 => u64::MAX - rng.below(16),
        _ => rng.below(2 * REGION_BYTES),
    }
}

fn random_desc(rng: &mut Rng, size: u64) -> Desc {
    let len = match rng.below(8) {
        0 => rng.next() as u32,
        1 => 0,
        2 => 16 * rng.below(20) as u32,
        3 => 512 * rng.below(4) as u32,
        4 => 16,
        _ => 1 + rng.below(64) as u32,
    };
    let flags = match rng.below(16) {
        0 => rng.next() as u16,
        1 | 2 => INDIRECT,
        3..6 => 0,
        6..8 => WRITE,
        8..12 => NEXT | WRITE,
        _ => NEXT,
    };
    let next = if rng.below(16) == 0 {
        rng.next() as u16
    } else {
        rng.below(size) as u16
    };
    Desc {
        address: if rng.below(4) == 0 {
            nasty(rng)
        } else {
            rng.below(REGION_BYTES)
        },
        len,
        flags,
        next,
    }
}

/// Overwrites some of the table with requests a driver might make, most of them without a flaw, and
/// fills the places that descriptors name with headers and segments.
fn plant(memory: &GuestMemory, rng: &mut Rng, size: u64) {
    for slot in 0..HEADERS {
        let kind = [0, 1, 4, 8, 11, 13, 11, rng.next() as u32][rng.below(8) as usize];
        let sector = if rng.below(8) == 0 {
            rng.next()
        } else {
            8 * rng.below(200)
        };
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        write_guest(memory, TABLE_BYTES + 32 * slot, &header);
        let sectors = if rng.below(8) == 0 {
            rng.next() as u32
        } else {
            8 * rng.below(20) as u32
        };
        let flags = if rng.below(8) == 0 {
            rng.next() as u32
        } else {
            0
        };
        let segment = [
            &(8 * rng.below(200)).to_le_bytes()[..],
            &sectors.to_le_bytes(),
            &flags.to_le_bytes(),
        ];
        write_guest(memory, TABLE_BYTES + 32 * slot + 16, &segment.concat());
    }
    for first in (0..size.saturating_sub(2)).step_by(3) {
        let flaw = rng.below(12);
        let data_len = if rng.below(2) == 0 {
            512 * rng.below(5)
        } else {
            16
        };
        let data_flags = if rng.below(2) == 0 {
            NEXT
        } else {
            NEXT | WRITE
        };
        let chain = [
            (
                TABLE_BYTES + 32 * rng.below(HEADERS),
                if data_len == 16 { 32 } else { 16 },
                NEXT,
            ),
            (
                TABLE_BYTES + 32 * HEADERS + rng.below(4096),
                data_len.max(1),
                data_flags,
            ),
            (TABLE_BYTES + 32 * HEADERS + rng.below(4096), 1, WRITE),
        ];
        for (i, &(address, len, flags)) in chain.iter().enumerate() {
            let (at, next) = (16 * (first + i as u64), (first + i as u64 + 1) as u16);
            let mut desc = Desc {
                address,
                len: len as u32,
                flags,
                next,
            };
            if flaw == i as u64 {
                desc = random_desc(rng, size);
            }
            // A discard has its segment behind its header and nothing else to read.
            if i == 0 && len == 32 {
                desc.next += 1;
            }
            write_guest(memory, at, &desc.bytes());
        }
    }
}

struct Arena {
    memory: Arc<GuestMemory>,
    reached: Cell<Reached>,
}

/// How far cases came, so that a fuzzer that is turned away at the door is noticed.
#[derive(Clone, Copy, Debug, Default)]
struct Reached {
    transfers: u64,
    unmaps: u64,
    flushes: u64,
    refusals: u64,
}

fn one_case(arena: &Arena, seed: u64) {
    let rng = &mut Rng(seed);
    let memory = &arena.memory;
    let size = 1u64 << rng.below(7);
    let (descriptors, available, used) = (0, 0x800, 0xc00);
    // Descriptors everywhere: in the ring's table and where indirect tables may be found. Their
    // bytes serve as headers and discard segments as well.
    let mut image = Vec::with_capacity(TABLE_BYTES as usize);
    while (image.len() as u64) < TABLE_BYTES {
        image.extend(random_desc(rng, size).bytes());
    }
    write_guest(memory, 0, &image);
    plant(memory, rng, size);
    let base = rng.next() as u16;
    write_guest(memory, used + 2, &(rng.next() as u16).to_le_bytes());
    for slot in 0..size {
        let head = if rng.below(32) == 0 {
            rng.next() as u16
        } else {
            rng.below(size) as u16
        };
        write_guest(memory, available + 4 + 2 * slot, &head.to_le_bytes());
    }
    let ahead = if rng.below(16) == 0 {
        rng.next()
    } else {
        rng.below(size + 1)
    };
    write_guest(
        memory,
        available + 2,
        &base.wrapping_add(ahead as u16).to_le_bytes(),
    );
    let mut user = |at: u64| {
        if rng.below(64) == 0 {
            nasty(rng)
        } else {
            USER_BASE + at
        }
    };
    let config = QueueConfig {
        descriptor_address: user(descriptors),
        available_address: user(available),
        used_address: user(used),
        size: if rng.below(64) == 0 {
            rng.next() as u32
        } else {
            size as u32
        },
        features: rng.next(),
    };
    let shape = DiskShape {
        size_bytes: rng.below(1 << 20) & !511,
        logical_block_bytes: if rng.below(2) == 0 { 512 } else { 4096 },
        read_only: rng.below(4) == 0,
        queues: 1,
    };
    let Ok(mut queue) = SplitQueue::new(memory.clone(), config, base) else {
        return;
    };
    let mut chain = Chain::new();
    let mut popped = 0;
    while let Ok(true) = queue.pop(&mut chain) {
        popped += 1;
        // A used element or a status byte may land on the index and make more available; the
        // ring then has no end, as with a guest that keeps offering.
        if popped > 4 * u64::from(config.size) {
            break;
        }
        assert!(chain.readable().len() + chain.writable().len() <= MAX_CHAIN_PIECES);
        let parsed = parse(&chain, &shape, b"a serial of 20 bytes");
        let mut reached = arena.reached.get();
        match &parsed.action {
            Action::Read { .. } | Action::Write { .. } => reached.transfers += 1,
            Action::Unmap { .. } => reached.unmaps += 1,
            Action::Flush => reached.flushes += 1,
            Action::Done(_) => reached.refusals += 1,
        }
        arena.reached.set(reached);
        let (status, filled) =
            match &parsed.action {
                Action::Read {
                    offset_bytes,
                    into: bufs,
                }
                | Action::Write {
                    offset_bytes,
                    from: bufs,
                } => {
                    let len: u64 = bufs.iter().map(|b| b.len() as u64).sum();
                    assert!(len <= MAX_REQUEST_BYTES && offset_bytes + len <= shape.size_bytes);
                    if matches!(parsed.action, Action::Read { .. }) {
                        bufs.iter().for_each(crate::io::IoBuf::zero);
                    }
                    (Status::Ok, true)
                }
                Action::Unmap { ranges, .. } => {
                    assert!(!shape.read_only && !ranges.is_empty() && ranges.len() <= 32);
                    assert!(ranges.iter().all(
                        |r| r.len_bytes > 0 && r.offset_bytes + r.len_bytes <= shape.size_bytes
                    ));
                    (Status::Ok, true)
                }
                Action::Flush => (Status::IoErr, false),
                Action::Done(status) => (*status, true),
            };
        let written = parsed.reply.write(status, filled);
        assert!(u64::from(written) <= chain.writable_bytes());
        queue.push(parsed.reply.head(), written);
    }
    queue.publish();
    queue.needs_notify(true);
    let _ = queue.enable_notifications();
    queue.disable_notifications();
}

#[test]
fn ring_fuzz() {
    let cases = number("VHOSTD_FUZZ_CASES", 20_000);
    let first = number("VHOSTD_FUZZ_SEED", std::process::id().into());
    println!("VHOSTD_FUZZ_SEED={first} VHOSTD_FUZZ_CASES={cases}");
    let specs = [0, REGION_BYTES, 4 * REGION_BYTES];
    let specs = specs
        .iter()
        .map(|&at| region(at, REGION_BYTES, &memfd(REGION_BYTES)))
        .collect();
    let arena = Arena {
        memory: Arc::new(GuestMemory::new(specs).unwrap()),
        reached: Cell::default(),
    };
    for seed in first..first + cases {
        if catch_unwind(AssertUnwindSafe(|| one_case(&arena, seed))).is_err() {
            panic!("case failed; run again with VHOSTD_FUZZ_SEED={seed} VHOSTD_FUZZ_CASES=1");
        }
    }
    let reached = arena.reached.get();
    println!("{reached:?}");
    if cases >= 10_000 {
        assert!(
            reached
                .transfers
                .min(reached.unmaps)
                .min(reached.flushes)
                .min(reached.refusals)
                > 0,
            "{reached:?}"
        );
    }
}
