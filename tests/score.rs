//! Scores of strategies against the reference: weights of queries, of whole channels, of tokens.
#![allow(clippy::panic, clippy::unwrap_used)]

mod common;

use common::run::{query_weights, structured_weights, token_weights};
use common::{DIMS, DTYPES, Dense, Dist, Layout, Rng, contexts};
use mustafar::ops::{Center, Prune, QueryWeights, Selection, StructuredWeights, TokenWeights};
use mustafar::reference::score::{self, Query};
use mustafar::reference::{self, Scoring};
use mustafar::{Context, DType, Mem, MemMut, Result, Tensor};

/// Rows of the query heads of a KV head, by token, then head.
fn of_head(q: &Dense, head: usize, kv_heads: usize) -> Vec<Vec<f64>> {
    let group = q.shape.heads / kv_heads;
    let heads = head * group..(head + 1) * group;
    (0..q.shape.tokens)
        .flat_map(|t| heads.clone().map(move |h| (t, h)))
        .map(|(t, h)| q.row(0, t, h))
        .collect()
}

fn queries(rng: &mut Rng, dtype: DType, tokens: usize, heads: usize, dim: usize) -> Dense {
    let layout = *rng.pick(&Layout::ALL);
    Dense::random(rng, Dist::Outliers, dtype, layout.shape(1, tokens, heads, dim))
}

#[test]
fn queries_weigh_channels() {
    let mut rng = Rng::new(1);
    for dim in DIMS {
        for (dtype, kv_heads, group, tokens) in
            [(DType::F16, 2, 4, 32), (DType::Bf16, 3, 1, 5), (DType::F32, 1, 7, 1), (DType::F32, 2, 2, 100)]
        {
            let mut q = queries(&mut rng, dtype, tokens, kv_heads * group, dim);
            let mut row = q.row(0, 0, 0);
            (row[3], row[4]) = (f64::NAN, f64::INFINITY);
            q.set_row(0, 0, 0, &row);
            let expected: Vec<f32> =
                (0..kv_heads).flat_map(|h| score::query_weights(&of_head(&q, h, kv_heads), tokens)).collect();
            assert!(expected[3] == f32::INFINITY && expected[4] == f32::INFINITY && expected[5].is_finite());
            for context in contexts(&[1, 3]) {
                let mut out = vec![f32::NAN; kv_heads * dim];
                let args = QueryWeights { q: q.view(), kv_heads, out: MemMut::host(&mut out) };
                query_weights(&context, args).unwrap();
                assert_eq!(out, expected, "{dtype} {dim} at {context}");
            }
        }
    }
}

#[test]
fn whole_channels_are_chosen() {
    let mut rng = Rng::new(2);
    for dtype in DTYPES {
        for dim in DIMS {
            let (heads, keep) = (2, dim * 3 / 10);
            let layout = *rng.pick(&Layout::ALL);
            let tokens = *rng.pick(&[&[40, 7][..], &[0, 33], &[70]]);
            let x: Vec<Dense> = tokens
                .iter()
                .map(|&n| Dense::random(&mut rng, Dist::Ties, dtype, layout.shape(1, n, heads, dim)))
                .collect();
            let q = queries(&mut rng, DType::F32, 9, 3 * heads, dim);
            let c: Vec<f32> = (0..heads * dim).map(|_| rng.normal() as f32).collect();
            for (center, with_queries) in [(false, true), (true, true), (false, false), (true, false)] {
                let rows = |h: usize| -> Vec<Vec<f64>> {
                    let bits = x.iter().flat_map(|x| (0..x.shape.tokens).map(move |t| x.row_bits(0, t, h)));
                    let centered = |bits: Vec<u16>| match center {
                        true => reference::center(dtype, &bits, &c[h * dim..][..dim]),
                        false => bits,
                    };
                    let numbers = |bits: Vec<u16>| bits.iter().map(|&b| reference::value(dtype, b)).collect();
                    bits.map(centered).map(numbers).collect()
                };
                let expected: Vec<f32> = (0..heads)
                    .flat_map(|h| {
                        let q = with_queries.then(|| of_head(&q, h, heads));
                        score::structured_weights(&rows(h), q.as_deref(), keep)
                    })
                    .collect();
                for context in contexts(&[1, 3]) {
                    let parts: Vec<Tensor<'_>> = x.iter().map(Dense::view).collect();
                    let mut out = vec![f32::NAN; heads * dim];
                    let args = StructuredWeights {
                        x: &parts,
                        center: center.then_some(Center { values: Mem::host(&c), batch: 1 }),
                        q: with_queries.then(|| q.view()),
                        keep,
                        out: MemMut::host(&mut out),
                    };
                    structured_weights(&context, args).unwrap();
                    assert_eq!(out, expected, "{dtype} {dim} at {context}");
                }
            }
        }
    }
}

