//! virtio-blk requests of every type, well and badly made (virtio 1.3, 5.2.6).

use proptest::prelude::*;

use super::parse::*;
use super::*;
use crate::io::IoBuf;
use crate::ring::testing::*;
use crate::ring::{Chain, F_INDIRECT_DESC, F_VERSION_1};

const SIZE_BYTES: u64 = 1 << 20;
const SERIAL: &[u8; ID_BYTES] = b"pool-volume-1\0\0\0\0\0\0\0";
const SHAPE: DiskShape = DiskShape {
    size_bytes: SIZE_BYTES,
    logical_block_bytes: 512,
    read_only: false,
    queues: 4,
};

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

/// A chain of `readable` bytes and `writable_bytes` bytes, cut wherever `cuts` says.
struct Guest {
    driver: Driver,
    chain: Chain,
    writable_at: u64,
}

impl Guest {
    fn new(readable: &[u8], writable_bytes: u64, cuts: &[u64]) -> Self {
        let mut driver = Driver::new(256, F_VERSION_1 | F_INDIRECT_DESC);
        let writable_at = DATA_ADDRESS + (512 << 10);
        let mut descs = Vec::new();
        for (start, len, flags) in [
            (DATA_ADDRESS, readable.len() as u64, 0),
            (writable_at, writable_bytes, WRITE),
        ] {
            let mut edges: Vec<u64> = cuts.iter().copied().filter(|&c| c > 0 && c < len).collect();
            edges.extend([0, len]);
            edges.sort_unstable();
            edges.dedup();
            for pair in edges.windows(2) {
                let len = (pair[1] - pair[0]) as u32;
                descs.push(Desc {
                    address: start + pair[0],
                    len,
                    flags,
                    next: 0,
                });
            }
        }
        write_guest(&driver.memory, DATA_ADDRESS, readable);
        write_guest(
            &driver.memory,
            writable_at,
            &vec![0xee; writable_bytes as usize],
        );
        driver.describe_chain(0, &descs);
        let mut queue = driver.queue();
        driver.offer(0);
        let mut chain = Chain::new();
        assert!(queue.pop(&mut chain).unwrap());
        Self {
            driver,
            chain,
            writable_at,
        }
    }

    fn parse(&self, shape: &DiskShape) -> Parsed {
        parse(&self.chain, shape, SERIAL)
    }

    fn writable(&self, len: u64) -> Vec<u8> {
        read_guest(&self.driver.memory, self.writable_at, len as usize)
    }
}

/// The status a request without effect ends with.
fn refused(readable: &[u8], writable_bytes: u64, shape: &DiskShape) -> Option<Status> {
    match Guest::new(readable, writable_bytes, &[])
        .parse(shape)
        .action
    {
        Action::Done(status) => Some(status),
        _ => None,
    }
}

fn total(bufs: &[IoBuf]) -> u64 {
    bufs.iter().map(|b| b.len() as u64).sum()
}

#[test]
fn reads_and_writes_at_the_edge_of_the_volume() {
    let last = SIZE_BYTES / 512 - 1;
    assert_eq!(refused(&header(0, last), 513, &SHAPE), None);
    assert_eq!(
        refused(&header(0, last + 1), 1, &SHAPE),
        None,
        "nothing, at the end"
    );
    assert_eq!(
        refused(&header(0, last + 2), 1, &SHAPE),
        Some(Status::IoErr)
    );
    for sector in [last, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(
            refused(&header(0, sector), 1025, &SHAPE),
            Some(Status::IoErr),
            "{sector:#x}"
        );
        let write = [header(1, sector), vec![0; 1024]].concat();
        assert_eq!(
            refused(&write, 1, &SHAPE),
            Some(Status::IoErr),
            "{sector:#x}"
        );
    }
}

#[test]
fn lengths_that_are_not_whole_sectors_are_refused() {
    assert_eq!(refused(&header(0, 0), 512, &SHAPE), Some(Status::IoErr));
    assert_eq!(
        refused(&[header(1, 0), vec![0; 511]].concat(), 1, &SHAPE),
        Some(Status::IoErr)
    );
}

