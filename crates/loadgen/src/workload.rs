//! Which request comes next: kinds of load, block choice, random numbers.
//!
//! All randomness comes from one seed, so a run can be repeated. One thread.

/// splitmix64 (Steele, Lea, Flood 2014): fast, seeded by any number.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Uniform below `bound` (by multiplication; the bias is below 2^-32 for real disks).
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Uniform in [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A seeded permutation of `0..len` in constant memory: a Feistel network over the next even power
/// of two, walked until it falls inside (Black, Rogaway 2002).
pub struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    pub fn new(len: u64, seed: u64) -> Self {
        let bits = 64 - len.saturating_sub(1).leading_zeros();
        let mut random = Random::new(seed);
        let keys = std::array::from_fn(|_| random.next());
        Self {
            len,
            half_bits: bits.div_ceil(2).max(1),
            keys,
        }
    }

    pub fn at(&self, index: u64) -> u64 {
        debug_assert!(index < self.len);
        let mask = (1u64 << self.half_bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> self.half_bits, value & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix(right ^ key) & mask));
            }
            value = left << self.half_bits | right;
            if value < self.len {
                return value;
            }
        }
    }
}

/// Ranks after Zipf's law (Gray et al. 1994, "Quickly generating billion-record synthetic
/// databases"), theta below 1.
struct Zipf {
    len: f64,
    theta: f64,
    alpha: f64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    fn new(len: u64, theta: f64) -> Self {
        let zeta = |terms: u64| {
            (1..=terms)
                .map(|rank| (rank as f64).powf(-theta))
                .sum::<f64>()
        };
        let total = zeta(len);
        let eta = (1.0 - (2.0 / len as f64).powf(1.0 - theta)) / (1.0 - zeta(2.min(len)) / total);
        Self {
            len: len as f64,
            theta,
            alpha: 1.0 / (1.0 - theta),
            zeta: total,
            eta,
        }
    }

    fn rank(&self, random: &mut Random) -> u64 {
        let unit = random.unit();
        let scaled = unit * self.zeta;
        if scaled < 1.0 {
            return 0;
        }
        if scaled < 1.0 + 0.5f64.powf(self.theta) {
            return 1;
        }
        let rank = self.len * (self.eta * unit - self.eta + 1.0).powf(self.alpha);
        (rank as u64).min(self.len as u64 - 1)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
    /// A write and, when that is complete, a flush: counted as one, timed from end to end.
    WriteFlush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    RandRead,
    RandWrite,
    SeqRead,
    SeqWrite,
    RandRw,
    WriteFlush,
    /// Writes every block of the region once, in random order, and ends.
    FirstWrite,
    /// Reads every block of the region once, in random order, and ends.
    ReadOnce,
    /// Writes the whole region once, from its start, and ends.
    Fill,
    /// Reads and writes with Zipf's law over blocks (theta 0.99).
    Zipf,
}

impl Workload {
    pub const ALL: [(&'static str, Self); 10] = [
        ("randread", Self::RandRead),
        ("randwrite", Self::RandWrite),
        ("seqread", Self::SeqRead),
        ("seqwrite", Self::SeqWrite),
        ("randrw", Self::RandRw),
        ("writeflush", Self::WriteFlush),
        ("firstwrite", Self::FirstWrite),
        ("readonce", Self::ReadOnce),
        ("fill", Self::Fill),
        ("zipf", Self::Zipf),
    ];

    pub fn writes(self) -> bool {
        !matches!(self, Self::RandRead | Self::SeqRead | Self::ReadOnce)
    }

    /// It ends by itself, after one pass over the region.
    pub fn one_pass(self) -> bool {
        matches!(self, Self::FirstWrite | Self::ReadOnce | Self::Fill)
    }
}

enum Choice {
    Uniform,
    Sequential,
    Permuted(Permutation),
    Zipf(Zipf, Permutation),
}

/// Yields operations and the units (of the block size) they are on.
pub struct Generator {
    workload: Workload,
    choice: Choice,
    units: u64,
    read_percent: u64,
    issued: u64,
    random: Random,
}

impl Generator {
    pub fn new(workload: Workload, units: u64, read_percent: u8, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let choice = match workload {
            Workload::SeqRead | Workload::SeqWrite | Workload::Fill => Choice::Sequential,
            Workload::FirstWrite | Workload::ReadOnce => {
                Choice::Permuted(Permutation::new(units, random.next()))
            }
            // Hot blocks are spread over the region: neighbours in rank are not so on disk.
            Workload::Zipf => Choice::Zipf(
                Zipf::new(units, 0.99),
                Permutation::new(units, random.next()),
            ),
            _ => Choice::Uniform,
        };
        Self {
            workload,
            choice,
            units,
            read_percent: read_percent.into(),
            issued: 0,
            random,
        }
    }

