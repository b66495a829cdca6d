//! Loops over vectors: normalisation, exponentials, activation. Written so that the compiler vectorises them.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// `out = x / rms(x) * weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut sums = [0f32; 16];
    for chunk in chunks {
        for (s, v) in sums.iter_mut().zip(chunk) {
            *s += v * v;
        }
    }
    let sum: f32 = sums.iter().sum::<f32>() + rest.iter().map(|v| v * v).sum::<f32>();
    let factor = 1.0 / (sum / x.len() as f32 + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * w;
    }
}

/// e^x for x <= 88, to about one unit in the last place; 0 below -87.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series, 2^n through the exponent bits. No branch, no
/// call: a loop over it vectorises, which libm's does not.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first exact in few bits so that n * LN2_HIGH has no error.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.max(-87.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    let power = f32::from_bits(((shifted.to_bits() << 23) as i32).wrapping_add(127 << 23) as u32);
    if x < -87.0 { 0.0 } else { p * power }
}

/// Replaces scores by `e^(score - max)`; returns (max, sum). An empty or fully masked row gives (-inf, 0).
pub fn exp_scores(scores: &mut [f32]) -> (f32, f32) {
    let (chunks, rest) = scores.as_chunks::<16>();
    let mut tops = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (t, s) in tops.iter_mut().zip(chunk) {
            *t = if *s > *t { *s } else { *t };
        }
    }
    let max = tops.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        scores.fill(0.0);
        return (max, 0.0);
    }
    let mut sums = [0f32; 16];
    let (chunks, rest) = scores.as_chunks_mut::<16>();
    for chunk in chunks {
        for (sum, s) in sums.iter_mut().zip(chunk) {
            *s = exp(*s - max);
            *sum += *s;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for s in rest {
        *s = exp(*s - max);
        sum += *s;
    }
    (max, sum)
}

/// `gate = gate * sigmoid(gate) * up`.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp((-*g).min(88.0))) * u;
    }
}

pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Rounds to f16.
pub fn to_f16(x: &[f32], out: &mut [f16]) {
    out.convert_from_f32_slice(x);
}

pub fn to_f32(x: &[f16], out: &mut [f32]) {
    x.convert_to_f32_slice(out);
}
