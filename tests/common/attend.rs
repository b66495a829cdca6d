//! A whole decode step with everything `attend` takes: sinks, pages and window, and what must come out.

use super::{Dense, Dist, Layout, Paged, Pool, Rng, Table, Tolerance, assert_close};
use mustafar::ops::{self, Attend, Center, Compressed};
use mustafar::reference::{self, Scoring, Token};
use mustafar::{Context, DType, Mem, MemMut, PageFormat, Stream, ValueType};

/// What is tested; `Default` is a small plain case.
#[derive(Debug, Clone)]
pub struct Step {
    pub seed: u64,
    pub k: PageFormat,
    pub v: PageFormat,
    pub q_heads: usize,
    pub kv_heads: usize,
    /// Compressed tokens of each sequence.
    pub lens: Vec<usize>,
    /// Dense tokens before and after; the tensors are absent when this is.
    pub sinks: Option<usize>,
    pub window: Option<usize>,
    /// Query tokens of each sequence: the same for all, or any number.
    pub q_len: usize,
    pub uneven_q: bool,
    pub head_lens: bool,
    pub padded: bool,
    /// 0: no centre, 1: one for all, 2: one per sequence.
    pub centers: usize,
    pub scale: Option<f32>,
    pub softcap: Option<f32>,
    pub sliding_window: Option<usize>,
    pub split_tokens: Option<usize>,
    pub q_dtype: DType,
    pub dense_dtype: DType,
    pub out_dtype: DType,
    pub layout: Layout,
    pub dist: Dist,
    /// Queries and dense tokens that any of the types can hold.
    pub coarse: bool,
}

impl Step {
    /// The nearest step that CUDA kernels serve, and whose inputs they do not round.
    pub fn for_cuda(self) -> Self {
        let (page_tokens, dim) = (self.k.page_tokens(), self.k.head_dim());
        let values = self.k.value_type();
        let dtype = values.dtype().unwrap_or(DType::F16);
        let like_k = |format: PageFormat| match format.keep() {
            Some(keep) => PageFormat::uniform(values, dim, page_tokens, keep.min(dim)),
            None => PageFormat::ragged(values, dim, page_tokens, format.capacity().min(dim * page_tokens)),
        };
        let [k, v] = [self.k, self.v].map(|format| like_k(format).unwrap());
        let narrow = |found: DType| if found == DType::F32 { dtype } else { found };
        let q_dtype = if self.dense_dtype == DType::F32 { narrow(self.q_dtype) } else { self.q_dtype };
        Self { k, v, q_dtype, coarse: true, ..self }
    }
}

/// The step on every backend: on the CPU at every instruction level, and its nearest relative on the GPU.
pub fn scenes(step: &Step, mut each: impl FnMut(&Context, &Scene)) {
    let scene = Scene::new(step.clone());
    super::cpu_contexts(&[1]).iter().for_each(|context| each(context, &scene));
    if let Some(context) = super::device::cuda() {
        each(context, &Scene::new(step.clone().for_cuda()));
    }
}

impl Default for Step {
    fn default() -> Self {
        Self {
            seed: 1,
            k: PageFormat::uniform(ValueType::F16, 128, 64, 39).unwrap(),
            v: PageFormat::uniform(ValueType::F16, 128, 64, 39).unwrap(),
            q_heads: 8,
            kv_heads: 2,
            lens: vec![100, 64],
            sinks: Some(4),
            window: Some(40),
            q_len: 1,
            uneven_q: false,
            head_lens: false,
            padded: false,
            centers: 0,
            scale: None,
            softcap: None,
            sliding_window: None,
            split_tokens: None,
            q_dtype: DType::F32,
            dense_dtype: DType::F16,
            out_dtype: DType::F32,
            layout: Layout::TokensFirst,
            dist: Dist::Normal,
            coarse: false,
        }
    }
}

/// Dense tokens: more rows than sequences, in another order, poison past each length.
#[derive(Debug)]
struct DenseSide {
    k: Dense,
    v: Dense,
    lens: Vec<i32>,
    rows: Vec<i32>,
}

impl DenseSide {
    fn new(rng: &mut Rng, step: &Step, most: usize) -> Self {
        let batch = step.lens.len();
        let lens: Vec<i32> = (0..batch).map(|_| rng.below(most + 1) as i32).collect();
        let mut rows: Vec<i32> = (0..batch as i32 + 1).collect();
        rng.shuffle(&mut rows);
        rows.truncate(batch);
        let mut side = |dim: usize| {
            let shape = step.layout.shape(batch + 1, most, step.kv_heads, dim);
            let mut tensor = Dense::poisoned(step.dense_dtype, shape);
            for (b, &len) in lens.iter().enumerate() {
                for (t, h) in (0..len as usize).flat_map(|t| (0..step.kv_heads).map(move |h| (t, h))) {
                    let row: Vec<f64> = (0..dim).map(|_| rng.normal()).collect();
                    let row = if step.coarse { row.into_iter().map(super::coarse).collect() } else { row };
                    tensor.set_row(rows[b] as usize, t, h, &row);
                }
            }
            tensor
        };
        let (k, v) = (side(step.k.head_dim()), side(step.v.head_dim()));
        Self { k, v, lens, rows }
    }

