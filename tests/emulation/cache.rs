//! The kernels of a cache: `copy`, `widen` and `median`.

use crate::common::{DTYPES, Dense, Dist, Layout, Rng};
use crate::emulator::{Launch, dtype_code, floats, le, run};
use mustafar::DType;

#[test]
fn copies_runs_of_tokens() {
    let mut rng = Rng::new(61);
    let heads = 3;
    // (source row and token, destination row and token, tokens)
    let places: [[i32; 5]; 4] = [[0, 1, 2, 0, 2], [2, 0, 0, 3, 1], [1, 0, 1, 1, 0], [1, 2, 1, 2, 2]];
    let mut launches = Vec::new();
    let mut expected = Vec::new();
    for (from_layout, to_layout) in
        [(Layout::TokensFirst, Layout::TokensFirst), (Layout::HeadsFirst, Layout::Gaps)]
    {
        let side = |rng: &mut Rng, dim: usize| {
            let from = Dense::random(rng, Dist::AnyBits, DType::F16, from_layout.shape(3, 4, heads, dim));
            (from, Dense::poisoned(DType::F16, to_layout.shape(3, 5, heads, dim)))
        };
        let sides = [side(&mut rng, 64), side(&mut rng, 96)];
        let mut launch = Launch::new("mst_copy".to_owned(), [(4 * 2 * heads).div_ceil(4), 2, 1], 128);
        let mut outputs = Vec::new();
        for (from, to) in &sides {
            let (source, target) = (launch.buffer(&from.bytes), launch.buffer(&to.bytes));
            launch.pointer(Some(source)).pointer(Some(target));
            for shape in [from.shape, to.shape] {
                launch.long(shape.batch_stride).long(shape.token_stride).long(shape.head_stride);
            }
            launch.int(from.shape.dim).int(0);
            outputs.push(target);
        }
        let places_buffer = launch.buffer(&le(&places.concat(), i32::to_le_bytes));
        launch.pointer(Some(places_buffer)).int(places.len()).int(2).int(heads).int(0);
        launches.push(launch);
        for ((from, mut to), output) in sides.into_iter().zip(outputs) {
            for [from_row, from_token, to_row, to_token, tokens] in places.map(|p| p.map(|n| n as usize)) {
                for (t, h) in (0..tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                    to.set_row_bits(to_row, to_token + t, h, &from.row_bits(from_row, from_token + t, h));
                }
            }
            expected.push((launches.len() - 1, output, to));
        }
    }
    let results = run(&launches);
    for (i, output, to) in expected {
        assert!(results.get(i, output) == &to.bytes[..], "launch {i}");
    }
}

#[test]
fn widens_runs_of_tokens() {
    let mut rng = Rng::new(63);
    let heads = 3usize;
    let places: [[i32; 5]; 3] = [[0, 1, 2, 30, 2], [1, 0, 0, 3, 1], [0, 3, 1, 0, 1]];
    let mut launch = Launch::new("mst_widen".to_owned(), [(3 * 2 * heads).div_ceil(4), 2, 1], 128);
    let mut expected = Vec::new();
    for (dtype, dim, layout) in [(DType::Bf16, 96, Layout::Gaps), (DType::F32, 1, Layout::HeadsFirst)] {
        let from = Dense::random(&mut rng, Dist::Normal, dtype, layout.shape(2, 4, heads, dim));
        let mut to = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(3, 32, heads, dim));
        let (source, target) = (launch.buffer(&from.bytes), launch.buffer(&to.bytes));
        launch.pointer(Some(source)).pointer(Some(target));
        for shape in [from.shape, to.shape] {
            launch.long(shape.batch_stride).long(shape.token_stride).long(shape.head_stride);
        }
        launch.int(dim).int(dtype_code(dtype));
        for [from_row, from_token, to_row, to_token, tokens] in places.map(|p| p.map(|n| n as usize)) {
            for (t, h) in (0..tokens).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                to.set_row(to_row, to_token + t, h, &from.row(from_row, from_token + t, h));
            }
        }
        expected.push((target, to));
    }
    let places_buffer = launch.buffer(&le(&places.concat(), i32::to_le_bytes));
    launch.pointer(Some(places_buffer)).int(places.len()).int(2).int(heads).int(0);
    let results = run(&[launch]);
    for (target, to) in expected {
        assert!(results.get(0, target) == &to.bytes[..]);
    }
}

#[test]
fn median_of_each_channel() {
    let mut rng = Rng::new(62);
    let (heads, dim) = (2, 64);
    let mut launches = Vec::new();
    let mut expected = Vec::new();
    for dtype in DTYPES {
        for (n, m) in [(1, 0), (0, 2), (5, 4), (40, 33)] {
            let dist = *rng.pick(&[Dist::Normal, Dist::Ties, Dist::Zeros]);
            let parts = [(n, Layout::TokensFirst), (m, Layout::Gaps)].map(|(tokens, layout)| {
                Dense::random(&mut rng, dist, dtype, layout.shape(1, tokens, heads, dim))
            });
            let mut launch = Launch::new("mst_median".to_owned(), [dim / 32, heads, 1], 512);
            for part in &parts {
                let x = launch.buffer(&part.bytes);
                launch.pointer(Some(x)).long(part.shape.token_stride).long(part.shape.head_stride);
                launch.int(part.shape.tokens).int(0);
            }
            let out = launch.buffer(&vec![0xFF; 4 * heads * dim]);
            launch.pointer(Some(out)).int(dim).int(dtype_code(dtype));
            launches.push(launch);
            let of_channel = |h: usize, c: usize| {
                let column = parts.iter().flat_map(|p| (0..p.shape.tokens).map(move |t| p.row(0, t, h)[c]));
                let mut column: Vec<f64> = column.collect();
                column.sort_by(f64::total_cmp);
                column[(column.len() - 1) / 2]
            };
            let want: Vec<f64> = (0..heads)
                .flat_map(|h| (0..dim).map(move |c| (h, c)))
                .map(|(h, c)| of_channel(h, c))
                .collect();
            expected.push((out, want));
        }
    }
    let results = run(&launches);
    for (i, (out, want)) in expected.iter().enumerate() {
        let got = floats(results.get(i, *out));
        assert!(
            got.iter().zip(want).all(|(a, b)| a.to_bits() == b.to_bits()),
            "launch {i}: {got:?}, expected {want:?}"
        );
    }
}
