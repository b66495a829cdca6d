//! `Cache` against a model that keeps everything dense: what is compressed when, sharing, bytes, errors.
#![allow(clippy::panic, clippy::unwrap_used)]

mod cache_model;
mod common;

use cache_model::{Pair, new_cache, pairs, part, random_tokens, small_config};
use common::{DIMS, DTYPES, Dense, Dist, Layout, PAGE_SIZES, Rng, VALUE_TYPES, foreign_stream};
use mustafar::{
    Cache, CacheAttend, CacheConfig, CenterMode, Context, DType, Error, PageFormat, SequenceId, Stream,
    ValueType,
};

/// Tokens compressed of `tokens`, in closed form.
fn compressed(config: &CacheConfig, tokens: usize) -> usize {
    let CacheConfig { sinks, window, group, .. } = *config;
    if tokens < sinks + window + group { 0 } else { (tokens - sinks - window) / group * group }
}

#[test]
fn a_token_at_a_time_equals_one_call_to_the_bit() {
    let config = CacheConfig { max_tokens: 3 * 150, ..small_config() };
    let mut rng = Rng::new(1);
    for tokens in [1, 3, 4, 39, 40, 41, 71, 72, 73, 150] {
        for mut pair in pairs(&config) {
            let config = pair.model.config.clone();
            let (whole, single, split) = (pair.create(), pair.create(), pair.create());
            for layer in 0..config.layers {
                let (k, v) = random_tokens(&mut rng, &config, 1, tokens);
                assert!(pair.append(layer, &[whole], &k, &v));
                for t in 0..tokens {
                    assert!(pair.append(layer, &[single], &part(&k, t, t + 1), &part(&v, t, t + 1)));
                }
                let mut at = 0;
                while at < tokens {
                    let to = (at + rng.below(60)).min(tokens); // empty parts too
                    assert!(pair.append(layer, &[split], &part(&k, at, to), &part(&v, at, to)));
                    at = to;
                }
                assert_eq!(pair.cache.len(layer, whole).unwrap(), (tokens, compressed(&config, tokens)));
            }
            let snapshots = [whole, single, split].map(|id| pair.cache.save(id).unwrap());
            assert!(snapshots[0] == snapshots[1] && snapshots[0] == snapshots[2], "{tokens} tokens");
            pair.model.assert_agrees(&pair.cache);
        }
    }
}

#[test]
fn threads_change_no_bit() {
    // Large enough that the ops and the median use several threads.
    let config = CacheConfig {
        center: CenterMode::Median,
        max_tokens: 4096,
        kv_heads: 8,
        q_heads: 8,
        layers: 1,
        ..small_config()
    };
    let (k, v) = random_tokens(&mut Rng::new(12), &config, 1, 3000);
    let q =
        Dense::random(&mut Rng::new(13), Dist::Normal, DType::F32, Layout::TokensFirst.shape(1, 2, 8, 64));
    let results = [1, 2, 7].map(|threads| {
        let mut cache = Cache::new(&Context::cpu(threads).unwrap(), config.clone()).unwrap();
        let id = cache.create().unwrap();
        cache.append(Stream::NONE, 0, id, k.view(), v.view()).unwrap();
        let mut out = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(1, 2, 8, 96));
        let args = CacheAttend {
            layer: 0,
            sequences: &[id],
            q: q.view(),
            scale: None,
            softcap: None,
            sliding_window: None,
            out: out.view_mut(),
            lse: None,
        };
        cache.attend(Stream::NONE, args).unwrap();
        (cache.save(id).unwrap(), out.bytes.to_vec())
    });
    assert!(results[0] == results[1] && results[0] == results[2]);
}

#[test]
fn attention_over_a_batch_of_different_lengths() {
    let mut rng = Rng::new(2);
    for center in [CenterMode::None, CenterMode::Median] {
        let config = CacheConfig { center, max_sequences: 6, max_tokens: 2000, ..small_config() };
        for mut pair in pairs(&config) {
            let config = pair.model.config.clone();
            let ids: Vec<SequenceId> = [0, 2, 5, 39, 40, 300]
                .into_iter()
                .map(|tokens| {
                    let id = pair.create();
                    pair.step(&mut rng, &[id], tokens);
                    id
                })
                .collect();
            pair.model.assert_agrees(&pair.cache);
            for (batch, queries) in
                [(&[5][..], 1), (&[5, 0, 3, 1], 1), (&[4, 2, 5], 7), (&[3, 5], 0), (&[0, 1, 2, 3, 4, 5], 20)]
            {
                let batch: Vec<SequenceId> = batch.iter().map(|&i: &usize| ids[i]).collect();
                for layer in 0..config.layers {
                    pair.model.assert_attends(&mut rng, &mut pair.cache, layer, &batch, queries);
                }
            }
        }
    }
}

