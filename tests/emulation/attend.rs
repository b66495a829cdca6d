//! `attend` and `combine` as kernels, against the float64 reference.

use crate::common::{
    DTYPES, Dense, Dist, Layout, PAGE_SIZES, Paged, Pool, Rng, Table, Tolerance, assert_close, attention,
    values_of,
};
use crate::emulator::{Buffer, Launch, dtype_code, floats, le, run, run_damaged};
use mustafar::reference::{Scoring, Token};
use mustafar::{DType, PageFormat, ValueType};

/// What a case varies.
#[derive(Debug, Clone, Copy)]
struct Setup {
    /// Of queries and dense tokens.
    dtype: DType,
    /// Of the pages.
    values: ValueType,
    dim: usize,
    /// Query rows of a kernel's tile: 4, 8 or 16.
    rows: usize,
    group: usize,
    q_len: usize,
    /// Compressed tokens of each sequence, in one item of `split` and others of about half as many.
    lens: [usize; 3],
    split: usize,
    per_head: bool,
    page_tokens: usize,
    k: Keep,
    v: Keep,
    centered: bool,
    sliding_window: Option<usize>,
    softcap: Option<f32>,
    dist: Dist,
}

/// Values of a row.
#[derive(Debug, Clone, Copy)]
enum Keep {
    Uniform(usize),
    /// In a ragged page, at most.
    Ragged(usize),
}

struct Case {
    attend: Launch,
    partial_out: Buffer,
    partial_lse: Buffer,
    items: usize,
    q_heads: usize,
    total_q: usize,
    expected: Vec<(Vec<f64>, f64)>,
}

const KV_HEADS: usize = 2;
/// Lengths and tokens of an item: none, a part of a tile, several tiles of which each warp has one at most.
const SHORT: ([usize; 3], usize) = ([0, 5, 75], 64);
/// Several tiles in a row for a warp.
const LONG: ([usize; 3], usize) = ([0, 21, 300], 288);
const SINKS: [i32; 3] = [0, 4, 3];
const WINDOW: [i32; 3] = [7, 40, 1];
/// Tokens of an item, dense ones.
const DENSE_SPLIT: usize = 32;

/// Adds an `AttendPool`; returns the bytes of a slot of the kernels for uniform pages and of those for ragged ones.
fn pool_params(launch: &mut Launch, pool: &Pool) -> [usize; 2] {
    let format = pool.layout.format;
    let value_bytes = format.value_type().bytes();
    let row_bytes = value_bytes * format.keep().unwrap_or(0);
    let apart = row_bytes >= 32 && row_bytes.is_power_of_two();
    let shared_row_bytes = row_bytes + if apart { 16 } else { 0 };
    let shift = if apart { (row_bytes / 16).ilog2() as usize } else { 31 };
    let rows = format.page_tokens().min(32);
    let most = format.keep().map_or(format.capacity().min(rows * format.head_dim()), |keep| rows * keep);
    let run_bytes = (value_bytes * most + 16 - value_bytes).next_multiple_of(16);
    let pages = launch.buffer(&pool.bytes);
    launch.pointer(Some(pages)).long(pool.layout.page_stride).long(pool.layout.head_stride);
    launch.int(row_bytes).int(format.values_offset()).int(shared_row_bytes).int(shift);
    launch.int(format.capacity()).int(run_bytes);
    let bits = 4 * format.head_dim();
    [bits + 32 * shared_row_bytes, bits + 768 + 32 / rows * run_bytes]
}

/// Adds `DenseParams`. Rows of the tensors are in reverse order.
fn dense_params(launch: &mut Launch, k: &Dense, v: &Dense, lens: &[i32]) {
    let rows: Vec<i32> = (0..lens.len() as i32).rev().collect();
    let buffers = [&k.bytes[..], &v.bytes[..], &le(lens, i32::to_le_bytes), &le(&rows, i32::to_le_bytes)];
    for bytes in buffers {
        let buffer = launch.buffer(bytes);
        launch.pointer(Some(buffer));
    }
    for x in [k, v] {
        launch.long(x.shape.batch_stride).long(x.shape.token_stride).long(x.shape.head_stride);
    }
    launch.int(dtype_code(k.dtype)).int(dtype_code(v.dtype));
}

