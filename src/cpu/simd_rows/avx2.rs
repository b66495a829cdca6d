//! The row primitives with AVX2, F16C and POPCNT. Semantics and preconditions: the functions of the parent module.

use super::tables::{EXPAND, EXPAND_CODES, PACK};
use super::{Border, GROUP, Group, MAGNITUDE, MAX_DIM, Mask, canonical_nan, portable, search};
use crate::dtype::{DType, ValueType};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,popcnt")]
pub(super) fn border(row: &[u16], keep: u32) -> Border {
    // One instance per head_dim, so that the row stays in registers during the search (up to dim 128).
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

#[target_feature(enable = "avx2,popcnt")]
fn border_n<const WORDS: usize>(row: &[u16], keep: u32) -> Border {
    let magnitudes = magnitudes::<WORDS>(row);
    search(keep, |least| at_least(&magnitudes, least).count(), |least| at_least(&magnitudes, least))
}

#[target_feature(enable = "avx2")]
pub(super) fn select_channels(group: &Group, dim: usize, keep: i16) -> [Mask; GROUP] {
    portable::select_channels(group, dim, keep)
}

#[target_feature(enable = "avx2,popcnt")]
pub(super) fn nonzero(row: &[u16]) -> Mask {
    match row.len() {
        64 => at_least(&magnitudes::<2>(row), 1),
        96 => at_least(&magnitudes::<3>(row), 1),
        128 => at_least(&magnitudes::<4>(row), 1),
        dim => {
            assert_eq!(dim, MAX_DIM, "row length");
            at_least(&magnitudes::<8>(row), 1)
        }
    }
}

/// The magnitudes of a row, two vectors per mask word.
#[inline]
#[target_feature(enable = "avx2")]
fn magnitudes<const WORDS: usize>(row: &[u16]) -> [[__m256i; 2]; WORDS] {
    assert_eq!(row.len(), WORDS * 32, "row length");
    let clear_sign = _mm256_set1_epi16(MAGNITUDE as i16);
    let mut vectors = [[clear_sign; 2]; WORDS];
    for (pair, row) in vectors.iter_mut().zip(row.chunks_exact(32)) {
        for (vector, row) in pair.iter_mut().zip(row.chunks_exact(16)) {
            // SAFETY: `row` is 16 values of 2 bytes.
            let bits = unsafe { _mm256_loadu_si256(row.as_ptr().cast()) };
            *vector = _mm256_and_si256(bits, clear_sign);
        }
    }
    vectors
}

#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn at_least<const WORDS: usize>(magnitudes: &[[__m256i; 2]; WORDS], least: u16) -> Mask {
    // Signed "greater than least - 1": magnitudes have 15 bits, and least may be 0 or 0x8000 (above all).
    let below = _mm256_set1_epi16(least.wrapping_sub(1) as i16);
    let mut mask = Mask::default();
    for (word, pair) in mask.0.iter_mut().zip(magnitudes) {
        let low = _mm256_cmpgt_epi16(pair[0], below);
        let high = _mm256_cmpgt_epi16(pair[1], below);
        // packs works inside 128-bit lanes; the permutation puts channels back in order.
        let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi16(low, high));
        *word = _mm256_movemask_epi8(bytes) as u32;
    }
    mask
}

#[target_feature(enable = "avx2,popcnt")]
pub(super) fn pack(row: &[u16], mask: &Mask, out: &mut [u8]) {
    // Each store writes 8 values, whatever it keeps of them; the buffer has room for what the last one adds.
    let mut buffer = [0u8; 2 * MAX_DIM + 16];
    let mut at = 0;
    for (row, word) in row.chunks_exact(32).zip(mask.0) {
        for (row, bits) in row.chunks_exact(8).zip(word.to_le_bytes()) {
            // SAFETY: `row` is 16 bytes, so is a table entry, and `at` is at most 2 * (MAX_DIM - 8) here.
            unsafe {
                let values = _mm_loadu_si128(row.as_ptr().cast());
                let control = _mm_load_si128(PACK.0[usize::from(bits)].as_ptr().cast());
                _mm_storeu_si128(buffer.as_mut_ptr().add(at).cast(), _mm_shuffle_epi8(values, control));
            }
            at += 2 * bits.count_ones() as usize;
        }
    }
    out.copy_from_slice(&buffer[..out.len()]);
}

/// 8 channels from the values at `values`: those with a bit take the next value each, the others are +0.
///
/// # Safety
/// 16 bytes at `values` must be readable, however few of them `bits` takes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn expand8(bits: u8, values: *const u8) -> __m128i {
    // SAFETY: the caller vouches for `values`; a table entry is 16 bytes, aligned.
    unsafe {
        let control = _mm_load_si128(EXPAND.0[usize::from(bits)].as_ptr().cast());
        _mm_shuffle_epi8(_mm_loadu_si128(values.cast()), control)
    }
}

