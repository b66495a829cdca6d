//! AVX2, FMA and F16C. 8 channels at a time: one byte shuffle from a table and one conversion make a vector of
//! float32.

use super::ahead::{Ahead, STEP_ROWS};
use super::{BLOCK, Block, Encoding, Row, Softmax, portable};
use crate::cpu::simd_rows::avx2::{expand8, expand8_codes};
use crate::dtype::{DType, ValueType};
use std::arch::x86_64::*;

/// Channels that [`Source::next`] yields.
const STEP: usize = 8;

/// Where the next channels of a row come from.
#[derive(Clone, Copy)]
struct Cursor {
    bits: *const u8,
    values: *const u8,
}

/// How rows are read. The methods are inlined into functions that enable the instructions.
///
/// # Safety
/// Of `next`: the processor has the instructions of this file, and the cursor, made from a row that is as [`Row`]
/// promises, yields at most the channels of that row.
trait Source {
    /// Whether rows have a scale, by which what `next` yields is still to be multiplied.
    const SCALED: bool = false;
    /// The next 8 channels.
    unsafe fn next(cursor: &mut Cursor) -> __m256;
}

struct Packed<const BF16: bool>;
struct PackedE4m3;
struct PackedInt8;
struct DenseHalf<const BF16: bool>;
struct DenseFloat;

fn start(row: &Row) -> Cursor {
    Cursor { bits: row.bits, values: row.values }
}

#[inline(always)]
unsafe fn widen<const BF16: bool>(half: __m128i) -> __m256 {
    // SAFETY: instructions as `Source` says.
    unsafe {
        if BF16 {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
        } else {
            _mm256_cvtph_ps(half)
        }
    }
}

impl<const BF16: bool> Source for Packed<BF16> {
    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> __m256 {
        // SAFETY: a byte of bitmap is left, and `PAD_BYTES` follow the last kept one of the row.
        unsafe {
            let bits = *cursor.bits;
            let x = expand8(bits, cursor.values);
            cursor.bits = cursor.bits.add(1);
            cursor.values = cursor.values.add(2 * bits.count_ones() as usize);
            widen::<BF16>(x)
        }
    }
}

/// The next 8 codes, in the low half.
#[inline(always)]
unsafe fn next_codes(cursor: &mut Cursor) -> __m128i {
    // SAFETY: as in `Packed`.
    unsafe {
        let bits = *cursor.bits;
        let codes = expand8_codes(bits, cursor.values);
        cursor.bits = cursor.bits.add(1);
        cursor.values = cursor.values.add(bits.count_ones() as usize);
        codes
    }
}

impl Source for PackedE4m3 {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> __m256 {
        // SAFETY: as in `next_codes`.
        unsafe {
            // Sign-extended to 16 bits, a code has its sign in the top bits: exponent and fraction move to their place
            // in an f16 of 1/256 of the value, and NaN, which is above all numbers, takes the exponent of NaN.
            let x = _mm_cvtepi8_epi16(next_codes(cursor));
            let magnitude = _mm_and_si128(_mm_slli_epi16::<7>(x), _mm_set1_epi16(0x3f80));
            let nan = _mm_cmpgt_epi16(magnitude, _mm_set1_epi16(0x3f00));
            let nan = _mm_and_si128(nan, _mm_set1_epi16(0x7c00));
            let sign = _mm_and_si128(x, _mm_set1_epi16(i16::MIN));
            _mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(magnitude, nan), sign))
        }
    }
}

impl Source for PackedInt8 {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> __m256 {
        // SAFETY: as in `next_codes`.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(next_codes(cursor))) }
    }
}

impl<const BF16: bool> Source for DenseHalf<BF16> {
    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> __m256 {
        // SAFETY: 8 elements are left.
        unsafe {
            let half = _mm_loadu_si128(cursor.values.cast());
            cursor.values = cursor.values.add(16);
            widen::<BF16>(half)
        }
    }
}

impl Source for DenseFloat {
    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> __m256 {
        // SAFETY: 8 elements are left.
        unsafe {
            let x = _mm256_loadu_ps(cursor.values.cast());
            cursor.values = cursor.values.add(32);
            x
        }
    }
}

