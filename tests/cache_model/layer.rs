//! One layer of a sequence: everything it was given, and what of it is stored how.

use crate::common::{Dense, Layout};
use mustafar::ops::{self, TokenWeights};
use mustafar::reference::score::{self, Query};
use mustafar::reference::{self, Row, Token};
use mustafar::{CacheConfig, CenterMode, Context, DType, MemMut, PageFormat, Strategy, Stream};

/// Bits of one row.
pub type Bits1 = Vec<u16>;

/// Bits of one token of one side: `[kv_heads][head_dim]`.
pub type Bits = Vec<Bits1>;

/// Everything one layer of a sequence was given, and how much of it is compressed.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    pub k: Vec<Bits>,
    pub v: Vec<Bits>,
    pub compressed: usize,
    /// `[kv_heads][head_dim]`.
    pub center: Option<Vec<Vec<f32>>>,
    /// What is stored of the compressed tokens: by token and head, K and V.
    pub rows: Vec<Vec<(Row, Row)>>,
    /// Weights that a structured strategy has fixed, K and V, `[kv_heads][head_dim]`.
    pub fixed: [Option<Vec<Vec<f32>>>; 2],
    /// The last queries, at consecutive positions: those of all query heads.
    pub queries: Vec<Vec<Query>>,
    /// Scale, softcap and sliding window of the newest.
    pub scoring: (Option<f32>, Option<f32>, Option<usize>),
    /// One past the position of the newest.
    pub end: usize,
}

impl Layer {
    fn dense_tokens(&self, config: &CacheConfig) -> usize {
        self.k.len() - self.k.len().min(config.sinks) - self.compressed
    }

    /// Tokens that the next compression would take.
    pub fn due(&self, config: &CacheConfig) -> usize {
        let dense = self.dense_tokens(config);
        (0..).map(|n| n * config.group).take_while(|n| n + config.window <= dense).last().unwrap_or(0)
    }

    /// Key of a token as it is pruned.
    fn centered(&self, config: &CacheConfig, t: usize, head: usize) -> Bits1 {
        match &self.center {
            Some(c) => reference::center(config.dtype(config.k), &self.k[t][head], &c[head]),
            None => self.k[t][head].clone(),
        }
    }

    /// Queries of the query heads of a KV head, by token, then head.
    fn queries_of(&self, config: &CacheConfig, head: usize) -> Vec<Query> {
        let group = config.q_heads / config.kv_heads;
        let of_token = |all: &Vec<Query>| all[head * group..(head + 1) * group].to_vec();
        self.queries.iter().flat_map(of_token).collect()
    }

    /// Adds the queries of the newest tokens.
    pub fn observe(
        &mut self,
        config: &CacheConfig,
        new: Vec<Vec<Query>>,
        scoring: (Option<f32>, Option<f32>, Option<usize>),
    ) {
        if !(config.k_strategy.needs_queries() || config.v_strategy.needs_queries()) {
            return;
        }
        (self.scoring, self.end) = (scoring, self.k.len());
        for query in new {
            let position = query[0].position;
            self.queries.retain(|old| old[0].position < position);
            if self.queries.last().is_some_and(|old| old[0].position + 1 != position) {
                self.queries.clear();
            }
            self.queries.push(query);
            if self.queries.len() > 32 {
                self.queries.remove(0);
            }
        }
    }

    /// The attention that keys of one head get, the first of which stands at `first`. By the op, since float32 rounds
    /// each weight; `tests/score.rs` compares it with the reference.
    fn token_weights(
        &self,
        config: &CacheConfig,
        queries: &[Query],
        keys: &[Bits1],
        first: usize,
    ) -> Vec<f32> {
        let group = config.q_heads / config.kv_heads;
        let shape = |tokens, heads, dim| Layout::TokensFirst.shape(1, tokens, heads, dim);
        let (n, dim) = (queries.len() / group, config.k.head_dim());
        let mut q = Dense::poisoned(DType::F32, shape(n, group, dim));
        let mut lse = Dense::poisoned(DType::F32, shape(n, group, 1));
        for (i, query) in queries.iter().enumerate() {
            q.set_row(0, i / group, i % group, &query.q);
            lse.set_row(0, i / group, i % group, &[query.lse]);
        }
        let mut k = Dense::poisoned(config.dtype(config.k), shape(keys.len(), 1, dim));
        keys.iter().enumerate().for_each(|(t, key)| k.set_row_bits(0, t, 0, key));
        let (scale, softcap, sliding_window) = self.scoring;
        let mut out = vec![f32::NAN; keys.len()];
        let args = TokenWeights {
            q: q.view(),
            lse: lse.view(),
            q_position: self.end - 1,
            k: k.view(),
            k_position: first,
            scale,
            softcap,
            sliding_window,
            out: MemMut::host(&mut out),
        };
        ops::token_weights(&Context::cpu(1).unwrap(), Stream::NONE, args).unwrap();
        out
    }