fn case(rng: &mut Rng, s: Setup) -> Case {
    let batch = s.lens.len();
    let (q_heads, total_q) = (KV_HEADS * s.group, batch * s.q_len);
    let mut table = Table::shuffled(rng, s.page_tokens, &s.lens, 1);
    if s.per_head {
        table = table.with_head_lengths(rng, KV_HEADS);
    }
    let side = |rng: &mut Rng, keep: Keep| {
        let format = match keep {
            Keep::Uniform(keep) => PageFormat::uniform(s.values, s.dim, s.page_tokens, keep),
            // Room for a few more, so that a page does not end where its values do.
            Keep::Ragged(most) => {
                let capacity = (s.page_tokens * most + 5).min(s.page_tokens * s.dim);
                PageFormat::ragged(s.values, s.dim, s.page_tokens, capacity)
            }
        };
        let pool = Pool::gaps(format.unwrap(), table.num_pages, KV_HEADS);
        Paged::random(rng, s.dist, pool, &table)
    };
    let (k, v) = (side(rng, s.k), side(rng, s.v));
    let center: Vec<f32> = rng.floats(KV_HEADS * s.dim);
    let center_of = |h: usize| s.centered.then(|| &center[h * s.dim..][..s.dim]);
    let dense = |rng: &mut Rng, tokens: usize, dtype: DType, layout: Layout| {
        Dense::random(rng, s.dist, dtype, layout.shape(batch, tokens, KV_HEADS, s.dim))
    };
    let sinks = [dense(rng, 4, s.dtype, Layout::TokensFirst), dense(rng, 4, s.dtype, Layout::HeadsFirst)];
    let window = [dense(rng, 40, s.dtype, Layout::Gaps), dense(rng, 40, DType::F32, Layout::TokensFirst)];
    let q = Dense::random(rng, Dist::Normal, s.dtype, Layout::Gaps.shape(1, total_q, q_heads, s.dim));

    let of_head = |b: usize, h: usize| -> Vec<Token> {
        let from = |x: &[Dense; 2], t: usize| {
            let row = batch - 1 - b;
            Token { k: x[0].row(row, t, h), v: x[1].row(row, t, h) }
        };
        let compressed = (0..table.len(b, h)).map(|t| Token {
            k: k.rows[b][h][t].dense(s.values, center_of(h)),
            v: v.rows[b][h][t].dense(s.values, None),
        });
        let before = (0..SINKS[b] as usize).map(|t| from(&sinks, t));
        before.chain(compressed).chain((0..WINDOW[b] as usize).map(|t| from(&window, t))).collect()
    };
    let tokens: Vec<Vec<Vec<Token>>> =
        (0..batch).map(|b| (0..KV_HEADS).map(|h| of_head(b, h)).collect()).collect();
    let indptr: Vec<usize> = (0..=batch).map(|b| b * s.q_len).collect();
    let rule = Scoring {
        softcap: s.softcap.map(f64::from),
        sliding_window: s.sliding_window,
        ..Scoring::new(s.dim)
    };
    let expected = attention(&q, &indptr, &tokens, s.dim, &vec![rule; batch]);

    // An item of `split` tokens, the others shorter.
    let short_split = (s.split / 2).next_multiple_of(32);
    let long_items = table.max_len.min(1);
    let page_items = long_items + table.max_len.saturating_sub(s.split).div_ceil(short_split);
    let dense_items = 40_usize.div_ceil(DENSE_SPLIT);
    let items = page_items + dense_items;
    let row_tiles = (s.q_len * s.group).div_ceil(s.rows);
    let ragged = matches!(s.k, Keep::Ragged(_)) || matches!(s.v, Keep::Ragged(_));
    let scaled = s.values.is_scaled();
    let values = if scaled { s.values.to_string() } else { s.dtype.to_string() };
    let kernel = format!("mst_attend_{}{values}_d{}_r{}", if ragged { "ragged_" } else { "" }, s.dim, s.rows);
    let mut attend = Launch::new(kernel, [KV_HEADS * row_tiles, batch, items], 128);
    let slots = [pool_params(&mut attend, &k.pool), pool_params(&mut attend, &v.pool)];
    let slots: usize = slots.iter().map(|slot| slot[usize::from(ragged)]).sum();
    let scales = if scaled { 128 } else { 0 };
    attend.shared_bytes = (4 * (slots + scales) + 2 * s.dim + 16).max(16 * s.rows * (s.dim + 2));
    let entries = attend.buffer(&le(&table.entries, i32::to_le_bytes));
    let lens = attend.buffer(&le(&table.lens, i32::to_le_bytes));
    attend.pointer(Some(entries)).pointer(Some(lens)).long(table.stride);
    attend.int(usize::from(s.per_head)).int(s.page_tokens);
    dense_params(&mut attend, &sinks[0], &sinks[1], &SINKS);
    dense_params(&mut attend, &window[0], &window[1], &WINDOW);
    let q_buffer = attend.buffer(&q.bytes);
    let center = s.centered.then(|| attend.buffer(&le(&center, f32::to_le_bytes)));
    let partial_lse = attend.buffer(&vec![0xFF; 4 * total_q * q_heads * items]);
    let partial_out = attend.buffer(&vec![0xFF; 4 * total_q * q_heads * items * s.dim]);
    attend.pointer(Some(q_buffer)).pointer(None).pointer(None).pointer(center);
    attend.pointer(Some(partial_out)).pointer(Some(partial_lse));
    attend.long(q.shape.token_stride).long(q.shape.head_stride).long(0);
    attend.int(dtype_code(s.dtype)).int(s.group).int(KV_HEADS).int(s.q_len).int(row_tiles);
    attend.int(page_items).int(long_items).int(DENSE_SPLIT).int(s.split).int(short_split);
    attend.int(s.sliding_window.unwrap_or(i32::MAX as usize));
    attend.float(1.0 / (s.dim as f32).sqrt()).float(s.softcap.unwrap_or(0.0)).int(table.max_len).int(items);
    attend.int(dtype_code(s.dtype));
    Case { attend, partial_out, partial_lse, items, q_heads, total_q, expected }
}

