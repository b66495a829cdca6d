//! Median of each channel of dense tokens: the key centre of a cache.

use crate::cpu::parallel;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::{Rows, Tensor};
use half::{bf16, f16};
use std::ops::Range;

/// Channels that are searched together: a cache line of 16-bit elements. Every head_dim is a multiple.
const CHANNELS: usize = 32;

/// Per KV head and channel, the lower median of all tokens of `parts` (each `[1, tokens, kv_heads, head_dim]`, f16
/// or bf16, at least one token in all), as `[kv_heads, head_dim]`.
///
/// The lower median, rank `(n - 1) / 2` from below, is one of the values, so it is exact in their type. They are
/// ordered as `total_cmp` orders them.
pub(crate) fn median(threads: usize, argument: &'static str, parts: &[Tensor<'_>]) -> Result<Vec<f32>> {
    let rows = parts.iter().map(|part| part.rows::<u16>(argument)).collect::<Result<Vec<_>>>()?;
    let (heads, dim, dtype) = (parts[0].shape.heads, parts[0].shape.dim, parts[0].dtype);
    let tokens: usize = rows.iter().map(|part| part.shape.tokens).sum();
    let mut medians = vec![0.0; heads * dim];
    // Every element is read once and searched for 16 bits.
    let threads = parallel::useful_threads(threads, 17 * tokens * heads * dim * dtype.bytes());
    let items = medians.chunks_mut(CHANNELS).enumerate();
    parallel::for_each(threads, items, |(i, out): (usize, &mut [f32])| {
        let (head, channel) = (i * CHANNELS / dim, i * CHANNELS % dim);
        let keys = keys(&rows, head, channel..channel + out.len());
        let found = select(&keys, out.len(), (tokens - 1) / 2);
        for (out, key) in out.iter_mut().zip(found) {
            let bits = order(key as u16) as u16;
            *out = match dtype {
                DType::Bf16 => bf16::from_bits(bits).to_f32(),
                _ => f16::from_bits(bits).to_f32(),
            };
        }
    });
    Ok(medians)
}

/// The ordered form of some channels of a head, `[tokens][channels]`: together, so that 16 searches stay in the L2
/// cache.
fn keys(parts: &[Rows<'_, u16>], head: usize, channels: Range<usize>) -> Vec<i16> {
    let tokens: usize = parts.iter().map(|part| part.shape.tokens).sum();
    let mut keys = Vec::with_capacity(tokens * channels.len());
    for part in parts {
        for t in 0..part.shape.tokens {
            keys.extend(part.row(0, t, head)[channels.clone()].iter().map(|&bits| order(bits)));
        }
    }
    keys
}

/// The value of this rank from below of each channel: the largest that no more than `rank` values are below, found
/// bit by bit from the top.
fn select(keys: &[i16], channels: usize, rank: usize) -> Vec<i16> {
    let mut found = vec![i16::MIN; channels];
    for bit in (0..16).rev() {
        // From i16::MIN on, setting bits from the top (the sign is cleared) only ever adds them.
        let candidates: Vec<i16> = found.iter().map(|x| x ^ (1u16 << bit) as i16).collect();
        let below = count_below(keys, &candidates);
        for ((found, candidate), below) in found.iter_mut().zip(candidates).zip(below) {
            if below <= rank {
                *found = candidate;
            }
        }
    }
    found
}

/// How many keys of each channel are below its limit.
fn count_below(keys: &[i16], limits: &[i16]) -> Vec<usize> {
    let mut total = vec![0; limits.len()];
    // Counters as wide as the keys, so that a vector instruction handles as many of them; emptied before they wrap.
    for block in keys.chunks(limits.len() * usize::from(u16::MAX)) {
        let mut counts = vec![0u16; limits.len()];
        for keys in block.chunks_exact(limits.len()) {
            for ((count, key), limit) in counts.iter_mut().zip(keys).zip(limits) {
                *count += u16::from(key < limit);
            }
        }
        for (total, count) in total.iter_mut().zip(counts) {
            *total += usize::from(count);
        }
    }
    total
}

/// Orders the bits of a sign-magnitude float as signed integers; its own inverse.
fn order(bits: u16) -> i16 {
    let sign = bits as i16 >> 15;
    (bits ^ (sign as u16 >> 1)) as i16
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{count_below, median, order};
    use crate::{DType, Mem, Shape, Tensor};
    use half::f16;

    #[test]
    fn keys_order_all_floats_and_invert() {
        let mut all: Vec<u16> = (0..=u16::MAX).collect();
        assert!(all.iter().all(|&bits| order(order(bits) as u16) as u16 == bits));
        all.sort_by_key(|&bits| order(bits));
        assert!(all.windows(2).all(|w| f16::from_bits(w[0]).total_cmp(&f16::from_bits(w[1])).is_lt()));
    }

    #[test]
    fn counters_do_not_wrap() {
        let keys = vec![-5i16; 2 * (3 * usize::from(u16::MAX) + 1)];
        assert_eq!(count_below(&keys, &[-4, -5]), [keys.len() / 2, 0]);
    }

    #[test]
    fn median_is_the_lower_one_over_all_parts() {
        // 3 heads of 64 channels; values differ by channel so that no two columns can be swapped unnoticed.
        let tokens = |n: usize, seed: usize| -> Vec<f16> {
            (0..n * 3 * 64).map(|i| f16::from_f32(((i * 7919 + seed) % 251) as f32 / 16.0 - 7.0)).collect()
        };
        for (n, m) in [(1, 0), (2, 0), (5, 4), (64, 33)] {
            let (a, b) = (tokens(n, 3), tokens(m, 100));
            let tensor = |x: &'static [f16], n| {
                Tensor::new("k", Mem::host(x), DType::F16, Shape::contiguous(1, n, 3, 64).unwrap()).unwrap()
            };
            let expected: Vec<f32> = (0..3 * 64)
                .map(|i| {
                    let column = a.iter().chain(&b).skip(i).step_by(3 * 64);
                    let mut column: Vec<f32> = column.map(|x| x.to_f32()).collect();
                    column.sort_by(f32::total_cmp);
                    column[(column.len() - 1) / 2]
                })
                .collect();
            let parts = [tensor(a.leak(), n), tensor(b.leak(), m)];
            for threads in [1, 2, 8] {
                let found = median(threads, "k", &parts).unwrap();
                assert_eq!(found, expected, "{n} + {m} tokens, {threads} threads");
            }
        }
    }
}
