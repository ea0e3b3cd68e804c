//! What happened in the engine that policy should know: a bounded queue and an eventfd beside it.
//!
//! Workers push, one thread takes. At the bound new events are dropped and counted: whoever comes
//! late still learns what began it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::eventfd::EventFd;
use crate::types::Uuid;

const MAX_EVENTS: usize = 4096;

/// `V`: events of volumes.
#[derive(Debug)]
pub enum Event<V> {
    RingBroken {
        export: u64,
        queue: u16,
        reason: String,
    },
    MemoryLost {
        export: u64,
        reason: String,
    },
    Volume {
        volume: Uuid,
        event: V,
    },
}

#[derive(Debug)]
pub struct Events<V> {
    queue: Mutex<Queue<V>>,
    readable: EventFd,
}

#[derive(Debug)]
struct Queue<V> {
    events: VecDeque<Event<V>>,
    dropped: u64,
}

impl<V> Events<V> {
    pub fn new() -> io::Result<Self> {
        let queue = Mutex::new(Queue {
            events: VecDeque::new(),
            dropped: 0,
        });
        Ok(Self {
            queue,
            readable: EventFd::new()?,
        })
    }

    /// An eventfd that is readable while there is something to take.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.readable.raw()
    }

    pub fn push(&self, event: Event<V>) {
        let mut queue = self.lock();
        if queue.events.len() == MAX_EVENTS {
            queue.dropped += 1;
            return;
        }
        queue.events.push_back(event);
        self.readable.signal();
    }

    /// All events, oldest first.
    pub fn take(&self) -> Vec<Event<V>> {
        let mut queue = self.lock();
        self.readable.clear();
        queue.events.drain(..).collect()
    }

    /// How many events found the queue full.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    fn lock(&self) -> MutexGuard<'_, Queue<V>> {
        // A queue is consistent between any two of its operations.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
