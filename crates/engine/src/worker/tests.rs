//! What a worker promises to guests, front-ends and the daemon.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::testing::*;
use super::*;
use crate::io::IoBuf;
use crate::request::F_FLUSH;
use crate::ring::testing::*;
use crate::ring::{F_EVENT_IDX, GuestMemory, MemoryError};

#[test]
fn a_kicked_request_is_answered_and_notified() {
    for features in [FEATURES, FEATURES | F_EVENT_IDX] {
        let mut bench = Bench::new(features, false);
        let data: Vec<u8> = (0..1024).map(|i| i as u8).collect();
        bench.offer(0, &[header(1, 4), data.clone()].concat(), 1);
        bench.kick.signal();
        bench.wait_used(1);
        assert_eq!(bench.driver.used_element(0), (0, 1));
        assert_eq!(bench.answer(0, 1), [0]);
        bench.offer(1, &header(0, 4), 1025);
        bench.driver.store_used_event(1);
        bench.kick.signal();
        bench.wait_used(2);
        assert_eq!(bench.driver.used_element(1), (4, 1025));
        assert_eq!(bench.answer(1, 1025), [data, vec![0]].concat());
        assert_eq!(
            bench.worker.read(bench.volume, 2048, 512).unwrap(),
            (0..512).map(|i| i as u8).collect::<Vec<_>>()
        );
    }
}

