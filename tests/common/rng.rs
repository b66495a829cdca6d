//! A small deterministic generator and the distributions that kernels get wrong.

use half::{bf16, f16};
use mustafar::DType;

/// splitmix64: a seed gives the same stream everywhere, so that a failure can be run again.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 to n - 1.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.uniform()).ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// True with probability p.
    pub fn chance(&mut self, p: f64) -> bool {
        self.uniform() < p
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// A row of 16-bit elements.
    pub fn row(&mut self, dist: Dist, dtype: DType, dim: usize) -> Vec<u16> {
        (0..dim).map(|c| dist.element(self, dtype, c)).collect()
    }

    /// `n` float32 numbers from a normal distribution.
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal() as f32).collect()
    }
}

/// What the elements of a row look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dist {
    /// Standard normal: hardly any ties.
    Normal,
    /// Normal, but every 16th channel is 30 times as large and of one sign, as post-RoPE keys are.
    Outliers,
    /// Seven values only: ties cross every selection threshold.
    Ties,
    /// Three quarters zeros of both signs: rows with fewer non-zeros than they keep.
    Zeros,
    /// Subnormals and the smallest normals: lost by flush-to-zero.
    Subnormal,
    /// Any 16-bit pattern, NaN and infinities among them.
    AnyBits,
    /// Normal with a few NaN and infinities, as a diverging model produces.
    NonFinite,
}

impl Dist {
    pub const ALL: [Self; 7] = [
        Self::Normal,
        Self::Outliers,
        Self::Ties,
        Self::Zeros,
        Self::Subnormal,
        Self::AnyBits,
        Self::NonFinite,
    ];

    /// The ones without NaN and infinities, and tame enough for attention.
    pub const FINITE: [Self; 5] = [Self::Normal, Self::Outliers, Self::Ties, Self::Zeros, Self::Subnormal];

    /// One element for channel `c`.
    pub fn element(self, rng: &mut Rng, dtype: DType, c: usize) -> u16 {
        let round = |x: f64| mustafar::reference::round(dtype, x as f32);
        let sign = (rng.next() as u16) & 0x8000;
        match self {
            Self::Normal => round(rng.normal()),
            Self::NonFinite if rng.chance(0.002) => {
                round(*rng.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY]))
            }
            Self::NonFinite => round(rng.normal()),
            Self::Outliers if c % 16 == 5 => round(30.0 + rng.normal()),
            Self::Outliers => round(rng.normal()),
            Self::Ties => round(rng.below(7) as f64 * 0.5 - 1.5),
            Self::Zeros if rng.chance(0.75) => sign,
            Self::Zeros => round(rng.normal()),
            Self::Subnormal => {
                let smallest_normal = match dtype {
                    DType::F16 => f16::MIN_POSITIVE.to_bits(),
                    _ => bf16::MIN_POSITIVE.to_bits(),
                };
                sign | rng.below(usize::from(smallest_normal) + 4) as u16
            }
            Self::AnyBits => rng.next() as u16,
        }
    }
}
