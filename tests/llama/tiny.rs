//! A model small enough to be computed by definition, and prompts for it.

use super::config::Config;
use super::sample::Rng;

const VOCAB: usize = 250;

pub fn config(heads: usize, kv_heads: usize, tied: bool) -> Config {
    Config {
        layers: 2,
        hidden: 96,
        ffn: 160,
        heads,
        kv_heads,
        head_dim: 64,
        vocab: VOCAB,
        context: 512,
        rms_eps: 1e-5,
        rope_base: 10_000.0,
        rope_dim: 64,
        tied,
    }
}

pub fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| (rng.next_u64() % VOCAB as u64) as u32).collect()
}
