//! `decompress` and `validate` against the reference.
#![allow(clippy::panic, clippy::unwrap_used)]

mod common;

use common::{
    Bytes, DIMS, Dense, Dist, Layout, PAGE_SIZES, Paged, Pool, Rng, Table, VALUE_TYPES, contexts, is_cuda,
    lengths, run,
};
use mustafar::ops::{Center, Decompress, Validate};
use mustafar::{Context, DType, Mem, PageFormat, Sequences, ValueType, reference};
use proptest::prelude::*;

const OUT_DTYPES: [DType; 3] = [DType::F16, DType::Bf16, DType::F32];

/// Centres `[batch, kv_heads, head_dim]`.
type Centers = Option<(Vec<f32>, usize)>;

fn run(
    context: &Context,
    pool: &Pool,
    sequences: Sequences<'_>,
    center: &Centers,
    out: &mut Dense,
) -> mustafar::Result<()> {
    let center = center.as_ref().map(|(c, batch)| Center { values: Mem::host(c), batch: *batch });
    let args = Decompress { pool: pool.view(), sequences, center, out: out.view_mut() };
    run::decompress(context, args)
}

/// The bits a dense element must have: exact copies without a centre in the same type, otherwise rounded once.
fn expected_row(row: &reference::Row, from: ValueType, center: Option<&[f32]>, to: DType) -> Vec<u32> {
    let dense = row.dense(from, None);
    let element = |(c, &bits): (usize, &u16)| {
        let x = dense[c] as f32;
        match (center, to) {
            (None, _) if from.dtype() == Some(to) => u32::from(bits),
            (None, DType::F32) => x.to_bits(),
            (Some(center), DType::F32) => (x + center[c]).to_bits(),
            _ => {
                let x = center.map_or(x, |center| x + center[c]);
                u32::from(reference::round(to, if x.is_nan() { f32::NAN } else { x }))
            }
        }
    };
    row.bits.iter().enumerate().map(element).collect()
}

fn bits_of(out: &Dense, b: usize, t: usize, h: usize) -> Vec<u32> {
    match out.dtype {
        DType::F32 => out.row(b, t, h).iter().map(|x| (*x as f32).to_bits()).collect(),
        _ => out.row_bits(b, t, h).iter().map(|x| u32::from(*x)).collect(),
    }
}

/// f32 NaN has many patterns; its place counts.
fn same(dtype: DType, got: &[u32], want: &[u32]) -> bool {
    let nan = |x: u32| dtype == DType::F32 && f32::from_bits(x).is_nan();
    got.iter().zip(want).all(|(&g, &w)| g == w || (nan(g) && nan(w)))
}

fn check(paged: &Paged, table: &Table, center: &Centers, layout: Layout, out_dtype: DType) {
    let format = paged.pool.layout.format;
    let (heads, dim) = (paged.pool.layout.kv_heads, format.head_dim());
    for context in contexts(&[1, 3]) {
        let shape = layout.shape(table.batch(), table.max_len + 2, heads, dim);
        let mut out = Dense::poisoned(out_dtype, shape);
        run(&context, &paged.pool, table.view(), center, &mut out).unwrap();
        out.assert_gaps_untouched();
        for (b, t, h) in out.indices() {
            let Some(row) = paged.rows[b][h].get(t) else {
                assert!(out.is_poisoned(b, t, h), "{context}: token {t} past the end was written");
                continue;
            };
            let center = center.as_ref().map(|(c, batch)| {
                let b = if *batch > 1 { b } else { 0 };
                &c[(b * heads + h) * dim..][..dim]
            });
            let want = expected_row(row, format.value_type(), center, out_dtype);
            let got = bits_of(&out, b, t, h);
            assert!(same(out_dtype, &got, &want), "{context} {format:?} to {out_dtype}: token {t} head {h}");
        }
        run::validate(&context, Validate { pool: paged.pool.view(), sequences: table.view(), record: None })
            .unwrap();
    }
}

#[test]
fn every_format_and_length() {
    let mut rng = Rng::new(1);
    for values in VALUE_TYPES {
        for dim in DIMS {
            for page_tokens in PAGE_SIZES {
                let keep = rng.below(dim) + 1;
                let uniform = PageFormat::uniform(values, dim, page_tokens, keep).unwrap();
                let ragged = PageFormat::ragged(values, dim, page_tokens, page_tokens * keep).unwrap();
                for format in [uniform, ragged] {
                    let table = Table::shuffled(&mut rng, page_tokens, &lengths(page_tokens), 3);
                    let pool = Pool::gaps(format, table.num_pages, 2);
                    let dist = *rng.pick(&Dist::ALL);
                    let paged = Paged::random(&mut rng, dist, pool, &table);
                    let (layout, out) = (*rng.pick(&Layout::ALL), *rng.pick(&OUT_DTYPES));
                    check(&paged, &table, &None, layout, out);
                }
            }
        }
    }
}

