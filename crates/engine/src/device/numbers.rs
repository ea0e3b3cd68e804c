//! Segment numbers the catalog has granted and the engine may use up.
//!
//! Invariant: a number is handed out at most once, in ascending order, whatever is granted when.
//! Callable from any thread; it is off the I/O path (once a segment).

use std::sync::{Mutex, PoisonError};

use super::DeviceError;
use crate::types::{ADDRESS_BLOCK_BITS, SegmentNumber};

/// One past the largest number an address has room for.
const END_OF_NUMBERS: u64 = 1 << (64 - ADDRESS_BLOCK_BITS);

/// The numbers of the last grant that are left.
#[derive(Debug, Default)]
pub struct SegmentNumbers {
    grant: Mutex<Grant>,
}

#[derive(Debug, Default)]
struct Grant {
    next: u64,
    end: u64,
    /// Size of the grant when it was given.
    granted: u64,
    /// Lower bound of what may be granted: one past the largest number handed out.
    floor: u64,
    low_reported: bool,
}

impl SegmentNumbers {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `first` to `end - 1` be handed out, and forgets what an earlier grant had left.
    ///
    /// # Errors
    /// `Usage` if the range is reversed, beyond what an address can hold, or includes a number
    /// that was handed out already.
    pub fn grant(&self, first: SegmentNumber, end: SegmentNumber) -> Result<(), DeviceError> {
        let (first, end) = (first.0, end.0);
        let mut grant = self.lock();
        if first > end || end > END_OF_NUMBERS {
            return Err(DeviceError::Usage(format!(
                "segment numbers {first} to {end} are not a range below {END_OF_NUMBERS}"
            )));
        }
        if first < grant.floor {
            return Err(DeviceError::Usage(format!(
                "segment numbers from {first} are granted, but numbers up to {} were used already; \
                 grant from {} on",
                grant.floor - 1,
                grant.floor
            )));
        }
        *grant = Grant {
            next: first,
            end,
            granted: end - first,
            floor: grant.floor,
            low_reported: false,
        };
        Ok(())
    }

    /// The next number, or `None` until more are granted.
    pub fn take(&self) -> Option<SegmentNumber> {
        let mut grant = self.lock();
        if grant.next >= grant.end {
            return None;
        }
        let number = grant.next;
        grant.next += 1;
        grant.floor = grant.next;
        Some(SegmentNumber(number))
    }

    /// Whether less than half of the last grant is left. True once a grant, so that whoever sees
    /// it asks for more exactly once; a table that was never granted anything is low, too.
    pub fn is_low(&self) -> bool {
        let mut grant = self.lock();
        let low = grant.granted == 0 || (grant.end - grant.next) * 2 < grant.granted;
        let news = low && !grant.low_reported;
        grant.low_reported |= news;
        news
    }

    /// How many numbers are left.
    #[must_use]
    pub fn left(&self) -> u64 {
        let grant = self.lock();
        grant.end - grant.next
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Grant> {
        // No code panics between two stores to a grant, so a poisoned one is whole.
        self.grant.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn grant(numbers: &SegmentNumbers, first: u64, end: u64) -> Result<(), DeviceError> {
        numbers.grant(SegmentNumber(first), SegmentNumber(end))
    }

    #[test]
    fn numbers_come_in_order_and_run_out() {
        let numbers = SegmentNumbers::new();
        assert_eq!(numbers.take(), None);
        grant(&numbers, 5, 7).unwrap();
        assert_eq!(numbers.take(), Some(SegmentNumber(5)));
        assert_eq!(numbers.take(), Some(SegmentNumber(6)));
        assert_eq!(numbers.take(), None);
    }

    #[test]
    fn low_is_reported_once_a_grant() {
        let numbers = SegmentNumbers::new();
        assert!(numbers.is_low());
        assert!(!numbers.is_low());
        grant(&numbers, 0, 4).unwrap();
        numbers.take();
        numbers.take();
        assert!(!numbers.is_low(), "half is left");
        numbers.take();
        assert!(numbers.is_low());
        assert!(!numbers.is_low());
        grant(&numbers, 4, 8).unwrap();
        assert!(!numbers.is_low());
    }

    #[test]
    fn a_used_number_cannot_be_granted_again() {
        let numbers = SegmentNumbers::new();
        grant(&numbers, 10, 20).unwrap();
        numbers.take();
        assert!(grant(&numbers, 10, 20).is_err());
        grant(&numbers, 11, 20).unwrap();
        assert_eq!(numbers.take(), Some(SegmentNumber(11)));
        assert!(grant(&numbers, 5, 4).is_err());
        assert!(grant(&numbers, 20, END_OF_NUMBERS + 1).is_err());
    }

    #[test]
    fn threads_never_get_the_same_number() {
        let numbers = SegmentNumbers::new();
        grant(&numbers, 0, 4000).unwrap();
        let taken: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| std::iter::from_fn(|| numbers.take()).collect::<Vec<_>>()))
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(taken.len(), 4000);
        assert_eq!(taken.into_iter().collect::<HashSet<_>>().len(), 4000);
    }
}
