//! `attend` against the float64 reference, at every instruction level of this processor.
#![allow(unreachable_pub, clippy::unwrap_used, clippy::panic)]

mod case;
#[path = "../common/mod.rs"]
mod common;
mod errors;
mod invariance;
mod properties;

use case::{Case, Centre, Pages, Results, Spec, ragged, uniform};
use common::device::cuda;
use common::{Dist, HEADS, Layout, Tolerance, assert_close, cpu_contexts, keeps, lengths};
use mustafar::{Context, DType, ValueType};

fn compare(what: &str, case: &Case, got: &Results) {
    let want = case.expected();
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().flat_map(|(out, _)| out).fold(0.0f64, |a, x| a.max(x.abs()));
    for (i, ((out, lse), (want_out, want_lse))) in got.iter().zip(&want).enumerate() {
        let largest = largest.max(1e-3);
        assert_close(
            &format!("{what}, row {i}"),
            out,
            want_out,
            tolerance(&case.spec, case.spec.out, largest),
        );
        assert_close(
            &format!("{what}, lse {i}"),
            &[*lse],
            &[*want_lse],
            tolerance(&case.spec, DType::F32, 1.0),
        );
    }
}

fn tolerance(spec: &Spec, stored: DType, scale: f64) -> Tolerance {
    Tolerance::of_attention(spec.coarse, [spec.k, spec.v], [spec.q, spec.dense.0], stored, scale)
}

/// Runs the batch on the CPU at every instruction level, and its nearest relative on the GPU.
fn check(spec: Spec) {
    each_backend(spec, |context, case| {
        let what = format!("{} {:?}", context, case.spec);
        compare(&what, case, &case.run(context).unwrap());
    });
}

fn each_backend(spec: Spec, each: impl Fn(&Context, &Case)) {
    let on_cuda = cuda().map(|context| (context, Case::new(spec.clone().for_cuda())));
    let case = Case::new(spec);
    cpu_contexts(&[1]).iter().for_each(|context| each(context, &case));
    if let Some((context, case)) = &on_cuda {
        each(context, case);
    }
}

#[test]
fn every_head_dim_and_keep() {
    for dim in common::DIMS {
        for keep in keeps(dim) {
            check(Spec { seed: keep as u64, ..Spec::plain((4, 1), dim, keep, 70) });
        }
    }
}

#[test]
fn every_value_type_head_dim_and_keep() {
    for values in [ValueType::Bf16, ValueType::E4m3, ValueType::Int8] {
        for dim in common::DIMS {
            for keep in keeps(dim) {
                let format = uniform(values, dim, 64, keep);
                let spec =
                    Spec { seed: keep as u64, k: format, v: format, ..Spec::plain((4, 1), dim, keep, 70) };
                check(spec);
            }
        }
    }
}

#[test]
fn every_distribution_in_8_bits() {
    for values in [ValueType::E4m3, ValueType::Int8] {
        for dist in Dist::FINITE {
            let format = uniform(values, 128, 16, 39);
            let spec = Spec { dist, k: format, v: format, ..Spec::plain((6, 1), 128, 39, 500) };
            check(Spec { window: Some(vec![40]), ..spec });
        }
    }
}

#[test]
fn queries_that_are_not_finite_or_tiny_meet_8_bit_values() {
    for values in [ValueType::E4m3, ValueType::Int8] {
        let format = uniform(values, 96, 16, 31);
        for x in [f64::NAN, f64::INFINITY, 1e-35, 0.0] {
            let spec = Spec { k: format, v: format, q: DType::F32, ..Spec::plain((4, 1), 96, 31, 75) };
            each_backend(spec, |context, case| {
                let mut case = Case::new(case.spec.clone());
                let shape = case.q.shape;
                case.q.set_row(0, 0, 2, &vec![x; shape.dim]);
                compare(&format!("{context}, {values}, {x}"), &case, &case.run(context).unwrap());
            });
        }
    }
}

#[test]
fn every_group_of_query_heads() {
    for heads in HEADS {
        check(Spec { window: Some(vec![20]), ..Spec::plain(heads, 64, 19, 100) });
    }
}

#[test]
fn every_length_around_pages_and_splits() {
    for page_tokens in common::PAGE_SIZES {
        for len in lengths(page_tokens) {
            for dense in [None, Some(vec![0]), Some(vec![7])] {
                let format = uniform(ValueType::F16, 64, page_tokens, 20);
                let spec = Spec { k: format, v: format, ..Spec::plain((4, 2), 64, 20, len) };
                check(Spec { sinks: dense.clone(), window: dense, split_tokens: Some(64), ..spec });
            }
        }
    }
}

#[test]
fn every_combination_of_sections() {
    for mask in 0..8 {
        let has = |bit: usize| mask >> bit & 1 == 1;
        let mut spec = Spec::plain((4, 2), 64, 20, 90);
        spec.sinks = has(0).then(|| vec![4]);
        spec.compressed = spec.compressed.filter(|_| has(1));
        spec.window = has(2).then(|| vec![40]);
        check(spec);
    }
}

