//! Plain Rust, for processors without the levels of the other files.

use super::{Ahead, BLOCK, Block, Encoding, MAX_DIM, Row, Softmax};
use crate::cpu::math::{self, bf16_to_f32, e4m3_to_f16_over_256, f16_to_f32};
use crate::dtype::{DType, ValueType};

/// Independent partial sums of a dot product, so that the compiler can use vectors.
const LANES: usize = 16;

pub(super) fn dot(block: &Block<'_>, q: &[f32], scores: &mut [f32], _: &mut Ahead<'_>) {
    let dim = block.dim;
    let mut x = [0.0; MAX_DIM];
    for (t, row) in block.rows().iter().enumerate() {
        expand_row(block, row, &mut x[..dim]);
        for (h, q) in q.chunks_exact(dim).enumerate() {
            let mut sums = [0.0f32; LANES];
            for (q, x) in q.chunks_exact(LANES).zip(x.chunks_exact(LANES)) {
                for i in 0..LANES {
                    sums[i] += q[i] * x[i];
                }
            }
            scores[h * BLOCK + t] = row.scale * tree_sum(sums);
        }
    }
}

pub(super) fn weighted_sum(block: &Block<'_>, weights: &[f32], sums: &mut [f32], _: &mut Ahead<'_>) {
    let dim = block.dim;
    let mut x = [0.0; MAX_DIM];
    for (t, row) in block.rows().iter().enumerate() {
        expand_row(block, row, &mut x[..dim]);
        for (h, sums) in sums.chunks_exact_mut(dim).enumerate() {
            let weight = row.scale * weights[h * BLOCK + t];
            for (sum, x) in sums.iter_mut().zip(&x) {
                *sum += weight * x;
            }
        }
    }
}

pub(super) fn expand(block: &Block<'_>, out: &mut [f32], _: &mut Ahead<'_>) {
    for (row, out) in block.rows().iter().zip(out.chunks_exact_mut(block.dim)) {
        expand_row(block, row, out);
        out.iter_mut().for_each(|x| *x *= row.scale);
    }
}

pub(super) fn softmax(scores: &mut [f32], softmax: &Softmax) -> (f32, f32) {
    softmax_with::<false>(scores, softmax)
}

/// The softmax step in plain Rust; the other levels compile it again with their instructions.
#[inline(always)]
pub(super) fn softmax_with<const FMA: bool>(scores: &mut [f32], softmax: &Softmax) -> (f32, f32) {
    for s in scores.iter_mut() {
        *s = softmax.scale * (*s + softmax.bias);
    }
    if let Some(c) = softmax.softcap {
        for s in scores.iter_mut() {
            *s = c * math::tanh::<FMA>(*s / c);
        }
    }
    let mut maxima = [softmax.max; LANES];
    let mut chunks = scores.chunks_exact(LANES);
    for chunk in chunks.by_ref() {
        for i in 0..LANES {
            maxima[i] = if chunk[i] > maxima[i] { chunk[i] } else { maxima[i] };
        }
    }
    let max = maxima.iter().chain(chunks.remainder()).fold(softmax.max, |a, &b| if b > a { b } else { a });
    // While every score is -inf there is nothing to subtract; their weights are 0 either way.
    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut sums = [0.0f32; LANES];
    let mut chunks = scores.chunks_exact_mut(LANES);
    for chunk in chunks.by_ref() {
        for i in 0..LANES {
            chunk[i] = math::exp::<FMA>(chunk[i] - base);
            sums[i] += chunk[i];
        }
    }
    for (s, sum) in chunks.into_remainder().iter_mut().zip(&mut sums) {
        *s = math::exp::<FMA>(*s - base);
        *sum += *s;
    }
    (max, tree_sum(sums))
}

fn tree_sum(mut sums: [f32; LANES]) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            sums[i] += sums[i + n];
        }
        n /= 2;
    }
    sums[0]
}

/// The values of a row, not yet multiplied by its scale.
fn expand_row(block: &Block<'_>, row: &Row, out: &mut [f32]) {
    // SAFETY: `Row` promises these lengths to every row of a block.
    let bytes = |start, len| unsafe { std::slice::from_raw_parts::<u8>(start, len) };
    match block.encoding {
        Encoding::Packed(types) => {
            let bits = bytes(row.bits, block.dim / 8);
            let kept: u32 = bits.iter().map(|byte| byte.count_ones()).sum();
            let values = bytes(row.values, kept as usize * types.bytes());
            let halves = values.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
            match types {
                ValueType::F16 => expand_packed(bits, halves.map(f16_to_f32), out),
                ValueType::Bf16 => expand_packed(bits, halves.map(bf16_to_f32), out),
                ValueType::E4m3 => {
                    expand_packed(bits, values.iter().map(|&x| f16_to_f32(e4m3_to_f16_over_256(x))), out);
                }
                ValueType::Int8 => expand_packed(bits, values.iter().map(|&x| f32::from(x as i8)), out),
            }
        }
        Encoding::Dense(dtype) => {
            let values = bytes(row.values, block.dim * dtype.bytes());
            let halves = values.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
            match dtype {
                DType::F16 => out.iter_mut().zip(halves).for_each(|(o, h)| *o = f16_to_f32(h)),
                DType::Bf16 => out.iter_mut().zip(halves).for_each(|(o, h)| *o = bf16_to_f32(h)),
                DType::F32 => {
                    for (o, b) in out.iter_mut().zip(values.chunks_exact(4)) {
                        *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    }
                }
            }
        }
    }
}

fn expand_packed(bits: &[u8], values: impl Iterator<Item = f32>, out: &mut [f32]) {
    out.fill(0.0);
    let mut values = values;
    for (&byte, out) in bits.iter().zip(out.chunks_exact_mut(8)) {
        let mut left = byte;
        while left != 0 {
            out[left.trailing_zeros() as usize] = values.next().unwrap_or_default();
            left &= left - 1;
        }
    }
}
