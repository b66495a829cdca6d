//! `Cache` with every strategy, and with formats of its own for some layers and heads, against the model.
#![allow(clippy::panic, clippy::unwrap_used)]

mod cache_model;
mod common;

use cache_model::{Pair, new_cache, random_tokens, small_config};
use common::{Dense, Dist, Layout, Rng};
use mustafar::{
    Cache, CacheConfig, CacheQueries, CenterMode, Context, DType, HeadFormats, PageFormat, SequenceId, Side,
    Strategy, Stream, ValueType,
};

/// Value type and head_dim of K and of V.
type Types = [(ValueType, usize); 2];
const MIXED: Types = [(ValueType::F16, 64), (ValueType::Bf16, 96)];
/// As CUDA wants them.
const ALIKE: Types = [(ValueType::F16, 64); 2];

fn formats(types: Types, k: Strategy, v: Strategy, sparsity: f64) -> (PageFormat, PageFormat) {
    let of = |strategy: Strategy, (values, dim)| strategy.page_format(values, dim, 32, sparsity).unwrap();
    (of(k, types[0]), of(v, types[1]))
}

/// The small cache with strategies at a sparsity, and pages that any strategy can have.
fn config(types: Types, k_strategy: Strategy, v_strategy: Strategy, sparsity: f64) -> CacheConfig {
    let (k, v) = formats(types, k_strategy, v_strategy, sparsity);
    CacheConfig { k_strategy, v_strategy, k, v, max_tokens: 1024, ..small_config() }
}

fn of_side(side: Side) -> Vec<Strategy> {
    Strategy::ALL.into_iter().filter(|strategy| strategy.side() == side).collect()
}

/// Every strategy of K once with centred keys and once without, every one of V twice too.
fn configs(types: Types) -> Vec<CacheConfig> {
    let (k, v) = (of_side(Side::K), of_side(Side::V));
    let mut configs = Vec::new();
    for i in 0..10 {
        let center = if i % 2 == 0 { CenterMode::None } else { CenterMode::Median };
        // 4 and 5 have no common factor; K and centre go through all their pairs in 8 steps.
        let (k, v, sparsity) = (k[i / 2 % 4], v[i % 5], [0.5, 0.7, 0.3][i % 3]);
        // Every other one in 8 bits.
        let types = match i % 4 {
            2 | 3 if types == MIXED => [(ValueType::E4m3, 64), (ValueType::Int8, 96)],
            2 => [(ValueType::E4m3, 64); 2],
            3 => [(ValueType::Int8, 64); 2],
            _ => types,
        };
        configs.push(CacheConfig { center, ..config(types, k, v, sparsity) });
    }
    configs
}

/// The backends, each with types that it serves.
fn backends() -> Vec<(Context, Types)> {
    let cuda = common::device::cuda().map(|context| (context.clone(), ALIKE));
    [(Context::cpu(1).unwrap(), MIXED)].into_iter().chain(cuda).collect()
}

/// A prompt with the queries of its last tokens, for every layer.
fn prompt(pair: &mut Pair, rng: &mut Rng, ids: &[SequenceId], tokens: usize, queries: usize) {
    let config = pair.model.config.clone();
    for layer in 0..config.layers {
        let (k, v) = random_tokens(rng, &config, ids.len(), tokens);
        let shape = |dim| Layout::Gaps.shape(ids.len(), queries, config.q_heads, dim);
        let q = Dense::random(rng, Dist::Outliers, DType::F16, shape(config.k.head_dim()));
        let mut lse = Dense::poisoned(DType::F32, shape(1));
        for (b, t, h) in lse.indices() {
            lse.set_row(b, t, h, &[3.0 + 4.0 * rng.normal()]);
        }
        pair.append_with_queries(layer, ids, [&k, &v, &q, &lse]);
    }
}

/// One decode step: a token, then attention over everything.
fn decode(pair: &mut Pair, rng: &mut Rng, ids: &[SequenceId]) {
    for layer in 0..pair.model.config.layers {
        let (k, v) = random_tokens(rng, &pair.model.config, ids.len(), 1);
        assert!(pair.append(layer, ids, &k, &v));
        pair.model.assert_attends(rng, &mut pair.cache, layer, ids, 1);
    }
}