#[target_feature(enable = "avx2,popcnt")]
pub(super) fn expand(bitmap: &[u8], values: &[u8], out: &mut [u16]) {
    // Near the end of a page the row continues in a copy with room for the last load.
    let mut padded = [0u8; 2 * MAX_DIM + 16];
    let needed = 2 * Mask::from_bytes(bitmap).count() as usize + 16;
    let values = if values.len() >= needed {
        values
    } else {
        let there = values.len().min(2 * MAX_DIM);
        padded[..there].copy_from_slice(&values[..there]);
        &padded
    };
    let mut at = 0;
    for (bits, out) in bitmap.iter().zip(out.chunks_exact_mut(8)) {
        // SAFETY: `at + 16` is at most `needed`, which `values` has; `out` is 16 bytes.
        unsafe {
            _mm_storeu_si128(out.as_mut_ptr().cast(), expand8(*bits, values.as_ptr().add(at)));
        }
        at += 2 * bits.count_ones() as usize;
    }
}

/// 8 channels from the codes at `codes`: those with a bit take the next code each, the others are 0. They are the low 8
/// bytes of the result.
///
/// # Safety
/// 8 bytes at `codes` must be readable, however few of them `bits` takes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) unsafe fn expand8_codes(bits: u8, codes: *const u8) -> __m128i {
    // SAFETY: the caller vouches for `codes`; a table entry is 8 bytes.
    unsafe {
        let control = _mm_loadl_epi64(EXPAND_CODES[usize::from(bits)].as_ptr().cast());
        _mm_shuffle_epi8(_mm_loadl_epi64(codes.cast()), control)
    }
}

#[target_feature(enable = "avx2,popcnt")]
pub(super) fn expand_codes(bitmap: &[u8], codes: &[u8], out: &mut [u8]) {
    // As in `expand`.
    let mut padded = [0u8; MAX_DIM + 8];
    let needed = Mask::from_bytes(bitmap).count() as usize + 8;
    let codes = if codes.len() >= needed {
        codes
    } else {
        let there = codes.len().min(MAX_DIM);
        padded[..there].copy_from_slice(&codes[..there]);
        &padded
    };
    let mut at = 0;
    for (bits, out) in bitmap.iter().zip(out.chunks_exact_mut(8)) {
        // SAFETY: `at + 8` is at most `needed`, which `codes` has; `out` is 8 bytes.
        unsafe {
            _mm_storel_epi64(out.as_mut_ptr().cast(), expand8_codes(*bits, codes.as_ptr().add(at)));
        }
        at += bits.count_ones() as usize;
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn quantize(values: ValueType, from: &[f32], codes: &mut [u8]) -> u16 {
    portable::quantize(values, from, codes)
}

#[target_feature(enable = "avx2")]
pub(super) fn dequantize(values: ValueType, scale: f32, codes: &[u8], to: &mut [f32]) {
    portable::dequantize(values, scale, codes, to);
}

#[target_feature(enable = "avx2")]
pub(super) fn zero_dropped(row: &mut [u16], mask: &Mask) {
    let channel_bits =
        _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, i16::MIN);
    for (row, word) in row.chunks_exact_mut(32).zip(mask.0) {
        for (row, bits) in row.chunks_exact_mut(16).zip([word as i16, (word >> 16) as i16]) {
            let set = _mm256_and_si256(_mm256_set1_epi16(bits), channel_bits);
            let kept = _mm256_cmpeq_epi16(set, channel_bits);
            // SAFETY: `row` is 16 values of 2 bytes.
            unsafe {
                let x = _mm256_loadu_si256(row.as_ptr().cast());
                _mm256_storeu_si256(row.as_mut_ptr().cast(), _mm256_and_si256(x, kept));
            }
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen(dtype: DType, from: &[u16], to: &mut [f32]) {
    for (from, to) in from.chunks_exact(8).zip(to.chunks_exact_mut(8)) {
        // SAFETY: `from` is 8 values of 2 bytes, `to` 8 of 4.
        unsafe {
            let bits = _mm_loadu_si128(from.as_ptr().cast());
            let x = match dtype {
                DType::F16 => _mm256_cvtph_ps(bits),
                _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))),
            };
            _mm256_storeu_ps(to.as_mut_ptr(), x);
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn narrow(dtype: DType, from: &[f32], to: &mut [u16]) {
    for (from, to) in from.chunks_exact(8).zip(to.chunks_exact_mut(8)) {
        // SAFETY: `from` is 8 values of 4 bytes, `to` 8 of 2.
        unsafe {
            let x = _mm256_loadu_ps(from.as_ptr());
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
            // 32-bit lanes of all ones narrow to 16-bit lanes of all ones.
            let nan = _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256::<1>(nan));
            let rounded = match dtype {
                DType::F16 => _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x),
                _ => round_bf16(_mm256_castps_si256(x)),
            };
            let y = _mm_blendv_epi8(rounded, _mm_set1_epi16(canonical_nan(dtype) as i16), nan);
            _mm_storeu_si128(to.as_mut_ptr().cast(), y);
        }
    }
}

/// The upper halves of 8 f32, rounded to nearest even. NaN comes out as anything.
#[inline]
#[target_feature(enable = "avx2")]
fn round_bf16(bits: __m256i) -> __m128i {
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let high = _mm256_srli_epi32::<16>(rounded);
    _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256::<1>(high))
}