    fn view(&self) -> ops::Dense<'_> {
        ops::Dense {
            k: self.k.view(),
            v: self.v.view(),
            lens: Mem::host(&self.lens),
            rows: Some(Mem::host(&self.rows)),
        }
    }

    fn tokens(&self, b: usize, h: usize) -> impl Iterator<Item = Token> + '_ {
        let row = self.rows[b] as usize;
        (0..self.lens[b] as usize).map(move |t| Token { k: self.k.row(row, t, h), v: self.v.row(row, t, h) })
    }
}

/// Inputs and the expected result of a [`Step`].
#[derive(Debug)]
pub struct Scene {
    pub step: Step,
    pub table: Table,
    pub k: Paged,
    pub v: Paged,
    sinks: Option<DenseSide>,
    window: Option<DenseSide>,
    pub center: Option<Vec<f32>>,
    first: Option<Vec<i32>>,
    pub q: Dense,
    indptr: Vec<i32>,
    /// `expected[token * q_heads + head]`.
    pub expected: Vec<(Vec<f64>, f64)>,
    /// Largest magnitude among the values, which is what errors of the output scale with.
    largest_v: f64,
}

impl Scene {
    pub fn new(step: Step) -> Self {
        let rng = &mut Rng::new(step.seed);
        let batch = step.lens.len();
        let (heads, dim_k, dim_v) = (step.kv_heads, step.k.head_dim(), step.v.head_dim());
        let mut table = Table::shuffled(rng, step.k.page_tokens(), &step.lens, 2);
        if step.head_lens {
            table = table.with_head_lengths(rng, heads);
        }
        let k = Paged::random(rng, step.dist, Pool::gaps(step.k, table.num_pages, heads), &table);
        let v = Paged::random(rng, step.dist, Pool::contiguous(step.v, table.num_pages, heads), &table);
        let sinks = step.sinks.map(|n| DenseSide::new(rng, &step, n));
        let window = step.window.map(|n| DenseSide::new(rng, &step, n));
        let centers = if step.centers == 2 { batch } else { step.centers };
        let center = (centers > 0).then(|| rng.floats(centers * heads * dim_k));

        // tokens[b][head]
        let center_of = |b: usize, h: usize| {
            let at = ((if centers > 1 { b } else { 0 }) * heads + h) * dim_k;
            center.as_ref().map(|c| &c[at..at + dim_k])
        };
        let tokens_of = |b: usize, h: usize| -> Vec<Token> {
            let pages = k.rows[b][h].iter().zip(&v.rows[b][h]).map(|(k, v)| Token {
                k: k.dense(step.k.value_type(), center_of(b, h)),
                v: v.dense(step.v.value_type(), None),
            });
            let dense = |side: &Option<DenseSide>| -> Vec<Token> {
                side.as_ref().map_or(Vec::new(), |side| side.tokens(b, h).collect())
            };
            dense(&sinks).into_iter().chain(pages).chain(dense(&window)).collect()
        };
        let tokens: Vec<Vec<Vec<Token>>> =
            (0..batch).map(|b| (0..heads).map(|h| tokens_of(b, h)).collect()).collect();

        let mut indptr = vec![0i32];
        for b in 0..batch {
            let n = if step.uneven_q { rng.below(step.q_len + 1) } else { step.q_len };
            indptr.push(indptr[b] + n as i32);
        }
        let total_q = indptr[batch] as usize;
        let q_shape = step.layout.shape(1, total_q, step.q_heads, dim_k);
        let q = Dense::random(rng, Dist::Normal, step.q_dtype, q_shape);
        let q = if step.coarse { q.coarse() } else { q };
        let longest = |b: usize| tokens[b].iter().map(Vec::len).max().unwrap_or(0);
        let first: Option<Vec<i32>> =
            step.padded.then(|| (0..batch).map(|b| rng.below(longest(b) + 2) as i32).collect());

        let scoring: Vec<Scoring> = (0..batch)
            .map(|b| Scoring {
                scale: step.scale.map_or(1.0 / (dim_k as f64).sqrt(), f64::from),
                softcap: step.softcap.map(f64::from),
                first: first.as_ref().map_or(0, |first| first[b] as usize),
                sliding_window: step.sliding_window,
            })
            .collect();
        let starts: Vec<usize> = indptr.iter().map(|&i| i as usize).collect();
        let expected = super::attention(&q, &starts, &tokens, dim_v, &scoring);
        let all_v = tokens.iter().flatten().flatten().flat_map(|token| &token.v);
        let largest_v = all_v.filter(|v| v.is_finite()).fold(0.0f64, |a, b| a.max(b.abs()));
        Self { step, table, k, v, sinks, window, center, first, q, indptr, expected, largest_v }
    }