#[test]
fn rows_at_the_end_of_the_pool() {
    // The last row of the last page: a full-width load would read past the memory.
    for (dim, keep, values) in [(64, 1), (128, 1), (128, 39), (256, 9), (256, 256)]
        .into_iter()
        .flat_map(|(dim, keep)| VALUE_TYPES.map(|values| (dim, keep, values)))
    {
        let format = PageFormat::uniform(values, dim, 16, keep).unwrap();
        let mut rng = Rng::new(2);
        let table = Table::shuffled(&mut rng, 16, &[16], 0);
        let paged = Paged::random(&mut rng, Dist::Normal, Pool::contiguous(format, 1, 1), &table);
        check(&paged, &table, &None, Layout::TokensFirst, DType::F16);
    }
}

#[test]
fn contiguous_sequences_need_no_table() {
    let mut rng = Rng::new(3);
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 20).unwrap();
    // 2 sequences of up to 40 tokens: pages 0..3 and 3..6.
    let mut table = Table::shuffled(&mut rng, 16, &[37, 20], 1);
    table.entries = vec![0, 1, 2, i32::MIN, i32::MIN, 3, 4, i32::MIN, i32::MIN, i32::MIN];
    let paged = Paged::random(&mut rng, Dist::Normal, Pool::contiguous(format, 6, 2), &table);
    let mut with_table = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(2, 40, 2, 64));
    let mut without = with_table.clone();
    let context = Context::cpu(1).unwrap();
    run(&context, &paged.pool, table.view(), &None, &mut with_table).unwrap();
    let contiguous = Sequences { table: None, ..table.view() };
    run(&context, &paged.pool, contiguous, &None, &mut without).unwrap();
    assert!(with_table.bytes[..] == without.bytes[..]);
    let too_long = Sequences { max_len: 49, ..contiguous };
    let mut out = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(2, 49, 2, 64));
    let error = run(&context, &paged.pool, too_long, &None, &mut out).unwrap_err();
    let message =
        "sequences.max_len is 49 for 2 contiguous sequences; allowed: what fits in the pool's 6 pages";
    assert_eq!(error.to_string(), message);
}

#[test]
fn enough_work_for_threads() {
    let mut rng = Rng::new(4);
    let format = PageFormat::uniform(ValueType::Bf16, 128, 64, 39).unwrap();
    let table = Table::shuffled(&mut rng, 64, &[2100, 0, 1024], 1);
    let paged = Paged::random(&mut rng, Dist::AnyBits, Pool::contiguous(format, table.num_pages, 3), &table);
    let center = Some((rng.floats(3 * 3 * 128), 3));
    check(&paged, &table, &center, Layout::HeadsFirst, DType::F16);
    check(&paged, &table, &None, Layout::TokensFirst, DType::Bf16);
}

#[test]
fn damaged_uniform_pages_are_harmless() {
    // All bits set but few values: rows claim more than the page has. What they expand to does not matter; reading
    // stays inside, which the canaries of the pool's memory and Miri or ASan would notice, and other rows are right.
    let format = PageFormat::uniform(ValueType::F16, 128, 16, 3).unwrap();
    let mut rng = Rng::new(5);
    let table = Table::shuffled(&mut rng, 16, &[16], 0);
    let mut paged = Paged::random(&mut rng, Dist::Normal, Pool::contiguous(format, 1, 1), &table);
    paged.pool.page_mut(0, 0)[15 * 16..16 * 16].fill(0xff);
    for context in contexts(&[1, 3]) {
        let mut out = Dense::poisoned(DType::F16, Layout::TokensFirst.shape(1, table.max_len, 1, 128));
        let result = run(&context, &paged.pool, table.view(), &None, &mut out);
        // CUDA counts the row.
        assert_eq!(result.is_err(), is_cuda(&context));
        for t in 0..15 {
            assert_eq!(out.row_bits(0, t, 0), paged.rows[0][0][t].bits);
        }
        // On the CPU the row's 3 values, then what the page no longer has.
        let last = out.row_bits(0, 15, 0);
        assert_eq!(last[3..], [0; 125], "{context}");
    }
}

