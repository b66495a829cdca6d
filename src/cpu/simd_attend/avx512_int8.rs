//! Rows of int8 values with AVX-512 VNNI, whose `vpdpbusd` multiplies 64 pairs of bytes and adds up four products in
//! each 32-bit lane.
//!
//! Queries and weights become integers of two bytes times a factor, and each of the two bytes meets the codes: 256 times
//! the sum of products with high bytes, plus that with low bytes, is exact. Scales multiply the scores of their rows, or
//! weights before these become integers. Numbers that no such integers stand for (negative weights, NaN, infinities, rows
//! of tiny numbers) take the loops in float32.

use super::ahead::{Ahead, STEP_ROWS};
use super::avx512::{self, Cursor, PackedInt8, packed_at};
use super::{BLOCK, Block, MAX_DIM};
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

/// Channels that are expanded at once.
const STEP: usize = 64;
/// Such steps in a row at most.
const MAX_STEPS: usize = MAX_DIM / STEP;
/// Rows whose keys meet the queries together.
const KEY_ROWS: usize = 8;
/// The largest integers: of queries, signed bytes hold them; of weights, unsigned ones.
const LARGEST_QUERY: f32 = 127.0 * 256.0;
const LARGEST_WEIGHT: f32 = 65535.0;
/// The largest of the numbers that become integers together lies between this and its inverse, so that no factor over- or
/// underflows.
const SMALLEST: f32 = 1e-30;

/// Bytes for a vector, by channel or token.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Bytes([u8; 64]);

/// High and low bytes.
type Terms = [Bytes; 2];

const NO_TERMS: Terms = [Bytes([0; 64]); 2];

/// As [`super::Simd::dot`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn dot(block: &Block<'_>, q: &[f32], scores: &mut [f32], ahead: &mut Ahead<'_>) {
    for (q, scores) in q.chunks(4 * block.dim).zip(scores.chunks_mut(4 * BLOCK)) {
        let done = match q.len() / block.dim {
            1 => dot_heads::<1>(block, q, scores, ahead),
            2 => dot_heads::<2>(block, q, scores, ahead),
            3 => dot_heads::<3>(block, q, scores, ahead),
            _ => dot_heads::<4>(block, q, scores, ahead),
        };
        if !done {
            avx512::dot_source::<PackedInt8>(block, q, scores, ahead);
        }
    }
}

/// As [`super::Simd::weighted_sum`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn weighted_sum(block: &Block<'_>, weights: &[f32], sums: &mut [f32], ahead: &mut Ahead<'_>) {
    for (weights, sums) in weights.chunks(4 * BLOCK).zip(sums.chunks_mut(4 * block.dim)) {
        let done = match sums.len() / block.dim {
            1 => sum_heads::<1>(block, weights, sums, ahead),
            2 => sum_heads::<2>(block, weights, sums, ahead),
            3 => sum_heads::<3>(block, weights, sums, ahead),
            _ => sum_heads::<4>(block, weights, sums, ahead),
        };
        if !done {
            avx512::sum_source::<PackedInt8>(block, weights, sums, ahead);
        }
    }
}

/// The codes of the next `channels` (64, or 32 that a row ends with); 0 where a channel has none.
///
/// # Safety
/// The cursor comes from a row of at least as many more channels that is as [`Row`](super::Row) promises.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
unsafe fn next_codes(cursor: &mut Cursor, channels: usize) -> __m512i {
    // SAFETY: `channels / 8` bytes of bitmap are left, and `PAD_BYTES` follow the last kept value.
    unsafe {
        let bits = if channels < STEP {
            u64::from(cursor.bits.cast::<u32>().read_unaligned())
        } else {
            cursor.bits.cast::<u64>().read_unaligned()
        };
        // Loaded on its own: see `load` in `avx512`.
        let mut codes = _mm512_loadu_si512(cursor.values.cast());
        std::arch::asm!("/* {0} */", inout(zmm_reg) codes, options(pure, nomem, nostack, preserves_flags));
        cursor.bits = cursor.bits.wrapping_add(STEP / 8);
        cursor.values = cursor.values.add(bits.count_ones() as usize);
        _mm512_maskz_expand_epi8(bits, codes)
    }
}

