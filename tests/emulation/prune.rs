//! `prune` as a kernel, against the reference: elements and masks.

use crate::common::{DIMS, DTYPES, Dense, Dist, Layout, Rng};
use crate::emulator::{Buffer, Launch, le, run};
use mustafar::reference::{self, Row};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Selection {
    Token(usize),
    /// The k of kthvalue.
    ReferenceTies(usize),
    Channel(usize),
}

struct Case {
    launch: Launch,
    x: (Buffer, Dense),
    mask: Option<(Buffer, Vec<u8>)>,
}

/// What `x` and the mask must become. Rows of the mask are `[batch, tokens, heads]`.
fn expect(x: &Dense, selection: Selection, weights: Option<&Vec<f32>>) -> (Dense, Vec<u8>) {
    let (dtype, dim, heads) = (x.dtype, x.shape.dim, x.shape.heads);
    let mut out = x.clone();
    let mut mask = vec![0; x.shape.batch * x.shape.tokens * heads * dim / 8];
    let mut put = |(b, t, h): (usize, usize, usize), row: &Row| {
        out.set_row_bits(b, t, h, &row.bits);
        let first = ((b * x.shape.tokens + t) * heads + h) * dim / 8;
        for c in (0..dim).filter(|&c| row.mask[c]) {
            mask[first + c / 8] |= 1 << (c % 8);
        }
    };
    let all_weights = weights;
    for (b, t, h) in x.indices() {
        let weights =
            weights.filter(|_| !matches!(selection, Selection::Channel(_))).map(|w| &w[h * dim..][..dim]);
        match selection {
            Selection::Token(keep) => {
                put((b, t, h), &reference::prune_token(dtype, &x.row_bits(b, t, h), keep, weights));
            }
            Selection::ReferenceTies(dropped) => {
                put((b, t, h), &reference::prune_reference_ties(&x.row_bits(b, t, h), dropped));
            }
            Selection::Channel(keep) if t % 32 == 0 => {
                let group: Vec<_> = (t..t + 32).map(|t| x.row_bits(b, t, h)).collect();
                let at = |t: usize| (b * x.shape.tokens + t) * heads + h;
                let weights: Option<Vec<f32>> = all_weights.map(|w| (t..t + 32).map(|t| w[at(t)]).collect());
                for (i, row) in
                    reference::prune_channel(dtype, &group, keep, weights.as_deref()).iter().enumerate()
                {
                    put((b, t + i, h), row);
                }
            }
            Selection::Channel(_) => {}
        }
    }
    (out, mask)
}

/// `mask_offset`: bytes into its buffer at which the mask starts; `None`: no mask.
fn case(x: &Dense, selection: Selection, weights: Option<&Vec<f32>>, mask_offset: Option<usize>) -> Case {
    let shape = x.shape;
    let (kind, units, keep, all_ties) = match selection {
        Selection::Token(keep) => ("token", shape.tokens.div_ceil(16), keep, 0),
        Selection::ReferenceTies(dropped) => ("token", shape.tokens.div_ceil(16), shape.dim - dropped + 1, 1),
        Selection::Channel(keep) => ("channel", shape.tokens / 32 * shape.dim.div_ceil(64), keep, 0),
    };
    let name = format!("mst_prune_{kind}_{}_d{}", x.dtype, shape.dim);
    let units = shape.batch * shape.heads * units;
    let mut launch = Launch::new(name, [units.div_ceil(4), 1, 1], 128);
    let (expected, mask) = expect(x, selection, weights);
    let x_buffer = launch.buffer(&x.bytes);
    let weights = weights.map(|w| launch.buffer(&le(w, f32::to_le_bytes)));
    let offset = mask_offset.unwrap_or(0);
    let mask_buffer = mask_offset.map(|offset| launch.buffer(&vec![0xFF; offset + mask.len()]));
    launch.pointer(Some(x_buffer)).pointer(weights).pointer_at(mask_buffer, offset);
    launch.long(shape.batch_stride).long(shape.token_stride).long(shape.head_stride);
    launch.int(shape.batch).int(shape.tokens).int(shape.heads).int(keep).int(all_ties).int(0);
    let mask = mask_buffer.map(|buffer| (buffer, [vec![0xFF; offset], mask].concat()));
    Case { launch, x: (x_buffer, expected), mask }
}

fn check(cases: &[Case]) {
    let launches: Vec<Launch> = cases.iter().map(|case| case.launch.clone()).collect();
    let results = run(&launches);
    for (i, case) in cases.iter().enumerate() {
        let what = format!("case {i}, {}", case.launch.kernel);
        let (buffer, expected) = &case.x;
        assert!(results.get(i, *buffer) == &expected.bytes[..], "{what}: elements");
        if let Some((buffer, expected)) = &case.mask {
            assert!(results.get(i, *buffer) == expected, "{what}: mask");
        }
    }
}

#[test]
fn every_selection() {
    let mut rng = Rng::new(11);
    let mut cases = Vec::new();
    let selections = |dim: usize| {
        let token = [1, dim / 3, dim - 1, dim].map(Selection::Token);
        let ties = [1, dim / 2, dim].map(Selection::ReferenceTies);
        let channel = [1, 10, 16, 32].map(Selection::Channel);
        [&token[..], &ties, &channel].concat()
    };
    for dtype in DTYPES {
        for dim in DIMS {
            for (i, selection) in selections(dim).into_iter().enumerate() {
                let tokens = if matches!(selection, Selection::Channel(_)) { 64 } else { 17 };
                let dist = Dist::ALL[(i + dim / 32) % Dist::ALL.len()];
                let shape = Layout::ALL[i % 3].shape(2, tokens, 1 + i % 2, dim);
                let x = Dense::random(&mut rng, dist, dtype, shape);
                // No mask, a mask of whole words, one that starts at an odd byte.
                let mask_offset = [None, Some(0), Some(1)][(i + 1) % 3];
                cases.push(case(&x, selection, None, mask_offset));
            }
        }
    }
    check(&cases);
}

#[test]
fn weights_rank_products() {
    let mut rng = Rng::new(12);
    let mut cases = Vec::new();
    for dtype in DTYPES {
        for dim in DIMS {
            for dist in [Dist::AnyBits, Dist::Subnormal, Dist::Ties] {
                let x = Dense::random(&mut rng, dist, dtype, Layout::Gaps.shape(1, 18, 2, dim));
                let weight = |rng: &mut Rng| *rng.pick(&[0.0, 1e-38, 0.5, 1.0, 1.0, 3e38, f32::INFINITY]);
                let weights: Vec<f32> = (0..2 * dim).map(|_| weight(&mut rng)).collect();
                cases.push(case(&x, Selection::Token(dim * 2 / 5), Some(&weights), Some(0)));
                // Of tokens.
                let x = Dense::random(&mut rng, dist, dtype, Layout::Gaps.shape(2, 64, 2, dim));
                let weights: Vec<f32> = (0..2 * 64 * 2).map(|_| weight(&mut rng)).collect();
                cases.push(case(&x, Selection::Channel(10), Some(&weights), Some(0)));
            }
        }
    }
    check(&cases);
}