#[test]
fn a_queue_without_kick_is_polled() {
    let mut bench = Bench::new(FEATURES, true);
    bench.offer(0, &header(4, 0), 1);
    bench.wait_used(1);
    assert_eq!(bench.control.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn many_requests_through_a_small_ring_all_come_back() {
    let mut bench = Bench::new(FEATURES | F_EVENT_IDX, false);
    let mut rng = Rng(11);
    let mut used = 0u16;
    for _ in 0..300 {
        let batch = 1 + rng.below(4) as u16;
        for slot in 0..batch {
            bench.offer(slot, &header(0, rng.below(2000)), 513);
        }
        // As a driver: the event index is where the batch ends, so one notification comes.
        used = used.wrapping_add(batch);
        bench.driver.store_used_event(used.wrapping_sub(1));
        bench.kick.signal();
        bench.wait_used(used);
        for slot in 0..batch {
            assert_eq!(bench.answer(slot, 513)[512], 0);
        }
    }
}

#[test]
fn a_failed_read_shows_zeroes_and_ioerr() {
    let mut bench = Bench::new(FEATURES, false);
    bench.worker.write(bench.volume, 0, &[0x55; 4096]).unwrap();
    bench.control.fail.store(true, Ordering::SeqCst);
    bench.offer(0, &header(0, 0), 4097);
    bench.kick.signal();
    bench.wait_used(1);
    assert_eq!(bench.answer(0, 4097), [vec![0; 4096], vec![1]].concat());
    assert!(matches!(
        bench.worker.read(bench.volume, 0, 512),
        Err(CommandError::Failed(_))
    ));
}

#[test]
fn a_discard_of_many_segments_is_one_answer() {
    let mut bench = Bench::new(FEATURES, false);
    let segment = |sector: u64| [&sector.to_le_bytes()[..], &8u32.to_le_bytes(), &[0; 4]].concat();
    bench.offer(
        0,
        &[header(11, 0), segment(8), segment(64), segment(8)].concat(),
        1,
    );
    bench.kick.signal();
    bench.wait_used(1);
    assert_eq!(bench.answer(0, 1), [0]);
    let unmaps = bench.control.unmaps.lock().unwrap().clone();
    assert_eq!(
        unmaps,
        [
            (4096, 4096, false),
            (32768, 4096, false),
            (4096, 4096, false)
        ]
    );
}

#[test]
fn stopping_a_queue_waits_for_what_was_taken_and_tells_the_next_index() {
    let mut bench = Bench::new(FEATURES, false);
    bench.control.hold.store(true, Ordering::SeqCst);
    for slot in 0..3 {
        bench.offer(slot, &header(0, 0), 513);
    }
    bench.kick.signal();
    bench.wait_submitted(3);
    let answers = std::thread::scope(|scope| {
        let stop = scope.spawn(|| bench.worker.stop_queue(bench.export, 0));
        for _ in 0..50 {
            bench.worker.stats().unwrap();
        }
        assert!(!stop.is_finished(), "stopped with requests in flight");
        assert_eq!(bench.driver.used_index(), 0);
        bench.control.hold.store(false, Ordering::SeqCst);
        stop.join().unwrap()
    });
    assert_eq!(answers.unwrap(), 3);
    assert_eq!(bench.driver.used_index(), 3);
    assert_eq!(
        bench.worker.stop_queue(bench.export, 0).unwrap(),
        3,
        "a stopped queue keeps its index"
    );
    bench.offer(0, &header(4, 0), 1);
    bench.start(3, false).unwrap();
    bench.wait_used(4);
}

#[test]
fn a_broken_ring_stops_alone_and_is_reported() {
    let mut bench = Bench::new(FEATURES, false);
    bench.driver.store_available_index(1000);
    bench.kick.signal();
    bench.wait_event(|event| {
        matches!(event, Event::RingBroken { export: 9, queue: 0, reason } if reason.contains("1000"))
    });
    assert!(readable(bench.error.raw()));
    assert_eq!(bench.worker.stop_queue(bench.export, 0).unwrap(), 0);
    // After a reset it serves again.
    bench.driver.start_at(0);
    bench.start(0, false).unwrap();
    bench.offer(0, &header(4, 0), 1);
    bench.kick.signal();
    bench.wait_used(1);
}

#[test]
fn a_guest_that_offers_without_end_is_bounded_by_the_queue_size() {
    let mut bench = Bench::new(FEATURES, false);
    bench.control.hold.store(true, Ordering::SeqCst);
    bench.offer(0, &header(0, 0), 513);
    // Every entry of the ring names chain 0, as memory begins as zeroes.
    bench.driver.store_available_index(16);
    bench.kick.signal();
    bench.wait_submitted(16);
    // 16 in flight and 16 more offered: legal by the index, and more than the ring holds.
    bench.driver.store_available_index(32);
    bench.kick.signal();
    for _ in 0..10 {
        bench.worker.stats().unwrap();
    }
    assert_eq!(bench.control.submitted.load(Ordering::SeqCst), 16);
    bench.control.hold.store(false, Ordering::SeqCst);
    bench.wait_submitted(32);
}

#[test]
fn truncated_memory_stops_the_session_and_is_reported() {
    let mut bench = Bench::new(FEATURES, false);
    bench.worker.stop_queue(bench.export, 0).unwrap();
    let (rings, data) = (memfd(2 * MIB), memfd(MIB));
    let specs = vec![region(0, 2 * MIB, &rings), region(2 * MIB, MIB, &data)];
    bench.driver.memory = Arc::new(GuestMemory::new(specs).unwrap());
    bench
        .worker
        .set_memory(bench.export, bench.driver.memory.clone())
        .unwrap();
    bench.driver.start_at(0);
    bench.start(0, false).unwrap();
    let write = [
        Desc {
            address: DATA_ADDRESS,
            len: 16,
            flags: 0,
            next: 0,
        },
        Desc {
            address: 2 * MIB,
            len: 513,
            flags: WRITE,
            next: 0,
        },
    ];
    write_guest(&bench.driver.memory, DATA_ADDRESS, &header(0, 0));
    bench.driver.describe_chain(0, &write);
    truncate(&data);
    bench.driver.offer(0);
    bench.kick.signal();
    bench.wait_event(|event| matches!(event, Event::MemoryLost { export: 9, .. }));
    assert!(readable(bench.error.raw()));
    bench.worker.close_export(bench.export).unwrap();
}

#[test]
fn memory_in_use_outlives_its_removal() {
    let mut bench = Bench::new(FEATURES, false);
    bench.control.hold.store(true, Ordering::SeqCst);
    let read = [
        Desc {
            address: DATA_ADDRESS,
            len: 16,
            flags: 0,
            next: 0,
        },
        Desc {
            address: 8 * MIB,
            len: 513,
            flags: WRITE,
            next: 0,
        },
    ];
    write_guest(&bench.driver.memory, DATA_ADDRESS, &header(0, 0));
    bench.driver.describe_chain(0, &read);
    bench.driver.offer(0);
    bench.kick.signal();
    bench.wait_submitted(1);
    let less = bench
        .driver
        .memory
        .without_region(8 * MIB, USER_BASE + 8 * MIB, MIB)
        .unwrap();
    let less = Arc::new(less);
    let old = Arc::downgrade(&std::mem::replace(&mut bench.driver.memory, less.clone()));
    bench.worker.set_memory(bench.export, less).unwrap();
    assert!(
        old.upgrade().is_some(),
        "a request in flight holds its memory"
    );
    bench.control.hold.store(false, Ordering::SeqCst);
    bench.wait_used(1);
    bench.worker.stats().unwrap();
    assert!(old.upgrade().is_none(), "and nothing else does");
}

#[test]
fn memory_without_a_running_ring_is_refused() {
    let mut bench = Bench::new(FEATURES, false);
    let elsewhere = Arc::new(GuestMemory::new(vec![region(8 * MIB, MIB, &memfd(MIB))]).unwrap());
    assert!(matches!(
        bench.worker.set_memory(bench.export, elsewhere),
        Err(CommandError::Moved(_))
    ));
    bench.offer(0, &header(4, 0), 1);
    bench.kick.signal();
    bench.wait_used(1);
}

#[test]
fn writes_are_write_through_without_flush_or_with_the_cache_off() {
    for (features, cache, expected) in [
        (FEATURES, true, 0),
        (FEATURES, false, 1),
        (FEATURES & !F_FLUSH, true, 1),
    ] {
        let mut bench = Bench::new(features, false);
        bench.worker.set_write_cache(bench.export, cache).unwrap();
        bench.offer(0, &[header(1, 0), vec![0; 512]].concat(), 1);
        bench.kick.signal();
        bench.wait_used(1);
        assert_eq!(
            bench.control.write_throughs.load(Ordering::SeqCst),
            expected
        );
    }
}

#[test]
fn descriptors_that_are_no_eventfds_are_refused() {
    let bench = Bench::new(FEATURES, false);
    let pipe = || OwnedFd::from(std::io::pipe().unwrap().0);
    for set in [
        Handle::set_queue_call,
        Handle::set_queue_kick,
        Handle::set_queue_error,
    ] {
        let refused = set(&bench.worker, bench.export, 0, Some(pipe()));
        assert!(matches!(refused, Err(CommandError::Fd { index: 0, .. })));
        assert!(matches!(
            set(&bench.worker, bench.export, 2, None),
            Err(CommandError::NoQueue { .. })
        ));
    }
}

#[test]
fn disabled_queues_take_nothing_until_enabled() {
    let mut bench = Bench::new(FEATURES, false);
    bench
        .worker
        .set_queue_enabled(bench.export, 0, false)
        .unwrap();
    bench.offer(0, &header(4, 0), 1);
    bench.kick.signal();
    bench.worker.stats().unwrap();
    bench.worker.stats().unwrap();
    assert_eq!(bench.driver.used_index(), 0);
    bench
        .worker
        .set_queue_enabled(bench.export, 0, true)
        .unwrap();
    bench.wait_used(1);
}

#[test]
fn direct_access_reads_what_was_written_and_checks_ranges() {
    let bench = Bench::new(FEATURES, false);
    let data: Vec<u8> = (0..DISK_BYTES).map(|i| (i / 512) as u8).collect();
    bench.worker.write(bench.volume, 0, &data).unwrap();
    assert_eq!(
        bench
            .worker
            .read(bench.volume, 512, DISK_BYTES - 512)
            .unwrap(),
        data[512..]
    );
    for (offset, len) in [
        (1, 512),
        (0, 513),
        (DISK_BYTES as u64, 512),
        (u64::MAX - 511, 512),
    ] {
        assert!(matches!(
            bench.worker.read(bench.volume, offset, len),
            Err(CommandError::Range { .. })
        ));
        assert!(matches!(
            bench.worker.unmap(bench.volume, offset, len as u64, true),
            Err(CommandError::Range { .. })
        ));
    }
    bench.worker.flush(bench.volume).unwrap();
    assert_eq!(bench.control.flushes.load(Ordering::SeqCst), 1);
    bench
        .worker
        .unmap(bench.volume, 0, DISK_BYTES as u64, true)
        .unwrap();
    assert_eq!(
        *bench.control.unmaps.lock().unwrap(),
        [(0, DISK_BYTES as u64, true)]
    );
}

#[test]
fn volumes_and_exports_close_in_order() {
    let bench = Bench::new(FEATURES, false);
    assert!(matches!(
        bench.worker.close_volume(bench.volume),
        Err(CommandError::Busy { .. })
    ));
    assert!(matches!(
        bench.worker.drop_volume(bench.volume),
        Err(CommandError::Busy { .. })
    ));
    bench.worker.close_export(bench.export).unwrap();
    assert!(matches!(
        bench.worker.close_export(bench.export),
        Err(CommandError::NoExport)
    ));
    assert!(matches!(
        bench.worker.stop_queue(bench.export, 0),
        Err(CommandError::NoExport)
    ));
    assert_eq!(bench.worker.checkpoint(bench.volume).unwrap(), Ok(3));
    assert_eq!(
        bench.worker.close_volume(bench.volume).unwrap(),
        Err("damaged".to_owned())
    );
    assert!(matches!(
        bench.worker.read(bench.volume, 0, 512),
        Err(CommandError::Busy { .. })
    ));
    bench.worker.drop_volume(bench.volume).unwrap();
    assert!(matches!(
        bench.worker.volume_stats(bench.volume),
        Err(CommandError::NoVolume)
    ));
    bench.wait_event(|event| matches!(event, Event::Volume { event: 7, .. }));
    bench.worker.shutdown();
    assert!(matches!(
        bench.worker.stats(),
        Err(CommandError::Gone { worker: 0 })
    ));
}

#[test]
fn closing_an_export_unmaps_guest_memory() {
    let mut bench = Bench::new(FEATURES, false);
    let memory = std::mem::replace(&mut bench.driver.memory, guest_memory());
    let mapped = Arc::downgrade(&memory);
    drop(memory);
    assert!(mapped.upgrade().is_some());
    bench.worker.close_export(bench.export).unwrap();
    assert!(mapped.upgrade().is_none());
}

#[test]
fn a_worker_without_work_sleeps_without_a_timeout() {
    let bench = Bench::new(FEATURES, false);
    let before = bench.control.sleeps.load(Ordering::SeqCst);
    let start = Instant::now();
    while bench.control.sleeps.load(Ordering::SeqCst) < before + 3 {
        bench.worker.stats().unwrap();
        assert!(start.elapsed() < LIMIT);
    }
    assert_eq!(bench.control.timed_sleeps.load(Ordering::SeqCst), 0);
}

#[test]
fn a_worker_that_cannot_start_says_why() {
    let events = Arc::new(Events::new().unwrap());
    let config = WorkerConfig {
        index: 3,
        cpu: Some(usize::MAX),
        poll: Duration::ZERO,
    };
    let error =
        Handle::spawn(config.clone(), events.clone(), || Ok(PollIo::default())).unwrap_err();
    assert!(error.to_string().contains("no CPU"), "{error}");
    let config = WorkerConfig {
        cpu: None,
        ..config
    };
    let error = Handle::spawn(config, events, || {
        Err(std::io::Error::other("no rings left"))
    })
    .unwrap_err();
    assert_eq!(error.to_string(), "no rings left");
}

#[test]
fn memory_errors_name_the_address() {
    let error = guest_memory()
        .translate(5 * MIB, 1, &mut Vec::<IoBuf>::new())
        .unwrap_err();
    assert!(matches!(error, MemoryError::OutsideGuest { .. }));
    assert!(error.to_string().contains("0x500000"), "{error}");
}