/// False, with nothing done, if the queries need float32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")]
fn dot_heads<const H: usize>(
    block: &Block<'_>,
    q: &[f32],
    scores: &mut [f32],
    ahead: &mut Ahead<'_>,
) -> bool {
    let dim = block.dim;
    assert!(q.len() == H * dim && scores.len() >= H * BLOCK, "dot shapes");
    let mut queries = [const { Query::NONE }; H];
    for (query, q) in queries.iter_mut().zip(q.chunks_exact(dim)) {
        if !query.set(q) {
            return false;
        }
    }
    let (mut factors, mut corrections) = ([0f32; 4], [0i32; 4]);
    for (h, query) in queries.iter().enumerate() {
        (factors[h], corrections[h]) = (query.factor, query.correction);
    }
    let rows = block.rows();
    for first in (0..rows.len()).step_by(KEY_ROWS) {
        (0..KEY_ROWS / STEP_ROWS).for_each(|_| ahead.step());
        // Past the end the last row is computed again; its scores land in elements that mean nothing.
        let row = |t: usize| &rows[(first + t).min(rows.len() - 1)];
        // In every 128 bits one row, whose lanes are still to be added up.
        let mut sums = [[[_mm512_setzero_si512(); KEY_ROWS / 4]; 2]; H];
        // SAFETY: instructions by the attribute, rows by the block's invariant; each cursor takes `dim` channels, and
        // terms are 64 bytes.
        unsafe {
            let at = |t: usize| packed_at(row(t), 0, 1);
            let mut cursors = [[at(0), at(1), at(2), at(3)], [at(4), at(5), at(6), at(7)]];
            for step in 0..dim.div_ceil(STEP) {
                let channels = dim - step * STEP;
                let mut keys = [[_mm512_setzero_si512(); KEY_ROWS / 4]; 4];
                for (half, [a, b, c, d]) in cursors.iter_mut().enumerate() {
                    let codes = [
                        next_codes(a, channels),
                        next_codes(b, channels),
                        next_codes(c, channels),
                        next_codes(d, channels),
                    ];
                    for (keys, codes) in keys.iter_mut().zip(transpose(&codes)) {
                        // With 128 added, codes are unsigned, as the first factors of `vpdpbusd` have to be.
                        keys[half] = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
                    }
                }
                for (j, keys) in keys.iter().enumerate() {
                    for (sums, query) in sums.iter_mut().zip(&queries) {
                        for (sums, term) in sums.iter_mut().zip(&query.terms[step]) {
                            let q = _mm_load_si128(term.0.as_ptr().add(16 * j).cast());
                            let q = _mm512_broadcast_i32x4(q);
                            for (sum, keys) in sums.iter_mut().zip(keys) {
                                *sum = _mm512_dpbusd_epi32(*sum, *keys, q);
                            }
                        }
                    }
                }
            }
        }
        for half in 0..KEY_ROWS / 4 {
            let mut of_heads = [_mm512_setzero_si512(); 4];
            for (of_head, sums) in of_heads.iter_mut().zip(&sums) {
                *of_head = _mm512_add_epi32(_mm512_slli_epi32::<8>(sums[0][half]), sums[1][half]);
            }
            let scale = |t: usize| row(4 * half + t).scale;
            let scales = _mm_setr_ps(scale(0), scale(1), scale(2), scale(3));
            // SAFETY: `corrections` and `factors` are 16 bytes each, `of_heads` is 64, and stores end at
            // `first + 8 <= BLOCK` in each of H rows of scores.
            unsafe {
                let corrections = _mm512_broadcast_i32x4(_mm_loadu_si128(corrections.as_ptr().cast()));
                let factors = _mm512_broadcast_f32x4(_mm_loadu_ps(factors.as_ptr()));
                let products = _mm512_cvtepi32_ps(_mm512_add_epi32(add_lanes(&of_heads), corrections));
                // From a row in every 128 bits to a head.
                let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                let products = _mm512_permutexvar_ps(order, _mm512_mul_ps(products, factors));
                let products = _mm512_mul_ps(products, _mm512_broadcast_f32x4(scales));
                let to = scores.as_mut_ptr().add(first + 4 * half);
                _mm_storeu_ps(to, _mm512_castps512_ps128(products));
                if H > 1 {
                    _mm_storeu_ps(to.add(BLOCK), _mm512_extractf32x4_ps::<1>(products));
                }
                if H > 2 {
                    _mm_storeu_ps(to.add(2 * BLOCK), _mm512_extractf32x4_ps::<2>(products));
                }
                if H > 3 {
                    _mm_storeu_ps(to.add(3 * BLOCK), _mm512_extractf32x4_ps::<3>(products));
                }
            }
        }
    }
    true
}

/// A query row: `factor` times integers.
#[derive(Clone, Copy)]
struct Query {
    terms: [Terms; MAX_STEPS],
    factor: f32,
    /// -128 times the sum of the integers: what the offset of the codes adds to each score.
    correction: i32,
}