    /// None: the one pass over the region is done.
    pub fn next(&mut self) -> Option<(Operation, u64)> {
        if self.workload.one_pass() && self.issued == self.units {
            return None;
        }
        let unit = match &self.choice {
            Choice::Uniform => self.random.below(self.units),
            Choice::Sequential => self.issued % self.units,
            Choice::Permuted(permutation) => permutation.at(self.issued),
            Choice::Zipf(zipf, permutation) => permutation.at(zipf.rank(&mut self.random)),
        };
        self.issued += 1;
        let operation = match self.workload {
            Workload::RandRead | Workload::SeqRead | Workload::ReadOnce => Operation::Read,
            Workload::RandRw | Workload::Zipf => {
                if self.random.below(100) < self.read_percent {
                    Operation::Read
                } else {
                    Operation::Write
                }
            }
            Workload::WriteFlush => Operation::WriteFlush,
            _ => Operation::Write,
        };
        Some((operation, unit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_touches_every_unit_exactly_once() {
        for workload in [Workload::FirstWrite, Workload::ReadOnce, Workload::Fill] {
            for units in [1, 2, 3, 1000, 4096, 65_537] {
                let mut generator = Generator::new(workload, units, 70, 42);
                let mut seen = vec![false; units as usize];
                while let Some((_, unit)) = generator.next() {
                    assert!(
                        !std::mem::replace(&mut seen[unit as usize], true),
                        "{unit} came twice"
                    );
                }
                assert!(seen.iter().all(|seen| *seen));
            }
        }
    }

    #[test]
    fn first_writes_do_not_come_in_order() {
        let mut generator = Generator::new(Workload::FirstWrite, 10_000, 70, 7);
        let units: Vec<u64> = std::iter::from_fn(|| generator.next())
            .map(|(_, u)| u)
            .collect();
        let ascending = units.windows(2).filter(|pair| pair[0] < pair[1]).count();
        assert!(
            (4500..5500).contains(&ascending),
            "{ascending} of 9,999 steps go up"
        );
    }

    #[test]
    fn the_mix_is_as_asked_and_stays_in_the_region() {
        let mut generator = Generator::new(Workload::RandRw, 1000, 70, 3);
        let mut reads = 0;
        for _ in 0..100_000 {
            let (operation, unit) = generator.next().unwrap();
            assert!(unit < 1000);
            reads += u32::from(operation == Operation::Read);
        }
        assert!(
            (69_000..71_000).contains(&reads),
            "{reads} reads of 100,000"
        );
    }

    #[test]
    fn zipf_favours_few_units_and_reaches_many() {
        let mut generator = Generator::new(Workload::Zipf, 10_000, 0, 5);
        let mut counts = vec![0u32; 10_000];
        for _ in 0..100_000 {
            counts[generator.next().unwrap().1 as usize] += 1;
        }
        counts.sort_unstable_by(|a, b| b.cmp(a));
        let top: u32 = counts[..100].iter().sum();
        assert!(
            (45_000..65_000).contains(&top),
            "the top 1 % got {top} of 100,000"
        );
        assert!(counts.iter().filter(|count| **count > 0).count() > 5_000);
    }

    #[test]
    fn the_same_seed_gives_the_same_load() {
        let run = |seed| {
            let mut generator = Generator::new(Workload::RandRw, 1 << 40, 50, seed);
            (0..100).map(|_| generator.next()).collect::<Vec<_>>()
        };
        assert_eq!(run(9), run(9));
        assert_ne!(run(9), run(10));
    }
}
