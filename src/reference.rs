//! What every operation computes, in plain loops: start here.
//!
//! One row, one page or one query head at a time; arithmetic is float64 except where a result is *defined* in
//! float32 or 16 bits (scores of weighted selection, centring). Nothing here is fast, nothing here is used by the
//! backends, and every backend is tested against it.
//!
//! ```
//! use mustafar::{DType, PageFormat, ValueType, reference as r};
//!
//! // Four tokens of one KV head, pruned to the 32 largest of 64 channels.
//! let number = |t: usize, c: usize| r::round(DType::F16, ((t * 64 + c) * 7 % 251) as f32 / 50.0 - 2.5);
//! let rows: Vec<r::Row> = (0..4)
//!     .map(|t| r::prune_token(DType::F16, &(0..64).map(|c| number(t, c)).collect::<Vec<_>>(), 32, None))
//!     .collect();
//!
//! // A page of 16 rows, four of them used; 0xFF stands for the bytes that mean nothing.
//! let format = PageFormat::uniform(ValueType::F16, 64, 16, 32)?;
//! let page = r::page(&format, &rows, 0xFF).expect("every row keeps 32 values");
//! assert_eq!(page.len(), format.page_bytes());
//! assert_eq!(r::read_page(&format, &page, 4), rows);
//!
//! // One query attends to the four tokens; the page serves as K and as V.
//! let dense = |row: &r::Row| row.dense(ValueType::F16, None);
//! let tokens: Vec<_> = rows.iter().map(|row| r::Token { k: dense(row), v: dense(row) }).collect();
//! let (out, lse) = r::attend(&[vec![0.1; 64]], &tokens, 64, &r::Scoring::new(64)).remove(0);
//! assert!(out.len() == 64 && lse.is_finite());
//! # Ok::<(), mustafar::Error>(())
//! ```

pub mod score;

use crate::dtype::{DType, ValueType};
use crate::format::{PageFormat, Rows};
use half::{bf16, f16};

// ---- 16-bit values ------------------------------------------------------------------------------------------

/// The number that a 16-bit pattern stands for. Panics for a dtype that is not 16 bits wide.
pub fn value(dtype: DType, bits: u16) -> f64 {
    match dtype {
        DType::F16 => f16::from_bits(bits).to_f64(),
        DType::Bf16 => bf16::from_bits(bits).to_f64(),
        _ => unreachable!("pages hold f16 or bf16, not {dtype}"),
    }
}

/// The 16-bit pattern nearest to `x`, ties to even. Panics for a dtype that is not 16 bits wide.
pub fn round(dtype: DType, x: f32) -> u16 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_bits(),
        DType::Bf16 => bf16::from_f32(x).to_bits(),
        _ => unreachable!("pages hold f16 or bf16, not {dtype}"),
    }
}

/// The number that the code of a value stands for, before it is multiplied by the scale of its row.
pub fn decode(values: ValueType, code: u16) -> f64 {
    match values {
        ValueType::F16 => value(DType::F16, code),
        ValueType::Bf16 => value(DType::Bf16, code),
        ValueType::Int8 => f64::from(code as u8 as i8),
        ValueType::E4m3 => {
            let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
            let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
            match (exponent, code & 7) {
                (15, 7) => f64::NAN,
                (0, _) => sign * fraction * 2f64.powi(-9),
                _ => sign * (8.0 + fraction) * 2f64.powi(exponent - 10),
            }
        }
    }
}

/// The 8-bit code nearest to `q`, ties to the even code, for `q` no larger than the largest code after rounding.
pub fn encode(values: ValueType, q: f32) -> u16 {
    match values {
        ValueType::Int8 => u16::from(q.round_ties_even() as i8 as u8),
        ValueType::E4m3 => {
            let distance = |code: &u16| (decode(values, *code) - f64::from(q.abs())).abs();
            let order = |a: &u16, b: &u16| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)));
            (0..0x7F).min_by(order).unwrap_or(0) | if q.is_sign_negative() { 0x80 } else { 0 }
        }
        ValueType::F16 | ValueType::Bf16 => unreachable!("{values} is stored as it is"),
    }
}

/// The smallest bfloat16 that is not below `x`, a number of at least 0.
pub fn round_up(x: f32) -> u16 {
    (x.to_bits().div_ceil(1 << 16)) as u16
}

