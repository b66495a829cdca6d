//! The kernels of scores, to the bit as the CPU backend computes them.

use crate::common::{DTYPES, Dense, Dist, Layout, Rng};
use crate::emulator::{Buffer, Launch, dtype_code, le, run};
use mustafar::ops::{
    self, Center, QueryWeights, StructuredWeights, TokenWeights, query_weights, structured_weights,
};
use mustafar::{Context, DType, Mem, MemMut, Stream};

/// Queries of any kind, some of them not finite.
fn queries(rng: &mut Rng, tokens: usize, heads: usize, dim: usize) -> Dense {
    let dtype = *rng.pick(&[DType::F16, DType::Bf16, DType::F32]);
    let dist = if rng.chance(0.3) { Dist::NonFinite } else { Dist::Outliers };
    let layout = *rng.pick(&Layout::ALL);
    Dense::random(rng, dist, dtype, layout.shape(1, tokens, heads, dim))
}

/// The fields of `QueriesParams`.
fn queries_params(launch: &mut Launch, q: Option<&Dense>, kv_heads: usize) {
    let Some(q) = q else {
        launch.pointer(None).long(0).long(0).int(0).int(1).int(0).int(0);
        return;
    };
    let x = launch.buffer(&q.bytes);
    launch.pointer(Some(x)).long(q.shape.token_stride).long(q.shape.head_stride);
    launch.int(q.shape.tokens).int(q.shape.heads / kv_heads).int(dtype_code(q.dtype)).int(0);
}

fn poison(launch: &mut Launch, count: usize) -> Buffer {
    launch.buffer(&vec![0xFF; 4 * count])
}

fn cpu() -> Context {
    Context::cpu(1).unwrap()
}

/// (tokens, KV heads, query heads of each, dim): one row, a full round of lanes, more.
const QUERIES: [(usize, usize, usize, usize); 5] =
    [(1, 2, 1, 64), (32, 1, 4, 96), (9, 3, 7, 128), (5, 1, 1, 256), (20, 1, 8, 64)];

#[test]
fn queries_weigh_channels() {
    let mut rng = Rng::new(71);
    let mut cases = Vec::new();
    for (tokens, kv_heads, group, dim) in QUERIES {
        let q = queries(&mut rng, tokens, kv_heads * group, dim);
        let mut launch = Launch::new("mst_query_weights".to_owned(), [dim / 16, kv_heads, 1], 512);
        queries_params(&mut launch, Some(&q), kv_heads);
        let out = poison(&mut launch, kv_heads * dim);
        launch.pointer(Some(out)).int(dim).int(0);
        let mut expected = vec![0f32; kv_heads * dim];
        let args = QueryWeights { q: q.view(), kv_heads, out: MemMut::host(&mut expected) };
        query_weights(&cpu(), Stream::NONE, args).unwrap();
        cases.push((launch, out, expected));
    }
    check(&cases);
}

#[test]
fn whole_channels_are_chosen() {
    let mut rng = Rng::new(72);
    let mut cases = Vec::new();
    for (i, (tokens, kv_heads, group, dim)) in QUERIES.into_iter().enumerate() {
        for dtype in DTYPES {
            let layout = *rng.pick(&Layout::ALL);
            let dist = *rng.pick(&[Dist::Ties, Dist::Zeros, Dist::Normal, Dist::NonFinite]);
            let parts = [(40, 9), (0, 33), (1, 0), (31, 300), (270, 2)][i];
            let parts = [parts.0, parts.1]
                .map(|n| Dense::random(&mut rng, dist, dtype, layout.shape(1, n, kv_heads, dim)));
            let q = rng.chance(0.7).then(|| queries(&mut rng, tokens, kv_heads * group, dim));
            let center: Vec<f32> = (0..kv_heads * dim).map(|_| rng.normal() as f32).collect();
            let center = rng.chance(0.5).then_some(center);
            let keep = 1 + rng.below(dim);

            let mut launch = Launch::new("mst_channel_scores".to_owned(), [dim / 16, kv_heads, 1], 512);
            for part in &parts {
                let x = launch.buffer(&part.bytes);
                launch.pointer(Some(x)).long(part.shape.token_stride).long(part.shape.head_stride);
                launch.int(part.shape.tokens).int(0);
            }
            queries_params(&mut launch, q.as_ref(), kv_heads);
            let of_center = center.as_ref().map(|c| launch.buffer(&le(c, f32::to_le_bytes)));
            let out = poison(&mut launch, kv_heads * dim);
            launch.pointer(of_center).pointer(Some(out));
            launch.int(dim).int(dtype_code(dtype)).int(keep).int(0);

            let mut expected = vec![0f32; kv_heads * dim];
            let args = StructuredWeights {
                x: &parts.each_ref().map(Dense::view),
                center: center.as_ref().map(|c| Center { values: Mem::host(c), batch: 1 }),
                q: q.as_ref().map(Dense::view),
                keep,
                out: MemMut::host(&mut expected),
            };
            structured_weights(&cpu(), Stream::NONE, args).unwrap();
            cases.push((launch, out, expected));
        }
    }
    // What the first kernel leaves is what the second one starts from.
    let launches: Vec<Launch> = cases.iter().map(|case| case.0.clone()).collect();
    let scores = run(&launches);
    for (i, (launch, out, expected)) in cases.iter_mut().enumerate() {
        let dim = 16 * launch.grid[0];
        launch.set_buffer(*out, scores.get(i, *out));
        (launch.kernel, launch.grid) = ("mst_choose_channels".to_owned(), [expected.len() / dim, 1, 1]);
        launch.block = dim;
    }
    check(&cases);
}

/// `token_weights` of everything at once, on the CPU.
struct Scene {
    q: Dense,
    lse: Dense,
    k: Dense,
    positions: [usize; 2],
    softcap: Option<f32>,
    sliding_window: Option<usize>,
}

