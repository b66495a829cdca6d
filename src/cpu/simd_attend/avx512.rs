//! AVX-512 F, BW and VBMI2. 32 channels at a time: expansion and two conversions make two vectors of float32. Rows of int8
//! values mostly go through [`avx512_int8`] instead.

use super::ahead::{Ahead, STEP_ROWS};
use super::{BLOCK, Block, Encoding, Row, Softmax, avx512_int8, portable};
use crate::dtype::{DType, ValueType};
use std::arch::x86_64::*;

/// Channels that [`Source::next`] yields.
const STEP: usize = 32;

/// Where the next channels of a row come from.
#[derive(Clone, Copy)]
pub(super) struct Cursor {
    pub(super) bits: *const u8,
    pub(super) values: *const u8,
}

/// How rows are read. The methods are inlined into functions that enable the instructions.
///
/// # Safety
/// Of all methods: the processor has the instructions of this file, rows are as [`Row`] promises, and a cursor
/// yields at most the channels of its row.
pub(super) trait Source {
    /// Whether rows have a scale, by which what `next` yields is still to be multiplied.
    const SCALED: bool = false;
    /// A cursor at `channel`, a multiple of 64.
    unsafe fn at(row: &Row, channel: usize) -> Cursor;
    /// The next 32 channels.
    unsafe fn next(cursor: &mut Cursor) -> [__m512; 2];
}

struct Packed<const BF16: bool>;
struct PackedE4m3;
pub(super) struct PackedInt8;
struct DenseHalf<const BF16: bool>;
struct DenseFloat;

#[inline(always)]
unsafe fn widen<const BF16: bool>(half: __m256i) -> __m512 {
    // SAFETY: instructions as `Source` says.
    unsafe {
        if BF16 {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        } else {
            _mm512_cvtph_ps(half)
        }
    }
}

/// 32 bytes, in a register: the empty instruction changes nothing. It keeps the compiler from folding the load into
/// `vpexpandw` or `vpexpandb`, whose memory forms are slower on Zen 4 (docs/performance.md).
///
/// # Safety
/// 32 bytes at `from` must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load(from: *const u8) -> __m256i {
    // SAFETY: the caller vouches for `from`.
    unsafe {
        let mut loaded = _mm256_loadu_si256(from.cast());
        std::arch::asm!("/* {0} */", inout(ymm_reg) loaded, options(pure, nomem, nostack, preserves_flags));
        loaded
    }
}

/// 16 channels from the values at `values`: those with a bit take the next value each, the others are +0.
///
/// # Safety
/// 32 bytes at `values` must be readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2")]
unsafe fn expand16(bits: u16, values: *const u8) -> __m256i {
    // SAFETY: the caller vouches for `values`.
    unsafe { _mm256_maskz_expand_epi16(bits, load(values)) }
}

/// A cursor of a packed row of values of `bytes` bytes.
#[inline(always)]
pub(super) unsafe fn packed_at(row: &Row, channel: usize, bytes: usize) -> Cursor {
    // SAFETY: `channel / 8` bytes of bitmap lie before the channel; at most `channel` values do.
    unsafe {
        let words = row.bits.cast::<u64>();
        let below = (0..channel / 64).map(|i| words.add(i).read_unaligned().count_ones() as usize);
        Cursor { bits: row.bits.add(channel / 8), values: row.values.add(bytes * below.sum::<usize>()) }
    }
}

/// 32 channels from the next codes: those with a bit take the next code each, the others are 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
unsafe fn next_codes(cursor: &mut Cursor) -> __m256i {
    // SAFETY: as in `Packed`.
    unsafe {
        let bits = cursor.bits.cast::<u32>().read_unaligned();
        let codes = _mm256_maskz_expand_epi8(bits, load(cursor.values));
        cursor.bits = cursor.bits.add(4);
        cursor.values = cursor.values.add(bits.count_ones() as usize);
        codes
    }
}