#[test]
fn sectors_inside_a_logical_block_are_refused() {
    let shape = DiskShape {
        logical_block_bytes: 4096,
        ..SHAPE
    };
    assert_eq!(refused(&header(0, 1), 4097, &shape), Some(Status::IoErr));
    assert_eq!(refused(&header(0, 8), 4097, &shape), None);
    let discard = [header(11, 0), segment(4, 8, 0)].concat();
    assert_eq!(refused(&discard, 1, &shape), Some(Status::IoErr));
}

#[test]
fn requests_larger_than_the_advertised_limits_are_refused() {
    let mut driver = Driver::new(256, F_VERSION_1);
    write_guest(&driver.memory, DATA_ADDRESS, &header(0, 0));
    let shape = DiskShape {
        size_bytes: 1 << 40,
        ..SHAPE
    };
    let mut queue = driver.queue();
    for (pieces, fits) in [(126, true), (127, false)] {
        let mut descs = vec![Desc {
            address: DATA_ADDRESS,
            len: 16,
            flags: 0,
            next: 0,
        }];
        descs.extend(vec![
            Desc {
                address: DATA_ADDRESS,
                len: SIZE_MAX_BYTES,
                flags: WRITE,
                next: 0
            };
            pieces
        ]);
        descs.push(Desc {
            address: DATA_ADDRESS,
            len: 1,
            flags: WRITE,
            next: 0,
        });
        driver.describe_chain(0, &descs);
        driver.offer(0);
        let mut chain = Chain::new();
        assert!(queue.pop(&mut chain).unwrap());
        let action = parse(&chain, &shape, SERIAL).action;
        assert_eq!(matches!(action, Action::Read { .. }), fits, "{pieces}");
    }
}

#[test]
fn read_only_disks_refuse_every_change_with_ioerr() {
    let shape = DiskShape {
        read_only: true,
        ..SHAPE
    };
    for kind in [1, 11, 13] {
        assert_eq!(
            refused(&[header(kind, 0), segment(0, 8, 0)].concat(), 1, &shape),
            Some(Status::IoErr)
        );
    }
    assert_eq!(refused(&header(0, 0), 513, &shape), None);
    assert!(matches!(
        Guest::new(&header(4, 0), 1, &[]).parse(&shape).action,
        Action::Flush
    ));
}

#[test]
fn unknown_types_are_unsupported() {
    for kind in [2, 3, 5, 9, 10, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(
            refused(&header(kind, 0), 513, &SHAPE),
            Some(Status::Unsupported),
            "{kind:#x}"
        );
    }
}

#[test]
fn get_id_fills_20_bytes_or_what_there_is() {
    for (room, expected) in [(20, 21), (7, 8), (0, 1), (64, 20)] {
        let guest = Guest::new(&header(8, 0), room + 1, &[3]);
        let parsed = guest.parse(&SHAPE);
        assert!(matches!(parsed.action, Action::Done(Status::Ok)));
        assert_eq!(parsed.reply.write(Status::Ok, true), expected);
        let written = guest.writable(room + 1);
        let len = (room as usize).min(20);
        assert_eq!(written[..len], SERIAL[..len]);
        assert!(
            written[len..room as usize].iter().all(|&b| b == 0xee),
            "nothing beyond 20 bytes is touched"
        );
        assert_eq!(written[room as usize], 0);
    }
}