#[test]
fn structured_weights_keep_exactly_their_channels() {
    let mut rng = Rng::new(3);
    let (heads, dim, keep) = (2, 64, 20);
    // Zeros of both signs in kept channels must not lose against large values in dropped ones.
    let mut x =
        Dense::random(&mut rng, Dist::Outliers, DType::F16, Layout::TokensFirst.shape(1, 33, heads, dim));
    x.set_row(0, 0, 1, &vec![0.0; dim]);
    x.set_row(0, 1, 1, &vec![-0.0; dim]);
    let mut weights = vec![0f32; heads * dim];
    let parts = [x.view()];
    let out = MemMut::host(&mut weights);
    let args = StructuredWeights { x: &parts, center: None, q: None, keep, out };
    structured_weights(&Context::cpu(1).unwrap(), args).unwrap();
    for head in weights.chunks(dim) {
        assert_eq!(head.iter().filter(|w| w.is_infinite()).count(), keep);
    }
    for context in contexts(&[1]) {
        let mut pruned = x.clone();
        let mut mask = vec![0xFFu8; 33 * heads * dim / 8];
        let args = Prune {
            x: pruned.view_mut(),
            selection: Selection::Token { keep },
            weights: Some(Mem::host(&weights)),
            token_weights: None,
            mask: Some(MemMut::host(&mut mask)),
        };
        common::run::prune(&context, args).unwrap();
        for (row, bytes) in mask.chunks(dim / 8).enumerate() {
            let kept = |c: usize| bytes[c / 8] >> (c % 8) & 1 == 1;
            assert!((0..dim).all(|c| kept(c) == weights[row % heads * dim + c].is_infinite()), "{context}");
        }
    }
}