/// Prompts, decode steps across compressions, a fork, a truncation, a restart: what is stored agrees to the bit.
fn live(context: &Context, config: &CacheConfig, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut pair = Pair::on(context, config);
    let (a, b) = (pair.create(), pair.create());
    prompt(&mut pair, &mut rng, &[a, b], 80, 40);
    pair.model.assert_agrees(&pair.cache);
    // Less than a prompt's worth of queries, and fewer than 32.
    prompt(&mut pair, &mut rng, &[b], 45, 7);
    for _ in 0..35 {
        decode(&mut pair, &mut rng, &[b, a]);
    }
    pair.model.assert_agrees(&pair.cache);

    let fork = pair.fork(a);
    // Into the window; then so far that whole pages go, and so does everything the first compression fixed.
    let len = pair.cache.len(0, a).unwrap().0;
    pair.truncate(a, len - 3);
    pair.truncate(b, 3 + 32);
    pair.model.assert_agrees(&pair.cache);
    for _ in 0..36 {
        decode(&mut pair, &mut rng, &[a, fork, b]);
    }
    pair.model.assert_agrees(&pair.cache);

    let restored = pair.restore(a);
    for _ in 0..34 {
        decode(&mut pair, &mut rng, &[restored, a]);
    }
    pair.model.assert_agrees(&pair.cache);
    pair.truncate(b, 0);
    prompt(&mut pair, &mut rng, &[b], 50, 50);
    pair.model.assert_agrees(&pair.cache);
}

#[test]
fn every_strategy_stores_what_the_model_says() {
    for (context, types) in backends() {
        for (i, config) in configs(types).into_iter().enumerate() {
            live(&context, &config, 100 + i as u64);
        }
    }
}

/// More tokens than are weighed at a time.
#[test]
fn a_long_prompt_is_weighed_in_pieces() {
    for (context, types) in backends() {
        let all = config(types, Strategy::KtMag, Strategy::VcOpa, 0.7);
        let config = CacheConfig { layers: 1, q_heads: 2, kv_heads: 1, max_tokens: 4320, ..all };
        let mut pair = Pair::on(&context, &config);
        let id = pair.create();
        prompt(&mut pair, &mut Rng::new(5), &[id], 4300, 32);
        pair.model.assert_agrees(&pair.cache);
    }
}

#[test]
fn layers_and_heads_have_their_own_formats() {
    let strategies = [
        (Strategy::KtMag, Strategy::VtMag),
        (Strategy::KtOpa, Strategy::VcOpa),
        (Strategy::Think, Strategy::Thinv),
        (Strategy::KcMag, Strategy::VtMag),
    ];
    for (context, types) in backends() {
        for (k, v) in strategies {
            let all = config(types, k, v, 0.7);
            let formats = |sparsity| formats(types, k, v, sparsity);
            let of = |layers, heads, (k, v)| HeadFormats { layers, heads, k, v };
            // Layer 1 is left dense but for head 2; of both layers head 0 keeps more, and head 1 of layer 0 too.
            let overrides = vec![
                of(1..2, 0..4, formats(0.0)),
                of(1..2, 2..3, (all.k, all.v)),
                of(0..2, 0..1, formats(0.5)),
                of(0..1, 1..2, formats(0.5)),
            ];
            let config =
                CacheConfig { q_heads: 8, kv_heads: 4, center: CenterMode::Median, overrides, ..all };
            let mut rng = Rng::new(7);
            let mut pair = Pair::on(&context, &config);
            let (a, b) = (pair.create(), pair.create());
            prompt(&mut pair, &mut rng, &[a], 80, 32);
            prompt(&mut pair, &mut rng, &[b], 45, 20);
            for _ in 0..36 {
                decode(&mut pair, &mut rng, &[b, a]);
            }
            let fork = pair.fork(a);
            decode(&mut pair, &mut rng, &[fork, b, a]);
            let restored = pair.restore(a);
            decode(&mut pair, &mut rng, &[restored]);
            pair.model.assert_agrees(&pair.cache);
        }
    }
}

fn refusal(config: CacheConfig) -> String {
    Cache::new(&Context::cpu(1).unwrap(), config).unwrap_err().to_string()
}

#[test]
fn overrides_are_checked() {
    let ok = config(MIXED, Strategy::KtMag, Strategy::VtMag, 0.5);
    let with = |o: HeadFormats| refusal(CacheConfig { overrides: vec![o], ..ok.clone() });
    let base = HeadFormats { layers: 0..2, heads: 0..1, k: ok.k, v: ok.v };
    let over = HeadFormats { layers: 1..3, ..base.clone() };
    assert_eq!(with(over), "overrides.layers is 1..3; allowed: not empty, within 0..2");
    let empty = HeadFormats { heads: 1..1, ..base.clone() };
    assert_eq!(with(empty), "overrides.heads is 1..1; allowed: not empty, within 0..2");
    let ragged = Strategy::KcMag.page_format(ValueType::F16, 64, 32, 0.5).unwrap();
    assert_eq!(
        with(HeadFormats { k: ragged, ..base.clone() }),
        "overrides.k is Ragged { capacity: 1024 } with Kt_Mag; allowed: a uniform page format"
    );
    let other = Strategy::VtMag.page_format(ValueType::F16, 96, 32, 0.5).unwrap();
    assert_eq!(
        with(HeadFormats { v: other, ..base }),
        "overrides.v is f16 of 32 tokens x 96; allowed: bf16 of 32 tokens x 96, as everywhere else"
    );
}

