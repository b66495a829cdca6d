//! From logits to a token.

use super::error::{Error, Result};

/// SplitMix64: a full-period 64-bit generator of three lines; enough for sampling and for random test models.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal, by Box and Muller.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// Index of the largest logit; the first of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Natural-log probabilities, in f64.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    let norm = max + sum.ln();
    logits.iter().map(|&x| f64::from(x) - norm).collect()
}

/// Picks tokens: greedy at temperature 0, otherwise from the smallest set of likeliest tokens whose probabilities
/// reach `top_p`, at the given temperature. The same seed and logits give the same tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f64,
    top_p: f64,
    rng: Rng,
}

impl Sampler {
    pub fn new(temperature: f64, top_p: f64, seed: u64) -> Result<Self> {
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(Error::Invalid(format!("temperature is {temperature}; allowed: 0 or more")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::Invalid(format!("top-p is {top_p}; allowed: above 0, up to 1")));
        }
        Ok(Self { temperature, top_p, rng: Rng::new(seed) })
    }

    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_p: 1.0, rng: Rng::new(0) }
    }

    pub fn pick(&mut self, logits: &[f32]) -> u32 {
        if self.temperature == 0.0 {
            return argmax(logits);
        }
        let scaled: Vec<f32> = logits.iter().map(|&x| (f64::from(x) / self.temperature) as f32).collect();
        let mut candidates: Vec<(u32, f64)> =
            log_softmax(&scaled).iter().enumerate().map(|(i, lp)| (i as u32, lp.exp())).collect();
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut mass = 0.0;
        let mut kept = 0;
        while kept < candidates.len() && mass < self.top_p {
            mass += candidates[kept].1;
            kept += 1;
        }
        let mut left = self.rng.uniform() * mass;
        for &(token, p) in &candidates[..kept] {
            left -= p;
            if left < 0.0 {
                return token;
            }
        }
        candidates[kept - 1].0
    }
}
