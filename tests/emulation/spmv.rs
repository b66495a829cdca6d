//! `spmv_key` and `spmv_value` as kernels, against the float64 reference.

use crate::common::{
    DIMS, Dense, Dist, Layout, PAGE_SIZES, Paged, Pool, Rng, Table, Tolerance, VALUE_TYPES, assert_close,
};
use crate::emulator::{Buffer, Launch, dtype_code, le, run};
use crate::pages::{kernel_dtype, page_params};
use mustafar::{DType, PageFormat, ValueType, reference};

const KV_HEADS: usize = 2;
const FLOATS: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];

/// Compressed tokens of a batch and the shape of the queries.
struct Case {
    table: Table,
    paged: Paged,
    group: usize,
    q_len: usize,
}

/// A launch and what it must leave. Errors are counted in the buffer that follows the result's.
struct Expected {
    launch: Launch,
    result: Buffer,
    errors: Buffer,
    expected: Dense,
    /// Of each row of the result: (sequence, query token, query head), the elements.
    rows: Vec<((usize, usize, usize), Vec<f64>)>,
}

impl Case {
    fn format(&self) -> PageFormat {
        self.paged.pool.layout.format
    }

    /// A `[batch, q_len, q_heads, dim]` tensor.
    fn shape(&self, layout: Layout, dim: usize) -> mustafar::Shape {
        layout.shape(self.table.batch(), self.q_len, KV_HEADS * self.group, dim)
    }

    /// Tokens of a KV head, dense.
    fn tokens(&self, b: usize, head: usize, center: Option<&[f32]>) -> Vec<Vec<f64>> {
        let rows = &self.paged.rows[b][head];
        rows.iter().map(|row| row.dense(self.format().value_type(), center)).collect()
    }

    fn launch(&self, op: &str, blocks: usize, warps: usize) -> Launch {
        let format = self.format();
        let name = format!("mst_spmv_{op}_{}_d{}", kernel_dtype(format), format.head_dim());
        let mut launch = Launch::new(name, [self.table.batch() * KV_HEADS * blocks, 1, 1], 32 * warps);
        page_params(&mut launch, &self.paged.pool, &self.table);
        launch
    }

    /// Adds the strides of two tensors.
    fn strides(launch: &mut Launch, tensors: [&Dense; 2]) {
        for x in tensors {
            launch.long(x.shape.batch_stride).long(x.shape.token_stride).long(x.shape.head_stride);
        }
    }

    /// Adds the sizes that both structs end with.
    fn sizes(&self, launch: &mut Launch) {
        let table = &self.table;
        launch.int(table.batch()).int(KV_HEADS).int(self.group).int(self.q_len);
        launch.int(table.max_len).int(self.paged.pool.layout.num_pages).int(self.format().capacity());
    }

    /// `centers`: for how many sequences there is one, 0 for none.
    fn key(&self, rng: &mut Rng, layout: Layout, q_dtype: DType, centers: usize) -> Expected {
        let dim = self.format().head_dim();
        let q = Dense::random(rng, Dist::Normal, q_dtype, self.shape(layout, dim));
        let center = rng.floats(centers * KV_HEADS * dim);
        let scores = Dense::poisoned(DType::F32, self.shape(layout, self.table.max_len + 1));
        let blocks = (self.q_len * self.group).div_ceil(8) * self.table.max_len.div_ceil(128);
        let mut launch = self.launch("key", blocks, 4);
        let buffers = [launch.buffer(&q.bytes), launch.buffer(&le(&center, f32::to_le_bytes))];
        let (result, errors) = (launch.buffer(&scores.bytes), launch.buffer(&[0; 4]));
        launch.pointer(Some(buffers[0])).pointer((centers > 0).then_some(buffers[1]));
        launch.pointer(Some(result)).pointer(Some(errors));
        Self::strides(&mut launch, [&q, &scores]);
        launch.int(centers.max(1)).int(dtype_code(q_dtype));
        self.sizes(&mut launch);
        launch.float(0.7);

        let row = |(b, t, h): (usize, usize, usize)| {
            let head = h / self.group;
            let at = (if centers > 1 { b } else { 0 } * KV_HEADS + head) * dim;
            let tokens = self.tokens(b, head, (centers > 0).then(|| &center[at..at + dim]));
            let keys: Vec<&[f64]> = tokens.iter().map(|k| &k[..]).collect();
            ((b, t, h), reference::spmv_key(&q.row(b, t, h), &keys, f64::from(0.7f32)))
        };
        let rows = scores.indices().into_iter().map(row).collect();
        Expected { launch, result, errors, expected: scores, rows }
    }