/// Runs a call that must fail with `expected` and write nothing.
#[track_caller]
fn refused(pool: &Pool, sequences: Sequences<'_>, center: &Centers, mut out: Dense, expected: &str) {
    let error = run(&Context::cpu(1).unwrap(), pool, sequences, center, &mut out).unwrap_err();
    assert_eq!(error.to_string(), expected);
    assert!(out.bytes.iter().all(|b| *b == 0xff), "written");
}

#[test]
fn bad_arguments() {
    let mut rng = Rng::new(6);
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 20).unwrap();
    let table = Table::shuffled(&mut rng, 16, &[37, 20], 0);
    let paged = Paged::random(&mut rng, Dist::Normal, Pool::contiguous(format, 5, 2), &table);
    let out = |shape| Dense::poisoned(DType::F32, shape);
    let good = || out(Layout::TokensFirst.shape(2, 40, 2, 64));
    let (pool, view) = (&paged.pool, table.view());

    let shape = |b, t, h, d| out(Layout::TokensFirst.shape(b, t, h, d));
    refused(pool, view, &None, shape(3, 40, 2, 64), "out.batch is 3; allowed: 2 (sequences.batch)");
    refused(pool, view, &None, shape(2, 40, 1, 64), "out.heads is 1; allowed: 2 (kv_heads of the pool)");
    refused(pool, view, &None, shape(2, 40, 2, 96), "out.dim is 96; allowed: 64 (head_dim of the pages)");
    let message = "out.tokens is 39; allowed: at least 40 (sequences.max_len)";
    refused(pool, view, &None, shape(2, 39, 2, 64), message);

    let lens = [37, 41];
    let bad = Sequences { lens: Mem::host(&lens), ..view };
    refused(pool, bad, &None, good(), "sequences.lens[1] is 41; allowed: 0 to 40");
    let lens = [-1, 20];
    let bad = Sequences { lens: Mem::host(&lens), ..view };
    refused(pool, bad, &None, good(), "sequences.lens[0] is -1; allowed: 0 to 40");
    let bad = Sequences { lens: Mem::host(&lens[..1]), ..view };
    refused(pool, bad, &None, good(), "sequences.lens has 4 bytes; needed: 8");
    let bad = Sequences { lens_per_head: true, ..view };
    refused(pool, bad, &None, good(), "sequences.lens has 8 bytes; needed: 16");

    for (entry, value) in [(1, -1), (table.stride + 1, 5)] {
        let mut entries = table.entries.clone();
        entries[entry] = value;
        let bad = Sequences { table: Some(Mem::host(&entries)), ..view };
        let message = format!("sequences.table[{entry}] is {value}; allowed: 0 to 4");
        refused(pool, bad, &None, good(), &message);
    }
    let bad = Sequences { table_stride: 2, ..view };
    refused(pool, bad, &None, good(), "sequences.table_stride is 2; allowed: at least 3 (pages of max_len)");
    let bad = Sequences { table: Some(Mem::host(&table.entries[..7])), ..view };
    refused(pool, bad, &None, good(), "sequences.table has 28 bytes; needed: 32");
    let bad = Sequences { batch: usize::MAX, ..view };
    refused(pool, bad, &None, good(), &format!("out.batch is 2; allowed: {} (sequences.batch)", usize::MAX));

    refused(
        pool,
        view,
        &Some((vec![0.0; 384], 3)),
        good(),
        "center.batch is 3; allowed: 1, or 2 (one per sequence)",
    );
    refused(pool, view, &Some((vec![0.0; 128], 2)), good(), "center has 512 bytes; needed: 1024");
}

