//! `merge` as a kernel, against the float64 reference.

use crate::common::{Dense, Dist, Layout, Rng, Tolerance, assert_close};
use crate::emulator::{Launch, dtype_code, floats, le, run};
use mustafar::{DType, reference};

#[test]
fn merges_two_results() {
    let mut rng = Rng::new(51);
    let (tokens, heads) = (3, 4);
    let mut launches = Vec::new();
    let mut expected = Vec::new();
    for (dim, dtypes) in
        [(64, [DType::F16, DType::F32]), (96, [DType::Bf16; 2]), (256, [DType::F32, DType::F16])]
    {
        let mut launch = Launch::new("mst_merge".to_owned(), [heads, tokens, 1], 128);
        let mut sides = Vec::new();
        for dtype in dtypes {
            let x = Dense::random(&mut rng, Dist::Normal, dtype, Layout::Gaps.shape(1, tokens, heads, dim));
            let mut lse: Vec<f32> = (0..tokens * heads).map(|_| 30.0 * rng.normal() as f32).collect();
            // No tokens on this side, in both spellings; the first result of either side is one.
            (lse[0], lse[1 + sides.len()]) = (f32::NEG_INFINITY, f32::INFINITY);
            let (values, of_lse) = (launch.buffer(&x.bytes), launch.buffer(&le(&lse, f32::to_le_bytes)));
            launch.pointer(Some(values)).pointer(Some(of_lse));
            launch.long(x.shape.token_stride).long(x.shape.head_stride).long(heads).long(1);
            launch.int(dtype_code(dtype)).int(0);
            sides.push((x, lse));
        }
        let out = launch.buffer(&vec![0xFF; 4 * tokens * heads * dim]);
        let lse = launch.buffer(&vec![0xFF; 4 * tokens * heads]);
        launch.pointer(Some(out)).pointer(Some(lse));
        launch.long(heads * dim).long(dim).long(heads).long(1).int(dtype_code(DType::F32)).int(dim);
        let one = |i: usize| {
            let side = |s: usize| (sides[s].0.row(0, i / heads, i % heads), f64::from(sides[s].1[i]));
            let (a, b) = (side(0), side(1));
            reference::merge((&a.0, a.1), (&b.0, b.1))
        };
        let results: Vec<(Vec<f64>, f64)> = (0..tokens * heads).map(one).collect();
        launches.push(launch);
        expected.push((out, lse, results));
    }
    let results = run(&launches);
    let tolerance = Tolerance::new(DType::F32, 1.0);
    for (i, (out, lse, want)) in expected.iter().enumerate() {
        let want_out: Vec<f64> = want.iter().flat_map(|(out, _)| out.clone()).collect();
        let want_lse: Vec<f64> = want.iter().map(|(_, lse)| *lse).collect();
        assert_close(&format!("case {i}: out"), &floats(results.get(i, *out)), &want_out, tolerance);
        assert_close(&format!("case {i}: lse"), &floats(results.get(i, *lse)), &want_lse, tolerance);
    }
}
