//! Scores of strategies on the CPU. Sums run in float64 in the order of tokens, then heads, so they do not depend on
//! threads.

use super::dense::AnyRows;
use super::level::Level;
use super::parallel;
use super::select::subtract_center;
use super::simd_rows::{MAX_DIM, widen};
use crate::error::Result;
use crate::ops::check::HostCenter;
use crate::tensor::{Rows, Tensor};

/// Weights and scores are finite or infinite, never NaN: what could be anything is kept.
fn defined(x: f64) -> f32 {
    if x.is_nan() { f32::INFINITY } else { x as f32 }
}

/// Per channel of a KV head, the sum over queries and over the query heads of the KV head of `f(q)`.
fn sum_queries(q: &AnyRows<'_>, head: usize, group: usize, f: fn(f64) -> f64) -> Vec<f64> {
    let shape = q.shape();
    let mut row = [0f32; MAX_DIM];
    let mut sums = vec![0f64; shape.dim];
    for (token, member) in (0..shape.tokens).flat_map(|t| (0..group).map(move |g| (t, g))) {
        q.load(0, token, head * group + member, &mut row[..shape.dim]);
        sums.iter_mut().zip(&row).for_each(|(sum, &q)| *sum += f(f64::from(q)));
    }
    sums
}

/// `out` is `[kv_heads, dim]`.
pub(crate) fn query_weights(threads: usize, q: &Tensor<'_>, out: &mut [f32]) -> Result<()> {
    let rows = AnyRows::new("q", q)?;
    let (shape, kv_heads) = (q.shape, out.len() / q.shape.dim);
    let threads = parallel::useful_threads(threads, shape.tokens * shape.heads * shape.dim * 4);
    parallel::for_each(threads, out.chunks_mut(shape.dim).enumerate(), |(head, out)| {
        let sums = sum_queries(&rows, head, shape.heads / kv_heads, f64::abs);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = defined(sum / shape.tokens as f64);
        }
    });
    Ok(())
}

/// `out` is `[kv_heads, dim]`.
pub(crate) fn structured_weights(
    threads: usize,
    x: &[Tensor<'_>],
    center: Option<HostCenter<'_>>,
    q: Option<&Tensor<'_>>,
    keep: usize,
    out: &mut [f32],
) -> Result<()> {
    let (dtype, shape) = (x[0].dtype, x[0].shape);
    let parts = x.iter().map(|part| part.rows::<u16>("x")).collect::<Result<Vec<_>>>()?;
    let queries = q.map(|q| AnyRows::new("q", q)).transpose()?;
    let tokens: usize = parts.iter().map(|part| part.shape.tokens).sum();
    let threads = parallel::useful_threads(threads, tokens * shape.heads * shape.dim * 4);
    parallel::for_each(threads, out.chunks_mut(shape.dim).enumerate(), |(head, out)| {
        let (mut shifted, mut values) = ([0u16; MAX_DIM], [0f32; MAX_DIM]);
        let mut scores = vec![0f64; shape.dim];
        for (part, token) in parts.iter().flat_map(|part| (0..part.shape.tokens).map(move |t| (part, t))) {
            let mut row = part.row(0, token, head);
            if let Some(center) = &center {
                subtract_center(Level::Portable, dtype, row, center.row(0, head), &mut shifted[..shape.dim]);
                row = &shifted[..shape.dim];
            }
            widen(Level::Portable, dtype, row, &mut values[..shape.dim]);
            scores.iter_mut().zip(&values).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
        }
        if let Some(q) = &queries {
            let sums = sum_queries(q, head, q.shape().heads / shape.heads, |q| q * q);
            scores.iter_mut().zip(sums).for_each(|(score, sum)| *score *= sum);
        }
        scores.iter_mut().filter(|score| score.is_nan()).for_each(|score| *score = f64::INFINITY);
        let mut order: Vec<usize> = (0..shape.dim).collect();
        // Stable: of equal scores the lower channel comes first.
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        for (rank, channel) in order.into_iter().enumerate() {
            out[channel] = if rank < keep { f32::INFINITY } else { 0.0 };
        }
    });
    Ok(())
}

/// What decides how much attention tokens get; as in [`crate::ops::TokenWeights`].
pub(crate) struct Attention<'a> {
    pub(crate) q: &'a Tensor<'a>,
    pub(crate) lse: Rows<'a, f32>,
    pub(crate) q_position: usize,
    pub(crate) k: &'a Tensor<'a>,
    pub(crate) k_position: usize,
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    pub(crate) sliding_window: Option<usize>,
}

impl Attention<'_> {
    /// Weight of a key at `position` for query `i` and its head, from their dot product.
    fn weight(&self, i: usize, head: usize, position: usize, dot: f64) -> f64 {
        let own = (self.q_position + i + 1).checked_sub(self.q.shape.tokens);
        let seen = own.is_some_and(|own| {
            position <= own && self.sliding_window.is_none_or(|window| own - position < window)
        });
        if !seen {
            return 0.0;
        }
        let score = dot * f64::from(self.scale);
        let score = self.softcap.map_or(score, |c| f64::from(c) * (score / f64::from(c)).tanh());
        (score - f64::from(self.lse.row(0, i, head)[0])).exp()
    }
}

/// `out` is `[tokens, kv_heads]`.
pub(crate) fn token_weights(threads: usize, args: &Attention<'_>, out: &mut [f32]) -> Result<()> {
    let (queries, keys) = (AnyRows::new("q", args.q)?, AnyRows::new("k", args.k)?);
    let (q, k) = (args.q.shape, args.k.shape);
    let group = q.heads / k.heads;
    // [kv_heads][queries of all its heads][dim]: read once for every token.
    let mut rows = vec![0f32; q.tokens * q.heads * q.dim];
    for (i, row) in rows.chunks_exact_mut(q.dim).enumerate() {
        let (head, member) = (i / q.tokens, i % q.tokens);
        queries.load(0, member, head, row);
    }
    let threads = parallel::useful_threads(threads, rows.len() * k.tokens);
    parallel::for_each(threads, out.chunks_mut(k.heads).enumerate(), |(token, out)| {
        let mut key = [0f32; MAX_DIM];
        let key = &mut key[..k.dim];
        for (kv_head, out) in out.iter_mut().enumerate() {
            keys.load(0, token, kv_head, key);
            let mut sum = 0f64;
            for (head, i) in
                (kv_head * group..(kv_head + 1) * group).flat_map(|h| (0..q.tokens).map(move |i| (h, i)))
            {
                let row = &rows[(head * q.tokens + i) * q.dim..][..q.dim];
                sum += args.weight(i, head, args.k_position + token, dot(row, key));
            }
            *out = defined(sum);
        }
    });
    Ok(())
}

/// Float64 dot product in 16 interleaved sums, which vectorise.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0f64; 16];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    sums.iter().sum()
}
