//! Latencies in a histogram of fixed size: logarithmic octaves, each cut into equal steps.
//!
//! Invariant: a value is told back with a relative error of at most 1/64 (values below 64
//! exactly), whatever its size. Recording is a few instructions and never allocates, so it can
//! stand in the polling loop. Owned by one thread.

/// Steps an octave is cut into, as a power of two.
const STEP_BITS: u32 = 6;
const STEPS: usize = 1 << STEP_BITS;
/// One row of steps for the exact small values, one for every further octave of 64 bits.
const ROWS: usize = 64 - STEP_BITS as usize + 1;

pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    sum: u128,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; ROWS * STEPS].into_boxed_slice(),
            total: 0,
            sum: 0,
            max: 0,
        }
    }
}

fn bucket(value: u64) -> usize {
    if value < STEPS as u64 {
        return value as usize;
    }
    let row = 64 - STEP_BITS - value.leading_zeros();
    let step = (value >> (row - 1)) as usize - STEPS;
    row as usize * STEPS + step
}

/// The largest value that falls into a bucket: a percentile is never told too small.
fn upper_edge(bucket: usize) -> u64 {
    let (row, step) = (bucket / STEPS, (bucket % STEPS) as u64);
    if row == 0 {
        return step;
    }
    let shift = row as u32 - 1;
    let low = (STEPS as u64 + step) << shift;
    low + ((1u64 << shift) - 1)
}

impl Histogram {
    pub fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.total += 1;
        self.sum += u128::from(value);
        self.max = self.max.max(value);
    }

    pub fn max(&self) -> u64 {
        self.max
    }

    /// 0 when nothing was recorded.
    pub fn mean(&self) -> f64 {
        if self.total == 0 {
            0.0
        } else {
            self.sum as f64 / self.total as f64
        }
    }

    /// The smallest told value that at least `percent` of the recorded ones do not exceed;
    /// 0 when nothing was recorded.
    pub fn percentile(&self, percent: f64) -> u64 {
        let wanted = ((percent / 100.0 * self.total as f64).ceil() as u64).clamp(1, u64::MAX);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper_edge(index).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket_within_one_part_in_64() {
        let values = (0..64).flat_map(|bit| {
            let power = 1u64 << bit;
            [power - 1, power, power + power / 3, power + (power - 1)]
        });
        for value in values.chain([u64::MAX]) {
            let index = bucket(value);
            let edge = upper_edge(index);
            assert!(edge >= value, "{value}: edge {edge}");
            assert!(
                edge - value <= value / 64,
                "{value}: edge {edge} is too far"
            );
            assert_eq!(
                bucket(edge),
                index,
                "{value}: edge {edge} is in another bucket"
            );
            if edge < u64::MAX {
                assert_eq!(bucket(edge + 1), index + 1, "{value}: buckets leave a gap");
            }
        }
    }

    #[test]
    fn percentiles_of_a_known_set_are_those_of_its_order() {
        let mut histogram = Histogram::default();
        for value in (1..=1000).rev() {
            histogram.record(value);
        }
        for (percent, exact) in [(50.0, 500u64), (99.0, 990), (99.9, 999), (100.0, 1000)] {
            let told = histogram.percentile(percent);
            assert!(
                told >= exact && told - exact <= exact / 64,
                "{percent}: {told}"
            );
        }
        assert_eq!(histogram.max(), 1000);
        assert!((histogram.mean() - 500.5).abs() < 1e-9);
    }

    #[test]
    fn one_slow_request_in_a_thousand_shows_in_the_tail_only() {
        let mut histogram = Histogram::default();
        for _ in 0..998 {
            histogram.record(10);
        }
        histogram.record(1_000_000);
        histogram.record(1_000_000);
        assert_eq!(histogram.percentile(99.0), 10);
        assert_eq!(histogram.percentile(99.9), 1_000_000);
    }

    #[test]
    fn an_empty_histogram_tells_zero() {
        let histogram = Histogram::default();
        assert_eq!(histogram.percentile(99.0), 0);
        assert_eq!(histogram.max(), 0);
        assert!(histogram.mean().abs() < f64::EPSILON);
    }
}
