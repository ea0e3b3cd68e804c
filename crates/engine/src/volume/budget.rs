//! How much memory the maps of an engine's volumes may take.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Memory for maps, shared evenly by the open volumes of an engine.
#[derive(Debug)]
pub struct MapBudget {
    cap_bytes: usize,
    volumes: AtomicUsize,
}

impl MapBudget {
    #[must_use]
    pub const fn new(cap_bytes: usize) -> Self {
        Self {
            cap_bytes,
            volumes: AtomicUsize::new(0),
        }
    }

    /// What one volume may use, bytes; never less than a working set.
    #[must_use]
    pub fn share_bytes(&self) -> usize {
        (self.cap_bytes / self.volumes.load(Ordering::Relaxed).max(1)).max(1 << 20)
    }
}

/// A volume's place in the budget, given back when dropped.
#[derive(Debug)]
pub(super) struct MapShare(Arc<MapBudget>);

impl MapShare {
    pub(super) fn new(budget: Arc<MapBudget>) -> Self {
        budget.volumes.fetch_add(1, Ordering::Relaxed);
        Self(budget)
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.share_bytes()
    }
}

impl Drop for MapShare {
    fn drop(&mut self) {
        self.0.volumes.fetch_sub(1, Ordering::Relaxed);
    }
}