    /// Output and LSE of the library, both poisoned before.
    pub fn run(&self, context: &Context) -> (Dense, Dense) {
        self.run_parts(context, true, true)
    }

    /// As [`Scene::run`] over a part of the tokens only: sinks and pages, the window, or both.
    pub fn run_parts(&self, context: &Context, prefix: bool, window: bool) -> (Dense, Dense) {
        let step = &self.step;
        let (tokens, heads) = (self.q.shape.tokens, step.q_heads);
        let mut out = Dense::poisoned(step.out_dtype, step.layout.shape(1, tokens, heads, step.v.head_dim()));
        let mut lse = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(1, tokens, heads, 1));
        let centers = if step.centers == 2 { step.lens.len() } else { step.centers };
        let compressed = Compressed {
            k: self.k.pool.view(),
            v: self.v.pool.view(),
            sequences: self.table.view(),
            k_center: self.center.as_ref().map(|c| Center { values: Mem::host(c), batch: centers }),
        };
        let args = Attend {
            q: self.q.view(),
            batch: step.lens.len(),
            q_indptr: step.uneven_q.then(|| Mem::host(&self.indptr)),
            max_q_len: step.q_len,
            sinks: self.sinks.as_ref().filter(|_| prefix).map(DenseSide::view),
            compressed: prefix.then_some(compressed),
            window: self.window.as_ref().filter(|_| window).map(DenseSide::view),
            first: super::mem(self.first.as_ref()),
            scale: step.scale,
            softcap: step.softcap,
            sliding_window: step.sliding_window,
            split_tokens: step.split_tokens,
            out: out.view_mut(),
            lse: Some(lse.view_mut()),
        };
        super::run::attend(context, args).unwrap();
        out.assert_gaps_untouched();
        (out, lse)
    }

    /// Drops every sequence but the first; bounds stay as they are.
    pub fn keep_first_sequence(&mut self) {
        assert!(!self.step.head_lens && !self.step.uneven_q && self.step.centers < 2);
        self.step.lens.truncate(1);
        self.table.lens.truncate(1);
        for side in [&mut self.sinks, &mut self.window].into_iter().flatten() {
            side.lens.truncate(1);
            side.rows.truncate(1);
        }
        if let Some(first) = &mut self.first {
            first.truncate(1);
        }
        let (tokens, heads) = (self.step.q_len, self.step.q_heads);
        let shape = self.step.layout.shape(1, tokens, heads, self.q.shape.dim);
        let mut q = Dense::poisoned(self.q.dtype, shape);
        for (_, t, h) in q.indices() {
            q.set_row(0, t, h, &self.q.row(0, t, h));
        }
        self.q = q;
        self.expected.truncate(tokens * heads);
    }

    /// Compares a result with the reference.
    pub fn check(&self, what: &str, out: &Dense, lse: &Dense) {
        self.check_with(what, out, lse, |x| x);
    }

    /// As [`Scene::check`], but any infinity or NaN will do for any other: an infinite value times a weight that
    /// float32 rounds to 0 is NaN, where float64 still has a weight.
    pub fn check_non_finite(&self, what: &str, out: &Dense, lse: &Dense) {
        self.check_with(what, out, lse, |x| if x.is_finite() { x } else { f64::NAN });
    }

    fn tolerance(&self, stored: DType, scale: f64) -> Tolerance {
        let types = [self.step.q_dtype, self.step.dense_dtype];
        Tolerance::of_attention(self.step.coarse, [self.step.k, self.step.v], types, stored, scale)
    }

    fn check_with(&self, what: &str, out: &Dense, lse: &Dense, view: impl Fn(f64) -> f64) {
        let view = |row: &[f64]| -> Vec<f64> { row.iter().map(|&x| view(x)).collect() };
        for (i, (expected, expected_lse)) in self.expected.iter().enumerate() {
            let (t, h) = (i / self.step.q_heads, i % self.step.q_heads);
            let what = format!("{what}: query {t}, head {h}");
            let tolerance = self.tolerance(out.dtype, self.largest_v);
            assert_close(&what, &view(&out.row(0, t, h)), &view(expected), tolerance);
            let scale = if expected_lse.is_finite() { 1.0 + expected_lse.abs() } else { 1.0 };
            let tolerance = self.tolerance(DType::F32, scale);
            assert_close(
                &format!("{what}, lse"),
                &view(&lse.row(0, t, h)),
                &view(&[*expected_lse]),
                tolerance,
            );
        }
    }
}

/// Rows of the K or V side as numbers, with a centre.
pub fn dense_rows(paged: &Paged, b: usize, h: usize, center: Option<&[f32]>) -> Vec<Vec<f64>> {
    let values = paged.pool.layout.format.value_type();
    paged.rows[b][h].iter().map(|row: &reference::Row| row.dense(values, center)).collect()
}
