//! Attention over dense K/V: the prompt's (causal, f32), and a decode step's (f16). This is the loop's own path,
//! independent of the library, which sparse results are compared with.

use super::matmul::{View, product};
use super::vector::{exp_scores, to_f32};
use half::f16;
use rayon::prelude::*;

/// Head counts and width, shared by the functions here.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub q: usize,
    pub kv: usize,
    pub dim: usize,
}

impl Heads {
    fn group(self) -> usize {
        self.q / self.kv
    }

    fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// Queries that one task of [`prefill`] takes; with the query heads of a group the matrix products get a few
/// hundred rows, and the triangle above the diagonal that is computed in vain stays small.
const QUERY_BLOCK: usize = 64;
/// Tokens that one task of [`decode`] takes. Fixed, so that results do not depend on the number of threads.
const TOKEN_BLOCK: usize = 256;

/// Causal attention of a prompt over itself. `q` is `[tokens, q heads, dim]`, `k` and `v` `[tokens, kv heads,
/// dim]`, `out` as `q`; `lse` receives the log-sum-exps, `[tokens, q heads]`.
pub fn prefill(heads: Heads, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32], lse: &mut [f32]) {
    let (q_width, kv_width) = (heads.q * heads.dim, heads.kv * heads.dim);
    assert_eq!(q.len() / q_width, k.len() / kv_width, "one query per token");
    let blocks = q.par_chunks(QUERY_BLOCK * q_width).zip(out.par_chunks_mut(QUERY_BLOCK * q_width));
    let blocks = blocks.zip(lse.par_chunks_mut(QUERY_BLOCK * heads.q));
    // Last blocks first: they see the most tokens, and a long task at the end would leave the other threads idle.
    blocks.enumerate().rev().for_each_init(Vec::new, |scores: &mut Vec<f32>, (block, ((q, out), lse))| {
        let first = block * QUERY_BLOCK;
        let queries = q.len() / q_width;
        let seen = first + queries;
        let rows = heads.group() * queries;
        scores.resize(rows * seen, 0.0);
        // Rows ordered by (head of the group, query).
        let mut gathered = vec![0.0; rows * heads.dim];
        let mut inverse = vec![0.0; rows];
        let mut result = vec![0.0; rows * heads.dim];
        for kv in 0..heads.kv {
            let place = |row: usize| {
                let head = kv * heads.group() + row / queries;
                row % queries * q_width + head * heads.dim
            };
            for (row, to) in gathered.chunks_exact_mut(heads.dim).enumerate() {
                for (to, from) in to.iter_mut().zip(&q[place(row)..]) {
                    *to = from * heads.scale();
                }
            }
            let head_rows = |x| View::rows(x, seen, heads.dim, kv_width);
            let keys = head_rows(&k[kv * heads.dim..]);
            product(scores, View::rows(&gathered, rows, heads.dim, heads.dim), keys.transposed(), false, 1);
            for (row, (scores, inverse)) in scores.chunks_exact_mut(seen).zip(&mut inverse).enumerate() {
                let (visible, hidden) = scores.split_at_mut(first + row % queries + 1);
                let (max, sum) = exp_scores(visible);
                *inverse = 1.0 / sum;
                lse[row % queries * heads.q + kv * heads.group() + row / queries] = max + sum.ln();
                hidden.fill(0.0);
            }
            let values = head_rows(&v[kv * heads.dim..]);
            product(&mut result, View::rows(scores, rows, seen, seen), values, false, 1);
            for (row, (from, inverse)) in result.chunks_exact(heads.dim).zip(&inverse).enumerate() {
                for (to, from) in out[place(row)..][..heads.dim].iter_mut().zip(from) {
                    *to = from * inverse;
                }
            }
        }
    });
}

/// What one block of tokens contributes to each query head: max and sum of the exponentials, and the weighted
/// values `[q heads, dim]`, not yet divided by the sum.
struct Partial {
    weights: Vec<(f32, f32)>,
    values: Vec<f32>,
}

/// Attention of one token's queries `[q heads, dim]` over all of `k` and `v`, `[tokens, kv heads, dim]`.
pub fn decode(heads: Heads, q: &[f32], k: &[f16], v: &[f16], out: &mut [f32]) {
    let kv_width = heads.kv * heads.dim;
    let scaled: Vec<f32> = q.iter().map(|x| x * heads.scale()).collect();
    let blocks = k.par_chunks(TOKEN_BLOCK * kv_width).zip(v.par_chunks(TOKEN_BLOCK * kv_width));
    let partials: Vec<Partial> = blocks
        .map_init(
            || (vec![0.0; TOKEN_BLOCK * kv_width], vec![0.0; heads.q * TOKEN_BLOCK]),
            |(dense, scores), (k, v)| block(heads, &scaled, k, v, dense, scores),
        )
        .collect();
    out.fill(0.0);
    for (head, out) in out.chunks_exact_mut(heads.dim).enumerate() {
        let max = partials.iter().map(|p| p.weights[head].0).fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0;
        for p in &partials {
            let (block_max, sum) = p.weights[head];
            let factor = (block_max - max).exp();
            total += sum * factor;
            for (out, x) in out.iter_mut().zip(&p.values[head * heads.dim..]) {
                *out += x * factor;
            }
        }
        out.iter_mut().for_each(|x| *x /= total);
    }
}

fn block(heads: Heads, q: &[f32], k: &[f16], v: &[f16], dense: &mut [f32], scores: &mut [f32]) -> Partial {
    let kv_width = heads.kv * heads.dim;
    let tokens = k.len() / kv_width;
    let dense = &mut dense[..k.len()];
    let scores = &mut scores[..heads.q * tokens];
    let mut values = vec![0.0; heads.q * heads.dim];
    let column = |x, rows| View::rows(x, rows, 1, 1);

    to_f32(k, dense);
    for (head, scores) in scores.chunks_exact_mut(tokens).enumerate() {
        let keys = View::rows(&dense[head / heads.group() * heads.dim..], tokens, heads.dim, kv_width);
        product(scores, keys, column(&q[head * heads.dim..], heads.dim), false, 1);
    }
    let weights = scores.chunks_exact_mut(tokens).map(exp_scores).collect();
    to_f32(v, dense);
    for (head, (scores, out)) in
        scores.chunks_exact(tokens).zip(values.chunks_exact_mut(heads.dim)).enumerate()
    {
        let rows = View::rows(&dense[head / heads.group() * heads.dim..], tokens, heads.dim, kv_width);
        product(out, rows.transposed(), column(scores, tokens), false, 1);
    }
    Partial { weights, values }
}
