//! Scores of strategies on the CPU. The order of every sum is fixed ([`super::lanes`]): results do not depend on threads,
//! instruction level or backend.

use super::dense::AnyRows;
use super::lanes::{LANES, LaneSums};
use super::parallel;
use super::select::subtract_center;
use super::simd_rows::{MAX_DIM, widen};
use super::simd_weigh::{Chunk, Scoring, weigh};
use crate::backend::Cpu;
use crate::error::Result;
use crate::ops::check::HostCenter;
use crate::tensor::{Rows, Tensor};

/// Tokens that a thread weighs at once.
const WEIGHED: usize = 64;

/// Weights and scores are finite or infinite, never NaN: what could be anything is kept.
fn defined(x: f32) -> f32 {
    if x.is_nan() { f32::INFINITY } else { x }
}

/// Per channel of a KV head, the sum over queries and over the query heads of the KV head of `f(q)`.
fn sum_queries(q: &AnyRows<'_>, head: usize, group: usize, f: fn(f64) -> f64) -> Vec<f64> {
    let shape = q.shape();
    let mut row = [0f32; MAX_DIM];
    let row = &mut row[..shape.dim];
    let mut sums = LaneSums::new(shape.dim);
    for (token, member) in (0..shape.tokens).flat_map(|t| (0..group).map(move |g| (t, g))) {
        q.load(0, token, head * group + member, row);
        sums.add(row, f);
    }
    sums.finish()
}

/// `out` is `[kv_heads, dim]`.
pub(crate) fn query_weights(cpu: Cpu, q: &Tensor<'_>, out: &mut [f32]) -> Result<()> {
    let rows = AnyRows::new("q", q)?;
    let (shape, kv_heads) = (q.shape, out.len() / q.shape.dim);
    let threads = parallel::useful_threads(cpu.threads, shape.tokens * shape.heads * shape.dim * 4);
    parallel::for_each(threads, out.chunks_mut(shape.dim).enumerate(), |(head, out)| {
        let sums = sum_queries(&rows, head, shape.heads / kv_heads, f64::abs);
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = defined((sum / shape.tokens as f64) as f32);
        }
    });
    Ok(())
}

/// `out` is `[kv_heads, dim]`.
pub(crate) fn structured_weights(
    cpu: Cpu,
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
    let threads = parallel::useful_threads(cpu.threads, tokens * shape.heads * shape.dim * 4);
    parallel::for_each(threads, out.chunks_mut(shape.dim).enumerate(), |(head, out)| {
        let (mut shifted, mut values) = ([0u16; MAX_DIM], [0f32; MAX_DIM]);
        let (shifted, values) = (&mut shifted[..shape.dim], &mut values[..shape.dim]);
        let mut sums = LaneSums::new(shape.dim);
        for (part, token) in parts.iter().flat_map(|part| (0..part.shape.tokens).map(move |t| (part, t))) {
            let mut row = part.row(0, token, head);
            if let Some(center) = &center {
                subtract_center(cpu.level, dtype, row, center.row(0, head), shifted);
                row = shifted;
            }
            widen(cpu.level, dtype, row, values);
            sums.add(values, |x| x * x);
        }
        let mut scores = sums.finish();
        if let Some(q) = &queries {
            let sums = sum_queries(q, head, q.shape().heads / shape.heads, |q| q * q);
            scores.iter_mut().zip(sums).for_each(|(score, sum)| *score *= sum);
        }
        let scores: Vec<f32> = scores.into_iter().map(|score| defined(score as f32)).collect();
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
    pub(crate) q_position: i32,
    pub(crate) k: &'a Tensor<'a>,
    pub(crate) k_position: i32,
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    pub(crate) sliding_window: i32,
}

impl Attention<'_> {
    /// The queries of a KV head, token by token, in each the heads in order.
    fn chunks(&self, rows: &AnyRows<'_>, kv_head: usize, group: usize) -> Vec<Chunk> {
        let shape = self.q.shape;
        let unseen = || Chunk { q: vec![[0.0; LANES]; shape.dim], lse: [0.0; LANES], position: [-1; LANES] };
        let count = shape.tokens * group;
        let mut chunks: Vec<Chunk> = (0..count.div_ceil(LANES)).map(|_| unseen()).collect();
        let mut row = [0f32; MAX_DIM];
        let row = &mut row[..shape.dim];
        for i in 0..count {
            let (token, head) = (i / group, kv_head * group + i % group);
            rows.load(0, token, head, row);
            let (chunk, lane) = (&mut chunks[i / LANES], i % LANES);
            chunk.q.iter_mut().zip(&*row).for_each(|(lanes, &x)| lanes[lane] = x);
            chunk.lse[lane] = self.lse.row(0, token, head)[0];
            chunk.position[lane] = self.q_position - (shape.tokens - 1 - token) as i32;
        }
        chunks
    }
}

/// `out` is `[tokens, kv_heads]`.
pub(crate) fn token_weights(cpu: Cpu, args: &Attention<'_>, out: &mut [f32]) -> Result<()> {
    let (queries, keys) = (AnyRows::new("q", args.q)?, AnyRows::new("k", args.k)?);
    let (q, k) = (args.q.shape, args.k.shape);
    let chunks: Vec<Vec<Chunk>> =
        (0..k.heads).map(|head| args.chunks(&queries, head, q.heads / k.heads)).collect();
    let Attention { scale, softcap, sliding_window, .. } = *args;
    let scoring = Scoring { scale, softcap, sliding_window };
    let threads = parallel::useful_threads(cpu.threads, q.tokens * q.heads * q.dim * k.tokens);
    parallel::for_each(threads, out.chunks_mut(WEIGHED * k.heads).enumerate(), |(i, out)| {
        let (first, tokens) = (i * WEIGHED, out.len() / k.heads);
        let (mut rows, mut weights) = (vec![0f32; tokens * k.dim], [0f32; WEIGHED]);
        let weights = &mut weights[..tokens];
        let position = args.k_position + first as i32;
        for (head, chunks) in chunks.iter().enumerate() {
            for (token, row) in rows.chunks_exact_mut(k.dim).enumerate() {
                keys.load(0, first + token, head, row);
            }
            weigh(cpu.level, chunks, scoring, &rows, position, weights);
            for (out, &weight) in out[head..].iter_mut().step_by(k.heads).zip(&*weights) {
                *out = defined(weight);
            }
        }
    });
    Ok(())
}
