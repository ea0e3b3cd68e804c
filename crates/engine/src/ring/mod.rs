//! The guest's side of the engine: its memory, its virtqueues, the chains it puts there.
//!
//! Everything here comes from an untrusted guest (ring contents) or an untrusted front-end
//! (memory table, ring addresses). Invariants:
//! - No address, length or index of theirs is used before it was checked, and each is read once:
//!   the guest may change memory between two reads of it.
//! - Work per call is bounded by the queue's size, whatever the memory holds.
//! - `unsafe` is in `memory` (mappings), `sigbus` (signal handler) and `split` (ring accesses).
//!
//! A queue belongs to one worker thread. A memory table is immutable and shared (`Arc`).

mod chain;
mod memory;
mod sigbus;
mod split;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use chain::{Chain, MAX_CHAIN_PIECES};
pub use memory::{GuestMemory, MAX_REGIONS, MemoryError, RegionSpec};
pub use sigbus::losses;
pub use split::{
    F_EVENT_IDX, F_INDIRECT_DESC, F_NOTIFY_ON_EMPTY, F_VERSION_1, MAX_QUEUE_SIZE, QueueConfig,
    QueueError, SplitQueue,
};
