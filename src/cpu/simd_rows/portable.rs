//! The row primitives in plain Rust: the definition the SIMD versions are tested against.

pub(super) use super::quantize::{dequantize, quantize};
use super::{Border, GROUP, Group, MAGNITUDE, MAGNITUDE_BITS, MAX_DIM, Mask, search};
use crate::dtype::DType;
use half::{bf16, f16};

pub(super) fn border(row: &[u16], keep: u32) -> Border {
    let mut magnitudes = [0; MAX_DIM];
    let magnitudes = &mut magnitudes[..row.len()];
    magnitudes.iter_mut().zip(row).for_each(|(m, x)| *m = x & MAGNITUDE);
    // Sums of 32 in 16 bits, which compilers turn into vector code.
    let count_32 = |row: &[u16], least| row.iter().map(|x| u16::from(*x >= least)).sum::<u16>();
    let count = |least| magnitudes.chunks_exact(32).map(|row| u32::from(count_32(row, least))).sum();
    search(keep, count, |least| at_least(magnitudes, least))
}

fn at_least(magnitudes: &[u16], least: u16) -> Mask {
    let mut mask = Mask::default();
    for (word, magnitudes) in mask.0.iter_mut().zip(magnitudes.chunks_exact(32)) {
        *word = magnitudes.iter().enumerate().fold(0, |bits, (c, m)| bits | u32::from(*m >= least) << c);
    }
    mask
}

/// As `search`, on 32 channels side by side. The SIMD levels compile this same code with their instructions, so
/// its loops are over fixed arrays.
#[inline(always)]
pub(super) fn select_channels(group: &Group, dim: usize, keep: i16) -> [Mask; GROUP] {
    let mut masks = [Mask::default(); GROUP];
    for word in 0..dim / 32 {
        let mut magnitudes = [[0i16; 32]; GROUP];
        for (to, row) in magnitudes.iter_mut().zip(group) {
            for (to, x) in to.iter_mut().zip(&row[word * 32..][..32]) {
                *to = (x & MAGNITUDE) as i16;
            }
        }
        let mut threshold = [0i16; 32];
        for bit in (0..MAGNITUDE_BITS).rev() {
            let mut count = [0i16; 32];
            for row in &magnitudes {
                for c in 0..32 {
                    count[c] += i16::from(row[c] >= threshold[c] | 1 << bit);
                }
            }
            for c in 0..32 {
                threshold[c] |= i16::from(count[c] >= keep) << bit;
            }
        }
        // How many tokens at the threshold fit beside those above it.
        let mut room = [keep; 32];
        for row in &magnitudes {
            for c in 0..32 {
                room[c] -= i16::from(row[c] > threshold[c]);
            }
        }
        for (mask, row) in masks.iter_mut().zip(&magnitudes) {
            let mut kept = [0u32; 32];
            for c in 0..32 {
                let tied = i16::from(row[c] == threshold[c]) & i16::from(room[c] > 0);
                room[c] -= tied;
                kept[c] = (tied | i16::from(row[c] > threshold[c])) as u32;
            }
            mask.0[word] = kept.iter().enumerate().fold(0, |bits, (c, kept)| bits | kept << c);
        }
    }
    masks
}

pub(super) fn nonzero(row: &[u16]) -> Mask {
    let mut mask = Mask::default();
    for (word, row) in mask.0.iter_mut().zip(row.chunks_exact(32)) {
        *word = row.iter().enumerate().fold(0, |bits, (c, x)| bits | u32::from(x & MAGNITUDE != 0) << c);
    }
    mask
}

pub(super) fn pack(row: &[u16], mask: &Mask, out: &mut [u8]) {
    for (to, c) in out.chunks_exact_mut(2).zip(mask.channels()) {
        to.copy_from_slice(&row[c].to_le_bytes());
    }
}

pub(super) fn expand(bitmap: &[u8], values: &[u8], out: &mut [u16]) {
    expand_with(bitmap, values.chunks_exact(2).map(|v| u16::from_le_bytes([v[0], v[1]])), out);
}

pub(super) fn expand_codes(bitmap: &[u8], codes: &[u8], out: &mut [u8]) {
    expand_with(bitmap, codes.iter().copied(), out);
}

fn expand_with<T: Default>(bitmap: &[u8], mut values: impl Iterator<Item = T>, out: &mut [T]) {
    for (bits, out) in bitmap.iter().zip(out.chunks_exact_mut(8)) {
        for (c, out) in out.iter_mut().enumerate() {
            *out = match bits >> c & 1 {
                1 => values.next().unwrap_or_default(),
                _ => T::default(),
            };
        }
    }
}

pub(super) fn zero_dropped(row: &mut [u16], mask: &Mask) {
    for (c, x) in row.iter_mut().enumerate() {
        if mask.0[c / 32] >> (c % 32) & 1 == 0 {
            *x = 0;
        }
    }
}

pub(super) fn widen(dtype: DType, from: &[u16], to: &mut [f32]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = match dtype {
            DType::F16 => f16::from_bits(from).to_f32(),
            // Exact for NaN too, where `half` would set the quiet bit.
            _ => f32::from_bits(u32::from(from) << 16),
        };
    }
}

pub(super) fn narrow(dtype: DType, from: &[f32], to: &mut [u16]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = match dtype {
            _ if from.is_nan() => super::canonical_nan(dtype),
            DType::F16 => f16::from_f32(from).to_bits(),
            _ => bf16::from_f32(from).to_bits(),
        };
    }
}