/// `round16(x - c)` channel by channel, the subtraction in float32: what is selected from and stored when keys are
/// centred. A NaN becomes the type's canonical one (0x7E00, 0x7FC0): processors disagree about its other bits.
pub fn center(dtype: DType, bits: &[u16], c: &[f32]) -> Vec<u16> {
    let one = |(&x, &c): (&u16, &f32)| {
        let shifted = value(dtype, x) as f32 - c;
        round(dtype, if shifted.is_nan() { f32::NAN } else { shifted })
    };
    bits.iter().zip(c).map(one).collect()
}

// ---- Selection ----------------------------------------------------------------------------------------------
// Every rule turns elements into unsigned ranks, and the `keep` highest ranks survive.

/// Rank of a magnitude: the pattern without its sign. -0 equals +0; NaN is above infinity.
pub fn magnitude(bits: u16) -> u32 {
    u32::from(bits & 0x7FFF)
}

/// Rank of `abs(x) * w`, a float32 product. Every NaN, whatever its bits, ranks the same and above all numbers.
pub fn weighted_magnitude(dtype: DType, bits: u16, w: f32) -> u32 {
    let score = (value(dtype, bits) as f32 * w).abs();
    // Patterns of non-negative floats order like the floats.
    if score.is_nan() { u32::MAX } else { score.to_bits() }
}

/// True for the `keep` highest ranks; of equal ranks the lower index survives.
pub fn largest(ranks: &[u32], keep: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..ranks.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(ranks[i])); // stable: equal ranks stay in index order
    let mut mask = vec![false; ranks.len()];
    order.into_iter().take(keep).for_each(|i| mask[i] = true);
    mask
}

/// One token's channels of one KV head, K or V, after pruning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Which channels are kept.
    pub mask: Vec<bool>,
    /// The code of every channel, a 16-bit pattern or an 8-bit one; 0 where dropped.
    pub bits: Vec<u16>,
    /// What all codes are multiplied by, a bfloat16 pattern; that of 1 for 16-bit values.
    pub scale: u16,
}

/// The bfloat16 pattern of 1.
const ONE: u16 = 0x3F80;

impl Row {
    /// `bits` with everything outside `mask` dropped.
    pub fn new(mask: Vec<bool>, bits: &[u16]) -> Self {
        let bits = bits.iter().zip(&mask).map(|(&x, &kept)| if kept { x } else { 0 }).collect();
        Self { mask, bits, scale: ONE }
    }

    /// The row as a page of `values` stores it, from 16-bit elements of `dtype`.
    pub fn stored(self, dtype: DType, values: ValueType) -> Self {
        let largest_code = match values {
            ValueType::F16 | ValueType::Bf16 => return self,
            ValueType::E4m3 => 448.0,
            ValueType::Int8 => 127.0,
        };
        let x: Vec<f32> = self.bits.iter().map(|&x| value(dtype, x) as f32).collect();
        let zeros = vec![0; x.len()];
        if x.iter().any(|x| !x.is_finite()) {
            return Self { bits: zeros, scale: 0x7FC0, ..self };
        }
        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let scale = round_up(largest / largest_code);
        let divisor = value(DType::Bf16, scale) as f32;
        let bits = if scale == 0 { zeros } else { x.iter().map(|x| encode(values, x / divisor)).collect() };
        Self { bits, scale, ..self }
    }

    /// Number of kept channels.
    pub fn kept(&self) -> usize {
        self.mask.iter().filter(|&&kept| kept).count()
    }

    /// The row of a page of `values` as numbers; `c` is the centre it was stored with and is added back to every
    /// channel, also to dropped ones.
    pub fn dense(&self, values: ValueType, c: Option<&[f32]>) -> Vec<f64> {
        let scale = value(DType::Bf16, self.scale);
        let with_centre = |i: usize, x: f64| c.map_or(x, |c| x + f64::from(c[i]));
        self.bits.iter().enumerate().map(|(i, &x)| with_centre(i, scale * decode(values, x))).collect()
    }
}

/// Token direction: the `keep` largest magnitudes of the row, weighted if `weights` (one per channel) are given.
pub fn prune_token(dtype: DType, bits: &[u16], keep: usize, weights: Option<&[f32]>) -> Row {
    let rank = |(i, &x): (usize, &u16)| match weights {
        None => magnitude(x),
        Some(w) => weighted_magnitude(dtype, x, w[i]),
    };
    let ranks: Vec<u32> = bits.iter().enumerate().map(rank).collect();
    Row::new(largest(&ranks, keep), bits)
}

