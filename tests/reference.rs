//! The reference against numbers worked out by hand. Its pages and masks are checked by `golden.rs`.
#![allow(clippy::unwrap_used)]

mod common;

use common::{DTYPES, Dist, Rng};
use mustafar::reference::{self as r, Scoring, Token};
use mustafar::{DType, ValueType};

fn token(k: &[f64], v: &[f64]) -> Token {
    Token { k: k.to_vec(), v: v.to_vec() }
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-12
}

/// Four tokens whose scores against q = [1] are 0, ln 2, ln 3, ln 4 and whose values are unit vectors.
fn four() -> Vec<Token> {
    let unit = |i: usize| (0..4).map(|j| f64::from(u8::from(i == j))).collect::<Vec<_>>();
    (0..4).map(|i| token(&[((i + 1) as f64).ln()], &unit(i))).collect()
}

const PLAIN: Scoring = Scoring { scale: 1.0, softcap: None, first: 0, sliding_window: None };

fn assert_weights(result: &(Vec<f64>, f64), weights: [f64; 4]) {
    let sum: f64 = weights.iter().sum();
    for (out, weight) in result.0.iter().zip(weights) {
        assert!(near(*out, weight / sum), "{result:?}, weights {weights:?}");
    }
    assert!(near(result.1, sum.ln()), "{result:?}, sum {sum}");
}

#[test]
fn softmax_of_known_scores() {
    let results = r::attend(&[vec![1.0]], &four(), 4, &PLAIN);
    assert_weights(&results[0], [1.0, 2.0, 3.0, 4.0]);
    let doubled = r::attend(&[vec![1.0]], &four(), 4, &Scoring { scale: 2.0, ..PLAIN });
    assert_weights(&doubled[0], [1.0, 4.0, 9.0, 16.0]);
}