/// Partial results and their log-sum-exps, as the first kernel leaves them.
fn partial_results(cases: &[Case]) -> Vec<[Vec<u8>; 2]> {
    let finished = run(&cases.iter().map(|case| case.attend.clone()).collect::<Vec<_>>());
    let result = |(i, case): (usize, &Case)| {
        [case.partial_out, case.partial_lse].map(|buffer| finished.get(i, buffer).to_vec())
    };
    cases.iter().enumerate().map(result).collect()
}

/// The second kernel: `combine` of what the first one left.
fn combine(case: &Case, dim: usize, partial_out: &[u8], partial_lse: &[u8]) -> (Launch, Buffer, Buffer) {
    let mut launch = Launch::new("mst_combine".to_owned(), [case.q_heads, case.total_q, 1], 256);
    let partial_out = launch.buffer(partial_out);
    let partial_lse = launch.buffer(partial_lse);
    let results = case.q_heads * case.total_q;
    let out = launch.buffer(&vec![0xFF; 4 * results * dim]);
    let lse = launch.buffer(&vec![0xFF; 4 * results]);
    launch.pointer(Some(partial_out)).pointer(Some(partial_lse)).pointer(Some(out)).pointer(Some(lse));
    launch.long(case.q_heads * dim).long(dim).long(case.q_heads).long(1);
    launch.int(case.items).int(dim).int(dtype_code(DType::F32)).int(1);
    (launch, out, lse)
}

