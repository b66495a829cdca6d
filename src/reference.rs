//! What every operation computes, in plain loops: start here.
//!
//! One row, one page or one query head at a time; arithmetic is float64 except where a result is *defined* in
//! float32 or 16 bits (scores of weighted selection, centring). Nothing here is fast, nothing here is used by the
//! backends, and every backend is tested against it.
//!
//! ```
//! use mustafar::{DType, PageFormat, reference as r};
//!
//! // Four tokens of one KV head, pruned to the 32 largest of 64 channels.
//! let number = |t: usize, c: usize| r::round(DType::F16, ((t * 64 + c) * 7 % 251) as f32 / 50.0 - 2.5);
//! let rows: Vec<r::Row> = (0..4)
//!     .map(|t| r::prune_token(DType::F16, &(0..64).map(|c| number(t, c)).collect::<Vec<_>>(), 32, None))
//!     .collect();
//!
//! // A page of 16 rows, four of them used; 0xFF stands for the bytes that mean nothing.
//! let format = PageFormat::uniform(DType::F16, 64, 16, 32)?;
//! let page = r::page(&format, &rows, 0xFF).expect("every row keeps 32 values");
//! assert_eq!(page.len(), format.page_bytes());
//! assert_eq!(r::read_page(&format, &page, 4), rows);
//!
//! // One query attends to the four tokens; the page serves as K and as V.
//! let dense = |row: &r::Row| row.dense(DType::F16, None);
//! let tokens: Vec<_> = rows.iter().map(|row| r::Token { k: dense(row), v: dense(row) }).collect();
//! let (out, lse) = r::attend(&[vec![0.1; 64]], &tokens, 64, &r::Scoring::new(64)).remove(0);
//! assert!(out.len() == 64 && lse.is_finite());
//! # Ok::<(), mustafar::Error>(())
//! ```

use crate::dtype::DType;
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
    /// The 16-bit pattern of every channel; +0 where dropped.
    pub bits: Vec<u16>,
}

impl Row {
    /// `bits` with everything outside `mask` dropped.
    pub fn new(mask: Vec<bool>, bits: &[u16]) -> Self {
        let bits = bits.iter().zip(&mask).map(|(&x, &kept)| if kept { x } else { 0 }).collect();
        Self { mask, bits }
    }

    /// Number of kept channels.
    pub fn kept(&self) -> usize {
        self.mask.iter().filter(|&&kept| kept).count()
    }

    /// The row as numbers; `c` is the centre it was stored with and is added back to every channel, also to
    /// dropped ones.
    pub fn dense(&self, dtype: DType, c: Option<&[f32]>) -> Vec<f64> {
        let centre = |i: usize| c.map_or(0.0, |c| f64::from(c[i]));
        self.bits.iter().enumerate().map(|(i, &x)| value(dtype, x) + centre(i)).collect()
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

/// Channel direction: among the tokens of one group, each channel keeps its `keep` largest magnitudes, the older
/// token where two are equal. `group` holds one row per token.
pub fn prune_channel(group: &[Vec<u16>], keep: usize) -> Vec<Row> {
    let dim = group.first().map_or(0, Vec::len);
    let mut masks = vec![vec![false; dim]; group.len()];
    for c in 0..dim {
        let ranks: Vec<u32> = group.iter().map(|row| magnitude(row[c])).collect();
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

    // Values: rows in order, inside a row by rising channel.
    for row in rows {
        let kept = row.mask.iter().zip(&row.bits).filter(|(kept, _)| **kept);
        bytes.extend(kept.flat_map(|(_, x)| x.to_le_bytes()));
    }
    bytes.resize(bytes.len() + 2 * unused_values, fill);
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    Some(bytes)
}

/// The first `count` rows of a valid page.
pub fn read_page(format: &PageFormat, bytes: &[u8], count: usize) -> Vec<Row> {
    let dim = format.head_dim();
    let u16_at = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
    let offsets = format.page_tokens() * dim / 8;
    let after_offsets = (offsets + 2 * (format.page_tokens() + 1)).next_multiple_of(16);
    let read_row = |row: usize| {
        let mut at = match format.rows() {
            Rows::Uniform { keep } => offsets + 2 * row * keep,
            Rows::Ragged { .. } => after_offsets + 2 * usize::from(u16_at(offsets + 2 * row)),
        };
        let mask: Vec<bool> = (0..dim).map(|c| bytes[row * dim / 8 + c / 8] >> (c % 8) & 1 == 1).collect();
        let mut bits = vec![0; dim];
        for c in (0..dim).filter(|&c| mask[c]) {
            bits[c] = u16_at(at);
            at += 2;
        }
        Row { mask, bits }
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
