//! What the ring promises: each rule of virtio 1.3, 2.7 with a chain that keeps it and one that
//! breaks it, memory tables that are refused, and memory that is taken away.

use proptest::prelude::*;

use super::testing::*;
use super::*;
use crate::io::IoBuf;

const ALL: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

fn pop(queue: &mut SplitQueue) -> Result<Option<Chain>, QueueError> {
    let mut chain = Chain::new();
    Ok(queue.pop(&mut chain)?.then_some(chain))
}

fn desc(address: u64, len: u32, flags: u16) -> Desc {
    Desc {
        address,
        len,
        flags,
        next: 0,
    }
}

fn bytes_of(pieces: &[IoBuf]) -> Vec<u8> {
    let mut out = Vec::new();
    for piece in pieces {
        let at = out.len();
        out.resize(at + piece.len(), 0);
        piece.copy_to(&mut out[at..]);
    }
    out
}

fn broken(descs: &[Desc], features: u64) -> QueueError {
    let mut driver = Driver::new(8, features);
    driver.describe_chain(0, descs);
    let mut queue = driver.queue();
    driver.offer(0);
    let error = pop(&mut queue).unwrap_err();
    assert_eq!(
        queue.next_available(),
        0,
        "a chain that was refused was not taken"
    );
    error
}

// --- memory tables ---------------------------------------------------------------------------

#[test]
fn overlapping_regions_are_refused_and_adjacent_ones_are_not() {
    let file = memfd(4 * MIB);
    let memory =
        GuestMemory::new(vec![region(MIB, MIB, &file), region(2 * MIB, MIB, &file)]).unwrap();
    for (at, size) in [
        (MIB, MIB),
        (0, MIB + 1),
        (2 * MIB - 1, 1),
        (0, 4 * MIB),
        (3 * MIB - 1, 2),
    ] {
        let refused = memory.with_region(&region(at, size, &file));
        assert!(
            matches!(refused, Err(MemoryError::Overlap { .. })),
            "{at:#x} {size:#x}"
        );
    }
    assert_eq!(memory.with_region(&region(0, MIB, &file)).unwrap().len(), 3);
    assert_eq!(memory.len(), 2, "a table never changes");
}

#[test]
fn regions_that_are_empty_wrap_or_leave_their_file_are_refused() {
    let file = memfd(MIB);
    let one = |change: fn(&mut RegionSpec)| {
        let mut spec = region(0, MIB, &file);
        change(&mut spec);
        GuestMemory::new(vec![spec]).unwrap_err()
    };
    assert!(matches!(
        one(|s| s.size_bytes = 0),
        MemoryError::ZeroSize { .. }
    ));
    assert!(matches!(
        one(|s| s.guest_address = u64::MAX - 4096),
        MemoryError::WrapAround { .. }
    ));
    assert!(matches!(
        one(|s| s.user_address = u64::MAX - 4096),
        MemoryError::WrapAround { .. }
    ));
    assert!(matches!(
        one(|s| s.mmap_offset_bytes = u64::MAX - 4096),
        MemoryError::WrapAround { .. }
    ));
    assert!(matches!(
        one(|s| s.mmap_offset_bytes = 1),
        MemoryError::BeyondFile { .. }
    ));
    assert!(matches!(
        one(|s| s.size_bytes = MIB + 1),
        MemoryError::BeyondFile { .. }
    ));
}

#[test]
fn a_descriptor_that_is_not_a_file_is_refused() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let mut spec = region(0, MIB, &memfd(MIB));
    spec.file = reader.into();
    assert!(matches!(
        GuestMemory::new(vec![spec]),
        Err(MemoryError::NotMemory { .. })
    ));
}

#[test]
fn the_region_limit_is_509() {
    let file = memfd(4096);
    let specs = |n: u64| {
        (0..n)
            .map(|i| region(i * 4096, 4096, &file))
            .collect::<Vec<_>>()
    };
    assert!(matches!(
        GuestMemory::new(specs(510)),
        Err(MemoryError::TooManyRegions { count: 510 })
    ));
    let full = GuestMemory::new(specs(509)).unwrap();
    let more = full.with_region(&region(MIB * 64, 4096, &file));
    assert!(matches!(more, Err(MemoryError::TooManyRegions { .. })));
}