fn check(setups: &[Setup]) {
    let mut rng = Rng::new(41);
    let cases: Vec<Case> = setups.iter().map(|s| case(&mut rng, *s)).collect();
    let partial = partial_results(&cases);
    let second: Vec<_> = cases
        .iter()
        .zip(setups)
        .zip(&partial)
        .map(|((case, s), [out, lse])| combine(case, s.dim, out, lse))
        .collect();
    let results = run(&second.iter().map(|(launch, ..)| launch.clone()).collect::<Vec<_>>());
    for (i, ((case, s), (_, out, lse))) in cases.iter().zip(setups).zip(&second).enumerate() {
        // Queries and probabilities are rounded to the value type before they meet the tensor cores.
        let unit = if s.dtype == DType::F16 { 2f64.powi(-11) } else { 2f64.powi(-8) };
        let tolerance =
            Tolerance { abs: 4.0 * unit, rel: 4.0 * unit, smallest: 0.0, cosine: 4.0 * unit * unit };
        // Infinity times a weight that float32 rounds to 0 is NaN, where float64 still has a weight.
        let same = |x: f64| if x.is_finite() || s.dist == Dist::Normal { x } else { f64::NAN };
        let found =
            |buffer: Buffer| -> Vec<f64> { floats(results.get(i, buffer)).into_iter().map(same).collect() };
        let expected: Vec<f64> = case.expected.iter().flat_map(|(out, _)| out.clone()).map(same).collect();
        assert_close(&format!("case {i}, {s:?}: out"), &found(*out), &expected, tolerance);
        let expected: Vec<f64> = case.expected.iter().map(|(_, lse)| same(*lse)).collect();
        assert_close(&format!("case {i}, {s:?}: lse"), &found(*lse), &expected, tolerance);
    }
}

#[test]
fn every_kernel() {
    let mut setups = Vec::new();
    for (i, dtype) in DTYPES.into_iter().enumerate() {
        for (j, dim) in [64, 96, 128, 256].into_iter().enumerate() {
            for (l, rows) in [4, 8, 16].into_iter().enumerate() {
                if (dim, rows) == (256, 16) {
                    continue; // there is no such kernel
                }
                let n = i + j + l;
                let (lens, split) = if n % 3 == 2 { LONG } else { SHORT };
                setups.push(Setup {
                    dtype,
                    values: values_of(dtype),
                    dim,
                    rows,
                    // Tiles that are full, that are not, and several of them.
                    group: [3, 4, 1][n % 3],
                    q_len: [1, 2, 5][(n + j) % 3],
                    lens,
                    split,
                    per_head: false,
                    page_tokens: PAGE_SIZES[n % 4],
                    k: Keep::Uniform([dim / 3, dim / 2, dim][n % 3]),
                    v: Keep::Uniform([1, dim / 2 - 1, dim / 4][(n + l) % 3]),
                    centered: n % 2 == 1,
                    sliding_window: (n % 4 == 2).then_some(50),
                    softcap: (n % 5 == 3).then_some(2.0),
                    dist: Dist::Normal,
                });
            }
        }
    }
    check(&setups);
}

fn ragged_setup(n: usize, dtype: DType, dim: usize, rows: usize) -> Setup {
    let (lens, split) = if n.is_multiple_of(2) { LONG } else { SHORT };
    let most = [dim / 2, dim, dim / 3, 1][n / 2 % 4];
    let (k, v) = match n % 3 {
        0 => (Keep::Ragged(most), Keep::Ragged(dim / 2)),
        1 => (Keep::Ragged(most), Keep::Uniform(dim / 2)),
        _ => (Keep::Uniform(dim / 3), Keep::Ragged(most)),
    };
    Setup {
        dtype,
        values: values_of(dtype),
        dim,
        rows,
        group: [3, 4, 1][n % 3],
        q_len: [1, 2, 5][n / 3 % 3],
        lens,
        split,
        per_head: n % 4 == 1,
        page_tokens: PAGE_SIZES[n % 4],
        k,
        v,
        centered: n % 5 == 1,
        sliding_window: (n % 5 == 2).then_some(50),
        softcap: None,
        dist: Dist::Normal,
    }
}

