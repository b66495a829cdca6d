//! A cache that keeps everything dense and derives the rest: what `Cache` must agree with.
#![allow(dead_code, unreachable_pub, clippy::panic, clippy::unwrap_used)]

use crate::common::device;
use crate::common::{Dense, Dist, Layout, Rng, Tolerance, assert_close, attention, is_cuda, run, values_of};
use mustafar::ops::{self, TokenWeights};
use mustafar::reference::score::{self, Query};
use mustafar::reference::{self, Row, Scoring, Token};
use mustafar::{
    Cache, CacheAttend, CacheBytes, CacheConfig, CacheQueries, CenterMode, Context, DType, Error, MemMut,
    PageFormat, SequenceId, Strategy, Stream, ValueType,
};
use std::collections::{BTreeMap, BTreeSet};

/// Bits of one row.
type Bits1 = Vec<u16>;
/// Bits of one token of one side: `[kv_heads][head_dim]`.
type Bits = Vec<Bits1>;

/// Everything one layer of a sequence was given, and how much of it is compressed.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    pub k: Vec<Bits>,
    pub v: Vec<Bits>,
    pub compressed: usize,
    /// `[kv_heads][head_dim]`.
    pub center: Option<Vec<Vec<f32>>>,
    /// What is stored of the compressed tokens: by token and head, K and V.
    rows: Vec<Vec<(Row, Row)>>,
    /// Weights that a structured strategy has fixed, K and V, `[kv_heads][head_dim]`.
    fixed: [Option<Vec<Vec<f32>>>; 2],
    /// The last queries, at consecutive positions: those of all query heads.
    queries: Vec<Vec<Query>>,
    /// Scale, softcap and sliding window of the newest.
    scoring: (Option<f32>, Option<f32>, Option<usize>),
    /// One past the position of the newest.
    end: usize,
}

#[derive(Debug, Clone)]
pub struct Sequence {
    pub layers: Vec<Layer>,
    /// Names of the pages it holds, never used twice.
    pub pages: Vec<u64>,
}

/// The sequences that should be alive.
#[derive(Debug)]
pub struct Model {
    pub config: CacheConfig,
    /// What the cache was made for.
    pub context: Context,
    pub live: BTreeMap<SequenceId, Sequence>,
    next_page: u64,
}

/// A small cache with all the corners: K and V differ, V in 8 bits, two layers, a group of two pages.
pub fn small_config() -> CacheConfig {
    CacheConfig {
        layers: 2,
        q_heads: 4,
        kv_heads: 2,
        k_strategy: Strategy::KtMag,
        v_strategy: Strategy::VtMag,
        overrides: Vec::new(),
        k: PageFormat::uniform(ValueType::F16, 64, 16, 19).unwrap(),
        v: PageFormat::uniform(ValueType::Int8, 96, 16, 33).unwrap(),
        window: 5,
        group: 32,
        sinks: 3,
        scaled_from: DType::Bf16,
        center: CenterMode::None,
        max_tokens: 32 * 8,
        max_sequences: 4,
    }
}

/// The nearest configuration that CUDA kernels serve: K and V of one type and head_dim.
pub fn for_cuda(config: &CacheConfig) -> CacheConfig {
    // For 8-bit values there are no attention kernels yet.
    let values = values_of(config.dtype(config.k));
    let like_k = |format: PageFormat| {
        let keep = format.keep().unwrap().min(config.k.head_dim());
        PageFormat::uniform(values, config.k.head_dim(), config.k.page_tokens(), keep).unwrap()
    };
    CacheConfig { k: like_k(config.k), v: like_k(config.v), ..config.clone() }
}

/// A cache of this configuration and its model on every backend, or of the nearest one that the backend serves.
pub fn pairs(config: &CacheConfig) -> Vec<Pair> {
    let on_cuda = device::cuda().map(|context| Pair::on(context, &for_cuda(config)));
    [Pair::new(config)].into_iter().chain(on_cuda).collect()
}

pub fn new_cache(config: &CacheConfig) -> Cache {
    Cache::new(&Context::cpu(1).unwrap(), config.clone()).unwrap()
}