#[test]
fn damaged_pages() {
    let mut rng = Rng::new(7);
    let table = Table::shuffled(&mut rng, 16, &[20, 40], 0);
    let ragged = PageFormat::ragged(ValueType::F16, 64, 16, 300).unwrap();
    let paged = Paged::random(&mut rng, Dist::Normal, Pool::contiguous(ragged, table.num_pages, 2), &table);
    let page = table.page(1, 16);
    let out = || Dense::poisoned(DType::F16, Layout::TokensFirst.shape(2, table.max_len, 2, 64));

    // Offsets that leave the page: refused by decompress and by validate, in the same words.
    let mut pool = paged.pool.clone();
    let at = ragged.offsets_offset().unwrap() + 2 * 5;
    let start = u16::from_le_bytes([pool.page(page, 1)[at - 2], pool.page(page, 1)[at - 1]]);
    let bits = paged.rows[1][1][20].kept();
    pool.page_mut(page, 1)[at..at + 2].copy_from_slice(&0xfff0u16.to_le_bytes());
    let message = format!(
        "page is damaged: sequence 1, head 1, page {page}: row 4 spans values {start} to 65520 but has {bits} bits set"
    );
    refused(&pool, table.view(), &None, out(), &message);
    let args = Validate { pool: pool.view(), sequences: table.view(), record: None };
    assert_eq!(run::validate(&Context::cpu(2).unwrap(), args).unwrap_err().to_string(), message);

    // A uniform row with a bit too many.
    let uniform = PageFormat::uniform(ValueType::F16, 64, 16, 7).unwrap();
    let paged = Paged::random(&mut rng, Dist::Normal, Pool::contiguous(uniform, table.num_pages, 2), &table);
    let mut pool = paged.pool.clone();
    pool.page_mut(page, 0)[3 * 8..4 * 8].fill(0x11);
    let args = || Validate { pool: pool.view(), sequences: table.view(), record: None };
    let message =
        format!("page is damaged: sequence 1, head 0, page {page}: row 3 has 16 bits set, keep is 7");
    assert_eq!(run::validate(&Context::cpu(1).unwrap(), args()).unwrap_err().to_string(), message);
    // Rows past the end do not count, whatever they hold.
    let lens = [20, 19];
    let shorter = Validate { sequences: Sequences { lens: Mem::host(&lens), ..table.view() }, ..args() };
    run::validate(&Context::cpu(1).unwrap(), shorter).unwrap();
    // Arguments are checked as everywhere.
    let lens = [20, 1000];
    let bad = Validate { sequences: Sequences { lens: Mem::host(&lens), ..table.view() }, ..args() };
    let error = run::validate(&Context::cpu(1).unwrap(), bad).unwrap_err();
    assert_eq!(error.to_string(), "sequences.lens[1] is 1000; allowed: 0 to 43");
}

#[test]
fn nothing_to_do() {
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 32).unwrap();
    let pool = Pool::contiguous(format, 0, 2);
    let empty = Bytes::poisoned(0);
    for (batch, lens) in [(0, vec![]), (2, vec![0, 0])] {
        let table = Some(Mem::host(&empty[..]));
        let sequences = Sequences {
            batch,
            table,
            table_stride: 0,
            lens: Mem::host(&lens[..]),
            lens_per_head: false,
            max_len: 0,
        };
        let mut out = Dense::poisoned(DType::F16, Layout::TokensFirst.shape(batch, 3, 2, 64));
        run(&Context::cpu(2).unwrap(), &pool, sequences, &None, &mut out).unwrap();
        assert!(out.bytes.iter().all(|b| *b == 0xff));
        run::validate(&Context::cpu(1).unwrap(), Validate { pool: pool.view(), sequences, record: None })
            .unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_call_equals_the_reference(
        seed: u64,
        dim in 0..4usize,
        page_tokens in 0..4usize,
        heads in 1..4usize,
        lens in proptest::collection::vec(0..150usize, 1..4),
        dist in 0..6usize,
        layout in 0..3usize,
        out in 0..3usize,
        center in 0..3usize,
        options: (bool, bool, bool),
    ) {
        let mut rng = Rng::new(seed);
        let (ragged, per_head, gaps) = options;
        let (values, dim, page_tokens) = (*rng.pick(&VALUE_TYPES), DIMS[dim], PAGE_SIZES[page_tokens]);
        let format = if ragged {
            PageFormat::ragged(values, dim, page_tokens, page_tokens * rng.below(dim + 1))
        } else {
            PageFormat::uniform(values, dim, page_tokens, rng.below(dim) + 1)
        }.unwrap();
        let mut table = Table::shuffled(&mut rng, page_tokens, &lens, 2);
        if per_head {
            table = table.with_head_lengths(&mut rng, heads);
        }
        let new = if gaps { Pool::gaps } else { Pool::contiguous };
        let paged = Paged::random(&mut rng, Dist::ALL[dist], new(format, table.num_pages, heads), &table);
        let centers = [0, 1, lens.len()][center];
        let center = (centers > 0).then(|| (rng.floats(centers * heads * dim), centers));
        check(&paged, &table, &center, Layout::ALL[layout], OUT_DTYPES[out]);
    }
}