#[test]
fn discard_and_write_zeroes_judge_all_segments_first() {
    let request = |kind, segments: &[Vec<u8>]| [header(kind, 0), segments.concat()].concat();
    let many = vec![segment(0, 1, 0); 33];
    for kind in [11, 13] {
        assert_eq!(
            refused(&request(kind, &many), 1, &SHAPE),
            Some(Status::Unsupported)
        );
        assert_eq!(refused(&request(kind, &many[..32]), 1, &SHAPE), None);
        assert_eq!(refused(&request(kind, &[]), 1, &SHAPE), Some(Status::IoErr));
        assert_eq!(
            refused(&request(kind, &[vec![0; 15]]), 1, &SHAPE),
            Some(Status::IoErr)
        );
        assert_eq!(
            refused(&request(kind, &[vec![0; 17]]), 1, &SHAPE),
            Some(Status::IoErr)
        );
        assert_eq!(
            refused(&request(kind, &[segment(0, 8, 2)]), 1, &SHAPE),
            Some(Status::Unsupported)
        );
        let outside = [segment(0, 8, 0), segment(2040, 9, 0)];
        assert_eq!(
            refused(&request(kind, &outside), 1, &SHAPE),
            Some(Status::IoErr)
        );
        assert_eq!(
            refused(&request(kind, &[segment(u64::MAX, 1, 0)]), 1, &SHAPE),
            Some(Status::IoErr)
        );
        assert_eq!(
            refused(&request(kind, &[segment(0, 0, 0)]), 1, &SHAPE),
            Some(Status::Ok)
        );
    }
    // UNMAP is for write-zeroes only.
    assert_eq!(
        refused(&request(11, &[segment(0, 8, 1)]), 1, &SHAPE),
        Some(Status::Unsupported)
    );
    assert_eq!(refused(&request(13, &[segment(0, 8, 1)]), 1, &SHAPE), None);
    let large = DiskShape {
        size_bytes: 1 << 40,
        ..SHAPE
    };
    assert_eq!(
        refused(&request(11, &[segment(0, MAX_UNMAP_SECTORS, 0)]), 1, &large),
        None
    );
    assert_eq!(
        refused(
            &request(11, &[segment(0, MAX_UNMAP_SECTORS + 1, 0)]),
            1,
            &large
        ),
        Some(Status::IoErr)
    );
}

#[test]
fn unmap_ranges_come_out_in_bytes() {
    let readable = [
        header(13, 0),
        segment(8, 16, 1),
        segment(100, 0, 0),
        segment(0, 1, 0),
    ]
    .concat();
    match Guest::new(&readable, 1, &[5, 16, 30, 33])
        .parse(&SHAPE)
        .action
    {
        Action::Unmap {
            ranges,
            exact: true,
        } => assert_eq!(
            ranges,
            [
                Range {
                    offset_bytes: 4096,
                    len_bytes: 8192
                },
                Range {
                    offset_bytes: 0,
                    len_bytes: 512
                }
            ]
        ),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_request_without_room_for_header_or_status_costs_only_itself() {
    let guest = Guest::new(&header(0, 0)[..15], 513, &[]);
    let parsed = guest.parse(&SHAPE);
    assert!(matches!(parsed.action, Action::Done(Status::IoErr)));
    assert_eq!(parsed.reply.write(Status::IoErr, false), 0);
    assert_eq!(guest.writable(513)[512], 1);

    let guest = Guest::new(&header(4, 0), 0, &[]);
    let parsed = guest.parse(&SHAPE);
    assert!(matches!(parsed.action, Action::Done(Status::IoErr)));
    assert_eq!(parsed.reply.write(Status::IoErr, false), 0);

    let guest = Guest::new(&[], 1, &[]);
    let parsed = guest.parse(&SHAPE);
    assert!(matches!(parsed.action, Action::Done(Status::IoErr)));
    assert_eq!(parsed.reply.write(Status::IoErr, false), 1);
}

#[test]
fn the_used_length_never_covers_bytes_that_were_not_written() {
    let guest = Guest::new(&header(0, 0), 1025, &[]);
    let reply = guest.parse(&SHAPE).reply;
    assert_eq!(reply.write(Status::IoErr, false), 0);
    assert_eq!(reply.write(Status::IoErr, true), 1025);
    assert_eq!(reply.write(Status::Ok, true), 1025);
}

#[test]
fn config_space_has_every_field_in_its_place() {
    let shape = DiskShape {
        size_bytes: 1 << 40,
        logical_block_bytes: 512,
        read_only: false,
        queues: 64,
    };
    let space = config_space(&shape, true);
    let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), 1 << 31);
    assert_eq!(
        (u32_at(8), u32_at(12), u32_at(20)),
        (SIZE_MAX_BYTES, SEG_MAX, 512)
    );
    assert_eq!(space[16..20], [0xff, 0x3f, 16, 63]);
    assert_eq!(space[24..32], [3, 0, 8, 0, 8, 0, 0, 0]);
    assert_eq!((space[32], space[34], space[35]), (1, 64, 0));
    assert_eq!(
        (u32_at(36), u32_at(40), u32_at(44)),
        (MAX_UNMAP_SECTORS, 32, 8)
    );
    assert_eq!(
        (u32_at(48), u32_at(52), space[56]),
        (MAX_UNMAP_SECTORS, 32, 1)
    );
    assert!(space[57..].iter().all(|&b| b == 0));
    assert_eq!(config_space(&shape, false)[32], 0);
    let large = config_space(
        &DiskShape {
            logical_block_bytes: 4096,
            ..shape
        },
        true,
    );
    assert_eq!(large[24..32], [0, 0, 1, 0, 1, 0, 0, 0]);
}