/// K and V of `batch` sequences with `tokens` tokens each.
pub fn random_tokens(rng: &mut Rng, config: &CacheConfig, batch: usize, tokens: usize) -> (Dense, Dense) {
    let layout = *rng.pick(&Layout::ALL);
    let mut side = |format: PageFormat, dist| {
        let shape = layout.shape(batch, tokens, config.kv_heads, format.head_dim());
        Dense::random(rng, dist, config.dtype(format), shape)
    };
    (side(config.k, Dist::Outliers), side(config.v, Dist::Normal))
}

/// Tokens `from .. to` of every sequence of a tensor, copied.
pub fn part(x: &Dense, from: usize, to: usize) -> Dense {
    let s = x.shape;
    let mut new = Dense::poisoned(x.dtype, Layout::TokensFirst.shape(s.batch, to - from, s.heads, s.dim));
    for (b, t, h) in new.indices() {
        new.set_row_bits(b, t, h, &x.row_bits(b, from + t, h));
    }
    new
}

impl Layer {
    fn dense_tokens(&self, config: &CacheConfig) -> usize {
        self.k.len() - self.k.len().min(config.sinks) - self.compressed
    }

    /// Tokens that the next compression would take.
    fn due(&self, config: &CacheConfig) -> usize {
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
    fn observe(
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
    fn compress(&mut self, config: &CacheConfig, layer: usize, due: usize) {
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

/// Tokens `from .. to` of the only sequence of a tensor, in float32.
fn numbers_of(x: &Dense, from: usize, to: usize) -> Dense {
    let s = x.shape;
    let mut new = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(1, to - from, s.heads, s.dim));
    for (b, t, h) in new.indices() {
        new.set_row(b, t, h, &x.row(b, from + t, h));
    }
    new
}

/// Formats of the pages of a head.
fn formats(config: &CacheConfig, layer: usize, head: usize) -> (PageFormat, PageFormat) {
    let mut formats = (config.k, config.v);
    for o in &config.overrides {
        if o.layers.contains(&layer) && o.heads.contains(&head) {
            formats = (o.k, o.v);
        }
    }
    formats
}

/// Runs of heads of a layer with the same formats.
fn segments(config: &CacheConfig, layer: usize) -> Vec<std::ops::Range<usize>> {
    let mut segments: Vec<std::ops::Range<usize>> = Vec::new();
    for head in 0..config.kv_heads {
        match segments.last_mut() {
            Some(s) if formats(config, layer, s.start) == formats(config, layer, head) => s.end += 1,
            _ => segments.push(head..head + 1),
        }
    }
    segments
}

/// The number that a snapshot has for a strategy.
fn strategy_code(strategy: Strategy) -> usize {
    1 + Strategy::ALL.iter().position(|s| *s == strategy).unwrap()
}

/// Queries of sequence `b` in a batch, which stand at the positions before `end`.
fn gather_queries(config: &CacheConfig, b: usize, q: &Dense, lse: &Dense, end: usize) -> Vec<Vec<Query>> {
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
fn keep(format: PageFormat) -> usize {
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

impl Model {
    pub fn new(config: &CacheConfig) -> Self {
        let context = Context::cpu(1).unwrap();
        Self { config: config.clone(), context, live: BTreeMap::new(), next_page: 0 }
    }

    pub fn create(&mut self, id: SequenceId) {
        let layers = vec![Layer::default(); self.config.layers];
        assert!(self.live.insert(id, Sequence { layers, pages: Vec::new() }).is_none(), "{id:?} was alive");
    }

    pub fn pages_in_use(&self) -> usize {
        self.live.values().flat_map(|s| &s.pages).collect::<BTreeSet<_>>().len()
    }

    pub fn pages_free(&self) -> usize {
        self.config.max_tokens.div_ceil(self.config.k.page_tokens()) - self.pages_in_use()
    }

    fn is_shared(&self, page: u64) -> bool {
        self.live.values().filter(|s| s.pages.contains(&page)).count() > 1
    }

    /// Appends to one layer of some sequences; or says how many pages are missing and changes nothing.
    pub fn append(&mut self, layer: usize, ids: &[SequenceId], k: &Dense, v: &Dense) -> Result<(), Error> {
        self.append_with_queries(layer, ids, k, v, None)
    }

    /// As [`Model::append`]; `queries` are q and lse of the newest tokens.
    pub fn append_with_queries(
        &mut self,
        layer: usize,
        ids: &[SequenceId],
        k: &Dense,
        v: &Dense,
        queries: Option<(&Dense, &Dense)>,
    ) -> Result<(), Error> {
        let config = self.config.clone();
        let page_tokens = config.k.page_tokens();
        let mut after = Vec::new();
        for (b, id) in ids.iter().enumerate() {
            let mut l = self.live[id].layers[layer].clone();
            for t in 0..k.shape.tokens {
                l.k.push((0..config.kv_heads).map(|h| k.row_bits(b, t, h)).collect());
                l.v.push((0..config.kv_heads).map(|h| v.row_bits(b, t, h)).collect());
            }
            if let Some((q, lse)) = queries {
                l.observe(&config, gather_queries(&config, b, q, lse, l.k.len()), (None, None, None));
            }
            let due = l.due(&config);
            let written = if due == 0 {
                0..0
            } else {
                l.compressed / page_tokens..(l.compressed + due).div_ceil(page_tokens)
            };
            if due > 0 {
                l.compress(&config, layer, due);
            }
            let held = &self.live[id].pages;
            let new: Vec<usize> =
                written.filter(|&i| held.get(i).is_none_or(|&p| self.is_shared(p))).collect();
            after.push((l, new));
        }
        let (needed, free) = (after.iter().map(|(_, new)| new.len()).sum(), self.pages_free());
        if needed > free {
            return Err(Error::CacheFull { what: "pages", needed, free });
        }
        for (id, (l, new)) in ids.iter().zip(after) {
            let sequence = self.live.get_mut(id).unwrap();
            sequence.layers[layer] = l;
            for i in new {
                sequence.pages.resize(sequence.pages.len().max(i + 1), u64::MAX);
                sequence.pages[i] = self.next_page;
                self.next_page += 1;
            }
            assert!(!sequence.pages.contains(&u64::MAX));
        }
        Ok(())
    }

    pub fn fork(&mut self, from: SequenceId, to: SequenceId) {
        let copy = self.live[&from].clone();
        assert!(self.live.insert(to, copy).is_none(), "{to:?} was alive");
    }

    pub fn truncate(&mut self, id: SequenceId, len: usize) {
        let config = self.config.clone();
        let sequence = self.live.get_mut(&id).unwrap();
        for l in &mut sequence.layers {
            l.k.truncate(len);
            l.v.truncate(len);
            l.compressed = l.compressed.min(len.saturating_sub(config.sinks));
            l.rows.truncate(l.compressed);
            l.queries.retain(|query| query[0].position < len);
            l.end = l.end.min(len);
            if l.compressed == 0 {
                l.center = None;
                l.fixed = [None, None];
            }
        }
        let longest = sequence.layers.iter().map(|l| l.compressed).max().unwrap();
        sequence.pages.truncate(longest.div_ceil(config.k.page_tokens()));
    }

    /// The restored copy of a sequence holds pages of its own.
    pub fn restore(&mut self, from: SequenceId, to: SequenceId) {
        self.fork(from, to);
        for page in &mut self.live.get_mut(&to).unwrap().pages {
            *page = self.next_page;
            self.next_page += 1;
        }
    }

    /// Bytes of one dense token of a layer, and of one page of all heads and layers.
    fn sizes(&self) -> (usize, usize) {
        let c = &self.config;
        let values = |f: PageFormat| match f.value_type().bytes() {
            1 => 2 * f.page_tokens() + f.capacity(),
            _ => 2 * f.capacity(),
        };
        let page = |f: PageFormat| {
            let offsets = if f.keep().is_none() { (f.page_tokens() * 2 + 2).next_multiple_of(16) } else { 0 };
            f.page_tokens() * f.head_dim() / 8 + offsets + values(f)
        };
        let mut pages = 0;
        for (layer, head) in (0..c.layers).flat_map(|l| (0..c.kv_heads).map(move |h| (l, h))) {
            let (k, v) = formats(c, layer, head);
            pages += page(k) + page(v);
        }
        (c.kv_heads * (c.k.head_dim() + c.v.head_dim()) * 2, pages)
    }

    pub fn sequence_bytes(&self, id: SequenceId) -> CacheBytes {
        let (token, page) = self.sizes();
        let sequence = &self.live[&id];
        let tokens: usize = sequence.layers.iter().map(|l| l.k.len()).sum();
        let compressed: usize = sequence.layers.iter().map(|l| l.compressed).sum();
        CacheBytes {
            dense_equivalent: tokens * token,
            pages: sequence.pages.len() * page,
            window: (tokens - compressed) * token,
            allocated: 0,
        }
    }

    /// The bytes that "Snapshots" in `docs/format.md` prescribes.
    pub fn snapshot(&self, id: SequenceId) -> Vec<u8> {
        let c = &self.config;
        let layers = &self.live[&id].layers;
        let mut out = b"MSTFSNAP".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(2u32.to_le_bytes());
        out.extend([0; 8]);
        let mut numbers = vec![
            c.layers,
            c.q_heads,
            c.kv_heads,
            c.k.value_type() as usize,
            c.k.head_dim(),
            strategy_code(c.k_strategy),
            c.v.value_type() as usize,
            c.v.head_dim(),
            strategy_code(c.v_strategy),
            c.scaled_from as usize,
            c.k.page_tokens(),
            c.window,
            c.group,
            c.sinks,
            usize::from(c.center == CenterMode::Median),
        ];
        for (layer, head) in (0..c.layers).flat_map(|l| (0..c.kv_heads).map(move |h| (l, h))) {
            let (k, v) = formats(c, layer, head);
            numbers.extend([keep(k), keep(v)]);
        }
        numbers.push(layers[0].k.len());
        out.extend(numbers.iter().flat_map(|&n| (n as u64).to_le_bytes()));
        out.extend(layers.iter().flat_map(|l| (l.compressed as u64).to_le_bytes()));
        if c.k_strategy.needs_queries() || c.v_strategy.needs_queries() {
            for l in layers {
                let end = l.end;
                let (scale, softcap, window) = l.scoring;
                let float = |x: Option<f32>| u64::from(x.unwrap_or(f32::NAN).to_bits());
                let (end, window) = (end as u64, window.unwrap_or(0) as u64);
                let numbers = [end, l.queries.len() as u64, float(scale), float(softcap), window];
                out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
            }
        }
        for (layer, l) in layers.iter().enumerate() {
            let floats =
                |x: &Vec<Vec<f32>>| x.iter().flatten().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
            for weights in [&l.center, &l.fixed[0], &l.fixed[1]].into_iter().flatten() {
                out.extend(floats(weights));
            }
            for query in l.queries.iter().flatten() {
                out.extend(query.q.iter().flat_map(|&x| (x as f32).to_le_bytes()));
            }
            if c.v_strategy == Strategy::VcOpa {
                out.extend(l.queries.iter().flatten().flat_map(|query| (query.lse as f32).to_le_bytes()));
            }
            let first = l.k.len().min(c.sinks);
            let dense = |out: &mut Vec<u8>, tokens: std::ops::Range<usize>| {
                for side in [&l.k, &l.v] {
                    out.extend(side[tokens.clone()].iter().flatten().flatten().flat_map(|x| x.to_le_bytes()));
                }
            };
            dense(&mut out, 0..first);
            for segment in segments(c, layer) {
                for start in (0..l.compressed).step_by(c.k.page_tokens()) {
                    let end = l.compressed.min(start + c.k.page_tokens());
                    for head in segment.clone() {
                        let (k_format, v_format) = formats(c, layer, head);
                        let (k, v): (Vec<Row>, Vec<Row>) =
                            l.rows[start..end].iter().map(|rows| rows[head].clone()).unzip();
                        out.extend(reference::page(&k_format, &k, 0).unwrap());
                        out.extend(reference::page(&v_format, &v, 0).unwrap());
                    }
                }
            }
            dense(&mut out, first + l.compressed..l.k.len());
        }
        let bytes = out.len() as u64 + 4;
        out[16..24].copy_from_slice(&bytes.to_le_bytes());
        seal(&out)
    }

    /// Checks everything `cache` says about its sequences without attention.
    pub fn assert_agrees(&self, cache: &Cache) {
        let mut all = CacheBytes::default();
        for (&id, sequence) in &self.live {
            for (layer, l) in sequence.layers.iter().enumerate() {
                assert_eq!(cache.len(layer, id).unwrap(), (l.k.len(), l.compressed), "{id:?}, layer {layer}");
            }
            let bytes = self.sequence_bytes(id);
            assert_eq!(cache.sequence_bytes(id).unwrap(), bytes, "{id:?}");
            all.dense_equivalent += bytes.dense_equivalent;
            all.window += bytes.window;
            let even = sequence.layers.iter().all(|l| l.k.len() == sequence.layers[0].k.len());
            match cache.save(id) {
                Ok(snapshot) => assert!(even && snapshot == self.snapshot(id), "{id:?}: state differs"),
                Err(e) => assert!(!even && e.to_string().contains("equally many tokens"), "{e}"),
            }
        }
        all.pages = self.pages_in_use() * self.sizes().1;
        let found = cache.bytes();
        assert_eq!(CacheBytes { allocated: 0, ..found }, all);
    }

    /// Compares attention over `ids` with `queries` query tokens each.
    pub fn assert_attends(
        &mut self,
        rng: &mut Rng,
        cache: &mut Cache,
        layer: usize,
        ids: &[SequenceId],
        queries: usize,
    ) {
        let config = &self.config.clone();
        let (dim_k, dim_v) = (config.k.head_dim(), config.v.head_dim());
        let total = ids.len() * queries;
        let shape = |dim| Layout::Gaps.shape(1, total, config.q_heads, dim);
        let dtype = *rng.pick(&[DType::F16, DType::F32]);
        let q = Dense::random(rng, Dist::Normal, dtype, shape(dim_k));
        let on_cuda = is_cuda(&self.context);
        let q = if on_cuda { q.coarse() } else { q };
        let mut out = Dense::poisoned(DType::F32, shape(dim_v));
        let mut lse = Dense::poisoned(DType::F32, shape(1));
        let softcap = rng.chance(0.3).then_some(20.0);
        let sliding_window = rng.chance(0.3).then(|| 1 + rng.below(60));
        let args = CacheAttend {
            layer,
            sequences: ids,
            q: q.view(),
            scale: Some(0.1),
            softcap,
            sliding_window,
            out: out.view_mut(),
            lse: Some(lse.view_mut()),
        };
        run::cache_attend(&self.context, cache, args).unwrap();

        let indptr: Vec<usize> = (0..=ids.len()).map(|b| b * queries).collect();
        let tokens: Vec<Vec<Vec<Token>>> = ids
            .iter()
            .map(|id| {
                let l = &self.live[id].layers[layer];
                (0..config.kv_heads).map(|h| l.tokens(config, h)).collect()
            })
            .collect();
        let scoring = Scoring {
            scale: f64::from(0.1f32),
            softcap: softcap.map(f64::from),
            sliding_window,
            ..Scoring::new(dim_k)
        };
        let expected = attention(&q, &indptr, &tokens, dim_v, &vec![scoring; ids.len()]);
        // Scores reach about 100 (outlier channels); float32 leaves an error of 1e-5 in each exponent.
        let tolerance = match on_cuda {
            true => Tolerance::on_cuda(config.dtype(config.v), DType::F32, 5.0),
            false => Tolerance { rel: 1e-4, cosine: 1e-8, ..Tolerance::new(DType::F32, 5.0) },
        };
        let lse_tolerance = match on_cuda {
            true => Tolerance::on_cuda(config.dtype(config.v), DType::F32, 1.0),
            false => Tolerance::new(DType::F32, 10.0),
        };
        for t in 0..total {
            for h in 0..config.q_heads {
                let (want, want_lse) = &expected[t * config.q_heads + h];
                let what = format!("query {t}, head {h}");
                assert_close(&what, &out.row(0, t, h), want, tolerance);
                assert_close(&what, &lse.row(0, t, h), &[*want_lse], lse_tolerance);
            }
        }
        out.assert_gaps_untouched();
        for (b, id) in ids.iter().enumerate() {
            let (from, to) = (b * queries, (b + 1) * queries);
            let (q, lse) = (numbers_of(&q, from, to), numbers_of(&lse, from, to));
            let l = &mut self.live.get_mut(id).unwrap().layers[layer];
            let queries = gather_queries(config, 0, &q, &lse, l.k.len());
            l.observe(config, queries, (Some(0.1), softcap, sliding_window));
        }
    }
}

/// `bytes` followed by their CRC-32 (the one of zlib and PNG), bit by bit.
pub fn seal(bytes: &[u8]) -> Vec<u8> {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    [bytes, &(!crc).to_le_bytes()].concat()
}

/// A pair of cache and model, kept in step.
pub struct Pair {
    pub cache: Cache,
    pub model: Model,
}

impl Pair {
    pub fn new(config: &CacheConfig) -> Self {
        Self::on(&Context::cpu(1).unwrap(), config)
    }

    pub fn on(context: &Context, config: &CacheConfig) -> Self {
        let cache = Cache::new(context, config.clone()).unwrap();
        Self { cache, model: Model { context: context.clone(), ..Model::new(config) } }
    }

    pub fn create(&mut self) -> SequenceId {
        let id = self.cache.create().unwrap();
        self.model.create(id);
        id
    }

    /// Appends to one layer of both; both must agree whether it fits. True if it did.
    pub fn append(&mut self, layer: usize, ids: &[SequenceId], k: &Dense, v: &Dense) -> bool {
        let expected = self.model.append(layer, ids, k, v);
        let found = run::cache_append(&self.model.context, &mut self.cache, layer, ids, k.view(), v.view());
        assert_eq!(found, expected);
        found.is_ok()
    }

    /// Saves a sequence and restores it beside the first.
    pub fn restore(&mut self, id: SequenceId) -> SequenceId {
        let new = self.cache.restore(&self.cache.save(id).unwrap()).unwrap();
        self.model.restore(id, new);
        new
    }

    /// Appends tokens with the queries of the newest, as after a prompt.
    pub fn append_with_queries(&mut self, layer: usize, ids: &[SequenceId], [k, v, q, lse]: [&Dense; 4]) {
        self.model.append_with_queries(layer, ids, k, v, Some((q, lse))).unwrap();
        let queries = CacheQueries {
            q: q.view(),
            lse: Some(lse.view()),
            scale: None,
            softcap: None,
            sliding_window: None,
        };
        let Self { cache, model } = self;
        let kv = [k.view(), v.view()];
        run::cache_append_with_queries(&model.context, cache, layer, ids, kv, queries).unwrap();
    }

    /// Appends `tokens` random tokens to every layer of every sequence named.
    pub fn step(&mut self, rng: &mut Rng, ids: &[SequenceId], tokens: usize) {
        for layer in 0..self.model.config.layers {
            let (k, v) = random_tokens(rng, &self.model.config, ids.len(), tokens);
            assert!(self.append(layer, ids, &k, &v));
        }
    }

    pub fn fork(&mut self, id: SequenceId) -> SequenceId {
        let new = self.cache.fork(id).unwrap();
        self.model.fork(id, new);
        new
    }

    pub fn truncate(&mut self, id: SequenceId, len: usize) {
        self.cache.truncate(id, len).unwrap();
        self.model.truncate(id, len);
    }

    pub fn free(&mut self, id: SequenceId) {
        self.cache.free(id).unwrap();
        self.model.live.remove(&id);
    }
}
