//! Median of each channel of dense tokens: the key centre of a cache.

use crate::cpu::parallel;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::{Rows, Tensor};
use half::{bf16, f16};

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
    // Every element is counted twice.
    let threads = parallel::useful_threads(threads, 2 * tokens * heads * dim * dtype.bytes());
    let items = medians.chunks_mut(dim).enumerate();
    parallel::for_each(threads, items, |(head, out)| fill(&rows, head, (tokens - 1) / 2, dtype, out));
    Ok(medians)
}

/// The values of this rank of one head's channels.
fn fill(parts: &[Rows<'_, u16>], head: usize, rank: usize, dtype: DType, out: &mut [f32]) {
    // A radix select of two bytes, all channels in one pass over the rows each.
    let dim = out.len();
    let high = count(parts, head, dim, |_, key| Some(key >> 8));
    let found: Vec<(usize, usize)> = high.chunks_exact(256).map(|counts| select(counts, rank)).collect();
    let low = count(parts, head, dim, |c, key| (usize::from(key >> 8) == found[c].0).then_some(key & 0xff));
    for ((out, counts), (high, rank)) in out.iter_mut().zip(low.chunks_exact(256)).zip(&found) {
        let bits = value((high << 8 | select(counts, *rank).0) as u16);
        *out = match dtype {
            DType::Bf16 => bf16::from_bits(bits).to_f32(),
            _ => f16::from_bits(bits).to_f32(),
        };
    }
}

/// Histograms `[dim][256]` of what `digit` makes of each channel's keys.
fn count(
    parts: &[Rows<'_, u16>],
    head: usize,
    dim: usize,
    digit: impl Fn(usize, u16) -> Option<u16>,
) -> Vec<u32> {
    let mut counts = vec![0u32; dim * 256];
    for part in parts {
        for t in 0..part.shape.tokens {
            for (c, &bits) in part.row(0, t, head).iter().enumerate() {
                if let Some(digit) = digit(c, key(bits)) {
                    counts[c * 256 + usize::from(digit)] += 1;
                }
            }
        }
    }
    counts
}

/// The digit that holds the value of this rank, and the rank among the values with that digit.
fn select(counts: &[u32], mut rank: usize) -> (usize, usize) {
    for (digit, &n) in counts.iter().enumerate() {
        match rank.checked_sub(n as usize) {
            Some(rest) => rank = rest,
            None => return (digit, rank),
        }
    }
    unreachable!("rank is below the number of values counted")
}

/// Orders the bits of a sign-magnitude float as unsigned integers.
fn key(bits: u16) -> u16 {
    if bits & 0x8000 == 0 { bits | 0x8000 } else { !bits }
}

/// Inverse of [`key`].
fn value(key: u16) -> u16 {
    if key & 0x8000 == 0 { !key } else { key & 0x7fff }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::{key, median, value};
    use crate::{DType, Mem, Shape, Tensor};
    use half::f16;

    #[test]
    fn keys_order_all_floats_and_invert() {
        let mut all: Vec<u16> = (0..=u16::MAX).collect();
        assert!(all.iter().all(|&bits| value(key(bits)) == bits));
        all.sort_by_key(|&bits| key(bits));
        assert!(all.windows(2).all(|w| f16::from_bits(w[0]).total_cmp(&f16::from_bits(w[1])).is_lt()));
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
