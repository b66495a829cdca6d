//! `spmv_key` and `spmv_value` against the float64 reference, at every instruction level of this processor.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{
    Dense, Dist, HEADS, Layout, Paged, Pool, Rng, Table, Tolerance, assert_close, contexts, lengths, run,
};
use mustafar::ops::{Center, SpmvKey, SpmvValue};
use mustafar::{Context, DType, Error, Mem, PageFormat, Sequences, ValueType, reference};

/// Compressed tokens of a batch.
struct Case {
    heads: (usize, usize),
    table: Table,
    paged: Paged,
    rng: Rng,
}

impl Case {
    fn new(seed: u64, format: PageFormat, heads: (usize, usize), lens: &[usize], per_head: bool) -> Self {
        let mut rng = Rng::new(seed);
        let mut table = Table::shuffled(&mut rng, format.page_tokens(), lens, 2);
        if per_head {
            table = table.with_head_lengths(&mut rng, heads.1);
        }
        let pool = Pool::gaps(format, table.num_pages, heads.1);
        let paged = Paged::random(&mut rng, Dist::Normal, pool, &table);
        Self { heads, table, paged, rng }
    }

    fn format(&self) -> PageFormat {
        self.paged.pool.layout.format
    }

    /// Tokens of one head, dense.
    fn tokens(&self, b: usize, head: usize, centre: Option<&[f32]>) -> Vec<Vec<f64>> {
        let group = self.heads.0 / self.heads.1;
        let rows = &self.paged.rows[b][head / group];
        rows.iter().map(|row| row.dense(self.format().value_type(), centre)).collect()
    }

    fn check_key(&mut self, layout: Layout, q_dtype: DType, centred: usize, scale: Option<f32>) {
        let (batch, q_len, dim) = (self.table.batch(), 2, self.format().head_dim());
        let (q_heads, kv_heads) = self.heads;
        let q = Dense::random(&mut self.rng, Dist::Normal, q_dtype, layout.shape(batch, q_len, q_heads, dim));
        let centre = self.rng.floats(centred * kv_heads * dim);
        for context in contexts(&[1, 3]) {
            let shape = layout.shape(batch, q_len, q_heads, self.table.max_len + 1);
            let mut scores = Dense::poisoned(DType::F32, shape);
            let args = SpmvKey {
                q: q.view(),
                pool: self.paged.pool.view(),
                sequences: self.table.view(),
                center: (centred > 0).then(|| Center { values: Mem::host(&centre), batch: centred }),
                scale,
                scores: scores.view_mut(),
            };
            run::spmv_key(&context, args).unwrap();
            scores.assert_gaps_untouched();
            for (b, t, h) in scores.indices() {
                let kv = h / (q_heads / kv_heads);
                let at = (if centred == 1 { 0 } else { b } * kv_heads + kv) * dim;
                let tokens = self.tokens(b, h, (centred > 0).then(|| &centre[at..at + dim]));
                let keys: Vec<&[f64]> = tokens.iter().map(|k| &k[..]).collect();
                let scale = scale.map_or(1.0 / (dim as f64).sqrt(), f64::from);
                let want = reference::spmv_key(&q.row(b, t, h), &keys, scale);
                let got = scores.row(b, t, h);
                let what = format!("{} b {b} t {t} h {h}", context);
                assert_close(&what, &got[..want.len()], &want, Tolerance::new(DType::F32, 4.0));
                assert!(got[want.len()..].iter().all(|x| x.is_nan()), "{what}: wrote past the length");
            }
        }
    }

    fn check_value(&mut self, layout: Layout, out_dtype: DType) {
        let (batch, q_len, dim) = (self.table.batch(), 3, self.format().head_dim());
        let (q_heads, kv_heads) = self.heads;
        let shape = layout.shape(batch, q_len, q_heads, self.table.max_len + 2);
        // Weights past a sequence's length stay poison: they must not be read.
        let mut weights = Dense::poisoned(DType::F32, shape);
        for (b, t, h) in weights.indices() {
            let len = self.table.len(b, h / (q_heads / kv_heads));
            let mut row = vec![f64::NAN; shape.dim];
            row[..len].fill_with(|| self.rng.uniform() / len as f64);
            weights.set_row(b, t, h, &row);
        }
        for context in contexts(&[1, 3]) {
            let mut out = Dense::poisoned(out_dtype, layout.shape(batch, q_len, q_heads, dim));
            let args = SpmvValue {
                weights: weights.view(),
                pool: self.paged.pool.view(),
                sequences: self.table.view(),
                out: out.view_mut(),
            };
            run::spmv_value(&context, args).unwrap();
            out.assert_gaps_untouched();
            for (b, t, h) in out.indices() {
                let tokens = self.tokens(b, h, None);
                let values: Vec<&[f64]> = tokens.iter().map(|v| &v[..]).collect();
                let weights = &weights.row(b, t, h)[..tokens.len()];
                let want = reference::spmv_value(weights, &values, dim);
                let what = format!("{} b {b} t {t} h {h}", context);
                assert_close(&what, &out.row(b, t, h), &want, Tolerance::new(out_dtype, 1.0));
            }
        }
    }
}