#[test]
fn an_unaligned_mmap_offset_maps_the_right_bytes() {
    let file = memfd(3 * 4096);
    let mut spec = region(0x1000, 4096, &file);
    spec.mmap_offset_bytes = 4096 + 512;
    let memory = GuestMemory::new(vec![spec]).unwrap();
    write_guest(&memory, 0x1000, b"first");
    write_guest(&memory, 0x1fff, b"l");
    let mut seen = [0; 5];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, 4096 + 512).unwrap();
    assert_eq!(&seen, b"first");
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen[..1], 2 * 4096 + 511).unwrap();
    assert_eq!(seen[0], b'l');
}

#[test]
fn translation_follows_adjacent_regions_and_stops_at_gaps() {
    let memory = guest_memory();
    let mut pieces = Vec::new();
    memory.translate(2 * MIB - 100, 300, &mut pieces).unwrap();
    assert_eq!(
        pieces.iter().map(IoBuf::len).collect::<Vec<_>>(),
        [100, 200]
    );
    for (address, len) in [
        (3 * MIB - 1, 2),
        (3 * MIB, 1),
        (8 * MIB - 1, 1),
        (9 * MIB, 1),
        (u64::MAX, 1),
        (0, u64::MAX),
    ] {
        let refused = memory.translate(address, len, &mut Vec::new());
        assert!(
            matches!(refused, Err(MemoryError::OutsideGuest { .. })),
            "{address:#x} {len}"
        );
    }
}

#[test]
fn user_ranges_lie_in_one_region_or_nowhere() {
    let memory = guest_memory();
    assert_eq!(
        memory
            .user_range(USER_BASE + 2 * MIB - 16, 16)
            .unwrap()
            .len(),
        16
    );
    for (address, len) in [
        (USER_BASE + 2 * MIB - 16, 17),
        (USER_BASE - 1, 1),
        (u64::MAX, 1),
        (USER_BASE, u64::MAX),
    ] {
        assert!(
            memory.user_range(address, len).is_err(),
            "{address:#x} {len}"
        );
    }
}

#[test]
fn removing_a_region_needs_its_exact_description() {
    let memory = guest_memory();
    assert!(
        memory
            .without_region(8 * MIB, USER_BASE + 8 * MIB, MIB - 1)
            .is_err()
    );
    assert!(memory.without_region(8 * MIB, USER_BASE, MIB).is_err());
    let less = memory
        .without_region(8 * MIB, USER_BASE + 8 * MIB, MIB)
        .unwrap();
    assert!(less.translate(8 * MIB, 1, &mut Vec::new()).is_err());
    assert!(
        memory.translate(8 * MIB, 1, &mut Vec::new()).is_ok(),
        "the old table still holds its memory"
    );
}

#[test]
fn truncated_memory_reads_as_zeroes_and_is_reported_lost() {
    let (kept, doomed) = (memfd(MIB), memfd(MIB));
    let memory = GuestMemory::new(vec![region(0, MIB, &kept), region(MIB, MIB, &doomed)]).unwrap();
    write_guest(&memory, MIB + 4096, b"gone");
    write_guest(&memory, 0, b"kept");
    assert_eq!(memory.lost(), None);
    let before = losses();
    truncate(&doomed);
    assert_eq!(read_guest(&memory, MIB + 4096, 4), [0; 4]);
    write_guest(&memory, 2 * MIB - 1, &[1]);
    assert_eq!(memory.lost(), Some(MIB));
    assert!(losses() > before);
    assert_eq!(read_guest(&memory, 0, 4), b"kept");
    drop(memory);
    let again = GuestMemory::new(vec![region(0, MIB, &kept)]).unwrap();
    assert_eq!(
        again.lost(),
        None,
        "a new mapping in a slot used before is not lost"
    );
}