#[test]
fn every_ragged_kernel() {
    let mut setups = Vec::new();
    for dtype in DTYPES {
        for dim in [64, 96, 128, 256] {
            for rows in [4, 8, 16] {
                if (dim, rows) != (256, 16) {
                    setups.push(ragged_setup(setups.len(), dtype, dim, rows));
                }
            }
        }
    }
    check(&setups);
}

#[test]
fn every_kernel_for_8_bit_values() {
    let mut setups = Vec::new();
    for values in [ValueType::E4m3, ValueType::Int8] {
        for (j, dim) in [64, 96, 128, 256].into_iter().enumerate() {
            for (l, rows) in [4, 8, 16].into_iter().enumerate() {
                if (dim, rows) == (256, 16) {
                    continue; // there is no such kernel
                }
                let n = setups.len();
                setups.push(Setup {
                    values,
                    k: Keep::Uniform([dim / 3, dim / 2, dim, 1][(n + l) % 4]),
                    v: Keep::Uniform([1, dim / 2 - 1, dim / 4, dim][(n + j) % 4]),
                    softcap: (n % 5 == 3).then_some(2.0),
                    ..ragged_setup(n, DTYPES[n % 2], dim, rows)
                });
            }
        }
    }
    check(&setups);
}

#[test]
fn every_ragged_kernel_for_8_bit_values() {
    let mut setups = Vec::new();
    for values in [ValueType::E4m3, ValueType::Int8] {
        for dim in [64, 96, 128, 256] {
            for rows in if dim == 128 { [4, 8] } else { [8, 8] } {
                let n = setups.len();
                setups.push(Setup { values, ..ragged_setup(n, DTYPES[n % 2], dim, rows) });
            }
        }
    }
    check(&setups);
}

/// Infinities and NaN: in the channel they stand in, for the queries that see them, and nowhere else.
#[test]
fn non_finite_values_stay_in_their_channel() {
    let mut setups = Vec::new();
    for (n, dim) in [64, 96, 128, 256].into_iter().enumerate() {
        let dtype = DTYPES[n % 2];
        let few =
            Setup { lens: [1, 21, 9], split: 32, dist: Dist::NonFinite, ..ragged_setup(n, dtype, dim, 8) };
        let values = [ValueType::E4m3, ValueType::Int8][n / 2];
        setups.extend([few, Setup { values, ..few }]);
        let uniform = (Keep::Uniform(dim / 2), Keep::Uniform(dim - 1));
        let rows = [4, 8, 16, 8][n];
        let few = Setup { k: uniform.0, v: uniform.1, ..few };
        setups.push(Setup { rows, softcap: (n == 3).then_some(2.0), ..few });
        setups.push(Setup { values, rows: rows.min(8), ..few });
    }
    check(&setups);
}

#[test]
fn damaged_offsets_stay_inside() {
    let mut rng = Rng::new(42);
    let mut launches = Vec::new();
    for (n, page_tokens) in PAGE_SIZES.into_iter().enumerate() {
        let (dim, few) = ([64, 96, 128, 256][n], Keep::Ragged(3));
        let wide = Setup { page_tokens, k: few, v: few, ..ragged_setup(0, DTYPES[n % 2], dim, 8) };
        let codes = Setup { values: [ValueType::E4m3, ValueType::Int8][n % 2], ..wide };
        let launches_of = [case(&mut rng, wide).attend, case(&mut rng, codes).attend];
        // The pages of K and V, the first two buffers, say anything.
        let damaged = |launch: &Launch, buffer: usize, rng: &mut Rng| {
            let bytes: Vec<u8> = launch.contents(buffer).iter().map(|_| rng.next() as u8).collect();
            launch.with_buffer(buffer, &bytes)
        };
        for launch in launches_of {
            launches.push(damaged(&damaged(&launch, 0, &mut rng), 1, &mut rng));
        }
    }
    run_damaged(&launches);
}