/// Calls a function for the source of a block's encoding.
macro_rules! by_source {
    ($block:expr, $name:ident($($arg:expr),*)) => {
        match $block.encoding {
            Encoding::Packed(ValueType::F16) => $name::<Packed<false>>($($arg),*),
            Encoding::Packed(ValueType::Bf16) => $name::<Packed<true>>($($arg),*),
            Encoding::Packed(ValueType::E4m3) => $name::<PackedE4m3>($($arg),*),
            Encoding::Packed(ValueType::Int8) => $name::<PackedInt8>($($arg),*),
            Encoding::Dense(DType::F16) => $name::<DenseHalf<false>>($($arg),*),
            Encoding::Dense(DType::Bf16) => $name::<DenseHalf<true>>($($arg),*),
            Encoding::Dense(DType::F32) => $name::<DenseFloat>($($arg),*),
        }
    };
}

#[target_feature(enable = "avx2,fma,f16c,popcnt")]
pub(super) fn dot(block: &Block<'_>, q: &[f32], scores: &mut [f32], ahead: &mut Ahead<'_>) {
    by_source!(block, dot_source(block, q, scores, ahead));
}

#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn dot_source<S: Source>(block: &Block<'_>, q: &[f32], scores: &mut [f32], ahead: &mut Ahead<'_>) {
    // 8 sums stay in 16 registers next to queries and rows; fewer would leave the multipliers waiting.
    for (q, scores) in q.chunks(4 * block.dim).zip(scores.chunks_mut(4 * BLOCK)) {
        match q.len() / block.dim {
            1 => dot_heads::<S, 1, 4>(block, q, scores, ahead),
            2 => dot_heads::<S, 2, 4>(block, q, scores, ahead),
            3 => dot_heads::<S, 3, 2>(block, q, scores, ahead),
            _ => dot_heads::<S, 4, 2>(block, q, scores, ahead),
        }
    }
}

/// T rows times H heads in registers: each expanded vector meets H queries, each query vector T rows.
#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn dot_heads<S: Source, const H: usize, const T: usize>(
    block: &Block<'_>,
    q: &[f32],
    scores: &mut [f32],
    ahead: &mut Ahead<'_>,
) {
    let dim = block.dim;
    assert!(q.len() == H * dim && scores.len() >= H * BLOCK && BLOCK.is_multiple_of(T), "dot shapes");
    let rows = block.rows();
    for first in (0..rows.len()).step_by(T) {
        if first.is_multiple_of(STEP_ROWS) {
            ahead.step();
        }
        // Past the end the last row is computed again; its scores land in elements that mean nothing.
        let mut cursors = [start(&rows[first]); T];
        for (t, cursor) in cursors.iter_mut().enumerate() {
            *cursor = start(&rows[(first + t).min(rows.len() - 1)]);
        }
        let mut sums = [[_mm256_setzero_ps(); H]; T];
        // SAFETY: instructions by the attribute, rows by the block's invariant; `dim` is a multiple of 32, so the
        // loads from `q` stay below `H * dim`.
        unsafe {
            for channel in (0..dim).step_by(STEP) {
                let mut x = [_mm256_setzero_ps(); T];
                for (x, cursor) in x.iter_mut().zip(&mut cursors) {
                    *x = S::next(cursor);
                }
                for h in 0..H {
                    let q = _mm256_loadu_ps(q.as_ptr().add(h * dim + channel));
                    for (sums, x) in sums.iter_mut().zip(&x) {
                        sums[h] = _mm256_fmadd_ps(*x, q, sums[h]);
                    }
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            let mut four = [_mm256_setzero_ps(); 4];
            four[..H].copy_from_slice(sums);
            let mut of_heads = [0.0; 4];
            // SAFETY: `of_heads` is 4 values of 4 bytes.
            unsafe { _mm_storeu_ps(of_heads.as_mut_ptr(), horizontal(&four)) };
            let scale = if S::SCALED { rows[(first + t).min(rows.len() - 1)].scale } else { 1.0 };
            for (h, score) in of_heads[..H].iter().enumerate() {
                scores[h * BLOCK + first + t] = if S::SCALED { scale * *score } else { *score };
            }
        }
    }
}

/// The sum over the lanes of each of four vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn horizontal(x: &[__m256; 4]) -> __m128 {
    // Twice: interleave and add, which leaves sums of a, b, c, d side by side in each 128-bit lane.
    let pair = |a, b| _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let (ab, cd) = (_mm256_castps_pd(pair(x[0], x[1])), _mm256_castps_pd(pair(x[2], x[3])));
    let quads = _mm256_add_ps(
        _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
        _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)),
    );
    _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps::<1>(quads))
}

