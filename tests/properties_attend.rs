//! Properties of attention from end to end: `append`, `attend`, `spmv_key`, `spmv_value` and `merge` against the
//! float64 reference, over formats, head groups, lengths and options.
#![allow(clippy::panic, clippy::unwrap_used)]

mod common;

use common::{
    DIMS, Dense, Dist, HEADS, Layout, PAGE_SIZES, Rng, Scene, Step, Tolerance, VALUE_TYPES, assert_close,
    config, contexts, dense_rows, run, scenes,
};
use mustafar::ops::{Append, AppendSide, Center, Merge, SpmvKey, SpmvValue};
use mustafar::{Context, DType, Mem, PageFormat, ValueType, reference};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

const FLOATS: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];

fn page_format(values: ValueType, dim: usize, page_tokens: usize, share: f64, ragged: bool) -> PageFormat {
    let keep = 1 + (share * (dim - 1) as f64).round() as usize;
    if ragged {
        PageFormat::ragged(values, dim, page_tokens, page_tokens * keep).unwrap()
    } else {
        PageFormat::uniform(values, dim, page_tokens, keep).unwrap()
    }
}

prop_compose! {
    fn format_of(page_tokens: usize)(
        values in select(&VALUE_TYPES[..]), dim in select(&DIMS[..]), share in 0.0..=1.0f64, ragged in any::<bool>(),
    ) -> PageFormat {
        page_format(values, dim, page_tokens, share, ragged)
    }
}

prop_compose! {
    fn formats()(page_tokens in select(&PAGE_SIZES[..]))
        (k in format_of(page_tokens), v in format_of(page_tokens)) -> (PageFormat, PageFormat) { (k, v) }
}

prop_compose! {
    fn options()(
        scale in option::of(0.01..0.5f32),
        softcap in option::of(0.5..50.0f32),
        sliding_window in option::of(1..200usize),
        split_tokens in option::of(1..200usize),
        padded in any::<bool>(),
        head_lens in any::<bool>(),
        centers in 0..3usize,
        sinks in option::of(0..5usize),
        window in option::of(0..70usize),
    ) -> Step {
        Step { scale, softcap, sliding_window, split_tokens, padded, head_lens, centers, sinks, window, ..Step::default() }
    }
}

prop_compose! {
    fn step()(
        options in options(),
        (k, v) in formats(),
        (q_heads, kv_heads) in select(&HEADS[..]),
        seed in any::<u64>(),
        lens in prop::collection::vec(0..300usize, 1..4),
        (q_len, uneven_q) in (1..7usize, any::<bool>()),
        dtypes in (select(&FLOATS[..]), select(&FLOATS[..]), select(&FLOATS[..])),
        layout in select(&Layout::ALL[..]),
        dist in select(&Dist::FINITE[..]),
    ) -> Step {
        let (q_dtype, dense_dtype, out_dtype) = dtypes;
        Step {
            k, v, q_heads, kv_heads, seed, lens, q_len, uneven_q, q_dtype, dense_dtype, out_dtype, layout, dist,
            ..options
        }
    }
}

