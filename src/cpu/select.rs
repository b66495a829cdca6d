//! Which channels of a row survive, and the row that is selected from when keys are centred.

use super::Level;
use super::simd_rows::{self as simd, GROUP, Group, MAX_DIM, Mask};
use crate::dtype::DType;

/// The channels of the `keep` largest scores of a row: magnitudes, or `abs(x) * w` with weights (one per channel).
pub(super) fn select(level: Level, dtype: DType, row: &[u16], weights: Option<&[f32]>, keep: usize) -> Mask {
    let Some(weights) = weights else { return simd::select(level, row, keep, false) };
    let (mut x, mut keys) = ([0f32; MAX_DIM], [0u32; MAX_DIM]);
    let (x, keys) = (&mut x[..row.len()], &mut keys[..row.len()]);
    simd::widen(level, dtype, row, x);
    for ((key, x), w) in keys.iter_mut().zip(x).zip(weights) {
        *key = score_key(*x * w);
    }
    simd::select_keys(level, keys, keep)
}

/// For each channel the tokens of the `keep` largest scores of the group: magnitudes, or `abs(x) * w` with weights (one
/// per token); the older of equal ones. Gives the mask of each token's row.
pub(super) fn select_channels(
    level: Level,
    dtype: DType,
    group: &Group,
    dim: usize,
    weights: Option<[f32; GROUP]>,
    keep: usize,
) -> [Mask; GROUP] {
    let Some(weights) = weights else { return simd::select_channels(level, group, dim, keep) };
    let mut keys = [[0u32; GROUP]; MAX_DIM];
    let mut x = [0f32; MAX_DIM];
    let x = &mut x[..dim];
    for (token, (row, w)) in group.iter().zip(weights).enumerate() {
        simd::widen(level, dtype, &row[..dim], x);
        keys.iter_mut().zip(&*x).for_each(|(keys, x)| keys[token] = score_key(x * w));
    }
    let mut masks = [Mask::default(); GROUP];
    for (channel, keys) in keys[..dim].iter().enumerate() {
        // Of 32 keys the mask has one word: bit i is token i.
        let kept = simd::select_keys(Level::Portable, keys, keep).0[0];
        for (token, mask) in masks.iter_mut().enumerate() {
            mask.0[channel / 32] |= (kept >> token & 1) << (channel % 32);
        }
    }
    masks
}

/// Orders scores: the bits of a non-negative float order like the float; the sign (of a negative x or of -0) does
/// not count; every NaN is the same and above infinity.
fn score_key(score: f32) -> u32 {
    const INFINITY: u32 = f32::INFINITY.to_bits();
    let bits = score.to_bits() & 0x7fff_ffff;
    if bits > INFINITY { 0x7fff_ffff } else { bits }
}

/// `out = round16(row - center)`, the subtraction in f32.
pub(super) fn subtract_center(level: Level, dtype: DType, row: &[u16], center: &[f32], out: &mut [u16]) {
    let mut x = [0f32; MAX_DIM];
    let x = &mut x[..row.len()];
    simd::widen(level, dtype, row, x);
    x.iter_mut().zip(center).for_each(|(x, c)| *x -= c);
    simd::narrow(level, dtype, x, out);
}