#[test]
fn only_read_only_disks_offer_ro() {
    assert_eq!(offered_features(&SHAPE) & F_RO, 0);
    let shape = DiskShape {
        read_only: true,
        ..SHAPE
    };
    assert_eq!(offered_features(&shape), offered_features(&SHAPE) | F_RO);
    assert_eq!(
        offered_features(&SHAPE) & (1 << 30),
        0,
        "bit 30 is vhost-user's own"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// However a write or a read is cut into descriptors, the same bytes go to the same place.
    #[test]
    fn any_cut_of_a_request_means_the_same(
        write in any::<bool>(),
        sector in 0u64..2200,
        sectors in 0u64..20,
        ragged in prop_oneof![4 => Just(0u64), 1 => 1u64..512],
        cuts in prop::collection::vec(0u64..12_000, 0..20),
        seed in any::<u64>(),
    ) {
        let len = sectors * 512 + ragged;
        let mut rng = Rng(seed);
        let data: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
        let guest = if write {
            Guest::new(&[header(1, sector), data.clone()].concat(), 1, &cuts)
        } else {
            Guest::new(&header(0, sector), len + 1, &cuts)
        };
        let parsed = guest.parse(&SHAPE);
        let inside = ragged == 0 && sector + sectors <= SIZE_BYTES / 512;
        match parsed.action {
            Action::Write { offset_bytes, from } => {
                prop_assert!(write && inside);
                prop_assert_eq!(offset_bytes, sector * 512);
                let mut seen = vec![0; total(&from) as usize];
                let mut done = 0;
                for piece in &from {
                    piece.copy_to(&mut seen[done..done + piece.len()]);
                    done += piece.len();
                }
                prop_assert_eq!(seen, data);
                prop_assert_eq!(parsed.reply.write(Status::Ok, true), 1);
            }
            Action::Read { offset_bytes, into } => {
                prop_assert!(!write && inside);
                prop_assert_eq!(offset_bytes, sector * 512);
                prop_assert_eq!(total(&into), len);
                let mut done = 0;
                for piece in &into {
                    piece.copy_from(&data[done..done + piece.len()]);
                    done += piece.len();
                }
                prop_assert_eq!(u64::from(parsed.reply.write(Status::Ok, true)), len + 1);
                let seen = guest.writable(len + 1);
                prop_assert_eq!(&seen[..len as usize], &data[..]);
                prop_assert_eq!(seen[len as usize], 0);
            }
            Action::Done(Status::IoErr) => prop_assert!(!inside),
            other => prop_assert!(false, "{:?}", other),
        }
    }
}