#[test]
fn causal_to_the_bottom_right() {
    let results = r::attend(&vec![vec![1.0]; 3], &four(), 4, &PLAIN);
    assert_weights(&results[0], [1.0, 2.0, 0.0, 0.0]);
    assert_weights(&results[1], [1.0, 2.0, 3.0, 0.0]);
    assert_weights(&results[2], [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn more_queries_than_tokens() {
    let results = r::attend(&vec![vec![1.0]; 6], &four(), 4, &PLAIN);
    for result in &results[..2] {
        assert_eq!(result, &(vec![0.0; 4], f64::NEG_INFINITY));
    }
    assert_weights(&results[2], [1.0, 0.0, 0.0, 0.0]);
    assert_weights(&results[5], [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn windows_and_padding() {
    let of = |scoring: Scoring| r::attend(&vec![vec![1.0]; 2], &four(), 4, &scoring);
    let windowed = of(Scoring { sliding_window: Some(2), ..PLAIN });
    assert_weights(&windowed[0], [0.0, 2.0, 3.0, 0.0]);
    assert_weights(&windowed[1], [0.0, 0.0, 3.0, 4.0]);
    let padded = of(Scoring { first: 3, ..PLAIN });
    assert_eq!(padded[0], (vec![0.0; 4], f64::NEG_INFINITY));
    assert_weights(&padded[1], [0.0, 0.0, 0.0, 4.0]);
    let both = of(Scoring { first: 2, sliding_window: Some(3), ..PLAIN });
    assert_weights(&both[0], [0.0, 0.0, 3.0, 0.0]);
    assert_weights(&both[1], [0.0, 0.0, 3.0, 4.0]);
    for result in of(Scoring { first: 9, ..PLAIN }) {
        assert_eq!(result, (vec![0.0; 4], f64::NEG_INFINITY));
    }
}

#[test]
fn softcap_bends_the_scaled_score() {
    let tokens = [token(&[4.0], &[1.0, 0.0, 0.0, 0.0]), token(&[0.0], &[0.0, 1.0, 0.0, 0.0])];
    let scoring = Scoring { scale: 0.5, softcap: Some(3.0), ..PLAIN };
    let bent = 3.0 * (2.0f64 / 3.0).tanh();
    assert_weights(&r::attend(&[vec![1.0]], &tokens, 4, &scoring)[0], [bent.exp(), 1.0, 0.0, 0.0]);
}

#[test]
fn nothing_to_see() {
    assert_eq!(r::attend(&[vec![1.0]], &[], 3, &PLAIN), [(vec![0.0; 3], f64::NEG_INFINITY)]);
    let masked = [token(&[f64::NEG_INFINITY], &[1.0]), token(&[f64::NEG_INFINITY], &[2.0])];
    assert_eq!(r::attend(&[vec![1.0]], &masked, 1, &PLAIN), [(vec![0.0], f64::NEG_INFINITY)]);
    let nan = [token(&[f64::NEG_INFINITY], &[1.0]), token(&[f64::NAN], &[2.0])];
    assert!(r::attend(&[vec![1.0]], &nan, 1, &PLAIN)[0].0[0].is_nan());
}

#[test]
fn large_scores_do_not_overflow() {
    let tokens = [token(&[1e4], &[1.0]), token(&[1e4], &[3.0]), token(&[-1e4], &[9.0])];
    let (out, lse) = r::attend(&[vec![1.0]], &tokens, 1, &PLAIN).remove(0);
    assert!(near(out[0], 2.0) && (lse - 1e4 - 2f64.ln()).abs() < 1e-9);
}

#[test]
fn merging_halves_gives_the_whole() {
    let mut rng = Rng::new(11);
    let mut normal = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f64>>();
    let tokens: Vec<Token> = (0..9).map(|_| Token { k: normal(4), v: normal(3) }).collect();
    let q = [normal(4)];
    let whole = r::attend(&q, &tokens, 3, &PLAIN).remove(0);
    for cut in 0..=9 {
        let (a, b) = tokens.split_at(cut);
        let (a, b) = (r::attend(&q, a, 3, &PLAIN).remove(0), r::attend(&q, b, 3, &PLAIN).remove(0));
        let merged = r::merge((&a.0, a.1), (&b.0, b.1));
        assert!(near(merged.1, whole.1) && merged.0.iter().zip(&whole.0).all(|(x, y)| near(*x, *y)));
    }
}

#[test]
fn merge_ignores_sides_without_tokens() {
    let garbage = [f64::NAN, 5.0];
    for none in [f64::NEG_INFINITY, f64::INFINITY] {
        assert_eq!(r::merge((&garbage, none), (&[1.0, 2.0], 0.5)), (vec![1.0, 2.0], 0.5));
        assert_eq!(r::merge((&[1.0, 2.0], 0.5), (&garbage, none)), (vec![1.0, 2.0], 0.5));
        assert_eq!(r::merge((&garbage, none), (&garbage, none)), (vec![0.0; 2], f64::NEG_INFINITY));
    }
}

#[test]
fn spmv_is_both_halves_of_attention() {
    let keys: [&[f64]; 2] = [&[1.0, 2.0], &[-3.0, 0.5]];
    assert_eq!(r::spmv_key(&[2.0, 4.0], &keys, 0.5), [5.0, -2.0]);
    assert_eq!(r::spmv_value(&[2.0, -1.0], &keys, 2), [5.0, 3.5]);
    assert_eq!(r::spmv_value(&[], &[], 2), [0.0, 0.0]);
}

#[test]
fn selection_by_hand() {
    let f16 = |x: f32| r::round(DType::F16, x);
    let row = [1.0, -3.0, 2.0, -2.0, 0.5, 2.0].map(f16);
    let mask = |row: r::Row| row.mask.iter().map(|&kept| u8::from(kept)).collect::<Vec<_>>();
    assert_eq!(mask(r::prune_token(DType::F16, &row, 3, None)), [0, 1, 1, 1, 0, 0]);
    // abs(x) * w: 4, 3, 0, 2, 2, 0.
    let weights = [4.0, 1.0, 0.0, 1.0, 4.0, -0.0];
    assert_eq!(mask(r::prune_token(DType::F16, &row, 3, Some(&weights))), [1, 1, 0, 1, 0, 0]);
    // The third smallest magnitude is 2: all three of them stay.
    assert_eq!(mask(r::prune_reference_ties(&row, 3)), [0, 1, 1, 1, 0, 1]);
    // Infinity times zero is NaN and therefore stays, as does NaN itself.
    let special = [f16(f32::INFINITY), f16(1.0), f16(f32::NAN), f16(9.0)];
    assert_eq!(mask(r::prune_token(DType::F16, &special, 2, Some(&[0.0, 1.0, 0.0, 9.0]))), [1, 0, 1, 0]);
}

#[test]
fn centring_rounds_once_in_float32() {
    let one = r::round(DType::F16, 1.0);
    // 1 - 2^-12 lies halfway between two f16 and rounds to the even one, 1.
    assert_eq!(r::center(DType::F16, &[one], &[2f32.powi(-12)]), [one]);
    assert_eq!(r::center(DType::F16, &[0xFE01, 0x7C00], &[1.0, f32::INFINITY]), [0x7E00, 0x7E00]);
    assert_eq!(r::center(DType::Bf16, &[0xFFFF], &[1.0]), [0x7FC0]);
}

#[test]
fn e4m3_codes_by_hand() {
    let decode = |code| r::decode(ValueType::E4m3, code);
    for (code, number) in [
        (0x00, 0.0),
        (0x01, 1.0 / 512.0),
        (0x07, 7.0 / 512.0),
        (0x08, 1.0 / 64.0),
        (0x38, 1.0),
        (0x3C, 1.5),
        (0xC1, -2.25),
        (0x7E, 448.0),
        (0xFE, -448.0),
    ] {
        assert_eq!((decode(code), r::encode(ValueType::E4m3, number as f32)), (number, code));
    }
    assert!(decode(0x7F).is_nan() && decode(0xFF).is_nan());
    let encode = |q: f32| r::encode(ValueType::E4m3, q);
    // Halfway between 1 and 1.125, and between 1.125 and 1.25: the even code.
    assert_eq!((encode(1.0625), encode(1.1875)), (0x38, 0x3A));
    assert_eq!((encode(-0.0), encode(1.0 / 1024.0), encode(3.0 / 1024.0)), (0x80, 0x00, 0x02));
}

#[test]
fn rows_in_8_bits_by_hand() {
    let stored = |x: &[f32], values| {
        let bits: Vec<u16> = x.iter().map(|&x| r::round(DType::F16, x)).collect();
        let row = r::Row::new(x.iter().map(|&x| x != 9.0).collect(), &bits).stored(DType::F16, values);
        (row.scale, row.bits)
    };
    // The scale is exact where the largest magnitude is 127 or 448 times a bfloat16. 9 is dropped.
    assert_eq!(stored(&[63.5, -127.0, 9.0, 2.5], ValueType::Int8), (0x3F80, vec![64, 0x81, 0, 2]));
    assert_eq!(stored(&[-896.0, 2.0, 9.0, 0.0], ValueType::E4m3), (0x4000, vec![0xFE, 0x38, 0, 0]));
    // 1/127 = 0.00787402 lies between the bfloat16 0x3C01 and 0x3C02 and is rounded up.
    assert_eq!(stored(&[1.0], ValueType::Int8), (0x3C02, vec![126]));
    for values in [ValueType::E4m3, ValueType::Int8] {
        assert_eq!(stored(&[-0.0, 0.0], values), (0, vec![0, 0]));
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(stored(&[1.0, special, 9.0], values), (0x7FC0, vec![0, 0, 0]));
        }
    }
    let nan = r::Row { mask: vec![true, false], bits: vec![0, 0], scale: 0x7FC0 };
    assert!(nan.dense(ValueType::Int8, None).iter().all(|x| x.is_nan()));
}

/// The bounds that docs/format.md states, for rows of every size of numbers.
#[test]
fn values_in_8_bits_are_near_the_elements() {
    let mut rng = Rng::new(12);
    for dtype in DTYPES {
        for dist in Dist::FINITE {
            for _ in 0..100 {
                let bits = rng.row(dist, dtype, 64);
                let row = r::Row::new(vec![true; 64], &bits);
                let x = row.dense(common::values_of(dtype), None);
                for values in [ValueType::E4m3, ValueType::Int8] {
                    let stored = row.clone().stored(dtype, values);
                    let scale = r::value(DType::Bf16, stored.scale);
                    for (x, y) in x.iter().zip(stored.dense(values, None)) {
                        let allowed = match values {
                            ValueType::Int8 => scale / 2.0,
                            _ => (x.abs() / 16.0).max(scale / 1024.0),
                        };
                        assert!((x - y).abs() <= allowed * (1.0 + 1e-6), "{x} became {y}, scale {scale:e}");
                    }
                }
            }
        }
    }
}
