//! The reference applied to a whole batch.

use super::Dense;
use mustafar::reference::{self, Scoring, Token};

/// `attend` of every query: element `token * q_heads + head` is (output, lse). `tokens[b][kv_head]` are all tokens
/// of a sequence as that head sees them, `indptr[b]..indptr[b + 1]` its queries in `q`, `scoring[b]` its rules.
pub fn attention(
    q: &Dense,
    indptr: &[usize],
    tokens: &[Vec<Vec<Token>>],
    dim_v: usize,
    scoring: &[Scoring],
) -> Vec<(Vec<f64>, f64)> {
    let q_heads = q.shape.heads;
    let mut results = vec![(Vec::new(), f64::NAN); q.shape.tokens * q_heads];
    for (b, heads) in tokens.iter().enumerate() {
        let group = q_heads / heads.len();
        for head in 0..q_heads {
            let queries: Vec<Vec<f64>> = (indptr[b]..indptr[b + 1]).map(|t| q.row(0, t, head)).collect();
            let of_head = reference::attend(&queries, &heads[head / group], dim_v, &scoring[b]);
            for (i, result) in of_head.into_iter().enumerate() {
                results[(indptr[b] + i) * q_heads + head] = result;
            }
        }
    }
    results
}