    fn value(&self, rng: &mut Rng, layout: Layout, out_dtype: DType) -> Expected {
        let dim = self.format().head_dim();
        // Weights past a sequence's length stay poison: they must not be read.
        let mut weights = Dense::poisoned(DType::F32, self.shape(layout, self.table.max_len + 2));
        for (b, t, h) in weights.indices() {
            let len = self.table.len(b, h / self.group);
            let mut row = vec![f64::NAN; weights.shape.dim];
            row[..len].fill_with(|| rng.uniform() / len as f64);
            weights.set_row(b, t, h, &row);
        }
        let out = Dense::poisoned(out_dtype, self.shape(layout, dim));
        let mut launch = self.launch("value", (self.q_len * self.group).div_ceil(2), 12);
        let weights_buffer = launch.buffer(&weights.bytes);
        let (result, errors) = (launch.buffer(&out.bytes), launch.buffer(&[0; 4]));
        launch.pointer(Some(weights_buffer)).pointer(Some(result)).pointer(Some(errors));
        Self::strides(&mut launch, [&weights, &out]);
        launch.int(dtype_code(out_dtype));
        self.sizes(&mut launch);

        let row = |(b, t, h): (usize, usize, usize)| {
            let tokens = self.tokens(b, h / self.group, None);
            let values: Vec<&[f64]> = tokens.iter().map(|v| &v[..]).collect();
            ((b, t, h), reference::spmv_value(&weights.row(b, t, h)[..tokens.len()], &values, dim))
        };
        let rows = out.indices().into_iter().map(row).collect();
        Expected { launch, result, errors, expected: out, rows }
    }
}

/// Poison apart from the rows, in the tolerance of the operation inside them.
fn check(cases: Vec<Expected>, scale: f64) {
    let launches: Vec<Launch> = cases.iter().map(|case| case.launch.clone()).collect();
    let results = run(&launches);
    for (i, case) in cases.into_iter().enumerate() {
        let what = format!("case {i}, {}", case.launch.kernel);
        let mut got = case.expected;
        got.bytes.copy_from_slice(results.get(i, case.result));
        got.assert_gaps_untouched();
        for ((b, t, h), want) in &case.rows {
            let row = got.row(*b, *t, *h);
            let what = format!("{what}, b {b} t {t} h {h}");
            assert_close(&what, &row[..want.len()], want, Tolerance::new(got.dtype, scale));
            assert!(row[want.len()..].iter().all(|x| x.is_nan()), "{what}: wrote past the length");
        }
        assert_eq!(results.get(i, case.errors), [0; 4], "{what}: errors counted");
    }
}

/// One case per format; sizes and options take turns. `shapes` are (group, query tokens).
fn cases(rng: &mut Rng, shapes: [(usize, usize); 3]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, values) in VALUE_TYPES.into_iter().enumerate() {
        for (j, dim) in DIMS.into_iter().enumerate() {
            for (k, keep) in [Some(1), Some(dim / 3), Some(dim), None, None].into_iter().enumerate() {
                let page_tokens = PAGE_SIZES[(i + j + k) % 4];
                let format = match keep {
                    Some(keep) => PageFormat::uniform(values, dim, page_tokens, keep).unwrap(),
                    None => PageFormat::ragged(values, dim, page_tokens, page_tokens * dim / 2).unwrap(),
                };
                let mut table = Table::shuffled(rng, page_tokens, &[page_tokens + 19, 0, 15], 1);
                if k % 2 == 1 {
                    table = table.with_head_lengths(rng, KV_HEADS);
                } else if k == 2 {
                    table.num_pages = table.entries.len();
                    table.entries = (0..table.num_pages as i32).collect();
                }
                let pool = Pool::gaps(format, table.num_pages, KV_HEADS);
                let paged = Paged::random(rng, Dist::Normal, pool, &table);
                let (group, q_len) = shapes[(j + k) % 3];
                cases.push(Case { table, paged, group, q_len });
            }
        }
    }
    cases
}