impl Query {
    const NONE: Self = Self { terms: [NO_TERMS; MAX_STEPS], factor: 0.0, correction: 0 };

    /// False if the query needs float32.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn set(&mut self, q: &[f32]) -> bool {
        let mut largest = _mm512_setzero_ps();
        let mut all_finite = true;
        for x in q.chunks_exact(16) {
            // SAFETY: 16 floats.
            let x = _mm512_abs_ps(unsafe { _mm512_loadu_ps(x.as_ptr()) });
            all_finite &= _mm512_cmp_ps_mask::<_CMP_LE_OQ>(x, _mm512_set1_ps(1.0 / SMALLEST)) == 0xffff;
            largest = _mm512_max_ps(largest, x);
        }
        let largest = _mm512_reduce_max_ps(largest);
        if !all_finite || largest < SMALLEST {
            return false;
        }
        self.factor = largest / LARGEST_QUERY;
        let inverse = _mm512_set1_ps(LARGEST_QUERY / largest);
        let mut sum = _mm512_setzero_si512();
        for (i, x) in q.chunks_exact(16).enumerate() {
            // SAFETY: 16 floats, and 16 bytes in each term: there are at most MAX_DIM channels.
            unsafe {
                let x = _mm512_cvtps_epi32(_mm512_mul_ps(inverse, _mm512_loadu_ps(x.as_ptr())));
                sum = _mm512_add_epi32(sum, x);
                let high = _mm512_srai_epi32::<8>(_mm512_add_epi32(x, _mm512_set1_epi32(128)));
                for (term, x) in self.terms[i / 4].iter_mut().zip([high, x]) {
                    let to = term.0.as_mut_ptr().add(i % 4 * 16);
                    _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(x));
                }
            }
        }
        self.correction = -128 * _mm512_reduce_add_epi32(sum);
        true
    }
}

/// In every 128 bits, the sums over the four lanes of each of the vectors, in order.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_lanes(x: &[__m512i; 4]) -> __m512i {
    let pair = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (ab, cd) = (pair(x[0], x[1]), pair(x[2], x[3]));
    _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
}

/// 4 x 4 parts of 128 bits: part j of vector i becomes part i of vector j.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(x: &[__m512i; 4]) -> [__m512i; 4] {
    let low = [_mm512_shuffle_i32x4::<0x44>(x[0], x[1]), _mm512_shuffle_i32x4::<0x44>(x[2], x[3])];
    let high = [_mm512_shuffle_i32x4::<0xee>(x[0], x[1]), _mm512_shuffle_i32x4::<0xee>(x[2], x[3])];
    [
        _mm512_shuffle_i32x4::<0x88>(low[0], low[1]),
        _mm512_shuffle_i32x4::<0xdd>(low[0], low[1]),
        _mm512_shuffle_i32x4::<0x88>(high[0], high[1]),
        _mm512_shuffle_i32x4::<0xdd>(high[0], high[1]),
    ]
}

/// False, with nothing done, if the weights need float32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")]
fn sum_heads<const H: usize>(
    block: &Block<'_>,
    weights: &[f32],
    sums: &mut [f32],
    ahead: &mut Ahead<'_>,
) -> bool {
    let (dim, rows) = (block.dim, block.rows());
    assert!(sums.len() == H * dim && weights.len() >= H * BLOCK, "sum shapes");
    let mut scales = [0f32; BLOCK];
    scales.iter_mut().zip(rows).for_each(|(scale, row)| *scale = row.scale);
    let mut integers = [Weights { terms: NO_TERMS, factor: 0.0 }; H];
    for (integers, weights) in integers.iter_mut().zip(weights.chunks_exact(BLOCK)) {
        if !integers.set(&scales, weights, rows.len()) {
            return false;
        }
    }
    // Of 4 rows, 64 channels in 4 vectors; see `interleave`.
    let mut values = [const { MaybeUninit::<[__m512i; 4]>::uninit() }; BLOCK / 4];
    for channel in (0..dim).step_by(STEP) {
        for (first, values) in (0..rows.len()).step_by(4).zip(&mut values) {
            ahead.step();
            // Past the end the last row comes again, with weights of 0.
            // SAFETY: the block's invariant, and `dim` channels in all.
            let codes = |t: usize| unsafe {
                let row = &rows[(first + t).min(rows.len() - 1)];
                next_codes(&mut packed_at(row, channel, 1), dim - channel)
            };
            values.write(interleave(&[codes(0), codes(1), codes(2), codes(3)]));
        }
        let values = &values[..rows.len().div_ceil(4)];
        // SAFETY: those have been written.
        let values = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) };
        accumulate::<H>(values, &integers, sums, dim, channel);
    }
    true
}

