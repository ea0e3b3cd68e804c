//! A leaf of any form agrees with an array.

use proptest::prelude::*;
use proptest::test_runner::Config;

use super::super::leaf::{Form, Leaf};

#[derive(Clone, Debug)]
enum Change {
    Set { start: u32, len: u32, address: u64 },
    Clear { from: u32, to: u32 },
    Compact,
}

fn change() -> impl Strategy<Value = Change> {
    let address = prop_oneof![
        // Few, so that runs join; near, in 6 bytes, in 8 bytes.
        8 => (0u64..6).prop_map(|i| (1 << 13 | 1) + 700 * i),
        8 => (0u64..1100).prop_map(|i| 1 << 13 | (i + 1)),
        1 => Just((1 << 40) + 1u64),
        1 => Just((1 << 62) + 1u64),
    ];
    let len = prop_oneof![5 => Just(1u32), 3 => 2u32..12, 2 => 12u32..400];
    prop_oneof![
        12 => (0u32..1024, len, address).prop_map(|(start, len, address)| {
            let len = len.min(1024 - start);
            // Often where a sequential write would have put it.
            let address = if address % 2 == 0 { (1 << 13) + 1 + u64::from(start) } else { address };
            Change::Set { start, len, address }
        }),
        3 => (0u32..1024, 0u32..1025).prop_map(|(a, b)| Change::Clear { from: a.min(b), to: a.max(b) }),
        1 => Just(Change::Compact),
    ]
}

fn check(leaf: &Leaf, model: &[Option<(u64, u32)>]) {
    for (from, to) in [(0, 1024), (1, 1023), (100, 101), (500, 900)] {
        let mut got = vec![None; 1024];
        let mut at = from;
        leaf.pieces(from, to, |piece| {
            assert!(
                piece.start >= at && piece.len() > 0,
                "pieces ascend and are not empty"
            );
            for (i, crc) in piece.crcs.iter().enumerate() {
                let entry = (piece.address + i as u64, u32::from_le_bytes(*crc));
                got[piece.start as usize + i] = Some(entry);
            }
            at = piece.start + piece.len();
        });
        assert_eq!(
            &got[from as usize..to as usize],
            &model[from as usize..to as usize]
        );
    }
    let mapped = model.iter().flatten().count();
    assert_eq!(leaf.mapped() as usize, mapped);
    for from in [0, 17, 500, 1023] {
        let next = (from..1024).find(|&block| model[block as usize].is_some());
        assert_eq!(leaf.next_mapped(from), next);
    }
    if mapped > 0 {
        let again = Leaf::decode(
            leaf.form() as u8,
            leaf.width(),
            mapped,
            leaf.rows(),
            leaf.base(),
            leaf.table_bytes(),
        );
        assert_eq!(
            again.expect("a leaf's tables are valid").table_bytes(),
            leaf.table_bytes()
        );
    }
}

proptest! {
    #![proptest_config(Config { cases: 200, failure_persistence: None, ..Config::default() })]

    #[test]
    fn a_leaf_agrees_with_an_array(changes in proptest::collection::vec(change(), 1..120)) {
        let mut leaf = Leaf::empty();
        let mut model = vec![None; 1024];
        let mut crc = 0u32;
        for change in changes {
            let mut told = 0;
            match change {
                Change::Set { start, len, address } => {
                    let crcs: Vec<u32> = (0..len).map(|i| crc.wrapping_add(i)).collect();
                    crc = crc.wrapping_add(len);
                    let range = start as usize..(start + len) as usize;
                    let lost = model[range.clone()].iter().flatten().count() as u32;
                    prop_assert_eq!(leaf.set(start, address, &crcs, |_, n| told += n), lost);
                    prop_assert_eq!(told, lost);
                    for (i, block) in range.enumerate() {
                        model[block] = Some((address + i as u64, crcs[i]));
                    }
                }
                Change::Clear { from, to } => {
                    let range = from as usize..to as usize;
                    let lost = model[range.clone()].iter().flatten().count() as u32;
                    prop_assert_eq!(leaf.clear(from, to, |_, n| told += n), lost);
                    prop_assert_eq!(told, lost);
                    model[range].fill(None);
                }
                Change::Compact => leaf.compact(),
            }
            check(&leaf, &model);
        }
    }
}

fn address_of(i: u64) -> u64 {
    ((i / 4000 + 1) << 13) + 1 + i % 4000
}

#[test]
fn each_form_is_taken_where_it_is_smallest() {
    let mut sequential = Leaf::empty();
    for i in 0..1024 {
        sequential.set(i, address_of(u64::from(i)), &[i], |_, _| {});
    }
    assert_eq!((sequential.form(), sequential.rows()), (Form::Runs, 1));
    let mut scattered = Leaf::empty();
    for i in 0..40 {
        scattered.set(i * 25, address_of(u64::from(i) * 3), &[i], |_, _| {});
    }
    assert_eq!(scattered.form(), Form::Sparse);
    let mut shuffled = Leaf::empty();
    for i in 0..1024 {
        shuffled.set(i * 641 % 1024, address_of(u64::from(i)), &[i], |_, _| {});
    }
    assert_eq!(shuffled.form(), Form::Dense);
    shuffled.clear(10, 1024, |_, _| {});
    assert_ne!(shuffled.form(), Form::Dense);
    assert!(shuffled.buffer_bytes() < 256);
    // Written over from start to end, it is sequential again when it is next written.
    let mut overwritten = Leaf::empty();
    for i in 0..1024 {
        overwritten.set(i * 641 % 1024, address_of(u64::from(i)), &[i], |_, _| {});
    }
    for i in 0..1024 {
        overwritten.set(i, address_of(4096 + u64::from(i)), &[i], |_, _| {});
    }
    overwritten.compact();
    assert_eq!(overwritten.form(), Form::Runs);
}