#[test]
fn key_every_format() {
    let mut rng = Rng::new(51);
    // Rows of a tile, 8 at most, and of two.
    let cases = cases(&mut rng, [(1, 1), (3, 3), (4, 2)]);
    let of = |(i, case): (usize, &Case)| {
        case.key(&mut rng, Layout::ALL[i % 3], FLOATS[i / 3 % 3], [0, 1, 3][i % 3])
    };
    check(cases.iter().enumerate().map(of).collect(), 4.0);
}

#[test]
fn value_every_format() {
    let mut rng = Rng::new(52);
    let cases = cases(&mut rng, [(1, 1), (3, 1), (1, 2)]);
    let of = |(i, case): (usize, &Case)| case.value(&mut rng, Layout::ALL[i % 3], FLOATS[i / 3 % 3]);
    check(cases.iter().enumerate().map(of).collect(), 1.0);
}

#[test]
fn damage_stays_inside() {
    let mut rng = Rng::new(53);
    let mut launches = Vec::new();
    let mut bases = Vec::new();
    for ragged in [false, true] {
        let format = match ragged {
            false => PageFormat::uniform(ValueType::F16, 64, 16, 20).unwrap(),
            true => PageFormat::ragged(ValueType::F16, 64, 16, 16 * 32).unwrap(),
        };
        let table = Table::shuffled(&mut rng, 16, &[32, 20], 1);
        let pool = Pool::contiguous(format, table.num_pages, KV_HEADS);
        let paged = Paged::random(&mut rng, Dist::Normal, pool, &table);
        // Several tiles of query rows, of which one counts errors.
        let mut case = Case { table, paged, group: 3, q_len: 3 };
        let key = case.key(&mut rng, Layout::TokensFirst, DType::F16, 0);
        case.q_len = 1;
        let value = case.value(&mut rng, Layout::TokensFirst, DType::F32);
        for base in [key, value] {
            // Bitmaps and offsets of the last page say anything; then page numbers and lengths are out of range.
            let mut pool = case.paged.pool.clone();
            let page = pool.page_mut(case.table.page(0, 16), 1);
            page[..format.values_offset()].iter_mut().for_each(|b| *b = rng.next() as u8);
            launches.push(base.launch.with_buffer(0, &pool.bytes));
            let entries = vec![case.table.num_pages as i32; case.table.entries.len()];
            launches.push(base.launch.with_buffer(1, &le(&entries, i32::to_le_bytes)));
            launches.push(base.launch.with_buffer(2, &le(&[i32::MIN, 1000], i32::to_le_bytes)));
            bases.push(base);
        }
    }
    let results = run(&launches);
    for (i, base) in bases.iter().enumerate() {
        let count = |launch| u32::from_le_bytes(results.get(launch, base.errors).try_into().unwrap());
        // Rows of one page; two pages of each sequence and head; the length of each sequence and head.
        assert!((1..=16).contains(&count(3 * i)));
        assert_eq!([count(3 * i + 1), count(3 * i + 2)], [8, 4]);
        // No scores, and sums of nothing.
        let nothing = if i % 2 == 0 { 0xFF } else { 0 };
        for launch in [3 * i + 1, 3 * i + 2] {
            assert!(results.get(launch, base.result).iter().all(|&b| b == nothing));
        }
    }
}