impl Source for PackedE4m3 {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn at(row: &Row, channel: usize) -> Cursor {
        // SAFETY: as in `packed_at`.
        unsafe { packed_at(row, channel, 1) }
    }

    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> [__m512; 2] {
        // SAFETY: as in `next_codes`.
        unsafe {
            // Sign-extended to 16 bits, a code has its sign in the top bits: exponent and fraction move to their place
            // in an f16 of 1/256 of the value, and NaN, which is above all numbers, takes the exponent of NaN.
            let x = _mm512_cvtepi8_epi16(next_codes(cursor));
            let magnitude = _mm512_and_si512(_mm512_slli_epi16::<7>(x), _mm512_set1_epi16(0x3f80));
            let nan = _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(0x3f00));
            let magnitude = _mm512_mask_set1_epi16(magnitude, nan, 0x7e00);
            let sign = _mm512_and_si512(x, _mm512_set1_epi16(i16::MIN));
            let halves = _mm512_or_si512(magnitude, sign);
            let high = _mm512_extracti64x4_epi64::<1>(halves);
            [widen::<false>(_mm512_castsi512_si256(halves)), widen::<false>(high)]
        }
    }
}

impl Source for PackedInt8 {
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn at(row: &Row, channel: usize) -> Cursor {
        // SAFETY: as in `packed_at`.
        unsafe { packed_at(row, channel, 1) }
    }

    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> [__m512; 2] {
        // SAFETY: as in `next_codes`.
        unsafe {
            let codes = next_codes(cursor);
            let floats = |codes| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
            [floats(_mm256_castsi256_si128(codes)), floats(_mm256_extracti128_si256::<1>(codes))]
        }
    }
}

impl<const BF16: bool> Source for Packed<BF16> {
    #[inline(always)]
    unsafe fn at(row: &Row, channel: usize) -> Cursor {
        // SAFETY: as in `packed_at`.
        unsafe { packed_at(row, channel, 2) }
    }

    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> [__m512; 2] {
        // SAFETY: 4 bytes of bitmap are left, and `PAD_BYTES` follow the last kept one of the row.
        unsafe {
            let bits = cursor.bits.cast::<u32>().read_unaligned();
            let low = expand16(bits as u16, cursor.values);
            let second = cursor.values.add(2 * (bits as u16).count_ones() as usize);
            let high = expand16((bits >> 16) as u16, second);
            cursor.bits = cursor.bits.add(4);
            cursor.values = cursor.values.add(2 * bits.count_ones() as usize);
            [widen::<BF16>(low), widen::<BF16>(high)]
        }
    }
}

impl<const BF16: bool> Source for DenseHalf<BF16> {
    #[inline(always)]
    unsafe fn at(row: &Row, channel: usize) -> Cursor {
        // SAFETY: the row has more than `channel` elements.
        unsafe { Cursor { bits: row.bits, values: row.values.add(2 * channel) } }
    }

    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> [__m512; 2] {
        // SAFETY: 32 elements are left.
        unsafe {
            let at = cursor.values.cast::<__m256i>();
            cursor.values = cursor.values.add(64);
            [widen::<BF16>(_mm256_loadu_si256(at)), widen::<BF16>(_mm256_loadu_si256(at.add(1)))]
        }
    }
}

impl Source for DenseFloat {
    #[inline(always)]
    unsafe fn at(row: &Row, channel: usize) -> Cursor {
        // SAFETY: the row has more than `channel` elements.
        unsafe { Cursor { bits: row.bits, values: row.values.add(4 * channel) } }
    }