/// Token direction as the original Mustafar prunes: everything of at least the `dropped`-th smallest magnitude
/// (counted from 1), so ties survive together and the count of a row varies.
pub fn prune_reference_ties(bits: &[u16], dropped: usize) -> Row {
    let mut sorted: Vec<u32> = bits.iter().map(|&x| magnitude(x)).collect();
    sorted.sort_unstable();
    let threshold = sorted[dropped - 1];
    Row::new(bits.iter().map(|&x| magnitude(x) >= threshold).collect(), bits)
}

/// Channel direction: among the tokens of one group, each channel keeps its `keep` largest magnitudes, weighted if
/// `weights` (one per token) are given, the older token where two are equal. `group` holds one row per token.
pub fn prune_channel(dtype: DType, group: &[Vec<u16>], keep: usize, weights: Option<&[f32]>) -> Vec<Row> {
    let dim = group.first().map_or(0, Vec::len);
    let mut masks = vec![vec![false; dim]; group.len()];
    for c in 0..dim {
        let rank = |(t, row): (usize, &Vec<u16>)| match weights {
            None => magnitude(row[c]),
            Some(w) => weighted_magnitude(dtype, row[c], w[t]),
        };
        let ranks: Vec<u32> = group.iter().enumerate().map(rank).collect();
        for (t, kept) in largest(&ranks, keep).into_iter().enumerate() {
            masks[t][c] = kept;
        }
    }
    masks.into_iter().zip(group).map(|(mask, bits)| Row::new(mask, bits)).collect()
}

// ---- Pages --------------------------------------------------------------------------------------------------

/// The bytes of a page whose first rows are `rows`; `None` when they do not fit. `fill` stands where the format says
/// "anything": the other rows of a uniform page, unused values of a ragged one. The other rows of a ragged page are
/// empty and its padding is zero.
pub fn page(format: &PageFormat, rows: &[Row], fill: u8) -> Option<Vec<u8>> {
    let total: usize = rows.iter().map(Row::kept).sum();
    let (ragged, capacity) = match format.rows() {
        Rows::Uniform { keep } if rows.iter().any(|row| row.kept() != keep) => return None,
        Rows::Uniform { keep } => (false, format.page_tokens() * keep),
        Rows::Ragged { capacity } => (true, capacity),
    };
    let unused_rows = format.page_tokens().checked_sub(rows.len())?;
    let unused_values = capacity.checked_sub(total)?;

    // Bitmap: channel c is bit c % 8 of byte c / 8 of its row.
    let byte = |bits: &[bool]| (0..8).map(|i| u8::from(bits[i]) << i).sum::<u8>();
    let mut bytes: Vec<u8> = rows.iter().flat_map(|row| row.mask.chunks(8).map(byte)).collect();
    bytes.resize(bytes.len() + unused_rows * format.head_dim() / 8, if ragged { 0 } else { fill });

    // Row offsets: where each row's values start, then where the last row's end.
    if ragged {
        for row in 0..=format.page_tokens() {
            let start: usize = rows.iter().take(row).map(Row::kept).sum();
            bytes.extend((start as u16).to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(16), 0);
    }

    // Scales, of 8-bit values only.
    let size = format.value_type().bytes();
    if size == 1 {
        bytes.extend(rows.iter().flat_map(|row| row.scale.to_le_bytes()));
        bytes.resize(bytes.len() + 2 * unused_rows, if ragged { 0 } else { fill });
    }

    // Values: rows in order, inside a row by rising channel.
    for row in rows {
        let kept = row.mask.iter().zip(&row.bits).filter(|(kept, _)| **kept);
        bytes.extend(kept.flat_map(|(_, x)| x.to_le_bytes().into_iter().take(size)));
    }
    bytes.resize(bytes.len() + size * unused_values, fill);
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    Some(bytes)
}

/// The first `count` rows of a valid page.
pub fn read_page(format: &PageFormat, bytes: &[u8], count: usize) -> Vec<Row> {
    let dim = format.head_dim();
    let u16_at = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
    let size = format.value_type().bytes();
    let offsets = format.page_tokens() * dim / 8;
    let scales = match format.rows() {
        Rows::Uniform { .. } => offsets,
        Rows::Ragged { .. } => (offsets + 2 * (format.page_tokens() + 1)).next_multiple_of(16),
    };
    let values = if size == 1 { scales + 2 * format.page_tokens() } else { scales };
    let read_row = |row: usize| {
        let first = match format.rows() {
            Rows::Uniform { keep } => row * keep,
            Rows::Ragged { .. } => usize::from(u16_at(offsets + 2 * row)),
        };
        let mut at = values + size * first;
        let mask: Vec<bool> = (0..dim).map(|c| bytes[row * dim / 8 + c / 8] >> (c % 8) & 1 == 1).collect();
        let mut bits = vec![0; dim];
        for c in (0..dim).filter(|&c| mask[c]) {
            bits[c] = if size == 1 { bytes[at].into() } else { u16_at(at) };
            at += size;
        }
        Row { mask, bits, scale: if size == 1 { u16_at(scales + 2 * row) } else { ONE } }
    };
    (0..count).map(read_row).collect()
}

// ---- Attention ----------------------------------------------------------------------------------------------

/// A token as one KV head's attention sees it: dense, pruned elements being 0 (or the centre).
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Key.
    pub k: Vec<f64>,
    /// Value.
    pub v: Vec<f64>,
}