/// Weights of a block for one head, scales included: `factor` times unsigned integers.
#[derive(Clone, Copy)]
struct Weights {
    terms: Terms,
    factor: f32,
}

impl Weights {
    /// From the first `n` of BLOCK weights; those behind become 0. False if they need float32.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn set(&mut self, scales: &[f32; BLOCK], weights: &[f32], n: usize) -> bool {
        assert!(weights.len() == BLOCK && n <= BLOCK, "weights");
        let mut x = [_mm512_setzero_ps(); BLOCK / 16];
        let mut largest = _mm512_setzero_ps();
        let mut all_fit = true;
        for (i, x) in x.iter_mut().enumerate() {
            let there = (u64::MAX.unbounded_shr((BLOCK - n) as u32) >> (16 * i)) as u16;
            // SAFETY: 16 of BLOCK floats each.
            *x = unsafe {
                let weights = _mm512_maskz_loadu_ps(there, weights.as_ptr().add(16 * i));
                _mm512_mul_ps(weights, _mm512_loadu_ps(scales.as_ptr().add(16 * i)))
            };
            let (low, high) = (_mm512_setzero_ps(), _mm512_set1_ps(1.0 / SMALLEST));
            all_fit &= _mm512_cmp_ps_mask::<_CMP_GE_OQ>(*x, low) == 0xffff
                && _mm512_cmp_ps_mask::<_CMP_LE_OQ>(*x, high) == 0xffff;
            largest = _mm512_max_ps(largest, *x);
        }
        let largest = _mm512_reduce_max_ps(largest);
        if !all_fit || largest < SMALLEST {
            return false;
        }
        self.factor = largest / LARGEST_WEIGHT;
        let inverse = _mm512_set1_ps(LARGEST_WEIGHT / largest);
        for (i, x) in x.iter().enumerate() {
            let x = _mm512_cvtps_epi32(_mm512_mul_ps(inverse, *x));
            for (term, x) in self.terms.iter_mut().zip([_mm512_srli_epi32::<8>(x), x]) {
                // SAFETY: 16 of 64 bytes each.
                unsafe {
                    let to = term.0.as_mut_ptr().add(16 * i);
                    _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(x));
                }
            }
        }
        true
    }
}

/// Four rows channel by channel: in each part of 128 bits, vector j gets channels `4 j` to `4 j + 3`, four rows of each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(x: &[__m512i; 4]) -> [__m512i; 4] {
    let low = [_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpacklo_epi8(x[2], x[3])];
    let high = [_mm512_unpackhi_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[2], x[3])];
    [
        _mm512_unpacklo_epi16(low[0], low[1]),
        _mm512_unpackhi_epi16(low[0], low[1]),
        _mm512_unpacklo_epi16(high[0], high[1]),
        _mm512_unpackhi_epi16(high[0], high[1]),
    ]
}

/// Adds `channel` and up to 63 more of H heads to `sums` `[H, dim]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn accumulate<const H: usize>(
    values: &[[__m512i; 4]],
    weights: &[Weights; H],
    sums: &mut [f32],
    dim: usize,
    channel: usize,
) {
    assert!(values.len() <= BLOCK / 4, "weighted sum shapes");
    let mut totals = [[_mm512_setzero_si512(); 4]; H];
    for term in 0..2 {
        for total in totals.as_flattened_mut() {
            *total = _mm512_slli_epi32::<8>(*total);
        }
        for (g, values) in values.iter().enumerate() {
            for (totals, weights) in totals.iter_mut().zip(weights) {
                // SAFETY: 4 of 64 bytes.
                let weight = unsafe { weights.terms[term].0.as_ptr().add(4 * g).cast::<i32>().read() };
                let weight = _mm512_set1_epi32(weight);
                for (total, values) in totals.iter_mut().zip(values) {
                    *total = _mm512_dpbusd_epi32(*total, weight, *values);
                }
            }
        }
    }
    for ((totals, weights), sums) in totals.iter().zip(weights).zip(sums.chunks_exact_mut(dim)) {
        let factor = _mm512_set1_ps(weights.factor);
        for (total, sums) in transpose(totals).iter().zip(sums[channel..].chunks_exact_mut(16)) {
            // SAFETY: 16 floats.
            unsafe {
                let sum = _mm512_loadu_ps(sums.as_ptr());
                let sum = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(*total), sum);
                _mm512_storeu_ps(sums.as_mut_ptr(), sum);
            }
        }
    }
}
