//! Scores of the strategies that look beyond magnitudes.

use super::{Scoring, dot};

/// A query of one head, the position it stands at, and the log-sum-exp of its scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    /// The vector.
    pub q: Vec<f64>,
    /// Position in its sequence.
    pub position: usize,
    /// Natural logarithm of the sum of exp(score) over all tokens that it sees.
    pub lse: f64,
}

/// What a weight becomes that could be anything: one that keeps.
fn defined(x: f64) -> f64 {
    if x.is_nan() { f64::INFINITY } else { x }
}

/// `Kt_Opa`: per channel the mean of abs(q) over `tokens` query tokens, summed over the query heads of a KV head.
/// `queries` are those of all these tokens and heads.
pub fn query_weights(queries: &[Vec<f64>], tokens: usize) -> Vec<f32> {
    let sum = |c: usize| queries.iter().map(|q| q[c].abs()).sum::<f64>();
    (0..queries[0].len()).map(|c| defined(sum(c) / tokens as f64) as f32).collect()
}

/// `think` (with queries as above) and `thinv` (without): infinity for the `keep` channels of the largest sum of x^2 times
/// sum of q^2, rounded to float32, 0 for the others; of equal ones the lower channel is kept. `x` has a row for each token of a
/// KV head. (Means would differ from sums by the same factor for all channels.)
pub fn structured_weights(x: &[Vec<f64>], queries: Option<&[Vec<f64>]>, keep: usize) -> Vec<f32> {
    let squares = |rows: &[Vec<f64>], c: usize| rows.iter().map(|row| row[c] * row[c]).sum::<f64>();
    let score = |c: usize| defined(squares(x, c) * queries.map_or(1.0, |q| squares(q, c))) as f32;
    let scores: Vec<f32> = (0..x[0].len()).map(score).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut weights = vec![0.0; scores.len()];
    order.into_iter().take(keep).for_each(|c| weights[c] = f32::INFINITY);
    weights
}

/// `Vc_Opa`: the attention that a key at `position` gets, summed over the queries of all query heads of its KV head.
pub fn token_weight(queries: &[Query], k: &[f64], position: usize, scoring: &Scoring) -> f32 {
    let sees = |query: &&Query| {
        let reach = scoring.sliding_window.unwrap_or(usize::MAX);
        position <= query.position && query.position - position < reach
    };
    let weight = |query: &Query| {
        let score = scoring.scale * dot(&query.q, k);
        let score = scoring.softcap.map_or(score, |c| c * (score / c).tanh());
        (score - query.lse).exp()
    };
    defined(queries.iter().filter(sees).map(weight).sum()) as f32
}