#[test]
fn a_bus_error_outside_guest_memory_still_ends_the_process() {
    let _installed = guest_memory();
    let file = memfd(4096);
    // SAFETY: the child calls nothing but mmap, ftruncate and alarm before it touches the page;
    // the parent only waits for it.
    let status = unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            libc::alarm(20);
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            let page = libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd,
                0,
            );
            libc::ftruncate(fd, 0);
            let byte = page.cast::<u8>().read_volatile();
            libc::_exit(i32::from(byte));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        status
    };
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS,
        "status {status:#x}"
    );
}

// --- starting a queue ------------------------------------------------------------------------

#[test]
fn queue_sizes_are_powers_of_two_up_to_32768() {
    for size in [1, 2, 256, 1024, 32768] {
        Driver::new(size, ALL).queue();
    }
    for size in [0, 3, 1000, 32767, 65536, u32::MAX] {
        let driver = Driver::new(size, ALL);
        let refused = SplitQueue::new(driver.memory.clone(), driver.config(), 0);
        assert!(matches!(refused, Err(QueueError::Size { .. })), "{size}");
    }
}

#[test]
fn a_ring_outside_memory_or_misaligned_is_refused() {
    let driver = Driver::new(8, ALL);
    let start = |change: fn(&mut QueueConfig)| {
        let mut config = driver.config();
        change(&mut config);
        SplitQueue::new(driver.memory.clone(), config, 0).unwrap_err()
    };
    assert!(matches!(
        start(|c| c.descriptor_address += 8),
        QueueError::Misaligned { align: 16, .. }
    ));
    assert!(matches!(
        start(|c| c.available_address += 1),
        QueueError::Misaligned { align: 2, .. }
    ));
    assert!(matches!(
        start(|c| c.used_address += 2),
        QueueError::Misaligned { align: 4, .. }
    ));
    assert!(matches!(
        start(|c| c.descriptor_address = 0),
        QueueError::OutsideMemory { .. }
    ));
    // The event index after the last element counts as part of the ring.
    assert!(matches!(
        start(|c| c.used_address = USER_BASE + 2 * MIB - 68),
        QueueError::OutsideMemory { .. }
    ));
    assert!(matches!(
        start(|c| c.available_address = u64::MAX - 1),
        QueueError::OutsideMemory { .. }
    ));
}

#[test]
fn the_used_index_starts_from_the_ring() {
    let mut driver = Driver::new(8, ALL);
    driver.start_at(65535);
    let mut queue = driver.queue();
    driver.describe_chain(0, &[desc(DATA_ADDRESS, 1, WRITE)]);
    driver.offer(0);
    assert!(pop(&mut queue).unwrap().is_some());
    queue.push(0, 1);
    assert_eq!(
        driver.used_index(),
        65535,
        "nothing is visible before it is published"
    );
    queue.publish();
    assert_eq!(driver.used_index(), 0);
    assert_eq!(driver.used_element(65535), (0, 1));
    assert_eq!(queue.next_available(), 0);
}

// --- popping ---------------------------------------------------------------------------------

#[test]
fn an_index_jump_beyond_the_queue_size_breaks_the_ring() {
    let driver = Driver::new(8, ALL);
    let mut queue = driver.queue();
    driver.store_available_index(8);
    assert_eq!(queue.available().unwrap(), 8);
    driver.store_available_index(9);
    assert!(matches!(
        queue.available(),
        Err(QueueError::IndexJump { ahead: 9, .. })
    ));
    driver.store_available_index(65535);
    assert!(
        matches!(queue.available(), Err(QueueError::IndexJump { .. })),
        "backwards"
    );
}

#[test]
fn an_empty_ring_gives_nothing() {
    let driver = Driver::new(8, ALL);
    assert!(pop(&mut driver.queue()).unwrap().is_none());
}

#[test]
fn loops_end_with_an_error() {
    let mut driver = Driver::new(8, ALL);
    for i in 0..8 {
        driver.describe(
            i,
            Desc {
                flags: NEXT,
                next: (i + 1) % 8,
                ..desc(DATA_ADDRESS, 1, 0)
            },
        );
    }
    let mut queue = driver.queue();
    driver.offer(3);
    assert!(matches!(pop(&mut queue), Err(QueueError::Loop { head: 3 })));
}