    /// Compresses `due` more tokens.
    pub fn compress(&mut self, config: &CacheConfig, layer: usize, due: usize) {
        let first = config.sinks + self.compressed;
        let tokens = first..first + due;
        if self.compressed == 0 && config.center == CenterMode::Median {
            self.center = Some(median(config.dtype(config.k), &self.k[tokens.clone()]));
        }
        let mut by_head = Vec::new();
        for head in 0..config.kv_heads {
            let (k_format, v_format) = formats(config, layer, head);
            let k: Vec<Bits1> = tokens.clone().map(|t| self.centered(config, t, head)).collect();
            let v: Vec<Bits1> = tokens.clone().map(|t| self.v[t][head].clone()).collect();
            let queries = self.queries_of(config, head);
            let vectors: Vec<Vec<f64>> = queries.iter().map(|query| query.q.clone()).collect();
            let numbers = |dtype, rows: &[Bits1]| -> Vec<Vec<f64>> {
                rows.iter().map(|row| row.iter().map(|&x| reference::value(dtype, x)).collect()).collect()
            };
            if self.compressed == 0 {
                if config.k_strategy == Strategy::Think {
                    let (x, keep) = (numbers(config.dtype(config.k), &k), k_format.keep().unwrap());
                    let weights = score::structured_weights(&x, Some(&vectors), keep);
                    self.fixed[0].get_or_insert_default().resize(head, Vec::new());
                    self.fixed[0].as_mut().unwrap().push(weights);
                }
                if config.v_strategy == Strategy::Thinv {
                    let (x, keep) = (numbers(config.dtype(config.v), &v), v_format.keep().unwrap());
                    let weights = score::structured_weights(&x, None, keep);
                    self.fixed[1].get_or_insert_default().resize(head, Vec::new());
                    self.fixed[1].as_mut().unwrap().push(weights);
                }
            }
            let fixed = |side: usize| self.fixed[side].as_ref().map(|all| all[head].clone());
            let k_weights = match config.k_strategy {
                Strategy::KtOpa => Some(score::query_weights(&vectors, self.queries.len())),
                Strategy::Think => fixed(0),
                _ => None,
            };
            let v_weights = if config.v_strategy == Strategy::Thinv { fixed(1) } else { None };
            let token_weights = (config.v_strategy == Strategy::VcOpa).then(|| {
                let dense: Vec<Bits1> = tokens.clone().map(|t| self.k[t][head].clone()).collect();
                self.token_weights(config, &queries, &dense, first)
            });
            let k = select(config, config.k_strategy, k_format, &k, k_weights.as_deref(), None);
            let v = select(
                config,
                config.v_strategy,
                v_format,
                &v,
                v_weights.as_deref(),
                token_weights.as_deref(),
            );
            by_head.push(k.into_iter().zip(v).collect::<Vec<_>>());
        }
        for t in 0..due {
            self.rows.push(by_head.iter().map(|head| head[t].clone()).collect());
        }
        self.compressed += due;
    }

    /// All tokens as a head's attention sees them.
    pub fn tokens(&self, config: &CacheConfig, head: usize) -> Vec<Token> {
        let first = self.k.len().min(config.sinks);
        let numbers = |format: PageFormat, bits: &[u16]| {
            bits.iter().map(|&x| reference::value(config.dtype(format), x)).collect::<Vec<_>>()
        };
        let mut tokens: Vec<Token> = (0..self.k.len())
            .map(|t| Token { k: numbers(config.k, &self.k[t][head]), v: numbers(config.v, &self.v[t][head]) })
            .collect();
        for (token, rows) in tokens[first..].iter_mut().zip(&self.rows) {
            let (k, v) = &rows[head];
            let center = self.center.as_ref().map(|c| &c[head][..]);
            *token =
                Token { k: k.dense(config.k.value_type(), center), v: v.dense(config.v.value_type(), None) };
        }
        tokens
    }
}

/// Formats of the pages of a head.
pub fn formats(config: &CacheConfig, layer: usize, head: usize) -> (PageFormat, PageFormat) {
    let mut formats = (config.k, config.v);
    for o in &config.overrides {
        if o.layers.contains(&layer) && o.heads.contains(&head) {
            formats = (o.k, o.v);
        }
    }
    formats
}

/// Queries of sequence `b` in a batch, which stand at the positions before `end`.
pub fn gather_queries(config: &CacheConfig, b: usize, q: &Dense, lse: &Dense, end: usize) -> Vec<Vec<Query>> {
    let n = q.shape.tokens.min(end);
    (0..n)
        .map(|i| {
            let (token, position) = (q.shape.tokens - n + i, end - n + i);
            let of_head = |h| Query { q: q.row(b, token, h), position, lse: lse.row(b, token, h)[0] };
            (0..config.q_heads).map(of_head).collect()
        })
        .collect()
}

/// Values of a row, or tokens of a channel in 32.
pub fn keep(format: PageFormat) -> usize {
    format.keep().unwrap_or_else(|| format.capacity() * 32 / format.page_tokens() / format.head_dim())
}

/// Prunes the rows of one head.
fn select(
    config: &CacheConfig,
    strategy: Strategy,
    format: PageFormat,
    rows: &[Bits1],
    weights: Option<&[f32]>,
    token_weights: Option<&[f32]>,
) -> Vec<Row> {
    let (dtype, keep) = (config.dtype(format), keep(format));
    let group = |(i, group): (usize, &[Bits1])| {
        let weights = token_weights.map(|all| &all[i * 32..(i + 1) * 32]);
        reference::prune_channel(dtype, group, keep, weights)
    };
    let pruned: Vec<Row> = match strategy.is_channel() {
        true => rows.chunks(32).enumerate().flat_map(group).collect(),
        false => rows.iter().map(|row| reference::prune_token(dtype, row, keep, weights)).collect(),
    };
    pruned.into_iter().map(|row| row.stored(dtype, format.value_type())).collect()
}

/// The lower median of each channel.
fn median(dtype: DType, tokens: &[Bits]) -> Vec<Vec<f32>> {
    let channel = |h: usize, c: usize| {
        let mut column: Vec<f64> = tokens.iter().map(|t| reference::value(dtype, t[h][c])).collect();
        column.sort_by(f64::total_cmp);
        column[(column.len() - 1) / 2] as f32
    };
    (0..tokens[0].len()).map(|h| (0..tokens[0][h].len()).map(|c| channel(h, c)).collect()).collect()
}