#[test]
fn k_and_v_differ_in_value_type_head_dim_and_keep() {
    for (k_dim, v_dim) in [(64, 128), (256, 64), (96, 96)] {
        for (k, v) in [
            (ValueType::F16, ValueType::Bf16),
            (ValueType::Bf16, ValueType::E4m3),
            (ValueType::Int8, ValueType::F16),
        ] {
            let (k, v) = (uniform(k, k_dim, 32, 11), uniform(v, v_dim, 32, 37));
            let spec = Spec { k, v, ..Spec::plain((6, 2), 64, 20, 77) };
            check(Spec { dense: (DType::F32, DType::Bf16), window: Some(vec![33]), ..spec });
        }
    }
}

#[test]
fn every_dtype_of_queries_outputs_and_dense_tokens() {
    let floats = [DType::F16, DType::Bf16, DType::F32];
    for (i, q) in floats.into_iter().enumerate() {
        for out in floats {
            for dense in floats {
                let dense = (dense, floats[(i + 1) % 3]);
                let spec = Spec::plain((5, 1), 96, 30, 40);
                check(Spec { q, out, dense, window: Some(vec![50]), sinks: Some(vec![3]), ..spec });
            }
        }
    }
}

#[test]
fn ragged_pages() {
    for values in common::VALUE_TYPES {
        for dim in common::DIMS {
            for page_tokens in common::PAGE_SIZES {
                let format = ragged(values, dim, page_tokens);
                check(Spec { k: format, v: format, ..Spec::plain((4, 1), dim, 8, 2 * page_tokens - 3) });
            }
        }
    }
}

#[test]
fn batches_with_unequal_everything() {
    for pages in [Pages::Table, Pages::Contiguous, Pages::PerHead] {
        for centre in [Centre::Off, Centre::Shared, Centre::PerSequence] {
            for layout in Layout::ALL {
                check(Spec {
                    queries: vec![1, 0, 3, 2],
                    sinks: Some(vec![4, 0, 2, 4]),
                    compressed: Some((vec![130, 64, 0, 17], pages)),
                    window: Some(vec![35, 1, 9, 0]),
                    shuffled_rows: true,
                    first: Some(vec![0, 5, 3, 90]),
                    centre,
                    layout,
                    split_tokens: Some(48),
                    ..Spec::plain((6, 2), 64, 20, 0)
                });
            }
        }
    }
}

#[test]
fn several_query_tokens() {
    // 1 to 40 query rows per KV head; sequences shorter than their queries see nothing at first.
    for queries in [2, 3, 8, 20] {
        for heads in [(2, 2), (4, 2), (8, 1)] {
            for len in [0, 1, 10, 150] {
                let spec =
                    Spec { queries: vec![queries], window: Some(vec![5]), ..Spec::plain(heads, 64, 20, len) };
                check(spec.clone());
                check(Spec { sliding_window: Some(7), split_tokens: Some(32), ..spec });
            }
        }
    }
}

#[test]
fn every_number_of_query_tokens_up_to_16_and_a_chunk() {
    for queries in (1..=16).chain([128]) {
        for heads in [(4, 1), (6, 2)] {
            let plain = Spec::plain(heads, 64, 20, 150);
            check(Spec {
                queries: vec![queries, queries],
                window: Some(vec![queries, 3]),
                compressed: Some((vec![150, 20], Pages::Table)),
                ..plain
            });
        }
    }
}

#[test]
fn scale_softcap_sliding_window() {
    for scale in [None, Some(0.0), Some(-0.3), Some(2.5)] {
        for softcap in [None, Some(0.5), Some(30.0)] {
            for sliding_window in [None, Some(1), Some(64), Some(65), Some(usize::MAX)] {
                let spec = Spec { scale, softcap, sliding_window, ..Spec::plain((4, 2), 64, 32, 150) };
                check(Spec { window: Some(vec![30]), ..spec });
            }
        }
    }
}

#[test]
fn every_distribution() {
    for dist in Dist::FINITE {
        check(Spec { dist, window: Some(vec![40]), ..Spec::plain((4, 1), 128, 39, 500) });
    }
}

#[test]
fn empty_and_fully_masked_rows_give_zero() {
    for spec in [
        Spec { window: Some(vec![0]), ..Spec::plain((4, 2), 64, 20, 0) },
        Spec { first: Some(vec![50]), ..Spec::plain((4, 2), 64, 20, 50) },
        Spec { first: Some(vec![usize::MAX >> 33]), ..Spec::plain((4, 2), 64, 20, 50) },
    ] {
        each_backend(spec, |context, case| {
            for (out, lse) in case.run(context).unwrap() {
                assert!(out.iter().all(|&x| x == 0.0 && x.is_sign_positive()) && lse == f64::NEG_INFINITY);
            }
        });
    }
}