#[test]
fn a_chain_of_exactly_the_queue_size_is_taken() {
    let mut driver = Driver::new(8, ALL);
    driver.describe_chain(0, &[desc(DATA_ADDRESS, 1, 0); 8]);
    let mut queue = driver.queue();
    driver.offer(0);
    assert_eq!(pop(&mut queue).unwrap().unwrap().readable().len(), 8);
}

#[test]
fn heads_and_nexts_outside_the_table_break_the_ring() {
    let mut driver = Driver::new(8, ALL);
    let mut queue = driver.queue();
    driver.offer(8);
    assert!(matches!(
        pop(&mut queue),
        Err(QueueError::DescriptorIndex { index: 8, count: 8 })
    ));
    let mut driver = Driver::new(8, ALL);
    driver.describe(
        0,
        Desc {
            flags: NEXT,
            next: 65535,
            ..desc(DATA_ADDRESS, 1, 0)
        },
    );
    let mut queue = driver.queue();
    driver.offer(0);
    assert!(matches!(
        pop(&mut queue),
        Err(QueueError::DescriptorIndex { index: 65535, .. })
    ));
}

#[test]
fn descriptors_outside_memory_empty_or_in_the_wrong_order_break_the_ring() {
    assert!(matches!(
        broken(&[desc(3 * MIB - 1, 2, 0)], ALL),
        QueueError::Address { .. }
    ));
    assert!(matches!(
        broken(&[desc(u64::MAX, 2, WRITE)], ALL),
        QueueError::Address { .. }
    ));
    assert!(matches!(
        broken(&[desc(0, u32::MAX, 0)], ALL),
        QueueError::Address { .. }
    ));
    assert!(matches!(
        broken(&[desc(DATA_ADDRESS, 0, 0)], ALL),
        QueueError::ZeroLength { .. }
    ));
    let backwards = [desc(DATA_ADDRESS, 1, WRITE), desc(DATA_ADDRESS, 1, 0)];
    assert!(matches!(
        broken(&backwards, ALL),
        QueueError::Direction { .. }
    ));
}

#[test]
fn chains_with_too_many_pieces_break_the_ring() {
    let mut driver = Driver::new(2048, ALL);
    driver.describe_chain(0, &vec![desc(DATA_ADDRESS, 1, 0); MAX_CHAIN_PIECES + 1]);
    let mut queue = driver.queue();
    driver.offer(0);
    assert!(matches!(
        pop(&mut queue),
        Err(QueueError::TooLong { head: 0 })
    ));
    driver.describe_chain(0, &vec![desc(DATA_ADDRESS, 1, 0); MAX_CHAIN_PIECES]);
    assert_eq!(
        pop(&mut queue).unwrap().unwrap().readable().len(),
        MAX_CHAIN_PIECES
    );
}

// --- indirect tables -------------------------------------------------------------------------

fn write_table(driver: &Driver, address: u64, descs: &[Desc]) {
    for (i, desc) in descs.iter().enumerate() {
        write_guest(&driver.memory, address + 16 * i as u64, &desc.bytes());
    }
}

fn indirect(table: &[Desc], len: u32, flags: u16, features: u64) -> Result<Chain, QueueError> {
    let mut driver = Driver::new(8, features);
    write_table(&driver, DATA_ADDRESS, table);
    driver.describe(0, desc(DATA_ADDRESS, len, INDIRECT | flags));
    let mut queue = driver.queue();
    driver.offer(0);
    pop(&mut queue).map(|chain| chain.unwrap())
}