impl Scene {
    fn case(&self) -> (Launch, Buffer, Vec<f32>) {
        let (k, lse, dim) = (&self.k, &self.lse, self.q.shape.dim);
        let (tokens, kv_heads) = (k.shape.tokens, k.shape.heads);
        let [q_position, k_position] = self.positions;
        let mut launch = Launch::new("mst_token_weights".to_owned(), [tokens.div_ceil(32), kv_heads, 1], 128);
        queries_params(&mut launch, Some(&self.q), kv_heads);
        let (of_lse, of_k) = (launch.buffer(&lse.bytes), launch.buffer(&k.bytes));
        let out = poison(&mut launch, tokens * kv_heads);
        launch.pointer(Some(of_lse)).pointer(Some(of_k)).pointer(Some(out));
        for shape in [lse.shape, k.shape] {
            launch.long(shape.token_stride).long(shape.head_stride);
        }
        launch.int(q_position).int(k_position).int(tokens).int(kv_heads).int(dim).int(dtype_code(k.dtype));
        launch.int(self.sliding_window.unwrap_or(i32::MAX as usize));
        launch.float(0.1).float(self.softcap.unwrap_or(0.0)).int(0);
        let mut expected = vec![0f32; tokens * kv_heads];
        let args = TokenWeights {
            q: self.q.view(),
            lse: lse.view(),
            q_position,
            k: k.view(),
            k_position,
            scale: Some(0.1),
            softcap: self.softcap,
            sliding_window: self.sliding_window,
            out: MemMut::host(&mut expected),
        };
        ops::token_weights(&cpu(), Stream::NONE, args).unwrap();
        (launch, out, expected)
    }
}

#[test]
fn attention_weighs_tokens() {
    let mut rng = Rng::new(73);
    let mut cases = Vec::new();
    for (i, (n, kv_heads, group, dim)) in QUERIES.into_iter().enumerate() {
        let scenes = [
            (70, [200, 50], None, None),
            (5, [52, 50], Some(3.0), None),
            (64, [70, 10], None, Some(40)),
            (1, [0, 0], None, None),
        ];
        for (tokens, positions, softcap, sliding_window) in [scenes[i % 4], scenes[(i + 1) % 4]] {
            let layout = *rng.pick(&Layout::ALL);
            let dtype = [DType::F16, DType::Bf16, DType::F32][(i + tokens) % 3];
            let q = queries(&mut rng, n, kv_heads * group, dim);
            let k = Dense::random(&mut rng, Dist::Normal, dtype, layout.shape(1, tokens, kv_heads, dim));
            let mut lse = Dense::poisoned(DType::F32, layout.shape(1, n, kv_heads * group, 1));
            for (b, t, h) in lse.indices() {
                lse.set_row(b, t, h, &[3.0 + 4.0 * rng.normal()]);
            }
            cases.push(Scene { q, lse, k, positions, softcap, sliding_window }.case());
        }
    }
    check(&cases);
}

/// Scores from -100 to 100 through exp and tanh, and beyond what they hold.
#[test]
fn exponentials_have_the_same_bits() {
    let mut rng = Rng::new(74);
    let (n, tokens, dim) = (14, 128, 64);
    let shape = |n, dim| Layout::TokensFirst.shape(1, n, 1, dim);
    let mut q = Dense::poisoned(DType::F32, shape(n, dim));
    let mut k = Dense::poisoned(DType::F32, shape(tokens, dim));
    let mut lse = Dense::poisoned(DType::F32, shape(n, 1));
    let first = |x: f64| [vec![x], vec![0.0; dim - 1]].concat();
    for (b, t, h) in q.indices() {
        // 10 times the scale of 0.1 is 1.
        q.set_row(b, t, h, &first(10.0));
        let constant = [0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 88.0, -88.0, 1e-30];
        lse.set_row(b, t, h, &[constant.get(t).copied().unwrap_or_else(|| 30.0 * rng.normal())]);
    }
    for (b, t, h) in k.indices() {
        let constant = [0.0, 1e-40, f64::INFINITY, f64::NAN, 88.0, 88.1, -87.3, -87.4, 0.3, -0.3];
        let x =
            constant.get(t).copied().unwrap_or_else(|| 200.0 * (rng.below(1 << 20) as f64 / 1048576.0 - 0.5));
        k.set_row(b, t, h, &first(x));
    }
    let mut cases = Vec::new();
    for softcap in [None, Some(50.0), Some(0.7)] {
        // One query at a time: the weight is one exponential.
        for i in 0..n {
            let (q, lse) = (one(&q, i), one(&lse, i));
            let positions = [1000, 0];
            cases.push(Scene { q, lse, k: k.clone(), positions, softcap, sliding_window: None }.case());
        }
    }
    let finite = cases.iter().flat_map(|case| &case.2).filter(|w| w.is_finite() && **w > 0.0).count();
    assert!(finite > 1000, "{finite} weights that tell something");
    check(&cases);
}

/// Token `t` alone.
fn one(x: &Dense, t: usize) -> Dense {
    let mut one = Dense::poisoned(x.dtype, Layout::TokensFirst.shape(1, 1, 1, x.shape.dim));
    one.set_row(0, 0, 0, &x.row(0, t, 0));
    one
}

fn check(cases: &[(Launch, Buffer, Vec<f32>)]) {
    let launches: Vec<Launch> = cases.iter().map(|case| case.0.clone()).collect();
    let results = run(&launches);
    for (i, (launch, out, expected)) in cases.iter().enumerate() {
        let found = results.get(i, *out);
        assert!(found == le(expected, f32::to_le_bytes), "{} of case {i}: {expected:?}", launch.kernel);
    }
}
