//! The row primitives with AVX-512 F, BW, VL and VBMI2. Semantics and preconditions: the functions of the parent
//! module.

pub(super) use super::avx2::{expand_codes, narrow, widen};
use super::{Border, GROUP, Group, MAGNITUDE, MAX_DIM, Mask, portable, search};
use crate::dtype::ValueType;
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f,avx512bw,popcnt")]
pub(super) fn border(row: &[u16], keep: u32) -> Border {
    // One instance per head_dim, so that the row stays in registers during the search.
    match row.len() {
        64 => border_n::<2>(row, keep),
        96 => border_n::<3>(row, keep),
        128 => border_n::<4>(row, keep),
        dim => {
            assert_eq!(dim, MAX_DIM, "row length");
            border_n::<8>(row, keep)
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,popcnt")]
fn border_n<const WORDS: usize>(row: &[u16], keep: u32) -> Border {
    let clear_sign = _mm512_set1_epi16(MAGNITUDE as i16);
    let mut magnitudes = [clear_sign; WORDS];
    for (magnitudes, row) in magnitudes.iter_mut().zip(row.chunks_exact(32)) {
        *magnitudes = _mm512_and_si512(load32(row), clear_sign);
    }
    search(keep, |least| at_least(&magnitudes, least).count(), |least| at_least(&magnitudes, least))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,popcnt")]
fn at_least<const WORDS: usize>(magnitudes: &[__m512i; WORDS], least: u16) -> Mask {
    let least = _mm512_set1_epi16(least as i16);
    let mut mask = Mask::default();
    for (word, magnitudes) in mask.0.iter_mut().zip(magnitudes) {
        *word = _mm512_cmpge_epu16_mask(*magnitudes, least);
    }
    mask
}

/// 32 values of a row.
#[inline]
#[target_feature(enable = "avx512f")]
fn load32(row: &[u16]) -> __m512i {
    assert_eq!(row.len(), 32, "values of a vector");
    // SAFETY: 32 values of 2 bytes.
    unsafe { _mm512_loadu_si512(row.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn select_channels(group: &Group, dim: usize, keep: i16) -> [Mask; GROUP] {
    portable::select_channels(group, dim, keep)
}

#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn nonzero(row: &[u16]) -> Mask {
    let mut mask = Mask::default();
    for (word, row) in mask.0.iter_mut().zip(row.chunks_exact(32)) {
        *word = _mm512_test_epi16_mask(load32(row), _mm512_set1_epi16(MAGNITUDE as i16));
    }
    mask
}

/// Mask of the `n` low lanes of 32.
#[inline]
fn low_lanes(n: u32) -> u32 {
    ((1u64 << n) - 1) as u32
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
pub(super) fn pack(row: &[u16], mask: &Mask, out: &mut [u8]) {
    let mut out = out;
    for (row, word) in row.chunks_exact(32).zip(mask.0) {
        let packed = _mm512_maskz_compress_epi16(word, load32(row));
        let (here, rest) = out.split_at_mut(2 * word.count_ones() as usize);
        // SAFETY: stores as many values as `word` has bits, which is what `here` holds.
        unsafe {
            _mm512_mask_storeu_epi16(here.as_mut_ptr().cast(), low_lanes(word.count_ones()), packed);
        }
        out = rest;
    }
}

/// 32 channels from the values at `values`: those with a bit take the next value each, the others are +0. Reads
/// no more than `bits` takes.
///
/// # Safety
/// As many 2-byte values as `bits` has bits must be readable at `values`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
pub(crate) unsafe fn expand32(bits: u32, values: *const u8) -> __m512i {
    // SAFETY: the masked load touches only the lanes the caller vouches for.
    let packed = unsafe { _mm512_maskz_loadu_epi16(low_lanes(bits.count_ones()), values.cast()) };
    _mm512_maskz_expand_epi16(bits, packed)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
pub(super) fn expand(bitmap: &[u8], values: &[u8], out: &mut [u16]) {
    let mask = Mask::from_bytes(bitmap);
    let mut padded = [0u8; 2 * MAX_DIM];
    let values = if values.len() >= 2 * mask.count() as usize {
        values
    } else {
        padded[..values.len()].copy_from_slice(values);
        &padded
    };
    let mut at = 0;
    for (word, out) in mask.0.iter().zip(out.chunks_exact_mut(32)) {
        // SAFETY: `at` and the bits of `word` stay within the bits of `mask`, for which `values` has bytes; `out`
        // is 64 bytes.
        unsafe {
            _mm512_storeu_si512(out.as_mut_ptr().cast(), expand32(*word, values.as_ptr().add(at)));
        }
        at += 2 * word.count_ones() as usize;
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn quantize(values: ValueType, from: &[f32], codes: &mut [u8]) -> u16 {
    portable::quantize(values, from, codes)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn dequantize(values: ValueType, scale: f32, codes: &[u8], to: &mut [f32]) {
    portable::dequantize(values, scale, codes, to);
}

#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn zero_dropped(row: &mut [u16], mask: &Mask) {
    for (row, word) in row.chunks_exact_mut(32).zip(mask.0) {
        let kept = _mm512_maskz_mov_epi16(word, load32(row));
        // SAFETY: `row` is 32 values of 2 bytes.
        unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), kept) };
    }
}