fn uniform(values: ValueType, dim: usize, keep: usize) -> PageFormat {
    PageFormat::uniform(values, dim, 32, keep).unwrap()
}

#[test]
fn every_head_dim_and_value_type() {
    for dim in common::DIMS {
        for values in common::VALUE_TYPES {
            for format in [uniform(values, dim, 23), PageFormat::ragged(values, dim, 32, 16 * dim).unwrap()] {
                let mut case = Case::new(1, format, (4, 2), &[70, 0, 33], false);
                case.check_key(Layout::TokensFirst, DType::F16, 0, None);
                case.check_value(Layout::TokensFirst, DType::F32);
            }
        }
    }
}

#[test]
fn every_group_and_layout() {
    for (heads, layout) in HEADS.into_iter().zip(Layout::ALL.into_iter().cycle()) {
        let mut case = Case::new(2, uniform(ValueType::F16, 64, 20), heads, &[40, 65], true);
        case.check_key(layout, DType::F32, 2, Some(0.7));
        case.check_key(layout, DType::Bf16, 1, Some(-1.0));
        case.check_value(layout, DType::F16);
        case.check_value(layout, DType::Bf16);
    }
}

#[test]
fn every_length() {
    for len in lengths(32) {
        let mut case = Case::new(3, uniform(ValueType::F16, 64, 9), (2, 1), &[len, 700], false);
        case.check_key(Layout::TokensFirst, DType::F16, 0, None);
        case.check_value(Layout::HeadsFirst, DType::F32);
    }
}

#[test]
fn errors_name_the_argument() {
    let case = Case::new(4, uniform(ValueType::F16, 64, 9), (4, 2), &[40], false);
    let context = Context::cpu(1).unwrap();
    let q = |heads, dim| Dense::poisoned(DType::F16, Layout::TokensFirst.shape(1, 2, heads, dim));
    let scores = |dim| Dense::poisoned(DType::F32, Layout::TokensFirst.shape(1, 2, 4, dim));
    let key = |q: &Dense, scores: &mut Dense, sequences: Sequences<'_>, scale| {
        let pool = case.paged.pool.view();
        let args = SpmvKey { q: q.view(), pool, sequences, center: None, scale, scores: scores.view_mut() };
        run::spmv_key(&context, args).unwrap_err().to_string()
    };
    let view = || case.table.view();
    let long = case.table.max_len;
    for (message, expected) in [
        (
            key(&q(3, 64), &mut scores(long), view(), None),
            "q.heads is 3; allowed: a positive multiple of the 2 KV heads",
        ),
        (key(&q(4, 96), &mut scores(long), view(), None), "q.dim is 96; allowed: 64 (head_dim of the pages)"),
        (
            key(&q(4, 64), &mut scores(long - 1), view(), None),
            "scores.dim is 42; allowed: at least max_len (43)",
        ),
        (key(&q(4, 64), &mut scores(long), view(), Some(f32::NAN)), "scale is NaN; allowed: a finite number"),
        (
            key(&q(4, 64), &mut scores(long), Sequences { batch: 2, ..view() }, None),
            "q.batch is 1; allowed: 2 (batch of sequences)",
        ),
    ] {
        assert_eq!(message, expected);
    }
    let lens = [44];
    let mut untouched = scores(long);
    let too_long = key(&q(4, 64), &mut untouched, Sequences { lens: Mem::host(&lens), ..view() }, None);
    assert_eq!(too_long, "sequences.lens[0] is 44; allowed: 0 to 43");
    assert!(
        untouched.indices().iter().all(|&(b, t, h)| untouched.is_poisoned(b, t, h)),
        "wrote before refusing"
    );

    let mut out = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(1, 2, 4, 96));
    let weights = scores(long);
    let args = SpmvValue {
        weights: weights.view(),
        pool: case.paged.pool.view(),
        sequences: view(),
        out: out.view_mut(),
    };
    let error = run::spmv_value(&context, args).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { argument: "out.dim", .. }), "{error}");
}
