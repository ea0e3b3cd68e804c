//! An export on a worker: the device side of one vhost-user session.
//!
//! States of a queue:
//!
//!     stopped ──start──▶ running ──stop──▶ draining ──nothing in flight──▶ stopped
//!                           └──guest broke it──▶ broken ──stop──▶ draining
//!
//! Chains are popped only while the queue is running and enabled. A broken queue still answers what
//! was popped before, and still has an index to give back.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::commands::{CommandError, Reply};
use super::eventfd::EventFd;
use crate::io::WatchId;
use crate::request::{DiskShape, F_FLUSH, ID_BYTES};
use crate::ring::{GuestMemory, QueueConfig, SplitQueue};

/// What an export is made with.
#[derive(Debug, Clone)]
pub struct ExportSpec {
    /// Names the export in events.
    pub id: u64,
    pub queues: u16,
    pub read_only: bool,
    pub logical_block_bytes: u32,
    pub serial: [u8; ID_BYTES],
    pub write_cache: bool,
}

/// What a queue is started with; addresses are the front-end's.
#[derive(Debug)]
pub struct QueueStart {
    pub ring: QueueConfig,
    /// Index of the first chain to take (SET_VRING_BASE).
    pub base: u16,
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
    pub enabled: bool,
}

#[derive(Debug)]
pub(super) struct Export {
    pub spec: ExportSpec,
    /// Slot of its volume.
    pub volume: usize,
    pub memory: Arc<GuestMemory>,
    /// Memory was lost and it was said so.
    pub lost: bool,
    pub queues: Vec<Queue>,
    /// The export goes when its queues have stopped.
    pub closing: Option<Reply<()>>,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    pub ring: Option<SplitQueue>,
    pub features: u64,
    pub enabled: bool,
    pub broken: bool,
    /// Chains popped and not yet answered.
    pub in_flight: u32,
    /// Elements were pushed that the driver has not been shown.
    pub unpublished: bool,
    /// Index to give back while there is no ring.
    pub base: u16,
    pub size: u32,
    pub kick: Option<Kick>,
    pub call: Option<EventFd>,
    pub error: Option<EventFd>,
    pub stopping: Option<Reply<u16>>,
}

/// A kick eventfd and the watch it is under.
#[derive(Debug)]
pub(super) struct Kick {
    pub fd: EventFd,
    pub watch: WatchId,
}

impl Export {
    pub fn new(spec: ExportSpec, volume: usize) -> Self {
        let queues = (0..spec.queues).map(|_| Queue::default()).collect();
        Self {
            spec,
            volume,
            memory: Arc::default(),
            lost: false,
            queues,
            closing: None,
        }
    }

    pub fn queue(&mut self, index: u16) -> Result<&mut Queue, CommandError> {
        let queues = self.queues.len();
        self.queues
            .get_mut(usize::from(index))
            .ok_or(CommandError::NoQueue { index, queues })
    }

    pub fn shape(&self, size_bytes: u64) -> DiskShape {
        DiskShape {
            size_bytes,
            logical_block_bytes: self.spec.logical_block_bytes,
            read_only: self.spec.read_only,
            queues: self.spec.queues,
        }
    }

    /// Moves all rings to `memory`, or none.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) -> Result<(), CommandError> {
        for moved in 0..self.queues.len() {
            let Some(ring) = &mut self.queues[moved].ring else {
                continue;
            };
            if let Err(error) = ring.set_memory(memory.clone()) {
                for queue in &mut self.queues[..moved] {
                    if let Some(ring) = &mut queue.ring {
                        // The table in force until now holds every ring that was running in it.
                        ring.set_memory(self.memory.clone())?;
                    }
                }
                return Err(error.into());
            }
        }
        self.memory = memory;
        Ok(())
    }

    /// Whether each write is to be durable before it completes (virtio 1.3, 5.2.6.2): the driver
    /// has no flush to ask for, or the cache is off.
    pub fn write_through(&self, queue: usize) -> bool {
        self.queues[queue].features & F_FLUSH == 0 || !self.spec.write_cache
    }
}

impl Queue {
    pub fn runs(&self) -> bool {
        self.ring.is_some() && self.enabled && !self.broken && self.stopping.is_none()
    }
}
