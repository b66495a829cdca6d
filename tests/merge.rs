//! `merge` against the float64 reference.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Dense, Dist, Layout, Rng, Tolerance, assert_close, contexts, run};
use mustafar::ops::Merge;
use mustafar::{Context, DType, reference};

const FLOATS: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];

/// Log-sum-exps that meet each other in every combination: far apart, equal, huge, and both ways to say "nothing".
const LSES: [f64; 8] = [0.0, -3.25, 60.0, 60.5, -1e30, 1e30, f64::NEG_INFINITY, f64::INFINITY];

fn lse(layout: Layout, tokens: usize, heads: usize, value: impl Fn(usize, usize) -> f64) -> Dense {
    let mut lse = Dense::poisoned(DType::F32, layout.shape(1, tokens, heads, 1));
    lse.indices().into_iter().for_each(|(b, t, h)| lse.set_row(b, t, h, &[value(t, h)]));
    lse
}

#[test]
fn every_dtype_and_pair_of_log_sum_exps() {
    let n = LSES.len();
    for (context, (i, layout)) in contexts(&[1])
        .into_iter()
        .flat_map(|c| Layout::ALL.into_iter().enumerate().map(move |l| (c.clone(), l)))
    {
        for (a_dtype, b_dtype, out_dtype) in
            FLOATS.into_iter().flat_map(|a| FLOATS.map(|b| (a, b, FLOATS[(i + b as usize) % 3])))
        {
            let mut rng = Rng::new(5);
            let dim = common::DIMS[i];
            let shape = layout.shape(1, n, n, dim);
            let mut a = Dense::random(&mut rng, Dist::Normal, a_dtype, shape);
            let mut b = Dense::random(&mut rng, Dist::Normal, b_dtype, shape);
            // A side without tokens may hold anything.
            for (_, t, h) in a.indices() {
                if LSES[t].is_infinite() {
                    a.set_row(0, t, h, &vec![f64::NAN; dim]);
                }
                if LSES[h].is_infinite() {
                    b.set_row(0, t, h, &vec![f64::NAN; dim]);
                }
            }
            let (a_lse, b_lse) = (lse(layout, n, n, |t, _| LSES[t]), lse(layout, n, n, |_, h| LSES[h]));
            let mut out = Dense::poisoned(out_dtype, shape);
            let mut merged = Dense::poisoned(DType::F32, layout.shape(1, n, n, 1));
            let args = Merge {
                a: a.view(),
                a_lse: a_lse.view(),
                b: b.view(),
                b_lse: b_lse.view(),
                out: out.view_mut(),
                lse: Some(merged.view_mut()),
            };
            run::merge(&context, args).unwrap();
            out.assert_gaps_untouched();
            merged.assert_gaps_untouched();
            for (_, t, h) in out.indices() {
                let (a, b) = (a.row(0, t, h), b.row(0, t, h));
                let lses = (a_lse.row(0, t, h)[0], b_lse.row(0, t, h)[0]);
                let (want, want_lse) = reference::merge((&a, lses.0), (&b, lses.1));
                let what = format!("{a_dtype} {b_dtype} {out_dtype} {lses:?}");
                assert_close(&what, &out.row(0, t, h), &want, Tolerance::new(out_dtype, 1.0));
                assert_close(&what, &merged.row(0, t, h), &[want_lse], Tolerance::new(DType::F32, 1.0));
            }
        }
    }
}

#[test]
fn errors_name_the_argument() {
    let context = Context::cpu(1).unwrap();
    let dense =
        |dtype, tokens, heads, dim| Dense::poisoned(dtype, Layout::TokensFirst.shape(1, tokens, heads, dim));
    let row = || dense(DType::F32, 3, 2, 64);
    let one = || dense(DType::F32, 3, 2, 1);
    let run = |a: Dense, a_lse: Dense, b: Dense, b_lse: Dense, mut out: Dense| {
        let (a, a_lse, b, b_lse) = (a.view(), a_lse.view(), b.view(), b_lse.view());
        let args = Merge { a, a_lse, b, b_lse, out: out.view_mut(), lse: None };
        let error = run::merge(&context, args).unwrap_err().to_string();
        assert!(out.is_poisoned(0, 0, 0), "wrote before refusing");
        error
    };
    for (message, expected) in [
        (
            run(row(), one(), dense(DType::F32, 2, 2, 64), one(), row()),
            "b.tokens is 2; allowed: 3 (tokens of a)",
        ),
        (
            run(row(), one(), row(), one(), dense(DType::F16, 3, 1, 64)),
            "out.heads is 1; allowed: 2 (heads of a)",
        ),
        (run(row(), dense(DType::F16, 3, 2, 1), row(), one(), row()), "a_lse.dtype is f16; supported: f32"),
        (run(row(), one(), row(), row(), row()), "b_lse.dim is 64; allowed: 1 (one value per row)"),
        (
            run(dense(DType::F32, 3, 2, 65), one(), row(), one(), row()),
            "a.dim is 65; supported: 64, 96, 128, 256",
        ),
    ] {
        assert_eq!(message, expected);
    }
}