proptest! {
    #![proptest_config(config(96))]

    #[test]
    fn attention_equals_the_reference(step in step()) {
        scenes(&step, |context, scene| {
            let (out, lse) = scene.run(context);
            scene.check(&context.to_string(), &out, &lse);
        });
    }

    #[test]
    fn non_finite_values_are_not_hidden(step in step(), few in 0..30usize) {
        let lens = vec![few; step.lens.len()];
        scenes(&Step { dist: Dist::NonFinite, centers: 0, lens, ..step }, |context, scene| {
            let (out, lse) = scene.run(context);
            scene.check_non_finite(&context.to_string(), &out, &lse);
        });
    }

    #[test]
    fn threads_change_nothing(step in step()) {
        let scene = Scene::new(step);
        let (out, lse) = scene.run(&Context::cpu(1).unwrap());
        for threads in [2, 5] {
            let (other, other_lse) = scene.run(&Context::cpu(threads).unwrap());
            prop_assert!(out.bytes[..] == other.bytes[..], "{threads} threads");
            prop_assert!(lse.bytes[..] == other_lse.bytes[..], "{threads} threads");
        }
    }
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn appended_then_attended(
        seed in any::<u64>(), page_tokens in select(&PAGE_SIZES[..]), dims in (select(&DIMS[..]), select(&DIMS[..])),
        shares in (0.0..=1.0f64, 0.0..=1.0f64), centers in 0..3usize, lens in prop::collection::vec(0..200usize, 1..4),
    ) {
        // The same as above, with pages written by `append` instead of by the reference.
        let k = page_format(ValueType::F16, dims.0, page_tokens, shares.0, false);
        let v = page_format(ValueType::Bf16, dims.1, page_tokens, shares.1, false);
        let mut scene = Scene::new(Step { seed, k, v, lens: lens.clone(), centers, ..Step::default() });
        let mut rng = Rng::new(seed ^ 1);
        let heads = scene.step.kv_heads;
        let order: Vec<(usize, usize)> =
            lens.iter().enumerate().flat_map(|(b, &n)| (0..n).map(move |t| (b, t))).collect();
        let slots: Vec<i64> = order.iter().map(|&(b, t)| scene.table.slot(b, t)).collect();
        let context = Context::cpu(2).unwrap();
        let written_by_reference = (scene.k.pool.bytes.clone(), scene.v.pool.bytes.clone());
        for (paged, dim, dtype) in [(&mut scene.k, dims.0, DType::F16), (&mut scene.v, dims.1, DType::Bf16)] {
            let mut x = Dense::poisoned(dtype, Layout::Gaps.shape(1, order.len(), heads, dim));
            for (i, &(b, t)) in order.iter().enumerate() {
                (0..heads).for_each(|h| x.set_row_bits(0, i, h, &unpruned(&mut rng, &paged.rows[b][h][t])));
            }
            paged.pool.bytes.fill(0xFF);
            let side = AppendSide { x: x.view(), pool: paged.pool.view_mut(), weights: None, center: None };
            let args = Append { k: Some(side), v: None, slots: Mem::host(&slots), sequence: None };
            run::append(&context, args).unwrap();
        }
        prop_assert!(scene.k.pool.bytes[..] == written_by_reference.0[..], "K pages");
        prop_assert!(scene.v.pool.bytes[..] == written_by_reference.1[..], "V pages");
        let (out, lse) = scene.run(&context);
        scene.check("appended", &out, &lse);
    }

    #[test]
    fn a_sequence_does_not_depend_on_the_batch(step in step(), split in 1..100usize, copies in 2..4usize) {
        // The first sequence alone and among others, with the same bounds: equal bits.
        let step = Step { split_tokens: Some(split), uneven_q: false, head_lens: false, centers: 0, ..step };
        scenes(&step, |context, scene| {
        let (out, lse) = scene.run(context);
        let mut alone = Scene::new(scene.step.clone());
        alone.keep_first_sequence();
        for _ in 1..copies {
            let (single, single_lse) = alone.run(context);
            for (t, h) in (0..step.q_len).flat_map(|t| (0..step.q_heads).map(move |h| (t, h))) {
                let same = |a: &Dense, b: &Dense| a.row(0, t, h).iter().zip(b.row(0, t, h)).all(|(x, y)| x.to_bits() == y.to_bits());
                assert!(same(&out, &single) && same(&lse, &single_lse), "{context}: query {t}, head {h}");
            }
        }
        });
    }

    #[test]
    fn both_halves_of_attention(step in step()) {
        let scene = Scene::new(Step { sinks: None, window: None, uneven_q: false, ..step });
        let step = &scene.step;
        let (batch, group) = (step.lens.len(), step.q_heads / step.kv_heads);
        let mut rng = Rng::new(step.seed ^ 2);
        let (dim_k, dim_v) = (step.k.head_dim(), step.v.head_dim());
        let q_shape = step.layout.shape(batch, step.q_len, step.q_heads, dim_k);
        let q = Dense::random(&mut rng, Dist::Normal, step.q_dtype, q_shape);
        let long = step.layout.shape(batch, step.q_len, step.q_heads, scene.table.max_len + 5);
        let weights = Dense::random(&mut rng, Dist::Normal, DType::F32, long);
        let centers = if step.centers == 2 { batch } else { step.centers };
        let scale = step.scale.map_or(1.0 / (dim_k as f64).sqrt(), f64::from);
        for context in contexts(&[1, 3]) {
            let mut scores = Dense::poisoned(DType::F32, long);
            let args = SpmvKey {
                q: q.view(),
                pool: scene.k.pool.view(),
                sequences: scene.table.view(),
                center: scene.center.as_ref().map(|c| Center { values: Mem::host(c), batch: centers }),
                scale: step.scale,
                scores: scores.view_mut(),
            };
            run::spmv_key(&context, args).unwrap();
            scores.assert_gaps_untouched();
            let mut out = Dense::poisoned(step.out_dtype, step.layout.shape(batch, step.q_len, step.q_heads, dim_v));
            let args = SpmvValue {
                weights: weights.view(),
                pool: scene.v.pool.view(),
                sequences: scene.table.view(),
                out: out.view_mut(),
            };
            run::spmv_value(&context, args).unwrap();
            out.assert_gaps_untouched();

            for (b, i, h) in q.indices() {
                let kv = h / group;
                let at = ((if centers > 1 { b } else { 0 }) * step.kv_heads + kv) * dim_k;
                let center = scene.center.as_ref().map(|c| &c[at..at + dim_k]);
                let keys = dense_rows(&scene.k, b, kv, center);
                let keys: Vec<&[f64]> = keys.iter().map(|k| &k[..]).collect();
                let want = reference::spmv_key(&q.row(b, i, h), &keys, scale);
                let largest = want.iter().fold(1.0f64, |a, s| a.max(s.abs()));
                let got = scores.row(b, i, h);
                let tolerance = Tolerance::new(DType::F32, largest).over(&[step.k], largest);
                assert_close("scores", &got[..want.len()], &want, tolerance);
                prop_assert!(got[want.len()..].iter().all(|s| s.is_nan()), "scores past the length were written");

                let values = dense_rows(&scene.v, b, kv, None);
                let values: Vec<&[f64]> = values.iter().map(|v| &v[..]).collect();
                let of_tokens = weights.row(b, i, h);
                let want = reference::spmv_value(&of_tokens[..values.len()], &values, dim_v);
                // Errors scale with the terms, which may be much larger than their sum.
                let terms = |c: usize| -> f64 { values.iter().zip(&of_tokens).map(|(v, w)| (v[c] * w).abs()).sum() };
                let largest = (0..dim_v).map(terms).fold(0.0, f64::max);
                let tolerance = Tolerance::new(step.out_dtype, largest).over(&[step.v], largest);
                assert_close("sums", &out.row(b, i, h), &want, tolerance);
            }
        }
    }

    #[test]
    fn merged_halves_equal_the_whole(step in step()) {
        // Sinks and pages on one side, the window on the other, and no rule that looks across.
        let step = Step {
            sliding_window: None, padded: false, q_len: 1, uneven_q: false, window: Some(30), out_dtype: DType::F32, ..step
        };
        scenes(&step, |context, scene| {
            let (a, a_lse) = scene.run_parts(context, true, false);
            let (b, b_lse) = scene.run_parts(context, false, true);
            let shape = a.shape;
            for out_dtype in FLOATS {
                let mut out = Dense::poisoned(out_dtype, Layout::Gaps.shape(1, shape.tokens, shape.heads, shape.dim));
                let mut lse = Dense::poisoned(DType::F32, a_lse.shape);
                let args = Merge {
                    a: a.view(), a_lse: a_lse.view(), b: b.view(), b_lse: b_lse.view(),
                    out: out.view_mut(), lse: Some(lse.view_mut()),
                };
                run::merge(context, args).unwrap();
                out.assert_gaps_untouched();
                scene.check("merged", &out, &lse);
            }
        });
    }
}

/// A dense row that prunes to `row`: dropped channels get smaller magnitudes than any kept one.
fn unpruned(rng: &mut Rng, row: &reference::Row) -> Vec<u16> {
    let kept = row.bits.iter().zip(&row.mask).filter(|(_, kept)| **kept);
    let smallest = kept.map(|(x, _)| x & 0x7FFF).min().unwrap_or(0);
    assert!(smallest > 0, "a kept zero ties with what is dropped");
    let mut fill = || (rng.next() as u16 & 0x8000) | rng.below(smallest.into()) as u16;
    row.bits.iter().zip(&row.mask).map(|(&x, &kept)| if kept { x } else { fill() }).collect()
}