#[test]
fn attention_weighs_tokens() {
    let mut rng = Rng::new(4);
    for (dim, kv_heads, group, dtype) in
        [(64, 2, 3, DType::F16), (96, 1, 4, DType::Bf16), (256, 2, 1, DType::F32)]
    {
        for (q_position, k_position, softcap, sliding_window) in
            [(200, 50, None, None), (70, 60, Some(3.0), None), (120, 60, None, Some(50)), (3, 0, None, None)]
        {
            let (n, tokens) = (12, 33);
            let layout = *rng.pick(&Layout::ALL);
            let q = queries(&mut rng, DType::F32, n, kv_heads * group, dim);
            let k = Dense::random(&mut rng, Dist::Normal, dtype, layout.shape(1, tokens, kv_heads, dim));
            let mut lse = Dense::poisoned(DType::F32, layout.shape(1, n, kv_heads * group, 1));
            for (b, t, h) in lse.indices() {
                lse.set_row(b, t, h, &[2.0 + rng.normal()]);
            }
            let scale = rng.chance(0.5).then_some(0.05f32);
            let scoring = Scoring {
                scale: scale.map_or(Scoring::new(dim).scale as f32, |s| s).into(),
                softcap: softcap.map(f64::from),
                first: 0,
                sliding_window,
            };
            let expected: Vec<f32> = (0..tokens)
                .flat_map(|t| (0..kv_heads).map(move |h| (t, h)))
                .map(|(t, h)| {
                    // Queries before the first token are not there.
                    let all: Vec<Query> = (0..n)
                        .filter(|i| q_position + i + 1 >= n)
                        .flat_map(|i| (h * group..(h + 1) * group).map(move |head| (i, head)))
                        .map(|(i, head)| Query {
                            q: q.row(0, i, head),
                            position: q_position + i + 1 - n,
                            lse: lse.row(0, i, head)[0],
                        })
                        .collect();
                    score::token_weight(&all, &k.row(0, t, h), k_position + t, &scoring)
                })
                .collect();
            let mut first = None;
            for context in contexts(&[1, 3]) {
                let mut out = vec![f32::NAN; tokens * kv_heads];
                let args = TokenWeights {
                    q: q.view(),
                    lse: lse.view(),
                    q_position,
                    k: k.view(),
                    k_position,
                    scale,
                    softcap,
                    sliding_window,
                    out: MemMut::host(&mut out),
                };
                token_weights(&context, args).unwrap();
                // Scores of 10 and more in float32.
                for (i, (&found, &expected)) in out.iter().zip(&expected).enumerate() {
                    let close = (found - expected).abs() <= 5e-5 * expected + 1e-36;
                    assert!(close, "{found} is not {expected} at {i} of {dim}, {context}");
                }
                assert!(out.iter().any(|&w| w > 0.0));
                let bits: Vec<u32> = out.iter().map(|w| w.to_bits()).collect();
                assert_eq!(*first.get_or_insert(bits.clone()), bits, "{dim} at {context}");
            }
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let context = Context::cpu(1).unwrap();
    let mut rng = Rng::new(5);
    let q = queries(&mut rng, DType::F16, 4, 4, 64);
    let mut out = vec![0f32; 2 * 64];
    let message = |result: Result<()>| result.unwrap_err().to_string();
    let mut weigh = |q: &Dense, kv_heads: usize, n: usize| {
        let args = QueryWeights { q: q.view(), kv_heads, out: MemMut::host(&mut out[..n]) };
        message(query_weights(&context, args))
    };
    assert_eq!(weigh(&q, 3, 128), "q.heads is 4; allowed: a positive multiple of the 3 KV heads");
    assert_eq!(weigh(&q, 2, 127), "out has 508 bytes; needed: 512");
    assert_eq!(weigh(&queries(&mut rng, DType::F16, 0, 4, 64), 2, 128), "q.tokens is 0; allowed: at least 1");

    let x = queries(&mut rng, DType::F16, 4, 2, 64);
    let mut choose = |x: &[Tensor<'_>], q: Option<&Dense>, keep: usize| {
        let out = MemMut::host(&mut out);
        let args = StructuredWeights { x, center: None, q: q.map(Dense::view), keep, out };
        message(structured_weights(&context, args))
    };
    assert_eq!(choose(&[], None, 1), "x is 0 tensors; allowed: 1 or 2");
    assert_eq!(choose(&[x.view(); 3], None, 1), "x is 3 tensors; allowed: 1 or 2");
    assert_eq!(choose(&[x.view()], None, 65), "keep is 65; allowed: 1 to 64 (dim)");
    assert_eq!(
        choose(&[x.view(), q.view()], None, 5),
        "x.heads is 4; allowed: 2 (heads of the first tensor)"
    );
    let wide = queries(&mut rng, DType::F16, 4, 4, 96);
    assert_eq!(choose(&[x.view()], Some(&wide), 5), "q.dim is 96; allowed: 64 (dim of x)");

    let lse = queries(&mut rng, DType::F32, 3, 4, 1);
    let mut weigh = |lse: &Dense, q_position, k_position| {
        let args = TokenWeights {
            q: q.view(),
            lse: lse.view(),
            q_position,
            k: x.view(),
            k_position,
            scale: None,
            softcap: None,
            sliding_window: None,
            out: MemMut::host(&mut out),
        };
        message(token_weights(&context, args))
    };
    assert_eq!(weigh(&lse, 9, 0), "lse.tokens is 3; allowed: 4 (tokens of q)");
    let lse = queries(&mut rng, DType::F32, 4, 4, 1);
    let last = i32::MAX as usize - 3;
    let message = format!("{last} with 4 tokens; allowed: together below 2^31");
    assert_eq!(weigh(&lse, last, 0), format!("q_position is {message}"));
    assert_eq!(weigh(&lse, 9, last), format!("k_position is {message}"));
}
