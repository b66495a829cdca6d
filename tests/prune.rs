//! `prune` against the reference.
#![allow(clippy::panic, clippy::unwrap_used)]

mod common;

use common::{
    Bytes, CHANNEL_GROUPS, DIMS, DTYPES, Dense, Dist, Layout, Rng, contexts, foreign_stream, keeps, run,
};
use mustafar::ops::{Prune, Selection, prune};
use mustafar::reference::{self, Row};
use mustafar::{Context, DType, Mem, MemMut};
use proptest::prelude::*;

fn run(
    context: &Context,
    x: &mut Dense,
    selection: Selection,
    weights: Option<&Vec<f32>>,
    mask: Option<&mut Bytes>,
) -> mustafar::Result<()> {
    // Of channels in token direction, of tokens in channel direction.
    let (weights, token_weights) = match selection {
        Selection::Channel { .. } => (None, common::mem(weights)),
        _ => (common::mem(weights), None),
    };
    let mask = mask.map(|mask| MemMut::host(&mut mask[..]));
    run::prune(context, Prune { x: x.view_mut(), selection, weights, token_weights, mask })
}

/// What the reference makes of every row, in the order of `x.indices()`.
fn expected(x: &Dense, selection: Selection, weights: Option<&Vec<f32>>) -> Vec<Row> {
    let dim = x.shape.dim;
    let weights_of_tokens = weights;
    let row = |(b, t, h)| x.row_bits(b, t, h);
    let indices = x.indices();
    match selection {
        Selection::Token { keep } => {
            let weights = |h: usize| weights.map(|w| &w[h * dim..][..dim]);
            let one = |&(b, t, h): &_| reference::prune_token(x.dtype, &row((b, t, h)), keep, weights(h));
            indices.iter().map(one).collect()
        }
        Selection::TokenReferenceTies { dropped } => {
            indices.iter().map(|i| reference::prune_reference_ties(&row(*i), dropped)).collect()
        }
        Selection::Channel { keep } => {
            // Groups of 32 consecutive tokens, one reference call each.
            let group = |b: usize, first: usize, h: usize| -> Vec<Row> {
                let rows: Vec<Vec<u16>> = (first..first + 32).map(|t| row((b, t, h))).collect();
                let weight = |w: &Vec<f32>| -> Vec<f32> {
                    let at = |t: usize| (b * x.shape.tokens + first + t) * x.shape.heads + h;
                    (0..32).map(|t| w[at(t)]).collect()
                };
                reference::prune_channel(x.dtype, &rows, keep, weights_of_tokens.map(weight).as_deref())
            };
            let mut groups = std::collections::HashMap::new();
            let one = |&(b, t, h): &(usize, usize, usize)| {
                let first = t / 32 * 32;
                groups.entry((b, first, h)).or_insert_with(|| group(b, first, h))[t - first].clone()
            };
            indices.iter().map(one).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn check(x: &Dense, selection: Selection, weights: Option<&Vec<f32>>) {
    let expected = expected(x, selection, weights);
    let mask_bytes = expected.len() * x.shape.dim / 8;
    let bitmap = |row: &Row| -> Vec<u8> {
        row.mask
            .chunks(8)
            .map(|bits| bits.iter().rev().fold(0, |byte, bit| byte << 1 | u8::from(*bit)))
            .collect()
    };
    let expected_mask: Vec<u8> = expected.iter().flat_map(bitmap).collect();
    for context in contexts(&[1, 3]) {
        let mut mask = Bytes::poisoned(mask_bytes + 5);
        for with_mask in [true, false] {
            let mut out = x.clone();
            run(&context, &mut out, selection, weights, with_mask.then_some(&mut mask)).unwrap();
            out.assert_gaps_untouched();
            for ((b, t, h), row) in out.indices().into_iter().zip(&expected) {
                assert_eq!(out.row_bits(b, t, h), row.bits, "{context} {selection:?} row {b} {t} {h}");
            }
        }
        assert!(mask[..mask_bytes] == expected_mask[..], "{context} {selection:?}: mask");
        assert_eq!(mask[mask_bytes..], [0xff; 5], "written past the mask");
    }
}

#[test]
fn every_dimension_keep_and_distribution() {
    let mut rng = Rng::new(1);
    for dtype in DTYPES {
        for dim in DIMS {
            for dist in Dist::ALL {
                let layout = *rng.pick(&Layout::ALL);
                let x = Dense::random(&mut rng, dist, dtype, layout.shape(1, 3, 2, dim));
                let weights = (0..2 * dim).map(|_| rng.normal().abs() as f32).collect();
                for keep in keeps(dim) {
                    check(&x, Selection::Token { keep }, None);
                    check(&x, Selection::Token { keep }, Some(&weights));
                    check(&x, Selection::TokenReferenceTies { dropped: keep }, None);
                }
            }
        }
    }
}

#[test]
fn channel_direction() {
    let mut rng = Rng::new(2);
    for dim in DIMS {
        for dist in Dist::ALL {
            for groups in CHANNEL_GROUPS {
                let (dtype, layout) = (*rng.pick(&DTYPES), *rng.pick(&Layout::ALL));
                let x = Dense::random(&mut rng, dist, dtype, layout.shape(1, 32 * groups, 1, dim));
                let weight = |rng: &mut Rng| *rng.pick(&[0.0, 1e-38, 0.3, 1.0, 1.0, 7.5, f32::INFINITY]);
                let weights = (0..32 * groups).map(|_| weight(&mut rng)).collect();
                for keep in [1, 10, 16, 31, 32] {
                    check(&x, Selection::Channel { keep }, None);
                    check(&x, Selection::Channel { keep }, Some(&weights));
                }
            }
        }
    }
}

#[test]
fn enough_work_for_threads() {
    let mut rng = Rng::new(3);
    let x = Dense::random(&mut rng, Dist::Outliers, DType::Bf16, Layout::Gaps.shape(3, 320, 3, 128));
    check(&x, Selection::Token { keep: 39 }, None);
    check(&x, Selection::Channel { keep: 10 }, None);
    let weights = (0..3 * 320 * 3).map(|_| rng.normal().abs() as f32).collect();
    check(&x, Selection::Channel { keep: 10 }, Some(&weights));
}

#[test]
fn weights_of_zero_and_infinity() {
    // Scores: 0 * finite = 0; inf * 0 = NaN, which ranks above inf; -0 is 0; ties to the lower channel.
    let mut x = Dense::poisoned(DType::F16, Layout::TokensFirst.shape(1, 1, 1, 64));
    let mut row = [0x3c00; 64];
    (row[5], row[6], row[7], row[8]) = (0x8000, 0x7c00, 0xbc00, 0x4000);
    x.set_row_bits(0, 0, 0, &row);
    let mut weights = vec![0.0; 64];
    (weights[5], weights[6], weights[7], weights[8], weights[63]) =
        (f32::INFINITY, 0.0, -0.0, 1.0, f32::INFINITY);
    // NaN: 5 (0 * inf), 6 (inf * 0). inf: 63. 2: 8. The rest is 0.
    for (keep, kept) in [
        (1, vec![5]),
        (2, vec![5, 6]),
        (3, vec![5, 6, 63]),
        (4, vec![5, 6, 8, 63]),
        (5, vec![0, 5, 6, 8, 63]),
    ] {
        for context in contexts(&[1, 3]) {
            let (mut out, mut mask) = (x.clone(), Bytes::poisoned(8));
            run(&context, &mut out, Selection::Token { keep }, Some(&weights), Some(&mut mask)).unwrap();
            let bits = u64::from_le_bytes(mask[..].try_into().unwrap());
            assert_eq!((0..64).filter(|c| bits >> c & 1 == 1).collect::<Vec<_>>(), kept, "{context}");
        }
    }
    check(&x, Selection::Token { keep: 6 }, Some(&weights));
}

#[test]
fn reference_ties_keep_all_ties() {
    // Sixteen zeros, sixteen ones, thirty-two twos: the 20th smallest magnitude is 1.
    let mut x = Dense::poisoned(DType::F16, Layout::TokensFirst.shape(1, 1, 1, 64));
    let row: Vec<u16> = (0..64).map(|c| [0, 0x3c00, 0x4000, 0xc000][c % 4]).collect();
    x.set_row_bits(0, 0, 0, &row);
    let mut out = x.clone();
    run(&Context::cpu(1).unwrap(), &mut out, Selection::TokenReferenceTies { dropped: 20 }, None, None)
        .unwrap();
    assert_eq!(out.row_bits(0, 0, 0), row);
    let mut out = x.clone();
    run(&Context::cpu(1).unwrap(), &mut out, Selection::TokenReferenceTies { dropped: 33 }, None, None)
        .unwrap();
    let twos: Vec<u16> = row.iter().map(|x| if x & 0x7fff == 0x4000 { *x } else { 0 }).collect();
    assert_eq!(out.row_bits(0, 0, 0), twos);
}

/// Runs a call that must fail with `expected` and write nothing.
#[track_caller]
fn refused(x: &Dense, selection: Selection, weights: Option<&Vec<f32>>, mask_bytes: usize, expected: &str) {
    let (mut out, mut mask) = (x.clone(), Bytes::poisoned(mask_bytes));
    let context = Context::cpu(1).unwrap();
    let error = run(&context, &mut out, selection, weights, Some(&mut mask)).unwrap_err();
    assert_eq!(error.to_string(), expected);
    assert!(out.bytes[..] == x.bytes[..] && mask.iter().all(|b| *b == 0xff), "written");
}

#[test]
fn bad_arguments() {
    let new = |dtype, tokens, dim| Dense::poisoned(dtype, Layout::TokensFirst.shape(1, tokens, 2, dim));
    let x = new(DType::F16, 32, 64);
    let (token, ties, channel) = (
        |keep| Selection::Token { keep },
        |dropped| Selection::TokenReferenceTies { dropped },
        |keep| Selection::Channel { keep },
    );
    refused(&new(DType::F32, 32, 64), token(1), None, 512, "x.dtype is f32; supported: f16, bf16");
    refused(&new(DType::F16, 32, 80), token(1), None, 640, "x.dim is 80; supported: 64, 96, 128, 256");
    refused(&new(DType::F16, 32, 0), token(1), None, 0, "x.dim is 0; supported: 64, 96, 128, 256");
    for keep in [0, 65, usize::MAX] {
        refused(&x, token(keep), None, 512, &format!("selection.keep is {keep}; allowed: 1 to 64 (x.dim)"));
        let message = format!("selection.dropped is {keep}; allowed: 1 to 64 (x.dim)");
        refused(&x, ties(keep), None, 512, &message);
    }
    for keep in [0, 33] {
        let message = format!("selection.keep is {keep}; allowed: 1 to 32 (tokens of a group)");
        refused(&x, channel(keep), None, 512, &message);
    }
    let message = "x.tokens is 33; allowed: a multiple of 32 in channel direction";
    refused(&new(DType::F16, 33, 64), channel(1), None, 528, message);
    let weights = vec![1.0; 128];
    let message = "weights is given; allowed: absent for channel direction and reference ties";
    refused(&x, ties(1), Some(&weights), 512, message);
    let both = |selection, weights, token_weights| {
        let mut x = x.clone();
        let args = Prune { x: x.view_mut(), selection, weights, token_weights, mask: None };
        run::prune(&Context::cpu(1).unwrap(), args).unwrap_err().to_string()
    };
    assert_eq!(both(channel(1), Some(Mem::host(&weights)), None), message);
    let message = "token_weights is given; allowed: absent for token direction";
    assert_eq!(both(token(1), None, Some(Mem::host(&weights))), message);
    let mut negative = weights.clone();
    negative[64] = -0.5;
    let message = "weights is -0.5 at head 1, channel 0; allowed: values of at least 0";
    refused(&x, token(1), Some(&negative), 512, message);
    refused(&x, token(1), Some(&vec![1.0; 100]), 512, "weights has 400 bytes; needed: 512");
    refused(&x, token(1), None, 511, "mask has 511 bytes; needed: 512");
    let error = {
        let mut x = x.clone();
        let args = Prune {
            x: x.view_mut(),
            selection: token(1),
            weights: Some(Mem::host(&weights)),
            token_weights: None,
            mask: None,
        };
        prune(&Context::cpu(1).unwrap(), foreign_stream(), args).unwrap_err()
    };
    assert_eq!(error.to_string(), "stream is 0x1; allowed: null on the CPU backend");
}

#[test]
fn rows_that_overlap_are_refused() {
    // Not when the tensor is made, but through its public shape afterwards.
    let mut x = Dense::poisoned(DType::F16, Layout::TokensFirst.shape(1, 32, 2, 64));
    let mut view = x.view_mut();
    view.shape.token_stride = 64;
    let args = Prune {
        x: view,
        selection: Selection::Token { keep: 1 },
        weights: None,
        token_weights: None,
        mask: None,
    };
    let error = run::prune(&Context::cpu(1).unwrap(), args).unwrap_err();
    let message = "x is strided 4096/64/64; allowed: strides under which no two rows overlap";
    assert_eq!(error.to_string(), message);
    assert!(x.bytes.iter().all(|b| *b == 0xff), "written");
}

#[test]
fn nothing_to_do() {
    for shape in [
        Layout::TokensFirst.shape(0, 32, 2, 64),
        Layout::TokensFirst.shape(2, 0, 2, 64),
        Layout::TokensFirst.shape(1, 32, 0, 64),
    ] {
        let x = Dense::poisoned(DType::F16, shape);
        check(&x, Selection::Token { keep: 1 }, None);
        check(&x, Selection::Channel { keep: 1 }, None);
    }
    // No elements, however many tokens.
    let mut x = Dense::poisoned(DType::F16, Layout::TokensFirst.shape(1, 32, 0, 64));
    x.shape.tokens = usize::MAX;
    run(&Context::cpu(1).unwrap(), &mut x, Selection::Token { keep: 1 }, None, None).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_call_equals_the_reference(
        seed: u64,
        dim in 0..4usize,
        batch in 1..3usize,
        groups in 1..3usize,
        cut in 0..32usize,
        heads in 1..4usize,
        dist in 0..6usize,
        layout in 0..3usize,
        direction in 0..4usize,
    ) {
        let mut rng = Rng::new(seed);
        let (dtype, dim) = (*rng.pick(&DTYPES), DIMS[dim]);
        let keep = rng.below(dim) + 1;
        let (selection, tokens) = match direction {
            0 | 1 => (Selection::Token { keep }, 32 * groups - cut),
            2 => (Selection::TokenReferenceTies { dropped: keep }, 32 * groups - cut),
            _ => (Selection::Channel { keep: rng.below(32) + 1 }, 32 * groups),
        };
        let x = Dense::random(&mut rng, Dist::ALL[dist], dtype, Layout::ALL[layout].shape(batch, tokens, heads, dim));
        let weights: Vec<f32> = (0..heads * dim).map(|_| rng.below(5) as f32 * 0.25).collect();
        check(&x, selection, (direction == 1).then_some(&weights));
    }
}