/// How scores are formed and which tokens are seen; the fields mean what they mean in [`crate::ops::Attend`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// Factor of q.k.
    pub scale: f64,
    /// `c` of `c * tanh(score / c)`.
    pub softcap: Option<f64>,
    /// First position that is seen.
    pub first: usize,
    /// How many positions are seen, up to and including the query's own.
    pub sliding_window: Option<usize>,
}

impl Scoring {
    /// `scale = 1 / sqrt(head_dim)`, nothing else.
    pub fn new(head_dim: usize) -> Self {
        Self { scale: 1.0 / (head_dim as f64).sqrt(), softcap: None, first: 0, sliding_window: None }
    }
}

/// Output and log-sum-exp of each query token of one query head; outputs have `dim_v` channels. `tokens` are all
/// tokens of the sequence in order: sinks, compressed ones (with the centre added back), window. The last query
/// stands at the last position; each sees the positions up to its own. One that sees nothing gets zeros and -inf.
pub fn attend(
    queries: &[Vec<f64>],
    tokens: &[Token],
    dim_v: usize,
    scoring: &Scoring,
) -> Vec<(Vec<f64>, f64)> {
    let one = |(i, q): (usize, &Vec<f64>)| {
        // One past the query's own position; 0 when it stands before the first token.
        let end = (tokens.len() + i + 1).saturating_sub(queries.len());
        let window_start = scoring.sliding_window.map_or(0, |n| end.saturating_sub(n));
        let seen = &tokens[scoring.first.max(window_start).min(end)..end];
        let cap = |s: f64| scoring.softcap.map_or(s, |c| c * (s / c).tanh());
        let scores: Vec<f64> = seen.iter().map(|token| cap(scoring.scale * dot(q, &token.k))).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY && !scores.iter().any(|s| s.is_nan()) {
            return (vec![0.0; dim_v], f64::NEG_INFINITY);
        }
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let values: Vec<&[f64]> = seen.iter().map(|token| &token.v[..]).collect();
        let out = spmv_value(&weights, &values, dim_v).iter().map(|o| o / sum).collect();
        (out, max + sum.ln())
    };
    queries.iter().enumerate().map(one).collect()
}

/// Attention over two disjoint sets of tokens from the attention over each: outputs weighted by exp(lse). A side
/// whose lse is -inf or +inf has no tokens and its output is ignored.
pub fn merge(a: (&[f64], f64), b: (&[f64], f64)) -> (Vec<f64>, f64) {
    match (a.1.is_infinite(), b.1.is_infinite()) {
        (true, true) => return (vec![0.0; a.0.len()], f64::NEG_INFINITY),
        (true, false) => return (b.0.to_vec(), b.1),
        (false, true) => return (a.0.to_vec(), a.1),
        (false, false) => {}
    }
    let max = a.1.max(b.1);
    let (wa, wb) = ((a.1 - max).exp(), (b.1 - max).exp());
    let out = a.0.iter().zip(b.0).map(|(x, y)| (wa * x + wb * y) / (wa + wb)).collect();
    (out, max + (wa + wb).ln())
}

/// `scale * (q . k)` for every key of one KV head.
pub fn spmv_key(q: &[f64], keys: &[&[f64]], scale: f64) -> Vec<f64> {
    keys.iter().map(|k| scale * dot(q, k)).collect()
}

/// The sum of `weights[t] * values[t]`, `dim` channels wide.
pub fn spmv_value(weights: &[f64], values: &[&[f64]], dim: usize) -> Vec<f64> {
    (0..dim).map(|c| weights.iter().zip(values).map(|(w, v)| w * v[c]).sum()).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