#[test]
fn indirect_tables_keep_their_rules() {
    let ok = [
        Desc {
            flags: NEXT,
            next: 1,
            ..desc(8 * MIB, 16, 0)
        },
        desc(8 * MIB, 1, WRITE),
    ];
    let chain = indirect(&ok, 32, 0, ALL).unwrap();
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (16, 1));
    // The WRITE flag of the descriptor that names the table means nothing (2.7.5.3.2).
    assert!(indirect(&ok, 32, WRITE, ALL).is_ok());
    assert!(matches!(
        indirect(&ok, 32, NEXT, ALL),
        Err(QueueError::IndirectWithNext { .. })
    ));
    assert!(matches!(
        indirect(&ok, 32, 0, F_VERSION_1),
        Err(QueueError::IndirectNotNegotiated { .. })
    ));
    for len in [0, 15, 17, u32::MAX, 16 * 65537] {
        assert!(
            matches!(
                indirect(&ok, len, 0, ALL),
                Err(QueueError::IndirectLength { .. })
            ),
            "{len}"
        );
    }
    // One entry only: `next` points beyond it.
    assert!(matches!(
        indirect(&ok, 16, 0, ALL),
        Err(QueueError::DescriptorIndex { index: 1, count: 1 })
    ));
    let nested = [desc(DATA_ADDRESS, 16, INDIRECT)];
    assert!(matches!(
        indirect(&nested, 16, 0, ALL),
        Err(QueueError::IndirectNested { .. })
    ));
    let looped = [Desc {
        flags: NEXT,
        next: 0,
        ..desc(DATA_ADDRESS, 1, 0)
    }];
    assert!(matches!(
        indirect(&looped, 16, 0, ALL),
        Err(QueueError::Loop { .. })
    ));
}

#[test]
fn an_indirect_table_may_cross_regions_but_not_leave_memory() {
    let mut driver = Driver::new(8, ALL);
    let at = 2 * MIB - 8;
    write_table(
        &driver,
        at,
        &[
            Desc {
                flags: NEXT,
                next: 1,
                ..desc(8 * MIB, 16, 0)
            },
            desc(8 * MIB, 1, WRITE),
        ],
    );
    driver.describe(0, desc(at, 32, INDIRECT));
    driver.describe(1, desc(3 * MIB - 8, 16, INDIRECT));
    driver.describe(2, desc(u64::MAX - 7, 16, INDIRECT));
    let mut queue = driver.queue();
    driver.offer(0);
    assert_eq!(pop(&mut queue).unwrap().unwrap().writable_bytes(), 1);
    driver.offer(1);
    assert!(matches!(pop(&mut queue), Err(QueueError::Address { .. })));
    let mut queue = driver.queue();
    driver.offer(2);
    assert!(matches!(pop(&mut queue), Err(QueueError::Address { .. })));
}

// --- notifications ---------------------------------------------------------------------------

#[test]
fn without_event_idx_the_flags_decide() {
    let mut driver = Driver::new(8, F_VERSION_1);
    driver.describe_chain(0, &[desc(DATA_ADDRESS, 1, WRITE)]);
    let mut queue = driver.queue();
    queue.disable_notifications();
    assert_eq!(driver.used_flags(), 1);
    assert!(!queue.enable_notifications().unwrap());
    assert_eq!(driver.used_flags(), 0);
    driver.offer(0);
    assert!(
        queue.enable_notifications().unwrap(),
        "what came before we asked is found by looking again"
    );
    pop(&mut queue).unwrap().unwrap();
    queue.push(0, 1);
    queue.publish();
    assert!(queue.needs_notify(true));
    driver.store_available_flags(1);
    assert!(!queue.needs_notify(true));
}

#[test]
fn with_event_idx_the_driver_is_told_exactly_at_its_index() {
    let mut driver = Driver::new(8, ALL);
    driver.start_at(65530);
    driver.describe_chain(0, &[desc(DATA_ADDRESS, 1, WRITE)]);
    let mut queue = driver.queue();
    let mut told = Vec::new();
    driver.store_used_event(65533);
    for i in 0..8u16 {
        driver.offer(0);
        pop(&mut queue).unwrap().unwrap();
        queue.push(0, 1);
        queue.publish();
        if queue.needs_notify(true) {
            told.push(65530u16.wrapping_add(i));
        }
    }
    // The first one always: what the driver was told before is not known.
    assert_eq!(told, [65530, 65533]);
    assert!(!queue.enable_notifications().unwrap());
    assert_eq!(driver.available_event(), 65530u16.wrapping_add(8));
}