#[test]
fn a_sequence_attends_the_same_alone_and_in_a_batch() {
    let config = CacheConfig { max_sequences: 3, max_tokens: 4000, ..small_config() };
    let mut rng = Rng::new(3);
    let mut pair = Pair::new(&config);
    let ids = [50, 900, 2000].map(|tokens| {
        let id = pair.create();
        pair.step(&mut rng, &[id], tokens);
        id
    });
    let q = Dense::random(&mut rng, Dist::Normal, DType::F16, Layout::TokensFirst.shape(1, 3, 4, 64));
    let mut attend = |ids: &[SequenceId], q: &Dense| {
        let mut out = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(1, ids.len(), 4, 96));
        let args = CacheAttend {
            layer: 0,
            sequences: ids,
            q: q.view(),
            scale: None,
            softcap: None,
            sliding_window: None,
            out: out.view_mut(),
            lse: None,
        };
        pair.cache.attend(Stream::NONE, args).unwrap();
        (0..ids.len()).map(|b| (0..4).map(|h| out.row(0, b, h)).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    let together = attend(&ids, &q);
    for (b, id) in ids.into_iter().enumerate() {
        assert_eq!(attend(&[id], &part(&q, b, b + 1))[0], together[b], "sequence {b}");
    }
}

#[test]
fn every_format_compresses_and_attends() {
    let mut rng = Rng::new(4);
    for (i, head_dim) in DIMS.into_iter().enumerate() {
        for (j, page_tokens) in PAGE_SIZES.into_iter().enumerate() {
            let config = CacheConfig {
                k: PageFormat::uniform(VALUE_TYPES[(i + j) % 4], head_dim, page_tokens, head_dim / 2)
                    .unwrap(),
                v: PageFormat::uniform(VALUE_TYPES[j], head_dim, page_tokens, head_dim * 3 / 10).unwrap(),
                scaled_from: DTYPES[i % 2],
                group: page_tokens * (1 + i % 2),
                sinks: j,
                center: if i % 2 == 0 { CenterMode::None } else { CenterMode::Median },
                layers: 1,
                max_tokens: 600,
                max_sequences: 1,
                ..small_config()
            };
            for mut pair in pairs(&config) {
                let config = pair.model.config.clone();
                let id = pair.create();
                pair.step(&mut rng, &[id], 2 * config.group + 20);
                pair.model.assert_agrees(&pair.cache);
                pair.model.assert_attends(&mut rng, &mut pair.cache, 0, &[id], 2);
            }
        }
    }
}

#[test]
fn layers_of_one_step_may_differ_in_length() {
    let config = small_config();
    let mut rng = Rng::new(5);
    for mut pair in pairs(&config) {
        let config = pair.model.config.clone();
        let id = pair.create();
        pair.step(&mut rng, &[id], 39);
        let (k, v) = random_tokens(&mut rng, &config, 1, 1);
        assert!(pair.append(0, &[id], &k, &v));
        assert_eq!((pair.cache.len(0, id).unwrap(), pair.cache.len(1, id).unwrap()), ((40, 32), (39, 0)));
        for layer in [0, 1] {
            pair.model.assert_attends(&mut rng, &mut pair.cache, layer, &[id], 1);
        }
        // Forked between the layers of a step: the pages that layer 1 has yet to fill belong to both.
        let fork = pair.fork(id);
        for id in [id, fork] {
            let (k, v) = random_tokens(&mut rng, &config, 1, 1);
            assert!(pair.append(1, &[id], &k, &v));
        }
        pair.model.assert_agrees(&pair.cache);
        for id in [id, fork] {
            pair.model.assert_attends(&mut rng, &mut pair.cache, 1, &[id], 1);
        }
    }
}

#[test]
fn forks_share_pages_until_they_write_into_one() {
    for center in [CenterMode::None, CenterMode::Median] {
        let config = CacheConfig { center, ..small_config() };
        let mut rng = Rng::new(6);
        for mut pair in pairs(&config) {
            let parent = pair.create();
            pair.step(&mut rng, &[parent], 3 + 64 + 5);
            assert_eq!(pair.model.pages_in_use(), 4);
            let child = pair.fork(parent);
            // Different continuations share the prefix only.
            pair.step(&mut rng, &[parent, child], 32);
            assert_eq!(pair.model.pages_in_use(), 4 + 2 + 2);
            pair.model.assert_agrees(&pair.cache);

            // Cut inside page 1: the next compression of the child goes on in a copy of it.
            pair.truncate(child, 3 + 20);
            assert_eq!(pair.cache.len(1, child).unwrap(), (23, 20));
            pair.step(&mut rng, &[child], 40);
            assert_eq!(pair.cache.len(1, child).unwrap(), (63, 52));
            pair.model.assert_agrees(&pair.cache);
            for id in [parent, child] {
                pair.model.assert_attends(&mut rng, &mut pair.cache, 1, &[id], 3);
            }

            // The parent's end leaves the child whole and frees all but its pages.
            pair.free(parent);
            assert_eq!(pair.model.pages_in_use(), 4);
            pair.model.assert_agrees(&pair.cache);
            pair.model.assert_attends(&mut rng, &mut pair.cache, 0, &[child], 1);
            pair.free(child);
            assert_eq!((pair.cache.bytes().pages, pair.cache.bytes().window), (0, 0));
        }
    }
}

#[test]
fn truncate_cuts_window_prefix_and_sinks() {
    let config = CacheConfig { center: CenterMode::Median, ..small_config() };
    let mut rng = Rng::new(7);
    // (length kept, compressed then): into the window, at its start, inside a page, a page edge, the sinks, nothing.
    for (len, left) in [(75, 64), (72, 64), (67, 64), (40, 37), (35, 32), (4, 1), (3, 0), (1, 0), (0, 0)] {
        for mut pair in pairs(&config) {
            let id = pair.create();
            pair.step(&mut rng, &[id], 80);
            assert_eq!(pair.cache.len(0, id).unwrap(), (80, 64));
            pair.truncate(id, len);
            assert_eq!(pair.cache.len(1, id).unwrap(), (len, left));
            pair.model.assert_agrees(&pair.cache);
            pair.model.assert_attends(&mut rng, &mut pair.cache, 0, &[id], 1);
            // Going on compresses again once the window is full, with a new centre if nothing was left.
            pair.step(&mut rng, &[id], 90);
            pair.model.assert_agrees(&pair.cache);
            pair.model.assert_attends(&mut rng, &mut pair.cache, 1, &[id], 2);
        }
    }
}

#[test]
fn a_full_cache_refuses_and_stays_as_it_was() {
    let config = CacheConfig { max_tokens: 100, max_sequences: 2, ..small_config() }; // 7 pages of 16
    let mut rng = Rng::new(8);
    let mut pair = Pair::new(&config);
    let (a, b) = (pair.create(), pair.create());
    assert_eq!(pair.cache.create(), Err(Error::CacheFull { what: "sequences", needed: 1, free: 0 }));
    assert_eq!(pair.cache.fork(a), Err(Error::CacheFull { what: "sequences", needed: 1, free: 0 }));

    pair.step(&mut rng, &[a, b], 40); // 2 pages each
    let (k, v) = random_tokens(&mut rng, &config, 2, 33);
    let error = pair.cache.append_batch(Stream::NONE, 0, &[a, b], k.view(), v.view()).unwrap_err();
    assert_eq!(error, Error::CacheFull { what: "pages", needed: 4, free: 3 });
    assert_eq!(error.to_string(), "cache needs 4 more pages; free: 3");
    pair.model.assert_agrees(&pair.cache);

    // Less fits: the window takes 31 tokens without pages, one sequence alone its two.
    pair.step(&mut rng, &[a, b], 31);
    pair.step(&mut rng, &[b], 1);
    let huge = Dense {
        shape: mustafar::Shape { token_stride: 0, tokens: i32::MAX as usize, ..part(&k, 0, 1).shape },
        ..part(&k, 0, 1)
    };
    let huge_v = Dense {
        shape: mustafar::Shape { token_stride: 0, tokens: i32::MAX as usize, ..part(&v, 0, 1).shape },
        ..part(&v, 0, 1)
    };
    let error = pair.cache.append_batch(Stream::NONE, 1, &[a, b], huge.view(), huge_v.view()).unwrap_err();
    assert!(matches!(error, Error::CacheFull { what: "pages", free: 1, .. }), "{error}");
    pair.model.assert_agrees(&pair.cache);

    // Pages that a sequence gives up serve the other.
    pair.free(b);
    pair.step(&mut rng, &[a], 33);
    pair.model.assert_agrees(&pair.cache);
    pair.model.assert_attends(&mut rng, &mut pair.cache, 0, &[a], 1);
}

#[test]
fn bytes_are_those_of_the_format() {
    // Figures of docs/format.md at D = 128: (values, bytes of a row without its bitmap, share of dense).
    for (values, keep, row, share) in [
        (ValueType::F16, 39, 78, 0.367),
        (ValueType::F16, 64, 128, 0.563),
        (ValueType::E4m3, 39, 41, 0.223),
        (ValueType::Int8, 64, 66, 0.320),
    ] {
        let page = PageFormat::uniform(values, 128, 64, keep).unwrap();
        let config = CacheConfig {
            k: page,
            v: page,
            max_tokens: 4096,
            group: 256,
            window: 32,
            sinks: 4,
            ..CacheConfig::new(3, 32, 8, 128, keep, keep, 4096).unwrap()
        };
        let mut cache = new_cache(&config);
        let id = cache.create().unwrap();
        let shape = Layout::TokensFirst.shape(1, 1060, 8, 128);
        let x = Dense::random(&mut Rng::new(9), Dist::Normal, DType::F16, shape);
        for layer in 0..3 {
            cache.append(Stream::NONE, layer, id, x.view(), x.view()).unwrap();
        }
        let bytes = cache.bytes();
        // 1024 tokens are compressed; a row is 16 bytes of bitmap, the scale and the values.
        assert_eq!(bytes.pages, 3 * 2 * 8 * 1024 * (16 + row));
        assert_eq!(bytes.window, 3 * 2 * 8 * 36 * 256);
        assert_eq!(bytes.dense_equivalent, 3 * 2 * 8 * 1060 * 256);
        let compressed_dense = bytes.dense_equivalent - bytes.window;
        let found = bytes.pages as f64 / compressed_dense as f64;
        assert!((found - share).abs() < 0.0005, "keep {keep}: {found}");
        // The workspace, which all layers share, is what a layer more does not add.
        let layer = 2 * 8 * (4096 * (16 + row) + (4 + 32 + 256) * 256);
        let another = new_cache(&CacheConfig { layers: 4, ..config.clone() });
        assert_eq!(another.bytes().allocated, bytes.allocated + layer);
        assert!(bytes.allocated > 3 * layer);
        let before = bytes.allocated;
        cache.append(Stream::NONE, 0, id, x.view(), x.view()).unwrap();
        assert_eq!(cache.bytes().allocated, before);
    }
}

#[test]
fn attention_of_planned_size_allocates_nothing() {
    let config = CacheConfig { max_sequences: 3, max_tokens: 1000, ..small_config() };
    let mut rng = Rng::new(10);
    let mut pair = Pair::new(&config);
    let ids = [100, 320, 30].map(|tokens| {
        let id = pair.create();
        pair.step(&mut rng, &[id], tokens);
        id
    });
    let before = pair.cache.bytes().allocated;
    for queries in [1, 16] {
        pair.model.assert_attends(&mut rng, &mut pair.cache, 0, &ids, queries);
    }
    pair.step(&mut rng, &ids[..1], 480);
    pair.model.assert_attends(&mut rng, &mut pair.cache, 0, &ids[..1], 16);
    assert_eq!(pair.cache.bytes().allocated, before);
    // More than is planned for still works; the workspace grows.
    pair.model.assert_attends(&mut rng, &mut pair.cache, 0, &ids, 50);
    assert!(pair.cache.bytes().allocated > before);
}

#[test]
fn ids_are_never_reused() {
    let mut cache = new_cache(&small_config());
    let first = cache.create().unwrap();
    cache.free(first).unwrap();
    let second = cache.create().unwrap();
    assert_ne!(first, second);
    assert_eq!(SequenceId::from_raw(second.to_raw()), second);
    for error in [
        cache.free(first).unwrap_err(),
        cache.truncate(first, 0).unwrap_err(),
        cache.fork(first).unwrap_err(),
    ] {
        assert_eq!(
            error.to_string(),
            format!("sequence is {}; allowed: a live sequence of this cache", first.to_raw())
        );
    }
    assert!(
        cache.len(0, first).is_err() && cache.save(first).is_err() && cache.sequence_bytes(first).is_err()
    );
}

#[test]
fn configurations_are_checked_field_by_field() {
    let page = |tokens| PageFormat::uniform(ValueType::F16, 64, tokens, 10).unwrap();
    let ragged = PageFormat::ragged(ValueType::F16, 64, 16, 100).unwrap();
    let ok = small_config();
    let cases = [
        (CacheConfig { layers: 0, ..ok.clone() }, "layers is 0; allowed: at least 1"),
        (CacheConfig { kv_heads: 0, ..ok.clone() }, "kv_heads is 0; allowed: at least 1"),
        (CacheConfig { q_heads: 0, ..ok.clone() }, "q_heads is 0; allowed: at least 1"),
        (CacheConfig { q_heads: 5, ..ok.clone() }, "q_heads is 5; allowed: a multiple of kv_heads (2)"),
        (
            CacheConfig { k: ragged, ..ok.clone() },
            "k is Ragged { capacity: 100 } with Kt_Mag; allowed: a uniform page format",
        ),
        (
            CacheConfig { v: ragged, ..ok.clone() },
            "v is Ragged { capacity: 100 } with Vt_Mag; allowed: a uniform page format",
        ),
        (CacheConfig { v: page(32), ..ok.clone() }, "v.page_tokens is 32; allowed: that of k (16)"),
        (CacheConfig { window: 0, ..ok.clone() }, "window is 0; allowed: at least 1"),
        (CacheConfig { scaled_from: DType::F32, ..ok.clone() }, "scaled_from is f32; allowed: f16, bf16"),
        (
            CacheConfig { group: 0, ..ok.clone() },
            "group is 0; allowed: a positive multiple of page_tokens (16)",
        ),
        (
            CacheConfig { group: 24, ..ok.clone() },
            "group is 24; allowed: a positive multiple of page_tokens (16)",
        ),
        (CacheConfig { max_tokens: 0, ..ok.clone() }, "max_tokens is 0; allowed: at least 1"),
        (CacheConfig { max_sequences: 0, ..ok.clone() }, "max_sequences is 0; allowed: at least 1"),
        (
            CacheConfig { max_tokens: usize::MAX, ..ok.clone() },
            "max_tokens is 18446744073709551615 with 3 sinks, window 5 and group 32; allowed: together below 2^31",
        ),
        (
            CacheConfig { sinks: 1 << 31, ..ok.clone() },
            "max_tokens is 256 with 2147483648 sinks, window 5 and group 32; allowed: together below 2^31",
        ),
        (
            CacheConfig { max_sequences: 1 << 31, ..ok.clone() },
            "max_sequences is 2147483648; allowed: below 2^31",
        ),
        (CacheConfig { layers: usize::MAX, ..ok.clone() }, "layers does not fit in 64 bits"),
        (
            CacheConfig { kv_heads: usize::MAX / 2, q_heads: usize::MAX / 2, ..ok.clone() },
            "page_stride does not fit in 64 bits",
        ),
    ];
    for (config, message) in cases {
        let error = config.check().unwrap_err();
        assert_eq!(error.to_string(), message);
        assert_eq!(Cache::new(&Context::cpu(1).unwrap(), config).err(), Some(error));
    }
    ok.check().unwrap();
    // Fits in 64 bits, not in any memory.
    let config = CacheConfig { layers: 1 << 40, ..ok };
    let error = Cache::new(&Context::cpu(1).unwrap(), config).err();
    assert!(matches!(error, Some(Error::OutOfMemory { .. })), "{error:?}");
}

#[test]
fn calls_with_wrong_arguments_change_nothing() {
    let config = small_config();
    let mut rng = Rng::new(11);
    let mut pair = Pair::new(&config);
    let (a, b) = (pair.create(), pair.create());
    pair.step(&mut rng, &[a, b], 50);
    let stranger = SequenceId::from_raw(99);
    let stream = foreign_stream();
    let (k, v) = random_tokens(&mut rng, &config, 2, 40);
    let dense = |dtype, batch, tokens, heads, dim| {
        Dense::poisoned(dtype, Layout::TokensFirst.shape(batch, tokens, heads, dim))
    };
    let cache = &mut pair.cache;
    let mut append = |stream, layer, ids: &[SequenceId], k: &Dense, v: &Dense| {
        cache.append_batch(stream, layer, ids, k.view(), v.view()).unwrap_err().to_string()
    };
    let none = Stream::NONE;
    assert!(append(stream, 0, &[a, b], &k, &v).contains("allowed: null on the CPU backend"));
    assert_eq!(append(none, 2, &[a, b], &k, &v), "layer[0] is 2; allowed: 0 to 1");
    assert_eq!(append(none, 0, &[], &k, &v), "sequences is empty; allowed: at least one sequence");
    assert_eq!(
        append(none, 0, &[a, stranger], &k, &v),
        "sequences is 99; allowed: a live sequence of this cache"
    );
    assert_eq!(append(none, 0, &[b, b], &k, &v), "sequences is 2 twice; allowed: each sequence once");
    let allowed = "allowed: [2, 0 to 2147483647, 2, 64] f16";
    for (x, found) in [
        (dense(DType::F16, 1, 40, 2, 64), "k is [1, 40, 2, 64] f16"),
        (dense(DType::F16, 2, 40, 3, 64), "k is [2, 40, 3, 64] f16"),
        (dense(DType::F16, 2, 40, 2, 96), "k is [2, 40, 2, 96] f16"),
        (dense(DType::Bf16, 2, 40, 2, 64), "k is [2, 40, 2, 64] bf16"),
    ] {
        assert_eq!(append(none, 0, &[a, b], &x, &v), format!("{found}; {allowed}"));
    }
    let x = dense(DType::F32, 2, 40, 2, 96);
    assert_eq!(
        append(none, 0, &[a, b], &k, &x),
        "v is [2, 40, 2, 96] f32; allowed: [2, 0 to 2147483647, 2, 96] bf16"
    );
    let x = dense(DType::Bf16, 2, 39, 2, 96);
    assert_eq!(append(none, 0, &[a, b], &k, &x), "v.tokens is 39; allowed: k.tokens (40)");

    let q = Dense::random(&mut rng, Dist::Normal, DType::F32, Layout::TokensFirst.shape(1, 2, 4, 64));
    let mut attend = |stream, layer, sequences: &[SequenceId], q: &Dense| {
        let mut out = dense(DType::F32, 1, 2, 4, 96);
        let args = CacheAttend {
            layer,
            sequences,
            q: q.view(),
            scale: None,
            softcap: None,
            sliding_window: None,
            out: out.view_mut(),
            lse: None,
        };
        let error = cache.attend(stream, args).unwrap_err().to_string();
        assert!(out.bytes.iter().all(|&x| x == 0xFF), "{error}");
        error
    };
    assert!(attend(stream, 0, &[a, b], &q).contains("allowed: null on the CPU backend"));
    assert_eq!(attend(none, 2, &[a, b], &q), "layer[0] is 2; allowed: 0 to 1");
    assert_eq!(attend(none, 0, &[a, a], &q), "sequences is 1 twice; allowed: each sequence once");
    assert_eq!(attend(none, 0, &[stranger], &q), "sequences is 99; allowed: a live sequence of this cache");
    let x = dense(DType::F32, 1, 3, 4, 64);
    assert_eq!(attend(none, 0, &[a, b], &x), "q.tokens is 3; allowed: a multiple of the 2 sequences");
    // The ops check the rest.
    for x in [dense(DType::F32, 1, 2, 6, 64), dense(DType::F32, 1, 2, 4, 96), dense(DType::F32, 2, 2, 4, 64)]
    {
        attend(none, 0, &[a, b], &x);
    }

    assert_eq!(cache.truncate(a, 51).unwrap_err().to_string(), "len[0] is 51; allowed: 0 to 50");
    assert_eq!(cache.len(7, a).unwrap_err().to_string(), "layer[0] is 7; allowed: 0 to 1");
    pair.model.assert_agrees(&pair.cache);
}