#[test]
fn a_strategy_must_fit_its_side() {
    let ok = config(MIXED, Strategy::KtMag, Strategy::VtMag, 0.5);
    assert_eq!(
        refusal(CacheConfig { k_strategy: Strategy::VcOpa, ..ok.clone() }),
        "k_strategy is Vc_Opa, which prunes V; allowed: what prunes K: Kt_Mag, Kt_Opa, Kc_Mag, think"
    );
    assert_eq!(
        refusal(CacheConfig { v_strategy: Strategy::Think, ..ok.clone() }),
        "v_strategy is think, which prunes K; allowed: what prunes V: Vt_Mag, Vt_Opa, Vc_Mag, Vc_Opa, thinv"
    );
    assert_eq!(
        refusal(CacheConfig { v_strategy: Strategy::VcMag, ..ok }),
        "v is Uniform { keep: 48 } with Vc_Mag; allowed: a ragged page format"
    );
}

#[test]
fn queries_that_are_missing_or_wrong_are_refused() {
    let config = config(MIXED, Strategy::KtOpa, Strategy::VcOpa, 0.5);
    let mut cache = new_cache(&config);
    let id = cache.create().unwrap();
    let mut rng = Rng::new(3);
    let (k, v) = random_tokens(&mut rng, &config, 1, 40);
    let error = cache.append(Stream::NONE, 0, id, k.view(), v.view()).unwrap_err().to_string();
    assert_eq!(
        error,
        "queries is absent; allowed: the newest queries, with these tokens or by an attend before, for Kt_Opa"
    );
    let dense = |rng: &mut Rng, dtype, batch, tokens, heads, dim| {
        Dense::random(rng, Dist::Normal, dtype, Layout::TokensFirst.shape(batch, tokens, heads, dim))
    };
    let q = dense(&mut rng, DType::F32, 1, 5, 4, 64);
    let lse = dense(&mut rng, DType::F32, 1, 5, 4, 1);
    let mut refused = |q: &Dense, lse: Option<&Dense>, window| {
        let queries = CacheQueries {
            q: q.view(),
            lse: lse.map(Dense::view),
            scale: None,
            softcap: None,
            sliding_window: window,
        };
        let error =
            cache.append_with_queries(Stream::NONE, 0, &[id], k.view(), v.view(), queries).unwrap_err();
        assert_eq!(cache.len(0, id), Ok((0, 0)));
        error.to_string()
    };
    assert_eq!(refused(&q, None, None), "queries.lse is absent; allowed: given for Vc_Opa");
    assert_eq!(refused(&q, Some(&lse), Some(0)), "sliding_window is 0; allowed: at least 1");
    let cases = [
        (dense(&mut rng, DType::F32, 2, 5, 4, 64), "queries.q.batch is 2; allowed: 1 (sequences)"),
        (dense(&mut rng, DType::F32, 1, 5, 2, 64), "queries.q.heads is 2; allowed: 4 (q_heads of the cache)"),
        (dense(&mut rng, DType::F32, 1, 5, 4, 96), "queries.q.dim is 96; allowed: 64 (head_dim of the keys)"),
        (
            dense(&mut rng, DType::F32, 1, 41, 4, 64),
            "queries.q.tokens is 41; allowed: 1 to 40, the tokens that are appended",
        ),
    ];
    for (q, message) in cases {
        assert_eq!(refused(&q, Some(&lse), None), message);
    }
    let short = dense(&mut rng, DType::F32, 1, 4, 4, 1);
    assert_eq!(refused(&q, Some(&short), None), "queries.lse.tokens is 4; allowed: 5 (tokens of queries.q)");
}

#[test]
fn channel_pages_are_cut_at_their_ends_only() {
    let config = config(MIXED, Strategy::KtMag, Strategy::VcMag, 0.5);
    let mut pair = Pair::new(&config);
    let id = pair.create();
    pair.step(&mut Rng::new(1), &[id], 120);
    assert_eq!(pair.cache.len(0, id), Ok((120, 96)));
    let error = pair.cache.truncate(id, 3 + 70).unwrap_err().to_string();
    assert_eq!(error, "len is 73; allowed: one that leaves whole pages of 32 compressed tokens");
    pair.model.assert_agrees(&pair.cache);
    pair.truncate(id, 3 + 64);
    pair.model.assert_agrees(&pair.cache);
}