#[test]
fn one_notification_covers_a_batch_that_passes_the_event_index() {
    let mut driver = Driver::new(8, ALL);
    driver.describe_chain(0, &[desc(DATA_ADDRESS, 1, WRITE)]);
    let mut queue = driver.queue();
    assert!(queue.needs_notify(false));
    driver.store_used_event(2);
    for _ in 0..5 {
        driver.offer(0);
        pop(&mut queue).unwrap().unwrap();
        queue.push(0, 1);
    }
    queue.publish();
    assert!(queue.needs_notify(false));
    assert!(!queue.needs_notify(false));
}

#[test]
fn notify_on_empty_overrides_suppression_when_all_is_done() {
    let mut driver = Driver::new(8, F_NOTIFY_ON_EMPTY);
    driver.store_available_flags(1);
    driver.describe_chain(0, &[desc(DATA_ADDRESS, 1, WRITE)]);
    let mut queue = driver.queue();
    driver.offer(0);
    pop(&mut queue).unwrap().unwrap();
    queue.push(0, 1);
    queue.publish();
    assert!(!queue.needs_notify(false));
    assert!(queue.needs_notify(true));
}

// --- against a model -------------------------------------------------------------------------

/// A piece of a chain as the model sees it: length, and whether it is writable is given by place.
fn lengths(max_pieces: usize) -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(1u32..9000, 0..max_pieces)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_layout_of_a_chain_reads_and_writes_the_same_bytes(
        readable in lengths(8),
        writable in lengths(8),
        direct in 0usize..17,
        start in any::<u16>(),
        seed in any::<u64>(),
    ) {
        prop_assume!(!readable.is_empty() || !writable.is_empty());
        let mut driver = Driver::new(32, ALL);
        driver.start_at(start);
        let mut rng = Rng(seed);
        // Data lies back to back with gaps, across the border of two regions.
        let mut at = 2 * MIB - 20_000;
        let mut model = Vec::new();
        let mut descs = Vec::new();
        for (i, &len) in readable.iter().chain(&writable).enumerate() {
            at += rng.below(100);
            let flags = if i < readable.len() { 0 } else { WRITE };
            if flags == 0 {
                let bytes: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
                write_guest(&driver.memory, at, &bytes);
                model.extend(bytes);
            }
            descs.push(desc(at, len, flags));
            at += u64::from(len);
        }
        // The first `direct` descriptors in the ring's table, the others in an indirect one.
        let direct = direct.min(descs.len());
        let (ring, table) = descs.split_at(direct);
        let mut ring = ring.to_vec();
        if !table.is_empty() {
            let table_at = 8 * MIB + rng.below(1000);
            for (i, entry) in table.iter().enumerate() {
                let more = i + 1 < table.len();
                let flags = entry.flags | if more { NEXT } else { 0 };
                let entry = Desc { flags, next: if more { i as u16 + 1 } else { 7 }, ..*entry };
                write_guest(&driver.memory, table_at + 16 * i as u64, &entry.bytes());
            }
            ring.push(desc(table_at, 16 * table.len() as u32, INDIRECT));
        }
        let first = rng.below(32 - ring.len() as u64 + 1) as u16;
        driver.describe_chain(first, &ring);
        let mut queue = driver.queue();
        driver.offer(first);
        let chain = pop(&mut queue).unwrap().unwrap();
        prop_assert_eq!(chain.head(), first);
        prop_assert_eq!(chain.readable_bytes(), model.len() as u64);
        prop_assert_eq!(bytes_of(chain.readable()), model);
        prop_assert_eq!(chain.writable_bytes(), writable.iter().map(|&n| u64::from(n)).sum::<u64>());
        let mut expected = Vec::new();
        for piece in chain.writable() {
            let bytes: Vec<u8> = (0..piece.len()).map(|_| rng.next() as u8).collect();
            piece.copy_from(&bytes);
            expected.extend(bytes);
        }
        let mut seen = Vec::new();
        for d in &descs[readable.len()..] {
            seen.extend(read_guest(&driver.memory, d.address, d.len as usize));
        }
        prop_assert_eq!(seen, expected);
        prop_assert!(pop(&mut queue).unwrap().is_none());
    }
}