#[target_feature(enable = "avx2,fma,f16c,popcnt")]
pub(super) fn weighted_sum(block: &Block<'_>, weights: &[f32], sums: &mut [f32], ahead: &mut Ahead<'_>) {
    by_source!(block, sum_source(block, weights, sums, ahead));
}

#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn sum_source<S: Source>(block: &Block<'_>, weights: &[f32], sums: &mut [f32], ahead: &mut Ahead<'_>) {
    for (weights, sums) in weights.chunks(4 * BLOCK).zip(sums.chunks_mut(4 * block.dim)) {
        match sums.len() / block.dim {
            1 => sum_heads::<S, 1, 4>(block, weights, sums, ahead),
            2 => sum_heads::<S, 2, 4>(block, weights, sums, ahead),
            3 => sum_heads::<S, 3, 2>(block, weights, sums, ahead),
            _ => sum_heads::<S, 4, 2>(block, weights, sums, ahead),
        }
    }
}

/// `8 * W` channels of H heads in registers while the rows go by.
#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn sum_heads<S: Source, const H: usize, const W: usize>(
    block: &Block<'_>,
    weights: &[f32],
    sums: &mut [f32],
    ahead: &mut Ahead<'_>,
) {
    let dim = block.dim;
    assert!(
        sums.len() == H * dim && weights.len() >= H * BLOCK && dim.is_multiple_of(W * STEP),
        "sum shapes"
    );
    let rows = block.rows();
    let mut cursors = [Cursor { bits: std::ptr::null(), values: std::ptr::null() }; BLOCK];
    cursors.iter_mut().zip(rows).for_each(|(cursor, row)| *cursor = start(row));
    for channel in (0..dim).step_by(W * STEP) {
        // SAFETY: instructions by the attribute, rows by the block's invariant; each pass takes `8 W` channels of a
        // row and `W * STEP` divides `dim`, which also bounds the accesses to `sums`; at most BLOCK rows.
        unsafe {
            let at = |h: usize, w: usize| h * dim + channel + w * STEP;
            let mut totals = [[_mm256_setzero_ps(); W]; H];
            for (h, totals) in totals.iter_mut().enumerate() {
                for (w, total) in totals.iter_mut().enumerate() {
                    *total = _mm256_loadu_ps(sums.as_ptr().add(at(h, w)));
                }
            }
            for (t, cursor) in cursors[..rows.len()].iter_mut().enumerate() {
                if t.is_multiple_of(STEP_ROWS) {
                    ahead.step();
                }
                let mut x = [_mm256_setzero_ps(); W];
                for x in &mut x {
                    *x = S::next(cursor);
                }
                for (h, totals) in totals.iter_mut().enumerate() {
                    let mut weight = *weights.as_ptr().add(h * BLOCK + t);
                    if S::SCALED {
                        weight *= rows[t].scale;
                    }
                    let weight = _mm256_set1_ps(weight);
                    for (total, x) in totals.iter_mut().zip(&x) {
                        *total = _mm256_fmadd_ps(weight, *x, *total);
                    }
                }
            }
            for (h, totals) in totals.iter().enumerate() {
                for (w, total) in totals.iter().enumerate() {
                    _mm256_storeu_ps(sums.as_mut_ptr().add(at(h, w)), *total);
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,popcnt")]
pub(super) fn expand(block: &Block<'_>, out: &mut [f32], ahead: &mut Ahead<'_>) {
    by_source!(block, expand_source(block, out, ahead));
}

#[target_feature(enable = "avx2,fma,f16c,popcnt")]
fn expand_source<S: Source>(block: &Block<'_>, out: &mut [f32], ahead: &mut Ahead<'_>) {
    for (t, (row, out)) in block.rows().iter().zip(out.chunks_exact_mut(block.dim)).enumerate() {
        if t.is_multiple_of(STEP_ROWS) {
            ahead.step();
        }
        let scale = _mm256_set1_ps(row.scale);
        let mut row = start(row);
        for out in out.chunks_exact_mut(STEP) {
            // SAFETY: instructions by the attribute, rows by the block's invariant; `out` is 8 values.
            unsafe {
                let x = S::next(&mut row);
                _mm256_storeu_ps(out.as_mut_ptr(), if S::SCALED { _mm256_mul_ps(scale, x) } else { x });
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn softmax(scores: &mut [f32], softmax: &Softmax) -> (f32, f32) {
    portable::softmax_with::<true>(scores, softmax)
}
