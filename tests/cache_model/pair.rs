//! What drives a cache and its model in step.

use super::Model;
use crate::common::{Dense, Dist, Layout, Rng, device, run};
use mustafar::{
    Cache, CacheConfig, CacheQueries, CenterMode, Context, DType, PageFormat, SequenceId, Strategy, ValueType,
};

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
    let values = config.k.value_type();
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
