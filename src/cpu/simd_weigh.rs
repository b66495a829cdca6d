//! Attention weights of tokens at every instruction level: q.k, scores and their exponentials. Every level gives the same
//! bits, and so does the CUDA backend: each product and each sum is rounded to float32, none are fused, channels are added
//! in rising order and queries as [`super::lanes`] says.
#![allow(unsafe_code)]

use super::Level;
use super::lanes::{LANES, halve};
use super::math::{exp, tanh};

/// Queries of one KV head that are multiplied together.
pub(super) struct Chunk {
    /// By channel.
    pub(super) q: Vec<[f32; LANES]>,
    /// Natural-log log-sum-exps.
    pub(super) lse: [f32; LANES],
    /// Positions; a query before position 0 sees nothing.
    pub(super) position: [i32; LANES],
}

/// How a dot product becomes a score, and what a query sees.
#[derive(Clone, Copy)]
pub(super) struct Scoring {
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) sliding_window: i32,
}

impl Scoring {
    #[inline(always)]
    fn weight(self, dot: f32, lse: f32) -> f32 {
        let score = dot * self.scale;
        let score = self.softcap.map_or(score, |c| c * tanh::<false>(score / c));
        let exponent = score - lse;
        if exponent > 88.0 { f32::INFINITY } else { exp::<false>(exponent) }
    }
}

/// The attention that each of `out.len()` keys gets from all queries; `keys` are their rows, the first of which stands at
/// `position`.
pub(super) fn weigh(
    level: Level,
    chunks: &[Chunk],
    scoring: Scoring,
    keys: &[f32],
    position: i32,
    out: &mut [f32],
) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: contexts have levels that the processor has.
        Level::Avx512 => unsafe { avx512(chunks, scoring, keys, position, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { avx2(chunks, scoring, keys, position, out) },
        _ => in_blocks::<1>(chunks, scoring, keys, position, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
fn avx512(chunks: &[Chunk], scoring: Scoring, keys: &[f32], position: i32, out: &mut [f32]) {
    in_blocks::<2>(chunks, scoring, keys, position, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(chunks: &[Chunk], scoring: Scoring, keys: &[f32], position: i32, out: &mut [f32]) {
    in_blocks::<2>(chunks, scoring, keys, position, out);
}

/// N keys at a time: as many as keep their sums in registers.
#[inline(always)]
fn in_blocks<const N: usize>(
    chunks: &[Chunk],
    scoring: Scoring,
    keys: &[f32],
    position: i32,
    out: &mut [f32],
) {
    if out.is_empty() {
        return;
    }
    let dim = keys.len() / out.len();
    // By channel, N keys each; the last block is filled up with zeros.
    let mut blocks = vec![[0f32; N]; out.len().div_ceil(N) * dim];
    for (t, key) in keys.chunks_exact(dim).enumerate() {
        let block = &mut blocks[t / N * dim..][..dim];
        block.iter_mut().zip(key).for_each(|(block, &x)| block[t % N] = x);
    }
    let mut sums = vec![[[0f32; LANES]; N]; out.len().div_ceil(N)];
    // A chunk stays in the L1 cache while all keys pass by.
    for chunk in chunks {
        for (i, (keys, sums)) in blocks.chunks_exact(dim).zip(&mut sums).enumerate() {
            let dots = dots(&chunk.q, keys);
            for (t, (dots, sums)) in dots.iter().zip(sums).enumerate() {
                let key = position + (i * N + t) as i32;
                for lane in 0..LANES {
                    let own = chunk.position[lane];
                    let seen = key <= own && own - key < scoring.sliding_window;
                    let weight = scoring.weight(dots[lane], chunk.lse[lane]);
                    sums[lane] += if seen { weight } else { 0.0 };
                }
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums.as_flattened_mut()) {
        halve(sums, 1);
        *out = sums[0];
    }
}

/// The products of N keys with the queries of a chunk. The loops have constant bounds and no checks inside, which is what
/// keeps the sums in registers.
#[inline(always)]
fn dots<const N: usize>(q: &[[f32; LANES]], keys: &[[f32; N]]) -> [[f32; LANES]; N] {
    let mut dots = [[0f32; LANES]; N];
    for (q, key) in q.iter().zip(keys) {
        for t in 0..N {
            for lane in 0..LANES {
                dots[t][lane] += q[lane] * key[t];
            }
        }
    }
    dots
}