    #[inline(always)]
    unsafe fn next(cursor: &mut Cursor) -> [__m512; 2] {
        // SAFETY: 32 elements are left.
        unsafe {
            let at = cursor.values.cast::<f32>();
            cursor.values = cursor.values.add(128);
            [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))]
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn dot(block: &Block<'_>, q: &[f32], scores: &mut [f32], ahead: &mut Ahead<'_>) {
    if block.encoding == Encoding::Packed(ValueType::Int8) {
        return avx512_int8::dot(block, q, scores, ahead);
    }
    by_source!(block, dot_source(block, q, scores, ahead));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
pub(super) fn dot_source<S: Source>(block: &Block<'_>, q: &[f32], scores: &mut [f32], ahead: &mut Ahead<'_>) {
    for (q, scores) in q.chunks(4 * block.dim).zip(scores.chunks_mut(4 * BLOCK)) {
        match q.len() / block.dim {
            1 => dot_heads::<S, 1>(block, q, scores, ahead),
            2 => dot_heads::<S, 2>(block, q, scores, ahead),
            3 => dot_heads::<S, 3>(block, q, scores, ahead),
            _ => dot_heads::<S, 4>(block, q, scores, ahead),
        }
    }
}

/// 4 rows times H heads in registers: each expanded vector meets H queries, each query vector 4 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
fn dot_heads<S: Source, const H: usize>(
    block: &Block<'_>,
    q: &[f32],
    scores: &mut [f32],
    ahead: &mut Ahead<'_>,
) {
    let dim = block.dim;
    assert!(q.len() == H * dim && scores.len() >= H * BLOCK && BLOCK.is_multiple_of(4), "dot shapes");
    let rows = block.rows();
    for first in (0..rows.len()).step_by(STEP_ROWS) {
        ahead.step();
        // Past the end the last row is computed again; its scores land in elements that mean nothing.
        // SAFETY: instructions by the attribute, rows by the block's invariant; `dim` is a multiple of 32, so the
        // loads from `q` stay below `H * dim`, and stores end at `first + 4 <= BLOCK` in each of H rows of scores.
        unsafe {
            let row = |t: usize| &rows[(first + t).min(rows.len() - 1)];
            let at = |t: usize| S::at(row(t), 0);
            let scale = |t: usize| if S::SCALED { row(t).scale } else { 1.0 };
            let scales = _mm_setr_ps(scale(0), scale(1), scale(2), scale(3));
            let mut rows = [at(0), at(1), at(2), at(3)];
            let mut sums = [[_mm512_setzero_ps(); 4]; H];
            for channel in (0..dim).step_by(STEP) {
                let mut x = [[_mm512_setzero_ps(); 2]; 4];
                for (x, row) in x.iter_mut().zip(&mut rows) {
                    *x = S::next(row);
                }
                for (h, sums) in sums.iter_mut().enumerate() {
                    let q = q.as_ptr().add(h * dim + channel);
                    let q = [_mm512_loadu_ps(q), _mm512_loadu_ps(q.add(16))];
                    for t in 0..4 {
                        sums[t] = _mm512_fmadd_ps(x[t][0], q[0], sums[t]);
                    }
                    for t in 0..4 {
                        sums[t] = _mm512_fmadd_ps(x[t][1], q[1], sums[t]);
                    }
                }
            }
            for (h, sums) in sums.iter().enumerate() {
                let sums = horizontal(sums);
                let sums = if S::SCALED { _mm_mul_ps(scales, sums) } else { sums };
                _mm_storeu_ps(scores.as_mut_ptr().add(h * BLOCK + first), sums);
            }
        }
    }
}

/// The sum over the lanes of each of four vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn horizontal(x: &[__m512; 4]) -> __m128 {
    // Twice: interleave and add, which leaves sums of a, b, c, d side by side in each 128-bit lane.
    let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let (ab, cd) = (_mm512_castps_pd(pair(x[0], x[1])), _mm512_castps_pd(pair(x[2], x[3])));
    let quads = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
        _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
    );
    let quads = _mm512_castps_pd(quads);
    let half = _mm256_add_ps(
        _mm256_castpd_ps(_mm512_castpd512_pd256(quads)),
        _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(quads)),
    );
    _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn weighted_sum(block: &Block<'_>, weights: &[f32], sums: &mut [f32], ahead: &mut Ahead<'_>) {
    if block.encoding == Encoding::Packed(ValueType::Int8) {
        return avx512_int8::weighted_sum(block, weights, sums, ahead);
    }
    by_source!(block, sum_source(block, weights, sums, ahead));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
pub(super) fn sum_source<S: Source>(
    block: &Block<'_>,
    weights: &[f32],
    sums: &mut [f32],
    ahead: &mut Ahead<'_>,
) {
    for (weights, sums) in weights.chunks(4 * BLOCK).zip(sums.chunks_mut(4 * block.dim)) {
        match sums.len() / block.dim {
            1 => sum_heads::<S, 1>(block, weights, sums, ahead),
            2 => sum_heads::<S, 2>(block, weights, sums, ahead),
            3 => sum_heads::<S, 3>(block, weights, sums, ahead),
            _ => sum_heads::<S, 4>(block, weights, sums, ahead),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
fn sum_heads<S: Source, const H: usize>(
    block: &Block<'_>,
    weights: &[f32],
    sums: &mut [f32],
    ahead: &mut Ahead<'_>,
) {
    for channel in (0..block.dim).step_by(2 * STEP) {
        if block.dim - channel == STEP {
            sum_channels::<S, H, 1>(block, channel, weights, sums, ahead);
        } else {
            sum_channels::<S, H, 2>(block, channel, weights, sums, ahead);
        }
    }
}

/// `32 * W` channels of H heads in registers while the rows go by.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
fn sum_channels<S: Source, const H: usize, const W: usize>(
    block: &Block<'_>,
    channel: usize,
    weights: &[f32],
    sums: &mut [f32],
    ahead: &mut Ahead<'_>,
) {
    let dim = block.dim;
    assert!(sums.len() == H * dim && weights.len() >= H * BLOCK && channel + W * STEP <= dim, "sum shapes");
    // SAFETY: instructions by the attribute, rows by the block's invariant; `channel + 32 W <= dim` bounds the
    // accesses to `sums`, and there are at most BLOCK rows, hence weights.
    unsafe {
        let at = |h: usize, w: usize| h * dim + channel + w * STEP;
        let mut totals = [[[_mm512_setzero_ps(); 2]; W]; H];
        for (h, totals) in totals.iter_mut().enumerate() {
            for (w, total) in totals.iter_mut().enumerate() {
                let sums = sums.as_ptr().add(at(h, w));
                *total = [_mm512_loadu_ps(sums), _mm512_loadu_ps(sums.add(16))];
            }
        }
        for (t, row) in block.rows().iter().enumerate() {
            if t.is_multiple_of(STEP_ROWS) {
                ahead.step();
            }
            let mut cursor = S::at(row, channel);
            let mut x = [[_mm512_setzero_ps(); 2]; W];
            for x in &mut x {
                *x = S::next(&mut cursor);
            }
            for (h, totals) in totals.iter_mut().enumerate() {
                let mut weight = *weights.as_ptr().add(h * BLOCK + t);
                if S::SCALED {
                    weight *= row.scale;
                }
                let weight = _mm512_set1_ps(weight);
                for (total, x) in totals.iter_mut().zip(&x) {
                    total[0] = _mm512_fmadd_ps(weight, x[0], total[0]);
                    total[1] = _mm512_fmadd_ps(weight, x[1], total[1]);
                }
            }
        }
        for (h, totals) in totals.iter().enumerate() {
            for (w, total) in totals.iter().enumerate() {
                let sums = sums.as_mut_ptr().add(at(h, w));
                _mm512_storeu_ps(sums, total[0]);
                _mm512_storeu_ps(sums.add(16), total[1]);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
pub(super) fn expand(block: &Block<'_>, out: &mut [f32], ahead: &mut Ahead<'_>) {
    by_source!(block, expand_source(block, out, ahead));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
fn expand_source<S: Source>(block: &Block<'_>, out: &mut [f32], ahead: &mut Ahead<'_>) {
    for (t, (row, out)) in block.rows().iter().zip(out.chunks_exact_mut(block.dim)).enumerate() {
        if t.is_multiple_of(STEP_ROWS) {
            ahead.step();
        }
        // SAFETY: instructions by the attribute, rows by the block's invariant; `out` is a multiple of 32 long.
        unsafe {
            let scale = _mm512_set1_ps(row.scale);
            let scaled = |x| if S::SCALED { _mm512_mul_ps(scale, x) } else { x };
            let mut row = S::at(row, 0);
            for out in out.chunks_exact_mut(STEP) {
                let x = S::next(&mut row);
                _mm512_storeu_ps(out.as_mut_ptr(), scaled(x[0]));
                _mm512_storeu_ps(out.as_mut_ptr().add(16), scaled(x[1]));
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn softmax(scores: &mut [f32], softmax: &Softmax) -> (f32, f32) {
    portable::softmax_with::<true>(scores, softmax)
}
